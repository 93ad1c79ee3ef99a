"""``skvq needle``: a fact hidden at some depth of a long text, read through the real packed cache, then asked for.

Two scores, so that small models are informative too: whether greedy decoding gives the answer, and the log-probability and
rank of the answer's tokens against those of the same model over a 16-bit cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, OptionError, counted
from skvq.engine.generate import Engine
from skvq.engine.regions import Regions
from skvq.engine.stress import seeded
from skvq.loaders.text import first_tokens

NEEDLE = "The secret number of the harbour master is {answer}."
QUESTION = "\n\nQuestion: what is the secret number of the harbour master?\nAnswer: The secret number of the harbour master is"
ANSWER = "{number}"
EXTRA_TOKENS = 4
"""Tokens generated beyond the answer's length: a model may begin with a space or a quotation mark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """One place of the map. Log-probabilities are means over the answer's tokens, in nats; ranks the worst, 0 the best."""

    context: int
    depth: float
    answer: str
    text: str  # what greedy decoding gave
    retrieved: bool
    logprob: float
    rank: int
    packed: float | None  # share of the needle's tokens in packed pages when it is asked for; nothing is with method ``fp``
    beside: Beside | None  # where a 16-bit cache was asked too

    def line(self) -> str:
        """For people."""
        return (
            f"{self.context:>9,} tokens  depth {self.depth:5.1f} %  {'found' if self.retrieved else 'lost '}  "
            f"log-probability {self.logprob:7.3f}, worst rank {self.rank}{self.beside.line() if self.beside else ''}"
            f"{'' if self.packed in (None, 1) else f'   {self.packed:.0%} of it packed'}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        found = asdict(self)
        return found | (found.pop("beside") or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The same question over a 16-bit cache; KL is the mean over the answer's tokens, in nats."""

    logprob_fp: float
    rank_fp: int
    retrieved_fp: bool
    kl: float

    def line(self) -> str:
        """Added to a needle's."""
        return (
            f"   16-bit: {'found' if self.retrieved_fp else 'lost '} {self.logprob_fp:7.3f}, {self.rank_fp}   KL {self.kl:.4f}"
        )


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of token ids and the answer that should follow."""

    prompt: list[int]
    answer: list[int]
    needle: range  # where it is in the prompt


def ask(engine: Engine, haystack: Sequence[int], context: int, depth: float, number: int) -> Question:
    """A prompt that, with its answer, fills ``context`` tokens: the needle at ``depth`` per cent of the haystack."""
    encode = engine.parts.tokenizer.encode
    needle = encode(" " + NEEDLE.format(answer=number) + " ", bos=False)
    question = encode(QUESTION, bos=False)
    answer = encode(QUESTION + " " + ANSWER.format(number=number), bos=False)[len(question) :]
    first = encode("x", bos=True)[: -len(encode("x", bos=False))]
    room = context - len(first) - len(needle) - len(question) - len(answer) - EXTRA_TOKENS
    if room < 16 or not answer:
        regions = engine.parts.setup.regions
        packs = regions.window + regions.tile + len(answer) + EXTRA_TOKENS if engine.parts.cache.is_packed else 0
        least = max(context - room + 16, packs)
        raise OptionError(
            f"a context of {counted(context, 'token')} has no room for the needle and its question: use at least {least}"
        )
    hay = [haystack[i % len(haystack)] for i in range(room)]
    at = round(depth / 100 * room)
    start = len(first) + at
    return Question([*first, *hay[:at], *needle, *hay[at:], *question], answer, range(start, start + len(needle)))


def require_packed(regions: Regions, tokens: int, answer: int = 0) -> None:
    """Raise OptionError if of so many tokens nothing is packed when the ``answer``, so long, begins."""
    if not regions.packed(tokens):
        held = regions.window + regions.tile
        raise OptionError(
            f"of {tokens:,} tokens nothing is packed before the answer, for window and tile hold {held:,}: use a --ctx of at "
            f"least {held + answer:,}{'' if answer else ' and the answer'}"
        )


def packed_share(engine: Engine, question: Question) -> float | None:
    """Share of the needle's tokens in packed pages, sinks and window apart, when the answer begins. Raises OptionError if
    nothing is packed then, but for method ``fp``, which never packs."""
    if not engine.parts.cache.is_packed:
        return None
    regions, tokens = engine.parts.setup.regions, len(question.prompt)
    require_packed(regions, tokens, len(question.answer) + EXTRA_TOKENS)
    packed = regions.packed(tokens)
    return sum(regions.sinks <= place < packed for place in question.needle) / len(question.needle)


def answer_logits(engine: Engine, question: Question) -> tuple[str, Tensor]:
    """Read the prompt; the text greedy decoding gives, and logits float32 [N, V] before each of the answer's tokens."""
    with engine.prefill(question.prompt[:-1]) as sequence, sequence.fork() as twin:
        sampling = SamplingConfig(max_new_tokens=len(question.answer) + EXTRA_TOKENS)
        text = "".join(engine.stream(question.prompt[-1:], sampling, sequence=twin))
        tokens = [question.prompt[-1], *question.answer[:-1]]
        return text, torch.cat([engine.decode_step([sequence], [token]) for token in tokens])


def score(logits: Tensor, answer: Sequence[int]) -> tuple[float, int]:
    """Mean log-probability and worst rank of the answer's tokens."""
    ids = torch.tensor(answer, device=logits.device)[:, None]
    chosen = logits.gather(1, ids)
    return float(logits.log_softmax(-1).gather(1, ids).mean()), int((logits > chosen).sum(-1).max())


def needles(
    engine: Engine,
    reference: Engine | None,
    haystack: str,
    contexts: Sequence[int],
    depths: Sequence[float],
    *,
    seed: int,
    seen: Callable[[Needle], None],
) -> list[Needle]:
    """Ask at every context and depth, of ``reference``, over a 16-bit cache, too; ``seen`` gets each at once."""
    if not all(0 <= d <= 100 for d in depths):
        raise OptionError(f"depths are percentages from 0 to 100, got {', '.join(f'{d:g}' for d in depths)}")
    hay = first_tokens(engine.parts.tokenizer, haystack, max([0, *contexts]), bos=False)
    if not hay:
        raise OptionError("the haystack is empty: give a text file with some words in it")
    places = list(product(contexts, depths))
    numbers = torch.randint(10_000, 100_000, (len(places),), generator=seeded(seed)).tolist()
    for (context, depth), number in zip(places, numbers, strict=True):
        question = ask(engine, hay, context, depth, number)  # what has no room is refused before anything is read
        packed_share(engine, question)
    if len(hay) + len(question.needle) < max(contexts):
        engine.report.message(f"the haystack has {counted(len(hay), 'token')} and is repeated")
    found = []
    for (context, depth), number in zip(places, numbers, strict=True):
        question = ask(engine, hay, context, depth, number)
        text, logits = answer_logits(engine, question)
        logprob, rank = score(logits, question.answer)
        found.append(
            Needle(
                context=context,
                depth=depth,
                answer=str(number),
                text=text,
                retrieved=holds(text, number),
                logprob=logprob,
                rank=rank,
                packed=packed_share(engine, question),
                beside=None if reference is None else _beside(reference, question, logits, number),
            )
        )
        seen(found[-1])
    return found


def holds(text: str, number: int) -> bool:
    """Whether a text holds a number, not one of which it is a part.

    >>> holds("It is 46044.", 46044), holds("460444", 46044)
    (True, False)
    """
    return re.search(rf"(?<!\d){number}(?!\d)", text) is not None


def _beside(engine: Engine, question: Question, packed: Tensor, number: int) -> Beside:
    text, logits = answer_logits(engine, question)
    logprob, rank = score(logits, question.answer)
    p, q = (t.log_softmax(-1) for t in (logits, packed))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Beside(logprob_fp=logprob, rank_fp=rank, retrieved_fp=holds(text, number), kl=kl)


def reference_of(engine: Engine) -> Engine | None:
    """A second engine, over a 16-bit cache; None, with a message that says so, if memory is too small for it."""
    try:
        return engine.with_cache(replace(engine.parts.cache, method="fp"), max_sequences=2)
    except CapacityError as error:
        engine.report.message(f"no comparison with a 16-bit cache: {error}")
        return None


def total(found: Sequence[Needle]) -> str:
    """How many were found, for people."""
    exact = [n.beside.retrieved_fp for n in found if n.beside]
    beside = f", by the 16-bit cache {sum(exact)} of {len(exact)}" if exact else ""
    return f"found {sum(n.retrieved for n in found)} of {len(found)}{beside}"


def summary(found: Sequence[Needle]) -> dict[str, Any]:
    """Shares and means over the map, and every point of it."""
    rows = [n.as_dict() for n in found]
    names: list[str] = [n for n in ("retrieved", "logprob", "retrieved_fp", "logprob_fp", "kl") if n in rows[0]]
    means: dict[str, Any] = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    return {**means, "results": rows}
