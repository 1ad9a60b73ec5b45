"""Fields as settings: flags, help, checks and tables."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.mim_plans import PlanSettings
from nnunet_mim.pretraining.options import DataOptions, RunOptions
from nnunet_mim.settings import check_value, parse_settings, setting, settings_help, settings_table
from nnunet_mim.system.cli import add_flags, given_flags
from nnunet_mim.trainers.finetune_config import FinetuneConfig

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Oven:
    degrees: int = setting(180, "temperature", ("-t", "--degrees"))
    rack: tuple[int, int] = setting((1, 2), "racks", "--rack")
    fan: bool = setting(False, "with the fan", "--fan")
    light: bool = setting(True, "with light", "--light")
    hours: float = setting(1.5, "time of 100 %")
    name: str = "oven"


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_flags(parser, "oven", Oven)
    return parser.parse_args(words)


def test_only_flags_that_are_typed_are_given():
    assert given_flags(parsed(), Oven) == {}
    typed = parsed("-t", "200", "--rack", "3", "4", "--fan", "--no-light")
    assert given_flags(typed, Oven) == {"degrees": 200, "rack": (3, 4), "fan": True, "light": False}
    assert Oven(**given_flags(typed, Oven)) == Oven(200, (3, 4), fan=True, light=False)


def test_types_and_numbers_of_values_come_from_the_default():
    for words in (("-t", "hot"), ("--rack", "1"), ("--hours", "2"), ("--name", "x")):
        with pytest.raises(SystemExit):
            parsed(*words)


def test_help_and_table_say_default_and_meaning():
    rows = settings_table(Oven, "oven.")
    assert rows[1] == "| `oven.rack` | `[1, 2]` | racks |"
    assert len(rows) == 5, "a plain field is no setting"
    assert "  hours (default: 1.5)\n      time of 100 %" in settings_help(Oven)


def test_a_value_is_of_the_kind_of_its_default():
    check_value("hours", 2, 1.5)
    check_value("rack", [5], (1, 2))
    for value, default in ((1.5, 1), (True, 1), ("a", 1), (1, True), ([1.5], (1, 2))):
        with pytest.raises(MiMError, match="must be like"):
            check_value("x", value, default)


@pytest.mark.parametrize("config", [DataOptions, RunOptions])
def test_every_option_of_a_run_has_a_flag(config):
    assert all(entry.metadata["flags"] for entry in fields(config))


def test_the_page_of_the_recipe_is_up_to_date():
    rows = [*settings_table(FinetuneConfig), *settings_table(PlanSettings)]
    assert "\n".join(rows) in (DOCS / "finetuning.md").read_text()


def test_values_on_the_command_line():
    pairs = ["a=1", "b=0.5", "c=64,64,64", "d=cosine", "e=true", "f=[1,2]", "g=null", "h=3,1.5,1"]
    assert parse_settings(pairs) == {
        "a": 1, "b": 0.5, "c": [64, 64, 64], "d": "cosine", "e": True, "f": [1, 2], "g": None, "h": [3, 1.5, 1],
    }  # fmt: skip
    for bad in ("a", "a=", "=1"):
        with pytest.raises(MiMError, match="key=value"):
            parse_settings([bad])
    with pytest.raises(MiMError, match="twice"):
        parse_settings(["a=1", "a=2"])
