"""Reports from records on disk: words agree with numbers, nothing leaves the page, nothing escapes into markup."""
import base64
import html
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from xtransfer.analysis import AVERAGES, headline, paired_gains, simulate_scores
from xtransfer.backbones import BACKBONES
from xtransfer.core import XtransferError, write_json
from xtransfer.languages import LANGUAGES, Language
from xtransfer.findings import answer, arm_tasks, find, points_words, summary, trained_languages
from xtransfer.plots import interval_words, plot_gains, signed
from xtransfer.records import NOTEBOOK_NAME, RECORD_NAME, Record, Score, load_records
from xtransfer.report import _score_notices, study_report
from xtransfer.sections import ANSWERS, Answer, Section, Table
from xtransfer.studies import Contrast, Recipe, Stage, Study, intermediate_cells
from xtransfer.tasks import TASKS, Source, Task, text_pair

SCRIPT = "<script>alert(1)</script>"
RECIPE = Recipe(name="toy", learning_rate=1e-3, batch_size=8)
CODES = ("en", "qta", "qtb", "qtc", "qtd", "qte")


def add_task(name, kind="nli", format="sequence_classification", trains_on=True, headline=("accuracy",), **more):
    task = Task(name=name, format=format, kind=kind, source=Source(repo="generated"), languages=CODES, load=lambda language, split: [], read=text_pair("text"), metrics=("accuracy",), headline=headline,
                               labels=("no", "yes") if format == "sequence_classification" else (), trains_on=name if trains_on else None, **more)
    TASKS._entries[name] = task  # past the check of names, which lets none of these through: what is shown is escaped all the same
    return task


@pytest.fixture(scope="module")
def toys():
    """Tasks and languages that exist during these tests."""
    monkeypatch = pytest.MonkeyPatch()
    for registry in (TASKS, LANGUAGES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for i, code in enumerate(CODES[1:]):
        LANGUAGES.register(Language(code=code, name=f"Toy {SCRIPT if i == 0 else i}", iso3=code, family="toy", script="Zsye", distances={"typological": (i + 1) / 10}))
    for name, kind in (("toy_nli", "nli"), ("toy_qa", "qa"), ("toy_text", "text"), (f"toy_{SCRIPT}", "ner"), ("toy_target", "qa")):
        add_task(name, kind)
    add_task("toy_retrieval", "retrieval", "retrieval", trains_on=False)
    yield
    monkeypatch.undo()


def build_study(seeds=(0, 1, 2), targets=("toy_target", f"toy_{SCRIPT}"), untrained=("toy_retrieval",)):
    stage = {arm: Stage(train=tasks, recipe=RECIPE, seed=0) for arm, tasks in {"nli": ("toy_nli",), "qa": ("toy_qa",), "mlm": ("toy_text",), "all+mlm": ("toy_nli", "toy_qa", "toy_text")}.items()}
    arms = {"none": ()} | {arm: (one,) for arm, one in stage.items()}
    cells = intermediate_cells(next(iter(BACKBONES)), arms, {target: RECIPE for target in targets}, untrained, seeds, Stage(train=("toy_text",), recipe=RECIPE, seed=0), RECIPE)
    contrasts = tuple(Contrast(treatment=arm, baseline="none") for arm in stage) + (Contrast(treatment="all+mlm", baseline="mlm"),)
    return Study(name="toy", profile="smoke", question=f"Does {SCRIPT} help?", cells=cells, contrasts=contrasts, distance="typological", note=f"A toy with {SCRIPT}.")


def write_records(study, outputs, truth, skip=(), capped=(), notes="", whitened=False):
    """Records and notebooks of a study's plan with simulated scores."""
    seeds, targets = sorted({cell.seed for cell in study.cells}), {cell.target for cell in study.cells}
    gains = {arm: {target: truth.get((arm, target), 0.0) for target in targets} for arm in {cell.arm for cell in study.cells}}
    retrieval = [target for target in targets if TASKS[target].trains_on is None]
    table = simulate_scores(gains, languages=CODES, seeds=seeds, retrieval=retrieval, seed_sd=0.3, language_sd=0.3, noise_sd=0.2)
    places = {}
    for cell in study.cells:
        places.setdefault(cell.run.id, []).append(cell)
    for run in study.plan():
        if run.id in skip:
            continue
        more = [row | {"metric": row["metric"].replace("centred", "whitened"), "value": min(row["value"] + 1, 100.0)} for row in table.to_dict("records") if row["metric"].endswith("_centred")] if whitened else []
        scores = [Score(task=row["task"], language=row["language"], split="test", metric=row["metric"], value=row["value"], n=row["n"], selection=row["selection"]) for cell in places.get(run.id, [])
                  for row in (*table.to_dict("records"), *more) if (row["arm"], row["target"], row["seed"]) == (cell.arm, cell.target, cell.seed)]
        data = [{"task": task, "language": "en", "split": "train", "rows": 100, "available": 900, "expected": None, "capped": task in capped, "repaired": 0, "dropped": 0, "note": notes, "fingerprint": "f"} for task in run.stage.train]
        record = Record(run=run.id, digest=run.digest, parent=run.parent.id if run.parent else None, template=run.template, backbone={"name": run.backbone}, stages=[], parameters={}, data=data,
                        environment={"python": "3.11", "packages": {"torch": "2.13.0"}, "cpus": 2}, training={}, seconds={"total": 2.0}, tokens_per_second=None, peak_memory_mb=1.0, scores=scores,
                        started="2026-01-01T00:00:00+00:00", ended="2026-01-01T00:01:00+00:00")
        write_json(Path(outputs) / run.id / RECORD_NAME, record)
        (Path(outputs) / run.id / NOTEBOOK_NAME).write_text("{}")


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.ids, self.words, self.attributes, self.aside = [], [], [], [], [], 0
        self.feed(text)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        self.aside += tag in ("svg", "style", "script")
        for name, value in attributes:
            if name in ("href", "xlink:href", "src", "srcset", "action", "data", "poster"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
            assert not name.startswith("on"), f"an event handler: {name}"

    def handle_endtag(self, tag):
        self.aside -= tag in ("svg", "style", "script")

    def handle_data(self, data):
        if not self.aside:
            self.words.append(data)


TRUTH = {("qa", "toy_target"): 6.0, ("nli", "toy_target"): -5.0, ("nli", f"toy_{SCRIPT}"): -5.0, ("nli", "toy_retrieval"): 10.0, ("all+mlm", "toy_target"): 3.0, ("all+mlm", f"toy_{SCRIPT}"): 3.0}


@pytest.fixture(scope="module")
def written(toys, tmp_path_factory):
    study, outputs = build_study(), tmp_path_factory.mktemp("outputs")
    write_records(study, outputs, TRUTH)
    path, table = study_report(study, outputs)
    return study, path, table, outputs


def test_page_is_self_contained_and_names_do_not_become_markup(written):
    study, path, _, _ = written
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1 and "toy" not in text[text.index("<script>"):], "the one script is the page's own and knows no data"
    assert not {"link", "iframe", "img", "object", "form"} & set(page.tags)
    assert html.escape(SCRIPT) in text and SCRIPT not in text
    assert page.text.count(SCRIPT) >= 4  # question, note, task and language are shown as they are
    assert all(reference.startswith(("data:image/png;base64,", "data:text/csv;", "data:application/x-tex;", "#", "../")) for reference in page.references)
    assert not re.search(r"@import|url\((?!#)", text) and "https://" not in text and "http://" not in text


def test_page_is_read_without_eyes(written):
    page = Page(written[1].read_text(encoding="utf-8"))
    tags = page.attributes
    assert ("html", {"lang": "en"}) in tags and {"header", "main", "nav", "footer"} <= set(page.tags)
    heads = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert heads[0] == 1 and heads.count(1) == 1 and all(b - a <= 1 for a, b in zip(heads, heads[1:]))
    assert len(page.ids) == len(set(page.ids)), "figures share no identifiers"
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tags if tag == "th")
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) >= 4 and all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in drawings)
    assert page.tags.count("caption") == page.tags.count("table") >= 10
    assert all(attributes["aria-labelledby"] in page.ids for _, attributes in tags if "aria-labelledby" in attributes)
    contents = [reference for reference in page.references if reference.startswith("#")]
    assert len(contents) >= 10 and contents[0] == "#answer"


def test_tables_are_files_and_links(written):
    study, path, _, _ = written
    page, folder = Page(path.read_text(encoding="utf-8")), path.parent / path.stem
    links = {a["download"]: a["href"] for tag, a in page.attributes if tag == "a" and "download" in a}
    assert len(links) == 2 * page.tags.count("table") == len(list(folder.iterdir()))
    for name, address in links.items():
        content = base64.b64decode(address.split("base64,")[1]).decode()
        assert content == (folder / name.removeprefix(f"{path.stem}-")).read_text(encoding="utf-8")
    gains = pd.read_csv(folder / "gains.csv")
    found = find(study, load_records(study, folder.parents[1]))
    assert sorted(gains["gain"].round(3)) == sorted(found.of_gains(found.gains)["gain"].round(3)) and (gains["low"] < gains["gain"]).all()
    assert r"toy\_\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}" in (folder / "gains.tex").read_text()


def test_links_are_relative_and_exist(written):
    study, path, _, _ = written
    page = Page(path.read_text(encoding="utf-8"))
    links = [reference for reference in page.references if reference.startswith("../")]
    assert len(links) == len(study.plan()) and all((path.parent / unquote(link)).is_file() for link in links)
    assert all(reference[1:] in page.ids for reference in page.references if reference.startswith("#"))


def test_words_agree_with_numbers(written):
    study, path, _, outputs = written
    findings = find(study, load_records(study, outputs))
    assert findings.primary == "average_without_retrieval" and findings.baselines == ("none",)
    parts, averages = answer(findings), findings.of_gains(findings.gains[findings.gains["target"] == findings.primary])
    for _, row in averages.iterrows():
        line = next(line for line in parts[0][1] if f"{row['treatment']} {interval_words(row)}" in line)
        assert (row["low"] > 0) == ("help" in line) and (row["high"] < 0) == ("hurt" in line)
    assert averages.set_index("treatment")["verdict"].to_dict() == {"nli": "hurts", "qa": "helps", "mlm": "not resolved", "all+mlm": "helps"}
    best = averages.loc[averages["gain"].idxmax()]
    assert f"largest gain of four arms is that of {best['treatment']}, {points_words(best)}; two of them help and one hurts" in summary(findings)
    cells = findings.of_gains(findings.gains[~findings.gains["target"].str.startswith("average")])
    text = " ".join(parts[1][1])
    assert f"Of the {len(cells)} combinations" in text
    assert f"nli on toy_retrieval, {signed(cells.set_index(['treatment', 'target']).loc[('nli', 'toy_retrieval'), 'gain'])}" in text  # the largest across kinds
    words = Page(path.read_text(encoding="utf-8")).text
    assert summary(findings) in words and words.index(summary(findings)) < words.index("On this page")
    for heading, lines in parts:
        assert heading in words and all(line in words for line in lines)
    control = findings.gains[(findings.gains["baseline"] == "mlm") & (findings.gains["target"] == "average_without_retrieval")].iloc[0]
    assert parts[-1][1][0] == f"all+mlm over mlm: {interval_words(control)}; it is better than mlm."


def test_every_gain_is_on_the_page(written):
    study, path, _, outputs = written
    words = Page(path.read_text(encoding="utf-8")).text
    for _, row in find(study, load_records(study, outputs)).gains.iterrows():
        assert f"{signed(row['gain'])} ({signed(row['low'])} to {signed(row['high'])})" in words


def test_same_kind_is_marked(written):
    study, _, _, outputs = written
    assert arm_tasks(study)["all+mlm"] == ("toy_nli", "toy_qa", "toy_text") and arm_tasks(study)["none"] == ()
    assert find(study, load_records(study, outputs)).same_kind == {("qa", "toy_target"), ("all+mlm", "toy_target")}


def test_retrieval_is_shown_raw_and_centred(written):
    study, path, _, outputs = written
    findings = find(study, load_records(study, outputs))
    assert set(findings.centred["target"]) == {"toy_retrieval", "average"} and (findings.centred_scores["zero_shot"] > 14).all()
    assert findings.whitened is None and "Retrieval, raw and centred" in path.read_text(encoding="utf-8")


def test_whitened_retrieval_is_shown_where_records_have_it(toys, tmp_path):
    study = build_study(seeds=(0, 1), targets=())
    write_records(study, tmp_path, TRUTH, whitened=True)
    path, _ = study_report(study, tmp_path)
    findings, table = find(study, load_records(study, tmp_path)), pd.read_csv(path.parent / path.stem / "retrieval.csv")
    assert len(findings.whitened) == len(findings.gains) and "Retrieval, raw, centred and whitened" in Page(path.read_text()).text
    assert ((table["whitened score"] - table["centred score"]).between(0.99, 1.01)).all() and table["whitened gain"].notna().sum() == len(study.contrasts)


def test_terminal_table_is_short_and_aligned(written):
    study, _, table, _ = written
    lines = table.splitlines()
    assert len(lines) == 1 + len(study.contrasts) and "without retrieval" in lines[0] and any(line.startswith("qa ") and "helps" in line for line in lines)


def test_the_same_records_give_the_same_page(written):
    study, path, _, outputs = written
    before = path.read_bytes()
    study_report(study, outputs)
    assert path.read_bytes() == before


def test_an_incomplete_study_says_so(toys, tmp_path):
    study = build_study()
    missing = [cell.run.id for cell in study.cells if cell.arm == "qa" and cell.target == "toy_target"]
    write_records(study, tmp_path, TRUTH, skip=missing, capped=("toy_nli",))
    failed = next(cell.run for cell in study.cells if cell.run.id == missing[0])
    error = (tmp_path / failed.id).with_name(f".work-{Path(failed.id).name}") / "error.txt"
    error.parent.mkdir(parents=True)
    error.write_text(f"run failed with {SCRIPT}\n")
    path, _ = study_report(study, tmp_path)
    words = Page(path.read_text(encoding="utf-8")).text
    assert "This study is not complete" in words and f"3 of {len(study.plan())} runs have no record" in words
    assert "Capped: toy_nli train (100 of 900)" in words and f"run failed with {SCRIPT}" in words
    assert words.count(" failed ") >= 1 and words.count(" missing ") >= 2
    gains = find(study, load_records(study, tmp_path)).gains.set_index(["treatment", "target"])
    assert gains.loc[("qa", "toy_target"), "verdict"] == "missing" and gains.loc[("qa", "average"), "n_missing"] == 15


@pytest.fixture
def narrow(toys, monkeypatch):
    """The toy study on a backbone with 64 positions, which can do neither the target toy_span nor the arms that train on toy_qa."""
    for registry in (TASKS, BACKBONES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    TASKS.register(replace(TASKS["toy_qa"], format="span_extraction", labels=()))
    add_task("toy_span", "qa", "span_extraction")
    BACKBONES.register(replace(BACKBONES["world-xlmr"], name="toy-narrow", max_length=64, contamination="it has read <toy_target>"))
    return build_study(targets=("toy_target", "toy_span")).with_backbone("toy-narrow")


def test_what_the_backbone_cannot_do_is_not_applicable_in_every_table(narrow, tmp_path):
    cannot = {("qa", t) for t in ("toy_target", "toy_retrieval")} | {("all+mlm", t) for t in ("toy_target", "toy_retrieval")} | {(arm, "toy_span") for arm in ("none", "nli", "qa", "mlm", "all+mlm")}
    assert {(i.cell.arm, i.cell.target) for i in narrow.inapplicable} == cannot
    lacking = next(cell.run.id for cell in narrow.cells if (cell.arm, cell.target, cell.seed) == ("mlm", "toy_target", 1))
    write_records(narrow, tmp_path, TRUTH, skip=[lacking])
    path, table = study_report(narrow, tmp_path)
    assert path.name == "toy-smoke-toy-narrow.html" and set(load_records(narrow, tmp_path)["backbone"]) == {"toy-narrow"}
    found = find(narrow, load_records(narrow, tmp_path))
    assert found.lost == ("toy_span",) and found.columns == ("toy_target", "toy_span", "toy_retrieval") and "toy_span" not in found.targets
    gains = found.gains.set_index(["treatment", "baseline", "target"])
    for (treatment, baseline, target), row in gains.iterrows():
        gone = treatment in ("qa", "all+mlm") or target == "toy_span"
        assert (row["verdict"] == "not applicable") == gone and (row["gain"] == row["gain"]) == (not gone)
        assert row["n_missing"] == (5 if treatment == "mlm" and target != "toy_retrieval" and not gone else 0), "what is missing is counted, what is not applicable is not missing"
    averages = found.gains[(found.gains["treatment"] == "nli") & found.gains["target"].str.startswith("average")].set_index("target")
    assert averages["n_targets"].to_dict() == {"average": 2, "average_without_retrieval": 1} and (averages["n_inapplicable"] == 1).all()
    text = path.read_text(encoding="utf-8")
    words = Page(text).text
    for reason in ("toy_span reads sequences of 128 tokens, and toy-narrow has 64 positions", "toy_qa reads sequences of 128 tokens, and toy-narrow has 64 positions"):
        assert words.count(reason) == 2, "in the notice and below the first figure"
    assert "arms qa, all+mlm" in words and "target toy_span" in words and "the study was declared with world-xlmr" in words and "it has read <toy_target>" in words
    assert "(toy_span is not applicable)" in words and "qa and all+mlm are not applicable." in words
    assert not re.search(r"<td[^>]*>\s*</td>\s*<td[^>]*>\s*</td>\s*<td[^>]*>\s*</td>\s*<td[^>]*>\s*</td>", text.split('<h2 id="what-was-run">')[0]), "no row of blanks"
    assert table.count("not applicable") == 2 * 3 + 1 and "‡" in table and table.splitlines()[-1].startswith("‡ without targets")


def test_a_study_whose_comparisons_are_all_not_applicable_shows_its_scores(narrow, tmp_path):
    cells = tuple(cell for cell in narrow.declared if cell.arm in ("none", "qa"))
    study = replace(narrow, cells=cells, inapplicable=(), contrasts=(Contrast(treatment="qa", baseline="none"),))
    write_records(study, tmp_path, TRUTH)
    path, table = study_report(study, tmp_path)
    findings = find(study, load_records(study, tmp_path))
    assert (findings.gains["verdict"] == "not applicable").all() and table.count("not applicable") == 2 and "‡" not in table
    assert f"{findings.absolute.set_index('target').loc['toy_target', 'zero_shot']:.1f}" in path.read_text(encoding="utf-8")


def test_one_seed_gives_no_verdict(toys, tmp_path):
    study = build_study(seeds=(0,))
    write_records(study, tmp_path, TRUTH)
    path, table = study_report(study, tmp_path)
    words = Page(path.read_text(encoding="utf-8")).text
    assert "One seed" in words and " helps" not in table and "too few seeds" in table
    found = find(study, load_records(study, tmp_path))
    assert not any(re.search(r"\) (helps?|hurts?)\b", line) for _, lines in answer(found) for line in lines) and "with one seed there is no verdict" in summary(found)
    assert "nothing is marked" in words and "Bold and *" not in words and 'class="n resolved' not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("languages", [("en", "qta"), ("qta",), CODES])
def test_a_language_in_which_a_target_was_trained_is_not_zero_shot(languages, toys, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS._entries, "toy_target", replace(TASKS["toy_target"], train_languages=languages))
    study = build_study(targets=("toy_target", "toy_qa"), untrained=())
    write_records(study, tmp_path, TRUTH)
    found, whole = find(study, load_records(study, tmp_path)), headline(load_records(study, tmp_path), split=None)
    own = {"qta"} if languages != CODES else set()  # where no other language would be left, all stay
    assert trained_languages(study) == {"toy_target": frozenset(languages) - {"en"}}
    assert {target: set(group["language"]) for target, group in found.values.groupby("target")} == {"toy_target": set(CODES) - own, "toy_qa": set(CODES)}
    pairs = paired_gains(whole, study.contrasts)
    for row in found.gains[~found.gains["target"].isin(AVERAGES)].itertuples():
        left_out = {"en"} | (own if row.target == "toy_target" else set())
        there = pairs[(pairs["treatment"] == row.treatment) & (pairs["baseline"] == row.baseline) & (pairs["target"] == row.target) & ~pairs["language"].isin(left_out)]
        assert row.gain == pytest.approx(there["gain"].mean()) and row.n_languages == len(CODES) - len(left_out) and not row.n_missing
    ((title, words),) = _score_notices(study, found)
    assert title == "Languages that are not zero-shot" and words.startswith(f"toy_target is trained in {'qta.' if own else 'qta, qtb'}") and ("in no table" in words) == bool(own) and ("is not zero-shot" in words) == (not own)


def test_a_study_that_trains_in_english_says_nothing_of_it(written):
    assert trained_languages(written[0]) == {} and "not zero-shot" not in Page(written[1].read_text(encoding="utf-8")).text and "nothing is marked" not in written[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("untrained", [(), ("toy_retrieval",)])
def test_studies_with_and_without_retrieval(toys, tmp_path, untrained):
    study = build_study(targets=("toy_target",) if not untrained else (), untrained=untrained)
    write_records(study, tmp_path, {("qa", "toy_target"): 4.0})
    path, table = study_report(study, tmp_path)
    findings = find(study, load_records(study, tmp_path))
    assert path.is_file() and len(table.splitlines()) == 6 and (findings.centred is not None) == bool(untrained)
    assert not any("included" in heading for heading, _ in answer(findings))


def test_nothing_to_report(toys, tmp_path):
    with pytest.raises(XtransferError, match="no record of study toy"):
        study_report(build_study(), tmp_path)
    assert not list(tmp_path.glob("reports/*"))


def test_a_study_without_an_answer_yet_has_a_page(toys, tmp_path):
    study = build_study(seeds=(0, 1))
    others = [run.id for run in study.plan() if run.id not in {cell.run.id for cell in study.cells if cell.arm == "none"}]
    failed = next(cell.run for cell in study.cells if cell.arm == "qa")
    error = (tmp_path / failed.id).with_name(f".work-{Path(failed.id).name}") / "error.txt"
    error.parent.mkdir(parents=True)
    error.write_text("out of memory\n")
    path, said = study_report(study, tmp_path)
    assert "No answer yet" in said and "out of memory" in Page(path.read_text()).text
    write_records(study, tmp_path, TRUTH, skip=others)
    path, _ = study_report(study, tmp_path)
    words = Page(path.read_text()).text
    assert "No answer yet: none of the four comparisons has scores on both sides." in words and f"{len(others)} of {len(study.plan())} runs have no record" in words
    assert f"{find(study, load_records(study, tmp_path)).absolute['zero_shot'].iloc[0]:.1f}" in words


@pytest.fixture
def two(toys):
    """Two backbones with an arm each, and a longer training of the target that says nothing on retrieval."""
    study, cells, stage = build_study(seeds=(0, 1)), (), Stage(train=("toy_qa",), recipe=RECIPE, seed=0)
    for backbone in ("world-xlmr", "world-mt5"):
        for arm, stages, untrained, recipe in ((backbone, (), ("toy_retrieval",), RECIPE), (f"{backbone} + qa", (stage,), ("toy_retrieval",), RECIPE), (f"{backbone} + longer", (), (), replace(RECIPE, epochs=2))):
            cells += intermediate_cells(backbone, {arm: stages}, {"toy_target": recipe}, untrained, (0, 1), Stage(train=("toy_text",), recipe=RECIPE, seed=0), RECIPE)
    pairs = [(f"{b} + {arm}", b) for b in ("world-xlmr", "world-mt5") for arm in ("qa", "longer")] + [("world-mt5", "world-xlmr")]
    return replace(study, cells=cells, baselines=("world-xlmr", "world-mt5"), contrasts=tuple(Contrast(treatment=a, baseline=b) for a, b in pairs))


def test_several_backbones_are_grouped_and_holes_of_the_design_are_not_missing(two, tmp_path):
    write_records(two, tmp_path, {("world-mt5 + qa", "toy_target"): 8.0})
    path, table = study_report(two, tmp_path)
    found, words = find(two, load_records(two, tmp_path)), Page(path.read_text()).text
    assert found.undeclared == {("world-xlmr + longer", "toy_retrieval"), ("world-mt5 + longer", "toy_retrieval")} and found.baselines == ("world-xlmr", "world-mt5")
    verdicts = found.gains.set_index(["treatment", "target"])["verdict"]
    assert verdicts["world-mt5 + longer", "toy_retrieval"] == "not declared" and not found.gains["n_missing"].any() and "missing" not in table
    heatmap = plot_gains(found.of_gains(found.gains), found.columns, grouped=True)
    assert [axes.get_title(loc="left") for axes in heatmap.axes[:2]] == ["world-xlmr", "world-mt5"]
    assert all([label.get_text() for label in axes.get_yticklabels()] == ["qa", "longer"] for axes in heatmap.axes[:2])
    assert "the largest gain of four arms is that of world-mt5 + qa" in summary(found) and "Arm against arm" in words and "world-mt5 vs world-xlmr" in words
    assert "world-mt5 + qa vs" not in words and not (pd.read_csv(path.parent / path.stem / "gains.csv")["missing"]).any()


def test_a_study_answers_its_own_question(toys, tmp_path, monkeypatch):
    study = build_study(seeds=(0, 1), targets=("toy_target",), untrained=())
    own = Section(heading="By letter", tables=(Table(name="letters", caption="Letters.", rows=pd.DataFrame({"letter": ["a", SCRIPT], "p": [0.0002, 0.5]}), formats={"p": "p"}),))
    monkeypatch.setitem(ANSWERS, "toy", lambda study, findings, scores, outputs: Answer(sentence=f"It does, by {len(scores)} scores.", sections=(own,)))
    write_records(study, tmp_path, TRUTH)
    path, _ = study_report(study, tmp_path)
    words = Page(path.read_text()).text
    assert f"It does, by {len(load_records(study, tmp_path))} scores." in words and words.index("Letters.") < words.index("Transfer gains, points.") and "< 0.001" in words
    assert (path.parent / path.stem / "letters.tex").read_text().count(r"\textless{}") == 3

    def broken(*_):
        raise KeyError("qa")

    monkeypatch.setitem(ANSWERS, "toy", broken)
    with pytest.raises(KeyError):
        study_report(study, tmp_path)
    (tmp_path / study.cells[0].run.id / RECORD_NAME).unlink()
    assert "The study's own analysis is not possible yet" in Page(study_report(study, tmp_path)[0].read_text()).text


def test_no_torch():
    check = "import sys, xtransfer.report; print([m for m in ('torch', 'transformers', 'datasets', 'evaluate') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_missing_words():
    assert interval_words({"gain": float("nan")}) == "missing" and interval_words({"gain": 1.0, "low": float("nan"), "high": float("nan")}) == "+1.0"


def test_what_a_target_needs_before_it_is_not_the_arms():
    import xtransfer.catalogue  # noqa: F401
    from xtransfer.studies import STUDIES

    arms = arm_tasks(STUDIES["stilts-xtreme-r"].build("paper"))  # XCOPA comes after Social IQa, Tatoeba after SQuAD
    assert arms["none"] == () and arms["hellaswag"] == ("hellaswag",) and len(arms["multi"]) == 9
