"""ISMRMRD headers as XML: read tolerantly, passed on without what hangs other servers."""

from __future__ import annotations

import re

import ismrmrd

from .geometry import ScanError


def parse_header(xml: bytes | str):
    """ISMRMRD header object; ScanError if the XML is no such header."""
    text = strip_version(xml.encode() if isinstance(xml, str) else xml)
    try:
        return ismrmrd.xsd.CreateFromDocument(text)
    except Exception as error:  # xsdata raises a family of its own for malformed documents
        raise ScanError(f"the ISMRMRD header cannot be read: {' '.join(str(error).split())[:300]}") from error


def strip_version(xml: bytes) -> bytes:
    """Remove <version>: Gadgetron hangs on one that is not its own library's."""
    return re.sub(rb"\s*<(\w+:)?version>[^<]*</(\w+:)?version>", b"", xml.rstrip(b"\0"), count=1)
