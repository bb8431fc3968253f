"""`chatglm-ptuning estimate`: what a run takes on a GPU, before any weight is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.estimation.memory import (
    GIB,
    RESERVE,
    Job,
    Memory,
    count_parameters,
    estimate_memory,
    flops_per_example,
    largest_batch,
    seconds_per_1000_examples,
    with_prefix,
)
from chatglm_ptuning.estimation.sizes import find_config
from chatglm_ptuning.model.quantization import check_quantization

CARDS = (8, 12, 16, 24, 80)
"""GPUs that are asked for when none is named, in GiB."""
_PART_NAMES = {
    "weights": "weights of the base",
    "gathered": "gathered by ZeRO-3",
    "prefix": "prefix (float32)",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer (AdamW, float32)",
    "activations": "activations",
    "logits": "logits and loss",
}
_WAYS = {
    "as it is": {},
    "`--gradient_checkpointing`": {"gradient_checkpointing": True},
    "`--quantization_bit 8 --gradient_checkpointing`": {"gradient_checkpointing": True, "quantization_bit": 8},
    "`--quantization_bit 4 --gradient_checkpointing`": {"gradient_checkpointing": True, "quantization_bit": 4},
}


@dataclass
class EstimateArguments:
    """Flags of the command."""

    model: str = field(metadata={"help": "a folder with a config.json, or a known size such as chatglm3-6b, glm-4-9b"})
    pre_seq_len: int = field(default=128, metadata={"help": "number of virtual tokens"})
    prefix_projection: bool = field(default=False, metadata={"help": "the prefix is made by a two-layer MLP"})
    batch: int = field(default=4, metadata={"help": "rows per GPU and step (per_device_train_batch_size)"})
    length: int = field(default=1024, metadata={"help": "tokens of a row: source and target together"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute layers in the backward pass"})
    quantization_bit: int | None = field(default=None, metadata={"help": "8 or 4: base through bitsandbytes"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the base: bfloat16, float16, float32"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa (flash takes the same) or eager"})
    zero: int = field(default=0, metadata={"help": "DeepSpeed's ZeRO stage: 0, 1, 2, 3"})
    gpus: int = field(default=1, metadata={"help": "GPUs that train together"})
    gpu_memory: float | None = field(
        default=None, metadata={"help": f"GiB of the GPU that is to hold it (default: {', '.join(map(str, CARDS))})"}
    )
    tflops: float = field(default=100.0, metadata={"help": "peak 10^12 operations per second of one GPU in this dtype"})
    json: bool = field(default=False, metadata={"help": "print JSON instead of tables"})
    table: bool = field(
        default=False, metadata={"help": "print as Markdown the largest batch on each GPU, by ways of saving memory"}
    )

    def __post_init__(self) -> None:
        for name in ("pre_seq_len", "batch", "length", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gpu_memory", "tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be above 0, got {value}")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"--zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"--dtype must be bfloat16, float16 or float32, got {self.dtype!r}")
        if self.attn_implementation not in ("sdpa", "eager", "flash_attention_2"):
            raise ValueError(f"--attn_implementation must be sdpa, eager or flash_attention_2, got "
                             f"{self.attn_implementation!r}")  # fmt: skip
        check_quantization(self.quantization_bit, "nf4")

    @property
    def cards(self) -> tuple[float, ...]:
        """GiB of the GPUs that are asked for."""
        return CARDS if self.gpu_memory is None else (self.gpu_memory,)


def job_of(args: EstimateArguments) -> Job:
    """What the flags ask for.

    Raises:
        ValueError: if the model is not known, or the sizes do not fit together.
    """
    return Job(
        config=with_prefix(find_config(args.model), args.pre_seq_len, args.prefix_projection),
        batch=args.batch,
        length=args.length,
        dtype=getattr(torch, args.dtype),
        gradient_checkpointing=args.gradient_checkpointing,
        quantization_bit=args.quantization_bit or None,
        attn_implementation=args.attn_implementation,
        zero=args.zero,
        gpus=args.gpus,
    )


def estimate(args: EstimateArguments) -> dict[str, Any]:
    """All that the command knows about a job; bytes, seconds and operations."""
    job = job_of(args)
    parameters, memory = count_parameters(job.config), estimate_memory(job)
    return {
        "settings": {name: value for name, value in asdict(args).items() if name not in ("json", "table")},
        "parameters": {
            "base": parameters.base,
            "trainable": parameters.prefix,
            "trainable_share": parameters.trainable_share,
        },
        "memory_per_gpu": {**asdict(memory), "total": memory.total, "reserve": RESERVE},
        "flops_per_example": flops_per_example(job),
        "seconds_per_1000_examples": list(seconds_per_1000_examples(job, args.tflops)),
        "fits": {f"{card:g}": memory.total + RESERVE <= card * GIB for card in args.cards},
    }


def print_estimate(results: dict[str, Any], memory: Memory) -> None:
    """Prints the estimate for a reader."""
    console, settings = Console(), results["settings"]
    table = Table(
        "part", title=f"Memory per GPU: {settings['model']}, {settings['batch']} x {settings['length']} tokens"
    )
    table.add_column("GiB", justify="right")
    for part, title in _PART_NAMES.items():
        if getattr(memory, part) or part != "gathered":
            table.add_row(title, f"{getattr(memory, part) / GIB:.2f}")
    table.add_section()
    table.add_row("total", f"{memory.total / GIB:.2f}")
    console.print(table)
    parameters = results["parameters"]
    best, worst = results["seconds_per_1000_examples"]
    lines = [
        f"Trainable: {parameters['trainable']:,} of {parameters['base'] + parameters['trainable']:,} parameters "
        f"({parameters['trainable_share']:.4%}).",
        f"Arithmetic: {results['flops_per_example'] / 1e12:.2f} TFLOP per example; 1,000 examples take {_time(best)} "
        f"to {_time(worst)} on {settings['gpus']} x {settings['tflops']:g} TFLOP/s.",
    ]
    for card, fits in results["fits"].items():
        left = float(card) - (memory.total + RESERVE) / GIB
        verdict = f"fits, {left:.1f} GiB left" if fits else f"does not fit, {-left:.1f} GiB too much"
        lines.append(f"A GPU of {card} GiB: {verdict} (with {RESERVE / GIB:g} GiB for CUDA itself).")
    lines.append("Computed, not measured on a GPU.")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def batch_table(args: EstimateArguments) -> str:
    """The largest batch on each GPU, as a Markdown table with a row for each way of saving memory."""
    job, cards = job_of(args), args.cards
    lines = [
        f"| {args.model}, rows of {args.length} tokens | " + " | ".join(f"{card:g} GB" for card in cards) + " |",
        "|---|" + "---:|" * len(cards),
    ]
    for title, way in _WAYS.items():
        batches = [largest_batch(replace(job, **way), int(card * GIB)) for card in cards]
        lines.append(f"| {title} | " + " | ".join(str(batch) if batch else "-" for batch in batches) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can mend end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning estimate",
        "Compute memory and time of training a prefix, without weights.",
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
        return
    parts = {name: value for name, value in results["memory_per_gpu"].items() if name in _PART_NAMES}
    print_estimate(results, Memory(**parts))
