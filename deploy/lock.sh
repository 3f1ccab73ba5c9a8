#!/bin/sh
# Pins what the images install beside torch and what torch brings for CUDA: deploy/requirements.lock.
# `make lock`; needs the registry. Versions that are pinned stay, unless --upgrade is given.
set -eu
cd "$(dirname "$0")/.."
lock=deploy/requirements.lock
new=$(mktemp)
trap 'rm -f "$new"' EXIT
cp "$lock" "$new"
uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
  --no-emit-find-links --extra server --extra otel --extra redis --extra postgres --constraint constraints-cpu.txt \
  --output-file "$new" "$@" pyproject.toml
{
  echo "# Every package of the images but torch, whose build differs between them, and what it brings for"
  echo "# CUDA: see Dockerfile. Made by \`make lock\`."
  # Builds of torch for other machines need other libraries; those that need none need all the rest.
  grep -vE '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' "$new"
} >"$lock"
