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

from nnunet_mim.nnunet.datasets import dataset_name, raw_images
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.nnunet.splits import fold_validation_cases

LEAST_VOXELS = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-f", type=int, default=0, metavar="FOLD")
    parser.add_argument(
        "-p", default="nnUNetMiMPlans", metavar="PLANS", help="if no training has written the split yet"
    )
    parser.add_argument("others", nargs="+", metavar="PRETRAINED_ON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dataset = dataset_name(options.d)
    held_out = set(held_out_cases(dataset, options.p, options.f))
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


def held_out_cases(dataset, plans, fold):
    """Of nnU-Net's split: the one that is there, or that which it would write."""
    splits = Path(os.environ["nnUNet_preprocessed"], dataset, "splits_final.json")
    if splits.is_file():
        return json.loads(splits.read_text())[fold]["val"]
    return fold_validation_cases(find_source(dataset, plans, "3d_fullres"), fold)


def images_of(dataset):
    """Case → first channel, of nnUNet_raw."""
    return {case: files[0] for case, files in raw_images(dataset).items()}


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
