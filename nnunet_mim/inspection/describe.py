"""A checkpoint in text, for a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

from nnunet_mim.pretraining.report.summary import Facts, Table, commands, facts_table, levels_table, losses_table

WIDTH = 110


def description(facts: Facts, path: Path) -> str:
    """What a checkpoint is and how to use it.

    Args:
        facts: of the checkpoint.
        path: where it lies, for the commands.
    """
    rows = [[name, text] for name, text in facts_table(facts)]
    sizes = ", ".join(f"{what} {' × '.join(map(str, size))}" for what, size in (
        ("views", facts.config.view_size), ("tokens", facts.token_size),
    ))  # fmt: skip
    rows.insert(1, ["sizes", f"{sizes} voxels; {facts.config.in_channels} channel(s)"])
    verdict = facts.verdict().sentence if facts.history else "no measurements: it was not trained by this package"
    rows.append(["verdict", verdict])
    if note := facts.provenance.get("note"):
        rows.append(["note", note])
    parts = [str(path), _pairs(rows), "levels (voxels in the order of the plans)", _aligned(levels_table(facts))]
    losses = losses_table(facts)
    if len(losses) > 1:
        parts += ["last reconstruction loss on held-out cases", _aligned(losses)]
    parts += ["to finetune from it", textwrap.indent("\n".join(commands(facts, path)), "  ")]
    return "\n".join(parts)


def _pairs(rows: Table) -> str:
    """Names on the left, wrapped texts on the right."""
    indent = max(len(name) for name, _ in rows) + 4
    lines = []
    for name, text in rows:
        first = f"  {name}".ljust(indent)
        lines.append(textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * indent))
    return "\n".join(lines)


def _aligned(table: Table) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)
