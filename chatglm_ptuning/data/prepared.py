"""Training data: files made into examples through the cache, mixed by weight, checked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatglm_ptuning.data.cache import (
    RowWriter,
    TokenCache,
    code_fingerprint,
    read_examples,
    read_facts,
    tokenizer_fingerprint,
)
from chatglm_ptuning.data.check import Checker
from chatglm_ptuning.data.conversation_encoder import ConversationEncoder
from chatglm_ptuning.data.conversations import read_conversations
from chatglm_ptuning.data.encoding import encode_examples, nothing_left
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.files import DataSource, find_sources
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.version import kit_version

if TYPE_CHECKING:
    import datasets


@dataclass
class PreparedData:
    """Examples of one or several files.

    Attributes:
        examples: map-style and memory-mapped; `input_ids` and `labels` of `[seq_len]`, `length`, and more columns that
            tell where they come from.
        report: what became of the rows.
        warnings: what is suspicious in them.
        reused: whether all of it was in the cache.
    """

    examples: datasets.Dataset
    report: PreparationReport
    warnings: list[str]
    reused: bool

    def summary(self) -> str:
        """Report and warnings in a few lines for people."""
        lines = [self.report.summary() + (" (from the cache)" if self.reused else "")]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def prepare_training_data(
    names: Sequence[str],
    columns: Columns,
    encoder: ConversationEncoder,
    cache: TokenCache,
    *,
    weights: Sequence[float] | None = None,
    max_rows: int | None = None,
    skip_bad_rows: int = 0,
    seed: int = 42,
    num_workers: int = 1,
    progress: bool = True,
) -> PreparedData:
    """Makes examples of files, or takes them from the cache, and mixes them.

    Args:
        names: files, folders, patterns, data sets on a hub (`find_sources`).
        weights: one for each name: how often each of its examples is seen in an epoch. Of 2.5, all of them are seen
            twice, and half of them, chosen by the seed, a third time.
        max_rows: use the first so many rows of all files together.
        skip_bad_rows: tolerate so many rows that cannot be understood.
        num_workers, progress: as for `encode_examples`.

    Raises:
        ValueError: naming file and line, for a row too many that cannot be understood; with the report, if no row is
            left; if the weights do not fit the names.
        OSError: if the cache cannot be written.
    """
    _check_weights(names, weights)
    bad_rows = BadRows(skip_bad_rows)
    report = PreparationReport()
    parts: list[tuple[datasets.Dataset, float]] = []
    warnings: list[str] = []
    reused = True
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        for source in find_sources(name):
            remaining = None if max_rows is None else max_rows - (report.rows - report.bad)
            if remaining is not None and remaining <= 0:
                break
            key = _key(source, columns, encoder, remaining)
            make = partial(
                _make_entry, source, columns, encoder, remaining, bad_rows, num_workers=num_workers, progress=progress
            )
            entry, was_there = cache.entry(key, make)
            facts = read_facts(entry)
            if was_there:
                _repeat_faults(facts, bad_rows)
            reused = reused and was_there
            report.add_counts(PreparationReport(**facts["report"]))
            warnings += facts["warnings"]
            parts.append((read_examples(entry), weight))
    if not report.examples:
        raise ValueError(nothing_left(report))
    examples = _mixed(parts, seed)
    if not len(examples):
        raise ValueError(f"--train_weights {' '.join(map(str, weights or []))} leave no row to train on; raise them.")
    whole = _mixed([(part, 1.0) for part, _ in parts], seed)
    report.set_lengths(*(column(whole, name) for name in ("source_length", "target_length", "length")))
    if bad_rows.count:
        warnings = [f"{bad_rows.count} bad rows were skipped, the first:\n{bad_rows.messages[0]}", *warnings]
    return PreparedData(examples, report, warnings, reused)


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


def _check_weights(names: Sequence[str], weights: Sequence[float] | None) -> None:
    if weights is None:
        return
    if len(weights) != len(names):
        raise ValueError(f"--train_weights has {len(weights)} numbers for {len(names)} files; give one for each.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"--train_weights must be positive numbers, got {' '.join(map(str, weights))}.")


def _key(source: DataSource, columns: Columns, encoder: ConversationEncoder, limit: int | None) -> dict[str, Any]:
    return {
        "source": [str(source), source.fingerprint()],
        "limit": limit,
        "columns": asdict(columns),
        "lengths": [encoder.max_source_length, encoder.max_target_length],
        "source_prefix": encoder.source_prefix,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "kit": [kit_version(), code_fingerprint()],
    }


def _make_entry(
    source: DataSource,
    columns: Columns,
    encoder: ConversationEncoder,
    limit: int | None,
    bad_rows: BadRows,
    folder: Path,
    **how: Any,
) -> None:
    of_source = BadRows(None, whole=bad_rows)
    checker, report = Checker(), PreparationReport()
    examples = checker.watch(read_conversations(source.rows(of_source), columns, of_source, limit))
    writer = RowWriter(folder)
    for example, encoded in encode_examples(encoder.training_rows, examples, report, of_source, **how):
        for row, (source_length, target_length) in zip(encoded.rows, encoded.lengths, strict=True):
            writer.add(row, source_length, target_length, example.digest)
    warnings = checker.report(of_source).warnings()
    writer.close({"report": report.as_dict(), "warnings": warnings, "faults": of_source.messages})


def _repeat_faults(facts: dict[str, Any], bad_rows: BadRows) -> None:
    """Counts the bad rows of an entry that is in the cache as when it was made."""
    count, messages = facts["report"]["bad"], facts["faults"]
    for number in range(count):
        bad_rows.add(messages[min(number, len(messages) - 1)])
