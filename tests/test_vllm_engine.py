"""`serve --engine vllm` without vLLM: refusals, and the engine over a program that plays vLLM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fake_vllm
import pytest
import torch
from api_server import wait_for
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from tiny_base import make_prefix

from chatglm_ptuning import cli
from chatglm_ptuning.prefix.formats import read_prefix
from chatglm_ptuning.serving.api.app import Service, make_app
from chatglm_ptuning.serving.api.command import ServeArguments, make_service
from chatglm_ptuning.serving.engine.request import (
    EngineError,
    PromptTooLong,
    QueueFull,
    SamplingSettings,
    UnknownPrefix,
)
from chatglm_ptuning.serving.vllm import setup
from chatglm_ptuning.serving.vllm.process import PYTHON_VARIABLE, UnixConnection, find_python

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> str:
    return fake_vllm.write(tmp_path_factory.mktemp("python") / "python")


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A folder with the prefix "ads", of 7 virtual tokens."""
    make_prefix(base, tmp_path / "prefixes" / "ads", "今天有雨")
    return tmp_path / "prefixes"


@pytest.fixture
def service(base, folder, fake) -> Iterator[Service]:
    made = make_service(
        ServeArguments(
            model_name_or_path=str(base), prefix_dir=str(folder), engine="vllm", vllm_python=fake, slots=1,
            queue_limit=1, slot_tokens=40, vllm_args='--tensor-parallel-size 2 --some "a b"',
        )
    )  # fmt: skip
    with made.engine:
        yield made


def sent(service: Service) -> list[dict]:
    """The requests that vLLM got."""
    file = service.engine._process.prefix_dir.with_name("requests")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_tokens_and_stop_ids(service):
    settings = SamplingSettings(max_new_tokens=8, temperature=0.5, seed=3, stop_ids=(10,), repetition_penalty=1.5)
    generation = service.engine.submit([9, 10, 11, 12], settings)
    assert [token.id for token in generation] == [12, 11]
    assert (generation.finish_reason, generation.prompt_tokens, generation.cached_tokens) == ("stop", 4, 2)
    (body,) = sent(service)
    assert (body["model"], body["token_ids"]) == ("base", [9, 10, 11, 12])
    assert body["sampling_params"] == {
        "max_tokens": 8, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.5, "seed": 3,
        "stop_token_ids": [10], "ignore_eos": True, "detokenize": False, "logprobs": None,
    }  # fmt: skip


def test_log_probabilities_are_of_the_most_probable(service):
    generation = service.engine.submit([9], SamplingSettings(max_new_tokens=8, top_logprobs=2))
    (token,) = generation
    assert (token.id, token.logprob, token.top) == (9, -3.0, ((50, -1.0), (51, -2.0)))
    assert generation.finish_reason == "length"


def test_a_prefix_is_exported_and_again_when_it_changes(service, base, folder):
    settings = SamplingSettings(max_new_tokens=4)
    list(service.engine.submit([9], settings, "ads"))
    list(service.engine.submit([9], settings, "ads"))
    make_prefix(base, folder / "ads", "今天有雨你好")
    list(service.engine.submit([9], settings, "ads"))
    first, same, other = (body["model"] for body in sent(service))
    assert first == same != other
    files = service.engine._process.prefix_dir
    old, new = (load_file(files / f"{name}.vllm.safetensors")["key_values"] for name in (first, other))
    assert (old.shape[2], new.shape[2]) == (7, 9)  # requests that still run read the old one
    shape = service.engine._exports._model.config.prefix_shape
    theirs = read_prefix(files / f"{other}.vllm.safetensors", shape)
    ours = read_prefix(folder / "ads", shape)
    torch.testing.assert_close(theirs.parameters, ours.parameters, rtol=0, atol=2e-5)
    assert theirs.metadata.base_fingerprint == ours.metadata.base_fingerprint
    make_prefix(base, folder / "ads", "今天")
    service.engine.load_prefix("ads")
    assert not (files / f"{first}.vllm.safetensors").exists()


def test_prefixes_that_cannot_be_served_say_why_in_the_log(service, folder, caplog):
    settings = SamplingSettings(max_new_tokens=4)
    config = folder / "ads" / "prefix_config.json"
    fields = json.loads(config.read_text("utf-8"))
    for change, named in (
        ({"base_fingerprint": fields["base_fingerprint"] | {"sample_sha256": "0", "sample": {
            name: [number + 1 for number in numbers]
            for name, numbers in fields["base_fingerprint"]["sample"].items()
        }}}, "trained on another base"),
        ({"trained": False}, "untrained"),
    ):  # fmt: skip
        config.write_text(json.dumps(fields | change), encoding="utf-8")
        with pytest.raises(UnknownPrefix, match="cannot be loaded"):
            service.engine.submit([9], settings, "ads")
        assert named in caplog.text


def test_what_does_not_fit(service):
    assert (service.engine.context_length(), service.engine.context_length("ads")) == (40, 33)
    with pytest.raises(PromptTooLong, match="33 tokens"):
        service.engine.submit([9] * 30, SamplingSettings(max_new_tokens=7), "ads")
    with pytest.raises(UnknownPrefix, match="nobody"):
        service.engine.submit([9], SamplingSettings(max_new_tokens=4), "nobody")
    for ids in ([], [-1], [10**6]):
        with pytest.raises(ValueError, match=r"[Tt]oken"):
            service.engine.submit(ids, SamplingSettings(max_new_tokens=4))


def test_a_cancelled_answer_ends_and_frees_its_place(service):
    settings = SamplingSettings(max_new_tokens=8)
    running = [service.engine.submit([fake_vllm.ENDLESS], settings) for _ in range(2)]
    assert next(running[0]).id == 30
    with pytest.raises(QueueFull):
        service.engine.submit([9], settings)
    for generation in running:
        generation.cancel()
    wait_for(lambda: all(generation.finish_reason == "cancelled" for generation in running))
    assert [token.id for token in service.engine.submit([9], settings)] == [9]
    assert service.engine.stats().requests == {"cancelled": 2, "length": 1}


@pytest.mark.parametrize(("token", "named"), [(fake_vllm.ERROR, "Internal server error"), (fake_vllm.REFUSED, "400")])
def test_errors_of_vllm(service, token, named):
    with pytest.raises(EngineError, match=named):
        list(service.engine.submit([token], SamplingSettings(max_new_tokens=4)))


def test_the_api_is_the_same(service, base, folder):
    with TestClient(make_app(service), base_url="http://127.0.0.1") as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "ads"]
        reply = client.post("/v1/chat/completions", json={
            "model": "ads", "messages": [{"role": "user", "content": "问"}], "temperature": 0, "max_tokens": 8,
        }).json()  # fmt: skip
        assert (reply["model"], reply["usage"]["prompt_tokens"]) == ("ads", len(sent(service)[0]["token_ids"]))
        assert client.post("/v1/completions", json={"model": "no", "prompt": "问"}).json()["error"]["code"] == (
            "model_not_found"
        )
        assert "chatglm_engine_cache_tokens 160.0" in client.get("/metrics").text


def test_vllm_is_started_without_this_kit(service):
    started = json.loads(service.engine._process._lines[0])
    plugin = Path(started["PYTHONPATH"])
    assert [path.name for path in plugin.iterdir() if path.is_dir() and path.name[0] != "_"] == ["ptuning_vllm"]
    arguments = started["arguments"]
    assert arguments[-4:] == ["--tensor-parallel-size", "2", "--some", "a b"]
    overrides = json.loads(arguments[arguments.index("--hf-overrides") + 1])
    assert overrides["seq_length"] == 40 == int(arguments[arguments.index("--max-model-len") + 1])
    for path in plugin.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) chatglm", path.read_text(), re.M)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder with a path that leaves room for a Unix socket, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("how", [pytest.param("death", marks=pytest.mark.slow), "SIGTERM",
                                 pytest.param("SIGINT", marks=pytest.mark.slow),
                                 pytest.param("SIGKILL", marks=pytest.mark.slow)])  # fmt: skip
def test_the_command_ends_with_vllm(base, folder, fake, short_folder, how, monkeypatch):
    log = short_folder / "log"
    command = [sys.executable, "-m", "chatglm_ptuning", "serve", "--engine", "vllm", "--vllm_python", fake,
               "--port", "0", "--model_name_or_path", base, "--prefix_dir", folder]  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(short_folder))
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "API: " in log.read_text("utf-8") or process.poll() is not None, seconds=120)
        if how == "death":
            end_vllm(next(short_folder.glob("chatglm-vllm-*/socket")))
        else:
            process.send_signal(getattr(signal, how))
        code, text = process.wait(timeout=30), log.read_text("utf-8")
    finally:
        process.kill()
        process.wait()
    if how == "SIGKILL":
        socket_path = str(next(short_folder.glob("chatglm-vllm-*/socket")))
        wait_for(lambda: not is_open(socket_path))  # vLLM has ended, too
        return
    assert "Traceback" not in text, text
    assert code == (1 if how == "death" else 0), text
    if how == "death":
        assert text.rstrip().endswith("out of memory")
    assert not list(short_folder.glob("chatglm-vllm-*"))


def is_open(address: str) -> bool:
    try:
        UnixConnection(address).connect()
    except OSError:
        return False
    return True


def end_vllm(address: Path | str) -> None:
    body = {"token_ids": [fake_vllm.DEATH], "sampling_params": {}}
    UnixConnection(str(address)).request("POST", "/inference/v1/generate", json.dumps(body))


def test_a_death_ends_the_server_and_is_explained(base, folder, fake, monkeypatch):
    signals = []
    monkeypatch.setattr("os.kill", lambda *sent: signals.append(sent))
    flags = {"model_name_or_path": str(base), "prefix_dir": str(folder), "engine": "vllm", "vllm_python": fake}
    service = make_service(ServeArguments(**flags))
    with (
        pytest.raises(OSError, match=r"(?s)ended with code 3\. Its last lines:.*out of memory$"),
        service.engine as engine,
    ):
        end_vllm(engine._process.address)
        wait_for(lambda: signals)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    monkeypatch.setenv("FAKE_ENDS", "no memory for the cache")
    with (
        pytest.raises(OSError, match=r"(?s)ended with code 1.*no memory for the cache"),
        make_service(ServeArguments(**flags)).engine,
    ):
        pass


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--engine", "vllm", "--quantization_bit", "4"], 2, "--quantization_bit is of --engine kit"),
        (["--engine", "vllm", "--prefill_chunk", "9"], 2, "--max-num-batched-tokens"),
        (["--vllm_args=--tensor-parallel-size 2"], 2, "--engine vllm"),
        (["--engine", "vllm", "--port", "0"], 1, "pip install vllm=="),
        (["--engine", "vllm", "--port", "0", "--vllm_python", "/no/python"], 1, "/no/python is not a Python"),
    ],
)
def test_wrong_flags(flags, code, named, capsys, monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *flags])
    assert ended.value.code == code
    assert named in capsys.readouterr().err


def test_versions_of_vllm(fake, monkeypatch, caplog):
    monkeypatch.setenv("FAKE_VERSION", "0.24.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.24\.1; prefixes need 0\.32\.0 or later.*--vllm_python"):
        find_python(fake)
    monkeypatch.setenv("FAKE_VERSION", "0.40.0")
    assert find_python(fake) == fake
    assert "tested with 0.32.0" in caplog.text
    monkeypatch.setenv("FAKE_VERSION", "")
    monkeypatch.setenv(PYTHON_VARIABLE, fake)
    with pytest.raises(ValueError, match="There is no vLLM in the environment of"):
        find_python(None)


def test_a_temporary_folder_whose_path_is_too_long(base, folder, fake, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    flags = {"model_name_or_path": str(base), "prefix_dir": str(folder), "engine": "vllm", "vllm_python": fake}
    with pytest.raises(ValueError, match=r"Unix socket: set \$TMPDIR"):
        make_service(ServeArguments(**flags))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_ratio": 16.0, "position_interpolation": True}, "ChatGLM2-6B-32K.*divides the positions by 16"),
        ({"dequantized_from_bit": 4}, "official 4-bit format.*unquantised"),
        ({"multi_query_attention": False, "multi_query_group_num": 4}, "multi_query_attention false"),
        ({"kv_channels": 16}, r"kv_channels 16.*\(32 / 4\)"),
    ],
)
def test_bases_that_vllm_computes_otherwise(tiny_config, tmp_path, changes, named):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} .*{named}.*Leave out --engine vllm"):
        setup.check_servable(config, tmp_path)


def test_a_prefix_among_the_weights_of_the_base(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    setup.check_servable(tiny_config(), tmp_path)
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.ones(2, 64)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"prefix among the weights.*folder of its own"):
        setup.check_servable(tiny_config(), tmp_path)
