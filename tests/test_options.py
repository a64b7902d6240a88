"""Options: one validated object from every source."""

import json
from typing import get_args

import pytest

from gadgets.chain import is_gadgetron_peer, options_of_config_name, properties_of
from gadgets.options import (
    Options,
    OptionsError,
    from_a_peer,
    make_options,
    options_from_json,
    preset_names,
    read_preset,
)
from recon_core.adaptation import AdaptedConfig
from recon_core.methods import METHODS


def test_text_and_typed_values_are_the_same():
    text = {"sweeps": "12", "preview": "false", "deadline_s": "none"}
    assert make_options(text) == make_options({"sweeps": 12, "preview": False})


def test_later_sources_win_over_presets():
    assert make_options({"preset": "fast"}).sweeps == read_preset("fast")["sweeps"]
    assert make_options({"preset": "fast"}, {"sweeps": 3}).sweeps == 3


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_are_valid(name):
    assert isinstance(make_options({"preset": name}), Options)


@pytest.mark.parametrize(
    "source,message",
    [
        ({"sweep": 3}, "unknown option 'sweep'; known are .*sweeps"),
        ({"sweeps": "many"}, "option 'sweeps'.*integer.*'many'"),
        ({"sweeps": 0}, "greater than or equal to 1"),
        ({"sigma_min": 1e-12}, "greater than or equal to 0.0001"),
        ({"method": "magic"}, "'cg' or 'zero-filled'.*'magic'"),
        ({"orientation": ""}, "orientation.*got ''$"),
        ({"sigma_min": 0.5}, "sigma_min 0.5 must not exceed sigma_max"),
        ({"preset": "nonesuch"}, "no preset 'nonesuch': shipped are"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(source, message):
    with pytest.raises(OptionsError, match=message) as caught:
        make_options(source)
    assert "\n" not in str(caught.value)


def test_methods_and_their_settings_are_those_of_recon_core():
    assert set(get_args(Options.model_fields["method"].annotation)) == set(METHODS)
    defaults = {name: value for name, value in vars(AdaptedConfig()).items() if name in Options.model_fields}
    assert all(getattr(make_options(), name) == value for name, value in defaults.items())


def test_options_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make_options().sweeps = 3


def test_preset_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("sweeps: 7\n")
    assert make_options({"preset": str(tmp_path / "mine.yaml")}).sweeps == 7
    (tmp_path / "bad.yaml").write_text("- a\n")
    with pytest.raises(OptionsError, match="mapping"):
        make_options({"preset": str(tmp_path / "bad.yaml")})


def test_xml_properties():
    for given in ('<property name="sweeps" value="4"/>', "<property><name>sweeps</name><value>4</value></property>"):
        assert properties_of(f"<configuration>{given}</configuration>") == {"sweeps": "4"}
    assert properties_of('<?xml version="1.0"?>\n') == {}
    for encoding in ("utf-16", "GB2312", "ISO-8859-1"):  # what a peer declares, although it came as UTF-8
        config = (
            f'<?xml version="1.0" encoding="{encoding}"?>\r\n'
            '<configuration><property name="prior" value="für"/></configuration>\0'
        )
        assert properties_of(config) == {"prior": "für"} and is_gadgetron_peer(config)
    for encoding in ("GB2312", "nonesuch"):
        with pytest.raises(OptionsError, match="not valid XML: .*encoding"):
            properties_of(f'<?xml version="1.0" encoding="{encoding}"?><configuration/>'.encode())
    with pytest.raises(OptionsError, match="not valid XML"):
        properties_of("<configuration>")


def test_shipped_chains_hold_our_node():
    for name in ("slicediff_execute", "slicediff_connect.xml"):
        assert make_options(options_of_config_name(name)) == make_options({"method": "diffusion"})
    with pytest.raises(OptionsError, match="unknown configuration 'x.xml'.*slicediff_connect.xml"):
        options_of_config_name("x.xml")
    with pytest.raises(OptionsError, match="no external node"):
        properties_of("<configuration><stream><gadget/></stream></configuration>")


def test_a_preset_that_names_another_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: fast\nsweeps: 3\n")
    with pytest.raises(OptionsError, match="names another one .fast.: write its options out"):
        make_options({"preset": str(tmp_path / "mine.yaml")})


@pytest.mark.parametrize(
    "source,message",
    [
        ({"preset": "/etc/hosts"}, "no preset '/etc/hosts': shipped are .*command line of the server only"),
        ({"preset": "../presets/fast"}, "no preset"),
        ({"preset": 3}, "no preset '3'"),
        ({"preset": ["fast"]}, "no preset"),
        (
            {"prior": "/dev/zero"},
            "by its name only, got '/dev/zero': "
            "put the file in a prior folder of the server .SLICEDIFF_PRIORS. and give its name",
        ),
        ({"prior": "weights.safetensors"}, "by its name only"),
        ({"prior": "../small"}, "by its name only"),
        ({"prior": "x" * 5000}, "by its name only"),
        ({"prior": ""}, "by its name only"),
    ],
)
def test_a_peer_may_name_no_file(source, message):
    for take in (from_a_peer, lambda options: options_from_json(json.dumps({"parameters": options}))):
        with pytest.raises(OptionsError, match=message) as caught:
            take(source)
        assert len(str(caught.value)) < 400
    allowed = {"prior": "site-1.5T", "preset": "fast", "sweeps": "2"}
    assert from_a_peer(dict(allowed)) == allowed


def test_host_parameters():
    assert options_from_json('{"parameters": {"sweeps": 5, "theirs": 1}}') == ({"sweeps": 5}, ["theirs"])
    assert options_from_json('{"parameters": null}') == options_from_json("{}") == ({}, [])
    for text in ("[", "[]", '"parameters"', '{"parameters": [1, 2]}', '{"parameters": "sweeps"}', "{" * 100_000):
        with pytest.raises(OptionsError, match="not a JSON object"):
            options_from_json(text)


@pytest.mark.parametrize("name", ["../../etc/hosts", "/etc/hosts", "a" * 1000, "\ufffd" * 500])
def test_a_configuration_name_is_no_path(name):
    with pytest.raises(OptionsError, match="unknown configuration") as caught:
        options_of_config_name(name)
    assert len(str(caught.value)) < 400
