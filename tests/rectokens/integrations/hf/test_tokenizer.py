from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rectokens.core.tokenizer import TokenSequence
from rectokens.decoding.trie import Trie
from rectokens.integrations.hf import ItemAwareTokenizer
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

L, K = 3, 5

# The tokenizer fixture is not changed by any test body, so examples may share it.
shared = settings(max_examples=60, deadline=None)


def test_ids_are_contiguous_and_level_major(aware, text_tokenizer):
    first = len(text_tokenizer)
    names = [f"<item_L{level}_C{code}>" for level in range(L) for code in range(K)]
    names += ["<|item_start|>", "<|item_end|>"]
    assert aware.original_vocab_size == first
    assert aware.convert_tokens_to_ids(names) == list(range(first, first + L * K + 2))
    assert [aware.item_token_id(lv, c) for lv in range(L) for c in range(K)] == list(
        range(first, first + L * K)
    )
    assert (aware.item_sep_token_id, aware.item_end_token_id) == (first + L * K, len(aware) - 1)
    assert aware.vocab_size == len(aware) == first + L * K + 2
    assert aware.text_tokenizer is aware
    assert aware.item_tokens.encode([1, 2, 4]) == [
        aware.item_token_id(level, code) for level, code in enumerate([1, 2, 4])
    ]
    assert isinstance(aware, PreTrainedTokenizerFast)


@pytest.mark.parametrize(("level", "code"), [(3, 0), (-1, 0), (0, 5), (0, -1)])
def test_item_token_id_refuses_what_is_no_code(aware, level, code):
    with pytest.raises(ValueError, match="allowed are"):
        aware.item_token_id(level, code)


def test_item_strings_in_text_become_single_ids(aware):
    ids = aware.encode("hair<item_L2_C4> x<|item_start|><|item_end|>", add_special_tokens=False)
    assert [i for i in ids if i >= aware.original_vocab_size] == [
        aware.item_token_id(2, 4),
        aware.item_sep_token_id,
        aware.item_end_token_id,
    ]


def test_source_is_unchanged(text_tokenizer):
    text = "I like <item_L0_C0>"
    before = (len(text_tokenizer), text_tokenizer(text)["input_ids"])
    config = copy.deepcopy(text_tokenizer.init_kwargs)
    ItemAwareTokenizer(text_tokenizer, num_levels=L, codebook_size=K)
    assert (len(text_tokenizer), text_tokenizer(text)["input_ids"]) == before
    assert text_tokenizer.init_kwargs == config


def test_settings_of_the_source_carry_over(text_tokenizer):
    text_tokenizer.eos_token = "<pad>"  # changed after construction
    text_tokenizer(["a", "a long one"], padding=True, truncation=True, max_length=2)
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=L, codebook_size=K)
    assert aware.special_tokens_map == text_tokenizer.special_tokens_map
    assert aware.eos_token_id == text_tokenizer.pad_token_id
    assert (aware.bos_token_id, aware.unk_token_id) == (0, 3)
    assert aware.chat_template == text_tokenizer.chat_template
    assert (aware.padding_side, aware.model_max_length) == ("left", 77)
    messages = [{"role": "user", "content": "gift <item_L0_C1>"}]
    assert aware.item_token_id(0, 1) in aware.apply_chat_template(messages)["input_ids"]
    # A call's padding and truncation are no property of the vocabulary.
    assert len(aware("I like matte lipstick")["input_ids"]) > 2


def test_named_and_extra_special_tokens_carry_over(text_tokenizer, tmp_path):
    text_tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    source = PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer.backend_tokenizer,
        extra_special_tokens=["<extra>"],
        image_token="<s>",
    )
    aware = ItemAwareTokenizer(source, num_levels=L, codebook_size=K)
    aware.save_pretrained(tmp_path)
    for tokenizer in (aware, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.extra_special_tokens == ["<extra>"]
        assert tokenizer.image_token == "<s>"


def test_item_tokens_are_special(aware):
    ids = aware.encode("hair", add_special_tokens=False)
    items = [aware.item_sep_token_id, *aware.item_tokens.encode([0, 1, 2])]
    assert aware.decode(ids + items, skip_special_tokens=True) == "hair"
    assert set(items) <= set(aware.all_special_ids)
    assert aware.convert_tokens_to_ids(aware.all_special_tokens) == aware.all_special_ids


class Processor:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = "from the processor"

    def __call__(self, *args, **kwargs):
        return ("processed", args, kwargs)


def test_processor_is_kept_and_called(text_tokenizer):
    text_tokenizer.chat_template = None
    processor = Processor(text_tokenizer)
    aware = ItemAwareTokenizer(processor, num_levels=L, codebook_size=K)
    assert aware.processor is processor
    assert aware("x", images=3) == ("processed", ("x",), {"images": 3})
    assert aware.chat_template == "from the processor"
    assert aware.original_vocab_size == len(text_tokenizer)
    assert aware.encode_sequence(["hair"]) == text_tokenizer.encode("hair")


def test_without_processor_a_call_encodes(aware, text_tokenizer):
    assert aware.processor is None
    assert aware("dry hair")["input_ids"] == text_tokenizer("dry hair")["input_ids"]


@pytest.mark.parametrize("source", [None, "a string", SimpleNamespace(tokenizer=3)])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match="expected a fast tokenizer"):
        ItemAwareTokenizer(source, num_levels=L, codebook_size=K)


@pytest.mark.parametrize(("levels", "size"), [(0, 5), (3, 0), (-1, 5)])
def test_bad_sizes_are_refused(text_tokenizer, levels, size):
    with pytest.raises(ValueError, match="must be at least 1"):
        ItemAwareTokenizer(text_tokenizer, num_levels=levels, codebook_size=size)


# Saving, wrapping again ---------------------------------------------------------------------


@pytest.mark.parametrize("loader", [ItemAwareTokenizer, AutoTokenizer], ids=lambda c: c.__name__)
def test_save_and_load(aware, tmp_path, loader, item_tokenizer):
    aware.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is ItemAwareTokenizer
    for name in ("num_levels", "codebook_size", "original_vocab_size", "chat_template"):
        assert getattr(loaded, name) == getattr(aware, name)
    assert (len(loaded), loaded.item_tokens) == (len(aware), aware.item_tokens)
    assert loaded.special_tokens_map == aware.special_tokens_map
    assert loaded.all_special_ids == aware.all_special_ids
    text = "gift <item_L1_C1>, <|item_end|>please"
    assert loaded.encode(text) == aware.encode(text)
    assert loaded.padding_side == "left"
    assert loaded.item_tokenizer is None
    vector = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="item_tokenizer"):
        loaded.encode_sequence([vector])
    loaded.item_tokenizer = item_tokenizer
    assert loaded.encode_sequence(["a", vector]) == aware.encode_sequence(["a", vector])
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert loader.from_pretrained(again).encode(text) == aware.encode(text)


def test_item_tokenizer_can_be_given_on_load(aware, tmp_path, item_tokenizer):
    aware.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, item_tokenizer=item_tokenizer)
    assert loaded.item_tokenizer is item_tokenizer


def test_a_plain_folder_is_refused(text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_levels"):
        ItemAwareTokenizer.from_pretrained(tmp_path)


def test_wrapping_twice_finds_the_same_tokens(aware, tmp_path, item_tokenizer):
    aware.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert type(plain) is PreTrainedTokenizerFast
    for source in (aware, plain):
        twice = ItemAwareTokenizer(source, num_levels=L, codebook_size=K)
        assert twice.original_vocab_size == aware.original_vocab_size
        assert len(twice) == len(aware)
        assert twice.encode("x<item_L2_C2>") == aware.encode("x<item_L2_C2>")
    inherited = ItemAwareTokenizer(aware, num_levels=L, codebook_size=K)
    assert inherited.item_tokenizer is item_tokenizer


@pytest.mark.parametrize(("levels", "size"), [(2, 5), (4, 5), (3, 4), (3, 6)])
def test_wrapping_with_other_sizes_is_refused(aware, levels, size):
    with pytest.raises(ValueError, match=f"3 levels x 5 codes; asked for {levels} x {size}"):
        ItemAwareTokenizer(aware, num_levels=levels, codebook_size=size)


@pytest.mark.parametrize("taken", ["<|item_start|>", "<item_L1_C0>"])
def test_a_source_that_holds_a_string_is_refused(text_tokenizer, taken):
    text_tokenizer.add_tokens([taken])
    with pytest.raises(ValueError, match="contiguous"):
        ItemAwareTokenizer(text_tokenizer, num_levels=L, codebook_size=K)


def test_a_source_with_gaps_in_its_ids_is_refused():
    backend = Backend(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>"])
    source = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="3 tokens and largest id 7"):
        ItemAwareTokenizer(source, num_levels=L, codebook_size=K)


def test_a_special_token_without_an_id_is_refused(text_tokenizer):
    text_tokenizer.pad_token = "<never added>"
    with pytest.raises(ValueError, match="<never added>"):
        ItemAwareTokenizer(text_tokenizer, num_levels=L, codebook_size=K)


def test_a_large_codebook(text_tokenizer, tmp_path):
    # Quadratic paths over 24,576 tokens would take minutes.
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=3, codebook_size=8192)
    assert aware.convert_tokens_to_ids("<item_L2_C8191>") == aware.item_token_id(2, 8191)
    aware.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.item_end_token_id == len(loaded) - 1 == len(text_tokenizer) + 3 * 8192 + 1


def test_pickle_and_deepcopy(aware):
    for other in (pickle.loads(pickle.dumps(aware)), copy.deepcopy(aware)):
        assert other.encode("x<item_L2_C2>") == aware.encode("x<item_L2_C2>")
        assert other.item_tokens == aware.item_tokens


# Sequences ----------------------------------------------------------------------------------

codes = st.tuples(*[st.integers(0, K - 1)] * L)
texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=12)
histories = st.lists(texts | codes, max_size=8)


def vector(item: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(item, dtype=torch.float64)


def slow_encode(aware: ItemAwareTokenizer, parts: list) -> list[int]:
    ids: list[int] = []
    previous = None
    for part in parts:
        if isinstance(part, str):
            ids.extend(aware.backend_tokenizer.encode(part, add_special_tokens=False).ids)
        else:
            if isinstance(previous, str):
                ids.append(aware.item_sep_token_id)
            for level, code in enumerate(part):
                ids.append(aware.convert_tokens_to_ids(f"<item_L{level}_C{code}>"))
            ids.append(aware.item_end_token_id)
        previous = part
    return ids


@shared
@given(parts=histories)
def test_encode_sequence_against_reference(aware, parts):
    given_parts = [part if isinstance(part, str) else vector(part) for part in parts]
    assert aware.encode_sequence(given_parts) == slow_encode(aware, parts)


@shared
@given(parts=histories)
def test_decode_sequence_inverts_encode_sequence(aware, parts):
    # Neighbouring texts run together, and an empty one is nothing.
    merged: list = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    given_parts = [part if isinstance(part, str) else vector(part) for part in parts]
    decoded = aware.decode_sequence(aware.encode_sequence(given_parts))
    assert [p if isinstance(p, str) else tuple(p.codes.tolist()) for p in decoded] == merged


def test_items_of_a_call_are_encoded_together(aware, item_tokenizer):
    parts = [vector((0, 1, 2)), "text", vector((3, 4, 0)), vector((1, 1, 1))]
    aware.encode_sequence(parts)
    assert item_tokenizer.batches == [(3, 3)]
    aware.encode_sequence(["text only"])
    assert len(item_tokenizer.batches) == 1


def test_encode_sequence_adds_no_special_tokens(text_tokenizer):
    text_tokenizer.add_bos_token = True
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=L, codebook_size=K)
    assert aware.encode("hair")[0] == aware.bos_token_id
    assert aware.bos_token_id not in aware.encode_sequence(["hair"])
    assert aware.encode_sequence([]) == []


@pytest.mark.parametrize("holder", ["parameters", "buffers"])
def test_vectors_go_to_the_item_tokenizers_dtype(aware, item_tokenizer, holder):
    seen = []
    plain = item_tokenizer.encode

    def encode(features):
        seen.append(features.dtype)
        return plain(features.double())

    item_tokenizer.encode = encode
    aware.encode_sequence([vector((0, 1, 2))])
    tensors = [torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bfloat16)]
    setattr(item_tokenizer, holder, lambda: iter(tensors))
    aware.encode_sequence([vector((0, 1, 2))])
    assert seen == [torch.float32, torch.bfloat16]


def test_bad_parts(aware):
    with pytest.raises(TypeError, match="int"):
        aware.encode_sequence(["x", 3])
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        aware.encode_sequence([torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="0 to 4"):
        aware.encode_sequence([torch.tensor([0.0, 9.0, 0.0])])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_decode_sequence_cuts_runs(aware, as_tensor):
    first, start, end = aware.original_vocab_size, aware.item_sep_token_id, aware.item_end_token_id
    hair = aware.encode("hair")
    ids = [first + 1, first + 7, first + 12, first + 3, *hair, start, first + 4, end, end, *hair]
    decoded = aware.decode_sequence(torch.tensor(ids) if as_tensor else ids)
    assert decoded == [
        TokenSequence(torch.tensor([1, 2, 2])),
        TokenSequence(torch.tensor([3])),
        "hair",
        TokenSequence(torch.tensor([4])),
        "hair",
    ]
    assert all(p.codes.dtype == torch.long for p in decoded if isinstance(p, TokenSequence))
    assert aware.decode_sequence([]) == []


# Trie ---------------------------------------------------------------------------------------


@shared
@given(rows=st.lists(codes, min_size=1, max_size=20), dense=st.sampled_from([1, 2]))
def test_build_item_trie_against_pointer_trie(aware, rows, dense):
    reference = Trie()
    for row in sorted(rows):
        reference.insert([aware.item_token_id(level, code) for level, code in enumerate(row)])
    expected = CompactCSRTrie.from_trie(reference, vocab_size=len(aware), dense_lookup_layers=dense)
    trie = aware.build_item_trie(torch.tensor(rows, dtype=torch.int32), dense_lookup_layers=dense)
    assert trie.vocab_size == len(aware)
    assert torch.equal(trie.row_ptrs, expected.row_ptrs)
    assert torch.equal(trie.stacked_cols_vals, expected.stacked_cols_vals)
    assert torch.equal(trie.dense_states, expected.dense_states)
    assert all(map(torch.equal, trie.dense_mask_by_layer, expected.dense_mask_by_layer))


def test_build_item_trie_does_not_overflow(text_tokenizer):
    # 9 levels of 2**7 codes do not fit one 64-bit key.
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=9, codebook_size=2**7)
    rows = torch.tensor([[127] * 9, [0] * 9, [127] * 8 + [0], [1] + [0] * 8])
    trie = aware.build_item_trie(rows)
    assert trie.stacked_cols_vals[0, :3].tolist() == [
        aware.item_token_id(0, code) for code in (0, 1, 127)
    ]
    assert trie.layer_max_branches[8] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 4, dtype=torch.long), r"expected \(N, 3\)"),
        (torch.tensor([[0, 0, 5]]), "0 to 4"),
        (torch.tensor([[0, -1, 0]]), "0 to 4"),
        (torch.zeros(2, 3), "integer"),
    ],
)
def test_build_item_trie_refuses(aware, rows, message):
    with pytest.raises(ValueError, match=message):
        aware.build_item_trie(rows)


def test_build_item_trie_of_no_items(aware):
    trie = aware.build_item_trie(torch.zeros(0, L, dtype=torch.long))
    assert trie.row_ptrs.tolist() == [0]
