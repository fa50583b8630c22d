"""A study on another backbone: what changes, what stays, what cannot be done."""

import os
from dataclasses import replace

import pytest

from conftest import TOYS, xtransfer
from xtransfer.backbones import BACKBONES
from xtransfer.core import XtransferError
from xtransfer.records import read_record
from xtransfer.studies import STUDIES, Stage, Study, intermediate_cells, not_applicable
from xtransfer.tasks import TASKS

SHORT = ("--train-limit", 16, "--score-limit", 8, "--set", "max_steps=3", "--set", "dev_limit=6")


@pytest.fixture
def others(toys):
    """Backbones beside the toy's: short positions, random weights, weights of its own."""
    toy = BACKBONES["toy-encoder"]
    for name, more in {"toy-short": {"max_length": 64}, "toy-shorter": {"max_length": 48}, "toy-random": {"hidden_size": 32}, "toy-weights": {"checkpoint": "toys/weights"}, "toy-mute": {"family": "mt5-encoder"}}.items():
        BACKBONES.register(replace(toy, name=name, **more))


def digests(study):
    return {run.digest for run in study.plan()}


def test_another_backbone_means_other_runs_and_the_same_questions(others):
    study = STUDIES["toys"].build("mini")
    moved = study.with_backbone("toy-random")
    assert not digests(study) & digests(moved) and all(run.id.startswith("toy-random/") for run in moved.plan())
    assert [(c.arm, c.target, c.seed) for c in moved.cells] == [(c.arm, c.target, c.seed) for c in study.cells] and moved.contrasts == study.contrasts
    assert moved.instead_of == ("toy-encoder",) and moved.backbones == ("toy-random",)
    assert study.with_backbone("toy-encoder") is study
    assert digests(moved.with_backbone("toy-encoder")) == digests(study)
    assert digests(study.with_limits(train=5).with_backbone("toy-random")) == digests(moved.with_limits(train=5))
    renamed = BACKBONES.register(replace(BACKBONES["toy-random"], name="toy-renamed"))
    assert not digests(moved) & digests(study.with_backbone(renamed.name))


def test_pretraining_stays_with_random_weights_and_goes_with_a_checkpoint(others):
    study = STUDIES["toys"].build("mini")
    for name, begins in (("toy-random", ("toy_text",)), ("toy-weights", None)):
        plan = study.with_backbone(name).plan()
        assert (plan[0].stage.train == begins) == (begins is not None) and [run.template for run in plan].count("pretrain") == int(begins is not None)
    stages = [cell.run.stages for cell in study.cells]
    assert [cell.run.stages for cell in study.with_backbone("toy-weights").cells] == [s[1:] for s in stages]
    continued = intermediate_cells("toy-encoder", {"none": (), "mlm": (stages[0][0],)}, {"toy_pair": stages[0][0].recipe}, (), (0,))  # no pretraining: nothing is dropped
    small = Study(name="small", profile="small", question="?", cells=continued, contrasts=())
    moved = small.with_backbone("toy-weights")
    assert [cell.run.stages for cell in moved.cells] == [cell.run.stages for cell in small.cells]
    assert {run.stage.train: run.template for run in moved.plan() if len(run.stages) == 1} == {("toy_pair",): "target", ("toy_text",): "intermediate"}, "continued pretraining of weights that are there"


def test_what_does_not_fit_is_left_out_and_told(others):
    study = STUDIES["toys"].build("mini")
    narrow = study.with_backbone("toy-short")
    assert dict(not_applicable(narrow)) == {"target toy_qa2": "toy_qa2 reads sequences of 96 tokens, and toy-short has 64 positions", "target toy_ranked": "toy_ranked reads sequences of 96 tokens, and toy-short has 64 positions",
                                            "arm multi": "toy_qa2 reads sequences of 96 tokens, and toy-short has 64 positions"}
    assert {(c.arm, c.target) for c in narrow.cells} == {("none", t) for t in ("toy_tags", "toy_choice", "toy_retrieval", "toy_mining")}
    assert len(narrow.declared) == len(study.cells) and not any("toy_qa2" in run.id for run in narrow.plan())
    assert digests(narrow.with_backbone("toy-encoder")) == digests(study) and not narrow.with_backbone("toy-encoder").inapplicable
    shorter = narrow.with_runs(lambda run: replace(run, stages=tuple(replace(s, recipe=replace(s.recipe, max_length=64)) for s in run.stages)))
    assert not shorter.inapplicable and len(shorter.cells) == len(study.cells), "a recipe of 64 tokens fits"
    assert {i.cell.run.backbone for i in study.with_limits(train=5).with_backbone("toy-shorter").inapplicable} == {"toy-shorter"}


def test_a_study_that_is_declared_with_what_cannot_work_leaves_it_out_too(others):
    recipe = STUDIES["toys"].build("mini").cells[0].run.stage.recipe
    cells = intermediate_cells("toy-short", {"none": (), "qa": (Stage(train=("toy_qa",), recipe=recipe, seed=0),)}, {"toy_pair": recipe, "toy_qa2": recipe}, ("toy_retrieval",), (0, 1), None, recipe,
                               preparations={"toy_retrieval": (Stage(train=("toy_qa2",), recipe=recipe, seed=0),)})
    study = Study(name="mine", profile="mini", question="?", cells=cells, contrasts=())
    assert {(c.arm, c.target) for c in study.cells} == {("none", "toy_pair")}
    assert [label for label, _ in not_applicable(study)] == ["targets toy_qa2, toy_retrieval", "arm qa"], "what a target needs before it counts as well"
    with pytest.raises(XtransferError, match="^nothing of study mine, profile mini, can be done with backbone toy-short: toy_qa2 reads .* tokens, and toy-short has 64 positions[^.]*[.]$"):
        Study(name="mine", profile="mini", question="?", cells=tuple(cell for cell in cells if cell.target == "toy_qa2"), contrasts=())


def test_text_without_labels_needs_an_objective(others):
    with pytest.raises(XtransferError, match="nothing of study toys, profile mini, can be done with backbone toy-mute: toy_text is text without labels"):
        STUDIES["toys"].build("mini").with_backbone("toy-mute")


def test_unknown_backbones_are_one_sentence(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, words in {"toy-encodr": "did you mean 'toy-encoder'", "./nowhere": "there is no folder", "empty": "no config.json"}.items():
        with pytest.raises(XtransferError, match=words):
            STUDIES["toys"].build("smoke").with_backbone(name)


def test_a_folder_is_a_backbone_wherever_it_is_named_from(toy_outputs, tmp_path, monkeypatch, toys):
    """A checkpoint of one study, named by a relative path, is what another one starts from; the report has a name of its own."""
    begin = next(run for run in STUDIES["toys"].build("smoke").plan() if run.template == "pretrain")
    checkpoint = toy_outputs / begin.id / "checkpoint"
    monkeypatch.chdir(checkpoint.parent)
    study = STUDIES["toys"].build("smoke").with_backbone("checkpoint")
    assert {run.backbone for run in study.plan()} == {str(checkpoint.resolve())} and {len(run.stages) for run in study.plan()} == {1, 2}
    (name,) = study.backbones
    assert name.startswith("checkpoint-") and all(run.id.startswith(f"{name}/") for run in study.plan())
    asked = ("toys", "--profile", "smoke", "--declare", TOYS, "--outputs", tmp_path, "--backbone", os.path.relpath(checkpoint), *SHORT)
    code, out, err = xtransfer("run", *asked, "--workers", 1, "--threads", 1)
    assert code == 0, out + err
    assert (tmp_path / "reports" / f"toys-smoke-{name}.html").exists() and "3 runs, 3 to execute" in out
    record = read_record(next((tmp_path / name).glob("toy_pair.s0-*")))
    assert record.backbone["checkpoint"] == "checkpoint" and record.parent is None and str(checkpoint) not in str(record.backbone)
    page = (tmp_path / "reports" / f"toys-smoke-{name}.html").read_text()
    assert "the study was declared with toy-encoder" in page and str(checkpoint) not in page
    code, out, err = xtransfer("status", *asked)
    assert code == 0 and out.split() == ["3", "complete"], out + err
    code, out, err = xtransfer("report", *asked[:5], "--outputs", tmp_path, "--backbone", checkpoint)
    assert code == 1 and f"--backbone {checkpoint}` first" in err and "Traceback" not in err


def test_the_command_line_tells_what_is_not_applicable(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from dataclasses import replace\nfrom xtransfer.backbones import BACKBONES\nBACKBONES.register(replace(BACKBONES['world-xlmr'], name='short', max_length=64))\n")
    asked = ("stilts", "--profile", "smoke", "--declare", mine, "--outputs", tmp_path / "o")
    code, out, err = xtransfer("plan", *asked, "--backbone", "short")
    assert code == 0 and "3 runs, 3 to execute" in out, out + err
    assert "not applicable: target world_xquad, since world_xquad reads sequences of 128 tokens, and short has 64 positions" in out and "not applicable: arm qa, since world_squad2 reads" in out
    code, out, err = xtransfer("plan", *asked, "--backbone", "short", "--set", "max_length=64")
    assert code == 0 and "8 runs, 8 to execute" in out and "not applicable" not in out, out + err
    assert TASKS and "not applicable" not in xtransfer("plan", *asked)[1]
