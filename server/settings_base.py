"""What all groups of settings have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SettingsGroup(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, protected_namespaces=(), frozen=True
    )


def can_be_sent(key: str) -> bool:
    """Whether a header can carry the key: printable ASCII, without blanks."""
    return key.isascii() and key.isprintable() and " " not in key


def split_commas(value: object) -> object:
    """What stands between commas, as a flag or a variable has it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
