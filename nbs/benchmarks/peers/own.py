"""This package's own side of the comparisons of whole processes: tiny runs, and independent runs with several workers."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

TRAINING = {"learning_rate": 1e-3, "batch_size": 16, "max_length": 64, "evaluations": 1, "dev_limit": 16}


def runs(number, steps, examples=64, scored=16):
    """Independent runs on the synthetic world: random weights, a short training, English scores; one seed each."""
    import xtransfer.catalogue  # noqa: F401
    from xtransfer.studies import Recipe, Run, Stage

    recipe = Recipe(name="tiny", max_steps=steps, **TRAINING)
    return [Run(backbone="world-xlmr", stages=(Stage(train=("world_xnli",), score=("world_xnli",), recipe=recipe, seed=seed, languages=("en",), train_limit=examples, score_limit=scored),)) for seed in range(number)]


def tiny(number, steps):
    """Seconds that `execute` takes for tiny runs, from the start of this process on, and their scores."""
    from xtransfer.runs import execute

    with tempfile.TemporaryDirectory() as folder:
        records = [execute(run, folder, threads=1, keep_checkpoint=False) for run in runs(number, steps)]
    return [[score.value for score in record.scores] for record in records]


def fresh(seeds, steps):
    """The same runs as papermill executes a notebook out of the box: a kernel of its own for each."""
    import papermill

    from xtransfer.runs import run_parameters, template_path

    os.environ.pop("JUPYTER_DEFAULT_PROVISIONER_NAME", None)
    found = []
    for run in runs(max(seeds) + 1, steps):
        if run.stage.seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                papermill.execute_notebook(str(template_path(run.template)), str(Path(folder) / "notebook.ipynb"), parameters=run_parameters(run, 1, False), kernel_name="python3", progress_bar=False, cwd=folder)
                found.append([score["value"] for score in json.loads((Path(folder) / "results.json").read_text())["scores"]])
    return found


def workers(number, steps, counts, rounds):
    """Seconds of independent runs with so many workers, by the clock on the wall, and their scores; one run beforehand starts the warm process."""
    from xtransfer.records import study_records
    from xtransfer.runs import run_study
    from xtransfer.speed import measure
    from xtransfer.studies import Cell, Study

    def study(seeds):
        cells = tuple(Cell(arm="none", target="world_xnli", seed=run.stage.seed, run=run) for run in runs(number, steps, 512, 200) if run.stage.seed in seeds)
        return Study(name="independent", profile="speed", question="", cells=cells, contrasts=())

    def way(count):
        def run(folder):
            with folder:
                outcome = run_study(study(range(number)), folder.name, workers=count, threads=1, report=lambda line: None)
                assert not outcome.failed, outcome.failed
                return [[score.value for score in record.scores] for _, record in sorted(study_records(study(range(number)), folder.name)[0].items())]
        return tempfile.TemporaryDirectory, run

    with tempfile.TemporaryDirectory() as folder:
        run_study(study([0]), folder, workers=1, threads=1, report=lambda line: None)
    found = measure({str(count): way(count) for count in counts}, rounds, warm_up=False)
    return {"wall": found.wall, "scores": found.answers}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tiny", "fresh", "workers"))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--counts", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    begun = time.perf_counter()
    found = tiny(asked.runs, asked.steps) if asked.what == "tiny" else fresh(asked.seeds, asked.steps) if asked.what == "fresh" else workers(asked.runs, asked.steps, asked.counts, asked.rounds)
    print(json.dumps({"seconds": time.perf_counter() - begun, "found": found}))


if __name__ == "__main__":
    main()
