import pytest
import torch
from tiny_llama import COMPUTE, LORA, QUANTIZATION, changed, fill_b, quiet

from pdf2lora.model.forward import ReferenceForward, build_forward
from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels.fused import FusedForward
from pdf2lora.model.loading import add_lora, load_base

pytestmark = quiet
BFLOAT16 = changed(COMPUTE, compute_dtype="bfloat16")
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(base):
    return fill_b(add_lora(load_base(base, QUANTIZATION, COMPUTE), LORA))


def test_reference_is_the_model_without_its_head(model):
    forward = build_forward(model.eval(), "reference")
    ids = IDS.to(model.device)

    assert isinstance(forward, ReferenceForward)
    with torch.no_grad():
        hidden = forward(ids)
        assert hidden.shape == (2, 24, 64)
        assert torch.equal(forward.head.logits(hidden), model(input_ids=ids).logits)
    assert forward.model is model
    assert forward.head.weight is model.get_base_model().lm_head.weight


def test_reference_of_a_base_without_an_adapter(base):
    causal_lm = load_base(base, QUANTIZATION, COMPUTE).eval()
    forward = build_forward(causal_lm, "reference")
    ids = IDS.to(causal_lm.device)

    with torch.no_grad():
        assert torch.equal(forward.head.logits(forward(ids)), causal_lm(input_ids=ids).logits)


def test_reference_of_a_bfloat16_base_computes_in_bfloat16(base):
    forward = build_forward(add_lora(load_base(base, QUANTIZATION, BFLOAT16), LORA), "reference")

    forward.set_dropout(0, 0)
    hidden = forward(IDS.to(forward.head.device))

    assert hidden.dtype == torch.bfloat16
    hidden.sum().backward()
    gradients = [value.grad for value in forward.model.parameters() if value.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_last_forward_decides_on_gradient_checkpointing(model):
    llama = model.get_base_model()

    for value, is_enabled in (("full", True), ("none", False), ("full", True)):
        build_forward(model, "reference", value)
        assert llama.is_gradient_checkpointing == is_enabled


@pytest.mark.parametrize(("kernels", "fp8"), [("fused", False)])
@pytest.mark.parametrize("value", GradientCheckpointing)
def test_fused_forward_has_the_settings(model, kernels, fp8, value):
    forward = build_forward(model, kernels, value)

    assert isinstance(forward, FusedForward)
    assert (forward.gradient_checkpointing, forward.fp8) == (value, fp8)
    assert forward.head.weight is model.get_base_model().lm_head.weight


@pytest.mark.parametrize(("kernels", "value"), [("fused", "half"), ("reference", "mlp")])
def test_value_that_the_kernels_do_not_support_is_an_error(model, kernels, value):
    with pytest.raises(ValueError, match=value):
        build_forward(model, kernels, value)
