"""Loading under ZeRO-3: only the first process ever holds the whole base."""

import ctypes
import os
from pathlib import Path

import processes
import pytest
import torch

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

_M_MMAP_THRESHOLD = -3
"""From malloc.h."""
ZERO3 = Path(__file__).resolve().parents[1] / "ds_config" / "zero3.json"


@pytest.fixture(scope="module")
def large_base(tmp_path_factory):
    """A base of random weights of about 400 MB in float32, in several files."""
    folder = tmp_path_factory.mktemp("large") / "base"
    config = ChatGLMConfig(
        num_layers=16, padded_vocab_size=2000, hidden_size=768, ffn_hidden_size=2048, kv_channels=64,
        num_attention_heads=12, multi_query_attention=True, multi_query_group_num=2, seq_length=512, add_qkv_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config)
    size = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder, size


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _load(base: str, output: str, config: str | None) -> str:
    """Loads the base; gives the peak of the resident memory above that before, and what stays, in MB."""
    from chatglm_ptuning.model.loading import load_model
    from chatglm_ptuning.training.arguments import PrefixTrainingArguments

    args = PrefixTrainingArguments(output_dir=output, deepspeed=config, report_to="none")
    assert args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    # Freed weights go back to the system at once, so that the measurement is the memory held.
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**20)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    model = load_model(base, pre_seq_len=8)
    for parameter in model.parameters():
        parameter.detach().sum()  # a memory-mapped file is read on access
    fingerprint = model.base_fingerprint()["sample_sha256"]
    return f"{_status('VmHWM') - before} {_status('RssAnon')} {fingerprint}"


@pytest.mark.slow
def test_a_base_is_partitioned_while_it_is_loaded(large_base, tmp_path):
    base, size = large_base
    assert size > 300
    whole = processes.call(_load, (str(base), str(tmp_path), None), 1, tmp_path)
    parts = processes.call(_load, (str(base), str(tmp_path), str(ZERO3)), 2, tmp_path)
    peaks = {"alone": [float(line.split()[0]) for line in whole], "zero3": [float(line.split()[0]) for line in parts]}
    print(f"base of {size:.0f} MB; peaks above the start in MB: {peaks}; afterwards {whole} {parts}")
    assert len({line.split()[2] for line in whole + parts}) == 1
    assert peaks["alone"][0] > 0.9 * size
    assert peaks["zero3"][1] < 0.75 * size
