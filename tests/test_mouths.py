"""The three mouths: same scan, same images; every failure told; the next scan works."""

import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_chain
from peers import ClientPeer, GadgetronPeer, run_execute, same_images

from gadgets.cli import main
from gadgets.client import SendError, ask, send_scan
from gadgets.conversation import Host, Intake
from gadgets.external import answer_gadgetron
from gadgets.image_files import read_images
from gadgets.scan_files import ScanFile
from gadgets.server import Server
from gadgets.solve import load_prior_for
from gadgets.wire import ACQUISITION, ERROR, HEADER, IMAGE, QUERY, RESPONSE, TEXT, Wire
from recon_core.prior import PriorError, save_prior

FAST = {"sweeps": 2, "device": "cpu"}


@pytest.fixture
def server(prior):
    with running(FAST, lambda options: prior) as server:
        yield server


class running:
    """A server in a thread."""

    def __init__(self, defaults, load_prior, **kwargs):
        self.server = Server(("127.0.0.1", 0), defaults, load_prior, **kwargs)

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self.server

    def __exit__(self, *exception):
        self.server.shutdown()
        self.thread.join(10)
        self.server.server_close()


@pytest.fixture(scope="module")
def expected(scan_path, prior):
    return run_chain(scan_path, prior, **FAST)


def client(server, path, name="default", **kwargs):
    with ScanFile(path) as scan, ClientPeer(server.server_address) as peer:
        return peer.talk(scan, name, **kwargs)


def gadgetron(server, path, config="", **kwargs):
    with socket.create_connection(server.server_address[:2]) as sock, ScanFile(path) as scan:
        peer = GadgetronPeer(sock)
        peer.run(scan, config, **kwargs)
    return peer


def test_preview_first_then_diffusion(expected):
    assert [i.image_series_index for i in expected] == [1, 2]
    assert [i.meta["GADGETRON_SeqDescription"] for i in expected] == ["_CG-SENSE preview", "_slice diffusion"]


def test_client_gets_the_same_images(server, scan_path, expected):
    images, texts = client(server, scan_path)
    assert same_images(images, expected)
    assert any("k-space gathered" in t for t in texts)


class Listed(Host):
    """A host with an answer."""

    def answer(self, question):
        return f"answer to {question}"


def test_what_comes_in_the_middle_of_a_scan(full):
    """A question is answered; an error or another header ends the scan, which is told."""
    header, lines, _ = full
    sent = []

    def intake(*messages):
        wire = SimpleNamespace(messages=lambda: iter(messages), send_response=lambda *reply: sent.append(reply))
        return Intake(wire, Listed(), None, b"once\0")

    line = (ACQUISITION, lines[0])
    asked = intake((HEADER, "once"), line, (QUERY, (7, "who?")), (TEXT, "hello"), line)
    assert len(list(asked)) == 2 and sent == [(7, "answer to who?")] and asked.cut == ""
    for message, said in (
        ((ERROR, "no \x1b[31mmore\r\n gradients\0."), "the peer told of an error: no [31mmore gradients"),
        ((HEADER, "next"), "a second header came before the scan was closed"),
    ):
        broken = intake(line, line, message, line)
        assert len(list(broken)) == 2 and broken.cut.startswith(said)
    another = intake((HEADER, "another"), line)
    assert list(another) == [] and another.cut.startswith("a second header came")


def test_answers_do_not_cut_into_what_is_being_sent():
    """Two threads, one connection: messages come out whole."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Wire(ours) as wire, Wire(theirs, timeout_s=20) as peer:

        def send(text):
            for _ in range(10):
                wire.send_text(text * 300_000)

        threads = [threading.Thread(target=send, args=(text,)) for text in "ab"]
        for thread in threads:
            thread.start()
        texts = [text for _, (_, text) in zip(range(20), peer.messages())]
        for thread in threads:
            thread.join()
    assert all(set(text) in ({"a"}, {"b"}) and len(text) == 300_000 for text in texts)


def test_our_own_client_gets_the_same_images(server, scan_path, expected):
    with ScanFile(scan_path) as scan:
        assert same_images(list(send_scan(scan, *server.server_address[:2], "default")), expected)


def test_gadgetrons_connect_gets_the_same_images(server, scan_path, expected):
    peer = gadgetron(server, scan_path)
    assert peer.closed and not peer.errors
    assert same_images(peer.images, expected)


def test_gadgetron_without_a_configuration_element(server, scan_path, expected):
    assert same_images(gadgetron(server, scan_path, None).images, expected)


def test_gadgetrons_execute_gets_the_same_images(scan_path, tmp_path, prior, expected, monkeypatch):
    save_prior(prior, tmp_path / "gauss.safetensors", {})
    monkeypatch.setenv("SLICEDIFF_PRIORS", str(tmp_path))
    properties = (
        '<property name="sweeps" value="2"/><property name="device" value="cpu"/><property name="prior" value="gauss"/>'
    )
    peer, code = run_execute(scan_path, properties)
    assert (code, peer.errors, peer.closed) == (0, [], True)
    assert [i.data.shape for i in peer.images] == [i.data.shape for i in expected]
    exact = run_chain(scan_path, load_gauss(tmp_path), **FAST)
    assert same_images(peer.images, exact)


def test_file_command_server_external_gadget_and_fire_give_the_same_images(scan_path, tmp_path, prior, monkeypatch):
    save_prior(prior, tmp_path / "gauss.safetensors", {})
    monkeypatch.setenv("SLICEDIFF_PRIORS", str(tmp_path))
    options = {"sweeps": 2, "device": "cpu", "prior": "gauss"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["recon", str(scan_path), str(tmp_path / "images.h5"), *words]) == 0
    of_file = read_images(tmp_path / "images.h5")
    properties = "".join(f'<property name="{name}" value="{value}"/>' for name, value in options.items())
    assert same_images(run_execute(scan_path, properties)[0].images, of_file)
    with running({}, load_prior_for) as server:
        assert same_images(gadgetron(server, scan_path, properties).images, of_file)
        assert same_images(client(server, scan_path, text=json.dumps({"parameters": options}))[0], of_file)
    assert len(of_file) == 2


def load_gauss(folder):
    from recon_core.prior import load_prior

    return load_prior(folder / "gauss.safetensors")


def test_options_by_property_preset_name_chain_and_host_text(server, scan_path):
    assert len(gadgetron(server, scan_path, '<property name="method" value="cg"/>').images) == 1
    assert len(client(server, scan_path, "fast")[0]) == 2
    assert len(client(server, scan_path, "slicediff_connect.xml")[0]) == 2
    assert len(client(server, scan_path, text='{"parameters": {"method": "zero-filled"}}')[0]) == 1


def test_wrong_property_is_refused_by_name(server, scan_path):
    peer = gadgetron(server, scan_path, '<property name="swweeps" value="2"/>')
    assert not peer.images and peer.closed
    assert len(peer.errors) == 1 and "unknown option 'swweeps'" in peer.errors[0]


def test_unknown_configuration_is_refused_by_name(server, scan_path, expected):
    images, texts = client(server, scan_path, "Generic_Cartesian_Grappa.xml")
    assert not images and texts[-1].startswith("ERROR: unknown configuration 'Generic_Cartesian_Grappa.xml'")
    assert same_images(client(server, scan_path)[0], expected)


def test_a_name_may_come_as_text(server, scan_path):
    """Some hosts send the name of a configuration where others send its XML."""
    for name, count in (("fast", 2), ("slicediff_connect.xml\0", 2), ("nonesuch", 0)):
        with (
            ScanFile(scan_path) as scan,
            socket.create_connection(server.server_address[:2]) as sock,
            Wire(sock, 60) as wire,
        ):
            wire.send_config(name)
            wire.send_header(scan.header_xml)
            for line in scan.acquisitions():
                wire.send_item(line)
            wire.close()
            kinds = [kind for kind, _ in wire.messages()]
        assert kinds.count(IMAGE) == count


def test_a_hosts_own_parameters_are_left_aside_and_named(server, scan_path):
    parameters = '{"parameters": {"method": "cg", "sweps": 3, "config": "x", "\\ud83d": 1}}'
    images, texts = client(server, scan_path, text=parameters)
    assert len(images) == 1
    assert texts[0] == r"parameters that are not options of this plugin were ignored: config, sweps, \ud83d"


@pytest.mark.parametrize("before", ["text", "query", "header"])
def test_options_in_text_count_until_the_first_line(server, scan_path, before):
    """Whatever comes before them; what comes later is told in the image's comment."""
    with (
        ScanFile(scan_path) as scan,
        socket.create_connection(server.server_address[:2]) as sock,
        Wire(sock, 60) as wire,
    ):
        wire.send_config_file("default")
        if before == "text":
            wire.send_text('{"parameters": {"method": "cg"}}')
        wire.send_header(scan.header_xml)
        if before == "query":
            wire.send_query("gadgetron::info", 9)
        if before == "header":
            wire.send_header(scan.header_xml)
        if before == "text":
            wire.send_text('{"parameters": {"output": "float32"}}')
        else:
            wire.send_text('{"parameters": {"method": "cg", "output": "float32"}}')
        for number, line in enumerate(scan.acquisitions()):
            wire.send_item(line)
            if number == 5:
                wire.send_text('{"parameters": {"output": "complex64", "theirs": 1}}')
                wire.send_text("hello")
        wire.close()
        messages = list(wire.messages())
    (image,) = (item for kind, item in messages if kind == IMAGE)
    assert image.data.dtype == "float32" and image.image_series_index == 2
    assert "options came after the first line and were not used: output" in image.meta["ImageComments"]
    assert any(kind == TEXT and "were not used: output" in item for kind, item in messages)
    assert (RESPONSE in [kind for kind, _ in messages]) == (before == "query")


def test_a_hosts_own_texts_and_a_late_configuration_cost_no_scan(server, scan_path, expected):
    with ClientPeer(server.server_address) as peer, ScanFile(scan_path) as scan:
        peer.wire.send_config_file("default")
        peer.wire.send_text("scan of \x1b the day")
        peer.wire.send_header(scan.header_xml)
        peer.wire.send_text("")
        peer.wire.send_config_file("fine")
        for line in scan.acquisitions():
            peer.wire.send_item(line)
        peer.wire.close()
        messages = list(peer.wire.messages())
    images = [item for kind, item in messages if kind == IMAGE]
    assert [np.array_equal(a.data, b.data) for a, b in zip(images, expected)] == [True, True]
    said = [item for kind, item in messages if kind == TEXT][:2]
    assert said == [
        f"this text holds no options, which are a JSON object: {it!r}" for it in ("scan of \x1b the day", "")
    ]
    assert "were not used: those of another configuration" in images[0].meta["ImageComments"]


def test_images_instead_of_raw_data_are_told(server, scan_path, expected):
    with (
        ScanFile(scan_path) as scan,
        socket.create_connection(server.server_address[:2]) as sock,
        Wire(sock, 60) as wire,
    ):
        wire.send_config_file("default")
        wire.send_header(scan.header_xml)
        for image in expected:
            wire.send_item(image)
        wire.close()
        ((_, text),) = wire.messages()
    assert text.startswith("ERROR: the scan holds no imaging line")
    assert text.endswith("2 images came, but raw data are needed")


def test_a_client_is_told_at_once_what_is_refused(server, scan_path):
    """Not after the scan, which a client may take minutes to send."""
    with (
        ScanFile(scan_path) as scan,
        socket.create_connection(server.server_address[:2]) as sock,
        Wire(sock, 10) as wire,
    ):
        wire.send_config_file("nonesuch")
        wire.send_header(scan.header_xml)
        messages = wire.messages()
        assert next(messages)[1].startswith("ERROR: unknown configuration 'nonesuch'")
        for line in scan.acquisitions():
            wire.send_item(line)
        wire.close()
        assert list(messages) == []


def test_idle_connections_have_an_end(server, scan_path, expected, monkeypatch):
    monkeypatch.setattr("gadgets.server.SPARE", 2 - server.limits.connections)
    with socket.create_connection(server.server_address[:2]), socket.create_connection(server.server_address[:2]):
        while len(server.talking) < 2:
            time.sleep(0.01)
        with ClientPeer(server.server_address) as peer:
            assert list(peer.wire.messages()) == [(5, "ERROR: this server has 2 connections already: try again later")]
        with pytest.raises(SendError, match="did not answer the query .*: this server has [23] connections already"):
            ask(*server.server_address[:2], "slicediff::health")
    while server.talking:
        time.sleep(0.01)
    assert same_images(client(server, scan_path)[0], expected)


def test_a_probe_that_says_nothing_is_no_error(server, caplog):
    caplog.set_level(logging.WARNING, "slicediff")
    with socket.create_connection(server.server_address[:2]) as sock, sock.makefile("rb") as stream:
        sock.shutdown(socket.SHUT_WR)
        assert stream.read().endswith(struct.pack("<H", 4))
    assert caplog.records == []


def test_only_internal_errors_have_a_traceback(server, scan_path, caplog):
    client(server, scan_path, "nonesuch")
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "unknown configuration" in record.message and not record.exc_info


def test_what_cannot_be_imported_is_told_to_gadgetron(monkeypatch):
    """Which would take a gadget that ends at its imports for one that has no images."""
    monkeypatch.setitem(sys.modules, "gadgets.conversation", None)
    here, there = socket.socketpair()
    with here, there, Wire(here, 5) as wire, Wire(there, 5) as gadgetron:
        gadgetron.close()
        answer_gadgetron(wire, b"<configuration/>", b"")
        wire.close()
        ((kind, text),) = gadgetron.messages()
    said = "slice diffusion: internal error, ModuleNotFoundError: import of gadgets.conversation halted"
    assert kind == ERROR and text.startswith(said)


def test_who_sends_on_after_an_unknown_message_gets_the_sentence(scan_path):
    """As <execute> has it: the connection is closed at once.

    That resets it, and takes our last words along, if input is unread.
    """
    with ScanFile(scan_path) as scan:
        xml, lines = scan.header_xml, [struct.pack("<H", 1008) + line.to_bytes() for line in scan.acquisitions()]

    def gadget():
        sock, _ = listener.accept()
        with sock, Wire(sock) as wire:
            answer_gadgetron(wire, b"<configuration/>", xml)
            wire.close()

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        thread = threading.Thread(target=gadget)
        thread.start()
        sock.sendall(b"".join(lines[:30]) + struct.pack("<H", 1050))
        for line in lines[30:90]:
            sock.sendall(line)
            time.sleep(0.01)
        sock.sendall(struct.pack("<H", 4))
        with sock.makefile("rb") as stream:
            answer = stream.read()
        thread.join(10)
    assert b"received message id 1050" in answer and answer.endswith(struct.pack("<H", 4))


def test_truncated_stream_is_told_and_the_next_scan_works(server, scan_path, expected):
    images, texts = client(server, scan_path, lines=40, close=False)
    assert not images and "ended before its CLOSE" in texts[-1]
    peer = gadgetron(server, scan_path, cut_after=40)
    assert not peer.images and "ended before its CLOSE" in peer.errors[0]
    assert same_images(client(server, scan_path)[0], expected)


def test_aborted_scan_is_reconstructed_with_a_warning(server, scan_path):
    images, texts = client(server, scan_path, lines=200)
    assert len(images) == 2 and "incomplete" in images[1].meta["ImageComments"]
    assert any("incomplete" in t for t in texts)


def test_a_raising_solver_leaves_the_preview_and_a_sentence(scan_path, expected, prior):
    class Breaking:
        def __call__(self, x, sigma):
            raise RuntimeError("CUDA out of memory")

    priors = [Breaking()]
    with running(FAST, lambda options: priors[0]) as server:
        images, texts = client(server, scan_path)
        assert same_images(images, expected[:1])
        assert texts[-1].startswith("ERROR: ") and "CUDA out of memory" in texts[-1]
        peer = gadgetron(server, scan_path)
        assert same_images(peer.images, expected[:1]) and "CUDA out of memory" in peer.errors[0]
        with ScanFile(scan_path) as scan, pytest.raises(SendError, match="CUDA out of memory.*1 image was received"):
            list(send_scan(scan, *server.server_address[:2], "default"))
        server.priors.clear()
        priors[0] = prior
        assert same_images(client(server, scan_path)[0], expected)


def test_an_image_of_nan_is_not_sent(scan_path):
    with running(FAST, lambda options: lambda x, sigma: x * float("nan")) as server:
        images, texts = client(server, scan_path)
    assert len(images) == 1 and "NaN" in texts[-1]


def test_missing_weights_are_a_sentence(scan_path, other_scan_path):
    with running(FAST, missing_weights) as server:
        images, texts = client(server, scan_path)
        assert not images and texts[-1] == "ERROR: no prior 'gone'"
        assert len(client(server, other_scan_path, text='{"parameters": {"method": "cg"}}')[0]) == 1


def missing_weights(options):
    if options.method == "diffusion":
        raise PriorError("no prior 'gone'")
    return None


def test_missing_weights_reach_gadgetron(scan_path):
    peer, code = run_execute(scan_path, '<property name="prior" value="nowhere"/>')
    assert not peer.images and peer.closed and code == 0
    assert "no prior 'nowhere'" in peer.errors[0]


def test_no_peer_has_a_file_of_the_server_read(server, scan_path, tmp_path, expected):
    """Whichever way its options come, and whatever the file is; a FIFO would hold the scan for ever."""
    (tmp_path / "secret.yaml").write_text("password: hunter2")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, path in (("preset", tmp_path / "secret.yaml"), ("prior", tmp_path / "pipe.safetensors")):
        xml, text = f'<property name="{name}" value="{path}"/>', json.dumps({"parameters": {name: str(path)}})
        said = [*gadgetron(server, scan_path, xml).errors, client(server, scan_path, text=text)[1][-1]]
        with (
            ScanFile(scan_path) as scan,
            socket.create_connection(server.server_address[:2]) as sock,
            Wire(sock, 20) as wire,
        ):
            wire.send_config(
                "<gadgetronStreamConfiguration><external><execute name='gadgets'/>"
                f"<configuration>{xml}</configuration></external></gadgetronStreamConfiguration>"
            )
            wire.send_header(scan.header_xml)
            wire.close()
            said.append(list(wire.messages())[-1][1])
        assert len(said) == 3 and all("no preset" in text or "by its name only" in text for text in said)
        assert "hunter2" not in str(said)
    assert same_images(client(server, scan_path)[0], expected)


def test_execute_ends_when_gadgetron_dies(scan_path):
    """The stock connection would read for ever; ours tells what it can and goes."""
    peer, code = run_execute(scan_path, '<property name="method" value="cg"/>', cut_after=50)
    assert "ended before its CLOSE" in peer.errors[0]


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,
        struct.pack("<HI", 3, 5) + b"<xml>" + struct.pack("<H", 4),
        struct.pack("<H", 1008),
    ],
)
def test_garbage_is_answered_and_the_next_scan_works(server, noise, scan_path, expected):
    with socket.create_connection(server.server_address[:2]) as sock:
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(20)
        answer = b""
        while chunk := sock.recv(1 << 16):
            answer += chunk
    assert b"ERROR: " in answer and answer.endswith(b"\x04\x00")
    assert same_images(client(server, scan_path)[0], expected)


def test_queries_and_empty_conversations(server):
    with ClientPeer(server.server_address) as peer:
        peer.wire.send_query("gadgetron::info", 9)
        peer.wire.close()
        ((kind, (number, text)),) = peer.wire.messages()
        assert (kind, number) == (7, 9) and "slicediff" in text
    with ClientPeer(server.server_address) as peer:  # what the client does first when noise is a dependency
        assert peer.talk(None) == ([], [])


def test_a_silent_peer_is_let_go(prior, scan_path):
    with running(FAST, lambda options: prior, timeout_s=0.3) as server, ClientPeer(server.server_address) as peer:
        peer.wire.send_config_file("default")
        (message,) = list(peer.wire.messages())
        assert "sent nothing for 0.3 s" in message[1]


def test_two_clients_at_once(server, scan_path, other_scan_path, expected, prior):
    results = {}

    def send(path):
        results[path] = client(server, path)[0]

    threads = [threading.Thread(target=send, args=(path,)) for path in (scan_path, other_scan_path)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_images(results[scan_path], expected)
    assert same_images(results[other_scan_path], run_chain(other_scan_path, prior, **FAST))


def test_weights_are_loaded_once(scan_path, prior):
    loads = []
    with running(FAST, lambda options: loads.append(1) or prior) as server:
        for _ in range(3):
            client(server, scan_path)
    assert loads == [1]


def test_no_server_is_a_sentence(scan_path):
    with ScanFile(scan_path) as scan, pytest.raises(SendError, match="no server answers at 127.0.0.1 port 1"):
        list(send_scan(scan, "127.0.0.1", 1, "default"))


def test_a_server_that_sends_nothing_is_an_error(scan_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as stream:
                sock.sendall(struct.pack("<H", 4))
                sock.shutdown(socket.SHUT_WR)
                stream.read()

        threading.Thread(target=answer, daemon=True).start()
        with ScanFile(scan_path) as scan, pytest.raises(SendError, match="without sending an image"):
            list(send_scan(scan, *listener.getsockname(), "default"))


def test_deadline_returns_the_best_so_far(scan_path, prior):
    _, image = run_chain(scan_path, prior, sweeps=1000, deadline_s=2)
    assert "stopped at the deadline of 2 s after" in image.meta["ImageComments"]
