"""What a user may give as a prompt, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from torch import Tensor

from skvq.engine.errors import OptionError
from skvq.loaders.chat import ALWAYS_GIVEN
from skvq.loaders.text import Tokenizer

Ids = Sequence[int] | Tensor | npt.NDArray[np.integer[Any]]
"""Token ids of one text."""

Prompt = str | Ids | Sequence[Mapping[str, Any]]
"""A text, token ids of one text, or chat messages ``[{"role": ..., "content": ...}, ...]``."""


class ChatIds(list[int]):
    """Token ids of chat messages: an answer to them is a text of its own, that to others goes on from what it answers."""


def template_kwargs_of(given: object) -> dict[str, Any]:
    """What a user gives to chat templates. Raises OptionError if it is no mapping of names, or sets what they always get."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise OptionError(f"chat_template_kwargs must be names and values, such as {{'enable_thinking': False}}, got {given!r}")
    if taken := [name for name in given if name in ALWAYS_GIVEN]:
        raise OptionError(f"chat_template_kwargs cannot set {', '.join(taken)}: every chat template is given that")
    return dict(given)


def is_empty(prompt: Prompt) -> bool:
    """Whether there is nothing in it."""
    if isinstance(prompt, (Tensor, np.ndarray)):
        return tuple(prompt.shape) == (0,)
    return isinstance(prompt, (str, list, tuple)) and not prompt


def is_several(prompts: object) -> TypeGuard[list[Prompt]]:
    """Whether it is a list of prompts, not one: token ids and chat messages are lists too."""
    return isinstance(prompts, (list, tuple)) and not (prompts and isinstance(prompts[0], (Integral, Mapping)))


def is_chat(prompt: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether it is a list of chat messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def token_ids_of(prompt: Prompt, tokenizer: Tokenizer, *, bos: bool) -> list[int]:
    """Token ids of a prompt. Raises OptionError if it is none.

    Those of a text begin with the tokenizer's BOS if ``bos``; without, those of chat messages begin with the end of the
    assistant's turn that went before.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt, bos=bos))
    if is_chat(prompt):
        return ChatIds(tokenizer.encode_chat(prompt) if bos else tokenizer.encode_turn(prompt))
    return whole_ids(prompt)


def whole_ids(prompt: object) -> list[int]:
    """Token ids in whatever sequence they come. Raises OptionError if it holds anything else."""
    if isinstance(prompt, (Tensor, np.ndarray)):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        raise OptionError(f"token ids are needed, got the text {prompt[:40]!r}: Engine.encode gives its ids")
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise OptionError(f"a prompt must be a text, token ids or chat messages, not {type(prompt).__name__}")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise OptionError(f"the token ids of a prompt must be whole numbers, got {str(token)[:80]!r}")
    return (ChatIds if isinstance(prompt, ChatIds) else list)(int(token) for token in prompt)
