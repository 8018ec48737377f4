"""A study on MLflow's own pages: its result as a Markdown note, and a view of its trials.

MLflow keeps a note in 8,000 characters and shows Markdown with tables and images, of which only
those under a relative or an ``http`` address (its sanitiser drops ``data:`` images). A view of the
runs page is a tag of the experiment, listed under "Views" and opened by the tag's name: the
trials, the columns that matter first, two charts. The layout of the tag's value,
``mlflow_view.json.jinja``, is that of MLflow 3.17, where its interface writes the same when
somebody saves a view by hand; ``tests/browser`` opens one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from vgid.report.front import Front
from vgid.report.health import warnings
from vgid.report.page import rendered
from vgid.report.records import HYPERPARAMETERS, describe
from vgid.report.result import result
from vgid.report.tables import Grid
from vgid.requirement import OBJECTIVES
from vgid.results import LeftOut, Verbatim, describe_left_out

UI = "workflowType=machine_learning"
"""Opens the UI on its pages for training runs; it would start in those for chat applications."""

_METRICS = (*OBJECTIVES, "forget_cloze", "test_rougeL", "forget_memorisation")
_HELD_OUT = tuple(f"heldout_{name}" for name in (*OBJECTIVES, "celebrity_rougeL"))
COLUMNS = [
    "tags.`vgid.on_front`",
    *(f"metrics.`{name}`" for name in (*_METRICS, *_HELD_OUT)),
    *(f"params.`{name}`" for name in HYPERPARAMETERS),
]
"""Columns of the view, first the most telling; MLflow would show none and order by alphabet."""

NOTE_PICTURE = "front-small.png"
"""Shown at its own size, so one that fits beside the run's details."""

MAX_COMPARED = 8
"""Runs side by side on one page, those of the front that forget most."""

MAX_ROWS = 16
"""Rows of the table, so that the note stays within MLflow's limit."""


@dataclass(frozen=True)
class Place:
    """Where a study is on a tracking server; its links are relative to the server's address."""

    experiment_id: str
    study_id: str
    run_id: str  # of the study's own run
    runs: Mapping[str, str] = field(default_factory=dict)  # ids of the trials' runs by trial id

    @property
    def table(self) -> str:
        """Page of the trials as a table: the study's view."""
        key = f"viewStateShareKey={self._view}"
        return f"#/experiments/{self.experiment_id}/runs?{UI}&{key}"

    @property
    def charts(self) -> str:
        """Page of the same trials as charts: the front, and parallel coordinates."""
        return f"{self.table}&compareRunsMode=CHART"

    def side_by_side(self, front: Front) -> str | None:
        """Page that sets the front's runs side by side, if there are any."""
        found = [
            self.runs[r.result.trial_id] for r in front.front if r.result.trial_id in self.runs
        ]
        ids = found[-MAX_COMPARED:], [self.experiment_id]
        runs, experiments = (quote(json.dumps(each)) for each in ids)
        return f"#/compare-runs?runs={runs}&experiments={experiments}&{UI}" if found else None

    @property
    def page(self) -> str:
        """The study's own page, in MLflow's viewer of artifacts."""
        run = run_page(self.experiment_id, self.run_id)
        return run.replace("?", "/artifacts/study.html?")

    def trial(self, trial_id: str) -> str:
        """A trial's id, linked to its run where that is known."""
        run = self.runs.get(trial_id)
        return trial_id if run is None else f"[{trial_id}]({run_page(self.experiment_id, run)})"

    def artifact(self, name: str) -> str:
        """An artifact of the study's own run."""
        return f"get-artifact?path={name}&run_uuid={self.run_id}"

    def view_tag(self, created_ms: int) -> tuple[str, str]:
        """Key and value of the experiment's tag that is the study's view, made at that time."""
        given = {"study_id": self.study_id, "columns": COLUMNS, "objectives": OBJECTIVES}
        state = json.loads(rendered("vgid.report", "mlflow_view.json.jinja", **given))
        view = {
            "name": f"Study {self.study_id}",
            "createdAt": created_ms,
            "updatedAt": created_ms,
            "state": json.dumps(state, ensure_ascii=False),
        }
        return f"mlflow.sharedViewState.{self._view}", json.dumps(view, ensure_ascii=False)

    @property
    def _view(self) -> str:
        return hashlib.sha256(self.study_id.encode()).hexdigest()[:32]


def run_page(experiment_id: str, run_id: str) -> str:
    """Page of one run, relative to the server's address."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{UI}"


def study_note(
    front: Front,
    phases: Mapping[str, float],
    place: Place,
    verbatim: Verbatim | None = None,
    left_out: LeftOut | None = None,
) -> str:
    """The note in Markdown: the result in three sentences, the picture, the front as a table.

    ``phases`` are seconds by phase in the order to show them, ``verbatim`` says which scored
    questions training sees, ``left_out`` what of the data was left out as defective.
    """
    return rendered(
        "vgid.report",
        "note.md.jinja",
        warnings=warnings(front),
        result=result(front, place.trial),
        place=place,
        compared=place.side_by_side(front),
        picture=NOTE_PICTURE,
        questions="held-out questions" if front.held_out() else "the search questions",
        # MLflow's tables have no space between columns.
        table=_table(front, place).markdown(gap="&emsp;") if front.front else None,
        more=len(front.front) - MAX_ROWS,
        phases=phases,
        left_out=describe_left_out(left_out or {}),
        verbatim=verbatim or {},
    )


def _table(front: Front, place: Place) -> Grid:
    titles = dict(zip(OBJECTIVES, ("reduction", "retain"), strict=True))
    rows: list[Mapping[str, Any]] = [record.result.metrics for record in front.front]
    if front.held_out():
        titles |= {"celebrity_rougeL": "celebrities", "test_rougeL": "test"}
        titles["forget_cloze"] = "cloze"
        rows = [record.held_out or {} for record in front.front]
    shown = [name for name in titles if any(name in row for row in rows)]
    lines = [
        [place.trial(record.result.trial_id), describe(record.config), *map(row.get, shown)]
        for record, row in zip(front.front[-MAX_ROWS:], rows[-MAX_ROWS:], strict=True)
    ]
    return Grid(("trial", "setting", *(titles[name] for name in shown)), lines)
