"""A real server of the API in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

from chatglm_ptuning.serving.api.app import make_app
from chatglm_ptuning.serving.api.command import ServeArguments, bound_socket, make_service
from chatglm_ptuning.serving.api.service import Service


class Running:
    """A running server.

    Attributes:
        url: of the root.
        prefix_dir: the folder of its prefixes.
    """

    def __init__(self, service: Service, port: int, prefix_dir: Path) -> None:
        self.service = service
        self.port = port
        self.prefix_dir = prefix_dir
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none", **settings: Any) -> OpenAI:
        """The real client; it does not repeat requests."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60} | settings)


@contextmanager
def serving(base: Path, prefix_dir: Path, **flags: Any) -> Iterator[Running]:
    """Starts a server as the command does."""
    service = make_service(ServeArguments(model_name_or_path=str(base), prefix_dir=str(prefix_dir), **flags))
    with bound_socket("127.0.0.1", 0) as bound, service.engine:
        server = uvicorn.Server(uvicorn.Config(make_app(service), ws="none", log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Running(service, bound.getsockname()[1], prefix_dir)
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def wait_for(condition, seconds: float = 20) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not hold in time"
        time.sleep(0.01)
