"""Checking data without a model: what its rows are, and what is wrong or suspicious in them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from chatglm_ptuning.data.report import percentiles
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.writing import SCRIPTS, count_scripts, is_mojibake, special_spellings

_PLACES = 5

FINDINGS = {
    "duplicates": "rows that stood before word for word",
    "empty": "rows with neither question nor answer",
    "one_sided": "rows with only a question or only an answer",
    "without_targets": "rows with nothing to learn",
    "replacement_characters": "rows with U+FFFD, which stands for characters that were lost",
    "mojibake": "rows with passages that were read in a wrong encoding",
    "special_tokens": "rows that spell special tokens (they are learned as ordinary text)",
}
"""What rows are counted for, in words."""


@dataclass
class CheckReport:
    """What was found in the rows.

    Attributes:
        rows: those that were understood.
        bad: those that were not; `errors` says of the first of them what is wrong.
        formats: rows by dataset format.
        turns: percentiles of answers in a row.
        characters: percentiles of the characters of `source` (all but the answers) and `target` (all answers).
        scripts: share of the letters by script, and rows in which each stands.
        counts: rows by finding (FINDINGS).
        places: the first rows of every finding, as FILE:LINE.
    """

    rows: int = 0
    bad: int = 0
    errors: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    characters: dict[str, dict[str, int]] = field(default_factory=dict)
    scripts: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @property
    def usable(self) -> int:
        """Rows that something can be learned from."""
        return self.rows - sum(self.counts.get(name, 0) for name in ("empty", "one_sided", "without_targets"))

    def warnings(self) -> list[str]:
        """What is suspicious, one line each, with the first places."""
        lines = []
        for name, meaning in FINDINGS.items():
            if self.counts.get(name):
                places = self.places.get(name, [])
                more = ", ..." if self.counts[name] > len(places) else ""
                lines.append(f"{self.counts[name]} {meaning}: {', '.join(places)}{more}")
        return lines

    def summary(self) -> str:
        """The report in a few lines for people, without warnings and errors."""
        counted = [f"{name} ({count})" for name, count in self.formats.items()]
        formats = ", ".join(counted if len(counted) > 1 else self.formats) or "unknown"
        lines = [f"{self.rows + self.bad} rows, dataset format: {formats}"]
        if not self.rows:
            return lines[0]
        lines.append(f"answers in a row: {_in_words(self.turns)}")
        for name, values in self.characters.items():
            lines.append(f"characters of the {name}: {_in_words(values)}")
        shares = ", ".join(f"{name} {100 * found['share']:.1f} %" for name, found in self.scripts.items())
        lines.append(f"letters: {shares or 'none'}")
        return "\n".join(lines)


class Checker:
    """Looks at examples as they pass by; what it keeps of each is a few bytes."""

    def __init__(self) -> None:
        self.report_so_far = CheckReport()
        self.seen: set[int] = set()
        self.turns, self.source, self.target = array("i"), array("i"), array("i")
        self.letters: Counter[str] = Counter()
        self.rows_with: Counter[str] = Counter()

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples, each noted before it is passed on."""
        for example in examples:
            self._note(example)
            yield example

    def report(self, bad_rows: BadRows) -> CheckReport:
        """What was found so far.

        Args:
            bad_rows: counted the rows that could not be understood.
        """
        report = self.report_so_far
        report.bad, report.errors = bad_rows.count, list(bad_rows.messages)
        report.turns = percentiles(self.turns)
        report.characters = {"source": percentiles(self.source), "target": percentiles(self.target)}
        letters = self.letters.total()
        report.scripts = {
            name: {"share": round(self.letters[name] / letters, 4), "rows": self.rows_with[name]}
            for name in SCRIPTS
            if self.letters[name]
        }
        return report

    def _note(self, example: Example) -> None:
        report, digest, left_out = self.report_so_far, example.digest, example.left_out_as
        report.rows += 1
        report.formats[example.dataset_format] = report.formats.get(example.dataset_format, 0) + 1
        source, target, answers = example.said()
        self.turns.append(answers)
        self.source.append(len(source))
        self.target.append(len(target))
        text = f"{source}\n{target}"
        scripts = count_scripts(text)
        self.letters.update(scripts)
        self.rows_with.update(name for name, count in scripts.items() if count)
        findings = {
            "duplicates": digest in self.seen,
            **{name: left_out == name for name in ("empty", "one_sided", "without_targets")},
            "replacement_characters": "\ufffd" in text,
            "mojibake": is_mojibake(text),
            "special_tokens": bool(special_spellings(text)),
        }
        self.seen.add(digest)
        for name, is_so in findings.items():
            if is_so:
                report.counts[name] = report.counts.get(name, 0) + 1
                places = report.places.setdefault(name, [])
                if len(places) < _PLACES:
                    places.append(example.where)


def _in_words(values: Mapping[str, int]) -> str:
    return f"half have at most {values['50']}, 90 % {values['90']}, 99 % {values['99']}, the most is {values['100']}"
