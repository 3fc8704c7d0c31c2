import pytest
import torch
from interpreted import cpu_kernels, random  # noqa: F401

from pdf2lora.model.kernels import lora_products

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize(("tokens", "features", "rank"), [(150, 700, 16), (5, 48, 32), (64, 512, 16)])
def test_both_products(monkeypatch, tokens, features, rank):
    monkeypatch.setattr(lora_products, "TILE", lora_products.TILE | {"BLOCK_TOKENS": 32, "SPLIT": 64})
    rows, right, left = random(tokens, features), random(features, rank, seed=1), random(tokens, rank, seed=2)

    product, sums = lora_products.both_products(rows, right, left)

    torch.testing.assert_close(product, rows @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums, left.t() @ rows, rtol=1e-4, atol=1e-4)


def test_both_products_read_parts_of_larger_tensors():
    """As for gate and up: columns of rows and of the first product; A is transposed."""
    rows, a, left = random(70, 96)[:, 32:80], random(16, 48, seed=1), random(70, 48, seed=2)[:, 16:32]

    product, sums = lora_products.both_products(rows, a.t(), left)

    torch.testing.assert_close(product, rows @ a.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums, left.t() @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "features", "rank", "expected"),
    [(24_576, 8192, 16, True), (8192, 8192, 32, True), (8192, 3072, 16, False), (24_576, 8192, 64, False)],
)
def test_many_rows_are_read_once(tokens, features, rank, expected):
    assert lora_products.one_kernel_is_faster(torch.empty(tokens, features, device="meta"), rank) == expected


def test_product_float32_does_not_round():
    left, right = random(3, 40).bfloat16(), random(40, 5, seed=1).bfloat16()

    torch.testing.assert_close(lora_products.product_float32(left, right), left.float() @ right.float())
