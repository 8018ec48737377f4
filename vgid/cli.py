"""The ``vgid`` command: a thin shell in which each command calls one function of the package.

Heavy imports are inside the commands that need them, so that ``vgid --help`` is quick.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, Field
from rich.console import Console
from rich.filesize import decimal
from typer import Argument, Option

from vgid.command_line import Parser, Printed
from vgid.config import Config, FinetuneConfig
from vgid.errors import DiskError, InputError
from vgid.files import new_folder, refusals_told
from vgid.interrupts import terminated_like_interrupted

app = typer.Typer(
    name="vgid",
    help="Unlearning in multimodal language models: data, trials, picks and deployment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make, fetch or check a benchmark.", no_args_is_help=True)
app.add_typer(data_app, name="data")

FROM_CONFIG: Any = {  # of a command whose flags are the fields of a config
    "add_help_option": False,  # --help is among the flags
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

NewFolder = Annotated[Path, Argument(metavar="DIR", help="New or empty.", callback=new_folder)]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON object, for machines.")]
ModelPathOption = Annotated[str | None, Option(help="Folder or hub id of the base, if another.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: with 2 after bad input, 130 after a signal.

    Exit code 1 is for what could not be done, or was done and did not hold; each is one sentence.
    """
    try:
        with terminated_like_interrupted(), refusals_told():
            # By itself typer would answer a wrong flag with a box of four lines.
            sys.exit(app(arguments, standalone_mode=False) or 0)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1 if isinstance(error, DiskError) else 2)
    except typer.TyperException as error:
        if said := error.format_message().rstrip("."):  # without a command, help was printed
            print(f"command line: {said}; see --help.", file=sys.stderr)
    sys.exit(2)


@data_app.command("make")
def data_make(
    folder: NewFolder,
    seed: Annotated[int, Option(min=0, help="Seed of people, portraits and splits.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic benchmark of drawn, fictitious people in the MLLMU-Bench layout."""
    from vgid.data.benchmark import Benchmark
    from vgid.data.synthetic import write_benchmark

    write_benchmark(folder, seed, progress=not as_json)
    made = {"data": str(folder), "seed": seed, "sha256": Benchmark.open(folder).sha256}
    wrote = f"Wrote {folder} (seed {seed}, sha256 {made['sha256']:.12})."
    _show(made, as_json, wrote, f"Count and check it with `vgid data check {folder}`.")


@data_app.command("check")
def data_check(
    folder: Annotated[Path, Argument(metavar="DIR", help="Benchmark folder.")],
    backbone: Annotated[str, Option(help="Whose context each text must fit.")] = "tiny-llava",
    model_path: ModelPathOption = None,
    retain_people: Annotated[int, Option(min=2, help="People that a study is to retain.")] = 50,
    seed: Annotated[int, Option(min=0, help="Seed of that study.")] = 0,
    skip_defects: Annotated[bool, Option("--skip-defects", help="Count what is left out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Count people, images and questions by config, and name every defect (then exit code 2).

    A defect is what a study of one of the forget ratios, or `vgid finetune`, would be refused for.
    """
    from vgid.data.check import check_benchmark
    from vgid.evaluation.rehearsal import Run

    run = Run(backbone, model_path, retain_people, seed, skip_defects)
    report = check_benchmark(folder, not as_json, run.defects, skip_defects)
    _show(report, as_json)
    raise typer.Exit(2 if report.defects else 0)


@data_app.command("fetch")
def data_fetch(
    folder: NewFolder,
    revision: Annotated[str | None, Option(help="Commit, branch or tag; or a pinned one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the public MLLMU-Bench from the Hugging Face hub, and check it.

    A download that was cut short is continued by the same command. HF_ENDPOINT names another hub,
    HF_TOKEN an account.
    """
    from vgid.data.fetch import fetch_benchmark

    fetched = fetch_benchmark(folder, revision, progress=not as_json)
    _show(fetched, as_json)
    raise typer.Exit(2 if fetched.check.defects else 0)


@app.command("teachers")
def teachers(
    folder: Annotated[Path, Argument(metavar="DIR", help="A study's folder, or its store.")],
    show: Annotated[bool, Option("--info", help="Show what the store takes.")] = False,
    remove: Annotated[bool, Option("--clear", help="Remove the store's entries.")] = False,
    yes: Annotated[bool, Option("--yes", help="Clear without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show or clear what a study stores of its teacher and its images; it can be computed again.

    Give exactly one of --info and --clear.
    """
    from vgid.models.store import clear, find_root, info
    from vgid.report.tables import Grid
    from vgid.study.ledger import Ledger

    if show == remove:
        raise InputError("vgid teachers: give exactly one of --info and --clear.")
    root = find_root(folder)
    if show:
        held = info(root)
        rows = [
            (kind, usage.entries, usage.size, (usage.newest_use or "never")[:19].replace("T", " "))
            for kind, usage in held.by_kind.items()
        ]
        if not as_json:
            Console().print(Grid(("kind", "entries", "size", "last use (UTC)"), rows).rich())
        bound = "no bound" if held.limit_bytes is None else f"at most {decimal(held.limit_bytes)}"
        _show(held, as_json, f"{held.root}: {held.entries} entries, {held.size}, {bound}")
        return
    # No study may run there meanwhile; a store elsewhere has no study's folder to hold.
    with Ledger(root.parent) if (root.parent / ".lock").exists() else nullcontext():
        held = info(root)
        if not yes:
            # On stderr: stdout may be read by a machine.
            question = f"Remove {held.entries} entries ({held.size}) from {root}?"
            print(f"{question} [y/N]", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise InputError("vgid teachers: nothing was removed; answer y or add --yes.")
        gone = clear(root)
    _show(gone, as_json, f"Removed {gone.entries} entries and freed {gone.size}.")


class _Going(Config):
    resume: bool = Field(False, description="go on from the checkpoint of a broken-off run")


@app.command("finetune", **FROM_CONFIG)
def finetune_command(context: typer.Context) -> None:
    """Make the vanilla model: tune a backbone on everyone's questions, merged to safetensors."""
    rare = ["lora_dropout", "weight_decay", "max_grad_norm", "warmup_fraction"]
    flags, as_json = _read(context, FinetuneConfig, _Going, without=rare)
    config, going = flags.config(FinetuneConfig), flags.config(_Going)
    from vgid.bases.finetune import finetune

    made = finetune(config, resume=going.resume, progress=not as_json)
    losses = ", ".join(f"{loss:.3f}" for loss in made.losses)
    told = f"Losses by epoch, in nats a response token: {losses}."
    _show(made, as_json, told, f"Wrote {made.output}; name it with --model-path.")


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

    flags, as_json = _read(context, ScoringConfig, without=without)
    _show(score_model(flags.config(ScoringConfig), attacked, _tell), as_json)


@app.command("pick", **FROM_CONFIG)
def pick_command(context: typer.Context) -> None:
    """Pick the trial of a study's front to deploy, by a rule, and write the deployment.

    The front is scored again on held-out questions before.
    """
    from vgid.deployment.pick import PickConfig, pick_deployment

    flags, as_json = _read(context, PickConfig)
    picked = pick_deployment(flags.config(PickConfig), _tell)
    _show(picked.as_json() if as_json else picked, as_json)


@app.command("verify")
def verify_command(
    target: Annotated[Path, Argument(metavar="FILE", help="Deployment file, or an export.")],
    data: Annotated[Path | None, Option(help="Benchmark folder, if not the study's.")] = None,
    model_path: ModelPathOption = None,
    public_key: Annotated[Path | None, Option(help="PEM of the key that signed it.")] = None,
    hashes_only: Annotated[bool, Option("--hashes-only", help="Measure nothing again.")] = False,
    served: Annotated[str | None, Option(metavar="URL", help="Ask an OpenAI-like server.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every hash of a deployment, load it, and measure its scores again.

    With --served the recorded questions go to a server instead, under every name that it lists and
    under none; one that answers as the base, or else outside the recorded intervals, differs.

    Exit code 0: verified. 1: something differs, and is named. 2: FILE was changed since it was
    sealed, or something that the check needs is not there.
    """
    from vgid.deployment.verify import verify, verify_served

    if served is None:
        found = verify(target, data, model_path, public_key, hashes_only, _tell)
    elif hashes_only or model_path is not None:
        raise InputError("--served: no weights are read; leave out --hashes-only and --model-path.")
    else:
        found = verify_served(target, served, data, public_key, _tell)
    plain = {"verified": found.verified, "bit_equal": found.bit_equal}
    plain |= found.model_dump(mode="json")
    _show(plain if as_json else found, as_json, found.conclusion)
    raise typer.Exit(0 if found.verified else 1)


@app.command("export")
def export_command(
    file: Annotated[Path, Argument(metavar="FILE", help="Deployment file.")],
    output: NewFolder,
    model_path: ModelPathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write adapter, merged weights, model card and the commands that serve them."""
    from vgid.deployment.export import COMPARISON_ONLY, export

    made = export(file, output, model_path)
    _show(
        made,
        as_json,
        f"Wrote {made.output}. To serve it with vLLM, in that folder:\n\n{made.serve}\n",
        *([] if made.compare is None else [f"{COMPARISON_ONLY}\n\n{made.compare}\n"]),
        f"Ask what is served: `vgid verify {output} --served http://127.0.0.1:8000`.",
        f"Sign it with `vgid sign {output} --private-key PEM`.",
    )


@app.command("sign")
def sign_command(
    target: Annotated[Path, Argument(metavar="OUT", help="An export, or a deployment file.")],
    private_key: Annotated[Path, Option(help="Elliptic key in PEM, not encrypted.")],
    as_json: JsonOption = False,
) -> None:
    """Sign all files of an export, or a deployment file (OpenSSF model-signing, offline).

    A key pair: openssl ecparam -name prime256v1 -genkey -noout -out private.pem;
    openssl ec -in private.pem -pubout -out public.pem
    """
    from vgid.deployment.signing import sign

    signature = sign(target, private_key)
    told = f"Wrote {signature}; check it with `vgid verify {target} --public-key PEM`."
    _show({"target": str(target), "signature": str(signature)}, as_json, told)


@app.command("rollback")
def rollback_command(
    backbone: Annotated[str, Option(help="Backbone whose champion goes back.")],
    tracking_uri: Annotated[str, Option(help="MLflow server or database.")],
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion of a backbone the champion again, in MLflow's registry."""
    from vgid.deployment.registry import registered_name, rollback

    champion, previous = rollback(backbone, tracking_uri)
    found = {"backbone": backbone, "champion": champion, "previous": previous}
    name = registered_name(backbone)
    told = f"{name}: version {champion} is the champion again, {previous} the previous one."
    _show(found, as_json, told)


@app.command("unlearn", **FROM_CONFIG)
def unlearn_command(context: typer.Context) -> None:
    """Answer one forget request with one trial, and write its deployment.

    With --from-deployment the deployed model is what is trained on, its people stay in the
    evaluation as split `earlier`, and the new adapter holds both requests.
    """
    from vgid.deployment.unlearn import UnlearnConfig, unlearn

    flags, as_json = _read(context, UnlearnConfig)
    config = flags.config(UnlearnConfig)
    done = unlearn(config, _tell)
    if done.warning is not None:
        better = f"studies/pareto_search.py --from-deployment {config.from_deployment}"
        warning = f"Warning: {done.warning} A study may find a better setting: {better}"
        print(warning, file=sys.stderr)
    told = f"Wrote {done.file}; check it with `vgid verify {done.file} --data {config.data}`."
    _show(done, as_json, told)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], Argument(metavar="DIR...", help="With deployments in them.")],
    subject: Annotated[str, Option(help="Pseudonym of the subject: the benchmark's ID.")],
    as_json: JsonOption = False,
) -> None:
    """List when a subject was to be suppressed, by which deployments, under which tests it is.

    Exit code 1: a deployment file was changed since it was sealed; it is named.
    """
    from vgid.deployment.audit import report

    found = report(subject, folders)
    held = sum(suppression.suppressed for suppression in found.suppressions)
    answering = f"of {found.looked_at} deployments {len(found.suppressions)} answer for it"
    _show(found, as_json, f"{subject}: {answering} and {held} suppress it.")
    raise typer.Exit(1 if found.damaged else 0)


def _read(
    context: typer.Context, *models: type[Config], without: Sequence[str] = ()
) -> tuple[Parser, bool]:
    """The flags of a command whose configs these are, and whether ``--json`` is among them."""
    told = inspect.cleandoc(context.command.help or "")
    flags = Parser(context.command_path, told, *models, Printed, without=without)
    return flags, flags.read(context.args).config(Printed).as_json


def _show(found: Any, as_json: bool, *lines: str) -> None:
    """Print what a command found: one JSON object, or for people, with lines behind it."""
    if as_json:
        print(found.model_dump_json() if isinstance(found, BaseModel) else json.dumps(found))
        return
    if hasattr(found, "print"):
        # Where no terminal tells its width, wide enough that no table is broken.
        found.print(Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    print(*lines, sep="\n", end="\n" if lines else "")


def _tell(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
