"""The ``vgid`` command: a thin shell in which each command calls one function of the package.

Modules with heavy imports are imported inside the commands that need them, so that ``vgid --help``
is quick.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vgid.errors import InputError

app = typer.Typer(
    name="vgid",
    help="Unlearning in multimodal language models: data, trials, picks and deployment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make a synthetic benchmark, or check one.", no_args_is_help=True)
app.add_typer(data_app, name="data")

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def main() -> None:
    """Run the command line; bad input prints one sentence and exits with code 2."""
    try:
        app()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


@data_app.command("make")
def data_make(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of people, portraits and splits.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic benchmark of drawn, fictitious people in the MLLMU-Bench layout."""
    from vgid.benchmark import Benchmark
    from vgid.synthetic import write_benchmark

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
    as_json: JsonOption = False,
) -> None:
    """Count people, images and questions by config, and name every defect (then exit code 2)."""
    from vgid.data_check import check_benchmark

    report = check_benchmark(folder, progress=not as_json)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        report.print(Console())
    if report.defects:
        raise typer.Exit(2)


if __name__ == "__main__":
    main()
