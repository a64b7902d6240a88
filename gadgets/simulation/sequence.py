"""The order, flags and counters of a simulated scan's lines, as a scanner would send them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ismrmrd
import numpy as np

from recon_core.fft import centre_block

from .protocol import SimulateOptions

DWELL_US = 5.0
NOISE_SAMPLES = 256
TICKS_PER_LINE = 3  # 2.5 ms each
TICKS_PER_HEARTBEAT = 340
LINES_PER_WAVEFORM = 40


class Noise:
    """Receiver noise with unequal gains and correlated coils.

    `sigma` is the image noise of a full scan, per real or imaginary part.
    """

    def __init__(self, coils: int, sigma: float, seed: int):
        self.random = np.random.default_rng([seed, 20])
        mix = np.eye(coils) + 0.15 * self._normal((coils, coils)) / coils**0.5
        mix /= np.sqrt((np.abs(mix) ** 2).sum() / coils)
        self.mix = (sigma * mix).astype(np.complex64)

    def draw(self, samples: int) -> np.ndarray:
        """Noise [coils samples], complex64."""
        return self.mix @ self._normal((len(self.mix), samples)).astype(np.complex64)

    def _normal(self, shape: tuple[int, int]) -> np.ndarray:
        return self.random.standard_normal(shape) + 1j * self.random.standard_normal(shape)


@dataclass
class Sequence:
    """Plays a scan.

    Args:
        kspace: contrast -> [coils z y samples], without noise.
        mask: [z y] phase encodes to acquire.
        dropped: number of lines missing at the beginning of E1, E2.
        geometry: position and directions of every line.
    """

    kspace: Callable[[int], np.ndarray]
    mask: np.ndarray
    dropped: list[int]
    noise: Noise
    options: SimulateOptions
    geometry: dict
    count: int = field(default=0, init=False)

    def items(self) -> Iterator[ismrmrd.Acquisition | ismrmrd.Waveform]:
        """All lines and waveforms, in the order in which a scanner would send them."""
        yield from self._noise_lines()
        if self.options.apart:
            yield from self._calibration_lines()
        for repetition in range(self.options.repetitions):
            lines = self._imaging_lines(repetition)
            before, last = None, self.options.repetitions - 1
            for line in lines:
                if before is None:
                    line.setFlag(ismrmrd.ACQ_FIRST_IN_REPETITION)
                else:
                    yield from self._with_company(before)
                before = line
            before.setFlag(ismrmrd.ACQ_LAST_IN_REPETITION)
            if repetition == last:
                before.setFlag(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
            yield from self._with_company(before)

    def _noise_lines(self) -> Iterator[ismrmrd.Acquisition]:
        for _ in range(self.options.noise_lines):
            self.count += 1
            noise = self.noise.draw(NOISE_SAMPLES)
            line = ismrmrd.Acquisition.from_array(noise, sample_time_us=DWELL_US, scan_counter=self.count)
            line.setFlag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
            yield line

    def _calibration_lines(self) -> Iterator[ismrmrd.Acquisition]:
        """The calibration square, before the scan.

        An external one has half the resolution along the readout and is brighter.
        """
        external, kspace = self.options.calibration == "external", self.kspace(0)
        places = np.argwhere(self._square(whole=external))
        low = places[0] if external else self.dropped[::-1]
        for z, y in places:
            samples = kspace[:, z, y]
            if external:
                quarter = samples.shape[1] // 2 - samples.shape[1] // 2 // 2
                samples = 1.5 * samples[:, quarter : quarter + samples.shape[1] // 2]
            line = self._line(samples, samples.shape[1] // 2)
            line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2 = int(y - low[1]), int(z - low[0])
            line.encoding_space_ref = int(external)
            line.setFlag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
            yield line

    def _imaging_lines(self, repetition: int) -> Iterator[ismrmrd.Acquisition]:
        """All averages and contrasts of one repetition, partition by partition."""
        both = self._square() if self.options.pattern != "full" and not self.options.apart else np.zeros_like(self.mask)
        for average in range(self.options.averages):
            for contrast in range(self.options.contrasts):
                kspace = self.kspace(contrast)
                missing = round(kspace.shape[-1] * (1 - self.options.partial_echo))
                for z, y in np.argwhere(self.mask):
                    line = self._line(kspace[:, z, y, missing:], kspace.shape[-1] // 2 - missing)
                    line.idx.kspace_encode_step_1 = int(y) - self.dropped[0]
                    line.idx.kspace_encode_step_2 = int(z) - self.dropped[1]
                    line.idx.repetition, line.idx.average, line.idx.contrast = repetition, average, contrast
                    if both[z, y]:
                        line.setFlag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
                    yield line

    def _line(self, samples: np.ndarray, centre: int) -> ismrmrd.Acquisition:
        self.count += 1
        line = ismrmrd.Acquisition.from_array(samples + self.noise.draw(samples.shape[1]), sample_time_us=DWELL_US)
        line.scan_counter, line.center_sample = self.count, centre
        line.acquisition_time_stamp = TICKS_PER_LINE * self.count
        line.physiology_time_stamp = (line.acquisition_time_stamp % TICKS_PER_HEARTBEAT, 0, 0)
        for name, value in self.geometry.items():
            setattr(line, name, tuple(float(v) for v in value))
        return line

    def _with_company(self, line: ismrmrd.Acquisition) -> Iterator[ismrmrd.Acquisition | ismrmrd.Waveform]:
        """A line, after what else is measured at its time: a navigator with the same counters, a waveform."""
        every = self.options.navigators
        if every and line.scan_counter % every == 0:
            noise = 100 * self.noise.draw(line.number_of_samples)
            navigator = ismrmrd.Acquisition.from_array(noise, sample_time_us=DWELL_US, idx=line.idx)
            navigator.scan_counter, navigator.acquisition_time_stamp = line.scan_counter, line.acquisition_time_stamp
            navigator.setFlag(ismrmrd.ACQ_IS_NAVIGATION_DATA)
            yield navigator
        if self.options.waveforms and line.scan_counter % LINES_PER_WAVEFORM == 0:
            pulse = (2048 + 1000 * np.sin(2 * np.pi * np.arange(100) / TICKS_PER_HEARTBEAT)).astype(np.uint32)
            samples, time_stamp = np.stack([pulse, pulse // 2]), line.acquisition_time_stamp
            yield ismrmrd.Waveform.from_array(samples, time_stamp=time_stamp, sample_time_us=2500.0, waveform_id=0)
        yield line

    def _square(self, whole: bool = False) -> np.ndarray:
        """Mask [z y] of the calibration square, without what partial Fourier omits unless `whole`."""
        out = centre_block(self.mask.shape, [self.options.acs] * 2).numpy()
        if not whole:
            out[: self.dropped[1]] = out[:, : self.dropped[0]] = False
        return out
