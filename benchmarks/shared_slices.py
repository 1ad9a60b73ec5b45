"""Does a pretraining see slices of the validation cases, such as slabs of the same patients? Voxels are compared.

    python benchmarks/shared_slices.py -d 501 -f 0 501 800

-d, -f: whose validation cases. Then the datasets of the pretraining; of the first dataset its training cases count.
Axial slices are compared by the hash of their voxels as stored, so that a slab cut from an image is found, and one that
was resampled is not. Slices with fewer than 1000 voxels unlike their first one (air) are left out.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_mim.dataset_name import dataset_name

LEAST_VOXELS = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-f", type=int, default=0, metavar="FOLD")
    parser.add_argument("others", nargs="+", metavar="PRETRAINED_ON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dataset = dataset_name(options.d)
    splits = json.loads(Path(os.environ["nnUNet_preprocessed"], dataset, "splits_final.json").read_text())
    held_out = set(splits[options.f]["val"])
    owners = {}
    for case, path in images_of(dataset).items():
        if case in held_out:
            owners |= dict.fromkeys(slice_hashes(path), case)
    found, n_cases = {}, 0
    for name in map(dataset_name, options.others):
        for case, path in images_of(name).items():
            if name == dataset and case in held_out:
                continue
            n_cases += 1
            for shared in slice_hashes(path) & owners.keys():
                pair = f"{name} {case} and {owners[shared]}"
                found[pair] = found.get(pair, 0) + 1
    result = {"held_out": len(held_out), "slices": len(owners), "compared_with": n_cases, "shared": found}
    if options.json:
        print(json.dumps(result))
        return
    print(f"{len(owners)} slices of {len(held_out)} held-out cases, compared with {n_cases} cases of the pretraining")
    print("\n".join(f"{pair}: {count} slices" for pair, count in found.items()) or "none is shared")


def images_of(dataset):
    """Case → first channel, of nnUNet_raw."""
    folder = Path(os.environ["nnUNet_raw"], dataset)
    cases = get_filenames_of_train_images_and_targets(str(folder), json.loads((folder / "dataset.json").read_text()))
    return {case: entry["images"][0] for case, entry in cases.items()}


def slice_hashes(path):
    """Of an image's axial slices with something in them."""
    image = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS"))
    return {
        hashlib.sha256(np.ascontiguousarray(plane, dtype="<f4").tobytes()).hexdigest()
        for plane in image
        if (plane != plane.flat[0]).sum() >= LEAST_VOXELS
    }


if __name__ == "__main__":
    main()
