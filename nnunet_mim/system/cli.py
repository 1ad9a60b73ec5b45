"""Command-line flags made from the fields of dataclasses (docs/adr/0005-flags-from-fields.md)."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import Field, fields
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one line and exit code 2, not with a block of usage.

    Flags cannot be abbreviated. Description and epilog are shown as they are written.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command line; the first flag that is not known is named with the nearest that is."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._all_flags(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists what it takes"
            self.error(f"{self.prog} does not take {unknown[0]}: {hint}")
        return options

    def error(self, message: str) -> NoReturn:
        """End the command with one line."""
        hint = "" if self.prog in message else f" ({self.prog} --help says more)"
        self.exit(2, f"error: {' '.join(message.split())}{hint}\n")

    def _all_flags(self) -> list[str]:
        """The flags of this command and of its subcommands."""
        parsers = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        return [flag for parser in parsers for flag in parser._option_string_actions]


def add_flags(parser: argparse.ArgumentParser, title: str, config: type) -> None:
    """Add a group with the flag of every field that has one; the name of the field is the destination."""
    add = parser.add_argument_group(title).add_argument
    for entry in fields(config):
        if entry.metadata.get("flags"):
            add(*entry.metadata["flags"], dest=entry.name, default=argparse.SUPPRESS, **_argument(entry))


def given_flags(options: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a dataclass that flags were given for; lists become tuples.

    What was not given is left out, so that it can still come from a file, a preset, the data or a checkpoint.
    """
    names = {entry.name for entry in fields(config)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def flags_of(config: Any) -> list[str]:
    """The command line that gives a dataclass its values: the flags of all fields that are not at their default."""
    words: list[str] = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not entry.metadata.get("flags") or value == entry.default:
            continue
        words.append(entry.metadata["flags"][0])
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, tuple) else [value])
    return words


def as_typed(**values: Any) -> argparse.Namespace:
    """What a parser returns for flags with these values."""
    return argparse.Namespace(**values)


def _argument(entry: Field) -> dict[str, Any]:
    """Arguments of `add_argument`, from the default and what `setting` was given."""
    default, given = entry.default, dict(entry.metadata["argument"])
    text = entry.metadata["default_text"]
    if text is None and not given.get("required"):
        text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if default is False:
        given.setdefault("action", "store_true")
        text = None
    elif default is True:
        given.setdefault("action", argparse.BooleanOptionalAction)
        text = "on"
    else:
        first = (default[0] if default else 0) if isinstance(default, tuple) else default
        if isinstance(first, (int, float)):
            given.setdefault("type", type(first))
        if isinstance(default, tuple):
            given.setdefault("nargs", len(default) or "*")
        if "choices" not in given:
            given.setdefault("metavar", "N" if given.get("type") is int else "X")
    meaning = entry.metadata["meaning"].replace("%", "%%")
    return {**given, "help": f"{meaning} (default: {text})" if text else meaning}
