"""From a folder or a URL to a store of releases."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.local_storage import LocalStorage
from rectokens.artifacts.release_store import ReleaseStore


def open_release_store(
    location: str | Path, *, cache: Path | None = None, lock_timeout_s: float = 60.0
) -> ReleaseStore:
    """Open, or begin, a store.

    Args:
        location: a folder, or a URL that fsspec understands (``s3://bucket/prefix``).
        cache: local folder for what is downloaded; needed for a URL, not allowed for a folder.
        lock_timeout_s: how long to wait for other processes on a folder.

    Raises:
        ArtifactError: ``cache`` is missing or too much, an unknown protocol, or one whose driver
            is not installed.
    """
    text = str(location)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in ("", "file"):
        if cache is not None:
            raise ArtifactError(f"store {text} is a folder, which needs no cache; leave it out")
        folder = Path(url2pathname(urlsplit(text).path)) if scheme else Path(location)
        return ReleaseStore(LocalStorage(folder, lock_timeout_s=lock_timeout_s))
    if cache is None:
        raise ArtifactError(f"store {text} is not a folder; name a local folder as its cache")
    import fsspec

    from rectokens.artifacts.remote_storage import RemoteStorage

    try:
        filesystem, prefix = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise ArtifactError(f"store {text} cannot be opened: {error}") from error
    return ReleaseStore(RemoteStorage(filesystem, prefix, cache))
