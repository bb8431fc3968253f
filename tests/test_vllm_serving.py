"""Stock vLLM with this kit's prefixes against this kit's own engine: the same greedy answers, in float32.

vLLM has an environment of its own: $CHATGLM_PTUNING_VLLM_PYTHON names its Python; without it, one is made.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_glm4
import torch
from api_server import serving
from openai import BadRequestError, OpenAI
from test_native_checkpoint import make
from vllm_server import LENGTHS, ROOT, answers, difference, make_prefix, requests, vllm_python, vllm_serving

from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.prefix.formats import read_prefix, vllm
from chatglm_ptuning.serving.vllm import process

pytestmark = pytest.mark.slow

NANO = ROOT / "data" / "chatglm-nano"
NAMES = [f"p{length}" for length in LENGTHS]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    return vllm_python(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> Path:
    """A folder with prefixes of nano, one for each of the lengths."""
    folder = tmp_path_factory.mktemp("nano") / "prefixes"
    for name, length in zip(NAMES, LENGTHS, strict=True):
        make_prefix(NANO, folder / name, length)
    return folder


def native(folder: Path) -> Path:
    """A small base as transformers' GlmForCausalLM, with a vocabulary of GLM-4's form."""
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "max_position_embeddings": 512}
    make(folder, rope_theta=500000.0, **sizes)
    tiny_glm4.train().save(str(folder / "tokenizer.json"))
    settings = tiny_glm4.tokenizer_config(tokenizer_class="PreTrainedTokenizer")
    del settings["auto_map"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def unlike(asked: list[dict], ours: list[dict], theirs: list[dict]) -> list[tuple[str, str]]:
    compared = zip(asked, ours, theirs, strict=True)
    return [(request["model"], found) for request, one, other in compared if (found := difference(one, other))]


def test_answers_are_those_of_the_kits_engine(python, prefixes):
    """All lengths and the base in one batch, cold and cached; prefixes that come and change while vLLM runs."""
    asked = requests(["base", *NAMES])
    with serving(NANO, prefixes) as kit, vllm_serving(python, NANO, prefixes, "--vllm_args=--enforce-eager") as served:
        url = served[0]
        ours = answers(kit.url, asked)
        plain = {request["messages"][0]["content"]: reply["choices"][0]["message"]["content"]
                 for request, reply in zip(asked, ours, strict=True)
                 if request["model"] == "base" and "messages" in request}  # fmt: skip
        changed = sum(
            reply["choices"][0]["message"]["content"] != plain[request["messages"][0]["content"]]
            for request, reply in zip(asked, ours, strict=True)
            if "messages" in request
        )
        assert changed > len(plain) * 2  # the prefixes matter
        for _ in range(2):
            assert unlike(asked, ours, answers(url, asked)) == []
        penalised = [{**request, "extra_body": {"repetition_penalty": 1.3}} for request in asked]
        assert unlike(penalised, answers(kit.url, penalised), answers(url, penalised)) == []
        make_prefix(NANO, prefixes / "p16", 16, seed=1)
        make_prefix(NANO, prefixes / "p33", 20, seed=1)
        make_prefix(NANO, prefixes / "later", 12, seed=1)
        asked = requests(["later", *NAMES])
        now = answers(kit.url, asked)
        assert unlike(asked, now, answers(url, asked)) == []
        before = [
            reply for request, reply in zip(requests(["base", *NAMES]), ours, strict=True) if request["model"] == "p16"
        ]
        after = [reply for request, reply in zip(asked, now, strict=True) if request["model"] == "p16"]
        assert before != after
        check_client(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))


def check_client(client: OpenAI) -> None:
    """What the openai client sees besides greedy answers."""
    assert [model.id for model in client.models.list()] == ["base", "later", *sorted(NAMES)]
    chat = {"model": "p16", "messages": [{"role": "user", "content": "书的内容太差了"}], "temperature": 0}
    whole = client.chat.completions.create(**chat, max_tokens=12)
    stream = list(client.chat.completions.create(**chat, max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    assert {chunk.model for chunk in stream} == {whole.model} == {"p16"}
    sampled = [
        client.completions.create(model="p33", prompt=["好", "书"], n=2, seed=3, temperature=1, max_tokens=8)
        for _ in range(2)
    ]
    assert sampled[0].choices == sampled[1].choices
    assert len({choice.text for choice in sampled[0].choices}) == 4
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="p16", prompt="好", extra_body={"cache_salt": "ptuning:0"})
    assert refused.value.param == "cache_salt"
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="p16", prompt="好" * 3000)
    assert refused.value.code == "context_length_exceeded"
    room = 1024 - whole.usage.prompt_tokens  # the prefix does not count
    assert client.chat.completions.create(**chat, max_tokens=room).choices[0].finish_reason in ("stop", "length")


def test_tensor_parallelism(python, prefixes):
    asked = requests(["base", *NAMES])
    flags = ("--vllm_args=--enforce-eager --tensor-parallel-size 2", "--slots", "4")
    with serving(NANO, prefixes) as kit, vllm_serving(python, NANO, prefixes, *flags) as (url, _, _):
        assert unlike(asked, answers(kit.url, asked), answers(url, asked)) == []


def test_a_base_of_transformers_glm(python, tmp_path):
    base, folder = native(tmp_path / "glm-4-9b-chat-hf"), tmp_path / "prefixes"
    for name, length in zip(NAMES, LENGTHS, strict=True):
        make_prefix(base, folder / name, length)
    asked = requests(["base", *NAMES])
    with serving(base, folder) as kit, vllm_serving(python, base, folder, "--vllm_args=--enforce-eager") as (url, _, _):
        assert unlike(asked, answers(kit.url, asked), answers(url, asked)) == []


def test_vllm_alone(python, prefixes, tmp_path):
    """Exported prefixes in `LLM`: few blocks, prompts in pieces, no room for loaded prefixes, and wrong requests."""
    model = load_model(str(NANO))
    shape = model.config.prefix_shape
    generator = torch.Generator().manual_seed(2)
    asked = []
    for name in (None, *NAMES):
        for count in (1, 30, 100):
            asked.append((name, torch.randint(20, 7000, (count,), generator=generator).tolist()))
        if name is not None:
            vllm.write(tmp_path, read_prefix(prefixes / name, shape), shape, name)
            model.load_prefix(prefixes / name, name)
    model.generation_config.eos_token_id = None
    expected = []
    for name, ids in asked:
        prompt = torch.tensor([ids])
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), prefix=[name], max_new_tokens=12, do_sample=False
        )
        expected.append(made[0, len(ids) :].tolist())
    plugin = str(Path(process.__file__).parent / "plugin")
    environment = os.environ | {
        "PYTHONPATH": plugin,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    ran = subprocess.run(
        [python, ROOT / "tests" / "vllm_offline.py", NANO, tmp_path, json.dumps(asked)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in ran.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, ran.stderr[-5000:]
    found = json.loads(lines[0].removeprefix("ANSWERS "))
    assert found["cold"] == expected
    assert found["refused"] == ["error", expected[0], "error"]
    assert found["cached"] == expected
