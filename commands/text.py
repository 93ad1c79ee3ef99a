"""The text given to a command: as an option, from a file, or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.errors import OptionError


def read_text(prompt: str | None, files: Sequence[str]) -> str:
    """The text given by -p, -f FILE or -f - (if both: the files in order, then the prompt)."""
    if prompt is None and not files:
        raise OptionError("no text given: use -p TEXT, -f FILE, or -f - for standard input")
    text = joined(*map(file_text, files), "" if prompt is None else argument_text(prompt))
    if not text.strip():
        raise OptionError("the prompt is empty: give some text with -p or -f")
    return text


def joined(*texts: str) -> str:
    """Texts that are not empty, a blank line between them."""
    return "\n\n".join(text for text in texts if text)


def questions() -> Iterator[str]:
    """Lines of standard input that are not blank, until its end or, where somebody types them, Ctrl-C."""
    if sys.stdin is None:
        raise OptionError("--interactive: standard input is closed")
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history)
    ask = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(ask)
        except (EOFError, KeyboardInterrupt):
            if ask:
                print()  # what follows begins a line of its own
            return
        except UnicodeDecodeError:
            raise OptionError("standard input is not UTF-8 text: convert it first") from None
        if line.strip():
            yield argument_text(line, "standard input")


def argument_text(argument: str, name: str = "the text of -p") -> str:
    """The text of an argument, or of a line. In a locale without UTF-8 Python holds its bytes as surrogates: they are decoded
    here."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise OptionError(f"{name} is not UTF-8 text: convert it first") from None


def corpus_text(file: str | None) -> str:
    """The text of a file; without one, Python's bundled documentation."""
    return built_in_corpus() if file is None else file_text(file)


def file_text(file: str) -> str:
    """The text of a file, without a byte order mark; - is standard input. OptionError if it cannot be read or is not UTF-8."""
    if file == "-" and sys.stdin is None:
        raise OptionError("the text is to come from standard input, which is closed")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise OptionError(f"cannot read {file or repr(file)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        name = "standard input" if file == "-" else file
        raise OptionError(f"{name} is not UTF-8 text (byte {error.start:,}): convert it first") from None
