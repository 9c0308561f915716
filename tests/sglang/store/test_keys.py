"""Page hashes as keys: different names are different keys, and a lookup ends at the first miss."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from umbp_sglang.keys import block_keys, leading

NAMES = st.one_of(
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.text(max_size=70),
    st.text("0123456789abcdef ", min_size=60, max_size=70),
    st.lists(st.sampled_from(["", "a" * 63, "a" * 64, "a" * 65, "a" * 32]), min_size=1, max_size=3).map("\n".join),
)


@given(st.lists(NAMES, max_size=8, unique=True))
def test_names_and_keys_are_one_to_one(names: list[str]) -> None:
    keys = block_keys(names)
    assert [len(key) for key in keys] == [32] * len(names)
    assert len(set(keys)) == len(set(map(str.lower, names))) or len(set(keys)) == len(names)
    assert keys == [key for name in names for key in block_keys([name])], "neighbours make no difference"


def test_digits_that_a_blank_divides_are_not_the_page_hash_without_it() -> None:
    assert block_keys(["ab" * 16 + "\n" + "ab" * 16]) != block_keys(["ab" * 32])


def test_a_page_hash_is_its_own_key() -> None:
    assert block_keys(["ab" * 32]) == [bytes.fromhex("ab" * 32)]


@given(st.integers(0, 400), st.integers(0, 400))
def test_a_lookup_asks_little_beyond_the_first_miss(total: int, present: int) -> None:
    names = [f"{number:064x}" for number in range(total)]
    asked = []

    def count(keys: list[bytes]) -> int:
        asked.extend(keys)
        return sum(int.from_bytes(key, "big") < present for key in keys)

    found = min(total, present)
    assert leading(names, count) == found
    assert len(asked) <= 16 + 9 * found
