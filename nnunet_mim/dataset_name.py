"""From what a user types after -d to the name of a dataset."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunet_mim.errors import MiMError


def dataset_name(given: str) -> str:
    """Number (`501`) or name (`Dataset501_Name`) → name, looked up in nnUNet_raw and nnUNet_preprocessed.

    Raises:
        MiMError: no such dataset, or several with this number.
    """
    roots = [Path(str(root)) for root in (nnUNet_raw, nnUNet_preprocessed) if root.is_set()]
    known = sorted({path.name for root in roots for path in root.glob("Dataset[0-9][0-9][0-9]_*") if path.is_dir()})
    found = [name for name in known if name == given or (given.isdigit() and int(name[7:10]) == int(given))]
    if len(found) > 1:
        raise MiMError(f"dataset number {given} is ambiguous ({', '.join(found)}): give the whole name")
    if not found:
        raise MiMError(
            f"unknown dataset '{given}': not in nnUNet_raw or nnUNet_preprocessed ({', '.join(map(str, roots))}), "
            f"which hold {', '.join(known) or 'none'}"
        )
    return found[0]
