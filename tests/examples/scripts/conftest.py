"""A small world for chat models, made once."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def finetune_world(tmp_path_factory, data_folder_writer, chat_tokenizer):
    """Data, an item tokenizer, a model and samples of both."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from examples.data.amazon import ItemData
    from examples.scripts.preprocessing import precompute_sequences
    from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans

    root = tmp_path_factory.mktemp("finetune")
    data_folder_writer(root / "amazon-beauty")
    fit_rq_kmeans([ItemData(root).x], RQKMeansSettings(2, 8)).save(root / "tok.pt")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(chat_tokenizer) + 5,  # rows of padding, as real checkpoints have
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(root / "model")
    chat_tokenizer.save_pretrained(root / "model")
    precompute_sequences.main(
        root=str(root),
        item_tok_path=str(root / "tok.pt"),
        item_tok_type="rqkmeans",
        num_levels=2,
        codebook_size=8,
        model_name=str(root / "model"),
        output_dir=str(root / "pre"),
        templates=("sid_sequence_to_sid",),
        include_item_samples=False,
        max_seq_len=6,
        seq_splits=("train", "eval", "test"),
    )
    return root
