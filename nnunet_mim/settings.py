"""Settings that a user writes by hand: `key=value` words of a command line, and YAML files. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from nnunet_mim.errors import MiMError

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def parse_settings(pairs: list[str]) -> dict[str, Any]:
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


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [_value(part) for part in text.split(",")] if "," in text else text


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        MiMError: missing, not YAML, or no mapping of names to values.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MiMError(f"cannot read {path} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MiMError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise MiMError(f"{path} must hold lines like 'iterations: 20000'")
    return {key: _with_numbers(value) for key, value in settings.items()}


def _with_numbers(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for a word."""
    if isinstance(value, dict):
        return {key: _with_numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_with_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value
