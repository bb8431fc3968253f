"""`chatglm-ptuning serve`: a folder of prefixes over one base, served as OpenAI's API."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.model.chat_mixin import sampling_settings
from chatglm_ptuning.serving.arguments import FolderArguments, is_own_address
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.keys import KeySet, read_keys

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
    from chatglm_ptuning.serving.api.service import Service
    from chatglm_ptuning.serving.vllm.engine import VllmEngine

_API_KEY_VARIABLE = "CHATGLM_PTUNING_API_KEY"
_ADMIN_KEY_VARIABLE = "CHATGLM_PTUNING_ADMIN_KEY"
_PREFILL_CHUNK = 256
_SECONDS_TO_END = 5
"""For running answers, when the server is stopped."""


@dataclass
class ServeArguments(FolderArguments):
    """Flags of `chatglm-ptuning serve`."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; others need an API key"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 for a free one"})
    api_key: list[str] = field(
        default_factory=list,
        metadata={"help": "keys of which a client must send one; better in a file or in "
                          f"${_API_KEY_VARIABLE}, which other users of the machine cannot see"},
    )  # fmt: skip
    api_key_file: str | None = field(default=None, metadata={"help": "file with such keys, one a line"})
    admin_key_file: str | None = field(
        default=None,
        metadata={"help": "file with keys that may also load and unload prefixes, one a line; or "
                          f"${_ADMIN_KEY_VARIABLE} (default: nobody may)"},
    )  # fmt: skip
    no_api_key: bool = field(
        default=False, metadata={"help": "answer everyone who reaches an address other than this machine's own"}
    )
    slots: int = field(default=16, metadata={"help": "requests that are answered at the same time"})
    queue_limit: int = field(default=256, metadata={"help": "requests that may wait; more get the status 429"})
    prefill_chunk: int = field(
        default=_PREFILL_CHUNK,
        metadata={"help": "most tokens of prompts that are computed between two steps of running answers"},
    )
    slot_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens of prefix, prompt and answer together; fewer take less memory (default: the "
                          "base's seq_length and 512)"},
    )  # fmt: skip
    prefix_memory_mb: int = field(
        default=1024, metadata={"help": "memory for loaded prefixes; the least recently used leave it first"}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "most tokens of an answer (default: what the base's seq_length leaves)"}
    )
    max_choices: int = field(default=16, metadata={"help": "most answers that one request may ask for"})
    max_request_kb: int = field(default=2048, metadata={"help": "largest body of a request"})
    engine: Literal["kit", "vllm"] = field(
        default="kit", metadata={"help": "what computes the answers: this kit's engine, or vLLM (docs/vllm.md)"}
    )
    vllm_python: str | None = field(
        default=None,
        metadata={"help": "python of the environment with vLLM (default: $CHATGLM_PTUNING_VLLM_PYTHON, or this one)"},
    )
    vllm_args: str = field(
        default="", metadata={"help": 'further flags of vLLM: --vllm_args="--tensor-parallel-size 2"'}
    )

    def __post_init__(self) -> None:
        for name, least in (("max_choices", 1), ("max_request_kb", 1), ("prefix_memory_mb", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {self.port}")
        if self.engine == "vllm":
            if self.quantization_bit:
                raise ValueError("--quantization_bit is of --engine kit: vLLM would quantise the base in another way")
            if self.prefill_chunk != _PREFILL_CHUNK:
                raise ValueError('--prefill_chunk is of --engine kit: say --vllm_args="--max-num-batched-tokens N"')
        elif self.vllm_args or self.vllm_python:
            raise ValueError("--vllm_args and --vllm_python need --engine vllm")

    def keys(self) -> tuple[list[str], list[str]]:
        """API keys and admin keys, from flags, files and environment.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there is a fault in the keys, or the address needs some and there are none.
        """
        api = read_keys(self.api_key_file, _API_KEY_VARIABLE, self.api_key)
        admin = read_keys(self.admin_key_file, _ADMIN_KEY_VARIABLE)
        if not api and not self.no_api_key and not is_own_address(self.host):
            raise ValueError(
                f"--host {self.host} lets other machines in: set keys by --api_key_file or ${_API_KEY_VARIABLE}, or "
                "say --no_api_key to answer everyone."
            )
        return api, admin


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens as soon as the server runs; bound first, so that a taken port is reported at once."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def make_service(arguments: ServeArguments) -> Service:
    """Loads the base, and makes an engine that is not started and what the routes need.

    Raises:
        OSError, ValueError, ImportError: if the base cannot be loaded, or a setting is out of range.
    """
    from chatglm_ptuning.serving.api.guard import Access
    from chatglm_ptuning.serving.api.models import Models
    from chatglm_ptuning.serving.api.service import Limits, Service

    api, admin = arguments.keys()
    tokenizer, folder = arguments.load_tokenizer(), PrefixFolder(arguments.prefix_dir)
    if arguments.engine == "vllm":
        engine, model = _vllm_engine(arguments, folder, tokenizer)
    else:
        model = arguments.load_model()
        engine = Engine(
            model,
            slots=arguments.slots,
            slot_tokens=arguments.slot_tokens,
            prefill_chunk=arguments.prefill_chunk,
            queue_limit=arguments.queue_limit,
            prefix_source=folder,
            prefix_memory=arguments.prefix_memory_mb * 2**20,
        )
    sampling = sampling_settings(model.generation_config)
    return Service(
        engine,
        tokenizer,
        Models(engine, folder, arguments.model_name_or_path, time.time()),
        {"temperature": sampling["temperature"] if sampling["do_sample"] else 0.0, "top_p": sampling["top_p"]},
        Limits(arguments.max_request_kb * 2**10, arguments.max_choices, arguments.max_new_tokens),
        Access(KeySet(api), KeySet(admin), own_hosts_only=not api and is_own_address(arguments.host)),
    )


def _vllm_engine(
    arguments: ServeArguments, folder: PrefixFolder, tokenizer: ChatGLMTokenizer
) -> tuple[VllmEngine, ChatGLMPreTrainedModel]:
    from chatglm_ptuning.serving.api.models import BASE
    from chatglm_ptuning.serving.vllm.setup import make_engine

    return make_engine(
        arguments.model_name_or_path,
        arguments.hub,
        arguments.revision,
        folder,
        tokenizer,
        python=arguments.vllm_python,
        more_flags=arguments.vllm_args,
        slots=arguments.slots,
        slot_tokens=arguments.slot_tokens,
        queue_limit=arguments.queue_limit,
        prefix_memory_mb=arguments.prefix_memory_mb,
        base_name=BASE,
    )


def main(argv: Sequence[str]) -> None:
    """Runs `chatglm-ptuning serve` until SIGTERM or Ctrl-C; running answers then get a few seconds.

    Raises:
        SystemExit: with code 2 on wrong flags, 1 if the base cannot be loaded or the address cannot be used.
    """
    (arguments,) = parse_arguments(
        "chatglm-ptuning serve",
        "Serve a folder of prefixes over one base as OpenAI's HTTP API.",
        [ServeArguments],
        argv,
    )
    try:
        import uvicorn

        from chatglm_ptuning.serving.api.app import make_app
    except ImportError as error:
        fail(f"serve needs fastapi, uvicorn and prometheus-client ({error}): pip install 'chatglm-ptuning[serve]'.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("chatglm_ptuning").setLevel(logging.INFO)
    try:
        arguments.keys()
        with bound_socket(arguments.host, arguments.port) as bound:
            leave_a_core()
            service = make_service(arguments)
            config = uvicorn.Config(
                make_app(service),
                ws="none",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_SECONDS_TO_END,
            )
            server = uvicorn.Server(config)

            def end(*_: object) -> None:
                server.should_exit = True

            signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves the block below, as Ctrl-C does
            with service.engine:
                # The server has handlers of its own while it runs. After its end it raises the signal again, which
                # would kill the process.
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, end)
                _tell(service, arguments, bound.getsockname())
                server.run([bound])
    except KeyboardInterrupt:
        fail("Stopped before the server answered.")
    except (OSError, ValueError, ImportError) as error:
        fail(str(error))


def leave_a_core() -> None:
    """Lets torch use one CPU core less than there are, unless `OMP_NUM_THREADS` says how many: HTTP needs one."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def _tell(service: Service, arguments: ServeArguments, address: tuple) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    base, *prefixes = service.models.names
    print(f"Base: {arguments.model_name_or_path} on {service.engine.device}, as model {base}")
    if prefixes:
        print(f"Prefixes in {arguments.prefix_dir}: {', '.join(prefixes)}")
    else:
        print(
            f"No prefix in {arguments.prefix_dir}: serving the base alone. `bash scripts/train.sh` trains one; a "
            "prefix that appears there later is served, too."
        )
    print(f"API: http://{host}:{address[1]}/v1 (Ctrl-C ends the server)", flush=True)
