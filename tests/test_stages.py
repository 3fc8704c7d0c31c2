"""What holds for every stage before its work (stages/__init__.py): what it imports, what it says first."""

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "numpy", "scipy", "pandas", "matplotlib", "datasketch"}
HEAVY |= {"PyPDF2", "pypdfium2", "dvc", "dvclive"}


@pytest.mark.parametrize("stage", ["check", "extract", "split"])
def test_the_stages_on_text_say_something_before_they_import_what_takes_long(start_python, stage):
    imported = start_python(f"import sys, stages.{stage}; print(*{{name.split('.')[0] for name in sys.modules}})")

    names = set(imported.communicate()[0].split())

    assert {"pydantic", "stages"} <= names
    assert not names & HEAVY


def test_extract_says_how_much_there_is_to_read_before_it_reads(start_python, tmp_path, write_params, pdfs):
    write_params({"corpus": "reports"})
    folder = tmp_path / "data/pdfs/reports"
    folder.mkdir(parents=True)
    for name in ("plain", "short"):
        (folder / f"{name}.pdf").write_bytes(pdfs[name].read_bytes())
    stage = start_python(
        "import os, sys; os.chdir(sys.argv[1]); from stages import extract; from pdf2lora.documents import corpus\n"
        "corpus.file_sha256 = lambda file: os._exit(7)\n"
        "extract.main()",
        tmp_path,
    )

    assert stage.communicate()[0] == "extract: 2 PDFs in data/pdfs/reports\n"
    assert stage.returncode == 7


def test_a_stage_keeps_quiet_about_what_concerns_nobody(start_python):
    stage = start_python("import stages.evaluate, sys; print('bitsandbytes' in sys.modules)")

    out, err = stage.communicate()
    assert out == "True\n"
    assert "gemm_4bit_forward" not in err


# The gradient of a LoRA matrix in the demo's shape, which MKL adds up by threads where it may.
PRODUCT = """
import stages, torch
torch.manual_seed(0)
a, b = torch.randn(256, 2048), torch.randn(8, 2048)
print(hash(torch.nn.functional.linear(a, b).numpy().tobytes()))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="on one core there is one thread")
def test_a_product_is_the_same_with_one_thread_and_with_two():
    printed = set()
    for num_threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": num_threads, "PYTHONHASHSEED": "0"}
        environment.pop("MKL_CBWR", None)
        done = subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)

    assert len(printed) == 1
