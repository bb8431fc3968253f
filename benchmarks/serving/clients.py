"""Many clients of the `openai` package in one process; as a program it reads a plan, and prints what they saw."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from benchmarks.serving.requests import Question

SECONDS_UNTIL_STUCK = 60
"""A request that has not ended after this time is stuck."""


@dataclass
class Seen:
    """What a client saw of its request; times by `time.monotonic()`.

    Attributes:
        first: of the first text.
        tokens: of the answer.
        problem: "" if it was answered.
    """

    start: float
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    problem: str = ""

    @property
    def waited(self) -> float:
        """Seconds to the first text."""
        return self.first - self.start


def run_program(module: str, plan: dict[str, Any]) -> Any:
    """Runs a module of clients as a process, which reads a plan and prints JSON.

    Raises:
        RuntimeError: with its output, if it fails.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(plan), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"the clients failed:\n{done.stderr}")
    return json.loads(done.stdout)


def load(url: str, questions: Sequence[Question], clients: int, seconds: float) -> list[Seen]:
    """Streams text completions to a number of clients, each of which asks its next question when it has its answer.

    Args:
        questions: after the last one the first comes again.
        seconds: after them no new question is asked.
    """
    plan = {"url": url, "questions": list(map(asdict, questions)), "clients": clients, "seconds": seconds}
    return [Seen(**one) for one in run_program(__name__, plan)]


def make_client(url: str) -> AsyncOpenAI:
    """A client that does not repeat requests."""
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS_UNTIL_STUCK)


async def _load(plan: dict[str, Any]) -> list[Seen]:
    questions, seen = [Question(**one) for one in plan["questions"]], []
    async with make_client(plan["url"]) as client:
        numbers = iter(range(10**9))
        end = time.monotonic() + plan["seconds"]

        async def ask_until_the_end(numbers: Iterator[int]) -> None:
            while time.monotonic() < end:
                question = questions[next(numbers) % len(questions)]
                one = Seen(time.monotonic())
                seen.append(one)
                try:
                    await asyncio.wait_for(_ask(client, question, one), SECONDS_UNTIL_STUCK)
                except asyncio.TimeoutError:
                    one.problem = "stuck"
                except OpenAIError as error:
                    one.problem = f"{type(error).__name__}: {error}"
                one.end = time.monotonic()

        await asyncio.gather(*(ask_until_the_end(numbers) for _ in range(plan["clients"])))
    return seen


async def _ask(client: AsyncOpenAI, question: Question, seen: Seen) -> None:
    # Of a text completion, no text is held back until its first line cannot be the name of a tool.
    finished = False
    chunks = await client.completions.create(
        model=question.model,
        prompt=question.content,
        max_tokens=question.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in chunks:
        if chunk.choices:
            (choice,) = chunk.choices
            finished |= choice.finish_reason is not None
            if not seen.first and (choice.text or finished):
                seen.first = time.monotonic()
        elif chunk.usage is not None:
            seen.tokens = chunk.usage.completion_tokens
    if not finished:
        seen.problem = "the answer has no end"


if __name__ == "__main__":
    print(json.dumps(list(map(asdict, asyncio.run(_load(json.load(sys.stdin)))))))
