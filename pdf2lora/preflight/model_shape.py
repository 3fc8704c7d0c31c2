"""The sizes of a source model, read from its settings file. No file of weights is opened."""

from dataclasses import dataclass
from pathlib import Path

from pdf2lora.params import ALL_LINEAR, Lora, Quantization
from pdf2lora.weights.config_json import read_sizes
from pdf2lora.weights.json_files import read_json
from pdf2lora.weights.params_json import read_model_args

GIB = 2**30
SENTENCEPIECE_VOCAB_SIZE = 32000  # of Llama 1 and 2, whose params.json has no vocab_size


@dataclass(frozen=True)
class ModelShape:
    """Numbers of layers, features and tokens."""

    num_layers: int
    hidden_size: int
    query_size: int
    kv_size: int
    intermediate_size: int
    vocab_size: int
    num_parameters: int
    num_bytes: int
    """of the files of weights"""

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: (input features, output features)."""
        hidden, query, kv, intermediate = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }

    def lora_parameters(self, lora: Lora) -> int:
        """A and B of each target: r x (in + out). DoRA adds `out` magnitudes."""
        names = self.layers if lora.target_modules == ALL_LINEAR else lora.target_modules
        targets = [self.layers[name] for name in names if name in self.layers]
        return self.num_layers * sum(
            lora.r * (num_inputs + num_outputs) + (num_outputs if lora.use_dora else 0)
            for num_inputs, num_outputs in targets
        )

    def base_gib(self, quantization: Quantization) -> float:
        """The frozen base: the embedding in 16 bits, linear layers in 4 (with their scales), 8 or 16."""
        scale_bits = 0.127 if quantization.bnb_4bit_use_double_quant else 0.5  # per weight (Dettmers et al. 2023)
        bits = quantization.bits + (scale_bits if quantization.bits == 4 else 0)
        embedding = self.vocab_size * self.hidden_size
        return (embedding * 16 + (self.num_parameters - embedding) * bits) / 8 / GIB


def read_model_shape(source: Path, llama_version: str) -> ModelShape:
    """The shape of the source model in the folder `source`. The weights are assumed to have 16 bits.

    Raises:
        InputError: params.json or config.json is damaged.
    """
    if (source / "params.json").exists():
        args = read_model_args(source / "params.json", llama_version)
        num_bytes = sum(file.stat().st_size for file in source.glob("*.pth"))
        return ModelShape(
            num_layers=args.n_layers,
            hidden_size=args.dim,
            query_size=args.n_heads * args.head_dim,
            kv_size=args.n_kv_heads * args.head_dim,
            intermediate_size=args.hidden_dim,
            vocab_size=args.vocab_size or SENTENCEPIECE_VOCAB_SIZE,
            num_parameters=num_bytes // 2,
            num_bytes=num_bytes,
        )
    path = source / "config.json"
    sizes = read_sizes(read_json(path), path)
    num_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return ModelShape(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        query_size=sizes.num_heads * sizes.head_dim,
        kv_size=sizes.num_kv_heads * sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        num_parameters=num_bytes // 2,
        num_bytes=num_bytes,
    )
