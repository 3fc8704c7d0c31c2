import pytest
from tiny_llama import COMPUTE, changed
from transformers import Gemma2ForCausalLM, LlamaForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.model.attention_choice import choose_attention


def test_flash_attention_without_a_gpu_is_refused(no_gpu):
    with pytest.raises(InputError) as caught:
        choose_attention(changed(COMPUTE, attention="flash_attention_2"), LlamaForCausalLM)

    assert str(caught.value) == (
        "compute.attention is 'flash_attention_2', which cannot run here: this machine has no CUDA GPU. "
        "Use 'auto', or 'sdpa'."
    )


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "obstacle"),
    [
        (False, (9, 0), "auto", "the package flash-attn is not installed"),
        (True, (9, 0), "float32", "it computes in half precision only"),
        (True, (7, 5), "float16", "it needs a GPU of compute capability 8.0 or more"),
    ],
)
def test_flash_attention_is_refused_with_the_reason(pretend_gpu, installed, capability, dtype, obstacle):
    pretend_gpu(capability, has_packages=installed)
    compute = changed(COMPUTE, attention="flash_attention_2", compute_dtype=dtype)

    with pytest.raises(InputError, match=f"cannot run here: {obstacle}"):
        choose_attention(compute, LlamaForCausalLM)
    assert choose_attention(changed(compute, attention="auto"), LlamaForCausalLM) == "sdpa"


def test_flash_attention_runs_if_nothing_prevents_it(pretend_gpu, log):
    pretend_gpu()
    compute = changed(COMPUTE, compute_dtype="bfloat16")

    choices = [
        choose_attention(changed(compute, attention=name), LlamaForCausalLM)
        for name in ("auto", "flash_attention_2", "sdpa")
    ]

    assert choices == ["flash_attention_2", "flash_attention_2", "sdpa"]
    assert log[0] == "attention: flash_attention_2 (compute.attention: auto)"


def test_auto_logs_the_choice_and_the_reason(no_gpu, log):
    assert choose_attention(changed(COMPUTE, attention="auto"), LlamaForCausalLM) == "sdpa"

    assert log == ["attention: sdpa (compute.attention: auto) (flash_attention_2: this machine has no CUDA GPU)"]


def test_model_without_sdpa_computes_eagerly(no_gpu):
    assert choose_attention(changed(COMPUTE, attention="auto"), Gemma2ForCausalLM) == "eager"
    with pytest.raises(InputError, match=r"Gemma2ForCausalLM does not support it\. Use 'auto'\.$"):
        choose_attention(changed(COMPUTE, attention="sdpa"), Gemma2ForCausalLM)
