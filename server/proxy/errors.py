"""Why the proxy cannot start."""

from __future__ import annotations


class ProxyError(ValueError):
    """A proxy that cannot be started; the message is all an operator needs."""
