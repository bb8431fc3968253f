"""`ChatSession` and `find_latest_prefix`."""

import os

import pytest
import torch
from tiny_chat_base import write_base, write_prefix

from chatglm_ptuning.chat.turn import ChatTurn
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.prefix.latest import find_latest_prefix
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


def _session(model, tokenizer, **settings):
    return ChatSession(model, tokenizer, **{"max_new_tokens": 12, "do_sample": False, **settings})


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
def test_turns_are_those_of_chat(model, folder, chat_format):
    tokenizer = load_tokenizer(str(folder / "base"))
    tokenizer.chat_format = chat_format
    session = _session(model, tokenizer)
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


def test_prefixes_switch_between_turns(model, tokenizer):
    session = _session(model, tokenizer)
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


def test_sessions_share_a_model(model, tokenizer):
    sessions = {name: _session(model, tokenizer) for name in ("ads", "qa")}
    histories = {name: [] for name in sessions}
    for name, session in sessions.items():
        session.switch_prefix(name)
    for query in QUERIES:
        for name, session in sessions.items():
            answer = "".join(session.stream(query))
            model.set_prefix(name)
            expected, histories[name] = _chat(model, tokenizer, query, histories[name])
            assert answer == expected


def test_answers_of_several_sessions_may_be_interleaved(model, tokenizer):
    model.set_prefix(None)
    sessions, expected = {}, {}
    for name in ("ads", "qa", None):
        sessions[name] = _session(model, tokenizer)
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
    session = _session(model, tokenizer)
    assert session.prefix == "task"
    list(session.stream("你好"))
    model.load_prefix(folder / "qa", "task")
    expected, _ = _chat(model, tokenizer, "你是谁？", session.history)
    assert "".join(session.stream("你是谁？")) == expected


def test_clear(model, tokenizer):
    session = _session(model, tokenizer)
    first = "".join(session.stream("你好"))
    list(session.stream("你是谁？"))
    session.clear()
    assert session.history == []
    assert "".join(session.stream("你好")) == first


def test_the_oldest_turns_are_dropped(model, tokenizer):
    room = model.config.seq_length - 12
    session = _session(model, tokenizer)
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


def test_the_system_message_stays(model, tokenizer):
    session = _session(model, tokenizer)
    system = {"role": "system", "content": "你好"}
    session.history = [system]
    for number in range(8):
        list(session.stream(f"{number} " + "今天天气很好。" * 20))
    assert session.history[0] == system
    assert session.history[1]["role"] == "user" and not session.history[1]["content"].startswith("0 ")


def test_an_answer_stopped_early_stays_in_the_history(model, tokenizer):
    session = _session(model, tokenizer)
    stream = session.stream("你好")
    piece = next(stream)
    stream.close()
    partial = session.history
    assert partial[0]["content"] == "你好" and partial[1]["content"] == piece
    expected, history = _chat(model, tokenizer, "你是谁？", partial)
    assert "".join(session.stream("你是谁？")) == expected
    assert session.history == history


def test_an_error_in_the_middle(model, tokenizer):
    session = _session(model, tokenizer)
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == 6:
            raise RuntimeError("out of memory, say")

    handle = model.transformer.encoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(session.stream("你好"))
    handle.remove()
    expected, _ = _chat(model, tokenizer, "你是谁？", session.history)
    assert "".join(session.stream("你是谁？")) == expected


def test_sampling_settings(model, tokenizer):
    torch.manual_seed(5)
    expected, _ = model.chat(tokenizer, "你好", top_p=0.5, temperature=2.0, max_new_tokens=12)
    session = _session(model, tokenizer, do_sample=True, top_p=0.5, temperature=2.0)
    torch.manual_seed(5)
    assert "".join(session.stream("你好")) == expected


@pytest.mark.parametrize("number", [0, 512])
def test_max_new_tokens_must_fit(model, tokenizer, number):
    with pytest.raises(ValueError, match=rf"1 to 511 \(seq_length - 1\).* {number}"):
        ChatSession(model, tokenizer, max_new_tokens=number)
    assert ChatSession(model, tokenizer).max_new_tokens == 256


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
