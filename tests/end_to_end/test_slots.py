"""Slots on a real Ray cluster: two nodes of one CPU each on this machine, real trials."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from scipy import stats

from tests.end_to_end import light, sessions
from tests.end_to_end.conftest import free_port
from tests.end_to_end.privacy import leaks
from tests.end_to_end.sessions import SOMEONE
from vgid.cluster.connection import QUIET, lacking, slot_count
from vgid.cluster.mailbox import Job, Outcome
from vgid.cluster.resources import SlotShape
from vgid.cluster.slots import Slots, start_mailbox
from vgid.config import RequestConfig, StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.study.run import probe, run_study

RETAIN_PEOPLE = 4
TIMEOUT_S = 300
FEW = {"epochs": 3, "learning_rate": 2e-3}
MANY = 12


@pytest.fixture(scope="module", autouse=True)
def two_nodes():
    """A head and a second node; what runs here goes through Ray's network code between them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        patch.setenv("RAY_ADDRESS", cluster.address)
        for module in (light, sessions):
            cloudpickle.register_pickle_by_value(module)
        yield cluster
        for module in (light, sessions):
            cloudpickle.unregister_pickle_by_value(module)
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def request_config(data, tmp_path):
    return RequestConfig(
        data=data, store=tmp_path / "store", retain_people=RETAIN_PEOPLE, bootstrap_samples=100
    )


def logs_of(cluster):
    """Where the cluster keeps all that its processes print; the driver's own is not there."""
    return Path(cluster.head_node.get_session_dir_path()) / "logs"


def outcomes(mailbox, jobs):
    """Run jobs through the mailbox in order; how often each reported, and its outcome."""
    found = {}
    for job in jobs:
        ray.get(mailbox.submit.remote(job))
        epochs = []
        while hasattr(message := ray.get(mailbox.next_message.remote(job.id)), "epoch"):
            epochs.append(message.epoch)
        found[job.id] = (epochs, message)
    return found


def scores(outcome):
    """A trial's metrics without those that ``sessions.Watched`` adds."""
    metrics = outcome.result.metrics
    return {name: value for name, value in metrics.items() if name not in ("pid", "rss")}


def in_a_fresh_process(request, config, adapter):
    """The trial as a plain function in a process of its own."""
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from vgid.config import RequestConfig, TrialConfig; from vgid.trial import run_trial\n"
        "request = RequestConfig.model_validate_json(sys.argv[1])\n"
        "trial = TrialConfig.model_validate_json(sys.argv[2])\n"
        "print(run_trial(trial, request, Path(sys.argv[3])).model_dump_json())"
    )
    arguments = [request.model_dump_json(), config.model_dump_json(), str(adapter)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    from vgid.results import TrialResult

    return TrialResult.model_validate_json(done.stdout.splitlines()[-1])


def weights(adapter):
    return (Path(adapter) / "adapter_model.safetensors").read_bytes()


def test_slots_are_counted_by_each_nodes_memory():
    """What Ray calls memory, in bytes, and hands out with cores."""
    assert slot_count(SlotShape(), None, 9, joined=True) == (2, "cores")
    free = min(node["Resources"]["memory"] for node in ray.nodes())
    assert 1e9 < free < psutil.virtual_memory().total
    large = SlotShape(worker_bytes=psutil.virtual_memory().total)
    assert slot_count(large, None, 9, joined=True) == (0, "memory")
    assert "too little memory" in lacking(large, None)


def test_a_slot_outlives_kills_repeats_itself_and_keeps_its_memory_flat(request_config, tmp_path):
    mailbox = start_mailbox()
    slots = Slots(
        mailbox, request_config, SlotShape(), 1, tmp_path / "ray", session=sessions.Mortal
    )
    first, other = TrialConfig(**FEW), TrialConfig(alpha=0.5, noise_type="white", **FEW)
    jobs = [
        sessions.trial_job(tmp_path, name, config)
        for name, config in (
            ("first", first),
            ("killed", other),
            ("whole", other),
            ("again", first),
        )
    ]
    many = [
        sessions.trial_job(
            tmp_path,
            f"{number:04d}",
            TrialConfig(alpha=1 + number / 10, epochs=1, lora_rank=2 + 2 * (number % 4)),
        )
        for number in range(MANY)
    ]
    found = outcomes(mailbox, jobs + many)
    slots.close()

    assert all(outcome.result.status == "completed" for _, outcome in found.values())
    # A killed worker goes on from its checkpoint: each epoch is reported once, the numbers are
    # those of a run that nobody disturbed, and it is another process in the same slot.
    assert found["killed"][0] == found["whole"][0] == [1, 2, 3]
    assert scores(found["killed"][1]) == scores(found["whole"][1])
    pids = {name: outcome.result.metrics["pid"] for name, (_, outcome) in found.items()}
    last = pids[f"{MANY - 1:04d}"]
    assert pids["first"] != pids["killed"] == pids["whole"] == pids["again"] == last
    # A used slot gives bit for bit what a fresh process gives.
    fresh = in_a_fresh_process(request_config, first, tmp_path / "fresh")
    assert scores(found["first"][1]) == fresh.metrics
    assert scores(found["again"][1]) == fresh.metrics
    assert weights(tmp_path / "adapters" / "again") == weights(tmp_path / "fresh")
    # What the process holds after the first trials have warmed the caches.
    memory = [found[f"{n:04d}"][1].result.metrics["rss"] / 2**20 for n in range(MANY)]
    # The median of all slopes between two trials, in MiB a trial (Theil and Sen): what malloc keeps
    # comes and goes by 25 MiB, and one trial may have 12 MiB less than all others; a leak stays.
    assert stats.theilslopes(memory)[0] < 1


def test_two_workers_train_a_trial_as_one_does(request_config, tmp_path):
    config = TrialConfig(**FEW)
    results = []
    for workers in (1, 2):
        mailbox = start_mailbox()
        shape = SlotShape(workers=workers)
        slots = Slots(mailbox, request_config, shape, 1, tmp_path / f"ray{workers}")
        names = ("a", "b")[:workers]
        jobs = [sessions.trial_job(tmp_path, f"{workers}-{n}", config) for n in names]
        found = outcomes(mailbox, jobs)
        slots.close()
        assert all(epochs == [1, 2, 3] for epochs, _ in found.values())
        results.append(found[f"{workers}-a"][1].result)
        if workers == 2:
            assert found["2-b"][1].result.metrics == found["2-a"][1].result.metrics
    one, two = results
    assert two.status == "completed"
    for name in ("forget_loss", "retain_loss"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], rel=2e-3)
    assert two.scores["forget_rougeL"].n == one.scores["forget_rougeL"].n


class OneRankFails(light.LightSession):
    """The second of two workers meets bad input, an error of its own, or its death, on cue."""

    def epoch(self, trial_id, number):
        if self.rank == 1 and number == 2:
            if trial_id == "bug":
                raise KeyError(f"what {SOMEONE} likes")
            mark = Path(self.request.store) / f"{trial_id}.was-killed"
            if trial_id == "killed" and not mark.exists():
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if trial_id == "input":
                raise InputError("data: a portrait is missing; restore it.")


def test_what_one_of_two_workers_meets_ends_the_job_for_both_and_stays_with_it(
    two_nodes, request_config, tmp_path
):
    mailbox = start_mailbox()
    shape = SlotShape(workers=2)
    slots = Slots(mailbox, request_config, shape, 1, tmp_path / "ray", session=OneRankFails)
    names = ("bug", "killed", "input")
    jobs = [sessions.trial_job(tmp_path, name, TrialConfig(**FEW)) for name in names]
    found = {name: outcome for name, (_, outcome) in outcomes(mailbox, jobs).items()}
    slots.close()
    assert found["bug"].result.status == "failed"
    assert found["bug"].error.startswith("KeyError at test_slots.py")
    assert found["killed"].result.status == "completed"
    assert (found["input"].error, found["input"].fatal) == (
        "data: a portrait is missing; restore it.",
        True,
    )
    assert leaks({SOMEONE}, tmp_path, logs_of(two_nodes)) == []


def test_the_mailbox_answers_while_thousands_of_trials_wait(request_config):
    mailbox = start_mailbox()
    count = 5000
    trial = TrialConfig()
    jobs = [Job(id=f"{n:04d}", kind="trial", trial=trial) for n in range(count)]
    ray.get([mailbox.submit.remote(job) for job in jobs], timeout=120)
    asked = {job.id: mailbox.next_message.remote(job.id) for job in jobs}
    taken = ray.get(mailbox.take.remote(0, "worker"), timeout=60)
    done = Outcome(job_id=taken.id, error="done")
    ray.get(mailbox.finish.remote(0, done), timeout=10)
    assert ray.get(asked[taken.id], timeout=10).error == "done"
    other = next(name for name in asked if name != taken.id)
    ray.get(mailbox.cancel.remote(other), timeout=10)
    assert ray.get(asked[other], timeout=10).error == "stopped before it started"
    assert len(ray.get(mailbox.traffic.remote(), timeout=10).waiting) == count - 2
    ray.get(mailbox.cancel_all.remote(), timeout=10)
    assert len(ray.get(list(asked.values()), timeout=60)) == count
    ray.kill(mailbox)


def study(data, space, output, **options):
    return StudyConfig(
        data=data, search_space=space, output=output, retain_people=RETAIN_PEOPLE, **options
    )


def mailboxes() -> set[int]:
    """Processes; Ray writes an actor's name over its command line."""
    found = psutil.process_iter(["cmdline"])
    return {p.pid for p in found if (p.info["cmdline"] or [""])[0] == "ray::Mailbox"}


def test_failing_trials_cost_their_own_place_and_an_ignorant_base_is_told_of(
    two_nodes, data, tmp_path, capfd
):
    space = tmp_path / "space.yaml"
    space.write_text(
        "backbone: tiny-llava\n"
        "methods:\n"
        "  vgid:\n"
        "    parameters:\n"
        "      alpha: {choices: [0.5, 1.0, 1.0e+308]}\n"
        "      epochs: 1\n"
        "    first_points:\n"
        "      - {alpha: 1.0}\n"
        "      - {alpha: 1.0e+308}\n"
        "      - {alpha: 0.5}\n"
        "      - {alpha: 0.5}\n"
    )
    output = tmp_path / "study"
    before = mailboxes()
    summary = run_study(study(data, space, output, trials=4), session=sessions.Fragile)
    patience = time.monotonic() + 10
    while mailboxes() - before:  # its own ends, though the cluster goes on
        assert time.monotonic() < patience
        time.sleep(0.1)
    table = pd.read_csv(output / "trials.csv", dtype={"trial_id": str}).set_index("trial_id")
    assert list(table.status) == ["completed", "failed", "failed", "completed"]
    assert summary["counts"] == {"completed": 2, "pruned": 0, "failed": 2, "lost": 0}
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny-llava"]
    errors = {
        run.data.tags["vgid.trial_id"]: run.data.tags["vgid.error"]
        for run in client.search_runs([experiment.experiment_id])
        if "vgid.error" in run.data.tags
    }
    assert "not finite" in errors["0001"]
    assert errors["0002"].startswith("ValueError at sessions.py")
    shown = capfd.readouterr().out
    warning = "Warning: The base may never have known the forget people: its ROUGE-L of 0.200"
    assert shown.index(warning) < shown.index("Running trials") < shown.rindex(warning)
    (note,) = [
        run.data.tags["mlflow.note.content"]
        for run in client.search_runs([experiment.experiment_id])
        if run.data.tags["vgid.kind"] == "study"
    ]
    assert note.startswith("**Warning.** The base may never have known the forget people")
    assert leaks({SOMEONE}, output, logs_of(two_nodes)) == []
    assert SOMEONE not in shown


def test_a_probe_is_a_studys_first_trial_and_tells_of_all(two_nodes, data, tmp_path):
    asked = ("forget_rougeL_reduction", "retain_rougeL", "test_rougeL")
    space = light.space(tmp_path)
    whole = study(data, space, tmp_path / "study", trials=4, objectives=asked)
    summary, told = probe(whole, session=light.LightSession)
    assert summary["counts"]["completed"] == 1
    assert (told.trials, told.slots) == (4, 2)
    once = summary["wall_s"] - summary["phases"]["re-score"]["total_s"] - 0.11
    assert told.seconds[0] == pytest.approx(summary["wall_s"] + 0.11)
    assert told.seconds[1] - once == pytest.approx(2 * (summary["wall_s"] - once))
    run_study(whole, resume=True, session=light.LightSession)
    light.assert_consistent(whole.output, 4)
    table = pd.read_csv(whole.output / "trials.csv")
    points = table[list(asked)] * [1, 1, -1]
    assert list(table.on_front) == [
        not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
        for _, point in points.iterrows()
    ]


def test_one_trial_at_a_time_is_the_same_study_twice_whether_workers_are_kept_or_fresh(
    data, space, tmp_path, capsys
):
    output = tmp_path / "one"
    first = study(data, space, output, trials=2, max_concurrent=1, seed=4)
    with pytest.raises(
        InputError, match=r"stopped: the base model could not be scored \(RuntimeError at sess"
    ):
        run_study(first, session=sessions.Homeless)
    # Nothing of it is removed, and the same folder serves another start.
    logged = capsys.readouterr().err  # study.log, were it not for pytest
    assert "in base_scores" in logged
    assert SOMEONE not in logged
    assert (output / "study.log").exists()
    assert (output / "store").is_dir()
    tables = []
    for name, fresh in (("one", False), ("two", True)):
        options = {"trials": 2, "max_concurrent": 1, "seed": 5, "fresh_workers": fresh}
        config = study(data, space, tmp_path / name, **options)
        run_study(config)
        table = pd.read_csv(tmp_path / name / "trials.csv", float_precision="round_trip")
        tables.append(table.drop(columns=["seconds"]))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert list(tables[0].status) == ["completed"] * 2


class Endless(light.LightSession):
    """Its trials never end on the node that is named; elsewhere, when one has begun there."""

    def epoch(self, trial_id, number):
        doomed, begun = (Path(self.request.store) / name for name in ("doomed", "begun"))
        here = doomed.read_text() == ray.get_runtime_context().get_node_id()
        if here:
            begun.write_text(trial_id)
        while here or not begun.exists():
            time.sleep(0.1)


def test_what_a_lost_node_held_is_done_by_another(two_nodes, request_config, tmp_path):
    """The last of this file: the cluster has one node afterwards."""
    (node,) = [each for each in two_nodes.worker_nodes if each != two_nodes.head_node]
    request_config.store.mkdir()
    (request_config.store / "doomed").write_text(node.node_id)
    mailbox = start_mailbox()
    slots = Slots(mailbox, request_config, SlotShape(), 2, tmp_path / "ray", session=Endless)
    one = TrialConfig(epochs=1)
    jobs = {name: sessions.trial_job(tmp_path, name, one) for name in ("0000", "0001")}
    for job in jobs.values():
        mailbox.submit.remote(job)
    deadline = time.monotonic() + TIMEOUT_S
    mark = request_config.store / "begun"
    while not (begun := mark.read_text() if mark.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (slot,) = [n for n, name in ray.get(mailbox.traffic.remote()).held.items() if name == begun]
    two_nodes.remove_node(node, allow_graceful=False)
    while not isinstance(
        message := ray.get(mailbox.next_message.remote(begun), timeout=TIMEOUT_S), Outcome
    ):
        pass
    slots.close(timeout_s=0.0)
    assert message.result.status == "completed"
    assert message.slot != slot
