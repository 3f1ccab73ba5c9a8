import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.core.tokenizer import Tokenizer, TokenSequence
from rectokens.ops.nearest_reference import nearest_direct
from rectokens.tokenizers import residual
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer


def rows(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def fitted(levels=3, codes=16, dim=8, count=300, seed=42):
    return RQKMeansTokenizer(levels, codes, dim, seed=seed).fit_step(rows(count, dim))


def test_defaults_and_attributes():
    tokenizer = RQKMeansTokenizer()
    assert (tokenizer.num_levels, tokenizer.codebook_size, tokenizer.dim) == (3, 256, 64)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer._fitted is False
    assert tokenizer._rq.num_levels == 3


def test_needs_fitting_first():
    tokenizer = RQKMeansTokenizer(2, 4, 8)
    with pytest.raises(RuntimeError, match="fit_step"):
        tokenizer.encode(rows(2))
    with pytest.raises(RuntimeError, match="fit_step"):
        tokenizer.decode(TokenSequence(torch.zeros(2, dtype=torch.long)))
    assert tokenizer.fit_step(rows(20)) is tokenizer
    assert tokenizer._fitted is True


def test_level_i_is_seeded_with_seed_plus_i():
    first, second = fitted(levels=1, seed=5), fitted(levels=2, seed=4)
    assert not torch.equal(first.codebooks[0], second.codebooks[0])
    assert torch.equal(first.codebooks[0], fitted(levels=2, seed=5).codebooks[0])


@settings(deadline=None, max_examples=30)
@given(
    levels=st.integers(1, 4),
    codes=st.integers(1, 20),
    dim=st.integers(1, 12),
    count=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
def test_codes_are_greedy_and_decoding_sums_their_vectors(levels, codes, dim, count, seed):
    data = rows(count, dim, seed)
    tokenizer = RQKMeansTokenizer(levels, codes, dim, seed=seed).fit_step(data)
    tokens = tokenizer.encode(data)
    assert tokens.codes.shape == (count, levels)
    assert tokens.codes.dtype == torch.long
    left = data
    for level in range(levels):
        expected = nearest_direct(left, tokenizer.codebooks[level])
        assert torch.equal(tokens.codes[:, level], expected)
        left = left - tokenizer.codebooks[level][expected]
    torch.testing.assert_close(tokenizer.decode(tokens), data - left, atol=1e-5, rtol=1e-5)
    one = tokenizer.encode(data[0])
    assert one.codes.shape == (levels,)
    assert torch.equal(one.codes, tokens.codes[0])
    assert torch.equal(tokenizer.decode(one), tokenizer.decode(tokens)[0])
    assert torch.equal(tokenizer._rq.quantize(data).codes, tokens.codes)


def test_encoding_in_chunks_does_not_show(monkeypatch):
    tokenizer, data = fitted(), rows(100, seed=1)
    tokens = tokenizer.encode(data)
    decoded = tokenizer.decode(tokens)
    monkeypatch.setattr(residual, "_CHUNK_ROWS", 7)
    assert tokenizer.encode(data) == tokens
    assert torch.equal(tokenizer.decode(tokens), decoded)


def test_empty_batch_and_other_dtypes():
    tokenizer = fitted()
    assert tokenizer.encode(torch.empty(0, 8)).codes.shape == (0, 3)
    assert tokenizer.decode(TokenSequence(torch.empty(0, 3, dtype=torch.long))).shape == (0, 8)
    data = rows(20).half()
    assert tokenizer.encode(data) == tokenizer.encode(data.double())
    decoded = tokenizer.decode(TokenSequence(torch.zeros(2, 3, dtype=torch.int32)))
    assert decoded.dtype == torch.float32


@pytest.mark.parametrize("call", ["encode", "fit_step"])
def test_bad_vectors(call):
    act = getattr(fitted(), call)
    bad = rows(4)
    bad[2, 3] = float("inf")
    with pytest.raises(ValueError, match="first in row 2"):
        act(bad)
    with pytest.raises(ValueError, match=r"has shape \(4, 7\); expected \(B, 8\)"):
        act(rows(4, 7))
    with pytest.raises(ValueError, match="expected"):
        act(torch.zeros(1, 2, 8))
    with pytest.raises(TypeError, match="list"):
        act([[0.0] * 8])


def test_bad_codes():
    tokenizer = fitted()
    with pytest.raises(ValueError, match="expected \\(B, 3\\)"):
        tokenizer.decode(TokenSequence(torch.zeros(2, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="allowed are 0 to 15"):
        tokenizer.decode(TokenSequence(torch.tensor([0, 0, 16])))


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_levels is 0"):
        RQKMeansTokenizer(0)
    with pytest.raises(ValueError, match="dim is -1"):
        RQKMeansTokenizer(dim=-1)


def test_save_and_load(tmp_path):
    tokenizer = fitted()
    path = tmp_path / "not" / "yet" / "there.pt"
    tokenizer.save(path)
    loaded = RQKMeansTokenizer.load(path)
    data = rows(200, seed=3)
    assert loaded.encode(data) == tokenizer.encode(data)
    assert loaded._fitted is True
    assert (loaded.num_levels, loaded.codebook_size, loaded.dim) == (3, 16, 8)
    # Fitting goes on from the same counts.
    for each in (tokenizer, loaded):
        each.fit_step(data)
    assert all(map(torch.equal, tokenizer.codebooks, loaded.codebooks))
    assert os.listdir(path.parent) == ["there.pt"]


def test_an_unfitted_tokenizer_stays_so(tmp_path):
    RQKMeansTokenizer(2, 4, 8).save(tmp_path / "t.pt")
    loaded = RQKMeansTokenizer.load(str(tmp_path / "t.pt"))
    with pytest.raises(RuntimeError, match="fit_step"):
        loaded.encode(rows(1))


def test_the_file_holds_tensors_and_plain_values_only(tmp_path):
    fitted().save(tmp_path / "t.pt")
    payload = torch.load(tmp_path / "t.pt", weights_only=True)
    assert payload["config"] == {"num_levels": 3, "codebook_size": 16, "dim": 8, "seed": 42}


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        RQKMeansTokenizer.load(tmp_path / "missing.pt")
    path = tmp_path / "t.pt"
    fitted().save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"t\.pt is no readable tokenizer file"):
        RQKMeansTokenizer.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="no config, fitted"):
        RQKMeansTokenizer.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is no tokenizer file"):
        RQKMeansTokenizer.load(path)
    torch.save({"config": {"levels": 3}, "fitted": True, "state_dict": {}}, path)
    with pytest.raises(ValueError, match="holds no RQ-KMeans tokenizer"):
        RQKMeansTokenizer.load(path)


class _Attack:
    def __reduce__(self):
        return (os.system, ("true",))


def test_load_runs_no_code(tmp_path):
    torch.save({"config": _Attack(), "fitted": True, "state_dict": {}}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="no readable tokenizer file"):
        RQKMeansTokenizer.load(tmp_path / "t.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.pt"
    tokenizer = fitted()
    tokenizer.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        tokenizer.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.pt"]


def test_module_conveniences():
    tokenizer = fitted()
    assert tokenizer.to("cpu") is tokenizer
    assert tokenizer.eval() is tokenizer
    assert tokenizer.train() is tokenizer
    assert list(tokenizer.parameters()) == []


def test_from_codebooks():
    source = fitted()
    counts = [torch.ones(16, dtype=torch.long)] * 3
    copy = RQKMeansTokenizer.from_codebooks(source.codebooks, counts)
    data = rows(50, seed=2)
    assert copy.encode(data) == source.encode(data)
    with pytest.raises(ValueError, match="0 codebooks"):
        RQKMeansTokenizer.from_codebooks([], [])
    with pytest.raises(ValueError, match="2 counts"):
        RQKMeansTokenizer.from_codebooks(source.codebooks, counts[:2])


def test_a_loaded_state_is_fitted():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    fitted = RQKMeansTokenizer(2, 4, 6).fit_step(vectors)
    other = RQKMeansTokenizer(2, 4, 6)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.encode(vectors).codes, fitted.encode(vectors).codes)
    blank = RQKMeansTokenizer(2, 4, 6)
    blank.load_state_dict(RQKMeansTokenizer(2, 4, 6).state_dict())
    with pytest.raises(RuntimeError):
        blank.encode(vectors)
