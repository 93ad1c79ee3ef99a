"""``skvq models``: the aliases, and which models are on disk."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from skvq.commands.errors import OneLineCommand
from skvq.commands.options import json_option


@click.command(cls=OneLineCommand)
@json_option
def models(as_json: bool) -> None:
    """List the model aliases and which models are on disk."""
    from skvq.loaders.hub import list_models

    rows = list_models()
    if as_json:
        click.echo(json.dumps({"models": [{**asdict(r), "path": None if r.path is None else str(r.path)} for r in rows]}))
        return
    width = max(len(r.alias) for r in rows)
    for r in rows:
        place = r.path if r.path is not None else "not on this machine"
        click.echo(f"{r.alias:{width}}  {r.parameters / 1e9:5.2f}B  {r.trained_context:>9,} tokens  {r.origin}  ({place})")
