"""The denoiser: closed form, any size, and weights that can be trusted."""

import json
import re
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gadgets.cli import main
from recon_core.pose import BLOCK, draw_pose
from recon_core.prior import ARCHITECTURES, Prior, PriorError, half_is_faster, list_priors, load_prior, save_prior
from recon_core.scale import intensity_scale
from recon_core.simulate import phantom
from recon_core.train_options import TrainOptions


def test_every_architecture_can_be_trained():
    assert set(get_args(TrainOptions.model_fields["architecture"].annotation)) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untrained_network_is_the_gaussian_denoiser(architecture):
    prior = Prior(architecture, sigma_data=0.7)
    x = torch.randn(2, 2, 24, 20)
    sigma = torch.tensor([0.1, 1.3])
    expected = x * (0.7**2 / (0.7**2 + sigma**2))[:, None, None, None]
    torch.testing.assert_close(prior(x, sigma), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_poses_and_meshes_fit_the_downsampling_of_every_network(architecture):
    """Of those that slice diffusion may use: it refuses priors in function space."""
    prior = Prior(architecture)
    assert prior.in_function_space or BLOCK % prior.net.multiple == 0


def test_the_larger_prior_is_eight_times_the_work():
    """As the README says of each pixel."""
    operations = {}
    for architecture in ("small", "base"):
        prior = Prior(architecture).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            prior(torch.zeros(1, 2, 64, 64), 0.1)
        operations[architecture] = counter.get_total_flops()
    assert operations["base"] / operations["small"] == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("size", [(97, 65), (33, 200), (1, 64), (3, 3), (64, 64)])
def test_any_slice_size(size):
    assert load_prior("small")(torch.randn(1, 2, *size), 0.1).shape == (1, 2, *size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_slices_that_are_not_finite_are_refused(value):
    x = torch.zeros(1, 2, 16, 16)
    x[0, 1, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        Prior("small").eval()(x, 0.1)


def test_trained_prior_removes_noise_and_knows_no_batch():
    prior = load_prior("small")
    clean = torch.stack([phantom((40, 80, 64))[20], torch.zeros(80, 64)])[None]
    clean = clean / 0.6
    generator = torch.Generator().manual_seed(0)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    gain = 10 * torch.log10((noisy - clean).square().mean() / (prior(noisy, 0.1) - clean).square().mean())
    assert gain > 6
    both = torch.cat([noisy, torch.randn(1, 2, 80, 64, generator=generator)])
    for half, bound in ((False, 1e-5), (True, 0.01)):  # in bf16 a feature may be rounded the other way
        prior = load_prior("small", half=half)
        torch.testing.assert_close(prior(both, 0.1)[:1], prior(noisy, 0.1), atol=bound, rtol=0)


def test_weights_travel_and_are_checked(tmp_path):
    torch.manual_seed(1)
    prior = Prior("small")
    torch.nn.init.normal_(prior.net.tail.weight)
    path = tmp_path / "site.safetensors"
    save_prior(prior, path, {"made": "here"})
    loaded = load_prior(path, half=False)
    x = torch.randn(1, 2, 16, 16)
    torch.testing.assert_close(loaded(x, 0.2), prior(x, 0.2), atol=2e-2, rtol=2e-2)
    assert loaded.card["made"] == "here"

    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PriorError, match="sha256"):
        load_prior(path)
    path.write_bytes(data[:1000])
    with pytest.raises(PriorError, match="sha256"):
        load_prior(path)
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, "format": 99}))
    with pytest.raises(PriorError, match="format 99"):
        load_prior(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(PriorError, match="model card"):
        load_prior(path)


@pytest.mark.parametrize(
    "card,said",
    [
        ("[]", "should be a JSON object, it is list"),
        ('{"format": 1, "sha256": "a", "architecture": "small"}', "lacks sigma_data, parameters"),
        ("{", "no readable model card"),
    ],
)
def test_damaged_model_cards_are_a_sentence(tmp_path, monkeypatch, capsys, card, said):
    """Beside good ones they are listed as what they are."""
    (tmp_path / "odd.safetensors").write_bytes(b"x")
    (tmp_path / "odd.json").write_text(card)
    with pytest.raises(PriorError, match=re.escape(said)):
        load_prior(tmp_path / "odd.safetensors")
    monkeypatch.setenv("SLICEDIFF_PRIORS", str(tmp_path))
    assert main(["priors"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("odd: of no use: ") and said in line for line in listed)
    assert any(line.startswith("small: ") for line in listed)


def test_weights_that_are_written_again_are_whole_at_any_time(tmp_path, monkeypatch):
    """A kill while they are written leaves the old ones, card included."""
    path = tmp_path / "p.safetensors"
    save_prior(Prior("small"), path, {"made": "first"})

    def killed(*_, **__):
        raise KeyboardInterrupt

    for place in ("json.dumps", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"recon_core.prior.{place}", killed)
            with pytest.raises(KeyboardInterrupt):
                save_prior(load_prior("small"), path, {"made": "second"})
        assert load_prior(path).card["made"] == "first"
    save_prior(load_prior("small"), path, {"made": "second"})
    assert load_prior(path).card["made"] == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.safetensors"]


def test_missing_prior_is_named():
    with pytest.raises(PriorError, match="no prior 'nonesuch'.*known: .*small"):
        load_prior("nonesuch")


def test_shipped_priors_have_cards():
    (small,) = [c for c in list_priors() if c["name"] == "small"]
    assert small["training"]["volumes"]
    heads = [v for v in small["training"]["volumes"] if "ds000011" in v]
    assert not any("sub-14" in v for v in heads), "the example must stay out of training"


def test_intensity_scale_follows_the_tissue_only():
    volume = phantom((40, 48, 40))
    scale = intensity_scale(volume, (4.0, 4.0, 4.0))
    assert intensity_scale(1000 * volume, (4.0, 4.0, 4.0)) == pytest.approx(1000 * scale, rel=1e-6)
    padded = torch.nn.functional.pad(volume, (10, 10, 10, 10, 10, 10))
    assert intensity_scale(padded, (4.0, 4.0, 4.0)) == pytest.approx(scale, rel=0.03)
    noisy = volume + 0.2 * torch.randn(volume.shape, generator=torch.Generator().manual_seed(0))
    assert intensity_scale(noisy, (4.0, 4.0, 4.0)) == pytest.approx(scale, rel=0.05)
    wave = torch.cos(2 * torch.pi * torch.arange(48) / 12)[:, None, None]  # of 12 mm: voxels of 8 mm cannot hold it
    assert intensity_scale((1 + 0.9 * wave).expand(48, 16, 16), (1.0, 1.0, 1.0)) == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="no finite signal"):
        intensity_scale(torch.zeros(8, 8, 8), (1.0, 1.0, 1.0))


def test_a_sites_own_weights_drop_in(tmp_path, monkeypatch):
    """By name, before what ships; the list shows both."""
    save_prior(Prior("small", sigma_data=0.6), tmp_path / "ours.safetensors", {"good_for": "knees"})
    monkeypatch.setenv("SLICEDIFF_PRIORS", f"/nowhere:{tmp_path}")
    assert load_prior("ours").sigma_data == 0.6
    assert [c["name"] for c in list_priors()] == ["base", "operator", "ours", "small", "small-white"]
    save_prior(Prior("small", sigma_data=0.7), tmp_path / "small.safetensors", {})
    assert load_prior("small").sigma_data == 0.7 and {c["name"]: c["sigma_data"] for c in list_priors()}["small"] == 0.7


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_bf16_is_far_below_the_noise(sigma):
    """The denoised head differs from fp32's by at most 3 % of sigma in the mean, which moves no PSNR."""
    clean = phantom((4, 96, 80))[:, None].repeat(1, 2, 1, 1)
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    full, half = (load_prior("small", half=h)(noisy, sigma) for h in (False, True))
    rounding = load_prior("small", half=False)
    rounding.in_bf16 = True  # its weights are rounded for each batch
    assert torch.equal(rounding(noisy, sigma), half)
    assert half.dtype == torch.float32
    assert 0 < float((half - full).square().mean().sqrt()) < 0.03 * sigma


def test_bf16_is_chosen_only_where_it_is_known_to_be_faster(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert half_is_faster("cpu") and load_prior("small").in_bf16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not half_is_faster("cpu") and not load_prior("small").in_bf16


def test_a_pose_there_and_back_is_nothing_and_the_prior_sees_it():
    """With a denoiser that knows no place and no phase every pose gives its answer.

    With one that keeps only the left half, not.
    """
    x, random = torch.randn(3, 2, 15, 22), torch.Generator().manual_seed(1)
    for _ in range(8):
        seen = []
        denoise = draw_pose(random).seen_by(lambda s, sigma: seen.append(s) or sigma * s)
        torch.testing.assert_close(denoise(x, 0.5), 0.5 * x)
        assert seen[0].shape[2] in range(15, 30) and float(seen[0].norm()) == pytest.approx(float(x.norm()), rel=1e-5)
    left_half = lambda s, sigma: s * (torch.arange(s.shape[3]) < s.shape[3] // 2)
    halves = [draw_pose(random).seen_by(left_half)(x, 0.5) for _ in range(8)]
    assert len({tuple((h[0].norm(dim=0) > 0).flatten().tolist()) for h in halves}) > 3


def test_a_name_alone_is_no_file_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PriorError, match="no prior 'notes': neither a known name .* nor a .safetensors file"):
        load_prior("notes")
