"""What the server grants: turns, memory, addresses, a page of health, a folder of failed scans."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import line_like, load_small_scan, run_chain
from ismrmrd import ACQ_IS_PARALLEL_CALIBRATION
from peers import ClientPeer, same_images
from test_mouths import FAST, client, running

from gadgets import recon
from gadgets.address import AddressError
from gadgets.budget import Budget, free_memory, worth_an_image
from gadgets.cli import main
from gadgets.failure import OneLine, ReconError, ScanError
from gadgets.flags import LAST_BIT, NOISE_BIT
from gadgets.gather import Gatherer, gather
from gadgets.header import parse_header
from gadgets.health import Counts, HealthPage, process_facts
from gadgets.keep import FailedScans
from gadgets.limits import Limits
from gadgets.scan_files import ScanFile, ScanWriter
from gadgets.server import Server
from gadgets.simulation.protocol import SimulateOptions
from gadgets.turns import Turns
from gadgets.visit import Visit
from gadgets.wire import ACQUISITION, IMAGE, Wire


def test_turns_come_in_order_and_places_are_told():
    turns, order, told = Turns(1), [], {}

    def take(name):
        with turns.hold(lambda place: told.setdefault(name, []).append(place)):
            order.append(name)

    with turns.hold():
        threads = []
        for name in "abc":
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            while name not in told:
                time.sleep(0.01)
        assert (turns.running, turns.waiting, order) == (1, 3, [])
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "c"] and [told[name][0] for name in "abc"] == [1, 2, 3]
    assert (turns.running, turns.waiting) == (0, 0)


def test_a_line_is_left_by_who_gives_up():
    turns = Turns(1)
    with turns.hold(), pytest.raises(ReconError, match="because the peer is gone"):
        with turns.hold(give_up=lambda: "because the peer is gone"):
            raise AssertionError("no turn was free")
    assert (turns.running, turns.waiting) == (0, 0)
    with pytest.raises(ReconError, match="because the peer is gone"):
        with turns.hold(give_up=lambda: "because the peer is gone"):
            raise AssertionError("a free one was taken all the same")
    assert (turns.running, turns.waiting) == (0, 0)


def test_memory_is_refused_from_the_header_and_from_the_lines(scan_path):
    with ScanFile(scan_path) as scan:
        header, lines = parse_header(scan.header_xml), list(scan.acquisitions())
    exactly = 8 * 4 * 24 * 35 * 26 / 2**30
    Budget(header, exactly)
    with pytest.raises(ScanError, match="needs .* GiB .*4 coils, matrix 26 x 35 x 24.*--max-gib"):
        Budget(header, exactly * 0.99)
    for number, line in enumerate(lines[-3:]):
        line.idx.contrast = number
    with pytest.raises(ScanError, match="2 volumes at once"):
        list(gather(header, lines, Budget(header, exactly * 1.5).check))
    assert len(list(gather(header, lines, Budget(header, exactly * 3.5).check))) == 3


def calibration_only(line, count):
    """As many calibration lines, each of another slice and contrast."""
    flags = 1 << ACQ_IS_PARALLEL_CALIBRATION - 1
    return [line_like(line, slice=n % 60_000, contrast=n // 100, flags=flags) for n in range(count)]


SEPARATE = SimulateOptions(coils=4, noise_lines=0, calibration="separate")


def test_a_scan_of_calibration_lines_alone_is_refused_before_it_fills_the_memory(tmp_path):
    header, (line, *_), _ = load_small_scan(tmp_path, SEPARATE, (24, 35, 26))
    budget = Budget(header, 0.01)
    with pytest.raises(ScanError, match="k-space needs 0.0.* GiB .*volumes at once of 4 coils.*takes 0.01 GiB"):
        list(gather(header, calibration_only(line, 5000), budget.check))
    with pytest.raises(ScanError, match="the scan holds no imaging line .300 calibration lines came"):
        list(gather(header, calibration_only(line, 300), budget.check))


def test_a_calibration_line_takes_little_more_memory_than_it_has(tmp_path):
    header, (line, *_), _ = load_small_scan(tmp_path, SEPARATE, (64, 64, 128))
    gatherer, before = Gatherer(header), process_facts()["rss_mib"]
    for one in calibration_only(line, 10):
        assert list(gatherer.add(one)) == []
    assert process_facts()["rss_mib"] - before < 16 and 0 < gatherer.calibrations.nbytes < 1 << 20


def test_lines_that_wait_for_another_slice_count(scan_path):
    with ScanFile(scan_path) as scan:
        header, *_, line = parse_header(scan.header_xml), *scan.acquisitions()
    limits = header.encoding[0].encodingLimits
    limits.kspace_encoding_step_2 = None
    limits.slice = SimpleNamespace(minimum=0, center=0, maximum=header.encoding[0].encodedSpace.matrixSize.z - 1)
    gatherer = Gatherer(header, Budget(header, 0.002).check)
    with pytest.raises(ScanError, match="k-space needs 0.0.* GiB"):
        for _ in range(2000):
            assert list(gatherer.add(line_like(line, slice=0, kspace_encode_step_2=0))) == []
    assert len(gatherer.waiting) == 4 * 24 * 35 * 26 // 52  # as many samples as four volumes


@pytest.mark.parametrize("flagged, held", [(True, 1), (False, 2)])
def test_repetitions_that_did_not_end_are_held(scan_path, flagged, held):
    """Without a flag one is over once half as many lines as it has came of a later one."""
    with ScanFile(scan_path) as scan:
        header = parse_header(scan.header_xml)
        lines = [line for line in scan.acquisitions() if not line.flags & NOISE_BIT]
    dynamic, counted = [], []
    for repetition in range(6):
        for line in lines:
            flags = LAST_BIT if flagged and line is lines[-1] else 0
            dynamic.append(line_like(line, repetition=repetition, flags=flags))
    assert len(list(gather(header, dynamic, lambda coils, volumes: counted.append(volumes)))) == 6
    assert len(counted) == 6 and max(counted) == held


def test_memory_that_others_have_taken_is_told(scan_path, monkeypatch):
    with ScanFile(scan_path) as scan:
        header = parse_header(scan.header_xml)
    assert free_memory() > 1 << 20
    monkeypatch.setattr("gadgets.budget.free_memory", lambda: 600_000)
    with pytest.raises(ScanError, match="needs 0.00065 GiB, and 0.00056 GiB of this machine's memory are free now"):
        Budget(header, 1)
    with pytest.raises(ScanError, match="the scan's k-space and image need 0.1[0-9]+ GiB, and 0.00056 GiB"):
        Budget(header, 1, virtual=12)


def test_a_volume_whose_image_has_no_room_left_is_told_and_the_next_scan_works(scan_path, prior, monkeypatch):
    """Rather than have the kernel end the server with all of its scans."""
    with running(FAST, lambda options: prior) as server:
        expected, _ = client(server, scan_path)
        with monkeypatch.context() as patch:
            free = [1 << 40, 600_000]  # at the header; once its turn has come
            patch.setattr("gadgets.budget.free_memory", lambda: free.pop(0))
            images, texts = client(server, scan_path)
        assert not images and "its image needs 0.1" in texts[-1] and "are free now: send it again later" in texts[-1]
        assert same_images(client(server, scan_path)[0], expected)


def memory_files(folder, used, stat=""):
    """What the files of a control group, by the names of version 2, hold where the limit is 3 MB."""
    return {f"{folder}memory.max": "3000000", f"{folder}memory.current": used, f"{folder}memory.stat": stat}


@pytest.mark.parametrize(
    "group,files",
    [
        ("0::/", memory_files("", "2500000", "anon 1\ninactive_file 400000\n")),
        ("0::/system.slice/slicediff.service", memory_files("system.slice/slicediff.service/", "2100000")),
        ("0::/user.slice/batch.slice/job", memory_files("user.slice/batch.slice/", "2100000")),
        (
            "4:memory:/docker/ab",
            {
                "memory/memory.limit_in_bytes": "3000000",
                "memory/memory.usage_in_bytes": "2600000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500000\n",
            },
        ),
    ],
    ids=["container", "service", "group above the own", "container of cgroup v1"],
)
def test_the_memory_limit_of_a_container_or_service_counts(tmp_path, group, files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 20000 kB\nMemAvailable:    10000 kB\n")
    assert free_memory(tmp_path) == 10_240_000
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == 900_000
    for limit in tmp_path.rglob("memory.max"):
        limit.write_text("max\n")
        assert free_memory(tmp_path) == 10_240_000
    assert free_memory(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("lines,worth", [(0.3, False), (0.45, False), (0.6, True), (1.0, True)])
def test_what_came_is_worth_an_image_once_the_centre_is_there(scan_path, lines, worth):
    with ScanFile(scan_path) as scan:
        items = list(scan.acquisitions())
        (found,) = gather(parse_header(scan.header_xml), items[: 16 + int(lines * (len(items) - 16))])
    assert worth_an_image(found) == worth


def test_limits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="limit slots must be above 0 and at most .*, got 0"):
        Limits(slots=0)
    for value in (float("inf"), float("nan"), 1e12, -1):
        with pytest.raises(ValueError, match="limit max_gib must be above 0 and at most 1e"):
            Limits(max_gib=value)
    assert Limits(grace_s=0).grace_s == 0
    with pytest.raises(ValueError, match="limit grace_s must be at least 0"):
        Limits(grace_s=-1)


def test_places_for_failed_scans_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, said in (
        (("--keep-failed", tmp_path / "file"), "failed scans cannot be kept in"),
        (("--keep-failed", tmp_path, "--keep-failed-gib", -1), "the room for failed scans must be above 0"),
        (("--keep-failed", tmp_path, "--keep-failed-gib", "nan"), "the room for failed scans must be above 0"),
    ):
        assert main(["serve", "--port", "0", "--method", "cg", *map(str, arguments)]) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"slicediff: {said}")


@pytest.mark.parametrize(
    "host,reachable", [("localhost", ["127.0.0.1"]), ("::", ["127.0.0.1", "::1"]), ("::1", ["::1"])]
)
def test_addresses(host, reachable, prior):
    try:
        server = Server((host, 0), FAST, lambda options: prior)
    except AddressError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for address in reachable:
            with ClientPeer((address, server.server_address[1])) as peer:
                assert peer.talk(None) == ([], [])
        server.shutdown()


def test_a_moment_without_descriptors_ends_no_address(prior, monkeypatch, caplog):
    both = ("127.0.0.1", "127.0.0.2")
    resolve = lambda host, port: [(socket.AF_INET, (address, port)) for address in both]
    monkeypatch.setattr("gadgets.address.resolve", resolve)
    troubles, accept = [errno.EMFILE] * 3 + [errno.ECONNABORTED], socket.socket.accept

    def flaky(listener):
        if troubles:
            listener.settimeout(0.05)  # the listener of the other address waits for ever
            raise OSError(troubles.pop(), "no descriptor")
        listener.settimeout(None)
        return accept(listener)

    with Server(("both", 0), FAST, lambda options: prior) as server:
        monkeypatch.setattr(socket.socket, "accept", flaky)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for address in ("127.0.0.2", "127.0.0.1") * 3:
            with ClientPeer((address, server.server_address[1])) as peer:
                assert peer.talk(None) == ([], [])
        server.shutdown()
    assert troubles == [] and "could not be taken" in caplog.text


def test_log_lines_tell_whose_scan_it_is(scan_path, prior, caplog):
    """By the thread's name, also of what is computed in other threads; an image that was cut short leaves a line."""
    caplog.set_level(logging.INFO, "slicediff")
    with running(FAST | {"sweeps": 900, "deadline_s": 2.0, "method": "diffusion"}, lambda options: prior) as server:
        with ClientPeer(server.server_address) as peer, ScanFile(scan_path) as scan:
            name = "{}:{}".format(*peer.sock.getsockname())
            peer.talk(scan)
        while server.talking:
            time.sleep(0.01)
    of_scan = [record for record in caplog.records if "connection from" not in record.message]
    assert {record.threadName for record in of_scan} == {name}
    warnings = [record.message for record in of_scan if record.levelno == logging.WARNING]
    assert any("stopped at the deadline of 2 s" in message for message in warnings)


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return reply.read().decode()


def test_health_page_and_metrics(scan_path, prior):
    with running(FAST, lambda options: prior) as server, HealthPage(("127.0.0.1", 0), server.health) as page:
        client(server, scan_path)
        client(server, scan_path, "nonesuch")
        port = page.server_address[1]
        assert until(lambda: server.counts.done and server.counts.failed)  # counted once the last byte has arrived
        facts = json.loads(get(port, "/healthz"))
        assert all(json.loads(get(port, path))["ready"] for path in ("/healthz?x=1", "/healthz/"))
        server.counts.add(open=server.limits.connections)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(port, "/healthz")
        server.counts.add(open=-server.limits.connections)
        assert facts["ready"] and facts["device"] == "cpu"
        assert facts["scans"]["done"] == 1 and facts["scans"]["failed"] == 1
        metrics = get(port, "/metrics")
        assert re.search(r'(?m)^slicediff_scans_total\{outcome="done"\} 1.0$', metrics)
        assert re.search(r"(?m)^slicediff_rss_mib \d", metrics)
        server.retiring.set()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(port, "/healthz")
        page.shutdown()
        page.server_close()


@pytest.mark.parametrize(
    "host,reachable", [("localhost", ["127.0.0.1"]), ("::", ["127.0.0.1", "[::1]"]), ("::1", ["[::1]"])]
)
def test_health_page_is_on_the_addresses_of_the_server(host, reachable, monkeypatch):
    """And asks no DNS for the host's name, which may take long to answer."""
    monkeypatch.setattr("socket.getfqdn", lambda *_: pytest.fail("the DNS was asked"))
    monkeypatch.setattr("socket.gethostbyaddr", lambda *_: pytest.fail("the DNS was asked"))
    try:
        page = HealthPage((host, 0), lambda: {"ready": True})
    except AddressError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with page:
        for address in reachable:
            request = urllib.request.Request(f"http://{address}:{page.server_address[1]}/healthz", method="HEAD")
            with urllib.request.urlopen(request, timeout=10) as reply:
                assert (reply.status, reply.read()) == (200, b"")
        page.shutdown()
        page.server_close()


def test_a_probe_that_goes_away_is_no_event(caplog, capfd):
    page = HealthPage(("127.0.0.1", 0), lambda: {"ready": True, "scans": {}})
    try:
        with caplog.at_level(logging.DEBUG, "slicediff"):
            probe = socket.create_connection(page.server_address)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
            probe.send(b"GET ")
            probe.close()
            end = time.monotonic() + 10
            while "could not answer" not in caplog.text and time.monotonic() < end:
                time.sleep(0.02)
    finally:
        page.shutdown()
        page.server_close()
    assert [r.levelno for r in caplog.records] == [logging.DEBUG] and capfd.readouterr().err == ""


@pytest.mark.parametrize("adapt, loaded", [(20, True), (0, False)])
def test_a_warm_server_has_loaded_what_learning_needs(adapt, loaded):
    """A process's first optimiser takes torch seconds.

    No patient shall wait for them, and nobody who does not learn.
    """
    code = f"""if True:
        import sys
        from gadgets.options import make_options
        from gadgets.solve import load_prior_for, warm_up
        options = make_options({{"device": "cpu", "adapt": {adapt}}})
        warm_up(load_prior_for(options), options)
        print("torch._dynamo" in sys.modules)"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == [str(loaded)]


def test_metrics_without_their_package_are_a_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["serve", "--port", "0", "--method", "cg", "--health-port", "0"]) == 1
    said = "slicediff: --health-port needs the package prometheus-client: pip install 'gadgetron-slicediff[metrics]'"
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


def test_failed_scans_are_kept_oldest_removed_first(scan_path, prior, tmp_path):
    with ScanFile(scan_path) as scan:
        header, lines = scan.header_xml, list(scan.acquisitions())
    place = FailedScans(tmp_path)
    kept = []
    for _ in range(3):
        recording = place.record(header)
        for line in lines:
            recording.add(line)
        kept.append(recording.keep())
        time.sleep(0.02)
    assert same_images(run_chain(kept[0], prior), run_chain(scan_path, prior))
    FailedScans(tmp_path, 2.5 * kept[0].stat().st_size / 2**30).prune()
    assert sorted(tmp_path.iterdir()) == sorted(kept[1:])
    assert {path.stat().st_mode & 0o777 for path in kept[1:]} == {0o600}
    tiny = FailedScans(tmp_path, 1e-6).record(header)
    for line in lines:
        tiny.add(line)
    assert tiny.keep() is None and not list(tmp_path.glob("*.spool"))


@pytest.mark.parametrize(
    "name, text, limits, said",
    [
        ("nonesuch", None, {}, "unknown configuration"),
        ("default", "{not JSON", {}, "JSON"),
        ("default", None, {"max_gib": 1e-6}, "--max-gib"),
    ],
)
def test_a_scan_that_is_refused_at_once_is_kept_all_the_same(scan_path, prior, tmp_path, name, text, limits, said):
    with running(FAST, lambda options: prior, keep=FailedScans(tmp_path), **limits) as server:
        with ClientPeer(server.server_address) as peer, ScanFile(scan_path) as scan:
            images, texts = peer.talk(scan, name, text)
    assert not images and any(said in said_text for said_text in texts)
    end = time.monotonic() + 10
    while not (kept := list(tmp_path.glob("failed-*.h5"))) and time.monotonic() < end:
        time.sleep(0.02)
    (kept,) = kept
    assert same_images(run_chain(kept, prior), run_chain(scan_path, prior))


def test_raw_data_are_for_the_servers_user_alone(scan_path, tmp_path, monkeypatch):
    """Their headers tell who the patient is: while the scan runs, while it is converted, and when it was kept."""
    place = FailedScans(tmp_path / "kept")
    with ScanFile(scan_path) as scan:
        recording = place.record(scan.header_xml)
        for line in scan.acquisitions():
            recording.add(line)
    private = lambda: [path.stat().st_mode & 0o077 for path in (tmp_path / "kept").rglob("*")]
    assert private() and not any(private())
    append, during = ScanWriter.append, []
    monkeypatch.setattr(ScanWriter, "append", lambda writer, line: during.extend(private()) or append(writer, line))
    recording.keep()
    assert during and not any(during)
    assert len(list((tmp_path / "kept").glob("failed-*.h5"))) == 1 and not any(private())


def test_running_recordings_share_the_room(scan_path, tmp_path):
    """What does not fit is given up, and makes room for others."""
    with ScanFile(scan_path) as scan:
        header, lines = scan.header_xml, list(scan.acquisitions())
    place = FailedScans(tmp_path, 1.5 * sum(len(line.to_bytes()) for line in lines) / 2**30)
    first, second = place.record(header), place.record(header)
    for line in lines:
        first.add(line)
    for line in lines:
        second.add(line)
    assert second.keep() is None and first.keep() is not None
    third = place.record(header)
    for line in lines:
        third.add(line)
    assert third.keep() is not None and place.count(0) == 0


def test_a_kill_in_the_middle_of_the_conversion_leaves_nothing_behind_for_good(scan_path, tmp_path, monkeypatch):
    """The next start converts again, into the same place; meanwhile the scan is locked for other servers."""

    def killed(*_):
        FailedScans(tmp_path).recover()  # another server starts
        assert not list(tmp_path.glob("failed-*"))
        raise KeyboardInterrupt

    with ScanFile(scan_path) as scan:
        recording, lines = FailedScans(tmp_path).record(scan.header_xml), list(scan.acquisitions())
    for line in lines:
        recording.add(line)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gadgets.scan_files.ScanWriter.append", killed)
        # a kill closes no more than this
        patch.setattr("gadgets.keep.Recording._close", lambda self: self.file.close())
        recording.keep()
    assert {path.suffix for path in tmp_path.iterdir()} == {".spool", ".partial"}
    free = lambda folder: SimpleNamespace(free=0 if list(tmp_path.glob("*.partial")) else 1 << 30)
    monkeypatch.setattr("gadgets.keep.shutil.disk_usage", free)  # what is left of the first conversion takes the room
    FailedScans(tmp_path).recover()
    (found,) = tmp_path.iterdir()
    with ScanFile(found) as kept:
        assert len(kept) == len(lines)


def test_a_clock_that_was_put_back_removes_no_new_scan(scan_path, tmp_path):
    with ScanFile(scan_path) as scan:
        header, lines = scan.header_xml, list(scan.acquisitions())
    kept = []
    for _ in range(2):
        place = FailedScans(tmp_path, 1.5 * kept[0].stat().st_size / 2**30 if kept else 1.0)
        for path in kept:
            os.utime(path, (time.time() + 86400,) * 2)
        recording = place.record(header)
        for line in lines:
            recording.add(line)
        kept.append(recording.keep())
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == kept[1:]


def test_old_scans_are_removed_by_several_threads_at_once(tmp_path):
    place = FailedScans(tmp_path, 1e-9)
    for round in range(5):
        for number in range(50):
            (tmp_path / f"failed-{number}.h5").write_bytes(b"123")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: place.prune(), range(4)))  # raises what any of them raised
        assert not list(tmp_path.iterdir())


def test_what_a_killed_server_left_behind_is_found_and_what_runs_is_let_be(scan_path, tmp_path):
    """Whatever the process ids: a server in a container always has the same."""
    with ScanFile(scan_path) as scan:
        running, killed = (FailedScans(tmp_path).record(scan.header_xml) for _ in range(2))
        for line in scan.acquisitions():
            running.add(line)
            killed.add(line)
    killed.file.close()
    FailedScans(tmp_path).recover()
    (found,) = tmp_path.glob("failed-*.h5")
    assert [path.name for path in tmp_path.glob("*.spool")] == [running.path.name]
    with ScanFile(scan_path) as scan, ScanFile(found) as kept:
        assert [bytes(a.getHead()) for a in kept.acquisitions()] == [bytes(a.getHead()) for a in scan.acquisitions()]
    running.drop()


def recorded(place, scan_path):
    """A recording of the whole scan."""
    with ScanFile(scan_path) as scan:
        recording = place.record(scan.header_xml)
        for line in scan.acquisitions():
            recording.add(line)
    return recording


def test_a_folder_that_becomes_read_only_or_a_file_disturbs_no_scan(scan_path, tmp_path, monkeypatch, caplog):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    place = FailedScans(tmp_path / "kept")
    first, second = recorded(place, scan_path), recorded(place, scan_path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", refused)
        first.drop()
        patch.setattr("builtins.open", refused)
        assert second.keep() is None and place.record(b"<header/>").keep() is None
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert "could not be removed: Read-only file system" in caplog.text
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "kept").touch()
    assert recorded(place, scan_path).keep() is None and place.count(0) == 0


def test_a_scan_whose_raw_data_cause_trouble_leaves_no_connection(scan_path, prior, tmp_path, monkeypatch, caplog):
    def trouble(recording):
        recording._close()
        raise RuntimeError("trouble with the disk")

    monkeypatch.setattr("gadgets.keep.Recording.drop", trouble)
    monkeypatch.setattr("gadgets.keep.Recording.keep", trouble)
    with running(FAST, lambda options: prior, keep=FailedScans(tmp_path)) as server:
        assert len(client(server, scan_path)[0]) == 2 and client(server, scan_path, "nonesuch")[0] == []
        end = time.monotonic() + 10
        while server.talking and time.monotonic() < end:
            time.sleep(0.02)
        assert not server.talking and caplog.text.count("trouble with the disk") >= 2


def until(happened, longest_s=10.0):
    """Wait for it, then return it."""
    end = time.monotonic() + longest_s
    while not (what := happened()) and time.monotonic() < end:
        time.sleep(0.02)
    return what


def test_images_that_never_reached_the_peer_are_no_success(scan_path, prior, tmp_path, caplog):
    """Though this machine had taken them to be sent."""
    caplog.set_level(logging.INFO, "slicediff")
    with (
        running(FAST, lambda options: prior, keep=FailedScans(tmp_path)) as server,
        ScanFile(scan_path) as scan,
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(server.server_address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        with Wire(sock, 20) as wire:
            wire.send_config_file("default")
            wire.send_header(scan.header_xml)
            for line in scan.acquisitions():
                wire.send_item(line)
            wire.close()
            assert until(lambda: "2 images sent" in caplog.text)
            time.sleep(0.1)  # past the last write
        sock.close()
        assert until(lambda: list(tmp_path.glob("failed-*.h5")))
        assert (server.counts.done, server.counts.failed) == (0, 1)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    (warning,) = (message for message in warnings if "kept" not in message)
    assert "ended early: the peer went away before it had taken everything" in warning


def test_raw_data_are_dropped_once_the_images_have_arrived(scan_path, prior, tmp_path):
    """Also while the peer keeps its connection open, or is slow to read."""
    with (
        running(FAST, lambda options: prior, keep=FailedScans(tmp_path)) as server,
        ScanFile(scan_path) as scan,
        ClientPeer(server.server_address) as peer,
    ):
        peer._send(scan, "default", None, None, True)
        time.sleep(0.5)
        assert [kind for kind, _ in peer.wire.messages()].count(IMAGE) == 2
        assert until(lambda: not list(tmp_path.iterdir())) and server.talking
        assert (server.counts.done, server.counts.failed) == (1, 0)


@pytest.mark.parametrize(
    "steps, counted, kept",
    [
        ([], (0, 0, 1), True),  # forgotten: no success
        (["leave"], (0, 0, 1), True),
        (["leave", "leave", True, False], (0, 1, 0), False),
        ([False, "leave", True], (0, 0, 1), True),
    ],
)
def test_a_scan_is_counted_once_by_what_ends_it_first(scan_path, tmp_path, steps, counted, kept):
    visit = Visit(Counts(), FailedScans(tmp_path))
    visit.end(well=False)
    visit.leave()
    assert (visit.counts.open, visit.counts.done, visit.counts.failed) == (0, 0, 0), "there was no scan"
    with ScanFile(scan_path) as scan:
        record = visit.begin(scan.header_xml)
        record(next(scan.acquisitions()))
    assert visit.counts.open == 1
    for step in steps:
        visit.leave() if step == "leave" else visit.end(well=step)
        assert visit.counts.open == 0
    visit.close()
    assert (visit.counts.open, visit.counts.done, visit.counts.failed) == counted
    assert [path.suffix for path in tmp_path.iterdir()] == [".h5"] * kept


@pytest.mark.parametrize(
    "config",
    ["nonesuch", '<?xml version="1.0"?>\n<configuration><property name="sweeps" value="x"/></configuration>'],
    ids=["client", "Gadgetron"],
)
def test_a_refused_scan_gives_up_its_place_at_once(scan_path, prior, config):
    """And not when its peer has sent the rest of it."""
    with (
        running(FAST, lambda options: prior, connections=1) as server,
        ScanFile(scan_path) as scan,
        ClientPeer(server.server_address) as peer,
    ):
        (peer.wire.send_config if "<" in config else peer.wire.send_config_file)(config)
        peer.wire.send_header(scan.header_xml)
        peer.wire.send_item(next(scan.acquisitions()))
        assert until(lambda: server.counts.failed) and server.health()["ready"]
        assert len(client(server, scan_path)[0]) == 2
        peer.wire.close()
        (said,) = (text for _, text in peer.wire.messages())
        assert "unknown configuration" in said or "option 'sweeps'" in said


def test_a_peer_that_dribbles_is_let_go_and_a_full_server_is_not_ready(prior, monkeypatch):
    with running(FAST, lambda options: prior, idle_s=0.6) as server, ClientPeer(server.server_address) as peer:
        monkeypatch.setattr("gadgets.server.SPARE", 1 - server.limits.connections)
        assert until(lambda: server.talking) and not server.health()["ready"]
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < began + 20:
                peer.sock.sendall(b"\1" if time.monotonic() < began + 0.05 else b"\0")
                time.sleep(0.05)
        assert time.monotonic() - began < 10 and until(lambda: not server.talking) and server.health()["ready"]


def test_a_hundred_peers_at_once_are_all_answered(prior):
    """Also while the server is too busy to accept them: the kernel keeps them until it does."""
    server = Server(("127.0.0.1", 0), FAST, lambda options: prior)
    with contextlib.ExitStack() as stack:
        peers = [socket.create_connection(server.server_address, 2) for _ in range(100)]
        wires = [stack.enter_context(Wire(stack.enter_context(peer), 20)) for peer in peers]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert until(lambda: len(server.talking) == 100)
        for wire in wires:
            with contextlib.suppress(OSError):  # the last ones are refused
                wire.send_query("gadgetron::info")
                wire.close()
        said = [str([item for _, item in wire.messages()]) for wire in wires]
        server.shutdown()
        server.server_close()
    answered = sum("gadgetron-slicediff" in text for text in said)
    assert answered >= 96 and answered + sum("connections already: try again" in text for text in said) == 100


def test_texts_before_the_header_are_bounded(prior, monkeypatch):
    monkeypatch.setattr("gadgets.wire.MAX_TEXT_BYTES", 1 << 20)
    with running(FAST, lambda options: prior) as server, ClientPeer(server.server_address) as peer:
        peer.wire.send_config_file("default")
        for _ in range(3):
            peer.wire.send_text("x" * 500_000)
        peer.wire.close()
        assert [item for _, item in peer.wire.messages()] == ["ERROR: more than 1 MiB of texts came before the header"]


def test_who_has_only_sent_a_header_hears_of_a_shutdown(scan_path, prior):
    with running(FAST, lambda options: prior, grace_s=0) as server, ScanFile(scan_path) as scan:
        with ClientPeer(server.server_address) as peer:
            peer.wire.send_config_file("default")
            peer.wire.send_header(scan.header_xml)
            assert until(lambda: server.counts.open)
            threading.Thread(target=server.retire).start()
            (said,) = (item for _, item in peer.wire.messages())
    assert said == "ERROR: this server is shutting down: come again when it is back"


def test_why_an_idle_connection_is_closed_is_told(prior):
    with running(FAST, lambda options: prior, idle_s=0.3) as server, ClientPeer(server.server_address) as peer:
        peer.wire.send_config_file("default")
        ((_, text),) = peer.wire.messages()
        assert text in (
            "ERROR: no configuration and header came within 0.3 s",
            "ERROR: the peer sent nothing for 0.3 s",
        )
    with running(FAST, lambda options: prior, grace_s=0) as server, ClientPeer(server.server_address) as peer:
        peer.wire.send_config_file("default")
        assert until(lambda: server.talking)
        threading.Thread(target=server.retire).start()
        ((_, text),) = peer.wire.messages()
        assert text == "ERROR: this server is shutting down: come again when it is back"


def test_who_goes_on_sending_hears_of_a_shutdown(scan_path, prior, monkeypatch):
    """Faster than the server reads, or only since the shutdown began: the stream ends with a sentence and a CLOSE."""
    monkeypatch.setattr("gadgets.server.LAST_WORDS_S", 3.0)
    said = {"early": [], "late": []}

    def go_on_sending(name):
        with ClientPeer(server.server_address) as peer, ScanFile(scan_path) as scan:
            lines = [line.to_bytes() for line in scan.acquisitions()]
            block = b"".join(struct.pack("<H", ACQUISITION) + line for line in lines)

            def send():
                peer.wire.send_config_file("default")
                peer.wire.send_header(scan.header_xml)
                with contextlib.suppress(OSError):
                    while True:
                        peer.sock.sendall(block)

            threading.Thread(target=send, daemon=True).start()
            said[name] += [item for _, item in peer.wire.messages()]  # raises if there is no CLOSE
            said[name].append("closed")

    with running(FAST, lambda options: prior, grace_s=0.1) as server:
        early, late = (threading.Thread(target=go_on_sending, args=(name,)) for name in said)
        early.start()
        assert until(lambda: server.counts.open)
        server.counts.add(open=1)  # another one, which takes its time
        retiring = threading.Thread(target=server.retire)
        retiring.start()
        early.join(10)
        late.start()
        late.join(10)
        server.counts.add(open=-1)
        retiring.join(10)
    assert said["early"][-1] == said["late"][-1] == "closed"
    assert "because the server is shutting down" in said["early"][-2] and "is shutting down" in said["late"][-2]


@pytest.fixture
def slow_preview(monkeypatch):
    """CG-SENSE that does not come to its end."""
    hangs, prepare = threading.Event(), recon._prepare
    monkeypatch.setattr(recon, "_prepare", lambda *how, **more: hangs.wait(20) and prepare(*how, **more))
    monkeypatch.setattr("gadgets.solve.LAST_LOOK_S", 0.3)
    yield hangs
    hangs.set()


def talking(server, scan_path, results):
    """A thread in which a client sends a scan; `results` gets (images, texts)."""
    thread = threading.Thread(target=lambda: results.append(client(server, scan_path)))
    thread.start()
    return thread


def test_who_computes_or_waits_is_told_when_the_time_is_over(scan_path, prior, slow_preview, monkeypatch):
    """Also in the middle of CG-SENSE; not every one in the queue gets a turn."""
    monkeypatch.setattr("gadgets.server.LAST_WORDS_S", 3.0)
    results = []
    with running(FAST, lambda options: prior, grace_s=0.1) as server:
        threads = [talking(server, scan_path, results) for _ in range(5)]
        assert until(lambda: server.turns.waiting == 4)
        server.retire()
        assert server.counts.open == 0
        for thread in threads:
            thread.join(10)
    said = sorted(texts[-1] for images, texts in results)
    assert len(said) == 5 and not any(images for images, _ in results)
    assert said[0] == "ERROR: stopped because the server is shutting down before its CG-SENSE image was ready"
    assert said[-1] == "ERROR: the scan was given up because the server is shutting down"


def test_a_peer_that_is_gone_does_not_hold_the_device_until_its_preview_is_ready(
    scan_path, prior, slow_preview, caplog
):
    with running(FAST, lambda options: prior) as server:
        with ScanFile(scan_path) as scan, ClientPeer(server.server_address) as peer:
            peer._send(scan, "default", None, None, True)
            assert until(lambda: server.turns.running)
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        assert until(lambda: not server.turns.running) and "stopped because the peer is gone" in caplog.text
        slow_preview.set()
        assert len(client(server, scan_path)[0]) == 2


@pytest.mark.parametrize("garbage", [b"", b"\3", b"\xff" * 1000, struct.pack("<I", 3) + b"<a>" + b"\xff" * 1000])
def test_what_is_left_behind_and_damaged_is_put_aside(scan_path, tmp_path, garbage, monkeypatch):
    """Without reading what it announces: gigabytes."""
    recorded(FailedScans(tmp_path), scan_path).file.close()
    bad = tmp_path / "scan-0-0.spool"
    bad.write_bytes(garbage)
    place, whole = FailedScans(tmp_path), len(garbage) > 1000
    tracemalloc.start()
    place.recover()
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert len(list(tmp_path.glob("failed-*.h5"))) == 1 + whole and not list(tmp_path.glob("*.spool"))
    assert [path.read_bytes() for path in tmp_path.glob("*.damaged")] == [garbage] * (not whole)


def test_what_cannot_be_opened_is_put_aside(tmp_path, monkeypatch, caplog):
    (tmp_path / "scan-0-0.spool").write_bytes(b"another user's")

    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refused)
    FailedScans(tmp_path).recover()
    assert [path.name for path in tmp_path.iterdir()] == ["scan-0-0.damaged"]
    assert caplog.text.count("Permission denied") == 1


def test_the_oldest_scans_make_room_on_a_full_disk(scan_path, tmp_path, monkeypatch, caplog):
    place = FailedScans(tmp_path)
    for number in range(3):
        (tmp_path / f"failed-{number}.h5").write_bytes(b"x" * 100_000)
        os.utime(tmp_path / f"failed-{number}.h5", (number + 1, number + 1))
    here = lambda: sorted(path.name for path in tmp_path.glob("failed-?.h5"))

    class FullOnce:
        def __init__(self, file):
            self.file, self.full = file, True

        def write(self, data):
            if self.full:
                self.full = False
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[: len(data) // 2 + 1])

        def close(self):
            self.file.close()

    with ScanFile(scan_path) as scan:
        recording, lines = place.record(scan.header_xml), list(scan.acquisitions())
    recording.file = FullOnce(recording.file)
    for line in lines:
        recording.add(line)
    assert here() == ["failed-1.h5", "failed-2.h5"] and recording.path.stat().st_size == recording.bytes
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000 if here() else 1 << 30))
    recording.file = recording.file.file
    kept = recording.keep()
    with ScanFile(kept) as scan:
        assert len(scan) == len(lines)
    assert here() == []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=300_000))
    kept.unlink()
    assert recorded(place, scan_path).keep() is None
    assert re.search(r"could not be kept: \d+ KiB are needed in .*, 293 KiB are free", caplog.text)


def test_a_recording_that_has_just_begun_is_not_taken_for_one_left_behind(tmp_path):
    place = FailedScans(tmp_path)
    (tmp_path / "scan-0-1.spool").touch()
    place.recover()
    assert [path.name for path in tmp_path.iterdir()] == ["scan-0-1.spool"]


def test_threads_that_still_compute_cannot_crash_the_exit(monkeypatch, caplog):
    ended = []
    monkeypatch.setattr("recon_core.ahead.end_at_once", ended.append)
    monkeypatch.setattr("gadgets.server.Server.serve_forever", lambda *_, **__: None)
    for computing in (False, True):

        def retire(server):
            server.counts.add(open=computing)
            server.talking.update([server] * computing)

        monkeypatch.setattr("gadgets.commands.serve._retire_on_signals", retire)
        assert main(["serve", "--port", "0", "--method", "cg"]) == 0 and ended == [0] * computing
    assert caplog.text.count("scans that did not end in time: 1") == 1


def test_an_exit_waits_for_no_scan_that_is_being_recovered(tmp_path, monkeypatch):
    """HDF5 would block it for ever; the next start begins again."""
    ended, over = [], threading.Event()
    monkeypatch.setattr("recon_core.ahead.end_at_once", ended.append)
    monkeypatch.setattr("gadgets.server.Server.serve_forever", lambda *_, **__: None)
    monkeypatch.setattr("gadgets.commands.serve._retire_on_signals", lambda server: None)
    monkeypatch.setattr("gadgets.keep.FailedScans.recover", lambda place: over.wait(20))
    assert main(["serve", "--port", "0", "--method", "cg", "--keep-failed", str(tmp_path)]) == 0 and ended == [0]
    over.set()


def test_health_is_a_command(prior, capsys):
    with running(FAST, lambda options: prior) as server:
        arguments = ["health", "--port", str(server.server_address[1])]
        assert main(arguments) == 0 and json.loads(capsys.readouterr().out)["ready"]
        server.retiring.set()
        assert main(arguments) == 1
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("slicediff: no server answers at 127.0.0.1 port")


def test_a_servers_health_cannot_steer_the_terminal(prior, capsys, monkeypatch):
    monkeypatch.setattr("gadgets.server.Handler.answer", lambda *_: '{"ready": true,\r "prior": "\x9b31m"}')
    with running(FAST, lambda options: prior) as server:
        assert main(["health", "--port", str(server.server_address[1])]) == 0
    assert capsys.readouterr().out == '{"ready": true, "prior": "\\u009b31m"}\n'


def test_a_peer_cannot_write_lines_of_its_own_into_the_log():
    try:
        raise RuntimeError("trouble\x1b[2J")
    except RuntimeError:
        failure = sys.exc_info()
    record = logging.LogRecord("slicediff", logging.INFO, "", 0, "it said %s", ("a\n2026 ERROR\x1b[31m b",), failure)
    message, *traceback = OneLine("%(levelname)s %(message)s").format(record).split("\n")
    assert message == "INFO it said a 2026 ERROR[31m b"
    assert traceback[1].startswith('  File "') and traceback[-1] == "RuntimeError: trouble[2J"


@pytest.mark.parametrize("answer", ["Gadgetron 4.7.2", "4", '{"version": "4.7.2"}'])
def test_the_health_of_another_server_is_not_known(prior, capsys, monkeypatch, answer):
    monkeypatch.setattr("gadgets.server.Handler.answer", lambda handler, question: answer)
    with running(FAST, lambda options: prior) as server:
        port = server.server_address[1]
        assert main(["health", "--port", str(port)]) == 1
    said = f"slicediff: the server at 127.0.0.1 port {port} is another one: it answered {answer!r}\n"
    assert capsys.readouterr() == ("", said)
