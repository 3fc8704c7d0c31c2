"""Warnings of the report about runs whose numbers can mislead, for example small ones."""

from pdf2lora.evaluation.changes import COSTLY_QUANTIZATION
from pdf2lora.params import Params
from pdf2lora.report.results import Results

FORGOTTEN = 0.05  # increase of the general text's perplexity
LEAKAGE = 0.05  # share of the test documents' 13-word sequences that occur in train
FEW_STEPS = 10


def run_warnings(results: Results, params: Params) -> list[str]:
    """One sentence for each problem, with numbers. An ordinary run has none."""
    evaluation, warnings = results.evaluation, []
    if "interval_note" in evaluation:
        note = evaluation["interval_note"]
        warnings.append(f"{note[0].upper()}{note[1:]}. Add documents or raise split.test_fraction.")
    improvement = evaluation["improvement"]
    if improvement["low_95"] is not None and improvement["low_95"] <= 0 <= improvement["high_95"]:
        warnings.append("The interval of the improvement contains zero: these documents do not show an improvement.")
    elif improvement["share"] < 0:
        warnings.append("The adapter makes the model worse on the test documents.")
    if evaluation.get("quantization_cost", {}).get("share", 0) > COSTLY_QUANTIZATION:
        cost = evaluation["quantization_cost"]["share"]
        warnings.append(
            f"{params.quantization.bits} bits raise the perplexity of the base by {cost:.1%}. More bits or a larger "
            "model reduce this cost; lora.init_lora_weights (loftq, pissa) with a high rank corrects a part of it."
        )
    general = evaluation["general"]["improvement"]["share"]
    if -general > FORGOTTEN:
        warnings.append(
            f"The adapter raises the perplexity of general text by {-general:.1%}. Replay text "
            "(train.replay), fewer epochs, a lower learning rate or a lower rank reduce this increase."
        )
    leakage = results.split["test_13grams_in_train"]
    if leakage is not None and leakage > LEAKAGE:
        warnings.append(
            f"{leakage:.1%} of the test documents' 13-word sequences occur in train, so the test perplexity is too "
            "low. Lower split.near_duplicate_similarity."
        )
    return warnings + _training_warnings(results)


def _training_warnings(results: Results) -> list[str]:
    if "learning_rate" not in results.curves:
        return []
    steps, rates = results.curves["learning_rate"]
    num_steps = int(max(steps))
    if max(rates) == 0:
        return [f"The learning rate was 0 in all {num_steps} steps: the adapter is untrained. Use more steps."]
    if results.planned_steps is not None:
        untrained = " No validation was better than the one before the training." if results.kept_step == 0 else ""
        return [f"Early stopping ended the training after step {num_steps} of {results.planned_steps}.{untrained}"]
    if len(rates) > 1 and rates[-2] < rates[-1] == max(rates):
        return [f"The warm-up takes all {num_steps} steps: the full learning rate is not reached before the end."]
    if num_steps < FEW_STEPS:
        return [f"The run has {num_steps} optimizer steps. A smaller train.effective_batch or more epochs give more."]
    return []
