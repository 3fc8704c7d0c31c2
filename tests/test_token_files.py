"""The files of data/tokens, and sequences and windows as views of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import BOS, EOS, byte_tokenizer

from pdf2lora import token_files
from pdf2lora.token_files import TokenFile, encode_texts, write_tokens
from pdf2lora.tokens import Encoder

TEXTS = ["the sea", "", "ice", "a longer text about rivers"]
ENCODERS = [Encoder(byte_tokenizer(), bos=BOS, eos=EOS), Encoder(byte_tokenizer(), bos=None, eos=EOS)]


def stream_of(texts, encoder):
    start = [] if encoder.bos is None else [encoder.bos]
    return [token for tokens in encoder.encode(texts) for token in (*start, *tokens.tolist(), encoder.eos)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_stream_has_bos_and_eos_around_each_document(tmp_path, encoder):
    counts = write_tokens(tmp_path, "train", encode_texts(encoder, iter(TEXTS)), encoder)

    tokens = TokenFile.open(tmp_path, "train")
    assert tokens.stream.tolist() == stream_of(TEXTS, encoder)
    assert [document.tolist() for document in tokens.documents()] == [t.tolist() for t in encoder.encode(TEXTS)]
    assert counts == {"documents": 4, "tokens": sum(map(len, TEXTS))}


def test_a_token_has_4_bytes_and_the_files_are_plain_arrays(tmp_path):
    write_tokens(tmp_path, "train", encode_texts(ENCODERS[0], ["x" * 10_000]), ENCODERS[0])

    assert 40_000 < (tmp_path / "train.npy").stat().st_size < 40_200
    assert np.load(tmp_path / "train.npy").dtype == np.int32


def test_the_arrays_are_memory_mapped(tmp_path):
    write_tokens(tmp_path, "train", encode_texts(ENCODERS[0], TEXTS), ENCODERS[0])
    tokens = TokenFile.open(tmp_path, "train")

    assert tokens.stream.base is not None
    assert not tokens.stream.flags.writeable
    assert isinstance(tokens.stream.base, np.memmap)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_split_without_documents(tmp_path, encoder):
    assert write_tokens(tmp_path, "validation", encode_texts(encoder, []), encoder) == {"documents": 0, "tokens": 0}

    tokens = TokenFile.open(tmp_path, "validation")
    assert tokens.windows(seq_length=4, stride=2) == []
    assert list(tokens.documents()) == []


@pytest.mark.parametrize("encoder", ENCODERS)
def test_windows_start_with_the_token_before_a_document(tmp_path, encoder):
    write_tokens(tmp_path, "test", encode_texts(encoder, ["sea", "ice"]), encoder)

    windows = TokenFile.open(tmp_path, "test").windows(seq_length=3, stride=3)

    assert [window.document for window in windows] == [0, 1]
    assert [window.input_ids[0] for window in windows] == [encoder.start] * 2
    assert [window.targets.tolist() for window in windows] == [t.tolist() for t in encoder.encode(["sea", "ice"])]


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text(max_size=30), max_size=8), limit=st.integers(1, 60))
def test_the_files_do_not_depend_on_the_size_of_a_batch(tmp_path_factory, texts, limit):
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        write_tokens(folder, "whole", encode_texts(ENCODERS[0], texts), ENCODERS[0])
        patch.setattr(token_files, "MAX_BATCH_CHARACTERS", limit)
        write_tokens(folder, "batches", encode_texts(ENCODERS[0], texts), ENCODERS[0])

    for name in ("", "_documents"):
        assert (folder / f"whole{name}.npy").read_bytes() == (folder / f"batches{name}.npy").read_bytes()


def test_texts_are_read_a_batch_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_BATCH_CHARACTERS", 10)
    events = []

    class Recorder(Encoder):
        def encode(self, texts):
            events.append(len(texts))
            return super().encode(texts)

    def texts():
        for number in range(4):
            events.append("read")
            yield "x" * (4 if number < 3 else 100)

    encoder = Recorder(byte_tokenizer(), bos=BOS, eos=EOS)
    write_tokens(tmp_path, "train", encode_texts(encoder, texts()), encoder)

    assert events == ["read", "read", "read", 2, "read", 1, 1]
