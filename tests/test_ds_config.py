"""Every DeepSpeed configuration that is shipped is one that DeepSpeed and the Trainer understand."""

import json
from pathlib import Path

import processes
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "ds_config"
SHIPPED = sorted(FOLDER.glob("*.json"))


def _parse(path: str, output: str) -> str:
    """Fills the configuration in as a training does, and lets DeepSpeed check it."""
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import deepspeed_config

    from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
    from chatglm_ptuning.training.arguments import PrefixTrainingArguments
    from chatglm_ptuning.training.distributed import match_precision

    args = PrefixTrainingArguments(
        output_dir=output, deepspeed=path, per_device_train_batch_size=3, gradient_accumulation_steps=5,
        max_grad_norm=0.5, report_to="none",
    )  # fmt: skip
    match_precision(args, torch.bfloat16, None)

    class Model:
        config = ChatGLMConfig(hidden_size=64)

    args.hf_deepspeed_config.trainer_config_finalize(args, Model, 10)
    filled = deepspeed_config()
    assert "auto" not in json.dumps(filled)
    parsed = DeepSpeedConfig(filled)
    return json.dumps(
        {
            "batch": [parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu],
            "stage": parsed.zero_optimization_stage,
            "clipping": parsed.gradient_clipping,
            "bf16": parsed.bfloat16_config.enabled,
            "offload": parsed.zero_config.offload_param and parsed.zero_config.offload_param.device,
        }
    )


def test_the_list_is_complete():
    assert {path.stem for path in SHIPPED} == {
        "zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"
    }  # fmt: skip
    text = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"`{path.name}`" in text for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_understood(path, tmp_path):
    parsed = json.loads(processes.call(_parse, (str(path), str(tmp_path)), 1, tmp_path)[0])
    stage = int(path.stem[4])
    assert parsed == {
        "batch": [15, 3],
        "stage": stage,
        "clipping": 0.5,
        "bf16": stage == 3,
        "offload": path.stem.partition("_offload_")[2] or None,
    }
