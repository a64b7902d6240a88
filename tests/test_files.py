"""Scan and image files as other programs write, damage and lock them."""

import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import load_small_scan, run
from test_images import HEADER, gathered_volume, point
from test_mouths import running

from gadgets.client import SendError, send_scan
from gadgets.files import FileError
from gadgets.image_files import join_partitions, read_images
from gadgets.images import make_images
from gadgets.options import make_options
from gadgets.scan_files import ScanFile, ScanWriter
from gadgets.simulation.protocol import SimulateOptions


def rewritten(scan, path, change):
    """The scan file with its table of acquisitions passed through `change`."""
    with h5py.File(scan) as old, h5py.File(path, "w") as new:
        new["study/one/xml"] = old["dataset/xml"][()]
        rows = change(old["dataset/data"][()])
        new.create_dataset("study/one/data", data=rows, dtype=rows.dtype)


def laid_out(rows, align=False, order=1, samples="<f4"):
    """The same fields aligned, in another order, or with big-endian samples."""

    def other(dtype):
        if dtype.subdtype:
            return np.dtype((other(dtype.base), dtype.shape))
        if not dtype.names:
            return dtype
        return np.dtype([(name, other(dtype[name])) for name in dtype.names[::order]], align=align)

    def moved(old, new):
        for name in old.dtype.names:
            if old.dtype[name].names:
                moved(old[name], new[name])
            else:
                new[name] = old[name]

    head = np.zeros(rows.shape, other(rows.dtype["head"]))
    moved(rows["head"], head)
    vlen = h5py.vlen_dtype(np.dtype(samples))
    out = np.empty(rows.shape, [("head", head.dtype), ("traj", vlen), ("data", vlen)])
    for name, values in (("head", head), ("traj", rows["traj"]), ("data", rows["data"])):
        out[name] = values
    return out


@pytest.mark.parametrize("layout", [dict(align=True), dict(order=-1)], ids=["aligned", "in another order"])
def test_scans_of_other_programs_may_be_laid_out_in_another_way(tmp_path, scan_path, layout):
    """As HDF5 allows: the C library finds fields by their names. The group lies within another."""
    rewritten(scan_path, tmp_path / "s.h5", lambda rows: laid_out(rows, **layout))
    with ScanFile(scan_path) as scan, ScanFile(tmp_path / "s.h5", "/study/one/") as other:
        pairs = list(zip(scan.acquisitions(), other.acquisitions(), strict=True))
        assert all(bytes(a.getHead()) == bytes(b.getHead()) and np.array_equal(a.data, b.data) for a, b in pairs)


def test_tables_of_one_column_and_headers_that_stand_alone_are_read(tmp_path, scan_path):
    rewritten(scan_path, tmp_path / "s.h5", lambda rows: rows[:, None])
    with h5py.File(tmp_path / "s.h5", "a") as file:
        text = file["study/one/xml"][0]
        del file["study/one/xml"]
        file["study/one/xml"] = text
    with ScanFile(scan_path) as scan, ScanFile(tmp_path / "s.h5", "study/one") as other:
        assert other.header_xml == scan.header_xml
        found, expected = ([bytes(line.getHead()) for line in each.acquisitions()] for each in (other, scan))
        assert found == expected


def test_samples_that_cannot_be_read_are_not_read_wrongly(tmp_path, scan_path, capsys):
    rewritten(scan_path, tmp_path / "s.h5", lambda rows: laid_out(rows, samples=">f4"))
    options = ("--method", "cg", "--input-group", "study/one")
    code, _, err = run(capsys, "recon", tmp_path / "s.h5", tmp_path / "i.h5", *options)
    assert code == 1 and "are stored as >f4, expected float32" in err


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("data", np.ones((4, 3)), "is no table of acquisitions"),
        ("data", None, "is no table of acquisitions"),
        ("xml", np.array([], "S1"), "holds no header"),
    ],
)
def test_groups_that_are_no_scan_after_all_are_a_sentence(tmp_path, scan_path, capsys, name, content, said):
    shutil.copy(scan_path, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        del file[f"dataset/{name}"]
        if content is None:
            file.create_group(f"dataset/{name}")
        else:
            file[f"dataset/{name}"] = content
    code, _, err = run(capsys, "recon", tmp_path / "s.h5", tmp_path / "i.h5", "--method", "cg")
    assert code == 1 and said in err and "internal error" not in err


def test_what_a_cartesian_scan_can_do_without_is_not_missed(tmp_path, scan_path):
    """A trajectory that is announced and left out, waveforms that are no table; the header may be a table of one."""
    shutil.copy(scan_path, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        row = file["dataset/data"][3]
        row["head"]["trajectory_dimensions"] = 2
        file["dataset/data"][3] = row
        text = file["dataset/xml"][0]
        del file["dataset/xml"]
        file["dataset"].create_dataset("xml", (1, 1), dtype=h5py.special_dtype(vlen=bytes))[0, 0] = text
        file.create_group("dataset/waveforms")
    with ScanFile(scan_path) as scan, ScanFile(tmp_path / "s.h5") as other:
        assert other.header_xml == scan.header_xml
        assert all(
            np.array_equal(a.data, b.data) for a, b in zip(other.acquisitions(), scan.acquisitions(), strict=True)
        )
        with pytest.raises(FileError, match="the waveforms of the scan file are damaged and were left out"):
            list(other.waveforms())


def test_a_scan_that_cannot_be_written_to_its_end_leaves_no_open_file(tmp_path, monkeypatch):
    writer = ScanWriter(tmp_path / "s.h5", "<ismrmrdHeader/>")
    monkeypatch.setattr(writer, "_flush", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"), writer:
        pass
    assert not writer.file


def test_a_bad_row_costs_its_line_and_is_told_after_the_images(tmp_path, capsys):
    """Through recon, and by the client, who does not blame the server."""
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=16, contrasts=2))
    with ScanWriter(tmp_path / "s.h5", header.toXML()) as file:
        for line in lines:
            file.append(line)
    with h5py.File(tmp_path / "s.h5", "a") as file:
        row = file["dataset/data"][30]
        row["head"]["number_of_samples"] = 77
        file["dataset/data"][30] = row
    options = ("--method", "tv", "--preview", "false", "--group", "g")
    code, out, err = run(capsys, "recon", tmp_path / "s.h5", tmp_path / "i.h5", *options)
    assert code == 1 and out.startswith("2 images written") and len(read_images(tmp_path / "i.h5", "g")) == 2
    said = "acquisition 30 announces 2 x 77 samples but holds 48; 1 line of the file was left out"
    assert f"{said} (2 images were written)" in err
    sent = re.escape(f"the scan could not be sent completely: {said} (2 images were received)")
    with running({"method": "tv", "preview": False}, lambda options: None) as server:
        with ScanFile(tmp_path / "s.h5") as scan, pytest.raises(SendError, match=sent):
            list(send_scan(scan, *server.server_address[:2], "default"))


def test_a_file_without_a_readable_row_is_told_as_such(tmp_path, capsys, scan_path):
    def spoil(rows):
        rows["head"]["number_of_samples"] = 77
        return rows

    rewritten(scan_path, tmp_path / "s.h5", spoil)
    options = ("--method", "cg", "--input-group", "study/one")
    code, out, err = run(capsys, "recon", tmp_path / "s.h5", tmp_path / "i.h5", *options)
    assert code == 1 and not out and err.startswith("slicediff: acquisition 0 announces 4 x 77 samples")


def test_damaged_waveforms_cost_no_line(tmp_path):
    protocol = SimulateOptions(coils=1, pattern="full", noise_lines=0, waveforms=True)
    header, lines, _ = load_small_scan(tmp_path, protocol)
    with ScanFile(next(tmp_path.glob("*.h5"))) as scan:
        waveforms = list(scan.waveforms())
    with ScanWriter(tmp_path / "new.h5", header.toXML()) as file:
        for item in (*lines, *waveforms):
            file.append(item)
    with h5py.File(tmp_path / "new.h5", "a") as file:
        row = file["dataset/waveforms"][1]
        row["head"]["number_of_samples"] = 7777
        file["dataset/waveforms"][1] = row
    got = []
    with ScanFile(tmp_path / "new.h5") as scan, pytest.raises(FileError, match=f"1 of {len(waveforms)} were left out"):
        for item in scan.items():
            got.append(item)
    assert len(waveforms) > 2 and len(got) == len(lines) + len(waveforms) - 1


def test_a_file_that_another_program_writes_to_is_no_damaged_file(tmp_path, capsys, scan_path):
    shutil.copy(scan_path, tmp_path / "s.h5")
    write = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    writing = [sys.executable, "-c", write, str(tmp_path / "s.h5")]
    with subprocess.Popen(writing, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, _, err = run(capsys, "recon", tmp_path / "s.h5", tmp_path / "i.h5", "--method", "cg")
        other.stdin.close()
    assert code == 1 and "s.h5 is in use by another program" in err


@pytest.mark.parametrize("lost", [("xml",), ("data",), ("xml", "data")])
def test_what_a_group_lacks_to_be_a_scan_is_told(tmp_path, scan_path, lost):
    shutil.copy(scan_path, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        for name in lost:
            del file[f"dataset/{name}"]
    lacks = f"it lacks {' and '.join(lost)}"
    for group in (None, "dataset", "/dataset/"):
        said = f"the group '{group or 'dataset'}' of {tmp_path / 's.h5'} is no ISMRMRD scan: {lacks}$"
        with pytest.raises(FileError, match=said):
            ScanFile(tmp_path / "s.h5", group)
    with h5py.File(tmp_path / "s.h5", "a") as file, h5py.File(scan_path) as whole:
        whole.copy("dataset", file, "other")
    with pytest.raises(FileError, match=rf"{lacks} \(groups with scans: other\)$"):
        ScanFile(tmp_path / "s.h5", "dataset")


@pytest.mark.parametrize("signature", [b"SNOD", b"TREE", b"HEAP"])
def test_damage_within_a_file_is_told_as_such(tmp_path, scan_path, capsys, signature):
    """Of the scan, of a file that images should be appended to, and of one to learn from."""
    bad = tmp_path / "bad.h5"
    bad.write_bytes(scan_path.read_bytes().replace(signature, b"XXXX"))
    for scan, images in ((bad, tmp_path / "i.h5"), (scan_path, bad)):
        code, out, err = run(capsys, "recon", scan, images, "--method", "cg")
        assert code == 1 and not out and err.startswith(f"slicediff: {bad} is damaged: ") and err.count("\n") == 1
    code, _, err = run(capsys, "train", bad, "--out", tmp_path / "p.safetensors")
    assert code == 1 and err.startswith(f"slicediff: {bad} cannot be read as a volume: ")


def test_truncated_and_forbidden_files_are_told_as_such(tmp_path, scan_path, monkeypatch):
    content = scan_path.read_bytes()
    (tmp_path / "s.h5").write_bytes(content[:5000])
    with pytest.raises(FileError) as error:
        ScanFile(tmp_path / "s.h5")
    said = f"{tmp_path / 's.h5'} is truncated (5000 of {len(content)} bytes)"
    assert str(error.value) == f"{said}: its end was not copied or never written"

    def forbidden(*_):
        raise PermissionError(13, "Unable to synchronously open file")

    monkeypatch.setattr("gadgets.files.h5py.File", forbidden)  # root may read every file
    with pytest.raises(FileError) as error:
        ScanFile(tmp_path / "s.h5")
    assert str(error.value) == f"{tmp_path / 's.h5'} cannot be read: permission denied"


def test_a_scan_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(FileError, match=r"s\.h5 cannot be written: No such file or directory$"):
        ScanWriter(tmp_path / "gone" / "s.h5", b"<ismrmrdHeader/>")


def test_partitions_find_their_volume_beyond_the_numbers_that_a_header_holds():
    """image_index is of 16 bits: volume 8192 of 8 partitions would come back as the first one."""
    volume, scan, options = point((8, 10, 12), (1, 1, 1)), gathered_volume(), make_options({"layout": "partitions"})
    parts = []
    for number in (0, 8191, 8192):
        parts += make_images(volume, scan, options, HEADER, 2, number, "name", [])
    assert {image.image_index for image in parts[:8]} & {image.image_index for image in parts[16:]}
    assert [image.data.shape[1] for image in join_partitions(parts)] == [8] * 3
