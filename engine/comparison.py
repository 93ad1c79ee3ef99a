"""How far a cache is from the 16-bit one on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skvq.engine.config import CacheConfig
from skvq.engine.errors import ModelError
from skvq.engine.likelihoods import scored
from skvq.engine.model import Model
from skvq.engine.model_config import ModelConfig
from skvq.engine.sizes import bits_per_element

DEPTHS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A cache against the 16-bit one on the same text. KL in nats per token; all per position, length N - 1 or N."""

    nll_fp: Tensor
    nll: Tensor
    kl: Tensor
    same_top: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """Those of several stretches as one."""
        return cls(
            nll_fp=torch.cat([part.nll_fp for part in parts]),
            nll=torch.cat([part.nll for part in parts]),
            kl=torch.cat([part.kl for part in parts]),
            same_top=torch.cat([part.same_top for part in parts]),
        )

    def summary(self) -> dict[str, float]:
        """Perplexities, mean KL and top-1 agreement."""
        return {
            "ppl_fp": perplexity(self.nll_fp),
            "ppl": perplexity(self.nll),
            "kl": float(self.kl.mean()),
            "top1": float(self.same_top.float().mean()),
        }


def perplexity(nll: Tensor) -> float:
    """exp of the mean loss. Raises ModelError where no number is so large: nothing was modelled then."""
    mean = float(nll.mean())
    if not mean < 700:
        raise ModelError(f"the mean loss is {mean:,.0f} nats per token: the weights are damaged, or made up")
    return math.exp(mean)


def compare(model: Model, reference: Tensor, other: Tensor, ids: Tensor) -> Comparison:
    """Compare last hidden states [N, d] of two caches over the same ids [N], some rows of logits at a time."""
    parts: list[tuple[Tensor, ...]] = []
    for (p, chosen), (q, chosen_q) in zip(*(scored(model, x, ids) for x in (reference, other)), strict=True):
        parts.append((-chosen, -chosen_q, (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)))
    nll_fp, nll, kl, same = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Comparison(nll_fp=nll_fp, nll=nll, kl=kl, same_top=same)


def evaluation_row(cache: CacheConfig, model: ModelConfig, found: Sequence[Comparison]) -> dict[str, Any]:
    """One cache's figures over several stretches of text; key_bits and value_bits are means over layers and heads."""
    whole = Comparison.joined(found)
    key_bits, value_bits = cache.mean_bits(model)
    return {
        "name": cache.name,
        "method": cache.method,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "bits_budget": cache.bits_budget if cache.is_packed else None,
        "layer_bits": cache.layer_bits,
        "group_size": cache.group_size,
        "window": cache.window,
        "bits_per_element": bits_per_element(cache, model),
        **whole.summary(),
        "tokens": len(whole.kl),
        "by_position": error_by_position(found),
    }


def error_by_position(found: Sequence[Comparison]) -> list[dict[str, float]]:
    """Mean KL and top-1 agreement by depth, in DEPTHS equal parts, of the stretches that have the first one's length."""
    whole = [c for c in found if len(c.kl) == len(found[0].kl)]
    kl = torch.stack([c.kl for c in whole]).mean(0)
    same = torch.stack([c.same_top.float() for c in whole]).mean(0)
    edges = [round(i * len(kl) / DEPTHS) for i in range(DEPTHS + 1)]
    return [
        {"first": a, "last": b - 1, "kl": float(kl[a:b].mean()), "top1": float(same[a:b].mean())}
        for a, b in pairwise(edges)
        if b > a
    ]
