"""A mistake costs one sentence: non-zero exit, no traceback, and earlier results as they were."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import TOYS, command, finished, hashes, xtransfer
from test_runs import SMOKE, gone, in_the_middle
from xtransfer.cli import main

STUDY = ("toys", "--profile", "smoke", "--declare", str(TOYS))

BROKEN = """
from dataclasses import replace
from xtransfer.studies import STUDIES
from xtransfer.tasks import TASKS
import runpy
toys = runpy.run_path({toys!r})
Stage, Run, Cell, Study, StudyDeclaration, RECIPE = (toys[n] if n in toys else getattr(__import__("xtransfer.studies", fromlist=[n]), n) for n in ("Stage", "Run", "Cell", "Study", "StudyDeclaration", "RECIPE"))
RECIPE = replace(RECIPE, max_steps=2)
{change}
STUDIES.register(StudyDeclaration(name="broken", question="?", profiles={{"smoke": lambda: Study(name="broken", profile="smoke", question="?", contrasts=(), cells=(
    Cell(arm="none", target=target, seed=0, run=Run(backbone=backbone, stages=(Stage(train=(target,), score=(target,), recipe=RECIPE, seed=0),))),))}}))
"""
SPOIL = """
task, target, backbone = TASKS[{name!r}], {name!r}, "toy-encoder"
def load(language, split, old=task.load):
    found = [dict(r) for r in old(language, split)]
    {spoil}
    return found
TASKS.register(replace(task, load=load, name="spoilt", trains_on="spoilt"{more}))
target = "spoilt"
"""
IN_A_STUDY = {  # what a declaration gets wrong -> the code, and words of the sentence
    "unknown task": ('target, backbone = "toy_pear", "toy-encoder"', ["toy_pear", "did you mean 'toy_pair'"]),
    "unknown backbone": ('target, backbone = "toy_pair", "toy-decoder"', ["toy-decoder", "did you mean 'toy-encoder'"]),
    "no declaration": ("1 / 0", ["ZeroDivisionError"]),
    "empty split": (SPOIL.format(name="toy_pair", spoil="found = [] if (language, split) == ('fr', 'test') else found", more=""), ["test split", "spoilt", "fr", "empty"]),
    "label not in the set": (SPOIL.format(name="toy_pair", spoil="found[3]['label'] = 'yess'", more=""), ["row 3", "'yess'", "did you mean 'yes'"]),
    "tag not in the set": (SPOIL.format(name="toy_tags", spoil="found[2]['tags'][0] = 'I-LONG'", more=""), ["row 2", "I-LONG"]),
    "example without answer": (SPOIL.format(name="toy_qa", spoil="found[1]['answers'] = {'text': [], 'answer_start': []}", more=""), ["row 1", "no answer"]),
    "language without data": (SPOIL.format(name="toy_pair", spoil="", more=", languages=('en', 'de'), train_languages=('en',), labels=('yes',)"), ["'no'", "accepted: yes"]),
}


def one_sentence(err, *expected):
    """Check what went to standard error."""
    assert "Traceback" not in err and err.strip(), err
    missing = [e for e in expected if e not in err]
    assert not missing, (missing, err)


@pytest.mark.parametrize("case", IN_A_STUDY)
def test_a_declaration_that_is_wrong(case, tmp_path, capsys, toys):
    change, expected = IN_A_STUDY[case]
    file, outputs = tmp_path / "broken.py", tmp_path / "outputs"
    file.write_text(BROKEN.format(toys=str(TOYS), change=change))
    if case in ("unknown task", "unknown backbone", "no declaration"):
        assert main(["run", "broken", "--profile", "smoke", "--declare", str(file), "--outputs", str(outputs)]) != 0
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1
    else:
        assert main(["run", "broken", "--profile", "smoke", "--declare", str(file), "--outputs", str(outputs), "--workers", "1", "--threads", "1"]) == 1
        err = capsys.readouterr().err
        assert not list(outputs.glob("*/*/record.json"))
    one_sentence(err, *expected)


@pytest.mark.parametrize("arguments, expected", (
    (["run", "stlits"], ["stlits", "did you mean 'stilts'"]),
    (["run", "stilts", "--profile", "smole"], ["did you mean 'smoke'"]),
    (["run", *STUDY[:1], "--profile", "paper", *STUDY[3:]], ["has no profile 'paper'"]),
    (["run", *STUDY, "--set", "learning_rat=1"], ["learning_rat", "did you mean 'learning_rate'"]),
    (["run", *STUDY, "--set", "batch_size=many"], ["batch_size", "int"]),
    (["run", *STUDY, "--train-limit", "0"], ["limits"]),
    (["run", *STUDY, "--train-limit", "few"], ["--help"]),
    (["run", *STUDY, "--workers", "0"], ["workers"]),
    (["run", "toys", "--declare", "nowhere.py"], ["nowhere.py"]),
    (["rum", "toys"], ["rum"]),
    (["ls", "task"], ["did you mean 'tasks'"]),
    (["show", "no-such-run"], ["no-such-run"]),
), ids=lambda v: " ".join(v)[-40:])
def test_an_argument_that_is_wrong(arguments, expected, capsys, tmp_path, toys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) not in (0, None)
    err = capsys.readouterr().err
    one_sentence(err, *expected)
    assert len(err.strip().splitlines()) == 1 and not list(tmp_path.rglob("record.json"))


def test_an_unknown_language_is_named_with_the_nearest(toys):
    from xtransfer.core import XtransferError
    from xtransfer.languages import LANGUAGES
    from xtransfer.tasks import TASKS, load_examples

    with pytest.raises(XtransferError, match="fr"):
        load_examples(TASKS["toy_pair"], "frr", "test")
    with pytest.raises(XtransferError, match="unknown language"):
        LANGUAGES["xx"]


@pytest.mark.parametrize("damage, expected", (("{", "damaged"), ("[]", "schema"), ('{"schema_version": 0}', "schema 0"), ('{"schema_version": 1}', "damaged"), ("[" * 100_000, "nested more than 100 levels"), ("[" * 500 + "]" * 500, "nested"), ("9" * 5000, "digits")), ids=lambda value: value[:20])
@pytest.mark.parametrize("what", ("run", "report", "plan"))
def test_a_record_that_is_damaged_or_older(what, damage, expected, toy_outputs, tmp_path, capsys, toys):
    copy = tmp_path / "copy"
    shutil.copytree(toy_outputs, copy)
    sorted(copy.glob("*/*/record.json"))[1].write_text(damage)
    before = hashes(copy)
    assert main([what, *STUDY, "--outputs", str(copy)]) == 1
    one_sentence(capsys.readouterr().err, expected, "record.json")
    assert hashes(copy) == before


@pytest.mark.parametrize("where", ("a file", "below a file", "/proc/nowhere"))
def test_an_output_folder_that_cannot_be_written(where, tmp_path, capsys, toys):
    (tmp_path / "file").write_text("mine")
    outputs = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "deeper"}.get(where, Path(where))
    assert main(["run", *STUDY, "--outputs", str(outputs)]) == 1
    one_sentence(capsys.readouterr().err, "cannot write", str(outputs))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(toy_outputs, tmp_path):
    """A real one where it can be mounted: the finished runs stay, and with room the same command ends."""
    outputs = tmp_path / "small"
    outputs.mkdir()
    size = sum(p.stat().st_size for p in toy_outputs.rglob("*") if p.is_file())
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 0.6) // 4096 * 4}k", "tmpfs", str(outputs)], capture_output=True).returncode:
        pytest.skip("no file system of a chosen size can be mounted here")
    try:
        code, out, err = xtransfer(*SMOKE, "--outputs", outputs)
        assert code == 1, out + err
        one_sentence(err, "No space left")
        done = {p.parent: hashes(p.parent) for p in outputs.glob("*/*/record.json")}
        subprocess.run(["mount", "-o", "remount,size=64m", str(outputs)], check=True)
        code, out, err = xtransfer(*SMOKE, "--outputs", outputs)
        assert code == 0, out + err
        assert all({k: v for k, v in hashes(folder).items() if not k.startswith("checkpoint")} == {k: v for k, v in files.items() if not k.startswith("checkpoint")} for folder, files in done.items())
    finally:
        subprocess.run(["umount", "-l", str(outputs)], check=False)


def test_a_checkpoint_that_does_not_fit(toy_outputs, tmp_path, capsys, toys):
    copy = tmp_path / "copy"
    shutil.copytree(toy_outputs, copy)
    config = next(copy.glob("*/toy_text.s0-*/checkpoint/config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 32, "intermediate_size": 64}))
    shutil.rmtree(next(copy.glob("*/toy_text.toy_pair.s0-*")))
    before = hashes(copy)
    assert main(["run", *STUDY, "--outputs", str(copy), "--workers", "1", "--threads", "1"]) == 1
    one_sentence(capsys.readouterr().err, "toy-encoder", "checkpoint")
    assert {k: v for k, v in hashes(copy).items() if ".work-" not in k} == before
