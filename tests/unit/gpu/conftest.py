"""Runs a benchmark of benchmarks/gpu in a process of its own, where Triton compiles instead of interpreting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


@pytest.fixture
def gpu_benchmark(tmp_path_factory):
    """gpu_benchmark(script, *flags, **environment): the JSON that it prints in its last line.

    What Triton has compiled is kept for the tests after it: presets have stages in common.
    """
    compiled = tmp_path_factory.getbasetemp() / "triton"

    def run(script, *flags, **variables):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, FOLDER / script, *flags, "--json"]
        environment |= {"TRITON_CACHE_DIR": str(compiled), **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
