"""`mim_prepare -i` on a DICOM series that was prepared before, some slices of which cannot be read for the moment."""

import json
import os

import pytest

N_SLICES = 24


@pytest.fixture(params=[".dcm"])
def series(preparing, tmp_path, ct, dicom, here, capsys, request):
    """A series that is prepared as the case `scan`: its slices in their order. The parameter is their ending."""
    dicom(ct(5), tmp_path / "scan")
    for path in list((tmp_path / "scan").iterdir()):
        path.rename(path.with_suffix(request.param))
    assert preparing.new(tmp_path / "scan") == 0
    capsys.readouterr()
    slices = sorted((tmp_path / "scan").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    assert len(slices) == N_SLICES
    return slices


def kept(preparing):
    """The log's entry of the only case, and the content of its files."""
    assert preparing.log().skipped == {}
    (entry,) = preparing.log().prepared.values()
    copy = preparing.root / "nnUNet_raw" / "Dataset800_Mine" / "imagesTr" / "scan_0000.nii.gz"
    return entry, copy.stat().st_mtime_ns, {path.name: path.read_bytes() for path in preparing.folder().iterdir()}


def move_away(path):
    """As on a disk that is away: a link to nothing."""
    os.replace(path, path.parent.with_name(f"{path.name}.away"))
    path.symlink_to("/nowhere/slice")


def bring_back(path):
    path.unlink()
    os.replace(path.parent.with_name(f"{path.name}.away"), path)


@pytest.mark.parametrize("away", [[12], [22, 23], [0], range(N_SLICES)], ids=["middle", "last", "first", "all"])
@pytest.mark.parametrize("series", [".dcm", ""], indirect=True)
def test_a_series_whose_slices_are_away_stays_as_it_was_prepared(preparing, series, capsys, away):
    before = kept(preparing)
    for number in away:
        move_away(series[number])
    assert preparing.new(series[0].parent) == 0
    assert kept(preparing) == before
    assert "kept as it was prepared" in (said := capsys.readouterr().out)
    assert f"such as {series[min(away)].parent}" in said
    content = json.loads((preparing.folder().parent / "dataset.json").read_text())
    assert list(content["dataset"]) == ["scan"]


def test_a_series_that_is_back_is_as_before(preparing, series, capsys):
    before = kept(preparing)
    move_away(series[12])
    assert preparing.new(series[0].parent) == 0
    bring_back(series[12])
    capsys.readouterr()
    assert preparing.new(series[0].parent) == 0
    assert kept(preparing) == before
    assert "1 cases prepared, 0 left out" in (said := capsys.readouterr().out)
    assert "kept as" not in said


def test_other_settings_do_not_delete_a_series_whose_slices_are_away(preparing, series, capsys):
    before = kept(preparing)
    move_away(series[23])
    assert preparing(800, "-i", series[0].parent, "--overwrite", spacing="5") == 2
    assert "--overwrite would delete 1 prepared cases" in capsys.readouterr().err
    assert kept(preparing) == before


def test_slices_that_are_gone_make_a_shorter_ct_of_the_same_name(preparing, series):
    """Deleted files are not waited for, and files that were never in the series count for nothing."""
    series[0].unlink()
    (series[0].parent / "empty.dcm").touch()
    assert preparing.new(series[0].parent) == 0
    (entry,) = preparing.log().prepared.values()
    assert (entry["case"], entry["shape"][0]) == ("scan", N_SLICES - 1)


def test_a_series_whose_first_slice_comes_later_keeps_its_name(preparing, tmp_path, ct, dicom, here):
    dicom(ct(5), tmp_path / "scan")
    first = tmp_path / "scan" / "IM000_0.dcm"
    move_away(first)
    assert preparing.new(tmp_path / "scan") == 0
    bring_back(first)
    assert preparing.new(tmp_path / "scan") == 0
    (entry,) = preparing.log().prepared.values()
    assert (entry["case"], entry["shape"][0]) == ("scan", N_SLICES)


def test_a_log_that_does_not_name_the_slices_yet(preparing, series):
    """Of an earlier version: what cannot be read in the folder may have been one of them."""
    path = preparing.log().path
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "slices"}) + "\n" for e in entries))
    before = kept(preparing)
    move_away(series[23])
    assert preparing.new(series[0].parent) == 0
    (entry,) = preparing.log().prepared.values()
    assert entry == before[0]
