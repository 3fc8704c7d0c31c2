"""Git LFS pointers in place of the files of a source model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface_files import load_tokenizer
from pdf2lora.weights.lfs_pointer import require_no_pointer
from pdf2lora.weights.safetensors_header import read_header
from pdf2lora.weights.tiktoken_files import is_tiktoken


@pytest.mark.parametrize("read", [read_header, load_tokenizer, is_tiktoken, require_no_pointer])
def test_a_pointer_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    file = tmp_path / "file"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 269060552\n")

    with pytest.raises(InputError, match=rf"{file}: this is a Git LFS pointer.*git lfs pull in {tmp_path}"):
        read(file)
