"""`export` and `import`: what other programs compute from the folders, round trips, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import packed_base
import pytest
import tiny_chat_base
import tiny_glm4
import tiny_tokenizer
import torch
from conftest import TINY
from safetensors.torch import load_file
from test_official_export import official_loop
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from chatglm_ptuning import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMTokenizer,
)
from chatglm_ptuning.cli import main
from chatglm_ptuning.model.base_files import BaseFiles
from chatglm_ptuning.prefix.formats import detect_format, kit, read_prefix
from chatglm_ptuning.serving.vllm.plugin.ptuning_vllm.prefixes import PrefixFolder

peft = pytest.importorskip("peft")

ALIKE = {"rtol": 1e-4, "atol": 1e-4}
PREFIX_FORMATS = ("official", "peft", "peft-cartridge", "vllm")
VARIANTS = {
    "plain": {},
    "no bias": {"add_qkv_bias": False},
    "long rope": {"rope_ratio": 50.0, "seq_length": 131072},
    "32K": {"rope_ratio": 4.0, "position_interpolation": True},
    "one group": {"multi_query_group_num": 1, "kv_channels": 16},  # 4 heads of 16: wider than hidden_size
    "all heads": {"multi_query_group_num": 4},
}


def make_base(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes) -> Path:
    torch.manual_seed(3)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY | changes))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_prefix(base: Path, folder: Path, length: int = 5, projection: bool = False) -> Path:
    model = ChatGLMForConditionalGeneration.from_pretrained(base, pre_seq_len=length, prefix_projection=projection)
    encoder = model.transformer.prefix_encoder
    shape = (length, *encoder.kv_shape)
    encoder.set_key_values(torch.randn(shape, generator=torch.Generator().manual_seed(length)))
    model.save_prefix(folder)
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory) -> tuple[Path, Path]:
    """A base of each kind, and a prefix for it with a projection."""
    folder = tmp_path_factory.mktemp("variant")
    base = make_base(folder / "base", **VARIANTS[request.param])
    return base, make_prefix(base, folder / "prefix", 5, projection=True)


def export(base: Path, to: str, output: Path, prefix: Path | None = None, *more: str) -> Path:
    flags = ["export", "--to", to, "--model_name_or_path", str(base), "--output_dir", str(output), *more]
    main([*flags, *([] if prefix is None else ["--ptuning_checkpoint", str(prefix)])])
    return output


def take_in(source: Path, name: str, output: Path, base: Path | None = None) -> Path:
    flags = ["import", "--from", name, "--input_dir", str(source), "--output_dir", str(output)]
    main([*flags, *([] if base is None else ["--model_name_or_path", str(base)])])
    return output


def refused(capsys, *arguments, **named) -> str:
    with pytest.raises(SystemExit) as error:
        export(*arguments, **named)
    assert error.value.code
    return capsys.readouterr().err


@pytest.fixture
def batch(ids) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


# hf-glm


def test_the_converted_base_computes_the_same(variant, tmp_path, ids, batch):
    base, _ = variant
    folder = export(base, "hf-glm", tmp_path / "hf")
    ours = ChatGLMForConditionalGeneration.from_pretrained(base)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is GlmForCausalLM
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=3e-5)
    more = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(**batch, **more), ours.generate(**batch, **more))
    back = ChatGLMForConditionalGeneration.from_pretrained(folder)
    assert back.base_fingerprint() == ours.base_fingerprint()
    assert torch.equal(back(ids).logits, ours(ids).logits)
    for name, value in back.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_and_the_shards_are_kept(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype, shard="15KB")
    count = len(list(base.glob("*.safetensors")))
    assert count > 2
    folder = export(base, "hf-glm", tmp_path / "hf")
    assert len(list(folder.glob("*.safetensors"))) == count
    model = GlmForCausalLM.from_pretrained(folder, dtype="auto")
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    again = take_in(folder, "hf-glm", tmp_path / "back")
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    ours, back = BaseFiles(base), BaseFiles(again)
    for names in ours.shards:
        theirs = back.read(names)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.read(names).items())
    assert (
        ours.fingerprint()
        == back.fingerprint()
        == ChatGLMForConditionalGeneration.from_pretrained(base, dtype="auto").base_fingerprint()
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"multi_query_attention": False, "multi_query_group_num": 4}, "multi_query_attention False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ({"post_layer_norm": False}, "post_layer_norm False"),
        ({"rmsnorm": False}, "rmsnorm False"),
        ({"add_bias_linear": True}, "add_bias_linear True"),
    ],
)
def test_what_glm_cannot_express_is_refused(tmp_path, capsys, changes, named):
    base = make_base(tmp_path / "base", **changes)
    message = refused(capsys, base, "hf-glm", tmp_path / "hf")
    assert named in message and str(base) in message and "GlmForCausalLM" in message
    assert not (tmp_path / "hf").exists()


def test_a_prefix_is_not_a_part_of_it(tiny_base, prefix_folders, tmp_path, capsys):
    folder = export(tiny_base, "hf-glm", tmp_path / "hf", prefix_folders["a"])
    said = capsys.readouterr().out
    assert "the base alone" in said and f"--to peft exports {prefix_folders['a']}" in said
    assert not any("prefix" in name for name in load_file(folder / "model.safetensors"))


# PEFT


@pytest.mark.parametrize("kind", ["peft", "peft-cartridge"])
def test_peft_computes_the_same(variant, tmp_path, batch, kind):
    base, prefix = variant
    folder = export(base, kind, tmp_path / "adapter", prefix)
    native = GlmForCausalLM.from_pretrained(export(base, "hf-glm", tmp_path / "hf"))
    adapted = peft.PeftModel.from_pretrained(native, folder).eval()
    assert adapted.active_peft_config.peft_type == {"peft": "PREFIX_TUNING"}.get(kind, "CARTRIDGE")
    ours = ChatGLMForConditionalGeneration.from_pretrained(base)
    plain = ours(**batch).logits
    ours.load_prefix(prefix)
    expected, real = ours(**batch).logits, batch["attention_mask"].bool()
    found = adapted(**batch, position_ids=positions(batch["attention_mask"])).logits
    torch.testing.assert_close(found[real], expected[real], **ALIKE)
    assert (plain - expected)[real].abs().max() > 0.1
    more = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(adapted.generate(**batch, **more), ours.generate(**batch, **more))


@pytest.mark.parametrize("kind", ["peft", "peft-cartridge"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_that_peft_trained_comes_in(tiny_base, tmp_path, batch, kind, projection):
    if kind == "peft-cartridge" and projection:
        pytest.skip("a cartridge has no projection")
    native = GlmForCausalLM.from_pretrained(export(tiny_base, "hf-glm", tmp_path / "hf"))
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
    settings = (
        peft.PrefixTuningConfig(**common, prefix_projection=projection)
        if kind == "peft"
        else peft.CartridgeConfig(**common, num_frozen_tokens=2)
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(native, settings)
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=1.0)
    where = {"position_ids": positions(batch["attention_mask"])}
    adapted(**batch, **where, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    prefix = take_in(tmp_path / "adapter", kind, tmp_path / "ours", tiny_base)
    ours = ChatGLMForConditionalGeneration.from_pretrained(tiny_base)
    ours.load_prefix(prefix)
    real = batch["attention_mask"].bool()
    expected = adapted(**batch, **where).logits
    torch.testing.assert_close(ours(**batch).logits[real], expected[real], **ALIKE)
    again = ChatGLMForConditionalGeneration.from_pretrained(tiny_base)
    again.load_prefix(tmp_path / "adapter")  # directly
    torch.testing.assert_close(again(**batch).logits, ours(**batch).logits)
    # And back, to the numbers that PEFT saved.
    sent = load_file(export(tiny_base, kind, tmp_path / "back", prefix) / "adapter_model.safetensors")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(sent["prompt_embeddings"], trained["prompt_embeddings"], rtol=1e-6, atol=1e-6)


# The official format


@pytest.mark.parametrize("name", ["a", "projected"])
def test_the_official_code_loads_it(tiny_base, prefix_folders, tmp_path, ids, name):
    folder = export(tiny_base, "official", tmp_path / "official", prefix_folders[name])
    config = json.loads((folder / "config.json").read_text())
    base_fields = json.loads((tiny_base / "config.json").read_text())
    length = {"a": 3, "projected": 4}[name]
    assert (config["pre_seq_len"], config["prefix_projection"]) == (length, name == "projected")
    assert all(config[key] == base_fields[key] for key in TINY)
    assert "auto_map" not in config
    model = official_loop(tiny_base, folder, length, name == "projected")
    ours = ChatGLMForConditionalGeneration.from_pretrained(tiny_base)
    ours.load_prefix(prefix_folders[name])
    torch.testing.assert_close(model(ids).logits, ours(ids).logits)
    with pytest.raises(ValueError, match=r"not a complete base.*only a prefix"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["1GB", "15KB"])
def test_base_and_prefix_in_one_folder(tmp_path, ids, shard):
    base = make_base(tmp_path / "base", torch.bfloat16, shard)
    (base / "modeling_chatglm.py").write_text("# the official code")
    shutil.copytree(base, tmp_path / "bin")
    prefix = make_prefix(base, tmp_path / "prefix", projection=True)
    folder = export(base, "official-merged", tmp_path / "merged", prefix)
    config = json.loads((folder / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (5, True)
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
    assert (config["eos_token_id"], config["pad_token_id"], config["torch_dtype"]) == (2, 0, "bfloat16")
    assert (folder / "modeling_chatglm.py").read_text() == "# the official code"
    assert len(list(folder.glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))
    merged = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype="auto")
    merged.set_prefix("merged")
    ours = ChatGLMForConditionalGeneration.from_pretrained(base, dtype="auto")
    ours.load_prefix(prefix)
    assert torch.equal(merged(ids).logits, ours(ids).logits)
    assert merged.base_fingerprint() == ours.base_fingerprint()
    # In and out again
    back = take_in(folder, "official-merged", tmp_path / "back", base)
    alone = ChatGLMForConditionalGeneration.from_pretrained(back / "base", dtype="auto")
    assert alone.prefix_names == [] and alone.config.pre_seq_len is None
    alone.load_prefix(back)
    assert torch.equal(alone(ids).logits, ours(ids).logits)


def test_a_converted_base_becomes_official_again(tmp_path, ids):
    """From GlmForCausalLM's format, with queries, keys and values in different shards."""
    base = make_base(tmp_path / "base", torch.float32, **VARIANTS["32K"])
    prefix = make_prefix(base, tmp_path / "prefix")
    whole = GlmForCausalLM.from_pretrained(export(base, "hf-glm", tmp_path / "hf"))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    shards = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({shards[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"}) > 1
    ours = ChatGLMForConditionalGeneration.from_pretrained(base)
    back = ChatGLMForConditionalGeneration.from_pretrained(take_in(tmp_path / "shards", "hf-glm", tmp_path / "back"))
    assert torch.equal(back(ids).logits, ours(ids).logits) and back.config.position_scale == 4
    merged = export(tmp_path / "shards", "official-merged", tmp_path / "merged", prefix)
    both = ChatGLMForConditionalGeneration.from_pretrained(merged)
    both.set_prefix("merged")
    ours.load_prefix(prefix)
    assert torch.equal(both(ids).logits, ours(ids).logits)


# Round trips


@pytest.mark.parametrize("name", ["b", "projected"])
@pytest.mark.parametrize("through", PREFIX_FORMATS)
def test_a_prefix_comes_back(tiny_base, prefix_folders, tmp_path, ids, through, name):
    there = export(tiny_base, through, tmp_path / "there", prefix_folders[name])
    back = take_in(there, through, tmp_path / "back", tiny_base)
    shape = ChatGLMConfig.from_pretrained(tiny_base).prefix_shape
    ours, found = read_prefix(prefix_folders[name], shape), read_prefix(back, shape)
    assert detect_format(back)[0] == "kit"
    assert found.metadata.base_fingerprint == ours.metadata.base_fingerprint
    if through == "official":
        assert found.parameters.keys() == ours.parameters.keys()
        assert all(torch.equal(value, ours.parameters[key]) for key, value in found.parameters.items())
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_base)
    folded = [model.fold_prefix(path).key_values for path in (prefix_folders[name], back)]
    torch.testing.assert_close(*folded, rtol=1e-6, atol=1e-6)
    assert through != "official" or torch.equal(*folded)


def test_the_plugin_of_vllm_finds_exported_prefixes(tiny_base, prefix_folders, tmp_path):
    for name in ("a", "b"):
        export(tiny_base, "vllm", tmp_path / "exported" / name, prefix_folders[name])
    found = PrefixFolder(tmp_path / "exported").by_name()
    shape = ChatGLMConfig.from_pretrained(tiny_base).prefix_shape
    lengths = {name: read_prefix(prefix_folders[name], shape).metadata.pre_seq_len for name in ("a", "b")}
    assert {name: prefix.length for name, prefix in found.items()} == lengths
    assert all(prefix.read().shape[2] == prefix.length for prefix in found.values())


# Errors


def test_the_wrong_format_is_named(tiny_base, prefix_folders, tmp_path, capsys):
    folder = export(tiny_base, "peft-cartridge", tmp_path / "there", prefix_folders["a"])
    with pytest.raises(SystemExit):
        take_in(folder, "peft", tmp_path / "back", tiny_base)
    assert "--from peft-cartridge" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        take_in(tiny_base, "peft", tmp_path / "back", tiny_base)
    message = capsys.readouterr().err
    assert str(tiny_base) in message and "holds no parameter" in message
    with pytest.raises(SystemExit):
        take_in(prefix_folders["a"], "official", tmp_path / "back", tiny_base)
    assert "format kit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        take_in(tiny_base, "official-merged", tmp_path / "back")
    message = capsys.readouterr().err
    assert str(tiny_base) in message and "no prefix" in message and "--from official" in message
    with pytest.raises(SystemExit):
        take_in(tiny_base, "hf-glm", tmp_path / "back")
    assert str(tiny_base) in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("to", ["official", "official-merged", "peft", "peft-cartridge"])
def test_a_prefix_of_another_base_is_refused(prefix_folders, tmp_path, capsys, to):
    other = make_base(tmp_path / "other")
    message = refused(capsys, other, to, tmp_path / "out", prefix_folders["a"])
    assert str(prefix_folders["a"]) in message and "another base" in message and str(other) in message
    assert not (tmp_path / "out").exists()


def test_a_merged_folder_of_another_base_is_refused(tiny_base, prefix_folders, tmp_path, capsys):
    folder = export(tiny_base, "official-merged", tmp_path / "merged", prefix_folders["a"])
    other = make_base(tmp_path / "other")
    with pytest.raises(SystemExit):
        take_in(folder, "official-merged", tmp_path / "back", other)
    message = capsys.readouterr().err
    assert str(folder) in message and str(other) in message and not (tmp_path / "back").exists()


def test_a_prefix_with_a_head_is_refused(tiny_base, tmp_path, capsys):
    model = ChatGLMForSequenceClassification.from_pretrained(tiny_base, num_labels=3, pre_seq_len=2)
    model.transformer.prefix_encoder.set_key_values(torch.randn(2, 4, 2, 8))
    torch.nn.init.ones_(model.classifier_head.weight)
    model.save_prefix(tmp_path / "p", head="sequence_classification", labels=["a", "b", "c"])
    message = refused(capsys, tiny_base, "official", tmp_path / "out", tmp_path / "p")
    assert str(tmp_path / "p") in message and "head" in message and "sequence_classification" in message


def test_the_heads_of_some_tasks_are_left_out(tiny_base, prefix_folders, tmp_path, capsys):
    shape = ChatGLMConfig.from_pretrained(tiny_base).prefix_shape
    prefix = read_prefix(prefix_folders["a"], shape)
    tasks = {"news": {"head": "sequence_classification", "labels": ["x", "y"]}, "talk": {"head": "generation"}}
    heads = {"heads.news.weight": torch.ones(2, 32)}
    kit.write(tmp_path / "p", replace(prefix.metadata, tasks=tasks), prefix.parameters, heads)
    folder = export(tiny_base, "official", tmp_path / "out", tmp_path / "p")
    assert "heads of the tasks news" in capsys.readouterr().out
    assert set(torch.load(folder / "pytorch_model.bin")) == {"transformer.prefix_encoder.embedding.weight"}
    kit.write(tmp_path / "q", replace(prefix.metadata, tasks={"news": tasks["news"]}), prefix.parameters, heads)
    assert "sequence_classification" in refused(capsys, tiny_base, "official", tmp_path / "no", tmp_path / "q")


def test_an_untrained_prefix_is_refused(load, tiny_base, tmp_path, capsys):
    load(pre_seq_len=3).save_prefix(tmp_path / "p")
    message = refused(capsys, tiny_base, "peft", tmp_path / "out", tmp_path / "p")
    assert "untrained" in message and str(tmp_path / "p") in message


def test_a_quantised_base_is_refused(tiny_base, prefix_folders, tmp_path, capsys):
    folder = tmp_path / "int4"
    packed_base.make_packed_base(tiny_base, folder, 4)
    message = refused(capsys, folder, "official-merged", tmp_path / "out", prefix_folders["a"])
    assert str(folder) in message and "4 bits" in message


def test_a_folder_with_a_prefix_alone_is_no_base(tiny_base, prefix_folders, tmp_path, capsys):
    alone = export(tiny_base, "official", tmp_path / "official", prefix_folders["a"])
    message = refused(capsys, alone, "official-merged", tmp_path / "out", prefix_folders["a"])
    assert str(alone) in message and "not a complete base" in message


# The output folder


def test_a_folder_with_content_is_kept(tiny_base, prefix_folders, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    export(tiny_base, "official", out, prefix_folders["a"])  # empty
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    message = refused(capsys, tiny_base, "peft", out, prefix_folders["a"])
    assert str(out) in message and "--overwrite_output_dir" in message
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    export(tiny_base, "peft", out, prefix_folders["a"], "--overwrite_output_dir")
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}


def test_the_base_is_never_written_over(tiny_base, prefix_folders, tmp_path, capsys):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    for source in ({"output": base}, {"output": prefix_folders["a"]}):
        message = refused(capsys, base, "peft", source["output"], prefix_folders["a"], "--overwrite_output_dir")
        assert "--output_dir" in message and str(source["output"]) in message
    assert (base / "model.safetensors").exists() and (prefix_folders["a"] / "prefix_config.json").exists()


@pytest.mark.parametrize("to", ["official-merged", "hf-glm", "peft"])
def test_a_full_disk_leaves_nothing(tiny_base, prefix_folders, tmp_path, capsys, monkeypatch, to):
    from safetensors import SafetensorError

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("chatglm_ptuning.files.save_file", full)
    prefix = None if to == "hf-glm" else prefix_folders["a"]
    message = refused(capsys, tiny_base, to, tmp_path / "out", prefix)
    assert "No space left" in message and not (tmp_path / "out").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    refused(capsys, tiny_base, to, tmp_path / "old", prefix, "--overwrite_output_dir")
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["config.json"]


# Tokenizers


def test_the_tokenizer_goes_with_the_base(tmp_path, capsys):
    base = tiny_chat_base.write_base(tmp_path / "anything")
    prefix = tiny_chat_base.write_prefix(base, tmp_path / "p", 1)
    folder = export(base, "official-merged", tmp_path / "merged", prefix)
    assert "tokenization_chatglm.py" in capsys.readouterr().out  # has to be copied
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_format"] == "chatglm3"
    assert settings["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


MESSAGES = [
    {"role": "user", "content": "你好，请问 abc？"},
    {"role": "assistant", "content": "今天天气很好"},
    {"role": "user", "content": "我想去\n公园  散步。"},
]


@pytest.mark.parametrize("kind", ["chatglm2", "chatglm3", "bpe", "glm4"])
def test_transformers_own_tokenizer_has_the_same_ids(tmp_path, vocabulary_file, kind):
    if kind == "glm4":
        tokenizer = ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(tmp_path / "glm4"))
    elif kind == "bpe":
        tokenizer = ChatGLMTokenizer(str(vocabulary_file), chat_format="chatglm3")
    else:
        tokenizer = tiny_tokenizer.train(tmp_path, kind)
    base = make_base(tmp_path / "base", padded_vocab_size=len(tokenizer) + 8, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(base)
    folder = export(base, "hf-glm", tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__module__.startswith("transformers.")
    texts = ["今天有雨！", "  a  b\n\tc", "def add(a, b): return a + b", "龘🙂", "", "The sopranos 壬癸"]
    for text in texts:
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"], text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert theirs.decode(ids) == tokenizer.decode(ids), text
    assert theirs(texts, padding=True)["input_ids"] == tokenizer(texts, padding=True)["input_ids"]
    chat = {"add_generation_prompt": True, "return_dict": False}
    assert theirs.apply_chat_template(MESSAGES, **chat) == tokenizer.apply_chat_template(MESSAGES, **chat)
    assert theirs.eos_token_id == tokenizer.eos_token_id and theirs.pad_token_id == tokenizer.pad_token_id
    # This kit reads the folder, and what comes back, as before.
    for path in (folder, take_in(folder, "hf-glm", tmp_path / "back")):
        again = ChatGLMTokenizer.from_pretrained(path)
        assert again.chat_format == tokenizer.chat_format
        assert again.apply_chat_template(MESSAGES, **chat) == tokenizer.apply_chat_template(MESSAGES, **chat)
