"""Clients that cancel, dawdle or send nonsense; as a program it reads a plan, and prints what became of each request.

Halfway it ends the engine's worker, and measures how long the server takes to answer again.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from openai import APIStatusError, AsyncOpenAI, OpenAIError

from benchmarks.serving.clients import SECONDS_UNTIL_STUCK, make_client, run_program
from benchmarks.serving.requests import Question, Reference
from benchmarks.serving.server import Server

_CLIENTS = 64
_LONG_PROMPT = 5000
"""Characters, whose tokens fit into no slot."""
_PATH = "/chat/completions"
_FAILED_ENGINE = "engine_error"
EQUAL, REFUSED, LEFT, SAMPLED, ENDED = "equal", "refused", "cancelled", "sampled", "ended with the worker"
"""What may become of a request. Everything else is a problem."""


@dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        counts: by kind of request and what became of it.
        problems: the first of them.
        seconds_to_answer: from the end of the worker to the next answer; None if it was not ended.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds_to_answer: float | None = None

    def number(self, what: str) -> int:
        """How many requests became this."""
        return sum(counts.get(what, 0) for counts in self.counts.values())


def send_mixed(
    server: Server, questions: Sequence[Question], references: Sequence[Reference], count: int, body_limit: int
) -> Outcome:
    """Sends so many requests of all kinds.

    Args:
        server: started as fragile.
        references: the answers of single runs to the questions.
        body_limit: of the server, in bytes.
    """
    plan = {
        "url": server.url,
        "pid": server.pid,
        "questions": list(map(asdict, questions)),
        "references": [[reference.text, reference.finish_reason] for reference in references],
        "count": count,
        "body_limit": body_limit,
    }
    return Outcome(**run_program(__name__, plan))


class _EngineFailed(Exception):
    """A request without the client of OpenAI got the error of an engine that failed."""


class MixedClients:
    """Sends the requests of a plan."""

    def __init__(self, plan: dict[str, Any], client: AsyncOpenAI) -> None:
        self.outcome, self.client, self.plan = Outcome(), client, plan
        self.draw = random.Random(0)
        self.done = 0
        self.worker_ended: tuple[float, float] | None = None
        address = urlsplit(plan["url"])
        self.host, self.port, self.path = address.hostname, address.port, address.path + _PATH
        self.kinds: dict[str, tuple[float, Callable[[], Awaitable[str]]]] = {
            "streamed": (0.40, self._streamed),
            "whole": (0.20, self._whole),
            "sampled": (0.08, self._sampled),
            "cancelled in the stream": (0.12, self._cancelled_stream),
            "cancelled while waiting": (0.04, self._cancelled_whole),
            "prompt too long": (0.04, self._too_long),
            "body too large": (0.02, self._too_large),
            "malformed": (0.06, self._malformed),
            "slow to send": (0.02, self._slow_sender),
            "slow to read": (0.02, self._slow_reader),
        }

    async def run(self) -> Outcome:
        """Sends all requests."""
        weights = [weight for weight, _ in self.kinds.values()]
        chosen = iter(self.draw.choices(list(self.kinds), weights, k=self.plan["count"]))

        async def send_next() -> None:
            for kind in chosen:
                await self._note(kind)
                self.done += 1

        await asyncio.gather(self._end_worker(), *(send_next() for _ in range(_CLIENTS)))
        return self.outcome

    async def _note(self, kind: str) -> None:
        start = time.monotonic()
        try:
            what = await asyncio.wait_for(self.kinds[kind][1](), SECONDS_UNTIL_STUCK)
        except asyncio.TimeoutError:
            what = "stuck"
        except _EngineFailed:
            what = await self._of_failed_engine(start)
        except OpenAIError as error:
            what = f"{type(error).__name__}: {error}"
            if getattr(error, "code", None) == _FAILED_ENGINE:
                what = await self._of_failed_engine(start)
        except OSError as error:
            what = f"{type(error).__name__}: {error}"
        counts = self.outcome.counts.setdefault(kind, {})
        counts[what] = counts.get(what, 0) + 1
        if what not in (EQUAL, REFUSED, LEFT, SAMPLED, ENDED) and len(self.outcome.problems) < 20:
            self.outcome.problems.append(f"{kind}: {what}")

    async def _of_failed_engine(self, start: float) -> str:
        """Only requests that were running when the worker ended may fail."""
        end = time.monotonic()
        while self.worker_ended is None and time.monotonic() < end + 5:
            await asyncio.sleep(0.05)
        ended, back = self.worker_ended or (end, start)
        return ENDED if start < back and end > ended else f"failed with the worker running ({_FAILED_ENGINE})"

    async def _end_worker(self) -> None:
        while self.done < self.plan["count"] // 2:
            await asyncio.sleep(0.01)
        number, ended = 0, time.monotonic()
        os.kill(self.plan["pid"], signal.SIGUSR1)
        restarts = await self._restarts()
        while restarts == 0:
            restarts = await self._restarts()
        back = time.monotonic()
        while await self._status_of(self._body(number)) != 200:
            number += 1
        self.outcome.seconds_to_answer = time.monotonic() - ended
        self.worker_ended = ended, back

    async def _restarts(self) -> float:
        reply = await self._post(b"", method="GET", path="/metrics")
        return float(reply[1].partition(b"\nchatglm_engine_restarts_total ")[2].split()[0])

    # ---- kinds of requests; each returns what became of it ----

    async def _streamed(self, pause: float = 0) -> str:
        number = self._number()
        text, reason = "", None
        async for chunk in await self.client.chat.completions.create(**self._fields(number), stream=True):
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
            if pause:
                await asyncio.sleep(pause)
        return self._compared(number, text, reason)

    async def _slow_reader(self) -> str:
        return await self._streamed(pause=0.1)

    async def _whole(self) -> str:
        number = self._number()
        reply = await self.client.chat.completions.create(**self._fields(number))
        return self._compared(number, reply.choices[0].message.content, reply.choices[0].finish_reason)

    async def _sampled(self) -> str:
        fields = self._fields(self._number()) | {"temperature": 1.0, "top_p": 0.9, "seed": self.draw.randrange(99)}
        reply = await self.client.chat.completions.create(**fields, n=2)
        return SAMPLED if all(choice.finish_reason for choice in reply.choices) else "sampled without an end"

    async def _cancelled_stream(self) -> str:
        chunks = await self.client.chat.completions.create(**self._fields(self._number()), stream=True)
        left = self.draw.randrange(8)
        async for _ in chunks:
            if not left:
                break
            left -= 1
        await chunks.close()
        return LEFT

    async def _cancelled_whole(self) -> str:
        with suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(self._whole(), self.draw.uniform(0.001, 0.1))
        return LEFT

    async def _too_long(self) -> str:
        fields = self._fields(self._number())
        content = fields["messages"][0]["content"]
        fields["messages"] = [{"role": "user", "content": content * (_LONG_PROMPT // len(content) + 1)}]
        try:
            await self.client.chat.completions.create(**fields)
        except APIStatusError as error:
            return REFUSED if error.status_code == 400 else f"status {error.status_code}"
        return "answered"

    async def _too_large(self) -> str:
        return _refused(await self._post(b"a" * (self.plan["body_limit"] + 1)), 413)

    async def _malformed(self) -> str:
        good = json.loads(self._body(self._number()))
        body = self.draw.choice(
            [
                b'{"model": ',
                b"[]",
                b"",
                b"\xff\xfe\x00{}",
                b"[" * 5000,
                json.dumps(good | {"model": "../etc"}).encode(),
                json.dumps(good | {"max_tokens": -1}).encode(),
                json.dumps(good | {"temperature": "hot"}).encode(),
                json.dumps(good | {"messages": []}).encode(),
                json.dumps(good | {"messages": [{"role": "wizard", "content": "a"}]}).encode(),
                json.dumps(good | {"no_such_field": 1}).encode(),
            ]
        )
        return _refused(await self._post(body), 400, 404, 422)

    async def _slow_sender(self) -> str:
        number = self._number()
        status, reply = await self._post(self._body(number), pause=0.5)
        if status != 200:
            if json.loads(reply)["error"]["code"] == _FAILED_ENGINE:
                raise _EngineFailed
            return f"status {status}"
        (choice,) = json.loads(reply)["choices"]
        return self._compared(number, choice["message"]["content"], choice["finish_reason"])

    # ---- parts ----

    def _number(self) -> int:
        return self.draw.randrange(len(self.plan["questions"]))

    def _fields(self, number: int) -> dict[str, Any]:
        question = self.plan["questions"][number]
        messages = [{"role": "user", "content": question["content"]}]
        kept = {name: question[name] for name in ("model", "max_tokens")}
        return {**kept, "messages": messages, "temperature": 0}

    def _body(self, number: int) -> bytes:
        return json.dumps(self._fields(number % len(self.plan["questions"]))).encode()

    def _compared(self, number: int, text: str | None, reason: str | None) -> str:
        return EQUAL if [text, reason] == self.plan["references"][number] else "different from the single run"

    async def _status_of(self, body: bytes) -> int:
        return (await self._post(body))[0]

    async def _post(
        self, body: bytes, pause: float = 0, method: str = "POST", path: str | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the reply to a body that no client of OpenAI's would send.

        Args:
            pause: seconds before the second half.
        """
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = (
            f"{method} {path or self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body[: len(body) // 2])
            if pause:
                await writer.drain()
                await asyncio.sleep(pause)
            writer.write(body[len(body) // 2 :])
            reply = await reader.read()
        finally:
            writer.close()
        status, _, content = reply.partition(b"\r\n\r\n")
        return int(status.split()[1]), content


def _refused(reply: tuple[int, bytes], *statuses: int) -> str:
    status, content = reply
    is_error = status in statuses and b'"error"' in content
    return REFUSED if is_error else f"status {status}"


async def _main() -> None:
    plan = json.load(sys.stdin)
    async with make_client(plan["url"]) as client:
        print(json.dumps(asdict(await MixedClients(plan, client).run())))


if __name__ == "__main__":
    asyncio.run(_main())
