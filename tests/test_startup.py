"""The start of stages on text. test_new_process.py has the imports of stages that need torch."""

import pytest

HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "numpy", "scipy", "pandas", "matplotlib"}
HEAVY |= {"PyPDF2", "pypdfium2", "dvc", "dvclive"}


@pytest.mark.parametrize(("stage", "needed"), [("check", set()), ("extract", set()), ("split", {"numpy"})])
def test_stages_on_text_import_no_slow_package_at_start(start_python, stage, needed):
    process = start_python(f"import sys, stages.{stage}; print(*{{name.split('.')[0] for name in sys.modules}})")

    names = set(process.communicate()[0].split())

    assert {"pydantic", "stages"} <= names
    assert names & HEAVY == needed


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
