from __future__ import annotations

import pytest

from rectokens.prompts.recipe import PromptRecipe


def test_values():
    recipe = PromptRecipe("item_history", 1, {"max_items": 3})
    assert recipe == PromptRecipe(builder="item_history", version=1, params={"max_items": 3})
    assert PromptRecipe("x", 2).params == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("", 1, {}), "builder is ''"),
        ((3, 1, {}), "builder is 3"),
        (("x", 0, {}), "version is 0"),
        (("x", True, {}), "version is True"),
        (("x", "1", {}), "version is '1'"),
        (("x", 1, []), "params is"),
        (("x", 1, {1: 2}), "params is"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        PromptRecipe(*values)
