"""vLLM in the place of this kit's engine: the same requests, tokens and errors, so that the API over it is the same."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from chatglm_ptuning.serving.engine.engine import EngineStats
from chatglm_ptuning.serving.engine.request import (
    EngineError,
    Generation,
    PromptTooLong,
    QueueFull,
    SamplingSettings,
    Token,
)
from chatglm_ptuning.serving.vllm.exports import Exported, Exports
from chatglm_ptuning.serving.vllm.process import UnixConnection, VllmProcess

if TYPE_CHECKING:
    from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig

logger = logging.getLogger(__name__)

_RETRY_AFTER = 1
_GENERATE = "/inference/v1/generate"


class RemoteGeneration(Generation):
    """An answer that vLLM generates; cancelling it hangs up, which ends it there.

    Attributes:
        generated: tokens so far.
    """

    def __init__(self, prompt_tokens: int, address: str) -> None:
        super().__init__(prompt_tokens)
        self.connection = UnixConnection(address)
        self.generated = 0

    def cancel(self) -> None:
        """As `Generation.cancel`."""
        super().cancel()
        self.connection.hang_up()


class VllmEngine:
    """Answers requests by vLLM. A context manager: entering it starts vLLM, which takes a minute or more.

    It has the methods of `Engine` that the API uses.

    Args:
        config: of the base.
        slots: requests that vLLM answers at a time.
        slot_tokens: most tokens of prefix, prompt and answer together.
        queue_limit: requests that may wait.
        base_name: name of the plain base in requests to vLLM.
    """

    device = "vLLM"

    def __init__(
        self,
        process: VllmProcess,
        exports: Exports,
        config: ChatGLMConfig,
        *,
        slots: int,
        slot_tokens: int,
        queue_limit: int,
        base_name: str,
    ) -> None:
        self._process, self._exports = process, exports
        self._vocabulary, self._seq_length = config.padded_vocab_size, config.seq_length
        self._slots, self._slot_tokens, self._queue_limit = slots, slot_tokens, queue_limit
        self._base_name = base_name
        self._lock = threading.Lock()
        self._running: set[RemoteGeneration] = set()
        self._ended: Counter[str] = Counter()
        self._generated = self._prefilled = self._cached = 0
        self._is_closed = False

    def __enter__(self) -> VllmEngine:
        # The handler of the signal ends the server; leaving the context then says why.
        self._process.start(on_death=lambda: os.kill(os.getpid(), signal.SIGTERM))
        return self

    def __exit__(self, *_: object) -> None:
        """Ends vLLM.

        Raises:
            OSError: with the last lines of its log, if it ended by itself.
        """
        with self._lock:
            self._is_closed = True
            running = list(self._running)
        for generation in running:
            generation.cancel()
        self._process.stop()
        if self._process.failure is not None:
            raise OSError(self._process.failure)

    def submit(
        self, prompt_ids: Sequence[int], settings: SamplingSettings, prefix: str | None = None
    ) -> RemoteGeneration:
        """As `Engine.submit`."""
        ids = [int(token) for token in prompt_ids]
        if not ids:
            raise ValueError("A prompt needs at least one token.")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise ValueError(f"Token ids of a prompt must be integers from 0 to {self._vocabulary - 1}.")
        exported = None if prefix is None else self._exports.get(prefix)
        room = self._room(exported)
        if len(ids) + settings.max_new_tokens > room:
            raise PromptTooLong(
                f"The prompt has {len(ids)} tokens and max_new_tokens is {settings.max_new_tokens}: together more than "
                f"the {room} tokens that fit."
            )
        generation = RemoteGeneration(len(ids), self._process.address)
        with self._lock:
            if self._is_closed:
                raise EngineError("The engine was closed.")
            if len(self._running) >= self._slots + self._queue_limit:
                raise QueueFull(len(self._running) - self._slots, _RETRY_AFTER)
            self._running.add(generation)
        body = {
            "model": self._base_name if exported is None else exported.name,
            "token_ids": ids,
            "sampling_params": _sampling_params(settings),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        hidden = 0 if exported is None else exported.length
        threading.Thread(target=self._answer, args=(generation, body, settings, hidden), daemon=True).start()
        return generation

    def context_length(self, prefix: str | None = None) -> int:
        """As `Engine.context_length`."""
        return self._room(None if prefix is None else self._exports.get(prefix))

    def prefix_names(self) -> list[str]:
        """As `Engine.prefix_names`."""
        return self._exports.names()

    def load_prefix(self, name: str) -> None:
        """As `Engine.load_prefix`: exports it now."""
        self._exports.remove(name)
        self._exports.get(name)

    def unload_prefix(self, name: str) -> None:
        """As `Engine.unload_prefix`. vLLM's workers drop it when they need its memory."""
        self._exports.remove(name)

    def stats(self) -> EngineStats:
        """As `Engine.stats`; the numbers of vLLM's cache are 0 while it does not answer."""
        running, waiting, used, capacity = self._vllm_numbers()
        prefixes, size = self._exports.usage()
        with self._lock:
            return EngineStats(
                running=running,
                waiting=waiting,
                slots=self._slots,
                slots_kept=0,
                cache_tokens=round(used * capacity),
                cache_tokens_total=capacity,
                requests=dict(self._ended),
                generated_tokens=self._generated,
                prefill_tokens=self._prefilled,
                cached_tokens=self._cached,
                evictions=0,
                restarts=0,
                prefixes_loaded=prefixes,
                prefix_bytes=size,
                prefix_evictions=0,
            )

    def _room(self, exported: Exported | None) -> int:
        return min(self._seq_length, self._slot_tokens - (0 if exported is None else exported.length))

    def _answer(
        self, generation: RemoteGeneration, body: dict[str, Any], settings: SamplingSettings, hidden: int
    ) -> None:
        """Passes the tokens of a request on as they come."""
        reason, error = "error", None
        try:
            reason = self._read(generation, body, settings, hidden)
        except (OSError, HTTPException, ValueError, LookupError) as failure:
            error = EngineError(f"vLLM did not answer ({type(failure).__name__}: {failure}).")
        except EngineError as failure:
            error = failure
        finally:
            generation.connection.close()
        if generation.is_cancelled:
            reason, error = "cancelled", None
        elif error is not None:
            logger.error(f"A request failed: {error}")
        with self._lock:
            self._running.discard(generation)
            self._ended[reason] += 1
            self._generated += generation.generated
            self._cached += generation.cached_tokens
            self._prefilled += generation.prompt_tokens - generation.cached_tokens
        generation.finish(reason, error)

    def _read(self, generation: RemoteGeneration, body: dict[str, Any], settings: SamplingSettings, hidden: int) -> str:
        headers = {"Content-Type": "application/json"}
        generation.connection.request("POST", _GENERATE, json.dumps(body), headers)
        if generation.is_cancelled:  # before there was a connection to hang up
            return "cancelled"
        response = generation.connection.getresponse()
        if response.status != 200:
            raise EngineError(f"vLLM refused a request with the status {response.status}: {response.read(1000)!r}.")
        reason = None
        for event in _events(response):
            if "error" in event:
                raise EngineError(f"vLLM failed: {event['error'].get('message')}")
            for choice in event["choices"]:
                for token in _tokens(choice, settings.top_logprobs):
                    if token.id in settings.stop_ids:
                        reason = "stop"
                        continue
                    generation.put(token)
                    generation.generated += 1
                reason = reason or choice["finish_reason"]
            if usage := event.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                generation.cached_tokens = min(cached, generation.prompt_tokens)
        if reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended an answer early ({reason}).")
        return reason

    def _vllm_numbers(self) -> tuple[int, int, float, int]:
        """Running and waiting requests, the share of the cache in use, and the tokens of the cache."""
        connection = UnixConnection(self._process.address, timeout=5)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            samples = {
                sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples
            }
        except (OSError, HTTPException, ValueError):
            samples = {}
        finally:
            connection.close()

        def value(name: str) -> float:
            return samples[name].value if name in samples else 0.0

        sizes = samples["vllm:cache_config_info"].labels if "vllm:cache_config_info" in samples else {}
        blocks, size = sizes.get("num_gpu_blocks", ""), sizes.get("block_size", "")
        capacity = int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else 0
        return (
            int(value("vllm:num_requests_running")),
            int(value("vllm:num_requests_waiting")),
            value("vllm:kv_cache_usage_perc"),
            capacity,
        )


def _sampling_params(settings: SamplingSettings) -> dict[str, Any]:
    return {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "repetition_penalty": settings.repetition_penalty,
        "seed": settings.seed,
        "stop_token_ids": list(settings.stop_ids),
        "ignore_eos": True,
        "detokenize": False,
        # One more: the chosen token is among them, whatever its rank.
        "logprobs": None if settings.top_logprobs is None else settings.top_logprobs + 1,
    }


def _tokens(choice: dict[str, Any], top_logprobs: int | None) -> Iterator[Token]:
    ids = choice["token_ids"] or []
    if top_logprobs is None:
        yield from (Token(token) for token in ids)
        return
    for token, entry in zip(ids, choice["logprobs"]["content"], strict=True):
        ranked = sorted(entry["top_logprobs"], key=lambda one: -one["logprob"])[:top_logprobs]
        top = tuple((one["token_id"], one["logprob"]) for one in ranked)
        yield Token(token, entry["logprob"], top)


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The server-sent events of a response, without the last, `[DONE]`."""
    while line := response.readline():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
