"""The curve of a training run: its losses and validation results."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from .batches import Batch

SIGMA_BINS = (0.008, 0.03, 0.1, 0.3, 1.0, 2.0)
VOXEL_BINS_MM = (0.5, 1.0, 1.5, 2.5, 4.0)
COLUMNS = ("step", "name", "value")


class Curve:
    """Running mean of the loss per noise level and per voxel size, written to a CSV file that a resumed run continues.

    Args:
        path: of the .csv; None to write no file.
        start: step the run begins with; 0 starts a new file.
        means: running means at that step; the file's last row may be many steps older.
    """

    def __init__(self, path: Path | None, start: int, means: dict[str, float] | None = None):
        self.path, self.values, self.pending = path, dict(means or {}), []
        if path is None:
            return
        text = path.read_text() if start and path.is_file() else ""
        # Older files have no header, a kill may have cut the last row.
        rows = [row for row in csv.reader(text.splitlines()) if len(row) == len(COLUMNS) and row[0].isdecimal()]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(row for row in rows if int(row[0]) <= start)])

    def add(self, step: int, totals: Tensor, loss: Tensor, lesson: Tensor | None, batch: Batch) -> None:
        """Queue the results of a step for `settle`.

        These are the totals of all processes, the losses [slices] of a batch, and that of the lesson.
        """
        self.pending.append((step, totals, loss, lesson, batch.sigma, batch.voxel_mm))

    def settle(self) -> None:
        """Update the means with what was added.

        Raises:
            ValueError: if a total was not finite; nothing of the run may be saved after that.
        """
        for step, totals, loss, lesson, sigma, voxel_mm in self.pending:
            if not bool(torch.isfinite(totals).all()):
                raise ValueError(f"the loss became {totals.mean().item()} at step {step}; lower the learning rate")
            loss = loss.cpu()
            for name, value, bins in (("sigma", sigma, SIGMA_BINS), ("mm", voxel_mm, VOXEL_BINS_MM)):
                for low, high in zip(bins, bins[1:]):
                    inside = loss[(value >= low) & (value < high * 1.0001)]
                    if inside.numel():
                        self._mean(f"{name}<{high:g}", float(inside.mean()))
            if lesson is not None:  # share of the error in the solver's own states that the prior does not remove
                self._mean("own states", float(lesson))
        self.pending.clear()

    def _mean(self, key: str, new: float) -> None:
        self.values[key] = 0.99 * self.values.get(key, new) + 0.01 * new

    def report(self) -> str:
        """The losses in one line."""
        return "loss " + " ".join(f"{key} {value:.4f}" for key, value in sorted(self.values.items()))

    def write(self, step: int, values: dict[str, float] | None = None) -> None:
        """Append one row per value (a validation's; by default the running means) to the file."""
        values = self.values if values is None else values
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows((step, key, f"{value:.5f}") for key, value in sorted(values.items()))
