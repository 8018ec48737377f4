"""What a trial costs the driver: ``nice python -m tests.benchmarks.driver [--trials 10000]``.

With ``--slots 200 --trials 2000``, what it costs beside so many slots: ``tests.benchmarks.slots``.
Without, no trial runs and no cluster is there: made-up results with as many scores as a real one
has, or ``--scores N``, are fed to the driver's own parts (proposals of the random sampler, ledger,
front, Optuna's journal, console, ``trials.csv``), as Ray Tune's callbacks would, and Tune's own
trials are held as it holds them. ``--mlflow N`` records the first N
of them in MLflow's SQLite file too. Reported are CPU seconds of a trial without its proposal, over
the trials up to each mark, and the peak memory; then CPU seconds of what is done once: tables,
figures and ``study.json`` at the end, and reading everything again for a resume.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial

from tests.benchmarks.machine import emit, machine, machine_line
from vgid.cluster.losses import Losses
from vgid.cluster.mailbox import Job, Outcome
from vgid.cluster.tune import JOB, Recorder, Verdicts, told
from vgid.config import StudyConfig, TrialConfig
from vgid.results import EpochReport, Score, TrialResult
from vgid.study.console import Standing, StudyConsole
from vgid.study.ending import Ending
from vgid.study.ledger import Ledger
from vgid.study.outcome import Material
from vgid.study.plan import make_plan
from vgid.study.run import Study
from vgid.study.search import ParetoSearch
from vgid.study.trials import Listener

MARKS = (1000, 3000, 10_000)
SCORES = 160
"""A trial of tiny-llava has about so many."""
NAMES = ("forget_rougeL", "retain_rougeL", "test_rougeL", "forget_cloze", "forget_rougeL_reduction")
BASE = {"forget_rougeL": 0.95, "retain_rougeL": 0.97}


class NoTracker:
    """Stands for MLflow where it is not measured."""

    pages: Mapping[str, str] = {}
    server = ""

    def log_trial(self, record: Any) -> bool:
        """Nothing."""
        return True

    def finish_study(self, *arguments: Any) -> None:
        """Nothing."""


def made_up(job: Job, rng: random.Random, scores: int = SCORES) -> Outcome:
    """What a slot would report of a trial, with so many scores or more; some fail."""
    if rng.random() < 0.02:
        result = TrialResult(trial_id=job.id, status="failed", error="the loss is not finite")
        return Outcome(job_id=job.id, result=result)
    x = rng.random()
    values = {name: rng.random() for name in NAMES}
    values |= {"forget_rougeL_reduction": 0.95 * x, "retain_rougeL": 0.97 - 0.3 * x * rng.random()}
    values |= {f"split_{number}_metric": rng.random() for number in range(scores - len(values))}
    found = {name: Score(value=v, n=60, low=v - 0.1, high=v + 0.1) for name, v in values.items()}
    result = TrialResult(
        trial_id=job.id,
        status="completed",
        scores=found,
        metrics=values,
        seconds={"teacher": 0.1, "train": 4.0, "evaluate": 2.0, "save": 0.1},
        adapter=job.adapter,
    )
    return Outcome(job_id=job.id, result=result, slot=0, cycle_s=6.5)


class Driver:
    """A study's driver without its cluster.

    Args:
        config: the study.
        mlflow: how many trials are recorded in MLflow.
        resume: go on with the study that is there.
        slots: how many trials may run at a time.
        scores: that a trial has.
    """

    def __init__(
        self,
        config: StudyConfig,
        mlflow: int,
        resume: bool = False,
        slots: int = 1,
        scores: int = SCORES,
    ) -> None:
        plan = make_plan(config)
        self.ledger = Ledger(config.output)
        self.ledger.open(plan.config, plan.space.sha256, resume)
        standing = Standing(config.trials)
        self._stream = (config.output / "console").open("w")
        console = StudyConsole(self._stream, standing)
        ending = Ending(None)
        self.study = study = Study(plan, self.ledger, console, ending)
        study.board.base["search"] = {
            name: Score(value=value, n=60, low=value, high=value) for name, value in BASE.items()
        }
        study._material.set_result(Material({"dataset": "d" * 64, "base": "b" * 64}))
        self._none: Any = NoTracker()
        self._mlflow, self._scores = mlflow, scores
        self._kept: list[Trial] = []
        study._tracker.set_result(study._open_tracker() if mlflow and not resume else self._none)
        self.bulletin = study._bulletin
        losses = Losses()
        self.search = ParetoSearch(
            self.ledger,
            plan.space,
            config,
            lambda: slots,
            losses,
            on_start=self.bulletin.running,
        )
        self.listener = Listener(
            self.ledger, self.search, losses, self.bulletin, ending, None, study._seconds
        )
        self.verdicts = Verdicts(self.listener.on_epoch)
        self.recorder = Recorder(self.listener.on_end)
        self.bulletin.catch_up(self.ledger.records.values(), study._tracker.result())
        self.proposal_s = 0.0
        propose = self.search._propose

        def timed() -> Any:
            began = time.thread_time()
            try:
                return propose()
            finally:
                self.proposal_s += time.thread_time() - began

        self.search._propose = timed

    def run(self, until: int) -> float:
        """Let trials end until there are so many; CPU seconds without the proposals."""
        rng = random.Random(until)
        began, proposed = time.process_time(), self.proposal_s
        while len(self.ledger.records) < until:
            if len(self.ledger.records) >= self._mlflow:
                self.bulletin._tracker = self._none
            proposal = self.search.suggest("tune")
            job = Job.model_validate_json(proposal[JOB])
            assert isinstance(job.trial, TrialConfig)
            report = EpochReport(epoch=1, epochs=1, step=9, metrics={"loss": rng.random()})
            trial = Trial("made up", config=proposal, stub=True)
            self._kept.append(trial)
            for step, message in enumerate((report, made_up(job, rng, self._scores)), start=1):
                self.verdicts.on_trial_result(None, trial, told(message))
                trial.update_last_result({**told(message), "training_iteration": step})
            self.search.on_trial_complete("tune")
            self.recorder.on_trial_complete(step, self._kept, trial)
        self.end()
        return time.process_time() - began - (self.proposal_s - proposed)

    def end(self) -> None:
        """Wait until what waits to be written is written."""
        for side in (self.bulletin._tables, self.bulletin.mlflow):
            side.submit(int).result()

    def close(self) -> None:
        """Let go of the folder."""
        self.end()
        self.search.close()
        self.ledger.close()
        self._stream.close()


def timed(call: Any) -> tuple[float, Any]:
    """CPU seconds of a call, and its value."""
    began = time.process_time()
    value = call()
    return time.process_time() - began, value


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(trials: int, mlflow: int, scores: int, folder: Path) -> dict[str, Any]:
    """Feed so many trials; seconds and MiB by mark, then what is done once."""
    config = StudyConfig(output=folder / "study", trials=trials, sampler="random")
    driver = Driver(config, mlflow, scores=scores)
    found: dict[str, Any] = {"peak MiB before the first trial": round(peak_mib())}
    before = 0
    for mark in sorted({mark for mark in (*MARKS, mlflow, trials) if 0 < mark <= trials}):
        seconds = driver.run(mark)
        found[f"up to {mark:,}"] = {
            "CPU s a trial": round(seconds / (mark - before), 4),
            "CPU s a proposal": round(driver.proposal_s / mark, 4),
            "peak MiB": round(peak_mib()),
        }
        print(f"up to {mark:,}: {found[f'up to {mark:,}']}", file=sys.stderr, flush=True)
        before = mark
    driver.end()
    outcome_s, _ = timed(driver.study.write)
    outcome_mib = round(peak_mib())
    driver.close()
    again_s, again = timed(lambda: Driver(config, 0, resume=True))
    again.close()
    return found | {
        "outcome": {"CPU s": round(outcome_s, 2), "peak MiB": outcome_mib},
        # A driver that resumes is loaded beside the first here: its peak says nothing.
        "resume": {"CPU s": round(again_s, 2)},
    }


def main() -> None:
    """Measure and print a table, with ``--json`` one last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=MARKS[-1])
    parser.add_argument("--mlflow", type=int, default=0, metavar="N")
    parser.add_argument("--scores", type=int, default=SCORES, metavar="N")
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="with --slots: Tune, a process each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.slots:
            from tests.benchmarks.slots import measure_slots

            found = measure_slots(options.trials, options.slots, options.tune, Path(folder))
        else:
            found = measure(options.trials, options.mlflow, options.scores, Path(folder))
    described = machine()  # last, for it brings torch along, which a driver has not
    print(machine_line(described), flush=True)
    emit({**found, "machine": described}, options.json)


if __name__ == "__main__":
    main()
