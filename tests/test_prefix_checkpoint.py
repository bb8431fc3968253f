"""Prefix checkpoints: the formats that `load_prefix` reads, what `save_prefix` writes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_ptuning.model.native_glm import as_glm
from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY
from chatglm_ptuning.prefix.formats import detect_format, read_prefix
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE, WEIGHTS_FILE

EMBEDDING = PREFIX_KEY + "embedding.weight"
ALIKE = {"rtol": 1e-4, "atol": 1e-5}


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state_of(model) -> tuple:
    """The state that a refused load must not change."""
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    return model.prefix_names, model.selected_prefix, model.config.pre_seq_len, parameters


def same_state(before: tuple, after: tuple) -> bool:
    same = all(torch.equal(value, after[3][name]) for name, value in before[3].items())
    return before[:3] == after[:3] and same


def edit_metadata(folder: Path, **changes) -> None:
    path = folder / METADATA_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(prefix_folders, tmp_path):
    """Copies the prefix "a", so that a test can damage it."""
    return Path(shutil.copytree(prefix_folders["a"], tmp_path / "copied"))


# What is written


def test_what_a_checkpoint_records(prefix_folders, tiny_base):
    folder = prefix_folders["projected"]
    assert {path.name for path in folder.iterdir()} == {METADATA_FILE, WEIGHTS_FILE}
    recorded = json.loads((folder / METADATA_FILE).read_text())
    assert (recorded["pre_seq_len"], recorded["prefix_projection"]) == (4, True)
    assert (recorded["num_layers"], recorded["multi_query_group_num"], recorded["kv_channels"]) == (2, 2, 8)
    assert recorded["base_model_name"] == str(tiny_base)
    assert recorded["base_fingerprint"]["shape"]["hidden_size"] == 32
    assert len(recorded["base_fingerprint"]["sample_sha256"]) == 64
    assert recorded["task"] == "task projected" and recorded["trained"] is True
    assert "source_attention" not in recorded
    names = ["embedding.weight", "trans.0.bias", "trans.0.weight", "trans.2.bias", "trans.2.weight"]
    assert sorted(load_file(folder / WEIGHTS_FILE)) == [PREFIX_KEY + name for name in names]


def test_details_are_recorded(trained, tmp_path):
    trained().save_prefix(tmp_path / "p", chat_format="chatglm3", task="广告", training={"steps": 3, "loss": 1.5})
    metadata = read_prefix(tmp_path / "p", trained().config.prefix_shape).metadata
    assert (metadata.chat_format, metadata.task, metadata.training) == ("chatglm3", "广告", {"steps": 3, "loss": 1.5})


@pytest.mark.parametrize("projection", [False, True])
def test_round_trip(trained, load, tmp_path, ids, projection):
    model = trained(pre_seq_len=4, prefix_projection=projection)
    model.save_prefix(tmp_path / "p")
    expected = model(ids).logits
    plain = load()
    plain.load_prefix(tmp_path / "p")
    assert plain.selected_prefix == "default" and plain.prefix_names == ["default"]
    torch.testing.assert_close(plain(ids).logits, expected)
    plain.save_prefix(tmp_path / "folded")  # keys and values only
    assert sorted(load_file(tmp_path / "folded" / WEIGHTS_FILE)) == [EMBEDDING]
    again = load()
    again.load_prefix(tmp_path / "folded")
    torch.testing.assert_close(again(ids).logits, expected)


def test_saving_is_atomic(trained, prefix_folders, copied, monkeypatch):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}

    def full_disk(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chatglm_ptuning.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trained().save_prefix(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.parametrize("selection", [None, ["default", None]])
def test_only_one_prefix_is_saved(trained, tmp_path, selection):
    model = trained()
    model.set_prefix(selection)
    with pytest.raises(ValueError, match="set_prefix"):
        model.save_prefix(tmp_path)


def test_an_untrained_prefix_stays_untrained(load, tmp_path, ids):
    model = load(pre_seq_len=4)
    model.save_prefix(tmp_path / "p")
    for other in (load(), load(pre_seq_len=2), load(pre_seq_len=4)):
        other.load_prefix(tmp_path / "p")
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
        with pytest.raises(ValueError, match="untrained"):
            other.generate(ids)
    other.set_prefix(None)
    other.generate(ids, max_new_tokens=1)


# Continuing to train


@pytest.mark.parametrize(
    "start", [{"pre_seq_len": 3}, {"pre_seq_len": 9}, {"pre_seq_len": 4, "prefix_projection": True}]
)
@pytest.mark.parametrize("name", ["a", "projected"])
def test_a_trainable_prefix_takes_the_size_of_the_checkpoint(load, prefix_folders, ids, name, start):
    model, plain = load(**start), load()
    model.load_prefix(prefix_folders[name])
    plain.load_prefix(prefix_folders[name])
    assert model.prefix_names == ["default"]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    encoder = model.transformer.prefix_encoder
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (
        (4, True) if name == "projected" else (3, False)
    )
    assert (encoder.pre_seq_len, encoder.prefix_projection) == (
        model.config.pre_seq_len,
        model.config.prefix_projection,
    )
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trainable == {PREFIX_KEY + key for key in encoder.state_dict()}
    model(ids, labels=ids).loss.backward()
    assert all(value.grad is not None for value in encoder.parameters())
    model.generate(ids, max_new_tokens=1)


def test_under_another_name_the_trainable_prefix_stays(trained, prefix_folders, ids):
    model = trained()
    before = model(ids).logits
    model.load_prefix(prefix_folders["a"], "a")
    assert model.prefix_names == ["default", "a"] and model.selected_prefix == "a"
    model.set_prefix("default")
    torch.testing.assert_close(model(ids).logits, before)


# Formats and paths


def official(folder: Path, prefix: Path, form: str, base: dict | None = None) -> Path:
    """The prefix as the official trainer writes it, alone or inside the whole model."""
    folder.mkdir()
    tensors = load_file(prefix / WEIGHTS_FILE) | (base or {})
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        suffix, save, stem = (
            ("bin", torch.save, "pytorch_model") if "bin" in form else ("safetensors", save_file, "model")
        )
        names = sorted(tensors)
        weight_map = {}
        for number, shard in enumerate((names[:5], names[5:]), 1):
            file = f"{stem}-{number:05}-of-00002.{suffix}"
            save({name: tensors[name] for name in shard}, folder / file)
            weight_map |= dict.fromkeys(shard, file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "pre_seq_len": 999}))
    return folder


@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded bin", "sharded safetensors"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["b", "projected"])
def test_official_formats(load, prefix_folders, tmp_path, ids, form, whole, name):
    model, reference = load(), load()
    base = (
        {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        if whole or "sharded" in form
        else {}
    )
    folder = official(tmp_path / "p", prefix_folders[name], form, base)
    reference.load_prefix(prefix_folders[name])
    expected = reference(ids).logits
    model.load_prefix(folder)
    torch.testing.assert_close(model(ids).logits, expected)
    if form == "bin":
        model.unload_prefix("default")
        model.load_prefix(folder / "pytorch_model.bin")
        torch.testing.assert_close(model(ids).logits, expected)


def test_formats_are_detected(prefix_folders, tmp_path):
    kit, files = prefix_folders["a"], official(tmp_path / "p", prefix_folders["a"], "bin")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert detect_format(kit) == ("kit", kit)
    assert detect_format(kit / WEIGHTS_FILE) == ("kit", kit / WEIGHTS_FILE)
    assert detect_format(files) == ("official", files)
    assert detect_format(files / "pytorch_model.bin") == ("official", files / "pytorch_model.bin")
    assert detect_format(adapter) == ("PEFT", adapter)
    shutil.copytree(kit, adapter, dirs_exist_ok=True)  # as prompt tuning leaves it
    assert detect_format(adapter) == ("kit", adapter)
    shutil.copytree(files, tmp_path / "run" / "checkpoint-20")
    shutil.copytree(kit, tmp_path / "run" / "checkpoint-3")
    assert detect_format(tmp_path / "run") == ("official", tmp_path / "run" / "checkpoint-20")


def test_official_parameters_in_16_bits_become_float32(load, prefix_folders, tmp_path):
    tensors = {key: value.half() for key, value in load_file(prefix_folders["a"] / WEIGHTS_FILE).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load(pre_seq_len=7)
    model.load_prefix(tmp_path)
    weight = model.transformer.prefix_encoder.embedding.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, tensors[EMBEDDING].float())


def test_the_folder_of_a_run_and_its_checkpoints(load, prefix_folders, tmp_path, ids):
    model, run = load(), tmp_path / "run"
    shutil.copytree(prefix_folders["a"], run / "checkpoint-9")
    shutil.copytree(prefix_folders["b"], run / "checkpoint-10")
    (run / "checkpoint-11").mkdir()  # killed before anything was written
    logits = {}
    for key, path in (("run", run), ("9", run / "checkpoint-9"), ("10", run / "checkpoint-10")):
        model.load_prefix(path, key)
        logits[key] = model(ids).logits
    assert torch.equal(logits["run"], logits["10"]) and not torch.equal(logits["run"], logits["9"])
    shutil.copytree(prefix_folders["a"], run, dirs_exist_ok=True)  # the end of the run
    model.load_prefix(run, "end")
    assert torch.equal(model(ids).logits, logits["9"])


def test_a_file_of_a_checkpoint_can_be_given(load, prefix_folders, ids):
    model = load()
    for file in (METADATA_FILE, WEIGHTS_FILE):
        model.load_prefix(prefix_folders["b"] / file, file)
        assert model(ids).logits.isfinite().all()


def test_a_base_model_loads_too(tiny_base, load, prefix_folders, ids):
    inner, outer = ChatGLMModel.from_pretrained(tiny_base), load()
    inner.load_prefix(prefix_folders["a"])
    outer.load_prefix(prefix_folders["a"])
    torch.testing.assert_close(inner.output_layer(inner(ids).last_hidden_state), outer(ids).logits)


# PEFT


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("network", ["native GLM", "ours"])
@torch.no_grad()
def test_a_peft_adapter_gives_pefts_logits(load, tmp_path, ids, network, projection):
    peft = pytest.importorskip("peft")
    base = load() if network == "ours" else as_glm(load())
    torch.testing.assert_close(base(ids).logits, load()(ids).logits, **ALIKE)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        prefix_projection=projection,
        encoder_hidden_size=16,
        num_layers=2,
        token_dim=16,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0  # on the right: transformers' GLM counts pads on the left as positions
    expected = adapted(input_ids=ids, attention_mask=mask).logits
    adapted.save_pretrained(tmp_path / "adapter")

    model = load()
    plain = model(ids, attention_mask=mask).logits
    model.load_prefix(tmp_path / "adapter", "peft")
    real = mask.bool()
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[real], expected[real], **ALIKE)
    assert (plain - logits)[real].abs().max() > 0.1
    trainable = load(pre_seq_len=2)
    trainable.load_prefix(tmp_path / "adapter")
    torch.testing.assert_close(trainable(ids, attention_mask=mask).logits, logits)
    model.save_prefix(tmp_path / "ours")
    again = load()
    again.load_prefix(tmp_path / "ours")
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, logits)


def rotated(length: int, by: int) -> torch.Tensor:
    """Keys and values `[length, 4, 2, 8]` of ones, the keys rotated by a number of positions."""
    key_values = torch.ones(length, 4, 2, 8)
    for pair, frequency in ((0, 1.0), (2, 0.01)):
        angle = torch.tensor(by * frequency)
        key_values[:, 0::2, :, pair] = angle.cos() - angle.sin()
        key_values[:, 0::2, :, pair + 1] = angle.cos() + angle.sin()
    return key_values


@pytest.mark.parametrize(
    ("base", "given", "by"),
    [
        ("THUDM/glm-4-9b-chat", {}, 0),
        ("/data/GLM-4-9B", {}, 0),
        ("/cache/models--THUDM--glm-4-9b-chat-1m/snapshots/0123", {}, 0),
        ("THUDM/codegeex4-all-9b", {}, 0),
        ("THUDM/glm-4-9b-chat-hf", {}, -3),
        ("/cache/models--THUDM--glm-4-9b-hf/snapshots/0123", {}, -3),
        ("/data/mine", {}, -3),
        (None, {}, -3),
        ("THUDM/glm-4-9b-chat", {"first_position": 3}, -3),
        ("/data/mine", {"first_position": 0}, 0),
    ],
)
def test_positions_are_those_that_a_peft_adapter_was_trained_with(load, tmp_path, caplog, base, given, by):
    """GLM-4's own code counts the tokens from 0 under PEFT, transformers' classes from the prefix's length."""
    fields = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": base, **given}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"prompt_embeddings": torch.ones(3, 64)}, tmp_path / "adapter_model.safetensors")
    checkpoint = read_prefix(tmp_path, load().config.prefix_shape)
    found = checkpoint.parameters["embedding.weight"].view(3, 4, 2, 8)
    torch.testing.assert_close(found, rotated(3, by))
    assert ('set "first_position": 3' in caplog.text) == (by == 0 and not given)


@pytest.mark.parametrize("value", [1, -3, "0", True, 0.5])
def test_a_wrong_first_position_is_named(load, tmp_path, value):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", "first_position": value}))
    save_file({"prompt_embeddings": torch.ones(3, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_config\.json: first_position must be 0 or 3.*got {value!r}"):
        load().load_prefix(tmp_path)


def test_other_peft_adapters_are_refused(load, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(load(), peft.LoraConfig(target_modules=["query_key_value"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json .*type LORA"):
        load().load_prefix(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has no prompt_embeddings"):
        load().load_prefix(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete: adapter_model\.safetensors is missing"):
        load().load_prefix(tmp_path)


# Checks against the base


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_recognised_in_any_precision(load, tmp_path, saved, loaded):
    load(dtype=saved, pre_seq_len=3).save_prefix(tmp_path)
    model = load(dtype=loaded)
    model.load_prefix(tmp_path, name="kept")
    assert model.selected_prefix == "kept" and model.prefix_names == ["kept"]


@pytest.mark.parametrize("trainable", [False, True])
def test_another_base_is_refused_by_name(tiny_config, load, trained, prefix_folders, tiny_base, tmp_path, trainable):
    torch.manual_seed(9)
    ChatGLMForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "other-base")
    arguments = {"pre_seq_len": 3} if trainable else {}
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "other-base", **arguments)
    before = state_of(model)
    with pytest.raises(ValueError) as error:
        model.load_prefix(prefix_folders["b"])
    assert str(prefix_folders["b"]) in str(error.value)
    assert str(tiny_base) in str(error.value) and str(tmp_path / "other-base") in str(error.value)
    assert same_state(before, state_of(model))


def test_a_base_of_other_sizes_is_refused_with_both(tiny_config, prefix_folders, tmp_path):
    model = ChatGLMForConditionalGeneration(tiny_config(num_layers=3))
    with pytest.raises(ValueError, match=r"\(2, 2, 8\), .*base .*\(3, 2, 8\)"):
        model.load_prefix(prefix_folders["a"])
    folder = official(tmp_path / "p", prefix_folders["a"], "bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .* 64 .*base .* 96 \(3 layers"):
        model.load_prefix(folder)
    wide = ChatGLMForConditionalGeneration(tiny_config(hidden_size=64))
    with pytest.raises(ValueError, match=r"hidden_size .*64, not 32"):
        wide.load_prefix(prefix_folders["a"])
    heads = ChatGLMForConditionalGeneration(tiny_config(multi_query_attention=False))
    with pytest.raises(ValueError, match=r"multi_query_group_num \(2\) .*num_attention_heads \(4\)"):
        heads.load_prefix(folder)


def test_a_checkpoint_without_its_base_warns(load, prefix_folders, tmp_path, caplog):
    load().load_prefix(official(tmp_path / "p", prefix_folders["a"], "bin"))
    assert re.search("pytorch_model.bin .*not record its base", caplog.text)


def test_a_bidirectional_prefix_is_refused(load, trained, copied, ids):
    edit_metadata(copied, source_attention="bidirectional")
    for model in (load(), trained()):
        before = state_of(model)
        with pytest.raises(ValueError, match=r"source_attention 'bidirectional'.*version 0\.1\.0.*train") as error:
            model.load_prefix(copied)
        assert str(copied) in str(error.value)
        assert same_state(before, state_of(model))


def test_a_causal_prefix_of_version_0_1_loads(load, prefix_folders, copied, ids):
    edit_metadata(copied, source_attention="causal")
    model = load().eval()
    model.load_prefix(prefix_folders["a"], name="new")
    expected = model(ids).logits
    model.load_prefix(copied, name="old")
    assert torch.equal(model(ids).logits, expected)


# Damage


def _damage(folder: Path, how: str) -> str:
    """Damages a prefix folder; returns what the message must match."""
    weights, metadata = folder / WEIGHTS_FILE, folder / METADATA_FILE
    tensors = load_file(weights)
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
        return rf"{WEIGHTS_FILE} is damaged"
    if how == "empty weights":
        weights.write_bytes(b"")
        return rf"{WEIGHTS_FILE} is empty"
    if how == "no weights":
        weights.unlink()
        return rf"incomplete: {WEIGHTS_FILE} is missing"
    if how == "no metadata":
        metadata.unlink()
        return rf"incomplete: {METADATA_FILE} is missing"
    if how == "truncated metadata":
        metadata.write_text(metadata.read_text()[:50])
        return rf"{METADATA_FILE} is not valid JSON"
    if how == "metadata is a list":
        metadata.write_text("[]")
        return "must hold a JSON object, it holds a list"
    if how == "metadata without sizes":
        metadata.write_text("{}")
        return rf"{METADATA_FILE} does not describe a prefix.*pre_seq_len"
    if how == "sizes as text":
        edit_metadata(folder, pre_seq_len="3")
        return "pre_seq_len must be a positive integer, got '3'"
    if how == "another length":
        edit_metadata(folder, pre_seq_len=7)
        return r"holds a prefix of size \(3, 64\), but prefix_config.json beside it says \(7, 64\)"
    if how == "projection that is not there":
        edit_metadata(folder, prefix_projection=True)
        return "says prefix_projection=True"
    if how == "half a fingerprint":
        edit_metadata(folder, base_fingerprint={"shape": {}})
        return "base_fingerprint must be null or hold"
    if how == "no embedding":
        save_file({PREFIX_KEY + "trans.0.bias": torch.zeros(3)}, weights)
        return r"has no two-dimensional transformer\.prefix_encoder\.embedding\.weight"
    if how == "half a projection":
        save_file(tensors | {PREFIX_KEY + "trans.0.bias": torch.zeros(32)}, weights)
        edit_metadata(folder, prefix_projection=True)
        return r"is not a complete prefix: (.|\n)*trans\.2\.weight"
    assert how == "not finite"
    tensors[EMBEDDING][0, 0] = torch.nan
    save_file(tensors, weights)
    return r"embedding\.weight has numbers that are not finite"


DAMAGES = (
    "truncated weights", "empty weights", "no weights", "no metadata", "truncated metadata", "metadata is a list",
    "metadata without sizes", "sizes as text", "another length", "projection that is not there", "half a fingerprint",
    "no embedding", "half a projection", "not finite",
)  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_refused(load, trained, copied, how):
    message = _damage(copied, how)
    for model in (load(), trained()):
        before = state_of(model)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            model.load_prefix(copied)
        assert str(copied) in str(error.value)
        assert same_state(before, state_of(model))


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_not_run(load, tmp_path, new_format):
    content = {EMBEDDING: Bomb(tmp_path / "exploded")}
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin .*not opened for safety"):
            load().load_prefix(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x02", b"PK\x03\x04" + b"\x00" * 40])
def test_a_file_that_is_none(load, tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        load().load_prefix(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_official_file(load, prefix_folders, tmp_path, keep):
    file = official(tmp_path / "p", prefix_folders["projected"], "bin") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        load().load_prefix(file)


def test_paths_without_a_prefix_are_refused(load, tiny_base, tmp_path):
    model = load()
    with pytest.raises(FileNotFoundError, match="no such file"):
        model.load_prefix(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"No prefix in {tmp_path}: expected {METADATA_FILE}"):
        model.load_prefix(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors .*no parameter .*starts with"):
        model.load_prefix(tiny_base)
    torch.save([torch.zeros(3)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match=r"list\.bin .*dictionary of tensors"):
        model.load_prefix(tmp_path / "list.bin")
    official_index = tmp_path / "pytorch_model.bin.index.json"
    official_index.write_text(json.dumps({"weight_map": {EMBEDDING: "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00001-of-00002\.bin"):
        model.load_prefix(tmp_path)


def test_an_unreadable_file_is_not_reported_as_damaged(load, copied):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    (copied / WEIGHTS_FILE).chmod(0)
    with pytest.raises(OSError):
        load().load_prefix(copied)


def test_a_prefix_in_place_of_a_base_is_refused(load, prefix_folders, tiny_base, tmp_path):
    folder = official(tmp_path / "p", prefix_folders["a"], "bin")
    shutil.copy(tiny_base / "config.json", folder / "config.json")
    with pytest.raises(ValueError, match=r"not a complete base.*load_prefix"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)
