"""From a checked archive to a dataset in nnUNet_raw, which is written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from tqdm import tqdm

from nnunet_mim.benchmarking.archives import ENDING, Archive
from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.labels import geometry_differences, write_like_image
from nnunet_mim.preparation.prepare_case import remove_abandoned
from nnunet_mim.preparation.screening import last_line
from nnunet_mim.system.files import write_atomically

CONVERT = """
from nnunet_mim.system.processes import end_with_parent
end_with_parent()
from nnunetv2.dataset_conversion.convert_MSD_dataset import entry_point
entry_point()
"""
"""nnUNetv2_convert_MSD_dataset in a separate process: it starts a pool, and takes its folder from the environment"""


def already_there(archive: Archive, raw: Path) -> bool:
    """Whether the dataset is in nnUNet_raw. Raises MiMError where it has other cases, or another one has its number."""
    number = archive.dataset[7:10]
    if others := [str(name) for name in find_candidate_datasets(int(number)) if name != archive.dataset]:
        remedy = "give another number with --btcv_id" if archive.is_btcv else "move it away"
        raise MiMError(f"dataset number {number} is taken by {others[0]}, {archive.dataset} cannot be made: {remedy}")
    folder = raw / archive.dataset
    if not folder.exists():
        return False
    names = {path.name.removesuffix(ENDING) for path in (folder / "labelsTr").glob(f"*{ENDING}")}
    if names != {case.name for case in archive.cases} or not (folder / "dataset.json").is_file():
        counts = f"{len(names)} cases, not the {len(archive.cases)} of {archive.folder}"
        raise MiMError(f"{folder} is there already with {counts}: move it away to have it made anew")
    return True


def check_space(archives: Sequence[Archive], raw: Path) -> None:
    """MiMError if nnUNet_raw does not exist or has no space for these archives."""
    if not raw.is_dir():
        raise MiMError(f"nnUNet_raw is {raw}, which is not a folder: make it, or set the variable to the right one")
    copied = [path for archive in archives if not _linkable(archive, raw) for path in archive.files()]
    needed, free = sum(path.stat().st_size for path in copied) / 1e9, shutil.disk_usage(raw).free / 1e9
    if needed > free:
        sizes = f"{free:.1f} GB free, {needed:.1f} GB are needed"
        raise MiMError(f"{raw} has {sizes}: make space, or convert fewer at once")


def make_dataset(archive: Archive, raw: Path, processes: int) -> None:
    """Make nnUNet_raw/DatasetXXX_Name of a checked archive, in a folder beside it until it is complete.

    Only one process at a time may make the same one. Raises MiMError where it fails; nothing is left then.
    """
    partial = raw / f".mim_benchmark_{archive.dataset}-{os.getpid()}"
    remove_abandoned(partial)
    made = partial / archive.dataset
    try:
        partial.mkdir()
        if archive.is_btcv:
            _link_btcv(archive, made)
        else:
            _convert_msd(archive, partial, processes)
        _check_made(archive, made)
        _lay_on_images(archive, made)
        os.rename(made, raw / archive.dataset)
    except OSError as error:
        where = error.filename or partial
        raise MiMError(f"cannot write {where} ({error.strerror}): make it writable, or make space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_msd(archive: Archive, partial: Path, processes: int) -> None:
    """Run nnU-Net's converter, with a progress bar; afterwards only the complete cases are kept, and counted."""
    environment = {**os.environ, "nnUNet_raw": str(partial)}
    for name in ("nnUNet_preprocessed", "nnUNet_results"):  # the converter asks them whether the number is free
        environment.pop(name, None)
    command = [sys.executable, "-c", CONVERT, "-i", str(archive.folder), "-np", str(processes)]
    made, log_file = partial / archive.dataset, partial / "log.txt"
    with (
        log_file.open("w") as log,
        tqdm(total=len(archive.files()), desc=f"converting {archive.folder.name}", unit="file") as progress,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as converter,
    ):
        try:
            while converter.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    converter.wait(0.5)
                progress.update(min(progress.total, len(list(made.glob(f"*/*{ENDING}")))) - progress.n)
        finally:
            converter.kill()
    if converter.returncode:
        last = log_file.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise MiMError(f"nnU-Net's converter failed at {archive.folder} ({last[0][:300]}): repeat the command")
    complete = {case.name for case in archive.cases}
    for path in made.glob("*Tr/*"):
        if path.name.removesuffix(ENDING).removesuffix("_0000") not in complete:
            path.unlink()
    description = json.loads((made / "dataset.json").read_text())
    description |= {"numTraining": len(archive.cases), "numTest": len(archive.unlabelled)}
    write_atomically(made / "dataset.json", json.dumps(description, indent=4).encode())


def _pairs(archive: Archive, made: Path) -> list[tuple[Path, Path]]:
    """(file of the archive, file of the dataset) for every image and label of the training cases."""
    images = [(case.image, made / "imagesTr" / f"{case.name}_0000{ENDING}") for case in archive.cases]
    return images + [(case.label, made / "labelsTr" / f"{case.name}{ENDING}") for case in archive.cases]


def _link_btcv(archive: Archive, made: Path) -> None:
    """Link images and labels (hard links), or copy them where that is impossible, and describe the dataset."""
    for name in ("imagesTr", "labelsTr"):
        (made / name).mkdir(parents=True)
    for source, target in tqdm(_pairs(archive, made), desc=f"converting {archive.folder.name}", unit="file"):
        _link_or_copy(source, target)
    generate_dataset_json(
        str(made), {"0": "CT"}, dict(archive.labels), len(archive.cases), ENDING, dataset_name="BTCV",
        reference="https://www.synapse.org/Synapse:syn3193805", license="see the reference",
        converted_by="mim_benchmark",
    )  # fmt: skip


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _check_made(archive: Archive, made: Path) -> None:
    """MiMError unless every case has arrived with all of its bytes."""
    for source, target in _pairs(archive, made):
        if not target.is_file() or target.stat().st_size != source.stat().st_size:
            raise MiMError(f"{source} did not arrive whole in nnUNet_raw: make space, and repeat the command")


def _lay_on_images(archive: Archive, made: Path) -> None:
    """Give each label the geometry of its image, where --ignore_origin let it have another one."""
    for case in archive.cases:
        if geometry_differences(case.label, case.image):
            image, label = made / "imagesTr" / f"{case.name}_0000{ENDING}", made / "labelsTr" / f"{case.name}{ENDING}"
            try:
                write_like_image(label, image, label)
            except RuntimeError as error:  # SimpleITK's
                raise MiMError(f"cannot write {label} ({last_line(error)}): make space") from error


def _linkable(archive: Archive, raw: Path) -> bool:
    """Whether its files need no space, being linked."""
    return archive.is_btcv and archive.folder.stat().st_dev == raw.stat().st_dev
