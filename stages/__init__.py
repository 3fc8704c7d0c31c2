"""One file for each stage of dvc.yaml. What holds for all of them is set here, before any library is imported."""

import os

# Threads that wait without spinning: where other processes want the cores too, spinning ones slow each other down
# threefold and more (a training of one minute took ten); where nobody does, waiting costs a few percent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Everything is on disk; nothing is asked of a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Last, since it imports psutil: the stage, and each process that it starts, ends with the dvc that started it.
from pdf2lora.orphans import end_with_dvc

end_with_dvc()
