"""train: models/base, data/tokens, metrics/batch.json -> models/adapter/, metrics/train/

Runs in one process per GPU (compute.num_processes). accelerate launch and torchrun can start it, too.
"""

from pdf2lora.errors import report_input_errors
from pdf2lora.params import read_params
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.launcher import run_in_processes
from pdf2lora.runtime.processes import single_instance


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    require_inputs_of("train")

    def work() -> None:
        from pdf2lora.training.job import run  # imports torch, which the launcher of several processes must not

        run(params)

    run_in_processes("stages.train", work, params.compute.num_processes)


if __name__ == "__main__":
    main()
