"""A sentencepiece tokenizer.model -> a tokenizer of the `tokenizers` library with the same ids.

The conversion uses the settings in the file: BPE or unigram pieces, the normalization rule, the space before the first
word, the removal of extra spaces, user-defined symbols, byte fallback. It then compares its ids with sentencepiece's.
Source: google/sentencepiece, src/normalizer.cc, src/bpe_model.cc, src/unigram_model.cc.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pdf2lora.errors import InputError
from pdf2lora.weights.bpe_merges import last_merge, merges_of
from pdf2lora.weights.converted_tokenizer import ConvertedTokenizer, prepend_bos
from pdf2lora.weights.sentencepiece_proto import Algorithm, PieceType, SentencePieceModel, parse_model

SPACE = "▁"  # U+2581, sentencepiece's visible space
PROBE_TEXTS = (
    " two  spaces \n\n\ttab, don't, 1234567 µ ﬁ é e\u0301 中文 🙂👩\u200d👩\u200d👧 \u00a0 ▁ ",
    "",
    " ",
    "   ",
    "one",
    "  leading",
    "trailing  ",
    "a\n\nb\r\n\tc",
    "ｆｕｌｌ　ｗｉｄｔｈ ½ ² ① ㎏ ﷺ ｶﾞ 한국어 हिन्दी Ελλάδα \u200b\ufeff\x00\x01\x7f\ufffd",
    "<s> </s> <unk> <0x0A> [UNK]",
    "1 12 123.45 −7 1,000,000",
)

# Half-width kana with a voicing mark. `tokenizers` would normalize the two characters separately; sentencepiece
# normalizes the pair. Other, rare pairs still differ: ½ before a combining accent, decomposed Korean letters.
HALF_WIDTH_KANA = {
    kana + mark: composed
    for kana in map(chr, range(0xFF66, 0xFF9E))
    for mark in "ﾞﾟ"
    if len(composed := unicodedata.normalize("NFKC", kana + mark)) == 1
}


def convert_sentencepiece(content: bytes, path: Path) -> ConvertedTokenizer:
    """The content of a sentencepiece file as a tokenizer.

    path: of the file, for error messages.

    Raises:
        InputError: the file is damaged, or it has a setting that `tokenizers` does not support.
    """
    try:
        import sentencepiece  # only these files need it
    except ImportError:
        raise InputError(
            f"{path}: this is a sentencepiece file, but the package sentencepiece is missing. "
            "Install it: pip install sentencepiece"
        ) from None

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
        model = parse_model(content)
    except (RuntimeError, OSError, ValueError, KeyError):
        raise InputError(f"{path}: this is not a sentencepiece model. Download the file again.") from None
    if reason := _not_expressible(model):
        raise _refusal(path, reason)

    tokenizer = Tokenizer(_bpe(model) if model.algorithm == Algorithm.BPE else _unigram(model))
    tokenizer.normalizer = _normalizer(model)
    if (splits := _splits(model)) is not None:
        tokenizer.pre_tokenizer = splits
    tokenizer.decoder = _decoder(model)
    _require_equal_ids(tokenizer, processor, model, path)

    names = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    tokens = {name: model.pieces[number].text if number >= 0 else None for name, number in names.items()}
    special = [piece.text for piece in model.pieces if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if tokens["bos"] is not None:
        tokenizer.post_processor = prepend_bos(tokens["bos"], names["bos"])
    return ConvertedTokenizer(
        tokenizer,
        bos_token=tokens["bos"],
        eos_token=tokens["eos"],
        pad_token=tokens["pad"] or tokens["unk"],
        unk_token=tokens["unk"],
    )


def _not_expressible(model: SentencePieceModel) -> str | None:
    """A setting that `tokenizers` does not support, or None."""
    if model.algorithm not in (Algorithm.BPE, Algorithm.UNIGRAM):
        return f"its algorithm is {model.algorithm.name}"
    if model.treat_whitespace_as_suffix:
        return "it puts spaces after words"
    if not model.escape_whitespaces:
        return "it keeps spaces as they are"
    if model.algorithm == Algorithm.BPE and _user_defined(model):
        ranks = _bpe_ranks(model)
        dead = next((piece for piece in ranks if len(piece) > 1 and last_merge(piece, ranks) is None), None)
        if dead is not None:  # with ignore_merges, it would become a token if it is a whole word
            return f"it has user-defined symbols and the piece {dead!r}, which no merge makes"
    return None


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: this sentencepiece model cannot be converted, because {reason}. "
        f'Make a tokenizer.json: AutoTokenizer.from_pretrained("{path.parent}").save_pretrained("{path.parent}")'
    )


def _user_defined(model: SentencePieceModel) -> list[str]:
    """User-defined symbols, the longest first: at each position sentencepiece uses the longest one."""
    symbols = [piece.text for piece in model.pieces if piece.type == PieceType.USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _bpe_ranks(model: SentencePieceModel) -> dict[str, float]:
    return {piece.text: -piece.score for piece in model.pieces if piece.type == PieceType.NORMAL}


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    merges = [(left, right) for left, right in merges_of(_bpe_ranks(model)) if left in vocab and right in vocab]
    return models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=_unknown(model),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(_user_defined(model)),  # _splits makes each symbol a whole word
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    unk_id = next(n for n, piece in enumerate(model.pieces) if piece.type == PieceType.UNKNOWN)
    vocab = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocab, unk_id=unk_id, byte_fallback=model.byte_fallback)


def _unknown(model: SentencePieceModel) -> str:
    return next(piece.text for piece in model.pieces if piece.type == PieceType.UNKNOWN)


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    """Steps in sentencepiece's order: the rule, extra spaces, the space before the first word, visible spaces."""
    steps: list[Any] = []
    if model.charsmap:
        if "nfkc" in model.normalizer:
            steps += [normalizers.Replace(kana, composed) for kana, composed in HALF_WIDTH_KANA.items()]
        if "nmt" in model.normalizer:
            steps.append(normalizers.Replace("\r\n", "  "))  # the rule replaces each of the two by a space
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Replace(Regex(f"[ {SPACE}]+\\z"), "")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _splits(model: SentencePieceModel) -> pre_tokenizers.PreTokenizer | None:
    """Isolates user-defined symbols. A unigram model must not read "<s>" in a text as a control token either."""
    splits: list[Any] = []
    if symbols := _user_defined(model):
        alternatives = "|".join(re.escape(symbol) for symbol in symbols)
        not_prefix = r"(?!\A)" if model.add_dummy_prefix else ""  # the space before the first word is not in the text
        splits.append(pre_tokenizers.Split(Regex(f"{not_prefix}(?:{alternatives})"), "isolated"))
    if model.algorithm == Algorithm.UNIGRAM:
        not_text = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.UNUSED)
        names = [piece.text for piece in model.pieces if piece.type in not_text]
        cuts = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1]
        if model.byte_fallback:
            cuts.append("(?<=<)(?=0x[0-9A-F]{2}>)")
        splits.append(pre_tokenizers.Split(Regex("|".join(cuts)), "isolated"))
    return pre_tokenizers.Sequence(splits) if splits else None


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _require_equal_ids(tokenizer: Tokenizer, processor: Any, model: SentencePieceModel, path: Path) -> None:
    """Raises InputError if the ids of the probe texts or of a piece differ from sentencepiece's."""
    pieces = [piece.text.replace(SPACE, " ") for piece in model.pieces]
    for text in _probes(pieces):
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.EncodeAsIds(text):
            raise _refusal(path, f"`tokenizers` splits {_excerpt(text)!r} in another way than sentencepiece")


def _probes(pieces: list[str]) -> Iterable[str]:
    yield from PROBE_TEXTS
    yield from (f"a{' ' * length}b" for length in range(1, 40))
    yield "\n".join(pieces)
    yield "".join(pieces)


def _excerpt(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
