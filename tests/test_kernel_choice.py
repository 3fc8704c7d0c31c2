import pytest
from tiny_llama import COMPUTE, LORA, QUANTIZATION, changed
from transformers import GemmaConfig, LlamaConfig, MistralConfig, PhiConfig

from pdf2lora.errors import InputError
from pdf2lora.model.kernel_choice import choose_kernels, reference_reason

BFLOAT16 = changed(COMPUTE, compute_dtype="bfloat16")
LLAMA = LlamaConfig()


def refusal(kernels, *, quantization=QUANTIZATION, compute=BFLOAT16, lora=LORA, config=LLAMA):
    with pytest.raises(InputError) as caught:
        choose_kernels(changed(compute, kernels=kernels), quantization, lora, config)
    return str(caught.value)


def test_auto_is_the_reference_without_a_gpu(no_gpu, log):
    assert choose_kernels(changed(COMPUTE, kernels="auto"), QUANTIZATION, LORA, LLAMA) == "reference"

    assert log == ["kernels: reference (compute.kernels: auto) (this machine has no CUDA GPU)"]


@pytest.mark.parametrize("kernels", ["fused", "fp8"])
def test_fused_kernels_are_refused_without_a_gpu(no_gpu, kernels):
    assert refusal(kernels) == (
        f"compute.kernels is '{kernels}'; these kernels cannot run here: this machine has no CUDA GPU. Use 'auto' or "
        "'reference'."
    )


@pytest.mark.parametrize(
    ("setting", "choice"), [("auto", "fused"), ("fused", "fused"), ("fp8", "fp8"), ("reference", "reference")]
)
def test_requested_kernels_run_if_nothing_prevents_them(pretend_gpu, log, setting, choice):
    pretend_gpu()

    assert choose_kernels(changed(BFLOAT16, kernels=setting), QUANTIZATION, LORA, LLAMA) == choice

    assert log == [f"kernels: {choice} (compute.kernels: {setting})"]


OBSTACLES = [
    ({"capability": (7, 5)}, {}, {}, {}, "they need compute capability 8.0, the GPU has 7.5"),
    ({"has_packages": False}, {}, {}, {}, "the package triton is not installed"),
    ({}, {"compute_dtype": "float32"}, {}, {}, "they compute in bfloat16 only (compute.compute_dtype)"),
    ({}, {}, {"bits": 8}, {}, "they need a 4-bit base model, quantization.bits is 8"),
    ({}, {}, {"bits": 16}, {}, "they need a 4-bit base model, quantization.bits is 16"),
    ({}, {}, {}, {"use_dora": True}, "they do not support DoRA (lora.use_dora)"),
    (
        {},
        {},
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        "they do not support LoRA on lm_head (lora.target_modules)",
    ),
    ({}, {}, {}, {"r": 257}, "they support ranks up to 256, lora.r is 257"),
]


@pytest.mark.parametrize(("gpu", "compute", "quantization", "lora", "obstacle"), OBSTACLES)
def test_each_obstacle_is_reported(pretend_gpu, log, gpu, compute, quantization, lora, obstacle):
    pretend_gpu(**gpu)
    settings = changed(BFLOAT16, **compute)
    base, adapter = changed(QUANTIZATION, **quantization), changed(LORA, **lora)

    assert refusal("fused", quantization=base, compute=settings, lora=adapter) == (
        f"compute.kernels is 'fused'; these kernels cannot run here: {obstacle}. Use 'auto' or 'reference'."
    )
    assert choose_kernels(changed(settings, kernels="auto"), base, adapter, LLAMA) == "reference"
    assert choose_kernels(changed(settings, kernels="reference"), base, adapter, LLAMA) == "reference"

    assert log == [
        f"kernels: reference (compute.kernels: auto) ({obstacle})",
        "kernels: reference (compute.kernels: reference)",
    ]


def test_fp8_is_refused_on_an_older_gpu_that_can_run_fused(pretend_gpu):
    pretend_gpu((8, 0))

    assert refusal("fp8") == (
        "compute.kernels is 'fp8'; these kernels cannot run here: they need compute capability 8.9, the GPU has 8.0. "
        "Use 'auto' or 'reference' or 'fused'."
    )
    assert choose_kernels(changed(BFLOAT16, kernels="auto"), QUANTIZATION, LORA, LLAMA) == "fused"


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_fp8_runs_on_ada_and_later(pretend_gpu, capability):
    pretend_gpu(capability)

    assert choose_kernels(changed(BFLOAT16, kernels="fp8"), QUANTIZATION, LORA, LLAMA) == "fp8"


def test_fused_is_not_suggested_if_it_cannot_run(pretend_gpu):
    pretend_gpu((7, 5))

    assert refusal("fp8").endswith(". Use 'auto' or 'reference'.")


# base models


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        (GemmaConfig(), "they do not support the architecture 'gemma'"),
        (PhiConfig(), "they do not support the architecture 'phi'"),
        (LlamaConfig(hidden_act="gelu"), "they do not support a model whose config.json has hidden_act 'gelu'"),
        (MistralConfig(sliding_window=16), "the model's sliding window has 16 tokens, compute.seq_length is 32"),
    ],
    ids=["gemma", "phi", "gelu", "window"],
)
def test_other_base_models_run_on_the_reference(pretend_gpu, log, config, obstacle):
    pretend_gpu()

    assert choose_kernels(changed(BFLOAT16, kernels="auto"), QUANTIZATION, LORA, config) == "reference"

    assert log == [f"kernels: reference (compute.kernels: auto) ({obstacle})"]
    assert obstacle in refusal("fp8", config=config)
    assert reference_reason(changed(BFLOAT16, kernels="auto"), QUANTIZATION, LORA, config) == obstacle


def test_a_reason_is_given_only_if_auto_does_not_select_fused(pretend_gpu, no_gpu):
    """Without a GPU, or if params.yaml selects the reference, the user does not expect other kernels."""
    settings = changed(BFLOAT16, kernels="auto")
    assert reference_reason(settings, QUANTIZATION, LORA, GemmaConfig()) == ""
    pretend_gpu()
    assert reference_reason(settings, QUANTIZATION, LORA, LLAMA) == ""
    assert reference_reason(changed(settings, kernels="reference"), QUANTIZATION, LORA, GemmaConfig()) == ""


def test_fp8_needs_widths_that_are_a_multiple_of_16(pretend_gpu):
    pretend_gpu()
    config = LlamaConfig(hidden_size=96, intermediate_size=104, num_attention_heads=4)

    assert "a multiple of 16, the model has one with 104. Use 'auto' or 'reference' or 'fused'" in refusal(
        "fp8", config=config
    )


def test_all_linear_layers_are_known(pretend_gpu):
    pretend_gpu()
    lora = changed(LORA, target_modules="all-linear")

    assert choose_kernels(changed(BFLOAT16, kernels="fused"), QUANTIZATION, lora, LLAMA) == "fused"
