"""From examples to token ids, in one process or several, with counts of truncated and skipped rows."""

from __future__ import annotations

import itertools
import multiprocessing
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm.auto import tqdm

from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.rows import BadRows

_EXAMPLES_AT_ONCE = 512  # for each process: few enough to stay in memory, enough to keep it busy

AnyExample = TypeVar("AnyExample", bound=Any)
"""Has a place, `where`."""


@dataclass
class EncodedExample:
    """The rows that are made of one example.

    Attributes:
        rows: model inputs, as `PaddingCollator` takes them (or see `Head.ready`).
        counted: the counters of the report that the example adds to.
        lengths: of every row, the tokens of source and target before truncation.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of_sources(cls, rows: Iterable[dict[str, Any]]) -> EncodedExample:
        """Rows of which nothing was truncated, and whose answers are not text."""
        made = list(rows)
        return cls(made, lengths=[(len(row["input_ids"]), 0) for row in made])


class Lengths(dict[str, array]):
    """Tokens of `source`, `target` and `example`, four bytes each, so that those of a huge file fit in memory."""

    def __init__(self) -> None:
        super().__init__({name: array("i") for name in ("source", "target", "example")})

    def add(self, encoded: EncodedExample) -> None:
        """Adds those of the rows of an example."""
        self["source"].extend(source for source, _ in encoded.lengths)
        self["target"].extend(target for _, target in encoded.lengths)
        self["example"].extend(len(row.get("input_ids", row.get("prompt_ids", ()))) for row in encoded.rows)


def encode_examples(
    encode: Callable[[AnyExample], EncodedExample],
    examples: Iterable[AnyExample],
    report: PreparationReport,
    bad_rows: BadRows,
    *,
    num_workers: int = 1,
    progress: bool = True,
) -> Iterator[tuple[AnyExample, EncodedExample]]:
    """Every example with its rows, in order and with few of them in memory; updates the counters of the report.

    Args:
        encode: raises ValueError, naming the place in the file, for an example that cannot be encoded.
        bad_rows: counts those examples; the examples were read with it, so it counts all rows that are not understood.
        num_workers: number of processes (the official setting `preprocessing_num_workers`).
        progress: show a progress bar if it takes longer than a few seconds.

    Raises:
        ValueError: as `bad_rows.add`.
    """
    bar = tqdm(_mapped(encode, examples, num_workers), disable=not progress, desc="Tokenizing", delay=3, unit="row")
    for example, encoded in bar:
        if isinstance(encoded, str):
            bad_rows.add(encoded)
            continue
        report.rows += 1
        for name in encoded.counted:
            report.count(name, example.where)
        report.used += bool(encoded.rows)
        report.examples += len(encoded.rows)
        yield example, encoded
    report.bad = bad_rows.count
    report.rows += report.bad


def _mapped(
    encode: Callable[[AnyExample], EncodedExample], examples: Iterable[AnyExample], num_workers: int
) -> Iterator[tuple[AnyExample, EncodedExample | str]]:
    """Every example with its rows, or with the error message."""
    if num_workers <= 1:
        yield from ((example, _tried(encode, example)) for example in examples)
        return
    with multiprocessing.Pool(num_workers, _set_encode, (encode,)) as pool:
        remaining = iter(examples)
        # pool.imap would read all examples before the first is done.
        while block := list(itertools.islice(remaining, _EXAMPLES_AT_ONCE * num_workers)):
            yield from zip(block, pool.map(_tried_in_worker, block), strict=True)


_encode: Callable[[Any], EncodedExample]  # set once in every worker: the tokenizer does not travel with each block


def _set_encode(encode: Callable[[Any], EncodedExample]) -> None:
    global _encode
    _encode = encode


def _tried_in_worker(example: Any) -> EncodedExample | str:
    return _tried(_encode, example)


def _tried(encode: Callable[[AnyExample], EncodedExample], example: AnyExample) -> EncodedExample | str:
    try:
        return encode(example)
    except ValueError as error:
        return str(error)
