import pytest
import torch
from interpreted import cpu_kernels, random  # noqa: F401

from pdf2lora.model.kernels.lora_copies import copy_lora

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("r", "features_in", "features_out"), [(8, 40, 24), (5, 700, 301), (16, 64, 64)])
def test_copies_have_their_place_and_b_is_scaled(r, features_in, features_out, dtype):
    a, b = random(r, features_in), random(features_out, r, seed=1)
    a_copies, b_copies = torch.full((48, features_in), 7.0, dtype=dtype), torch.full((400, 48), 7.0, dtype=dtype)

    copy_lora(a, b, 1.7, a_copies[16:32], b_copies[4 : 4 + features_out, 16:32])

    expected_a, expected_b = torch.full((48, features_in), 7.0), torch.full((400, 48), 7.0)
    expected_a[16 : 16 + r] = a
    expected_b[4 : 4 + features_out, 16 : 16 + r] = b * 1.7
    error = {"rtol": 0.0 if dtype == torch.float32 else 2**-7, "atol": 0.0}
    torch.testing.assert_close(a_copies.float(), expected_a, **error)
    torch.testing.assert_close(b_copies.float(), expected_b, **error)
