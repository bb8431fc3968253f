"""The bases that are measured, and the rows that they train on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from chatglm_ptuning.data.collate import IGNORED_LABEL
from chatglm_ptuning.estimation.sizes import find_config
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.sampler import EpochSampler

Row = dict[str, list[int]]
"""A training row: `input_ids` and `labels`."""
NANO = Path(__file__).resolve().parents[1] / "data" / "chatglm-nano"
PADDED_LENGTH = 193
"""Of every row of the official recipe on AdvertiseGen: `max_source_length` 64, `max_target_length` 128, and 1."""
_FIRST_ID = 3  # the ids before are special
_BLOCK_NUMBERS = 2**22
_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """A base to measure.

    Attributes:
        name: in the tables.
        config: makes the sizes of the base.
        folder: of the weights; None for random ones.
        rounds: how often every side is timed.
        warm_ups: how often before, without a clock.
        steps: optimizer steps in a round.
        batch: examples in a step.
        memory_batch: examples in the step whose memory is measured.
        prefix: `pre_seq_len`.
        chats: long conversations; a multiple of `batch`.
        chats_at_once: padded conversations in a pass, for which there is memory.
        generated: new tokens in a round of generation.
    """

    name: str
    config: Callable[[], ChatGLMConfig]
    folder: Path | None = None
    rounds: int = 3
    warm_ups: int = 1
    steps: int = 1
    batch: int = 16
    memory_batch: int = 16
    prefix: int = 128
    chats: int = 32
    chats_at_once: int = 4
    generated: int = 32


def random_base(**sizes: int) -> Callable[[], ChatGLMConfig]:
    """Makes a configuration of these sizes, else as ChatGLM3's."""
    common = {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "seq_length": 4096}
    return lambda: ChatGLMConfig(**common | sizes)


def _six_b(**changes: int) -> ChatGLMConfig:
    config = find_config("chatglm3-6b")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", lambda: ChatGLMConfig.from_pretrained(NANO), NANO, rounds=7, steps=2, chats_at_once=16),
        Shape("M", random_base(num_layers=8, padded_vocab_size=65024, hidden_size=512, ffn_hidden_size=1368,
                                kv_channels=64, num_attention_heads=8)),
        Shape("W", lambda: _six_b(num_layers=2), rounds=3, warm_ups=0, batch=4),
        Shape("G", _six_b, rounds=5, steps=2),
        Shape("tiny", random_base(num_layers=2, padded_vocab_size=96, hidden_size=32, ffn_hidden_size=48,
                                   kv_channels=8, num_attention_heads=4),
              rounds=2, batch=3, memory_batch=3, prefix=4, chats=6, chats_at_once=3, generated=2),
    )
}  # fmt: skip
"""S, M and W are for a CPU, S and G for a GPU; "tiny" is for the tests of this benchmark."""


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype, **settings: Any) -> Any:
    """The base with an untrained prefix, frozen as in training, in training mode.

    Random weights are made on the device, without a second copy.

    Args:
        settings: further fields of the configuration.
    """
    settings = {"pre_seq_len": shape.prefix, "prefix_projection": False} | settings
    if shape.folder is not None:
        model = ChatGLMForConditionalGeneration.from_pretrained(shape.folder, dtype=dtype, **settings)
        return model.to(device).train()
    config = shape.config()
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration._from_config(config, dtype=dtype)
    model.to_empty(device=device)
    _fill(model.named_parameters(), device, dtype)
    rotary, encoder = model.transformer.rotary_pos_emb, model.transformer.prefix_encoder
    rotary.inv_freq = rotary.frequencies().to(device)
    torch.nn.init.normal_(encoder.embedding.weight)
    model.freeze_base()
    return model.train()


@torch.no_grad()
def _fill(parameters: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Ones for norms, zeros for biases, a repeated random block for matrices: a billion draws take long."""
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(_BLOCK_NUMBERS, generator=generator, device=device, dtype=dtype) * _STANDARD_DEVIATION
    for number, (name, parameter) in enumerate(parameters):
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat, turned = parameter.view(-1), block.roll(number * 1_000_003)
        for part in flat.split(_BLOCK_NUMBERS):
            part.copy_(turned[: len(part)])


def advertisements(shape: Shape, count: int) -> list[Row]:
    """Rows with lengths as in AdvertiseGen: source about N(30, 10), target about N(75, 25); the target is learned."""
    draw = random.Random(0)
    sources = _spread_evenly(draw, NormalDist(30, 10), count, 8, 64)
    targets = _spread_evenly(draw, NormalDist(75, 25), count, 16, 128)
    return [
        _row(draw, shape, [(source, False), (target, True)]) for source, target in zip(sources, targets, strict=True)
    ]


def chats(shape: Shape, count: int) -> list[Row]:
    """Long conversations: a log-normal length, median 200, at most 2,048; answers are two thirds of every turn."""
    draw = random.Random(0)
    lengths = _spread_evenly(draw, NormalDist(math.log(200), 0.9), count, math.log(16), math.log(2048), math.exp)
    return [_chat(draw, shape, length) for length in lengths]


def rows_of_length(shape: Shape, length: int, count: int) -> list[Row]:
    """Rows of equal length; the second half is learned."""
    draw = random.Random(0)
    return [_row(draw, shape, [(length // 2, False), (length - length // 2, True)]) for _ in range(count)]


def _chat(draw: random.Random, shape: Shape, left: int) -> Row:
    parts: list[tuple[int, bool]] = []
    while left:
        turn = min(left, round(draw.uniform(12, 300)))
        if left - turn < 12:
            turn = left
        parts += [(turn - turn * 2 // 3, False), (turn * 2 // 3, True)]
        left -= turn
    return _row(draw, shape, parts)


def _spread_evenly(
    draw: random.Random,
    lengths: NormalDist,
    count: int,
    least: float,
    most: float,
    scale: Callable[[float], float] = lambda value: value,
) -> list[int]:
    """Lengths at evenly spaced quantiles, in random order: a few random ones would be too short or too long."""
    values = [lengths.inv_cdf((number + 0.5) / count) for number in range(count)]
    draw.shuffle(values)
    return [round(scale(min(max(value, least), most))) for value in values]


def _row(draw: random.Random, shape: Shape, parts: Sequence[tuple[int, bool]]) -> Row:
    vocabulary = shape.config().padded_vocab_size
    ids = [draw.randrange(_FIRST_ID, vocabulary) for length, _ in parts for _ in range(length)]
    learned = [is_learned for length, is_learned in parts for _ in range(length)]
    return {
        "input_ids": ids,
        "labels": [token if own else IGNORED_LABEL for token, own in zip(ids, learned, strict=True)],
    }


def as_steps(rows: Sequence[Row], batch: int) -> list[list[Row]]:
    """The rows of every step, in the order of the rows."""
    return [list(rows[start : start + batch]) for start in range(0, len(rows), batch)]


def grouped_by_length(rows: Sequence[Row], batch: int) -> list[Row]:
    """The rows in the kit's default order, which makes rows of a step alike in length."""
    return [rows[place] for place in EpochSampler([len(row["input_ids"]) for row in rows], batch, seed=0)]


def tokens_of(steps: Sequence[Sequence[Mapping[str, Sequence[int]]]]) -> int:
    """Useful tokens of some steps."""
    return sum(len(row["input_ids"]) for row in itertools.chain.from_iterable(steps))
