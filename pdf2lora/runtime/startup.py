"""Process settings that must exist before torch is imported, and the error line for a missing package."""

import os
import sys
from contextlib import suppress
from types import TracebackType


def prepare_process() -> None:
    """Sets environment variables for torch, MKL, CUDA and the Hugging Face libraries. Keeps values of the user."""
    # Waiting threads sleep; they do not spin. Spinning threads of several processes slow each other down (a training of
    # one minute took ten). Sleeping costs a few percent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # CPU: MKL sums each product in the same order for any number of threads. By default it does not, with AVX512. This
    # costs 5 to 10% of the demo's tokens/s. The instruction set is set explicitly, because MKL's own choice (AUTO) can
    # be the slowest one on processors that are not from Intel.
    if instructions := _widest_instructions():
        os.environ.setdefault("MKL_CBWR", f"{instructions},STRICT")

    # All files are local, so no library needs the Hugging Face hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    # bitsandbytes calls torch.compile at import, which imports the compiler. This project compiles nothing with it.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    # GPU: expandable segments avoid fragmentation. With these workspaces cuBLAS sums in a fixed order.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    sys.excepthook = _report_missing_package


def _widest_instructions() -> str:
    """MKL's name of this processor's widest vector instructions; empty if unknown."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        return "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    return ""


def _report_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints one line for a missing package, because the user can install it; other errors keep their traceback."""
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package not in ("pdf2lora", "stages"):
        print(f"error: {package} is not installed. Run make setup, or pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
