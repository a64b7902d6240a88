"""The tables of README.md here, and the one of the main README, as Markdown, from the CSV files in results/.

    python tests/benchmarks/tables.py

The main README's first: what slice diffusion gains. Then PSNR of every method at one acceleration per voxel size, then
slice diffusion less the best of our classical methods and less tuned BART at all accelerations; the seconds of each
stage on a GPU; of the measured scans the error of each image itself on the lines it was not given, its PSNR against the
image of all lines, and what is gained with other sampling patterns; what becomes of small lesions; the estimated error
beside the true one; regular undersampling with a separate calibration; objects beyond the field of view; and volumes of
one scan that learn from each other.
"""

from __future__ import annotations

import csv
import math

from scans import RESULTS

VOLUMES = {
    "bold5000_CSI1_T1w": "BOLD5000 CSI1",
    "studyforrest_sub02_T1w_0p67mm": "studyforrest 02",
    "IXI002-Guys-0828-T1": "IXI 002",
    "brainweb_t1_1mm_pn0_rf0": "BrainWeb",
    "knee_DESS_0p5mm": "knee, DESS",
    "IXI002-Guys-0828-T2": "IXI 002, T2-weighted",
    "IXI002-Guys-0828-PD": "IXI 002, proton density",
}
HEADS = {"head_ds000011_sub-13": "held-out head", "head_2mm": "the example"}
BASE = "diffusion:base"  # as on a GPU: bench.py --methods diffusion --prior base
OBJECTS = {f"IXI002-Guys-0828-{contrast}": "IXI 002" for contrast in ("T1", "T2", "PD")}
# in plane, along both phase encodes: much of its k-space at 1 mm is empty, so that it is too easy there
INTERPOLATED = ("IXI002-Guys-0828-T1",)
METHODS = {
    "zero-filled": "zero-filled",
    "cg": "CG-SENSE",
    "tv": "total variation",
    "wavelet": "l1-wavelet",
    "sigpy": "sigpy l1-wavelet",
    "bart": "BART l1-wavelet (at best)",
    "diffusion": "slice diffusion",
    BASE: "with `base`",
}
CLASSICAL = ("cg", "tv", "wavelet")
MEASURED = {
    "brain_8ch_plane 0": "plane, 8 coils",
    "brain_13ch_vfa_planes 0": "plane, 13 coils, first flip angle",
    "brain_13ch_vfa_planes 1": "plane, 13 coils, second flip angle",
    **{
        f"ulf_{session}_{kind} 0": f"0.055 T, {session} {kind}"
        for session in ("6A", "7A")
        for kind in ("FLAIR", "FSE", "GRE")
    },
}
FILES = {(4, 4): "bench_4mm_R4", (2, 8): "bench_2mm_R8", (1, 8): "bench_1mm_R8"}
WHOLE = "bench_1mm_whole_R8"  # the others at 1 mm are slabs along the readout
STAGES = {
    "gather": "gathering, while lines arrive",
    "coil maps": "coil maps and A^H y",
    "preview": "CG-SENSE, the preview",
    "diffusion": "slice diffusion, `small`",
    BASE: "slice diffusion, `base` (the default there)",
    "faithful": "slice diffusion as published, `small`",
}
GRID = [(4, 4), (4, 8), (4, 12), (2, 4), (2, 8), (2, 12), (1, 4), (1, 8), (1, 12)]


def main() -> None:
    """Print all tables."""
    scans = scans_of("bench_measured", "bench_base")
    print(f"in short\n\n{in_short(scans)}")
    base = read("bench_base")
    for (voxel_mm, acceleration), name in FILES.items():
        print(f"\n{name}\n")
        rows = read(name)[voxel_mm, acceleration]
        for volume in set(rows) & set(base.get((voxel_mm, acceleration), {})):
            rows[volume][BASE] = base[voxel_mm, acceleration][volume]["diffusion"]
        print(side_by_side(rows, f"{voxel_mm} mm, R = {acceleration}"))
    print(f"\n{WHOLE}\n")
    rows = read(WHOLE)[1, 8]
    for volume, methods in read("bench_base_whole")[1, 8].items():
        rows[volume][BASE] = methods["diffusion"]
    print(side_by_side(rows, "1 mm, R = 8, whole volumes"))
    found: dict[tuple, dict] = {}
    for name in ("bench_accelerations", *FILES.values()):
        for protocol, volumes in read(name).items():
            found.setdefault(protocol, {}).update(volumes)
    print(f"\naccelerations\n\n{margins(found)}")
    print(f"\non a GPU\n\n{stages('chain_speed_cuda')}")
    print(f"\nmeasured\n\n{errors(scans)}\n\n{against_all_lines(scans)}\n\n{sampling_patterns(patterns(scans))}")
    print(f"\nsmall lesions\n\n{lesions('lesions')}")
    print(f"\nestimated error\n\n{estimated_errors('error_map')}")
    print(f"\nlattices\n\n{lattices('lattices')}")
    print(f"\nbeyond the field of view\n\n{wrap_around('wrap_around')}")
    print(f"\nseveral volumes of one scan\n\n{series('series')}")


def in_short(scans: dict[tuple, dict]) -> str:
    """Least and largest gain of slice diffusion, dB, over CG-SENSE, over the best of CLASSICAL and over tuned BART.

    In brackets over BART at its best, where all were tried.
    """
    groups = {}
    for (mm, r), name in FILES.items():
        rows = {volume: row for volume, row in read(name)[mm, r].items() if mm > 1 or volume not in INTERPOLATED}
        objects = {OBJECTS.get(volume, volume) for volume in rows}
        title = f"{mm} mm, R = {r}: {len(rows)} simulated scans of {len(objects)} objects, 8 coils"
        groups[title] = list(rows.values())
    psnr = {key: {m: float(row["psnr"]) for m, row in rows.items()} for key, rows in scans.items()}
    repeated = [rows for found in patterns(scans).values() for rows in found]
    planes = [{m: float(row["psnr"]) for m, row in rows.items()} for rows in repeated]
    groups["1 mm, R = 8: three measured planes of two heads, 8 and 13 coils, five sampling patterns each"] = planes
    groups["the same, with `base`"] = [{**values, "diffusion": values[BASE]} for values in planes]
    low_field = [values for (scan, _), values in psnr.items() if scan.startswith("ulf")]
    groups["0.055 T, R = 2: six measured scans of two sessions, one coil"] = low_field
    head = [
        "slice diffusion's PSNR, dB",
        "over CG-SENSE",
        "over the best of it, total variation and l1-wavelet",
        "over BART's l1-wavelet (at best)",
    ]
    lines = [line(head), rule(len(head))]
    for title, rows in groups.items():
        over = [[row["diffusion"] - max(row[m] for m in others) for row in rows] for others in (("cg",), CLASSICAL)]
        tuned, best = ([row["diffusion"] - row[m] for row in rows if m in row] for m in ("bart", "bart-oracle"))
        brackets = f"({extent(best)})" if len(best) == len(rows) else ""
        lines.append(line([title, *map(extent, over), " ".join(filter(None, (extent(tuned), brackets)))]))
    return "\n".join(lines)


def extent(gains: list[float]) -> str:
    """From the least to the largest, nothing of none."""
    return f"{min(gains):+.2f} to {max(gains):+.2f}" if gains else ""


def read(name: str) -> dict[tuple[int, int], dict[str, dict[str, float]]]:
    """(voxel_mm, R) -> volume -> method -> PSNR."""
    out: dict[tuple[int, int], dict] = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            protocol = round(float(row["voxel_mm"])), round(float(row["R"]))
            out.setdefault(protocol, {}).setdefault(row["volume"], {})[row["method"]] = float(row["psnr"])
    return out


def side_by_side(rows: dict[str, dict[str, float]], title: str) -> str:
    """PSNR of each method, the oracle's BART in brackets."""
    shown = [m for m in METHODS if sum(m in row for row in rows.values()) > len(rows) / 2]
    lines = [line([title, *(METHODS[m] for m in shown)]), rule(1 + len(shown))]
    for volume in (v for v in VOLUMES if v in rows):
        row = rows[volume]
        cells = [f"{row[m]:.2f}" if m in row else "" for m in shown]
        if "bart-oracle" in row:
            cells[shown.index("bart")] += f" ({row['bart-oracle']:.2f})"
        for m in ("diffusion", BASE):
            if m in row and m in shown:
                cells[shown.index(m)] = f"**{row[m]:.2f}**"
        lines.append(line([VOLUMES[volume], *(c.strip() for c in cells)]))
    return "\n".join(lines)


def margins(found: dict[tuple, dict]) -> str:
    """Slice diffusion less the best classical method / less tuned BART."""
    columns = [p for p in GRID if p in found]
    lines = [line(["", *(f"{mm} mm, R = {r}" for mm, r in columns)]), rule(1 + len(columns))]
    for volume in list(VOLUMES)[:5]:
        rows = [found[p].get(volume, {}) for p in columns]
        cells = [f"{margin(r, CLASSICAL)} / {margin(r, ('bart',))}" if "diffusion" in r else "" for r in rows]
        lines.append(line([VOLUMES[volume], *cells]))
    return "\n".join(lines)


def margin(row: dict[str, float], others: tuple[str, ...]) -> str:
    """Slice diffusion less the best of `others`, dB."""
    known = [row[m] for m in others if m in row]
    return f"{row['diffusion'] - max(known):+.2f}" if known else "?"


def scans_of(name: str, base: str) -> dict[tuple[str, str], dict[str, dict]]:
    """(measured scan, R) -> method -> row, in the order of MEASURED."""
    out: dict[tuple, dict] = {}
    for table in (name, base):
        with (RESULTS / f"{table}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["volume"] in MEASURED:
                    method = BASE if table == base else row["method"]
                    out.setdefault((row["volume"], row["R"]), {})[method] = row
    place = lambda key: (list(MEASURED).index(key[0]), key[1])
    return {key: out[key] for key in sorted(out, key=place)}


def errors(scans: dict[tuple, dict]) -> str:
    """sqrt(unseen^2 - floor^2) of each method, and what slice diffusion gains with both priors, dB.

    Over the best of CLASSICAL and over tuned BART.
    """
    ours = ("diffusion", BASE)
    methods = [METHODS[m] for m in (*CLASSICAL, "bart", *ours)]
    head = ["error of the image itself", "R", *methods, "gain, dB", "over BART, dB"]
    lines = [line(head), rule(len(head))]
    for (scan, acceleration), rows in scans.items():
        if not float(rows["cg"]["floor"]):
            continue  # one coil: its lines tell no error from noise
        error = {m: max(0.0, own_error(row)) ** 0.5 for m, row in rows.items() if row["unseen"]}
        cells = [f"{error[m]:.3f}" for m in CLASSICAL]
        cells.append(f"{error['bart']:.3f} ({error['bart-oracle']:.3f})")
        cells += [f"**{error[m]:.3f}**" if m in error else "" for m in ours]
        for than in (min(error[m] for m in CLASSICAL), error["bart"]):
            cells.append(" / ".join(f"{20 * math.log10(than / error[m]):.2f}" for m in ours if m in error))
        lines.append(line([MEASURED[scan], acceleration, *cells]))
    return "\n".join(lines)


def own_error(row: dict) -> float:
    """Square of the error of the image itself, on the lines it was not given."""
    return float(row["unseen"]) ** 2 - float(row["floor"]) ** 2


def against_all_lines(scans: dict[tuple, dict]) -> str:
    """PSNR of each method against the image of all lines, and what slice diffusion gains with both priors.

    Over the best of CLASSICAL and over tuned BART.
    """
    ours = ("diffusion", BASE)
    methods = [METHODS[m] for m in ("zero-filled", *CLASSICAL, "bart", *ours)]
    head = ["PSNR against all lines", "R", *methods, "gain, dB", "over BART, dB"]
    lines = [line(head), rule(len(head))]
    for (scan, acceleration), rows in scans.items():
        value = {m: float(row["psnr"]) for m, row in rows.items()}
        tuned, best = value.get("bart"), value["bart-oracle"]
        cells = [f"{value[m]:.2f}" for m in ("zero-filled", *CLASSICAL)]
        cells.append(f"({best:.2f})" if tuned is None else f"{tuned:.2f} ({best:.2f})")
        cells += [f"**{value[m]:.2f}**" if m in value else "" for m in ours]
        for than in (max(value[m] for m in CLASSICAL), best if tuned is None else tuned):
            cells.append(" / ".join(f"{value[m] - than:.2f}" for m in ours if m in value))
        lines.append(line([MEASURED[scan], acceleration, *cells]))
    return "\n".join(lines)


def patterns(scans: dict[tuple, dict]) -> dict[str, list[dict]]:
    """Measured plane -> one dict (method -> row) for each sampling pattern at R = 8, that of `scans` first."""
    out = {scan: {"0": rows} for (scan, acceleration), rows in scans.items() if "plane" in scan and acceleration == "8"}
    for table, ours in (("bench_masks", "diffusion"), ("bench_masks_base", BASE)):
        with (RESULTS / f"{table}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                method = ours if row["method"] == "diffusion" else row["method"]
                out[row["volume"]].setdefault(row["seed"], {})[method] = row
    return {scan: list(rows.values()) for scan, rows in out.items()}


def sampling_patterns(found: dict[str, list[dict]]) -> str:
    """What slice diffusion gains with both priors, dB, over the best of CLASSICAL and over tuned BART.

    Mean over the patterns (least to largest), and the same of the error of the image itself.
    """
    both = ("diffusion", BASE)
    over = ("over the best classical", "over BART", "without the noise, over BART")
    head = ["R = 8, gain, dB", *(f"{METHODS[m]}, {what}" for m in both for what in over)]
    lines = [line(head), rule(len(head))]
    for scan, rows in found.items():
        cells = []
        for ours in both:
            psnr = [{m: float(value["psnr"]) for m, value in row.items()} for row in rows]
            error = [{m: own_error(row[m]) for m in (ours, "bart")} for row in rows]
            cells.append(spread([row[ours] - max(row[m] for m in CLASSICAL) for row in psnr]))
            cells.append(spread([row[ours] - row["bart"] for row in psnr]))
            cells.append(spread([10 * math.log10(row["bart"] / row[ours]) for row in error]))
        lines.append(line([MEASURED[scan], *cells]))
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean (least to largest)."""
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def estimated_errors(name: str) -> str:
    """Of slice diffusion as it is: true / estimated error.

    In brackets rank correlation, and share of voxels below twice the estimate.
    """
    columns = [(4, 30), (2, 30), (1, 30), (4, 10)]
    head = ["true / estimated error, %", *(f"SNR {snr}, {mm} mm" for mm, snr in columns)]
    lines = [line(head), rule(len(head))]
    found = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == "diffusion" and row["snr"]:  # simulated
                error, estimate, rank, within = (float(row[k]) for k in ("error", "estimate", "rank", "within_2"))
                protocol = (round(float(row["voxel_mm"])), round(float(row["snr"])))
                cell = f"{error:.1f} / {estimate:.1f} ({rank:.2f}, {100 * within:.0f} %)"
                found[(row["volume"], *protocol)] = cell
    for volume in (v for v in VOLUMES if any(v in key for key in found)):
        lines.append(line([VOLUMES[volume], *(found.get((volume, *column), "") for column in columns)]))
    return "\n".join(lines)


def lesions(name: str) -> str:
    """Share of the contrast that lesions keep, by size and contrast, and the contrast that errors look like.

    Means over the volumes; their range for what errors look like.
    """
    kept: dict[tuple, list[float]] = {}
    false: dict[tuple, list[float]] = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            protocol = (float(row["voxel_mm"]), float(row["R"]))
            size, contrast = float(row["diameter_mm"]) / protocol[0], float(row["contrast"])
            kept.setdefault((protocol, row["method"], size, contrast), []).append(float(row["kept"]))
            false.setdefault((protocol, row["method"], size), []).append(float(row["false"]))
    protocols, _, sizes, contrasts = (sorted(set(some)) for some in zip(*kept))
    head = ["kept, at " + " / ".join(f"{100 * c:g} %" for c in contrasts)]
    head += [f"{size:g} voxels" for size in sizes]
    head += [f"errors like {size:g} voxels" for size in sizes]
    lines = [line(head), rule(len(head))]
    for protocol in reversed(protocols):
        for method in (m for m in METHODS if (protocol, m, sizes[0]) in false):
            cells = [f"{protocol[0]:g} mm, R = {protocol[1]:g}: {METHODS[method]}"]
            for size in sizes:
                shares = (kept[protocol, method, size, contrast] for contrast in contrasts)
                cells.append(" / ".join(f"{100 * sum(v) / len(v):.0f}" for v in shares) + " %")
            for size in sizes:
                ends = [f"{edge(false[protocol, method, size]):.0f}" for edge in (min, max)]
                cells.append(" to ".join(dict.fromkeys(ends)) + " %")
            lines.append(line(cells))
    return "\n".join(lines)


def lattices(name: str) -> str:
    """Regular undersampling with a separate calibration: PSNR (and brightness over the true one).

    Pulled towards zero / the calibration's image.
    """
    found: dict[tuple, dict] = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = (f"{float(row['snr']):g}", row["lattice"], row["offset"])
            for image in ("cg", "diffusion"):
                cell = f"{float(row[f'{image} psnr']):.1f} ({float(row[f'{image} brightness']):.2f})"
                found.setdefault(key, {})[row["calibration"], image, row["pulls"]] = cell
    columns = [
        ("same contrast", "cg"),
        ("same contrast", "diffusion"),
        ("another contrast", "diffusion"),
        ("another phase", "diffusion"),
    ]
    head = ["SNR", "lattice, z x y", "lines from k = 0"]
    head += [f"{METHODS[image]}, {calibration}" for calibration, image in columns]
    lines = [line(head), rule(len(head))]
    for key, cells in found.items():
        shown = [part.replace("x", " x ") for part in key]
        shown += [f"{cells[(*column, 'zero')]} / {cells[(*column, 'calibration')]}" for column in columns]
        lines.append(line(shown))
    return "\n".join(lines)


def wrap_around(name: str) -> str:
    """Objects that reach beyond the field of view: PSNR with one / two sets of coil maps."""
    lines = [line(["object", "field of view, z x y", "overlap", "CG-SENSE", "slice diffusion"]), rule(5)]
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            overlap = f"{float(row['overlap']):.0%}" if row["overlap"] else "below 5%"
            cells = [
                f"{float(row[f'{image}_1']):.1f} / {float(row[f'{image}_2']):.1f}" for image in ("cg", "diffusion")
            ]
            fov = f"{float(row['fov_z']):g} x {float(row['fov_y']):g}"
            lines.append(line([{**VOLUMES, **HEADS}[row["volume"]], fov, overlap, *cells]))
    return "\n".join(lines)


def series(name: str) -> str:
    """Volumes of one scan that are planes or thin slabs, with seconds.

    PSNR of the first image, and after learning alone and in the series.
    """
    lines = [line(["volume", "first image", "learned from alone", "seconds", "in the series", "seconds"]), rule(6)]
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            positions = int(row["matrix"].split("x")[0])
            title = MEASURED.get(row["volume"])
            if title is None:
                shape = f"slab of {positions}" if positions > 1 else "plane"
                title = f"{HEADS[row['volume']]}, {shape}, repetition {int(row['number']) + 1}"
            alone_s, series_s = (f"{float(row[k]):.0f}" for k in ("alone_s", "series_s"))
            cells = (row["first"], row["alone"], alone_s, row["series"], series_s)
            lines.append(line([title, *(f"{float(cell):.2f}" if "." in cell else cell for cell in cells)]))
    return "\n".join(lines)


def stages(name: str) -> str:
    """The whole chain stage by stage; each method follows the preview."""
    lines = [line(["stage", "seconds", "after the last line", "bound", "evaluations", "GPU memory, GiB"]), rule(6)]
    preview_s = 0.0
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            seconds, after = float(row["seconds"]), row["after_last_line_s"]
            preview_s = float(after) if row["stage"] == "preview" else preview_s
            if row["evaluations"]:
                after = preview_s + seconds
            cells = (
                f"{seconds:.2f}",
                f"{float(after):.2f}" if after else "",
                f"{float(row['floor_s']):.3f}",
                f"{int(row['evaluations'] or 0):,}" if row["evaluations"] else "",
            )
            lines.append(line([STAGES[row["stage"]], *cells, f"{float(row['peak_gib']):.1f}"]))
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def rule(columns: int) -> str:
    """The line below the head of a Markdown table."""
    return "|" + "---|" * columns


if __name__ == "__main__":
    main()
