"""The memory of one training step, found by running the model itself on tensors that have sizes and no contents."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.packed_weights import PACKED_LAYERS

_LAYERS = (3, 4)
"""Every layer takes the same memory, but the first; so two short models tell what one of any length takes."""


@dataclass(frozen=True)
class StepMemory:
    """What a training step holds when it holds most, beside weights, prefix, gradients and optimizer; in bytes.

    Attributes:
        activations: kept for the backward pass, with the temporary tensors of a layer.
        logits: made from the output layer on: logits, their copies in float32 for the loss, their gradients.
    """

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.activations + self.logits


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make inside of it, while they live.

    Attributes:
        now: bytes alive.
        peak: the most of them at one time, and how many of these were `late` ones.
    """

    def __init__(self, ignored: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = (0, 0)
        self.late = False
        """Set while what is made belongs to the output layer and the loss."""
        self._late_now = 0
        self._sizes = {tensor.untyped_storage()._cdata: (0, False) for tensor in ignored}
        self._ignored = list(ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operation and counts what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = (size, self.late)
        self.now += size
        self._late_now += size if self.late else 0
        self.peak = max(self.peak, (self.now, self._late_now))
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, late = self._sizes.pop(key)
        self.now -= size
        self._late_now -= size if late else 0


class _QuantizedProduct(torch.autograd.Function):
    """Makes and keeps the tensors that bitsandbytes' products make and keep."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.weight = weight
        if bits == 8:  # is computed in integers, and keeps its input
            ctx.states = states
            integers = states.to(torch.float16).to(torch.int8)
            return states.new_empty(*integers.shape[:-1], weight.shape[0])
        return nn.functional.linear(states, torch.empty_like(weight))  # de-quantises the whole weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ torch.empty_like(ctx.weight), None, None


class _QuantizedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        product = _QuantizedProduct.apply(states, self.weight, self.bits)
        return product if self.bias is None else product + self.bias


def step_memory(
    config: ChatGLMConfig,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    quantization_bit: int | None = None,
    attn_implementation: str = "sdpa",
) -> StepMemory:
    """The peak of one training step of `batch` rows of `length` tokens, the prefix not counted in the length.

    Nothing is computed and no weights are read: a model of a few layers runs its forward and backward pass on fake
    tensors. What a GPU's kernels take as working space, and what the allocator loses, is not in it.

    Args:
        config: with `pre_seq_len`.
        dtype: of the base.
        quantization_bit: 8 or 4 for layers of bitsandbytes.
        attn_implementation: "eager" or "sdpa"; the flash implementations take what "sdpa" takes.
    """
    shorter, longer = (
        _run(config, layers, batch, length, dtype, gradient_checkpointing, quantization_bit, attn_implementation)
        for layers in _LAYERS
    )
    beyond = config.num_layers - _LAYERS[1]
    # A model of one layer has no layer like the others; the sum is never below what the loss takes.
    return StepMemory(
        max(0, longer.activations + beyond * (longer.activations - shorter.activations)),
        longer.logits + beyond * (longer.logits - shorter.logits),
    )


def _run(
    config: ChatGLMConfig,
    num_layers: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    quantization_bit: int | None,
    attn_implementation: str,
) -> StepMemory:
    config = deepcopy(config)
    config.num_layers = num_layers
    attention = "eager" if attn_implementation == "eager" else "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if quantization_bit:
            for name, module in list(model.named_modules()):
                if name.endswith(PACKED_LAYERS):
                    model.set_submodule(name, _QuantizedLinear(module, quantization_bit))
        ids = torch.zeros(batch, length, dtype=torch.long)
        mask = torch.ones(batch, length, dtype=torch.long)
        live = LiveBytes([*model.parameters(), *model.buffers()])
        _watch_loss(model, live)
        with live:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    peak, late = live.peak
    return StepMemory(peak - late, late)


def _watch_loss(model: nn.Module, live: LiveBytes) -> None:
    """Marks as late what is made between the output layer's start and its end in the backward pass."""

    def begins(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        live.late = True
        inputs[0].register_hook(ends)

    def ends(gradient: torch.Tensor) -> None:
        live.late = False

    model.get_output_embeddings().register_forward_pre_hook(begins)
