"""Headers as they come: damaged, foreign, of other versions and encodings."""

import re

import pytest

from gadgets.budget import Budget
from gadgets.failure import ScanError
from gadgets.geometry import read_geometry
from gadgets.header import parse_header, strip_version
from gadgets.simulation.protocol import SimulateOptions, make_header

XML = make_header((22, 24, 20), (1.0, 1.0, 1.0), [0, 0], SimulateOptions(coils=3, acceleration=2)).encode()
BARE = XML.split(b"?>", 1)[1].replace(b' xmlns="http://www.ismrm.org/ISMRMRD"', b"")


def changed(old: str, new: str, count: int = 1) -> bytes:
    assert old.encode() in XML
    return XML.replace(old.encode(), new.encode(), count)


@pytest.mark.parametrize(
    "xml",
    [
        XML,
        XML.decode(),
        XML + b"\0",
        BARE,
        BARE.replace(b"<ismrmrdHeader", b"<ismrmrdHeader xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance'", 1),
        BARE.replace(b"<ismrmrdHeader", b'<ismrmrdHeader xmlns = ""', 1),
        XML.replace(b"org/ISMRMRD", b"org/ISMRMRD/"),
        b"\xef\xbb\xbf" + XML,
        changed("<encoding>", "<newerThanThisSchema><x>1</x></newerThanThisSchema><encoding>"),
        changed("<measurementInformation>", "<version>8</version><measurementInformation>"),
        changed("simulated_3D", "T1 \u00e4"),  # the declaration says ascii
        XML.replace(b"simulated_3D", "T1 \u00e4".encode("latin-1")),
    ],
)
def test_the_same_geometry_is_read(xml):
    assert read_geometry(parse_header(xml)) == read_geometry(parse_header(XML))


def test_letters_beyond_ascii_survive():
    for encoding in ("utf-8", "latin-1"):
        header = parse_header(XML.replace(b"simulated_3D", "T1 \u00e4".encode(encoding)))
        assert header.measurementInformation.protocolName == "T1 \u00e4"


@pytest.mark.filterwarnings("ignore:Failed to convert")
def test_odd_values_where_nothing_is_needed_are_let_be():
    xml = changed("<H1resonanceFrequency_Hz>123000000<", "<H1resonanceFrequency_Hz>1.23e8<")
    dated = xml.replace(b"<patientPosition>", b"<seriesDate>last week</seriesDate><patientPosition>")
    assert read_geometry(parse_header(dated)).shape == (20, 24, 22)


@pytest.mark.parametrize(
    "xml,message",
    [
        (b"", "no element found"),
        (XML[:900], "cannot be read"),
        (b"<foo/>", "its ismrmrdHeader lacks experimentalConditions|has no encoding"),
        (changed("<x>44</x>", "<x>banana</x>"), "expected a number for matrixSize x, got 'banana'"),
        (changed("<TE>2.5</TE>", "<TE>short</TE>"), "expected a number for sequenceParameters TE, got 'short'"),
        (b'<!DOCTYPE a [<!ENTITY b "bbbb">]>' + XML, "document type"),
    ],
)
@pytest.mark.filterwarnings("ignore:Failed to convert")
def test_what_is_no_header_is_a_sentence(xml, message):
    with pytest.raises(ScanError, match=message) as caught:
        read_geometry(parse_header(xml))
    assert "\n" not in str(caught.value) and "__init__" not in str(caught.value)


def test_a_missing_element_is_named_where_the_library_wants_it():
    """ismrmrd before 1.15 does without."""
    try:
        assert read_geometry(parse_header(changed("<trajectory>cartesian</trajectory>", ""))).shape == (20, 24, 22)
    except ScanError as error:
        assert str(error) == "the ISMRMRD header cannot be read: its encoding lacks trajectory"


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("<x>22</x>", "<x>70000</x>", "at most 65535 in each direction, the header says 70000 x 24 x 20"),
        ("<x>22.0</x>", "<x>INF</x>", "positive, finite field of view, the header says inf x 24.0 x 20.0 mm"),
        ("<x>22.0</x>", "<x>1e-30</x>", "along x is 44 mm as encoded and 1e-30 mm as reconstructed"),
        ("<x>44.0</x>", "<x>1e30</x>", "along x is 1e\\+30 mm as encoded and 22 mm as reconstructed"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(old, new, message):
    with pytest.raises(ScanError, match=message):
        read_geometry(parse_header(changed(old, new)))


@pytest.mark.parametrize("fov, told", [("22.0", True), ("44.0", False)])
def test_an_encoded_field_of_view_without_its_oversampling_is_told(fov, told):
    """It may be a readout at half its resolution: the header is believed."""
    geometry = read_geometry(parse_header(changed("<x>44.0</x>", f"<x>{fov}</x>")))
    assert (geometry.encoded_matrix[0], geometry.recon_matrix[0], geometry.readout) == (44, 22, 44 if told else 22)
    assert ["lacks the oversampling" in note for note in geometry.warnings] == [True] * told


def test_images_that_would_take_all_memory_are_refused():
    large = XML
    for axis, n in (("x", 22), ("y", 24), ("z", 20)):
        head, _, tail = large.rpartition(f"<{axis}>{n}</{axis}>".encode())
        large = head + f"<{axis}>3000</{axis}>".encode() + tail
    with pytest.raises(ScanError, match="an image of 3000 x 3000 x 3000 voxels; the limit is 64 GiB"):
        read_geometry(parse_header(large))
    said = "an image of 300 x 300 x 300 voxels needs 0.2 GiB and this server takes 0.1 GiB"
    with pytest.raises(ScanError, match=said):
        Budget(parse_header(large.replace(b">3000<", b">300<")), 0.1)


def test_versions_are_stripped_however_they_are_written():
    for version in (b"<version>15</version>", b"<version >15</version >", b"<v:version>1</v:version>", b"<version/>"):
        assert strip_version(b"<a>" + version + b"<b/></a>\0") == b"<a><b/></a>"


@pytest.mark.filterwarnings("ignore:Failed to convert")
@pytest.mark.parametrize("element", ["receiverChannels", "relativeReceiverNoiseBandwidth"])
def test_numbers_that_are_left_empty_are_not_told(element):
    text = re.sub(f"<{element}>[^<]*<".encode(), f"<{element}><".encode(), XML)
    header = parse_header(text)
    assert text != XML and getattr(header.acquisitionSystemInformation, element) is None
    assert read_geometry(header).shape == (20, 24, 22)
    with pytest.raises(ScanError, match=f"expected a number for .* {element}, got 'many'"):
        parse_header(text.replace(f"<{element}><".encode(), f"<{element}>many<".encode()))


def test_limits_of_nothing_are_none():
    """Converters write 0 to 0 where they know nothing."""
    limits = rb"(<kspace_encoding_step_2>\s*<minimum>0</minimum>\s*)<maximum>19</maximum>\s*<center>10</center>"
    geometry = read_geometry(parse_header(re.sub(limits, rb"\1<maximum>0</maximum><center>0</center>", XML)))
    assert geometry.limits[1] == (0, 19) and geometry.centre[1] == 10
    said = "the header's limits of kspace_encoding_step_2 run from 0 to 0: 0 to 19 with centre 10 assumed"
    assert geometry.warnings == (said,)


def test_a_centre_that_was_rounded_down_loses_no_line():
    geometry = read_geometry(parse_header(changed("<center>12</center>", "<center>11</center>")))
    assert geometry.centre == (12, 10) and geometry.limits[0] == (0, 23) and not geometry.warnings


@pytest.mark.filterwarnings("ignore:Failed to convert")
def test_a_field_of_view_in_metres_is_told_and_a_capital_is_cartesian():
    def in_metres(found):
        return b"<%s>%.4f</" % (found[1], float(found[2]) / 1000)

    small = re.sub(rb"<([xyz])>([\d.]+\.0)</", in_metres, XML).replace(b">cartesian<", b">Cartesian<")
    (note,) = read_geometry(parse_header(small)).warnings
    assert "voxels are of 0.001 mm: was its field of view written in metres" in note


@pytest.mark.parametrize("factor, told", [(1, False), (3, True)])
def test_slices_excited_together_are_told(factor, told):
    band = (
        "<multiband><spacing><dZ>30.0</dZ></spacing><deltaKz>1.0</deltaKz>"
        f"<multiband_factor>{factor}</multiband_factor><calibration>separable2D</calibration>"
        "<calibration_encoding>0</calibration_encoding></multiband></parallelImaging>"
    )
    notes = read_geometry(parse_header(changed("</parallelImaging>", band))).warnings
    assert [note.split(":")[0] for note in notes] == ["CAUTION"] * told
    assert all("3 slices were excited at once" in note for note in notes)


@pytest.mark.parametrize(
    "count, deep_mm, shown_mm, told",
    [
        (20, 20.0, 20.0, ""),  # all
        (40, 20.0, 20.0, ""),  # interpolated
        (12, 12.0, 12.0, ""),  # cropped
        (20, 1.0, 20.0, "its field of view of 1 mm was taken for the thickness of one"),
        (16, 1.0, 16.0, "the header wants 16 partitions of 0.062 mm where 20 partitions of 1 mm were encoded"),
        (40, 0.5, 20.0, "taken for the thickness of one"),
        (200, 0.1, 20.0, "taken for the thickness of one"),
        (20, 4.0, 4.0, "CAUTION: the header wants only the central 4 mm of the 20 mm that were encoded"),
        (5, 5.0, 5.0, "CAUTION: the header wants only the central 5 mm"),
        (
            1,
            20.0,
            20.0,
            "CAUTION: the header says that 20 partitions of 1 mm were encoded, but wants a single one of 20 mm",
        ),
        (1, 1.0, 1.0, "wants a single one of 1 mm"),
    ],
)
def test_partitions_that_contradict_the_field_of_view(count, deep_mm, shown_mm, told):
    header = parse_header(XML)
    space = header.encoding[0].reconSpace
    space.matrixSize.z, space.fieldOfView_mm.z = count, deep_mm
    geometry = read_geometry(header)
    assert geometry.recon_fov_mm[2] == pytest.approx(shown_mm) and geometry.recon_matrix[2] == count
    assert len(geometry.warnings) == bool(told) and all(told in note for note in geometry.warnings)
    assert geometry.plane(3.0).warnings == ()
