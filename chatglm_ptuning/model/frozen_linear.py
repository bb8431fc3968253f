"""Frozen linear layers, computed by the library that is faster on this CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from chatglm_ptuning.model.zero3 import is_partitioned


def apply_linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`layer(states)`, in less time if this is a frozen linear layer.

    The layers keep torch's class, which quantisation and adapters look for.
    """
    if is_frozen_linear(layer) and _takes_onednn(states, layer.weight):
        return _FrozenLinear.apply(states, layer.weight, layer.bias)
    return layer(states)


def linear(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`states @ weight.T` outside of autograd: states `[rows, in_features]`, weight `[out_features, in_features]`."""
    if _takes_onednn(states, weight):
        return _onednn_linear(states, weight)
    return functional.linear(states, weight)


def is_frozen_linear(layer: nn.Module) -> bool:
    """Whether the weight can be used without calling the layer, whose hooks may gather or load it, or anything else."""
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
    if type(layer) is not nn.Linear or has_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return not any(parameter.requires_grad for parameter in parameters) and not is_partitioned(parameters)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _onednn_linear(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn_linear(grad, weight.t()), None, None


def rounded_up(rows: int) -> int:
    """The next number of rows for which there may be kernels already: oneDNN makes and keeps some for each number."""
    step = next(step for most, step in ((8, 1), (256, 16), (2048, 64), (rows, 256)) if rows <= most)
    return -(-rows // step) * step


def _onednn_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = states.shape[:-1].numel()
    filling = rounded_up(rows) - rows
    flat = functional.pad(states.reshape(rows, -1), (0, 0, 0, filling)) if filling else states
    try:
        product = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    except RuntimeError:  # oneDNN needs memory of its own, and does not say that it lacked some
        return functional.linear(states, weight, bias)
    return product[:rows].view(*states.shape[:-1], -1) if filling else product


def _takes_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch would take the slower library. Tensors of other classes (fake ones) are left to torch."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not _onednn_is_faster():
        return False
    if type(states) is not torch.Tensor or type(weight) not in (torch.Tensor, nn.Parameter):
        return False
    on_cpu = states.device.type == weight.device.type == "cpu"
    return on_cpu and states.dtype == weight.dtype == torch.float32 and states.numel() > 0


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether the library that torch calls in float32, MKL, does without AVX512: it does on AMD's CPUs.

    oneDNN takes less than half the time there.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD")
