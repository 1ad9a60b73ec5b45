"""Command-line flags made from the fields of dataclasses (docs/adr/0005-flags-from-fields.md)."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any


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
