"""Builds an image of the Dockerfile with Docker, or without a Docker engine with buildah.

``python deploy/build_image.py cpu`` makes ``rectokens:0.1.0-cpu``. Packages come from where pip on
this machine takes them: its configuration goes into the build as a secret, folders that it names
as volumes. Where the base image cannot be pulled, ``BASE`` names another, or ``BASE=local`` makes
one of this machine's Debian sources with mmdebstrap (buildah only). ``sidecars`` makes an image
with Debian's nginx, Prometheus and Redis in the same way, for tests that cannot pull theirs.

Variables: BASE, CPU_TORCH_INDEX, CUDA_TORCH_INDEX, TORCH_VERSION are build arguments of the same
names. Exit code: 0, 1 if the build failed, 2 if there is nothing to build with.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parents[1]
LOCAL_BASE = "localhost/rectokens-base:debian"
SIDECARS = "localhost/rectokens-sidecars:debian"
_SIDECAR_OPTIONS = (
    "--include=nginx-light,prometheus,redis-server",
    # Owned as in the images that the compose file names.
    '--customize-hook=install -d -o 65534 -g 65534 "$1/prometheus"',
    '--customize-hook=install -d -o 999 -g 1000 "$1/data"',
)
ARGUMENTS = ("BASE", "TORCH_VERSION", "CPU_TORCH_INDEX", "CUDA_TORCH_INDEX")
_CA_IN_BUILD = "/etc/build-ca.crt"


def main() -> int:
    """Build, and say what was built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=("cpu", "cuda", "sidecars"))
    options = parser.parse_args()
    if options.target == "sidecars":
        print(f"made {import_root(SIDECARS, _SIDECAR_OPTIONS)}")
        return 0
    engine = find_engine()
    if engine is None:
        print("error: neither a Docker engine nor buildah is here", file=sys.stderr)
        return 2
    tag = f"rectokens:{project_version()}-{options.target}"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = build_command(engine, options.target, tag, Path(folder))
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code != 0:
        print(f"error: the build of {tag} failed", file=sys.stderr)
        return 1
    print(f"built {tag} in {time.monotonic() - started:.0f} s")
    return 0


def find_engine() -> str | None:
    """``docker`` if its engine answers, else ``buildah`` if it is installed."""
    if shutil.which("docker") and (
        subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    ):
        return "docker"
    return "buildah" if shutil.which("buildah") else None


def project_version() -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def build_command(engine: str, target: str, tag: str, folder: Path) -> list[str]:
    """The engine's command line; what it reads is written into ``folder``."""
    arguments = {name: os.environ[name] for name in ARGUMENTS if name in os.environ}
    config, certificates, folders = pip_settings(cpu_torch=target == "cpu")
    if engine == "buildah" and arguments.get("BASE") == "local":
        arguments["BASE"] = local_base()
    arguments["REVISION"] = revision()
    if target == "cpu" and has_cpu_torch(folders):
        # torch's own index is not needed then, and may be out of reach.
        arguments.setdefault("CPU_TORCH_INDEX", "https://pypi.org/simple")

    command = ["docker", "build", "--tag", tag]
    if engine == "buildah":
        # chroot needs no privileges beyond root's; the docker format keeps the health check.
        command = ["buildah", "build", "--isolation", "chroot", "--format", "docker", "--layers"]
        command += ["--tag", f"localhost/{tag}"]
        for path in folders:
            command += ["--volume", f"{path}:{path}:ro"]
        if arguments.get("BASE", "").startswith("localhost/"):
            command += ["--pull-never"]
    if config:
        (folder / "pip.conf").write_text(config)
        command += ["--secret", f"id=pip,src={folder / 'pip.conf'}"]
    if certificates is not None:
        command += ["--secret", f"id=ca,src={certificates}"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    return [*command, "--target", target, "."]


def pip_settings(*, cpu_torch: bool) -> tuple[str, Path | None, list[Path]]:
    """A pip.conf like this machine's, the file of certificates it names, and the folders.

    Unless ``cpu_torch``, without links to a CPU build of torch, which pip would prefer to CUDA's.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    values: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        # Variables (":env:") come last and win, as they do for pip.
        if section in ("global", "install", ":env:"):
            values[option] = ast.literal_eval(value)
    kept = {
        option: values[option]
        for option in ("index-url", "extra-index-url", "find-links", "cert", "timeout")
        if option in values
    }
    if not cpu_torch and "find-links" in kept:
        links = [word for word in kept["find-links"].split() if not has_cpu_torch([_path(word)])]
        kept["find-links"] = " ".join(links)
    certificates = Path(kept["cert"]) if "cert" in kept else None
    if certificates is not None:
        kept["cert"] = _CA_IN_BUILD
    words = " ".join(kept.get(o, "") for o in ("index-url", "extra-index-url", "find-links"))
    folders = {_folder_of(word) for word in words.split()}
    config = "[global]\n" + "".join(f"{o} = {' '.join(v.split())}\n" for o, v in kept.items() if v)
    return config if kept else "", certificates, sorted(f for f in folders if f is not None)


def _path(location: str) -> Path | None:
    """A location's local path; None for one elsewhere."""
    parts = urlsplit(location)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def _folder_of(location: str) -> Path | None:
    """The local folder that has to be there for a location; None for one elsewhere."""
    path = _path(location)
    # An index lies in a folder beside the files it points to.
    return path.parent if path is not None and path.name == "simple" else path


def has_cpu_torch(folders: Sequence[Path | None]) -> bool:
    """Whether one of pip's folders has a CPU build of torch."""
    return any(folder and any(folder.glob("torch-*+cpu-*.whl")) for folder in folders)


def local_base() -> str:
    """A minimal Debian made from this machine's sources, unless it was made before."""
    return import_root(LOCAL_BASE, ())


def import_root(name: str, mmdebstrap_options: Sequence[str]) -> str:
    """An image of a fresh Debian root with the options' packages, unless it was made before."""
    exists = subprocess.run(["podman", "image", "exists", name], check=False).returncode == 0
    if not exists:
        release = dict(
            line.split("=", 1)
            for line in Path("/etc/os-release").read_text().splitlines()
            if "=" in line
        )
        suite = release["VERSION_CODENAME"].strip('"')
        sources = sorted(map(str, Path("/etc/apt").glob("sources.list.d/debian.sources")))
        with tempfile.TemporaryDirectory() as folder:
            root = f"{folder}/root.tar"
            options = ["--quiet", "--mode=root", "--variant=minbase", *mmdebstrap_options]
            subprocess.run(["mmdebstrap", *options, suite, root, *sources], check=True)
            subprocess.run(["podman", "import", "--quiet", root, name], check=True)
    return name


def revision() -> str:
    """The commit that is checked out, if that can be told."""
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
