"""Figures for Prometheus: under the names that dashboards for vLLM read, and what only this server has under ours."""

import time
from collections.abc import Iterator
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from memdlm.serving.engine import Engine
from memdlm.serving.requests import Done, Event, Failed, Response, Settled
from memdlm.serving.tickets import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LONGEST_WAIT = 60


@final
class Metrics:
    """The counters of one server."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        labels: dict[str, Any] = {"labelnames": ["model_name"], "registry": self.registry}
        self._first = Histogram(
            "vllm:time_to_first_token_seconds", "Until the first tokens were final.", buckets=SECONDS, **labels
        ).labels(model)
        self._between = Histogram(
            "vllm:inter_token_latency_seconds",
            "Time between two settled parts of an answer, per token of the later one.",
            buckets=TOKEN_SECONDS,
            **labels,
        ).labels(model)
        self._whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From the queue to the end of an answer.", buckets=SECONDS, **labels
        ).labels(model)
        self._queued = Histogram(
            "vllm:request_queue_time_seconds", "Time in the queue.", buckets=SECONDS, **labels
        ).labels(model)
        self._prompt = Counter("vllm:prompt_tokens", "Tokens of prompts.", **labels).labels(model)
        self._tokens = Counter("vllm:generation_tokens", "Tokens of answers.", **labels).labels(model)
        self._model = model
        self._finished = Counter(
            "vllm:request_success",
            "Answers, by why they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._steps = Histogram(
            "memdlm:steps_per_block", "Denoising steps of an answer per block.", buckets=STEPS, **labels
        ).labels(model)
        self.refused = Counter("memdlm:requests_refused", "Requests refused with status 429.", **labels).labels(model)
        self._seconds = 1.0
        """Moving average of an answer's time in a slot."""
        self.registry.register(_Engine(engine, model))

    def page(self) -> bytes:
        """Return all figures as text."""
        return generate_latest(self.registry)

    def wait_s(self) -> int:
        """Return in how many seconds a full queue is likely to have room."""
        slots = max(1, self.engine.figures().slots)
        return max(1, min(LONGEST_WAIT, round(self._seconds / slots + 0.5)))

    def watch(self, ticket: Ticket) -> None:
        """Measure one answer."""
        ticket.add_listener(_Watch(self, ticket).see)


@final
class _Watch:
    """Measures one answer while its events come, in the engine's thread."""

    def __init__(self, metrics: Metrics, ticket: Ticket) -> None:
        self.metrics, self.ticket, self.last, self.blocks = metrics, ticket, 0.0, 0

    def see(self, event: Event) -> None:
        """Count one event."""
        now, metrics = time.monotonic(), self.metrics
        if isinstance(event, Settled):
            if self.last:
                metrics._between.observe((now - self.last) / max(1, len(event.ids)))
            else:
                metrics._first.observe(now - self.ticket.submitted)
            self.last, self.blocks = now, max(self.blocks, event.block + 1)
        elif isinstance(event, Done) and isinstance(event.result, Response):
            self._done(event.result, now)
        elif isinstance(event, Failed):
            metrics._finished.labels(metrics._model, "abort").inc()

    def _done(self, result: Response, now: float) -> None:
        metrics = self.metrics
        metrics._whole.observe(now - self.ticket.submitted)
        metrics._queued.observe(result.seconds_waiting)
        metrics._prompt.inc(result.num_prompt_tokens)
        metrics._tokens.inc(len(result.ids))
        metrics._finished.labels(metrics._model, "length" if result.finish == "length" else "stop").inc()
        metrics._steps.observe(result.generation.num_forward_passes / max(1, self.blocks))
        metrics._seconds += 0.1 * (result.seconds_running - metrics._seconds)


@final
class _Engine(Collector):
    """What the engine does at the moment of asking."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model

    def collect(self) -> Iterator[Metric]:
        """Yield the figures."""
        now = self.engine.figures()
        for name, words, value in (
            ("vllm:num_requests_running", "Answers in the batch.", now.running),
            ("vllm:num_requests_waiting", "Jobs in the queue.", now.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the prefix cache in use; 1 means all of it.",
                now.prefix_bytes / max(1, now.prefix_bytes_limit),
            ),
            ("memdlm:slots", "Answers that fit into the batch.", now.slots),
            ("memdlm:texts_writing", "Texts that are being written into memories.", now.writing),
            ("memdlm:live_memories", "Memories on the device.", now.live_memories),
            ("memdlm:memory_bytes", "Bytes of the memories on the device.", now.memory_bytes),
            ("memdlm:memory_bytes_limit", "Bytes that memories may take there.", now.memory_bytes_limit),
            ("memdlm:stacked_bytes", "Bytes of the copies that the present batch reads.", now.stacked_bytes),
            ("memdlm:prefix_cache_bytes", "Bytes of cached keys and values of prompts.", now.prefix_bytes),
        ):
            gauge = GaugeMetricFamily(name, words, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, words, value in (
            ("memdlm:steps", "Denoising steps of the batch.", now.steps),
            ("memdlm:passes", "Calls of the network.", now.passes),
            ("memdlm:positions", "Token positions that went through the network.", now.positions),
            ("memdlm:memories_written", "Memories written.", now.writes),
            ("memdlm:memory_hits", "Answers whose memory was on the device.", now.memory_hits),
            ("memdlm:memory_misses", "Answers whose memory was read from the store.", now.memory_misses),
            ("memdlm:memory_evictions", "Memories that left the device for others.", now.memory_evictions),
            ("memdlm:jobs_failed", "Jobs that failed.", now.failed),
            ("memdlm:jobs_cancelled", "Jobs that were given up.", now.cancelled),
            ("memdlm:prefix_positions_reused", "Positions of prompts that the cache held.", now.prefix_reused),
        ):
            counter = CounterMetricFamily(name, words, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter
