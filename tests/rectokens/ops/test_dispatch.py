import torch
from torch import Tensor

from rectokens.ops.dispatch import define_op


def _double(x: Tensor) -> Tensor:
    return x * 2


def _fake_double(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_the_reference_runs_where_there_is_no_kernel():
    op = define_op("rectokens_test::double", _double, fake=_fake_double)
    assert op(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch.ops.rectokens_test.double(torch.ones(1)).tolist() == [2.0]
    assert op(torch.ones(3, device="meta")).shape == (3,)


def test_a_cuda_kernel_leaves_the_cpu_to_the_reference():
    def kernel(x: Tensor) -> Tensor:
        raise AssertionError("must not run for a CPU tensor")

    op = define_op("rectokens_test::double_fast", _double, fake=_fake_double, cuda=kernel)
    assert op(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rectokens_test::double_fast", "CUDA")
