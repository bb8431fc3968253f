"""A rehearsal at true width: a random base in the published layout is written, loaded, trained, saved and used.

`scripts/rehearse.sh` runs each stage in its own process, so that each prints its own peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.estimation.sizes import find_config
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.loading import load_model

SHARD_BYTES = 1_990_000_000
"""Gives seven files for 6 billion parameters, as published."""
_BLOCK_NUMBERS = 2**22
_STEPS = 3
_PRE_SEQ_LEN = 16
_ROWS, _LENGTH = 2, 64


@dataclass
class RehearsalArguments:
    """Flags of the program."""

    folder: str = field(metadata={"help": "where the base is written and read"})
    stage: Literal["build", "load", "train"] = field(metadata={"help": "the stage to run"})
    model: str = field(default="chatglm3-6b", metadata={"help": "the size, as for `chatglm-ptuning estimate`"})
    num_layers: int | None = field(default=None, metadata={"help": "build: use fewer layers"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the files and in memory"})


def build_base(folder: Path, config: ChatGLMConfig, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a base of random weights as `pytorch_model-0000X-of-0000N.bin` with an index; one shard is in memory.

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
    block = torch.randn(_BLOCK_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
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
    """Ones for a norm; for a matrix the repeated block, rotated by an offset that depends on the seed."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    start = (seed * 1_000_003) % block.numel()
    turned = torch.cat((block[start:], block[:start]))
    repeats = -(-shape.numel() // block.numel())
    return turned.repeat(repeats)[: shape.numel()].view(shape).clone()


def load_base(folder: Path, dtype: str) -> dict[str, Any]:
    """Loads a base and reads all of its weights; returns their bytes and the seconds of loading."""
    start = time.monotonic()
    model = load_model(str(folder), dtype=dtype)
    loaded = time.monotonic() - start
    for parameter in model.parameters():
        # Reads one byte of every page, so that memory-mapped weights count as memory too.
        parameter.detach().flatten().view(torch.uint8)[:: resource.getpagesize()].max()
    return {"weights": sum(parameter.nbytes for parameter in model.parameters()), "load_seconds": round(loaded, 1)}


def train_and_reload(folder: Path, dtype: str) -> dict[str, Any]:
    """Trains a prefix for three steps, saves it, reloads base and prefix, and generates.

    Raises:
        AssertionError: if the reloaded prefix gives other logits than the trained one.
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
    assert torch.equal(before, after), "the reloaded prefix gives other logits than the trained one"
    tokens = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False, eos_token_id=-1)
    return {"losses": losses, "seconds_per_step": seconds, "tokens": tokens[0, 8:].tolist()}


def run_stage(args: RehearsalArguments) -> dict[str, Any]:
    """Runs one stage; returns its numbers.

    Raises:
        ValueError, OSError: if the model is unknown, or the folder cannot be written or read.
    """
    folder = Path(args.folder)
    if args.stage == "load":
        return load_base(folder, args.dtype)
    if args.stage == "train":
        return train_and_reload(folder, args.dtype)
    config = find_config(args.model)
    config.num_layers = args.num_layers or config.num_layers
    return {"weights": build_base(folder, config, getattr(torch, args.dtype))}


def main(argv: Sequence[str]) -> None:
    """Runs one stage; prints its numbers, its time and its peak memory as JSON."""
    (args,) = parse_arguments(
        "python scripts/rehearsal.py",
        "Run one stage of a rehearsal at true width.",
        (RehearsalArguments,),
        argv,
    )
    start = time.monotonic()
    try:
        results = run_stage(args)
    except (ValueError, OSError) as error:
        fail(str(error))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results |= {"stage": args.stage, "seconds": round(time.monotonic() - start, 1), "peak_memory": peak}
    if "weights" in results:
        results["peak_over_weights"] = round(peak / results["weights"], 3)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
