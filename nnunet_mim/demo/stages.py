"""The sizes of the demonstration, its folders, and the commands of its stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATASET_ID = 900
DATASET = f"Dataset{DATASET_ID}_Phantoms"
PLANS = "nnUNetMiMPlans"
CONFIGURATION = "3d_fullres"
TRAINER = "nnUNetTrainerMiM"
FOLD = 0
MIN_BODIES = 5  # nnU-Net splits the cases into five folds
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration. The defaults take minutes on two cores."""

    quick: bool = False
    bodies: int = 12
    """number of phantoms to train on; fold 0 holds a fifth of them out of both trainings"""
    test_bodies: int = 2
    shape: int = 64
    """voxels per axis of a phantom, which is 288 mm wide"""
    view: int = 32
    """voxels per axis of a view: half of `shape`, so that level 1 shows the whole body"""
    children: tuple[int, int] = (2, 2)
    batch: int = 4
    lr: float = 2e-3
    iterations: int = 240
    val_every: int = 40
    patch: int = 48
    epochs: int = 5
    epoch_iterations: int = 100

    @property
    def spacing(self) -> float:
        """mm between voxels."""
        return 288 / self.shape


QUICK = DemoSettings(
    quick=True, bodies=MIN_BODIES, test_bodies=1, iterations=40, val_every=10, patch=32, epochs=2, epoch_iterations=60,
)  # fmt: skip


class Folders:
    """Where the demonstration keeps what it makes; `raw` and `preprocessed` are those of its dataset."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs, self.page, self.predictions = root / "logs", root / "index.html", root / "predictions"
        self.raw, self.preprocessed, results = (root / name / DATASET for name in NNUNET_FOLDERS)
        self.images, self.labels = self.raw / "imagesTs", self.raw / "labelsTs"  # of the test bodies
        self.cases = self.preprocessed / f"{PLANS}_{CONFIGURATION}"
        self.pretraining = results / f"MiMPretrain__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"
        self.finetuning = results / f"{TRAINER}__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"

    def environment(self) -> dict[str, str]:
        """nnU-Net's three variables."""
        return {name: str(self.root / name) for name in NNUNET_FOLDERS}


@dataclass(frozen=True)
class Stage:
    """One step of the demonstration."""

    name: str
    title: str
    run: list[str] | Callable[[], None]
    """a command with its arguments, or a function of this package"""
    output: Path
    """file or folder that the stage makes; removed before the stage runs"""


def make_stages(settings: DemoSettings, folders: Folders, device: str) -> list[Stage]:
    """All stages in their order; the page is none of them."""

    def make_phantoms() -> None:
        from nnunet_mim.demo.phantoms import write_phantom_dataset

        raw, name = folders.raw.parent, DATASET.split("_", 1)[1]
        counts = settings.bodies, settings.test_bodies
        write_phantom_dataset(raw, DATASET_ID, name, *counts, 0, (settings.shape,) * 3, (settings.spacing,) * 3)

    patch = ",".join([str(settings.patch)] * 3)
    changes = (
        f"patch_size={patch} batch_size=1 num_epochs={settings.epochs} "
        f"iterations_per_epoch={settings.epoch_iterations} val_iterations_per_epoch=2 lr=0.002 "
        "oversample_foreground=1.0 mirror_axes=[]"  # mirroring needs longer schedules
    )
    sizes = (
        f"--view {settings.view} --children {settings.children[0]} {settings.children[1]} --batch {settings.batch} "
        f"--lr {settings.lr} --iterations {settings.iterations} --val_every {settings.val_every}"
    )
    model = f"-tr {TRAINER} -p {PLANS}"
    plan = f"nnUNetv2_plan_and_preprocess -d {DATASET_ID} -c {CONFIGURATION} --no_pp -npfp 2"
    mim_plan = f"mim_plan -d {DATASET_ID} --preset tiny --set {changes}"
    preprocess = f"nnUNetv2_preprocess -d {DATASET_ID} -plans_name {PLANS} -c {CONFIGURATION} -np 2"
    pretrain = f"mim_pretrain -d {DATASET_ID} -p {PLANS} -f {FOLD} --preset tiny {sizes} -device {device}"
    finetune = f"nnUNetv2_train {DATASET_ID} {CONFIGURATION} {FOLD} {model} -device {device}"
    predict = [
        "nnUNetv2_predict", "-d", str(DATASET_ID), "-i", str(folders.images), "-o", str(folders.predictions),
        *f"{model} -c {CONFIGURATION} -f {FOLD} -npp 1 -nps 1 -device {device}".split(),
    ]  # fmt: skip
    return [
        Stage("phantoms", "Make bodies", make_phantoms, folders.raw),
        Stage("plan", "nnU-Net looks at the data and plans", plan.split(), folders.preprocessed),
        Stage("mim_plan", "Adapt the plans to MiM", mim_plan.split(), folders.preprocessed / f"{PLANS}.json"),
        Stage("preprocess", "Preprocess the bodies", preprocess.split(), folders.cases),
        Stage("pretrain", "Pretrain without labels", pretrain.split(), folders.pretraining),
        Stage("finetune", "Finetune on the organs", finetune.split(), folders.finetuning),
        Stage("predict", "Predict organs of unseen bodies", predict, folders.predictions),
    ]
