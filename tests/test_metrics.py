"""Scores against the libraries used directly, as the official recipe uses them, and against sums done by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jieba
import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from chatglm_ptuning.metrics import generation
from chatglm_ptuning.metrics.generation import label_set

PAIRS = [
    ("这款连衣裙采用修身版型，显瘦又百搭。", "这条连衣裙是修身的版型，穿上显瘦，非常百搭。"),
    ("宽松的卫衣，适合秋天穿着。", "宽松版型的卫衣，在秋天里穿着舒适。又暖又轻！"),
    ("今天天气很好", "今天天气很好"),
    ("abc def 手机，屏幕 6.7 英寸", "手机的屏幕为 6.7 英寸"),
    ("完全无关", "北京大学"),
]


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    return generation.score(predictions, references)[0]


def official_scores(predictions: list[str], references: list[str]) -> dict[str, float]:
    """The computation of the official evaluation: one Rouge per pair, rounded, then numpy's mean."""
    kept = {"rouge-1": [], "rouge-2": [], "rouge-l": [], "bleu-4": []}
    for prediction, reference in zip(predictions, references, strict=True):
        rouge = Rouge().get_scores(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference)))
        for name, value in rouge[0].items():
            kept[name].append(round(value["f"] * 100, 4))
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
        kept["bleu-4"].append(round(bleu * 100, 4))
    return {name: float(np.mean(values)) for name, values in kept.items()}


def test_agrees_with_the_official_computation():
    predictions, references = [left for left, _ in PAIRS], [right for _, right in PAIRS]
    ours, official = score(predictions, references), official_scores(predictions, references)
    assert {name: ours[name] for name in official} == pytest.approx(official, abs=1e-9)
    assert "accuracy" not in ours and "macro_f1" not in ours


def test_by_hand():
    # 我 爱 北京 / 我 爱 上海: two of three words, one of two pairs of words; no white space inside words.
    assert jieba.lcut("我爱北京") == ["我", "爱", "北京"] and jieba.lcut("我爱上海") == ["我", "爱", "上海"]
    scores = score(["我爱北京"], ["我爱上海"])
    assert scores["rouge-1"] == pytest.approx(100 * 2 / 3, abs=1e-3)
    assert scores["rouge-2"] == pytest.approx(50, abs=1e-3)
    assert scores["rouge-l"] == pytest.approx(100 * 2 / 3, abs=1e-3)
    # Characters: 2/4, 1/3, then no match of 2 and of 1 -> 1/(2*2) and 1/(4*1); equal lengths, so no brevity penalty.
    assert scores["bleu-4"] == pytest.approx(100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25, abs=1e-3)
    # Words: 2/3, 1/2, 0 of 1 -> 1/2, 0 of none -> 1/4.
    assert scores["bleu-4-word"] == pytest.approx(100 * (2 / 3 * 1 / 2 * 1 / 2 * 1 / 4) ** 0.25, abs=1e-3)
    assert scores["exact_match"] == 0


def test_equal_texts_score_full():
    text = "今天天气很好，适合出门走走"
    scores = score([text], [text])
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu-4-word", "exact_match"):
        assert scores[name] == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("empty", ["", " ", "\n\n", "\u3000"])
def test_empty_texts_score_zero_and_count(empty: str):
    full = score(["今天天气很好"], ["今天天气很好"])
    both = score(["今天天气很好", empty, "天气"], ["今天天气很好", "天气", empty])
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu-4-word", "exact_match"):
        assert both[name] == pytest.approx(full[name] / 3)


@pytest.mark.parametrize("odd", ["。", "。。。。。。", "……", "\n。\n", "？”", "\u200b", "😀", " \n好", "[MASK]"])
def test_odd_texts_do_not_crash(odd: str):
    assert all(0 <= value <= 100.001 for value in score([odd, "好", odd], ["好", odd, odd]).values())


def test_labels_by_hand():
    references = ["积极", "积极", "积极", "消极", "消极", "消极"]
    predictions = ["积极 ", "积极", "消极", "消极", "不知道", "积极"]
    scores = score(predictions, references)
    assert scores["accuracy"] == scores["exact_match"] == pytest.approx(50)
    # 积极: precision 2/3, recall 2/3; 消极: precision 1/2, recall 1/3 -> 2/5.
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 5) / 2)


def test_a_label_never_predicted_lowers_the_macro_f1():
    scores = score(["是"] * 10, ["是"] * 8 + ["否"] * 2)
    assert scores["accuracy"] == pytest.approx(80)
    assert scores["macro_f1"] == pytest.approx(100 * (16 / 18) / 2)


@pytest.mark.parametrize(
    ("references", "labels"),
    [
        (["正面", "负面", "正面", "负面 "], ["正面", "负面"]),
        (["体育"] * 10 + ["财经"] * 9 + ["军事"], ["体育", "军事", "财经"]),  # one rare label among twenty rows
        (["正面", "正面", "正面"], None),  # one answer alone
        (["张三", "李四", "北京", "上海", "无", "无"], None),  # short, but seldom repeated
        (["正面", "正面", "", ""], None),
        (["甲" * 21, "甲" * 21, "乙", "乙"], None),
        (["一\n二", "一\n二", "三", "三"], None),
        ([str(number) for number in range(201)] * 2, None),
    ],
)
def test_label_set(references: list[str], labels: list[str] | None):
    assert label_set(references) == labels


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"2 predictions .*1 references"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"0 predictions .*0 references"):
        score([], [])


def test_jieba_is_quiet():
    program = "from chatglm_ptuning.metrics.generation import score; score(['你好'], ['你好'])"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == done.stderr == ""
