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


@pytest.mark.timeout(300)  # it imports torch and transformers
@pytest.mark.parametrize("module", ["training.job", "training.probe"])
def test_training_imports_no_package_that_it_does_not_use(start_python, module):
    process = start_python(f"import sys, stages, pdf2lora.{module}; print(*sys.modules)")

    names = set(process.communicate()[0].split())

    assert {"torch", "transformers", "peft", "bitsandbytes"} <= names
    assert not names & UNUSED


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


def test_irrelevant_bitsandbytes_warning_is_suppressed(start_python):
    stage = start_python("import stages, bitsandbytes, sys; print('bitsandbytes' in sys.modules)")

    out, err = stage.communicate()
    assert out == "True\n"
    assert "gemm_4bit_forward" not in err


# A product with the shape of a LoRA gradient of the demo. By default MKL splits its sum among threads.
PRODUCT = """
import stages, torch
torch.manual_seed(0)
a, b = torch.randn(256, 2048), torch.randn(8, 2048)
for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    print(torch.get_num_threads(), hash(torch.nn.functional.linear(a, b).numpy().tobytes()))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_product_does_not_depend_on_the_number_of_threads():
    environment = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True, check=True)

    threads, hashes = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert threads == ("1", "2")
    assert len(set(hashes)) == 1
