"""What tables and comparisons start from: the benchmark to use, and each method's setting."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgid.config import Config, Method, TrialConfig, parse
from vgid.errors import InputError
from vgid.report.records import write_study
from vgid.study.plan import refuse_without_data


class Settings(Config):
    """A settings file: by method the fields of ``TrialConfig`` that were tuned on one backbone."""

    backbone: str
    methods: dict[Method, dict[str, Any]]


def prepare_data(backbones: Sequence[str], data: Path | None, folder: Path) -> Path:
    """The benchmark to use: the one given, or the embedded backbones' own, written once."""
    if data is not None:
        return data
    for name in backbones:
        refuse_without_data(name)
    own = folder / "data"
    if not own.exists():
        from vgid.data.synthetic import write_benchmark

        write_benchmark(own, progress=sys.stderr.isatty())
    return own


def default_trials(backbone: str, methods: Sequence[Method]) -> dict[Method, TrialConfig]:
    """Each method's default for a backbone: the first point of its search-space section."""
    from vgid.study.search_space import FOLDER, SearchSpace

    file = FOLDER / f"{backbone}.yaml"
    spaces = {method: SearchSpace.load(file, backbone, method) for method in methods}
    return {m: s.trial_config((s.first_points or [{}])[0], seed=0) for m, s in spaces.items()}


def read_settings(path: Path) -> tuple[str, dict[Method, TrialConfig]]:
    """The backbone and the settings by method of a file; InputError where one is not valid."""
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON of backbone and methods"
        raise InputError(f"{path}: cannot be read ({reason}); check --settings.") from None
    settings = parse(Settings, content, str(path))
    return settings.backbone, {
        method: parse(TrialConfig, {**values, "method": method}, f"{path}: {method}")
        for method, values in settings.methods.items()
    }


def write_settings(path: Path, backbone: str, trials: Mapping[Method, TrialConfig]) -> None:
    """Write a settings file that ``read_settings`` reads."""
    methods = {
        method: trial.model_dump(mode="json", exclude={"method", "seed"}, exclude_defaults=True)
        for method, trial in trials.items()
    }
    write_study(path, {"backbone": backbone, "methods": methods})
