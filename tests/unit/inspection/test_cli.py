"""mim_inspect: what it says of a checkpoint, the page, and one line for what it cannot use."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from nnunet_mim.checkpoint.format import load_checkpoint, save_atomically
from nnunet_mim.inspection.cli import main


def said(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def history(n):
    return [
        {"iteration": 250.0 * i, "val/loss": 2.0 - i / 20, "val/level1/reconstruction": 1 - i / 20,
         "baseline/level1/token_mean": 1.0, "baseline/level1/infill": 0.9} for i in range(n)
    ]  # fmt: skip


def test_what_a_checkpoint_is(write_checkpoint, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = said(capsys, write_checkpoint(loss_history=history(8), iterations=250_000))
    for part in (
        "views 32 × 32 × 32, tokens 16 × 16 × 16 voxels, in the order of the plans; 1 channel",
        "Dataset900_Tiny: 1 cases trained on",
        "3 × 2.5 × 4 mm", "-1000 to 1000 HU", "level 1  64 × 64 × 64  192 × 160 × 256", "tinyPlans",
        "nnUNetv2_train 900 3d_fullres 0 -tr nnUNetTrainerMiM -p tinyPlans", "mim_plan -d DATASET -pc",
    ):  # fmt: skip
        assert part in re.sub(r" *\n *", " ", re.sub(r"(?<=\S)  +(?=\d)", "  ", text)), part
    assert re.search(r"level 1 +1\.000 +0\.900 +0\.650 +1\.000\n", text)
    assert "verdict      too early to say: 1750 of 12500 warm-up iterations done" in text
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_final.pth"]


def test_converted_weights_carry_their_note(write_checkpoint, capsys) -> None:
    path = write_checkpoint(
        (), datasets=[], cases=[], plans_name="", note="The weights carry no licence.", converted_from="official.pth",
        transpose_forward=None,
    )  # fmt: skip
    text = said(capsys, path)
    assert "note         The weights carry no licence." in text
    assert "converted from official.pth" in text
    assert "no measurements" in text


def test_page_with_pictures(write_checkpoint, write_ct, tmp_path, capsys) -> None:
    path = write_checkpoint(loss_history=history(8))
    folder = tmp_path / "new" / "looks"
    text = said(capsys, path, "-i", write_ct(), write_ct(name="other_0000.mha", add=20.0), "-o", folder)
    assert f"wrote {folder / 'report.html'}" in text
    names = [f"{case}_level{n}_{part}.nii.gz" for case in ("body", "other") for n in (1, 2, 3)
             for part in ("input", "mask", "masked", "reconstruction")]  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == [*names, "report.html"]
    page = (folder / "report.html").read_text()
    assert re.findall(r"<h2>Case (\w+)</h2>", page) == ["body", "other"]
    assert page.count("<img ") == 4


def test_page_without_pictures(write_checkpoint, tmp_path, capsys) -> None:
    said(capsys, write_checkpoint(), "-o", tmp_path / "looks")
    page = (tmp_path / "looks" / "report.html").read_text()
    assert "<img " not in page
    assert "Dataset900_Tiny: 1 cases trained on" in page


def test_two_images_of_one_name_and_notes(write_checkpoint, write_ct, tmp_path, capsys) -> None:
    path = write_checkpoint((), transpose_forward=None)
    folder = tmp_path / "looks"
    (tmp_path / "b").mkdir()
    text = said(capsys, path, "-i", write_ct(), write_ct(name="b/body.nrrd"), "-o", folder, "--spacing", 3, 3, 3)
    assert "order of axes" in text
    assert "--spacing is taken" in text
    assert (folder / "body_2_level1_input.nii.gz").is_file()


def test_several_channels(write_checkpoint, write_ct, tmp_path, capsys) -> None:
    path = write_checkpoint(channels=2)
    files = [write_ct(name="a_0000.nii.gz"), write_ct(name="a_0001.nii.gz", add=50.0)]
    assert "2 channels a case, 1 files" in refused(capsys, path, "-i", files[0], "-o", tmp_path / "looks")
    assert "a: wrote 12" in said(capsys, path, "-i", *files, "-o", tmp_path / "looks")


def test_other_seed_other_masks(write_checkpoint, write_ct, tmp_path, capsys) -> None:
    path, ct = write_checkpoint(), write_ct()
    for name, seed in (("a", 0), ("b", 5)):
        said(capsys, path, "-i", ct, "-o", tmp_path / name, "--seed", seed)
    a, b = ((tmp_path / name / "body_level1_mask.nii.gz").read_bytes() for name in "ab")
    assert a != b


def test_what_is_no_checkpoint(write_checkpoint, tmp_path, capsys) -> None:
    assert "missing.pth does not exist" in refused(capsys, tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("nothing")
    assert "no readable checkpoint" in refused(capsys, tmp_path / "text.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    assert "not written by mim_pretrain" in refused(capsys, tmp_path / "other.pth")
    whole = write_checkpoint().read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(capsys, tmp_path / "cut.pth")
    flipped = bytearray(whole)
    middle = len(whole) // 2
    flipped[middle : middle + 50] = bytes(b ^ 255 for b in flipped[middle : middle + 50])
    (tmp_path / "flipped.pth").write_bytes(flipped)
    assert "damaged" in refused(capsys, tmp_path / "flipped.pth")


def test_a_checkpoint_of_another_version(write_checkpoint, tmp_path, capsys) -> None:
    path = write_checkpoint()
    checkpoint = load_checkpoint(path)
    checkpoint["mim_config"]["new_setting"] = 1
    save_atomically(checkpoint, path)
    assert "new_setting" in refused(capsys, path)


def test_nothing_is_written_where_an_image_cannot_be_used(write_checkpoint, write_ct, tmp_path, capsys) -> None:
    folder = tmp_path / "looks"
    (tmp_path / "bad.nii.gz").write_text("no image")
    assert "bad.nii.gz" in refused(capsys, write_checkpoint(), "-i", write_ct(), tmp_path / "bad.nii.gz", "-o", folder)
    assert not list(folder.iterdir())


def test_folder_that_cannot_be_written(write_checkpoint, write_ct, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "choose another folder with -o" in refused(capsys, write_checkpoint(), "-i", write_ct(), "-o", folder)


def test_options(write_checkpoint, capsys) -> None:
    path = write_checkpoint()
    assert "above 0" in refused(capsys, path, "--spacing", 3, 0, 3)
    if not torch.cuda.is_available():
        assert "no cuda device" in refused(capsys, path, "-device", "cuda")
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert np.all([word in capsys.readouterr().out for word in ("NIfTI",)])
