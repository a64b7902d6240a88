"""Gadgetron chain XML: finding our options in it, and the chains shipped with the package."""

from __future__ import annotations

import re
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .options import OptionsError, preset_names

OURS = ("gadgets",)
CHAIN_NAME = re.compile(r"[\w.-]{1,100}")
DEFAULT_NAMES = ("default", "default.xml", "slicediff", "gadgets", "null", "")


def properties_of(xml: bytes | str) -> dict[str, str]:
    """Our options in an external node's <configuration>, or in a whole chain that contains our node.

    Raises:
        OptionsError: for XML that does not parse, or a chain without our external node.
    """
    root = _root(xml)
    if root is None:
        return {}
    return _properties(_our_node(root) if is_chain(root) else root)


def is_gadgetron_peer(config: str) -> bool:
    """Whether a configuration text comes from Gadgetron's <connect> rather than from a client's chain script."""
    try:
        root = _root(config)
    except OptionsError:
        return False
    return config.lstrip().startswith("<?xml") if root is None else not is_chain(root)


def is_chain(root: ElementTree.Element) -> bool:
    """Whether the document is a whole chain rather than one node's configuration."""
    return root.find(".//stream") is not None or "gadgetronStreamConfiguration" in root.tag


def options_of_config_name(name: str) -> dict[str, str]:
    """Options for a configuration name that a client requests: a shipped chain, a preset, or the default.

    Raises:
        OptionsError: listing the known names.
    """
    if name in DEFAULT_NAMES:
        return {}
    stem = name.removesuffix(".xml")
    if stem in preset_names():
        return {"preset": stem}
    for folder in config_folders() if CHAIN_NAME.fullmatch(stem) else ():
        if (folder / f"{stem}.xml").is_file():
            return properties_of((folder / f"{stem}.xml").read_bytes())
    known = sorted({"default", *preset_names(), *(p.name for f in config_folders() for p in f.glob("slicediff*.xml"))})
    raise OptionsError(f"unknown configuration {name[:100]!r}; this server knows {', '.join(known)}")


def config_folders() -> list[Path]:
    """Where shipped chains may lie: the checkout, the environment's share, the user's."""
    here = Path(__file__).resolve().parent.parent / "config_xml"
    bases = [sys.prefix, sysconfig.get_path("data"), sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))]
    return [f for f in dict.fromkeys([here, *(Path(b) / "share/gadgetron/config" for b in bases)]) if f.is_dir()]


def _root(xml: bytes | str) -> ElementTree.Element | None:
    """The document's root, None if it has no element: Gadgetron sends a bare declaration.

    Of a str, the encoding that it declares is not asked.

    Raises:
        OptionsError: for XML that does not parse.
    """
    text = xml.strip("\0 \r\n\t") if isinstance(xml, str) else xml.strip(b"\0 \r\n\t")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        # LookupError and ValueError: for encodings that the parser does not know
        plain = text if isinstance(text, str) else text.decode("latin-1")
        if "<" not in plain.split("?>")[-1]:
            return None
        raise OptionsError(f"the configuration is not valid XML: {error}") from None


def _our_node(root: ElementTree.Element) -> ElementTree.Element:
    nodes = root.findall(".//external")
    ours = [n for n in nodes if (e := n.find("execute")) is not None and e.get("name", "").split(".")[0] in OURS]
    node = next(iter(ours or [n for n in nodes if n.find("connect") is not None]), None)
    if node is None:
        raise OptionsError(
            'the chain has no external node for this plugin (<execute name="gadgets" .../> or <connect .../>)'
        )
    configuration = node.find("configuration")
    return configuration if configuration is not None else ElementTree.Element("configuration")


def _properties(node: ElementTree.Element) -> dict[str, str]:
    out = {}
    for item in node.iter("property"):
        name = item.get("name") or item.findtext("name")
        value = item.get("value") if item.get("value") is not None else item.findtext("value")
        if name:
            out[name.strip()] = (value or "").strip()
    return out
