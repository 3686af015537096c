"""Figures for Prometheus; the client library counts, and adds those of the process (memory, CPU)."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from .engine import Engine, Event, Job, Piece, Started

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """Of one server; `heard` is its engine's `on_event`."""

    def __init__(self, engine: Engine) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        info = engine.model.runtime.info
        self.requests = Counter("rmse_requests", "answers by path and status", ["path", "status"], registry=registry)
        self.prompt = Counter("rmse_prompt_tokens", "tokens of prompts that were read", registry=registry)
        self.cached = Counter("rmse_cached_tokens", "tokens of prompts that a kept state had read", registry=registry)
        self.loops = Histogram(
            "rmse_loops", "loops behind each generated token", buckets=range(1, info.max_loops + 1), registry=registry
        )
        self.seconds = Histogram("rmse_request_seconds", "from the request to the end of its answer", registry=registry)
        self.left = Counter("rmse_left", "requests whose client left before the end", registry=registry)
        self._loops = self._tokens = 0
        tokens = Counter("rmse_generated_tokens", "tokens that were made", registry=registry)
        self._tokens_made = tokens
        for name, text, read in (
            ("rmse_mean_loops", "loops behind a generated token, on average since the start", self.mean_loops),
            ("rmse_queue", "requests that wait", lambda: engine.waiting),
            ("rmse_queue_capacity", "requests that may wait", lambda: engine.capacity),
            ("rmse_running", "requests that are being answered", lambda: len(engine.jobs) - engine.waiting),
            ("rmse_sessions", "conversations that are kept", lambda: len(engine.sessions)),
            ("rmse_session_bytes", "memory that they take", lambda: engine.sessions.nbytes),
            ("rmse_sessions_evicted", "conversations that made room for others", lambda: engine.sessions.evicted),
            ("rmse_state_bytes", "memory of the text that is being written", engine.model.runtime.state_bytes),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    def mean_loops(self) -> float:
        return self._loops / self._tokens if self._tokens else 0.0

    def heard(self, job: Job, event: Event) -> None:
        """Count what the engine tells."""
        if isinstance(event, Started):
            self.prompt.inc(event.prompt_tokens - event.cached_tokens)
            self.cached.inc(event.cached_tokens)
        elif isinstance(event, Piece):
            self._tokens_made.inc(len(event.depth))
            self._tokens, self._loops = self._tokens + len(event.depth), self._loops + sum(event.depth)
            for depth in event.depth:
                self.loops.observe(depth)
        elif job.left:
            self.left.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
