"""Kills the pipeline at random moments and asks whether the next `dvc repro` gives what an undisturbed run gives.

    python -m tests.long.torture --rounds 60 --seed 1        (make torture)

In a temporary clone of this checkout's HEAD with a few of the demo's PDFs and a training of seconds. A round copies the
clone as it was before one stage (the stages after it are in the cache and run again only if its outputs differ), starts
`dvc repro`, ends one of its processes or all at a random moment, runs what `make repro` runs (commands.mend_dvc and
`dvc repro`), and compares the hash of every output in dvc.lock. A round fails too if a process is left alive, if a
half-written file is left beside an output, if a training does not go on from the last whole checkpoint, or if SIGTERM
or Ctrl-C ended it without one more; half of the rounds of train wait for a checkpoint first. `exp` rounds do the same
to `dvc exp run --temp`, `queue` rounds to `dvc queue start`.
"""

import argparse
import json
import random
import re
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

STAGES = ("check", "extract", "split", "convert", "find_batch", "train", "evaluate", "sample", "report")
SAVE_STEPS = int(str(SETTINGS["train.save_steps"]))


@dataclass(frozen=True)
class Fault:
    """What is done to which process: `stage` (its own), `worker` (a child of it), `dvc`, `all`.

    after_checkpoint: not before the training has written one.
    """

    target: str
    number: signal.Signals = signal.SIGKILL
    after_checkpoint: bool = False

    def __str__(self) -> str:
        return f"{self.number.name} to {self.target}"


KILLS = [Fault("stage"), Fault("dvc"), Fault("all")]
TRAIN_BLOWS = [
    *KILLS,
    Fault("stage", signal.SIGTERM),
    Fault("dvc", signal.SIGTERM),
    Fault("all", signal.SIGTERM),
    Fault("all", signal.SIGINT),  # Ctrl-C
]
BLOWS = {stage: KILLS for stage in STAGES} | {
    "extract": [*KILLS, Fault("worker")],
    "train": [replace(blow, after_checkpoint=waits) for blow in TRAIN_BLOWS for waits in (False, True)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="of dvc repro, over all stages in turn")
    parser.add_argument("--exp-rounds", type=int, default=6, help="of dvc exp run --temp")
    parser.add_argument("--queue-rounds", type=int, default=4, help="of dvc queue start")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background, and what it starts, ignores it
    with TemporaryDirectory(prefix="torture-") as folder:
        project = Project(Path(folder), targets=STAGES[-1:])
        plan = [(stage, blow) for stage in arguments.stages for blow in BLOWS[stage]]
        rounds = [("repro", *plan[number % len(plan)]) for number in range(arguments.rounds)]
        for how, number_of_them in (("exp", arguments.exp_rounds), ("queue", arguments.queue_rounds)):
            kills = [replace(rng.choice(KILLS), after_checkpoint=number % 2 == 0) for number in range(number_of_them)]
            rounds += [(how, "train", kill) for kill in kills]
        failed = 0
        for number, (how, stage, blow) in enumerate(rounds, start=1):
            try:
                said = getattr(project, how)(stage, blow, rng)
            except Failed as failure:
                failed += 1
                said = f"FAILED: {failure}"
            print(f"{number}/{len(rounds)} {how} {stage}, {blow}: {said}", flush=True)
    by_stage = ", ".join(f"{stage} {number}" for stage, number in Counter(stage for _, stage, _ in rounds).items())
    print(
        f"torture: {len(rounds)} rounds ({by_stage}), {failed} failed; {project.resumed} trainings went on from a "
        f"checkpoint, {project.too_late} blows came too late, dvc's own files were mended in {project.mended}"
    )
    sys.exit(failed > 0)


class Project:
    """The clone, a snapshot of it before each stage, and what the undisturbed run made of it."""

    def __init__(self, folder: Path, *, targets: tuple[str, ...]):
        """targets: the stages that `dvc repro` is asked for."""
        self.folder, self.targets = folder, targets
        self.seconds: dict[str, float] = {}
        self.mended = self.resumed = self.too_late = 0
        clone = folder / "undisturbed"
        make_clone(clone)
        for stage in STAGES[: STAGES.index(targets[-1]) + 1]:
            shutil.copytree(clone, folder / f"before-{stage}", symlinks=True)
            started = time.monotonic()
            run(["dvc", "repro", stage], clone)
            self.seconds[stage] = time.monotonic() - started
        started = time.monotonic()
        run(["dvc", "repro", next(iter(self.seconds))], clone)
        self.dvc_seconds = time.monotonic() - started
        if "train" in self.seconds:
            self.last_step = json.loads((clone / "metrics/train/metrics.json").read_text())["step"]
        self.expected = outs(clone / "dvc.lock")
        for stage in self.seconds:
            snapshot_cache = folder / f"before-{stage}/.dvc/cache"
            shutil.rmtree(snapshot_cache, ignore_errors=True)
            shutil.copytree(clone / ".dvc/cache", snapshot_cache)
            forget(stage, clone / "dvc.lock", snapshot_cache)
        said = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items())
        print(f"undisturbed: {said}; {self.dvc_seconds:.1f} s of each are dvc's own", flush=True)

    def repro(self, stage: str, blow: Fault, rng: random.Random) -> str:
        """One round; gives what happened, in words.

        Raises:
            Failed: the pipeline did not recover.
        """
        work = self._copy_before(stage)
        command = ["dvc", "repro", *self.targets]
        when = self._strike(start(command, work), stage, blow, rng)
        saved, known_logs = whole_checkpoints(work), logs(work)
        when += self._again(command, work) + self._went_on(work, saved, known_logs)
        said = self._compare(outs(work / "dvc.lock"), when)
        if left := list(processes_in(work)):
            raise Failed(f"{when}; left running: {left}")
        if left_files := [path for path in work.rglob(".*partial") if ".dvc" not in path.parts]:
            raise Failed(f"{when}; left behind: {left_files}")
        shutil.rmtree(work)
        return said

    def _again(self, command: list[str], work: Path) -> str:
        """`dvc repro` as the user runs it again: first commands.mend_dvc, as `make repro` does."""
        mended = run([sys.executable, "-m", "commands.mend_dvc"], work)
        self.mended += bool(mended)
        run(command, work)
        return "".join(f", {line}" for line in mended.splitlines())

    def _went_on(self, work: Path, saved: list[int], known_logs: set[Path]) -> str:
        """Where the last training began, in words; nothing where no checkpoint was saved.

        Raises:
            Failed: before the last checkpoint.
        """
        if not saved:
            return ""
        step = first_step(logs(work) - known_logs, max(saved))
        self.resumed += 1
        return f", went on from step {step}"

    def exp(self, stage: str, blow: Fault, rng: random.Random) -> str:
        work = self._copy_before(stage)
        when = self._strike(start(["dvc", "exp", "run", "--temp"], work), stage, blow, rng)
        saved, known_logs = whole_checkpoints(work), logs(work)
        when += self._again(["dvc", "exp", "run", "--temp", "--name", "again"], work)
        when += self._went_on(work, saved, known_logs)
        said = self._compare_experiment(work, when)
        shutil.rmtree(work)
        return said

    def queue(self, stage: str, blow: Fault, rng: random.Random) -> str:
        work = self._copy_before(stage)
        run(["dvc", "exp", "run", "--queue"], work)
        start(["dvc", "queue", "start"], work).wait(TIMEOUT_S)  # the queue would hold our pipes
        when = self._strike(None, stage, blow, rng, work)
        saved, known_logs = whole_checkpoints(work), logs(work)
        when += self._again(["dvc", "exp", "run", "--queue", "--name", "again"], work)
        start(["dvc", "queue", "start"], work).wait(TIMEOUT_S)
        until = time.monotonic() + TIMEOUT_S
        while "again" not in run(["dvc", "exp", "list", "--name-only"], work):
            if time.monotonic() > until:
                raise Failed(f"{when}; the queue did not end: {run(['dvc', 'queue', 'status'], work)}")
            time.sleep(1)
        when += self._went_on(work, saved, known_logs)
        said = self._compare_experiment(work, when)
        run(["dvc", "queue", "stop", "--kill"], work)
        for process in processes_in(work):
            process.kill()
        shutil.rmtree(work)
        return said

    def _copy_before(self, stage: str) -> Path:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / f"before-{stage}", work, symlinks=True)
        return work

    def _strike(
        self,
        dvc: "subprocess.Popen[bytes] | None",
        stage: str,
        blow: Fault,
        rng: random.Random,
        work: Path | None = None,
    ) -> str:
        """Sends the signal at a random moment; gives the moment in words."""
        work = work or Path(self.folder / "work")
        awaited, delay, has_come = self._moment(dvc, stage, blow, rng, work)
        until = time.monotonic() + TIMEOUT_S
        while not has_come():
            if time.monotonic() > until or (dvc is not None and dvc.poll() is not None):
                raise Failed(f"no {awaited}")
            time.sleep(0.01)
        time.sleep(delay)
        stage_now = stage_processes(work, stage)
        match blow.target:
            case "all":
                victims = list(processes_in(work))
            case "stage":
                victims = stage_now[:1]
            case "worker":
                victims = stage_now[0].children() if stage_now else []
            case _:
                victims = above(stage_now) if dvc is None else [psutil.Process(dvc.pid)] * (dvc.poll() is None)
        newest = max(whole_checkpoints(work), default=0)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(blow.number)
        if dvc:
            dvc.wait(TIMEOUT_S)
        if stage_now and blow.after_checkpoint and blow.number != signal.SIGKILL:
            psutil.wait_procs(stage_now, TIMEOUT_S)
            require_newer(newest, whole_checkpoints(work), self.last_step)
        self.too_late += not victims
        return f"{delay:.1f} s after {awaited}" + ("" if victims else " (it had ended)")

    def _moment(
        self, dvc: "subprocess.Popen[bytes] | None", stage: str, blow: Fault, rng: random.Random, work: Path
    ) -> tuple[str, float, Callable[[], bool]]:
        """What to wait for, in words, how many seconds more, and whether it has come.

        A moment lies between the start of the target and its end, or within a second of a checkpoint, any but that of
        the last step.
        """
        if blow.after_checkpoint:
            step = rng.randrange(SAVE_STEPS, self.last_step, SAVE_STEPS)
            return f"checkpoint-{step}", rng.uniform(0, 1), lambda: max(whole_checkpoints(work), default=0) >= step
        if dvc is not None and blow.target in ("dvc", "all"):
            return "start of dvc", rng.uniform(0, self.seconds[stage]), lambda: True
        longest = max(0.0, self.seconds[stage] - self.dvc_seconds)
        delay = rng.uniform(0, longest) * (0.5 if blow.target == "worker" else 1)
        return f"start of {stage}", delay, lambda: bool(stage_processes(work, stage))

    def _compare(self, made: dict[str, str], when: str) -> str:
        different = [out for out in self.expected if made.get(out) != self.expected[out]]
        if different or made.keys() != self.expected.keys():
            raise Failed(f"{when}; other hashes: {', '.join(different)}")
        return f"{when}, {len(made)} hashes the same"

    def _compare_experiment(self, work: Path, when: str) -> str:
        lock = work / "experiment.lock"
        revision = run(["dvc", "exp", "list", "--name-only", "--rev", "HEAD"], work)
        if "again" not in revision:
            raise Failed(f"{when}; no experiment: {revision}")
        reference = run(["git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/again"], work).strip()
        lock.write_text(run(["git", "show", f"{reference}:dvc.lock"], work))
        return self._compare(outs(lock), when)


def forget(stage: str, lock: Path, cache: Path) -> None:
    """Takes one stage out of a cache: it runs again, and the stages after it do only if its outputs differ."""
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
    """Processes at work in a folder, oldest first: those whose current folder it is or lies in it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(work) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def stage_processes(work: Path, stage: str) -> list[psutil.Process]:
    """The stage, and what it has forked."""
    found = []
    for process in processes_in(work):
        with suppress(psutil.Error):
            command = process.cmdline()
            if f"stages.{stage}" in command and "python" in Path(command[0]).name:
                found.append(process)
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def above(stage_now: list[psutil.Process]) -> list[psutil.Process]:
    """The dvc of a stage in a queue, which nobody here started."""
    parents = stage_now[0].parents() if stage_now else []
    return [next(parent for parent in parents if any("dvc" in word for word in parent.cmdline()))] if parents else []


def logs(work: Path) -> set[Path]:
    return set((work / "logs").glob("*.log"))


def whole_checkpoints(work: Path) -> list[int]:
    """Steps of the checkpoints that a training can go on from: with a manifest, and not of the last step."""
    steps = []
    for manifest in work.glob(".scratch/train/*/checkpoint-*/manifest.json"):
        with suppress(FileNotFoundError):  # only the newest two are kept
            state = json.loads(manifest.with_name("trainer_state.json").read_text())
            if state["global_step"] < state["max_steps"]:
                steps.append(state["global_step"])
    return steps


def require_newer(newest: int, saved: list[int], last_step: int) -> None:
    """Raises Failed where a signal on which train saves a checkpoint ended it with none newer than before."""
    is_last = newest + SAVE_STEPS >= last_step  # that of the last step does not count
    if not is_last and max(saved, default=0) <= newest:
        raise Failed(f"no checkpoint after checkpoint-{newest}")


def first_step(new_logs: set[Path], last_saved: int) -> int:
    """Where the last of the trainings began; raises Failed where one of them began before the last checkpoint."""
    said = "".join(log.read_text() for log in sorted(new_logs))
    steps = [int(step) for step in re.findall(r"starts from \S*checkpoint-(\d+)", said)]
    if not steps or min(steps) < last_saved:
        raise Failed(f"checkpoint-{last_saved} was there, training began at {steps or 'the base model'}")
    return steps[-1]


if __name__ == "__main__":
    main()
