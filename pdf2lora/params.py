"""params.yaml as types and bounds. No setting has a default in code: params.yaml is where all of them stand.

The whole file is checked whenever a stage starts, and all that is wrong with it is said at once.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pdf2lora.errors import InputError

PARAMS_FILE = Path("params.yaml")
UNION_MEMBERS = ("constrained-int", "constrained-float", "literal['auto']")  # pydantic's names, in the path of an error

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # a folder, and a word that `dvc exp run -S` can parse
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Gib = Annotated[float, Field(gt=0)]


Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "aim", "clearml", "swanlab"]


class Section(BaseModel):
    """A part of params.yaml: unknown keys and other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SourceModel(Section):
    llama_version: Literal["1", "2", "3", "3.1", "3.2"]
    hub_id: str | None = None
    """The base model's name on the Hugging Face hub, for users of the exported adapter. Optional."""


class Extract(Section):
    engines: Annotated[list[Literal["pypdf2", "pdfium"]], Field(min_length=1)]
    max_pages: Positive
    timeout_s: Annotated[float, Field(gt=0)]
    memory_gib: Annotated[float, Field(ge=0.5)]
    clean: bool
    min_characters: Positive


class Split(Section):
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    validation_fraction: Fraction
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)]
    seed: int


class Convert(Section):
    max_shard_gib: Gib


class Quantization(Section):
    bits: Literal[4, 8, 16]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool


class Lora(Section):
    r: Positive
    lora_alpha: Positive
    lora_dropout: Fraction
    target_modules: Annotated[
        list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]], Field(min_length=1)
    ]
    use_dora: bool
    use_rslora: bool
    init_lora_weights: Literal[True, "gaussian"]
    """PEFT's initialization of A: true draws from a uniform distribution, gaussian from a normal one. B is zero.
    PEFT's other values change the weights of the base, which the adapter does not contain."""


class Compute(Section):
    num_processes: Positive | Literal["auto"]
    """Processes of find_batch, train and evaluate; one process uses one GPU. auto: all visible GPUs, or one process
    where there is no GPU. Changes the time, not the result."""
    seq_length: Annotated[int, Field(ge=8)]
    kernels: Literal["auto", "reference", "fused", "fp8"]
    compute_dtype: Literal["auto", "bfloat16", "float32"]
    attention: Literal["auto", "flash_attention_2", "sdpa"]
    deterministic: bool


class FindBatch(Section):
    min: Positive
    max: Positive
    steps: Annotated[int, Field(ge=2)]
    memory_gib: Gib | Literal["auto"]
    cpu_memory_gib: Gib
    gpu_headroom_gib: Annotated[float, Field(ge=0)]


class Train(Section):
    effective_batch: Positive | Literal["auto"]
    num_train_epochs: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    optim: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]
    gradient_checkpointing: Literal["auto", "none", "mlp", "full", "offload"]
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    seed: Annotated[int, Field(ge=0)]
    keep: Literal["last", "best"]
    """The adapter to keep: of the last step, or of the step with the lowest validation loss."""
    early_stopping_patience: Positive | Literal["none"]
    """Validations in a row without a new lowest loss after which the training stops; none: never."""
    report_to: Literal["none"] | Tracker | Annotated[list[Tracker], Field(min_length=1)]
    """Experiment trackers beside dvclive, by accelerate's names. Each needs its package."""


class Evaluate(Section):
    """Test perplexity, its intervals and comparison."""

    stride: Positive
    """Tokens that each window adds to the previous one. A token has at least seq_length - stride tokens of context,
    where its document has them. A smaller stride gives more context and takes more time."""
    per_device_batch: Positive
    """Windows in one forward pass. It changes time and memory, not the result."""
    unquantized_base: bool
    """Also scores the base without quantization, which shows the cost of 4 or 8 bits. It takes half as long again."""
    compare_to: Annotated[str, Field(min_length=1)]
    """A git revision or DVC experiment whose adapter is the baseline of a paired comparison, or none."""


class Sample(Section):
    """Text that base and adapted model generate, for the report and for make generate."""

    num_documents: Positive
    """Test documents whose openings both models continue."""
    prompt_tokens: Positive
    """Tokens of each opening."""
    max_new_tokens: Positive
    """Tokens that a model generates at most."""
    temperature: Annotated[float, Field(ge=0)]
    """0 takes the most probable token each time. A higher temperature draws less probable tokens more often."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of the draws."""


class Params(Section):
    corpus: Name
    model: Name
    models: dict[Name, SourceModel]
    extract: Extract
    split: Split
    convert: Convert
    quantization: Quantization
    lora: Lora
    compute: Compute
    find_batch: FindBatch
    train: Train
    evaluate: Evaluate
    sample: Sample

    @property
    def source_model(self) -> SourceModel:
        return self.models[self.model]

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        """Rules that two keys make together; each is one line of the ValueError."""
        broken = []
        if self.model not in self.models:
            known = ", ".join(self.models)
            broken.append(f"model: {self.model!r} has no entry in models ({known}); add one with its llama_version")
        if self.split.test_fraction + self.split.validation_fraction >= 1:
            broken.append(
                f"split.validation_fraction: {self.split.validation_fraction} with test_fraction "
                f"{self.split.test_fraction} leaves nothing to train on; their sum must be less than 1"
            )
        if self.find_batch.min > self.find_batch.max:
            broken.append(
                f"find_batch.min: {self.find_batch.min} must not be greater than find_batch.max ({self.find_batch.max})"
            )
        if self.evaluate.stride > self.compute.seq_length:
            broken.append(
                f"evaluate.stride: {self.evaluate.stride} must not be greater than compute.seq_length "
                f"({self.compute.seq_length}), or tokens would be left out"
            )
        if broken:
            raise ValueError("\n".join(broken))
        return self


def read_params(file: Path = PARAMS_FILE) -> Params:
    """Reads and checks the whole of params.yaml (YAML 1.2, in which 1e-05 is a number).

    Raises:
        InputError: one line for each thing that is wrong, every one naming its key, value and rule.
    """
    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file; run from the folder that holds dvc.yaml") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML: {' '.join(str(error).split())}; mend the line it names") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds {type(values).__name__}, must hold sections such as 'extract:' and 'train:'")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in _in_words(detail)]
        raise InputError(f"\n{' ' * 7}".join(_merged(lines))) from None


def _in_words(detail: ErrorDetails) -> Iterable[str]:
    """One pydantic error as lines of ours: key, value, rule, remedy."""
    key = ".".join(str(part) for part in detail["loc"] if part not in UNION_MEMBERS)
    value, context = detail["input"], detail.get("ctx", {})
    change = f"change it in {PARAMS_FILE} or with -S {key}=..."
    match detail["type"]:
        case "missing":
            yield f"{key}: missing; every setting must stand in {PARAMS_FILE}, add this one"
        case "extra_forbidden":
            yield f"{key}: unknown; {_did_you_mean(detail['loc'])}"
        case "literal_error":
            yield f"{key}: {value!r} must be {context['expected']}; {change}"
        case "value_error":
            yield from str(context["error"]).split("\n")
        case "too_short":
            yield f"{key}: {value!r} must hold at least {context['min_length']}; {change}"
        case "string_pattern_mismatch":
            key = key.removesuffix(".[key]")
            yield f"{key}: {value!r} must be made of letters, digits, '_' and '-' (DVC cannot parse a dot); {change}"
        case _:
            rule = (
                detail["msg"]
                .removeprefix("Input should ")
                .replace("a valid integer", "an integer")
                .replace("valid ", "")
            )
            yield f"{key}: {value!r} must {rule}; {change}"


def _merged(lines: list[str]) -> list[str]:
    """A value of a union is refused once for each of its types: those lines become one, `must be a or b`."""
    merged: dict[str, str] = {}
    for line in lines:
        key_and_value, must, rest = line.partition(" must ")
        if must and key_and_value in merged:
            before, _, remedy = merged[key_and_value].rpartition("; ")
            merged[key_and_value] = f"{before} or {rest.partition('; ')[0].removeprefix('be ')}; {remedy}"
        else:
            merged[key_and_value] = line
    return list(merged.values())


def _did_you_mean(path: tuple[int | str, ...]) -> str:
    """The nearest key of the same section, or all of them."""
    section = Params
    for part in path[:-1]:  # `models` is a dict of SourceModel, every other part of a path is a field
        section = Params.model_fields[str(part)].annotation if part in Params.model_fields else SourceModel  # type: ignore
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
