"""Every setting as a command line flag: typer options made from the settings themselves.

And how commands end that were given wrong ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer

from server.settings import SettingField, Settings, SettingsError, load_settings, setting_fields

USAGE_ERROR = 2


def fail(message: str, code: int) -> NoReturn:
    """End with one message on stderr."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def settings_or_exit(flags: dict[str, Any]) -> Settings:
    """The settings, or one message and exit code 2."""
    try:
        return load_settings(flags)
    except SettingsError as error:
        fail(str(error), USAGE_ERROR)


def with_setting_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a typer command a flag for every setting; see :func:`setting_flags`."""
    return setting_flags(dict.fromkeys(setting_fields(), ()))(command)


def setting_flags(
    fields: Mapping[SettingField, Sequence[str]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a typer command flags for some settings.

    Args:
        fields: the settings, and further names of their flags without dashes in front.

    Returns:
        A decorator for a command that takes the keyword ``flags``: dotted setting name to what
        was typed (a string, or a bool for a switch), None for flags that were not given. Its
        other parameters stay options of their own.

    Values are left as typed, so that one place, ``load_settings``, checks and explains them.
    """
    return lambda command: _with_flags(command, fields)


def proxy_fields() -> dict[SettingField, Sequence[str]]:
    """Settings that the proxy heeds as a process of its own; ``--proxy.name`` is ``--name`` too."""
    shared = {"model", "catalog", "host", "port", "log_level", "drain_timeout_s", "tracing"}
    shared |= {"store.path", "store.cache", "store.poll_s", "limits.body_timeout_s"}
    fields: dict[SettingField, Sequence[str]] = {}
    for field in setting_fields():
        if field.group == "proxy":
            fields[field] = (field.flag.removeprefix("--proxy."),)
        elif field.path in shared or field.group in ("http", "access"):
            fields[field] = ()
    return fields


def job_fields() -> dict[SettingField, Sequence[str]]:
    """Settings that jobs heed; ``--store.path`` is ``--store`` too."""
    groups = ("store", "jobs", "admin")
    return {
        field: ("store",) if field.path == "store.path" else ()
        for field in setting_fields()
        if field.path == "log_level" or field.group in groups
    }


def _with_flags(
    command: Callable[..., Any], fields: Mapping[SettingField, Sequence[str]]
) -> Callable[..., Any]:
    names = {field.path.replace(".", "__"): field for field in fields}

    @functools.wraps(command)
    def with_flags(**options: Any) -> Any:
        flags = {field.path: options.pop(name) for name, field in names.items()}
        return command(flags=flags, **options)

    own = [
        parameter.replace(annotation=_resolved(command)[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
        if parameter.name != "flags"
    ]
    generated = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(field, fields[field]),
        )
        for name, field in names.items()
    ]
    with_flags.__signature__ = inspect.Signature([*own, *generated])  # type: ignore[attr-defined]
    # typer reads both the signature and the annotations.
    with_flags.__annotations__ = {p.name: p.annotation for p in (*own, *generated)}
    return with_flags


def shown_default(field: SettingField) -> str:
    """The default as a user would type it."""
    default = field.default
    if default is None or default == ():
        return "unset"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)


def allowed_values(field: SettingField) -> tuple[str, ...]:
    """The choices of a setting that has them, else nothing."""
    return tuple(str(v) for v in get_args(field.info.annotation) if isinstance(v, str))


def _annotation(field: SettingField, aliases: Sequence[str]) -> Any:
    switch = field.info.annotation is bool
    names = [field.flag, *(f"--{alias}" for alias in aliases)]
    option = typer.Option(
        *(f"{name}/{_negated(name)}" if switch else name for name in names),
        help=_help(field),
        show_default=False,
        metavar=None if switch else _metavar(field),
    )
    return Annotated[bool | None if switch else str | None, option]


def _negated(flag: str) -> str:
    """``--group.no-name`` of ``--group.name``."""
    group, _, name = flag.removeprefix("--").rpartition(".")
    return f"--{group}.no-{name}" if group else f"--no-{name}"


def _metavar(field: SettingField) -> str:
    if get_origin(field.info.annotation) is tuple:
        return "TEXT"
    if field.path.endswith("_file"):
        return "FILE"
    types = {field.info.annotation, *get_args(field.info.annotation)}
    for kind, metavar in ((Path, "DIR"), (int, "INT"), (float, "NUM")):
        if kind in types:
            return metavar
    return "TEXT"


def _help(field: SettingField) -> str:
    choices = allowed_values(field)
    one_of = f" One of {', '.join(choices)}." if choices else ""
    return f"{field.help}{one_of} [default: {shown_default(field)}]"


def _resolved(command: Callable[..., Any]) -> dict[str, Any]:
    return inspect.get_annotations(command, eval_str=True)
