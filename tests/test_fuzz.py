"""The reader against streams that lie: no crash but WireError, no hang, no more memory than what came."""

import functools
import io
import struct
import time
import tracemalloc

import ismrmrd
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadgets.wire import Wire, WireError

SETTINGS = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
KNOWN = [1, 2, 3, 4, 5, 6, 7, 8, 1008, 1022, 1026]


class Bytes:
    """A socket that holds its whole stream."""

    def __init__(self, data):
        self.data = data

    def settimeout(self, seconds):
        pass

    def makefile(self, mode, buffering):
        return io.BufferedReader(io.BytesIO(self.data), 4096)


def read_all(data):
    """Messages until the end or WireError, within limits of time and memory."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        count = sum(1 for _ in Wire(Bytes(data), max_bytes=64 << 20).messages())
    except WireError as error:
        assert "\n" not in str(error) and str(error)
        count = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < (16 << 20) + 8 * len(data), f"{peak} bytes for a stream of {len(data)}"
    assert time.monotonic() - began < 10
    return count


@functools.cache
def golden():
    """One message of each kind."""
    line = ismrmrd.Acquisition.from_array(np.ones((2, 8), np.complex64), np.ones((8, 2), np.float32))
    wave = ismrmrd.Waveform.from_array(np.ones((2, 5), np.uint32))
    image = ismrmrd.Image.from_array(np.ones((3, 4, 5), np.float32), transpose=False)
    image.meta = ismrmrd.Meta({"ImageComments": "x"})
    text = lambda kind, words: struct.pack("<HI", kind, len(words)) + words
    parts = [
        struct.pack("<H1024s", 1, b"default"),
        text(2, b"<configuration/>"),
        text(3, b"<h/>"),
        text(5, b"{}"),
        struct.pack("<HQQQ", 6, 0, 1, 2) + b"ok",
        struct.pack("<HQQ", 7, 1, 2) + b"ok",
        struct.pack("<HQ", 8, 2) + b"no",
        *(struct.pack("<H", kind) + item.to_bytes() for kind, item in ((1008, line), (1026, wave), (1022, image))),
    ]
    return b"".join(parts) + struct.pack("<H", 4)


def test_the_golden_stream_is_read():
    assert read_all(golden()) == 10


@SETTINGS
@given(st.binary(max_size=2000))
def test_random_bytes(data):
    read_all(data)


@SETTINGS
@given(st.sampled_from(KNOWN), st.binary(max_size=1500))
def test_random_bytes_behind_a_known_id(kind, data):
    read_all(struct.pack("<H", kind) + data)


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(golden()) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(changes):
    data = bytearray(golden())
    for place, value in changes:
        data[place] = value
    read_all(bytes(data))


@SETTINGS
@given(st.integers(0, len(golden())), st.integers(0, len(golden())), st.binary(max_size=20))
def test_cut_out_and_pushed_in_bytes(first, last, pushed):
    data = golden()
    read_all(data[: min(first, last)] + pushed + data[max(first, last) :])


@SETTINGS
@given(st.sampled_from(KNOWN), st.lists(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), min_size=0, max_size=600))
def test_extreme_numbers(kind, values):
    read_all(struct.pack("<H", kind) + bytes(values))
