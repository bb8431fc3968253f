"""Plays vLLM for fast tests: it is the `python` that the command starts, and answers over the same socket.

The environment says what it does: `FAKE_VERSION` is printed; `FAKE_ENDS` is a line that it logs before it ends at once.
A prompt is answered with its own tokens in reverse. Some last tokens mean more: see `_answer`.
"""

from __future__ import annotations

import json
import os
import socketserver
import stat
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

ENDLESS, ERROR, REFUSED, DEATH = 21, 22, 23, 24
"""Last tokens of a prompt: an answer without end, an error in the stream, a status 400, the end of the process."""


class _Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "unix"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(
                b'vllm:num_requests_running{model_name="base"} 3.0\nvllm:kv_cache_usage_perc 0.5\n'
                b'vllm:cache_config_info{block_size="32",num_gpu_blocks="10"} 1.0\n'
            )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Path(os.environ["PTUNING_PREFIX_DIR"]).with_name("requests").open("a") as file:
            file.write(json.dumps(body) + "\n")
        ids, settings = body["token_ids"], body["sampling_params"]
        if ids[-1] == DEATH:
            print("out of memory", flush=True)
            os._exit(3)
        self.send_response(400 if ids[-1] == REFUSED else 200)
        self.end_headers()
        if ids[-1] == REFUSED:
            self.wfile.write(b'{"error": {"message": "no"}}')
            return
        reason = None
        for token in iter(lambda: 30, None) if ids[-1] == ENDLESS else reversed(ids):
            if ids[-1] == ERROR:
                self._event({"error": {"message": "Internal server error"}})
                break
            reason = "stop" if token in settings["stop_token_ids"] else None
            self._event({"choices": [_choice(token, reason, settings["logprobs"])]})
            if reason:
                break
            time.sleep(0.01)
        else:
            self._event({"choices": [{"token_ids": [], "finish_reason": "length", "logprobs": {"content": []}}]})
        details = {"cached_tokens": 2}
        self._event({"choices": [], "usage": {"prompt_tokens": len(ids), "prompt_tokens_details": details}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def _choice(token: int, reason: str | None, logprobs: int | None) -> dict:
    top = [{"token_id": token, "logprob": -3.0}, {"token_id": 50, "logprob": -1.0}, {"token_id": 51, "logprob": -2.0}]
    content = [{"token_id": token, "logprob": -3.0, "top_logprobs": top[:logprobs]}]
    return {"token_ids": [token], "finish_reason": reason, "logprobs": {"content": content} if logprobs else None}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def write(path: Path) -> str:
    """Writes an executable that runs this file, as the Python of an environment with vLLM."""
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c" and "execv" in arguments[1]:
        executable = Path(__file__).resolve()
        exec(arguments[1].replace("*sys.argv[1:]", f"{str(executable)!r}, *{arguments[2:]!r}"))
    if arguments[0] == "-c":
        print(os.environ.get("FAKE_VERSION", "0.32.0"))
        return
    print(json.dumps({"arguments": arguments, "PYTHONPATH": os.environ["PYTHONPATH"]}), flush=True)
    if line := os.environ.get("FAKE_ENDS"):
        sys.exit(line)
    with _Server(arguments[arguments.index("--uds") + 1], _Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
