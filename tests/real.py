"""Two studies on real data for tests: a part of `stilts small`, and one without pretraining on public data alone."""

from dataclasses import replace

from xtransfer.recipes import against
from xtransfer.studies import STUDIES, Run, Study, StudyDeclaration


def cut() -> Study:
    """One seed, two arms on all targets, and a task that no public hub has."""
    whole = STUDIES["stilts"].build("small")
    cells = tuple(c for c in whole.declared if c.seed == 0 and (c.arm in ("none", "squad") or (c.arm, c.target) == ("tagging", "tatoeba")))
    return replace(whole, name="cut", cells=cells, contrasts=against("none", ("squad",)), inapplicable=())


def public() -> Study:
    """XLM-R's tokenizer over random weights, one arm, four targets."""
    whole = STUDIES["stilts"].build("small")
    cells = tuple(replace(c, run=Run(backbone="xlm-r-random-small", stages=c.run.stages[1:])) for c in whole.declared if c.seed == 0 and c.arm == "none" and c.target in ("xnli", "xquad", "panx", "tatoeba"))
    return replace(whole, name="public", cells=cells, contrasts=(), inapplicable=())


for build in (cut, public):
    STUDIES.register(StudyDeclaration(name=build.__name__, question=STUDIES["stilts"].question, profiles={"small": build}))
