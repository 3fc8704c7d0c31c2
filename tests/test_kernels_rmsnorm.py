import pytest
import torch
from interpreted import cpu_kernels, random  # noqa: F401

from pdf2lora.model.kernels.rmsnorm import add_rmsnorm, rmsnorm_backward_

pytestmark = pytest.mark.usefixtures("cpu_kernels")


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
