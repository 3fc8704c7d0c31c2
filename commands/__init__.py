"""What a person runs by hand, outside the pipeline: none of it is a stage, none of it changes dvc.lock."""

import stages  # noqa: F401, what holds for all processes that import torch is set there
