"""The estimate against what torch's allocator and the operating system measure, and the command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import measured_step
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ptuning.estimation.memory import (
    GIB,
    RESERVE,
    count_parameters,
    estimate_memory,
    flops_per_example,
    largest_batches,
    seconds_per_1000_examples,
    weight_bytes,
    with_prefix,
)
from chatglm_ptuning.estimation.run import main
from chatglm_ptuning.estimation.simulation import Job
from chatglm_ptuning.estimation.sizes import KNOWN_SIZES, find_config
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.loading import load_model

SMALL = {
    "num_layers": 3, "padded_vocab_size": 2048, "hidden_size": 256, "ffn_hidden_size": 688, "kv_channels": 32,
    "num_attention_heads": 8, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "pre_seq_len", "projection", "batch", "length", "attention", "checkpointing"),
    [
        ({}, 16, False, 4, 128, "sdpa", False),
        ({}, 16, False, 4, 128, "sdpa", True),
        ({"padded_vocab_size": 256, "num_layers": 6}, 48, False, 1, 384, "sdpa", False),
        ({"padded_vocab_size": 256, "num_layers": 6}, 32, False, 2, 256, "eager", True),
        ({"num_layers": 2, "multi_query_group_num": 4}, 8, True, 3, 96, "eager", False),
        ({"num_layers": 1}, 100, True, 8, 48, "sdpa", True),
    ],
)
def test_a_step_takes_what_the_allocator_says(
    changes, pre_seq_len, projection, batch, length, attention, checkpointing
):
    config = with_prefix(ChatGLMConfig(**SMALL | changes), pre_seq_len, projection)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    measured = measured_step.allocated_peak(model, config, batch, length)
    job = Job(config, batch, length, torch.float32, checkpointing, attn_implementation=attention)
    memory = estimate_memory(job)
    assert memory.activations + memory.logits == pytest.approx(measured, rel=0.03)
    parameters = list(model.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    assert memory.weights + memory.prefix == sum(parameter.nbytes for parameter in parameters)
    assert (memory.gradients, memory.optimizer) == (trained, 2 * trained)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_quantised_base(tmp_path, bits, checkpointing):
    pytest.importorskip("bitsandbytes")
    config = ChatGLMConfig(**SMALL)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), pre_seq_len=16, quantization_bit=bits, dtype="float32").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    measured = measured_step.allocated_peak(model, model.config, 4, 128)
    job = Job(with_prefix(config, 16), 4, 128, torch.float32, checkpointing, bits)
    memory = estimate_memory(job)
    assert memory.activations + memory.logits == pytest.approx(measured, rel=0.1)
    held = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held += parameter.nbytes if not parameter.requires_grad else 0
            state = getattr(parameter, "quant_state", None)
            held += 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
        state = getattr(module, "state", None)
        held += 0 if state is None else state.SCB.nbytes
    assert memory.weights == pytest.approx(held, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "pre_seq_len", "batch", "length", "attention", "checkpointing"),
    [(2, 128, 4, 192, "sdpa", False), (2, 64, 2, 256, "eager", True), (1, 32, 1, 64, "sdpa", False)],
)
def test_at_true_width_the_process_grows_by_the_estimate(layers, pre_seq_len, batch, length, attention, checkpointing):
    config = find_config("chatglm3-6b")
    config.num_layers = layers
    job = Job(
        with_prefix(config, pre_seq_len), batch, length, torch.float32, checkpointing, attn_implementation=attention
    )
    expected = estimate_memory(job).total
    if psutil.virtual_memory().available < 1.3 * expected:
        pytest.skip(f"needs {1.3 * expected / GIB:.1f} GiB of free memory")
    settings = {
        "config": {**SMALL, "num_layers": layers, "padded_vocab_size": 65024, "hidden_size": 4096,
                   "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32},
        "pre_seq_len": pre_seq_len, "batch": batch, "length": length, "attn_implementation": attention,
        "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, measured_step.__file__, json.dumps(settings)],
        capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    measured = int(done.stdout.split()[-1])
    print(f"estimated {expected / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB")
    assert expected == pytest.approx(measured, rel=0.15)


def test_published_sizes():
    # Parameters: of the official checkpoints' index files (total_size / 2).
    six = count_parameters(with_prefix(find_config("chatglm3-6b"), 128))
    assert (six.base, six.prefix) == (6_243_584_000, 128 * 14336)
    nine = count_parameters(with_prefix(find_config("THUDM/glm-4-9b-chat"), 128))
    assert nine.base == 9_399_951_360
    assert six.prefix / (six.base + six.prefix) == pytest.approx(0.000294, abs=1e-6)
    assert all(count_parameters(with_prefix(find_config(name), 1)).base > 6e9 for name in KNOWN_SIZES)


def test_a_folder_needs_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", **SMALL}), "utf-8")
    assert find_config(str(tmp_path)).ffn_hidden_size == 688


def job(**changes):
    return Job(**{"config": with_prefix(ChatGLMConfig(**SMALL), 16), "batch": 2, "length": 64} | changes)


def test_zero_divides_what_its_stages_divide():
    parts = {zero: estimate_memory(job(zero=zero, gpus=4)) for zero in range(4)}
    alone = estimate_memory(job())
    assert parts[0] == alone
    assert parts[1].optimizer == alone.optimizer // 4 and parts[1].gradients == alone.gradients
    assert parts[2].gradients == alone.gradients // 4 and parts[2].weights == alone.weights
    assert parts[3].weights == alone.weights // 4
    # A base below DeepSpeed's limit of live parameters is whole on every GPU for a moment.
    assert parts[3].weights + parts[3].prefix + parts[3].gathered == pytest.approx(alone.weights + alone.prefix, abs=4)


def test_quantised_weights():
    parameters = count_parameters(job().config)
    assert weight_bytes(parameters, torch.bfloat16, None) == 2 * parameters.base
    linear = 3 * 256 * ((256 + 128) + 256 + 3 * 688)
    assert parameters.packed == linear
    assert weight_bytes(parameters, torch.bfloat16, 8) == linear + 2 * parameters.other + 4 * 3 * (
        384 + 256 + 1376 + 256
    )


def test_the_largest_batch_is_the_largest():
    memories = [0, 150 * 2**20, 700 * 2**20]
    none, few, many = largest_batches(job(batch=1, length=2048), [RESERVE + memory for memory in memories])
    assert none == 0 < few < 8 < many
    for batch, memory in ((few, memories[1]), (many, memories[2])):
        fits = [estimate_memory(job(batch=rows, length=2048)).total <= memory for rows in (batch, batch + 1)]
        assert fits == [True, False]


def test_arithmetic_by_hand():
    # One layer of linear weights W, vocabulary V, width h, n heads of d, T tokens behind P virtual ones.
    config = with_prefix(ChatGLMConfig(**SMALL | {"num_layers": 1}), 16)
    one = Job(config, batch=1, length=64)
    linear, logits = 256 * (384 + 256 + 2064), 256 * 2048
    pairs = 64 * 16 + 64 * 65 // 2
    attention = 4 * 8 * 32 * pairs
    assert flops_per_example(one) == 2 * 64 * 2 * (linear + logits) + 3 * attention
    again = Job(config, batch=1, length=64, gradient_checkpointing=True)
    assert flops_per_example(again) - flops_per_example(one) == 64 * 2 * linear + attention
    best, worst = seconds_per_1000_examples(one, 1e-3)
    assert 0 < best < 1000 * flops_per_example(one) / 1e9 / 0.5 < worst


def test_the_command_prints_all_parts(capsys):
    main(["--model", "chatglm3-6b", "--quantization_bit", "4", "--gradient_checkpointing", "--json", "--length", "256"])
    results = json.loads(capsys.readouterr().out)
    assert results["memory_per_gpu"].keys() == {
        "weights", "gathered", "prefix", "gradients", "optimizer", "activations", "logits", "total", "reserve",
    }  # fmt: skip
    assert results["fits"] == {"8": True, "12": True, "16": True, "24": True, "80": True}
    assert 3.5 * GIB < results["memory_per_gpu"]["weights"] < 4 * GIB
    main(["--model", "glm-4-9b", "--gpu_memory", "24", "--length", "256", "--batch", "1"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "weights of the base",
        "activations",
        "A GPU of 24 GiB: fits",
        "Trainable: 2,621,440",
        "not measured",
    ):
        assert words in shown


def test_the_table_names_a_batch_for_every_card(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", **SMALL}), "utf-8")
    main(["--model", str(tmp_path), "--table", "--length", "2048", "--gpu_memory", "4"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.count("|") for line in lines] == [3] * 6
    rows = dict(zip(["plain", "checkpointing"], lines[2:4], strict=True))
    batches = {name: int(line.split("|")[2]) for name, line in rows.items()}
    assert 0 < batches["plain"] < batches["checkpointing"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "chatglm3-6"], "did you mean chatglm3-6b"),
        (["--model", str(Path(__file__).parent)], "tests .*folder with a config.json"),
        (["--model", "chatglm3-6b", "--zero", "4"], "--zero .*0, 1, 2, 3.*'4'"),
        (["--model", "chatglm3-6b", "--tflops", "0"], "--tflops .*above 0.* 0"),
        (["--model", "chatglm3-6b", "--quantization_bit", "2"], "--quantization_bit .*0, 4, 8.*'2'"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert re.search(message, capsys.readouterr().err)
