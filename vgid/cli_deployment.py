"""The ``vgid`` commands from a deployment on: verify, export, sign, roll back.

Heavy modules are imported inside the commands, as in ``vgid.cli``.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
"""Its commands stand beside those of ``vgid.cli``."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
ModelPathOption = Annotated[
    str | None, typer.Option(help="Folder or hub id of the base, if not what the file says.")
]


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
    as_json: JsonOption = False,
) -> None:
    """Check every hash of a deployment, load it, and measure its scores again.

    Exit code 0: verified. 1: something differs, and is named. 2: FILE was changed since it was
    sealed, or something that the check needs is not there.
    """
    from vgid.verify import verify

    found = verify(target, data, model_path, public_key, hashes_only, _tell)
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
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    model_path: ModelPathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write adapter, merged weights, model card and the commands that serve them."""
    from vgid.export import export

    exported = export(file, output, model_path)
    if as_json:
        print(exported.model_dump_json())
    else:
        print(f"Wrote {exported.output}. To serve it with vLLM, in that folder:")
        print("\n".join(["", *(f"{command}\n" for command in exported.serve)]))
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
    from vgid.signing import sign

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
    from vgid.registry import registered_name, rollback

    champion, previous = rollback(backbone, tracking_uri)
    if as_json:
        print(json.dumps({"backbone": backbone, "champion": champion, "previous": previous}))
    else:
        name = registered_name(backbone)
        print(f"{name}: version {champion} is the champion again, {previous} the previous one.")


def _tell(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)
