"""Every module of the library imports without its optional dependencies, and changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import torch
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
          torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
import rectokens
failed = []
for module in pkgutil.walk_packages(rectokens.__path__, "rectokens."):
    if module.name.endswith("__main__") or module.name.startswith({skipped!r}):
        continue
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed.append(f"{{module.name}}: {{error!r}}")
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
         torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
assert before == after, (before, after)
assert "server" not in sys.modules
print("\\n".join(failed))
"""


@pytest.mark.parametrize(
    ("blocked", "skipped"),
    [
        (("triton", "faiss"), ("rectokens.none",)),
        (
            ("transformers", "triton", "faiss"),
            ("rectokens.integrations.hf",),
        ),
    ],
    ids=["without triton", "without transformers"],
)
def test_every_module_imports(blocked: tuple[str, ...], skipped: tuple[str, ...]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(blocked=blocked, skipped=skipped)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
