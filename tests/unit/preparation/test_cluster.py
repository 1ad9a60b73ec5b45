"""Cases prepared in jobs of a cluster: what each job writes, what the command makes of it, and that nothing differs."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK as sitk

from nnunet_mim.errors import MiMError
from nnunet_mim.preparation import cluster
from nnunet_mim.preparation.cluster import Share, read_lines, run_shares
from nnunet_mim.preparation.prepare_case import ENDINGS, Job, RawCase, file_stamps

pytest.importorskip("submitit")

SLURM = {"cluster": "local", "timeout_min": 5, "jobs": 2}

RESULT = {
    "image_sha256": "0", "spacing": [1.0, 1.0, 1.0], "shape": [1, 2, 3], "sample": [[1.0]], "histogram": [1],
    "warnings": [], "stamps": None,
    "info": {"case": "a", "shape": [1, 2, 3], "sha256": "0", "low": [0.0], "high": [1.0], "body_points": []},
}  # fmt: skip
"""of a case, as in the log"""


@pytest.fixture
def folder(tmp_path):
    """Of preprocessed cases."""
    path = tmp_path / "preprocessed"
    path.mkdir()
    return path


@pytest.fixture
def job(folder):
    """job(name, key): a case to prepare, of a source that has a folder only."""
    source = SimpleNamespace(folder=folder)
    return lambda name, key="k": Job(RawCase(name, (f"{name}.nii.gz",)), source, {}, True, 16, key=key)


@pytest.fixture(autouse=True)
def prepared(monkeypatch, folder):
    """Cases are not read: each gets files with its name. Returns the names of those that were prepared, in order."""
    names = []

    def run_jobs(jobs, processes):
        for one in jobs:
            names.append(one.case.name)
            for ending in ENDINGS:
                (folder / f"{one.case.name}{ending}").write_text(one.case.name)
            yield one.case.name, {**RESULT, "stamps": file_stamps(folder, one.case.name)}

    monkeypatch.setattr(cluster, "run_jobs", run_jobs)
    return names


@pytest.fixture
def jobs_at_once(monkeypatch):
    """Jobs are run when they are submitted. Returns them."""
    submitted = []

    def submit(share):
        def result():
            if error:
                raise error

        error = None
        try:
            share()
        except Exception as problem:
            error = problem
        state, paths = SimpleNamespace(cancelled=False), SimpleNamespace(stderr="log.err")
        one = SimpleNamespace(
            share=share, state=state, job_id=f"{len(submitted)}", paths=paths, result=result,
            done=lambda: True, cancel=lambda: setattr(state, "cancelled", True),
        )  # fmt: skip
        submitted.append(one)
        return one

    monkeypatch.setattr(cluster, "slurm_executor", lambda *_: SimpleNamespace(submit=submit))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    return submitted


def test_a_job_writes_a_line_for_each_case_and_goes_on_after_them(tmp_path, job, prepared):
    file = tmp_path / "share.jsonl"
    file.touch()
    share = Share((job("a"), job("b")), 1, file)
    share()
    lines, end = read_lines(file, 0)
    assert [(line["case"], line["key"], line["result"]["shape"]) for line in lines] == [
        ("a", "k", [1, 2, 3]),
        ("b", "k", [1, 2, 3]),
    ]
    assert end == file.stat().st_size
    with file.open("a") as opened:
        opened.write('{"case": "c", "ke')  # the job was ended while it wrote
    Share((job("a"), job("b"), job("c")), 1, file)()
    assert prepared == ["a", "b", "c"]
    assert [line["case"] for line in read_lines(file, end)[0]] == ["c"]


@pytest.mark.parametrize(
    "line",
    [
        {"case": [], "key": "k", "result": RESULT}, {"case": "a", "key": 5, "result": RESULT},
        {"case": "a", "key": "k", "result": []}, {"case": "a", "key": "k", "result": {}},
        {"case": "a", "key": "k", "result": {"problem": 5}}, {"case": "a", "key": "k", "result": RESULT | {"shape": 1}},
        {"case": "unknown", "key": "k", "result": RESULT}, [], 5, "x", None,
    ],
)  # fmt: skip
def test_a_line_that_no_job_has_written_does_not_count(tmp_path, job, jobs_at_once, prepared, line):
    """Neither in the file of an earlier call nor in that of a job at work."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "share_0.jsonl").write_text(f"{json.dumps(line)}\n")
    results = run_shares([job("a"), job("b")], 1, {**SLURM, "jobs": 1}, tmp_path / "jobs")
    first = next(results)
    for file in (tmp_path / "jobs").glob("*.jsonl"):
        with file.open("a") as opened:
            opened.write(f"{json.dumps(line)}\n")
    assert {name: result["shape"] for name, result in [first, *results]} == {"a": [1, 2, 3], "b": [1, 2, 3]}


def test_results_of_jobs_are_read_up_to_a_limit(tmp_path):
    file = tmp_path / "share.jsonl"
    file.write_text("{}\n")
    os.truncate(file, 2**31 + 1)
    with pytest.raises(MiMError, match=r"larger than 2,097,152 kB\): delete it, and repeat the command"):
        read_lines(file, 0)


def test_a_job_whose_command_is_gone_ends(tmp_path, job, prepared, monkeypatch):
    file = tmp_path / "share.jsonl"
    file.touch()
    share = Share((job("a"), job("b"), job("c")), 1, file)
    original = cluster.run_jobs

    def run_jobs(jobs, processes):
        for number, outcome in enumerate(original(jobs, processes)):
            if number == 1:
                file.unlink()
            yield outcome

    monkeypatch.setattr(cluster, "run_jobs", run_jobs)
    with pytest.raises(FileNotFoundError):
        share()
    assert prepared == ["a", "b"]
    assert not file.exists()


def test_a_job_whose_time_is_over_is_put_into_the_queue_again(tmp_path, job):
    share = Share((job("a"),), 1, tmp_path / "share.jsonl")
    assert share.checkpoint().function is share


def test_cases_are_shared_among_the_jobs(tmp_path, job, prepared, jobs_at_once):
    found = dict(run_shares([job(name) for name in "abcde"], 3, SLURM, tmp_path / "jobs"))
    assert sorted(found) == list("abcde")
    assert [[one.case.name for one in done.share.jobs] for done in jobs_at_once] == [list("ace"), list("bd")]
    assert all(done.share.processes == 3 for done in jobs_at_once)
    assert not (tmp_path / "jobs").exists()


def test_jobs_of_an_earlier_call_have_other_files(tmp_path, job, jobs_at_once):
    """They would go on where they found theirs again."""
    for _ in range(2):
        dict(run_shares([job("a")], 1, SLURM, tmp_path / "jobs"))
    first, second = (done.share.file for done in jobs_at_once)
    assert first.parent == second.parent
    assert first != second


def test_there_are_no_more_jobs_than_cases(tmp_path, job, jobs_at_once):
    assert len(dict(run_shares([job("a")], 1, SLURM, tmp_path / "jobs"))) == len(jobs_at_once) == 1


def test_what_a_killed_command_left_is_taken_if_it_is_still_true(tmp_path, job, folder, prepared, jobs_at_once):
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "share_0.jsonl"
    file.touch()
    Share(tuple(job(name) for name in ("kept", "changed", "replaced")), 1, file)()
    (folder / f"replaced{ENDINGS[0]}").write_text("other voxels")
    prepared.clear()
    again = [job("kept"), job("changed", key="another"), job("replaced"), job("new")]
    found = dict(run_shares(again, 1, SLURM, tmp_path / "jobs"))
    assert sorted(prepared) == ["changed", "new", "replaced"]
    assert sorted(found) == ["changed", "kept", "new", "replaced"]


def test_a_failed_job_is_named_after_the_others_are_done(tmp_path, job, jobs_at_once, monkeypatch):
    original = cluster.run_jobs

    def run_jobs(jobs, processes):
        if jobs[0].case.name == "a":
            raise MiMError("cannot write there: free space")
        yield from original(jobs, processes)

    monkeypatch.setattr(cluster, "run_jobs", run_jobs)
    results = run_shares([job("a"), job("b")], 1, SLURM, tmp_path / "jobs")
    assert next(results)[0] == "b"
    with pytest.raises(MiMError, match=r"job 0: cannot write there: free space: see log\.err; 1 jobs failed: repeat"):
        next(results)
    assert (tmp_path / "jobs").is_dir(), "it holds the log"


def test_a_case_without_a_result_is_an_error(tmp_path, job, jobs_at_once, monkeypatch):
    monkeypatch.setattr(cluster, "run_jobs", lambda *_: (_ for _ in ()))
    with pytest.raises(MiMError, match=r"job 0: 1 cases have no result: see log\.err; 2 jobs failed: repeat"):
        dict(run_shares([job("a"), job("b")], 1, SLURM, tmp_path / "jobs"))


def test_an_interrupted_command_cancels_its_jobs(tmp_path, job, jobs_at_once):
    results = run_shares([job("a"), job("b")], 1, SLURM, tmp_path / "jobs")
    next(results)
    results.close()
    assert [done.state.cancelled for done in jobs_at_once] == [True, True]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["jobs=0", "timeout_min=5"], "--slurm jobs=0: give a number of jobs"),
        (["jobs=4", "cluster=local"], "--slurm: give timeout_min"),
        (["timeout_min=5", "cluster=local", "no_such=1"], "see submitit's parameters"),
        (["timeout_min=5", "cluster=nowhere"], "leave '--slurm' out"),
        (["timeout_min"], "--slurm timeout_min: write key=value"),
        (["timeout_min=5"], "run where SLURM is, or leave '--slurm' out"),
    ],
)
def test_bad_settings_are_refused_before_any_work(refused, preparing, monkeypatch, given, says):
    monkeypatch.setenv("PATH", "")
    assert says in refused("-d", 800, "-n", "Mine", "-i", preparing.root, "--slurm", *given)
    assert not (preparing.root / "nnUNet_raw" / "Dataset800_Mine").exists()


def content_of(preparing):
    """SHA-256 of every preprocessed file, and the log's entries but for what time and place decide."""
    folder = preparing.folder()
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    entries = {name: dict(entry) for name, entry in preparing.log().entries.items()}
    for entry in entries.values():
        for key in ("seconds", "stamps", "key", "images", "files"):
            entry.pop(key, None)
    plans = json.loads((folder.parent / "nnUNetMiMPlans.json").read_text())
    others = {path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*") if path.is_file()}
    return hashes, entries, plans, {name for name in others if not name.endswith(".png")}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_jobs_of_a_cluster_prepare_the_same(preparing, images, dicom, ct, tmp_path, monkeypatch):
    """Two jobs in processes of their own, on NIfTI files, a DICOM series and a file that is left out."""
    monkeypatch.undo()  # cases are read
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    dicom(ct(5), images / "series")
    sitk.WriteImage(ct(6)[:, :, :6], str(images / "thin.nii.gz"))
    options = ("--slurm", "cluster=local", "timeout_min=10", "jobs=2")
    assert preparing(800, "-n", "Mine", "-i", images, *options) == 0
    by_jobs = content_of(preparing)
    assert len(by_jobs[1]) == 5
    assert sum("reason" not in entry for entry in by_jobs[1].values()) == 4
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        Path(tmp_path / name).rename(tmp_path / f"{name}_of_jobs")
        Path(tmp_path / name).mkdir()
    assert preparing(800, "-n", "Mine", "-i", images) == 0
    assert content_of(preparing) == by_jobs
