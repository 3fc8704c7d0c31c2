"""The files and folders of a run that more than one module uses. dvc.yaml has the same paths."""

from pathlib import Path

CORPORA = Path("data/pdfs")  # one folder for each corpus
SOURCE_MODELS = Path("models/source")  # one folder for each source model
REPLAY = Path("data/replay")  # one folder for each replay text

DOCUMENTS = Path("data/documents.jsonl")
SPLIT_DOCUMENTS = Path("data/split")  # <split>.jsonl
TOKENS = Path("data/tokens")
BASE = Path("models/base")
ADAPTER = Path("models/adapter")
BATCH = Path("metrics/batch.json")
EVAL_DOCUMENTS = Path("metrics/eval_documents.csv")
TEST_GROUPS = SPLIT_DOCUMENTS / "test_groups.json"

MACHINE = Path("metrics/machine.json")
MACHINE_CURVES = Path("metrics/machine")  # <stage>.tsv
