"""Bases whose folder holds a prefix among its weights, or whose config.json only says so: never used by accident."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import packed_base
import pytest
import tiny_base
import torch
from json_lines import write_rows
from safetensors.torch import load_file, save_file
from test_base_files import FORMS, write_base
from test_train_command import ROWS, flags, losses
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm_ptuning.evaluation.run import main as evaluate
from chatglm_ptuning.model.arguments import TokenizerArguments
from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.model.modeling_chatglm import ChatGLMModel
from chatglm_ptuning.serving import terminal
from chatglm_ptuning.training.run import main

NAME = "tuned-base"


def set_fields(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), encoding="utf-8")


@pytest.fixture
def recorded(tiny_base, tmp_path):
    """A base whose config.json sets pre_seq_len, as official fine-tuning leaves it, with no prefix in its weights."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / NAME))
    set_fields(folder, pre_seq_len=4, prefix_projection=True)
    return folder


@pytest.fixture
def stored(trained, tmp_path):
    """Writes a base with a trained prefix of length 4 among its weights, in one of FORMS."""

    def write(form: str = "safetensors", **settings) -> Path:
        return write_base(trained(**settings), tmp_path / NAME, form, torch.float32)

    return write


def loaders(folder: Path):
    """The ways to load a language model from a folder."""
    yield ChatGLMForConditionalGeneration.from_pretrained(folder)
    yield AutoModel.from_pretrained(folder)
    yield AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
    yield ChatGLMForConditionalGeneration.from_pretrained(folder, config=ChatGLMConfig.from_pretrained(folder))
    yield load_model(str(folder), dtype="float32")


def test_a_recorded_length_without_a_prefix_is_the_plain_base(load, recorded, ids, tmp_path, caplog):
    expected = load()(ids).logits
    for model in loaders(recorded):
        assert model.prefix_names == [] and model.selected_prefix is None and model.config.pre_seq_len is None
        assert all(parameter.requires_grad for parameter in model.parameters())
        torch.testing.assert_close(model.eval()(ids).logits, expected)
        model.check_prefix_is_trained()
        note = caplog.messages[-1]
        assert all(part in note for part in (str(recorded / "config.json"), "pre_seq_len 4", "load_prefix"))
        caplog.clear()
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pre_seq_len"] is None


def test_whoever_asks_gets_a_new_trainable_prefix(recorded, caplog):
    config = AutoConfig.from_pretrained(recorded, pre_seq_len=7)
    later = ChatGLMConfig.from_pretrained(recorded)
    later.pre_seq_len, later.prefix_projection = 4, False  # as the official main.py does
    for model, length, projection in (
        (ChatGLMForConditionalGeneration.from_pretrained(recorded, pre_seq_len=7), 7, True),
        (AutoModel.from_pretrained(recorded, config=config), 7, True),
        (AutoModel.from_pretrained(recorded, pre_seq_len=7, prefix_projection=False), 7, False),
        (ChatGLMForConditionalGeneration.from_pretrained(recorded, config=later), 4, False),
        (load_model(str(recorded), pre_seq_len=7), 7, False),
    ):
        encoder = model.transformer.prefix_encoder
        assert (encoder.pre_seq_len, encoder.prefix_projection, encoder.is_untrained) == (length, projection, True)
        trainable = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trainable == {f"transformer.prefix_encoder.{name}" for name in encoder.state_dict()}
    assert "hold no prefix" not in caplog.text


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_stored_prefix_has_the_folders_name_and_is_not_selected(load, trained, stored, ids, caplog, form, projection):
    folder = stored(form, prefix_projection=projection)
    plain, prefixed = load()(ids).logits, trained(prefix_projection=projection).eval()(ids).logits
    for model in loaders(folder):
        model.eval()
        assert model.prefix_names == [NAME] and model.selected_prefix is None and model.config.pre_seq_len is None
        assert "prefix_encoder" not in dict(model.transformer.named_children())
        torch.testing.assert_close(model(ids).logits, plain)
        torch.testing.assert_close(model(ids, prefix=NAME).logits, prefixed)
        assert model.base_fingerprint() == load().base_fingerprint()
        model.set_prefix(NAME)
        torch.testing.assert_close(model(ids).logits, prefixed)
        assert all(part in caplog.text for part in (str(folder), "4 virtual tokens", f"set_prefix({NAME!r})"))
        caplog.clear()


@pytest.mark.parametrize("length", [4, 6])
def test_a_new_prefix_does_not_start_from_the_stored_one(trained, stored, ids, length):
    folder = stored("sharded bin")
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, pre_seq_len=length).eval()
    assert model.prefix_names == ["default", NAME] and model.selected_prefix == "default"
    assert model.transformer.prefix_encoder.is_untrained
    torch.testing.assert_close(model(ids, prefix=NAME).logits, trained().eval()(ids).logits)
    model.load_prefix(folder)  # asked for: training continues from it
    assert torch.equal(
        model.transformer.prefix_encoder.embedding.weight, trained().transformer.prefix_encoder.embedding.weight
    )


def test_the_weights_need_no_recorded_length(stored, trained, ids):
    folder = stored()
    set_fields(folder, pre_seq_len=None)
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).eval()
    torch.testing.assert_close(model(ids, prefix=NAME).logits, trained().eval()(ids).logits)


@pytest.mark.parametrize("fields", [{"pre_seq_len": 9}, {"prefix_projection": True}])
def test_a_contradiction_between_config_and_weights_is_refused(stored, fields):
    folder = stored()
    set_fields(folder, **fields)
    with pytest.raises(ValueError) as error:
        ChatGLMForConditionalGeneration.from_pretrained(folder)
    message = str(error.value)
    assert all(part in message for part in (str(folder / "config.json"), "model.safetensors", "pre_seq_len 4"))
    assert all(f"{name} {value}" in message for name, value in fields.items())


def test_other_classes_recognise_it_too(stored, trained, ids):
    folder = stored()
    expected = trained().eval().transformer(ids).last_hidden_state
    inner = ChatGLMModel.from_pretrained(folder).eval()
    torch.testing.assert_close(inner(ids, prefix=NAME).last_hidden_state, expected)
    model = ChatGLMForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    assert model.prefix_names == [NAME] and model.selected_prefix is None
    torch.testing.assert_close(model.transformer(ids, prefix=NAME).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"classifier_head .*untrained"):
        model.check_prefix_is_trained(NAME)


def test_a_link_to_the_folder_gives_the_name(stored, tmp_path):
    (tmp_path / "linked").symlink_to(stored())
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "linked").prefix_names == ["linked"]
    assert TokenizerArguments(model_name_or_path=str(tmp_path / "linked")).find_prefix("linked") == str(
        tmp_path / "linked"
    )


def test_in_a_hubs_cache_the_name_is_that_of_the_repository(trained, tmp_path):
    repository, commit = tmp_path / f"models--me--{NAME}", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    write_base(trained(), repository / "snapshots" / commit, "sharded bin", torch.float32)
    for cls in (ChatGLMForConditionalGeneration, AutoModel):
        model = cls.from_pretrained(f"me/{NAME}", cache_dir=tmp_path)
        assert model.prefix_names == [NAME] and model.selected_prefix is None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(trained, tmp_path, ids, bits):
    pytest.importorskip("bitsandbytes")
    whole = trained()
    folder = write_base(whole, tmp_path / NAME, "sharded safetensors", torch.float32)
    model = load_model(str(folder), quantization_bit=bits, dtype="float32")
    assert model.prefix_names == [NAME] and model.selected_prefix is None
    key_values = model.transformer.prefixes[NAME].key_values
    torch.testing.assert_close(key_values, whole.transformer.prefix_encoder.key_values().detach())


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_an_official_base_in_4_bits(trained, tmp_path, suffix):
    whole = trained()
    write_base(whole, tmp_path / "whole", "safetensors", torch.float32)
    packed_base.make_packed_base(tmp_path / "whole", tmp_path / NAME, 4, suffix=suffix)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / NAME, dtype=torch.float32)
    assert model.prefix_names == [NAME] and model.selected_prefix is None
    key_values = whole.transformer.prefix_encoder.key_values().detach().half().float()
    torch.testing.assert_close(model.transformer.prefixes[NAME].key_values, key_values)


# Commands


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The trained base with a prefix that changes its answers inside, and that prefix alone."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("tuned") / NAME))
    prefix = tiny_base.make_prefix(base, tmp_path_factory.mktemp("prefix"), "请问你是谁")
    tensors = load_file(prefix / "prefix_model.safetensors")
    save_file(
        load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    set_fields(folder, pre_seq_len=len(tensors["transformer.prefix_encoder.embedding.weight"]))
    return folder, prefix


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", *ROWS)


def results(run: Path) -> dict[str, float]:
    found = json.loads((run / "all_results.json").read_text("utf-8"))
    return {name: value for name, value in found.items() if "time" not in name and "per_second" not in name}


@pytest.mark.parametrize("tuning", ["ptuning_v2", "lora", "prompt", "full"])
def test_training_is_that_of_the_plain_base(base, tuned, train_file, tmp_path, tuning):
    more = ["--tuning", tuning, "--validation_file", train_file, "--do_eval", "--predict_with_generate"]
    more += ["--max_eval_samples", "3", "--max_predict_samples", "3", "--max_target_length", "8"]
    more += ["--report_drift", "false"]
    more += ["--do_predict", "--compare_base"] if tuning == "prompt" else []
    for name, folder in (("plain", base), ("stored", tuned[0])):
        main(flags(folder, train_file, tmp_path / name, *more, steps=2))
    assert losses(tmp_path / "stored") == losses(tmp_path / "plain")
    scores = [
        {name: value for name, value in results(tmp_path / run).items() if name.startswith(("eval", "predict", "base"))}
        for run in ("plain", "stored")
    ]
    assert scores[0] == scores[1] and len(scores[0]) > 3
    if tuning == "full":
        assert not any("prefix" in name for name in load_file(tmp_path / "stored" / "model.safetensors"))
        assert json.loads((tmp_path / "stored" / "config.json").read_text("utf-8"))["pre_seq_len"] is None


def test_training_continues_from_it_when_asked(tuned, train_file, tmp_path):
    folder, prefix = tuned
    for run, flag, value in (("a", "--ptuning_checkpoint", NAME), ("b", "--init_prefix", folder)):
        wanted = [name for name in flags(folder, train_file, tmp_path / run, flag, value, steps=1)]
        place = wanted.index("--pre_seq_len")
        main([*wanted[:place], *wanted[place + 2 :], "--learning_rate", "1e-9", "--prefix_dropout", "0"])
        found = load_file(tmp_path / run / "prefix_model.safetensors")
        for name, value in load_file(prefix / "prefix_model.safetensors").items():
            torch.testing.assert_close(found[name], value)


def test_an_evaluation_uses_it_when_asked(base, tuned, train_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_PTUNING_OUTPUT", str(tmp_path / "runs"))
    folder, prefix = tuned

    def answers(model: Path, *more) -> tuple[list[str], list[str]]:
        output = tmp_path / "scores"
        evaluate(
            ["--model_name_or_path", str(model), "--test_file", str(train_file), "--prompt_column", "content",
             "--response_column", "summary", "--max_target_length", "12", "--max_predict_samples", "4",
             "--output_dir", str(output), *map(str, more)]
        )  # fmt: skip
        rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text("utf-8").splitlines()]
        return [row["prediction"] for row in rows], [row.get("base_prediction") for row in rows]

    plain, _ = answers(base, "--ptuning_checkpoint", "none")
    with_prefix, _ = answers(base, "--ptuning_checkpoint", prefix)
    assert plain != with_prefix
    assert answers(folder)[0] == answers(folder, "--ptuning_checkpoint", "none")[0] == plain
    for asked in (NAME, folder):
        assert answers(folder, "--ptuning_checkpoint", asked, "--compare_base") == (with_prefix, plain)
    assert answers(folder, "--ptuning_checkpoint", prefix, "--compare_base") == (with_prefix, plain)


def test_an_evaluation_in_a_run_uses_the_plain_base(base, tuned, train_file, tmp_path):
    for name, folder, *more in (
        ("plain", base),
        ("stored", tuned[0]),
        ("none", tuned[0], "--ptuning_checkpoint", "none"),
    ):
        main(
            ["--do_eval", "--model_name_or_path", str(folder), "--validation_file", str(train_file), *more,
             "--prompt_column", "content", "--response_column", "summary", "--output_dir", str(tmp_path / name)]
        )  # fmt: skip
    assert len({results(tmp_path / name)["eval_loss"] for name in ("plain", "stored", "none")}) == 1


def test_a_chat_starts_with_the_plain_base_and_offers_it(tuned, tmp_path, monkeypatch, capsys):
    lines = iter(["/prefix", f"/prefix {NAME}", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    terminal.main(["--model_name_or_path", str(tuned[0]), "--runs_folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"  {NAME}\n* none" in printed and f"Prefix: {NAME}" in printed
    lines = iter(["/prefix", "/exit"])
    terminal.main(["--model_name_or_path", str(tuned[0]), "--ptuning_checkpoint", NAME])
    assert f"* {NAME}\n  none" in capsys.readouterr().out
    for named in (["none"], ["none", NAME]):
        lines = iter(["/prefix", "/exit"])
        terminal.main(["--model_name_or_path", str(tuned[0]), "--ptuning_checkpoint", *named])
        assert f"  {NAME}\n* none" in capsys.readouterr().out
