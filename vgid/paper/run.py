"""The paper's tables, figures and claims in one run: ``studies/paper_tables.py``."""

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import Field
from rich.console import Console

from vgid.config import Config, Flag, Method, ModelPath, RetainPeople, TrialConfig, derived, words
from vgid.errors import InputError
from vgid.evaluation.suppression import doubt
from vgid.files import ReadFolder, UsablePath, WrittenFolder, write_atomically
from vgid.models import backbones
from vgid.paper.claims import Judgement, claims_markdown, judge_all, on_all
from vgid.paper.experiments import Bench, Experiment, Outcome, in_groups, run_experiments
from vgid.paper.figures import FIRST_TOKENS, pictures
from vgid.paper.printed import repeated_rows
from vgid.paper.settings import default_trials, prepare_data, read_settings
from vgid.paper.tables import (
    COMPARISONS,
    FilledTable,
    Table,
    as_csv,
    as_grid,
    fill,
    table_7,
    tables,
)
from vgid.provenance import provenance
from vgid.report.intervals import count_seeds
from vgid.report.page import rendered, write_picture
from vgid.report.records import write_study


def numbers(text: str) -> tuple[int, ...]:
    """Parse ``1-9`` or ``3,6`` or ``1,4-6``; an ``argparse.ArgumentTypeError`` if it is none."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of tables, write 1-9 or 3,6")
        found |= {*range(int(match[1]), int(match[2] or match[1]) + 1)}
    return tuple(sorted(found))


class PaperConfig(Config):
    """A run of the paper's tables."""

    backbones: Annotated[tuple[str, ...], Flag("NAME", "--backbone")] = Field(
        ("tiny-llava",), min_length=1, description="rows of vgid/models/backbones.py"
    )
    tables: Annotated[tuple[Annotated[int, Field(ge=1, le=9)], ...], Flag("LIST", read=numbers)] = (
        Field(tuple(range(1, 10)), min_length=1, description="such as 1-9 or 3,6")
    )
    seeds: int = Field(5, ge=1, description="how many seeds, from 0 on")
    output: Annotated[WrittenFolder, Flag("DIR")] = Field(
        description="folder, new or to go on with: what it holds of an earlier run is used"
    )
    methods: Annotated[tuple[Method, ...] | None, Flag("LIST", read=words)] = Field(
        None, description="such as vgid,ga,npo; without it, all"
    )
    settings: Annotated[tuple[UsablePath, ...], Flag("FILE")] = Field(
        (),
        description="tuned settings, as compare_methods.py writes them, one file a backbone; "
        "without it, the first point of each section in search_spaces",
    )
    data: Annotated[ReadFolder | None, Flag("DIR")] = Field(
        None,
        description="benchmark in the MLLMU-Bench layout; without it, the embedded backbones' own",
    )
    model_path: ModelPath = None
    retain_people: RetainPeople = 50
    bootstrap_samples: int = Field(
        1000, ge=100, description="behind each outcome's interval over questions"
    )
    processes: Annotated[int, Flag("K")] = Field(
        2,
        ge=1,
        description="groups of experiments at a time, each of one backbone, ratio and seed, with "
        "one thread; with GPUs, one a GPU",
    )


def run_paper_tables(
    config: PaperConfig, console: Console | None = None
) -> tuple[list[Judgement], dict[str, Any]]:
    """Run, or take from the cache, what the tables need, and write them.

    Gives every claim on every backbone, and the content of ``tables.json``. InputError comes before
    anything runs, where bad input can be checked.
    """
    from vgid.evaluation.rehearsal import rehearsed

    started = time.monotonic()
    if config.model_path is not None and len(config.backbones) > 1:
        raise InputError(
            "--model-path: names the weights of one backbone and --backbone names several; "
            "run them one by one."
        )
    trials = {name: _trials(config, name) for name in config.backbones}
    chosen: dict[str, list[Table]] = {}
    for name in config.backbones:
        chosen[name] = [t for n, t in tables(trials[name]).items() if n in config.tables]
        chosen[name] += [FIRST_TOKENS] if 2 in config.tables else []
        backbones.locate(backbones.spec(name), config.model_path)
    data = prepare_data(config.backbones, config.data, config.output)
    bench = derived(Bench, config, "tables", folder=config.output / "cache", data=data)
    seeds = range(config.seeds)
    needed = [
        table.experiment(row, name, seed)
        for name, of_backbone in chosen.items()
        for seed in seeds
        for table in of_backbone
        for row in table.rows
    ]
    # The user's data are refused before the first experiment, by the rule of a study's plan.
    for group in in_groups(needed) if config.data is not None else ():
        trained = dict.fromkeys(e.trial for e in group if e.trial is not None)
        rehearsed(bench.request(*group[0].group), list(trained))
    # Counted by files: other processes run the experiments.
    kept = set(bench.folder.glob("outcomes/*.json"))
    outcomes = run_experiments(needed, bench, config.processes, console)
    ran = len(set(bench.folder.glob("outcomes/*.json")) - kept)

    everything = [fill(table, name, seeds, outcomes) for name, ts in chosen.items() for table in ts]
    judgements = judge_all([table for table in everything if table.table is not FIRST_TOKENS])
    names = _write(config, everything, judgements, outcomes, trials)
    summary = {
        "config": config,
        **provenance(),
        "settings": trials,
        "base": {e.backbone: o.provenance for e, o in outcomes.items()},
        "experiments": len(outcomes),
        "experiments_run": ran,
        "experiment_s": sum(outcome.seconds for outcome in outcomes.values()),
        "wall_s": time.monotonic() - started,
        "files": names,
    }
    write_study(config.output / "tables.json", summary)
    return judgements, summary


def _trials(config: PaperConfig, backbone: str) -> dict[Method, TrialConfig]:
    methods: tuple[Method, ...] = config.methods or get_args(Method)
    tuned: dict[Method, TrialConfig] = {}
    for path in config.settings:
        of, settings = read_settings(path)
        if of not in config.backbones:
            raise InputError(
                f"{path}: backbone: the settings are meant for '{of}', which --backbone does not "
                "name; add it or leave the file out."
            )
        if of == backbone:
            tuned |= settings
    default = default_trials(backbone, [method for method in methods if method not in tuned])
    return {method: tuned.get(method) or default[method] for method in methods}


def _write(
    config: PaperConfig,
    everything: Sequence[FilledTable],
    judgements: Sequence[Judgement],
    outcomes: Mapping[Experiment, Outcome],
    trials: Mapping[str, Mapping[Method, TrialConfig]],
) -> list[str]:
    from markdown_it import MarkdownIt

    output, written, index = config.output, [], []
    filled = [table for table in everything if table.table is not FIRST_TOKENS]

    def write(name: str, content: bytes) -> None:
        write_atomically(output / name, content)
        written.append(name)

    for number in config.tables:
        mine = [table for table in filled if table.table.number == number]
        if number == 7:
            shown = [table_7(name, trials[name]) for name in config.backbones]
        else:
            shown = [as_grid(table).markdown() for table in mine]
            write(f"table_{number}.csv", as_csv(mine))
        index.append("\n".join(shown))
        write(f"table_{number}.md", index[-1].encode())
    figures = []
    for name in config.backbones:
        drawn = pictures([table for table in everything if table.backbone == name])
        for number, picture in drawn.items():
            stem = f"figure_{number}_{name}"
            written += write_picture(output, stem, picture, beside=True)
            figures.append((picture.title, stem))
    embedded = [name for name in config.backbones if backbones.spec(name).embedded]
    bases = {table.backbone: table.outcomes["base"][0].scores for table in reversed(filled)}
    told = rendered(
        "vgid.paper",
        "index.md.jinja",
        seeds=count_seeds(config.seeds),
        repeated=repeated_rows(),
        doubts={name: doubt(bases.get(name, {})) for name in config.backbones},
        embedded=embedded,
        single=sorted({t.table.number for t in filled} - set(COMPARISONS.values())),
        outcomes=outcomes.items(),
        judgements=judgements,
        on_all=on_all,
        tables=index,
        figures=figures,
    )
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(told)
    write("claims.md", claims_markdown(judgements, embedded).encode())
    write("index.md", told.encode())
    write("index.html", rendered("vgid.paper", "index.html.jinja", body=page).encode())
    return written
