"""Measure on a GPU everything that README.md lists: one call, at most nine minutes, resumable, no network.

``python benchmarks/gpu/run_all.py [--output FILE] [--seconds 520] [--only NAME ...]``. Results are written after every step; a
second call goes on where the first stopped. The correctness gate comes first: a red gate stops all timing. Needs torch and
Triton only; the decode step as a whole also what the engine imports. The compact table is printed last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if "skvq" not in sys.modules:  # the kernels alone, whatever else of the package is installed here
    package = types.ModuleType("skvq")
    package.__path__ = [str(ROOT)]
    sys.modules["skvq"] = package
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from stamp import stamp  # noqa: E402
from triton_cases import Case, formats, make_case  # noqa: E402

from skvq.kernels import reference  # noqa: E402
from skvq.kernels.layout import PAGE_TOKENS  # noqa: E402
from skvq.kernels.triton_gpu import TritonGpu  # noqa: E402

DEVICE = torch.device("cuda")
SHAPES = {"mistral-7b": (8, 4), "llama-2-7b": (32, 1)}  # kv heads, query heads of each
CONTEXTS = (32_768, 131_072, 1_048_576)
DECODE_CONTEXTS = (32_768, 131_072)
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
        """Do ``work`` once, over all calls; an error is a result too."""
        known = self.results.get(name)
        if known is not None and not (isinstance(known, dict) and "error" in known):
            return known
        if time.monotonic() + needs > self.deadline:
            raise OutOfTime(name)
        try:
            value = work()
        except OutOfTime:
            raise
        except Exception as error:  # a kernel that fails must not hide the rest
            value = {"error": f"{type(error).__name__}: {str(error)[-400:]}"}
        self.results[name] = value
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"{name}: {json.dumps(value)}", flush=True)
        return value


@triton.jit
def _subnormal_kernel(a_ptr, b_ptr, out_ptr):
    r = tl.arange(0, 16)
    c = tl.arange(0, 8)
    a = tl.load(a_ptr + r[:, None] * 16 + r[None, :]).to(tl.uint16).to(tl.float16, bitcast=True)
    tl.store(out_ptr + r[:, None] * 8 + c[None, :], tl.dot(a, tl.load(b_ptr + r[:, None] * 8 + c[None, :])))


def subnormals() -> dict[str, Any]:
    """Whether tensor cores keep fp16 subnormals: codes 0..255 as halves against small integers, exactly."""
    codes = torch.arange(256, device=DEVICE, dtype=torch.uint8).view(16, 16)
    other = torch.arange(-64, 64, device=DEVICE).view(16, 8).half()
    out = torch.empty(16, 8, device=DEVICE)
    _subnormal_kernel[(1,)](codes, other, out, num_warps=1)
    wanted = (codes.double() @ other.double() * 2.0**-24).float()
    return {"kept": bool(torch.equal(out, wanted))}


def seconds_of(work: Callable[[], Any], repeats: int = 20) -> tuple[float, float]:
    """Median and spread (interquartile, relative) of one call in a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    times = sorted(times[3:])
    middle = statistics.median(times)
    return middle, (times[3 * len(times) // 4] - times[len(times) // 4]) / middle


def copy_bandwidth() -> dict[str, float]:
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    taken, spread = seconds_of(lambda: target.copy_(source))
    return {"gbps": 2 * source.numel() / taken / 1e9, "spread": spread}


def error_of(case: Case, method: str = "heads") -> dict[str, Any]:
    """Error of the kernel against float32, and what 16-bit torch would make of the same keys and values."""
    made = TritonGpu(DEVICE)
    pages = (case.plain,) if method == "plain" else (case.pages, case.heads if method == "heads" else case.labels)
    out, lse = getattr(made, f"attend_{method}")(case.q, *pages, case.full, case.step)
    exact, exact_lse = getattr(reference, f"attend_{method}")(case.q.float(), *pages, case.full, case.step)
    error = float((out.float() - exact).abs().max())
    finite = exact_lse > -torch.inf
    return {"error": error, "lse_error": float((lse - exact_lse)[finite].abs().max()), "largest": float(exact.abs().max())} | {
        "good": bool(error <= 4e-3 * max(1.0, float(exact.abs().max())) and not out.isnan().any())
    }


def check_packing(key_bits: float, value_bits: float, method: str, lattice: bool = False) -> dict[str, Any]:
    """Share of bytes equal to the reference; ``lattice``: codes of a head chosen together."""
    case = make_case(
        key_bits=key_bits, value_bits=value_bits, group_size=64, packed=(11,), has_metric=lattice, device="cuda"
    )  # fmt: skip
    codec, tile = case.heads if method == "heads" else case.labels, case.layout.tile
    keys, values = (torch.randn(2 * tile, 2, 128, device=DEVICE).half() for _ in range(2))
    retained = torch.rand(2 * tile, device=DEVICE) < 0.1
    shares, pages = [], []
    for made in (reference.Reference(), TritonGpu(DEVICE)):
        pages.append(
            dataclasses.replace(
                case.pages, key_codes=torch.zeros_like(case.pages.key_codes),
                value_codes=torch.zeros_like(case.pages.value_codes),
                meta=torch.zeros_like(case.pages.meta),
            )
        )  # fmt: skip
        getattr(made, f"pack_{method}")(pages[-1], codec, case.step.page_table[1], 7 * tile, keys, values, retained)
    for name in ("key_codes", "value_codes", "meta"):
        wanted, got = getattr(pages[0], name), getattr(pages[1], name)
        shares.append(float((wanted == got)[(wanted != 0) | (got != 0)].float().mean()))
    return {"share": min(shares), "good": min(shares) >= 0.999}


def correctness(log: Log) -> bool:
    """Gates on this card: the core formats and every other path; the rest of the formats if time is left (``more_formats``)."""
    for kb, vb, group, size in CORE:
        for mean in (False, True):
            name = f"gate K{kb:g}V{vb:g} g{group} head {size}{' mean' if mean else ''}"
            log.step(name, lambda kb=kb, vb=vb, group=group, size=size, mean=mean: error_of(
                make_case(key_bits=kb, value_bits=vb, group_size=group, size=size, has_key_mean=mean,
                    packed=(3, 23), device="cuda")
            ), 20)  # fmt: skip
    paths: dict[str, dict[str, Any]] = {
        "8 columns": {"repeat": 8}, "mha, 3 queries": {"repeat": 1, "queries": 3}, "span": {"span": 700},
        "bf16": {"dtype": torch.bfloat16},
        "long": {"packed": (803,), "kv_heads": 2},
    }  # fmt: skip
    for label, options in paths.items():
        good = 4e-3 if label != "bf16" else 3e-2
        result = log.step(
            f"gate {label}", lambda options=options: error_of(make_case(**({"packed": (3, 23)} | options), device="cuda")), 20
        )
        if label == "bf16" and "largest" in result:
            result["good"] = result["error"] <= good * max(1.0, result["largest"])
    for method in ("labels", "plain"):
        log.step(
            f"gate {method}",
            lambda method=method: error_of(make_case(packed=(3, 23), group_size=64, device="cuda"), method),
            30,
        )
    for kb, vb in ((2.0, 2.0), (2.0, 1.5), (3.0, 4.0)):
        for method in ("heads", "labels"):
            log.step(f"gate pack K{kb:g}V{vb:g} {method}", lambda kb=kb, vb=vb, m=method: check_packing(kb, vb, m), 30)
    for kb, vb in ((2.0, 2.0), (2.0, 1.5), (3.0, 4.0)):
        name = f"gate pack K{kb:g}V{vb:g} lattice"
        log.step(name, lambda kb=kb, vb=vb: check_packing(kb, vb, "heads", lattice=True), 60)
    gates = {k: v for k, v in log.results.items() if k.startswith("gate ")}
    bad = [k for k, v in gates.items() if not v.get("good")]
    if bad:
        print(f"RED: {bad}", flush=True)
    return not [k for k in bad if "labels" not in k]


def arena(shape: str, context: int, key_bits: float, value_bits: float, group: int, mean: bool) -> list[Case]:
    """Cases of one layer with random codes, as many as outgrow the L2 cache four times."""
    kv_heads, repeat = SHAPES[shape]
    case = make_case(
        kv_heads=kv_heads, repeat=repeat, key_bits=key_bits, value_bits=value_bits, group_size=group,
        has_key_mean=mean, packed=(1,),
        window=128, retained=0.0,
    )  # fmt: skip
    count = -(-context // PAGE_TOKENS)
    small, layout = case.pages, case.layout
    each = count * kv_heads * (layout.key_bytes + layout.value_bytes + 4 * layout.meta_words)
    cases = []
    pick = torch.randint(0, len(small.meta), (count,))
    for seed in range(max(1, math.ceil(256e6 / each))):
        move = {name: getattr(case, name) for name in ("heads", "labels", "full", "q")}
        pages = dataclasses.replace(
            small,
            key_codes=small.key_codes[pick].to(DEVICE),
            value_codes=small.value_codes[pick].to(DEVICE),
            meta=small.meta[pick].to(DEVICE),
        )
        table = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(torch.int32).expand(2, -1).contiguous()
        packed = context // layout.tile * layout.tile
        step = dataclasses.replace(
            case.step, slots=case.step.slots.to(DEVICE), positions=torch.tensor([[packed + 127]], dtype=torch.int32,
            device=DEVICE),
            packed=torch.tensor([packed], dtype=torch.int32, device=DEVICE), page_table=table.to(DEVICE), max_packed=packed,
        )  # fmt: skip
        cases.append(dataclasses.replace(case, pages=pages, step=step, **{k: on_device(v) for k, v in move.items()}))
    return cases


def on_device(value: Any) -> Any:
    """A tensor, or a bundle of tensors, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: on_device(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def time_attention(
    cases: list[Case], made: TritonGpu, copy_gbps: float, context: int, method: str = "heads"
) -> dict[str, float]:
    """Milliseconds of one layer's attention, all launches of it, and its share of the copy bandwidth."""

    def work() -> None:
        for case in cases:
            getattr(made, f"attend_{method}")(case.q, case.pages, getattr(case, method), case.full, case.step)

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
    made, tile = TritonGpu(DEVICE), case.layout.tile
    count = 50 * tile
    keys, values = (torch.randn(count, 8, 128, device=DEVICE).half() for _ in range(2))
    retained = torch.zeros(count, dtype=torch.bool, device=DEVICE)
    row = case.step.page_table[1]
    pack, _ = seconds_of(lambda: made.pack_heads(case.pages, case.heads, row, 0, keys, values, retained), 5)
    unpack, _ = seconds_of(lambda: made.unpack_heads(case.pages, case.heads, row, 0, count), 5)
    return {"pack_tokens_per_s": count / pack, "unpack_tokens_per_s": count / unpack}


def time_decode(context: int, graph: bool, steps: int = 64) -> dict[str, float]:
    """Milliseconds of a whole decode step, packing included: Mistral-7B, dummy weights, a cache filled with random tokens.

    The host's clock, for the host's part is the point of the comparison. Needs the packages of the engine too.
    """
    from skvq.engine.config import CacheConfig
    from skvq.engine.generate import Engine
    from skvq.engine.steps import DecodeBatch

    engine = Engine.load(
        "mistral-7b", max_context=context + 2048, max_sequences=1, cache=CacheConfig(group_size=128), dummy_weights=True,
        cuda_graph=graph,
    )  # fmt: skip
    sequence = engine.new_sequence()
    engine.fill(sequence, context)
    batch = DecodeBatch([sequence], engine.parts.model.config.attention_spans)
    times = []
    for i in range(steps + 8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = engine.decode_step(batch, [i])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times = sorted(times[8:])
    middle = statistics.median(times)
    spread = (times[3 * steps // 4] - times[steps // 4]) / middle
    assert not logits.isnan().any()
    return {"ms": middle * 1e3, "slowest_ms": times[-1] * 1e3, "spread": spread}


def sweep(cases: list[Case], copy_gbps: float, context: int, log: Log) -> None:
    """Programs a multiprocessor (hence splits) and stages of the software pipeline."""
    made = TritonGpu(DEVICE)
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for stages in (1, 2, 3):
        for programs in (4, 8, 12, 16, 24):
            made.programs, made.stages = processors * programs, stages
            log.step(
                f"sweep {context} stages {stages} programs {programs}",
                lambda: time_attention(cases, made, copy_gbps, context),
                8,
            )


def measure(log: Log) -> None:
    log.step("subnormals", subnormals)
    copy_gbps = log.step("copy", copy_bandwidth)["gbps"]
    if not correctness(log):
        return
    for shape in SHAPES:
        for kb, vb, group, mean in TIMED:
            for context in CONTEXTS:
                name = f"attend {shape} {context} K{kb:g}V{vb:g} g{group}{' mean' if mean else ''}"
                log.step(
                    name,
                    lambda a=(shape, context, kb, vb, group, mean): time_attention(arena(*a), TritonGpu(DEVICE),
                    copy_gbps, a[1]), 12,
                )  # fmt: skip
                torch.cuda.empty_cache()
                if (kb, vb, group, mean) == TIMED[0]:
                    log.step(f"sdpa {shape} {context}", lambda a=(shape, context): time_sdpa(*a), 8)
                    torch.cuda.empty_cache()
    for kb, vb in ((2.0, 2.0), (2.0, 1.5)):
        log.step(f"packing K{kb:g}V{vb:g}", lambda kb=kb, vb=vb: time_packing(kb, vb), 20)
        log.step(f"lattice packing K{kb:g}V{vb:g}", lambda kb=kb, vb=vb: time_packing(kb, vb, lattice=True), 30)
    for shape in SHAPES:
        context = 131_072
        log.step(
            f"attend {shape} {context} reorder K2V2 g64",
            lambda shape=shape, context=context: time_attention(
                arena(shape, context, 2.0, 2.0, 64, False), TritonGpu(DEVICE), copy_gbps, context, "labels"
            ), 15,
        )  # fmt: skip
        torch.cuda.empty_cache()
    for context in DECODE_CONTEXTS:
        for graph in (True, False):
            name = f"decode step {context} {'graph' if graph else 'eager'}"
            log.step(name, lambda context=context, graph=graph: time_decode(context, graph), 150)
            torch.cuda.empty_cache()
    cases = arena("mistral-7b", 131_072, 2.0, 2.0, 128, False)
    sweep(cases, copy_gbps, 131_072, log)
    for kb, vb, group, size in formats():  # the rest of the formats
        name = f"gate K{kb:g}V{vb:g} g{group} head {size}"
        log.step(name, lambda kb=kb, vb=vb, group=group, size=size: error_of(
            make_case(key_bits=kb, value_bits=vb, group_size=group, size=size, packed=(2,), device="cuda")
        ), 20)  # fmt: skip


def table(results: dict[str, Any]) -> None:
    """What matters, last."""
    gates = {k: v for k, v in results.items() if k.startswith("gate ")}
    good = sum(bool(v.get("good")) for v in gates.values())
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
            print(f"{name}: {value['ms']:.2f} ms, slowest {value['slowest_ms']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=520.0)
    options = parser.parse_args()
    name = torch.cuda.get_device_name(DEVICE)
    output = options.output or ROOT / "benchmarks/results" / f"gpu-{name.replace(' ', '-').lower()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(output.read_text()) if output.exists() else {}
    log = Log(output, time.monotonic() + options.seconds, known | stamp(name, "torch", "triton"))
    try:
        measure(log)
        finished = True
    except OutOfTime as left:
        finished = False
        print(f"out of time before: {left}; call again to go on", flush=True)
    table(log.results)
    print(json.dumps({"device": name, "finished": finished, "output": str(output), "results": len(log.results)}))


if __name__ == "__main__":
    main()
