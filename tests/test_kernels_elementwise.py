import pytest
import torch
from interpreted import cpu_kernels, needs_interpreter, present, random  # noqa: F401
from torch.nn import functional

from pdf2lora.model.kernels.elementwise import add_rmsnorm, rmsnorm_backward_, swiglu, swiglu_backward_
from pdf2lora.model.kernels.rows import quantize

pytestmark = [needs_interpreter, pytest.mark.usefixtures("cpu_kernels")]


def rmsnorm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("features", [64, 96, 100])
@pytest.mark.parametrize("add", [True, False])
def test_rmsnorm_and_its_gradient(features, add):
    residual, update, weight = random(7, features), random(7, features, seed=1), random(features, seed=2)
    x = (residual + update if add else residual.clone()).requires_grad_()
    expected = rmsnorm(x, weight)
    grad, residual_grad = random(7, features, seed=3), random(7, features, seed=4)
    expected.backward(grad)

    total, rows, rstd = add_rmsnorm(residual, update if add else None, weight, 1e-5)

    torch.testing.assert_close(total, x.detach())
    assert add or total is residual
    torch.testing.assert_close(rows.values, expected.detach())
    torch.testing.assert_close(rstd, torch.rsqrt(x.detach().pow(2).mean(-1) + 1e-5))
    for extra in (None, residual_grad):
        in_place = grad.clone()
        result = rmsnorm_backward_(in_place, total, rstd, weight, extra)
        assert result.values is in_place
        torch.testing.assert_close(in_place, x.grad + (0 if extra is None else extra), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [64, 88])
def test_swiglu_and_its_gradient(width):
    gate_up = random(7, 2 * width).requires_grad_()
    grad = random(7, width, seed=1)
    gate, up = gate_up.split(width, dim=1)
    expected = functional.silu(gate) * up
    expected.backward(grad)

    torch.testing.assert_close(swiglu(gate_up.detach()).values, expected.detach())

    in_place = gate_up.detach().clone()
    assert swiglu_backward_(grad, in_place).values is in_place
    torch.testing.assert_close(in_place, gate_up.grad, rtol=1e-4, atol=1e-5)

    with_result = gate_up.detach().clone()
    swiglu_backward_(grad, with_result, result=True)
    assert torch.equal(with_result, in_place)
    assert torch.equal(grad, present(swiglu(gate_up.detach()).values))  # the same bits as in the forward pass


def test_rows_of_the_kernels_are_quantized_like_finished_rows():
    features = 100
    residual, weight, grad = random(5, features), random(features, seed=1), random(5, features, seed=2)
    gate_up = random(5, 2 * features, seed=3)
    _, plain, rstd = add_rmsnorm(residual, None, weight, 1e-5)
    dx = rmsnorm_backward_(grad.clone(), residual, rstd, weight, None).values
    d_gate_up = swiglu_backward_(grad, gate_up.clone()).values
    pairs = [
        (add_rmsnorm(residual, None, weight, 1e-5, values=False, fp8=True)[1], plain.values),
        (rmsnorm_backward_(grad.clone(), residual, rstd, weight, None, fp8=True), dx),
        (swiglu(gate_up, values=False, fp8=True), swiglu(gate_up).values),
        (swiglu_backward_(grad, gate_up.clone(), values=False, fp8=True), d_gate_up),
    ]

    for rows, values in pairs:
        expected = quantize(present(values))
        assert torch.equal(present(rows.fp8).view(torch.uint8), present(expected.fp8).view(torch.uint8))
        assert torch.equal(present(rows.scale), present(expected.scale))
    assert pairs[0][0].values is pairs[2][0].values is pairs[3][0].values is None


@pytest.mark.parametrize("width", [64, 88])
def test_fp8_takes_the_memory_of_the_gradient(width):
    grad, gate_up = random(7, width).bfloat16(), random(7, 2 * width, seed=1).bfloat16()
    expected = quantize(present(swiglu_backward_(grad.clone(), gate_up.float().clone()).values))

    found = swiglu_backward_(grad, gate_up, values=False, fp8=True)

    assert present(found.fp8).data_ptr() == grad.data_ptr()
    assert torch.equal(present(found.fp8).view(torch.uint8), present(expected.fp8).view(torch.uint8))
    assert torch.equal(present(found.scale), present(expected.scale))


def test_gate_and_up_do_not_change_if_only_fp8_is_requested():
    gate_up = random(5, 40)
    before = gate_up.clone()

    swiglu_backward_(random(5, 20, seed=1), gate_up, values=False, fp8=True)

    assert torch.equal(gate_up, before)
