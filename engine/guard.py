"""The engine's own torch settings: what a host program has set for its tensors does not reach ours, and is left as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """A GPU is this thread's current device and its default stream the current one: kernels are launched there, whatever the
    thread, one after another. New tensors are float32, on the CPU unless told otherwise; autograd, inference mode and autocast
    are off."""
    with _FLOAT32.held(), torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
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


class _Float32ByDefault:
    """The default dtype is one for all threads: float32 while any of them computes, then what it was before the first."""

    def __init__(self) -> None:
        self._lock, self._before = RLock(), torch.float32  # a sequence may be freed, by the garbage collector, in here
        self._computing: set[object] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a computation; Ctrl-C may come anywhere."""
        one = object()
        try:
            with self._lock:
                self._computing.add(one)
                if len(self._computing) == 1:
                    self._before = torch.get_default_dtype()
                    if self._before != torch.float32:
                        torch.set_default_dtype(torch.float32)
            yield
        finally:
            with self._lock:
                before = self._before
                self._computing.discard(one)
                if not self._computing and before != torch.float32:
                    torch.set_default_dtype(before)


_FLOAT32 = _Float32ByDefault()
"""Of the process, as the setting is."""


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
