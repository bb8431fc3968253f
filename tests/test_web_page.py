"""The chat page: conversations through plain Python, and the page itself in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from tiny_base import ANSWERS, make_prefix
from tiny_chat_base import write_base, write_prefix

from chatglm_ptuning import cli
from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import EngineError, SamplingSettings
from chatglm_ptuning.serving.engine.scheduler import Scheduler
from chatglm_ptuning.serving.keys import KeySet
from chatglm_ptuning.serving.page import command, texts
from chatglm_ptuning.serving.page.talk import Answerer, AnswerSettings, Talk

QUESTION = "今天有雨"
GREEDY = AnswerSettings("", 0.0, 1.0, 12)


@pytest.fixture(scope="module")
def prefixes(base, tmp_path_factory):
    """A folder with the prefixes long and short."""
    folder = tmp_path_factory.mktemp("prefixes")
    make_prefix(base, folder / "long", "今天天气很好")
    make_prefix(base, folder / "short", "你好")
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(str(base))


@pytest.fixture(scope="module")
def model(base):
    return load_model(str(base))


@pytest.fixture
def start(model, tokenizer, prefixes):
    """Starts an answerer; its engine has few slots."""
    with contextlib.ExitStack() as stack:

        def make(folder=prefixes, **changes) -> Answerer:
            settings = {"slots": 2, "queue_limit": 4, "prefix_source": PrefixFolder(folder)}
            engine = Engine(model, **settings | changes)
            return Answerer(stack.enter_context(engine), tokenizer.chat)

        yield make


@pytest.fixture(scope="module")
def chat(base, tokenizer, prefixes):
    """The answer of the official `chat`, greedily."""
    own = load_model(str(base))
    for name in ("long", "short"):
        own.load_prefix(prefixes / name, name)

    def ask(question: str, prefix: str | None, history=()) -> str:
        own.set_prefix(prefix)
        return own.chat(tokenizer, question, list(history), do_sample=False, max_new_tokens=12)[0]

    return ask


def ask(answerer, talk, question=QUESTION, prefixes=(None,), settings=GREEDY):
    """Asks, and returns the answers."""
    for _ in answerer.ask(talk, question, prefixes, settings):
        pass
    return talk.turns[-1].answers


def history(*pairs):
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def test_an_answer_is_that_of_chat_and_grows(start, chat):
    answerer, talk = start(), Talk()
    views = []
    for _ in answerer.ask(talk, QUESTION, [None], GREEDY):
        views.append((talk.turns[0].answers[0].text, talk.is_answering))
    (answer,) = talk.turns[0].answers
    assert answer.text == chat(QUESTION, None) == ANSWERS[QUESTION]
    assert answer.finish_reason == "stop" and answer.tokens_per_second > 0
    assert all(answer.text.startswith(text) for text, _ in views)
    assert views[0] == ("", True) and views[-1] == (answer.text, False)


def test_two_prefixes_answer_side_by_side(start, chat):
    talk = Talk()
    long, short = ask(start(), talk, prefixes=("long", "short"))
    assert long.text == chat(QUESTION, "long") and short.text == chat(QUESTION, "short")
    assert long.text != short.text


def test_each_side_remembers_its_own_answers(start, chat):
    answerer, talk = start(), Talk()
    first = ask(answerer, talk, "你是谁", [None])[0].text
    long, plain = ask(answerer, talk, "问", ["long", None])
    before = history(("你是谁", first))
    assert long.text == chat("问", "long", before) and plain.text == chat("问", None, before)
    one, other = ask(answerer, talk, QUESTION, [None, None])
    assert one.text == chat(QUESTION, None, [*before, *history(("问", long.text))])
    assert other.text == chat(QUESTION, None, [*before, *history(("问", plain.text))])


def test_without_history_each_question_stands_alone(start, chat):
    answerer, talk = start(), Talk()
    ask(answerer, talk, "你是谁")
    with_history = ask(answerer, talk, "问", ["long"])[0]
    alone = ask(answerer, talk, "问", ["long"], AnswerSettings("", 0.0, 1.0, 12, with_history=False))[0]
    assert alone.text == chat("问", "long") != with_history.text


def test_the_last_question_is_answered_again_by_the_chosen_prefix(start, chat):
    answerer, talk = start(), Talk()
    ask(answerer, talk)
    for _ in answerer.ask_again(talk, ["long"], GREEDY):
        pass
    assert [turn.question for turn in talk.turns] == [QUESTION]
    assert [answer.text for answer in talk.turns[0].answers] == [chat(QUESTION, "long")]
    assert list(answerer.ask_again(Talk(), [None], GREEDY)) == []


@pytest.fixture
def endless(start, monkeypatch):
    """An answerer whose answers have 200 tokens, slowly."""
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: (time.sleep(0.005), step(self))[1])
    answerer = start()
    submit = answerer.engine.submit
    monkeypatch.setattr(
        answerer.engine, "submit", lambda ids, settings, name: submit(ids, replace(settings, stop_ids=()), name)
    )
    return answerer


LONG = replace(GREEDY, max_new_tokens=200)


def holds(condition) -> bool:
    """Waits until something holds."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_stop_ends_the_answers_and_keeps_their_text(endless):
    talk = Talk()
    for _ in endless.ask(talk, QUESTION, [None, "long"], LONG):
        if all(answer.tokens for answer in talk.turns[0].answers):
            talk.stop()
    for answer in talk.turns[0].answers:
        assert answer.finish_reason == "cancelled" and 0 < answer.tokens < 200
        assert texts.text("en", "cancelled") in texts.note("en", answer)
    assert not talk.is_answering and len(talk.said(0)) == 1


def test_leaving_the_page_ends_the_answers(endless):
    talk = Talk()
    views = endless.ask(talk, QUESTION, [None], LONG)
    next(views)
    views.close()
    assert holds(lambda: endless.engine.stats().requests.get("cancelled") == 1)
    assert talk.turns[0].answers[0].finish_reason == "cancelled" and not talk.is_answering


def test_clear_while_an_answer_runs_begins_a_new_conversation(endless):
    talk = Talk()
    views = endless.ask(talk, "你是谁", [None], LONG)
    next(views)
    talk.clear()
    assert talk.turns == [] and not talk.is_answering
    (answer,) = ask(endless, talk)
    assert answer.text.startswith(ANSWERS[QUESTION])
    assert list(views) and [turn.question for turn in talk.turns] == [QUESTION]


def test_the_system_prompt_precedes_the_conversation(start, tokenizer, model):
    answerer, talk = start(), Talk()
    prompts = []
    submit = answerer.engine.submit
    answerer.engine.submit = lambda ids, *more: (prompts.append(ids), submit(ids, *more))[1]
    ask(answerer, talk, "问", settings=AnswerSettings("甲乙", 0.0, 1.0, 4))
    said = [Message("system", "甲乙"), Message("user", "问")]
    assert prompts == [tokenizer.chat.encode_prompt(Conversation(said))]
    exported = talk.export("nano")[0]["messages"]
    assert exported[0] == {"role": "system", "content": "甲乙"}


def test_an_answer_without_text_says_so(start, tokenizer):
    answerer, talk = start(), Talk()
    submit = answerer.engine.submit
    every_id = tuple(range(answerer.engine.model.config.padded_vocab_size))
    answerer.engine.submit = lambda ids, settings, prefix: submit(ids, replace(settings, stop_ids=every_id), prefix)
    (answer,) = ask(answerer, talk)
    assert answer.text == "" and answer.error is None and answer.tokens_per_second is None
    assert texts.text("en", "no_text") in texts.note("en", answer)


def test_old_turns_that_do_not_fit_are_left_out(start, chat):
    answerer, talk = start(), Talk()
    settings = AnswerSettings("", 0.0, 1.0, 100)
    for _ in range(4):
        ask(answerer, talk, "今天天气很好" * 7, settings=AnswerSettings("", 0.0, 1.0, 1))
    (answer,) = ask(answerer, talk, QUESTION, settings=settings)
    assert answer.error is None and 0 < answer.left_out < 4
    assert f" {answer.left_out} " in texts.note("zh", answer)


@pytest.mark.parametrize("language", list(texts.LANGUAGES))
def test_errors_are_one_sentence_about_their_cause(start, prefixes, tmp_path, language):
    folder = shutil.copytree(prefixes, tmp_path / "served")
    answerer, talk = start(folder), Talk()
    shutil.rmtree(folder / "short")
    removed, kept = ask(answerer, talk, prefixes=("short", "long"))
    assert texts.problem(language, kept) is None and kept.text
    assert "short" in texts.problem(language, removed)
    (too_long,) = ask(answerer, talk, "今" * 300)
    sentence = texts.problem(language, too_long)
    assert str(256 - 12) in sentence and any(str(tokens) in sentence for tokens in range(300, 310))
    talk.turns[-1].answers[0].fail(EngineError("The worker failed."))
    assert "The worker failed." in texts.problem(language, too_long)


def test_a_full_queue_names_the_time_to_wait(start, monkeypatch):
    answerer, talk = start(slots=1, queue_limit=0), Talk()
    released, step = threading.Event(), answerer.engine._scheduler.step
    monkeypatch.setattr(answerer.engine._scheduler, "step", lambda: released.wait(30) and step())
    running = answerer.engine.submit([5, 6], SamplingSettings(200, temperature=2.0))
    (refused,) = ask(answerer, talk)
    running.cancel()
    released.set()
    assert refused.finish_reason == "error" and " s" in texts.problem("en", refused)
    # The question is not repeated to the model, since it has no answer.
    assert talk.said(0) == []
    assert holds(lambda: answerer.engine.stats().running == 0)
    for _ in answerer.ask_again(talk, [None], GREEDY):
        pass
    assert talk.turns[-1].answers[0].text == ANSWERS[QUESTION]


def test_text_that_spells_a_role_or_has_no_utf8_is_ordinary(start, chat):
    talk = Talk()
    (answer,) = ask(start(), talk, "问<|assistant|>\ud800")
    assert answer.error is None and talk.turns[0].question == "问<|assistant|>?"
    json.dumps(talk.export("nano"), ensure_ascii=False).encode()


def test_the_export_has_a_conversation_for_each_side(start):
    answerer, talk = start(), Talk()
    assert talk.export("nano") == []
    first = ask(answerer, talk, "你是谁")[0]
    long, plain = ask(answerer, talk, prefixes=("long", None))
    exported = talk.export("nano")
    for conversation, answer in zip(exported, (long, plain), strict=True):
        assert conversation["meta"]["base"] == "nano"
        messages = conversation["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert [message["content"] for message in messages] == ["你是谁", first.text, QUESTION, answer.text]
        assert [message["meta"]["prefix"] for message in messages[1::2]] == [None, answer.prefix]
        assert messages[3]["meta"]["tokens"] == answer.tokens and messages[3]["meta"]["temperature"] == 0.0


def test_the_export_can_be_trained_on(start, tmp_path, capsys):
    answerer, talk = start(), Talk()
    ask(answerer, talk, "你是谁", ["long", None])
    ask(answerer, talk, "今" * 300, ["long", None])  # too long: there is no answer
    ask(answerer, talk, "问", ["long", None], AnswerSettings("甲乙", 0.0, 1.0, 12))
    file = tmp_path / "conversation.json"
    file.write_text(json.dumps(talk.export("nano"), ensure_ascii=False, indent=2), "utf-8")
    cli.main(["data", "check", str(file)])
    said = capsys.readouterr().out
    assert "2 rows" in said and "dataset format: messages" in said and "error" not in said
    assert [len(row["messages"]) for row in talk.export("nano")] == [5, 5]


def test_the_language_is_that_of_the_browser():
    assert texts.language_of("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert texts.language_of("en-US,zh;q=0.5") == texts.language_of("") == "en"


def test_wrong_flags_are_refused(capsys):
    for flag, value in (("port", "0"), ("port", "70000"), ("slots", "0"), ("queue_limit", "-1")):
        with pytest.raises(SystemExit) as ended:
            command.main([f"--{flag}", value])
        assert ended.value.code == 2 and f"--{flag}" in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "chatglm_ptuning.serving.page.layout", raising=False)
    with pytest.raises(SystemExit) as ended:
        command.main([])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "pip install" in said and "web_demo" in said


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A base that writes long answers, and its prefixes ads and qa in a folder."""
    folder = tmp_path_factory.mktemp("page")
    write_base(folder / "base")
    for seed, name in enumerate(("ads", "qa")):
        write_prefix(folder / "base", folder / "runs" / name, seed)
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class OpenedPage:
    """The page in a browser, in the words of its visitor."""

    def __init__(self, page, engine, folder) -> None:
        self.page, self.engine, self.folder = page, engine, folder

    def choose(self, dropdown: str, name: str) -> None:
        self.page.click(f"#{dropdown} input")
        self.page.get_by_role("option", name=name, exact=True).click()

    def send(self, question: str) -> None:
        self.page.fill("#message textarea", question)
        self.page.click("#send")

    def texts_of(self, side: int, kind: str = "bot") -> list[str]:
        """The texts on a side without the lines in small print."""
        return self.page.locator(f"#chat-{side} .{kind} .message-content").all_inner_texts()

    def notes(self, side: int) -> list[str]:
        return self.page.locator(f"#chat-{side} .thought-group").all_inner_texts()

    def wait(self, condition, seconds: float = 30):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "it does not hold in time"
            self.page.wait_for_timeout(30)
        return value

    def ended(self, side: int, count: int) -> None:
        """Waits until an answer has ended: its note has a speed, and the engine is idle."""
        self.wait(lambda: len(self.notes(side)) == count and "/s" in self.notes(side)[-1])
        self.wait(lambda: self.engine.stats().running == 0)
        self.page.wait_for_timeout(300)

    def set_number(self, name: str, value: str) -> None:
        if not self.page.locator(f"#{name} input[type=number]").is_visible():
            self.page.click("#settings button")

        def is_set() -> bool:
            # A slider that has just been opened may still get its first value.
            self.page.fill(f"#{name} input[type=number]", value)
            self.page.press(f"#{name} input[type=number]", "Tab")
            self.page.wait_for_timeout(300)
            return self.page.input_value(f"#{name} input[type=number]") == value

        self.wait(is_set)


@pytest.fixture
def opened(served, browser, tmp_path, monkeypatch):
    """Opens the page of a running engine that is slow enough to be watched."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from chatglm_ptuning.serving.page.layout import launch_page

    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: (time.sleep(0.01), step(self))[1])
    runs = shutil.copytree(served / "runs", tmp_path / "runs")
    with contextlib.ExitStack() as stack:

        def open_page(language: str = "en-US", width: int = 1200, passwords=(), **flags) -> OpenedPage:
            arguments = command.WebDemoArguments(
                model_name_or_path=str(served / "base"), prefix_dir=str(runs), port=free_port(), **flags
            )
            engine, blocks = command.prepare(arguments)
            stack.enter_context(engine)
            stack.callback(blocks.close)
            launch_page(blocks, "127.0.0.1", arguments.port, 8, KeySet(passwords))
            context = browser.new_context(locale=language, viewport={"width": width, "height": 900})
            stack.callback(context.close)
            page = OpenedPage(context.new_page(), engine, runs)
            page.page.goto(f"http://127.0.0.1:{arguments.port}")
            if passwords:
                page.page.get_by_text("enter the password").wait_for()
                page.page.locator("input").nth(0).fill("anyone")
                page.page.locator("input[type=password]").fill(passwords[0])
                page.page.get_by_role("button").click()
            placeholder = "Message" if language.startswith("en") else "消息"
            page.page.wait_for_selector(f"#message textarea[placeholder*='{placeholder}']")
            return page

        yield open_page


@pytest.fixture(scope="module")
def greedy(served):
    """What each prefix answers to a question, with 40 tokens."""
    model, tokenizer = load_model(str(served / "base")), load_tokenizer(str(served / "base"))
    for name in ("ads", "qa"):
        model.load_prefix(served / "runs" / name, name)

    def answer(question: str, prefix: str | None) -> str:
        model.set_prefix(prefix)
        return model.chat(tokenizer, question, [], do_sample=False, max_new_tokens=40)[0]

    return answer


def visible(text: str) -> str:
    """A text as comparable with what a browser shows."""
    return "".join(character for character in text if character.isprintable() and not character.isspace())


class TestWhoMayUseThePage:
    @pytest.fixture(autouse=True)
    def no_password(self, monkeypatch):
        monkeypatch.delenv("CHATGLM_PTUNING_PASSWORD", raising=False)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
    def test_another_address_needs_a_password(self, host, monkeypatch, tmp_path):
        with pytest.raises(ValueError, match=r"--password_file.*--no_password"):
            command.WebDemoArguments(host=host).passwords()
        assert command.WebDemoArguments(host=host, no_password=True).passwords() == []
        (tmp_path / "passwords").write_text("a\nb\n")
        arguments = command.WebDemoArguments(host=host, password_file=str(tmp_path / "passwords"))
        monkeypatch.setenv("CHATGLM_PTUNING_PASSWORD", "c")
        assert arguments.passwords() == ["a", "b", "c"]

    def test_the_own_address_needs_none(self):
        assert command.WebDemoArguments(host="127.0.0.1").passwords() == []

    def test_the_command_refuses_an_open_page(self, capsys):
        pytest.importorskip("gradio", reason="gradio is not installed")
        with pytest.raises(SystemExit) as ended:
            cli.main(["web_demo", "--host", "0.0.0.0"])
        assert ended.value.code == 1
        assert "--no_password" in capsys.readouterr().err

    @pytest.fixture
    def launched(self):
        """Launches an empty page with these passwords, and makes a client of it."""
        gradio = pytest.importorskip("gradio", reason="gradio is not installed")
        from chatglm_ptuning.serving.page.layout import launch_page

        with contextlib.ExitStack() as stack:

            def launch(*passwords: str) -> httpx2.Client:
                port = free_port()
                with gradio.Blocks() as blocks:
                    gradio.Markdown("inside")
                stack.callback(blocks.close)
                launch_page(blocks, "127.0.0.1", port, 1, KeySet(passwords))
                return stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}"))

            yield launch

    def test_a_visitor_must_know_a_password(self, launched):
        client = launched("secret", "other")
        assert client.get("/config").status_code == 401
        for wrong in ("", "secre", "SECRET", "secret-"):
            assert client.post("/login", data={"username": "a", "password": wrong or "-"}).status_code == 400
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "anyone", "password": "other"}).status_code == 200
        assert client.get("/config").status_code == 200

    def test_without_passwords_the_page_has_only_the_names_of_this_machine(self, launched):
        client = launched()
        for host, status in (("localhost:7860", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 400)):
            assert client.get("/config", headers={"Host": host}).status_code == status


@pytest.mark.slow
def test_a_visitor_chooses_sends_switches_compares_and_clears(opened, greedy):
    page = opened()
    page.set_number("temperature", "0")
    page.set_number("length", "40")
    page.choose("model", "ads")
    page.page.evaluate(
        "() => { window.seen = new Set(); new MutationObserver(() => window.seen.add("
        "document.querySelector('#chat-0').innerText.length)).observe(document.querySelector('#chat-0'), "
        "{childList: true, subtree: true, characterData: true}); }"
    )
    page.send(QUESTION)
    page.ended(0, 1)
    assert page.page.evaluate("window.seen.size") > 3  # it came piece by piece
    assert page.page.input_value("#message textarea") == ""
    assert page.texts_of(0, "user") == [QUESTION]
    assert visible(page.texts_of(0)[0]) == visible(greedy(QUESTION, "ads"))
    assert "ads" in page.notes(0)[0] and "tokens/s" in page.notes(0)[0]

    page.choose("model", "qa")
    page.page.click("#again")
    page.wait(lambda: page.notes(0)[0].startswith("qa"))
    page.ended(0, 1)
    assert visible(page.texts_of(0)[0]) == visible(greedy(QUESTION, "qa"))

    page.choose("other", "plain base (no prefix)")
    page.page.wait_for_selector("#chat-1", state="visible")
    page.page.click("#again")
    page.wait(lambda: page.notes(1) and page.notes(1)[0].startswith("plain base"))
    page.ended(1, 1)
    assert visible(page.texts_of(0)[0]) == visible(greedy(QUESTION, "qa"))
    assert visible(page.texts_of(1)[0]) == visible(greedy(QUESTION, None))

    with page.page.expect_download() as download:
        page.page.click("#export")
    exported = json.loads(Path(download.value.path()).read_text("utf-8"))
    sides = [conversation["messages"][1] for conversation in exported]
    assert [side["meta"]["prefix"] for side in sides] == ["qa", None]
    assert sides[0]["content"] == greedy(QUESTION, "qa")

    page.page.click("#clear")
    page.wait(lambda: not page.texts_of(0, "user") and not page.texts_of(1, "user"))
    page.choose("other", "nothing")
    page.page.wait_for_selector("#chat-1", state="hidden")


@pytest.mark.slow
def test_a_visitor_with_a_password_gets_answers(opened, greedy):
    page = opened(passwords=["secret"])
    page.set_number("temperature", "0")
    page.set_number("length", "40")
    page.choose("model", "ads")
    page.send(QUESTION)
    page.ended(0, 1)
    assert visible(page.texts_of(0)[0]) == visible(greedy(QUESTION, "ads"))


@pytest.mark.slow
def test_stop_and_leaving_the_page_free_the_engine(opened):
    page = opened("zh-CN")
    page.set_number("temperature", "2")
    page.set_number("length", "400")
    page.send(QUESTION)
    page.wait(lambda: page.engine.stats().running)
    page.page.click("#stop")
    page.wait(lambda: "已停止" in page.notes(0)[-1])
    assert page.engine.stats().running == 0
    page.send(QUESTION)
    page.wait(lambda: page.engine.stats().running)
    page.page.close()
    assert holds(lambda: page.engine.stats().requests["cancelled"] == 2)


@pytest.mark.slow
def test_errors_are_told_in_the_page(opened):
    page = opened(slots=1, queue_limit=0)
    page.set_number("length", "40")
    page.choose("model", "ads")
    shutil.rmtree(page.folder / "ads")
    page.send(QUESTION)
    page.wait(lambda: page.texts_of(0) and "ads was removed" in page.texts_of(0)[-1])
    page.choose("model", "qa")
    page.send("今" * 600)
    page.wait(lambda: len(page.texts_of(0)) == 2 and "too long" in page.texts_of(0)[-1])
    running = page.engine.submit([5, 6], SamplingSettings(400, temperature=2.0))
    page.send(QUESTION)
    page.wait(lambda: len(page.texts_of(0)) == 3 and "waiting" in page.texts_of(0)[-1])
    running.cancel()
    page.page.click("#model input")
    assert page.page.get_by_role("option", name="ads", exact=True).count() == 0


@pytest.mark.slow
def test_html_and_spaces_are_shown_and_copied_as_they_were_written(opened):
    page = opened()
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    question = "<b>a</b> &lt; **b**\n    <img src=x onerror=alert(1)> <|user|>"
    page.send(question)
    page.wait(lambda: page.texts_of(0, "user"))
    page.wait(lambda: page.engine.stats().running == 0)
    assert page.texts_of(0, "user") == [question]
    assert page.page.locator("#chat-0 .message img, #chat-0 .message b").count() == 0
    page.page.locator("#chat-0 .message-buttons-right button:visible").first.click()
    assert page.page.evaluate("navigator.clipboard.readText()") == question


@pytest.mark.slow
def test_a_narrow_window_and_both_languages(opened):
    page = opened("zh-CN", width=400)
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert page.page.inner_text("#send") == "发送" and not page.page.evaluate(wide)
    page.page.get_by_label("English").check()
    page.wait(lambda: page.page.inner_text("#send") == "Send")
    page.choose("other", "qa")
    page.page.wait_for_selector("#chat-1", state="visible")
    first, second = (page.page.locator(f"#chat-{side}").bounding_box() for side in range(2))
    assert second["y"] >= first["y"] + first["height"] and not page.page.evaluate(wide)


@pytest.mark.slow
def test_the_command_serves_the_base_alone_and_ends_at_sigterm(served, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    port = free_port()
    flags = ["--model_name_or_path", str(served / "base"), "--prefix_dir", str(tmp_path / "none"), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "chatglm_ptuning", "web_demo", *flags],
        # A proxy that does not work must not matter.
        env=os.environ | {"http_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Page:"):
                break
        assert "no prefix" in "".join(said) and "scripts/train.sh" in "".join(said)
        assert f"http://127.0.0.1:{port}" in said[-1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
