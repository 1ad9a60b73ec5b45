"""Commands that messages tell a user to type are typed here, and help."""

import re
import shlex
import shutil

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_plans
from nnunet_mim.nnunet.source import find_source, require_same_units
from nnunet_mim.preparation import cli as plan_cli
from nnunet_mim.preparation import prepare_cli
from nnunet_mim.pretraining.configure import with_network_of_plans
from nnunet_mim.pretraining.data.case_index import read_index

NAME = "Dataset501_L"
COMMAND = re.compile(r"\b(mim_(?:prepare|plan) -d .*?)(?=, or |, then |: |$)")
PLANS = ("nnUNetMiMPlans", "3d_fullres")


@pytest.fixture
def typed(here):
    """typed(text): run the one command in a message, which must succeed."""

    def run(text):
        (command,) = COMMAND.findall(text)
        name, *words = shlex.split(command)
        assert (prepare_cli if name == "mim_prepare" else plan_cli).main(words) == 0
        return command

    return run


@pytest.fixture
def unlabelled(preparing, ct, here):
    """Dataset 501, images alone, prepared."""
    preparing.write_raw(NAME, [[ct(i)] for i in range(3)])
    assert preparing(501) == 0
    return preparing


def error_of(function, *arguments):
    with pytest.raises(MiMError) as error:
        function(*arguments)
    return str(error.value)


@pytest.mark.parametrize("changes", [(), ("--set", "ct_window=-500,700", "num_epochs=7", "--overwrite")])
def test_cases_that_are_gone_are_prepared_anew(unlabelled, typed, changes):
    if changes:
        assert unlabelled(501, *changes) == 0
    before, plans = find_source("501", *PLANS), read_plans(unlabelled.folder(NAME).with_name("nnUNetMiMPlans.json"))
    shutil.rmtree(before.folder)
    line = error_of(find_source, "501", *PLANS)
    assert "nnUNetv2_preprocess" not in line
    typed(line)
    after = find_source("501", *PLANS)
    assert after.cases == before.cases
    assert after.plans["configurations"] == plans["configurations"]
    assert after.intensities == before.intensities
    assert changes or after.plans == plans


def test_a_case_that_has_vanished_or_is_damaged_is_prepared_anew(unlabelled, typed):
    source = find_source("501", *PLANS)
    read_index(source)
    for path in source.folder.glob("case_1*"):
        path.unlink()
    (source.folder / "case_2.b2nd").write_bytes(b"no array")
    index, bad = read_index(find_source("501", *PLANS), remember_vanished=True)
    assert len(index) == 1
    assert sorted(bad) == ["case_1", "case_2"]
    assert typed(bad["case_1"]) == typed(bad["case_2"])
    index, bad = read_index(find_source("501", *PLANS))
    assert (len(index), bad) == (3, {})


@pytest.mark.parametrize("more", [(), ("-o", "Other", "--set", "num_epochs=5"), ("--preset", "small"), ("-p", "no")])
def test_plans_of_a_dataset_without_labels(unlabelled, typed, capsys, more):
    capsys.readouterr()
    assert plan_cli.main(["-d", "501", *more]) == 2
    typed(capsys.readouterr().err)
    source = find_source("501", "Other" if "Other" in more else PLANS[0], PLANS[1])
    assert source.spacing == (4.0, 4.0, 4.0)
    assert len(source.cases) == 3
    width = source.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["embed_dims"][0]
    assert width == (24 if "small" in more else 12), "the network of the plans that were there"
    assert "num_epochs=5" not in more or source.plans["mim_finetune"]["num_epochs"] == 5


def test_datasets_with_different_spacings(unlabelled, ct, typed):
    unlabelled.write_raw("Dataset502_M", [[ct(i + 5)] for i in range(2)])
    assert unlabelled(502, spacing="5") == 0
    line = error_of(require_same_units, [find_source(number, *PLANS) for number in ("501", "502")])
    typed(line)
    require_same_units([find_source(number, "NAME", PLANS[1]) for number in ("501", "502")])


def test_plans_of_another_preset(unlabelled, typed):
    wanted = {"preset": "small", "network": {}}
    line = error_of(with_network_of_plans, wanted, [find_source("501", *PLANS)], False)
    assert "change the plans first" in line
    typed(line)
    assert with_network_of_plans(wanted, [find_source("501", *PLANS)], False)["preset"] == "small"
