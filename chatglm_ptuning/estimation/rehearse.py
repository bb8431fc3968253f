"""A dress rehearsal at true width: a random base in the published layout, loaded, trained on, saved and used.

`scripts/rehearse.sh` runs the stages one after the other, each in a process of its own, so that the peak memory that
each prints is its own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.estimation.sizes import find_config
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.loading import load_model

SHARD_BYTES = 1_990_000_000
"""Of the published files of 6 billion parameters, which are seven."""
_SEED_NUMBERS = 2**22
_STEPS = 3
_PRE_SEQ_LEN = 16
_ROWS, _LENGTH = 2, 64


@dataclass
class RehearsalArguments:
    """Flags of the program."""

    folder: str = field(metadata={"help": "where the base is written and read"})
    stage: str = field(metadata={"help": "build, load or train"})
    model: str = field(default="chatglm3-6b", metadata={"help": "the size, as for `chatglm-ptuning estimate`"})
    num_layers: int | None = field(default=None, metadata={"help": "build: fewer layers than it has"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the files and in memory"})

    def __post_init__(self) -> None:
        if self.stage not in _STAGES:
            raise ValueError(f"--stage must be {', '.join(_STAGES)}, got {self.stage!r}")


def build_base(folder: Path, config: ChatGLMConfig, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a base of random weights as `pytorch_model-0000X-of-0000N.bin` with an index, a shard in memory at a time.

    Returns:
        Bytes of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in names.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    block = torch.randn(_SEED_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        filled = {name: _random(tensor.shape, block, seed=len(weight_map) + i) for i, (name, tensor) in
                  enumerate(shard.items())}  # fmt: skip
        torch.save(filled, folder / file)
        del filled  # before the next ones are made
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total


def _random(shape: torch.Size, block: torch.Tensor, seed: int) -> torch.Tensor:
    """Norms of ones, and for a matrix the block again and again, from another place in each."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    start = (seed * 1_000_003) % block.numel()
    turned = torch.cat((block[start:], block[:start]))
    repeats = -(-shape.numel() // block.numel())
    return turned.repeat(repeats)[: shape.numel()].view(shape).clone()


def _build(folder: Path, args: RehearsalArguments) -> dict[str, Any]:
    config = find_config(args.model)
    config.num_layers = args.num_layers or config.num_layers
    return {"weights": build_base(folder, config, getattr(torch, args.dtype))}


def _load(folder: Path, args: RehearsalArguments) -> dict[str, Any]:
    start = time.monotonic()
    model = load_model(str(folder), dtype=args.dtype)
    loaded = time.monotonic() - start
    for parameter in model.parameters():
        # A byte of every page, so that weights that are only mapped come into memory as well.
        parameter.detach().flatten().view(torch.uint8)[:: resource.getpagesize()].max()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"weights": weights, "load_seconds": round(loaded, 1)}


def train_and_reload(folder: Path, dtype: str) -> dict[str, Any]:
    """Trains a prefix for three steps, saves it, loads base and prefix anew and generates.

    Raises:
        AssertionError: if the loaded prefix gives other logits than the trained one.
    """
    model = load_model(str(folder), pre_seq_len=_PRE_SEQ_LEN, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.padded_vocab_size, (_ROWS, _LENGTH), generator=generator)
    model.init_prefix_from_ids(ids[0, :_PRE_SEQ_LEN])
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    losses, seconds = [], []
    model.train()
    for _ in range(_STEPS):
        start = time.monotonic()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(round(time.monotonic() - start, 1))
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
    model.save_prefix(folder / "prefix")
    del model, optimizer, loss
    model = load_model(str(folder), dtype=dtype)
    model.load_prefix(folder / "prefix")
    with torch.no_grad():
        after = model(ids).logits
    assert torch.equal(before, after), "the loaded prefix gives other logits than the trained one"
    tokens = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False, eos_token_id=-1)
    return {"losses": losses, "seconds_per_step": seconds, "tokens": tokens[0, 8:].tolist()}


def _train(folder: Path, args: RehearsalArguments) -> dict[str, Any]:
    return train_and_reload(folder, args.dtype)


_STAGES = {"build": _build, "load": _load, "train": _train}


def main(argv: Sequence[str]) -> None:
    """Runs one stage and prints what came out, its time and its peak memory as JSON."""
    (args,) = parse_arguments(
        "python -m chatglm_ptuning.estimation.rehearse",
        "One stage of a dress rehearsal at true width.",
        (RehearsalArguments,),
        argv,
    )
    start = time.monotonic()
    try:
        results = _STAGES[args.stage](Path(args.folder), args)
    except (ValueError, OSError) as error:
        fail(str(error))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results |= {"stage": args.stage, "seconds": round(time.monotonic() - start, 1), "peak_memory": peak}
    if "weights" in results:
        results["peak_over_weights"] = round(peak / results["weights"], 3)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
