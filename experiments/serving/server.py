"""Runs the application until a signal, and has what is still under way told when it takes too long to end."""

import asyncio
import socket

import uvicorn

from experiments.serving.engine import Engine
from tree_ffn.training.signals import StopSignals

# Seconds in which answers that are given up reach their clients.
TELLING = 5


class Server(uvicorn.Server):
    """uvicorn's, which lets answers come to their end at SIGTERM or SIGINT.

    Args:
      application: as `app.build` gives it.
      engine: its engine.
      grace: seconds after which the engine gives up what is not done.
      stop: the other signals that end a program, and any that came before it ran.
    """

    def __init__(self, application, engine: Engine, grace: int, stop: StopSignals):
        config = uvicorn.Config(
            application, log_level="warning", timeout_graceful_shutdown=grace + TELLING, lifespan="on",
            loop="asyncio", server_header=False,
            log_config=None,  # the root logger prints; uvicorn's own would close what that one prints to
        )  # fmt: skip
        super().__init__(config)
        self._engine, self._grace, self._stop = engine, grace, stop

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; whether to end."""
        return await super().on_tick(counter) or self._stop.received is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        giving_up = asyncio.get_running_loop().call_later(self._grace, self._engine.end)
        await super().shutdown(sockets)
        giving_up.cancel()
