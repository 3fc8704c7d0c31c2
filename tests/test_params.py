from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from pdf2lora.errors import InputError
from pdf2lora.params import read_params

SHIPPED = Path(__file__).resolve().parents[1] / "params.yaml"

WriteParams = Callable[..., Path]


def refusal(file: Path) -> list[str]:
    """The lines of the message with which this file is refused."""
    with pytest.raises(InputError) as refused:
        read_params(file)
    return [line.strip() for line in str(refused.value).split("\n")]


def test_the_shipped_file_is_valid() -> None:
    written = YAML(typ="safe").load(SHIPPED)
    params = read_params(SHIPPED)
    assert params.model_dump(exclude_none=True) == written
    assert params.source_model.llama_version == written["models"][written["model"]]["llama_version"]


def test_the_selected_model_gives_the_checkpoint(write_params: WriteParams) -> None:
    changes = {"model": "old", "models.old": {"llama_version": "2"}}
    assert read_params(write_params(changes)).source_model.llama_version == "2"


def test_params_cannot_be_changed() -> None:
    params = read_params(SHIPPED)
    with pytest.raises(ValidationError, match="frozen"):
        params.lora.r = 64
    with pytest.raises(ValidationError, match="frozen"):
        params.corpus = "other"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("extract.max_pages", "many", "must be an integer"),
        ("extract.max_pages", 3.0, "must be an integer"),
        ("extract.max_pages", True, "must be an integer"),
        ("extract.clean", "yes", "must be a boolean"),
        ("extract.engines", "pypdf2", "must be a list"),
        ("corpus", 2024, "must be a string"),
        ("train.learning_rate", "1e-5", "must be a number"),
        ("extract.max_pages", 0, "must be greater than or equal to 1"),
        ("extract.timeout_s", 0, "must be greater than 0"),
        ("extract.timeout_s", float("inf"), "must be a finite number"),
        ("extract.memory_gib", 0.25, "must be greater than or equal to 0.5"),
        ("split.test_fraction", 0.0, "must be greater than 0"),
        ("split.test_fraction", 1.0, "must be less than 1"),
        ("split.validation_fraction", -0.1, "must be greater than or equal to 0"),
        ("split.near_duplicate_similarity", 1.5, "must be less than or equal to 1"),
        ("lora.lora_dropout", 1, "must be less than 1"),
        ("lora.use_dora", "true", "must be a boolean"),
        ("lora.use_rslora", 1, "must be a boolean"),
        ("sample.num_documents", 0, "must be greater than or equal to 1"),
        ("sample.temperature", -0.1, "must be greater than or equal to 0"),
        ("train.learning_rate", float("nan"), "must be a finite number"),
        ("evaluate.stride", 0, "must be greater than or equal to 1"),
        ("quantization.bits", 5, "must be 4, 8 or 16"),
        ("quantization.bits", "4", "must be 4, 8 or 16"),
        ("quantization.bnb_4bit_quant_type", "int4", "must be 'nf4' or 'fp4'"),
        ("compute.attention", "eager", "must be 'auto', 'flash_attention_2' or 'sdpa'"),
        ("models.demo.llama_version", 3.2, "must be '1', '2', '3', '3.1' or '3.2'"),
        ("corpus", "ar6.wg1", "must be made of letters, digits, '_' and '-' (DVC cannot parse a dot)"),
        ("model", "llama_3.2", "must be made of letters, digits, '_' and '-' (DVC cannot parse a dot)"),
        ("corpus", "../other", "must be made of letters, digits, '_' and '-' (DVC cannot parse a dot)"),
        ("train.effective_batch", "all", "must be an integer or 'auto'"),
        ("train.effective_batch", 2.5, "must be an integer or 'auto'"),
        ("train.effective_batch", None, "must be an integer or 'auto'"),
        ("train.effective_batch", 0, "must be greater than or equal to 1 or 'auto'"),
        ("find_batch.steps", 1, "must be greater than or equal to 2"),
        ("find_batch.memory_gib", "x", "must be a number or 'auto'"),
        ("find_batch.memory_gib", None, "must be a number or 'auto'"),
        ("find_batch.memory_gib", 0, "must be greater than 0 or 'auto'"),
        ("find_batch.gpu_headroom_gib", -1, "must be greater than or equal to 0"),
        ("compute.kernels", "triton", "must be 'auto', 'reference', 'fused' or 'fp8'"),
        ("train.gradient_checkpointing", True, "must be 'auto', 'none', 'mlp', 'full' or 'offload'"),
        ("train.gradient_checkpointing", "half", "must be 'auto', 'none', 'mlp', 'full' or 'offload'"),
        ("compute.deterministic", "yes", "must be a boolean"),
    ],
)
def test_a_refused_value_is_told_with_key_value_rule_and_remedy(
    write_params: WriteParams, key: str, value: Any, rule: str
) -> None:
    assert refusal(write_params({key: value})) == [
        f"{key}: {value!r} {rule}; change it in params.yaml or with -S {key}=..."
    ]


def test_an_engine_of_a_list_is_named_by_its_place(write_params: WriteParams) -> None:
    [line] = refusal(write_params({"extract.engines": ["pypdf2", "mupdf"]}))
    assert line.startswith("extract.engines.1: 'mupdf' must be 'pypdf2' or 'pdfium'; change it in params.yaml")


def test_an_empty_list_is_refused(write_params: WriteParams) -> None:
    [line] = refusal(write_params({"lora.target_modules": []}))
    assert line.startswith("lora.target_modules: []")
    assert "at least 1" in line


@pytest.mark.parametrize("value", [1, 64, "auto"])
def test_the_effective_batch_is_a_number_or_auto(write_params: WriteParams, value: int | str) -> None:
    assert read_params(write_params({"train.effective_batch": value})).train.effective_batch == value


@pytest.mark.parametrize("value", [20, 20.5, "auto"])
def test_the_gpu_memory_is_a_number_or_auto(write_params: WriteParams, value: float | str) -> None:
    assert read_params(write_params({"find_batch.memory_gib": value})).find_batch.memory_gib == value


def test_a_whole_number_is_good_where_a_fraction_may_stand(write_params: WriteParams) -> None:
    assert read_params(write_params({"train.num_train_epochs": 3})).train.num_train_epochs == 3


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("extract.max_page", "did you mean max_pages?"),
        ("lora.alpha", "did you mean lora_alpha?"),
        ("modle", "did you mean model?"),
        ("models.demo.llama_verison", "did you mean llama_version?"),
        ("split.zzz", "known here: test_fraction, validation_fraction, near_duplicate_similarity, seed"),
        ("split.interval", "known here: test_fraction, validation_fraction, near_duplicate_similarity, seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(write_params: WriteParams, key: str, hint: str) -> None:
    assert refusal(write_params({key: 1})) == [f"{key}: unknown; {hint}"]


@pytest.mark.parametrize("key", ["train.seed", "extract", "corpus", "models.demo.llama_version"])
def test_a_missing_key_has_no_default(write_params: WriteParams, key: str) -> None:
    assert refusal(write_params(without=[key])) == [
        f"{key}: missing; every setting must stand in params.yaml, add this one"
    ]


def test_a_model_whose_name_looks_like_a_type_is_named_whole(write_params: WriteParams) -> None:
    assert refusal(write_params({"models.internlm": {}})) == [
        "models.internlm.llama_version: missing; every setting must stand in params.yaml, add this one"
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model": "demmo", "models": {"big": {"llama_version": "3"}, "demo": {"llama_version": "3.2"}}},
            "model: 'demmo' has no entry in models (big, demo); add one with its llama_version",
        ),
        (
            {"split.test_fraction": 0.25, "split.validation_fraction": 0.75},
            "split.validation_fraction: 0.75 with test_fraction 0.25 leaves nothing to train on; "
            "their sum must be less than 1",
        ),
        (
            {"find_batch.min": 9, "find_batch.max": 8},
            "find_batch.min: 9 must not be greater than find_batch.max (8)",
        ),
        (
            {"evaluate.stride": 65, "compute.seq_length": 64},
            "evaluate.stride: 65 must not be greater than compute.seq_length (64), or tokens would be left out",
        ),
    ],
)
def test_keys_that_do_not_agree_are_refused(write_params: WriteParams, changes: dict[str, Any], line: str) -> None:
    assert refusal(write_params(changes)) == [line]


def test_keys_that_just_agree_are_good(write_params: WriteParams) -> None:
    params = read_params(
        write_params({"find_batch.min": 8, "find_batch.max": 8, "evaluate.stride": 64, "compute.seq_length": 64})
    )
    assert (params.find_batch.min, params.evaluate.stride) == (8, 64)


def test_all_refused_keys_are_told_at_once(write_params: WriteParams) -> None:
    lines = refusal(write_params({"lora.r": 0, "lora.rank": 8, "train.optim": "adam"}, without=["sample.seed"]))
    keys = {line.partition(":")[0] for line in lines}
    assert keys == {"lora.r", "lora.rank", "train.optim", "sample.seed"}
    assert len(lines) == 4


def test_all_keys_that_do_not_agree_are_told_at_once(write_params: WriteParams) -> None:
    lines = refusal(write_params({"model": "none", "find_batch.min": 9, "find_batch.max": 8}))
    assert [line.partition(":")[0] for line in lines] == ["model", "find_batch.min"]


@pytest.mark.parametrize(("written", "value"), [("1e-05", 1e-5), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3)])
def test_numbers_are_yaml_1_2(tmp_path: Path, written: str, value: float) -> None:
    shipped = YAML(typ="safe").load(SHIPPED)["train"]["learning_rate"]
    text = SHIPPED.read_text(encoding="utf-8")
    line = f"learning_rate: {shipped}"
    assert line in text
    file = tmp_path / "params.yaml"
    file.write_text(text.replace(line, f"learning_rate: {written}"), encoding="utf-8")
    assert read_params(file).train.learning_rate == value


@pytest.mark.parametrize(("content", "kind"), [(b"", "NoneType"), (b"# nothing\n", "NoneType"), (b"- demo\n", "list")])
def test_a_file_without_sections_is_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    assert refusal(file) == [f"{file}: holds {kind}, must hold sections such as 'extract:' and 'train:'"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"train: {seed: 1", "line 1"),
        (b"corpus: demo\ncorpus: other\n", 'duplicate key "corpus"'),
        (b"corpus: !!python/name:os.system x\n", "constructor"),
        (b"corpus: caf\xe9\n", "utf-8"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path, content: bytes, word: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    [line] = refusal(file)
    assert line.startswith(f"{file}: not YAML: ")
    assert word in line
    assert line.endswith("mend the line it names")


def test_a_missing_file_is_told_with_where_to_run(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    assert refusal(file) == [f"{file}: there is no such file; run from the folder that holds dvc.yaml"]
