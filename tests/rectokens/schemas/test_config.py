import pytest

from rectokens.schemas.config import GenerationConfig, check_generation_config


def test_defaults():
    assert GenerationConfig(3) == (3, 1, 1, 1.0, "default")
    assert GenerationConfig._fields == ("steps", "k", "beam_size", "temperature", "csr_kernel")
    check_generation_config(GenerationConfig(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"k": 0}, "k is 0"),
        ({"beam_size": -1}, "beam_size is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"csr_kernel": "fast"}, "'fast'; allowed are default, sample, topk"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_generation_config(GenerationConfig(3)._replace(**change))
