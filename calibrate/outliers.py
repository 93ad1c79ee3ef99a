"""Tokens whose keys stand out wherever they occur: sinks that do not sit at the start (KVSink, arXiv 2508.04257)."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.calibrate.stats import first_of
from skvq.engine.filters import KeyOutliers, stands_out

THRESHOLD = KeyOutliers().threshold
"""Robust deviations from the median key norm, as the filter rule ``key-outliers`` counts them."""

LEAST_SEEN, LEAST_LAYERS = 3, 0.25
"""Occurrences of a token in the corpus, and share of the layers it stands out in, from which it is named."""


class OutlierTokens:
    """Counts which token ids have outlying keys in most places they occur: layer by layer, text by text, each text on its own.

    Holds three numbers for each id that occurs.
    """

    def __init__(self, texts: Tensor) -> None:
        """``texts`` int64 [S, T], on the CPU: what will be seen of every layer."""
        self._first = first_of(texts.shape[1])
        self._ids, self._seen = texts[:, self._first :].unique(return_counts=True)  # type: ignore[no-untyped-call]
        self._layers = 0
        self._count, self._outlying = torch.zeros_like(self._seen), torch.zeros_like(self._seen)

    def see(self, text: Tensor, key_norms: Tensor) -> None:
        """One text of the layer: ids int64 [T] and the norm of each token's keys, mean over kv heads, [T]."""
        out = stands_out(key_norms[None, self._first :].cpu(), THRESHOLD)[0]
        self._count.index_add_(0, torch.searchsorted(self._ids, text[self._first :]), out.long())

    def advance(self) -> None:
        """All texts of a layer have been seen: note the ids that stood out in it."""
        self._outlying += 2 * self._count > self._seen
        self._count.zero_()
        self._layers += 1

    def found(self) -> tuple[int, ...]:
        """Ids that stand out in enough layers, rising."""
        named = (self._outlying >= max(1.0, LEAST_LAYERS * self._layers)) & (self._seen >= LEAST_SEEN)
        return tuple(self._ids[named].tolist())
