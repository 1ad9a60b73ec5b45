"""Reading what others have written: JSON and YAML of limited size and depth, and text for terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnunet_mim.errors import MiMError

MAX_DEPTH = 40
MAX_VALUES = 2_000_000


def check_extent(content: Any, place: str) -> None:
    """Refuse nested dicts, lists and tuples that are deep, hold themselves, or hold very much by holding it repeatedly.

    Args:
        content: as it was read.
        place: named in the error.

    Raises:
        MiMError: more than MAX_DEPTH levels, or MAX_VALUES values, of which each place counts.
    """
    known: dict[int, tuple[int, int]] = {}

    def extent(value: Any, depth: int) -> tuple[int, int]:  # number of values, and of levels
        if not isinstance(value, Mapping | list | tuple | set):
            return 1, 0
        if id(value) not in known and depth <= MAX_DEPTH:
            children = [extent(child, depth + 1) for child in _children(value).values()]
            known[id(value)] = 1 + sum(n for n, _ in children), 1 + max((levels for _, levels in children), default=0)
        n_values, levels = known.get(id(value), (1, MAX_DEPTH))
        if depth + levels > MAX_DEPTH or n_values > MAX_VALUES:
            raise MiMError(f"{place} is refused: its content is nested too deep or too large; take another copy")
        return n_values, levels

    extent(content, 1)


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested containers that are none themselves, with their keys joined by points after a name."""
    if not isinstance(content, Mapping | list | tuple | set):
        yield name, content
        return
    for key, child in _children(content).items():
        yield from leaves(child, f"{name}.{key}" if name else str(key))


def _children(container: Any) -> Mapping[Any, Any]:
    return container if isinstance(container, Mapping) else dict(enumerate(container))


def printable(text: object) -> str:
    """A text from a file for one line of a terminal: control characters are escaped, and a long one is cut short."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
