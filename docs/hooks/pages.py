"""What the site holds beyond the pages in docs/: everything here is made from the package at build time, so that it cannot be out of date.

Pages in docs/ may include a part of a document of the repository with a line of its own: `{{ README.md: How fast }}` takes the section of that heading. `{{ benchmarks }}` is the table of the committed benchmarks.
"""

import ast
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import nbformat
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from mkdocs_jupyter import convert
from mkdocs_jupyter.utils import slugify
from nbconvert import HTMLExporter, TemplateExporter
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
REPOSITORY = "https://github.com/xtransfer/xtransfer/blob/main/"
GROUPS = {2: "Foundations", 7: "Tasks", 8: "Backbones", 12: "Studies, records, analysis", 14: "Reports and tools", 17: "Models and training", 18: "Scoring", 22: "Running", 99: "Further"}  # by the highest number
EXAMPLE = ("stilts", "mini", ("qa", "world_xquad", 0))  # the executed record that is shown


# Notebooks as pages: what mkdocs-jupyter calls for each, with one exporter for all of them and a template that inlines neither styles nor scripts (as it comes, a page has 700 KB of them)

def coloured(source, language=None, metadata=None):
    """Code as the theme shows code."""
    exported = bool(re.match(r"#\|\s*export\b", source))
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)  # what only nbdev reads
    shown = highlight(source, PythonLexer(), HtmlFormatter(cssclass="highlight", wrapcode=True)) if source.strip() else ""
    return f'<div class="cell{" exported" * exported}">{shown}</div>' if shown else ""


EXPORTER = HTMLExporter(template_file="notebook.html.j2", extra_template_paths=[str(Path(__file__).with_name("templates"))], filters={"coloured": coloured})


def notebook_html(path, **options):
    """A notebook as a part of a page."""
    return unique_anchors(TemplateExporter.from_notebook_node(EXPORTER, nbformat.read(path, 4))[0])  # HTMLExporter's own would parse every page once more, to describe pictures


def unique_anchors(page):
    """Headings of one name with anchors of their own, numbered as the table of contents numbers them."""
    seen = Counter()

    def numbered(heading):
        anchor = heading[2]
        seen[anchor] += 1
        name = f"{anchor}_{seen[anchor] - 1}" if seen[anchor] > 1 else anchor
        return heading[0].replace(f'id="{anchor}"', f'id="{name}"', 1).replace(f'href="#{anchor}"', f'href="#{name}"')
    return re.sub(r'<h([1-6]) id="([^"]+)".*?</h\1>', numbered, page, flags=re.S)


def notebook_prose(path, **options):
    """What a notebook says outside its code, for the table of contents."""
    return "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


convert.nb2html, convert.nb2md = notebook_html, notebook_prose


# Documents of the repository

def relinked(text, folder=""):
    """Markdown of the repository with links that hold on the site, from a page one level down; folder: where in the repository the text stands."""
    def target(match):
        path, _, anchor = match[1].partition("#")
        path = os.path.normpath(os.path.join(folder, path)) if path else ""
        pages = {"README.md": "../index.md", "CONTRIBUTING.md": "../project/contributing.md", "FOOTGUNS.md": "../project/traps.md", "CHANGELOG.md": "../project/changes.md"}
        if path in pages:
            return f"]({pages[path]})"
        if path.startswith("outputs/reports/") and path.endswith(".html"):
            return f"](../results/{path.removeprefix('outputs/reports/')})"
        notebook = re.fullmatch(r"nbs/(?!reports/|benchmarks/)(.*\.ipynb)", path)
        if notebook and (ROOT / path).exists():
            return f"](../library/{notebook[1]})"
        return f"]({REPOSITORY}{path})"
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", target, text)


def section(document, heading):
    """The part of a document below a heading."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, re.M | re.S)
    if not found:
        raise ValueError(f"{document} has no section {heading!r}")
    return relinked(re.sub(r"<!-- example:.*?-->\n", "", found[2]), os.path.dirname(document)).strip()


def whole(document, title):
    """A document as a page."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return f"# {title}\n" + relinked(re.sub(r"^# .*\n", "", text, count=1))


# The library and its reference

def notebooks():
    """Library notebooks in the order of their imports."""
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def cells(path):
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def head(path):
    """Title and purpose of a notebook."""
    first = cells(path)[0][1]
    return re.match(r"# (.*)", first)[1], re.search(r"^> (.*)$", first, re.M)[1] if "\n> " in first else ""


def group(path):
    number = int(path.name[:2])
    return next(name for highest, name in GROUPS.items() if number <= highest)


def escaped(text):
    """A docstring as Markdown: angle brackets outside code are text."""
    return "".join(part if k % 2 else part.replace("<", "&lt;").replace("*", "\\*") for k, part in enumerate(re.split(r"(`[^`]*`)", text)))


def in_table(text):
    """A text for a cell of a Markdown table."""
    return escaped(text).replace("|", "\\|")


def said(node):
    """A docstring with its parts."""
    text = ast.get_docstring(node) or ""
    text = re.sub(r"^(Raises|Source|Yields|Returns):", r"\n**\1:**", escaped(text), flags=re.M)
    return text + "\n\n" if text else ""


def signature(node, lines):
    """The source from the first decorator to the colon, with the comments on its parameters."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    body = node.body[0]
    last = body.lineno - 1 if body.lineno > node.lineno else node.lineno
    kept = lines[first - 1:last]
    if isinstance(node, ast.ClassDef):  # fields are what a class of data is made of
        fields = [n for n in node.body if isinstance(n, (ast.AnnAssign, ast.Assign))]
        kept += [line for n in fields for line in lines[n.lineno - 1:n.end_lineno]]
    indent = min((len(line) - len(line.lstrip()) for line in kept if line.strip()), default=0)
    return "```python\n" + "\n".join(line[indent:].rstrip() for line in kept) + "\n```\n\n"


def api(path):
    """The reference of one module, and its public names with a line about each."""
    title, purpose = head(path)
    text, names, place = [f"# xtransfer.{title}\n\n{escaped(purpose)}\n\nMade in the notebook [{path.stem}](../../library/{path.name}), where each of these is shown at work.\n"], [], title
    for kind, source in cells(path):
        if kind == "markdown":
            place = (re.findall(r"^##* (.*)$", source, re.M) or [place])[-1]
        elif re.match(r"#\|\s*export\b", source):
            lines = source.splitlines()
            where = f"[{place}](../../library/{path.name}#{slugify(place)})"
            for node in ast.parse(source).body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    names.append((node.name, (ast.get_docstring(node) or "").split("\n")[0]))
                    text.append(f"## {node.name}\n\n{signature(node, lines)}{said(node)}In the section {where}.\n")
                    for method in node.body if isinstance(node, ast.ClassDef) else ():
                        if isinstance(method, ast.FunctionDef) and (not method.name.startswith("_") or method.name == "__init__"):
                            text.append(f"### {node.name}.{method.name}\n\n{signature(method, lines)}{said(method)}")
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    public = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and not n.id.startswith("_")]
                    if public:
                        names += [(name, "") for name in public]
                        shown = [line if len(line) < 200 else line[:197] + "..." for line in lines[node.lineno - 1:node.end_lineno]]
                        others = "".join(f'<a id="{slugify(name)}"></a>' for name in public[1:])
                        text.append(f"## {', '.join(public)} {{#{slugify(public[0])}}}\n\n{others}\n\n```python\n" + "\n".join(shown[:12] + ["..."] * (len(shown) > 12)) + f"\n```\n\nIn the section {where}.\n")
    return "\n".join(text), names


def api_index(found):
    """The first page of the reference."""
    text = ["# Reference\n\nEvery public name of the package, from its source: the signature with what each parameter holds, the docstring, and a link to the section of the notebook that explains it and shows it at work. "
            "The [command line](command-line.md) has a page of its own, and so has every [task](tasks/index.md) and every [backbone](backbones/index.md).\n"]
    for name in dict.fromkeys(GROUPS.values()):
        text.append(f"## {name}\n\n| module | what it is for | public names |\n| --- | --- | --- |")
        for path, names in found.items():
            if group(path) == name:
                title, purpose = head(path)
                links = " ".join(f"[`{n}`](api/{title}.md#{slugify(n)})" if len(names) <= 12 else f"`{n}`" for n, _ in names[:12])
                text.append(f"| [`{title}`](api/{title}.md) | {in_table(purpose)} | {links}{f' and {len(names) - 12} more' if len(names) > 12 else ''} |")
        text.append("")
    every = sorted({(n.lower(), n, head(path)[0]) for path, names in found.items() for n, _ in names})
    text.append("## All names\n\n" + " · ".join(f"[`{n}`](api/{title}.md)" for _, n, title in every) + "\n")
    return "\n".join(text)


def command_line():
    """What the program says about itself."""
    os.environ["COLUMNS"] = "104"
    from xtransfer.cli import COMMANDS, make_parser

    parser = make_parser()
    commands = next(action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)).choices
    text = ["# Command line\n\nWhat `xtransfer --help` and `xtransfer COMMAND --help` print, taken from the program when this site was built. A mistake ends with one sentence and exit code 1, an interrupted study with 130.\n",
            "| command | what it does |\n| --- | --- |", *(f"| [`{name}`](#xtransfer-{name}) | {in_table(COMMANDS[name][0])} |" for name in commands), ""]
    for name, command in commands.items():
        text.append(f"## xtransfer {name}\n\n```text\n{command.format_help().strip()}\n```\n")
    return "\n".join(text)


def cards():
    """A page for every task and every backbone, and a list of each."""
    import xtransfer.catalogue  # noqa: F401  fills the registries
    from xtransfer.backbones import BACKBONES
    from xtransfer.cards import backbone_card, task_card
    from xtransfer.memory import memory_section
    from xtransfer.tasks import TASKS

    made = {}
    for name, task in TASKS.items():
        made[f"reference/tasks/{name}.md"] = task_card(task)
    for name, backbone in BACKBONES.items():
        made[f"reference/backbones/{name}.md"] = f"{backbone_card(backbone)}\n{memory_section(backbone)}"
    rows = "\n".join(f"| [`{t.name}`]({t.name}.md) | {in_table(t.description)} | {t.format.replace('_', ' ')} | {len(t.languages)} |" for t in TASKS.values())
    made["reference/tasks/index.md"] = f"# Tasks\n\nEverything that can be trained on or scored. A card says where the data come from and under which licence, how many rows were published, what the score is and what is odd about it, and which traps are known. `xtransfer show NAME` prints the same.\n\n| task | what it is | format | languages |\n| --- | --- | --- | --- |\n{rows}\n"
    rows = "\n".join(f"| [`{b.name}`]({b.name}.md) | {b.kind.name} | {b.layers} x {b.hidden_size} | {b.max_length} | {f'`{b.checkpoint}`' if b.checkpoint else 'random weights'} |" for b in BACKBONES.values())
    made["reference/backbones/index.md"] = f"# Backbones\n\nThe models that studies start from. A card says how large one is, what it has read, what it cannot do and what it takes. Any other checkpoint is named by its hub id or folder. `xtransfer show NAME` prints the same.\n\n| backbone | family | layers x width | tokens | weights |\n| --- | --- | --- | --- | --- |\n{rows}\n"
    return made


def example_record():
    """The folder of an executed record, where it is committed."""
    import xtransfer.catalogue  # noqa: F401
    from xtransfer.studies import STUDIES

    name, profile, wanted = EXAMPLE
    run = next(cell.run for cell in STUDIES[name].build(profile).cells if (cell.arm, cell.target, cell.seed) == wanted)
    return ROOT / "outputs" / run.id


def results(pages):
    """The first page of the results."""
    from xtransfer.studies import STUDIES

    def entry(page):
        question = next((study.question for study in STUDIES.values() if page.stem.startswith(study.name + "-")), "")
        answer = re.search(r'<p class="sentence">(.*?)</p>', page.read_text(encoding="utf-8"), re.S)
        return f"### [{page.stem}]({page.name})\n\n**{question}**\n\n{answer[1]}\n" if answer else ""  # one seed answers nothing

    rows = "\n".join(filter(None, map(entry, pages)))
    return f"# Results\n\nThe answers of the committed records: one page per study and profile, each a single file that needs no network. Read [how to read such a page](../start/reading-a-page.md) first. `mini` is the synthetic world: what it says, it says about an invented place. `small` is real data with a model that is far too small.\n\n## Studies\n\n{rows}\n\n" \
        + "## One record, as it was executed\n\n[The notebook of one run](record.ipynb): question answering after training on English questions, first seed. It is one of several hundred like it; the pages above link to all of them.\n\n" \
        + f"## How fast\n\nThe benchmark suite beside its peers, missed targets included, is told in [an explanation](../explanations/speed.md); the [executed notebooks]({REPOSITORY}outputs/benchmarks) are its records.\n"


def benchmarks():
    """What was measured beside peers, without the columns that only a specialist reads."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "outputs" / "benchmarks" / "table.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    wanted = [lines[0].index(name) for name in ("what", "beside", "times", "interval", "target", "met")]
    rounded = [[re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2g}", line[k].strip()) for k in wanted] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rounded)


# mkdocs

def on_config(config):
    """Put the notebooks into the navigation, in the order of their imports."""
    library = next(item["Library"] for item in config.nav if "Library" in item)
    for name in dict.fromkeys(GROUPS.values()):
        if found := [path for path in notebooks() if group(path) == name]:
            library.append({name: [f"library/{path.name}" for path in found]})
    for folder, title in (("experiments", "Experiment notebooks"), ("tutorials", "Tutorials")):
        library.append({title: [f"library/{folder}/{path.name}" for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]})
    results = next(item["Results"] for item in config.nav if "Results" in item)
    if (example_record() / "notebook.ipynb").exists():
        results.append({"One record": "results/record.ipynb"})
    library.insert(1, "library/start.ipynb")
    project = next(item["Project"] for item in config.nav if "Project" in item)
    if (ROOT / "SECURITY.md").exists():
        project.insert(1, "project/security.md")
    return config


@event_priority(100)  # before mkdocs-jupyter looks at the files
def on_files(files, config):
    """Add what is made from the package."""
    made = {"reference/command-line.md": command_line(), "project/contributing.md": whole("CONTRIBUTING.md", "Contributing"), "project/traps.md": whole("FOOTGUNS.md", "Traps"), "project/changes.md": whole("CHANGELOG.md", "Changes"), **cards()}
    if (ROOT / "SECURITY.md").exists():
        made["project/security.md"] = whole("SECURITY.md", "Security")
    found = {}
    for path in notebooks():
        made[f"reference/api/{head(path)[0]}.md"], found[path] = api(path)
    made["reference/index.md"] = api_index(found)
    pages = sorted((ROOT / "outputs" / "reports").glob("*.html"))
    made["results/index.md"] = results(pages)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    nbs = [*notebooks(), *(ROOT / "nbs" / name for name in ("index.ipynb", "start.ipynb")), *(ROOT / "nbs" / "experiments").glob("*.ipynb"), *(ROOT / "nbs" / "tutorials").glob("*.ipynb")]
    for path in nbs:
        if path.exists():
            files.append(File.generated(config, f"library/{path.relative_to(ROOT / 'nbs').as_posix()}", abs_src_path=str(path)))
    if (record := example_record() / "notebook.ipynb").exists():
        files.append(File.generated(config, "results/record.ipynb", abs_src_path=str(record)))
    for page in pages:
        text = page.read_text(encoding="utf-8").replace('href="../', f'href="{REPOSITORY}outputs/')  # the notebooks of the runs stay in the repository
        files.append(File.generated(config, f"results/{page.name}", content=text))
    figure = ROOT / "outputs" / "benchmarks" / "table.svg"
    if figure.exists():
        files.append(File.generated(config, "explanations/speed.svg", abs_src_path=str(figure)))
    return files


def on_nav(nav, config, files):
    """mkdocs-jupyter wraps a notebook's file and loses where it lies, since it lies outside of docs/."""
    for file in files:
        if file.src_uri.endswith(".ipynb"):
            file.abs_src_path = file.file.abs_src_path
    return nav


def on_page_markdown(markdown, page, config, files):
    """Include parts of the repository's documents."""
    markdown = re.sub(r"^\{\{ (\S+): (.+?) \}\}$", lambda m: section(m[1], m[2]), markdown, flags=re.M)
    return markdown.replace("{{ benchmarks }}", benchmarks()) if "{{ benchmarks }}" in markdown else markdown


def on_page_content(content, page, config, files):
    """Links of a notebook to other notebooks lead to their pages; the record is called in menus what it is here, not what its notebook calls itself."""
    if page.file.src_uri == "results/record.ipynb":
        page.title = "One record"
    if not page.file.src_uri.startswith("library/"):
        return content
    return re.sub(r'href="((?!https?:)[^"#]*)\.ipynb', r'href="\1.html', content)
