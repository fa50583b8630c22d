"""The protocol of the benchmarks with clocks that only move when they are told to, the suite's bookkeeping, and every notebook of it at a size of seconds."""

import ast
import importlib.util
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import median

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xtransfer.speed as speed
from xtransfer.core import XtransferError
from xtransfer.speed import SUITE, Line, compare, load_lines, measure, median_interval, peak_memory, run_suite, write_table
from xtransfer.trial_data import LENGTHS, QUANTILES, draw_lengths, find_data, made_tokenizer, rows_of

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs" / "benchmarks").glob("*.ipynb"))
LINE = Line(row=1, what="something", peer="a peer", ours=1.0, theirs=3.0, ratio=3.0, low=2.5, high=3.5, target=2.0, gate="equal", passed=True)


class Clock:
    """Time that passes only where a way says so."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def takes(self, name, log, wall, cpu):
        """A way that takes the next of some seconds at each call."""
        left = iter(zip(wall, cpu, strict=True))

        def way(_=None):
            log.append(name)
            w, c = next(left)
            self.wall, self.cpu = self.wall + w, self.cpu + c
            return f"{name} {len(log)}"
        return way


# ---------------------------------------------------------------- the protocol

def test_ways_take_turns_and_are_compared_within_a_round():
    clock, log = Clock(), []
    ways = {"ours": clock.takes("ours", log, [9, 1, 2, 4], [9, 2, 4, 8]), "peer": clock.takes("peer", log, [7, 3, 4, 20], [7, 3, 8, 40])}
    found = measure(ways, rounds=3, clock=lambda: clock.wall, cpu=lambda: clock.cpu)
    assert log == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]  # warm-up, then A B, B A, A B
    assert found.warmup == {"ours": 9, "peer": 7} and found.wall == {"ours": [1, 2, 4], "peer": [3, 4, 20]} and found.cpu == {"ours": [2, 4, 8], "peer": [3, 8, 40]}
    assert found.ratios("peer") == [1.5, 2.0, 5.0] and found.ratios("peer", by="wall") == [3.0, 2.0, 5.0]
    assert found.answers == {"ours": "ours 7", "peer": "peer 8"} and all(x == [0, 0, 0] for x in found.prepared.values())


def test_preparation_counts_apart_and_in_the_whole():
    clock, log = Clock(), []
    ways = {"ours": (clock.takes("load ours", log, [1, 1], [5, 6]), clock.takes("ours", log, [1, 1], [2, 2])), "peer": (clock.takes("load peer", log, [1, 1], [1, 2]), clock.takes("peer", log, [1, 1], [6, 8]))}
    found = measure(ways, rounds=2, warm_up=False, clock=lambda: clock.wall, cpu=lambda: clock.cpu)
    assert log == ["load ours", "ours", "load peer", "peer", "load peer", "peer", "load ours", "ours"] and found.warmup == {}
    assert found.prepared == {"ours": [5, 6], "peer": [1, 2]} and found.ratios("peer") == [3.0, 4.0] and found.ratios("peer", whole=True) == [1.0, 1.25]
    line = compare(found, "peer", row=1, what="it", peer="a peer", target=3.5, gate="", passed=True)
    assert (line.ours, line.theirs, line.ratio, line.low, line.high, line.whole_ratio, line.ours_prepared, line.rounds, line.met) == (2, 7, 3.5, 3.0, 4.0, 1.125, 5.5, 2, True)


def test_a_median_of_ratios_is_no_ratio_of_medians():
    clock = Clock()
    found = measure({"ours": clock.takes("ours", [], [1, 10, 100], [1, 10, 100]), "peer": clock.takes("peer", [], [100, 20, 10], [100, 20, 10])}, rounds=3, warm_up=False, clock=lambda: clock.wall, cpu=lambda: clock.cpu)
    line = compare(found, "peer", row=0, what="", peer="", gate="", passed=True)
    assert line.ratio == 2.0 and line.theirs / line.ours == 2.0 and found.ratios("peer") == [100, 2, 0.1]


def test_nothing_to_measure_is_refused():
    for ways, rounds in (({}, 5), ({"ours": lambda: 1}, 0)):
        with pytest.raises(XtransferError, match="nothing to measure"):
            measure(ways, rounds)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40))
def test_interval_is_made_of_values_and_holds_the_median(values):
    low, high = median_interval(values)
    assert low in values and high in values and low <= median(values) <= high


def test_interval_of_the_sign_test():
    """P(the median is outside) is known for any distribution: 2 * sum of binomial probabilities."""
    assert median_interval([1, 2, 3, 4, 5]) == (1, 5)  # 93.75 %; inner values would hold it with 62.5 %
    assert median_interval(range(1, 9)) == (2, 7)  # 92.97 %
    rng = np.random.default_rng(0)
    inside = sum(low <= 1 <= high for low, high in (median_interval(rng.lognormal(size=9)) for _ in range(2000)))
    assert 0.9 < inside / 2000 < 0.98


def test_memory_is_that_of_the_way_and_a_failing_child_is_told(capfd):
    import time

    def hold(megabytes):
        return lambda: (bytearray(megabytes * 10**6), time.sleep(0.01))
    small, large = peak_memory(hold(20)), peak_memory(hold(220))
    assert 180 < large - small < 230
    with pytest.raises(XtransferError, match="status"):
        peak_memory(lambda: 1 / 0)


# ---------------------------------------------------------------- the table

def test_a_missed_target_stays_in_the_table_and_a_failed_check_is_a_miss(tmp_path):
    lines = [LINE, replace(LINE, row=2, what="slower", ratio=0.5, low=0.4, high=0.6), replace(LINE, row=3, what="wrong", passed=False), replace(LINE, row=4, what="bounded", target=4.0, at_most=True), replace(LINE, row=0, what="without", target=None)]
    assert [line.met for line in lines] == [True, False, False, True, None]
    speed.finish(lines, tmp_path, absent=[("the rest", "faiss is not installed")])
    (tmp_path / "result.json").rename(tmp_path / "train_nli.json")
    told = write_table(tmp_path).read_text()
    assert [line.what for line in load_lines(tmp_path)] == ["something", "slower", "wrong", "bounded", "without"]
    rows = {row.split("|")[2].strip(): [cell.strip() for cell in row.split("|")] for row in told.splitlines() if row.startswith("| ")}
    assert [rows[line.what][10] for line in lines] == ["yes", "no", "check failed", "yes", ""] and "the rest, since faiss is not installed" in told
    assert (tmp_path / "table.csv").read_text().count("\n") == 6 and (tmp_path / "table.svg").stat().st_size > 1000


# ---------------------------------------------------------------- the suite

@pytest.fixture
def counted(monkeypatch):
    """The suite with an execution that only counts."""
    done = []

    def execute(source, work, parameters, threads):
        done.append((source.stem, parameters))
        if source.stem == "tokens" and parameters["seed"] == 13:
            raise RuntimeError("unlucky")
        (work / "notebook.ipynb").write_text("{}")
        speed.finish([replace(LINE, what=source.stem)], work)
    monkeypatch.setattr(speed, "_execute", execute)
    return done


def test_what_has_a_result_is_not_run_again(counted, tmp_path):
    names, said = ["answers", "search", "tokens"], []
    assert run_suite(tmp_path, names, "short", {"seed": 13}, said.append) == ["tokens"] and [name for name, _ in counted] == ["answers", "search", "tokens"]
    assert any("unlucky" in line for line in said) and len(load_lines(tmp_path)) == 2
    counted.clear()
    assert run_suite(tmp_path, names, "short", {"seed": 13}, said.append) == ["tokens"] and [name for name, _ in counted] == ["tokens"]
    counted.clear()
    assert run_suite(tmp_path, names, "short", {}, said.append) == [] and len(counted) == 3  # other parameters, other results
    assert all(parameters["rounds"] == 1 and parameters["threads"] == 1 for _, parameters in counted)


def test_another_code_is_another_result(counted, tmp_path, monkeypatch):
    run_suite(tmp_path, ["answers"], "short", report=lambda line: None)
    before = speed.sheet_digest("answers", {})
    copy = tmp_path / "package"
    copy.mkdir()
    (copy / "__init__.py").write_text("changed = True\n")
    monkeypatch.setattr(speed, "package_folder", lambda: copy)
    monkeypatch.setattr(speed, "benchmark_folder", lambda: ROOT / "nbs" / "benchmarks")
    assert speed.sheet_digest("answers", {}) != before


def test_the_command_line_refuses_what_it_does_not_know(counted, capsys, tmp_path):
    for arguments, sentence in ((["serch"], "did you mean 'search'|no benchmark 'serch'"), (["search", "--set", "sede=1"], "no.* parameter 'sede'"), (["search", "--set", "width=wide"], "takes a int, such as 768")):
        assert speed.main([*arguments, "--outputs", str(tmp_path)]) == 1 and re.search(sentence, capsys.readouterr().err)
    assert counted == [] and speed.main(["search", "--profile", "short", "--outputs", str(tmp_path), "--set", "width=8"]) == 0 and counted[0][1]["width"] == 8


def test_suite_and_folder_are_the_same():
    assert {sheet.name for sheet in SUITE} == {path.stem for path in NOTEBOOKS} and (NOTEBOOKS[0].parent / ".notest").exists()
    assert sum(sheet.minutes for sheet in SUITE) < 30


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_benchmark_reads_as_a_document(path):
    notebook = nbformat.read(path, 4)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert re.match(r"# \S.*\n> \S.*[.?!]\n", notebook.cells[0].source) and kinds.count("markdown") >= 3 and not any(cell.get("outputs") for cell in notebook.cells)
    (parameters,) = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert all(isinstance(node, ast.AnnAssign) for node in ast.parse(parameters).body)
    assert "finish(lines" in "\n".join(cell.source for cell in notebook.cells) or path.stem == "gates"


# ---------------------------------------------------------------- data

def test_made_texts_have_the_lengths_of_real_ones():
    rng = np.random.default_rng(1)
    for part, wanted in LENGTHS.items():
        drawn = np.percentile(draw_lengths(part, 40000, rng), QUANTILES[1:-1])
        assert np.abs(drawn / wanted[1:-1] - 1).max() < 0.1, part
    rows = rows_of("nli", "en", 500, "synthetic")
    tokenizer = made_tokenizer(["en", "sw"])
    ids = tokenizer([row["text"] for row in rows], [row["text_pair"] for row in rows])["input_ids"]
    assert rows == rows_of("nli", "en", 500, "synthetic") and tokenizer.unk_token_id not in {i for row in ids for i in row}
    assert abs(np.median([len(row) for row in ids]) / 42 - 1) < 0.15  # XLM-R's tokens of a pair of MNLI, median
    with pytest.raises(XtransferError, match="it takes auto, hub, world or synthetic"):
        find_data("real")


def test_real_lengths_are_read_where_the_hub_is(hub, monkeypatch):
    import subprocess
    import sys

    program = "from xtransfer.trial_data import find_data, rows_of; print(find_data('auto'), len(rows_of('nli', 'sw', 30, 'hub', scored=True)), len(rows_of('nli', 'en', 30, 'hub')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=hub)
    assert done.stdout.split() == ["hub", "30", "30"], done.stderr[-2000:]


# ---------------------------------------------------------------- declared

def test_peers_are_declared_and_locked():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    lines = [line for line in (ROOT / "requirements-bench.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert {re.match(r"[\w-]+", line)[0] for line in extra} == {line.split("==")[0] for line in lines}
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {"scikit-learn", "scipy", "packaging", "typing_extensions", "tqdm"} <= locked  # what the two need besides, so that they install without dependencies


def test_package_imports_no_peer():
    for path in (ROOT / "xtransfer").glob("*.py"):
        assert not re.search(r"^\s*(import|from) (faiss|sentence_transformers)", path.read_text(), re.M), path.name


# ---------------------------------------------------------------- every notebook

PEERS = {"faiss": {"faiss flat", "XTREME's code"}, "sentence_transformers": {"sentence-transformers encode"}}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The whole suite at a size of seconds."""
    folder, said = tmp_path_factory.mktemp("benchmarks"), []
    failed = run_suite(folder, profile="short", report=said.append)
    assert not failed, "\n".join(said)
    return folder


@pytest.mark.slow
def test_every_notebook_runs_and_every_check_passes(short):
    lines, checks = load_lines(short), speed._facts(short, "checks")
    assert {line.row for line in lines} == {0, 1, 5, 6, 7, 8, 9, 10, 11, 12}
    assert [line.what for line in lines if not line.passed] == [] and len(checks) >= 10 and all(passed for _, _, passed in checks)
    assert all(line.ratio > 0 and line.low <= line.ratio <= line.high and line.machine for line in lines)
    peers, table = {line.peer for line in lines}, (short / "table.md").read_text()
    for module, wanted in PEERS.items():
        there = importlib.util.find_spec(module) is not None
        assert (wanted <= peers) == there and (f"{module.replace('_', '-')}" in table.partition("Not measured")[2].partition("Machine")[0]) == (not there)
    assert not list(short.glob(".work-*")) and run_suite(short, profile="short", report=lambda line: None) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [sheet.name for sheet in SUITE])
def test_an_executed_notebook_can_be_shown(short, name):
    notebook = nbformat.read(short / f"{name}.ipynb", 4)
    out = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert "output_type\": \"error" not in out and len(out) > 500
    for place in (short, ROOT, Path.home(), "site-packages"):
        assert str(place) not in out + json.dumps(notebook.metadata), place
