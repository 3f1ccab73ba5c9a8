"""The commands, gathered."""

from __future__ import annotations

import typer

from rectokens.cli.build_catalog import build_catalog_command
from rectokens.cli.encode import encode_command
from rectokens.cli.errors import exit_on_sigterm, one_message
from rectokens.cli.fit import fit_command
from rectokens.cli.inspect import inspect_command

app = typer.Typer(
    name="rectokens",
    help="From item embeddings to a catalog that a generative retriever can search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain messages: scripts read them.
    rich_markup_mode=None,
)
app.command("fit")(one_message(fit_command))
app.command("encode")(one_message(encode_command))
app.command("build-catalog")(one_message(build_catalog_command))
app.command("inspect")(one_message(inspect_command))


def run() -> None:
    """Run the command line of this process."""
    exit_on_sigterm()
    app(prog_name="rectokens")
