"""A decode step recorded once and played again: what a CUDA graph is on a GPU.

A step of a small model is hundreds of launches of some microseconds, and Python takes as long for each. What they are told
(addresses, sizes) is the same from step to step, so it is kept, and one foreign call makes all launches that follow each other.
Operations of torch between them are played one by one: those that compute are called again and their results copied to where
they were; views and empty tensors only stay alive.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.job import record
from skvq.kernels.numba_cpu.launch import Launch, Team, here
from skvq.kernels.numba_cpu.simd import I32, I64, i64, record_at

LAUNCH_FIELDS = ("function", "threads", "job", "image", "words")
PLAY_FIELDS = ("parallel", "count", "launches")
EMPTY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operations that return data to Python: what Python does with it cannot be recorded."""

play_job = record_at(record(*PLAY_FIELDS))


class Kind(Enum):
    """What an operation of torch does, as far as a tape cares. ``reshape`` and ``to`` may return a view or a copy."""

    COMPUTES, MAY_BE_VIEW, EMPTY, WAITS = range(4)


@intrinsic
def call(typingctx, function, argument):
    """Call the C function ``void(int64)`` at an address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def call_team(typingctx, parallel, function, argument, threads):
    """``GOMP_parallel(function, argument, threads, 0)``."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I32, I32])
        count = builder.trunc(args[3], I32)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2], count, ir.Constant(I32, 0)])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), codegen


def build_play(stamp):
    """Kernel that runs recorded launches one after another, each after its job is restored (counters at zero)."""
    fields = len(LAUNCH_FIELDS)

    def play(address):
        if stamp == 0:
            return
        job = play_job(address)
        launches = i64(job.launches)
        for n in range(job.count):
            function, threads = launches[fields * n], launches[fields * n + 1]
            place, image = launches[fields * n + 2], i64(launches[fields * n + 3])
            words = i64(place)
            for w in range(launches[fields * n + 4]):
                words[w] = image[w]
            if threads == 1:
                call(function, place)
            else:
                call_team(job.parallel, function, place, threads)

    return play


PLAY = Entry(build_play, PLAY_FIELDS)


class Launches:
    """Kernels launched in a row, with no torch operation between them."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.launches: list[Launch] = []
        self._program = array("q")

    def add(self, launch: Launch) -> None:
        job, image = launch.job.buffer_info(), launch.image.buffer_info()
        self._program.extend((launch.function.address, launch.threads, job[0], image[0], job[1]))
        self.launches.append(launch)

    def play(self) -> None:
        parallel = self.team.parallel_address
        if parallel:
            PLAY(1, parallel, len(self.launches), self._program.buffer_info()[0])
            return
        for launch in self.launches:  # no team of torch's to call from compiled code
            launch.job[:] = launch.image
            self.team.run(launch.function, launch.job, launch.threads)


@dataclass(frozen=True, slots=True)
class Operation:
    """A torch operation to call again; its result is copied into ``out``, whose memory stays the same."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def play(self) -> None:
        new = self.function(*self.args, **self.kwargs)
        if self.function._schema.is_mutable:
            return
        for target, source in zip(tree_leaves(self.out), tree_leaves(new), strict=True):
            target.copy_(source)


class Tape(TorchDispatchMode):
    """``with Tape() as tape:`` does the work and records it; ``tape.play()`` does it again on what its tensors then hold.

    Launches run on as many threads as when they were recorded. Nothing recorded may depend on a number that the host reads.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not by importing it, which takes torch longer than loading a small model: nothing here is compiled by it."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Launches | Operation] = []
        self._alive: list[Any] = []
        self._memory = torch.empty(0)

    def __enter__(self) -> Tape:
        if here.tape is not None:
            raise RuntimeError("a tape is being recorded on this thread: one at a time")
        here.tape = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        here.tape = None
        super().__exit__(*error)

    def launch(self, team: Team, launch: Launch) -> None:
        """See ``launch.Recorder``."""
        if not self._steps or not isinstance(self._steps[-1], Launches):
            self._steps.append(Launches(team))
        self._steps[-1].add(launch)

    def workspace(self, nbytes: int) -> Tensor:
        """See ``launch.Recorder``. All launches share it, since they run one after another: it stays in the CPU's cache."""
        if self._memory.nbytes < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind is Kind.WAITS:
            raise RuntimeError(f"{func._schema.name} tells the host a number: it cannot be recorded")
        out = func(*args, **kwargs)
        self._alive.append((args, out))
        if kind is Kind.COMPUTES or (kind is Kind.MAY_BE_VIEW and not _is_view(out, args[0])):
            self._steps.append(Operation(func, args, kwargs, out))
        return out

    def play(self) -> None:
        """Do the work again."""
        for step in self._steps:
            step.play()


@functools.cache
def _kind_of(func: Any) -> Kind:
    schema = func._schema
    if schema.name in WAITS:
        return Kind.WAITS
    if schema.name in EMPTY:
        return Kind.EMPTY
    alias = any(r.alias_info is not None for r in schema.returns)
    return Kind.MAY_BE_VIEW if alias and not schema.is_mutable else Kind.COMPUTES


def _is_view(out: Any, of: Tensor) -> bool:
    """Whether the result (of ``chunk``: its first part) shares memory with ``of``."""
    return torch._C._is_alias_of(out if isinstance(out, Tensor) else out[0], of)
