"""Training and loading prefixes on bases that bitsandbytes has quantised, on the CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import instruction_rows
import packed_base
import pytest
import task_runs
import tiny_base
import torch
from conftest import TINY
from json_lines import write_rows
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.sources.files import iterate_rows
from chatglm_ptuning.model.arguments import DEFAULT_MODEL
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.quantization import quantization_settings
from chatglm_ptuning.prefix.formats import read_prefix
from chatglm_ptuning.training.run import main as train

bitsandbytes = pytest.importorskip("bitsandbytes")
QUANTISED = [(8, "nf4"), (4, "nf4"), (4, "fp4")]
ids_of = dict(argvalues=QUANTISED, ids=["8 bit", "nf4", "fp4"])


@pytest.fixture(scope="module")
def batch():
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    rows = list(iterate_rows([Path(DEFAULT_MODEL).parent / "advertisement" / "train.json"]))[:4]
    examples, _ = instruction_rows.training_rows(tokenizer, rows, 48, 48, columns=Columns("content", "summary"))
    return PaddingCollator(tokenizer.pad_token_id, "right")(examples)


def nano(batch, bits=None, kind="nf4"):
    """chatglm-nano with a trainable prefix that starts from a row's tokens, as fp32 computes them."""
    model = load_model(DEFAULT_MODEL, pre_seq_len=8, prefix_dropout=0.0, quantization_bit=bits, quantization_type=kind)
    reference = load_model(DEFAULT_MODEL, pre_seq_len=8)
    reference.init_prefix_from_ids(batch["input_ids"][0, :8])
    model.transformer.prefix_encoder.load_state_dict(reference.transformer.prefix_encoder.state_dict())
    return model.train()


def loss_and_gradient(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    (prefix,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), prefix.grad.clone()


def dequantized(model, batch):
    """The same weights in float32."""
    whole = nano(batch)
    for name, module in model.transformer.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.transformer.get_submodule(name).weight.data.copy_(weight)
    return whole


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_widths_outside_the_blocks_of_a_cpu_work_through_transformers_too(tmp_path, tiny_config, compute):
    """On CPUs with AVX512-BF16, bitsandbytes would re-order weights in blocks that these widths do not fill."""
    config = tiny_config(hidden_size=72, ffn_hidden_size=200, kv_channels=12)
    ChatGLMForConditionalGeneration(config).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32).eval()
    assert not any(getattr(part, "support_avx512bf16_for_cpu", False) for part in model.modules())
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        inferred = model(ids).logits
    torch.testing.assert_close(inferred, model.train()(ids).logits)


@pytest.mark.parametrize(("bits", "kind"), **ids_of)
def test_the_loss_is_that_of_the_quantised_weights_and_the_gradient_reaches_the_prefix(batch, bits, kind):
    whole_loss, whole = loss_and_gradient(nano(batch), batch)
    model = nano(batch, bits, kind)
    linear = model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight
    assert linear.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert model.transformer.output_layer.weight.dtype == torch.float32
    loss, gradient = loss_and_gradient(model, batch)
    if bits == 8:  # also quantises the activations, so the test is approximate; measured: 0.0024 and 0.99
        assert loss == pytest.approx(whole_loss, rel=0.005)
        assert torch.cosine_similarity(gradient.flatten(), whole.flatten(), dim=0) > 0.9
    else:
        expected_loss, expected = loss_and_gradient(dequantized(model, batch), batch)
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert torch.allclose(gradient, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert (gradient.abs().sum(1) > 0).all()
    model.gradient_checkpointing_enable()
    again, recomputed = loss_and_gradient(model, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(recomputed, gradient, rtol=1e-3, atol=1e-5)


def test_nf4_and_fp4_differ_and_are_both_doubly_quantised(batch):
    states = [
        load_model(DEFAULT_MODEL, quantization_bit=4, quantization_type=kind)
        .transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.quant_state
        for kind in ("nf4", "fp4")
    ]  # fmt: skip
    assert [state.quant_type for state in states] == ["nf4", "fp4"]
    assert all(state.nested for state in states)


@pytest.mark.parametrize(("bits", "kind"), **ids_of)
def test_training_through_it_learns(batch, bits, kind):
    model = nano(batch, bits, kind)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.3)
    losses = []
    for _ in range(12):
        losses.append(loss_and_gradient(model, batch)[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base whose layers are wide enough for bitsandbytes' blocks of 64."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "wide"
    wide = {"hidden_size": 64, "ffn_hidden_size": 128, "initializer_range": 0.1}
    ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY | wide)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def forms(base, tmp_path_factory):
    """The same base in every precision and quantisation, as functions that load it."""
    packed = tmp_path_factory.mktemp("packed")
    for bits in (4, 8):
        packed_base.make_packed_base(base, packed / str(bits), bits)
    forms = {
        "float32": lambda **more: load_model(str(base), dtype="float32", **more),
        "bfloat16": lambda **more: load_model(str(base), dtype="bfloat16", **more),
        "official int4": lambda **more: load_model(str(packed / "4"), **more),
        "official int8": lambda **more: load_model(str(packed / "8"), **more),
    }
    for bits, kind in QUANTISED:
        forms[f"{bits} {kind}"] = lambda bits=bits, kind=kind, **more: load_model(
            str(base), quantization_bit=bits, quantization_type=kind, **more
        )
    forms["official int4 in 4 nf4"] = lambda **more: load_model(str(packed / "4"), quantization_bit=4, **more)
    return forms


def with_prefix(model):
    encoder = model.transformer.prefix_encoder
    encoder.set_key_values(torch.randn(4, *encoder.kv_shape, generator=torch.Generator().manual_seed(4)))
    return model


def test_a_prefix_fits_all_quantisations_of_its_base(forms, tmp_path, ids):
    for name, load in forms.items():
        model = with_prefix(load(pre_seq_len=4))
        model.save_prefix(tmp_path / name)
        loaded = load()
        loaded.load_prefix(tmp_path / name)
        assert torch.equal(logits(loaded, ids), logits(model, ids)), name
        for other in forms.values():
            other().load_prefix(tmp_path / name)


def test_another_base_is_refused_with_every_quantisation(forms, base, tmp_path):
    # Other linear layers alone, so that embeddings and norms cannot tell.
    model = forms["float32"](pre_seq_len=4)
    for layer in model.transformer.encoder.layers:
        for linear in (layer.self_attention.query_key_value, layer.mlp.dense_4h_to_h):
            torch.nn.init.normal_(linear.weight, std=0.1)
    with_prefix(model).save_prefix(tmp_path / "other")
    for load in forms.values():
        with pytest.raises(ValueError, match="was trained on another base"):
            load().load_prefix(tmp_path / "other")
        own = with_prefix(load(pre_seq_len=4))
        own.save_prefix(tmp_path / "own")
        with pytest.raises(ValueError, match="was trained on another base"):
            model.load_prefix(tmp_path / "own")


def test_a_fingerprint_without_the_new_field_is_still_read(forms, tmp_path):
    with_prefix(forms["float32"](pre_seq_len=4)).save_prefix(tmp_path / "old")
    path = tmp_path / "old" / "prefix_config.json"
    content = json.loads(path.read_text("utf-8"))
    assert content["base_fingerprint"].pop("quantized") == []
    path.write_text(json.dumps(content), "utf-8")
    forms["4 nf4"]().load_prefix(tmp_path / "old")
    assert read_prefix(tmp_path / "old", forms["float32"]().config.prefix_shape).metadata.pre_seq_len == 4


def test_a_head_keeps_its_precision(base):
    model = ChatGLMForSequenceClassification.from_pretrained(
        base, pre_seq_len=4, num_labels=3, quantization_config=quantization_settings(4, torch.float32)
    )
    assert model.classifier_head.weight.dtype == torch.float32
    assert model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.dtype == torch.uint8


def test_saved_quantised_weights_are_refused_and_not_written(base, tmp_path):
    model = load_model(str(base), quantization_bit=4)
    with pytest.raises(ValueError, match=r"quantised base is not saved.*save_prefix"):
        model.save_pretrained(tmp_path / "saved")
    folder = Path(shutil.copytree(base, tmp_path / "quantised"))
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    fields["quantization_config"] = model.config.quantization_config.to_dict()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    for load in (ChatGLMForConditionalGeneration.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"quantised by bitsandbytes.*quantization_bit 4 or 8") as error:
            load(folder)
        assert str(folder) in str(error.value)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"quantization_bit .*4 or 8.* 5"):
        quantization_settings(5, torch.float32)
    with pytest.raises(ValueError, match=r"quantization_type .*nf4 or fp4.*'int4'"):
        quantization_settings(4, torch.float32, "int4")


def test_bitsandbytes_does_not_warn_at_every_step(batch, caplog):
    loss_and_gradient(nano(batch, 8), batch)
    assert "inputs will be cast" not in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_the_train_command_trains_through_a_quantised_base(tmp_path, bits, capsys):
    folder = tiny_base.make_base(tmp_path)
    rows = [{"content": "你是谁", "summary": "甲乙丙丁"}, {"content": "天气", "summary": "很好"}] * 2
    (tmp_path / "train.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    train([
        "--do_train", "--model_name_or_path", str(folder), "--train_file", str(tmp_path / "train.json"),
        "--prompt_column", "content", "--response_column", "summary", "--output_dir", str(tmp_path / "run"),
        "--max_source_length", "40", "--max_target_length", "20", "--pre_seq_len", "6", "--max_steps", "12",
        "--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-1", "--save_steps", "12",
        "--quantization_bit", str(bits), "--gradient_checkpointing", "true", "--disable_tqdm", "true",
    ])  # fmt: skip
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text("utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    for settings in ({}, {"quantization_bit": bits}):
        load_model(str(folder), **settings).load_prefix(tmp_path / "run")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A base with a tokenizer."""
    return tiny_base.make_base(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    rows = [{"content": "你是谁", "summary": "甲乙丙丁"}, {"content": "天气", "summary": "很好"}] * 2
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", *rows)


def command(base, rows_file, output, bits, *more) -> list[str]:
    """The flags of the official evaluate.sh, without --do_predict and --ptuning_checkpoint."""
    return [
        "--validation_file", str(rows_file), "--test_file", str(rows_file), "--overwrite_cache", "--prompt_column",
        "content", "--response_column", "summary", "--model_name_or_path", str(base), "--output_dir", str(output),
        "--overwrite_output_dir", "--max_source_length", "40", "--max_target_length", "20", "--predict_with_generate",
        "--per_device_eval_batch_size", "1", "--quantization_bit", str(bits), "--disable_tqdm", "true",
        *map(str, more),
    ]  # fmt: skip


def results(run) -> dict[str, float]:
    return json.loads((run / "all_results.json").read_text("utf-8"))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_evaluated_without_training(speaker, rows_file, tmp_path, bits):
    tiny_base.make_prefix(speaker, tmp_path / "prefix", "甲乙丙丁")
    for name, more in {"plain": [], "prefix": ["--ptuning_checkpoint", tmp_path / "prefix"]}.items():
        train(command(speaker, rows_file, tmp_path / name, bits, "--do_predict", "--do_eval", *more))
        assert {"predict_rouge-l", "eval_loss", "eval_rouge-l"} <= results(tmp_path / name).keys()
        assert (tmp_path / name / "generated_predictions.txt").read_text("utf-8").count("\n") == 4
    assert results(tmp_path / "plain")["eval_loss"] != results(tmp_path / "prefix")["eval_loss"]


@pytest.mark.parametrize("tuning", ["lora", "prompt", "p_tuning"])
def test_other_methods_train_on_a_quantised_base_and_are_evaluated_on_it(speaker, rows_file, tmp_path, tuning):
    more = ["--do_train", "--train_file", rows_file, "--tuning", tuning, "--pre_seq_len", 4, "--max_steps", 2]
    train(command(speaker, rows_file, tmp_path / "run", 8, "--do_eval", *more, "--report_drift", "false"))
    scored = ["--do_eval", "--ptuning_checkpoint", tmp_path / "run", "--report_drift", "false"]
    train(command(speaker, rows_file, tmp_path / "again", 8, *scored))
    assert results(tmp_path / "again")["eval_loss"] == pytest.approx(results(tmp_path / "run")["eval_loss"], rel=1e-3)


def test_a_head_alone_trains_on_a_quantised_base(speaker, tmp_path):
    data = task_runs.write_tasks(tmp_path / "data")
    more = ["--head", "sequence_classification", "--tuning", "head_only", "--quantization_bit", 4, "--do_eval"]
    assert "eval_accuracy" in task_runs.train(speaker, data, "mood.yaml", tmp_path / "run", *more, steps=2)


_RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from chatglm_ptuning.model.loading import load_model

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = load_model(sys.argv[1], pre_seq_len=4, prefix_dropout=0.0, quantization_bit=4, dtype="float32").train()
encoder = model.transformer.prefix_encoder
encoder.set_key_values(torch.randn(4, *encoder.kv_shape, generator=torch.Generator().manual_seed(4)))
model.gradient_checkpointing_enable()
wrapped = DistributedDataParallel(model) if world > 1 else model
ids = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(1))
optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
for _ in range(3):
    rows = ids[rank::world]
    wrapped(rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    model.save_prefix(sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_the_same_prefix_as_one(base, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(_RANK, "utf-8")
    prefixes = []
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        output = tmp_path / f"prefix-{world}"
        subprocess.run([*command, str(script), str(base), str(output)], check=True, capture_output=True, timeout=300)
        prefixes.append(
            read_prefix(output, ChatGLMConfig.from_pretrained(base).prefix_shape).parameters["embedding.weight"]
        )
    assert torch.allclose(*prefixes, atol=1e-5)
    start = torch.randn(4, 4, 2, 8, generator=torch.Generator().manual_seed(4)).flatten(1)
    assert not torch.allclose(prefixes[0], start, atol=1e-3)
