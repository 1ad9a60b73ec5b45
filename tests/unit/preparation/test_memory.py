"""A whole-body CT passes in bounded memory, with labels or without."""

import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.demo.phantoms import make_phantom

PROGRAM = """
import json, resource, sys
from nnunet_mim.preparation.prepare import PrepareConfig, prepare_dataset, prepare_folders
from nnunet_mim.preparation import prepare
from nnunet_mim.preparation.prepare_case import prepare_case
from pathlib import Path
def main():
    prepare.run_jobs = lambda jobs, *_: ((job.case.name, prepare_case(job, sys.argv[2])) for job in jobs)
    config = PrepareConfig(preset="tiny")
    if sys.argv[1] == "labelled":
        done = prepare_dataset("Dataset800_Large", config)
    else:
        done = prepare_folders("Dataset800_Large", [Path(sys.argv[1])], config)
    (entry,) = done.log.prepared.values()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps([entry["info"]["shape"], entry["seconds"], peak]))
if __name__ == "__main__":
    main()
"""


def write(voxels, path):
    """Enlarge 125 x 64 x 64 voxels eightfold and write them."""
    voxels = voxels.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    if voxels.dtype == np.int16:
        voxels += np.random.default_rng(0).integers(-20, 20, voxels.shape, dtype=np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.8, 0.8, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("labelled", [False, True])
def test_512_x_512_x_1000_in_less_than_6_gib(nnunet_folders, tmp_path, labelled):
    """Everything in one process, so the planner counts too."""
    hu, labels = make_phantom(0, (125, 64, 64))
    raw = nnunet_folders / "nnUNet_raw" / "Dataset800_Large"
    where = raw / "imagesTr" / "large_0000.mha" if labelled else tmp_path / "ct" / "large.mha"
    write(np.round(hu).astype(np.int16), where)
    if labelled:
        write(labels.astype(np.uint8), raw / "labelsTr" / "large.mha")
        names = {"background": 0, **{f"organ_{i}": i for i in range(1, int(labels.max()) + 1)}}
        content = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 1, "file_ending": ".mha"}
        (raw / "dataset.json").write_text(json.dumps(content))
    (tmp_path / "program.py").write_text(PROGRAM)  # a file, since nnU-Net's fingerprint is made in a new process
    command = [sys.executable, tmp_path / "program.py", "labelled" if labelled else tmp_path / "ct", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    shape, seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{seconds:.0f} s, {peak:.2f} GiB")
    assert shape == [667, 273, 273]
    assert peak < 6
