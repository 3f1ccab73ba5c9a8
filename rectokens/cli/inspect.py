"""``rectokens inspect``: what an artifact is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rectokens.cli.summary import summarize

_BLOCKS = " ▁▂▃▄▅▆▇█"


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Artifact folder of any kind.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check checksums and every invariant.")
    ] = False,
) -> None:
    """Show an artifact's manifest, figures and quality report."""
    summary = summarize(folder, verify=verify)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        render(summary, Console())


def render(summary: dict[str, Any], console: Console) -> None:
    """Print a summary for people."""
    console.print(f"[bold]{summary['kind']} {summary['version']}[/bold]  {summary['created']}")
    state = "checksums and content verified" if summary["verified"] else "sizes verified"
    console.print(f"{escape(summary['path'])}  ({state})")
    _print_table(console, "files", {n: f"{f['size']:,} bytes" for n, f in summary["files"].items()})
    for kind, parent in summary["parents"].items():
        console.print(
            f"made from {kind} {parent['version'] or '(unversioned)'}, "
            f"fingerprint {parent['fingerprint']}"
        )
    _print_table(console, "numbers", summary["numbers"])
    for name, value in summary["details"].items():
        if name == "levels":
            _print_levels(console, value)
        elif isinstance(value, dict):
            _print_table(console, name, {k: v for k, v in value.items() if not _by_level(v)})
            _print_by_level(console, {k: v for k, v in value.items() if _by_level(v)})
        else:
            console.print(f"{name}: {escape(str(value))}")


def sparkline(counts: list[int]) -> str:
    """One character a count, its height in proportion to the largest; only 0 is blank."""
    top = max(counts, default=0)
    if top == 0:
        return " " * len(counts)
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // top)] for count in counts)


def _print_table(console: Console, title: str, values: dict[str, Any]) -> None:
    if not values:
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in values.items():
        table.add_row(escape(name), escape(_shown(value)))
    console.print(table)


def _print_levels(console: Console, levels: list[dict[str, Any]]) -> None:
    table = Table(title="code use", title_justify="left", box=None)
    for heading in ("level", "used", "entropy (bits)", "perplexity", "items by code"):
        table.add_column(heading)
    for number, level in enumerate(levels):
        table.add_row(
            str(number),
            f"{level['codes_used']} of {level['codes']}",
            f"{level['entropy_bits']:.2f}",
            f"{level['perplexity']:.1f}",
            sparkline(level["histogram"]),
        )
    console.print(table)


def _by_level(value: Any) -> bool:
    """Whether a figure of a report is a list with a number for each level."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(one is None or isinstance(one, (int, float)) for one in value)
    )


def _print_by_level(console: Console, figures: dict[str, list[float]]) -> None:
    if not figures:
        return
    table = Table(title="by level", title_justify="left", box=None)
    for heading in ("", *map(str, range(max(map(len, figures.values()))))):
        table.add_column(heading)
    for name, values in figures.items():
        table.add_row(escape(name), *map(_shown, values))
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."
