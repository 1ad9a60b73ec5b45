"""The page of the demonstration: pictures, curves and tables of what the stages have made."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.checkpoint.locate import FINAL
from nnunet_mim.demo.phantoms import LABELS
from nnunet_mim.demo.stages import DemoSettings, Folders
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.orientation import orientation_of
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures
from nnunet_mim.pretraining.report.curves import read_columns
from nnunet_mim.pretraining.report.pictures import load_network, reconstruct_volume, upright
from nnunet_mim.pretraining.report.summary import NOTE
from nnunet_mim.reporting.figures import LossPanel, loss_figure, segmentation_figure
from nnunet_mim.reporting.page import Section, write_page
from nnunet_mim.reporting.views import views_figure

ORGANS = {name: label for name, label in LABELS.items() if label}
Dice = dict[str, dict[str, float]]  # file name of a test body → organ → Dice


def write_report(folders: Folders, settings: DemoSettings, state: dict[str, Any]) -> float:
    """Write FOLDER/index.html of a demonstration whose stages are all done; `state` is their record.

    Returns:
        Mean Dice over organs and test bodies.

    Raises:
        MiMError: a prediction is missing.
    """
    checkpoint = load_checkpoint(folders.pretraining / FINAL)
    dice = {case.name: dice_of_case(folders, case) for case in sorted(folders.labels.glob("*.nii.gz"))}
    mean = float(np.mean([list(organs.values()) for organs in dice.values()]))
    sections = [
        _summary(settings, state, mean),
        _views_section(folders, checkpoint),
        _loss_section(folders, settings),
        _organs_section(folders, settings, dice, mean),
        _commands_section(folders, state),
    ]
    write_page(folders.page, "MiM from start to end, on made-up bodies", sections)
    return mean


def dice_of_case(folders: Folders, label_file: Path) -> dict[str, float]:
    """Dice of every organ of one test body. Raises MiMError where the prediction is missing."""
    predicted_file = folders.predictions / label_file.name
    if not predicted_file.is_file():
        raise MiMError(f"no prediction {predicted_file}: delete {folders.root} and run mim_demo again")
    truth, predicted = read_image(label_file), read_image(predicted_file)
    dice = {}
    for name, label in ORGANS.items():
        a, b = truth == label, predicted == label
        dice[name] = float(2 * (a & b).sum()) / max(1, int(a.sum() + b.sum()))
    return dice


def read_image(path: Path) -> np.ndarray:
    """Array (Z, Y, X) of an image file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def held_out_case(cases: Path, checkpoint: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Name and voxels (C, Z, Y, X) of the first preprocessed case that the pretraining has not seen."""
    dataset_class = infer_dataset_class(str(cases))
    seen = {case["case"] for case in checkpoint["provenance"]["cases"]}
    name = min(set(dataset_class.get_identifiers(str(cases))) - seen)
    return name, np.asarray(dataset_class(str(cases), [name]).load_case(name)[0][:], np.float32)


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


def _views_section(folders: Folders, checkpoint: dict[str, Any]) -> Section:
    case, volume = held_out_case(folders.cases, checkpoint)
    config = checkpoint["mim_config"]
    token = np.array(config["network"]["strides"]).prod(axis=0)
    view, token = (" × ".join(map(str, sizes)) for sizes in (config["view_size"], token))
    text = f"""\
Body {case}, held out of the pretraining. Each row is one view: the original, what the encoder gets to see, and what the
network makes of the hidden part. The blue frame is the hidden place that the next row is cut from and enlarged: a mask
in a mask. All views have {view} voxels; tokens of {token} voxels are hidden, in level 1 whole blocks of them."""
    provenance = checkpoint["provenance"]
    pictures = reconstruct_volume(load_network(checkpoint), checkpoint, volume)
    views = upright(pictures, provenance["spacing"], orientation_of(provenance.get("transpose_forward", (0, 1, 2))))
    note = f"{NOTE} Grey scale from -450 to 350 HU."
    return Section("A mask in a mask", text, note, [views_figure(views)])


def _loss_section(folders: Folders, settings: DemoSettings) -> Section:
    train = TrainingFigures.from_row(read_columns(folders.pretraining / "train.csv"))
    val = Measurement.from_row(read_columns(folders.pretraining / "val.csv"))
    panels, rows = [], [["level", "predicting the token's mean", "in-filling from neighbours", "network"]]
    for level in val.reconstructed:
        columns = level.guesses.token_mean, level.guesses.infill, level.reconstruction
        token_mean, infill, held_out = (np.asarray(column, dtype=float) for column in columns)
        training = np.asarray(train.level(level.number).reconstruction, dtype=float)
        baselines = {"guess: the token's mean": token_mean[-1], "guess: copy the nearest visible voxels": infill[-1]}
        curves = {
            "training bodies": (train.iteration.tolist(), training.tolist()),
            "held-out bodies": (val.iteration.tolist(), held_out.tolist()),
        }
        panels.append(LossPanel(level.title, curves, baselines))
        rows.append([level.title, *(f"{value:.3f}" for value in (*baselines.values(), held_out[-1]))])
    text = f"""\
Error of the filled-in tokens (mean squared, in units of each token's own variance) over {settings.iterations}
iterations, and what trivial guesses reach on the same tokens of the held-out bodies. Below both dashed lines the
network knows more than can be read off the neighbouring voxels. The widest views are learnt first; a real pretraining
takes hundreds of times as many iterations."""
    return Section("Pretraining: the loss falls", text, "", [loss_figure(panels)], rows)


def _organs_section(folders: Folders, settings: DemoSettings, dice: Dice, mean: float) -> Section:
    figures = []
    for name in list(dice)[:2]:
        image = read_image(folders.images / name.replace(".nii.gz", "_0000.nii.gz"))
        truth, predicted = read_image(folders.labels / name), read_image(folders.predictions / name)
        figures.append(segmentation_figure(image, truth, predicted, list(ORGANS), (settings.spacing,) * 3))
    cases = [name.removesuffix(".nii.gz") for name in dice]
    rows = [["Dice", *cases, "mean"]]
    for organ in ORGANS:
        values = [case[organ] for case in dice.values()]
        rows.append([organ.replace("_", " "), *(f"{value:.2f}" for value in (*values, np.mean(values)))])
    rows.append(["all organs", *(f"{np.mean(list(case.values())):.2f}" for case in dice.values()), f"{mean:.2f}"])
    transfer = json.loads((folders.finetuning / "mim_transfer.json").read_text())
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
