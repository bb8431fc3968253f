"""Bases on disk: official layouts, saving, missing and broken files, memory while loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chatglm_ptuning  # noqa: F401  (registers the Auto classes)
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel

PREFIX_ENCODER = "transformer.prefix_encoder."


def _legacy_names(model) -> dict[str, torch.Tensor]:
    frequencies = {"transformer.rotary_pos_emb.inv_freq": model.transformer.rotary_pos_emb.inv_freq.clone()}
    return {name: value.clone() for name, value in model.state_dict().items()} | frequencies


def write_base(model, folder: Path, form: str, dtype: torch.dtype) -> Path:
    """Writes the model's weights as the official folders have them."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    tensors = {name: value.to(dtype) for name, value in _legacy_names(model).items()}
    suffix, save = ("bin", torch.save) if "bin" in form else ("safetensors", save_file)
    stem = "pytorch_model" if suffix == "bin" else "model"
    names = sorted(tensors)
    shards = [names[::2], names[1::2]] if "sharded" in form else [names]
    if len(shards) == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        save({name: tensors[name] for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


FORMS = ("bin", "sharded bin", "safetensors", "sharded safetensors")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_official_layouts(load, tmp_path, ids, form, stored):
    original = load()
    folder = write_base(original, tmp_path / "base", form, stored)
    for wanted in (torch.float32, stored):
        model, info = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=wanted, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert {value.dtype for value in model.parameters()} == {wanted}
        for name, value in original.state_dict().items():
            assert torch.equal(model.state_dict()[name], value.to(stored).to(wanted)), name
    torch.testing.assert_close(
        model.transformer.rotary_pos_emb.inv_freq, original.transformer.rotary_pos_emb.inv_freq, rtol=0, atol=0
    )
    if stored == torch.float32:
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
        inner = ChatGLMModel.from_pretrained(folder)
        torch.testing.assert_close(inner.output_layer(inner(ids).last_hidden_state), original(ids).logits)


def test_auto_classes(tiny_base):
    assert type(AutoModelForCausalLM.from_pretrained(tiny_base)) is ChatGLMForConditionalGeneration


def test_saving_a_base_writes_the_official_names(load, prefix_folders, tmp_path):
    model = load()
    names = set(model.state_dict())
    model.load_prefix(prefix_folders["a"], "a")
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    assert "transformer.encoder.layers.0.self_attention.query_key_value.weight" in names
    assert not any("inv_freq" in name or "prefix" in name for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["pre_seq_len"] is None
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path).prefix_names == []


def test_saving_a_whole_model_keeps_its_trained_prefix(trained, tmp_path, ids):
    model = trained(dtype=torch.bfloat16, prefix_projection=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    parts = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    assert {name for name in saved if "prefix" in name} == {PREFIX_ENCODER + part for part in parts}
    assert {value.dtype for name, value in saved.items() if "prefix" in name} == {torch.float32}
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert again.prefix_names == [tmp_path.name] and again.dtype == torch.bfloat16
    again.set_prefix(tmp_path.name)
    assert torch.equal(again.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_saving_leaves_out_an_untrained_prefix(load, tmp_path, ids):
    load(pre_seq_len=4).save_pretrained(tmp_path)
    assert not any("prefix" in name for name in load_file(tmp_path / "model.safetensors"))
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path).prefix_names == []


def test_a_base_with_missing_weights_is_refused(load, tmp_path):
    model = load()
    folder = write_base(model, tmp_path / "base", "safetensors", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not a complete base.*layers\.1\.mlp\.dense_4h_to_h\.weight"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_in_a_base_is_not_run(tiny_base, tmp_path, new_format):
    config = (tiny_base / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    bomb = {"transformer.output_layer.weight": Bomb(tmp_path / "exploded")}
    torch.save(bomb, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*not opened for safety"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_named(load, tmp_path, form):
    folder = write_base(load(), tmp_path / "base", form, torch.float32)
    file = max(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    with file.open("rb+") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(ValueError, match=file.name):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


MEASURE = """
import sys, threading, time
import torch
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

def anonymous_mb():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_mb())
        time.sleep(0.002)

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
before, peak, done = anonymous_mb(), 0, False
thread = threading.Thread(target=watch)
thread.start()
model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, pre_seq_len=8)
done = True
thread.join()
print(peak - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is Linux's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_loading_never_holds_two_copies(tmp_path, form, dtype):
    config = ChatGLMConfig(
        num_layers=6, padded_vocab_size=8000, hidden_size=1024, ffn_hidden_size=2048, kv_channels=64,
        num_attention_heads=16, multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True,
    )  # fmt: skip
    folder = write_base(ChatGLMForConditionalGeneration(config), tmp_path / "base", form, torch.float32)
    command = [sys.executable, "-c", MEASURE, str(folder), dtype]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    peak, size = map(float, answer.stdout.split())
    assert size > (100 if dtype == "bfloat16" else 200)
    assert peak < 1.25 * size + 30, f"loading {size:.0f} MB took {peak:.0f} MB"
