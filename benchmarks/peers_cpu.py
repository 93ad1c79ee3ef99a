"""How fast are reading and writing on this CPU, beside llama.cpp and transformers on the same weights?

    python benchmarks/peers_cpu.py [--ctx 256,2048,7900] [--rounds 3]

Every engine is a process of its own that loads the same GGUF once and waits. Rounds go through the engines one after the
other, so that what else the machine does falls on all of them alike: each reads a prompt of N tokens, then writes tokens one
by one. Reported: the best round (a median beside it), as ratios too, and the peak memory of each process. Needs the `test`
extra; the quantized cache of transformers needs `optimum-quanto` or `hqq`. Last line: JSON, also written to --output with a
plot beside it. llama.cpp's threads spin: measure on an idle machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from stamp import stamp, write

from skvq.engine.measure import device_name, peak_bytes, reset_peak

WRITE = 24
"""Tokens written and timed after a prompt."""

OURS, BASE = "skvq K2V2", "llama.cpp f16"


class Peer(Protocol):
    """An engine with a model loaded: reads a prompt, writes tokens."""

    def run(self, ids: list[int]) -> tuple[float, float]:
        """Seconds to read ``ids``, and milliseconds a token to write WRITE more."""
        ...


class SkvqPeer:
    """This engine; the cache is the word after its name."""

    def __init__(self, name: str, model: str, context: int, threads: int) -> None:
        from skvq import CacheConfig, Engine

        torch.set_num_threads(threads)
        cache = CacheConfig(method="fp") if name.endswith("fp") else CacheConfig()
        context += WRITE + 2  # the same prompt is read again and again: no prefix is reused
        self._engine = Engine.load(model, max_context=context, max_sequences=1, cache=cache, prefix_cache=False, download=False)

    def run(self, ids: list[int]) -> tuple[float, float]:
        from skvq import SamplingConfig

        engine, sequence = self._engine, self._engine.new_sequence()
        config = SamplingConfig(max_new_tokens=WRITE + 1, ignore_eos=True)
        for _ in engine.stream(ids, config, sequence=sequence):
            pass
        sequence.free()
        timing = engine.timing
        return timing.prefill_seconds, 1e3 * timing.decode_seconds / timing.decoded_tokens


class LlamaPeer:
    """llama.cpp through xllamacpp, flash attention on; the cache type is the last word of its name."""

    def __init__(self, name: str, model: str, context: int, threads: int) -> None:
        import xllamacpp

        from skvq.loaders.hub import resolve

        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.split()[-1].upper()}")
        params = xllamacpp.CommonParams()
        params.model.path = str(resolve(model, download=False).path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity, params.port = context + WRITE + 8, 1, True, -1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.cache_type_k = params.cache_type_v = kind
        params.cache_ram_mib = 0
        self._server = xllamacpp.Server(params)

    def run(self, ids: list[int]) -> tuple[float, float]:
        request = {"prompt": ids, "n_predict": WRITE + 1, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        timings = self._server.handle_completions(request)["timings"]
        assert timings["prompt_n"] == len(ids) and timings["predicted_n"] == WRITE + 1, timings
        return timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"]


class TransformersPeer:
    """transformers in float32 on the dequantized weights; with a quantized cache where its name says so."""

    def __init__(self, name: str, model: str, context: int, threads: int) -> None:
        import transformers

        from skvq.loaders.hub import resolve

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        path = resolve(model, download=False).path
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self._bits = int(name.split()[-1]) if "quanto" in name else 0

    def _cache(self) -> Any:
        import transformers

        if not self._bits:
            return transformers.DynamicCache()
        return transformers.QuantizedCache("quanto", config=self._model.config, nbits=self._bits, q_group_size=64)

    @torch.no_grad()
    def run(self, ids: list[int]) -> tuple[float, float]:
        cache, start = self._cache(), time.perf_counter()
        out = self._model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(WRITE):
            token = out.logits[:, -1:].argmax(-1)
            out = self._model(token, past_key_values=cache)
        return read - start, 1e3 * (time.perf_counter() - read) / WRITE


ENGINES: dict[str, Callable[[str, str, int, int], Peer]] = {
    "skvq K2V2": SkvqPeer, "skvq fp": SkvqPeer,
    "llama.cpp f16": LlamaPeer, "llama.cpp q8_0": LlamaPeer, "llama.cpp q4_0": LlamaPeer,
    "transformers": TransformersPeer, "transformers quanto 2": TransformersPeer,
}  # fmt: skip


def work(name: str, model: str, context: int, threads: int) -> None:
    """A worker: a run for each line of JSON, and a line out."""
    peer = ENGINES[name](name, model, context, threads)
    cpu = torch.device("cpu")
    reset_peak(cpu)  # not that of loading, or of a calibration made once
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        read, write = peer.run(json.loads(line))
        print(json.dumps({"prefill_s": read, "ms_per_token": write, "peak_bytes": peak_bytes(cpu)}), flush=True)


class Worker:
    """A process with one engine in it."""

    def __init__(self, name: str, model: str, context: int, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--model", model, "--ctx", str(context)]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.good = self._answer() == "ready"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("{", '"ready"')):
                return json.loads(line)
        return None

    def run(self, ids: list[int]) -> dict[str, float]:
        assert self._process.stdin is not None
        print(json.dumps(ids), file=self._process.stdin, flush=True)
        found: dict[str, float] = self._answer()
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(names: Sequence[str], model: str, ids: list[int], threads: int, rounds: int) -> list[dict[str, Any]]:
    """All engines at one context, interleaved; one row each."""
    workers = {name: Worker(name, model, len(ids), threads) for name in names}
    for name in [n for n, w in workers.items() if not w.good]:
        print(f"{name}: does not start here, left out", file=sys.stderr)
        workers.pop(name).close()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.run(ids))
            print(f"{len(ids):>6} tokens, round {number + 1}: {name:22} {times[name][-1]}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    return [row(name, len(ids), found) for name, found in times.items()]


def row(name: str, context: int, found: list[dict[str, float]]) -> dict[str, Any]:
    """Best and median of an engine's rounds."""
    read, write = ([f[what] for f in found] for what in ("prefill_s", "ms_per_token"))
    return {
        "engine": name,
        "ctx": context,
        "ms_per_token": round(min(write), 3),
        "median_ms_per_token": round(statistics.median(write), 3),
        "prefill_s": round(min(read), 3),
        "median_prefill_s": round(statistics.median(read), 3),
        "prefill_tokens_per_s": round(context / min(read), 1),
        "peak_bytes": int(max(f["peak_bytes"] for f in found)),
        "rounds": len(found),
    }


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each other engine's, by context: below one is faster."""
    found = []
    for context in sorted({r["ctx"] for r in rows}):
        here = {r["engine"]: r for r in rows if r["ctx"] == context}
        for name, other in here.items():
            if OURS in here and name != OURS:
                decode, prefill = (here[OURS][what] / other[what] for what in ("ms_per_token", "prefill_s"))
                found.append({"ctx": context, "against": name, "decode": round(decode, 3), "prefill": round(prefill, 3)})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    lines = ["| engine, cache | context | ms a token | prefill tokens/s | peak memory, MB |", "|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: (r["ctx"], r["ms_per_token"])):
        peak = r["peak_bytes"] / 1e6
        lines.append(
            f"| {r['engine']} | {r['ctx']:,} | {r['ms_per_token']:.1f} | {r['prefill_tokens_per_s']:.0f} | {peak:,.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a token against context, a line an engine; left out, and said, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: pip install "skvq[plot]"', file=sys.stderr)
        return

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(r["engine"] for r in rows):
        points = sorted((r["ctx"], r["ms_per_token"]) for r in rows if r["engine"] == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name, linewidth=3 if name == OURS else 1)
    axes.set(xlabel="tokens of context", ylabel="ms a token", xscale="log", yscale="log")
    contexts = sorted({r["ctx"] for r in rows})
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Prompts are its beginning; default: built in.")
@click.option("--ctx", default="256,2048,7900", show_default=True)
@click.option("--engines", default=",".join(ENGINES), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--worker", hidden=True)
@click.option("--output", default=Path(__file__).parent / "results" / "peers_cpu.json", type=click.Path(path_type=Path))
def main(
    model: str, text: Path | None, ctx: str, engines: str, rounds: int, threads: int, worker: str | None, output: Path
) -> None:
    """Measure, print, write."""
    contexts = [int(n) for n in ctx.split(",")]
    if worker is not None:
        work(worker, model, contexts[0], threads)
        return
    from skvq.calibrate.corpus import built_in_corpus
    from skvq.loaders.open import open_model

    _, tokenizer = open_model(model, dummy_weights=False, download=False)
    ids = tokenizer.encode(built_in_corpus() if text is None else text.read_text(), bos=True)
    assert len(ids) >= max(contexts), f"the text has {len(ids)} tokens"
    rows = [r for n in contexts for r in measure(engines.split(","), model, list(ids[:n]), threads, rounds)]
    found = {
        "question": "reading and writing beside other engines",
        "model": model,
        "threads": threads,
        **stamp(device_name(torch.device("cpu")), "torch", "numba", "transformers", "xllamacpp"),
        "results": rows,
        "ratios": ratios(rows),
    }
    write(output, found)
    plot(rows, output.with_suffix(".png"))
    print(table(rows), file=sys.stderr)
    for r in found["ratios"]:
        print(f"{r['ctx']:>6} tokens: decode {r['decode']:.2f}, prefill {r['prefill']:.2f} of {r['against']}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
