"""A pretrained network at work on raw CT: a page of pictures, and NIfTI files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import order_of_axes, preprocess
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.nnunet.orientation import orientation_of
from nnunet_mim.nnunet.raw_image import Grid, RawImage, read_image
from nnunet_mim.pretraining.report.page import REPORT, report_sections
from nnunet_mim.pretraining.report.pictures import LevelPicture, load_network, reconstruct_volume, upright
from nnunet_mim.pretraining.report.summary import Facts
from nnunet_mim.reporting.page import write_page
from nnunet_mim.reporting.views import ReconstructedView


def show(
    facts: Facts, path: Path, files: Sequence[Path], folder: Path, device: str, seed: int,
    spacing: Sequence[float] | None,
) -> Iterator[str]:  # fmt: skip
    """Write FOLDER/report.html and the NIfTI files of every case; yields lines that say what has been done.

    All files are read before anything is written.

    Args:
        facts, path: of the checkpoint.
        files: raw images, one per channel of the network for each case.
        seed: of the masks.
        spacing: mm in array order, for a checkpoint that states none.

    Raises:
        MiMError: a file cannot be used or the folder cannot be written.
    """
    channels = facts.config.in_channels
    if len(files) % channels:
        raise MiMError(f"-i: the network takes {channels} channels a case, {len(files)} files are no multiple of that")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MiMError(f"cannot write into {folder} ({error.strerror}): choose another folder with -o") from error
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
        write_page(folder / REPORT, title, report_sections(facts, path, shown), facts.verdict_text())
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
    files = _write_views(pictures, grid, order, lowest, stem)
    return upright(pictures, np.linalg.norm(grid.steps, axis=0), orientation_of(order, image.direction)), files


def _write_views(
    pictures: Sequence[LevelPicture], grid: Grid, transpose_forward: Sequence[int], lowest: float, stem: Path
) -> list[Path]:
    """Write `STEM_level1_input.nii.gz`, …_masked, …_reconstruction, …_mask (1 = masked), and the same of each level.

    Args:
        pictures: of one case.
        grid, transpose_forward: of the preprocessed volume that they were cut from.
        lowest: intensity of masked voxels in …_masked, that of air.

    Returns:
        The written files.
    """
    files = []
    for picture in pictures:
        parts: dict[str, np.ndarray] = {
            "input": picture.input.astype(np.float32),
            "masked": np.where(picture.mask, np.float32(lowest), picture.input).astype(np.float32),
            "reconstruction": picture.reconstruction.astype(np.float32),
            "mask": picture.mask.astype(np.uint8),
        }
        for part, values in parts.items():
            path = stem.with_name(f"{stem.name}_{picture.name}_{part}.nii.gz")
            image = _as_image(values, grid.part(picture.start, picture.step), transpose_forward)
            try:
                sitk.WriteImage(image, str(path), True)
            except RuntimeError as error:
                raise MiMError(f"cannot write {path}: free disk space, or choose another folder with -o") from error
            files.append(path)
    return files


def _as_image(values: np.ndarray, grid: Grid, transpose_forward: Sequence[int]) -> sitk.Image:
    """Turn an array in the axis order of preprocessed cases into an image in the axis order of the original."""
    backward = np.argsort(transpose_forward).tolist()
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(backward)))
    columns = grid.reordered(backward).steps[:, ::-1]  # x, y, z
    spacing = np.linalg.norm(columns, axis=0)
    image.SetOrigin(grid.origin.tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).flatten().tolist())
    return image
