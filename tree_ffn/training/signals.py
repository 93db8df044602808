"""How a run ends before its last step: by a signal, or by a loss that is no number."""

import signal
import threading


class Diverged(RuntimeError):
    """Loss or gradient is not finite; the message names the step."""


class Interrupted(Exception):
    """The run was asked to stop and has saved; the message says how to resume.

    Attributes:
      exit_code: 0 after SIGTERM (a scheduler takes the machine back), 130 after Ctrl-C.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 130 if signum == signal.SIGINT else 0


class StopSignals:
    """Remembers SIGTERM and the first Ctrl-C; a second Ctrl-C quits at once.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Example:
      >>> with StopSignals() as stop:
      ...     stop.received is None
      True
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum, _):
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
