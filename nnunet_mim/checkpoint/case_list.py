"""The list of the cases of a large pretraining: beside its checkpoints, in a file that is written once for all of them.

A record takes 1.4 kB. Each save of a run on 100,000 cases would write 140 MB of them again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.untrusted import limited, parse_json

MOST_INSIDE = 10_000
"""records that stand in a checkpoint itself, so that most are one file"""
PATTERN = "cases_*.jsonl"
NAME = re.compile(r"cases_[0-9a-f]{16}\.jsonl")
LONGEST = 16_384
"""bytes of a record"""


def put_aside(provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Provenance as it is stored: where there are more than MOST_INSIDE records, `cases` holds none of them, and
    `cases_file` the name, SHA-256 and length of a file in `folder` that does.

    Raises OSError where the file cannot be written.
    """
    records = provenance.get("cases") or []
    if len(records) <= MOST_INSIDE:
        return dict(provenance)
    content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / f"cases_{sha256[:16]}.jsonl"
    if not path.is_file():
        write_atomically(path, content)
    return {**provenance, "cases": [], "cases_file": {"name": path.name, "sha256": sha256, "records": len(records)}}


def put_back(provenance: Mapping[str, Any], checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The inverse of `put_aside`.

    Args:
        provenance: as it is stored.
        checkpoint: file or folder that it is of, for messages.
        folder: holds the list.

    Raises:
        MiMError: the list is missing, damaged or another one.
    """
    named = provenance.get("cases_file")
    if named is None:
        return dict(provenance)
    try:
        name, sha256, n = str(named["name"]), str(named["sha256"]), int(named["records"])
        if not NAME.fullmatch(name):
            raise ValueError("its name is none of a list")
    except (TypeError, KeyError, ValueError) as error:
        raise MiMError(f"{checkpoint}: cases_file in provenance names no list of cases: take another copy") from error
    path = folder / name
    try:
        content = limited(path, LONGEST * n)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("it has another checksum")
        lines = content.splitlines()
        if len(lines) != n:
            raise ValueError(f"it holds {len(lines)} records instead of {n}")
        records = [parse_json(line) for line in lines]
    except FileNotFoundError:
        raise MiMError(
            f"{checkpoint} was trained on {n} cases, which are listed in {name}, and {path} does not exist: copy it "
            "from where the checkpoint comes from"
        ) from None
    except (OSError, ValueError) as error:
        raise MiMError(f"cannot read {path} ({error}): copy it again from where the checkpoint comes from") from error
    rest = {key: value for key, value in provenance.items() if key != "cases_file"}
    return {**rest, "cases": records}
