"""One scan over one connection: what the server and the external gadget do alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .wire import SCAN_ITEMS, Wire

log = logging.getLogger("slicediff")
PROGRESS_EVERY_S = 2.0


def run_scan(wire: Wire, header_xml: bytes, sources: list[Mapping[str, Any]], load_prior: Callable, notify: Callable[[str], None], first: tuple | None = None) -> int:
    """Reconstruct what `wire` brings and send the images; returns how many.

    Args:
        header_xml: ISMRMRD header.
        sources: option mappings, later ones winning.
        load_prior: options -> prior.
        notify: shows the peer a line of progress.
        first: a message that was read already.
    """
    from .header import parse_header
    from .options import make_options
    from .recon import reconstruct

    header, options = parse_header(header_xml), make_options(*sources)
    prior, sent = load_prior(options), 0
    for image in reconstruct(header, _items(wire, first), prior, options, Progress(notify)):
        wire.send_item(image)
        sent += 1
    log.info("%d images sent", sent)
    return sent


def _items(wire: Wire, first: tuple | None) -> Iterator:
    if first is not None and first[0] in SCAN_ITEMS:
        yield first[1]
    for kind, item in wire.messages():
        if kind in SCAN_ITEMS:
            yield item


def sentence(error: BaseException) -> str:
    """What went wrong in one line."""
    text = " ".join(str(error).split())
    expected = type(error).__module__.startswith(("gadgets", "recon_core")) or type(error) is ValueError
    return text if expected and text else f"internal error, {type(error).__name__}: {text or 'no message'}"


class Progress:
    """Turns reports of the reconstruction into few lines for the peer and the log."""

    def __init__(self, notify: Callable[[str], None]):
        self.notify, self.last = notify, time.monotonic()

    def __call__(self, stage: str, facts: dict) -> None:
        if stage == "sweep":
            if time.monotonic() - self.last < PROGRESS_EVERY_S and facts["sweep"] < facts["sweeps"]:
                return
            text = f"sweep {facts['sweep']}/{facts['sweeps']}"
        elif stage == "gathered":
            text = "k-space gathered, {} coils, matrix {} x {} x {} (z y x)".format(*facts["shape"])
        elif stage == "measured":
            text = "; ".join([f"{facts['coils']} virtual coils", "calibration {} x {}".format(*facts["acs"]), *facts["warnings"]])
        else:
            text = f"{stage} ready"
        self.last = time.monotonic()
        log.info(text)
        self.notify(text)
