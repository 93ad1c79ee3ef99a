"""How far is each cache from the 16-bit one, per bit? The README's table and plot, on the real packed path.

    python benchmarks/accuracy.py --calibrate speeches.txt --text moby-dick.txt [--text another.txt]

Every cache is calibrated on the first 16,384 tokens of one text and measured on the first 2,048 of others and of the built-in
corpus, in one run, with a window of exactly W tokens (as papers simulate) and as decode really sees it (whole tiles). Beside
them, on the first text: OSCAR, KIVI, TurboQuant, QuaRot and SKVQ as published, simulated (``other_methods.py``), and the
quantized cache of transformers, which nobody here wrote (needs `optimum-quanto`; token by token, minutes). Last line: JSON,
also written to --output with a plot beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from other_methods import GROUP, QUAROT_RATIO, Kivi, Rotated, TurboQuant, observe, oscar_schemes, published_schemes, simulate
from stamp import stamp, write
from torch import Tensor

from skvq import CacheConfig, Engine
from skvq.calibrate.corpus import built_in_corpus
from skvq.calibrate.rotate import spread_matrix
from skvq.engine.measure import device_name
from skvq.loaders.hub import resolve

CALIBRATION_TOKENS = 16_384
BUILT_IN = "built-in"
CACHES: tuple[dict[str, Any], ...] = (
    *({"method": "rotate", "key_bits": k, "value_bits": v} for k, v in ((2, 2), (2, 1.5), (1.5, 1.5), (3, 2), (4, 4))),
    *({"method": "rotate", "bits_budget": budget} for budget in (2.25, 2.05)),
    {"method": "reorder", "key_bits": 2, "value_bits": 2},
    {"method": "plain", "key_bits": 2, "value_bits": 2},
    {"method": "fp"},
)


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--calibrate", "corpus", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", "texts", required=True, multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=2048, show_default=True)
@click.option("--output", default=Path(__file__).parent / "results" / "accuracy.json", type=click.Path(path_type=Path))
def main(model: str, corpus: Path, texts: tuple[Path, ...], tokens: int, output: Path) -> None:
    """Measure, print, write."""
    engine = Engine.load(model, max_context=tokens, max_sequences=1, cache=CacheConfig(method="fp"))
    rows: list[dict[str, Any]] = []
    found = {
        "question": "KL, perplexity and top-1 agreement of packed caches against 16 bits",
        "model": model,
        "calibrated_on": corpus.name,
        "tokens": tokens,
        **stamp(device_name(torch.device("cpu")), "torch", "numba", "transformers"),
        "results": rows,
    }

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        write(output, found)
        name = row["name"] + (" whole tiles" if row["window"] == "tiles" else "")
        figures = f"{row['bits_per_element']:6.3f} bits   ppl {row['ppl']:8.3f}   KL {row['kl']:.4f}   top-1 {row['top1']:.3f}"
        print(f"{row['text']:16} {name:32} {figures}", file=sys.stderr)

    measured = {text.name: text.read_text() for text in texts} | {BUILT_IN: built_in_corpus()}
    for options in CACHES:
        packed_rows(engine, CacheConfig(**options), corpus, measured, tokens, note)
    first = texts[0]
    ids = engine.parts.model.ids(engine.encode(first.read_text())[:tokens])
    simulated_rows(engine, corpus, first.name, ids, note)
    transformers_row(model, first.name, ids, note)
    plot([r for r in rows if r["text"] == first.name and r["window"] != "tiles"], output.with_suffix(".png"))
    print(json.dumps(found))


def packed_rows(
    engine: Engine,
    cache: CacheConfig,
    corpus: Path,
    texts: dict[str, str],
    tokens: int,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """One cache, calibrated once, on each text and with each kind of window."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "calibration.safetensors"
        if cache.is_packed:
            engine.calibrate(cache, corpus.read_text(), artifact, corpus_name=corpus.name, tokens=CALIBRATION_TOKENS)
        for name, text in texts.items():
            for exact in (True, False):
                options: dict[str, Any] = {"tokens": tokens, "stride": tokens, "exact_window": exact}
                options |= {"calibration": artifact} if cache.is_packed else {}
                (row,) = engine.evaluate(text, [cache], **options)
                row.pop("by_position")
                note(row | {"name": row_name(cache), "text": name, "window": "exact" if exact else "tiles"})


def row_name(cache: CacheConfig) -> str:
    """The cache in words: its bits, or the budget that calibration spent."""
    if not cache.is_packed:
        return cache.method
    if cache.bits_budget is not None:
        return f"{cache.method}, {cache.bits_budget:g} bits on average"
    return f"{cache.method} K{cache.key_bits:g}V{cache.value_bits:g}"


def simulated_rows(engine: Engine, corpus: Path, name: str, ids: Tensor, note: Callable[[dict[str, Any]], None]) -> None:
    """What others do, as their papers or code do it; their metadata in 16 bits but SKVQ's."""
    observed = observe(engine, engine.parts.model.ids(engine.encode(corpus.read_text())[:CALIBRATION_TOKENS]))
    published, oscar, size = published_schemes(observed), oscar_schemes(observed), engine.parts.model.config.head_size
    hadamard, turbo = spread_matrix(size).float(), {bits: TurboQuant(bits, size) for bits in (2, 3)}
    quarot = Rotated(hadamard, hadamard, ratio=QUAROT_RATIO)
    for label, bits, scheme in (
        ("OSCAR, simulated, K2V2", 2 + 32 / GROUP, lambda layer: oscar[layer]),
        ("KIVI, simulated, K2V2", 2 + 32 / GROUP, lambda layer: Kivi()),
        ("TurboQuant, simulated, K3V3", 3 + 16 / size, lambda layer: turbo[3]),
        ("TurboQuant, simulated, K2V2", 2 + 16 / size, lambda layer: turbo[2]),
        ("QuaRot, simulated, K2V2", 2 + 32 / GROUP, lambda layer: quarot),
        ("SKVQ as published, simulated, K2V2", 2 + 16 / GROUP, lambda layer: published[layer]),
    ):
        note({"name": label, "text": name, "window": "exact", "bits_per_element": bits, **simulate(engine, ids, scheme)})


@torch.no_grad()
def transformers_row(model: str, name: str, ids: Tensor, note: Callable[[dict[str, Any]], None]) -> None:
    """The 2-bit cache of transformers (quanto, groups of 64, residual 128) against its own full-precision one.

    Bits as with scales and shifts in 16 bits; run in float32, it keeps them in 32.
    """
    try:
        version("optimum-quanto")
    except PackageNotFoundError:
        print("no row for transformers: pip install optimum-quanto", file=sys.stderr)
        return
    import transformers

    path = resolve(model, download=False).path
    peer = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    exact = peer(ids[None], use_cache=False).logits[0].log_softmax(-1)
    cache = transformers.QuantizedCache("quanto", config=peer.config, nbits=2, q_group_size=GROUP, residual_length=128)
    steps, start = [], time.perf_counter()
    for at in range(len(ids)):
        steps.append(peer(ids[None, at : at + 1], past_key_values=cache).logits[0, -1].log_softmax(-1))
        if at % 128 == 127:
            spent = time.perf_counter() - start
            print(f"transformers: {at + 1:,} of {len(ids):,} tokens, {spent:.0f} s", file=sys.stderr)
    other = torch.stack(steps)
    nll, nll_exact = (-x[:-1].gather(1, ids[1:, None]).mean() for x in (other, exact))
    figures = {
        "ppl_fp": float(nll_exact.exp()),
        "ppl": float(nll.exp()),
        "kl": float((exact.exp() * (exact - other)).sum(-1).mean()),
        "top1": float((exact.argmax(-1) == other.argmax(-1)).float().mean()),
    }
    told = {"name": "transformers quanto 2 bits", "text": name, "window": "its own", "bits_per_element": 2 + 32 / GROUP}
    note(told | figures)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against bits: a line a method, a cross for each that others made; left out, and said, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: pip install "skvq[plot]"', file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, by_layer in (("rotate", False), ("rotate", True), ("reorder", False), ("plain", False)):
        chosen = [r for r in rows if r.get("method") == method and (r["bits_budget"] is not None) == by_layer]
        points = sorted((r["bits_per_element"], r["kl"]) for r in chosen)
        axes.plot(*zip(*points, strict=True), "o-", label=f"{method}, bits by layer" if by_layer else method)
    for row in rows:
        if "method" not in row:
            axes.plot(row["bits_per_element"], row["kl"], "x", label=row["name"])
    axes.set(
        xlabel="bits per cached number, everything counted", ylabel="KL from the 16-bit cache, nats per token", yscale="log"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
