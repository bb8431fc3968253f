"""Tokens of the engine's generations to asyncio, without a thread for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from chatglm_ptuning.serving.engine.request import EngineError, Generation, Token

_SECONDS_BETWEEN_LOOKS = 0.004


@dataclass
class _Reader:
    """What has arrived of one generation and was not passed on."""

    index: int
    generation: Generation
    news: asyncio.Event
    tokens: list[Token] = field(default_factory=list)
    ended: bool = False
    error: EngineError | None = None

    def look(self) -> None:
        try:
            while not self.ended and self.generation.is_ready:
                token = self.generation.get()
                if token is None:
                    self.ended = True
                else:
                    self.tokens.append(token)
        except EngineError as error:
            self.ended, self.error = True, error
        if self.tokens or self.ended:
            self.news.set()


class TokenPump:
    """Looks for new tokens of all running generations every few milliseconds.

    Waking the event loop for every token from another thread costs more than the token on a small base.
    """

    def __init__(self) -> None:
        self._readers: list[_Reader] = []
        self._task: asyncio.Task[None] | None = None

    async def read(self, generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, list[Token], bool], None]:
        """Yields new tokens of any of the generations as (index, tokens, whether it has ended), until all have ended.

        Leaving the iterator cancels the generations.

        Raises:
            EngineError: if the engine failed.
        """
        news = asyncio.Event()
        readers = [_Reader(index, generation, news) for index, generation in enumerate(generations)]
        self._readers += readers
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            while readers:
                await news.wait()
                news.clear()
                for reader in list(readers):
                    tokens, reader.tokens = reader.tokens, []
                    if reader.ended:
                        readers.remove(reader)
                        self._readers.remove(reader)
                    if reader.error is not None:
                        raise reader.error
                    if tokens or reader.ended:
                        yield reader.index, tokens, reader.ended
        finally:
            for generation in generations:
                generation.cancel()
            self._readers = [reader for reader in self._readers if reader.news is not news]

    async def _run(self) -> None:
        while self._readers:
            for reader in self._readers:
                reader.look()
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
