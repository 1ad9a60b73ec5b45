import numpy as np
import pytest

from nnunet_mim.classification.labels import cases_where, check_cases, check_classes, read_labels
from nnunet_mim.errors import MiMError

GOOD = "case,patient,sick,stage,age\nb,p2,1,10,70\na,p1,0,9,61\nc,p2,,2,\nd,p3,NA,na,5\n"


@pytest.fixture
def table(tmp_path):
    def write(content):
        path = tmp_path / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_classes_numbers_and_missing_values(table):
    found = read_labels(table(GOOD), ["sick", "stage"], ["age"])
    assert found.cases == ("a", "b", "c")  # sorted; d has no label at all
    assert found.patients == ("p1", "p2", "p2")
    assert found.target("sick").classes == ("0", "1")
    assert found.target("sick").labels.tolist() == [0, 1, -1]
    assert found.target("stage").classes == ("2", "9", "10")  # by number, not by letters
    assert found.target("stage").labels.tolist() == [1, 2, 0]
    np.testing.assert_array_equal(found.covariates[:, 0], [61, 70, np.nan])


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("b,p2", " b , p2 ") + "\n\n",
        GOOD.replace("d,p3", '"d","p3"'),
    ],
    ids=["semicolons", "tabs", "byte order mark", "windows", "spaces and empty lines", "quotes"],
)
def test_spreadsheets_write_it_differently(table, content):
    plain, other = read_labels(table(GOOD), ["sick"]), read_labels(table(content), ["sick"])
    assert (plain.cases, plain.patients) == (other.cases, other.patients)
    assert plain.target("sick").labels.tolist() == other.target("sick").labels.tolist()


def test_without_patients_every_case_is_its_own(table):
    assert read_labels(table("case,sick\na,0\nb,1\n"), ["sick"]).patients == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("case,sick\n", "has no rows"),
        (b"case,sick\na,\xff\xfe\n", "save it as CSV UTF-8"),
        ("name,sick\na,1\n", "no column 'case': it has name, sick"),
        ("case,ill\na,1\n", "no column 'sick': it has case, ill"),
        ("case,sick,sick\na,1,1\n", "two columns 'sick'"),
        ("case,sick\na,1\na,0\n", "lists case 'a' with different values of 'sick'"),
        ("case,sick\na,1\na,1\n", "lists case 'a' twice"),
        ("case,sick\na,1\n,0\n", "row 3 has no case"),
        ("case,sick\n\na,1\n \n,0\n", "row 5 has no case"),
        ("\ncase,sick\n\na,1\nb,0,7\n", "row 5 has 3 values"),
        ("case,sick\na,1\nb,0,7\n", "row 3 has 3 values, the heading 2"),
        ("case,sick\na,\nb,NA\n", "column 'sick' is empty"),
    ],
)
def test_bad_tables(table, content, message):
    with pytest.raises(MiMError, match=message) as error:
        read_labels(table(content), ["sick"])
    assert "labels.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(MiMError, match="does not exist: write it with the columns case and sick"):
        read_labels(tmp_path / "labels.csv", ["sick"])


def test_a_covariate_that_is_no_number(table):
    with pytest.raises(MiMError, match="'age' of case 'a' is 'old', no number"):
        read_labels(table("case,sick,age\na,1,old\n"), ["sick"], ["age"])


def test_values_within_a_patient(table):
    path = table("case,patient,sick\na,p,0\nb,p,1\nc,q,1\n")
    assert len(read_labels(path, ["sick"]).cases) == 3
    with pytest.raises(MiMError, match="patient 'p' has different values of 'sick' in 'a' and 'b'"):
        read_labels(path, ["sick"], per_patient=True)


def test_cases_that_are_not_preprocessed(table):
    path = table("case,sick\na,0\nb,1\nc,1\n")
    found = read_labels(path, ["sick"])
    kept = check_cases(found, {"a", "b"}, {"c"}, path)
    assert kept.cases == ("a", "b")
    assert kept.target("sick").labels.tolist() == [0, 1]
    with pytest.raises(MiMError, match="names 1 cases that are not preprocessed, c first"):
        check_cases(found, {"a", "b"}, set(), path)
    with pytest.raises(MiMError, match="names no preprocessed case"):
        check_cases(found, set(), {"a", "b", "c"}, path)


def test_a_constant_column_and_a_rare_class(table):
    path = table("case,sick\na,1\nb,1\n")
    with pytest.raises(MiMError, match=r"column 'sick' has one value only \(1\)"):
        check_classes(read_labels(path, ["sick"]), 2, path)
    path = table("case,patient,sick\na,p,0\nb,p,0\nc,q,1\nd,r,1\n")
    with pytest.raises(MiMError, match="class '0' of 'sick' has 1 patients, fewer than 2 folds"):
        check_classes(read_labels(path, ["sick"]), 2, path)


def test_cases_of_a_range(table):
    path = table("case,sick,age\na,1,6\nb,1,11.9\nc,0,12\nd,0,\n")
    assert cases_where(path, "age", "6", "12") == {"a", "b"}
    with pytest.raises(MiMError, match="'low' is no number"):
        cases_where(path, "age", "low", "12")
