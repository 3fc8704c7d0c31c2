"""A tokenizer.model converted to the `tokenizers` library, and its files in Hugging Face's layout."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, processors

from pdf2lora.runtime.files import write_json

# transformers 5 would rebuild a LlamaTokenizer from its vocabulary. It reads this class from tokenizer.json.
TOKENIZER_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer with the names of its special tokens."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens including special ones. The embedding must have so many rows."""
        return self.tokenizer.get_vocab_size()

    def token_ids(self) -> dict[str, int]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id` for config.json."""
        tokens = {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}
        ids = self.tokenizer.get_vocab()
        return {f"{name}_token_id": ids[token] for name, token in tokens.items() if token is not None}

    def write(self, target: Path, *, context_length: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the folder `target`; context_length in tokens."""
        self.tokenizer.save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", self.config() | {"model_max_length": context_length})

    def config(self) -> dict[str, object]:
        """tokenizer_config.json without model_max_length."""
        config: dict[str, object] = dict(TOKENIZER_CLASS)
        for name in ("bos_token", "eos_token", "pad_token"):
            if (token := getattr(self, name)) is not None:
                config[name] = token
        config |= {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
        return config | ({} if self.unk_token is None else {"unk_token": self.unk_token})


def prepend_bos(bos: str, bos_id: int) -> processors.TemplateProcessing:
    """Puts BOS before a text, and before each text of a pair, as Meta's tokenizer.json does."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
