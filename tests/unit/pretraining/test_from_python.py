"""`nnunet_mim.api.pretrain`: the command, with settings as arguments and errors as exceptions."""

import pytest
import torch

from nnunet_mim.api import load_encoder, pretrain
from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.errors import MiMError

SMALL = {
    "plans": "tinyPlans", "preset": "tiny", "view_size": 32, "scale": (2, 2, 2), "n_children": (2, 1), "batch_size": 1,
    "workers": 0, "device": "cpu", "iterations": 2, "val_crops": 1, "probe_every": 0,
}  # fmt: skip


def test_it_computes_what_the_command_does(write_dataset, small_runs):
    write_dataset()
    path = pretrain(900, tag="python", fold=0, **SMALL)
    assert path == small_runs.folder("python", 0) / "checkpoint_final.pth"
    options = ("--iterations", "2", "--set", "val_crops=1", "probe_every=0", "-f", "0", "-o", "command")
    assert small_runs.here(*options) == 0
    found, wanted = (load_checkpoint(small_runs.folder(tag, 0) / path.name) for tag in ("python", "command"))
    assert found["mim_config"] == wanted["mim_config"]
    for name, weight in wanted["network_weights"].items():
        assert torch.equal(found["network_weights"][name], weight), name
    assert load_encoder(path).spacing == (3.0, 3.0, 3.0)


def test_errors_are_exceptions(write_dataset):
    write_dataset()
    with pytest.raises(MiMError, match=r"unknown setting 'iteration': take one of .*iterations"):
        pretrain(900, iteration=3)
    with pytest.raises(MiMError, match=r"no CUDA device|nothing"):
        pretrain(900, **{**SMALL, "device": "cuda"} if not torch.cuda.is_available() else {"resume": True, **SMALL})
    with pytest.raises(MiMError, match="901"):
        pretrain([900, 901], **SMALL)
