"""What every declared study promises: comparisons of arms that it has, factors for each, profiles that build; and other seeds."""
import pytest

import xtransfer.catalogue  # noqa: F401
from xtransfer.catalogue import SIX_QUESTIONS
from xtransfer.claims import CLAIMS
from xtransfer.cli import main
from xtransfer.sections import ANSWERS
from xtransfer.studies import STUDIES, with_seeds

BUILT = [(name, profile) for name in STUDIES for profile in STUDIES[name].profiles]


@pytest.mark.parametrize(("name", "profile"), BUILT, ids=["-".join(pair) for pair in BUILT])
def test_a_study_compares_arms_that_it_has(name, profile):
    study = STUDIES[name].build(profile)
    arms = {cell.arm for cell in study.declared}
    assert {arm for contrast in study.contrasts for arm in (contrast.treatment, contrast.baseline)} <= arms
    assert len(set(study.contrasts)) == len(study.contrasts) and not set(study.factors) - arms
    assert len({(cell.arm, cell.target, cell.seed) for cell in study.declared}) == len(study.declared)
    assert not set(study.claims) - {claim.partition(".")[0] for claim in CLAIMS}
    assert {cell.run.stage.template for cell in study.probes} <= {"probe"} and len({run.id for run in study.plan()}) == len(study.plan())


def test_each_of_the_six_questions_has_an_answer_of_its_own():
    import xtransfer.report  # noqa: F401  registers the answers

    assert set(SIX_QUESTIONS) <= set(ANSWERS)
    for name in SIX_QUESTIONS:
        assert {"mini", "small", "paper"} <= set(STUDIES[name].profiles) and len({cell.seed for cell in STUDIES[name].build("mini").cells}) >= 3


@pytest.mark.parametrize("profile", ["mini", "paper"])
def test_schedules_of_a_target_have_equal_budgets(profile):
    spent = {}
    for cell in STUDIES["multitask"].build(profile).cells:
        updates = [stage.recipe.max_steps for stage in cell.run.stages if stage.train and stage.train != ("world_text",)]
        spent.setdefault(cell.target, set()).add(sum(updates))
    assert all(len(found) == 1 for found in spent.values()), spent


def test_sets_of_the_world_are_all_there_are_and_have_equal_budgets():
    study = STUDIES["diversity"].build("mini")
    assert len({factors["members"] for factors in study.factors.values()}) == 16
    assert {stage.recipe.max_steps for cell in study.cells for stage in cell.run.stages[1:-1]} == {300}


def test_other_seeds_are_other_runs(capsys):
    study = STUDIES["diversity"].build("mini")
    again = with_seeds(study, (7, 8))
    assert {cell.seed for cell in (*again.cells, *again.probes)} == {7, 8} and {stage.seed for run in again.plan() for stage in run.stages} == {7, 8}
    assert not {run.digest for run in again.plan()} & {run.digest for run in study.plan()}
    assert {run.digest for run in with_seeds(study, (0, 1, 2)).plan()} == {run.digest for run in study.plan()}
    small = STUDIES["stilts"].build("small")  # its seeds have one pretraining in common
    assert {run.digest for run in with_seeds(small, (0, 1, 2)).plan()} == {run.digest for run in small.plan()}
    assert {run.digest for run in with_seeds(small, (7,)).plan()} & {run.digest for run in small.plan()} == {small.plan()[0].digest}
    for wrong, said in (("1,x", "takes whole numbers"), ("1,1", "different whole numbers")):
        assert main(["plan", "diversity", "--seeds", wrong]) == 1 and said in capsys.readouterr().err
