import bitsandbytes as bnb
import pytest
import torch

from pdf2lora.errors import InputError
from pdf2lora.model.device import device
from pdf2lora.model.quantization import check_4bit_round_trip, require_quantization


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("bits", "function"), [(4, "quantize_4bit"), (8, "int8_vectorwise_quant")])
def test_failure_of_bitsandbytes_is_reported(monkeypatch, bits, function):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(bnb.functional, function, fail)

    with pytest.raises(InputError) as caught:
        require_quantization(bits)

    name = device().type
    assert str(caught.value) == (
        f"quantization.bits is {bits}, which does not work here: bitsandbytes {bnb.__version__} fails on {name} with "
        "'no kernel image'. Install a build of bitsandbytes for this machine, or use 16."
    )
    require_quantization(16)


WHOLE_BLOCKS = [64, 128, 192, 320, 2048]  # as the widths of all Llamas


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_of_whole_blocks_pass(quant_type, dtype):
    check_4bit_round_trip(set(WHOLE_BLOCKS), quant_type, dtype)


def rows_start_at_a_block(packed, state):
    """Emulates the fault of bitsandbytes 0.50.2 on AVX512: row i has the scales from block i * (width // 64) on."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    rows, width = state.shape
    block = torch.arange(rows)[:, None] * (width // state.blocksize) + torch.arange(width) // state.blocksize
    return (state.code[codes].view(rows, width) * state.absmax[block]).to(state.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 80, 96, 1000, 1008])
def test_scales_of_other_blocks_are_refused(no_gpu, monkeypatch, width, dtype):
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", rows_start_at_a_block)

    check_4bit_round_trip(set(WHOLE_BLOCKS), "nf4", dtype)
    with pytest.raises(InputError, match=f"layers with {width} input features"):
        check_4bit_round_trip({*WHOLE_BLOCKS, width}, "nf4", dtype)


def test_nan_is_refused(no_gpu, monkeypatch):
    monkeypatch.setattr(
        bnb.functional, "dequantize_4bit", lambda packed, state: torch.full(state.shape, torch.nan, dtype=state.dtype)
    )

    with pytest.raises(InputError, match="an error of nan%"):
        check_4bit_round_trip({64}, "nf4", torch.float32)


@pytest.mark.parametrize("width", [80, 96])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_only_widths_with_correct_products_pass(no_gpu, width, quant_type):
    """Compares the check with a product by this machine's bitsandbytes, faulty or not."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(width, 64, bias=False, compute_dtype=torch.float32, quant_type=quant_type).to("cpu")
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    weight = (state.code[codes].view(-1, state.blocksize) * scales[:, None]).view(64, width)
    inputs = torch.randn(8, width)
    is_correct = torch.allclose(layer(inputs), inputs @ weight.T, atol=1e-4)

    try:
        check_4bit_round_trip({width}, quant_type, torch.float32)
        refused = False
    except InputError:
        refused = True

    assert refused != is_correct


def test_check_does_not_advance_the_global_generator(no_gpu):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    check_4bit_round_trip({64}, "nf4", torch.float32)

    assert torch.equal(torch.rand(3), expected)
