"""The small profile on real data, through the real clients and a hub on loopback, as a user would run it."""

import json
import re

import pytest

from conftest import REAL, xtransfer
from xtransfer.languages import LANGUAGE_SETS

LIMITS = ("--train-limit", 32, "--score-limit", 4, "--set", "max_steps=2", "--set", "evaluations=1", "--set", "dev_limit=8")

@pytest.fixture(scope="module")
def small(hub, tmp_path_factory):
    """Folder, records and terminal output of the study."""
    folder = tmp_path_factory.mktemp("small")
    code, out, err = xtransfer("run", "cut", "--profile", "small", "--declare", REAL, *LIMITS, "--outputs", folder, "--threads", 1, timeout=900, environment=hub)
    assert code == 0, out + err
    return folder, [json.loads(p.read_text()) for p in sorted(folder.glob("*/*/record.json"))], out


def test_it_ends_with_a_report_that_says_what_was_used(small):
    folder, records, out = small
    page = (folder / "reports" / "cut-small.html").read_text()
    assert str(folder / "reports" / "cut-small.html") in out and "Bible verses" in page and "stands in for CCG" in page
    assert len(records) == 18 and {r["template"] for r in records} == {"pretrain", "intermediate", "target", "retrieval"}


def test_every_language_of_every_task_is_scored(small):
    _, records, _ = small
    scored = {}
    for record in records:
        for score in record["scores"]:
            scored.setdefault(score["task"], set()).add(score["language"])
            assert score["n"] == 4 and 0 <= score["value"] <= 100
    assert scored["xnli"] == set(LANGUAGE_SETS["xnli"]) and scored["xquad"] == set(LANGUAGE_SETS["xquad"]) and scored["tatoeba"] == set(LANGUAGE_SETS["tatoeba"])
    assert len(scored["udpos"]) >= 28 and len(scored["panx"]) >= 35


def test_records_hold_commits_caps_and_notes(small):
    _, records, _ = small
    facts = [d for r in records for d in r["data"]]
    assert facts and all(re.fullmatch("[0-9a-f]{40}(, [0-9a-f]{40})*", d["revision"]) for d in facts), {d["revision"] for d in facts}
    assert all(d["capped"] for d in facts if d["split"] in ("train", "test")) and all(d["rows"] <= 32 for d in facts)
    assert {repo for d in facts for repo in d["repo"].split(", ")} >= {"nyu-mll/glue", "rajpurkar/squad", "local/erg_supertagging", "google/xquad", "google-research-datasets/tydiqa", "google-research-datasets/paws-x", "local/paws-wiki-train-substitute", "facebook/xnli", "google/xtreme", "unimelb-nlp/wikiann", "local/bible-verses"}
    assert any("fused forms" in d["note"] for d in facts if d["task"] == "udpos")


def test_offsets_of_xquad_are_repaired_and_counted(hub):
    import os
    import subprocess
    import sys

    code = """
import json, xtransfer.xtreme
from dataclasses import replace
from xtransfer.tasks import TASKS, load_examples
task = TASKS['xquad']
stripped = replace(task, load=lambda language, split: [row | {'context': row['context'].strip()} for row in task.load(language, split)])
print(json.dumps([{g: load_examples(t, g, 'test').facts for g in ('zh', 'ar', 'de')} for t in (task, stripped)]))
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ) | hub)
    served, stripped = json.loads(asked.stdout)
    for facts in (served, stripped):
        assert all(f["rows"] == f["available"] == f["expected"] == 1190 and not f["capped"] and f["dropped"] == 0 for f in facts.values())
    # the hub's builders strip contexts without moving the offsets; a server may serve the stripped or the original rows
    assert {g: f["repaired"] for g, f in stripped.items()} == {"zh": 100, "ar": 26, "de": 0}
    assert served["zh"]["repaired"] in (0, 100)
