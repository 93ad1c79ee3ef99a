"""Plots of what was measured, with matplotlib if it is installed: the needle's heat map, error by depth."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from skvq.engine.errors import OptionError
from skvq.loaders.files import require_writable, write_atomically

WIDE = 20.0
"""Ratio of errors from which on a plot shows them by their logarithm."""
FORMATS = (".png", ".pdf", ".svg")


def require_plot(path: Path) -> None:
    """Raise SkvqError, before any work is done, if matplotlib is missing or can write no such file."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("--plot needs matplotlib: pip install 'skvq[plot]', or leave --plot out") from None
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    require_writable(path)


def heat_map(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG: log-probability of the answer by context and depth, and against the 16-bit cache where that was measured.

    ``rows`` as ``Needle.as_dict`` gives them; places are marked where the answer was not retrieved, and by which. Raises
    OptionError.
    """
    require_plot(path)
    from matplotlib.figure import Figure

    contexts, depths = (sorted({row[name] for row in rows}) for name in ("context", "depth"))
    compared = all("logprob_fp" in row for row in rows)
    panels = [("log-probability of the answer, nats per token", "viridis", [float(row["logprob"]) for row in rows])]
    if compared:
        panels.append(
            ("minus that of the 16-bit cache, nats per token", "RdBu", [row["logprob"] - row["logprob_fp"] for row in rows])
        )
    figure = Figure(
        figsize=(2.4 + (1.6 + 0.5 * len(contexts)) * 1.6 * len(panels), 1.6 + 0.5 * len(depths)), layout="constrained"
    )
    figure.suptitle(_printable(title))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, colours, values) in zip(axes, panels, strict=True):
        grid = [[float("nan")] * len(contexts) for _ in depths]
        for row, value in zip(rows, values, strict=True):
            grid[depths.index(row["depth"])][contexts.index(row["context"])] = value
        most = max(0.1, *map(abs, values))
        limits = {"vmin": -most, "vmax": most} if colours == "RdBu" else {"vmin": -max(5.0, most), "vmax": 0.0}
        image = axis.imshow(grid, cmap=colours, aspect="auto", **limits)
        for row, value in zip(rows, values, strict=True):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            shown = f"{value:.2f}".replace("-0.00", "0.00") + _lost(row)
            place = contexts.index(row["context"]), depths.index(row["depth"])
            axis.text(*place, shown, ha="center", va="center", fontsize="x-small", color="white" if dark else "black")
        axis.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts])
        axis.set_yticks(range(len(depths)), [f"{d:g} %" for d in depths])
        axis.set_xlabel("tokens of context")
        axis.set_title(label, fontsize="small")
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("depth of the needle")
    _write(figure, path)


def _lost(row: dict[str, Any]) -> str:
    """What a needle's place is marked with."""
    if row["retrieved"]:
        return "" if row.get("retrieved_fp", True) else "\n16-bit lost"
    return "\n× lost" if row.get("retrieved_fp", True) else "\nboth lost"


def depth_plot(rows: Sequence[dict[str, Any]], names: Sequence[str], title: str, path: Path) -> None:
    """Write a PNG: KL by position in the text, a line for each row of ``Engine.evaluate``. Raises OptionError."""
    require_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row, name in zip(rows, names, strict=True):
        parts = row["by_position"]
        axes.plot([(p["first"] + p["last"]) / 2 for p in parts], [p["kl"] for p in parts], "o-", label=name)
    axes.set(title=_printable(title), xlabel="position in the text, tokens", ylabel="KL from the 16-bit cache, nats per token")
    errors = [part["kl"] for row in rows for part in row["by_position"] if part["kl"] > 0]
    if errors and max(errors) > WIDE * min(errors):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _write(figure, path)


def shown_name(model: str) -> str:
    """Of a model in a folder or file its own name: a title has little room."""
    return Path(model).name if len(model) > 40 else model


def _printable(text: str) -> str:
    """What of a path is not UTF-8 is no letter."""
    return text.encode("utf-8", "replace").decode()


def _write(figure: Any, path: Path) -> None:
    drawn = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name with letters that the font lacks
        figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=150)
    write_atomically(path, drawn.getvalue())
