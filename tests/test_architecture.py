"""What keeps the package readable and its two halves apart: the order of imports, sizes, generated code, declared dependencies."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))  # by number, 04 before 04a
TEMPLATES = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
MODULES = {p.stem: p for p in sorted((ROOT / "xtransfer").glob("*.py")) if not p.stem.startswith("_")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "transformers", "datasets")
LARGEST_CELL, LARGEST_MODULE = 60, 460  # lines
TABLES = {"languages": "_TABLE"}  # cells that are data, by the name that they define
LONG: dict[str, str] = {}  # cells above the size that are accepted; none
SHOWN_ELSEWHERE = {"steps": "in the experiment templates"}  # library notebooks without examples of their own
NOT_IMPORTED = {"sentencepiece": "transformers reads the tokenizers of mT5 and of translation models with it", "protobuf": "and needs this for it"}
OTHER_NAMES = {"IPython": "ipython", "PIL": "pillow", "sklearn": "scikit-learn"}  # import name -> distribution


def cells(notebook):
    """Kind, source and metadata of a notebook's cells."""
    return [(c["cell_type"], "".join(c["source"]), c["metadata"]) for c in json.loads(notebook.read_text())["cells"]]


def exported(notebook):
    return [source for kind, source, _ in cells(notebook) if kind == "code" and re.match(r"#\|\s*export\b", source)]


def module_of(notebook):
    """The module that a notebook is exported to."""
    return re.search(r"^#\|\s*default_exp\s+(\w+)", "\n".join(source for _, source, _ in cells(notebook)), re.M)[1]


ORDER = [module_of(n) for n in NOTEBOOKS]


def imports(path):
    """Names of the modules that a file imports anywhere, the package's own as xtransfer.name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ("xtransfer." if node.level else "") + (node.module or "")
            yield from (f"xtransfer.{alias.name}" for alias in node.names) if package.strip(".") == "xtransfer" else (package,)


def code_lines(source):
    """Lines of code: without blank lines, comments and docstrings."""
    told = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(1 for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#") and i not in told)


def project_files():
    """The files of the project: those that git knows or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_sources(folder):
    """What export and packaging need, in a folder of its own, so that a test never touches the work of a developer."""
    for name in ("settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("nbs", "xtransfer"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_module_has_one_notebook_and_every_notebook_a_module():
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == set(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_to_lower_numbers(name):
    used = {i.split(".")[1] for i in imports(MODULES[name]) if i.startswith("xtransfer.")} & set(ORDER)
    later = [other for other in used if ORDER.index(other) >= ORDER.index(name)]
    assert not later, f"{name} imports {later}, whose notebooks come after its own"


def test_planning_and_reporting_import_no_torch():
    early = [module_of(n) for n in NOTEBOOKS if int(n.name[:2]) <= 14]
    assert {"studies", "records", "analysis", "catalogue", "report"} <= set(early)
    program = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module('xtransfer.' + name)\n    if 'torch' in sys.modules: sys.exit(name + ' imports torch')"
    run(sys.executable, "-c", program, *early, cwd=ROOT)


@pytest.mark.parametrize("name", ["xtransfer", "xtransfer.cli"])
def test_command_line_starts_without_heavy_imports(name):
    found = run(sys.executable, "-c", f"import sys, {name}; print(*[m for m in {HEAVY!r} + ('pandas', 'matplotlib') if m in sys.modules])", cwd=ROOT)
    assert not found.strip(), f"import {name} loads {found}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_library_notebook_reads_as_a_document(notebook):
    kind, first, _ = cells(notebook)[0]
    assert kind == "markdown" and re.match(r"# \S.*\n+> \S.*[.?!]\s*(\n|$)", first), "starts with a title and its purpose in one line"
    purpose = re.search(r"^> (.*)$", first, re.M)[1]
    assert ast.get_docstring(ast.parse(MODULES[module_of(notebook)].read_text())) is not None, "nbdev makes the purpose the module's docstring"
    assert len(purpose) < 200
    assert not any("import *" in source for source in exported(notebook))
    shown = [s for k, s, _ in cells(notebook) if k == "code" and s not in exported(notebook) and "default_exp" not in s]
    assert shown or module_of(notebook) in SHOWN_ELSEWHERE, "shows at least one thing at work"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_sizes(notebook):
    name = module_of(notebook)
    assert len(MODULES[name].read_text().splitlines()) < LARGEST_MODULE
    allowed = [n for n in (TABLES.get(name), LONG.get(name)) if n]
    for source in exported(notebook):
        if not any(re.search(rf"^(def |class )?{n}\b", source, re.M) for n in allowed):
            assert code_lines(source) <= LARGEST_CELL, source[:80]


def test_generated_code_is_current_and_notebooks_are_clean(tmp_path):
    copy = copy_sources(tmp_path)
    for path in (copy / "xtransfer").rglob("*.py"):
        path.unlink()
    scripts = Path(sys.executable).parent
    run(scripts / "nbdev_export", cwd=copy)
    run(scripts / "nbdev_clean", cwd=copy)
    here, there = ({str(p.relative_to(base)): p.read_text() for folder, pattern in (("xtransfer", "*.py"), ("nbs", "*.ipynb"))
                    for p in (base / folder).rglob(pattern) if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)} for base in (ROOT, copy))
    assert here.keys() == there.keys(), f"only on one side: {here.keys() ^ there.keys()}"
    stale = sorted(name for name in here if here[name] != there[name])
    assert not stale, f"{stale} differ from what `make export` writes; edit notebooks only, then run it"
    for template in TEMPLATES:  # nbdev_clean deletes tags unless settings.ini allows them
        assert any("parameters" in metadata.get("tags", ()) for _, _, metadata in cells(copy / "nbs" / "experiments" / template.name)), template.name


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda p: p.stem)
def test_template_has_one_cell_of_typed_parameters(template):
    parameters = [source for _, source, metadata in cells(template) if "parameters" in metadata.get("tags", ())]
    assert len(parameters) == 1
    body = ast.parse(parameters[0]).body
    assert body and all(isinstance(node, ast.AnnAssign) for node in body), "papermill checks no types; `execute` does, by these annotations"
    assert (TEMPLATES[0].parent / ".notest").exists(), "nbdev_test would execute the templates"


def test_no_file_knows_the_machine_it_was_written_on():
    places = "|".join(["wor" + "k", "roo" + "t", "tmp/ve" + "nv", "opt/whe" + "els", "opt/py" + "pi"])
    absolute = re.compile(rf"(?<![\w.+/$}}*)\]-])/({places})(?![\w])")
    found = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {text[max(0, m.start() - 30):m.end() + 20]!r}" for m in absolute.finditer(text)]
    assert not found, "\n".join(found[:20])


def test_commands_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"help", "setup", "mini", "smoke", "test", "check", "export", "lab", "docs", "clean"} <= targets
    for name in ("README.md", "CONTRIBUTING.md", "FOOTGUNS.md", "nbs/index.ipynb"):
        text = (ROOT / name).read_text()
        asked = set(re.findall(r"(?:`|^\s*|\"\s*)make ([a-z]+)(?=`|\s*$|\s+#|\s*\\n)", text, re.M))
        assert asked <= targets, f"{name}: {asked - targets}"
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"
    assert "make mini" in (ROOT / "README.md").read_text() and "make test" in (ROOT / "README.md").read_text()


def test_example_of_the_readme_is_accepted(tmp_path):
    (example,) = re.findall(r"<!-- example: mine.py -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(example)
    planned = run(sys.executable, "-c", "import sys; from xtransfer.cli import main; sys.exit(main())", "plan", "names", "--declare", str(tmp_path / "mine.py"), "--outputs", str(tmp_path), cwd=ROOT)
    assert "12 runs, 12 to execute" in planned and "world-xlmr-1/" in planned


def test_data_set_of_the_readme_is_read(tmp_path):
    (example,) = re.findall(r"<!-- example: news.py -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "news.py").write_text(example)
    for table, rows in {"en/train": 4, "en/validation": 2, "en/test": 2, "sw/test": 2}.items():
        path = tmp_path / "data" / "me" / "news" / f"{table}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("headline,body,category\n" + "Habari,\"Maandishi, ya leo\",sports\n" * rows)
    shown = run(sys.executable, "-c", "import sys; from xtransfer.cli import main; sys.exit(main())", "show", "news", "sw", "--declare", str(tmp_path / "news.py"), "--data", str(tmp_path / "data"), cwd=ROOT)
    assert "2 rows of 200 published (local copy of me/news)" in shown and "Maandishi, ya leo" in shown


def required(lines):
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


def test_dependencies_are_what_the_code_imports():
    declared = required(PROJECT["dependencies"])
    used = {OTHER_NAMES.get(i.split(".")[0], i.split(".")[0]).lower().replace("_", "-") for path in MODULES.values() for i in imports(path)}
    used -= {m.lower() for m in sys.stdlib_module_names} | {"xtransfer"}
    assert used <= declared, f"not declared: {used - declared}"
    assert declared - used == set(NOT_IMPORTED), f"declared, but not imported: {declared - used - set(NOT_IMPORTED)}"


def test_lock_is_exact_complete_and_portable():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact, and without build tags such as +cpu, which no public index serves"
    locked = required(lines)
    assert not [name for name in locked if name.startswith(("nvidia", "triton"))]
    assert required(PROJECT["dependencies"]).union(*(required(PROJECT["optional-dependencies"][extra]) for extra in ("dev", "docs", "cluster"))) <= locked


@pytest.mark.skipif(os.environ.get("XTRANSFER_REQUIRE_HUB") != "1", reason="only where real data have to be there")
def test_some_tests_read_real_data():
    assert [p.name for p in (ROOT / "tests").glob("test_*.py") if re.search(r"^def test_\w+\([^)]*\bhub\b", p.read_text(), re.M)]
