"""Entries of a YAML file of an experiment as the fields of dataclasses, checked against their types."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nnunet_mim.checkpoint.locate import is_name
from nnunet_mim.errors import MiMError

Count = Annotated[int, 1]
"""A whole number; the second argument is the smallest one allowed."""
SlurmParameters = Annotated[
    Mapping[str, Any], "parameters of submitit, such as {slurm_partition: gpu, timeout_min: 1440}"
]  # fmt: skip
Entries = TypeVar("Entries")


def checkpoint_of(given: str, folder: Path) -> str:
    """A checkpoint as a file in `folder` names it: a path counts from there, unless it exists nowhere and is a name."""
    path = folder / given
    return given if is_name(given) and not path.exists() else str(path)


def read_entries(cls: type[Entries], content: Any, where: str = "", **given: Any) -> Entries:
    """A dataclass from a mapping of its fields' names to values, which are checked against the fields' types.

    None stands for a field's default; fields in `given` are no entries of the file. Raises MiMError with the entry,
    whose place in the file is `where`.
    """
    prefix = f"{where}: " if where else ""
    entries = {f.name: f for f in fields(cls) if f.name not in given}  # type: ignore[arg-type]
    if not isinstance(content, Mapping):
        raise MiMError(f"{prefix}give names and values ({', '.join(sorted(entries))})")
    if unknown := sorted(set(map(str, content)) - set(entries)):
        raise MiMError(f"{prefix}unknown entry '{unknown[0]}': there are {', '.join(sorted(entries))}")
    required = [name for name, f in entries.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if not content.get(name)]:
        raise MiMError(f"{prefix}'{missing[0]}' is missing")
    types = get_type_hints(cls, include_extras=True)
    values = {k: _value(value, types[k], prefix + k) for k, value in content.items() if value is not None}
    return cls(**given, **values)


def _value(value: Any, kind: Any, where: str) -> Any:
    """A value of the file as a field's type has it. MiMError where it is no such value."""
    if NoneType in get_args(kind):
        kind = next(option for option in get_args(kind) if option is not NoneType)
    kind, *details = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is tuple and is_dataclass(arguments[0]):
        return _named_entries(arguments[0], value, where)
    if origin is tuple:
        return tuple(_value(item, arguments[0], where) for item in _listed(value))
    if origin is Literal and value not in arguments:
        raise MiMError(f"{where} {value}: give {', '.join(arguments[:-1])} or {arguments[-1]}")
    if origin in (int, float):
        numbers = (int,) if origin is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, numbers) or not details[0] <= value < math.inf:
            raise MiMError(f"{where} {value}: give a {'whole ' * (origin is int)}number from {details[0]}")
    if origin is bool and not isinstance(value, bool):
        raise MiMError(f"{where} {value}: give true or false")
    if origin is Mapping and not isinstance(value, Mapping):
        raise MiMError(f"{where}: give {details[0]}")
    if origin is Path:
        return Path(str(value))
    return origin(value) if origin in (str, float) else value


def _named_entries(cls: Any, content: Any, where: str) -> tuple[Any, ...]:
    """Dataclasses from their names alone, or from a mapping of names to entries. The name is the first field."""
    if not isinstance(content, Mapping):
        names = [str(name) for name in _listed(content)]
        if len(set(names)) < len(names):
            raise MiMError(f"{where}: {max(names, key=names.count)} is there twice")
        content = dict.fromkeys(names)
    first = fields(cls)[0].name
    return tuple(
        read_entries(cls, own or {}, f"{where}: {name}", **{first: str(name)}) for name, own in content.items()
    )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
