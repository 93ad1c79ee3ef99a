"""Worked examples in docstrings: of every source file of the package that has any."""

from __future__ import annotations

import doctest
import tomllib
from importlib import import_module

import pytest
from conftest import ROOT

PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def with_examples() -> list[str]:
    """Modules that hold ``>>>``, by dotted name."""
    files = [(package, path) for package in PACKAGES for path in ROOT.joinpath(*package.split(".")[1:]).glob("*.py")]
    names = [f"{package}.{path.stem}" for package, path in files if ">>>" in path.read_text()]
    return sorted(name.removesuffix(".__init__") for name in names)


@pytest.mark.parametrize("name", with_examples())
def test_worked_examples_of_docstrings(name: str) -> None:
    if ".triton_gpu" in name:
        pytest.importorskip("triton")
    outcome = doctest.testmod(import_module(name))
    assert outcome.attempted and not outcome.failed
