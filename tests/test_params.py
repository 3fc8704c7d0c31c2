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
TRACKERS = "'wandb', 'tensorboard', 'mlflow', 'trackio', 'comet_ml', 'aim', 'clearml' or 'swanlab'"


def error_lines(file: Path) -> list[str]:
    """Reads an invalid file and returns the lines of the error message."""
    with pytest.raises(InputError) as raised:
        read_params(file)
    return [line.strip() for line in str(raised.value).split("\n")]


def test_shipped_file_is_valid() -> None:
    written = YAML(typ="safe").load(SHIPPED)
    params = read_params(SHIPPED)
    assert params.model_dump(exclude_none=True) == written
    assert params.llama_version == written["models"][written["model"]]["llama_version"]


def test_the_selected_model_gives_the_llama_version(write_params: WriteParams) -> None:
    changes = {"model": "old", "models.old": {"llama_version": "2"}}
    assert read_params(write_params(changes)).llama_version == "2"


def test_numbers_without_quotes_are_understood(write_params: WriteParams) -> None:
    params = read_params(write_params({"corpus": 2024, "model": 7, "models.7": {"llama_version": 3.2}}))
    assert (params.corpus, params.model, params.llama_version) == ("2024", "7", "3.2")


def test_a_model_needs_no_entry(write_params: WriteParams) -> None:
    assert read_params(write_params({"model": "smollm2", "models": {}})).llama_version is None


def test_params_cannot_be_changed() -> None:
    params = read_params(SHIPPED)
    with pytest.raises(ValidationError, match="frozen"):
        params.lora.r = 64
    with pytest.raises(ValidationError, match="frozen"):
        params.corpus = "other"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train", None, "must be a section of keys and values"),
        ("models", None, "must be a section of keys and values"),
        ("train.seed", 2**63, "must be less than 9223372036854775808"),
        ("extract.max_pages", "many", "must be an integer"),
        ("extract.max_pages", 3.0, "must be an integer"),
        ("extract.max_pages", True, "must be an integer"),
        ("extract.clean", "yes", "must be a boolean"),
        ("extract.engines", "pypdf2", "must be a list"),
        ("corpus", "20.24", "must have only letters, digits, '_' and '-'"),
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
        ("models.demo.llama_version", "3.4", "must be '1', '2', '3', '3.1', '3.2' or '3.3'"),
        ("corpus", "ar6.wg1", "must have only letters, digits, '_' and '-'"),
        ("model", "llama_3.2", "must have only letters, digits, '_' and '-'"),
        ("corpus", "../other", "must have only letters, digits, '_' and '-'"),
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
        ("model", "a b", "must have only letters, digits, '_' and '-'"),
        ("cluster.corpus", "", "must not be empty"),
        (
            "cluster.scheduler",
            "foo",
            "must be local, an address such as tcp://host:8786, or a file that ends in .json",
        ),
        *(
            (
                "cluster.scheduler",
                address,
                "must be local, an address such as tcp://host:8786, or a file that ends in .json",
            )
            for address in ("tcp://localhost", "http://localhost:8787", "tcp://localhost:abc")
        ),
        ("train.early_stopping_patience", 0, "must be greater than or equal to 1 or 'none'"),
        ("train.report_to", "w&b", f"must be 'none' or {TRACKERS} or a list"),
    ],
)
def test_message_for_an_invalid_value_has_key_value_rule_and_remedy(
    write_params: WriteParams, key: str, value: Any, rule: str
) -> None:
    assert error_lines(write_params({key: value})) == [
        f"{key} is {value!r}; it {rule}. Change it in params.yaml or with -S {key}=..."
    ]


def test_message_for_a_list_entry_has_its_index(write_params: WriteParams) -> None:
    [line] = error_lines(write_params({"extract.engines": ["pypdf2", "mupdf"]}))
    assert line.startswith("extract.engines.1 is 'mupdf'; it must be 'pypdf2' or 'pdfium'. Change it in params.yaml")
    assert line.endswith("or with -S extract.engines=[...]")


def test_message_for_a_list_entry_of_a_union_has_its_index(write_params: WriteParams) -> None:
    [line] = error_lines(write_params({"train.report_to": ["wandb", "w&b"]}))
    assert line.startswith(f"train.report_to.1 is 'w&b'; it must be {TRACKERS}.")


def test_empty_list_is_an_error(write_params: WriteParams) -> None:
    [line] = error_lines(write_params({"lora.target_modules": []}))
    assert line.startswith("lora.target_modules is []")
    assert "at least 1" in line


@pytest.mark.parametrize("value", [1, 64, "auto"])
def test_effective_batch_is_a_number_or_auto(write_params: WriteParams, value: int | str) -> None:
    assert read_params(write_params({"train.effective_batch": value})).train.effective_batch == value


@pytest.mark.parametrize("value", [20, 20.5, "auto"])
def test_gpu_memory_is_a_number_or_auto(write_params: WriteParams, value: float | str) -> None:
    assert read_params(write_params({"find_batch.memory_gib": value})).find_batch.memory_gib == value


@pytest.mark.parametrize("value", [True, "gaussian", "loftq", "olora", "pissa", "pissa_niter_16"])
def test_initializations_of_peft(write_params: WriteParams, value: bool | str) -> None:
    assert read_params(write_params({"lora.init_lora_weights": value})).lora.init_lora_weights == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (False, "it must be true, gaussian, loftq, pissa, pissa_niter_N or olora"),
        ("pissa_niter_", "it must be true, gaussian, loftq, pissa, pissa_niter_N or olora"),
        ("eva", "it needs the activations of a data set"),
        ("orthogonal", "PEFT draws it in the type of the weights, and 4-bit weights have an integer type"),
    ],
)
def test_other_initializations_are_refused_with_the_reason(write_params: WriteParams, value: Any, reason: str) -> None:
    assert error_lines(write_params({"lora.init_lora_weights": value})) == [
        f"lora.init_lora_weights is {value!r}; {reason}. Change it in params.yaml."
    ]


def test_initializations_that_other_settings_exclude(write_params: WriteParams) -> None:
    [line] = error_lines(write_params({"lora.init_lora_weights": "pissa", "lora.use_dora": True}))
    assert line.startswith("lora.use_dora is true and lora.init_lora_weights is pissa; DoRA needs")
    [line] = error_lines(write_params({"lora.init_lora_weights": "loftq", "quantization.bits": 16}))
    assert line.startswith("lora.init_lora_weights is loftq and quantization.bits is 16; loftq corrects")


def test_integer_is_valid_for_a_float_setting(write_params: WriteParams) -> None:
    assert read_params(write_params({"train.num_train_epochs": 3})).train.num_train_epochs == 3


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("extract.max_page", "Did you mean max_pages?"),
        ("lora.alpha", "Did you mean lora_alpha?"),
        ("modle", "Did you mean model?"),
        ("models.demo.llama_verison", "Did you mean llama_version?"),
        ("split.zzz", "Known keys: test_fraction, validation_fraction, near_duplicate_similarity, seed."),
        ("split.interval", "Known keys: test_fraction, validation_fraction, near_duplicate_similarity, seed."),
    ],
)
def test_message_for_an_unknown_key_suggests_a_similar_one(write_params: WriteParams, key: str, hint: str) -> None:
    assert error_lines(write_params({key: 1})) == [f"{key} is not a setting. {hint}"]


def test_unknown_key_of_a_model_that_has_the_name_of_a_section(write_params: WriteParams) -> None:
    file = write_params({"models.train": {"llama_version": "3", "llama_versio": "3"}})
    assert error_lines(file) == ["models.train.llama_versio is not a setting. Did you mean llama_version?"]


@pytest.mark.parametrize("key", ["train.seed", "extract", "corpus"])
def test_missing_key_is_an_error(write_params: WriteParams, key: str) -> None:
    assert error_lines(write_params(without=[key])) == [
        f"{key} is missing; every setting must be in params.yaml. Add it."
    ]


def test_model_name_that_looks_like_a_type_is_complete_in_the_message(write_params: WriteParams) -> None:
    [line] = error_lines(write_params({"models.internlm": {"llama_version": "9"}}))
    assert line.startswith("models.internlm.llama_version is '9'; it must be ")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"split.test_fraction": 0.25, "split.validation_fraction": 0.75},
            "split.test_fraction is 0.25 and split.validation_fraction is 0.75; their sum must be less than 1. "
            "Reduce one of them.",
        ),
        (
            {"find_batch.min": 9, "find_batch.max": 8},
            "find_batch.min is 9; it must not be greater than find_batch.max (8). Reduce it.",
        ),
        (
            {"evaluate.stride": 65, "compute.seq_length": 64},
            "evaluate.stride is 65; it must not be greater than compute.seq_length (64), because windows would skip "
            "tokens. Reduce it.",
        ),
        (
            {"train.keep": "best", "split.validation_fraction": 0},
            "train.keep is best and split.validation_fraction is 0; it needs validation documents. Use last, or a "
            "validation_fraction above 0.",
        ),
        (
            {"train.early_stopping_patience": 2, "split.validation_fraction": 0},
            "train.early_stopping_patience is 2 and split.validation_fraction is 0; it needs validation documents. Use "
            "none, or a validation_fraction above 0.",
        ),
    ],
)
def test_inconsistent_keys_are_an_error(write_params: WriteParams, changes: dict[str, Any], line: str) -> None:
    assert error_lines(write_params(changes)) == [line]


def test_keys_at_their_limits_are_valid(write_params: WriteParams) -> None:
    params = read_params(
        write_params({"find_batch.min": 8, "find_batch.max": 8, "evaluate.stride": 64, "compute.seq_length": 64})
    )
    assert (params.find_batch.min, params.evaluate.stride) == (8, 64)


def test_one_message_lists_all_invalid_keys(write_params: WriteParams) -> None:
    lines = error_lines(write_params({"lora.r": 0, "lora.rank": 8, "train.optim": "adam"}, without=["sample.seed"]))
    keys = {line.partition(" ")[0] for line in lines}
    assert keys == {"lora.r", "lora.rank", "train.optim", "sample.seed"}
    assert len(lines) == 4


def test_one_message_lists_all_inconsistent_keys(write_params: WriteParams) -> None:
    lines = error_lines(write_params({"split.test_fraction": 0.99, "find_batch.min": 9, "find_batch.max": 8}))
    assert [line.partition(" ")[0] for line in lines] == ["split.test_fraction", "find_batch.min"]


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
def test_file_without_sections_is_an_error(tmp_path: Path, content: bytes, kind: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    assert error_lines(file) == [f"{file} has the type {kind}; it must have sections such as 'train:'. Correct it."]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"train: {seed: 1", "line 1"),
        (b"corpus: demo\ncorpus: other\n", 'duplicate key "corpus"'),
        (b"corpus: !!python/name:os.system x\n", "constructor"),
        (b"corpus: caf\xe9\n", "utf-8"),
    ],
)
def test_message_for_invalid_yaml_is_one_line(tmp_path: Path, content: bytes, word: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    [line] = error_lines(file)
    assert line.startswith(f"{file} is not valid YAML: ")
    assert word in line
    assert line.endswith("Correct that line.")


def test_message_for_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    assert error_lines(file) == [f"{file} does not exist. Run from the folder that holds dvc.yaml."]
