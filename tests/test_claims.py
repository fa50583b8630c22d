"""The claims ledger: known truths give known verdicts, numbers are those of the scores, and a mistake costs one sentence."""

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import xtransfer.catalogue  # noqa: F401
from xtransfer.analysis import headline, simulate_scores, transfer_gain
from xtransfer.claims import CLAIMS, CONSISTENT, NOTES, _beyond, claims_table, claims_text, ledger, parts_of_anli_plus, plot_claims, rows_of, three_phases
from xtransfer.cli import main
from xtransfer.core import XtransferError
from xtransfer.evidence import arm_kind, best_on_dev, chosen, even, make_evidence, simulate_evidence, weighted
from xtransfer.findings import arm_tasks
from xtransfer.studies import STUDIES, Contrast
from xtransfer.tasks import TASKS, UNTRAINED_FORMATS

ROOT = Path(__file__).resolve().parents[1]
PAPER, MINI = STUDIES["stilts"].build("paper"), STUDIES["stilts"].build("mini")
TARGETS = tuple(dict.fromkeys(cell.target for cell in PAPER.cells))
RETRIEVAL = tuple(t for t in TARGETS if TASKS[t].format in UNTRAINED_FORMATS)
SINGLES = tuple(tasks[0] for arm, tasks in arm_tasks(PAPER).items() if arm_kind(tasks, arm == "none") == "single")
ENGLISH = (*SINGLES, "multi")
FEWER = replace(PAPER, cells=tuple(c for c in PAPER.cells if c.target in ("xnli", "xquad", "tydiqa", "bucc2018", "tatoeba") and c.arm in (
    "none", "squad1", "squad2", "mnli", "hellaswag", "qqp", "multi", "mnli+mlm", "qqp+mlm", "mnli-translated", "qqp-translated")))  # enough for every claim, and quick


def flat(arms, gain, targets=TARGETS):
    return {arm: {target: gain for target in targets} for arm in arms}


def best(arm):
    return {target: arm for target in TARGETS}


TRUTHS = {  # a world in which the claim holds, and one in which it does not: true gains, and the arm that is best on English development data
    "c1.squad": ((flat(("squad1", "squad2"), 6), {}), (flat(("squad1", "squad2"), -6), {})),
    "c1.mnli": ((flat(("mnli",), 6), {}), (flat(("mnli",), -6), {})),
    "c1.hellaswag": ((flat(("hellaswag",), 6), {}), (flat(("hellaswag",), -6), {})),
    "c1.mean": ((flat(("squad1", "squad2", "mnli", "hellaswag"), 6), {}), (flat(("squad1", "squad2", "mnli", "hellaswag"), -6), {})),
    "c2.gain": ((flat(("multi",), 6), {}), (flat(("multi",), -6), {})),
    "c2.best": ((flat(SINGLES, 3) | flat(("multi",), 12), {}), (flat(SINGLES, 3) | flat(("mnli",), 12), {})),
    "c3.share": ((flat(ENGLISH, 15, RETRIEVAL), {}), (flat(ENGLISH, -15, RETRIEVAL), {})),
    "c3.largest": ((flat(ENGLISH, 15, RETRIEVAL), {}), (flat(ENGLISH, 15, ("xquad",)), {})),
    "c5": ((flat(ENGLISH, 8, ("tydiqa",)), {}), (flat(ENGLISH, -8, ("tydiqa",)), {})),
    "c6": ((flat(ENGLISH, -4, ("xnli",)), {}), (flat(ENGLISH, 8, ("xnli",)), {})),
    "c7": ((flat(("qqp",), 8), best("qqp")), (flat(("qqp",), -8) | flat(("mnli",), 20), best("qqp"))),  # what matters is what was chosen, not what would have been better
    "c9": (({}, {}), (flat(("mnli+mlm", "qqp+mlm", "hellaswag+mlm"), 9), {})),
    "c10": (({}, {}), (flat(("mnli-translated", "qqp-translated", "hellaswag-translated"), 9), {})),
}


def test_every_measured_claim_is_tried():
    assert set(TRUTHS) == {claim.id for claim in CLAIMS.values() if claim.measure}


@pytest.mark.parametrize("claim", TRUTHS)
def test_a_known_truth_gives_the_known_verdict(claim):
    for (gains, chosen_on_dev), verdict in zip(TRUTHS[claim], ("supported", "not supported")):
        found = CLAIMS[claim].measure(simulate_evidence(FEWER, gains, chosen_on_dev, draw=1, seed_sd=0.5, language_sd=0.5))
        assert found.verdict == verdict, found.sentence
        assert found.low <= found.value <= found.high


@pytest.fixture(scope="module")
def nothing():
    """Studies without any effect."""
    return [simulate_evidence(MINI, {}, draw=draw) for draw in range(12)]


@pytest.mark.parametrize("claim", ["c1.squad", "c1.mean", "c2.gain", "c2.best", "c3.largest", "c7"])
def test_nothing_is_found_where_there_is_nothing(claim, nothing):
    """With no effect at all an interval of 95 % excludes zero in few studies: in more than three of twelve once in 450 times."""
    verdicts = [CLAIMS[claim].measure(evidence).verdict for evidence in nothing]
    assert sum(verdict != "not resolved" for verdict in verdicts) <= 3, verdicts


def test_the_best_of_several_that_are_alike_is_not_taken_at_its_word():
    """Nine alike: the one that was measured best looks better than multi-task training, which is alike too."""
    evidence = [simulate_evidence(FEWER, flat(ENGLISH, 3), draw=draw) for draw in range(6)]
    assert sum(CLAIMS["c2.best"].measure(e).verdict == "not supported" for e in evidence) <= 1


@pytest.fixture(scope="module")
def small():
    """Two arms and a baseline, three targets, two languages and two seeds: scores that can be added up by hand."""
    wanted = {"none", "nli", "qa", "multi", "mlm", "multi+mlm"}
    study = replace(MINI, cells=tuple(c for c in MINI.cells if c.arm in wanted and c.target in ("world_xnli", "world_xquad", "world_tatoeba") and c.seed < 2))
    values = {}  # (arm, target) -> seed -> language
    values["none", "world_xnli"], values["none", "world_xquad"], values["none", "world_tatoeba"] = [[50, 40], [54, 44]], [[30, 20], [32, 22]], [[60, 10], [64, 14]]
    moved = {"nli": {"world_xnli": [[5, 3], [1, 3]], "world_xquad": [[-1, 0], [2, 3]], "world_tatoeba": [[6, 6], [12, 8]]}, "qa": {"world_xnli": [[0, 1], [2, 1]], "world_xquad": [[8, 4], [6, 6]], "world_tatoeba": [[3, 3], [3, 3]]},
             "multi": {"world_xnli": [[4, 4], [2, 2]], "world_xquad": [[9, 5], [7, 7]], "world_tatoeba": [[9, 9], [15, 11]]}, "mlm": {t: [[0, 0], [0, 0]] for t in ("world_xnli", "world_xquad", "world_tatoeba")},
             "multi+mlm": {"world_xnli": [[5, 3], [3, 3]], "world_xquad": [[9, 5], [6, 8]], "world_tatoeba": [[9, 8], [14, 10]]}}
    rows = []
    for arm in wanted:
        for target in ("world_xnli", "world_xquad", "world_tatoeba"):
            for seed in (0, 1):
                for j, language in enumerate(("qaa", "qab")):
                    value = values["none", target][seed][j] + (moved[arm][target][seed][j] if arm != "none" else 0)
                    for metric in TASKS[target].headline:
                        rows.append({"arm": arm, "target": target, "seed": seed, "run": f"{arm}.{target}.{seed}", "task": target, "language": language, "split": "test", "selection": "none" if target == "world_tatoeba" else "best", "metric": metric, "value": float(value), "n": 100, "capped": False})
                if target != "world_tatoeba":  # English must play no part
                    rows += [rows[-1] | {"language": "en", "value": 99.0 if arm == "nli" else 1.0, "metric": metric} for metric in TASKS[target].headline]
    dev = {("none", "world_xnli"): 80, ("nli", "world_xnli"): 85, ("qa", "world_xnli"): 81, ("multi", "world_xnli"): 83, ("mlm", "world_xnli"): 79, ("multi+mlm", "world_xnli"): 82,
           ("none", "world_xquad"): 60, ("nli", "world_xquad"): 59, ("qa", "world_xquad"): 66, ("multi", "world_xquad"): 65, ("mlm", "world_xquad"): 61, ("multi+mlm", "world_xquad"): 62}
    return study, pd.DataFrame(rows), make_evidence(study, pd.DataFrame(rows), {(*place, seed): value + seed for place, value in dev.items() for seed in (0, 1)}), moved


def mean(rows):
    return sum(map(sum, rows)) / 4


def test_numbers_are_those_of_the_scores(small):
    """Each claim's number by plain addition."""
    study, _, evidence, moved = small
    value = {claim: CLAIMS[claim].measure(evidence).value for claim in TRUTHS if claim not in ("c1.hellaswag", "c1.mean", "c10")}
    average = {arm: sum(mean(rows) for rows in by_target.values()) / 3 for arm, by_target in moved.items()}
    assert value["c1.mnli"] == pytest.approx(average["nli"]) == pytest.approx((3 + 1 + 8) / 3) and value["c1.squad"] == pytest.approx((1 + 6 + 3) / 3)
    assert value["c2.gain"] == pytest.approx((3 + 7 + 11) / 3) and value["c2.best"] == pytest.approx(7 - 4)
    assert value["c3.largest"] == pytest.approx((8 + 3 + 11) / 3 - (1 + 6 + 7) / 3)  # retrieval less questions
    assert value["c3.share"] == 1 and value["c5"] == 1 and value["c6"] == pytest.approx((3 + 1 + 3) / 3)
    # inference: nli; questions: qa; retrieval has no development scores and takes the arm with the best mean over both, multi (74 against 73.5 of qa and 72 of nli)
    assert value["c7"] == pytest.approx((3 + 6 + 11) / 3)
    ahead = [np.sign(a - b) / 2 + 0.5 for t in moved["multi"] for x, y in zip(moved["multi+mlm"][t], moved["multi"][t]) for a, b in zip(x, y)]
    assert value["c9"] == pytest.approx(sum(ahead) / 12)


def test_the_number_is_that_of_the_report(small):
    study, scores, evidence, _ = small
    rows = transfer_gain(headline(scores), [Contrast(treatment="nli", baseline="none")]).set_index("target")
    found = CLAIMS["c1.mnli"].measure(evidence)
    assert (found.value, found.low, found.high) == tuple(rows.loc["average", ["gain", "low", "high"]])
    one = weighted(evidence, even(evidence, [evidence.arms.index("nli")], [evidence.targets.index("world_xquad")]))
    assert (one["gain"], one["low"], one["high"]) == tuple(rows.loc["world_xquad", ["gain", "low", "high"]])


def test_the_oracle_stands_apart(small):
    _, _, evidence, _ = small
    found = CLAIMS["c7"].measure(evidence)
    assert "oracle that chose on the scores themselves would have +7.2" in found.sentence and found.value < 7  # 3.5 (multi+mlm) + 7 (multi) + 11 (multi), over 3; the choice is nli, qa, multi
    picked = chosen(evidence, best_on_dev(evidence, evidence.having("baseline", "single", "multi"), range(3)))["weights"]
    assert {evidence.targets[t]: evidence.arms[int(np.argmax(picked[:, t]))] for t in range(3)} == {"world_xnli": "nli", "world_xquad": "qa", "world_tatoeba": "multi"}


def test_an_interval_decides_and_a_seed_does_not():
    assert [_beyond({"low": low, "high": high, "n_seeds": 3}) for low, high in ((1, 2), (-2, -1), (-1, 1))] == ["supported", "not supported", "not resolved"]
    assert [_beyond({"low": low, "high": high, "n_seeds": 3}, 1.0, above=False) for low, high in ((-1, 0.9), (1.1, 2), (0, 2))] == ["supported", "not supported", "not resolved"]
    single = replace(MINI, cells=tuple(c for c in MINI.cells if c.seed == 0))
    found = [CLAIMS[claim].measure(simulate_evidence(single, flat(("nli", "qa", "mc", "multi"), 9, [c.target for c in MINI.cells]))) for claim in TRUTHS]
    assert {f.verdict for f in found} == {"not testable here"}


def test_controls_play_no_part():
    """Shuffled labels, the synthetic task and longer training may gain what they want."""
    controls = [arm for arm, tasks in arm_tasks(PAPER).items() if arm_kind(tasks, arm == "none") == "control"]
    assert {"longer", "real-fake", "squad2-shuffled"} <= set(controls)
    e = simulate_evidence(PAPER, flat(controls, 25))
    assert abs(CLAIMS["c1.squad"].measure(e).value) < 3 and abs(CLAIMS["c3.largest"].measure(e).value) < 5 and CLAIMS["c7"].measure(e).value < 3


def test_what_lacks_is_said():
    """A missing arm, missing runs and a missing target each have their words, and other claims go on."""
    scores = simulate_scores({arm: {"world_xnli": 4.0, "world_panx": 1.0} for arm in ("nli", "qa")}, languages=("en", "qaa", "qab", "qac"))
    scores = scores.assign(metric=scores["target"].map({"world_xnli": "accuracy", "world_panx": "f1"}))
    e = make_evidence(MINI, scores, {})
    found = {claim: CLAIMS[claim].measure(e) for claim in TRUTHS}
    assert found["c1.hellaswag"].verdict == found["c3.share"].verdict == found["c7"].verdict == found["c5"].verdict == "not testable here" and found["c1.squad"].verdict == "supported"
    assert "HellaSwag" in found["c1.hellaswag"].sentence and "mc" in found["c6"].sentence and "no scores" in found["c6"].sentence
    holed = make_evidence(MINI, scores[~((scores["arm"] == "qa") & (scores["seed"] == 1) & (scores["target"] == "world_xnli"))], {})
    assert "partial: 3 pairs are missing" in CLAIMS["c1.squad"].measure(holed).sentence


def test_the_world_never_decides_about_the_paper():
    gains = flat(("nli", "qa", "mc", "tagging", "multi"), 9, [c.target for c in MINI.cells])
    table = ledger(MINI, simulate_evidence(MINI, gains)).set_index("claim")
    measured = [claim.id for claim in CLAIMS.values() if claim.measure]
    assert (table.loc[measured, "verdict"] == "not testable here").all() and (table.loc[measured, "reason"] == "needs profile paper").all()
    assert table.loc["c1.squad", "here"] == "in the world: supported" and table.loc["c1.squad", "stand_ins"] == "world_squad2 for SQuAD"
    assert not table["finding"].str.contains("The reported").any()  # +8.2 says nothing about the world
    other = ledger(PAPER.with_limits(score=10), simulate_evidence(PAPER, flat(("mnli",), 6))).set_index("claim")
    assert other.loc["c1.mnli", "verdict"] == "not testable here" and other.loc["c1.mnli", "here"] == "in profile paper with changes: supported"


def test_the_papers_own_records_decide():
    table = ledger(PAPER, simulate_evidence(PAPER, flat(("mnli",), 7.5) | flat(("hellaswag",), 2), draw=3)).set_index("claim")
    assert (table["here"] == "").all() and table.loc["c1.mnli", "verdict"] == "supported" and "The reported +7.5 lies inside" in table.loc["c1.mnli", "finding"]
    assert "The reported +7.0 lies outside" in table.loc["c1.hellaswag", "finding"] and table.loc["c8", "verdict"] == "not testable here"


def test_declared_claims_are_counted_not_repeated():
    table = ledger(MINI, None).set_index("claim")
    declared = [claim.id for claim in CLAIMS.values() if claim.check]
    assert (table.loc[declared, "verdict"] == "supported").all() and (table.loc[declared, "published"].dropna() == table.loc[declared, "value"][table.loc[declared, "published"].notna()]).all()
    assert rows_of("mnli", 392_703)(PAPER).verdict == "not supported"
    fewer = replace(PAPER, cells=tuple(c for c in PAPER.cells if c.arm != "ccg" and c.target != "pawsx"))
    assert {CLAIMS[i].check(fewer).verdict for i in ("c13", "c14")} == {"not supported"} and CLAIMS["c13"].check(fewer).value == 8
    assert CLAIMS["c4"].check(replace(PAPER, cells=tuple(c for c in PAPER.cells if c.target != "bucc2018"))).verdict == CLAIMS["c11"].check(MINI).verdict == three_phases(MINI).verdict == CLAIMS["c15"].check(MINI).verdict == "not supported"


def test_a_changed_declaration_is_noticed(monkeypatch):
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries) | {"snli": replace(TASKS["snli"], expected_rows={"train": 550_151})})
    assert parts_of_anli_plus(PAPER).verdict == "not supported"


def test_claims_are_complete_data():
    assert {claim.number for claim in CLAIMS.values()} == {f"c{i}" for i in range(1, 19)} and set(PAPER.claims) == {claim.number for claim in CLAIMS.values()}
    for claim in CLAIMS.values():
        assert claim.text.endswith(".") and claim.source and claim.test and claim.reports and all(flag in ("yes", "no") and 0 < c < 1 for flag, c in claim.reports.values())
        assert not (claim.measure and claim.check)
    assert [c.published for c in CLAIMS.values() if c.id in ("c1.squad", "c1.mnli", "c1.hellaswag", "c2.gain", "c7")] == [8.2, 7.5, 7.0, 8.7, 5.4]
    assert CLAIMS["c6"].reports["001"] == ("no", 0.09) and CLAIMS["c1.mnli"].reports["001"] == ("yes", 0.18) and 0.5 < CONSISTENT < 1
    assert {"2004.10190", "2606.01947", "+8.4", "+6.1"} <= {word.strip(",.;") for note in NOTES for word in note.split()}


def test_the_ledger_in_words_and_in_a_figure():
    table = ledger(MINI, simulate_evidence(MINI, {}))
    text = claims_text(table, 100)
    assert all(claim in text for claim in CLAIMS) and "world_csqa for HellaSwag" in text and "nan" not in text
    figure = plot_claims(table)
    left, right = figure.axes
    assert "reported" in left.get_title() and "in the world" in right.get_title() and len(left.lines[1].get_xdata()) == 7 and len(right.lines[1].get_xdata()) == 9
    assert figure._repr_png_() and plot_claims(ledger(MINI, None))._repr_png_()


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The committed records of the mini study."""
    folder = tmp_path_factory.mktemp("mini")
    if not any((ROOT / "outputs" / run.id / "record.json").exists() for run in MINI.plan()):
        pytest.skip("the records of the mini study are not here")
    for run in MINI.plan():
        if (ROOT / "outputs" / run.id / "record.json").exists():
            (folder / run.id).mkdir(parents=True)
            shutil.copy(ROOT / "outputs" / run.id / "record.json", folder / run.id)
    return folder


def test_from_records_on_the_command_line(copied, tmp_path, capsys):
    assert main(["claims", "--outputs", str(copied), "--csv", str(tmp_path / "ledger.csv")]) == 0
    out = capsys.readouterr().out
    rows = {row["claim"]: row for row in csv.DictReader((tmp_path / "ledger.csv").open(encoding="utf-8"))}
    assert list(rows) == list(claims_table(MINI, copied)["claim"]) and set(rows) == set(CLAIMS) and "in the world" in rows["c1.squad"]["here"] and float(rows["c1.squad"]["low"]) < float(rows["c1.squad"]["high"])
    assert all(claim in out for claim in rows) and "robot" in out
    reported = transfer_gain(headline(pd.DataFrame(_scores(copied)), split=None), [Contrast(treatment="qa", baseline="none")]).set_index("target").loc["average"]
    assert float(rows["c1.squad"]["value"]) == pytest.approx(reported["gain"]) and float(rows["c1.squad"]["low"]) == pytest.approx(reported["low"])


def _scores(folder):
    from xtransfer.records import load_records
    return load_records(MINI, folder)


@pytest.mark.parametrize("profile", ["smoke", "mini", "small", "paper"])
def test_without_records_declared_facts_are_still_checked(profile, tmp_path, capsys):
    assert main(["claims", "--profile", profile, "--outputs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1,104,934" in out and out.count("not testable here: no records") == sum(claim.measure is not None for claim in CLAIMS.values()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, expected", ((["--profile", "papre"], "did you mean 'paper'"), (["--csv", "/proc/nowhere/ledger.csv"], "cannot write"), (["stilts"], "--help")))
def test_a_mistake_costs_one_sentence(arguments, expected, tmp_path, capsys):
    assert main(["claims", "--outputs", str(tmp_path), *arguments]) == 1
    err = capsys.readouterr().err
    assert expected in err and len(err.strip().splitlines()) == 1


def test_a_damaged_record_costs_one_sentence(copied, tmp_path, capsys):
    shutil.copytree(copied, tmp_path / "copy")
    sorted((tmp_path / "copy").glob("*/*/record.json"))[0].write_text("{")
    assert main(["claims", "--outputs", str(tmp_path / "copy")]) == 1
    err = capsys.readouterr().err
    assert "damaged" in err and "Traceback" not in err


def test_bad_input():
    with pytest.raises(XtransferError, match="did you mean 'c1.squad'"):
        CLAIMS["c1.sqaud"]
    with pytest.raises(XtransferError, match="without intermediate training"):
        make_evidence(replace(MINI, baselines=("nothing",)), simulate_scores({"nli": {"world_xnli": 1.0}}), {})
    with pytest.raises(XtransferError, match="headline keys"):
        make_evidence(MINI, simulate_scores({"nli": {"world_xquad": 1.0}}, languages=("en", "qaa")), {})


def test_no_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, xtransfer.claims; sys.exit('torch' in sys.modules)"], cwd=ROOT).returncode == 0
