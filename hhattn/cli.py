"""The command line: ``hhattn info`` and ``hhattn generate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hhattn.info import info

app = typer.Typer(
    help="Attention kernels for long videos, and the video pipeline built on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Attention kernels for long videos, and the video pipeline built on them."""


@app.command("info")
def show_info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What runs on this machine, and why the rest doesn't."""
    report = info()
    typer.echo(json.dumps(report, indent=2) if as_json else str(report))


# `generate` needs the video extra, so its module is imported, and its options read, only when it is asked for.
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def generate(ctx: typer.Context) -> None:
    """Generate a video from words (hhattn generate --help)."""
    try:
        from hhattn.video import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hhattn":
            raise
        typer.echo(f"hhattn generate needs {error.name}, which is not installed: pip install 'hhattn[video]'", err=True)
        raise typer.Exit(2) from None
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(cli.generate)
    command(args=ctx.args, prog_name="hhattn generate")


if __name__ == "__main__":
    app()
