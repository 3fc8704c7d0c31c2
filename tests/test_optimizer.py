import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from pdf2lora.training.optimizer import FlatParameter, clear_gradients

SHAPES = [(8, 64), (32, 8), (5,), (1, 1), (3, 7)]


def made_up(shapes=SHAPES):
    stream = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=stream)) for shape in shapes]


def give_gradients(parameters, step):
    stream = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=stream)


def train(optimizer, parameters, *, steps=7):
    """Gives the parameters after each step; gradients are dropped between steps as the Trainer does."""
    seen = []
    for step in range(steps):
        give_gradients(parameters, step)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        seen.append([parameter.detach().clone() for parameter in parameters])
    return seen


def flat_optimizer(make, parameters):
    """As PerplexityTrainer.create_optimizer builds it."""
    flat = FlatParameter(parameters)
    optimizer = make([flat.parameter])
    optimizer.register_step_pre_hook(flat.gather_gradients)
    return optimizer, flat


def assert_same(one, other):
    for step, (left, right) in enumerate(zip(one, other, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), step


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_gives_the_same_bits_as_on_single_parameters(weight_decay):
    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=weight_decay)

    single, together = made_up(), made_up()
    optimizer, _ = flat_optimizer(make, together)

    assert_same(train(optimizer, together), train(make(single), single))
    assert not torch.equal(together[0], made_up()[0])


@pytest.mark.parametrize("shapes", [[(64, 64), (128, 64), (256, 32)]])
def test_8_bit_adamw_gives_the_same_bits_where_blocks_of_256_begin_alike(shapes):
    def make(parameters):
        return bnb.optim.AdamW8bit(parameters, lr=0.01)

    single, together = made_up(shapes), made_up(shapes)
    optimizer, flat = flat_optimizer(make, together)

    assert_same(train(optimizer, together), train(make(single), single))
    assert optimizer.state[flat.parameter]["state1"].dtype == torch.uint8


def test_parameters_become_views_with_their_numbers_and_shapes():
    parameters, before = made_up(), made_up()

    flat = FlatParameter(iter(parameters))

    assert flat.parameter.shape == (sum(parameter.numel() for parameter in before),)
    for parameter, original in zip(parameters, before, strict=True):
        assert torch.equal(parameter, original)
        assert parameter.shape == original.shape
        assert parameter.untyped_storage().data_ptr() == flat.parameter.untyped_storage().data_ptr()
    with torch.no_grad():
        flat.parameter.zero_()
    assert not any(parameter.any() for parameter in parameters)
    with torch.no_grad():
        parameters[1].fill_(2)  # as a checkpoint is loaded
    assert flat.parameter.sum() == 2 * parameters[1].numel()


def test_gradients_are_gathered_and_stay_where_they_are():
    parameters = made_up()
    flat = FlatParameter(parameters)
    give_gradients(parameters, 0)
    own = [parameter.grad for parameter in parameters]
    copies = [gradient.clone() for gradient in own]

    flat.gather_gradients()

    assert torch.equal(flat.parameter.grad, torch.cat([gradient.flatten() for gradient in copies]))
    for parameter, gradient, copy in zip(parameters, own, copies, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, copy)


def test_matrix_without_a_gradient_is_an_error():
    """Never the gradient of the step before, or that of its neighbour."""
    parameters = made_up()
    flat = FlatParameter(parameters)
    give_gradients(parameters, 0)
    parameters[1].grad = None

    with pytest.raises(RuntimeError):
        flat.gather_gradients()


def test_state_of_the_optimizer_is_loaded_again():
    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.01)

    whole, first, second = made_up(), made_up(), made_up()
    at_once = train(flat_optimizer(make, whole)[0], whole, steps=4)

    before, _ = flat_optimizer(make, first)
    train(before, first, steps=2)
    after, _ = flat_optimizer(make, second)
    with torch.no_grad():
        for parameter, trained in zip(second, first, strict=True):
            parameter.copy_(trained)
    after.load_state_dict(before.state_dict())
    for step in (2, 3):
        give_gradients(second, step)
        after.step()

    assert all(torch.equal(a, b) for a, b in zip(second, at_once[-1], strict=True))


def test_gradients_are_forgotten():
    parameters = made_up()
    give_gradients(parameters, 0)

    clear_gradients(parameters)

    assert [parameter.grad for parameter in parameters] == [None] * len(parameters)
