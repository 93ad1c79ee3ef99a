"""Measure on a GPU everything that README.md lists: one call, at most nine minutes, resumable, no network.

``python benchmarks/gpu/run_all.py [--output FILE] [--seconds 520] [--matvec]``. Results are written after every step; a second
call of the same commit and versions goes on where the first stopped. What matters most comes first. A format is timed only if
its gate is green. A step that fails is recorded and tried once more by the next call; after an error that breaks the card's
context a fresh process goes on. Needs torch and Triton only; the decode step as a whole also what the engine imports. The
compact table is printed last.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from this_tree import ROOT  # before anything of skvq

# isort: split
import expert_layers
import matvec_sweep
import torch
import torch.nn.attention
import triton
import triton.language as tl
from cases import Case, compare, formats, lengthened, make_case
from stamp import go_on, stamp, write

from skvq.engine.measure import timed
from skvq.kernels import cudnn, dense, reference
from skvq.kernels.interface import FullSlots
from skvq.kernels.layout import pages_for
from skvq.kernels.ops import TorchOps
from skvq.kernels.triton_gpu import TritonGpu
from skvq.kernels.triton_gpu.card import Card, Tuning
from skvq.kernels.triton_gpu.forms import PackedForm, packed_form
from skvq.kernels.triton_gpu.ops import TritonOps

DEVICE = torch.device("cuda")
SHAPES = {"mistral-7b": (8, 4), "llama-2-7b": (32, 1)}  # kv heads, query heads of each
MODEL, METHOD = "mistral-7b", "rotate"
CONTEXTS = (131_072, 1_048_576, 32_768)  # what matters most first
PREFILL_CONTEXTS, BLOCKS_CONTEXT = (32_768, 131_072, 8192), 26_000
READ_CONTEXTS, WINDOW = (4096, 32_768), 4096
CALIBRATION_TOKENS = 8192  # what a model is calibrated on when it is first used
TRIES = 2
STEPS = 160  # a tile or more: one step packs one, `slowest_ms`
WARM_UP = 2 * STEPS  # of two untimed ones the first compiles, and the second is the first on streams of its own
GUESSED = 3  # tokens of a step beside the pending one, as with prompt_lookup=3
OUTGROWN = 256e6  # bytes: four L2 caches
CORE = [
    (2.0, 2.0, 128, 128),
    (2.0, 2.0, 64, 128),
    (2.0, 1.5, 128, 128),
    (4.0, 4.0, 64, 128),
    (3.0, 3.0, 128, 128),
    (2.0, 2.0, 64, 64),
]
TIMED = [(2.0, 2.0, 128, False), (2.0, 2.0, 64, True), (2.0, 1.5, 128, False), (2.0, 2.0, 64, False), (2.0, 2.0, 128, True)]


class OutOfTime(Exception):
    """The call's time is spent; what is done is saved."""


@dataclasses.dataclass(slots=True)
class Log:
    """Results by name, on disk after every one."""

    path: Path
    deadline: float
    results: dict[str, Any]

    def step(self, name: str, work: Callable[[], Any], needs: float = 5.0) -> Any:
        """Do ``work`` once, over all calls; an error is a result too, and so is a step that a call did not survive."""
        known = self.results.get(name)
        failed = isinstance(known, dict) and "error" in known
        tries = known.get("tries", 1) if failed and known is not None else 0
        if known is not None and (not failed or tries >= TRIES):
            return known
        if time.monotonic() + needs > self.deadline:
            raise OutOfTime(name)
        self.save(name, {"error": "the process ended before this step did", "tries": tries + 1})
        try:
            value = work()
        except OutOfTime:
            del self.results[name]
            raise
        except Exception as error:  # a kernel that fails must not hide the rest
            value = {"error": f"{type(error).__name__}: {str(error)[-400:]}", "tries": tries + 1}
        self.save(name, value)
        print(f"{name}: {json.dumps(value)}", flush=True)
        if "error" in value and not card_answers():
            raise BrokenContext(name)
        return value

    def save(self, name: str, value: Any) -> None:
        self.results[name] = value
        write(self.path, self.results)


class BrokenContext(Exception):
    """An error after which this process can launch nothing more."""


def card_answers() -> bool:
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device=DEVICE).item() == 1)
    except RuntimeError:
        return False


@triton.jit
def _subnormal_kernel(a_ptr, b_ptr, out_ptr):
    r = tl.arange(0, 16)
    c = tl.arange(0, 8)
    a = tl.load(a_ptr + r[:, None] * 16 + r[None, :]).to(tl.uint16).to(tl.float16, bitcast=True)
    tl.store(out_ptr + r[:, None] * 8 + c[None, :], tl.dot(a, tl.load(b_ptr + r[:, None] * 8 + c[None, :])))


def subnormals() -> dict[str, Any]:
    """Whether tensor cores keep fp16 subnormals, as packed attention needs: codes 0..255 by small integers, exactly."""
    codes = torch.arange(256, device=DEVICE, dtype=torch.uint8).view(16, 16)
    other = torch.arange(-64, 64, device=DEVICE).view(16, 8).half()
    out = torch.empty(16, 8, device=DEVICE)
    _subnormal_kernel[(1,)](codes, other, out, num_warps=1)
    wanted = (codes.double() @ other.double() * 2.0**-24).float()
    return {"good": bool(torch.equal(out, wanted))}


def seconds_of(work: Callable[[], Any], repeats: int = 20) -> tuple[float, float]:
    """Median and spread (interquartile, relative) of one call in a CUDA graph, replayed again and again without a pause."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = sorted(timed(graph.replay, DEVICE, repeats + 3)[3:])
    middle = statistics.median(times)
    return middle, (times[3 * len(times) // 4] - times[len(times) // 4]) / middle


def copy_bandwidth() -> dict[str, float]:
    """Not in a graph: a copy held by one is slower."""
    source = torch.ones(2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = sorted(timed(lambda: target.copy_(source), DEVICE, 13)[3:])
    middle = statistics.median(times)
    return {"gbps": 2 * source.numel() / middle / 1e9, "spread": (times[7] - times[2]) / middle}


def error_of(case: Case, method: str = "heads") -> dict[str, Any]:
    """Errors of the kernel's output and log-sum-exp against float32."""
    out, lse, exact, exact_lse = compare(backend(), case, method)
    seen = exact_lse > -torch.inf
    return verdict(out, exact) | {"lse": verdict(lse[seen], exact_lse[seen])}


def verdict(got: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Largest error, largest number, and whether the first is small against the second."""
    error, largest = float((got.float() - wanted.float()).abs().max()), float(wanted.abs().max())
    allowed = 3e-2 if got.dtype == torch.bfloat16 else 4e-3
    good = error <= allowed * max(1.0, largest) and not bool(got.isnan().any())
    return {"off": error, "largest": largest, "good": good}


def rows(got: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """The largest error of a row of [H, N, D], where outputs are small, and whether it is that of rounding."""
    off = cudnn.row_error(got, wanted)
    return {"off": off, "good": off <= 4 * max(torch.finfo(got.dtype).eps, torch.finfo(torch.float16).eps)}


def check_dense(dtype: torch.dtype, count: int = 300, tokens: int = 1000, span: int = 2**31 - 1) -> dict[str, Any]:
    """Torch's attention as prefill calls it: a chunk after a prefix, grouped heads, its log-sum-exp; whether cuDNN is asked."""
    q = (3 * torch.randn(count, 8, 128, device=DEVICE)).to(dtype)
    k, v = (dense.kv_buffer(2, tokens, 128, dtype, DEVICE).normal_() for _ in range(2))
    ahead = torch.arange(tokens, device=DEVICE)[None] - torch.arange(tokens - count, tokens, device=DEVICE)[:, None]
    visible = (ahead <= 0) & (ahead > -span)
    exact, exact_lse = reference.masked_attention(q.float(), k.transpose(0, 1).float(), v.transpose(0, 1).float(), visible)
    out, lse = dense.attend_causal(q, k, v, span)
    found = verdict(out, exact) | {"lse": verdict(lse, exact_lse), "cudnn": cudnn.cudnn_on(q.device).trusted}
    return found | {"rows": rows(out.transpose(0, 1), exact.transpose(0, 1))}


def check_fused(dtype: torch.dtype) -> dict[str, Any]:
    """Norms, SwiGLU and RoPE into the window against torch."""
    x, delta, joint, gate_up, weight = (
        torch.randn(shape, device=DEVICE).to(dtype)
        for shape in ((3, 1, 4096), (3, 1, 4096), (3, 1, 48, 128), (3, 1, 2 * 14336), (4096,))
    )
    q, k, v = joint.split([32, 8, 8], 2)
    angle = torch.rand(3, 1, 1, 64, device=DEVICE) * 6
    slots, places = torch.tensor([2, 0, 1], device=DEVICE), torch.tensor([5, 1, 0], device=DEVICE)
    results = []
    for ops in (TorchOps(), TritonOps()):
        keys, values = (torch.zeros(3, 8, 9, 128, device=DEVICE, dtype=dtype) for _ in range(2))
        full = FullSlots(keys=keys, values=values, positions=torch.zeros(3, 9, dtype=torch.int32, device=DEVICE))
        turned = ops.rope_to_slots(q, k, v, angle.cos(), angle.sin(), full, slots, places)
        heads = ops.norm_heads(q, k, weight[:128], weight[128:256], 1e-6)
        results.append((turned, keys, values, *heads, *ops.add_rms_norm(x, delta, weight, 1e-5), ops.swiglu(gate_up)))
    found = [verdict(got, wanted) for wanted, got in zip(*results, strict=True)]
    return max(found, key=lambda v: (not v["good"], v["off"]))


def is_green(value: Any) -> bool:
    """Whether a gate's result, and what is nested in it, is good."""
    return bool(value.get("good")) and all(is_green(v) for v in value.values() if isinstance(v, dict))


def backend() -> TritonGpu:
    return TritonGpu(DEVICE)


def check_packing(key_bits: float, value_bits: float, method: str, lattice: bool = False) -> dict[str, Any]:
    """Share of bytes equal to the reference; ``lattice``: codes of a head chosen together."""
    case = make_case(
        key_bits=key_bits, value_bits=value_bits, group_size=64, packed=(11,), has_metric=lattice, device="cuda"
    )  # fmt: skip
    codec, tile = case.heads if method == "heads" else case.labels, case.layout.tile
    keys, values = (torch.randn(2 * tile, 2, 128, device=DEVICE).half() for _ in range(2))
    retained = torch.rand(2 * tile, device=DEVICE) < 0.1
    shares, pages = [], []
    for made in (reference.Reference(), backend()):
        pages.append(
            dataclasses.replace(
                case.pages, key_codes=torch.zeros_like(case.pages.key_codes),
                value_codes=torch.zeros_like(case.pages.value_codes),
                meta=torch.zeros_like(case.pages.meta),
            )
        )  # fmt: skip
        getattr(made, method).pack(pages[-1], codec, case.step.page_table[1], 7 * tile, keys, values, retained)
    for name in ("key_codes", "value_codes", "meta"):
        wanted, got = getattr(pages[0], name), getattr(pages[1], name)
        shares.append(float((wanted == got)[(wanted != 0) | (got != 0)].float().mean()))
    return {"share": min(shares), "good": min(shares) >= 0.999}


def gate(log: Log, name: str, work: Callable[[], dict[str, Any]], needs: float = 20) -> bool:
    """Whether the gate is green; a red one is told."""
    value = log.step(f"gate {name}", work, needs)
    if not is_green(value):
        print(f"RED: {name}", flush=True)
    return is_green(value)


def gate_of(log: Log, kb: float, vb: float, group: int, mean: bool, size: int = 128, method: str = "heads") -> bool:
    """The gate of a format: attention over it."""
    name = f"{method if method != 'heads' else ''} K{kb:g}V{vb:g} g{group} head {size}{' mean' if mean else ''}".strip()
    options: dict[str, Any] = {"key_bits": kb, "value_bits": vb, "group_size": group, "size": size, "has_key_mean": mean}
    return gate(log, name, lambda: error_of(make_case(**options, packed=(3, 23), device="cuda"), method))


def gate_packing(log: Log, kb: float, vb: float, what: str) -> bool:
    """The gate of packing: ``heads``, ``labels``, or ``lattice`` for codes of a head chosen together."""
    method = "heads" if what == "lattice" else what
    return gate(log, f"pack K{kb:g}V{vb:g} {what}", lambda: check_packing(kb, vb, method, lattice=what == "lattice"), 40)


def gates_of_the_step(log: Log) -> bool:
    """What the decode step of the engine rests on beside attention over its format."""
    good = [is_green(v) for name, v in log.results.items() if name.startswith("gate matvec ")]
    good += [gate(log, f"fused {dtype}", lambda dtype=dtype: check_fused(dtype)) for dtype in (torch.bfloat16, torch.float16)]
    good += [gate(log, f"dense {dtype}", lambda dtype=dtype: check_dense(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    good.append(gate(log, "bf16", lambda: error_of(make_case(packed=(3, 23), dtype=torch.bfloat16, device="cuda"))))
    good.append(gate_packing(log, 2.0, 2.0, "lattice"))
    return all(good)


def other_gates(log: Log) -> None:
    """Every other path, then every other format."""
    for kb, vb, group, size in CORE:
        for mean in (False, True):
            gate_of(log, kb, vb, group, mean, size)
    paths: dict[str, dict[str, Any]] = {
        "8 columns": {"repeat": 8}, "mha, 3 queries": {"repeat": 1, "queries": 3}, "span": {"span": 700},
        "long": {"packed": (803,), "kv_heads": 2},
    }  # fmt: skip
    for label, options in paths.items():
        gate(log, label, lambda options=options: error_of(make_case(**({"packed": (3, 23)} | options), device="cuda")))
    gate_of(log, 2.0, 2.0, 64, False, method="plain")
    for kb, vb in ((2.0, 2.0), (2.0, 1.5), (3.0, 4.0)):
        for what in ("heads", "labels", "lattice"):
            gate_packing(log, kb, vb, what)
    for kb, vb, group, size in formats():
        gate_of(log, kb, vb, group, False, size)


def arena(shape: str, context: int, key_bits: float, value_bits: float, group: int, mean: bool) -> list[Case]:
    """Cases of one layer with random codes, as many as outgrow the L2 cache four times."""
    kv_heads, repeat = SHAPES[shape]
    case = make_case(
        kv_heads=kv_heads, repeat=repeat, key_bits=key_bits, value_bits=value_bits, group_size=group,
        has_key_mean=mean, packed=(1,),
        window=128, retained=0.0,
    )  # fmt: skip
    layout = case.layout
    each = pages_for(context) * kv_heads * (layout.key_bytes + layout.value_bytes + 4 * layout.meta_words)
    return [lengthened(case, context, DEVICE, seed) for seed in range(max(1, math.ceil(OUTGROWN / each)))]


def time_attention(
    cases: list[Case], made: TritonGpu, copy_gbps: float, context: int, method: str = "heads"
) -> dict[str, float]:
    """Milliseconds of one layer's attention, all launches of it, and its share of the copy bandwidth."""

    def work() -> None:
        for case in cases:
            getattr(made, method).attend(case.q, case.pages, getattr(case, method), case.full, case.step)

    taken, spread = seconds_of(work)
    taken /= len(cases)
    moved = context * cases[0].layout.bytes_per_token
    gbps = moved / taken / 1e9
    return {"ms": taken * 1e3, "gbps": gbps, "share": gbps / copy_gbps, "spread": spread}


def time_sdpa(shape: str, context: int) -> dict[str, float]:
    """16-bit flash decoding through torch SDPA on the same shape."""
    kv_heads, repeat = SHAPES[shape]
    q = torch.randn(1, kv_heads * repeat, 1, 128, device=DEVICE).half()
    k, v = (torch.randn(1, kv_heads, context, 128, dtype=torch.float16, device=DEVICE) for _ in range(2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        taken, spread = seconds_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=repeat > 1))
    return {"ms": taken * 1e3, "gbps": 4 * k.numel() / taken / 1e9, "spread": spread}


def time_packing(key_bits: float, value_bits: float, lattice: bool = False) -> dict[str, float]:
    """Tokens a second of quantize-and-pack and of unpacking, Mistral-7B shape, one layer."""
    case = make_case(
        kv_heads=8, key_bits=key_bits, value_bits=value_bits, group_size=64, packed=(50,), has_metric=lattice, device="cuda"
    )  # fmt: skip
    made, tile = backend(), case.layout.tile
    count = 50 * tile
    keys, values = (torch.randn(count, 8, 128, device=DEVICE).half() for _ in range(2))
    retained = torch.zeros(count, dtype=torch.bool, device=DEVICE)
    row = case.step.page_table[1]
    pack, _ = seconds_of(lambda: made.heads.pack(case.pages, case.heads, row, 0, keys, values, retained), 5)
    unpack, _ = seconds_of(lambda: made.heads.unpack(case.pages, case.heads, row, 0, count), 5)
    return {"pack_tokens_per_s": count / pack, "unpack_tokens_per_s": count / unpack}


def time_prefill(context: int, how: str) -> dict[str, Any]:
    """A chunk of 1,024 queries of Mistral-7B's shape against a prefix: by one call of flash attention, by one of cuDNN, or as
    prefill attends (there to a chunk fewer: the most blocks there can be)."""
    tokens = context - (cudnn.BLOCK_TOKENS if how == "product" else 0)
    q = (3 * torch.randn(1024, 32, 128, device=DEVICE)).to(torch.bfloat16)
    k, v = (dense.kv_buffer(8, tokens, 128, torch.bfloat16, DEVICE).normal_() for _ in range(2))
    folded = q.view(1024, 8, 4, 128).permute(1, 2, 0, 3).reshape(8, 4096, 128)
    calls: dict[str, Callable[[], Any]] = {
        "flash": lambda: cudnn.flash_attention(folded, k, v),
        "cudnn": lambda: cudnn.cudnn_attention(folded, k, v),
        "product": lambda: dense.attend_all(q, k, v),
    }
    exact, exact_lse = calls["flash"]()
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[how]()
    torch.cuda.synchronize()
    first = time.perf_counter() - start  # a plan of cuDNN is made for every shape
    out, lse = calls[how]()
    if how == "product":
        out, lse = out.transpose(0, 1).reshape(exact.shape), lse.T.reshape(exact_lse.shape)
    near = rows(out, exact)
    taken, spread = seconds_of(calls[how], 5)
    return {
        "ms": taken * 1e3,
        "first_ms": first * 1e3,
        "tflops": 4 * q.shape[0] * q.shape[1] * tokens * 128 / taken / 1e12,
        "off": near["off"],
        "same": near["good"] and verdict(lse, exact_lse)["good"],
        "cudnn": how == "cudnn" or (how == "product" and cudnn.cudnn_on(q.device).trusted),
        "spread": spread,
    }


class Decoder:
    """Mistral-7B with dummy weights, loaded when first asked for, with the longest context that fits."""

    def __init__(self) -> None:
        self.engine: Any = None

    def load(self) -> Any:
        from skvq.engine.config import CacheConfig
        from skvq.engine.errors import CapacityError
        from skvq.engine.generate import Engine

        for context in sorted(CONTEXTS, reverse=True) if self.engine is None else ():
            try:
                self.engine = Engine.load(
                    MODEL,
                    max_context=context + 2048,
                    max_sequences=1,
                    cache=CacheConfig(method=METHOD, group_size=128),
                    dummy_weights=True,
                    prefix_cache=False,
                )
                break
            except CapacityError as error:
                print(error, flush=True)
        return self.engine

    def time(self, context: int, graph: bool, copy_gbps: float, tokens: int = 1) -> dict[str, float]:
        """Milliseconds of a whole decode step of ``tokens``, packing included, over a cache filled with random tokens.

        The host's clock, for the host's part is the point of the comparison.
        """
        from skvq.engine.decode import decode_step_of
        from skvq.engine.guard import computing

        engine = self.load()
        parts = engine.parts
        engine.step = decode_step_of(parts.model, parts.rope, parts.setup, graph=graph)
        sequence, times = engine.new_sequence(), []
        try:
            engine.fill(sequence, context)
            for i in range(STEPS + WARM_UP):
                torch.cuda.synchronize()
                start = time.perf_counter()
                with computing(engine):
                    logits = engine.step.run([sequence], [i % 256] * tokens)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            assert not logits.isnan().any()
            moved = parts.model.weights.nbytes - parts.model.weights.embedding.tensors[0].nbytes + sequence.nbytes
        finally:
            sequence.free()
        times = sorted(times[WARM_UP:])
        middle, floor = statistics.median(times), moved / copy_gbps / 1e9
        spread = (times[3 * STEPS // 4] - times[STEPS // 4]) / middle
        found = {"ms": middle * 1e3, "slowest_ms": times[-1] * 1e3, "spread": spread}
        return found | {"floor_ms": floor * 1e3, "x_floor": middle / floor}

    def answers(self) -> dict[str, float]:
        """Milliseconds of the first step of two answers, one after another: the first compiles and captures."""
        from skvq.engine.decode import decode_step_of

        engine = self.load()
        parts = engine.parts
        engine.step, found = decode_step_of(parts.model, parts.rope, parts.setup, graph=True), {}
        for name in ("first_ms", "second_ms"):
            with engine.prefill([0] * 64) as sequence:
                torch.cuda.synchronize()
                start = time.perf_counter()
                engine.decode_step([sequence], [1])
                torch.cuda.synchronize()
                found[name] = 1e3 * (time.perf_counter() - start)
        return found

    def read(self, tokens: int, how: str) -> dict[str, float]:
        """Milliseconds of a prompt read a second time, by the host's clock."""
        engine = self.load()
        options = dataclasses.replace(engine.parts.options, prefill=how)
        engine.parts, before = dataclasses.replace(engine.parts, options=options), engine.parts
        try:
            for _ in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                engine.prefill([i % 1000 for i in range(tokens)]).free()
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
        finally:
            engine.parts = before
        return {"ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}

    def calibrate(self, tokens: int) -> dict[str, float]:
        """Seconds that the second layer takes to be recorded and fitted, by the host's clock: the first compiles."""
        from skvq.calibrate.outliers import OutlierTokens
        from skvq.calibrate.run import fit_layer, recorded, texts_of

        parts = self.load().parts
        texts = texts_of([i % 1000 for i in range(tokens)], tokens)
        start, found = time.perf_counter(), {}
        for index, stats in zip(range(2), recorded(parts.model, parts.rope, texts, OutlierTokens(texts)), strict=False):
            torch.cuda.synchronize()
            recorded_at = time.perf_counter()
            fit_layer(stats, parts.rope.of(index), parts.cache.with_bits(2.0, 2.0), parts.setup.backend, 0)
            now = time.perf_counter()
            found = {"record_s": recorded_at - start, "fit_s": now - recorded_at}
            start = now
        return found


def sweep(log: Log, form: tuple[float, float, int, bool], context: int, copy_gbps: float) -> None:
    """Ways to go over the tiles of a format beside the one that the product takes."""
    kb, vb, group, mean = form
    cases = arena("mistral-7b", context, *form)
    chosen = packed_form(cases[0].layout, has_mean=mean, shared_bytes=Card.of(DEVICE).shared_bytes)
    halves = (64, 128) if chosen.part in (64, 128) and kb != 3 else (chosen.part,)
    for part, stages, registers, programs in itertools.product(halves, (2, 3), (0, 168), (8, 12)):
        tried = PackedForm(part=part, stages=stages, registers=registers, programs=programs)
        made = TritonGpu(DEVICE, tuning=Tuning(form_of=lambda layout, tried=tried, **rest: tried))
        mark = " (chosen)" if tried == chosen else ""
        log.step(
            f"sweep {context} K{kb:g}V{vb:g} g{group}{' mean' if mean else ''} part {part} stages {stages} "
            f"registers {registers} programs {programs}{mark}",
            lambda made=made: time_attention(cases, made, copy_gbps, context),
            8,
        )


def attention(log: Log, shape: str, form: tuple[float, float, int, bool], copy_gbps: float) -> None:
    """One format at every context, beside 16-bit flash decoding where it is the first of its shape."""
    kb, vb, group, mean = form
    if not gate_of(log, kb, vb, group, mean):
        return
    for context in CONTEXTS:
        log.step(
            f"attend {shape} {context} K{kb:g}V{vb:g} g{group}{' mean' if mean else ''}",
            lambda context=context: time_attention(arena(shape, context, *form), backend(), copy_gbps, context),
            12,
        )
        torch.cuda.empty_cache()
        if form == TIMED[0]:
            log.step(f"sdpa {shape} {context}", lambda context=context: time_sdpa(shape, context), 8)
            torch.cuda.empty_cache()


def measure(log: Log) -> None:
    gate(log, "subnormals", subnormals)
    copy_gbps = log.step("copy", copy_bandwidth).get("gbps", math.nan)
    attention(log, "mistral-7b", TIMED[0], copy_gbps)
    matvec_sweep.measure(log.step, seconds_of)
    matvec_sweep.measure_blocks(log.step, seconds_of)
    expert_layers.measure(log.step, seconds_of)
    torch.cuda.empty_cache()
    if gates_of_the_step(log) and gate_of(log, 2.0, 2.0, 128, True):
        decoder = Decoder()
        for context in CONTEXTS:
            for graph in (True, False):
                name = f"decode step {context} {'graph' if graph else 'eager'}"
                log.step(name, lambda a=(context, graph): decoder.time(*a, copy_gbps), 150 if decoder.engine is None else 30)
            name = f"decode step {context} graph of {GUESSED + 1} tokens"
            log.step(name, lambda context=context: decoder.time(context, True, copy_gbps, GUESSED + 1), 30)
        log.step("answers", decoder.answers, 20)
        for tokens, how in itertools.product(READ_CONTEXTS, ("exact", "streaming")):
            log.step(f"read {tokens} {how}", lambda a=(tokens, how): decoder.read(*a), 30)
        log.step(f"calibrate {CALIBRATION_TOKENS}", lambda: decoder.calibrate(CALIBRATION_TOKENS), 60)
        decoder.engine = None
        torch.cuda.empty_cache()
    for form in TIMED[1:]:
        attention(log, "mistral-7b", form, copy_gbps)
    for dtype in (torch.bfloat16, torch.float16):  # blocks of 16,384 and 8,192 before the chunk, and 400 tokens between
        gate(log, f"prefill blocks {dtype}", lambda dtype=dtype: check_dense(dtype, 1024, BLOCKS_CONTEXT))
        gate(log, f"prefill window {dtype}", lambda dtype=dtype: check_dense(dtype, 1024, BLOCKS_CONTEXT, WINDOW))
    for context in PREFILL_CONTEXTS:
        for how in ("flash", "cudnn", "product"):
            log.step(f"prefill attention {context} {how}", lambda a=(context, how): time_prefill(*a), 15)
    for kb, vb in ((2.0, 2.0), (2.0, 1.5)):
        if gate_packing(log, kb, vb, "heads"):
            log.step(f"packing K{kb:g}V{vb:g}", lambda kb=kb, vb=vb: time_packing(kb, vb), 20)
        if gate_packing(log, kb, vb, "lattice"):
            log.step(f"lattice packing K{kb:g}V{vb:g}", lambda kb=kb, vb=vb: time_packing(kb, vb, lattice=True), 30)
    context = CONTEXTS[0]
    for shape in SHAPES if gate_of(log, 2.0, 2.0, 64, False, method="labels") else ():
        log.step(
            f"attend {shape} {context} reorder K2V2 g64",
            lambda shape=shape: time_attention(
                arena(shape, context, 2.0, 2.0, 64, False), backend(), copy_gbps, context, "labels"
            ), 15,
        )  # fmt: skip
        torch.cuda.empty_cache()
    for form in TIMED:
        attention(log, "llama-2-7b", form, copy_gbps)
    for form in TIMED:
        sweep(log, form, context, copy_gbps)
        torch.cuda.empty_cache()
    other_gates(log)


def table(results: dict[str, Any]) -> None:
    """What matters, last."""
    gates = {k: v for k, v in results.items() if k.startswith("gate ")}
    good = sum(map(is_green, gates.values()))
    print(
        f"\n{results.get('device')}: copy {results.get('copy', {}).get('gbps', 0):.0f} GB/s; gates {good} of {len(gates)} green"
    )
    print(f"{'shape':12} {'context':>8} {'format':18} {'ms':>8} {'GB/s':>6} {'share':>6} {'x SDPA':>7}")
    for name, value in results.items():
        if name.startswith("attend ") and "ms" in value:
            _, shape, context, *form = name.split(" ")
            base = results.get(f"sdpa {shape} {context}", {}).get("ms")
            times = f"{base / value['ms']:7.2f}" if base else "      -"
            form_name = " ".join(form)
            print(
                f"{shape:12} {context:>8} {form_name:18} {value['ms']:8.3f} {value['gbps']:6.0f} {value['share']:6.2f} {times}"
            )
    for name, value in results.items():
        if name.startswith("decode step ") and "ms" in value:
            print(
                f"{name}: {value['ms']:.2f} ms, slowest {value['slowest_ms']:.2f}, {value['x_floor']:.2f}x its bandwidth floor"
            )
        elif name.startswith("matvec ") and "ms" in value:
            shown = ", ".join(
                f"{what} {value[what]['ms']:.4f} ms {value[what]['gbps']:.0f} GB/s" for what in ("linear", "apart")
            )
            print(f"{name}: {value['ms']:.4f} ms {value['gbps']:.0f} GB/s; {shown}")
        elif name.startswith("experts ") and "ms" in value:
            beside = f"{value['gbps']:.0f} GB/s" if "gbps" in value else f"one by one {value['one_by_one_ms']:.3f} ms"
            print(f"{name}: {value['ms']:.3f} ms; {beside}")
        elif name == "answers" and "second_ms" in value:
            print(f"first step of an answer: {value['first_ms']:.1f} ms, of the next answer {value['second_ms']:.1f} ms")
        elif name.startswith("read ") and "ms" in value:
            print(f"{name}: {value['ms']:.0f} ms, {value['tokens_per_s']:,.0f} tokens/s")
        elif name.startswith("calibrate ") and "fit_s" in value:
            print(f"{name}: {value['record_s']:.1f} + {value['fit_s']:.1f} s a layer")
        elif name.startswith("prefill attention ") and "ms" in value:
            told = "" if value["same"] else ", DIFFERS from flash"
            print(f"{name}: {value['tflops']:.0f} TFLOP/s, {value['first_ms']:.0f} ms the first time{told}")
    told = {name: value for name, value in results.items() if isinstance(value, dict)}
    failed = [name for name, value in told.items() if "error" in value or (name.startswith("gate ") and not is_green(value))]
    if failed:
        print(f"failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--matvec", action="store_true", help="only try tilings of the matrices of a decode step")
    options = parser.parse_args()
    name = torch.cuda.get_device_name(DEVICE)
    output = options.output or ROOT / "benchmarks/results" / f"gpu-{name.replace(' ', '-').lower()}.json"
    deadline = time.monotonic() + options.seconds
    log = Log(output, deadline, go_on(output, stamp(name, "torch", "triton")))
    try:
        if options.matvec:
            matvec_sweep.sweep(log.step, lambda work: seconds_of(work, 10))
        else:
            measure(log)
        finished = True
    except OutOfTime as left:
        finished = False
        print(f"out of time before: {left}; call again to go on", flush=True)
    except BrokenContext as broken:
        print(f"{broken} broke the context: a fresh process goes on", flush=True)
        left = ["--output", str(output), "--seconds", str(deadline - time.monotonic())]
        left += ["--matvec"] * options.matvec
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *left])
    table(log.results)
    print(json.dumps({"device": name, "finished": finished, "output": str(output), "results": len(log.results)}))


if __name__ == "__main__":
    main()
