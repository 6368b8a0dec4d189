"""Figures for Prometheus: each engine's own, and what HTTP adds. Names and meaning: docs/serving.md."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from exporter.serving.requests import Engine

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry a server, so that two servers in one process do not mix."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "exporter_http_requests", "Responses by path and status.", ["path", "status"], registry=self._registry
        )
        self.errors = Counter(
            "exporter_errors", "Requests that got an error, by its code.", ["code"], registry=self._registry
        )
        self.seconds = Histogram(
            "exporter_request_seconds", "From request to last byte.", ["path"], buckets=WHOLE, registry=self._registry
        )
        self.first_token = Histogram(
            "exporter_time_to_first_token_seconds",
            "From request to first token, the queue included.",
            ["model"],
            buckets=FIRST,
            registry=self._registry,
        )
        self.token = Histogram(
            "exporter_time_per_token_seconds",
            "From one token of a choice to its next.",
            ["model"],
            buckets=GAPS,
            registry=self._registry,
        )
        self.choices = Counter(
            "exporter_choices", "Finished texts.", ["model", "finish_reason"], registry=self._registry
        )
        self._registry.register(EngineCollector(engines))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """Reads each engine's stats when Prometheus asks."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        gauges = {
            "queue_requests": ("Requests that wait for a slot.", lambda s: s.waiting),
            "slots_running": ("Slots that hold a running stream.", lambda s: s.running),
            "slots": ("Streams that can run at once.", lambda s: s.slots),
            "cache_bytes": ("Memory of the key-value cache.", lambda s: s.cache_bytes),
            "cached_prefixes": ("Free slots whose tokens can be reused.", lambda s: s.cached_prefixes),
        }
        counters = {
            "engine_requests": ("Streams accepted.", lambda s: s.requests),
            "queue_full": ("Streams refused because the queue was full.", lambda s: s.rejected),
            "engine_failures": ("Streams that ended with an error.", lambda s: s.failed),
            "prompt_tokens": ("Tokens of prompts.", lambda s: s.prompt_tokens),
            "reused_tokens": ("Tokens of prompts taken from the cache.", lambda s: s.reused_tokens),
            "generated_tokens": ("New tokens.", lambda s: s.new_tokens),
            "decode_steps": ("Decode steps.", lambda s: s.decode_steps),
            "decode_rows": ("Rows of all decode steps.", lambda s: s.decode_rows),
            "decode_seconds": ("Time in decode steps.", lambda s: s.decode_seconds),
            "prefill_seconds": ("Time in prefill.", lambda s: s.prefill_seconds),
        }
        for kind, figures in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (meaning, value) in figures.items():
                family = kind(f"exporter_{name}", meaning, labels=["bundle"])
                for bundle, moment in stats.items():
                    family.add_metric([bundle], value(moment))
                yield family


@dataclass(slots=True)
class Facts:
    """What one request's log line says; endpoints fill it in. No text of a prompt or an answer."""

    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    stream: bool | None = None
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_token_ms: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    failed: int | None = None  # status of a failure that came when another status had been sent
    prompts: list[str] | None = None  # with --log-prompts only


class Watch:
    """Times one choice's tokens."""

    def __init__(self, metrics: Metrics, facts: Facts, model: str) -> None:
        self._metrics, self._facts, self._model = metrics, facts, model
        self._last: float | None = None

    def begin(self, cached_tokens: int) -> None:
        self._facts.cached_tokens += cached_tokens

    def token(self) -> None:
        now = time.monotonic()
        self._facts.new_tokens += 1
        if self._last is None:
            self._metrics.first_token.labels(self._model).observe(now - self._facts.began)
            if self._facts.first_token_ms is None:
                self._facts.first_token_ms = round(1000 * (now - self._facts.began), 1)
        else:
            self._metrics.token.labels(self._model).observe(now - self._last)
        self._last = now

    def end(self, reason: str) -> None:
        self._facts.finish_reasons.append(reason)
        self._metrics.choices.labels(self._model, reason).inc()
