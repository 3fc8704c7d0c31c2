"""The decoder layers of a base model in 4 bits, each one as a buffer of bytes.

A buffer holds bitsandbytes' tensors of all linear layers of one decoder layer, so one copy moves the whole layer. The
layers are quantized one by one, so neither the GPU nor the host ever holds the model in 16 bits. A file in .scratch has
the buffers of all layers. find_batch, train, evaluate and generate read it and do not quantize again.
"""

import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from math import ceil, prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from pdf2lora.model.device import device
from pdf2lora.params import Quantization
from pdf2lora.runtime.files import atomic_write
from pdf2lora.runtime.free_space import require_disk_space
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.runtime.scratch import fingerprint, scratch_folder

ALIGNMENT = 256  # bytes, of each tensor in a buffer
QUANTIZATION_TIMEOUT_S = 3600.0  # longest wait for another process that quantizes the same model


class PackedLinear(NamedTuple):
    """bitsandbytes' tensors of one linear layer. Without double quantization the last two are None."""

    weight: Tensor  # (numbers / 2, 1), uint8
    absmax: Tensor  # scales of the blocks, uint8 with double quantization, else float32
    nested_absmax: Tensor | None = None  # scales of the scales, float32
    offset: Tensor | None = None  # mean of the scales, float32, a scalar


class Place(NamedTuple):
    """Position, type and shape of a tensor in a buffer. start: in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def view(self, buffer: Tensor) -> Tensor:
        num_bytes = prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


class LayerLayout:
    """The places of the tensors of a decoder layer in its buffer."""

    def __init__(self, layer: nn.Module, quantization: Quantization):
        """layer: a decoder layer whose linear layers are Linear4bit; all of them are packed."""
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        self.names = list(linears)
        self.shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
        self.quantization = quantization
        _, state = self.quantize(torch.zeros(1, 64, device=device()))
        self.state = state  # has the code tables of both quantizations
        self.places: list[list[Place]] = []  # of the tensors of each linear layer, as in PackedLinear
        self.num_bytes = 0
        for shape in self.shapes:
            num_blocks = ceil(prod(shape) / state.blocksize)
            place = [self._place(torch.uint8, ceil(prod(shape) / 2), 1)]
            if state.nested:
                place += [
                    self._place(torch.uint8, num_blocks),
                    self._place(torch.float32, ceil(num_blocks / state.state2.blocksize)),
                    self._place(torch.float32),
                ]
            else:
                place.append(self._place(torch.float32, num_blocks))
            self.places.append(place)

    def quantize(self, weight: Tensor) -> tuple[Tensor, bnb.functional.QuantState]:
        settings = self.quantization
        packed, state = bnb.functional.quantize_4bit(
            weight, compress_statistics=settings.bnb_4bit_use_double_quant, quant_type=settings.bnb_4bit_quant_type
        )
        return packed, state

    def views(self, buffer: Tensor) -> list[PackedLinear]:
        """The tensors of each linear layer, as views of a buffer of num_bytes bytes."""
        return [PackedLinear(*(place.view(buffer) for place in places)) for places in self.places]

    def pack(self, weights: Sequence[Tensor], buffer: Tensor) -> None:
        """Quantizes the weights of the linear layers, in the order of `names`, into a buffer."""
        for weight, linear in zip(weights, self.views(buffer), strict=True):
            packed, state = self.quantize(weight)
            linear.weight.copy_(packed)
            linear.absmax.copy_(state.absmax)
            if linear.nested_absmax is not None and linear.offset is not None:
                linear.nested_absmax.copy_(state.state2.absmax)
                linear.offset.copy_(state.offset)

    def attach(self, layer: nn.Module, linears: Sequence[PackedLinear], dtype: torch.dtype) -> None:
        """Sets the weights of a layer's Linear4bit for the first time. dtype: of dequantized weights."""
        for name, shape, linear in zip(self.names, self.shapes, linears, strict=True):
            second = None
            if linear.nested_absmax is not None:
                second = bnb.functional.QuantState(
                    absmax=linear.nested_absmax,
                    blocksize=self.state.state2.blocksize,
                    code=self.state.state2.code,
                    dtype=self.state.state2.dtype,
                )
            state = bnb.functional.QuantState(
                absmax=linear.absmax,
                shape=torch.Size(shape),
                dtype=dtype,
                blocksize=self.state.blocksize,
                code=self.state.code,
                quant_type=self.state.quant_type,
                offset=linear.offset,
                state2=second,
            )
            module: Any = layer.get_submodule(name)
            module.weight = bnb.nn.Params4bit(
                linear.weight,
                requires_grad=False,
                quant_state=state,
                blocksize=self.state.blocksize,
                compress_statistics=self.quantization.bnb_4bit_use_double_quant,
                quant_type=self.quantization.bnb_4bit_quant_type,
                module=module,
                bnb_quantized=True,
            )
            module.quant_state = state

    def bind(self, layer: nn.Module, linears: Sequence[PackedLinear]) -> None:
        """Makes a layer's Linear4bit read their weights from another buffer."""
        for name, linear in zip(self.names, linears, strict=True):
            module: Any = layer.get_submodule(name)
            weight = getattr(module, "base_layer", module).weight  # PEFT wraps the layers that have LoRA matrices
            weight.data, weight.quant_state.absmax = linear.weight, linear.absmax
            if linear.nested_absmax is not None:
                weight.quant_state.state2.absmax, weight.quant_state.offset = linear.nested_absmax, linear.offset

    def _place(self, dtype: torch.dtype, *shape: int) -> Place:
        start = self.num_bytes
        self.num_bytes += ceil(prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        return Place(dtype, shape, start)


def packed_file(
    base: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    layouts: Sequence[LayerLayout],
    read_layer: Callable[[int], list[Tensor]],
) -> BinaryIO:
    """The open file with the buffers of all layers, one after the other. Writes it if it does not exist.

    Only the file of the last model stays in .scratch: another run can remove the file while this one reads it. Other
    processes that need the file wait until it is written.

    read_layer: number of a layer -> its weights on the device, in `dtype`, in the order of LayerLayout.names.

    Raises InputError if the disk is full.
    """
    settings = quantization.model_dump(exclude={"placement"})
    key = fingerprint(base / MANIFEST, settings, dtype, device().type, version("bitsandbytes"), Path(__file__))
    folder = scratch_folder("base_4bit", key)
    file = folder / "layers.bin"
    with exclusive_lock(folder.parent, timeout_s=QUANTIZATION_TIMEOUT_S):
        if file.exists():
            return file.open("rb")
        for other in folder.parent.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)  # another run can have removed it before this one got the lock
        require_disk_space(folder, sum(layout.num_bytes for layout in layouts))
        with atomic_write(file) as partial, partial.open("wb") as stream:
            for number, layout in enumerate(layouts):
                buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device())
                layout.pack(read_layer(number), buffer)
                stream.write(buffer.cpu().numpy().data)
        return file.open("rb")
