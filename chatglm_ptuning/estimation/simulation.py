"""The memory of one training step, measured by running the model itself on fake tensors (sizes without contents)."""

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
"""Every layer but the first takes the same memory, so two short models give that of any number of layers."""


@dataclass(frozen=True)
class Job:
    """A training run whose memory and time are estimated.

    Attributes:
        config: of the base, with `pre_seq_len`.
        batch: rows of a forward and backward pass, packed.
        length: tokens of a row, without the prefix; all but the first are learned.
        dtype: of the base, and of the computation with a quantised base.
        quantization_bit: 8 or 4 for layers of bitsandbytes.
        zero: DeepSpeed's stage, 0 to 3.
    """

    config: ChatGLMConfig
    batch: int = 4
    length: int = 1024
    dtype: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = False
    quantization_bit: int | None = None
    attn_implementation: str = "sdpa"
    zero: int = 0
    gpus: int = 1


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a training step, without weights, prefix, gradients and optimizer.

    Attributes:
        activations: kept for the backward pass, and the temporary tensors of a layer.
        logits: behind the final norm: the logits that exist at a time, their float32 copies, and the gradient.
    """

    activations: int
    logits: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the live tensors that operations inside it create.

    Attributes:
        now: live bytes.
        peak: the most live bytes at one time, and how many of these are `late`.
        late: set while the output layer and the loss create tensors.
    """

    def __init__(self, ignored: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = (0, 0)
        self.late = False
        self._late_now = 0
        self._sizes = {tensor.untyped_storage()._cdata: (0, False) for tensor in ignored}
        self._ignored = list(ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operation and counts the tensors that it creates."""
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
    """Creates and keeps the tensors that bitsandbytes' products create and keep."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.weight = weight
        if bits == 8:  # computes in integers, and keeps its input
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


def step_memory(job: Job) -> StepMemory:
    """The peak memory of one training step.

    Nothing is computed and no weights are read: a model of a few layers runs its forward and backward pass on fake
    tensors. The working space of GPU kernels and the fragmentation of the allocator are not included. The flash
    attention implementations take what "sdpa" takes.
    """
    shorter, longer = (_run(job, layers) for layers in _LAYERS)
    beyond = job.config.num_layers - _LAYERS[1]
    # A model of one layer is below the extrapolation's range; the sum is at least what the loss takes.
    return StepMemory(
        max(0, longer.activations + beyond * (longer.activations - shorter.activations)),
        longer.logits + beyond * (longer.logits - shorter.logits),
    )


def _run(job: Job, num_layers: int) -> StepMemory:
    config = deepcopy(job.config)
    config.num_layers = num_layers
    attention = "eager" if job.attn_implementation == "eager" else "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=job.dtype, attn_implementation=attention).train()
        if job.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if job.quantization_bit:
            for name, module in list(model.named_modules()):
                if name.endswith(PACKED_LAYERS):
                    model.set_submodule(name, _QuantizedLinear(module, job.quantization_bit))
        ids = torch.zeros(1, job.batch * job.length, dtype=torch.long)
        supervised = torch.arange(1, job.batch * (job.length - 1) + 1)
        live = LiveBytes([*model.parameters(), *model.buffers()])
        _watch_loss(model, live)
        with live:
            model(
                input_ids=ids,
                labels=ids,
                sequence_lengths=[job.length] * job.batch,
                supervised_positions=supervised,
                skip_logits=True,
            ).loss.backward()
    peak, late = live.peak
    return StepMemory(peak - late, late)


def _watch_loss(model: nn.Module, live: LiveBytes) -> None:
    """Marks as late the tensors created behind the final norm, to the end of the backward pass up to there."""

    def begins(module: nn.Module, inputs: tuple[torch.Tensor, ...], states: torch.Tensor) -> None:
        live.late = True
        states.register_hook(ends)

    def ends(gradient: torch.Tensor) -> None:
        live.late = False

    model.base_model.encoder.final_layernorm.register_forward_hook(begins)
