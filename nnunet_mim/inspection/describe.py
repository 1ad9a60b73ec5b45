"""A checkpoint as text for a terminal."""

from __future__ import annotations

import hashlib
import re
import textwrap
from pathlib import Path

from nnunet_mim.checkpoint.locate import CARD, CONFIG, SHIPPED, WEIGHTS, shipped_weights
from nnunet_mim.errors import printable
from nnunet_mim.pretraining.report.summary import Facts, Table, commands, facts_table, join, levels_table, losses_table
from nnunet_mim.system.untrusted import read_json

WIDTH = 110


def description(facts: Facts, path: Path) -> str:
    """What a checkpoint is and how to finetune from it."""
    config, rows = facts.config, facts_table(facts)
    sizes = f"views {join(config.view_size)}, tokens {join(facts.token_size)} voxels, in the order of the plans"
    rows.insert(1, ["sizes", f"{sizes}; {config.in_channels} channel(s)"])
    verdict = facts.verdict().sentence if facts.history else "no measurements: it was not trained by this package"
    rows.append(["verdict", verdict])
    if note := facts.provenance.get("note"):
        rows.append(["note", note])
    levels = _aligned(levels_table(facts))
    parts = [printable(path, None), _pairs(rows), "levels (voxels in the order of the plans)", levels]
    losses = losses_table(facts)
    if len(losses) > 1:
        parts += ["last reconstruction loss on held-out cases", _aligned(losses)]
    parts += ["to finetune from it", *(f"  {printable(line, None)}" for line in commands(facts, path))]
    return "\n".join(parts)


def shipped_text() -> str:
    """The weights that come with the package: name, network, spacing, size, licence, checksum, and how to use them."""
    rows = [["name", "preset", "spacing in mm (order of the plans)", "MB", "licence", "SHA-256"]]
    for name in shipped_weights():
        config, weights = read_json(SHIPPED / name / CONFIG), SHIPPED / name / WEIGHTS
        licence = re.search("^license: (.+)$", (SHIPPED / name / CARD).read_text(encoding="utf-8"), re.MULTILINE)
        spacing = join(config["provenance"]["spacing"])
        size, digest = f"{weights.stat().st_size / 1e6:.1f}", hashlib.sha256(weights.read_bytes()).hexdigest()
        rows.append([name, config["mim_config"]["preset"], spacing, size, licence[1] if licence else "?", digest])
    if len(rows) == 1:
        return "no weights come with this copy of the package"
    name = rows[1][0]
    return f"{_aligned(rows)}\nto use one: mim_plan -d DATASET -pc {name}; what it is: mim_inspect {name}"


def _pairs(rows: Table) -> str:
    """Names on the left, wrapped texts on the right."""
    width = max(len(name) for name, _ in rows) + 4
    return "\n".join(
        textwrap.fill(printable(text, None), WIDTH, initial_indent=name, subsequent_indent=" " * width)
        for name, text in ((f"  {name}".ljust(width), text) for name, text in rows)
    )


def _aligned(table: Table) -> str:
    """Columns of equal width, the first aligned to the left and the others to the right."""
    table = [[printable(cell) for cell in row] for row in table]
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return "\n".join(
        "  " + "  ".join([name.ljust(first), *(cell.rjust(n) for cell, n in zip(cells, others, strict=True))])
        for name, *cells in table
    )
