"""Reading what others have written: JSON and YAML of limited size and depth."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from nnunet_mim.errors import MiMError, printable

MAX_DEPTH = 40
MAX_VALUES = 1_000_000
MAX_NUMBER = 2**63
MAX_JSON = 64 * 2**20
"""bytes of a JSON file"""
MAX_LOG = 2 * 2**30
"""bytes of a log of a preparation: 100,000 cases, 20 kB each"""
MAX_YAML = 32 * 2**10
"""bytes of a YAML file, which is read a hundred times slower"""
MAX_TABLE = 16 * 2**20
"""bytes of a CSV file: 100,000 rows"""
MAX_BRACKETS = 1000
"""lists and mappings in brackets in a YAML file"""
NOT_REGULAR = "no regular file, but a folder, pipe, socket or device"
CONTAINERS = (dict, list, tuple, set)
OCTAL = re.compile(r"[-+]?0[0-7_]+")
"""what YAML reads as a number of other digits than are there, as well as numbers with a colon"""
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_json(path: Path, remedy: str = "restore the file, or delete it and plan anew") -> Any:
    """The content of a JSON file.

    Raises:
        MiMError: it cannot be read, or is too large or nested too deep to be what it should be.
    """
    try:
        return parse_json(limited(path, MAX_JSON))
    except (OSError, ValueError) as error:
        raise MiMError(f"cannot read {path} ({printable(error)}): {remedy}") from error


def parse_json(text: str | bytes) -> Any:
    """The value that a text in JSON stands for.

    Raises ValueError where there is none, a name is there twice, or it is too large or deep.
    """
    content = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    if sum(map(content.count, (b",", b"{", b"["))) > MAX_VALUES:  # about the number of values
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_with_names_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_extent(value)
    return value


def _with_names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice} is there twice")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        MiMError: missing, too large, not YAML, with aliases, nested too deep, or no mapping of names to values.
    """
    try:
        content = limited(path, MAX_YAML, pipe=True)  # a shell's <(...) is one
        if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:
            raise ValueError("it is nested too deep or too large")
        settings = yaml.load(content, _LoaderWithoutAliases)
        check_extent(settings)
        settings = _with_numbers(settings)
        _check_plain(settings)
    except MiMError as error:
        raise MiMError(f"{path}: {error}") from None
    except OSError as error:
        raise MiMError(f"cannot read {path} ({error.strerror}): give another file") from error
    except RecursionError:
        raise MiMError(f"{path} is not valid YAML (it is nested too deep): correct it") from None
    except (yaml.YAMLError, ValueError) as error:  # dates and numbers that cannot be are ValueErrors
        raise MiMError(f"{path} is not valid YAML ({printable(' '.join(str(error).split()))}): correct it") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise MiMError(f"{path} must hold lines like 'iterations: 20000'")
    return settings


class _LoaderWithoutAliases(yaml.SafeLoader):
    """PyYAML's safe loader. Aliases, which make ten lines a billion values, and tags are in no file of this package."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases, such as *name, are not allowed")
        if getattr(self.peek_event(), "tag", None):  # PyYAML has no check of what a tag stands before
            raise yaml.YAMLError("tags, such as !!int, are not allowed")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        if OCTAL.fullmatch(node.value):
            raise MiMError(f"{node.value}: YAML reads numbers that begin with 0 as octal ones: leave the 0 out")
        if ":" in node.value:
            raise MiMError(f"{node.value}: YAML reads it as a number to base 60: put it in quotes")
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((name for name, n in names.items() if n > 1), None):
            raise yaml.YAMLError(f"{twice} is there twice")
        return super().construct_mapping(node, deep)


_LoaderWithoutAliases.add_constructor("tag:yaml.org,2002:int", _LoaderWithoutAliases.construct_yaml_int)


def limited(path: Path, limit: int, pipe: bool = False, start: int = 0) -> bytes:
    """The bytes of a file that somebody has named, from `start` on: reading waits not for ever, nor fills the memory.

    Raises OSError, or ValueError where there are more bytes than the limit, or it is a pipe (unless that is allowed),
    socket, device or folder.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not (pipe and stat.S_ISFIFO(status.st_mode)):
        raise ValueError(f"it is {NOT_REGULAR}")
    with path.open("rb") as file:
        if start:
            file.seek(start)
        content = b"" if status.st_size > limit else file.read(limit + 1 if pipe else status.st_size + 1)
    if max(len(content), status.st_size) > limit:
        raise ValueError(f"it is larger than {limit // 1024:,} kB")
    return content


def table_rows(text: str, separator: str = ",", one_line: bool = False) -> list[list[str]]:
    """The rows of a text in CSV, no spaces around cells; `one_line`: a cell holds no line break.

    Raises ValueError where quotes or line breaks are wrong.
    """
    try:
        read = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
        rows = [[cell.strip() for cell in row] for row in read]
    except csv.Error as error:
        raise ValueError(str(error)) from None
    for number, row in enumerate(rows, start=1):
        if one_line and any("\n" in cell or "\r" in cell for cell in row):
            raise ValueError(f"row {number} has a cell of several lines")
    return rows


def _check_plain(value: Any) -> None:
    """Raise ValueError for what YAML knows and no setting is: bytes, sets, NaN, infinity, names that are no texts."""
    if isinstance(value, dict):
        if strange := [key for key in value if isinstance(key, bool) or not isinstance(key, (str, int))]:
            raise ValueError(f"{strange[0]!r} is no name: put it in quotes")
        value = list(value.values())
    if isinstance(value, list):
        for child in value:
            _check_plain(child)
    elif not (value is None or isinstance(value, (str, int, float, date))):
        raise ValueError(f"it holds a {type(value).__name__}: put it in quotes")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds the number {value}")


def _with_numbers(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for a word."""
    if isinstance(value, dict):
        return {key: _with_numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_with_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def check_extent(content: Any) -> None:
    """Refuse nested dicts, lists and tuples that are deep, hold themselves, or hold very much by holding it repeatedly.

    Raises:
        ValueError: more than MAX_DEPTH levels, or MAX_VALUES values, of which each place counts, or a whole number of
            more than 64 bits.
    """
    known: dict[int, tuple[int, int]] = {}

    def extent(value: Any, depth: int) -> tuple[int, int]:  # number of values, and of levels
        if id(value) not in known and depth <= MAX_DEPTH:
            n_values, levels = 1, 1
            for child in value.values() if isinstance(value, Mapping) else value:
                if isinstance(child, int) and not -MAX_NUMBER <= child < MAX_NUMBER:
                    raise ValueError("it holds a number of more than 64 bits")
                n, below = extent(child, depth + 1) if isinstance(child, CONTAINERS) else (1, 0)
                n_values, levels = n_values + n, max(levels, 1 + below)
            known[id(value)] = n_values, levels
        n_values, levels = known.get(id(value), (1, MAX_DEPTH))
        if depth + levels > MAX_DEPTH or n_values > MAX_VALUES:
            raise ValueError("it is nested too deep or too large")
        return n_values, levels

    if isinstance(content, CONTAINERS):
        extent(content, 1)


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested containers that are none themselves, with their keys joined by points after a name."""
    if not isinstance(content, CONTAINERS):
        yield name, content
        return
    for key, child in content.items() if isinstance(content, Mapping) else enumerate(content):
        yield from leaves(child, f"{name}.{key}" if name else str(key))
