"""Packed layers and their stream, on the CPU: the kernels in Triton's interpreter, copies without CUDA streams."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import run_forked
from interpreted import attention_forward, cpu_kernels, scaled_product  # noqa: F401
from test_kernels_fused import ALL_LINEAR, NO_DROPOUT, hidden_and_gradients, some_ids
from tiny_families import write_tiny_family
from tiny_llama import COMPUTE, LORA, QUANTIZATION, changed, fill_b, quiet

from pdf2lora.errors import InputError
from pdf2lora.model import loading, packed_base, packed_layers
from pdf2lora.model.forward import build_forward
from pdf2lora.model.initialization import initialize
from pdf2lora.model.kernels import frozen
from pdf2lora.model.layer_stream import layer_stream
from pdf2lora.model.loading import add_lora, load_base, read_config
from pdf2lora.model.packed_base import choose_placement, packing_obstacle, possible_placements, resident_gib
from pdf2lora.runtime import pinned_memory
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.manifest import write_manifest

pytestmark = [pytest.mark.usefixtures("cpu_kernels"), quiet]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Three layers, in two buffers. With biases, which are not packed."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    sizes = {"hidden_size": 40, "intermediate_size": 44, "num_hidden_layers": 3}
    folder = write_tiny_family(tmp_path / "base", "Qwen2ForCausalLM", "qwen2", **sizes)
    write_manifest(folder)
    return folder


def adapted(base, placement, *, double=True):
    torch.manual_seed(0)
    quantization = changed(QUANTIZATION, bnb_4bit_use_double_quant=double)
    causal_lm = load_base(base, quantization, COMPUTE, placement=placement)
    return fill_b(add_lora(causal_lm, changed(NO_DROPOUT, target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("kernels", "mode", "double"),
    [("fused", "none", False), ("fused", "full", True), ("fp8", "mlp", True), ("reference", "full", True)],
)
def test_streamed_layers_give_the_same_bits(base, monkeypatch, kernels, mode, double):
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    resident = build_forward(adapted(base, "gpu", double=double), kernels, mode)
    streamed = build_forward(adapted(base, "host", double=double), kernels, mode)
    assert layer_stream(resident.model) is None
    for seed in (0, 1):  # the second pass starts with the layers of the first one's end
        ids = some_ids(1, 4, seed=seed)

        expected_hidden, expected = hidden_and_gradients(resident, ids)
        hidden, found = hidden_and_gradients(streamed, ids)

        assert torch.equal(hidden, expected_hidden)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_evaluation_between_the_steps(base):
    resident, streamed = (build_forward(adapted(base, placement), "fused") for placement in ("gpu", "host"))
    ids = some_ids(1, 4)
    for forward in (resident, streamed):
        hidden_and_gradients(forward, ids)
        forward.model.eval()
    with torch.no_grad():
        expected = resident(ids)

        assert torch.equal(streamed(ids), expected)
        by_transformers = [build_forward(forward.model, "reference")(ids) for forward in (resident, streamed)]
        assert torch.equal(*by_transformers)


def test_only_the_two_buffers_hold_packed_weights(base):
    model = load_base(base, QUANTIZATION, COMPUTE, placement="host")
    stream = layer_stream(model)
    assert stream is not None
    storages = {
        module.weight.untyped_storage().data_ptr()
        for module in model.model.layers.modules()
        if hasattr(module, "quant_state")
    }

    assert storages <= {buffer.untyped_storage().data_ptr() for buffer in stream.buffers}
    assert sum(buffer.numel() for buffer in stream.host) == sum(layout.num_bytes for layout in stream.layouts)


def test_layers_are_quantized_once(base, monkeypatch):
    first = load_base(base, QUANTIZATION, COMPUTE, placement="host")
    monkeypatch.setattr(packed_layers.LayerLayout, "pack", None)  # the second load must not need it

    second = load_base(base, changed(QUANTIZATION, placement="gpu"), COMPUTE, placement="host")

    ids = some_ids(1, 5)
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_the_file_of_another_model_is_removed(base, tmp_path):
    load_base(base, QUANTIZATION, COMPUTE, placement="host")
    load_base(base, changed(QUANTIZATION, bnb_4bit_quant_type="fp4"), COMPUTE, placement="host")

    assert len(list((tmp_path / ".scratch" / "base_4bit").glob("*/layers.bin"))) == 1


def test_another_run_may_remove_the_folder_while_this_one_waits(base, monkeypatch):
    """Each makes its folder before it has the lock, and the first one removes the others."""

    @contextmanager
    def lock_after_another_run(folder, **settings):
        for other in folder.iterdir():
            shutil.rmtree(other)
        yield

    monkeypatch.setattr(packed_layers, "exclusive_lock", lock_after_another_run)

    load_base(base, QUANTIZATION, COMPUTE, placement="host")


def test_a_file_that_another_run_removes_is_still_read(base, monkeypatch):
    def packed_file(*arguments):
        stream = packed_layers.packed_file(*arguments)
        shutil.rmtree(Path(stream.name).parent)
        return stream

    monkeypatch.setattr(packed_base, "packed_file", packed_file)
    removed = load_base(base, QUANTIZATION, COMPUTE, placement="host")
    monkeypatch.undo()

    ids = some_ids(1, 5)
    assert torch.equal(removed(ids).logits, load_base(base, QUANTIZATION, COMPUTE, placement="host")(ids).logits)


def test_dora_is_refused_because_it_reads_all_layers_at_once(base):
    """Only two layers are on the device: PEFT would take the norms of other layers."""
    model = load_base(base, QUANTIZATION, COMPUTE, placement="host")

    with pytest.raises(InputError, match=r"lora\.use_dora is true, which needs the layers in GPU memory"):
        add_lora(model, changed(LORA, use_dora=True))


def test_too_little_host_memory_is_one_line(base, monkeypatch):
    monkeypatch.setattr(pinned_memory, "RESERVE_GIB", 1e6)

    with pytest.raises(
        InputError, match=r"quantization.placement host: the packed layers .* needs 0.0 GiB .* available"
    ):
        load_base(base, QUANTIZATION, COMPUTE, placement="host")


def test_a_missing_weight_is_one_line(base):
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file)

    with pytest.raises(InputError, match=r"no weight model\.norm\.weight"):
        load_base(base, QUANTIZATION, COMPUTE, placement="host")


def test_placement_is_refused_where_it_cannot_run(base):
    config = read_config(base)
    with pytest.raises(InputError, match=r"placement is 'host', .* no CUDA GPU\. Use 'auto' or 'gpu'"):
        choose_placement(base, config, changed(QUANTIZATION, placement="host"), torch.float32)
    assert choose_placement(base, config, QUANTIZATION, torch.float32) == "gpu"
    assert "bits is 8" in packing_obstacle(config, changed(QUANTIZATION, bits=8))
    config.model_type = "gemma"
    assert "gemma is not one of" in packing_obstacle(config, QUANTIZATION)


def test_auto_takes_host_memory_if_the_model_does_not_fit(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free_gib, placement in ((100.0, "gpu"), (1.0, "host")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free_gib=free_gib: (free_gib * 2**30, 2**40))
        assert choose_placement(base, read_config(base), QUANTIZATION, torch.float32) == placement


def test_resident_gib_is_the_size_of_the_model(base):
    model = load_base(base, QUANTIZATION, COMPUTE, placement="gpu")
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    num_bytes += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)

    assert resident_gib(base, QUANTIZATION, torch.float32) * 2**30 == pytest.approx(num_bytes, rel=0.02)


def test_initial_matrices_from_weights_need_resident_layers(base, tmp_path):
    model = adapted(base, "host")
    lora = changed(NO_DROPOUT, target_modules=ALL_LINEAR, init_lora_weights="loftq")

    with pytest.raises(InputError, match=r"'loftq', which needs the layers in GPU memory"):
        initialize(model, base, lora, seed=0, folder=tmp_path / "initial", processes=Processes())
    assert possible_placements(base, read_config(base), QUANTIZATION, lora, torch.float32) == ("gpu",)


def two_processes_share(processes):
    """What each process reads from the memory that the first one has filled."""
    memory = pinned_memory.shared_pinned_memory(
        1000, lambda to: to.copy_(torch.arange(1000) % 251), processes, "a test"
    )
    total = int(memory.sum())
    processes.gather(None)
    if processes.is_main:
        memory[0] = 77
    processes.gather(None)
    return total, int(memory[0]), processes.is_first_of_node


def test_processes_of_a_node_share_one_memory():
    results = run_forked(2, two_processes_share)
    total = int((torch.arange(1000) % 251).sum())

    assert [(found, first) for found, first, _ in results] == [(total, 77)] * 2
    assert [is_first for _, _, is_first in results] == [True, False]


def test_all_processes_stream_if_one_gpu_is_too_full(base, monkeypatch):
    def is_streamed(processes):
        placement = "host" if processes.index == 1 else "gpu"
        monkeypatch.setattr(loading, "choose_placement", lambda *settings: placement)
        return layer_stream(load_base(base, QUANTIZATION, COMPUTE, processes=processes)) is not None

    assert run_forked(2, is_streamed) == [True, True]
