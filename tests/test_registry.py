"""Backends by name: plug-ins are found, and one that is broken troubles only who chose it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from loader_fixtures import refused

from skvq.cli import main
from skvq.engine.machine import find_backend
from skvq.kernels.interface import BackendUnavailable
from skvq.kernels.reference import Reference
from skvq.kernels.registry import get_backend, plugins

CPU = torch.device("cpu")
ENTRY_POINTS = """[skvq.kernels]
good = good_kernels:make
missing = no_such_kernels:make
nameless = good_kernels:no_such_factory
raising = raising_kernels:make
failing = good_kernels:fail
picky = good_kernels:refuse
numba = raising_kernels:make
unfinished = good_kernels:object_of
half = good_kernels:make_half
"""
GOOD = """
from skvq.kernels.reference import Reference
from skvq.kernels.interface import BackendUnavailable

class Good(Reference):
    name = "good"

def make(device):
    return Good()

class Half(Reference):
    labels = None

def make_half(device):
    return Half()

def object_of(device):
    return object()

def fail(device):
    raise KeyError

def refuse(device):
    raise BackendUnavailable(f"no driver for {device}")
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with entry points, most of them broken."""
    info = tmp_path / "other_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "good_kernels.py").write_text(GOOD)
    (tmp_path / "raising_kernels.py").write_text("raise RuntimeError('two lines\\nof trouble')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for module in ("good_kernels", "raising_kernels"):
        sys.modules.pop(module, None)


def test_names_are_listed_without_importing_anything() -> None:
    assert set(plugins()) == {"good", "missing", "nameless", "raising", "failing", "picky", "unfinished", "half"}, (
        "numba is ours"
    )
    assert not {"good_kernels", "raising_kernels"} & set(sys.modules)


def test_a_plug_in_is_found_among_broken_ones() -> None:
    assert get_backend("good", CPU).name == "good"
    assert "raising_kernels" not in sys.modules
    assert isinstance(get_backend("reference", CPU), Reference)


@pytest.mark.parametrize(
    "name, fragments",
    [
        ("missing", ("no_such_kernels:make", "No module named")),
        ("nameless", ("good_kernels:no_such_factory", "AttributeError")),
        ("raising", ("raising_kernels:make", "RuntimeError: two lines of trouble")),
        ("failing", ("good_kernels:fail", "KeyError")),
        ("unfinished", ("good_kernels:object_of", "lacks name", "attend_plain", "labels.unpack")),
        ("half", ("good_kernels:make_half", "lacks labels.pack, labels.unpack, labels.attend (")),
        ("picky", ("no driver for cpu",)),
        ("god", ("did you mean 'good'",)),
        ("zzz", ("known: auto, failing, good,",)),
    ],
)
def test_what_cannot_be_used_is_one_line(name: str, fragments: tuple[str, ...]) -> None:
    refused(lambda: find_backend(name, CPU), *fragments)
    result = CliRunner().invoke(main, ["bench", "soak", "--steps", "1", "--backend", name])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output


def test_a_backend_of_ours_is_never_swapped_for_another() -> None:
    with pytest.raises(BackendUnavailable, match="NVIDIA GPU"):
        get_backend("triton", CPU)
