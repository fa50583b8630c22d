"""A hub that is ill: patience with a limit, or one sentence, and never another version than the one that is named."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import finished
from ill_hub import IllHub, changed_json, cut, hang, html, html_body, missing_of, other_headers, redirected, refused, reset, status, too_short, trickle, truncated, wrong_bytes

ROWS = "".join(json.dumps({"id": f"q{i}", "text": f"text {i}", "label": "yes" if i % 2 else "no"}) + "\n" for i in range(300))
FILES = {"README.md": "---\nlicense: mit\n---\n", "train.jsonl": ROWS}
TREE = {"path": "/tree/"}
DATA = {"method": "GET", "path": "/train.jsonl"}
SIDE = {"path": "/resolve/"}
API = {"path": "/api/"}
FILE = {"path": "/train.jsonl"}

DRIVER = """
import json, sys, time, traceback
sleep, slept = time.sleep, []
time.sleep = lambda seconds: (slept.append(seconds), sleep(min(seconds, 0.01)))[1]  # the client's own pauses cannot be set
import huggingface_hub.constants, xtransfer.hub
huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT = 0.15  # its variables take whole seconds
from xtransfer.core import XtransferError
from xtransfer.sources import *
from xtransfer.sources import _looked_up
for line in sys.stdin:
    slept.clear(), _looked_up.clear(), xtransfer.hub._in_vain.update(questions=0)
    try:
        scope = {}
        exec(json.loads(line), globals(), scope)
        said = {"value": scope.get("value")}
    except XtransferError as error:
        said = {"error": str(error)}
    except BaseException:
        said = {"traceback": traceback.format_exc()[-2000:]}
    print(json.dumps(said | {"slept": sum(slept)}), flush=True)
"""


class Client:
    """A process with the real clients, a cache of its own and short pauses, which executes code line by line."""

    def __init__(self, environment):
        around = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")} | {"OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=around)

    def __call__(self, code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        assert "traceback" not in said, said["traceback"]
        return said

    def value(self, code):
        said = self(code)
        assert "error" not in said, said
        return said["value"]

    def error(self, code):
        said = self(code)
        assert "error" in said and "\n" not in said["error"], said
        return said["error"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def read(repo, split="train", more=""):
    """Code that reads a data set and tells its first row, its number of rows and the commit that a record would name."""
    return f"source = Source(repo={repo!r}{more}); rows = hub_rows(source, None, {split!r}); value = [rows[0]['text'], len(rows), resolved_revision(source)]"


@pytest.fixture(scope="module")
def ill():
    with IllHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(ill, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    client = Client(ill.environment(home) | {"XTRANSFER_DATA": str(home / "data")})
    client.home = home
    yield client
    client.close()


def outside(client):
    """What a hub wrote where only its own names lead."""
    return [*client.home.rglob("evil*"), *client.home.parent.glob("evil*"), *Path("/tmp").glob("evil-*")]


HELPED = {  # what goes away -> faults
    "503, twice": [(status(503), 2, {})], "500 and 502": [(status(500), 1, {}), (status(502), 2, {})], "429": [(status(429), 3, {})], "429 that names a second": [(status(429, Retry_After=1), 2, {})],
    "reset": [(reset, 3, {})], "503 of a file": [(status(503), 2, {"method": "GET", "path": "/resolve/"})], "cut in the middle": [(cut(1000), 3, DATA)], "cut at once": [(cut(0), 2, DATA)], "too short": [(too_short(10), 2, DATA)],
    "other bytes": [(wrong_bytes, 2, DATA)], "a page in place of the content": [(html_body, 1, DATA)], "hangs": [(hang(0.4), 1, SIDE)], "listing fails": [(status(504), 2, TREE)],
    "an answer cut short": [(truncated(0.5), 1, API)], "a list cut short": [(truncated(0.5), 1, TREE)], "an empty answer": [(truncated(0), 1, API)], "no gzip": [(other_headers(Content_Encoding="gzip"), 2, DATA)],
    "a weak name": [(lambda a: other_headers(ETag="W/" + a.headers["ETag"])(a), 5, FILE)],
}


@pytest.mark.parametrize("case", HELPED)
def test_what_goes_away_is_waited_for(case, ill, client):
    repo = f"helped/{'-'.join(case.replace(',', '').split())}"
    commit = ill.add("datasets", repo, FILES)
    faults = [ill.ill(repo, change, times, **where) for change, times, where in HELPED[case]]
    assert client.value(read(repo)) == ["text 0", 300, commit]
    assert all(fault.seen for fault in faults)


REFUSED = {  # what stays -> faults, and words of the sentence
    "503": ([(status(503), None, {})], ["answers 503", "try again later"]), "503 of the content": ([(status(503), None, DATA)], ["answers 503"]), "429": ([(status(429), None, {})], ["429, too many requests"]),
    "wait for a day": ([(status(429, Retry_After=86400), None, {})], ["asks to wait 86,400 seconds"]), "wait for a day for the content": ([(status(503, Retry_After=86400), None, DATA)], ["asks to wait 86,400 seconds"]),
    "reset": ([(reset, None, {})], ["no complete answer comes from the hub at http"]), "cut": ([(cut(10), None, DATA)], ["no complete answer"]), "too short": ([(too_short(10), None, DATA)], ["no complete answer"]),
    "other bytes": ([(wrong_bytes, None, DATA)], ["train.jsonl is not what the hub announced", "hash differs"]), "other bytes that are rows": ([(lambda a: a.__class__(a.status, a.headers, a.body.replace(b"text 0", b"text 9")), None, DATA)], ["not what the hub announced"]),
    "a hash that lies": ([(other_headers(ETag='"' + "0" * 40 + '"'), None, {"path": "/train.jsonl"})], ["not what the hub announced"]), "a page everywhere": ([(html, None, {})], ["not a hub's answer", "HF_ENDPOINT"]),
    "a page for files": ([(html, None, {"path": "/resolve/"})], ["not a hub's answer"]), "a page in place of the content": ([(html_body, None, DATA)], ["not what the hub announced"]),
    "gated": ([(refused(403, "GatedRepo", "Access is restricted"), None, {})], ["refuses access (403)", "hf auth login"]), "401": ([(refused(401, "RepoNotFound", "Invalid credentials"), None, {})], ["no such repository, or it is private"]),
    "gated content": ([(refused(403, "GatedRepo", "Access is restricted"), None, DATA)], ["refuses access"]), "gone": ([(refused(404, "RepoNotFound", "no"), None, {})], ["no such repository"]),
    "no revision": ([(refused(404, "RevisionNotFound", "no"), None, {})], ["does not have this revision", "no other version"]), "lists what it has not": ([(refused(404, "EntryNotFound", "no"), None, {"path": "/train.jsonl"})], ["404"]),
    "empty": ([(changed_json(lambda told: []), None, TREE)], ["cannot be loaded"]), "circle": ([(lambda a: redirected("/api/datasets/refused/circle")(a), None, {"path": "/api/"})], ["redirects in a circle"]),
    "circle of files": ([(redirected("/datasets/refused/circle-of-files/resolve/main/train.jsonl"), None, {"path": "/resolve/"})], ["circle"]),
    "no commit": ([(changed_json(lambda told: told | {"sha": None} if isinstance(told, dict) else told), None, {})], ["none"]), "a commit that is none": ([(changed_json(lambda told: told | {"sha": "../../x"} if isinstance(told, dict) else told), None, {})], ["which is none"]),
    "a hash that climbs": ([(other_headers(ETag='"../../../../evil"'), None, FILE)], ["evil", "which is none"]), "a hash of a large file that climbs": ([(other_headers(X_Linked_Etag='"../../../../evil"'), None, FILE)], ["which is none"]),
    "a hash that is a place": ([(other_headers(ETag='"/tmp/evil-place"'), None, FILE)], ["which is none"]), "an empty hash": ([(other_headers(ETag=""), None, FILE)], ["which is none"]), "a hash in capitals": ([(other_headers(ETag='"' + "A" * 40 + '"'), None, FILE)], ["cannot be checked"]),
    "a hash of another kind": ([(lambda a: a.__class__(a.status, a.headers | {"ETag": '"' + "a" * 32 + '"'}, a.body.replace(b"text 0", b"text 9")), None, FILE)], ["cannot be checked"]),
    "a commit that climbs": ([(other_headers(X_Repo_Commit="../../../../evil"), None, SIDE)], ["which is none"]), "a missing file of a commit that climbs": ([(missing_of("../../../../evil"), None, {"path": "/README"})], ["which is none"]),
    "another commit": ([(other_headers(X_Repo_Commit="d" * 40), None, SIDE)], ["answers with the commit " + "d" * 40]),
    "a window of a day": ([(status(429, RateLimit='"api";r=0;t=86400'), None, {})], ["asks to wait 86,400 seconds"]), "a window of a day for the content": ([(status(429, RateLimit='"resolvers";r=0;t=86400'), None, DATA)], ["asks to wait 86,400 seconds"]),
    "again and again": ([(status(503, Retry_After=1), None, TREE)], ["asks to wait 6 seconds in all"]),
    "402": ([(status(402), None, API)], ["answers 402, which is not what it should"]), "405 of files": ([(status(405), None, {"method": "HEAD"})], ["answers 405, which is not"]), "418 of files": ([(status(418), None, SIDE)], ["answers 418, which is not"]),
    "nothing": ([(changed_json(lambda told: None), None, API)], ["not a hub's answer"]), "a list of nothing": ([(changed_json(lambda told: [None] if isinstance(told, list) else told), None, TREE)], ["not a hub's answer"]), "a commit that is a number": ([(changed_json(lambda told: told | {"sha": 5} if isinstance(told, dict) else told), None, API)], ["which is none"]),
    "trickles": ([(trickle(0.05), None, DATA)], ["less than a kilobyte"]), "hangs": ([(hang(0.4), None, DATA)], ["no complete answer"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_is_one_sentence(case, ill, client):
    repo = f"refused/{case.replace(' ', '-')}"
    ill.add("datasets", repo, FILES)
    faults, words = REFUSED[case]
    for change, times, where in faults:
        ill.ill(repo, change, times, **where)
    impatient = "import os; os.environ['XTRANSFER_HUB_PATIENCE'] = '{}'; "
    answer = client((impatient.format(0.2) if case == "trickles" else "") + read(repo))
    said = answer.get("error", "")
    client.value(impatient.format(1))
    assert said and "\n" not in said and answer["slept"] < 120, answer
    assert not outside(client)
    assert repo in said and all(word in said for word in words), said
    assert len(ill.asked(repo)) < 80, "with a limit"


@pytest.mark.parametrize("page", ("again", "{}"), ids=["the same page", "ever new pages"])
def test_a_list_without_end(page, ill, client):
    repo, told = f"endless/{'same' if page == 'again' else 'new'}", []
    ill.add("datasets", repo, FILES)
    ill.ill(repo, lambda a: (told.append(1), other_headers(Link=f'<{ill.endpoint}/api/datasets/{repo}/tree/main?page={page.format(len(told))}>; rel="next"')(a))[1], None, **TREE)
    said = client("xtransfer.hub.MOST_PAGES = 30; " + read(repo))
    client.value("xtransfer.hub.MOST_PAGES = 1000")
    assert repo in said["error"] and "has no end" in said["error"] and len(told) < 40


def test_a_session_that_was_renewed_believes_no_more(ill, client):
    """The client renews its session when a connection fails, in the middle of a question."""
    commit = ill.add("datasets", "renewed/session", FILES)
    ill.ill("renewed/session", other_headers(ETag='"../../../../evil"'), None, **FILE)
    ask = f"huggingface_hub.close_session(); huggingface_hub.hf_hub_download('renewed/session', 'train.jsonl', repo_type='dataset', revision={commit!r})"
    said = client.value(f"""
def ask():
    {ask}
try:
    value = xtransfer.hub.patiently(ask)
except xtransfer.hub.Damaged as error:
    value = str(error)
""")
    assert "which is none" in said


def test_hashes_of_a_list_name_no_files(ill, client):
    """Through Xet, the client takes a file's name in the cache from the list of files, and asks for no hash."""
    commit = ill.add("models", "listed/names", {"config.json": "{}", "model.safetensors": b"x" * 3000})
    climbs = {"lfs": {"oid": "../../../../../../evil", "size": 3000, "pointerSize": 100}, "xetHash": "a" * 64}
    ill.ill("listed/names", changed_json(lambda told: [entry | climbs if entry["path"] == "model.safetensors" else entry for entry in told]), None, **TREE)
    assert client.value(f"import huggingface_hub; huggingface_hub.constants.HF_HUB_DISABLE_XET = False; value = len((xtransfer.hub.model_files('listed/names', {commit!r}, weights=True) / 'model.safetensors').read_bytes())") == 3000
    assert not outside(client)


def test_the_record_names_what_was_read(ill, client):
    """The branch moves between the look-up and the reading, and a hub that is ill is not called main."""
    first = ill.add("datasets", "moves/on", FILES)
    moved = []
    ill.ill("moves/on", lambda answer: (moved.append(ill.add("datasets", "moves/on", FILES | {"train.jsonl": ROWS.replace("text 0", "newer 0")})), answer)[1], 1, path="/api/datasets/moves/on/revision")
    assert client.value(read("moves/on")) == ["text 0", 300, first] and moved
    assert client.value(read("moves/on")) == ["newer 0", 300, moved[0]], "asked again, it is the new one, and said so"
    ill.ill("moves/on", status(500))
    assert client.value(read("moves/on")) == ["newer 0", 300, moved[0]], "the last known commit, from the cache"
    assert "answers 500" in client.error("value = resolved_revision(Source(repo='moves/on', revision='other'))")


def test_all_runs_of_a_study_read_the_same_version(ill, client):
    """What the study looked up when it began is handed to its runs, although the branch moves meanwhile."""
    first = ill.add("datasets", "moves/later", FILES)
    handed = client.value(read("moves/later") + "; value = looked_up_commits()")
    ill.add("datasets", "moves/later", FILES | {"train.jsonl": ROWS.replace("text 0", "newer 0")})
    assert client.value(f"import os; os.environ[COMMITS_VARIABLE] = {handed!r}; " + read("moves/later")) == ["text 0", 300, first]
    assert client.value("import os; del os.environ[COMMITS_VARIABLE]; " + read("moves/later"))[0] == "newer 0"


def test_a_revision_that_vanished(ill, client):
    commit = ill.add("datasets", "lost/commit", FILES)
    more = f", revision={commit!r}"
    assert client.value(read("lost/commit", more=more)) == ["text 0", 300, commit]
    ill.add("datasets", "lost/commit", FILES | {"train.jsonl": ROWS.replace("text 0", "newer 0")})
    del ill.repositories["datasets", "lost/commit"].commits[commit]
    assert client.value(read("lost/commit", more=more)) == ["text 0", 300, commit], "the cache still has it"
    said = client.error(read("lost/commit", more=f", revision={'e' * 40!r}"))
    assert "e" * 40 in said and "does not have this revision" in said and "newer" not in said


def test_another_file_under_the_same_name_and_commit(ill, client):
    commit = ill.add("datasets", "forged/set", FILES)
    assert client.value(read("forged/set"))[2] == commit
    ill.repositories["datasets", "forged/set"].commits[commit]["train.jsonl"] = ROWS.replace("text 0", "forged").encode()
    assert client.value(read("forged/set")) == ["text 0", 300, commit]


def test_a_renamed_repository_is_followed(ill, client):
    commit = ill.add("datasets", "new/name", FILES)
    ill.repositories["datasets", "old/name"] = ill.repositories["datasets", "new/name"]
    ill.ill("old/name", lambda answer: redirected("/api/datasets/new/name/revision/main")(answer), None, path="/api/datasets/old/name/revision")
    assert client.value(read("old/name")) == ["text 0", 300, commit]


def test_a_folder_of_that_name_is_not_taken_for_the_hub(ill, client, tmp_path):
    ill.add("datasets", "same/name", FILES)
    (tmp_path / "same/name").mkdir(parents=True)
    (tmp_path / "same/name/train.jsonl").write_text('{"text": "local"}\n')
    assert client.value(f"import os; os.chdir({str(tmp_path)!r}); " + read("same/name"))[0] == "text 0"


def test_damage_in_the_cache_is_found_and_mended(ill, client):
    """By `fetch`, whatever is damaged; by a reader, tables that were cut."""
    commit = ill.add("datasets", "worn/cache", FILES)
    client.value(read("worn/cache"))
    assert client.value("value = verify_cached(Source(repo='worn/cache'))") == []
    harm = "import datasets, os; from pathlib import Path; path = next(Path({0}).glob('{1}')); path = path.resolve(); text = path.read_bytes(); {2}; value = verify_cached(Source(repo='worn/cache'))"
    cache, hub = "datasets.config.HF_DATASETS_CACHE", "os.environ['HF_HOME'] + '/hub'"
    flip = "path.write_bytes(text.replace(b'text 1', b'text 7'))"
    for place, pattern, change, named in ((cache, f"worn___cache/*/*/{commit}/*.arrow", flip, "arrow"), (hub, "datasets--worn--cache/snapshots/*/train.jsonl", flip, "train.jsonl"), (hub, "datasets--worn--cache/snapshots/*/train.jsonl", "path.write_bytes(text[:-5])", "train.jsonl"),
                                          (cache, f"worn___cache/*/*/{commit}/*.arrow", "path.write_bytes(text[:-50])", "arrow")):
        assert any(named in name for name in client.value(harm.format(place, pattern, change)))
        assert client.value(read("worn/cache")) == ["text 0", 300, commit]
    client.value(f"import datasets; from pathlib import Path; path = next(Path(datasets.config.HF_DATASETS_CACHE).glob('worn___cache/*/*/{commit}/*.arrow')); path.write_bytes(path.read_bytes()[:-50])")
    assert client.value(read("worn/cache")) == ["text 0", 300, commit]


def test_without_network(ill, tmp_path):
    """Warm: the pinned version, or the one that was read last, silently and without waiting; cold: one sentence."""
    first = ill.add("datasets", "warm/set", FILES)
    around = ill.environment(tmp_path / "home") | {"XTRANSFER_DATA": str(tmp_path / "data")}
    online = Client(around)
    assert online.value(read("warm/set"))[2] == first
    second = ill.add("datasets", "warm/set", FILES | {"train.jsonl": ROWS.replace("text 0", "newer 0")})
    assert online.value(read("warm/set")) == ["newer 0", 300, second]
    online.close()
    for off in ({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        offline = Client(around | off)
        assert offline.value(read("warm/set")) == ["newer 0", 300, second]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "pins.json").write_text(json.dumps({"warm/set": first}))
        said = offline(read("warm/set"))
        assert said["value"] == ["text 0", 300, first] and not said["slept"], "an older pin is read exactly, and nobody is asked"
        (tmp_path / "data" / "pins.json").write_text(json.dumps({"warm/set": "d" * 40}))
        said = offline.error(read("warm/set"))
        assert "d" * 40 in said
        (tmp_path / "data" / "pins.json").unlink()
        said = offline.error(read("cold/set"))
        assert "cold/set" in said and ("HF_HUB_OFFLINE" in said or "no complete answer" in said)
        offline.close()


# ---- models and tokenizers -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The files of a tiny encoder."""
    import torch
    import transformers

    from xtransfer.world import world_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = world_tokenizer()
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LOAD = """
import transformers; transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
from xtransfer.backbones import read_backbone, hub_origin
from xtransfer.modeling import load_encoder, load_tokenizer
read_backbone.cache_clear(); backbone = read_backbone({0!r}); tokenizer = load_tokenizer(backbone); encoder = load_encoder(backbone, tokenizer, 0)
value = [float(encoder.get_input_embeddings().weight.sum()), len(tokenizer), hub_origin(backbone)]
"""
WEIGHTS = {"method": "GET", "path": "/model.safetensors"}
OF_MODELS = {
    "503": ([(status(503), None, {})], ["does not answer", "503"]), "503 of the weights": ([(status(503), None, WEIGHTS)], ["answers 503"]), "cut weights": ([(cut(3000), None, WEIGHTS)], ["no complete answer"]),
    "other weights": ([(wrong_bytes, None, WEIGHTS)], ["model.safetensors is not what the hub announced"]), "other tokenizer": ([(wrong_bytes, None, {"method": "GET", "path": "/tokenizer.json"})], ["tokenizer.json is not what"]),
    "page": ([(html, None, {})], ["not a hub's answer"]), "gated": ([(refused(403, "GatedRepo", "Access is restricted"), None, {})], ["refuses access"]), "no list": ([(changed_json(lambda told: []), None, TREE), (changed_json(lambda told: told | {"siblings": []} if isinstance(told, dict) else told), None, {"path": "/revision"})], ["config.json"]),
    "hash that climbs": ([(other_headers(ETag='"../../../../evil"'), None, {"path": "/model.safetensors"})], ["which is none"]), "another commit": ([(other_headers(X_Repo_Commit="d" * 40), None, SIDE)], ["cannot be had: the hub answers with the commit " + "d" * 40]),
    "402": ([(status(402), None, SIDE)], ["cannot be had", "answers 402, which is not what it should"]), "window of a day": ([(status(429, RateLimit='"resolvers";r=0;t=86400'), None, WEIGHTS)], ["asks to wait 86,400 seconds"]), "nothing": ([(changed_json(lambda told: None), None, API)], ["not a hub's answer"]),
    "no tokenizer": ([(refused(404, "EntryNotFound", "no"), None, {"path": "/tokenizer"})], ["tiny"]),
}


def test_models_are_read_by_the_same_rules(ill, client, model):
    commit = ill.add("models", "well/tiny", model)
    ill.ill("well/tiny", status(503), 3)
    ill.ill("well/tiny", cut(2000), 1, **WEIGHTS)
    found = client.value(LOAD.format("well/tiny"))
    assert found[2] == f"well/tiny@{commit}"
    ill.well()
    ill.ill("well/tiny", status(500))
    asked = len(ill.asked("well/tiny"))
    assert client.value(LOAD.format("well/tiny")) == found, "from the cache, at the commit that main was"
    assert all("/revision/" in path for path in ill.asked("well/tiny")[asked:]), "only what main is was asked"
    ill.well()


@pytest.mark.parametrize("case", OF_MODELS)
def test_a_model_that_cannot_be_had(case, ill, client, model):
    repo = f"{case.replace(' ', '-')}/tiny"
    ill.add("models", repo, model)
    for change, times, where in OF_MODELS[case][0]:
        ill.ill(repo, change, times, **where)
    said = client.error(LOAD.format(repo))
    assert repo in said and all(word in said for word in OF_MODELS[case][1]), said


# ---- fetch -----------------------------------------------------------------------------------------------------------------

DECLARED = """
from xtransfer.backbones import BACKBONES
from xtransfer.sources import Source, hub_loader
from xtransfer.studies import STUDIES, Contrast, Recipe, Stage, Study, StudyDeclaration, intermediate_cells
from xtransfer.tasks import TASKS, Task, text_pair
for name in ("first", "second", "third"):
    source = Source(repo=f"fetched/{name}")
    TASKS.register(Task(name=name, format="sequence_classification", kind="toy", source=source, languages=("en", "de"), load=hub_loader(source, None, {"train": "train", "dev": "train[:20]", "test": "train[20:40]"}),
                        read=text_pair("text"), labels=("yes", "no"), metrics=("accuracy",), headline=("accuracy",), trains_on=name))
recipe = Recipe(name="toy", learning_rate=1e-3, batch_size=8, max_steps=2)
def build():
    arms = {"none": (), "first": (Stage(train=("first",), recipe=recipe, seed=0),)}
    return Study(name="own", profile="mini", question="?", cells=intermediate_cells("fetched/tiny", arms, {"second": recipe, "third": recipe}, (), (0,)), contrasts=(Contrast(treatment="first", baseline="none"),))
STUDIES.register(StudyDeclaration(name="own", question="?", profiles={"mini": build}))
"""
SHORT = "import time; sleep = time.sleep; time.sleep = lambda seconds: sleep(min(seconds, 0.01)); import sys; from xtransfer.cli import main; sys.exit(main())"


def fetch(environment, declared, *more):
    """The command as an open process, with short pauses."""
    around = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, "-c", SHORT, "fetch", "own", "--declare", str(declared), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=around, start_new_session=True)


def test_fetch_goes_on_where_it_stopped_and_verifies(model, tmp_path):
    declared, data = tmp_path / "own.py", tmp_path / "data"
    declared.write_text(DECLARED)
    with IllHub() as ill:
        around = ill.environment(tmp_path / "home") | {"XTRANSFER_DATA": str(data)}
        commits = {name: ill.add("datasets", f"fetched/{name}", FILES | {"train.jsonl": ROWS.replace("text ", f"{name} ")}) for name in ("first", "second", "third")}
        weights = ill.add("models", "fetched/tiny", model)
        slow = ill.ill("fetched/third", hang(60), None, **DATA)
        killed = fetch(around | {"HF_HUB_DOWNLOAD_TIMEOUT": "100"}, declared)
        until = time.monotonic() + 120
        while not slow.seen and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        finished(killed)
        ill.well()
        before = len(ill.log)
        ill.ill("fetched/third", status(503))
        code, out, err = finished(fetch(around, declared))
        assert code == 1 and "Traceback" not in err and all("fetched/third" in line for line in err.strip().splitlines()) and len(err.strip().splitlines()) == 3, out + err
        assert "second en train: complete" in out and "first en train: complete" in out
        assert not [path for verb, path in ill.log[before:] if verb == "GET" and path.endswith(("/train.jsonl", "/model.safetensors")) and ("second" in path or "tiny" in path)], "what is there is not fetched again"
        ill.well()
        code, out, err = finished(fetch(around, declared))
        assert code == 0 and "missing" not in out, out + err
        pinned = json.loads((data / "pins.json").read_text())
        assert pinned == {**{f"fetched/{name}": commit for name, commit in commits.items()}, "models/fetched/tiny@main": weights}
        for name, files in {"second": FILES | {"train.jsonl": ROWS.replace("text ", "newer ")}}.items():
            ill.add("datasets", f"fetched/{name}", files)
        ill.add("models", "fetched/tiny", model | {"README.md": b"newer"})
        blob = next((tmp_path / "home/hub/datasets--fetched--second/snapshots").glob("*/train.jsonl")).resolve()
        blob.write_bytes(blob.read_bytes()[:-3] + b"???")
        code, out, err = finished(fetch(around, declared))
        assert code == 0 and "fetched/second: 2 damaged files" in out and json.loads((data / "pins.json").read_text()) == pinned, out + err
        assert hashlib.sha1(b"blob %d\0" % blob.stat().st_size + blob.read_bytes()).hexdigest() == blob.name
    code, out, err = finished(fetch(around | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, declared))
    assert code == 0 and not err.strip(), out + err


def test_a_hub_behind_an_ill_one(hub, tmp_path):
    """The stand-in hub through a proxy that fails: the same rows, or one sentence."""
    with IllHub(upstream=hub["HF_ENDPOINT"]) as ill:
        client = Client(ill.environment(tmp_path) | {"XTRANSFER_DATA": str(tmp_path / "data")})
        ask = "source = Source(repo='google/xquad'); value = [len(hub_rows(source, 'xquad.de', 'validation')), len(resolved_revision(source))]"
        ill.ill("google/xquad", status(503), 3), ill.ill("google/xquad", cut(5000), 2, method="GET", path="/resolve/")
        assert client.value(ask) == [1190, 40]
        ill.ill("google/xquad", wrong_bytes, None, method="GET", path="/resolve/")
        assert "not what the hub announced" in client.error(ask.replace(".de", ".zh"))
        client.close()
