"""A fine-tuned model asked for items, and asked in words."""

from __future__ import annotations

import pytest

from examples.data.amazon import PrecomputedSequenceDataset
from examples.scripts.eval import eval_prompts
from examples.scripts.eval.eval_retrieval import main
from examples.scripts.training import finetune_qwen
from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans


@pytest.fixture(scope="module")
def model(finetune_world, tmp_path_factory):
    return finetune_qwen.train(
        precomputed_path=str(finetune_world / "pre" / "beauty_train.pt"),
        model_name=str(finetune_world / "model"),
        num_levels=2,
        codebook_size=8,
        batch_size=4,
        grad_accum=1,
        num_epochs=6,
        lr=1e-2,
        max_length=600,
        output_dir=str(tmp_path_factory.mktemp("tuned")),
        device="cpu",
        progress_bar=False,
    )


@pytest.fixture
def options(finetune_world, model):
    return {
        "model_dir": str(model),
        "item_tok_path": str(finetune_world / "tok.pt"),
        "item_tok_type": "rqkmeans",
        "root": str(finetune_world),
        "device": "cpu",
    }


def test_retrieval_of_a_model(options, finetune_world, tmp_path):
    path = str(finetune_world / "pre" / "beauty_test.pt")
    found = main(**options, precomputed_test_path=path, num_examples=None, top_k=20, beam_size=64)
    assert found["users"] == len(PrecomputedSequenceDataset(path))
    kept, all_items = found["model"].values()
    assert list(kept) == [f"recall@{k}" for k in (1, 5, 10, 20)] + [
        f"ndcg@{k}" for k in (5, 10, 20)
    ]
    assert 0 < all_items["recall@20"] <= kept["recall@20"] <= 1
    # Everything is in the beam, so the library's own search has the same ranks.
    library = main(
        **options,
        precomputed_test_path=path,
        num_examples=None,
        top_k=20,
        beam_size=64,
        attr_path="lm_head",
    )
    assert library["model"] == found["model"]
    few = main(**options, precomputed_test_path=path, num_examples=5)
    assert few["users"] == 5
    assert "recall@20" not in few["model"]["all items ranked"]


def test_models_and_tokenizers_that_do_not_belong_together(options, finetune_world, tmp_path):
    path = str(finetune_world / "pre" / "beauty_test.pt")
    vectors = finetune_qwen.AmazonReviews(finetune_world).x
    fit_rq_kmeans([vectors], RQKMeansSettings(2, 4)).save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"has codebook_size 8; .*other.pt has 4"):
        main(**{**options, "item_tok_path": str(tmp_path / "other.pt")}, precomputed_test_path=path)
    same = fit_rq_kmeans([vectors], RQKMeansSettings(2, 8, style="kmeans", seed=5))
    same.save(tmp_path / "same.pt")
    with pytest.raises(ValueError, match="was made with the item tokenizer"):
        main(**{**options, "item_tok_path": str(tmp_path / "same.pt")}, precomputed_test_path=path)
    with pytest.raises(ValueError, match=r"rows of embeddings; its tokenizer"):
        main(
            **{**options, "model_dir": str(finetune_world / "model")},
            hf_model_name=str(finetune_world / "model"),
            precomputed_test_path=path,
        )
    with pytest.raises(ValueError, match="give item_tok_path, precomputed_test_path to ask a mod"):
        main(model_dir="x")
    with pytest.raises(ValueError, match="model_dir and release or base_url are given"):
        main(model_dir="x", release="y")
    with pytest.raises(ValueError, match="top_k is 30; allowed are 1 to beam_size, 20"):
        main(**options, precomputed_test_path=path, top_k=30)


def test_prompts(options, capsys):
    said = eval_prompts.main(
        **options,
        num_levels=2,
        codebook_size=8,
        prompts=["A customer chose these products, oldest first: <item:B003>"],
        beam_prompts=["<item:B003> and then?", "something nice"],
        num_beams=3,
        beam_size=5,
        max_new_tokens=12,
    )
    assert len(said["prompts"]) == 1
    for answer in said["beam_prompts"]:
        assert len(answer["items"]) == 3
        scores = [item["score"] for item in answer["items"]]
        assert scores == sorted(scores, reverse=True)
        for item in answer["items"]:
            assert item["items"]  # a semantic ID of the catalog
            assert all(text.startswith("title: thing") for text in item["items"].values())
    assert "> something nice" in capsys.readouterr().out
    again = eval_prompts.main(
        **options,
        num_levels=2,
        codebook_size=8,
        prompts=["A customer chose these products, oldest first: <item:B003>"],
        max_new_tokens=12,
    )
    assert again["prompts"] == said["prompts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["<item:nothing>"]}, "the data has no item 'nothing'"),
        ({"prompts": [""]}, "a prompt is empty"),
        ({"num_beams": 9}, "num_beams is 9; allowed are 1 to beam_size, 4"),
        ({"codebook_size": 16}, "has codebook_size 8; 16 was asked for"),
    ],
)
def test_prompts_that_cannot_be_answered(options, change, message):
    given = {**options, "num_levels": 2, "codebook_size": 8, "prompts": ["hello"], **change}
    with pytest.raises(ValueError, match=message):
        eval_prompts.main(**given)
