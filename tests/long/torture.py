"""Kills the pipeline at random moments and compares the hashes of the next run with those of an undisturbed run.

    python -m tests.long.torture --rounds 60 --seed 1        (make torture)
    python -m tests.long.torture --num-processes 2 --stages train --rounds 20 --exp-rounds 0 --queue-rounds 0

It works in a temporary clone of HEAD with a few of the demo's PDFs and a training of seconds. One round:

1. copies the clone as it was before one stage; later stages are in the cache and run again only if its outputs differ;
2. starts `dvc repro` and sends a signal to one process or to all at a random moment;
3. runs commands.mend_dvc and `dvc repro`, like `make repro`;
4. compares the hash of every output in dvc.lock.

A round also fails if a process lives longer than END_S after the end of dvc, if a half-written file stays next to an
output, if a training does not resume from the last valid checkpoint, or if SIGTERM or Ctrl-C ended a training without a
new checkpoint. Half of the rounds of train wait for a checkpoint first. `exp` rounds use `dvc exp run --temp`, `queue`
rounds use `dvc queue start`. --num-processes sets compute.num_processes. With 2 or more processes, one of them can also
be the target. It can also freeze or run out of memory; then one line of the output must name it and the remedy.
"""

import argparse
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from ruamel.yaml import YAML

from tests.long.clones import SETTINGS, TIMEOUT_S, Failed, make_clone, outs, run, start

STAGES = ("check", "extract", "split", "convert", "tokenize", "find_batch", "train", "evaluate", "report")
SAVE_STEPS = int(str(SETTINGS["train.save_steps"]))
END_S = 60.0  # from the end of dvc to that of all processes


@dataclass(frozen=True)
class Fault:
    """A signal and its target: `stage` (its process), `worker` (its children), `process` (one of them), `dvc` or `all`.

    signum: SIGSTOP freezes the target; None: no signal, the target gets no more memory.
    after_checkpoint: wait until the training has written a checkpoint.
    """

    target: str
    signum: signal.Signals | None = signal.SIGKILL
    after_checkpoint: bool = False

    def __str__(self) -> str:
        return f"{self.signum.name if self.signum else 'no memory'} to {self.target}"

    def hit(self, process: psutil.Process) -> None:
        if self.signum:
            process.send_signal(self.signum)
        else:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))


KILLS = [Fault("stage"), Fault("dvc"), Fault("all")]
TRAIN_FAULTS = [
    *KILLS,
    Fault("stage", signal.SIGTERM),
    Fault("dvc", signal.SIGTERM),
    Fault("all", signal.SIGTERM),
    Fault("all", signal.SIGINT),  # Ctrl-C
]
FAULTS = {stage: KILLS for stage in STAGES} | {
    "extract": [*KILLS, Fault("worker")],
    "train": [replace(fault, after_checkpoint=waits) for fault in TRAIN_FAULTS for waits in (False, True)],
}


# Of the stages that run in several processes.
FAULTS_OF_A_PROCESS = {
    "find_batch": [Fault("process")],
    "train": [
        Fault("process", signum, after_checkpoint=waits)
        for signum in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, None)
        for waits in (True, False)
    ],
    "evaluate": [Fault("process"), Fault("process", signal.SIGSTOP), Fault("process", None)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="of dvc repro, over all stages in turn")
    parser.add_argument("--exp-rounds", type=int, default=6, help="of dvc exp run --temp")
    parser.add_argument("--queue-rounds", type=int, default=4, help="of dvc queue start")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-processes", type=int, default=1, help="compute.num_processes")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs and their children ignore it by default
    with TemporaryDirectory(prefix="torture-") as folder:
        project = Project(Path(folder), targets=STAGES[-1:], num_processes=arguments.num_processes)
        plan = [(stage, fault) for stage in arguments.stages for fault in faults_of(stage, arguments.num_processes)]
        rounds = [("repro", *plan[number % len(plan)]) for number in range(arguments.rounds)]
        for how, num_rounds in (("exp", arguments.exp_rounds), ("queue", arguments.queue_rounds)):
            kills = [replace(rng.choice(KILLS), after_checkpoint=number % 2 == 0) for number in range(num_rounds)]
            rounds += [(how, "train", kill) for kill in kills]
        failed = 0
        for number, (how, stage, fault) in enumerate(rounds, start=1):
            try:
                outcome = getattr(project, how)(stage, fault, rng)
            except Failed as failure:
                failed += 1
                outcome = f"FAILED: {failure}"
            print(f"{number}/{len(rounds)} {how} {stage}, {fault}: {outcome}", flush=True)
    by_stage = ", ".join(f"{stage} {number}" for stage, number in Counter(stage for _, stage, _ in rounds).items())
    print(
        f"torture: {len(rounds)} rounds ({by_stage}), {failed} failed; {project.resumed} trainings resumed from a "
        f"checkpoint, {project.missed} faults missed, {project.mended} rounds repaired files of DVC"
    )
    sys.exit(failed > 0)


def faults_of(stage: str, num_processes: int) -> list[Fault]:
    """The faults of a stage. Those of one process come first, so that a short run has them."""
    return (FAULTS_OF_A_PROCESS.get(stage, []) if num_processes > 1 else []) + FAULTS[stage]


class Project:
    """The clone, a snapshot of it before some stages, and the hashes of the undisturbed run."""

    def __init__(
        self, folder: Path, *, targets: tuple[str, ...], stages: tuple[str, ...] = STAGES, num_processes: int = 1
    ):
        """targets: the stages that are the arguments of `dvc repro`. stages: those that can have a fault."""
        self.folder, self.targets = folder, targets
        self.seconds: dict[str, float] = {}
        self.mended = self.resumed = self.missed = 0
        clone = folder / "undisturbed"
        make_clone(clone, settings={"compute.num_processes": num_processes})
        for stage in stages:
            shutil.copytree(clone, folder / f"before-{stage}", symlinks=True)
            started = time.monotonic()
            run(["dvc", "repro", stage], clone)
            self.seconds[stage] = time.monotonic() - started
        started = time.monotonic()
        run(["dvc", "repro", *targets], clone)  # has nothing to run if all stages can have a fault
        self.dvc_seconds = time.monotonic() - started
        if "train" in self.seconds:
            self.last_step = json.loads((clone / "metrics/train/metrics.json").read_text())["step"]
        self.expected = outs(clone / "dvc.lock")
        for stage in self.seconds:
            snapshot_cache = folder / f"before-{stage}/.dvc/cache"
            shutil.rmtree(snapshot_cache, ignore_errors=True)
            shutil.copytree(clone / ".dvc/cache", snapshot_cache)
            evict(stage, clone / "dvc.lock", snapshot_cache)
        times = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items())
        print(f"undisturbed: {times}; each includes {self.dvc_seconds:.1f} s of DVC itself", flush=True)

    def repro(self, stage: str, fault: Fault, rng: random.Random) -> str:
        """Runs one round. Returns a description of it.

        Raises:
            Failed: the pipeline did not recover.
        """
        work = self._copy_before(stage)
        command = ["dvc", "repro", *self.targets]
        when = self._inject(start(command, work), stage, fault, rng)
        saved, known_logs = valid_checkpoints(work), logs(work)
        when += self._repeat(command, work) + self._require_resumed(work, saved, known_logs)
        outcome = self._compare(outs(work / "dvc.lock"), when)
        if left := list(processes_in(work)):
            raise Failed(f"{when}; still running: {left}")
        if left_files := [path for path in work.rglob(".*partial") if ".dvc" not in path.parts]:
            raise Failed(f"{when}; half-written files: {left_files}")
        shutil.rmtree(work)
        return outcome

    def _repeat(self, command: list[str], work: Path) -> str:
        """Runs the command again as `make repro` does: commands.mend_dvc first."""
        mended = run([sys.executable, "-m", "commands.mend_dvc"], work)
        self.mended += bool(mended)
        run(command, work)
        return "".join(f", {line}" for line in mended.splitlines())

    def _require_resumed(self, work: Path, saved: list[int], known_logs: set[Path]) -> str:
        """Returns ", resumed from step N"; "" if the run started without a checkpoint.

        Raises:
            Failed: a training began before the last checkpoint.
        """
        if not saved:
            return ""
        step = first_step(logs(work) - known_logs, max(saved))
        self.resumed += 1
        return f", resumed from step {step}"

    def exp(self, stage: str, fault: Fault, rng: random.Random) -> str:
        work = self._copy_before(stage)
        when = self._inject(start(["dvc", "exp", "run", "--temp"], work), stage, fault, rng)
        saved, known_logs = valid_checkpoints(work), logs(work)
        when += self._repeat(["dvc", "exp", "run", "--temp", "--name", "again"], work)
        when += self._require_resumed(work, saved, known_logs)
        outcome = self._compare_experiment(work, when)
        shutil.rmtree(work)
        return outcome

    def queue(self, stage: str, fault: Fault, rng: random.Random) -> str:
        work = self._copy_before(stage)
        run(["dvc", "exp", "run", "--queue"], work)
        start(["dvc", "queue", "start"], work).wait(TIMEOUT_S)  # run() would wait for pipes that the queue inherits
        when = self._inject(None, stage, fault, rng, work)
        saved, known_logs = valid_checkpoints(work), logs(work)
        when += self._repeat(["dvc", "exp", "run", "--queue", "--name", "again"], work)
        start(["dvc", "queue", "start"], work).wait(TIMEOUT_S)
        until = time.monotonic() + TIMEOUT_S
        while "again" not in run(["dvc", "exp", "list", "--name-only"], work):
            if time.monotonic() > until:
                raise Failed(f"{when}; the queue did not end: {run(['dvc', 'queue', 'status'], work)}")
            time.sleep(1)
        when += self._require_resumed(work, saved, known_logs)
        outcome = self._compare_experiment(work, when)
        run(["dvc", "queue", "stop", "--kill"], work)
        for process in processes_in(work):
            process.kill()
        shutil.rmtree(work)
        return outcome

    def _copy_before(self, stage: str) -> Path:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / f"before-{stage}", work, symlinks=True)
        return work

    def _inject(
        self,
        dvc: "subprocess.Popen[bytes] | None",
        stage: str,
        fault: Fault,
        rng: random.Random,
        work: Path | None = None,
    ) -> str:
        """Sends the signal at a random moment. Returns a description of the moment."""
        work = work or Path(self.folder / "work")
        event, delay, has_happened = self._moment(dvc, stage, fault, rng, work)
        until = time.monotonic() + TIMEOUT_S
        while not has_happened():
            if time.monotonic() > until or (dvc is not None and dvc.poll() is not None):
                raise Failed(f"no {event}")
            time.sleep(0.01)
        time.sleep(delay)
        running = stage_processes(work, stage)
        match fault.target:
            case "all":
                processes = list(processes_in(work))
            case "stage":
                processes = running[:1]
            case "worker":
                processes = running[0].children() if running else []
            case "process":
                children = running[0].children() if running else []
                processes = [rng.choice(children)] if children else []
            case _:
                processes = dvc_above(running) if dvc is None else [psutil.Process(dvc.pid)] * (dvc.poll() is None)
        newest = max(valid_checkpoints(work), default=0)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                fault.hit(process)
        hit_at = time.monotonic()
        if dvc:
            dvc.wait(TIMEOUT_S)
            seconds = time.monotonic() - hit_at
            _, alive = psutil.wait_procs(list(processes_in(work)), END_S)
            if alive:
                raise Failed(f"{delay:.1f} s after {event}; running {END_S:.0f} s after the end of dvc: {alive}")
            if fault.target == "process" and processes and dvc.returncode:
                event += f"; {seconds:.0f} s later: {error_line(work.with_suffix('.txt').read_text())!r}"
                if seconds > END_S:
                    raise Failed(f"{delay:.1f} s after {event}; the job ended more than {END_S:.0f} s later")
        # Without a checkpoint, the training had just ended and removed them.
        if running and newest and fault.after_checkpoint and fault.signum in (signal.SIGTERM, signal.SIGINT):
            psutil.wait_procs(running, TIMEOUT_S)
            require_newer(newest, valid_checkpoints(work), self.last_step)
        self.missed += not processes
        return f"{delay:.1f} s after {event}" + ("" if processes else " (it had ended)")

    def _moment(
        self, dvc: "subprocess.Popen[bytes] | None", stage: str, fault: Fault, rng: random.Random, work: Path
    ) -> tuple[str, float, Callable[[], bool]]:
        """Returns an event, the delay after it in seconds, and a function that tells if it has happened.

        The moment is between the start and the end of the target, or within a second after a checkpoint other than that
        of the last step.
        """
        if fault.after_checkpoint:
            step = rng.randrange(SAVE_STEPS, self.last_step, SAVE_STEPS)
            return f"checkpoint-{step}", rng.uniform(0, 1), lambda: max(valid_checkpoints(work), default=0) >= step
        if dvc is not None and fault.target in ("dvc", "all"):
            return "start of dvc", rng.uniform(0, self.seconds[stage]), lambda: True
        longest = max(0.0, self.seconds[stage] - self.dvc_seconds)
        delay = rng.uniform(0, longest) * (0.5 if fault.target in ("worker", "process") else 1)
        return f"start of {stage}", delay, lambda: bool(stage_processes(work, stage))

    def _compare(self, hashes: dict[str, str], when: str) -> str:
        different = [out for out in self.expected if hashes.get(out) != self.expected[out]]
        if different or hashes.keys() != self.expected.keys():
            raise Failed(f"{when}; different hashes: {', '.join(different)}")
        return f"{when}, {len(hashes)} hashes equal"

    def _compare_experiment(self, work: Path, when: str) -> str:
        lock = work / "experiment.lock"
        revision = run(["dvc", "exp", "list", "--name-only", "--rev", "HEAD"], work)
        if "again" not in revision:
            raise Failed(f"{when}; no experiment: {revision}")
        reference = run(["git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/again"], work).strip()
        lock.write_text(run(["git", "show", f"{reference}:dvc.lock"], work))
        return self._compare(outs(lock), when)


def evict(stage: str, lock: Path, cache: Path) -> None:
    """Removes one stage from a cache. It runs again; later stages run only if its outputs differ."""
    for run_file in list((cache / "runs").glob("*/*/*")):
        if f"stages.{stage}\n" in run_file.read_text(encoding="utf-8"):
            shutil.rmtree(run_file.parent)
    for out in YAML(typ="safe", pure=True).load(lock)["stages"][stage]["outs"]:
        listed = cache / "files/md5" / out["md5"][:2] / out["md5"][2:]
        if listed.suffix == ".dir":
            for file in json.loads(listed.read_text()):
                (listed.parents[1] / file["md5"][:2] / file["md5"][2:]).unlink(missing_ok=True)
        listed.unlink(missing_ok=True)


def processes_in(work: Path) -> Iterator[psutil.Process]:
    """Live processes whose working directory is in the folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(work) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def stage_processes(work: Path, stage: str) -> list[psutil.Process]:
    """The processes of a stage, oldest first: its own and its forked children."""
    found = []
    for process in processes_in(work):
        with suppress(psutil.Error):
            command = process.cmdline()
            if f"stages.{stage}" in command and "python" in Path(command[0]).name:
                found.append(process)
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def dvc_above(running: list[psutil.Process]) -> list[psutil.Process]:
    """The dvc process of a stage that a queue started."""
    parents = running[0].parents() if running else []
    return [next(parent for parent in parents if any("dvc" in word for word in parent.cmdline()))] if parents else []


def error_line(output: str) -> str:
    """Returns the error line of a job of several processes: the failed process, and the remedy or the checkpoint.

    Raises:
        Failed: the output does not have exactly one error line, or it has a traceback.
    """
    of_process = r"error: .*process \d+ of \d+ \(pid \d+\).*run .*again.*"
    lines = re.findall(rf"^(?:{of_process}|\w+: stopped by .*)$", output, re.MULTILINE)
    if len(lines) != 1 or "Traceback" in output:
        raise Failed(f"no line names the process and the remedy: {output[-2000:]}")
    return str(lines[0])


def logs(work: Path) -> set[Path]:
    return set((work / "logs").glob("*.log"))


def valid_checkpoints(work: Path) -> list[int]:
    """Steps of the checkpoints that a training can resume from: those with a manifest."""
    manifests = work.glob(".scratch/train/*/checkpoint-*/manifest.json")
    return [int(manifest.parent.name.removeprefix("checkpoint-")) for manifest in manifests]


def require_newer(newest: int, saved: list[int], last_step: int) -> None:
    """Raises Failed without a checkpoint after step `newest`."""
    is_last = newest + SAVE_STEPS >= last_step  # then the training may end before the signal arrives
    if not is_last and max(saved, default=0) <= newest:
        raise Failed(f"no checkpoint after checkpoint-{newest}")


def first_step(new_logs: set[Path], last_saved: int) -> int:
    """The first step of the last training. Raises Failed if a training began before the last checkpoint."""
    text = "".join(log.read_text() for log in sorted(new_logs))
    steps = [int(step) for step in re.findall(r"starts from \S*checkpoint-(\d+)", text)]
    if not steps or min(steps) < last_saved:
        raise Failed(f"checkpoint-{last_saved} existed, training began at {steps or 'the base model'}")
    return steps[-1]


if __name__ == "__main__":
    main()
