"""What `mim_benchmark prepare` says to archives that are whole, and to those that are broken as real downloads are."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nnunet_mim.benchmarking import archives
from nnunet_mim.benchmarking.archives import BTCV_CASES, MSD_CASES, _geometry_problem, find_btcv, find_msd
from nnunet_mim.benchmarking.cli import main
from nnunet_mim.errors import MiMError

TURNED = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
"""direction: half a turn about the z axis"""


def change_description(msd, **changes):
    path = msd / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def compress(path, change):
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def test_published_numbers_of_cases(volumes, tmp_path):
    spleen = find_msd(volumes.write_msd(tmp_path / "Task09_Spleen", 41))
    assert (spleen.dataset, len(spleen.cases), spleen.problems) == ("Dataset009_Spleen", 41, ())
    assert sum(MSD_CASES.values()) == 131 + 63 + 281 + 303 + 41 + 126
    assert len(BTCV_CASES) == 30


BROKEN = {
    "no label": (
        lambda msd, v: (msd / "labelsTr" / "spleen_3.nii.gz").unlink(),
        "labelsTr/spleen_3.nii.gz is missing, its image is there: extract the archive again, or leave the case out",
    ),
    "no image": (
        lambda msd, v: (msd / "imagesTr" / "spleen_3.nii.gz").unlink(),
        "imagesTr/spleen_3.nii.gz is missing, its label is there",
    ),
    "neither": (
        lambda msd, v: [(msd / part / "spleen_3.nii.gz").unlink() for part in ("imagesTr", "labelsTr")],
        "has 2 of 3 training cases, spleen_3.nii.gz among the missing: extract the archive again, or take",
    ),
    "too many": (
        lambda msd, v: [v.write(msd / part / "mine.nii.gz", v.organs(1)) for part in ("imagesTr", "labelsTr")],
        "has 4 training cases, 3 are published: take out what was added",
    ),
    "another count": (
        lambda msd, v: change_description(msd, numTraining=5),
        "dataset.json says 5 training cases, 3 are published and there",
    ),
    "4-D": (
        lambda msd, v: v.write(msd / "imagesTr" / "spleen_3.nii.gz", v.ct(0, (2, 8, 8, 8))),
        "imagesTr/spleen_3.nii.gz is 4-D (8 x 8 x 8 x 2), not a 3-D volume",
    ),
    "4-D label": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(1, (2, 8, 8, 8))),
        "labelsTr/spleen_3.nii.gz is 4-D",
    ),
    "4-D test image": (
        lambda msd, v: v.write(msd / "imagesTs" / "spleen_7.nii.gz", v.ct(0, (2, 8, 8, 8))),
        "imagesTs/spleen_7.nii.gz is 4-D",
    ),
    "size": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(1, (7, 8, 8))),
        "labelsTr/spleen_3.nii.gz has 8 x 8 x 7 voxels, its image 8 x 8 x 8",
    ),
    "spacing": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(1), spacing=(0.8, 0.8, 2.4)),
        "labelsTr/spleen_3.nii.gz has spacing (0.8, 0.8, 2.4) mm, its image (0.8, 0.8, 2.5) mm",
    ),
    "origin": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(1), origin=(-120.5, 33.25, 402.5)),
        "has origin (-120.5, 33.25, 402.5) mm, its image (-120.5, 33.25, 400) mm (x, y, z): extract the archive",
    ),
    "direction": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(1), direction=TURNED),
        "labelsTr/spleen_3.nii.gz has another direction than its image",
    ),
    "label values": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(3)),
        "labelsTr/spleen_3.nii.gz has label values 2, 3, expected 0 to 1",
    ),
    "fractional label": (
        lambda msd, v: v.write(msd / "labelsTr" / "spleen_3.nii.gz", v.organs(1).astype(np.float32) / 2),
        "has label values 0.5, expected 0 to 1",
    ),
    "cut image": (
        lambda msd, v: [
            v.write(msd / "imagesTr" / "spleen_3.nii.gz", v.ct(0, (16, 16, 16))),
            cut(msd / "imagesTr" / "spleen_3.nii.gz"),
        ],
        "imagesTr/spleen_3.nii.gz is damaged (Compressed file ended",
    ),
    "cut label": (
        lambda msd, v: cut(msd / "labelsTr" / "spleen_3.nii.gz", 0.97),
        "labelsTr/spleen_3.nii.gz is damaged (",
    ),
    "cut test image": (
        lambda msd, v: cut(msd / "imagesTs" / "spleen_7.nii.gz"),
        "imagesTs/spleen_7.nii.gz is damaged (",
    ),
    "cut, then compressed": (
        lambda msd, v: compress(msd / "imagesTr" / "spleen_3.nii.gz", lambda content: content[:-100]),
        "imagesTr/spleen_3.nii.gz is damaged (ends 50 voxels early)",
    ),
    "empty file": (
        lambda msd, v: cut(msd / "imagesTr" / "spleen_3.nii.gz", 0),
        "imagesTr/spleen_3.nii.gz cannot be read (the file is empty)",
    ),
    "a web page": (
        lambda msd, v: (msd / "imagesTr" / "spleen_3.nii.gz").write_text("<html>quota exceeded</html>"),
        "imagesTr/spleen_3.nii.gz is damaged (",
    ),
    "strange header": (
        lambda msd, v: compress(msd / "imagesTr" / "spleen_3.nii.gz", lambda c: c[:70] + b"\x63\x63" + c[72:]),
        "imagesTr/spleen_3.nii.gz is damaged (",
    ),
    "decompressed": (
        lambda msd, v: (msd / "imagesTr" / "spleen_3.nii.gz").rename(msd / "imagesTr" / "spleen_3.nii"),
        "spleen_3.nii has been decompressed: extract the archive again, so that it is spleen_3.nii.gz",
    ),
    "no dataset.json": (lambda msd, v: (msd / "dataset.json").unlink(), "Task09_Spleen has no dataset.json: extract"),
    "cut dataset.json": (lambda msd, v: cut(msd / "dataset.json", 0.1), "dataset.json (Expecting"),
    "dataset.json is a list": (lambda msd, v: (msd / "dataset.json").write_text("[]"), "dataset.json has no modality"),
    "not CT": (lambda msd, v: change_description(msd, modality={"0": "MRI"}), "not CT alone"),
    "strange labels": (
        lambda msd, v: change_description(msd, labels={"spleen": 1}),
        "dataset.json: labels.spleen.[key]: string should match pattern",
    ),
    "no labelsTr": (lambda msd, v: shutil.rmtree(msd / "labelsTr"), "Task09_Spleen has no labelsTr: extract"),
    "no imagesTr": (lambda msd, v: shutil.rmtree(msd / "imagesTr"), "Task09_Spleen has no imagesTr: extract"),
    "no imagesTs": (lambda msd, v: shutil.rmtree(msd / "imagesTs"), "has no imagesTs: extract the archive again; an"),
    "nothing in it": (
        lambda msd, v: [(msd / "labelsTr" / f"spleen_{number}.nii.gz").unlink() for number in (2, 3, 4)],
        "holds no case with image and label",
    ),
    "channel numbers": (
        lambda msd, v: v.write(msd / "imagesTr" / "spleen_3_0000.nii.gz", v.ct()),
        "has a channel number, as in nnU-Net datasets",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_msd(msd, volumes, refused, fault):
    do, says = BROKEN[fault]
    do(msd, volumes)
    assert says in refused("--msd", msd)


def test_all_problems_are_shown_and_all_archives_are_looked_at(msd, btcv, folders, volumes, capsys):
    volumes.write(msd / "labelsTr" / "spleen_3.nii.gz", volumes.organs(3))
    volumes.write(btcv / "Training" / "label" / "label0005.nii.gz", volumes.organs(14))
    assert main(["prepare", "--msd", str(msd), "--btcv", str(btcv)]) == 2
    errors = capsys.readouterr().err
    assert "spleen_3.nii.gz has label values 2, 3" in errors
    assert "label0005.nii.gz has label values 14, expected 0 to 13" in errors
    assert "error: 2 problems, nothing was written" in errors


def test_wrong_folders(msd, btcv, refused, tmp_path):
    archive = tmp_path / "download" / "Task03_Liver.tar"
    archive.write_bytes(b"tar")
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "RawData.zip").write_bytes(b"zip")
    heart = tmp_path / "Task02_Heart"
    shutil.copytree(msd, heart)
    assert "Task03_Liver.tar is the archive itself: extract" in refused("--msd", archive)
    assert f"another layout: give {msd}" in refused("--msd", msd.parent)
    assert f"is a part of the archive: give {msd}" in refused("--msd", msd / "imagesTr")
    assert "does not exist" in refused("--msd", tmp_path / "gone")
    assert "is none of MSD's CT tasks" in refused("--msd", heart)
    assert f"another layout: give {btcv}" in refused("--btcv", btcv.parent)
    assert f"is a part of the archive: give {btcv}" in refused("--btcv", btcv / "Training")
    assert "holds RawData.zip: extract it" in refused("--btcv", packed)
    assert "give the folder RawData as extracted" in refused("--btcv", msd)
    assert "would be made of two folders" in refused("--msd", msd, msd)
    assert "give folders with --msd or --btcv" in refused()
    assert "give a number from 1 to 999" in refused("--btcv", btcv, "--btcv_id", "1000")
    shutil.rmtree(btcv / "Training" / "label")
    assert "Training/label is missing" in refused("--btcv", btcv)


def test_broken_btcv(btcv, volumes, refused):
    label = btcv / "Training" / "label" / "label0009.nii.gz"
    whole = label.read_bytes()
    cut(label)
    assert "label0009.nii.gz is damaged (" in refused("--btcv", btcv)
    label.unlink()
    # as one of two problems: the case, and the number of cases
    assert "label/label0009.nii.gz is missing, its image is there" in refused("--btcv", btcv)
    assert "published splits need all 30 cases, img0009 is missing" in refused("--btcv", btcv, "--partial", "--splits")
    label.write_bytes(whole)
    volumes.write(btcv / "Training" / "img" / "img0061.nii.gz", volumes.ct())
    assert "img0061.nii.gz is no case of BTCV's training set" in refused("--btcv", btcv)


def test_rounded_origins_are_no_problem(volumes, tmp_path):
    image, label = tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"
    volumes.write(image, volumes.ct())
    volumes.write(label, volumes.organs(1), origin=(-120.46, 33.25, 400.0))
    assert _geometry_problem(image, label) is None
    volumes.write(label, volumes.organs(1), origin=(-120.0, 33.25, 400.0), direction=TURNED)
    assert "origin" in (_geometry_problem(image, label) or "")
    assert _geometry_problem(image, label, ignore_origin=True) is None
    volumes.write(label, volumes.organs(1), spacing=(0.8, 0.8, 2.4))
    assert "spacing" in (_geometry_problem(image, label, ignore_origin=True) or "")


def test_a_fourth_axis_of_one_voxel_is_no_fourth_axis(volumes, tmp_path):
    path = tmp_path / "image.nii.gz"
    volumes.write(path, volumes.ct(0, (1, 8, 8, 8)))
    assert archives._file_problem(path) is None


def test_links_to_the_archive_keep_their_name(msd, folders, tmp_path):
    """Folders of MSD are often links into a store with other names; the name of the link counts."""
    store = tmp_path / "store_17"
    msd.rename(store)
    msd.symlink_to(store, target_is_directory=True)
    assert find_msd(msd).dataset == "Dataset009_Spleen"
    with pytest.raises(MiMError, match="none of MSD's CT tasks"):
        find_msd(store)


def test_btcv_names(btcv):
    archive = find_btcv(Path(btcv), 220)
    assert [case.name for case in archive.cases] == list(BTCV_CASES)
    assert archive.problems == ()
    assert archive.labels["left adrenal gland"] == 13


JUNK = (
    ..., None, True, -1, 0, 5, 1.5, 2**40, "", "x", "\0", "01", "spleen", [], [[]], ["a", "b"], {},
    {"0": ["a"], "1": "b"}, {"0": {}}, {"0": "background", "1": "spleen"}, {"0": "background", "2": "spleen"},
    {"0": "background", "1": "a", "2": "a"}, {"0": "background", "01": "a"}, {"0": "background", "\u0661": "x"},
    {"1": "background", "0": "x"},
)  # fmt: skip
ADDED = ("dataset", "regions_class_order", "overwrite_image_reader_writer", "file_ending", "channel_names")
"""keys that nnU-Net acts on, and no archive has"""


def is_as_in_archives(content):
    """Whether all that is read of a dataset.json is as the Decathlon's pages describe it."""
    labels, listed = content["labels"], content["training"]
    texts = [content[key] for key in ("name", "description", "licence", "release", "tensorImageSize") if key in content]
    texts += [labels[str(n)] for n in range(len(labels))]  # KeyError: they are not numbered from 0
    return (
        content["modality"] == {"0": "CT"}
        and len(labels) > 1
        and labels["0"] == "background"
        and len(set(labels.values())) == len(labels)
        and type(content["numTraining"]) is int
        and 0 < content["numTraining"] <= 1_000_000
        and all(type(entry["image"]) is str and "\0" not in entry["image"] and entry["image"] for entry in listed)
        and all(type(text) is str and text and text.isprintable() for text in texts)
    )


def test_no_description_is_misread(volumes, tmp_path, junk, examples):
    """Junk in any place of the archive's dataset.json is refused in one line, or is not read at all."""
    msd = volumes.write_msd(tmp_path / "Task09_Spleen", 3)
    whole = json.loads((msd / "dataset.json").read_text())

    good = find_msd(msd, partial=True)

    @examples(150, 2000)
    @example(share=0.21875, value="\x00", added="")
    @given(share=st.floats(0, 1, exclude_max=True), value=st.sampled_from(JUNK), added=st.sampled_from(("", *ADDED)))
    def holds(share, value, added):
        path = (added,) if added else junk.at(whole, share)
        content = junk.put(whole, path, value) if not added or value is not ... else whole
        (msd / "dataset.json").write_text(json.dumps(content))
        archive = junk.taken(lambda path: find_msd(path, partial=True), msd)
        if archive is None:
            return
        assert is_as_in_archives(content)
        assert archive.labels == {name: int(value) for value, name in content["labels"].items()}
        assert [case.name for case in archive.cases] == [case.name for case in good.cases]
        assert not {*archive.about} & {*ADDED}
        assert archive.about == {key: content[key] for key in good.about if key in content}

    holds()
