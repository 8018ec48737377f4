"""The main job: a Pareto study from a checked plan to a front that one can look at.

``run_study`` reads top to bottom: record the study, bring up cluster, data and MLflow side by side,
let Ray Tune run the trials in resident slots, score the front again on held-out questions, write
tables and figures. All but the ledger, written as trials start and end, can be made again from it.
"""

import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vgid.cluster.blame import disk_sentence
from vgid.cluster.losses import RETRIES, Losses
from vgid.cluster.mailbox import Job, Outcome
from vgid.config import StudyConfig, TrialConfig
from vgid.errors import DiskError, InputError
from vgid.evaluation.suppression import doubt
from vgid.interrupts import POLL_S, Interrupt, StudyInterruptedError
from vgid.report.figures import FIGURES, write_figures
from vgid.report.plots import Front
from vgid.report.records import TrialRecord, TrialsTable, describe, write_front, write_study
from vgid.results import EpochReport, QuestionPart, TrialResult, Verbatim, shots_left_out
from vgid.seeds import held_out_seed
from vgid.study.background import Background
from vgid.study.console import Standing, StudyConsole, last_words, libraries_silenced, print_summary
from vgid.study.ledger import Header, Ledger, Record, changes, now
from vgid.study.plan import Ancestor, Plan, make_plan
from vgid.study.scoreboard import Scoreboard
from vgid.study.scribe import Scribe
from vgid.study.summary import phases, said_of_a_stop, shortfall, store_use, study_summary
from vgid.study.watchdog import Watchdog

TABLES = ("study.json", "trials.csv", "front.csv")
RAY_FILES = ".ray"
"""What Ray Train and Tune want to keep in the output folder while they run."""

CANCEL_S = 5.0
"""How long the end of a study waits for a mailbox that may just be starting again."""


def run_study(
    config: StudyConfig,
    resume: bool = False,
    session: Any = None,
    retry_failed: bool = False,
    ancestor: Ancestor | None = None,
) -> dict[str, Any]:
    """Run a study, or go on with one.

    Args:
        config: the study.
        resume: continue the study that the output folder holds.
        session: makes the sessions of the workers, ``vgid.cluster.slots.trial_session`` if None.
        retry_failed: run the failed trials of a resumed study again, under their ids.
        ancestor: the deployment that it starts from, where ``config.from_deployment`` names one.

    Returns:
        The content of ``study.json``; ``interrupted`` tells whether a signal ended it, ``error``
        why it has not all that it should have.

    Raises:
        InputError: bad input; nothing was started if it is in what can be checked before.
    """
    started = time.monotonic()
    plan = make_plan(config, ancestor)
    sudden = (
        f"{config.output}: the study's process was killed, or Ray's on its node; go on with "
        "--resume."
    )
    with Ledger(config.output) as ledger, last_words(sudden):
        header = ledger.open(plan.config, plan.space.sha256, resume)
        if retry_failed:
            ledger.retry_failed()
        with libraries_silenced(config.output / "study.log") as terminal:
            standing = Standing(config.trials, budget_s=config.time_budget_s)
            with StudyConsole(terminal, standing) as console:
                for change in changes(header.config, plan.config):
                    console.say(f"Goes on with {change}")
                study = Study(plan, ledger, header, console, standing, started)
                try:
                    summary = study.run(session)
                finally:
                    study.close()
            print_summary(terminal, summary, study.board.trials(), study.board.base, study.ui)
    return summary


class Study:
    """One run of a study: what its trials report, and what is made of it.

    Args:
        plan: the checked study.
        ledger: its open record.
        header: what the record says the study is.
        console: where progress is shown.
        standing: numbers for the console.
        started: ``time.monotonic()`` of the study's start.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        header: Header,
        console: StudyConsole,
        standing: Standing,
        started: float,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.ledger = ledger
        self.header = header
        self.console = console
        self.standing = standing
        self.started = started
        self.board = Scoreboard(ledger)
        self._table = TrialsTable(plan.config.output / "trials.csv")
        self.ui = ""
        self._losses = Losses()
        self._stopped: str | None = None
        self._unscored: dict[str, str] = {}
        self._error: str | None = None
        self._interrupt = Interrupt()
        self._cut_short = False
        self._left = False
        self._hashes: dict[str, str] = {}
        self._verbatim: Verbatim = {}
        self._seconds = {"start-up": 0.0, "load": 0.0, "re-score": 0.0}
        self._slots_used: set[int] = set()
        self._tracker: Any = None
        self._mailbox: Any = None
        self._search: Any = None
        self._scribe = Scribe("tables")
        self._courier = Scribe("mlflow")

    def run(self, session: Any = None) -> dict[str, Any]:
        """Run the trials that are still to run, then score and write everything.

        Returns:
            The content of ``study.json``.
        """
        from vgid.cluster.connection import connected

        self.console.stage("Starting Ray and preparing the data")
        with (
            self._interrupt,
            self._prepared_aside() as (data, tracker),
            connected() as joined,
        ):
            self._run_on_cluster(joined, session, data, tracker)
            try:
                summary = self._write_outcome()
            except DiskError as error:
                raise DiskError(said_of_a_stop(self._stopped or str(error))) from None
        shutil.rmtree(self.config.output / RAY_FILES, ignore_errors=True)
        return summary

    def _run_on_cluster(
        self, joined: bool, session: Any, data: "Future[None]", tracker: "Future[None]"
    ) -> None:
        """All that needs slots; what a signal cuts short is left out."""
        slots = self._start_slots(joined, session)
        watchdog = self._start_watchdog()
        try:
            # Only now: data and weights were read while the slots started, which takes longer.
            self._interrupt.result(data)
            # In the queue before the trials, whose reductions are measured against these scores: a
            # worker finds them in the store then, and need not make them itself.
            base = self._request_base_scores()
            self._interrupt.result(tracker)
            self._bring_tracker_in_line()
            self._run_trials()
            self._interrupt.check()
            self._interrupt.result(base)
            self._record_losses()
            if self._failure is not None:
                raise InputError(self._failure)
            if self._stopped is None:
                self._score_front_again()
        except StudyInterruptedError:
            self._cut_short = True
        except BaseException:
            self._left = True  # ends the waits for scorings
            raise
        finally:
            watchdog.close()
            self._scribe.close()
            self._finishes(Background("closing").submit(self._courier.close))
            self._courier.close(0.0)  # what a signal left no time for is left out
            slots.close(timeout_s=0.0 if self._interrupt.came else 10.0)
            self._end_mailbox()

    def _end_mailbox(self) -> None:
        """Without this it lives as long as the Ray job, which may run many studies."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._mailbox)

    def close(self) -> None:
        """Leave nothing on MLflow as running, however the study ended."""
        if self._tracker is not None and not self._courier.busy:
            self._tracker.close("KILLED" if self._interrupt.came else "FAILED")

    # Before the trials

    @contextmanager
    def _prepared_aside(self) -> Iterator[tuple["Future[None]", "Future[None]"]]:
        """Data and tracker in a thread, one after the other; it ends with the block."""
        side = Background("prepare")
        data, tracker = side.submit(self._prepare_data), side.submit(self._open_tracker)
        try:
            yield data, tracker
        finally:
            tracker.cancel()
            self._interrupt.allows(side.submit(lambda: None))

    def _prepare_data(self) -> None:
        from vgid.data.benchmark import Benchmark
        from vgid.data.splits import choose_people, count_verbatim
        from vgid.models import backbones

        if self.plan.own_data and not self.plan.request.data.exists():
            from vgid.data.synthetic import write_benchmark

            write_benchmark(self.plan.request.data)
        base = backbones.locate(backbones.spec(self.config.backbone), self.config.model_path)
        benchmark = self.plan.benchmark or Benchmark.open(self.plan.request.data)
        hashes = {"dataset": benchmark.sha256, "base": backbones.revision_of(base)}
        self._settle(data_sha256=hashes["dataset"], base_revision=hashes["base"])
        self._hashes = hashes
        default = TrialConfig.model_fields["train_tasks"].default
        self._verbatim = count_verbatim(
            benchmark,
            choose_people(benchmark, self.plan.request),
            self.plan.request,
            self.config.method,
            self.plan.space.fixed.get("train_tasks", default),
        )

    def _settle(self, **found: str) -> None:
        """Hold what the study is made of against what it was started with."""
        unknown = self.ledger.settle(**found)
        if unknown:
            self.console.say(
                f"The study was started before its {', '.join(unknown)} were recorded; what they "
                "are now is taken for what they were."
            )

    def _open_tracker(self) -> None:
        from vgid.study.tracking import Tracker

        if not self._hashes:
            return  # refused
        config = self.config
        tracker = Tracker.open(config.tracking_uri, config.output, config.backbone)
        tracker.start_study(self.header.study_id, config, self._hashes)
        self.ui, self._tracker = tracker.ui_command, tracker

    def _start_slots(self, joined: bool, session: Any) -> Any:
        from vgid.cluster.connection import slot_count
        from vgid.cluster.slots import Slots, start_mailbox, trial_session

        to_run = max(1, self.config.trials - len(self.ledger.ended))
        count, decider = slot_count(self.plan.shape, self.config.max_concurrent, to_run, joined)
        self.standing.slots = count
        self._mailbox = start_mailbox()
        self.console.stage(f"Starting {count} slot(s), by {decider}, and loading the base model")
        slots = Slots(
            self._mailbox,
            self.plan.request,
            self.plan.shape,
            count,
            self.config.output / RAY_FILES,
            self.config.fresh_workers,
            session or trial_session,
        )
        slots.start()
        return slots

    def _start_watchdog(self) -> Watchdog:
        from vgid.cluster.connection import capacity

        return Watchdog(
            self._mailbox,
            self.console.say,
            lambda: capacity(self.plan.shape),
            self._out_of_time,
        )

    def _request_base_scores(self) -> "Future[None]":
        """Have the base model scored; the trials queue up behind."""
        import ray

        parts: tuple[QuestionPart, ...] = ("search", "held_out")
        jobs: dict[QuestionPart, Job] = {}
        for part in parts:
            seed = self.config.seed
            seed = held_out_seed(seed, study=True) if part == "held_out" else seed
            jobs[part] = Job(id=f"base-{part}", kind="base", part=part, seed=seed)
            ray.get(self._mailbox.submit.remote(jobs[part]))

        def wait() -> None:
            for part in parts:
                outcome = self._outcome_of(jobs[part])
                if outcome.error is not None:
                    _log_trace(outcome)
                    said = self._base_unscored(outcome.error)
                    if outcome.lost:
                        self._stop(outcome.error if outcome.fatal else said)
                    elif not self._is_over:
                        said = f"The study stopped: {said}; go on with --resume."
                        self._error = self._error or (outcome.error if outcome.fatal else said)
                    return
                with self._kept_from_tune():
                    self._settle(**outcome.content)
                if self._failure is not None:
                    return
                self.board.base[part] = outcome.scores
                self._seconds["load"] += outcome.load_s
                if part == "search":
                    for line in (doubt(outcome.scores), shots_left_out(outcome.scores)):
                        if line is not None:
                            self.console.say(f"Warning: {line}")
                    self._seconds["start-up"] = time.monotonic() - self.started
                    self.console.stage("Running trials")
            self._update_standing()

        return Background("base").submit(wait)

    def _outcome_of(self, job: Job) -> Outcome:
        """The outcome of a scoring; one that was lost is asked for again, so many times.

        Ends soon after the study does, whatever the slots are about.
        """
        import ray

        while True:
            # Asked once and waited for in short turns: a plain ray.get would hear no signal until
            # the job ends.
            asked = self._mailbox.next_message.remote(job.id)
            while not ray.wait([asked], timeout=POLL_S)[0]:
                if self._is_over:
                    return Outcome(job_id=job.id, error="interrupted")
            outcome: Outcome = ray.get(asked)
            again = outcome.lost and not outcome.fatal and job.attempt <= RETRIES
            if not again or self._is_over or self._out_of_time():
                return outcome
            job = job.model_copy(update={"attempt": job.attempt + 1})
            ray.get(self._mailbox.submit.remote(job))

    def _base_unscored(self, error: str) -> str:
        """What to tell the user whose base model cannot be scored."""
        remedy = f"{self.config.output / 'study.log'} has its traceback"
        if "Memory" in error or "worker" in error:  # the kernel kills whoever takes too much
            fewer = "--max-concurrent"
            if self.config.gpus_per_worker:
                fewer += ", give each worker a whole GPU with --gpus-per-worker"
            remedy = f"if memory was short, lower --eval-batch-size or {fewer}"
        return f"the base model could not be scored ({error.rstrip('.')}); {remedy}"

    def _bring_tracker_in_line(self) -> None:
        self._scribe.write(self._tabulate, self._table.write, self.board.trials())
        for record in self.ledger.records.values():
            self._courier.write(self._tracker.log_trial, record)

    # While the trials run

    def _open_search(self) -> Any:
        from vgid.study.search import ParetoSearch

        config = self.config
        return ParetoSearch(
            self.ledger,
            self.plan.space,
            self.header.study_id,
            config.trials,
            config.sampler,
            config.seed,
            self.standing.slots,
            self._losses,
            out_of_time=self._out_of_time,
            on_start=self._on_start,
        )

    def _run_trials(self) -> None:
        import os

        from ray import tune

        from vgid.cluster.tune import Recorder, SlotTrial, StopWhen

        config = self.config
        self._update_standing()
        side = Background("search")
        self._search = self._interrupt.result(side.submit(self._open_search))
        if len(self.ledger.ended) < config.trials:
            # With a searcher of one's own Tune lets one trial at a time wait for its process, and
            # slots would come to work one after the other.
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.standing.slots)
            # No CPU: the slots need them all. On the head, where the driver and mailbox are.
            # The smallest share there is: 10,000 trials may be in flight.
            resources = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.0001}])
            trainable = tune.with_parameters(SlotTrial, mailbox=self._mailbox)
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(
                    # The search says when it is over; a lost trial is one more to Tune.
                    search_alg=self._search,
                    num_samples=-1,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=f"tune-{os.getpid()}",
                    storage_path=str(config.output / RAY_FILES),
                    verbose=0,
                    callbacks=[Recorder(self._on_epoch, self._on_end)],
                    stop=StopWhen(self._must_stop),
                ),
            )
            try:
                tuner.fit()
            except DiskError as error:
                self._stop(str(error))
            except OSError as error:
                self._stop(disk_sentence(error, [config.output]))
        self._finishes(side.submit(self._search.close))

    def _must_stop(self) -> bool:
        """Whether a signal or an error ends the search; wakes everyone who waits for a trial."""
        if not self._is_over:
            return False
        import ray

        with suppress(ray.exceptions.RayError):  # without a mailbox nobody waits for it
            ray.get(self._mailbox.cancel_all.remote(), timeout=CANCEL_S)
        return True

    def _out_of_time(self) -> bool:
        """Whether the time budget is over."""
        budget = self.config.time_budget_s
        return budget is not None and time.monotonic() - self.started > budget

    def _on_start(self, trial_id: str, config: TrialConfig) -> None:
        self.console.epoch(trial_id, describe(config), None)
        self._courier.write(self._tracker.log_trial, self.ledger.records[trial_id])

    def _on_epoch(self, trial_id: str, config: TrialConfig, report: EpochReport) -> None:
        with self._kept_from_tune():
            self.console.epoch(trial_id, describe(config), report)
            self._courier.write(self._tracker.log_trial, self.ledger.epoch(trial_id, report))

    def _on_end(
        self,
        trial_id: str,
        config: TrialConfig,
        outcome: Outcome | None,
        report: EpochReport | None,
    ) -> None:
        """Record how a trial ended, first of all in the ledger."""
        if self.ledger.records[trial_id].result is not None:
            return  # Tune stumbled over a trial that had ended
        if outcome is None and report is None:
            outcome = Outcome(job_id=trial_id, error="its Ray Tune process died", lost=True)
        if outcome is not None:
            _log_trace(outcome)
        if outcome is not None and outcome.lost:
            cause = outcome.error or "for an unknown cause"
            if outcome.fatal:
                self._stop(cause)
            else:
                self._lose(trial_id, cause)
            return
        if outcome is not None and outcome.result is None:  # interrupted, or nothing can run
            self._error = self._error or (outcome.error if outcome.fatal else None)
            return
        details: dict[str, Any] = {}
        if outcome is not None and outcome.result is not None:
            result = outcome.result
            details = {"slot": outcome.slot, "overhead_s": self._overhead(outcome)}
            self._seconds["load"] += outcome.load_s
        else:
            assert report is not None
            result = TrialResult(trial_id=trial_id, status="pruned", metrics=report.metrics)
        with self._kept_from_tune():
            record = self.ledger.end(trial_id, result, **details)
            self._tell_of(record)

    def _lose(self, trial_id: str, cause: str) -> None:
        """The environment lost a trial: it stays in flight, and is tried again so many times."""
        error = cause
        if self._losses.lose(trial_id, cause):
            self._search.try_again(trial_id)
            error = f"{cause.rstrip('.')}; it is tried again"
        else:
            self._mailbox.cancel.remote(trial_id)  # a slot may still be at it, for nobody
        self.console.ended(trial_id, TrialResult(trial_id=trial_id, status="lost", error=error))
        if self._losses.hopeless is not None:
            self._stop(self._losses.hopeless)

    def _stop(self, cause: str) -> None:
        """End the study for what is no trial's fault; a resume goes on from there."""
        self._stopped = self._stopped or cause

    def _tell_of(self, record: Record) -> None:
        """Tell everyone how a trial ended; one who fails keeps it from nobody else."""
        result = record.result
        assert result is not None
        # The ledger has the result by now: whatever fails below, a resume makes good.
        trial = self.board.add(record)
        self._losses.end(record.trial_id)
        with self._kept_from_tune():
            self._search.tell(record)
        with self._kept_from_tune():
            if result.seconds:
                self.standing.trial_s.append(sum(result.seconds.values()))
            self._update_standing()
            self.console.ended(record.trial_id, result)
        self._courier.write(self._tracker.log_trial, record)
        if self._table.holds(trial):
            self._scribe.write(self._tabulate, self._table.add, trial)
        else:
            self._scribe.write(self._tabulate, self._table.write, self.board.trials())

    def _tabulate(self, write: Callable[[Any], None], what: Any) -> None:
        """Write to ``trials.csv``; a full disk stops the study and is no bad input."""
        try:
            write(what)
        except DiskError as error:
            self._stop(str(error))

    @contextmanager
    def _kept_from_tune(self) -> Iterator[None]:
        """Keep an error of the study's own from Ray Tune, which would fail the trial for it.

        Bad input or a full disk ends the study; anything else is logged by kind and place in
        ``study.log``.
        """
        try:
            yield
        except DiskError as error:
            self._stop(str(error))
        except InputError as error:
            self._error = self._error or str(error)
        except Exception as error:
            print(f"Ignored: {type(error).__name__}", file=sys.stderr)
            traceback.print_tb(error.__traceback__)

    def _overhead(self, outcome: Outcome) -> float | None:
        """Seconds of the slot that went to neither training nor evaluation."""
        first = outcome.slot not in self._slots_used
        self._slots_used.add(outcome.slot)
        if first or outcome.cycle_s is None or outcome.result is None:
            return None
        work = ("train", "evaluate")
        return outcome.cycle_s - sum(outcome.result.seconds.get(name, 0.0) for name in work)

    # After the trials

    def _record_losses(self) -> None:
        """What is still lost now stands in the tables as such; the ledger has it in flight."""
        self.board.lost = self._losses.causes
        for trial in self.board.lost_trials():
            record = self.ledger.records[trial.result.trial_id]
            lost = record.model_copy(update={"result": trial.result, "ended": now()})
            self._courier.write(self._tracker.log_trial, lost)

    def _score_front_again(self) -> None:
        import ray

        began = time.monotonic()
        front = [trial.result.trial_id for trial in self.board.front()]
        if front:
            self.console.stage(
                f"Scoring the {len(front)} trials of the front on held-out questions"
            )
        jobs = {}
        for trial_id in front:
            jobs[trial_id] = Job(
                id=f"rescore-{trial_id}",
                kind="rescore",
                adapter=self.ledger.adapter(trial_id),
                part="held_out",
                seed=held_out_seed(self.config.seed, study=True),
            )
            ray.get(self._mailbox.submit.remote(jobs[trial_id]))
        for trial_id, job in jobs.items():
            outcome = self._outcome_of(job)
            if outcome.error is not None and self._is_over:
                self._interrupt.check()
                break
            if outcome.error is not None:
                self._unscored[trial_id] = outcome.error
                self.console.say(f"trial {trial_id} could not be scored again: {outcome.error}")
                continue
            self.board.held_out[trial_id] = outcome.scores
        self._seconds["re-score"] = time.monotonic() - began

    def _write_outcome(self) -> dict[str, Any]:
        """Tables, figures, MLflow's parent run; what a signal leaves no time for is missing."""
        self.console.stage("Writing tables and figures")
        output = self.config.output
        records = self.board.trials()
        self._table.write(records)
        write_front(output / "front.csv", records)
        logged = self._scribe.seconds + self._courier.seconds
        summary = study_summary(
            self.header,
            self.plan,
            self.board,
            self._hashes,
            self._verbatim,
            phases(self.ledger.ended, {**self._seconds, "log": logged}),
            store_use(self.ledger.ended, output / "store"),
            interrupted=self._cut_short,
            error=shortfall(records, self._stopped, self._unscored),
            wall_s=time.monotonic() - self.started,
            files=TABLES,
        )
        write_study(output / "study.json", summary)
        if "search" in self.board.base:
            summary = self._show_outcome(records, summary)
        if self._cut_short and not summary["interrupted"]:
            summary = self._write_again(summary)
        return summary

    def _show_outcome(
        self, records: Sequence[TrialRecord], summary: dict[str, Any]
    ) -> dict[str, Any]:
        """Figures, and what MLflow is told; the content of ``study.json`` then."""
        tracker, side = self._tracker, Background("outcome")
        front = Front(
            f"{self.config.backbone}, {len(records)} trials",
            self.board.with_scores(records),
            self.board.base["search"],
            self.board.base.get("held_out"),
            *(() if tracker is None else (tracker.pages, tracker.server)),
        )
        if not self._finishes(side.submit(write_figures, self.config.output, front)):
            return summary
        summary = self._write_again(summary, FIGURES)
        if tracker is not None:
            files = [self.config.output / name for name in summary["files"]]
            try:
                self._finishes(side.submit(self._record_outcome, front, summary, files))
            except InputError as error:
                if self._interrupt.came:  # the last line will be of that
                    self.console.say(f"Warning: {error}")
                summary["error"] = summary["error"] or str(error)
        return summary

    def _write_again(self, summary: Mapping[str, Any], files: Sequence[str] = ()) -> dict[str, Any]:
        """Write ``study.json`` as things stand now, with further files; its content."""
        now_known = {
            **summary,
            "interrupted": self._cut_short,
            "ended": now(),
            "wall_s": time.monotonic() - self.started,
            "files": [*summary["files"], *files],
        }
        write_study(self.config.output / "study.json", now_known)
        return now_known

    def _finishes(self, work: "Future[Any]") -> bool:
        """Whether some work is done, as far as a signal leaves it the time."""
        done = self._interrupt.allows(work)
        self._cut_short |= not done
        return done

    def _record_outcome(self, front: Front, summary: dict[str, Any], files: list[Path]) -> None:
        """Tell MLflow what came of the study; a study that was interrupted waits for no server.

        Raises:
            InputError: not everything could be recorded.
        """
        for scribe in (self._scribe, self._courier):
            if scribe.fault is not None:
                self.console.say(f"Warning: not all was written while trials ran ({scribe.fault}).")
        numbers = {"hypervolume": summary["hypervolume"], "wall_s": summary["wall_s"]}
        if summary["store"].get("hit_rate_after_first_trial") is not None:
            numbers["store_hit_rate"] = summary["store"]["hit_rate_after_first_trial"]
            numbers["store_bytes"] = summary["store"]["bytes"]
        numbers |= {f"trials_{status}": n for status, n in summary["counts"].items()}
        phases = summary["phases"].items()
        if self._courier.busy:
            raise InputError(
                f"--tracking-uri {self._tracker.uri}: the server does not answer; the output "
                "folder is complete, and --resume tells the server the rest."
            )
        self._tracker.finish_study(
            front,
            numbers,
            {name: row["total_s"] for name, row in phases if "total_s" in row},
            files,
            "KILLED" if summary["interrupted"] or self._stopped is not None else "FINISHED",
            self._verbatim,
            self.plan.left_out,
            self.console.say,
        )

    def _update_standing(self) -> None:
        self.standing.counts = self.board.counts()
        self.standing.front = self.board.front_size
        self.standing.hypervolume = self.board.hypervolume

    @property
    def _is_over(self) -> bool:
        """Whether a signal, an error or the environment ends the study before its time."""
        ended = self._failure is not None or self._stopped is not None
        return ended or self._left or self._interrupt.came

    @property
    def _failure(self) -> str | None:
        """What no trial of the study can get past, in one sentence."""
        return self._error or self._scribe.error


def _log_trace(outcome: Outcome) -> None:
    """Write where an error came from to ``study.log``."""
    if outcome.trace is not None:
        print(f"{outcome.job_id} (most recent call last):\n{outcome.trace}", file=sys.stderr)
