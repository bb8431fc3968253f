"""`chat` and `stream_chat`: the official results, streaming, stops, caches."""

import copy
import json
import threading
from itertools import pairwise

import pytest
import tiny_tokenizer
import torch
from tiny_chat_base import make_model, say, write_prefix
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from chatglm_ptuning.chat.turn import ChatTurn
from chatglm_ptuning.model.chat_mixin import InvalidScoreLogitsProcessor

FORMATS = ("chatglm2", "chatglm3")
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: tiny_tokenizer.train(folder, name) for name in FORMATS}


@pytest.fixture(scope="module")
def base(tokenizers):
    return make_model(len(tokenizers["chatglm3"]))


@pytest.fixture(scope="module")
def glm3(tokenizers):
    return tokenizers["chatglm3"]


@pytest.fixture(scope="module")
def prefixes(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    return {name: write_prefix(folder, folder / name, seed) for seed, name in enumerate(("ads", "qa"))}


@pytest.fixture
def prefixed(base, prefixes):
    for name, path in prefixes.items():
        base.load_prefix(path, name)
    yield base
    for name in prefixes:
        base.unload_prefix(name)


@pytest.mark.parametrize("chat_format", FORMATS)
def test_the_stream_ends_with_the_answer_of_chat(base, tokenizers, chat_format):
    tokenizer = tokenizers[chat_format]
    history = []
    for query in ("今天天气很好", "The answer?"):
        expected = base.chat(tokenizer, query, history, **GREEDY)
        *_, last = base.stream_chat(tokenizer, query, history, **GREEDY)
        assert last == expected
        history = expected[1]
    assert len(history) == {"chatglm2": 2, "chatglm3": 4}[chat_format]


@pytest.mark.parametrize("chat_format", FORMATS)
def test_sampling_streams_what_chat_samples(base, tokenizers, chat_format):
    torch.manual_seed(3)
    expected = base.chat(tokenizers[chat_format], "你是谁？", max_new_tokens=12)
    torch.manual_seed(3)
    *_, last = base.stream_chat(tokenizers[chat_format], "你是谁？", max_new_tokens=12)
    assert last == expected


def test_the_response_grows(base, glm3):
    said = say(glm3, "\n", "今天天气很好，我们去公园散步。", glm3.eos_token_id)
    responses = [response for response, _ in base.stream_chat(glm3, "你好", logits_processor=said)]
    assert responses[-1] == "今天天气很好，我们去公园散步。"
    assert len(responses) > 3
    assert all(after.startswith(before) and after != before for before, after in pairwise(responses))


def test_beam_search(base, glm3):
    response, history = base.chat(glm3, "你好", num_beams=3, **GREEDY)
    ids = ChatTurn(glm3.chat, "你好").input_ids()
    best = base.generate(torch.tensor([ids]), num_beams=3, eos_token_id=glm3.chat.stop_ids, pad_token_id=0, **GREEDY)[
        0, len(ids) :
    ]
    assert (response, history) == ChatTurn(glm3.chat, "你好").read(best.tolist())[:2]


def test_history_of_chatglm3(base, glm3):
    pairs = [("你是谁？", "我是一个小模型。")]
    messages = [
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "metadata": "", "content": "我是一个小模型。"},
    ]
    before = copy.deepcopy(messages)
    response, history = base.chat(glm3, "你好", messages, **GREEDY)
    assert messages == before
    assert history[:3] == [*messages, {"role": "user", "content": "你好"}]
    assert history[-1]["role"] == "assistant" and history[-1]["content"] == response
    assert base.chat(glm3, "你好", pairs, **GREEDY) == (response, history)


def test_history_of_chatglm2(base, tokenizers):
    pairs = [("你是谁？", "我是一个小模型。")]
    response, history = base.chat(tokenizers["chatglm2"], "你好", pairs, **GREEDY)
    assert history == [*pairs, ("你好", response)]
    assert pairs == [("你是谁？", "我是一个小模型。")]


@pytest.mark.parametrize(
    ("chat_format", "history", "role", "message"),
    [
        ("chatglm3", [{"content": "x"}], "user", r"history\[0\]"),
        ("chatglm3", [("a", "b"), ("a", "b", "c")], "user", r"history\[1\]"),
        ("chatglm2", [{"role": "user", "content": "x"}], "user", r"history\[0\].*chatglm2"),
        ("chatglm3", [], "robot", "role .*one of.*'robot'"),
        ("chatglm2", [], "observation", "role .*one of user.*'observation'"),
    ],
)
def test_other_formats_of_history_and_unknown_roles_are_refused(base, tokenizers, chat_format, history, role, message):
    with pytest.raises(ValueError, match=message):
        base.chat(tokenizers[chat_format], "你好", history, role=role)


def test_a_query_that_is_no_text_is_refused(base, tokenizers):
    with pytest.raises(ValueError, match=r"query must be a text, got \[{'type'"):
        base.chat(tokenizers["chatglm3"], [{"type": "text", "text": "你好"}])


@pytest.mark.parametrize("stop", ["</s>", "<|user|>", "<|observation|>"])
def test_stops(base, glm3, stop):
    stop_id = glm3.convert_tokens_to_ids(stop)
    said = say(glm3, "\n", "你好", stop_id, "散步")
    assert base.chat(glm3, "?", logits_processor=said)[0] == "你好"
    assert said[0].step == len(said[0].ids) - len(glm3.vocabulary.encode("散步"))
    *_, last = base.stream_chat(glm3, "?", logits_processor=say(glm3, "\n", "你好", stop_id, "散步"))
    assert last[0] == "你好"


def test_chatglm2_stops_at_eos_alone(base, tokenizers):
    tokenizer = tokenizers["chatglm2"]
    assert tokenizer.chat.stop_ids == [tokenizer.eos_token_id]
    assert base.chat(tokenizer, "?", logits_processor=say(tokenizer, "你好", tokenizer.eos_token_id))[0] == "你好"


def test_a_last_token_that_is_no_stop_is_kept(base, glm3):
    said = say(glm3, "\n", "你好")
    assert base.chat(glm3, "?", logits_processor=said, max_new_tokens=len(said[0].ids))[0] == "你好"


TOOLS = [{"name": "get_weather", "parameters": {}}, {"type": "function", "function": {"name": "查天气"}}]
SYSTEM = {"role": "system", "content": "Use the tools.", "tools": TOOLS}


@pytest.mark.parametrize(
    ("said", "history", "response"),
    [
        ("\n 你好", [], "你好"),
        ("你好", [], "你好"),
        ("你好\n天气很好", [], "你好\n天气很好"),
        ("get_weather\n```python\ntool_call(location='北京', days=3)\n```", [SYSTEM],
         {"name": "get_weather", "parameters": {"location": "北京", "days": 3}}),
        ('查天气\n{"location": "北京", "now": true}', [SYSTEM],
         {"name": "查天气", "parameters": {"location": "北京", "now": True}}),
        ("get_weather\n```python\ntool_call(location=open('x'))\n```", [SYSTEM],
         {"name": "get_weather", "content": "```python\ntool_call(location=open('x'))\n```"}),
        ("get_weather\n```python\ntool_call(", [SYSTEM],
         {"name": "get_weather", "content": "```python\ntool_call("}),
        ("interpreter\n```python\n1 + 1\n```", [], {"name": "interpreter", "content": "```python\n1 + 1\n```"}),
    ],
)  # fmt: skip
def test_metadata_and_tool_calls(base, glm3, said, history, response):
    processor = say(glm3, said, glm3.convert_tokens_to_ids("<|observation|>"))
    answer, new_history = base.chat(glm3, "?", history, logits_processor=processor)
    assert answer == response
    assert new_history[-1]["metadata"] == (response["name"] if isinstance(response, dict) else "")
    processor = say(glm3, said, glm3.convert_tokens_to_ids("<|observation|>"))
    *_, last = base.stream_chat(glm3, "?", history, logits_processor=processor)
    assert last == (answer, new_history)


def test_an_answer_of_two_messages(base, glm3):
    assistant = glm3.convert_tokens_to_ids("<|assistant|>")
    said = say(glm3, "\n", "我查天气。", assistant, "get_weather\n{}", glm3.convert_tokens_to_ids("<|observation|>"))
    response, history = base.chat(glm3, "?", [SYSTEM], logits_processor=said)
    assert response == {"name": "get_weather", "parameters": {}}
    assert [(message["metadata"], message["content"]) for message in history[2:]] == [
        ("", "我查天气。"),
        ("get_weather", "{}"),
    ]
    assert base.chat(glm3, json.dumps({"temperature": 3}), history, role="observation", **GREEDY)[1][4]["role"] == (
        "observation"
    )


@pytest.mark.parametrize("chat_format", FORMATS)
def test_text_never_becomes_special_tokens(base, tokenizers, chat_format):
    tokenizer = tokenizers[chat_format]
    text = "<|user|>[gMASK]sop<|assistant|></s>"
    plain = ChatTurn(tokenizer.chat, "x", [("y", "z")]).input_ids()
    ids = ChatTurn(tokenizer.chat, text, [(text, text)]).input_ids()
    special = set(tokenizer.vocabulary.special_ids.values()) | {tokenizer.eos_token_id}
    assert [index for index in ids if index in special] == [index for index in plain if index in special]
    said = say(tokenizer, "\n", text, tokenizer.eos_token_id)
    response, history = base.chat(tokenizer, "?", logits_processor=said)
    assert response == text
    assert len(history) == {"chatglm2": 1, "chatglm3": 2}[chat_format]


@pytest.mark.parametrize("chat_format", FORMATS)
def test_half_a_character_is_held_back(base, tokenizers, chat_format):
    tokenizer = tokenizers[chat_format]
    said = say(tokenizer, "\n", "你好", "魑魅🙂。", tokenizer.eos_token_id)
    assert any(tokenizer.vocabulary.token(index).startswith("<0x") for index in said[0].ids[2:])
    responses = [response for response, _ in base.stream_chat(tokenizer, "?", logits_processor=said)]
    assert not any("\ufffd" in response for response in responses)
    assert responses[-1].replace(" ", "") == "你好魑魅🙂。"


def test_an_answer_cut_amid_a_character(base, glm3):
    said = [*glm3.vocabulary.encode("\n你好🙂")]
    settings = {"max_new_tokens": len(said) - 1}
    expected = base.chat(glm3, "?", logits_processor=say(glm3, *said), **settings)
    responses = list(base.stream_chat(glm3, "?", logits_processor=say(glm3, *said), **settings))
    assert responses[-1] == expected
    assert [response for response, _ in responses[:-1]][-1] == "你好"


def test_an_empty_answer_is_yielded_once(base, glm3):
    said = say(glm3, glm3.eos_token_id)
    assert [response for response, _ in base.stream_chat(glm3, "?", logits_processor=said)] == [""]


def test_the_placeholder_of_the_official_bases(base, glm3):
    said = say(glm3, "\n", "到[[训练时间]]为止", glm3.eos_token_id)
    responses = [response for response, _ in base.stream_chat(glm3, "?", logits_processor=said)]
    assert responses[-1] == "到2023年为止"
    assert not any("[" in response for response in responses)


def test_no_room_for_an_answer(base, glm3):
    with pytest.raises(ValueError, match=r"leaves no room.*max_length is 4"):
        base.chat(glm3, "你好", max_length=4)
    with pytest.raises(ValueError, match="seq_length 512"):
        base.chat(glm3, "天气" * 600)


class _Spoil(LogitsProcessor):
    def __init__(self, value, after):
        self.value, self.left = value, after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            scores = scores.clone()
            scores[:, 7] = self.value
        return scores


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [True, False])
def test_broken_scores_end_the_answer(base, glm3, value, sampling):
    processors = LogitsProcessorList([_Spoil(value, after=3)])
    steps = list(base.stream_chat(glm3, "?", logits_processor=processors, do_sample=sampling))
    assert len(processors) == 1
    assert len(steps) <= 3
    assert processors[0].left == -1


def test_only_broken_rows_are_replaced():
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, float("nan"), 1.0], [float("-inf")] * 3, [float("-inf"), 0.0, 1.0]])
    cleaned = InvalidScoreLogitsProcessor(stop_id=2)(None, scores.clone())
    assert torch.equal(cleaned[[0, 3]], scores[[0, 3]])
    for row in (1, 2):
        assert cleaned[row].softmax(-1).tolist() == [0.0, 0.0, 1.0]


def test_an_untrained_prefix_is_refused(glm3):
    model = make_model(len(glm3), pre_seq_len=4)
    for call in (model.chat, lambda *args: next(model.stream_chat(*args))):
        with pytest.raises(ValueError, match="untrained"):
            call(glm3, "你好")
    model.set_prefix(None)
    model.chat(glm3, "你好", **GREEDY)


class _Fail(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("out of memory, say")


def test_errors_reach_the_caller(base, glm3):
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(base.stream_chat(glm3, "?", logits_processor=LogitsProcessorList([_Fail()])))


def test_stopping_early_leaves_nothing_behind(base, glm3):
    threads = threading.active_count()
    calls = []
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    try:
        stream = base.stream_chat(glm3, "?", logits_processor=say(glm3, "\n", "今天天气很好", glm3.eos_token_id))
        next(stream)
        assert torch.is_grad_enabled()
        assert threading.active_count() == threads
        stream.close()
        computed = len(calls)
    finally:
        handle.remove()
    assert computed < 6
    assert threading.active_count() == threads
    assert torch.is_grad_enabled()


def _count_tokens(model):
    counted = []
    return counted, model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: counted.append(inputs[0].shape[1])
    )


@pytest.mark.parametrize("chat_format", FORMATS)
def test_a_cache_saves_work_and_changes_nothing(base, tokenizers, chat_format):
    tokenizer = tokenizers[chat_format]
    history, cache = [], None
    for turn, query in enumerate(("今天天气很好", "你是谁？", "The answer is short.")):
        expected = base.chat(tokenizer, query, history, **GREEDY)
        counted, handle = _count_tokens(base)
        *_, last = base.stream_chat(
            tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **GREEDY
        )
        handle.remove()
        assert last[:2] == expected
        prompt = len(ChatTurn(tokenizer.chat, query, history).input_ids())
        assert counted[0] == prompt if turn == 0 else counted[0] < prompt
        assert last[2].get_seq_length() == prompt + len(counted) - 1
        history, cache = last[1], last[2]


def test_a_cache_of_another_conversation_is_used_for_the_shared_tokens(base, glm3):
    *_, (_, _, cache) = base.stream_chat(glm3, "今天天气很好", return_past_key_values=True, **GREEDY)
    history = [("上海", "城市")]
    expected = base.chat(glm3, "你是谁？", history, **GREEDY)
    *_, last = base.stream_chat(glm3, "你是谁？", history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    assert last[:2] == expected
    # The same question again, of which all is cached: the last token is computed all the same.
    *_, again = base.stream_chat(glm3, "你是谁？", history, past_key_values=last[2], **GREEDY)
    assert again == expected


def test_caches_from_elsewhere(base, glm3):
    expected = base.chat(glm3, "你好", **GREEDY)
    foreign = base(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    for cache in (foreign, DynamicCache(config=base.config)):
        *_, last = base.stream_chat(glm3, "你好", past_key_values=cache, **GREEDY)
        assert last == expected


def test_a_cache_after_an_answer_that_failed(base, glm3):
    *_, (_, history, cache) = base.stream_chat(glm3, "你好", return_past_key_values=True, **GREEDY)
    layer = base.transformer.encoder.layers[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(base.stream_chat(glm3, "你是谁？", history, past_key_values=cache, **GREEDY))
    handle.remove()
    *_, last = base.stream_chat(glm3, "你是谁？", history, past_key_values=cache, **GREEDY)
    assert last == base.chat(glm3, "你是谁？", history, **GREEDY)


def test_a_cache_belongs_to_one_prefix(prefixed, glm3):
    prefixed.set_prefix("ads")
    *_, (response, history, cache) = prefixed.stream_chat(glm3, "你好", return_past_key_values=True, **GREEDY)
    length = cache.get_seq_length()
    prefixed.set_prefix("qa")
    assert prefixed.chat(glm3, "你好", **GREEDY)[0] != response
    with pytest.raises(ValueError, match=r"'ads'.*'qa'"):
        list(prefixed.stream_chat(glm3, "你是谁？", history, past_key_values=cache, **GREEDY))
    assert cache.get_seq_length() == length  # still whole for its own prefix
