"""Pictures: three orientations the right way up, methods side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MIN_PIXELS = 8  # of the shorter side of a plane worth showing


def anatomical(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Volume [z y x] with its RAS affine turned to axes [right anterior superior], and its voxel_mm."""
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.ascontiguousarray(volume.T, np.float32), affine))
    return np.asarray(image.dataobj), np.array(image.header.get_zooms()[:3])


def planes(volume: np.ndarray, voxel_mm: np.ndarray, centre: tuple[int, int, int] | None = None) -> list[tuple[np.ndarray, float]]:
    """Axial, coronal and sagittal plane of a RAS volume, each with its pixel aspect; superior and anterior up.

    Planes across a thin slab are left out, the largest plane never.
    """
    i, j, k = centre or [n // 2 for n in volume.shape]
    dx, dy, dz = voxel_mm
    three = [(volume[:, :, k].T, dy / dx), (volume[:, j].T, dz / dx), (volume[i].T, dz / dy)]
    return [p for p in three if min(p[0].shape) >= MIN_PIXELS] or [max(three, key=lambda p: p[0].size)]


def draw_orthogonal(volume: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """One volume [z y x] in three orientations, as PNG."""
    _draw([("", volume)], affine, path, None)


def draw_comparison(
    volumes: dict[str, np.ndarray], affine: np.ndarray, path: str | Path, captions: dict[str, str], reference: str, errors: int = 1
) -> None:
    """Volumes [z y x] side by side in three orientations with captions, and their errors against `reference` in `errors` of them, as PNG."""
    _draw([(f"{name}\n{captions.get(name, '')}".strip(), v) for name, v in volumes.items()], affine, path, volumes[reference], errors)


def draw_denoising(images: np.ndarray, title: str, path: str | Path) -> None:
    """Slices [noisy|denoised|clean slices h w] as rows and columns, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = images.shape[:2]
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows + 0.4), facecolor="black")
    FigureCanvasAgg(figure)
    for axis, image in zip(figure.subplots(rows, columns, squeeze=False).flat, images.reshape(-1, *images.shape[2:])):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1.8)
        axis.axis("off")
    figure.suptitle(f"{title}: noisy, denoised, clean", color="white", fontsize=10)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.35 / figure.get_figheight(), 0.02, 0.02)
    figure.savefig(path, dpi=100, facecolor="black")


def _draw(columns: list[tuple[str, np.ndarray]], affine: np.ndarray, path: str | Path, reference: np.ndarray | None, errors: int = 1) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    turned = [(title, *anatomical(v, affine)) for title, v in columns]
    top = float(np.percentile(turned[-1][1], 99.8)) or 1.0
    if reference is None:
        panels = [[(p, a, "gray", top) for p, a in planes(v, mm)] for _, v, mm in turned]
        panels, titles = [[c] for c in panels[0]], [""] * len(panels[0])
    else:
        truth = anatomical(reference, affine)[0]
        panels, titles, errors = [], [t for t, *_ in turned], min(errors, len(planes(truth, turned[0][2])))
        for _, v, mm in turned:
            error = planes(np.abs(v - truth), mm)[:errors]
            panels.append([(p, a, "gray", top) for p, a in planes(v, mm)] + [(p, a, "magma", top / 5) for p, a in error])
    rows = len(panels[0])
    heights = [p.shape[0] * a / p.shape[1] for p, a, *_ in panels[0]]
    figure = Figure(figsize=(3 * len(panels), 3 * sum(heights) + 0.6), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for column, (title, panel) in enumerate(zip(titles, panels)):
        axes[0, column].set_title(title, color="white", fontsize=11)
        for row, (plane, aspect, colours, vmax) in enumerate(panel):
            axes[row, column].imshow(plane, cmap=colours, vmin=0, vmax=vmax, origin="lower", aspect=aspect, interpolation="nearest")
            axes[row, column].axis("off")
    if reference is not None:
        figure.text(0.005, 0.005, "last row: absolute error, brightened 5 times" if errors == 1 else f"last {errors} rows: absolute error, brightened 5 times", color="white", fontsize=8)
    figure.subplots_adjust(0.01, 0.03, 0.99, 1 - 0.55 / figure.get_figheight(), 0.02, 0.02)
    figure.savefig(path, dpi=100, facecolor="black")
