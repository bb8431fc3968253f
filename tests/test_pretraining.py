"""What chatglm-nano is trained on: judgements in texts, and rows that hold several samples."""

import random

import pytest
import torch

from chatglm_ptuning.pretraining.instructions import blank_opinion, judgements, opinion, praise_or_blame
from chatglm_ptuning.pretraining.run import labels_of, mask_of


def test_a_word_that_a_negation_turns_round_is_no_judgement():
    words = [match.group() for match in judgements("不喜欢颜色，不是很好，谁会推荐？但是客服让人满意")]
    assert words == ["不喜欢", "满意"]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("房间干净，下次还来", {"喜欢", "夸奖", "正面", "值得买", "高兴"}),
        ("用了两天就坏，太差了", {"不喜欢", "抱怨", "负面", "不值得买", "生气"}),
    ],
)
def test_a_text_that_points_one_way_is_praise_or_blame(text, answers):
    given = [praise_or_blame(text, random.Random(seed), "") for seed in range(60)]
    assert {answer for _, answer in given} == answers
    assert all(answer in question.replace(text, "") for question, answer in given)


def test_a_text_that_points_both_ways_is_neither():
    assert praise_or_blame("房间干净，早餐太差", random.Random(0), "") is None


def test_the_answer_is_not_left_in_the_question():
    text = "房间干净，早餐太差，离地铁近"
    question, answer = blank_opinion(text, random.Random(0), "")
    assert answer == "干净" and "房间____，早餐____，离地铁近" in question
    for seed in range(20):
        question, answer = opinion(text, random.Random(seed), "")
        assert answer in ("干净", "太差", "房间干净，", "早餐太差，")
        assert answer not in question


def test_a_sample_sees_itself_alone_and_predicts_no_other():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    seen = mask_of(positions)[0, 0]
    assert seen.tolist() == [
        [row >= column and (row < 3) == (column < 3) and (row == 5) == (column == 5) for column in range(6)]
        for row in range(6)
    ]
    assert labels_of(torch.tensor([[7, 8, 9, 7, 8, 0]]), positions).tolist() == [[-100, 8, 9, -100, 8, -100]]
