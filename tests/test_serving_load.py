"""`python -m benchmarks.serving`: many clients against the real server, on a tiny base."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving import __main__ as program
from benchmarks.serving import engine, results
from benchmarks.serving.clients import Seen
from benchmarks.serving.mixed import EQUAL, Outcome
from benchmarks.timing import Sample

pytest.importorskip("openai")


def rows_of(folder) -> dict[tuple[str, str | None], dict]:
    rows = json.loads((folder / results.JSON_FILE).read_text("utf-8"))
    return {(row["quantity"], row["compared_with"]): row for row in rows}


@pytest.fixture
def run(base, tmp_path, capsys):
    """Runs the program on the tiny base; returns its rows and what it prints."""

    def with_flags(*flags):
        program.main(["--model_name_or_path", str(base), "--output", str(tmp_path), "--prefixes", "3", *flags])
        return rows_of(tmp_path), capsys.readouterr().out

    return with_flags


def test_load(run, tmp_path):
    rows, printed = run("--seconds", "4.5", "--alone", "1", "--clients", "6")
    for fault in (results.FAILED, results.STUCK, results.LOST):
        assert rows[fault.what, None]["ours"] == 0
    throughput = rows[results.THROUGHPUT.what, results.THROUGHPUT.theirs]
    assert throughput["ours"] > 0 and throughput["theirs"] > 0 and throughput["goal"] == 5
    assert rows[results.FIRST.what, results.FIRST.theirs]["ours"] > 0
    assert rows[results.MEMORY.what, results.MEMORY.theirs]["ours"] > 50
    assert rows[results.BATCH.what, results.BATCH.theirs]["theirs"] > 0
    assert (tmp_path / results.PICTURE_FILE).stat().st_size > 1000
    assert results.FIRST.what in (tmp_path / results.MARKDOWN_FILE).read_text("utf-8")
    assert "tokens/s" in printed


def test_mixed_requests_and_a_killed_worker(run):
    rows, printed = run("--seconds", "0", "--mixed", "250")
    assert rows[results.COMPARED.what, None]["ours"] > 100
    for fault in (results.WRONG, results.BROKEN, results.LOST, results.AGAIN):
        assert rows[fault.what, None]["ours"] == 0, printed
    assert rows[results.RECOVERY.what, None]["ours"] < 5
    assert "refused" in printed and "cancelled" in printed


def test_the_engine_alone(run, tmp_path):
    rows, printed = run("--seconds", "0", "--engine", "tiny")
    assert rows[engine.ALONE.what, None]["ours"] > 0
    many, mixed = rows[engine.MANY.what, None], rows[engine.MIXED.what, engine.MIXED.theirs]
    assert many["ours"] == mixed["ours"] > 0 and mixed["theirs"] > 0 and mixed["measurements"] == 2
    assert many["unit"] == "tokens/s" and f"{engine.REQUESTS} requests" in printed
    assert not (tmp_path / results.PICTURE_FILE).exists()


def test_the_goals_of_the_engine_are_for_a_large_base_on_a_gpu():
    speed = Sample((2900.0,))
    assert [quantity.row("cuda", "G", speed).holds for quantity in (engine.ALONE, engine.MANY)] == [True, False]
    assert engine.MIXED.row("cuda", "G", speed, Sample((3000.0,))).holds
    assert [quantity.row("cpu", "S", speed).holds for quantity in (engine.ALONE, engine.MANY)] == [None, None]
    assert program.LoadArguments(device="cuda").engine == ["G"]
    assert program.LoadArguments().engine == []


def test_a_fault_is_an_error_of_the_program(monkeypatch, capsys):
    outcome = Outcome({"streamed": {EQUAL: 3, "different from the single run": 1, "status 500": 2}})
    found = results.of_mixed(outcome, 0, [Seen(0.0, 0.1, 0.2, 5)], 6)
    monkeypatch.setattr(program, "run", lambda args: found)
    with pytest.raises(SystemExit) as ended:
        program.main([])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert results.WRONG.what in message and results.BROKEN.what in message and results.LOST.what not in message
    assert [row.ours.median for row in found if row.quantity in (results.WRONG, results.BROKEN)] == [1, 2]


def test_throughput_is_what_arrives_in_the_time():
    # Every second a request starts; its 10 tokens arrive in the second after it.
    seen = [Seen(float(start), start + 1.0, start + 2.0, 10) for start in range(21)]
    assert results.tokens_per_second(seen).values == pytest.approx([10] * 9)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--clients", "0"], "--clients"),
        (["--seconds", "0"], "--mixed"),
        (["--mixed", "-1"], "-1"),
        (["--engine", "X"], "--engine"),
    ],
)
def test_wrong_flags(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(flags)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
