"""Where artifacts lie below one root folder: ``<root>/<kind>s/<version>/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import ARTIFACT_KINDS, ArtifactKind, is_version


@dataclass(frozen=True, slots=True)
class ArtifactStore:
    """A folder with tokenizers, models, catalogs and releases.

    Attributes:
        root: holds ``tokenizers/``, ``models/``, ``catalogs/`` and ``releases/``, each a folder
            of version folders.
    """

    root: Path

    def folder(self, kind: ArtifactKind) -> Path:
        """Folder of all versions of a kind; it need not exist.

        Raises:
            ArtifactError: unknown kind.
        """
        return self.root / kind_folder(kind)

    def path(self, kind: ArtifactKind, version: str) -> Path:
        """Folder of one version; it need not exist.

        Raises:
            ArtifactError: unknown kind, or a version that has not the form of one. Versions may
                come from a request, so nothing else ever becomes part of a path.
        """
        if not is_version(version):
            raise ArtifactError(
                f"{kind} version is {version!r}; expected 16 lower-case hexadecimal digits"
            )
        return self.folder(kind) / version

    def versions(self, kind: ArtifactKind) -> list[str]:
        """Versions present, sorted; unfinished and foreign folders are left out."""
        folder = self.folder(kind)
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if is_version(p.name) and p.is_dir())


def kind_folder(kind: ArtifactKind) -> str:
    """Name of the folder that holds the versions of a kind."""
    if kind not in ARTIFACT_KINDS:
        raise ArtifactError(
            f"artifact kind is {kind!r}; allowed are {', '.join(map(repr, ARTIFACT_KINDS))}"
        )
    return f"{kind}s"
