"""Checks of the Triton kernels under the interpreter: ``python triton_checks.py NAME`` runs one group and asserts.

A process of its own, because Triton reads TRITON_INTERPRET when a kernel is decorated. ``test_triton_interpreter`` runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from cases import Case, arguments, check_unpacked, compare, formats, make_case, torch_error
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.interface import FullSlots
from skvq.kernels.layout import LEVELS, PAGE_TOKENS
from skvq.kernels.linear import DenseLinear, StoredLinear
from skvq.kernels.ops import TorchOps
from skvq.kernels.triton_gpu import (
    TritonGpu,
    fragments,
    label_blocks,
    loaders,
    matvec,
    metadata,
    prepare,
    raised,
    scores,
    softmax,
    sums,
    tiles,
)
from skvq.kernels.triton_gpu import blocks as block_kernels
from skvq.kernels.triton_gpu.card import Card, Tuning
from skvq.kernels.triton_gpu.forms import SHARED_MARGIN, PackedForm, label_bytes
from skvq.kernels.triton_gpu.lattice import quantize_lattice
from skvq.kernels.triton_gpu.merge import merge_parts
from skvq.kernels.triton_gpu.metric import MetricTables
from skvq.kernels.triton_gpu.ops import TritonOps

CPU = torch.device("cpu")
_patch_language = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor: type, scope: Any) -> None:
    """Triton 3.6, of torch 2.10 and 2.11, makes an int of an array of one number, which NumPy refuses from 2.5 on."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_patched: set[int] = set()


def _patch_once(fn: Any) -> Any:
    """Triton patches its language at every launch and call of a device function, a third of the time: once a module will do."""
    if id(fn.__globals__) not in _patched:
        _patched.add(id(fn.__globals__))
        _patch_language(fn)
    return interpreter._LangPatchScope()


interpreter._patch_lang_tensor = _patch_tensor_for_numpy
interpreter._patch_lang = _patch_once


def backend() -> TritonGpu:
    return TritonGpu(CPU)


def check_attend(method: str, part: int = 0, **options: object) -> None:
    """``part``: tokens that packed attention takes at a time, if not as it likes."""
    made = backend()
    if part:
        form = PackedForm(part=part, stages=2, registers=0, programs=12)
        made = TritonGpu(CPU, tuning=Tuning(form_of=lambda layout, **rest: form))
    check_case(make_case(**options), method, made, **options)  # type: ignore[arg-type]


def check_case(case: Case, method: str, made: TritonGpu | None = None, **options: object) -> None:
    out, lse, exact, exact_lse = compare(made or backend(), case, method)
    error, allowed = float((out.float() - exact).abs().max()), 2 * torch_error(exact, case, method)
    print(f"{method} {options}: error {error:.2e}, allowed {allowed:.2e}", flush=True)
    assert error <= allowed + 1e-7, (method, options, error, allowed)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf), (method, options)
    finite = exact_lse > -torch.inf
    off = (lse - exact_lse)[finite].abs() - 1e-3 * exact_lse[finite].abs()  # scores of hundreds have eight bits below one
    assert float(off.max() if finite.any() else 0.0) < 0.02, (method, options)
    assert out.dtype == case.q.dtype and lse.shape == case.q.shape[:3]


def attend_heads() -> None:
    """The default, its boundaries, batches, several queries, GQA and MHA, sliding spans."""
    check_attend("heads")
    check_attend("heads", has_key_mean=True, group_size=64, packed=(3,))
    check_attend("heads", value_bits=1.5, has_key_mean=True, packed=(2,))
    check_attend("heads", repeat=1, kv_heads=3, queries=2, packed=(1,))
    check_attend("heads", repeat=7, packed=(2,))
    check_attend("heads", repeat=5, queries=3, packed=(2,), key_bits=1.5, value_bits=3.0, group_size=64)
    check_attend("heads", queries=3, packed=(0, 2, 4), span=300)
    check_attend("heads", has_basis=False, packed=(2,))
    check_attend("heads", dtype=torch.bfloat16, packed=(2,))
    check_attend("heads", packed=(0, 0))
    check_attend("heads", span=3, window=5)
    check_attend("heads", retained=1.0, packed=(2,))
    check_attend("heads", among_trits=True, packed=(1, 9), group_size=64, has_key_mean=True)
    check_attend("heads", among_trits=True, packed=(2,), key_bits=3.0, value_bits=4.0, size=64)


def attend_chunks() -> None:
    """The pages of a chunk behind the first, counted from its beginning (``dual_chunk_method``): one row has one, one some."""
    for method, options in (("heads", {"has_key_mean": True}), ("labels", {"group_size": 64}), ("plain", {})):
        case = make_case(packed=(12, 23), **options)  # type: ignore[arg-type]
        step = replace(
            case.step,
            page_table=case.step.page_table[:, 1:],
            packed=(case.step.packed - PAGE_TOKENS).clamp(0, PAGE_TOKENS),
            positions=(case.step.positions - PAGE_TOKENS).clamp_max(PAGE_TOKENS - 1),
            max_packed=PAGE_TOKENS,
        )
        check_case(replace(case, step=step, full=replace(case.full, positions=case.full.positions - PAGE_TOKENS)), method)


def attend_parts() -> None:
    """Whole tiles at a time and halves."""
    for part in (64, 128):
        check_attend("heads", part, packed=(1, 3))
        check_attend("heads", part, has_key_mean=True, packed=(3,), key_bits=4.0)
        check_attend("heads", part, has_key_mean=True, group_size=64, packed=(2,), value_bits=3.0, span=200)
        check_attend("heads", part, size=64, repeat=1, packed=(2,), key_bits=8.0)


def attend_spans() -> None:
    """A span that ends a token before, at and after the edge of a tile."""
    for span in (37, 38, 39, 165, 166):
        check_attend("heads", packed=(2,), kv_heads=2, repeat=1, span=span)


def attend_others() -> None:
    check_attend("labels", packed=(1, 2))
    check_attend("labels", packed=(1,), key_bits=1.5, value_bits=3.0, group_size=64, size=64, queries=2)
    check_attend("labels", packed=(2,), key_bits=4.0, value_bits=1.5, repeat=1, span=200)
    check_attend("labels", packed=(2,), among_trits=True)
    check_attend("labels", packed=(2,), key_bits=4.0, value_bits=8.0, group_size=32, size=64, repeat=2, span=100)
    check_attend("labels", packed=(1,), key_bits=2.0, value_bits=4.0, group_size=64, kv_heads=9, repeat=1)
    check_attend("labels", packed=(1,), key_bits=8.0, value_bits=2.0, group_size=64, size=64)
    check_attend("plain", packed=(3, 11))
    check_attend("plain", packed=(0, 2), span=200, queries=3, dtype=torch.bfloat16, size=64)


def label_ranges() -> None:
    """Units of groups far apart, and the largest scales that E4M3 holds: nothing overflows a half or is lost in it."""
    gen = torch.Generator().manual_seed(3)
    for value_bits, exponents, factor in ((2.0, (-6, 6), 1.0), (8.0, (-6, 6), 1.0), (2.0, (-9, -8), 896.0)):
        case = make_case(packed=(2,), group_size=64, value_bits=value_bits)
        keys, values = (
            dataclasses.replace(side, unit=torch.exp2(torch.randint(*exponents, side.unit.shape, generator=gen).float()))
            for side in (case.labels.keys, case.labels.values)
        )
        data = case.pages.meta.view(torch.uint8).view(-1, 4)
        flags = (data & torch.tensor([0x80, 0, 0, 0])).to(torch.uint8)
        numbers = reference.e4m3_decode(data & torch.tensor([0x7F, 0xFF, 0xFF, 0xFF], dtype=torch.uint8)) * factor
        meta = (reference.e4m3_encode(numbers) | flags).view(torch.int32).view(case.pages.meta.shape)
        case = dataclasses.replace(
            case, labels=dataclasses.replace(case.labels, keys=keys, values=values),
            pages=dataclasses.replace(case.pages, meta=meta),
        )  # fmt: skip
        out, _, exact, _ = compare(backend(), case, "labels")
        error, allowed = float((out.float() - exact).abs().max()), 2 * torch_error(exact, case, "labels")
        print(f"labels {value_bits} {exponents} {factor}: error {error:.2e}, allowed {allowed:.2e}", flush=True)
        assert error <= allowed, (value_bits, exponents, error, allowed)


def assembly_order() -> None:
    """The kernels as compiled for a GPU, where loaders exchange bytes 1 and 2 of every four; all but the assembly itself.

    The interpreter has none, so its functions are replaced by their portable form, after that exchange.
    """
    portable = {"planes": loaders.planes, "metadata": metadata.metadata, "meta_halves": metadata.meta_halves}
    raised_planes = raised.raised_planes
    slow_exp2, near_dot = softmax.exp2, prepare.near_dot

    def planes(x: tl.tensor, *rest: object) -> object:
        data = x.handle.data
        swapped = data.reshape(*data.shape[:-1], -1, 4)[..., [0, 2, 1, 3]].reshape(data.shape)
        return portable["planes"](tl.tensor(type(x.handle)(swapped, x.handle.dtype), x.type), *rest[:-1], False)

    fragments.planes = planes
    tiles.exp2 = label_blocks.exp2 = lambda x, asm: slow_exp2(x, False)
    scores.metadata = sums.metadata = lambda word, values, asm, fp8: portable["metadata"](word, values, False, False)
    label_blocks.meta_halves = lambda word, values, asm: portable["meta_halves"](word, values, False)
    raised.raised_planes = lambda x, width, asm: raised_planes(x, width, False)
    prepare.near_dot = lambda a, b, parts, wide: near_dot(a, b, parts, True)  # it knows no bfloat16 dot either
    for method, options in (
        ("labels", {"packed": (1, 2)}),
        ("labels", {"packed": (2,), "key_bits": 4.0, "value_bits": 8.0, "group_size": 32, "size": 64, "span": 100}),
        ("heads", {"packed": (2,), "has_key_mean": True, "group_size": 64}),
        ("heads", {"packed": (2,), "key_bits": 3.0, "value_bits": 1.5, "size": 64, "repeat": 8}),
    ):
        case = make_case(**options)  # type: ignore[arg-type]
        made = TritonGpu(CPU, card=dataclasses.replace(Card.of(CPU), interpreted=False))
        out, _, exact, _ = compare(made, case, method)
        error, allowed = float((out.float() - exact).abs().max()), 2 * torch_error(exact, case, method)
        print(f"{method} {options}: error {error:.2e}, allowed {allowed:.2e}", flush=True)
        assert error <= allowed, (method, options, error, allowed)


def attend_formats(step: int = 7) -> None:
    for index, (key_bits, value_bits, group, size) in enumerate(formats()):
        if index % step == 0:
            check_attend(
                "heads", key_bits=key_bits, value_bits=value_bits, group_size=group, size=size, packed=(1,), repeat=2,
                has_key_mean=index % 3 == 0,
            )  # fmt: skip


def every_format() -> None:
    attend_formats(1)


def invariants() -> None:
    """A batch equals its singles; where pages lie changes nothing; poisoned scratch changes nothing."""
    case = make_case(packed=(2, 11), kv_heads=2, repeat=2)
    made = backend()
    out, lse = made.heads.attend(case.q, case.pages, case.heads, case.full, case.step)
    step = case.step
    for row in range(2):
        alone = dataclasses.replace(
            step, slots=step.slots[row : row + 1], positions=step.positions[row : row + 1], packed=step.packed[row : row + 1]
        )
        one, _ = made.heads.attend(case.q[row : row + 1].contiguous(), case.pages, case.heads, case.full, alone)
        assert float((one[0] - out[row]).abs().max()) < 4e-3
    order = torch.randperm(len(case.pages.meta))
    inverse = torch.argsort(order)
    moved = dataclasses.replace(
        case.pages,
        key_codes=case.pages.key_codes[order],
        value_codes=case.pages.value_codes[order],
        meta=case.pages.meta[order],
    )
    table = inverse[step.page_table.long()].to(torch.int32)
    for buffer in made.shared.scratch._held:
        buffer.fill_(float("nan"))
    again, again_lse = made.heads.attend(case.q, moved, case.heads, case.full, dataclasses.replace(step, page_table=table))
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


def packing() -> None:
    """Codes and metadata as the reference writes them, and nothing else touched; unpacking bit for bit, but for bases."""
    forms = ((2.0, 2.0, 128, 128), (2.0, 1.5, 64, 64), (1.5, 3.0, 32, 64), (4.0, 8.0, 64, 64), (3.0, 2.0, 64, 64))
    for key_bits, value_bits, group, size in forms:
        for method in ("heads", "labels"):
            case = make_case(
                size=size, key_bits=key_bits, value_bits=value_bits, group_size=group, packed=(11,), has_key_mean=True,
                has_metric=size == 64 and value_bits == 8.0, among_trits=key_bits == 3.0,
            )  # fmt: skip
            heads = dataclasses.replace(case.heads, values=dataclasses.replace(case.heads.values, has_metric=False))
            tile, codec = case.layout.tile, heads if method == "heads" else case.labels  # one side together, one alone
            count, first = 2 * tile, (7 if tile == 160 else 9) * tile  # across the edge of a page
            gen = torch.Generator().manual_seed(1)
            keys, values = (torch.randn(count, 2, size, generator=gen).half() for _ in range(2))
            retained = torch.rand(count, generator=gen) < 0.1
            row = case.step.page_table[1]
            done = []
            for made in (reference.Reference(), backend()):
                pages = dataclasses.replace(
                    case.pages, key_codes=torch.full_like(case.pages.key_codes, 171),
                    value_codes=torch.full_like(case.pages.value_codes, 171), meta=torch.full_like(case.pages.meta, -77),
                )  # fmt: skip
                getattr(made, method).pack(pages, codec, row, first, keys, values, retained)
                done.append(pages)
            for name, untouched in (("key_codes", 171), ("value_codes", 171), ("meta", -77)):
                wanted, got = getattr(done[0], name), getattr(done[1], name)
                written = wanted != untouched
                share = float((wanted == got)[written].float().mean())
                assert share >= 0.999 and bool((got[~written] == untouched).float().mean() >= 0.999), (name, share)
            dtypes = torch.float32, torch.float16  # the interpreter cuts bfloat16 off instead of rounding
            check_unpacked(backend(), method, done[1], codec, (row, first, count), dtypes)


def lattice() -> None:
    """Codes chosen together: those of the reference at every bit width, head size and group; tokens end within a program."""
    formats_of_a_head = ((64, 32, 2.0), (64, 64, 1.5), (128, 32, 3.0), (128, 64, 4.0), (128, 128, 8.0), (128, 64, 2.0))
    for size, group, bits in formats_of_a_head:
        lanes = 64 if size == 64 else 128  # two programs a head, or one
        side = make_case(size=size, group_size=group, kv_heads=2, has_metric=True, packed=(1,)).heads.keys
        gen = torch.Generator().manual_seed(int(bits))
        y = torch.randn(96, 2, size, generator=gen) * torch.rand(2, size, generator=gen) * 3
        y[7], y[8] = 0.25, 1e-6  # groups of one number, groups below the smallest scale
        before = y.clone()
        # float32 loses ties of 8 bits that the kernel, which works on errors from the start, does not
        exact = dataclasses.replace(side, **{k: getattr(side, k).double() for k in ("unit", "clip", "metric", "factor")})
        wanted = reference.quantize_lattice(y.double(), LEVELS[bits], exact)
        got = quantize_lattice(y, LEVELS[bits], side, MetricTables(side), lanes)
        assert torch.equal(y, before)
        for name, one, other in zip(("codes", "scales", "mids"), wanted, got, strict=True):
            assert float((one == other).float().mean()) >= 0.999, (size, group, bits, name)
        errors = []
        for codes, scale, mid in (wanted, got):
            levels = (reference.e4m3_decode(part) * side.unit for part in (scale, mid))
            e = y - reference.dequantize(codes.view(96, 2, -1, group), *levels, LEVELS[bits]).view_as(y)
            errors.append(float(torch.einsum("thi,hij,thj->", e.double(), side.metric.double(), e.double())))
        assert abs(errors[1] / errors[0] - 1) < 1e-4, (size, group, bits, errors)


def merging() -> None:
    """Parts of any number, strides and dtype; a row that sees nothing in some part, or in all of them."""
    gen = torch.Generator().manual_seed(3)
    for number, (kv_heads, repeat, count, size) in itertools.product((2, 3, 8, 9, 17), ((2, 3, 37, 128), (1, 1, 5, 80))):
        outs = [torch.randn(kv_heads, repeat, count, size, generator=gen) for _ in range(number)]
        lses = [20 * torch.randn(kv_heads, repeat, count, generator=gen) for _ in range(number)]
        for lse in lses:
            lse[0, 0, 1] = -torch.inf
        lses[1][:, :, 2] = -torch.inf
        outs[0] = outs[0].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        if number == 3:
            outs[1] = outs[1].half()  # another dtype, and with it other strides
        got = merge_parts(outs, lses, torch.float32)
        wanted = reference.merge(*([t.flatten(0, 1).transpose(0, 1).float() for t in part] for part in (outs, lses)))
        allowed = 2 * torch.finfo(torch.float32).eps * max(float(x[x.isfinite()].abs().max()) for x in lses)  # of an exponent
        for one, other in zip(got, wanted, strict=True):
            assert one.shape == other.shape and torch.allclose(one, other, atol=allowed, rtol=allowed), (number, size)


def odd_shapes() -> None:
    """Head sizes without a kernel: torch computes them."""
    case = make_case(size=32, group_size=32, packed=(1,), kv_heads=2)
    out, _ = backend().heads.attend(case.q, case.pages, case.heads, case.full, case.step)
    assert torch.equal(out, reference.attend_heads(case.q, case.pages, case.heads, case.full, case.step)[0])


def crowded_labels() -> None:
    """Groups that do not fit into shared memory: the slower kernel computes them, and one word is said."""
    case = make_case(packed=(1,), group_size=64)
    small = dataclasses.replace(Card.of(CPU), block_bytes=label_bytes(case.layout))
    exact, _ = reference.attend_labels(case.q.float(), *arguments(case, "labels"))
    for card, words in ((small, 1), (dataclasses.replace(small, block_bytes=small.block_bytes + SHARED_MARGIN), 0)):
        made, said = TritonGpu(CPU, card=card), io.StringIO()
        with contextlib.redirect_stderr(said):
            outs = [made.labels.attend(case.q, *arguments(case, "labels"))[0] for _ in range(2)]
        assert said.getvalue().count("\n") == said.getvalue().count("a slower kernel is used") == words, said.getvalue()
        for out in outs:
            assert float((out.float() - exact).abs().max()) <= 2 * torch_error(exact, case, "labels")


def fused_operations() -> None:
    """Every operation against torch, in every dtype; odd sizes, strided rows, poisoned slots, inputs left alone."""
    torch_ops, ops = TorchOps(), TritonOps()
    gen = torch.Generator().manual_seed(0)

    def same(got: Tensor, wanted: Tensor, ulps: float = 2.0) -> None:
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, (got.dtype, got.shape)
        ulps *= 3 if wanted.dtype == torch.bfloat16 else 1  # the interpreter cuts to bfloat16, a GPU rounds
        allowed = ulps * torch.finfo(wanted.dtype).eps * wanted.float().abs().clamp_min(1e-3)
        assert bool(((got.float() - wanted.float()).abs() <= allowed).all()), wanted.dtype

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.randn(96, generator=gen).to(dtype)
        x, delta = (torch.randn(3, 2, 96, generator=gen).to(dtype)[:, :1] for _ in range(2))  # rows lie apart
        before = x.clone()
        same(ops.rms_norm(x[:, 0], weight, 1e-5), torch_ops.rms_norm(x[:, 0], weight, 1e-5))
        for got, wanted in zip(
            ops.add_rms_norm(x, delta, weight, 1e-5), torch_ops.add_rms_norm(x, delta, weight, 1e-5), strict=True
        ):
            same(got, wanted)
        assert torch.equal(x, before)
        gate_up = torch.randn(3, 1, 2 * 1100, generator=gen).to(dtype) * 4
        same(ops.swiglu(gate_up), torch_ops.swiglu(gate_up), 4.0)
        heads, kv_heads, size = 8, 2, 64
        joint = torch.randn(2, 1, heads + 2 * kv_heads, size, generator=gen).to(dtype)
        q, k, v = joint.split([heads, kv_heads, kv_heads], 2)
        norms = torch.randn(2, size, generator=gen).to(dtype)
        for got, wanted in zip(ops.norm_heads(q, k, *norms, 1e-6), torch_ops.norm_heads(q, k, *norms, 1e-6), strict=True):
            same(got, wanted, 4.0)
        several, turns = joint.expand(2, 3, -1, -1)[:, :, :heads], torch.rand(2, 3, 1, size // 2, generator=gen) * 6
        same(*(o.turn(several, turns.cos(), turns.sin()) for o in (ops, torch_ops)), 8.0)
        lses = [4 * torch.randn(2, 3, heads, generator=gen) for _ in range(3)]
        lses[2][1] = -torch.inf
        outs = [(several * share).contiguous() for share in (1.0, 0.5, 0.0)]
        for got, wanted in zip(ops.merge(outs, lses), torch_ops.merge(outs, lses), strict=True):
            same(got, wanted, 8.0)
        angle = torch.rand(2, 1, 1, size // 2, generator=gen) * 6
        slots, places = torch.tensor([2, 1]), torch.tensor([3, 0])
        for cache in (torch.float16, torch.bfloat16):
            rows = torch.full((2, 3, kv_heads, 9, size), 7.0, dtype=cache)
            positions = torch.full((3, 9), -1, dtype=torch.int32)
            fulls = [FullSlots(keys=rows[0].clone(), values=rows[1].clone(), positions=positions) for _ in range(2)]
            outs = [
                o.rope_to_slots(q, k, v, angle.cos(), angle.sin(), f, slots, places)
                for o, f in zip((ops, torch_ops), fulls, strict=True)
            ]
            same(*outs, 8.0)
            same(fulls[0].keys, fulls[1].keys, 8.0)
            same(fulls[0].values, fulls[1].values)
            assert dtype != cache or torch.equal(fulls[0].values, fulls[1].values)
        joint = torch.randn(1, 5, heads + 2 * kv_heads, size, generator=gen).to(dtype)
        q, k, v = joint.split([heads, kv_heads, kv_heads], 2)
        angle = torch.rand(1, 5, 1, size // 2, generator=gen) * 6
        for got, wanted in zip(ops.norm_heads(q, k, *norms, 1e-6), torch_ops.norm_heads(q, k, *norms, 1e-6), strict=True):
            same(got, wanted, 4.0)
        held = [torch.full((9, kv_heads, 2 * size), 7.0, dtype=dtype) for _ in range(2)]  # keys and values, by token
        both = [[part.transpose(0, 1) for part in t.split(size, 2)] for t in held]
        outs = [o.rope_to_buffer(q, k, v, angle.cos(), angle.sin(), *b, 3) for o, b in zip((ops, torch_ops), both, strict=True)]
        same(*outs, 8.0)
        same(*held, 8.0)
        assert torch.equal(both[0][1], both[1][1])
        again = [torch.full_like(t, 7.0) for t in both[0]]
        none = ops.rope_to_buffer(q[:, :, :0], k, v, angle.cos(), angle.sin(), *again, 3)  # keys and values alone
        assert none.shape == (1, 5, 0, size) and all(map(torch.equal, again, both[0]))


def matrices() -> None:
    """A few vectors by matrices with what is around them, as torch one by one: even and odd widths, more tiles than are on
    their way and fewer, rows that no program fills, biases; more vectors, and float32, go by torch's product."""
    torch_ops, ops, kernel = TorchOps(), TritonOps(), matvec.matvec_kernel
    gen = torch.Generator().manual_seed(0)
    launches: list[int] = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(grid[0])
            return kernel[grid]

    matvec.matvec_kernel = Counted()  # type: ignore[assignment]
    matvec.FASTER_VECTORS = matvec.MOST_VECTORS

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    def check(dtype: torch.dtype, vectors: int, width: int, heads: int, inner: int, tiling: matvec.Tiling) -> None:
        matvec.tiling_of = lambda vectors, outs, width, gated: tiling  # type: ignore[assignment]

        def matrix(outs: int, ins: int, bias: bool) -> DenseLinear:
            return DenseLinear((draw(outs, ins) / ins**0.5).to(dtype), draw(outs).to(dtype) if bias else None)

        x, attended, norm = draw(vectors, 1, width).to(dtype), draw(vectors, 1, heads).to(dtype), draw(width).to(dtype)
        before = x.clone()
        qkv, output = matrix(2 * heads + 3, width, vectors == 2), matrix(width, heads, vectors != 2)
        down = matrix(width, inner, False)
        gate_up = matrix(2 * inner, width, vectors == 2)
        layer = (x, attended, output, norm, 1e-5, gate_up, down)
        for got, wanted in (
            (ops.norm_linear(x, norm, 1e-5, qkv), torch_ops.norm_linear(x, norm, 1e-5, qkv)),
            (ops.after_attention(*layer), torch_ops.after_attention(*layer)),
        ):
            assert got.dtype == dtype and got.shape == wanted.shape
            ulps = 6 if dtype == torch.bfloat16 else 2  # the interpreter cuts to bfloat16, a GPU rounds
            error, largest = float((got.float() - wanted.float()).abs().max()), float(wanted.float().abs().max())
            print(f"{dtype} {vectors} x {width} {heads} {inner} {tiling}: {error / largest:.2e}", flush=True)
            assert error <= ulps * torch.finfo(dtype).eps * largest, (dtype, vectors, width, error, largest)
        assert torch.equal(x, before)

    rows = {n: matvec.Tiling(rows=n, warps=1, depth=2) for n in (4, 8, 16)}
    check(torch.float16, 1, 512, 256, 320, rows[16])  # a step of the loop, none, one over an edge
    check(torch.float16, 1, 1100, 40, 72, dataclasses.replace(rows[16], depth=1))
    check(torch.float16, 2, 77, 1030, 33, rows[8])
    check(torch.float16, 3, 48, 64, 1, rows[4])
    check(torch.bfloat16, 1, 600, 300, 33, dataclasses.replace(rows[16], depth=3))
    check(torch.bfloat16, 4, 96, 520, 40, rows[8])
    assert len(launches) == 6 * 4
    check(torch.float16, 5, 96, 64, 40, rows[8])
    check(torch.float32, 1, 96, 64, 40, rows[8])
    assert len(launches) == 6 * 4


def blocks() -> None:
    """Matrices of quantized blocks, of every kind: rows are those of the words, products as torch makes them of these rows,
    alone, with what is around them, and stacked; for many vectors the matrix is expanded, a part at a time."""
    from ggml_fixtures import blocks_of

    torch_ops, ops, gen = TorchOps(), TritonOps(), torch.Generator().manual_seed(0)
    block_kernels.rows_of, block_kernels.WARPS = lambda *_, **__: 4, 2  # few programs: the interpreter runs them one by one

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    def matrix(kind: str, rows: int, columns: int) -> block_kernels.BlockMatrix:
        return block_kernels.BlockMatrix(blocks_of(kind, rows, columns)[0], kind, torch.device("cpu"))

    def check(got: Tensor, wanted: Tensor, what: object) -> None:
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
        ulps = 6 if got.dtype == torch.bfloat16 else 2  # the interpreter cuts to bfloat16, a GPU rounds
        error, largest = float((got.float() - wanted.float()).abs().max()), float(wanted.float().abs().max())
        print(f"{what}: {error / largest:.2e}", flush=True)
        assert error <= ulps * torch.finfo(got.dtype).eps * largest, (what, error, largest)

    def dense(linear: StoredLinear[block_kernels.BlockMatrix]) -> DenseLinear:
        return DenseLinear(torch.cat([part.words.dense() for part in linear.parts]), linear.bias)

    def product(linear: StoredLinear[block_kernels.BlockMatrix], x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.float()
        return torch.nn.functional.linear(x.float(), dense(linear).weight, bias).to(x.dtype)

    for kind in FORMATS:
        stored = matrix(kind, 9, 512)
        weight = stored.words.dense()
        assert torch.equal(stored.rows(torch.tensor([8, 3, 3])), weight[[8, 3, 3]]), kind
        for dtype, count in ((torch.float16, 1), (torch.bfloat16, 3)):
            linear, x = StoredLinear((stored,), draw(9).to(dtype)), draw(count, 512).to(dtype)
            check(linear(x), product(linear, x), (kind, dtype, count))
    # more blocks than a program takes at once, fewer than a warp, rows that no program fills, an edge within the blocks
    for kind, rows, columns, count in (("Q4_1", 6, 130 * 16, 1), ("Q8_0", 3, 32, 3), ("Q6_K", 5, 256 * 9, 1)):
        linear, x = StoredLinear((matrix(kind, rows, columns),), None), draw(count, columns).half()
        check(linear(x), product(linear, x), (kind, rows, columns, count))
    block_kernels.EXPANDED_BYTES, block_kernels.MOST_LAUNCHES = 2 * 64 * 7, 2
    linear = StoredLinear((matrix("Q4_0", 9, 64), matrix("Q8_0", 8, 64)), draw(17).half())
    for count in (5, 8, 9):
        x = draw(count, 1, 64).half()
        check(linear(x), product(linear, x), ("stacked", count))
    for count, dtype in ((1, torch.float16), (3, torch.float16), (1, torch.bfloat16), (5, torch.float16)):
        x, attended, norm = draw(count, 1, 256).to(dtype), draw(count, 1, 64).to(dtype), draw(256).to(dtype)
        qkv = StoredLinear((matrix("Q4_K", 12, 256), matrix("Q6_K", 9, 256)), draw(21).to(dtype))
        output, gate_up = (StoredLinear((matrix("Q5_0", *shape),), None) for shape in ((256, 64), (2 * 32, 256)))
        down = StoredLinear((matrix("Q4_1", 256, 32),), draw(256).to(dtype))
        before = x.clone()
        layer = [DenseLinear(dense(part).weight.to(dtype), part.bias) for part in (output, gate_up, down)]
        wanted = torch_ops.norm_linear(x, norm, 1e-5, DenseLinear(dense(qkv).weight.to(dtype), qkv.bias))
        check(ops.norm_linear(x, norm, 1e-5, qkv), wanted, ("norm", count, dtype))
        wanted = torch_ops.after_attention(x, attended, layer[0], norm, 1e-5, *layer[1:])
        check(ops.after_attention(x, attended, output, norm, 1e-5, gate_up, down), wanted, ("layer", count, dtype))
        assert torch.equal(x, before)


def experts() -> None:
    """Layers with experts, as torch one by one: weights in 16 bits and in blocks, an expert of several vectors and none, more
    logits than a warp has lanes; many tokens, and float32, go by torch's products."""
    from ggml_fixtures import blocks_of

    from skvq.kernels import experts as mixtures
    from skvq.kernels.triton_gpu import experts as expert_kernels
    from skvq.kernels.triton_gpu import grouped

    torch_ops, ops, gen = TorchOps(), TritonOps(), torch.Generator().manual_seed(0)
    block_kernels.rows_of, block_kernels.WARPS = lambda *_, **__: 8, 1  # few programs: the interpreter runs them one by one
    matvec.tiling_of = lambda vectors, outs, width, gated: matvec.Tiling(rows=8, warps=1, depth=2)  # type: ignore[assignment]
    launches: list[str] = []
    made: list[mixtures.Experts] = []
    for module, name in ((matvec, "matvec_kernel"), (block_kernels, "block_matvec_kernel"), (expert_kernels, "route_kernel")):
        setattr(module, name, counted(name, getattr(module, name), launches))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    logits = draw(3, 70).half()
    logits[1, 5:] = logits[1, 5]  # alike: the first of them
    logits[2, 3] = torch.nan
    for normed in (True, False):
        ids, weights = expert_kernels.route(logits, 5, normed=normed)
        wanted_ids, wanted = mixtures.route(logits.nan_to_num(-torch.inf), 5, normed=normed)
        order = logits[1].argsort(descending=True, stable=True)[:5]
        assert torch.equal(ids[[0, 2]], wanted_ids[[0, 2]]) and torch.equal(ids[1], order), ids
        torch.testing.assert_close(weights[:2].float(), wanted[:2], rtol=2e-3, atol=1e-5)
    assert int(expert_kernels.route(torch.full((1, 70), torch.nan).half(), 5, normed=True)[0].max()) < 70

    def stack(kind: str, outs: int, ins: int, dtype: torch.dtype) -> tuple[mixtures.Stack, mixtures.DenseStack]:
        if kind == "dense":
            found = mixtures.DenseStack((draw(6, outs, ins) / ins**0.5).to(dtype))
            return found, found
        matrix = block_kernels.BlockMatrix(blocks_of(kind, 6 * outs, ins)[0], kind, torch.device("cpu"))
        return mixtures.StoredStack(matrix, outs), mixtures.DenseStack(matrix.words.dense().view(6, outs, ins).to(dtype))

    def check(kind: str, dtype: torch.dtype, sequences: int, tokens: int) -> None:
        width, inner = (512, 256) if kind == "Q4_K" else (96, 64)
        x, attended = draw(sequences, tokens, width).to(dtype), draw(sequences, tokens, 40).to(dtype)
        norm, output = draw(width).to(dtype), DenseLinear((draw(width, 40) / 7).to(dtype), None)
        router = DenseLinear((draw(6, width) / width**0.5).to(dtype), None)
        gate_up, down = stack(kind, 2 * inner, width, dtype), stack(kind, width, inner, dtype)
        layers = [
            mixtures.Experts(router=router, gate_up=a, down=b, count=6, chosen=3, normed=dtype == torch.float16)
            for a, b in zip(gate_up, down, strict=True)
        ]
        made[:] = layers
        before = x.clone()
        got = ops.after_attention_experts(x, attended, output, norm, 1e-5, layers[0])
        wanted = torch_ops.after_attention_experts(x, attended, output, norm, 1e-5, layers[1])
        assert got.dtype == dtype and got.shape == wanted.shape and torch.equal(x, before)
        ulps = 8 if dtype == torch.bfloat16 else 3  # the interpreter cuts to bfloat16, a GPU rounds
        error, largest = float((got.float() - wanted.float()).abs().max()), float(wanted.float().abs().max())
        print(f"{kind} {dtype} {sequences} x {tokens}: {error / largest:.2e}", flush=True)
        assert error <= ulps * torch.finfo(dtype).eps * largest, (kind, dtype, sequences, tokens, error, largest)

    half = torch.float16
    for kind, dtype, sequences, tokens in (
        ("dense", half, 1, 1), ("dense", torch.bfloat16, 2, 1), ("Q4_0", half, 1, 1), ("Q8_0", half, 1, 2),
        ("Q4_K", torch.bfloat16, 1, 1),
    ):  # fmt: skip
        launches.clear()
        check(kind, dtype, sequences, tokens)
        products = "matvec_kernel" if kind == "dense" else "block_matvec_kernel"
        assert launches.count("route_kernel") == 1 and launches.count(products) >= 2, launches
    grouped.BLOCKING = grouped.Blocking(pairs=16, outs=64, depth=32, warps=1, stages=1)
    block_kernels.EXPANDED_BYTES = grouped.EXPANDED_BYTES = 2 * 2 * 128 * 96  # two experts at a time
    for kind in ("dense", "Q4_0"):  # products of tiles of bfloat16 the interpreter gets wrong: ``test_ptx`` has them
        launches.clear()
        check(kind, half, 2, mixtures.FEW_TOKENS + 5)
        assert expert_kernels.most_pairs(made[0]) == (6 if kind == "dense" else 48)
        assert "block_matvec_kernel" not in launches and launches.count("route_kernel") == 1, launches
    launches.clear()
    check("dense", torch.float32, 1, 1)
    check("dense", torch.float32, 1, mixtures.FEW_TOKENS + 1)
    assert not launches


def counted(name: str, kernel: Any, launches: list[str]) -> Any:
    """A kernel that says when it is launched."""

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(name)
            return kernel[grid]

    return Counted()


def decode_steps() -> None:
    """The engine on these kernels, step by step and as a graph with the grid of the longest context, over a packed tile; and of
    models with a layer that is not turned, and with growing queries, on every kind of codec."""
    from test_graph import Calls
    from tiny import random_ids, tiny_cache, tiny_engine, tiny_folder

    from skvq.engine.decode import EagerStep, GraphStep
    from skvq.engine.model_config import RopeConfig

    found = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = tiny_folder(Path(name), head_size=64, num_layers=1)
        for backend in ("reference", "triton"):
            engine = tiny_engine(folder, tiny_cache(method="plain"), backend=backend, max_context=600)
            parts = engine.parts
            eager = EagerStep(parts.model, parts.rope, parts.setup)
            graph = GraphStep(parts.model, parts.rope, parts.setup, Calls(parts.setup.regions.packed(600)))
            for step in (eager, graph):
                sequence = engine.prefill(random_ids(142))
                found.append(torch.stack([step.run([sequence], [token]) for token in (3, 4, 5)]))
                assert sequence.packed == 128
                sequence.free()
    assert isinstance(engine.parts.model.ops, TritonOps)
    assert torch.equal(found[0], found[1])
    for rows in found[2:]:
        assert float((rows - found[0]).abs().max()) < 5e-3 * float(found[0].abs().max())
    own = {"num_layers": 2, "unturned_layers": (1,), "rope": RopeConfig(original_context=64, query_beta=0.5)}
    for method in ("rotate", "reorder"):
        found = []
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            folder = tiny_folder(Path(name), family="smollm3", head_size=64, **own)
            for backend in ("reference", "triton"):
                engine = tiny_engine(folder, tiny_cache(method=method), backend=backend, max_context=300)
                with engine.prefill(random_ids(142)) as sequence:
                    found.append(torch.stack([engine.decode_step([sequence], [token]) for token in (3, 4)]))
                    assert sequence.packed == 128
        assert float((found[1] - found[0]).abs().max()) < 5e-3 * float(found[0].abs().max()), method


def on_a_card() -> None:
    seen = engines_on_a_card(more=False)
    assert {
        "attend_packed_kernel",
        "attend_labels_blocks_kernel",
        "attend_plain_kernel",
        "rms_norm_kernel",
        "matvec_kernel",
        "block_matvec_kernel",
        "expand_kernel",
        "route_kernel",
        "grouped_kernel",
    } <= seen


def more_on_a_card() -> None:
    """The models and caches that ``on_a_card`` leaves out, whose kernels other checks cover."""
    assert "attend_packed_kernel" in engines_on_a_card(more=True)


def engines_on_a_card(*, more: bool) -> set[object]:
    """Names of the kernels that are launched by the engine on a GPU that is not there: every tensor a kernel is given lies on
    the card, and what a graph launches has been launched before with arguments of the same types and divisibility: nothing is
    compiled while capturing."""
    from card import CheckedGraphs, OnCard, card, plain
    from loader_fixtures import gguf_model, tiny_config
    from tiny import random_ids, steps, tiny_cache, tiny_engine, tiny_folder
    from triton.runtime.interpreter import GridExecutor

    from skvq.engine.decode import GraphStep
    from skvq.engine.model_config import ExpertConfig
    from skvq.kernels import ops
    from skvq.kernels.layout import gpu_head_size
    from skvq.kernels.reference import Reference

    seen: set[tuple[object, ...]] = set()

    def form(value: object) -> object:
        if isinstance(value, Tensor):
            assert isinstance(value, OnCard), f"a kernel is given a tensor of the host: {tuple(value.shape)}"
            return value.dtype, plain(value).data_ptr() % 16 == 0
        return (type(value), value == 1, value % 16 == 0, value >= 2**31) if type(value) is int else type(value)

    launch = GridExecutor.__call__

    def checked(self: GridExecutor, *args: object, **kwargs: object) -> None:
        constants = {name: value for name, value in kwargs.items() if name.isupper()}
        key = (self.fn.__name__, *map(form, args), *constants.items())
        assert key in seen or not gpu.capturing, f"{self.fn.__name__} would be compiled while a graph is captured"
        assert max(self.grid[1:], default=0) <= 65535, self.grid
        seen.add(key)
        with torch._C.DisableTorchFunction():
            launch(self, *(plain(a) for a in args), **{name: plain(value) for name, value in kwargs.items()})

    GridExecutor.__call__, ops.CudaGraphs = checked, CheckedGraphs  # type: ignore[misc, assignment]
    # the kernels' own checks look for sums beyond 31 bits: a fifth of the time
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    few = matvec.Tiling(rows=64, warps=1, depth=1)  # programs: the interpreter runs them one by one
    matvec.tiling_of = lambda vectors, outs, width, gated: few  # type: ignore[assignment]
    block_kernels.rows_of, block_kernels.WARPS = lambda *_, **__: 32, 1
    with tempfile.TemporaryDirectory() as name:
        file = gguf_model(Path(name) / "blocks.gguf", tiny_config(head_size=64, num_layers=1), "Q4_1")
        folder = tiny_folder(Path(name), head_size=64, num_layers=1)
        caches = [tiny_cache(method=method) for method in ("plain", "reorder", "fp")]
        caches += [tiny_cache(method="plain", layer_bits=(((2, 3), (4, 2)),))]
        odd, wide = (tiny_folder(Path(name) / f"{size}", head_size=size, num_layers=1) for size in (160, 96))
        few_experts, more_experts = (
            tiny_folder(Path(name) / f"{n} experts", family="mixtral", head_size=64, num_layers=1, experts=experts)
            for n, experts in ((n, ExpertConfig(count=n, chosen=2)) for n in (3, 5))  # a step of both sequences reads 4 of them
        )
        models = [*((folder, cache) for cache in caches), *((model, caches[0]) for model in (file, few_experts, odd, wide))]
        if more:
            models = [(model, caches[2]) for model in (odd, wide)]
            models += [(folder, tiny_cache(method="plain", value_bits=1.5)), (more_experts, caches[0])]
        Reference.head_size_for = lambda self, size: gpu_head_size(size)  # type: ignore[method-assign]
        for model, cache in models:
            found = []
            for place, backend in (("cpu", "reference"), ("cuda", "triton")):
                with card() as gpu:
                    options = {"backend": backend, "device": place, "dtype": "float16", "max_context": 600}
                    engine = tiny_engine(model, cache, dummy_weights=model != file, **options)
                    assert isinstance(engine.step, GraphStep) == (place == "cuda" and model != odd)
                    assert engine.parts.setup.arena.shape.head_size == {odd: 160, wide: 128}.get(model, 64)
                    sequences = [engine.prefill(random_ids(count)) for count in (cache.window + 158, 30)]
                    found.append(steps(engine, sequences, [[3, 4, 5, 6], [7, 8, 9, 10]]).cpu())
                    engine.read(sequences[0], random_ids(3))
                    assert sequences[0].packed
            error = float((found[1] - found[0]).norm() / found[0].norm())
            assert error < 0.02, (model, cache, error)
    return {k[0] for k in seen}


CHECKS = {
    check.__name__: check
    for check in (
        attend_heads, attend_chunks, attend_parts, attend_spans, attend_others, attend_formats, every_format, invariants,
        packing, odd_shapes, crowded_labels, fused_operations, matrices, blocks, experts, lattice, merging, label_ranges,
        assembly_order, decode_steps, on_a_card, more_on_a_card,
    )
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:]:
        CHECKS[wanted]()
