"""Standard output and error: a program goes on when nobody reads them any more.

A pipe whose reader has gone (`| head`, a `tee` that died), a terminal that was closed, a full disk and a
stream that was closed from the start (`>&-`) are no reason to lose a run: what is printed is dropped from
then on, one sentence says so, and the program goes on. A program whose result is what it prints ends instead.

Characters that the terminal's encoding lacks are written as `\\xe9`, which loses nothing, as `?` would. Lines
go out as they are printed, also into a pipe or a file.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def lasting(prints: Callable[[], object]) -> Iterator[None]:
    """Makes sys.stdout and sys.stderr last until the program ends.

    Args:
      prints: whether the result is what is printed, so that the program ends where that is lost: with 141
        where nobody reads any more, as others do by SIGPIPE, and with 1 and a sentence for all else.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):  # else somebody's own, such as a test's
            setattr(sys, name, _text(_Descriptor(number, stream is None, prints), stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _text(raw: io.RawIOBase, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A stream of lines over `raw`, in the encoding of the one that was there."""
    if stream:
        stream.flush()
    encoding = stream.encoding if stream else "utf-8"
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


def _fill(number: int) -> None:
    """Opens a number that is free, lest the next file gets it, and what C libraries print."""
    try:
        os.fstat(number)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class _Descriptor(io.RawIOBase):
    """A file descriptor that takes whatever is written, and drops it after the first failure.

    Args:
      number: 1 or 2.
      closed: it was closed from the start; its number may be another file's by now.
      prints: as in `lasting`.
    """

    def __init__(self, number: int, closed: bool, prints: Callable[[], object]):
        self._number, self._was_closed, self._prints, self._lost = number, closed, prints, False
        if closed:
            _fill(number)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return not self._was_closed and os.isatty(self._number)

    def write(self, data) -> int:
        while not self._lost:
            try:
                if self._was_closed:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                return os.write(self._number, data)
            except BlockingIOError:  # somebody else made the pipe so, and it is full
                select.select([], [self._number], [])
            except OSError as error:
                self._lost = True
                self._end(error)
        return len(data)

    def _end(self, error: OSError) -> None:
        """After the first failure: ends the program, or says that it goes on."""
        if self._number != 1:
            return
        ends = self._prints()
        if ends and isinstance(error, BrokenPipeError):
            sys.exit(141)
        program, rest = (
            os.path.basename(sys.argv[0]),
            "" if ends else "; what it prints is dropped, it goes on",
        )
        print(f"{program}: stdout cannot be written ({error.strerror}){rest}.", file=sys.stderr, flush=True)
        if ends:
            sys.exit(1)
