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
#     "datasets>=4,<5.3",
#     "huggingface_hub>=0.34,<3",
#     "pandas>=2,<4",
#     "jinja2>=3.1,<4",
#     "matplotlib>=3.8,<4",
#     "pillow>=10.1,<14",
#     "pyarrow>=16,<27",
#     "numpy>=1.26,<3",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Does the tuned model draw better people? Base against tuned models on the same prompts, seeds and noise.

    prompts ──draw──>     images    a row per image: model, prompt_id, index, seed, path,
            ──measure──>            and a column for each scorer and each statistic of colour
            ──group by──> prompts   a row per model and prompt, the mean over its images
            ──compare──>  results   a row per tuned model and metric: win rate, interval, p, base's and tuned's mean

    win_rate(a, b)          = mean over prompts of [a > b] + 1/2 [a = b]
    sign_test               = exact; the headline is tested alone, Holm's correction is over all others
    win_interval            = the win rates that the sign test does not refuse
    kernel_distance(y)(x)   = E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased, of images x and real photos y
    frechet_distance(y)(x)  = |mean(x) - mean(y)|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2))
    squared_delta_e(a, b)   = |mean Lab colour of a - that of b|^2, less what chance moves
    diversity               = mean cosine distance of two images of one prompt

All that is printed, plotted and written comes from `images` and `results`: terminal, report.html, model_card.md,
metrics.json, per_image.csv, win_rates.png, colour.png, grid.png, changes-*.png. Without arguments it runs on the
embedded world (tests/tiny_human). The usual command:

    accelerate launch eval_human.py --pretrained_model_name_or_path YOUR_MODEL --prompts prompts.txt \\
        --models base dpo=dpo-human-lora half=dpo-human-lora,lora_scale=0.5 --scorers people paper \\
        --real_data_dir photos --user_study 50

To add a scorer, write a function like `clip_iqa` and name it in SCORERS, or call it by `--scorers your_file.py:name`.
To add a statistic of colour, return it from `colour_statistics` and name it in COLOURS.
To judge otherwise, edit `verdict`; to test otherwise, `compare`. To show something else, edit REPORT.
To draw with another kind of model, write a class like `UNet` and name its pipeline in FAMILIES.

Differences from the paper (HG-DPO, arXiv 2405.20216):
1. The scorer that selected the training pairs is marked and never leads: the first held-out scorer is the headline.
   In the paper PickScore both selects the pairs and judges the result.
2. The prompt is the unit: a prompt's images are averaged first, so that four images of one prompt are not four votes.
   Every win rate has its interval and its p; the paper gives neither.
3. Distances to photos lead with the unbiased kernel distances, beside what photos read against other photos. FID is
   `FD` with --feature_model inception-2015-12-05.pt (NVIDIA's TorchScript file); or point torch-fidelity or clean-fid
   at images/NAME and the photos.
4. CLIP-IQA is any CLIPModel's, ATHEC's sharpness is of images at most 512 pixels a side, and faces are compared by
   SFace: ArcFace's models are not free. Hue is reported twice: between the models' circular means over all images (the
   paper's), and image by image. Diversity within a prompt is measured too.
5. People may say "no difference"; the paper does not tell whether its raters could.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import gc
import hashlib
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
import uuid
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as csv_of_arrow
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor
from tqdm.auto import tqdm


if TYPE_CHECKING:  # imported where they are used: a mistake in the command line costs no seconds of imports
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
PHOTOS = "+photos"  # what the photos of --real_data_dir are called among the models; no model's name has a plus


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method: statistics -----------------------------------------------------------------------------------------


def win_rate(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the prompts on which `a` is higher than `b`, ties as 1/2: (P,) each, without nan."""
    return float(np.where(a == b, 0.5, a > b).mean()) if len(a) else math.nan


def binomial_tail(successes: int, n: int, chance: float) -> float:
    """P(X >= successes) of the number X of successes in n trials."""
    k, log_factorial = np.arange(successes, n + 1), np.log(np.maximum(np.arange(n + 1), 1)).cumsum()
    log_choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    return min(1.0, float(np.exp(log_choose + k * math.log(chance) + (n - k) * math.log1p(-chance)).sum()))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the exact sign test, which leaves ties out."""
    return min(1.0, 2 * binomial_tail(max(wins, losses), wins + losses, 0.5))


def win_interval(wins: int, ties: int, losses: int) -> tuple[float, float]:
    """95 % interval of the win rate; nan where all are ties.

    Clopper and Pearson's of the share of wins among wins and losses (https://doi.org/10.1093/biomet/26.4.404), which
    turns the sign test around: it leaves 1/2 out exactly where p < .05. Ties join as 1/2, at either end of the 95 %
    interval of their share, whichever reaches further.
    """
    n, total = wins + losses, wins + ties + losses
    if not n:
        return math.nan, math.nan

    def lowest(successes: int) -> float:  # the chance at which as many or more are seen 2.5 % of the time
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if binomial_tail(successes, n, middle) > 0.025 else (middle, high)
        return high

    low, high = lowest(wins) if wins else 0.0, 1 - lowest(losses) if losses else 1.0
    error = 1.96 * math.sqrt(n * ties / total) / total
    shares = max(0.0, n / total - error), min(1.0, n / total + error)
    return 0.5 + min((low - 0.5) * share for share in shares), 0.5 + max((high - 0.5) * share for share in shares)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: each below .05 is a finding, whatever the number of metrics."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return adjusted.tolist()


def bootstrap_interval(
    statistic: Callable[..., float], *samples: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of statistic(*samples); samples are (P, ...), their rows are drawn together.

    The rows have to be independent: prompts, not images. Not for absolute values, which chance alone keeps above 0.
    """
    count = len(samples[0])
    draws = np.random.default_rng(seed).integers(0, max(count, 1), (resamples if count else 0, count))
    values = [statistic(*(sample[rows] for sample in samples)) for rows in draws]
    low, high = np.quantile(values, [0.025, 0.975]) if values else (math.nan, math.nan)
    return float(low), float(high)


def jackknife_interval(statistic: Callable[..., float], *samples: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of statistic(*samples) by the jackknife that deletes blocks; nan where there are not 20 rows.

    The rows of the samples, (P, ...) each, are shuffled and cut into 20 blocks together, and each block is left out
    once: error^2 = 19 / 20 * sum of (value without a block - mean of these values)^2
    (https://doi.org/10.1214/aos/1176347263). The interval is the value -/+ error * Student's t of 19 degrees. Not the
    bootstrap: its samples hold rows twice, and a row and its copy are as close as rows can be.
    """
    if len(samples[0]) < 20:
        return math.nan, math.nan
    parts = np.array_split(np.random.default_rng(seed).permutation(len(samples[0])), 20)
    values = np.array([statistic(*(np.delete(sample, part, axis=0) for sample in samples)) for part in parts])
    value, reach = statistic(*samples), 2.093 * math.sqrt(19 * values.var())
    return value - reach, value + reach


def detectable_win_rate(prompts: int) -> float:
    """The win rate that the test of one metric finds with 80 % power: .60 for 200 prompts."""
    return min(1.0, 0.5 + (1.960 + 0.842) * 0.5 / math.sqrt(prompts))


def krippendorff_alpha(counts: np.ndarray) -> float:
    """Krippendorff's alpha of nominal answers, counts (U, C) of U questions: 1 is perfect agreement, 0 is chance.

    1 - observed / expected share of couples that differ (https://repository.upenn.edu/asc_papers/43); nan where no two
    raters met, or where all gave one and the same answer.
    """
    shared = counts[counts.sum(axis=1) > 1]
    answers, totals = shared.sum(axis=1, keepdims=True), shared.sum(axis=0)
    observed = (shared * (answers - shared) / (answers - 1)).sum()
    expected = (totals * (totals.sum() - totals)).sum() / max(totals.sum() - 1, 1)
    return float(1 - observed / expected) if expected else math.nan


# ---- The method: colour and diversity -------------------------------------------------------------------------------


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


def squared_delta_e(a: np.ndarray, b: np.ndarray) -> float:
    """Squared CIE76 distance of two models' mean colours, (P, 3) each, paired by prompt; 2.3 squared is noticeable.

    Chance alone moves a mean, and every way counts as distance: what it moves on average is taken off, so that models
    that do not differ read 0 on average, and may read less.
    """
    moved = b - a
    chance = moved.var(axis=0, ddof=min(1, len(moved) - 1)).sum() / len(moved)
    return float((moved.mean(axis=0) ** 2).sum() - chance)


def latent_shift(base: np.ndarray, tuned: np.ndarray, base_std: np.ndarray) -> float:
    """Mean over channels of |mean(tuned) - mean(base)| in units of base's std: channel means (P, C) each, std (C,)."""
    return float(np.mean(np.abs(tuned.mean(axis=0) - base.mean(axis=0)) / base_std))


def diversity(features: np.ndarray) -> float:
    """Mean pairwise cosine distance of one prompt's images, features (K, D); 0 for equal images, nan below two."""
    if len(features) < 2:
        return math.nan
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    first, second = np.triu_indices(len(unit), k=1)
    return float(np.mean(np.sum((unit[first] - unit[second]) ** 2, axis=1) / 2))  # exactly 0 where 1 - cos would round


# ---- The method: distances to real photos ---------------------------------------------------------------------------


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
    at once, not the mean over subsets, and not times 1000. Equal distributions give 0 on average: it may be negative.
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


def real_floor(distance_to: Callable[[np.ndarray], Distance], photos: np.ndarray, n: int, seed: int) -> float:
    """The distance of `n` random photos from all others, (M, D): about what `n` images of a perfect model would read.

    At most half of the photos are set apart. Where that is less than `n`, the floor of frechet_distance is too high.
    """
    order = np.random.default_rng(seed).permutation(len(photos))
    size = min(n, len(photos) // 2)
    return distance_to(photos[order[size:]])(photos[order[:size]])


# ---- Model families: everything that depends on the kind of model ---------------------------------------------------


class NoisePath(NamedTuple):
    """x_t = a x_0 + s noise at each of the T points of a model's schedule, least noise first; (T,) each."""

    t: Tensor  # what the model is told
    a: Tensor
    s: Tensor
    c: Tensor  # one reverse step turns a difference in the predicted x_0 into c times it
    kind: str  # what the model predicts: epsilon, v_prediction, sample or flow


class UNet:
    """SD 1.x, SD 2.x and SDXL: a U-Net on a DDPM schedule, predicting epsilon, v or x_0."""

    model, attention, multiple = "unet", ("to_q", "to_k", "to_v", "to_out.0"), 8
    guidance = ("guidance_scale", 5.0)  # the argument of the pipeline's call, and the paper's value

    def path(self, pipe: DiffusionPipeline, tokens: int) -> NoisePath:
        """The model's own schedule, (T,) each; UserError for one that is no DDPM schedule, such as EDM, LCM or TCD."""
        from diffusers import DDPMScheduler

        config, name = pipe.scheduler.config, type(pipe.scheduler).__name__
        if "beta_schedule" not in config or re.search("EDM|LCM|TCD|FlowMatch", name) or config.get("use_flow_sigmas"):
            raise UserError(f"the model's scheduler, {name}, has no DDPM schedule, which {type(pipe).__name__} needs")
        if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"the scheduler's prediction_type {config.prediction_type!r} is no DDPM prediction")
        alpha_bar = DDPMScheduler.from_config(config).alphas_cumprod
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        c = before.sqrt() * (1 - alpha_bar / before) / (1 - alpha_bar)
        path = torch.arange(len(alpha_bar)), alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), c
        if config.prediction_type == "epsilon":  # of pure noise, at zero terminal SNR, it says nothing about the image
            path = [values[alpha_bar > 0] for values in path]
        return NoisePath(*path, config.prediction_type)

    def sampler(self, pipe: DiffusionPipeline) -> Any:
        """DPM-Solver++ multistep with the model's schedule, as the paper samples."""
        from diffusers import DPMSolverMultistepScheduler

        options = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
        return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)

    def encode_text(self, pipe: DiffusionPipeline, prompts: list[str], **options: Any) -> dict[str, Tensor]:
        """The prompts' embeddings (B, ...) by the pipeline's own encoders, under the names that its call takes; with
        do_classifier_free_guidance=True also those of the empty prompt."""
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        options = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1} | options
        values = pipe.encode_prompt(prompts, device=pipe.text_encoder.device, **options)
        return {name: value for name, value in zip(names, values, strict=False) if value is not None}

    def predict(self, model: torch.nn.Module, x_t: Tensor, t: Tensor, text: dict, sizes: Tensor) -> Tensor:
        """The bare model call, x_t (B, C, h, w), t (B,), text (B, ...); sizes (B, 6), SDXL: original height and
        width, top and left of the crop, height and width, in pixels -> (B, C, h, w)."""
        added = None
        if "pooled_prompt_embeds" in text:  # SDXL
            added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": sizes}
        embeds = text["prompt_embeds"]
        return model(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    def unpack(self, pipe: DiffusionPipeline, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents (B, C, h, w) of what the pipeline's call returns as such; the image's size in pixels."""
        return latents

    def pack(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of unpack: latents (B, C, h, w) as the pipeline's call takes them."""
        return latents

    def latent_scale(self, vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """Mean and factor, (1, C or 1, 1, 1), of latents = (the VAE's - mean) * factor."""
        mean, std = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
        mean = torch.tensor(mean or vae.config.get("shift_factor") or 0.0).view(1, -1, 1, 1)
        factor = vae.config.scaling_factor / torch.tensor(std or 1.0).view(1, -1, 1, 1)
        return mean.to(vae.device), factor.to(vae.device)

    def to_latents(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), the means of the VAE's posterior, of pixels (B, 3, H, W) in [-1, 1]."""
        mean, factor = self.latent_scale(pipe.vae)
        return (pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode() - mean) * factor

    def to_pixels(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of scaled latents."""
        mean, factor = self.latent_scale(pipe.vae)
        return pipe.vae.decode((latents.to(pipe.vae.device) / factor + mean).to(pipe.vae.dtype)).sample


class SD3(UNet):
    """SD 3 and SD 3.5: a transformer on the path of flow matching, predicting noise - x_0."""

    model, multiple = "transformer", 16
    attention = (*UNet.attention, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    guidance = ("guidance_scale", 4.5)

    def path(self, pipe: DiffusionPipeline, tokens: int) -> NoisePath:
        """The sampler's own shifted sigmas, least noise first, (T,) each; `tokens`: those of an image, on which a
        dynamic shift depends. UserError for a sampler that is no FlowMatchEulerDiscreteScheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config, name = pipe.scheduler.config, type(pipe.scheduler).__name__
        if name != "FlowMatchEulerDiscreteScheduler":
            raise UserError(f"the model's scheduler, {name}, is no FlowMatchEulerDiscreteScheduler, as flow needs")
        kinds = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
        if other := [kind for kind in kinds if config.get(kind)]:
            raise UserError(f"the scheduler's {', '.join(other)} leaves the path that SD 3 was trained on")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        sigma = scheduler.sigmas
        if config.use_dynamic_shifting:
            lengths = config.base_image_seq_len, config.max_image_seq_len
            mu = calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
            sigma = scheduler.time_shift(mu, 1.0, sigma)
        sigma = sigma.flip(0)
        c = (sigma - torch.cat([sigma.new_zeros(1), sigma[:-1]])) / sigma
        return NoisePath(sigma * config.num_train_timesteps, 1 - sigma, sigma, c, "flow")

    def sampler(self, pipe: DiffusionPipeline) -> Any:
        """The model's own, Euler steps of the flow."""
        return pipe.scheduler

    def encode_text(self, pipe: DiffusionPipeline, prompts: list[str], **options: Any) -> dict[str, Tensor]:
        """As U-Nets' pipelines; the second and third encoder read the same prompts."""
        return super().encode_text(pipe, prompts, prompt_2=None, prompt_3=None, **options)

    def predict(self, model: torch.nn.Module, x_t: Tensor, t: Tensor, text: dict, sizes: Tensor) -> Tensor:
        """The bare model call; sizes are not read."""
        text = {"encoder_hidden_states": text["prompt_embeds"], "pooled_projections": text["pooled_prompt_embeds"]}
        return model(hidden_states=x_t, timestep=t, **text, return_dict=False)[0]


FAMILIES = {"StableDiffusionPipeline": UNet, "StableDiffusionXLPipeline": UNet, "StableDiffusion3Pipeline": SD3}


# ---- Prompts and images ---------------------------------------------------------------------------------------------


CAPTION_COLUMNS = ("prompt", "caption", "text")
NO_PHOTOS = {".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf", ".palm"}  # that Pillow knows
COMPANIONS = re.compile(r"(-masklabel|\.mask|_mask)\.|@eaDir|__MACOSX|/\.")  # images that belong to photos
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a content


def read_table(source: str, column: str | None, count: int | None = None) -> pd.DataFrame:
    """The rows of a text file with one prompt a line, of a .jsonl, .json, .csv, .tsv or .parquet file, of a folder of
    photos with captions, or of what `datasets` reads (a folder, or owner/name[:split] on the hub; of this the one
    column and the first `count` rows), with the texts in a column `prompt`. UserError for what cannot be read."""
    path, kind = Path(source), Path(source).suffix.lower()
    try:
        if path.is_dir() and find_photos(path)[0]:
            return read_photos(source, column)[0]
        if path.is_dir() or not (path.exists() or kind in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")):
            table = read_rows(source, column, count)
        elif kind in (".csv", ".tsv"):
            form = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
            form |= {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # more cells than columns
                table = pd.read_csv(path, **form)
        elif kind == ".parquet":
            schema = pq.read_schema(path)
            images = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_nested)
            simple = [field.name for field in schema if not any(is_kind(field.type) for is_kind in images)]
            table = pd.read_parquet(path, columns=simple)
        elif kind in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8-sig")
            texts = [text] if kind == ".json" else text.split("\n")
            rows = []
            for number, line in enumerate(texts, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
                    raise UserError(f"{source}, line {number + error.lineno - 1}: not json ({error.msg})") from error
            rows = rows[0] if kind == ".json" and rows else rows
            if not isinstance(rows, list):
                raise UserError(f"{source} is not a list of texts or of objects")
            table = pd.DataFrame([row if isinstance(row, dict) else {"prompt": row} for row in rows], dtype=object)
        else:
            table = pd.DataFrame({"prompt": path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")})
            table.loc[table.prompt.str.match(r"\s*#"), "prompt"] = ""
            for number, line in enumerate(table.prompt, 1):
                if flags := re.search(r"(?:^|\s)(--\w+)", line):
                    told = "is a generator's flag, not text: leave the prompt alone (--negative_prompt is a flag here)"
                    raise UserError(f"{source}, line {number}: {flags[1]} {told}")
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        told = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = " (save it as utf-8)" if isinstance(error, UnicodeDecodeError) else ""
        hint = " (a prompt with a comma needs quotes)" if "loss of data" in told or "Expected" in told else hint
        raise UserError(f"cannot read {source}: {told}{hint}") from error
    table = table.rename(columns=str.strip) if len(table.columns) else table.assign(prompt="")
    name = choose_column(source, column, table.columns)
    texts = [to_text(value, f"{source}, row {number}") for number, value in enumerate(table[name], 1)]
    return table.assign(prompt=texts)


def read_prompts(source: str, column: str | None, count: int | None) -> tuple[pd.DataFrame, str]:
    """The first `count` distinct prompts, in single spaces, with the columns of their file; and what was left out."""
    table = read_table(source, column, count)
    blank, total = table.prompt == "", len(table)
    table = table[~blank].drop_duplicates("prompt", ignore_index=True)
    if table.empty:
        raise UserError(f"{source} {'holds only blank prompts' if total else 'is empty'}")
    left_out = f"{blank.sum()} blank and {total - blank.sum() - len(table)} repeated ones left out"
    chosen = table[:count]
    return chosen, f"prompts    the first {len(chosen)} of {len(table)} in {source} ({left_out})"


def choose_column(source: str, column: str | None, columns: Iterable[str]) -> str:
    """`column`, or the first of CAPTION_COLUMNS that is there; UserError with the names that are."""
    wanted = [column] if column else CAPTION_COLUMNS
    if not (found := [name for name in wanted if name in set(columns)]):
        has = textwrap.shorten(", ".join(map(str, columns)), 100, placeholder=" ...")
        raise UserError(f"{source} has no column {', '.join(wanted)}: --prompt_column can be one of {has}")
    return found[0]


def to_text(value: Any, place: str) -> str:
    """A prompt in single spaces, "" for none; UserError with its place where it is no text."""
    if isinstance(value, str):
        return " ".join(value.encode("utf-8", "ignore").decode().split())  # half a character is left out
    if value is None or value is pd.NA or value != value:  # nan
        return ""
    raise UserError(f"{place}: {value!r:.40} in place of a text")


def read_rows(source: str, column: str | None, count: int | None = None) -> pd.DataFrame:
    """The captions' column, alone, of what `datasets` reads of a folder, or of owner/name[:split] on the hub, train or
    else the first split."""
    import datasets

    datasets.disable_progress_bars()
    named = None if Path(source).is_dir() else re.fullmatch(r"(.+?):([\w.-]+)", source)
    name, split = named.groups() if named else (source, None)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"no such file or folder: {source}")
    try:
        splits = datasets.get_dataset_split_names(name)
        split = split or ("train" if "train" in splits else splits[0])
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source} is no file, nor can datasets load it: {str(error).splitlines()[0]}") from error
    name = choose_column(source, column, rows.column_names or list(next(iter(rows))))
    texts, distinct = [], set()
    for row in rows.select_columns([name]):
        texts.append(row[name])
        distinct.add(to_text(row[name], f"{source}, row {len(texts)}"))
        if len(distinct) - ("" in distinct) == count:
            break
    return pd.DataFrame({name: texts}, dtype=object)


def find_photos(folder: Path) -> tuple[list[Path], int]:
    """The files that Pillow reads in a folder and the folders in it, by path; and how many were left out: masks,
    thumbnails, hidden ones, and images of kinds that it cannot read."""
    known, found, left_out = Image.registered_extensions().keys() - NO_PHOTOS, [], 0
    if any(folder.rglob("*.parquet")):  # a data set with pictures, such as our own
        return [], 0
    for place, _, names in os.walk(folder, followlinks=True):
        for file in (Path(place, name) for name in names):
            kind = file.suffix.lower()
            companion = COMPANIONS.search(f"/{file.relative_to(folder).as_posix()}")
            left_out += bool(companion) if kind in known else kind in (".heic", ".heif", ".avif")
            found += [file] if kind in known and not companion else []
    return sorted(found), left_out


def read_captions(source: str, column: str | None) -> tuple[pd.DataFrame, int]:
    """A table of the photos of a folder, photo (its path) and prompt ("" without), by metadata.jsonl, metadata.csv,
    or a .txt or .caption beside each photo; and how many files were left out."""
    folder = Path(source)
    (photos, odd), captions = find_photos(folder), {}
    places = sorted({place for photo in photos for place in photo.parents if folder in (place, *place.parents)})
    tables = (place / name for place in places for name in ("metadata.jsonl", "metadata.csv"))
    for file in filter(Path.is_file, tables):
        listed = read_table(str(file), column)
        if "file_name" not in listed:
            raise UserError(f"{file} has no column file_name")
        for number, (name, text) in enumerate(zip(listed.file_name, listed.prompt, strict=True), 1):
            if not (file.parent / str(name)).is_file():
                raise UserError(f"{file}, row {number}: there is no file {name}")
            captions[file.parent / str(name)] = text
    texts = [captions.get(photo) or to_text(read_caption(photo), str(photo)) for photo in photos]
    return pd.DataFrame({"prompt": texts, "photo": [str(photo) for photo in photos]}), odd


def read_photos(source: str, column: str | None) -> tuple[pd.DataFrame, str]:
    """A table of the photos with a caption, the first of each, prompt and photo (its path), and what was left out."""
    table, odd = read_captions(source, column)
    kept = table[table.prompt != ""].drop_duplicates("prompt", ignore_index=True)
    if kept.empty:
        raise UserError(f"{len(table)} photos in {source}, none has a caption (metadata.jsonl, or a .txt beside it)")
    blank = (table.prompt == "").sum()
    left_out = f"{blank} without caption, {len(table) - blank - len(kept)} of a repeated one, {odd} masks, thumbnails"
    return kept, f"photos     {len(kept)} of {len(table) + odd} in {source} ({left_out} or unknown kinds left out)"


def read_caption(image: Path) -> str:
    """The caption in the .txt or .caption file beside an image, "" without one; of several lines, which are
    alternatives, the first. UserError for one that a generator's UI wrote, with settings in it."""
    for file in (image.with_suffix(".txt"), image.with_suffix(".caption")):
        try:
            text = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else ""
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not utf-8") from error
        if re.search(r"^(Negative prompt:|Steps: \d+, )", text, re.MULTILINE):
            raise UserError(f"{file} holds a generator's settings, not only a caption")
        if text:
            return text.splitlines()[0].strip()
    return ""


def read_image(file: BinaryIO | Path) -> Image.Image:
    """An image in 8-bit sRGB, upright. 16-bit and float greys are scaled from the range of their kind, transparent
    pixels lie on white, colour profiles are converted."""
    image = ImageOps.exif_transpose(Image.open(file))
    profile = image.info.get("icc_profile", b"")
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float32)
        tops = (65535,) if image.mode.startswith("I") else (1, 255, 65535)
        top = next((top for top in tops if grey.max() <= top), grey.max())
        return Image.fromarray(np.uint8(np.clip(grey / top, 0, 1) * 255 + 0.5)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile and b"sRGB" not in profile and image.mode in ("RGB", "CMYK", "L"):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile is none
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def load_image(path: Path) -> Image.Image:
    """read_image; UserError with the file that cannot be read."""
    try:
        return read_image(path)
    except UNREADABLE as error:
        raise UserError(f"cannot read the image {path}: {error}") from error


def image_text(path: Path) -> dict[str, str]:
    """The texts of an image, which stand ahead of its pixels; {} where there is no image."""
    try:
        with Image.open(path) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    except UNREADABLE:
        return {}


def is_finished(path: Path, seed: int) -> bool:
    """Whether an image of ours with this seed is there, to the last chunk of its file."""
    if image_text(path).get("seed") != str(seed):
        return False
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return file.read(4) == b"IEND"


def find_images(name: str, folder: Path, prompts: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The finished images of a folder, prompt_id, index and path; and by what they were matched with the prompts.

    By their caption (metadata.jsonl, metadata.csv, or a .txt beside each) or the prompt that a PNG carries (ours, or
    A1111's); where none has one by name: 00012_0.png is the first image of the thirteenth prompt. UserError for what
    is ambiguous, such as a grid among the images, and where no image belongs to any prompt.
    """
    captions, _ = read_captions(str(folder), None)
    number, rows = {prompt: p for p, prompt in enumerate(prompts)}, []
    for path, caption in zip(map(Path, captions.photo), captions.prompt, strict=True):
        info = image_text(path)
        carried = re.split(r"\nNegative prompt:|\nSteps:", info.get("prompt") or info.get("parameters") or "")[0]
        rows.append((number.get(caption or to_text(carried, str(path)), -1), path))
    how, table = "their captions", pd.DataFrame([row for row in rows if row[0] >= 0], columns=["prompt_id", "path"])
    table["index"] = table.groupby("prompt_id").cumcount()
    if table.empty:
        named = [(re.fullmatch(r"(\d+)_(\d+)", path.stem), path) for _, path in rows]
        how, named = "their names", [(int(match[1]), int(match[2]), path) for match, path in named if match]
        if named and 0 not in {prompt_id for prompt_id, _, _ in named}:
            raise UserError(f"{name}: no image in {folder} is called 00000_0: are they numbered from 1? Count from 0")
        table = pd.DataFrame(named, columns=["prompt_id", "index", "path"])
        table = table[table.prompt_id < len(prompts)]
    if table.empty:
        told = "no caption is one of the prompts, and no name is like 00012_0.png (prompt 12, image 0)"
        raise UserError(f"{name}: {len(rows)} images in {folder}, but {told}")
    for prompt_id, paths in table.groupby("prompt_id").path:
        sizes = {}
        for path in paths if len(paths) > 1 else ():
            with Image.open(path) as image:
                sizes.setdefault(image.size, path)
        if len(sizes) > 1:
            told = " and ".join(f"{path.name} of {width}x{height}" for (width, height), path in sizes.items())
            raise UserError(f"{name}: one prompt ({prompts[prompt_id]!r:.60}) has {told}: is one a grid? Remove it")
    return table, f"{len(table)} images in {folder}, of {table.prompt_id.nunique()} prompts, by {how}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes under a temporary name, then renames: whoever sees `path` sees it whole. UserError on a full disk."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        told = f"cannot write {path}: {error.strerror or error}; what is finished is kept, start again to go on"
        raise UserError(told) from error


def write_text(path: Path, text: str) -> None:
    """write_whole of a text in utf-8."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


# ---- Scorers --------------------------------------------------------------------------------------------------------
# A scorer is a function factory(device, **options) -> score(images, prompts) -> one float per image, higher is better.
# nan or None is a veto: the image counts for neither side. Your own: module:factory or path/to/file.py:factory;
# file.jsonl: scores made elsewhere. An option has the type of its default. A factory with a parameter `columns` gets
# {prompt: its row of the prompts' file}. The first ones stand in make_preference_data.py, too, which takes the others
# as --scorer eval_human.py:people.

Score = Callable[[list[Image.Image], list[str]], list[float]]
Device = torch.device | str
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
    device: Device, model: str = CLIP_L, processor: str = "", crop: bool = False,
    good: str = "Good photo.", bad: str = "Bad photo.",
) -> Score:  # fmt: skip
    """CLIP-IQA (https://arxiv.org/abs/2207.12396): P(good) of softmax over exp(logit_scale) * cos with both texts.

    Blind to the prompt. The paper's CLIP is an RN50 without position embeddings; here it is any CLIPModel.
    """
    embed_images, embed_texts, scale = load_clip(device, model, processor, crop)
    texts = embed_texts([good, bad])
    return lambda images, prompts: (scale * embed_images(images) @ texts.T).softmax(-1)[:, 0].tolist()


def image_reward(
    device: Device, model: str = "zai-org/ImageReward", tokenizer: str = "google-bert/bert-base-uncased",
    crop: bool = False,
) -> Score:  # fmt: skip
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
    words, text_width = text["embeddings.word_embeddings.weight"].shape
    see = BlipVisionModel(BlipVisionConfig(
        image_size=size, patch_size=patch, layer_norm_eps=1e-6,
        hidden_size=width, num_attention_heads=max(1, width // 64),
        intermediate_size=len(vision["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(key.endswith("norm1.bias") for key in vision),
    ))  # fmt: skip
    read = BlipTextModel(BlipTextConfig(
        vocab_size=words, max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        hidden_size=text_width, num_attention_heads=max(1, text_width // 64), encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=sum(key.endswith("intermediate.dense.bias") for key in text),
        is_decoder=True,  # gives it the cross-attention; it is called as an encoder, without a causal mask
    ), add_pooling_layer=False)  # fmt: skip
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
        words = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        hidden = read(**words, encoder_hidden_states=see(pixels.to(device)).last_hidden_state).last_hidden_state
        return ((predict(hidden[:, 0]) - 0.16717362830052426) / 1.0333394966054072).tolist()

    return score


def blip_key(key: str) -> str:
    """The name in transformers of a weight of BLIP's image encoder, which has timm's names."""
    for theirs, ours in (
        ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers."), ("attn.", "self_attn."),
        ("attn.proj.", "attn.projection."), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
    ):  # fmt: skip
        key = key.replace(theirs, ours)
    return re.sub(r"^norm\.", "post_layernorm.", key)


def people_score(
    device: Device, model: str = "PekingU/rtdetr_v2_r50vd", pose: str = "usyd-community/vitpose-base-simple",
    count: int = 0, columns: dict[str, dict[str, Any]] | None = None,
) -> Score:  # fmt: skip
    """Are the people there whom the prompt asks for, and can their bodies be read? Mean confidence of their keypoints,
    0 to 1; nan where there are others, or nobody.

    A detector (https://arxiv.org/abs/2407.17140) finds persons with a score above 0.5 on at least 2 % of the image;
    ViTPose (https://arxiv.org/abs/2204.12484) gives their 17 COCO keypoints, and one whose shoulders have a mean
    confidence above 0.3 is there. How many there should be says `count`, or the column `people` of the prompts' file;
    without both any number will do. It is our heuristic, and sees neither fingers, nor faces, nor a third arm.
    """
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, VitPoseForPoseEstimation

    detector = load_weights(AutoModelForObjectDetection, model, device)
    estimator = load_weights(VitPoseForPoseEstimation, pose, device)
    to_pixels, to_crops = (AutoImageProcessor.from_pretrained(name, backend="pil") for name in (model, pose))
    person = detector.config.label2id.get("person")
    if person is None:
        raise ValueError("the detector has no label 'person'")

    def find_people(images: list[Image.Image]) -> list[list[list[float]]]:
        """Every image's boxes (left, top, width, height) in pixels."""
        outputs = detector(**to_pixels(images=images, return_tensors="pt").to(device))
        sizes, boxes = [(image.height, image.width) for image in images], []
        found = to_pixels.post_process_object_detection(outputs, threshold=0.5, target_sizes=sizes)
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
        confidence = torch.zeros(0, 17)
        if any(boxes):  # ViTPose's processor raises where a batch has no box at all
            crops = to_crops(images, boxes=boxes, return_tensors="pt").pixel_values.to(device)
            coco = torch.zeros(len(crops), dtype=torch.long, device=device)  # ViTPose+ has an expert per data set
            confidence = estimator(crops, dataset_index=coco).heatmaps.flatten(2).amax(dim=-1).clamp(0, 1).cpu()
        scores = []
        for prompt, found in zip(prompts, confidence.split([len(boxes_of) for boxes_of in boxes]), strict=True):
            there = found[found[:, 5:7].mean(dim=-1) > 0.3]
            told = str((columns or {}).get(prompt, {}).get("people")).strip()
            wanted = count or (len(there) if told in ("", "nan", "None", "<NA>") else int(float(told)))
            scores.append(there.mean().item() if len(there) == wanted > 0 else math.nan)
        return scores

    return score


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

    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    vlm = load_weights(AutoModelForImageTextToText, model, device, dtype)
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
        pictures, questions = [[image.convert("RGB")] for image in images], [ask(prompt) for prompt in prompts]
        inputs = processor(images=pictures, text=questions, padding=True, return_tensors="pt")
        logits = vlm(**inputs.to(device, vlm.dtype), logits_to_keep=1).logits[:, -1]
        return logits.float().softmax(-1)[:, yes].tolist()

    return score


def likeness_score(device: Device, references: str, embedder: str = "sface", threshold: float = math.nan) -> Score:
    """Is it the person? Mean cosine of an image's face to the faces in the photos of the folder `references`; with a
    `threshold` 1 or 0, whether it reaches it. nan where no face is found.

    `embedder`: sface, or module:function or file.py:function of your own, a function device -> embed(images) ->
    (B, D), a row of nan where there is no face. The paper measures 1 - cosine of ArcFace, whose models are not free.
    """
    photos, _ = find_photos(Path(references))
    embed = (sface if embedder == "sface" else find_factory(embedder))(device)

    def unit(images: list[Image.Image]) -> np.ndarray:
        features = np.asarray(embed(images), dtype=np.float64)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    known = unit([load_image(photo) for photo in photos]) if photos else np.full((1, 1), math.nan)
    known = known[~np.isnan(known).any(axis=1)]
    if not len(known):
        raise UserError(f"no face found in any image of {references}")

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        cosines = (unit(images) @ known.T).mean(axis=1)
        reaches = np.where(np.isnan(cosines), math.nan, cosines >= threshold)
        return (cosines if math.isnan(threshold) else reaches).tolist()

    return score


def sface(device: Device) -> Callable[[list[Image.Image]], np.ndarray]:
    """OpenCV's YuNet finds the largest face, SFace embeds it: (B, 128). Free to use; same person above about 0.363.

    Needs opencv-python-headless; the two models come from the hub (opencv/face_detection_yunet and
    opencv/face_recognition_sface). https://docs.opencv.org/4.x/d0/dd4/tutorial_dnn_face.html
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError("likeness needs: pip install opencv-python-headless, or embedder=file.py:function") from error
    from huggingface_hub import hf_hub_download

    detector = hf_hub_download("opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx")
    recogniser = hf_hub_download("opencv/face_recognition_sface", "face_recognition_sface_2021dec.onnx")
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


class Scorer(NamedTuple):
    """A parsed --scorer or --agree."""

    label: str  # its name in the data set
    weight: float  # its weight in the ensemble
    key: str  # a hash of all that its scores depend on, but image and prompt
    load: Callable[[Device], Score]  # makes the scoring function
    rows: dict[str, dict[str, Any]] | None  # each prompt's row of the prompts' file, for a scorer that reads them


def file_score(device: Device, file: str, missing: str = "") -> Score:
    """Scores made elsewhere: lines {"image_id": "...", "score": number or null}, with the ids that this script writes;
    null is a veto. An image that the file does not know is an error, or with missing=veto a veto, too."""
    if missing not in ("", "veto"):
        raise UserError(f"scorer {file}: missing can only be veto")
    if not Path(file).is_file():
        raise UserError(f"scorer {file}: no such file")
    table: dict[str, float] = {}
    for number, line in enumerate(Path(file).read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line.decode("utf-8-sig").strip() or "null")
            table |= {row["image_id"]: math.nan if row["score"] is None else float(row["score"])} if row else {}
        except (ValueError, KeyError, TypeError) as error:
            form = '{"image_id": "...", "score": number or null}'
            raise UserError(f"{file}, line {number}: not of the form {form}") from error

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [table.get(image.info["image_id"], math.nan) for image in images]

    score.image_ids = None if missing else table.keys()
    return score


SCORERS: dict[str, Callable[..., Score]] = {
    "pickscore": pick_score,
    "hpsv2": hps_score,
    "clip": clip_score,
    "aesthetic": aesthetic_score,
}
SCORERS.update(
    imagereward=image_reward,
    clip_iqa=clip_iqa,
    clip_iqa_sharpness=partial(clip_iqa, good="Sharp photo.", bad="Blurry photo."),
    people=people_score,
    vqa=vqa_score,
    likeness=likeness_score,
)
imagereward, people, vqa, likeness = image_reward, people_score, vqa_score, likeness_score  # as eval_human.py:people
PAPER = ("hpsv2", "imagereward", "aesthetic", "clip", "clip_iqa", "clip_iqa_sharpness", "pickscore")
WEIGHTS = {"model": "config.json", "processor": "config.json", "head": "model.safetensors"}
WEIGHTS.update({"imagereward.model": "ImageReward.pt", "pose": "config.json", "tokenizer": "config.json"})


def hash_of(*parts: Any) -> str:
    """A short name for what a cached file depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """NAME=PATH,option=value: NAME and the options, PATH among them as `model`. An option begins at a comma that a
    word and = follow, so that values may hold commas."""
    first, *rest = re.split(r",(?=\w+=)", spec)
    name, _, model = first.partition("=")
    return name, ({"model": model} if model else {}) | dict(option.split("=", 1) for option in rest)


def parse_scorer(spec: str, rows: dict[str, dict[str, Any]]) -> Scorer:
    """A --scorer, checked without loading its weights. `rows`: each prompt's row of the prompts' file, for a scorer
    with a parameter `columns`."""
    name, options = parse_spec(spec)
    label = options.pop("label", Path(name).stem if name.endswith(".jsonl") else name.rpartition(":")[2])
    weight = read_option(spec, float, options.pop("weight", "1"))
    if name.endswith(".jsonl"):
        factory, options = file_score, options | {"file": name}
    else:
        factory = SCORERS.get(name) or find_factory(name)
    known = {option.name: option for option in [*inspect.signature(factory).parameters.values()][1:]}
    reads_rows = known.pop("columns", None) is not None
    takes_any = any(option.kind is option.VAR_KEYWORD for option in known.values())
    if unknown := [] if takes_any else sorted(options.keys() - known.keys()):
        raise UserError(f"scorer {spec}: no option {unknown[0]}, only {', '.join(['label', 'weight', *known])}")
    for option, parameter in known.items():
        if option in options:
            options[option] = read_option(spec, type(parameter.default), options[option])
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            hint = " (a scorer is a factory: device, options -> score(images, prompts))" if name not in SCORERS else ""
            raise UserError(f"scorer {spec} needs {option}: {name},{option}=...{hint}")
    stands_for = {option: parameter.default for option, parameter in known.items()} | options
    files = WEIGHTS if name in SCORERS else {}
    for option, value in stands_for.items():
        needs = files.get(f"{name}.{option}", files.get(option))
        stands_for[option] = content_of(value, needs) if isinstance(value, str) and value else str(value)
    function = getattr(factory, "func", factory)
    code = code_of(function) if name in SCORERS else content_of(inspect.getsourcefile(function))
    key = hash_of(getattr(factory, "__name__", name), stands_for, code)[:8]
    if factory is file_score:
        factory("cpu", **options)  # what is wrong with it is told before anything is drawn
    options |= {"columns": rows} if reads_rows else {}
    return Scorer(label, weight, key, partial(load_scorer, spec, factory, **options), rows if reads_rows else None)


def parse_scorers(specs: list[str], rows: dict[str, dict[str, Any]]) -> list[Scorer]:
    """All of --scorer or --agree; two scorers of the same label cannot be told apart."""
    scorers = [parse_scorer(spec, rows) for spec in specs]
    if twice := [label for label, count in Counter(scorer.label for scorer in scorers).items() if count > 1]:
        raise UserError(f"two scorers are called {twice[0]}: give one of them another name with ,label=...")
    return scorers


def code_of(*functions: Callable[..., Any]) -> dict[str, str]:
    """The source of functions, and of all in this file that they name: what a kept value depends on."""
    todo, found = [*functions], {}
    while todo:
        function = todo.pop()
        if function.__name__ not in found:
            found[function.__name__] = inspect.getsource(function)
            named = (globals().get(word) for word in re.findall(r"\w+", found[function.__name__]))
            todo += [one for one in named if inspect.isfunction(one) and one.__module__ == __name__]
    return dict(sorted(found.items()))


def read_option(spec: str, kind: type, text: str) -> Any:
    """An option's text in the type of its default: bool (0 or 1), int, a finite float, else as it is."""
    try:
        value = kind(int(text)) if kind in (bool, int) else float(text) if kind is float else text
    except ValueError:
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"scorer {spec}: {text} is not a number")
    return value


def content_of(value: str, needs: str | None = None) -> str:
    """What a scorer's option stands for: of a file or folder a hash of its content (4 MB across a file of weights), of
    a name on the hub its commit, of all else the text itself. UserError for weights, which have a file that the scorer
    `needs`, that are neither."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    path, digest = Path(value), hashlib.sha256()
    if os.path.exists(path):  # Path.exists raises where a text is too long for a name
        for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
            size = file.stat().st_size
            digest.update(f"{'' if file == path else file.relative_to(path).as_posix()}|{size}|".encode())
            is_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
            with file.open("rb") as opened:
                for start in range(0, size, max(2**16, size // 64 * is_weights)):
                    opened.seek(start)
                    digest.update(opened.read(2**16))
        return digest.hexdigest()[:16]
    try:
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
            return Path(hf_hub_download(value, needs or "config.json")).parent.name
        reason = "no such file or folder"
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
    if needs:
        raise UserError(f"cannot find {value}: {reason}")
    return value


def find_factory(name: str) -> Callable[..., Score]:
    """The function that `module:function` or `path/to/file.py:function` names; what its import raises is raised."""
    module_name, colon, function = name.rpartition(":")
    if not colon:
        known = ", ".join(SCORERS)
        raise UserError(f"unknown scorer {name!r}: use {known}, module:function, file.py:function or file.jsonl")
    if not module_name.endswith(".py"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:  # one that is missing inside it keeps its traceback
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise UserError(f"scorer {name}: no module {error.name}") from error
    elif not Path(module_name).is_file():
        raise UserError(f"scorer {name}: no such file {module_name}")
    else:
        spec = importlib.util.spec_from_file_location(module_name, module_name)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"scorer {name}: {module_name} has no function {function}")
    return getattr(module, function)


def load_scorer(spec: str, factory: Callable[..., Score], device: Device, **options: Any) -> Score:
    """factory(device, **options); files that are not there are one line, an error in code keeps its traceback."""
    from safetensors import SafetensorError

    try:
        return factory(device, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if not isinstance(error, OSError) and factory not in SCORERS.values():
            raise
        raise UserError(f"cannot load the scorer {spec}: {str(error).strip().splitlines()[0]}") from error


# ---- Models ---------------------------------------------------------------------------------------------------------


BLOCKS = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}  # the U-Net's
LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's


class Model(NamedTuple):
    """One side of the comparison."""

    name: str
    kind: str  # base, lora, parts (a folder with unet/ or transformer/), pipeline (a whole one), images (finished)
    path: str = ""
    lora_scale: float = 1.0
    blocks: str = ""
    text_encoder: str = ""
    text_encoder_timesteps: tuple[int, int] | None = None
    spec: str = ""  # as it was given


MODEL_OPTIONS = {
    "lora_scale": "weight of its LoRAs, 0.5 in the paper",
    "blocks": "U-Net blocks in which its LoRA works: down, mid, up, or several with +",
    "text_encoder": "a LoRA of the text encoder that was trained apart",
    "text_encoder_timesteps": "LOW:HIGH, where the text encoder's LoRA works, 900:1000 in the paper",
    "checkpoints": "all: each of its checkpoint-STEP folders as well",
}


def parse_model(spec: str) -> list[Model]:
    """`base` or NAME=PATH[,option=value...], after it with checkpoints=all those of its training run. UserError for
    what cannot be drawn."""
    name, options = parse_spec(spec)
    path, checkpoints = options.pop("model", ""), options.pop("checkpoints", "")
    if not re.fullmatch(r"\w[\w.-]{0,63}", name) or (name != "base" and not path):
        raise UserError(f"--models {spec}: expected base or NAME=PATH; a name has letters, digits, '.', '-' and '_'")
    if unknown := options.keys() - MODEL_OPTIONS.keys():
        raise UserError(f"--models {spec}: no option {min(unknown)}, only {', '.join(MODEL_OPTIONS)}")
    kind = kind_of(path) if path else "base"
    if name == "base" and kind not in ("base", "images"):
        raise UserError(f"--models {spec}: base is --pretrained_model_name_or_path; give this model another name")
    needs_lora = "lora_scale" in options and kind != "lora" and "text_encoder" not in options
    if (options and kind in ("base", "images")) or ("blocks" in options and kind != "lora") or needs_lora:
        raise UserError(f"--models {spec}: {', '.join(options)}, but no LoRA that it could belong to")
    try:
        options["lora_scale"] = float(options.get("lora_scale", 1))
        if window := options.get("text_encoder_timesteps"):
            low, high = map(int, window.split(":"))
            options["text_encoder_timesteps"] = (low, high)
    except ValueError:
        raise UserError(f"--models {spec}: a scale is a number, timesteps are as in 900:1000") from None
    if not {*options.get("blocks", "up").split("+")} <= BLOCKS.keys():
        raise UserError(f"--models {spec}: blocks are {', '.join(BLOCKS)}, or several with +")
    for file in filter(None, (path if kind == "lora" else "", options.get("text_encoder"))):
        lora_file(file)
    model = Model(name, kind, path, **options, spec=spec)
    if not checkpoints:
        return [model]
    numbers = [folder.name.removeprefix("checkpoint-") for folder in Path(path).glob("checkpoint-*")]
    last = read_settings(Path(path)).get("max_train_steps")
    steps = sorted({int(number) for number in numbers if number.isdigit()} - {last})
    if checkpoints != "all" or not steps:
        raise UserError(f"--models {spec}: checkpoints=all needs checkpoint-STEP folders (--checkpointing_steps)")
    return [*(model._replace(name=f"{name}-{step}", path=f"{path}/checkpoint-{step}") for step in steps), model]


def parse_models(specs: Sequence[str]) -> list[Model]:
    """All of --models, base first; UserError without base, without any other, or with two of one name."""
    models = sorted((model for spec in specs for model in parse_model(spec)), key=lambda model: model.name != "base")
    names = [model.name for model in models]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"--models: two models are called {twice[0]}")
    if names[:1] != ["base"] or len(names) < 2:
        raise UserError("--models needs base, and a tuned model to compare with it, as in dpo=dpo-human-lora")
    return models


def kind_of(path: str) -> str:
    """What a model's path is, see Model; UserError where it is nothing that can be compared."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if (folder / "unet").is_dir() or (folder / "transformer").is_dir():
        return "parts"
    if folder.is_file() or (folder / "training_settings.json").is_file() or any(folder.glob("*.safetensors")):
        return "lora"
    if folder.is_dir() and find_photos(folder)[0]:
        return "images"
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(f"no model at {path}: neither a LoRA, nor unet/, nor transformer/, nor images")
    return "lora"  # of the hub


def lora_file(path: str) -> str:
    """The file of a LoRA, or its name on the hub; UserError where a folder has none or several."""
    folder = Path(path)
    if folder.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"{path} is no .safetensors file")
    if not folder.is_dir():
        return path
    found = [folder / name for name in LORA_NAMES if (folder / name).is_file()] or sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{path} holds no {LORA_NAMES[0]}: has its training finished?")
    if len(found) > 1 and found[0].name not in LORA_NAMES:
        raise UserError(f"{path} holds {len(found)} weight files: name the one to load, such as {found[0]}")
    return str(found[0])


def model_key(args: argparse.Namespace, model: Model) -> str:
    """A hash of all that a model's images depend on, beside prompt and index; of no path and no time."""
    names = "mixed_precision sampler num_inference_steps guidance_scale negative_prompt resolution height width seed"
    whole = (args.pretrained_model_name_or_path, args.revision, args.variant)
    name, *source = (model.path, None, None) if model.kind == "pipeline" else whole
    parts = [content_of(name, "model_index.json"), source]
    if model.kind == "parts":
        folders = (Path(model.path, name) for name in ("unet", "transformer", *TEXT_ENCODERS))
        parts += [content_of(str(folder)) for folder in folders if folder.is_dir()]
    loras = [model.path] * (model.kind == "lora") + [model.text_encoder] * bool(model.text_encoder)
    parts += [content_of(lora_file(path), LORA_NAMES[0]) for path in loras]
    if args.identity:
        kind, options = args.identity
        files = options | ({"model": lora_file(options["model"])} if kind == "lora" else {})
        parts.append([kind, *(content_of(value) for _, value in sorted(files.items()))])
    own = (model.lora_scale, model.blocks, model.text_encoder_timesteps)
    return hash_of(parts, own, [getattr(args, name) for name in names.split()])


def parse_identity(spec: str) -> tuple[str, dict[str, str]]:
    """lora=PATH[,scale=S], or ip_adapter=FILE,image=FILE_OR_FOLDER[,scale=S][,image_encoder=PATH]; UserError."""
    kind, options = parse_spec(spec)
    known = {"lora": {"model", "scale"}, "ip_adapter": {"model", "scale", "image", "image_encoder"}}.get(kind, set())
    if not {"model"} <= options.keys() <= known or (kind == "ip_adapter" and "image" not in options):
        raise UserError(f"--identity {spec}: expected lora=PATH[,scale=S] or ip_adapter=FILE,image=PATH[,scale=S]")
    files = [lora_file(options["model"]) if kind == "lora" else options["model"], options.get("image", __file__)]
    if lost := [file for file in files if not Path(file).exists()]:
        raise UserError(f"--identity {spec}: no such file: {lost[0]}")
    read_option(f"--identity {spec}", float, options.setdefault("scale", "1"))
    return kind, options


# ---- Drawing --------------------------------------------------------------------------------------------------------


TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


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


def read_lora(
    pipe: DiffusionPipeline, source: str, cache_dir: str | None = None
) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
    """A LoRA file of diffusers, PEFT or kohya, {part of the pipeline: {layer: (down, up, scale)}}: the layer's weight
    becomes W + scale up @ down. UserError for a DoRA, and for tensors that have no place in the pipeline's parts."""
    from huggingface_hub import hf_hub_download
    from safetensors import SafetensorError, safe_open

    names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    places = [Path(source, name) for name in names] if Path(source).is_dir() else [Path(source)]
    try:
        file = next((place for place in places if place.is_file()), None)
        file = file or Path(hf_hub_download(source, names[0], cache_dir=cache_dir))
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no LoRA {source}: {str(error).splitlines()[0]}") from error
    denoiser, config = "unet" if hasattr(pipe, "unet") else "transformer", file.with_name("adapter_config.json")
    if config.is_file():  # PEFT's own format
        metadata |= json.loads(config.read_text(encoding="utf-8"))
    metadata |= {f"{denoiser}.{key}": value for key, value in metadata.items() if "." not in key}
    state = {key.removeprefix("base_model.model.").replace(".default.", "."): value for key, value in state.items()}
    bare = {name for name, _ in getattr(pipe, denoiser).named_children()}
    state = {f"{denoiser}.{key}" if key.partition(".")[0] in bare else key: value for key, value in state.items()}
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in state):
        raise UserError(f"{source} is a DoRA, not a LoRA")
    try:
        converted = pipe.lora_state_dict(state, **({"unet_config": pipe.unet.config} if denoiser == "unet" else {}))
    except ValueError as error:
        raise UserError(f"{source} is no LoRA that can be read: {str(error).splitlines()[0]}") from error
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)

    layers, lost = {}, []
    for key, down in state.items():
        ending = r"([a-z_0-9]+)\.(.+?)(?:\.lora_linear_layer|\.lora|_lora)?\.(lora_A|down)\.weight"
        match = re.fullmatch(ending, key.replace(".processor.", "."))
        if match is None:
            lost += [] if re.search(r"(lora_B|up)\.weight$", key) else [key]
            continue
        part, layer, _ = match.groups()
        module, text = pipe.components.get(part), re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", layer)
        modules = dict(module.named_modules()) if module is not None else {}
        spellings = (layer, f"{layer}.0", text, text.removeprefix("text_model."), f"text_model.{text}")
        name = next((one for one in spellings if hasattr(modules.get(one), "weight")), None)
        up = state[key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("down.weight", "up.weight")]
        fits = name and (len(up), down.shape[1]) == modules[name].weight.shape[:2]
        if module is not None and not fits:
            lost.append(key)
            continue
        own = {end: metadata.get(f"{part}.{end}") for end in ("lora_alpha", "alpha_pattern", "use_rslora")}
        alpha = (alphas or {}).get(f"{key.split('.lora.')[0]}.alpha", own["lora_alpha"] or len(down))
        patterns = (own["alpha_pattern"] or {}).items()
        alpha = next((value for end, value in patterns if re.fullmatch(rf"(.*\.)?({end})", layer)), alpha)
        scale = alpha / (math.sqrt(len(down)) if own["use_rslora"] else len(down))
        layers.setdefault(part, {})[name or layer] = (down, up, scale)
    if lost or not layers:
        why = f"{len(lost)} of its tensors have no place in this model, such as {lost[0]}" if lost else "it is empty"
        raise UserError(f"the LoRA {source} does not fit: {why}")
    return layers


def load_lora(module: torch.nn.Module, layers: dict[str, tuple[Tensor, Tensor, float]], adapter: str) -> None:
    """Adds an adapter with the ranks, alphas and weights of a file's layers (see read_lora), frozen and in fp32, and
    turns it on."""
    from peft import LoraConfig

    ranks = {name: len(down) for name, (down, _, _) in layers.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in layers.items()}
    rank, alpha = (Counter(own.values()).most_common(1)[0][0] for own in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        target_modules=list(layers),
    )
    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # "default", when "reference" comes
    module.add_adapter(config, adapter_name=adapter)
    for name, (down, up, _) in layers.items():
        layer = module.get_submodule(name)
        for own, weight in ((layer.lora_A[adapter], down), (layer.lora_B[adapter], up)):
            weight = weight.to(layer.weight.device, torch.float32, copy=True)
            own.weight = torch.nn.Parameter(weight, requires_grad=False)


def load_pipeline(args: argparse.Namespace, model: Model) -> tuple[DiffusionPipeline, UNet, dict[str, Any]]:
    """A model's pipeline on the CPU, with its LoRAs and the person's, without SD's safety checker; its family; and
    what its call takes beside prompts. UserError for what cannot be drawn with."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    name, dtypes = args.pretrained_model_name_or_path, {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes.get(args.mixed_precision or ("fp16" if torch.cuda.is_available() else "no"), torch.float32)
    source = {"revision": args.revision, "variant": args.variant}
    if model.kind == "pipeline":
        name, source = model.path, {}
    try:
        config = DiffusionPipeline.load_config(name, revision=source.get("revision"))
        if config["_class_name"] not in FAMILIES:
            raise UserError(f"{name} is a {config['_class_name']}: {', '.join(FAMILIES)} can draw")
        family = FAMILIES[config["_class_name"]]()
        parts = {key: None for key, value in config.items() if isinstance(value, list) and value[0] is None}  # no T5
        if "safety_checker" in config:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = DiffusionPipeline.from_pretrained(
            name, torch_dtype={"default": dtype, "vae": torch.float32}, **source, **parts
        )
        for part in (family.model, *TEXT_ENCODERS) if model.kind == "parts" else ():
            if Path(model.path, part).is_dir():
                old = getattr(pipe, part)
                new = type(old).from_pretrained(Path(model.path, part), torch_dtype=dtype)
                for key in ("in_channels", "cross_attention_dim", "hidden_size"):
                    size = getattr(new.config, key, None)
                    if size != getattr(old.config, key, None):
                        raise UserError(f"{model.path}/{part} does not fit the base model: {key} {size}")
                setattr(pipe, part, new)
    except (OSError, ValueError, SafetensorError) as error:
        hint = " (where all files are fp16, set --variant fp16)" * (isinstance(error, OSError) and not args.variant)
        raise UserError(f"cannot load {model.name}: {str(error).splitlines()[0]}{hint}") from error
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, family.model)
    says_nothing = "force_upcast" in pipe.vae.config.get("_use_default_values", [])  # SD 1.x's and 2.x's: it holds
    if dtype == torch.float16 and (says_nothing or not pipe.vae.config.force_upcast):
        pipe.vae.to(dtype)  # bf16 is too coarse for pixels
    for module in (denoiser, pipe.vae):
        module.to(memory_format=torch.channels_last)
    points = len(family.path(pipe, 0).t)
    if args.num_inference_steps > points:
        raise UserError(f"--num_inference_steps {args.num_inference_steps}: the model has {points} timesteps")
    if args.sampler == "dpmsolver":
        pipe.scheduler = family.sampler(pipe)

    loras = {"tuned": (model.path, model.lora_scale)} if model.kind == "lora" else {}
    loras |= {"text": (model.text_encoder, model.lora_scale)} if model.text_encoder else {}
    kind, person = args.identity or (None, {})
    loras |= {"identity": (person["model"], float(person["scale"]))} if kind == "lora" else {}
    for adapter, (source, strength) in loras.items():
        for part, layers in read_lora(pipe, lora_file(source)).items():
            if getattr(pipe, part, None) is None:
                raise UserError(f"{source} adapts {part}, which {name} does not have")
            if adapter == "text" and part == family.model:
                raise UserError(f"{source} adapts more than the text encoder: give it as a model of its own")
            if adapter == "tuned" and model.blocks and part == family.model:
                kept = tuple(BLOCKS[block] for block in model.blocks.split("+"))
                layers = {layer: weights for layer, weights in layers.items() if layer.startswith(kept)}
            if not layers:
                raise UserError(f"{model.name}: {source} has no layers in blocks={model.blocks}")
            layers = {layer: (down, up, scale * strength) for layer, (down, up, scale) in layers.items()}
            load_lora(getattr(pipe, part), layers, adapter)
    adapted = [part for part in pipe.components.values() if getattr(part, "peft_config", None)]
    for part in adapted:
        part.set_adapter(list(part.peft_config))
    if model.text_encoder_timesteps and (family.model != "unet" or not {*adapted} - {denoiser}):
        raise UserError(f"{model.name}: text_encoder_timesteps needs a U-Net, and a LoRA of a text encoder")
    return pipe, family, load_ip_adapter(pipe, person) if kind == "ip_adapter" else {}


def load_ip_adapter(pipe: DiffusionPipeline, options: dict[str, str]) -> dict[str, Any]:
    """Loads the IP-Adapter of --identity; returns what the pipeline's call takes."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    file, image, encoder = Path(options["model"]), Path(options["image"]), options.get("image_encoder")
    if encoder:
        vision = CLIPVisionModelWithProjection.from_pretrained(encoder, torch_dtype=pipe.unet.dtype)
        size = vision.config.image_size
        pipe.register_modules(image_encoder=vision, feature_extractor=CLIPImageProcessor(size=size, crop_size=size))
    folder = None if encoder else "image_encoder"
    pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=folder)
    pipe.set_ip_adapter_scale(float(options["scale"]))
    return {"ip_adapter_image": [[load_image(photo) for photo in find_photos(image)[0] or [image]]]}


@torch.inference_mode()
def encode_prompts(
    pipe: DiffusionPipeline, family: UNet, prompts: list[str], negative_prompt: str, guided: bool
) -> dict[str, Tensor]:
    """The embeddings (P, ...) of P prompts, as the pipeline's call takes them; guided: with the negative prompt's
    (1, ...)."""
    text = family.encode_text(pipe, prompts)
    if guided:
        negative = [negative_prompt] if negative_prompt else None
        both = family.encode_text(pipe, [""], do_classifier_free_guidance=True, negative_prompt=negative)
        text |= {name: value for name, value in both.items() if name.startswith("negative")}
    return text


@torch.inference_mode()
def sample(
    pipe: DiffusionPipeline, family: UNet, text: dict[str, Tensor], rows: Sequence[int], seeds: Sequence[int],
    height: int, width: int, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draws an image for every prompt `rows[i]` of `text` (see encode_prompts) with the seed `seeds[i]`.

    Batches mix prompts freely: each image has its own CPU generator and is decoded by itself from what is kept of its
    latents, so it depends on (model, prompt, seed) alone. `options`: what else a call of the pipeline takes. Returns
    pixels (B, 3, H, W), about [-1, 1], and the sampler's own latents, scaled, (B, C, h, w) in fp16.
    """
    shared = {name: value.expand(len(rows), *value.shape[1:]) for name, value in text.items() if "negative" in name}
    own = {name: value[list(rows)] for name, value in text.items() if "negative" not in name}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options |= {"height": height, "width": width, "output_type": "latent"}
    latents = pipe(**own, **shared, generator=generators, **options).images
    latents = family.unpack(pipe, latents, height, width).to(torch.float16)
    return torch.cat([family.to_pixels(pipe, x_0[None]).float() for x_0 in latents]), latents


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


def encode_with_window(
    pipe: DiffusionPipeline, family: UNet, model: Model, prompts: list[str], args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The prompts' embeddings, and the options of the pipeline's call that change them at the ends of
    text_encoder_timesteps: the paper's text-encoder LoRA works at timesteps 900 to 1000 alone."""
    guided = args.guidance_scale > 1
    tuned = encode_prompts(pipe, family, prompts, args.negative_prompt, guided)
    if not model.text_encoder_timesteps:
        return tuned, {}
    encoders = [part for part in map(pipe.components.get, TEXT_ENCODERS) if getattr(part, "peft_config", None)]
    for part in encoders:
        others = [name for name in part.peft_config if name == "identity"]
        part.set_adapter(others) if others else part.disable_adapters()
    plain = encode_prompts(pipe, family, prompts, args.negative_prompt, guided)
    for part in encoders:
        part.enable_adapters()
        part.set_adapter(list(part.peft_config))
    low, high = model.text_encoder_timesteps

    def embeds_at(timestep: float) -> dict[str, Tensor]:
        return tuned if low <= timestep <= high else plain

    def inner(embeds: dict[str, Tensor]) -> dict[str, Tensor]:  # as the pipeline's loop names and joins them
        names = {"prompt_embeds": "prompt_embeds", "add_text_embeds": "pooled_prompt_embeds"}
        both = {ours: [embeds.get(f"negative_{name}"), embeds[name]] for ours, name in names.items() if name in embeds}
        both = {ours: [n.expand_as(p), p] if guided else [p] for ours, (n, p) in both.items()}
        return {ours: torch.cat(sides) for ours, sides in both.items()}

    def switch(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        following = pipe.scheduler.timesteps[step + 1 : step + 2].tolist()
        if following and embeds_at(following[0]) is not embeds_at(float(timestep)):
            tensors |= inner(embeds_at(following[0]))
        return tensors

    pipe.scheduler.set_timesteps(args.num_inference_steps)
    options = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": list(inner(tuned))}
    return embeds_at(float(pipe.scheduler.timesteps[0])), options


def claim_folder(folder: Path, key: str, prompts: Sequence[str]) -> None:
    """Makes images/NAME ready for images of this key. Those of another key or of other prompts wait beside it, under
    images/NAME+HASH, and come back with their settings."""

    def record_of(place: Path) -> dict[str, Any]:
        file = place / "settings.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"key": "", "prompts": []}

    def fits(place: Path) -> bool:
        record = record_of(place)
        return record["key"] == key and all(map(str.__eq__, record["prompts"], prompts))  # a longer list may go on

    if folder.is_dir() and any(folder.iterdir()) and not fits(folder):
        beside = folder.with_name(f"{folder.name}+{hash_of(record_of(folder))}")
        folder.rename(beside)
        print(f"set aside  images of other settings or prompts: {beside}")
    if not folder.is_dir() and (other := next(filter(fits, folder.parent.glob(f"{folder.name}+*")), None)):
        other.rename(folder)
    record = {"key": key, "prompts": max(record_of(folder)["prompts"], list(prompts), key=len)}
    text = json.dumps(record, indent=1)
    write_text(folder / "settings.json", text)


@torch.inference_mode()
def draw_missing(args: argparse.Namespace, model: Model, images: pd.DataFrame, state: PartialState, what: str) -> None:
    """Draws the images of a model, rows of `images`, that are not there yet; each process draws its share."""
    missing = [not is_finished(path, seed) for path, seed in zip(images.path, images.seed, strict=True)]
    mine = images[missing][state.process_index :: state.num_processes]
    state.wait_for_everyone()  # all have looked before one draws
    pipe = None
    if len(mine):
        pipe, family, person = load_pipeline(args, model)
        pipe.to(state.device)
        side = getattr(pipe, "default_sample_size", None) or getattr(pipe, family.model).config.sample_size
        side *= pipe.vae_scale_factor
        size = args.height or args.resolution or side, args.width or args.resolution or side
        if size[0] % family.multiple or size[1] % family.multiple:
            raise UserError(f"--height {size[0]} --width {size[1]}: it takes multiples of {family.multiple}")
        steps = {family.guidance[0]: args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    with progress(len(mine), state, what, "img") as bar:
        for start in range(0, len(mine), args.batch_size):
            batch = mine[start : start + args.batch_size]
            text, window = encode_with_window(pipe, family, model, batch.prompt.tolist(), args)
            rows, seeds = range(len(batch)), batch.seed.tolist()
            try:
                pixels, latents = sample(pipe, family, text, rows, seeds, *size, **steps, **person, **window)
            except torch.OutOfMemoryError as error:
                told = f"out of memory: set --batch_size below {args.batch_size}; what is finished is kept"
                raise UserError(told) from error
            if not pixels.isfinite().all():
                raise UserError(f"{model.name} draws images that are not finite: try another --mixed_precision")
            pictures = pipe.image_processor.postprocess(pixels, output_type="pil")
            for row, picture, latent in zip(batch.itertuples(), pictures, latents.double().flatten(2), strict=True):
                moments = {"latent_mean": latent.mean(-1), "latent_std": latent.std(-1, correction=0)}
                text_of = {"prompt": row.prompt, "seed": str(row.seed)}
                text_of |= {name: json.dumps(values.tolist()) for name, values in moments.items()}
                info = PngImagePlugin.PngInfo()
                for name, value in text_of.items():
                    info.add_itxt(name, value)
                write_whole(row.path, partial(picture.save, format="PNG", pnginfo=info, compress_level=1))
            bar.update(len(batch))
    state.wait_for_everyone()
    if pipe is not None:
        del pipe
        gc.collect()
        torch.cuda.empty_cache()


# ---- Measuring ------------------------------------------------------------------------------------------------------


def progress(total: int, state: PartialState, what: str, unit: str) -> tqdm:
    """A bar for this process's share of the work; only the main process shows its own."""
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    hidden = not (total and state.is_main_process)
    return tqdm(total=total, desc=what + share, unit=unit, smoothing=0.1, disable=hidden)


CUT_SHORT = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)  # what numpy raises for such a file


def measure_missing(
    measure: Scorer, images: pd.DataFrame, args: argparse.Namespace, state: PartialState, ratio: float
) -> np.ndarray:
    """A measure of all images, (N,) or (N, C): what measures/LABEL-KEY/ holds, by the images' content, prompt and the
    photos' `ratio`, and the rest, every process its share. The photos are cut to the images' width by height, `ratio`:
    their shape would tell them from images. The measure is loaded if anything is missing, and let go after."""
    from accelerate.utils import broadcast_object_list

    folder = Path(args.output_dir, "measures", f"{re.sub('[^A-Za-z0-9_.-]', '_', measure.label)}-{measure.key}")
    own = [hash_of(str((measure.rows or {}).get(prompt)), prompt) for prompt in images.prompt]
    own = [hash_of(ratio) if model == PHOTOS else row for row, model in zip(own, images.model, strict=True)]
    ids = images.content + "-" + pd.Series(own, images.index)

    def read_values() -> dict[str, np.ndarray]:
        values = {}
        for file in folder.glob("[!.]*.npz"):
            with contextlib.suppress(*CUT_SHORT), np.load(file) as part:
                values |= dict(zip(part["ids"].tolist(), part["values"], strict=True))
        return values

    values = read_values() if state.is_main_process else {}
    missing = images[[one not in values for one in ids]] if state.is_main_process else None
    missing = broadcast_object_list([missing])[0]
    mine = missing[~ids[missing.index].duplicated()][state.process_index :: state.num_processes]
    function = measure.load(state.device) if len(mine) else None
    known = getattr(function, "image_ids", None)
    if lost := sorted(set(mine.image_id) - set(known)) if known is not None else []:
        told = f"no score for {len(lost)} images, such as {lost[0]}"
        raise UserError(f"{measure.label} has {told}: give them one, or null, or add ,missing=veto")

    def load(row: Any) -> Image.Image:
        image = load_image(row.path)
        if row.model == PHOTOS:
            width = min(image.width, round(image.height * ratio))
            height = min(image.height, round(image.width / ratio))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        image.info["image_id"] = row.image_id
        return image

    with progress(len(mine), state, measure.label, "img") as bar, ThreadPoolExecutor(8) as threads:
        for start in range(0, len(mine), 256):
            part, found = mine[start : start + 256], []
            for first in range(0, len(part), args.batch_size):
                batch = part[first : first + args.batch_size]
                pictures = list(threads.map(load, batch.itertuples()))
                try:
                    scores = list(function(pictures, batch.prompt.tolist()))
                except torch.OutOfMemoryError as error:
                    told = f"out of memory: set --batch_size below {args.batch_size}; what is finished is kept"
                    raise UserError(told) from error
                if len(scores) != len(batch):
                    raise UserError(f"{measure.label} gave {len(scores)} scores for {len(batch)} images")
                found += scores
                bar.update(len(batch))
            names = ids[part.index].tolist()
            np.savez_compressed(file := io.BytesIO(), ids=np.array(names), values=np.array(found, dtype=np.float64))
            write_whole(folder / f"{hash_of(names)}.npz", lambda path, file=file: path.write_bytes(file.getvalue()))
    if function is not None:
        del function
        gc.collect()  # hooks of large models refer to each other
        torch.cuda.empty_cache()
    state.wait_for_everyone()
    values = read_values() if len(missing) or not values else values
    return np.stack([values[one] for one in ids])


def measure_colour(images: list[Image.Image], prompts: list[str]) -> list[list[float]]:
    """colour_statistics of images, at most 512 pixels a side, as rows in the order of COLOUR_COLUMNS."""

    def colours(image: Image.Image) -> list[float]:
        image = image.copy()
        image.thumbnail((512, 512), Image.Resampling.BOX)
        found = colour_statistics(np.asarray(image))
        return [found[column] for column in COLOUR_COLUMNS]

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(colours, images))


def image_features(device: Device, name: str) -> Callable[[list[Image.Image], list[str]], np.ndarray]:
    """Features (N, D) of images: of a DINOv2 or CLIPModel the class token after the last norm; of a TorchScript file,
    such as NVIDIA's inception-2015-12-05.pt, FID's 2048: model(uint8 (N, 3, 299, 299), return_features=True), images
    brought to 299 x 299 by PIL's antialiased bicubic filter, as clean-fid does (https://arxiv.org/abs/2104.11222)."""
    from transformers import AutoImageProcessor, AutoModel

    if Path(name).is_file():
        try:
            inception = torch.jit.load(name, map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"--feature_model {name} is no TorchScript file: {str(error).splitlines()[-1]}") from error

        @torch.inference_mode()
        def features(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
            resized = [np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC)) for image in images]
            pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()
            return inception(pixels.to(device), return_features=True).double().cpu().numpy()

        return features
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    model = load_weights(AutoModel, name, device)
    vision = getattr(model, "vision_model", model)

    @torch.inference_mode()
    def features(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        squares = [ImageOps.pad(image, (max(image.size), max(image.size))) for image in images]
        pixels = processor(images=squares, return_tensors="pt")["pixel_values"].to(device)
        return vision(pixel_values=pixels).pooler_output.double().cpu().numpy()

    return features


def clip_embeddings(device: Device, name: str) -> Callable[[list[Image.Image], list[str]], np.ndarray]:
    """A CLIPModel's image embeddings, projected and of length 1, (N, D), of images padded to a square: CMMD's."""
    embed_images, _, _ = load_clip(device, name, "", crop=False)
    return lambda images, prompts: embed_images(images).double().cpu().numpy()


# ---- Comparing ------------------------------------------------------------------------------------------------------


def compare(base: pd.Series, tuned: pd.Series) -> dict[str, Any]:
    """Tuned against base on one metric, a value per prompt each (index: prompt_id); prompts that lack one are left
    out on both sides, of the means too."""
    both = base.index[base.notna() & tuned.reindex(base.index).notna()]
    a, b = base[both].to_numpy(float), tuned[both].to_numpy(float)
    wins, losses = int((b > a).sum()), int((b < a).sum())
    low, high = win_interval(wins, len(a) - wins - losses, losses)
    row = {"n": len(a), "win_rate": win_rate(b, a), "low": low, "high": high, "ties": len(a) - wins - losses}
    means = {name: float(side.mean()) if len(side) else math.nan for name, side in (("base", a), ("tuned", b))}
    return row | {"p": sign_test(wins, losses)} | means


RESULT_COLUMNS = ["model", "metric", "role", "n", "win_rate", "low", "high", "ties", "p", "p_holm", "base", "tuned"]
RESULT_COLUMNS += ["missing"]


def compare_models(prompts: pd.DataFrame, roles: dict[str, str], carried: list[dict[str, Any]]) -> pd.DataFrame:
    """The table of results: a row for each tuned model and metric, see `compare`, with p_holm and `missing`, how many
    prompts fewer than the fullest metric it has.

    `prompts`: a column per metric, index (model, prompt_id), base first; of votes the tuned model's share. `carried`:
    rows of an earlier run. The headline is tested alone; Holm's correction is over a model's other metrics.
    """
    rows = []
    for model in prompts.index.unique("model")[1:]:
        sides = prompts.loc["base"], prompts.loc[model]
        own = [row for row in carried if row["model"] == model]
        for label, role in reversed(roles.items()):
            base, tuned = (side[label] for side in sides)
            row = compare(1 - tuned if role == "votes" else base, tuned)
            own = [{"model": model, "metric": label, "role": role} | row] * (row["n"] > 0) + own
        others = [row for row in own if row["role"] != "headline"]
        for row, p_holm in zip(others, holm([row["p"] for row in others]), strict=True):
            row["p_holm"] = p_holm
        for row in own:
            row["p_holm"] = row["p"] if row["role"] == "headline" else row["p_holm"]
            row["missing"] = max(other["n"] for other in own) - row["n"]
        rows += own
    return pd.DataFrame(rows, columns=RESULT_COLUMNS)


def compare_groups(prompts: pd.DataFrame, groups: pd.DataFrame, headline: str, at_least: int = 8) -> pd.DataFrame:
    """The headline by group of prompts, a row for each tuned model, column of `groups` (index: prompt_id) and value of
    it that `at_least` so many prompts have; Holm's correction is over a model's groups."""
    rows = []
    for model in prompts.index.unique("model")[1:]:
        own = []
        for column in groups:
            for value, ids in groups.groupby(column).groups.items():
                sides = (prompts.loc[side][headline].reindex(ids) for side in ("base", model))
                row = {"model": model, "column": column, "group": str(value)} | compare(*sides)
                own += [row] if row["n"] >= at_least else []
        for row, p_holm in zip(own, holm([row["p"] for row in own]), strict=True):
            row["p_holm"] = p_holm
        rows += own
    return pd.DataFrame(rows)


def compare_colour(images: pd.DataFrame) -> pd.DataFrame:
    """Colour of each tuned model against base, a row per statistic: base, tuned, difference, low, high, over prompts;
    and the distances delta_e, hue and hue_images (degrees) and latents (std of base), which are never negative and so
    have no interval that could hold, but for delta_e. `photos`: the mean of the real photos, where there are."""
    rows, photos = [], images[images.model == PHOTOS]
    by_model = {name: own.set_index(["prompt_id", "index"]) for name, own in images.groupby("model", sort=False)}
    for name in [name for name in by_model if name not in ("base", PHOTOS)]:
        shared = by_model["base"].index.intersection(by_model[name].index)
        base, tuned = (by_model[side].loc[shared] for side in ("base", name))
        a, b = (side.groupby("prompt_id")[[*COLOURS]].mean() for side in (base, tuned))
        for key in COLOURS:
            moved = (b[key] - a[key]).to_numpy()
            low, high = bootstrap_interval(np.mean, moved)
            row = {"statistic": key, "base": a[key].mean(), "tuned": b[key].mean(), "difference": moved.mean()}
            rows.append({"model": name} | row | {"low": low, "high": high, "photos": photos[key].mean()})
        labs = [side[["L", "a", "b"]].to_numpy() for side in (a, b)]
        squares = np.array([squared_delta_e(*labs), *jackknife_interval(squared_delta_e, *labs)])
        distances = {"delta_e": np.sqrt(np.maximum(0, squares))}  # np.maximum: max(0.0, nan) is 0.0
        distances["hue"] = [hue_distance(*(circular_mean(side.hue.to_numpy()) for side in (base, tuned)))]
        distances["hue_images"] = [np.nanmean(hue_distance(base.hue.to_numpy(), tuned.hue.to_numpy()))]
        means = [column for column in images if str(column).startswith("latent_mean_")]
        stds = [column.replace("mean", "std") for column in means]
        if means and not (base[means].isna().any(axis=None) or tuned[means].isna().any(axis=None)):
            mean, std = base[means].to_numpy(), base[stds].to_numpy()
            whole = np.sqrt((std**2 + mean**2).mean(axis=0) - mean.mean(axis=0) ** 2)  # over the pixels of all images
            distances["latents"] = [latent_shift(mean, tuned[means].to_numpy(), whole)]
        for key, (value, *interval) in distances.items():
            low, high = interval or (math.nan, math.nan)
            rows.append({"model": name, "statistic": key, "difference": float(value), "low": low, "high": high})
    return pd.DataFrame(rows)


DISTANCES = {"KD": ("features", kernel_distance), "FD": ("features", frechet_distance), "CMMD": ("clip", cmmd)}


def compare_realism(images: pd.DataFrame, features: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    """How far each model's images are from the photos, a row per model and distance: value, floor (what as many photos
    read against the others), and of tuned models difference, low, high; lower is better.

    features: (N, D) of the rows of `images` by name, see DISTANCES. All models have the same images of the same
    prompts. The interval is a jackknife over prompts; the photos are fixed.
    """
    rows, places = [], {}
    for name, own in images.reset_index(drop=True).groupby("model", sort=False):
        places[name] = pd.Series(own.index, pd.MultiIndex.from_frame(own[["prompt_id", "index"]]))
    photos = places.pop(PHOTOS).to_numpy()
    shared = pd.concat(places, axis=1).dropna().astype(int).sort_index()  # a row per image that all models have
    by_prompt = shared.groupby("prompt_id")
    each = by_prompt.size().min()
    shared = shared[by_prompt.cumcount() < each]  # all prompts count alike
    for kind, (label, distance_to) in tqdm(DISTANCES.items(), "distances to photos", unit="distance"):
        known = features[label]
        to_photos, floor = distance_to(known[photos]), real_floor(distance_to, known[photos], len(shared), seed)

        def distance(x: np.ndarray, to_photos: Distance = to_photos) -> float:  # (prompts, images of each, D)
            return to_photos(x.reshape(-1, x.shape[-1]))

        def difference(x: np.ndarray, y: np.ndarray, distance: Callable[..., float] = distance) -> float:
            return distance(y) - distance(x)

        of_models = {name: known[place].reshape(-1, each, known.shape[1]) for name, place in shared.items()}
        for name, own in of_models.items():
            row = {"model": name, "distance": kind, "value": distance(own), "floor": floor}
            if name != "base":
                low, high = jackknife_interval(difference, of_models["base"], own, seed=seed)
                row |= {"difference": difference(of_models["base"], own), "low": low, "high": high}
            rows.append(row | {"images": len(shared), "photos": len(photos)})
    return pd.DataFrame(rows)


NOTICEABLE = 2.3  # the just noticeable difference in CIE76 Delta E
VISIBLE = {"chroma": NOTICEABLE, "L_std": NOTICEABLE, "clipped": 0.05}  # moves of COLOURS that a mean colour hides


def verdict(
    name: str, results: pd.DataFrame, colour: pd.DataFrame, realism: pd.DataFrame, identical: float
) -> list[tuple[str, str]]:
    """A model's comparison in sentences, each with a tone: good, bad or plain. The first says whether to use it, the
    second what it costs. `results`, `colour`, `realism`: the model's rows; identical: share of images equal to base's.

    Reward hacking: the training scorer rises and the headline does not. Where the headline rises and something else
    falls it is a trade-off, told with its size.
    """
    if identical == 1:
        return [("plain", f"{name} draws the very images of base: nothing was changed.")]
    head, rest = next(results[results.role == "headline"].itertuples(), None), results[results.role != "headline"]
    gained, lost = (rest[(rest.p_holm < 0.05) & side] for side in (rest.win_rate > 0.5, rest.win_rate < 0.5))
    risen, also = (gained[(gained.role == "training") == is_training] for is_training in (True, False))
    better = bool(head) and head.p < 0.05 and head.win_rate > 0.5
    of = f"it wins {rated(head)} of {head.n} prompts ({moved(head)})" if head else ""
    if not head:
        sentences = [("bad", f"No reason to use {name}: no scorer that is held out says anything of it.")]
    elif better:
        sentences = [("good", f"Use {name}: it draws better than base by {head.metric}: {of}.")]
    elif head.p < 0.05:
        sentences = [("bad", f"Do not use {name}: it draws worse than base by {head.metric}: {of}.")]
    else:
        sentences = [("plain", f"No reason to use {name}: by {head.metric} it cannot be told from base: {of}.")]
    costs = [f"{row.metric} (wins {rated(row)}, {moved(row)})" for row in lost.itertuples()]
    realism = [row for row in realism.itertuples() if row.distance != "FD" or min(row.images, row.photos) >= 2048]
    costs += [f"{row.distance} to the photos ({change(row)})" for row in realism if row.low > 0]
    for row in colour.itertuples():
        if row.statistic == "delta_e" and row.low > NOTICEABLE:
            costs.append(f"a visible shift of the colours (Delta E {row.difference:.1f})")
        least = VISIBLE.get(row.statistic, math.inf)
        if row.low > least or (row.high < -least and row.statistic != "clipped"):
            costs.append(f"{COLOURS[row.statistic]} ({moved(row)})")
    if not head and not {"held-out", "votes"} & {*rest.role}:
        judges = in_words(rest.metric[rest.role == "training"].tolist())
        told = f"Only {judges}, which chose the training pairs, judges here: add a held-out one to --scorers"
        sentences.append(("bad", f"{told}{f', and mind {in_words(costs)}' if costs else ''}."))
    elif head and len(risen) and not better:
        rates = in_words([f"{row.metric} ({rated(row)})" for row in risen.itertuples()])
        paid = f", and it costs {in_words(costs)}" if costs else ""
        told = f"{rates}, which chose the training pairs, rises and {head.metric} does not{paid}"
        sentences.append(("bad", f"It looks like reward hacking: {told}."))
    elif costs:
        sentences.append(("bad", f"It costs {in_words(costs)}."))
    else:
        sentences.append(("good" if better else "plain", "Nothing else that was measured is surely worse."))
    gains = [f"{row.metric} ({rated(row)})" for row in also.itertuples()]
    gains += [f"{row.distance} to the photos ({change(row)})" for row in realism if row.high < 0]
    if gains:
        sentences.append(("good", f"Better, too: {in_words(gains)}."))
    doubtful = rest[(rest.p < 0.05) & (rest.p_holm >= 0.05) & (rest.win_rate < 0.5)]
    if len(doubtful):
        rates = in_words([f"{row.metric} ({rated(row)})" for row in doubtful.itertuples()])
        sentences.append(("plain", f"Perhaps worse, not for sure among so many metrics: {rates}."))
    return sentences


def in_words(parts: Sequence[str]) -> str:
    """The parts of a sentence, as in a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def rated(row: Any) -> str:
    """A win rate with its interval, as "70 % [65, 76]"."""
    interval = f" [{100 * row.low:.0f}, {100 * row.high:.0f}]" if math.isfinite(row.low) else ""
    return f"{100 * row.win_rate:.0f}\u00a0%{interval}"


def moved(row: Any) -> str:
    """The means of both sides, as "0.8089 to 0.8317"."""
    return f"{number(row.base)} to {number(row.tuned)}"


def number(value: float | None) -> str:
    """A value with four significant digits; a dash for one that is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


# ---- Human votes ----------------------------------------------------------------------------------------------------
# The paper's user study: a blind page for raters, the key to it, and what their votes say. A tie is allowed: between
# images that look alike a forced choice is a coin's noise.

QUESTIONS = {"realism": "Which image is more realistic?", "alignment": "Which image fits the text better?"}
ANSWERS = {"left": "Left", "tie": "No difference", "right": "Right"}

STUDY = """\
<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline'">
<title>Which image is better?</title><style>
:root{color-scheme:light dark}*{box-sizing:border-box}
body{max-width:900px;margin:0 auto;padding:16px 20px;font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:28px;line-height:1.2;margin:6vh 0 16px}blockquote{margin:14px 0;font-size:18px;min-height:2.6em}
header{display:flex;gap:14px;align-items:center}progress{flex:1;min-width:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:12px;place-items:center}
.pair img{width:min(100%,50vh*var(--shape));cursor:zoom-in}.tiny img{image-rendering:pixelated}
fieldset{border:0;padding:0;margin:14px 0 0;display:grid;grid-template-columns:1fr 1fr 1fr;gap:8px;min-width:0}
legend{padding:0;margin-bottom:4px;opacity:.7}.now legend{font-weight:650;opacity:1}
button,input{font:inherit;min-height:46px;padding:6px 14px;border:1px solid #8888;border-radius:9px}
button{cursor:pointer}[aria-pressed=true]{background:#2c6e91;color:#fff}
dialog{width:100vw;height:100dvh;max-width:none;max-height:none;padding:0;border:0;background:#000}
dialog img{width:100%;height:100%;object-fit:contain}.soft{opacity:.7;font-size:14px}[hidden]{display:none!important}
</style></head><body>
<header id="bar" hidden><button id="back" aria-label="One step back">←</button><progress id="done"></progress>
<span id="place"></span><button class="save">Save votes</button></header>
<main><section id="start"><h1>Which image is better?</h1><p>You will see {{ pairs }} pairs of images, each with the
text it was made from, and answer two questions on each: about {{ (pairs + 4) // 5 }} minutes. You can stop and go on
later.</p>
<p>Answer by your first impression, and “no difference” where you see none. Click an image to see it large.</p>
<form id="form"><p><label>Your name, or a word that stands for you<br>
<input id="rater" maxlength="40" required></label></p><button>Start</button></form></section>
<section id="ask" hidden><blockquote id="prompt"></blockquote><div class="pair"><img id="left" alt="Left image">
<img id="right" alt="Right image"></div>
{% for name, words in questions.items() %}<fieldset name="{{ name }}"><legend>{{ words }}</legend>
{% for value, text in answers.items() %}<button value="{{ value }}">{{ text }}</button>
{% endfor %}</fieldset>{% endfor %}
<p class="soft">Keys: 1 left, 2 no difference, 3 right, Backspace back.</p></section>
<section id="end" hidden><h1>Thank you.</h1><p>Save the votes and send the file to whoever asked you; nothing has left
this browser.</p><button class="save">Save votes</button></section><p id="told" role="alert"></p></main>
<dialog><img alt="The image, enlarged"></dialog>
<script type="application/json" id="data">{{ data | safe }}</script><script>
const $ = id => document.getElementById(id), {study, pairs} = JSON.parse($("data").textContent);
const fields = [...document.querySelectorAll("fieldset")], names = fields.map(field => field.name);
const large = document.querySelector("dialog"), steps = pairs.length * names.length;
const order = pairs.map(pair => [Math.random(), pair.id]).sort().map(pair => pair[1]);
let since, shown, state = {rater: "", at: -1, votes: {}, order};
try { state = JSON.parse(localStorage.getItem(study)) ?? state; } catch {}
const pairAt = step => pairs.find(pair => pair.id === state.order[Math.floor(step / names.length)]);
function draw() {
  const {at} = state, pair = at >= 0 && at < steps ? pairAt(at) : null, vote = pair ? state.votes[pair.id] ?? {} : {};
  const hidden = {bar: at < 0, start: at >= 0, ask: !pair, end: at < steps};
  for (const id in hidden) $(id).hidden = hidden[id];
  Object.assign($("done"), {max: steps, value: Math.max(0, at)});
  $("place").textContent = `${Math.floor(Math.max(0, at) / names.length)} / ${pairs.length}`;
  if (pair && pair !== shown) {
    for (const side of ["left", "right"]) $(side).src = pair[side];
    $("prompt").textContent = pair.prompt;
    $("ask").style.setProperty("--shape", pair.shape);
    document.body.classList.toggle("tiny", pair.tiny);
    since = performance.now() - 1000 * (vote.seconds ?? 0);
  }
  shown = pair;
  fields.forEach((field, i) => {
    field.classList.toggle("now", i === at % names.length);
    for (const button of field.querySelectorAll("button"))
      button.setAttribute("aria-pressed", vote[field.name] === button.value);
  });
}
function go(step) {
  state.at = Math.max(0, Math.min(steps, step));
  try { localStorage.setItem(study, JSON.stringify(state)); }
  catch { $("told").textContent = "This browser keeps nothing: save the votes before you close the page."; }
  draw();
}
function answer(name, value) {
  const seconds = Math.round(performance.now() - since) / 1000, first = state.at - state.at % names.length;
  state.votes[shown.id] = {...state.votes[shown.id], [name]: value, seconds};
  go(first + names.indexOf(name) + 1);
}
function save() {
  const votes = Object.entries(state.votes).map(([pair, vote]) => ({pair, ...vote}));
  const file = new Blob([JSON.stringify({study, rater: state.rater, votes}, null, 1)], {type: "application/json"});
  const download = `votes-${state.rater.replace(/[^\\p{L}\\p{N}-]+/gu, "_")}.json`;
  Object.assign(document.createElement("a"), {href: URL.createObjectURL(file), download}).click();
  $("told").textContent = `${votes.length} of ${pairs.length} pairs are in ${download}.`;
}
for (const button of document.querySelectorAll("fieldset button"))
  button.onclick = () => answer(button.parentNode.name, button.value);
document.onkeydown = event => {
  const value = {1: "left", 2: "tie", 3: "right"}[event.key];
  if (state.at < 0 || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Backspace") { event.preventDefault(); go(state.at - 1); }
  else if (value && shown) answer(names[state.at % names.length], value);
};
for (const side of ["left", "right"])
  $(side).onclick = () => { large.firstChild.src = $(side).src; large.showModal(); };
large.onclick = () => large.close();
$("back").onclick = () => go(state.at - 1);
for (const button of document.querySelectorAll(".save")) button.onclick = save;
$("form").onsubmit = event => { event.preventDefault(); state.rater = $("rater").value.trim(); go(0); };
draw();
</script></body></html>
"""


def choose_pairs(images: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """At most `count` random pairs of base and a tuned model, rows model, prompt_id, index and left ("base" or the
    model). The models share them evenly, and each is left as often as right. A prompt comes twice only when there are
    no others: who sees an image twice knows that it is base's."""
    rng, used, chosen = np.random.default_rng(seed), Counter(), []
    place = ["prompt_id", "index"]
    both = images[images.model == "base"][place].merge(images[images.model != "base"][["model", *place]])
    both = both.iloc[rng.permutation(len(both))].reset_index(drop=True)
    models = rng.permutation(both.model.unique()).tolist()
    for number in range(min(count, len(both))):
        own = both[both.model == models[number % len(models)]]
        own = own if len(own) else both
        row = own.loc[own.prompt_id.map(used.__getitem__).idxmin()]
        used[row.prompt_id] += 1
        both = both.drop(row.name)
        chosen.append(row)
    pairs = pd.DataFrame(chosen, columns=both.columns).reset_index(drop=True)
    coins = pairs.model.map({name: rng.integers(2) for name in models}).astype(int)
    return pairs.assign(left=pairs.model.where((pairs.groupby("model").cumcount() + coins) % 2 == 0, "base"))


def blind_pair(paths: Sequence[Path], side: int = 768) -> dict[str, Any]:
    """Two images as data URIs that tell their pixels alone, of one size and codec; their width by height."""
    images = [load_image(path) for path in paths]
    side = min(side, *(max(image.size) for image in images))
    left, right = (data_uri(image, side) for image in images)
    shape = round(images[0].width / images[0].height, 3)
    return {"left": left, "right": right, "shape": shape, "tiny": side <= 128}


def write_study(folder: Path, images: pd.DataFrame, count: int, seed: int) -> int:
    """Writes user_study.html, a blind page of `count` pairs of base and a tuned model, and user_study_key.json, which
    says what they are and is not for raters. An earlier study's key is kept under its own name. Returns the number of
    pairs, which is smaller where there are no more."""
    import jinja2

    by_place = images.set_index(["model", "prompt_id", "index"])
    pairs, shown, key = choose_pairs(images, count, seed), [], {}
    if pairs.empty:
        raise UserError("--user_study: no prompt has an image of base and one of a tuned model")
    for number, pair in enumerate(tqdm(pairs.to_dict("records"), "user study", unit="pair"), 1):
        sides = {"left": pair["left"], "right": pair["model"] if pair["left"] == "base" else "base"}
        rows = [by_place.loc[(model, pair["prompt_id"], pair["index"])] for model in sides.values()]
        shown.append({"id": str(number), "prompt": rows[0].prompt, **blind_pair([row.path for row in rows])})
        files = {"images": [row.image_id for row in rows], "content": [row.content for row in rows]}
        key[str(number)] = sides | {"prompt": rows[0].prompt} | files
    study = hash_of(shown, key)
    page = json.dumps({"study": study, "pairs": shown}).replace("<", "\\u003c")
    file = folder / "user_study_key.json"
    if file.is_file() and (old := json.loads(file.read_text(encoding="utf-8"))["study"]) != study:
        file.rename(file.with_name(f"user_study_key_{old}.json"))
    text = json.dumps({"study": study, "pairs": key}, indent=1)
    write_text(file, text)
    words = {"data": page, "pairs": len(pairs), "questions": QUESTIONS, "answers": ANSWERS}
    html = jinja2.Template(STUDY, autoescape=True).render(words)
    write_text(folder / "user_study.html", html)
    return len(pairs)


def read_votes(files: Sequence[str], folder: Path, images: pd.DataFrame) -> pd.DataFrame:
    """All answers in the files that the page saved: a row per rater, pair and question, with the pair's model, images,
    prompt_id, the answer and `share`: 1 for the tuned model, 1/2 for no difference, 0 for base. UserError with file
    and place for what is no vote on the study in `folder`, or on images that were drawn anew since."""
    try:
        key = json.loads((folder / "user_study_key.json").read_text(encoding="utf-8"))
        saved = {file: json.loads(Path(file).read_text(encoding="utf-8")) for file in files}
    except (OSError, ValueError) as error:
        raise UserError(f"--votes: {error} (--user_study writes the key, and the page to vote on)") from error
    by_name, rows, raters = images.set_index("image_id"), [], {}
    for file, content in saved.items():
        votes = content.get("votes") if isinstance(content, dict) else None
        if not isinstance(votes, list) or not all(isinstance(vote, dict) for vote in votes) or "rater" not in content:
            raise UserError(f"{file} is not a file of votes, as the page saves them")
        if (study := content.get("study")) != key["study"]:
            told = f"votes on study {study}, and the key in {folder} is of {key['study']}"
            raise UserError(f"{file}: {told}; user_study_key_{study}.json would be its key")
        if other := raters.get(str(content["rater"])):
            raise UserError(f"{file} and {other} have one rater, {content['rater']!r}: rename one, or leave one out")
        raters[str(content["rater"])] = file
        for vote in votes:
            pair, place = key["pairs"].get(str(vote.get("pair"))), f"{file}, pair {vote.get('pair')!r}"
            if pair is None or [str(other.get("pair")) for other in votes].count(str(vote["pair"])) > 1:
                raise UserError(f"{place}: {'it is there twice' if pair else 'the study has no such pair'}")
            for name, known in zip(pair["images"], pair["content"], strict=True):
                if name in by_name.index and by_name.content[name] != known:
                    raise UserError(f"{place}: {name} was drawn anew since people voted: ask them once more")
            if odd := vote.keys() - {*QUESTIONS, "pair", "seconds"}:
                raise UserError(f"{place}: no question {min(odd)!r}, only {', '.join(QUESTIONS)}")
            for question in QUESTIONS.keys() & vote.keys():
                if vote[question] not in [*ANSWERS]:
                    raise UserError(f"{place}: {question} is {vote[question]!r}, not one of {', '.join(ANSWERS)}")
                tuned = "left" if pair["left"] != "base" else "right"
                row = {"rater": content["rater"], "pair": vote["pair"], "question": question, "answer": vote[question]}
                row["share"] = 0.5 if vote[question] == "tie" else float(vote[question] == tuned)
                row["model"] = pair[tuned]
                row["base_image"], row["tuned_image"] = pair["images"][:: -1 if tuned == "left" else 1]
                row["prompt_id"] = by_name.prompt_id.get(row["base_image"])
                rows.append(row)
    table = pd.DataFrame(rows)
    if table.empty or table.prompt_id.isna().all():
        raise UserError("--votes: no answer on an image of this run")
    return table[table.prompt_id.notna()]


def agreement(votes: pd.DataFrame, images: pd.DataFrame, scorers: Sequence[str]) -> pd.DataFrame:
    """How far raters agree with each other, alpha by what they saw, and each scorer with most raters (see `compare`,
    against 1/2; a prompt counts once): a row per question and scorer."""
    rows, by_name = [], images.set_index("image_id")
    for question, own in votes.groupby("question"):
        counts = own.groupby(["pair", "answer"]).size().unstack(fill_value=0).reindex(columns=[*ANSWERS], fill_value=0)
        alpha = krippendorff_alpha(counts.to_numpy())
        pairs = own.groupby("pair").agg(people=("share", "mean"), prompt_id=("prompt_id", "first"),
                                        base=("base_image", "first"), tuned=("tuned_image", "first"))  # fmt: skip
        pairs = pairs[(pairs.people != 0.5) & pairs.tuned.isin(by_name.index)]
        for label in scorers:
            base, tuned = (by_name[label].reindex(pairs[side]).to_numpy() for side in ("base", "tuned"))
            agrees = np.where(base == tuned, 0.5, (tuned > base) == (pairs.people > 0.5))
            agrees = pd.Series(np.where(np.isnan(base + tuned), math.nan, agrees))
            agrees = agrees.groupby(pairs.prompt_id.to_numpy()).mean()
            row = compare(pd.Series(0.5, agrees.index), agrees)
            rows.append({"question": question, "alpha": alpha, "scorer": label} | row)
    return pd.DataFrame(rows)


# ---- Report ---------------------------------------------------------------------------------------------------------

READING = """The prompt is the unit: a model's images of one prompt are averaged first, then the prompts. Win rate: the
share of prompts on which the tuned model is higher, ties as one half. The headline was named beforehand and is tested
alone, by an exact sign test; of the others p with Holm's correction counts. The interval holds the win rates that the
test does not refuse, without that correction. What a scorer vetoes has no score: these images are left out, and how
many it did not veto is a metric of its own. In per_image.csv: mean by model and prompt_id first, then over the prompts
that both models have. Diversity is the mean cosine distance of a prompt's images. A scorer that chose the training
pairs is no witness."""

REPORT = """\
<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src data:;style-src 'unsafe-inline'">
<title>{{ models | join(", ") }} against base</title><style>
:root{color-scheme:light dark;--ink:#1c2226;--soft:#5f6a73;--line:#dfe5e8;--paper:#fff;--good:#1f6a94;--bad:#b8452f}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaec;--soft:#9aa6ad;--line:#2e363b;--paper:#14181b;--good:#6bb1d6;
--bad:#e5846d}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
main{max-width:1000px;margin:0 auto;padding:40px 28px 70px}h1{font-size:16px;margin:0}h2{font-size:24px;margin:0 0 9px}
h3{font-size:17px;margin:26px 0 8px}section{margin-top:44px;padding-top:24px;border-top:1px solid var(--line)}
p{margin:0 0 10px;max-width:74ch}.soft,th,figcaption{color:var(--soft)}.soft,figcaption{font-size:14px}
.said{padding-left:14px;border-left:4px solid var(--line)}.good{border-color:var(--good)}.bad{border-color:var(--bad)}
.first{font-size:23px;line-height:1.35;font-weight:650;max-width:46ch;margin-top:20px}.second{font-size:18px}
table{border-collapse:collapse;font-size:15px;margin:12px 0;width:100%}th{font-weight:400;font-size:13px}
th,td{text-align:right;padding:5px 0 5px 18px;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
.plot{display:block;width:100%;max-width:680px;height:auto;background:#fff;border-radius:6px;margin:14px 0}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr));gap:26px 30px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px}figure{margin:0}
figure img{display:block;width:100%;height:auto;border-radius:4px}
.tiny img{image-rendering:pixelated}.row p{font-size:14px;margin:6px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 20px;font-size:14px}dd{margin:0}
@media(max-width:620px){main{padding:22px 16px 44px}.first{font-size:20px}thead{display:none}dl{display:block}
dd{margin:0 0 6px}tr{display:flex;flex-wrap:wrap;gap:2px 14px;padding:7px 0;border-bottom:1px solid var(--line)}
td{border:0;padding:0;text-align:left}td:first-child{flex:1 0 100%}td[data-head]::before{content:attr(data-head) " ";
color:var(--soft);font-size:13px}td:empty{display:none}}
@page{size:A4;margin:14mm}@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--line:#ccc;--paper:#fff}
body{font-size:10pt}main{padding:0;max-width:none}.rows{grid-template-columns:repeat(3,1fr)}table,dl{font-size:9pt}
tr,figure,.row,.said,.plot{break-inside:avoid}h2,h3{break-after:avoid}}
</style></head><body><main>
{% macro table(head, rows) %}<table><thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
{% for row in rows %}<tr>{% for cell in row %}<td{% if loop.index0 %} data-head="{{ head[loop.index0] }}"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endmacro %}
<h1>Does it draw better people?</h1>
<p class="soft">{{ counts }}</p>
{% set one = verdicts | length == 1 %}
{% for name, sentences in verdicts.items() %}{% for tone, sentence in sentences %}
<p class="said {{ tone }} {{ "first" if one and loop.first }} {{ "second" if loop.index == 1 + one }}">
{{ sentence }}</p>{% endfor %}{% endfor %}
{% for caveat in caveats %}<p class="soft">{{ caveat }}</p>{% endfor %}
{% for name, blocks in rows.items() %}<section><h2>{{ name }} beside base</h2>
<p class="soft">Ordered by {{ headline }}: base left, {{ name }} right, the same prompt, seed and noise.</p>
{% for heading, cells in blocks.items() %}<h3>{{ heading }}</h3><div class="rows">{% for cell in cells %}
<div class="row"><div class="pair{{ " tiny" if cell.sides[0][1].startswith("data:image/png") }}">
{% for label, uri, score in cell.sides %}<figure>
{% if uri %}<img alt="{{ label }}" src="{{ uri }}">{% endif %}
<figcaption>{{ label }} {{ score }}</figcaption></figure>{% endfor %}</div><p>{{ cell.prompt }}</p></div>{% endfor %}
</div>{% endfor %}</section>{% endfor %}
{% if metrics.values() | sum(start=[]) %}<section><h2>Win rates</h2>
<img class="plot" alt="Win rates with intervals" src="{{ pictures["win_rates.png"] }}">
{% for name, cells in metrics.items() %}{% if metrics | length > 1 %}<h3>{{ name }}</h3>{% endif %}
{% set head = ["metric", "win rate", "95 % interval", "base", name, "p", "p (Holm)"] %}
{{ table(head, cells) }}{% endfor %}</section>{% endif %}
{% if groups %}<section><h2>Groups of prompts</h2>
{{ table(["group", "model", "prompts", "win rate by " ~ headline, "p (Holm)"], groups) }}</section>{% endif %}
{% if realism %}<section><h2>Realism</h2><p class="soft">Distance to the photos, lower is better; with the difference
from base and its interval over prompts, where there are 20. KD and CMMD are unbiased: what does not differ reads 0 on
average, and may read less.</p>{{ table(["distance", "photos among themselves"] + names, realism) }}
{% if realism_note %}<p class="soft">{{ realism_note }}</p>{% endif %}</section>{% endif %}
<section><h2>Colour</h2><img class="plot" alt="Colours of base and tuned models" src="{{ pictures["colour.png"] }}">
{{ table((["mean over prompts"] + names + ["photos"])[: colour[0] | length], colour) }}
<p class="soft">In brackets: the difference from base, 95 % interval over prompts. Distances are never negative; Delta
E, less what chance moves, is visible from 2.3; the latents' is in standard deviations of base.</p></section>
{% if votes %}<section><h2>Votes</h2><p class="soft">{{ votes_told }}</p>
{{ table(["scorer", "agrees with people on", "of"], votes) }}</section>{% endif %}
<section><h2>How to read this</h2><p>{{ reading }}</p></section>
<section><h2>Settings</h2><dl>{% for key, value in settings.items() %}<dt>{{ key }}</dt>
<dd>{{ value if value is string or value is number else value | join(", ") }}</dd>
{% endfor %}</dl></section></main></body></html>
"""

CARD = """\
## Evaluation

{{ counts }}

{% for name, sentences in verdicts.items() %}### {{ name }} against base

{% for _, sentence in sentences %}{{ "**" ~ sentence ~ "**" if loop.first else sentence }}

{% endfor %}| metric | win rate | 95 % interval | base | {{ name }} | p | p (Holm) |
|---|--:|--:|--:|--:|--:|--:|
{% for cells in metrics[name] %}| {{ cells | join(" | ") }} |
{% endfor %}

{% endfor %}{% if realism %}| distance to photos, lower is better | of other photos | {{ names | join(" | ") }} |
|---|--:|{{ "--:|" * names | length }}
{% for cells in realism %}| {{ cells | join(" | ") }} |
{% endfor %}

{% endif %}| colour, mean over prompts | base | {{ (models + ["photos"])[: colour[0] | length - 2] | join(" | ") }} |
|---|--:|{{ "--:|" * (colour[0] | length - 2) }}
{% for cells in colour %}| {{ cells | join(" | ") }} |
{% endfor %}

{% for caveat in caveats %}- {{ caveat }}
{% endfor %}

{{ reading }}
"""
BETTER, WORSE, UNSURE = "#1f6a94", "#b8452f", "#98a2a9"


def draw_win_rates(path: Path, results: pd.DataFrame) -> None:
    """win_rates.png: each model's win rates with their intervals around one half; of training scorers open dots."""
    from matplotlib.figure import Figure

    models = results.model.unique()
    if not len(models):
        return
    heights = [(results.model == model).sum() + 1.2 for model in models]
    figure = Figure((5.4, 0.3 * sum(heights) + 0.4), dpi=200, layout="constrained")
    axes = figure.subplots(len(models), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, model in zip(axes, models, strict=True):
        own = results[results.model == model]
        for place, row in enumerate(own.itertuples()):
            p = row.p if row.role == "headline" else row.p_holm
            colour = UNSURE if not p < 0.05 else BETTER if row.win_rate > 0.5 else WORSE
            axis.plot([100 * row.low, 100 * row.high], [place, place], color=colour, lw=2)
            face = "white" if row.role == "training" else colour
            axis.plot(100 * row.win_rate, place, "o", color=colour, markerfacecolor=face, markersize=6)
            axis.annotate(rated(row), (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.set_yticks(range(len(own)), [textwrap.shorten(label, 28, placeholder="…") for label in own.metric])
        for label, role in zip(axis.get_yticklabels(), own.role, strict=True):
            label.set(fontweight="bold" if role == "headline" else "normal", parse_math=False)
        axis.set_title(f"{model} against base", loc="left", fontsize=10, parse_math=False)
        axis.set(xlim=(0, 100), ylim=(len(own) - 0.4, -0.6))
        axis.axvline(50, color=UNSURE, lw=0.8, zorder=0)
        axis.tick_params(labelsize=9, length=0)
        axis.spines[:].set_visible(False)
        axis.grid(axis="x", color="#e6eaec", lw=0.6)
    axes[-1].set_xlabel("win rate in %, 95 % interval; grey: not sure; open: chose the training pairs", fontsize=8)
    write_whole(path, partial(figure.savefig, format="png"))


def draw_colours(path: Path, images: pd.DataFrame) -> None:
    """colour.png: the mean colours of the prompts as a strip for base and one for each tuned model, by base's hue."""
    from matplotlib.figure import Figure

    means = images.groupby(["model", "prompt_id"], sort=False)[["red", "green", "blue", "hue"]].mean()
    models = [name for name in means.index.unique("model") if name != "base"]
    figure = Figure((5.4, 0.9 * len(models)), dpi=160, layout="constrained")
    for axis, name in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        base, tuned = (means.loc[side] for side in ("base", name))
        order = base.loc[base.index.intersection(tuned.index)].sort_values("hue").index
        order = order[np.linspace(0, len(order) - 1, min(60, len(order))).astype(int)]
        rgb = [side.loc[order, ["red", "green", "blue"]].to_numpy() / 255 for side in (base, tuned)]
        axis.imshow(np.stack(rgb), aspect="auto", interpolation="none")
        axis.set(xticks=[])
        axis.set_yticks([0, 1], ["base", name], fontsize=7, parse_math=False)
    write_whole(path, partial(figure.savefig, format="png"))


def draw_models(path: Path, images: pd.DataFrame, prompts: list[tuple[int, str]]) -> None:
    """A row per model, base above; of each prompt (prompt_id, title) of which all models have it, the first image."""
    from matplotlib.figure import Figure

    there = images[(images["index"] == 0) & images.path.map(Path.is_file)]
    models = images.model.unique()
    paths = there.pivot(index="prompt_id", columns="model", values="path").reindex(columns=models).dropna()
    chosen = [(prompt_id, title) for prompt_id, title in prompts if prompt_id in paths.index]
    if not chosen:
        return
    with Image.open(paths.iloc[0, 0]) as first:
        tall = first.height / first.width
    figure = Figure((1.25 * len(chosen), (1.25 * tall + 0.06) * len(models)), dpi=160, layout="constrained")
    for row, name in zip(figure.subplots(len(models), len(chosen), squeeze=False), models, strict=True):
        row[0].set_ylabel(name, fontsize=9, parse_math=False)
        for axis, (prompt_id, title) in zip(row, chosen, strict=True):
            axis.imshow(load_image(paths.loc[prompt_id, name]))
            axis.set_title(title if name == "base" else "", fontsize=8)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    write_whole(path, partial(figure.savefig, format="png"))


def data_uri(image: Image.Image, side: int) -> str:
    """An image's pixels alone, brought to at most `side` pixels a side, as a data URI."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, buffer = "png" if max(image.size) <= 128 else "jpeg", io.BytesIO()
    image.info = {}  # a comment or a colour profile would be written too
    image.save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def first_images(images: pd.DataFrame) -> pd.DataFrame:
    """The first image of each prompt, by (model, prompt_id)."""
    return images.drop_duplicates(["model", "prompt_id"]).set_index(["model", "prompt_id"])


def prompts_to_show(first: pd.DataFrame, model: str, headline: str, seed: int) -> dict[str, list[int]]:
    """Up to three prompts of each kind: worst losses and best wins by the first images' headline, and random ones."""
    lead = (first.loc[model][headline] - first.loc["base"][headline]).dropna().sort_values(kind="stable")
    chosen = {"Worst losses": lead[lead < 0].index[:3], "Best wins": lead[lead > 0].index[::-1][:3]}
    chosen["At random"] = np.random.default_rng(seed).permutation(lead.index)[:3]
    return {heading: ids.tolist() for heading, ids in chosen.items() if len(ids)}


def rows_to_show(first: pd.DataFrame, model: str, headline: str, seed: int) -> dict[str, list]:
    """The prompts to show, with both sides' first images and their scores."""
    scores = {name: first.loc[name][headline] for name in ("base", model)}

    def side_of(name: str, prompt_id: int) -> tuple[str, str, str]:
        path = first.path[name, prompt_id]
        return name, data_uri(load_image(path), 384) if path.is_file() else "", number(scores[name][prompt_id])

    return {
        heading: [{"sides": [side_of(name, p) for name in scores], "prompt": first.prompt["base", p]} for p in ids]
        for heading, ids in prompts_to_show(first, model, headline, seed).items()
    }


def change(row: Any) -> str:
    """A difference with its interval, in the digits that the interval supports."""
    if not math.isfinite(row.low):
        return number(row.difference)
    digits = max(0, 1 - math.floor(math.log10(row.high - row.low or abs(row.difference) or 1.0)))
    return f"{row.difference:+.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]"


DISTANCES_IN_WORDS = {
    "delta_e": "Delta E of the mean colours",
    "hue": "hue, all images together (the paper's), degrees",
    "hue_images": "hue, image by image, degrees",
    "latents": "latent channels' means",
}


def cells_of(record: dict[str, Any]) -> dict[str, Any]:
    """All that the report and the card show, as text."""
    results, colour, realism = (record[name] for name in ("results", "colour", "realism"))
    models, metrics = list(record["verdicts"]), {}
    for model in models:
        metrics[model] = []
        for row in results[results.model == model].itertuples():
            tag = f" ({row.role})" if row.role in ("headline", "training") else ""
            tag += f" of {row.n} prompts" if row.missing else ""
            interval = f"[{100 * row.low:.1f}, {100 * row.high:.1f}]" if math.isfinite(row.low) else "–"
            p, p_holm = (f"{value:.2g}" if value >= 1e-4 else "< .0001" for value in (row.p, row.p_holm))
            p_holm = "" if row.role == "headline" else p_holm
            rate, means = f"{100 * row.win_rate:.1f} %", (number(row.base), number(row.tuned))
            metrics[model].append([f"{row.metric}{tag}", rate, interval, *means, p, p_holm])
    shown = []
    for statistic, own in colour.groupby("statistic", sort=False):
        is_distance = statistic in DISTANCES_IN_WORDS
        cells = [(COLOURS | DISTANCES_IN_WORDS)[statistic], "" if is_distance else number(own.base.iloc[0])]
        for row in own.itertuples():
            cells.append(change(row).lstrip("+") if is_distance else f"{number(row.tuned)} ({change(row)})")
        shown.append(cells + ([number(own.photos.iloc[0])] if colour.photos.notna().any() else []))
    distances = []
    for kind, own in realism.groupby("distance", sort=False) if len(realism) else ():
        moves = ["" if row.model == "base" else f" ({change(row)})" for row in own.itertuples()]
        told = [number(value) + move for value, move in zip(own.value, moves, strict=True)]
        distances.append([kind, number(own.floor.iloc[0]), *told])
    votes = [[f"{row.scorer}, {row.question}", rated(row), f"{row.n} prompts"] for row in record["votes"].itertuples()]
    settings = {key: value for key, value in record["settings"].items() if value not in (None, [], "")}
    cells = {"metrics": metrics, "colour": shown, "realism": distances, "votes": votes}
    cells |= {"models": models, "names": ["base", *models]}
    names = ("counts", "verdicts", "caveats", "headline")
    return cells | {name: record[name] for name in names} | {"settings": settings}


def write_report(folder: Path, record: dict[str, Any], images: pd.DataFrame) -> None:
    """report.html, one file that loads nothing, and model_card.md, to paste; pictures are there already."""
    import jinja2

    cells = cells_of(record) | {"reading": " ".join(READING.split())}
    groups = [[f"{row.column}: {row.group}", row.model, row.n, rated(row), f"{row.p_holm:.2g}"]
              for row in record["groups"].itertuples()]  # fmt: skip
    told = "Share of the pairs on which a scorer prefers what most raters prefer; a coin: 50 %. "
    alphas = {row.question: row.alpha for row in record["votes"].itertuples()}
    told += ", ".join(f"Krippendorff's alpha of {name}: {number(value)}" for name, value in alphas.items())
    files = [file for file in (folder / "win_rates.png", folder / "colour.png") if file.is_file()]
    uris = {file.name: f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files}
    seed = record["settings"]["seed"]
    different = [name for name in cells["models"] if cells["metrics"][name]]
    rows = {name: rows_to_show(first_images(images), name, record["headline"], seed) for name in different}
    extra = {"groups": groups, "votes_told": told, "pictures": uris, "rows": rows, "realism_note": ""}
    if len(record["realism"]) and (few := int(record["realism"][["images", "photos"]].min(axis=None))) < 2048:
        extra["realism_note"] = f"With {few} images or photos FD reads too high: below 2,048 trust KD and CMMD."
    page = jinja2.Template(REPORT, autoescape=True).render(cells | extra)
    write_text(folder / "report.html", page)

    def escape(value: Any) -> Any:
        if isinstance(value, str):  # what users wrote stays text in Markdown
            return re.sub(r"([\\`*_\[\]|~$#<>])", r"\\\1", " ".join(value.split()))
        if isinstance(value, dict):
            return {escape(key): escape(item) for key, item in value.items()}
        return [escape(item) for item in value] if isinstance(value, list | tuple) else value

    card = jinja2.Template(CARD, trim_blocks=True).render(escape(cells))
    write_text(folder / "model_card.md", card)


# ---- Main -----------------------------------------------------------------------------------------------------------


def start_processes() -> PartialState:
    """This process's place among those that `accelerate launch` started, on its GPU if there is one."""
    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # a process may wait long for the slowest one's images


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the training run whose weights lie in a folder, or in a checkpoint's in it; {} without."""
    for place in (folder, *folder.parents[:2]):
        if (place / "training_settings.json").is_file():
            return json.loads((place / "training_settings.json").read_text(encoding="utf-8"))["settings"]
    return {}


def training_data(models: Iterable[Model]) -> list[Path]:
    """The folders of pairs that the models were trained on, earlier stages included, as the weights' records say."""
    todo = [Path(path) for model in models for path in (model.path, model.text_encoder) if path]
    folders, seen = [], set()
    while todo:
        path = todo.pop(0).resolve()
        if path in seen:  # a run may start from its own folder
            continue
        seen.add(path)
        settings = read_settings(path)
        if data := settings.get("train_data_dir") or settings.get("dataset_name"):
            beside = [parent / Path(data).name for parent in path.parents[:2]]  # moved together
            folders += [folder for folder in (Path(data), *beside) if folder.is_dir()][:1]
        todo += [Path(settings[name]) for name in ("initial_lora", "initial_unet") if settings.get(name)]
    return list(dict.fromkeys(folders))


def names_of_scorer(spec: str) -> set[str]:
    """What a scorer may be called: its label, its NAME, and the content of its weights, which never lead under another
    name."""
    name, options = parse_spec(spec)
    own = Path(name).stem if name.endswith(".jsonl") else name.rpartition(":")[2]
    names = {options.get("label", own), own}
    if name in SCORERS:
        default = inspect.signature(SCORERS[name]).parameters.get("model")
        weights = options.get("model") or (default.default if default else "")
        names |= {f"weights {content_of(weights)}"} if name in ("pickscore", "hpsv2", "clip") else set()
    return names


def training_scorers(args: argparse.Namespace) -> set[str]:
    """The names of what selected the training pairs, given or recorded beside the weights; those that only had to
    agree are among them. Empty where nothing is known."""
    specs = list(args.training_scorer)
    for folder in training_data(args.models):
        if (folder / "preference_data.json").is_file():
            settings = json.loads((folder / "preference_data.json").read_text(encoding="utf-8"))["settings"]
            specs += [*settings.get("scorer", []), *settings.get("agree", [])]
    return set().union(*map(names_of_scorer, specs))


def plan_images(args: argparse.Namespace, table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The table of images of all models, base first: model, prompt_id, index, prompt, seed, path, image_id; and what
    there is to say about those that were finished elsewhere. A seeded --diversity_prompts of them get two images."""
    prompts, tables, remarks = table.prompt.tolist(), [], []
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    least = np.full(len(prompts), args.num_images_per_prompt)
    least[order[: args.diversity_prompts]] = np.maximum(least[order[: args.diversity_prompts]], 2)
    plan = pd.DataFrame({"prompt_id": np.repeat(np.arange(len(prompts)), least)})
    plan["index"] = plan.groupby("prompt_id").cumcount()
    for model in args.models:
        if model.kind == "images":
            own, how = find_images(model.name, Path(model.path), prompts)
            own = own.merge(plan, on=["prompt_id", "index"])
            remarks.append(f"{model.name:<10} {how}; {len(own)} are used (--num_images_per_prompt)")
            folder = Path(model.path)
        else:
            folder = Path(args.output_dir, "images", model.name)
            paths = [folder / f"{p:05d}_{k}.png" for p, k in zip(plan.prompt_id, plan["index"], strict=True)]
            own = plan.assign(path=paths)
        own = own.assign(model=model.name, prompt=[prompts[p] for p in own.prompt_id])
        seeds = [image_seed(args.seed, prompt, k) for prompt, k in zip(own.prompt, own["index"], strict=True)]
        names = [f"{model.name}/{path.relative_to(folder).as_posix()}" for path in own.path]
        tables.append(own.assign(seed=seeds, image_id=names).sort_values(["prompt_id", "index"]))
    images = pd.concat(tables, ignore_index=True)
    base = set(images[images.model == "base"].prompt_id)
    for model, own in images.groupby("model"):
        if not base & set(own.prompt_id):
            raise UserError(f"base and {model} have no image of the same prompt")
    return images, remarks


def draw_and_measure(
    args: argparse.Namespace, table: pd.DataFrame, scorers: Sequence[Scorer], state: PartialState
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The table of images with a column for each scorer and statistic of colour, photos included, as the model PHOTOS,
    and features {name: (N, D)}. First a batch of each model is drawn and measured: what cannot work is told in the
    first minutes."""
    images, remarks = plan_images(args, table)
    if args.real_data_dir:
        photos, odd = find_photos(Path(args.real_data_dir))
        names = [f"{PHOTOS}/{photo.relative_to(args.real_data_dir).as_posix()}" for photo in photos]
        own = {"model": PHOTOS, "prompt_id": np.arange(len(photos)), "index": 0, "prompt": "", "path": photos}
        images = pd.concat([images, pd.DataFrame(own | {"seed": 0, "image_id": names})], ignore_index=True)
        left_out = f"{odd} masks, thumbnails or unknown kinds left out"
        remarks.append(f"photos     {len(photos)} in {args.real_data_dir} ({left_out})")
    of_models = images.model != PHOTOS
    several = images.groupby(["model", "prompt_id"])["index"].transform("size") > 1
    everything = pd.Series(True, images.index)

    # What is measured, on which images, under which names of columns; features have none
    key = hash_of(code_of(measure_colour), COLOUR_COLUMNS)[:8]
    colour = Scorer("colour", 0, key, lambda device: measure_colour, None)
    measures = [(one, of_models, [one.label]) for one in scorers] + [(colour, everything, [*COLOUR_COLUMNS])]
    features_of = [("features", image_features, args.feature_model), ("clip", clip_embeddings, args.cmmd_model)]
    for label, load, name in features_of if args.real_data_dir else features_of[: int(several.any())]:
        key = hash_of(content_of(name, "config.json"), code_of(load))[:8]
        chosen = everything if args.real_data_dir else several  # for diversity
        measures.append((Scorer(label, 0, key, partial(load, name=name), None), chosen, None))

    drawn = [model for model in args.models if model.kind != "images"]
    if state.is_main_process:
        print("".join(f"{remark}\n" for remark in remarks), end="", flush=True)
        for model in drawn:
            claim_folder(Path(args.output_dir, "images", model.name), model_key(args, model), table.prompt.tolist())
    state.wait_for_everyone()
    first = images[of_models].groupby("model").head(args.batch_size)
    for part, what in ((first, "first batch of {}"), (images, "images of {}")):
        for model in drawn:
            draw_missing(args, model, part[part.model == model.name], state, what.format(model.name))
        with ThreadPoolExecutor(8) as threads:
            part = part.assign(content=list(threads.map(content_of, map(str, part.path))))
        with Image.open(part.path.iloc[0]) as image:
            ratio, features = image.width / image.height, {}
        for measure, chosen, names in measures:
            wanted = part[chosen[part.index]]
            if wanted.empty:
                continue
            values = measure_missing(measure, wanted, args, state, ratio)
            if names:
                part.loc[wanted.index, names] = values.reshape(len(wanted), -1)
            else:
                features[measure.label] = np.full((len(part), values.shape[1]), np.nan)
                features[measure.label][part.index.get_indexer(wanted.index)] = values

    def moments(path: Path) -> dict[str, float]:
        told = {name: json.loads(image_text(path).get(name, "[]")) for name in ("latent_mean", "latent_std")}
        return {f"{name}_{channel}": value for name, values in told.items() for channel, value in enumerate(values)}

    return part.join(pd.DataFrame(map(moments, part.path), part.index)), features


def read_csv(file: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """per_image.csv as the table of images, and metrics.json beside it, for what needs more than that table."""
    texts = csv_of_arrow.ConvertOptions(column_types=dict.fromkeys(("prompt", "model", "content"), pa.string()))
    try:  # Arrow reads floats back exactly
        images = csv_of_arrow.read_csv(file, convert_options=texts).to_pandas()
        record = json.loads(file.with_name("metrics.json").read_text(encoding="utf-8"))
        images = images.assign(path=[file.parent / path for path in images.path])
        images[[*record["roles"], *COLOUR_COLUMNS, "model", "prompt_id", "index", "prompt", "content"]]  # are there
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        told = f"needs per_image.csv and metrics.json of one run: {type(error).__name__}: {error}"
        raise UserError(f"--from_csv {told}") from error
    return images, record


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, *cells in (head, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"  {name:{widths[0]}}", *cells]).rstrip())


def print_summary(cells: dict[str, Any]) -> None:
    """The tables and sentences at the end, those of report.html."""
    for name, sentences in cells["verdicts"].items():
        print(f"\n{name} against base")
        if cells["metrics"][name]:
            head = ["metric", "win rate", "95 % interval", "base", name, "p", "p (Holm)"]
            print_table(head, cells["metrics"][name])
        print(*(f"  {sentence}" for _, sentence in sentences), sep="\n")
    print(f"\n{cells['counts']}")
    if cells["realism"]:
        print_table(["distance to photos", "photos", *cells["names"]], cells["realism"])
    if cells["votes"]:
        print_table(["scorer", "agrees with people on", "of"], cells["votes"])
    distances = [row for row in cells["colour"] if row[0] in DISTANCES_IN_WORDS.values()]
    end = 2 + len(cells["models"])  # after base's column, before the photos'
    print_table(["colour against base", *cells["models"]], [[row[0], *row[2:end]] for row in distances])


def main(args: argparse.Namespace) -> None:
    """Draws, measures, compares, and writes metrics.json, per_image.csv, report.html, model_card.md and pictures."""
    state, output = start_processes(), Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error

    # What is asked: prompts, scorers and their roles; the first held-out scorer is the headline, named before all
    if args.from_csv:
        images, old = read_csv(Path(args.from_csv))
        roles, features, notes, settings = old["roles"], {}, old["caveats"], old["settings"]
    else:
        importlib.import_module("diffusers.pipelines.pipeline_utils")  # before there are models that a traceback keeps
        old: dict[str, Any] = {}
        columns: dict[str, dict[str, Any]] = {}  # each prompt's row of its file, for the scorers that read it
        given = {parse_spec(spec)[0] for spec in args.scorers}
        paper = [name for name in PAPER if name not in given]
        specs = [one for spec in args.scorers for one in (paper if spec == "paper" else [spec])]
        scorers = parse_scorers(specs, columns)
        own = ["model", "prompt_id", "index", "prompt", "seed", "path", "image_id", "content", "diversity"]
        if taken := [one.label for one in scorers if one.label in (*own, *COLOUR_COLUMNS)]:
            raise UserError(f"--scorers: a scorer cannot be called {taken[0]}: give it another name with ,label=...")
        table, remark = read_prompts(args.prompts, args.prompt_column, args.max_prompts)
        columns |= dict(zip(table.prompt, table.to_dict("records"), strict=True))
        if unknown := [column for column in args.group_by if column not in table]:
            raise UserError(f"--group_by {unknown[0]}: {args.prompts} has no such column, only {', '.join(table)}")
        known = training_scorers(args)
        chose = [bool(names_of_scorer(spec) & (known or {"pickscore"})) for spec in specs]
        order = sorted(zip(chose, (one.label for one in scorers), strict=True), key=lambda pair: pair[0])
        roles = {label: "training" if is_training else "held-out" for is_training, label in order}
        names = ", ".join(sorted(name for name in known if " " not in name))
        notes = []
        if not known:
            notes.append("No record tells what chose the training pairs: taken to be PickScore (--training_scorer).")
        elif not any(chose):
            notes.append(f"{names} chose the training pairs but is not measured here: reward hacking stays unseen.")
        if len(table) < 200:
            least = f"a win rate below {100 * detectable_win_rate(len(table)):.0f} % would mostly go unseen"
            notes.append(f"Only {len(table)} prompts: {least}. Use 200 or more.")
        if len(args.models) > 2:
            notes.append("Several models are several headlines: choose on these prompts, then judge on others.")
        second = min(args.diversity_prompts, len(table)) if args.num_images_per_prompt == 1 else 0
        if state.is_main_process:
            remarks = [remark, *notes, f"{second} of the prompts get a second image, for diversity" if second else ""]
            print(*filter(None, remarks), sep="\n", flush=True)
        settings = {name: value for name, value in vars(args).items() if name not in ("models", "from_csv")}
        settings["models"] = [model.spec for model in args.models]
        images, features = draw_and_measure(args, table, scorers, state)
        groups = table[args.group_by].add_prefix("group ")  # a scorer may have the name of a column
        images = images.merge(groups, "left", left_on="prompt_id", right_index=True)
    if not state.is_main_process:
        state.wait_for_everyone()
        return

    # From images to a value for each model and prompt
    is_photo = (images.model == PHOTOS).to_numpy()
    own = images[~is_photo].reset_index(drop=True)
    held_out = [label for label, role in roles.items() if role == "held-out"]
    headline = next(iter([*held_out, *roles]))
    shown = {label: "headline" if label == headline and held_out else role for label, role in roles.items()}
    for label in [label for label in roles if own[label].isna().any()]:
        own[f"not vetoed by {label}"] = own[label].notna().astype(float)
        shown[f"not vetoed by {label}"] = "veto"
    prompts = own.groupby(["model", "prompt_id"], sort=False)[list(shown)].mean()
    if "features" in features and (own["index"] > 0).any():
        places, known = own.groupby(["model", "prompt_id"], sort=False).indices, features["features"][~is_photo]
        prompts["diversity"] = pd.Series({place: diversity(known[rows]) for place, rows in places.items()})
        shown["diversity"] = "diversity"
    study = Path(args.from_csv).parent if args.from_csv else output
    votes = read_votes(args.votes, study, own) if args.votes else pd.DataFrame()
    for question, answers in votes.groupby("question") if len(votes) else ():
        prompts[f"votes: {question}"] = answers.groupby(["model", "prompt_id"]).share.mean()
        shown[f"votes: {question}"] = "votes"

    same = own.merge(own[own.model == "base"][["prompt_id", "index", "content"]], on=["prompt_id", "index"])
    identical = (same.content_x == same.content_y).groupby(same.model).mean()

    # From there to the tables; diversity, realism and votes of an earlier run stay where nothing new is known
    carried = [row for row in old.get("results", []) if row["metric"] not in shown]
    different = prompts.drop(identical.index[identical == 1].drop("base"))
    results = compare_models(different, shown, carried)
    if headline not in {*results.metric} and (identical < 1).any():
        raise UserError(f"{headline} gives no score for a prompt that base and a tuned model both have")
    of_photos = {"photos": [row["photos"] for row in old["colour"]]} if old and not is_photo.any() else {}
    realism = pd.DataFrame(old.get("realism", []))
    if is_photo.any():
        realism = compare_realism(images, features, args.seed)
    groups = own.drop_duplicates("prompt_id").set_index("prompt_id").filter(regex="^group ")
    groups = groups.rename(columns=lambda column: column.removeprefix("group "))
    tables = {
        "results": results,
        "colour": compare_colour(images).assign(**of_photos),
        "realism": realism,
        "groups": compare_groups(different, groups, headline),
        "votes": agreement(votes, own, list(roles)) if len(votes) else pd.DataFrame(old.get("votes", [])),
    }
    tables = {name: found.fillna(math.nan).infer_objects() for name, found in tables.items()}
    models = own.model.unique()[1:].tolist()
    counts = own.groupby("model", sort=False).size()
    record = {"settings": settings, "roles": roles, "headline": headline, "caveats": notes, **tables, "verdicts": {}}
    for name in models:
        found = (tables[kind] for kind in ("results", "colour", "realism"))
        rows = [table[table.model == name] if len(table) else table for table in found]
        record["verdicts"][name] = verdict(name, *rows, identical[name])
    record |= {"prompts": own.prompt_id.nunique(), "images": counts.to_dict()}
    few = f"{min(counts)} to " if min(counts) < max(counts) else ""
    told = f"{record['prompts']} prompts, {few}{max(counts)} images of each model"
    record["counts"] = f"{told}; the headline is {headline}." if held_out else f"{told}; no scorer is held out."

    # What is written
    columns = [name for name in own if not str(name).startswith("not vetoed by ")]
    places = [os.path.relpath(path, output) for path in own.path]
    text = own.assign(path=places)[columns].to_csv(index=False)
    write_text(output / "per_image.csv", text)
    plain = {name: json.loads(found.to_json(orient="records", double_precision=15)) for name, found in tables.items()}
    everything = json.dumps(record | plain, indent=1, default=str)
    write_text(output / "metrics.json", everything)
    draw_win_rates(output / "win_rates.png", results)
    draw_colours(output / "colour.png", own)
    draw_models(output / "grid.png", own, [(prompt_id, "") for prompt_id in own.prompt_id.unique()[:8]])
    for name in different.index.unique("model")[1:]:
        found = prompts_to_show(first_images(own), name, headline, args.seed)
        titled = [(prompt_id, "" if place else kind) for kind in ("Best wins", "Worst losses")
                  for place, prompt_id in enumerate(found.get(kind, []))]  # fmt: skip
        draw_models(output / f"changes-{name}.png", own[own.model.isin(["base", name])], titled)
    write_report(output, record, own)
    print_summary(cells_of(record))
    if args.user_study:
        pairs = write_study(output, own, args.user_study, args.seed)
        told = "then the same command with --votes votes-*.json"
        print(f"\nask        people, with the {pairs} pairs of {output / 'user_study.html'}; {told}")
    print(f"\nopen       {output / 'report.html'}", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


# ---- Command line ---------------------------------------------------------------------------------------------------


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


def within(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of this kind from `low`, or above it, to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            most = "" if math.isinf(high) else f", at most {high}"
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low}{most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; without a model the embedded world's. Models and identity are parsed."""
    parser = argparse.ArgumentParser(
        prog="eval_human.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count = within(int, 1)

    # fmt: off
    flag = parser.add_argument_group("models").add_argument
    flag("--pretrained_model_name_or_path", help="base model: SD 1.x, 2.x, XL, 3 or 3.5; none: the embedded world")
    flag("--revision", help="branch, tag or commit of the model on the hub")
    flag("--variant", help="variant of the weight files, such as fp16")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="what it draws in; none: fp16 on CUDA, else no")
    flag("--models", nargs="+", metavar="NAME=PATH[,option=value...]", default=["base", "dpo=dpo-human-lora"],
         help="base, and LoRAs (also of the hub), folders with unet/ or transformer/, whole pipelines, or folders of "
              f"finished images; {'; '.join(f'{name}: {words}' for name, words in MODEL_OPTIONS.items())}")
    flag("--identity", metavar="SPEC", help="a person, drawn by every model: lora=PATH[,scale=S] or ip_adapter=FILE,"
         "image=FILE_OR_FOLDER[,scale=S][,image_encoder=PATH]; a DreamBooth model is a base")

    flag = parser.add_argument_group("images").add_argument
    flag("--prompts", help="file (.txt, one a line, # is a comment; .jsonl, .json, .csv, .tsv, .parquet), folder of "
                           "photos with captions, folder or hub name (owner/name[:split]) `datasets` reads; none: "
                           "the validation split of the pairs that a model was trained on")
    flag("--prompt_column", help="column of the prompts or captions; none: the first of prompt, caption, text")
    flag("--max_prompts", type=count, help="use only the first N distinct ones")
    flag("--num_images_per_prompt", type=count, default=1, help="averaged before models are compared")
    flag("--diversity_prompts", type=within(int, 0), default=0, help="so many prompts get two images at least")
    flag("--num_inference_steps", type=count, default=50, help="sampling steps")
    flag("--guidance_scale", type=within(float, 0), default=5.0, help="classifier-free guidance")
    flag("--negative_prompt", default="", help="one for all prompts")
    flag("--sampler", choices=["dpmsolver", "pipeline"], default="dpmsolver",
         help="the paper's DPM-Solver++ (of SD 3: the model's own), or the model's own")
    flag("--resolution", type=count, help="height and width in pixels; none: the model's own")
    flag("--height", type=count, help="height in pixels, where it is not --resolution")
    flag("--width", type=count, help="width in pixels, where it is not --resolution")
    flag("--batch_size", type=count, default=8, help="images drawn or measured at once by a process")
    flag("--seed", type=within(int, 0), default=1, help="seed of all images; another one than the training data's")

    flag = parser.add_argument_group("measures").add_argument
    flag("--scorers", nargs="+", metavar="NAME[=PATH][,option=value...]", default=["hpsv2", "clip", "pickscore"],
         help=f"{', '.join(SCORERS)}, module:function, file.py:function or file.jsonl; paper: {', '.join(PAPER)}; the "
              "first that did not choose the training pairs is the headline")
    flag("--training_scorer", nargs="+", metavar="NAME", default=[],
         help="what chose the training pairs, beside what is recorded with the weights")
    flag("--group_by", nargs="+", metavar="COLUMN", default=[], help="columns of --prompts to compare the headline by")
    flag("--real_data_dir", help="folder of real photos: KD, FD and CMMD to them, and their colours")
    flag("--feature_model", default="facebook/dinov2-large",
         help="of diversity, KD and FD: a DINOv2 or CLIPModel, or a TorchScript Inception: then FD is FID")
    flag("--cmmd_model", default="openai/clip-vit-large-patch14-336", help="CLIPModel of CMMD")

    flag = parser.add_argument_group("human votes").add_argument
    flag("--user_study", type=count, metavar="N", help="write a blind page of N random pairs for people to judge")
    flag("--votes", nargs="+", metavar="FILE", help="the files that the page saved")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="human-eval", help="folder of images, metrics and report; a second start carries on")
    flag("--from_csv", metavar="FILE", help="per_image.csv of an earlier run: report and statistics, without a model")
    # fmt: on

    args = parser.parse_args(argv)
    named = args.pretrained_model_name_or_path or args.from_csv
    if not named and not all(Path(parse_spec(spec)[1].get("model", "?")).is_dir() for spec in args.models):
        use_embedded_world(parser, "eval_human")  # two folders of finished images need no model
        args = parser.parse_args(argv)
        for own in parser.get_default("scorers"):  # "pickscore" means the world's, whatever options follow
            bare = re.compile(rf"^{own.partition('=')[0]}(?=,|$)")
            args.scorers = [bare.sub(lambda _, own=own: own, spec) for spec in args.scorers]
    if args.negative_prompt and args.guidance_scale <= 1:
        parser.error("--negative_prompt needs a --guidance_scale above 1")
    if args.resolution and args.height and args.width:
        parser.error("--resolution counts not beside --height and --width")
    if args.real_data_dir and not find_photos(Path(args.real_data_dir))[0]:
        parser.error(f"--real_data_dir {args.real_data_dir}: no such folder, or no images in it")
    if lost := [file for file in args.votes or () if not Path(file).is_file()]:
        parser.error(f"--votes: no such file: {lost[0]}")
    try:
        if args.from_csv and args.output_dir == parser.get_default("output_dir"):
            args.output_dir = str(Path(args.from_csv).parent)
        idle = [f for f in ("models", "prompts", "scorers", "group_by", "real_data_dir", "training_scorer")
                if getattr(args, f) != parser.get_default(f)]  # fmt: skip
        if args.from_csv and idle:
            parser.error(f"--{idle[0]} counts not beside --from_csv, which takes what was measured")
        args.models = [] if args.from_csv else parse_models(args.models)
        args.identity = parse_identity(args.identity) if args.identity else None
        if not args.prompts and not args.from_csv:
            splits = [sorted(folder.glob("data/validation*.parquet")) for folder in training_data(args.models)]
            if not any(splits):
                parser.error("no prompts: set --prompts to a text file with one prompt per line")
            args.prompts = str(next(filter(None, splits))[0])
    except UserError as error:
        parser.error(str(error))
    return args


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
