"""Dropout as a function of a counter: pdf2lora/model/dropout.py, on the CPU and in Triton's interpreter."""

import numpy as np
import pytest
import torch
from interpreted import cpu_kernels  # noqa: F401
from tiny_families import write_tiny_family
from tiny_llama import COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, fill_b, quiet

from pdf2lora.model import dropout
from pdf2lora.model.dropout import CounterDropout, DropoutRate, DropoutState, dropout_state, keep_mask
from pdf2lora.model.forward import build_forward
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.runtime.manifest import write_manifest

pytestmark = quiet
CPU = torch.device("cpu")


def mask(p, shape, *, seed=7, first_sequence=0, layer_index=0, seq_length=1):
    state = torch.tensor([seed, first_sequence])
    return keep_mask(state, layer_index, shape[0], seq_length, shape[1], DropoutRate(p))


def assert_share(mask, share):
    """Within five standard deviations of the binomial distribution."""
    deviation = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs(mask.float().mean().item() - share) <= 5 * deviation


def test_philox_is_the_published_function():
    """Known answer for ten rounds from Random123 (kat_vectors): counter and key of the digits of pi."""
    counter = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    c0, c1, c2, c3 = (np.array([[word]], dtype=np.uint64) for word in counter)

    result = dropout.philox(c0, c1, c2, c3, 0x299F31D0 << 32 | 0xA4093822, rounds=10)

    assert [int(word.item()) for word in result] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share_of_each_feature_and_token(p):
    kept = mask(p, (400, 104))

    assert_share(kept, 1 - p)
    for part in (*kept.split(1, dim=1), *kept.split(50, dim=0)):
        assert_share(part, 1 - p)
    equal_share = p**2 + (1 - p) ** 2  # of independent draws
    assert_share(kept[:, 1:] == kept[:, :-1], equal_share)
    assert_share(kept[1:] == kept[:-1], equal_share)


def test_the_largest_rate_keeps_some_features():
    assert DropoutRate(0.999_999).threshold == 65_535
    assert DropoutRate(0.999_999).scale == 65_536


def test_rate_is_rounded_and_its_scale_is_exact():
    assert (DropoutRate(0.0).threshold, DropoutRate(0.0).scale) == (0, 1)
    assert DropoutRate(0.1).threshold == 6554
    assert DropoutRate(0.1).scale == 1 / (1 - 6554 / 65536)


def test_masks_of_other_seeds_layers_and_distant_tokens_are_independent():
    masks = [mask(0.3, (70, 104), seed=seed) for seed in (0, 1, 2, 2**32, 2**62)]
    masks += [mask(0.3, (70, 104), seed=0, layer_index=index) for index in (1, 2)]
    masks += [mask(0.3, (70, 104), seed=0, first_sequence=position) for position in (2**32, 2**40)]

    for number, one in enumerate(masks):
        for other in masks[number + 1 :]:
            assert_share(one == other, 0.3**2 + 0.7**2)


@pytest.mark.parametrize("features", [104, 63])
def test_mask_of_some_rows_is_a_part_of_the_mask_of_all(features):
    every = mask(0.3, (8 * 5, features), seq_length=5)

    assert torch.equal(mask(0.3, (4 * 5, features), seq_length=5, first_sequence=4), every[4 * 5 :])


def test_size_of_the_blocks_does_not_change_the_mask(monkeypatch):
    expected = mask(0.3, (70, 100))

    monkeypatch.setattr(dropout, "CALLS_PER_BLOCK", 50)

    assert torch.equal(mask(0.3, (70, 100)), expected)


@pytest.mark.parametrize("shape", [(40, 104), (7, 300), (33, 63)])
@pytest.mark.parametrize(("seed", "first_sequence"), [(0, 0), (3, 5), (2**40 + 1, 2**33)])
def test_kernel_draws_the_same_mask(shape, seed, first_sequence):
    from pdf2lora.model.kernels.dropout import keep_mask as kernel_mask

    state, threshold = torch.tensor([seed, first_sequence]), DropoutRate(0.3).threshold

    found = kernel_mask(state, 9, shape[0], 5, shape[1], threshold)

    assert torch.equal(found, mask(0.3, shape, seed=seed, first_sequence=first_sequence, layer_index=9, seq_length=5))


# the module


def test_module_scales_the_features_that_it_keeps_and_their_gradient():
    state = DropoutState(CPU)
    state.set(7, 0)
    module, x = CounterDropout(0.3, 2, state), torch.randn(2, 5, 24).requires_grad_()
    expected = mask(0.3, (10, 24), layer_index=2, seq_length=5).view(2, 5, 24) * DropoutRate(0.3).scale

    y = module(x)
    y.backward(torch.ones_like(y))

    torch.testing.assert_close(y, x * expected)
    torch.testing.assert_close(x.grad, expected)
    assert module.eval()(x) is x


def test_inputs_without_a_dimension_of_sequences_have_the_same_masks():
    """OPT's MLP gets (batch * seq_length, features)."""
    state = DropoutState(CPU)
    state.set(7, 3)
    state.seq_length = 5
    module, x = CounterDropout(0.3, 2, state), torch.randn(2, 5, 24)

    assert torch.equal(module(x.flatten(0, 1)), module(x).flatten(0, 1))


def test_opt_draws_the_same_masks_in_every_micro_batch(tmp_path):
    sizes = {"ffn_dim": 128, "word_embed_proj_dim": 64}
    base = write_tiny_family(tmp_path / "base", "OPTForCausalLM", "opt", **sizes)
    write_manifest(base)
    forward = build_forward(adapted(base, 0.3, bits=16, target_modules="all-linear"), "reference")
    ids = torch.randint(VOCABULARY_SIZE, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward.set_dropout(3, 0)
        every = forward(ids)
        forward.set_dropout(3, 2)
        second_half = forward(ids[2:])

    torch.testing.assert_close(second_half, every[2:], rtol=1e-4, atol=1e-4)


def test_training_without_a_seed_is_an_error():
    with pytest.raises(RuntimeError, match=r"call forward\.set_dropout"):
        CounterDropout(0.3, 0, DropoutState(CPU))(torch.ones(1, 2, 8))


def adapted(base, p, *, bits=4, **changes):
    torch.manual_seed(0)
    causal_lm = load_base(base, changed(QUANTIZATION, bits=bits), COMPUTE)
    return fill_b(add_lora(causal_lm, changed(LORA, lora_dropout=p, **changes))).train()


def test_lora_layers_share_a_state_and_have_their_own_masks(base):
    model = adapted(base, 0.1)

    modules = [module for module in model.modules() if isinstance(module, CounterDropout)]

    assert [module.layer_index for module in modules] == list(range(2 * 4))
    assert {id(module.state) for module in modules} == {id(dropout_state(model))}
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]


def test_model_without_dropout_needs_no_seed(base):
    model = adapted(base, 0.0)

    assert dropout_state(model) is None
    forward = build_forward(model, "reference")
    forward.set_dropout(1, 2)
    forward(torch.zeros(1, 8, dtype=torch.int64, device=model.device))


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.usefixtures("cpu_kernels")
def test_rows_draw_the_same_masks_in_every_micro_batch(base, kernels):
    """The last four sequences of a batch of 8 are a batch of 4 with first_sequence 4."""
    forward = build_forward(adapted(base, 0.3), kernels)
    ids = torch.randint(VOCABULARY_SIZE, (8, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward.set_dropout(3, 0)
        every = forward(ids)
        forward.set_dropout(3, 4)
        second_half = forward(ids[4:])
        forward.set_dropout(4, 4)
        other_seed = forward(ids[4:])

    torch.testing.assert_close(second_half, every[4:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other_seed, every[4:], atol=1e-2)
