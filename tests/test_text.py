from pdf2lora.documents.text import words


def test_words_are_in_lower_case_without_punctuation() -> None:
    assert words("The SEA, level-rise (2.5 cm): Ärger!") == ["the", "sea", "level", "rise", "2", "5", "cm", "ärger"]
