"""What the router counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from examples.router.books import Books
from examples.router.costs import Decision
from umbp_core.tiers import Tier

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RouterMetrics:
    """Counters of one router, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._decisions = Counter(
            "umbp_router_decisions", "Requests by chosen worker and why.", ["worker", "reason"], registry=registry
        )
        self._degraded = Counter(
            "umbp_router_degraded", "Decisions without knowing who holds the prompt.", ["cause"], registry=registry
        )
        self._prompt_tokens = Counter("umbp_router_prompt_tokens", "Tokens of prompts, as known.", registry=registry)
        self._held_tokens = Counter(
            "umbp_router_held_tokens", "Of these, held by the chosen worker.", ["tier"], registry=registry
        )
        self._decision_seconds = Histogram(
            "umbp_router_decision_seconds", "Time to decide.", buckets=_SECONDS, registry=registry
        )
        self._first_byte = Histogram(
            "umbp_router_first_byte_seconds", "Request to first byte.", ["worker"], buckets=_SECONDS, registry=registry
        )
        self._requests = Counter("umbp_router_requests", "Answers by status.", ["worker", "status"], registry=registry)
        self._failures = Counter(
            "umbp_router_worker_failures", "Attempts that failed.", ["worker", "cause"], registry=registry
        )
        self._alive = Gauge("umbp_router_worker_alive", "Whether a worker answers.", ["worker"], registry=registry)
        self._speeds = Gauge(
            "umbp_router_seconds_per_token", "What a token is taken to cost.", ["kind"], registry=registry
        )
        self._outstanding = Gauge(
            "umbp_router_outstanding", "Requests that a worker has now.", ["worker"], registry=registry
        )

    def decided(self, decision: Decision, cause: str, seconds: float) -> None:
        """A request was given to the first of the ranking; ``cause`` is empty unless something was not known."""
        chosen = decision.ranking[0]
        self._decisions.labels(chosen.offer.seat, decision.reason.value).inc()
        self._decision_seconds.observe(seconds)
        self._prompt_tokens.inc(chosen.prompt_tokens)
        for run in chosen.offer.runs:
            self._held_tokens.labels(Tier(run.tier).name).inc(run.length * chosen.offer.block_tokens)
        if cause:
            self._degraded.labels(cause).inc()

    def failed(self, worker: str, cause: str) -> None:
        """An attempt ended without an answer."""
        self._failures.labels(worker, cause).inc()

    def first_byte(self, worker: str, seconds: float) -> None:
        """The first byte of an answer came."""
        self._first_byte.labels(worker).observe(seconds)

    def answered(self, worker: str, status: int) -> None:
        """An answer was passed on to its end."""
        self._requests.labels(worker, str(status)).inc()

    def page(self, books: Books) -> bytes:
        """The text for a scrape."""
        self._alive.clear()
        self._outstanding.clear()
        self._speeds.labels("prefill").set(books.speeds.prefill)
        for tier, seconds in books.speeds.tiers.items():
            self._speeds.labels(Tier(tier).name).set(seconds)
        for worker in books:
            self._alive.labels(worker.url).set(worker.alive)
            for seat in worker.seats.values():
                self._outstanding.labels(seat.name).set(seat.outstanding)
        return generate_latest(self._registry)
