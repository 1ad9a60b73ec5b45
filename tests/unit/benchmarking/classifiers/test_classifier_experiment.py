"""From an experiment of classifiers to its report, with made-up trainings: what is run, kept, tried again and said."""

import csv
import json

import numpy as np
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score

from nnunet_mim.benchmarking import cli
from nnunet_mim.benchmarking.classifiers import outcome as outcome_module
from nnunet_mim.benchmarking.classifiers.experiment import run_classifiers
from nnunet_mim.benchmarking.classifiers.matrix import build_classifier_matrix
from nnunet_mim.benchmarking.classifiers.outcome import ClassifierOutcome
from nnunet_mim.benchmarking.classifiers.report import comparison_table, main_table
from nnunet_mim.benchmarking.work import finished_results
from nnunet_mim.classification.evaluation import patient_draws
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.stopping import EXIT_CODE

pytestmark = pytest.mark.usefixtures("dataset")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(outcome_module, "N_DRAWS", 100)


def outcome_of(bench):
    matrix = build_classifier_matrix(bench)
    return ClassifierOutcome(matrix, finished_results(matrix))


def test_every_training_is_run_once_and_reported(bench_of, trainer, tmp_path, capsys):
    trainer.seen = ["case_03", "case_10"]
    bench = bench_of(settings={"roi": "labels", "covariate": ["age"]})
    run_classifiers(bench, retry=False)
    said = capsys.readouterr().out
    assert "8 trainings of all folds: 0 finished, 8 to do" in said
    assert "[8/8] Dataset007_Toy, labels all, seed 1, probe_random: AUROC 0." in said
    matrix = build_classifier_matrix(bench)
    expected = [cell.job.config for cell in matrix.cells.values()]
    assert sorted(trainer.configs, key=str) == sorted(expected, key=str), "what the command line says is what was asked"
    with_baselines = [command for command in trainer.commands if "--no-baselines" not in command]
    assert len(with_baselines) == 4, "baselines are trained once for each seed and number of labels"
    assert all("none" in command for command in with_baselines), "beside the control"
    page, table = ((bench.output / name).read_text() for name in ("report.html", "table.md"))
    for name in ("probe_mim *", "probe_mim+covariates *", "baseline_size", "baseline_size_hu", "baseline_prevalence"):
        assert f"| {name} |" in table
        assert name in page
    assert "of 2 of 60 cases (case_03, case_10)" in table
    assert "probe_mim, Dataset007_Toy: case_03, case_10" in page
    assert "Everything is finished." in page
    assert "| all (20) |" in table
    assert "| 50% (10) |" in table
    assert table in said
    rows = list(csv.DictReader((bench.output / "table.csv").open()))
    assert len(rows) == 2 * 2 * (2 * 2 + 4)
    trainer.commands.clear()
    run_classifiers(bench, retry=False)
    assert not trainer.commands
    assert "8 finished, 0 to do" in capsys.readouterr().out


def test_figures_and_paired_differences_are_those_of_a_loop(bench_of, trainer):
    """Twins written with scikit-learn and a loop over the draws; means over seeds, patients drawn with their cases."""
    run_classifiers(bench_of(labels=["all"]), retry=False)
    found = outcome_of(bench_of(labels=["all"]))
    parts = {}
    for place in found.matrix.cells:
        folder = next(iter(found.matrix.cells[place].classifiers.values()))
        parts[place.arm, place.seed] = found.matrix.training(place).predictions(folder)[0]
    labels, patients = parts["probe_mim", 0].target.labels, parts["probe_mim", 0].patients
    aurocs = {key: roc_auc_score(labels, part.positive) for key, part in parts.items()}
    for arm in ("probe_mim", "probe_random"):
        values = found.values("Dataset007_Toy", "ill", "all", arm, "auroc")
        np.testing.assert_allclose(values, [aurocs[arm, 0], aurocs[arm, 1]])
        precise = [average_precision_score(labels, parts[arm, seed].positive) for seed in (0, 1)]
        assert found.values("Dataset007_Toy", "ill", "all", arm, "average_precision") == pytest.approx(precise)
        row = next(row for row in main_table(found, "Dataset007_Toy", "ill") if row[1] == arm)
        assert row[3] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    gaps = []
    for counts in patient_draws(patients, 100, 0).astype(int):
        rows = np.repeat(np.arange(len(labels)), counts)
        drawn = {key: roc_auc_score(labels[rows], part.positive[rows]) for key, part in parts.items()}
        gaps.append(np.mean([drawn["probe_mim", seed] - drawn["probe_random", seed] for seed in (0, 1)]))
    (gap,) = [gap for _, gap, _ in found.comparisons if (gap.first, gap.second) == ("probe_mim", "probe_random")]
    assert gap.interval.value == pytest.approx(
        np.mean([aurocs["probe_mim", seed] - aurocs["probe_random", seed] for seed in (0, 1)])
    )
    assert (gap.interval.low, gap.interval.high) == pytest.approx(tuple(np.quantile(gaps, [0.025, 0.975])))
    assert gap.p == pytest.approx(min(1, 2 * (min(np.sum(np.array(gaps) <= 0), np.sum(np.array(gaps) >= 0)) + 1) / 101))
    ps = sorted(each.p for _, each, _ in found.comparisons)
    smallest = min(found.comparisons, key=lambda each: each[1].p)[1]
    assert len(ps) == 3, "the arm against the control, and both against the size"
    assert smallest.corrected_p == pytest.approx(min(1, 3 * ps[0]))
    table = comparison_table(found, "Dataset007_Toy", "ill")
    assert [row[1:4] for row in table[1:]] == [
        ["probe_mim", "probe_random", "2"], ["probe_mim", "baseline_size", "2"], ["probe_random", "baseline_size", "2"],
    ]  # fmt: skip


def test_only_the_cases_that_are_asked_for(bench_of, trainer, tmp_path):
    folder = tmp_path / "nnUNet_raw" / "Dataset007_Toy"
    folder.mkdir(parents=True)
    rows = "".join(f"case_{row:02d},{row}\n" for row in range(60))
    (folder / "labels.csv").write_text(f"case,size\n{rows}")
    bench = bench_of(where=["size", 6, 36], labels=["all"], seeds=1)
    run_classifiers(bench, retry=False)
    found = outcome_of(bench)
    assert found.cases["Dataset007_Toy", "ill"].cases == tuple(f"case_{row:02d}" for row in range(6, 36))
    text = (bench.output / "table.md").read_text()
    assert "Only cases with size from 6 to below 36 count." in text
    assert "30 cases of 15 patients (no: 20, yes: 10)" in text
    trainer.commands.clear()
    for where, says in ((["size", 1, 3], "where: no case of .* size from 1 to below 3 has 'ill' 'yes': widen it"),
                        (["age", 1, 3], r"labels\.csv has no column 'age'")):  # fmt: skip
        with pytest.raises(MiMError, match=says):
            run_classifiers(bench_of(where=where), retry=False)
    assert not trainer.commands


def test_what_failed_is_named_and_tried_again_when_asked(bench_of, trainer, capsys):
    trainer.exit_codes = {"probe_labelled50pct": 1}
    bench = bench_of()
    with pytest.raises(MiMError, match=r"1 trainings failed, .*, labels 50%, seed 0, probe_mim first.*--retry"):
        run_classifiers(bench, retry=False)
    assert "out of memory" in (bench.output / "report.html").read_text()
    trainer.exit_codes = {}
    trainer.commands.clear()
    with pytest.raises(MiMError, match="1 trainings failed"):
        run_classifiers(bench, retry=False)
    assert not trainer.commands
    run_classifiers(bench, retry=True)
    assert len(trainer.commands) == 1
    assert len(outcome_of(bench).results) == 8


def test_what_a_signal_has_stopped_goes_on_without_being_asked(bench_of, trainer):
    trainer.exit_codes = {"scratch": EXIT_CODE}
    bench = bench_of(arms={"scratch": {}}, labels=["all"], seeds=1)
    with pytest.raises(MiMError, match=r"1 trainings were interrupted, .*: see above, and repeat the command$"):
        run_classifiers(bench, retry=False)
    trainer.exit_codes = {}
    run_classifiers(bench, retry=False)
    assert len(outcome_of(bench).results) == 1


def test_another_experiment_in_the_folder_is_refused(bench_of, trainer):
    run_classifiers(bench_of(seeds=1), retry=False)
    with pytest.raises(MiMError, match=r"holds another experiment \(margin 10.0 -> 3"):
        run_classifiers(bench_of(seeds=1, settings={"margin": 3.0}), retry=False)
    run_classifiers(bench_of(seeds=2), retry=False)  # more of it is the same experiment


def test_predictions_that_are_gone_are_made_again(bench_of, trainer):
    bench = bench_of(labels=["all"], seeds=1)
    run_classifiers(bench, retry=False)
    trainer.commands.clear()
    next(bench.output.glob("cells/*/*/*/probe_random/nnUNet_results/*/*/ill/baseline_size/fold_1/*.csv")).unlink()
    run_classifiers(bench, retry=False)
    (command,) = trainer.commands
    assert "none" in command


def test_the_command_plans_reports_and_runs(bench_of, trainer, tmp_path, capsys):
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump({"target": "ill", "datasets": [7], "device": "cpu", "labels": ["50%", "all"],
                                    "arms": {"probe": {"checkpoint": "none"}}}))  # fmt: skip
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    assert "2 of 2 trainings to do, hours unknown" in capsys.readouterr().out
    assert not trainer.commands
    assert cli.main(["run", str(path), "--report"]) == 2
    assert "is finished, so there is nothing to report" in capsys.readouterr().err
    assert cli.main(["run", str(path)]) == 0
    (tmp_path / "bench" / "report.html").unlink()
    assert cli.main(["run", str(path), "--report"]) == 0
    assert (tmp_path / "bench" / "report.html").is_file()
    capsys.readouterr()
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    assert "Dataset007_Toy, labels 50%, seed 0, probe: finished, about 0.00 h" in capsys.readouterr().out
    assert len(trainer.commands) == 2


def test_a_network_goes_on_where_it_was_interrupted(bench_of, trainer):
    matrix = build_classifier_matrix(bench_of(arms={"scratch": {}}, labels=["all"], seeds=1))
    (place,) = matrix.cells
    training = matrix.training(place)
    assert "--c" not in training.command()
    fold = training.results / "scratch" / "fold_1"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    assert training.command()[-1] == "--c"
    assert training(None)["auroc"]["ill"] > 0.5
    first = json.loads((training.folder / "cost.json").read_text())["seconds"]
    training.train()
    assert json.loads((training.folder / "cost.json").read_text())["seconds"] > first, "of all attempts"


def test_labelled_patients_are_the_same_for_all_arms_and_nested(bench_of):
    matrix = build_classifier_matrix(bench_of())
    for seed in (0, 1):
        rows = {
            (place.labels, place.arm): [set(fold) for fold in cell.job.folds.training]
            for place, cell in matrix.cells.items()
            if place.seed == seed
        }
        assert rows["50%", "probe_mim"] == rows["50%", "probe_random"]
        assert all(few < every for few, every in zip(rows["50%", "probe_mim"], rows["all", "probe_mim"], strict=True))
    few = [cell.job.folds.training for place, cell in matrix.cells.items() if place.labels == "50%"]
    assert len(set(few)) == 2, "one choice for each seed"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": ["1"]}, "arm probe_mim: labels 1: .* of 1 patients of fold 0 have 'ill' 'no'|'yes', at least 2"),
        ({"labels": ["99"]}, "arm probe_mim: labels 99: give numbers from 1 to 20"),
        ({"datasets": [7, "007"]}, "Dataset007_Toy is there twice"),
    ],
)
def test_what_can_be_wrong_is_said_before_any_training(bench_of, trainer, changes, says):
    with pytest.raises(MiMError, match=says):
        run_classifiers(bench_of(**changes), retry=False)
    assert not trainer.commands


def test_a_checkpoint_without_a_record_is_named(bench_of, trainer):
    arms = {"a": {"mode": "probe", "checkpoint": "unknown.pth"}, "b": {"mode": "probe", "checkpoint": "none"}}
    bench = bench_of(arms=arms, labels=["all"], seeds=1)
    run_classifiers(bench, retry=False)
    assert "a: its checkpoint does not say which cases it was pretrained on" in (bench.output / "table.md").read_text()
