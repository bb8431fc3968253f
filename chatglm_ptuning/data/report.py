"""Counts of used, truncated and skipped rows of a data set, and percentiles of their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_PERCENTILES = (50, 90, 99, 100)

LEFT_OUT = {
    "empty": "empty",
    "one_sided": "with only a question or only an answer",
    "without_targets": "with nothing to learn",
    "too_long": "too long to be truncated to the limit",
    "bad": "that could not be understood (skip_bad_rows)",
}
TRUNCATED = {
    "history_cut": "without their oldest turns",
    "source_cut": "without the middle of the source (max_source_length)",
    "target_cut": "without the end of the answer (max_target_length)",
}
"""Counters of `PreparationReport` as text: of rows, and of examples."""


@dataclass
class PreparationReport:
    """Counts of the rows by their outcome.

    Attributes:
        rows: all rows; each is either used or counted in one of the five fields after `examples`.
        used: rows with at least one example.
        examples: more than `used` if conversations were split, one example for each answer to be learned, or long
            texts into pieces.
        empty: rows left out because they have neither prompt nor response.
        one_sided: rows left out because they have only one of them.
        without_targets: rows left out because nothing in them is to be learned.
        too_long: rows left out because they exceed the limit even without their questions.
        bad: rows left out because they could not be understood.
        history_cut, source_cut, target_cut: examples truncated at their oldest turns, in the middle of the source, or
            at the end of the answer. A truncated answer has no end token.
        places: the place of the first one, for each counter of rows left out and examples truncated.
        lengths: percentiles (`50`, `90`, `99`, `100`) of the tokens of `source` and `target` before truncation, and of
            the `example` after it.
    """

    rows: int = 0
    used: int = 0
    examples: int = 0
    empty: int = 0
    one_sided: int = 0
    without_targets: int = 0
    too_long: int = 0
    bad: int = 0
    history_cut: int = 0
    source_cut: int = 0
    target_cut: int = 0
    places: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, name: str, where: str) -> None:
        """Adds one to a counter of rows left out or examples truncated."""
        setattr(self, name, getattr(self, name) + 1)
        self.places.setdefault(name, where)

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def add_counts(self, other: PreparationReport) -> None:
        """Adds the counters of the next part of the data; `lengths` stays."""
        self.places = other.places | self.places
        for counter in fields(self):
            if counter.name not in ("lengths", "places"):
                setattr(self, counter.name, getattr(self, counter.name) + getattr(other, counter.name))

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Fills `lengths` from the numbers of tokens of every example: `source`, `target` and `example`."""
        self.lengths = {name: percentiles(values) for name, values in lengths.items()}

    def check_not_empty(self) -> None:
        """Refuses data of which nothing can be used.

        Raises:
            ValueError: with the report.
        """
        if not self.examples:
            raise ValueError(f"No row of the data can be used:\n{self.summary()}")

    def summary(self) -> str:
        """The report as a few lines of text; lines without content are left out."""
        lines = [f"{self.rows} rows, {self.used} used, {self.examples} examples"]
        for heading, meanings in (("rows left out", LEFT_OUT), ("examples truncated", TRUNCATED)):
            counted = [
                f"{getattr(self, name)} {what}" + (f" (first: {self.places[name]})" if name in self.places else "")
                for name, what in meanings.items()
                if getattr(self, name)
            ]
            if counted:
                lines.append(f"{heading}: {', '.join(counted)}")
        for name, values in self.lengths.items():
            if values["100"]:  # 0 where answers are not text
                when = "after" if name == "example" else "before"
                lines.append(f"tokens of the {name} {when} truncation: {in_words(values)}")
        return "\n".join(lines)


def too_long_for_base(lengths: Sequence[int], seq_length: int, what: str = "examples") -> str | None:
    """The warning about rows that are longer than what the base was trained for; None if there are none.

    Args:
        lengths: tokens of every row, after truncation.
        seq_length: of the base's configuration.
        what: is counted.
    """
    longer = sum(length > seq_length for length in lengths)
    if not longer:
        return None
    return (
        f"{longer} of {len(lengths)} {what} are longer than the base's seq_length of {seq_length} tokens (the "
        f"longest has {max(lengths)}). The base was not trained on so long texts, and chat refuses them. Lower "
        "max_source_length or max_target_length, or use a base with a longer seq_length."
    )


def percentiles(values: Sequence[int], shares: Sequence[int] = _PERCENTILES) -> dict[str, int]:
    """Percentiles: for each share in per cent, the smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {str(share): ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in shares}


def in_words(values: Mapping[str, int]) -> str:
    """Percentiles as text."""
    return f"half have at most {values['50']}, 90 % {values['90']}, 99 % {values['99']}, the maximum is {values['100']}"
