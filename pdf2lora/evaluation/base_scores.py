"""Scores and texts of the base model. They do not depend on the adapter, so experiments share them.

.scratch/evaluate keeps them: an experiment that changes only the adapter scores only the adapted model.
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pdf2lora.evaluation.samples import Continuation
from pdf2lora.evaluation.scoring import Nats
from pdf2lora.params import Params
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.monitor import device_name
from pdf2lora.runtime.scratch import fingerprint, scratch_folder, stage_code

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class BaseScores(NamedTuple):
    """nats, unquantized_nats: of each document, with and without quantization; None: not scored.

    texts: the continuation of each opening by the quantized base.
    """

    nats: Nats
    unquantized_nats: Nats | None
    texts: list[Continuation]

    @classmethod
    def read(cls, file: Path) -> "BaseScores":
        content = json.loads(file.read_text(encoding="utf-8"))
        unquantized = content["unquantized_nats"]
        return cls(
            np.array(content["nats"]),
            None if unquantized is None else np.array(unquantized),
            [Continuation(**text) for text in content["texts"]],
        )

    def write(self, file: Path) -> None:
        unquantized = None if self.unquantized_nats is None else self.unquantized_nats.tolist()
        texts = [asdict(text) for text in self.texts]
        write_json(file, {"nats": self.nats.tolist(), "unquantized_nats": unquantized, "texts": texts})


def base_scores_file(params: Params, kernels: str, *inputs: Path) -> Path:
    """The file of the scores, which may not exist yet. All that can change a score is in the name of its folder.

    inputs: files and folders of the base model and of the texts.
    """
    settings = params.evaluate.model_dump(exclude={"compare_to"})
    sections = (settings, params.compute, params.quantization, params.sample)
    key = fingerprint(*inputs, *sections, kernels, device_name(), *stage_code("evaluate"), *map(version, PACKAGES))
    return scratch_folder("evaluate", key) / "base.json"
