"""What a text is written in, and signs that it was spoilt on its way."""

from __future__ import annotations

import re
from collections import Counter

_SCRIPTS = {
    "han": re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"),
    "latin": re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]+"),
    "kana": re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]+"),
    "hangul": re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+"),
}
_LETTERS = re.compile(r"[^\W\d_]+")
SCRIPTS = (*_SCRIPTS, "other")
"""Chinese characters, Latin letters, Japanese kana, Korean hangul, letters of anything else."""

_SPECIAL = re.compile(
    r"<\|(?:system|user|assistant|observation|endoftext|begin_of_image|end_of_image|begin_of_video|end_of_video)\|>"
    r"|\[[gs]?MASK\]|<[se]op>|</s>|<unk>"
)

# GBK text of U+FFFD and of uninitialised memory, which has become proverbial.
_PROVERBIAL = re.compile("锟斤拷|烫烫烫|屯屯屯")
# UTF-8 of Chinese text that was read as Latin-1 or Windows-1252: a lead byte E2 to EF and two of continuation.
_MISREAD = re.compile(
    r"(?:[\u00e2-\u00ef][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d"
    r"\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]{2}){2,}"
)


def count_scripts(text: str) -> Counter[str]:
    """Letters of the text by script; digits, punctuation and white space belong to none."""
    counts = Counter({name: sum(map(len, pattern.findall(text))) for name, pattern in _SCRIPTS.items()})
    counts["other"] = max(0, sum(map(len, _LETTERS.findall(text))) - counts.total())
    return counts


def special_spellings(text: str) -> list[str]:
    """Places that spell a special token of the family; they are learned as ordinary text."""
    return _SPECIAL.findall(text)


def is_mojibake(text: str) -> bool:
    """Whether the text has passages that only reading in a wrong encoding makes."""
    return bool(_PROVERBIAL.search(text)) or any(_decodes_as_utf8(match[0]) for match in _MISREAD.finditer(text))


def _decodes_as_utf8(passage: str) -> bool:
    # Windows-1252 leaves five bytes undefined, which then stand as they do in Latin-1.
    data = b"".join(
        character.encode("latin-1") if ord(character) < 256 else character.encode("cp1252") for character in passage
    )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
