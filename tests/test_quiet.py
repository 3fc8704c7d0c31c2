"""What bitsandbytes says of a kernel that is not used; the tests of the stages have the real import."""

import pytest


def test_bitsandbytes_may_miss_a_kernel_that_is_not_used_and_says_all_else(start_python):
    said = start_python(
        "import pdf2lora.quiet, logging, bitsandbytes, bitsandbytes.backends.cpu.ops as ops\n"
        "ops.logger.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'no kernels')\n"
        "ops.logger.warning('Failed to load something else')"
    )

    assert said.communicate()[1] == "Failed to load something else\n"


@pytest.mark.parametrize("package", ["benchmarks", "commands", "stages", "tools"])
def test_all_that_is_run_imports_it_first(start_python, package):
    names = start_python(f"import sys, {package}; print(*sys.modules)").communicate()[0].split()

    assert "pdf2lora.quiet" in names
    assert not {"torch", "bitsandbytes"} & set(names)


def test_it_imports_nothing_heavy(start_python):
    names = start_python("import sys, pdf2lora.quiet; print(*sys.modules)").communicate()[0].split()

    assert "pdf2lora.quiet" in names
    assert not {"torch", "bitsandbytes", "numpy"} & set(names)
