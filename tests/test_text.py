from pdf2lora.documents.text import words


def test_words_are_in_lower_case_without_punctuation() -> None:
    assert words("The SEA, level-rise (2.5 cm): Ärger!") == ["the", "sea", "level", "rise", "2", "5", "cm", "ärger"]


def test_characters_are_words_where_words_are_not_separated() -> None:
    assert words("数据和HBV模型，2019年") == ["数", "据", "和", "hbv", "模", "型", "2019", "年"]
    assert words("カタカナ ひらがな") == list("カタカナひらがな")
    assert words("한국어 텍스트") == ["한국어", "텍스트"]
