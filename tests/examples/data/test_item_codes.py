import pytest
import torch

from examples.data.item_codes import encode_all_items, load_item_tokenizer
from rectokens.artifacts.tokenizer import save_tokenizer
from rectokens.integrations.hf import ItemAwareTokenizer
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from rectokens.tokenizers.rqvae import RQVAETokenizer


@pytest.fixture
def kmeans():
    return RQKMeansTokenizer(2, 4, 6).fit_step(torch.randn(50, 6))


@pytest.mark.parametrize("kind", ["rqkmeans", "rqvae"])
def test_files_are_read_by_type(tmp_path, kmeans, kind):
    tokenizer = kmeans if kind == "rqkmeans" else RQVAETokenizer(6, 3, 5, 2, 4)
    tokenizer.save(tmp_path / "final.pt")
    loaded = load_item_tokenizer(tmp_path / "final.pt", kind, num_levels=2, codebook_size=4)
    x = torch.randn(7, 6)
    assert torch.equal(loaded.encode(x).codes, tokenizer.eval().encode(x).codes)


def test_an_artifact_is_read_too(tmp_path, kmeans):
    path = save_tokenizer(tmp_path, kmeans, report={}, fitted_on={})
    x = torch.randn(7, 6)
    codes = load_item_tokenizer(path, "rqkmeans").encode(x).codes
    assert torch.equal(codes, kmeans.encode(x).codes)
    with pytest.raises(ValueError, match="holds a RQKMeansTokenizer; item_tok_type is 'rqvae'"):
        load_item_tokenizer(path, "rqvae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_tok_type": "kmeans"}, "item_tok_type is 'kmeans'; allowed are 'rqvae', 'rqkmeans'"),
        ({"num_levels": 3}, "has num_levels 2; 3 was asked for"),
        ({"codebook_size": 256}, "has codebook_size 4; 256 was asked for"),
        ({"item_tok_type": "rqvae"}, "final.pt"),
    ],
)
def test_another_tokenizer_than_asked_for_is_refused(tmp_path, kmeans, options, message):
    kmeans.save(tmp_path / "final.pt")
    with pytest.raises(ValueError, match=message):
        load_item_tokenizer(tmp_path / "final.pt", **{"item_tok_type": "rqkmeans", **options})
    with pytest.raises(FileNotFoundError):
        load_item_tokenizer(tmp_path / "none.pt", "rqkmeans")


def test_all_items_are_encoded_in_batches(kmeans, chat_tokenizer):
    aware = ItemAwareTokenizer(chat_tokenizer, kmeans, num_levels=2, codebook_size=4)
    x = torch.randn(11, 6)
    codes = encode_all_items(x, kmeans, aware, batch_size=3, device="cpu")
    assert codes.dtype == torch.long
    assert torch.equal(codes, kmeans.encode(x).codes)
    with pytest.raises(ValueError, match=r"shape \(11, 5\); the item tokenizer takes \(N, 6\)"):
        encode_all_items(x[:, :5], kmeans, aware, 3, "cpu")
    other = ItemAwareTokenizer(chat_tokenizer, num_levels=3, codebook_size=4)
    with pytest.raises(ValueError, match="num_levels 2, the text tokenizer 3"):
        encode_all_items(x, kmeans, other, 3, "cpu")
