"""Cards say what the declarations say and are sound Markdown; examples of every format and script fit a terminal."""

import re
import unicodedata
from dataclasses import replace

import pytest

import xtransfer.catalogue  # noqa: F401  fills the registries
from xtransfer.cards import READING, columns, example_table, row_table, task_card, visible, write_cards
from xtransfer.core import XtransferError
from xtransfer.languages import LANGUAGES
from xtransfer.metrics import METRICS
from xtransfer.tasks import COLUMNS, TASKS, FoundLabels, Source, Task, squad_columns, tagging, text_pair


def plain(markdown):
    """Markdown without its escapes, so that facts can be looked for."""
    return re.sub(r"\\([|\\`*\[\]])", r"\1", markdown).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def check_markdown(text):
    """Fail for a table with rows of unequal length, for HTML, or for a title that is not the only one."""
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("# ")] == lines[:1]
    bare = re.sub(r"(`+)[^`](?:.*?[^`])?\1", lambda m: "\\|" if "\\|" in m[0] else "code", text)
    assert not re.search(r"<[a-zA-Z/!]", bare), "HTML"
    for before, line in zip([""] + lines, lines):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            if before.startswith("|"):
                assert cells == size, line
            size = cells
    for _, target in re.findall(r"(?<!\\)\[([^\]]+)\]\(([^)]*)\)", text):
        assert re.fullmatch(r"https://[\w./-]+|[\w@-]+\.md", target), target


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("toy")])
def test_card_holds_the_facts_of_the_declaration(name):
    task = TASKS[name]
    card = task_card(task)
    check_markdown(card)
    said = plain(card)
    assert said.startswith(f"# {name}\n\n{' '.join(task.description.split())}") and f"`{task.format}`" in card and all(f"`{c}`" in card for c in COLUMNS[task.format])
    for source in task.sources:
        assert (source.repo in said or source.repo == "generated") and source.revision in said and source.license in said and source.note in said and source.obtain in said
        assert "data/" + source.repo in said or source.repo == "generated"
        assert all(part in said for part in re.findall(r"\d{4}\.\d{4,5}", source.citation))
    assert all(f"{LANGUAGES[language].name} ({language})" in said for language in task.languages)
    assert all(re.search(rf"\b{n:,}\b", said) for key, n in task.expected_rows.items() if not key.endswith("train") or task.trains_on == name)
    assert all(f"`{m}`" in card and METRICS[m].source in said and READING.get(m, "") in said for m in task.metrics) and all(f"`{key}`" in card for key in task.headline)
    assert (task.trains_on or "Not trained") in said and " ".join(task.traps.split()) in said
    if not isinstance(task.labels, FoundLabels):
        assert all(f"`{label}`" in said for label in task.labels[:40])


def test_all_cards_and_an_index_that_links_them(tmp_path):
    index = write_cards(tmp_path / "deep").read_text()
    check_markdown(index)
    assert {p.stem for p in (tmp_path / "deep").iterdir()} == {*TASKS, "index"}
    linked = re.findall(r"\]\(([^)]+)\.md\)", index)
    assert linked == list(TASKS)
    for page in (tmp_path / "deep").glob("*.md"):
        assert all((page.parent / target).exists() for target in re.findall(r"\]\(([\w@-]+\.md)\)", page.read_text()))


def toy(rows, format="sequence_classification", read=text_pair("a", "b", "label"), **others):
    return Task(**({"name": "toy_shown", "format": format, "kind": "toy", "source": Source(repo="generated"), "languages": ("en",), "load": lambda language, split: rows, "read": read,
                    "metrics": ("accuracy",), "headline": ("accuracy",), "labels": ("a|b", "<b>", "`x`"), "trains_on": "toy_shown"} | others))


def test_texts_of_others_do_not_become_markup():
    nasty = "a | b <script>alert(1)</script> `code` [link](x) *star* \n# title\n| row |"
    task = toy([], name="toy_nasty", trains_on="toy_nasty", description=nasty, traps=nasty, source=Source(repo="files/x", license=nasty, note=nasty, obtain=nasty, citation=nasty))
    card = task_card(task)
    check_markdown(card)
    assert "&lt;script&gt;" in card and "`` `x` ``" in card and "`a\\|b`" in card and "<b>" not in re.sub(r"`[^`]*`", "", card)


def test_rows_are_said_by_language_and_only_where_they_are_used():
    task = replace(TASKS["panx"], expected_rows={"en/train": 5, "de/train": 6, "dev": 7, "sw/dev": 8})
    lines = row_table(task).splitlines()
    assert lines[2] == "| English (en) | 1 | 5 | 7 | ? |" and [line for line in lines if "Swahili" in line] == ["| Swahili (sw) | 1 | – | 8 | ? |"] and "| 38 | – | 7 | ? |" in lines[3]
    assert "| 11 | – | – | 1,190 |" in row_table(TASKS["xquad"])


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("world_")])
def test_examples_of_every_format(name):
    task = TASKS[name]
    for language in task.languages[:1] + task.languages[-1:]:
        shown = example_table(task, language, n=2, width=80)
        assert max(map(columns, shown.splitlines())) <= 80 and shown.startswith(f"{name}, {LANGUAGES[language].name} ({language}), ") and "\n2. " in shown
        if task.format == "multiple_choice":
            assert len(re.findall(r"^  \* choice", shown, re.M)) == 2
        if task.format == "bitext_mining":
            assert len(re.findall(r"^  right ", shown, re.M)) == 2


def test_the_answer_is_marked_in_every_script():
    rows = []
    for before, answer, after in (("Once. " * 90, "Rome", " was a town." * 50), ("" , "北京", "是首都。" * 60), ("小明住在" * 80, "北京", ""), ("ولد أحمد في ", "القاهرة", " سنة 1950." * 40),
                                  ("เขาอาศัยอยู่ที่" * 30, "กรุงเทพ", "มานาน" * 30), ("x" * 900, "y", "z" * 900)):
        rows.append({"id": "", "question": "?", "context": before + answer + after, "answers": {"text": [answer], "answer_start": [len(before)]}})
    rows.append({"id": "", "question": "?", "context": "nothing", "answers": {"text": [], "answer_start": []}})
    for width in (40, 80, 140):
        shown = example_table(toy(rows, "span_extraction", squad_columns, metrics=("squad_v2",), labels=()), "en", "dev", n=9, width=width)
        joined = re.sub(r"\s+|[\u2068\u2069]", "", shown)
        assert all(f"⟦{answer}⟧" in joined for answer in ("Rome", "北京", "القاهرة", "กรุงเทพ", "y")) and joined.count("⟦") == 6 and "(none)" in shown
        assert max(map(columns, shown.splitlines())) <= width
        for line in shown.splitlines():
            assert ("\u2068" in line) == any(unicodedata.bidirectional(c) in ("R", "AL") for c in line) and line.count("\u2068") == line.count("\u2069")
            assert not line or unicodedata.category(line.strip(" \u2068")[0]) != "Mn", "a line does not begin with a combining mark"


def test_tags_stay_in_their_column_and_controls_are_shown():
    tokens = ["北京", "القاهرة", "\x1b[31mred", "a\tb", "\u202eevil", "กรุง"] + ["w"] * 60
    shown = example_table(toy([{"tokens": tokens, "tags": ["B-LOC"] * 3 + ["O"] * 63}], "token_classification", tagging(), labels=("O", "B-LOC"), metrics=("chunk_f1",)), "en", "dev")
    lines = [line for line in shown.splitlines() if re.match("  (B-LOC|O    )  ", line)]
    assert len(lines) == 40 and "… 26 more words" in shown and "\x1b" not in shown and "\u202e" not in shown and r"\x1b[31mred" in shown and r"\u202eevil" in shown
    assert visible("a\u00a0\n b\x00") == r"a b\x00"


def test_without_a_split_the_last_one_with_labels_is_shown():
    def load(language, split):
        if split == "dev":
            return [{"a": f"{split} {i}", "b": "", "label": "a|b" if i > 1 else None} for i in range(4)]
        return [{"a": split, "b": "", "label": None}]
    shown = example_table(toy([], load=load), "en")
    assert ", dev: 4 rows" in shown and "dev 2" in shown and "dev 1" not in shown
    with pytest.raises(XtransferError, match="have no label"):
        example_table(toy([], load=load), "en", "test")
    with pytest.raises(XtransferError, match="no language 'de'"):
        example_table(toy([], load=load), "de")
