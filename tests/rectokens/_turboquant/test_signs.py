import numpy as np
import pytest

from rectokens._turboquant.signs import sign_bytes, sign_words, signs

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_mix_is_splitmix64():
    # First outputs of SplitMix64 from state 0, as published with the generator's test vectors.
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert mix(2 * GOLDEN & MASK) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize(
    ("seed", "round_index", "words"),
    [
        (42, 0, [0x57E1FABA65107204, 0xF4ABD143FEB24055, 0x7C816738C12903B2]),
        (42, 1, [0x56D7972FC2ED230D, 0x2491B4C28A5D95D6]),
        (0, 0, [0xA706DD2F4D197E6F]),
        (MASK, 0, [0x5DC20AA7B2A27137]),
    ],
)
def test_golden_words(seed, round_index, words):
    assert sign_words(seed, round_index, len(words)).tolist() == words


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63, MASK])
@pytest.mark.parametrize("round_index", [0, 1])
def test_words_follow_the_definition_in_plain_integers(seed, round_index):
    key = mix((seed + GOLDEN) & MASK)
    expected = [mix((key + ((round_index << 32) + w + 1) * GOLDEN) & MASK) for w in range(50)]
    assert sign_words(seed, round_index, 50).tolist() == expected


def test_bit_i_is_sign_i_and_a_short_row_is_a_prefix():
    word = int(sign_words(42, 0, 1)[0])
    expected = [-1.0 if word >> i & 1 else 1.0 for i in range(64)]
    assert signs(42, 0, 64).tolist() == expected
    assert signs(42, 0, 16).tolist() == expected[:16]
    assert sign_bytes(42, 0, 64).hex() == "04721065bafae157"
    assert sign_bytes(42, 1, 64).hex() == "0d23edc22f97d756"


def test_signs_are_balanced_and_rounds_differ():
    first, second = signs(42, 0, 1 << 16), signs(42, 1, 1 << 16)
    # Five standard deviations of a fair coin.
    assert abs(first.sum()) < 5 * 2**8
    assert abs(np.dot(first, second)) < 5 * 2**8
    assert abs(np.dot(first[1:], first[:-1])) < 5 * 2**8


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=str(seed)):
        sign_words(seed, 0, 1)
