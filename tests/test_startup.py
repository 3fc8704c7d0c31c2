"""Process settings before torch is imported, and slow imports that stages avoid."""

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "numpy", "scipy", "pandas", "matplotlib"}
HEAVY |= {"PyPDF2", "pypdfium2", "dvc", "dvclive"}


@pytest.mark.parametrize(("stage", "needed"), [("check", set()), ("extract", set()), ("split", {"numpy"})])
def test_stages_on_text_import_no_slow_package_at_start(start_python, stage, needed):
    process = start_python(f"import sys, stages.{stage}; print(*{{name.split('.')[0] for name in sys.modules}})")

    names = set(process.communicate()[0].split())

    assert {"pydantic", "stages"} <= names
    assert names & HEAVY == needed


UNUSED = {"torch._inductor.compile_fx", "datasketch", "dvc", "dvclive", "matplotlib", "pandas", "sklearn"}

# What convert imports, then what train and find_batch import. Then a product with the shape of a LoRA gradient of the
# demo: by default MKL splits its sum among threads.
IMPORTS = """
import sys
import stages, pdf2lora.weights.conversion
print(*sys.modules)
import pdf2lora.training.job, pdf2lora.training.probe
print(*sys.modules)
import torch
torch.manual_seed(0)
a, b = torch.randn(256, 2048), torch.randn(8, 2048)
for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    print(torch.get_num_threads(), hash(torch.nn.functional.linear(a, b).numpy().tobytes()))
"""
SET_BY_PREPARE_PROCESS = ("MKL_CBWR", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS")


@pytest.fixture(scope="module")
def imports() -> "subprocess.CompletedProcess[str]":
    """One process for all checks, because the imports take seconds. It has no variables of the tests."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_PREPARE_PROCESS}
    return subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=True)


@pytest.mark.timeout(300)  # the other process imports torch and transformers
def test_convert_does_not_import_transformers(imports):
    names = set(imports.stdout.splitlines()[0].split())

    assert "pdf2lora.weights.conversion" in names
    assert not names & {"transformers", "sentencepiece"}


def test_training_imports_no_package_that_it_does_not_use(imports):
    names = set(imports.stdout.splitlines()[1].split())

    assert {"torch", "transformers", "peft", "bitsandbytes", "pdf2lora.training.loop"} <= names
    assert not names & UNUSED


def test_irrelevant_bitsandbytes_warning_is_suppressed(imports):
    assert "gemm_4bit_forward" not in imports.stderr


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_product_does_not_depend_on_the_number_of_threads(imports):
    threads, hashes = zip(*(line.split() for line in imports.stdout.splitlines()[2:]), strict=True)

    assert threads == ("1", "2")
    assert len(set(hashes)) == 1


def test_extract_prints_the_number_of_pdfs_before_it_reads_them(start_python, tmp_path, write_params, pdfs):
    write_params({"corpus": "reports"})
    folder = tmp_path / "data/pdfs/reports"
    folder.mkdir(parents=True)
    for name in ("plain", "short"):
        (folder / f"{name}.pdf").write_bytes(pdfs[name].read_bytes())
    stage = start_python(
        "import os, sys; os.chdir(sys.argv[1]); from stages import extract; from pdf2lora.documents import corpus\n"
        "corpus.hash_source = lambda *arguments: os._exit(7)\n"
        "extract.main()",
        tmp_path,
    )

    assert stage.communicate()[0].startswith("extract: 2 PDFs in data/pdfs/reports\n")
    assert stage.returncode == 7
