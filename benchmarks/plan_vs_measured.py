"""What a run takes against what was planned for it: peak memory of whole runs on the CPU, each in a process of its own.

    python benchmarks/plan_vs_measured.py [--quick] [-o benchmarks/results/plan.json]

A run loads dummy weights, prefills a full context but two tokens, and decodes these. Measured is the peak of the resident
set (VmHWM) over what the process held after a tiny run of the same kind, which compiles kernels and starts threads.
Attention spans are short, so that the time is linear and the peak is not. A case with ``memory`` (MiB) is told that there is
no more. The C library keeps freed blocks below a threshold that it moves: the first case then took from 0.92 to 1.12
of its plan, from run to run. Here it is fixed at 64 KiB. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# isort: split
import torch
from stamp import stamp, write

from skvq.engine.measure import device_name

SHAPE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8}
HEAVY = {"hidden_size": 2048, "intermediate_size": 4096, "vocab_size": 32000, "num_heads": 16, "num_kv_heads": 2}
MIXED = {"hidden_size": 1024, "intermediate_size": 512, "num_heads": 8, "num_kv_heads": 2}
WIDE = {"num_heads": 24, "num_kv_heads": 24, "num_layers": 2}
CASES: list[dict[str, Any]] = [
    {"method": "plain", "key_bits": 8.0, "value_bits": 8.0, "context": 24576, "prefill": "exact", "shape": WIDE},
    {
        "method": "plain",
        "key_bits": 2.0,
        "value_bits": 2.0,
        "context": 65536,
        "prefill": "exact",
        "shape": WIDE,
        "memory": 1000,
    },
    {"method": "plain", "key_bits": 8.0, "value_bits": 8.0, "context": 65536, "prefill": "exact"},
    {"method": "fp", "context": 98304, "prefill": "exact"},
    {"method": "fp", "context": 131072, "prefill": "streaming"},
    {"method": "plain", "key_bits": 2.0, "value_bits": 1.5, "context": 131072, "prefill": "exact"},
    {"method": "rotate", "context": 65536, "prefill": "exact"},
    {"method": "rotate", "context": 8192, "prefill": "exact", "shape": HEAVY},
    {"method": "rotate", "context": 32768, "prefill": "exact", "shape": MIXED, "experts": {"count": 32, "chosen": 8}},
    {"method": "plain", "context": 40960, "prefill": "streaming", "window": 30000},
    {"method": "plain", "context": 40960, "prefill": "exact", "window": 6000, "heavy_hitters": True},
]


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case, in this process."""
    from config_json import write_config

    from skvq import AttentionSinks, CacheConfig, Engine, HeavyHitters
    from skvq.engine import loading
    from skvq.engine.model_config import ExpertConfig, ModelConfig
    from skvq.engine.planner import Plan
    from skvq.engine.report import Quiet

    shape = {**SHAPE, **case.get("shape", {})}
    if "experts" in case:
        shape |= {"family": "mixtral", "experts": ExpertConfig(**case["experts"])}
    spans = (256,) * shape["num_layers"]
    config = ModelConfig(**({"family": "mistral", "head_size": 64, "trained_context": 2**18, "attention_spans": spans} | shape))
    write_config(folder, config)
    rules = (AttentionSinks(5), HeavyHitters()) if "heavy_hitters" in case else (AttentionSinks(5),)
    options = {name: case[name] for name in ("method", "key_bits", "value_bits", "window") if name in case}
    cache = CacheConfig(filters=rules, **options)

    if "memory" in case:
        loading.available_memory = lambda device: case["memory"] * 2**20

    def whole(context: int) -> Plan:
        chosen: dict[str, Any] = {"max_context": context, "max_sequences": 1, "cache": cache, "prefill": case["prefill"]}
        engine = Engine.load(folder, device="cpu", dummy_weights=True, report=Quiet(), **chosen)
        ids = torch.randint(256, (context - 2,), generator=torch.Generator().manual_seed(0)).tolist()
        sequence = engine.prefill(ids)
        for _ in range(2):
            engine.read(sequence, [7])
        return engine.parts.plan

    whole(3000)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the tiny run freed is not held
    base = memory("VmRSS")
    plan = whole(case["context"])
    measured, planned = memory("VmHWM") - base, plan.total
    found = {"form": str(plan.form), "parts": plan.parts, "planned": planned, "measured": measured}
    return {**case, **found, "ratio": measured / planned}


def main() -> None:
    """Every case in a process of its own; a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(json.loads(arguments.one), Path(folder))))
        return
    rows = []
    for case in CASES[:1] if arguments.quick else CASES:
        command = [sys.executable, __file__, "--one", json.dumps(case)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)},
        )
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        name = (
            row["method"]
            if row["method"] == "fp"
            else f"{row['method']} K{row.get('key_bits', 2):g}V{row.get('value_bits', 2):g}"
        )
        print(
            f"{name:12} {row['form']:25} {row['context']:>8,} tokens  planned {row['planned'] / 2**20:8.1f} MiB  "
            f"measured {row['measured'] / 2**20:8.1f} MiB  {row['ratio']:.3f}",
            flush=True,
        )
    result = {**stamp(device_name(torch.device("cpu")), "torch", "numba"), "results": rows}
    if arguments.output:
        write(arguments.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
