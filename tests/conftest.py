"""Fixtures of all tests: the slow reference twins, and data that lies beside the project (never inside it)."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from nnunet_mim.system.guarded import prepare_workers

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # worker processes unpickle functions of tests; last, as the installed package is tested

# A shell's background job ignores Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread in every process: threads of a busy machine wait for each other, and the result of a sum depends on them.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_workers("nnunet_mim.preparation.prepare_case")  # so that those of all tests start in milliseconds

# Triton decides when it is imported, for its own library too, whether its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: machines are shared. In CI the examples are the same on every run.
settings.register_profile("nnunet_mim", deadline=None, max_examples=60, derandomize=os.environ.get("CI") == "true")
settings.load_profile("nnunet_mim")


@pytest.fixture(scope="session")
def reference():
    """The twins of tests/reference, e.g. `reference.losses.infonce`; without `reference_` in front, loaded once."""
    files = sorted((ROOT / "tests" / "reference").glob("reference_*.py"))
    return SimpleNamespace(**{path.stem.removeprefix("reference_"): _module(path) for path in files})


@pytest.fixture(scope="session")
def encode_dense():
    """The dense masked computation of the encoder, (encoder, images, mask) → latent tokens."""
    return _module(ROOT / "benchmarks" / "dense_encoder.py").encode_dense


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real CT: `MIM_TEST_DATA`, or `../shared/data` beside the project."""
    return _outside_folder(Path(os.environ.get("MIM_TEST_DATA") or ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def golden_folder():
    """Folder of stored outputs of the published model: `golden`, beside the folder of real CT."""
    data = Path(os.environ.get("MIM_TEST_DATA") or ROOT.parent / "shared" / "data")
    return _outside_folder(data.resolve().parent / "golden")


def _outside_folder(folder):
    """The folder; where it is missing the test is skipped, but fails in CI, which has to have it."""
    if not folder.is_dir():
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"{folder} is missing: set MIM_TEST_DATA to the folder of test CTs")
    return folder
