"""The rehearsal: always small, and at true width if memory and disk allow."""

import json
import shutil
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import TINY

import rehearsal
from chatglm_ptuning.estimation.memory import GIB
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig


def run(stage, folder, *more):
    command = [sys.executable, rehearsal.__file__, "--stage", stage, "--folder", str(folder)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def need(memory, disk, folder):
    free = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    if free[0] < memory or free[1] < disk:
        pytest.skip(f"needs {memory / GIB:.0f} GiB of free memory and {disk / GIB:.0f} of disk, there are "
                    f"{free[0] / GIB:.0f} and {free[1] / GIB:.0f}")  # fmt: skip


def test_a_small_rehearsal(tmp_path):
    config = ChatGLMConfig(**TINY | {"num_layers": 5})
    total = rehearsal.build_base(tmp_path / "base", config, torch.float32, shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "base").glob("*.bin"))
    assert files[0] == f"pytorch_model-00001-of-{len(files):05d}.bin" and len(files) > 3
    index = json.loads((tmp_path / "base" / "pytorch_model.bin.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"].values()) == set(files)
    results = rehearsal.train_and_reload(tmp_path / "base", "float32")
    assert results["losses"][-1] < results["losses"][0]
    assert len(results["tokens"]) == 8


@pytest.mark.slow
def test_all_layers_load_within_a_tenth_more_than_their_weights(tmp_path):
    need(15 * GIB, 14 * GIB, tmp_path)
    try:
        built = run("build", tmp_path / "base")
        assert built["peak_memory"] < 5 * GIB
        assert len(list((tmp_path / "base").glob("pytorch_model-0000?-of-00007.bin"))) == 7
        loaded = run("load", tmp_path / "base")
    finally:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
    assert loaded["weights"] == 12_487_168_000
    assert loaded["peak_over_weights"] <= 1.1


@pytest.mark.slow
def test_two_layers_at_true_width_train_save_load_and_generate(tmp_path):
    need(9 * GIB, 5 * GIB, tmp_path)
    try:
        run("build", tmp_path / "base", "--num_layers", "2", "--dtype", "float32")
        results = run("train", tmp_path / "base", "--dtype", "float32")
    finally:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
    assert results["losses"][-1] < results["losses"][0]
    assert len(results["tokens"]) == 8
