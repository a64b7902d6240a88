"""Adapts the prior to the scan at hand where slices of only one orientation are usable: there it has most to learn.

First comes the image of the unadapted prior; then a copy of the prior learns in rounds from the scan's own lines
(pupil.py); the result is the mean of several images made with that copy, or with the unadapted prior if the held-out
lines show no gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .cg_sense import cg_sense
from .device_failure import lost_the_gpu
from .fft import kspace_crop
from .measurement import Measurement
from .pupil import Pupil
from .slices import Denoiser, usable_axes
from .state import State
from .trust import Trust, judge
from .variational import VariationalConfig, reconstruct_variational

EVERY = 4  # rounds between looks at the held-out lines
LATER = 0.2  # share of the rounds that remains for a volume which begins with a prior that another one has taught
# Reconstructions after learning, alternating between the best meshes. The image is their mean, because the adapted
# prior depends more on the slices' pose.
PASSES = 4


@dataclass(frozen=True)
class AdaptedConfig(VariationalConfig):
    """Settings of the solver and of learning from the scan itself."""

    adapt: int = 20  # rounds of learning
    learned: nn.Module | None = None  # prior that another volume of the scan has taught: learning begins with it


def reconstruct_adapted(
    measurement: Measurement,
    prior: Denoiser,
    start: Tensor,
    config: AdaptedConfig = AdaptedConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield the states of reconstruct_variational, then those of learning.

    Learning is for single planes and thin slabs that keep their lines. It takes `config.adapt` rounds, or LATER of them
    if it begins with `config.learned`, and PASSES further reconstructions follow. The volume remains that of the first
    pass until all of these are done; then it is their mean, on the scan's own mesh. If any of this fails, or the
    mean cannot be trusted, the first pass's volume stands, with the error as its `setback`. `prior` and
    `config.learned` are not changed.

    Args:
        measurement: needs `lines` for the prior to be adapted.
        prior: adapted only if it is a network with weights to learn.
        start: volume [z y x], the CG-SENSE image.
        seed: for the random slices, poses and lines.
    """
    one_orientation = len(usable_axes(measurement.operator.shape)) == 1
    rounds, setback = 0, None
    try:
        if config.adapt and isinstance(prior, nn.Module) and measurement.lines is not None and one_orientation:
            pupil = Pupil(measurement, prior, start, config, seed, config.learned)
            if pupil.can_be_judged and pupil.can_learn:
                rounds = math.ceil(config.adapt * (1 if config.learned is None else LATER))
    except Exception as error:  # the boundary of learning: the first image is complete without it
        if lost_the_gpu(error):  # and the first image with it
            raise
        setback = error
    sweeps = (1 + PASSES) * config.sweeps + rounds if rounds else config.sweeps
    for state in reconstruct_variational(measurement, prior, start, config, seed):
        state = replace(state, sweeps=sweeps, setback=setback)
        yield state
    if not rounds:
        return
    try:
        yield from _taught(pupil, state, rounds, seed)
    except Exception as error:  # the same boundary
        if lost_the_gpu(error):
            raise
        yield replace(state, sweep=sweeps, setback=error)


def _taught(pupil: Pupil, state: State, rounds: int, seed: int) -> Iterator[State]:
    """The states that follow `state`, the last of the unadapted prior, during and after learning.

    Raises:
        ValueError: if the image at the end cannot be trusted.
    """
    spent = state.network_evaluations
    for done in range(1, rounds + 1):
        pupil.learn()
        if done % EVERY == 0 or done == rounds:
            pupil.keep_if_better()
        state = replace(state, sweep=state.sweep + 1, network_evaluations=spent + pupil.spent)
        yield state
    state = replace(state, learned=pupil.learned)
    mean = torch.zeros_like(state.volume)
    for again in range(1, PASSES + 1):
        spent = state.network_evaluations
        measurement = pupil.on_best_meshes[again % len(pupil.on_best_meshes)]
        start = cg_sense(measurement)
        for fresh in reconstruct_variational(measurement, pupil.best, start, pupil.config, seed + again):
            evaluations = spent + fresh.network_evaluations
            state = replace(state, sweep=state.sweep + 1, sigma=fresh.sigma, network_evaluations=evaluations)
            if state.sweep < state.sweeps:
                yield state
        mean += kspace_crop(fresh.volume, mean.shape) / PASSES
    trust, why = judge(pupil.measurement, pupil.start, mean)
    if trust is Trust.FAILED:
        raise ValueError(f"the image made with what was learned {why}")
    yield replace(state, volume=mean)
