"""A scan's visit to the server: the place it takes, its outcome, and its raw data."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from .failure import log_failure
from .health import Counts
from .keep import FailedScans, Recording


class Stage(Enum):
    """How far a scan has come; it never goes back."""

    EXPECTED = auto()  # perhaps for ever: a peer may only ask
    OPEN = auto()  # takes a place
    ANSWERED = auto()  # its place is free; whether its images arrive is not known yet
    DONE = auto()
    FAILED = auto()


class Visit:
    """The scan of one connection, if it brings one; it is counted once, by what ends it first.

    Args:
        counts: the server's.
        keep: where the raw data are kept if it fails, if anywhere.
    """

    def __init__(self, counts: Counts, keep: FailedScans | None):
        self.counts, self.keep, self.stage = counts, keep, Stage.EXPECTED
        self.recording: Recording | None = None

    def begin(self, header_xml: bytes) -> Callable[[object], None] | None:
        """Take a place; returns what is to be called with every item received, None if no raw data are kept."""
        self.counts.add(open=1)
        self.stage = Stage.OPEN
        if self.keep is None:
            return None
        self.recording = self.keep.record(header_xml)
        return self.recording.add

    def leave(self) -> None:
        """Give the place back, while its images are still on their way."""
        if self.stage is Stage.OPEN:
            self.stage = Stage.ANSWERED
            self.counts.add(open=-1)

    def end(self, well: bool) -> None:
        """Give the place back, count the outcome, and drop the raw data if all went `well`."""
        self.leave()
        if self.stage is not Stage.ANSWERED:
            return
        self.stage = Stage.DONE if well else Stage.FAILED
        self.counts.add(**{"done" if well else "failed": 1})
        if well:  # now, as the server may be killed while the peer takes its time to close
            self._settle(Recording.drop)

    def close(self) -> None:
        """The connection is over: keep the raw data of a scan that did not end well."""
        self.end(well=False)
        self._settle(Recording.keep)

    def _settle(self, how: Callable[[Recording], object]) -> None:
        recording, self.recording = self.recording, None
        try:
            if recording is not None:
                how(recording)
        except Exception as error:  # the boundary: the scan is over
            log_failure("trouble with the raw data of the scan", error)
