"""The chains that ship: complete, installed, named in the README, with every option and its default."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from gadgets.chain import options_of_config_name, properties_of
from gadgets.options import Options, make_options

ROOT = Path(__file__).resolve().parents[1]
CHAINS = sorted((ROOT / "config_xml").glob("*.xml"))
INDENT = " " * 16


def options_comment() -> str:
    """Every option as a property with its default, in one comment."""

    def text(value) -> str:
        if value is None:
            return "none"
        return str(value).lower() if isinstance(value, bool) else str(value)

    lines = [
        "<!-- Every option with its default; to change one, write it outside of this comment.",
        '<property name="preset" value="default"/>  name of a shipped preset',
    ]
    for name, field in Options.model_fields.items():
        lines.append(f'<property name="{name}" value="{text(field.default)}"/>  {field.description}')
    return f"\n{INDENT}     ".join(lines) + " -->"


def test_four_chains_ship():
    assert [c.stem for c in CHAINS] == [f"slicediff_{name}" for name in ("buffer", "connect", "execute", "generic")]


@pytest.mark.parametrize("path", CHAINS, ids=lambda p: p.stem)
def test_every_option_stands_in_a_comment_with_its_default(path):
    assert options_comment() in path.read_text(), f"{path.name}: `python tests/test_chains.py` writes the chains anew"


@pytest.mark.parametrize("path", CHAINS, ids=lambda p: p.stem)
def test_properties_and_comments_are_valid_options(path):
    found = properties_of(path.read_bytes())
    assert set(found) == {"method", "prior", "preview"}
    assert make_options(found) == make_options()
    commented = dict(re.findall(r'<property name="(\w+)" value="([^"]*)"/>  ', path.read_text()))
    assert set(commented) == {"preset", *Options.model_fields}
    assert make_options(commented) == make_options()
    assert options_of_config_name(path.name) == found


@pytest.mark.parametrize("path", CHAINS, ids=lambda p: p.stem)
def test_structure_is_what_gadgetron_reads(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "configuration" and root.findtext("version") == "2"
    assert [r.findtext("classname") for r in root.find("readers")] == ["AcquisitionReader", "WaveformReader"]
    assert [w.findtext("classname") for w in root.find("writers")] == ["ImageWriter"]
    external = root.find("stream").findall("external")
    assert len(external) == 1 and external[0].find("configuration") is not None
    assert (external[0].find("connect") is None) != (external[0].find("execute") is None)
    gadgets = [g.findtext("classname") for g in root.find("stream").findall("gadget")]
    front = [
        "NoiseAdjustGadget",
        "AsymmetricEchoAdjustROGadget",
        "RemoveROOversamplingGadget",
        "AcquisitionAccumulateTriggerGadget",
        "BucketToBufferGadget",
    ]
    assert gadgets == (front if path.stem in ("slicediff_buffer", "slicediff_generic") else [])
    if gadgets:
        settings = {p.get("name"): p.get("value") for p in root.find("stream").iter("property")}
        assert settings["ignore_segment"] == "true" and settings["trigger_dimension"] == "repetition"


def test_chains_are_installed_and_named():
    setup = (ROOT / "setup.py").read_text()
    assert "share/gadgetron/config" in setup and "config_xml/*.xml" in setup
    readme = (ROOT / "README.md").read_text()
    assert all(path.name in readme for path in CHAINS)


if __name__ == "__main__":  # after an option was added: writes its property into all chains
    for chain in CHAINS:
        comment = r"<!-- (Every option with its default.*?|OPTIONS )-->"
        chain.write_text(re.sub(comment, lambda _: options_comment(), chain.read_text(), flags=re.S))
