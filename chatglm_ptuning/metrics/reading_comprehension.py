"""Exact match and F1 of extracted answers, as CMRC2018's evaluation script (version 5) defines them for Chinese."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from nltk.tokenize import NLTKWordTokenizer

_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_HAN = re.compile("[\u4e00-\u9fa5]")
_WORDS = NLTKWordTokenizer()


def cmrc_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`cmrc_f1`, `cmrc_em` and their mean `cmrc_average` in percent, over all questions; each takes its best reference.

    An unanswered question is an empty prediction, which scores 0.

    Raises:
        ValueError: if there are no questions, the numbers differ, or a question has no reference.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions for {len(references)} questions.")
    f1 = 100 * fmean(answer_f1(text, gold) for text, gold in zip(predictions, references, strict=True))
    em = 100 * fmean(exact_match(text, gold) for text, gold in zip(predictions, references, strict=True))
    return {"cmrc_f1": f1, "cmrc_em": em, "cmrc_average": (f1 + em) / 2}


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 from 0 to 1 of the longest run of segments that prediction and reference share, with the best reference."""
    return max(_f1(_segments(prediction), _segments(reference)) for reference in _some(references))


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether it equals a reference, but for case, punctuation and white space around it."""
    return _bare(prediction) in {_bare(reference) for reference in _some(references)}


def _some(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ValueError(f"The references of a question must be a list with at least one text, found {references!r}.")
    return references


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = _longest_common_run(predicted, expected)
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def _segments(text: str) -> list[str]:
    """Every Chinese character, and the words between them; punctuation is left out.

    The script splits those words by nltk's word_tokenize. That first looks for sentences with a model which has to be
    downloaded, and then splits each as done here: it differs only where a run without Chinese holds several sentences.
    """
    segments: list[str] = []
    words = ""
    for character in text.lower().strip():
        if character in _PUNCTUATION:
            continue
        if _HAN.match(character):
            segments += [*_WORDS.tokenize(words), character]
            words = ""
        else:
            words += character
    return segments + _WORDS.tokenize(words)


def _bare(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _PUNCTUATION)


def _longest_common_run(left: list[str], right: list[str]) -> int:
    """Length of the longest run of neighbours that both have (the script calls it LCS; it is no subsequence)."""
    best, before = 0, [0] * (len(right) + 1)
    for segment in left:
        row = [0] * (len(right) + 1)
        for place, other in enumerate(right):
            if segment == other:
                row[place + 1] = before[place] + 1
                best = max(best, row[place + 1])
        before = row
    return best
