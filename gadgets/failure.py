"""Failures as sentences for the peer, the log and the image comment."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator

from recon_core.ahead import LEFT_BEHIND
from recon_core.device_failure import GpuHangs, lost_the_gpu, ran_out_of_memory

log = logging.getLogger("slicediff")
LONGEST = 1000  # characters in a sentence
INTERNAL = "internal error, "
FREEING_S = 60.0  # it takes milliseconds, and what else runs there may have to end before
MOST_NAMES = 3  # of volumes listed in a sentence
Failures = dict[str, list[str]]  # reason: names of the volumes
gpu_lost = threading.Event()  # for this process: any GPU call would fail or hang until the process is restarted


class ScanError(ValueError):
    """A scan that cannot be reconstructed; the message is one sentence for the user."""


class ReconError(ValueError):
    """Some volumes of a scan, or the images requested of them, could not be made; the message is for the user."""


class OneLine(logging.Formatter):
    """Formats each message as one line: what a peer or a file holds can imitate no other line, nor steer a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message without a traceback."""
        return one_line(super().formatMessage(record))

    def formatException(self, exc_info) -> str:
        """The traceback, with its line ends."""
        return "".join(c for c in super().formatException(exc_info) if c.isprintable() or c == "\n")


class Unfinished(ReconError):
    """The solver was stopped before it had an image."""


def sentence(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = one_line(str(error))
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    if ran_out_of_memory(error):
        return f"out of memory: {text or type(error).__name__}"
    expected = type(error).__module__.startswith(("gadgets", "recon_core")) or type(error) is ValueError
    return text if expected and text else f"{INTERNAL}{type(error).__name__}: {text or 'no message'}"


def one_line(text: str) -> str:
    """The text in one line, without control characters: a peer's could change what a console or a log shows."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def of_lines(count: int, text: str, kind: str = "") -> str:
    """`text` with {lines}, {were} and {have} filled in for `count` lines of a `kind`.

    These are "1 line", "was", "has", or "3 calibration lines", "were", "have".
    """
    return _of("lines", count, text, f"{kind}line")


def of_images(count: int, text: str) -> str:
    """The same for {images}."""
    return _of("images", count, text, "image")


def _of(name: str, count: int, text: str, one: str) -> str:
    counted = f"{count} {one}" + "s" * (count != 1)
    were, have = ("was", "has") if count == 1 else ("were", "have")
    return text.format(**{name: counted}, were=were, have=have)


def log_failure(what: str, error: BaseException, level: int = logging.ERROR) -> None:
    """Log a failure, with the traceback only if it is an internal error; a lost GPU is remembered in `gpu_lost`."""
    if lost_the_gpu(error):
        gpu_lost.set()
    text = sentence(error)
    log.log(level, "%s: %s", what, text, exc_info=error if text.startswith(INTERNAL) else None)


def free_gpu_memory() -> None:
    """Release what a failed attempt left cached, so that the next one finds the device as it was.

    A GPU that has not done so within FREEING_S counts as lost.
    """
    import torch  # not above: a failure to import it must be told, too

    def free() -> None:
        with contextlib.suppress(RuntimeError):  # a lost GPU has nothing to give back
            torch.cuda.empty_cache()

    gc.collect()
    if torch.cuda.is_available() and not gpu_lost.is_set():
        thread = threading.Thread(target=free, daemon=True)
        thread.start()
        thread.join(FREEING_S)
        if thread.is_alive():
            thread.name = LEFT_BEHIND
            log_failure("freeing memory", GpuHangs(f"the GPU did not free its memory within {FREEING_S:g} s"))


@contextlib.contextmanager
def noted(failures: Failures, volume: str) -> Iterator[None]:
    """Note an exception and its volume in `failures`, so that it does not affect the scan's other volumes."""
    try:
        yield
    except Exception as error:  # the boundary of one volume; reported once the others are sent
        log_failure(f"{volume} failed", error)
        failures.setdefault(sentence(error), []).append(volume)
        if ran_out_of_memory(error):
            free_gpu_memory()


def raise_if_any(failures: Failures, volumes: int) -> None:
    """Raise one ReconError for all noted failures; it names the volumes unless the scan had only one."""
    if failures:
        told = (f"{_some(names)}: {text}" if volumes > 1 else text for text, names in failures.items())
        raise ReconError("; ".join(told))


def _some(names: list[str]) -> str:
    """The first few names, and the number of the others."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + f" and {more} more" * (more > 0)
