"""From published files to the folder layout, without a network."""

from __future__ import annotations

import gzip
import json
from functools import partial

import numpy as np
import pytest

import examples.data.download as module
from examples.data.amazon import AmazonReviews, DataFolderError
from examples.data.fetch import fetch
from examples.data.layout import FILES, Item, find_folder, write_folder
from examples.data.raw_reviews import read_products, read_reviews

PRODUCTS = [
    "{'asin': 'A1', 'title': 'Soap &amp; Water', 'price': 3.5, 'brand': 'X', "
    "'categories': [['Beauty', 'Bath'], ['Other']]}",
    "{'asin': 'A2', 'title': None, 'categories': [['Beauty']]}",
    "{'asin': 'Z9', 'title': ",  # of no interest, so not even parsed
]


def review(user, asin, day):
    return json.dumps({"reviewerID": user, "asin": asin, "unixReviewTime": day, "overall": 5.0})


REVIEWS = [
    review("u2", "A1", 30),
    review("u1", "A1", 20),
    review("u1", "A2", 10),
    review("u1", "A3", 20),
    review("u2", "A2", 10),
    review("u2", "A3", 20),
    review("u2", "A3", 5),
]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return path


def test_histories_are_in_order_of_time_then_of_the_file(tmp_path):
    asins, histories = read_reviews(write_lines(tmp_path / "r.gz", REVIEWS))
    named = [[asins[row] for row in history] for history in histories]
    assert sorted(asins) == ["A1", "A2", "A3"]
    assert named == [["A2", "A1", "A3"], ["A3", "A2", "A1"]]


def test_items_are_numbered_in_no_telling_order(tmp_path):
    lines = [review("u", f"A{number:03d}", number) for number in range(200)]
    asins, histories = read_reviews(write_lines(tmp_path / "r.gz", lines))
    assert len(set(asins)) == 200
    steps = np.abs(np.diff(histories[0]))
    assert steps.mean() > 30


def test_products_become_texts(tmp_path):
    items = read_products(write_lines(tmp_path / "p.gz", PRODUCTS), {"A1", "A2"})
    assert items["A1"].text == (
        "title: Soap & Water; brand: X; categories: Beauty > Bath; price: 3.50"
    )
    assert items["A2"].text == "categories: Beauty"
    assert Item("A3").text == "asin: A3"


@pytest.mark.parametrize("line", ["{", '{"asin": "A1"}', "[]", '{"reviewerID": 1, "asin": 2}'])
def test_a_line_that_is_no_review_is_named(tmp_path, line):
    path = write_lines(tmp_path / "r.gz", [REVIEWS[0], line])
    with pytest.raises(DataFolderError, match="line 2 is no review"):
        read_reviews(path)


def test_products_are_data_and_never_run(tmp_path):
    path = write_lines(tmp_path / "p.gz", ["{'asin': 'A1', 'title': __import__('os').getcwd()}"])
    with pytest.raises(DataFolderError, match="line 1 is no product"):
        read_products(path, {"A1"})


@pytest.fixture
def published(tmp_path, monkeypatch):
    """What a server would send, and an encoder that needs no weights."""
    files = {
        "reviews_Beauty_5.json.gz": REVIEWS,
        "meta_Beauty.json.gz": PRODUCTS,
    }

    def fetch(url, path):
        if not path.exists():
            write_lines(path, files[url.rsplit("/", 1)[1]])
        return path

    def embed_texts(texts, model):
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    monkeypatch.setattr(module, "fetch", fetch)
    monkeypatch.setattr(module, "embed_texts", embed_texts)
    return files


def test_a_download_is_laid_out_and_read_again(tmp_path, published):
    root = tmp_path / "data"
    reviews = AmazonReviews(root, "beauty")
    assert sorted(path.name for path in (root / "amazon-beauty").iterdir()) == sorted(FILES)
    again = AmazonReviews(root, "beauty", download=False)
    assert again.item_ids == reviews.item_ids
    assert again.text == reviews.text
    assert {*reviews.item_ids} == {"A1", "A2", "A3"}
    assert reviews.x[:, 0].tolist() == [len(text) for text in reviews.text]
    assert len(reviews.leave_one_out.test) == 2


def test_a_run_that_ended_before_the_folder_was_whole_is_made_up_for(
    tmp_path, published, monkeypatch
):
    encoder = module.embed_texts

    def dies(texts, model):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "embed_texts", dies)
    with pytest.raises(KeyboardInterrupt):
        AmazonReviews(tmp_path, "beauty")
    assert find_folder(tmp_path, "beauty") is None
    monkeypatch.setattr(module, "embed_texts", encoder)
    assert AmazonReviews(tmp_path, "beauty").num_items == 3


def test_without_a_network_the_message_says_what_else_would_do(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9"
    monkeypatch.setattr(module, "fetch", partial(fetch, attempts=1))
    with pytest.raises(DataFolderError, match=r"cannot fetch .* put sequences.txt.gz, .* into .*"):
        AmazonReviews(tmp_path, "toys", base_url=url)


def test_a_damaged_download_is_named_and_fetched_anew(tmp_path, published):
    raw = tmp_path / "amazon-beauty.raw"
    path = write_lines(raw / "reviews_Beauty_5.json.gz", REVIEWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataFolderError, match="damaged or cut short"):
        AmazonReviews(tmp_path, "beauty")
    assert AmazonReviews(tmp_path, "beauty").num_items == 3


def test_writing_that_fails_leaves_nothing(tmp_path):
    def sequences():
        yield [0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "made", [Item("A")], np.ones((1, 2)), sequences())
    assert list(tmp_path.iterdir()) == []


def test_text_vectors_are_means_over_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    from examples.data.text_vectors import embed_texts
    from server.demo.text import fit_text_tokenizer

    tokenizer = fit_text_tokenizer(["some text", "other words"], 300)
    tokenizer.save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=1,
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False).eval()
    encoder.save_pretrained(tmp_path)
    texts = ["some text", "a much longer text with other words in it", "x"]
    together = embed_texts(texts, str(tmp_path), batch_size=3)
    alone = np.concatenate([embed_texts([text], str(tmp_path)) for text in texts])
    assert together.shape == (3, 16)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_no_such_text_model_is_named(tmp_path):
    from examples.data.text_vectors import embed_texts

    with pytest.raises(DataFolderError, match="cannot load the text model"):
        embed_texts(["a"], str(tmp_path / "nothing"))
