"""Log probabilities of a text's tokens, from its last hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.engine.model import Model
from skvq.engine.pieces import Pieces

ROWS, LOGITS_BYTES = 256, 16 << 20
"""Positions whose logits are held at once, at most, and bytes of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """Log probabilities float32 after each token of a text: of the one that follows it [N - 1], and of the K likeliest [N, K],
    whose ids are int64 [N, K]."""

    following: Tensor
    likeliest: Tensor
    ids: Tensor


def likelihoods_of(model: Model, hidden: Tensor, ids: Tensor, count: int) -> Pieces[Likelihoods]:
    """Those of a text from its last hidden states [N, d]; ``count`` likeliest. A piece is some rows of logits."""
    found = []
    for rows, following in scored(model, hidden, ids):
        found.append((following, *rows.topk(count)))
        yield
    following, values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Likelihoods(following=following, likeliest=values, ids=indices)


def nll_of(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood float32 [N - 1] of each next token."""
    parts = [-following for _, following in scored(model, hidden[:-1], ids)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def scored(model: Model, hidden: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of some rows of a text's hidden states after others: log probabilities [R, V] of what follows, and of what did."""
    count = max(1, min(ROWS, LOGITS_BYTES // (4 * model.config.vocab_size)))
    for start in range(0, len(hidden), count):
        rows = model.head(hidden[start : start + count]).log_softmax(-1)
        target = ids[start + 1 : start + len(rows) + 1, None]
        yield rows, rows[: len(target)].gather(1, target)[:, 0]
