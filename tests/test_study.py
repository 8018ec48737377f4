"""What a study makes of its trials' ends, without a cluster: the driver's own part."""

import pytest

from vgid.config import StudyConfig, TrialConfig
from vgid.console import Standing, StudyConsole
from vgid.ledger import Ledger
from vgid.mailbox import Outcome
from vgid.plan import make_plan
from vgid.results import TrialResult
from vgid.study import Study


class Told:
    """Stands for what a study tells of a trial: the search and the tracker; may fail."""

    def __init__(self, error=None):
        self.error = error
        self.trials = []

    def tell(self, record):
        if self.error is not None:
            raise self.error
        self.trials.append(record.trial_id)

    def log_trial(self, record):
        self.trials.append(record.trial_id)


@pytest.fixture
def study(tmp_path):
    """A study with one trial in flight, before its search and its tracker are there."""
    plan = make_plan(StudyConfig(output=tmp_path / "study"))
    with Ledger(plan.config.output) as ledger:
        header = ledger.open(plan.config, plan.space_sha256, resume=False)
        standing = Standing(1)
        with (tmp_path / "console").open("w") as stream:
            console = StudyConsole(stream, standing)
            made = Study(plan, ledger, header, console, standing, started=0.0)
            made._search, made._tracker = Told(), Told()
            ledger.start("0000", TrialConfig())
            yield made
            made._scribe.close()


def completed(name="0000"):
    metrics = {"forget_rougeL_reduction": 0.9, "retain_rougeL": 0.8}
    result = TrialResult(trial_id=name, status="completed", metrics=metrics)
    return Outcome(job_id=name, result=result, slot=0)


def test_a_callback_that_fails_touches_no_trial_and_keeps_nobody_else_from_it(study, capsys):
    study._search.error = OSError("Fay Moss")
    study._on_end("0000", TrialConfig(), completed(), None)
    study._on_end("0000", TrialConfig(), None, None)  # what Tune makes of an error of its own
    study._scribe.close()
    assert study.ledger.records["0000"].result == completed().result
    assert study._tracker.trials == ["0000"]
    assert (study.config.output / "trials.csv").exists()
    logged = capsys.readouterr().err
    assert "OSError" in logged and "in tell" in logged and "Fay Moss" not in logged
    assert study._failure is None


def test_a_trial_whose_end_cannot_be_written_stays_in_flight_and_ends_the_study(study):
    place = study.ledger.folder / "0000.json"
    place.unlink()
    (place / "in-the-way").mkdir(parents=True)  # a folder cannot be replaced by a file
    study._on_end("0000", TrialConfig(), completed(), None)
    assert [record.trial_id for record in study.ledger.in_flight] == ["0000"]
    assert "cannot be written" in study._failure
    assert study._search.trials == []


def test_only_the_first_end_of_a_trial_counts(study):
    study._on_end("0000", TrialConfig(), completed(), None)
    before = (study.ledger.folder / "0000.json").read_bytes()
    with pytest.raises(ValueError, match="0000 has ended"):
        study.ledger.end("0000", TrialResult(trial_id="0000", status="failed"))
    assert (study.ledger.folder / "0000.json").read_bytes() == before
    assert study.ledger.records["0000"].result == completed().result
