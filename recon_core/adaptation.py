"""The prior learns from the scan at hand, where slices of one orientation alone are of use and it has most to learn.

Zero-shot self-supervision (Yaman et al., arXiv 2102.07737): a part of the measured lines is left out, the rest is
reconstructed, and at every sweep a copy of the prior learns to predict the lines left out from what the sweep hands
to it (sweep by sweep as in rehearsal.py, never through the solver). Other lines, which it never learns from, judge
whether it became better; if it did not, the image stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cg_sense import cg_sense
from .device_failure import ran_out_of_memory
from .measurement import Measurement
from .prior import move_weights
from .sense import Sense
from .slices import MIN_SIDE, Denoiser, apply_prior, object_box, usable_axes
from .state import State
from .variational import VariationalConfig, reconstruct_variational

RATE = 1e-4  # of Adam
DECAY = 0.98  # of the mean of the weights over the steps
LEFT_OUT = 0.2  # of the lines outside the calibration square, to learn from
JUDGING = 0.1  # of them, never learned from
LEAST_LINES, LEAST_SAMPLES = 5, 1000  # that judge
EVERY = 4  # rounds from one judgement to the next
PASSES = 4  # with what was learned: its answers hang more on slices' poses than those of the prior, the mean of several less
HOPELESS = 10.0  # times the energy of the lines left out; an empty image leaves once
PIXELS = 1 << 16  # of a round's sweep: a few seconds of two CPU cores


def reconstruct_adapted(measurement: Measurement, prior: Denoiser, start: Tensor, config: VariationalConfig = VariationalConfig(), seed: int = 0) -> Iterator[State]:
    """The states of reconstruct_variational; then, of single planes and thin slabs that keep their lines, `config.adapt` rounds of learning and PASSES more.

    The volume stays that of the first pass until the others have ended, whose mean it is then. `prior` is not changed.

    Args:
        measurement: with `lines` if there is something to gain.
        prior: learns if it is a network.
        start: volume [z y x], the CG-SENSE image.
        seed: of the slices, poses and lines.
    """
    to_be_gained = measurement.lines is not None and len(usable_axes(measurement.operator.shape)) == 1
    pupil = Pupil(measurement, prior, config, seed) if config.adapt and isinstance(prior, nn.Module) and to_be_gained else None
    rounds = config.adapt if pupil and pupil.can_be_judged else 0
    sweeps = (1 + PASSES) * config.sweeps + rounds if rounds else config.sweeps
    for state in reconstruct_variational(measurement, prior, start, config, seed):
        state = replace(state, sweeps=sweeps)
        yield state
    for done in range(1, rounds + 1):
        try:
            pupil.learn()
            if done % EVERY == 0 or done == rounds:
                pupil.judge()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            yield replace(state, sweep=sweeps)  # what there is needs no learning
            return
        state = replace(state, sweep=state.sweep + 1, network_evaluations=state.network_evaluations + pupil.evaluations())
        yield state
    mean = torch.zeros_like(start)
    for again in range(1, PASSES + 1) if rounds else ():
        spent = state.network_evaluations
        for fresh in reconstruct_variational(measurement, pupil.best, start, config, seed + again):
            mean += fresh.volume / PASSES if fresh.sweep == config.sweeps else 0
            volume = mean if state.sweep + 1 == sweeps else state.volume
            state = State(state.sweep + 1, sweeps, fresh.sigma, volume, spent + fresh.network_evaluations)
            yield state


class Pupil:
    """A copy of the prior that learns from a scan; `best` is what the judging lines prefer, the prior itself at first."""

    def __init__(self, measurement: Measurement, prior: nn.Module, config: VariationalConfig, seed: int):
        self.measurement, self.config, self.best = measurement, config, prior
        self.random = torch.Generator().manual_seed(seed)
        self.network = copy.deepcopy(prior).float().requires_grad_(True)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=RATE, betas=(0.9, 0.99))
        taken = torch.fft.fftshift(measurement.operator.weights > 0)
        self.judging = self._some(taken, JUDGING)
        self.others = taken & ~self.judging
        self.spent, self.score = 0, None

    @property
    def can_be_judged(self) -> bool:
        """Whether enough was measured to tell better from worse."""
        lines, (coils, _, _, x) = int(self.judging.sum()), self.measurement.lines.shape
        return lines >= LEAST_LINES and lines * coils * x >= LEAST_SAMPLES

    def evaluations(self) -> int:
        """Of slices by the network since this was asked last."""
        spent, self.spent = self.spent, 0
        return spent

    def learn(self) -> None:
        """One reconstruction without some of the lines, and a step of learning at each of its sweeps."""
        there = self._window()
        left_out = self._some(self.others, LEFT_OUT)
        part, answer = self.measurement.part(self.others & ~left_out, there), self.measurement.part(left_out, there)
        start, told = cg_sense(part), []
        scale, box = part.in_tissue_units(start)[0], object_box(part.operator.maps)
        seed = int(torch.randint(1 << 31, (), generator=self.random))
        for state in reconstruct_variational(part, self.network, start, self.config, seed, watch=lambda *what: told.append(what)):
            volume, sigma, axis, pose = told.pop()
            with torch.enable_grad():
                whole = torch.zeros_like(volume)
                whole[box] = apply_prior(volume[box].movedim(axis, 0), pose.seen_by(self.network), sigma).movedim(0, axis)
                loss = unexplained(answer.operator, whole * scale, answer.lines)
            if not bool(loss < HOPELESS):
                self._forget()
                break
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            move_weights(self.average, self.network, 1 - DECAY)
        self.spent += 2 * state.network_evaluations

    def _forget(self) -> None:
        """Start again from the best so far; where the steps led to, nothing can be learned."""
        for network in (self.network, self.average):
            network.load_state_dict(self.best.state_dict())
        self.optimiser.state.clear()

    def judge(self) -> None:
        """Keep what has been learned if it predicts the judging lines better than the best so far."""
        if self.score is None:
            self.score = self._judged(self.best)
        score = self._judged(self.average)
        if score < self.score:
            self.score, self.best = score, copy.deepcopy(self.average)

    def _judged(self, prior: nn.Module) -> float:
        there = self._window(middle=True)
        part, answer = self.measurement.part(self.others, there), self.measurement.part(self.judging, there)
        for state in reconstruct_variational(part, prior, cg_sense(part), self.config):
            pass
        self.spent += state.network_evaluations
        return float(unexplained(answer.operator, state.volume, answer.lines))

    def _some(self, lines: Tensor, share: float) -> Tensor:
        """A random share of `lines` [z y], none of the calibration square."""
        chosen = lines.cpu() & (torch.rand(lines.shape, generator=self.random) < share)
        z, y = (slice(n // 2 - size // 2, n // 2 - size // 2 + size) for n, size in zip(lines.shape, self.measurement.acs))
        chosen[z, y] = False
        return chosen.to(lines.device)

    def _window(self, middle: bool = False) -> slice:
        """Readout positions to work on, a scan of their own: all, or as many as a round can bear, drawn where there is signal."""
        z, y, x = self.measurement.operator.shape
        least = 1 if min(z, y) >= MIN_SIDE else 2 * MIN_SIDE
        width = min(x, max(least, PIXELS // (z * y)))
        if width == x or middle:
            return slice(x // 2 - width // 2, x // 2 - width // 2 + width)
        signal = self.measurement.adjoint.abs().square().sum(dim=(0, 1)).cpu().unfold(0, width, 1).sum(1)
        first = int(torch.multinomial(signal, 1, generator=self.random))
        return slice(first, first + width)


def unexplained(operator: Sense, volume: Tensor, lines: Tensor) -> Tensor:
    """||A x - y||^2 / ||y||^2 for `volume` x [z y x] and `lines` y [coils z y x]; may be differentiated by x."""
    return (operator.forward(volume) - lines).abs().square().sum() / lines.abs().square().sum()
