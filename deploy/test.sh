#!/bin/sh
# `make test-deploy`: builds the CPU image without a Docker engine and starts the compose file with
# it, for real. PYTHON is the environment with the extras dev and deploy. Says why where it cannot:
# then nothing has failed.
set -eu
cd "$(dirname "$0")/.."

skip() {
  echo "test-deploy skipped: $1"
  exit 0
}

[ "$(uname -s)" = Linux ] || skip "needs Linux"
[ "$(id -u)" = 0 ] || skip "needs root, to build in a chroot and to make a network namespace"
missing=
for tool in buildah podman runc mmdebstrap unshare ip; do
  command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
  command -v apt-get >/dev/null || skip "not installed:$missing"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    buildah podman runc mmdebstrap uidmap util-linux iproute2; } >/dev/null 2>&1 ||
    skip "cannot be installed:$missing"
fi
unshare -n true 2>/dev/null || skip "no network namespace can be made here"

"$PYTHON" deploy/build_image.py sidecars || skip "no Debian packages for nginx, Prometheus and Redis"
BASE=${BASE:-local} "$PYTHON" deploy/build_image.py cpu
DEPLOY_IMAGE=localhost/rectokens:$("$PYTHON" -c 'from deploy.build_image import project_version as v; print(v())')-cpu
export DEPLOY_IMAGE DEPLOY_TESTS=1
podman image inspect --format "$DEPLOY_IMAGE has {{.Size}} bytes" "$DEPLOY_IMAGE"
exec unshare -n sh -c 'ip link set lo up && exec "$@"' sh "$PYTHON" -m pytest -q \
  tests/deploy/test_containers.py tests/deploy/test_reverse_proxy.py tests/deploy/test_tools.py
