"""``benchmarks/``, which are scripts and no part of the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str) -> ModuleType:
    """A script by its path there, ``sass`` or ``gpu/run_all``, executed anew; what lies beside it can be imported."""
    path = BENCHMARKS / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"skvq_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"skvq_{path.stem}"] = module
    spec.loader.exec_module(module)
    return module
