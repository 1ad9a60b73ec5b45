"""Made-up CT bodies with labelled organs, for the demonstration and for tests without real CT.

A body is drawn in a cube of 288 mm around the origin: a small person from the neck to the hips. x points to the
patient's left, y to the back, z to the head, as in DICOM and SimpleITK (LPS). The cube fills the volume whatever its
shape, so a seed gives the same body at every shape. Every structure is an implicit function: mm to its surface,
negative inside. Painting blends its edge over one voxel, which is the partial-volume effect.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.random import Generator
from scipy.ndimage import gaussian_filter

from nnunet_mim.demo.canvas import Canvas, oval
from nnunet_mim.errors import MiMError

LABELS = {"background": 0, "liver": 1, "spleen": 2, "right_kidney": 3, "left_kidney": 4, "lungs": 5, "spine": 6}
FAT_HU = -104


def make_phantom(
    seed: int, shape: Sequence[int] = (96, 96, 96), spacing: Sequence[float] = (3.0, 3.0, 3.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Make one body.

    Args:
        seed: decides the body, its contrast phase and its noise.
        shape: voxels along (z, y, x), at least 24 each: fewer do not hold the kidneys.
        spacing: mm along (z, y, x). It decides the noise (larger voxels have less), not the body.

    Returns:
        image: int16 (Z, Y, X), Hounsfield units, -1024 to 3071.
        labels: uint8 (Z, Y, X), values of `LABELS`; no label is empty.
    """
    if len(shape) != 3 or min(shape) < 24:
        raise MiMError(f"phantom shape {tuple(shape)}: give three sizes (z, y, x) of at least 24 voxels")
    rng = np.random.default_rng(seed)
    canvas = Canvas(rng, [int(n) for n in shape])
    enhancement = rng.uniform(0.55, 1.0)  # by the contrast agent: 1 = full portal venous phase
    has_table = rng.random() < 0.7
    body = _Body(canvas, rng)
    _paint_trunk(canvas, rng, body, has_table)
    _paint_bowel(canvas, rng, enhancement)
    _paint_liver(canvas, rng, body, enhancement)
    _paint_stomach_and_spleen(canvas, rng, body, enhancement)
    _paint_kidneys(canvas, rng, enhancement)
    _paint_abdominal_vessels_and_bladder(canvas, rng, enhancement)
    _paint_lungs_and_heart(canvas, rng, body, enhancement)
    _paint_great_vessels_and_airways(canvas, enhancement)
    marrow, cortex = rng.uniform(130, 210), rng.uniform(420, 620)
    _paint_spine(canvas, rng, body, marrow, cortex)
    _paint_other_bones(canvas, rng, body, marrow, cortex)
    return _scan(canvas.hu, rng, spacing), canvas.labels


def write_phantom_dataset(
    raw_folder: Path,
    dataset_id: int,
    name: str,
    n_train: int,
    n_test: int,
    seed: int = 0,
    shape: Sequence[int] = (96, 96, 96),
    spacing: Sequence[float] = (3.0, 3.0, 3.0),
) -> Path:
    """Write phantoms as an nnU-Net raw dataset, with test cases, and return its folder, raw_folder/DatasetXXX_NAME.

    Case i is `make_phantom(seed + i, shape, spacing)`; test cases are numbered after the training cases.
    """
    if not 1 <= dataset_id <= 999:
        raise MiMError(f"dataset id {dataset_id}: choose a number from 1 to 999")
    folder = raw_folder / f"Dataset{dataset_id:03d}_{name}"
    if folder.exists():
        raise MiMError(f"{folder} exists already: remove it, or choose another dataset id or name")
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for case in range(n_train + n_test):
        image, labels = make_phantom(seed + case, shape, spacing)
        part = "Tr" if case < n_train else "Ts"
        _write(image, spacing, folder / f"images{part}" / f"case_{case:04d}_0000.nii.gz")
        _write(labels, spacing, folder / f"labels{part}" / f"case_{case:04d}.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": n_train,
        "file_ending": ".nii.gz",
        "name": name,
        "description": "Made-up bodies, not patients: no conclusion about real CT can be drawn from them.",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    return folder


def _write(array: np.ndarray, spacing: Sequence[float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)  # identity direction: x to the left, y to the back, z to the head
    image.SetSpacing([float(mm) for mm in reversed(spacing)])
    sitk.WriteImage(image, str(path))


class _Body:
    """Surfaces that several structures share: implicit functions on the whole canvas."""

    def __init__(self, canvas: Canvas, rng: Generator) -> None:
        x, y, z = canvas.x, canvas.y, canvas.z
        self.spine_y = 36 + 7 * np.sin(np.pi * (z - 10) / 150)  # chest curved to the back, loins to the front
        neck = np.clip((z - 98) / 46, 0, 1) ** 2
        waist = 0.07 * np.exp(-(((z + 50) / 35) ** 2)) - 0.05 * np.clip((-z - 90) / 40, 0, 1)
        self.wall = oval(x, y, 106 * (1 - waist) * (1 - 0.62 * neck), 70 * (1 - 0.35 * neck), 2.6)
        narrowing = np.sqrt(np.clip(1 - (np.clip(z - 45, 0, None) / 92) ** 2, 1e-3, 1))
        pelvis = 1 - 0.28 * np.clip((-z - 85) / 45, 0, 1)
        self.cavity = oval(x, y + 5, 91 * narrowing * pelvis, 58 * narrowing**0.7 * pelvis, 2.4)
        self.fat = rng.uniform(6, 17)
        tops = rng.uniform((16, 10), (28, 20))
        domes = [(-46, -4, tops[0]), (47, -4, tops[1]), (0, -16, 3.0)]
        self.dome = np.maximum.reduce(
            [top - 40 * (np.sqrt((x - cx) ** 2 + (y - cy) ** 2) / 45) ** 3 for cx, cy, top in domes]
        )
        # Height of the diaphragm, which is fixed to the ribs lower at the back than at the front.
        self.dome = np.maximum(self.dome, -18 - 0.35 * y)
        self.below_diaphragm = np.maximum(z - self.dome + 2, self.cavity + 2.5)


def _paint_trunk(canvas: Canvas, rng: Generator, body: _Body, has_table: bool) -> None:
    """Paint the table, skin, the fat under it, muscle, and the fat between the organs."""
    x, y = canvas.x, canvas.y
    skin = body.wall - body.fat * (1 + 0.25 * np.clip(-canvas.z / 90, -1, 1)) + 0.5 * canvas.rough
    if has_table:
        _, y_flat, x_flat = np.meshgrid(*canvas.axes, indexing="ij")
        under = y_flat - canvas.size[1] * (70 + body.fat) + 0.0012 * x_flat**2  # curved up at its sides
        canvas.paint(np.maximum(np.abs(under - 8) - 5, np.abs(x_flat) - 120), -900)
        canvas.paint(np.maximum(np.abs(under - 4) - 2.5, np.abs(x_flat) - 120), -50)
    canvas.paint(skin, 25)
    canvas.paint(skin + 2.5, FAT_HU + 4 * canvas.rough)
    streaks = np.where(canvas.rough > 1.5, FAT_HU / 2, 0)
    muscle = rng.uniform(50, 66)
    canvas.paint(body.wall + canvas.rough, muscle + streaks)
    canvas.paint(body.cavity + 0.6 * canvas.rough, FAT_HU + 6 * canvas.rough)
    for side in (-1, 1):
        back = oval(x - side * 19, y - body.spine_y - 20, 18.0, 13.0, 2.0)
        canvas.paint(np.maximum(back, body.wall + 2), muscle + streaks)
        canvas.tube([(side * 15, 28, -15), (side * 25, 26, -70), (side * 36, 12, -150)], (5, 13, 13), muscle)


def _near(rng: Generator, x: float, y: float, z: float, by: float = 2.5) -> np.ndarray:
    """A random point up to `by` mm away along each axis."""
    return np.array((x, y, z)) + rng.uniform(-by, by, 3)


def _paint_bowel(canvas: Canvas, rng: Generator, enhancement: float) -> None:
    """Paint the loops of the small bowel, and the colon."""
    stool = np.where(canvas.rough > 0.3, -850, 35 + 25 * canvas.rough).astype(np.float32)
    bowel = rng.uniform((-52, -46, -120), (52, 12, -52), (46, 3))
    for loop in bowel:
        radii = rng.uniform(7, 11, 3)
        canvas.blob(loop, radii, 45 + 45 * enhancement * rng.random(), lumps=0.8)
        canvas.blob(loop, radii - 3.0, -800 if rng.random() < 0.12 else rng.uniform(8, 35), lumps=0.8)
    sag = rng.uniform(-14, 6)
    colon = [(-70, 6, -108), (-74, 4, -62), (-55, -36, -58), (0, -46, -60 + sag)]
    colon += [(52, -38, -40), (75, 14, -40), (72, 14, -112)]
    for radius, value in ((10, 50.0), (7.5, stool)):
        canvas.tube(colon, radius, value)


def _paint_liver(canvas: Canvas, rng: Generator, body: _Body, enhancement: float) -> None:
    """Paint the liver with its vessels, and the gallbladder."""
    x, y, z = canvas.x, canvas.y, canvas.z
    size = rng.uniform(0.93, 1.06)
    right = canvas.ellipsoid(_near(rng, -52, -2, -14), np.array((52, 55, 60)) * size, lumps=0.8)
    left = canvas.ellipsoid(_near(rng, -6, -30, -4), np.array((52, 26, 24)) * size, lean=0.3, lumps=0.8)
    # The lower edge is low at the right side and rises to the left.
    edge = -68 + rng.uniform(-8, 8) + 0.6 * np.clip(x + 85, 0, None) - 0.15 * y - z
    hollow = canvas.ellipsoid((14, 34, -46), (42, 40, 60))
    liver = np.maximum.reduce([np.minimum(right, left), body.below_diaphragm, edge * 0.8, -hollow])
    canvas.paint(liver, 55 + 55 * enhancement + 3 * canvas.rough, 1)
    trunks = [(-14, 8, -22), (-30, 2, -14), (-44, -6, -8), (-60, -10, -10)]
    branches = [trunks, [(-30, 2, -14), (-46, 14, -24), (-60, 22, -30)], [(-14, 12, 8), (-34, 2, 8), (-58, 4, 4)]]
    branches += [[(-14, 12, 8), (-24, -20, 2), (-34, -36, -10)], [(-14, 8, -22), (-8, -20, -8), (14, -32, -6)]]
    for branch in branches:
        canvas.tube(branch, np.linspace(3.6, 1.4, len(branch)), 45 + 115 * enhancement)
    canvas.blob(_near(rng, -28, -34, -46), np.array((8, 10, 12)), rng.uniform(3, 15))


def _paint_stomach_and_spleen(canvas: Canvas, rng: Generator, body: _Body, enhancement: float) -> None:
    """Paint the stomach with a meal in it, the pancreas, and the spleen."""
    stomach = _near(rng, 42, -22, -14)
    radii = np.array((26, 24, 28)) * rng.uniform(0.9, 1.08)
    canvas.blob(stomach, radii, 60, label=0, turn=0.4, lumps=1.0)
    fluid_level = stomach[1] - rng.uniform(2, 14)
    meal = np.where(canvas.y < fluid_level, -960, 22 + 12 * canvas.rough)
    canvas.blob(stomach, radii - 4, meal.astype(np.float32), turn=0.4, lumps=1.0)
    canvas.tube([(-14, -8, -40), (14, -6, -36), (44, 12, -26)], (8, 6, 5), 40 + 60 * enhancement)

    centre, radii = _near(rng, 67, 24, -12), np.array((24, 36, 34)) * rng.uniform(0.88, 1.08)
    spleen = np.maximum(canvas.ellipsoid(centre, radii, turn=-0.35, lumps=0.7), body.below_diaphragm)
    spleen = np.maximum(spleen, -canvas.ellipsoid(stomach + (0, 2, 0), (29, 30, 32)))
    canvas.paint(spleen, 48 + 80 * enhancement + 3 * canvas.rough, 2)


def _paint_kidneys(canvas: Canvas, rng: Generator, enhancement: float) -> None:
    """Paint the kidneys in their fat, with renal pelvis, ureter and vein."""
    kidney_hu = 35 + 150 * enhancement
    for side, label, height in ((-1, 3, -58), (1, 4, -48)):
        centre = _near(rng, side * 43, 26, height)
        radii = np.array((15.5, 16.5, 29)) * rng.uniform(0.9, 1.07)
        shape = {"turn": side * 0.5, "lean": -side * 0.22}
        canvas.blob(centre, radii, FAT_HU, label=0, grow=3.5, lumps=1.0, **shape)
        canvas.blob(centre, radii, kidney_hu, label=label, lumps=0.4, **shape)
        canvas.blob(centre - (side * 2, 1, 0), radii * (0.45, 0.45, 0.62), kidney_hu * 0.72, None, **shape)
        sinus = centre - (side * 9.5, 4, 0)
        canvas.blob(sinus, radii * (0.6, 0.38, 0.42), FAT_HU, label=0, turn=side * 0.5)
        canvas.tube([sinus, sinus + (-side * 4, 0, -22), (side * 22, 10, -110)], (4, 2.2, 1.8), 12)
        canvas.tube([sinus + (0, -2, 2), (side * 8, 6, height + 12)], 2.6, 45 + 115 * enhancement)


def _paint_abdominal_vessels_and_bladder(canvas: Canvas, rng: Generator, enhancement: float) -> None:
    """Paint the aorta, the inferior vena cava, the iliac vessels, and the bladder."""
    blood = 45 + 115 * enhancement
    column = [(5, 36 + 7 * np.sin(np.pi * (h - 10) / 150) - 19, h) for h in range(80, -101, -20)]
    canvas.tube(column, np.linspace(7.5, 5.5, len(column)), blood + 20, 0)
    canvas.tube([(-11, 12, -100), (-13, 11, -50), (-14, 10, 0), (-12, 2, 34)], (6.5, 7, 8, 8), blood - 8, 0)
    for side in (-1, 1):
        canvas.tube([(side * 4 - 2, 12, -98), (side * 20, 16, -122), (side * 36, 0, -150)], 4.5, blood)
    canvas.blob(_near(rng, 0, -16, -134), np.array((26, 22, 20)) * rng.uniform(0.8, 1.1), 35)
    canvas.blob(_near(rng, 0, -16, -134, by=0.5), np.array((23, 19, 17)) * rng.uniform(0.8, 1.0), rng.uniform(2, 12))


def _paint_lungs_and_heart(canvas: Canvas, rng: Generator, body: _Body, enhancement: float) -> None:
    """Paint the lungs with their vessels, and the heart."""
    x, y, z = canvas.x, canvas.y, canvas.z
    blood = 60 + 120 * enhancement
    heart_centre = np.array((17.0, -18.0, 34.0)) + rng.uniform(-3, 3, 3)
    heart_radii = np.array((43, 33, 33)) * rng.uniform(0.93, 1.08)
    heart = canvas.ellipsoid(heart_centre, heart_radii, turn=0.5, lean=-0.2, lumps=0.8)
    width = 15 + 6 * np.clip(np.abs(z - 62) / 60, 0, 1) + 5 * np.exp(-(((z - 64) / 12) ** 2))
    middle = oval(x - 2, y, width, 90.0, 3.0)
    spine = oval(x, y - body.spine_y - 6, 24.0, 21.0, 2.0)
    lungs = np.maximum.reduce([body.cavity + 2.5, (body.dome - z) * 0.8, -heart + 2, -middle, -spine])
    lungs = lungs + 0.3 * canvas.rough
    air = rng.uniform(-890, -810)
    canvas.paint(lungs, air + 0.5 * y + 15 * canvas.rough, 5)
    vessels = np.random.default_rng(rng.integers(2**32))  # its own: the shape decides how many numbers it draws
    for side in (-1, 1):
        root = np.array((side * 22.0, 10.0, 58.0))
        for _ in range(14):
            aim = np.array((side * vessels.uniform(34, 70), vessels.uniform(-40, 42), vessels.uniform(5, 105)))
            _branch(canvas, vessels, root, root + 0.6 * (aim - root), 4.2, blood - 60, 3)

    chambers = np.maximum(canvas.rough, 0) * 25
    canvas.paint(heart, 70 + 40 * enhancement + chambers, 0)
    for offset, part in (((10, -6, -4), 0.5), ((-14, -2, 6), 0.48), ((2, 8, 16), 0.42)):
        canvas.blob(heart_centre + offset, heart_radii * part, blood, turn=0.5, lumps=1.0)


def _paint_great_vessels_and_airways(canvas: Canvas, enhancement: float) -> None:
    """Paint the vessels at the heart, the windpipe with the bronchi, and the gullet."""
    blood = 60 + 120 * enhancement
    arch = [(-6, -12, 50), (-8, -12, 74), (-2, -6, 88), (6, 8, 92), (9, 20, 86), (6, 23, 70)]
    canvas.tube(arch, (9, 9, 8.5, 8, 8, 7.5), blood + 20)
    canvas.tube([(-15, -4, 40), (-17, -6, 108), (-26, -4, 150)], (7, 6, 5), blood)
    for start, end in (((0, -4, 92), (-16, 2, 150)), ((5, 6, 94), (14, 4, 150)), ((-4, -8, 90), (18, -8, 150))):
        canvas.tube([start, end], 3.6, blood + 15)
    canvas.tube([(4, -16, 56), (4, -10, 70), (-24, 4, 62)], (9, 8, 6), blood)
    canvas.tube([(4, -10, 70), (26, 8, 64)], (8, 6), blood)
    for radius, value in ((6.5, 30.0), (4.8, -970.0)):
        canvas.tube([(0, 6, 150), (0, 10, 110), (0, 14, 78)], radius, value)
        canvas.tube([(0, 14, 80), (-14, 15, 66), (-32, 14, 56)], np.array((1, 0.9, 0.6)) * radius, value)
        canvas.tube([(0, 14, 80), (16, 16, 66), (32, 16, 56)], np.array((1, 0.85, 0.6)) * radius, value)
    canvas.tube([(2, 20, 150), (1, 24, 70), (8, 14, 14), (26, -4, 2)], 4.0, 40)


def _branch(
    canvas: Canvas, rng: Generator, start: np.ndarray, end: np.ndarray, radius: float, value: float, splits: int
) -> None:
    """Paint a lung vessel from `start` to `end` that splits `splits` times, as far as it ends inside the lung."""
    index = [np.searchsorted(axis, c * s) for axis, s, c in zip(canvas.axes, canvas.size, end[::-1], strict=True)]
    if any(i >= n for i, n in zip(index, canvas.labels.shape, strict=True)) or canvas.labels[tuple(index)] != 5:
        return
    middle = (start + end) / 2 + rng.uniform(-2, 2, 3)
    canvas.tube([start, middle, end], (radius, radius * 0.85, radius * 0.7), value)
    for _ in range(2 if splits else 0):
        step = (end - start) * rng.uniform(0.45, 0.75) + rng.uniform(-14, 14, 3)
        _branch(canvas, rng, end, end + step, radius * 0.7, value, splits - 1)


def _paint_spine(canvas: Canvas, rng: Generator, body: _Body, marrow: float, cortex: float) -> None:
    """Paint the vertebrae with their discs and the spinal canal."""
    x, y, z = canvas.x, canvas.y, canvas.z
    pitch, phase = rng.uniform(17, 19.5), rng.uniform(0, 18)
    level = np.abs((z + phase) % pitch - pitch / 2)  # 0 in the middle of a vertebra, pitch / 2 in the middle of a disc
    back = y - body.spine_y
    width = 12.5 + 3.0 * np.clip((40 - z) / 120, 0, 1) + 5 * np.clip((-z - 100) / 30, 0, 1)
    column = oval(x, back, width - 1.2 * np.cos(level / pitch * np.pi), 0.78 * width, 2.3)
    bone = np.maximum(column, level - (pitch / 2 - 2.4))
    canvas.paint(column, 85, 6)
    canvas.paint(bone, cortex * 0.8, 6)
    canvas.paint(bone + 1.8, marrow + 25 * canvas.rough)
    canal = back - 0.78 * width - 5.5
    ring = np.maximum(oval(x, canal, 10.0, 8.5, 2.0), level - pitch * 0.36)
    spinous = np.maximum.reduce([np.abs(x) - 2.2, 4 - canal, canal - 16, body.wall + 4, np.abs(level - 1) - 4.5])
    transverse = np.maximum.reduce([np.abs(x) - 25, np.abs(canal + 1 - 0.12 * np.abs(x)) - 2.6, level - 3.2])
    canvas.paint(np.minimum.reduce([ring, spinous, transverse]), cortex * 0.75, 6)
    canvas.paint(oval(x, canal, 6.2, 5.0, 2.0), 28, 0)


def _paint_other_bones(canvas: Canvas, rng: Generator, body: _Body, marrow: float, cortex: float) -> None:
    """Paint the ribs, breastbone, collarbones, shoulder blades and hip bones."""
    x, y, z = canvas.x, canvas.y, canvas.z
    gap = rng.uniform(15.5, 17.5)
    slope = rng.uniform(0.42, 0.55)
    # Ribs run down to the front, and up again as cartilage.
    height = z - slope * y + 0.3 * np.abs(x) + 4 * np.clip(-y / 40, 0, 2) ** 2
    rib = np.abs(height % gap - gap / 2) - 3.9
    shell = np.abs(body.cavity - 3.0) - 2.3
    ribs = np.maximum.reduce([shell, rib, -34 - 0.5 * np.clip(y, 0, None) - z, z - 122 + 0.3 * y, 12 - np.abs(x)])
    front = np.maximum(np.abs(x) - 36, y + 20)
    canvas.paint(np.maximum(ribs, -front), cortex * 0.9)
    canvas.paint(np.maximum(ribs, -front) + 2.4, marrow)
    canvas.paint(np.maximum.reduce([ribs, front, 8 - z]), 110)
    breast = np.maximum.reduce([np.abs(x) - 11, np.abs(body.cavity - 4) - 3.6, y, 18 - z, z - 96])
    canvas.paint(breast, cortex * 0.7)
    canvas.paint(breast + 2.2, marrow * 0.7)
    for side in (-1, 1):
        canvas.tube([(side * 8, -44, 98), (side * 34, -40, 110), (side * 66, -16, 116)], (5, 4, 4.5), cortex * 0.8)
        blade = np.array((side * 62, 44, 76))
        canvas.blob(blade, np.array((28, 3.4, 42)), cortex * 0.7, turn=-side * 0.62, lean=side * 0.1)
        wing = canvas.ellipsoid((side * 40, 8, -106), (44, 46, 52))
        wing = np.maximum.reduce([np.abs(wing) - 3.8, z + 88 + 0.2 * np.abs(y - 8), -side * x + 22, -y - 28])
        canvas.paint(wing, cortex * 0.85)
        canvas.paint(wing + 2.6, marrow)


def _scan(hu: np.ndarray, rng: Generator, spacing: Sequence[float]) -> np.ndarray:
    """Add what a scanner adds: a little blur, and grainy noise that is stronger behind more tissue."""
    dense = gaussian_filter((hu > -300).astype(np.float32), [n / 12 for n in hu.shape], truncate=2)
    grain = gaussian_filter(rng.standard_normal(hu.shape, np.float32), 0.55)
    sigma = rng.uniform(9, 15) * (3.0 / float(np.mean(spacing))) ** 0.5
    noisy = gaussian_filter(hu, 0.5) + grain / grain.std() * sigma * (0.4 + dense)
    return np.clip(np.rint(noisy), -1024, 3071).astype(np.int16)
