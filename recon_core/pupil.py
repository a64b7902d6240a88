"""A copy of the prior that learns from a scan's own lines, and how its progress is scored.

Zero-shot self-supervision (Yaman et al., arXiv 2102.07737): some of the measured lines are left out, the rest are
reconstructed, and at every sweep the copy learns to predict the left-out lines from the input that the sweep gives
it (sweep by sweep as in rehearsal.py, never backpropagating through the solver). Each line is weighted by the number of
unmeasured lines around it that it represents (Millard and Chiew, arXiv 2205.10278), because the centre is densely
sampled and most of what must be predicted lies elsewhere. Rounds alternate between the scan's own mesh and a finer
one (mesh.py). Held-out lines, which are never learned from, decide whether the copy improved, and on which mesh.
"""

from __future__ import annotations

import copy
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from .cg_sense import cg_sense
from .fft import centre_block, centre_crop_or_pad, kspace_crop
from .measurement import Measurement
from .mesh import on_finer_mesh
from .pose import Pose
from .prior import move_weights
from .sense import Sense
from .slices import MIN_SIDE, Denoiser, apply_prior, object_box
from .variational import VariationalConfig, reconstruct_variational

RATE = 1e-4  # Adam's learning rate
DECAY = 0.98  # per step, of the moving average of the weights
HELD_OUT = 0.1  # share of the lines outside the calibration square that is never learned from
LEFT_OUT = 0.2  # share of the others that a round leaves out and learns to predict
FINER = 1.5  # times as many voxels along the phase-encoding axes
NEIGHBOURS = 8.0  # lines; standard deviation of the window over which the measured share is computed
LEAST_LINES, LEAST_SAMPLES = 5, 1000  # held out, needed to tell better from worse
HOPELESS = 10.0  # residual energy over that of the left-out lines at which learning has diverged; a zero image leaves 1
PIXELS = 1 << 16  # per sweep of a round: a few seconds on two CPU cores


class Pupil:
    """A copy of the prior, or of what another volume of the scan has made of it, that learns from a volume.

    `best` and `on_best_meshes` do best on its held-out lines, and start as the prior and the scan on its own mesh.
    Learning begins with the prior that another volume has `taught`, if there is one. `spent` counts slice evaluations.
    """

    def __init__(
        self,
        measurement: Measurement,
        prior: nn.Module,
        start: Tensor,
        config: VariationalConfig,
        seed: int,
        taught: nn.Module | None = None,
    ):
        self.measurement, self.prior, self.start, self.config = measurement, prior, start, config
        self.best = prior
        self.on_best_meshes: tuple[Measurement, ...] = (measurement,)
        self.score: float | None = None
        self.random = torch.Generator().manual_seed(seed)
        self.network = copy.deepcopy(prior if taught is None else taught).float().requires_grad_(True)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        taken = measurement.operator.sampled
        self.held_out = self._some(taken, HELD_OUT)
        self.training = taken & ~self.held_out
        self.importance = importance(taken, measurement.acs)
        self.rounds = self.spent = 0

    @cached_property
    def optimiser(self) -> torch.optim.Adam:
        """Created on first use: the first one in a process takes torch seconds, and the first image should not wait."""
        return torch.optim.Adam(self.network.parameters(), lr=RATE, betas=(0.9, 0.99))

    @cached_property
    def on_meshes(self) -> tuple[Measurement, Measurement]:
        """The scan on its own mesh and on a finer one."""
        return self.measurement, on_finer_mesh(self.measurement, FINER, self.start)

    @property
    def learned(self) -> nn.Module | None:
        """The best prior so far, None if that is the one it was given."""
        return None if self.best is self.prior else self.best

    @property
    def can_be_judged(self) -> bool:
        """Whether enough lines are held out to tell better from worse."""
        lines = int(self.held_out.sum())
        coils, _, _, x = self.measurement.lines.shape
        return lines >= LEAST_LINES and lines * coils * x >= LEAST_SAMPLES

    @property
    def can_learn(self) -> bool:
        """Whether the prior's output depends on weights: not if it has none, or evaluates a frozen network."""
        with torch.enable_grad():
            return self.network(torch.zeros(1, 2, MIN_SIDE, MIN_SIDE, device=self.start.device), 0.1).requires_grad

    def learn(self) -> None:
        """One reconstruction without some of the lines, on the mesh whose turn it is; each sweep is a learning step."""
        measurement = self.on_meshes[self.rounds % len(self.on_meshes)]
        there = self._window()
        left_out = self._some(self.training, LEFT_OUT)
        part = measurement.part(_on_matrix_of(measurement, self.training & ~left_out), there)
        target = measurement.part(_on_matrix_of(measurement, left_out), there)
        weights = _on_matrix_of(measurement, self.importance)
        start = cg_sense(part)
        scale = part.in_tissue_units(start).scale
        box = object_box(part.operator.support)
        seed = int(torch.randint(1 << 31, (), generator=self.random))
        denoised: list[Tensor] = []
        denoise = partial(_keeping_graph, denoised)
        for state in reconstruct_variational(part, self.network, start, self.config, seed, denoise):
            whole = torch.zeros_like(state.volume)
            with torch.enable_grad():
                whole[box] = denoised.pop()  # _keeping_graph put it there in this sweep
                loss = unexplained(target.operator, whole * scale, target.lines, weights)
            if not bool(loss < HOPELESS):
                self._forget()
                break
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            move_weights(self.average, self.network, 1 - DECAY)
        self.spent += 2 * state.network_evaluations
        self.rounds += 1

    def _forget(self) -> None:
        """Restart from the best weights so far: nothing can be learned once learning has diverged."""
        for network in (self.network, self.average):
            network.load_state_dict(self.best.state_dict())
        self.optimiser.state.clear()

    def keep_if_better(self) -> None:
        """Keep what was learned if it predicts the held-out lines better than the best so far.

        It may do so on one mesh or as the mean of both.
        """
        for prior in (self.best, self.average) if self.score is None else (self.average,):
            for on_meshes, score in self._scored(prior):
                if self.score is None or score < self.score:
                    self.score, self.on_best_meshes = score, on_meshes
                    self.best = copy.deepcopy(prior) if prior is self.average else prior

    def _scored(self, prior: nn.Module) -> list[tuple[tuple[Measurement, ...], float]]:
        """Choices of meshes, each with the share of the held-out lines that it leaves unexplained.

        What should explain them is the mean of `prior`'s images on these meshes, made from the other lines.
        """
        there = self._window(middle=True)
        target = self.measurement.part(self.held_out, there)
        volumes = []
        for measurement in self.on_meshes:
            part = measurement.part(_on_matrix_of(measurement, self.training), there)
            for state in reconstruct_variational(part, prior, cg_sense(part), self.config):
                pass
            volumes.append(kspace_crop(state.volume, target.operator.shape))
            self.spent += state.network_evaluations
        score = lambda volume: float(unexplained(target.operator, volume, target.lines, self.importance))
        single = [((measurement,), score(volume)) for measurement, volume in zip(self.on_meshes, volumes)]
        return [*single, (self.on_meshes, score(sum(volumes) / len(volumes)))]

    def _some(self, lines: Tensor, share: float) -> Tensor:
        """A random `share` of `lines` [z y], none from the calibration square."""
        chosen = lines.cpu() & (torch.rand(lines.shape, generator=self.random) < share)
        return (chosen & ~centre_block(lines.shape, self.measurement.acs)).to(lines.device)

    def _window(self, middle: bool = False) -> slice:
        """Readout positions to use as a scan of their own: all, or as many as a round can afford.

        They are drawn where there is signal, or lie in the `middle`.
        """
        z, y, x = self.measurement.operator.shape
        least = 1 if min(z, y) >= MIN_SIDE else 2 * MIN_SIDE
        width = min(x, max(least, PIXELS // (z * y)))
        if width == x or middle:
            return slice(x // 2 - width // 2, x // 2 - width // 2 + width)
        signal = self.measurement.adjoint.abs().square().sum(dim=(0, 1)).cpu().unfold(0, width, 1).sum(1)
        first = int(torch.multinomial(signal, 1, generator=self.random))
        return slice(first, first + width)


def _keeping_graph(
    kept: list[Tensor], volume: Tensor, prior: Denoiser, sigma: float, axis: int, chosen: Tensor, pose: Pose
) -> int:
    """Like denoise_in_pose, in one batch; appends the denoised volume to `kept`, differentiable in the weights."""
    with torch.enable_grad():
        planes = volume.movedim(axis, 0)
        denoised = apply_prior(planes[chosen], pose.seen_by(prior), sigma)
        denoised = planes.index_copy(0, chosen, denoised).movedim(0, axis)
    volume.copy_(denoised.detach())
    kept.append(denoised)
    return len(chosen)


def importance(taken: Tensor, acs: tuple[int, int]) -> Tensor:
    """Number of unmeasured lines that each line of `taken` [z y] represents, [z y].

    It is (1 - p) / p, with p the share measured around the line. The calibration square, of size `acs` (z, y), does not
    count towards that share.
    """
    counted = (~centre_block(taken.shape, acs)).float()
    apart = (torch.arange(n) - torch.arange(n)[:, None] for n in taken.shape)
    near_z, near_y = (torch.exp(-(lines / NEIGHBOURS).square() / 2) for lines in apart)
    share = (near_z @ (taken.cpu() * counted) @ near_y) / (near_z @ counted @ near_y).clamp_min(1e-6)
    # an isolated line should not count for hundreds, nor one among measured lines for nothing
    share = share.clamp(0.02, 0.98)
    return (taken.cpu() * (1 - share) / share).to(taken.device)


def unexplained(operator: Sense, volume: Tensor, lines: Tensor, weights: Tensor) -> Tensor:
    """||A x - y||^2 / ||y||^2 for `volume` x [z y x] and `lines` y [coils z y x], differentiable in x.

    Both norms are weighted by `weights` [z y].
    """
    energy = lambda what: (what.abs().square() * weights[..., None].to(what.device)).sum()
    return energy(operator.forward(volume) - lines) / energy(lines)


def _on_matrix_of(measurement: Measurement, lines: Tensor) -> Tensor:
    """Values per line [z y], cropped or padded to the matrix of `measurement`."""
    return centre_crop_or_pad(lines, measurement.operator.shape[:2])
