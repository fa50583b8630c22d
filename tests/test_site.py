"""The documentation site: it builds without network and loads nothing, it is complete, and every command and example in it is executed.

Blocks of a page share a folder, in their order. A block that cannot run in a test has a comment above it that says why, and is checked in another way:

    minutes            a study of up to 6 runs is executed with two updates and a few examples; a larger one is planned instead of run; a record's run is looked up instead of executed
    needs: hub         the command line accepts it, and the study or task is declared
    needs: slurm       the command line, or the tool, accepts it; what an example imports is there
    needs: display     a target of make that opens a program: the target is there
    needs: network     a program outside the package: the files that it reads are there
    needs: hours       a target of make: the target is there
    uses: NAME         runs, with files that the reader has: see USED
    file: NAME         is written into the folder under that name
"""

import configparser
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import CACHE
from xtransfer.core import XtransferError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"((?:^<!-- .+? -->\n)*)^```(\w+)\n(.*?)^```", re.M | re.S)
TINY = ["--set", "max_steps=2", "--set", "evaluations=1", "--set", "dev_limit=8", "--train-limit", "24", "--score-limit", "4"]
KINDS = {"minutes", "needs: hub", "needs: slurm", "needs: display", "needs: network", "needs: hours"}
EXECUTED = {"bash", "console", "python"}
USED = {"news tables": {f"data/me/news/{table}.csv": "headline,body,category\n" + 'Habari,"Maandishi, ya leo",sports\n' * rows for table, rows in {"en/train": 4, "en/validation": 2, "en/test": 2, "sw/test": 2}.items()}}


def blocks(page):
    """Marks, language and text of a page's blocks."""
    return [(re.findall(r"<!-- (.+?) -->", marks), language, text) for marks, language, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(text):
    """The commands of a block, continuation lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def test_every_mark_is_known_and_every_block_has_a_language():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page)), f"{page.name}: a block without a language, or one that is not closed"
        for marks, language, _ in blocks(page):
            assert language in EXECUTED | {"text", "csv", "yaml", "json"}, f"{page.name}: a block in {language}, which nothing executes"
            unknown = [m for m in marks if m not in KINDS and not m.startswith("file: ") and m.removeprefix("uses: ") not in USED]
            assert not unknown, f"{page.name}: {unknown}"


class Reader:
    """Somebody who types what a page says."""

    def __init__(self, folder):
        self.folder, self.names = folder, {"__name__": "__main__"}
        for name in ("outputs", "nbs", "requirements.lock", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv" / "bin").mkdir(parents=True)
        for name in ("python", "papermill", "jupyter"):
            path = folder / ".venv" / "bin" / name
            path.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
            path.chmod(0o755)

    def type(self, marks, line):
        """Execute one line, or check it as its marks say."""
        from xtransfer.cli import main

        words = shlex.split(line, comments=True)
        kind = next((mark for mark in marks if mark in KINDS), None)
        if words[0] == "make":
            assert kind in ("needs: display", "needs: hours") and re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.M), line
        elif kind == "needs: network" and words[0] in ("git", "cd"):
            address = configparser.ConfigParser()
            address.read(ROOT / "settings.ini")
            assert words in (["git", "clone", address["DEFAULT"]["git_url"]], ["cd", address["DEFAULT"]["repo"]]), line
        elif kind == "needs: network" and words[1] == "-c":
            import transformers
            compile(words[2], line, "exec")
            assert words[0].endswith("/python") and all(hasattr(transformers, name) for name in re.findall(r"\bt\.(\w+)", words[2])), line
        elif kind == "needs: network":
            assert words[0] == "pip" and all((ROOT / name).exists() for name in words if name.endswith((".lock", ".txt"))), line
        elif kind in ("needs: hub", "needs: slurm"):
            self.look_up(words)
        elif words[0].endswith("/xtransfer"):
            asked = self.smaller(words[1:]) if kind == "minutes" else words[1:] + (TINY if self.tiny and words[1] in ("report", "status") and "--declare" in words else [])
            try:
                assert main(asked) == 0, line
            except SystemExit as ended:  # --help
                assert not ended.code, line
        elif words[1:3] == ["-m", "xtransfer.restore"]:
            from xtransfer.restore import recorded_run
            assert kind == "minutes" and all(recorded_run(name) for name in words[3:]), line
        else:
            done = subprocess.run(["bash", "-ec", line], cwd=self.folder, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    tiny = False

    def smaller(self, words):
        """A study with two updates and a few examples, or its plan where it is large."""
        from xtransfer.asked import chosen_study
        from xtransfer.cli import make_parser

        arguments = make_parser().parse_args(words)
        if arguments.command != "run":
            return words + (TINY if self.tiny else [])
        if len(chosen_study(arguments).plan()) <= 6 and "--executor" not in words:
            self.tiny = True
            return words + TINY
        study = vars(make_parser().parse_args(["plan", "stilts"]))
        plan = ["plan", arguments.study]
        for name in sorted(study.keys() & vars(arguments).keys() - {"command", "study"}):
            for value in (given if isinstance(given := getattr(arguments, name), list) else [given]):
                plan += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        return plan

    def look_up(self, words):
        """What needs a hub or a cluster is accepted by the command line, and names what is declared."""
        import xtransfer.catalogue  # noqa: F401
        from xtransfer.asked import chosen_study
        from xtransfer.cli import make_parser
        from xtransfer.runs import check_parameters
        from xtransfer.tasks import TASKS

        while "=" in words[0]:  # the environment
            words = words[1:]
        if words[0].endswith("/papermill"):
            given = {k: json.loads(v) if v.startswith("[") else v for k, v in zip(words, words[1:])}
            names = [word for flag, word in zip(words, words[1:]) if flag == "-p"] + [word.split(":")[0] for flag, word in zip(words, words[1:]) if flag == "-y"]
            assert (self.folder / words[1]).is_file() and names and given is not None
            with pytest.raises(XtransferError, match="needs the parameter|takes a"):  # the names are right, not all are given
                check_parameters(Path(words[1]).stem, dict.fromkeys(names, "x"))
            return
        if words[1].endswith(".py"):  # a tool of the repository
            assert all(word in (ROOT / words[1]).read_text() for word in words[2:] if word.startswith("--")), words
            return
        arguments = make_parser().parse_args(words[1:])
        if hasattr(arguments, "study"):
            if not (arguments.backbone and "/" in arguments.backbone):  # whose card is on the hub
                assert chosen_study(arguments).plan()
        elif arguments.command == "show":
            assert TASKS[arguments.what].format


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader in an empty folder; what a page declares is gone afterwards."""
    import xtransfer.catalogue  # noqa: F401
    from xtransfer.backbones import BACKBONES
    from xtransfer.studies import STUDIES
    from xtransfer.tasks import TASKS

    before = [(registry, dict(registry)) for registry in (TASKS, BACKBONES, STUDIES)]
    for name, value in {"HF_HUB_OFFLINE": "1", "XTRANSFER_CACHE": CACHE.name, "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XTRANSFER_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    yield Reader(tmp_path)
    for registry, entries in before:
        registry._entries = entries


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(language in EXECUTED for _, language, _ in blocks(page))], ids=lambda p: p.stem)
def test_everything_on_a_page_works(page, reader, monkeypatch):
    from xtransfer import runs
    from xtransfer.records import read_record, run_folder

    for marks, language, text in blocks(page):
        for name, content in (item for mark in marks if mark.startswith("uses: ") for item in USED[mark.removeprefix("uses: ")].items()):
            (reader.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (reader.folder / name).write_text(content)
        if written := [mark.removeprefix("file: ") for mark in marks if mark.startswith("file: ")]:
            (reader.folder / written[0]).write_text(text)
        elif language in ("bash", "console"):
            for line in commands(text):
                reader.type(marks, line.removeprefix("$ "))
        elif language == "python":
            if "needs: slurm" in marks:  # what it imports is there
                text = "\n".join(line for line in text.splitlines() if re.match("from |import ", line))
            with monkeypatch.context() as patch:
                if "minutes" in marks:  # what would be trained is read from the committed records
                    patch.setattr(runs, "execute", lambda run, outputs: read_record(run_folder(ROOT / "outputs", run)))
                exec(compile(text, str(page), "exec"), reader.names)


# The built pages

RESOURCES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src", "object": "data", "link": "href", "use": "href", "image": "href"}


class Page(HTMLParser):
    """What a page loads, where it leads and what it can be led to."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links, self.anchors, self.heads = [], [], set(), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in RESOURCES and (address := found.get(RESOURCES[tag])) and found.get("rel") not in ("canonical", "next", "prev", "edit"):
            self.loaded.append(address)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.heads += tag == "h1"
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does, where no network can be reached by its usual ways."""
    folder = tmp_path_factory.mktemp("site")
    unreachable = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_ENDPOINT")}
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | unreachable | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout[-2000:] + done.stderr[-4000:]
    return {path.relative_to(folder).as_posix(): Page(path) for path in sorted(folder.rglob("*.html"))}, folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    pages, folder = site
    loaded = {name: [a for a in page.loaded if re.match(r"(https?:)?//", a)] for name, page in pages.items()}
    assert not [item for item in loaded.items() if item[1]]
    assert not [path for path in folder.rglob("*.css") if re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text())]
    for name in pages:
        text = (folder / name).read_text(encoding="utf-8")
        assert not re.search(r"class=\"[^\"]*\bmermaid\b|MathJax|fonts\.(googleapis|gstatic)|data-md-component=\"source\"", text), name  # for these the theme's script fetches something
    missing = [(name, a) for name, page in pages.items() for a in page.loaded if not re.match(r"data:|#|/", a) and not (folder / name).parent.joinpath(a.split("?")[0].split("#")[0]).exists()]
    assert not missing, missing[:5]


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site):
    pages, folder = site
    dead = []
    for name, page in pages.items():
        for link in page.links:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link) or name == "404.html" or name.startswith("results/") and name not in ("results/index.html",):
                continue
            aim = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            if not (folder / aim).exists() or anchor and aim in pages and anchor not in pages[aim].anchors:
                dead.append((name, link))
    assert not dead, f"{len(dead)} dead links, such as {dead[:8]}"


@pytest.mark.slow
def test_the_site_holds_everything(site):
    pages, folder = site
    assert all(page.heads == 1 for name, page in pages.items() if name.startswith(("index", "start/", "how-to/", "explanations/", "reference/"))), "one title a page"
    from xtransfer.backbones import BACKBONES
    from xtransfer.cli import COMMANDS
    from xtransfer.tasks import TASKS

    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        assert f"library/{notebook.stem}.html" in pages
        module = re.search(r"default_exp (\w+)", notebook.read_text())[1]
        public = [name for name in importlib.import_module(f"xtransfer.{module}").__all__ if not name.startswith("_")]
        text = (folder / "reference" / "api" / f"{module}.html").read_text(encoding="utf-8")
        assert not [name for name in public if not re.search(rf"\b{name}\b", text)], notebook.name
    shown = (folder / "library" / "02_metrics.html").read_text(encoding="utf-8")
    assert "#| export" not in shown and "#|" not in shown and "clipboard-copy-txt" not in shown and "normalize_squad" in shown
    listed = (folder / "results" / "index.html").read_text(encoding="utf-8")
    assert "One record" in re.search(r'<a href="record.html" class="md-nav__link">(.*?)</a>', listed, re.S)[1] and 'href="../index.html" title="xtransfer"' in listed
    line = (folder / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert all(f"usage: xtransfer {name}" in line for name in COMMANDS)
    assert all(f"reference/tasks/{name}.html" in pages for name in TASKS if not name.startswith(("toy", "news"))) and "reference/backbones/xlm-r-large.html" in pages and len(BACKBONES) > 20
    assert {"results/stilts-mini.html", "results/record.html", "library/start.html", "library/tutorials/build_a_study.html", "library/experiments/target.html"} <= pages.keys()
