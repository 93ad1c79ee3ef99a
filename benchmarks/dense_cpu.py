"""What do our CPU kernels of prefill do beside torch's, in float32?

    python benchmarks/dense_cpu.py [--rounds 5]

Causal attention of the last 1,024 of N tokens, and products of 1,024 vectors with matrices of bfloat16 and of Q4_K blocks
(torch's weights are widened before it is timed), of the shapes of SmolLM2-135M and Mistral-7B; on a CPU with AMX ours also as
it is without. All take turns in every round, on inputs that they agree on (checked first); the best round counts. Reported:
GFLOP/s of each, and how many times as fast as torch ours is. Last line: JSON, also written to --output. Run it on an idle
machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from stamp import stamp, write

from skvq.engine.measure import device_name
from skvq.kernels import dense
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.numba_cpu import block_matrix, flash, half_matrix
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import HalfMatrix
from skvq.kernels.numba_cpu.permission import has_amx

VECTORS = 1024
ATTENTION = {"SmolLM2-135M": (9, 3, 64), "Mistral-7B": (32, 8, 128)}  # query heads, kv heads, head size
MATRICES = {"SmolLM2-135M": (3072, 576), "Mistral-7B": (28672, 4096)}  # rows and columns of the MLP's first
NO_SPAN = 2**31 - 1
Compute = Callable[[], torch.Tensor]


def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as other dtypes have it: torch's flash attention, a rectangle and a square."""
    ours = dense._is_ours
    dense._is_ours = lambda q: False
    try:
        return dense.attend_causal(q, k, v, NO_SPAN)[0]
    finally:
        dense._is_ours = ours


def without_amx(call: Compute) -> torch.Tensor:
    """Ours as on a CPU that has none."""
    modules = (block_matrix, flash, half_matrix)
    for module in modules:
        module.has_amx = lambda: False
    try:
        return call()
    finally:
        for module in modules:
            module.has_amx = has_amx


def of_matrix(matrix: HalfMatrix | BlockMatrix, x: torch.Tensor) -> Compute:
    """Products with it, always in the same memory."""
    out = torch.empty(len(x), matrix.shape[0])
    return lambda: (matrix.multiply(x, None, out), out)[1]


def compared(name: str, flops: float, rounds: int, ours: Compute, theirs: Compute) -> dict[str, Any]:
    """One row; the calls must agree."""
    calls = {"ours": ours, "torch": theirs} | ({"without_amx": lambda: without_amx(ours)} if has_amx() else {})
    found = {which: call().clone() for which, call in calls.items()}
    for which, values in found.items():
        off = float((values - found["torch"]).abs().max() / found["torch"].abs().max())
        assert off < 5e-5, (name, which, off)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for which, call in calls.items():
            start = time.perf_counter()
            call()
            best[which] = min(best[which], time.perf_counter() - start)
    speeds = {f"{which}_gflops": flops / seconds / 1e9 for which, seconds in best.items()}
    row = {"what": name} | speeds | {"times_faster": best["torch"] / best["ours"]}
    print(f"{name:44} " + ", ".join(f"{which} {speed:5.0f}" for which, speed in speeds.items()), file=sys.stderr, end="")
    print(f": {row['times_faster']:.2f} times as fast", file=sys.stderr)
    return row


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "dense_cpu.json")
def main(rounds: int, output: Path) -> None:
    torch.manual_seed(0)
    rows = []
    for model, (heads, kv_heads, size) in ATTENTION.items():
        for tokens in (1024, 4096, 16384):
            q, (k, v) = torch.randn(VECTORS, heads, size), torch.randn(2, kv_heads, tokens, size)
            flops = 4 * heads * size * VECTORS * (tokens - VECTORS / 2)
            ours, theirs = partial(dense.attend_causal, q, k, v, NO_SPAN), partial(torchs, q, k, v)
            rows.append(compared(f"attention, {model}, {tokens:,} tokens", flops, rounds, lambda ours=ours: ours()[0], theirs))
    for model, (outs, ins) in MATRICES.items():
        x, blocks = torch.randn(VECTORS, ins), FORMATS["Q4_K"]
        packed = torch.randint(0, 60, (outs, ins // (blocks.span * 32) * blocks.file_bytes), dtype=torch.uint8)
        half = HalfMatrix(torch.randn(outs, ins).bfloat16())
        for kind, matrix in (("bfloat16", half), ("Q4_K", BlockMatrix(packed, "Q4_K"))):
            wide = matrix.rows(torch.arange(outs))
            name = f"{kind} matrix, {model}, {outs:,} by {ins:,}"
            theirs = partial(torch.nn.functional.linear, x[:, : wide.shape[1]].contiguous(), wide)
            rows.append(compared(name, 2 * VECTORS * wide.numel(), rounds, of_matrix(matrix, theirs.args[0]), theirs))
    found = stamp(device_name(torch.device("cpu")), "torch", "numba") | {"threads": torch.get_num_threads(), "results": rows}
    write(output, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
