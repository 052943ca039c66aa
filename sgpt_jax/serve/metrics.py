"""What a server counts, for Prometheus. No label comes from a request but its route, of which there are few."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sgpt_jax.serve.batching import BatchReport, Queue

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests that were answered", "route", "status")
        self.seconds = Histogram(
            "sgpt_request_seconds",
            "Time to answer",
            ["route"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.texts_cut = self._counter("texts_cut", "Texts that were too long and lost their end")
        self._items = self._counter("items", "Texts, pairs and queries that the device has worked on", "lane")
        self._batches = self._counter("batches", "Batches", "lane")
        self._tokens = self._counter("batch_tokens", "Tokens in batches", "lane")
        self._padded = self._counter("batch_padded_tokens", "Tokens in batches, padding among them", "lane")
        self._busy = self._counter("batch_seconds", "Time from the start of a batch to its results", "lane")
        self._waited = Histogram(
            "sgpt_queue_seconds",
            "Time that the oldest of a batch had waited",
            ["lane"],
            registry=self.registry,
            buckets=_SECONDS,
        )

    def watch(self, queue: Queue) -> None:
        """Shows a queue's state."""
        for name, text, value in (
            ("queue_tokens", "Tokens that wait", lambda: queue.tokens),
            ("queue_tokens_most", "The most tokens that have waited", lambda: queue.most_tokens),
            ("queue_tokens_bound", "Tokens that may wait", lambda: queue.bound),
            (
                "dropped",
                "Texts, pairs and queries that were dropped before their turn",
                lambda: queue.dropped,
            ),
        ):
            Gauge(f"sgpt_{name}", text, registry=self.registry).set_function(value)

    def on_batch(self, report: BatchReport) -> None:
        """Counts a batch."""
        self._items.labels(report.lane).inc(report.items)
        self._batches.labels(report.lane).inc()
        self._tokens.labels(report.lane).inc(report.tokens)
        self._padded.labels(report.lane).inc(report.padded)
        self._busy.labels(report.lane).inc(report.seconds)
        self._waited.labels(report.lane).observe(report.waited)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sgpt_{name}", text, labels, registry=self.registry)
