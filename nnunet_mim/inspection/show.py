"""A pretrained network at work on raw CT: a page of pictures, and NIfTI files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import RawImage, order_of_axes, preprocess, read_image
from nnunet_mim.inspection.nifti import write_views
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.nnunet.orientation import orientation_of
from nnunet_mim.pretraining.report.page import REPORT, report_sections, verdict_text
from nnunet_mim.pretraining.report.pictures import load_network, reconstruct_volume, upright
from nnunet_mim.pretraining.report.summary import Facts
from nnunet_mim.reporting.page import write_page
from nnunet_mim.reporting.views import ReconstructedView


def show(
    facts: Facts, path: Path, files: Sequence[Path], folder: Path, device: str, seed: int,
    spacing: Sequence[float] | None,
) -> Iterator[str]:  # fmt: skip
    """Write FOLDER/report.html and the NIfTI files of every case.

    Args:
        facts: of the checkpoint.
        path: of the checkpoint.
        files: raw images, one per channel of the network for each case.
        folder: made if missing.
        device: to run the network on.
        seed: of the masks.
        spacing: mm in array order, for a checkpoint that states none.

    Yields:
        Lines that say what has been done.

    Raises:
        MiMError: a file cannot be used or the folder cannot be written. All files are read before anything is written.
    """
    channels = facts.config.in_channels
    if len(files) % channels:
        raise MiMError(f"-i: the network takes {channels} channels a case, {len(files)} files are no multiple of that")
    check_writable(folder)
    cases = [read_image(files[i : i + channels]) for i in range(0, len(files), channels)]
    if "transpose_forward" not in facts.provenance and cases:
        yield "note: the checkpoint does not say its order of axes; that of the image files is taken"
    if not facts.spacing and cases:
        taken = "the images' own is taken (choose with --spacing)" if spacing is None else "that of --spacing is taken"
        yield f"note: the checkpoint does not say its spacing; {taken}"
    model = load_network(facts.checkpoint, device)
    shown: dict[str, list[ReconstructedView]] = {}
    for number, image in enumerate(cases):
        name = image.name if image.name not in shown else f"{image.name}_{number + 1}"
        shown[name], written = show_case(facts, model, image, folder / name, seed + number, spacing)
        yield f"{name}: wrote {len(written)} NIfTI files, {folder / name}_level…"
    try:
        title = f"The checkpoint {path.name}"
        write_page(folder / REPORT, title, report_sections(facts, path, shown), verdict_text(facts))
    except OSError as error:
        raise MiMError(f"cannot write {folder / REPORT} ({error.strerror}): choose another folder with -o") from error
    yield f"wrote {folder / REPORT}"


def show_case(
    facts: Facts, model: PretrainingNetwork, image: RawImage, stem: Path, seed: int, spacing: Sequence[float] | None
) -> tuple[list[ReconstructedView], list[Path]]:
    """Write the NIfTI files of one case. Returns its views for a page, and the written files."""
    voxels, grid = preprocess(image, facts.provenance, spacing)
    pictures = reconstruct_volume(model, facts.checkpoint, voxels, seed)
    order = order_of_axes(facts.provenance)
    scale, shift = facts.units.scale()
    lowest = facts.units.window(0, voxels[0])[0] * scale + shift
    files = write_views(pictures, grid, order, lowest, stem)
    return upright(pictures, np.linalg.norm(grid.steps, axis=0), orientation_of(order, image.direction)), files


def check_writable(folder: Path) -> None:
    """Make a folder. Raises MiMError if it cannot be made or written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MiMError(f"cannot write into {folder} ({error.strerror}): choose another folder with -o") from error
