"""What a model is calibrated on when no text is given."""

from __future__ import annotations

import pydoc_data.topics

BUILT_IN = "pydoc_data.topics"
"""Its name in a calibration's header: the module of Python that it comes from."""


def built_in_corpus() -> str:
    """466 KB of English reference prose that Python itself ships: nothing is downloaded."""
    return "\n\n".join(pydoc_data.topics.topics.values())
