"""One file for each stage of dvc.yaml. What holds for all of them is set here, before torch is imported."""

import os
import sys
from types import TracebackType

import pdf2lora.quiet  # noqa: F401, before bitsandbytes is imported
from pdf2lora.orphans import end_with_dvc

# Threads that wait without spinning: where other processes want the cores too, spinning ones slow each other down
# threefold and more (a training of one minute took ten); where nobody does, waiting costs a few percent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
