"""A GPU that is not there: tensors lie in main memory and say ``cuda:0``, and what a real card refuses is refused.

Refused are operations that mix tensors of the card with tensors of the host, and, while a graph is captured, everything that
waits for the card or copies from the host. Flash attention has no CPU form: it is computed here, arguments checked.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from skvq.kernels import dense, reference
from skvq.kernels.cudnn import cudnn_on
from skvq.kernels.graphs import Captured

CARD = torch.device("cuda:0")
READS = {  # of tensors of the card: the host waits
    "item", "tolist", "nonzero", "masked_select", "unique", "argwhere", "equal", "allclose", "is_nonzero", "bincount",
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "isin", "multinomial",
}  # fmt: skip
MOVES = {"to", "copy_", "cpu", "tolist", "__repr__", "__format__"}
"""Between card and host; a tensor of the host is assigned one of the card too, which is waited for."""
INNER = {"data_ptr", "untyped_storage", "as_subclass", "__reduce_ex__"}


class OnCard(Tensor):
    """A tensor of the card. Its numbers are in main memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __bool__(self) -> bool:
        return bool(_read(self, "__bool__"))

    def __int__(self) -> int:
        return int(_read(self, "__int__"))

    def __float__(self) -> float:
        return float(_read(self, "__float__"))

    def __index__(self) -> int:
        return int(_read(self, "__index__"))


def _read(tensor: Tensor, what: str) -> Any:
    for mode in Card.active:
        mode.wait(what)
    return plain(tensor).item()


def plain(value: Any) -> Any:
    """The tensor as main memory has it, the same numbers."""
    return value.as_subclass(Tensor) if isinstance(value, OnCard) else value


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value.startswith("cuda"))


def _is_cpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cpu") or value == "cpu"


class Card(TorchFunctionMode):
    """While it is active tensors can be on ``cuda``. ``waits`` counts by name what made the host wait for the card."""

    active: ClassVar[list[Card]] = []

    def __init__(self) -> None:
        super().__init__()
        self.capturing = False
        self.waits: dict[str, int] = {}

    def __enter__(self) -> Card:
        Card.active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Card.active.remove(self)

    def wait(self, what: str) -> None:
        assert not self.capturing, f"{what}: no graph can hold this"
        self.waits[what] = self.waits.get(what, 0) + 1

    def set_number(self, tensor: Tensor, index: Any) -> None:
        """A number of the host fills a slice or a mask on the card, but to places by tensor, and to one place, it is copied."""
        by_place = any(isinstance(i, Tensor) and i.dtype not in (torch.bool, torch.uint8) for i in tree_flatten(index)[0])
        if by_place or plain(tensor)[tree_map(plain, index)].dim() == 0:
            self.wait("__setitem__ of a number")

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func)).split(".")[0]
        owner = getattr(func, "__self__", None)
        if func is torch.device:
            return func(*args, **kwargs)
        values, _ = tree_flatten((args, kwargs))
        ours = [v for v in values if isinstance(v, OnCard)]
        if name == "__get__" and owner in (Tensor.device, Tensor.is_cuda):
            return func(*args) if not ours else (CARD if owner is Tensor.device else True)
        if name in INNER or (name == "__get__" and not isinstance(func(*tree_map(plain, args)), Tensor)):
            return func(*tree_map(plain, args), **kwargs)
        theirs = [v for v in values if isinstance(v, Tensor) and not isinstance(v, OnCard)]
        to_card, to_host = any(map(_is_cuda, values)), any(map(_is_cpu, values)) or name == "cpu"
        moves = name in MOVES or (name == "__setitem__" and not isinstance(args[0], OnCard))
        assert not (ours and name == "numpy"), "numpy has no tensors of a card"
        if ours and any(t.dim() for t in theirs) and not moves:
            raise AssertionError(f"{name} mixes card and host: {[tuple(t.shape) for t in theirs]} on the host")
        if ours:
            index = tree_flatten(args[1:2])[0] if name in ("__getitem__", "__setitem__") else []
            if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index):
                self.wait(f"{name} by a mask")
            if name in READS or (moves and name == "__setitem__") or to_host or (name == "repeat_interleave" and len(ours) > 1):
                self.wait(name)
        if name == "__setitem__" and isinstance(args[0], OnCard) and not isinstance(args[2], Tensor):
            self.set_number(args[0], args[1])
        if name == "copy_" and isinstance(args[0], OnCard) != isinstance(args[1], OnCard):
            self.wait("copy_ between card and host") if not kwargs.get("non_blocking") else None
            assert not self.capturing, "copy_ between card and host: a graph would copy what was there when it was captured"
        if to_card and not ours:
            self.wait(name) if name in ("tensor", "as_tensor", "to") and not kwargs.get("non_blocking") else None
        if kwargs.pop("pin_memory", False):
            assert not to_card and not ours, "only the host's memory is pinned"
        device_free = lambda v: torch.device("cpu") if _is_cuda(v) else plain(v)  # noqa: E731
        args, kwargs = tree_map(device_free, args), tree_map(device_free, kwargs)
        attention = ATTENTION.get(name)
        out = attention(*args, **kwargs) if attention and (ours or to_card) else func(*args, **kwargs)
        if to_card or (ours and not to_host):
            return tree_map(lambda v: v.as_subclass(OnCard) if isinstance(v, Tensor) else v, out)
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    assert q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2], (q.shape, k.shape, v.shape)
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape and k.shape[2] > 0, (q.dtype, k.dtype, v.dtype, k.shape)
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, (q.stride(), k.stride(), v.stride())
    assert not causal or q.shape[2] == k.shape[2], "a causal mask is aligned differently where lengths differ"
    score = q.double() @ k.double().transpose(2, 3) * (scale or q.shape[3] ** -0.5)
    if causal:
        score = score.masked_fill(torch.ones(score.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    return (score.softmax(-1) @ v.double()).to(q.dtype), score.logsumexp(-1).float()


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256, (q.dtype, q.shape)
    assert not dropout and not debug
    return (*_attention(q, k, v, causal, scale), None, None, q.shape[2], k.shape[2], None, None, None)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None,
) -> Any:  # fmt: skip
    assert bias is None and with_lse and not dropout and q.shape[3] % 8 == 0
    out, lse = _attention(q, k, v, causal, scale)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None, None


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, dropout: float = 0.0, causal: bool = False, debug: bool = False
) -> Any:
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 128, (q.dtype, q.shape)
    assert bias is None and with_lse and not dropout and not debug
    out, lse = _attention(q, k, v, causal)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None


ATTENTION: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_cudnn_attention": _cudnn,
}


def _set_device(device: torch.device) -> None:
    if device.index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


class Event:
    """A mark on the card's clock, which is the host's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.at = enable_timing, math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        assert self.timing and other.timing
        return 1e3 * (other.at - self.at)


class Stream:
    """Work is done at once, in whatever order it is asked for; who has waited for whom is kept."""

    current: ClassVar[Stream]
    default: ClassVar[Stream]

    def __init__(self, device: object = None) -> None:
        self.seen: set[Stream] = set()  # streams whose work so far comes before what this one does next

    def wait_stream(self, other: Stream) -> None:
        self.seen |= {other, *other.seen}

    def synchronize(self) -> None:
        """All is done already."""


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class Properties:
    """What the engine asks of a card."""

    multi_processor_count = 2
    total_memory = 2**36
    shared_memory_per_multiprocessor = 164 << 10
    shared_memory_per_block_optin = 163 << 10


MERGE = dense.merge_on_card


def merge_by_torch(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Instead of Triton's kernel, which needs its interpreter or ``emulated``."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return MERGE(outs, lses, dtype)
    out, lse = reference.merge(*([t.flatten(0, 1).transpose(0, 1) for t in part] for part in (outs, lses)))
    return out.to(dtype), lse


class CheckedGraphs:
    """``Graphs`` of a card: work is refused that a graph could not hold, and a replay is the same work done once more."""

    def __init__(self, device: torch.device, max_packed: int) -> None:
        self.max_packed = max_packed
        [self.card] = Card.active

    setting = None

    def bound(self, packed: int) -> int:
        return self.max_packed

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        work()  # compiled, scratch memory allocated
        with self.card.capture():
            logits = work().clone()

        def replay() -> None:
            with self.card.capture():
                logits.copy_(work())

        return Captured(replay, logits)


@contextlib.contextmanager
def card(capability: tuple[int, int] = (8, 0)) -> Iterator[Card]:
    """A machine with such a card."""
    generator = torch.Generator

    def on_host(device: object = None) -> torch.Generator:
        return generator()

    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": _set_device,
        "mem_get_info": lambda device=None: (2**36, 2**36),
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: Properties(),
        "get_device_name": lambda device=None: "a card that is not there",
        "device": lambda device: contextlib.nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": lambda device=None: Stream.current,
        "default_stream": lambda device=None: Stream.default,
        "synchronize": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    cudnn_on.cache_clear()  # another card
    Stream.current = Stream.default = Stream()
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", on_host))
        stack.enter_context(mock.patch.object(dense, "merge_on_card", merge_by_torch))
        yield stack.enter_context(Card())
