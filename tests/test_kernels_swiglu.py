import pytest
import torch
from interpreted import cpu_kernels, present, random  # noqa: F401
from torch.nn import functional

from pdf2lora.model.kernels.rows import Format, quantize
from pdf2lora.model.kernels.swiglu import swiglu, swiglu_backward_

pytestmark = pytest.mark.usefixtures("cpu_kernels")


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


@pytest.mark.parametrize("width", [64, 88])
def test_fp8_takes_the_memory_of_the_gradient(width):
    grad, gate_up = random(7, width).bfloat16(), random(7, 2 * width, seed=1).bfloat16()
    expected = quantize(present(swiglu_backward_(grad.clone(), gate_up.float().clone()).values))

    found = swiglu_backward_(grad, gate_up, Format(values=False, fp8=True))

    assert present(found.fp8).data_ptr() == grad.data_ptr()
    assert torch.equal(present(found.fp8).view(torch.uint8), present(expected.fp8).view(torch.uint8))
    assert torch.equal(present(found.scale), present(expected.scale))


def test_fp8_with_columns_for_lora_has_its_own_memory():
    grad, gate_up = random(7, 64).bfloat16(), random(7, 128, seed=1).bfloat16()
    expected = quantize(present(swiglu_backward_(grad.clone(), gate_up.float().clone()).values))

    found = swiglu_backward_(grad, gate_up, Format(values=False, fp8=True, lora_columns=48))

    assert present(found.fp8).shape == (7, 176)
    assert torch.equal(present(found.fp8)[:, :128].float(), present(expected.fp8).float())


def test_gate_and_up_do_not_change_if_only_fp8_is_requested():
    gate_up = random(5, 40)
    before = gate_up.clone()

    swiglu_backward_(random(5, 20, seed=1), gate_up, Format(values=False, fp8=True))

    assert torch.equal(gate_up, before)
