"""The tokenizer artifact, and the fingerprint that says what each code means."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import (
    JsonObject,
    null_where_not_finite,
    read_json,
    write_json,
)
from rectokens.artifacts.manifest import Manifest, open_artifact, write_artifact
from rectokens.tokenizers.residual import ResidualTokenizer
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from rectokens.tokenizers.rqvae import RQVAEConfig, RQVAETokenizer

CONFIG_NAME = "item_tokenizer.json"
WEIGHTS_NAME = "item_tokenizer.safetensors"
REPORT_NAME = "report.json"
TOKENIZER_KINDS = ("rq-kmeans", "rqvae")
_FORMAT_NAME = "rectokens-tokenizer"
_FORMAT_VERSION = 1
_MAX_SIZE = 2**16
_MAX_LEVELS = 64


@dataclass(frozen=True, slots=True)
class TokenizerArtifact:
    """A tokenizer read from disk.

    Attributes:
        tokenizer: on the CPU, ready to encode.
        fingerprint: see :func:`tokenizer_fingerprint`; recomputed from the codebooks.
        report: quality figures from fitting.
        fitted_on: what it was fitted on and how.
        manifest: ``manifest.version`` is the tokenizer version.
    """

    tokenizer: ResidualTokenizer
    fingerprint: str
    report: dict[str, Any]
    fitted_on: dict[str, Any]
    manifest: Manifest


def tokenizer_fingerprint(tokenizer: ResidualTokenizer) -> str:
    """What decides which code means what: SHA-256 over levels, sizes and codebooks.

    Hashed are the text ``rectokens-tokenizer/1`` and a newline, then the number of levels, then
    for each level its codebook's two sizes and its values; integers as little-endian 64-bit,
    values as little-endian float32, row by row.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(b"rectokens-tokenizer/1\n")
    codebooks = tokenizer.codebooks
    digest.update(len(codebooks).to_bytes(8, "little"))
    for codebook in codebooks:
        for size in codebook.shape:
            digest.update(size.to_bytes(8, "little"))
        values = codebook.detach().cpu().to(torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()


def require_sizes(**sizes: int) -> None:
    """Refuse sizes that a tokenizer artifact does not have, before anything is fitted.

    Raises:
        ValueError: ``num_levels`` outside 1 to 64, or another size outside 1 to 65,536.
    """
    for name, value in sizes.items():
        most = _MAX_LEVELS if name == "num_levels" else _MAX_SIZE
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; allowed are 1 to {most}")


def save_tokenizer(
    root: Path,
    tokenizer: ResidualTokenizer,
    *,
    report: Mapping[str, Any],
    fitted_on: Mapping[str, Any],
) -> Path:
    """Write a tokenizer artifact.

    Args:
        root: folder of the version folders.
        tokenizer: fitted RQ-KMeans or RQ-VAE.
        report: quality figures, JSON values, NaN and infinities stored as null; its numbers at
            the top also go to the manifest.
        fitted_on: what it was fitted on and how, JSON values.

    Returns:
        ``root/<version>``.

    Raises:
        ArtifactError: another type of tokenizer, one that is not fitted or holds NaN, or a
            report that is not JSON.
    """
    kind, config = _describe(tokenizer)
    if not getattr(tokenizer, "_fitted", True):
        raise ArtifactError(f"the {kind} tokenizer is not fitted; only fitted ones are saved")
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()
    }
    _require_finite(tensors, "tokenizer")
    fingerprint = tokenizer_fingerprint(tokenizer)
    content = {
        "format": {"name": _FORMAT_NAME, "version": _FORMAT_VERSION},
        "kind": kind,
        "config": config,
        "fingerprint": fingerprint,
        "fitted_on": dict(fitted_on),
    }

    def populate(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS_NAME)
        write_json(folder / CONFIG_NAME, content)
        write_json(folder / REPORT_NAME, null_where_not_finite(report))

    figures = {
        name: value
        for name, value in report.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    }
    sizes: dict[str, float | int | str] = {
        "num_levels": tokenizer.num_levels,
        "codebook_size": tokenizer.codebook_size,
        "dim": tokenizer.feature_dim,
        "fingerprint": fingerprint,
    }
    return write_artifact(root, "tokenizer", populate, numbers={**figures, **sizes})


def load_tokenizer(path: Path, *, verify_checksums: bool = True) -> TokenizerArtifact:
    """Read a tokenizer artifact, in evaluation mode.

    Raises:
        ArtifactError: not an intact tokenizer artifact; a malformed configuration; weights that
            do not fit it, hold NaN, or do not have the fingerprint it states.
    """
    path = Path(path)
    manifest = open_artifact(path, "tokenizer", verify_checksums=verify_checksums)
    expected = {CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME}
    if set(manifest.files) != expected:
        raise ArtifactError(f"{path} holds {sorted(manifest.files)}; expected {sorted(expected)}")
    fields = read_json(path / CONFIG_NAME)
    fields.format_version(_FORMAT_NAME, _FORMAT_VERSION)
    tokenizer = _construct(fields.string("kind"), fields.child("config"), fields.where)
    stated, fitted_on = fields.string("fingerprint"), fields.mapping("fitted_on")
    fields.done()

    weights = path / WEIGHTS_NAME
    try:
        tensors = load_file(weights)
        tokenizer.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{weights} does not hold the tokenizer's weights: {error}") from error
    _require_finite(tensors, str(weights))
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != stated:
        raise ArtifactError(
            f"{weights} has codebooks of fingerprint {fingerprint}; {CONFIG_NAME} says {stated}"
        )
    # Fitting is over: both kinds mark that with the same flag, which is no part of their state.
    tokenizer._fitted = True
    tokenizer.eval()
    return TokenizerArtifact(
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        report=read_json(path / REPORT_NAME).content(),
        fitted_on=fitted_on,
        manifest=manifest,
    )


def _describe(tokenizer: ResidualTokenizer) -> tuple[str, dict[str, Any]]:
    if isinstance(tokenizer, RQKMeansTokenizer):
        return "rq-kmeans", {
            "num_levels": tokenizer.num_levels,
            "codebook_size": tokenizer.codebook_size,
            "dim": tokenizer.dim,
            "seed": tokenizer.seed,
        }
    if isinstance(tokenizer, RQVAETokenizer):
        return "rqvae", tokenizer.config._asdict()
    raise ArtifactError(
        f"tokenizer is a {type(tokenizer).__name__}; kinds that can be saved are "
        f"{', '.join(TOKENIZER_KINDS)}"
    )


def _construct(kind: str, config: JsonObject, where: str) -> RQKMeansTokenizer | RQVAETokenizer:
    def size(name: str) -> int:
        return config.integer(name, 1, _MAX_LEVELS if name == "num_levels" else _MAX_SIZE)

    tokenizer: RQKMeansTokenizer | RQVAETokenizer
    if kind == "rq-kmeans":
        arguments = {name: size(name) for name in ("num_levels", "codebook_size", "dim")}
        seed = config.integer("seed", -(2**63), 2**63 - 1)
        config.done()
        tokenizer = RQKMeansTokenizer(**arguments, seed=seed)
    elif kind == "rqvae":
        settings = RQVAEConfig(
            input_dim=size("input_dim"),
            latent_dim=size("latent_dim"),
            hidden_dim=size("hidden_dim"),
            num_levels=size("num_levels"),
            codebook_size=size("codebook_size"),
            learnable_codebook=config.boolean("learnable_codebook"),
            num_encoder_layers=size("num_encoder_layers"),
            num_decoder_layers=size("num_decoder_layers"),
            commitment_weight=config.number("commitment_weight"),
            ema_decay=config.number("ema_decay"),
        )
        config.done()
        try:
            tokenizer = RQVAETokenizer.from_config(settings)
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}") from error
    else:
        raise ArtifactError(
            f"{where}: tokenizer kind is {kind!r}; known are {', '.join(TOKENIZER_KINDS)}"
        )
    return tokenizer


def _require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{where}: {name} holds values that are NaN or infinite")
