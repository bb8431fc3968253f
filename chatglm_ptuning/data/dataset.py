"""From a split of a task to what a run takes: rows to learn, through the cache, and examples to predict."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from chatglm_ptuning.data.cache import (
    RowWriter,
    TokenCache,
    code_fingerprint,
    open_rows,
    read_facts,
    tokenizer_fingerprint,
)
from chatglm_ptuning.data.check import Checker
from chatglm_ptuning.data.encoding import encode_examples, nothing_left
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.files import DataFile
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads.head import Head
from chatglm_ptuning.data.tasks.read import read_examples, split_parts, that_count
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.version import kit_version

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Split:
    """Which rows of a task are read.

    Attributes:
        places: files, folders, patterns or hubs, as `read_examples` takes them.
        name: of the split.
        subjects: of an examination, these alone.
        limit: the first so many rows of all places together.
        weights: one for each place: how often each of its rows is learned in an epoch. Of 2.5, all of them are learned
            twice, and half of them, chosen by the seed, a third time.
    """

    places: Sequence[str]
    name: str = "train"
    subjects: Sequence[str] | None = None
    limit: int | None = None
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if len(self.weights) != len(self.places):
            raise ValueError(
                f"--train_weights has {len(self.weights)} numbers for {len(self.places)} files; give one for each."
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"--train_weights must be positive numbers, got {' '.join(map(str, self.weights))}.")


@dataclass(frozen=True)
class Loader:
    """Reads the data of a run.

    Attributes:
        cache: keeps the rows.
        skip_bad_rows: tolerate so many rows of a split that cannot be understood.
        seed: of the choice of rows by weight.
        num_workers, progress: as for `encode_examples`.
    """

    cache: TokenCache
    skip_bad_rows: int = 0
    seed: int = 42
    num_workers: int = 1
    progress: bool = True

    def rows(self, head: Head, split: Split) -> LoadedRows:
        """The rows by which a head learns a split, from the cache or made anew.

        Raises:
            ValueError: naming file and line, for a row too many that cannot be understood; with the report, if no row
                is left.
            OSError: if the cache cannot be written.
        """
        bad_rows = BadRows(self.skip_bad_rows)
        report = PreparationReport()
        parts: list[tuple[datasets.Dataset, float]] = []
        warnings: list[str] = []
        reused = True
        for place, weight in zip(split.places, split.weights or [1.0] * len(split.places), strict=True):
            for part in _units(head, place, split, bad_rows):
                remaining = None if split.limit is None else split.limit - (report.rows - report.bad)
                if remaining is not None and remaining <= 0:
                    break
                part = replace(part, limit=remaining)
                entry, was_there = self.cache.entry(_key(head, part), lambda folder: self._make(folder, head, part))  # noqa: B023
                facts = read_facts(entry)
                if was_there:
                    _repeat_faults(facts, bad_rows)
                reused = reused and was_there
                report.add_counts(PreparationReport(**facts["report"]))
                warnings += facts["warnings"]
                parts.append((open_rows(entry), weight))
        if not report.examples:
            raise ValueError(nothing_left(report))
        rows = _mixed(parts, self.seed)
        if not len(rows):
            raise ValueError(f"--train_weights {' '.join(map(str, split.weights or []))} leave no row; raise them.")
        whole = _mixed([(part, 1.0) for part, _ in parts], self.seed)
        report.set_lengths(*(column(whole, name) for name in ("source_length", "target_length", "length")))
        if bad_rows.count:
            warnings = [f"{bad_rows.count} bad rows were skipped, the first:\n{bad_rows.messages[0]}", *warnings]
        return LoadedRows(rows, report, warnings, reused)

    def _make(self, folder: Path, head: Head, part: SplitSource) -> None:
        of_part = BadRows(None, whole=part.bad_rows)
        checker, report = Checker(), PreparationReport()
        found = reader_of(head.task).read(replace(part, bad_rows=of_part))
        examples = itertools.islice(that_count(head.task, part.split, found), part.limit)
        writer = RowWriter(folder)
        encoding = {"num_workers": self.num_workers, "progress": self.progress}
        for example, encoded in encode_examples(head.learn, checker.watch(examples), report, of_part, **encoding):
            for row, (source_length, target_length) in zip(encoded.rows, encoded.lengths, strict=True):
                writer.add(row, source_length, target_length, example.digest)
        warnings = checker.report(of_part).warnings()
        writer.close({"report": report.as_dict(), "warnings": warnings, "faults": of_part.messages})

    def read(self, task: Task, split: Split) -> ReadExamples:
        """The examples of a split.

        Raises:
            ValueError: as `read_examples`, or for a row too many that cannot be understood.
        """
        found = ReadExamples([], BadRows(self.skip_bad_rows))
        for place in split.places:
            remaining = None if split.limit is None else split.limit - len(found.examples)
            if remaining != 0:
                more = {"subjects": split.subjects, "bad_rows": found.bad_rows, "limit": remaining}
                found.examples.extend(read_examples(task, place, split.name, **more))
        if found.bad_rows.count:
            logger.warning(
                f"{found.bad_rows.count} bad rows of {task.name}, split {split.name}, were skipped, the first:\n"
                f"{found.bad_rows.messages[0]}"
            )
        return found

    def make_ready(self, head: Head, found: ReadExamples) -> tuple[list[Example], PreparationReport]:
        """Examples as a head predicts them, and what became of the rows.

        Raises:
            ValueError: naming file and line, as `Head.ready`; with the report, if none is left.
        """
        report = PreparationReport()
        encoding = {"num_workers": self.num_workers, "progress": self.progress}
        ready = [
            replace(example, **fields)
            for example, encoded in encode_examples(head.ready, found.examples, report, found.bad_rows, **encoding)
            for fields in encoded.rows
        ]
        if not ready:
            raise ValueError(nothing_left(report))
        return ready, report


@dataclass(frozen=True)
class LoadedRows:
    """Rows to learn.

    Attributes:
        rows: map-style and memory-mapped; what the head learns of each (`Head.encode`), `length`, and more columns that
            tell where they come from.
        report: what became of the examples.
        warnings: what is suspicious in them.
        reused: whether all of it was in the cache.
    """

    rows: datasets.Dataset
    report: PreparationReport
    warnings: list[str]
    reused: bool

    def summary(self) -> str:
        """Report and warnings in a few lines for people."""
        lines = [self.report.summary() + (" (from the cache)" if self.reused else "")]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class ReadExamples:
    """Examples of a split, and the count of its rows that could not be understood."""

    examples: list[Example]
    bad_rows: BadRows


def column(examples: Any, name: str) -> np.ndarray:
    """A column of numbers without reading the others.

    Args:
        examples: a `datasets.Dataset`.
    """
    return np.asarray(examples.with_format("numpy")[name][:])


def lengths_of(examples: Any) -> list[int]:
    """The tokens of every example, in order; of prepared data without reading the examples."""
    if "length" in getattr(examples, "column_names", ()):
        return column(examples, "length").tolist()
    return [len(example["input_ids"]) for example in examples]


def shared_rows(first: datasets.Dataset, second: datasets.Dataset) -> int:
    """How many different rows are in both."""
    return len(np.intersect1d(column(first, "digest"), column(second, "digest")))


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Which examples of parts that stand one behind the other are seen in an epoch, and how often; int64, ascending.

    The choice of a fraction depends on the seed, the place of the part and its size alone.
    """
    chosen = []
    start = 0
    for place, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole = int(weight)
        some = round((weight - whole) * size)
        drawn = np.random.default_rng([seed, place]).permutation(size)[:some]
        chosen.append(start + np.sort(np.concatenate([np.tile(np.arange(size), whole), drawn])))
        start += size
    return np.concatenate(chosen).astype(np.int64)


def _mixed(parts: Sequence[tuple[datasets.Dataset, float]], seed: int) -> datasets.Dataset:
    import datasets

    examples = [part for part, _ in parts]
    filled = [part for part in examples if len(part)]
    together = filled[0] if len(filled) == 1 else datasets.concatenate_datasets(filled)
    weights = [weight for _, weight in parts]
    if all(weight == 1 for weight in weights):
        return together
    return together.select(mixture([len(part) for part in examples], weights, seed), keep_in_memory=True)


def _units(head: Head, place: str, split: Split, bad_rows: BadRows) -> Iterator[SplitSource]:
    """What the rows of a place are made of, each with an entry of its own in the cache: its files, one by one."""
    for part in split_parts(head.task, place, split.name, split.subjects, bad_rows):
        for source in part.sources:
            yield replace(part, sources=[source])


def _key(head: Head, part: SplitSource) -> dict[str, Any]:
    beside = [DataFile(path) for path in reader_of(head.task).beside(part)]
    return {
        "sources": [[str(source), source.fingerprint()] for source in (*part.sources, *beside)],
        "fields": dict(part.fields),
        "split": part.split,
        "subject": part.subject,
        "limit": part.limit,
        **head.settings(),
        "tokenizer": tokenizer_fingerprint(head.tokenizer),
        "kit": [kit_version(), code_fingerprint()],
    }


def _repeat_faults(facts: dict[str, Any], bad_rows: BadRows) -> None:
    """Counts the bad rows of an entry that is in the cache as when it was made."""
    count, messages = facts["report"]["bad"], facts["faults"]
    for number in range(count):
        bad_rows.add(messages[min(number, len(messages) - 1)])
