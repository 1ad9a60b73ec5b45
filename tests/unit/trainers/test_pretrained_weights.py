"""nnU-Net's -pretrained_weights is refused in every way that argparse takes it."""

import argparse
import sys

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.trainers.trainer import _refuse_pretrained_weights

FLAG = "-pretrained_weights"
REFUSED = f"{FLAG} is not for nnUNetTrainerMiM"


@pytest.mark.parametrize("words", [[f"{FLAG}=a.pth"], ["-pretrained", "a.pth"], ["-pretrained_w=a.pth"]])
def test_it_is_refused_however_it_is_written(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "7", "3d_fullres", "0", *words])
    with pytest.raises(MiMError, match=REFUSED):
        _refuse_pretrained_weights("nnUNetTrainerMiM")


@pytest.mark.parametrize("length", range(2, len(FLAG) + 1))
@pytest.mark.parametrize("value", [["", "a.pth"], ["=a.pth"], ["="], ["a.pth"]])
@pytest.mark.parametrize("flags", [("-tr", "-p", FLAG, "-num_gpus"), ("-tr", FLAG)], ids=["nnU-Net's", "without -p"])
def test_all_that_argparse_takes_is_refused(monkeypatch, length, value, flags):
    parser = argparse.ArgumentParser()
    for flag in flags:
        parser.add_argument(flag)
    words = [f"{FLAG[:length]}{value[0]}", *value[1:]]
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", *words])
    try:
        taken = parser.parse_args(words).pretrained_weights is not None
    except SystemExit:
        return
    if taken and len(words[0]) > 2 and not words[0].startswith("-p="):
        with pytest.raises(MiMError, match=REFUSED):
            _refuse_pretrained_weights("nnUNetTrainerMiM")


@pytest.mark.parametrize("words", [["-p", "pretrained_weights"], ["-ptrained"], ["-p=-pretrained_weights"]])
def test_the_name_of_plans_is_no_such_flag(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", *words])
    _refuse_pretrained_weights("nnUNetTrainerMiM")
