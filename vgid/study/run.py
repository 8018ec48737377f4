"""The main job: a Pareto study from a checked plan to a front that one can look at.

``run_study`` is the story, and its steps are all that a ``Study`` offers. They stand on parts that
know their own data only: what ends a study early and who waits (``ending``), what hears trials and
tells of them (``trials``), what the results amount to (``outcome``).
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.cluster.losses import Losses, disk_sentence, outcome_of
from vgid.cluster.mailbox import Job, Traffic
from vgid.cluster.watchdog import Watchdog
from vgid.config import StudyConfig, TrialConfig
from vgid.errors import DiskError, InputError
from vgid.evaluation.suppression import doubt
from vgid.files import unwritable
from vgid.interrupts import Background, StudyInterruptedError, made
from vgid.report.forecast import Forecast, forecast
from vgid.report.front import Front
from vgid.report.records import TrialRecord, TrialsTable, write_front, write_study
from vgid.report.study_page import FIGURES, write_figures
from vgid.results import QuestionPart, origin, shots_left_out
from vgid.seeds import held_out_seed
from vgid.study.console import Standing, StudyConsole, last_words, libraries_silenced, print_summary
from vgid.study.ending import INTERRUPTED, Ending
from vgid.study.ledger import Ledger, changes, now
from vgid.study.outcome import CANDIDATES, Material, Scoreboard, said_of_a_stop, study_summary
from vgid.study.plan import Plan, make_plan
from vgid.study.trials import Bulletin, Listener

if TYPE_CHECKING:
    from vgid.cluster.slots import SessionFactory, Slots
    from vgid.study.tracking import Tracker

RAY_FILES = ".ray"  # what Ray Train and Tune want to keep in the output folder while they run
BASE = "base"  # stands beside trial ids where the base is scored with them


def run_study(
    config: StudyConfig,
    resume: bool = False,
    session: "SessionFactory | None" = None,
    retry_failed: bool = False,
    ancestral: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a study, or ``resume`` the one that the output folder holds; its ``study.json``.

    There ``interrupted`` tells whether a signal ended it, ``error`` why it has not all that it
    should have. The failed trials of a resumed study may be run again, under their ids. ``session``
    makes the workers' sessions, by default ``vgid.cluster.slots.trial_session``; ``ancestral`` is
    ``make_plan``'s.

    Raises:
        InputError: bad input; nothing was started if it is in what can be checked before.
    """
    from vgid.cluster.connection import connected

    ending = Ending(config.time_budget_s)
    plan = make_plan(config, ancestral, resume)
    with begin(plan, ending, resume, retry_failed) as study, connected() as joined:
        with study.slots(joined, session) as slots:
            base = study.score_base(slots)
            study.search(slots, base)
            study.score_front(slots)
        return study.write()


def probe(
    config: StudyConfig,
    session: "SessionFactory | None" = None,
    ancestral: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Forecast]:
    """Run a study's first trial, which stands in its folder to be gone on with by ``resume``.

    Arguments and errors as of ``run_study``. Returned are its ``study.json``, and what all of the
    trials will take.
    """
    from vgid.cluster.connection import connected, slot_count

    plan = make_plan(config, ancestral)
    with connected() as joined:
        slots, _ = slot_count(plan.shape, config.max_concurrent, config.trials, joined)
        one = config.model_copy(update={"trials": 1})
        summary = run_study(one, session=session, ancestral=ancestral)
    return summary, forecast(summary, config.output, config.trials, slots)


@contextmanager
def begin(
    plan: Plan, ending: Ending, resume: bool = False, retry_failed: bool = False
) -> Iterator["Study"]:
    """Record the study, show it, and have its data and MLflow's parent run made in a thread.

    However the block ends, the folder is let go of and nothing is left running on MLflow; when it
    ends well, the study's summary is printed. ``InputError`` if the folder is not for this study.
    """
    output = plan.config.output
    sudden = f"{output}: the study's process was killed, or Ray's on its node; go on with --resume."
    with Ledger(output) as ledger, last_words(sudden):
        header = ledger.open(plan.config, plan.space.sha256, resume, plan.prior)
        if retry_failed:
            ledger.retry_failed()
        with libraries_silenced(output / "study.log") as terminal:
            standing = Standing(plan.config.trials, budget_s=plan.config.time_budget_s)
            with StudyConsole(terminal, standing) as console:
                for change in changes(header.config, plan.config):
                    console.say(f"Goes on with {change}")
                console.stage("Starting Ray and preparing the data")
                study = Study(plan, ledger, console, ending)
                try:
                    with ending.interrupt, study._prepared_aside():
                        yield study
                finally:
                    tracker = made(study._tracker)
                    if tracker is not None and not study._bulletin.mlflow.busy:
                        tracker.close("KILLED" if ending.interrupt.came else "FAILED")
            shutil.rmtree(output / RAY_FILES, ignore_errors=True)
            ui_command = "" if tracker is None else tracker.ui_command
            print_summary(terminal, study.summary, study.board.front(), ui_command)


@dataclass
class Study:
    """The steps of one run of a study, in the order in which they stand here."""

    plan: Plan
    ledger: Ledger
    console: StudyConsole
    ending: Ending
    summary: dict[str, Any] = field(default_factory=dict, init=False)  # ``study.json``, at last

    def __post_init__(self) -> None:
        self.board = Scoreboard(self.ledger)
        self._material: Future[Material] = Future()
        self._tracker: Future[Tracker] = Future()
        table = TrialsTable(self.plan.config.output / "trials.csv")
        self._bulletin = Bulletin(self.console, self.board, table, self.ending)
        self._seconds = {"start-up": 0.0, "load": 0.0, "re-score": 0.0}

    @contextmanager
    def slots(self, joined: bool, session: "SessionFactory | None" = None) -> Iterator["Slots"]:
        """Start the slots, in which the base model is loaded; a signal ends the block in order."""
        from vgid.cluster.connection import capacity, lacking, never_placed, slot_count
        from vgid.cluster.slots import Slots, start_mailbox

        config, shape, ending = self.plan.config, self.plan.shape, self.ending
        to_run = config.trials - len(self.ledger.ended)
        decided = partial(slot_count, shape, config.max_concurrent, to_run, joined)
        count, decider = decided()
        if not count:
            raise InputError(lacking(shape, config.max_concurrent))
        self.console.standing.slots = count
        mailbox = start_mailbox()
        self.console.stage(f"Starting {count} slot(s), by {decider}, and loading the base model")
        request, storage, fresh = self.plan.request, config.output / RAY_FILES, config.fresh_workers
        slots = Slots(mailbox, request, shape, count, storage, fresh, session)

        def follow(traffic: Traffic) -> None:
            nowhere = traffic.down and not (traffic.moves or traffic.idle)
            if nowhere and never_placed(shape, len(traffic.down)):
                ending.fail(lacking(shape, config.max_concurrent))
            slots.follow(traffic, max(1, decided()[0]))
            self.console.standing.slots = slots.count

        said, room = self.console.say, partial(capacity, shape)
        watchdog = Watchdog(mailbox, said, room, ending.out_of_time, follow)
        try:
            yield slots
        except StudyInterruptedError:
            ending.cut_short = True
        except BaseException:
            ending.left = True  # ends the waits for scorings
            raise
        finally:
            watchdog.close()
            self._bulletin.close()
            slots.close(timeout_s=0.0 if ending.interrupt.came else 10.0)

    def score_base(self, slots: "Slots") -> "Future[None]":
        """Have the base model scored; done when it is, or cannot be, which ends the study.

        ``InputError`` if data or weights are not those that the study was started with.
        """
        import ray

        # Only now: data and weights were read while the slots started, which takes longer.
        self.ending.interrupt.result(self._material)
        seed = self.plan.config.seed
        job = Job(id="base-search", kind="base", part="search", seed=seed)
        ray.get(slots.mailbox.submit.remote(job))
        return Background("base").submit(self._take_base, slots.mailbox, job)

    def search(self, slots: "Slots", base: "Future[None]") -> None:
        """Run the trials that Optuna proposes and those left in flight, then wait for the base.

        ``InputError`` for what no trial can get past.
        """
        from vgid.cluster.tune import Recorder, Verdicts, run_trials
        from vgid.study.search import ParetoSearch

        config, ending = self.plan.config, self.ending
        tracker = ending.interrupt.result(self._tracker)
        bulletin = self._bulletin
        bulletin.catch_up(self.ledger.records.values(), tracker)
        losses, side, mailbox = Losses(), Background("search"), slots.mailbox
        at_a_time = partial(getattr, slots, "count")
        make = partial(ParetoSearch, self.ledger, self.plan.space, config, at_a_time, losses)
        search = ending.interrupt.result(side.submit(make, self._enough, bulletin.running))
        told = (losses, bulletin, ending, mailbox, self._seconds, config.halving)
        listener = Listener(self.ledger, search, *told)
        if len(self.ledger.ended) < config.trials:
            verdicts, recorder = Verdicts(listener.on_epoch), Recorder(listener.on_end)
            storage = config.output / RAY_FILES
            try:
                with ending.heeded():
                    run_trials(search, mailbox, verdicts, recorder, ending.is_over, storage)
            except OSError as error:
                ending.stop(disk_sentence(error, [config.output]))
        ending.finishes(side.submit(search.close))
        ending.interrupt.check()
        ending.interrupt.result(base)
        bulletin.still_lost(losses.causes, self.ledger.records)
        if ending.failure is not None:
            raise InputError(ending.failure)

    def score_front(self, slots: "Slots") -> None:
        """Score base and front again, each if it can: held-out questions, another seed."""
        import ray

        if self.ending.stopped is not None:
            return
        began = self.ending.elapsed_s
        front = [trial.result.trial_id for trial in self.board.front()]
        if front:
            self.console.stage(
                f"Scoring the {len(front)} trials of the front on held-out questions"
            )
        seed = held_out_seed(self.plan.config.seed, study=True)
        part: QuestionPart = "held_out"
        # The base here and not before the trials, which would wait for it.
        job_of = partial(Job, part=part, seed=seed)
        jobs = {BASE: job_of(id=f"base-{part}", kind="base")}
        for name in front:
            try:
                adapter = self._adapter(name)
            except OSError as error:
                self.ending.stop(str(unwritable(self.ledger.adapter(name), error)))
                return
            jobs[name] = job_of(id=f"rescore-{name}", kind="rescore", adapter=adapter)
        ray.get([slots.mailbox.submit.remote(job) for job in jobs.values()])
        for name, job in jobs.items():
            outcome = outcome_of(slots.mailbox, job, self.ending.is_over, self.ending.out_of_time)
            if outcome.error is not None and self.ending.is_over():
                self.ending.interrupt.check()
                break
            if outcome.error is not None:
                self.board.unscored[name] = outcome.error
                self.console.say(f"{name} could not be scored again: {outcome.error}")
            elif name == BASE:
                self.board.base[part] = outcome.scores
            else:
                self.board.held_out[name] = outcome.scores
        self._seconds["re-score"] = self.ending.elapsed_s - began

    def write(self) -> dict[str, Any]:
        """Write tables and ``study.json``, which it returns, then figures, then MLflow's run.

        What a signal leaves no time for is missing, and said there. ``DiskError`` for a full disk.
        """
        self.console.stage("Writing tables and figures")
        ending = self.ending
        try:
            records = self._write_tables()
            if "search" in self.board.base:
                self._show(records)
            if ending.cut_short and not self.summary["interrupted"]:
                self._write_again()
        except DiskError as error:
            raise DiskError(said_of_a_stop(ending.stopped or str(error))) from None
        return self.summary

    # What the steps are made of

    def _adapter(self, name: str) -> Path:
        """A candidate's adapter; that of a harvested one is made of its trial's."""
        from vgid.models.adapter_files import rescaled

        adapter, (trial, scale) = self.ledger.adapter(name), origin(name)
        if trial != name:
            # One whose trial lost its files is missing too, which the worker tells of it alone.
            with suppress(FileNotFoundError, ValueError, KeyError):
                rescaled(self.ledger.adapter(trial), adapter, scale)
        return adapter

    @contextmanager
    def _prepared_aside(self) -> Iterator[None]:
        """Data and tracker in a thread, one after the other; it ends with the block."""
        side = Background("prepare")
        self._material = side.submit(self._prepare)
        self._tracker = side.submit(self._open_tracker)
        try:
            yield
        finally:
            self._tracker.cancel()
            self.ending.interrupt.allows(side.submit(lambda: None))

    def _prepare(self) -> Material:
        """Write data that are the study's own; hold what it is made of against what it was."""
        from vgid.data.address import keep
        from vgid.data.benchmark import Benchmark
        from vgid.data.splits import choose_people, count_verbatim
        from vgid.models import backbones

        config, request = self.plan.config, self.plan.request
        if self.plan.benchmark is None and not request.data.exists():
            from vgid.data.synthetic import write_benchmark

            write_benchmark(request.data)
        elif self.plan.benchmark is not None and not request.data.exists():
            keep(self.plan.benchmark.root, request.data)
        base = backbones.locate(backbones.spec(config.backbone), config.model_path)
        benchmark = self.plan.benchmark or Benchmark.open(request.data)
        hashes = {"dataset": benchmark.sha256, "base": backbones.revision_of(base)}
        self._settle(data_sha256=hashes["dataset"], base_revision=hashes["base"])
        default = TrialConfig.model_fields["train_tasks"].default
        tasks = self.plan.space.fixed.get("train_tasks", default)
        people = choose_people(benchmark, request)
        return Material(hashes, count_verbatim(benchmark, people, request, config.method, tasks))

    def _settle(self, **found: str) -> None:
        unknown = self.ledger.settle(**found)
        if unknown:
            self.console.say(
                f"The study was started before its {', '.join(unknown)} were recorded; what they "
                "are now is taken for what they were."
            )

    def _open_tracker(self) -> "Tracker":
        from vgid.study.mlflow_client import connect
        from vgid.study.tracking import Tracker

        config, hashes = self.plan.config, self._material.result().hashes
        prior = None if self.plan.prior is None else self.plan.prior.study_id
        connection = connect(config.tracking_uri, config.output, config.backbone)
        return Tracker(connection, self.ledger.header.study_id, config, hashes, prior)

    def _enough(self) -> bool:
        """Whether no new trial is to start: time is over, or the front grows no more."""
        return self.ending.out_of_time() or self.board.is_flat(self.plan.config.stop_when_flat)

    def _take_base(self, mailbox: Any, job: Job) -> None:
        ending, config = self.ending, self.plan.config
        outcome = outcome_of(mailbox, job, ending.is_over, ending.out_of_time)
        if outcome.error is not None:
            outcome.log_trace()
            gpus = config.gpus_per_worker > 0
            said = base_unscored(outcome.error, config.output / "study.log", gpus)
            if outcome.lost:
                ending.stop(outcome.error if outcome.fatal else said)
            elif not ending.is_over():
                ending.fail(outcome.error if outcome.fatal else said_of_a_stop(said))
            return
        with ending.heeded():
            self._settle(**outcome.content)
        if ending.failure is not None:
            return
        self.board.base[job.part] = outcome.scores
        self._seconds["load"] += outcome.load_s
        for line in (doubt(outcome.scores), shots_left_out(outcome.scores)):
            if line is not None:
                self.console.say(f"Warning: {line}")
        self._seconds["start-up"] = ending.elapsed_s
        self.console.stage("Running trials")
        self.board.show_on(self.console.standing)

    def _write_tables(self) -> list[TrialRecord]:
        """The tables, and ``study.json`` before anything is analysed; the candidates."""
        output = self.plan.config.output
        trials = self.board.trials()
        records = self.board.candidates(trials)
        TrialsTable(output / "trials.csv").write(trials)
        if self.plan.config.harvest:
            TrialsTable(output / CANDIDATES).write(records)
        write_front(output / "front.csv", records)
        material = made(self._material) or Material()
        seconds = {**self._seconds, "log": self._bulletin.seconds}
        self.summary = study_summary(
            self.plan, self.ledger, self.board, material, self.ending, seconds
        )
        write_study(output / "study.json", self.summary)
        return records

    def _show(self, records: Sequence[TrialRecord]) -> None:
        tracker, side, output = made(self._tracker), Background("outcome"), self.plan.config.output
        pages, server = ({}, "") if tracker is None else (tracker.pages, tracker.server)
        cut_short = INTERRUPTED if self.summary["interrupted"] else None
        front = Front(
            f"{self.plan.config.backbone}, {sum(self.board.counts().values())} trials",
            self.board.with_scores(records),
            self.board.base["search"],
            self.board.base.get("held_out"),
            pages,
            server,
            growth=self.board.history,
            outlook=self.summary["outlook"],
            warnings=[each for each in (self.summary["error"], cut_short) if each],
            space=self.summary["search_space"]["parameters"],
        )
        if not self.ending.finishes(side.submit(write_figures, output, front)):
            return
        self._write_again(FIGURES)
        if tracker is None:
            return
        for fault in self._bulletin.faults:
            self.console.say(f"Warning: not all was written while trials ran ({fault}).")
        stopped = self.summary["interrupted"] or self.ending.stopped is not None
        status = "KILLED" if stopped else "FINISHED"
        try:
            if self._bulletin.mlflow.busy:
                raise InputError(
                    f"--tracking-uri {tracker.uri}: the server does not answer; the output folder "
                    "is complete, and --resume tells the server the rest."
                )
            told = (front, self.summary, status, self.console.say)
            self.ending.finishes(side.submit(tracker.finish_study, *told))
        except InputError as error:
            if self.ending.interrupt.came:  # the last line will be of that
                self.console.say(f"Warning: {error}")
            self.summary["error"] = self.summary["error"] or str(error)

    def _write_again(self, files: Sequence[str] = ()) -> None:
        self.summary |= {
            "interrupted": self.ending.cut_short,
            "ended": now(),
            "wall_s": self.ending.elapsed_s,
            "files": [*self.summary["files"], *files],
        }
        write_study(self.plan.config.output / "study.json", self.summary)


def base_unscored(error: str, log: Path, gpus: bool) -> str:
    """What to tell the user whose base model cannot be scored."""
    remedy = f"{log} has its traceback"
    if "Memory" in error or "worker" in error:  # the kernel kills whoever takes too much
        fewer = "--max-concurrent"
        if gpus:
            fewer += ", give each worker a whole GPU with --gpus-per-worker"
        remedy = f"if memory was short, lower --eval-batch-size or {fewer}"
    return f"the base model could not be scored ({error.rstrip('.')}); {remedy}"
