"""One file for each stage of dvc.yaml. What holds for all of them is set here, before torch is imported."""

import os
import sys
from contextlib import suppress
from types import TracebackType

import pdf2lora.quiet  # noqa: F401, before bitsandbytes is imported
from pdf2lora.orphans import end_with_dvc


def _widest_instructions() -> str:
    """Of this processor, under MKL's name; "" where that is not known."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        return "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    return ""


# Threads that wait without spinning: where other processes want the cores too, spinning ones slow each other down
# threefold and more (a training of one minute took ten); where nobody does, waiting costs a few percent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On a CPU: MKL adds up a product in the same order whatever the number of threads, which with AVX512 it does not do by
# itself (5 to 10% of the tokens/s of the demo). The instructions are named, since the choice left to MKL (AUTO) may be
# its slowest on a processor that is not Intel's.
if instructions := _widest_instructions():
    os.environ.setdefault("MKL_CBWR", f"{instructions},STRICT")

# Everything is on disk; nothing is asked of a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# On a GPU: memory in segments that grow, so that what fits once fits again (no fragments between them), and workspaces
# with which cuBLAS repeats its sums in the same order.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_show = sys.excepthook


def _report_missing_library(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A library that is missing is the user's to mend, like an InputError (errors.py): one line, no traceback."""
    library = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if library and library not in ("pdf2lora", "stages"):
        print(f"error: {library} is not installed; run make setup, or pip install -r requirements.txt", file=sys.stderr)
    else:
        _show(kind, error, trace)


sys.excepthook = _report_missing_library
end_with_dvc()  # a stage, and each process that it starts, ends with the dvc that started it
