"""The proxy as a process of its own."""

from __future__ import annotations

from contextlib import nullcontext

from rectokens.artifacts.errors import ArtifactError
from server.jobs.places import open_store
from server.logs import configure_logging
from server.proxy.app import create_proxy_app
from server.proxy.errors import ProxyError
from server.proxy.following import ProxyFollower
from server.proxy.service import load_proxy
from server.run import listen, serve_app
from server.settings import Settings


def run_proxy(settings: Settings) -> int:
    """Serve until a signal; listens once the tokenizer and the embeddings are there.

    With a store, what is active in it, and what becomes active.

    Returns:
        Exit code 0.

    Raises:
        ProxyError: the upstream's URL, the model or the catalog cannot be used.
        ListenError: the address is taken or not ours.
        SettingsError: the file of API keys cannot be used.
    """
    configure_logging(settings.log_level)
    follower = None
    if settings.store.path is None:
        proxy = load_proxy(settings, settings.model, settings.catalog)
    else:
        try:
            follower = ProxyFollower(settings, open_store(settings))
        except (ArtifactError, OSError) as error:
            raise ProxyError(str(error)) from error
        proxy = load_proxy(settings, *follower.first())
    listener = listen(settings.host, settings.port)
    app = create_proxy_app(settings, proxy)
    with nullcontext() if follower is None else follower.following(proxy):
        serve_app(app, settings, listener, proxy.drain, proxy.metrics)
    return 0
