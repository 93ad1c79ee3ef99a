"""The command line: text to frozen configs to one call. Results on stdout, everything else on stderr.

Exit 0 good, 2 for what a user can mend (one line: what, with the numbers, what to do), 130 interrupted; never a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from skvq import __version__
from skvq.calibrate.run import built_in_corpus
from skvq.engine.bench import SPARE, Bench
from skvq.engine.bench import bench_attention as bench_of_attention
from skvq.engine.bench import bench_decode as bench_of_decode
from skvq.engine.bench import bench_prefill as bench_of_prefill
from skvq.engine.cache import CacheSetup, SequenceCache
from skvq.engine.calibration import BUILT_IN
from skvq.engine.config import BITS, FULL_SPAN, METHODS, CacheConfig, ModelConfig, SamplingConfig
from skvq.engine.errors import OptionError, SkvqError
from skvq.engine.filters import AttentionSinks, rule_from_text
from skvq.engine.generate import PREFILLS, Engine
from skvq.engine.identity import bits_text
from skvq.engine.machine import find_backend, pick_device, pick_dtype
from skvq.engine.needle import Needle, needles, reference_of
from skvq.engine.needle import summary as needle_summary
from skvq.engine.overflow import MODES
from skvq.engine.plan_report import plan_report
from skvq.engine.planted import planted, require_found
from skvq.engine.planted import rows as found_rows
from skvq.engine.plots import depth_plot, heat_map, require_matplotlib
from skvq.engine.report import StderrReporter
from skvq.engine.soak import soak
from skvq.engine.stress import bare_setup
from skvq.loaders import config_of

F = TypeVar("F", bound=Callable[..., Any])


class OneLineGroup(click.Group):
    """A group whose errors are one line each."""

    def main(self, *args: Any, **options: Any) -> Any:
        sys.exit(run_command(lambda: super(OneLineGroup, self).main(*args, **{**options, "standalone_mode": False})))


class OneLineCommand(click.Command):
    """A command whose errors are one line each, when it is run on its own."""

    def main(self, *args: Any, **options: Any) -> Any:
        sys.exit(run_command(lambda: super(OneLineCommand, self).main(*args, **{**options, "standalone_mode": False})))


def run_command(call: Callable[[], Any]) -> int:
    """Exit code of a command; what a user can mend becomes one line on stderr."""
    try:
        call()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        click.echo(f"skvq: error: {' '.join(error.format_message().split())}", err=True)
        return 2
    except SkvqError as error:
        click.echo(f"skvq: error: {error}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("skvq: interrupted", err=True)
        return 130
    return 0


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _bits(context: click.Context, parameter: click.Parameter, value: str) -> float:
    known = [f"{b:g}" for b in BITS]
    if value not in known:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(known)}")
    return float(value)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,50,100") from None


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    numbers = _numbers(context, parameter, value.replace("_", ""))
    if any(n != int(n) or n < 1 for n in numbers):
        raise click.BadParameter(f"{value!r} is not a list of token counts such as 4096,32768")
    return [int(n) for n in numbers]


model_option = click.option("--model", "-m", required=True, help="Alias (see `skvq models`), folder, .gguf file or org/name.")
ctx_option = click.option(
    "--ctx", type=click.IntRange(min=1), help="Tokens of context to make room for; default: the trained length."
)
ctxs_option = click.option(
    "--ctx", callback=_counts, default="4096", show_default=True, help="Tokens of context, as 4096,32768."
)
place_options = _stack(
    click.option("--calibration", type=click.Path(path_type=Path), help="File made by `skvq calibrate`."),
    click.option("--backend", default="auto", show_default=True, help="auto, triton, numba, reference, or a plug-in's name."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16, bfloat16."),
    click.option("--prefill", type=click.Choice(PREFILLS), default="exact", show_default=True, help="How prompts are read."),
    click.option("--rope-scaling", help="KIND:FACTOR to go past the trained length: linear:4, dynamic:4, yarn:4."),
    click.option("--dummy-weights", is_flag=True, help="Random weights of the model's shape: no download, no sense."),
    click.option("--no-download", is_flag=True, help="Use only what is on this machine."),
)
engine_options = _stack(ctx_option, place_options)
cache_options = _stack(
    click.option("--method", type=click.Choice(METHODS), default="rotate", show_default=True, help="How the cache is packed."),
    click.option("--key-bits", callback=_bits, default="2", show_default=True, help="1.5, 2, 3, 4 or 8."),
    click.option("--value-bits", callback=_bits, default="2", show_default=True, help="1.5, 2, 3, 4 or 8."),
    click.option(
        "--bits-budget",
        type=float,
        help="In place of both: most bits per number on average, metadata counted; bits are then chosen by layer, keys and "
        "values apart.",
    ),
    click.option("--group-size", type=int, default=64, show_default=True, help="Channels that share a scale: 32, 64, 128."),
    click.option("--window", type=int, default=128, show_default=True, help="Most recent tokens kept in 16 bits."),
    click.option("--sinks", type=int, default=5, show_default=True, help="First tokens kept in 16 bits."),
    click.option(
        "--filter", "filters", multiple=True, help="More rules: key-outliers, heavy-hitters(budget=32), pkg.mod:Class."
    ),
)
sampling_options = _stack(
    click.option("-n", "--max-new-tokens", type=int, default=256, show_default=True, help="Tokens to write at most."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-p", type=float, default=1.0, show_default=True),
    click.option("--top-k", type=int, default=0, show_default=True),
    click.option("--min-p", type=float, default=0.0, show_default=True),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
    click.option("--ignore-eos", is_flag=True, help="Go on to the limit whatever the model says."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Last line of stdout is one JSON object.")

CACHE_NAMES = ("method", "key_bits", "value_bits", "bits_budget", "group_size", "window", "sinks", "filters")
SAMPLING_NAMES = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip


def _take(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names}


def cache_config(options: dict[str, Any]) -> CacheConfig:
    """The cache that ``cache_options`` describe; takes them out of ``options``."""
    taken = _take(options, CACHE_NAMES)
    rules = (AttentionSinks(taken.pop("sinks")), *map(rule_from_text, taken.pop("filters")))
    return CacheConfig(**taken, filters=rules)


def load_engine(options: dict[str, Any], cache: CacheConfig, *, max_sequences: int = 1, on_full: str = "stop") -> Engine:
    """The engine that ``model_option`` and ``engine_options`` describe."""
    return Engine.load(
        options["model"],
        max_context=options["ctx"],
        max_sequences=max_sequences,
        cache=cache,
        backend=options["backend"],
        device=options["device"],
        dtype=options["dtype"],
        calibration=options["calibration"],
        dummy_weights=options["dummy_weights"],
        rope_scaling=options["rope_scaling"],
        prefill=options["prefill"],
        on_full=on_full,
        download=not options["no_download"],
    )


def read_text(prompt: str | None, file: str | None) -> str:
    """The text given by -p, -f FILE or -f - (both: the file, then the prompt)."""
    if prompt is None and file is None:
        raise OptionError("no text: give -p TEXT, -f FILE, or -f - for standard input")
    parts = [] if file is None else [_file_text(file)]
    text = "\n\n".join(parts + ([] if prompt is None else [prompt]))
    if not text.strip():
        raise OptionError("the prompt is empty: give some text with -p or -f")
    return text


def _file_text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is not UTF-8 text (byte {error.start:,}): convert it first") from None


@click.group(cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skvq")
def main() -> None:
    """Read very long contexts with an LLM on one GPU: the KV cache is packed at 1.5 to 4 bits."""


@main.command(cls=OneLineCommand)
@model_option
@click.option("-p", "--prompt", help="Text to continue or, with --chat, to answer.")
@click.option("-f", "--file", help="File with the text, - for standard input; -p comes after it.")
@click.option("--chat", is_flag=True, help="Use the model's chat format.")
@click.option("--system", help="System message, with --chat.")
@click.option("--session", type=click.Path(path_type=Path), help="Go on from this file if it exists; write it at the end.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Keep a half-read prompt here; go on from it if it exists.")
@click.option(
    "--on-full",
    type=click.Choice(list(MODES)),
    default="stop",
    show_default=True,
    help="When the context is full: end, or drop the oldest packed pages behind the sinks and go on.",
)
@click.option("--fill", type=click.IntRange(min=0), default=0, help="Random tokens put into the cache before the text.")
@engine_options
@cache_options
@sampling_options
@json_option
def run(**options: Any) -> None:
    """Read a text and go on from it."""
    session: Path | None = options["session"]
    goes_on = session is not None and session.exists()
    silent = options["prompt"] is None and options["file"] is None and (goes_on or options["fill"])
    text = "" if silent else read_text(options["prompt"], options["file"])
    sampling = SamplingConfig(**_take(options, SAMPLING_NAMES))
    engine = load_engine(options, cache_config(options), on_full=options["on_full"])
    sequence = engine.restore(session) if session is not None and goes_on else engine.new_sequence()
    if options["fill"]:
        engine.fill(sequence, options["fill"], seed=sampling.seed)
    prompt = run_prompt(engine, text, options, sequence)
    pieces = []
    for piece in engine.stream(prompt, sampling, sequence=sequence, checkpoint=options["checkpoint"]):
        pieces.append(piece)
        if not options["as_json"]:
            click.echo(piece, nl=False)
    if not options["as_json"]:
        click.echo()
    if session is not None:
        sequence.save(session)
    summary = engine.summary(sequence)
    click.echo(f"skvq: {summary.line()}", err=True)
    if options["as_json"]:
        click.echo(json.dumps({"text": "".join(pieces), **summary.as_dict()}))


def run_prompt(engine: Engine, text: str, options: dict[str, Any], sequence: SequenceCache) -> str | list[int]:
    """What ``skvq run`` reads next: the text, in the chat format if asked for; a sequence goes on without a second BOS.

    With no text a restored session goes on from its last token, and a filled cache from one token.
    """
    tokenizer = engine.parts.tokenizer
    if not text:
        return "" if sequence.pending else [tokenizer.bos_token_id or 0]
    if not options["chat"]:
        return text
    system = [] if options["system"] is None else [{"role": "system", "content": options["system"]}]
    ids = list(tokenizer.encode_chat([*system, {"role": "user", "content": text}]))
    return ids[1:] if sequence.length and ids[:1] == [tokenizer.bos_token_id] else ids


@main.command(cls=OneLineCommand)
@model_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the calibration goes.")
@click.option("--text", help="Text file to calibrate on; default: reference prose that comes with Python.")
@click.option("--tokens", type=click.IntRange(min=32), default=16384, show_default=True, help="Tokens of it to use.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@engine_options
@cache_options
def calibrate(**options: Any) -> None:
    """Make a calibration file: the transform, groups, units and clip factors for a model and cache options."""
    output, text = options["output"], options["text"]
    cache = cache_config(options)
    corpus = built_in_corpus() if text is None else _file_text(text)
    engine = load_engine({**options, "ctx": options["ctx"] or 2048}, replace(cache, method="fp"))
    header = engine.calibrate(
        cache, corpus, output, corpus_name=BUILT_IN if text is None else text, tokens=options["tokens"], seed=options["seed"]
    )
    chosen = "" if header.bits_budget is None else f"; bits by layer: {bits_text(header.layer_bits)}"
    click.echo(f"skvq: wrote {output} ({header.method}, {header.tokens:,} tokens of {header.corpus}{chosen})", err=True)


@main.command("eval", cls=OneLineCommand)
@model_option
@click.option("--text", help="Text file to score; default: reference prose that comes with Python.")
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens of the text to score.")
@click.option("--stride", type=click.IntRange(min=2), help="Score stretches of this many tokens, each on its own.")
@click.option("--methods", help="Several caches in one pass, as rotate,reorder,plain,fp; with bits as rotate:2:1.5.")
@click.option("--by-position", is_flag=True, help="Also the error by depth.")
@click.option("--plot", type=click.Path(path_type=Path), help="Error by depth as PNG (extra: plot).")
@click.option("--exact-window", is_flag=True, help="A window of exactly W tokens, as papers simulate, not whole tiles.")
@engine_options
@cache_options
@json_option
def evaluate(**options: Any) -> None:
    """Measure a cache against the 16-bit one: perplexity, KL divergence in nats per token, top-1 agreement."""
    if options["plot"] is not None:
        require_matplotlib()
    cache = cache_config(options)
    caches = [cache] if options["methods"] is None else [_variant(cache, part) for part in options["methods"].split(",")]
    text = built_in_corpus() if options["text"] is None else _file_text(options["text"])
    stride = min(options["stride"] or options["tokens"], options["tokens"])
    engine = load_engine({**options, "ctx": stride, "calibration": None}, replace(cache, method="fp"))
    rows = engine.evaluate(
        text,
        caches,
        tokens=options["tokens"],
        stride=stride,
        calibration=options["calibration"],
        exact_window=options["exact_window"],
    )
    for row in rows:
        click.echo(_eval_line(row), err=options["as_json"])
        if options["by_position"]:
            for part in row["by_position"]:
                line = f"    {part['first']:>7,} - {part['last']:>7,}   KL {part['kl']:.4f}   top-1 {part['top1']:.3f}"
                click.echo(line, err=options["as_json"])
    if options["plot"] is not None:
        depth_plot(
            rows, [_cache_name(row) for row in rows], f"{options['model']}, {rows[0]['tokens']:,} tokens", options["plot"]
        )
        click.echo(f"skvq: wrote {options['plot']}", err=True)
    if options["as_json"]:
        shown = [{k: v for k, v in r.items() if options["by_position"] or k != "by_position"} for r in rows]
        click.echo(json.dumps(shown[0] if options["methods"] is None else {"results": shown}))


def _variant(cache: CacheConfig, text: str) -> CacheConfig:
    """A cache from ``method[:key bits:value bits]``."""
    name, *bits = text.strip().split(":")
    try:
        widths = [float(b) for b in bits]
    except ValueError:
        raise OptionError(f"--methods: {text!r} is not method or method:key_bits:value_bits") from None
    if len(widths) not in (0, 2):
        raise OptionError(f"--methods: {text!r} is not method or method:key_bits:value_bits")
    chosen = replace(cache, method=name)
    return chosen if not widths else chosen.with_bits(*widths)


def _cache_name(row: dict[str, Any]) -> str:
    bits = f"K{row['key_bits']:g}V{row['value_bits']:g}" if row["bits_budget"] is None else f"budget {row['bits_budget']:g}"
    return str(row["method"]) if row["method"] == "fp" else f"{row['method']} {bits}"


def _eval_line(row: dict[str, Any]) -> str:
    return (
        f"{_cache_name(row):16}  {row['bits_per_element']:5.2f} bits   ppl {row['ppl']:.3f} (16-bit {row['ppl_fp']:.3f})   "
        f"KL {row['kl']:.4f}   top-1 {row['top1']:.3f}   {row['tokens']:,} tokens"
    )


@main.command(cls=OneLineCommand)
@model_option
@click.option("--ctx", type=click.IntRange(min=1), required=True, help="Tokens of context.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences alive at once.")
@click.option("--memory", help="Memory to fit, as 80GiB; default: the device's.")
@click.option("--device", default="auto", show_default=True, help="a100, h100, h200, 4090, or auto for this machine.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: what the device would use.")
@click.option("--prefill", type=click.Choice(PREFILLS), default="exact", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="With --bits-budget: exact for the bits this file chose.")
@cache_options
@json_option
def plan(**options: Any) -> None:
    """What a run would take, from the model's shape alone: bytes by part, the largest context at each width."""
    cache = cache_config(options)
    report = plan_report(
        options["model"],
        cache,
        context=options["ctx"],
        sequences=options["sequences"],
        memory=options["memory"],
        device=options["device"],
        dtype=options["dtype"],
        prefill=options["prefill"],
        calibration=options["calibration"],
    )
    click.echo(json.dumps(report.as_dict()) if options["as_json"] else report.table())
    report.plan.check()


@main.command(cls=OneLineCommand)
@model_option
@click.option("--haystack", help="Text file to hide the needle in; default: reference prose that comes with Python.")
@click.option("--depths", callback=_numbers, default="0,25,50,75,100", show_default=True, help="Per cent of text before it.")
@click.option("--no-reference", is_flag=True, help="Do not ask the same over a 16-bit cache.")
@click.option("--plot", type=click.Path(path_type=Path), help="Heat map as PNG (extra: plot).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the numbers that are hidden.")
@ctxs_option
@place_options
@cache_options
@json_option
def needle(**options: Any) -> None:
    """Hide a fact at several depths of texts of several lengths, and ask for it through the packed cache."""
    contexts, plot = options["ctx"], options["plot"]
    if plot is not None:
        require_matplotlib()
    haystack = built_in_corpus() if options["haystack"] is None else _file_text(options["haystack"])
    engine = load_engine({**options, "ctx": max(contexts)}, cache_config(dict(options)), max_sequences=2)
    references = [] if options["no_reference"] else reference_of(engine)

    def seen(one: Needle) -> None:
        click.echo(one.line(), err=options["as_json"])

    found = needles(engine, references, haystack, contexts, options["depths"], seed=options["seed"], seen=seen)
    if plot is not None:
        cache = engine.parts.cache
        title = f"{options['model']}, {cache.method} K{cache.key_bits:g}V{cache.value_bits:g}"
        heat_map([n.as_dict() for n in found], title, plot)
        click.echo(f"skvq: wrote {plot}", err=True)
    if options["as_json"]:
        click.echo(json.dumps({"model": options["model"], **needle_summary(found)}))


@main.group(cls=OneLineGroup)
def bench() -> None:
    """Measure and stress the cache."""


@bench.command("soak", cls=OneLineCommand)
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Random operations.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="numba, reference, or a plug-in's name.")
@json_option
def bench_soak(steps: int, seed: int, backend: str, as_json: bool) -> None:
    """Append, fork, truncate, save, restore and free at random; check every invariant after each step."""
    result = soak(steps, seed, find_backend(backend, pick_device("cpu")), StderrReporter())
    operations = ", ".join(f"{count:,} {name}" for name, count in result["operations"].items())
    click.echo(f"{steps:,} steps of seed {seed}, nothing lost: {operations}; {result['seconds']:.1f} s", err=as_json)
    if as_json:
        click.echo(json.dumps(result))


bench_options = _stack(
    click.option("--model", "-m", help="Alias, folder, .gguf file or org/name, with its weights."),
    click.option("--shape", help="The same with random weights: only its config is read."),
    ctxs_option,
    place_options,
    cache_options,
    json_option,
)


def _bench_model(options: dict[str, Any]) -> str:
    """The name given with --model or --shape; the latter means random weights."""
    if (options["model"] is None) == (options["shape"] is None):
        raise OptionError("give either --model (real weights) or --shape (random weights)")
    options["dummy_weights"] = options["dummy_weights"] or options["shape"] is not None
    options["model"] = options["model"] or options["shape"]
    return str(options["model"])


def _show_bench(measured: Bench, options: dict[str, Any]) -> None:
    as_json, rows = options["as_json"], []
    click.echo(measured.ceiling(), err=as_json)
    for row in measured.rows:
        click.echo(row.line(), err=as_json)
        rows.append(row)
    if as_json:
        told = {key: options[key] for key in ("model", "dummy_weights", *CACHE_NAMES[:5])}
        click.echo(json.dumps({**told, "version": __version__, **measured.as_dict(rows)}))


@bench.command("decode", cls=OneLineCommand)
@bench_options
@click.option("--attention-only", is_flag=True, help="No weights, no step: only attention over the cache.")
@click.option("--layers", type=click.IntRange(min=1), help="With --attention-only: layers to fill; default: the model's.")
def bench_decode(**options: Any) -> None:
    """Time of a decode step, and of its attention, at each length of context."""
    name, contexts = _bench_model(options), options["ctx"]
    if options["attention_only"]:
        setup, config = _bare(name, options, max(contexts))
        _show_bench(bench_of_attention(setup, config, contexts, StderrReporter()), options)
        return
    if options["layers"] is not None:
        raise OptionError("--layers goes with --attention-only: a model has the layers it has")
    engine = load_engine({**options, "ctx": max(contexts) + SPARE}, cache_config(dict(options)))
    _show_bench(bench_of_decode(engine, contexts), options)


@bench.command("prefill", cls=OneLineCommand)
@bench_options
def bench_prefill(**options: Any) -> None:
    """Time to read a prompt, and of its attention, at each length."""
    _bench_model(options)
    engine = load_engine({**options, "ctx": max(options["ctx"])}, cache_config(dict(options)))
    _show_bench(bench_of_prefill(engine, options["ctx"]), options)


def _bare(shape: str, options: dict[str, Any], context: int) -> tuple[CacheSetup, ModelConfig]:
    """A cache without weights, of a shape and perhaps fewer layers."""
    device = pick_device(options["device"])
    config = config_of(shape)
    layers = options["layers"] or config.num_layers
    config = replace(config, num_layers=layers, attention_spans=(FULL_SPAN,) * layers)
    backend, dtype = find_backend(options["backend"], device), pick_dtype(options["dtype"], device)
    cache = cache_config(dict(options))
    setup = bare_setup(config, cache, max_context=context, max_sequences=1, backend=backend, dtype=dtype, device=device)
    return setup, config


@bench.command("planted", cls=OneLineCommand)
@click.option("--shape", default="smollm2-135m", show_default=True, help="Alias, folder or file: only its config is read.")
@ctxs_option
@click.option("--depths", callback=_numbers, default="0,25,50,75,100", show_default=True, help="Per cent of the context.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers to fill; default: the model's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="auto, triton, numba, reference, or a plug-in's name.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16, bfloat16.")
@cache_options
@json_option
def bench_planted(**options: Any) -> None:
    """Plant keys at chosen depths of a random cache: attention must find them, the answer is known."""
    device = pick_device(options["device"])
    found = []
    for context in options["ctx"]:
        setup, config = _bare(options["shape"], options, context)
        some = planted(setup, config.num_heads, context, options["depths"], seed=options["seed"], report=StderrReporter())
        for one in some:
            click.echo(one.line(), err=options["as_json"])
        found += some
    if options["as_json"]:
        click.echo(
            json.dumps(
                {"device": str(device), "backend": find_backend(options["backend"], device).name, "results": found_rows(found)}
            )
        )
    require_found(found)


@main.command(cls=OneLineCommand)
@json_option
def models(as_json: bool) -> None:
    """List the aliases and what is on disk."""
    from skvq.loaders import list_models

    rows = list_models()
    if as_json:
        click.echo(json.dumps({"models": [{**_row(r), "path": None if r.path is None else str(r.path)} for r in rows]}))
        return
    width = max(len(r.alias) for r in rows)
    for r in rows:
        place = r.path if r.path is not None else "not on this machine"
        click.echo(f"{r.alias:{width}}  {r.parameters / 1e9:5.2f}B  {r.trained_context:>9,} tokens  {r.origin}  ({place})")


def _row(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("alias", "origin", "parameters", "trained_context")}


if __name__ == "__main__":
    main()
