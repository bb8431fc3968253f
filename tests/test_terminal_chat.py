"""`chatglm-ptuning chat`, driven as a user does: through a pipe and through a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_chat_base import make_model, write_base, write_prefix

from chatglm_ptuning.model.arguments import InferenceBaseArguments
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.serving import terminal

QUERY = "今天天气很好"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    write_base(folder / "base")
    for seed, name in enumerate(("ads", "qa")):
        write_prefix(folder / "base", folder / "runs" / name, seed)
        os.utime(folder / "runs" / name / "prefix_config.json", (seed, seed))
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    """What each prefix answers to the query, without control characters, which are not printed."""
    model, tokenizer = load_model(str(folder / "base")), load_tokenizer(str(folder / "base"))
    for name in ("ads", "qa"):
        model.load_prefix(folder / "runs" / name, name)
    answers = {}
    for name in (None, "ads", "qa"):
        model.set_prefix(name)
        answer, _ = model.chat(tokenizer, QUERY, do_sample=False, max_new_tokens=12)
        answers[name] = "".join(character for character in answer if character >= " " or character in "\t\n")
    assert len(set(answers.values())) == 3 and all(answers.values())
    return answers


def _flags(folder, *more):
    base = str(folder / "base")
    return [
        "--model_name_or_path",
        base,
        "--runs_folder",
        str(folder / "runs"),
        "--greedy",
        "--max_new_tokens",
        "12",
        *more,
    ]


def _environment():
    root = str(Path(terminal.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "PYTHONUTF8": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(monkeypatch):
    """Runs the command on these lines of input; returns what it printed."""

    def run(argv, *lines):
        text = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", output)
        terminal.main(argv)
        output.flush()
        return output.buffer.getvalue().decode()

    return run


def test_a_conversation_through_a_pipe(folder, answers):
    lines = [
        QUERY,
        "",
        "/prefix",
        "/clear",
        f"/load {folder / 'runs' / 'ads'}",
        QUERY,
        "/clear",
        "/prefix none",
        QUERY,
        "/exit",
        "never read",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "chatglm_ptuning", "chat", *_flags(folder)],
        input="\n".join(lines).encode(),
        capture_output=True,
        cwd=folder,
        env=_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    assert f"Prefix: qa, trained last ({folder / 'runs' / 'qa'})" in printed
    places = [printed.index(answers[name]) for name in ("qa", "ads", None)]
    assert places == sorted(places)
    assert "* qa\n  none\n" in printed


def test_switching(folder, answers, run):
    printed = run(
        _flags(folder, "--ptuning_checkpoint", f"first={folder / 'runs' / 'ads'}", "--ptuning_checkpoint",
               str(folder / "runs" / "qa")),
        QUERY, "/prefix", "/clear", "/prefix qa", QUERY, "/clear", "/prefix none", QUERY, "/prefix other", "/prefix",
    )  # fmt: skip
    assert "Prefix: first (loaded: first, qa)" in printed
    places = [printed.index(answers[name]) for name in ("ads", "qa", None)]
    assert places == sorted(places)
    assert "* first\n  qa\n  none\n" in printed
    assert "No prefix named 'other' is loaded; loaded: first, qa. /load PATH loads one." in printed
    assert printed.rstrip().endswith("* none")


def test_loading(folder, answers, run, tmp_path):
    spaced = write_prefix(folder / "base", tmp_path / "my run" / "checkpoint-7", seed=1)
    printed = run(
        [*_flags(folder), "--runs_folder", str(tmp_path / "nothing")],
        f"/load {folder / 'runs' / 'ads'}",
        QUERY,
        "/clear",
        f"/load '{spaced}'",
        QUERY,
        f"/load {folder / 'runs' / 'ads'} 广告",
        "/prefix",
        f"/load {tmp_path}",
        f"/load '{spaced}' none",
        "/load",
        "/prefix",
    )
    assert f"No trained prefix under {tmp_path / 'nothing'}: answering with the plain base." in printed
    assert "`bash scripts/train.sh` trains one" in printed
    assert printed.index(answers["ads"]) < printed.index(answers["qa"])
    assert "  ads\n  my run/checkpoint-7\n* 广告\n  none\n" in printed
    assert f"Not loaded: No prefix in {tmp_path}" in printed
    assert "'none' is the name of the plain base" in printed
    assert "Usage: /load PATH [NAME]" in printed


def test_commands_that_are_wrong(folder, run):
    printed = run(_flags(folder), "/clean", "/load 'x", "/prefix a b", "/help", " /exit is no command here", "/clear")
    assert "There is no command /clean; /help lists them." in printed
    assert "Cannot read this command: No closing quotation." in printed
    assert "Usage: /prefix [NAME]" in printed
    assert "/load PATH [NAME]" in printed
    assert "New conversation." in printed


def test_a_message_that_is_too_long_does_not_end_the_chat(folder, answers, run):
    printed = run(_flags(folder), "天气" * 300, QUERY)
    assert "No answer: The message takes" in printed
    assert answers["qa"] in printed


def test_bytes_that_are_no_text(folder, run):
    printed = run(_flags(folder), b"\xe4\xbd", b"/prefix \xff", "/prefix")
    assert "No prefix named '\ufffd' is loaded" in printed
    assert "* qa" in printed


@pytest.fixture
def interrupted() -> Iterator[threading.Event]:
    """Set when the main thread has got a SIGINT, also where the tests run in the background, which ignores it."""
    event = threading.Event()

    def handler(*arguments):
        event.set()
        signal.default_int_handler(*arguments)

    before = signal.signal(signal.SIGINT, handler)
    yield event
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_current_answer(folder, answers, run, monkeypatch, interrupted):
    load, steps = InferenceBaseArguments.load_model, []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 6:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert interrupted.wait(20)

    def load_interrupted(arguments):
        model = load(arguments)
        model.transformer.encoder.layers[1].register_forward_pre_hook(interrupt)
        return model

    monkeypatch.setattr(InferenceBaseArguments, "load_model", load_interrupted)
    printed = run(_flags(folder), QUERY, "/clear", QUERY)
    before, after = printed.split("(stopped)")
    assert answers["qa"] not in before
    assert answers["qa"] in after


def test_a_prefix_of_another_base_is_reported_and_not_used(folder, answers, run, tmp_path):
    make_model(len(load_tokenizer(str(folder / "base"))), seed=9).save_pretrained(tmp_path / "other")
    write_prefix(tmp_path / "other", tmp_path / "runs" / "foreign", seed=0)
    printed = run([*_flags(folder), "--runs_folder", str(tmp_path / "runs")], QUERY)
    assert "is not used: " in printed and "was trained on another base" in printed
    assert answers[None] in printed


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--ptuning_checkpoint", "nowhere"], 1, "No prefix at nowhere"),
        (["--ptuning_checkpoint", "runs/ads", "again/../runs/ads"], 1, "prefixes .*'ads'"),
        (["--model_name_or_path", "./nowhere"], 1, "No base at nowhere"),
        (["--max_new_tokens", "512"], 1, "max_new_tokens .*1 to 511.* 512"),
        (["--temperature", "0"], 2, "--temperature .*above 0 .*--greedy .* 0.0"),
        (["--slot_tokens", "1"], 2, "--slot_tokens .*at least 2.* 1"),
        (["--slot_tokens", "40", "--max_new_tokens", "40"], 1, "max_new_tokens .*1 to 39.* 40"),
        (["--top_p", "1.5"], 2, "--top_p .*above 0 .*at most 1.* 1.5"),
        (["--topp", "0.5"], 2, "--topp .did you mean --top_p"),
    ],
)
def test_wrong_flags(folder, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(folder)
    (folder / "again").mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as ended:
        terminal.main([*_flags(folder), *flags])
    assert ended.value.code == code
    assert re.search(message, capsys.readouterr().err)


def test_names_of_prefixes(tmp_path, monkeypatch):
    (tmp_path / "lr=1" / "checkpoint-20").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert terminal.name_and_path("ads=lr=1") == ("ads", "lr=1")
    assert terminal.name_and_path("lr=1") == ("lr=1", "lr=1")
    assert terminal.name_and_path("lr=1/checkpoint-20/") == ("lr=1/checkpoint-20", "lr=1/checkpoint-20/")


class Screen:
    """The command in a pseudo-terminal."""

    def __init__(self, argv, cwd):
        self.main, side = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chatglm_ptuning", "chat", *argv],
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=cwd,
            env=_environment(),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
        )
        os.close(side)
        self.printed = b""

    def wait_for(self, text, seconds=120.0):
        """Reads until the text has been printed after the text of the last wait."""
        end = time.monotonic() + seconds
        while text.encode() not in self.printed:
            if not select.select([self.main], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} was not printed:\n{self.printed.decode(errors='replace')}")
            self.printed += os.read(self.main, 4096)
        before, _, self.printed = self.printed.partition(text.encode())
        return before.decode(errors="replace")

    def interrupt_until(self, text):
        """Sends SIGINT, again where readline was busy with a character just then and lost it."""
        for _ in range(10):
            os.kill(self.process.pid, signal.SIGINT)
            try:
                return self.wait_for(text, seconds=12)
            except AssertionError:
                continue
        raise AssertionError(f"{text!r} was not printed after 10 interrupts")

    def type(self, text):
        os.write(self.main, text.encode())


def test_a_conversation_in_a_terminal(folder):
    screen = Screen(_flags(folder), folder)
    try:
        screen.wait_for("> ")
        screen.type("/prefix 没有\x7f\r")
        screen.wait_for("No prefix named '没' is loaded")
        screen.wait_for("> ")
        screen.type("half a line")
        screen.wait_for("half a line")
        screen.interrupt_until("Leave with /exit or Ctrl-D.")
        screen.wait_for("> ")
        screen.type("/prefix\r")
        assert "* qa" in screen.wait_for("> ").split("/prefix")[-1]
        screen.type("\x04")
        assert screen.process.wait(timeout=60) == 0
    finally:
        if screen.process.poll() is None:
            screen.process.kill()
        os.close(screen.main)
