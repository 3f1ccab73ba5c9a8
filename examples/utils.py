"""What every script with a configuration file does first: read it."""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import gin

_UNKNOWN_PARAMETER = re.compile(
    r"Configurable '(?P<configurable>[^']+)' doesn't have a parameter named '(?P<name>[^']+)'"
)
_UNKNOWN_CONFIGURABLE = re.compile(
    r"No configurable matching (?:reference )?'@?(?P<name>[^'()]+)(?:\(\))?'"
)
# What gin says of a call without a parameter that it needs, and adds to any error in a call.
_MISSING = "Required bindings for"
_GIN_NOTE = "\n  In call to configurable"
_PLACE = re.compile(r'In file "(?P<file>[^"]+)", line (?P<line>\d+)')


class ConfigError(ValueError):
    """A configuration file that cannot be read, or names something that does not exist."""


def parse_config(argv: Sequence[str] | None = None) -> Path:
    """Read the path of a gin file from the command line, and load the file.

    A bad file ends the program: exit code 2 and one message that says what was found and what
    exists.

    Args:
        argv: arguments after the program's name; None takes the program's own.

    Returns:
        The path.
    """
    parser = argparse.ArgumentParser(description=_description())
    parser.add_argument("config", type=Path, help="gin file with the parameters of this script")
    path: Path = parser.parse_args(argv).config
    try:
        load_config(path)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    return path


def load_config(path: Path) -> None:
    """Load a gin file in place of whatever was loaded before.

    Raises:
        ConfigError: no such file, no gin, or a function or parameter that does not exist; of
            the last the message names near misses.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file; give a gin file, such as those of examples/configs")
    gin.clear_config()
    try:
        gin.parse_config_file(str(path))
    except (ValueError, SyntaxError, OSError, ImportError, tokenize.TokenError) as error:
        _explain(path, error)


def run(entry: Callable[[], object], argv: Sequence[str] | None = None) -> None:
    """Configure a script from its command line, and do what it does.

    What a user can mend (a parameter, a file, a full disk) ends the program with exit code 1 and
    one message; anything else is a fault of the program and shows where it happened.
    """
    parse_config(argv)
    program = Path(sys.argv[0]).stem
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        message = str(error)
        if not message.startswith(_MISSING):
            raise
    else:
        return
    sys.exit(f"{program}: error: {message.split(_GIN_NOTE)[0]}")


def _explain(path: Path, error: Exception) -> NoReturn:
    text = str(error)
    place = _PLACE.search(text)
    where = f"{place['file']} line {place['line']}" if place else str(path)
    if match := _UNKNOWN_PARAMETER.search(text):
        name, configurable = match["name"], match["configurable"]
        target = gin.get_configurable(configurable)
        # Of a class, gin's own signature says nothing.
        what = target.__init__ if inspect.isclass(target) else target
        known = [known for known in inspect.signature(what).parameters if known != "self"]
        raise ConfigError(
            f"{where}: {configurable!r} has no parameter {name!r}{_hint(name, known)}"
        ) from error
    if match := _UNKNOWN_CONFIGURABLE.search(text):
        name = match["name"]
        raise ConfigError(
            f"{where}: there is nothing named {name!r} to configure{_hint(name, _configurables())}"
        ) from error
    raise ConfigError(f"{where}: {text}") from error


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; there are {', '.join(sorted(known))}"


def _configurables() -> list[str]:
    """Names of what this program lets one configure; gin's own helpers are left out."""
    registered = getattr(gin.config, "_REGISTRY", None)
    entries = registered.items() if registered is not None else ()
    return sorted({path.rsplit(".", 1)[-1] for path, _ in entries if not path.startswith("gin.")})


def _description() -> str | None:
    main = sys.modules.get("__main__")
    return inspect.getdoc(main) if main is not None else None
