"""`chatglm-ptuning chat`: a conversation in the terminal, with streamed answers."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.model.arguments import PLAIN_BASE, InferenceBaseArguments, is_plain_base
from chatglm_ptuning.prefix.latest import find_latest_prefix, runs_folder
from chatglm_ptuning.serving.engine.engine import LONGEST_PREFIX, Engine
from chatglm_ptuning.serving.session import ChatSession

with contextlib.suppress(ImportError):
    # Gives input() line editing and a history; Windows has none.
    import readline  # noqa: F401

# The output of a model must not control the terminal: all control characters but tab and line feed.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_LONGEST_CONTEXT = 16384
"""Tokens of conversation and answer, unless a flag says more: the memory for them is allocated at the start."""

_HELP = """\
/prefix              list the loaded prefixes
/prefix NAME         use this prefix from now on; /prefix none: use the plain base
/load PATH [NAME]    load a prefix from a folder and use it
/clear               start a new conversation
/help                show this list
/exit                quit (also Ctrl-D)
Ctrl-C stops the current answer. Put a space before a message that begins with a slash."""


@dataclass
class ChatArguments(InferenceBaseArguments):
    """Flags of `chatglm-ptuning chat`."""

    ptuning_checkpoint: list[str] = field(
        default_factory=list,
        metadata={
            "help": "prefixes to load, each PATH or NAME=PATH; the first is used; none for the plain base (default: "
            "the one trained last)",
            "action": "extend",
        },
    )
    runs_folder: str = field(
        default_factory=lambda: str(runs_folder()),
        metadata={"help": "where to find the prefix trained last (default: $CHATGLM_PTUNING_OUTPUT or output)"},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "sampling temperature (default: the base's, or 0.8)"}
    )
    top_p: float | None = field(
        default=None,
        metadata={"help": "sample from the likeliest tokens of this total probability (default: the base's, or 0.8)"},
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens of an answer (default: half of the context length, at most 1024)"},
    )
    slot_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens of prefix, conversation and answer together; memory for so many is allocated "
                          f"(default: the base's seq_length, at most {_LONGEST_CONTEXT}, and {LONGEST_PREFIX})"},
    )  # fmt: skip
    greedy: bool = field(default=False, metadata={"help": "always take the likeliest token instead of sampling"})

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"--temperature must be above 0 (use --greedy for no sampling), got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.slot_tokens is not None and self.slot_tokens < 2:
            raise ValueError(f"--slot_tokens must be at least 2, got {self.slot_tokens}")


class TerminalChat:
    """Reads lines, executes commands, prints answers."""

    def __init__(self, session: ChatSession, console: Console) -> None:
        self.session = session
        self.console = console
        self._commands = {"/prefix": self._prefix, "/load": self._load, "/clear": self._clear, "/help": self._help}

    def run(self) -> None:
        """Runs until `/exit` or the end of the input."""
        for line in self._lines():
            if not line.startswith("/"):
                self._answer(line.strip())
                continue
            try:
                command, *values = shlex.split(line)
            except ValueError as error:
                self.say(f"Cannot read this command: {error}.", "red")
                continue
            if command == "/exit":
                return
            if command in self._commands:
                self._commands[command](*values)
            else:
                self.say(f"There is no command {command}; /help lists them.", "red")

    def say(self, message: str, style: str | None = "dim") -> None:
        """Prints a message of the program."""
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def load(self, path: str, name: str) -> None:
        """Loads a prefix and selects it.

        Raises:
            FileNotFoundError: if there is none at the path.
            ValueError: if it is damaged or of another base, or the name is that of the plain base.
        """
        if name == PLAIN_BASE:
            raise ValueError(f"{PLAIN_BASE!r} is the name of the plain base; give the prefix another name.")
        self.session.model.load_prefix(path, name)
        self.session.switch_prefix(name)

    def _lines(self) -> Iterator[str]:
        """The non-empty lines of the input; Ctrl-C discards the current one."""
        # The marks tell readline that the escapes have no width.
        prompt = "\001\033[1;32m\002> \001\033[0m\002" if sys.stdin.isatty() and sys.stdout.isatty() else ""
        while True:
            try:
                line = input(prompt)
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
                self.say("Leave with /exit or Ctrl-D.")
                continue
            if line.strip():
                yield line

    def _answer(self, query: str) -> None:
        pieces = self.session.stream(query)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    self.console.out(_CONTROL_CHARACTERS.sub("", piece), end="", highlight=False)
            self.console.print()
        except KeyboardInterrupt:
            self.console.print()
            self.say("(stopped)")
        except (ValueError, RuntimeError) as error:
            self.console.print()
            self.say(f"No answer: {error}", "red")

    def _prefix(self, *values: str) -> None:
        if len(values) > 1:
            self.say("Usage: /prefix [NAME]", "red")
        elif not values:
            for name in [*self.session.model.prefix_names, PLAIN_BASE]:
                mark = "*" if name == (self.session.prefix or PLAIN_BASE) else " "
                self.say(f"{mark} {name}", None)
        else:
            try:
                self.session.switch_prefix(None if values[0] == PLAIN_BASE else values[0])
            except KeyError as error:
                self.say(f"{error.args[0]} /load PATH loads one.", "red")
            else:
                self._tell_prefix()

    def _load(self, *values: str) -> None:
        if len(values) not in (1, 2):
            self.say("Usage: /load PATH [NAME]", "red")
            return
        try:
            self.load(values[0], values[1] if len(values) == 2 else default_name(values[0]))
        except (OSError, ValueError) as error:
            self.say(f"Not loaded: {error}", "red")
        else:
            self._tell_prefix()

    def _tell_prefix(self) -> None:
        self.say("Answering with the plain base." if self.session.prefix is None else f"Prefix: {self.session.prefix}")

    def _clear(self, *_: str) -> None:
        self.session.clear()
        self.say("New conversation.")

    def _help(self, *_: str) -> None:
        self.say(_HELP, None)


def default_name(path: str) -> str:
    """The default name of a prefix: its folder's, for `checkpoint-N` with the run's name."""
    folder = Path(path).resolve()
    folder = folder.parent if folder.is_file() else folder
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def name_and_path(value: str) -> tuple[str, str]:
    """Splits a value of `--ptuning_checkpoint`, NAME=PATH or PATH; an existing path is never split."""
    name, separator, path = value.partition("=")
    if separator and name and not Path(value).exists():
        return name, path
    return default_name(value), value


def _load_first_prefixes(chat: TerminalChat, arguments: ChatArguments) -> None:
    """Loads the prefixes named by the flags, or by default the one trained last."""
    if arguments.ptuning_checkpoint:
        named = [name_and_path(value) for value in arguments.ptuning_checkpoint if not is_plain_base(value)]
        twice = {name for name, _ in named if [other for other, _ in named].count(name) > 1}
        if twice:
            raise ValueError(f"Two prefixes are called {twice.pop()!r}; name them with NAME=PATH.")
        for name, path in named:
            chat.load(arguments.find_prefix(path), name)
        first = arguments.ptuning_checkpoint[0]
        chat.session.switch_prefix(None if is_plain_base(first) else named[0][0])
        loaded = ", ".join(chat.session.model.prefix_names) or PLAIN_BASE
        chat.say(f"Prefix: {chat.session.prefix or PLAIN_BASE} (loaded: {loaded})")
        return
    latest = find_latest_prefix(arguments.runs_folder)
    if latest is None:
        chat.say(
            f"No trained prefix under {arguments.runs_folder}: answering with the plain base. `bash scripts/train.sh` "
            "trains one; `--ptuning_checkpoint PATH` or /load PATH loads one from elsewhere.",
            "yellow",
        )
        return
    try:
        chat.load(str(latest), default_name(str(latest)))
    except (OSError, ValueError) as error:
        chat.session.switch_prefix(None)
        chat.say(f"The prefix trained last, {latest}, is not used: {error} Answering with the plain base.", "yellow")
    else:
        chat.say(f"Prefix: {chat.session.prefix}, trained last ({latest})")


def main(argv: Sequence[str]) -> None:
    """Runs `chatglm-ptuning chat`.

    Raises:
        SystemExit: with code 2 on wrong flags, 1 if the base or a named prefix cannot be loaded.
    """
    (arguments,) = parse_arguments(
        "chatglm-ptuning chat", "Chat with a ChatGLM base and its prefixes in the terminal.", [ChatArguments], argv
    )
    for stream in (sys.stdin, sys.stdout):
        # A character that the terminal cannot encode must not end the conversation.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    console = Console()
    try:
        tokenizer, model = arguments.load_tokenizer(), arguments.load_model()
        longest = min(model.config.seq_length, _LONGEST_CONTEXT) + LONGEST_PREFIX
        engine = Engine(model, slots=1, slot_tokens=longest if arguments.slot_tokens is None else arguments.slot_tokens)
        session = ChatSession(
            engine,
            tokenizer,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=not arguments.greedy,
            top_p=arguments.top_p,
            temperature=arguments.temperature,
        )
        chat = TerminalChat(session, console)
        chat.say(f"Base: {arguments.model_name_or_path} on {model.device}")
        _load_first_prefixes(chat, arguments)
    except (OSError, ValueError, ImportError) as error:
        fail(str(error))
    chat.say("/help lists the commands, /exit leaves.")
    with engine:
        chat.run()
