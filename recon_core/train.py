"""Train a slice prior on magnitude volumes: one file, from top to bottom.

    slicediff train VOLUMES... --out prior.safetensors

The network learns to remove Gaussian noise of every level from slices of every orientation and voxel
size. All randomness follows from (seed, step) and the state is written every minute, so a killed run
continues where it was. The learning rate is constant and falls linearly to zero over the last fifth,
so that `--steps` may be changed when a run is resumed.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .prior import Prior, find_weights, load_prior, read_card, save_prior
from .volumes import SlicePool

SIGMA_BINS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0)


@dataclass(frozen=True)
class TrainOptions:
    """What a training run depends on; sigma in units of tissue brightness, voxel sizes in mm."""

    architecture: str = "small"
    steps: int = 12000
    batch: int = 16
    crop: int = 64
    learning_rate: float = 8e-4
    ema_decay: float = 0.999
    voxel_mm: tuple[float, float] = (0.5, 4.0)
    sigma_range: tuple[float, float] = (0.008, 2.0)
    seed: int = 0
    save_every_s: float = 60.0
    start_from: str | None = None


def train(volumes: list[Path], out: Path, options: TrainOptions, log=print) -> Prior:
    """Train, or go on training, and write weights and card to `out`; returns the averaged prior.

    Raises:
        ValueError: if there are no volumes, or a loss is not finite.
    """
    torch.manual_seed(options.seed)
    prior = first_prior(options).to(memory_format=torch.channels_last)
    average = copy.deepcopy(prior).requires_grad_(False)
    optimiser = torch.optim.AdamW(prior.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = out.with_suffix(".checkpoint")
    start = _resume(checkpoint, prior, average, optimiser)
    pool = SlicePool(volumes, options.voxel_mm, options.crop, seed=options.seed)
    curve, began, saved = LossCurve(), time.monotonic(), time.monotonic()
    for step in range(start, options.steps):
        clean = pool.batch(step, options.batch)
        sigma, noise = draw_noise(clean, step, options)
        loss = denoising_loss(prior, clean, sigma, noise)
        if not bool(torch.isfinite(loss).all()):
            raise ValueError(f"the loss became {loss.mean().item()} at step {step}; lower the learning rate")
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options.steps)
        optimiser.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimiser.step()
        _update_average(average, prior, min(options.ema_decay, (1 + step) / (10 + step)))
        curve.add(sigma, loss.detach())
        if (step + 1) % 100 == 0:
            left = (time.monotonic() - began) / (step + 1 - start) * (options.steps - step - 1)
            log(f"step {step + 1}/{options.steps}  {curve.report()}  {left / 60:.0f} min left")
        if time.monotonic() - saved > options.save_every_s or step + 1 == options.steps:
            _save(checkpoint, step + 1, prior, average, optimiser)
            save_prior(average, out, model_card(volumes, options, step + 1))
            saved = time.monotonic()
    return average


def first_prior(options: TrainOptions) -> Prior:
    """The network a new run begins with: untrained, or the weights it is told to start from.

    Raises:
        PriorError: if those weights cannot be loaded.
        ValueError: if they are of another architecture.
    """
    if options.start_from is None:
        return Prior(options.architecture)
    prior = load_prior(options.start_from)
    if prior.architecture != options.architecture:
        raise ValueError(f"{options.start_from} is of architecture {prior.architecture!r}, asked for {options.architecture!r}; name one of them")
    return prior.train().requires_grad_(True)


def draw_noise(clean: Tensor, step: int, options: TrainOptions) -> tuple[Tensor, Tensor]:
    """Noise level [slices] (log-normal, truncated) and unit noise like `clean` for this step."""
    rng = np.random.default_rng([options.seed, 3, step])
    low, high = options.sigma_range
    sigma = np.exp(rng.normal(math.log(0.1), 1.2, clean.shape[0])).clip(low, high)
    noise = rng.standard_normal(clean.shape, dtype=np.float32)
    return torch.from_numpy(sigma).float(), torch.from_numpy(noise)


def denoising_loss(prior: Prior, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Per-slice weighted squared error [slices]; weight as in arXiv 2206.00364, table 1."""
    noisy = (clean + sigma[:, None, None, None] * noise).contiguous(memory_format=torch.channels_last)
    error = (prior(noisy, sigma) - clean).square().mean(dim=(1, 2, 3))
    return error * (sigma**2 + prior.sigma_data**2) / (sigma * prior.sigma_data) ** 2


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: short warm-up, constant, linear decay over the last fifth."""
    return min(1.0, (step + 1) / min(200, 1 + steps // 10), max(0.01, (steps - step) / (0.2 * steps)))


def model_card(volumes: list[Path], options: TrainOptions, steps: int) -> dict:
    """What a user should know of these weights; completed with hash and size by save_prior."""
    training = {**asdict(options), "steps_done": steps, "volumes": sorted(Path(v).name for v in volumes)}
    if options.start_from:
        training["start_from"] = Path(options.start_from).name
        training["earlier"] = read_card(find_weights(options.start_from))["training"]
    return {
        "training": training,
        "orientations": "axial, coronal, sagittal",
        "intensity_scale": "sum|v|^3/sum|v|^2 at 8 mm is 1",
    }


class LossCurve:
    """Running mean of the loss per noise-level bin."""

    def __init__(self):
        self.mean = [math.nan] * (len(SIGMA_BINS) - 1)

    def add(self, sigma: Tensor, loss: Tensor) -> None:
        for i, (low, high) in enumerate(zip(SIGMA_BINS, SIGMA_BINS[1:])):
            inside = loss[(sigma >= low) & (sigma < high)]
            if inside.numel():
                value = float(inside.mean())
                self.mean[i] = value if math.isnan(self.mean[i]) else 0.99 * self.mean[i] + 0.01 * value

    def report(self) -> str:
        return "loss " + " ".join(f"<{high:g}: {m:.4f}" for high, m in zip(SIGMA_BINS[1:], self.mean))


def _update_average(average: Prior, prior: Prior, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(prior.parameters()), 1 - decay)


def _save(checkpoint: Path, step: int, prior: Prior, average: Prior, optimiser) -> None:
    partial = checkpoint.with_suffix(".partial")
    state = {"step": step, "prior": prior.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state, partial)
    os.replace(partial, checkpoint)


def _resume(checkpoint: Path, prior: Prior, average: Prior, optimiser) -> int:
    if not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    prior.load_state_dict(state["prior"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]
