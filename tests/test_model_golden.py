"""The model gives the numbers that the original code gives (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from benchmarks.golden import FOLDER, Case, bundled_case
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

MORE = Path(__file__).parents[2] / "shared" / "golden"
ATTENTIONS = ("eager", "sdpa")


def _outside_case(folder: Path, tag: str, prefix: dict) -> Case:
    arrays = load_file(folder / "golden.safetensors")
    arrays = {name.replace(f".{tag}.", ".prefix."): value for name, value in arrays.items()}
    settings = {name: prefix[name] for name in ("pre_seq_len", "prefix_projection")}
    return Case(folder / "base", folder / prefix["dir"], settings, arrays)


OUTSIDE = {
    f"{path.parent.name}-{tag}": (path.parent, tag, prefix)
    for path in sorted(MORE.glob("official/*/meta.json"))
    for tag, prefix in json.loads(path.read_text())["prefixes"].items()
}


@pytest.fixture(scope="module", params=["official_p5", "official_p8_projection", *OUTSIDE])
def case(request, tmp_path_factory) -> Case:
    if request.param in OUTSIDE:
        return _outside_case(*OUTSIDE[request.param])
    return bundled_case(request.param, tmp_path_factory.mktemp(request.param))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to their largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("form", ["none", "folded", "trainable"])
@torch.no_grad()
def test_logits_and_greedy_tokens(case, attention, form):
    model = case.load(attention, trainable=form == "trainable")
    if form == "folded":
        model.load_prefix(case.prefix)
    tag = "none" if form == "none" else "prefix"
    rows = case.arrays["plain.input_ids"]
    if f"plain.{tag}.logits" in case.arrays:
        assert difference(model(rows).logits, case.arrays[f"plain.{tag}.logits"]) < 1e-4
    expected = case.arrays[f"plain.{tag}.greedy_tokens"]
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        answer = model.generate(rows, max_new_tokens=expected.shape[1], do_sample=False, **settings)
        assert torch.equal(answer[:, rows.shape[1] :], expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("trainable", [False, True])
@torch.no_grad()
def test_losses(case, attention, trainable):
    model = case.load(attention, trainable)
    tag = "prefix" if trainable else "none"
    assert abs(model(**case.rows).loss - case.arrays[f"train_right.{tag}.loss_batch"]) < 1e-5
    for row, expected in enumerate(case.arrays[f"train_right.{tag}.loss_per_example"]):
        alone = {name: value[row : row + 1] for name, value in case.rows.items()}
        assert abs(model(**alone).loss - expected) < 1e-5


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients(case, attention, reentrant):
    model = case.load(attention, trainable=True).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**case.rows).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    start = "train_right.prefix.grad."
    expected = {name.removeprefix(start): value for name, value in case.arrays.items() if name.startswith(start)}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < 1e-5, name


def test_eight_steps_of_adamw(case):
    model = case.load(trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = model(**case.rows).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(model(**case.rows).loss.item())
    assert losses == pytest.approx(case.arrays["train_right.prefix.adamw8_losses"].tolist(), abs=3e-3)
    start = "train_right.prefix.adamw8_final."
    for name, expected in case.arrays.items():
        if name.startswith(start):
            assert (model.get_parameter(name.removeprefix(start)) - expected).abs().max() < 3e-3


_FILES = [*sorted(FOLDER.glob("chatglm_cpp_*.npz")), *sorted(MORE.glob("*.npz"))]
CHATGLM_CPP = {f"{path.parent.parent.name}-{path.stem}": (path, "", "_f32") for path in _FILES}
CHATGLM_CPP |= {f"{name}-rounded": (case[0], "", "") for name, case in CHATGLM_CPP.items() if "ptuning" in name}
CHATGLM_CPP["tests-chatglm_cpp_glm4"] = (FOLDER / "chatglm_cpp_glm3.npz", "glm4.", "_f32")


@pytest.mark.parametrize(("path", "variant", "precision"), CHATGLM_CPP.values(), ids=CHATGLM_CPP.keys())
@torch.no_grad()
def test_hidden_states_of_chatglm_cpp(path, variant, precision, tmp_path):
    arrays = dict(np.load(path))
    arrays |= {
        name.removeprefix(variant): value for name, value in arrays.items() if variant and name.startswith(variant)
    }
    prefix = arrays.get(f"prefix_past_key_values{precision}")
    fields = {
        name.removeprefix("config."): value.item() for name, value in arrays.items() if name.startswith("config.")
    }
    fields.pop("pre_seq_len")
    config = ChatGLMConfig(**fields, multi_query_attention=True, add_qkv_bias=True)
    weights = {name: torch.from_numpy(value) for name, value in arrays.items() if name.startswith("transformer.")}
    weights["transformer.output_layer.weight"] = torch.zeros(5, 32)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).transformer
    if prefix is not None:
        flat = torch.from_numpy(prefix).float().permute(2, 0, 1, 3).flatten(1)
        torch.save({"transformer.prefix_encoder.embedding.weight": flat}, tmp_path / "prefix.bin")
        model.load_prefix(tmp_path / "prefix.bin")

    allowed = 5e-6 if precision else 3e-4
    steps = [f"step{number}" for number in (1, 2, 3)]
    expected = [torch.from_numpy(arrays[f"{step}.last_hidden_state"]) for step in steps]
    token_ids = [torch.from_numpy(arrays[f"{step}.input_ids"])[None] for step in steps]
    cache = DynamicCache(config=config)
    for step, ids, states in zip(steps, token_ids, expected, strict=True):
        positions = torch.from_numpy(arrays[f"{step}.position_ids"])[None]
        output = model(ids, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
        assert (output[0] - states).abs().max() < allowed
    whole = model(torch.cat(token_ids, dim=1)).last_hidden_state
    assert (whole[0] - torch.cat(expected)).abs().max() < allowed


def test_bundled_files_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
