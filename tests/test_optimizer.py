"""The flat parameter, its gradient buffer and the optimizers of train.optim."""

from collections.abc import Callable, Iterable

import bitsandbytes as bnb
import pytest
import torch
from tiny_llama import TRAIN, changed, quiet
from torch import Tensor, nn

from pdf2lora.training.optimizer import FlatParameters, build_optimizer

pytestmark = quiet
SHAPES = [(8, 64), (32, 8), (5,), (1, 1), (3, 7)]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def random_parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    stream = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=stream)) for shape in shapes]


def gradients_of(parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(100 + step)
    return [torch.randn(parameter.shape, generator=stream) for parameter in parameters]


def train_single(make: Make, parameters: list[nn.Parameter], *, steps: int = 7) -> list[list[Tensor]]:
    """The parameters after each step of an optimizer that updates each of them."""
    optimizer, values = make(parameters), []
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients_of(parameters, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        values.append([parameter.detach().clone() for parameter in parameters])
    return values


def train_flat(
    optimizer: torch.optim.Optimizer, flat: FlatParameters, *, first: int = 0, steps: int = 7
) -> list[list[Tensor]]:
    """The parameters after each step of an optimizer of the flat one."""
    values = []
    for step in range(first, first + steps):
        flat.buffer.zero_()
        for parameter, gradient in zip(flat.parameters, gradients_of(flat.parameters, step), strict=True):
            (parameter * gradient).sum().backward()
        optimizer.step()
        values.append([parameter.detach().clone() for parameter in flat.parameters])
    return values


def assert_same(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    for step, (left, right) in enumerate(zip(one, other, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), step


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_gives_the_same_bits_as_on_single_parameters(weight_decay: float) -> None:
    train = changed(TRAIN, optim="adamw_torch", weight_decay=weight_decay)
    flat = FlatParameters(random_parameters())

    values = train_flat(build_optimizer(flat.parameter, train), flat)

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=weight_decay)

    assert_same(values, train_single(make, random_parameters()))
    assert not torch.equal(values[-1][0], random_parameters()[0])


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_gives_the_same_bits_where_blocks_of_256_start_alike(optim: str) -> None:
    shapes = [(64, 64), (128, 64), (256, 32)]  # multiples of 256, and large enough for 8 bits
    flat = FlatParameters(random_parameters(shapes))
    optimizer = build_optimizer(flat.parameter, changed(TRAIN, optim=optim))

    values = train_flat(optimizer, flat)

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(parameters, lr=TRAIN.learning_rate, weight_decay=0.0)
        return optimizer

    assert_same(values, train_single(make, random_parameters(shapes)))
    assert optimizer.state[flat.parameter]["state1"].dtype == torch.uint8


def test_parameters_become_views_with_their_numbers_and_shapes() -> None:
    parameters, before = random_parameters(), random_parameters()

    flat = FlatParameters(iter(parameters))

    assert flat.parameter.shape == (sum(parameter.numel() for parameter in before),)
    for parameter, original in zip(parameters, before, strict=True):
        assert torch.equal(parameter, original)
        assert parameter.shape == original.shape
        assert parameter.untyped_storage().data_ptr() == flat.parameter.untyped_storage().data_ptr()
    with torch.no_grad():
        flat.parameter.zero_()
    assert not any(parameter.any() for parameter in parameters)


def test_parameters_in_half_precision_become_float32() -> None:
    half = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.bfloat16))
    expected = half.detach().float()

    FlatParameters([half])

    assert half.dtype == torch.float32
    assert torch.equal(half, expected)


def test_backward_passes_add_to_the_buffer() -> None:
    flat = FlatParameters(random_parameters())
    gradients = [gradients_of(flat.parameters, step) for step in range(2)]
    flat.loss.add_(5)

    for gradients_of_pass in gradients:
        sum(
            (parameter * gradient).sum() for parameter, gradient in zip(flat.parameters, gradients_of_pass, strict=True)
        ).backward()  # type: ignore[union-attr]

    expected = torch.cat([(one + other).flatten() for one, other in zip(*gradients, strict=True)])
    assert torch.equal(flat.buffer, torch.cat([expected, torch.tensor([5.0, 0.0])]))
    assert flat.parameter.grad is not None
    assert flat.parameter.grad.data_ptr() == flat.buffer.data_ptr()
    assert all(parameter.grad is not None for parameter in flat.parameters)


def test_sums_are_the_end_of_the_buffer() -> None:
    flat = FlatParameters(random_parameters())

    flat.loss.fill_(2)
    flat.stop_requests.fill_(3)

    assert flat.buffer[-2:].tolist() == [2, 3]
    assert not flat.gradient.any()


def test_new_flat_parameters_replace_earlier_ones() -> None:
    """As the probes of find_batch do, which share one model."""
    parameters = random_parameters()
    first = FlatParameters(parameters)
    second = FlatParameters(parameters)

    (parameters[0] * 2).sum().backward()

    assert not first.gradient.any()
    assert second.gradient[: parameters[0].numel()].tolist() == [2.0] * parameters[0].numel()


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"])
def test_a_loaded_state_continues_with_the_same_bits(optim: str) -> None:
    def build() -> tuple[torch.optim.Optimizer, FlatParameters]:
        flat = FlatParameters(random_parameters([(64, 64), (128, 64)]))
        return build_optimizer(flat.parameter, changed(TRAIN, optim=optim)), flat

    complete = train_flat(*build(), steps=4)
    optimizer, flat = build()
    train_flat(optimizer, flat, steps=2)
    state = optimizer.state_dict()
    resumed_optimizer, resumed = build()
    with torch.no_grad():
        resumed.parameter.copy_(flat.parameter)

    resumed_optimizer.load_state_dict(state)

    assert_same(train_flat(resumed_optimizer, resumed, first=2, steps=2), complete[2:])


@pytest.mark.parametrize(
    ("optim", "bits", "is_paged"),
    [
        ("adamw_8bit", 8, False),
        ("paged_adamw_8bit", 8, True),
        ("paged_adamw_32bit", 32, True),
        ("adamw_torch", None, None),
        ("adamw_torch_fused", None, None),
    ],
)
def test_every_optimizer_of_params(optim: str, bits: int | None, is_paged: bool | None) -> None:
    flat = FlatParameters(random_parameters())

    optimizer = build_optimizer(flat.parameter, changed(TRAIN, optim=optim, learning_rate=0.003, weight_decay=0.1))

    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.1)
    assert tuple(group["betas"]) == (0.9, 0.999)
    assert group["eps"] == 1e-8
    assert len(group["params"]) == 1
    assert group["params"][0] is flat.parameter
    if bits is None:
        assert type(optimizer) is torch.optim.AdamW
        assert bool(group["fused"]) == (optim == "adamw_torch_fused")
    else:
        assert isinstance(optimizer, bnb.optim.AdamW)
        assert (optimizer.args.optim_bits, optimizer.is_paged) == (bits, is_paged)
