"""One scan over one connection: what the server and the external gadget have in common."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from recon_core.ahead import Ahead

from .budget import worth_an_image
from .failure import ScanError, one_line
from .geometry import readouts
from .header import parse_header
from .options import OptionsError, make_options, options_from_json
from .recon import reconstruct
from .solve import load_prior_for
from .wire import CONFIG_FILE, CONFIG_TEXT, ERROR, HEADER, IMAGE, QUERY, SCAN_ITEMS, TEXT, Wire, WireError

log = logging.getLogger("slicediff")
PROGRESS_EVERY_S = 2.0


class Host:
    """The environment of a scan; by default a process that has the device to itself."""

    def load_prior(self, options):
        """The prior for these options; PriorError if it cannot be loaded."""
        return load_prior_for(options)

    def take_in(self, header) -> None:
        """Called once, before anything else of the scan; may refuse it with a ScanError."""

    def admit(self, coils: int, volumes: int) -> None:
        """May refuse, with a ScanError, to gather this many volumes at once."""

    def answer(self, question: str) -> str:
        """Reply to a query during a scan; "" if there is nobody to reply."""
        return ""

    def why_stop(self) -> str:
        """Reason to finish the scan early, or ""."""
        return ""

    @contextlib.contextmanager
    def hold_device(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Hold the device within the context; `tell` is called with the place in the queue while waiting."""
        yield


def run_scan(
    wire: Wire,
    header_xml: bytes,
    sources: list[Mapping[str, Any]],
    host: Host,
    notify: Callable[[str], None],
    first: tuple | None = None,
) -> int:
    """Reconstruct the scan read from `wire` and send the images; returns their number.

    A stream that breaks off is reconstructed from what arrived, if that is enough for an image; the error is raised
    after the images are sent.

    Args:
        header_xml: ISMRMRD header.
        sources: option mappings; later ones take precedence.
        host: loads priors, grants the device and memory.
        notify: shows the peer a line of progress.
        first: a message already read from `wire`.
    """
    header, intake, progress = parse_header(header_xml), Intake(wire, host, first, header_xml), Progress(notify)
    sent, readers = 0, []
    wire.readouts = readouts(header)
    host.take_in(header)
    options = make_options(*sources)
    prior = host.load_prior(options)

    def ahead(volumes):
        readers.append(Ahead(intake.worth_it(volumes), to_the_end=True))
        return readers[-1]

    def why_stop() -> str:
        return "because the peer is gone" if wire.gone() else host.why_stop()

    @contextlib.contextmanager
    def turn():
        with host.hold_device(progress.say):
            yield why_stop

    images = reconstruct(header, intake, prior, options, progress, turn, ahead, host.admit)
    try:
        for image in images:
            wire.send_item(image)
            sent += 1
    finally:
        images.close()  # releases the device before we wait for the rest of the input
        for reader in readers:
            reader.close()
    log.info("%d images sent", sent)
    if intake.cut:
        raise WireError(intake.cut)
    return sent


class Intake:
    """The scan's items as they arrive; they end if the stream breaks off, and `cut` then says why."""

    def __init__(self, wire: Wire, host: Host, first: tuple | None, header_xml: bytes):
        self.wire, self.host, self.first, self.cut = wire, host, first, ""
        self.header_xml = header_xml.rstrip(b"\0")
        self.images = 0
        self.late: set[str] = set()  # options that came when the scan had begun

    def __iter__(self) -> Iterator:
        begun = False
        try:
            for kind, item in itertools.chain([self.first] if self.first else [], self.wire.messages()):
                self.first = None  # else it would be kept as long as the scan
                self.images += kind == IMAGE
                if kind in SCAN_ITEMS:
                    begun = True
                    yield item
                elif kind == ERROR:
                    self.cut = f"the peer told of an error: {one_line(item).rstrip('. ')}"
                    return
                elif kind == HEADER and (begun or item.encode() != self.header_xml):
                    # another one, or a late one: the same one sent twice before the first line does no harm
                    self.cut = "a second header came before the scan was closed: what followed it was left out"
                    return
                elif kind == TEXT:
                    self._note_late(item)
                elif kind in (CONFIG_FILE, CONFIG_TEXT):
                    self.late.add("those of another configuration")
                elif kind == QUERY and (answer := self.host.answer(item[1])):
                    with contextlib.suppress(OSError):  # a peer that is gone is detected elsewhere
                        self.wire.send_response(item[0], answer)
        except WireError as error:
            self.cut = f"the scan was cut off {self.host.why_stop()}" if self.host.why_stop() else str(error)

    def _note_late(self, text: str) -> None:
        with contextlib.suppress(OptionsError):  # any other text is the host's own
            late = set(options_from_json(text)[0])
            if late - self.late:
                log.warning("options came after the first line and are not used: %s", ", ".join(sorted(late)))
            self.late |= late

    def worth_it(self, volumes: Iterator) -> Iterator:
        """The gathered volumes; of a scan that broke off, only those with enough lines for an image, with a warning.

        Raises:
            WireError: after the others, if a volume broke off before it had enough lines for an image.
        """
        poor = 0
        try:
            for gathered in volumes:
                if self.late:
                    late = ", ".join(sorted(self.late))
                    gathered.warnings.append(f"options came after the first line and were not used: {late}")
                if self.cut and not worth_an_image(gathered):
                    poor += 1
                    continue
                if self.cut:
                    lines = int(gathered.counts.sum())
                    gathered.warnings.append(
                        f"the scan broke off and was reconstructed from the {lines} lines that came ({self.cut})"
                    )
                yield gathered
        except ScanError as error:
            if self.images:
                error = ScanError(f"{error}; {self.images} images came, but raw data are needed")
            raise WireError(f"{self.cut}; {error}") if self.cut else error from None
        if poor:
            raise WireError(
                f"{self.cut}; the k-space centre had not come by then, "
                f"so there is no image of {poor} volume{'s' * (poor > 1)}"
            )


class Progress:
    """Condenses the reconstruction's reports into a few lines for the peer and the log."""

    def __init__(self, notify: Callable[[str], None]):
        self.notify, self.last = notify, time.monotonic()

    def __call__(self, stage: str, facts: dict) -> None:
        if "sweep" in facts:
            if time.monotonic() - self.last < PROGRESS_EVERY_S and facts["sweep"] < facts["sweeps"]:
                return
            text = f"{stage} {facts['sweep']}/{facts['sweeps']}"
        elif stage == "gathered":
            text = "k-space gathered, {} coils, matrix {} x {} x {} (z y x)".format(*facts["shape"])
        elif stage == "measured":
            calibration = "calibration {} x {}".format(*facts["acs"])
            text = "; ".join([f"{facts['coils']} virtual coils", calibration, *facts["warnings"]])
        else:
            text = f"{stage} ready"
        self.say(text)

    def say(self, text: str) -> None:
        """Show one line; a peer that is gone is detected elsewhere."""
        self.last = time.monotonic()
        log.info(text)
        with contextlib.suppress(OSError):
            self.notify(text)
