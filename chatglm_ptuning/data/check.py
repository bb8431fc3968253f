"""Checking data without a model: what its rows are, and what is wrong or suspicious in them."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from chatglm_ptuning.data.conversation import Conversation, Document
from chatglm_ptuning.data.forms import Columns, understand
from chatglm_ptuning.data.report import percentiles
from chatglm_ptuning.data.sources.rows import BadRows, Row
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
        forms: rows by form.
        turns: percentiles of answers in a row.
        characters: percentiles of the characters of `source` (all but the answers) and `target` (all answers).
        scripts: share of the letters by script, and rows in which each stands.
        counts: rows by finding (FINDINGS).
        places: the first rows of every finding, as FILE:LINE.
    """

    rows: int = 0
    bad: int = 0
    errors: list[str] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)
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
        forms = ", ".join(f"{form} ({count})" if len(self.forms) > 1 else form for form, count in self.forms.items())
        lines = [f"{self.rows + self.bad} rows, form: {forms or 'unknown'}"]
        if not self.rows:
            return lines[0]
        lines.append(f"answers in a row: {_in_words(self.turns)}")
        for name, values in self.characters.items():
            lines.append(f"characters of the {name}: {_in_words(values)}")
        shares = ", ".join(f"{name} {100 * found['share']:.1f} %" for name, found in self.scripts.items())
        lines.append(f"letters: {shares or 'none'}")
        return "\n".join(lines)


class Checker:
    """Looks at rows as they pass by; what it keeps of each is a few bytes.

    Args:
        columns: what the user said about the rows.
        bad_rows: counts those that cannot be understood.

    Attributes:
        last_digest: of the row that passed last.
    """

    def __init__(self, columns: Columns, bad_rows: BadRows) -> None:
        self.columns = columns
        self.bad_rows = bad_rows
        self.report_so_far = CheckReport()
        self.seen: set[int] = set()
        self.last_digest = 0
        self.turns, self.source, self.target = array("i"), array("i"), array("i")
        self.letters: Counter[str] = Counter()
        self.rows_with: Counter[str] = Counter()

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that can be understood.

        Raises:
            ValueError: as `bad_rows.add` for the others.
        """
        for row in rows:
            try:
                form, found = understand(row, self.columns)
            except ValueError as error:
                self.bad_rows.add(str(error))
                continue
            self._note(row, form, found)
            yield row

    def report(self) -> CheckReport:
        """What was found so far."""
        report = self.report_so_far
        report.bad, report.errors = self.bad_rows.count, list(self.bad_rows.messages)
        report.turns = percentiles(self.turns)
        report.characters = {"source": percentiles(self.source), "target": percentiles(self.target)}
        letters = self.letters.total()
        report.scripts = {
            name: {"share": round(self.letters[name] / letters, 4), "rows": self.rows_with[name]}
            for name in SCRIPTS
            if self.letters[name]
        }
        return report

    def _note(self, row: Row, form: str, found: Conversation | Document) -> None:
        report = self.report_so_far
        report.rows += 1
        report.forms[form] = report.forms.get(form, 0) + 1
        source, target, turns = _texts(found)
        self.turns.append(turns)
        self.source.append(len(source))
        self.target.append(len(target))
        text = f"{source}\n{target}"
        scripts = count_scripts(text)
        self.letters.update(scripts)
        self.rows_with.update(name for name, count in scripts.items() if count)
        digest = self.last_digest = _digest(row)
        missing = found.missing_side()
        learned = isinstance(found, Document) or any(message.loss for message in found.messages)
        findings = {
            "duplicates": digest in self.seen,
            "empty": missing == "empty",
            "one_sided": missing == "one_sided",
            "without_targets": missing is None and not learned,
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
                    places.append(row.where)


def _digest(row: Mapping[str, Any]) -> int:
    """64 bits that are the same for rows of the same content."""
    content = repr(sorted(row.items(), key=lambda item: item[0])).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _texts(found: Conversation | Document) -> tuple[str, str, int]:
    """All that is said to the model, all that it says, and how often it says something."""
    if isinstance(found, Document):
        return "", found.text, 1
    answers = [message for message in found.messages if message.role == "assistant"]
    source = "\n".join(message.content for message in found.messages if message.role != "assistant")
    target = "\n".join(
        message.content if message.arguments is None else f"{message.metadata} {message.arguments}"
        for message in answers
    )
    return source, target, len(answers)


def _in_words(values: Mapping[str, int]) -> str:
    return f"half have at most {values['50']}, 90 % {values['90']}, 99 % {values['99']}, the most is {values['100']}"
