"""The tutorial on SLURM: its scripts run with commands that only write down how they were called."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from nnunet_mim.benchmarking import cli as benchmark_cli
from nnunet_mim.benchmarking.bench_file import read_bench
from nnunet_mim.preparation import prepare_cli
from nnunet_mim.preparation.cluster import cluster_executor
from nnunet_mim.pretraining import cli as pretrain_cli
from nnunet_mim.settings import parse_settings
from nnunet_mim.system.slurm import slurm_executor

pytest.importorskip("submitit")

TEXT = (Path(__file__).parents[2] / "docs" / "tutorials" / "slurm.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
(PREPARE,) = (block for block in BLOCKS if block.startswith("mim_prepare"))
(PRETRAIN,) = (block for block in BLOCKS if "srun mim_pretrain" in block)
(FINETUNE,) = (block for block in BLOCKS if "#SBATCH --array" in block)
(SUBMIT,) = (block for block in BLOCKS if "sbatch --parsable" in block)
(MEASURE,) = (block for block in BLOCKS if block.startswith("mim_benchmark"))
RUN = "Dataset501_HeadNeckOAR/MiMPretrain__nnUNetMiMPlans__3d_fullres/fold_0"
STUB = """\
#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
if [ "$(basename "$0")" = "$FAILS" ]; then exit "$CODE"; fi
if [ "$(basename "$0")" = sbatch ]; then echo 17; fi
"""


@pytest.fixture
def called(tmp_path):
    """called(script, name, code, **environment): (exit code, calls) where the command `name` ends with that code."""
    for name in ("srun", "scontrol", "sbatch", "mim_prepare", "mim_benchmark", "nnUNetv2_train"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)

    def call(script, name="", code=0, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        stubs = {"CALLS": calls, "FAILS": name, "CODE": code, "SLURM_JOB_ID": 5, "nnUNet_results": tmp_path}
        environment = {k: str(v) for k, v in (stubs | environment).items()}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash", "-u", "-c", script], env={**os.environ, **environment, "PATH": path})
        return done.returncode, calls.read_text().splitlines()

    return call


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_pretraining_is_requeued_where_it_was_stopped_only(called, tmp_path, code, saved):
    if saved:
        (tmp_path / RUN).mkdir(parents=True)
        (tmp_path / RUN / "checkpoint_latest.pth").touch()
    exit_code, (pretraining, *others) = called(PRETRAIN, "srun", code)
    assert exit_code == code, "jobs that wait for it start after success only"
    assert others == (["scontrol requeue 5"] if code == 75 else [])
    name, *words = pretraining.split()[1:]
    assert name == "mim_pretrain"
    options = pretrain_cli._build_parser().parse_args(words)
    assert getattr(options, "resume", False) == saved


@pytest.mark.parametrize(("task", "trainer"), [(0, "nnUNetTrainerMiM"), (1, "nnUNetTrainerMiMScratch")])
def test_each_task_of_the_array_trains_another_network(called, task, trainer):
    exit_code, (call,) = called(FINETUNE, SLURM_ARRAY_TASK_ID=task)
    assert exit_code == 0
    assert call == f"nnUNetv2_train 501 3d_fullres 0 -tr {trainer} -p nnUNetMiMPlans --c"
    assert called(FINETUNE, "nnUNetv2_train", 3, SLURM_ARRAY_TASK_ID=task)[0] == 3


def test_finetuning_waits_for_the_pretraining(called):
    _, calls = called(SUBMIT)
    assert calls == ["sbatch --parsable pretrain.sh", "sbatch --dependency=afterok:17 finetune.sh"]


def test_the_other_commands_parse(called, tmp_path):
    _, calls = called(PREPARE)
    for words in (call.split()[1:] for call in calls):
        options = prepare_cli._parser().parse_args(words)
        slurm = parse_settings(options.slurm)
        assert cluster_executor({**slurm, "cluster": "local"}, options.np, tmp_path)[1] == slurm["jobs"]
    assert len(calls) == 2
    _, calls = called(MEASURE)
    assert [benchmark_cli._parser().parse_args(call.split()[1:]).dry_run for call in calls] == [True, False]


def test_the_experiment_is_read(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "bench.yaml").write_text(text)
    bench = read_bench(tmp_path / "bench.yaml")
    assert bench.slurm == yaml.safe_load(text)["slurm"]
    slurm_executor({**bench.slurm, "cluster": "local"}, tmp_path, {}, "slurm")
