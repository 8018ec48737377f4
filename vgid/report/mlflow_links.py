"""A study's view of MLflow's runs page: its trials, the columns that matter first, two charts.

MLflow's own interface keeps such a view as a tag of the experiment and lists it under "Views";
its page opens it by the tag's name. The layout of the tag's value, ``mlflow_view.json.jinja``, is
that of MLflow 3.17, where its interface writes the same when somebody saves a view by hand;
``tests/browser`` opens one.
"""

import hashlib
import json
from urllib.parse import quote

from vgid.report.page import rendered
from vgid.report.records import HYPERPARAMETERS
from vgid.results import OBJECTIVES

UI = "workflowType=machine_learning"
"""Opens the UI on its pages for training runs; it would start in those for chat applications."""

_METRICS = (*OBJECTIVES, "forget_cloze", "test_rougeL", "forget_memorisation")
_HELD_OUT = tuple(f"heldout_{name}" for name in OBJECTIVES)
COLUMNS = [
    "tags.`vgid.on_front`",
    *(f"metrics.`{name}`" for name in (*_METRICS, *_HELD_OUT)),
    *(f"params.`{name}`" for name in HYPERPARAMETERS),
]
"""Columns of the table, first the most telling; MLflow would show none and order by alphabet."""


def view_tag(study_id: str, name: str, created_ms: int) -> tuple[str, str]:
    """Key and value of the experiment's tag that is the view of a study's trials.

    ``name`` stands in the list of views; ``created_ms`` counts from the epoch.
    """
    given = {"study_id": study_id, "columns": COLUMNS, "objectives": OBJECTIVES}
    state = json.loads(rendered("vgid.report", "mlflow_view.json.jinja", **given))
    view = {
        "name": name,
        "createdAt": created_ms,
        "updatedAt": created_ms,
        "state": json.dumps(state, ensure_ascii=False),
    }
    return f"mlflow.sharedViewState.{_key(study_id)}", json.dumps(view, ensure_ascii=False)


def table_page(experiment_id: str, study_id: str) -> str:
    """Page of the study's trials as a table, relative to the server's address."""
    return f"#/experiments/{experiment_id}/runs?{UI}&viewStateShareKey={_key(study_id)}"


def chart_page(experiment_id: str, study_id: str) -> str:
    """Page of the same trials as charts: the front, and parallel coordinates."""
    return f"{table_page(experiment_id, study_id)}&compareRunsMode=CHART"


def run_page(experiment_id: str, run_id: str) -> str:
    """Page of one run."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{UI}"


def compare_page(experiment_id: str, run_ids: list[str]) -> str:
    """Page that sets runs side by side."""
    runs, experiments = (quote(json.dumps(ids)) for ids in (run_ids, [experiment_id]))
    return f"#/compare-runs?runs={runs}&experiments={experiments}&{UI}"


def _key(study_id: str) -> str:
    return hashlib.sha256(study_id.encode()).hexdigest()[:32]
