"""The declaration of the small study of row 11, as a user would write it; what it is about stands in grid.json beside it."""

import json
from pathlib import Path

from xtransfer.recipes import against
from xtransfer.sources import Source, file_loader, json_lines
from xtransfer.studies import STUDIES, Recipe, Stage, Study, StudyDeclaration, intermediate_cells
from xtransfer.tasks import TASKS, Task

ABOUT = json.loads(Path(__file__).with_name("grid.json").read_text())
FILES = Source(repo="files/grid", license="that of the data")
KINDS = {"nli": ("sequence_classification", ("entailment", "neutral", "contradiction"), "accuracy", ("accuracy",)),
         "ner": ("token_classification", ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"), "chunk_f1", ("f1",)),
         "qa": ("span_extraction", (), "squad", ("exact_match", "f1"))}


def reader(kind):
    """Rows of a kind: one file for training and development, one for each language's test."""
    return lambda folder, language, split: list(json_lines(folder / f"{kind}-{language if split == 'test' else 'train'}.json"))


for kind, (format, labels, metric, headline) in KINDS.items():
    TASKS.register(Task(name=f"grid_{kind}", format=format, kind=kind, source=FILES, languages=tuple(ABOUT["languages"]), load=file_loader(FILES, ("train", "dev", "test"), reader(kind)), read=dict,
                        labels=labels, metrics=(metric,), headline=headline, trains_on=f"grid_{kind}"))

RECIPE = Recipe(name="grid", learning_rate=2e-5, batch_size=32, epochs=1.0, max_length=128, evaluations=1, dev_limit=8, selection="last")
ARMS = {"none": ()} | {kind: (Stage(train=(f"grid_{kind}",), recipe=RECIPE, seed=0),) for kind in ("nli", "qa")}
QUESTION = "How long does a small study take?"


def study():
    cells = intermediate_cells(ABOUT["checkpoint"], ARMS, {f"grid_{kind}": RECIPE for kind in KINDS}, (), (0,))
    return Study(name="grid", profile="mini", question=QUESTION, cells=cells, contrasts=against("none", tuple(ARMS)))


STUDIES.register(StudyDeclaration(name="grid", question=QUESTION, profiles={"mini": study}))
