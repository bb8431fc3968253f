"""Decides what the next forward passes compute, and hands out the tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from chatglm_ptuning.serving.engine.graphs import GraphRecorder
from chatglm_ptuning.serving.engine.passes import Passes, Sizes
from chatglm_ptuning.serving.engine.request import EngineError
from chatglm_ptuning.serving.engine.rows import Request, Row, SlotTable
from chatglm_ptuning.serving.engine.sampling import choose
from chatglm_ptuning.serving.engine.slots import SlotCache

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

_WEIGHT_OF_LAST = 0.1
"""Of the last ended request, in the average time that requests keep a slot."""


class Scheduler:
    """Runs the requests that have slots, step by step. Used by one thread; numbers may be read from any.

    Args:
        model: the base.
        cache: the slots.
        prefill_chunk: most tokens of prompts, with padding, that are computed in a step.

    Attributes:
        table: the slots' requests.
        ended: numbers of ended requests by `finish_reason`.
        generated, prefilled, shared: numbers of tokens: of answers, and of prompts, computed or shared.
        evictions: of kept rows.
        seconds: that a request keeps its slot, on average.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, cache: SlotCache, prefill_chunk: int) -> None:
        self._model, self._cache, self._prefill_chunk = model, cache, prefill_chunk
        self.ended: Counter[str] = Counter()
        self.generated = self.prefilled = self.shared = self._earlier_evictions = 0
        self.seconds = 1.0
        self.table = SlotTable(cache)

    @property
    def evictions(self) -> int:  # noqa: D102
        return self._earlier_evictions + self.table.evictions

    def reset(self) -> None:
        """Empties all slots, and forgets recorded steps."""
        self._earlier_evictions += self.table.evictions
        self.table = SlotTable(self._cache)
        self._cache.clear_all()
        # Layers of a quantised base, and layers that accelerate loads, may wait for the GPU: not recordable.
        is_eager = self._cache.is_spread or getattr(self._model, "hf_quantizer", None) is not None
        is_static = self._cache.device.type == "cuda" and not is_eager
        sizes = Sizes(self._cache.slots, self._cache.slot_tokens, is_static)
        record = GraphRecorder(self._cache.device) if is_static else lambda step: step
        self._passes = Passes(self._model, self._cache, sizes, record)

    @property
    def requests(self) -> list[Request]:
        """Requests that have slots."""
        return [row.request for row in list(self.table.rows) if row is not None and row.request is not None]

    def admit(self, request: Request) -> None:
        """Gives a request a slot; there must be a free one."""
        try:
            row = self.table.admit(request)
        except BaseException:
            self.finish(request, "error", EngineError("The request could not be started."))
            raise
        self.shared += row.computed

    def finish(self, request: Request, reason: str, error: EngineError | None = None) -> None:
        """Ends the answer to a request, unless it has ended. Its slot, if it has one, is not freed by this."""
        if request.generation.finish_reason is None:
            self.ended[reason] += 1
            request.generation.finish(reason, error)

    def step(self) -> None:
        """Ends cancelled requests, computes a part of the prompts, then one token of each answer."""
        for row in self.table.rows[: self.table.running]:
            if row.request.generation.is_cancelled:
                self._end(row, "cancelled")
        if self.table.prefilling:
            rows, counts = self._next_prompts()
            logits, best = self._passes.prefill(rows, counts)
            self.prefilled += sum(counts)
            numbers = [number for number, row in enumerate(rows) if row.computed == row.known]
            complete = [rows[number] for number in numbers]
            for row in complete:
                self.table.start_decoding(row)
            if complete:
                self._continue(complete, logits[numbers], best[:, numbers])
            for row in complete:
                if self.table.rows[row.place] is row:  # its entries are finite
                    self.shared += self.table.share_prompt(row)
        if self.table.decoding:
            rows = self.table.rows[: self.table.decoding]
            self._continue(rows, *self._passes.decode(rows))

    def _next_prompts(self) -> tuple[list[Row], list[int]]:
        """The next prompts to compute and how many tokens of each: the oldest, and as many neighbours as fit."""
        rows, chunk = self.table.prefilling, self._prefill_chunk
        counts = [min(row.known - row.computed, chunk) for row in rows]
        first = min(range(len(rows)), key=lambda number: rows[number].admitted)
        last, longest = first, counts[first]

        def fits(number: int) -> bool:
            return 0 <= number < len(rows) and (last - first + 2) * max(longest, counts[number]) <= chunk

        while fits(last + 1) or fits(first - 1):
            first, last = (first, last + 1) if fits(last + 1) else (first - 1, last)
            longest = max(counts[first : last + 1])
        return rows[first : last + 1], counts[first : last + 1]

    def _continue(self, rows: Sequence[Row], logits: torch.Tensor, best: torch.Tensor) -> None:
        """Adds the next token to answers, and ends those that are complete."""
        settings = [row.request.settings for row in rows]
        tokens = choose(logits, best, settings, [row.known_ids for row in rows], [row.random for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            generation, own = row.request.generation, row.request.settings
            if token is None:
                problem = "The base's scores are NaN or infinite. Try bfloat16 or float32."
                self._end(row, "error", EngineError(problem))
            elif token.id in own.stop_ids:
                self._end(row, "stop")
            else:
                row.append(token.id)
                generation.put(token)
                self.generated += 1
                if row.generated == own.max_new_tokens:
                    self._end(row, "length")

    def _end(self, row: Row, reason: str, error: EngineError | None = None) -> None:
        self.finish(row.request, reason, error)
        self.seconds += _WEIGHT_OF_LAST * (time.monotonic() - row.admitted - self.seconds)
        # The scores of the last token of a prompt show whether its entries are finite.
        self.table.release(row, keep=error is None and row.computed >= len(row.request.prompt))
