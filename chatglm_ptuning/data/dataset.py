"""From a split of a task to the data of a run: cached rows to train on, and examples to predict."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from chatglm_ptuning.data.cache import (
    TokenCache,
    code_fingerprint,
    open_rows,
    read_facts,
    tokenizer_fingerprint,
    write_rows,
)
from chatglm_ptuning.data.check import Checker
from chatglm_ptuning.data.encoding import Lengths, encode_examples
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
        subjects: only these of an examination.
        limit: maximum number of rows of all places together.
        weights: one for each place: how often each of its rows is learned in an epoch. With 2.5, all rows are learned
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
                f"train_weights has {len(self.weights)} numbers for {len(self.places)} files; give one for each."
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"train_weights must be positive numbers, got {' '.join(map(str, self.weights))}.")


@dataclass(frozen=True)
class Loader:
    """Reads the data of a run.

    Attributes:
        cache: of the rows.
        skip_bad_rows: number of rows of a split that may be skipped because they cannot be understood.
        seed: of the choice of rows by weight.
        num_workers, progress: as for `encode_examples`.
    """

    cache: TokenCache
    skip_bad_rows: int = 0
    seed: int = 42
    num_workers: int = 1
    progress: bool = True

    def rows(self, head: Head, split: Split) -> LoadedRows:
        """The rows from which a head learns a split, from the cache or newly encoded.

        Raises:
            ValueError: naming file and line, if more rows than `skip_bad_rows` cannot be understood; with the report,
                if no row is left.
            OSError: if the cache cannot be written.
        """
        bad_rows = BadRows(self.skip_bad_rows)
        report = PreparationReport()
        parts: list[tuple[datasets.Dataset, float]] = []
        warnings: list[str] = []
        reused = True
        for place, weight in zip(split.places, split.weights or [1.0] * len(split.places), strict=True):
            found = split_parts(head.task, place, split.name, split.subjects, bad_rows)
            # Each file has its own entry in the cache.
            for part in (replace(whole, sources=[source]) for whole in found for source in whole.sources):
                if split.limit is not None:
                    part = replace(part, limit=split.limit - (report.rows - report.bad))
                    if part.limit <= 0:
                        break
                entry, was_there = self.cache.entry(_key(head, part), partial(self._make, head, part))
                facts = read_facts(entry)
                if was_there:  # count its bad rows as when it was made; only the first messages are kept
                    for number in range(facts["report"]["bad"]):
                        bad_rows.add(facts["faults"][min(number, len(facts["faults"]) - 1)])
                reused = reused and was_there
                report.add_counts(PreparationReport(**facts["report"]))
                warnings += facts["warnings"]
                parts.append((open_rows(entry), weight))
        report.check_not_empty()
        chosen = _mixed(parts, self.seed)
        if not len(chosen):
            raise ValueError(f"train_weights {' '.join(map(str, split.weights or []))} leave no row; raise them.")
        names = {"source": "source_length", "target": "target_length", "example": "length"}
        filled = [rows for rows, _ in parts if len(rows)]
        report.set_lengths({key: np.concatenate([column(rows, names[key]) for rows in filled]) for key in names})
        if bad_rows.count:
            warnings = [f"{bad_rows.count} bad rows were skipped, the first:\n{bad_rows.messages[0]}", *warnings]
        return LoadedRows(chosen, report, warnings, reused)

    def _make(self, head: Head, part: SplitSource, folder: Path) -> dict[str, Any]:
        """Writes the rows of a part, and returns what the cache keeps about them."""
        bad_rows = BadRows(None, whole=part.bad_rows)
        checker, report = Checker(bad_rows), PreparationReport()
        dropped: list[str] = []
        found = reader_of(head.task).read(replace(part, bad_rows=bad_rows))
        counted = that_count(head.task, part.split, found, dropped.append)
        examples = checker.watch(itertools.islice(counted, part.limit))
        encoding = {"num_workers": self.num_workers, "progress": self.progress}

        def rows() -> Iterator[dict[str, Any]]:
            for example, encoded in encode_examples(head.learn, examples, report, bad_rows, **encoding):
                for row, (source, target) in zip(encoded.rows, encoded.lengths, strict=True):
                    lengths = {"length": len(row["input_ids"]), "source_length": source, "target_length": target}
                    yield {**row, **lengths, "digest": example.digest}

        write_rows(folder, rows())
        counted.close()
        return {"report": report.as_dict(), "warnings": checker.warnings() + dropped, "faults": bad_rows.messages}

    def read(self, task: Task, split: Split) -> ReadExamples:
        """The examples of a split, before there is a tokenizer: faults in files show before a base is loaded.

        Raises:
            ValueError: as `read_examples`; if more rows than `skip_bad_rows` cannot be understood.
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
        unread = Counter(name for example in found.examples for name in example.unread)
        for name, count in unread.items():
            logger.warning(f"{count} rows of {task.name}, split {split.name}, have text in {name!r} that is not read.")
        return found

    def make_ready(self, head: Head, found: ReadExamples) -> tuple[list[Example], PreparationReport]:
        """Examples ready for a head to predict, and counts of the rows by their outcome.

        Raises:
            ValueError: naming file and line, as `Head.ready`; with the report, if none is left.
        """
        report, lengths = PreparationReport(), Lengths()
        encoding = {"num_workers": self.num_workers, "progress": self.progress}
        ready: list[Example] = []
        for example, encoded in encode_examples(head.ready, found.examples, report, found.bad_rows, **encoding):
            ready += [replace(example, **fields) for fields in encoded.rows]
            lengths.add(encoded)
        report.check_not_empty()
        if lengths["source"]:
            report.set_lengths(lengths)
        return ready, report


@dataclass(frozen=True)
class LoadedRows:
    """Rows to learn from.

    Attributes:
        rows: memory-mapped; the columns that the head learns (`Head.encode`), `length` of the `input_ids`,
            `source_length` and `target_length` before truncation, and `digest`, which is the same for rows made of the
            same content.
        report: counts of the examples by their outcome.
        warnings: suspicious properties of the rows.
        reused: whether all of them were in the cache.
    """

    rows: datasets.Dataset
    report: PreparationReport
    warnings: list[str]
    reused: bool

    def summary(self) -> str:
        """Report and warnings as a few lines of text."""
        lines = [self.report.summary() + (" (from the cache)" if self.reused else "")]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class ReadExamples:
    """Examples of a split, and the counter of its rows that could not be understood."""

    examples: list[Example]
    bad_rows: BadRows


def column(examples: Any, name: str) -> np.ndarray:
    """A column of numbers; the other columns are not read.

    Args:
        examples: a `datasets.Dataset`.
    """
    return np.asarray(examples.with_format("numpy")[name][:])


def lengths_of(examples: Any) -> list[int]:
    """The number of tokens of every example, in order; the examples of a `datasets.Dataset` are not read."""
    if "length" in getattr(examples, "column_names", ()):
        return column(examples, "length").tolist()
    return [len(example["input_ids"]) for example in examples]


def shared_rows(first: datasets.Dataset, second: datasets.Dataset) -> int:
    """The number of different rows that are in both."""
    return len(np.intersect1d(column(first, "digest"), column(second, "digest")))


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """The rows of concatenated parts that are learned in an epoch, repeated by weight: int64 indices, ascending.

    The choice of a fraction depends only on the seed, and on the place and the size of the part.
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

    filled = [rows for rows, _ in parts if len(rows)]
    together = filled[0] if len(filled) == 1 else datasets.concatenate_datasets(filled)
    weights = [weight for _, weight in parts]
    if all(weight == 1 for weight in weights):
        return together
    return together.select(mixture([len(rows) for rows, _ in parts], weights, seed), keep_in_memory=True)


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
