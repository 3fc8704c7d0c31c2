"""train: models/base, data/tokens, metrics/batch.json -> models/adapter/, metrics/train/

Runs in one process per GPU (compute.num_processes). accelerate launch and torchrun can also start it.
"""

from pdf2lora.params import read_params
from pdf2lora.paths import BASE
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.launcher import is_main_process, run_in_processes
from pdf2lora.runtime.manifest import start_check
from pdf2lora.runtime.processes import stage_main


@stage_main
def main() -> None:
    params = read_params()
    require_inputs_of("train")

    def work() -> None:
        require_base = start_check(BASE, made_by="convert") if is_main_process() else None

        from pdf2lora.training.job import run  # imports torch, which the launcher of several processes must not

        run(params, require_base)

    run_in_processes("stages.train", work, params.compute.num_processes)


if __name__ == "__main__":
    main()
