# Two images of one service: `--target cpu` and `--target cuda`. They differ in the build of torch,
# and the second has the compiler that Triton needs; all else is shared. CUDA's libraries come with
# torch, its driver from the host (NVIDIA Container Toolkit), so that any Debian can be the base.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS base
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# What both images have beside packages. The id is numeric, so that an orchestrator can tell that it
# is not root's; the folders are made here, so that new volumes mounted on them belong to it.
FROM base AS runtime
RUN groupadd --gid 10001 rectokens \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp \
    --shell /usr/sbin/nologin rectokens \
 && install --directory --owner=10001 --group=10001 /store /cache
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/rectokens \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    RECTOKENS_HOST=0.0.0.0 \
    RECTOKENS_PORT=8000
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start on a GPU compiles kernels and captures searches.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['RECTOKENS_PORT'] + '/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]
CMD ["serve"]

# Layers from seldom changed to often changed: packages, torch, the source. The secret `pip` is a
# pip.conf for a package index of one's own, `ca` the certificates it names; neither is needed.
FROM base AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_COMPILE=1
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && python3 -m venv /opt/venv
COPY deploy/requirements.lock /src/requirements.lock
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/build-ca.crt \
    /opt/venv/bin/pip install --no-deps --requirement /src/requirements.lock

FROM packages AS cpu-torch
ARG TORCH_VERSION=2.13.0
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/build-ca.crt \
    /opt/venv/bin/pip install --index-url "${CPU_TORCH_INDEX}" "torch==${TORCH_VERSION}"
COPY deploy/finish-venv.sh /src/
RUN sh /src/finish-venv.sh cpu

# The source is a layer of its own, a few megabytes that change while the others stay.
FROM packages AS source
COPY pyproject.toml README.md LICENSE /src/
COPY rectokens /src/rectokens
COPY server /src/server
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/build-ca.crt \
    /opt/venv/bin/pip install --no-deps --target /opt/rectokens /src \
 && python3 -m compileall -qq /opt/rectokens

FROM runtime AS cpu
COPY --from=cpu-torch /opt/venv /opt/venv
COPY --from=source /opt/rectokens /opt/rectokens
USER 10001:10001
ARG REVISION=unknown
LABEL org.opencontainers.image.title="rectokens" \
      org.opencontainers.image.description="Inference server for generative retrieval, CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"

FROM packages AS cuda-torch
ARG TORCH_VERSION=2.13.0
ARG CUDA_TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/build-ca.crt \
    /opt/venv/bin/pip install --index-url "${CUDA_TORCH_INDEX}" "torch==${TORCH_VERSION}"
COPY deploy/finish-venv.sh /src/
RUN sh /src/finish-venv.sh cuda

FROM runtime AS cuda
# Triton compiles its launchers where they run, with a C compiler and Python's headers.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-torch /opt/venv /opt/venv
COPY --from=source /opt/rectokens /opt/rectokens
USER 10001:10001
ARG REVISION=unknown
LABEL org.opencontainers.image.title="rectokens" \
      org.opencontainers.image.description="Inference server for generative retrieval, CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
