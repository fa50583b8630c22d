"""Figures hold what the tables hold, and nothing is printed over anything else."""
import itertools
import subprocess
import sys

import numpy as np
import pytest

from xtransfer.analysis import by_language, headline, paired_gains, simulate_scores, transfer_gain
from xtransfer.core import XtransferError
from xtransfer.languages import LANGUAGES
from xtransfer.plots import arm_colours, plot_distance, plot_gains, plot_languages, plot_loss, plot_seeds, signed
from xtransfer.studies import Contrast

ARMS = ("nli", "qa", "mc", "tagging", "multi", "multi+mlm", "mlm")
TARGETS = ("xnli", "pawsx", "udpos", "panx", "xquad", "tatoeba", "bucc2018")


def study(languages=("en", "de", "es", "ru", "ar", "sw", "ja")):
    gains = {arm: {target: (i - 3) * 1.5 + j for j, target in enumerate(TARGETS)} for i, arm in enumerate(ARMS)}
    scores = simulate_scores(gains, languages=languages, retrieval=TARGETS[-2:])
    values = headline(scores, {target: ("accuracy",) for target in TARGETS})
    contrasts = [Contrast(treatment=arm, baseline="none") for arm in ARMS] + [Contrast(treatment="multi+mlm", baseline="mlm")]
    return scores, values, contrasts


def overlaps(texts):
    """Pairs of visible texts whose boxes intersect."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible() and text.get_text().strip()]
    return [(a, b) for (a, box), (b, other) in itertools.combinations(boxes, 2) if box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9))]


def tick_labels(axes):
    return [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]


def test_heatmap_cells_hold_the_table():
    _, values, contrasts = study()
    gains = transfer_gain(values[(values["arm"] != "mc") | (values["target"] != "xquad")], contrasts, allow_partial=True, resamples=200)
    figure = plot_gains(gains, TARGETS)
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.axes[0].texts]
    for _, row in gains.iterrows():
        assert row["verdict"] == "missing" or any(text.startswith(signed(row["gain"])) for text in texts)
    assert texts.count("missing") == 1
    assert sum("*" in text for text in texts) == gains["verdict"].isin(["helps", "hurts"]).sum()
    assert sum("†" in text for text in texts) == (gains["partial"] & gains["gain"].notna()).sum()
    assert [label.get_text().replace("\n", "_") for label in figure.axes[0].get_xticklabels()] == [*TARGETS, "average", "average_without_retrieval"]
    assert not overlaps(figure.axes[0].texts) and not overlaps(tick_labels(figure.axes[0]))


def test_heatmap_tells_missing_from_not_applicable():
    _, values, contrasts = study()
    cannot = [("mc", target) for target in TARGETS] + [(arm, "xquad") for arm in ("none", *ARMS)]
    there = values[[place not in cannot for place in zip(values["arm"], values["target"])]]
    gains = transfer_gain(there[(there["arm"] != "nli") | (there["target"] != "panx")], contrasts, allow_partial=True, resamples=200, inapplicable=cannot)
    figure = plot_gains(gains, TARGETS)
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.axes[0].texts]
    columns = len(TARGETS) + 2
    assert texts.count("not\napplicable") == columns + len(contrasts) - 1 and texts.count("missing") == 1
    assert sum("‡" in text for text in texts) == 2 * (len(contrasts) - 1) and not overlaps(figure.axes[0].texts)
    seeds = plot_seeds(gains, paired_gains(there, contrasts, True, cannot), TARGETS)
    assert sum(text.get_text() == "not applicable" for axes in seeds.axes for text in axes.texts) == columns - 2 + len(contrasts) - 1


def test_distance_figure_shows_every_score_without_overlap():
    for languages in (("en", "de", "es", "ru", "ar", "sw", "ja"), tuple(LANGUAGES)[:20]):
        _, values, contrasts = study(languages)
        figure = plot_distance(by_language(values, contrasts), "syntactic", TARGETS)
        figure.canvas.draw()
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title(loc="left") for axes in panels] == list(TARGETS)
        for axes in panels:
            assert sum(len(c.get_offsets()) for c in axes.collections if hasattr(c, "get_offsets") and c.get_label() != "" and len(c.get_offsets()) == len(languages)) == len(languages) * len(ARMS)
            assert not overlaps(axes.get_xticklabels())


def test_seed_dots_are_the_seed_means():
    _, values, contrasts = study()
    pairs = paired_gains(values, contrasts)
    figure = plot_seeds(transfer_gain(values, contrasts, resamples=200), pairs, TARGETS)
    zero_shot = pairs[(pairs["language"] != "en") & (pairs["target"] == "xnli") & (pairs["treatment"] == "qa")]
    wanted = zero_shot.groupby("seed")["gain"].mean().to_numpy()
    drawn = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert any(len(x) == 3 and np.allclose(np.sort(x), np.sort(wanted)) for x in drawn)


def test_colours_do_not_depend_on_order():
    assert arm_colours(ARMS) == arm_colours(("none", *reversed(ARMS))) and len(set(map(tuple, [arm_colours(ARMS)[arm] for arm in ARMS]))) == len(ARMS)


def test_loss_marks_the_best_dev_score_and_takes_any_rows():
    figure = plot_loss([{"step": 2, "loss": 1.0, "tokens": 5}, {"step": 1, "loss": 2.0}, {"step": 1, "dev": 30.0, "tasks": {"a": 30.0}}, {"step": 2, "dev": 20.0}])
    assert any("best 30.0" in text.get_text() for text in figure.axes[1].texts)
    with pytest.raises(XtransferError, match="neither"):
        plot_loss([])


def test_language_bars_are_ordered_by_distance_and_hold_the_values():
    scores, _, _ = study()
    run = scores[(scores["arm"] == "qa") & (scores["seed"] == 0) & (scores["target"] == "xquad")].assign(task="toy", metric="f1")
    figure = plot_languages(run.to_dict("records"))
    assert [label.get_text().split("\n")[0] for label in figure.axes[0].get_xticklabels()] == ["en", "de", "es", "ru", "ar", "ja", "sw"]
    by_code = run.set_index("language")["value"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [by_code[code] for code in ["en", "de", "es", "ru", "ar", "ja", "sw"]]
    with pytest.raises(XtransferError, match="no dev scores"):
        plot_languages(run, split="dev")


def test_no_torch_and_no_window():
    check = "import sys, xtransfer.plots; print([m for m in ('torch', 'transformers', 'datasets', 'evaluate') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
