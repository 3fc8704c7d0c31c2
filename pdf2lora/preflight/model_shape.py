"""The sizes of a source model, on which memory, time and disk space depend. No weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdf2lora.families import FUSED_MODEL_TYPES, is_target
from pdf2lora.params import ALL_LINEAR, Lora, Quantization
from pdf2lora.weights.config_json import LinearLayers, llama_layers
from pdf2lora.weights.huggingface_files import HuggingFaceFiles
from pdf2lora.weights.params_json import ModelArgs

GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    blocks: Sequence[LinearLayers]
    num_parameters: int
    num_bytes: int
    """of the files of weights"""
    can_be_packed: bool = True
    """Whether its layers can be packed in 4 bits and be in host memory."""

    def lora_parameters(self, lora: Lora) -> int:
        """Number of LoRA parameters. A and B of each layer have r x (in + out); DoRA adds `out` magnitudes."""
        names = lora.target_modules
        return sum(
            lora.r * (num_inputs + num_outputs) + (num_outputs if lora.use_dora else 0)
            for block in self.blocks
            for layer, (num_inputs, num_outputs) in block.items()
            if names == ALL_LINEAR or any(is_target(layer, name) for name in names)
        )

    def base_gib(self, quantization: Quantization) -> float:
        """Size of the frozen base: the linear layers of the blocks in 4 (with scales), 8 or 16 bits, the rest in 16."""
        return self.layers_gib(quantization) + (self.num_parameters - self.num_linear) * 16 / 8 / GIB

    def layers_gib(self, quantization: Quantization) -> float:
        """Size of the linear layers of the blocks."""
        return self.num_linear * quantization.bits_per_weight / 8 / GIB

    @property
    def num_linear(self) -> int:
        """Weights of the linear layers of all blocks."""
        return sum(num_inputs * num_outputs for block in self.blocks for num_inputs, num_outputs in block.values())


def model_shape(files: HuggingFaceFiles | ModelArgs, source: Path) -> ModelShape:
    """The shape of the source model in the folder `source`. Weights in Meta's layout are assumed to have 16 bits."""
    if isinstance(files, ModelArgs):
        num_bytes = sum(file.stat().st_size for file in source.glob("*.pth"))
        query, key = files.n_heads * files.head_dim, files.n_kv_heads * files.head_dim
        layers = llama_layers(hidden=files.dim, query=query, key=key, intermediate=files.hidden_dim)
        return ModelShape([layers] * files.n_layers, num_bytes // 2, num_bytes)
    return ModelShape(
        files.blocks,
        num_parameters=files.num_parameters,
        num_bytes=sum(file.stat().st_size for file in files.weight_files),
        can_be_packed=files.config["model_type"] in FUSED_MODEL_TYPES and not files.is_4bit,
    )
