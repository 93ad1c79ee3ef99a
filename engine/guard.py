"""The engine's own torch settings: what a host program has set for its tensors does not reach ours, and is left as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """A GPU is this thread's current device: kernels are launched there. New tensors are float32, on the CPU unless told
    otherwise; autocast is off."""
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


class OnDevice(Protocol):
    """Computes on one device."""

    @property
    def device(self) -> torch.device: ...


Self = TypeVar("Self", bound=OnDevice)


def computes(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """Run a method under ``own_settings``."""

    @functools.wraps(method)
    def guarded(self: Self, *args: P.args, **options: P.kwargs) -> R:
        with own_settings(self.device):
            return method(self, *args, **options)

    return cast(Callable[Concatenate[Self, P], R], guarded)
