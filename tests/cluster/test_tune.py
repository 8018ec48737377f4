"""What Ray Tune hears and keeps of a trial, without a cluster."""

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from vgid.cluster.mailbox import Job, Outcome
from vgid.cluster.tune import JOB, Recorder, Verdicts, told
from vgid.config import TrialConfig
from vgid.requirement import OBJECTIVES
from vgid.results import EpochReport, TrialResult


def tune_trial():
    job = Job(id="0007", kind="trial", trial=TrialConfig(alpha=2.0))
    return Trial("light", config={JOB: job.model_dump_json()}, stub=True)


def test_the_outcome_arrives_whole_and_tune_keeps_next_to_nothing_of_it():
    names = (*OBJECTIVES, *(f"score_{number}" for number in range(160)))
    result = TrialResult(trial_id="0007", status="completed", metrics=dict.fromkeys(names, 0.5))
    outcome = Outcome(job_id="0007", result=result, slot=1)
    heard = []
    trial = tune_trial()
    trial.update_last_result({**told(outcome), "training_iteration": 3})
    recorder = Recorder(lambda *arguments: heard.append(arguments))
    recorder.on_trial_complete(0, [trial], trial)
    assert heard == [("0007", outcome, None)]
    assert not trial.metric_analysis
    assert not trial.metric_n_steps
    assert len(str(trial.last_result)) < 1000
    assert {name: trial.last_result[name] for name in OBJECTIVES} == dict.fromkeys(OBJECTIVES, 0.5)


def test_a_trial_that_the_scheduler_stopped_has_its_last_report():
    report = EpochReport(epoch=2, epochs=3, step=8, metrics={"loss": 0.1})
    heard, epochs = [], []
    trial = tune_trial()
    verdicts = Verdicts(lambda name, told: bool(epochs.append((name, told))) or told.epoch < 2)
    recorder = Recorder(lambda *arguments: heard.append(arguments))
    first = report.model_copy(update={"epoch": 1})
    assert verdicts.on_trial_result(None, trial, told(first)) == TrialScheduler.CONTINUE
    assert verdicts.on_trial_result(None, trial, told(report)) == TrialScheduler.STOP
    trial.update_last_result({**told(report), "training_iteration": 2})
    recorder.on_trial_complete(0, [trial], trial)
    assert epochs == [("0007", first), ("0007", report)]
    assert heard == [("0007", None, report)]
