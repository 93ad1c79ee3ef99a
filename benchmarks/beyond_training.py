"""How well does a model predict a text behind the length it was trained for, with its RoPE as it is and stretched?

    python benchmarks/beyond_training.py --text FILE [--model smollm2-135m] [--tokens 24576] [--factor 4]

Perplexity of each stretch of 2,048 tokens, all read as one text, every position seeing what decode would: with a 16-bit cache
and RoPE as it is, dynamic, YaRN and in chunks (``engine.dual_chunks``), and the last with a 2-bit cache. Last line: JSON, also
written to --output, and a plot beside it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click
from stamp import stamp, write

from skvq import CacheConfig, Engine, Quiet
from skvq.engine.measure import device_name
from skvq.loaders.hub import config_of

STRETCH = 2048


@click.command()
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--tokens", default=24576, show_default=True)
@click.option("--factor", default=4, show_default=True, help="Of the trained length, that RoPE is stretched to.")
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "beyond_training.json")
def main(text: Path, model: str, tokens: int, factor: int, output: Path) -> None:
    results = []
    fp = CacheConfig(method="fp")
    ways: list[tuple[str | None, CacheConfig]] = [(None, fp)]
    ways += [(f"{kind}:{factor}", fp) for kind in ("dynamic", "yarn", "chunks")]
    for scaling, cache in [*ways, (f"chunks:{factor}", CacheConfig())]:
        engine = Engine.load(model, max_context=tokens, rope_scaling=scaling, cache=cache, report=Quiet())
        ids = engine.encode(text.read_text())[:tokens]
        perplexity = [math.exp(float(part.mean())) for part in engine.nll(ids).split(STRETCH)]
        name = f"{scaling or 'as it is'}, {cache.name}"
        results.append({"rope_scaling": scaling, "cache": cache.name, "perplexity": perplexity})
        print(f"{name:26} {' '.join(f'{p:8.2f}' for p in perplexity)}", file=sys.stderr)
        device, trained = device_name(engine.device), config_of(model, download=False).trained_context
        del engine
    row = {"model": model, "trained": trained, "text": text.name, "tokens": tokens, "stretch": STRETCH, "results": results}
    plot(row, output.with_suffix(".png"))
    write(output, stamp(device, "torch", "numba") | row)


def plot(row: dict, file: Path) -> None:  # type: ignore[type-arg]
    """A line for each way, over the position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for found in row["results"]:
        at = [(i + 1) * row["stretch"] for i in range(len(found["perplexity"]))]
        dashed = "--" if found["cache"] != "fp" else "-"
        axes.plot(at, found["perplexity"], dashed, label=f"{found['rope_scaling'] or 'as it is'}, {found['cache']}", marker=".")
    axes.set(
        xlabel="position", ylabel="perplexity", yscale="log", title=f"{row['model']}, trained to {row['trained']:,} tokens"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
