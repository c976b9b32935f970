"""The command line: ``hhattn info``, ``masks``, ``generate``, ``evaluate`` and ``words``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hhattn.info import info
from hhattn.masks import calibrate_cli
from hhattn.masks import cli as masks_cli

app = typer.Typer(
    help="Attention kernels for long videos, and the video pipeline built on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
masks_cli.app.command("calibrate")(calibrate_cli.command)
app.add_typer(masks_cli.app, name="masks")


@app.callback()
def main() -> None:
    """Attention kernels for long videos, and the video pipeline built on them."""


@app.command("info")
def show_info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What runs on this machine, and why the rest doesn't."""
    report = info()
    typer.echo(json.dumps(report, indent=2) if as_json else str(report))


# What follows needs the video extra, so its module is imported, and its options read, only when it is asked for.
_LATER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _video(name: str, args: list[str]) -> None:
    """Run the command ``name`` of hhattn.video.cli, or say in one line what is not installed."""
    try:
        from hhattn.video import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hhattn":
            raise
        typer.echo(f"hhattn {name} needs {error.name}, which is not installed: pip install 'hhattn[video]'", err=True)
        raise typer.Exit(2) from None
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(getattr(cli, name))
    command(args=args, prog_name=f"hhattn {name}")


@app.command(context_settings=_LATER, add_help_option=False)
def generate(ctx: typer.Context) -> None:
    """Generate a video from words (hhattn generate --help)."""
    _video("generate", ctx.args)


@app.command(context_settings=_LATER, add_help_option=False)
def evaluate(ctx: typer.Context) -> None:
    """Measure generated clips against the world, along their length (hhattn evaluate --help)."""
    _video("evaluate", ctx.args)


@app.command(context_settings=_LATER, add_help_option=False)
def words(ctx: typer.Context) -> None:
    """List the words that a prompt may use."""
    _video("words", ctx.args)


if __name__ == "__main__":
    app()
