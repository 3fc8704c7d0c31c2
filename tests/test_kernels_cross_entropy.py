import pytest
import torch
from interpreted import cpu_kernels, random  # noqa: F401
from torch.nn import functional

from pdf2lora.model.kernels.cross_entropy import cross_entropy_
from pdf2lora.tokens import IGNORED

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize("vocabulary", [50, 40_000])  # one block, and two
def test_cross_entropy_and_its_gradient(vocabulary):
    logits = (4 * random(6, vocabulary)).requires_grad_()
    targets = torch.tensor([3, IGNORED, vocabulary - 1, 0, 17, IGNORED])
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    expected.sum().backward()

    in_place = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(in_place, targets, gradient=False), expected.detach())
    assert torch.equal(in_place, logits)
    torch.testing.assert_close(cross_entropy_(in_place, targets, gradient=True), expected.detach())
    torch.testing.assert_close(in_place, logits.grad, rtol=1e-4, atol=1e-7)


def test_cross_entropy_of_large_logits_is_finite():
    logits = 1e4 * random(4, 100)
    targets = torch.tensor([0, 1, 2, 3])

    torch.testing.assert_close(
        cross_entropy_(logits.clone(), targets, gradient=False),
        functional.cross_entropy(logits, targets, reduction="none"),
    )
