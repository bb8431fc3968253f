"""From examples of tasks to rows of ids: which id decides which character, and what is cut where."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import instruction_rows
import pytest
import tiny_glm4
import tiny_tokenizer
from instruction_rows import rows_of

from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.tasks.examples import Answer, MultiLabelExample, QuestionExample, TextExample, TokenExample
from chatglm_ptuning.data.tasks.heads import head_of
from chatglm_ptuning.data.tasks.heads.generation import CandidateScoring
from chatglm_ptuning.data.tasks.heads.labels import SequenceClassification
from chatglm_ptuning.data.tasks.heads.spans import QuestionAnswering, positions_of
from chatglm_ptuning.data.tasks.heads.tags import TokenClassification, labels_of, tags_of
from chatglm_ptuning.data.tasks.heads.windows import owner_of, window_starts
from chatglm_ptuning.data.tasks.read import read_examples
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

FORMATS = ("chatglm2", "chatglm3", "base", "glm4")
SENTENCES = [
    list("今天天气很好，我想去公园散步"),  # all in the vocabulary
    list("龘靐齉爩，在甲乙"),  # rare characters: bytes
    list("ＡＢＣ１２３ａ"),  # full width
    ["😀", "👨‍👩‍👧", "好", "e\u0301", "e", "\u0301"],  # emoji of several code points, combining characters
    ["New", "York", "12", "345", "3.14", "今天", "The", " ", "weather", "it's"],  # tokens of several characters
    list("春天来了  柳树\n发了芽 abc"),  # runs of white space
    ["甲", "", "乙", "\n", "\n", "丙", "", "\u3000", "\u200b", "\ufeff"],  # nothing, line feeds, invisible ones
    ["", ""],
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: tiny_tokenizer.train(folder, name) for name in FORMATS[:3]}
    return made | {"glm4": ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(folder / "glm4"))}


def tagger(tokenizer, unit, room=400, stride=16, prompt="找出下面句子里的{labels}：{text}"):
    task = replace(load_task("entities"), prompt=prompt)
    return TokenClassification(task, tokenizer, room, doc_stride=stride, token_unit=unit, echo=False)


def random_tags(count: int, seed: int) -> tuple[str, ...]:
    generator, tags, inside = random.Random(seed), [], None
    for _ in range(count):
        if inside and generator.random() < 0.5:
            tags.append(f"I-{inside}")
            continue
        inside = generator.choice([None, "PER", "LOC"])
        tags.append(f"B-{inside}" if inside else "O")
    return tuple(tags)


def round_trip(encoder, example) -> list[str]:
    """The tags that come out if every id is predicted as it is labelled."""
    windows, names = encoder.windows(example), encoder.task.tags
    for window in windows:
        assert len(window.input_ids) == len(window.spans) <= encoder.max_source_length
    labels = [labels_of(window, example, names) for window in windows]
    predicted = [["B-ORG" if label == -100 else names[label] for label in row] for row in labels]
    return tags_of(windows, predicted, len(example.tokens))


def decided(windows) -> list[int]:
    return sorted(place for window in windows for span in window.spans if span for place in range(*span))


@pytest.mark.parametrize("chat_format", ["chatglm3", "glm4"])
@pytest.mark.parametrize("room", [400, 48])
def test_tags_of_characters_round_trip_exactly(tokenizers, chat_format, room):
    encoder = tagger(tokenizers[chat_format], "characters", room, stride=7, prompt="{text}：{labels}")
    for number, tokens in enumerate(SENTENCES):
        for seed in range(4):
            example = TokenExample(id=0, tokens=tuple(tokens * 3), tags=random_tags(3 * len(tokens), seed))
            assert decided(encoder.windows(example)) == list(range(len(example.tokens))), number
            assert round_trip(encoder, example) == list(example.tags), number


@pytest.mark.parametrize("chat_format", ["chatglm3", "glm4"])
@pytest.mark.parametrize("room", [400, 64])
def test_tags_of_pieces_round_trip_except_boundaries_inside_a_piece(tokenizers, chat_format, room):
    encoder = tagger(tokenizers[chat_format], "pieces", room)
    for number, tokens in enumerate(SENTENCES[:-1]):
        for seed in range(4):
            tokens = tuple(tokens)
            example = TokenExample(id=0, tokens=tokens, tags=random_tags(len(tokens), seed))
            windows = encoder.windows(example)
            assert decided(windows) == list(range(len(tokens))), number
            expected = list(example.tags)
            for first, end in {span for window in windows for span in window.spans if span}:
                inside = "O" if expected[first] == "O" else "I-" + expected[first][2:]
                expected[first + 1 : end] = [inside] * (end - first - 1)
            assert round_trip(encoder, example) == expected, number


def test_a_text_of_characters_that_are_pieces_is_the_same_in_both_units(tokenizers):
    example = TokenExample(id=0, tokens=tuple(SENTENCES[0]), tags=random_tags(len(SENTENCES[0]), 1))
    windows = {unit: tagger(tokenizers["chatglm3"], unit).windows(example)[0] for unit in ("pieces", "characters")}
    ids = tokenizers["chatglm3"].vocabulary.encode(example.text)
    assert windows["pieces"].input_ids[-len(ids) :] == ids
    assert windows["characters"].input_ids[-len(ids) + 1 :] == ids[1:]  # without the space in front of a text
    assert [span for span in windows["pieces"].spans if span] == [(place, place + 1) for place in range(len(ids) - 1)]


def test_the_id_that_has_seen_a_whole_character_decides_it(tokenizers):
    encoder = tagger(tokenizers["chatglm3"], "pieces", prompt="{text}")
    window = encoder.windows(TokenExample(id=0, tokens=("龘", "甲")))[0]
    assert window.spans[-4:] == [None, None, (0, 1), (1, 2)]  # three bytes and a piece


def test_windows_cover_the_text_and_each_token_is_decided_where_most_is_around_it():
    assert window_starts(10, 10, 3) == [0] and window_starts(0, 10, 3) == [0]
    assert window_starts(11, 10, 3) == [0, 1]
    assert window_starts(30, 10, 4) == [0, 6, 12, 18, 20]
    assert window_starts(12, 10, 99) == [0, 1, 2]  # an overlap of all but one token at most
    for length, room, stride in [(30, 10, 4), (31, 7, 0), (100, 16, 15), (17, 16, 8)]:
        starts = window_starts(length, room, stride)
        assert starts[-1] + room == length
        assert all(right - left <= room - min(stride, room - 1) for left, right in itertools.pairwise(starts))
        for place in range(length):
            around = [min(place - start, start + room - 1 - place) for start in starts]
            assert around[owner_of(place, starts, room)] == max(around) >= 0


def test_ids_of_the_prompt_decide_no_tag(tokenizers):
    tokenizer = tokenizers["glm4"]
    encoder = tagger(tokenizer, "pieces", prompt="找出{labels}：{text}\n完")
    (window,) = encoder.windows(TokenExample(id=0, tokens=tuple("春天来了")))
    text = tokenizer.decode(window.input_ids, skip_special_tokens=True)
    assert text.strip() == "找出人名、地名、机构名：春天来了\n完"
    assert window.spans[0] is None and window.spans[-1] is None
    braces = tagger(tokenizer, "pieces", prompt="{{{text}}}是{text}，{{text}}是{{")
    (window,) = braces.windows(TokenExample(id=0, tokens=tuple("春天{text}")))
    assert tokenizer.decode(window.input_ids, skip_special_tokens=True).strip() == (
        "{春天{text}}是春天{text}，{text}是{"
    )
    with pytest.raises(ValueError, match=r"a.json:3: .*prompt .*max_source_length 5"):
        tagger(tokenizer, "pieces", 5).windows(TokenExample(id=0, tokens=("甲",), where="a.json:3"))


CONTEXT = "今天天气很好，\n我想去公园散步。  公園裡有龘字，New York 12 岁；我想去公园"


def questions(tmp_path):
    answers = [["公园散步", "我想去"], ["我想去公园"], ["很好，\n我想", "很好"], ["公園"], ["龘"], ["York 12"],
               ["没有这个", "散步"], ["去公园"], ["今"]]  # fmt: skip
    qas = [
        {"id": f"Q{number}", "question": f"第{number}问？",
         "answers": [{"text": text, "answer_start": CONTEXT.rfind(text) if number == 1 else CONTEXT.find(text)}
                     for text in texts]}
        for number, texts in enumerate(answers)
    ]  # fmt: skip
    content = {"version": "v1.0", "data": [{"paragraphs": [{"id": "P", "context": CONTEXT, "qas": qas}], "title": "T"}]}
    (tmp_path / "cmrc2018_dev.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return read_examples(load_task("cmrc2018"), tmp_path, "dev")


def text_at(example, window, positions) -> str | None:
    start, end = positions["start_positions"], positions["end_positions"]
    if start == 0:
        assert end == 0
        return None
    return example.context[window.spans[start][0] : window.spans[end][1]]


def smallest_around(window, start: int, end: int) -> int | None:
    """Length of the shortest text from the beginning of an id to the end of one not before it that has all of it."""
    spans = [(place, span) for place, span in enumerate(window.spans) if span is not None]
    return min(
        (b - a for i, (a, _) in spans for j, (_, b) in spans if j >= i and a <= start and end <= b), default=None
    )


@pytest.mark.parametrize("chat_format", ["chatglm2", "chatglm3", "glm4"])
@pytest.mark.parametrize("room", [1000, 60])
def test_answers_round_trip_through_their_positions(tokenizers, tmp_path, chat_format, room):
    encoder = QuestionAnswering(load_task("cmrc2018"), tokenizers[chat_format], room, doc_stride=20)
    encoder = replace(encoder, task=replace(encoder.task, prompt="{question}{context}答"))
    found_all = set()
    for example in questions(tmp_path):
        windows = encoder.windows(example)
        assert (len(windows) > 1) == (room == 60)
        covered = {place for window in windows for span in window.spans if span for place in range(*span)}
        assert covered == set(range(len(CONTEXT)))
        answer = next(answer for answer in example.answers if answer.start is not None)
        end = answer.start + len(answer.text)
        for window in windows:
            assert len(window.input_ids) == len(window.spans) <= room
            text = text_at(example, window, positions_of(window, example.answers))
            smallest = smallest_around(window, answer.start, end)
            assert (text is None) == (smallest is None)
            if text is not None:
                assert answer.text in text and len(text) == smallest
                found_all.add(example.id)
                if chat_format != "glm4":  # every character is a piece, or bytes
                    assert text == answer.text
    assert len(found_all) == 9


def test_a_character_of_two_ids_is_assigned_to_the_shorter_span(tokenizers):
    encoder = QuestionAnswering(load_task("cmrc2018"), tokenizers["chatglm3"])
    window = encoder.windows(QuestionExample(id=0, context="甲", question="？"))[0]
    shared = replace(window, input_ids=[1] * 5, spans=[None, (0, 1), (0, 2), (1, 2), (1, 3)])
    assert positions_of(shared, [Answer("乙", 1)]) == {"start_positions": 3, "end_positions": 3}
    crossed = replace(window, input_ids=[1] * 3, spans=[None, (0, 2), (1, 3)])
    assert positions_of(crossed, [Answer("乙", 1)]) == {"start_positions": 2, "end_positions": 2}


def test_a_row_with_a_dropped_label_is_not_learned(tokenizers):
    encoder = SequenceClassification(load_task("cmnli"), tokenizers["chatglm3"])
    left_out = TextExample(id=0, text="今天", fields={"text_pair": "明天"}, left_out=True, where="test.json:1")
    good = TextExample(id=1, text="今天", fields={"text_pair": "明天"}, label="neutral")
    assert [row["labels"] for row in rows_of(encoder, [left_out, good])] == [2]
    with pytest.raises(ValueError, match=r"1 .*nothing to learn .*test.json:1"):
        rows_of(encoder, [left_out])


def test_questions_without_a_reference_in_the_context_are_not_learned(tokenizers, caplog):
    encoder = QuestionAnswering(load_task("cmrc2018"), tokenizers["chatglm3"])
    lost = QuestionExample(id=0, context="今天", question="？", answers=(Answer("明天", None),), where="a.json: Q0")
    good = QuestionExample(id=1, context="今天", question="？", answers=(Answer("明天", None), Answer("天", 1)))
    assert positions_of(encoder.windows(lost)[0], lost.answers) == {"start_positions": 0, "end_positions": 0}
    rows, report = instruction_rows.encode_all(encoder.learn, [lost, good])
    assert len(rows) == 1 and "1 with nothing to learn (first: a.json: Q0)" in report.summary()
    with pytest.raises(ValueError, match=r"1 .*nothing to learn"):
        rows_of(encoder, [lost])
    with pytest.raises(ValueError, match=r"b.json: .*no label or answer"):
        rows_of(encoder, [QuestionExample(id=0, context="今", question="？", where="b.json")])


PAIR = TextExample(id=0, text="甲乙丙丁" * 30, fields={"text_pair": "今天有雨" * 20}, label="蕴含", where="p.json:1")


@pytest.mark.parametrize("chat_format", FORMATS)
@pytest.mark.parametrize("head", ["sequence_classification", "generation"])
def test_long_pairs_are_truncated_in_the_middle_of_each_text_and_keep_the_question(tokenizers, chat_format, head):
    task, tokenizer = load_task("inference"), tokenizers[chat_format]
    whole = head_of(task, head)(task, tokenizer).prompt_ids(PAIR)
    room = len(whole) - 130 if chat_format != "glm4" else len(whole) // 2
    ids = head_of(task, head)(task, tokenizer, room).prompt_ids(PAIR)
    assert room - 12 < len(ids) <= room
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "前提：甲乙" in text and "\n假设：今天" in text and "前提与假设的关系是（蕴含、矛盾、中立）：" in text
    assert "丙丁\n假设" in text and "有雨\n前提与" in text
    assert head_of(task, head)(task, tokenizer, len(whole)).prompt_ids(PAIR) == whole
    with pytest.raises(ValueError, match=r"p.json:1: .*prompt .*max_source_length 20"):
        head_of(task, head)(task, tokenizer, 20).prompt_ids(PAIR)


@pytest.mark.parametrize("chat_format", FORMATS)
def test_a_linear_head_reads_the_token_before_the_answer(tokenizers, chat_format):
    task, tokenizer = load_task("sentiment"), tokenizers[chat_format]
    example = TextExample(id=0, text="我想去公园", label="差评")
    (row,) = rows_of(SequenceClassification(task, tokenizer), [example])
    (learned,) = rows_of(CandidateScoring(task, tokenizer), [example])
    assert row["labels"] == 1
    assert learned["input_ids"][: len(row["input_ids"])] == row["input_ids"]
    rest = learned["input_ids"][len(row["input_ids"]) :]
    assert tokenizer.decode(rest[:-1]) == "差评" and rest[: len(rest) - 1] == tokenizer.vocabulary.encode("差评")


@pytest.mark.parametrize("chat_format", FORMATS)
@pytest.mark.parametrize("target_room", [32, 3])
def test_generation_learns_the_same_as_from_an_instruction_file(tokenizers, chat_format, target_room):
    task, tokenizer = load_task("news_topic"), tokenizers[chat_format]
    examples = [TextExample(id=i, text=text, label=label) for i, (text, label) in
                enumerate([("今天天气", "农业"), ("我想去", "体育"), ("龘 abc", "汽车")])]  # fmt: skip
    head = CandidateScoring(task, tokenizer, 400, target_room)
    rows = rows_of(head, examples)
    columns = [{"q": example.prompt(task), "a": example.answer_text(task)} for example in examples]
    expected, _ = instruction_rows.training_rows(tokenizer, columns, 400, target_room, columns=Columns("q", "a"))
    assert rows == [dict(row) for row in expected]
    if target_room == 32:
        learned = [[label for label in row["labels"] if label != -100] for row in rows]
        assert learned == [head.answer_ids(example.answer_text(task)) for example in examples]


def test_multi_label_rows_have_a_vector_of_labels(tokenizers):
    task = replace(load_task("news_topic"), multi_label=True)
    encoder = head_of(task, None)(task, tokenizers["chatglm3"])
    rows = rows_of(
        encoder,
        [MultiLabelExample(id=0, text="今", labels=("体育", "农业")), MultiLabelExample(id=1, text="天", labels=())],
    )
    assert rows[0]["labels"] == [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0] and rows[1]["labels"] == [0.0] * 10
    with pytest.raises(ValueError, match=r"head generation .*news_topic.* sequence_classification"):
        head_of(task, "generation")


def test_question_answering_refuses_a_context_before_its_question():
    task = replace(load_task("cmrc2018"), prompt="{context}问：{question}")
    with pytest.raises(ValueError, match=r"cmrc2018.yaml: .*{question} before {context}"):
        head_of(task, "question_answering").check(task)
    head_of(task, "generation").check(task)
    for prompt in ("{context}问：{question}{context}", "谁被起诉？{context}"):
        QuestionAnswering.check(replace(task, prompt=prompt))
