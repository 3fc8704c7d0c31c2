import pytest

from pdf2lora.documents.characters import clean_characters, collapse_spaces


@pytest.mark.parametrize(
    "text",
    [
        "10³ m³ per s, 5 km², 2½ times x² + y², Eq. 3¹, CO₂, 10⁻⁶",
        "数据，模型。（观测）：“水”！",
        "Ⅳ ① ™ … ㎡ ﷺ 5 µm ´",
        "한국어 텍스트",
        "Ελληνικά, русский, हिन्दी, ไทย",
        "\u06dd\u0661 \u0600\u0662 عـــام",
    ],
    ids=["superscripts", "full_width_punctuation", "symbols", "korean", "scripts", "arabic_number_signs"],
)
def test_characters_with_a_meaning_stay(text: str) -> None:
    assert clean_characters(text) == (text, 0)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("e\ufb03cient \ufb01sh", "efficient fish"),
        ("𝑓(𝑥) = ℎ", "f(x) = h"),
        ("ＡＢ１２", "AB12"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("\ufee3\ufeae\ufea3\ufe92\ufe8e", "مرحبا"),
        ("\u0645\ufe76\u062f \u0645\ufe77\u062f \u0645\ufc60\u062f \u0645\ufcf2\u062f", "مَد مَد مَّد مَّد"),
        ("\u2f00\u2f08", "一人"),
        ("a\u00a0b\u3000c\u2011d", "a b c-d"),
        ("cafe\u0301", "café"),
    ],
    ids=[
        "ligatures",
        "mathematical",
        "wide_letters",
        "narrow_kana",
        "arabic_forms",
        "arabic_marks",
        "radicals",
        "no_break",
        "composed",
    ],
)
def test_forms_of_letters_become_letters(text: str, plain: str) -> None:
    assert clean_characters(text) == (plain, 0)


def test_removed_characters_are_counted() -> None:
    assert clean_characters("a\x01b\ue000c\ufffd\u200bd\t\0") == ("a bc d ", 5)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("是 任 意 自 然 数", "是任意自然数"),
        ("整数 ） 。 规定 ， 我们", "整数）。规定，我们"),
        ("单位 数量 价格", "单位 数量 价格"),
        ("模型 HBV 的 结果", "模型 HBV 的 结果"),
        ("a  b   c", "a b c"),
        ("한국어 텍스트 입니다", "한국어 텍스트 입니다"),
    ],
    ids=["spaced_out", "punctuation", "table_cells", "latin_name", "latin", "korean"],
)
def test_spaces_inside_chinese_text_are_removed(line: str, expected: str) -> None:
    assert collapse_spaces(line) == (expected, 0)


def test_dot_leaders_are_counted() -> None:
    assert collapse_spaces("Introduction ........ 7 ____________ 8") == ("Introduction 7 8", 2)
    assert collapse_spaces("他说……然后") == ("他说……然后", 0)
