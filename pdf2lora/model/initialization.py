"""lora.init_lora_weights: initial LoRA matrices that PEFT computes from the unquantized weights W of the base.

Q is the quantization, s the scaling of the adapter, A0 and B0 the initial matrices of one layer:

- loftq (Li et al. 2023, one iteration): s B0 A0 is the best approximation of W - Q(W) of rank r. The base stays Q(W).
- pissa (Meng et al. 2024), pissa_niter_N: s B0 A0 has the r largest singular values of W. The base becomes
  Q(W - s B0 A0). N is the number of subspace iterations of a fast, approximate decomposition.
- olora (Büyükakyüz 2024): s B0 A0 comes from the first r columns of a QR decomposition of W. The base becomes
  Q(W - s B0 A0).

Training then runs as with other initial matrices. models/adapter/initial stores A0 and B0. evaluate and generate
compute the changed base from them. Without quantization the trained model is W + s (B A - B0 A0). An ordinary adapter
of rank 2r gives the same model (weights/plain_adapter.py); export merges and releases that adapter.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pdf2lora.errors import InputError
from pdf2lora.model.base_weights import BaseWeights
from pdf2lora.model.dropout import lora_layers
from pdf2lora.model.layer_stream import layer_stream
from pdf2lora.params import Lora
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.files import atomic_directory

INITIAL = "initial"  # sub-folder of models/adapter and of the checkpoints
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

Matrices = dict[str, Tensor]  # by PEFT's names: base_model.model.<layer>.lora_A.weight


def initialize(model: PeftModel, base: Path, lora: Lora, *, seed: int, folder: Path, processes: Processes) -> None:
    """Sets A and B of a new adapter, and changes the base if the method requires it.

    Each process computes a part of the layers. The main process stores the matrices in `folder` for a resumed training.

    Raises:
        InputError: the files of the base do not have unquantized weights of these layers, r is too large, or the
            layers are in host memory.
    """
    _require_resident(model, lora)
    matrices = processes.broadcast(load_file(folder / FILE) if processes.is_main and folder.exists() else None)
    if matrices is None:
        names = layer_names(model)[processes.index :: processes.count]
        part: Matrices = {}
        for name, weight in unquantized_weights(base, names):
            with torch.random.fork_rng():
                torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
                a, b = _initial_pair(model.get_submodule(f"{PREFIX}{name}").base_layer, weight, lora, name)
            part |= {f"{PREFIX}{name}.lora_A.weight": a.cpu(), f"{PREFIX}{name}.lora_B.weight": b.cpu()}
        matrices = {key: value for parts in processes.gather(part) for key, value in parts.items()}
        if processes.is_main:
            with atomic_directory(folder) as partial:
                save_file(matrices, partial / FILE)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in matrices.items():
            parameters[key.replace(".weight", ".default.weight")].copy_(value)
    if lora.changes_base:
        _change_base(model, base, matrices)


def restore_trained_base(model: PeftModel, base: Path, adapter: Path, lora: Lora) -> None:
    """Changes the base of a loaded adapter to the base of its training, if they differ.

    Raises InputError if the layers are in host memory.
    """
    if lora.changes_base:
        _require_resident(model, lora)
        _change_base(model, base, load_file(adapter / INITIAL / FILE))


def _require_resident(model: PeftModel, lora: Lora) -> None:
    if layer_stream(model) is not None:
        raise InputError(
            f"lora.init_lora_weights is {lora.init_lora_weights!r}, which needs the layers in GPU memory "
            "(quantization.placement: gpu). Use true or gaussian."
        )


def layer_names(model: PeftModel) -> list[str]:
    """The layers with LoRA matrices, by their names in the base model."""
    layers = {id(layer) for layer in lora_layers(model)}
    return [name.removeprefix(PREFIX) for name, module in model.named_modules() if id(module) in layers]


def unquantized_weights(base: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the stored weight, in float32, of each layer. Holds one weight at a time.

    Raises InputError if the files have no unquantized weight of a layer.
    """
    weights = BaseWeights(base)
    for name in names:
        if not weights.is_unquantized(f"{name}.weight"):
            raise InputError(
                f"lora.init_lora_weights needs the unquantized weights of the base; {base} has none for {name}. "
                "Use true, or an unquantized source model."
            )
        yield name, weights.read(f"{name}.weight", torch.float32)


def _initial_pair(layer: nn.Module, weight: Tensor, lora: Lora, name: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in_features) and B0 (out_features, r) of one layer of the base, float32."""
    weight = weight.T if isinstance(layer, Conv1D) else weight  # (out_features, in_features)
    if lora.r > min(weight.shape):
        raise InputError(
            f"lora.r is {lora.r}; with lora.init_lora_weights {lora.init_lora_weights} it must not be greater than the "
            f"smaller side of each layer, and {name} is {weight.shape[0]} x {weight.shape[1]}. Reduce it."
        )
    if lora.init_lora_weights == "loftq":
        scaling = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
        rest = weight - dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
        pair = _low_rank_decomposition(rest / scaling, reduced_rank=lora.r)  # PEFT's LoftQ does not divide by it
        return pair["R"].contiguous(), pair["L"].contiguous()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    settings = LoraConfig(**(lora.model_dump() | {"lora_dropout": 0.0, "target_modules": None}))
    adapted = Linear(linear, "default", config=settings, r=lora.r, lora_alpha=lora.lora_alpha)
    return adapted.lora_A["default"].weight.detach(), adapted.lora_B["default"].weight.detach()


@torch.no_grad()
def _change_base(model: PeftModel, base: Path, matrices: Matrices) -> None:
    """Replaces Q(W) by Q(W - s B0 A0) in each layer with LoRA matrices."""
    for name, weight in unquantized_weights(base, layer_names(model)):
        lora_layer = model.get_submodule(f"{PREFIX}{name}")
        layer = lora_layer.base_layer
        a, b = (matrices[f"{PREFIX}{name}.lora_{part}.weight"].to(weight) for part in "AB")
        product = lora_layer.scaling["default"] * b @ a
        weight -= product.T if isinstance(layer, Conv1D) else product
        _set_weight(layer, weight)


def _set_weight(layer: Any, weight: Tensor) -> None:
    """Replaces the weight of a layer, in the layer's precision. Quantizes it as loading does."""
    old = layer.weight
    if isinstance(old, bnb.nn.Params4bit):
        layer.weight = bnb.nn.Params4bit(
            weight.to(old.quant_state.dtype),
            requires_grad=False,
            quant_type=old.quant_type,
            compress_statistics=old.compress_statistics,
            quant_storage=old.quant_storage,
            blocksize=old.blocksize,
            module=layer,
        ).to(old.device)
    elif isinstance(old, bnb.nn.Int8Params):
        layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to(old.device)
        layer.init_8bit_state()
    else:
        old.copy_(weight)
