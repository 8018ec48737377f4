"""The ``vgid`` commands of deployments: unlearn, verify, export, sign, report, rollback.

Heavy modules are imported inside the commands, as in ``vgid.cli``.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vgid.evaluation.suppression import MIN_FORGET
from vgid.paths import new_folder
from vgid.report.tables import Grid

if TYPE_CHECKING:
    from vgid.deployment.unlearn import Unlearned

app = typer.Typer()
"""Its commands stand beside those of ``vgid.cli``."""

UNLEARN_SCORES = (
    "forget_rougeL",
    "forget_cloze",
    "forget_memorisation",
    "test_rougeL",
    "earlier_rougeL",
    "earlier_cloze",
    "earlier_memorisation",
    "retain_rougeL",
    "retain_cloze",
    "celebrity_rougeL",
    "celebrity_cloze",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
ModelPathOption = Annotated[
    str | None, typer.Option(help="Folder or hub id of the base, if not what the file says.")
]


ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Deployment file, export's folder or PEFT adapter; the base if left out.",
    ),
]
ScoredBackbone = Annotated[str | None, typer.Option(help="Backbone, by default tiny-llava.")]
ScoredData = Annotated[
    Path | None,
    typer.Option(help="Benchmark folder; by default the deployment's, or the embedded backbone's."),
]
ScoredRatio = Annotated[
    int | None, typer.Option(help="Per cent of the people to forget: 5, the default, 10 or 15.")
]
RetainOption = Annotated[
    int | None, typer.Option(help="People scored as retain set, by default 50.")
]
SplitSeed = Annotated[
    int | None, typer.Option(help="Of the splits of people and questions, by default 0.")
]
SeedsOption = Annotated[int, typer.Option(help="Seeds of few-shot people and poses to score with.")]


@app.command("evaluate")
def evaluate_command(
    context: typer.Context,
    target: ModelArgument = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="own: as the backbone's studies score. benchmark: MLLMU-Bench's, with answers by "
            "letter, few-shot turns and all questions."
        ),
    ] = "own",
    part: Annotated[
        str | None, typer.Option(help="Questions: held_out, the default of own, search or all.")
    ] = None,
    backbone: ScoredBackbone = None,
    model_path: ModelPathOption = None,
    data: ScoredData = None,
    forget_ratio: ScoredRatio = None,
    retain_people: RetainOption = None,
    seed: SplitSeed = None,
    seeds: SeedsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Score a base, an adapter on it or a deployment: each score with n and 95 % interval.

    A deployment is scored on the people and questions of its record.
    """
    _score(context, attacked=False)


@app.command("attack")
def attack_command(
    context: typer.Context,
    target: ModelArgument = None,
    backbone: ScoredBackbone = None,
    model_path: ModelPathOption = None,
    data: ScoredData = None,
    forget_ratio: ScoredRatio = None,
    retain_people: RetainOption = None,
    seed: SplitSeed = None,
    seeds: SeedsOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Attack a base, an adapter or a deployment: reverse prompt, new portraits, other wording.

    Asked are the held-out questions, with and without each attack that a deployment record names;
    attacks of the literature that are not run are listed.
    """
    _score(context, attacked=True)


def _score(context: typer.Context, attacked: bool) -> None:
    from vgid.config import parse
    from vgid.deployment.model_scores import ScoringConfig, score_model

    flags = {name: value for name, value in context.params.items() if name != "as_json"}
    found = score_model(parse(ScoringConfig, flags, context.command_path), attacked, _tell)
    if context.params["as_json"]:
        print(found.model_dump_json())
    else:
        found.print(Console())


@app.command(
    "pick",
    add_help_option=False,  # --help is among the flags
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
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
    from vgid.errors import InputError

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
    from vgid.deployment.vllm import COMPARISON_ONLY

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


@app.command("unlearn")
def unlearn_command(
    data: Annotated[Path, typer.Option(help="Benchmark folder.")],
    output: Annotated[Path, typer.Option(help="Folder that gets `deployments`.")],
    from_deployment: Annotated[
        Path | None, typer.Option(help="Deployment file to start from, for a next request.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Backbone, by default tiny-llava or the deployment's.")
    ] = None,
    model_path: ModelPathOption = None,
    forget_ratio: Annotated[int, typer.Option(help="Per cent of the people: 5, 10 or 15.")] = 5,
    forget_ids: Annotated[
        str | None, typer.Option(help="IDs among them, with commas; by default all.")
    ] = None,
    request_id: Annotated[
        list[str] | None, typer.Option(help="ID of the request; may be given again.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of a hyperparameter; others are the deployment's."),
    ] = None,
    min_forget: Annotated[
        float,
        typer.Option(
            help="Least share of the base's forget ROUGE-L that is gone, at the unfavourable end "
            "of its interval; a trial below it is refused."
        ),
    ] = MIN_FORGET,
    seeds: Annotated[int, typer.Option(help="Seeds to score with.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the splits of people and questions.")] = 0,
    retain_people: Annotated[int, typer.Option(help="People scored as retain set.")] = 50,
    train_pairs: Annotated[
        str, typer.Option(help="unheld: without the questions that are scored as held-out; or all.")
    ] = "unheld",
    skip_defects: Annotated[
        bool, typer.Option("--skip-defects", help="Leave defective questions and people out.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one forget request with one trial, and write its deployment.

    With --from-deployment the deployed model is what is trained on, its people stay in the
    evaluation as split `earlier`, and the new adapter holds both requests.
    """
    from vgid.config import parse
    from vgid.deployment.unlearn import UnlearnConfig, unlearn
    from vgid.flags import words

    settings = {
        "data": data,
        "output": output,
        "from_deployment": from_deployment,
        "backbone": backbone,
        "model_path": model_path,
        "forget_ratio": forget_ratio,
        "forget_ids": None if forget_ids is None else words(forget_ids),
        "request_id": tuple(request_id or ()),
        "setting": tuple(setting or ()),
        "min_forget": min_forget,
        "seeds": seeds,
        "seed": seed,
        "retain_people": retain_people,
        "train_pairs": train_pairs,
        "skip_defects": skip_defects,
    }
    done = unlearn(parse(UnlearnConfig, settings, "vgid unlearn"), _tell)
    _show_unlearned(done, data, from_deployment, as_json)


def _show_unlearned(
    done: "Unlearned", data: Path, from_deployment: Path | None, as_json: bool
) -> None:
    """What came of a request: a warning, then its scores and where its deployment is."""
    if done.warning is not None:
        print(
            f"Warning: {done.warning} A study may find a better setting: "
            f"studies/pareto_search.py --from-deployment {from_deployment}",
            file=sys.stderr,
        )
    if as_json:
        plain = {"file": str(done.file), "sha256": done.sha256, "warning": done.warning}
        print(json.dumps(plain | {"deployment": done.deployment.model_dump(mode="json")}))
        return
    scores = done.deployment.scores
    rows = [
        (name, scores.deployed[name].n, scores.base[name].value, scores.deployed[name])
        for name in UNLEARN_SCORES
        if name in scores.deployed
    ]
    Console().print(Grid(("score", "n", "base", "deployed [95 % interval]"), rows).rich())
    print(f"Wrote {done.file}; check it with `vgid verify {done.file} --data {data}`.")


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


def _tell(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)
