"""`bash scripts/serve.sh`: starts, says what it serves, answers, and ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from api_server import wait_for
from tiny_base import ANSWERS, make_prefix

from chatglm_ptuning import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_script_serves_until_a_signal(base, tmp_path, number):
    make_prefix(base, tmp_path / "ads", "今天有雨")
    log = tmp_path / "log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": path}
    command = ["bash", "scripts/serve.sh", "--model_name_or_path", base, "--prefix_dir", tmp_path, "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(lambda: "API: " in log.read_text("utf-8") or process.poll() is not None, seconds=60)
        assert "Prefixes in" in log.read_text("utf-8") and "ads" in log.read_text("utf-8")
        address = re.search(r"API: (http\S+)", log.read_text("utf-8"))[1]
        wait_for(lambda: _is_up(address))
        request = {"model": "base", "messages": [{"role": "user", "content": "问"}], "temperature": 0}
        with httpx2.stream("POST", f"{address}/chat/completions", json=request | {"stream": True}) as streamed:
            process.send_signal(number)  # the running answer is finished
            lines = list(streamed.iter_lines())
        assert lines[-2] == "data: [DONE]"
        assert "".join(re.findall('"content":"(.*?)"', "\n".join(lines))) == ANSWERS["问"]
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in log.read_text("utf-8")
    finally:
        process.kill()
        process.wait()


def _is_up(address: str) -> bool:
    try:
        return httpx2.get(address.removesuffix("/v1") + "/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_a_taken_port(base, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--model_name_or_path", str(base), "--port", str(taken.getsockname()[1])])
    assert ended.value.code == 1
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--host", "0.0.0.0"], 1, "--no_api_key"),
        (["--port", "70000"], 2, "--port"),
        (["--max_choices", "0"], 2, "--max_choices"),
        (["--api_key_file", "/no/such/file"], 1, "/no/such/file"),
        (["--model_name_or_path", "/no/such/base", "--port", "0"], 1, "/no/such/base"),
    ],
)
def test_wrong_flags(flags, code, named, capsys, monkeypatch):
    monkeypatch.delenv("CHATGLM_PTUNING_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *flags])
    assert ended.value.code == code
    assert named in capsys.readouterr().err


def test_missing_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve"])
    assert ended.value.code == 1
    assert "pip install 'chatglm-ptuning[serve]'" in capsys.readouterr().err
