from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectokens.prompts.markup import ItemMention, split_mentions

A, B = ItemMention("A"), ItemMention("B")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ()),
        ("  \n", ()),
        ("<item:A>", (A,)),
        ("<item:A><item:B>", (A, B)),
        ("<item:A> \n<item:B> ", (A, B)),
        ("likes <item:A>, not <item:B>!", ("likes ", A, ", not ", B, "!")),
        ("<item:x y/ü:1>", (ItemMention("x y/ü:1"),)),
        ("<item:>", ("<item:>",)),
        ("<item:A", ("<item:A",)),
        ("<ITEM:A>", ("<ITEM:A>",)),
        ("<item_L0_C1>", ("<item_L0_C1>",)),
        ("<item:<item:A>>", ("<item:", A, ">")),
    ],
)
def test_items_are_cut_out(text, parts):
    assert split_mentions(text) == parts


_PIECES = st.lists(
    st.one_of(
        st.text(alphabet="ab <>:\n", max_size=5),
        st.text(alphabet="ab :", min_size=1, max_size=4).map(ItemMention),
    )
)


@given(pieces=_PIECES)
def test_nothing_is_lost(pieces):
    """Written out again, the parts are the text; what is no item holds no item."""
    text = "".join(p if isinstance(p, str) else f"<item:{p.item_id}>" for p in pieces)
    parts = split_mentions(text, keep_blank=True)
    assert "".join(p if isinstance(p, str) else f"<item:{p.item_id}>" for p in parts) == text
    for part in parts:
        if isinstance(part, str):
            assert split_mentions(part, keep_blank=True) == (part,)
