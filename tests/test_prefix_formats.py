"""Official prefixes as trainers leave them: under wrapped names, in dictionaries, beside other files, by DeepSpeed."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY
from chatglm_ptuning.prefix.formats import adapter_type, detect_format, read_prefix
from chatglm_ptuning.tuning.load import load_tuned


@pytest.fixture
def shape(tiny_config):
    return tiny_config().prefix_shape


@pytest.fixture
def parameters(prefix_folders) -> dict[str, torch.Tensor]:
    """The parameters of the prefix "projected" by their names in the encoder."""
    tensors = load_file(prefix_folders["projected"] / "prefix_model.safetensors")
    return {name.removeprefix(PREFIX_KEY): value for name, value in tensors.items()}


def same(path: Path, shape, parameters: dict[str, torch.Tensor]) -> bool:
    found = read_prefix(path, shape).parameters
    return found.keys() == parameters.keys() and all(torch.equal(found[name], parameters[name]) for name in parameters)


WRAPPED = [
    "module.transformer.prefix_encoder.",
    "module.module.transformer.prefix_encoder.",
    "base_model.model.transformer.prefix_encoder.",
    "module.base_model.model.transformer.prefix_encoder.",
    "_orig_mod.transformer.prefix_encoder.",
    "_forward_module.module.transformer.prefix_encoder.",
    "model.transformer.prefix_encoder.",
    "base_model.model.transformer.prefix_encoder.modules_to_save.default.",
    "transformer._fsdp_wrapped_module.prefix_encoder._fsdp_wrapped_module.",
    "transformer.prefix_encoder._orig_mod.",
    "prefix_encoder.",
    "",  # the encoder's own state_dict
]


@pytest.mark.parametrize("before", WRAPPED)
def test_names_in_wrappers(parameters, shape, tmp_path, before):
    others = {
        "module.transformer.output_layer.weight": torch.zeros(3),
        "base.prefix_encoder_norm.weight": torch.ones(2),
    }
    torch.save({before + name: value for name, value in parameters.items()} | others, tmp_path / "pytorch_model.bin")
    assert same(tmp_path, shape, parameters)


@pytest.mark.parametrize("outside", [["model"], ["state_dict"], ["module"], ["model", "module"], ["a", "b", "model"]])
@pytest.mark.parametrize("before", [PREFIX_KEY, WRAPPED[0], WRAPPED[3]])
def test_dictionaries_around_the_parameters(parameters, shape, tmp_path, outside, before):
    content = OrderedDict((before + name, value) for name, value in parameters.items())
    for key in outside:
        states = {0: {"exp_avg": torch.ones(2)}, f"{PREFIX_KEY}embedding.weight": {"exp_avg": torch.ones(2)}}
        content = {
            key: content,
            "epoch": 3,
            "args": Namespace(lr=0.1),
            "optimizer": {"state": states, "param_groups": [{"lr": 1.0}]},
        }
    for file in (tmp_path / "pytorch_model.bin", tmp_path / "prefix.pt"):
        torch.save(content, file)
        assert same(file, shape, parameters)
    assert same(tmp_path, shape, parameters)


def test_files_of_other_names_and_folders_below_are_named(parameters, shape, tmp_path):
    torch.save(parameters, tmp_path / "best.pt")
    with pytest.raises(FileNotFoundError, match=r"No prefix in .* file with another name must be named itself"):
        read_prefix(tmp_path, shape)
    assert same(tmp_path / "best.pt", shape, parameters)
    for run in ("ads", "news"):
        folder = tmp_path / run / "checkpoint-9"
        folder.mkdir(parents=True)
        torch.save({PREFIX_KEY + name: value for name, value in parameters.items()}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=rf"No prefix in {tmp_path}: .*such as ads/checkpoint-9"):
        read_prefix(tmp_path, shape)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", r"is empty \(0 bytes\).*download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<html>404</html>", r"not a file of torch\.save.*Copy it again"),
        ({"model": {}, "args": Path("a")}, r"an object of pathlib\..*save the tensors alone"),
    ],
)
def test_what_is_no_file_of_tensors_is_named_without_advice_to_unpickle_it(shape, tmp_path, content, named):
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=named) as error:
        read_prefix(tmp_path, shape)
    assert str(file) in str(error.value) and "weights_only" not in str(error.value)


def test_the_parameters_of_peft_before_training_are_not_taken(parameters, shape, tmp_path):
    before = "base_model.model.transformer.prefix_encoder."
    content = {f"{before}modules_to_save.default.{name}": value for name, value in parameters.items()}
    content |= {f"{before}original_module.{name}": torch.zeros_like(value) for name, value in parameters.items()}
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert same(tmp_path, shape, parameters)


def test_two_different_prefixes_in_a_file_are_refused(parameters, shape, tmp_path):
    content = {
        "model": {PREFIX_KEY + name: value for name, value in parameters.items()},
        "ema": {PREFIX_KEY + name: value + 1 for name, value in parameters.items()},
    }
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*two.* model\.transformer.* ema\.transformer"):
        read_prefix(tmp_path, shape)


# Folders with several formats


def official(folder: Path, parameters: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({PREFIX_KEY + name: value for name, value in parameters.items()}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("adapter", ["PREFIX_TUNING", "LORA", None], ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_an_official_prefix_beside_an_adapter_config(load, parameters, shape, tmp_path, ids, adapter, weights):
    if weights and adapter == "PREFIX_TUNING":
        pytest.skip("then the adapter is a prefix, too")
    folder = official(tmp_path / "p", parameters)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": adapter}))
    if weights:
        torch.save({"lora_A": torch.zeros(2)}, folder / "adapter_model.bin")
    assert detect_format(folder) == ("official", folder) and adapter_type(folder) is None
    assert same(folder, shape, parameters)
    tuned = load_tuned(load(), folder)  # as `evaluate` does
    assert tuned.method == "ptuning_v2" and tuned.model.selected_prefix == "default"


def test_an_adapter_beside_a_whole_model_stays_an_adapter(load, tmp_path):
    torch.save(load().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert detect_format(tmp_path)[0] == "PEFT" and adapter_type(tmp_path) == "LORA"


def test_the_file_with_the_prefix_is_read(load, parameters, shape, tmp_path):
    official(tmp_path, parameters)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.bin")
    torch.save(load().state_dict(), tmp_path / "pytorch_model.bin")
    weight_map = {PREFIX_KEY + name: "weights.bin" for name in parameters}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(tmp_path, shape, parameters)


def test_an_earlier_checkpoint_does_not_stand_in_for_the_last(load, parameters, shape, tmp_path):
    official(tmp_path / "checkpoint-5", parameters)
    (tmp_path / "checkpoint-10").mkdir()
    torch.save(load().state_dict(), tmp_path / "checkpoint-10" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"checkpoint-10.pytorch_model\.bin holds no parameter"):
        read_prefix(tmp_path, shape)


# DeepSpeed


def states(folder: Path, parameters: dict[str, torch.Tensor], name: str = "mp_rank_00_model_states.pt") -> Path:
    """A file with the entries that DeepSpeed 0.19 writes."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "module": OrderedDict((PREFIX_KEY + key, value) for key, value in parameters.items()),
        "buffer_names": ["transformer.rotary_pos_emb.inv_freq"],
        "optimizer": None,
        "param_shapes": [OrderedDict((PREFIX_KEY + key, value.shape) for key, value in parameters.items())],
        "shared_params": {},
        "global_steps": 1,
        "dp_world_size": 1,
        "ds_config": {"train_micro_batch_size_per_gpu": 1},
        "ds_version": "0.19.8",
    }
    torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_deepspeed_folder_and_the_folders_around_it(load, parameters, shape, tmp_path, dtype):
    rounded = {name: value.to(dtype) for name, value in parameters.items()}
    run = tmp_path / "run"
    states(run / "checkpoint-9" / "global_step9", rounded)
    states(run / "checkpoint-9" / "global_step8", {name: value + 1 for name, value in rounded.items()})
    inner = run / "checkpoint-9" / "global_step9"
    for path in (run, inner.parent, inner, inner / "mp_rank_00_model_states.pt"):
        assert same(path, shape, rounded)
    model = load(pre_seq_len=4, prefix_projection=True)
    model.load_prefix(run)
    assert model.transformer.prefix_encoder.embedding.weight.dtype == torch.float32


def test_latest_names_the_step(parameters, shape, tmp_path):
    states(tmp_path / "epoch-1.best", parameters)
    states(tmp_path / "global_step20", {name: value + 1 for name, value in parameters.items()})
    (tmp_path / "latest").write_text("epoch-1.best\n")
    assert same(tmp_path, shape, parameters)
    shutil.rmtree(tmp_path / "epoch-1.best")
    with pytest.raises(FileNotFoundError, match=r"latest names epoch-1\.best"):
        read_prefix(tmp_path, shape)


def test_a_name_in_latest_stays_in_the_folder(parameters, shape, tmp_path):
    states(tmp_path / "elsewhere", parameters)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("../elsewhere")
    with pytest.raises(FileNotFoundError, match="No prefix in"):
        read_prefix(tmp_path / "run", shape)


def test_an_official_file_beside_deepspeeds_is_preferred(parameters, shape, tmp_path):
    folder = official(tmp_path / "checkpoint-9", parameters)
    states(folder / "global_step9", {name: value.half() for name, value in parameters.items()})
    (folder / "latest").write_text("global_step9")
    assert same(folder, shape, parameters) and same(tmp_path, shape, parameters)


def test_a_partitioned_prefix_is_refused_with_the_command_that_joins_it(parameters, shape, tmp_path):
    empty = {name: torch.zeros(0) for name in parameters}
    for rank in range(2):
        states(tmp_path / "global_step7", empty, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step7")
    file = tmp_path / "global_step7" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    for path in (tmp_path, tmp_path / "global_step7", file):
        with pytest.raises(ValueError, match="ZeRO-3") as error:
            read_prefix(path, shape)
        command = f"python -m deepspeed.utils.zero_to_fp32 {tmp_path} OUTPUT -t global_step7"
        assert str(file) in str(error.value) and command in str(error.value)
    official(tmp_path, parameters)  # joined by it, or gathered by the trainer
    assert same(tmp_path, shape, parameters)
