"""The options of a training run; apart from train.py, so that the command line can list them without loading torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TrainOptions(BaseModel):
    """What a training run depends on; `workers` affects only its speed.

    The descriptions are what `slicediff train --help` shows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["small", "base", "operator"] = Field(
        "small", description="small (for CPUs too), base, or operator (in function space, trained on voxels of 2 mm)"
    )
    steps: int = Field(12000, ge=1, description="number of steps; may be changed when a run is resumed")
    batch: int = Field(16, ge=1, description="slices per step, over all processes")
    crop: int = Field(64, ge=8, description="side of the square training crops, in pixels")
    learning_rate: float = Field(
        None, gt=0, description="learning rate of AdamW; by default 8e-4, with start_from 2e-4"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay per step of the running mean of the weights")
    voxel_mm: tuple[float, float] = Field(
        (0.5, 4.0), description="finest and coarsest voxel size; the same twice for a single size"
    )
    vary_sharpness: bool = Field(
        True, description="taper or interpolate some volumes, as protocols do; turn it off to compare voxel sizes"
    )
    sigma_range: tuple[float, float] = Field(
        (0.008, 2.0), description="lowest and highest noise level, relative to tissue brightness"
    )
    vary_contrast: bool = Field(
        True, description="redraw the intensity curve of most volumes, so that the prior meets other contrasts"
    )
    phantoms: float = Field(0.1, ge=0, le=1, description="fraction of random phantoms among the volumes")
    seed: int = Field(0, ge=0, description="random seed")
    save_every_s: float = Field(
        60.0, ge=0, description="seconds between checkpoints: as much work is lost if the run is killed"
    )
    validate_every: int = Field(1000, ge=1, description="steps between validations")
    own_states: float = Field(
        0.0, ge=0, description="weight of lessons from the solver's own states, relative to denoising; 0 for none"
    )
    start_from: str | None = Field(
        None, description="name or path of weights to start from, for example to add a site's own volumes"
    )
    start_share: float = Field(
        0.5, ge=0, le=1, description="share of the starting weights in those that are written (arXiv 2109.01903)"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the network: auto (bf16 where the device supports it), fp32 or bf16"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto (a GPU per process if there is one), cpu or cuda"
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="threads that prepare batches ahead, without changing them; "
        "by default up to 4 beside a GPU, none on a CPU",
    )
    scan_workers: int | None = Field(
        None,
        ge=0,
        description="processes that simulate scans for own_states ahead; "
        "by default up to 10 beside a GPU, none on a CPU",
    )

    @model_validator(mode="before")
    @classmethod
    def _gentler_on_trained_weights(cls, given: dict) -> dict:
        return {"learning_rate": 2e-4 if given.get("start_from") else 8e-4, **given}

    @field_validator("voxel_mm", "sigma_range")
    @classmethod
    def _from_low_to_high(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ends[0] <= ends[1] < math.inf:
            raise ValueError("expected two numbers above 0, the lower one first")
        return ends
