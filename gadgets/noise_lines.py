"""The noise lines of a scan: which of them serve a volume, and at what scale."""

from __future__ import annotations

import math

import ismrmrd
import numpy as np
import torch

from .readout import Readout
from .volume import OpenVolume

DISAGREE = 1.2  # times as loud: noise lines of other receiver settings
MAX_SAMPLES = 1 << 24  # more do not improve the covariance


class NoiseLines:
    """Keeps noise lines [coils samples] as they come, and gives each volume its noise.

    Args:
        header: the scan's ISMRMRD header, for the receiver's noise bandwidth.
    """

    def __init__(self, header: ismrmrd.xsd.ismrmrdHeader):
        self.lines: list[np.ndarray] = []
        self.samples = 0
        self.dwell_us = 0.0  # of the first noise line
        self.power = 0.0  # of the noise in the first volume, relative to the noise lines
        self.before_first: int | None = None  # number of noise lines before the first volume
        self.bandwidth_ratio = _bandwidth_ratio(header)

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: ismrmrd.Acquisition, readout: Readout) -> None:
        """Keep a noise line, scaled to the dwell time of the first one that states it.

        Noise power is proportional to 1/dwell.
        """
        if self.samples >= MAX_SAMPLES:
            return
        self.samples += max(1, line.data.size)
        dwell_us = _dwell_us(line) or self.dwell_us  # not stated: that of the first
        self.dwell_us = self.dwell_us or dwell_us
        scale = (dwell_us / self.dwell_us) ** 0.5 if dwell_us else 1.0
        there, _, _ = readout.echo(line)
        self.lines.append(np.array(line.data[:, there]) if scale == 1.0 else line.data[:, there] * np.float32(scale))

    def begin(self, volume: OpenVolume) -> None:
        """Remember which noise lines came before `volume`."""
        volume.noise_came = len(self.lines)
        self.before_first = volume.noise_came if self.before_first is None else self.before_first

    def of(self, volume: OpenVolume) -> tuple[torch.Tensor | None, float, list[str]]:
        """Noise [coils samples], the `gain` of `GatheredVolume`, and notes for the user.

        The noise is scaled to that of one gathered sample; it is None if unusable. Noise power per sample is
        proportional to 1/dwell; a noise scan sees only the receiver's noise bandwidth of it, whereas the middle of the
        readout sees all of it (Kellman and McVeigh, MRM 2005).
        """
        if not self.lines:
            return None, 1.0, []
        coils = len(volume.grid.kspace)
        usable, remarks = self._usable(volume, coils)
        if not usable:
            channels = self.lines[0].shape[0]
            remark = f"the noise lines have {channels} channels instead of the scan's {coils}: they were not used"
            return None, 1.0, [remark]
        if not _enough(usable, coils):
            samples = sum(n.shape[1] for n in usable)
            remark = f"the noise lines have {samples} samples for {coils} channels, too few: they were not used"
            return None, 1.0, [remark]
        dwell_us = _dwell_us(volume.head or volume.first)
        power = (self.dwell_us / dwell_us if self.dwell_us and dwell_us else 1.0) / self.bandwidth_ratio
        self.power = self.power or power
        return torch.from_numpy(np.concatenate(usable, axis=1)) * power**0.5, (power / self.power) ** 0.5, remarks

    def _usable(self, volume: OpenVolume, coils: int) -> tuple[list[np.ndarray], list[str]]:
        """The noise lines for a volume, and notes for the user.

        Those before the scan's first volume, for a brightness that stays the same. Later ones that came before this
        volume are used if they differ, as another receiver gain does to noise and image; all lines if none came in
        time.
        """
        first = self.before_first or 0
        early = [n for n in self.lines[:first] if n.shape[0] == coils]
        late = [n for n in self.lines[first : volume.noise_came] if n.shape[0] == coils]
        if not _enough(early, coils):
            return [n for n in self.lines if n.shape[0] == coils], []
        if not _enough(late, coils):
            return early, []
        before, after = _level(early), _level(late)
        louder = after / before if before > 0 else math.nan
        if not 0 < louder < math.inf or 1 / DISAGREE <= louder <= DISAGREE:
            return early, []
        remark = (
            f"the noise lines before this volume are {louder:.2g} times as loud as those before the first one: "
            "taken for another receiver gain, its brightness is relative to them"
        )
        return late, [remark]


def _bandwidth_ratio(header: ismrmrd.xsd.ismrmrdHeader) -> float:
    """Relative receiver noise bandwidth (about 0.79 on Siemens), 1 if it is not stated or makes no sense."""
    system = header.acquisitionSystemInformation
    ratio = float(getattr(system, "relativeReceiverNoiseBandwidth", None) or 1.0)
    return ratio if 0.1 < ratio <= 2 else 1.0


def _enough(lines: list[np.ndarray], coils: int) -> bool:
    """Whether noise lines [coils samples] have enough samples for the covariance of the coils."""
    return sum(n.shape[1] for n in lines) >= 4 * coils


def _level(lines: list[np.ndarray]) -> float:
    """Root mean square of lines [coils samples]."""
    return (sum(float(np.vdot(n, n).real) for n in lines) / sum(n.size for n in lines)) ** 0.5


def _dwell_us(head: ismrmrd.AcquisitionHeader | ismrmrd.Acquisition) -> float:
    """Dwell time, 0 if it is not stated or makes no sense."""
    return head.sample_time_us if 0 < head.sample_time_us < math.inf else 0.0
