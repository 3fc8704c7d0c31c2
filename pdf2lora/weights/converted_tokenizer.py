"""A tokenizer.model converted to the `tokenizers` library, and its files in Hugging Face's layout."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, processors

from pdf2lora.runtime.files import write_json


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer with the names of its special tokens."""

    tokenizer: Tokenizer
    bos_token: str
    eos_token: str
    pad_token: str
    unk_token: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the special ones: the rows that the embedding must have."""
        return self.tokenizer.get_vocab_size()

    def token_ids(self) -> dict[str, int]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id` for config.json."""
        tokens = {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}
        ids = self.tokenizer.get_vocab()
        return {f"{name}_token_id": ids[token] for name, token in tokens.items()}

    def write(self, target: Path, *, context_length: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the folder `target`; context_length in tokens."""
        self.tokenizer.save(str(target / "tokenizer.json"))
        # transformers 5 rebuilds a LlamaTokenizer from its vocabulary. It loads this class from tokenizer.json.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": context_length,
        }
        if self.unk_token is not None:
            config["unk_token"] = self.unk_token
        write_json(target / "tokenizer_config.json", config)


def prepend_bos(bos: str, bos_id: int) -> processors.TemplateProcessing:
    """Puts BOS before a text, and before each text of a pair, as Meta's tokenizer.json does."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
