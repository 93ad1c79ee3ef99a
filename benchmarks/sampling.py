"""How long does drawing a token take beside the decode step that it belongs to?

    python benchmarks/sampling.py [--model smollm2-135m] [--ctx 1000] [--rounds 5]

The logits are those of an answer about N tokens of Python's bundled documentation. Each way of sampling draws from all of them
in every round, by skvq and as written with torch (softmax, the whole vocabulary sorted for top-p, multinomial), as transformers
does, without a form where JSON is asked for; the best round counts. Last line: JSON, also written to --output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from stamp import stamp, write
from torch import Tensor

from skvq import Engine, Quiet, SamplingConfig
from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.measure import device_name
from skvq.engine.sampling import Sampler

WRITE = 64
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 40": {"temperature": 0.8, "top_k": 40},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "greedy, JSON": {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": WRITE}},
}


def answer_logits(engine: Engine, context: int) -> tuple[list[Tensor], float]:
    """Logits [V] after each token of a greedy answer, and milliseconds of a step, the median."""
    ids = engine.encode(built_in_corpus()[: 8 * context])[:context]
    with engine.new_sequence() as sequence:
        rows, taken = [engine.read(sequence, ids)], []
        for _ in range(WRITE):
            start = time.perf_counter()
            rows.append(engine.decode_step([sequence], [int(rows[-1].argmax())])[0])
            taken.append(time.perf_counter() - start)
    return rows[1:], 1e3 * sorted(taken)[WRITE // 2]


def with_torch(logits: Tensor, config: SamplingConfig) -> int:
    """One token, by operations over the whole vocabulary."""
    if not config.temperature:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        kept = ordered.masked_fill(ordered.cumsum(0) - ordered >= config.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(0, order, kept)
    if config.min_p:
        probabilities = probabilities.masked_fill(probabilities < config.min_p * probabilities.max(), 0)
    return int(torch.multinomial(probabilities, 1))


def milliseconds(draw: Callable[[Tensor, int], object], rows: Sequence[Tensor]) -> float:
    """Of one draw."""
    start = time.perf_counter()
    for position, logits in enumerate(rows):
        draw(logits, position)
    return 1e3 * (time.perf_counter() - start) / len(rows)


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--ctx", "context", default=1000, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--output", type=Path, default=Path(__file__).parent / "results" / "sampling.json")
def main(model: str, context: int, rounds: int, output: Path) -> None:
    engine = Engine.load(model, max_context=context + WRITE + 1, max_sequences=1, report=Quiet())
    rows, step_ms = answer_logits(engine, context)
    best = {name: [float("inf")] * 2 for name in WAYS}
    for _ in range(rounds):
        for name, options in WAYS.items():
            config = SamplingConfig(**options)
            form = engine.grammars.of(config, rows[0].device)
            sampler = Sampler(config, [], len(rows[0]), rows[0].device, form)
            ours = milliseconds(lambda logits, at, s=sampler: s.take(*s.choose(logits, at).tolist()), rows)  # type: ignore[misc]
            torchs = milliseconds(lambda logits, at, c=config: with_torch(logits, c), rows)  # type: ignore[misc]
            best[name] = [min(best[name][0], ours), min(best[name][1], torchs)]
    results = {
        name: {"ms": ours, "torch_ms": torchs, "share_of_step": ours / step_ms, "torch_share_of_step": torchs / step_ms}
        for name, (ours, torchs) in best.items()
    }
    record = stamp(device_name(engine.device), "torch") | {"model": model, "vocabulary": len(rows[0]), "step_ms": step_ms}
    print(f"a decode step at {context:,} tokens takes {step_ms:.2f} ms; drawing from {len(rows[0]):,} tokens:")
    for name, found in results.items():
        print(f"  {name:16} {found['ms']:6.3f} ms, with torch {found['torch_ms']:6.3f} ms")
    write(output, record | {"results": results})
    print(json.dumps(record | {"results": results}))


if __name__ == "__main__":
    main()
