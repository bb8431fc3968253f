"""The page: its components, and what happens when they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from chatglm_ptuning.model.arguments import PLAIN_BASE
from chatglm_ptuning.serving.arguments import is_own_address
from chatglm_ptuning.serving.keys import KeySet
from chatglm_ptuning.serving.page.talk import Answerer, AnswerSettings, Talk
from chatglm_ptuning.serving.page.texts import LANGUAGES, language_of, note, problem, text

_NO_OTHER = ""
"""Chosen for the second side when there is none; no prefix has this name."""
_CSS = """
.gradio-container > .main { max-width: 1200px; margin: 0 auto; padding: 12px clamp(8px, 2.5vw, 32px) !important; }
#head { flex-wrap: nowrap; align-items: center; }
#language { flex: none; width: auto; min-width: 0 !important; }
#language .wrap { flex-wrap: nowrap; }
.chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.chat .message:has(.thought-group) { border: none; background: none; box-shadow: none; padding: 0; }
.chat .message-row:has(.thought-group) { margin-bottom: -12px; }
.chat .message-row:has(.thought-group) + .message-buttons { display: none; }
.chat .thought-group { border: none; padding: 0; margin: 0; background: none; }
.chat .thought-group .title { padding: 0; opacity: 0.7; pointer-events: none; }
.chat .thought-group .arrow { display: none; }
@media (max-width: 600px) {
    button { font-size: 14px !important; }
    #head { flex-wrap: wrap; gap: 4px; }
    #head > :first-child { flex: 1 0 100%; }
    .chat { height: 44vh !important; }
}
"""
# A Chatbot shows HTML, so texts are escaped; its buttons must copy them as they were.
_UNESCAPED_COPIES = """() => {
    const clipboard = navigator.clipboard;
    if (clipboard) {
        const write = clipboard.writeText.bind(clipboard);
        clipboard.writeText = (text) => write(
            text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&")
        );
    }
}"""
_DOWNLOAD = """(content) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
    URL.revokeObjectURL(link.href);
}"""
_ASKS_FOR_PASSWORD = "用户名任意，请输入密码。 · Any user name; enter the password."
_SYSTEM_FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


@dataclass(frozen=True)
class PageSettings:
    """What a page begins with.

    Attributes:
        base: name of the base.
        folder: the name of the folder of prefixes, as visitors are told.
        first: the prefix that answers at first; None for the plain base.
        has_system: whether the chat format has a system prompt.
        context_length: of the base, in tokens.
        answer: the settings of answers.
    """

    base: str
    folder: str
    first: Callable[[], str | None]
    has_system: bool
    context_length: int
    answer: AnswerSettings


def make_page(answerer: Answerer, settings: PageSettings) -> gr.Blocks:
    """The page. `launch_page` shows it."""
    return _Page(answerer, settings).blocks


def launch_page(page: gr.Blocks, host: str, port: int, visitors: int, passwords: KeySet) -> None:
    """Serves the page from threads of its own, never through Gradio's relay.

    Args:
        visitors: how many answers are shown at the same time.
        passwords: a visitor must enter one of them, with any user name; without any, everyone may use the page.

    Raises:
        OSError: if the address cannot be used.
    """
    # Gradio asks its own server whether it runs; a proxy would not reach it.
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "", "localhost", "127.0.0.1", host]
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    # An answer takes a thread; so does each click meanwhile.
    page.queue(default_concurrency_limit=None).launch(
        server_name=host,
        server_port=port,
        auth=(lambda _, password: password in passwords) if passwords else None,
        auth_message=_ASKS_FOR_PASSWORD,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_threads=2 * visitors + 8,
        footer_links=[],
        app_kwargs={} if passwords or not is_own_address(host) else {"middleware": [_own_hosts_only(host)]},
        ssr_mode=False,
        # Without fonts from other servers.
        theme=gr.themes.Default(font=_SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        js=_UNESCAPED_COPIES,
    )


def _own_hosts_only(host: str) -> Middleware:
    """Refuses web pages that let a name of their own point to this machine, to use the page through a browser."""
    allowed = ["localhost", "127.0.0.1", "[::1]", host]
    return Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)


class _Page:
    """The components, and their handlers."""

    def __init__(self, answerer: Answerer, settings: PageSettings) -> None:
        self._answerer, self._settings = answerer, settings
        with gr.Blocks(title="ChatGLM P-Tuning v2", fill_width=True, analytics_enabled=False) as self.blocks:
            self._place()
            self._connect()

    def _place(self) -> None:
        """Makes the components. Their texts are overwritten when the page is opened."""

        def labelled(name: str) -> dict[str, str]:
            return {"label": text("zh", name), "elem_id": name}

        def button(name: str, **look: str) -> gr.Button:
            return gr.Button(text("zh", name), min_width=100, elem_id=name, **look)

        answer, first = self._settings.answer, self._settings.first() or PLAIN_BASE
        with gr.Row(elem_id="head"):
            self.title = gr.Markdown()
            languages = [(name, language) for language, name in LANGUAGES.items()]
            self.language = gr.Radio(languages, value="zh", show_label=False, container=False, elem_id="language")
        self.hint = gr.Markdown(elem_id="hint", visible=False)
        with gr.Row():
            self.model = gr.Dropdown([first], value=first, filterable=False, min_width=280, **labelled("model"))
            self.other = gr.Dropdown([_NO_OTHER], value=_NO_OTHER, filterable=False, min_width=280, **labelled("other"))
        self.chats, columns = [], []
        with gr.Row():
            for side in range(2):
                with gr.Column(min_width=300, visible=side == 0) as column:
                    chat = gr.Chatbot(
                        show_label=False, height="56vh", buttons=["copy", "copy_all"], group_consecutive_messages=False,
                        render_markdown=False, latex_delimiters=[], elem_id=f"chat-{side}", elem_classes="chat",
                    )  # fmt: skip
                self.chats.append(chat)
                columns.append(column)
        self.other_column = columns[1]
        self.message = gr.Textbox(lines=1, max_lines=8, show_label=False, autofocus=True, elem_id="message")
        with gr.Row():
            self.send = button("send", variant="primary")
            self.stop = button("stop", variant="stop")
            self.again, self.clear, self.export = button("again"), button("clear"), button("export")
        with gr.Accordion(open=False, **labelled("settings")) as self.accordion:
            self.system = gr.Textbox(answer.system, lines=2, visible=self._settings.has_system, **labelled("system"))
            self.history = gr.Checkbox(answer.with_history, **labelled("history"))
            with gr.Row():
                slider = partial(gr.Slider, min_width=200)
                self.temperature = slider(0, 2, answer.temperature, step=0.05, **labelled("temperature"))
                self.top_p = slider(0.01, 1, answer.top_p, step=0.01, **labelled("top_p"))
                longest = self._settings.context_length - 1
                self.length = slider(1, longest, answer.max_new_tokens, step=1, **labelled("length"))
        self.talk = gr.State(Talk())
        self.exported = gr.Textbox(visible="hidden")

    def _connect(self) -> None:
        # Nothing of the page is an API for programs; `serve` has one.
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        models = [self.model, self.other]
        answer = [self.talk, *models, self.language, self.system, self.history]
        answer += [self.temperature, self.top_p, self.length]
        outputs = [*self._labels("zh"), self.hint, *models, *self.chats]
        self.blocks.load(self._open, None, [self.language, *outputs], **quiet)
        self.language.input(self._translate, [self.talk, *models, self.language], outputs, **quiet)
        for dropdown in models:
            dropdown.focus(self._offer, [*models, self.language], [self.hint, *models], **quiet)
        self.other.change(
            self._compare, [self.talk, self.other, self.language], [self.other_column, self.chats[1]], **quiet
        )
        gr.on(
            [self.message.submit, self.send.click], self._send, [self.message, *answer], [self.message, *self.chats],
            **quiet,
        )  # fmt: skip
        self.again.click(self._again, answer, self.chats, **quiet)
        self.stop.click(lambda talk: talk.stop(), self.talk, None, **quiet)
        gr.on(
            [self.clear.click, *(chat.clear for chat in self.chats)], self._clear, [self.talk, self.language],
            self.chats, **quiet,
        )  # fmt: skip
        self.export.click(self._export, self.talk, self.exported, **quiet).then(None, self.exported, None, js=_DOWNLOAD)

    def _open(self, request: gr.Request) -> _Updates:
        language = language_of(request.headers.get("accept-language", ""))
        first = self._settings.first() or PLAIN_BASE
        return {
            self.language: language,
            **self._labels(language),
            **self._offer(first, _NO_OTHER, language),
            **self._views(Talk(), language),
        }

    def _translate(self, talk: Talk, model: str, other: str, language: str) -> _Updates:
        return {**self._labels(language), **self._offer(model, other, language), **self._views(talk, language)}

    def _labels(self, language: str) -> _Updates:
        """The texts that do not change in a language."""
        labels: _Updates = {
            component: gr.update(label=text(language, component.elem_id))
            for component in (
                self.accordion, self.system, self.history, self.temperature, self.top_p, self.length,
            )
        }  # fmt: skip
        for button in (self.send, self.stop, self.again, self.clear, self.export):
            labels[button] = gr.update(value=text(language, button.elem_id))
        labels[self.title] = "### " + text(language, "title", base=self._settings.base)
        labels[self.message] = gr.update(placeholder=text(language, "message"))
        return labels

    def _offer(self, model: str, other: str, language: str) -> _Updates:
        """The models to choose from, as they are in the folder now, and what to do if there is no prefix."""
        names = [name for name in self._answerer.engine.prefix_names() if name not in (PLAIN_BASE, _NO_OTHER)]
        models = [*((name, name) for name in names), (text(language, "plain_base"), PLAIN_BASE)]
        others = [(text(language, "no_other"), _NO_OTHER), *models]
        hint = "" if names else text(language, "no_prefix", folder=self._settings.folder)
        return {
            self.hint: gr.update(value=hint, visible=not names),
            self.model: gr.update(label=text(language, "model"), choices=models, value=_still(model, models)),
            self.other: gr.update(label=text(language, "other"), choices=others, value=_still(other, others)),
        }

    def _compare(self, talk: Talk, other: str, language: str) -> _Updates:
        return {
            self.other_column: gr.update(visible=other != _NO_OTHER),
            self.chats[1]: self._views(talk, language)[self.chats[1]],
        }

    def _send(self, message: str, talk: Talk, *choices: Any) -> Iterator[_Updates]:
        if message.strip() and not talk.is_answering:
            prefixes, language, settings = _read(*choices)
            for place, _ in enumerate(self._answerer.ask(talk, message, prefixes, settings)):
                shown = self._views(talk, language, len(prefixes))
                yield shown if place else {self.message: "", **shown}

    def _again(self, talk: Talk, *choices: Any) -> Iterator[_Updates]:
        if not talk.is_answering:
            prefixes, language, settings = _read(*choices)
            for _ in self._answerer.ask_again(talk, prefixes, settings):
                yield self._views(talk, language, len(prefixes))

    def _clear(self, talk: Talk, language: str) -> _Updates:
        talk.clear()
        return self._views(talk, language)

    def _export(self, talk: Talk) -> str:
        return json.dumps(talk.export(self._settings.base), ensure_ascii=False, indent=2)

    def _views(self, talk: Talk, language: str, sides: int = 2) -> _Updates:
        """The conversation on each side."""
        return {
            chat: gr.update(value=_messages(talk, side, language), placeholder=text(language, "empty"))
            for side, chat in enumerate(self.chats[:sides])
        }


_Updates = dict[Any, Any]
"""New values and settings of components."""


def _read(
    model: str, other: str, language: str, system: str, history: bool, temperature: float, top_p: float, length: float
) -> tuple[list[str | None], str, AnswerSettings]:
    """The chosen prefixes, the language and the settings."""
    chosen = [model] if other == _NO_OTHER else [model, other]
    prefixes = [None if name == PLAIN_BASE else name for name in chosen]
    return prefixes, language, AnswerSettings(system.strip(), temperature, top_p, int(length), history)


def _still(chosen: str, choices: list[tuple[str, str]]) -> str:
    """A choice, if it is still there, else the first."""
    values = [value for _, value in choices]
    return chosen if chosen in values else values[0]


def _messages(talk: Talk, side: int, language: str) -> list[dict[str, Any]]:
    """The conversation on a side, as a Chatbot shows it."""
    shown: list[dict[str, Any]] = []

    def add(role: str, content: str, **more: Any) -> None:
        # In a dictionary, spaces at the beginning of lines are kept.
        shown.append({"role": role, "content": {"type": "text", "text": escape(content, quote=False)}, **more})

    for turn in talk.turns:
        answer = turn.answer_of(side)
        add("user", turn.question)
        # A title is a line in small print.
        add("assistant", "", metadata={"title": escape(note(language, answer), quote=False), "status": "done"})
        if answer.text or answer.finish_reason is None:
            add("assistant", answer.text or "…")
        if (sentence := problem(language, answer)) is not None:
            add("assistant", f"⚠ {sentence}")
    return shown
