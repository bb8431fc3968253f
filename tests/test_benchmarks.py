"""`python -m benchmarks`: every side learns the same examples, and the report says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, median, stdev

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.golden import check_golden
from benchmarks.memory import peak_memory
from benchmarks.peers import CheckpointedLora, Lora, PeftPrefix
from benchmarks.quantities import QUANTITIES
from benchmarks.shapes import SHAPES, advertisements, as_steps, chats, make_model
from benchmarks.sides import BarePass, Kit, Official, Padded

pytest.importorskip("peft")
SHAPE = SHAPES["tiny"]
ALIKE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def model():
    return make_model(SHAPE, torch.device("cpu"), torch.float32, prefix_dropout=0.0)


@pytest.fixture
def steps():
    return as_steps(advertisements(SHAPE, 6), 3)


def prefix_gradient(side) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the prefix of the next step, without an optimizer step."""
    side.optimizer.step = lambda: None
    seen = []
    side.optimizer.zero_grad = lambda: seen.append([parameter.grad.clone() for parameter in side.trained])
    loss = side.step()
    ((gradient,),) = seen
    side.model.zero_grad()
    return loss, gradient


# ---- sides ----


@pytest.mark.parametrize("at_once", [3, 1])
@pytest.mark.parametrize("kind", [Official, Padded])
def test_recipes_on_this_kits_model_compute_the_same(model, steps, tmp_path, kind, at_once):
    kit, other = Kit(model, steps, at_once, folder=tmp_path), kind(model, steps, at_once)
    for _ in range(3):  # after the last step the first comes again
        (loss, gradient), (its_loss, its_gradient) = prefix_gradient(kit), prefix_gradient(other)
        torch.testing.assert_close(loss, its_loss, **ALIKE)
        torch.testing.assert_close(gradient, its_gradient, **ALIKE)


def test_gradients_are_clipped_and_parameters_change(model, steps, tmp_path):
    for side in (Kit(model, steps, folder=tmp_path), Official(model, steps), PeftPrefix(model, steps)):
        before = [parameter.detach().clone() for parameter in side.trained]
        side.step()
        assert all(parameter.grad is None for parameter in side.trained)
        assert any((parameter != old).any() for parameter, old in zip(side.trained, before, strict=True))


@torch.no_grad()
def test_pefts_prefix_of_zeros_is_ours(model, steps, tmp_path):
    peft, kit = PeftPrefix(model, steps), Kit(model, steps, folder=tmp_path)
    assert [parameter.numel() for parameter in peft.trained] == [parameter.numel() for parameter in kit.trained]
    for parameter in (*peft.trained, *kit.trained):
        parameter.zero_()
    with torch.enable_grad():
        torch.testing.assert_close(peft.backward(), kit.backward(), **ALIKE)


@pytest.mark.parametrize("kind", [BarePass, Lora, CheckpointedLora])
def test_others_start_at_the_loss_of_the_plain_base(model, steps, kind):
    batch = Padded(model, steps).collate(steps[0])
    with torch.no_grad():
        expected = model(**batch, prefix=model.prefix_batch(None)).loss
    torch.testing.assert_close(kind(model, steps).step(), expected, **ALIKE)


def test_peers_share_the_weights(model, steps):
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for side in (PeftPrefix(model, steps), Lora(model, steps)):
        trained = {id(parameter) for parameter in side.trained}
        frozen = [parameter for parameter in side.model.parameters() if id(parameter) not in trained]
        assert {parameter.untyped_storage().data_ptr() for parameter in frozen} <= own


@pytest.mark.parametrize("count", [4, 16, 400])
def test_lengths_are_those_of_the_data(count):
    rows = advertisements(SHAPE, count)
    lengths = [len(row["input_ids"]) for row in rows]
    learned = [sum(label >= 0 for label in row["labels"]) for row in rows]
    assert fmean(lengths) == pytest.approx(105, abs=1.5) and fmean(learned) == pytest.approx(75, abs=1.5)
    assert max(lengths) <= 192 and stdev(lengths) > 15


def test_chats_are_long_and_mostly_learned():
    rows = chats(SHAPE, 400)
    lengths = [len(row["input_ids"]) for row in rows]
    learned = sum(label >= 0 for row in rows for label in row["labels"])
    assert median(lengths) == pytest.approx(200, abs=5) and max(lengths) == 2048
    assert 0.6 < learned / sum(lengths) < 0.7


# ---- the program ----


@pytest.mark.parametrize(
    "check", check_golden(torch.device("cpu")), ids=lambda check: f"{check.attention}, {check.what}"
)
def test_golden_cases_hold(check):
    assert check.holds, check.error


def test_a_run_reports_what_it_measured(tmp_path, capsys):
    wanted = [name for name in QUANTITIES if name != "memory"]  # its processes take long to start
    program.main(["--shapes", "tiny", "--rounds", "2", "--output", str(tmp_path), "--quantities", *wanted])
    rows, machine = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("benchmark", "machine"))
    measured = [QUANTITIES[name] for name in wanted if ("cpu", "tiny") in QUANTITIES[name].goals]
    assert {(row["quantity"], row["compared_with"] or "") for row in rows} == {
        (quantity.what, quantity.theirs) for quantity in measured
    }
    for row in rows:
        value = row["ours"]
        assert row["shape"] == "tiny" and row["ours_spread"][0] <= value <= row["ours_spread"][1]
        if row["theirs"] is not None:
            assert row["ratio"] == pytest.approx(value / row["theirs"])
            value = row["ratio"]
        assert row["holds"] == (value <= row["goal"] if row["goal_is"] == "at most" else value >= row["goal"])
    assert machine["versions"]["torch"] == torch.__version__ and machine["date"] and machine["processor"]
    assert all(check["holds"] for check in machine["checks"])
    shown = capsys.readouterr().out
    assert "goals hold" in shown and torch.__version__ in shown
    assert "| tiny: training, examples/s | official recipe |" in (tmp_path / "benchmark.md").read_text("utf-8")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of resident memory")
def test_memory_is_measured_in_processes_of_their_own():
    for side in (Kit.name, Official.name):
        assert 0 < peak_memory(SHAPE, side) < 500 * 2**20
    with pytest.raises(RuntimeError, match="no side"):
        peak_memory(SHAPE, "no side")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--shapes", "XL"], "--shapes must be among S, M, W, G.* got XL"),
        (["--quantities", "speed"], "--quantities must be among official.* got speed"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(flags)
    assert stopped.value.code == 2
    assert re.search(named, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(capsys):
    with pytest.raises(SystemExit, match="1"):
        program.main(["--device", "cuda"])
    assert "--device cuda" in capsys.readouterr().err
