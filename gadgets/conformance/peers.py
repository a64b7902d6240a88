"""Cases of what peers do: correct peers of every kind, and failing ones; each returns what happened in a few words."""

from __future__ import annotations

import struct

import numpy as np

from . import peer as p
from .bench import Bench
from .case import case, expect, refused, same, told

# what a correct peer may do


@case("a scan written field by field from the format is understood; preview, then final image, both uint16, then CLOSE")
def golden_bytes(bench: Bench) -> str:
    answer = bench.scan()
    same(answer, bench)
    expect(answer.series == [1, 2], f"series {answer.series}")
    for head, attributes, pixels in answer.images:
        version, kind = struct.unpack_from("<HH", head)
        expect((version, kind) == (1, 1), f"image version {version}, pixel type {kind}")
        expect(
            struct.unpack_from("<I", head, 194)[0] == len(attributes),
            "the header holds another length of the attributes",
        )
        expect(
            len(pixels) == 2 * 20 * 24 * 22 and max(struct.unpack(f"<{len(pixels) // 2}H", pixels)) <= 4095,
            "pixels of another number or size",
        )
    return "2 images, series 1 and 2"


@case("bytes that come one at a time, then in odd pieces, make the same images", limit_s=20)
def dribble(bench: Bench) -> str:
    data, at, random = bench.opening() + b"".join(bench.messages) + p.close(), 40_000, np.random.default_rng(0)
    with bench.peer() as peer:
        for number in range(at):
            peer.send(data[number : number + 1])
        while at < len(data):
            piece = int(random.integers(1, 2000))
            peer.send(data[at : at + piece])
            at += piece
        same(peer.answer(), bench)
    return f"{len(data)} bytes, same images"


@case("Gadgetron's <connect>, a client and a FIRE host get the same images")
def every_front_end(bench: Bench) -> str:
    same(bench.scan(gadgetron=True), bench)
    with bench.peer() as peer:
        script = (
            '<configuration><version>2</version><stream><external><connect port="1"/>'
            '<configuration><property name="sweeps" value="2"/></configuration>'
            "</external></stream></configuration>"
        )
        head = p.text_message(p.HEADER, bench.header + b"\0")
        peer.send(p.text_message(p.CONFIG, script), head, *bench.messages, p.close())
        same(peer.answer(), bench)
    return "same images three times"


@case("a sending side closed after CLOSE, as in --from_stream, still gets its images")
def half_close(bench: Bench) -> str:
    with bench.peer() as peer:
        peer.send(bench.opening(), *bench.messages, p.close()).half_close()
        same(peer.answer(), bench)
    return "same images"


@case("queries are answered, health as JSON; a conversation without a scan ends with CLOSE")
def queries(bench: Bench) -> str:
    health = bench.health()
    expect(health["ready"] and {"device", "prior", "scans", "uptime_s", "rss_mib"} <= set(health), f"health {health}")
    with bench.peer() as peer:
        answer = peer.send(p.config_name("default"), p.close()).answer()
    expect(answer.closed and not answer.complaint, answer.complaint or "no CLOSE")
    return f"{health['device']}, prior {health['prior']}, {health['scans']['done']} scans done"


@case("two scans at once get the same images", limit_s=15)
def two_at_once(bench: Bench) -> str:
    with bench.peer() as one, bench.peer() as two:
        half = len(bench.messages) // 2
        for peer in (one, two):
            peer.send(bench.opening(), *bench.messages[:half])
        for peer in (two, one):
            peer.send(*bench.messages[half:], p.close())
        same(one.answer(), bench)
        same(two.answer(), bench)
    return "same images twice"


@case("who waits for the device is told the place in the queue", limit_s=20, needs="faults")
def line(bench: Bench) -> str:
    with bench.peer() as slow, bench.peer() as next_:
        slow.send(bench.opening(prior="test-slow", sweeps=2), *bench.messages, p.close())
        bench.wait_for(lambda: bench.health()["scans"]["running"] == 1, "the first scan computes")
        answer = next_.send(bench.opening(), *bench.messages, p.close()).answer()
        same(answer, bench)
        place = [text for text in answer.texts if "number 1 in the queue" in text]
        expect(bool(place), f"said: {answer.texts}")
        expect(len(slow.answer().images) == 2, "the slow scan lost its images")
    return place[0]


@case("a peer that reads nothing holds up nobody else", limit_s=15)
def slow_reader(bench: Bench) -> str:
    with bench.peer() as peer:
        peer.send(bench.opening(), *bench.messages, p.close())
        bench.check_next()
        same(peer.answer(), bench)
    return "the other scan passed it"


@case("fifty scans in a row: same images, memory and descriptors flat", limit_s=60)
def fifty_scans(bench: Bench) -> str:
    facts = []
    for number in range(50):
        same(bench.scan(gadgetron=bool(number % 2)), bench)
        facts.append(bench.health())
    floor = lambda name, part: min(f[name] for f in part)  # what is freed between scans does not count
    counted = ("rss_mib", "open_files", "threads")
    grown = {name: round(floor(name, facts[-20:]) - floor(name, facts[5:25]), 1) for name in counted}
    # MiB; a server not started by the suite has several heaps, which come and go
    most = 4 if bench.process is not None else 16
    flat = grown["rss_mib"] < most and grown["open_files"] <= 0 and grown["threads"] <= 0
    expect(flat, f"between scans 6-25 and 31-50 the least grew by {grown}")
    return (
        f"between scans 6-25 and 31-50 the least grew by {grown['rss_mib']:g} MiB, "
        f"{grown['open_files']} files, {grown['threads']} threads"
    )


# peers and networks that fail


@case("a peer killed in the middle of a message: counted as failed, nothing else", limit_s=10)
def killed_in_a_message(bench: Bench) -> str:
    return _killed(bench, bench.messages[100][:500])


@case("a peer killed between two messages: counted as failed, nothing else", limit_s=10)
def killed_between_messages(bench: Bench) -> str:
    return _killed(bench, b"")


def _killed(bench: Bench, rest: bytes) -> str:
    failed = bench.health()["scans"]["failed"]
    bench.peer().send(bench.opening(), *bench.messages[:100], rest).vanish()
    bench.wait_for(lambda: bench.health()["scans"]["failed"] == failed + 1, "the scan counts as failed")
    return "counted as failed"


@case("a connection on which nothing comes is let go after --idle-s, with a sentence", limit_s=10, needs="process")
def idle(bench: Bench) -> str:
    with bench.peer() as peer:
        return refused(peer.answer(), "sent nothing for 2 s")


@case("a cable pulled early in the scan: a sentence after --timeout-s", limit_s=10, needs="process")
def half_open(bench: Bench) -> str:
    with bench.peer() as peer:
        return refused(peer.send(bench.opening(), *bench.messages[:50]).answer(), "sent nothing for 2 s")


@case(
    "a cable pulled late in the scan: images of what came, with a warning, and a sentence", limit_s=15, needs="process"
)
def half_open_late(bench: Bench) -> str:
    with bench.peer() as peer:
        answer = peer.send(bench.opening(), *bench.messages[:-20]).answer()
    expect(answer.series == [1, 2] and "broke off" in answer.comment(), f"series {answer.series}")
    return "2 images; " + told(answer, "sent nothing for 2 s")


@case("another header late in the scan: images of what came, with a warning, and a sentence")
def second_header(bench: Bench) -> str:
    with bench.peer() as peer:
        answer = peer.send(bench.opening(), *bench.messages[:-20], bench.opening(), *bench.messages, p.close()).answer()
    expect(answer.series == [1, 2] and "broke off" in answer.comment(), f"series {answer.series}")
    return "2 images; " + told(answer, "a second header came")


@case("an error that the peer tells late in the scan: images of what came, with a warning, and a sentence")
def error_of_the_peer(bench: Bench) -> str:
    with bench.peer() as peer:
        error = struct.pack("<HQ", p.ERROR, 12) + b"no gradients"
        answer = peer.send(bench.opening(), *bench.messages[:-20], error, p.close()).answer()
    expect(answer.series == [1, 2] and "broke off" in answer.comment(), f"series {answer.series}")
    return "2 images; " + told(answer, "the peer told of an error: no gradients")


@case("a sending side closed early in the scan, without CLOSE: a sentence")
def cut_early(bench: Bench) -> str:
    with bench.peer() as peer:
        return refused(peer.send(bench.opening(), *bench.messages[:50]).half_close().answer(), "ended before its CLOSE")


@case("a sending side closed late in the scan, without CLOSE: images of what came, with a warning, and a sentence")
def cut_late(bench: Bench) -> str:
    with bench.peer() as peer:
        answer = peer.send(bench.opening(gadgetron=True), *bench.messages[:-20]).half_close().answer()
    expect(answer.series == [1, 2] and "broke off" in answer.comment(), f"series {answer.series}")
    return "2 images; " + told(answer, "ended before its CLOSE")
