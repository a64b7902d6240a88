"""Adapts the prior to the scan at hand where slices of only one orientation are usable: there it has most to learn.

First comes the image of the unadapted prior; then a copy of the prior learns in rounds from the scan's own lines
(pupil.py); the result is the mean of several images made with that copy, or with the unadapted prior if the held-out
lines show no gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

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

EVERY = 4  # rounds between judgements
LATER = 0.2  # share of the rounds that a volume takes which begins with what another one of its scan has taught
# Reconstructions after adaptation, alternating between grids:
# the adapted prior depends more on the slices' pose, their mean less.
PASSES = 4


def reconstruct_adapted(
    measurement: Measurement,
    prior: Denoiser,
    start: Tensor,
    config: VariationalConfig = VariationalConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield the states of reconstruct_variational, then those of learning.

    Learning is for single planes and thin slabs that keep their lines. It takes `config.adapt` rounds, or LATER of them
    if it begins with `config.learned`, and PASSES further reconstructions follow. The volume remains that of the first
    pass until all of these are done; then it is their mean, on the scan's own voxel grid. If any of this fails, or the
    mean cannot be trusted, the first pass's volume stands, with the error as its `setback`. `prior` and
    `config.learned` are not changed.

    Args:
        measurement: needs `lines` for the prior to be adapted.
        prior: adapted only if it is a network with weights to learn.
        start: volume [z y x], the CG-SENSE image.
        seed: for the random slices, poses and lines.
    """
    to_be_gained = measurement.lines is not None and len(usable_axes(measurement.operator.shape)) == 1
    rounds, setback = 0, None
    try:
        if config.adapt and isinstance(prior, nn.Module) and to_be_gained:
            pupil = Pupil(measurement, prior, start, config, seed)
            if pupil.can_be_judged and pupil.can_learn:
                rounds = math.ceil(config.adapt * (1 if config.learned is None else LATER))
    except Exception as error:  # the boundary of learning: the first image is complete without it
        setback = _survived(error)
    sweeps = (1 + PASSES) * config.sweeps + rounds if rounds else config.sweeps
    for state in reconstruct_variational(measurement, prior, start, config, seed):
        state = replace(state, sweeps=sweeps, setback=setback)
        yield state
    if not rounds:
        return
    try:
        yield from _taught(pupil, state, rounds, seed)
    except Exception as error:  # the same boundary
        yield replace(state, sweep=sweeps, setback=_survived(error))


def _survived(error: Exception) -> Exception:
    """The error, unless the first image is lost with it: then it is raised."""
    if lost_the_gpu(error):
        raise error
    return error


def _taught(pupil: Pupil, state: State, rounds: int, seed: int) -> Iterator[State]:
    """The states that follow `state`, the last of the unadapted prior, during and after learning.

    Raises:
        ValueError: if the image at the end cannot be trusted.
    """
    for done in range(1, rounds + 1):
        pupil.learn()
        if done % EVERY == 0 or done == rounds:
            pupil.judge()
        evaluations = state.network_evaluations + pupil.evaluations()
        state = replace(state, sweep=state.sweep + 1, network_evaluations=evaluations)
        yield state
    mean, state = torch.zeros_like(state.volume), replace(state, learned=pupil.learned)
    for again in range(1, PASSES + 1):
        spent, mesh = state.network_evaluations, pupil.best_meshes[again % len(pupil.best_meshes)]
        for fresh in reconstruct_variational(mesh, pupil.best, cg_sense(mesh), pupil.config, seed + again):
            evaluations = spent + fresh.network_evaluations
            state = replace(state, sweep=state.sweep + 1, sigma=fresh.sigma, network_evaluations=evaluations)
            if state.sweep < state.sweeps:
                yield state
        mean += kspace_crop(fresh.volume, mean.shape) / PASSES
    trust, why = judge(pupil.measurement, pupil.start, mean)
    if trust is Trust.FAILED:
        raise ValueError(f"the image made with what was learned {why}")
    yield replace(state, volume=mean)
