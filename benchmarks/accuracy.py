"""How far is each cache from the 16-bit one, per bit? The README's table and plot, on the real packed path.

    python benchmarks/accuracy.py --calibrate speeches.txt --text moby-dick.txt

Every cache is calibrated on the first 16,384 tokens of one text and measured on the first 2,048 of another, in one run, once
with a window of exactly W tokens (as papers simulate) and once as decode really sees it (whole tiles). Last line: JSON, also
written to --output with a plot beside it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from skvq import CacheConfig, Engine

CACHES = (
    ("rotate", 2, 2), ("rotate", 2, 1.5), ("rotate", 1.5, 1.5), ("rotate", 3, 2), ("rotate", 4, 4),
    ("reorder", 2, 2), ("plain", 2, 2), ("fp", 2, 2),
)  # fmt: skip


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--calibrate", "corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=2048, show_default=True)
@click.option("--output", default=Path(__file__).parent / "results" / "accuracy.json", type=click.Path(path_type=Path))
def main(model: str, corpus: Path, text: Path, tokens: int, output: Path) -> None:
    """Measure, print, write."""
    engine = Engine.load(model, max_context=tokens, max_sequences=1, cache=CacheConfig(method="fp"))
    rows: list[dict[str, Any]] = []
    found = {
        "question": "KL, perplexity and top-1 agreement of packed caches against 16 bits",
        "model": model,
        "calibrated_on": corpus.name,
        "measured_on": text.name,
        "tokens": tokens,
        **stamp(),
        "results": rows,
    }
    for method, key_bits, value_bits in CACHES:
        cache = CacheConfig(method=method, key_bits=key_bits, value_bits=value_bits)
        rows.append(measure(engine, cache, corpus, text, tokens))
        output.write_text(json.dumps(found, indent=1) + "\n")
    plot(rows, output.with_suffix(".png"))
    print(json.dumps(found))


def measure(engine: Engine, cache: CacheConfig, corpus: Path, text: Path, tokens: int) -> dict[str, Any]:
    """One cache's row: figures with an exact window, and as ``tile_*`` those of decode."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "calibration.safetensors"
        if cache.method != "fp":
            engine.calibrate(cache, corpus.read_text(), artifact, corpus_name=corpus.name, tokens=16384)
        options: dict[str, Any] = {"tokens": tokens, "stride": tokens, "calibration": artifact}
        row, tiles = (engine.evaluate(text.read_text(), [cache], exact_window=exact, **options)[0] for exact in (True, False))
    row.pop("by_position")
    row |= {f"tile_{name}": tiles[name] for name in ("ppl", "kl", "top1")} | {"seconds": round(time.perf_counter() - start)}
    print(
        f"{row['method']:8} K{row['key_bits']:<4g} V{row['value_bits']:<4g} {row['bits_per_element']:6.3f} bits   "
        f"ppl {row['ppl']:8.3f}   KL {row['kl']:.4f} (whole tiles {row['tile_kl']:.4f})   top-1 {row['top1']:.3f}",
        file=sys.stderr,
    )
    return row


def stamp() -> dict[str, str]:
    """Device, versions and commit."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "commit": commit}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against bits, a line a method; left out, and said, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: pip install "skvq[plot]"', file=sys.stderr)
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in ("rotate", "reorder", "plain"):
        points = sorted((r["bits_per_element"], r["kl"]) for r in rows if r["method"] == method)
        axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.set(
        xlabel="bits per cached number, everything counted", ylabel="KL from the 16-bit cache, nats per token", yscale="log"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
