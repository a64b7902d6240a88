"""Pictures: three orientations the right way up, methods side by side."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MIN_PIXELS = 8  # of the shorter side of a plane worth showing
Panel = tuple[np.ndarray, float, str, float]  # plane, aspect of its pixels, colours, brightest value


def anatomical(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Volume [z y x] with an RAS affine, reoriented to axes [right anterior superior], and its voxel_mm."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.ascontiguousarray(volume.T, np.float32), affine))
    return np.asarray(image.dataobj), np.array(image.header.get_zooms()[:3])


def planes(volume: np.ndarray, voxel_mm: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Axial, coronal and sagittal plane of a RAS volume, each with its pixel aspect; superior and anterior up.

    Planes across a thin slab are omitted, but never the largest plane.
    """
    i, j, k = (n // 2 for n in volume.shape)
    dx, dy, dz = voxel_mm
    three = [(volume[:, :, k].T, dy / dx), (volume[:, j].T, dz / dx), (volume[i].T, dz / dy)]
    return [p for p in three if min(p[0].shape) >= MIN_PIXELS] or [max(three, key=lambda p: p[0].size)]


def draw_orthogonal(volume: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """One volume [z y x] in three orientations, as PNG."""
    turned, mm = anatomical(volume, affine)
    panels = [[(p, a, "gray", _top(turned))] for p, a in planes(turned, mm)]
    _draw(panels, [""] * len(panels), path)


def draw_comparison(
    volumes: dict[str, np.ndarray],
    affine: np.ndarray,
    path: str | Path,
    captions: dict[str, str],
    reference: str,
    errors: int = 1,
) -> None:
    """Volumes [z y x] side by side in three orientations with captions, as PNG.

    With their errors against `reference` in the first `errors` of these orientations.
    """
    panels = comparison_panels(list(volumes.values()), affine, volumes[reference], errors)
    rows = sum(colours == "magma" for *_, colours, _ in panels[0])
    note = f"last {'row' if rows == 1 else f'{rows} rows'}: absolute error, brightened 5 times"
    _draw(panels, [f"{name}\n{captions.get(name, '')}".strip() for name in volumes], path, note)


def draw_denoising(images: np.ndarray, title: str, path: str | Path) -> None:
    """Slices [noisy|denoised|clean slices h w] as rows and columns, as PNG."""
    rows, columns = images.shape[:2]
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows + 0.4), facecolor="black")
    FigureCanvasAgg(figure)
    for axis, image in zip(figure.subplots(rows, columns, squeeze=False).flat, images.reshape(-1, *images.shape[2:])):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1.8)
        axis.axis("off")
    figure.suptitle(f"{title}: noisy, denoised, clean", color="white", fontsize=10)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.35 / figure.get_figheight(), 0.02, 0.02)
    figure.savefig(path, dpi=100, facecolor="black")


def comparison_panels(
    volumes: list[np.ndarray], affine: np.ndarray, reference: np.ndarray, errors: int
) -> list[list[Panel]]:
    """A column per volume [z y x]: its planes, and below them the absolute error against `reference`.

    The errors shown are those of the first `errors` planes, brightened 5 times.
    """
    turned = [anatomical(v, affine) for v in volumes]
    truth, top = anatomical(reference, affine)[0], _top(turned[-1][0])
    shown = [[(p, a, "gray", top) for p, a in planes(v, mm)] for v, mm in turned]
    wrong = [[(p, a, "magma", top / 5) for p, a in planes(np.abs(v - truth), mm)[:errors]] for v, mm in turned]
    return [column + below for column, below in zip(shown, wrong)]


def _top(volume: np.ndarray) -> float:
    return float(np.percentile(volume, 99.8)) or 1.0


def _draw(panels: list[list[Panel]], titles: list[str], path: str | Path, note: str = "") -> None:
    """Columns of panels under their titles."""
    rows = len(panels[0])
    heights = [p.shape[0] * a / p.shape[1] for p, a, *_ in panels[0]]
    figure = Figure(figsize=(3 * len(panels), 3 * sum(heights) + 0.6), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for column, (title, panel) in enumerate(zip(titles, panels)):
        axes[0, column].set_title(title, color="white", fontsize=11)
        for row, (plane, aspect, colours, vmax) in enumerate(panel):
            axes[row, column].imshow(
                plane, cmap=colours, vmin=0, vmax=vmax, origin="lower", aspect=aspect, interpolation="nearest"
            )
            axes[row, column].axis("off")
    figure.text(0.005, 0.005, note, color="white", fontsize=8)
    figure.subplots_adjust(0.01, 0.03, 0.99, 1 - 0.55 / figure.get_figheight(), 0.02, 0.02)
    figure.savefig(path, dpi=100, facecolor="black")
