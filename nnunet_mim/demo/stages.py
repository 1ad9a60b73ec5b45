"""What the demonstration runs: its sizes, and the commands of every stage."""

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


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration. The defaults take minutes on two cores."""

    quick: bool = False
    bodies: int = 12
    """phantoms to train on, a fifth of them held out of both trainings (fold 0)"""
    test_bodies: int = 2
    shape: int = 64
    """voxels along each axis of a phantom; a phantom is 288 mm wide"""
    view: int = 32
    """voxels per axis that the encoder sees; half of `shape`, so that level 1 shows the whole body"""
    children: tuple[int, int] = (2, 2)
    batch: int = 4
    lr: float = 2e-3
    iterations: int = 280
    val_every: int = 40
    patch: int = 48
    epochs: int = 7
    epoch_iterations: int = 100

    @property
    def spacing(self) -> float:
        """mm between voxels."""
        return 288 / self.shape


QUICK = DemoSettings(
    quick=True, bodies=MIN_BODIES, test_bodies=1, iterations=40, val_every=10, patch=32, epochs=2, epoch_iterations=60,
)  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """Where the demonstration keeps what it makes."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def page(self) -> Path:
        return self.root / "index.html"

    @property
    def images(self) -> Path:
        """CT of the test bodies."""
        return self.raw / DATASET / "imagesTs"

    @property
    def labels(self) -> Path:
        """True organs of the test bodies."""
        return self.raw / DATASET / "labelsTs"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def cases(self) -> Path:
        """Preprocessed training bodies."""
        return self.preprocessed / DATASET / f"{PLANS}_{CONFIGURATION}"

    @property
    def pretraining(self) -> Path:
        return self.results / DATASET / f"MiMPretrain__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"

    @property
    def finetuning(self) -> Path:
        return self.results / DATASET / f"{TRAINER}__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"

    def environment(self) -> dict[str, str]:
        """nnU-Net's three variables."""
        return {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
        }


@dataclass(frozen=True)
class Stage:
    """One step of the way."""

    name: str
    title: str
    run: list[str] | Callable[[], None]
    """a command with its arguments, or a function of this package"""
    output: Path
    """what it makes; removed before a stage that was cut off starts again"""


def make_stages(settings: DemoSettings, folders: Folders, device: str) -> list[Stage]:
    """All stages but the page, in their order."""

    def make_phantoms() -> None:
        from nnunet_mim.demo.phantoms import write_phantom_dataset

        shape, spacing = (settings.shape,) * 3, (settings.spacing,) * 3
        name = DATASET.split("_", 1)[1]
        write_phantom_dataset(
            folders.raw, DATASET_ID, name, settings.bodies, settings.test_bodies, shape=shape, spacing=spacing
        )

    d, s = str(DATASET_ID), settings
    recipe = {
        "patch_size": f"{s.patch},{s.patch},{s.patch}", "batch_size": 1, "num_epochs": s.epochs,
        "iterations_per_epoch": s.epoch_iterations, "val_iterations_per_epoch": 2, "lr": 0.002,
        "oversample_foreground": 1.0, "mirror_axes": "[]",  # mirroring needs longer schedules
    }  # fmt: skip
    plan = ["nnUNetv2_plan_and_preprocess", "-d", d, "-c", CONFIGURATION, "--no_pp", "-npfp", "2"]
    mim_plan = ["mim_plan", "-d", d, "--preset", "tiny", "--set", *(f"{key}={value}" for key, value in recipe.items())]
    preprocess = ["nnUNetv2_preprocess", "-d", d, "-plans_name", PLANS, "-c", CONFIGURATION, "-np", "2"]
    pretrain = [
        "mim_pretrain", "-d", d, "-p", PLANS, "-f", str(FOLD), "--preset", "tiny", "--view", str(s.view),
        "--children", *map(str, s.children), "--batch", str(s.batch), "--lr", str(s.lr),
        "--iterations", str(s.iterations), "--val_every", str(s.val_every), "-device", device,
    ]  # fmt: skip
    finetune = [
        "nnUNetv2_train", d, CONFIGURATION, str(FOLD), "-tr", TRAINER, "-p", PLANS, "-device", device,
    ]  # fmt: skip
    predict = [
        "nnUNetv2_predict", "-d", d, "-i", str(folders.images), "-o", str(folders.predictions), "-tr", TRAINER,
        "-p", PLANS, "-c", CONFIGURATION, "-f", str(FOLD), "-npp", "1", "-nps", "1", "-device", device,
    ]  # fmt: skip
    dataset = folders.preprocessed / DATASET
    return [
        Stage("phantoms", "Make bodies", make_phantoms, folders.raw / DATASET),
        Stage("plan", "nnU-Net looks at the data and plans", plan, dataset),
        Stage("mim_plan", "Adapt the plans to MiM", mim_plan, dataset / f"{PLANS}.json"),
        Stage("preprocess", "Preprocess the bodies", preprocess, folders.cases),
        Stage("pretrain", "Pretrain without labels", pretrain, folders.pretraining),
        Stage("finetune", "Finetune on the organs", finetune, folders.finetuning),
        Stage("predict", "Predict organs of unseen bodies", predict, folders.predictions),
    ]
