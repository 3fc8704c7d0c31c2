import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import prose
from pdf2lora.training.trainer import PerplexityTrainer
from safetensors.torch import load_file
from tiny_llama import COMPUTE, LORA, QUANTIZATION, TRAIN, quiet, same, write_texts, write_tiny_llama
from transformers import Trainer

from pdf2lora.errors import InputError
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import read_params
from pdf2lora.runtime.manifest import write_manifest
from pdf2lora.runtime.monitor import device_name
from pdf2lora.training.batch_search import Measurement
from pdf2lora.training.checkpoints import CheckpointKeeper
from pdf2lora.training.tracking import start_wandb
from stages import evaluate, find_batch, train

pytestmark = [quiet, pytest.mark.usefixtures("server_of_children")]
TEXTS = {
    "train": [prose(seed, 20) for seed in range(3)],
    "validation": [prose(10, 12)],
    "test": ["short", prose(11, 30), prose(12, 15)],
}
SETTINGS = {
    **{f"train.{key}": value for key, value in TRAIN.model_dump().items()},
    **{f"compute.{key}": value for key, value in COMPUTE.model_dump().items()},
    **{f"lora.{key}": value for key, value in LORA.model_dump().items()},
    **{f"quantization.{key}": value for key, value in QUANTIZATION.model_dump().items()},
    "train.save_steps": 3,
    "find_batch.min": 1,
    "find_batch.max": 16,
    "find_batch.steps": 2,
    "find_batch.cpu_memory_gib": 0.008,
    "evaluate.stride": 12,
    "evaluate.per_device_batch": 4,
}
NUM_STEPS = 7  # of 2 sequences of 32 bytes
BATCH = {
    "device": device_name(),
    "memory_gib": "auto",
    "gradient_checkpointing": "full",
    "per_device_batch": 2,
    "gradient_accumulation_steps": 1,
    "effective_batch": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def project(tmp_path, base, monkeypatch, write_params):
    """A project as it is before find_batch; the stages run in it. `configure` writes its params.yaml with changes."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for side, texts in TEXTS.items():
        write_texts(tmp_path / f"data/split/{side}.jsonl", texts)
    shutil.copytree(base, tmp_path / "models/base")

    def configure(changes=None):
        write_params(SETTINGS | (changes or {}))

    configure()
    return SimpleNamespace(folder=tmp_path, configure=configure)


@pytest.fixture
def with_batch(project):
    """The project after find_batch."""
    (project.folder / "metrics").mkdir()
    (project.folder / "metrics/batch.json").write_text(json.dumps(BATCH))
    return project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where the first undisturbed run of train left its outputs: made once, by the first test that asks for it."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def trained(with_batch, undisturbed):
    """The project after train."""
    if not any(undisturbed.iterdir()):
        assert run_in_child(train.main) == 0
        shutil.copytree(with_batch.folder, undisturbed, dirs_exist_ok=True)
    shutil.copytree(undisturbed, with_batch.folder, dirs_exist_ok=True)
    return with_batch


def run_in_child(function, *arguments):
    """The exit code of a new process that does this in the current folder."""
    child = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def kill_myself(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_a_checkpoint_is_written():
    write_manifest = CheckpointKeeper.on_save

    def write_and_die(*args, **kwargs):
        write_manifest(*args, **kwargs)
        kill_myself()

    CheckpointKeeper.on_save = write_and_die
    train.main()


def train_until_the_second_checkpoint_is_half_written():
    save_rng_state = Trainer._save_rng_state

    def save_or_die(trainer, folder):
        if trainer.state.global_step > 3:
            kill_myself()
        save_rng_state(trainer, folder)

    Trainer._save_rng_state = save_or_die
    train.main()


def train_in_a_copy_of_the_project(root, printed):
    """As `dvc exp run --temp` does."""
    os.environ["DVC_ROOT"] = root
    with Path(printed).open("w") as file, redirect_stdout(file):
        train.main()


def train_with_environment(environment):
    os.environ.update(environment)
    train.main()


def adapter_of(folder):
    return load_file(folder / "models/adapter/adapter_model.safetensors")


def log_of(folder):
    (file,) = (folder / "logs").glob("training_*.log")
    return file.read_text()


def read(file):
    return json.loads(Path(file).read_text())


def error_of(main):
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.mark.parametrize("stage", [find_batch, train, evaluate])
def test_seq_length_longer_than_the_context_is_refused(with_batch, stage, own_logging):
    with_batch.configure({"compute.seq_length": 129})

    assert error_of(stage.main) == (
        "error: compute.seq_length is 129; the base model's context is 128 tokens. "
        "Use a smaller value in params.yaml or with -S compute.seq_length=..."
    )


# find_batch


def test_find_batch_probes_the_training_step_and_decides_the_same_each_time(project, capsys):
    project.configure({"train.effective_batch": 6, "compute.seq_length": 128})

    find_batch.main()

    first = Path("metrics/batch.json").read_bytes()
    found = json.loads(first)
    fitting = [probe["batch"] for probe in found["probes"] if probe["fits"]]
    assert found["largest_batch"] == max(fitting)
    assert found["per_device_batch"] * found["gradient_accumulation_steps"] == found["effective_batch"] == 6
    assert 1 <= found["per_device_batch"] <= found["largest_batch"]
    if not torch.cuda.is_available():
        assert (found["device"], found["budget_gib"]) == ("cpu", 0.008)
        assert 1 < found["largest_batch"] < 16
        assert {"batch": found["largest_batch"] + 1, "fits": False} in [
            {key: probe[key] for key in ("batch", "fits")} for probe in found["probes"]
        ]
        assert found["modes"]["full"]["gib_per_sequence"] > 0
    assert list(found["modes"]) == [found["gradient_checkpointing"]] == ["full"]
    assert found["modes"]["full"]["largest_batch"] == found["largest_batch"]
    assert (found["kernels"], found["memory_gib"]) == ("reference", "auto")
    assert {probe["gradient_checkpointing"] for probe in found["probes"]} == {"full"}
    assert f"find_batch: {found['largest_batch']} sequences fit in" in capsys.readouterr().out

    find_batch.main()

    assert Path("metrics/batch.json").read_bytes() == first
    machine = read("metrics/machine.json")["find_batch"]
    assert machine["peak_process_memory_gib"] > 0
    assert [(timing["gradient_checkpointing"], timing["batch"]) for timing in machine["timings"]] == [
        ("full", probe["batch"]) for probe in found["probes"]
    ]
    assert all(timing["tokens_per_s"] > 0 for timing in machine["timings"])


class MadeUpChild:
    """Probes that need so many GiB a sequence, and so many tokens/s, by mode; nothing is left of it after its end."""

    gib = {"none": 0.004, "full": 0.001}  # noqa: RUF012
    tokens_per_s = {"none": 300.0, "full": 200.0}  # noqa: RUF012

    modes = ("full",)

    def __init__(self, module):
        assert module == "pdf2lora.training.probe"
        self.asked = []
        self.ended = False
        MadeUpChild.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ended = True

    def prepare(self, base, params, sequences, kernels):
        assert (base, kernels) == (Path("models/base"), "reference")
        assert sequences.input_ids.shape[1] == params.compute.seq_length

    def ask(self, function, *arguments):
        assert not self.ended
        if function == "possibilities":
            return "cpu", "reference", self.modes
        assert function == "training_step"
        mode, batch, _ = arguments
        self.asked.append((mode, batch))
        return Measurement(self.gib[mode] * batch, self.tokens_per_s[mode])


@pytest.fixture
def made_up_memory(monkeypatch):
    """Room for 12 sequences of mode full and for 3 of mode none."""
    monkeypatch.setattr(find_batch, "Child", MadeUpChild)
    monkeypatch.setattr(find_batch, "memory_budget_gib", lambda params, device, child: 0.012)


@pytest.mark.usefixtures("made_up_memory")
@pytest.mark.parametrize(
    ("effective_batch", "per_device_batch", "accumulation"), [("auto", 12, 1), (12, 12, 1), (24, 12, 2), (13, 1, 13)]
)
def test_find_batch_makes_the_effective_batch_of_params(project, effective_batch, per_device_batch, accumulation):
    project.configure({"train.effective_batch": effective_batch})

    find_batch.main()

    found = read("metrics/batch.json")
    assert found["largest_batch"] == 12
    assert (found["per_device_batch"], found["gradient_accumulation_steps"]) == (per_device_batch, accumulation)
    assert found["effective_batch"] == per_device_batch * accumulation
    assert found["modes"] == {"full": {"largest_batch": 12, "fixed_gib": 0, "gib_per_sequence": 0.001}}
    assert [probe["batch"] for probe in found["probes"]] == [1, 2, 12, 13]


@pytest.mark.usefixtures("made_up_memory")
@pytest.mark.parametrize(
    ("effective_batch", "speed_of_none", "chosen"),
    [
        (12, 300.0, ("none", 3, 4)),
        (12, 100.0, ("full", 12, 1)),
        (4, 201.0, ("full", 4, 1)),  # as fast as none, and it takes less memory
        ("auto", 100.0, ("full", 12, 1)),
    ],
)
def test_find_batch_chooses_the_fastest_mode(project, monkeypatch, capsys, effective_batch, speed_of_none, chosen):
    monkeypatch.setattr(MadeUpChild, "modes", ("none", "full"))
    monkeypatch.setitem(MadeUpChild.tokens_per_s, "none", speed_of_none)
    project.configure({"train.effective_batch": effective_batch})

    find_batch.main()

    found = read("metrics/batch.json")
    keys = ("gradient_checkpointing", "per_device_batch", "gradient_accumulation_steps")
    assert tuple(found[key] for key in keys) == chosen
    assert {mode: numbers["largest_batch"] for mode, numbers in found["modes"].items()} == {"none": 3, "full": 12}
    assert found["largest_batch"] == 12
    assert MadeUpChild.last.ended
    timed = [
        (timing["gradient_checkpointing"], timing["batch"], timing["tokens_per_s"])
        for timing in read("metrics/machine.json")["find_batch"]["timings"]
    ]
    asked = MadeUpChild.last.asked
    assert timed == [(mode, batch, {"none": speed_of_none, "full": 200}[mode]) for mode, batch in asked]
    assert len(set(asked)) == len(asked)  # a probe is a timing too
    assert capsys.readouterr().out == (
        f"find_batch: 12 sequences fit in 0.01 GiB ({len(found['probes'])} probes); train uses {chosen[1]} x "
        f"{chosen[2]} accumulation steps, gradient checkpointing {chosen[0]}, reference kernels\n"
    )


class FreeGpu:
    """A child on a GPU of which 70 GiB are free."""

    def ask(self, function):
        assert function == "free_gib"
        return 70.0


@pytest.mark.parametrize(
    ("memory_gib", "headroom_gib", "budget_gib"), [("auto", 1.0, 69.0), (20, 1.0, 19.0), (80, 2.5, 67.5), (4.5, 0, 4.5)]
)
def test_budget_on_a_gpu_is_what_is_free_and_allowed_less_the_headroom(project, memory_gib, headroom_gib, budget_gib):
    project.configure({"find_batch.memory_gib": memory_gib, "find_batch.gpu_headroom_gib": headroom_gib})

    assert find_batch.memory_budget_gib(read_params(), "NVIDIA T4", FreeGpu()) == budget_gib


def test_budget_without_a_gpu_is_that_of_the_tensors(project):
    project.configure({"find_batch.memory_gib": 20})

    assert find_batch.memory_budget_gib(read_params(), "cpu", None) == 0.008


@pytest.mark.parametrize(("memory_gib", "allowed"), [(1, "1.0"), ("auto", "70.0")])
def test_headroom_that_leaves_nothing_is_refused(project, memory_gib, allowed):
    headroom_gib = float(allowed)
    project.configure({"find_batch.memory_gib": memory_gib, "find_batch.gpu_headroom_gib": headroom_gib})

    with pytest.raises(InputError) as caught:
        find_batch.memory_budget_gib(read_params(), "NVIDIA T4", FreeGpu())

    assert str(caught.value) == (
        f"find_batch.memory_gib: {allowed} GiB of the GPU are free or allowed, find_batch.gpu_headroom_gib "
        f"({headroom_gib}) must be less; free the GPU (nvidia-smi) or change one of them"
    )


@pytest.mark.usefixtures("made_up_memory")
def test_find_batch_where_nothing_fits(project):
    project.configure({"find_batch.min": 15})

    assert error_of(find_batch.main) == (
        "error: find_batch.min: 15 sequences do not fit: a training step needs 0.01 GiB; lower find_batch.min or "
        "compute.seq_length, set train.gradient_checkpointing to auto, or raise find_batch.cpu_memory_gib "
        "(on a GPU: raise find_batch.memory_gib or lower find_batch.gpu_headroom_gib)"
    )
    assert not Path("metrics/batch.json").exists()


def test_find_batch_says_what_cannot_run_here(project):
    """Which its child finds out."""
    project.configure({"train.gradient_checkpointing": "mlp", "compute.kernels": "reference"})

    assert error_of(find_batch.main) == (
        "error: train.gradient_checkpointing: 'mlp' is not possible with the reference kernels; choose none, full or "
        "auto"
    )


class ChildWithoutMemory:
    def ask(self, function, *arguments):
        return None


def test_memory_that_ends_before_the_first_probe_is_said(project):
    with pytest.raises(InputError) as caught:
        find_batch.possibilities(read_params(), ChildWithoutMemory())

    assert str(caught.value) == (
        "find_batch: memory ends before the base model is loaded, while torch and transformers are imported; free "
        "some (free -h shows it) and run dvc repro again"
    )


def test_find_batch_leaves_the_libraries_to_its_child(project, start_python):
    """They take seconds to import, which pass while it reads; torch it needs later, for the name of a GPU."""
    heavy = "sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & sys.modules.keys())"

    parent = start_python(
        f"import sys; from stages import find_batch; print({heavy}); find_batch.main(); print({heavy})"
    )

    output, errors = parent.communicate()
    assert parent.returncode == 0, errors
    first, *_, last = output.splitlines()
    assert (first, last) == ("[]", "['torch']")


# train


def test_train_writes_an_adapter_that_loads(trained):
    model = load_adapter(load_base(Path("models/base"), QUANTIZATION, COMPUTE), Path("models/adapter"))

    assert model.peft_config["default"].r == LORA.r
    assert model.peft_config["default"].base_model_name_or_path == "models/base"
    saved = adapter_of(trained.folder)
    assert len(saved) == 2 * 4 * 2
    assert all(value.any() and value.dtype == torch.float32 for value in saved.values())


def test_an_adapter_is_its_settings_and_its_weights(trained):
    """And no card: PEFT's would ask for what the report's says."""
    assert sorted(os.listdir("models/adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_train_writes_metrics_log_and_curves(trained):
    metrics = read("metrics/train/metrics.json")
    assert metrics["step"] == NUM_STEPS
    assert metrics["train"]["perplexity"] == pytest.approx(math.exp(metrics["train"]["loss"]))
    assert metrics["validation"]["loss"] < math.log(260)
    machine = read("metrics/machine.json")["train"]
    assert (machine["steps"], machine["attention"], machine["kernels"]) == (NUM_STEPS, "sdpa", "reference")
    assert machine["tokens_per_s"] > 0
    assert machine["step_tokens_per_s"] > 0
    assert machine["seconds_to_first_step"] > 0
    assert ("peak_allocated_gib" in machine) == torch.cuda.is_available()
    log = log_of(trained.folder)
    for line in (
        'settings: {"corpus":',
        "starts from the base model",
        f"step {NUM_STEPS} {{'loss':",
        "trainable parameters: (",
    ):
        assert line in log


def test_train_removes_its_checkpoints(trained):
    assert list(Path(".scratch/train").iterdir()) == []


@pytest.mark.parametrize(
    "until_killed", [train_until_a_checkpoint_is_written, train_until_the_second_checkpoint_is_half_written]
)
def test_killed_training_goes_on_from_its_checkpoint(trained, until_killed):
    set_aside("models/adapter", "metrics/train", "logs")

    assert run_in_child(until_killed) == -signal.SIGKILL
    assert len(list(Path(".scratch/train").glob("*/checkpoint-3"))) == 1
    assert not Path("models/adapter").exists()
    for made in ("metrics/train", "logs"):  # DVC removes the outputs of a stage that runs again
        shutil.rmtree(made)
    assert run_in_child(train.main) == 0

    assert "/checkpoint-3\n" in log_of(Path())
    assert read("metrics/machine.json")["train"]["steps"] == NUM_STEPS - 3
    assert same(adapter_of(Path()), adapter_of(Path("undisturbed")))
    files = [file for file in Path("metrics/train").rglob("*") if file.is_file()]
    assert len(files) == 7
    for file in files:
        assert file.read_bytes() == (Path("undisturbed") / file).read_bytes(), file


def set_aside(*folders):
    for folder in folders:
        Path("undisturbed", folder).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, Path("undisturbed", folder))


def test_fingerprint_of_a_run_changes_with_all_that_the_adapter_depends_on(with_batch, monkeypatch):
    def fingerprint_with(changes):
        with_batch.configure(changes)
        return train.run_fingerprint(read_params())

    first = fingerprint_with({})
    assert fingerprint_with({"sample.seed": 5}) == first
    others = [fingerprint_with(change) for change in ({"train.seed": 5}, {"lora.r": 4}, {"quantization.bits": 8})]
    shutil.copytree(train.KERNELS, "kernels")
    monkeypatch.setattr(train, "KERNELS", Path("kernels"))
    assert fingerprint_with({}) == first
    for file in ("data/split/train.jsonl", "models/base/manifest.json", "metrics/batch.json", "kernels/lora.py"):
        with Path(file).open("a") as text:
            text.write("\n")
        others.append(fingerprint_with({}))
    for module in (train.forward, train.loss, train.model, train.optimizer, train.tokens, train.training):
        code = Path(f"{module.__name__}.py")
        code.write_text(Path(module.__file__).read_text() + "\n")
        monkeypatch.setattr(module, "__file__", str(code))
        others.append(fingerprint_with({}))
    assert len({first, *others}) == 1 + len(others) == 14


@pytest.fixture
def out_of_memory(monkeypatch):
    """Training that finds no memory in its fourth step."""

    def train_until_memory_ends(trainer, **kwargs):
        trainer.state.global_step = 3
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(PerplexityTrainer, "train", train_until_memory_ends)


@pytest.mark.usefixtures("out_of_memory", "own_logging")
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_memory_that_ends_in_mid_run_is_said_with_what_to_do(with_batch, checkpoint):
    if checkpoint:
        folder = Path(".scratch/train") / train.run_fingerprint(read_params()) / f"checkpoint-{checkpoint}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 8, "epoch": 0.5}')
        write_manifest(folder)
    goes_on_from = f"the checkpoint of step {checkpoint}" if checkpoint else "the base model"

    assert error_of(train.main) == (
        "error: train: the GPU ran out of memory in step 4 (CUDA out of memory); free it (nvidia-smi shows who uses "
        f"it) and run dvc repro again, which goes on from {goes_on_from}, or find a smaller batch: "
        "dvc repro -f -s find_batch"
    )
    assert not Path("models/adapter").exists()


def train_and_write_limit(limit_file):
    train.limit_gpu_memory = lambda gib: Path(limit_file).write_text(str(gib))
    train.main()


@pytest.mark.parametrize(("memory_gib", "limit"), [("auto", None), (20.5, "20.5")])
def test_train_keeps_to_the_memory_that_find_batch_was_given(with_batch, memory_gib, limit):
    with_batch.configure({"train.num_train_epochs": 0.2})
    Path("metrics/batch.json").write_text(json.dumps(BATCH | {"memory_gib": memory_gib}))

    assert run_in_child(train_and_write_limit, "limit") == 0

    assert (Path("limit").read_text() if Path("limit").exists() else None) == limit


def test_train_says_where_its_log_is_in_the_project(with_batch, tmp_path_factory):
    with_batch.configure({"train.num_train_epochs": 0.2})
    root = tmp_path_factory.mktemp("root")

    assert run_in_child(train_in_a_copy_of_the_project, str(root), "printed") == 0

    log = re.fullmatch(r"train: 2 steps, [\d,]+ tokens/s; log in (.+)\n", Path("printed").read_text())
    assert re.fullmatch(r"logs/training_\d{8}_\d{6}\.log", log[1])
    assert (root / log[1]).exists()


@pytest.mark.usefixtures("out_of_memory", "own_logging")
@pytest.mark.parametrize("same_device", [True, False])
def test_batch_of_another_device_is_said(with_batch, capsys, same_device):
    device = device_name() if same_device else "NVIDIA A100-SXM4-80GB"
    Path("metrics/batch.json").write_text(json.dumps(BATCH | {"device": device}))

    error_of(train.main)

    line = (
        f"train: metrics/batch.json was measured on NVIDIA A100-SXM4-80GB, this is {device_name()}; "
        "`dvc repro -f -s find_batch` finds the fastest batch here\n"
    )
    assert capsys.readouterr().out == ("" if same_device else line)


def test_training_without_validation_documents(with_batch):
    write_texts(Path("data/split/validation.jsonl"), [])

    assert run_in_child(train.main) == 0

    assert "validation" not in read("metrics/train/metrics.json")


def train_with_wandb(environment):
    import wandb  # here, so that the other tests do without it

    train_with_environment(environment)
    wandb.finish()  # which the end of a Python that is no child of multiprocessing does by itself


def test_wandb_offline_writes_a_run(with_batch, tmp_path):
    with_batch.configure({"train.report_to": "wandb", "train.num_train_epochs": 0.2})
    folders = {name: str(tmp_path / "wandb-files") for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    (tmp_path / "wandb-files").mkdir()

    assert run_in_child(train_with_wandb, folders | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}) == 0

    (run,) = tmp_path.glob("wandb-files/wandb/offline-run-*")
    (records,) = (file.read_bytes() for file in run.glob("run-*.wandb"))
    for words in (b"pdf2lora", b"demo on demo", b'"effective_batch":', b"train/loss"):
        assert words in records
    assert not Path("wandb").exists()
    assert Path("models/adapter/adapter_model.safetensors").exists()


def test_wandb_names_a_run_like_its_experiment(project, monkeypatch):
    """In the main checkout, which DVC_ROOT is, and not in the copy that an experiment may run in."""
    import wandb

    for name, value in {"DVC_EXP_NAME": "gyral-taco", "DVC_ROOT": "checkout", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Path("checkout").mkdir()

    start_wandb(read_params())

    assert (wandb.run.project, wandb.run.name) == ("pdf2lora", "gyral-taco")
    assert wandb.run.config["lora"]["r"] == read_params().lora.r
    wandb.finish()
    assert list(Path("checkout/wandb").glob("offline-run-*"))


def test_wandb_without_a_login(with_batch, monkeypatch, start_python):
    with_batch.configure({"train.report_to": "wandb"})
    monkeypatch.setenv("NETRC", "no-such-file")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    ended = start_python("from stages.train import main; main()")

    assert ended.communicate()[1].splitlines()[-1] == (
        "error: train.report_to: 'wandb' cannot start a run (No API key configured. Use `wandb login` to log in.); run "
        "wandb login, set WANDB_MODE=offline, or choose 'none'"
    )
    assert ended.returncode == 1


def test_wandb_that_is_not_installed(with_batch, monkeypatch):
    with_batch.configure({"train.report_to": "wandb"})

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(train, "version", version)

    assert error_of(train.main) == (
        "error: train.report_to: 'wandb' is not installed; run pip install wandb or choose 'none'"
    )


def test_more_than_one_process_is_refused(with_batch, monkeypatch):
    monkeypatch.setattr(train, "PartialState", lambda: SimpleNamespace(num_processes=2))

    assert error_of(train.main) == (
        "error: train: a launcher (accelerate launch, torchrun) started 2 processes, one is supported; run dvc repro, "
        "or python -m stages.train"
    )
