#!/bin/sh
# Last step on an image's environment: do the versions agree, away with what only builds and tests
# of packages need, and bytecode of what a start imports, since the image is never written to.
#
#   finish-venv.sh cpu|cuda
set -eu
python=/opt/venv/bin/python
site=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
$python -m pip check
$python -m pip uninstall --quiet --yes pip

for package in mpmath networkx pyarrow sympy; do
  find "$site/$package" -type d -name tests -prune -exec rm -rf {} +
done
rm -rf "$site"/pyarrow/include "$site"/pyarrow/src "$site"/torch/test
find "$site/torch/bin" -type f ! -name torch_shm_manager -delete
if [ "$1" = cpu ]; then
  # Without a compiler nobody includes them.
  rm -rf "$site"/torch/include "$site"/torch/share
fi

# All bytecode would be a quarter of a gigabyte.
find "$site" -name __pycache__ -prune -exec rm -rf {} +
$python - <<'IMPORTS'
import fastapi, filelock, fsspec, httpx, huey, orjson, polars, prometheus_client, psutil
import psycopg, pyarrow.parquet, pydantic_settings, redis, rich, safetensors.torch, structlog
import torch, typer, uvicorn, uvicorn.protocols.http.h11_impl, uvicorn.lifespan.on
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import LlamaForCausalLM, Qwen3ForCausalLM
IMPORTS
