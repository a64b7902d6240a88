"""The `slicediff` command: every mouth of the package."""

from __future__ import annotations

import argparse
import json
import logging
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from .display import Display
from .limits import Limits
from .options import Options, make_options

SERVE_LIMITS = {
    "timeout_s": ("S", "longest silence in the middle of a scan"),
    "idle_s": ("S", "longest wait for a configuration and a header"),
    "slots": ("N", "reconstructions at a time; others wait in line"),
    "max_gib": ("GIB", "refuse a scan whose k-space is larger"),
    "max_message_mib": ("MIB", "refuse a message that is larger"),
    "connections": ("N", "open scans at a time"),
    "grace_s": ("S", "after SIGTERM, time for running scans to end before they hand out what they have"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; 0 when images were written and are finite, else 1 with one sentence on stderr."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.CRITICAL, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("slicediff: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the boundary: one sentence, the traceback only when asked for
        from .conversation import sentence

        if arguments.verbose:
            logging.getLogger("slicediff").info("failure", exc_info=error)
        text = sentence(error) if not isinstance(error, OSError) else str(error)
        print(f"slicediff: {text}", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the whole usage before it."""

    def error(self, message: str):
        self.exit(2, f"slicediff: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line; reconstruction options come from options.py."""
    parser = Parser(prog="slicediff", description="3D MRI reconstruction with a 2D diffusion prior, for Gadgetron, MRD streams and files.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, with tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _demo(commands.add_parser("demo", help="run the whole chain on the shipped example and draw the result"))
    _simulate(commands.add_parser("simulate", help="write a complete ISMRMRD 3D scan of a volume"))
    _recon(commands.add_parser("recon", help="reconstruct a scan file into an image file"))
    _serve(commands.add_parser("serve", help="run the MRD server"))
    _conform(commands.add_parser("conform", help="test a server against everything that goes wrong at a scanner"))
    _send(commands.add_parser("send", help="stream a scan file to a server and write the images"))
    _health(commands.add_parser("health", help="ask a server how it is; exit code 0 if it takes scans"))
    _priors(commands.add_parser("priors", help="list the shipped priors with their model cards"))
    _train(commands.add_parser("train", help="train a prior on magnitude volumes"))
    _bench(commands.add_parser("bench", help="methods side by side (in a checkout)", add_help=False, prefix_chars="\0"))
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("slicediff-demo"), help="folder for the files (default: slicediff-demo)")
    parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    parser.set_defaults(run=run_demo_command)
    _add_options(parser)


def _simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("volume", help="NIfTI or .npy volume, or the word phantom")
    parser.add_argument("scan", type=Path, help="ISMRMRD file to write")
    parser.add_argument("--voxel-mm", type=float, help="voxel size to crop the k-space to (default: the volume's)")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--acceleration", type=float, default=8.0)
    parser.add_argument("--pattern", choices=("poisson", "regular", "full"), default="poisson")
    parser.add_argument("--acs", type=int, default=24, help="calibration lines along each phase-encode axis")
    parser.add_argument("--calibration", choices=("integrated", "separate", "external"), default="integrated", help="calibration lines within the scan, before it, or as a scan of their own")
    parser.add_argument("--snr", type=float, default=30.0, help="tissue brightness over noise of the full scan's image")
    parser.add_argument("--partial-fourier", type=_fractions, default=(1.0, 1.0), metavar="F[,F2]", help="acquired fraction along E1 (and E2)")
    parser.add_argument("--partial-echo", type=float, default=1.0, help="acquired fraction of the readout (asymmetric echo)")
    parser.add_argument("--oversampling", type=float, default=2.0, help="of the readout")
    parser.add_argument("--noise-lines", type=int, default=16)
    parser.add_argument("--oblique", action="store_true", help="tilt the slab about two axes")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--contrasts", type=int, default=1, help="echoes")
    parser.add_argument("--averages", type=int, default=1)
    parser.add_argument("--navigators", type=int, default=0, metavar="N", help="a navigator line at every Nth line (default: none)")
    parser.add_argument("--waveforms", action="store_true", help="a physiological waveform beside the lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help="NIfTI to write the noise-free image to")
    parser.set_defaults(run=run_simulate)


def _fractions(text: str) -> tuple[float, float]:
    first, _, second = text.partition(",")
    try:
        return float(first), float(second or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected one fraction or two with a comma between them, got {text!r}") from None


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _recon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scan", type=Path, help="ISMRMRD file")
    parser.add_argument("images", type=Path, help="HDF5 file to append the images to")
    parser.add_argument("--group", help="HDF5 group of the images (default: date and time)")
    parser.add_argument("--nifti", type=Path, metavar="DIR", help="also write each volume as NIfTI into this folder")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the last volume in three orientations")
    parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    parser.set_defaults(run=run_recon)
    _add_options(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help='address or name to listen on; "::" is every address of IPv6 and IPv4 (default: 127.0.0.1)')
    parser.add_argument("--port", type=_port, default=9002, help="(default: 9002; 0 takes a free one)")
    for name, (unit, what) in SERVE_LIMITS.items():
        default = getattr(Limits, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar=unit, help=f"{what} (default: {default:g})")
    parser.add_argument("--keep-failed", type=Path, metavar="DIR", help="keep the raw data of failed scans here, for `slicediff recon`")
    parser.add_argument("--keep-failed-gib", type=float, default=10.0, metavar="GIB", help="remove the oldest of them beyond this (default: 10)")
    parser.add_argument("--health-port", type=_port, metavar="PORT", help="answer HTTP /healthz and /metrics here (needs prometheus-client)")
    parser.add_argument("--test-faults", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run_serve)
    _add_options(parser)


def _conform(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="test the server there (default: start one of its own)")
    parser.add_argument("--port", type=_port, default=9002)
    parser.add_argument("--case", action="append", metavar="NAME", help="run only this case; may be given again")
    parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    parser.set_defaults(run=run_conform)


def _send(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scan", type=Path, help="ISMRMRD file")
    parser.add_argument("images", type=Path, help="HDF5 file to append the images to")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=9002)
    parser.add_argument("--config", default="default", metavar="NAME|FILE", help="a configuration of the server, or a chain XML to send")
    parser.add_argument("--group", help="HDF5 group of the images (default: date and time)")
    parser.add_argument("--realtime", action="store_true", help="send each line at its time stamp, as the scanner did")
    parser.add_argument("--expect", type=int, metavar="N", help="fail if fewer images come (default: the scan's volumes, in every series)")
    parser.set_defaults(run=run_send)


def _health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=9002)
    parser.set_defaults(run=run_health)


def _priors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the whole cards as JSON")
    parser.set_defaults(run=run_priors)


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("volumes", type=Path, nargs="+", help="NIfTI, .npy, HDF5 or ISMRMRD volumes, magnitude or complex, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write; its .checkpoint is resumed from")
    parser.add_argument("--validate", type=Path, nargs="+", default=[], metavar="VOLUME", help="volumes to measure on; they are not trained on")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of training options; the options below win over it")
    parser.add_argument("--start-from", metavar="NAME|PATH", help="go on from these weights, for example to add a site's own volumes")
    for name in ("architecture", "steps", "batch", "seed", "device"):
        parser.add_argument(f"--{name}")
    parser.set_defaults(run=run_train)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs="*", help="as tests/benchmarks/bench.py --help lists them")
    parser.set_defaults(run=run_bench_command)


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reconstruction options")
    group.add_argument("--preset", metavar="NAME|FILE", help="shipped preset or YAML file of options")
    for name, field in Options.model_fields.items():
        default = "none" if field.default is None else field.default
        group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"{field.description} (default: {default})")


def given_options(arguments: argparse.Namespace) -> dict[str, str]:
    """The reconstruction options that were given on the command line."""
    names = ("preset", *Options.model_fields)
    return {n: v for n in names if (v := getattr(arguments, n, None)) is not None}


def run_demo_command(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    progress = Display()
    with progress:
        result = run_demo(arguments.out, progress.say, given_options(arguments))
    quality = result["psnr"]
    print(f"PSNR in the object: zero-filled {quality['zero_filled']:.2f} dB, CG-SENSE {quality['cg_sense']:.2f} dB, slice diffusion {quality['diffusion']:.2f} dB")
    print(f"{result['seconds']:.0f} s; look at {result['png']}")
    if arguments.json:
        print(json.dumps(result))
    return 0


def run_simulate(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from .protocol import SimulateOptions
    from .simulate import simulate

    options = SimulateOptions(**{f.name: getattr(arguments, f.name) for f in fields(SimulateOptions)})
    print(json.dumps(simulate(arguments.volume, arguments.scan, options, arguments.reference)))
    return 0


def run_recon(arguments: argparse.Namespace) -> int:
    from .files import ImageWriter, ScanFile, write_nifti, write_png
    from .header import parse_header
    from .recon import reconstruct
    from .solve import load_prior_for

    options = make_options(given_options(arguments))
    display, writer = Display(), ImageWriter(arguments.images, arguments.group)
    with ScanFile(arguments.scan) as scan, display:
        prior = load_prior_for(options)
        display.stage("prior", {})
        for image in reconstruct(parse_header(scan.header_xml), scan.acquisitions(), prior, options, display.stage):
            writer.write(image)
    if arguments.nifti:
        arguments.nifti.mkdir(parents=True, exist_ok=True)
        for image in writer.images:
            write_nifti(image, arguments.nifti / f"series{image.image_series_index}_{image.image_index:03d}.nii.gz")
    if arguments.png:
        write_png(writer.images[-1], arguments.png)
    for warning in display.facts.get("warnings", []):
        print(f"slicediff: note: {warning}", file=sys.stderr)
    print(f"{writer.count} images written to {arguments.images}")
    if arguments.json:
        print(json.dumps({**display.facts, "images": writer.count, "seconds": display.seconds, "peak_memory_mib": peak_memory_mib()}))
    return 0


def run_serve(arguments: argparse.Namespace) -> int:
    from .ahead import left_behind
    from .conformance.faults import load_prior_or_fault
    from .health import HealthPage
    from .keep import FailedScans
    from .server import Server
    from .solve import load_prior_for

    logging.getLogger().setLevel(logging.INFO)
    limits = {name: getattr(arguments, name) for name in SERVE_LIMITS}
    load = load_prior_or_fault if arguments.test_faults else load_prior_for
    keep = arguments.keep_failed and FailedScans(arguments.keep_failed, arguments.keep_failed_gib)
    with Server((arguments.host, arguments.port), given_options(arguments), load, keep, **limits) as server:
        server.warm_up()
        if arguments.health_port is not None:
            page = HealthPage((arguments.host, arguments.health_port), server.health)
            print(f"slicediff: health on {arguments.host} port {page.server_address[1]}", flush=True)
        _retire_on_signals(server)
        print(f"slicediff: serving on {arguments.host} port {server.server_address[1]}", flush=True)
        server.serve_forever(poll_interval=0.1)
    if left_behind():  # a solver that hangs would keep the process, or crash it while the interpreter ends
        logging.getLogger("slicediff").error("%d hung solvers are left behind", left_behind())
        logging.shutdown()
        os._exit(0)
    return 0


def _retire_on_signals(server) -> None:
    """SIGTERM and Ctrl-C let the scans end; another Ctrl-C does not."""

    def retire(*_) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=server.retire, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, retire)


def run_conform(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .conformance.suite import conform

    table, results = Table("case", "promised", "happened", "seconds"), []
    with Console(stderr=True).status("") as status:
        for result in conform(arguments.host, arguments.port, arguments.case, status.update):
            table.add_row(result.name, result.promise, f"{result.verdict}: {result.happened}", f"{result.seconds:.1f}")
            results.append(result)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("passed", "failed", "skipped")}
    print(f"{len(results)} cases: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, {sum(r.seconds for r in results):.1f} s")
    if arguments.json:
        print(json.dumps([vars(result) for result in results]))
    return 0 if counts["passed"] and not counts["failed"] else 1


def run_send(arguments: argparse.Namespace) -> int:
    from .client import send_scan
    from .files import ImageWriter, ScanFile

    display, writer = Display(), ImageWriter(arguments.images, arguments.group)
    with ScanFile(arguments.scan) as scan, display:
        total = len(scan)
        sent = lambda count: display.count("sent", count, total)  # noqa: E731
        for image in send_scan(scan, arguments.host, arguments.port, arguments.config, display.say, sent, realtime=arguments.realtime, expect=arguments.expect):
            writer.write(image)
    print(f"{writer.count} images written to {arguments.images}")
    return 0


def run_health(arguments: argparse.Namespace) -> int:
    from .client import ask

    answer = ask(arguments.host, arguments.port, "slicediff::health")
    print(answer)
    return 0 if json.loads(answer)["ready"] else 1


def run_priors(arguments: argparse.Namespace) -> int:
    from recon_core.prior import list_priors

    cards = list_priors()
    if arguments.json:
        print(json.dumps(cards))
        return 0
    for card in cards:
        training = card.get("training", {})
        print(f"{card['name']}: {card['parameters'] / 1e6:.1f} M parameters, voxels {training.get('voxel_mm')} mm, {training.get('steps_done')} steps, sha256 {card['sha256'][:12]}")
    return 0 if cards else 1


def run_train(arguments: argparse.Namespace) -> int:
    from recon_core.train import train

    from .figure import draw_denoising
    from .training import find_volumes, load_volumes, make_train_options

    names = ("start_from", "architecture", "steps", "batch", "seed", "device")
    options = make_train_options(arguments.config, {n: v for n in names if (v := getattr(arguments, n)) is not None})
    held_out = find_volumes(arguments.validate)
    volumes = load_volumes(v for v in find_volumes(arguments.volumes) if v not in held_out)
    picture = arguments.out.with_suffix(".png")
    train(volumes, arguments.out, options, lambda line: print(line, flush=True), load_volumes(held_out), lambda step, images: draw_denoising(images.numpy(), f"step {step}", picture))
    return 0


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def run_bench_command(arguments) -> None:
    """Run tests/benchmarks/bench.py of the checkout that the package or the current folder is."""
    places = [root / "tests" / "benchmarks" / "bench.py" for root in (Path.cwd(), Path(__file__).resolve().parent.parent)]
    program = next((p for p in places if p.is_file()), None)
    if program is None:
        raise FileNotFoundError("the benchmarks are not installed with the package: run `slicediff bench` in a checkout of the project")
    sys.argv = [str(program), *arguments.rest]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
