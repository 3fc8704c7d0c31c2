import logging

import pytest
import torch
from tiny_llama import COMPUTE, LORA, QUANTIZATION, TRAIN, changed, quiet, write_tiny_llama

from pdf2lora.errors import InputError
from pdf2lora.model import capabilities
from pdf2lora.model.capabilities import CHECKPOINTING, checkpointing_modes, choose_kernels
from pdf2lora.model.forward import Reference, build_forward
from pdf2lora.model.kernels.decoder import Keep
from pdf2lora.model.kernels.llama import FusedLlama
from pdf2lora.model.loading import add_lora, load_base

pytestmark = quiet
BFLOAT16 = changed(COMPUTE, compute_dtype="bfloat16")
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A GPU of this compute capability, with or without triton installed."""

    def pretend(capability=(9, 0), *, triton=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(capabilities.importlib.util, "find_spec", lambda name: object() if triton else None)

    return pretend


def refusal(kernels, *, quantization=QUANTIZATION, train=BFLOAT16, lora=LORA):
    with pytest.raises(InputError) as caught:
        choose_kernels(changed(train, kernels=kernels), quantization, lora)
    return str(caught.value)


# the choice of kernels


def test_auto_is_the_reference_where_there_is_no_gpu(no_gpu, caplog):
    caplog.set_level(logging.INFO)

    assert choose_kernels(changed(COMPUTE, kernels="auto"), QUANTIZATION, LORA) == "reference"

    assert caplog.messages == ["kernels: auto asked for, reference runs (there is no CUDA GPU)"]


@pytest.mark.parametrize("kernels", ["fused", "fp8"])
def test_kernels_of_a_gpu_are_refused_where_there_is_none(no_gpu, kernels):
    assert refusal(kernels) == (
        f"compute.kernels: '{kernels}' cannot run here: there is no CUDA GPU; choose 'auto' or 'reference'"
    )


@pytest.mark.parametrize(
    ("asked", "runs"), [("auto", "fused"), ("fused", "fused"), ("fp8", "fp8"), ("reference", "reference")]
)
def test_what_is_asked_for_runs_where_nothing_is_in_its_way(pretend_gpu, caplog, asked, runs):
    caplog.set_level(logging.INFO)
    pretend_gpu()

    assert choose_kernels(changed(BFLOAT16, kernels=asked), QUANTIZATION, LORA) == runs

    assert caplog.messages == [f"kernels: {asked} asked for, {runs} runs"]


OBSTACLES = [
    ({"capability": (7, 5)}, {}, {}, {}, "the GPU has compute capability 7.5, 8.0 is needed"),
    ({"triton": False}, {}, {}, {}, "the package triton is not installed"),
    ({}, {"compute_dtype": "float32"}, {}, {}, "they compute in bfloat16 only (compute.compute_dtype)"),
    ({}, {}, {"bits": 8}, {}, "they need a base of 4 bits, quantization.bits is 8"),
    ({}, {}, {"bits": 16}, {}, "they need a base of 4 bits, quantization.bits is 16"),
    ({}, {}, {}, {"use_dora": True}, "they do not compute DoRA (lora.use_dora)"),
    ({}, {}, {}, {"r": 257}, "they hold ranks up to 256, lora.r is 257"),
]


@pytest.mark.parametrize(("gpu", "train", "quantization", "lora", "obstacle"), OBSTACLES)
def test_each_obstacle_is_named(pretend_gpu, caplog, gpu, train, quantization, lora, obstacle):
    caplog.set_level(logging.INFO)
    pretend_gpu(**gpu)
    settings = changed(BFLOAT16, **train)
    base, adapter = changed(QUANTIZATION, **quantization), changed(LORA, **lora)

    assert refusal("fused", quantization=base, train=settings, lora=adapter) == (
        f"compute.kernels: 'fused' cannot run here: {obstacle}; choose 'auto' or 'reference'"
    )
    assert choose_kernels(changed(settings, kernels="auto"), base, adapter) == "reference"
    assert choose_kernels(changed(settings, kernels="reference"), base, adapter) == "reference"

    assert caplog.messages == [
        f"kernels: auto asked for, reference runs ({obstacle})",
        "kernels: reference asked for, reference runs",
    ]


def test_fp8_is_refused_on_an_older_gpu_that_could_run_fused(pretend_gpu):
    pretend_gpu((8, 0))

    assert refusal("fp8") == (
        "compute.kernels: 'fp8' cannot run here: the GPU has compute capability 8.0, 8.9 is needed; choose 'auto' or "
        "'reference' or 'fused'"
    )
    assert choose_kernels(changed(BFLOAT16, kernels="auto"), QUANTIZATION, LORA) == "fused"


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_fp8_runs_from_ada_on(pretend_gpu, capability):
    pretend_gpu(capability)

    assert choose_kernels(changed(BFLOAT16, kernels="fp8"), QUANTIZATION, LORA) == "fp8"


def test_fused_is_no_advice_where_it_could_not_run_either(pretend_gpu):
    pretend_gpu((7, 5))

    assert refusal("fp8").endswith("; choose 'auto' or 'reference'")


# gradient checkpointing


@pytest.mark.parametrize("kernels", CHECKPOINTING)
def test_auto_leaves_every_mode_to_find_batch_on_a_gpu_and_none_on_a_cpu(monkeypatch, kernels):
    auto = changed(TRAIN, gradient_checkpointing="auto")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checkpointing_modes(auto, kernels) == CHECKPOINTING[kernels]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkpointing_modes(auto, kernels) == ("full",)


def test_modes_of_the_kernels():
    assert CHECKPOINTING["reference"] == ("none", "full")
    assert CHECKPOINTING["fused"] == CHECKPOINTING["fp8"] == tuple(keep.value for keep in Keep)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("kernels", "mode"), [(k, mode) for k, modes in CHECKPOINTING.items() for mode in modes])
def test_mode_that_was_asked_for_is_the_only_one(monkeypatch, gpu, kernels, mode):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    assert checkpointing_modes(changed(TRAIN, gradient_checkpointing=mode), kernels) == (mode,)


@pytest.mark.parametrize("mode", ["mlp", "offload"])
def test_mode_that_the_reference_does_not_know_is_refused(mode):
    with pytest.raises(InputError) as caught:
        checkpointing_modes(changed(TRAIN, gradient_checkpointing=mode), "reference")

    assert str(caught.value) == (
        f"train.gradient_checkpointing: '{mode}' is not possible with the reference kernels; choose none, full or auto"
    )


# the forward pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    model = add_lora(load_base(base, QUANTIZATION, COMPUTE), LORA)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    return model


def test_reference_is_the_model_without_its_head(model):
    forward = build_forward(model.eval(), "reference")
    ids = IDS.to(model.device)

    assert isinstance(forward, Reference)
    with torch.no_grad():
        hidden = forward(ids)
        assert hidden.shape == (2, 24, 64)
        assert torch.equal(hidden @ forward.head.t(), model(input_ids=ids).logits)
    assert forward.model is model
    assert forward.head is model.get_base_model().lm_head.weight


def test_reference_of_a_base_without_an_adapter(base):
    causal_lm = load_base(base, QUANTIZATION, COMPUTE).eval()
    forward = build_forward(causal_lm, "reference")
    ids = IDS.to(causal_lm.device)

    with torch.no_grad():
        assert torch.equal(forward(ids) @ forward.head.t(), causal_lm(input_ids=ids).logits)


def test_reference_of_a_bfloat16_base_computes_in_bfloat16(base):
    forward = build_forward(add_lora(load_base(base, QUANTIZATION, BFLOAT16), LORA), "reference")

    hidden = forward(IDS.to(forward.head.device))

    assert hidden.dtype == torch.bfloat16
    hidden.sum().backward()
    gradients = [value.grad for value in forward.model.parameters() if value.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_later_forward_decides_on_the_checkpointing(model):
    llama = model.get_base_model()

    for mode, checkpoints in (("full", True), ("none", False), ("full", True)):
        build_forward(model, "reference", mode)
        assert llama.is_gradient_checkpointing == checkpoints


@pytest.mark.parametrize(("kernels", "fp8"), [("fused", False)])
@pytest.mark.parametrize("mode", CHECKPOINTING["fused"])
def test_fused_forward_keeps_what_the_mode_says(model, kernels, fp8, mode):
    forward = build_forward(model, kernels, mode)

    assert isinstance(forward, FusedLlama)
    assert (forward.keep, forward.fp8) == (Keep(mode), fp8)
    assert forward.head is model.get_base_model().lm_head.weight


def test_mode_that_does_not_exist_is_an_error(model):
    with pytest.raises(ValueError, match="'half' is not a valid Keep"):
        build_forward(model, "fused", "half")
