"""Types and limits of all settings in params.yaml.

Settings have no defaults in code. Every stage reads and validates the whole file when it starts. One error message
lists all invalid settings.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pdf2lora.errors import InputError

PARAMS_FILE = Path("params.yaml")
UNION_MEMBER = re.compile(r"constrained-\w+|(literal|list)\[.*\]")  # pydantic adds it to the path of an error


def _unquoted(value: object) -> object:
    """YAML reads 2024 and 3.2 without quotes as numbers."""
    return str(value) if type(value) in (int, float) else value


NAME = r"^[A-Za-z0-9_-]+$"
MODULE_NAME = r"^[A-Za-z0-9_.]+$"
SCHEDULER = r"^(local|(tcp|tls|ws|wss|ucx)://\S+:\d+|\S+\.json)$"
PATTERN_RULES = {
    NAME: "have only letters, digits, '_' and '-'",
    MODULE_NAME: "have only letters, digits, '_' and '.'",
    SCHEDULER: "be local, an address such as tcp://host:8786, or a file that ends in .json",
}
# A folder, and a word that `dvc exp run -S` can parse.
Name = Annotated[str, BeforeValidator(_unquoted), Field(pattern=NAME)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Gib = Annotated[float, Field(gt=0)]
ModuleName = Annotated[str, Field(pattern=MODULE_NAME)]
ALL_LINEAR = "all-linear"
UNQUANTIZED_GPU_SHARE = 0.8  # of the free GPU memory for an unquantized base; the rest: activations and logits
Placement = Literal["gpu", "host"]  # of a base model's decoder layers
ENTRY = re.compile(r"\.\d+$")  # of a list, in the path of an error
DICTIONARY = re.compile(r"a valid dictionary( or instance of \w+)?")  # pydantic's words for a section
INITIALIZATION = re.compile(r"gaussian|loftq|olora|pissa(_niter_\d+)?")
REFUSED_INITIALIZATIONS = {
    "corda": "it needs the activations of a data set",
    "eva": "it needs the activations of a data set",
    "lora_ga": "it needs the gradients of a data set",
    "mica": "it freezes B, and the training step updates A and B",
    "orthogonal": "PEFT draws it in the type of the weights, and 4-bit weights have an integer type",
}


def _initialization(value: object) -> object:
    """A value of lora.init_lora_weights."""
    if value is True or (isinstance(value, str) and INITIALIZATION.fullmatch(value)):
        return value
    reason = REFUSED_INITIALIZATIONS.get(str(value), "it must be true, gaussian, loftq, pissa, pissa_niter_N or olora")
    raise ValueError(f"lora.init_lora_weights is {value!r}; {reason}. Change it in {PARAMS_FILE}.")


Initialization = Annotated[bool | str, BeforeValidator(_initialization)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch has no larger seed
Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "aim", "clearml", "swanlab"]


class Section(BaseModel):
    """A section of params.yaml. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SourceModel(Section):
    """Facts about one base model that its files do not contain."""

    llama_version: Annotated[Literal["1", "2", "3", "3.1", "3.2", "3.3"], BeforeValidator(_unquoted)] | None = None
    """Selects RoPE scaling, context length and special tokens. Meta's params.json does not distinguish 3.1, 3.2
    and 3.3."""
    hub_id: str | None = None
    """The model's name on the Hugging Face hub, for users of the exported adapter."""


class Extract(Section):
    """PDF -> clean text."""

    engines: Annotated[list[Literal["pypdf2", "pdfium"]], Field(min_length=1)]
    """PDF engines. The first one reads each document. A later one reads four pages and the pages without text; if its
    text is better there, it reads all, and the better text is kept. If both are similar, the first one wins."""
    max_pages: Positive
    """Pages per document, from the first on. Later pages are not read."""
    timeout_s: Annotated[float, Field(gt=0)]
    """Processor seconds per document and engine. An engine that needs more is stopped. Its pages are kept."""
    memory_gib: Annotated[float, Field(ge=0.5)]
    """Address space of one worker process, in GiB. An engine that needs more is stopped. Its pages are kept."""
    clean: bool
    """Removes page headers, page and line numbers, hyphenation, ligatures and control characters."""
    min_characters: Positive
    """Documents with less text, in characters, are left out."""
    ocr: Literal["auto", "rapidocr", "none"]
    """Reads the pages without readable text. auto: by RapidOCR if it is installed. rapidocr: it must be installed."""
    ocr_timeout_s: Annotated[float, Field(gt=0)]
    """Processor time for the OCR of one page, in seconds. A page that needs more ends the OCR of its document."""
    ocr_memory_gib: Annotated[float, Field(ge=2)]
    """Address space of one OCR worker, in GiB. A page at 200 dpi needs about 2 GiB."""


class Cluster(Section):
    """Where the work runs. No stage depends on this section: it changes the time, not the results."""

    scheduler: Annotated[str, Field(pattern=SCHEDULER)]
    """local: the cores of this machine. Otherwise the address of a Dask scheduler (tcp://host:8786) or the file that it
    writes (--scheduler-file), which ends in .json. Its workers read PDFs (extract), sketch texts (split) and encode
    texts (tokenize)."""
    corpus: Annotated[str, Field(min_length=1)]
    """Where the Dask workers find the corpus: a folder, or an address that fsspec knows (s3://bucket/folder). none: the
    folder has the same path on all machines."""


class Split(Section):
    """Documents -> train, validation and test documents."""

    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the documents in the test split."""
    validation_fraction: Fraction
    """Share of the documents in the validation split, which gives the curves during training. 0: no validation."""
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)]
    """Documents with this Jaccard similarity or more go to the same split. Lower values prevent more leakage."""
    seed: int
    """Seed of the random split."""


class Convert(Section):
    """Source model -> models/base in Hugging Face's layout."""

    max_shard_gib: Gib
    """Largest weight file that convert writes from Meta's layout, in GiB. Files in Hugging Face's layout are copied."""


class Quantization(Section):
    """Precision of the frozen base weights, the same in training and evaluation."""

    bits: Literal[4, 8, 16]
    """Bits per weight. 4 needs the least memory; 16 means no quantization."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    """4-bit data type of bitsandbytes. nf4 fits normally distributed weights (QLoRA, Dettmers et al. 2023)."""
    bnb_4bit_use_double_quant: bool
    """Also quantizes the scales of the 4-bit blocks: 0.4 bits per weight less."""
    placement: Placement | Literal["auto"]
    """Where the decoder layers are. gpu: in GPU memory. host: in pinned host memory; each layer is copied to the GPU
    when it is needed, so a model larger than the GPU can train. Does not change the result. auto: the faster one that
    fits. loftq, pissa, olora and use_dora need gpu."""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including the scales of the 4-bit blocks (Dettmers et al. 2023)."""
        scale_bits = 0.127 if self.bnb_4bit_use_double_quant else 0.5
        return self.bits + (scale_bits if self.bits == 4 else 0)


class Lora(Section):
    """The adapter."""

    r: Positive
    """Rank of the LoRA matrices. Trainable parameters and adapter size grow in proportion."""
    lora_alpha: Positive
    """The adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: Fraction
    """Dropout probability on the adapter's input, in training only."""
    target_modules: Literal["all-linear"] | Annotated[list[ModuleName], Field(min_length=1)]
    """Linear layers that get LoRA matrices, by their names in the model, or all-linear: every one except the head. More
    layers learn more and train slower."""
    use_dora: bool
    """Learns magnitude and direction separately (DoRA, Liu et al. 2024). Slower; often better at low rank."""
    use_rslora: bool
    """Scales by lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). For high ranks."""
    init_lora_weights: Initialization
    """PEFT's initialization of A and B. true: A is uniform, B is zero. gaussian: A is normal, B is zero. loftq: A and B
    correct the error of quantization. pissa: A and B get the part of each weight with the largest singular values, and
    the base keeps the rest. pissa_niter_N: a fast approximation of pissa with N iterations, such as 4 or 16. olora: A
    and B get a part of a QR decomposition, and the base keeps the rest. docs/tuning.md compares them."""

    @property
    def reads_weights(self) -> bool:
        """Whether the initial matrices depend on the weights of the base."""
        return self.init_lora_weights not in (True, "gaussian")

    @property
    def needs_resident_base(self) -> bool:
        """Whether the base's layers must be in GPU memory when LoRA is added. DoRA starts from their norms."""
        return self.reads_weights or self.use_dora

    @property
    def changes_base(self) -> bool:
        """Whether the adapter is trained on a changed base."""
        return self.reads_weights and self.init_lora_weights != "loftq"


class Compute(Section):
    """How the model is computed, in find_batch, train and evaluate."""

    num_processes: Positive | Literal["auto"]
    """Processes of find_batch, train and evaluate; one process uses one GPU. auto: all visible GPUs, or one process on
    a CPU. Changes the time, not the result."""
    seq_length: Annotated[int, Field(ge=8)]
    """Tokens per training sequence and per evaluation window. Memory per sequence grows with it."""
    kernels: Literal["auto", "reference", "fused", "fp8"]
    """Implementation of the training step. reference: transformers and PEFT. fused: this project's Triton kernels, same
    mathematics. fp8: fused, with 8-bit products of the frozen weights, an approximation in training only. auto: fused
    on a supported GPU, else reference."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"]
    """Data type of activations and products. auto: bfloat16 on a GPU that supports it, float16 on an older GPU, float32
    on a CPU."""
    attention: Literal["auto", "flash_attention_2", "sdpa"]
    """Attention of the reference implementation. auto: flash_attention_2 if it is installed, else PyTorch's sdpa."""
    deterministic: bool
    """Two runs on one GPU give the same adapter, bit for bit. Costs about 3% of the speed."""


class FindBatch(Section):
    """Search for the batch size. It measures real training steps in a child process."""

    min: Positive
    """The first batch that is measured, in sequences. find_batch stops with an error if it does not fit."""
    max: Positive
    """The largest batch that is measured, in sequences."""
    steps: Annotated[int, Field(ge=2)]
    """Optimizer steps per measurement. The first step is a warm-up and is not timed."""
    memory_gib: Gib | Literal["auto"]
    """GPU memory budget of a training step in GiB. auto: all free memory. A number emulates a smaller GPU. It does not
    limit evaluate."""
    cpu_memory_gib: Gib
    """Budget for the tensors of a step on a machine without a GPU, in GiB."""
    gpu_headroom_gib: Annotated[float, Field(ge=0)]
    """Part of the GPU budget that stays free for CUDA and for fragmentation, in GiB."""

    def gpu_budget_gib(self, available_gib: float) -> float:
        """Memory of a training step on a GPU with so much memory. Not positive if the headroom is too large."""
        allowed_gib = available_gib if self.memory_gib == "auto" else min(self.memory_gib, available_gib)
        return allowed_gib - self.gpu_headroom_gib


class Train(Section):
    """Training. Only effective_batch, gradient_checkpointing and optim change the memory or the time of a step."""

    effective_batch: Positive | Literal["auto"]
    """Sequences per optimizer step. The per-device batch and accumulation divide it, so the result does not depend on
    the GPU's memory. auto: the largest batch that fits. The demo has 4; 16 to 64 suit a real model. A number below the
    number of processes leaves GPUs idle."""
    num_train_epochs: Annotated[float, Field(gt=0)]
    """Passes over the training documents; fractions are allowed."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    """Peak learning rate, after warm-up."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    """Learning rate schedule."""
    warmup_steps: Annotated[float, Field(ge=0)]
    """Optimizer steps with a rising learning rate. A value below 1 is a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients are clipped to this norm."""
    optim: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]
    """Optimizer. 8bit and paged variants are from bitsandbytes; paged state can move to host memory."""
    gradient_checkpointing: Literal["auto", "none", "mlp", "full", "offload"]
    """Activations that the backward pass recomputes to save memory. none: nothing; mlp: gate and up projections; full:
    all but the layer inputs and, from 8,192 tokens in a sequence on, attention; offload: like full, with layer inputs
    in host memory. auto: find_batch selects the fastest that fits; on a CPU the first of none and full that fits."""
    logging_steps: Positive
    """Optimizer steps between two points of the training curves."""
    eval_steps: Positive
    """Optimizer steps between two validations."""
    save_steps: Positive
    """Optimizer steps between two checkpoints."""
    seed: Seed
    """Seed of the LoRA matrices, the order of the sequences and dropout."""
    keep: Literal["last", "best"]
    """The adapter to keep: of the last step, or of the step with the lowest validation loss."""
    replay: Name
    """A folder of data/replay whose text is mixed into the training, so that the model forgets less; or none."""
    replay_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the training sequences that are replay text. An epoch has all sequences of the corpus and, in addition,
    replay sequences up to this share, none of them twice."""
    early_stopping_patience: Positive | Literal["none"]
    """Training stops after this number of validations in a row without a new lowest loss. none: never stops early."""
    report_to: Literal["none"] | Tracker | Annotated[list[Tracker], Field(min_length=1)]
    """Experiment trackers in addition to dvclive, with accelerate's names. Each tracker needs its package."""


class Evaluate(Section):
    """Test perplexity, its intervals and comparison."""

    stride: Positive
    """Tokens that each window scores. A token has at least seq_length - stride tokens of context, or all tokens before
    it. A smaller stride gives more context and takes more time."""
    per_device_batch: Positive
    """Windows in one forward pass. Changes time and memory, not the result."""
    unquantized_base: bool
    """Also scores the base without quantization, which shows the cost of 4 or 8 bits. The first evaluate of a base
    takes 50% longer; later ones take its scores from .scratch/evaluate."""
    compare_to: Annotated[str, Field(min_length=1)]
    """A git revision or DVC experiment whose adapter is the baseline of a paired comparison, or none."""


class Sample(Section):
    """Text that base and adapted model generate, for the report and for make generate."""

    num_documents: Positive
    """Test documents whose openings both models continue."""
    prompt_tokens: Positive
    """Tokens of each opening."""
    max_new_tokens: Positive
    """Largest number of tokens that a model generates."""
    temperature: Annotated[float, Field(ge=0)]
    """0 takes the most probable token each time. A higher temperature draws less probable tokens more often."""
    seed: Seed
    """Seed of the draws."""

    @property
    def num_tokens(self) -> dict[str, int]:
        """The settings whose sum is the longest text of a sample."""
        return {"sample.prompt_tokens": self.prompt_tokens, "sample.max_new_tokens": self.max_new_tokens}


class Params(Section):
    """The whole of params.yaml."""

    corpus: Name
    """Folder of PDFs: data/pdfs/<corpus>."""
    model: Name
    """Folder of the source model: models/source/<model>."""
    models: dict[Name, SourceModel]
    """The Llama version of each model in Meta's layout. Models in Hugging Face's layout need no entry."""
    cluster: Cluster
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
    def llama_version(self) -> str | None:
        """Llama version of the selected model; None for a model without an entry in `models`."""
        return self.models.get(self.model, SourceModel()).llama_version

    @property
    def hub_id(self) -> str | None:
        """The base model's name on the Hugging Face hub, if it is known."""
        return self.models.get(self.model, SourceModel()).hub_id

    @model_validator(mode="after")
    def _require_consistent_keys(self) -> Self:
        """Rules about two keys. The ValueError has one line for each broken rule."""
        errors = []
        if self.split.test_fraction + self.split.validation_fraction >= 1:
            errors.append(
                f"split.test_fraction is {self.split.test_fraction} and split.validation_fraction is "
                f"{self.split.validation_fraction}; their sum must be less than 1. Reduce one of them."
            )
        if self.find_batch.min > self.find_batch.max:
            errors.append(
                f"find_batch.min is {self.find_batch.min}; it must not be greater than find_batch.max "
                f"({self.find_batch.max}). Reduce it."
            )
        if self.evaluate.stride > self.compute.seq_length:
            errors.append(
                f"evaluate.stride is {self.evaluate.stride}; it must not be greater than compute.seq_length "
                f"({self.compute.seq_length}), because windows would skip tokens. Reduce it."
            )
        if not self.split.validation_fraction:
            for key, off in (("keep", "last"), ("early_stopping_patience", "none")):
                if getattr(self.train, key) != off:
                    errors.append(
                        f"train.{key} is {getattr(self.train, key)} and split.validation_fraction is 0; it needs "
                        f"validation documents. Use {off}, or a validation_fraction above 0."
                    )
        start = self.lora.init_lora_weights
        if self.lora.use_dora and start not in (True, "gaussian"):
            errors.append(
                f"lora.use_dora is true and lora.init_lora_weights is {start}; DoRA needs a B that starts at zero. Use "
                "true or gaussian, or turn off use_dora."
            )
        if start == "loftq" and self.quantization.bits == 16:
            errors.append(
                "lora.init_lora_weights is loftq and quantization.bits is 16; loftq corrects the error of "
                "quantization. Use true, or 4 or 8 bits."
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self


def read_params(file: Path = PARAMS_FILE) -> Params:
    """Reads and validates the whole of params.yaml as YAML 1.2, in which 1e-05 is a number.

    Raises InputError with one line for each invalid setting: key, value, rule and remedy.
    """
    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist. Run from the folder that holds dvc.yaml.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}. Correct that line.") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{file} has the type {type(values).__name__}; it must have sections such as 'train:'. Correct it."
        )
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in _describe(detail)]
        raise InputError(f"\n{' ' * 7}".join(_merge_union_errors(lines))) from None


def require_in_context(context_length: int, num_tokens: Mapping[str, int]) -> None:
    """Raises InputError if the sum of the numbers is larger than the base model's context.

    num_tokens: settings, or other parts of a text, with their values.
    """
    total = sum(num_tokens.values())
    if total <= context_length:
        return
    key, *others = num_tokens
    name = " + ".join(f"{part} ({number})" for part, number in num_tokens.items()) if others else key
    remedy = "Reduce one of them." if others else f"Use a smaller value in params.yaml or with -S {key}=..."
    raise InputError(f"{name} is {total}; the base model's context is {context_length} tokens. {remedy}")


def _describe(detail: ErrorDetails) -> Iterator[str]:
    """Converts one pydantic error to lines with key, value, rule and remedy."""
    key = ".".join(str(part) for part in detail["loc"] if not UNION_MEMBER.fullmatch(str(part)))
    value, context = detail["input"], detail.get("ctx", {})
    whole_list = ENTRY.sub("=[...]", key)  # -S cannot change one entry
    remedy = f"Change it in {PARAMS_FILE} or with -S {whole_list if whole_list != key else f'{key}=...'}"
    match detail["type"]:
        case "missing":
            yield f"{key} is missing; every setting must be in {PARAMS_FILE}. Add it."
        case "extra_forbidden":
            yield f"{key} is not a setting. {_suggest(detail['loc'])}"
        case "literal_error":
            yield f"{key} is {value!r}; it must be {context['expected']}. {remedy}"
        case "value_error":
            yield from str(context["error"]).split("\n")
        case "too_short":
            yield f"{key} is {value!r}; it must have at least {context['min_length']} entry. {remedy}"
        case "string_pattern_mismatch":
            key = key.removesuffix(".[key]")
            yield f"{key} is {value!r}; it must {PATTERN_RULES[context['pattern']]}. {remedy}"
        case "string_too_short":
            yield f"{key} is {value!r}; it must not be empty. {remedy}"
        case _:
            rule = detail["msg"].removeprefix("Input should ").replace("a valid integer", "an integer")
            rule = DICTIONARY.sub("a section of keys and values", rule)
            yield f"{key} is {value!r}; it must {rule.replace('valid ', '')}. {remedy}"


def _merge_union_errors(lines: list[str]) -> list[str]:
    """pydantic reports a union once for each member type. Merges these lines: `it must be a or b`.

    If an entry of a list is invalid, only the line of the entry stays.
    """
    merged: dict[str, str] = {}
    for line in lines:
        key_and_value, must, rest = line.partition(" it must ")
        if must and key_and_value in merged:
            before, _, remedy = merged[key_and_value].rpartition(". Change ")
            rule = rest.partition(". Change ")[0].removeprefix("be ")
            merged[key_and_value] = f"{before} or {rule}. Change {remedy}"
        else:
            merged[key_and_value] = line
    keys = [line.partition(" ")[0] for line in merged.values()]
    is_parent = [any(other.startswith(f"{key}.") for other in keys) for key in keys]
    return [line for line, has_entry in zip(merged.values(), is_parent, strict=True) if not has_entry]


def _suggest(path: tuple[int | str, ...]) -> str:
    """The most similar key of the same section, or all its keys."""
    section: Any = Params
    if len(path) > 1:
        section = SourceModel if path[0] == "models" else Params.model_fields[str(path[0])].annotation
    keys = list(section.model_fields)
    similar = difflib.get_close_matches(str(path[-1]), keys, n=1)
    return f"Did you mean {similar[0]}?" if similar else f"Known keys: {', '.join(keys)}."
