"""`chatglm-ptuning estimate`: memory and time of a training run, before any weight is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from transformers.utils import logging

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.estimation.memory import (
    GIB,
    RESERVE,
    count_parameters,
    estimate_memory,
    flops_per_example,
    largest_batches,
    seconds_per_1000_examples,
    with_prefix,
)
from chatglm_ptuning.estimation.simulation import Job
from chatglm_ptuning.estimation.sizes import find_config
from chatglm_ptuning.tables import Table

CARDS = (8, 12, 16, 24, 80)
"""Memory of the GPUs that are compared by default, in GiB."""
_PART_NAMES = {
    "weights": "weights of the base",
    "gathered": "gathered by ZeRO-3",
    "prefix": "prefix (float32)",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer (AdamW, float32)",
    "activations": "activations",
    "logits": "logits and loss",
    "total": "total",
}
_WAYS = {
    "no memory saving": {},
    "`--gradient_checkpointing`": {"gradient_checkpointing": True},
    "`--quantization_bit 8 --gradient_checkpointing`": {"gradient_checkpointing": True, "quantization_bit": 8},
    "`--quantization_bit 4 --gradient_checkpointing`": {"gradient_checkpointing": True, "quantization_bit": 4},
}


@dataclass
class EstimateArguments:
    """Flags of the command."""

    model: str = field(metadata={"help": "a folder with a config.json, or a known size such as chatglm3-6b, glm-4-9b"})
    pre_seq_len: int = field(default=128, metadata={"help": "number of virtual tokens"})
    prefix_projection: bool = field(default=False, metadata={"help": "train the prefix through a two-layer MLP"})
    batch: int = field(default=4, metadata={"help": "rows per GPU and step (per_device_train_batch_size)"})
    length: int = field(default=1024, metadata={"help": "tokens of a row: source and target together"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute layers in the backward pass"})
    quantization_bit: Literal[0, 4, 8] | None = field(
        default=None, metadata={"help": "quantise the base model to 4 or 8 bits (bitsandbytes)"}
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(default="bfloat16", metadata={"help": "dtype of the base"})
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = field(
        default="sdpa", metadata={"help": "attention implementation (flash_attention_2 takes the same as sdpa)"}
    )
    zero: Literal[0, 1, 2, 3] = field(default=0, metadata={"help": "DeepSpeed's ZeRO stage"})
    gpus: int = field(default=1, metadata={"help": "number of GPUs that train together"})
    gpu_memory: float | None = field(
        default=None, metadata={"help": f"memory of the GPU in GiB (default: {', '.join(map(str, CARDS))})"}
    )
    tflops: float = field(default=100.0, metadata={"help": "peak 10^12 operations per second of one GPU in this dtype"})
    json: bool = field(default=False, metadata={"help": "print JSON instead of tables"})
    table: bool = field(
        default=False, metadata={"help": "print the largest batch for each GPU and way of saving memory, as Markdown"}
    )

    def __post_init__(self) -> None:
        for name in ("pre_seq_len", "batch", "length", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gpu_memory", "tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be above 0, got {value}")

    @property
    def cards(self) -> tuple[float, ...]:
        """Memory of the GPUs in GiB."""
        return CARDS if self.gpu_memory is None else (self.gpu_memory,)

    def job(self) -> Job:
        """The run that the flags describe.

        Raises:
            ValueError: if the model is unknown, or the sizes do not fit together.
        """
        return Job(
            config=with_prefix(find_config(self.model), self.pre_seq_len, self.prefix_projection),
            batch=self.batch,
            length=self.length,
            dtype=getattr(torch, self.dtype),
            gradient_checkpointing=self.gradient_checkpointing,
            quantization_bit=self.quantization_bit or None,
            attn_implementation=self.attn_implementation,
            zero=self.zero,
            gpus=self.gpus,
        )


def estimate(args: EstimateArguments) -> dict[str, Any]:
    """The estimate that the command prints: bytes, seconds and operations.

    Raises:
        ValueError: as `EstimateArguments.job`.
    """
    job = args.job()
    parameters, memory = count_parameters(job.config), estimate_memory(job)
    return {
        "settings": {name: value for name, value in asdict(args).items() if name not in ("json", "table")},
        "parameters": {
            "base": parameters.base,
            "trainable": parameters.prefix,
            "trainable_share": parameters.prefix / (parameters.base + parameters.prefix),
        },
        "memory_per_gpu": {**asdict(memory), "total": memory.total, "reserve": RESERVE},
        "flops_per_example": flops_per_example(job),
        "seconds_per_1000_examples": list(seconds_per_1000_examples(job, args.tflops)),
        "fits": {f"{card:g}": memory.total + RESERVE <= card * GIB for card in args.cards},
    }


def print_estimate(results: Mapping[str, Any]) -> None:
    """Prints an estimate as a table and sentences."""
    settings, memory = results["settings"], results["memory_per_gpu"]
    title = f"Memory per GPU: {settings['model']}, {settings['batch']} x {settings['length']} tokens"
    shown = [part for part in _PART_NAMES if memory[part] or part != "gathered"]
    Table(["part", "GiB"], [[_PART_NAMES[part], f"{memory[part] / GIB:.2f}"] for part in shown], title).show()
    parameters = results["parameters"]
    best, worst = results["seconds_per_1000_examples"]
    lines = [
        f"Trainable: {parameters['trainable']:,} of {parameters['base'] + parameters['trainable']:,} parameters "
        f"({parameters['trainable_share']:.4%}).",
        f"Operations: {results['flops_per_example'] / 1e12:.2f} TFLOP per example; 1,000 examples take {_time(best)} "
        f"to {_time(worst)} on {settings['gpus']} x {settings['tflops']:g} TFLOP/s.",
    ]
    for card, fits in results["fits"].items():
        left = float(card) - (memory["total"] + RESERVE) / GIB
        verdict = f"fits, {left:.1f} GiB left" if fits else f"does not fit, {-left:.1f} GiB too much"
        lines.append(f"A GPU of {card} GiB: {verdict} (with {RESERVE / GIB:g} GiB for CUDA itself).")
    lines.append("Computed, not measured on a GPU.")
    print("\n".join(lines))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def batch_table(args: EstimateArguments) -> str:
    """The largest batch on each GPU, as a Markdown table with a row for each way of saving memory."""
    job = args.job()
    rows = []
    for title, way in _WAYS.items():
        batches = largest_batches(replace(job, **way), [int(card * GIB) for card in args.cards])
        rows.append([title, *(str(batch or "-") for batch in batches)])
    headings = [f"{args.model}, rows of {args.length} tokens", *(f"{card:g} GB" for card in args.cards)]
    return Table(headings, rows).markdown()


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning estimate",
        "Estimate memory and time of training a prefix, without weights.",
        (EstimateArguments,),
        argv,
    )
    logging.set_verbosity_error()
    try:
        if args.table:
            print(batch_table(args))
            return
        results = estimate(args)
    except (ValueError, OSError) as error:
        fail(str(error))
    if args.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    else:
        print_estimate(results)
