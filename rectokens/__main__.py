"""The offline command line: ``python -m rectokens``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        import polars  # noqa: F401
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"error: the command line needs {error.name}; install the extra: "
            "pip install 'rectokens[catalog]'"
        )
    from rectokens.cli.app import run

    run()


if __name__ == "__main__":
    main()
