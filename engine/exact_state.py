"""Where an exact prefill stands between two chunks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ExactState:
    """Where an exact prefill of T tokens stands: all layers before ``layer`` are packed; in it ``chunk`` chunks of head
    group ``group`` are done, and all of the groups before that.

    With one group the layer's output replaces its input chunk by chunk. With G > 1 groups the input stays until the last is
    done; what heads have read is kept separately.
    """

    hidden: Tensor  # [T, d], on the device or the host
    attended: Tensor  # [G, T, H D / G], in addition to hidden; G = 0 where all heads are done at once
    keys: Tensor  # [KH / G, T, D], of this group
    values: Tensor  # [KH / G, T, D]
    mass: Tensor  # float32 [T], of this layer
    chunk_tokens: int
    layer: int = 0
    group: int = 0
    chunk: int = 0

    @property
    def attended_rows(self) -> Tensor:
        """The part of ``attended`` that is done, [rows, H D / G]."""
        return self.attended.flatten(0, 1)[: self.group * len(self.hidden) + self.filled]

    @property
    def filled(self) -> int:
        """Tokens of this layer whose keys and values, for this group, have been computed."""
        return min(self.chunk * self.chunk_tokens, len(self.hidden))

    def next_layer(self) -> None:
        """This layer is packed."""
        self.mass.zero_()
        self.layer, self.group, self.chunk = self.layer + 1, 0, 0
