"""Scores of generated Chinese answers against the expected ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from chatglm_ptuning.metrics.classification import classification_scores

jieba.setLogLevel(logging.WARNING)

MAX_LABEL_LENGTH = 20
"""Most characters of an answer that may be a label."""
MAX_LABELS = 200
"""Most different answers that may be a label set."""


def score(predictions: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Means over all pairs, and the text scores of each pair; all in percent.

    - `rouge-1`, `rouge-2`, `rouge-l`: F of rouge-chinese over jieba's words, as in the official recipe
      (ChatGLM2-6B, ptuning/main.py), which rounds each pair's score to four digits.
    - `bleu-4`: BLEU-4 over characters with NIST's geometric smoothing (nltk's method 3), as in the same recipe.
    - `bleu-4-word`: the same over jieba's words, as in the later recipe of ChatGLM3-6B, where it is not in percent.
    - `exact_match` (means only): equality of the texts without surrounding white space.
    - `accuracy` and `macro_f1` (means only), if `label_set` detects labels in the references. Macro-F1 is the mean
      over the labels of the references; a prediction that is not a label is a miss for the expected label.

    A pair with an empty text scores 0 in ROUGE and BLEU.

    Raises:
        ValueError: if there are no pairs, or the two differ in number.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references.")
    pairs = [_pair_scores(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
    means = {name: fmean(pair[name] for pair in pairs) for name in pairs[0]}
    predicted, expected = [text.strip() for text in predictions], [text.strip() for text in references]
    means["exact_match"] = 100 * fmean(left == right for left, right in zip(predicted, expected, strict=True))
    labels = label_set(expected)
    if labels is not None:
        means |= classification_scores(predicted, expected, labels)
    return means, pairs


def label_set(references: Sequence[str]) -> list[str] | None:
    """The sorted labels if the references look like those of a classification; None if they look like free text.

    References are labels if there are between two and `MAX_LABELS` different ones, each is one non-empty line of at
    most `MAX_LABEL_LENGTH` characters, and nine in ten references occur more than once. So a rare label does no harm,
    while short free answers, which seldom repeat, are not mistaken for labels.
    """
    counts = Counter(text.strip() for text in references)
    if not 2 <= len(counts) <= MAX_LABELS:
        return None
    if not all(len(label.splitlines()) == 1 and len(label) <= MAX_LABEL_LENGTH for label in counts):
        return None
    unshared = sum(count == 1 for count in counts.values())
    return sorted(counts) if unshared * 10 <= len(references) else None


def _pair_scores(prediction: str, reference: str) -> dict[str, float]:
    if not prediction.strip() or not reference.strip():
        return dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu-4-word"), 0.0)
    predicted_words, expected_words = jieba.lcut(prediction), jieba.lcut(reference)
    rouge = Rouge().get_scores(" ".join(predicted_words), " ".join(expected_words))[0]
    scores = {name: values["f"] for name, values in rouge.items()}
    scores["bleu-4"] = _bleu_4(list(prediction), list(reference))
    scores["bleu-4-word"] = _bleu_4(predicted_words, expected_words)
    return {name: round(100 * value, 4) for name, value in scores.items()}


def _bleu_4(predicted: list[str], expected: list[str]) -> float:
    return sentence_bleu([expected], predicted, smoothing_function=SmoothingFunction().method3)
