"""Triton's kernels compiled for a card and run by ``ptx.py``: ``with emulated(80): kernel[grid](...)``."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from card import MERGE, OnCard, plain
from ptx import Machine, Memory, Program
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skvq.kernels import dense
from skvq.kernels.triton_gpu import overlap

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
KEPT = 32
programs: dict[Any, Program] = {}
"""The last KEPT that were compiled: each has thousands of objects."""


def span_of(tensor: Tensor) -> tuple[int, np.ndarray]:
    """Address and bytes of the whole storage behind a tensor."""
    storage = plain(tensor).untyped_storage()
    base, count = storage.data_ptr(), storage.nbytes()
    return base, np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(base)) if count else np.zeros(0, np.uint8)


def compiled(kernel: Any, values: dict[str, Any], arch: int, options: dict[str, int]) -> tuple[Program, list[str]]:
    """The kernel as Triton specializes it for these arguments, and the names of those that are left."""
    signature, constants, attributes = {}, {}, {}
    loose = {p.name for p in kernel.params if p.do_not_specialize}
    unaligned = loose | {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in {kernel.arg_names[i] for i in kernel.constexprs} or (
            type(value) is int and value == 1 and name not in loose
        ):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if plain(value).data_ptr() % 16 == 0 and name not in unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    key = (kernel, arch, str(signature), str(constants), str(attributes), str(options))
    if key not in programs:
        with torch._C.DisableTorchFunction():
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        if len(programs) == KEPT:
            del programs[next(iter(programs))]
        programs[key] = Program(made.asm["ptx"], 32 * options["num_warps"], made.metadata.shared)
    return programs[key], [name for name in kernel.arg_names if signature[name] != "constexpr"]


def launch(kernel: Any, arch: int, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    names = iter(kernel.arg_names)
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    settings = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
    program, left = compiled(kernel, values, arch, {"num_warps": 4, "num_stages": 3} | settings)
    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    memory = Memory(list({base: (base, data) for base, data in map(span_of, tensors)}.values()))
    params: dict[str, int] = {}
    for (_, place), name in itertools.zip_longest(program.params, left):
        value = values[name] if name else 0  # Triton's own scratch comes last
        if isinstance(value, Tensor):
            params[place] = plain(value).data_ptr()
        else:
            params[place] = int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)
    grid = (*grid, 1, 1)[:3]
    assert max(grid[1:]) <= 65535, grid
    for place in itertools.product(*map(range, grid)):
        Machine(program, memory, params, place, grid).run()


@contextlib.contextmanager
def emulated(arch: int) -> Iterator[None]:
    """Kernels launched inside are compiled for sm_``arch`` and emulated; their tensors lie on a card that is not there."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(isinstance(a, OnCard) for a in args if isinstance(a, Tensor)), "a kernel is given a tensor of the host"
        with torch._C.DisableTorchFunction():
            launch(self, arch, grid, args, options)

    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(dense, "merge_on_card", MERGE),
        mock.patch.object(overlap, "driver_version", return_value=13000),
    ):
        yield
