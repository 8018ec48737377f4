"""Flags from the fields of a config: names, values, help and defaults, and bad input."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vgid.command_line import Parser
from vgid.config import Config, Flag, StudyConfig, seconds, words
from vgid.deployment.pick import PickConfig
from vgid.deployment.scores import ScoringConfig
from vgid.deployment.unlearn import UnlearnConfig
from vgid.errors import InputError


class Meal(Config):
    """Every kind of field that a flag is made of."""

    place: Annotated[Path | None, Flag(name="PLACE")] = Field(None, description="where")
    dish: Literal["soup", "rice"] = Field("soup", description="what, 100 % of it")
    size: Literal[1, 2] = Field(1, description="how much")
    guests: int = Field(2, ge=1, description="how many")
    salt: float | None = Field(None, description="grams; without it, none")
    names: Annotated[tuple[str, ...], Flag("WHO")] = Field((), description="of guests")
    spices: Annotated[tuple[str, ...], Flag("LIST", read=words)] = Field(
        ("pepper", "cumin"), description="with commas"
    )
    time_s: Annotated[float, Flag("TIME", "--time", seconds)] = Field(description="how long")
    hot: bool = Field(False, description="with chilli")
    tea: bool = Field(True, description="leave the tea out")
    secret: str = Field("x", description="has no flag")


def meal(*flags: str) -> Meal:
    parser = Parser("meal", "Cook.", Meal, without=["secret"])
    return parser.read(["--time", "5m", *flags]).config(Meal)


def test_each_type_is_read():
    assert meal() == Meal(time_s=300)
    assert meal("here", "--dish=rice", "--size", "2", "--salt", "-1.5") == Meal(
        place=Path("here"), dish="rice", size=2, salt=-1.5, time_s=300
    )
    several = meal("--names", "a", "b", "--names", "c", "--spices", "mint, dill", "--hot")
    assert several.names == ("a", "b", "c") and several.spices == ("mint", "dill")
    assert several.hot and several.tea and not meal("--no-tea").tea


def test_what_was_not_given_is_the_configs_or_the_callers_default():
    parser = Parser("meal", "Cook.", Meal).read(["--time", "1h"])
    assert parser.given == {"time_s": 3600}
    assert parser.config(Meal, guests=5) == Meal(guests=5, time_s=3600)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--guests", "many"], "command line: argument --guests: invalid int value: 'many'; see"),
        (["--guests", "0"], "command line: guests: input should be greater than or equal to 1, "),
        (["--dish", "stew"], "command line: argument --dish: invalid choice: 'stew' (choose from"),
        (["--size", "3"], "command line: argument --size: invalid choice: 3 (choose from 1, 2)"),
        (["--time", "soon"], "argument --time: 'soon' is no duration, write for example 10m; see"),
        (["--secret=y"], "command line: unrecognized arguments: --secret=y; see --help."),
        (["--gues=3"], "unrecognized arguments: --gues=3"),
        (["--uri=http://me:pw@host/"], "unrecognized arguments: --uri=http://host/; see --help."),
    ],
)
def test_bad_input_names_the_flag_and_the_remedy(flags, sentence):
    with pytest.raises(InputError) as caught:
        meal(*flags)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_field_without_default_must_be_given():
    with pytest.raises(InputError, match="are required: --time; see --help"):
        Parser("meal", "Cook.", Meal).read([])


def test_the_help_says_name_meaning_and_default():
    lines = [
        " ".join(line.split()) for line in Parser("m", "Cook.", Meal).format_help().split("\n")
    ]
    for line in (
        "PLACE where",
        "--dish {soup,rice} what, 100 % of it (default: soup)",
        "--guests N how many (default: 2)",
        "--salt X grams; without it, none",
        "--names WHO [WHO ...]",
        "--spices LIST with commas (default: pepper, cumin)",
        "--time TIME how long",
        "--hot with chilli (default: False)",
        "--no-tea leave the tea out",
    ):
        assert line in lines


@pytest.mark.parametrize("model", [StudyConfig, PickConfig, UnlearnConfig, ScoringConfig])
def test_every_flag_of_a_command_is_explained(model):
    for action in Parser("command", "Does it.", model)._actions:
        assert action.help and not action.help.startswith(" "), action.dest
