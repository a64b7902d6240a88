"""What the README says is what the code does."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_variational import problem

from gadgets.cli import build_parser
from gadgets.conformance.suite import CASES
from gadgets.options import Options, preset_names
from recon_core.fft import fft
from recon_core.metrics import object_mask, psnr
from recon_core.trust import BARS, INEXACT, UNEXPLAINED, Trust

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MEASURED = (Path(__file__).parent / "benchmarks" / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = re.findall(r"(?m)^(?:.*&& )?(slicediff .*?)(?: +#.*)?$", SHELL)


def test_options_table():
    def text(value):
        if value is None:
            return "none"
        return str(value).lower() if isinstance(value, bool) else str(value)

    fields = Options.model_fields
    rows = [f"| `{name}` | {text(field.default)} | {field.description} |" for name, field in fields.items()]
    assert re.findall(r"(?m)^\| `\w+` \| [^|]+ \| [^|]+ \|$", README) == rows


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    build_parser().parse_args(shlex.split(command)[1:])


def test_the_example_in_python_reconstructs():
    """Of NumPy arrays: better than CG-SENSE, and as bright as the object."""
    kspace, mask, noise, reference = problem(shape=(24, 28, 20), snr=30.0)
    given = {"kspace": fft(kspace, (3,)).numpy(), "sampled": mask.numpy() > 0, "noise": noise.numpy()}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], given)
    inside, sigma = object_mask(reference), float(noise.abs().square().mean().sqrt() / 2**0.5)
    assert psnr(given["volume"], reference, inside) > psnr(given["preview"], reference, inside) + 6
    bright = (given["volume"].abs() * reference)[inside].sum() / reference[inside].square().sum()
    assert float(bright) * sigma == pytest.approx(1, abs=0.05)


def test_what_makes_an_image_doubtful_is_told():
    worse, unexplained = BARS[Trust.DOUBTFUL]
    assert f"residual is above {worse:g} times that of CG-SENSE and above {unexplained:g} times the noise" in README
    assert BARS[Trust.FAILED] == (2, 2)
    assert "(a residual more than twice that of CG-SENSE and twice the noise)" in README
    assert f"leaves more than {UNEXPLAINED:g} times the noise and {INEXACT:.0%} of the data" in README.replace(
        " %", "%"
    )
    assert f"data that CG-SENSE does not explain to {UNEXPLAINED:g} times the noise" in README


def test_enough_is_shown():
    assert len(COMMANDS) >= 6 and f"runs {len(CASES)} cases" in README
    assert f"skips the {sum(bool(case.needs) for case in CASES)} cases" in README
    assert all(f"`{name}`" in README for name in preset_names())
    picture = re.search(r"!\[.*?\]\((.*?)\)", README, re.S).group(1)
    assert (Path(__file__).resolve().parents[1] / picture).is_file()


def test_the_torch_that_is_installed_first_is_one_that_stays():
    """A newer one for CPUs would be replaced by that of PyPI, which brings CUDA."""
    bounds = re.search(r'"torch(.*?)"', (Path(__file__).resolve().parents[1] / "setup.py").read_text())[1].split(",")
    assert re.search(r"'torch(.*?)' --index-url", README)[1] in bounds


def test_tables_are_those_of_the_result_files():
    script = Path(__file__).parent / "benchmarks" / "tables.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if re.match(r"\| [^|]+ \| ([-+*(]|\d)", line)]
    assert len(rows) == 6 + 5 + 7 + 5 + 2 + 5 + 6 + 9 + 15 + 3 + 13 + 6 + 14 + 19 + 10
    assert [row for row in rows[:6] if row not in README] + [row for row in rows[6:] if row not in MEASURED] == []


def test_files_that_are_named_exist():
    """Result files and programs of the benchmarks, in both texts."""
    here = Path(__file__).parent / "benchmarks"
    named = set(re.findall(r"(\w+\.(?:csv|py))", MEASURED))
    named |= set(re.findall(r"tests/benchmarks/(?:results/)?(\w+\.\w+)", README))
    folders = (here, here / "results", here.parent, here.parents[1] / "recon_core")
    known = {path.name for folder in folders for path in folder.iterdir()}
    assert len(named) > 30 and named <= known, named - known
