"""What does prompt lookup save, where an answer quotes its text and where it does not?

    python benchmarks/lookup.py [--model smollm2-135m] [--ctx 1000,6000] [--guesses 0,2,3,4,6] [--rounds 3]

Three ways to go on after N tokens of Python's bundled documentation, greedily: its last 1,500 characters begin again (a quote),
a question about it in the model's chat format, and a story of its own. All guess counts take turns in every round, on forks of
one sequence that has read the text; the best round counts. Reported: milliseconds a token, tokens a step, and whether the text
was the same. Last line: JSON, also written to --output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from stamp import stamp, write

from skvq import Engine, Quiet, SamplingConfig
from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.measure import device_name

WRITE = 160
"""Tokens of an answer."""


def prompts(engine: Engine, context: int) -> dict[str, list[int]]:
    """The ids to read, by what they ask for."""
    text = built_in_corpus()
    body = engine.decode(engine.encode(text[: 8 * context])[: context - 400])
    question = [{"role": "user", "content": f"{body}\n\nWhat is this text about? Quote it where you can."}]
    return {
        "quote": engine.encode(f"{body}\n\nOnce more:\n\n{body[-1500:-1300]}"),
        "question": engine.encode(question),
        "story": engine.encode(f"{body}\n\nA story: once upon a time there was a king who"),
    }


def measured(engine: Engine, ids: list[int], guesses: list[int], rounds: int) -> list[dict[str, Any]]:
    """Figures of each guess count after one text."""
    best: dict[int, dict[str, Any]] = {}
    texts: dict[int, str] = {}
    with engine.prefill(ids) as read:
        for _ in range(rounds):
            for count in guesses:
                config = SamplingConfig(max_new_tokens=WRITE, ignore_eos=True, prompt_lookup=count)
                with read.fork() as fork:
                    texts[count] = "".join(engine.stream("", config, sequence=fork))
                    found = fork.timing
                steps = found.decoded_tokens - found.guessed_tokens
                row = {
                    "guesses": count,
                    "ms_per_token": 1e3 * found.decode_seconds / found.decoded_tokens,
                    "tokens_per_step": found.decoded_tokens / steps,
                    "same_text": texts[count] == texts[guesses[0]],
                }
                best[count] = min(row, best.get(count, row), key=lambda r: r["ms_per_token"])
    base = best[guesses[0]]["ms_per_token"]
    return [row | {"times_faster": base / row["ms_per_token"]} for row in best.values()]


def numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--ctx", callback=numbers, default="1000,6000", show_default=True)
@click.option(
    "--guesses", callback=numbers, default="0,2,3,4,6", show_default=True, help="The first is what others are compared to."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "lookup.json")
def main(model: str, ctx: list[int], guesses: list[int], rounds: int, output: Path) -> None:
    engine = Engine.load(model, max_context=max(ctx) + WRITE, max_sequences=2, report=Quiet(), prefix_cache=False)
    results = []
    for context in ctx:
        for name, ids in prompts(engine, context).items():
            for row in measured(engine, ids, guesses, rounds):
                results.append({"ctx": len(ids), "text": name} | row)
                other = "" if row["same_text"] else ", another text"
                print(
                    f"{name:9} {len(ids):6,} tokens, {row['guesses']} guessed: {row['ms_per_token']:6.2f} ms a token, "
                    f"{row['tokens_per_step']:.2f} a step, {row['times_faster']:.2f}x{other}",
                    file=sys.stderr,
                )
    found = stamp(device_name(engine.device), "torch", "numba") | {"model": model, "results": results}
    write(output, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
