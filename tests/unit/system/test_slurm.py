"""Jobs of SLURM through submitit."""

from types import SimpleNamespace

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.system.slurm import cause_of, submit_all

SBATCH = "Command 'sbatch file.sh' returned 1.\nsbatch: error: Batch job submission failed: Invalid partition specified"


def test_what_sbatch_refuses_is_one_line_and_the_others_are_cancelled():
    cancelled = []

    def submit(task):
        if task == "second":
            raise RuntimeError(SBATCH)
        return SimpleNamespace(cancel=lambda: cancelled.append(task))

    with pytest.raises(MiMError, match=r"^--slurm: sbatch: error: .*Invalid partition specified: correct .*see sinfo$"):
        submit_all(SimpleNamespace(submit=submit), ["first", "second", "third"], "--slurm")
    assert cancelled == ["first"]


def test_jobs_of_the_tasks():
    assert submit_all(SimpleNamespace(submit=str.upper), ["a", "b"], "slurm") == ["A", "B"]


def test_the_cause_is_the_last_line_of_the_error_before_the_logs():
    text = "Job (1) failed:\nTraceback\nValueError: no such file\n----------\n- log: here\n"
    assert cause_of(RuntimeError(text)) == "ValueError: no such file"
    assert cause_of(RuntimeError("killed")) == "killed"
