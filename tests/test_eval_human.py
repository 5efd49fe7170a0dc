# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: known answers of its statistics and measures, and whole runs on the embedded world with few steps."""

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"

import benchmark
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import AutoencoderKL
from tiny_human.figures import ATTRIBUTES, draw


ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / "tests" / "tiny_human"
SPEC = importlib.util.spec_from_file_location("eval_human", ROOT / "eval_human.py")
ev = importlib.util.module_from_spec(SPEC)
sys.modules["eval_human"] = ev
SPEC.loader.exec_module(ev)
torch.set_num_threads(1)

PLUGINS = """
import numpy as np

def brightness(device):
    return lambda images, prompts: [float(np.asarray(image).mean()) for image in images]

def picky(device):
    names = {"veto": -np.inf, "unsure": np.nan}
    return lambda images, prompts: [
        next((v for word, v in names.items() if word in p), float(np.asarray(i).std()))
        for i, p in zip(images, prompts)
    ]

def short(device):
    return lambda images, prompts: [0.0]
"""
PROMPTS = [f"a standing person in a {shirt} shirt" for shirt in ("red", "blue", "green", "yellow", "purple", "orange")]


# ---- Statistics ----------------------------------------------------------------------------------------------------


def test_win_rate_is_one_a_half_and_zero():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0])
    assert [ev.win_rate(a, b), ev.win_rate(a, a), ev.win_rate(b, a)] == [1.0, 0.5, 0.0]
    np.testing.assert_array_equal(ev.outcomes(np.array([1.0, 1, 0, np.nan]), np.array([0.0, 1, 1, 0])), [1, 0.5, 0])


def test_win_rates_of_both_sides_sum_to_one():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 100).astype(float), rng.integers(0, 4, 100).astype(float)
    a[:5], b[3:9], a[20:25] = np.nan, np.nan, -np.inf
    assert 0 < ev.win_rate(a, b) < 1
    assert ev.win_rate(a, b) + ev.win_rate(b, a) == pytest.approx(1)


def test_vetoed_never_wins_and_nan_is_used_for_neither_side():
    veto, nan, low = np.array([-np.inf]), np.array([np.nan]), np.array([-1e9])
    assert ev.win_rate(veto, low) == 0
    assert ev.win_rate(veto, veto) == 0.5
    assert np.isnan(ev.win_rate(nan, low))
    assert ev.win_rate(np.array([np.nan, 2.0]), np.array([5.0, 1.0])) == 1
    assert ev.mean(np.array([-np.inf, np.nan, 3.0, 1.0])) == 2


def test_prompt_mean_leaves_nan_and_vetoes_out():
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, -np.inf, 2.0])
    means = ev.per_prompt(values, np.array([0, 0, 1, 1, 2, 3, 3]))
    np.testing.assert_array_equal(means, [2.0, 5.0, np.nan, 2.0])
    np.testing.assert_array_equal(ev.per_prompt(np.array([-np.inf, np.nan]), np.array([0, 0])), [-np.inf])
    np.testing.assert_array_equal(ev.per_prompt(np.array([[1.0, 2], [3, 6]]), np.array([0, 0])), [[2.0, 4.0]])


def test_fewer_vetoed_images_win_then_the_higher_mean():
    shares = np.array([1, 0.75, 0.75, 0.25, 0, 0, np.nan]), np.array([0.75, 0.75, 0.75, 0, 0, 0.25, 0])
    means = np.array([-np.inf, 5, 1, 9, 3, -9, np.nan]), np.array([-9.0, 4, 1, -9, 4, 9, 1])
    np.testing.assert_array_equal(ev.outcomes(*ev.worth(means, shares)), [0, 1, 0.5, 0, 0, 1])
    plain = ev.worth(means, [np.zeros(7)] * 2)
    np.testing.assert_array_equal(plain[1], means[1])
    all_vetoed = ev.worth([np.full(2, -np.inf)] * 2, [np.ones(2)] * 2)
    np.testing.assert_array_equal(ev.outcomes(*all_vetoed), [0.5, 0.5])


def test_more_images_of_a_prompt_see_fewer_vetoes_better():
    """300 prompts, of base's images 60 % vetoed, of tuned's 45 %."""
    rng, rates = np.random.default_rng(0), []
    for count in (1, 8):
        prompt_ids, sides = np.repeat(np.arange(300), count), {}
        for name, share in (("base", 0.6), ("tuned", 0.45)):
            values = np.where(rng.random(len(prompt_ids)) < share, -np.inf, rng.random(len(prompt_ids)))
            features = np.zeros((len(prompt_ids), 1))
            sides[name] = {
                "people": values,
                "colour": np.zeros((len(prompt_ids), len(ev.COLOUR_COLUMNS))),
                "features": features,
            }
        row = ev.compare(*ev.per_prompt_means(sides, ["people"], prompt_ids, 0.5).values(), "people")
        assert row["vetoed"] == pytest.approx([0.6, 0.45], abs=0.08)
        rates.append(row["win_rate"])
    assert rates[0] > 0.52
    assert rates[1] > rates[0] + 0.05


def test_interval_of_wins_alone_has_a_width():
    assert ev.win_interval(np.ones(8)) == (pytest.approx(scipy.stats.binomtest(8, 8).proportion_ci().low), 1.0)
    assert ev.win_interval(np.zeros(8)) == (0.0, pytest.approx(scipy.stats.binomtest(0, 8).proportion_ci().high))
    assert ev.win_interval(np.full(8, 0.5)) == (0.5, 0.5)
    assert np.isnan(ev.win_interval(np.zeros(0))).all()


@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(0, 0, 3), (1, 0, 0), (5, 5, 2), (14, 6, 0), (130, 170, 9), (0, 40, 1)]
)
def test_sign_test_equals_the_binomial_test(wins, losses, ties):
    a = np.array([1.0] * wins + [0.0] * losses + [7.0] * ties + [np.nan])
    b = np.array([0.0] * wins + [1.0] * losses + [7.0] * ties + [1.0])
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
    assert ev.sign_test(a, b) == pytest.approx(expected, rel=1e-9)


def test_wilcoxon_equals_scipy():
    rng = np.random.default_rng(1)
    a, b = np.round(rng.normal(0.3, 1, 80), 1), np.round(rng.normal(0, 1, 80), 1)  # rounded: with ties and zeros
    expected = scipy.stats.wilcoxon(a, b, method="asymptotic", correction=False).pvalue
    assert ev.wilcoxon(a, b) == pytest.approx(expected, rel=1e-9)
    assert ev.wilcoxon(a, a) == 1


@pytest.mark.parametrize("count", [1, 5, 12, 50])
def test_wilcoxon_of_few_prompts_is_exact(count):
    rng = np.random.default_rng(count)
    a, b = rng.normal(0.4, 1, count), rng.normal(0, 1, count)
    expected = scipy.stats.wilcoxon(a, b, method="exact").pvalue
    assert ev.wilcoxon(a, b) == pytest.approx(expected, rel=1e-9)


def test_wilcoxon_of_few_prompts_is_exact_with_ties():
    a, b = np.array([3.0, 2, 2, -1, 1, 4, 0, -2, np.nan]), np.zeros(9)
    ranks = scipy.stats.rankdata(np.abs(a[:8][a[:8] != 0]))
    sums = np.array([np.dot(ranks, signs) for signs in itertools.product([0, 1], repeat=7)])
    won = ranks[a[:8][a[:8] != 0] > 0].sum()
    expected = 2 * np.mean(sums >= won)
    assert ev.wilcoxon(a, b) == pytest.approx(expected, rel=1e-9)
    assert ev.wilcoxon(b, a) == pytest.approx(expected, rel=1e-9)


def test_holm_by_hand():
    assert ev.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert ev.holm([0.7, 0.6]) == [1, 1]


def test_bootstrap_interval_covers_the_truth_with_prompts_as_units():
    """200 draws of 50 prompts with 4 equal seeds: prompts cover at 95 %, images taken for units do not."""
    rng = np.random.default_rng(0)
    covered = {"prompts": 0, "images": 0}
    for _ in range(200):
        prompts = rng.normal(size=50)
        for unit, sample in (("prompts", prompts), ("images", np.repeat(prompts, 4))):
            low, high = ev.bootstrap_interval(np.mean, sample, resamples=300)
            covered[unit] += low <= 0 <= high
    assert 0.88 <= covered["prompts"] / 200 <= 0.99
    assert covered["images"] / 200 < 0.8


def test_bootstrap_draws_the_rows_of_all_samples_together():
    a = np.random.default_rng(0).normal(size=30)
    assert ev.bootstrap_interval(lambda x, y: ev.mean(x - y), a + 1, a) == pytest.approx((1, 1))
    low, high = ev.bootstrap_interval(ev.win_rate, a, np.zeros(30))
    assert 0 < low < ev.win_rate(a, np.zeros(30)) < high < 1
    assert np.isnan(ev.bootstrap_interval(ev.mean, np.array([]))).all()


def test_two_hundred_prompts_find_a_win_rate_of_sixty_percent():
    assert ev.smallest_detectable_win_rate(200) == pytest.approx(0.6, abs=0.002)


def test_the_smallest_win_rate_among_many_metrics_is_found_four_times_in_five():
    rate = ev.smallest_detectable_win_rate(200, metrics=8)
    wins = np.random.default_rng(0).binomial(200, rate, 2000)
    found = [ev.sign_test(np.repeat([1, 0], [w, 200 - w]), np.repeat([0, 1], [w, 200 - w])) < 0.05 / 8 for w in wins]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


# ---- Colour and diversity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_known_colours(rgb, lab):
    np.testing.assert_allclose(ev.srgb_to_lab(np.array(rgb, float)), lab, atol=0.02)


def test_hue_goes_around_the_circle():
    assert ev.hue_distance(350.0, 10.0) == 20
    assert ev.hue_distance(10.0, 350.0) == 20
    assert ev.hue_distance(77.0, 77.0) == 0
    assert ev.hue_distance(0.0, 180.0) == 180
    assert ev.circular_mean(np.array([350.0, 20.0, np.nan])) == pytest.approx(5)
    assert np.isnan(ev.circular_mean(np.array([np.nan])))


def solid(*rgb: int) -> np.ndarray:
    return np.full((8, 8, 3), rgb, dtype=np.uint8)


@pytest.mark.parametrize(
    ("rgb", "hue"), [((200, 0, 0), 0), ((0, 200, 0), 120), ((0, 0, 200), 240), ((200, 0, 199), 300.3)]
)
def test_colour_of_a_plain_image(rgb, hue):
    colour = ev.colour_statistics(solid(*rgb))
    assert ev.hue_distance(colour["hue"], hue) == pytest.approx(0, abs=0.1)
    assert colour["saturation"] == pytest.approx(1)
    assert colour["sharpness"] == 0
    assert (colour["red"], colour["green"], colour["blue"]) == pytest.approx(rgb)


def test_grey_has_no_hue_and_clipped_pixels_are_counted():
    half = np.concatenate([solid(128, 128, 128), solid(255, 255, 255)])
    colour = ev.colour_statistics(half)
    assert np.isnan(colour["hue"])
    assert colour["chroma"] == pytest.approx(0, abs=1e-3)
    assert colour["clipped"] == 0.5


def test_laplacian_of_a_point():
    """One point of height 9 in 5 x 5 zeros: once -36, four times 9, mean 0, so std = sqrt((36^2 + 4 * 81) / 25)."""
    grey = np.zeros((5, 5))
    grey[2, 2] = 9
    assert ev.laplacian_std(grey) == pytest.approx(np.sqrt((36**2 + 4 * 81) / 25))
    assert ev.laplacian_std(np.full((5, 5), 3.0)) == 0


def test_latent_shift_is_in_units_of_base_std():
    rng = np.random.default_rng(0)
    means, std = rng.normal(size=(20, 4)), np.array([1.0, 2.0, 4.0, 8.0])
    assert ev.latent_shift(means, means, std) == 0
    assert ev.latent_shift(means, means + 0.5 * std, std) == pytest.approx(0.5)
    assert ev.latent_shift(means, means + np.array([0, 0, 0, 8.0]), std) == pytest.approx(0.25)


def test_latent_std_is_that_of_all_pixels():
    pixels = np.random.default_rng(0).normal(size=(6, 3, 50)) + np.arange(6)[:, None, None]
    np.testing.assert_allclose(
        ev.latent_std(pixels.mean(-1), pixels.std(-1)), pixels.transpose(1, 0, 2).reshape(3, -1).std(-1)
    )


def test_colour_shift_between_models():
    base = np.random.default_rng(0).normal(size=(40, 3)) * 10
    assert ev.delta_e(base, base) == 0
    assert ev.delta_e(base, base + np.array([3.0, 4.0, 0.0])) == pytest.approx(5)
    hues = np.array([350.0, 355.0, 5.0])
    assert ev.hue_shift(hues, (hues + 30) % 360) == pytest.approx(30)


@pytest.mark.parametrize("turn", [60, 120, 180, -90])
def test_hues_that_turn_together_are_seen_though_their_mean_colour_stays(turn):
    rng = np.random.default_rng(0)
    base, noise = rng.uniform(0, 360, 100), rng.normal(0, 40, 100)
    low, high = ev.hue_turn_interval(base, (base + turn + noise) % 360)
    assert low < turn % 360 < high or low < turn < high
    assert high - low < 30
    low, high = ev.hue_turn_interval(base, (base + noise) % 360)
    assert low < 0 < high
    assert min(-low, high) < ev.TURN
    chance = [rng.uniform(0, 360, (2, 100)) for _ in range(100)]
    alarms = [
        not -ev.TURN <= low <= ev.TURN for low, _ in (ev.hue_turn_interval(*hues) for hues in chance) if low == low
    ]
    assert len(alarms) <= 5  # without a common way there is no interval
    assert ev.hue_turn(np.array([350.0, 10.0]), np.array([5.0, 25.0])) == pytest.approx(15)


def test_turned_hues_are_a_cost():
    metrics = {"judge": compared(np.full(100, 0.5), np.full(100, 0.6), "held-out", 0.01)}
    for interval, told in (
        ((40.0, 60.0), True),
        ((-60.0, -40.0), True),
        ((-5.0, 40.0), False),
        ((170.0, 190.0), True),
    ):
        colour = unmoved(hue_turn={"value": sum(interval) / 2, "interval": interval})
        said = " ".join(sentence for _, sentence in ev.verdict("dpo", metrics, colour, {}, {}))
        assert ("the hues turn by" in said) == told


def test_diversity_is_zero_for_equal_images_and_one_for_orthogonal_ones():
    feature = np.random.default_rng(0).normal(size=7)
    assert ev.diversity(np.stack([feature, feature, feature])) == 0
    assert ev.diversity(np.eye(3)) == pytest.approx(1)
    assert ev.diversity(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(2)
    assert np.isnan(ev.diversity(feature[None]))


# ---- The verdict ---------------------------------------------------------------------------------------------------


def compared(base: np.ndarray, tuned: np.ndarray, role: str, holm: float) -> dict:
    """A row of compare_metrics."""
    return {"role": role, **ev.compare({"x": base}, {"x": tuned}, "x"), "holm": holm}


def unmoved(**moves: dict) -> dict:
    """A comparison of colours in which nothing moved but what is given."""
    still = {"value": 0.0, "base": 1.0, "tuned": 1.0, "interval": (0.0, 0.0)}
    return {**dict.fromkeys(("delta_e", "hue_turn", *ev.COLOURS), still), **moves}


def judged(win_rates: dict[str, tuple[str, float]], delta_e: float = 0.0) -> str:
    """The verdict on 100 prompts with these win rates, {metric: (role, win rate)}."""
    wins = np.arange(100) / 100
    metrics = {
        label: compared(np.full(100, 0.5), (wins < rate).astype(float), role, 0.01)
        for label, (role, rate) in win_rates.items()
    }
    colour = unmoved(delta_e={"value": delta_e, "interval": (delta_e, delta_e)})
    return " ".join(sentence for _, sentence in ev.verdict("dpo", metrics, colour, {}, {}))


def test_verdict_leads_with_a_held_out_scorer():
    said = judged({"judge": ("held-out", 0.7), "pickscore": ("training", 0.9)})
    assert said.startswith("dpo draws better than base by judge: it wins 70 % of 100 prompts")
    assert "hacking" not in said
    assert "draws worse" in judged({"judge": ("held-out", 0.3), "pickscore": ("training", 0.5)})
    assert "cannot be told" in judged({"judge": ("held-out", 0.5), "pickscore": ("training", 0.5)})


@pytest.mark.parametrize(
    ("judge", "diversity", "delta_e", "cost"),
    [
        (0.2, 0.5, 0, "judge gets worse (20 % [12, 28])"),
        (0.5, 0.1, 0, "diversity gets worse (10 % [5, 16])"),
        (0.5, 0.5, 9, "Delta E 9.0"),
    ],
)
def test_verdict_names_reward_hacking(judge, diversity, delta_e, cost):
    rates = {"judge": ("held-out", judge), "diversity": ("diversity", diversity)}
    said = judged({**rates, "pickscore": ("training", 0.9)}, delta_e)
    assert "reward hacking" in said
    assert cost in said
    assert "reward hacking" not in judged({**rates, "pickscore": ("training", 0.5)}, delta_e)


@pytest.mark.parametrize(
    ("change", "cost"),
    [
        (lambda x: np.repeat(x.mean(axis=-1, keepdims=True), 3, axis=-1), "chroma (Lab) falls visibly"),
        (lambda x: x.mean(axis=-1, keepdims=True) + 2 * (x - x.mean(axis=-1, keepdims=True)), "chroma (Lab) grows"),
        (lambda x: x.mean() + 0.6 * (x - x.mean()), "contrast within an image (std of L*) falls visibly"),
        (lambda x: np.where(x > 200, 255, x), "share of clipped pixels grows visibly"),
        (lambda x: x + np.random.default_rng(0).normal(0, 4, x.shape), None),
    ],
)
def test_colours_that_change_around_the_same_mean_are_a_cost(change, cost):
    attributes = [dict(zip(ATTRIBUTES, choice, strict=True)) for choice in itertools.product(*ATTRIBUTES.values())]
    images = [np.asarray(draw(attributes[37 * i % len(attributes)], seed=i).image, dtype=float) for i in range(24)]
    sides = []
    for drawn in (images, [change(image).clip(0, 255) for image in images]):
        found = [ev.colour_statistics(np.round(image).astype(np.uint8)) for image in drawn]
        sides.append({key: np.array([row[key] for row in found]) for key in ev.COLOUR_COLUMNS})
    found = ev.compare_colour(*sides, np.arange(24))
    costs = ev.what_got_worse({}, [], found, {})
    assert any(cost in told for told in costs) if cost else not costs


def test_a_loss_among_many_metrics_is_doubtful_until_holm_agrees():
    rows = {"clip": (0.5, 1.0), "judge": (0.38, 0.2), "pickscore": (0.9, 0.01)}
    wins = np.arange(100) / 100
    metrics = {
        label: compared(
            np.full(100, 0.5), (wins < rate).astype(float), "training" if label == "pickscore" else "held-out", holm
        )
        for label, (rate, holm) in rows.items()
    }
    said = ev.verdict("dpo", metrics, unmoved(), {}, {})
    said = " ".join(sentence for _, sentence in said)
    assert "hacking" not in said
    assert "Perhaps worse, not for sure among so many metrics: judge (38 % [29, 47])." in said


def test_models_that_do_not_differ_are_seldom_called_hacked():
    """200 times 8 unchanged metrics and a training scorer that rises, 60 prompts: losses pass Holm or wait."""
    rng, hacked = np.random.default_rng(0), 0
    for _ in range(200):
        metrics = {
            str(i): {"role": "held-out", "interval": (0.5 - 2, 0.5 + 2), "win_rate": 0.5, "prompts": 60}
            for i in range(8)
        }
        for row in metrics.values():
            points = (rng.random(60) < 0.5).astype(float)
            half = 1.96 * points.std() / np.sqrt(60)
            row |= {"win_rate": points.mean(), "interval": (points.mean() - half, points.mean() + half)}
            row["sign_test"] = ev.sign_test(points, 1 - points)
        metrics["t"] = {"role": "training", "interval": (0.8, 0.9), "win_rate": 0.85, "prompts": 60, "sign_test": 1e-9}
        for row, p in zip(metrics.values(), ev.holm([row["sign_test"] for row in metrics.values()]), strict=True):
            row["holm"] = p
        said = ev.verdict("dpo", metrics, unmoved(), {}, {})
        hacked += any("hacking" in sentence for _, sentence in said)
    assert hacked <= 15


def test_delta_e_of_models_that_do_not_differ_is_not_visible():
    """Twelve prompts whose colours vary by 10: a plain norm of means would read 5; here chance is taken off."""
    rng = np.random.default_rng(0)
    found = [ev.delta_e(rng.normal(0, 7, (12, 3)), rng.normal(0, 7, (12, 3))) for _ in range(300)]
    squares = np.mean(np.square(found))
    assert squares < 0.75 * 3 * 2 * 49 / 12  # what a plain norm's square reads on average
    assert np.mean(np.array(found) == 0) > 0.3
    a, b = rng.normal(0, 7, (40, 3)), rng.normal(0, 7, (30, 3)) + np.array([30, 40, 0])
    assert ev.delta_e_of_sets(a, b) == pytest.approx(50, abs=4)


def test_means_of_both_sides_are_over_the_same_prompts_and_vetoes_are_told():
    base = {"x": np.array([1.0, 2.0, np.nan, 100.0, -np.inf]), "x vetoed": np.array([0, 0, np.nan, 0, 1])}
    tuned = {"x": np.array([2.0, 3.0, 5.0, np.nan, 7.0]), "x vetoed": np.array([0, 0, 0, np.nan, 0])}
    row = ev.compare(base, tuned, "x")
    assert (row["base"], row["tuned"], row["difference"]) == (1.5, 2.5, 1.0)
    assert row["vetoed"] == [0.25, 0.0]
    assert row["win_rate"] == 1


def test_verdict_says_when_only_the_training_scorer_judges():
    assert "Only the training scorer" in judged({"pickscore": ("training", 0.9)})


# ---- Whole runs ----------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> Path:
    """Fills a folder: prompts, plug-in scorers, a LoRA that changes images, a LoRA of zeros, a changed full U-Net."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "plugins.py").write_text(PLUGINS)
    unet = UNet2DConditionModel.from_pretrained(WORLD / "pipeline", subfolder="unet").float()
    with torch.no_grad():
        unet.conv_out.bias += 0.5
        unet.save_pretrained(folder / "full" / "unet")
        unet.conv_out.bias -= 0.5
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))  # peft starts with B = 0
    state = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder / "zero", unet_lora_layers=state)
    changed = {key: 0.3 * torch.randn_like(value) for key, value in state.items()}
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=changed)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def flags(inputs: Path, output: Path, *models: str, **changes: object) -> list[str]:
    """A command line for a short run; changes: flag=value, or flag=None to leave it out."""
    settings = {
        "pretrained_model_name_or_path": WORLD / "pipeline",
        "prompts": inputs / "prompts.txt",
        "output_dir": output,
        "diversity_prompts": 3,
        "num_inference_steps": 2,
        "guidance_scale": 2,
        "resolution": 64,
        "batch_size": 4,
        "training_scorer": "pickscore",
        "feature_model": WORLD / "scorer",
        "report_rows": 6,
        **changes,
    }
    scorers = [
        f"pickscore={WORLD / 'scorer'}",
        f"{inputs / 'plugins.py'}:brightness",
        f"{inputs / 'plugins.py'}:picky",
    ]
    line = [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]
    return [*line, "--models", *(models or ("base", f"lora={inputs / 'lora'}")), "--scorers", *scorers]


def run(line: list[str]) -> dict:
    """Runs the script in process and returns its metrics.json."""
    args = ev.parse_args(line)
    ev.main(args)
    return json.loads((Path(args.output_dir) / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """The output of a run of base, a LoRA, a LoRA of zeros, the LoRA at scale 0, and a full U-Net."""
    output = tmp_path_factory.mktemp("finished") / "human-eval"
    lora = inputs / "lora"
    models = ("base", f"lora={lora}", f"zero={inputs / 'zero'}", f"off={lora},lora_scale=0", f"full={inputs / 'full'}")
    run(flags(inputs, output, *models))
    return output


def pixels(output: Path, model: str) -> np.ndarray:
    images = ev.load_images(sorted((output / "images" / model).glob("*.png")))
    return np.stack([np.asarray(image, dtype=float) for image in images])


@pytest.fixture(scope="module")
def metrics(finished) -> dict:
    return json.loads((finished / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["zero", "off"])
def test_a_lora_that_changes_nothing_ties_everywhere(finished, metrics, name):
    np.testing.assert_array_equal(pixels(finished, "base"), pixels(finished, name))
    result = metrics["models"][name]
    assert {row["win_rate"] for row in result["metrics"].values()} == {0.5}
    assert [result["colour"][key]["value"] for key in ("hue_distance", "delta_e", "latent_shift")] == [0, 0, 0]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_lora_and_a_full_unet_change_the_images(finished, metrics, name):
    assert np.abs(pixels(finished, "base") - pixels(finished, name)).mean() > 0.5
    assert metrics["models"][name]["colour"]["latent_shift"]["value"] > 0


def test_full_unet_with_shifted_bias_shifts_the_latents_most(metrics):
    shift = {name: result["colour"]["latent_shift"]["value"] for name, result in metrics["models"].items()}
    assert shift["full"] > 2 * shift["lora"] > 0


def test_held_out_scorers_lead_and_the_training_scorer_is_marked(metrics):
    assert list(metrics["models"]["lora"]["metrics"]) == ["brightness", "picky", "pickscore", "diversity"]
    assert metrics["models"]["lora"]["metrics"]["pickscore"]["role"] == "training"
    assert "by brightness" in metrics["models"]["lora"]["verdict"][0][1]


def test_metrics_equal_what_the_csv_says(finished, metrics):
    with (finished / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * (6 + 3)  # five models, six prompts, three of them with a second image
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    sums = {model: np.zeros(6) for model in ("base", "lora")}
    for row in rows:
        if row["model"] in sums:
            p = int(row["prompt_id"])
            sums[row["model"]][p] += float(row["brightness"]) / (2 if p < 3 else 1)
    found = metrics["models"]["lora"]["metrics"]["brightness"]
    assert found["win_rate"] == np.mean(sums["lora"] > sums["base"])
    assert found["base"] == pytest.approx(sums["base"].mean(), rel=1e-5)
    assert all((finished / row["image"]).is_file() for row in rows)


def test_an_image_depends_on_model_prompt_and_seed_alone(inputs, finished, tmp_path):
    """Another batch size and another order of prompts give the same images."""
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    run(flags(inputs, tmp_path / "out", prompts=tmp_path / "prompts.txt", batch_size=3, diversity_prompts=0))
    there = pixels(finished, "lora")[[0, 2, 4, 6, 7, 8]]  # the first image of each prompt
    np.testing.assert_allclose(pixels(tmp_path / "out", "lora")[::-1], there, atol=1)


def test_report_loads_nothing_and_shows_all(finished):
    report = (finished / "report.html").read_text()
    assert set(re.findall(r"(?:src|href)=\W?(\w+:|#|)", report)) <= {"data:", "#", ""}  # nothing, or a file beside it
    assert "url(" not in report
    assert "<script" not in report
    assert report.count("data:image/png;base64,") >= 4 * 6 * 2  # six random rows for each of four models
    for prompt in PROMPTS:
        assert prompt in report
    for word in ("training scorer", "lora against base", "95 % interval", "Worst losses", "Best wins", "At random"):
        assert word in report
    with ev.Image.open(finished / "grid.png") as grid:
        assert grid.height > 5 * 192


def test_strange_scores_names_and_prompts(inputs, tmp_path, capsys):
    """-inf, nan, HTML, quotes, commas and other scripts in prompts go through everything."""
    strange = [
        "veto <script>alert(1)</script>",
        'unsure "quoted", with commas',
        "a jumping person & мир 人",
        "x" * 300,
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(strange), encoding="utf-8")
    output = tmp_path / "out"
    found = run(flags(inputs, output, prompts=tmp_path / "prompts.txt", diversity_prompts=0))
    picky = found["models"]["lora"]["metrics"]["picky"]
    assert picky["prompts"] == 3
    assert picky["tie"] == pytest.approx(1 / 3)  # both vetoed
    assert np.isfinite(picky["base"])
    assert "diversity" not in found["models"]["lora"]["metrics"]
    report = (output / "report.html").read_text()
    assert "<script" not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    with (output / "per_image.csv").open(encoding="utf-8") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == strange * 2
    said = capsys.readouterr().out
    assert "Only 4 prompts: any win rate would mostly go unseen among" in said
    assert said.strip().splitlines()[-2] == f"open    {output / 'report.html'}"
    assert said.strip().splitlines()[-1].startswith("next ")


def test_killed_run_carries_on_with_the_same_metrics(inputs, finished, metrics, tmp_path):
    """kill -9 after the first images; the second start keeps them and ends as an uninterrupted run."""
    output = tmp_path / "out"
    line = flags(inputs, output, "base", f"lora={inputs / 'lora'}", batch_size=1)
    process = subprocess.Popen([sys.executable, ROOT / "eval_human.py", *line], stderr=subprocess.DEVNULL)
    images = output / "images" / "base"
    deadline = time.monotonic() + 200
    while len(list(images.glob("*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in images.glob("*.png")}
    assert len(kept) >= 2
    assert not (output / "metrics.json").exists()
    found = run(flags(inputs, output, "base", f"lora={inputs / 'lora'}"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert found["models"]["lora"]["metrics"]["brightness"]["base"] == pytest.approx(
        metrics["models"]["lora"]["metrics"]["brightness"]["base"], rel=1e-4
    )
    assert (
        found["models"]["lora"]["metrics"]["pickscore"]["win_rate"]
        == (metrics["models"]["lora"]["metrics"]["pickscore"]["win_rate"])
    )


def test_finished_run_draws_nothing_again_and_gives_the_same_files(inputs, finished, metrics, monkeypatch):
    monkeypatch.setattr(ev, "load_pipeline", lambda *_: pytest.fail("a finished run loaded the pipeline"))
    report = (finished / "report.html").read_bytes()
    assert run(metrics_line(metrics)) == metrics
    assert (finished / "report.html").read_bytes() == report


def metrics_line(metrics: dict) -> list[str]:
    """The command line that metrics.json records."""
    line = []
    for key, value in metrics["settings"].items():
        if value is not None and key not in ("overwrite", "height", "width"):
            line += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def test_a_damaged_image_is_drawn_again(inputs, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    victim = output / "images" / "lora" / "00001_0.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    run(flags(inputs, output))
    np.testing.assert_allclose(pixels(output, "lora"), pixels(finished, "lora"), atol=1)


def test_changed_settings_are_refused_with_the_difference_and_overwritten_on_request(inputs, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(ev.UserError, match=r"seed 1 -> 0.*--overwrite"):
        run(flags(inputs, output, seed=0))
    other = shutil.copytree(inputs / "full", tmp_path / "other")
    with pytest.raises(ev.UserError, match="tuned_weights"):
        run(flags(inputs, output, "base", f"lora={other}"))
    run([*flags(inputs, output, seed=0), "--overwrite"])
    assert np.abs(pixels(output, "lora") - pixels(finished, "lora")).mean() > 1


def test_training_scorers_are_read_from_the_record_of_the_pairs(inputs, tmp_path):
    data, lora = tmp_path / "data", shutil.copytree(inputs / "lora", tmp_path / "lora")
    data.mkdir()
    settings = {"scorer": ["0.5*my/file.py:brightness"], "agree": ["hpsv2=my/model"]}
    (data / "preference_data.json").write_text(json.dumps({"settings": settings}))
    model = ev.parse_model(f"dpo={lora}")
    assert ev.recorded_training_scorers([model]) == []
    (lora / "training_settings.json").write_text(json.dumps({"settings": {"train_data_dir": str(data)}}))
    assert ev.recorded_training_scorers([model]) == ["brightness", "cosine of my/model", "hpsv2"]
    assert ev.spoken(ev.recorded_training_scorers([model])) == ["brightness", "hpsv2"]


def test_a_run_that_started_from_its_own_folder_is_read_once(inputs, tmp_path):
    lora = shutil.copytree(inputs / "lora", tmp_path / "lora")
    settings = {"dataset_name": str(tmp_path), "train_data_dir": "human-preferences", "initial_lora": str(lora)}
    (lora / "training_settings.json").write_text(json.dumps({"settings": settings}))
    assert ev.training_data([ev.parse_model(f"dpo={lora}")]) == [tmp_path]


def test_the_weights_that_chose_the_pairs_never_lead_under_another_name(inputs, tmp_path):
    data, lora = tmp_path / "pairs", shutil.copytree(inputs / "lora", tmp_path / "lora")
    data.mkdir()
    (data / "preference_data.json").write_text(json.dumps({"settings": {"scorer": [f"pickscore={WORLD / 'scorer'}"]}}))
    (lora / "training_settings.json").write_text(json.dumps({"settings": {"train_data_dir": str(data)}}))
    models = [ev.parse_model(f"dpo={lora}")]
    other = ev.parse_scorer_spec(f"clip={WORLD / 'scorer'}")
    for given in (None, "hpsv2"):  # what is given adds to what is recorded
        training = ev.training_scorers(argparse.Namespace(training_scorer=given, models=models))
        assert ev.metric_roles([other], training, False)["clip"] == "training"
    line = flags(inputs, tmp_path / "out", "base", f"dpo={lora}", training_scorer="pikscore")
    with pytest.raises(SystemExit):
        ev.parse_args(line)


def test_training_scorers_may_be_given_as_to_scorers():
    args = argparse.Namespace(training_scorer=" my/file.py:brightness, 2*pickscore=my/model", models=[])
    assert ev.spoken(ev.training_scorers(args)) == ["brightness", "pickscore"]
    scorers = [ev.parse_scorer_spec("clip"), ev.parse_scorer_spec("pickscore")]
    roles = ev.metric_roles(scorers, ev.training_scorers(args), False)
    assert roles == {"clip": "held-out", "pickscore": "training", "diversity": "diversity"}


def test_embedded_world_is_the_default(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "lora", "dpo-human-lora")
    args = ev.parse_args(["--max_prompts", "5", "--scorers", f"pickscore={WORLD / 'scorer'}"])
    assert args.max_prompts == 5
    assert args.prompts == str(WORLD / "prompts_test.txt")
    assert [model.name for model in args.models] == ["base", "dpo"]
    assert "--pretrained_model_name_or_path" in capsys.readouterr().out


# ---- What else is measured -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(inputs, tmp_path_factory) -> Path:
    """A run with photos, a person, groups, a user study and scores from elsewhere on 16 prompts."""
    folder = tmp_path_factory.mktemp("everything")
    rows = [
        {"prompt": f"a {pose} person in a {shirt} shirt", "place": place, "number": 1}
        for pose in ("standing", "walking")
        for shirt in ("red", "blue", "green", "yellow", "purple", "orange", "black", "white")
        for place in ("street" if pose == "standing" else "park",)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for k in range(12):
        draw({"pose": "standing", "arms": "both arms down"} | BACKGROUND, seed=k).image.save(folder / f"photo{k}.png")
    (folder / "photos").mkdir()
    for file in folder.glob("photo*.png"):
        file.rename(folder / "photos" / file.name)
    ids = [f"{model}/{p:05d}_{k}.png" for model in ("base", "lora") for p in range(16) for k in range(2)]
    scores = [json.dumps({"image_id": name, "score": float(name.startswith("lora"))}) for name in ids]
    (folder / "theirs.jsonl").write_text("\n".join(scores))
    (folder / "embed.py").write_text(
        "import numpy as np\ndef embed(device):\n"
        "    return lambda images: np.stack([np.asarray(i.resize((4, 4)), float).ravel() - 128 for i in images])\n"
    )
    run(everything_flags(inputs, folder))
    return folder


def everything_flags(inputs: Path, folder: Path) -> list[str]:
    changes = {"prompts": folder / "prompts.jsonl", "real_data_dir": folder / "photos", "cmmd_model": WORLD / "scorer"}
    changes |= {"reference_faces": folder / "photos", "face_embedder": f"{folder}/embed.py:embed", "user_study": 8}
    changes |= {"identity": f"lora={inputs / 'zero'}", "face_threshold": 0.9, "diversity_prompts": 4}
    line = flags(inputs, folder / "out", **changes)
    return [*line, f"{folder}/theirs.jsonl", "--group_by", "pose", "place", "number", "people"]


BACKGROUND = {"shirt": "red", "trousers": "black", "background": "mint"}


def test_everything_is_in_the_record(everything):
    record = json.loads((everything / "out" / "metrics.json").read_text())
    result = record["models"]["lora"]
    assert result["metrics"]["theirs"]["win_rate"] == 1
    assert result["metrics"]["identity"]["role"] == result["metrics"]["recognised"]["role"] == "identity"
    assert set(result["realism"]) == set(record["realism"]["distances"]) == {"KD", "FD", "CMMD"}
    for kind, row in result["realism"].items():
        assert row["tuned"] - row["base"] == pytest.approx(row["difference"])
        assert record["realism"]["distances"][kind]["models"]["lora"] == row["tuned"]
    assert record["realism"]["photos"] == 12
    against_photos = record["photos_colour"]["base"]
    assert against_photos["L"]["photos"] > 0
    assert against_photos["hue_shift"]["interval"][0] <= against_photos["hue_shift"]["value"]
    assert against_photos["latent_shift"]["value"] == pytest.approx(
        np.abs(against_photos["latent_channels"]["difference"]).mean()
    )
    assert set(record["paper"]["base"]) == set(ev.PAPER_COLUMNS)
    assert record["paper"]["lora"]["Hue"] == result["colour"]["hue_shift"]["value"]
    assert record["paper"]["base"]["Hue"] is None
    assert record["paper"]["lora"]["P-Score"] == pytest.approx(record["means"]["lora"]["pickscore"])
    page = (everything / "out" / "report.html").read_text()
    for word in ("Realism", "Identity", "Groups of prompts", "The paper's names", "street", "CMMD"):
        assert word in page


def test_groups_of_prompts(everything):
    """Two poses and two places of eight prompts each; number and people have one group, so nothing to compare."""
    groups = json.loads((everything / "out" / "metrics.json").read_text())["models"]["lora"]["groups"]
    assert {column: {name: row["prompts"] for name, row in found.items()} for column, found in groups.items()} == {
        "pose": {"standing": 8, "walking": 8},
        "place": {"street": 8, "park": 8},
    }
    assert groups["pose"]["standing"]["metrics"] == groups["place"]["street"]["metrics"]
    assert list(groups["pose"]["standing"]["metrics"]) == ["brightness", "pickscore"]


def test_group_win_rates_are_those_of_their_prompts():
    base, tuned = {"m": np.zeros(20)}, {"m": np.array([1.0] * 9 + [-1.0] + [0.0] * 10)}
    found = ev.compare_groups(base, tuned, ["m"], {"where": ["a"] * 10 + ["b"] * 10, "few": ["c"] * 7 + ["d"] * 13})
    assert set(found) == {"where"}
    assert [found["where"][name]["metrics"]["m"]["win_rate"] for name in "ab"] == [0.9, 0.5]
    assert found["where"]["a"]["metrics"]["m"]["holm"] == pytest.approx(2 * scipy.stats.binomtest(9, 10).pvalue)
    said = ev.losing_groups(ev.compare_groups(tuned, base, ["m"], {"where": ["a"] * 10 + ["b"] * 10}), "m")
    assert said == ["Worse where where is a: m wins 10 % [0, 30] of 10 prompts."]


@pytest.mark.parametrize(
    ("prompt", "pose"),
    [("A WALKING man", "walking"), ("a man who sits", "not said"), ("standing, then running", "standing")],
)
def test_pose_is_the_first_that_a_prompt_names(prompt, pose):
    assert ev.name_pose(prompt) == pose


def test_worse_realism_is_a_cost():
    metrics = {"clip": compared(np.zeros(50), np.ones(50), "held-out", 0.0)}
    colour = unmoved()
    row = {"base": 0.1, "tuned": 0.3, "difference": 0.2}
    worse = ev.verdict("dpo", metrics, colour, {"KD": row | {"interval": (0.1, 0.3)}}, {})
    assert worse[1] == ("bad", "At a cost: KD to the real photos grows (0.1 to 0.3).")
    better = ev.verdict("dpo", metrics, colour, {"KD": row | {"interval": (-0.3, -0.1)}}, {})
    assert better[1] == ("good", "Closer to the real photos by KD.")
    assert len(ev.verdict("dpo", metrics, colour, {"KD": row | {"interval": (-0.1, 0.3)}}, {})) == 1


def test_the_person_is_known_in_the_csv(everything):
    with (everything / "out" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    record = json.loads((everything / "out" / "metrics.json").read_text())
    sums = {name: {} for name in ("base", "lora")}
    for row in rows:
        sums[row["model"]].setdefault(row["prompt_id"], []).append(float(row["identity"]))
    for name, found in sums.items():
        assert record["identity"][name]["cosine"] == pytest.approx(
            np.mean([np.mean(v) for v in found.values()]), abs=1e-4
        )


def test_measures_are_kept_until_what_they_depend_on_changes(inputs, everything, tmp_path, monkeypatch):
    own, loaded = ev.load_measure, []
    monkeypatch.setattr(ev, "load_measure", lambda scorer, device: loaded.append(scorer.label) or own(scorer, device))
    folder = shutil.copytree(everything, tmp_path / "copy", copy_function=shutil.copy2)
    line = [part.replace(str(everything), str(folder)) for part in everything_flags(inputs, everything)]
    run(line)  # the scores' file has another path now
    assert loaded == ["theirs"]
    run(line)
    assert loaded == ["theirs"]
    scores = folder / "theirs.jsonl"
    scores.write_text(scores.read_text().replace("1.0", "-1.0"))
    assert run(line)["models"]["lora"]["metrics"]["theirs"]["win_rate"] == 0
    assert loaded == ["theirs", "theirs"]
    photo = folder / "photos" / "photo3.png"
    ev.Image.open(photo).transpose(ev.Image.Transpose.ROTATE_180).save(photo)
    before = json.loads((folder / "out" / "metrics.json").read_text())["identity"]["base"]["cosine"]
    assert run(line)["identity"]["base"]["cosine"] != before
    assert loaded == ["theirs", "theirs"]
    os.utime(folder / "out" / "images" / "base" / "00003_0.png")
    run(line)
    assert loaded[2:] == ["pickscore", "brightness", "picky", "theirs"]


def test_latents_of_photos_are_the_vaes():
    picture = draw({"pose": "standing", "arms": "both arms down"} | BACKGROUND, seed=3).image
    name, plain = str(WORLD / "pipeline"), {"revision": None, "variant": None}
    args = argparse.Namespace(pretrained_model_name_or_path=name, **plain)
    (found,) = ev.load_latents(args, picture.size, "cpu")([picture.resize((80, 120))], [""])
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae")
    pixels = torch.from_numpy(np.array(picture.resize((80, 120)).resize(picture.size, ev.Image.Resampling.LANCZOS)))
    with torch.no_grad():
        latents = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    expected = [*latents.mean((0, 2, 3)), *latents.std((0, 2, 3), correction=0)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_that_a_folder_lacks_count_for_neither_side(inputs, finished, tmp_path, capsys):
    """Two of base's six images from elsewhere: all that is compared, is on these."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for k in (1, 4):
        shutil.copy(finished / "images" / "lora" / f"{k:05d}_0.png", folder)
    found = run(flags(inputs, tmp_path / "out", "base", f"theirs={folder}"))
    assert "theirs against base, 2 prompts" in capsys.readouterr().out
    result, means = found["models"]["theirs"], found["means"]
    for label in ("brightness", "pickscore"):
        for side, name in (("base", "base"), ("tuned", "theirs")):
            assert result["metrics"][label][side] == pytest.approx(means[name][label])
    assert result["colour"]["L"]["base"] == pytest.approx(means["base"]["L"])


def test_no_scores_at_all_is_told(inputs, tmp_path):
    (tmp_path / "null.jsonl").write_text(
        "\n".join(f'{{"image_id": "{m}/{p:05d}_0.png", "score": null}}' for m in ("base", "lora") for p in range(6))
    )
    line = flags(inputs, tmp_path / "out", diversity_prompts=0)
    line = [*line[: line.index("--scorers") + 1], str(tmp_path / "null.jsonl")]
    with pytest.raises(ev.UserError, match="no scorer gives a value for an image that base and the tuned model both"):
        run(line)


def test_the_benchmark_times_every_part(inputs, tmp_path):
    seconds = benchmark.whole_eval(flags(inputs, tmp_path / "out"), alive := {})
    assert list(alive) == ["pickscore", "brightness", "picky", "colour", "features", "pipeline"]
    assert {"images", "measures", "statistics", "report", "pickscore", "colour", "features", "ours"} <= seconds.keys()
    assert seconds["images"] + seconds["measures"] < seconds["ours"]


def test_a_measure_is_known_by_its_files_in_one_order(tmp_path):
    """An order by the hash of strings would differ from process to process."""
    other = shutil.copytree(WORLD / "scorer", tmp_path / "other")
    spec = f"clip={WORLD / 'scorer'},processor={other}"
    files = ev.scorer_files(ev.parse_scorer_spec(spec))
    assert files == [WORLD / "scorer" / "model.safetensors", other / "model.safetensors"]
    assert files == ev.scorer_files(ev.parse_scorer_spec(f"clip,processor={other},model={WORLD / 'scorer'}"))


def test_a_measure_that_was_cut_short_is_measured_again(tmp_path):
    ev.write_measured(tmp_path / "a.npz", "key", np.arange(4.0))
    np.testing.assert_array_equal(ev.read_measured(tmp_path / "a.npz", "key"), np.arange(4.0))
    assert ev.read_measured(tmp_path / "a.npz", "other") is None
    whole = (tmp_path / "a.npz").read_bytes()
    for size in (0, 50, len(whole) - 9):
        (tmp_path / "a.npz").write_bytes(whole[:size])
        assert ev.read_measured(tmp_path / "a.npz", "key") is None


def test_votes_come_into_the_report(inputs, everything, tmp_path, capsys):
    folder = shutil.copytree(everything, tmp_path / "copy", copy_function=shutil.copy2)
    key = json.loads((folder / "out" / "user_study_key.json").read_text())
    votes = [{"pair": pair, "realism": "left", "alignment": "tie", "seconds": 2.0} for pair in key["pairs"]]
    (folder / "votes-a.json").write_text(json.dumps({"study": key["study"], "rater": "a", "votes": votes}))
    line = [part.replace(str(everything), str(folder)) for part in everything_flags(inputs, everything)]
    record = run([*line, "--votes", str(folder / "votes-a.json")])
    found = record["votes"]["models"]["lora"]
    assert found["realism"]["win_rate"] == found["alignment"]["win_rate"] == 0.5  # each model is left as often
    assert found["alignment"]["tie"] == 1
    assert "Votes" in (folder / "out" / "report.html").read_text()
    assert "votes of 1 rater" in capsys.readouterr().out
    pair = next(iter(key["pairs"].values()))
    image = folder / "out" / "images" / "lora" / f"{pair['prompt_id']:05d}_{pair['index']}.png"
    text = ev.image_text(image)
    image.write_bytes(ev.png(ev.Image.open(image).transpose(ev.Image.Transpose.ROTATE_180), **text))
    with pytest.raises(ev.UserError, match="was drawn anew since people voted"):
        run([*line, "--votes", str(folder / "votes-a.json")])


def test_two_processes_draw_and_measure_the_same(inputs, finished, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, ROOT / "eval_human.py", *flags(inputs, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2" in done.stderr
    assert done.stdout.count("lora against base") == 1
    np.testing.assert_allclose(pixels(tmp_path / "out", "lora"), pixels(finished, "lora"), atol=1)
    found, one = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", finished))
    for label, row in found["models"]["lora"]["metrics"].items():
        assert row["tuned"] == pytest.approx(one["models"]["lora"]["metrics"][label]["tuned"], rel=1e-3)


def test_prompts_are_the_validation_split_of_the_pairs_by_default(inputs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, lora = tmp_path / "pairs", shutil.copytree(inputs / "lora", tmp_path / "lora")
    (data / "data").mkdir(parents=True)
    for split, captions in (("train", ["a", "b"]), ("validation", [*PROMPTS, PROMPTS[0]])):
        table = pa.table({"caption": captions, "label_0": [1.0] * len(captions)})
        pq.write_table(table, data / "data" / f"{split}-00000-of-00001.parquet")
    (lora / "training_settings.json").write_text(json.dumps({"settings": {"train_data_dir": str(data)}}))
    args = ev.parse_args(flags(inputs, tmp_path / "out", "base", f"dpo={lora}", prompts=None))
    assert args.prompts == f"{data}/data/validation-00000-of-00001.parquet"
    assert ev.read_prompt_list(args.prompts, None, None)[0] == PROMPTS


def test_the_papers_scorers_but_for_those_with_options():
    specs = ev.expand_paper(["people", "paper", "clip=somewhere"])
    assert specs == [
        "people",
        "hpsv2",
        "imagereward",
        "aesthetic",
        "clip_iqa",
        "clip_iqa_sharpness",
        "pickscore",
        "clip=somewhere",
    ]


# ---- Bad input -----------------------------------------------------------------------------------------------------

BAD_INPUTS = {
    "no prompts": ({"prompts": None}, (), "--prompts"),
    "missing prompts file": ({"prompts": "nowhere.txt"}, (), "nowhere.txt"),
    "empty prompts file": ({"prompts": "{tmp}/empty.txt"}, (), "empty"),
    "only blanks": ({"prompts": "{tmp}/blank.txt"}, (), "blank"),
    "missing base model": ({"pretrained_model_name_or_path": "./nowhere"}, (), "nowhere"),
    "base model folder without a pipeline": ({"pretrained_model_name_or_path": "{tmp}"}, (), "model_index.json"),
    "zero images": ({"num_images_per_prompt": 0}, (), "--num_images_per_prompt"),
    "zero steps": ({"num_inference_steps": 0}, (), "--num_inference_steps"),
    "resolution not a number": ({"resolution": "large"}, (), "--resolution"),
    "output folder is a file": ({"output_dir": "{tmp}/blank.txt"}, (), "is a file"),
    "no base": ({}, ("dpo={lora}",), "base"),
    "only base": ({}, ("base",), "tuned model"),
    "two of one name": ({}, ("base", "dpo={lora}", "dpo={lora}"), "two models are called dpo"),
    "base with a path": ({}, ("base={lora}",), "another name"),
    "missing model folder": ({}, ("base", "dpo=nowhere"), "no model at nowhere"),
    "folder without weights": ({}, ("base", "dpo={tmp}/none"), "training has not finished"),
    "model without a name": ({}, ("base", "{lora}"), "name"),
    "name that climbs": ({}, ("base", "..=x"), "name"),
    "unknown option": ({}, ("base", "dpo={lora},scale=2"), "lora_scale"),
    "option without a number": ({}, ("base", "dpo={lora},lora_scale=much"), "lora_scale=much: not a number"),
    "unknown blocks": ({}, ("base", "dpo={lora},blocks=left"), "blocks=left: use down, mid, up"),
    "blocks of a whole U-Net": ({}, ("base", "dpo={full},blocks=up"), "blocks is an option of a LoRA"),
    "LoRA scale of images": ({}, ("base", "dpo={photos},lora_scale=1"), "lora_scale is an option of a LoRA"),
    "timesteps backwards": ({}, ("base", "dpo={lora},text_encoder_timesteps=1000:900"), "expected LOW:HIGH"),
    "timesteps without a text encoder": ({}, ("base", "dpo={lora},text_encoder_timesteps=9:99"), "no LoRA of a text"),
    "no text encoder there": ({}, ("base", "dpo={lora},text_encoder=nowhere"), "no model at nowhere"),
    "some checkpoints": ({}, ("base", "dpo={lora},checkpoints=some"), "checkpoints=some: use all"),
    "no checkpoints": ({}, ("base", "dpo={lora},checkpoints=all"), "has no checkpoints with weights"),
    "identity perhaps": ({}, ("base", "dpo={lora},identity=perhaps"), "use yes or no"),
    "images of no prompt": ({}, ("base", "photos={photos}"), "no caption is one of the prompts, and no name is like"),
    "empty option": ({}, ("base", "dpo={lora},blocks="), "unknown option 'blocks='"),
    "resolution that no VAE draws": ({"resolution": 60}, (), "--resolution must be a multiple of 8"),
    "guidance that is no number": ({"guidance_scale": "nan"}, (), "--guidance_scale"),
    "negative seed": ({"seed": -1}, (), "--seed must be at least 0"),
    "negative rows": ({"report_rows": -1}, (), "--report_rows must be at least 0"),
    "no pairs for people": ({"user_study": 0}, (), "--user_study must be at least 1"),
    "votes before a study": ({"votes": "{tmp}/blank.txt"}, (), "user_study_key.json is missing: --user_study"),
    "no real photos": ({"real_data_dir": "{tmp}/none"}, (), "no images in it"),
    "missing real photos": ({"real_data_dir": "nowhere"}, (), "--real_data_dir nowhere: no such folder"),
    "Inception without photos": ({"inception": "{tmp}/blank.txt"}, (), "name them with --real_data_dir"),
    "missing Inception": ({"inception": "nowhere.pt", "real_data_dir": "{photos}"}, (), "no such file: nowhere.pt"),
    "missing reference faces": ({"reference_faces": "nowhere"}, (), "--reference_faces nowhere"),
    "unknown embedder": ({"face_embedder": "arcface"}, (), "arcface"),
    "identity of no kind": ({"identity": "person={lora}"}, (), "expected lora=PATH or ip_adapter=FILE"),
    "identity without weights": ({"identity": "lora=nowhere"}, (), "no model at nowhere"),
    "identity with an unknown option": ({"identity": "lora={lora},size=2"}, (), "unknown option 'size=2'"),
    "identity with a bad scale": ({"identity": "lora={lora},scale=much"}, (), "scale=much: not a number"),
    "missing IP-Adapter": ({"identity": "ip_adapter=nowhere.bin,image={photos}"}, (), "no such file: nowhere.bin"),
    "IP-Adapter of nobody": ({"identity": "ip_adapter={tmp}/blank.txt"}, (), "needs image=FILE_OR_FOLDER"),
    "IP-Adapter of a missing face": (
        {"identity": "ip_adapter={tmp}/blank.txt,image=nowhere.png"}, (), "no such file or folder: nowhere.png"
    ),
    "IP-Adapter without images": ({"identity": "ip_adapter={tmp}/blank.txt,image={tmp}/none"}, (), "no images in"),
    "group of a list without columns": ({"group_by": "place"}, (), "has no columns, only prompts"),
    "unknown group": ({"group_by": "place", "prompts": "{tmp}/table.csv"}, (), "no column place"),
    "unknown group of a data set": ({"group_by": "place", "prompts": "{tmp}/rows"}, (), "no column place"),
    "group of photos": ({"group_by": "place", "prompts": "{tmp}/captioned"}, (), "is a folder of photos"),
}  # fmt: skip
BAD_SCORERS = {
    "unknown scorer": ("pikscore", "pikscore"),
    "plug-in file missing": ("nowhere.py:judge", "nowhere.py"),
    "plug-in without the function": ("{plugins}:nothing", "nothing"),
    "missing scorer folder": ("pickscore=./nowhere", "nowhere"),
    "two of one label": ("{plugins}:picky", "picky"),
    "label of a colour": ("{plugins}:short,label=sharpness", "sharpness is measured anyway"),
}


def refused(line: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line with which the command line is refused (status 2)."""
    with pytest.raises(SystemExit) as caught:
        ev.cli(line)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_in_one_line(case, inputs, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n  \n\t\n")
    changes, models, words = BAD_INPUTS[case]
    (tmp_path / "table.csv").write_text("prompt,shot\na man,close\n")
    for name in ("photos", "none", "rows", "captioned"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "table.csv", tmp_path / "rows")
    ev.Image.new("RGB", (8, 8)).save(tmp_path / "captioned" / "one.jpg")
    (tmp_path / "captioned" / "one.txt").write_text("a man")
    ev.Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "one.jpg")
    names = {"tmp": tmp_path, "lora": inputs / "lora", "full": inputs / "full", "photos": tmp_path / "photos"}
    filled = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    line = flags(inputs, tmp_path / "out", *(model.format(**names) for model in models)) if models else None
    line = line or flags(inputs, **{"output": tmp_path / "out", **filled})
    assert words in refused(line, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_SCORERS)
def test_bad_scorer_is_refused_in_one_line(case, inputs, tmp_path, capsys):
    spec, words = BAD_SCORERS[case]
    line = [*flags(inputs, tmp_path / "out"), spec.format(plugins=inputs / "plugins.py")]  # one more after --scorers
    assert words in refused(line, capsys)


WATCHED = """
import gc, sys
import eval_human as ev

def watched(*arguments, own=ev.measure_all):
    from diffusers import DiffusionPipeline
    print("pipelines alive:", sum(issubclass(type(one), DiffusionPipeline) for one in gc.get_objects()))
    return own(*arguments)

ev.measure_all = watched
ev.cli(sys.argv[1:])
"""


def test_the_pipeline_is_gone_before_measures_are_loaded_even_beside_a_library_that_keeps_frames(inputs, tmp_path):
    library = tmp_path / "xformers"  # as the real one does where it was built for another torch
    library.mkdir()
    (library / "__init__.py").write_text("try:\n    raise OSError\nexcept OSError as error:\n    kept = error\n")
    (library / "ops.py").touch()
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info" / "METADATA").write_text("Name: xformers\nVersion: 0.0.35\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    line = [sys.executable, "-c", WATCHED, *flags(inputs, tmp_path / "out", max_prompts=2)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert "pipelines alive: 0" in done.stdout, done.stderr


BROKEN = {
    "raises": "def made(device):\n    raise RuntimeError('no luck')\n",
    "gives none": "def made(device):\n    return lambda images, prompts: None\n",
    "gives words": "def made(device):\n    return lambda images, prompts: ['good'] * len(images)\n",
    "gives too few": "def made(device):\n    return lambda images, prompts: []\n",
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_a_scorer_that_cannot_work_is_told_before_anything_is_drawn(inputs, tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ev.UserError, match=r"^[^\n]*\bmade\b[^\n]*$"):
        run([*flags(inputs, tmp_path / "out"), f"{tmp_path}/mine.py:made"])
    assert not (tmp_path / "out" / "images").exists()


def test_other_prompts_do_not_take_the_place_of_images_unasked(inputs, tmp_path):
    run(line := flags(inputs, tmp_path / "out", max_prompts=2, diversity_prompts=0))
    before = {file: file.read_bytes() for file in (tmp_path / "out" / "images").rglob("*.png")}
    (tmp_path / "other.txt").write_text("another person\nand another one\n")
    line = flags(inputs, tmp_path / "out", prompts=tmp_path / "other.txt", diversity_prompts=0)
    with pytest.raises(ev.UserError, match=r"00000_0\.png is of another prompt"):
        run(line)
    assert before == {file: file.read_bytes() for file in (tmp_path / "out" / "images").rglob("*.png")}
    run([*line, "--overwrite"])
    assert ev.image_text(next(iter(sorted(before)))).get("prompt") == "another person"


@pytest.mark.parametrize(("name", "known"), [("pikscore", False), ("2*pickscore=my/model", True), ("a.py:b", True)])
def test_a_training_scorer_that_nobody_knows_is_refused(inputs, tmp_path, name, known):
    line = flags(inputs, tmp_path / "out", training_scorer=name)
    with contextlib.nullcontext() if known else pytest.raises(SystemExit):
        ev.parse_args(line)


def test_pictures_of_others_in_an_image_folder_are_left_alone(inputs, tmp_path):
    run(line := flags(inputs, tmp_path / "out", max_prompts=1, diversity_prompts=0))
    for name in ("grid_all.png", "._00000_0.png"):
        (tmp_path / "out" / "images" / "base" / name).write_bytes(b"")
    run(line)


def test_nothing_is_loaded_that_nothing_needs(inputs, tmp_path):
    """Features serve diversity and photos."""
    line = flags(inputs, tmp_path / "out", max_prompts=1, diversity_prompts=0, feature_model="nobody/nothing")
    run(line)


def test_more_steps_than_the_model_has_are_refused_before_drawing(inputs, tmp_path):
    with pytest.raises(ev.UserError, match="--num_inference_steps 2000: the model has 1000 timesteps"):
        run(flags(inputs, tmp_path / "out", num_inference_steps=2000))


def test_a_model_that_the_hub_has_not_is_told_before_anything_is_drawn(inputs, tmp_path):
    for changes, extra in (({"feature_model": "nobody/nothing"}, ""), ({}, "clip=nobody/nothing")):
        line = flags(inputs, tmp_path / "out", **changes)
        with pytest.raises(ev.UserError, match=r"cannot load (the scorer clip=)?nobody/nothing: \S+"):
            run([*line, extra] if extra else line)
    assert not (tmp_path / "out" / "images").exists()


def test_nobody_on_the_reference_photos_is_told_before_anything_is_drawn(inputs, tmp_path):
    (tmp_path / "blind.py").write_text(
        "import numpy as np\ndef embed(device):\n    return lambda images: np.full((len(images), 4), np.nan)\n"
    )
    (tmp_path / "refs").mkdir()
    ev.Image.new("RGB", (8, 8)).save(tmp_path / "refs" / "one.png")
    changes = {"reference_faces": tmp_path / "refs", "face_embedder": f"{tmp_path}/blind.py:embed"}
    with pytest.raises(ev.UserError, match="no face found in any image of --reference_faces"):
        run(flags(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "images").exists()


def test_a_file_that_is_no_lora_of_this_model_is_named(inputs, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(SystemExit) as caught:
        ev.cli(flags(inputs, tmp_path / "out", "base", f"dpo={tmp_path}"))
    assert "pytorch_lora_weights.safetensors is not a LoRA for this base model" in str(caught.value.code)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_scorer_that_gives_too_few_scores_is_named(inputs, tmp_path):
    line = [*flags(inputs, tmp_path / "out"), f"{inputs / 'plugins.py'}:short"]
    with pytest.raises(ev.UserError, match="short"):
        run(line)
