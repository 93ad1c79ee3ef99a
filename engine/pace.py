"""How long the remaining work will take, from how long its parts have taken so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RIDGE = 1e-3
"""Weight of the guess that all kinds of work are equally fast, against what was seen: it counts while that says little."""

SPREAD = 20.0
"""No kind is taken to be more than so many times slower or faster than all work so far."""


class Pace:
    """Work of several kinds, each at a speed of its own: seconds a unit are fitted by least squares to the parts done.

    Units should be such that the kinds would be equally fast if nothing were known, as multiply-adds are.
    """

    def __init__(self, total: Sequence[float]) -> None:
        self._total = np.array(total, dtype=float)
        self._done = np.zeros(len(total))
        self._products = np.zeros((len(total), len(total)))  # sum of work x work
        self._seconds = np.zeros(len(total))  # sum of work x seconds
        self._then = 0.0

    def advance(self, work: Sequence[float], elapsed: float) -> None:
        """A part of the work is done, ``elapsed`` seconds after the beginning of all."""
        part = np.array(work, dtype=float)
        self._done += part
        self._products += np.outer(part, part)
        self._seconds += part * (elapsed - self._then)
        self._then = elapsed

    def share(self, elapsed: float) -> float:
        """The part of the whole time that has passed: elapsed / (elapsed + seconds to go), 0..1."""
        left = np.maximum(self._total - self._done, 0)
        speed = self._seconds_per_unit(elapsed)
        done = float(speed @ self._done)
        return done / (done + float(speed @ left)) if done else 0.0

    def _seconds_per_unit(self, elapsed: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The cost of each kind of work, up to a factor: only their ratio matters."""
        mean = max(elapsed, 1e-9) / max(float(self._done.sum()), 1e-300)
        ridge = RIDGE * float(np.trace(self._products)) * np.eye(len(self._done))
        wrong = self._seconds - self._products @ np.full(len(self._done), mean)
        try:
            found = mean + np.linalg.solve(self._products + ridge, wrong)
        except np.linalg.LinAlgError:  # nothing done yet
            found = np.full(len(self._done), mean)
        return np.clip(found, mean / SPREAD, mean * SPREAD)
