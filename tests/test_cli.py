"""The commands: what they write, print and return."""

import csv
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import ismrmrd
import numpy as np
import pytest
import torch
from conftest import load_small_scan, run

from gadgets import version
from gadgets.cli import main
from gadgets.demo import EXAMPLE
from gadgets.files import FileError
from gadgets.flags import NOISE_BIT
from gadgets.header import parse_header
from gadgets.image_files import ImageWriter, read_images, save_nifti
from gadgets.scan_files import ScanFile, ScanWriter
from gadgets.simulation.protocol import SimulateOptions
from recon_core.adaptation import AdaptedConfig
from recon_core.prior import Prior
from recon_core.simulate import phantom
from recon_core.train_options import TrainOptions

COMMAND = [sys.executable, "-W", "ignore", "-c", "from gadgets.cli import command; command()"]


def test_simulate_then_recon(tmp_path, capsys):
    scan, images = tmp_path / "scan.h5", tmp_path / "images.h5"
    sampling = "--coils 2 --acceleration 4 --acs 16 --voxel-mm 5 --partial-fourier 0.8 --repetitions 2".split()
    code, out, _ = run(capsys, "simulate", "phantom", scan, *sampling, "--reference", tmp_path / "ref.nii.gz")
    assert code == 0 and json.loads(out)["matrix"] == [32, 40, 32]
    options = ("--sweeps", 2, "--device", "cpu", "--json", "--group", "here")
    files = ("--nifti", tmp_path / "nii", "--png", tmp_path / "x.png")
    code, out, err = run(capsys, "recon", scan, images, *options, *files)
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert facts["images"] == 4 and facts["sweeps"] == 2 and facts["shape"] == [2, 32, 40, 32]
    assert {"gathered", "measured", "preview", "sweeps"} <= set(facts["seconds"]) and facts["peak_memory_mib"] > 10
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert len(list((tmp_path / "nii").iterdir())) == 4
    with h5py.File(images) as file:
        assert sorted(file["here"]) == ["image_1", "image_2"]
        assert file["here/image_2/data"].shape == (2, 1, 32, 40, 32)
        assert set(file["here/image_2"]) == {"data", "header", "attributes"}
    assert [i.repetition for i in read_images(images, "here")] == [0, 1, 0, 1]


def test_recon_tells_what_the_comments_tell(tmp_path, capsys):
    """Of every volume, not only of the last, the same only once; the solver's remarks too."""
    protocol = SimulateOptions(coils=2, pattern="full", noise_lines=16, repetitions=3)
    header, lines, _ = load_small_scan(tmp_path, protocol)
    with ScanWriter(tmp_path / "twice.h5", header.toXML()) as file:
        for number, line in enumerate(lines):
            file.append(line)
            if line.idx.repetition < 2 and number % 10 == 0 and not line.flags & NOISE_BIT:
                file.append(line)
    options = ("--device", "cpu", "--sweeps", 1000, "--deadline-s", 1.5, "--json")
    code, out, err = run(capsys, "recon", tmp_path / "twice.h5", tmp_path / "i.h5", *options)
    comments = [image.meta["ImageComment"] for image in read_images(tmp_path / "i.h5")]
    told = [line.removeprefix("slicediff: note: ") for line in err.splitlines()]
    assert code == 0 and len(comments) == 6 and len(told) == len(set(told))
    assert json.loads(out.splitlines()[-1])["warnings"] == told
    assert {note for comment in comments for note in comment.split("; ")[1:]} == set(told)
    assert sum("lines came more than once" in note for note in told) == 1 and "came more than once" not in comments[5]
    assert any("stopped at the deadline of 1.5 s after" in note for note in told)


def test_a_note_is_told_whole(tmp_path, capsys):
    """And not also in two pieces: a comment joins the notes, and what it joins them with is in none of them."""
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full"))
    with ScanWriter(tmp_path / "hole.h5", header.toXML()) as file:
        for line in lines:
            if (line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2) != (6, 5):  # k = 0
                file.append(line)
    code, _, err = run(capsys, "recon", tmp_path / "hole.h5", tmp_path / "i.h5", "--device", "cpu", "--method", "cg")
    (image,) = read_images(tmp_path / "i.h5")
    told = [line.removeprefix("slicediff: note: ") for line in err.splitlines()]
    assert code == 0 and any("centre of k-space" in note for note in told)
    assert told == image.meta["ImageComment"].split("; ")[1:]


@pytest.mark.parametrize("value", [np.nan, 1e18])
def test_recon_writes_what_there_is_and_names_what_failed(tmp_path, capsys, value):
    """One repetition of three cannot be: the others are in all files, with exit code 1.

    For NaN, or for numbers whose sums of squares overflow in units of the noise.
    """
    import nibabel

    protocol = SimulateOptions(coils=2, pattern="full", noise_lines=16, repetitions=3)
    header, lines, _ = load_small_scan(tmp_path, protocol)
    next(line for line in lines if line.idx.repetition == 1).data[:] = value
    with ScanWriter(tmp_path / "nan.h5", header.toXML()) as file:
        for line in lines:
            file.append(line)
    options = ("--method", "cg", "--output", "float32", "--json")
    files = ("--nifti", tmp_path / "nii", "--png", tmp_path / "x.png")
    code, out, err = run(capsys, "recon", tmp_path / "nan.h5", tmp_path / "i.h5", *options, *files)
    first, last = read_images(tmp_path / "i.h5")
    assert code == 1 and (first.repetition, last.repetition) == (0, 2)
    assert json.loads(out.splitlines()[-1])["images"] == 2
    assert err == (
        "slicediff: volume 2 (repetition 1): the k-space holds NaN, infinity or numbers too large to square; "
        "the scan cannot be reconstructed (2 images were written)\n"
    )
    assert sorted(path.name for path in (tmp_path / "nii").iterdir()) == ["series2_001.nii.gz", "series2_003.nii.gz"]
    assert (tmp_path / "x.png").stat().st_size > 1000
    saved = nibabel.load(tmp_path / "nii" / "series2_003.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj).T, last.data[0])


@pytest.mark.parametrize("layout", ["volume", "partitions"])
def test_images_of_a_nifti_lie_where_the_nifti_lies(tmp_path, capsys, layout):
    import nibabel

    rng = np.random.default_rng(0)
    matrix = np.eye(4)
    matrix[:3, :3] = np.linalg.qr(rng.standard_normal((3, 3)))[0] * [2.0, 2.5, 3.0]
    matrix[:3, 3] = [11, -5, 30]
    volume = np.zeros((20, 24, 18), np.float32)
    volume[4:16, 5:20, 4:14] = 1
    volume[6:8, 12:16, 9:12] = 3
    nibabel.save(nibabel.Nifti1Image(volume, matrix), tmp_path / "in.nii.gz")
    sampling = ("--coils", 1, "--pattern", "full", "--snr", 1000)
    run(capsys, "simulate", tmp_path / "in.nii.gz", tmp_path / "scan.h5", *sampling)
    options = ("--method", "cg", "--layout", layout, "--nifti", tmp_path / "nii")
    code, _, err = run(capsys, "recon", tmp_path / "scan.h5", tmp_path / "i.h5", *options)
    assert code == 0, err
    (path,) = (tmp_path / "nii").iterdir()
    out = nibabel.load(path)
    assert path.name == "series2_001.nii.gz" and out.shape == volume.shape
    for form, code in (out.get_sform(coded=True), out.get_qform(coded=True)):
        np.testing.assert_allclose(form, matrix, atol=1e-4)
        assert code == 1
    assert out.header.get_xyzt_units() == ("mm", "sec")
    assert np.corrcoef(np.asarray(out.dataobj).ravel(), volume.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(
    "other,came",
    [
        (("--output", "float32"), "float32 images of 26 x 35 x 24 came"),
        (("--output", "complex64"), "complex64 images of 26 x 35 x 24 came"),
        (("--layout", "partitions"), "uint16 images of 26 x 35 x 1 came"),
        (("--orientation", "transpose"), "uint16 images of 35 x 26 x 24 came"),
        ((), "uint16 images of 22 x 30 x 20 came"),
    ],
)
def test_a_group_takes_no_images_of_another_kind(
    tmp_path, capsys, monkeypatch, scan_path, other_scan_path, other, came
):
    """Refused before the reconstruction, and the images that stand there stay as they are."""
    images, options = tmp_path / "i.h5", ("--method", "zero-filled", "--group", "g")
    assert run(capsys, "recon", scan_path, images, *options)[0] == 0
    before = images.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("gadgets.recon.reconstruct", lambda *_: pytest.fail("it was reconstructed"))
        code, _, err = run(capsys, "recon", scan_path if other else other_scan_path, images, *options, *other)
    assert code == 1 and images.read_bytes() == before
    said = f"group 'g' of {images} holds uint16 images of 26 x 35 x 24 in series 2, and {came}"
    assert err == f"slicediff: {said}: give another --group or another file\n"
    assert run(capsys, "recon", scan_path, images, *options)[0] == 0
    first, second = read_images(images, "g")
    np.testing.assert_array_equal(first.data, second.data)


def test_an_image_of_another_kind_harms_none(tmp_path):
    """One that cannot join its series, or a group that holds something else, is refused before anything is written.

    Whoever sends the images.
    """

    def make(dtype, shape=(1, 2, 3, 4)):
        return ismrmrd.Image.from_array(np.full(shape, 7, dtype), transpose=False)

    ImageWriter(tmp_path / "i.h5", "g").write(make(np.complex64))
    ImageWriter(tmp_path / "i.h5", "g").write(make(np.complex64))
    with h5py.File(tmp_path / "i.h5", "a") as file:
        file["scan/data"] = 3
        file["odd/image_0/data"] = 3
    before = (tmp_path / "i.h5").read_bytes()
    for group, image, message in (
        ("g", make(np.complex128), "complex64 images of 4 x 3 x 2 in series 0, and complex128"),
        ("g", make(np.complex64, (2, 2, 3, 4)), "4 x 3 x 2 with 2 channels came"),
        ("g", make(np.uint16), "and uint16"),
        ("scan/data", make(np.uint16), "'scan/data' is no group"),
        ("odd", make(np.uint16), "damaged or holds no images"),
    ):
        with pytest.raises(FileError, match=message):
            ImageWriter(tmp_path / "i.h5", group).write(image)
    assert (tmp_path / "i.h5").read_bytes() == before and len(read_images(tmp_path / "i.h5", "g")) == 2


def test_a_disk_that_fills_up_takes_no_earlier_image_with_it(tmp_path, capsys, monkeypatch, scan_path):
    """HDF5 itself would lose them."""
    images, free = tmp_path / "i.h5", [50 << 20, 50 << 20, 1 << 20]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free.pop(0)))
    code, out, err = run(capsys, "recon", scan_path, images, "--method", "tv", "--group", "g")
    assert code == 1 and out == f"1 image written to {images}\n"
    said = f"no room for another image: {images} needs 1.0 MiB more, 1.0 MiB of its disk are free"
    assert f"{said} (1 image was written)" in err
    assert [image.image_series_index for image in read_images(images, "g")] == [1]


def test_a_scan_may_lie_in_another_group(tmp_path, capsys, scan_path):
    scan, images = tmp_path / "s.h5", tmp_path / "i.h5"
    with h5py.File(scan_path) as source, h5py.File(scan, "w") as file:
        source.copy("dataset", file, "first")
        file["empty/note"] = 1
    assert run(capsys, "recon", scan, images, "--method", "cg")[0] == 0
    with h5py.File(scan, "a") as file:
        file.copy("first", "second")
    code, _, err = run(capsys, "recon", scan, images, "--method", "cg")
    assert code == 1 and err == f"slicediff: {scan} holds 2 scans: say which one with --input-group (first, second)\n"
    assert run(capsys, "recon", scan, images, "--method", "cg", "--input-group", "second")[0] == 0
    code, _, err = run(capsys, "recon", scan, images, "--method", "cg", "--input-group", "third")
    assert code == 1
    assert err == f"slicediff: {scan} has no ISMRMRD scan in group 'third' (groups: empty, first, second)\n"


@pytest.mark.parametrize("orientation", ["acquired", "transpose+flip_z"])
def test_partitions_become_the_same_niftis_and_picture_as_volumes(tmp_path, capsys, orientation):
    """One of each repetition, to the bit and in the same place."""
    import nibabel

    sampling = "--coils 1 --pattern full --voxel-mm 8 --oblique --repetitions 2".split()
    run(capsys, "simulate", "phantom", tmp_path / "scan.h5", *sampling)
    for layout, count in (("volume", 4), ("partitions", 80)):
        options = ("--method", "wavelet", "--layout", layout, "--orientation", orientation)
        files = ("--nifti", tmp_path / layout, "--png", tmp_path / f"{layout}.png")
        code, out, err = run(capsys, "recon", tmp_path / "scan.h5", tmp_path / f"{layout}.h5", *options, *files)
        assert code == 0 and out.startswith(f"{count} images written"), err
    for name in (f"series{series}_{number:03d}.nii.gz" for series in (1, 2) for number in (1, 2)):
        whole, joined = (nibabel.load(tmp_path / layout / name) for layout in ("volume", "partitions"))
        np.testing.assert_allclose(joined.affine, whole.affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(joined.dataobj), np.asarray(whole.dataobj))
    assert len(list((tmp_path / "partitions").iterdir())) == 4
    assert (tmp_path / "partitions.png").read_bytes() == (tmp_path / "volume.png").read_bytes()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("recon /nowhere.h5 /tmp/x.h5", "no such scan file"),
        ("recon {scan} {tmp}/x.h5 --prior nonesuch", "no prior 'nonesuch'"),
        ("recon {scan} {tmp}/x.h5 --sweeps lots", "option 'sweeps'"),
        ("recon {scan} {tmp}/x.h5 --method magic", "option 'method'"),
        ("recon {junk} {tmp}/x.h5", "not an HDF5 file"),
        ("simulate /nowhere.nii {tmp}/s.h5", "no such volume"),
        ("simulate phantom {tmp}/s.h5 --acceleration 40", "calibration square alone takes"),
        ("simulate phantom {tmp}/s.h5 --snr 0", "snr cannot be 0"),
        ("simulate phantom {tmp}/s.h5 --oversampling inf", "simulation option oversampling cannot be inf"),
        (
            "simulate phantom {tmp}/s.h5 --oversampling 2000",
            "a readout would have 128000 samples, and a line holds 65535",
        ),
        (
            "simulate phantom {tmp}/s.h5 --reference {tmp}/foo.txt",
            "whose name ends in .nii or .nii.gz: it cannot be written to",
        ),
        ("simulate phantom {tmp}/s.h5 --reference {tmp}/gone/foo.nii", "there is no folder"),
        ("send {scan} {tmp}/x.h5 --port 1", "no server answers"),
        ("send {scan} {tmp}/gone/x.h5 --port 1", "there is no folder"),
        ("recon {scan} {tmp}/gone/x.h5 --method cg", "there is no folder"),
        ("recon {scan} {junk} --method cg", "not an HDF5 file: nothing can be appended"),
        ("serve --host nowhere.invalid --method cg", "the host 'nowhere.invalid' has no address"),
        ("serve --port 0 --method cg --host 192.0.2.1", "cannot listen on 192.0.2.1 port 0: "),
        ("train /nowhere --out {tmp}/m.txt", "a file that ends in .safetensors, got "),
        ("conform --host 127.0.0.1 --port 1", "no server answers at 127.0.0.1 port 1"),
        ("health --host scanner..local", "no server answers at scanner..local port 9002"),
        ("conform --host scanner..local", "no server answers at scanner..local port 9002"),
        ("serve --host scanner..local --method cg", "the host 'scanner..local' has no address"),
    ],
)
def test_failures_are_one_sentence_and_not_zero(tmp_path, capsys, scan_path, arguments, message):
    (tmp_path / "junk.h5").write_bytes(b"junk")
    filled = [a.format(scan=scan_path, tmp=tmp_path, junk=tmp_path / "junk.h5") for a in arguments.split()]
    code, _, err = run(capsys, *filled)
    assert code == 1
    assert message in err and err.strip().count("\n") == 0 and "internal error" not in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("recon {scan} {scan}", "{scan} is the scan itself: its images need a file of their own"),
        ("recon {scan} {link}", "{link} is the scan itself: its images need a file of their own"),
        ("send {scan} {scan} --port 1", "{scan} is the scan itself: its images need a file of their own"),
        (
            "recon {scan} {tmp}/i.h5 --png {tmp}/gone/x.png",
            "{tmp}/gone/x.png cannot be written: there is no folder {tmp}/gone",
        ),
        ("recon {scan} {tmp}/i.h5 --png {tmp}", "{tmp} cannot be written: it is a folder"),
        ("recon {scan} {tmp}/i.h5 --png {tmp}/x.xyz", "{tmp}/x.xyz cannot be drawn: pictures end in .png (or one of "),
        (
            "recon {scan} {tmp}/i.h5 --nifti {tmp}/full",
            "{tmp}/full/series2_002.nii.gz is there from an earlier run, "
            "and its volumes could not be told from this one's: give another folder",
        ),
        ("recon {scan} {tmp}/i.h5 --nifti {link}", "{link} cannot be a folder: {link} is a file"),
        ("recon {scan} {tmp}/i.h5 --nifti {link}/below/it", "{link}/below/it cannot be a folder: {link} is a file"),
    ],
)
def test_places_that_nothing_can_be_written_to_are_told_at_once(
    tmp_path, capsys, monkeypatch, scan_path, arguments, message
):
    monkeypatch.setattr("gadgets.recon.reconstruct", lambda *_: pytest.fail("it was reconstructed"))
    (tmp_path / "link.h5").symlink_to(scan_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "series2_002.nii.gz").touch()
    places = {"scan": scan_path, "tmp": tmp_path, "link": tmp_path / "link.h5"}
    code, _, err = run(capsys, *(a.format(**places) for a in arguments.split()))
    assert code == 1 and err.startswith(f"slicediff: {message.format(**places)}") and err.count("\n") == 1
    assert not (tmp_path / "i.h5").exists() and scan_path.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--port", "70000"),
        ("send", "s.h5", "i.h5", "--port", "-1"),
        ("send", "s.h5", "i.h5", "--expect", "-5"),
        ("simulate", "phantom", "s.h5", "--partial-fourier", "most"),
        ("simulate", "phantom"),
        ("simulate", "phantom", "s.h5", "--coils", "many"),
        ("nonesuch",),
        (),
    ],
)
def test_wrong_command_lines_are_one_sentence(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("slicediff: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments,help_of",
    [
        (("recon", "s.h5", "i.h5", "--swepes", "3"), "slicediff recon"),
        (("health", "there"), "slicediff health"),
        (("--swepes", "health"), "slicediff"),
    ],
)
def test_an_unknown_argument_points_at_the_help_that_lists_the_known(capsys, arguments, help_of):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    unknown = {"recon": "--swepes 3", "health": "there"}.get(arguments[0], "--swepes")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"slicediff: unrecognized arguments: {unknown} (see {help_of} --help)\n"


def test_help_of_simulate_tells_what_a_scan_is_like_by_default(capsys):
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name in ("coils", "acceleration"):
        assert f"{name.upper()} (default: {getattr(SimulateOptions, name):g})" in told
    assert "of their own (default: integrated)" in told


def test_partial_fourier_of_one_or_both_axes(tmp_path, capsys):
    for fractions, limits in (("0.75", (29, 31)), ("0.75,0.8", (29, 25))):
        options = ("--partial-fourier", fractions, "--coils", 1, "--voxel-mm", 5, "--acs", 8)
        code, _, _ = run(capsys, "simulate", *options, "phantom", tmp_path / "s.h5")
        with ScanFile(tmp_path / "s.h5") as scan:
            found = parse_header(scan.header_xml).encoding[0].encodingLimits
        assert code == 0 and (found.kspace_encoding_step_1.maximum, found.kspace_encoding_step_2.maximum) == limits


def test_priors_are_listed(capsys):
    code, out, _ = run(capsys, "priors")
    assert code == 0 and "small" in out
    _, out, _ = run(capsys, "priors", "--json")
    assert json.loads(out)[0]["sha256"]


def test_versions_in_headers_are_stripped(tmp_path):
    header = (
        b'<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        b"<version>8</version><experimentalConditions/></ismrmrdHeader>"
    )
    with h5py.File(tmp_path / "old.h5", "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("xml", (1,), dtype=h5py.special_dtype(vlen=bytes))[0] = header
        group.create_dataset("data", (0,), dtype=ismrmrd.hdf5.acquisition_dtype)
    with ScanFile(tmp_path / "old.h5") as scan:
        assert b"<version>" not in scan.header_xml and b"experimentalConditions" in scan.header_xml
    with ScanWriter(tmp_path / "new.h5", header):
        pass
    with h5py.File(tmp_path / "new.h5") as file:
        assert b"version>" not in file["dataset/xml"][0] and b"experimentalConditions" in file["dataset/xml"][0]


def test_a_server_that_is_in_the_way_is_a_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port), "--method", "cg"]) == 1
    assert capsys.readouterr().err == f"slicediff: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_serve_and_send_as_processes(tmp_path, capsys, scan_path):
    """It prints its port, serves, refuses no second scan, and ends on Ctrl-C (as on SIGTERM) with exit code 0."""
    serve = [*COMMAND, "serve", "--port", "0", "--sweeps", "2", "--device", "cpu"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            port = server.stdout.readline().split()[-1]
            for name in ("first", "second"):
                code, out, err = run(capsys, "send", scan_path, tmp_path / f"{name}.h5", "--port", port)
                assert code == 0 and "2 images written" in out, err
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
        finally:
            server.kill()
    first, second = (read_images(tmp_path / f"{name}.h5")[1].data for name in ("first", "second"))
    assert np.array_equal(first, second)


def test_a_server_that_lost_its_gpu_answers_and_ends_with_another_exit_code(tmp_path, capsys, scan_path):
    """So that whoever watches over it starts another."""
    serve = [*COMMAND, "serve", "--port", "0", "--sweeps", "2", "--device", "cpu", "--test-faults", "--grace-s", "5"]
    shipped = (Path(__file__).parents[1] / "config_xml" / "slicediff_connect.xml").read_text()
    (chain := tmp_path / "chain.xml").write_text(re.sub(r'(name="prior" value=)"[^"]*"', r'\1"test-gpu-lost"', shipped))
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            port = server.stdout.readline().split()[-1]
            code, out, err = run(capsys, "send", scan_path, tmp_path / "first.h5", "--port", port, "--config", chain)
            assert code == 1 and "an illegal memory access" in err and len(read_images(tmp_path / "first.h5")) == 1, err
            assert server.wait(20) == 1
            assert "the GPU is lost to this process, which therefore exits" in server.stderr.read()
        finally:
            server.kill()


def test_a_name_that_the_terminal_cannot_show_costs_no_file(tmp_path, scan_path):
    recon = [*COMMAND, "recon", scan_path, tmp_path / "für.h5", "--method", "cg", "--nifti", tmp_path / "nii"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    ended = subprocess.run(recon, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0 and ended.stdout == f"1 image written to {tmp_path}/f\\xfcr.h5\n", ended.stderr
    assert len(list((tmp_path / "nii").iterdir())) == 1


def test_runs_of_the_same_second_have_groups_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "2026-01-01 00:00:00")
    for number in (1, 2, 3):
        image = ismrmrd.Image.from_array(np.full((4, 4, 4), number, np.float32), transpose=False)
        image.image_series_index = 1
        ImageWriter(tmp_path / "i.h5").write(image)
        assert float(read_images(tmp_path / "i.h5")[0].data.max()) == number
    with h5py.File(tmp_path / "i.h5") as file:
        assert list(file) == ["2026-01-01 00:00:00", "2026-01-01 00:00:00 (2)", "2026-01-01 00:00:00 (3)"]


def test_train_from_a_folder_with_a_config(tmp_path, capsys):
    folder = tmp_path / "volumes"
    folder.mkdir()
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", (phantom((40, 44, 36)).numpy() * 100).astype(np.uint8))
    (tmp_path / "c.yaml").write_text("crop: 16\nbatch: 2\nsteps: 50\n")
    options = ("--config", tmp_path / "c.yaml", "--device", "cpu")
    arguments = ("train", folder, "--validate", folder / "b.npy", "--out", tmp_path / "p.safetensors", *options)
    code, out, err = run(capsys, *arguments, "--steps", 2)
    assert code == 0 and "held out" in out, err
    assert (tmp_path / "p.png").stat().st_size > 1000
    training = json.loads((tmp_path / "p.json").read_text())["training"]
    assert (training["steps_done"], training["crop"], training["volumes"]) == (2, 16, ["a.npy"])
    for text, message in (
        ("steps: many", "option 'steps'"),
        ("stepps: 3", "unknown option 'stepps'"),
        ("- 3", "must be a mapping"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        code, _, err = run(capsys, *arguments)
        assert code == 1 and message in err and err.count("\n") == 1


TWO_NUMBERS = "expected two numbers above 0, the lower one first"


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("--voxel-mm", "4", "3"), f"option 'voxel_mm': {TWO_NUMBERS}, got ['4', '3']"),
        (("--sigma-range", "0", "2"), f"option 'sigma_range': {TWO_NUMBERS}, got ['0', '2']"),
        (
            ("--validate", "{folder}"),
            "nothing is left to learn from: --validate holds out every volume given; "
            "give more volumes, or hold out fewer",
        ),
    ],
)
def test_training_that_cannot_begin_is_a_sentence(tmp_path, capsys, arguments, said):
    folder, out = tmp_path / "volumes", tmp_path / "p.safetensors"
    folder.mkdir()
    np.save(folder / "a.npy", phantom((40, 44, 36)).numpy())
    arguments = [a.format(folder=folder) for a in arguments]
    code, _, err = run(capsys, "train", folder, "--out", out, "--steps", 1, *arguments)
    assert code == 1 and err == f"slicediff: {said}\n" and not out.exists()


@pytest.mark.parametrize(
    "method,key,names",
    [
        ("diffusion", "diffusion", ["zero-filled", "CG-SENSE", "slice diffusion"]),
        ("tv", "tv", ["zero-filled", "CG-SENSE", "total variation"]),
        ("cg", "cg_sense", ["zero-filled", "CG-SENSE"]),
        ("zero-filled", "zero_filled", ["zero-filled"]),
    ],
)
def test_the_demo_of_each_kind_of_method(tmp_path, capsys, monkeypatch, method, key, names):
    """Its images under their own names, whatever form of them a preset asks for.

    Pixels in another order would be below 25 dB.
    """
    shown, preset = [], tmp_path / "p.yaml"
    monkeypatch.setattr("gadgets.demo.draw_comparison", lambda volumes, *_: shown.extend(volumes))
    monkeypatch.setattr("gadgets.demo.EXAMPLE", tmp_path / "small.npy")
    np.save(tmp_path / "small.npy", phantom((72, 72, 20)).numpy())
    preset.write_text("layout: partitions\norientation: flip_z\nerror_map: true\npreview: false\nsweeps: 2\n")
    options = ("--preset", preset, "--device", "cpu", "--out", tmp_path / "d", "--json")
    code, out, err = run(capsys, "demo", "--method", method, *options)
    assert code == 0, err
    line, _, facts = out.splitlines()
    quality = json.loads(facts)["psnr"]
    assert list(quality) == list(dict.fromkeys(["zero_filled", "cg_sense", key]))[: len(names)]
    assert shown == [*names, "reference"]
    told = ", ".join(f"{name} {value:.2f} dB" for name, value in zip(names, quality.values()))
    assert line == f"PSNR in the object: {told}"
    assert min(quality.values()) > 30 and (tmp_path / "d" / f"{key}.nii.gz").is_file()
    found = {path.name for path in (tmp_path / "d").glob("*.nii.gz")}
    assert not found - {f"{key}.nii.gz", "reference.nii.gz"}


def test_the_demo_offers_only_what_it_can_compare(capsys):
    for option in ("--preview", "--layout", "--orientation", "--error-map", "--output"):
        with pytest.raises(SystemExit) as stop:
            main(["demo", option, "x"])
        assert stop.value.code == 2 and f"unrecognized arguments: {option} x" in capsys.readouterr().err


@pytest.fixture
def bench(monkeypatch):
    """`slicediff bench` with small scans, run from the checkout."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = ("--accelerations", "2", "--acs", "8", "--coils", "4")
    return lambda *arguments: main(["bench", *small, *map(str, arguments)])


def bench_rows(out):
    with (out / "bench.csv").open() as file:
        return list(csv.DictReader(file))


def test_bench_puts_methods_side_by_side(tmp_path, bench):
    """The program of the checkout, run by the command; CG-SENSE must beat zero filling on its table."""
    out = tmp_path / "bench"
    for methods in (("zero-filled", "cg"), ("cg",)):  # the second run keeps what the first measured besides
        assert bench(EXAMPLE, "--voxel-mm", "7", "--methods", *methods, "--out", out) == 0
    rows = bench_rows(out)
    quality = {row["method"]: float(row["psnr"]) for row in rows}
    assert len(rows) == 2 and {row["voxel_mm"] for row in rows} == {"7.0"}
    assert quality["cg"] > quality["zero-filled"] + 0.5
    assert len(list(out.glob("*.png"))) == 1


@pytest.mark.parametrize("own,labels", [((6, 6, 6), ["6.0", "8.0"]), ((3, 3, 6), ["3.78", "4.58", "8.0"])])
def test_bench_labels_scans_with_the_voxels_they_have(tmp_path, bench, capsys, own, labels):
    """Volumes of 192 mm a side, in voxels of `own` (x y z): no scan is measured twice, none has a size it has not."""
    save_nifti(phantom(tuple(192 // mm for mm in reversed(own))).numpy(), np.diag([*own, 1.0]), tmp_path / "coarse.nii")
    bench(tmp_path / "coarse.nii", "--voxel-mm", 3, 4, 8, "--methods", "zero-filled", "--out", tmp_path / "out")
    assert [row["voxel_mm"] for row in bench_rows(tmp_path / "out")] == labels
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == [f"coarse_{label}_2.0" for label in labels]
    notes = capsys.readouterr().err.splitlines()
    size = f"{own[0]} x {own[1]} x {own[2]} mm"
    assert notes[0] == f"slicediff: note: coarse.nii has no voxels as small as 3 mm: the scan at R = 2 has {size}"
    assert notes[1].startswith("slicediff: note: coarse.nii has no voxels as small as 4 mm: the scan at R = 2 has ")
    again = "slicediff: note: coarse.nii at 4 mm and R = 2 is a scan that was reconstructed already: it is left out"
    assert notes[2:] == [again] * (own[0] == 6)


@pytest.mark.parametrize(
    "program,asked",
    [
        ("robustness", "--coils 1 --snr 20 --accelerations 2 --voxel-mm 3 --weights 0.7 --name table"),
        ("cg_strength", ""),
    ],
)
def test_tables_of_other_programs_are_labelled_alike_and_go_on(tmp_path, monkeypatch, program, asked):
    """Voxels of 6 mm where 3 were asked for: the row says so, and a second run measures nothing again."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    module = importlib.import_module(program)
    monkeypatch.setattr("scans.RESULTS", tmp_path)
    save_nifti(phantom((32, 32, 24)).numpy(), np.diag([6.0, 6.0, 6.0, 1.0]), tmp_path / "coarse.nii")
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path / "coarse.nii"), *asked.split()])
    if program == "cg_strength":
        monkeypatch.setattr(module, "PROTOCOLS", [(3.0, 4, [(1, 2, 20, 8)])])
    module.main()
    (table,) = tmp_path.glob("*.csv")
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert row["voxel_mm"] == "6.0"
    monkeypatch.setattr(module, "cg_sense", lambda *_, **__: pytest.fail("it was measured again"))
    module.main()


def test_the_chain_is_timed_stage_by_stage(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    module, rows = importlib.import_module("chain_speed"), []
    monkeypatch.setattr(module, "SLICE", 32)
    method = replace(module.METHODS["diffusion"], config=AdaptedConfig(sweeps=2))
    scan, machine = module.Scan((20, 40, 36), 2, 2.0), module.Machine("cpu", "CPU", 1e9, 1e9, 1e9)
    module.run(scan, machine, [("diffusion", method, Prior("small").eval())], rows.append)
    assert [row["stage"] for row in rows] == ["gather", "coil maps", "preview", "diffusion"]
    assert rows[3]["evaluations"] >= 2 * 20 and all(0 < row["floor_s"] for row in rows[1:])


def test_the_receptive_field_of_a_volume_whose_sides_differ(monkeypatch):
    """The untrained prior scales each pixel by itself, so it looks at that pixel alone; rings of all axes add up."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    module, random = importlib.import_module("receptive_field"), torch.Generator().manual_seed(0)
    prior, volume = Prior("small").eval(), torch.ones(12, 20, 16, dtype=torch.complex64)
    rings = sum(module.ring_energy(prior, volume, 0.5, axis, random) for axis in range(3))
    assert rings[0] == pytest.approx(3 * (0.25 / (0.25 + 0.25)) ** 2) and not rings[1:].any()


@pytest.mark.parametrize(
    "change,said",
    [
        ("diffusion.sweep=3", "diffusion has no setting 'sweep'; known are sweeps, sigma_max, "),
        ("nope.sweeps=3", "there is no method 'nope'; known are diffusion, faithful, "),
        ("diffusion.sweeps=abc", "sweeps must be a whole number, got 'abc'"),
        ("diffusion.sigma_max", "sigma_max must be a number, got ''"),
        ("faithful.betas=1", "faithful has no setting 'betas'; known are iterations, "),
        ("cg.strength=1", "cg has no setting 'strength'; it has none"),
    ],
)
def test_bench_names_a_setting_that_cannot_be(tmp_path, bench, capsys, change, said):
    with pytest.raises(SystemExit) as stop:
        bench(EXAMPLE, "--set", change, "--methods", "cg", "--out", tmp_path / "out")
    assert stop.value.code == 2 and f"error: --set {change}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bench_reads_true_and_false(bench, monkeypatch):
    """As words, of which Python would take both for true."""
    monkeypatch.syspath_prepend("tests/benchmarks")
    program = __import__("bench")
    config = make_dataclass("Config", [("fast", bool, True), ("rounds", int, 3)], frozen=True)()
    monkeypatch.setitem(program.METHODS, "tv", replace(program.METHODS["tv"], config=config))
    assert program.configured(["tv.fast=false"])["tv"].fast is False
    assert program.configured(["tv.rounds=5", "tv.fast=true"])["tv"] == replace(config, rounds=5)
    with pytest.raises(ValueError, match="fast must be true or false, got 'no'"):
        program.configured(["tv.fast=no"])


def test_bench_without_any_scan_fails(tmp_path, bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(EXAMPLE, "--voxel-mm", 7, "--accelerations", 40, "--methods", "cg", "--out", tmp_path / "out")
    assert stop.value.code == 1 and capsys.readouterr().err.endswith("slicediff bench: no scan could be made\n")


def test_the_module_is_the_command():
    """torchrun starts `-m gadgets.cli`."""
    command = [sys.executable, "-W", "ignore", "-m", "gadgets.cli", "priors"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("base:")


def test_simulate_looks_at_the_place_of_the_scan_first(tmp_path, capsys, monkeypatch):
    """Only HDF5 files are replaced."""
    monkeypatch.setattr("gadgets.simulation.scan.load_object", lambda _: pytest.fail("it was simulated"))
    (tmp_path / "thesis.txt").write_text("years of work")
    for name, said in (
        ("thesis.txt", "exists and is not an HDF5 file: it is not replaced"),
        ("", "cannot be written: it is a folder"),
        ("gone/s.h5", f"cannot be written: there is no folder {tmp_path / 'gone'}"),
    ):
        code, _, err = run(capsys, "simulate", "phantom", tmp_path / name)
        assert code == 1 and err == f"slicediff: {tmp_path / name} {said}\n"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_simulate_replaces_a_scan_unless_it_is_in_use(tmp_path, capsys):
    """HDF5 itself empties the file before it looks. What has lost its end, or all of it, is replaced as well."""
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["old"] = np.arange(1000)
    before = path.read_bytes()
    tiny = ("simulate", "phantom", path, "--coils", 1, "--voxel-mm", 8, "--pattern", "full")
    opens = "import h5py, sys; file = h5py.File(sys.argv[1], 'r'); print('open', flush=True); sys.stdin.read()"
    reading = [sys.executable, "-c", opens, str(path)]
    with subprocess.Popen(reading, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, _, err = run(capsys, *tiny)
        other.stdin.close()
    said = f"{path} is in use by another program: wait until it has closed it, or write to another file"
    assert code == 1 and err == f"slicediff: {said}\n"
    assert path.read_bytes() == before
    for old in (before, before[:3000], b""):
        path.write_bytes(old)
        assert run(capsys, *tiny)[0] == 0
        with h5py.File(path) as file:
            assert list(file) == ["dataset"]


def test_simulate_never_writes_over_what_it_reads_or_wrote(tmp_path, capsys):
    npy, nii = tmp_path / "v.npy", tmp_path / "v.nii"
    np.save(npy, np.ones((8, 8, 8), np.float32))
    before = npy.read_bytes()
    for arguments, said in (
        ((npy, npy), "volume and scan are the same file"),
        ((nii, tmp_path / "s.h5", "--reference", nii), "volume and reference are the same file"),
        (("phantom", nii, "--reference", tmp_path / "x" / ".." / "v.nii"), "scan and reference are the same file"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        code, _, err = run(capsys, "simulate", *arguments)
        assert code == 1 and said in err and npy.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.npy", "x"]


def test_voxels_that_a_volume_does_not_have_are_told(tmp_path, capsys):
    code, _, err = run(capsys, "simulate", "phantom", tmp_path / "s.h5", "--coils", 1, "--voxel-mm", 1, "--acs", 8)
    assert code == 0 and "has no voxels as small as 1 mm: the scan has 2.5 x 2.5 x 2.5 mm" in err


def test_the_version_and_what_training_can_be_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"slicediff {version()}\n"
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, field in TrainOptions.model_fields.items():
        assert f"--{name.replace('_', '-')} " in told and " ".join(field.description.split()[:4]) in told, name


def test_conform_with_a_port_alone_tests_the_server_there(capsys):
    code, _, err = run(capsys, "conform", "--port", 1, "--case", "no-line")
    assert code == 1 and "127.0.0.1 port 1" in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_costs_no_file(tmp_path, scan_path, unbuffered):
    recon = [*COMMAND, "recon", scan_path, tmp_path / "images.h5", "--method", "cg"]
    copies = ["--nifti", tmp_path / "nii", "--png", tmp_path / "x.png"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*recon, *copies], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].endswith("No space left on device"), ended.stderr
    assert ended.stderr.count("\n") == 1 and len(read_images(tmp_path / "images.h5")) == 1
    assert len(list((tmp_path / "nii").iterdir())) == 1 and (tmp_path / "x.png").stat().st_size > 1000


def test_a_server_whose_output_cannot_be_written_serves():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    serve = [*COMMAND, "serve", "--port", port, "--method", "cg"]
    with open("/dev/full", "w") as full, subprocess.Popen(serve, stdout=full, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + 60
            while main(["health", "--port", port]) and time.monotonic() < end and server.poll() is None:
                time.sleep(0.2)
            assert server.poll() is None and main(["health", "--port", port]) == 0
        finally:
            server.kill()


LEAVES_A_SOLVER = """
import socket, torch
from types import SimpleNamespace
from gadgets import cli, external
from recon_core.ahead import Ahead

def computes():
    weight = torch.nn.Conv2d(16, 16, 3).weight
    while True:
        torch.conv2d(torch.randn(4, 16, 256, 256), weight)
    yield

def solver_at_its_deadline(*_):
    Ahead(computes()).close(0.5)
    return 3

def interrupted(*_):
    Ahead(computes())  # a second Ctrl-C kept it from being closed
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize(
    "end,code",
    [
        ("cli.main = solver_at_its_deadline; cli.command()", 3),
        ("cli.main = solver_at_its_deadline; cli.sys.stdout = None; cli.command()", 3),
        (
            "cli.main = lambda: (solver_at_its_deadline(), print('lost'))[0]; "
            "cli.sys.stdout = open('/dev/full', 'w'); cli.command()",
            3,
        ),
        ("cli.Parser.parse_args = lambda *_: SimpleNamespace(verbose=False, run=interrupted); cli.command()", 130),
        (
            "external.answer_gadgetron = solver_at_its_deadline; external.slice_diffusion(SimpleNamespace("
            "socket=SimpleNamespace(socket=socket.socketpair()[0]), "
            "raw_bytes=SimpleNamespace(config=b'', header=b'')))",
            0,
        ),
    ],
)
def test_a_solver_that_still_computes_does_not_crash_the_end_of_its_process(end, code):
    """Torch would abort it: exit code 134 after all images were written."""
    command = [sys.executable, "-W", "ignore", "-c", LEAVES_A_SOLVER + end]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and "Aborted" not in ended.stderr and "terminate" not in ended.stderr, ended.stderr
