"""What the server counts, in Prometheus' text form at /metrics."""

import time

import fastapi
import prometheus_client
from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experiments.serving.engine import Engine

# Seconds: from a token of a small model to an answer that fills a long context.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one application.

    Args:
      engine: whose queue is told.

    Attributes:
      requests: answers by path of the address and status.
      seconds: from a request to the end of its answer, by path.
      first_token: seconds from a request to the first token of each of its sequences.
      read, made: tokens of prompts, and new ones.
    """

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        common = {"namespace": "tree_ffn", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by status.", ["path", "status"], **common)
        self.seconds = Histogram(
            "request_seconds", "Until the answer's end.", ["path"], buckets=BUCKETS, **common
        )
        self.first_token = Histogram("first_token_seconds", "Until a first token.", buckets=BUCKETS, **common)
        self.read = Counter("prompt_tokens", "Tokens of prompts that were read.", **common)
        self.made = Counter("generation_tokens", "Tokens that were made.", **common)
        running = Gauge("sequences_running", "Sequences that are continued.", **common)
        running.set_function(lambda: min(engine.n_open, engine.rows))
        waiting = Gauge("sequences_waiting", "Sequences that wait for a row.", **common)
        waiting.set_function(lambda: max(0, engine.n_open - engine.rows))


class Counted:
    """An application whose answers are counted.

    Args:
      app: the application.
      metrics: where.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # Only addresses that exist have a name of their own: clients cannot make up others.
            path = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)


def add_metrics(app: fastapi.FastAPI, metrics: Metrics) -> None:
    """Counts all answers, and tells the counts."""
    app.add_middleware(Counted, metrics=metrics)

    @app.get("/metrics")
    async def told():
        content = prometheus_client.generate_latest(metrics.registry)
        return fastapi.Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)
