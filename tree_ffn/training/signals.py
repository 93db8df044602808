"""How a run ends before its last step: by a signal, or by a loss that is no number."""

import signal
import threading


class Diverged(RuntimeError):
    """Loss or gradient is not finite; the message names the step."""


# The machine is taken back (SLURM's --signal names any of the first four), the terminal has gone, the time is
# used up.
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop and has saved, unfinished; the message says how to resume.

    Attributes:
      exit_code: 128 + the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM. A job set
        takes 0 for done and would not start such a run again.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """Remembers that one of STOPS came; a second Ctrl-C quits at once.

    What is ignored from the start stays so (nohup ignores SIGHUP), but for SIGTERM and SIGINT: a shell
    ignores SIGINT for what runs in the background. Outside the main thread, where Python allows no handlers,
    it does nothing.

    Example:
      >>> with StopSignals() as stop:
      ...     stop.received is None
      True
    """

    signals = STOPS

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                if signal.getsignal(signum) is not signal.SIG_IGN or signum in (
                    signal.SIGTERM,
                    signal.SIGINT,
                ):
                    self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def at(self, step: int) -> int | None:
        """The signal that stops a run after its step number `step`, if one does."""
        del step
        return self.received

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum, _):
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
