import pytest
from tiny_llama import TRAIN, changed

from pdf2lora.errors import InputError
from pdf2lora.model.gradient_checkpointing import SUPPORTED_GRADIENT_CHECKPOINTING as SUPPORTED
from pdf2lora.model.gradient_checkpointing import gradient_checkpointing_choices


@pytest.mark.parametrize("kernels", SUPPORTED)
def test_auto_is_every_value(kernels):
    assert gradient_checkpointing_choices(changed(TRAIN, gradient_checkpointing="auto"), kernels) == SUPPORTED[kernels]


def test_values_of_the_kernels():
    assert SUPPORTED["reference"] == ("none", "full")
    assert SUPPORTED["fused"] == SUPPORTED["fp8"] == ("none", "mlp", "full", "offload")


@pytest.mark.parametrize(("kernels", "value"), [(k, value) for k, values in SUPPORTED.items() for value in values])
def test_requested_value_is_the_only_choice(kernels, value):
    assert gradient_checkpointing_choices(changed(TRAIN, gradient_checkpointing=value), kernels) == (value,)


@pytest.mark.parametrize("value", ["mlp", "offload"])
def test_value_that_the_reference_does_not_support_is_refused(value):
    with pytest.raises(InputError) as caught:
        gradient_checkpointing_choices(changed(TRAIN, gradient_checkpointing=value), "reference")

    assert str(caught.value) == (
        f"train.gradient_checkpointing is '{value}'; the reference kernels do not support it. Use none, full or auto."
    )
