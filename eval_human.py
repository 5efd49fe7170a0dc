# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14",
#     "diffusers>=0.36,<0.43",
#     "transformers>=4.57,<5.24",
#     "accelerate>=1.8,<1.16",
#     "peft>=0.17,<0.22",
#     "safetensors>=0.5,<0.9",
#     "pillow>=10.1,<14",
#     "numpy>=1.26,<3",
#     "tqdm>=4.66,<5",
#     "pyarrow>=16,<27",
#     "datasets>=4,<5.3",
# ]
# ///
"""Does the tuned model draw better people? Base against tuned models on the same prompts, seeds and noise.

    prompts, models ──sample──> images ──scorers, colour, features, faces──> a value per image ──mean over seeds──>
        a value per prompt ──base against tuned──> win rate, interval, p ──> metrics.json, per_image.csv, report.html

    win_rate(a, b)          = mean over prompts of [a > b] + 1/2 [a = b]
    interval                = bootstrap over prompts, 95 %;  p = exact sign test, Holm over the metrics
    hue_distance(a, b)      = |a - b| around the circle, of circular mean hues
    latent_shift            = mean over channels of |mean(tuned) - mean(base)| / std(base)
    kernel_distance(y)(x)   = E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased, of images x and real photos y
    frechet_distance(y)(x)  = |mean(x) - mean(y)|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2))
    diversity               = mean cosine distance of two images of one prompt

Usual command:

    accelerate launch eval_human.py --pretrained_model_name_or_path MODEL --prompts prompts.txt --resolution 512 \\
        --models base dpo=dpo-human-lora half=dpo-human-lora,lora_scale=0.5 --scorers people paper \\
        --real_data_dir photos --user_study 50

Where this differs from the paper (HG-DPO, arXiv 2405.20216):
1. The scorer that selected the training pairs is marked and never leads: the first held-out scorer is the headline.
   In the paper PickScore both selects the pairs and judges the result.
2. The prompt is the unit: seeds are averaged first, so that four images of one prompt do not count as four votes.
   Every win rate has its interval and its p; the paper gives neither.
3. Hue is reported twice: between the models' circular means over all images (the paper's Hue, as far as it is spelled
   out), and image by image, which also sees changes that cancel. Pixels count by their saturation: grey has no hue.
4. Distances to photos lead with the unbiased kernel distances, and come with what real photos read against real ones.
   The paper's FID needs thousands of images, and an Inception file (--inception).
5. CLIP-IQA is any CLIPModel's, ATHEC's sharpness is of images at most 512 pixels a side, and faces are compared by
   SFace: ArcFace's models are not free. Diversity within a prompt is measured too.
6. People may say "no difference"; the paper does not tell whether its raters could.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import hashlib
import html
import importlib
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import sys
import textwrap
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm.auto import tqdm


if TYPE_CHECKING:  # the large libraries are imported where they are used, so that a mistyped flag is told at once
    from accelerate import PartialState
    from datasets import Dataset
    from diffusers import DiffusionPipeline

WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"

PROMPTS_HELP = (
    "text file with one prompt per line, .jsonl, .json, .csv, .tsv, .parquet, folder of photos with captions, "
    "folder or hub name (owner/name[:split]) that datasets reads"
)


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method: statistics ----------------------------------------------------------------------------------------


def per_prompt(values: np.ndarray, prompt_ids: np.ndarray) -> np.ndarray:
    """Mean over each prompt's images, nan left out: values (N,) or (N, C), prompt numbers (N,) -> (P,) or (P, C).

    -inf, a veto, is left out too, but where it is all that there is.
    """
    if values.ndim == 2:
        return np.stack([per_prompt(column, prompt_ids) for column in values.T], axis=1)
    known, prompts = np.isfinite(values), int(prompt_ids.max()) + 1
    sums = np.bincount(prompt_ids[known], weights=values[known], minlength=prompts)
    counts = np.bincount(prompt_ids[known], minlength=prompts)
    means = np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0)
    vetoed = np.bincount(prompt_ids[np.isneginf(values)], minlength=prompts) > 0
    return np.where((counts == 0) & vetoed, -np.inf, means)


def worth(sides: Sequence[np.ndarray], vetoed: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the prompts of two models are compared by, (P,) each: fewer vetoed images first, then the higher mean.

    `sides` are means of per_prompt, `vetoed` the shares of images with -inf. Without a veto the means themselves; with
    one far below all of them, so that of several images one veto does not hide what the others are worth.
    """
    finite = np.concatenate(sides)[np.isfinite(np.concatenate(sides))]
    low, high = finite.min(initial=math.inf), finite.max(initial=-math.inf)
    low, reach = (low, 1 + high - low) if len(finite) else (0.0, 1.0)
    pairs = zip(sides, vetoed, strict=True)
    return [np.where(np.isneginf(side), low, side) - 1000 * reach * share for side, share in pairs]


def outcomes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where `a` wins, 1/2 where it ties, 0 where it loses: (P,) each; prompts with a nan are left out."""
    known = ~(np.isnan(a) | np.isnan(b))
    return np.where(a == b, 0.5, a > b)[known]


def win_rate(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the prompts on which `a` is higher than `b`, ties as 1/2: (P,) each. -inf may lose but never wins."""
    return mean(outcomes(a, b))


def win_interval(points: np.ndarray) -> tuple[float, float]:
    """95 % interval of a win rate, the mean of points (P,): bootstrap; exact for wins alone or losses alone.

    There the bootstrap has no width, though eight wins of eight are seen one time in six at a true rate of 80 %.
    """
    sure = 0.025 ** (1 / max(len(points), 1))
    if len(points) and (points == 1).all():
        return sure, 1.0
    if len(points) and (points == 0).all():
        return 0.0, 1 - sure
    return bootstrap_interval(mean, points)


def mean(values: np.ndarray) -> float:
    """Mean of the values that are finite; nan where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.sum() / len(finite)) if len(finite) else math.nan


def bootstrap_interval(
    statistic: Callable[..., float], *samples: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*samples)`; samples are (P, ...), and their rows are drawn together.

    The rows have to be independent: prompts, not images.
    """
    count = len(samples[0])
    draws = np.random.default_rng(seed).integers(0, max(count, 1), (resamples if count else 0, count))
    values = np.array([statistic(*(sample[rows] for sample in samples)) for rows in draws])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_test(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of "a wins as often as it loses": (P,) each, ties and nan left out (scipy's binomtest)."""
    wins, losses = int(np.sum(a > b)), int(np.sum(a < b))
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def wilcoxon(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, zeros and nan left out: (P,) each; sees sizes too.

    Exact, ties included, up to 50 differences; the normal approximation above.
    """
    known = ~(np.isnan(a) | np.isnan(b)) & (a != b)
    differences = a[known] - b[known]
    if not len(differences):
        return 1.0
    _, inverse, counts = np.unique(np.abs(differences), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(counts) - (counts - 1))[inverse]  # twice the ranks: whole numbers, though ties share a mean
    if len(ranks) > 50:
        z = (np.sign(differences) * ranks).sum() / math.sqrt((ranks**2).sum())
        return math.erfc(abs(z) / math.sqrt(2))
    chances = np.ones(1)  # of every sum of the ranks that win, when each wins by the toss of a coin
    for rank in ranks:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    won = ranks[differences > 0].sum()
    return min(1.0, 2 * float(chances[: min(won, ranks.sum() - won) + 1].sum()))


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: each below .05 is a finding, whatever the number of metrics."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return adjusted.tolist()


def smallest_detectable_win_rate(prompts: int, metrics: int = 1) -> float:
    """The win rate that a two-sided test at 5 % finds with 80 % power: .60 for 200 prompts and one metric.

    Of several metrics Holm tests the first at 5 % / metrics.
    """
    quantile = NormalDist().inv_cdf
    return min(1.0, 0.5 + (quantile(1 - 0.025 / metrics) + quantile(0.8)) * 0.5 / math.sqrt(prompts))


def rater_agreement(counts: np.ndarray) -> float:
    """Share of the couples of answers to the same question that agree, counts (U, C); nan where there is no couple.

    A row is a question about one pair of images, a column one of the answers. Chance is not taken off.
    """
    answers = counts.sum(axis=1)
    couples = (answers * (answers - 1)).sum()
    return float((counts * (counts - 1)).sum() / couples) if couples else math.nan


def krippendorff_alpha(counts: np.ndarray) -> float:
    """Krippendorff's alpha of nominal answers, counts (U, C): 1 is perfect agreement, 0 is chance.

    1 - observed / expected share of couples that differ; not every rater has to answer every question. nan where no
    two raters met, or where all gave one and the same answer. K. Krippendorff, Computing Krippendorff's
    Alpha-Reliability, 2011: https://repository.upenn.edu/asc_papers/43
    """
    shared = counts[counts.sum(axis=1) > 1]
    answers, totals = shared.sum(axis=1, keepdims=True), shared.sum(axis=0)
    observed = (shared * (answers - shared) / (answers - 1)).sum()
    expected = (totals * (totals.sum() - totals)).sum() / max(totals.sum() - 1, 1)
    return float(1 - observed / expected) if expected else math.nan


def agrees_with_people(people: np.ndarray, base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """1 where a scorer prefers the image of a pair that most people prefer, 1/2 where it ties, 0 else: (V,) each.

    `people` is the tuned image's share of the votes, `base` and `tuned` are the images' scores. nan where the votes
    are split in halves or a score is not known.
    """
    scorer = np.where(base == tuned, 0.5, tuned > base)
    unknown = np.isnan(people) | (people == 0.5) | np.isnan(base) | np.isnan(tuned)
    return np.where(unknown, math.nan, np.where(people > 0.5, scorer, 1 - scorer))


# ---- The method: colour and diversity ------------------------------------------------------------------------------


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB values in [0, 1], (..., 3). White is (100, 0, 0), red (53.24, 80.09, 67.20)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def circular_mean(degrees: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """The mean direction of angles in degrees, in [0, 360), nan and weight 0 left out; nan where none is left."""
    directions = np.where(np.isnan(degrees), 0, weights * np.exp(1j * np.deg2rad(degrees)))
    return float(np.angle(directions.sum(), deg=True) % 360) if directions.any() else math.nan


def prompt_hues(hues: np.ndarray, prompt_ids: np.ndarray) -> np.ndarray:
    """The circular mean of each prompt's hues, (N,) -> (P,)."""
    return np.array([circular_mean(hues[prompt_ids == p]) for p in np.unique(prompt_ids)])


def hue_distance(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray | float:
    """The distance of two hues around the circle, in [0, 180] degrees: 350 and 10 are 20 apart."""
    return np.abs((a - b + 180) % 360 - 180)


def laplacian_std(grey: np.ndarray) -> float:
    """ATHEC's sharpness: standard deviation of the Laplacian of a grey image in 0..255, (H, W), borders mirrored."""
    g = np.pad(grey, 1, mode="reflect")
    return float((g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * grey).std())


def colour_statistics(pixels: np.ndarray) -> dict[str, float]:
    """Colour of one image, (H, W, 3) uint8, under the names of COLOURS, and its mean red, green and blue in 0..255."""
    rgb = pixels / 255.0
    lab = srgb_to_lab(rgb).reshape(-1, 3)
    high, low = rgb.max(axis=-1), rgb.min(axis=-1)
    spread = np.where(high > low, high - low, 1)
    r, g, b = np.moveaxis(rgb, -1, 0)
    sector = np.where(high == r, (g - b) / spread, np.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread))
    return {
        "hue": circular_mean(60 * sector, high - low),  # the hue of a nearly grey pixel is noise
        **dict(zip(("L", "a", "b"), lab.mean(axis=0).tolist(), strict=True)),
        **dict(zip(("L_std", "a_std", "b_std"), lab.std(axis=0).tolist(), strict=True)),
        "chroma": float(np.hypot(lab[:, 1], lab[:, 2]).mean()),
        "saturation": float(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean()),
        "clipped": float(((pixels == 0) | (pixels == 255)).any(axis=-1).mean()),
        "sharpness": laplacian_std(pixels @ np.array([0.299, 0.587, 0.114])),
        **dict(zip(("red", "green", "blue"), pixels.reshape(-1, 3).mean(axis=0).tolist(), strict=True)),
    }


COLOURS = {  # what colour_statistics measures, in words
    "L": "lightness (Lab L*)",
    "a": "green to red (Lab a*)",
    "b": "blue to yellow (Lab b*)",
    "L_std": "contrast within an image (std of L*)",
    "a_std": "std of a*",
    "b_std": "std of b*",
    "chroma": "chroma (Lab)",
    "saturation": "saturation (HSV)",
    "clipped": "share of clipped pixels",
    "sharpness": "sharpness (ATHEC, std of the Laplacian)",
}


COLOUR_COLUMNS = ("hue", *COLOURS, "red", "green", "blue")


def delta_e(base_lab: np.ndarray, tuned_lab: np.ndarray) -> float:
    """CIE76 distance of two models' mean colours, (P, 3) each, paired by prompt; 2.3 is just noticeable."""
    return delta_e_of_sets(tuned_lab - base_lab, np.zeros((1, 3)))


def delta_e_of_sets(a: np.ndarray, b: np.ndarray) -> float:
    """CIE76 distance of the mean colours of two sets, (N, 3) and (M, 3).

    Chance alone moves a mean, and every way counts as distance: what it moves on average is taken off the square.
    """
    chance = sum(side.var(axis=0, ddof=min(1, len(side) - 1)).sum() / len(side) for side in (a, b))
    return math.sqrt(max(0.0, ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() - chance))


def latent_shift(base_means: np.ndarray, tuned_means: np.ndarray, base_std: np.ndarray) -> float:
    """Mean over channels of |mean(tuned) - mean(base)| in units of base's std: channel means (P, C) each, std (C,)."""
    return float(np.mean(np.abs(tuned_means.mean(axis=0) - base_means.mean(axis=0)) / base_std))


def latent_std(means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """Std of each latent channel over all pixels of all images, by the images' means and stds (N, C): (C,)."""
    return np.sqrt((stds**2 + means**2).mean(axis=0) - means.mean(axis=0) ** 2)


def hue_shift(base_hues: np.ndarray, tuned_hues: np.ndarray) -> float:
    """Distance in degrees of the models' circular mean hues over all images, (N,) each: the paper's Hue."""
    return float(hue_distance(circular_mean(base_hues), circular_mean(tuned_hues)))


def hue_turn(base_hues: np.ndarray, tuned_hues: np.ndarray) -> float:
    """By how many degrees the prompts' hues turn together, (P,) each: in [-180, 180), signed; 120 is red to green."""
    return (circular_mean((tuned_hues - base_hues) % 360) + 180) % 360 - 180


def hue_turn_interval(base_hues: np.ndarray, tuned_hues: np.ndarray) -> tuple[float, float]:
    """95 % interval of hue_turn, around it: where it is near 180 the ends lie beyond, for an angle has no edge.

    nan where the hues turn no common way (p > .01 by Rayleigh's test): a mean direction of chance has no interval.
    """
    directions = np.exp(1j * np.deg2rad(tuned_hues - base_hues))
    if abs(directions.sum()) ** 2 < len(directions) * math.log(100):
        return math.nan, math.nan
    turn = hue_turn(base_hues, tuned_hues)
    low, high = bootstrap_interval(lambda a, b: hue_turn(a, (b - turn) % 360), base_hues, tuned_hues)
    return turn + low, turn + high


def diversity(features: np.ndarray) -> float:
    """Mean pairwise cosine distance of one prompt's images, features (K, D); 0 for equal images, nan below two."""
    if len(features) < 2:
        return math.nan
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    first, second = np.triu_indices(len(unit), k=1)
    return float(np.mean(np.sum((unit[first] - unit[second]) ** 2, axis=1) / 2))  # exactly 0 where 1 - cos would round


# ---- The method: distances to real photos --------------------------------------------------------------------------


Distance = Callable[[np.ndarray], float]  # of images' features (N, D) from photos that it knows; lower is better


def frechet_distance(photos: np.ndarray) -> Distance:
    """FID's distance from `photos`, features (M, D), in squared units of the features; nan below two rows.

    |mean(x) - mean(y)|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)) (https://arxiv.org/abs/1706.08500), without a matrix square
    root and so for N < D too: with X = (x - mean) / sqrt(N - 1) = Qx Rx, Cx = X^T X, and the last trace is the sum of
    the singular values of X Y^T, which are those of Rx Ry^T. It reads too high for few rows: their covariances differ
    by chance, and a chance difference counts as distance.
    """

    def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = rows.mean(axis=0, dtype=np.float64)
        return mean, np.linalg.qr((rows - mean) / math.sqrt(max(len(rows) - 1, 1)), mode="r")

    mean_y, ry = moments(photos)

    def distance(x: np.ndarray) -> float:
        if min(len(x), len(photos)) < 2:
            return math.nan
        mean_x, rx = moments(x)
        shared = np.linalg.norm(rx @ ry.T, "nuc")
        return float(((mean_x - mean_y) ** 2).sum() + (rx**2).sum() + (ry**2).sum() - 2 * shared)

    return distance


def kernel_distance(photos: np.ndarray) -> Distance:
    """KID's distance from `photos`, features (M, D): unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    https://arxiv.org/abs/1801.01401; of DINOv2 features it is called KD (https://arxiv.org/abs/2306.04675). All rows
    at once, not the mean over subsets of 1000. It has no unit and is not multiplied (papers often print 1000 * KID).
    Equal distributions give 0 on average, whatever the number of rows, so that a single value may be negative.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        root = a @ b.T / a.shape[1] + 1
        return root * root * root

    return unbiased_mmd(kernel, photos)


def cmmd(photos: np.ndarray, sigma: float = 10.0) -> Distance:
    """CMMD: 1000 * unbiased MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)) of CLIP embeddings of length 1.

    https://arxiv.org/abs/2401.09603, embeddings (M, D). The paper's is biased: it also counts the pairs of an image
    with itself, which adds 1000 * (1 - mean kernel) / N for each set; here equal distributions give 0 on average.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        return np.exp(squares / (-2 * sigma**2))

    distance = unbiased_mmd(kernel, photos)
    return lambda x: 1000 * distance(x)


def unbiased_mmd(kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], photos: np.ndarray) -> Distance:
    """Mean kernel of two rows of x, plus that of two photos, minus twice that of one of each; nan below two rows.

    The squared maximum mean discrepancy (https://jmlr.org/papers/v13/gretton12a.html, Lemma 6), a U-statistic: no row
    is paired with itself. `kernel` maps (N, D) and (M, D) to (N, M).
    """
    y = photos.astype(np.float64)
    among_photos = mean_kernel(kernel, y, y, diagonal=False) if len(y) > 1 else math.nan

    def distance(x: np.ndarray) -> float:
        if len(x) < 2:
            return math.nan
        x = x.astype(np.float64)
        return float(mean_kernel(kernel, x, x, diagonal=False) + among_photos - 2 * mean_kernel(kernel, x, y))

    return distance


def mean_kernel(
    kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray, diagonal: bool = True
) -> float:
    """Mean of kernel(x, y) over all pairs of rows, or without the diagonal; 1024 rows at a time, to save memory."""
    total = 0.0
    for start in range(0, len(x), 1024):
        values = kernel(x[start : start + 1024], y)
        total += values.sum() - (0 if diagonal else values.trace(offset=start))
    return total / (len(x) * (len(y) - (not diagonal)))


def jackknife_interval(
    statistic: Callable[..., float], *samples: np.ndarray, blocks: int = 20, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `statistic(*samples)` by the delete-a-block jackknife; nan where there are not two rows.

    The rows of the samples, (P, ...) each, are shuffled and cut into B = `blocks` blocks together, and each block is
    left out once: error^2 = (B - 1) / B * sum of (value without a block - mean of these values)^2
    (https://doi.org/10.1214/aos/1176347263). The interval is the value -/+ error * Student's t of B - 1 degrees.
    Not the bootstrap: its samples hold rows twice. A row and its copy are as close as rows can be, so that
    U-statistics such as unbiased_mmd, and the Frechet distance, come out too high on them, by more than the error.
    """
    count = len(samples[0])
    blocks = min(blocks, count)
    if blocks < 2:
        return math.nan, math.nan
    parts = np.array_split(np.random.default_rng(seed).permutation(count), blocks)
    values = np.array([statistic(*(np.delete(sample, part, axis=0) for sample in samples)) for part in parts])
    error = math.sqrt((blocks - 1) * values.var())
    value, reach = statistic(*samples), student_t(blocks - 1) * error
    return value - reach, value + reach


def student_t(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t, 1.96 for many degrees (Cornish-Fisher; within 1 % from 5 degrees)."""
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def real_floor(distance_to: Callable[[np.ndarray], Distance], photos: np.ndarray, n: int, seed: int) -> float:
    """The distance of `n` random photos from all others, (M, D): about what `n` images of a perfect model would read.

    At most half of the photos are set apart. Where that is less than `n`, the floor of frechet_distance is too high.
    """
    order = np.random.default_rng(seed).permutation(len(photos))
    size = min(n, len(photos) // 2)
    return distance_to(photos[order[size:]])(photos[order[:size]])


def compare_realism(
    features: dict[str, np.ndarray],
    prompt_ids: np.ndarray,
    photos: np.ndarray,
    distance_to: Callable[[np.ndarray], Distance],
    seed: int = 0,
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """How far every model's images are from photos, and how far tuned models moved; lower is better.

    features: {model: (N, D)}, "base" first, rows in the same order for all; a row with a nan in any model is left out
    for all of them, so that each has the same number of images of the same prompts. prompt_ids (N,), photos (M, D).
    Returns the distance: {"images", "floor", "models": {model: value}, "note"}, and the moves: {tuned model: {"base",
    "tuned", "difference", "interval"}}. The interval is a jackknife over blocks of prompts, paired; the photos are
    fixed, so that it does not tell how the difference would be against other photos.
    """
    known = np.logical_and.reduce([np.isfinite(found).all(axis=1) for found in features.values()])
    ids = prompt_ids[known]
    prompts, images, to_photos = np.unique(ids), len(ids), distance_to(photos)

    @lru_cache(None)  # base's distances serve every tuned model
    def distance(name: str, kept: tuple[int, ...]) -> float:
        return to_photos(features[name][known][np.isin(ids, kept)])

    def difference(name: str, kept: np.ndarray) -> float:
        return distance(name, tuple(kept)) - distance("base", tuple(kept))

    values = {name: distance(name, tuple(prompts)) for name in features}
    moves = {
        name: {
            "base": values["base"],
            "tuned": value,
            "difference": value - values["base"],
            "interval": jackknife_interval(partial(difference, name), prompts, seed=seed),
        }
        for name, value in values.items()
        if name != "base"
    }
    floor, note = real_floor(distance_to, photos, images, seed), realism_note(distance_to, images, len(photos))
    return {"images": images, "floor": floor, "models": values, "note": note}, moves


def realism_note(distance_to: Callable[[np.ndarray], Distance], images: int, photos: int) -> str:
    """Why to read a distance with care, in a sentence or two; "" where there is no reason."""
    told = f"{images} images of each model and {photos} photos"
    notes = []
    if min(images, photos) < 100:
        notes.append(f"With {told} this distance says little: use 100 of both or more.")
    if distance_to is frechet_distance and min(images, photos) < 2048:
        notes.append(
            f"A Frechet distance of {told} reads too high, and more so for varied images: below 2048 of both, trust "
            "the kernel distances."
        )
    return " ".join(notes)


# ---- Prompts ------------------------------------------------------------------------------------------------------

CAPTION_COLUMNS = ("prompt", "caption", "text")
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TABLE_SUFFIXES = {".parquet", ".arrow", ".csv", ".tsv"}


def read_prompt_list(source: str, column: str | None, max_prompts: int | None) -> tuple[list[str], str]:
    """The first `max_prompts` prompts of `source`, and a remark on what was left out (blank and repeated ones).

    A text file with one prompt per line; a .jsonl, .json, .csv, .tsv or .parquet file; a folder of photos with their
    captions; a folder or hub name (owner/name, owner/name:split) that `datasets` reads. `column`: where a source has
    some, else the first of CAPTION_COLUMNS. White space is made single spaces, the order is kept. UserError: one line.
    """
    texts, unit = read_texts(source, column)
    prompts = list(dict.fromkeys(filter(None, texts)))
    if not prompts:
        raise UserError(f"{source} {f'holds only blank {unit}s' if texts else 'is empty'}: no prompts")
    blank, chosen = texts.count(""), prompts[:max_prompts]
    left_out = f"{blank} blank {unit}s and {len(texts) - blank - len(prompts)} repeated prompts left out"
    return chosen, f"prompts: the first {len(chosen)} of {len(prompts)} in {source} ({left_out})"


def read_texts(source: str, column: str | None) -> tuple[list[str], str]:
    """The text of every line, row or photo of `source`, "" where it has none, and which of the three they are."""
    path, kind = Path(source), Path(source).suffix.lower()
    if is_photo_folder(path):
        return list(read_captions(path, column).values()), "caption"
    unit = "line" if path.is_file() and kind not in {*TABLE_SUFFIXES, ".json"} else "row"
    try:
        if path.is_dir() or not (path.exists() or kind in {*TABLE_SUFFIXES, ".json", ".jsonl", ".txt"}):
            rows = load_rows(source)
            values = read_column(rows, choose_text_column(column, rows.column_names, source))
        else:
            values = read_file(path, column)
        return [as_text(value, f"{source}, {unit} {number}") for number, value in enumerate(values, 1)], unit
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot read {source}: {reason}") from error


def as_text(value: Any, place: str) -> str:
    """`value` with single spaces, "" for None; UserError with its place where it is no text."""
    if not isinstance(value, str | None):
        raise UserError(f"{place}: a {type(value).__name__} in place of a text")
    try:
        return " ".join((value or "").encode().decode().split())
    except UnicodeEncodeError:
        raise UserError(f"{place}: half a character (a lone surrogate)") from None


def choose_text_column(column: str | None, columns: Iterable[str], place: str | Path) -> str:
    """`column`, or the first of CAPTION_COLUMNS; UserError with the names that exist where it is not in `columns`."""
    wanted, columns = [column] if column else CAPTION_COLUMNS, list(columns)
    found = [name for name in wanted if name in columns]
    if not found:
        has = textwrap.shorten(", ".join(columns), 100, placeholder=" ...")
        raise UserError(f"{place} has no column {', '.join(wanted)}: --prompt_column can be one of {has}")
    return found[0]


def read_file(path: Path, column: str | None) -> Iterable[Any]:
    """A value for every line or row of a file, by its suffix; the lines themselves where it is no table."""
    kind = path.suffix.lower()
    if kind in {".csv", ".tsv"}:
        return read_csv(path, column)
    if kind == ".parquet":
        file = pq.ParquetFile(path)
        name = choose_text_column(column, file.schema_arrow.names, path)
        return (value for batch in file.iter_batches(columns=[name]) for value in batch.column(0).to_pylist())
    if kind in {".json", ".jsonl"}:
        rows = read_json(path)
        name = choose_text_column(column, columns, path) if (columns := dict.fromkeys(chain(*rows))) else ""
        return [row.get(name) for row in rows]
    return read_lines(path)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a utf-8 file, with or without a byte order mark; UserError with the line that is not utf-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not utf-8") from error


def read_csv(path: Path, column: str | None) -> Iterator[str]:
    """The cells of a column of a .csv (commas) or .tsv (tabs) file, whose first row has the names of the columns."""
    rows = csv.reader(read_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header = [name.strip() for name in next(rows, [])]
    if not header:
        return
    index = header.index(choose_text_column(column, header, f"the first row of {path}"))
    for row in rows:
        if len(row) > len(header):
            told = f"{len(row)} cells under {len(header)} columns (a prompt with a comma needs quotes)"
            raise UserError(f"{path}, line {rows.line_num}: {told}")
        yield row[index] if len(row) > index else ""


def read_json(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line ({} where blank), or of a .json file, a list; a text is a prompt."""
    lines = map(str.strip, read_lines(path))
    texts = lines if path.suffix.lower() == ".jsonl" else ["\n".join(lines) or "[]"]
    values = []
    for number, text in enumerate(texts):
        try:
            values.append(json.loads(text or "{}"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number + error.lineno}: not json ({error.msg})") from error
    if path.suffix.lower() == ".json":
        values = values[0]
        if not isinstance(values, list):
            raise UserError(f"{path} is not a list of texts or of objects")
    return [value if isinstance(value, dict) else {"prompt": value} for value in values]


def load_rows(source: str) -> Dataset:
    """The rows of a folder or hub name, with or without :split, that `datasets` reads: of train, else the first split.

    A folder is read anew, because one that changed under its old name would come out of the cache as it was.
    """
    import datasets

    named = None if Path(source).is_dir() else re.fullmatch(r"(.+):([\w.-]+(?:\[[^]]*\])?)", source)
    name, split = named.groups() if named else (source, None)
    folder = Path(name).is_dir()
    if not folder and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"no such file or folder: {source}")
    datasets.disable_progress_bars()
    mode = "force_redownload" if folder else "reuse_dataset_if_exists"
    try:
        loaded = datasets.load_dataset(name, split=split, download_mode=mode)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(f"{source} is not a file, nor can datasets load it: {reason}") from error
    return loaded if split else loaded["train" if "train" in loaded else next(iter(loaded))]


def read_column(rows: Dataset, name: str) -> Iterator[Any]:
    """The values of a column, in batches, without reading the others."""
    return (value for batch in rows.select_columns([name]).iter(1000) for value in batch[name])


def is_photo_folder(folder: Path) -> bool:
    """A folder with photos in it, and with captions if it has tables too; other tables are left to `datasets`."""
    photos = list_photos(folder)
    tables = any(path.suffix.lower() in TABLE_SUFFIXES for path in folder.rglob("*"))
    return bool(photos) and (not tables or any(map(read_caption_file, photos)) or any(folder.rglob("metadata.jsonl")))


def list_photos(folder: Path) -> list[Path]:
    """The photos in a folder and the folders in it, by path; hidden ones are no photos."""
    photos = (path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    return sorted(path for path in photos if not any(part[0] == "." for part in path.relative_to(folder).parts))


def find_captions(folder: Path, column: str | None) -> dict[Path, str]:
    """The photos of a folder, by path, with their captions: metadata.jsonl's, else the file's beside it, else ""."""
    told: dict[Path, str] = {}
    for table in folder.rglob("metadata.jsonl"):
        told |= read_metadata(table, column)
    return {photo: told.get(photo) or read_caption_file(photo) for photo in sorted({*list_photos(folder), *told})}


def read_captions(folder: Path, column: str | None) -> dict[Path, str]:
    """find_captions of a folder where at least one photo has one."""
    captions = find_captions(folder, column)
    if not any(captions.values()):
        told = "none has a caption (metadata.jsonl, or a .txt or .caption file beside it)"
        raise UserError(
            f"{len(captions)} photos in {folder}, {told}: make_preference_data.py --caption_model writes them"
        )
    return captions


def read_metadata(table: Path, column: str | None) -> dict[Path, str]:
    """The captions in a metadata.jsonl of `datasets`' imagefolder; UserError with the line whose photo is missing."""
    rows, captions = read_json(table), {}
    columns = dict.fromkeys(chain(*rows))
    has_texts = column or not columns.keys().isdisjoint(CAPTION_COLUMNS)
    name = choose_text_column(column, columns, table) if has_texts else ""
    for number, row in enumerate(rows, 1):
        photo = table.parent / str(row.get("file_name"))
        if row and not photo.is_file():
            raise UserError(f"{table}, line {number}: there is no file {row.get('file_name', '(no file_name)')}")
        if row:
            captions[photo] = as_text(row.get(name), f"{table}, line {number}")
    return captions


def read_caption_file(photo: Path) -> str:
    """The text of the .txt or .caption file beside a photo, "" where there is none."""
    files = [file for file in (photo.with_suffix(".txt"), photo.with_suffix(".caption")) if file.is_file()]
    return next(filter(None, (" ".join("".join(read_lines(file)).split()) for file in files)), "")


# ---- Data: images --------------------------------------------------------------------------------------------------

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for a file's content


def image_settings(args: argparse.Namespace, model: Model) -> dict[str, object]:
    """All that a model's images depend upon, beside prompt and index; kept beside them as settings.json."""
    names = "pretrained_model_name_or_path revision variant mixed_precision sampler num_inference_steps guidance_scale"
    names += " negative_prompt height width seed"
    settings: dict[str, object] = {name: getattr(args, name) for name in names.split()}
    base = Path(args.pretrained_model_name_or_path)
    if base.is_dir():
        settings["pretrained_model_name_or_path"] = base.resolve().name
        settings["base_weights"] = fingerprint([*all_weights(base), *sorted(base.rglob("*.json"))])
    files = [file for path in (model.path, model.text_encoder) if path for file in tuned_files(path)]
    settings["tuned_weights"] = fingerprint(files) if files else None
    for option in ("lora_scale", "blocks", "text_encoder_timesteps"):
        settings[option] = plain(getattr(model, option))
    identity = args.identity if model.identity else None
    settings["identity"] = identity and (
        f"{fingerprint(identity_files(identity))} {identity.image_encoder}, scale {identity.scale:g}"
    )
    return settings


def open_image_folder(folder: Path, settings: dict[str, object], prompts: list[str], overwrite: bool) -> None:
    """Makes `folder` ready for images of these settings and prompts; UserError where others there have to stay."""
    record = folder / "settings.json"
    old = read_object(record) if record.is_file() else {}
    changed = [f"{key} {old.get(key)} -> {settings[key]}" for key in settings if old.get(key) != settings[key]]
    changed += [f"{file.name} is of another prompt" for file in other_images(folder, prompts)[:1]]
    if changed and any(folder.glob("*.png")):
        if not overwrite:
            raise UserError(
                f"{folder} holds images of another run ({', '.join(changed)}): "
                "--overwrite makes them anew, another --output_dir keeps them"
            )
        for file in folder.glob("*.png"):
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(settings, indent=2).encode())


def other_images(folder: Path, prompts: list[str]) -> list[Path]:
    """The images drawn here, PROMPT_INDEX.png, that carry another prompt than that of their number."""
    files = [file for file in sorted(folder.glob("*.png")) if re.fullmatch(r"\d+_\d+", file.stem)]
    number = {file: int(file.stem.partition("_")[0]) for file in files}
    told = {file: image_text(file).get("prompt") for file, p in number.items() if p < len(prompts)}
    return [file for file, prompt in told.items() if prompt not in (None, prompts[number[file]])]


def image_file(output: Path, model: Model, prompt: int, index: int) -> Path:
    """Where a model's image that is drawn here lies."""
    return output / "images" / model.name / f"{prompt:05d}_{index}.png"


def find_images(model: Model, prompts: list[str], plan: list[tuple[int, int]]) -> list[Path | None]:
    """The finished image of every (prompt, index) of the plan in a folder from elsewhere, None where there is none.

    An image belongs to the prompt that is its caption (metadata.jsonl, or a .txt file beside it) or that it carries
    (carried_prompt); several of one prompt come in the order of their paths. Where that finds none, names say it:
    00012_0.png is the first image of the thirteenth prompt. UserError where no image belongs to any prompt.
    """
    captions = find_captions(model.path, None)
    captions = {path: " ".join((caption or carried_prompt(path)).split()) for path, caption in captions.items()}
    number = {prompt: p for p, prompt in enumerate(prompts)}
    counts: Counter[int] = Counter()
    found: dict[tuple[int, int], Path] = {}
    for path, caption in captions.items():
        if caption in number:
            found[number[caption], counts[number[caption]]] = path
            counts[number[caption]] += 1
    if not found:
        named = {path: re.fullmatch(r"(\d+)_(\d+)", path.stem) for path in captions}
        found = {(int(name[1]), int(name[2])): path for path, name in named.items() if name}
    if not set(plan) & found.keys():
        how = "no caption is one of the prompts, and no name is like 00012_0.png (prompt 12, image 0)"
        raise UserError(f"{model.name}: {len(captions)} images in {model.path}, but {how}")
    return [found.get(row) for row in plan]


def carried_prompt(path: Path) -> str:
    """The prompt in a PNG's texts: ours, or what A1111 writes before its settings; "" where there is none."""
    info = image_text(path)
    text = info.get("prompt") or info.get("parameters") or ""
    return re.split(r"\nNegative prompt:|\nSteps:", text)[0] if isinstance(text, str) else ""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames, so that a file is there whole or not at all. UserError: full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what is finished is kept") from error


def png(image: Image.Image, **text: str) -> bytes:
    """`image` as a PNG that carries `text`."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_itxt(key, value)
    image.save(buffer, "PNG", pnginfo=info, compress_level=1)  # the default takes three times as long for a tenth less
    return buffer.getvalue()


def image_text(path: Path) -> dict[str, str]:
    """What an image of ours carries (prompt, seed, latent_mean, latent_std), ahead of its pixels; {} without image."""
    try:
        with Image.open(path) as image:
            return image.info
    except UNREADABLE:
        return {}


def is_finished(path: Path, seed: int) -> bool:
    """Whether an image of ours with this seed is there, to the last chunk of its file."""
    if image_text(path).get("seed") != str(seed):
        return False
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return file.read(4) == b"IEND"


def load_images(paths: list[Path]) -> list[Image.Image]:
    """The images in RGB, decoded by a few threads; UserError with the file that cannot be read."""

    def load(path: Path) -> Image.Image:
        try:
            return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except UNREADABLE as error:
            raise UserError(f"cannot read the image {path}: {error}") from error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(load, paths))


def in_batches(items: list, size: int) -> Iterator[list]:
    """`items` in consecutive lists of `size`, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


# ---- Scorers --------------------------------------------------------------------------------------------------------
# A scorer is a function factory(device, **options) -> score(images, prompts) -> one float per image, higher is better.
# -inf may lose but never win; nan is used for neither side. Your own: module:factory or path/to/file.py:factory; or
# file.jsonl, with scores made elsewhere. No score needs torchvision.

Score = Callable[[list[Image.Image], list[str]], list[float]]
Device = torch.device | str


class ScorerSpec(NamedTuple):
    """A parsed --scorer; `load(device)` makes the scoring function."""

    label: str  # its name in the data set
    weight: float  # its weight in the ensemble
    source: str  # NAME[=MODEL][,option=value...] as given
    load: Callable[[Device], Score]


CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSORS = {"yuvalkirstain/PickScore_v1": CLIP_H, "adams-story/HPSv2-hf": CLIP_H}  # of all others: the model's own
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_score(device: Device, model: str = CLIP_L, processor: str = "", crop: bool = False) -> Score:
    """100 * cos(image, text) of any CLIPModel."""
    embed_images, embed_texts, _ = load_clip(device, model, processor, crop)
    return lambda images, prompts: (100 * (embed_images(images) * embed_texts(prompts)).sum(-1)).tolist()


def pick_score(
    device: Device, model: str = "yuvalkirstain/PickScore_v1", processor: str = "", crop: bool = False
) -> Score:
    """PickScore (https://arxiv.org/abs/2305.01569): exp(logit_scale) * cos(image, text), of any CLIPModel trained so.

    A difference is a Bradley-Terry logit: at 0.5 about 62 % of people agree, at 1 about 73 %.
    """
    embed_images, embed_texts, scale = load_clip(device, model, processor, crop)
    return lambda images, prompts: (scale * (embed_images(images) * embed_texts(prompts)).sum(-1)).tolist()


def hps_score(device: Device, model: str = "adams-story/HPSv2-hf", processor: str = "", crop: bool = False) -> Score:
    """Human Preference Score v2 (https://arxiv.org/abs/2306.09341): cos(image, text), about 0.2 to 0.35."""
    embed_images, embed_texts, _ = load_clip(device, model, processor, crop)
    return lambda images, prompts: (embed_images(images) * embed_texts(prompts)).sum(-1).tolist()


def aesthetic_score(
    device: Device,
    model: str = CLIP_L,
    head: str = "ttj/sac-logos-ava1-l14-linearMSE",
    processor: str = "",
    crop: bool = False,
) -> Score:
    """LAION's aesthetic predictor V2, about 1 to 10, of the image's normalised CLIP-L/14 embedding.

    Blind to the prompt. https://github.com/christophschuhmann/improved-aesthetic-predictor, the weights called
    sac+logos+ava1-l14-linearMSE.
    """
    embed_images, _, _ = load_clip(device, model, processor, crop)
    predict = linear_head(load_tensors(head, "model.safetensors"), "layers.", device)
    return lambda images, prompts: predict(embed_images(images)).tolist()


def clip_iqa(
    device: Device,
    model: str = CLIP_L,
    processor: str = "",
    crop: bool = False,
    good: str = "Good photo.",
    bad: str = "Bad photo.",
) -> Score:
    """CLIP-IQA (https://arxiv.org/abs/2207.12396): P(good) of softmax over exp(logit_scale) * cos with both texts.

    Blind to the prompt. The paper's CLIP is an RN50 without position embeddings; here it is any CLIPModel.
    """
    embed_images, embed_texts, scale = load_clip(device, model, processor, crop)
    texts = embed_texts([good, bad])
    return lambda images, prompts: (scale * embed_images(images) @ texts.T).softmax(-1)[:, 0].tolist()


def image_reward(
    device: Device,
    model: str = "zai-org/ImageReward",
    tokenizer: str = "google-bert/bert-base-uncased",
    crop: bool = False,
) -> Score:
    """ImageReward (https://arxiv.org/abs/2304.05977): BLIP reads the prompt while looking at the image; about N(0, 1).

    (mlp(first token) - mean) / std, in fp32. `model` is the published checkpoint ImageReward.pt, or its folder or
    repository; the sizes are read off its tensors. Prompts are cut at 35 tokens, as in its training.
    """
    from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    weights = load_tensors(model, "ImageReward.pt")
    vision, text = (
        {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        for part in ("blip.visual_encoder.", "blip.text_encoder.")
    )
    width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    size = math.isqrt(vision["pos_embed"].shape[1] - 1) * patch
    see = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=sum(key.endswith("norm1.bias") for key in vision),
            num_attention_heads=max(1, width // 64),
            image_size=size,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    words, text_width = text["embeddings.word_embeddings.weight"].shape
    read = BlipTextModel(
        BlipTextConfig(
            vocab_size=words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=sum(key.endswith("intermediate.dense.bias") for key in text),
            num_attention_heads=max(1, text_width // 64),
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            is_decoder=True,  # gives it the cross-attention; it is called as an encoder, without a causal mask
        ),
        add_pooling_layer=False,
    )
    for part, tensors in ((see, {blip_key(key): value for key, value in vision.items()}), (read, text)):
        missing = part.load_state_dict(tensors, strict=False).missing_keys
        if missing:
            raise ValueError(f"{model} has no weights {missing[0]}")
        part.to(device).eval()
    predict = linear_head(weights, "mlp.layers.", device)
    to_tokens = AutoTokenizer.from_pretrained(tokenizer)
    fit = ImageOps.fit if crop else ImageOps.pad
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        squares = np.stack([np.asarray(fit(image.convert("RGB"), (size, size))) for image in images])
        pixels = (torch.from_numpy(squares).permute(0, 3, 1, 2) / 255 - mean) / std
        tokens = to_tokens(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        seen = see(pixels.to(device)).last_hidden_state
        hidden = read(
            tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            encoder_hidden_states=seen,
        ).last_hidden_state
        return ((predict(hidden[:, 0]) - 0.16717362830052426) / 1.0333394966054072).tolist()

    return score


def people_score(
    device: Device,
    model: str = "PekingU/rtdetr_v2_r50vd",
    pose: str = "usyd-community/vitpose-base-simple",
    count: int = 0,
    part: str = "",
    columns: dict[str, dict[str, Any]] | None = None,
) -> Score:
    """Are the people there whom the prompt asks for, and can their bodies be read? -inf if not, else 0 to 1.

    A detector (https://arxiv.org/abs/2407.17140) finds persons with a score above 0.5 on at least 2 % of the image;
    ViTPose (https://arxiv.org/abs/2204.12484) gives their 17 COCO keypoints; see rate_people, also for `part`. How
    many people there should be says `count`, or the column `people` of the prompts' file, {prompt: its row};
    without both any number will do. It is our heuristic. It sees missing, surplus and unreadable people and limbs that
    are much too long; not fingers, faces, a third arm, or limbs that are too short.
    """
    if part not in ("", "count", "pose", "limbs"):
        raise ValueError(f"part is count, pose or limbs, not {part}")
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, VitPoseForPoseEstimation

    detector, estimator = (
        load_weights(kind, name, device)
        for kind, name in ((AutoModelForObjectDetection, model), (VitPoseForPoseEstimation, pose))
    )
    to_pixels, to_crops = (AutoImageProcessor.from_pretrained(name, backend="pil") for name in (model, pose))
    person = detector.config.label2id.get("person")
    if person is None:
        raise ValueError("the detector has no label 'person'")

    def wanted(prompt: str) -> int | None:
        told = (columns or {}).get(prompt, {}).get("people")
        return count or (int(float(told)) if str(told or "").strip() not in ("", "nan", "None") else None)

    def find_people(images: list[Image.Image]) -> list[list[list[float]]]:
        """Every image's boxes (left, top, width, height) in pixels."""
        found = to_pixels.post_process_object_detection(
            detector(**to_pixels(images=images, return_tensors="pt").to(device)),
            threshold=0.5,
            target_sizes=[(image.height, image.width) for image in images],
        )
        boxes = []
        for image, result in zip(images, found, strict=True):
            corners = result["boxes"][result["labels"] == person].view(-1, 2, 2).clamp(min=0)
            corners = torch.minimum(corners, corners.new_tensor(image.size))
            sides = corners[:, 1] - corners[:, 0]
            large = sides.prod(-1) >= 0.02 * image.width * image.height
            boxes.append(torch.cat([corners[:, 0], sides], dim=-1)[large].tolist())
        return boxes

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        images = [image.convert("RGB") for image in images]
        boxes = find_people(images)
        heatmaps = torch.zeros(0, 17, 1, 1)
        if any(boxes):  # ViTPose's processor raises where a batch has no box at all
            crops = to_crops(images, boxes=boxes, return_tensors="pt").pixel_values.to(device)
            coco = torch.zeros(len(crops), dtype=torch.long, device=device)  # ViTPose+ has an expert per data set
            heatmaps = estimator(crops, dataset_index=coco).heatmaps.cpu()
        confidence, cell = heatmaps.flatten(2).max(dim=-1)
        points = torch.stack([cell % heatmaps.shape[3], cell // heatmaps.shape[3]], dim=-1).float()
        sizes = [len(found) for found in boxes]
        each = zip(points.split(sizes), confidence.clamp(0, 1).split(sizes), prompts, strict=True)
        return [rate_people(place, sure, wanted(prompt), part) for place, sure, prompt in each]

    return score


def rate_people(points: torch.Tensor, confidence: torch.Tensor, wanted: int | None, part: str = "") -> float:
    """Rates the keypoints of P boxes, (P, 17, 2), with their confidences in [0, 1], for `wanted` people (None: any).

    A box holds a person if the shoulders (5 and 6) have a mean confidence above 0.3; a profile hides one of them.
    part "count": 1 if as many persons are there as wanted, else 0; "pose": mean confidence, 0 without a person;
    "limbs": the persons' mean of plausible_limbs, nan where it is not known; "": pose * limbs, or pose alone where
    limbs is not known, but -inf unless as many persons are there as wanted.
    """
    clear = confidence[:, 5:7].mean(-1) > 0.3
    there = clear.sum() == wanted if wanted else clear.any()
    pose = confidence[clear].mean().item() if clear.any() else 0.0
    limbs = plausible_limbs(points[clear], confidence[clear]).nanmean().item()
    combined = pose * (1.0 if math.isnan(limbs) else limbs)
    return {"count": float(there), "pose": pose, "limbs": limbs, "": combined if there else -math.inf}[part]


# COCO's keypoints: nose, eyes and ears (0 to 4), then left and right by turns: shoulders (5, 6), elbows (7, 8), wrists
# (9, 10), hips (11, 12), knees (13, 14), ankles (15, 16). Lengths as shares of a standing body's height, rounded from
# Drillis and Contini's tables (Body Segment Parameters, 1966) between the joints that annotators mark.
LIMBS = {
    **dict.fromkeys(((5, 7), (6, 8)), 0.19),  # upper arms
    **dict.fromkeys(((7, 9), (8, 10)), 0.15),  # forearms
    **dict.fromkeys(((11, 13), (12, 14), (13, 15), (14, 16)), 0.25),  # thighs and shins
}
TRUNK = {
    0.29: [(5, 11), (6, 12)],  # shoulder to hip
    0.23: [(5, 6)],  # shoulder to shoulder
    0.08: [(a, b) for a in range(5) for b in range(a)],  # the head: ear to ear from the front, nose to ear from a side
}


def plausible_limbs(points: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """Share of each person's clearly seen limbs that are not too long, (P,): keypoints (P, 17, 2), confidence (P, 17).

    Too long is above 1.6 * share * body_height: foreshortening may make the height 1.41 times too small, and people
    differ by a tenth. A limb may be short: it points at the camera. nan where no limb or no height is known.
    """
    lengths = limb_lengths(points, confidence, LIMBS)
    longest = 1.6 * body_height(points, confidence)[:, None] * torch.tensor(list(LIMBS.values()))
    unknown = lengths.isnan() | longest.isnan()
    return (lengths <= longest).float().masked_fill(unknown, math.nan).nanmean(-1)


def body_height(points: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """Standing heights (P,) of bodies by torso, shoulder line or head, whichever tells most, in units of `points`.

    Torso and shoulder line are at a right angle, so that a view from anywhere leaves one of them at least 1 / sqrt(2)
    of its length. nan unless two of the three are seen: the shoulder line alone may be a profile's.
    """
    parts = [limb_lengths(points, confidence, ends).nan_to_num(0).amax(-1) / share for share, ends in TRUNK.items()]
    heights = torch.stack(parts, dim=-1)
    return heights.amax(-1).masked_fill((heights > 0).sum(-1) < 2, math.nan)


def limb_lengths(points: torch.Tensor, confidence: torch.Tensor, ends: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Distances (P, S) of S pairs of keypoints (P, 17, 2); nan unless both have a confidence above 0.3."""
    a, b = torch.tensor(list(ends)).T
    lengths = (points[:, a] - points[:, b]).norm(dim=-1)
    return lengths.masked_fill(torch.minimum(confidence[:, a], confidence[:, b]) <= 0.3, math.nan)


NUMBERS = {
    **dict.fromkeys(("a", "an", "one", "another", "his", "her", "their", "my"), 1),
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
}
PERSON = (
    "person|human|man|woman|boy|girl|lady|gentleman|guy|child|kid|baby|toddler|teenager|adult|friend|mother|father|"
    "mom|dad|daughter|son|sister|brother|parent|grandmother|grandfather|bride|groom|husband|wife"
)
PEOPLE = f"people|men|women|ladies|gentlemen|children|babies|wives|(?:{PERSON})s"
TOGETHER = {"couple": 2, "duo": 2, "twins": 2, "trio": 3, "triplets": 3}
GENERAL = "people|persons|humans|friends|adults|" + "|".join(TOGETHER)
UNCOUNTED = "crowds?|groups?|family|families|teams?|couples|audience"


def count_people(prompt: str) -> int | None:
    """How many people a prompt asks for, by its English nouns: "a mother and her two sons" is 3; None: not said.

    A bare noun that was there before ("a woman ..., the woman ...") is the same person. The number is left open by a
    plural without one, by a crowd or group, and by "two people, a man and a woman", which may or may not be two.
    """
    text = re.sub(r"\b\d+[ -]?years?[ -]old\b", "", prompt.lower())
    text = re.sub(r"\b(couple|pair) of\b", "two", text)
    text = re.sub(rf"\b(group|family|team) of (?=\d|({'|'.join(NUMBERS)})\b)", "", text)
    number, known, general, special = None, set(), 0, 0
    for word in re.findall(r"[a-z]+|\d+|[^\w\s]", text):
        plural = re.fullmatch(PEOPLE, word)
        if word in NUMBERS or word.isdigit():
            number = NUMBERS.get(word) or int(word)
        elif re.fullmatch(UNCOUNTED, word) or (plural and number in (None, 1)):
            return None
        elif plural or word in TOGETHER or re.fullmatch(PERSON, word):
            new = bool(number) or word not in known
            count = new * (number if plural else TOGETHER.get(word, 1))
            general, special = (
                (general + count, special) if re.fullmatch(GENERAL, word) else (general, special + count)
            )
            known.add(word)
            number = None
        elif word in {"and", "of", "the", "with"} or not word.isalpha():
            number = None  # other words may stand between a number and its noun
    return None if general and special else general or special or None


def vqa_score(
    device: Device,
    model: str,
    question: str = 'Does this picture show "{prompt}" with correct human anatomy? Answer Yes or No.',
) -> Score:
    """P("Yes") of a model that answers questions about images, any decoder of AutoModelForImageTextToText; 0 to 1.

    VQAScore (https://arxiv.org/abs/2404.01291): softmax over the vocabulary at the last position, in fp32. `{prompt}`
    stands for the prompt. Without a chat template the question has to hold the model's own image token. On CUDA in the
    precision of the model's files.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    vlm = load_weights(
        AutoModelForImageTextToText, model, device, "auto" if torch.device(device).type == "cuda" else torch.float32
    )
    processor = AutoProcessor.from_pretrained(model, backend="pil")
    processor.tokenizer.padding_side = "left"  # so that the last position is the answer's
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    yes = processor.tokenizer.encode("Yes", add_special_tokens=False)[0]

    def ask(prompt: str) -> str:
        words = question.replace("{prompt}", prompt)
        if not processor.chat_template:
            return words
        content = [{"type": "image"}, {"type": "text", "text": words}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        inputs = processor(
            images=[[image.convert("RGB")] for image in images],
            text=[ask(prompt) for prompt in prompts],
            padding=True,
            return_tensors="pt",
        )
        logits = vlm(**inputs.to(device, vlm.dtype), logits_to_keep=1).logits[:, -1]
        return logits.float().softmax(-1)[:, yes].tolist()

    return score


def load_clip(
    device: Device, model: str, processor: str, crop: bool
) -> tuple[Callable[[list[Image.Image]], torch.Tensor], Callable[[list[str]], torch.Tensor], float]:
    """A CLIPModel's embed_images and embed_texts, both -> (B, D) float32 of length 1, and its exp(logit_scale).

    fp16 on CUDA, fp32 elsewhere (bf16's noise is a fifth of the scores' spread). Images are padded to a square; with
    `crop` the processor's centre crop is kept, as published. Prompts are cut by tokens and encoded once each.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    clip = load_weights(CLIPModel, model, device, dtype)
    processor = processor or PROCESSORS.get(model, model)
    to_tokens = AutoTokenizer.from_pretrained(processor)
    to_pixels = AutoImageProcessor.from_pretrained(processor, backend="pil")
    length = clip.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def embed_images(images: list[Image.Image]) -> torch.Tensor:
        images = [image.convert("RGB") for image in images]
        if not crop:
            images = [ImageOps.pad(image, (max(image.size), max(image.size))) for image in images]
        pixels = to_pixels(images=images, return_tensors="pt").pixel_values.to(device, dtype)
        embeds = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        return torch.nn.functional.normalize(embeds.float(), dim=-1)

    @lru_cache(maxsize=4096)
    @torch.inference_mode()
    def embed_text(prompt: str) -> torch.Tensor:
        tokens = to_tokens(prompt, truncation=True, max_length=length, return_tensors="pt").to(device)
        embeds = clip.text_projection(clip.text_model(**tokens).pooler_output)
        return torch.nn.functional.normalize(embeds.float(), dim=-1)[0]

    def embed_texts(prompts: list[str]) -> torch.Tensor:
        return torch.stack([embed_text(prompt) for prompt in prompts])

    return embed_images, embed_texts, clip.logit_scale.float().exp().item()


def load_weights(kind: Any, name: str, device: Device, dtype: torch.dtype | str = torch.float32) -> Any:
    """A transformers model, ready to score. Weights that its files lack would be random: they are an error."""
    model, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    missing = set(report["missing_keys"]) & {key for key, _ in model.named_parameters()}
    if missing:
        raise ValueError(f"{name} has no weights {min(missing)}")
    return model.to(device).eval()


def load_tensors(name: str, filename: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pt or .pth file: `name` itself, or `filename` in the folder or repository."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    path = Path(name) / filename if Path(name).is_dir() else Path(name)
    if not path.is_file():
        path = Path(hf_hub_download(name, filename))
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


def linear_head(
    weights: dict[str, torch.Tensor], prefix: str, device: Device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """LAION's and ImageReward's head (B, D) -> (B,): Linear layers, without activations, numbered after `prefix`."""
    numbers = sorted({int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix)})
    layers = [[weights[f"{prefix}{i}.{part}"].float().to(device) for part in ("weight", "bias")] for i in numbers]

    def predict(embeds: torch.Tensor) -> torch.Tensor:
        for weight, bias in layers:
            embeds = torch.nn.functional.linear(embeds, weight, bias)
        return embeds[:, 0]

    return predict


def blip_key(key: str) -> str:
    """The name in transformers of a weight of BLIP's image encoder, which has timm's names."""
    for theirs, ours in {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks.": "encoder.layers.",
        "attn.": "self_attn.",
        "attn.proj.": "attn.projection.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
    }.items():
        key = key.replace(theirs, ours)
    return re.sub(r"^norm\.", "post_layernorm.", key)


def scores_of_file(path: str) -> Callable[[Device], Score]:
    """Scores made elsewhere: lines {"image_id": "...", "score": number or null}; null is used for neither side.

    They are joined on the images' `info["image_id"]`.
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    table: dict[str, float] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image_id, value = row["image_id"], row["score"]
            table[image_id] = math.nan if value is None else float(value)
        except (ValueError, KeyError, TypeError):
            form = '{"image_id": "...", "score": number or null}'
            raise UserError(f"{path}, line {number}: not of the form {form}") from None

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        ids = [image.info.get("image_id") for image in images]
        for image_id in ids:
            if image_id not in table:
                raise UserError(f"{path} has no score for the image {image_id}: give it one, or null")
        return [table[image_id] for image_id in ids]

    return lambda device: score


BUILT_IN_SCORERS: dict[str, Callable[..., Score]] = {
    "pickscore": pick_score,
    "clip": clip_score,
    "hpsv2": hps_score,
    "aesthetic": aesthetic_score,
    "imagereward": image_reward,
    "clip_iqa": clip_iqa,
    "clip_iqa_sharpness": partial(clip_iqa, good="Sharp photo.", bad="Blurry photo."),
    "people": people_score,
    "people_count": partial(people_score, part="count"),
    "people_pose": partial(people_score, part="pose"),
    "people_limbs": partial(people_score, part="limbs"),
    "vqa": vqa_score,
}
imagereward, people, vqa = image_reward, people_score, vqa_score  # --scorer eval_human.py:people of other scripts
# The options that name weights, and the file by which their folder is known.
WEIGHTS = {
    "model": "config.json",
    "pose": "config.json",
    "processor": "tokenizer_config.json",
    "tokenizer": "tokenizer_config.json",
    "head": "model.safetensors",
}


def split_spec(spec: str) -> tuple[str, str | None, str, str, dict[str, str]]:
    """A spec's label, weight (None: not given), source (all but the weight), NAME and options, unchecked."""
    weight, source = re.fullmatch(r"(?:([^*=:,]*)\*)?(.*?)(?:,sha256=\w*)?", spec, re.DOTALL).groups()
    first, *rest = re.split(r",(?=\w+=)", source)
    name, _, model = first.partition("=")
    options = {"model": model} if model else {}
    options |= dict(option.split("=", 1) for option in rest)
    label = options.pop("label", Path(name).stem if name.endswith(".jsonl") else name.rpartition(":")[2])
    return label, weight, source, name, options


def parse_scorer_spec(spec: str) -> ScorerSpec:
    """Reads `[WEIGHT*]NAME[=MODEL][,option=value...]` and checks all that can be checked without loading weights.

    NAME is one of BUILT_IN_SCORERS, module:function, file.py:function or file.jsonl. An option begins at a comma that
    a word and = follow, so that a question may hold commas. `label` is an option of every scorer.
    """
    label, weight, source, name, options = split_spec(spec)
    weight = 1.0 if weight is None else read_number(float, f"scorer {spec}", weight)
    factory = BUILT_IN_SCORERS.get(name) or find_scorer(name)
    options = read_options(name, factory, options)
    load = partial(load_named, source, factory, **options)
    for file in plug_in_files(name):  # other code or other scores under the old name are another scorer
        source += f",sha256={hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    return ScorerSpec(label, weight, source, load)


def parse_scorer_specs(specs: list[str]) -> list[ScorerSpec]:
    """All of --scorer; two scorers of the same label cannot be told apart."""
    scorers = [parse_scorer_spec(spec) for spec in specs]
    twice = [label for label, count in Counter(scorer.label for scorer in scorers).items() if count > 1]
    if twice:
        raise UserError(f"two scorers are called {twice[0]}: give one of them another name with ,label=...")
    return scorers


def read_options(name: str, factory: Callable[..., Score], options: dict[str, str]) -> dict[str, Any]:
    """The options in the types of the factory's defaults; weights have to be there or to be a hub id."""
    try:
        _, *parameters = inspect.signature(factory).parameters.values()  # the device comes first
    except ValueError:  # no parameter at all, or a type of Python's own
        raise UserError(f"scorer {name} is not a function of the device that returns score(images, prompts)") from None
    known = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    read: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known and len(known) == len(parameters):
            raise UserError(f"scorer {name} has no option {option}, only {', '.join([*known, 'label'])}")
        kind = type(known.get(option))
        read[option] = read_number(kind, f"scorer {name}", text) if kind in (bool, int, float) else text
        if name in BUILT_IN_SCORERS and option in WEIGHTS:
            check_weights(text, "ImageReward.pt" if (name, option) == ("imagereward", "model") else WEIGHTS[option])
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in read:
            hint = "" if name in BUILT_IN_SCORERS else " (a scorer is a function device -> score(images, prompts))"
            way = f"{name}{'' if option == 'model' else ',' + option}=..."
            raise UserError(f"scorer {name} needs a {option}: {way}{hint}")
    return read


def read_number(kind: type, what: str, text: str) -> Any:
    """A finite number of the kind int, float, or bool (0 or 1)."""
    try:
        number = float(text) if kind is float else kind(int(text))
    except ValueError:
        raise UserError(f"{what}: {text} is not a number") from None
    if not math.isfinite(number):
        raise UserError(f"{what}: {text} is not a finite number")
    return number


def check_weights(name: str, needs: str) -> None:
    """Refuses what is neither a file of weights, nor a folder that holds the file `needs`, nor a hub id."""
    if Path(name).suffix not in {".safetensors", ".pt", ".pth"}:
        check_model(name, needs)
    elif not Path(name).is_file():
        raise UserError(f"no such file: {name}")


def find_scorer(name: str) -> Callable[..., Score]:
    """The scorer of a file.jsonl, or the function that `module:function` or `path/to/file.py:function` names."""
    if name.endswith(".jsonl"):
        return scores_of_file(name)
    module_name, colon, function = name.rpartition(":")
    if not colon:
        known = ", ".join(BUILT_IN_SCORERS)
        raise UserError(f"unknown scorer {name!r}: use {known}, module:function, file.py:function or file.jsonl")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except Exception as error:  # it is the user's code
        raise UserError(f"scorer {name}: cannot import {module_name}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"scorer {name}: {module_name} has no function {function}")
    return getattr(module, function)


def plug_in_files(name: str) -> list[Path]:
    """The file of a file.jsonl, module:function or file.py:function, by whose content it is known; [] of others."""
    module, colon, _ = name.rpartition(":")
    if name.endswith(".jsonl"):
        return [Path(name)]
    spec = importlib.util.find_spec(module) if colon and not module.endswith(".py") else None
    origin = (spec.origin if spec else module) if colon else ""
    return [Path(origin)] if Path(origin).is_file() else []  # of a module of Python's own there is none


def load_named(source: str, factory: Callable[..., Score], device: Device, **options: Any) -> Score:
    """factory(device, **options); what a hub, a file or a user's code raises becomes one line with its name."""
    try:
        return factory(device, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the scorer {source}: {reason}") from error


def run_scorer(score: Score, label: str, images: list[Image.Image], prompts: list[str]) -> list[float]:
    """One float per image, or an error that names the scorer."""
    scores = [float(value) for value in score(images, prompts)]
    if len(scores) != len(images):
        raise UserError(f"scorer {label} gave {len(scores)} scores for {len(images)} images")
    return scores


# ---- Models and sampling -------------------------------------------------------------------------------------------


def quiet_libraries() -> None:
    """Silences what the libraries print and a user cannot act on; call it before diffusers' models are imported."""
    for name in ("xformers", "bitsandbytes"):  # "can't load C++/CUDA extensions", "failed to load CPU gemm" on a CPU
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # diffusers 0.36 has no other name
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # "requires torchvision", the safety checker's notice
        library.utils.logging.disable_progress_bar()  # "Loading pipeline components", "Loading weights"


def check_model(name: str, needs: str) -> None:
    """Refuses a model name that is neither a hub id (owner/name) nor a folder that holds the file `needs`."""
    if Path(name).is_dir():
        if not (Path(name) / needs).is_file():
            raise UserError(f"{name} holds no {needs}: it is not a model folder")
    elif Path(name).is_file():
        raise UserError(
            f"{name} is a single file: make a folder of it by from_single_file(...).save_pretrained(FOLDER)"
        )
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"no such model folder: {name}")


def load_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """The user's text-to-image pipeline (SD1.x, SD2.x, SDXL), ready for `sample`, without SD's safety checker.

    --sampler dpmsolver puts the paper's DPM-Solver multistep in place of the model's scheduler. The VAE stays in fp32.
    """
    from diffusers import (
        DiffusionPipeline,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    name = args.pretrained_model_name_or_path
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    try:
        pipe = DiffusionPipeline.from_pretrained(
            name,
            revision=args.revision,
            variant=args.variant,
            torch_dtype={"vae": torch.float32, "default": dtype},
            safety_checker=None,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UserError(f"{name} is a {type(pipe).__name__}; text-to-image of SD 1.x, SD 2.x and SDXL can be used")
    if args.sampler == "dpmsolver":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


@torch.inference_mode()
def encode_texts(pipe: DiffusionPipeline, prompts: list[str], negative_prompt: str) -> dict[str, torch.Tensor]:
    """The pipeline's own prompt embeddings, each prompt encoded once, the negative one once for all.

    Returns keyword arguments of the pipeline: prompt_embeds (P, L, D), negative_prompt_embeds (1, L, D), and for SDXL
    the pooled ones (P, D) and (1, D).
    """
    options = {"device": pipe.unet.device, "num_images_per_prompt": 1}
    positive = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
    pair = pipe.encode_prompt("", do_classifier_free_guidance=True, negative_prompt=negative_prompt or None, **options)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = dict(zip(names, positive, strict=False))
    return {
        name: pair[i] if name.startswith("negative") else encoded[name] for i, name in enumerate(names[: len(pair)])
    }


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


@torch.inference_mode()
def draw_batch(
    pipe: DiffusionPipeline,
    embeds: dict[str, torch.Tensor],
    rows: Sequence[int],
    seeds: Sequence[int],
    steps: int | list[int],
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    latents: torch.Tensor | None = None,
    **options: Any,
) -> tuple[list[Image.Image], torch.Tensor]:
    """Draws an image for every prompt `rows[i]` of `embeds` (see encode_texts) with the seed `seeds[i]`.

    Batches mix prompts freely: each image has its own CPU generator, so it depends on (model, prompt, seed) alone.
    `steps` is their number or the timesteps themselves, `latents` (B, C, H, W) what to begin with in place of noise,
    `options` what else a call of the pipeline takes.
    Returns the images and the sampler's own latents, scaled, (B, C, H, W) float16 on the CPU; those of an image that
    is not finite are nan. Without a height and width, the model's own size.
    """
    index = torch.tensor(rows, device=pipe.unet.device)
    latents = pipe(
        **{k: v.expand(len(index), *v.shape[1:]) if k.startswith("negative") else v[index] for k, v in embeds.items()},
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **({"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": steps}),
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        latents=latents,
        output_type="latent",
        **options,
    ).images
    images, latents = decode(pipe, latents)
    return images, latents.to("cpu", torch.float16)


@torch.inference_mode()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> tuple[list[Image.Image], torch.Tensor]:
    """Scaled latents (B, C, H, W) to images. The VAE works in fp32: SDXL's overflows in fp16.

    It takes one image at a time, or as many small ones as have the pixels of one of 512 x 512. Returns the latents
    too, with nan in place of those whose pixels are not finite.
    """
    at_once = max(1, 512 * 512 // (latents[0, 0].numel() * pipe.vae_scale_factor**2))
    parts = (latents.to(pipe.vae.device, torch.float32) / pipe.vae.config.scaling_factor).split(at_once)
    pixels = torch.cat([pipe.vae.decode(some, return_dict=False)[0] for some in parts])
    broken = ~pixels.isfinite().flatten(1).all(1).to(latents.device)
    latents = latents.masked_fill(broken[:, None, None, None], math.nan)
    return pipe.image_processor.postprocess(pixels, output_type="pil"), latents


# ---- Models: what is compared ---------------------------------------------------------------------------------------

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # what a folder may bring
BLOCKS = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}  # the U-Net's, in the order of its layers


class Model(NamedTuple):
    """One side of the comparison: base, a LoRA, a folder with whole components (unet/), or one of finished images."""

    name: str
    kind: str  # "base", "lora", "folder" or "images"
    path: Path | None = None
    lora_scale: float = 1.0
    blocks: str = ""  # the U-Net's blocks in which the LoRA works, as in "up" or "mid+up"; "": everywhere
    text_encoder: Path | None = None  # a LoRA of the text encoder that was trained apart
    text_encoder_timesteps: tuple[int, int] | None = None  # where the text encoder's LoRA works; None: everywhere
    identity: bool = True  # drawn with what --identity names
    spec: str = ""  # as it was given
    checkpoints: str = ""  # "all": the training run's checkpoints are compared too
    checkpoint: tuple[str, int] | None = None  # which of them this one is: (the run's name, step)

    @property
    def drawn(self) -> bool:
        """Whether its images are drawn here."""
        return self.kind != "images"


def parse_model(spec: str) -> Model:
    """`base` or `NAME=PATH[,option=value...]`, the options of MODEL_OPTIONS; UserError for what cannot be drawn."""
    first, *options = spec.split(",")
    name, _, path = first.partition("=")
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise UserError(f"{spec!r}: a model's name is at most 64 letters, digits, '.', '-' and '_'")
    if name != "base" and not path:
        raise UserError(f"{spec!r}: expected 'base' or NAME=FOLDER, as in dpo=dpo-human-lora")
    kind = model_kind(Path(path)) if path else "base"
    if name == "base" and kind not in {"base", "images"}:
        raise UserError(f"{spec!r}: 'base' is --pretrained_model_name_or_path; give this model another name")
    read: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in MODEL_OPTIONS or not value:
            raise UserError(f"{spec!r}: unknown option {option!r}; there are {', '.join(MODEL_OPTIONS)}")
        kinds, _, parse = MODEL_OPTIONS[key]
        if kind not in kinds:
            raise UserError(f"{spec!r}: {key} is an option of {' and '.join(KINDS[one] for one in kinds)}")
        try:
            read[key] = parse(value)
        except (ValueError, UserError) as error:
            raise UserError(f"{spec!r}: {key}={value}: {error}") from None
    model = Model(name, kind, Path(path) if path else None, spec=spec, **read)
    if kind == "folder" and "lora_scale" in read and not model.text_encoder:
        raise UserError(f"{spec!r}: lora_scale, but no LoRA: of a folder with unet/ it is text_encoder's weight")
    if model.text_encoder_timesteps and not adapts_text_encoder(model):
        raise UserError(f"{spec!r}: text_encoder_timesteps, but no LoRA of a text encoder in {model.path}")
    return model


def parse_blocks(text: str) -> str:
    """`text` if it is made of "down", "mid" and "up", joined by +."""
    if not text or not set(text.split("+")) <= set(BLOCKS):
        raise ValueError(f"use {', '.join(BLOCKS)}, or several with +")
    return text


def parse_timesteps(text: str) -> tuple[int, int]:
    """LOW:HIGH, both ends included."""
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) <= int(high)):
        raise ValueError("expected LOW:HIGH, as in 900:1000")
    return int(low), int(high)


def parse_scale(text: str) -> float:
    """A finite number."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise ValueError("not a number")


def one_of(**words: Any) -> Callable[[str], Any]:
    """A parser of a few words, and what they stand for."""

    def parse(text: str) -> Any:
        if text not in words:
            raise ValueError(f"use {' or '.join(words)}")
        return words[text]

    return parse


def parse_text_lora(text: str) -> Path:
    """A LoRA's folder or file that adapts text encoders and nothing else."""
    others = [key for key in lora_keys(Path(text)) if not key.startswith(TEXT_KEYS)]
    if others:
        raise ValueError(f"it adapts more than text encoders ({others[0]}): give it as a model of its own")
    return Path(text)


KINDS = {"base": "base", "lora": "a LoRA", "folder": "a folder with unet/", "images": "a folder of images"}
MODEL_OPTIONS: dict[str, tuple[tuple[str, ...], str, Callable[[str], Any]]] = {  # of which kinds, what, how it is read
    "lora_scale": (
        ("lora", "folder"),
        "weight of the LoRA, 0.5 in the paper; of a folder: text_encoder's",
        parse_scale,
    ),
    "blocks": (("lora",), "U-Net blocks in which it works: down, mid, up, or several with +", parse_blocks),
    "text_encoder": (("lora", "folder"), "a LoRA of the text encoder, trained apart", parse_text_lora),
    "text_encoder_timesteps": (("lora", "folder"), "LOW:HIGH, where the text encoder's LoRA works", parse_timesteps),
    "checkpoints": (("lora", "folder"), "all: also each of its checkpoint-STEP folders", one_of(all="all")),
    "identity": (("base", "lora", "folder"), "no: drawn without --identity", one_of(yes=True, no=False)),
}


def parse_models(specs: list[str]) -> list[Model]:
    """All of --models, base first; UserError without base, without any other, or with two of one name."""
    models = [model for spec in specs for model in with_checkpoints(parse_model(spec))]
    twice = [name for name, count in Counter(model.name for model in models).items() if count > 1]
    if twice:
        raise UserError(f"--models: two models are called {min(twice)}")
    if not any(model.name == "base" for model in models):
        raise UserError("--models needs base: every model is compared with it")
    if len(models) == 1:
        raise UserError("--models needs a tuned model beside base, as in dpo=dpo-human-lora")
    return sorted(models, key=lambda model: model.name != "base")


def with_checkpoints(model: Model) -> list[Model]:
    """The model alone, or with ,checkpoints=all each checkpoint of its training run, called NAME-STEP, and itself."""
    if not model.checkpoints:
        return [model]
    folders = {int(path.name[11:]): path for path in model.path.glob("checkpoint-*") if path.name[11:].isdigit()}
    folders = {step: folders[step] for step in sorted(folders) if model_kind(folders[step]) == model.kind}
    last = int(read_settings(model.path / "training_settings.json").get("max_train_steps", 0))
    earlier = [
        model._replace(name=f"{model.name}-{step}", path=path, checkpoint=(model.name, step))
        for step, path in folders.items()
        if step != last
    ]
    if not earlier:
        raise UserError(f"{model.path} has no checkpoints with weights to load: train with --checkpointing_steps")
    return [*earlier, model._replace(checkpoint=(model.name, last or 1 + max(folders)))]


def model_kind(path: Path) -> str:
    """A key of KINDS; UserError where there is nothing that can be compared."""
    if (path / "unet").is_dir():
        return "folder" if weight_files(path) else ""
    trained = path.is_file() or any(path.glob("*.safetensors")) or (path / "training_settings.json").is_file()
    if not trained and path.is_dir() and list_photos(path):
        return "images"
    return "lora" if weight_files(path) else ""


def weight_files(path: Path) -> list[Path]:
    """The files with a tuned model's weights: unet/*.safetensors or one LoRA file. UserError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no model at {path}: train one first, or give its folder")
    patterns = ("unet/*.safetensors", "pytorch_lora_weights.safetensors", "*.safetensors")
    found = next((files for files in map(sorted, map(path.glob, patterns)) if files), None)
    if not found:
        raise UserError(
            f"{path} holds neither pytorch_lora_weights.safetensors nor unet/ (training has not finished?) nor images"
        )
    if found[0].parent == path and len(found) > 1:
        raise UserError(f"{path} holds {len(found)} weight files; name the one to load, as in NAME={found[0]}")
    return found


TEXT_KEYS = ("text_encoder", "lora_te")  # what diffusers' and kohya's names of a text encoder's weights begin with


def lora_keys(path: Path) -> list[str]:
    """The names of a LoRA's weights; UserError where its file cannot be read."""
    from safetensors import safe_open

    (file, *_) = weight_files(path)
    try:
        with safe_open(file, "pt") as weights:
            return list(weights.keys())
    except Exception as error:
        raise UserError(f"cannot read the LoRA {file}: {first_line(error)}") from error


def adapts_text_encoder(model: Model) -> bool:
    """Whether one of the model's LoRA files holds weights of a text encoder."""
    files = [path for path in (model.path, model.text_encoder) if path and model_kind(path) == "lora"]
    return any(key.startswith(TEXT_KEYS) for file in files for key in lora_keys(file))


def fingerprint(files: Iterable[Path]) -> str:
    """A short hash of the files' sizes and of 17 pieces of 64 KiB of each, its first and its last among them."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{size}|".encode())
            for part in range(17):
                stream.seek(max(0, size - 2**16) * part // 16)
                digest.update(stream.read(2**16))
    return digest.hexdigest()[:16]


def tuned_files(path: Path) -> list[Path]:
    """The files that a tuned model is drawn with: one LoRA, or the U-Net and text encoders of a folder."""
    if not (path / "unet").is_dir():
        return weight_files(path)
    return [file for name in COMPONENTS for file in all_weights(path / name)]


def all_weights(path: Path) -> list[Path]:
    """All files of weights in a model's folder, or the file itself."""
    found = [path] if path.is_file() else path.rglob("*")
    return sorted(file for file in found if file.suffix in {".safetensors", ".bin", ".pt", ".pth"})


class Identity(NamedTuple):
    """The person of personalised text-to-image, under every model alike: a LoRA or an IP-Adapter."""

    kind: str  # "lora" or "ip_adapter"
    path: str
    scale: float = 1.0
    image: Path | None = None  # what the IP-Adapter shows: an image or a folder of images,
    embeds: Path | None = None  # or its face embeddings, as FaceID takes them, (faces, D) in a .safetensors file
    image_encoder: str = ""  # of an IP-Adapter: a folder or hub id; "": the one beside its weights
    spec: str = ""  # as it was given


def parse_identity(spec: str) -> Identity:
    """`lora=PATH[,scale=S]`, or `ip_adapter=FILE,image=PATH[,scale=S][,image_encoder=MODEL]` or with embeds=FILE."""
    first, *options = spec.split(",")
    kind, _, path = first.partition("=")
    if kind not in {"lora", "ip_adapter"} or not path:
        raise UserError(f"--identity {spec}: expected lora=PATH or ip_adapter=FILE")
    parsers: dict[str, Callable[[str], Any]] = {"scale": parse_scale}
    if kind == "ip_adapter":
        parsers |= {"image": Path, "embeds": Path, "image_encoder": str}
    read = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in parsers or not value:
            raise UserError(f"--identity {spec}: unknown option {option!r}; there are {', '.join(parsers)}")
        try:
            read[key] = parsers[key](value)
        except ValueError as error:
            raise UserError(f"--identity {spec}: {option}: {error}") from None
    identity = Identity(kind, path, spec=spec, **read)
    if kind == "lora":
        weight_files(Path(path))
    else:
        check_ip_adapter(identity, spec)
    return identity


def check_ip_adapter(identity: Identity, spec: str) -> None:
    """UserError where the weights or the one of image and embeds that has to be there is missing."""
    if not Path(identity.path).is_file():
        raise UserError(f"--identity {spec}: no such file: {identity.path} (an IP-Adapter's .safetensors or .bin)")
    if (identity.image is None) == (identity.embeds is None):
        raise UserError(f"--identity {spec}: an IP-Adapter needs image=FILE_OR_FOLDER, or embeds=FILE for FaceID")
    given = identity.image or identity.embeds
    if not given.exists():
        raise UserError(f"--identity {spec}: no such file or folder: {given}")
    if given == identity.image and given.is_dir() and not list_photos(given):
        raise UserError(f"--identity {spec}: no images in {given}")


def identity_files(identity: Identity | None) -> list[Path]:
    """All files that the person is made of."""
    if identity is None:
        return []
    if identity.kind == "lora":
        return weight_files(Path(identity.path))
    given, encoder = identity.image or identity.embeds, Path(identity.image_encoder)
    faces = list_photos(given) if given.is_dir() else [given]
    return [Path(identity.path), *faces, *(all_weights(encoder) if identity.image_encoder else [])]


@contextlib.contextmanager
def drawing(
    pipe: DiffusionPipeline, model: Model, identity: Identity | None, guided: bool
) -> Iterator[dict[str, Any]]:
    """Within the block `pipe` draws as `model`, and the person if there is one; afterwards it is the base model again.

    Gives what a call of `pipe` needs beside prompts: the IP-Adapter's faces.
    """
    identity, options = identity if model.identity else None, {}
    with contextlib.ExitStack() as undo:
        if model.kind == "folder":
            parts = load_components(pipe, model.path)
            undo.callback(set_components, pipe, {name: getattr(pipe, name) for name in parts}, pipe.unet.device)
            set_components(pipe, parts, pipe.unet.device)
        if identity and identity.kind == "ip_adapter":
            undo.callback(pipe.unload_ip_adapter)
            options = {"ip_adapter_image_embeds": [load_ip_adapter(pipe, identity, guided)]}
        undo.callback(unload_loras, pipe)
        scales = dict.fromkeys(adapters_of(pipe), 1.0)  # FaceID brings a LoRA of its own
        for adapter, (path, scale) in loras_of(model, identity).items():
            load_lora_file(pipe, weight_files(path)[0], adapter)
            scales[adapter] = scale
        if scales:
            pipe.set_adapters(list(scales), list(scales.values()))
        if model.blocks:
            limit_to_blocks(pipe.unet, "tuned", model.blocks)
        yield options


def loras_of(model: Model, identity: Identity | None) -> dict[str, tuple[Path, float]]:
    """The LoRAs that a model is drawn with: {adapter: (path, scale)}."""
    loras = {"tuned": (model.path, model.lora_scale)} if model.kind == "lora" else {}
    if model.text_encoder:
        loras["tuned_text"] = (model.text_encoder, model.lora_scale)
    if identity and identity.kind == "lora":
        loras["identity"] = (Path(identity.path), identity.scale)
    return loras


def adapters_of(pipe: DiffusionPipeline) -> list[str]:
    """The names of all LoRAs that are loaded."""
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


def unload_loras(pipe: DiffusionPipeline) -> None:
    """Removes all LoRAs."""
    if adapters_of(pipe):
        pipe.delete_adapters(adapters_of(pipe))


def set_components(pipe: DiffusionPipeline, parts: dict[str, torch.nn.Module], device: torch.device) -> None:
    """Puts parts in the place of those of the same name, which wait in host memory."""
    for name, part in parts.items():
        getattr(pipe, name).to("cpu")
        setattr(pipe, name, part.to(device))


def load_components(pipe: DiffusionPipeline, folder: Path) -> dict[str, torch.nn.Module]:
    """The U-Net, and the text encoders that there are, of a folder; UserError where they do not fit the pipeline."""
    parts = {}
    for name in COMPONENTS:
        old = getattr(pipe, name, None)
        if old is None or not (folder / name).is_dir():
            continue
        kind = {"torch_dtype" if name == "unet" else "dtype": old.dtype}
        try:
            part = type(old).from_pretrained(folder / name, **kind)
        except Exception as error:  # whatever a file may hold
            raise UserError(f"cannot load {folder / name}: {first_line(error)}") from error
        for key in ("in_channels", "cross_attention_dim", "hidden_size"):
            here, there = (getattr(one.config, key, None) for one in (part, old))
            if here != there:
                raise UserError(f"{folder / name} does not fit the base model: {key} {here}, there {there}")
        parts[name] = part
    parts["unet"].to(memory_format=torch.channels_last)
    return parts


def limit_to_blocks(unet: torch.nn.Module, adapter: str, blocks: str) -> None:
    """Leaves the LoRA in these of the U-Net's blocks alone; whatever else it adapts keeps base's weights."""
    from peft.tuners.lora import LoraLayer

    kept = tuple(BLOCKS[block] for block in blocks.split("+"))
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer) and not name.startswith(kept):
            layer.set_scale(adapter, 0.0)


def scale_text_encoders(pipe: DiffusionPipeline, scale: float) -> None:
    """Sets the weight of the tuned model's LoRAs in the text encoders."""
    from peft.tuners.lora import LoraLayer

    encoders = [part for name in ("text_encoder", "text_encoder_2") if (part := getattr(pipe, name, None))]
    for layer in chain.from_iterable(encoder.modules() for encoder in encoders):
        if isinstance(layer, LoraLayer):
            for adapter in {"tuned", "tuned_text"} & layer.scaling.keys():
                layer.set_scale(adapter, scale)


def condition(
    pipe: DiffusionPipeline, model: Model, prompts: list[str], negative_prompt: str, steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The prompts' embeddings, and the pipeline's options that change them at the ends of text_encoder_timesteps.

    The paper's text-encoder LoRA works at timesteps 900 to 1000 alone; elsewhere the prompt is base's.
    """
    tuned = encode_texts(pipe, prompts, negative_prompt)
    if not model.text_encoder_timesteps:
        return tuned, {}
    scale_text_encoders(pipe, 0.0)
    plain = encode_texts(pipe, prompts, negative_prompt)
    scale_text_encoders(pipe, model.lora_scale)
    low, high = model.text_encoder_timesteps

    def embeds_at(timestep: float) -> dict[str, torch.Tensor]:
        return tuned if low <= timestep <= high else plain

    def switch(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        following = pipe.scheduler.timesteps[step + 1 : step + 2].tolist()
        if following and embeds_at(following[0]) is not embeds_at(float(timestep)):
            tensors |= inner_embeds(embeds_at(following[0]), pipe.do_classifier_free_guidance)
        return tensors

    pipe.scheduler.set_timesteps(steps)
    names = list(inner_embeds(tuned, True))
    options = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": names}
    return embeds_at(float(pipe.scheduler.timesteps[0])), options


def inner_embeds(embeds: dict[str, torch.Tensor], guided: bool) -> dict[str, torch.Tensor]:
    """encode_texts' tensors under the names, and joined as, the pipeline's loop has them."""
    joined = {}
    for inner, name in (("prompt_embeds", "prompt_embeds"), ("add_text_embeds", "pooled_prompt_embeds")):
        if name in embeds:
            positive = embeds[name]
            negative = embeds[f"negative_{name}"].expand_as(positive)
            joined[inner] = torch.cat([negative, positive]) if guided else positive
    return joined


def load_lora_file(pipe: DiffusionPipeline, file: Path, adapter: str) -> None:
    """Loads a LoRA of any format that diffusers reads; UserError where it does not fit this base model."""
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapter)
    except Exception as error:  # whatever a file may hold
        raise UserError(f"{file} is not a LoRA for this base model: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What a library's error says, without its stack of advice."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def load_ip_adapter(pipe: DiffusionPipeline, identity: Identity, guided: bool) -> torch.Tensor:
    """Loads the IP-Adapter; returns the faces' embeddings, (1, faces, ...); guided: after those of none, (2, ...)."""
    file, folder = Path(identity.path), None if identity.embeds else "image_encoder"
    try:
        if identity.image_encoder:
            load_image_encoder(pipe, identity.image_encoder)
        pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=folder)
        pipe.set_ip_adapter_scale(identity.scale)
        with torch.inference_mode():
            faces = embed_person(pipe, identity, guided)
            pipe.unet.encoder_hid_proj([faces])  # raises where their width is another
    except Exception as error:  # whatever a file may hold
        raise UserError(
            f"cannot use the IP-Adapter {file} with this base model and face: {first_line(error)}"
        ) from error
    return faces


def embed_person(pipe: DiffusionPipeline, identity: Identity, guided: bool) -> torch.Tensor:
    """The IP-Adapter's embeddings of the person's images, or those that a file holds, as load_ip_adapter returns."""
    from safetensors.torch import load_file

    if identity.embeds:
        faces = next(iter(load_file(identity.embeds).values()))
        faces = faces.reshape(1, -1, 1, faces.shape[-1]).to(pipe.unet.device, pipe.unet.dtype)
        return torch.cat([torch.zeros_like(faces), faces]) if guided else faces
    files = list_photos(identity.image) if identity.image.is_dir() else [identity.image]
    return pipe.prepare_ip_adapter_image_embeds([load_images(files)], None, pipe.unet.device, 1, guided)[0]


def load_image_encoder(pipe: DiffusionPipeline, name: str) -> None:
    """Gives the pipeline the image encoder that an IP-Adapter was trained with."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(name, dtype=pipe.unet.dtype).eval()
    size = encoder.config.image_size
    processor = CLIPImageProcessor(size=size, crop_size=size)
    pipe.register_modules(image_encoder=encoder.to(pipe.unet.device), feature_extractor=processor)


# ---- Measuring -----------------------------------------------------------------------------------------------------
# A measure is a function load(device) -> measure(images, prompts) -> one number, or one row of them, per image. Each
# is loaded once, looks at every model's images, and is let go before the next: never two large models at once.

PHOTOS = "+photos"  # what the photos of --real_data_dir are called among the models; no model's name has a plus


class Measure(NamedTuple):
    """What is measured on images: its name, all that its values depend upon, and how it is loaded."""

    label: str
    source: str
    load: Callable[[Device], Callable[[list[Image.Image], list[str]], Any]]
    files: Sequence[Path] = ()  # what its values depend upon, too: weights, code, photos
    of_photos: bool = False  # the real photos are measured, too
    of_images: bool = True


def all_measures(args: argparse.Namespace, size: tuple[int, int]) -> list[Measure]:
    """Scorers, colour, and what the settings ask for: features of images, latents of photos, identity.

    `size` is the images' width and height.
    """
    measures = [
        Measure(scorer.label, scorer.source, partial(load_measure, scorer), scorer_files(scorer))
        for scorer in args.scorers
    ]
    measures.append(Measure("colour", "colour", lambda device: measure_colour, of_photos=True))
    features = {"features": (image_features, args.feature_model)}
    if args.real_data_dir:
        features["CMMD"] = (clip_embeddings, args.cmmd_model)
    if args.inception:
        features["FID"] = (inception_features, args.inception)
    for label, (factory, name) in features.items():
        load = partial(load_features, factory, name)
        measures.append(Measure(label, name, load, all_weights(Path(name)), of_photos=True))
    if args.real_data_dir and any(model.drawn for model in args.models):
        name = args.pretrained_model_name_or_path
        files, load = all_weights(Path(name, "vae")), partial(load_latents, args, size)
        measures.append(Measure("latents", f"{name} {size}", load, files, of_photos=True, of_images=False))
    if args.reference_faces:
        faces = Path(args.reference_faces)
        files = [*list_photos(faces), *plug_in_files(args.face_embedder)]
        measures.append(
            Measure("identity", args.face_embedder, partial(load_identity, args.face_embedder, faces), files)
        )
    return measures


def scorer_files(scorer: ScorerSpec) -> list[Path]:
    """The weights that a scorer is made of, as far as they are files here; of a plug-in its source tells the code."""
    *_, options = split_spec(scorer.source)
    return [file for key in WEIGHTS if key in options for file in all_weights(Path(options[key]))]


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """What a user's code or a file's content raises within the block becomes a UserError that begins with `what`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def load_measure(scorer: ScorerSpec, device: Device) -> Callable[[list[Image.Image], list[str]], list[float]]:
    """A scorer as a measure; what it raises is told with its name."""
    return one_line(f"scorer {scorer.label}")(partial(run_scorer, scorer.load(device), scorer.label))


def load_features(factory: Callable[..., Any], name: str, device: Device) -> Callable[..., np.ndarray]:
    """Features of images as a measure; what cannot be loaded is told in one line."""
    with one_line(f"cannot load {name}"):
        features = factory(name, device)
    return one_line(f"cannot use {name}")(lambda images, prompts: features(images))


def load_latents(
    args: argparse.Namespace, size: tuple[int, int], device: Device
) -> Callable[[list[Image.Image], list[str]], np.ndarray]:
    """The base model's latents of photos, brought to `size`, as a measure: channel means, then stds, (B, 2 C)."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    name, options = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    try:
        vae = AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32, **options).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the VAE of {name}: {first_line(error)}") from error

    @torch.inference_mode()
    def latents(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        pixels = VaeImageProcessor().preprocess([image.resize(size, Image.Resampling.LANCZOS) for image in images])
        encoded = torch.cat([vae.encode(one).latent_dist.mean for one in pixels.to(device).split(1)])
        flat = (encoded * vae.config.scaling_factor).double().flatten(2)
        return torch.cat([flat.mean(-1), flat.std(-1, correction=0)], dim=1).cpu().numpy()

    return latents


def measure_colour(images: list[Image.Image], prompts: list[str]) -> list[list[float]]:
    """colour_statistics of images, at most 512 pixels a side, as rows in the order of COLOUR_COLUMNS."""

    def colours(image: Image.Image) -> list[float]:
        image = image.copy()
        image.thumbnail((512, 512), Image.Resampling.BOX)
        found = colour_statistics(np.asarray(image))
        return [found[column] for column in COLOUR_COLUMNS]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(colours, images))


def measure_all(
    args: argparse.Namespace,
    state: PartialState,
    paths: dict[str, list[Path | None]],
    plan: list[tuple[int, int]],
    prompts: list[str],
) -> dict[str, dict[str, np.ndarray]]:
    """{model: {measure: (N,) or (N, C)}}, nan where there is no image; the photos are the model PHOTOS.

    What was measured before on the same images comes from measures/, so that a second start goes on. Diversity needs
    features of prompts with several images, distances to photos those of all.
    """
    from accelerate.utils import broadcast_object_list

    output, texts = Path(args.output_dir, "measures"), [prompts[p] for p, _ in plan]
    repeated = np.bincount([p for p, _ in plan])[[p for p, _ in plan]] > 1
    values: dict[str, dict[str, np.ndarray]] = {name: {} for name in paths}
    size = upright_size(next(filter(None, paths["base"])))
    ratio = size[0] / size[1]
    for measure in all_measures(args, size):
        todo = {}
        for name, files in paths.items():
            if not (measure.of_photos if name == PHOTOS else measure.of_images):
                continue
            if measure.label == "features" and not args.real_data_dir:
                files = [file if more else None for file, more in zip(files, repeated, strict=True)]
            cache = output / name / f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', measure.label)}.npz"
            source = f"{measure.source} {fingerprint(measure.files)}"
            key = f"{source} {images_key(files, [str(ratio)] if name == PHOTOS else texts)}"
            known = read_measured(cache, key) if state.is_main_process and not args.overwrite else None
            values[name][measure.label] = known  # on the main process; it alone decides, and compares
            if broadcast_object_list([known is None])[0]:
                todo[name] = (files, cache, key)
        total = sum(len(share_of(files, state)) for files, _, _ in todo.values())
        if not todo:
            continue
        wanted = any(any(files) for files, _, _ in todo.values())
        function = measure.load(state.device) if wanted else None
        with progress(total, state, measure.label, "img") as bar:
            for name, (files, cache, key) in todo.items():
                crop = ratio if name == PHOTOS else None
                with memory_told(args.batch_size):
                    found = run_measure(function, name, files, texts, args.batch_size, state, bar, crop)
                values[name][measure.label] = found
                if state.is_main_process:
                    write_measured(cache, key, found)
        del function  # before the next one is loaded
    return values


def share_of(files: list[Path | None], state: PartialState) -> list[int]:
    """The rows with an image that this process measures."""
    return [row for row, file in enumerate(files) if file][state.process_index :: state.num_processes]


def run_measure(
    function: Callable[[list[Image.Image], list[str]], Any],
    name: str,
    files: list[Path | None],
    texts: list[str],
    batch_size: int,
    state: PartialState,
    bar: tqdm,
    crop: float | None,
) -> np.ndarray:
    """One measure of one model's images, (N,) or (N, C), every process its share; the next batch is read meanwhile.

    `crop`: width over height to which images are cut; of photos, whose shape would tell them from images otherwise.
    """
    from accelerate.utils import gather_object

    batches, found = list(in_batches(share_of(files, state), batch_size)), []
    folder = os.path.commonpath([file.parent for file in files if file]) if any(files) else ""
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(load_images, [files[row] for row in batch]) for batch in batches[:1]]
        for i, batch in enumerate(batches):
            images = ahead.pop().result()
            images = [cut_to(image, crop) for image in images] if crop else images
            ahead += [reader.submit(load_images, [files[row] for row in rows]) for rows in batches[i + 1 : i + 2]]
            for image, row in zip(images, batch, strict=True):
                place = files[row].relative_to(folder).as_posix()
                image.info["image_id"] = f"{name}/{place}"  # what a file.jsonl of scores calls it
            prompts = ["" if name == PHOTOS else texts[row] for row in batch]
            found += zip(batch, function(images, prompts), strict=True)
            bar.update(len(batch))
    gathered = gather_object(found)
    values = np.full((len(files), *np.shape(gathered[0][1] if gathered else 0.0)), np.nan)
    for row, value in gathered:
        values[row] = value
    return values


def upright_size(file: Path) -> tuple[int, int]:
    """Width and height of an image as it is shown."""
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).size


def cut_to(image: Image.Image, ratio: float) -> Image.Image:
    """The largest middle part of an image whose width over height is `ratio`."""
    width, height = min(image.width, round(image.height * ratio)), min(image.height, round(image.width / ratio))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def images_key(files: list[Path | None], texts: Sequence[str]) -> str:
    """A hash of all images' names, sizes and times of writing, and of their prompts."""
    known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) if file else None for file in files]
    return hashlib.sha256(repr((known, *texts)).encode()).hexdigest()[:16]


def read_measured(path: Path, key: str) -> np.ndarray | None:
    """What was measured before, if it was on the same images by the same source."""
    try:
        with np.load(path) as kept:
            return kept["values"] if str(kept["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or cut short
        return None


def write_measured(path: Path, key: str, values: np.ndarray) -> None:
    """Keeps what was measured."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, values=values, key=np.array(key))
    write_atomically(path, buffer.getvalue())


def read_latents(files: list[Path | None]) -> dict[str, np.ndarray]:
    """Means and stds of the latent channels, (N, C) each, that the images drawn here carry; {} of any others."""
    told = [image_text(file) if file else {} for file in files]
    if not all("latent_mean" in info for info in told):
        return {}
    return {key: np.array([json.loads(info[key]) for info in told]) for key in ("latent_mean", "latent_std")}


def image_features(name: str, device: torch.device) -> Callable[[list[Image.Image]], np.ndarray]:
    """A function from images to features (N, D) of a CLIPModel or a DINOv2: the class token after the last norm."""
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    model = load_weights(AutoModel, name, device)
    vision = getattr(model, "vision_model", model)

    @torch.inference_mode()
    def features(images: list[Image.Image]) -> np.ndarray:
        inputs = processor(
            images=[ImageOps.pad(image, (max(image.size), max(image.size))) for image in images], return_tensors="pt"
        ).to(device)
        return vision(pixel_values=inputs["pixel_values"]).pooler_output.double().cpu().numpy()

    return features


def clip_embeddings(name: str, device: torch.device) -> Callable[[list[Image.Image]], np.ndarray]:
    """A function from images to a CLIPModel's image embeddings, projected and of length 1, (N, D): CMMD's features.

    CMMD's own model is openai/clip-vit-large-patch14-336. Images are padded to a square.
    """
    embed_images, _, _ = load_clip(device, name, "", crop=False)
    return lambda images: embed_images(images).double().cpu().numpy()


def inception_features(path: str | Path, device: torch.device) -> Callable[[list[Image.Image]], np.ndarray]:
    """A function from images to FID's 2048 features (N, D) of a TorchScript Inception.

    Such as NVIDIA's inception-2015-12-05.pt: model(uint8 images (N, 3, 299, 299), return_features=True), so that no
    torchvision or torch-fidelity is needed. Images are brought to 299 x 299 by PIL's antialiased bicubic filter, as
    clean-fid does (https://arxiv.org/abs/2104.11222), but rounded to whole levels. UserError where the file is
    missing, is not TorchScript or does not give (N, D).
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}; it should be a TorchScript Inception, as inception-2015-12-05.pt")

    @torch.inference_mode()
    def features(images: list[Image.Image]) -> np.ndarray:
        resized = [image.convert("RGB").resize((299, 299), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
        return model(pixels.contiguous().to(device), return_features=True).double().cpu().numpy()

    try:
        model = torch.jit.load(path, map_location=device).eval()
        shape = features([Image.new("RGB", (299, 299))] * 2).shape
    except Exception as error:  # what is in the file may raise anything
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a TorchScript Inception with return_features: {reason}") from error
    if len(shape) != 2 or shape[0] != 2:
        raise UserError(f"{path} gives features of the shape {shape} for two images: it should be (2, D)")
    return features


def prompt_diversity(features: np.ndarray, prompt_ids: np.ndarray) -> np.ndarray:
    """diversity of every prompt's images, features (N, D): (P,); nan for a prompt with one image."""
    known = ~np.isnan(features.reshape(len(features), -1)).any(axis=1)
    return np.array([diversity(features[known & (prompt_ids == p)]) for p in range(prompt_ids.max() + 1)])


# ---- Identity ------------------------------------------------------------------------------------------------------


def load_identity(
    embedder: str, references: Path, device: Device
) -> Callable[[list[Image.Image], list[str]], np.ndarray]:
    """Mean cosine of an image's face to the reference faces, (B,); nan where no face is found.

    `embedder`: sface, or module:function or file.py:function of your own, a function device -> embed(images) ->
    (B, D), a row of nan where there is no face. The paper measures 1 - cosine of ArcFace, whose models are not free.
    """
    faces = load_images(list_photos(references))
    with one_line(f"--face_embedder {embedder}"):
        embed = (sface if embedder == "sface" else find_scorer(embedder))(device)
        known = np.asarray(embed(faces), dtype=np.float64)
        if known.ndim != 2 or len(known) != len(faces):
            raise ValueError(f"it gives an array of the shape {known.shape} for {len(faces)} images, not (images, D)")
    known = unit_rows(known[~np.isnan(known).any(axis=1)])
    if not len(known):
        raise UserError(f"no face found in any image of --reference_faces {references}")

    @one_line(f"--face_embedder {embedder}")
    def cosines(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        return (unit_rows(np.asarray(embed(images), dtype=np.float64)) @ known.T).mean(axis=1)

    return cosines


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def sface(device: Device) -> Callable[[list[Image.Image]], np.ndarray]:
    """OpenCV's YuNet finds the largest face, SFace embeds it: (B, 128). Free to use; same person above about 0.363.

    Needs opencv-python-headless; the two models come from the hub (opencv/face_detection_yunet and
    opencv/face_recognition_sface). https://docs.opencv.org/4.x/d0/dd4/tutorial_dnn_face.html
    """
    import cv2
    from huggingface_hub import hf_hub_download

    files = {"face_detection_yunet": "face_detection_yunet_2023mar.onnx"}
    files["face_recognition_sface"] = "face_recognition_sface_2021dec.onnx"
    try:
        detector, recogniser = (hf_hub_download(f"opencv/{name}", file) for name, file in files.items())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the face models of OpenCV: {first_line(error)}") from error
    find, know = cv2.FaceDetectorYN.create(detector, "", (320, 320)), cv2.FaceRecognizerSF.create(recogniser, "")

    def embed_face(image: Image.Image) -> np.ndarray:
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # OpenCV reads blue first
        find.setInputSize(image.size)
        _, faces = find.detect(pixels)
        if faces is None:
            return np.full(128, np.nan)
        largest = max(faces, key=lambda face: face[2] * face[3])
        return know.feature(know.alignCrop(pixels, largest))[0]

    return lambda images: np.stack([embed_face(image) for image in images])


def recognised(cosines: np.ndarray, there: np.ndarray, threshold: float) -> np.ndarray:
    """1 where the person is known, 0 where not or where no face is found, nan where there is no image: (N,)."""
    return np.where(there, np.nan_to_num(cosines, nan=-1.0) >= threshold, np.nan)


# ---- Comparing -----------------------------------------------------------------------------------------------------


def only_shared(values: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The values of the images that all of these models have; only a folder from elsewhere may lack some."""
    missing = np.any([np.isnan(found["colour"][:, -1]) for found in values.values()], axis=0)
    if not missing.any():
        return values
    shared = {name: {label: column.astype(float) for label, column in found.items()} for name, found in values.items()}
    for column in chain.from_iterable(found.values() for found in shared.values()):
        column[missing] = np.nan
    return shared


def per_prompt_means(
    values: dict[str, dict[str, np.ndarray]], scorers: list[str], prompt_ids: np.ndarray, threshold: float
) -> dict[str, dict[str, np.ndarray]]:
    """{model: {measure: (P,)}}: scores, colours, diversity and identity of every prompt, seeds averaged.

    Of a scorer with vetoes also the shares of vetoed images, under its label and " vetoed".
    """
    means: dict[str, dict[str, np.ndarray]] = {}
    picky = [label for label in scorers if any(np.isneginf(found[label]).any() for found in values.values())]
    for name, found in values.items():
        columns = {label: found[label] for label in scorers} | colour_columns(found)
        for label in picky:
            columns[f"{label} vetoed"] = np.where(np.isnan(found[label]), np.nan, np.isneginf(found[label]))
        if "identity" in found:
            there = ~np.isnan(found["colour"][:, 0])
            known = recognised(found["identity"], there, threshold)
            columns |= {"identity": found["identity"], "recognised": known}
        means[name] = {label: per_prompt(column, prompt_ids) for label, column in columns.items()}
        means[name]["hue"] = prompt_hues(columns["hue"], prompt_ids)
        means[name]["diversity"] = prompt_diversity(found["features"], prompt_ids)
    return means


def colour_columns(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of the measure colour by name, (N,) each."""
    return dict(zip(COLOUR_COLUMNS, found["colour"].T, strict=True))


def vetoed_shares(means: dict[str, np.ndarray], label: str) -> np.ndarray:
    """The share of every prompt's images that a scorer vetoed: (P,)."""
    return means.get(f"{label} vetoed", np.zeros(len(means[label])))


def worths(base: dict[str, np.ndarray], tuned: dict[str, np.ndarray], label: str) -> list[np.ndarray]:
    """worth() of base and tuned by one metric: (P,) each."""
    return worth([side[label] for side in (base, tuned)], [vetoed_shares(side, label) for side in (base, tuned)])


def compare(base_means: dict[str, np.ndarray], tuned_means: dict[str, np.ndarray], label: str) -> dict[str, object]:
    """Tuned against base on one metric, by the means of per_prompt_means."""
    base, tuned = base_means[label], tuned_means[label]
    worth_base, worth_tuned = worths(base_means, tuned_means, label)
    points = outcomes(worth_tuned, worth_base)
    finite = np.isfinite(base) & np.isfinite(tuned)
    differences = tuned[finite] - base[finite]
    return {
        "prompts": len(points),
        "win_rate": mean(points),
        "interval": win_interval(points),
        **{word: mean(points == point) for word, point in (("win", 1), ("tie", 0.5), ("lose", 0))},
        "base": mean(base[finite]),
        "tuned": mean(tuned[finite]),
        "vetoed": [mean(vetoed_shares(side, label)) for side in (base_means, tuned_means)],
        "difference": mean(differences),
        "difference_interval": bootstrap_interval(mean, differences),
        "sign_test": sign_test(worth_tuned, worth_base),
        "wilcoxon": wilcoxon(worth_tuned, worth_base),
    }


def compare_metrics(
    base: dict[str, np.ndarray], tuned: dict[str, np.ndarray], roles: dict[str, str]
) -> dict[str, dict[str, object]]:
    """compare() of every metric that both sides have, in the order of the roles, with Holm's p over all of them.

    UserError where there is none.
    """
    known = {label: role for label, role in roles.items() if not np.isnan(base[label] + tuned[label]).all()}
    if not known:
        raise UserError("no scorer gives a value for an image that base and the tuned model both have")
    metrics = {label: {"role": role, **compare(base, tuned, label)} for label, role in known.items()}
    for row, p in zip(metrics.values(), holm([row["sign_test"] for row in metrics.values()]), strict=True):
        row["holm"] = p
    return metrics


def compare_groups(
    base: dict[str, np.ndarray],
    tuned: dict[str, np.ndarray],
    labels: list[str],
    groups: dict[str, list[str]],
    at_least: int = 8,
) -> dict[str, dict[str, dict[str, object]]]:
    """Win rates of some metrics by group of prompts, {column: {group: {"prompts", "metrics"}}}, Holm over all of them.

    Groups of fewer than `at_least` prompts say nothing and are left out; so is a column with a single group.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for column, names in groups.items():
        sizes = {name: size for name, size in Counter(names).most_common() if size >= at_least}
        for name, size in sizes.items() if len(sizes) > 1 else ():
            rows = np.array([other == name for other in names])
            metrics = {}
            for label in labels:
                a, b = (side[rows] for side in worths(tuned, base, label))
                points = outcomes(a, b)
                metrics[label] = {"win_rate": mean(points), "interval": win_interval(points), "holm": sign_test(a, b)}
            found.setdefault(column, {})[name] = {"prompts": size, "metrics": metrics}
    tests = [row for column in found.values() for group in column.values() for row in group["metrics"].values()]
    for row, p in zip(tests, holm([row["holm"] for row in tests]), strict=True):
        row["holm"] = p
    return found


def compare_colour(
    base: dict[str, np.ndarray], tuned: dict[str, np.ndarray], prompt_ids: np.ndarray
) -> dict[str, object]:
    """Every colour measure of tuned against base, paired by prompt, with intervals over prompts.

    Both hold a value per image of COLOUR_COLUMNS, and latent_mean and latent_std where their images were drawn here.
    """
    colour: dict[str, Any] = {}
    for key in COLOURS:
        a, b = per_prompt(base[key], prompt_ids), per_prompt(tuned[key], prompt_ids)
        differences = {"difference": mean(b - a), "interval": bootstrap_interval(mean, b - a)}
        both = ~np.isnan(b - a)
        colour[key] = {"base": mean(a[both]), "tuned": mean(b[both]), **differences}

    def shift(statistic: Callable[..., float], *samples: np.ndarray) -> dict[str, object]:
        known = ~np.any([np.isnan(sample.reshape(len(sample), -1)).any(axis=1) for sample in samples], axis=0)
        samples = tuple(sample[known] for sample in samples)
        return {"value": statistic(*samples), "interval": bootstrap_interval(statistic, *samples)}

    hues = [prompt_hues(side["hue"], prompt_ids) for side in (base, tuned)]
    labs = [per_prompt(np.stack([side[key] for key in "Lab"], axis=1), prompt_ids) for side in (base, tuned)]
    colour["hue_shift"] = shift(hue_shift, *hues)
    turned = [side[~np.isnan(hues[0] + hues[1])] for side in hues]
    colour["hue_turn"] = {"value": hue_turn(*turned), "interval": hue_turn_interval(*turned)}
    colour["hue_distance"] = shift(mean, per_prompt(hue_distance(base["hue"], tuned["hue"]), prompt_ids))
    lab_known = ~np.isnan(labs[0] + labs[1]).any(axis=1)
    labs = [lab[lab_known] for lab in labs]
    low, high = jackknife_interval(delta_e, *labs)
    colour["delta_e"] = {"value": delta_e(*labs), "interval": (max(0.0, low), high)}
    colour["delta_e_prompts"] = shift(mean, np.linalg.norm(labs[1] - labs[0], axis=1))
    if "latent_mean" in base and "latent_mean" in tuned:
        means = [per_prompt(side["latent_mean"], prompt_ids) for side in (base, tuned)]
        std = latent_std(base["latent_mean"], base["latent_std"])
        colour["latent_shift"] = shift(lambda a, b: latent_shift(a, b, std), *means)
        colour["latent_channels"] = [
            shift(mean, (means[1] - means[0])[:, channel] / std[channel]) for channel in range(len(std))
        ]
        colour["latent_std_ratio"] = (latent_std(tuned["latent_mean"], tuned["latent_std"]) / std).tolist()
    return colour


def compare_with_photos(colours: dict[str, np.ndarray], photos: dict[str, np.ndarray]) -> dict[str, dict[str, object]]:
    """A model's colour as a set against that of the photos: (P,) and (M,) of each of COLOURS; both are drawn anew.

    Where both have them, also latent_mean and latent_std, (P, C) and (M, C).
    """

    def difference(statistic: Callable[..., float], a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        rng = np.random.default_rng(0)
        drawn = [statistic(*(x[rng.integers(0, len(x), len(x))] for x in (a, b))) for _ in range(1000)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(low), float(high)

    found: dict[str, dict[str, object]] = {}
    for key in COLOURS:
        a, b = (side[key][~np.isnan(side[key])] for side in (photos, colours))
        row = {"photos": mean(a), "model": mean(b), "difference": mean(b) - mean(a)}
        found[key] = row | {"interval": difference(lambda a, b: b.mean() - a.mean(), a, b)}
    hues = [side["hue"][~np.isnan(side["hue"])] for side in (photos, colours)]
    found["hue_shift"] = {"value": hue_shift(*hues), "interval": difference(hue_shift, *hues)}
    labs = [np.stack([side[key] for key in "Lab"], axis=1) for side in (photos, colours)]
    labs = [lab[~np.isnan(lab).any(axis=1)] for lab in labs]
    found["delta_e"] = {"value": delta_e_of_sets(*labs), "interval": difference(delta_e_of_sets, *labs)}
    if "latent_mean" in photos and "latent_mean" in colours:
        std = latent_std(photos["latent_mean"], photos["latent_std"])
        means, shift = [side["latent_mean"] for side in (photos, colours)], partial(latent_shift, base_std=std)
        channels = (means[1].mean(axis=0) - means[0].mean(axis=0)) / std
        stds = [side["latent_std"].mean(axis=0) for side in (photos, colours)]
        found["latent_shift"] = {"value": shift(*means), "interval": difference(shift, *means)}
        found["latent_channels"] = {"difference": channels.tolist(), "std_ratio": (stds[1] / stds[0]).tolist()}
    return found


PAPER_COLUMNS = {  # the columns of the paper's tables (arXiv 2405.20216), our names of them, and what they are
    "P-Score": ("pickscore", "PickScore"),
    "HPS": ("hpsv2", "HPSv2"),
    "IR": ("imagereward", "ImageReward"),
    "AES": ("aesthetic", "LAION's aesthetic score"),
    "CLIP": ("clip", "100 cos(image, prompt) of CLIP"),
    "FID": ("FID", "Fréchet Inception distance to the photos, lower is better"),
    "CI-Q": ("clip_iqa", "CLIP-IQA: good against bad photo"),
    "CI-S": ("clip_iqa_sharpness", "CLIP-IQA: sharp against blurry photo"),
    "ATHEC": ("sharpness", "sharpness: std of the Laplacian"),
    "Hue": ("hue_shift", "distance to base's mean hue in degrees"),
}


def paper_rows(
    scorers: list[ScorerSpec],
    averages: dict[str, dict[str, float]],
    models: dict[str, dict[str, Any]],
    distances: dict[str, dict[str, Any]],
) -> dict[str, dict[str, float | None]]:
    """{model: {column of the paper: value}}, base first; None where it was not measured."""
    labels = {split_spec(scorer.source)[3]: scorer.label for scorer in reversed(scorers)}  # the first of a kind
    table = {}
    for name, found in averages.items():
        hue = models[name]["colour"]["hue_shift"]["value"] if name in models else None
        fid = distances["FID"]["models"][name] if "FID" in distances else None
        own = {"FID": fid, "hue_shift": hue}
        table[name] = {
            column: own[ours] if ours in own else found.get(labels.get(ours, ours))
            for column, (ours, _) in PAPER_COLUMNS.items()
        }
    return table


def leading_metric(metrics: dict[str, dict]) -> str:
    """The first held-out scorer; the first scorer of all where none is held out."""
    return next((label for label, row in metrics.items() if row["role"] == "held-out"), next(iter(metrics)))


NOTICEABLE = 2.3  # the just noticeable difference in CIE76 Delta E
VISIBLE = {"chroma": NOTICEABLE, "L_std": NOTICEABLE, "clipped": 0.05}  # moves of COLOURS that a mean colour hides
TURN = 15  # degrees: hues all around the circle may turn while their mean colour stays


def verdict(
    name: str,
    metrics: dict[str, dict],
    colour: dict[str, Any],
    realism: dict[str, dict],
    groups: dict[str, dict],
) -> list[tuple[str, str]]:
    """The comparison in sentences, each with a tone: good, bad or plain; the first one is the headline.

    What is told as gained or lost passes Holm, with its interval on one side of 1/2; a loss that does not is doubtful.
    """
    lead = leading_metric(metrics)
    gained = [label for label, m in metrics.items() if m["interval"][0] > 0.5 and m["holm"] < 0.05]
    worse = [label for label, m in metrics.items() if m["interval"][1] < 0.5 and m["holm"] < 0.05]
    doubtful = [label for label, m in metrics.items() if m["interval"][1] < 0.5 and m["holm"] >= 0.05]
    what = "draws better than" if lead in gained else "draws worse than" if lead in worse else "cannot be told from"
    tone = "good" if lead in gained else "bad" if lead in worse else "plain"
    of = f" of {metrics[lead]['prompts']} prompts"
    sentences = [(tone, f"{name} {what} base by {lead}: it wins {rated(metrics[lead], of)}.")]
    held_out = [label for label, m in metrics.items() if m["role"] == "held-out"]
    also = [f"{label} ({rated(metrics[label])})" for label in gained if label in held_out and label != lead]
    if also:
        sentences.append(("good", f"Better{', too' if lead in gained else ', however'}: {in_words(also)}."))
    risen = [label for label in gained if metrics[label]["role"] == "training"]
    costs = what_got_worse(metrics, worse, colour, realism)
    others = what_got_worse(metrics, [label for label in worse if label != lead], colour, realism)
    if costs and risen:
        rise = f"the training scorer rises ({rated(metrics[risen[0]])}) while"
        sentences.append(("bad", f"Looks like reward hacking: {rise} {in_words(costs)}."))
    elif others:
        sentences.append(("bad", f"{'At a cost' if gained else 'Also'}: {in_words(others)}."))
    elif risen and held_out and not set(held_out) & set(gained):
        sentences.append(("plain", "The training scorer rises, but no held-out scorer follows."))
    if doubtful:
        rates = [f"{label} ({rated(metrics[label])})" for label in doubtful]
        sentences.append(("plain", f"Perhaps worse, not for sure among so many metrics: {in_words(rates)}."))
    closer = [kind for kind, row in realism.items() if row["interval"][1] < 0]
    if closer:
        sentences.append(("good", f"Closer to the real photos by {in_words(closer)}."))
    sentences += [("bad", sentence) for sentence in losing_groups(groups, lead)]
    if not held_out:
        sentences.append(
            ("bad", "Only the training scorer judges here: add a held-out one to --scorers before you believe it.")
        )
    return sentences


def in_words(parts: list[str]) -> str:
    """The parts of a sentence, as in a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def rated(row: dict[str, Any], of: str = "") -> str:
    """A win rate with its interval, as "59 % [53, 66]"."""
    low, high = (f"{100 * end:.0f}" for end in row["interval"])
    return f"{100 * row['win_rate']:.0f} %{of} [{low}, {high}]"


def what_got_worse(
    metrics: dict[str, dict], lost: list[str], colour: dict[str, Any], realism: dict[str, dict]
) -> list[str]:
    """Everything but the training scorer that lost, with its figures, as parts of a sentence."""
    costs = [f"{label} gets worse ({rated(metrics[label])})" for label in lost if metrics[label]["role"] != "training"]
    for kind, row in realism.items():
        if row["interval"][0] > 0:
            costs.append(f"{kind} to the real photos grows ({row['base']:.3g} to {row['tuned']:.3g})")
    if colour["delta_e"]["interval"][0] > NOTICEABLE:
        costs.append(f"the colours shift visibly (Delta E {colour['delta_e']['value']:.1f})")
    low, high = colour["hue_turn"]["interval"]
    if low > TURN or high < -TURN:
        costs.append(f"the hues turn by {abs(colour['hue_turn']['value']):.0f} degrees")
    for key, least in VISIBLE.items():
        low, high = colour[key]["interval"]
        if low > least or (high < -least and key != "clipped"):
            way = "grows" if low > 0 else "falls"
            costs.append(f"{COLOURS[key]} {way} visibly ({colour[key]['base']:.3g} to {colour[key]['tuned']:.3g})")
    return costs


def losing_groups(groups: dict[str, dict], lead: str) -> list[str]:
    """A sentence for every group of prompts on which the leading metric loses for sure."""
    return [
        f"Worse where {column} is {group}: {lead} wins {rated(found['metrics'][lead])} of {found['prompts']} prompts."
        for column, found_groups in groups.items()
        for group, found in found_groups.items()
        if found["metrics"][lead]["interval"][1] < 0.5 and found["metrics"][lead]["holm"] < 0.05
    ]


# ---- Groups of prompts ---------------------------------------------------------------------------------------------

POSES = (
    r"\b(standing|sitting|walking|running|jumping|dancing|kneeling|lying|crouching|squatting|leaning|climbing|riding|"
    r"swimming|stretching|bending|waving|hugging)\b"
)


def group_prompts(args: argparse.Namespace, prompts: list[str]) -> dict[str, list[str]]:
    """{column: a group's name for every prompt}: people and pose are read in the prompts, others in their file."""
    groups = {}
    for column in args.group_by:
        if column == "people":
            counts = map(count_people, prompts)
            groups[column] = ["not said" if count is None else str(count) for count in counts]
        elif column == "pose":
            groups[column] = [name_pose(prompt) for prompt in prompts]
        else:
            told = read_groups(args.prompts, args.prompt_column, column)
            groups[column] = [told[prompt] for prompt in prompts]
    return groups


def name_pose(prompt: str) -> str:
    """The first of POSES in a prompt, or "not said"."""
    found = re.search(POSES, prompt.lower())
    return found[0] if found else "not said"


def read_groups(source: str, prompt_column: str | None, column: str) -> dict[str, str]:
    """{prompt: its value in another column of the same table}; UserError where there is no such column."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() not in {*TABLE_SUFFIXES, ".json", ".jsonl"}:
        raise UserError(f"--group_by {column}: {source} has no columns, only prompts (use people, pose, or a table)")
    if is_photo_folder(path):
        raise UserError(f"--group_by {column}: {source} is a folder of photos (use people, pose, or a table)")
    texts, _ = read_texts(source, prompt_column)
    if path.is_file():
        cells = read_file(path, column)
    else:
        rows = load_rows(source)
        cells = read_column(rows, choose_text_column(column, rows.column_names, source))
    groups: dict[str, str] = {}
    for text, cell in zip(texts, cells, strict=True):
        groups.setdefault(text, "not said" if cell in (None, "") else str(cell))
    return groups


# ---- Report: one HTML file that loads nothing ----------------------------------------------------------------------

LIGHT = {"paper": "#ffffff", "card": "#f5f7f7", "ink": "#1c2226", "soft": "#5f6a73", "line": "#e0e5e7"}
LIGHT |= {"base": "#98a2a9", "tuned": "#1f6a94", "bad": "#b8452f"}
DARK = {"paper": "#14181b", "card": "#1d2326", "ink": "#e6eaec", "soft": "#9aa6ad", "line": "#2e363b"}
DARK |= {"base": "#77828a", "tuned": "#6bb1d6", "bad": "#e5846d"}
CSS = """
:root{color-scheme:light dark;@LIGHT}
@media(prefers-color-scheme:dark){:root{@DARK}}
*{box-sizing:border-box;print-color-adjust:exact;-webkit-print-color-adjust:exact}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;font-variant-numeric:tabular-nums;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:56px 32px 80px}
h1,h2,h3,h4{font-weight:650;line-height:1.25;margin:0}
h1{font-size:16px}h2{font-size:25px;letter-spacing:-.015em;margin-bottom:14px}
h3{font-size:18px;margin:36px 0 8px}h2+h3{margin-top:0}h4{font-size:15px;margin:26px 0 8px}
section{margin-top:56px;padding-top:30px;border-top:1px solid var(--line)}
p{margin:0 0 12px;max-width:70ch}
a{color:var(--tuned);text-underline-offset:3px;text-decoration-thickness:1px}
small,.soft,th,figcaption,dt{color:var(--soft)}.soft,figcaption{font-size:14px}
td small{display:block;font-size:12.5px;white-space:normal}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;margin:26px 0 0;font-size:14px}nav a{text-decoration:none}
.said{padding-left:18px;border-left:4px solid var(--line);max-width:64ch}.one .said{font-size:18px}
.head{font-size:22px;line-height:1.35;font-weight:650;letter-spacing:-.01em;margin-top:26px;text-wrap:balance}
.one .head{font-size:31px;line-height:1.22;letter-spacing:-.02em;max-width:28em}
.good{border-color:var(--tuned)}.bad{border-color:var(--bad)}
.scroll{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:15px}
th{font-weight:400;font-size:13px;vertical-align:bottom}
th,td{padding:7px 0 7px 24px;border-bottom:1px solid var(--line);text-align:right;overflow-wrap:normal}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:110px}
.what{color:var(--soft);font-size:13px;margin-left:8px}
.tag{display:inline-block;white-space:nowrap;font-size:12px;line-height:1.5;font-weight:400;color:var(--soft);
 border:1px solid var(--line);border-radius:9px;padding:0 8px}
td:has(.whisker){width:34%;padding-left:16px}.whisker{display:block;width:100%;min-width:120px;height:24px}
.whisker+small{display:block;margin:0;text-align:center}
.axis{display:flex;justify-content:space-between;min-width:120px;margin-left:-8px}
.win{color:var(--tuned)}.lose{color:var(--bad)}.even{color:var(--base)}
.win *,.lose *,.even *{stroke:currentColor}.band{fill:currentColor;stroke:none;opacity:.22}.tie{opacity:.1}
.rule{stroke:var(--line)}.half{stroke:var(--base)}.dot{fill:currentColor}.training .dot{fill:var(--paper)}
.key{display:inline-block;width:10px;height:10px;border-radius:5px;margin:0 6px 0 14px;border:2px solid var(--soft)}
.key:first-child,br+.key{margin-left:0}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
.runs{display:block;width:100%;max-width:620px;overflow:visible}
.runs g{stroke:var(--base);fill:var(--base);stroke-width:1.5}.runs path{fill:none}.runs g text{stroke:none}
.runs .lead{stroke:var(--tuned);fill:var(--tuned);stroke-width:3}.runs .lead text{fill:var(--tuned);font-weight:650}
.runs .training{stroke:var(--ink);fill:var(--paper)}.runs .training path{stroke-dasharray:6 4}
.runs .training text{fill:var(--ink)}.runs .diversity path{stroke-dasharray:1 4}
.runs line{stroke-width:1;opacity:.35}.lead line,.training line{opacity:1}
figure+.soft{margin-top:10px}.paper{display:none}
.facts,.plots,.rows{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px 32px;margin:18px 0}
.fact{font-size:13px;color:var(--soft);border-top:2px solid var(--line);padding-top:8px}
.fact b{display:block;font-size:26px;font-weight:600;line-height:1.35;color:var(--ink)}
.plots{grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:36px 32px;margin:34px 0}
figure{margin:0}.plots figcaption{margin-bottom:12px}.plots svg{display:block;width:100%;max-width:420px}
.rows{grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:40px 36px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px;align-items:end}
.pair img,.none{display:block;width:100%;height:auto;border-radius:4px}.small{image-rendering:pixelated}
.none{display:grid;place-items:center;aspect-ratio:1;background:var(--card);color:var(--soft);font-size:13px}
.row p{margin:10px 0 6px}.row figcaption{font-size:13px;margin-top:4px}
.row table{font-size:13px}.row .scroll{margin:0}.row th,.row td{padding-block:2px;border:0}.row b{font-weight:650}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 24px;font-size:14px}dd{margin:0}
@media(max-width:600px){thead{display:none}tr{display:flex;flex-wrap:wrap;gap:2px 16px;padding:8px 0;
 border-bottom:1px solid var(--line)}td:empty{display:none}
 td,td:has(.whisker){padding:0;border:0;width:auto;white-space:normal;text-align:left}
 td:first-child,td:has(.whisker){flex:1 0 100%}td[data-head]::before{content:attr(data-head) " ";color:var(--soft);
 font-size:13px}td small{display:inline;margin-left:6px}.row tr{padding:2px 0}
 main{padding:28px 18px 48px}.one .head{font-size:25px}.head{font-size:20px}
 section{margin-top:40px;padding-top:24px}.runs text{font-size:15px}
 dl{display:block}dd{margin-bottom:8px}}
@page{size:A4;margin:15mm 14mm}
@media print{:root{color-scheme:light;@LIGHT}main{padding:0;max-width:none}body{font-size:10pt}
 nav,.links{display:none}section{margin-top:8mm;padding-top:5mm}h2,h3,h4{break-after:avoid}h2+*,h3+*{break-before:avoid}
 tr,figure,.fact,.row,.said,.soft{break-inside:avoid}.scroll{overflow:visible}table,dl,.said{font-size:9pt}
 .one .head{font-size:20pt}.head{font-size:14pt}th,td{padding-left:10px}th,td small{font-size:8pt}
 .whisker,.axis{min-width:40px}.axis{margin-left:0}td:has(.whisker){width:28%}td:first-child{min-width:20mm}
 .scroll{break-inside:avoid}.scroll+.soft{break-before:avoid}.soft{font-size:9pt}
 .facts,.plots,.soft:has(+.scroll,+h4){break-after:avoid}
 .plots,.rows{grid-template-columns:repeat(3,1fr);gap:6mm}
 .facts{grid-template-columns:repeat(6,1fr);gap:4mm}
 .paper{display:inline}.rows>:nth-child(n+4){display:none}.runs{max-width:140mm}a{color:inherit;text-decoration:none}}
"""
CSS = CSS.replace("@LIGHT", ";".join(f"--{name}:{colour}" for name, colour in LIGHT.items()))
CSS = CSS.replace("@DARK", ";".join(f"--{name}:{colour}" for name, colour in DARK.items()))

READING = """The prompt is the unit: a model's images of one prompt are averaged first. Win rate: share of the
prompts on which the tuned model is higher, ties as one half; a prompt with fewer vetoed images is higher. The interval
is a bootstrap over prompts, exact where all are won or lost; p is an exact sign test with Holm's correction over the
metrics. The training scorer selected the training pairs, so it never leads. Diversity: mean cosine distance of one
prompt's images. Hue, all images together, is the paper's: where hues go all around the circle it is not stable, and
its interval says so."""
LEGEND = """Blue: the interval lies above one half, red: below, and p is below .05; grey: neither. The band is what the
tuned model won, its pale end the ties. Open dot: the training scorer. Bold: the metric that leads."""

ROLES = {"held-out": "", "training": "training scorer", "diversity": "diversity", "identity": "identity"}
SHIFTS = {  # the figures of the colour shift: words, unit, decimals
    "delta_e": ("Delta E, all images (2.3: visible)", "", 2),
    "delta_e_prompts": ("Delta E, prompt by prompt", "", 2),
    "hue_distance": ("Hue, image by image", "°", 1),
    "hue_shift": ("Hue, all images together", "°", 1),
    "hue_turn": ("Hue, turn of all prompts", "°", 1),
    "latent_shift": ("Latent means, in std of base", "", 3),
}
SHIFT_NOTE = """A turn has a direction, and no interval where the prompts' hues turn no common way. Distances are never
negative: those image by image, prompt by prompt and of the latents stand above 0 for two equal models too, by the luck
of the draw. What moved, and which way, the differences in the table tell."""
AXIS = '<span class="axis"><span>0</span><span>50 %</span><span>100</span></span>'
NONE = "–"  # a value that is not known
UNKNOWN = {"value": None, "win_rate": None, "interval": (None, None)}  # a measure that is not there
TINY = 128  # images of so few pixels a side are shown with hard pixels


def all_finite(*values: float | None) -> bool:
    """Whether all of the values are finite numbers."""
    return all(value is not None and math.isfinite(value) for value in values)


def percent(share: float | None) -> str:
    """A share as "59.1 %"."""
    return f"{100 * share:.1f} %" if all_finite(share) else NONE


def number(value: float | None) -> str:
    """A value with four significant digits; an infinite one is told as such."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def p_value(p: float | None) -> str:
    """A p value with two significant digits, or in words where it is very small."""
    return NONE if not all_finite(p) else f"{p:.2g}" if p >= 1e-4 else "below .0001"


def span(interval: Sequence[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """An interval as "[53.1, 65.9]"."""
    return f"[{', '.join(f'{scale * end:.{digits}f}' for end in interval)}]" if all_finite(*interval) else ""


def change(difference: float | None, interval: Sequence[float | None]) -> str:
    """A difference and its interval as "-0.110 [-0.127, -0.092]", by the interval's width."""
    if not all_finite(difference, *interval):
        return NONE
    width = interval[1] - interval[0] or abs(difference) or 1.0
    digits = max(0, 1 - math.floor(math.log10(width)))
    return f"{difference:+.{digits}f} {span(interval, digits=digits)}"


def tone(interval: Sequence[float | None], even: float = 0.5, p: float | None = None) -> str:
    """win where the interval lies above `even`, lose where below it; even otherwise, or where p is not below .05."""
    if not all_finite(*interval) or (p is not None and not p < 0.05):
        return "even"
    return "win" if interval[0] > even else "lose" if interval[1] < even else "even"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells, the first column text, the others numbers or plots; "" where there are no rows.

    The heads of numbers are escaped text: on phones they stand before each number.
    """
    top = "".join(f"<th>{cell}</th>" for cell in head)
    names = ["", *("" if cell == AXIS else f' data-head="{cell}"' for cell in head[1:])]
    body = "".join(
        f"<tr>{''.join(f'<td{name}>{cell}</td>' for name, cell in zip(names, row, strict=True))}</tr>" for row in rows
    )
    whole = f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return whole if body else ""


def shift_text(colour: dict[str, Any], key: str) -> str:
    """One of SHIFTS as "1.8°"."""
    (_, unit, digits), value = SHIFTS[key], colour.get(key, UNKNOWN)["value"]
    return f"{value:.{digits}f}{unit}" if all_finite(value) else NONE


def shift_span(colour: dict[str, Any], key: str) -> str:
    """Its interval."""
    return span(colour.get(key, UNKNOWN)["interval"], digits=SHIFTS[key][2])


def with_note(body: str, words: str) -> str:
    """A part of the page with a remark below it; "" where there is none."""
    return f'{body}<p class="soft">{words}</p>' if body else ""


def by_model(models: dict[str, dict], show: Callable[[str, dict], str]) -> str:
    """show(name, result) of every tuned model, under its name where there are more; what is "" is left out."""
    shown = [(html.escape(name), show(name, result)) for name, result in models.items()]
    return "".join((f"<h3>{name} against base</h3>" if len(shown) > 1 else "") + body for name, body in shown if body)


def win_tie_lose(metric: dict[str, Any]) -> str:
    """The prompts that are won, tied and lost, as "won 68 / tied 4 / lost 28 %"."""
    won, tied, lost = (f"{100 * metric[word]:.0f}" for word in ("win", "tie", "lose"))
    return f"won {won} / tied {tied} / lost {lost} %"


def rate_cells(metric: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """A win rate, its interval, the means of base and the tuned model, and p."""
    means = number(metric["base"]), number(metric["tuned"])
    return percent(metric["win_rate"]), span(metric["interval"], 100), *means, p_value(metric["holm"])


def whisker(metric: dict[str, Any], role: str = "held-out") -> str:
    """A win rate with its interval on an axis from 0 to 100 %, above a band of what is won and tied, also in words."""
    rate, (low, high) = metric["win_rate"], metric["interval"]
    if not all_finite(rate, low, high):
        return ""
    x, low, high, won, tied = (96 * share for share in (rate, low, high, metric.get("win", 0), metric.get("tie", 0)))
    told = f"<small>{win_tie_lose(metric)}</small>" if "lose" in metric else ""
    return f"""<svg class="whisker {tone(metric["interval"], p=metric.get("holm"))} {role}">
<line class="rule" x1="2%" x2="98%" y1="12" y2="12"/>
<rect class="band" x="2%" y="7" width="{won:.2f}%" height="10"/>
<rect class="band tie" x="{2 + won:.2f}%" y="7" width="{tied:.2f}%" height="10"/>
<line class="half" x1="50%" x2="50%" y1="1" y2="23"/>
<line x1="{2 + low:.2f}%" x2="{2 + high:.2f}%" y1="12" y2="12" stroke-width="2"/>
<circle class="dot" cx="{2 + x:.2f}%" cy="12" r="4.5" stroke-width="2"/></svg>{told}"""


def win_rates(name: str, result: dict[str, Any]) -> str:
    """The table of a tuned model's win rates: held-out scorers first, the leading one bold."""
    rows, metrics = [], result["metrics"]
    lead = leading_metric(metrics)
    for label, m in metrics.items():
        title = f"<b>{html.escape(label)}</b>" if label == lead else html.escape(label)
        tag = f' <span class="tag">{ROLES[m["role"]]}</span>' if ROLES[m["role"]] not in ("", label) else ""
        if any(m["vetoed"]):
            base, tuned = map(percent, m["vetoed"])
            tag += f"<small>vetoed: base {base}, {html.escape(name)} {tuned}</small>"
        rows.append((title + tag, whisker(m, m["role"]), *rate_cells(m), p_value(m["wilcoxon"])))
    figures = "Win rate", "95 % interval", "base", html.escape(name), "p (Holm)", "p (Wilcoxon)"
    return table(("Metric", AXIS, *figures), rows)


def verdict_words(sentences: Sequence[tuple[str, str]]) -> str:
    """The sentences of verdict() in a word or two, by their tones."""
    first, *others = (tone for tone, _ in sentences)
    word = {"good": "better", "bad": "worse"}.get(first, "not told apart")
    return f"{word}, with a warning" if "bad" in others else word


def summary_table(models: dict[str, dict]) -> str:
    """A row for every tuned model, where there is more than one."""
    rows, lead = [], leading_metric(next(iter(models.values()))["metrics"])
    for name, result in models.items():
        first = {m["role"]: m for m in reversed(result["metrics"].values())}
        led = result["metrics"].get(lead, UNKNOWN)
        others = (percent(first.get(role, UNKNOWN)["win_rate"]) for role in ("training", "diversity"))
        title = f"{html.escape(name)}<small>{verdict_words(result['verdict'])}</small>"
        rows.append((title, whisker(led), percent(led["win_rate"]), *others, shift_text(result["colour"], "delta_e")))
    head = ("Model", AXIS, html.escape(lead), "training scorer", "diversity", "Delta E")
    return table(head, rows) if len(rows) > 1 else ""


def training_runs(models: dict[str, dict]) -> dict[str, dict[int, dict[str, dict]]]:
    """{run: {step: metrics}}, by step, of the runs of which two or more checkpoints were compared."""
    runs: dict[str, dict[int, dict[str, dict]]] = {}
    for result in models.values():
        if point := result["checkpoint"]:
            runs.setdefault(point["of"], {})[point["step"]] = result["metrics"]
    return {run: dict(sorted(steps.items())) for run, steps in runs.items() if len(steps) > 1 and run_lines(steps)}


def spread(places: Sequence[float], gap: float, limit: float) -> list[float]:
    """The places, in their order, moved down so as to lie `gap` apart, and up again where they pass `limit`."""
    order, moved = np.argsort(places, kind="stable").tolist(), list(places)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + gap)
    for below, above in pairwise(order[::-1]):
        moved[below] = min(moved[below], limit)
        moved[above] = min(moved[above], moved[below] - gap)
    return moved


def run_lines(steps: dict[int, dict[str, dict]]) -> dict[str, list[tuple[int, dict]]]:
    """{label: [(step, metric)]} of the win rates that are known, the leading metric first."""
    roles = {label: m["role"] for metrics in steps.values() for label, m in metrics.items()}
    labels = sorted(roles, key=lambda label: list(ROLES).index(roles[label]))  # the first step may lack a metric
    lines = {label: [(step, metrics.get(label, UNKNOWN)) for step, metrics in steps.items()] for label in labels}
    lines = {label: [(step, m) for step, m in line if all_finite(m["win_rate"])] for label, line in lines.items()}
    return {label: line for label, line in lines.items() if line}


def run_plot(steps: dict[int, dict[str, dict]]) -> str:
    """Win rates over the steps of one training run, a line for each metric, from base (one half) at step 0."""
    lines = run_lines(steps)
    lead, last = next(iter(lines)), max(steps)
    ends = [end for line in lines.values() for _, m in line for end in m["interval"] if all_finite(end)]
    low, high = math.floor(4 * min(0.49, *ends)) / 4, math.ceil(4 * max(0.51, *ends)) / 4

    def at(step: float, rate: float) -> tuple[float, float]:
        return 42 + 318 * step / last, 12 + 240 * (high - rate) / (high - low)

    places = spread([at(last, line[-1][1]["win_rate"])[1] for line in lines.values()], 15, limit=252)
    drawn = [
        run_line(label, line, "lead" if label == lead else line[-1][1]["role"], at, place)
        for (label, line), place in zip(lines.items(), places, strict=True)
    ]
    rules = "".join(
        f'<path class="{"half" if rate == 0.5 else "rule"}" d="M42 {(y := at(0, rate)[1]):.1f}H360"/>'
        f'<text x="34" y="{y + 4:.1f}" text-anchor="end">{100 * rate:.0f} %</text>'
        for rate in np.arange(low, high + 0.01, 0.25)
    )
    ticks = [0]
    for step in steps:
        ticks = [tick for tick in ticks if at(step, 0)[0] - at(tick, 0)[0] > 28] + [step]  # the last one is shown
    named = "".join(f'<text x="{at(step, 0)[0]:.1f}" y="272" text-anchor="middle">{step}</text>' for step in ticks)
    return f"""<svg class="runs" viewBox="0 0 480 292">{rules}{named}
<text x="201" y="290" text-anchor="middle">training step</text>{"".join(reversed(drawn))}</svg>"""


def run_line(
    label: str,
    line: list[tuple[int, dict]],
    role: str,
    at: Callable[[float, float], tuple[float, float]],
    place: float,
) -> str:
    """One metric's line of run_plot with whiskers, dots and name; `at` gives the place of a step and a win rate."""
    points = [at(0, 0.5), *(at(step, m["win_rate"]) for step, m in line)]
    marks = ""
    for (x, y), (step, m) in zip(points[1:], line, strict=True):
        ends = (end if all_finite(end) else m["win_rate"] for end in m["interval"])
        (_, bottom), (_, top) = (at(step, end) for end in ends)
        told = f"{html.escape(label)}, step {step}: {percent(m['win_rate'])} {span(m['interval'], 100)}"
        marks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        marks += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{told}</title></circle>'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    name = html.escape(textwrap.shorten(label, 16, placeholder="…"))
    return f'<g class="{role}"><path d="M{path}"/>{marks}<text x="370" y="{place + 4:.1f}">{name}</text></g>'


def run_sentence(steps: dict[int, dict[str, dict]]) -> str:
    """Where the leading metric and the training scorers are highest, and what it means when these steps differ.

    Over-optimised: from the leading metric's best step to the training scorer's, the one rises and the other falls,
    each from outside the interval that it ends or begins with.
    """
    lines = {label: dict(line) for label, line in run_lines(steps).items()}
    lead = next(iter(lines))
    chose = [label for label, line in lines.items() if next(iter(line.values()))["role"] == "training"]
    best = {label: max(lines[label], key=lambda step: lines[label][step]["win_rate"]) for label in (lead, *chose)}

    def above(label: str, other: str) -> bool:
        """Whether a metric is higher for sure at its best step than at the other metric's."""
        there = lines[label].get(best[other])
        return there is not None and there["interval"][1] < lines[label][best[label]]["win_rate"]

    gained = {label for label, step in best.items() if lines[label][step]["win_rate"] > 0.5}
    told = ", ".join(
        f"{label} is {f'highest at step {step}' if label in gained else 'never above base'}"
        for label, step in best.items()
    )
    later = [label for label in chose if best[label] > best[lead]]
    hacked = [label for label in later if above(label, lead) and above(lead, label)]
    if hacked:
        told += f". Over-optimised: {in_words(hacked)}, which chose the pairs, goes on rising while {lead} falls"
    elif later and gained.issuperset((lead, *later)):
        told += "; within the intervals that is no difference"
    return f"<p>{html.escape(told)}.</p>"


def runs_section(models: dict[str, dict]) -> str:
    """Training scorer against held-out metrics over the checkpoints of each run."""
    figures = "".join(
        f"<h3>{html.escape(run)}</h3><figure>{run_sentence(steps)}{run_plot(steps)}</figure>"
        for run, steps in training_runs(models).items()
    )
    told = """Win rate against base with 95 % intervals. The leading metric is blue, the training scorer dashed with
open dots, diversity dotted."""
    return with_note(figures, told)


def group_tables(name: str, result: dict[str, Any]) -> str:
    """A table for each column of groups of prompts, worst first by the leading metric."""
    lead, tables = leading_metric(result["metrics"]), ""

    def worst_first(item: tuple[str, dict[str, Any]]) -> float:
        rate = item[1]["metrics"][lead]["win_rate"]
        return rate if all_finite(rate) else math.inf

    for column, groups in result["groups"].items():
        rows, head = [], [html.escape(column), "prompts"]
        for label in next(iter(groups.values()))["metrics"]:
            head += [AXIS, html.escape(label)]
        for title, group in sorted(groups.items(), key=worst_first):
            row = [html.escape(title), str(group["prompts"])]
            for label, m in group["metrics"].items():
                told = percent(m["win_rate"])
                row += [whisker(m, result["metrics"][label]["role"]), f"<b>{told}</b>" if m["holm"] < 0.05 else told]
            rows.append(row)
        tables += table(head, rows)
    return tables


def paper_columns(paper: dict[str, dict]) -> list[str]:
    """The paper's columns that are known of a model."""
    return [name for name in PAPER_COLUMNS if any(all_finite(row[name]) for row in paper.values())]


def paper_table(paper: dict[str, dict]) -> str:
    """The columns of the paper's tables as rows, the models as columns."""
    rows = (
        (f'{name} <span class="what">{PAPER_COLUMNS[name][1]}</span>', *(number(row[name]) for row in paper.values()))
        for name in paper_columns(paper)
    )
    return table(("Name", *map(html.escape, paper)), rows)


def shifted(value: float | None, row: dict[str, Any], lower_is_better: bool = False) -> str:
    """A value above its row's difference with the interval; red or blue where lower is better and it is sure."""
    kind = {"win": "lose", "lose": "win"}.get(tone(row["interval"], even=0.0), "")
    difference = change(row["difference"], row["interval"])
    return f'{number(value)}<small class="{kind * lower_is_better}">{difference}</small>'


def realism_section(found: dict[str, Any], models: dict[str, dict]) -> str:
    """Distances to the photos, with the differences of the tuned models from base."""
    rows = []
    for name, distance in found["distances"].items():
        moves = (result["realism"][name] for result in models.values())
        cells = (shifted(move["tuned"], move, lower_is_better=True) for move in moves)
        rows.append((html.escape(name), number(distance["floor"]), number(distance["models"]["base"]), *cells))
    told = f"""{counted(found["images"], "image")} of each model against {counted(found["photos"], "photo")}. Below
each distance of a tuned model: its difference from base, 95 % interval."""
    shown = table(("Lower is better", "photos among themselves", "base", *map(html.escape, models)), rows)
    notes = {name: distance["note"] for name, distance in found["distances"].items() if distance["note"]}
    remarks = "".join(
        f'<p class="soft"><b>{html.escape(name)}</b>: {html.escape(note)}</p>' for name, note in notes.items()
    )
    return f'<p class="soft">{told}</p>{shown}{remarks}'


def colour_plane(base: np.ndarray, tuned: np.ndarray) -> str:
    """Mean a* and b* of each prompt's images, (P, 2) each: base grey, tuned coloured, their means joined by a line."""
    reach = max(5.0, 1.1 * float(np.abs([base, tuned]).max()))

    def dots(points: np.ndarray, side: str, style: str) -> str:
        return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" fill="var(--{side})" {style}/>' for x, y in points)

    base, tuned = (150 + 140 * points / reach * (1, -1) for points in (base, tuned))
    means = np.stack([base.mean(axis=0), tuned.mean(axis=0)])
    small, large = 'r="2.4" fill-opacity=".55"', 'r="6" stroke="var(--paper)" stroke-width="2"'
    (x1, y1), (x2, y2) = means
    return f"""<svg viewBox="0 0 300 300"><path d="M10 150H290M150 10V290" stroke="var(--line)"/>
<text x="290" y="164" text-anchor="end">red</text><text x="10" y="164">green</text><text x="156" y="20">yellow</text>
<text x="156" y="288">blue</text>{dots(base[:400], "base", small)}{dots(tuned[:400], "tuned", small)}
<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="var(--ink)"/>
{dots(means[:1], "base", large)}{dots(means[1:], "tuned", large)}</svg>"""


def colour_strips(base: np.ndarray, tuned: np.ndarray, hues: np.ndarray) -> str:
    """Mean colours of up to 60 prompts, (P, 3) in 0..255 each, base above tuned, in the order of base's hues (P,)."""
    order = np.argsort(hues)
    order = order[np.linspace(0, len(order) - 1, min(60, len(order))).astype(int)]
    width = 300 / len(order)
    cells = "".join(
        f'<rect x="{i * width:.2f}" y="{y}" width="{width:.2f}" height="138" fill="rgb({r:.0f},{g:.0f},{b:.0f})"/>'
        for y, colours in ((10, base), (152, tuned))
        for i, (r, g, b) in enumerate(colours[order])
    )
    return f'<svg viewBox="0 0 300 300" shape-rendering="crispEdges">{cells}</svg>'


def channel_plot(channels: list[dict]) -> str:
    """Shift of every latent channel's mean, in std of base, with intervals."""
    reach = max(0.1, 1.1 * max(abs(end) for channel in channels for end in channel["interval"]))
    lines = []
    for i, channel in enumerate(channels):
        y = 10 + 260 * (i + 0.5) / len(channels)
        x, low, high = (160 + 120 * end / reach for end in (channel["value"], *channel["interval"]))
        lines.append(f"""<text x="10" y="{y + 4:.1f}">{i}</text>
<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="var(--tuned)"/>
<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="var(--tuned)" stroke-width="2"/>""")
    return f"""<svg viewBox="0 0 300 300"><path d="M160 10V276" stroke="var(--base)"/>
<path d="M40 276H280" stroke="var(--line)"/>
<text x="40" y="292" text-anchor="middle">-{reach:.2g}</text><text x="160" y="292" text-anchor="middle">0</text>
<text x="280" y="292" text-anchor="middle">+{reach:.2g}</text>{"".join(lines)}</svg>"""


def colour_figures(name: str, channels: list[dict], *sides: dict[str, np.ndarray]) -> str:
    """The plots of the colour shift; `sides`, base and tuned, hold a value per prompt of each measure, (P,)."""
    keys = ("a", "b", "red", "green", "blue", "hue")
    points = np.stack([np.stack([side[key] for key in keys], axis=1) for side in sides])
    base, tuned = points[:, np.isfinite(points).all(axis=(0, 2))]
    figures = {}
    if len(base):
        key = '<i class="key" style="border-color:var(--{0});background:var(--{0})"></i>{1}'.format
        keys = f"{key('base', 'base')}{key('tuned', name)}"
        figures[f"Mean colours of the prompts in the Lab plane<br>{keys}"] = colour_plane(base[:, :2], tuned[:, :2])
        caption = f"Mean colours of the prompts by hue<br>base above, {name} below"
        figures[caption] = colour_strips(base[:, 2:5], tuned[:, 2:5], base[:, 5])
    if channels and all_finite(*(end for channel in channels for end in (channel["value"], *channel["interval"]))):
        figures["Shift of the latent channels' means<br>in std of base"] = channel_plot(channels)
    drawn = "".join(f"<figure><figcaption>{words}</figcaption>{plot}</figure>" for words, plot in figures.items())
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def colour_section(name: str, colour: dict[str, Any], *sides: dict[str, np.ndarray]) -> str:
    """Figures, plots and table of the colour shift; `sides` as in colour_figures."""
    title = html.escape(name)
    facts = "".join(
        f'<div class="fact">{words}<b>{shift_text(colour, key)}</b>{shift_span(colour, key)}</div>'
        for key, (words, _, _) in SHIFTS.items()
        if key in colour
    )
    rows = []
    for key, words in COLOURS.items():
        row = colour[key]
        rows.append((words, number(row["base"]), number(row["tuned"]), change(row["difference"], row["interval"])))
    figures = colour_figures(title, colour.get("latent_channels", []), *sides)
    listed = table(("Mean over prompts", "base", title, "difference and 95 % interval"), rows)
    return f'<div class="facts">{facts}</div>{figures}{listed}'


def photos_table(photos: dict[str, dict]) -> str:
    """The colours of every model against the photos': rows are measures, with differences from the photos."""
    rows = []
    sets = {
        "delta_e": "Delta E",
        "hue_shift": "distance of the mean hues, degrees",
        "latent_shift": "latent means, in std of photos",
    }
    for key, words in sets.items():
        values = (number(row.get(key, UNKNOWN)["value"]) for row in photos.values())
        spans = (shift_span(row, key) for row in photos.values())
        rows.append((words, NONE, *map("{}<small>{}</small>".format, values, spans)))
    for key, words in COLOURS.items():
        found = [row[key] for row in photos.values()]
        rows.append((words, number(found[0]["photos"]), *(shifted(row["model"], row) for row in found)))
    shown = table(("Distances, then means over prompts", "photos", *map(html.escape, photos)), rows)
    told = "Below each distance: its 95 % interval. Below each mean: its difference from the photos, 95 % interval."
    return f"<h3>Against the photos</h3>{with_note(shown, told)}"


def identity_table(identity: dict[str, dict]) -> str:
    """How like the reference faces every model's faces are."""
    rows = []
    for name, row in identity.items():
        shares = percent(row["recognised"]), percent(row["no_face"])
        rows.append((html.escape(name), number(row["cosine"]), span(row["interval"], digits=3), *shares))
    return table(("Faces against the references", "cosine", "95 % interval", "recognised", "no face"), rows)


def image_link(path: Path, folder: Path) -> str:
    """The address of a file as seen from a page in `folder`: relative where it lies below it."""
    file, folder = (Path(os.path.abspath(place)) for place in (path, folder))
    return quote(file.relative_to(folder).as_posix()) if file.is_relative_to(folder) else file.as_uri()


def small_jpeg(image: Image.Image, limit: int = 28_000) -> bytes:
    """A JPEG of at most `limit` bytes, or of quality 35 where that is not enough."""
    for quality in (88, 78, 66, 50, 35):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue()


def image_tile(folder: Path, path: Path | None, side: int = 384) -> str:
    """An image of at most `side` pixels a side, a JPEG or a tiny PNG, linked to its file; a grey tile for None.

    `folder` is where the page lies.
    """
    if path is None:
        return '<div class="none">no image</div>'
    with Image.open(path) as file:
        tiny = max(file.size) <= TINY
        file.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(file).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, data = ("png", png(image)) if tiny else ("jpeg", small_jpeg(image))
    return f"""<a href="{image_link(path, folder)}"><img{' class="small"' * tiny} alt="full size" width="{image.width}"
height="{image.height}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}"></a>"""


def choose_rows(base: np.ndarray, tuned: np.ndarray, count: int, seed: int) -> dict[str, list[int]]:
    """Prompts to show, by one metric's values (P,) each: at most `count` worst losses, best wins, and random ones."""
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(tuned - base, nan=0.0)
    order = np.argsort(difference, kind="stable")
    return {
        "Worst losses": [int(p) for p in order[:count] if difference[p] < 0],
        "Best wins": [int(p) for p in order[::-1][:count] if difference[p] > 0],
        "At random": np.random.default_rng(seed).permutation(len(order))[:count].tolist(),
    }


def score_row(label: str, base: float, tuned: float) -> tuple[str, str, str]:
    """A metric's scores of one prompt, the higher one bold."""
    a, b = number(base), number(tuned)
    return html.escape(label), f"<b>{a}</b>" if base > tuned else a, f"<b>{b}</b>" if tuned > base else b


def side_by_side(prompt: str, tiles: dict[str, str], scores: dict[str, tuple[float, float]]) -> str:
    """One prompt: the tiles {model: HTML} of base and a tuned model, the prompt, its scores {label: (base, tuned)}."""
    figures = "".join(
        f"<figure>{tile}<figcaption>{html.escape(name)}</figcaption></figure>" for name, tile in tiles.items()
    )
    listed = table(("", *map(html.escape, tiles)), (score_row(label, *both) for label, both in scores.items()))
    return f'<div class="row"><div class="pair">{figures}</div><p>{html.escape(prompt)}</p>{listed}</div>'


def rows_section(
    record: dict[str, Any],
    name: str,
    prompts: list[str],
    means: dict[str, dict[str, np.ndarray]],
    tile: Callable[[str, int], str],
) -> str:
    """Images of base and a tuned model, with their means {model: {measure: (P,)}}; tile(model, prompt) is an image."""
    settings, metrics, base, tuned = record["settings"], record["models"][name]["metrics"], means["base"], means[name]
    lead, several = leading_metric(metrics), max(record["images"].values()) > record["prompts"]
    scores = {label: (base[label], tuned[label]) for label, m in metrics.items() if m["role"] != "diversity"}
    means_of = " Scores are means over a prompt's images, of which the first is shown." if several else ""
    told = f"""<p class="soft">Ordered by {html.escape(lead)}; the higher score is bold.{means_of} An image opens in
full size.<span class="paper"> On paper: the first three of a kind.</span></p>"""
    for heading, chosen in choose_rows(base[lead], tuned[lead], settings["report_rows"], settings["seed"]).items():
        shown = ""
        for p in chosen:
            tiles = {side: tile(side, p) for side in ("base", name)}
            shown += side_by_side(prompts[p], tiles, {label: (a[p], b[p]) for label, (a, b) in scores.items()})
        told += f'<h4>{heading}</h4><div class="rows">{shown}</div>' if shown else ""
    return told


def verdict_lines(record: dict[str, Any]) -> str:
    """The top of the page: what was compared, the verdicts, the first sentence of each large, and the caveats."""
    files = " · ".join(f'<a href="{name}">{name}</a>' for name in ("metrics.json", "per_image.csv", "model_card.md"))
    lines = [
        f'<p class="said {kind}{"" if i else " head"}">{html.escape(sentence).replace(" %", "&nbsp;%")}</p>'
        for result in record["models"].values()
        for i, (kind, sentence) in enumerate(result["verdict"])
    ]
    lines += [f'<p class="soft">{html.escape(sentence)}</p>' for sentence in record["caveats"]]
    counts = f"{counted(record['prompts'], 'prompt')}, {images_per_model(record)}"
    return f"""<h1>Does it draw better people?</h1><p class="soft">{counts}<span class="links"> · {files}</span></p>
<div{' class="one"' if len(record["models"]) == 1 else ""}>{"".join(lines)}</div>"""


def settings_list(settings: dict[str, object]) -> str:
    """All settings, a line each."""
    lines = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in settings.items())
    return f"<dl>{''.join(lines)}</dl>"


def page(title: str, top: str, sections: dict[str, str]) -> str:
    """The whole page: what stands on top, links to the sections {heading: HTML} that are not empty, the sections."""
    sections = {heading: body for heading, body in sections.items() if body}
    ids = {heading: re.sub(r"\W+", "-", heading.lower()) for heading in sections}
    links = "".join(f'<a href="#{ids[heading]}">{heading}</a>' for heading in sections)
    bodies = "".join(f'<section id="{ids[name]}"><h2>{name}</h2>{body}</section>' for name, body in sections.items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src data:;style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{CSS}</style></head><body><main>{top}<nav>{links}</nav>{bodies}</main></body></html>"""


def write_report(
    path: Path,
    record: dict[str, Any],
    prompts: list[str],
    means: dict[str, dict[str, np.ndarray]],
    pictures: dict[str, list[Path | None]],
) -> None:
    """report.html: the verdicts, then every part of `record` that is there, then images side by side, then settings.

    means: a value per prompt of every measure, {model: {measure: (P,)}}; pictures: each prompt's first image, or None.
    """
    models, settings = record["models"], record["settings"]

    @lru_cache(None)  # base's images stand beside every tuned model's
    def tile(name: str, p: int) -> str:
        return image_tile(path.parent, pictures[name][p])

    def colours(name: str, result: dict[str, Any]) -> str:
        return colour_section(name, result["colour"], means["base"], means[name])

    def rows(name: str, result: dict[str, Any]) -> str:
        return rows_section(record, name, prompts, means, tile)

    against_photos = photos_table(record["photos_colour"]) if "photos_colour" in record else ""
    sections = {
        "All models": summary_table(models),
        "Win rates": with_note(by_model(models, win_rates), LEGEND),
        "Over training": runs_section(models),
        "Groups of prompts": with_note(by_model(models, group_tables), "Worst first. Bold: p below .05 after Holm."),
        "The paper's names": paper_table(record["paper"]),
        "Realism": realism_section(record["realism"], models) if "realism" in record else "",
        "Colour": with_note(by_model(models, colours), SHIFT_NOTE) + against_photos,
        "Identity": identity_table(record["identity"]) if "identity" in record else "",
        "Votes": votes_section(record["votes"]) if "votes" in record else "",
        "Side by side": by_model(models, rows),
        "How to read this": f"<p>{READING}</p>",
        "Settings": settings_list(settings),
    }
    title = f"{', '.join(models)} against base"
    write_atomically(path, page(title, verdict_lines(record), sections).encode())


def plain_text(text: str) -> str:
    """One line without control characters."""
    return " ".join(re.sub(r"[^ -~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text).split())


def markdown_text(text: str) -> str:
    """Text that markdown shows as it is, in a paragraph or in a cell of a table."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(plain_text(text), quote=False))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers or short words; cells are escaped here."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    lines += [[markdown_text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def public_name(source: object) -> str:
    """A model or file as given, without the folders of an absolute path: a card is read on other machines."""
    return Path(str(source)).name if Path(str(source)).is_absolute() else str(source)


def images_per_model(record: dict[str, Any]) -> str:
    """How many images each model has: fewer than asked for in folders from elsewhere."""
    least, most = min(record["images"].values()), max(record["images"].values())
    return f"{counted(most, 'image')} per model" if least == most else f"{least} to {most} images per model"


def compared_sentence(record: dict[str, Any]) -> str:
    """What was compared, on which prompts, and how the images were drawn, as far as the settings tell."""
    settings = record["settings"]
    words = {"pretrained_model_name_or_path": " {}", "prompts": " of {}", "sampler": ", sampler {}"}
    words |= {"num_inference_steps": ", {} steps", "guidance_scale": ", guidance {}", "width": ", width {}"}
    words |= {"height": ", height {}", "seed": ", seed {}"}
    told = ("" if settings[key] is None else form.format(public_name(settings[key])) for key, form in words.items())
    base, source, *how = told
    counts = f"{counted(record['prompts'], 'prompt')}{source}, {images_per_model(record)}"
    if not record["drawn"]:
        return markdown_text(f"Compared on {counts}, all drawn elsewhere: {', '.join(record['images'])}.")
    here = "" if len(record["drawn"]) == len(record["images"]) else f"; drawn here: {', '.join(record['drawn'])}"
    models = f"{', '.join(record['models'])}{here}{''.join(how)}"
    return markdown_text(f"Compared with the base model{base} on {counts}: {models}.")


def card_rates(metrics: dict[str, dict]) -> str:
    """The win rates in Markdown."""
    rows = ((label, ROLES[m["role"]] or m["role"], *rate_cells(m), win_tie_lose(m)) for label, m in metrics.items())
    head = "metric", "role", "win rate", "95 % interval", "base", "tuned", "p (Holm)", "prompts"
    return markdown_table(head, rows)


def card_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown under its title; "" where there are no rows."""
    found = list(rows)
    return f"### {title}\n\n{markdown_table([*map(markdown_text, head)], found)}" if found else ""


def card_tables(record: dict[str, Any]) -> list[str]:
    """The paper's columns, the colour shift and the distances to photos of all models in Markdown."""
    models, names = record["models"], paper_columns(record["paper"])
    columns = ((model, *(number(row[name]) for name in names)) for model, row in record["paper"].items() if names)
    shifts = (
        (name, *(f"{shift_text(result['colour'], key)} {shift_span(result['colour'], key)}" for key in SHIFTS))
        for name, result in models.items()
    )
    photos = (
        (distance, number(found["floor"]), *(number(found["models"][name]) for name in ("base", *models)))
        for distance, found in record.get("realism", {}).get("distances", {}).items()
    )
    return [
        card_table("Under the paper's names", ["model", *names], columns),
        card_table("Colour shift from base, with 95 % intervals", ["model", *(s[0] for s in SHIFTS.values())], shifts),
        card_table("Distance to photos, lower is better", ["", "photos among themselves", "base", *models], photos),
    ]


def write_card(path: Path, record: dict[str, Any]) -> None:
    """model_card.md: the evaluation as a section of a model card, in Markdown, ready to paste."""
    parts = ["## Evaluation", compared_sentence(record)]
    for name, result in record["models"].items():
        headline, *others = (markdown_text(sentence) for _, sentence in result["verdict"])
        parts += [f"### {markdown_text(name)} against base", f"**{headline}**"]
        parts += ["\n".join(f"- {sentence}" for sentence in others), card_rates(result["metrics"])]
    caveats = "\n".join(f"- {markdown_text(sentence)}" for sentence in record["caveats"])
    parts += [*card_tables(record), f"### Caveats\n\n{caveats}" if caveats else ""]
    parts += [markdown_text(READING)]
    write_atomically(path, ("\n\n".join(filter(None, parts)) + "\n").encode())


def draw_rates(draw: ImageDraw.ImageDraw, top: int, title: str, metrics: dict[str, dict]) -> None:
    """One model's win rates on an axis from 0 to 100 %, from `top` downwards, in quarters of a pixel."""
    left, right, low, high = 1040, 2560, top + 280, top + 280 + 128 * len(metrics)
    font, small = ImageFont.load_default(64), ImageFont.load_default(52)
    colours = {"win": LIGHT["tuned"], "lose": LIGHT["bad"], "even": LIGHT["base"]}
    draw.text((128, top + 140), title, LIGHT["ink"], ImageFont.load_default(88), anchor="ls")
    for rate in (0, 25, 50, 75, 100):
        x = left + (right - left) * rate / 100
        draw.line((x, low, x, high), LIGHT["base" if rate == 50 else "line"], 8 if rate == 50 else 4)
        draw.text((x, low - 24), f"{rate} %", LIGHT["soft"], small, anchor="ms")
    for row, (label, m) in enumerate(metrics.items()):
        y, colour, training = low + 64 + 128 * row, colours[tone(m["interval"], p=m["holm"])], m["role"] == "training"
        name = textwrap.shorten(plain_text(label), 24, placeholder="…")
        draw.text((128, y), name, LIGHT["ink"], font, anchor="lm")
        if training:
            draw.text((128 + draw.textlength(name, font), y), "  training", LIGHT["soft"], small, anchor="lm")
        if not all_finite(m["win_rate"], *m["interval"]):
            continue
        x, start, end = (left + (right - left) * share for share in (m["win_rate"], *m["interval"]))
        draw.line((start, y, end, y), colour, 12)
        draw.ellipse((x - 26, y - 26, x + 26, y + 26), LIGHT["paper"] if training else colour, colour, 12)
        draw.text((right + 96, y), "  ".join(rate_cells(m)[:2]), LIGHT["ink"], font, anchor="lm")


def draw_win_rates(path: Path, record: dict[str, Any]) -> None:
    """win_rates.png: the tuned models' win rates with their intervals around one half, training scorers open.

    Drawn at four times the size at which it is read and saved at twice that size, so that edges are smooth.
    """
    models = record["models"]
    heights = [400 + 128 * len(result["metrics"]) for result in models.values()]
    sheet = Image.new("RGB", (3520, sum(heights) + 160), LIGHT["paper"])
    draw = ImageDraw.Draw(sheet)
    for i, (name, result) in enumerate(models.items()):
        draw_rates(draw, sum(heights[:i]), f"{name} against base", result["metrics"])
    told = f"Win rate over {counted(record['prompts'], 'prompt')} with 95 % intervals. Open dots: the training scorer."
    draw.text((128, sheet.height - 100), told, LIGHT["soft"], ImageFont.load_default(52), anchor="ls")
    write_atomically(path, png(sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)))


def grid_tile(path: Path | None, side: int) -> Image.Image:
    """An image within (side, 2 side) pixels; a grey square for None."""
    if path is None:
        return Image.new("RGB", (side, side), LIGHT["card"])
    return ImageOps.contain(load_images([path])[0], (side, 2 * side))


def write_grid(
    path: Path, pictures: dict[str, list[Path | None]], seed: int, columns: int = 8, side: int = 192
) -> None:
    """grid.png: a row per model, base above; the prompts of the columns are chosen by seed."""
    prompts = len(next(iter(pictures.values())))
    chosen = sorted(np.random.default_rng(seed).permutation(prompts)[:columns].tolist())
    rows = {name: [grid_tile(paths[p], side) for p in chosen] for name, paths in pictures.items()}
    height, gap, margin = max(tile.height for tiles in rows.values() for tile in tiles), 8, 34
    size = gap + len(chosen) * (side + gap), len(rows) * (height + margin) + gap
    sheet, font = Image.new("RGB", size, LIGHT["paper"]), ImageFont.load_default(18)
    for i, (name, tiles) in enumerate(rows.items()):
        top = i * (height + margin)
        ImageDraw.Draw(sheet).text((gap, top + 8), name, LIGHT["ink"], font)
        for j, tile in enumerate(tiles):
            sheet.paste(tile, (gap + j * (side + gap) + (side - tile.width) // 2, top + margin))
    write_atomically(path, png(sheet))


def peak_memory() -> str:
    """The most host memory this process has held, and the most device memory where there is one."""
    parts = []
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory")
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        parts.append(f"{peak / 2**30:.1f} GiB of host memory")
    return ", ".join(parts) or "not known"


# ---- Human votes ---------------------------------------------------------------------------------------------------
# The paper's user study: a blind page for raters, the key to it, and what their votes say. A tie is allowed: between
# images that look alike a forced choice is a coin's noise, which widens the intervals and hides that nothing changed.

QUESTIONS = {"realism": "Which image is more realistic?", "alignment": "Which image fits the text better?"}
FINDINGS = {"realism": "more realistic", "alignment": "closer to the text"}
ANSWERS = ("left", "tie", "right")
STUDY_KEY = "user_study_key.json"

STUDY_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline'">
<title>Which image is better?</title>
<style>
:root{color-scheme:light dark;--paper:#fff;--card:#f3f5f5;--ink:#1f2529;--soft:#5f6a73;--line:#dfe4e6;--plain:#2c6e91}
@media(prefers-color-scheme:dark){:root{--paper:#15191c;--card:#1f262a;--ink:#e4e8ea;--soft:#98a4ac;--line:#30393e;
 --plain:#6fb3d6}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{max-width:920px;margin:0 auto;padding:20px 28px 32px;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums;
 overflow-wrap:anywhere}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:7vh 0 16px}
p{margin:0 0 14px;max-width:60ch}.soft,legend,label,#place{color:var(--soft);font-size:15px}
button,input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:10px;
 padding:9px 18px;min-height:48px}
button{cursor:pointer;touch-action:manipulation}button:hover:enabled{border-color:var(--soft)}
button:disabled{opacity:.4;cursor:default}
:focus-visible{outline:2px solid var(--plain);outline-offset:2px}section:focus{outline:0}
.main,button[aria-pressed=true]{background:var(--plain);border-color:var(--plain);color:var(--paper);font-weight:600}
label{display:block;margin:26px 0}label input{display:block;width:100%;max-width:340px;margin-top:6px;color:var(--ink)}
header{display:flex;align-items:center;gap:14px}header button{min-height:44px;font-size:15px;padding:5px 16px}
progress{flex:1;min-width:0;height:6px;appearance:none;border:0;border-radius:3px;overflow:hidden}
progress,::-webkit-progress-bar{background:var(--line)}
::-webkit-progress-value{background:var(--plain)}::-moz-progress-bar{background:var(--plain)}
#ask{display:flex;flex-direction:column}
blockquote{margin:16px 0;min-height:2.8em;font-size:19px;line-height:1.4;white-space:pre-wrap}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:16px}.pair :first-child{justify-self:end}
.pair button{width:min(100%,52vh*var(--shape));padding:0;border:0;overflow:hidden;cursor:zoom-in}
img{display:block;width:100%}.tiny img{image-rendering:pixelated}
fieldset{border:0;margin:16px 0 0;padding:0;min-width:0}
legend{padding:0;margin-bottom:6px}.now legend{color:var(--ink);font-weight:600}
fieldset div{display:grid;grid-template-columns:1fr 1fr 1fr;gap:10px}fieldset button{padding:4px}
.now button:not([aria-pressed=true]){border-color:var(--plain)}
kbd{font:inherit;font-size:13px;border:1px solid var(--line);border-radius:4px;padding:0 6px;background:var(--card)}
dialog{width:100vw;height:100dvh;max-width:none;max-height:none;padding:0;border:0;background:#000;color:#fff}
dialog img{height:100%;object-fit:contain}dialog p{left:14px;padding:12px 16px;line-height:24px}
dialog p,dialog button{position:absolute;top:12px;margin:0;border-radius:10px;background:#000b}
dialog button{right:14px;border-color:#fff6}
#keys{max-width:none;margin:24px 0 0}#told:empty{display:none}
#said{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media(max-width:600px){body{padding:12px 12px 20px}.pair,fieldset div{gap:6px}blockquote{font-size:17px;margin:12px 0}
 header{gap:10px}fieldset button{font-size:15px}#ask{min-height:calc(100dvh - 80px)}#questions{margin-top:auto}}
@media(pointer:coarse){.keys{display:none}}
</style>
</head>
<body>
<header id="bar" hidden><button id="back" aria-label="One step back">←</button>
<progress id="done" aria-label="Pairs answered"></progress><span id="place"></span>
<button class="save">Save votes</button></header>
<main>
<section id="start"><h1>Which image is better?</h1><p id="about"></p>
<p>Answer by your first impression, and “no difference” where you see none. An image opens when you click or tap it;
once more, and the other one takes its place.</p>
<form id="form"><label>Your name, or a word that stands for you (optional)
<input id="rater" maxlength="40" autocomplete="off" spellcheck="false"></label>
<button class="main">Start</button></form></section>
<section id="ask" tabindex="-1" aria-label="A pair of images" hidden><blockquote id="prompt"></blockquote>
<div class="pair"><button id="left" aria-label="Enlarge the left image"><img alt="Left image"></button>
<button id="right" aria-label="Enlarge the right image"><img alt="Right image"></button></div>
<div id="questions"></div></section>
<section id="end" tabindex="-1" hidden><h1>Thank you.</h1>
<p>All pairs are answered. Save the votes and send the file to whoever asked you; nothing has left this browser.</p>
<p><button class="save main">Save votes</button></p>
<p><button id="other">Let another person vote</button></p></section>
<p class="soft keys" id="keys"><kbd>1</kbd> left, <kbd>2</kbd> no difference, <kbd>3</kbd> right; <kbd>←</kbd> or
<kbd>Backspace</kbd> back, <kbd>→</kbd> forward; <kbd>Z</kbd> opens an image, <kbd>Esc</kbd> closes it.</p>
<p id="told" role="alert"></p><p id="said" role="status"></p>
</main>
<dialog id="large" aria-label="One image, enlarged"><img alt=""><p></p><button>Close</button></dialog>
<script type="application/json" id="data">@DATA@</script>
<script>
const $ = id => document.getElementById(id), {study, questions, pairs} = JSON.parse($("data").textContent);
const answers = {left: "Left", tie: "No difference", right: "Right"}, names = Object.keys(questions);
const steps = pairs.length * names.length, large = $("large"), [view, label] = large.children;
const make = (tag, props, ...inside) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...inside);
  return node;
};
let shown, since, due;  // the pair on screen, when it came (less the time spent on it before), when it may be answered
const order = pairs.map(pair => [Math.random(), pair.id]).sort().map(([, id]) => id);
let state = {rater: "", order, votes: {}, at: -1};  // all that is kept; `at` is the step: a question of a pair
try { state = JSON.parse(localStorage.getItem(study)) ?? state; } catch {}

const pairAt = step => pairs.find(pair => pair.id === state.order[Math.floor(step / names.length)]);
const voteOf = pair => state.votes[pair.id] ?? {};
const complete = pair => names.every(name => voteOf(pair)[name]);

function present(pair) {
  for (const side of ["left", "right"]) $(side).firstChild.src = pair[side];
  $("prompt").textContent = pair.prompt;
  $("ask").style.setProperty("--shape", pair.shape);
  document.body.classList.toggle("tiny", pair.tiny);
  since = performance.now() - 1000 * (voteOf(pair).seconds ?? 0);
  due = performance.now() + 150;  // until then a click is the second one of a double click on the pair before
  shown = pair;
}

function draw() {
  const {at} = state, done = pairs.filter(complete).length, pair = at >= 0 && at < steps ? pairAt(at) : undefined;
  const hidden = {bar: at < 0, start: at >= 0, ask: !pair, end: at < steps, keys: at === steps};
  for (const id in hidden) $(id).hidden = hidden[id];
  Object.assign($("done"), {max: pairs.length, value: done});
  $("place").textContent = `${done} / ${pairs.length}`;
  $("back").disabled = at === 0;
  if (pair && pair !== shown) present(pair);
  document.querySelectorAll("fieldset").forEach((field, i) => {
    field.classList.toggle("now", i === at % names.length);
    for (const button of field.querySelectorAll("button"))
      button.setAttribute("aria-pressed", !!pair && voteOf(pair)[names[i]] === button.value);
  });
  const place = Math.floor(at / names.length) + 1;
  $("said").textContent = pair ? `Pair ${place}: ${questions[names[at % names.length]]}` : "";
}

function go(step) {
  state.at = Math.max(0, Math.min(steps, step));
  try { localStorage.setItem(study, JSON.stringify(state)); } catch {
    $("told").textContent = "This browser keeps nothing: save the votes before you close the page.";
  }
  draw();
  if (state.at === steps) $("end").focus();
}

function answer(name, value) {
  if (performance.now() < due) return;
  const first = state.at - state.at % names.length, fresh = !complete(shown);
  const vote = {...voteOf(shown), [name]: value, seconds: Math.round(performance.now() - since) / 1000};
  state.votes[shown.id] = vote;
  const open = names.findIndex(other => !vote[other]);
  go(open >= 0 ? first + open : fresh ? first + names.length : first + names.indexOf(name) + 1);
}

function enlarge(side) {
  Object.assign(view, {src: shown[side], alt: `${answers[side]} image`});
  label.textContent = answers[large.dataset.side = side];
  if (!large.open) large.showModal();
}

function save() {
  const votes = Object.entries(state.votes).map(([pair, vote]) => ({pair, ...vote}));
  const text = JSON.stringify({study, rater: state.rater, votes}, null, 1);
  const href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  const download = `votes-${state.rater.replace(/[^\p{L}\p{N}-]+/gu, "_")}.json`;
  make("a", {href, download}).click();
  $("told").textContent = `${votes.length} of ${pairs.length} pairs are in ${download}.`;
}

const back = () => go(state.at - 1), flip = () => enlarge(large.dataset.side === "left" ? "right" : "left");
const forward = () => { if (state.at < steps && voteOf(shown)[names[state.at % names.length]]) go(state.at + 1); };
const choose = value => () => { if (state.at < steps) answer(names[state.at % names.length], value); };
const keys = {1: choose("left"), 2: choose("tie"), 3: choose("right"), arrowleft: back, backspace: back,
  arrowright: forward, z: () => { if (state.at < steps) enlarge("left"); }};
document.onkeydown = event => {
  const key = event.key.toLowerCase(), other = event.altKey || event.ctrlKey || event.metaKey || event.repeat;
  if (state.at < 0 || other || !(key in keys)) return;
  event.preventDefault();
  if (!large.open) keys[key](); else if (key.startsWith("arrow")) flip();
};
for (const name of names) {
  const button = value => make("button", {value, onclick: () => answer(name, value)}, answers[value]);
  const row = make("div", {}, ...Object.keys(answers).map(button));
  $("questions").append(make("fieldset", {}, make("legend", {}, questions[name]), row));
}
for (const side of ["left", "right"]) $(side).onclick = () => enlarge(side);
for (const button of document.querySelectorAll(".save")) button.onclick = save;
view.onclick = flip;
large.lastChild.onclick = () => large.close();
$("back").onclick = back;
$("other").onclick = () => {
  if (!confirm("Are your votes saved? They are removed from this browser.")) return;
  localStorage.removeItem(study);
  location.reload();
};
$("form").onsubmit = event => {
  event.preventDefault();
  state.rater = $("rater").value.trim() || `rater-${Math.random().toString(36).slice(2, 8)}`;
  go(0);
  $("ask").focus();
};
$("about").textContent = `You will see ${pairs.length} pairs of images, each with the text it was made from, and `
  + `answer two questions on each. It takes about ${Math.ceil(pairs.length / 5)} min; you can stop and go on later.`;
draw();
</script>
</body>
</html>
"""


def choose_pairs(
    available: dict[str, list[int]], prompt_ids: np.ndarray, count: int, rng: np.random.Generator
) -> list[tuple[str, str, int]]:
    """At most `count` random (left model, right model, row) of {tuned model: rows where base has an image too}.

    The models share the pairs evenly, and each is left as often as right. Every prompt comes once before one comes
    twice, and every row before one comes for a second model: who sees an image twice knows that it is base's.
    """
    by_prompt: dict[int, list[int]] = {}
    for row in rng.permutation(len(prompt_ids)).tolist():
        by_prompt.setdefault(int(prompt_ids[row]), []).append(row)
    order = [row for turn in zip_longest(*by_prompt.values()) for row in turn if row is not None]
    models, chosen = len(available), []
    for m, (name, there) in enumerate((name, set(rows)) for name, rows in available.items()):
        dealt = (row for lap in range(models) for row in order[(m - lap) % models :: models] if row in there)
        rows = list(islice(dealt, count // models + (m < count % models)))
        coins = rng.permutation(len(rows)) % 2
        chosen += [(name, "base", row) if coin else ("base", name, row) for row, coin in zip(rows, coins, strict=True)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def blind_pair(left: Path, right: Path, side: int = 768) -> dict[str, Any]:
    """Two images as data URIs that differ in their pixels alone, their width by height, and whether they are tiny.

    Both get the longest side of the smaller one, at most `side` pixels, and one codec: JPEG, or PNG if tiny.
    """
    images, uris = load_images([left, right]), []
    side = min(side, *(max(image.size) for image in images))
    kind = "png" if side <= 128 else "jpeg"
    for image in images:
        size, buffer = [max(1, round(edge * side / max(image.size))) for edge in image.size], io.BytesIO()
        image = image.resize(size, Image.Resampling.LANCZOS)
        image.info = {}  # a comment or a colour profile would be written too
        image.save(buffer, kind, quality=90)
        uris.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return {"left": uris[0], "right": uris[1], "shape": round(size[0] / size[1], 3), "tiny": kind == "png"}


def write_user_study(
    folder: Path,
    count: int,
    prompts: list[str],
    paths: dict[str, list[Path | None]],
    plan: list[tuple[int, int]],
    seed: int,
) -> int:
    """Writes user_study.html, a blind page with `count` pairs of base and a tuned model, and user_study_key.json.

    `paths` holds the image of every row of the plan for every model, base among them, None where there is none. The
    page tells nothing of the models; the key does, and is not for raters. An earlier study's key is kept under another
    name. Returns the number of pairs, which is smaller where there are no more. UserError where there is none.
    """
    both = {
        name: [row for row, two in enumerate(zip(paths["base"], images, strict=True)) if all(two)]
        for name, images in paths.items()
        if name != "base"
    }
    pairs = choose_pairs(both, np.array([p for p, _ in plan]), count, np.random.default_rng(seed))
    if not pairs:
        raise UserError("--user_study: no prompt has an image of base and one of a tuned model")
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda pair: blind_pair(*(paths[name][pair[2]] for name in pair[:2])), pairs))
    shown, key = [], {}
    for i, ((left, right, row), image) in enumerate(zip(pairs, images, strict=True), 1):
        (p, k), files = plan[row], {side: fingerprint([paths[side][row]]) for side in (left, right)}
        shown.append({"id": str(i), "prompt": prompts[p], **image})
        key[str(i)] = {"prompt_id": p, "index": k, "prompt": prompts[p], "left": left, "right": right, "files": files}
    study = hashlib.sha256(json.dumps([shown, key]).encode()).hexdigest()[:16]
    content = json.dumps({"study": study, "questions": QUESTIONS, "pairs": shown}).replace("<", "\\u003c")
    keep_other_key(folder / STUDY_KEY, study)
    write_atomically(folder / STUDY_KEY, json.dumps({"study": study, "pairs": key}, indent=1).encode())
    write_atomically(folder / "user_study.html", STUDY_PAGE.replace("@DATA@", content).encode())
    return len(pairs)


def other_key(path: Path, study: Any) -> Path:
    """Where the key of an earlier study is kept, when a later one takes its place at `path`."""
    return path.with_name(re.sub(r"\W", "_", f"{path.stem}_{study}") + path.suffix)


def keep_other_key(path: Path, study: str) -> None:
    """Renames the key of another study that stands at `path`: without it the votes on that study would be lost."""
    if path.is_file() and (old := read_object(path).get("study")) != study:
        os.replace(path, other_key(path, old))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a json file; UserError with the line where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not json ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not utf-8"
        raise UserError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} in place of an object")
    return content


def read_votes(files: Sequence[str], folder: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """All votes in `files`, which the page saved, joined with the key in `folder`: a row per rater and pair.

    {"rater", "pair", "prompt_id", "index", "model": the tuned one, "tuned_side": "left" | "right", "seconds": float or
    None, and for each of QUESTIONS "left" | "tie" | "right" or None, not answered}. The key's prompts have to be those
    of this run. UserError: one line with the file and the place.
    """
    path, raters, votes = folder / STUDY_KEY, {}, []
    if not path.is_file():
        raise UserError(f"--votes: {path} is missing: --user_study writes it, together with the page to vote on")
    key = read_object(path)
    if not key.keys() >= {"study", "pairs"}:
        raise UserError(f"{path} is not the key of a user study: --user_study writes it anew")
    for pair, row in key["pairs"].items():
        if row["prompt_id"] >= len(prompts) or prompts[row["prompt_id"]] != row["prompt"]:
            raise UserError(f"--votes: pair {pair} of {path} shows another prompt than now: give --prompts as it was")
    for file in files:
        rater, found = read_votes_file(Path(file), key, path)
        if rater in raters:
            told = "keep the later one, which has all answers; if they are two people, rename one in its file"
            raise UserError(f"{file}: {raters[rater]} holds votes of the same rater, {rater!r}: {told}")
        raters[rater] = file
        votes += found
    if not votes:
        raise UserError(f"--votes: no answers in {', '.join(files)}")
    return votes


def check_study_images(folder: Path, paths: dict[str, list[Path | None]], plan: list[tuple[int, int]]) -> None:
    """UserError where an image that people voted on is another one now; models that are left out now do not count."""
    rows = {place: row for row, place in enumerate(plan)}
    for pair, shown in read_object(folder / STUDY_KEY)["pairs"].items():
        row = rows.get((shown["prompt_id"], shown["index"]))
        for name, known in shown.get("files", {}).items():
            file = paths[name][row] if name in paths and row is not None else None
            if file and fingerprint([file]) != known:
                raise UserError(
                    f"--votes: {file} was drawn anew since people voted on pair {pair}: ask them once more"
                )


def read_votes_file(path: Path, key: dict[str, Any], key_file: Path) -> tuple[str, list[dict[str, Any]]]:
    """The rater and the votes of one file, joined with the key; UserError as in read_votes."""
    content, votes, seen = read_object(path), [], set()
    study, rater, rows = content.get("study"), content.get("rater"), content.get("votes")
    if not (isinstance(rater, str) and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UserError(f"{path} is not a file of votes: it needs study, rater and votes, as the page saves them")
    if study != key["study"]:
        kept = other_key(key_file, study)
        told = f"{kept} is its key: put it back under that name" if kept.is_file() else "give the folder of its page"
        raise UserError(f"{path}: votes on study {study!r}, and {key_file} is the key of {key['study']!r}: {told}")
    for number, row in enumerate(rows, 1):
        pair, place = row.get("pair"), f"{path}, vote {number}"
        if not isinstance(pair, str) or pair not in key["pairs"]:
            raise UserError(f"{place}: the study has no pair {pair!r}")
        if pair in seen:
            raise UserError(f"{place}: a second vote on pair {pair!r}")
        seen.add(pair)
        votes.append({"rater": rater, "pair": pair, **join_vote(row, key["pairs"][pair], place)})
    return rater, [vote for vote in votes if any(vote[question] for question in QUESTIONS)]


def join_vote(row: dict[str, Any], sides: dict[str, Any], place: str) -> dict[str, Any]:
    """What a vote says, of the pair that the key describes; UserError with its place for an unknown answer."""
    for question in QUESTIONS:
        if row.get(question) not in (*ANSWERS, None):
            raise UserError(f"{place}: {question} is {row[question]!r}, not one of {', '.join(ANSWERS)}")
    seconds = row.get("seconds")
    if not isinstance(seconds, int | float | None):
        raise UserError(f"{place}: seconds is {seconds!r}, not a number")
    side = "right" if sides["left"] == "base" else "left"
    joined = {"prompt_id": sides["prompt_id"], "index": sides["index"], "model": sides[side], "tuned_side": side}
    return joined | {"seconds": seconds} | {question: row.get(question) for question in QUESTIONS}


def votes_for_tuned(votes: list[dict[str, Any]], question: str) -> np.ndarray:
    """1 where the tuned image was chosen, 1/2 where no difference was seen, 0 where base's was: answers -> (V,)."""
    points = [0.5 if vote[question] == "tie" else vote[question] == vote["tuned_side"] for vote in votes]
    return np.array(points, float)


def known_shares(values: np.ndarray, prompt_ids: np.ndarray) -> np.ndarray:
    """The mean of every prompt that has one: values (V,), prompt numbers (V,) -> (P or fewer,)."""
    shares = per_prompt(values, prompt_ids)
    return shares[~np.isnan(shares)]


def compare_answers(votes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the votes on one tuned model say to each question. The prompt is the unit: its votes are averaged first."""
    rows = {}
    for question in QUESTIONS:
        answered = [vote for vote in votes if vote[question]]
        if not answered:
            continue
        worth, prompt_ids = votes_for_tuned(answered, question), np.array([vote["prompt_id"] for vote in answered])
        shares = known_shares(worth, prompt_ids)
        rows[question] = {
            "raters": len({vote["rater"] for vote in answered}),
            "votes": len(answered),
            "prompts": len(shares),
            "win_rate": mean(shares),
            "interval": win_interval(shares),
            **{
                outcome: mean(known_shares((worth == value).astype(float), prompt_ids))
                for outcome, value in (("win", 1), ("tie", 0.5), ("lose", 0))
            },
            "sign_test": sign_test(shares, np.full(len(shares), 0.5)),
        }
    for row, p in zip(rows.values(), holm([row["sign_test"] for row in rows.values()]), strict=True):
        row["holm"] = p
    return rows


def compare_raters(votes: list[dict[str, Any]], question: str) -> dict[str, Any]:
    """How far the raters agree with each other on one question, by what they saw: left, right or no difference.

    By sides, and not by models: each model is left as often as right, so that chance agreement stays the same
    however often one of them wins. `left` is the share of left among left and right; far from 1/2, look at the raters.
    """
    answered = [vote for vote in votes if vote[question]]
    pairs = {pair: i for i, pair in enumerate(dict.fromkeys(vote["pair"] for vote in answered))}
    counts = np.zeros((len(pairs), len(ANSWERS)))
    for vote in answered:
        counts[pairs[vote["pair"]], ANSWERS.index(vote[question])] += 1
    sides = counts[:, [0, 2]].sum(axis=0)
    return {
        "pairs": int((counts.sum(axis=1) > 1).sum()),
        "agreement": rater_agreement(counts),
        "alpha": krippendorff_alpha(counts),
        "left": float(sides[0] / sides.sum()) if sides.any() else math.nan,
    }


def compare_scorers(
    votes: list[dict[str, Any]],
    question: str,
    values: dict[str, dict[str, np.ndarray]],
    plan: list[tuple[int, int]],
    labels: list[str],
) -> dict[str, dict[str, Any]]:
    """Share of the pairs on which each scorer prefers the image that most raters prefer, with its interval.

    A prompt counts once, as everywhere. Pairs that are not among the images of this run are left out.
    """
    rows = {place: row for row, place in enumerate(plan)}
    votes = [v for v in votes if v[question] and v["model"] in values and (v["prompt_id"], v["index"]) in rows]
    if not votes:
        return {}
    pairs = {vote["pair"]: vote for vote in votes}
    numbers = {pair: number for number, pair in enumerate(pairs)}
    people = per_prompt(votes_for_tuned(votes, question), np.array([numbers[vote["pair"]] for vote in votes]))
    places = [(vote["model"], rows[vote["prompt_id"], vote["index"]]) for vote in pairs.values()]
    prompt_ids, found = np.array([plan[row][0] for _, row in places]), {}
    for label in labels:
        base = np.array([values["base"][label][row] for _, row in places])
        tuned = np.array([values[name][label][row] for name, row in places])
        agrees = agrees_with_people(people, base, tuned)
        shares, judged = known_shares(agrees, prompt_ids), int(np.isfinite(agrees).sum())
        found[label] = {"pairs": judged, "agreement": mean(shares), "interval": win_interval(shares)}
    return found


def compare_votes(
    votes: list[dict[str, Any]],
    values: dict[str, dict[str, np.ndarray]],
    plan: list[tuple[int, int]],
    labels: list[str],
) -> dict[str, Any]:
    """What people say, as plain values: votes of read_votes, and the scores {model: {label: (N,)}} of the plan's rows.

    {"raters", "pairs", "votes", "seconds": median per pair, "models": {tuned model: compare_answers}, "agreement":
    {question: compare_raters}, "scorers": {question: compare_scorers}, "closest": {question: the label of the scorer
    that agrees most}}; what is not known is None, as the agreement of a single rater.
    """
    named = {vote["model"] for vote in votes}
    names = [*(name for name in values if name in named), *sorted(named - values.keys())]
    seconds = [vote["seconds"] for vote in votes if vote["seconds"] is not None]
    scorers = {question: compare_scorers(votes, question, values, plan, labels) for question in QUESTIONS}
    rates = {q: {name: row["agreement"] for name, row in rows.items() if row["pairs"]} for q, rows in scorers.items()}
    return plain(
        {
            "raters": len({vote["rater"] for vote in votes}),
            "pairs": len({vote["pair"] for vote in votes}),
            "votes": len(votes),
            "seconds": float(np.median(seconds)) if seconds else None,
            "models": {name: compare_answers([vote for vote in votes if vote["model"] == name]) for name in names},
            "agreement": {question: compare_raters(votes, question) for question in QUESTIONS},
            "scorers": scorers,
            "closest": {q: max(found, key=found.get, default=None) for q, found in rates.items()},
        }
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 rater, 3 raters."""
    return f"{number} {noun}{'s' * (number != 1)}"


def votes_finding(name: str, question: str, row: dict[str, Any]) -> tuple[str, str]:
    """What people say to one question about one tuned model: a tone ("good", "bad" or "plain") and a sentence."""
    finding, rate = FINDINGS[question], row["win_rate"]
    prompts = counted(row["prompts"], "prompt")
    told = f"{name} wins {percent(rate)} of {prompts} {span(row['interval'], 100)}, p = {row['holm']:.2g}."
    if row["holm"] >= 0.05 or rate == 0.5:
        return "plain", f"People do not settle whether {name} or base is {finding}: {told}"
    better, worse = (name, "base") if rate > 0.5 else ("base", name)
    return ("good" if rate > 0.5 else "bad"), f"People find {better} {finding} than {worse}: {told}"


def agreement_sentence(votes: dict[str, Any]) -> str:
    """How far raters agree with each other, in one sentence; says so where no two of them met."""
    told = [
        f"{percent(row['agreement'])} of the time on what is {FINDINGS[question]}"
        + (f" (Krippendorff's alpha {row['alpha']:.2f})" if row["alpha"] is not None else "")
        for question, row in votes["agreement"].items()
        if row["agreement"] is not None
    ]
    return (
        f"Two raters agree {', '.join(told)}." if told else "No pair has two raters, so their agreement is not known."
    )


def votes_table(votes: dict[str, Any]) -> str:
    """The table of what people chose, a row per tuned model and question."""
    rows = []
    for name, found in votes["models"].items():
        for question, row in found.items():
            figures = percent(row["win_rate"]), span(row["interval"], 100), str(row["prompts"]), str(row["votes"])
            rows.append((f"{html.escape(name)}: {FINDINGS[question]}", whisker(row), *figures, p_value(row["holm"])))
    return table(("Which image is", AXIS, "win rate", "95 % interval", "prompts", "votes", "p (Holm)"), rows)


def scorers_table(votes: dict[str, Any]) -> str:
    """The table of how far each scorer agrees with people, a row per question and scorer, the closest in bold."""
    rows = []
    for question, found in votes["scorers"].items():
        for label, row in sorted(found.items(), key=lambda item: -(item[1]["agreement"] or 0)):
            if row["pairs"]:
                name = f"<b>{html.escape(label)}</b>" if label == votes["closest"][question] else html.escape(label)
                plot = whisker({"win_rate": row["agreement"], "interval": row["interval"]})
                figures = percent(row["agreement"]), span(row["interval"], 100), str(row["pairs"])
                rows.append((f"{name}<small>{FINDINGS[question]}</small>", plot, *figures))
    return table(("ScorerSpec", AXIS, "agrees with people", "95 % interval", "pairs"), rows)


def votes_section(votes: dict[str, Any]) -> str:
    """The report's section on the votes of compare_votes, as HTML."""
    findings = (
        votes_finding(name, question, row)
        for name, found in votes["models"].items()
        for question, row in found.items()
    )
    said = "".join(f'<p class="said {kind}">{html.escape(sentence)}</p>' for kind, sentence in findings)
    scorers = ""
    if any(votes["closest"].values()):
        scorers = f"""<h3>Do the scorers see what people see?</h3><p class="soft">Share of the pairs on which a scorer
prefers the image that most raters prefer; a coin: 50 %. Pairs on which the votes are split in halves are left
out.</p>{scorers_table(votes)}"""
    left = " and ".join(percent(row["left"]) for row in votes["agreement"].values() if row["left"] is not None)
    spent = f", {votes['seconds']:.0f} seconds on each (median)" if votes["seconds"] is not None else ""
    return f"""{said}<p class="soft">{counted(votes["raters"], "rater")} saw
{counted(votes["pairs"], "pair")}{spent}, blind, each model as often left as right; the left image got {left or "none"}
of the choices. {agreement_sentence(votes)} The prompt is the unit: all votes on a prompt are averaged first, no
difference as one half.</p>{votes_table(votes)}{scorers}"""


def print_votes(votes: dict[str, Any]) -> None:
    """The votes of compare_votes in a few lines."""
    print(f"\nvotes of {counted(votes['raters'], 'rater')} on {counted(votes['pairs'], 'pair')}")
    for name, found in votes["models"].items():
        for question, row in found.items():
            print(f"  {votes_finding(name, question, row)[1]}")
    print(f"  {agreement_sentence(votes)}")
    for question, label in votes["closest"].items():
        if label:
            row = votes["scorers"][question][label]
            told = f"{percent(row['agreement'])} of {counted(row['pairs'], 'pair')} {span(row['interval'], 100)}"
            print(f"  {label} agrees most with people on what is {FINDINGS[question]}: {told}; a coin: 50 %")


# ---- Main ----------------------------------------------------------------------------------------------------------


def start_processes() -> PartialState:
    """This process's place among those that `accelerate launch` started, on its GPU if there is one."""
    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # a process may wait long for the slowest one's images


def progress(total: int, state: PartialState, what: str, unit: str) -> tqdm:
    """A bar for this process's share of the work; only the main process shows its own."""
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    hidden = not (total and state.is_main_process)
    return tqdm(total=total, desc=what + share, unit=unit, smoothing=0.1, disable=hidden)


@contextlib.contextmanager
def memory_told(batch_size: int) -> Iterator[None]:
    """Says what to do where a device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: set --batch_size below {batch_size}; what is finished is kept") from error


def plan_images(prompts: int, num_images_per_prompt: int, diversity_prompts: int) -> list[tuple[int, int]]:
    """(prompt, index) of every image; the first `diversity_prompts` prompts get two at least, to be compared."""
    counts = [max(num_images_per_prompt, 2 if p < diversity_prompts else 1) for p in range(prompts)]
    return [(p, k) for p, count in enumerate(counts) for k in range(count)]


def try_measures(args: argparse.Namespace, state: PartialState, prompt: str) -> None:
    """Loads every measure and lets it look at a grey image: what cannot work is told before hours of drawing.

    Scores in a file know no such image.
    """
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    measures = [measure for measure in all_measures(args, image.size) if ".jsonl" not in measure.source]
    if not (args.diversity_prompts or args.num_images_per_prompt > 1 or args.real_data_dir):
        measures = [measure for measure in measures if measure.label != "features"]  # nothing needs them
    hidden = not state.is_main_process
    for measure in tqdm(measures, desc="trying what measures", unit="measure", leave=False, disable=hidden):
        found = measure.load(state.device)([image], [prompt])
        if len(found) != 1:
            raise UserError(f"{measure.label} gave {len(found)} results for one image")


def generate(args: argparse.Namespace, state: PartialState, prompts: list[str], plan: list[tuple[int, int]]) -> None:
    """Draws every image that is not there yet, base first; each process draws its share of every model's."""
    output, drawn = Path(args.output_dir), [model for model in args.models if model.drawn]
    if state.is_main_process:
        for model in drawn:
            open_image_folder(output / "images" / model.name, image_settings(args, model), prompts, args.overwrite)
    state.wait_for_everyone()
    seeds = {(p, k): image_seed(args.seed, prompts[p], k) for p, k in plan}
    share, todo = plan[state.process_index :: state.num_processes], {}
    for model in drawn:
        files = {(p, k): image_file(output, model, p, k) for p, k in share}
        todo[model] = [row for row in share if not is_finished(files[row], seeds[row])]
    todo = {model: rows for model, rows in todo.items() if rows}
    pipe = load_pipeline(args, state.device) if todo else None
    if todo and args.num_inference_steps > (most := pipe.scheduler.config.num_train_timesteps):
        raise UserError(f"--num_inference_steps {args.num_inference_steps}: the model has {most} timesteps")
    guided = args.guidance_scale > 1
    for model in todo:  # what cannot be loaded is told before anything is drawn
        with drawing(pipe, model, args.identity, guided):
            pass
    for model, rows in todo.items():
        with (
            drawing(pipe, model, args.identity, guided) as person,
            memory_told(args.batch_size),
            progress(len(rows), state, f"images of {model.name}", "img") as bar,
        ):
            for batch in in_batches(rows, args.batch_size):
                texts = [prompts[p] for p, _ in batch]
                embeds, window = condition(pipe, model, texts, args.negative_prompt, args.num_inference_steps)
                size = (args.num_inference_steps, args.guidance_scale, args.height, args.width)
                images, latents = draw_batch(
                    pipe, embeds, range(len(batch)), [seeds[row] for row in batch], *size, **person, **window
                )
                if not latents.isfinite().all():
                    raise UserError(f"{model.name} draws images that are not finite: try another --mixed_precision")
                for row, image, latent in zip(batch, images, latents.double().flatten(2), strict=True):
                    statistics = {"latent_mean": latent.mean(-1), "latent_std": latent.std(-1, correction=0)}
                    told = {key: json.dumps(value.tolist()) for key, value in statistics.items()}
                    told |= {"prompt": prompts[row[0]], "seed": str(seeds[row])}
                    write_atomically(image_file(output, model, *row), png(image, **told))
                bar.update(len(batch))
    state.wait_for_everyone()


def conclude(
    args: argparse.Namespace,
    prompts: list[str],
    prompt_ids: np.ndarray,
    values: dict[str, dict[str, np.ndarray]],
    photos: dict[str, np.ndarray],
    training: list[str],
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """All that is found, for metrics.json, and every measure's means over the images of each prompt."""
    labels = [scorer.label for scorer in args.scorers]
    average = partial(per_prompt_means, scorers=labels, prompt_ids=prompt_ids, threshold=args.face_threshold)
    means, shared = average(values), average(only_shared(values))
    roles = metric_roles(args.scorers, training, bool(args.reference_faces))
    groups = group_prompts(args, prompts)
    realism = measure_realism(values, photos, prompt_ids, args.seed)

    models = {}
    for model in args.models[1:]:
        pair = only_shared({name: values[name] for name in ("base", model.name)})
        base, tuned = average(pair).values()
        metrics = compare_metrics(base, tuned, roles)
        colours = (found | colour_columns(found) for found in pair.values())
        shown = [label for label, row in metrics.items() if row["role"] == "training"]
        found: dict[str, Any] = {
            "metrics": metrics,
            "colour": compare_colour(*colours, prompt_ids),
            "realism": {kind: moves[model.name] for kind, (_, moves) in realism.items()},
            "groups": compare_groups(base, tuned, [leading_metric(metrics), *shown], groups),
        }
        sure = {kind: row for kind, row in found["realism"].items() if not realism[kind][0]["note"]}
        found["verdict"] = verdict(model.name, metrics, found["colour"], sure, found["groups"])
        found["checkpoint"] = model.checkpoint and dict(zip(("of", "step"), model.checkpoint, strict=True))
        models[model.name] = found

    averages = {name: {label: mean(column) for label, column in found.items()} for name, found in shared.items()}
    for name, found in shared.items():
        averages[name]["hue"] = circular_mean(found["hue"])
    distances = {kind: distance for kind, (distance, _) in realism.items()}
    record = {"means": averages, "models": models, "paper": paper_rows(args.scorers, averages, models, distances)}
    if photos:
        record["realism"] = {
            "photos": len(photos["colour"]),
            "images": max(row["images"] for row in distances.values()),
            "distances": distances,
        }
        record["photos_colour"] = colour_against_photos(values, shared, photos, prompt_ids)
    if args.reference_faces:
        record["identity"] = {name: summarise_identity(values[name], means[name]) for name in values}
    return record, means


def colour_against_photos(
    values: dict[str, dict[str, np.ndarray]],
    means: dict[str, dict[str, np.ndarray]],
    photos: dict[str, np.ndarray],
    prompt_ids: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """compare_with_photos of every model, latents included where its images were drawn here."""
    halves = np.split(photos["latents"], 2, axis=1) if "latents" in photos else ()
    there, found = colour_columns(photos) | dict(zip(("latent_mean", "latent_std"), halves, strict=False)), {}
    for name, side in values.items():
        latents = {key: per_prompt(side[key], prompt_ids) for key in ("latent_mean", "latent_std") if key in side}
        found[name] = compare_with_photos(means[name] | latents, there)
    return found


def metric_roles(scorers: list[ScorerSpec], training: list[str], identity: bool) -> dict[str, str]:
    """{metric: role}: held-out scorers lead, those that selected the training pairs and what else counts follow."""
    chose = {scorer.label: bool({scorer.label, *names_of_scorer(scorer.source)} & {*training}) for scorer in scorers}
    roles = {label: "training" if chose[label] else "held-out" for label in sorted(chose, key=chose.__getitem__)}
    roles["diversity"] = "diversity"
    return roles | dict.fromkeys(("identity", "recognised") if identity else (), "identity")


def measure_realism(
    values: dict[str, dict[str, np.ndarray]], photos: dict[str, np.ndarray], prompt_ids: np.ndarray, seed: int
) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Every distance to the photos that there are features for, {name: compare_realism()}; all prompts count alike."""
    counts = np.bincount(prompt_ids)
    alike = np.concatenate([np.arange(count) for count in counts]) < counts.min()
    wanted = {
        "KD": ("features", kernel_distance),
        "FD": ("features", frechet_distance),
        "CMMD": ("CMMD", cmmd),
        "FID": ("FID", frechet_distance),
    }
    wanted = {kind: found for kind, found in wanted.items() if found[0] in photos}
    compared = {}
    for kind in tqdm(wanted, desc="distances to photos", unit="distance", disable=not wanted):
        label, distance_to = wanted[kind]
        features = {name: found[label][alike] for name, found in values.items()}
        compared[kind] = compare_realism(features, prompt_ids[alike], photos[label], distance_to, seed)
    return compared


def summarise_identity(values: dict[str, np.ndarray], means: dict[str, np.ndarray]) -> dict[str, Any]:
    """How well a model keeps the person, over prompts: mean cosine, share recognised, share without a face."""
    there = ~np.isnan(values["colour"][:, 0])
    return {
        "cosine": mean(means["identity"]),
        "interval": bootstrap_interval(mean, means["identity"]),
        "recognised": mean(means["recognised"]),
        "no_face": mean(np.isnan(values["identity"][there]).astype(float)),
    }


def recorded_training_scorers(models: list[Model]) -> list[str]:
    """The names of the scorers that selected the training pairs, from the records beside the weights; [] without.

    Those that only had to agree with the choice are among them: the pairs are what they let through.
    """
    records = [read_settings(data / "preference_data.json") for data in training_data(models)]
    specs = [spec for settings in records for key in ("scorer", "agree") for spec in settings.get(key) or []]
    return sorted(set().union(*map(names_of_scorer, specs)))


COSINES = ("pickscore", "hpsv2", "clip")  # scorers of one formula: with the same weights they are the same scorer


def names_of_scorer(spec: str) -> set[str]:
    """What a scorer may be called: its label, what it would be called without one, the weights of one of COSINES."""
    label, _, _, name, options = split_spec(spec)
    names = {label, name.rpartition(":")[2]}
    if name in COSINES:
        weights = options.get("model") or inspect.signature(BUILT_IN_SCORERS[name]).parameters["model"].default
        names.add(f"cosine of {Path(weights).resolve() if Path(weights).exists() else weights}")
    return names


def training_data(models: list[Model]) -> list[Path]:
    """The folders of pairs that the models were trained on, earlier stages included, as the weights' records say."""
    weights = [
        path for model in models if model.kind in {"lora", "folder"} for path in (model.path, model.text_encoder)
    ]
    todo, folders, seen = [path for path in weights if path], [], set()
    while todo:
        path = todo.pop(0)
        places = (path, *path.parents[:2])  # of a folder; a file or a checkpoint in it; a file in a checkpoint
        records = [place / "training_settings.json" for place in places]
        record = next(filter(Path.is_file, records), records[0])
        settings = read_settings(record)
        data = Path(settings.get("dataset_name") or settings.get("train_data_dir") or path)
        folders.append(data if data.is_dir() else record.parent.parent / data.name)  # trained in another folder
        earlier = [settings[name] for name in ("initial_lora", "initial_unet") if settings.get(name)]
        todo += [Path(name) for name in earlier if record not in seen]  # a run may start from its own folder
        seen.add(record)
    return list(dict.fromkeys(folders))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that another of the scripts recorded; {} where there is no such file, or none in it."""
    settings = read_object(path).get("settings") if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def plain(value: object) -> object:
    """`value` for JSON: tuples as lists, nan and infinities as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(
    path: Path,
    prompts: list[str],
    plan: list[tuple[int, int]],
    values: dict[str, dict[str, np.ndarray]],
    files: dict[str, list[Path | None]],
    labels: list[str],
) -> None:
    """per_image.csv: a row per image with its prompt, file, scores, identity, colour and latent channel means."""
    text = io.StringIO()
    writer = csv.writer(text)
    labels = [*labels, *(["identity"] if "identity" in values["base"] else [])]
    channels = max(np.shape(found.get("latent_mean", [[]]))[1] for found in values.values())
    latents = [f"latent_mean_{channel}" for channel in range(channels)]
    writer.writerow(["model", "prompt_id", "index", "prompt", "image", *labels, *COLOUR_COLUMNS, *latents])
    for name, found in values.items():
        missing = np.full((len(plan), channels), np.nan)
        numbers = np.column_stack(
            [*(found[label] for label in labels), found["colour"], found.get("latent_mean", missing)]
        )
        for (p, k), file, row in zip(plan, files[name], numbers, strict=True):
            if file:
                place = file.relative_to(path.parent) if file.is_relative_to(path.parent) else file
                writer.writerow(
                    [name, p, k, prompts[p], place.as_posix(), *("" if x != x else f"{x:.6g}" for x in row)]
                )
    write_atomically(path, text.getvalue().encode())


def print_summary(record: dict[str, Any]) -> None:
    """The short tables at the end."""
    for name, result in record["models"].items():
        print(f"\n{name} against base, {max(m['prompts'] for m in result['metrics'].values())} prompts")
        labels = {
            label: f"{label} (training)" if m["role"] == "training" else label
            for label, m in result["metrics"].items()
        }
        width = max(map(len, labels.values()))
        for label, m in result["metrics"].items():
            rate = f"{percent(m['win_rate']):>7} {span(m['interval'], 100):14}"
            print(f"  {labels[label]:{width}}  {rate}  {number(m['base']):>7} -> {number(m['tuned'])}")
        for kind, row in result["realism"].items():
            print(
                f"  {kind:{width}}  {number(row['base'])} -> {number(row['tuned'])} {span(row['interval'], digits=3)}"
            )
        words = {
            "hue_distance": "hue {:.1f} degrees",
            "delta_e": "Delta E {:.1f}",
            "latent_shift": "latents {:.3f} std",
        }
        moved = [form.format(result["colour"][key]["value"]) for key, form in words.items() if key in result["colour"]]
        print(f"  {'colour':{width}}  {', '.join(moved)}")
        for _, sentence in result["verdict"]:
            print(f"  {sentence}")
    for name, row in record.get("identity", {}).items():
        kept = f"recognised {percent(row['recognised'])}, cosine {row['cosine']:.3f} {span(row['interval'], digits=3)}"
        print(f"  identity of {name}: {kept}, no face {percent(row['no_face'])}")
    if "votes" in record:
        print_votes(record["votes"])


def describe(args: argparse.Namespace) -> dict[str, object]:
    """All settings as plain values, for the report and metrics.json; models and identity as they were given."""
    models = list(dict.fromkeys(model.spec for model in args.models))
    identity = args.identity and args.identity.spec
    return {
        **vars(args),
        "models": models,
        "scorers": [scorer.source for scorer in args.scorers],
        "identity": identity,
    }


def caveats(
    args: argparse.Namespace, prompts: list[str], elsewhere: dict[str, list[Path | None]], plan: list[tuple[int, int]]
) -> list[str]:
    """What weakens the conclusions, a sentence each; known before anything is drawn."""
    lines, fewest, training = [], len(prompts), training_scorers(args)
    for name, files in elsewhere.items():
        there = len({p for (p, _), file in zip(plan, files, strict=True) if file})
        fewest = min(fewest, there)
        lines.append(
            f"The images of {name} were drawn elsewhere, for {there} of the {counted(len(prompts), 'prompt')}: that "
            "seeds and sampler are the same is not known, so that luck is among the differences."
        )
    if fewest < len(prompts):
        shared = "Means, the paper's columns and distances to photos are of the images that all models have"
        lines.append(f"{shared}; each win rate is of those that base and its model have.")
    if fewest < 200:
        metrics = len(metric_roles(args.scorers, training, bool(args.reference_faces)))
        smallest = smallest_detectable_win_rate(fewest, metrics)
        unseen = f"a win rate below {percent(smallest)}" if smallest < 1 else "any win rate"
        unseen += f" would mostly go unseen among {metrics} metrics"
        lines.append(f"Only {counted(fewest, 'prompt')}: {unseen}. Use 200 or more.")
    if not any({scorer.label, *names_of_scorer(scorer.source)} & {*training} for scorer in args.scorers):
        lines.append(
            f"{', '.join(spoken(training))} selected the pairs but is not scored here: reward hacking stays unseen."
        )
    if not args.training_scorer and not recorded_training_scorers(args.models):
        lines.append("No record tells what selected the training pairs: taken to be PickScore (--training_scorer).")
    return lines


def spoken(training: list[str]) -> list[str]:
    """Of the names that training_scorers gives those that a reader knows."""
    return [name for name in training if not name.startswith("cosine of ")]


def given_training_scorers(args: argparse.Namespace) -> list[str]:
    """The names in --training_scorer."""
    return list(filter(None, map(str.strip, (args.training_scorer or "").split(","))))


def training_scorers(args: argparse.Namespace) -> list[str]:
    """The names of what selected the training pairs: those given and those recorded, else pickscore."""
    known = set().union(*map(names_of_scorer, given_training_scorers(args)), recorded_training_scorers(args.models))
    return sorted(known or names_of_scorer("pickscore"))


def main(args: argparse.Namespace) -> None:
    """Draws, measures, compares, and writes metrics.json, per_image.csv, report.html, model_card.md and pictures."""
    state, output = start_processes(), Path(args.output_dir)
    if any(model.drawn for model in args.models):  # a part of it that cannot be loaded (an xformers of another torch)
        importlib.import_module("diffusers.pipelines.pipeline_utils")  # keeps the callers' frames, and a model in them
    prompts, remark = read_prompt_list(args.prompts, args.prompt_column, args.max_prompts)
    plan = plan_images(len(prompts), args.num_images_per_prompt, args.diversity_prompts)
    prompt_ids = np.array([p for p, _ in plan])
    elsewhere = {model.name: find_images(model, prompts, plan) for model in args.models if not model.drawn}
    training, notes = training_scorers(args), caveats(args, prompts, elsewhere, plan)
    if state.is_main_process:
        print("\n".join([remark, *notes]), flush=True)

    drawn = [model for model in args.models if model.drawn]
    if args.overwrite or not all(image_file(output, model, p, k).is_file() for model in drawn for p, k in plan):
        try_measures(args, state, prompts[0])
    generate(args, state, prompts, plan)
    files = {
        model.name: elsewhere.get(model.name) or [image_file(output, model, p, k) for p, k in plan]
        for model in args.models
    }
    if args.votes:
        check_study_images(output, files, plan)
    photos = {PHOTOS: list_photos(Path(args.real_data_dir))} if args.real_data_dir else {}
    values = measure_all(args, state, {**files, **photos}, plan, prompts)
    if state.is_main_process:
        for name in files:
            values[name] |= read_latents(files[name])
        conclusions, means = conclude(args, prompts, prompt_ids, values, values.pop(PHOTOS, {}), training)
        record = {"settings": describe(args), "prompts": len(prompts), "training_scorers": spoken(training)}
        record["caveats"] = notes
        record["images"] = {name: sum(file is not None for file in found) for name, found in files.items()}
        record["drawn"] = [name for name in files if name not in elsewhere]
        record |= conclusions
        if args.votes:
            votes = read_votes(args.votes, output, prompts)
            record["votes"] = compare_votes(votes, values, plan, [scorer.label for scorer in args.scorers])
        write_results(args, record, prompts, plan, values, means, files)
        print_summary(record)
        print_endings(args, output)
    state.wait_for_everyone()
    state.destroy_process_group()


def write_results(
    args: argparse.Namespace,
    record: dict[str, Any],
    prompts: list[str],
    plan: list[tuple[int, int]],
    values: dict[str, dict[str, np.ndarray]],
    means: dict[str, dict[str, np.ndarray]],
    files: dict[str, list[Path | None]],
) -> None:
    """Everything that --output_dir holds beside images and measures."""
    output, first = Path(args.output_dir), {p: row for row, (p, k) in enumerate(plan) if k == 0}
    pictures = {name: [paths[first[p]] for p in range(len(prompts))] for name, paths in files.items()}
    write_atomically(output / "metrics.json", json.dumps(plain(record), indent=2).encode())
    write_csv(output / "per_image.csv", prompts, plan, values, files, [scorer.label for scorer in args.scorers])
    write_report(output / "report.html", record, prompts, means, pictures)
    write_card(output / "model_card.md", record)
    draw_win_rates(output / "win_rates.png", record)
    write_grid(output / "grid.png", pictures, args.seed)
    if args.user_study:
        pairs = write_user_study(output, args.user_study, prompts, files, plan, args.seed)
        if pairs < args.user_study:
            print(f"--user_study: only {counted(pairs, 'pair')}, since there are no more images")


def print_endings(args: argparse.Namespace, output: Path) -> None:
    """Where to look, and what to do next."""
    print(f"\nmemory  {peak_memory()}")
    print(f"open    {output / 'report.html'}")
    if args.user_study:
        print(f"ask     people with {output / 'user_study.html'}; then the same command with --votes votes-*.json")
    last = args.models[-1]
    if last.kind == "lora":
        print(f"next    to draw with {last.name}: pipeline.load_lora_weights({str(last.path)!r})")
    elif last.kind == "folder":
        print(f"next    to draw with {last.name}: UNet2DConditionModel.from_pretrained({str(last.path / 'unet')!r})")


# ---- Command line --------------------------------------------------------------------------------------------------

PAPER_SCORERS = ("hpsv2", "imagereward", "aesthetic", "clip", "clip_iqa", "clip_iqa_sharpness", "pickscore")


def use_embedded_world(parser: argparse.ArgumentParser, script: str) -> None:
    """Makes the settings of the embedded world (tests/tiny_human/settings.json) the defaults of `parser`.

    Called when no model is named; flags that are given still win.
    """
    settings = WORLD / "settings.json"
    if not settings.is_file():
        parser.error("no model: set --pretrained_model_name_or_path (the embedded world tests/tiny_human is not here)")
    defaults = json.loads(settings.read_text(encoding="utf-8").replace("{world}", WORLD.as_posix()))[script]
    parser.set_defaults(**defaults)
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}.py: the embedded world is used; --pretrained_model_name_or_path names your own model")


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = argparse.ArgumentParser(
        description="Compares tuned models with their base model on the same prompts, seeds and noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument_group("models").add_argument
    flag("--pretrained_model_name_or_path", help="base model, a folder or a hub id; without it: the embedded world")
    flag("--revision", help="revision of a model from the hub")
    flag("--variant", help="variant of its files, such as fp16")
    options = "; ".join(f"{name}: {words}" for name, (_, words, _) in MODEL_OPTIONS.items())
    models_help = f"base and NAME=PATH[,option=value...]: LoRAs, folders with unet/, folders of images. {options}"
    flag("--models", nargs="+", metavar="SPEC", default=["base", "dpo=dpo-human-lora"], help=models_help)

    flag = parser.add_argument_group("images").add_argument
    flag("--prompts", help=f"{PROMPTS_HELP}; default: the validation split of the pairs that a model was trained on")
    flag("--prompt_column", help="column of the prompts or captions; none: the first of prompt, caption, text")
    flag("--max_prompts", type=int, help="use the first so many prompts")
    flag("--num_images_per_prompt", type=int, default=1, help="images per prompt, averaged before models are compared")
    flag(
        "--diversity_prompts",
        type=int,
        default=64,
        help="the first so many prompts get two images, to measure diversity",
    )
    flag("--num_inference_steps", type=int, default=50, help="sampling steps")
    flag("--guidance_scale", type=float, default=5.0, help="classifier-free guidance")
    flag("--negative_prompt", default="", help="negative prompt of all images")
    flag("--sampler", choices=("dpmsolver", "pipeline"), default="dpmsolver", help="DPM-Solver, or the model's own")
    flag("--resolution", type=int, help="height and width in pixels; default: the model's own")
    flag("--height", type=int, help="height in pixels, in place of --resolution")
    flag("--width", type=int, help="width in pixels, in place of --resolution")
    flag("--batch_size", type=int, default=8, help="images drawn and scored at once")
    flag("--seed", type=int, default=1, help="seed of all images; another one than the training data's")
    flag("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: fp16 on CUDA, no on a CPU")

    flag = parser.add_argument_group("measures").add_argument
    scorer_help = (
        "clip, pickscore, hpsv2, aesthetic, imagereward, clip_iqa, clip_iqa_sharpness, people, people_count, "
        "people_pose, people_limbs, vqa, each with [=MODEL][,option=value...]; module:function, "
        "file.py:function or file.jsonl; paper: all of the paper's; the first held-out one leads"
    )
    flag("--scorers", nargs="+", metavar="SPEC", default=["hpsv2", "clip", "pickscore"], help=scorer_help)
    training_help = (
        "what selected the training pairs, with commas; default: as recorded beside the weights, else pickscore"
    )
    flag("--training_scorer", metavar="NAMES", help=training_help)
    flag(
        "--group_by",
        nargs="*",
        metavar="COLUMN",
        default=["people", "pose"],
        help="people, pose, columns of --prompts",
    )
    flag("--real_data_dir", help="folder of real photos: distances (KD, FD, CMMD) and colour against them")
    flag("--feature_model", default="facebook/dinov2-large", help="DINOv2 or CLIPModel: diversity, KD and FD")
    flag("--cmmd_model", default="openai/clip-vit-large-patch14-336", help="CLIPModel of CMMD")
    flag("--inception", metavar="FILE", help="TorchScript Inception (NVIDIA's inception-2015-12-05.pt): FID as well")

    flag = parser.add_argument_group("personalised text-to-image").add_argument
    identity_help = (
        "the person, drawn under every model: lora=PATH[,scale=S], or ip_adapter=FILE,image=FILE_OR_FOLDER (or "
        "embeds=FILE for FaceID)[,scale=S][,image_encoder=MODEL]; a DreamBooth model is given as the base model"
    )
    flag("--identity", metavar="SPEC", help=identity_help)
    flag("--reference_faces", metavar="FOLDER", help="photos of the person: measures whether the face is kept")
    flag("--face_embedder", default="sface", help="sface (needs OpenCV), module:function or file.py:function")
    flag("--face_threshold", type=float, default=0.363, help="cosine from which a face is the person's; SFace's own")

    flag = parser.add_argument_group("human votes").add_argument
    flag("--user_study", type=int, metavar="N", help="write a blinded page of N random pairs for people to judge")
    flag("--votes", nargs="+", metavar="FILE", help="the files that the page saved: win rates, agreement")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="human-eval", help="folder of images, metrics and report; a second start carries on")
    flag("--report_rows", type=int, default=9, help="so many worst losses, best wins and random prompts in the report")
    flag("--overwrite", action="store_true", help="draw images anew that were made with other settings")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings, checked as far as possible without loading a model; models, scorers and identity are parsed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None and not all(map(names_images, args.models)):
        use_embedded_world(parser, "eval_human")
        args = parser.parse_args(argv)
    validate(parser, args)
    return args


def check_labels(scorers: list[ScorerSpec]) -> None:
    """UserError where a scorer is called as something that is measured anyway."""
    taken = {*COLOUR_COLUMNS, "colour", "features", "diversity", "identity", "recognised", "CMMD", "FID"}
    taken |= {"latents", "latent_mean", "latent_std"}
    twice = [scorer.label for scorer in scorers if scorer.label in taken]
    if twice:
        raise UserError(f"--scorers: {twice[0]} is measured anyway: give this scorer another name with ,label=...")


def expand_paper(specs: list[str]) -> list[str]:
    """--scorers with those of the paper, but for ones that are given with options of their own, for "paper"."""
    given = {split_spec(spec)[3] for spec in specs}
    paper = [name for name in PAPER_SCORERS if name not in given]
    return [name for spec in specs for name in (paper if spec == "paper" else [spec])]


def names_images(spec: str) -> bool:
    """Whether a model is a folder of finished images."""
    with contextlib.suppress(UserError):
        return parse_model(spec).kind == "images"
    return False


def validate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with one line where the settings cannot work; parses models, scorers and identity."""
    counts = ("max_prompts", "num_images_per_prompt", "num_inference_steps", "batch_size", "user_study")
    for name in (*counts, "resolution", "height", "width"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    least = {"diversity_prompts": args.diversity_prompts, "report_rows": args.report_rows, "seed": args.seed}
    for name, value in least.items():
        if value < 0:
            parser.error(f"--{name} must be at least 0")
    for name in ("resolution", "height", "width"):
        if (getattr(args, name) or 8) % 8:
            parser.error(f"--{name} must be a multiple of 8")
    if not math.isfinite(args.guidance_scale) or args.guidance_scale < 0:
        parser.error("--guidance_scale must be a number from 0 on")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file")
    try:
        args.models = parse_models(args.models)
        args.scorers = parse_scorer_specs(expand_paper(args.scorers))
        check_labels(args.scorers)
        args.identity = parse_identity(args.identity) if args.identity else None
        check_inputs(args)
    except UserError as error:
        parser.error(str(error))
    args.height, args.width = args.height or args.resolution, args.width or args.resolution


def check_inputs(args: argparse.Namespace) -> None:
    """UserError for models, prompts, images and votes that are not what they have to be; finds the prompts."""
    if any(model.drawn for model in args.models):
        check_model(args.pretrained_model_name_or_path, "model_index.json")
    chose = set().union(recorded_training_scorers(args.models), *(names_of_scorer(s.source) for s in args.scorers))
    for name in given_training_scorers(args):
        known = names_of_scorer(name) & {*chose, *BUILT_IN_SCORERS, *(scorer.label for scorer in args.scorers)}
        if not known and ":" not in name:  # a plug-in of elsewhere may have chosen
            raise UserError(f"--training_scorer {name}: neither among --scorers nor recorded beside the weights")
    args.prompts = args.prompts or recorded_validation_prompts(args.models)
    prompts, _ = read_prompt_list(args.prompts, args.prompt_column, args.max_prompts)
    group_prompts(args, prompts)
    check_references(args)
    plan = plan_images(len(prompts), args.num_images_per_prompt, args.diversity_prompts)
    both = np.ones(len(plan), dtype=bool)
    for model in args.models:  # base comes first
        there = both if model.drawn else np.array([bool(file) for file in find_images(model, prompts, plan)])
        both = there if model.name == "base" else both
        if not (both & there).any():
            raise UserError(f"base and {model.name} have no image of the same prompt")
    if args.votes:
        read_votes(args.votes, Path(args.output_dir), prompts)


def check_references(args: argparse.Namespace) -> None:
    """UserError where the photos or faces to compare with, or what measures them, are not there."""
    for name, folder in (("real_data_dir", args.real_data_dir), ("reference_faces", args.reference_faces)):
        if folder and not (Path(folder).is_dir() and list_photos(Path(folder))):
            raise UserError(f"--{name} {folder}: no such folder, or no images in it")
    if args.inception and not Path(args.inception).is_file():
        raise UserError(f"--inception: no such file: {args.inception}")
    if args.inception and not args.real_data_dir:
        raise UserError("--inception measures a distance to photos: name them with --real_data_dir")
    if not -1 <= args.face_threshold <= 1:
        raise UserError("--face_threshold is a cosine: it must lie between -1 and 1")
    if args.face_embedder != "sface":
        find_scorer(args.face_embedder)
    elif args.reference_faces and importlib.util.find_spec("cv2") is None:
        raise UserError("--face_embedder sface: pip install opencv-python-headless, or give your own file.py:function")


def recorded_validation_prompts(models: list[Model]) -> str:
    """The validation split of the pairs that a model was trained on; UserError where none is recorded."""
    for folder in training_data(models):
        if files := sorted(folder.glob("data/validation*.parquet")):
            return str(files[0]) if len(files) == 1 else f"{folder}:validation"  # the file alone is read at once
    raise UserError("--prompts is missing: a text file with one prompt per line, or another source (--help)")


def cli(argv: list[str] | None = None) -> None:
    """main, with a user's error as one line and status 1, and Ctrl-C as status 130."""
    try:
        main(parse_args(argv))
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli()
