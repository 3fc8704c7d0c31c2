"""The last merge of a token."""

import pytest

from pdf2lora.weights.bpe_merges import last_merge


@pytest.mark.parametrize(
    ("token", "ranks", "expected"),
    [
        ("ab", {"ab": 0}, ("a", "b")),
        ("abc", {"bc": 0, "ab": 1, "abc": 2}, ("a", "bc")),
        ("abc", {"ab": 0, "bc": 1, "abc": 2}, ("ab", "c")),
        ("aaaa", {"aa": 0, "aaa": 1, "aaaa": 2}, ("aa", "aa")),
        ("abc", {"abc": 0, "bc": 1}, ("a", "bc")),  # through a token of a higher rank, as in tiktoken
        ("abcd", {"bc": 0, "abcd": 1}, None),
        ("a", {}, None),
    ],
)
def test_last_merge(token: str, ranks: dict[str, float], expected: tuple[str, str] | None) -> None:
    assert last_merge(token, ranks) == expected
    as_bytes = last_merge(token.encode(), {other.encode(): rank for other, rank in ranks.items()})
    assert as_bytes == (expected and tuple(part.encode() for part in expected))
