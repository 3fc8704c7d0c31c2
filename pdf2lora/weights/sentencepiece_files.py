"""Llama 1's and 2's tokenizer.model, a sentencepiece BPE model.

Source: google/sentencepiece, src/bpe_model.cc.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from pdf2lora.errors import InputError
from pdf2lora.weights.bpe_merges import merges_of
from pdf2lora.weights.converted_tokenizer import ConvertedTokenizer, prepend_bos

SPACE = "▁"  # U+2581, sentencepiece's visible space
# Another normalizer than Llama's would change some of this text.
PROBE_TEXT = " two  spaces \n\n\ttab, don't, 1234567 µ ﬁ é e\u0301 中文 🙂👩\u200d👩\u200d👧 \u00a0 ▁ "


def convert_sentencepiece(content: bytes, path: Path) -> ConvertedTokenizer:
    """The content of a sentencepiece file as a tokenizer.

    path: of the file, for error messages.

    Raises:
        InputError: the file is damaged, or the model is of another kind than Llama's.
    """
    try:
        import sentencepiece  # only Llama 1 and 2 need it
    except ImportError:
        raise InputError(
            f"{path}: this is a sentencepiece file, but the package sentencepiece is missing. "
            "Install it: pip install sentencepiece"
        ) from None

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError):
        raise InputError(f"{path}: this is not a sentencepiece model. Download the file again.") from None

    size = processor.GetPieceSize()
    pieces = [processor.IdToPiece(n) for n in range(size)]
    special_ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    if absent := [name for name, n in special_ids.items() if n < 0]:
        raise InputError(
            f"{path}: the model lacks the {absent[0]} token, which Llama 1 and 2 have. Download the file again."
        )
    unk, bos, eos = (pieces[n] for n in special_ids.values())

    vocab = {piece: n for n, piece in enumerate(pieces)}
    not_text = (processor.IsControl, processor.IsUnknown, processor.IsByte, processor.IsUnused)
    ranks = {piece: -processor.GetScore(n) for n, piece in enumerate(pieces) if not any(is_(n) for is_ in not_text)}
    merges = [(left, right) for left, right in merges_of(ranks) if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = prepend_bos(bos, vocab[bos])

    # The file also defines an algorithm, a normalizer and user-defined symbols. Llama uses BPE and neither of the other
    # two. The ids of every piece and of the probe text show whether this file does the same.
    text = PROBE_TEXT + "\n".join(pieces[n].replace(SPACE, " ") for n in range(size) if pieces[n] in ranks)
    if tokenizer.encode(text, add_special_tokens=False).ids != processor.EncodeAsIds(text):
        raise InputError(
            f"{path}: this sentencepiece model differs from Llama's (BPE, no normalization, a space before the first "
            "word, no user-defined symbols). Use the tokenizer.model of the source model."
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (unk, bos, eos)])
    return ConvertedTokenizer(tokenizer, bos_token=bos, eos_token=eos, pad_token=unk, unk_token=unk)
