"""Cases of streams, scans, options, solvers and processes that fail; each returns what happened in a few words."""

from __future__ import annotations

import copy
import re
import signal
import struct
import time

import ismrmrd
import numpy as np

from ..scan_files import ScanFile
from . import peer as p
from .bench import Bench
from .case import case, expect, refused, same, told

# malformed streams


@case("a header whose XML is cut off is refused")
def truncated_header(bench: Bench) -> str:
    return refused(bench.scan(header=bench.header[: len(bench.header) // 2]), "header cannot be read")


@case("an unknown message id is named")
def unknown_message(bench: Bench) -> str:
    with bench.peer() as peer:
        stray = struct.pack("<H", 13968) + b"\xff" * 64
        answer = peer.send(bench.opening(), *bench.messages[:50], stray).half_close().answer()
        return refused(answer, "message id 13968")


@case("what is no MRD at all is answered")
def other_protocol(bench: Bench) -> str:
    with bench.peer() as peer:
        return refused(peer.send(b"GET / HTTP/1.1\r\nHost: scanner\r\n\r\n").half_close().answer(), "message id")


@case("announced lengths beyond the limit are refused at once, and no memory is taken for them")
def absurd_lengths(bench: Bench) -> str:
    line = bytearray(bench.messages[20])
    struct.pack_into("<H", line, 2 + 34, 65535)
    struct.pack_into("<H", line, 2 + 38, 65535)
    liars = (
        struct.pack("<HI", p.CONFIG, 1 << 31),
        p.config_name("default") + struct.pack("<HI", p.HEADER, 0xFFFFFFFF),
        struct.pack("<HQQQ", p.QUERY, 0, 1, 1 << 60),
        bench.opening() + bytes(line),
    )
    before = bench.health()["rss_mib"]
    for liar in liars:
        with bench.peer() as peer:
            sentence = refused(peer.send(liar).answer(), "was announced")
    grown = bench.health()["rss_mib"] - before
    expect(grown < 64, f"memory grew by {grown:.0f} MiB")
    return sentence


@case("big-endian numbers are refused")
def wrong_endianness(bench: Bench) -> str:
    with bench.peer() as peer:
        name = struct.pack(">H1024s", p.CONFIG_NAME, b"default")
        head = struct.pack(">HI", p.HEADER, len(bench.header)) + bench.header
        return refused(peer.send(name, head).half_close().answer(), "message id 256")


# impossible scans


@case("samples that are NaN: no image, a sentence")
def nan_samples(bench: Bench) -> str:
    line = copy.deepcopy(bench.lines[100])
    line.data[:] = np.nan
    return refused(bench.scan([*bench.messages[:100], p.acquisition(line), *bench.messages[101:]]), "NaN")


@case("lines without coils: no image, a sentence")
def zero_coils(bench: Bench) -> str:
    line = ismrmrd.Acquisition.from_array(np.zeros((0, 44), np.complex64))
    return refused(bench.scan([p.acquisition(line)] * 3), "without channels")


@case("a scan of one line: no image or one with a warning, and no crash")
def one_line(bench: Bench) -> str:
    at_centre = [i for i in bench.lines if (i.idx.kspace_encode_step_1, i.idx.kspace_encode_step_2) == (12, 10)]
    middle = next(i for i in at_centre if not i.flags & 1 << 18)
    answer = bench.scan([p.acquisition(middle)])
    if answer.images:
        expect("incomplete" in answer.comment(), f"the comment does not say so: {answer.comment()}")
        return f"{len(answer.images)} images; the comment says that the scan is incomplete"
    return refused(answer, ".")


@case("a scan without a line: a sentence")
def no_line(bench: Bench) -> str:
    return refused(bench.scan([]), "no imaging line")


@case("twice as many lines as announced, half of them outside the matrix: images, and the comment says so")
def twice_as_long(bench: Bench) -> str:
    more = [copy.deepcopy(line) for line in bench.lines]
    for number, line in enumerate(more):
        line.idx.kspace_encode_step_2 += 20
    answer = bench.scan([*bench.messages, *(p.acquisition(line) for line in more)])
    expect(answer.series == [1, 2] and not answer.complaint, answer.complaint or f"series {answer.series}")
    expect("outside" in answer.comment(), f"the comment does not say so: {answer.comment()}")
    return "2 images; the comment tells of the lines outside"


@case("a coil that is dead in all lines, noise lines too: images of the others, and the comment says so")
def dead_coil(bench: Bench) -> str:
    lines = [copy.deepcopy(line) for line in bench.lines]
    for line in lines:
        line.data[1] = 0
    answer = bench.scan([p.acquisition(line) for line in lines])
    expect(answer.series == [1, 2] and not answer.complaint, answer.complaint or f"series {answer.series}")
    said = answer.comment()
    expect("coil 1 (counted from 0) has no noise" in said, f"the comment does not say so: {said}")
    return "2 images; the comment names the coil"


@case("k-space beyond --max-gib is refused by its size, before a line is stored", needs="process")
def too_large(bench: Bench) -> str:
    huge = bench.header.replace(b"<y>24</y>", b"<y>2400</y>").replace(b"<z>20</z>", b"<z>2000</z>")
    return refused(bench.scan(header=huge), "k-space needs .* GiB .* --max-gib")


# invalid options


@case("an unknown option is refused by name, to Gadgetron and to clients")
def unknown_option(bench: Bench) -> str:
    with bench.peer() as peer:
        script = (
            '<configuration><version>2</version><stream><external><connect port="1"/>'
            '<configuration><property name="sweps" value="2"/></configuration>'
            "</external></stream></configuration>"
        )
        opening = p.text_message(p.CONFIG, script) + p.text_message(p.HEADER, bench.header)
        refused(peer.send(opening, *bench.messages, p.close()).answer(), "unknown option 'sweps'")
    return refused(bench.scan(gadgetron=True, sweps=2), "unknown option 'sweps'")


@case("an unknown configuration is refused by name")
def unknown_configuration(bench: Bench) -> str:
    with bench.peer() as peer:
        opening = p.config_name("Generic.xml") + p.text_message(p.HEADER, bench.header)
        answer = peer.send(opening, *bench.messages, p.close()).answer()
        return refused(answer, "unknown configuration 'Generic.xml'")


@case("missing weights are named, to Gadgetron and to clients")
def missing_weights(bench: Bench) -> str:
    refused(bench.scan(prior="nonesuch"), "no prior 'nonesuch'")
    return refused(bench.scan(prior="nonesuch", gadgetron=True), "no prior 'nonesuch'")


# outputs besides the image


@case("an error map, asked for, comes after the image, which stays the same to the bit")
def error_map(bench: Bench) -> str:
    answer = bench.scan(error_map=True)
    expect(answer.series == [1, 2, 3] and not answer.complaint, answer.complaint or f"series {answer.series}")
    expect(
        answer.images[:2] == bench.expected and "estimated error" in answer.comment(),
        "the image is another one, or the map does not say what it is",
    )
    return "3 images; " + re.search(r"[0-9.]+ % of tissue brightness[^;<]*", answer.comment()).group()


# solvers, memory, processes and disks that fail


def preview_stands(bench: Bench, words: str, **options) -> str:
    """Expect that Gadgetron and clients get the bit-identical preview, and then the reason."""
    for gadgetron in (True, False):
        answer = bench.scan(gadgetron=gadgetron, **options)
        expect(answer.images == bench.expected[:1], f"{len(answer.images)} images and not the preview alone")
        sentence = told(answer, words)
    return f"preview; {sentence}"


@case("a solver that raises leaves the preview, and a sentence", needs="faults")
def solver_raises(bench: Bench) -> str:
    return preview_stands(bench, "preview stands.*a fault on purpose", prior="test-raise")


@case("a solver that hangs is left behind at the deadline: the preview, and a sentence", needs="faults")
def solver_hangs(bench: Bench) -> str:
    return preview_stands(bench, "preview stands.*deadline of 0.5 s", prior="test-hang", deadline_s=0.5)


@case("a device out of memory leaves the preview, and a sentence", needs="faults")
def out_of_memory(bench: Bench) -> str:
    return preview_stands(bench, "preview stands.*out of memory", prior="test-memory")


@case("an image of NaN is not sent: the preview, and a sentence", needs="faults")
def solver_makes_nan(bench: Bench) -> str:
    return preview_stands(bench, "preview stands.*NaN", prior="test-nan")


@case("without a preview the CG-SENSE image takes the place of the failed one and says so", needs="faults")
def failing_without_preview(bench: Bench) -> str:
    answer = bench.scan(prior="test-raise", preview=False)
    expect(answer.series == [2], f"series {answer.series}")
    labelled = "a fault on purpose" in answer.comment() and "_CG-SENSE preview" in answer.comment()
    same_image = answer.images[0][2] == bench.expected[0][2]
    expect(same_image and labelled, "it is not the CG-SENSE image, or does not say so")
    return "1 image, labelled; " + told(answer, "preview stands")


@case("an image that explains the data worse than the preview carries a warning", needs="faults")
def drifting_solver(bench: Bench) -> str:
    answer = bench.scan(prior="test-drift", prior_weight=0.06)
    said = answer.comment()
    expect(answer.series == [1, 2] and "CAUTION" in said, f"series {answer.series}, no warning in: {said}")
    return re.search("CAUTION: [^;<]*", said).group()


@case("an image that left the data is not sent: the preview, and a sentence", needs="faults")
def lost_solver(bench: Bench) -> str:
    return preview_stands(bench, "preview stands.*explains the data worse", prior="test-drift", prior_weight=100)


@case("the raw data of a failed scan are kept and can be reconstructed from the file", limit_s=15, needs="process")
def replay(bench: Bench) -> str:
    before = set(bench.kept.glob("failed-*.h5"))
    bench.scan(prior="nonesuch")
    bench.wait_for(lambda: set(bench.kept.glob("failed-*.h5")) - before, "a file of the failed scan")
    with ScanFile((set(bench.kept.glob("failed-*.h5")) - before).pop()) as scan:
        same(bench.scan([p.acquisition(line) for line in scan.acquisitions()], scan.header_xml), bench)
    return "same images from the kept file"


@case("a disk that is full for the raw data disturbs no scan, failed or not", limit_s=15, needs="process")
def disk_full(bench: Bench) -> str:
    before = len(list(bench.kept.iterdir()))
    bench.limit_files(50_000)
    try:
        same(bench.scan(), bench)
        expect(bench.scan(prior="test-raise").images == bench.expected[:1], "the preview of a failing scan was lost")
    finally:
        bench.limit_files(-1)
    expect(len(list(bench.kept.iterdir())) <= before, "a file was left behind")
    return "same images, nothing kept"


@case(
    "SIGTERM in the middle of scans: what there is is handed out, new scans are refused, exit code 0",
    limit_s=30,
    needs="process",
)
def sigterm(bench: Bench) -> str:
    with bench.peer() as computing, bench.peer() as sending, bench.peer() as late:
        computing.send(bench.opening(prior="test-slow", sweeps=1000), *bench.messages, p.close())
        sending.send(bench.opening(gadgetron=True), *bench.messages[:50])
        bench.wait_for(lambda: bench.health()["scans"]["running"] == 1, "the first scan computes")
        bench.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        refused(late.send(bench.opening(gadgetron=True), *bench.messages, p.close()).answer(), "shutting down")
        refused(sending.answer(), "cut off because the server is shutting down")
        answer = computing.answer()
    expect(answer.closed and bool(answer.images), "the running scan got no image")
    code = bench.process.wait(20)
    bench.start()
    expect(code == 0, f"exit code {code}")
    return f"{len(answer.images)} images of the running scan, exit code 0"


@case(
    "SIGKILL in the middle of a scan: the peer sees the end; a new server keeps the scan's raw data and works",
    limit_s=30,
    needs="process",
)
def sigkill(bench: Bench) -> str:
    before = set(bench.kept.glob("failed-*.h5"))
    with bench.peer() as peer:
        peer.send(bench.opening(prior="test-slow", sweeps=1000), *bench.messages, p.close())
        bench.wait_for(lambda: bench.health()["scans"]["running"] == 1, "the scan computes")
        bench.process.kill()
        answer = peer.answer()
    expect(not answer.closed, "a CLOSE came from a killed server")
    bench.start()
    bench.wait_for(lambda: set(bench.kept.glob("failed-*.h5")) - before, "the raw data are kept")
    return "the peer saw the end, the raw data are there"
