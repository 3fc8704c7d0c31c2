import pytest

from pdf2lora.documents.language import detect_language


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "The sea level rises because the ice sheets melt and the water of the oceans expands."),
        ("de", "Der Meeresspiegel steigt, weil die Eisschilde schmelzen und sich das Wasser ausdehnt."),
        ("fr", "Le niveau de la mer monte parce que les calottes glaciaires fondent."),
        ("zh", "由于冰盖融化以及海水变暖膨胀，海平面正在上升。"),
        ("he", "מפלס הים עולה משום שיריעות הקרח נמסות ומי האוקיינוסים מתפשטים."),
    ],
)
def test_the_language_of_a_text_is_known(code: str, text: str) -> None:
    assert detect_language(text) == code
    assert detect_language(text * 1000) == code


def test_a_list_of_authors_is_in_the_language_of_its_few_words() -> None:
    """With all its languages, py3langid calls this one Nigerian Pidgin (pcm)."""
    names = "Anna Schmidt (Germany), Jean Martin (France), Carlos Garcia (Spain), Liu Wei (China), Kenji Sato (Japan)"

    assert detect_language(f"Coordinating Lead Authors: {names}\nContributing Authors: {names}") == "en"
