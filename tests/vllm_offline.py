"""Run by the Python of an environment with vLLM: asks `LLM` with the connector, and prints what it answers as JSON.

Arguments: the base, the folder of exported prefixes, and JSON of requests `[name or null, token ids]`.
"""

import json
import sys

from ptuning_vllm.prefixes import SALT, PrefixFolder, prefix_prompt
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

PLACEHOLDER = 1


def main(base: str, folder: str, requests: str) -> None:
    transfer = KVTransferConfig(
        kv_connector="PrefixConnector", kv_connector_module_path="ptuning_vllm.connector", kv_role="kv_consumer",
        kv_connector_extra_config={"prefix_dir": folder, "placeholder_id": PLACEHOLDER, "prefix_memory_mb": 0},
    )  # fmt: skip
    llm = LLM(
        model=base, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, max_num_seqs=8,
        max_num_batched_tokens=64, enable_chunked_prefill=True, num_gpu_blocks_override=24, kv_transfer_config=transfer,
    )  # fmt: skip
    prefixes = PrefixFolder(folder).by_name()
    settings = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)

    def ask(prompts: list) -> list:
        outputs = [output.outputs[0] for output in llm.generate(prompts, settings, use_tqdm=False)]
        return [
            list(output.token_ids) if output.finish_reason == "length" else output.finish_reason for output in outputs
        ]

    asked = json.loads(requests)
    good = [prefix_prompt(prefixes.get(name), ids, PLACEHOLDER) for name, ids in asked]
    salt = next(iter(prefixes.values())).salt
    bad = [
        {"prompt_token_ids": list(range(30, 70)), "cache_salt": salt},
        {"prompt_token_ids": [PLACEHOLDER] * 40, "cache_salt": f"{SALT}0"},
    ]
    found = {"cold": ask(good), "refused": ask([bad[0], good[0], bad[1]]), "cached": ask(good)}
    print("ANSWERS", json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
