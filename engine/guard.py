"""The engine's own torch settings: what a host program has set for its tensors does not reach ours, and is left as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """A GPU is this thread's current device and its default stream the current one: kernels are launched there, whatever the
    thread, one after another. New tensors are on the CPU unless told otherwise; autograd, inference mode and autocast are off.

    The default dtype is one for all threads, so it is left alone: every new tensor of ours names its own.
    """
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(_default_stream(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _default_stream(device: torch.device) -> Iterator[None]:
    """Launch on the default stream, after what the thread's own stream has to do and before what it is given next."""
    caller, ours = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if caller == ours:
        yield
        return
    ours.wait_stream(caller)
    try:
        with torch.cuda.stream(ours):
            yield
    finally:
        caller.wait_stream(ours)


class OnDevice(Protocol):
    """Computes on one device, one call at a time."""

    @property
    def device(self) -> torch.device: ...

    @property
    def lock(self) -> AbstractContextManager[object]: ...


Self = TypeVar("Self", bound=OnDevice)


@contextmanager
def computing(owner: OnDevice) -> Iterator[None]:
    """``own_settings``, and no other thread that computes for the same owner."""
    with owner.lock, own_settings(owner.device):
        yield


def computes(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """Run a method within ``computing`` of its object."""

    @functools.wraps(method)
    def guarded(self: Self, *args: P.args, **options: P.kwargs) -> R:
        with computing(self):
            return method(self, *args, **options)

    return cast(Callable[Concatenate[Self, P], R], guarded)
