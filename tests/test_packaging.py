"""What is installed is what is here: the wheel holds every module, and the root is no place for bare `kernels`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from skvq import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_INSTALLED = {"tests", "benchmarks", "docs"}


def modules() -> set[str]:
    """Every module of the package in this tree, as its path in a wheel."""
    files = [f.relative_to(ROOT) for f in ROOT.rglob("*.py")]
    mine = [f for f in files if not f.parts[0].startswith((".", "build")) and f.parts[0] not in NOT_INSTALLED]
    return {f"skvq/{f.as_posix()}" for f in mine}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is written here."""
    copy, out = tmp_path_factory.mktemp("copy") / "skvq", tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "build", "*.egg-info", ".venv", "results", ".*_cache")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_every_module_and_no_test(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert modules() == {n for n in names if n.endswith(".py")}
    assert "skvq/py.typed" in names
    assert any(n.endswith("/LICENSE") for n in names)


def test_the_wheel_declares_version_and_console_scripts(wheel: zipfile.ZipFile) -> None:
    info = {Path(n).name: wheel.read(n).decode() for n in wheel.namelist() if ".dist-info/" in n}
    assert f"\nVersion: {__version__}\n" in info["METADATA"]
    assert "Requires-Dist: torch<2.14,>=2.10" in info["METADATA"] and "Requires-Python: <3.14,>=3.11" in info["METADATA"]
    assert "skvq = skvq.cli:main" in info["entry_points.txt"] and "skvq-run = skvq.cli:run" in info["entry_points.txt"]


def test_the_wheel_works_where_nothing_else_of_skvq_is(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    show = "print(skvq.__file__); skvq.cli.main(['--version'])"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import skvq.cli; {show}"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [str(tmp_path / "skvq" / "__init__.py"), f"skvq, version {__version__}"]


def test_every_package_directory_is_declared() -> None:
    folders = {Path(m).parent.as_posix().replace("/", ".") for m in modules()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders
    assert all((ROOT / p.removeprefix("skvq").replace(".", "/").lstrip("/") / "__init__.py").is_file() for p in folders)


def test_the_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == __version__


@pytest.mark.parametrize("name", ["engine", "kernels", "loaders", "calibrate", "commands", "cli", "tests"])
def test_a_bare_name_does_not_resolve_into_the_root(name: str) -> None:
    """`transformers` imports Hugging Face's `kernels`: ours must not stand in its place, nor be a second copy of itself."""
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).resolve().parents
    assert str(ROOT) not in map(str, map(Path, sys.path))
