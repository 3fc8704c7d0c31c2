"""One file for each stage of dvc.yaml. What holds for all of them is set here, before any library is imported."""

import os

# Threads that wait without spinning: where other processes want the cores too, spinning ones slow each other down
# threefold and more (a training of one minute took ten); where nobody does, waiting costs a few percent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Everything is on disk; nothing is asked of a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# On a GPU: memory in segments that grow, so that what fits once fits again (no fragments between them), and workspaces
# with which cuBLAS repeats its sums in the same order.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
