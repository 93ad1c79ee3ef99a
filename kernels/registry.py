"""Backends by name: our three, and any that an installed package offers under the entry point ``skvq.kernels``.

An entry point names a factory ``(torch.device) -> Backend``; it raises ``ImportError`` or ``BackendUnavailable`` with the
reason when it cannot serve that device. It is imported only when chosen, so a broken one does not affect the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter

import torch

from skvq.kernels.interface import Backend, BackendUnavailable, PackedKernels

ENTRY_POINT = "skvq.kernels"


def _reference(device: torch.device) -> Backend:
    from skvq.kernels.reference import Reference

    return Reference()


def _numba(device: torch.device) -> Backend:
    if device.type != "cpu":
        raise BackendUnavailable(f"backend 'numba' computes on the CPU, not on {device}")
    from skvq.kernels.numba_cpu import NumbaCpu

    return NumbaCpu()


def _triton(device: torch.device) -> Backend:
    from skvq.kernels.triton_gpu import TritonGpu

    return TritonGpu(device)


def _members(protocol: type) -> list[str]:
    return [*vars(protocol).get("__annotations__", ()), *(name for name in vars(protocol) if not name.startswith("_"))]


KERNELS = [f"{kind}.{member}" for kind in ("heads", "labels") for member in _members(PackedKernels)]
MEMBERS = [*_members(Backend), *KERNELS]
"""What a backend must have."""

OURS: dict[str, Callable[[torch.device], Backend]] = {"reference": _reference, "numba": _numba, "triton": _triton}


def plugins() -> dict[str, EntryPoint]:
    """Backends of other packages by name, not imported; none can take the name of one of ours."""
    return {e.name: e for e in entry_points(group=ENTRY_POINT) if e.name not in OURS}


def get_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name for a device, never another; ``auto``: numba on the CPU, Triton on a GPU. Raises
    BackendUnavailable.

    A backend may itself leave a shape to the specification: Triton does with head and group sizes it has no kernels for, and
    says so on stderr.
    """
    chosen = ("numba" if device.type == "cpu" else "triton") if name == "auto" else name
    if chosen in OURS:
        try:
            return OURS[chosen](device)
        except ImportError as error:
            raise BackendUnavailable(f"backend {chosen!r} cannot be loaded: {error}") from error
    found = plugins()
    if chosen not in found:
        known = [*OURS, *found]
        close = difflib.get_close_matches(chosen, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: auto, {', '.join(sorted(known))}"
        raise BackendUnavailable(f"unknown backend {chosen!r}; {hint}")
    return _plugin(found[chosen], device)


def _has(made: object, member: str) -> bool:
    """Whether the backend has it; ``heads.pack`` is a member of its ``heads``."""
    try:
        attrgetter(member)(made)
    except AttributeError:
        return False
    return True


def _plugin(entry: EntryPoint, device: torch.device) -> Backend:
    """The backend of another package. Raises BackendUnavailable, naming the entry point, for any error in its code."""
    try:
        factory: Callable[[torch.device], Backend] = entry.load()
        made = factory(device)
        lacking = [member for member in MEMBERS if not _has(made, member)]
        if lacking:
            raise TypeError(
                f"what it makes lacks {', '.join(lacking)} (kernels.interface.Backend; inherit kernels.reference.Reference)"
            )
        return made
    except BackendUnavailable:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise BackendUnavailable(
            f"backend {entry.name!r} of another package ({entry.value}) cannot be loaded: {what}"
        ) from error
