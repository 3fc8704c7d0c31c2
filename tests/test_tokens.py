import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import BOS, CONTEXT_LENGTH, END_OF_TURN, EOS, PAD, byte_tokenizer, write_tiny_llama
from tiny_meta import rewrite_json
from tokenizers import Tokenizer, models

from pdf2lora.errors import InputError
from pdf2lora.token_files import TokenFile, encode_texts, write_tokens
from pdf2lora.tokens import IGNORED, Encoder, MixedSequences, Sequences, require_context, windows


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder.load(base)


def numbered(*lengths):
    """Documents in which no token occurs twice."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


# Encoder


def test_encoder_reads_the_ids_around_a_document(encoder):
    assert (encoder.bos, encoder.eos) == (BOS, EOS)


def test_encoder_uses_the_first_of_several_eos(tmp_path):
    encoder = Encoder.load(write_tiny_llama(tmp_path, eos=[EOS, END_OF_TURN]))

    assert encoder.eos == EOS


def test_encode_adds_no_special_tokens(encoder):
    (tokens,) = encoder.encode(["ice"])

    assert tokens.dtype == np.int64
    assert len(tokens) == 3
    assert encoder.encode([""])[0].shape == (0,)


def test_truncation_and_padding_of_tokenizer_json_do_not_count():
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(pad_id=PAD, length=8)

    encoder = Encoder.from_json(tokenizer.to_str(), BOS, EOS)

    assert [len(tokens) for tokens in encoder.encode(["the sea", "ice"])] == [7, 3]


def test_special_token_in_a_document_is_encoded_as_text(encoder):
    text = "the sea <|end_of_text|> rises <|begin_of_text|>"

    (tokens,) = encoder.encode([text])

    assert len(tokens) == len(text)
    assert tokens.max() < BOS


def test_a_pickled_encoder_gives_the_same_tokens(encoder):
    text = "the sea <|end_of_text|> rises"

    copy = pickle.loads(pickle.dumps(encoder))

    assert copy.encode([text])[0].tolist() == encoder.encode([text])[0].tolist()
    assert (copy.bos, copy.eos) == (encoder.bos, encoder.eos)


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_texts_are_encoded_independently_and_without_loss(encoder, texts):
    encoded = encoder.encode(texts)

    assert [encoder.tokenizer.decode(tokens.tolist()) for tokens in encoded] == texts
    for text, tokens in zip(texts, encoded, strict=True):
        np.testing.assert_array_equal(tokens, encoder.encode([text])[0])


def test_seq_length_may_equal_the_context(base):
    require_context(base, {"compute.seq_length": CONTEXT_LENGTH})


def test_seq_length_longer_than_the_context_is_an_error(base):
    with pytest.raises(InputError) as caught:
        require_context(base, {"compute.seq_length": CONTEXT_LENGTH + 1})

    assert str(caught.value) == (
        "compute.seq_length is 129; the base model's context is 128 tokens. "
        "Use a smaller value in params.yaml or with -S compute.seq_length=..."
    )


# Sequences


def pack(documents, *, bos, eos, seq_length):
    """The sequences of these documents, and all their inputs and targets."""
    sequences = Sequences(np.concatenate([[bos, *tokens, eos] for tokens in documents]).astype(np.int32), seq_length)
    return sequences, *sequences.batch(np.arange(len(sequences)))


def test_a_sequence_continues_where_the_one_before_ends():
    _, inputs, targets = pack([np.array([1, 2, 3]), np.array([4])], bos=8, eos=9, seq_length=4)

    assert inputs.tolist() == [[8, 1, 2, 3], [9, 8, 4, 9]]
    assert targets.tolist() == [[1, 2, 3, 9], [8, 4, 9, IGNORED]]
    assert inputs.dtype == targets.dtype == np.int64


def test_a_batch_has_the_rows_in_their_order():
    sequences, inputs, targets = pack(numbered(40), bos=98, eos=99, seq_length=8)

    some_inputs, some_targets = sequences.batch(np.array([3, 0]))

    np.testing.assert_array_equal(some_inputs, inputs[[3, 0]])
    np.testing.assert_array_equal(some_targets, targets[[3, 0]])


@pytest.mark.parametrize(
    ("length", "num_sequences", "num_padding"),
    [(0, 1, 7), (1, 1, 6), (6, 1, 1), (7, 1, 0), (8, 2, 7), (15, 2, 0), (16, 3, 7)],
)
def test_last_sequence_is_padded_with_eos_without_targets(length, num_sequences, num_padding):
    sequences, inputs, targets = pack(numbered(length), bos=98, eos=99, seq_length=8)

    assert len(sequences) == num_sequences
    padding = targets.ravel() == IGNORED
    assert padding.sum() == num_padding
    assert padding[len(padding) - num_padding :].all()
    assert (inputs.ravel()[padding] == 99).all()


def test_num_targets_counts_the_targets_of_some_sequences():
    packed, _, _ = pack(numbered(9), bos=98, eos=99, seq_length=8)

    assert packed.num_targets(np.array([0])) == 8
    assert packed.num_targets(np.array([1])) == 2
    assert packed.num_targets(np.array([0, 1])) == 10


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    seq_length=st.integers(1, 30),
)
def test_every_token_except_the_first_is_a_target_once(lengths, seq_length):
    documents = numbered(*lengths)

    sequences, all_inputs, all_targets = pack(documents, bos=998, eos=999, seq_length=seq_length)

    has_target = all_targets != IGNORED
    inputs, targets = all_inputs[has_target], all_targets[has_target]
    assert sequences.num_targets(np.arange(len(sequences))) == len(targets)
    np.testing.assert_array_equal(targets[targets < 998], np.arange(sum(lengths)))
    assert inputs[0] == 998
    np.testing.assert_array_equal(inputs[1:], targets[:-1])  # each target is the next input
    assert np.count_nonzero(inputs == 998) == np.count_nonzero(targets == 999) == len(documents)
    assert all_inputs.shape == all_targets.shape == (len(sequences), seq_length)
    assert all_targets.size - len(targets) < seq_length


# windows

NUMBERED_BOS = 9999


def scored(window):
    """Position in the window -> the token that is scored there."""
    return {int(i): int(window.targets[i]) for i in np.flatnonzero(window.targets != IGNORED)}


def test_windows_of_a_document_by_hand():
    first, second, third = windows([np.arange(0)] * 3 + [np.arange(7)], bos=9, seq_length=4, stride=2)

    assert [window.document for window in (first, second, third)] == [3, 3, 3]
    assert first.input_ids.tolist() == [9, 0, 1, 2]
    assert first.targets.tolist() == [0, 1, 2, 3]
    assert second.input_ids.tolist() == [1, 2, 3, 4]
    assert second.targets.tolist() == [IGNORED, IGNORED, 4, 5]
    assert third.input_ids.tolist() == [2, 3, 4, 5]
    assert third.targets.tolist() == [IGNORED, IGNORED, IGNORED, 6]


def test_document_shorter_than_a_window():
    (window,) = windows([np.arange(3)], bos=9, seq_length=6, stride=2)

    assert window.input_ids.tolist() == [9, 0, 1, 9, 9, 9]
    assert window.targets.tolist() == [0, 1, 2, IGNORED, IGNORED, IGNORED]


def test_document_as_long_as_a_window_is_one_window():
    assert len(windows([np.arange(6)], bos=9, seq_length=6, stride=2)) == 1
    assert len(windows([np.arange(7)], bos=9, seq_length=6, stride=2)) == 2


def test_stride_of_a_whole_window_scores_every_position():
    document_windows = windows([np.arange(8)], bos=9, seq_length=4, stride=4)

    assert [list(scored(window).values()) for window in document_windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_empty_document_has_no_window():
    assert windows([np.arange(0)], bos=9, seq_length=4, stride=2) == []


@settings(deadline=None)
@given(length=st.integers(0, 90), seq_length=st.integers(1, 24), data=st.data())
def test_each_token_is_scored_once_after_enough_context(length, seq_length, data):
    stride = data.draw(st.integers(1, seq_length), label="stride")

    document_windows = windows([np.arange(length)], bos=NUMBERED_BOS, seq_length=seq_length, stride=stride)

    assert [target for window in document_windows for target in scored(window).values()] == list(range(length))
    for window in document_windows:
        assert window.input_ids.shape == window.targets.shape == (seq_length,)
        for position, target in scored(window).items():
            read = window.input_ids[: position + 1].tolist()
            before = [NUMBERED_BOS, *range(target)]
            assert read == before[-len(read) :]  # up to the token before the target, with no gap
            assert len(read) >= min(len(before), seq_length - stride)


@settings(deadline=None)
@given(length=st.integers(1, 90), seq_length=st.integers(1, 24), data=st.data())
def test_padding_comes_last_and_is_not_scored(length, seq_length, data):
    stride = data.draw(st.integers(1, seq_length), label="stride")

    *whole, last = windows([np.arange(length)], bos=NUMBERED_BOS, seq_length=seq_length, stride=stride)

    num_padding = max(0, seq_length - length)
    assert (last.targets[seq_length - num_padding :] == IGNORED).all()
    assert (last.input_ids[seq_length - num_padding :] == NUMBERED_BOS).all()
    assert max(scored(last)) == seq_length - num_padding - 1
    for window in whole:
        assert max(scored(window)) == seq_length - 1


def test_without_bos_only_eos_separates_documents(tmp_path):
    base = write_tiny_llama(tmp_path)
    rewrite_json(base / "config.json", bos_token_id=None)
    encoder = Encoder.load(base)
    a, b = encoder.encode(["sea", "ice"])
    write_tokens(tmp_path, "train", encode_texts(encoder, ["sea", "ice"]), encoder)
    tokens = TokenFile.open(tmp_path, "train")

    inputs, targets = tokens.sequences(8).batch(np.array([0]))
    [window, _] = tokens.windows(seq_length=8, stride=8)

    assert inputs.tolist() == [[*a, EOS, *b, EOS]]
    assert targets.tolist() == [[*a[1:], EOS, *b, EOS, IGNORED]]
    assert window.input_ids[:3].tolist() == [EOS, *a[:2]]  # so that the first token is scored too
    assert window.targets[:3].tolist() == a.tolist()


def test_mixed_sequences_are_those_of_both_texts() -> None:
    corpus = Sequences(np.arange(0, 27, dtype=np.int32), 8)
    replay = Sequences(np.arange(100, 120, dtype=np.int32), 8)
    mixed = MixedSequences(corpus, replay)

    inputs, targets = mixed.batch(np.array([5, 0, 3, 6]))

    assert len(mixed) == 4 + 3
    expected = [replay.batch(np.array([1])), corpus.batch(np.array([0])), corpus.batch(np.array([3]))]
    expected.append(replay.batch(np.array([2])))
    assert inputs.tolist() == [rows[0].tolist() for rows, _ in expected]
    assert targets.tolist() == [rows[0].tolist() for _, rows in expected]
    for indices in ([5, 0, 3, 6], [0], [6]):
        assert mixed.num_targets(np.array(indices)) == (mixed.batch(np.array(indices))[1] != IGNORED).sum()
    assert mixed.num_replay_targets(np.array([0, 5, 6])) == 8 + 3
    assert mixed.num_replay_targets(np.array([0, 1])) == 0


def test_an_empty_stream_has_no_sequence() -> None:
    assert len(Sequences(np.empty(0, dtype=np.int32), 8)) == 0


def test_a_unigram_model_reads_special_tokens_as_text() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "<s>/at")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    encoder = Encoder.from_json(tokenizer.to_str(), 1, 2)

    [tokens] = pickle.loads(pickle.dumps(encoder)).encode(["<s>at</s>"])

    assert [pieces[token][0] for token in tokens] == list("<s>at</s>")
