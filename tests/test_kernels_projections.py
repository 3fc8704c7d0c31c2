import pytest
import torch
from interpreted import cpu_kernels, linear4bit, random  # noqa: F401
from peft import LoraConfig, inject_adapter_in_model
from tiny_llama import fill_b
from torch import nn

from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.projections import Projections
from pdf2lora.model.kernels.rotary import Angles
from pdf2lora.model.kernels.rows import Rows

pytestmark = pytest.mark.usefixtures("cpu_kernels")


HEADS = Heads(1, 1, 8, 1)
ANGLES = Angles(torch.ones(1, 4), torch.zeros(1, 4))
EVALUATION = ForwardContext(GradientCheckpointing.NONE, HEADS, ANGLES, None, False, Offload())


def test_projections_stack_the_matrices_of_those_with_lora():
    """The second of three projections has no LoRA. Its rows of B are zero, and it has no rank."""
    model = nn.ModuleDict({"first": linear4bit(24, 64), "plain": linear4bit(16, 64), "last": linear4bit(8, 64)})
    inject_adapter_in_model(LoraConfig(r=5, lora_alpha=10, target_modules=["first", "last"]), model)
    fill_b(model, std=1.0)
    modules = list(model.values())
    projections = Projections(modules, torch.float32)
    x = random(9, 64)

    with torch.no_grad():
        projections.refresh(EVALUATION)
        y, _ = projections.forward(Rows(x), EVALUATION)
        low_rank = projections.low_rank(Rows(x), EVALUATION)

    assert (projections.rank, low_rank.values.shape, low_rank.mask) == (16, (9, 32), None)
    torch.testing.assert_close(y, torch.cat([module(x) for module in modules], dim=1).detach(), rtol=1e-4, atol=1e-4)
    assert not projections.b[24:40].any()
    assert not projections.a[5:16].any()
    assert [tuple(parameter.shape) for parameter in projections.parameters] == [(5, 64), (24, 5), (5, 64), (8, 5)]
