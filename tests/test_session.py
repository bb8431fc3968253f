"""`ChatSession` and `find_latest_prefix`."""

import os
import time

import pytest
import torch
from tiny_chat_base import write_base, write_prefix
from transformers import GenerationConfig

from chatglm_ptuning.chat.turn import ChatTurn
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.prefix.latest import find_latest_prefix
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.request import EngineError, Generation, Token
from chatglm_ptuning.serving.session import ChatSession

QUERIES = ("今天天气很好", "你是谁？", "The answer is short.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    write_base(folder / "base")
    for seed, name in enumerate(("ads", "qa")):
        write_prefix(folder / "base", folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "base"))


@pytest.fixture(scope="module")
def loaded(folder):
    model = load_model(str(folder / "base"))
    for name in ("ads", "qa"):
        model.load_prefix(folder / name, name)
    return model


@pytest.fixture
def model(loaded):
    loaded.set_prefix(None)
    return loaded


@pytest.fixture(scope="module")
def running(loaded):
    with Engine(loaded, slots=4) as engine:
        yield engine


@pytest.fixture
def engine(model, running):
    return running


def _session(engine, tokenizer, **settings):
    return ChatSession(engine, tokenizer, **{"max_new_tokens": 12, "do_sample": False, **settings})


def _computed(model):
    """Lengths of what the model embeds from now on."""
    lengths = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    return lengths, handle


def _chat(model, tokenizer, query, history, **settings):
    return model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=12, **settings)


@pytest.mark.parametrize("chat_format", ["chatglm2", "chatglm3"])
def test_turns_are_those_of_chat(engine, model, folder, chat_format):
    tokenizer = load_tokenizer(str(folder / "base"))
    tokenizer.chat_format = chat_format
    session = _session(engine, tokenizer)
    history = []
    for query in QUERIES:
        new = len(ChatTurn(tokenizer.chat, query, history).input_ids())
        if history:  # all before the last answer, whose text may be tokenised in another way, is in the cache
            last = history[-1][0] if chat_format == "chatglm2" else history[-2]["content"]
            new -= len(ChatTurn(tokenizer.chat, last, history[: -1 if chat_format == "chatglm2" else -2]).input_ids())
        expected, history = _chat(model, tokenizer, query, history)
        lengths, handle = _computed(model)
        pieces = list(session.stream(query))
        handle.remove()
        assert "".join(pieces) == expected
        assert all(pieces) and session.history == history
        assert lengths[0] <= new


def test_prefixes_switch_between_turns(engine, model, tokenizer):
    session = _session(engine, tokenizer)
    history = []
    answers = []
    for name in (None, "ads", "qa", None):
        session.switch_prefix(name)
        answers.append("".join(session.stream("你好")))
        model.set_prefix(name)
        expected, history = _chat(model, tokenizer, "你好", history)
        assert (answers[-1], session.history) == (expected, history)
    assert len(set(answers)) > 2
    with pytest.raises(KeyError, match="'other' is loaded; loaded: ads, qa"):
        session.switch_prefix("other")
    assert session.prefix is None


def test_sessions_share_a_model(engine, model, tokenizer):
    sessions = {name: _session(engine, tokenizer) for name in ("ads", "qa")}
    histories = {name: [] for name in sessions}
    for name, session in sessions.items():
        session.switch_prefix(name)
    for query in QUERIES:
        for name, session in sessions.items():
            answer = "".join(session.stream(query))
            model.set_prefix(name)
            expected, histories[name] = _chat(model, tokenizer, query, histories[name])
            assert answer == expected


def test_answers_of_several_sessions_may_be_interleaved(engine, model, tokenizer):
    model.set_prefix(None)
    sessions, expected = {}, {}
    for name in ("ads", "qa", None):
        sessions[name] = _session(engine, tokenizer)
        sessions[name].switch_prefix(name)
        expected[name] = _chat(model, tokenizer, "你好", [], prefix=model.prefix_batch(name))[0]
    assert len(set(expected.values())) > 1
    streams, answers = {name: session.stream("你好") for name, session in sessions.items()}, dict.fromkeys(sessions, "")
    while streams:
        for name in list(streams):
            piece = next(streams[name], None)
            if piece is None:
                del streams[name]
            else:
                answers[name] += piece
    assert answers == expected
    assert model.selected_prefix is None, "sessions leave the selection alone"


def test_a_prefix_reloaded_under_the_same_name(folder, tokenizer):
    model = load_model(str(folder / "base"))
    model.load_prefix(folder / "ads", "task")
    with Engine(model, slots=1) as engine:
        session = _session(engine, tokenizer)
        assert session.prefix == "task"
        list(session.stream("你好"))
        model.load_prefix(folder / "qa", "task")
        expected, _ = _chat(model, tokenizer, "你是谁？", session.history)
        assert "".join(session.stream("你是谁？")) == expected


def test_clear(engine, model, tokenizer):
    session = _session(engine, tokenizer)
    first = "".join(session.stream("你好"))
    list(session.stream("你是谁？"))
    session.clear()
    assert session.history == []
    assert "".join(session.stream("你好")) == first


def test_the_oldest_turns_are_dropped(engine, model, tokenizer):
    room = model.config.seq_length - 12
    session = _session(engine, tokenizer)
    lengths, handle = _computed(model)
    for number in range(8):
        list(session.stream(f"{number} " + "今天天气很好。" * 20))
    handle.remove()
    assert session.history[0]["role"] == "user"
    assert session.history[-2]["content"].startswith("7 ")
    assert 2 < len(session.history) < 16
    assert max(lengths) <= room
    with pytest.raises(ValueError, match=rf" \d+ tokens.* room .*{room} "):
        list(session.stream("天" * 600))
    assert session.history[-2]["content"].startswith("7 ")


def test_the_system_message_stays(engine, model, tokenizer):
    session = _session(engine, tokenizer)
    system = {"role": "system", "content": "你好"}
    session.history = [system]
    for number in range(8):
        list(session.stream(f"{number} " + "今天天气很好。" * 20))
    assert session.history[0] == system
    assert session.history[1]["role"] == "user" and not session.history[1]["content"].startswith("0 ")


def test_an_answer_stopped_early_stays_in_the_history(engine, model, tokenizer):
    session = _session(engine, tokenizer)
    stream = session.stream("你好")
    piece = next(stream)
    stream.close()
    ends_at = time.monotonic() + 20
    while engine.stats().running and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert engine.stats().running == 0
    partial = session.history
    assert partial[0]["content"] == "你好" and partial[1]["content"] == piece
    expected, history = _chat(model, tokenizer, "你是谁？", partial)
    assert "".join(session.stream("你是谁？")) == expected
    assert session.history == history


def test_an_error_in_the_middle(engine, model, tokenizer):
    session = _session(engine, tokenizer)
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == 6:
            raise RuntimeError("out of memory, say")

    handle = model.transformer.encoder.layers[1].register_forward_pre_hook(fail)
    answer = ""
    with pytest.raises(EngineError, match="RuntimeError"):
        for piece in session.stream("你好"):
            answer += piece
    handle.remove()
    assert answer and [message["content"] for message in session.history] == ["你好", answer]
    expected, _ = _chat(model, tokenizer, "你是谁？", session.history)
    assert "".join(session.stream("你是谁？")) == expected


def test_sampling_settings(engine, model, tokenizer):
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        session = _session(engine, tokenizer, do_sample=True, top_p=0.9, temperature=2.0)
        drawn.append("".join(session.stream("你好")))
    assert drawn[0] == drawn[1] != drawn[2]


def _canned(engine, monkeypatch, ids):
    """Makes the engine answer these ids; returns the settings of all requests."""
    asked = []

    def submit(prompt_ids, settings, prefix):
        asked.append(settings)
        generation = Generation(len(prompt_ids))
        for index in ids:
            generation.put(Token(index))
        generation.finish("stop")
        return generation

    monkeypatch.setattr(engine, "submit", submit)
    return asked


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        ({}, {}, (0.8, 0.8, 50, 1.0)),
        ({}, {"temperature": 0.3, "top_p": 0.6, "top_k": 7, "repetition_penalty": 1.1}, (0.3, 0.6, 7, 1.1)),
        ({"temperature": 2.0, "top_p": 0.5}, {"temperature": 0.3, "top_p": 0.6}, (2.0, 0.5, 50, 1.0)),
        ({"do_sample": False, "top_p": 0.5}, {"repetition_penalty": 1.1}, (0.0, 1.0, 0, 1.1)),
        ({"do_sample": None}, {"do_sample": False}, (0.0, 1.0, 0, 1.0)),
    ],
)
def test_the_base_gives_the_settings_that_are_not_given(engine, model, tokenizer, monkeypatch, given, own, expected):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**own))
    asked = _canned(engine, monkeypatch, [])
    list(ChatSession(engine, tokenizer, **given).stream("你好"))
    (settings,) = asked
    assert (settings.temperature, settings.top_p, settings.top_k, settings.repetition_penalty) == expected
    assert settings.max_new_tokens == 256
    assert set(settings.stop_ids) == set(tokenizer.chat.stop_ids)


def test_a_tool_call_is_shown_and_kept(engine, tokenizer, monkeypatch):
    tools = [{"name": "weather", "description": "", "parameters": {}}]
    said, call = "我看看。", "weather\n```python\ntool_call(city='北京')\n```"
    encode, between = tokenizer.vocabulary.encode, tokenizer.chat.next_message_id
    _canned(engine, monkeypatch, [*encode(f"\n {said}"), between, *encode(call)])
    session = _session(engine, tokenizer)
    session.history = [{"role": "system", "content": "", "tools": tools}]
    pieces = list(session.stream("天气？"))
    assert "".join(pieces) == f"{said}\n{call}" and len(pieces) > 3
    kept = [(one["role"], one.get("metadata", ""), one["content"]) for one in session.history[1:]]
    assert kept == [
        ("user", "", "天气？"),
        ("assistant", "", said),
        ("assistant", "weather", call.removeprefix("weather\n")),
    ]


def test_an_untrained_prefix_never_answers(folder, tokenizer):
    model = load_model(str(folder / "base"), pre_seq_len=4)
    model.set_prefix("default")
    with Engine(model, slots=1) as engine, pytest.raises(ValueError, match="untrained"):
        list(_session(engine, tokenizer).stream("你好"))


def test_a_long_prefix_takes_room_from_the_conversation(folder, tokenizer, loaded):
    with Engine(loaded, slots=1, slot_tokens=100) as engine:
        session = _session(engine, tokenizer)
        session.switch_prefix("ads")
        with pytest.raises(ValueError, match=rf"room for {100 - 4 - 12} .*context length of {100 - 4} .*12"):
            list(session.stream("天气" * 100))


@pytest.mark.parametrize("number", [0, 512])
def test_max_new_tokens_must_fit(engine, tokenizer, number):
    with pytest.raises(ValueError, match=rf"1 to 511 \(.*context length - 1\).* {number}"):
        ChatSession(engine, tokenizer, max_new_tokens=number)
    assert ChatSession(engine, tokenizer).max_new_tokens == 256


def _write(folder, time, weights=b"x"):
    folder.mkdir(parents=True)
    (folder / "prefix_config.json").write_text("{}")
    if weights is not None:
        (folder / "prefix_model.safetensors").write_bytes(weights)
    os.utime(folder / "prefix_config.json", (time, time))


def test_the_latest_prefix(tmp_path):
    assert find_latest_prefix(tmp_path / "missing") is None
    assert find_latest_prefix(tmp_path) is None
    _write(tmp_path / "unfinished" / "checkpoint-10", 100)
    _write(tmp_path / "unfinished" / "checkpoint-20", 200)
    assert find_latest_prefix(tmp_path) == tmp_path / "unfinished" / "checkpoint-20"
    _write(tmp_path / "finished", 150)
    assert find_latest_prefix(tmp_path) == tmp_path / "unfinished" / "checkpoint-20"
    _write(tmp_path / "latest", 300)
    _write(tmp_path / "latest" / "checkpoint-5", 400)
    assert find_latest_prefix(str(tmp_path)) == tmp_path / "latest"
    _write(tmp_path / "broken", 500, weights=None)
    _write(tmp_path / "empty", 600, weights=b"")
    _write(tmp_path / "deep" / "er" / "est", 700)
    (tmp_path / "file").touch()
    assert find_latest_prefix(tmp_path) == tmp_path / "latest"
