"""Finding images in folders, and reading their headers."""

import gzip
import locale

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.dicom import dicom_problem
from nnunet_mim.nnunet.image_files import FileHeader, damaged, read_headers
from nnunet_mim.preparation.finding import Volume, find_volumes
from nnunet_mim.preparation.screening import Header, read_header, spacing_problem, voxel_problem


def names_in(*folders, **known):
    return [volume.name for volume in find_volumes(folders, **known)]


def test_files_of_all_kinds_nested_and_hidden_ones(tmp_path, ct, dicom):
    for name in ("a.nii.gz", "b c.nii", "x/y/d.nrrd", "x/y/e.mha", "x/f_0000.nii.gz", ".hidden.nii", "x/._d.nrrd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(ct(), str(tmp_path / name))
    sitk.WriteImage(ct(), str(tmp_path / "x" / "g.mhd"))  # with a g.raw or g.zraw beside it
    (tmp_path / "notes.txt").write_text("no image")
    dicom(ct(), tmp_path / "patient" / "scan", uid="1.9")
    assert names_in(tmp_path) == ["a", "b_c", "hidden", "patient_scan", "x_f", "x_g", "x_y_d", "x_y_e"]


@pytest.mark.parametrize("name", [".trash/deep/a.nii.gz", "x/.old/IM0001"])
def test_a_hidden_folder_with_images_is_named(tmp_path, ct, name):
    sitk.WriteImage(ct(), str(tmp_path / "b.nii"))
    for path, content in ((name, bytes(128) + b"DICM"), (".git/HEAD", b"ref"), (".cache/._a.nii", b"x")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(content)
    sound, hidden = find_volumes([tmp_path])
    assert sound.name == "b"
    assert hidden.files == (str(tmp_path / name.split("/deep")[0].removesuffix("/IM0001")),)
    assert hidden.header == "a hidden folder with images: rename it, or name it with -i"
    assert hidden.name == {".": "trash", "x": "x_old"}[name[0]]


def test_a_dicom_folder_itself_and_several_series_in_one(tmp_path, ct, dicom):
    dicom(ct(0), tmp_path / "scan", uid="1.5")
    assert names_in(tmp_path / "scan") == ["scan"]
    for file in list((tmp_path / "scan").iterdir()):
        file.rename(file.with_name("one_" + file.stem))  # no ending: known by its content
    dicom(ct(1), tmp_path / "scan", uid="1.6")
    volumes = find_volumes([tmp_path / "scan"])
    assert [len(volume.files) for volume in volumes] == [24, 24]
    assert {volume.series for volume in volumes} == {"1.5", "1.6"}
    assert len({volume.name for volume in volumes}) == 2
    for volume in volumes:  # in the order of the slices
        assert [int(file.split("_")[-1].split(".")[0]) for file in volume.files] == list(range(24))


def test_names_are_unique_and_those_given_before_are_kept(tmp_path, ct):
    for folder in ("one", "two"):
        for file in ("a_b.nii", "a b.nii"):
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(ct(), str(tmp_path / folder / file))
    volumes = find_volumes([tmp_path / "one", tmp_path / "two"])
    assert [v.name for v in volumes] == ["a_b", "a_b_2", "a_b_3", "a_b_4"]
    known = {v.files[0]: v.name for v in volumes}
    sitk.WriteImage(ct(), str(tmp_path / "one" / "a,b.nii"))
    again = {v.files[0]: v.name for v in find_volumes([tmp_path / "two", tmp_path / "one"], known)}
    assert known.items() <= again.items()
    assert set(again.values()) - set(known.values()) == {"a_b_5"}


def test_a_folder_given_twice_or_linked_in_a_circle(tmp_path, ct):
    (tmp_path / "in").mkdir()
    sitk.WriteImage(ct(), str(tmp_path / "in" / "a.nii"))
    (tmp_path / "in" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(names_in(tmp_path / "in", tmp_path / "in")) == 1
    assert len(names_in(tmp_path)) == 1


def test_nothing_found(tmp_path):
    with pytest.raises(MiMError, match="no image in"):
        find_volumes([tmp_path])
    with pytest.raises(MiMError, match="gone is not a folder"):
        find_volumes([tmp_path / "gone"])


def header_of(path, min_slices=16):
    return read_header(Volume("a", (str(path),), header=read_headers([str(path)], 1)[0]), min_slices)


def test_header_of_a_file(tmp_path, ct):
    sitk.WriteImage(ct(spacing=(4.0, 3.0, 2.5)), str(tmp_path / "a.nrrd"))
    assert header_of(tmp_path / "a.nrrd") == Header((24, 28, 32), (4.0, 3.0, 2.5))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (sitk.Image([20, 20], sitk.sitkInt16), "2-D (20 x 20)"),
        (sitk.Image([20, 20, 1], sitk.sitkInt16), "2-D (20 x 20 x 1, x y z)"),
        (sitk.Image([20, 20, 15], sitk.sitkInt16), "fewer than 16 slices (20 x 20 x 15, x y z)"),
        (sitk.Image([20, 20, 20, 3], sitk.sitkInt16), "4-D (20 x 20 x 20 x 3)"),
        (sitk.Image([20, 20, 20], sitk.sitkVectorUInt8, 3), "in colour (3 values a voxel)"),
    ],
)
def test_images_that_are_no_volume(tmp_path, image, says):
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    assert header_of(tmp_path / "a.nrrd") == says


def test_implausible_spacing():
    assert spacing_problem([1.0, 1.0, 30.0]) == "implausible spacing (1, 1, 30 mm, x y z)"
    assert spacing_problem([1e-3, 1e-3, 3e-3]) == "implausible spacing (0.001, 0.001, 0.003 mm, x y z)"
    assert spacing_problem([0.1, 0.1, 0.1]) is None
    assert spacing_problem([1.0, 0.0, 3.0]) == "implausible spacing (1, 0, 3 mm, x y z)"
    assert spacing_problem([1.0, float("nan"), 3.0]) == "implausible spacing (1, nan, 3 mm, x y z)"


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"nonsense")
    assert header_of(tmp_path / "a.nii.gz").startswith("cannot be read (")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modality": "MR"}, "not a CT (modality MR)"),
        ({"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"}, "a localiser"),
        ({"0008|0008": "DERIVED\\PRIMARY\\MIP"}, "a projection of a CT (MIP in its image type)"),
        ({"0008|0008": "DERIVED\\SECONDARY\\CT_SOM5 MIP"}, "a projection of a CT"),
        ({"0008|0008": "DERIVED\\SECONDARY\\PROJECTION IMAGE"}, "a projection of a CT"),
        ({"leave_out": (7, 8)}, "slices are missing: 12 mm instead of 4 between"),
        ({"leave_out": range(4, 24)}, "fewer than 16 slices (32 x 28 x 4, x y z)"),
        ({"leave_out": range(1, 24)}, "2-D (32 x 28 x 1, x y z)"),
    ],
)
def test_dicom_series_that_are_no_ct_volume(tmp_path, ct, dicom, changes, says):
    dicom(ct(), tmp_path / "scan", **changes)
    (volume,) = find_volumes([tmp_path / "scan"])
    assert read_header(volume, 16).startswith(says)


@pytest.mark.parametrize("spacing", [(0.5, 0.07, 0.07), (20.0, 20.0, 20.0)])
def test_a_size_that_is_hardly_a_bodys_is_doubtful(tmp_path, ct, spacing):
    sitk.WriteImage(ct(shape=(150, 40, 40), spacing=spacing), str(tmp_path / "a.nrrd"))
    (warning,) = header_of(tmp_path / "a.nrrd").warnings
    assert warning.startswith("hardly the size of a body (")


def test_a_series_that_is_made_of_other_images_is_doubtful(tmp_path, ct, dicom):
    dicom(ct(), tmp_path / "scan", **{"0008|0008": "DERIVED\\SECONDARY\\AXIAL"})
    (volume,) = find_volumes([tmp_path / "scan"])
    warning = "made of other images (DERIVED\\SECONDARY\\AXIAL in its DICOM header)"
    assert read_header(volume, 16).warnings == (warning,)


def test_a_dicom_series_without_a_rescale_intercept_has_no_hu():
    def problem(**tags):
        return dicom_problem(FileHeader((8, 8, 1), (1, 1, 1), (), tags=tags))

    assert problem(**{"0008|0060": "CT", "0028|1052": "-1024"}) is None
    assert problem(**{"0008|0060": "CT"}) == "no HU (no rescale intercept in the DICOM header)"
    assert problem() == "not a CT (modality unknown)"


def test_header_of_a_series_with_its_true_slice_distance(tmp_path, ct, dicom):
    dicom(ct(spacing=(4.0, 3.0, 2.5)), tmp_path / "scan")
    (volume,) = find_volumes([tmp_path / "scan"])
    header = read_header(volume, 16)
    assert header.size == (24, 28, 32)
    assert header.spacing == pytest.approx((4.0, 3.0, 2.5))


def move_slices(volume, place_of):
    """Write other positions into a series."""
    before = locale.setlocale(locale.LC_ALL)
    for number, file in enumerate(volume.files):
        piece = sitk.ReadImage(file)
        x, y, z = (float(v) for v in piece.GetMetaData("0020|0032").split("\\"))
        piece.SetMetaData("0020|0032", "\\".join(map(str, place_of(number, x, y, z))))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(file)
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize(
    ("place_of", "says"),
    [
        (lambda n, x, y, z: (x, y + n, z), "slices are shifted against each other (gantry tilt)"),
        (lambda n, x, y, z: (x, y, 5.0), "repeated slices (23, and no acquisition number or time tells them apart)"),
    ],
)
def test_slices_that_make_no_box(tmp_path, ct, dicom, place_of, says):
    dicom(ct(), tmp_path / "scan")
    (volume,) = find_volumes([tmp_path / "scan"])
    move_slices(volume, place_of)
    (volume,) = find_volumes([tmp_path / "scan"])
    assert read_header(volume, 16) == says


@pytest.mark.parametrize("damage", ["truncated", "bit", None])
def test_compressed_files_are_checked(tmp_path, ct, damage):
    path = tmp_path / "a.nii.gz"
    sitk.WriteImage(ct(), str(path))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[-6] ^= 1  # in the checksum
        path.write_bytes(content)
    problem = damaged(path)
    assert (problem is None) == (damage is None)
    sitk.WriteImage(ct(), str(tmp_path / "b.nii"))
    assert damaged(tmp_path / "b.nii") is None
    assert damage or len(gzip.decompress(path.read_bytes())) > 1000


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_voxels_that_are_no_number_which_simpleitk_hides(tmp_path, ct, value):
    hu = sitk.GetArrayFromImage(ct()).astype(np.float32)
    hu[20, 3, 3] = value
    for ending in ("nii", "nii.gz"):
        path = tmp_path / f"a.{ending}"
        sitk.WriteImage(sitk.GetImageFromArray(hu), str(path))
        assert np.isfinite(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))).all()
        assert damaged(path) == "holds NaN or infinite voxels"


def test_voxels_of_a_body_in_hu(ct):
    hu = sitk.GetArrayFromImage(ct()).astype(np.float32)
    assert voxel_problem(hu) is None
    assert voxel_problem(hu + 1024).startswith("no HU (values ")
    assert voxel_problem(hu / 1000).startswith("no HU (values ")
    assert voxel_problem(np.zeros((4, 4, 4), np.float32)).startswith("no HU (values 0 to 0")
    assert voxel_problem(np.full((4, 4, 4), -1000, np.float32)).startswith("no body in it")
    swapped = hu.astype(np.int16).byteswap().astype(np.float32)
    assert voxel_problem(swapped).endswith(" above 2,000: wrong byte order or scale)")
    assert "wrong byte order or scale" in voxel_problem(hu * np.float32(1e30))
    metal = hu.copy()
    metal[:2, :2] = 30_000
    assert voxel_problem(metal) is None
    hu[3, 3, 3] = np.nan
    assert voxel_problem(hu) == "holds NaN or infinite voxels"
    hu[3, 3, 3] = np.inf
    assert voxel_problem(hu) == "holds NaN or infinite voxels"


@pytest.mark.parametrize("ending", ["nii", "mha", "nrrd"])
def test_an_uncompressed_file_that_ends_early(tmp_path, ct, ending):
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(ct(), str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    if damaged(path) is None:  # SimpleITK itself says so then
        with pytest.raises(RuntimeError):
            sitk.ReadImage(str(path))


def test_damaged_dicom_files_are_named(tmp_path, ct, dicom):
    dicom(ct(), tmp_path / "scan")
    for file in sorted((tmp_path / "scan").iterdir())[:3]:
        file.write_bytes(file.read_bytes()[:200])
    (tmp_path / "scan" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    whole, broken = find_volumes([tmp_path])
    assert len(broken.files) == 3
    assert read_header(broken, 16) == (
        "cannot be read (DICOM that is damaged, or of a kind without an image), and so are 2 more files of this folder"
    )
    assert whole.header.warnings == ("its folder holds DICOM files that cannot be read (3)",)


def test_no_name_ends_like_a_segmentation(tmp_path, ct):
    for name in ("b.nii.gz", "b_seg.nii.gz"):
        sitk.WriteImage(ct(), str(tmp_path / name))
    assert names_in(tmp_path) == ["b", "b_seg_image"]


def test_size_and_spacing_are_those_of_the_turned_image(tmp_path, ct):
    image = ct(spacing=(4.0, 3.0, 2.5))
    for number, orientation in enumerate(("RAS", "PIR", "SLA", "LIP")):
        path = tmp_path / f"{number}.nrrd"
        sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path))
        assert header_of(path) == Header((24, 28, 32), (4.0, 3.0, 2.5))
