"""Hidden states between two layers: in a temporary file, so that memory holds only one text's, however long the corpus is."""

from __future__ import annotations

import tempfile
from types import TracebackType

import torch
from torch import Tensor

from skvq.engine.errors import CalibrationError


class HiddenStates:
    """Hidden states [T, d] of S texts in an unnamed file of S T d numbers in the folder for temporary files (TMPDIR).

    A context manager: the file is gone when it is left. Raises CalibrationError where the file cannot be written.
    """

    def __init__(self, texts: int, tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = (tokens, size), dtype, device
        self._nbytes = tokens * size * dtype.itemsize
        self._total = texts * self._nbytes
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise self._no_room(error) from error

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __getitem__(self, text: int) -> Tensor:
        """[T, d], on the device; a copy."""
        found = torch.empty(self._shape, dtype=self._dtype)
        left = found.view(torch.uint8).numpy().data.cast("B")
        self._file.seek(text * self._nbytes)
        while left:
            count = self._file.readinto(left)
            assert count, f"text {text} was never written"
            left = left[count:]
        return found.to(self._device)

    def __setitem__(self, text: int, hidden: Tensor) -> None:
        assert hidden.shape == self._shape and hidden.dtype == self._dtype, (
            hidden.shape,
            hidden.dtype,
            self._shape,
            self._dtype,
        )
        left = hidden.contiguous().cpu().view(torch.uint8).numpy().data.cast("B")
        self._file.seek(text * self._nbytes)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> CalibrationError:
        return CalibrationError(
            f"cannot write {self._total:,} bytes of hidden states to the folder for temporary files ({error.strerror}): free "
            "some space, set TMPDIR, or calibrate on fewer tokens"
        )
