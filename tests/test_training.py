"""Files to train on: every kind gives the same volume, wrong ones a sentence."""

import h5py
import nibabel
import numpy as np
import pytest
from conftest import load_small_scan, small_object

from gadgets.cli import main
from gadgets.files import FileError
from gadgets.image_files import read_images
from gadgets.scan_files import ScanWriter
from gadgets.simulation.protocol import SimulateOptions
from gadgets.simulation.scan import load_object
from gadgets.training import find_volumes, load_volumes


def test_every_kind_of_file_gives_the_volume(tmp_path):
    volume = small_object()
    nibabel.save(nibabel.Nifti1Image(volume.T, np.diag([2.0, 2.5, 3.0, 1.0])), tmp_path / "a.nii.gz")
    np.save(tmp_path / "b.npy", volume)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["some/where"] = volume
        file["some/where"].attrs["voxel_mm"] = (3.0, 2.5, 2.0)
    options = "--coils 3 --pattern full --snr 1000".split()
    assert main(["simulate", str(tmp_path / "a.nii.gz"), str(tmp_path / "d.h5"), *options]) == 0
    assert main(["recon", str(tmp_path / "d.h5"), str(tmp_path / "e.h5"), "--method", "cg"]) == 0
    found = load_volumes([tmp_path])
    assert [v.name for v in found] == ["a.nii.gz", "b.npy", "c.h5", "d.h5", "e.h5"]
    told, untold = pytest.approx([3, 2.5, 2]), pytest.approx([1, 1, 1])
    assert [v.voxel_mm for v in found] == [told, untold, told, told, told]
    assert np.iscomplexobj(found[3].data) and found[4].data.dtype == np.uint16
    for other in found:
        assert other.data.shape == volume.shape
        assert np.corrcoef(np.abs(other.data).ravel(), volume.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("unit,mm", [("meter", 1000), ("mm", 1), ("micron", 0.001), ("unknown", 1)])
def test_sizes_and_places_of_a_nifti_are_in_its_unit(tmp_path, unit, mm):
    """Down to the voxels of a mouse, and with axes of length 1 after the third."""
    for size in (0.05, 2.0):
        matrix = np.diag([size / mm, 1.5 * size / mm, 3 * size / mm, 1])
        matrix[:3, 3] = np.array([7, -8, 9]) / mm
        image = nibabel.Nifti1Image(small_object().T[..., None, None], matrix)
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "v.nii")
        (volume,) = load_volumes([tmp_path / "v.nii"])
        assert volume.voxel_mm == pytest.approx((3 * size, 1.5 * size, size))
        assert np.array_equal(volume.data, small_object())
        data, voxel_mm, directions, centre = load_object(tmp_path / "v.nii")
        nz, ny, nx = small_object().shape
        assert voxel_mm == volume.voxel_mm and np.array_equal(data, small_object())
        np.testing.assert_allclose(directions, np.diag([-1, -1, 1]), atol=1e-6)
        expected = (-7 - size * (nx // 2), 8 - 1.5 * size * (ny // 2), 9 + 3 * size * (nz // 2))
        assert centre == pytest.approx(expected, rel=1e-5)


def test_voxels_of_a_size_that_cannot_be_are_told(tmp_path):
    for size, unit, voxels in (
        (0.002, "mm", "0.002 x 0.003 x 0.002 mm"),
        (2, "meter", "2000 x 3000 x 2000 mm"),
        (2, "micron", "0.002 x 0.003 x 0.002 mm"),
    ):
        image = nibabel.Nifti1Image(small_object().T, np.diag([size, 1.5 * size, size, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "v.nii")
        said = f"v.nii cannot be read as a volume: its voxels have {voxels}, expected 0.02 to 50 mm: correct pixdim"
        for read in (load_object, lambda path: load_volumes([path])):
            with pytest.raises(FileError, match=said):
                read(tmp_path / "v.nii")


def test_of_several_volumes_one_is_to_be_chosen(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 8, 7, 2), np.float32), np.eye(4)), tmp_path / "v.nii")
    for read in (load_object, lambda path: load_volumes([path])):
        with pytest.raises(FileError) as error:
            read(tmp_path / "v.nii")
        assert str(error.value) == (
            f"{tmp_path / 'v.nii'} cannot be read as a volume: it has the shape (9, 8, 7, 2), "
            "expected three dimensions: choose one volume and store it in a file of its own"
        )


def test_voxels_that_are_no_numbers_are_told(tmp_path):
    coloured = np.zeros((7, 8, 9), [(colour, np.uint8) for colour in "RGB"])
    nibabel.save(nibabel.Nifti1Image(coloured, np.eye(4)), tmp_path / "v.nii")
    np.save(tmp_path / "v.npy", np.full((7, 8, 9), "a"))
    held = {"v.nii": "voxels of R, G, B instead of one number each", "v.npy": "str32 instead of numbers"}
    for read in (load_object, lambda path: load_volumes([path])):
        for name, said in held.items():
            with pytest.raises(FileError, match=f"the volume {name} holds {said}: "):
                read(tmp_path / name)


def test_an_array_may_have_the_name_of_a_scan(tmp_path):
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["dataset"] = small_object()
        file["dataset"].attrs["voxel_mm"] = (3.0, 2.5, 2.0)
    (volume,) = load_volumes([tmp_path])
    assert volume.voxel_mm == (3.0, 2.5, 2.0) and np.array_equal(volume.data, small_object())


def test_a_scan_may_have_any_name(tmp_path):
    options = "--coils 1 --voxel-mm 8 --pattern full".split()
    assert main(["simulate", "phantom", str(tmp_path / "s.h5"), *options]) == 0
    (volume,) = load_volumes([tmp_path])
    with h5py.File(tmp_path / "s.h5", "a") as file:
        file.move("dataset", "other")
    (other,) = load_volumes([tmp_path])
    assert np.array_equal(other.data, volume.data)


def test_a_file_named_twice_is_read_once_and_a_hidden_one_never(tmp_path):
    np.save(tmp_path / "b.npy", small_object())
    (tmp_path / "._b.npy").write_bytes(b"macOS")
    assert len(find_volumes([tmp_path, tmp_path / "b.npy"])) == 1


def test_a_link_is_read_by_its_own_name_and_once(tmp_path):
    (tmp_path / "blobs").mkdir()
    np.save(tmp_path / "blobs" / "b.npy", small_object())
    (tmp_path / "blobs" / "b.npy").rename(tmp_path / "blobs" / "0123abcd")
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "0123abcd")
    (volume,) = load_volumes([tmp_path])
    assert volume.name in ("a.npy", "b.npy") and np.array_equal(volume.data, small_object())


def test_every_run_in_an_image_file_is_read_and_partitions_are_joined(tmp_path):
    scan, images = str(tmp_path / "s.h5"), str(tmp_path / "i.h5")
    assert main(["simulate", "phantom", scan, *"--coils 1 --voxel-mm 8 --pattern full".split()]) == 0
    for layout in ("volume", "partitions"):
        assert main(["recon", scan, images, "--method", "cg", "--layout", layout, "--group", layout]) == 0
    first, second = load_volumes([tmp_path / "i.h5"])
    assert first.data.ndim == 3 and np.array_equal(first.data, second.data)
    assert first.voxel_mm == pytest.approx(second.voxel_mm)


def test_what_is_no_volume_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.h5").write_bytes(b"junk")
    (tmp_path / "junk.nii").write_bytes(b"junk")
    np.save(tmp_path / "flat.npy", np.zeros((3, 3)))
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["x"] = np.zeros((3, 3, 3))
    for name, message in (
        ("none", "no such volume"),
        ("empty", "holds no volume"),
        ("junk.h5", "not an HDF5 file"),
        ("junk.nii", "cannot be read"),
        ("flat.npy", "three dimensions"),
        ("bare.h5", "lacks the attribute voxel_mm"),
    ):
        with pytest.raises(FileError, match=message):
            load_volumes([tmp_path / name])


def test_of_our_own_images_only_the_wanted_ones_are_learned_from(tmp_path):
    """Not of the preview, nor of what the image may be wrong by."""
    scan, images = str(tmp_path / "s.h5"), str(tmp_path / "i.h5")
    assert main(["simulate", "phantom", scan, *"--coils 2 --voxel-mm 6 --acceleration 2 --acs 8".split()]) == 0
    assert main(["recon", scan, images, *"--method tv --error-map true --group g".split()]) == 0
    (volume,) = load_volumes([tmp_path / "i.h5"])
    (final,) = [image for image in read_images(tmp_path / "i.h5", "g") if image.image_series_index == 2]
    assert np.array_equal(volume.data, final.data[0])


def test_volumes_of_a_scan_that_are_not_whole_are_left_out(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=1, pattern="full", noise_lines=0, repetitions=2))
    with ScanWriter(tmp_path / "cut.h5", header.toXML()) as file:
        for line in lines[: len(lines) * 3 // 4]:
            file.append(line)
    (volume,) = load_volumes([tmp_path / "cut.h5"])
    assert volume.name == "cut.h5"


def test_what_nothing_can_be_learned_from_or_simulated_is_told(tmp_path):
    options = "--coils 4 --voxel-mm 6 --acceleration 2 --acs 8".split()
    assert main(["simulate", "phantom", str(tmp_path / "s.h5"), *options]) == 0
    with pytest.raises(FileError, match="s.h5 is undersampled .* of k-space was acquired"):
        load_volumes([tmp_path / "s.h5"])
    for number, said in ((0, "nothing but zeros"), (np.nan, "NaN or infinity")):
        np.save(tmp_path / "v.npy", np.full((8, 8, 8), number, np.float32))
        with pytest.raises(FileError, match=f"v.npy holds {said}: nothing can be learned from it"):
            load_volumes([tmp_path / "v.npy"])
        with pytest.raises(FileError, match=f"v.npy holds {said}: no scan can be made of it"):
            load_object(tmp_path / "v.npy")
