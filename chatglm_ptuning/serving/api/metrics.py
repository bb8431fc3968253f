"""What `/metrics` reports, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.vllm.engine import VllmEngine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ApiMetrics:
    """Counters of the API, and the engine's numbers at the time of reading.

    Attributes:
        requests: by route, method and status.
        tokens: by model and kind (`prompt`, `cached`, `completion`).
        first_token_seconds, seconds: from the arrival of a request to its first token, and to its end.
        in_progress: requests that are being answered.
    """

    def __init__(self, engine: Engine | VllmEngine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "chatglm_requests", "HTTP requests", ["route", "method", "status"], registry=self._registry
        )
        self.tokens = Counter("chatglm_tokens", "Tokens of requests", ["model", "kind"], registry=self._registry)
        self.first_token_seconds = Histogram(
            "chatglm_time_to_first_token_seconds", "From arrival to the first token", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "chatglm_request_seconds", "From arrival to the end of the response", ["route"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.in_progress = Gauge(
            "chatglm_requests_in_progress", "Requests that are being answered", registry=self._registry
        )
        self._registry.register(_EngineNumbers(engine))

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)


class _EngineNumbers:
    """A collector: reads `Engine.stats` when the metrics are read."""

    def __init__(self, engine: Engine | VllmEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, help_text, value in (
            ("running", "Requests with a slot", stats.running),
            ("waiting", "Requests in the queue", stats.waiting),
            ("slots", "Slots of the cache", stats.slots),
            ("slots_kept", "Slots kept for prompts that begin alike", stats.slots_kept),
            ("cache_tokens", "Places of the cache in use", stats.cache_tokens),
            ("cache_tokens_limit", "Places of the cache", stats.cache_tokens_total),
            ("prefixes_loaded", "Prefixes in memory", stats.prefixes_loaded),
            ("prefix_bytes", "Bytes of the prefixes in memory", stats.prefix_bytes),
        ):
            yield GaugeMetricFamily(f"chatglm_engine_{name}", help_text, value)
        for name, help_text, value in (
            ("generated_tokens", "Generated tokens", stats.generated_tokens),
            ("prefill_tokens", "Computed tokens of prompts", stats.prefill_tokens),
            ("cached_tokens", "Tokens of prompts shared with earlier ones", stats.cached_tokens),
            ("cache_evictions", "Kept slots that were overwritten", stats.evictions),
            ("prefix_evictions", "Prefixes removed from memory", stats.prefix_evictions),
            ("restarts", "Restarts of the worker", stats.restarts),
        ):
            yield CounterMetricFamily(f"chatglm_engine_{name}", help_text, value)
        ended = CounterMetricFamily("chatglm_engine_requests", "Ended requests", labels=["finish_reason"])
        for reason, count in stats.requests.items():
            ended.add_metric([reason], count)
        yield ended
