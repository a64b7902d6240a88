"""When a repetition is over, so that its volumes can be handed out while the scan goes on."""

from __future__ import annotations

from collections.abc import Mapping

from .flags import FIRST_BIT, LAST_BIT, VolumeKey
from .volume import OpenVolume

# A repetition whose last line was not flagged is over after so many lines, as multiples of its own size:
IN_A_ROW = 0.5  # of the latest repetition in a row: always needed, and enough if it is complete by the header
SINCE = 4  # since its own last one, if it may or may not be complete
SINCE_LACKING = 8  # since its own last one, if it lacks averages, or its last-line flag although its first was flagged
SETTLED = 128  # lines; a smaller repetition counts as one of this size
STRAYS = 8  # lines of earlier repetitions; more mean that repetitions are interleaved, and only the flag ends them


class Repetitions:
    """Tells when a repetition is over: its last line was flagged, or enough lines of later repetitions have come.

    For interleaved repetitions only the flag counts; until an earlier one resumes, a segment looks like a whole
    repetition.

    Args:
        averages: number of averages that the header announces.
    """

    def __init__(self, averages: int):
        self.averages = averages
        self.flags: dict[int, int] = {}  # for each repetition: those of all its lines combined
        self.ended: set[int] = set()  # repetitions whose last line was flagged, with no new volume since
        self.lines = 0  # imaging lines
        self.lines_until: dict[int, int] = {}  # for each repetition: `lines` when its last line so far came
        self.latest = -1
        self.streak = 0  # lines of the latest repetition in a row, without the first
        self.back = 0  # lines of a repetition that came after a later one had begun

    def flagged(self, repetition: int, flags: int) -> None:
        """Note the flags of a line, which need not hold image data."""
        self.flags[repetition] = self.flags.get(repetition, 0) | flags
        if flags & LAST_BIT:
            self.ended.add(repetition)

    def count(self, repetition: int) -> None:
        """Count an imaging line."""
        self.lines += 1
        self.lines_until[repetition] = self.lines
        self.streak = self.streak + 1 if repetition == self.latest else 0
        self.back += repetition < self.latest
        self.latest = max(self.latest, repetition)

    def resume(self, repetition: int) -> None:
        """Go on with a repetition of which a new volume begins, even if its last line was flagged.

        As the inner loop of another counter, it recurs for each value of that counter.
        """
        self.ended.discard(repetition)

    def first_open(self, volumes: Mapping[VolumeKey, OpenVolume], before: int) -> int:
        """The first repetition below `before` that has volumes and is not over; `before` if there is none."""
        earlier = sorted({key.repetition for key in volumes if key.repetition < before})
        return next((number for number in earlier if not self._is_over(number, volumes)), before)

    def _is_over(self, repetition: int, volumes: Mapping[VolumeKey, OpenVolume]) -> bool:
        if repetition in self.ended:
            return True
        if self.back > STRAYS:
            return False
        its = [volume for key, volume in volumes.items() if key.repetition == repetition]
        size = max(SETTLED, sum(volume.grid.lines for volume in its))
        if self.streak <= IN_A_ROW * size:
            return False
        if all(volume.lacks_nothing(self.averages) for volume in its):
            return True
        lacking = self.flags[repetition] & FIRST_BIT or any(volume.averages < self.averages for volume in its)
        return self.lines - self.lines_until[repetition] > (SINCE_LACKING if lacking else SINCE) * size
