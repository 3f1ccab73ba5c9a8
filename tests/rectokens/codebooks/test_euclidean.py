import pytest
import torch

from rectokens.codebooks.euclidean import EuclideanCodebook


def test_starts_at_zero_as_a_buffer():
    codebook = EuclideanCodebook(4, 3)
    assert codebook.size == 4
    assert codebook.dim == 3
    assert codebook.embeddings.dtype == torch.float32
    assert torch.equal(codebook.embeddings, torch.zeros(4, 3))
    assert list(codebook.parameters()) == []
    assert list(codebook.state_dict()) == ["embeddings"]


def test_learnable_is_a_parameter_and_lookup_keeps_gradients():
    codebook = EuclideanCodebook.from_tensor(torch.eye(3), learnable=True)
    assert [name for name, _ in codebook.named_parameters()] == ["embeddings"]
    codebook.lookup(torch.tensor([[1, 1], [2, 1]])).sum().backward()
    assert codebook.embeddings.grad[:, 0].tolist() == [0.0, 3.0, 1.0]


def test_from_tensor_copies():
    source = torch.eye(2, dtype=torch.float64)
    codebook = EuclideanCodebook.from_tensor(source)
    source.zero_()
    assert codebook.embeddings.dtype == torch.float32
    assert torch.equal(codebook.embeddings, torch.eye(2))


def test_lookup_keeps_the_shape_of_the_codes():
    codebook = EuclideanCodebook.from_tensor(torch.arange(6.0).reshape(3, 2))
    assert codebook.lookup(torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
    with pytest.raises(IndexError):
        codebook.lookup(torch.tensor([3]))


def test_find_nearest_casts_the_query_and_takes_the_lowest_of_ties():
    codebook = EuclideanCodebook.from_tensor(torch.tensor([[1.0], [-1.0], [5.0]]))
    query = torch.tensor([[0.0], [-0.5], [3.5]], dtype=torch.float64)
    assert codebook.find_nearest(query).codes.tolist() == [0, 1, 2]


@pytest.mark.parametrize("learnable", [False, True])
def test_update_overwrites_rows_without_autograd(learnable):
    codebook = EuclideanCodebook(3, 2, learnable=learnable)
    codebook.update(torch.tensor([2, 0]), torch.ones(2, 2, dtype=torch.float64, requires_grad=True))
    assert codebook.embeddings.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert codebook.embeddings.grad_fn is None
    assert codebook.embeddings.requires_grad is learnable


def test_bad_sizes():
    with pytest.raises(ValueError, match="size is 0"):
        EuclideanCodebook(0, 3)
    with pytest.raises(ValueError, match="expected \\(size, dim\\)"):
        EuclideanCodebook.from_tensor(torch.zeros(3))
