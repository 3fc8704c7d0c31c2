"""Negative log-likelihood of documents, window by window."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pdf2lora.model.forward import Forward
from pdf2lora.model.loss import nats_per_target
from pdf2lora.tokens import IGNORED, Window


@torch.no_grad()
def nats_per_document(
    forward: Forward,
    windows: Sequence[Window],
    *,
    num_documents: int,
    per_device_batch: int,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> NDArray[np.float64]:
    """Negative log-likelihood of each document in nats, (num_documents,), summed over the targets of its windows.

    Batch size and order of the windows change the result by rounding only. Each window adds to the entry
    `window.document`, so the results of disjoint lists of windows can be added. The model is in eval mode afterwards.
    progress: receives the number of windows of each batch.
    """
    forward.model.eval()
    head = forward.head
    nats = torch.zeros(num_documents, dtype=torch.float64, device=head.device)
    for first in range(0, len(windows), per_device_batch):
        batch = windows[first : first + per_device_batch]
        inputs = torch.from_numpy(np.stack([window.input_ids for window in batch])).to(head.device)
        targets = torch.from_numpy(np.stack([window.targets for window in batch])).to(head.device)
        owners = torch.tensor([window.document for window in batch], device=head.device)
        counted = targets != IGNORED
        scores = nats_per_target(forward(inputs)[counted], head, targets[counted])
        nats.index_add_(0, owners[:, None].expand_as(targets)[counted], scores.double())
        progress(len(batch))
    return nats.cpu().numpy()
