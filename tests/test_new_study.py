"""`xtransfer new-study`: what it writes runs from the first cell to the page, and what it refuses it refuses in one sentence."""

import ast
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import TOYS, xtransfer
from test_tutorials import EXECUTE, ROOT
from xtransfer.cli import main
from xtransfer.core import XtransferError
from xtransfer.new_study import new_study
from xtransfer.studies import STUDIES


@pytest.fixture(autouse=True)
def same_studies():
    """Studies that a test declares are gone after it."""
    before = dict(STUDIES)
    yield
    STUDIES._entries = before


def test_without_options_it_is_a_study_of_the_world(tmp_path, capsys):
    assert main(["new-study", "my-study", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-study.ipynb", "my-study.py"] and "--declare" in out
    study = STUDIES["my-study"].build("mini")
    assert len(study.plan()) == 6 and [run.template for run in study.plan()].count("pretrain") == 1 and len(study.gains) == len(study.contrasts) == 1
    assert all(stage.recipe.max_steps <= 150 for run in study.plan() for stage in run.stages), "minutes on one core"


def test_several_tasks_are_arms_and_a_mixture(tmp_path):
    new_study("several", ("mnli", "squad1"), ("xquad", "tatoeba"), "xlm-r-large", tmp_path)
    study = STUDIES["several"].build("mini")
    assert {cell.arm for cell in study.cells} == {"none", "mnli", "squad1", "multi"} and {cell.target for cell in study.cells} == {"xquad", "tatoeba"}
    assert all(stage.train_limit and stage.score_limit for run in study.plan() for stage in run.stages) and study.distance == "syntactic"
    assert next(cell for cell in study.cells if cell.arm == "multi").run.stages[0].mixing.kind == "uniform"


def test_the_notebook_is_valid_and_its_code_reads_as_code(tmp_path):
    declaration, notebook = new_study("valid", folder=tmp_path)
    content = nbformat.read(notebook, 4)
    nbformat.validate(content)
    assert content.cells[0].source.startswith("# valid\n> Does ") and not re.search(r"\$\w", "".join(cell.source for cell in content.cells))
    for text in (declaration.read_text(), *(cell.source for cell in content.cells if cell.cell_type == "code")):
        ast.parse(text)
    assert "world_ccg" not in "".join(cell.source for cell in content.cells[1:]), "the declaration is told in one place"


@pytest.mark.slow
def test_what_is_written_runs_to_the_page(tmp_path, toys, monkeypatch):
    (tmp_path / "declared").mkdir(), (tmp_path / "mine").mkdir()
    shutil.copy(TOYS, tmp_path / "declared" / "toys.py")
    asked = ("--declare", tmp_path / "declared" / "toys.py", "--backbone", "toy-encoder", "--task", "toy_pair", "--target", "toy_tags", "--target", "toy_retrieval")
    code, out, err = xtransfer("new-study", "of-toys", *asked, "--folder", tmp_path / "mine")
    assert code == 0, out + err
    declaration = tmp_path / "mine" / "of-toys.py"
    text = declaration.read_text()
    assert "../declared/toys.py" in text, "named from the file itself, so that both may be moved together"
    declaration.write_text(text.replace("max_steps=60", "max_steps=3").replace("2000, 50", "40, 5"))
    monkeypatch.delenv("JUPYTER_DEFAULT_PROVISIONER_NAME", raising=False)
    done = subprocess.run([sys.executable, "-c", EXECUTE, str(declaration.with_suffix(".ipynb")), str(tmp_path / "mine"), str(tmp_path / "executed.ipynb")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [cell.outputs for cell in nbformat.read(tmp_path / "executed.ipynb", 4).cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for cell in outputs for output in cell)
    assert "5 runs, 5 to execute" in printed and "with one seed there is no verdict" in printed and sum("image/png" in output.get("data", {}) for cell in outputs for output in cell) == 2
    assert (tmp_path / "mine" / "runs" / "reports" / "of-toys-mini.html").stat().st_size > 20000
    code, out, err = xtransfer("plan", "of-toys", "--declare", declaration, "--outputs", tmp_path / "mine" / "runs")
    assert code == 0 and "5 runs, 0 to execute" in out, "the command line finds the notebook's records: " + out + err


@pytest.mark.parametrize("arguments, expected", (
    (["my study"], ["my study", "letters, digits"]),
    (["../up"], ["letters, digits"]),
    (["x'); import os"], ["letters, digits"]),
    (["stilts"], ["already"]),
    (["random"], ["Python module", "my-random"]),
    (["mine", "--task", "world_mnil"], ["did you mean 'world_mnli'"]),
    (["mine", "--target", "xnil"], ["did you mean 'xnli'"]),
    (["mine", "--backbone", "world-xlm"], ["did you mean 'world-xlmr'"]),
    (["mine", "--task", "tatoeba"], ["no training data"]),
    (["mine", "--target", "mnli"], ["English only"]),
    (["mine", "--target", "world_text"], ["not scored"]),
    (["mine", "--declare", "nowhere.py"], ["nowhere.py"]),
    (["mine", "--folder", "nowhere"], ["nowhere"]),
    (["mine", "--backbone", "siglip2-base", "--target", "xquad", "--task", "squad1"], ["positions"]),
    ([], ["--help"]),
), ids=lambda v: " ".join(v)[-40:])
def test_what_is_refused(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-study", *arguments]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1 and not [e for e in expected if e not in err], err
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_nothing_is_overwritten(tmp_path):
    for ending in (".py", ".ipynb"):
        folder = tmp_path / ending[1:]
        folder.mkdir()
        (folder / f"mine{ending}").write_text("mine")
        with pytest.raises(XtransferError, match="not overwritten"):
            new_study("mine", folder=folder)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(f"mine{ending}", "mine")]


def test_values_are_data_and_never_code(tmp_path, toys):
    from dataclasses import replace

    from xtransfer.tasks import TASKS

    name = "quote\"' \\ $name {x} \n print('no')"
    TASKS._entries[name] = replace(TASKS["toy_pair"], name=name)  # past the check of names, which would refuse it
    (tmp_path / "more.py").write_text(f"from dataclasses import replace\nfrom xtransfer.tasks import TASKS\nTASKS._entries[{name!r}] = replace(TASKS['toy_pair'], name={name!r})\n")
    declaration, _ = new_study("quoted", (name,), ("toy_tags",), "toy-encoder", tmp_path, [str(TOYS), str(tmp_path / "more.py")])
    assert {cell.arm for cell in STUDIES["quoted"].build("mini").cells} == {"none", name}
    assert str(tmp_path) not in declaration.read_text() and os.path.relpath(TOYS, tmp_path).replace(os.sep, "/") in declaration.read_text()


def test_the_command_of_the_readme_is_accepted(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"<!-- example: new-study -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines()[:2]:  # written and planned; the run takes minutes
        assert main(line.removeprefix(".venv/bin/xtransfer ").split()) == 0
    assert "12 runs, 12 to execute" in capsys.readouterr().out
