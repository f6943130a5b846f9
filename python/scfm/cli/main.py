"""Collects the verbs into one typer application."""

from __future__ import annotations

import typer

import scfm
from scfm.cli import (
    convert,
    demo,
    doctor,
    embed,
    export,
    generate,
    impute,
    inspect,
    map,
    plan,
    pretrain,
    tokenize,
    verify,
)

app = typer.Typer(
    name="scfm",
    help="One engine for single-cell foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    """One engine for single-cell foundation models: raw counts in, embeddings and trained models out.

    Exit codes: 0 done, 1 unexpected failure (verify: something is damaged or missing), 2 wrong usage,
    3 bad input (data, model or settings), 130 interrupted.
    """
    if version:
        typer.echo(scfm.__version__)
        raise typer.Exit


app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("tokenize")(tokenize.tokenize)
app.command("embed")(embed.embed)
app.command("verify")(verify.verify)
app.command("export")(export.export)
app.command("pretrain")(pretrain.pretrain)
app.command("plan")(plan.plan)
app.command("map")(map.map_cells)
app.command("generate")(generate.generate)
app.command("impute")(impute.impute)
