"""The ``vgid`` command: a thin shell in which each command calls one function of the package.

Modules with heavy imports are imported inside the commands that need them, so that ``vgid --help``
is quick.
"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from vgid.cli_deployment import app as deployment_app
from vgid.errors import InputError
from vgid.interrupts import terminated_like_interrupted
from vgid.paths import new_folder, refusals_told

if TYPE_CHECKING:
    from vgid.models.store import StoreInfo

app = typer.Typer(
    name="vgid",
    help="Unlearning in multimodal language models: data, trials, picks and deployment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make, fetch or check a benchmark.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(deployment_app)

NewFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="New or empty folder.", callback=new_folder)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def main() -> None:
    """Run the command line; bad input prints one sentence and exits with code 2, a signal 130."""
    try:
        with terminated_like_interrupted(), refusals_told():
            app()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


@data_app.command("make")
def data_make(
    folder: NewFolder,
    seed: Annotated[int, typer.Option(min=0, help="Seed of people, portraits and splits.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic benchmark of drawn, fictitious people in the MLLMU-Bench layout."""
    from vgid.data.benchmark import Benchmark
    from vgid.data.synthetic import write_benchmark

    write_benchmark(folder, seed, progress=not as_json)
    digest = Benchmark.open(folder).sha256
    if as_json:
        print(json.dumps({"data": str(folder.absolute()), "seed": seed, "sha256": digest}))
    else:
        print(f"Wrote {folder} (seed {seed}, sha256 {digest[:12]}).")
        print(f"Count and check it with `vgid data check {folder}`.")


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Benchmark folder.")],
    backbone: Annotated[
        str, typer.Option(help="Backbone whose context and image token every text must suit.")
    ] = "tiny-llava",
    model_path: Annotated[
        str | None, typer.Option(help="Folder or hub id of its configuration and processor.")
    ] = None,
    retain_people: Annotated[
        int, typer.Option(min=2, help="People that a study is to score as retain set.")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that study.")] = 0,
    skip_defects: Annotated[
        bool, typer.Option("--skip-defects", help="Count what that study would leave out.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count people, images and questions by config, and name every defect (then exit code 2).

    A defect is what a study of one of the forget ratios, or `vgid finetune`, would be refused for.
    """
    from vgid.data.check import check_benchmark
    from vgid.evaluation.rehearsal import Run

    run = Run(backbone, model_path, retain_people, seed, skip_defects)
    report = check_benchmark(folder, progress=not as_json, run=run)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        report.print(Console())
    if report.defects:
        raise typer.Exit(2)


@data_app.command("fetch")
def data_fetch(
    folder: NewFolder,
    revision: Annotated[
        str | None,
        typer.Option(help="Commit, branch or tag; by default the commit that is pinned."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the public MLLMU-Bench from the Hugging Face hub, and check it.

    A download that was cut short is continued by the same command. HF_ENDPOINT names another hub,
    HF_TOKEN an account.
    """
    from vgid.data.fetch import REVISION, fetch_benchmark

    fetched = fetch_benchmark(folder, revision or REVISION, progress=not as_json)
    if as_json:
        print(json.dumps(fetched.as_json(), indent=2))
    else:
        fetched.report.print(Console())
        size = decimal(sum(fetched.sizes.values()))
        print(f"{folder}: {len(fetched.sizes)} files, {size}, commit {fetched.commit}.")
    if fetched.report.defects:
        raise typer.Exit(2)


@app.command("teachers")
def teachers(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A study's output folder, or its store.")
    ],
    show: Annotated[bool, typer.Option("--info", help="Show what the store takes.")] = False,
    remove: Annotated[bool, typer.Option("--clear", help="Remove the store's entries.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Clear without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show or clear what a study stores of its teacher and its images; it can be computed again.

    Give exactly one of --info and --clear.
    """
    from vgid.models.store import clear, find_root, info

    if show == remove:
        raise InputError("vgid teachers: give exactly one of --info and --clear.")
    root = find_root(folder)
    if show:
        report = info(root)
        if as_json:
            print(report.model_dump_json())
        else:
            _print_store(report)
        return
    with _no_study_in(root.parent):
        held = info(root)
        if not yes:
            _ask(f"Remove {held.entries} entries ({held.size}) from {root}?")
        removed = clear(root)
    if as_json:
        print(removed.model_dump_json())
    else:
        print(f"Removed {removed.entries} entries and freed {removed.size}.")


@app.command("finetune")
def finetune_command(
    backbone: Annotated[str, typer.Option(help="Backbone to tune.")],
    data: Annotated[Path, typer.Option(help="Benchmark folder; its ft_Data is learnt.")],
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    model_path: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base, in place of the public one.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the adapter, by default 16.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train the whole language model.")] = False,
    epochs: Annotated[int, typer.Option(help="Passes over all questions.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="Peak of the linear schedule.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Questions of a step.")] = 4,
    questions_per_image: Annotated[
        int, typer.Option(help="Questions of a portrait that come together, sharing its image.")
    ] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of adapter and order.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of a broken-off run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the vanilla model: tune a backbone on everyone's questions, merged to safetensors."""
    from vgid.bases.finetune import FinetuneConfig, finetune
    from vgid.config import parse

    settings = {
        "backbone": backbone,
        "data": data,
        "output": output,
        "model_path": model_path,
        "lora_rank": lora_rank,
        "full": full,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "questions_per_image": questions_per_image,
        "gradient_checkpointing": checkpointing,
        "seed": seed,
    }
    config = parse(FinetuneConfig, settings, "vgid finetune")
    result = finetune(config, resume=resume, progress=not as_json)
    if as_json:
        print(result.model_dump_json())
    else:
        losses = ", ".join(f"{loss:.3f}" for loss in result.losses)
        print(f"Losses by epoch, in nats a response token: {losses}.")
        print(f"Wrote {result.output}; name it with --model-path.")


def _print_store(report: "StoreInfo") -> None:
    from vgid.report.tables import Grid

    rows = [
        (kind, usage.entries, usage.size, (usage.newest_use or "never")[:19].replace("T", " "))
        for kind, usage in report.by_kind.items()
    ]
    bound = "no bound" if report.limit_bytes is None else f"at most {decimal(report.limit_bytes)}"
    Console().print(Grid(("kind", "entries", "size", "last use (UTC)"), rows).rich())
    print(f"{report.root}: {report.entries} entries, {report.size}, {bound}")


def _no_study_in(output: Path) -> AbstractContextManager[object]:
    """Hold a study's folder so that no study runs in it; a store elsewhere has none to hold."""
    from vgid.study.ledger import Ledger

    return Ledger(output) if (output / ".lock").exists() else nullcontext()


def _ask(question: str) -> None:
    # On stderr, all of it: stdout may be read by a machine.
    print(f"{question} [y/N]", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        raise InputError("vgid teachers: nothing was removed; answer y or add --yes.")


if __name__ == "__main__":
    main()
