"""Drawing the next token from logits: repetition penalty, grammar, temperature, top-k, top-p, min-p, in that order."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skvq.engine.config import SamplingConfig
from skvq.engine.errors import broken_model
from skvq.engine.grammar import Grammar

FEW_TOKENS = (256, 4096)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was drawn, its natural log probability, and those of the likeliest tokens at its place, likeliest first."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Sampler:
    """One sequence's draws. What is drawn at a position follows from the seed and the position: a batch draws what its singles
    would, and an answer in two parts what it would in one."""

    def __init__(
        self,
        config: SamplingConfig,
        prompt_ids: list[int],
        vocab_size: int,
        device: torch.device,
        grammar: Grammar | None = None,
    ) -> None:
        self.config, self._grammar = config, grammar
        self._seed = secrets.randbits(64) if config.seed is None else config.seed % 2**64
        self._penalizes = config.repeat_penalty != 1
        self._seen = torch.zeros(vocab_size if self._penalizes else 0, dtype=torch.bool, device=device)
        if self._penalizes:
            self._seen[torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True

    def choose(self, logits: Tensor, position: int, after: Sequence[int] = ()) -> Tensor:
        """The largest of ``logits`` float32 [V] and the token drawn at a position, float64 [2], then what ``told_of`` tells,
        if the configuration asks for it; a GPU is not waited for.

        ``after``: tokens since the last that was taken, if they are taken too.
        """
        config, given = self.config, logits
        if self._penalizes:
            penalized = torch.where(logits > 0, logits / config.repeat_penalty, logits * config.repeat_penalty)
            seen = self._seen.clone() if after else self._seen
            for token in after:
                seen[token : token + 1] = True  # a slice is filled; for one place a GPU would be waited for
            logits = torch.where(seen, penalized, logits)
        if self._grammar is not None:
            logits = torch.where(self._grammar.allowed(after), logits, -torch.inf)
        likeliest, token_of = logits.max(-1)
        if config.temperature > 0:  # the largest is subtracted first, so that no temperature makes an infinity of it
            weights, tokens = candidates((logits - likeliest) / max(config.temperature, 1e-30), config)
            sums = weights.cumsum(0, dtype=torch.float64)
            drawn = torch.searchsorted(sums, sums[-1:] * uniform_at(self._seed, position))
            drawn = drawn.clamp_max(len(sums) - 1)  # where logits are no numbers
            token_of = (drawn if tokens is None else tokens[drawn])[0]
        choice = torch.stack((likeliest.double(), token_of.double()))
        return choice if config.logprobs is None else torch.cat((choice, told_of(given, token_of, config.logprobs)))

    def take(self, largest: float, number: float) -> int:
        """The token that ``choose`` has chosen. Raises ModelError if the logits are not numbers; also as ``Grammar.take``."""
        if not math.isfinite(largest):
            raise broken_model(f"the largest of the model's logits is {largest}")
        token = int(number)
        if self._penalizes:
            self._seen[token : token + 1] = True
        if self._grammar is not None:
            self._grammar.take(token)
        return token


def told_of(logits: Tensor, token: Tensor, count: int) -> Tensor:
    """Log probability of a token among ``logits`` [V], then the ids of the ``count`` likeliest and theirs, float64 [1 + 2
    count]."""
    scores = logits.log_softmax(-1)
    likeliest = scores.topk(min(count, len(scores)))
    return torch.cat((scores.gather(0, token.view(1)).double(), likeliest.indices.double(), likeliest.values.double()))


def as_logprob(token: int, told: Sequence[float]) -> TokenLogprob:
    """What ``told_of`` tells of a token, on the host."""
    count = len(told) // 2
    return TokenLogprob(token, told[0], tuple(zip(map(int, told[1 : 1 + count]), told[1 + count :], strict=True)))


def uniform_at(seed: int, position: int) -> float:
    """A number between 0 and 1, neither included, for one draw: the same for every device."""
    bits = int(np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0]) >> 12
    return (bits + 0.5) * 2.0**-52


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """What may be drawn of ``logits`` [V], the largest of which is 0: weights [C], zero for what top_k, top_p or min_p drop,
    and the tokens [C] whose they are, the likeliest first; None for the tokens of the vocabulary.

    top_p keeps the fewest likeliest tokens whose probability sums to at least top_p (arXiv 1904.09751); min_p keeps tokens at
    least min_p as likely as the likeliest (arXiv 2407.01082).
    """
    tokens: Tensor | None = None
    if 0 < config.top_k < len(logits):
        logits, tokens = logits.topk(config.top_k)
    weights = logits.exp()
    if config.top_p < 1:
        needed = weights.sum(dtype=torch.float64) * config.top_p
        if tokens is None:
            weights, tokens = likeliest_of(weights, needed)
        sums = weights.cumsum(0, dtype=torch.float64)
        unlikely = sums - weights >= needed
        unlikely[:1] = False  # a top_p below float32 is 0 here
        weights = weights.masked_fill(unlikely, 0)
    if config.min_p > 0:
        weights = weights.masked_fill(weights < config.min_p, 0)  # the likeliest weighs 1
    return weights, tokens


def likeliest_of(weights: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """At least the likeliest tokens whose weights sum to ``needed``: their weights and ids, in order. On a CPU some are looked
    for first, for to sort a vocabulary takes as long as a decode step; a GPU would be waited for to know that they suffice."""
    if weights.device.type == "cpu":
        for count in FEW_TOKENS:
            if count < len(weights):
                most, tokens = weights.topk(count)
                found = most.sum(dtype=torch.float64)
                if bool(found >= needed):
                    return most, tokens
                if bool(found < needed / 4):  # so flat that more of them will not do
                    break
    ordered = weights.sort(descending=True)
    return ordered.values, ordered.indices


class StopStrings:
    """Holds back text that may be the beginning of a stop string; what it lets through never contains one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that may be shown now. Once a stop string is complete ``stopped`` is set and nothing more comes."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text with which ``stop`` begins."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
