"""A whole-body CT passes in bounded memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

PROGRAM = """
import json, resource, sys
from nnunet_mim.preparation.prepare import PrepareConfig, prepare_folders
from nnunet_mim.preparation import prepare
from nnunet_mim.preparation.prepare_case import prepare_case
from pathlib import Path
prepare.run_jobs = lambda jobs, *_: ((job.case, prepare_case(job, sys.argv[2])) for job in jobs)
done = prepare_folders("Dataset800_Large", [Path(sys.argv[1])], PrepareConfig(preset="tiny"))
(entry,) = done.log.prepared.values()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([entry["info"]["shape"], entry["seconds"], peak]))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
def test_512_x_512_x_1000_in_less_than_6_gib(nnunet_folders, tmp_path, ct):
    """Everything in one process, so the planner counts too."""
    small = sitk.GetArrayFromImage(ct(0, (125, 64, 64)))
    voxels = small.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    voxels += np.random.default_rng(0).integers(-20, 20, voxels.shape, dtype=np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.8, 0.8, 1.0))
    (tmp_path / "ct").mkdir()
    sitk.WriteImage(image, str(tmp_path / "ct" / "large.mha"))
    del image, voxels
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "ct"), str(tmp_path)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shape, seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{seconds:.0f} s, {peak:.2f} GiB")
    assert shape == [667, 273, 273]
    assert peak < 6
