"""The language table against the facts it was built from."""
import subprocess
import sys

import pytest

from xtransfer.core import XtransferError
from xtransfer.languages import _ROWS, DISTANCE_KINDS, LANGUAGE_SETS, LANGUAGES, TATOEBA_CONFIGS, UDPOS_CONFIGS, Language, distance_to_english

REAL = {row["code"]: LANGUAGES[row["code"]] for row in _ROWS}  # other modules register more: the world's, and those of single tasks


def test_sizes_of_the_benchmarks():
    sizes = {"pawsx": 7, "xnli": 15, "panx": 40, "udpos": 33, "bucc2018": 4, "tatoeba": 36, "xquad": 11, "mlqa": 7, "tydiqa": 9}
    assert {task: len(LANGUAGE_SETS[task]) for task in sizes} == sizes
    revised = {"xnli": 15, "xcopa": 11, "udpos": 38, "panx": 48, "xquad": 12, "mlqa": 7, "tydiqa": 9, "tatoeba": 41, "mewslix": 11, "lareqa": 11}
    assert {task: len(LANGUAGE_SETS[f"xtreme_r/{task}"]) for task in revised} == revised
    assert set(LANGUAGE_SETS["xtreme_r"]) == set(REAL) and len(LANGUAGE_SETS["xtreme"]) == 40


def test_revised_lists_only_add_languages():
    for task in ("panx", "udpos", "tatoeba", "xquad"):
        assert set(LANGUAGE_SETS[task]) < set(LANGUAGE_SETS[f"xtreme_r/{task}"])
    assert set(LANGUAGE_SETS["xtreme_r/udpos"]) - set(LANGUAGE_SETS["udpos"]) == {"lt", "pl", "uk", "wo", "ro"}
    assert set(LANGUAGE_SETS["xtreme_r/xquad"]) - set(LANGUAGE_SETS["xquad"]) == {"ro"}


@pytest.mark.parametrize("code", list(REAL))
def test_every_language_is_complete(code):
    language = LANGUAGES[code]
    assert language.code == code and len(language.iso3) == 3 and len(language.script) == 4 and language.name[0].isupper()
    assert set(language.distances) == set(DISTANCE_KINDS) and 0 <= language.resource_class <= 5
    missing = {kind for kind, value in language.distances.items() if value is None}
    assert missing == ({"family"} if code in ("eu", "qu") else set())
    assert all((value == 0) == (code == "en") for value in language.distances.values() if value is not None)


def test_names_are_distinct():
    for attribute in ("name", "iso3"):
        assert len({getattr(language, attribute) for language in REAL.values()}) == 50


def test_pretraining_coverage():
    assert [c for c in REAL if "mt5" not in LANGUAGES[c].seen_by] == ["qu", "wo"]
    assert sum("bloom" in language.seen_by for language in REAL.values()) == 21


def test_hub_names():
    assert UDPOS_CONFIGS["af"] == "udpos.Afrikaans" and UDPOS_CONFIGS["tl"] == "udpos.Tagalog"
    assert TATOEBA_CONFIGS["fa"] == "tatoeba.pes" and "en" not in TATOEBA_CONFIGS


def test_refusals():
    with pytest.raises(XtransferError, match="unknown language 'dee'"):
        distance_to_english("dee")
    with pytest.raises(XtransferError, match="did you mean 'geographic'"):
        distance_to_english("de", "geografic")
    with pytest.raises(XtransferError, match="outside 0..1"):
        Language(code="qaa", name="Toy", iso3="qaa", family="synthetic", script="Zsye", distances={"typological": 2})


def test_import_is_light():
    heavy = "import sys, xtransfer.languages, xtransfer.metrics; print([m for m in ('torch', 'transformers', 'datasets', 'evaluate', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
