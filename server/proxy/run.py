"""The proxy as a process of its own."""

from __future__ import annotations

from pathlib import Path

from rectokens.artifacts.errors import ArtifactError
from server.jobs.places import open_store
from server.logs import configure_logging
from server.proxy.app import create_proxy_app
from server.proxy.errors import ProxyError
from server.proxy.service import load_proxy
from server.run import listen, serve_app
from server.settings import Settings


def run_proxy(settings: Settings) -> int:
    """Serve until a signal; listens once the tokenizer and the embeddings are there.

    Returns:
        Exit code 0.

    Raises:
        ProxyError: the upstream's URL, the model or the catalog cannot be used.
        ListenError: the address is taken or not ours.
        SettingsError: the file of API keys cannot be used.
    """
    configure_logging(settings.log_level)
    proxy = load_proxy(settings, *_model_and_catalog(settings))
    listener = listen(settings.host, settings.port)
    app = create_proxy_app(settings, proxy)
    serve_app(app, settings, listener, proxy.drain, proxy.metrics)
    return 0


def _model_and_catalog(settings: Settings) -> tuple[Path | None, Path | None]:
    """Those of the store's active release, where a store is named."""
    if settings.store.path is None:
        return settings.model, settings.catalog
    try:
        release = open_store(settings).open_active()
    except (ArtifactError, OSError) as error:
        raise ProxyError(str(error)) from error
    if release is None:
        raise ProxyError(f"no release is active in the store {settings.store.path}")
    return release.model_path, release.catalog_path
