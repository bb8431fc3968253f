"""Layers with a backward pass of their own compute what torch's do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from chatglm_ptuning.model import frozen_linear
from chatglm_ptuning.model.frozen_linear import apply_linear, linear, rounded_up
from chatglm_ptuning.model.rms_norm import RMSNorm
from chatglm_ptuning.model.rotary import rotate
from chatglm_ptuning.model.swiglu import SwiGLU
from chatglm_ptuning.prefix.dropout import dropout
from chatglm_ptuning.prefix.rotation import apply_rotary_pos_emb

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def prefers_onednn(monkeypatch):
    monkeypatch.setattr(frozen_linear, "_onednn_is_faster", lambda: True)


def value_and_gradient(function, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states = states.detach().requires_grad_()
    result = function(states)
    weights = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype)
    (grad,) = torch.autograd.grad(result, states, weights)
    return result, grad


def test_swiglu():
    fused = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = fused.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGLU.apply(fused), functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    norm = RMSNorm(24, eps=1e-5, dtype=dtype)
    nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(False)
    states = torch.randn(2, 5, 24, dtype=dtype)
    got = value_and_gradient(norm, states)
    assert "FrozenRMSNorm" in type(got[0].grad_fn).__name__
    expected = value_and_gradient(lambda x: functional.rms_norm(x, (24,), norm.weight, 1e-5), states)
    torch.testing.assert_close(got, expected)


def test_a_trained_rms_norm_has_a_gradient():
    norm = RMSNorm(8, eps=1e-5)
    norm(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(dtype):
    angles = torch.arange(6)[None, None, :, None] * torch.tensor([1.0, 0.1])
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    states = torch.randn(2, 6, 3, 8, dtype=dtype).transpose(1, 2)
    got = value_and_gradient(lambda x: rotate(x, cos, sin), states)
    expected = value_and_gradient(lambda x: apply_rotary_pos_emb(x, cos, sin), states)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(prefers_onednn, bias):
    layer = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    states = torch.randn(2, 7, 24)[..., ::2]
    got = value_and_gradient(lambda x: apply_linear(layer, x), states)
    assert "FrozenLinear" in type(got[0].grad_fn).__name__
    torch.testing.assert_close(got, value_and_gradient(layer, states))
    flat = states.flatten(0, 1)
    torch.testing.assert_close(linear(flat, layer.weight), flat @ layer.weight.T)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 17, 300, 2100])
def test_any_number_of_rows(prefers_onednn, rows):
    layer, states = nn.Linear(12, 20).requires_grad_(False), torch.randn(rows, 12)
    torch.testing.assert_close(value_and_gradient(lambda x: apply_linear(layer, x), states),
                               value_and_gradient(layer, states))  # fmt: skip


def test_numbers_of_rows_are_rounded_to_few():
    """oneDNN keeps kernels of about 0.6 MB for every number that it has seen."""
    numbers = [rounded_up(rows) for rows in range(1, 8193)]
    assert len(set(numbers)) < 80
    assert all(rows <= number <= max(rows + 15, rows * 1.25) for rows, number in enumerate(numbers, start=1))


@needs_onednn
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.requires_grad_(True),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.to(torch.float64),
        lambda layer: setattr(layer, "__class__", type("Adapted", (nn.Linear,), {})),
    ],
    ids=["trained", "with a hook", "in another dtype", "of another class"],
)
def test_other_layers_are_called(prefers_onednn, change):
    layer = nn.Linear(4, 6).requires_grad_(False)
    change(layer)
    result = apply_linear(layer, torch.randn(3, 4, dtype=layer.weight.dtype, requires_grad=True))
    assert "FrozenLinear" not in type(result.grad_fn).__name__


@needs_onednn
def test_autocast_is_left_to_torch(prefers_onednn):
    layer, states = nn.Linear(4, 6).requires_grad_(False), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_linear(layer, states).dtype == torch.bfloat16
    assert apply_linear(layer, states).dtype == torch.float32


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.75])
def test_dropout_keeps_the_mean(rate):
    states = torch.full((3, 100_001), 2.0, requires_grad=True)
    dropped = dropout(states, rate)
    zeros = (dropped == 0).float().mean().item()
    assert abs(zeros - rate) < 0.01
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - rate)), rtol=1e-4, atol=0)
    dropped.sum().backward()
    torch.testing.assert_close(states.grad, dropped / 2)


def test_dropout_follows_the_seed():
    states = torch.ones(5, 7)
    first, second = (torch.manual_seed(3) and dropout(states, 0.5) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, dropout(states, 0.5))
