"""The ``vgid`` command: a thin shell in which each command calls one function of the package.

Modules with heavy imports are imported inside the commands that need them, so that ``vgid --help``
is quick. Commands that take a config have its fields for flags (``vgid.command_line``).
"""

import inspect
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field
from rich.console import Console
from rich.filesize import decimal

from vgid.command_line import Parser, Printed
from vgid.config import Config, FinetuneConfig
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

FROM_CONFIG: Any = {
    "add_help_option": False,  # --help is among the flags
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""Of a command whose flags are the fields of a config."""

NewFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="New or empty folder.", callback=new_folder)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
ModelPathOption = Annotated[
    str | None, typer.Option(help="Folder or hub id of the base, if not what the file says.")
]


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


class _Going(Config):
    resume: bool = Field(False, description="go on from the checkpoint of a broken-off run")


@app.command("finetune", **FROM_CONFIG)
def finetune_command(context: typer.Context) -> None:
    """Make the vanilla model: tune a backbone on everyone's questions, merged to safetensors."""
    rare = ["lora_dropout", "weight_decay", "max_grad_norm", "warmup_fraction"]
    flags = _read(context, FinetuneConfig, _Going, without=rare)
    config, as_json = flags.config(FinetuneConfig), flags.config(Printed).as_json
    from vgid.bases.finetune import finetune

    result = finetune(config, resume=flags.config(_Going).resume, progress=not as_json)
    if as_json:
        print(result.model_dump_json())
    else:
        losses = ", ".join(f"{loss:.3f}" for loss in result.losses)
        print(f"Losses by epoch, in nats a response token: {losses}.")
        print(f"Wrote {result.output}; name it with --model-path.")


@app.command("evaluate", **FROM_CONFIG)
def evaluate_command(context: typer.Context) -> None:
    """Score a base, an adapter on it or a deployment: each score with n and 95 % interval.

    A deployment is scored on the people and questions of its record.
    """
    _score(context, attacked=False)


@app.command("attack", **FROM_CONFIG)
def attack_command(context: typer.Context) -> None:
    """Attack a base, an adapter or a deployment: reverse prompt, new portraits, other wording.

    Asked are the held-out questions, with and without each attack that a deployment record names;
    attacks of the literature that are not run are listed.
    """
    _score(context, attacked=True, without=["protocol", "part"])


def _score(context: typer.Context, attacked: bool, without: Sequence[str] = ()) -> None:
    from vgid.deployment.scores import ScoringConfig, score_model

    flags = _read(context, ScoringConfig, without=without)
    found = score_model(flags.config(ScoringConfig), attacked, _tell)
    if flags.config(Printed).as_json:
        print(found.model_dump_json())
    else:
        found.print(Console())


@app.command("pick", **FROM_CONFIG)
def pick_command(context: typer.Context) -> None:
    """Pick the trial of a study's front to deploy; see `vgid pick --help`."""
    from vgid.deployment.pick import main

    raise typer.Exit(main(context.args, "vgid pick"))


@app.command("verify")
def verify_command(
    target: Annotated[
        Path, typer.Argument(metavar="FILE", help="Deployment file, or an export's folder.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Benchmark folder; by default the study's, or the embedded backbone's."),
    ] = None,
    model_path: ModelPathOption = None,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM of the key that must have signed it.")
    ] = None,
    hashes_only: Annotated[
        bool, typer.Option("--hashes-only", help="Load no model and measure nothing again.")
    ] = False,
    served: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask this OpenAI-compatible server instead, under every name that it lists.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every hash of a deployment, load it, and measure its scores again.

    With --served the recorded questions go to a server instead, under every name that it lists and
    under none; one that answers as the base, or else outside the recorded intervals, differs.

    Exit code 0: verified. 1: something differs, and is named. 2: FILE was changed since it was
    sealed, or something that the check needs is not there.
    """
    from vgid.deployment.verify import verify

    if served is None:
        found = verify(target, data, model_path, public_key, hashes_only, _tell)
    elif hashes_only or model_path is not None:
        raise InputError("--served: no weights are read; leave out --hashes-only and --model-path.")
    else:
        from vgid.deployment.served import verify_served

        found = verify_served(target, served, data, public_key, _tell)
    if as_json:
        conclusions = {"verified": found.verified, "bit_equal": found.bit_equal}
        print(json.dumps(conclusions | found.model_dump(mode="json")))
    else:
        found.print(Console())
        print(found.conclusion)
    if not found.verified:
        raise typer.Exit(1)


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Deployment file.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="New or empty folder.", callback=new_folder)
    ],
    model_path: ModelPathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write adapter, merged weights, model card and the commands that serve them."""
    from vgid.deployment.export import export
    from vgid.deployment.served import COMPARISON_ONLY

    exported = export(file, output, model_path)
    if as_json:
        print(exported.model_dump_json())
    else:
        print(f"Wrote {exported.output}. To serve it with vLLM, in that folder:")
        print(f"\n{exported.serve}\n")
        if exported.compare is not None:
            print(f"{COMPARISON_ONLY}\n\n{exported.compare}\n")
        print(f"Ask what is served: `vgid verify {output} --served http://127.0.0.1:8000`.")
        print(f"Sign it with `vgid sign {output} --private-key PEM`.")


@app.command("sign")
def sign_command(
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="An export's folder, or a deployment file.")
    ],
    private_key: Annotated[Path, typer.Option(help="Elliptic key in PEM, not encrypted.")],
    as_json: JsonOption = False,
) -> None:
    """Sign all files of an export, or a deployment file (OpenSSF model-signing, offline).

    A key pair: openssl ecparam -name prime256v1 -genkey -noout -out private.pem;
    openssl ec -in private.pem -pubout -out public.pem
    """
    from vgid.deployment.signing import sign

    signature = sign(target, private_key)
    if as_json:
        print(json.dumps({"target": str(target), "signature": str(signature)}))
    else:
        print(f"Wrote {signature}; check it with `vgid verify {target} --public-key PEM`.")


@app.command("rollback")
def rollback_command(
    backbone: Annotated[str, typer.Option(help="Backbone whose champion goes back.")],
    tracking_uri: Annotated[str, typer.Option(help="MLflow server or database.")],
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion of a backbone the champion again, in MLflow's registry."""
    from vgid.deployment.registry import registered_name, rollback

    champion, previous = rollback(backbone, tracking_uri)
    if as_json:
        print(json.dumps({"backbone": backbone, "champion": champion, "previous": previous}))
    else:
        name = registered_name(backbone)
        print(f"{name}: version {champion} is the champion again, {previous} the previous one.")


@app.command("unlearn", **FROM_CONFIG)
def unlearn_command(context: typer.Context) -> None:
    """Answer one forget request with one trial, and write its deployment.

    With --from-deployment the deployed model is what is trained on, its people stay in the
    evaluation as split `earlier`, and the new adapter holds both requests.
    """
    from vgid.deployment.unlearn import UnlearnConfig, unlearn

    flags = _read(context, UnlearnConfig)
    config = flags.config(UnlearnConfig)
    done = unlearn(config, _tell)
    if done.warning is not None:
        print(
            f"Warning: {done.warning} A study may find a better setting: "
            f"studies/pareto_search.py --from-deployment {config.from_deployment}",
            file=sys.stderr,
        )
    if flags.config(Printed).as_json:
        plain = {"file": str(done.file), "sha256": done.sha256, "warning": done.warning}
        print(json.dumps(plain | {"deployment": done.deployment.model_dump(mode="json")}))
    else:
        done.print(Console())
        print(f"Wrote {done.file}; check it with `vgid verify {done.file} --data {config.data}`.")


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that hold deployments.")
    ],
    subject: Annotated[str, typer.Option(help="Pseudonym of the subject: the benchmark's ID.")],
    as_json: JsonOption = False,
) -> None:
    """List when a subject was to be suppressed, by which deployments, under which tests it is.

    Exit code 1: a deployment file was changed since it was sealed; it is named.
    """
    from vgid.deployment.audit import report

    found = report(subject, folders)
    if as_json:
        print(found.model_dump_json())
    else:
        found.print(Console())
        held = sum(suppression.suppressed for suppression in found.suppressions)
        print(
            f"{subject}: of {found.looked_at} deployments {len(found.suppressions)} answer for it "
            f"and {held} suppress it."
        )
    if found.damaged:
        raise typer.Exit(1)


def _read(context: typer.Context, *models: type[Config], without: Sequence[str] = ()) -> Parser:
    """The flags of a command whose configs these are, with ``--json`` among them."""
    told = inspect.cleandoc(context.command.help or "")
    return Parser(context.command_path, told, *models, Printed, without=without).read(context.args)


def _tell(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


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
