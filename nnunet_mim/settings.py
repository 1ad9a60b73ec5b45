"""Settings: one field of a frozen dataclass is one setting, with its default, meaning and flag. Standard library, YAML.

A command's flags and their help (`system/cli.py`), what `--set` and a YAML file take, and the tables of the
documentation all come from the fields (docs/adr/0005-flags-from-fields.md).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

import yaml

from nnunet_mim.errors import MiMError, printable


def setting(
    default: Any, meaning: str, flag: str | Sequence[str] = (), default_text: str | None = None, **argument: Any
) -> Any:
    """A field of a dataclass that a user can set.

    Args:
        default: immutable.
        meaning: one sentence for the help and the documentation.
        flag: option strings of the command line; none: `--set` and files only.
        default_text: what the help calls the default, where something else than the default itself decides.
        argument: of `argparse.ArgumentParser.add_argument`, where the default does not tell them (`choices`, `nargs`,
            `metavar`, `type`, `required`).
    """
    flags = (flag,) if isinstance(flag, str) else tuple(flag)
    metadata = {"meaning": meaning, "flags": flags, "default_text": default_text, "argument": argument}
    return field(default=default, metadata=metadata)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs → dict. Values are JSON, or lists with commas (64,64,64), or plain words.

    Raises:
        MiMError: no equals sign, or a key given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise MiMError(f"--set {pair}: write key=value")
        if key in settings:
            raise MiMError(f"--set {key} is given twice")
        settings[key] = _value(text)
    return settings


def check_given_once(flags: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise MiMError where a flag and --set give a setting different values. One number may stand for several alike."""
    for name in flags.keys() & settings.keys():
        one, other = (_listed(values[name]) for values in (flags, settings))
        longest = max(len(one), len(other))
        if bool(one) != bool(other) or (one * longest)[:longest] != (other * longest)[:longest]:
            raise MiMError(f"--set {name}={settings[name]} and a flag's {flags[name]} are different values: give one")


def check_known_keys(given: Sequence[str] | Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise MiMError naming the first unknown key, with the nearest known one if there is one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise MiMError(f"unknown setting '{key}' in {where}: {hint}")


def check_value(name: str, value: Any, default: Any) -> None:
    """Raise MiMError unless a value is finite and of the kind of its default; a whole number is a decimal one too."""
    if not _fits(value, default):
        shown = str(list(default) or [0, 1]) if isinstance(default, tuple) else repr(default)
        raise MiMError(f"setting '{name}' must be like {shown}, got {printable(repr(value), 80)}")


def settings_table(config: type, prefix: str = "") -> list[str]:
    """Rows of a Markdown table of the fields that can be set: name, default, meaning."""
    rows = []
    for entry in fields(config):
        if "meaning" in entry.metadata:
            text = entry.metadata["default_text"] or f"`{yaml_value(entry.default)}`"
            rows.append(f"| `{prefix}{entry.name}` | {text} | {entry.metadata['meaning']} |")
    return rows


def settings_help(config: type) -> str:
    """The fields that can be set, a line each, for the end of a command's help."""
    lines = []
    for entry in fields(config):
        if "meaning" in entry.metadata:
            text = entry.metadata["default_text"] or yaml_value(entry.default)
            lines.append(f"  {entry.name} (default: {text})\n      {entry.metadata['meaning']}")
    return "\n".join(lines)


def yaml_value(value: Any) -> str:
    """A value as it stands in a YAML file, in one line."""
    plain = json.loads(json.dumps(value))  # without tuples, and nothing shared that YAML would name
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return [_value(part) for part in text.split(",")] if "," in text else text


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(v, default[0] if default else 0) for v in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
