"""Negative log-likelihood of windows. The processes of a job share the work."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pdf2lora.errors import InputError
from pdf2lora.model.forward import Forward
from pdf2lora.model.loss import nats_per_target
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import IGNORED, Window

Nats = NDArray[np.float64]


@torch.no_grad()
def nats_per_window(
    forward: Forward,
    windows: Sequence[Window],
    *,
    per_device_batch: int,
    processes: Processes,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Nats:
    """Sum of the nats of each window's targets, (num_windows,). Each process gets all of them.

    The processes take whole batches in turn. So a window is scored in the same batch for any number of processes, and
    on a CPU the result has the same bytes. No window is padded or repeated. The model is in eval mode afterwards.

    progress: receives the number of windows of each finished batch.

    Raises InputError if the scores are not finite.
    """
    forward.model.eval()
    device = forward.head.device
    nats = torch.zeros(len(windows), dtype=torch.float64, device=device)
    batches = range(0, len(windows), per_device_batch)
    for first in batches[processes.index :: processes.count]:
        batch = windows[first : first + per_device_batch]
        # Nothing here waits for the GPU, so that Python prepares the next batch while the GPU computes this one.
        targets = np.stack([window.targets for window in batch])
        positions = np.flatnonzero(targets != IGNORED)
        inputs, counted, own = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (np.stack([window.input_ids for window in batch]), positions, targets.ravel()[positions])
        )
        scores = torch.zeros(targets.size, dtype=torch.float64, device=device)
        scores[counted] = nats_per_target(forward(inputs).flatten(0, 1)[counted], forward.head, own).double()
        nats[first : first + len(batch)] = scores.view(targets.shape).sum(1)
        progress(len(batch))
    processes.sum_(nats)
    if not nats.isfinite().all():
        dtype = str(forward.head.dtype).removeprefix("torch.")
        raise InputError(
            f"the scores of the model in {dtype} are not finite. If the training diverged, use a smaller "
            "train.learning_rate; on a GPU without bfloat16, use compute.compute_dtype=float32."
        )
    return nats.cpu().numpy()


def nats_per_document(
    forward: Forward,
    windows: Sequence[Window],
    *,
    num_documents: int,
    per_device_batch: int,
    processes: Processes,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Nats:
    """Sum of the nats of each document's targets, (num_documents,); see nats_per_window."""
    scores = nats_per_window(
        forward, windows, per_device_batch=per_device_batch, processes=processes, progress=progress
    )
    nats = np.zeros(num_documents)
    np.add.at(nats, [window.document for window in windows], scores)
    return nats


def nats_per_token(
    forward: Forward, windows: Sequence[Window], *, per_device_batch: int, processes: Processes
) -> float:
    """Mean nats of the windows' targets; see nats_per_window."""
    scores = nats_per_window(forward, windows, per_device_batch=per_device_batch, processes=processes)
    return float(scores.sum()) / sum(window.num_targets for window in windows)
