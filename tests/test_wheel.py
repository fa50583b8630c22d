"""An installed wheel is enough: modules, templates and the command line, from an empty folder, without the repository."""

import os
import subprocess
import sys
import zipfile

import pytest

from test_architecture import MODULES, TEMPLATES, copy_sources, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = copy_sources(tmp_path_factory.mktemp("source"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_holds_modules_templates_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"xtransfer/{name}.py" for name in MODULES} | {f"xtransfer/experiments/{t.name}" for t in TEMPLATES} | {"xtransfer/__init__.py", "xtransfer/py.typed", "xtransfer/workflow/Snakefile", "xtransfer/workflow/slurm/config.yaml"}
    assert wanted <= names, wanted - names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"xtransfer"}


def test_installed_wheel_plans_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=empty)
    around = {k: v for k, v in os.environ.items() if not k.startswith("XTRANSFER")} | {"PYTHONPATH": str(target)}
    where = subprocess.run([sys.executable, "-c", "from xtransfer.runs import template_path; print(template_path('target'))"], cwd=empty, env=around, capture_output=True, text=True, check=True)
    assert where.stdout.strip() == str(target / "xtransfer" / "experiments" / "target.ipynb")
    planned = subprocess.run([target / "bin" / "xtransfer", "plan", "stilts", "--profile", "smoke"], cwd=empty, env=around, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "to execute" in planned.stdout and "world-xlmr/" in planned.stdout
