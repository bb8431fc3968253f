"""Memory per GPU, floating-point operations and time of training a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from chatglm_ptuning.estimation.simulation import Job, step_memory
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.packed_weights import PACKED_LAYERS

GIB = 2**30
RESERVE = int(0.75 * GIB)
"""About what CUDA's context, its libraries' working space and fragmentation take on a GPU."""
UTILISATION = (0.25, 0.55)
"""The share of a GPU's peak operations that training reaches, from a small batch or a slow setting to a good one."""
_ZERO3_LIVE_NUMBERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters
_ADAM_STATES = 2
_MANY_POSITIONS = 2**14
_FLOAT32 = 4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: those of the base that can be quantised (with their rows), the others, the prefix."""

    packed: int
    packed_rows: int
    other: int
    prefix: int

    @property
    def base(self) -> int:
        """All parameters of the base."""
        return self.packed + self.other


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step; gradients count in full, as when they accumulate.

    Attributes:
        gathered: with ZeRO-3, the parameters that are gathered on the GPU at one time.
        activations, logits: see `StepMemory`.
    """

    weights: int
    gathered: int
    prefix: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts together, without `RESERVE`."""
        return sum(vars(self).values())


def count_parameters(config: ChatGLMConfig) -> Parameters:
    """Counts the parameters of a base with its prefix on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    packed = packed_rows = other = prefix = 0
    for name, parameter in model.named_parameters():
        if "prefix_encoder." in name:
            prefix += parameter.numel()
        elif name.removesuffix(".weight").endswith(PACKED_LAYERS):
            packed += parameter.numel()
            packed_rows += parameter.shape[0]
        else:
            other += parameter.numel()
    return Parameters(packed, packed_rows, other, prefix)


def weight_bytes(parameters: Parameters, dtype: torch.dtype, quantization_bit: int | None) -> int:
    """Bytes of the base; with bitsandbytes, linear layers take 8 or 4 bits and the rest `dtype`."""
    plain = parameters.other * dtype.itemsize
    if quantization_bit == 8:
        return plain + parameters.packed + parameters.packed_rows * _FLOAT32
    if quantization_bit == 4:
        # A scale of one byte for 64 numbers, and one in float32 for 256 of these scales.
        return plain + int(parameters.packed * (0.5 + 1 / 64 + _FLOAT32 / (64 * 256)))
    return plain + parameters.packed * dtype.itemsize


def estimate_memory(job: Job) -> Memory:
    """Memory of one GPU, part by part.

    Weights, prefix, gradients (float32) and AdamW's two states (float32) are arithmetic; activations and logits come
    from `step_memory`. ZeRO partitions the optimizer states from stage 1 on, gradients from stage 2, and weights and
    prefix in stage 3.
    """
    parameters, step = count_parameters(job.config), step_memory(job)
    weights = weight_bytes(parameters, job.dtype, job.quantization_bit)
    prefix = parameters.prefix * _FLOAT32

    def share(stage: int, size: int) -> int:
        return -(-size // job.gpus) if job.zero >= stage else size

    gathered = 0
    if job.zero == 3 and job.gpus > 1:
        live = min(1.0, _ZERO3_LIVE_NUMBERS / (parameters.base + parameters.prefix))
        gathered = int(live * (weights + prefix) * (1 - 1 / job.gpus))
    return Memory(
        weights=share(3, weights),
        gathered=gathered,
        prefix=share(3, prefix),
        gradients=share(2, prefix),
        optimizer=share(1, _ADAM_STATES * prefix),
        activations=step.activations,
        logits=step.logits,
    )


def largest_batches(job: Job, gpu_memories: Sequence[int]) -> list[int]:
    """The largest number of rows per step that fits into each of some memories, in bytes; 0 where none does."""

    @cache
    def size(batch: int) -> int:
        return RESERVE + estimate_memory(replace(job, batch=batch)).total

    def largest(gpu_memory: int) -> int:
        if gpu_memory < size(1):
            return 0
        if gpu_memory >= size(many):
            return many + (gpu_memory - size(many)) * many // (size(2 * many) - size(many))
        low, high = 1, many
        while high - low > 1:  # by interpolation: a few parts are linear, so that it takes fewer steps than bisection
            guess = low + (gpu_memory - size(low)) * (high - low) // (size(high) - size(low))
            guess = min(max(guess, low + 1), high - 1)
            low, high = (guess, high) if size(guess) <= gpu_memory else (low, guess)
        return low

    # From here on the activations of all rows are the peak, and every further row takes the same.
    many = -(-_MANY_POSITIONS // job.length)
    return [largest(gpu_memory) for gpu_memory in gpu_memories]


def flops_per_example(job: Job) -> int:
    """Floating-point operations of training on one row.

    The frozen base needs no weight gradients, so the backward pass of a linear layer costs as much as its forward
    pass; checkpointing adds another forward pass through the layers. Attention costs `4 * heads * kv_channels` for
    each pair of a query and a visible key, and twice that backward.
    """
    config, tokens = job.config, job.length
    parameters = count_parameters(config)
    logits = 2 * tokens * config.hidden_size * config.padded_vocab_size
    seen = tokens * (config.pre_seq_len or 0) + tokens * (tokens + 1) // 2
    attention = 4 * config.num_attention_heads * config.kv_channels * seen * config.num_layers
    layers = 2 * tokens * parameters.packed
    projection = 0
    if config.prefix_projection:  # once per step: forward, and both gradients
        projection = 6 * config.pre_seq_len * 2 * config.prefix_shape.kv_size * config.hidden_size // job.batch
    again = layers + attention if job.gradient_checkpointing else 0
    return 2 * logits + 2 * layers + 3 * attention + again + projection


def seconds_per_1000_examples(job: Job, tflops: float) -> tuple[float, float]:
    """The best and the worst case on all GPUs together, each with a peak of `tflops` * 10^12 operations per second."""
    work = 1000 * flops_per_example(job) / (job.gpus * tflops * 1e12)
    return work / UTILISATION[1], work / UTILISATION[0]


def with_prefix(config: ChatGLMConfig, pre_seq_len: int, prefix_projection: bool = False) -> ChatGLMConfig:
    """The configuration of a base with a trainable prefix."""
    config = deepcopy(config)
    config.pre_seq_len, config.prefix_projection = pre_seq_len, prefix_projection
    config.validate_sizes()
    return config
