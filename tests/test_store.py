"""Tokens are made once and are the same ever after: equal to the plain way, to what was stored, and to nothing at all when a file is damaged."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import xtransfer.cache
import xtransfer.store
from conftest import xtransfer as command
from copies import COPIES
from plainly import plain_sentences, plain_sides, plainly
from xtransfer.backbones import FAMILIES
from xtransfer.cache import META_NAME, clear_store, format_store, make_room, read_entry, store_entries, write_entry
from xtransfer.core import XtransferError
from xtransfer.encoding import encode, encode_sentences, make_batch
from xtransfer.modeling import prepare_tokenizer
from xtransfer.seals import with_checksum
from xtransfer.sources import DATA_VARIABLE, Source
from xtransfer.store import COUNTED, ROWS_LIMIT, StoredRows, encode_examples, look, rows_key, stored_examples, stored_sentences, stored_sides, tokenizer_fingerprint
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS, Examples, Task, load_examples, text_pair

RECIPE = Recipe(name="test", learning_rate=1e-3, batch_size=4, max_length=96, stride=8)
TRAINED = ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_qa2", "toy_text", "toy_ranked")
LETTERS = "abcdefgh"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own, and a process that has verified and counted nothing."""
    monkeypatch.setenv("XTRANSFER_CACHE", str(tmp_path / "cache"))
    for known in (xtransfer.cache._verified, xtransfer.cache._said, COUNTED):
        known.clear()
    return tmp_path / "cache" / "store"


@pytest.fixture
def tokenizer(toys):
    from xtransfer.backbones import BACKBONES

    return BACKBONES["toy-encoder"].build_tokenizer()


def assert_equal(one, other):
    """Equal arrays, of the same kinds."""
    assert (one.examples, one.truncated) == (other.examples, other.truncated)
    for name in ("ids", "starts", "example"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for kind in ("example_targets", "sequence_targets", "token_targets"):
        assert set(getattr(one, kind)) == set(getattr(other, kind))
        for name, values in getattr(one, kind).items():
            np.testing.assert_array_equal(values, getattr(other, kind)[name], err_msg=name)


def sentence(rng, words):
    return " ".join("".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 5))) for _ in range(words))


def odd_rows(format, count, seed):
    """Random rows with what tokenisers stumble over: no text, one letter, hundreds of words, texts that come again, marks that are cut to nothing."""
    rng = random.Random(seed)
    pool = ["", "a", " a  b ", "H\u00e9 \u200b", sentence(rng, 130), *(sentence(rng, rng.randint(1, 30)) for _ in range(max(3, count // 2)))]

    def row(i):
        some, other = rng.choice(pool), rng.choice(pool)
        match format:
            case "sequence_classification":
                return {"id": str(i), "text": some, "text_pair": other, "label": rng.choice(("yes", "no"))}
            case "multiple_choice":
                return {"id": str(i), "text": some, "choices": [rng.choice(pool) for _ in range(rng.randint(1, 5))], "label": 0}
            case "token_classification":
                words = [w or "a" for w in some.split(" ")]
                return {"id": str(i), "tokens": words, "tags": [rng.choice(("O", "B-LONG")) for _ in words]}
            case "span_extraction":
                words = some.split() or ["a"]
                at = rng.randrange(len(words))
                gone = rng.random() < 0.3
                return {"id": str(i), "question": other, "context": " ".join(words), "answers": [] if gone else [words[at]], "starts": [] if gone else [len(" ".join(words[:at])) + (at > 0)]}
            case "masked_lm":
                return {"id": str(i), "text": some, "text_pair": rng.choice(("", other))}
            case "ranked_retrieval":
                return {"id": str(i), "side": "candidate" if i % 2 else "query", "text": some, "text_pair": rng.choice(("", other)), "relevant": [] if i % 2 else [str(i + 1)]}
    return [row(i) for i in range(count + count % 2 if format == "ranked_retrieval" else count)]


def odd_task(format):
    labels = {"sequence_classification": ("yes", "no"), "token_classification": ("O", "B-LONG")}.get(format, ())
    return Task(name="odd", format=format, kind="toy", source=Source(repo="generated"), languages=("en",), load=None, read=dict, labels=labels, metrics=("squad_v2",) if format == "span_extraction" else ())


def part(rows, language="en", split="train"):
    return Examples(task="odd", language=language, split=split, rows=rows, available=len(rows), expected=None)


FORMATS = ("sequence_classification", "multiple_choice", "token_classification", "span_extraction", "masked_lm", "ranked_retrieval")


@pytest.mark.parametrize("name", COPIES)
def test_each_text_once_gives_what_the_tokenizer_gives_row_by_row(name):
    """For every family's tokenizer and every format, also in windows and with what is cut off."""
    tokenizer = prepare_tokenizer(SimpleNamespace(pad_token=None, kind=FAMILIES[name]), COPIES[name][2]())
    for format in FORMATS:
        rows = odd_rows(format, 17, seed=1)
        if tokenizer.unk_token_id is None and format == "token_classification":
            rows = [r | {"tokens": ["a" + "".join(c for c in w if c in LETTERS) for w in r["tokens"]]} for r in rows]
        for recipe in (replace(RECIPE, max_length=512, stride=128), RECIPE):
            assert_equal(encode(tokenizer, odd_task(format), rows, recipe), plainly(tokenizer, odd_task(format), rows, recipe))


@pytest.mark.parametrize("format", FORMATS)
def test_equal_on_random_shapes_fresh_and_stored(format, tokenizer, cache):
    for count, seed in ((1, 0), (2, 1), (13, 2), (31, 3), (97, 4)):
        rows = odd_rows(format, count, seed)
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        for given in (rows, [rows[i] for i in order]):
            plain = plainly(tokenizer, odd_task(format), given, RECIPE)
            fresh, stored = (encode_examples(tokenizer, odd_task(format), [part(given)], RECIPE) for _ in range(2))
            assert_equal(fresh, plain)
            assert_equal(stored, plain)
            assert not stored.ids.flags.writeable
            chosen = np.array(order if format != "ranked_retrieval" else order[:max(1, len(order) // 2)]) % plain.examples
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                one, two = make_batch(fresh, chosen), make_batch(stored, chosen)
            assert one.lengths == two.lengths and torch.equal(one.input_ids, two.input_ids) and two.input_ids.dtype == torch.int64
            assert all(torch.equal(v, two.targets[k]) and v.dtype == torch.int64 for k, v in one.targets.items()) and set(one.targets) == set(two.targets)
    assert COUNTED["from the store"] >= COUNTED["made"] > 0, "the same rows in the same order are not tokenised again"


def test_sentences_and_sides(tokenizer, cache):
    rows = odd_rows("ranked_retrieval", 41, 5)
    texts = [r["text"] for r in rows]
    for _ in range(2):
        assert_equal(stored_sides(tokenizer, odd_task("ranked_retrieval"), rows, RECIPE), plain_sides(tokenizer, rows, RECIPE))
        assert_equal(stored_sentences(tokenizer, texts, 16), plain_sentences(tokenizer, texts, 16))
    assert COUNTED["made"] == COUNTED["from the store"] == 2 * len(rows)


def test_a_tokenizer_with_ways_of_its_own_is_asked_itself(tokenizer):
    class Capricious(type(tokenizer)):
        """Puts pairs the other way round, and every text in capitals first."""

        def _encode_plus(self, text, text_pair=None, **others):
            return super()._encode_plus(text if text_pair is None else text_pair, None if text_pair is None else text, **others)
    tokenizer.__class__ = Capricious
    for format in FORMATS:
        if format not in ("span_extraction", "masked_lm"):
            rows = odd_rows(format, 23, 6)
            assert_equal(encode(tokenizer, odd_task(format), rows, RECIPE), plainly(tokenizer, odd_task(format), rows, RECIPE))


def test_what_is_different_has_another_key(tokenizer, cache, toys):
    """Other rows, order, labels, limits, draws and tokenizers."""
    from tokenizers import normalizers

    task, rows = odd_task("sequence_classification"), odd_rows("sequence_classification", 12, 7)
    other = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()), **tokenizer.special_tokens_map, model_input_names=["input_ids", "attention_mask"])
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    lower = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()), **tokenizer.special_tokens_map)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    segments = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()), **tokenizer.special_tokens_map, model_input_names=["input_ids", "token_type_ids"])
    ways = [lambda: encode_examples(tokenizer, task, [part(rows)], RECIPE), lambda: encode_examples(tokenizer, task, [part(rows[::-1])], RECIPE), lambda: encode_examples(tokenizer, task, [part(rows[:11])], RECIPE),
            lambda: encode_examples(tokenizer, task, [part(rows[:6]), part(rows[6:], "de")], RECIPE), lambda: encode_examples(tokenizer, replace(task, labels=("no", "yes")), [part(rows)], RECIPE),
            lambda: encode_examples(tokenizer, task, [part(rows)], replace(RECIPE, max_length=12)), lambda: encode_examples(tokenizer, task, [part(rows)], replace(RECIPE, stride=4)),
            *(lambda t=t, seed=seed: encode_examples(tokenizer, task, [part(rows[:3]), part(rows[3:], "de")], RECIPE, t, seed) for t, seed in ((None, 0), (2.0, 0), (3.0, 0), (2.0, 1))),
            lambda: encode_examples(lower, task, [part(rows)], RECIPE), lambda: encode_examples(segments, task, [part(rows)], RECIPE), lambda: stored_sentences(tokenizer, [r["text"] for r in rows], 96)]
    found = [way() for way in ways]
    assert COUNTED["from the store"] == 0 and len(store_entries()) == len(ways)
    again = [way() for way in ways]
    assert COUNTED["from the store"] == COUNTED["made"] == sum(len(e.lengths) for e in found)
    for one, two in zip(found, again):
        assert_equal(one, two)


DAMAGES = {
    "a byte": lambda folder: flip(folder / "ids.npy", -3), "a byte of the header": lambda folder: flip(folder / "ids.npy", 70), "a short file": lambda folder: cut(folder / "starts.npy", 9), "an empty file": lambda folder: cut(folder / "ids.npy", 10**9),
    "no file": lambda folder: (folder / "example.npy").unlink(), "no meta": lambda folder: (folder / META_NAME).unlink(), "half a meta": lambda folder: cut(folder / META_NAME, 100), "another meta": lambda folder: (folder / META_NAME).write_text("[]")}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:-size] if size < path.stat().st_size else b"")


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(damage, tokenizer, cache):
    task, rows = odd_task("token_classification"), [part(odd_rows("token_classification", 30, 8))]
    fresh = encode_examples(tokenizer, task, rows, RECIPE)
    xtransfer.cache._verified.clear()
    (folder,) = cache.iterdir()
    DAMAGES[damage](folder)
    with pytest.warns(UserWarning, match=f"{folder.name} of the cache is damaged .* made again") as heard:
        again = encode_examples(tokenizer, task, rows, RECIPE)
    assert len(heard) == 1 and COUNTED["from the store"] == 0
    assert_equal(again, fresh)
    assert_equal(encode_examples(tokenizer, task, rows, RECIPE), fresh)
    assert COUNTED["from the store"] and [p.name for p in cache.iterdir()] == [folder.name]


WRITER = """
import sys, time
import numpy as np
from xtransfer.cache import read_entry, write_entry
number = int(sys.argv[1])
while time.time() < float(sys.argv[2]):
    pass
for round in range(40):
    key = f"entry-{round}"
    there = read_entry(key)
    written = write_entry(key, {"ids": np.arange(20_000) + round, "owner": np.array([number])}, {"what": "numbers"})
    meta, arrays = read_entry(key)
    assert written and arrays["ids"].tolist() == list(range(round, round + 20_000)), key
print("done")
"""


def test_entries_with_each_other_s_names_are_made_again(cache):
    for key in ("aaa", "bbb", "old"):
        assert write_entry(key, {"ids": np.frombuffer(key.encode(), np.uint8)}, {"what": key})
    (cache / "aaa").rename(cache / "between"), (cache / "bbb").rename(cache / "aaa"), (cache / "between").rename(cache / "bbb")
    for key in ("aaa", "bbb"):
        with pytest.warns(UserWarning, match=f"the entry {key} of the cache is damaged .*it is removed and made again"):
            assert read_entry(key) is None and not (cache / key).exists()
        assert write_entry(key, {"ids": np.frombuffer(key.encode(), np.uint8)}, {"what": key}) and bytes(read_entry(key)[1]["ids"]) == key.encode()
    meta = json.loads((cache / "old" / META_NAME).read_text())
    (cache / "old" / META_NAME).write_text(json.dumps(with_checksum({name: value for name, value in meta.items() if name != "key"})))
    assert bytes(read_entry("old")[1]["ids"]) == b"old", "entries of earlier versions do not say whose they are"


@pytest.mark.parametrize("content", ("[" * 100_000, "9" * 5000, '{"what": "x", "tokens": "text"}', '{"what": "x", "sequences": Infinity}', '{"what": "x", "tokens": null}'), ids=lambda content: content[:40])
def test_entries_that_cannot_be_listed_are_shown_as_damaged(content, cache):
    assert write_entry("whole", {"ids": np.arange(9)}, {"what": "numbers"}) and write_entry("broken", {"ids": np.arange(9)}, {"what": "numbers"})
    (cache / "broken" / META_NAME).write_text(content)
    assert {entry.key: entry.what for entry in store_entries()} == {"whole": "numbers", "broken": "damaged"} and "damaged" in format_store()
    with pytest.warns(UserWarning, match="broken of the cache is damaged"):
        assert read_entry("broken") is None


def test_writers_and_readers_at_the_same_time(cache):
    begin = str(time.time() + 4)
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(i), begin], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "done\n", err
    assert sorted(p.name for p in cache.iterdir()) == sorted(f"entry-{i}" for i in range(40)), "losers have thrown away what they wrote"


@pytest.mark.parametrize("before", ["nothing", "a damaged entry"])
def test_an_entry_that_appears_while_one_looks_for_it_is_kept(before, cache, monkeypatch):
    if before == "a damaged entry":
        (cache / "late").mkdir(parents=True)
    real = Path.read_text

    def slow(path, *given, **more):  # another process publishes between our look and our verdict
        monkeypatch.setattr(Path, "read_text", real)
        if (cache / "late").exists():
            (cache / "late").rename(cache / ".old")
        assert write_entry("late", {"ids": np.arange(9)}, {"what": "numbers"})
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_entry("late") is None
        monkeypatch.setattr(Path, "read_text", real)
        write_entry("late", {"ids": np.arange(9)}, {"what": "numbers"})
        assert read_entry("late")[1]["ids"].tolist() == list(range(9))


def test_a_killed_writer_leaves_nothing_that_passes_for_an_entry(cache, tokenizer, monkeypatch):
    script = "import numpy as np, os, signal\nimport xtransfer.cache as cache\nreal, calls = np.save, []\n" \
             "def lethal(*given, **more):\n    real(*given, **more)\n    calls.append(1)\n    len(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n" \
             "np.save = lethal\ncache.write_entry('victim', {'a': np.arange(9), 'b': np.arange(9), 'c': np.arange(9)}, {'what': 'x'})"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.name.startswith(".victim") and read_entry("victim") is None and store_entries() == []
    assert write_entry("victim", {"a": np.arange(9)}, {"what": "x"}) and left.exists(), "it may belong to somebody who still writes"
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    make_room(10**9)
    assert [p.name for p in cache.iterdir()] == ["victim"]


def test_the_limit_is_kept_and_what_was_just_used_stays(cache, monkeypatch):
    monkeypatch.setenv("XTRANSFER_CACHE_LIMIT", "1e-4")  # 100 kB
    mapped = None
    for i in range(5):
        assert write_entry(f"e{i}", {"ids": np.arange(5000)}, {"what": "forty kB"})
        mapped = mapped or read_entry("e0")
    assert {e.key for e in store_entries()} == {f"e{i}" for i in range(5)}, "all were used just now, by whomever"
    for i in range(5):
        os.utime(cache / f"e{i}" / META_NAME, (time.time() - 9000 + 1000 * i,) * 2)
    assert write_entry("new", {"ids": np.arange(5000)}, {"what": "forty kB"})
    assert {e.key for e in store_entries()} == {"e4", "new"} and mapped[1]["ids"].sum() == 5000 * 4999 / 2, "what somebody has mapped stays readable"
    os.utime(cache / "e4" / META_NAME, (time.time() - 9000,) * 2)
    assert read_entry("e4") and store_entries()[0].used > time.time() - 60, "reading counts as using"
    assert not write_entry("huge", {"ids": np.arange(50_000)}, {"what": "more than all may be"}) and read_entry("huge") is None
    for given in ("many", "-1", "inf", "nan"):
        monkeypatch.setenv("XTRANSFER_CACHE_LIMIT", given)
        with pytest.raises(XtransferError, match="gigabytes from 0"):
            xtransfer.cache.store_limit()


def test_nothing_is_kept_with_a_limit_of_nothing(cache, tokenizer, monkeypatch):
    monkeypatch.setenv("XTRANSFER_CACHE_LIMIT", "0")
    task, rows = odd_task("masked_lm"), [part(odd_rows("masked_lm", 9, 9))]
    assert_equal(encode_examples(tokenizer, task, rows, RECIPE), encode_examples(tokenizer, task, rows, RECIPE))
    stored_examples(TASKS["world_xnli"], "qaa", "dev", 5)
    assert not cache.exists()


@pytest.mark.parametrize("reason", ("a file in its place", "a full disk", "no permission"))
def test_work_goes_on_without_a_cache(reason, cache, tokenizer, monkeypatch):
    if reason == "a file in its place":
        cache.parent.write_text("not a folder")
    else:
        number = {"a full disk": 28, "no permission": 13}[reason]

        def refuse(*given, **more):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(xtransfer.cache.np, "save", refuse)
    task, rows = odd_task("span_extraction"), [part(odd_rows("span_extraction", 21, 10))]
    with pytest.warns(UserWarning, match="cannot be written .* goes on without") as heard:
        for _ in range(3):
            assert_equal(encode_examples(tokenizer, task, rows, RECIPE), plainly(tokenizer, task, rows[0].rows, RECIPE))
    assert len(heard) == 1 and (reason == "a file in its place" or list(cache.iterdir()) == [])


def test_a_cache_that_may_only_be_read_is_read(cache, tokenizer, monkeypatch):
    task, rows = odd_task("masked_lm"), [part(odd_rows("masked_lm", 9, 11))]
    encode_examples(tokenizer, task, rows, RECIPE)

    def refuse(*given, **more):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(xtransfer.cache.os, "utime", refuse)
    assert_equal(encode_examples(tokenizer, task, rows, RECIPE), plainly(tokenizer, task, rows[0].rows, RECIPE))
    assert COUNTED["from the store"] == COUNTED["made"]


def test_rows_of_the_world_come_back_as_they_were(cache):
    for name, language, split, limit in (("world_xnli", "qaa", "test", None), ("world_squad2", "en", "dev", 40), ("world_mnli@shuffled", "en", "train", 50), ("world_csqa", "en", "dev", None), ("world_bucc", "qab", "dev", None)):
        task = TASKS[name]
        plain, fresh, stored = load_examples(task, language, split, limit), stored_examples(task, language, split, limit), stored_examples(task, language, split, limit)
        assert plain.facts == fresh.facts == stored.facts and plain.capped == stored.capped, name
        assert type(stored.rows) is StoredRows and stored.rows._rows is None, "facts need no rows"
        assert list(stored.rows) == plain.rows and stored.rows[1:3] == plain.rows[1:3] and len(stored.rows) == len(plain.rows)


def test_rows_are_kept_only_where_they_cannot_become_others(cache, toys, tmp_path, monkeypatch):
    """Not those of a user's functions or of sources whose version nobody knows; other files, versions, limits and closures are other rows."""
    assert rows_key(TASKS["toy_pair"], "en", "dev", None) is None, "its functions may read anything"
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr("xtransfer.store.resolved_revision", lambda source: "main")
    assert rows_key(TASKS["xnli"], "de", "test", None) is None, "a branch may move"
    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setattr("xtransfer.store.resolved_revision", lambda source: commit)
    xnli = TASKS["xnli"]
    keys = [rows_key(xnli, "de", "test", None), rows_key(xnli, "de", "test", 5), rows_key(xnli, "de", "dev", None), rows_key(xnli, "fr", "test", None), rows_key(replace(xnli, version=9), "de", "test", None),
            rows_key(replace(xnli, read=text_pair("premise")), "de", "test", None), rows_key(TASKS["mnli@sample-10"], "en", "train", None), rows_key(TASKS["mnli@sample-11"], "en", "train", None),
            rows_key(TASKS["mnli@sample-11@shuffled"], "en", "train", None)]
    assert None not in keys and len(set(keys)) == len(keys) and rows_key(xnli, "de", "test", None) == keys[0]
    monkeypatch.setattr("xtransfer.store._code", lambda: "another version of the package")
    assert rows_key(xnli, "de", "test", None) != keys[0]
    with pytest.raises(xtransfer.store.Unknown):
        look(lambda row: row)


def test_other_files_are_other_rows(cache, tmp_path, monkeypatch):
    from xtransfer.text import text_task

    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    folder = tmp_path / "data/files/stories"
    folder.mkdir(parents=True)
    for number, ending in enumerate(("ends.", "ends!", "goes on.")):
        (folder / "en.txt").write_text("\n".join(f"Story {i} {ending}" for i in range(60)))
        task = text_task("stories", Source(repo="files/stories"), ("en",))
        for _ in range(2):
            found = stored_examples(task, "en", "train")
            assert all(row["text"].endswith(ending) for row in found.rows) and found.facts == load_examples(task, "en", "train").facts
    assert len(store_entries()) == 3


def test_of_large_collections_the_facts_are_kept(cache, monkeypatch):
    monkeypatch.setattr("xtransfer.store.ROWS_LIMIT", 10)
    task = TASKS["world_udpos"]
    fresh, stored = (stored_examples(task, "qab", "dev", 7) for _ in range(2))
    assert stored.facts == fresh.facts and list(stored.rows) == fresh.rows and store_entries()[0].size < 2000 < ROWS_LIMIT


def test_a_second_run_neither_reads_nor_tokenises_and_learns_the_same(cache, tmp_path, monkeypatch):
    """One stage of the world three times: without the store, filling it, and from it. Equal weights, scores and facts of the data."""
    from xtransfer.steps import RESULTS_NAME, Step, close, score, train

    def run(name, limit="10"):
        monkeypatch.setenv("XTRANSFER_CACHE_LIMIT", limit)
        (tmp_path / name).mkdir()
        recipe = {"name": "t", "learning_rate": 1e-3, "batch_size": 8, "max_steps": 4, "max_length": 64, "stride": 8, "evaluations": 2, "dev_limit": 16}
        step = Step(tmp_path / name, backbone="world-xlmr", parent="", train=["world_xnli", "world_ccg"], score=["world_xnli", "world_tatoeba"], recipe=recipe, mixing={"kind": "uniform"}, seed=0, score_splits=["test"],
                    languages=["en", "qaa"], train_limit=40, score_limit=20, threads=1, declarations=[], processes=1, sharding="")
        train(step), score(step), close(step, keep_checkpoint=False)
        results = json.loads((tmp_path / name / RESULTS_NAME).read_text())
        return {k: v.clone() for k, v in step.model.state_dict().items()}, [results[k] for k in ("data", "scores")], results["training"]["truncated"]

    plain = run("plain", "0")
    made = run("made")
    assert COUNTED["made"] and not COUNTED["from the store"]
    count = COUNTED["made"]

    def never(*given, **more):
        raise AssertionError("this was in the store")
    monkeypatch.setattr("xtransfer.store.load_examples", never)
    monkeypatch.setattr("xtransfer.store.encode", never)
    monkeypatch.setattr("xtransfer.store.encode_sentences", never)
    kept = run("kept")
    assert COUNTED["made"] == COUNTED["from the store"] == count
    for other in (made, kept):
        assert other[1:] == plain[1:]
        assert all(torch.equal(v, other[0][k]) for k, v in plain[0].items())


def test_the_command_lists_and_clears(cache, tokenizer):
    rows = [part(odd_rows("masked_lm", 9, 12))]
    for length in (20, 30, 40):
        encode_examples(tokenizer, odd_task("masked_lm"), rows, replace(RECIPE, max_length=length))
    keys = [e.key for e in store_entries()]
    os.utime(cache / keys[0] / META_NAME, (time.time() - 10 * 86400,) * 2)
    here = {"XTRANSFER_CACHE": str(cache.parent)}
    code, out, err = command("cache", "ls", environment=here)
    assert code == 0 and all(key[:12] in out for key in keys) and "odd train en" in out and "3 entries" in out and "of 10 GB" in out and str(cache) in out
    code, out, err = command("cache", "clear", "--older-than", 5, environment=here)
    assert code == 0 and "removed 1 entries" in out and not (cache / keys[0]).exists() and (cache / keys[1]).exists()
    for wrong, said in ((("cler",), "did you mean 'clear'"), (("clear", "zzz"), "no entries of the cache begin with 'zzz'"), (("clear", "--older-than", "-2"), "number of days from 0"), (("clear", "--older-than", "week"), "--older-than"),
                        (("ls", "abc"), "takes neither keys")):
        code, out, err = command("cache", *wrong, environment=here)
        assert code == 1 and said in err and err.count("\n") == 1, err
    assert clear_store([keys[1][:12]])[0].key == keys[1] and len(store_entries()) == 1
    code, out, err = command("cache", "clear", environment=here)
    assert code == 0 and store_entries() == []


REAL = """
import sys
import numpy as np
from transformers import AutoTokenizer
import xtransfer.catalogue
from plainly import plainly
from xtransfer.encoding import encode
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS, load_examples

for name in ("FacebookAI/xlm-roberta-base", "google-bert/bert-base-multilingual-cased"):
    tokenizer = AutoTokenizer.from_pretrained(name)
    for task, languages, split, length in (("xnli", "ar zh", "dev", 48), ("xquad", "zh", "test", 256), ("panx", "ar ja", "dev", 64), ("social_iqa", "en", "dev", 64)):
        rows = [row for language in languages.split() for row in load_examples(TASKS[task], language, split, 400).rows]
        one, two = (way(tokenizer, TASKS[task], rows, Recipe(name="t", learning_rate=0, batch_size=1, max_length=length, stride=32)) for way in (encode, plainly))
        assert one.truncated == two.truncated and np.array_equal(one.ids, two.ids) and np.array_equal(one.starts, two.starts) and np.array_equal(one.example, two.example), (name, task)
        for kind in ("example_targets", "sequence_targets", "token_targets"):
            assert all(np.array_equal(v, getattr(two, kind)[k]) for k, v in getattr(one, kind).items()), (name, task, kind)
        print(name, task, len(one.ids), one.truncated)
"""


def test_real_tokenizers_on_real_data(hub):
    """Pairs put together from parts are those of the real tokenizers, in scripts with and without spaces."""
    around = dict(os.environ) | hub | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, env=around, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 8
