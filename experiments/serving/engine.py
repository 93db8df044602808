"""The one thread that uses the device: it continues all requests together, and tells who waits for them."""

import queue
import threading
import traceback
from collections.abc import Callable, Iterable

from experiments.common.loaded import Loaded
from experiments.serving.refusal import Refusal
from tree_ffn.inference.batching import Batch, Made, Request

Deliver = Callable[[Made | Refusal], None]


class Engine:
    """Runs a `Batch` on a thread of its own.

    Args:
      model: what answers.
      rows: the most sequences that are continued at once.
      most_waiting: the most that wait beside them.
    """

    def __init__(self, model: Loaded, rows: int, most_waiting: int):
        self.model, self.rows, self.most = model, rows, rows + most_waiting
        self._batch = self._new_batch()
        self._open: dict[Request, Deliver] = {}  # guarded by _changed, like the next two
        self._new: list[Request] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    def start(self) -> None:
        """Starts the thread, and has it make a token: what fails or takes long does so now.

        Raises:
          Refusal: it failed.
        """
        self._thread.start()
        first: queue.SimpleQueue[Made | Refusal] = queue.SimpleQueue()
        self.submit([Request(self.model.prompt(""), 1)], first.put)
        if isinstance(made := first.get(), Refusal):
            raise made

    def end(self) -> None:
        """Lets the thread end after its present step; what is not done is refused."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """`end`, and waits for it."""
        self.end()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def n_open(self) -> int:
        """Sequences that are continued or wait."""
        with self._changed:
            return len(self._open)

    def submit(self, requests: list[Request], deliver: Deliver) -> None:
        """Lets requests wait for the device.

        Args:
          requests: checked ones (`Request.check`).
          deliver: is called on the device's thread with all that is made, and
            with a Refusal if it fails; raises nothing.

        Raises:
          Refusal: too many wait already, or the server ends.
        """
        with self._changed:
            if self._closing:
                raise Refusal(503, "The server is shutting down.")
            if len(self._open) + len(requests) > self.most:
                raise Refusal(429, "Too many requests are waiting; try again later.", code="queue_full")
            self._open.update(dict.fromkeys(requests, deliver))
            self._new += requests
            self._changed.notify()

    def cancel(self, requests: Iterable[Request]) -> None:
        """Forgets requests; those that are done already are no mistake."""
        with self._changed:
            for one in requests:
                self._open.pop(one, None)

    def _new_batch(self) -> Batch:
        return Batch(self.model.spec, self.model.variables, self.rows)

    def _work(self) -> None:
        while self._take_in():
            try:
                for made in self._batch.step():
                    self._tell(made)
            except Exception:  # whatever it is, the next requests may do better
                traceback.print_exc()
                self._batch = self._new_batch()
                self._give_up(Refusal(500, "The server failed to answer this request."))
        self._give_up(Refusal(503, "The server is shutting down."))

    def _take_in(self) -> bool:
        """Waits for work and hands it to the batch; False when the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._new or len(self._batch))
            new, self._new = self._new, []
            for one in self._batch.requests:
                if one not in self._open:
                    self._batch.drop(one)
            for one in new:
                if one in self._open:
                    self._batch.add(one)
            return not self._closing

    def _tell(self, made: Made) -> None:
        with self._changed:
            deliver = self._open.get(made.request)
            if made.last:
                self._open.pop(made.request, None)
        if deliver:
            deliver(Refusal(500, str(made.failed), code="not_finite") if made.failed else made)

    def _give_up(self, refusal: Refusal) -> None:
        with self._changed:
            left, self._open = self._open, {}
            self._new = []
        for deliver in left.values():
            deliver(refusal)
