"""Fetching, pins, local copies and running without network."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import REAL, xtransfer
from xtransfer.core import XtransferError
from xtransfer.fetch import fetch_study, pin_sources, study_needs
from xtransfer.records import RECORD_NAME
from xtransfer.runs import check_same_data
from xtransfer.sources import DATA_VARIABLE, Source, folder_digest, hub_rows, local_copy, pins, resolved_revision
from xtransfer.studies import STUDIES, load_declarations
from xtransfer.tasks import TASKS, load_examples

SMALL = ("public", "--profile", "small", "--languages", "de", "--declare", str(REAL))


def public_study():
    """The study of REAL in German."""
    import xtransfer.catalogue  # noqa: F401

    if "public" not in STUDIES:
        load_declarations([str(REAL)])
    return STUDIES["public"].build("small").with_limits(languages=("de",))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    return folder


def xquad_copy(data, rows=3):
    """A local copy of German XQuAD with a few rows of its own."""
    folder = data / "google" / "xquad" / "xquad.de"
    folder.mkdir(parents=True)
    lines = [{"id": f"q{i}", "context": f"Im Jahr {1900 + i} geschah es.", "question": "Wann?", "answers": {"text": [str(1900 + i)], "answer_start": [8]}} for i in range(rows)]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def leave_record(outputs, run, read):
    """A finished run's record that says what it read and nothing else."""
    record = {"run": run.id, "digest": run.digest, "parent": None, "template": run.template, "backbone": {}, "stages": [], "parameters": {}, "environment": {}, "training": {}, "seconds": {}, "tokens_per_second": None,
              "peak_memory_mb": 0.0, "scores": [], "started": "", "ended": "", "data": [{"rows": 3, "capped": False} | read], "schema_version": 1}
    (outputs / run.id).mkdir(parents=True)
    (outputs / run.id / RECORD_NAME).write_text(json.dumps(record))


def test_a_local_copy_is_read_instead_of_the_hub_and_said(data):
    import xtransfer.catalogue  # noqa: F401

    xquad_copy(data)
    examples = load_examples(TASKS["xquad"], "de", "test")
    assert [r["answers"] for r in examples.rows] == [["1900"], ["1901"], ["1902"]]
    assert examples.capped and "local copy of google/xquad" in examples.facts["note"] and examples.facts["expected"] == 1190
    assert resolved_revision(TASKS["xquad"].source) == f"local-{folder_digest(data / 'google/xquad')}"


def test_a_copy_in_the_hubs_layout_with_its_card(data):
    folder = data / "some" / "set"
    (folder / "two").mkdir(parents=True)
    (folder / "two" / "t.jsonl").write_text('{"a": 7}')
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: second\n  data_files:\n  - split: train\n    path: two/t.jsonl\n---\n")
    assert hub_rows(Source(repo="some/set"), "second", "train") == [{"a": 7}]
    with pytest.raises(XtransferError, match="which stands in for some/set"):
        hub_rows(Source(repo="some/set"), "third", "train")


def test_the_digest_of_a_copy_follows_its_content(data):
    folder = xquad_copy(data)
    before = folder_digest(local_copy("google/xquad"))
    file = folder / "validation.jsonl"
    file.write_text(file.read_text().replace("Wann", "Wenn"))
    os.utime(file, ns=(1, 1))
    assert folder_digest(local_copy("google/xquad")) != before


def test_a_study_does_not_go_on_with_other_data(data, tmp_path):
    study = public_study()
    study = replace(study, cells=tuple(c for c in study.cells if c.arm == "none" and c.target == "xquad"))
    run = study.cells[0].run
    leave_record(tmp_path / "outputs", run, {"task": "xquad", "language": "de", "split": "test", "repo": "google/xquad", "revision": "a" * 40})
    (data / "pins.json").write_text(json.dumps({s.repo: "a" * 40 for name in ("xquad", "squad1") for s in TASKS[name].sources}))
    check_same_data(study, tmp_path / "outputs")
    (data / "pins.json").write_text(json.dumps({s.repo: "b" * 40 for name in ("xquad", "squad1") for s in TASKS[name].sources}))
    with pytest.raises(XtransferError, match="would be read at bbbb.* read it at aaaa"):
        check_same_data(study, tmp_path / "outputs")
    xquad_copy(data)
    with pytest.raises(XtransferError, match="would be read at local-"):
        check_same_data(study, tmp_path / "outputs")


def test_a_task_of_several_sources_goes_on_where_the_hub_does_not_answer(data, tmp_path, monkeypatch):
    import xtransfer.catalogue  # noqa: F401

    study = STUDIES["stilts"].build("paper")
    cells = tuple(c for c in study.cells if (c.arm, c.target, c.seed) == ("anli_plus", "xnli", 0))
    study, run = replace(study, cells=cells), cells[0].run.parent
    repos = [s.repo for s in TASKS["anli_plus"].sources]
    assert len(repos) == 3
    leave_record(tmp_path / "outputs", run, {"task": "anli_plus", "language": "en", "split": "train", "repo": ", ".join(repos), "revision": ", ".join(("a" * 40, "b" * 40, "c" * 40))})
    monkeypatch.setattr("xtransfer.sources._hub_commit", lambda repo, revision: revision)  # no network: nobody can say what the branch stands for
    check_same_data(study, tmp_path / "outputs")
    (data / "pins.json").write_text(json.dumps({repos[1]: "d" * 40}))
    with pytest.raises(XtransferError, match=f"{repos[1]} would be read at dddd.* read it at bbbb"):
        check_same_data(study, tmp_path / "outputs")


def test_damaged_pins_and_a_hub_that_does_not_answer(data, monkeypatch):
    (data / "pins.json").write_text('["no", "mapping"]')
    with pytest.raises(XtransferError, match="pins.json is damaged"):
        pins()
    (data / "pins.json").unlink()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(XtransferError, match="cannot be looked up on the hub: no route"):
        pin_sources([Source(repo="some/set")])
    assert pin_sources([Source(repo="generated"), Source(repo="files/ccg")]) == {}


@pytest.mark.parametrize("offline", [False, True])
def test_what_no_hub_serves_is_not_to_be_fetched_elsewhere(offline, data, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    import xtransfer.catalogue  # noqa: F401

    kept = [source for task in TASKS.values() for source in task.sources if source.repo.startswith("local/")]
    assert {source.repo for source in kept} >= {"local/bible-verses", "local/erg_supertagging", "local/paws-wiki-train-substitute"}
    error = OfflineModeIsEnabled("offline") if offline else OSError("no route")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: (_ for _ in ()).throw(error))
    for source in kept:
        for ask in (lambda: pin_sources([source]), lambda: hub_rows(source, None, "train")):
            with pytest.raises(XtransferError) as told:
                ask()
            assert f"{source.repo} is not in the data folder {data}" in str(told.value) and str(told.value).endswith(f"; {source.obtain}.") and "fetch it where" not in str(told.value)


def test_what_cannot_be_had_does_not_stop_the_rest(data, monkeypatch):
    monkeypatch.setattr("xtransfer.fetch.fetch_backbone", lambda backbone: "nothing")
    monkeypatch.setattr("xtransfer.fetch.pin_sources", lambda sources: {})
    study = public_study()
    study = replace(study, cells=tuple(c for c in study.cells if c.arm == "none" and c.target == "xquad"))
    folder = xquad_copy(data)
    (data / "rajpurkar" / "squad").mkdir(parents=True)
    found = {f.name: f for f in fetch_study(study, report=lambda line: None)}
    assert set(study_needs(study)) == {("squad1", "en", "train"), ("squad1", "en", "dev"), ("xquad", "de", "test")} and folder.exists()
    assert found["xquad de test"].state == "partial" and "3 rows of 1190" in found["xquad de test"].detail
    assert found["squad1 en train"].state == found["squad1 en dev"].state == "missing"


def test_the_command_without_a_data_folder(tmp_path):
    code, out, err = xtransfer("show", "xquad", "de", "--data", tmp_path / "nowhere")
    assert code == 1 and "does not exist" in err and "Traceback" not in err


def test_fetched_once_it_runs_without_network(hub, tmp_path):
    around = hub | {DATA_VARIABLE: str(tmp_path / "data")}
    code, out, err = xtransfer("fetch", *SMALL, environment=around)
    assert code == 0 and "tatoeba de test: complete, 1000 rows of 1000" in out and "partial" in out, out + err
    pinned = json.loads((tmp_path / "data" / "pins.json").read_text())
    assert {"google/xquad", "rajpurkar/squad", "nyu-mll/glue"} <= set(pinned) and all(len(commit) == 40 for commit in pinned.values())
    offline = around | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    code, out, err = xtransfer("fetch", *SMALL, environment=offline)
    assert code == 0 and "missing" not in out, out + err
    only = ("import sys, json, xtransfer.catalogue; from xtransfer.tasks import TASKS, load_examples; from xtransfer.sources import resolved_revision; "
            "t = TASKS['xquad']; print(len(load_examples(t, 'de', 'test').rows), resolved_revision(t.source))")
    asked = subprocess.run([sys.executable, "-c", only], capture_output=True, text=True, env=dict(os.environ) | offline)
    assert asked.stdout.split() == ["1190", pinned["google/xquad"]], asked.stderr
    (tmp_path / "data" / "pins.json").write_text(json.dumps(pinned | {"google/xquad": "0" * 40}))
    code, out, err = xtransfer("fetch", *SMALL, environment=offline)
    assert code == 1 and "pinned to the commit 0000" in err and "Traceback" not in err, out + err
    code, out, err = xtransfer("fetch", *SMALL, environment=around)
    assert code == 1 and "google/xquad" in err and "Traceback" not in err, out + err
