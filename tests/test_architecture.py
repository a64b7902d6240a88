"""The house rules that a machine can check."""

import ast
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "recon_core").glob("*.py"), *(ROOT / "gadgets").rglob("*.py")])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "recon_core").glob("*.py")), ids=lambda p: p.name)
def test_recon_core_knows_nothing_of_mrd(path):
    assert not imported(path) & {"ismrmrd", "gadgetron", "gadgets"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_bare_except(path):
    handlers = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler)]
    assert all(h.type is not None for h in handlers)


def test_lines_fit_120_columns():
    code = [*SOURCES, *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    lines = ((path, number, line) for path in code for number, line in enumerate(path.read_text().splitlines(), 1))
    assert [f"{path}:{number}" for path, number, line in lines if len(line) > 120] == []


def test_nobody_prints_but_the_command_line():
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [c for c in calls if getattr(c.func, "id", "") == "print"]
        may_print = path.name == "cli.py" or path.parent.name == "commands"
        assert not prints or may_print, f"{path.name} prints: Gadgetron's stdout may be the data stream"


def test_reconstruct_fits_on_a_screen():
    from gadgets.recon import reconstruct

    source = inspect.getsource(reconstruct).replace(inspect.getdoc(reconstruct), "")
    body = source.split('"""')[-1].strip().splitlines()
    assert len(body) <= 20


def test_importing_the_gadget_module_does_not_load_torch():
    import subprocess
    import sys

    code = "import sys, gadgets; gadgets.slice_diffusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
