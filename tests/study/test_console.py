"""The command line and what a study shows: on a terminal, in a log file, and at the end."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from studies.pareto_search import Mode, main, read_flags
from vgid.command_line import duration
from vgid.config import LADDER, StudyConfig, TrialConfig, seconds
from vgid.errors import InputError
from vgid.report.records import TrialRecord
from vgid.results import EpochReport, Score, TrialResult
from vgid.study.console import (
    Standing,
    StudyConsole,
    libraries_silenced,
    print_summary,
)

SCRIPT = Path(__file__).parents[2] / "studies" / "pareto_search.py"
HEAVY = ("torch", "ray", "mlflow", "transformers", "peft", "optuna", "pandas", "matplotlib")


def completed(name="0001", reduction=0.75, retain=0.9):
    metrics = {
        "forget_rougeL_reduction": reduction,
        "retain_rougeL": retain,
        "forget_rougeL": 0.2,
        "test_rougeL": 0.3,
    }
    return TrialResult(trial_id=name, status="completed", metrics=metrics, seconds={"train": 7.0})


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("pass", ""),
        ("sys.exit(3)", ""),
        ("os._exit(1)", "go on.\n"),
        ("os.kill(os.getpid(), 9)", "go on.\n"),
    ],
)
def test_a_process_that_ends_without_a_word_leaves_one(end, said):
    code = f"""
import os, sys
from vgid.study.console import last_words
with last_words("go on."):
    {end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", said)


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0 s"), (59, "59 s"), (80, "1 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_for_people(value, text):
    assert duration(value) == text


def test_without_a_terminal_each_event_is_a_plain_line():
    stream = io.StringIO()
    standing = Standing(trials=4, slots=2)
    with StudyConsole(stream, standing) as console:
        console.stage("Running trials")
        console.epoch("0001", "random noise", None)
        console.epoch(
            "0001",
            "random noise",
            EpochReport(epoch=1, epochs=3, step=3, metrics={"loss": 0.5}),
        )
        standing.counts = {"completed": 1, "failed": 1}
        standing.front, standing.hypervolume = 1, 0.25
        standing.trial_s.append(30.0)
        console.ended("0001", completed())
        console.ended(
            "0002", TrialResult(trial_id="0002", status="failed", error="the loss is NaN")
        )
    stage, first, second = stream.getvalue().splitlines()
    assert stage.endswith("Running trials")
    for part in (
        "trial 0001 completed",
        "reduction 0.750",
        "2/4 ended",
        "1 failed",
        "front 1",
        "hypervolume 0.2500",
        "about 30 s left",
    ):
        assert part in first
    assert "trial 0002 failed: the loss is NaN" in second
    assert "\x1b" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_display_lives_and_says_where_things_stand(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    standing = Standing(trials=4)
    with StudyConsole(stream, standing) as console:
        console.stage("Running trials")
        console.epoch(
            "0001", "white image", EpochReport(epoch=2, epochs=3, step=3, metrics={"loss": 0.5})
        )
        console._live.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "Running trials" in shown
    assert "0/4 ended, 1 running" in shown
    assert "white image  epoch 2/3, loss 0.5" in shown


def test_time_left_is_bounded_by_the_budget():
    standing = Standing(trials=100, budget_s=60.0, trial_s=[10.0, 10.0])
    assert standing.left_s(elapsed_s=50.0) == 20.0
    assert Standing(trials=100).left_s(elapsed_s=5.0) is None


def test_the_summary_ends_with_how_to_open_the_ui():
    record = TrialRecord(
        TrialConfig(),
        completed(),
        on_front=True,
        held_out={
            "forget_rougeL_reduction": Score(value=0.875, n=10, low=0.75, high=1.0),
            "retain_rougeL": Score(value=0.5, n=10, low=0.25, high=0.75),
            "celebrity_rougeL": Score(value=0.625, n=10, low=0.5, high=0.75),
        },
    )
    base = {
        "search": {"forget_rougeL": Score(value=0.2, n=9, low=0.1, high=0.3)},
        "held_out": {
            "forget_rougeL": Score(value=1.0, n=10, low=1.0, high=1.0),
            "retain_rougeL": Score(value=0.984, n=10, low=1.0, high=1.0),
            "celebrity_rougeL": Score(value=0.891, n=10, low=1.0, high=1.0),
        },
    }
    summary = {
        "base": base,
        "counts": {"completed": 3, "pruned": 0, "failed": 1},
        "hypervolume": 0.5,
        "outlook": "The front still grew at trial 4 of 4.",
        "agreement": None,
        "phases": {
            "start-up": {"total_s": 20.0},
            "overhead": {"total_s": 1.0, "median_s": 0.25},
        },
        "store": {
            "hit_rate_after_first_trial": 0.9625,
            "targets_after_first_trial": 1600,
            "bytes": 12_300_000,
        },
        "output": "runs/x",
        "files": ["study.json", "study.html"],
    }
    stream = io.StringIO()
    print_summary(stream, summary, [record], "mlflow ui --backend-store-uri sqlite:///x.db")
    text = stream.getvalue()
    assert "3 completed, 1 failed, hypervolume 0.5000" in text
    assert "0.875 [0.750, 1.000]" in text  # held-out reduction
    assert "0.625 [0.500, 0.750]" in text  # celebrities, beside the retain people
    assert re.search(r"base\W+of 0\.200\W+of 1\.000\W+0\.984\W+0\.891", text)
    assert "Warning: The base may never have known the forget people" in text
    assert re.search(r"overhead\W+1\.000\W+0\.250", text)
    assert "still grew at trial 4 of 4" in text
    assert "96.2% of 1,600 targets" in text
    assert "12.3 MB" in text
    assert "runs/x" in text
    assert "study.html" in text
    assert text.splitlines()[-1] == "mlflow ui --backend-store-uri sqlite:///x.db"


def test_what_libraries_print_goes_to_the_log_and_the_terminal_stays_ours(tmp_path):
    code = (
        "import os, subprocess, sys; from pathlib import Path;"
        "from vgid.study.console import libraries_silenced\n"
        "with libraries_silenced(Path(sys.argv[1])) as terminal:\n"
        "    print('noise'); os.write(2, b'native noise\\n')\n"
        "    subprocess.run(['echo', 'child noise']); print('ours', file=terminal)\n"
        "print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ours\nafter\n"
    assert done.stderr == ""
    log = (tmp_path / "log").read_text()
    assert all(line in log for line in ("noise\n", "native noise\n", "child noise\n"))


def test_the_terminal_comes_back_after_an_error(tmp_path, capfd):
    with pytest.raises(InputError), libraries_silenced(tmp_path / "log"):
        raise InputError("sentence")
    os.write(1, b"visible\n")
    assert capfd.readouterr().out == "visible\n"


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("tiny- llava", "tiny-llava")
    flags = (
        "backbone trials seed output data search-space forget-ratio method time-budget "
        "max-concurrent workers-per-trial gpus-per-worker tracking-uri resume dry-run"
    )
    for flag in flags.split():
        assert f"--{flag}" in text
    assert "default: tiny-llava" in text
    trials = StudyConfig.model_fields["trials"].default
    assert f"default: {trials}" in text


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--retry-failed"], "add --resume"),
        (["--probe", "--resume"], "leave out --resume"),
        (["--probe", "--dry-run"], "leave out --resume and --dry-run"),
        (["--price-per-hour", "2"], "add --probe"),
        (["--probe", "--price-per-hour", "-1"], "price_per_hour: input should be greater than"),
    ],
)
def test_flags_that_need_another_or_bar_it_are_refused(flags, remedy, tmp_path, capsys):
    assert main([*flags, "--output", str(tmp_path / "out")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert remedy in sentence
    assert not (tmp_path / "out").exists()


def test_help_and_bad_input_of_every_study_import_nothing_heavy():
    code = (
        "import sys\n"
        "from studies import compare_methods, paper_tables, pareto_search, pick_deployment\n"
        "def code_of(study):\n"
        "    try: return study.main(sys.argv[1:])\n"
        "    except SystemExit as end: return end.code\n"
        "studies = (compare_methods, paper_tables, pareto_search, pick_deployment)\n"
        "codes = [code_of(study) for study in studies]\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules], *codes)"
    )
    for arguments, expected in ((["--help"], 0), (["--trials", "0"], 2), (["--backbone", "x"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == f"loaded [] {' '.join([str(expected)] * 4)}"
        assert len(done.stderr.splitlines()) == (0 if expected == 0 else 4)


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)]
)
def test_durations_on_the_command_line(text, value):
    assert seconds(text) == value


def test_flags_become_a_study_config(tmp_path):
    config, mode = read_flags(
        ["--trials", "3", "--time-budget", "10m", "--output", str(tmp_path), "--max-concurrent=1"]
    )
    assert (config.trials, config.time_budget_s, config.max_concurrent) == (3, 600.0, 1)
    config, _ = read_flags(["--output", str(tmp_path), "--max-concurrent", "auto"])
    assert config.max_concurrent is None
    assert config.output == tmp_path
    assert config.harvest == LADDER
    assert mode == Mode()
    for text, scales in (("0.7, 1.25", (0.7, 1.25)), ("off", ())):
        config, _ = read_flags(["--output", str(tmp_path), "--harvest", text])
        assert config.harvest == scales


def test_without_an_output_folder_the_next_free_number_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_flags([])[0].output.name == "tiny-llava-1"
    (tmp_path / "runs" / "tiny-llava-1").mkdir(parents=True)
    assert read_flags([])[0].output.name == "tiny-llava-2"
    assert read_flags(["--resume"])[0].output.name == "tiny-llava-1"


GAUSSIAN = "parameters: {noise_type: gaussian, sigma: 9.0}"


@pytest.mark.parametrize(
    ("arguments", "space", "word"),
    [
        (["--trials", "0"], None, "trials"),
        (["--trials", "many"], None, "--trials"),
        (["--nonsense"], None, "--nonsense"),
        (["--backbone", "gpt-5"], None, "backbone"),
        (["--seed", "-1"], None, "seed"),
        (["--time-budget", "soon"], None, "10m"),
        (["--time-budget", "0"], None, "10m"),
        (["--forget-ratio", "7"], None, "--forget-ratio"),
        (["--harvest", "mild"], None, "0.7,0.85"),
        (["--harvest", "0.7,3"], None, "harvest.1"),
        (["--harvest", "0.7,0.8,0.70"], None, "each scale once"),
        (["--harvest", "0.7,1.0"], None, "the trial itself"),
        (["--data", "nowhere"], None, "nowhere"),
        (["--search-space", "nowhere.yaml"], None, "nowhere.yaml"),
        (["--resume"], None, "no study to resume"),
        (["--method", "magic"], None, "--method"),
        (["--method", "rmu"], "parameters: {}", "no section 'rmu'"),
        ([], "parameters: {noise_type: blur}", "noise_type"),
        ([], "parameters: {alfa: 1.0}", "alfa"),
        ([], GAUSSIAN, "sigma"),
        ([], "parameters: {alpha: {low: -1.0, high: 1.0}}", "alpha"),
        ([], "parameters: {beta: {low: 2.0, high: 1.0}}", "beta"),
    ],
)
def test_bad_input_is_one_sentence_exit_two_and_nothing_written(
    tmp_path, monkeypatch, capsys, arguments, space, word
):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    if space is not None:
        Path("space.yaml").write_text(f"backbone: tiny-llava\nmethods: {{vgid: {{{space}}}}}\n")
        arguments = [*arguments, "--search-space", "space.yaml"]
    assert main([*arguments, "--output", str(output)]) == 2
    captured = capsys.readouterr()
    (sentence,) = captured.err.splitlines()
    assert word in sentence
    assert not output.exists()


def test_bad_data_is_named_before_anything_starts(tmp_path, capsys):
    from vgid.data.synthetic import write_benchmark

    data = tmp_path / "data"
    write_benchmark(data)
    (shard,) = (data / "forget_5").glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert main(["--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "forget_5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_real_backbone_without_its_weights_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = ["--backbone", "llava-1.5-7b", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "--model-path" in sentence


def test_no_space_is_one_sentence(tmp_path, capsys, monkeypatch):
    import vgid.study.plan

    monkeypatch.setattr(vgid.study.plan, "MIN_FREE_BYTES", 2**80)
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert "free" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--trials", "6", "--output", str(output)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part in ("6 trials", "tiny-llava", "Slots", "First points (4)", "searched: alpha"):
        assert part in done.stdout
    assert not output.exists()
