"""An iterator run in a thread of its own, some items ahead of whoever takes them."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

POLL_S = 0.1
LEFT_BEHIND = "left behind"
_END = object()


def left_behind() -> int:
    """How many threads of this process could not be ended: solvers that hang."""
    return sum(thread.name == LEFT_BEHIND for thread in threading.enumerate())


def end_if_left_behind(code: int) -> None:
    """End the process at once with this exit code if threads were left behind: they would crash it while the interpreter ends, or keep it."""
    if left_behind():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


class Crew:
    """Threads that are kept for the next task, and with them what libraries hold for each thread: torch a cuDNN plan for every shape of slices."""

    def __init__(self):
        self.lock, self.idle = threading.Lock(), []

    def begin(self, work: Callable[[], None], name: str) -> Task:
        """Have a thread that is idle, or a new one, do `work` under this name."""
        with self.lock:
            hand = self.idle.pop() if self.idle else Hand(self)
            hand.name = name
        task = Task(hand, work)
        hand.tasks.put(task)
        return task


class Task:
    """Something that a thread of a crew does; it can be waited for, and left behind, like a thread."""

    def __init__(self, hand: Hand, work: Callable[[], None]):
        self.hand, self.work, self.done = hand, work, threading.Event()

    def join(self, wait_s: float | None = None) -> None:
        """Wait until it is done, at most so long."""
        self.done.wait(wait_s)

    def is_alive(self) -> bool:
        """Whether it is not done yet."""
        return not self.done.is_set()

    @property
    def name(self) -> str:
        """Of its thread."""
        return self.hand.name

    @name.setter
    def name(self, name: str) -> None:
        with self.hand.crew.lock:
            if self.is_alive():
                self.hand.name = name


class Hand(threading.Thread):
    """A thread of a crew; it ends after a task with which it was left behind."""

    def __init__(self, crew: Crew):
        super().__init__(daemon=True)
        self.crew, self.tasks = crew, queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        """One task after the other."""
        while self.name != LEFT_BEHIND:
            task = self.tasks.get()
            task.work()
            task.work = None  # and what it holds, before anybody hears that it is done
            with self.crew.lock:
                task.done.set()
                if self.name != LEFT_BEHIND:
                    self.crew.idle.append(self)
            del task


class Ahead(Iterator):
    """Iterates `source` in the background; what it raises comes out in the place of its next item.

    So a scan is read on while its last volume waits for the device, and a solver that hangs can be left
    behind; so training batches are made while the network computes. After `close` nothing is delivered any
    more, and who still waits for an item finds the end; an iterator that must be read to its end (a peer that
    still sends) is run on and its items are dropped, any other stops at its next item.

    Args:
        source: iterated in the other thread only.
        room: this many items may wait to be taken before the source is made to wait.
        to_the_end: whether the source is run on after `close`.
        crew: whose threads do it; without, a new thread.
    """

    def __init__(self, source: Iterable, room: int = 1, to_the_end: bool = False, crew: Crew | None = None):
        self.items: queue.Queue = queue.Queue(room)
        self.closed, self.to_the_end = threading.Event(), to_the_end
        name = threading.current_thread().name  # the log tells whose work it does
        if crew:
            self.thread = crew.begin(partial(self._run, source), name)
            return
        self.thread = threading.Thread(target=self._run, args=(source,), name=name, daemon=True)
        self.thread.start()

    def take(self, wait_s: float | None = None) -> Any:
        """The next item; TimeoutError if it takes longer than `wait_s`, StopIteration at the end."""
        try:
            item, error = self.items.get(timeout=wait_s)
        except queue.Empty:
            raise TimeoutError(f"nothing came for {wait_s:g} s") from None
        if error is not None:
            self.closed.set()
            raise error
        if item is _END:
            self.closed.set()
            raise StopIteration
        return item

    def __next__(self) -> Any:
        if self.closed.is_set():
            raise StopIteration
        return self.take()

    def close(self, wait_s: float | None = None) -> bool:
        """Take nothing more; whether the thread has ended after at most `wait_s`."""
        self.closed.set()
        self.thread.join(wait_s)
        with contextlib.suppress(queue.Full):  # full: nobody waits
            self.items.put_nowait((_END, None))
        if self.thread.is_alive():
            self.thread.name = LEFT_BEHIND  # so that it can be counted
        return not self.thread.is_alive()

    def _run(self, source: Iterable) -> None:
        try:
            for item in source:
                delivered, item = self._put(item, None), None  # or it would live until the next one comes
                if not delivered and not self.to_the_end:
                    return
            self._put(_END, None)
        except BaseException as error:  # it belongs to the thread that takes
            self._put(None, error)

    def _put(self, item: Any, error: BaseException | None) -> bool:
        while not self.closed.is_set():
            try:
                self.items.put((item, error), timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False
