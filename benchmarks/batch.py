"""What does a long prompt cost the answers that are being written when it comes?

    python benchmarks/batch.py [--model smollm2-135m] [--ctx 6000] [--answers 2] [--rounds 3]

Some answers to short prompts are under way in a batch when a prompt of N tokens of Python's bundled documentation is added. In
turns, batches that read it in pieces between their steps (``Engine.batch()``), and such that read it whole first
(``interleaved=False``). Reported, of the round whose whole time is the median: the longest pause of an answer, seconds until
the long prompt's first token, tokens that the others wrote meanwhile, and seconds until all is written. On a CPU the texts must
be the same; on a GPU, where a step of two sequences rounds otherwise than one of one, it is reported how many are. Last line:
JSON, also written to --output.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from stamp import stamp, write

from skvq import Engine, Quiet, SamplingConfig
from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.measure import device_name

SHORT = SamplingConfig(max_new_tokens=400, ignore_eos=True)
LONG = SamplingConfig(max_new_tokens=32, ignore_eos=True)
OPENINGS = ("Once upon a time", "The capital of France", "Call me Ishmael.", "It was the best of times")


def measured(engine: Engine, ids: list[int], answers: int, *, interleaved: bool) -> tuple[dict[str, Any], list[str]]:
    """Figures of one batch, and its texts."""
    with engine.batch(interleaved=interleaved) as batch:
        others = [batch.add(text, SHORT) for text in OPENINGS[:answers]]
        while others[-1].timing.new_tokens < 20:
            batch.step()
        written = sum(other.timing.new_tokens for other in others)
        start = then = time.perf_counter()
        long, pause, first = batch.add(ids, LONG), 0.0, 0.0
        while len(batch):
            went_on = [request for request, _ in batch.step()]
            now = time.perf_counter()
            if any(other in went_on for other in others):
                pause, then = max(pause, now - then), now
            if long.answer and not first:
                first, meanwhile = now - start, sum(other.timing.new_tokens for other in others) - written
        row = {"pause_s": pause, "first_token_s": first, "tokens_meanwhile": meanwhile, "all_s": now - start}
    return row, [request.text for request in (*others, long)]


RESULTS = Path(__file__).parent / "results"


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--ctx", default=6000, show_default=True)
@click.option("--answers", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--dummy-weights", is_flag=True, help="Random weights of the model's shape.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: results/batch.json, on a GPU batch-gpu.json.")
def main(model: str, ctx: int, answers: int, rounds: int, dummy_weights: bool, output: Path | None) -> None:
    engine = Engine.load(
        model, max_context=ctx + 500, max_sequences=answers + 1, report=Quiet(), prefix_cache=False, dummy_weights=dummy_weights
    )
    ids = engine.encode(built_in_corpus()[: 8 * ctx])[:ctx]
    modes = {"in pieces": True, "whole": False}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    texts = []
    for _ in range(rounds):
        for name, interleaved in modes.items():
            row, text = measured(engine, ids, answers, interleaved=interleaved)
            rows[name].append(row)
            texts.append(text)
    same = sum(one == first for text in texts for one, first in zip(text, texts[0], strict=True)) / (len(texts) * len(texts[0]))
    assert same == 1 or engine.device.type == "cuda", "an answer hangs on what is beside it"
    results = [{"read": n} | sorted(found, key=lambda r: r["all_s"])[len(found) // 2] for n, found in rows.items()]
    for row in results:
        print(
            f"read {row['read']:9}: longest pause {1e3 * row['pause_s']:7,.0f} ms, first token after "
            f"{row['first_token_s']:5.1f} s, {row['tokens_meanwhile']:4} tokens meanwhile, all in {row['all_s']:5.1f} s",
            file=sys.stderr,
        )
    found = stamp(device_name(engine.device), "torch", "numba") | {"model": model, "ctx": ctx, "answers": answers}
    found |= {"same_texts": same}
    write(output or RESULTS / ("batch.json" if engine.device.type == "cpu" else "batch-gpu.json"), found | {"results": results})
    print(json.dumps(found | {"results": results}))


if __name__ == "__main__":
    main()
