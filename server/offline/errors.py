"""What stops an offline run."""

from __future__ import annotations


class OfflineError(ValueError):
    """A run that cannot be begun or continued; the message is all an operator needs."""
