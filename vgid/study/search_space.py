"""The search space of a study: a section of a YAML file, checked before anything starts.

``search_spaces/README.md`` says what may stand in one. Every bound, choice and value passes the
constraints of its field of ``TrialConfig``, so that they are stated in one place.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import Field, create_model, model_validator

from vgid.config import Config, Method, TrialConfig, paper_default, parse, uses
from vgid.errors import InputError

if TYPE_CHECKING:
    import optuna

# The project's own search spaces, one ``<backbone>.yaml`` each: beside the package in a checkout,
# in the working folder if the package was installed away from it.
_BESIDE_THE_PACKAGE = Path(__file__).resolve().parents[2] / "search_spaces"
FOLDER = _BESIDE_THE_PACKAGE if _BESIDE_THE_PACKAGE.is_dir() else Path("search_spaces").absolute()
PROPOSALS_TRIED = 1000  # points at the ends of the ranges must be refused before a space is
MOST_STEPS = 1e9  # Optuna counts the steps of a range in decimals of 28 digits

# Each field by itself: what ``TrialConfig`` asks of fields together is a whole trial's affair.
_FIELDS: type[Config] = create_model(
    "Fields",
    __base__=Config,
    **{name: (field.annotation, field) for name, field in TrialConfig.model_fields.items()},  # type: ignore[call-overload]
)


class Range(Config):
    """Numbers from ``low`` to ``high``, both included; integers for an integer field."""

    low: float
    high: float
    log: bool = False  # whether proposals are even in the logarithm
    step: float | None = Field(None, gt=0)  # between neighbours; None: any value (1 for integers)

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        low, high, step = self.low, self.high, self.step
        if low > high:
            raise ValueError(f"the range is empty, low {low:g} is above high {high:g}; swap them")
        if self.log and low <= 0:
            raise ValueError(f"'log' needs low above 0, got {low:g}; raise it or leave out 'log'")
        if step is not None and self.log:
            raise ValueError("'log' and 'step' exclude each other; leave one out")
        if step is not None and (high - low) / step > MOST_STEPS:
            raise ValueError(f"step: {step:g} is next to none; leave it out")
        if step is not None and high not in self:
            raise ValueError(
                f"steps of {step:g} from {low:g} do not reach {high:g}; change step or high"
            )
        return self

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1)
        return self.step is None or abs(steps - round(steps)) < 1e-6

    def nearest(self, value: Any) -> float:
        """The value of the range that is closest to ``value``."""
        clamped = min(max(value, self.low), self.high)
        if self.step is None:
            return clamped
        return self.low + round((clamped - self.low) / self.step) * self.step

    def __str__(self) -> str:
        steps = "" if self.step is None else f" in steps of {self.step:g}"
        return f"{self.low:g} to {self.high:g}{steps}"


class Choices(Config):
    """One value out of a few."""

    choices: tuple[Any, ...] = Field(min_length=1)

    def __contains__(self, value: object) -> bool:
        return value in self.choices

    def nearest(self, value: Any) -> Any:
        """``value`` if it is a choice, otherwise the first choice."""
        return value if value in self.choices else self.choices[0]

    def __str__(self) -> str:
        return ", ".join(map(str, self.choices))


class _Section(Config):
    parameters: dict[str, Any] = Field(default_factory=dict)
    first_points: list[dict[str, Any]] | None = None


class _File(Config):
    backbone: str
    extends: str | None = None
    shared: dict[str, Any] = Field(default_factory=dict)
    methods: dict[Method, _Section] = Field(default_factory=dict)


@dataclass(frozen=True)
class SearchSpace:
    """What a study searches, what it holds fixed, and where it starts."""

    source: str  # the file and the section, for messages
    sha256: str  # of the file, followed by those that it extends
    backbone: str
    method: Method
    searched: Mapping[str, Range | Choices]  # in the order in which they are asked for
    fixed: Mapping[str, Any]
    first_points: tuple[dict[str, Any], ...] = ()  # complete: searched and fixed fields

    @classmethod
    def load(cls, path: Path, backbone: str = "tiny-llava", method: Method = "vgid") -> Self:
        """Read a file, meant for ``backbone``, with a method's section; ``InputError`` if wrong."""
        chain = _chain(path)
        if (own := chain[0][1].backbone) != backbone:
            raise InputError(
                f"{path}: backbone: the file is meant for '{own}' and the study runs '{backbone}'; "
                "name the backbone's own file with --search-space."
            )
        given, points = _merged(chain, method)
        for name, (place, _) in given.items():
            _check_name(name, place, method)
        searched: dict[str, Range | Choices] = {}
        fixed: dict[str, Any] = {}
        # TrialConfig's order: fixed across files, and noise_type comes before its sigma.
        for name in TrialConfig.model_fields:
            place, value = given.get(name, ("", None))
            if isinstance(value, Mapping):
                searched[name] = _domain(name, value, place)
            elif value is not None:
                fixed[name] = _valid(name, value, place)
        read = hashlib.sha256(b"".join(file.read_bytes() for file, _ in chain)).hexdigest()
        space = cls(f"{path}: methods.{method}", read, backbone, method, searched, fixed)
        needs_sigma = "gaussian" in space.domain("noise_type")
        if needs_sigma and "sigma" not in searched and "sigma" not in fixed:
            raise InputError(
                f"{space.source}.parameters.sigma: noise type 'gaussian' needs a sigma; "
                "add for example 'sigma: {low: 0.2, high: 1.0}'."
            )
        space._check_some_proposal()
        return space._with_first_points(points)

    @property
    def section(self) -> dict[str, Any]:
        """The section as a file without ``extends`` or ``shared`` would have it, as plain data."""
        searched = {k: v.model_dump(exclude_defaults=True) for k, v in self.searched.items()}
        return {"parameters": {**self.fixed, **searched}, "first_points": list(self.first_points)}

    def domain(self, name: str) -> Range | Choices:
        """What a field may be; a field that is not searched has one choice."""
        fixed = self.fixed.get(name, TrialConfig.model_fields[name].default)
        return self.searched.get(name, Choices(choices=(fixed,)))

    def suggest(self, trial: "optuna.trial.Trial") -> dict[str, Any]:
        """Ask Optuna for a point: fields of ``TrialConfig``, searched and fixed."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        point: dict[str, Any] = {}
        for name in self._asked(point):
            asked = self._distribution(name)
            if isinstance(asked, CategoricalDistribution):
                point[name] = trial.suggest_categorical(name, asked.choices)
            else:
                whole = isinstance(asked, IntDistribution)
                suggest = trial.suggest_int if whole else trial.suggest_float
                point[name] = suggest(name, asked.low, asked.high, step=asked.step, log=asked.log)
        return self._with_fixed(point)

    def distributions(
        self, point: Mapping[str, Any]
    ) -> "dict[str, optuna.distributions.BaseDistribution]":
        """What the trial of a point was asked for."""
        return {name: self._distribution(name) for name in self._asked(point)}

    def _distribution(self, name: str) -> Any:
        from optuna import distributions

        domain = self.searched[name]
        if isinstance(domain, Choices):
            return distributions.CategoricalDistribution(list(domain.choices))
        low, high, step = domain.low, domain.high, domain.step
        if _is_integer(name):
            step = int(step or 1)
            return distributions.IntDistribution(int(low), int(high), log=domain.log, step=step)
        return distributions.FloatDistribution(low, high, log=domain.log, step=step)

    def trial_config(self, params: Mapping[str, Any], seed: int) -> TrialConfig:
        """The trial of a point, perhaps without fixed fields; ``InputError`` if it is not one."""
        values = {**self._with_fixed(params), "method": self.method, "seed": seed}
        return parse(TrialConfig, values, self.source)

    def _is_gaussian(self, point: Mapping[str, Any]) -> bool:
        default = TrialConfig.model_fields["noise_type"].default
        return point.get("noise_type", self.fixed.get("noise_type", default)) == "gaussian"

    def _asked(self, point: Mapping[str, Any]) -> Iterator[str]:
        """The searched fields that a point has: sigma only if its noise, asked before, has one."""
        return (name for name in self.searched if name != "sigma" or self._is_gaussian(point))

    def _with_fixed(self, point: Mapping[str, Any]) -> dict[str, Any]:
        values = {**self.fixed, **point}
        if not self._is_gaussian(point):
            values.pop("sigma", None)
        return values

    def _check_some_proposal(self) -> None:
        """Refuse a space in which fields exclude each other whatever is proposed."""
        # At the ends of the ranges, since constraints between fields bite there first; at random,
        # since twelve fields with two ends each are 4,096 combinations.
        draw = random.Random(0)
        ends = {
            name: domain.choices if isinstance(domain, Choices) else (domain.low, domain.high)
            for name, domain in self.searched.items()
        }
        for left in reversed(range(PROPOSALS_TRIED)):
            try:
                self.trial_config({name: draw.choice(some) for name, some in ends.items()}, seed=0)
                return
            except InputError:
                if not left:
                    raise

    def _with_first_points(self, points: list[dict[str, Any]] | None) -> Self:
        """The space with its first points; without any, the paper's setting if it lies inside."""
        if points is None:
            default = paper_default(self.method)
            inside = all(value in self.domain(name) for name, value in default.items())
            points = [default] if inside else []
        where = f"{self.source}.first_points, number"
        complete = (self.completed(p, f"{where} {n}") for n, p in enumerate(points, start=1))
        return replace(self, first_points=tuple(complete))

    def started_from(self, points: Iterable[Mapping[str, Any]]) -> Self:
        """The space whose first point is followed by these, and then by its others, each once."""
        own = self.first_points
        merged = [*own[:1], *map(self._with_fixed, points), *own[1:]]
        once = tuple(point for n, point in enumerate(merged) if point not in merged[:n])
        return replace(self, first_points=once)

    def completed(self, point: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A point with all searched and fixed fields; ``InputError`` if it lies not in the space.

        What it leaves out is the default, moved into the range if need be.
        """
        for name in point:
            _check_name(name, where, self.method)
        valid = {name: _valid(name, value, where) for name, value in point.items()}
        if valid.get("sigma", 0.0) is None:
            del valid["sigma"]
        for name, value in valid.items():
            domain = self.domain(name)
            if value not in domain:
                raise InputError(
                    f"{where}: {name}: {value} lies outside the search space ({domain}); "
                    "change the point or the parameter."
                )
        filled = dict(valid)
        for name in self._asked(filled):
            if name not in filled:
                default = TrialConfig.model_fields[name].default
                value = self.searched[name].nearest(1.0 if default is None else default)
                filled[name] = int(value) if _is_integer(name) else value
        filled = self._with_fixed(filled)
        parse(TrialConfig, {**filled, **valid, "method": self.method}, where)
        return filled


def _check_name(name: str, where: str, method: Method) -> None:
    # The method is the section's name, and the seed the study's.
    fields = TrialConfig.model_fields.keys() - {"method", "seed"}
    known = sorted(field for field in fields if uses(method, field))
    if name not in known:
        raise InputError(
            f"{where}: {name}: method '{method}' has no such parameter; it has {', '.join(known)}."
        )


def _domain(name: str, raw: Mapping[str, Any], place: str) -> Range | Choices:
    where = f"{place}.{name}"
    if "choices" in raw:
        listed = parse(Choices, raw, where).choices
        valid = tuple(_valid(name, choice, place) for choice in listed)
        if any(isinstance(choice, tuple) for choice in valid):
            raise InputError(f"{where}: cannot be searched; write one list, which is then fixed.")
        if len(set(valid)) < len(valid):
            raise InputError(f"{where}: choices: a choice is listed twice; leave one of them out.")
        return Choices(choices=valid)
    if TrialConfig.model_fields[name].annotation not in (int, float, int | None, float | None):
        raise InputError(f"{where}: has no order, so write 'choices: [...]' in place of a range.")
    domain = parse(Range, raw, where)
    if _is_integer(name) and not float(domain.step or 1).is_integer():
        raise InputError(f"{where}: step: must be a whole number, got {domain.step:g}.")
    for bound in (domain.low, domain.high):
        _valid(name, bound, place)
    return domain


def _is_integer(name: str) -> bool:
    return TrialConfig.model_fields[name].annotation in (int, int | None)


def _valid(name: str, value: Any, where: str) -> Any:
    """The value of one parameter as ``TrialConfig`` understands it."""
    return getattr(parse(_FIELDS, {name: value}, where), name)


def _parsed(path: Path) -> _File:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); name an existing file with --search-space."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-99-99, no text
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise InputError(
            f"{path}: is not valid YAML{line}; correct it or start from a file in search_spaces."
        ) from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise InputError(
            f"{path}: must be a mapping with the keys {', '.join(_File.model_fields)}."
        )
    return parse(_File, raw, str(path))


def _chain(path: Path) -> list[tuple[Path, _File]]:
    """A file, the one that it extends, the one that this extends, and so on."""
    from vgid.models.backbones import BACKBONES

    chain = [(path, _parsed(path))]
    while (named := chain[-1][1].extends) is not None:
        file = chain[-1][0]
        above = FOLDER / f"{named}.yaml" if named in BACKBONES else file.parent / named
        if not above.is_file():
            raise InputError(
                f"{file}: extends: there is no file {above}; write a path relative to this file, "
                f"or one of {', '.join(BACKBONES)}."
            )
        if any(above.samefile(seen) for seen, _ in chain):
            raise InputError(
                f"{file}: extends: {named} extends this file in turn; take one 'extends' out."
            )
        chain.append((above, _parsed(above)))
    return chain


def _merged(
    chain: list[tuple[Path, _File]], method: Method
) -> tuple[dict[str, tuple[str, Any]], list[dict[str, Any]] | None]:
    """The parameters of a method by name, each with the place where it stands; the first points."""
    oldest_first = chain[::-1]
    sections = [(f, file.methods[method]) for f, file in oldest_first if method in file.methods]
    if not sections:
        others = dict.fromkeys(name for _, file in chain for name in file.methods)
        raise InputError(
            f"{chain[0][0]}: methods: there is no section '{method}'; add one, or choose another "
            f"--method ({', '.join(others) or 'there is none'})."
        )
    places = [(f"{path}: shared", file.shared) for path, file in oldest_first]
    places += [(f"{f}: methods.{method}.parameters", section.parameters) for f, section in sections]
    given = {name: (place, value) for place, raw in places for name, value in raw.items()}
    points = [s.first_points for _, s in sections if "first_points" in s.model_fields_set]
    return given, points[-1] if points else None
