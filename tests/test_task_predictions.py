"""What every head predicts, against each row computed by itself, without padding, windows or caches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import tiny_tokenizer
import torch

from chatglm_ptuning.data.tasks.examples import (
    ChoiceExample,
    GenerationExample,
    MultiLabelExample,
    QuestionExample,
    TextExample,
    TokenExample,
)
from chatglm_ptuning.data.tasks.heads import HEADS, head_of
from chatglm_ptuning.data.tasks.heads.generation import CandidateScoring, Generation, MultipleChoice
from chatglm_ptuning.data.tasks.heads.labels import MultiLabelClassification, SequenceClassification
from chatglm_ptuning.data.tasks.heads.spans import QuestionAnswering
from chatglm_ptuning.data.tasks.heads.tags import TokenClassification
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.evaluation.inference import InferenceSettings, predict
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig

MODEL_CLASSES = {head.name: head.model_class for head in HEADS}
TEXTS = ["今天有雨", "我想去公园散步。你好吗？", "问", "天气很好，请问你今天想去公园散步吗", "甲乙丙丁戊己"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer.train(tmp_path_factory.mktemp("tokenizer"), "chatglm3")


@pytest.fixture(scope="module")
def make(tokenizer):
    """A random model with a head and a random prefix, that count as trained."""

    def model_for(head: str, num_labels: int = 2, **config):
        torch.manual_seed(0)
        model = MODEL_CLASSES[head](
            ChatGLMConfig(
                num_layers=2, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4,
                multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, seq_length=512,
                padded_vocab_size=len(tokenizer), initializer_range=0.3, pre_seq_len=3, num_labels=num_labels,
                pad_token_id=0, eos_token_id=2, **config,
            )
        ).eval()  # fmt: skip
        for parameter in (*model.transformer.prefix_encoder.parameters(), *model._heads().values()):
            parameter.data.copy_(torch.randn(parameter.shape))
        return model

    return model_for


def twice(tokenizer, ids, echo: bool) -> list[int]:
    """The ids of a window in the prompt: with echo two copies with a line feed between them."""
    return [*ids, *tokenizer.vocabulary.encode("\n"), *ids] if echo else list(ids)


def alone(model, ids):
    """The outputs for one row."""
    with torch.no_grad():
        return model(torch.tensor([ids]))


def test_sequence_classification(make, tokenizer):
    task = load_task("news_topic")
    encoder = SequenceClassification(task, tokenizer, 400)
    model = make(encoder.name, len(task.labels)).train()
    examples = [TextExample(id=i, text=text) for i, text in enumerate(TEXTS)]
    expected = []
    model.eval()
    for example in examples:
        row = alone(model, encoder.prompt_ids(example)).logits[0].softmax(-1)
        expected.append((list(task.labels)[int(row.argmax())], float(row.max())))
    model.train()
    for size in (1, 2, 8):
        found = predict(model, encoder, examples, InferenceSettings(size))
        assert [prediction.value for prediction in found] == [label for label, _ in expected]
        assert [prediction.confidence for prediction in found] == pytest.approx(
            [sure for _, sure in expected], abs=1e-5
        )
    assert model.training and len({label for label, _ in expected}) > 1


def test_multi_label_classification(make, tokenizer):
    task = replace(load_task("news_topic"), multi_label=True)
    encoder = MultiLabelClassification(task, tokenizer, 400)
    model = make(encoder.name, len(task.labels), problem_type="multi_label_classification")
    examples = [MultiLabelExample(id=i, text=text) for i, text in enumerate(TEXTS)]
    found = predict(model, encoder, examples, InferenceSettings(3))
    for example, prediction in zip(examples, found, strict=True):
        logits = alone(model, encoder.prompt_ids(example)).logits[0]
        assert prediction.value == [name for name, logit in zip(task.labels, logits, strict=True) if logit > 0]
        assert prediction.confidence == pytest.approx(float(logits.abs().sigmoid().prod()), rel=1e-3)
    # 1 row of the batch has nothing to learn.
    labels = torch.tensor([[1.0] * 5 + [0.0] * 5, [-100.0] * 10])
    ids = torch.tensor([encoder.prompt_ids(examples[0])] * 2)
    mean = model(ids[:1], labels=labels[:1]).loss.detach()
    assert float(model(ids, labels=labels).loss.detach()) == pytest.approx(float(mean), rel=1e-5)
    logits = model(ids[:1]).logits[0]
    by_hand = -torch.cat((logits[:5], -logits[5:])).sigmoid().log().mean()
    assert float(mean) == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("unit", ["characters", "pieces"])
def test_token_classification(make, tokenizer, unit, echo):
    task = replace(load_task("entities"), prompt="{text}")
    encoder = TokenClassification(task, tokenizer, 400, token_unit=unit, echo=echo)
    model = make(encoder.name, len(task.tags))
    examples = [TokenExample(id=i, tokens=tuple(text)) for i, text in enumerate(TEXTS)]
    start = tokenizer.build_inputs_with_special_tokens([])
    expected = []
    for text in TEXTS:
        ids = tokenizer.vocabulary.encode(text)  # a space, and then each character
        ids = ids if unit == "pieces" else ids[1:]
        rows = alone(model, [*start, *twice(tokenizer, ids, echo)]).logits[0].softmax(-1)[-len(text) :]
        expected.append(([task.tags[int(row.argmax())] for row in rows], float(rows.max(-1).values.min())))
    for size in (1, 2, 8):
        found = predict(model, encoder, examples, InferenceSettings(size))
        assert [prediction.value for prediction in found] == [tags for tags, _ in expected]
        assert [prediction.confidence for prediction in found] == pytest.approx(
            [sure for _, sure in expected], abs=1e-5
        )


@pytest.mark.parametrize("echo", [False, True])
def test_each_tag_of_a_long_text_is_from_the_window_that_shows_most_around_it(make, tokenizer, echo):
    task = replace(load_task("entities"), prompt="{text}")
    model = make("token_classification", len(task.tags))
    text = "".join(TEXTS) * 2
    start = tokenizer.build_inputs_with_special_tokens([])
    ids, room, overlap = tokenizer.vocabulary.encode(text)[1:], 12, 5
    length = len(start) + len(twice(tokenizer, ids[:room], echo))
    encoder = TokenClassification(task, tokenizer, length, token_unit="characters", echo=echo)
    encoder = replace(encoder, doc_stride=overlap)
    begins = sorted({*range(0, len(ids) - room, room - overlap), len(ids) - room})
    rows = {
        begin: alone(model, [*start, *twice(tokenizer, ids[begin : begin + room], echo)]).logits[0, -room:]
        for begin in begins
    }
    expected = []
    for place in range(len(ids)):
        begin = max((b for b in begins if b <= place < b + room), key=lambda b: min(place - b, b + room - 1 - place))
        expected.append(task.tags[int(rows[begin][place - begin].argmax())])
    (found,) = predict(model, encoder, [TokenExample(id=0, tokens=tuple(text))], InferenceSettings(2))
    assert found.value == expected


@pytest.mark.parametrize("echo", [False, True])
def test_the_best_span_over_all_windows_is_predicted(make, tokenizer, echo):
    task = replace(load_task("cmrc2018"), prompt="{question}：{context}")
    model = make("question_answering")
    contexts = ["".join(TEXTS), "今天天气", "龘甲乙" * 5, "问" * 30, "".join(reversed(TEXTS)) * 2]
    examples = [QuestionExample(id=i, context=context, question="你是谁") for i, context in enumerate(contexts)]
    start = [*tokenizer.build_inputs_with_special_tokens([]), *tokenizer.vocabulary.encode("你是谁：")]
    room, overlap = 20, 8
    for longest in (3, 50):
        expected = []
        for context in contexts:
            ids, places = tokenizer.vocabulary.encode(context), tokenizer.vocabulary.offsets(context)
            last = max(len(ids) - room, 0)
            spans = []
            for begin in sorted({*range(0, last, room - overlap), last}):
                window = ids[begin : begin + room]
                row = [*start, *twice(tokenizer, window, echo)]
                output = alone(model, row)
                starts, ends = output.start_logits[0].softmax(-1), output.end_logits[0].softmax(-1)
                inside = [p for p in range(begin, min(begin + room, len(ids))) if places[p][1] > places[p][0]]
                for left, right in itertools.combinations_with_replacement(inside, 2):
                    first, end = places[left][0], places[right][1]
                    if end - first <= longest:
                        at = len(row) - len(window) - begin
                        spans.append((float(starts[left + at] * ends[right + at]), context[first:end]))
            expected.append(max(spans))
        length = len(start) + len(twice(tokenizer, range(room), echo))
        encoder = QuestionAnswering(task, tokenizer, length, doc_stride=overlap, echo=echo, max_answer_length=longest)
        for size in (1, 3):
            found = predict(model, encoder, examples, InferenceSettings(size))
            assert [prediction.value for prediction in found] == [text for _, text in expected]
            sure = [prediction.confidence for prediction in found]
            assert sure == pytest.approx([value for value, _ in expected], rel=1e-3)


def log_likelihood(model, prompt, answer) -> float:
    logits = alone(model, [*prompt, *answer]).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, index]) for place, index in enumerate(answer))


@pytest.mark.parametrize("kind", ["labels", "candidates"])
@pytest.mark.parametrize("how", ["sum", "mean", "calibrated"])
def test_candidate_scores_equal_those_computed_by_hand(make, tokenizer, kind, how):
    if kind == "labels":
        task = load_task("news_topic")
        task = replace(
            task, labels=dict(zip(task.labels, ["今天", "我想去公园", "问", "甲乙", "甲乙丙", "雨"] * 2, strict=False))
        )
        examples = [TextExample(id=i, text=text) for i, text in enumerate(TEXTS)]
        empty = [replace(example, text="") for example in examples]
        texts = [list(task.labels.values())] * len(examples)
        encoder = CandidateScoring(task, tokenizer, 400)
    else:
        task = load_task("c3")
        texts = [["今天", "有雨", "我想去公园"], ["甲", "甲乙丙丁"], ["问", "答", "你好吗", "雨"]]
        examples = [
            ChoiceExample(id=i, candidates=tuple(row), context=TEXTS[i], question="请问") for i, row in enumerate(texts)
        ]
        empty = [replace(example, context="", question="") for example in examples]
        encoder = MultipleChoice(task, tokenizer, 400)
    model = make(encoder.name)
    header = tokenizer.vocabulary.encode("\n")
    expected = []
    for example, without, answers in zip(examples, empty, texts, strict=True):
        scores = []
        answers = list("ABCD"[: len(answers)]) if task.letters else answers
        for answer in answers:
            ids = [*header, *tokenizer.vocabulary.encode(answer), tokenizer.eos_token_id]
            score = log_likelihood(model, encoder.prompt_ids(example), ids)
            if how == "mean":
                score /= len(ids)
            elif how == "calibrated":
                score -= log_likelihood(model, encoder.prompt_ids(without), ids)
            scores.append(score)
        row = torch.tensor(scores).softmax(-1)
        best = int(row.argmax())
        expected.append((list(task.labels)[best] if kind == "labels" else best, float(row[best])))
    for size in (1, 2):
        found = predict(model, replace(encoder, candidate_scores=how), examples, InferenceSettings(size))
        assert [prediction.value for prediction in found] == [value for value, _ in expected]
        assert [prediction.confidence for prediction in found] == pytest.approx(
            [sure for _, sure in expected], rel=1e-3
        )


def test_written_answers_are_those_of_generate(make, tokenizer):
    encoder = Generation(load_task("adgen"), tokenizer, 400)
    model = make("generation")
    examples = [GenerationExample(id=i, text=text) for i, text in enumerate(TEXTS[:3])]
    found = predict(model, encoder, examples, InferenceSettings(2, max_new_tokens=6))
    for example, prediction in zip(examples, found, strict=True):
        prompt = encoder.prompt_ids(example)
        for _ in range(6):
            index = int(alone(model, prompt).logits[0, -1].argmax())
            prompt = [*prompt, index]
            if index == tokenizer.eos_token_id:
                break
        written = tokenizer.decode(prompt[len(encoder.prompt_ids(example)) :], skip_special_tokens=True)
        assert prediction.value.strip() == written.strip() and prediction.confidence is None


@pytest.mark.parametrize("head", ["sequence_classification", "token_classification", "question_answering"])
def test_an_untrained_head_refuses_to_predict(make, tokenizer, head, tmp_path):
    name = {"sequence_classification": "sentiment", "token_classification": "entities"}.get(head, "cmrc2018")
    task = load_task(name)
    trained = make(head, max(len(task.labels), 2))
    torch.manual_seed(1)
    model = MODEL_CLASSES[head](trained.config)
    encoder_values = model.transformer.prefix_encoder
    encoder_values.set_key_values(torch.randn(3, *encoder_values.kv_shape))
    with pytest.raises(ValueError, match=r"(classifier_head|qa_outputs) of ChatGLMFor\w+ .*untrained"):
        predict(model, head_of(task, head)(task, tokenizer), [], InferenceSettings())
    model.save_prefix(tmp_path / "random")
    torch.manual_seed(1)
    plain = MODEL_CLASSES[head](trained.config)
    plain.load_prefix(tmp_path / "random", name="random")
    with pytest.raises(ValueError, match="was saved untrained"):
        plain.check_prefix_is_trained()
    with torch.no_grad():
        next(iter(model._heads().values())).mul_(1.5)
    model.check_prefix_is_trained()
