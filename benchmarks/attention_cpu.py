"""How fast is decode attention over packed pages on this CPU, and what could it be at most?

Prints the copy bandwidth of the machine first, then checks the kernel against the specification, then measures one layer of
Mistral-7B at long contexts and all 30 layers of SmolLM2-135M at short ones, with random codes: the best of many calls (of each
layer), the median, and the CPU time of one thread, which other processes disturb least. Last line: JSON.

    python benchmarks/attention_cpu.py [--quick] [--key-bits 2 --value-bits 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# isort: split
import torch
from cases import Case, attend, compare, lengthened, make_case
from stamp import stamp

from skvq.engine.measure import copy_bandwidth, device_name
from skvq.kernels.layout import LEVELS, PageLayout
from skvq.kernels.numba_cpu import NumbaCpu


def say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def timed(function: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Times of calls for about so many seconds, at least five, after one that is not counted."""
    function()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        start = clock()
        function()
        times.append(clock() - start)
    return times


def cpu_seconds(function: Callable[[], object], seconds: float) -> float:
    """CPU time of a call on one thread, the best of several: what else the machine does hardly shows in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = min(timed(function, seconds, time.thread_time))
    torch.set_num_threads(threads)
    return best


def make_call(layout: PageLayout, query_heads: int, tokens: int, window: int, active_pairs: int, seed: int = 0) -> Case:
    """One sequence of ``tokens`` packed tokens on shuffled pages, ``window`` and sinks in 16 bits; a key mean in the
    ``active_pairs`` slowest pairs."""
    case = make_case(
        size=layout.head_size, kv_heads=layout.kv_heads, repeat=query_heads // layout.kv_heads, key_bits=layout.key_bits,
        value_bits=layout.value_bits, group_size=layout.group_size, packed=(1,), window=window, retained=0.0,
        has_key_mean=active_pairs > 0, dtype=torch.bfloat16, seed=seed,
    )  # fmt: skip
    mean = case.heads.key_mean.unflatten(1, (2, -1)).clone()  # [KH, 2, D/2]
    mean[:, :, : layout.head_size // 2 - active_pairs] = 0
    case = replace(case, q=case.q.float(), heads=replace(case.heads, key_mean=mean.flatten(1)))
    return lengthened(case, tokens, torch.device("cpu"), seed)


def check(backend: NumbaCpu, layout: PageLayout, query_heads: int) -> None:
    """The gate: no figure is reported unless the answer is right."""
    call = make_call(layout, query_heads, 4096, 100, 20)
    out, lse, expected, expected_lse = compare(backend, call, "heads")
    error = float((out - expected).norm() / expected.norm())
    assert error < 5e-4 and float((lse - expected_lse).abs().max()) < 1e-2, f"wrong by {error}: nothing is measured"
    say(f"gate: error {error:.1e} against float32, {layout.head_size}-channel heads, group {layout.group_size}")


def measure(
    backend: NumbaCpu, name: str, layout: PageLayout, query_heads: int, tokens: int, args: argparse.Namespace, copy: float
) -> dict[str, object]:
    layers = 30 if name == "smollm2-135m" else 1
    calls = [make_call(layout, query_heads, tokens, args.window, args.mean_pairs, seed) for seed in range(layers)]
    times = [timed(lambda call=call: attend(backend, call, "heads"), max(0.3, args.seconds / layers)) for call in calls]
    best, median, packed = sum(map(min, times)), sum(map(statistics.median, times)), calls[0].step.max_packed
    core = cpu_seconds(lambda: attend(backend, calls[0], "heads"), args.seconds / 2) * layers
    nbytes, codes = layers * packed * layout.bytes_per_token, layers * packed * layout.kv_heads * layout.head_size * 2
    row: dict[str, object] = {
        "shape": name, "layers": layers, "group": layout.group_size, "ctx": tokens, "ms": round(best * 1e3, 3),
        "median_ms": round(median * 1e3, 3), "gbps": round(nbytes / best / 1e9, 2),
        "share_of_copy": round(nbytes / best / copy, 3), "gcodes_per_s": round(codes / best / 1e9, 2),
        "gcodes_per_s_and_core": round(codes / core / 1e9, 2),
    }  # fmt: skip
    say(
        f"{name:13} g{layout.group_size:<3} {tokens:>8} tokens x {layers:2} layers: {best * 1e3:8.3f} ms "
        f"(median {row['median_ms']}), {row['gbps']} GB/s, {100 * nbytes / best / copy:.0f} % of copy, "
        f"{row['gcodes_per_s']} G codes/s; {row['gcodes_per_s_and_core']} a core of CPU time"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the million tokens")
    parser.add_argument("--key-bits", type=float, default=2.0, choices=sorted(LEVELS))
    parser.add_argument("--value-bits", type=float, default=2.0, choices=sorted(LEVELS))
    parser.add_argument("--mean-pairs", type=int, default=0, help="channel pairs with a key mean")
    parser.add_argument("--window", type=int, default=200, help="full-precision tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    copy = copy_bandwidth(device)
    say(f"ceiling: copy {copy / 1e9:.1f} GB/s (read + write), {device_name(device)}")
    backend = NumbaCpu()
    bits = {"key_bits": args.key_bits, "value_bits": args.value_bits}
    rows = []
    for group in (128, 64):
        layout = PageLayout(head_size=128, kv_heads=8, group_size=group, **bits)
        check(backend, layout, 32)
        for tokens in (32_768, 131_072) if args.quick else (32_768, 131_072, 1_048_576):
            rows.append(measure(backend, "mistral-7b", layout, 32, tokens, args, copy))
    layout = PageLayout(head_size=64, kv_heads=3, group_size=64, **bits)
    check(backend, layout, 9)
    rows += [measure(backend, "smollm2-135m", layout, 9, tokens, args, copy) for tokens in (256, 2048, 7900)]
    told = {**stamp(device_name(device), "torch", "numba"), "threads": args.threads, **bits, "copy_gbps": round(copy / 1e9, 1)}
    print(json.dumps({**told, "results": rows}))


if __name__ == "__main__":
    main()
