"""Exact match and F1 of extracted answers, as CMRC2018's evaluation script (version 5) defines them for Chinese."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from nltk.tokenize import NLTKWordTokenizer

_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_HAN = re.compile("[\u4e00-\u9fa5]")
_WORDS = NLTKWordTokenizer()


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 from 0 to 1 of the longest run of segments that prediction and reference share, for the best reference."""
    return max(_f1(_segments(prediction), _segments(reference)) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether it equals a reference; case, punctuation and surrounding white space do not count."""
    return _bare(prediction) in {_bare(reference) for reference in references}


def _f1(predicted: list[str], expected: list[str]) -> float:
    # The script calls it LCS, but it is the longest common run of neighbours, not a subsequence.
    shared = SequenceMatcher(None, predicted, expected, autojunk=False).find_longest_match().size
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def _segments(text: str) -> list[str]:
    """Every Chinese character, and the words between them, without punctuation.

    The script splits those words by nltk's word_tokenize, which first detects sentences with a model that has to be
    downloaded. The result differs only where a run without Chinese holds several sentences.
    """
    segments: list[str] = []
    words = ""
    for character in _bare(text):
        if _HAN.match(character):
            segments += [*_WORDS.tokenize(words), character]
            words = ""
        else:
            words += character
    return segments + _WORDS.tokenize(words)


def _bare(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _PUNCTUATION)
