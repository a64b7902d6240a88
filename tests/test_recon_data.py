"""The second entry: Gadgetron's ReconData buffers, byte by byte, give what the acquisitions give."""

import copy
import io
import socket
import struct
import threading

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan, run_chain
from peers import GadgetronPeer, run_execute, same_images

from gadgets.conformance.buffers import recon_data
from gadgets.gather import gather
from gadgets.geometry import readouts
from gadgets.keep import FailedScans
from gadgets.recon_data import MAX_ARRAY_BYTES, ReconBuffer, ReconData, ReconDataError, ReconDataReader
from gadgets.scan_files import ScanFile
from gadgets.server import Server
from gadgets.simulation.protocol import SimulateOptions
from gadgets.wire import RECON_DATA, Wire, WireError


def parsed(payload: bytes, *limits):
    stream = memoryview(payload)
    position = 0

    def read(count):
        nonlocal position
        position += count
        assert position <= len(stream)
        return bytes(stream[position - count : position])

    message = ReconDataReader(read, *limits).message()
    assert position == len(stream)
    return message


def buffered(header, lines, remove_oversampling=False):
    return gathered(header, [parsed(recon_data(header, lines, remove_oversampling))])


def test_layout_of_a_buffer(full):
    header, lines, _ = full
    (bit,) = parsed(recon_data(header, lines)).bits
    assert bit.reference is None and bit.data.data.shape == (1, 1, 1, 2, 10, 13, 24)
    assert bit.data.headers.shape == (1, 1, 1, 10, 13) and bool((bit.data.headers["number_of_samples"] == 24).all())
    np.testing.assert_array_equal(bit.data.data[0, 0, 0, :, 5, 6], lines[5 * 13 + 6].data)


@pytest.mark.parametrize(
    "options",
    [
        SimulateOptions(coils=2, pattern="full", noise_lines=0),
        SimulateOptions(coils=2, pattern="full", noise_lines=0, oversampling=1),
        SimulateOptions(coils=2, pattern="full", noise_lines=0, partial_fourier=(0.7, 0.6)),
        SimulateOptions(coils=2, acceleration=2, acs=4, noise_lines=0),
    ],
)
def test_buffers_give_what_lines_give(tmp_path, options):
    header, lines, _ = load_small_scan(tmp_path, options)
    expected, found = gathered(header, lines), buffered(header, lines)
    assert torch.equal(found.kspace, expected.kspace) and torch.equal(found.counts, expected.counts)
    assert bytes(found.head) == bytes(expected.head)
    assert found.warnings == expected.warnings


def test_removed_oversampling_changes_only_rounding(full):
    header, lines, _ = full
    expected, found = gathered(header, lines), buffered(header, lines, True)
    torch.testing.assert_close(found.kspace, expected.kspace, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("calibration", ["integrated", "separate"])
def test_an_odd_readout_without_oversampling_is_not_shifted(tmp_path, calibration):
    """Gadgetron's removal of oversampling moves it by one voxel: of 22 voxels it keeps 11 from the sixth on."""
    options = SimulateOptions(coils=2, acceleration=2, acs=4, noise_lines=0, calibration=calibration)
    header, lines, _ = load_small_scan(tmp_path, options, (10, 13, 11))
    expected = gathered(header, lines)
    assert readouts(header) == [(22, 11)]
    found = gathered(header, [parsed(recon_data(header, lines, True), MAX_ARRAY_BYTES, readouts(header))])
    near = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(found.kspace[..., 1:-1], expected.kspace[..., 1:-1], **near)
    assert (found.calibration is None) == (calibration == "integrated")
    if found.calibration is not None:
        torch.testing.assert_close(found.calibration[0][..., 1:-1], expected.calibration[0][..., 1:-1], **near)


def test_a_small_object_in_buffers_is_not_taken_for_a_low_resolution(full):
    """Gadgetron fills the whole readout: lines as short as without oversampling are without."""
    header, lines, _ = full
    # a sheet in the middle of the readout
    thin = [line_like(line, np.repeat(np.abs(line.data).sum(axis=1, keepdims=True), 24, axis=1)) for line in lines]
    assert not [w for w in buffered(header, thin, True).warnings if "short" in w]


def test_a_block_of_the_right_size_becomes_the_array(full):
    header, lines, _ = full
    message = parsed(recon_data(header, lines, True))
    scan = gathered(header, [message])
    assert scan.kspace.data_ptr() == message.bits[0].data.data.ctypes.data


def test_flags_and_counters_mean_the_same(full):
    """Navigators that overwrote a line, reversed lines, averages, contrasts, slabs."""
    header, lines, _ = full
    plain = [line_like(line, flags=0) for line in lines]
    navigator = line_like(plain[20])
    navigator.setFlag(ismrmrd.ACQ_IS_NAVIGATION_DATA)
    assert int(buffered(header, [*plain, navigator]).counts[tuple(np.unravel_index(20, (10, 13)))]) == 0
    backwards = [line_like(line) for line in plain]
    for line in backwards:
        line.setFlag(ismrmrd.ACQ_IS_REVERSE)
        line.data[:, 0] = 0  # an even length turned about its middle loses this sample in a buffer
    turned = [line_like(line, np.roll(line.data[:, ::-1], 1, axis=1)) for line in backwards]
    for line in turned:
        line.clearFlag(ismrmrd.ACQ_IS_REVERSE)
    torch.testing.assert_close(buffered(header, backwards).kspace, gathered(header, turned).kspace)
    twice = [line_like(line, 3 * line.data, average=1) for line in plain]
    scan = buffered(header, [*plain, *twice])
    torch.testing.assert_close(scan.kspace, 4 * gathered(header, plain).kspace)
    assert bool((scan.counts == 2).all())
    for counter in ("contrast", "slice"):
        other = [line_like(line, 2 * line.data, **{counter: 1}) for line in plain]
        first, second = gather(header, [parsed(recon_data(header, [*plain, *other]))])
        torch.testing.assert_close(second.kspace, 2 * first.kspace)


@pytest.mark.parametrize("mode", ["separate", "embedded"])
def test_reference_lines(full, mode):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType(mode)
    plain = [line_like(line, flags=0) for line in lines]
    calibration = [line_like(line, flags=1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)) for line in plain[40:60]]
    imaging = [line for number, line in enumerate(plain) if not 40 <= number < 60]
    expected, found = gathered(header, [*calibration, *imaging]), buffered(header, [*calibration, *imaging])
    assert torch.equal(found.kspace, expected.kspace) and torch.equal(found.counts, expected.counts)
    assert (found.calibration is None) == (mode == "embedded")
    if found.calibration is not None:
        assert torch.equal(found.calibration[0], expected.calibration[0])


@pytest.mark.parametrize(
    "flag", [ismrmrd.ACQ_IS_NAVIGATION_DATA, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, ismrmrd.ACQ_IS_NOISE_MEASUREMENT]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_buffer_of_lines_that_make_no_image_harms_no_other(full, flag, first):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType("separate")

    def message(repetition):
        return parsed(recon_data(header, [line_like(line, flags=0, repetition=repetition) for line in lines], True))

    other, image = (message(0), message(1)) if first else (message(1), message(0))
    other.bits[0].data.headers["flags"][:] = 1 << (flag - 1)
    scan = gathered(header, [other, image] if first else [image, other])
    assert bool((scan.counts == 1).all())


def test_a_buffer_that_contradicts_itself_cannot_be_recorded_and_harms_nobody(full, tmp_path):
    header, lines, _ = full
    message = parsed(recon_data(header, lines))
    message.bits[0].reference = ReconBuffer(*vars(message.bits[0].data).values())
    message.bits[0].reference.headers = message.bits[0].reference.headers[..., :3]
    recording = FailedScans(tmp_path).record(b"<header/>")
    recording.add(message)
    assert recording.lines == len(lines)
    recording.drop()
    assert any(note.startswith("reference lines were left out") for note in gathered(header, [message]).warnings)


@pytest.mark.parametrize(
    "payload,message",
    [
        (struct.pack("<Q", 1 << 40), "encoding spaces was announced"),
        (struct.pack("<QQ", 1, 900), "of 900 dimensions was announced"),
        (struct.pack("<QQ7Q", 1, 7, *(1 << 20,) * 7), "bytes was announced"),
        (struct.pack("<QQ8Q", 1, 8, *(1,) * 8) + bytes(8 + 2 + 8 + 56 + 1), "at most 7 dimensions"),
    ],
)
def test_nonsense_is_refused(payload, message):
    with pytest.raises(ReconDataError, match=message):
        parsed(payload)


def test_an_array_that_does_not_fit_into_memory_is_refused():
    payload = io.BytesIO(struct.pack("<QQ7Q", 1, 7, *(1 << 7,) * 7) + bytes(8))
    with pytest.raises(ReconDataError, match="does not fit into memory"):
        ReconDataReader(payload.read, 1 << 60).message()


def test_arrays_share_one_limit(full):
    """A message of several arrays is refused once all together exceed what a connection may take."""
    header, lines, _ = full
    payload = recon_data(header, lines)
    data_bytes = parsed(payload).bits[0].data.data.nbytes
    with pytest.raises(ReconDataError, match="left of the limit"):
        ReconDataReader(io.BytesIO(payload).read, data_bytes + 100).message()


def test_failed_buffers_are_kept_as_the_lines_in_them(full, tmp_path):
    header, lines, xml = full[0], full[1], full[0].toXML("ascii").encode()
    recording = FailedScans(tmp_path).record(xml)
    recording.add(parsed(recon_data(header, lines)))
    with ScanFile(recording.keep()) as scan:
        kept = gathered(header, list(scan.acquisitions()))
    expected = gathered(header, lines)
    assert torch.equal(kept.kspace, expected.kspace) and torch.equal(kept.counts, expected.counts)


def test_calibration_lines_of_the_image_are_kept_once(full, tmp_path):
    """Gadgetron has them in the data and among the reference lines."""
    header, lines = full[0], [line_like(line) for line in full[1]]
    for line in lines[40:60]:
        line.setFlag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    recording = FailedScans(tmp_path).record(header.toXML("ascii").encode())
    recording.add(parsed(recon_data(header, lines)))
    with ScanFile(recording.keep()) as scan:
        assert len(scan) == len(lines)


def test_an_aborted_scan_is_recognised_in_a_partly_filled_buffer(full):
    header, lines, _ = full
    scan = buffered(header, lines[:70])
    assert int(scan.counts.sum()) == 70
    assert scan.warnings == gathered(header, lines[:70]).warnings
    assert "E2 was announced from 0 to 9 but received from 0 to 5" in scan.warnings[0]


def test_a_second_encoding_space_is_counted_and_told(full):
    header, lines, _ = full
    message = parsed(recon_data(header, lines))
    other = parsed(recon_data(header, [line_like(line, encoding_space_ref=1) for line in lines]))
    scan = gathered(header, [ReconData([*message.bits, *other.bits])])
    assert bool((scan.counts == 1).all()) and "130 lines of another encoding space were left out" in scan.warnings


def test_headers_that_do_not_fit_the_data_are_refused(full):
    header, lines, _ = full
    message = parsed(recon_data(header, lines))
    message.bits[0].data.headers = message.bits[0].data.headers[..., :5]
    with pytest.raises(ReconDataError, match="expected headers of shape"):
        list(gather(header, [message]))


@pytest.fixture
def noiseless_path(tmp_path):
    options = SimulateOptions(coils=3, acceleration=2, acs=8, noise_lines=0, oblique=True, repetitions=2)
    load_small_scan(tmp_path, options, (20, 24, 18))
    return tmp_path / "scan.h5"


def test_the_wire_reads_it_and_a_cut_is_an_error(noiseless_path, full):
    header, lines, _ = full
    payload = struct.pack("<H", RECON_DATA) + recon_data(header, lines)
    for sent in (payload + struct.pack("<H", 4), payload[:1000]):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sender = threading.Thread(target=lambda: (theirs.sendall(sent), theirs.shutdown(socket.SHUT_WR)))
            sender.start()
            with Wire(ours, timeout_s=10) as wire:
                if len(sent) > 1000:
                    ((kind, item),) = wire.messages()
                    assert kind == RECON_DATA and item.bits[0].data.data.shape[-1] == 24
                else:
                    with pytest.raises(WireError, match="ended before its CLOSE"):
                        list(wire.messages())
            sender.join()


def test_external_gadget_and_server_give_the_images_of_the_acquisitions(noiseless_path):
    expected = run_chain(noiseless_path, None, method="cg")
    properties = '<property name="method" value="cg"/><property name="device" value="cpu"/>'
    peer, code = run_execute(noiseless_path, properties, buffered=True)
    assert (code, peer.errors, peer.closed) == (0, [], True)
    assert same_images(peer.images, expected)
    with Server(("127.0.0.1", 0), {"method": "cg", "device": "cpu"}) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        plain, removed = (buffers_to(server, noiseless_path, remove) for remove in (False, True))
        server.shutdown()
    assert same_images(plain, expected)
    for mine, theirs in zip(expected, removed):
        assert np.abs(mine.data.astype(int) - theirs.data.astype(int)).max() <= 1
        assert bytes(mine.getHead())[:194] == bytes(theirs.getHead())[:194]  # all but the length of the attributes


def buffers_to(server, path, remove_oversampling):
    with socket.create_connection(server.server_address[:2]) as sock, ScanFile(path) as scan:
        peer = GadgetronPeer(sock, True, remove_oversampling)
        peer.run(scan)
    assert peer.closed and not peer.errors and len(peer.images) == 2
    return peer.images


def test_volumes_in_gadgetrons_buffers_take_memory_too(full):
    header, lines, _ = full
    message = parsed(recon_data(header, [line_like(line, contrast=contrast) for contrast in (0, 1) for line in lines]))
    counted = []
    assert len(list(gather(header, [message], lambda coils, volumes: counted.append((coils, volumes))))) == 2
    assert counted == [(2, 1), (2, 2)]
