"""Serves many requests on one base at a time (continuous batching), each with its own prefix.

One thread, the worker, runs the model. Before every step requests may join or leave. A step computes a part of the
waiting prompts, then one token for every answer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatglm_ptuning.serving.engine.passes import make_cache, obstacle
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder, RowPrefix, ServedPrefixes
from chatglm_ptuning.serving.engine.request import EngineError, Generation, PromptTooLong, QueueFull, SamplingSettings
from chatglm_ptuning.serving.engine.rows import Request
from chatglm_ptuning.serving.engine.scheduler import Scheduler

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

logger = logging.getLogger(__name__)

LONGEST_PREFIX = 512
"""Places of a slot for the prefix, unless the size of a slot is given."""
_SECONDS_BETWEEN_RESETS = 0.5


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and has done since it was made.

    Attributes:
        running, waiting: requests with a slot, and without.
        slots: of the cache.
        slots_kept: slots with entries of ended requests, for prompts that begin alike.
        cache_tokens: places that the running requests use, prefixes included.
        cache_tokens_total: places of all slots.
        requests: ended requests by their `finish_reason`.
        generated_tokens: tokens of answers.
        prefill_tokens: tokens of prompts that were computed.
        cached_tokens: tokens of prompts that were shared with earlier ones.
        evictions: kept slots that were overwritten.
        restarts: of the worker, after errors.
        prefixes_loaded, prefix_bytes, prefix_evictions: of the bank of prefixes.
    """

    running: int
    waiting: int
    slots: int
    slots_kept: int
    cache_tokens: int
    cache_tokens_total: int
    requests: dict[str, int]
    generated_tokens: int
    prefill_tokens: int
    cached_tokens: int
    evictions: int
    restarts: int
    prefixes_loaded: int
    prefix_bytes: int
    prefix_evictions: int


class Engine:
    """Answers requests on one base. `start` starts its thread, `close` ends it; also a context manager.

    In float32, greedy answers are those of `generate` on the request alone, whatever else is in the batch. In bfloat16
    and float16, sums are rounded differently in batches of different sizes, so that near ties may be decided otherwise.

    Args:
        model: the base. The engine sets it to evaluation mode and freezes it; it must not be trained
            meanwhile. Its selected prefix does not count.
        slots: how many requests run at a time.
        slot_tokens: places of a slot, for prefix, prompt and answer of a request. By default `seq_length` and 512.
        prefill_chunk: most tokens of prompts that are computed between two steps of the answers.
        queue_limit: how many requests may wait for a slot.
        prefix_source: where the prefixes are; None for the plain base alone.
        prefix_memory: bound on the bytes of loaded prefixes, see PrefixBank.

    Raises:
        ValueError: if a size is out of range, the base is partitioned by ZeRO-3, or its attention implementation takes
            no mask.
    """

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        *,
        slots: int = 16,
        slot_tokens: int | None = None,
        prefill_chunk: int = 256,
        queue_limit: int = 256,
        prefix_source: PrefixFolder | None = None,
        prefix_memory: int = 2**30,
    ) -> None:
        config = model.config
        slot_tokens = config.seq_length + LONGEST_PREFIX if slot_tokens is None else slot_tokens
        for name, value, least in (
            ("slots", slots, 1), ("slot_tokens", slot_tokens, 2), ("prefill_chunk", prefill_chunk, 1),
            ("queue_limit", queue_limit, 0), ("prefix_memory", prefix_memory, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if (reason := obstacle(model)) is not None:
            raise ValueError(reason)
        self.model = model.eval().requires_grad_(False)
        self._prefixes = ServedPrefixes(model, prefix_source, prefix_memory)
        self._cache = make_cache(model, slots, slot_tokens)
        self._scheduler = Scheduler(model, self._cache, prefill_chunk)
        self._queue_limit, self._restarts = queue_limit, 0
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.model.device

    def start(self) -> Engine:
        """Starts the worker.

        Raises:
            EngineError: if it was started or closed before: it has one worker, and is not opened again.
        """
        if self._thread is not None or self._is_closed:
            raise EngineError("The engine was started already, or closed.")
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the worker. Requests that have not ended get an EngineError."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._fail([*self._scheduler.requests, *self._waiting], EngineError("The engine was closed."))
        self._waiting.clear()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, prompt_ids: Sequence[int], settings: SamplingSettings, prefix: str | RowPrefix | None = None
    ) -> Generation:
        """Accepts a request, from any thread. A prefix that is not loaded is loaded first.

        Args:
            prompt_ids: the whole prompt.
            prefix: its name, or the prefix itself; None for the plain base.

        Raises:
            ValueError: if the prompt is empty, or an id is not in the vocabulary.
            UnknownPrefix: if there is no such prefix, or it cannot be loaded.
            PromptTooLong: if prompt and answer, with the prefix, can never fit.
            QueueFull: if too many requests are waiting.
            EngineError: if the engine was closed.
        """
        if not len(prompt_ids):
            raise ValueError("A prompt needs at least one token.")
        prompt, vocabulary = np.array(prompt_ids), self.model.config.padded_vocab_size
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= vocabulary:
            raise ValueError(f"Token ids of a prompt must be integers from 0 to {vocabulary - 1}.")
        self._check_length(len(prompt), settings.max_new_tokens, 0)
        with self._wake:
            self._check_room()
        row_prefix = self._prefixes.get(prefix)
        self._check_length(len(prompt), settings.max_new_tokens, row_prefix.length)
        generation = Generation(len(prompt))
        with self._wake:
            self._check_room()
            self._waiting.append(Request(prompt.astype(np.int64), settings, row_prefix, generation))
            self._wake.notify_all()
        return generation

    def _check_length(self, prompt: int, answer: int, prefix: int) -> None:
        whole, slot = prompt + answer, self._cache.slot_tokens
        if whole > self.model.config.seq_length:
            raise PromptTooLong(
                f"The prompt has {prompt} tokens and max_new_tokens is {answer}: together more than the base's "
                f"seq_length of {self.model.config.seq_length}."
            )
        if prefix + whole > slot:
            raise PromptTooLong(
                f"The prefix has {prefix} tokens, the prompt {prompt}, and max_new_tokens is {answer}: together more "
                f"than the {slot} tokens of a slot."
            )

    def _check_room(self) -> None:
        if self._is_closed:
            raise EngineError("The engine was closed.")
        waiting = sum(not request.generation.is_cancelled for request in self._waiting)
        if waiting >= self._queue_limit + self._cache.slots - self._scheduler.table.running:
            seconds = (waiting + 1) * self._scheduler.seconds / self._cache.slots
            raise QueueFull(waiting, max(1, math.ceil(seconds)))

    def prefix_names(self) -> list[str]:
        """The names of the prefixes, as they are in the folder now."""
        return self._prefixes.names()

    def context_length(self, prefix: str | RowPrefix | None = None) -> int:
        """Most tokens of prompt and answer together. A prefix that is not loaded is loaded first.

        Raises:
            UnknownPrefix: if there is no such prefix, or it cannot be loaded.
        """
        return min(self.model.config.seq_length, self._cache.slot_tokens - self._prefixes.get(prefix).length)

    def load_prefix(self, name: str) -> None:
        """Loads a prefix before a request needs it, again if it is loaded.

        Raises:
            UnknownPrefix: if there is no such prefix, or it cannot be loaded.
        """
        self._prefixes.remove(name)
        self._prefixes.get(name)

    def unload_prefix(self, name: str) -> None:
        """Frees the memory of a prefix, if it is loaded, until a request needs it again; running requests keep it."""
        self._prefixes.remove(name)

    def stats(self) -> EngineStats:
        """Numbers for monitoring, from any thread."""
        scheduler = self._scheduler
        loaded, size, prefix_evictions = self._prefixes.usage()
        rows = [row for row in list(scheduler.table.rows) if row is not None]
        running = [row for row in rows if row.request is not None]
        return EngineStats(
            running=len(running),
            waiting=len(self._waiting),
            slots=self._cache.slots,
            slots_kept=len(rows) - len(running),
            cache_tokens=sum(row.used for row in running),
            cache_tokens_total=self._cache.slots * self._cache.slot_tokens,
            requests=dict(scheduler.ended),
            generated_tokens=scheduler.generated,
            prefill_tokens=scheduler.prefilled,
            cached_tokens=scheduler.shared,
            evictions=scheduler.evictions,
            restarts=self._restarts,
            prefixes_loaded=loaded,
            prefix_bytes=size,
            prefix_evictions=prefix_evictions,
        )

    def _work(self) -> None:
        """The worker: serves until the engine is closed, and starts again after an error."""
        device = self._cache.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.inference_mode():
            while not self._is_closed:
                is_ready = False
                try:
                    self._scheduler.reset()
                    is_ready = True
                    self._serve()
                    continue
                except BaseException as error:  # whatever ends the worker
                    logger.exception("The engine's worker failed. It starts again.")
                    # Without the exception itself, whose traceback keeps tensors.
                    failure = EngineError(f"The worker failed ({type(error).__name__}). Send the request again.")
                self._restarts += 1
                self._fail(self._scheduler.requests, failure)
                if not is_ready:
                    with self._wake:
                        self._fail(self._waiting, failure)
                        self._waiting.clear()
                    time.sleep(_SECONDS_BETWEEN_RESETS)

    def _fail(self, requests: Sequence[Request], error: EngineError) -> None:
        for request in requests:
            self._scheduler.finish(request, "error", error)

    def _serve(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_closed or self._waiting or scheduler.table.running)
                if self._is_closed:
                    return
                for request in [request for request in self._waiting if request.generation.is_cancelled]:
                    self._waiting.remove(request)
                    scheduler.finish(request, "cancelled")
            while (request := self._next()) is not None:
                scheduler.admit(request)
            if scheduler.table.running:
                scheduler.step()

    def _next(self) -> Request | None:
        """The next waiting request, if there is a slot for it."""
        with self._wake:
            has_room = self._scheduler.table.running < self._cache.slots
            return self._waiting.popleft() if self._waiting and has_room else None
