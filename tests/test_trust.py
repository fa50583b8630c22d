"""What comes from users, hubs and folders is data: it is never run, never a path, never a command, and is shown as what it is."""

import ast
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import finished, hashes, xtransfer
from ill_hub import IllHub
from xtransfer.core import XtransferError, check_name, plainly

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "xtransfer").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
TEMPLATES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


# ---- what the code may not contain -------------------------------------------------------------------------------------------

def code_of(path):
    """The Python of a file, or of a notebook's code cells."""
    if path.suffix == ".py":
        return path.read_text()
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "\n".join(line for cell in cells for line in (["pass"] if cell.startswith("%%") else cell.splitlines()) if not line.lstrip().startswith(("%", "!")))


def called(node):
    """The dotted name of what a call calls."""
    parts, at = [], node.func
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    return ".".join(reversed([*parts, at.id if isinstance(at, ast.Name) else ""]))


def findings(text):
    """What is wrong with some code: shells, pickles, loaders without limits, code from hubs."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [f"imports {name}" for name in names if name.partition(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "commands", "pty")]
        if not isinstance(node, ast.Call):
            continue
        name, options = called(node), {k.arg: k.value for k in node.keywords}
        last = name.rpartition(".")[2]
        if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "eval", "exec", "marshal.loads", "marshal.load") or name.startswith(("os.spawn", "os.exec")):
            found.append(f"calls {name}")
        if "shell" in options and not (isinstance(options["shell"], ast.Constant) and options["shell"].value is False):
            found.append(f"calls {name} with a shell")
        if name.startswith("subprocess.") and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp)):
            found.append(f"calls {name} with a text")
        if name in ("torch.load", "torch.hub.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load") or last in ("read_pickle", "to_pickle", "load_pickle"):
            found.append(f"calls {name}")
        if name in ("np.load", "numpy.load") and not (isinstance(options.get("allow_pickle"), ast.Constant) and options["allow_pickle"].value is False):
            found.append("calls np.load without allow_pickle=False")
        if "trust_remote_code" in options and not (isinstance(options["trust_remote_code"], ast.Constant) and options["trust_remote_code"].value is False):
            found.append(f"calls {name} with trust_remote_code")
        if "use_safetensors" in options and not (isinstance(options["use_safetensors"], ast.Constant) and options["use_safetensors"].value is True):
            found.append(f"calls {name} without safetensors")
        if last == "Environment" and "jinja" in text and not (isinstance(options.get("autoescape"), ast.Constant) and options["autoescape"].value is True):
            found.append("a jinja environment without autoescape")
    return found


@pytest.mark.parametrize("code, words", (("import os\nos.system('x')", "os.system"), ("subprocess.run(c, shell=True)", "shell"), ("subprocess.run(f'rm {x}')", "text"), ("torch.load(p)", "torch.load"), ("np.load(p)", "np.load"),
                                         ("AutoModel.from_pretrained(x, trust_remote_code=y)", "trust"), ("from pickle import loads", "pickle"), ("yaml.load(x)", "yaml")))
def test_the_search_finds(code, words):
    assert any(words in found for found in findings(code))


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" not in p.parts or p.name in ("conftest.py", "ill_hub.py", "copies.py", "toys.py")] + TEMPLATES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_shell_no_pickle_no_code_from_a_hub(path):
    assert not findings(code_of(path))


def test_every_opening_of_a_checkpoint_says_that_no_code_may_come_with_it():
    """transformers asks the terminal otherwise."""
    for path in (ROOT / "xtransfer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and called(node).endswith("from_pretrained") and isinstance(node.func, ast.Attribute):
                told = {k.arg for k in node.keywords} | {ast.unparse(k.value) for k in node.keywords if k.arg is None}
                assert "trust_remote_code" in told or "NO_CODE" in told, f"{path.name}: {ast.unparse(node)}"
                if not re.search("AutoTokenizer|AutoConfig", ast.unparse(node.func)):
                    assert "use_safetensors" in told, f"{path.name}: {ast.unparse(node)}"


# ---- checkpoints and data sets that would like to run something ----------------------------------------------------------------

class Bomb:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (Path(self.path), "it ran"))


def evil_files(target):
    """A checkpoint whose every part would write a file."""
    code = f"from pathlib import Path\nPath({str(target)!r}).write_text('it ran')\n"
    config = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40, "max_position_embeddings": 64}
    return {"config.json": json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForMaskedLM": "evil.Model"}}), "evil.py": code, "setup.py": code, "tokenization_evil.py": code,
            "tokenizer_config.json": json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}}), "pytorch_model.bin": pickle.dumps(Bomb(target)),
            "training_args.bin": pickle.dumps(Bomb(target)), "chat_template.jinja": "{{ cycler.__init__.__globals__.os.system('touch " + str(target) + "') }}"}


@pytest.fixture(scope="module")
def good_tokenizer(tmp_path_factory):
    from xtransfer.world import world_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    world_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(backbone):
    """The sentence with which a backbone is refused, whichever part refuses it."""
    from xtransfer.backbones import BACKBONES, read_backbone
    from xtransfer.modeling import load_encoder, load_tokenizer

    read_backbone.cache_clear()
    with pytest.raises(XtransferError) as refused:
        found = BACKBONES[str(backbone)]
        load_encoder(found, load_tokenizer(found), 0)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("harmless", ((), ("tokenizer",), ("tokenizer", "config")), ids=" and ".join)
def test_a_malicious_checkpoint_runs_nothing(harmless, tmp_path, good_tokenizer, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # who is asked says yes
    folder, target = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    files = evil_files(target) | (good_tokenizer if "tokenizer" in harmless else {})
    if "config" in harmless:
        files["config.json"] = json.dumps({k: v for k, v in json.loads(files["config.json"]).items() if k != "auto_map"})
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    said = opened(folder)
    assert not target.exists() and ("safetensors" in said if harmless else "tokenizer" in said), said
    (folder / "config.json").write_text(files["config.json"].replace('"bert"', '"evil"'))
    assert ("code from a hub is never run" in opened(folder)) == ("config" not in harmless) and not target.exists()


def test_a_stage_checkpoint_names_its_class_and_nothing_else(tmp_path):
    from xtransfer.backbones import BACKBONES
    from xtransfer.modeling import StageModel, load_encoder, load_tokenizer, save_checkpoint

    backbone = BACKBONES["world-xlmr"]
    tokenizer = load_tokenizer(backbone)
    save_checkpoint(StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone), tokenizer, tmp_path / "good")
    load_encoder(backbone, tokenizer, 0, tmp_path / "good")
    config = json.loads((tmp_path / "good/config.json").read_text())
    for name in ("pipeline", "AutoTokenizer", "Trainer", "__builtins__", "os.system", 7, None, ["x"]):
        (tmp_path / "good/config.json").write_text(json.dumps(config | {"architectures": [name], "auto_map": {"AutoModel": "x.Y"}}))
        with pytest.raises(XtransferError, match="encoder of backbone world-xlmr cannot be loaded"):
            load_encoder(backbone, tokenizer, 0, tmp_path / "good")


@pytest.mark.parametrize("config", ("[]", "7", '"x"', "null", '{"model_type": []}', '{"model_type": {}, "auto_map": []}', '{"auto_map": "x", "model_type": "y"}', '{"model_type": "bert", "num_hidden_layers": -1, "hidden_size": 8}',
                                    '{"model_type": "bert", "num_hidden_layers": 1e999, "hidden_size": 8}', '{"model_type": "xlm-roberta", "num_hidden_layers": 2, "hidden_size": 8, "pad_token_id": "x"}', '{"model_type": "bert", "architectures": 5}',
                                    '{"vision_config": 3, "model_type": "clip"}', "[" * 100_000, '{"a": \x00}', '{"model_type": "\\u001b[31mred\\u202e"}',
                                    '{"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "num_labels": 1000000000}', '{"model_type": "bert", "num_hidden_layers": 1000000000, "hidden_size": 8}'))
def test_a_configuration_of_anything(config, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/config.json").write_text(config)
    assert opened(tmp_path / "x").isprintable()


def test_a_repository_with_a_loading_script_runs_nothing(tmp_path):
    target = tmp_path / "ran"
    script = f"from pathlib import Path\nPath({str(target)!r}).write_text('it ran')\n"
    code = """
import json, os, sys
from xtransfer.backbones import read_backbone
from xtransfer.core import XtransferError
from xtransfer.modeling import load_encoder, load_tokenizer
from xtransfer.sources import Source, hub_rows
said = []
for repo in ('evil/script', 'evil/folder', 'evil/pickles', 'evil/outside'):
    try:
        hub_rows(Source(repo=repo), None, 'train')
        said.append('')
    except XtransferError as error:
        said.append(str(error))
try:
    backbone = read_backbone('evil/model')
    load_encoder(backbone, load_tokenizer(backbone), 0)
except XtransferError as error:
    said.append(str(error))
print(json.dumps(said))
"""
    copy = tmp_path / "data/evil/folder"
    copy.mkdir(parents=True)
    (copy / "folder.py").write_text(script)
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"text": "secret"}\n')
    with IllHub() as hub:
        hub.add("datasets", "evil/script", {"script.py": script, "README.md": "x"})
        hub.add("datasets", "evil/pickles", {"train.pkl": pickle.dumps(Bomb(target)), "README.md": "x"})
        hub.add("datasets", "evil/outside", {"README.md": f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {outside}\n---\n", "train.jsonl": '{"text": "x"}\n'})
        hub.add("models", "evil/model", evil_files(target))
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="y\ny\ny\ny\n", env=dict(os.environ) | hub.environment(tmp_path / "home") | {"XTRANSFER_DATA": str(tmp_path / "data")})
        fetched = hub.asked("evil/model", "GET")
    said = json.loads(asked.stdout)
    assert len(said) == 5 and all(said) and "secret" not in said[3].replace(str(outside), ""), (said, asked.stderr)
    assert not target.exists() and not [path for path in fetched if path.endswith((".bin", ".py"))], "not even fetched"


# ---- names ---------------------------------------------------------------------------------------------------------------------

CLIMBING = ("../x", "../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "a\0b", "a\nb", "-rf", "~root", "C:\\x", "CON:", "a\\b", "x" * 300, "\u202egpj.exe", "ｘｎｌｉ", "xnlі", "<b>", "'; rm -rf", "$(x)", "`x`", "{{7*7}}", "%s", "", " ", "a b", "nul\r", "\ud800")


@pytest.mark.parametrize("name", CLIMBING, ids=ascii)
def test_no_name_leaves_its_folder(name, tmp_path, toys, capsys, monkeypatch):
    """Whoever declares, asks for or finds a name."""
    from dataclasses import replace

    from xtransfer.backbones import BACKBONES
    from xtransfer.cache import clear_store
    from xtransfer.cli import main
    from xtransfer.new_study import new_study
    from xtransfer.sources import Source
    from xtransfer.studies import STUDIES
    from xtransfer.tasks import TASKS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTRANSFER_DATA", str(tmp_path / "data"))
    for declare in (lambda: TASKS.register(replace(TASKS["toy_pair"], name=name)), lambda: BACKBONES.register(replace(BACKBONES["toy-encoder"], name=name)), lambda: STUDIES.register(replace(STUDIES["toys"], name=name)),
                    lambda: replace(STUDIES["toys"].build("smoke"), name=name), lambda: replace(STUDIES["toys"].build("smoke"), profile=name), lambda: TASKS.register(replace(TASKS["toy_pair"], languages=("en", name))),
                    lambda: Source(repo=f"files/{name}"), lambda: Source(repo=f"{name}/set"), lambda: TASKS[f"toy_pair@sample-{name}"], lambda: TASKS[f"{name}@shuffled"], lambda: new_study(name, folder=tmp_path)):
        with pytest.raises(XtransferError) as refused:
            declare()
        assert "\n" not in str(refused.value).strip(".")
    for arguments in (["show", name], ["show", "toy_pair", name or "x"], ["run", name], ["run", "toys", "--profile", name], ["run", "toys", "--profile", "smoke", "--backbone", name or "x"], ["run", "toys", "--profile", "smoke", "--languages", name or "x"],
                      ["submission", "toys", "--profile", "smoke", "--benchmark", name or "x"], ["check", name], ["plan", "toys", "--seeds", name or "x"], ["new-study", name], ["new-study", "mine", "--task", name or "x"], ["new-study", "mine", "--backbone", name or "x"]):
        code = main(arguments)
        said = capsys.readouterr()
        assert code == 1 and "Traceback" not in said.err and len(said.err.strip().splitlines()) == 1 and plainly(said.err) == said.err, (arguments, said)
    try:
        clear_store([name] if name else ["x"])
    except XtransferError:
        pass
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_folder_with_any_name_is_a_backbone_with_a_proper_one(tmp_path):
    from xtransfer.backbones import BACKBONES

    for name in ("-rf", "a b", "\u202ex", "..x", "x\ny", "<script>", "$(x)", "x" * 200):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16}))
        check_name("backbone", BACKBONES[str(tmp_path / name)].name)


def test_links_among_records_lead_nowhere(toys, tmp_path, toy_outputs, capsys):
    """Records may come from anybody: nothing is written, removed or read through a link that leads out of their folder."""
    from xtransfer.cli import main
    from xtransfer.studies import STUDIES

    outside, run = tmp_path / "outside", STUDIES["toys"].build("smoke").plan()[0]
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    for place in (run.id, run.id.rpartition("/")[0], f"{run.id.rpartition('/')[0]}/.work-{run.id.rpartition('/')[2]}"):
        outputs = tmp_path / f"outputs-{len(place)}"
        (outputs / place).parent.mkdir(parents=True)
        (outputs / place).symlink_to(outside)
        assert main(["run", "toys", "--profile", "smoke", "--outputs", str(outputs)]) == 1
        assert "is a link that leads to" in capsys.readouterr().err and hashes(outside) and [p.name for p in outside.iterdir()] == ["mine.txt"]
    (tmp_path / "link").symlink_to(toy_outputs)
    assert main(["report", "toys", "--profile", "smoke", "--outputs", str(tmp_path / "link")]) == 0, "the whole folder may be a link"


def test_show_finds_runs_in_a_folder_of_anything(toys, tmp_path, capsys):
    from xtransfer.cli import main

    for name in ("nodash", "a-b\x1b[31m", "-", "x\n-y"):
        (tmp_path / "b" / name).mkdir(parents=True)
        (tmp_path / "b" / name / "record.json").write_text("[]")
    for asked in ("nodash", "b/nodash", "x", "-y", ""):
        assert main(["show", asked, "--outputs", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert plainly(said) == said and "Traceback" not in said


# ---- parameters and notebooks --------------------------------------------------------------------------------------------------

VALUES = ('"', "'", '"""', "\\", "\\\"; import os #", "a\nb", "\r", "\u2028\u2029\x85", "\0", "{x}", "{{7*7}}", "{0.__class__}", "%s", "# type: ignore", '"]; open("ran","w") #', "\ud800", "é\U0001f600\u202e", "\x1b[31m", "x" * 10_000)


def test_parameters_are_values(tmp_path):
    """What papermill writes into a notebook is read back as what it was."""
    from papermill.translators import PythonTranslator

    nested = {}
    for depth in range(40):
        nested = {f"k{VALUES[depth % len(VALUES)]}": [nested, *VALUES[:3]]}
    given = {"texts": list(VALUES), "keys": {value: value for value in VALUES}, "deep": nested, "numbers": [math.inf, -math.inf, 1e300, -0.0, True, None, 10**40], "text": '"""\n' * 3}
    scope = {}
    exec(PythonTranslator.codify(given), {}, scope)
    assert scope == given
    exec(PythonTranslator.codify({"missing": math.nan}), {}, scope)
    assert math.isnan(scope["missing"])


# ---- a user's data set whose every text is hostile -------------------------------------------------------------------------------

HOSTILE = ("<script>document.title='ran'</script></script></td></title><img src=x onerror=\"document.title='ran'\"><svg onload=document.title='ran'> \"'&amp;& {{7*7}} {% raw %} ${7*7} $\\frac{ \\input{/etc/passwd} %& _ ^ ~ # =cmd|' /C calc'!A0 "
           "[x](javascript:document.title='ran') `code` | \x1b[31m\x1b]0;ran\x07 \u202e \x00 \x85 </style><!-- --> ]]>")

DECLARED = '''
import json
from dataclasses import replace
from pathlib import Path
from xtransfer.backbones import BACKBONES, Backbone
from xtransfer.sources import Source, file_loader, json_lines
from xtransfer.studies import STUDIES, Contrast, Recipe, Stage, Study, StudyDeclaration, intermediate_cells
from xtransfer.tasks import TASKS, Task, squad_columns, tagging, text_pair
import runpy
HOSTILE = json.loads(Path(__file__).with_suffix(".json").read_text())
toys = runpy.run_path({toys!r})
for name in list(TASKS):
    if name.startswith("toy_"): del TASKS._entries[name]
source = Source(repo="files/hostile", license=HOSTILE, citation=HOSTILE, note=HOSTILE, obtain=HOSTILE)
common = dict(kind=HOSTILE, source=source, languages=("en", "de"), description=HOSTILE, traps=HOSTILE)
def load(task):
    return file_loader(source, ("train", "dev", "test"), lambda folder, language, split: json_lines(folder / (task + ".jsonl")))
for name in ("hostile_pair", "hostile_other"):
    TASKS.register(Task(name=name, format="sequence_classification", load=load("pair"), read=text_pair("text", "more"), labels=(HOSTILE, "no"), metrics=("accuracy",), headline=("accuracy",), trains_on=name, **common))
TASKS.register(Task(name="hostile_tags", format="token_classification", load=load("tags"), read=tagging(), labels=("O", "B-" + HOSTILE), metrics=("chunk_f1",), headline=("f1",), trains_on="hostile_tags", **common))
TASKS.register(Task(name="hostile_qa", format="span_extraction", load=load("qa"), read=squad_columns, metrics=("squad",), headline=("exact_match", "f1"), trains_on="hostile_qa", **common))
BACKBONES.register(replace(BACKBONES["toy-encoder"], name="hostile-encoder", note=HOSTILE, source=HOSTILE, license=HOSTILE, contamination=HOSTILE))
recipe = Recipe(name=HOSTILE, source=HOSTILE, learning_rate=3e-3, batch_size=8, max_steps=3, max_length=96, stride=8, evaluations=1, dev_limit=4)
def build():
    arms = {{"none": (), HOSTILE: (Stage(train=("hostile_pair",), recipe=recipe, seed=0),)}}
    cells = intermediate_cells("hostile-encoder", arms, {{"hostile_other": recipe, "hostile_tags": recipe, "hostile_qa": recipe}}, (), (0,), None, recipe)
    return Study(name="hostile", profile="smoke", question=HOSTILE, cells=cells, contrasts=(Contrast(treatment=HOSTILE, baseline="none"),), distance="syntactic", note=HOSTILE, factors={{HOSTILE: {{HOSTILE: HOSTILE}}, "none": {{HOSTILE: "-"}}}})
STUDIES.register(StudyDeclaration(name="hostile", question=HOSTILE, profiles={{"smoke": build}}))
'''


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Arguments of the study, and its folder of records, in a folder whose name holds braces."""
    folder = tmp_path_factory.mktemp("hostile") / "{seed} {0} ${x} 'a'"
    files = folder / "data/files/hostile"
    files.mkdir(parents=True)
    (folder / "own.json").write_text(json.dumps(HOSTILE))
    (folder / "own.py").write_text(DECLARED.format(toys=str(ROOT / "tests/toys.py")))
    rows = {"pair": [{"id": HOSTILE, "text": f"a {HOSTILE}", "more": HOSTILE, "label": HOSTILE if i % 2 else "no"} for i in range(12)], "tags": [{"id": HOSTILE, "tokens": ["a", "bc", HOSTILE], "tags": ["O", "O", "B-" + HOSTILE]} for i in range(12)],
            "qa": [{"id": f"{i}{HOSTILE}", "question": HOSTILE, "context": f"a bc {HOSTILE} de", "answers": [{"text": "bc", "answer_start": 2}]} for i in range(12)]}
    for name, lines in rows.items():
        (files / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--declare", folder / "own.py", "--data", folder / "data")
    code, out, err = xtransfer("run", "hostile", "--profile", "smoke", *common, "--outputs", folder / "outputs", "--workers", 1, "--threads", 1)
    assert code == 0, out + err
    return folder, common, out


def test_the_page_shows_it_and_runs_nothing(hostile, tmp_path):
    folder, _, out = hostile
    page = folder / "outputs/reports/hostile-smoke.html"
    text = page.read_text()
    assert not re.search("<script>document|<img|<svg onload", text) and text.count("<script>") == 1 and "{{7*7}}" in text and "&lt;script&gt;document.title" in text
    assert plainly(out) == out and plainly(text) == text
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom"]
    opened = subprocess.run([chromium, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    titles = re.findall(r"<title>(.*?)</title>", opened.stdout, re.S)
    assert len(titles) == 1 and titles[0].startswith("hostile (smoke): ") and "aria-sort" in opened.stdout, "the page's own script ran, and no other"
    assert "<img" not in opened.stdout and "onload" not in re.sub(r">[^<]*<|\"[^\"]*\"", "", opened.stdout)


def test_tables_for_spreadsheets_and_papers(hostile):
    import csv

    folder = hostile[0] / "outputs/reports/hostile-smoke"
    assert sorted(folder.glob("*.csv"))
    for path in folder.glob("*.csv"):
        with open(path, newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [c for c in cells if c.lstrip()[:1] in "=+-@" and c.strip() and not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", c)] and all(plainly(c) == c for c in cells)
    for path in folder.glob("*.tex"):
        text = path.read_text()
        assert r"\input{" not in text and r"\frac{" not in text and not re.search(r"(?<!\\)%", text) and "\x1b" not in text and "\x00" not in text


def without_code(text):
    """Markdown without what is shown as code."""
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def test_cards_examples_and_records_on_a_terminal(hostile):
    folder, common, _ = hostile
    digest = next((folder / "outputs").glob("*/*/record.json")).parent.name.rpartition("-")[2]
    for asked in (["hostile_pair"], ["hostile_pair", "de"], ["hostile_tags", "de"], ["hostile_qa", "de"], ["hostile-encoder"], [digest, "--outputs", folder / "outputs"]):
        code, out, err = xtransfer("show", *asked, *common)
        assert code == 0 and plainly(out) == out and not err.strip(), (asked, err)
        assert "de" in asked or len(asked) > 1 or "<script>" not in without_code(out)
    for command in (["ls", "tasks"], ["ls", "backbones"], ["ls", "studies"]):
        code, out, err = xtransfer(*command, *common)
        assert code == 0 and plainly(out) == out, err
    for command in ("plan", "status", "report"):
        code, out, err = xtransfer(command, "hostile", "--profile", "smoke", *common, "--outputs", folder / "outputs")
        assert code == 0 and plainly(out) == out, err


def test_model_cards_and_notebooks(hostile):
    import yaml

    folder = hostile[0] / "outputs"
    cards = sorted(folder.glob("*/*/checkpoint/README.md"))
    assert cards
    for card in cards:
        text = card.read_text()
        _, head, body = text.split("---\n", 2)
        assert yaml.safe_load(head)["license"] == "other" and not re.search("<script|<img|<svg", without_code(body)) and plainly(text) == text
    for notebook in folder.glob("*/*/notebook.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if "injected-parameters" in cell["metadata"].get("tags", ()):
                assert all(isinstance(node, (ast.Assign, ast.Expr)) for node in ast.parse("".join(cell["source"])).body)
            for output in cell.get("outputs", ()):
                shown = "".join(output.get("data", {}).get("text/html", ()))
                assert "<script>document.title" not in shown and "<img src=x" not in shown


def test_a_new_study_of_hostile_tasks(hostile, tmp_path):
    folder, common, _ = hostile
    code, out, err = xtransfer("new-study", "mine", "--task", "hostile_pair", "--target", "hostile_other", "--backbone", "hostile-encoder", "--folder", tmp_path, "--declare", folder / "own.py")
    assert code == 0, err
    ast.parse((tmp_path / "mine.py").read_text())
    assert "document.title" not in (tmp_path / "mine.py").read_text() + (tmp_path / "mine.ipynb").read_text()
    code, out, err = xtransfer("plan", "mine", "--declare", tmp_path / "mine.py", "--data", folder / "data", "--outputs", tmp_path / "runs")
    assert code == 0, err


def test_half_a_character_is_said(tmp_path, monkeypatch, toys):
    from dataclasses import replace

    from xtransfer.tasks import TASKS, load_examples

    task = TASKS["toy_pair"]
    broken = replace(task, name="half", load=lambda language, split: [{**row, "first": "a\ud800"} for row in task.load(language, split)])
    with pytest.raises(XtransferError, match=r"row 0 of task half.*holds half a character in 'text', 'a\\ud800'"):
        load_examples(broken, "de", "test")


ODD = {  # format -> a right row, and values that some column may not have
    "sequence_classification": ({"text": "x", "label": "a"}, [{"text": 5}, {"text": b"x"}, {"text": ["x"]}, {"text": {"a": 1}}, {"text": True}, {"label": ["a"]}, {"label": {}}, {"label": 0}, {"label": "x" * 1_000_000}, {"label": "a\n"}]),
    "token_classification": ({"tokens": ["a"], "tags": ["O"]}, [{"tokens": [1]}, {"tokens": [None]}, {"tokens": [["a"]]}, {"tokens": "a"}, {"tokens": None}, {"tags": [None]}, {"tags": [["O"]]}, {"tags": {"O": 1}}, {"tokens": ["\udc80"]}]),
    "span_extraction": ({"id": "1", "question": "q", "context": "a bc", "answers": {"text": ["bc"], "answer_start": [2]}},
                        [*({"answers": {"text": ["bc"], "answer_start": [start]}} for start in ("2", None, 2.0, float("nan"), True)), {"answers": {"text": [5], "answer_start": [0]}}, {"answers": {"text": "bc", "answer_start": [2, 3]}}, {"answers": None}, {"answers": "bc"},
                         {"context": None}, {"context": 5}, {"context": ["a"]}, {"question": 5}]),
    "multiple_choice": ({"id": 1, "question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"},
                        [{"choices": None}, {"choices": "ab"}, *({"choices": {"label": ["A", "B"], "text": texts}} for texts in ("xy", [None, None], [1, 2], ["x"])), {"answerKey": True}, {"answerKey": ["A"]}, {"question": None}, {"question": 3}]),
    "masked_lm": ({"text": "x"}, [{"text": None}, {"text": 5}, {"text": ["x"]}, {"text_pair": 5}]),
}


@pytest.mark.parametrize("format", ODD)
def test_values_of_another_kind_are_said_when_they_are_read(format):
    """Not in the middle of a study, in the words of a tokenizer."""
    from xtransfer.sources import Source
    from xtransfer.tasks import FoundLabels, Task, choices_nested, load_examples, plain_text, squad_columns, tagging, text_pair

    read = {"sequence_classification": text_pair("text"), "token_classification": tagging(), "span_extraction": squad_columns, "multiple_choice": choices_nested, "masked_lm": plain_text()}[format]
    names = ("O",) if format == "token_classification" else ("a", "b")
    right, changes = ODD[format]
    for labels in (names, FoundLabels(lambda: names)):
        def load(*rows):
            return load_examples(Task(name="mine", format=format, kind="k", source=Source(repo="generated"), languages=("de",), load=lambda language, split: [right, *rows], read=read, labels=labels, metrics=("squad",), trains_on="mine"), "de", "test")
        assert len(load().rows) == 1
        for row in (*({**right, **change} for change in changes), None, "row", ["x"], 5, {5: 1}, {f"c\n{i}": 1 for i in range(3000)}):
            with pytest.raises(XtransferError) as said:
                load(row)
            assert "row 1 of task mine, language de, split test" in str(said.value) and "\n" not in str(said.value) and len(str(said.value)) < 2500, row


def test_half_a_character_is_said_before_anything_runs(toys):
    from dataclasses import replace

    from xtransfer.core import digest
    from xtransfer.studies import STUDIES

    study = STUDIES["toys"].build("smoke")
    half = "nli\ud83d"
    cells = tuple(replace(cell, arm=half) if cell.arm == study.cells[-1].arm else cell for cell in study.cells)
    for change in ({"cells": cells}, {"question": half}, {"note": half}, {"factors": {"none": {"family": half}}}, {"factors": {"none": {half: 1}}}, {"factors": {half: {}}}, {"baselines": (half,)}):
        with pytest.raises(XtransferError, match=r"study toys holds half a character in 'nli\\ud83d'"):
            replace(study, **change)
    replace(study, question="\U0001f600 \u202e <script>", note="\x1b[31m")
    for value in ("\ud800", {"\udfff": 1}, ["fine", "\ud800"]):
        with pytest.raises(XtransferError, match="half a character stands in"):
            digest(value)


def test_files_of_ones_own_that_cannot_be_read(tmp_path, monkeypatch):
    from xtransfer.sources import Source, asked_commit, folder_digest, json_lines, pins, text_lines

    path = tmp_path / "rows.jsonl"
    for content in (b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"id": ' + b"9" * 5000 + b"}"):
        path.write_bytes(b"{}\n" + content)
        with pytest.raises(XtransferError, match="line 2 of .*rows.jsonl is not JSON"):
            json_lines(path)
    for missing in (tmp_path, tmp_path / "none.jsonl"):
        for read in (json_lines, text_lines):
            with pytest.raises(XtransferError, match="cannot be read: "):
                read(missing)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "plain.txt").write_text("a")
    before = folder_digest(tmp_path / "copy")
    assert before == "cbcb41b7103c"
    with open(os.fsencode(tmp_path / "copy") + b"/caf\xff.jsonl", "w") as file:
        file.write("{}")
    assert folder_digest(tmp_path / "copy") not in (before, "")
    monkeypatch.setenv("XTRANSFER_DATA", str(tmp_path))
    for number, commit in enumerate(("main", "../../../x", "", "A" * 40, "a" * 39)):
        (tmp_path / "pins.json").write_text(json.dumps({"google/xquad": commit}))
        os.utime(tmp_path / "pins.json", (number, number))
        with pytest.raises(XtransferError, match="pins.json is damaged"):
            asked_commit(Source(repo="google/xquad"))
    (tmp_path / "pins.json").write_text(json.dumps({"google/xquad": "a" * 40}))
    assert pins() == {"google/xquad": "a" * 40}


def test_messages_are_one_line_with_an_end(tmp_path, monkeypatch, capsys):
    from xtransfer.cli import main
    from xtransfer.core import nearest

    def refuse(arguments):
        raise XtransferError("what was\nread: " + "x" * 3_000_000 + "; then\u2028it ended.")
    monkeypatch.setitem(main.__globals__["HANDLERS"], "plan", refuse)
    assert main(["plan", "stilts"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and len(said) <= 2001 and r"what was\nread" in said and said.endswith("it ended.\n")
    assert nearest("a" * 3_000_000, [5, None, "a"]) == "" and nearest("12345", [12346]) == "; did you mean '12346'?"


def test_formulas_and_letters_without_a_shape(recwarn):
    import matplotlib.pyplot as plt

    from xtransfer.page import drawing
    from xtransfer.sections import csv_cell

    for formula in ("=1", "＝1+1", "＋1", "－1", "＠x", "\u200b=1", "\ufeff=1", "\u2060\u200d @x", "\t=1", "\u00ad+x"):
        assert csv_cell(formula).startswith("'"), ascii(formula)
    assert [csv_cell(text) for text in ("nli", "-1.5", "x=1", "é", "−1", "")] == ["nli", "-1.5", "x=1", "é", "−1", ""]
    figure, axes = plt.subplots()
    axes.set_title("\u0f40\u1780 \U0001f600")
    assert drawing(figure, "a figure", "f").startswith("<svg")
    plt.close(figure)
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@pytest.mark.parametrize("value", ("{[]: 1}", "(" * 5000, "-" * 100_000 + "1", "\x1b[31m", "__import__('os').system('touch ran')", "open('ran', 'w')", "9" * 5000, "\0", "\ud800", "[" * 300 + "]" * 300), ids=lambda v: ascii(v)[:20])
def test_a_setting_is_a_value(value, tmp_path, monkeypatch, capsys, toys):
    from xtransfer.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["plan", "toys", "--profile", "smoke", "--set", f"batch_size={value}"]) == 1
    said = capsys.readouterr().err
    assert plainly(said) == said and len(said.splitlines()) == 1 and len(said) < 400 and not list(tmp_path.iterdir())
