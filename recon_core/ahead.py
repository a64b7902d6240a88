"""An iterator run in its own thread, some items ahead of its consumer."""

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
    """Number of threads of this process that could not be ended: hung solvers."""
    return sum(thread.name == LEFT_BEHIND for thread in threading.enumerate())


def end_if_left_behind(code: int) -> None:
    """Exit at once with this code if threads were left behind.

    They could crash the interpreter as it shuts down, or keep it from exiting.
    """
    if left_behind():
        end_at_once(code)


def end_at_once(code: int) -> None:
    """Exit with this code, whatever other threads are doing."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # closed (None), or nobody reads
            stream.flush()
    os._exit(code)


class Crew:
    """Threads that are reused, to keep what libraries cache per thread: in torch, a cuDNN plan per slice shape."""

    def __init__(self):
        self.lock, self.idle = threading.Lock(), []

    def begin(self, work: Callable[[], None], name: str) -> Task:
        """Run `work` under this name in an idle thread, or a new one if none is idle."""
        with self.lock:
            hand = self.idle.pop() if self.idle else Hand(self)
            hand.name = name
        task = Task(hand, work)
        hand.tasks.put(task)
        return task


class Task:
    """A task run by a thread of a crew; like a thread, it can be waited for and left behind."""

    def __init__(self, hand: Hand, work: Callable[[], None]):
        self.hand, self.work, self.done = hand, work, threading.Event()

    def join(self, wait_s: float | None = None) -> None:
        """Wait until it is done, at most `wait_s`."""
        self.done.wait(wait_s)

    def is_alive(self) -> bool:
        """Whether it is still running."""
        return not self.done.is_set()

    @property
    def name(self) -> str:
        """Name of its thread."""
        return self.hand.name

    @name.setter
    def name(self, name: str) -> None:
        with self.hand.crew.lock:
            if self.is_alive():
                self.hand.name = name


class Hand(threading.Thread):
    """A thread of a crew; if it was left behind, it ends after its current task."""

    def __init__(self, crew: Crew):
        super().__init__(daemon=True)
        self.crew, self.tasks = crew, queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        """Run tasks one after another."""
        while self.name != LEFT_BEHIND:
            task = self.tasks.get()
            task.work()
            task.work = None  # frees what it holds before anyone is told that it is done
            with self.crew.lock:
                task.done.set()
                if self.name != LEFT_BEHIND:
                    self.crew.idle.append(self)
            del task


class Ahead(Iterator):
    """Iterates `source` in the background; an exception it raises is raised in place of its next item.

    This lets a scan be read on while its last volume waits for the device, a hung solver be left behind, and
    training batches be made while the network computes. After `close` nothing more is delivered, and a consumer
    still waiting for an item gets the end; a source that must be read to its end (a peer that is still sending)
    is exhausted and its items dropped, any other stops at its next item.

    Args:
        source: iterated in the other thread only.
        room: how many items may be waiting before the source has to wait.
        to_the_end: whether the source is read to its end after `close`.
        crew: whose thread to use; without one, a new thread.
    """

    def __init__(self, source: Iterable, room: int = 1, to_the_end: bool = False, crew: Crew | None = None):
        self.items: queue.Queue = queue.Queue(room)
        self.closed, self.to_the_end = threading.Event(), to_the_end
        name = threading.current_thread().name  # so that the log shows whose work this is
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
        """Deliver nothing more; returns whether the thread has ended within `wait_s`."""
        self.closed.set()
        self.thread.join(wait_s)
        with contextlib.suppress(queue.Full):  # full: no consumer is waiting
            self.items.put_nowait((_END, None))
        if self.thread.is_alive():
            self.thread.name = LEFT_BEHIND  # so that it can be counted
        return not self.thread.is_alive()

    def _run(self, source: Iterable) -> None:
        try:
            for item in source:
                delivered = self._put(item, None)
                item = None  # otherwise it would stay alive until the next one comes
                if not delivered and not self.to_the_end:
                    return
            self._put(_END, None)
        except BaseException as error:  # to be raised in the consumer's thread
            self._put(None, error)

    def _put(self, item: Any, error: BaseException | None) -> bool:
        while not self.closed.is_set():
            try:
                self.items.put((item, error), timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False
