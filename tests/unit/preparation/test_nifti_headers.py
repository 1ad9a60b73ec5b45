"""What a NIfTI header says about geometry, by its bytes: what is left out, what is doubtful, and what is neither."""

import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.image_files import read_headers
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.preparation.screening import Header, read_header

QFAC, PIXDIM, UNITS, QFORM_CODE, SFORM_CODE, QUATERNION, OFFSET, SROW = 76, 80, 123, 252, 254, 256, 268, 280
NO_QFORM, NO_SFORM = (QFORM_CODE, "h", 0), (SFORM_CODE, "h", 0)
NAN = float("nan")


@pytest.fixture
def read(ct, tmp_path):
    """read(*changes): a header, or its reason, of a sound file with changes to its bytes (place, format, values)."""
    sitk.WriteImage(ct(0, spacing=(4.0, 3.0, 2.0)), str(tmp_path / "sound.nii"))

    def changed(*changes):
        content = bytearray((tmp_path / "sound.nii").read_bytes())
        for place, kind, *values in changes:
            struct.pack_into(f"<{kind}", content, place, *values)
        path = tmp_path / "changed.nii"
        path.write_bytes(content)
        (header,) = read_headers([str(path)], 1)
        return read_header(Volume("a", (str(path),), header=header), 16)

    return changed


CODES = {"both": (), "qform": (NO_SFORM,), "sform": (NO_QFORM,), "neither": (NO_QFORM, NO_SFORM)}


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES.keys())
@pytest.mark.parametrize(
    ("pixdim", "shown"),
    [((0, 0, 0), "0, 0, 0"), ((2, 3, 0), "2, 3, 0"), ((2, NAN, 4), "2, nan, 4"), ((2, 3, float("inf")), "2, 3, inf"),
     ((2, 3, -4), "2, 3, -4")],
)  # fmt: skip
def test_a_spacing_that_is_none_is_not_taken_for_1_mm(read, codes, pixdim, shown):
    assert read(*codes, (PIXDIM, "3f", *pixdim)) == f"implausible spacing ({shown} mm)"


def test_so_it_is_in_an_sform(read):
    assert read((SROW + 32, "4f", 0, 0, 0, 0)) == "implausible spacing (2, 3, 0 mm)"
    assert read((SROW + 40, "f", NAN)) in ("implausible spacing (2, 3, nan mm)", "its axes stand at no right angles")


@pytest.mark.parametrize("quaternion", [(NAN, 0, 0), (0.9, 0.9, 0.9)])
def test_a_qform_that_is_no_rotation(read, quaternion):
    change = (QUATERNION, "3f", *quaternion)
    assert read(NO_SFORM, change) == "its qform is no rotation"
    sound = read(NO_QFORM, change)
    assert isinstance(sound, Header), "it is not used"
    assert sound.warnings == ()


def test_an_origin_that_is_no_number(read):
    assert read(NO_SFORM, (OFFSET, "f", NAN)) == "its origin is not finite"


def test_sform_and_qform_that_disagree_are_doubtful(read):
    header = read((SROW, "f", -2.2), (SROW + 20, "f", -3.3), (SROW + 40, "f", 4.4))
    assert "its qform and its sform say different geometries" in header.warnings


def test_what_only_looks_like_nifti_is_damaged(read):
    assert read((344, "4s", b"")) == "damaged (its header is not that of NIfTI)"


def test_no_orientation_is_doubtful(read):
    says = "its header says no orientation (neither qform nor sform)"
    for codes in ((NO_QFORM, NO_SFORM), ((QFORM_CODE, "2h", -1, -1),)):
        assert read(*codes).warnings == (says,)


def test_shear_is_never_taken_without_a_word(read):
    """SimpleITK turns to the qform where there is one."""
    shear = (SROW + 4, "f", 0.5)
    assert "its qform and its sform say different geometries" in read(shear).warnings
    assert "orthonormal" in read(NO_QFORM, shear)
    assert read(NO_SFORM, shear).warnings == (), "it is not used"


@pytest.mark.parametrize(("unit", "says"), [(1, "implausible spacing"), (3, "implausible spacing"), (5, "unit (5)")])
def test_units_that_are_not_mm(read, unit, says):
    found = read((UNITS, "B", unit))
    assert says in (found if isinstance(found, str) else " ".join(found.warnings))
    assert read((UNITS, "B", 0)).warnings == ()


def test_microns_that_make_a_plausible_spacing_are_doubtful(read):
    scaled = [(PIXDIM, "3f", 2000, 3000, 4000), *((SROW + 20 * i, "f", v) for i, v in enumerate((-2e3, -3e3, 4e3)))]
    found = read((UNITS, "B", 3), *scaled)
    assert "its lengths are given in micron" in found.warnings


@pytest.mark.parametrize("qfac", [0, 1, 3, NAN])
def test_a_sign_that_is_not_said_is_plus(read, qfac):
    assert read(NO_SFORM, (QFAC, "f", qfac)).warnings == ()


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders(tmp_path, order):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (18, 19, 20)).astype(f"{order}i2")
    header = nibabel.Nifti1Header(endianness=order)
    image = nibabel.Nifti1Image(voxels, np.diag([-2.0, -3.0, 4.0, 1.0]), header)
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    nibabel.save(image, tmp_path / "a.nii.gz")
    (header,) = read_headers([str(tmp_path / "a.nii.gz")], 1)
    assert (header.problem, header.warnings) == ("", ())
    assert header.spacing == (2.0, 3.0, 4.0)
