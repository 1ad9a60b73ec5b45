"""The page of the demonstration: pictures, curves and tables of what the stages have made."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from nnunet_mim.benchmarking.bench_figures import cases_figure, read_case
from nnunet_mim.benchmarking.metrics import dice
from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.checkpoint.locate import FINAL
from nnunet_mim.demo.phantoms import LABELS
from nnunet_mim.demo.stages import TRAINER, DemoSettings, Folders
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.cases import dataset_class_of
from nnunet_mim.nnunet.documents import checked, document
from nnunet_mim.nnunet.orientation import orientation_of
from nnunet_mim.pretraining.report.page import losses_section, views_sections
from nnunet_mim.pretraining.report.pictures import load_network, reconstruct_volume, upright
from nnunet_mim.pretraining.report.summary import Facts, join
from nnunet_mim.reporting.page import Section, write_page
from nnunet_mim.system.untrusted import read_json

ORGANS = {name: label for name, label in LABELS.items() if label}


def write_report(folders: Folders, settings: DemoSettings, state: dict[str, Any]) -> float:
    """Write FOLDER/index.html of a demonstration whose stages are all done; `state` is their record.

    Returns the mean Dice over organs and test bodies.
    """
    facts = Facts(load_checkpoint(folders.pretraining / FINAL))
    bodies = sorted(path.name for path in folders.labels.glob("*.nii.gz"))
    dices = np.array([_dice_of_organs(folders, body) for body in bodies])  # (bodies, organs)
    sections = [
        _summary(settings, state, dices.mean()),
        _views_section(folders, facts),
        _loss_section(folders, facts, settings),
        _organs_section(folders, settings, bodies, dices),
        _commands_section(folders, state),
    ]
    write_page(folders.page, "MiM from start to end, on made-up bodies", sections)
    return float(dices.mean())


def _dice_of_organs(folders: Folders, body: str) -> list[float]:
    """Dice of every organ of one test body, which has this file name."""
    predicted_file = folders.predictions / body
    if not predicted_file.is_file():
        raise MiMError(f"no prediction {predicted_file}: delete {folders.root} and run mim_demo again")
    truth, predicted = _read_image(folders.labels / body), _read_image(predicted_file)
    return [dice(predicted == label, truth == label) for label in ORGANS.values()]


def _read_image(path: Path) -> np.ndarray:
    """Array (Z, Y, X) of an image file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _summary(settings: DemoSettings, state: dict[str, Any], mean: float) -> Section:
    seconds = sum(stage["seconds"] for stage in state["stages"])
    duration = f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    machine = f"{os.cpu_count()} CPU cores{' and a GPU' if state['device'] == 'cuda' else ''}"
    text = f"""\
MiM (Mask in Mask, arXiv 2404.15580) teaches a network about CT without labels: most of a scan is hidden, and the
network has to fill it in. It does so at three levels at once, from the whole body down to a few centimetres, each level
cut from a hidden place of the level above. The encoder that has learnt this is then finetuned by nnU-Net to find
organs.

Here the whole way was run on {settings.bodies} made-up bodies, in {duration} on {machine}. On
{settings.test_bodies} more bodies, which no part of the training has seen, the mean Dice over {len(ORGANS)} organs is
{mean:.2f} (1 is perfect)."""
    if settings.quick:
        text += "\n\nThis is the --quick run: it shows that everything works, not what it can do."
    return Section("In short", text)


def _views_section(folders: Folders, facts: Facts) -> Section:
    """Views of the first preprocessed case that the pretraining has not seen."""
    dataset_class, cases = dataset_class_of(folders.cases), str(folders.cases)
    seen = {case["case"] for case in facts.provenance["cases"]}
    name = min(set(dataset_class.get_identifiers(cases)) - seen)
    volume = np.asarray(dataset_class(cases, [name]).load_case(name)[0][:], np.float32)
    pictures = reconstruct_volume(load_network(facts.checkpoint), facts.checkpoint, volume)
    orientation = orientation_of(facts.provenance.get("transpose_forward", (0, 1, 2)))
    section = views_sections(facts, {name: upright(pictures, facts.spacing, orientation)})[0]
    text = f"""\
Body {name}, held out of the pretraining. {section.text} All views have {join(facts.config.view_size)} voxels; tokens of
{join(facts.token_size)} voxels (in the order of the plans) are hidden, in level 1 whole blocks of them."""
    return replace(section, title="A mask in a mask", text=text)


def _loss_section(folders: Folders, facts: Facts, settings: DemoSettings) -> Section:
    section = losses_section(facts, folders.pretraining)
    text = f"""\
{facts.verdict_text()}

{section.text}

The widest views are learnt first. These are {settings.iterations} iterations; a real pretraining takes hundreds of
times as many."""
    return replace(section, title="What the pretraining has learnt", text=text)


@document
class Transferred(TypedDict):
    """What is needed of mim_transfer.json: names of parameters, of adapted ones with what was done."""

    loaded: list[str]
    adapted: dict[str, Any]
    fresh: list[str]


TRANSFERRED = TypeAdapter(Transferred)


def _organs_section(folders: Folders, settings: DemoSettings, bodies: list[str], dices: np.ndarray) -> Section:
    pictures = []
    for body, mean in list(zip(bodies, dices.mean(axis=1), strict=True))[:2]:
        image, predictions = (
            folders.images / body.replace(".nii.gz", "_0000.nii.gz"),
            {TRAINER: folders.predictions / body},
        )
        title = "unseen body", body.removesuffix(".nii.gz")
        organs = list(ORGANS.values())
        pictures.append(read_case(title, image, folders.labels / body, predictions, {TRAINER: mean}, organs))
    figures = [cases_figure(pictures, {label: name for name, label in ORGANS.items()})]
    rows = [["Dice", *(body.removesuffix(".nii.gz") for body in bodies), "mean"]]
    for organ, values in zip([*ORGANS, "all organs"], [*dices.T, dices.mean(axis=1)], strict=True):
        rows.append([organ.replace("_", " "), *(f"{value:.2f}" for value in (*values, values.mean()))])
    file, remedy = folders.finetuning / "mim_transfer.json", "start the demonstration anew"
    transfer = checked(str(file), read_json(file, remedy), TRANSFERRED, remedy)
    n_loaded, n_fresh = len(transfer["loaded"]) + len(transfer["adapted"]), len(transfer["fresh"])
    text = f"""\
The encoder of the pretraining, inside a U-Net, finetuned by nnUNetv2_train with nnUNetTrainerMiM for
{settings.epochs * settings.epoch_iterations} iterations ({n_loaded} pretrained parameter tensors were loaded,
{n_fresh} started from random values). nnUNetv2_predict then found the organs of these bodies, which were in neither
training."""
    note = """\
Made-up bodies are far more alike than patients, and minutes are no training: the figures show that the way works from
end to end. They say nothing about real CT, nor about what pretraining adds."""
    return Section("Organs of bodies it has never seen", text, note, figures, rows)


def _commands_section(folders: Folders, state: dict[str, Any]) -> Section:
    stages = state["stages"]
    rows = [["step", "command", "seconds", "CPU seconds"]]
    for stage in stages:
        command = stage["command"].split(" ")[0] or "(mim_demo)"
        rows.append([stage["title"], command, f"{stage['seconds']:.0f}", f"{stage['cpu_seconds']:.0f}"])
    rows.append(["all", "", *(f"{sum(stage[name] for stage in stages):.0f}" for name in ("seconds", "cpu_seconds"))])
    exports = [f"export {name}={value}" for name, value in folders.environment().items()]
    code = "\n".join([*exports, *(s["command"] for s in stages if s["command"])])
    packages = ", ".join(f"{name} {version(name)}" for name in ("nnunet_mim", "nnunetv2", "torch", "numpy"))
    text = f"""\
These are the commands for one's own data too; only the small sizes are the demonstration's. Their output is in
{folders.logs}.

{packages}, Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores, device
{state["device"]}."""
    return Section("Every step", text, table=rows, code=code)
