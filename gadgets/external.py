"""Gadgetron's external gadget: started by <execute>, using the socket that Gadgetron's Python package connected.

Gadgetron takes an exception, an import error or a missing target for a successful scan without images. So nothing
is raised here: whatever fails, the input is drained and Gadgetron gets an ERROR message.
"""

from __future__ import annotations

import atexit
import logging

from recon_core.ahead import end_if_left_behind

from .failure import log_failure, sentence
from .wire import Wire

log = logging.getLogger("slicediff")


def slice_diffusion(connection) -> None:
    """Reconstruct the scan of one Gadgetron connection (after its handshake), which its owner closes."""
    atexit.register(end_if_left_behind, 0)
    with Wire(connection.socket.socket) as wire:
        answer_gadgetron(wire, connection.raw_bytes.config, connection.raw_bytes.header)


def answer_gadgetron(wire: Wire, config_xml: bytes, header_xml: bytes) -> None:
    """Run one scan for Gadgetron: send images and, if anything fails, one ERROR after draining the input.

    Does not send CLOSE.
    """
    try:
        from .chain import properties_of
        from .conversation import Host, run_scan  # imports torch: where that fails, Gadgetron is told, too
        from .options import from_a_peer

        run_scan(wire, header_xml, [from_a_peer(properties_of(config_xml))], Host(), lambda text: None)
    except Exception as error:  # the boundary: every failure must reach Gadgetron
        log_failure("the scan failed", error)
        wire.drain()
        try:
            wire.send_error(f"slice diffusion: {sentence(error)}")
        except OSError as gone:
            log.error("Gadgetron could not be told: %s", gone)
