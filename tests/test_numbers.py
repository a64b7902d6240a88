"""Numbers in both READMEs that tests/benchmarks/tables.py does not print, computed again from the result files.

Ranges, means and tables.
"""

import csv
import math
import statistics
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from test_readme import MEASURED, README

RESULTS = Path(__file__).parent / "benchmarks" / "results"
CLASSICAL = ("cg", "tv", "wavelet")
POOR = ("robustness_4mm_noisy", "robustness_1mm_noisy")
SMALL = ("bench_4mm_R4", "bench_2mm_R8", "bench_1mm_R8", "bench_accelerations")


def rows(name):
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scans(*names, column="psnr"):
    """(volume, voxel_mm, R) -> method -> value of `column`."""
    out = {}
    for name in names:
        for row in rows(name):
            if row[column]:
                scan = (row["volume"], round(float(row["voxel_mm"])), round(float(row["R"])))
                out.setdefault(scan, {})[row["method"]] = float(row[column])
    return out


def shown(value, digits):
    return str(Decimal(str(round(value, 6))).quantize(Decimal(10) ** -digits, ROUND_HALF_UP))


def extent(values, digits=1):
    values = list(values)
    return f"{shown(min(values), digits)} to {shown(max(values), digits)}"


def check(text, *claims):
    assert [claim for claim in claims if claim not in text] == []


def test_presets():
    small, fast, fine = scans(*SMALL), scans("bench_fast"), scans("bench_fine")
    volumes = {key: value for key, value in fast.items() if key in small}
    lost, gained = {}, {}
    for r in (4, 8, 12):
        lost[r] = [small[key]["diffusion"] - value["diffusion"] for key, value in volumes.items() if key[2] == r]
        gained[r] = max(value["diffusion"] - small[key]["diffusion"] for key, value in fine.items() if key[2] == r)
    ahead = [value["diffusion"] - max(small[key][m] for m in ("tv", "wavelet")) for key, value in volumes.items()]
    measured = scans("bench_measured")
    planes = [measured[key]["diffusion"] - value["diffusion"] for key, value in fast.items() if "plane" in key[0]]
    assert {shown(value, 1) for value in lost[4]} == {"0.2"} and len(planes) == 9
    check(
        README,
        f"loses 0.2 dB at R = 4, {extent(lost[8])} dB at R = 8 and {extent(lost[12])} dB at R = 12, "
        f"and is still {extent(ahead)} dB better",
        f"On the measured planes, where the default learns from the scan, it loses {extent(planes)} dB",
        f"gains at most {shown(gained[4], 1)} dB at R = 4, "
        f"up to {shown(gained[8], 1)} dB at R = 8 and {shown(gained[12], 1)} dB at R = 12",
    )


def test_other_methods_with_a_prior():
    four, white, posterior = scans("bench_4mm_R4"), scans("bench_white"), scans("bench_posterior")
    better = {key: max(value["tv"], value["wavelet"]) for key, value in four.items()}
    below_diffusion = extent(four[key]["diffusion"] - psnr for key, v in posterior.items() for psnr in v.values())
    below_better = extent(better[key] - psnr for key, v in posterior.items() for psnr in v.values())
    check(
        MEASURED,
        f"{extent((v['diffusion'] - v['pnp'] for v in four.values()), 2)} dB below slice diffusion at 4 mm",
        f"That is {extent(v['diffusion'] - v['faithful'] for v in four.values())} dB below slice diffusion",
        f"slice diffusion is {extent(v['diffusion'] - four[key]['faithful'] for key, v in white.items())} dB above it",
        f"All are {below_diffusion} dB below slice diffusion",
        f"and {below_better} dB below the better of total variation and l1-wavelet",
    )


def test_strength_of_cg_sense():
    table = rows("cg_strength")
    mean = lambda strength, some: statistics.mean(float(row[f"strength {strength}"]) for row in some)
    finest = [row for row in table if float(row["voxel_mm"]) < 1.5]
    gap, finer = (max(mean(s, some) for s in (5, 10, 14, 20, 30, 50)) - mean(20, some) for some in (table, finest))
    check(
        MEASURED,
        f"On {len(table)} scans of three held-out heads this is, on average, "
        f"within {shown(gap, 2)} dB of the best of six strengths (30), and within {shown(finer, 2)} dB",
        f"It is {shown(mean(20, table) - mean(10, table), 2)} dB better on average than strength 10",
    )


def test_more_iterations_of_the_classical_methods():
    before, after = {**scans("bench_4mm_R4"), **scans("bench_measured")}, scans("bench_long")

    def gain(method, *kinds):
        some = [key for key in after if any(kind in key[0] for kind in kinds)]
        return [after[key][method] - before[key][method] for key in some]

    simulated = ("IXI", "bold", "brainweb", "knee_DESS", "studyforrest")
    assert max(map(abs, gain("tv", *simulated))) < 0.05
    assert all(value["tv"] < before[key]["wavelet"] for key, value in after.items() if "ulf" in key[0])
    check(
        MEASURED,
        f"gain {extent(gain('wavelet', *simulated))} dB on the simulated scans at 4 mm "
        f"and lose {extent(-g for g in gain('wavelet', 'plane', 'ulf'))} dB on the measured planes",
        f"lose {extent(-g for g in gain('tv', 'plane'))} dB on the planes "
        f"and gain {extent(gain('tv', 'ulf'))} dB at 0.055 T",
    )


def test_learning_from_the_scan():
    with_it, without = scans("bench_measured"), scans("bench_measured_adapt0")
    gain = {key: with_it[key]["diffusion"] - value["diffusion"] for key, value in without.items()}
    planes = [value for key, value in gain.items() if "plane" in key[0]]
    low_field = [value for key, value in gain.items() if "plane" not in key[0]]
    heads, unlearned = scans("bench_planes"), scans("bench_planes_adapt0")
    parts = [[key for key in heads if (key[1] == 4) == slab] for slab in (False, True)]
    one_by_one = scans("bench_planes_alone0")
    costs = {key: unlearned[key]["diffusion"] - value["diffusion"] for key, value in one_by_one.items()}
    kinds = ((parts[0], (4,)), (parts[0], (8,)), (parts[1], (4, 8)))
    alone = [extent((costs[key] for key in part if key[2] in r), 2) for part, r in kinds]
    better = {key: max(value["tv"], value["wavelet"]) for key, value in heads.items()}
    over = [extent(heads[key]["diffusion"] - better[key] for key in part) for part in parts]
    learned = [extent(heads[key]["diffusion"] - unlearned[key]["diffusion"] for key in part) for part in parts]
    check(
        MEASURED,
        f"contributes {extent(planes)} dB of the gain of `small` on the planes and {extent(low_field)} dB at 0.055 T",
        f"Planes gain {over[0]} dB over the better of total variation and l1-wavelet, "
        f"of which {learned[0]} dB is learned from the scan. "
        f"Slabs gain {over[1]} dB, of which {learned[1]} dB is learned",
        f"costs the planes {alone[0]} dB at R = 4 and {alone[1]} dB at R = 8; "
        f"for the slabs it makes little difference ({alone[2]} dB;",
    )


def test_volumes_of_one_scan():
    later = [row for row in rows("series") if int(row["number"])]
    times = extent([float(row["series_s"]) / float(row["alone_s"]) for row in later], 2)
    low, high = (shown(edge(float(row["series"]) - float(row["alone"]) for row in later), 2) for edge in (min, max))
    check(MEASURED, f"That takes {times} times the time for the same image ({low} to +{high} dB)")


def test_ssim_of_measured_scans():
    found, base = scans("bench_measured", column="ssim"), scans("bench_base", column="ssim")
    others = {key: max(v for method, v in value.items() if method != "diffusion") for key, value in found.items()}

    def of(table, kind):
        return extent((table[key]["diffusion"] - others[key] for key in found if kind in key[0]), 3)

    check(
        MEASURED,
        f"({of(found, 'plane')} above the best other image, {of(base, 'plane')} with `base`) "
        f"and at 0.055 T ({of(found, 'ulf')}; with `base` {of(base, 'ulf')})",
    )


def test_other_sampling_patterns():
    """The summary of the measured planes at R = 8: all five patterns, and their SSIM.

    The noise of the left-out lines is taken out.
    """
    tables = [rows(name) for name in ("bench_measured", "bench_masks", "bench_base", "bench_masks_base")]
    found = {}
    for table, title in zip(tables, ("diffusion", "diffusion", "base", "base")):
        for row in table:
            if "plane" in row["volume"] and row["R"] == "8":
                method = title if row["method"] == "diffusion" else row["method"]
                found.setdefault((row["volume"], row.get("seed", "0")), {})[method] = row
    assert len(found) == 15
    error = lambda row: (float(row["unseen"]) ** 2 - float(row["floor"]) ** 2) ** 0.5
    ours, gains = ("diffusion", "base"), {}
    for title in ours:
        ratios = [error(methods["bart"]) / error(methods[title]) for methods in found.values()]
        gains[title] = extent((20 * math.log10(ratio) for ratio in ratios), 2)
    for methods in found.values():
        ssim = {title: float(row["ssim"]) for title, row in methods.items()}
        best_other = max(value for title, value in ssim.items() if title not in ours)
        assert all(ssim[title] > best_other for title in ours)
    check(README, f"the gains over BART are {gains['diffusion']} dB, and {gains['base']} dB with `base`. SSIM agrees")


def test_robustness():
    titles = {
        "robustness_4mm": "4 mm | all 48",
        "robustness_4mm_base": "4 mm, with `base` | all 48",
        POOR[0]: "4 mm, R = 1, 2, 4 and 8 | the 32 at SNR 3 and 5",
        POOR[1]: "1 mm, another head, R = 2 and 8 | the 16 at SNR 3 and 5",
        "robustness_2mm": "2 mm | all 48",
        "robustness_2mm_base": "2 mm, with `base` | the 16 at SNR 20",
        "robustness_1mm": "1 mm, another head | all 48",
    }
    gains, short = {}, {}
    for name, title in titles.items():
        gains[name], short[name] = [], []
        for row in rows(name):
            weights = {key: float(row[key]) for key in ("weight 0.35", "weight 0.7", "weight 1.4")}
            gains[name].append(weights["weight 0.7"] - float(row["cg"]))
            short[name].append(max(weights.values()) - weights["weight 0.7"])
        least, most, middle = (shown(of(gains[name]), 1) for of in (min, max, statistics.median))
        short_of_best = f"{shown(statistics.median(short[name]), 1)} | {shown(max(short[name]), 2)}"
        check(MEASURED, f"| {title} | {least} | {middle} | {most} | {short_of_best} |")
    default = [gain for name, some in gains.items() for gain in some if "base" not in name and name not in POOR]
    worst = shown(max(max(some) for name, some in short.items() if name not in POOR), 2)
    check(README, f"the default gains {extent(default)} dB over CG-SENSE", f"would gain more than {worst} dB")


def test_poor_scans():
    """Below an SNR of 7 the weight grows no further; 3 is about what it would have grown to at SNR 3."""
    table = [row for name in POOR for row in rows(name)]
    of = lambda row, column: float(row[column])
    gains = [of(row, "weight 0.7") - of(row, "cg") for row in table]
    half, twice = (max(of(row, w) - of(row, "weight 0.7") for row in table) for w in ("weight 0.35", "weight 1.4"))
    check(
        README,
        f"(4 mm with R = 1 to 8, 1 mm with R = 2 and 8) it gains {extent(gains)} dB; there, half the weight would "
        f"gain up to {shown(half, 2)} dB more, twice the weight up to {shown(twice, 2)} dB",
    )
    at_3 = [row for row in rows(POOR[0]) if row["snr"] == "3.0"]
    losses = sum(of(row, "weight 3") < of(row, "cg") for row in at_3)
    check(MEASURED, f"it would lose to CG-SENSE in {losses} of the {len(at_3)} protocols at 4 mm and SNR 3")


def test_lattices():
    columns = ("snr", "lattice", "offset", "calibration", "pulls")
    table = {tuple(row[column] for column in columns): row for row in rows("lattices")}
    pairs = []
    for (snr, lattice, offset, calibration, pulls), row in table.items():
        if snr == "30.0" and lattice != "1x2" and (calibration, pulls) == ("same contrast", "calibration"):
            pairs.append((row, table[snr, lattice, offset, calibration, "zero"]))
    cg, diffusion = ([float(a[f"{m} psnr"]) - float(b[f"{m} psnr"]) for a, b in pairs] for m in ("cg", "diffusion"))
    assert all(abs(float(a[f"{m} brightness"]) - 1) < 0.0205 for a, _ in pairs for m in ("cg", "diffusion"))
    check(
        README,
        f"this gains {extent(cg)} dB of CG-SENSE",
        f"and {shown(min(diffusion), 1)} to {shown(max(diffusion), 0)} dB of slice diffusion",
    )


def test_lesions():
    table = {}
    for row in rows("lesions"):
        kind = (row["volume"].startswith("knee"), float(row["voxel_mm"]), row["method"])
        table.setdefault(kind, []).append(row)
    some = lambda knee, mm, method, column: [float(row[column]) for row in table[knee, mm, method]]
    more, like, of_cg, kept = {}, [], [], {}
    for mm in (4.0, 2.0, 1.0):
        both = zip(some(False, mm, "diffusion", "kept"), some(False, mm, "wavelet", "kept"))
        more[mm] = extent((100 * (a - b) for a, b in both), 0)
        both = zip(some(False, mm, "diffusion", "false"), some(False, mm, "wavelet", "false"))
        like += [a / b for a, b in both]
        for knee in (False, True):
            both = zip(some(knee, mm, "cg", "false"), some(knee, mm, "diffusion", "false"))
            of_cg += [a / b for a, b in both]
    for knee in (False, True):
        for method in ("diffusion", "wavelet"):
            kept[knee, method] = extent((100 * share for share in some(knee, 2.0, method, "kept")), 0)
    check(
        MEASURED,
        f"by {more[4.0]} percentage points at 4 mm, {more[2.0]} at 2 mm and {more[1.0]} at 1 mm",
        f"Its lesion-like errors are {extent(like, 2)} times as strong",
        f"among errors that are {extent(of_cg)} times as strong",
    )
    check(
        README,
        f"keep {kept[False, 'diffusion']} % of it in two heads (T1- and T2-weighted), "
        f"and {kept[False, 'wavelet']} % with l1-wavelet",
        f"they keep {kept[True, 'diffusion']} % (l1-wavelet: {kept[True, 'wavelet']} %)",
    )


def test_estimated_errors():
    table = [row for row in rows("error_map") if row["volume"] != "head_2mm"]
    of = lambda snr, *methods: [row for row in table if row["method"] in methods and row["snr"] == snr]
    ratio = lambda some: extent((float(row["estimate"]) / float(row["error"]) for row in some), 2)
    rank = lambda some: extent((float(row["rank"]) for row in some), 2)
    loud, quiet, measured = of("10.0", "diffusion"), of("30.0", "diffusion"), of("", "diffusion")
    classical, cg = of("30.0", "wavelet", "tv"), of("30.0", "cg")
    check(README, f"the estimate is {ratio(quiet)} times the true error at SNR 30 and {ratio(loud)} times at SNR 10")
    check(
        MEASURED,
        f"the estimate is {ratio(quiet)} times the true error",
        f"it is {ratio(loud)} times the true error",
        f"{ratio(classical)} times the true error for l1-wavelet and total variation "
        f"(rank correlation {rank(classical)}), {ratio(cg)} times for CG-SENSE ({rank(cg)})",
        f"{ratio(measured)} times the difference to the image of all lines, "
        f"which contains the noise of those lines too; rank correlation {rank(measured)}",
    )


def test_denoising_tables():
    def line(name, mm, columns):
        table = [row for row in rows(name) if (row["sigma"], float(row["voxel_mm"])) == ("0.1", mm)]
        return [shown(statistics.mean(float(row[column]) for row in table), 2) for column in columns]

    for mm in (1.0, 2.0, 4.0):
        noisy, classical, small, white = line("denoising_small", mm, ("noisy", "classical", "small", "small-white"))
        check(MEASURED, f"| {mm:g} mm | {noisy} | {classical} | **{small}** | **{white}** |")
        trained = line("denoising_1500_steps", mm, ("diverse", "fixed_1mm", "fixed_2mm", "fixed_4mm"))
        check(MEASURED, f"| {mm:g} mm | {' | '.join(trained)} |")


def test_priors_of_one_voxel_size():
    table = {(row["way"], round(float(row["voxel_mm"])), row["prior"]): row for row in rows("resolution")}
    for mm, r in ((4, 4), (2, 8), (1, 8)):
        found = [table["slice diffusion", mm, prior] for prior in ("1 mm", "2 mm", "4 mm", "all")]
        best = max(row["psnr"] for row in found)
        cells = [f"**{row['psnr']}**" if row["psnr"] == best else row["psnr"] for row in found]
        check(MEASURED, f"| {mm} mm, {r} | {found[0]['cg']} | {' | '.join(cells)} |")


def test_rates_and_times():
    gathering = {row["source"]: row for row in rows("gathering")}
    hundreds = {source: f"{round(int(row['lines_per_s']), -2):,}" for source, row in gathering.items()}
    peak = {source: row["peak_over_kspace"] for source, row in gathering.items()}
    check(
        README,
        f"{hundreds['memory']} lines per second (16 coils, 512 samples) from memory "
        f"and {hundreds['socket']} from a socket",
        f"Peak memory is {peak['memory']} times the size of the k-space, {peak['recon_data']} times from buffers",
    )
    for row in rows("solve_speed_cpu"):
        columns = ("maps_s", "preview_s", "sweeps_s", "total_s", "us_per_voxel")
        cells = " | ".join(f"{float(row[column]):g}" for column in columns)
        check(MEASURED, f"| {row['side']} | {cells} | {row['bart_s']} |")
    large = {row["stage"]: row for row in rows("chain_speed_cpu")}
    gib, gib_kspace = shown(float(large["diffusion"]["process_gib"]), 1), shown(320 * 320 * 256 * 32 * 8 / 2**30, 1)
    minutes = {stage: shown(float(large[stage]["after_last_line_s"]) / 60, 1) for stage in ("preview", "diffusion")}
    seconds = {stage: shown(float(row["seconds"]), 0) for stage, row in large.items()}
    check(
        README,
        f"took at most {gib} GiB, and one CPU core handed out the preview {minutes['preview']} minutes "
        f"and the final image {minutes['diffusion']} minutes after the last line",
    )
    check(
        MEASURED,
        f"coil maps {seconds['coil maps']} s, preview {seconds['preview']} s, sweeps {seconds['diffusion']} s. "
        f"The process took at most {gib} GiB, of which {gib_kspace} GiB are the k-space",
    )
    ms = {(row["architecture"], row["precision"]): round(float(row["ms_per_slice"])) for row in rows("prior_speed_cpu")}
    check(
        MEASURED,
        f"A slice of 256 x 256 takes the network {ms['small', 'bf16']} ms with `small` "
        f"and {ms['base', 'bf16']} ms with `base` "
        f"(bf16; in single precision {ms['small', 'fp32']} and {ms['base', 'fp32']} ms",
    )
    latency = {row["way"]: row for row in rows("latency")}
    titles = {
        "warm server, <connect>": "warm server, `<connect>`",
        "warm server, client": "warm server, client",
        "new process, <execute>": "new process, as `<execute>` starts it",
        "offline, slicediff recon": "`slicediff recon`, new process",
        "offline, warm process": "offline, warm process",
    }
    for way, title in titles.items():
        row = latency[way]
        first = shown(float(row["first_image_s"]), 1) if row["first_image_s"] else ""
        total, over_offline = shown(float(row["total_s"]), 1), shown(float(row["total_over_offline_percent"]), 0)
        check(MEASURED, f"| {title} | {first} | {total} | {over_offline} % |")
