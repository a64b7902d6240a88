"""The queue for the device: first come, first served."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from .failure import ReconError

LOOK_S = 0.5


class Turns:
    """At most `slots` turns are held at a time; the others wait in a queue and are told their place.

    `running` and `waiting` may be read from any thread.
    """

    def __init__(self, slots: int = 1):
        self.slots, self.running = slots, 0
        self.line: list[object] = []
        self.changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Number of waiting turns."""
        return len(self.line)

    @contextlib.contextmanager
    def hold(
        self, tell: Callable[[int], None] = lambda place: None, give_up: Callable[[], str] = lambda: ""
    ) -> Iterator[None]:
        """Wait in the queue, then hold a slot within the context.

        Args:
            tell: called with the place in the queue (1: next) first and whenever it changes; not called if there is no
                wait.
            give_up: returns the reason not to wait for a slot, or not to take one, or "".

        Raises:
            ReconError: with the reason given by `give_up`.
        """
        ticket = object()
        with self.changed:
            self.line.append(ticket)
        try:
            self._wait(ticket, tell, give_up)
        except BaseException:
            with self.changed:
                self.line.remove(ticket)
                self.changed.notify_all()
            raise
        try:
            yield
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def _wait(self, ticket: object, tell: Callable[[int], None], give_up: Callable[[], str]) -> None:
        told = 0
        while True:
            if reason := give_up():
                raise ReconError(f"the scan was given up {reason}")
            with self.changed:
                place = self.line.index(ticket) + 1
                if place == 1 and self.running < self.slots:
                    self.line.remove(ticket)
                    self.running += 1
                    return
                if place == told:
                    self.changed.wait(LOOK_S)
            if place != told:
                tell(place)
                told = place
