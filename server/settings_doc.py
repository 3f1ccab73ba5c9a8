"""``docs/settings.md``, written from the settings; a test keeps the file up to date."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from server.flags import allowed_values, shown_default
from server.settings import SettingField, group_help, setting_fields

_HEAD = """# Settings

<!-- Written by `python -m server settings-doc > docs/settings.md`; do not edit. -->

Every setting is an environment variable and a flag of `python -m server serve`. A flag wins over
the environment. A `RECTOKENS_` variable that is not listed here, or a value that is not allowed,
stops the start with a message. (`RECTOKENS_DATA_DIR` is for the tests and the demo; the service
ignores it.)
"""


def settings_markdown() -> str:
    """The page."""
    parts = [_HEAD]
    for group, fields in groupby(setting_fields(), key=lambda field: field.group):
        parts.append(f"## {group or 'What is served, and where'}\n")
        if group:
            parts.append(f"{group_help(group)}\n")
        parts.append("| variable | flag | default | allowed | |\n| --- | --- | --- | --- | --- |")
        parts.append("\n".join(_row(field) for field in fields) + "\n")
    return "\n".join(parts)


def _row(field: SettingField) -> str:
    cells = (
        f"`{field.env}`",
        f"`{field.flag}`",
        f"`{shown_default(field)}`",
        _allowed(field),
        field.help,
    )
    return "| " + " | ".join(cells) + " |"


def _allowed(field: SettingField) -> str:
    choices = allowed_values(field)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if field.info.annotation is bool:
        return "`true`, `false`"
    bounds: list[str] = []
    for constraint in field.info.metadata:
        bounds += [
            f"{sign} {_number(getattr(constraint, name))}"
            for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if getattr(constraint, name, None) is not None
        ]
    return ", ".join(bounds)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
