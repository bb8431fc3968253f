"""`--save_official_prefix`: the official loop loads what a run of this kit leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file
from test_train_command import ROWS, flags
from transformers import AutoConfig, AutoModel

from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY
from chatglm_ptuning.prefix.formats import detect_format, read_prefix
from chatglm_ptuning.training.run import main

FILE = "pytorch_model.bin"
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", *ROWS)


def official_loop(base: Path, checkpoint: Path, length: int, projection: bool):
    """The lines of the official README and web_demo.py."""
    config = AutoConfig.from_pretrained(base, pre_seq_len=length)
    config.prefix_projection = projection
    model = AutoModel.from_pretrained(base, config=config)
    prefix_state_dict = torch.load(os.path.join(checkpoint, FILE))  # noqa: PTH118
    new_prefix_state_dict = {}
    for k, v in prefix_state_dict.items():
        if k.startswith("transformer.prefix_encoder."):
            new_prefix_state_dict[k[len("transformer.prefix_encoder.") :]] = v
    assert len(new_prefix_state_dict) == len(prefix_state_dict)
    model.transformer.prefix_encoder.load_state_dict(new_prefix_state_dict)
    return model.eval()


@pytest.mark.parametrize("projection", [False, True])
def test_the_official_loop_loads_a_run_and_its_checkpoints(base, train_file, tmp_path, projection):
    run = tmp_path / "run"
    more = ["--save_official_prefix", "--prefix_projection", projection, "--save_steps", "1", "--learning_rate", "0.1"]
    main(flags(base, train_file, run, *more, steps=2))
    logits = {}
    for folder in (run / "checkpoint-1", run / "checkpoint-2", run):
        saved = torch.load(folder / FILE)
        parts = ["embedding.weight"]
        parts += ["trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"] if projection else []
        assert {name: value.dtype for name, value in saved.items()} == {
            PREFIX_KEY + part: torch.float32 for part in parts
        }
        assert detect_format(folder) == ("kit", folder)
        model = official_loop(base, folder, 6, projection)
        logits[folder.name] = model(IDS).logits
        ours = AutoModel.from_pretrained(base).eval()
        for path in (folder, folder / FILE):
            ours.load_prefix(path)
            torch.testing.assert_close(ours(IDS).logits, logits[folder.name])
    assert torch.equal(logits["run"], logits["checkpoint-2"])
    assert not torch.equal(logits["run"], logits["checkpoint-1"])


def test_a_prompt_is_exported_as_the_prefix_that_it_is(base, train_file, tmp_path):
    main(flags(base, train_file, tmp_path / "run", "--tuning", "prompt", "--save_official_prefix", steps=1))
    model = official_loop(base, tmp_path / "run", 6, projection=False)
    ours = AutoModel.from_pretrained(base).eval()
    ours.load_prefix(tmp_path / "run")
    torch.testing.assert_close(model(IDS).logits, ours(IDS).logits)


def test_an_export_never_stays_beside_another_prefix(base, train_file, tmp_path):
    run, over = tmp_path / "run", ["--overwrite_output_dir", "--save_strategy", "no"]
    main(flags(base, train_file, run, "--save_official_prefix", *over, steps=1))
    assert (run / FILE).exists()
    main(flags(base, train_file, run, "--seed", "7", *over, steps=1))
    assert not (run / FILE).exists()
    others = {f"{PREFIX_KEY}embedding.weight": torch.zeros(6, 128)}
    torch.save(others, run / FILE)  # of the user's own
    main(flags(base, train_file, run, *over, steps=1))
    assert torch.equal(torch.load(run / FILE)[f"{PREFIX_KEY}embedding.weight"], torch.zeros(6, 128))
    main(flags(base, train_file, run, "--save_official_prefix", *over, steps=1))
    found, shape = load_file(run / "prefix_model.safetensors"), AutoConfig.from_pretrained(base).prefix_shape
    for name, value in read_prefix(run / FILE, shape).parameters.items():
        assert torch.equal(value, found[PREFIX_KEY + name])


@pytest.mark.parametrize("tuning", ["lora", "full", "none"])
def test_a_method_without_a_prefix_is_refused(base, train_file, tmp_path, capsys, tuning):
    wanted = flags(base, train_file, tmp_path / "run", "--tuning", tuning, "--save_official_prefix", steps=1)
    wanted = [*wanted[1:], "--do_eval", "--validation_file", str(train_file)] if tuning == "none" else wanted
    with pytest.raises(SystemExit):
        main(wanted)
    message = capsys.readouterr().err
    assert "--save_official_prefix" in message and tuning in message and "ptuning_v2" in message


def test_a_file_with_a_whole_model_is_not_replaced(base, train_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    torch.save({"transformer.output_layer.weight": torch.zeros(2)}, tmp_path / "run" / FILE)
    with pytest.raises(SystemExit):
        main(flags(base, train_file, tmp_path / "run", "--save_official_prefix", steps=1))
    assert str(tmp_path / "run" / FILE) in capsys.readouterr().err
    assert not (tmp_path / "run" / "prefix_model.safetensors").exists()
