"""Train a slice prior on volumes.

    slicediff train VOLUMES... --out prior.safetensors
    torchrun --nproc-per-node 4 -m gadgets.cli train VOLUMES... --out prior.safetensors

The network learns to remove Gaussian noise of any level from slices of any orientation and voxel size.
All randomness follows from (seed, step) and the state is saved every minute, so a killed run continues
where it left off, and several processes train as one would. The learning rate is constant, then falls
linearly to 1 % over the last fifth, so that `--steps` may be changed when a run is resumed; the volumes
and the options that decide what is learned may not.
"""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .batches import Batches
from .curve import Curve
from .prior import (
    TRAINED_MM,
    Prior,
    find_weights,
    half_is_faster,
    load_prior,
    move_weights,
    read_card,
    replaced,
    save_prior,
)
from .rehearsal import Lesson, Rehearsal, lesson_loss
from .team import Team
from .train_options import TrainOptions
from .validation import Validation
from .volumes import SlicePool, Volume

# options that may differ when a run is resumed
MAY_CHANGE = {"steps", "save_every_s", "validate_every", "device", "start_share", "workers", "scan_workers"}


def train(
    volumes: Sequence[Volume],
    out: Path,
    options: TrainOptions,
    log: Callable[[str], None] = print,
    validation: Sequence[Volume] = (),
    show: Callable[[int, Tensor], None] = lambda step, images: None,
) -> Prior:
    """Train, or resume training, and write weights and card to `out`; returns the averaged prior.

    What is written is the running average of the weights, mixed with the weights that training started from, if any
    (start_share). The .checkpoint and the .csv, the curve of losses and validations, are written beside `out`.

    Args:
        validation: held-out volumes to measure on.
        show: called at every validation with noisy, denoised and clean slices [3 slices h w].

    Raises:
        ValueError: if `out` does not end in .safetensors, there are no volumes, the batch cannot be split evenly among
            the processes, the checkpoint belongs to another run, or a loss is not finite.
    """
    check_out(out)
    shapes_recur = not options.own_states  # with lessons, slice sizes differ from scan to scan
    with Team.join(options.device) as team, fastest_convolutions(shapes_recur), ExitStack() as threads:
        return _train(team, threads, volumes, out, options, log, validation, show)


def check_out(out: Path) -> None:
    """Raise ValueError if the folder of `out` is missing or its suffix is not .safetensors.

    With another suffix it would share checkpoint and curve with the file that has this one.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"weights are written to a file that ends in .safetensors, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: there is no folder {out.parent}")


class Run:
    """The networks of a training run and the files written from them; continues from its checkpoint.

    `average` holds the running mean of the weights of `prior`, `origin` the weights that it started from.

    Raises:
        ValueError: if the checkpoint belongs to another run.
    """

    def __init__(self, volumes: Sequence[Volume], out: Path, options: TrainOptions, device: torch.device):
        self.volumes, self.out, self.options = volumes, out, options
        self.prior = first_prior(options, device)
        self.average, self.origin = (copy.deepcopy(self.prior).requires_grad_(False) for _ in range(2))
        self.optimiser = torch.optim.AdamW(
            self.prior.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.checkpoint, self.made_of = out.with_suffix(".checkpoint"), made_of(volumes, options)
        self.start, self.means = _resume(self.checkpoint, self.made_of, self.prior, self.average, self.optimiser)

    def outcome(self) -> Prior:
        """The averaged prior, mixed with the weights it started from if `start_from` is set."""
        return mixture(self.average, self.origin, self.options.start_share if self.options.start_from else 0.0)

    def improve(self, loss: Tensor, step: int) -> None:
        """One optimiser step on `loss` and an update of the weights' running mean, whose window is short at first."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.learning_rate * schedule(step, self.options.steps)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.prior.parameters(), 1.0)
        self.optimiser.step()
        move_weights(self.average, self.prior, 1 - min(self.options.ema_decay, (1 + step) / (10 + step)))

    def save(self, steps: int, means: dict[str, float]) -> None:
        """Write checkpoint, weights and card after `steps` steps."""
        state = {
            "step": steps,
            "made_of": self.made_of,
            "prior": self.prior.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "means": dict(means),
        }
        with replaced(self.checkpoint) as new:
            torch.save(state, new)
        self.write(steps)

    def write(self, steps: int) -> None:
        """Write only weights and card."""
        save_prior(self.outcome(), self.out, model_card(self.volumes, self.options, steps))


def _train(team: Team, threads: ExitStack, volumes, out: Path, options: TrainOptions, log, validation, show) -> Prior:
    if options.batch % team.size:
        raise ValueError(f"a batch of {options.batch} cannot be shared by {team.size} processes; choose a multiple")
    threads.enter_context(one_cpu_each(team.device))
    torch.manual_seed(options.seed)
    run = Run(volumes, out, options, team.device)
    varied = dict(vary_sharpness=options.vary_sharpness, vary_contrast=options.vary_contrast, phantoms=options.phantoms)
    pool = SlicePool(volumes, options.voxel_mm, options.crop, seed=options.seed, **varied)
    batches = Batches(pool, options.batch, options.sigma_range, options.seed)
    held_out = Validation(validation, options.seed) if validation and team.leads else None
    shared, curve = team.wrap(run.prior), Curve(out.with_suffix(".csv") if team.leads else None, run.start, run.means)
    workers = default_workers(team) if options.workers is None else options.workers
    lessons = rehearse(pool, run.prior, run.start, options, team) if options.own_states else None
    steps = range(run.start, options.steps)
    # reading losses back at every step would stall a GPU
    settled_every = Rehearsal.config.sweeps if team.device.type == "cuda" else 1
    began = saved = time.monotonic()
    for step, batch in zip(steps, threads.enter_context(batches.ahead(steps, workers, team.device)), strict=True):
        shares = (team.share(t) for t in (batch.clean, batch.sigma, run.prior.unit_noise(batch.noise)))
        loss = denoising_loss(shared, *shares, run.prior.sigma_data)
        # every process works through the same scans
        lesson = lesson_loss(shared, next(lessons)).mean() if lessons else torch.zeros((), device=team.device)
        total = loss.mean() + options.own_states * lesson
        run.improve(total, step)
        learned = lesson.detach() if lessons else None
        curve.add(step, team.gather(total.detach()[None]), team.gather(loss.detach()), learned, batch)
        done, last = step + 1, step + 1 == options.steps
        settled = done % settled_every == 0 or last
        if settled:
            curve.settle()
        if not team.leads:
            continue
        if held_out and (done % options.validate_every == 0 or last):
            curve.write(done, _validate(held_out, run.outcome(), done, log, show))
        if done % 100 == 0 or last:
            left = (time.monotonic() - began) / (done - run.start) * (options.steps - done)
            log(f"step {done}/{options.steps}  {curve.report()}  {left / 60:.0f} min left")
            curve.write(done)
        between_scans = not lessons or done % Rehearsal.config.sweeps == 0
        if (time.monotonic() - saved > options.save_every_s and between_scans and settled) or last:
            run.save(done, curve.values)
            saved = time.monotonic()
    if run.start >= options.steps and team.leads:  # already complete: written again, perhaps with another start_share
        log(
            f"nothing is left to train: {run.checkpoint} has {run.start} of {options.steps} steps; "
            f"{out} is written again"
        )
        run.write(run.start)
    return run.outcome()


def _validate(
    held_out: Validation, prior: Prior, step: int, log: Callable[[str], None], show: Callable[[int, Tensor], None]
) -> dict[str, float]:
    """Measure on the held-out volumes, log the result and show images."""
    measured = held_out.measure(prior)
    log(f"step {step}  held out: " + ", ".join(f"{name} {value:.2f} dB" for name, value in measured.items()))
    show(step, held_out.images(prior))
    return measured


def rehearse(pool: SlicePool, prior: Prior, start: int, options: TrainOptions, team: Team) -> Iterator[Lesson]:
    """Lessons from the solver's own states, each with about as many pixels as a batch.

    A resumed run continues with the first scan not yet begun.
    """
    workers = default_workers(team, 10) if options.scan_workers is None else options.scan_workers
    rehearsal = Rehearsal(copy.copy(pool), options.batch * options.crop**2, options.crop, options.seed)
    return rehearsal.lessons(prior, -(-start // Rehearsal.config.sweeps), team.device, workers)


def mixture(average: Prior, origin: Prior, share: float) -> Prior:
    """(1 - share) * average + share * origin, weight by weight."""
    mixed = copy.deepcopy(average)
    move_weights(mixed, origin, share)
    return mixed


def first_prior(options: TrainOptions, device: torch.device | str = "cpu") -> Prior:
    """The network a new run begins with, untrained or from `start_from`, on its device and in the requested precision.

    Raises:
        PriorError: if those weights cannot be loaded.
        ValueError: if their architecture differs, or the options ask a prior in function space for something it cannot
            learn.
    """
    prior = Prior(options.architecture) if options.start_from is None else load_prior(options.start_from, half=False)
    if prior.architecture != options.architecture:
        raise ValueError(
            f"{options.start_from} is of architecture {prior.architecture!r}, "
            f"asked for {options.architecture!r}; name one of them"
        )
    # Interpolated volumes, which vary_sharpness makes, have other voxels.
    if prior.in_function_space and (options.voxel_mm != TRAINED_MM or options.own_states or options.vary_sharpness):
        raise ValueError(
            f"a prior in function space learns smooth noise on voxels of {TRAINED_MM[0]:g} mm; "
            f"give voxel_mm: {list(TRAINED_MM)}, own_states: 0 and vary_sharpness: false"
        )
    prior.in_bf16 = half_is_faster(device) if options.precision == "auto" else options.precision == "bf16"
    return prior.train().requires_grad_(True).to(device, memory_format=torch.channels_last)


def default_workers(team: Team, most: int = 4) -> int:
    """0 on CPUs, which the network keeps busy; beside a GPU up to `most`, fewer if there are few CPUs per process."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cpus // team.size - 1)) if team.device.type == "cuda" else 0


@contextmanager
def fastest_convolutions(shapes_recur: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms once per shape, if shapes recur.

    Its choice, and so the rounding, may differ between runs.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, shapes_recur
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def one_cpu_each(device: torch.device) -> Iterator[None]:
    """With a GPU, keep each worker thread from starting one more thread per CPU."""
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def denoising_loss(
    prior: Callable[[Tensor, Tensor], Tensor], clean: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float
) -> Tensor:
    """Weighted squared error of each slice [slices]; weight as in arXiv 2206.00364, table 1."""
    noisy = (clean + sigma[:, None, None, None] * noise).contiguous(memory_format=torch.channels_last)
    error = (prior(noisy, sigma) - clean).square().mean(dim=(1, 2, 3))
    return error * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: short warm-up, constant, linear decay over the last fifth."""
    return min(1.0, (step + 1) / min(200, 1 + steps // 10), max(0.01, (steps - step) / (0.2 * steps)))


def model_card(volumes: Sequence[Volume], options: TrainOptions, steps: int) -> dict:
    """What a user should know about these weights; save_prior adds hash and size."""
    training = options.model_dump(exclude={"device", "workers", "scan_workers"})
    training |= {"steps_done": steps, "volumes": sorted(v.name for v in volumes)}
    if options.start_from:
        training["start_from"] = Path(options.start_from).name
        training["earlier"] = read_card(find_weights(options.start_from))["training"]
    return {
        "training": training,
        "orientations": "axial, coronal, sagittal",
        "intensity_scale": "sum|v|^3/sum|v|^2 at 8 mm is 1",
    }


def made_of(volumes: Sequence[Volume], options: TrainOptions) -> dict:
    """What must stay the same from a run's first step to its last; its card names it."""
    out = {"volumes": sorted(v.name for v in volumes), **options.model_dump(mode="json", exclude=MAY_CHANGE)}
    if options.start_from:  # identified by content: the file may have been moved or replaced
        weights = find_weights(options.start_from)
        out["start_from"] = f"{weights.name} (sha256 {read_card(weights)['sha256'][:12]})"
    return out


def _differences(was: dict, now: dict) -> str:
    """The differences in words, empty if there are none; options that only one of the two has are ignored."""
    before, after = (Counter(run.get("volumes", now["volumes"])) for run in (was, now))
    changes = (("volumes left out", before - after), ("volumes added", after - before))
    out = [f"{what}: {_few(list(names.elements()))}" for what, names in changes if names]
    for name, new in now.items():
        if name != "volumes" and was.get(name, new) != new:
            out.append(f"{name} was {was[name]}, is {new}")
    return "; ".join(out)


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _resume(checkpoint: Path, origins: dict, prior: Prior, average: Prior, optimiser) -> tuple[int, dict[str, float]]:
    """Step to continue from, and running means; ValueError if the checkpoint was not made of `origins`."""
    if not checkpoint.is_file():
        return 0, {}
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    different = _differences(state.get("made_of", {}), origins)  # older checkpoints have neither this nor the means
    if different:
        raise ValueError(f"{checkpoint} is of another run ({different}): take another --out, or remove {checkpoint}")
    prior.load_state_dict(state["prior"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"], state.get("means", {})
