"""Does the search for copies of a CT find them, and does it leave other patients alone?

    python benchmarks/leak_guard.py [--data FOLDER] [--cases 60] [--half reported|chosen] [--json]

An image that was pretrained on (4 mm, window -1000 to 1000 HU, nnU-Net's preprocessing) is compared with changed copies
of it, by fingerprints alone, those with shifted HU too. Copies are in that window once, and once in the narrow one of
MSD's liver (-17 to 201 HU). Pairs of different patients are compared at their own spacing, in both windows. One half of
the cases by a hash of their names was used to choose settings and thresholds; what is reported is of the others, of
those of Dataset504, and for pairs of all that are not both of the first half. FOLDER is laid out as that of the tests
(MIM_TEST_DATA).

The last line of --json holds the share of copies that are found under "variants" for the wide window, which is that of
mim_prepare, and under "narrow_window" for the narrow one.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.checkpoint.fingerprint import copied_from, fingerprints_of_copy
from nnunet_mim.checkpoint.units import Units
from nnunet_mim.inspection.ct import preprocess
from nnunet_mim.nnunet.raw_image import Grid, RawImage

TEST_SET = "Dataset504_HeadNeckOARTest"
DATASETS = ("Dataset501_HeadNeckOAR", "Dataset502_SarcomaGTV", TEST_SET)
FOLDERS = (*(f"nnUNet_raw/{name}/imagesTr" for name in DATASETS), "unlabeled")
SMALL = "nnUNet_raw/Dataset503_LIDCNodule"
SAME_PATIENT = {"elastix_lung_baseline", "elastix_lung_followup"}
WINDOWS = {"wide": (-1000.0, 1000.0), "narrow": (-17.0, 201.0)}


def units(window):
    """As in a checkpoint's provenance."""
    low, high = WINDOWS[window]
    properties = {"percentile_00_5": low, "percentile_99_5": high, "mean": 50.0, "std": 100.0}
    return {
        "normalization": ["CTNormalization"], "intensity_properties": {"0": properties}, "configuration": "3d_fullres",
        "transpose_forward": [0, 1, 2],
    }  # fmt: skip


def read(path):
    """Voxels (Z, Y, X) in HU, and mm along these axes."""
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image).astype(np.float32), np.array(image.GetSpacing()[::-1])


def at_own_spacing(voxels, spacing, window):
    """`fingerprints_of_copy` of an image that is clipped and normalised, not resampled."""
    found = Units.of(units(window))
    std, mean = found.scale()
    return fingerprints_of_copy((voxels[None].clip(*WINDOWS[window]) - mean) / std, found, spacing)


def at_4_mm(voxels, spacing, window):
    """`fingerprints_of_copy` of an image that nnU-Net has preprocessed."""
    image = RawImage("case", voxels[None], Grid(np.zeros(3), np.diag(spacing)))
    provenance = {**units(window), "spacing": [4.0] * 3}
    return fingerprints_of_copy(preprocess(image, provenance)[0], Units.of(provenance), provenance["spacing"])


def resampled(voxels, spacing, mm):
    """By SimpleITK, linearly."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    size = [round(n * s / mm) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    edge = image.TransformContinuousIndexToPhysicalPoint([-0.5 * (1 - mm / s) for s in image.GetSpacing()])
    changed = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, edge, [mm] * 3, image.GetDirection(), -1000)
    return sitk.GetArrayFromImage(changed), np.full(3, mm)


def copies(voxels, spacing):
    """Yields name, voxels, mm of changed copies."""
    random = np.random.default_rng(0)
    one = voxels.copy()
    one[tuple(n // 2 for n in one.shape)] += 1
    for axis, name in enumerate("zyx"):
        yield f"mirrored along {name}", np.flip(voxels, axis), spacing
    yield "one voxel changed by 1 HU", one, spacing
    yield "two voxels cropped", voxels[2:, 2:, 2:], spacing
    yield "one slice less", voxels[:-1], spacing
    yield "padded", np.pad(voxels, ((5, 0), (12, 7), (0, 20)), constant_values=-1000), spacing
    yield "resampled to 1.5 mm", *resampled(voxels, spacing, 1.5)
    yield "resampled to 3 mm", *resampled(voxels, spacing, 3.0)
    yield "noise of 1 HU", voxels + random.normal(0, 1, voxels.shape).astype(np.float32), spacing
    yield "rounded", np.round(voxels.astype(np.float16).astype(np.float32) / 5) * 5, spacing
    yield "10 HU more", voxels + 10, spacing
    yield "24 HU more", voxels + 24, spacing
    yield "24 HU less", voxels - 24, spacing
    yield "axes transposed", voxels.transpose(2, 0, 1), spacing[[2, 0, 1]]
    turned = sitk.DICOMOrient(sitk.GetImageFromArray(voxels), "SAR")
    yield "another orientation code", sitk.GetArrayFromImage(turned), spacing[[1, 2, 0]]


def hit_rates(cases):
    """Share of copies that are found, by window and name."""
    hits = {window: defaultdict(list) for window in WINDOWS}
    for _, _, path in cases:
        voxels, spacing = read(path)
        original = at_4_mm(voxels, spacing, "wide")[:1]
        for window in WINDOWS:
            found = {name: at_own_spacing(*copy, window) for name, *copy in copies(voxels, spacing)}
            found["header spacing"] = at_4_mm(voxels, spacing * (1.3, 1.0, 1.0), window)
            for name, row in found.items():
                hits[window][name].append(copied_from(row[None], original)[0] == 0)
    return {window: {name: float(np.mean(values)) for name, values in of.items()} for window, of in hits.items()}


def alarms(rows):
    """Pairs of rows, the later one first, that are probably the same."""
    pairs = []
    for row in range(1, len(rows)):
        others = np.arange(row)
        while len(others) and (found := copied_from(rows[[row]], rows[others, 0])[0]) >= 0:
            pairs.append((row, int(others[found])))
            others = np.delete(others, found)
    return pairs


def cases_in(data):
    """(half, name, path) of the real CT; half: chosen, reported or test."""
    for folder in FOLDERS:
        for path in sorted(Path(data, folder).glob("*.nii.gz")):
            name = path.name.removesuffix(".nii.gz").removesuffix("_0000")
            first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 == 0
            yield "test" if TEST_SET in folder else "chosen" if first else "reported", name, path


def measured(data, n_copied, half="reported", n_images=None):
    """What --json prints: rates of copies of `n_copied` cases, alarms over pairs of all, or of `n_images` of them."""
    began = time.perf_counter()
    cases = list(cases_in(data))
    wanted = {"chosen"} if half == "chosen" else {"reported", "test"}
    if half == "chosen":
        cases = [case for case in cases if case[0] in wanted]
    cases = evenly(cases, n_images or len(cases))
    chosen = evenly([case for case in cases if case[0] in wanted], n_copied)
    rows, seconds = defaultdict(list), []
    for _, _, path in cases:
        voxels, spacing = read(path)
        for window in WINDOWS:
            start = time.process_time()
            rows[window].append(at_own_spacing(voxels, spacing, window))
            seconds.append(time.process_time() - start)
    counted = [
        (a, b) for a, b in itertools.combinations(cases, 2)
        if ({a[0], b[0]} != {"chosen"} or half == "chosen") and {a[1], b[1]} != SAME_PATIENT
    ]  # fmt: skip
    found = {window: [(cases[a], cases[b]) for a, b in alarms(np.array(rows[window]))] for window in WINDOWS}
    false = {
        window: [f"{a[1]} {b[1]}" for a, b in pairs if (b, a) in counted] for window, pairs in found.items()
    }  # fmt: skip
    same_patient = {window: any({a[1], b[1]} == SAME_PATIENT for a, b in pairs) for window, pairs in found.items()}
    crops = sorted(Path(data, SMALL, "imagesTr").glob("*.gz"))[:n_images]
    small = [at_own_spacing(*read(path), "wide") for path in crops]
    rates = hit_rates(chosen)
    return {
        "variants": rates["wide"], "narrow_window": rates["narrow"],
        "false_alarms": sum(map(len, false.values())), "pairs": len(counted), "alarms": false,
        "copies_of": len(chosen), "same_patient_two_dates": same_patient,
        "small_not_compared": [int(sum(not row.any() for row in small)), len(small)],
        "cpu_ms_a_case": 1000 * float(np.mean(seconds)), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def evenly(items, number):
    """So many of a list, evenly spread; all where there are fewer."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[place] for place in places]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MIM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--cases", type=int, default=60, help="number of cases that copies are made of")
    parser.add_argument("--half", choices=("reported", "chosen"), default="reported")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measured(options.data, options.cases, options.half)
    print(f"copies of {result['copies_of']} cases that are found ({options.half} half)")
    for name, rate in result["variants"].items():
        print(f"  {name:28} {rate:.3f}   narrow window {result['narrow_window'][name]:.3f}")
    print(f"{result['pairs']} pairs of different patients, false alarms: {result['alarms']}")
    print("{} of {} small crops are not compared".format(*result["small_not_compared"]))
    print(f"two dates of one patient are the same: {result['same_patient_two_dates']}")
    print(f"{result['cpu_ms_a_case']:.0f} ms a case, {result['seconds']:.0f} s in all")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
