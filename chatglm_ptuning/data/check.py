"""Checks data without a model: the formats of its rows, faults, and suspicious properties."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from chatglm_ptuning.data.report import in_words, percentiles
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.examples import Example

_PLACES = 5

FINDINGS = {
    "duplicates": "rows that repeat an earlier row word for word",
    "empty": "rows with neither question nor answer",
    "one_sided": "rows with only a question or only an answer",
    "without_targets": "rows with nothing to learn",
    "replacement_characters": "rows with U+FFFD, which replaces lost characters",
    "byte_order_marks": "rows with U+FEFF in them, a byte order mark, as files have that were joined",
    "mojibake": "rows with passages that were decoded with a wrong encoding",
    "special_tokens": "rows that spell special tokens (they are learned as ordinary text)",
}
"""The counters of rows as text."""

_SCRIPTS = {
    "han": re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"),
    "latin": re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]+"),
    "kana": re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]+"),
    "hangul": re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+"),
}
_WAY_OUT = " (join it to a field that is read, or list it in ignored_columns)"

_LETTERS = re.compile(r"[^\W\d_]+")
SCRIPTS = (*_SCRIPTS, "other")
"""Chinese characters, Latin letters, Japanese kana, Korean hangul, letters of anything else."""

_SPECIAL = re.compile(
    r"<\|(?:system|user|assistant|observation|endoftext|begin_of_image|end_of_image|begin_of_video|end_of_video)\|>"
    r"|\[[gs]?MASK\]|<[se]op>|</s>|<unk>"
)

# U+FFFD in UTF-8, and uninitialised memory, decoded as GBK: well-known sequences.
_WELL_KNOWN = re.compile("锟斤拷|烫烫烫|屯屯屯")
# UTF-8 of Chinese text decoded as Latin-1 or Windows-1252: a lead byte E2 to EF and two continuation bytes.
_MISREAD = re.compile(
    r"(?:[\u00e2-\u00ef][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d"
    r"\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]{2}){2,}"
)


class Checker:
    """Inspects a stream of examples, and reports its findings; it keeps a few bytes of each.

    Args:
        bad_rows: counts the rows that are not understood.

    Attributes:
        counts: number of rows by finding (FINDINGS).
        unread: number of rows by field that is left out although it holds text.
        places: the first rows of every finding and every such field, as FILE:LINE.
    """

    def __init__(self, bad_rows: BadRows) -> None:
        self.bad_rows = bad_rows
        self.seen: set[int] = set()
        self.turns, self.source, self.target = array("i"), array("i"), array("i")
        self.formats, self.letters, self.rows_with, self.counts = Counter(), Counter(), Counter(), Counter()
        self.unread: Counter[str] = Counter()
        self.places: defaultdict[str, list[str]] = defaultdict(list)

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples, each noted before it is passed on."""
        for example in examples:
            self._note(example)
            yield example

    def report(self) -> dict[str, Any]:
        """The findings so far, ready for JSON.

        - `rows`, `bad`: numbers of rows that were understood, and that were not.
        - `formats`: rows by dataset format.
        - `turns`: percentiles of the answers in a row.
        - `characters`: percentiles of the characters of `source` (all but the answers) and `target` (all answers).
        - `scripts`: by script, its `share` of the letters, and the `rows` in which it occurs.
        - `counts`, `unread`, `places`: as the attributes.
        """
        letters = self.letters.total()
        return {
            "rows": len(self.turns),
            "bad": self.bad_rows.count,
            "formats": dict(self.formats),
            "turns": percentiles(self.turns),
            "characters": {"source": percentiles(self.source), "target": percentiles(self.target)},
            "scripts": {
                name: {"share": round(self.letters[name] / letters, 4), "rows": self.rows_with[name]}
                for name in SCRIPTS
                if self.letters[name]
            },
            "counts": dict(self.counts),
            "unread": dict(self.unread),
            "places": dict(self.places),
        }

    def is_usable(self) -> bool:
        """Whether something can be learned from any row."""
        return len(self.turns) > sum(self.counts[name] for name in ("empty", "one_sided", "without_targets"))

    def warnings(self) -> list[str]:
        """Suspicious properties of the data, one line each, with the first places."""
        found = [(self.counts[name], meaning, name) for name, meaning in FINDINGS.items() if self.counts[name]]
        found += [
            (count, f"rows whose field {name!r} holds text that is not read{_WAY_OUT}", _place_of(name))
            for name, count in self.unread.items()
        ]
        return [
            f"{count} {meaning}: {', '.join(self.places[place])}" + (", ..." if count > len(self.places[place]) else "")
            for count, meaning, place in found
        ]

    def summary(self) -> str:
        """The report as a few lines of text, without warnings."""
        report = self.report()
        counted = [f"{name} ({count})" for name, count in self.formats.items()]
        formats = ", ".join(counted if len(counted) > 1 else self.formats) or "unknown"
        lines = [f"{report['rows'] + report['bad']} rows, dataset format: {formats}"]
        if not report["rows"]:
            return lines[0]
        lines.append(f"answers in a row: {in_words(report['turns'])}")
        lines += [f"characters of the {name}: {in_words(values)}" for name, values in report["characters"].items()]
        shares = ", ".join(f"{name} {100 * found['share']:.1f} %" for name, found in report["scripts"].items())
        return "\n".join([*lines, f"letters: {shares or 'none'}"])

    def _note(self, example: Example) -> None:
        self.formats[example.dataset_format] += 1
        source, target, answers = example.said()
        self.turns.append(answers)
        self.source.append(len(source))
        self.target.append(len(target))
        text, digest = f"{source}\n{target}", example.digest
        scripts = count_scripts(text)
        self.letters.update(scripts)
        self.rows_with.update(name for name, count in scripts.items() if count)
        found = {
            "duplicates": digest in self.seen,
            example.left_out_as: True,
            "replacement_characters": "\ufffd" in text,
            "byte_order_marks": "\ufeff" in text,
            "mojibake": is_mojibake(text),
            "special_tokens": bool(special_spellings(text)),
        }
        self.seen.add(digest)
        for name in filter(found.get, FINDINGS):
            self.counts[name] += 1
            self._place(name, example)
        for name in example.unread:
            self.unread[name] += 1
            self._place(_place_of(name), example)

    def _place(self, name: str, example: Example) -> None:
        if len(self.places[name]) < _PLACES:
            self.places[name].append(example.where)


def _place_of(field: str) -> str:
    return f"unread: {field}"


def count_scripts(text: str) -> Counter[str]:
    """Letters of the text by script; digits, punctuation and white space are not counted."""
    counts = Counter({name: sum(map(len, pattern.findall(text))) for name, pattern in _SCRIPTS.items()})
    counts["other"] = max(0, sum(map(len, _LETTERS.findall(text))) - counts.total())
    return counts


def special_spellings(text: str) -> list[str]:
    """The special tokens of the family that the text spells; they are learned as ordinary text."""
    return _SPECIAL.findall(text)


def is_mojibake(text: str) -> bool:
    """Whether the text has passages that come from decoding with a wrong encoding."""
    return bool(_WELL_KNOWN.search(text)) or any(_decodes_as_utf8(match[0]) for match in _MISREAD.finditer(text))


def _decodes_as_utf8(passage: str) -> bool:
    # Windows-1252 leaves five bytes undefined; they are decoded as in Latin-1.
    data = b"".join(
        character.encode("latin-1") if ord(character) < 256 else character.encode("cp1252") for character in passage
    )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
