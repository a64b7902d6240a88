"""ISMRMRD headers as XML: read tolerantly, and passed on without what makes other servers hang."""

from __future__ import annotations

import re
import warnings
from dataclasses import is_dataclass

import ismrmrd
from xsdata.exceptions import ConverterWarning
from xsdata.formats.dataclass.parsers import XmlParser
from xsdata.formats.dataclass.parsers.config import ParserConfig

from .failure import ScanError

NAMESPACE = b'xmlns="http://www.ismrm.org/ISMRMRD"'
TOLERANT = ParserConfig(fail_on_unknown_properties=False)  # elements of a newer schema are ignored
NUMBERS = ("matrixSizeType", "fieldOfViewMm", "limitType", "accelerationFactorType")
# Converters leave unknown values empty.
MAY_BE_EMPTY = ("receiverChannels", "relativeReceiverNoiseBandwidth", "TE", "TI")
# Where text in place of a number matters, it is reported below.
warnings.filterwarnings("ignore", category=ConverterWarning)


def parse_header(xml: bytes | str):
    """ISMRMRD header object; ScanError if the XML is not an ISMRMRD header."""
    text = strip_version(xml.encode() if isinstance(xml, str) else xml)
    if b"<!DOCTYPE" in text:
        raise ScanError("the ISMRMRD header cannot be read: it has a document type, which may grow without end")
    try:
        header = XmlParser(config=TOLERANT).from_bytes(_as_utf8(text), ismrmrd.xsd.ismrmrdHeader)
    except Exception as error:  # xsdata has its own exception classes for malformed documents
        raise ScanError(f"the ISMRMRD header cannot be read: {_plain(error)}") from error
    _check_numbers(header)
    return header


def _check_numbers(node) -> None:
    """ScanError for text in place of a required number; tolerated elsewhere: anonymised headers have odd dates."""
    for name, value in vars(node).items():
        if name in MAY_BE_EMPTY:
            if isinstance(value, list):
                value = [item for item in value if item != ""]
            elif value == "":
                value = None
            setattr(node, name, value)
        for item in value if isinstance(value, list) else [value]:
            if is_dataclass(item):
                _check_numbers(item)
            elif isinstance(item, str) and (type(node).__name__ in NUMBERS or name in MAY_BE_EMPTY):
                raise ScanError(
                    "the ISMRMRD header cannot be read: "
                    f"expected a number for {type(node).__name__.removesuffix('Type')} {name}, got {item!r}"
                )


def strip_version(xml: bytes) -> bytes:
    """Remove <version>: Gadgetron hangs if it is not that of its own library."""
    return re.sub(rb"\s*<(\w+:)?version\s*(/>|>[^<]*</(\w+:)?version\s*>)", b"", xml.rstrip(b"\0"), count=1)


def _as_utf8(text: bytes) -> bytes:
    """As UTF-8, without an XML declaration, which may state the wrong encoding; with the namespace, for Gadgetron."""
    text = re.sub(rb"^\s*(\xef\xbb\xbf)?\s*<\?xml.*?\?>", b"", text, count=1, flags=re.S)
    root = re.search(rb"<ismrmrdHeader\b[^>]*>", text)  # with a prefix, it has a namespace of its own
    if root:
        bare = re.sub(rb"""\sxmlns\s*=\s*("[^"]*"|'[^']*')""", b"", root[0])  # some converters write another one
        text = text.replace(root[0], bare.replace(b"<ismrmrdHeader", b"<ismrmrdHeader " + NAMESPACE, 1), 1)
    try:
        return text.decode().encode()
    except UnicodeDecodeError:
        return text.decode("latin-1").encode()


def _plain(error: Exception) -> str:
    """The error in terms of the header; xsdata reports a missing element in Python's."""
    text = " ".join(str(error).split())[:300]
    lacks = re.match(r"(\w+?)(Type)?\.?(__init__)?\(\) missing .*arguments?: (.*)", text)
    return f"its {lacks[1]} lacks {lacks[4].replace(chr(39), '')}" if lacks else text
