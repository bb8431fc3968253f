"""From examples to token ids, in one process or several, with a report of what was truncated and left out."""

from __future__ import annotations

import itertools
import multiprocessing
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm.auto import tqdm

from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.rows import BadRows

_EXAMPLES_AT_ONCE = 512  # for each process: few enough to stay in memory, enough to keep it busy

AnyExample = TypeVar("AnyExample", bound=Any)
"""Has a place, `where`."""


@dataclass
class Encoded:
    """What becomes of one example.

    Attributes:
        rows: model inputs, as `PaddingCollator` takes them (or see `Head.ready`).
        counted: the counters of the report that the example adds to.
        lengths: of every row, the tokens of source and target before truncation.
        fault: what is wrong with the example, if it cannot be encoded.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    fault: str | None = None

    @classmethod
    def of_sources(cls, rows: Iterable[dict[str, Any]]) -> Encoded:
        """Rows of which nothing was truncated, and whose answers are no text."""
        made = list(rows)
        return cls(made, lengths=[(len(row["input_ids"]), 0) for row in made])


@dataclass
class Lengths:
    """Numbers of tokens, four bytes each, so that those of a huge file fit in memory."""

    source: array = field(default_factory=lambda: array("i"))
    target: array = field(default_factory=lambda: array("i"))
    example: array = field(default_factory=lambda: array("i"))

    def add(self, encoded: Encoded) -> None:
        """Adds those of the rows of an example."""
        self.source.extend(source for source, _ in encoded.lengths)
        self.target.extend(target for _, target in encoded.lengths)
        self.example.extend(len(row.get("input_ids", ())) for row in encoded.rows)


def encode_examples(
    encode: Callable[[AnyExample], Encoded],
    examples: Iterable[AnyExample],
    report: PreparationReport,
    bad_rows: BadRows,
    *,
    num_workers: int = 1,
    progress: bool = True,
) -> Iterator[tuple[AnyExample, Encoded]]:
    """What becomes of every example, in order and with few of them in memory; the report's counters grow with it.

    Args:
        encode: raises ValueError, naming the place in the file, for an example that cannot be encoded.
        bad_rows: counts those, and, as the examples were read with it, all rows that could not be understood.
        num_workers: processes to work with (the official `--preprocessing_num_workers`).
        progress: show a progress bar if it takes longer than a few seconds.

    Raises:
        ValueError: as `bad_rows.add`.
    """
    with _mapping(encode, num_workers) as map_examples:
        bar = tqdm(disable=not progress, desc="Tokenizing", delay=3, unit="row")
        for example, encoded in map_examples(examples):
            bar.update()
            if encoded.fault is not None:
                bad_rows.add(encoded.fault)
                continue
            report.rows += 1
            for name in encoded.counted:
                report.count(name, example.where)
            report.used += bool(encoded.rows)
            report.examples += len(encoded.rows)
            yield example, encoded
        bar.close()
    report.bad = bad_rows.count
    report.rows += report.bad


def nothing_left(report: PreparationReport) -> str:
    """The message about data of which nothing can be used."""
    return f"There is nothing to work with in the data:\n{report.summary()}"


@contextmanager
def _mapping(
    encode: Callable[[AnyExample], Encoded], num_workers: int
) -> Iterator[Callable[[Iterable[AnyExample]], Iterator[tuple[AnyExample, Encoded]]]]:
    """A `map` that keeps the order, over processes if there are to be several; faults are part of its results."""
    if num_workers <= 1:
        yield lambda examples: ((example, _tried(encode, example)) for example in examples)
        return
    with multiprocessing.Pool(num_workers, _set_task, (encode,)) as pool:

        def in_blocks(examples: Iterable[AnyExample]) -> Iterator[tuple[AnyExample, Encoded]]:
            remaining = iter(examples)
            # pool.imap would read all examples before the first is done.
            while block := list(itertools.islice(remaining, _EXAMPLES_AT_ONCE * num_workers)):
                yield from zip(block, pool.map(_do_task, block), strict=True)

        yield in_blocks


def _tried(encode: Callable[[AnyExample], Encoded], example: AnyExample) -> Encoded:
    try:
        return encode(example)
    except ValueError as error:
        return Encoded(fault=str(error))


_task: Callable[[Any], Encoded]  # in a worker process: set once, so that the tokenizer does not travel with each block


def _set_task(encode: Callable[[Any], Encoded]) -> None:
    global _task
    _task = encode


def _do_task(example: Any) -> Encoded:
    return _tried(_task, example)
