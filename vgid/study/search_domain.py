"""What one parameter of a search space may be: a range, choices or one fixed value.

Every bound, choice and value passes ``TrialConfig``'s own constraints, so that they are stated in
one place.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from vgid.config import Config, Method, TrialConfig, parse, uses
from vgid.errors import InputError

_SET_ELSEWHERE = {
    "method": "it is the name of the section",
    "seed": "the study derives it from its own seed",
}

MOST_STEPS = 1e9
"""Optuna counts the steps of a range in decimals of 28 digits."""


class Range(Config):
    """Numbers from ``low`` to ``high``, both included; integers for an integer field.

    Attributes:
        low: smallest value.
        high: largest value.
        log: whether proposals are even in the logarithm.
        step: distance between neighbouring values, None for any value (1 for integers).
    """

    low: float
    high: float
    log: bool = False
    step: float | None = Field(None, gt=0)

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def nearest(self, value: Any) -> float:
        """The value of the range that is closest to ``value``."""
        clamped = min(max(value, self.low), self.high)
        if self.step is None:
            return clamped
        steps = round((clamped - self.low) / self.step)
        last = int((self.high - self.low) / self.step + 1e-6)
        return self.low + min(steps, last) * self.step

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
        return ", ".join(str(choice) for choice in self.choices)


def check_name(name: str, where: str, method: Method) -> None:
    """Check that a parameter exists, and that ``method`` uses it.

    Raises:
        InputError: it does not, at ``where`` in the file.
    """
    if name in _SET_ELSEWHERE:
        raise InputError(f"{where}: {name}: does not belong here; {_SET_ELSEWHERE[name]}.")
    if name not in TrialConfig.model_fields:
        known = sorted(
            field
            for field in TrialConfig.model_fields.keys() - _SET_ELSEWHERE.keys()
            if uses(method, field)
        )
        raise InputError(f"{where}: {name}: unknown parameter; known ones are {', '.join(known)}.")
    if not uses(method, name):
        raise InputError(f"{where}: {name}: method '{method}' does not use it; leave it out.")


def domain_of(name: str, raw: Mapping[str, Any], place: str, method: Method) -> Range | Choices:
    """Parse ``{low, high, ...}`` or ``{choices}`` of a parameter.

    Raises:
        InputError: it is malformed, or a bound or choice is no valid value.
    """
    where = f"{place}.{name}"
    if "choices" in raw:
        listed = parse(Choices, raw, where).choices
        valid = tuple(valid_value(name, choice, place, method) for choice in listed)
        if any(isinstance(choice, tuple) for choice in valid):
            raise InputError(f"{where}: cannot be searched; write one list, which is then fixed.")
        if len(set(valid)) < len(valid):
            raise InputError(f"{where}: choices: a choice is listed twice; leave one of them out.")
        return Choices(choices=valid)
    if TrialConfig.model_fields[name].annotation not in (int, float, int | None, float | None):
        raise InputError(f"{where}: has no order, so write 'choices: [...]' in place of a range.")
    domain = parse(Range, raw, where)
    if domain.low > domain.high:
        raise InputError(
            f"{where}: the range is empty, low {domain.low:g} is above high {domain.high:g}; "
            "swap them."
        )
    if domain.log and domain.low <= 0:
        raise InputError(
            f"{where}: a logarithmic range needs low above 0, got {domain.low:g}; "
            "raise it or leave out 'log'."
        )
    if domain.log and domain.step is not None:
        raise InputError(f"{where}: 'log' and 'step' exclude each other; leave one out.")
    if domain.step is not None and (domain.high - domain.low) / domain.step > MOST_STEPS:
        raise InputError(f"{where}: step: {domain.step:g} is next to none; leave it out.")
    if domain.step is not None and domain.high not in domain:
        raise InputError(
            f"{where}: steps of {domain.step:g} from {domain.low:g} do not reach "
            f"{domain.high:g}; change step or high."
        )
    if is_integer(name) and not float(domain.step or 1).is_integer():
        raise InputError(f"{where}: step: must be a whole number, got {domain.step:g}.")
    for bound in (domain.low, domain.high):
        valid_value(name, bound, place, method)
    return domain


def is_integer(name: str) -> bool:
    """Whether a parameter takes whole numbers only."""
    return TrialConfig.model_fields[name].annotation in (int, int | None)


def valid_value(name: str, value: Any, where: str, method: Method) -> Any:
    """The value of one parameter as ``TrialConfig`` understands it.

    Raises:
        InputError: it is no valid value.
    """
    # A Gaussian trial needs a sigma and only a Gaussian trial has one: give each its partner.
    partner: dict[str, Any] = {"method": method}
    if name == "sigma":
        partner["noise_type"] = "gaussian"
    elif (name, value) == ("noise_type", "gaussian"):
        partner["sigma"] = 1.0
    return getattr(parse(TrialConfig, {**partner, name: value}, where), name)
