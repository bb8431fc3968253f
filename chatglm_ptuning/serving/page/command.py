"""`chatglm-ptuning web_demo`: a chat page in the browser, over one base and its prefixes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.model.chat_mixin import sampling_settings
from chatglm_ptuning.model.stored_prefix import name_of_base
from chatglm_ptuning.prefix.latest import find_latest_prefix
from chatglm_ptuning.serving.arguments import FolderArguments, is_own_address
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.keys import KeySet, read_keys
from chatglm_ptuning.serving.page.talk import Answerer, AnswerSettings
from chatglm_ptuning.serving.page.texts import text

if TYPE_CHECKING:
    from gradio import Blocks

_PASSWORD_VARIABLE = "CHATGLM_PTUNING_PASSWORD"
_MOST_NEW_TOKENS = 1024


@dataclass
class WebDemoArguments(FolderArguments):
    """Flags of `chatglm-ptuning web_demo`."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to listen on; 0.0.0.0 lets other machines use the page; others need a password"},
    )
    port: int = field(default=7860, metadata={"help": "port to listen on"})
    password_file: str | None = field(
        default=None,
        metadata={"help": "file with passwords of which a visitor must enter one, one a line; or "
                          f"${_PASSWORD_VARIABLE}"},
    )  # fmt: skip
    no_password: bool = field(
        default=False, metadata={"help": "let everyone in who reaches an address other than this machine's own"}
    )
    slots: int = field(default=4, metadata={"help": "answers that are generated at the same time"})
    queue_limit: int = field(default=64, metadata={"help": "questions that may wait; more are refused"})

    def __post_init__(self) -> None:
        if not 1 <= self.port < 2**16:
            raise ValueError(f"--port must be from 1 to {2**16 - 1}, got {self.port}")
        for name, least in (("slots", 1), ("queue_limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")

    def passwords(self) -> list[str]:
        """The passwords, from file and environment.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if there is a fault in the passwords, or the address needs some and there are none.
        """
        passwords = read_keys(self.password_file, _PASSWORD_VARIABLE)
        if not passwords and not self.no_password and not is_own_address(self.host):
            raise ValueError(
                f"--host {self.host} lets other machines in: set passwords by --password_file or "
                f"${_PASSWORD_VARIABLE}, or say --no_password to let everyone in."
            )
        return passwords

    def newest(self) -> str | None:
        """The name of the prefix that was trained last; None if there is none."""
        latest = find_latest_prefix(self.prefix_dir)
        return None if latest is None else latest.relative_to(self.prefix_dir).parts[0]


def _interrupt(*_: int | FrameType | None) -> None:
    raise KeyboardInterrupt


def prepare(arguments: WebDemoArguments) -> tuple[Engine, Blocks]:
    """Loads the base; makes an engine that is not started, and its page.

    Raises:
        OSError, ValueError, ImportError: if the base cannot be loaded, or a setting is out of range.
    """
    from chatglm_ptuning.serving.page.layout import PageSettings, make_page

    tokenizer, model = arguments.load_tokenizer(), arguments.load_model()
    engine = Engine(
        model,
        slots=arguments.slots,
        queue_limit=arguments.queue_limit,
        prefix_source=PrefixFolder(arguments.prefix_dir),
    )
    sampling = sampling_settings(model.generation_config)
    temperature = sampling["temperature"] if sampling["do_sample"] else 0.0
    context = engine.context_length()
    settings = PageSettings(
        base=name_of_base(Path(arguments.model_name_or_path)),
        folder=Path(arguments.prefix_dir).name,
        first=arguments.newest,
        has_system=tokenizer.chat.has_roles,
        context_length=context,
        answer=AnswerSettings("", temperature, sampling["top_p"], min(_MOST_NEW_TOKENS, context // 2)),
    )
    return engine, make_page(Answerer(engine, tokenizer.chat), settings)


def main(argv: Sequence[str]) -> None:
    """Runs `chatglm-ptuning web_demo` until SIGTERM or Ctrl-C.

    Raises:
        SystemExit: with code 2 on wrong flags, 1 if the base cannot be loaded or the address cannot be used.
    """
    (arguments,) = parse_arguments(
        "chatglm-ptuning web_demo", "A chat page in the browser, over one base and its prefixes.", [WebDemoArguments],
        argv,
    )  # fmt: skip
    try:
        from chatglm_ptuning.serving.page.layout import launch_page
    except ImportError as error:
        fail(f"web_demo needs gradio ({error}): pip install 'chatglm-ptuning[web_demo]'.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        passwords = KeySet(arguments.passwords())
        engine, page = prepare(arguments)
        with engine:
            try:
                launch_page(page, arguments.host, arguments.port, arguments.slots + arguments.queue_limit, passwords)
            except OSError:
                fail(
                    f"cannot listen on {arguments.host} at port {arguments.port}: is it taken? Name another by --port."
                )
            signal.signal(signal.SIGTERM, _interrupt)
            with suppress(KeyboardInterrupt):
                _tell(arguments, engine, bool(passwords))
                page.block_thread()
    except (OSError, ValueError, ImportError) as error:
        fail(str(error))


def _tell(arguments: WebDemoArguments, engine: Engine, needs_password: bool) -> None:
    print(f"Base: {arguments.model_name_or_path} on {engine.model.device}")
    if names := engine.prefix_names():
        print(f"Prefixes in {arguments.prefix_dir}: {', '.join(names)}")
    else:
        print(text("en", "no_prefix", folder=arguments.prefix_dir))
    if not needs_password and not is_own_address(arguments.host):
        print(f"Everyone who reaches {arguments.host} can use the page.")
    print(f"Page: http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
