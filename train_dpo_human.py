# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14",
#     "diffusers>=0.36,<0.43",
#     "transformers>=4.57,<5.24",
#     "accelerate>=1.8,<1.16",
#     "peft>=0.17,<0.22",
#     "bitsandbytes>=0.46,<0.51; sys_platform == 'linux'",
#     "xformers>=0.0.29,<0.0.36; sys_platform == 'linux'",
#     "safetensors>=0.5,<0.9",
#     "datasets>=4,<5.3",
#     "huggingface_hub>=0.34,<3",
#     "filelock>=3.12,<4",
#     "pandas>=2,<4",
#     "matplotlib>=3.8,<4",
#     "pillow>=10.1,<14",
#     "pyarrow>=16,<27",
#     "numpy>=1.26,<3",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Trains a text-to-image model on preference pairs to draw people better: Diffusion-DPO with statistics matching.

HG-DPO (https://arxiv.org/abs/2405.20216). A pair is a winner x_w and a loser x_l, latents for one caption. Timestep
and noise are drawn once per pair, shared by both sides and by the policy and its frozen reference:

    x_t    = a x_0 + s noise                                                 add_noise
    err    = mean over (C, H, W) of (model(x_t, t, caption) - target)^2      image_error, in fp32
    logit  = beta ((err_ref_w - err_w) - (err_ref_l - err_l))                dpo_loss
    L_dpo  = -log sigmoid(logit)
    L_stat = || c (mu(x0_w) - mu(x0_ref_w)) ||^2,  mu: mean over (H, W)      predict_x0, statistics_matching_loss
    L      = L_dpo + lambda_stat L_stat                                      pair_losses calls them in this order

a, s and c belong to the noise path of the model's family, DDPM (SD 1.x, 2.x, SDXL) or flow matching (SD 3, SD 3.5).
c turns a difference in the predicted x_0 into that of one reverse step, so that L_stat, which keeps the colours of the
reference, costs no forward pass. The reference is the same model with its LoRA switched off, the frozen
--initial_lora, or a copy for --full_unet.

Without arguments it trains on human-preferences/ in the embedded world (tests/tiny_human). The usual command:

    accelerate launch train_dpo_human.py --pretrained_model_name_or_path YOUR_MODEL \\
        --train_data_dir human-preferences --output_dir dpo-human-lora --mixed_precision bf16 --use_8bit_adam

`pipeline.load_lora_weights("dpo-human-lora")` loads the result.

To change the loss, edit `dpo_loss`; its weight follows from it.
To change the timesteps, `draw_timesteps`; the held-out pairs follow it.
To read other columns, put a line first in LAYOUTS; labels in words become 1, 0 and 0.5 in `decide_pairs`.
To train another kind of model, write a class like `UNet` and name its pipeline in FAMILIES.
To log something new, give it a name in the dict that `pair_losses` returns, one value a pair.

Differences from the paper:
1. beta multiplies the margin itself, as in diffusers' SD script; code with 0.5 * beta * margin means the same by 5000.
2. Where the paper is silent: LoRA alpha = rank, a constant learning rate without warm-up, gradients clipped at norm 1.
3. 2,000 steps by default instead of 300,000: most people have thousands of pairs, not 300,000.
4. Latents and captions are encoded once; draws are functions of (seed, pair, epoch), whatever the number of processes.
5. Ties are left out, or soft labels of 0.5. Hinge and IPO, soft labels, the winner's safeguard of Diffusion-SDPO,
   SD 3's flow matching, LoRAs on all layers and training the whole model are there to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from tqdm.auto import tqdm


if TYPE_CHECKING:  # imported where they are used: a mistake in the command line costs no seconds of imports
    from accelerate import Accelerator
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel

WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
PART = 64  # pairs or captions in a file of what is encoded
HELD_OUT_DRAWS = 4  # timesteps at which each held-out pair is measured
MAX_BAD_SHARE = 0.05  # of rows that cannot be used: more end the run


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method -----------------------------------------------------------------------------------------------------


class NoisePath(NamedTuple):
    """x_t = a x_0 + s noise at each of the T points of a model's schedule, least noise first; (T,) each."""

    t: Tensor  # what the model is told
    a: Tensor
    s: Tensor
    c: Tensor  # one reverse step turns a difference in the predicted x_0 into c times it
    kind: str  # what the model predicts: epsilon, v_prediction, sample or flow


def add_noise(x_0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """x_t of the forward process; x_0 and noise (B, C, H, W), a and s (B, 1, 1, 1)."""
    return a * x_0 + s * noise


def training_target(x_0: Tensor, noise: Tensor, a: Tensor, s: Tensor, kind: str) -> Tensor:
    """What the model should predict, (B, C, H, W): the noise, v = a noise - s x_0, x_0, or the flow noise - x_0."""
    if kind == "flow":
        return noise - x_0
    if kind == "v_prediction":
        return a * noise - s * x_0
    return noise if kind == "epsilon" else x_0


def image_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over (C, H, W), (B, C, H, W) -> (B,); in fp32, as beta multiplies differences of 1e-4."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def dpo_loss(
    err_w: Tensor,
    err_l: Tensor,
    ref_err_w: Tensor,
    ref_err_l: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on per-image errors, (B,) each -> loss, logit and weight, (B,) each.

    The logit is positive where the policy improved on the winner, against the reference, more than on the loser.
    `beta` multiplies that improvement as it is; public code with a factor 0.5 means the same loss by twice the beta.
    `label` (B,) is the probability that the winner is the better one: 1, or 0.5 for a tie. "ipo" is IPO's loss times
    beta^2: the same minimum, logit = 1 / 2, with gradients of the size of the others'. The weight is the loss's own
    slope, the pair's share in the gradient: near 0 it has nothing left to teach.
    """

    def loss_if_better(logit: Tensor) -> Tensor:
        if loss_type == "hinge":
            return F.relu(1 - logit)
        return (logit - 0.5).square() if loss_type == "ipo" else -F.logsigmoid(logit)

    def loss_of(margin: Tensor) -> tuple[Tensor, Tensor]:
        logit = margin  # what caps or bends it belongs here: the weight is the slope of all of it
        return label * loss_if_better(logit) + (1 - label) * loss_if_better(-logit), logit

    margin = beta * ((ref_err_w - err_w) - (ref_err_l - err_l))
    with torch.enable_grad():
        point = margin.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(point)[0].sum(), point)
    return *loss_of(margin), -slope


def predict_x0(prediction: Tensor, x_t: Tensor, a: Tensor, s: Tensor, kind: str) -> Tensor:
    """The clean latents that a prediction stands for, fp32; prediction and x_t (B, C, H, W), a and s (B, 1, 1, 1)."""
    if kind == "epsilon":
        return (x_t - s * prediction.float()) / a
    if kind == "v_prediction":
        return a * x_t - s * prediction.float()
    return x_t - s * prediction.float() if kind == "flow" else prediction.float()


def safeguard_scale(residual_w: Tensor, residual_l: Tensor, mu: float) -> Tensor:
    """The factor (B,) in [0, 1] on the loser's gradient with which the winner's error does not rise (Diffusion-SDPO,
    arXiv 2511.03317): a step along -g_w + scale g_l lowers it, to first order, by at least mu |g_w|^2.

    g = residual = prediction - target (B, C, H, W) is the error's gradient in the space of outputs, up to a constant.
    Where g_w and g_l point the same way, scale <= (1 - mu) |g_w|^2 / <g_w, g_l>. Per pair; the authors' code takes one
    factor for the micro-batch.
    """
    g_w, g_l = (residual.detach().float().flatten(1) for residual in (residual_w, residual_l))
    aligned = (g_w * g_l).sum(dim=1)
    bound = (1 - mu) * g_w.square().sum(dim=1) / aligned
    return torch.where(aligned > 0, bound.clamp(max=1), torch.ones_like(bound))


def statistics_matching_loss(mu_w: Tensor, ref_mu_w: Tensor, c: Tensor) -> Tensor:
    """How far one reverse step by the policy moves the winner's channel means off the reference's (HG-DPO, L_stat).

    mu_w and ref_mu_w (B, C): the means over (H, W) of the predicted x_0. With the step's noise shared, the steps
    differ by c (x0 - ref_x0), c (B,), for every prediction type and schedule. Squared L2 norm over channels: (B,)
    """
    return (c[:, None] * (mu_w - ref_mu_w)).square().sum(dim=1)


def default_lambda_stat(path: NoisePath) -> float:
    """The paper's 10,000 for DDPM; for flow the factor with the same mean weight over the schedule.

    A difference in the prediction makes one of c s in a reverse step. On SD 1.5's schedule, epsilon, 10,000 times its
    square is 0.515 on average; a flow's steps are so small that it takes about 360,000 (shift 3, 1,000 steps).
    """
    return 0.515 / (path.c * path.s).square().mean().item() if path.kind == "flow" else 10_000.0


# ---- Draws: what a step sees is a function of (seed, position) ------------------------------------------------------


def draw_timesteps(quantile: Tensor, points: int, scheme: str = "none") -> Tensor:
    """Which of the schedule's points, least noise first, lie at quantiles (B,) in (0, 1): uniform, or SD 3's
    logit-normal; (B,) long. A scheme is an inverse distribution function: quantile ** 0.5 leans to much noise.

    Training draws the quantiles; held-out pairs are measured at evenly spaced ones.
    """
    if scheme == "logit_normal":
        quantile = torch.special.ndtri(quantile).sigmoid()
    return (quantile * points).long()


def draw_noise(
    seed: int, stream: str, draws: list[tuple[int, int]], shape: Sequence[int], points: int
) -> tuple[Tensor, Tensor]:
    """The noise (B, *shape) and the quantile (B,), one of `points`, of each draw, (pair, epoch); on the CPU."""
    noise, quantile = torch.empty(len(draws), *shape), torch.empty(len(draws), dtype=torch.float64)
    for i, (row, number) in enumerate(draws):
        digest = hashlib.sha256(f"{seed}|{stream}|{row}|{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        quantile[i] = (torch.randint(points, (), generator=generator) + 0.5) / points
        noise[i].normal_(generator=generator)
    return noise, quantile


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


def endless_batches(seed: int, buckets: list[np.ndarray], size: int) -> Iterator[list[tuple[int, int]]]:
    """(pair, epoch) of the pairs of each batch of a run, which share a bucket.

    Each bucket's pairs, every epoch in a new order, are cut into batches of `size`, of all its pairs if it has fewer,
    and what is left over begins the next epoch's: every pair comes once an epoch, none again for want of others.
    """
    waiting: list[list[tuple[int, int]]] = [[] for _ in buckets]
    for epoch in itertools.count():
        ready = []
        for number, pairs in enumerate(buckets):
            order = np.random.default_rng((seed, epoch, number)).permutation(pairs).tolist()
            rows, full = waiting[number] + [(pair, epoch) for pair in order], min(size, len(pairs))
            ready.append([rows[end - full : end] for end in range(full, len(rows) + 1, full)])
            waiting[number] = rows[len(ready[number]) * full :]
        turns = np.repeat(np.arange(len(buckets)), [len(batches) for batches in ready])
        for number in np.random.default_rng((seed, epoch)).permutation(turns):  # the buckets mixed
            yield ready[number].pop(0)


# ---- Model families: everything that depends on the kind of model ---------------------------------------------------


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


# ---- Data: where pairs come from ------------------------------------------------------------------------------------


LAYOUTS = (  # columns of images, label (None: the first image is the winner) and caption; the first that fits is taken
    ("jpg_0", "jpg_1", "label_0", "caption"),  # Pick-a-Pic and make_preference_data.py
    ("chosen", "rejected", None, "prompt"),  # open-image-preferences
    ("path1", "path2", None, "prompt"),  # HPDv3
    ("image_0", "image_1", "prefer_0", "prompt"),  # invoke-training
)


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


def rows_of_folders(folder: Path) -> list[dict[str, str]]:
    """Pairs written as w/NAME.jpg and l/NAME.jpg, at any depth, with the caption in w/NAME.txt or .caption, or in such
    a file beside w; UserError where it is not clear what belongs to what."""

    def images_of(place: Path) -> dict[str, Path]:
        files = [file for file in sorted(place.glob("[!.]*")) if file.suffix.lower() in suffixes and file.is_file()]
        stems = [file.stem for file in files]
        if twins := [stem for stem in stems if stems.count(stem) > 1]:
            raise UserError(f"{place} has several images named {twins[0]}: which one is meant?")
        return dict(zip(stems, files, strict=True))

    rows, suffixes = [], Image.registered_extensions()
    places = [Path(place) for place, *_ in os.walk(folder.absolute(), followlinks=True)]
    for place in sorted(place for place in places if place.name == "w" and "__MACOSX" not in place.parts):
        winners, losers = images_of(place), images_of(place.with_name("l"))
        if unpaired := sorted(winners.keys() ^ losers.keys()):
            raise UserError(f"{place.parent} has no {unpaired[0]} in {'w' if unpaired[0] in losers else 'l'}")
        for stem, winner in winners.items():
            caption = read_caption(winner) or read_caption(place.parent / winner.name)
            if not caption:
                raise UserError(f"{winner} has no caption in {stem}.txt or {stem}.caption beside it")
            rows.append({"chosen": str(winner), "rejected": str(losers[stem]), "prompt": caption})
    return rows


def first_rows(place: tuple[str, str | None], split: str, count: int) -> Iterator[dict[str, Any]]:
    """The first rows of a data set on the hub, of which no more is read."""
    import datasets

    stream = datasets.load_dataset(*place, split=split, streaming=True)
    yield from (stream.decode(False) if stream.features else stream).take(count)


def read_source(args: argparse.Namespace) -> tuple[dict[str, Dataset], Path]:
    """The splits, "train" and perhaps "validation", of --dataset_name or --train_data_dir, whatever their columns are
    called, and the folder that paths in them start at."""
    import datasets

    datasets.disable_progress_bars()
    source, split = Path(args.dataset_name or args.train_data_dir), args.dataset_split_name
    count = args.max_train_samples
    place, cache = (args.dataset_name, args.dataset_config_name), {"cache_dir": args.cache_dir}
    if args.dataset_name and not source.exists():  # on the hub
        names = datasets.get_dataset_split_names(*place)
        split = split or next((name for name in ("train", "validation") if name in names), names[0])
        rows = datasets.load_dataset(*place, split=split, streaming=count is not None, **cache)
        if count is not None:  # kept by `datasets` for the other processes and the next start
            own = {"place": place, "split": split, "count": count}
            rows = datasets.Dataset.from_generator(first_rows, features=rows.features, gen_kwargs=own, **cache)
        splits = {split: rows}
    elif not source.exists():
        raise UserError(f"no folder {source}: make pairs with make_preference_data.py, or set --train_data_dir")
    elif source.is_file():
        kind = "parquet" if source.suffix == ".parquet" else "json"
        splits = datasets.load_dataset(kind, data_files={"train": str(source)}, **cache)
    elif not any(source.glob("data/*.parquet")) and (rows := rows_of_folders(source)):
        splits = {"train": datasets.Dataset.from_list(rows)}
    else:  # by its files' names and times: a folder that was made again would come out of the cache as it was
        builder = datasets.load_dataset_builder(str(source), args.dataset_config_name, **cache)
        splits = datasets.load_dataset(builder.name, data_files=builder.config.data_files, **cache)
    name = split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits:
        raise UserError(f"{source} has no split {name!r}, only {', '.join(splits)}")
    if name != "train":
        splits = {"train": splits[name]}
    if count is not None:
        splits["train"] = splits["train"].select(range(min(count, len(splits["train"]))))
    return dict(splits), source.parent if source.is_file() else source


def decide_pairs(rows: Dataset, args: argparse.Namespace) -> tuple[pd.DataFrame, Counter]:
    """The pairs of a split that have a winner, and how many rows were left out, by reason.

    A table with the columns row (in `rows`), winner and loser (names of image columns), label (the probability that
    the winner is the better one) and caption.
    """
    columns = rows.column_names
    named = (args.image_0_column, args.image_1_column, args.label_0_column, args.caption_column)
    layouts = [[own or usual for own, usual in zip(named, layout, strict=True)] for layout in LAYOUTS]
    fitting = [layout for layout in layouts if all(column in columns for column in layout if column)]
    if not fitting:
        missing = [column for column in layouts[0] if column not in columns]
        raise UserError(f"the data has no column {', '.join(missing)} (it has {', '.join(columns)})")
    image_0, image_1, label_0, caption_column = fitting[0]
    label_1 = label_0.replace("0", "1") if "0" in (label_0 or "") else None
    wanted = {caption_column, label_0, label_1, "has_label"} - {image_0, image_1}
    if args.min_margin is not None or args.soft_labels:
        wanted.add(args.margin_column)
        if args.margin_column not in columns:
            raise UserError(f"--min_margin and --soft_labels need a column {args.margin_column}: set --margin_column")
    table = rows.select_columns([column for column in columns if column in wanted]).to_pandas()

    def numbers(column: str | None, default: Any) -> pd.Series:
        values = table[column] if column in table else pd.Series(default, index=table.index)
        return pd.to_numeric(values, errors="coerce").astype(float)

    first = numbers(label_0, 1.0)  # 1 where the first image won, 0, or 0.5 for a tie
    second = numbers(label_1, 1 - first)
    if label_0 == "prefer_0":  # invoke-training: a vote for neither
        first, second = (side.where(first + second > 0, 0.5) for side in (first, second))
    margin, tie = numbers(args.margin_column, math.inf), first == 0.5
    caption = table[caption_column].map(lambda text: text.strip() if isinstance(text, str) else "")
    reason = np.select(
        [
            numbers("has_label", 1.0) == 0,
            ~first.isin((0, 0.5, 1)) | (first + second != 1),
            caption == "",
            margin.isna(),
            tie & (args.ties == "drop"),
            margin < (-math.inf if args.min_margin is None else args.min_margin),
        ],
        ["without a label", "WRONG LABEL", "WITHOUT A CAPTION", "WITHOUT A MARGIN", "tied", "below --min_margin"],
        default="",
    )
    label = pd.Series(1.0, index=table.index)
    if args.soft_labels:  # where a photo beats a higher score, as in the Hard stage, it is still the winner
        label = 1 / (1 + np.exp(-margin.clip(lower=0) / args.soft_labels))
    pairs = pd.DataFrame({
        "row": np.arange(len(table)),
        "winner": np.where(first == 0, image_1, image_0),
        "loser": np.where(first == 0, image_0, image_1),
        "label": label.mask(tie, 0.5),
        "caption": caption,
    })  # fmt: skip
    return pairs[reason == ""].reset_index(drop=True), Counter(reason[reason != ""].tolist())


def refuse_bad_rows(dropped: Counter, total: int, name: str) -> None:
    """Ends the run where too many rows cannot be used: those whose reason is in capitals."""
    bad = {reason: count for reason, count in dropped.items() if reason.isupper()}
    if sum(bad.values()) > MAX_BAD_SHARE * total:
        reasons = ", ".join(f"{count} {reason.lower()}" for reason, count in bad.items())
        raise UserError(f"{sum(bad.values())} of {total} rows of split {name!r} cannot be used: {reasons}")


def hold_out(pairs: pd.DataFrame, share: float) -> np.ndarray:
    """Which pairs (N,) to hold out: about this share of the captions, by each caption's hash; of the pairs where there
    are too few captions for that."""
    texts = pairs.caption if pairs.caption.nunique() * share >= 3 else pairs.caption + "|" + pairs.row.astype(str)
    digests = [hashlib.sha256(text.encode()).digest()[:4] for text in texts]
    return np.array([int.from_bytes(digest, "big") < share * 2**32 for digest in digests], dtype=bool)


# ---- Data: encoded once, read memory-mapped -------------------------------------------------------------------------


@dataclass(eq=False)
class Pairs:
    """What training reads of a split, N pairs, winners first: latents, (2, C, h, w) each, scaled, in fp16; label (N,);
    sizes (N, 6): original height and width, top and left of the crop, height and width, in pixels; row (N,): of the
    data; buckets: the pairs of each size; key: changes with the data, not with its place; text: each caption's
    embeddings, None where the text encoder is trained; paths: the noise path of each size of latents, (h, w)."""

    latents: list[Tensor]
    label: Tensor
    sizes: Tensor
    row: list[int]
    caption: list[str]
    buckets: list[np.ndarray]
    key: str
    text: dict[str, dict[str, Tensor]] | None = None
    paths: dict[tuple[int, int], NoisePath] = field(default_factory=dict)


class Batch(NamedTuple):
    """B pairs. Winners then losers along dim 0 of x_0 (2B, C, h, w); noise (B, C, h, w), the place on the noise path
    (B,), text and sizes (B, 6) are shared by both sides."""

    x_0: Tensor
    noise: Tensor
    path: NoisePath
    label: Tensor
    text: dict[str, Tensor] | list[str]
    sizes: Tensor


def open_pair(cells: Dataset, pair: Any, folder: Path) -> list[BinaryIO]:
    """The files of winner and loser in Arrow cells: bytes, {"bytes", "path"} of `datasets.Image`, or a path below
    `folder`; OSError where there is none."""
    row, files = cells[int(pair.row)], []
    for value in (row[pair.winner][0], row[pair.loser][0]):
        if isinstance(value, pa.StructScalar) and value.is_valid:
            value = value["bytes"] if value["bytes"].is_valid else value["path"]
        if not value.is_valid:
            raise OSError("there is no image")
        named = pa.types.is_string(value.type) or pa.types.is_large_string(value.type)
        files.append((folder / value.as_py()).open("rb") if named else io.BytesIO(value.as_py()))
    return files


def pair_key(cells: Dataset, pair: Any, folder: Path) -> str:
    """What a pair's images are, the same in another place and after a copy: a hash of their sizes in bytes and of 4 kB
    in their middle. In capitals: why the pair cannot be used."""
    try:
        files, pieces = open_pair(cells, pair, folder), []
    except OSError:
        return "UNREADABLE"
    for file in files:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size // 2 - 2048))
        pieces.append(b"%d|" % size + file.read(4096))
    if pieces[0] == pieces[1] and len({file.seek(0) or file.read() for file in files}) == 1:
        return "THE SAME IMAGE TWICE"
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]


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


def bucket_size(height: int, width: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The bucket of an image: about resolution^2 pixels in its own aspect ratio, sides in steps of resolution / 8."""
    step = max(1, resolution // 8 // multiple) * multiple
    ratio = min(max(height / width, 0.5), 2)
    sides = (resolution * math.sqrt(ratio), resolution / math.sqrt(ratio))
    return tuple(round(side / step) * step for side in sides)


def crop_corner(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Top and left, in pixels after scaling, of the centre crop that fills `size`: what SDXL is told, and what is
    cut."""
    scale = max(size[0] / height, size[1] / width)
    return round((height * scale - size[0]) / 2), round((width * scale - size[1]) / 2)


def hash_of(*parts: Any) -> str:
    """A short name for what a cached file depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weights_hash(*modules: torch.nn.Module) -> str:
    """A hash of about 1,000 values of each weight, as fp16: what a model is, whatever its folder is called and whether
    it was loaded in fp16 or fp32, in milliseconds."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            flat = value.detach().flatten()
            values = flat[:: max(1, len(flat) // 1000)].to("cpu", torch.float16)
            digest.update(f"{name}{tuple(value.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def wait_patiently(accelerator: Accelerator) -> None:
    """A barrier that waits for hours, for a download or for what is encoded; all others keep the library's minutes,
    after which a fault shows."""
    if accelerator.num_processes > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
        torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)  # its sockets and threads, too


def make_parts(
    paths: list[Path], make: Callable[[int], dict[str, Tensor]], accelerator: Accelerator, title: str
) -> list[dict[str, Tensor]]:
    """The tensors of safetensors files, memory-mapped; `make` gives those of the file of this number. The processes
    share out those that are missing, one writer a file, under a temporary name: what an interrupted start has made is
    not made again."""
    from safetensors.torch import load_file, save_file

    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    wait_patiently(accelerator)  # all have looked
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for number in tqdm(mine, title, unit="part", disable=not (mine and accelerator.is_main_process)):
        unfinished = paths[number].with_name(f".{paths[number].name}.{os.getpid()}")
        save_file(make(number), unfinished)
        unfinished.replace(paths[number])
    wait_patiently(accelerator)
    return [load_file(path) for path in paths]


@torch.no_grad()
def encode_pairs(
    name: str, rows: Dataset, table: pd.DataFrame, folder: Path, pipe: DiffusionPipeline, family: UNet,
    dropped: Counter, args: argparse.Namespace, accelerator: Accelerator,
) -> Pairs:  # fmt: skip
    """The pairs of a split (see decide_pairs) with their latents: the data set's own where they are this VAE's and of
    the right size, else the VAE's. What cannot be read, or is one image twice, is counted in `dropped`."""
    vae, cells, record = pipe.vae, rows.with_format("arrow"), folder / "preference_data.json"
    made = (json.loads(record.read_text(encoding="utf-8")).get("latents") if record.is_file() else None) or {}
    same = (made.get("vae_hash"), made.get("scaling_factor")) == (weights_hash(vae), vae.config.scaling_factor)
    own = made["shape"] if same and {"latents_0", "latents_1"} <= set(rows.column_names) else None

    unread: Counter = Counter()

    def read(pair: Any) -> tuple[list[int], Tensor | None]:
        """A row of Pairs.sizes, and latents (2, C, h, w) or pixels (2, 3, H, W); zeros and None where it fails."""
        try:
            images = [read_image(file) for file in open_pair(cells, pair, folder)]
            width, height = images[0].size
            size = (args.height, args.width)
            if args.aspect_ratio_buckets:
                size = bucket_size(height, width, args.resolution, family.multiple)
            sizes = [height, width, *crop_corner(height, width, size), *size]
            shape = (2, vae.config.latent_channels, *(side // pipe.vae_scale_factor for side in size))
            if own == list(shape[1:]):
                row = cells[int(pair.row)]
                values = b"".join(row[f"latents_{side[-1]}"][0].as_py() for side in (pair.winner, pair.loser))
                return sizes, torch.frombuffer(bytearray(values), dtype=torch.float16).view(shape)
            images = [ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS) for image in images]
            return sizes, torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        except Exception as error:  # Pillow's plugins raise all kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # the machine's fault, not the image's: it must not be remembered as unreadable
            tqdm.write(f"warning:   row {pair.row} of {name} is unreadable: {type(error).__name__}: {error}")
            return [0] * 6, None

    def encode(number: int) -> dict[str, Tensor]:
        """The tensors of a part: each pair's latents, and the rows of Pairs.sizes. Threads read the images."""
        with ThreadPoolExecutor() as pool:
            sizes, values = zip(*pool.map(read, parts[number].itertuples()), strict=True)
        unread["UNREADABLE"] += sum(value is None for value in values)
        refuse_bad_rows(dropped + unread, len(rows), name)
        tensors = {str(i): value for i, value in enumerate(values) if value is not None}
        for shape in {value.shape for value in tensors.values() if value.dtype == torch.uint8}:
            alike = [i for i, value in tensors.items() if value.shape == shape]
            count = max(1, 2**20 // shape[2:].numel())  # pairs at once: four of 512 x 512
            for some in (alike[start : start + count] for start in range(0, len(alike), count)):
                pixels = torch.cat([tensors[i] for i in some]).to(accelerator.device).float() / 127.5 - 1
                latents = family.to_latents(pipe, pixels).to("cpu", torch.float16).contiguous()
                tensors |= dict(zip(some, latents.unflatten(0, (-1, 2)), strict=True))
        return tensors | {"sizes": torch.tensor(sizes)}

    with ThreadPoolExecutor() as pool:
        keys = pool.map(lambda pair: pair_key(cells, pair, folder), table.itertuples())
        show = {"unit": "pair", "disable": not accelerator.is_main_process, "leave": False}
        table = table.assign(key=list(tqdm(keys, f"checking {name}", len(table), **show)))
    bad = table.key.str.isupper()
    dropped.update(table.key[bad])
    refuse_bad_rows(dropped, len(rows), name)
    table = table[~bad]
    parts = [table[start : start + PART] for start in range(0, len(table), PART)]
    shape = [args.resolution, "buckets"] if args.aspect_ratio_buckets else [args.height, args.width]
    vae_key = [weights_hash(vae), own, *(value.tolist() for value in family.latent_scale(vae))]
    keys = [hash_of(part.key.tolist(), shape, vae_key) for part in parts]
    paths = [Path(args.encoded_dir, f"latents-{key}.safetensors") for key in keys]
    made = make_parts(paths, encode, accelerator, f"encoding {name}" if not own else f"reading {name}")

    sizes = torch.cat([tensors["sizes"] for tensors in made])
    readable = (sizes[:, 0] > 0).numpy()
    dropped.update(["UNREADABLE"] * int((~readable).sum()))
    refuse_bad_rows(dropped, len(rows), name)
    table, sizes = table[readable], sizes[readable]
    latents = [tensors[str(i)] for tensors in made for i in range(len(tensors["sizes"])) if str(i) in tensors]
    label, buckets = torch.tensor(table.label.to_numpy(), dtype=torch.float32), sizes[:, 4:].unique(dim=0)
    buckets = [np.flatnonzero((sizes[:, 4:] == size).all(dim=1)) for size in buckets]
    key = hash_of(*(table[column].tolist() for column in ("key", "label", "caption")))
    return Pairs(latents, label, sizes, table.row.tolist(), table.caption.tolist(), buckets, key)


@torch.no_grad()
def encode_captions(
    captions: list[str], pipe: DiffusionPipeline, family: UNet, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, dict[str, Tensor]]:
    """The embeddings of distinct captions, each encoded once."""
    tokenizers = [part for name, part in pipe.components.items() if "tokenizer" in name and part is not None]
    tokens, longest = [part(captions).input_ids for part in tokenizers], pipe.tokenizer.model_max_length
    if cut := sum(len(ids) > longest for ids in tokens[0]):
        accelerator.print(f"captions:  {cut} of {len(captions)} have more than the {longest} tokens that CLIP reads")
    encoders = weights_hash(*text_encoders(pipe).values()), str(pipe.text_encoder.dtype), type(pipe).__name__
    parts = [slice(start, start + PART) for start in range(0, len(captions), PART)]
    keys = [hash_of(captions[part], [ids[part] for ids in tokens], encoders) for part in parts]

    def encode(number: int) -> dict[str, Tensor]:
        text = family.encode_text(pipe, captions[parts[number]])
        return {name: value.cpu().contiguous() for name, value in text.items()}

    paths = [Path(args.encoded_dir, f"captions-{key}.safetensors") for key in keys]
    made = make_parts(paths, encode, accelerator, "encoding captions")
    rows = [dict(zip(part, values, strict=True)) for part in made for values in zip(*part.values(), strict=True)]
    return dict(zip(captions, rows, strict=True))


def make_batch(
    pairs: Pairs, draws: list[tuple[int, int]], held_out: bool, args: argparse.Namespace, device: torch.device
) -> Batch:
    """The pairs (B) of draws, (pair, epoch), which share a bucket, with their noise and timesteps, on the device; of
    held-out pairs a draw is (pair, number of the timestep)."""
    from accelerate.utils import send_to_device

    rows, stream = [row for row, _ in draws], "validation" if held_out else "train"
    x_0 = torch.stack([pairs.latents[row] for row in rows], dim=1).flatten(0, 1).float()
    path = pairs.paths[tuple(x_0.shape[2:])]
    noise, quantile = draw_noise(args.seed, stream, draws, x_0.shape[1:], len(path.t))
    if held_out:
        quantile = torch.tensor([(number + 0.5) / HELD_OUT_DRAWS for _, number in draws], dtype=torch.float64)
    point = draw_timesteps(quantile, len(path.t), args.weighting_scheme)
    path = NoisePath(*(values[point] for values in path[:4]), path.kind)
    text: Any = [pairs.caption[row] for row in rows]
    if pairs.text is not None:
        texts = [pairs.text[caption] for caption in text]
        text = {name: torch.stack([one[name] for one in texts]) for name in texts[0]}
    return send_to_device(Batch(x_0, noise, path, pairs.label[rows], text, pairs.sizes[rows]), device)


# ---- Models ---------------------------------------------------------------------------------------------------------


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


def load_model(args: argparse.Namespace, dtype: torch.dtype) -> tuple[DiffusionPipeline, UNet]:
    """The pipeline in `dtype`, but for the VAE, and with --full_unet the model in training, which are fp32, without
    SD's safety checker; and its family. UserError for a pipeline of none, or that cannot be found."""
    from diffusers import AutoencoderKL, DiffusionPipeline
    from safetensors import SafetensorError

    name, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        config = DiffusionPipeline.load_config(name, **source)
        if config["_class_name"] not in FAMILIES:
            raise UserError(f"{name} is a {config['_class_name']}: {', '.join(FAMILIES)} can be trained")
        family = FAMILIES[config["_class_name"]]()
        parts = {key: None for key, value in config.items() if isinstance(value, list) and value[0] is None}  # no T5
        if "safety_checker" in config:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        if vae is not None:
            place = "vae" if Path(vae, "vae").is_dir() else None
            parts["vae"] = AutoencoderKL.from_pretrained(vae, subfolder=place, cache_dir=args.cache_dir)
        dtypes = {"default": dtype, "vae": torch.float32, family.model: torch.float32 if args.full_unet else dtype}
        pipe = DiffusionPipeline.from_pretrained(name, variant=args.variant, torch_dtype=dtypes, **source, **parts)
    except (OSError, ValueError, SafetensorError) as error:
        hint = " (where all files are fp16, set --variant fp16)" * (isinstance(error, OSError) and not args.variant)
        raise UserError(f"cannot load {name}: {str(error).splitlines()[0]}{hint}") from error
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, family


def load_initial_model(model: torch.nn.Module, part: str, args: argparse.Namespace) -> None:
    """The U-Net or transformer of an earlier stage, in a folder or on the hub, under unet/ or not, takes the base's
    place; UserError where there is none that fits."""
    why, same = None, {"torch_dtype": model.dtype, "cache_dir": args.cache_dir}
    for options in ({"subfolder": part, "variant": args.variant}, {"variant": args.variant}, {"subfolder": part}, {}):
        try:
            other = type(model).from_pretrained(args.initial_unet, **same, **options)
            model.load_state_dict(other.state_dict())
            return
        except (OSError, RuntimeError) as error:  # not there, or of other sizes
            why = why or str(error).splitlines()[0]
    raise UserError(f"--initial_unet {args.initial_unet} does not fit: {why}")


def text_encoders(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The text encoders that the pipeline holds, by name: one of SD 1.x and 2.x, two of SDXL, three of SD 3."""
    return {name: part for name, part in pipe.components.items() if "text_encoder" in name and part is not None}


def lora_targets(model: torch.nn.Module, family: UNet, layers: list[str]) -> list[str]:
    """The names of the layers that --lora_layers asks for: attention, all, or the ends of their names."""
    if layers == ["attention"]:
        return family.attention
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    if layers == ["all"]:
        return [name for name in names if "block" in name]
    if unknown := [end for end in layers if not any(f".{name}".endswith(f".{end}") for name in names)]:
        raise UserError(f"--lora_layers: no linear layer or convolution is called {', '.join(unknown)}")
    return layers


def add_lora(module: torch.nn.Module, rank: int, alpha: float, layers: list[str]) -> None:
    """Adds the adapter "default", unless --initial_lora brought one, and makes it trainable, in fp32."""
    from peft import LoraConfig

    if "default" not in (getattr(module, "peft_config", None) or {}):
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
        module.add_adapter(config)  # "default"
    for name, weight in module.named_parameters():
        weight.requires_grad_("lora_" in name and ".default." in name)
        if weight.requires_grad:
            weight.data = weight.data.float()


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


class Policy(torch.nn.Module):
    """All that may be trained, the denoiser and perhaps text encoders, as the one module that DDP wraps; the frozen
    copy that --full_unet is measured against is another one."""

    def __init__(self, pipe: DiffusionPipeline, family: UNet, model: torch.nn.Module, args: argparse.Namespace):
        super().__init__()
        self.pipe, self.family, self.model = pipe, family, model
        encoders = text_encoders(pipe).items() if args.train_text_encoder else ()  # the CLIPs; T5 has no LoRA format
        self.text_encoders = torch.nn.ModuleDict({name: one for name, one in encoders if "CLIP" in type(one).__name__})
        self.dtype = next(model.parameters()).dtype
        self.call = [torch.compile(model) if args.compile else model]  # in a list, or it were a second submodule

    def forward(self, x_t: Tensor, t: Tensor, text: dict[str, Tensor] | list[str], sizes: Tensor) -> Tensor:
        """The prediction for winners and losers x_t (2B, C, h, w), which share t (B,), text and sizes (B, 6)."""
        if isinstance(text, list):
            text = self.family.encode_text(self.pipe, text)
        text = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in text.items()}
        return self.family.predict(self.call[0], x_t.to(self.dtype), t.repeat(2), text, sizes.repeat(2, 1))

    def adapted(self) -> dict[str, torch.nn.Module]:
        """The modules that have a LoRA, by their names in the pipeline."""
        modules = {self.family.model: self.model, **self.text_encoders}
        return {name: module for name, module in modules.items() if getattr(module, "peft_config", None)}

    def trained(self) -> dict[str, Tensor]:
        """The trainable weights by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}


@contextlib.contextmanager
def reference(policy: torch.nn.Module, frozen: Policy | None) -> Iterator[torch.nn.Module]:
    """The frozen model that the policy is measured against: the copy, or the policy itself with the adapter of
    --initial_lora, or with its adapters off."""
    plain = getattr(policy, "module", policy)  # DDP's
    required = [(weight, weight.requires_grad) for weight in plain.parameters()]
    for module in plain.adapted().values():
        if "reference" in module.peft_config:
            module.set_adapter("reference")
        else:
            module.disable_adapters()
    yield frozen or policy
    for module in plain.adapted().values():
        module.enable_adapters()
        module.set_adapter("default")
    for weight, own in required:  # peft's switches turn gradients on and off
        weight.requires_grad_(own)


# ---- Training step --------------------------------------------------------------------------------------------------


def pair_losses(
    policy: torch.nn.Module, frozen: Policy | None, batch: Batch, args: argparse.Namespace
) -> dict[str, Tensor]:
    """The docstring's formula on a batch: what is minimised, "loss", and all else that is logged, (B,) each."""
    t, a, s, c, kind = batch.path
    a, s = (values.repeat(2).view(-1, 1, 1, 1) for values in (a, s))
    noise = batch.noise.repeat(2, 1, 1, 1)
    x_t = add_noise(batch.x_0, noise, a, s)
    with torch.no_grad(), reference(policy, frozen) as model:
        ref = model(x_t, t, batch.text, batch.sizes)
    prediction = policy(x_t, t, batch.text, batch.sizes)

    target = training_target(batch.x_0, noise, a, s, kind)
    err_w, err_l = image_error(prediction, target).chunk(2)
    ref_err_w, ref_err_l = image_error(ref, target).chunk(2)
    of = (ref_err_w, ref_err_l, args.beta_dpo, args.loss_type, batch.label)
    dpo, logit, weight = dpo_loss(err_w, err_l, *of)
    scale = torch.ones_like(err_l)
    if args.winner_safeguard is not None:  # of a pair whose loss pushes the winner up, nothing is held back
        scale = safeguard_scale(*(prediction - target).chunk(2), args.winner_safeguard).where(weight > 0, scale)
        dpo, logit, weight = dpo_loss(err_w, err_l.detach() + scale * (err_l - err_l.detach()), *of)

    prediction_w, ref_w, *noised = (values.chunk(2)[0] for values in (prediction, ref, x_t, a, s))
    mu_w, ref_mu_w = (predict_x0(one, *noised, kind).mean(dim=(2, 3)) for one in (prediction_w, ref_w))
    stat = args.lambda_stat * statistics_matching_loss(mu_w, ref_mu_w, c)
    norms = [values.detach().float().flatten(1).norm(dim=1) for values in (prediction, ref)]
    return {
        "loss": dpo + stat,
        "loss/dpo": dpo,  # log 2 = 0.693 at the start; below it the policy prefers the winners
        "loss/statistics": stat,  # how far colours move from the reference's
        "error/winner": err_w,  # denoising errors of the policy
        "error/loser": err_l,
        "error/winner_over_reference": err_w - ref_err_w,  # below 0 the winners became likelier
        "error/loser_over_reference": err_l - ref_err_l,  # above 0 the losers became less likely
        "error/winner_relative": err_w / ref_err_w - 1,  # where it keeps rising, the run diverges
        "prediction_norm": (norms[0] / norms[1]).view(2, -1).mean(dim=0),  # flow's kind of colour shift
        "rewards/margins": logit,
        "rewards/accuracies": (logit > 0).float(),
        "dpo_weight": weight,  # near 0 the pair has nothing left to teach
        "loser_scale": scale,  # what --winner_safeguard leaves of the loser's gradient
    }


def any_process(accelerator: Accelerator, flag: bool | Tensor) -> bool:
    """Whether it is true on one process at least."""
    return bool(accelerator.reduce(torch.as_tensor(flag, device=accelerator.device).float()) > 0)


def keeps_rising(relative_errors: list[float], window: int = 5) -> bool:
    """Whether the winner's error against the reference's, as logged so far, shows the known divergence of DPO: above
    it by 20 % over the last `window` entries, and more than over those before. In the embedded world runs that end
    well lie at 6 to 12 %, and one without statistics matching, which loses its colours, at 195 %."""
    recent, before = relative_errors[-window:], relative_errors[-2 * window : -window]
    return len(before) == window and np.mean(recent) > max(0.2, np.mean(before))


# ---- Validation -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def averaged(ema: EMAModel | None, weights: list[Tensor]) -> Iterator[None]:
    """With --ema, the averaged weights instead of the latest."""
    if ema:
        ema.store(weights)
        ema.copy_to(weights)
    yield
    if ema:
        ema.restore(weights)


@torch.no_grad()
def held_out_metrics(
    policy: Policy, frozen: Policy | None, pairs: Pairs, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, float]:
    """The means of pair_losses over the held-out pairs, each at evenly spaced timesteps with the same noise every
    time."""
    batches, size = [], args.train_batch_size
    for bucket in pairs.buckets:
        draws = [(int(row), number) for row in bucket for number in range(HELD_OUT_DRAWS)]
        batches += [draws[start : start + size] for start in range(0, len(draws), size)]
    mine, total = batches[accelerator.process_index :: accelerator.num_processes], Counter()
    for draws in tqdm(mine or batches[:1], "held-out pairs", leave=False, disable=not accelerator.is_main_process):
        batch = make_batch(pairs, draws, True, args, accelerator.device)
        with accelerator.autocast():
            losses = pair_losses(policy, frozen, batch, args)
        total.update({name: value.sum() for name, value in losses.items()} | {"count": len(draws)})
    # a process without a batch measures one too, for the names, and adds nothing
    sums = [float(value) if mine else 0.0 for value in total.values()]
    *sums, count = accelerator.reduce(torch.tensor(sums, device=accelerator.device), "sum").tolist()
    return {f"validation/{name}": value / count for name, value in zip(total, sums, strict=False)}


@torch.no_grad()
def draw_images(
    model: Policy, prompts: list[str], text: dict[str, Tensor], args: argparse.Namespace, accelerator: Accelerator
) -> list[Image.Image]:
    """One image for each prompt by the pipeline's own call, in batches that fit beside the optimiser; prompt and seed
    decide the noise, so that models compare. `text`: the call's embeddings, none where a text encoder is trained."""
    pipe, family, images = model.pipe, model.family, []
    own = getattr(pipe, family.model)
    setattr(pipe, family.model, model.model)
    pipe.vae.to(accelerator.device)
    size = {"height": args.height, "width": args.width, "num_inference_steps": args.validation_inference_steps}
    guided = {family.guidance[0]: args.validation_guidance_scale or family.guidance[1]}
    for start in range(0, len(prompts), args.train_batch_size):
        some = slice(start, start + args.train_batch_size)
        inputs = {name: value[some] for name, value in text.items()} or {"prompt": prompts[some]}
        seeds = [torch.Generator().manual_seed(image_seed(args.seed, prompt, 0)) for prompt in prompts[some]]
        with accelerator.autocast():
            latents = pipe(**inputs, **size, **guided, generator=seeds, output_type="latent").images
        latents = family.unpack(pipe, latents, args.height, args.width)
        pixels = [family.to_pixels(pipe, x_0[None]) for x_0 in latents]  # in fp32: SDXL's VAE overflows in fp16
        images += [pipe.image_processor.postprocess(one)[0] for one in pixels]
    pipe.vae.to("cpu")
    setattr(pipe, family.model, own)
    return images


def show_images(
    accelerator: Accelerator, output: Path, step: int, rows: dict[str, list[Image.Image]], prompts: list[str]
) -> None:
    """validation/step-STEP.png and, the same, validation.png, and to the tracker: a row of images for each model, one
    column for each prompt, its caption underneath."""
    from matplotlib.figure import Figure

    size = next(iter(rows.values()))[0].size
    width, height = (2.4 * side / max(size) for side in size)
    figure = Figure((width * len(prompts) + 0.4, height * len(rows) + 1), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), len(prompts), squeeze=False)
    for axis, image in zip(axes.flat, itertools.chain(*rows.values()), strict=True):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label)
    for axis, prompt in zip(axes[-1], prompts, strict=True):
        axis.set_xlabel(textwrap.fill(prompt, 32, max_lines=5, placeholder=" ..."), fontsize=8)
    (output / "validation").mkdir(exist_ok=True)
    for place in (output / "validation" / f"step-{step:06}.png", output / "validation.png"):
        figure.savefig(place)
    picture = {"validation": np.asarray(Image.open(place).convert("RGB"))[None]}
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(picture, step=step, **layout)


# ---- Checkpoints and output -----------------------------------------------------------------------------------------


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, first to last."""
    found = [path for path in output.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def save_checkpoint(
    step: int, policy: Policy, state: dict[str, Any], identity: dict[str, Any], ema: EMAModel | None,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Writes checkpoint-STEP under a temporary name, renames it, and keeps the newest --checkpoints_total_limit: the
    trainable weights, the state of optimiser, schedule, scaler and EMA, what the run is, and what a pipeline loads."""
    from safetensors.torch import save_file

    folder = Path(args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_suffix(".partial")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir()
    weights = policy.trained()
    save_file({name: weight.detach().cpu() for name, weight in weights.items()}, unfinished / "model.safetensors")
    torch.save({"step": step} | {name: part.state_dict() for name, part in state.items()}, unfinished / "state.pt")
    (unfinished / "run.json").write_text(json.dumps(identity, indent=2), encoding="utf-8")
    with averaged(ema, list(weights.values())):
        save_weights(policy, unfinished, args)
    unfinished.rename(folder)
    kept = checkpoints(folder.parent)
    for old in kept[: -args.checkpoints_total_limit] if args.checkpoints_total_limit else ():
        shutil.rmtree(old)


@torch.no_grad()
def load_checkpoint(resume: str | None, output: Path, policy: Policy, state: dict, identity: dict[str, Any]) -> int:
    """Goes back to the checkpoint that --resume_from_checkpoint names, into the very tensors that the optimiser holds;
    returns the number of steps done, 0 where there is none. UserError where it is of another run."""
    from safetensors.torch import load_file

    named = [Path(resume), output / resume] if resume not in (None, "latest") else checkpoints(output)[-1:]
    if resume is None or not named:
        return 0
    folder = named[0] if named[0].is_dir() else named[-1]
    other = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if different := sorted(name for name in identity | other if identity.get(name) != other.get(name)):
        changes = ", ".join(f"{name} ({other.get(name)} there, {identity.get(name)} here)" for name in different)
        raise UserError(f"{folder} is of another run: {changes}")
    saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    weights = load_file(folder / "model.safetensors")
    for name, weight in policy.trained().items():
        weight.copy_(weights[name])
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def save_weights(policy: Policy, folder: Path, args: argparse.Namespace) -> None:
    """Writes what `pipeline.load_lora_weights(folder)` loads, or, from unet/ or transformer/, `from_pretrained`; with
    --export_kohya also what ComfyUI and A1111 load."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    layers = {}
    if all(weight.requires_grad for weight in policy.model.parameters()):
        policy.model.register_to_config(_name_or_path=None)  # what is written names no local path
        policy.model.save_pretrained(folder / policy.family.model)
    for name, module in policy.adapted().items():
        state = get_peft_model_state_dict(module, adapter_name="default")
        if name.startswith("text"):  # transformers 5 has no text_model level any more, everybody's files have
            state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
        usual = convert_state_dict_to_diffusers(state)  # knows attention alone: a mixed file would load in part
        layers[f"{name}_lora_layers"] = state if any(".lora_A." in key for key in usual) else usual
        metadata = module.peft_config["default"].to_dict() | {"base_model_name_or_path": None}
        metadata["target_modules"] = sorted(metadata["target_modules"])  # of a set: equal runs, equal files
        layers[f"{name}_lora_adapter_metadata"] = metadata
    if layers:
        policy.pipe.save_lora_weights(folder, **layers)
    if layers and args.export_kohya:
        kind = {"ss_base_model_version": "sdxl_base_v1-0"} if hasattr(policy.pipe, "text_encoder_2") else {}
        if policy.model.config.cross_attention_dim == 1024:
            kind = {"ss_v2": "True"}  # A1111 shows what it takes for SD 1 by default to SD 1 models alone
        name = f"{Path(args.output_dir).resolve().name}.kohya.safetensors"
        save_file(kohya_weights(policy), folder / name, {"format": "pt", **kind})


def kohya_weights(policy: Policy) -> dict[str, Tensor]:
    """The LoRA under kohya's keys, lora_unet_, lora_te_, of SDXL lora_te1_ and lora_te2_, each layer with its own
    alpha: its scale times its rank."""
    from peft.tuners.lora import LoraLayer

    first = "lora_te1_" if hasattr(policy.pipe, "text_encoder_2") else "lora_te_"
    prefixes, weights = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}, {}
    for part, module in policy.adapted().items():
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
                name = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                place = prefixes[part] + name.replace(".", "_")
                weights |= {
                    f"{place}.lora_down.weight": layer.lora_A["default"].weight.detach().cpu().contiguous(),
                    f"{place}.lora_up.weight": layer.lora_B["default"].weight.detach().cpu().contiguous(),
                    f"{place}.alpha": torch.tensor(float(layer.scaling["default"] * layer.r["default"])),
                }
    return weights


def write_model_card(policy: Policy, output: Path, args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """README.md: base model, code that loads the result, picture, data, metrics and settings; no local path."""
    from huggingface_hub import ModelCardData

    part, model = policy.family.model, type(policy.model).__name__
    base, name = Path(args.pretrained_model_name_or_path), args.hub_model_id or output.resolve().name
    local, base = base.exists(), base.resolve().name if base.exists() else str(base)
    load = [f'pipe.load_lora_weights("{name}")'] * bool(policy.adapted())
    if args.full_unet:
        load.append(f'pipe.{part} = diffusers.{model}.from_pretrained("{name}", subfolder="{part}")')
    tags = {"pipeline_tag": "text-to-image", "tags": ["text-to-image", "diffusers", "dpo"]}
    data = ModelCardData(base_model=None if local else base, library_name="diffusers", **tags)
    picture = "![reference above, tuned model below, same prompts and noise](validation.png)"
    table = [f"| {key} | {value:.5g} |" if isinstance(value, float) else f"| {key} | {value} |"
             for key, value in rows.items() if value is not None]  # fmt: skip
    lines = [
        *("---", data.to_yaml(), "---", "", f"# {name}", ""),
        f"A {'LoRA' if policy.adapted() else f'whole {part}'} for {base}, trained to draw people better with",
        "Diffusion-DPO and statistics matching ([HG-DPO](https://arxiv.org/abs/2405.20216)) by train_dpo_human.py.",
        *("", "```python", "import diffusers", ""),
        f'pipe = diffusers.{type(policy.pipe).__name__}.from_pretrained("{base}")',
        *(*load, "```", "", picture if (output / "validation.png").is_file() else "", ""),
        *("| | |", "|---|---|", *table, ""),
    ]
    (output / "README.md").write_text("\n".join(lines), encoding="utf-8")


def read_log(output: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def log(accelerator: Accelerator, output: Path, step: int, values: dict[str, float]) -> None:
    """To the trackers and to metrics.jsonl, where what is not finite is null."""
    accelerator.log(values, step=step)
    if accelerator.is_main_process and values:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


# ---- Main -----------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Loads data and model, encodes the pairs, trains, validates, and writes the weights."""
    quiet_libraries()
    import accelerate.utils
    from accelerate.tracking import get_available_trackers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from filelock import FileLock, Timeout

    # Processes, precision, tracker; the output folder and the repository are claimed before minutes are spent
    output, trackers = Path(args.output_dir), ["none", *map(str, get_available_trackers())]
    args.report_to = args.report_to or ("tensorboard" if "tensorboard" in trackers else "none")
    if args.report_to not in trackers:
        raise UserError(f"--report_to {args.report_to} is not installed: there are {', '.join(trackers)}")
    accelerate.utils.set_seed(args.seed)  # adapters start the same on every process; all else has seeds of its own
    accumulated = {"num_steps": args.gradient_accumulation_steps, "sync_with_dataloader": False}
    # SDXL does not read the last layer of its first text encoder
    ddp = {"broadcast_buffers": False, "find_unused_parameters": args.train_text_encoder}
    accelerator = accelerate.Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=accelerate.utils.ProjectConfiguration(args.output_dir, logging_dir=str(output / "logs")),
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(**accumulated),
        kwargs_handlers=[accelerate.utils.DistributedDataParallelKwargs(**ddp)],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise UserError(f"{accelerator.distributed_type.value}, of accelerate's configuration, does not work: use DDP")
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError("mixed precision fp16, of --mixed_precision or accelerate's configuration, needs a GPU")
    if is_main:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")  # until main ends
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"another run is writing to --output_dir {output}") from error
        if (output / "training_settings.json").is_file() and not args.resume_from_checkpoint:
            advice = "carry on with --resume_from_checkpoint latest, name another --output_dir, or remove it"
            raise UserError(f"{output} holds a run already: {advice}")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    token, args.hub_token = args.hub_token, None  # kept out of all that is written
    if args.push_to_hub and is_main:
        from huggingface_hub import create_repo

        name = args.hub_model_id or output.resolve().name
        args.hub_model_id = create_repo(name, exist_ok=True, token=token).repo_id

    # Pairs
    splits, folder = read_source(args)
    tables, dropped = {}, {name: Counter() for name in ("train", "validation")}
    for name, rows in splits.items():
        tables[name], dropped[name] = decide_pairs(rows, args)
        refuse_bad_rows(dropped[name], len(rows), name)
    if args.validation_share and "validation" not in tables:
        held = hold_out(tables["train"], args.validation_share)
        splits["validation"] = splits["train"]
        tables = {"train": tables["train"][~held], "validation": tables["train"][held]}
    tables = {name: table for name, table in tables.items() if len(table)}
    if "train" not in tables:
        reasons = ", ".join(f"{count} {reason.lower()}" for reason, count in dropped["train"].items())
        raise UserError(f"no pairs to train on ({reasons or 'all are held out'})")

    # The model, its size and its noise path
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe, family = load_model(args, dtype)
    model = getattr(pipe, family.model)
    usual = getattr(pipe, "default_sample_size", None) or model.config.sample_size
    args.resolution = args.resolution or usual * pipe.vae_scale_factor
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    if any(side % family.multiple for side in (args.resolution, args.height, args.width)):
        raise UserError(f"--resolution, --height and --width must be multiples of {family.multiple} for this model")
    if args.export_kohya and family.model != "unet":
        raise UserError("--export_kohya: kohya's format is for U-Nets; ComfyUI loads this LoRA as it is")
    path = family.path(pipe, args.height * args.width // family.multiple**2)
    args.lambda_stat = default_lambda_stat(path) if args.lambda_stat is None else args.lambda_stat
    model_key = hash_of(weights_hash(model, pipe.vae, *text_encoders(pipe).values()), path.kind, path.a.tolist())
    wait_patiently(accelerator)  # for downloads

    # What is encoded once; then the VAE leaves the device, and frozen text encoders the memory
    if not args.encoded_dir:
        from datasets.config import HF_DATASETS_CACHE

        args.encoded_dir = str((folder if folder.exists() else Path(args.cache_dir or HF_DATASETS_CACHE)) / "encoded")
    Path(args.encoded_dir).mkdir(parents=True, exist_ok=True)
    pipe.to(device)
    pairs = {}
    for name, table in tables.items():
        pairs[name] = encode_pairs(name, splits[name], table, folder, pipe, family, dropped[name], args, accelerator)
        for height, width in {tuple(pair.shape[2:]) for pair in pairs[name].latents}:
            tokens = height * width * pipe.vae_scale_factor**2 // family.multiple**2
            pairs[name].paths[height, width] = family.path(pipe, tokens)
    pipe.vae = pipe.vae.to("cpu") if args.run_validation else None
    pipe.scheduler = family.sampler(pipe)
    prompts = list(dict.fromkeys(pairs.get("validation", pairs["train"]).caption))[: args.num_validation_images]
    prompts, prompt_text = args.validation_prompts or prompts, {}
    if not args.train_text_encoder:
        with torch.no_grad():
            prompt_text = family.encode_text(pipe, prompts, do_classifier_free_guidance=True)
        captions = list(dict.fromkeys(caption for split in pairs.values() for caption in split.caption))
        embeddings = encode_captions(captions, pipe, family, args, accelerator)
        for split in pairs.values():
            split.text = embeddings
        for name in text_encoders(pipe):
            setattr(pipe, name, None)

    # What is trained, and the reference that it is measured against
    frozen_model = copy.deepcopy(model) if args.full_unet and args.reference == "base" else None
    if args.initial_unet:
        load_initial_model(model, family.model, args)
    for name, layers in (read_lora(pipe, args.initial_lora, args.cache_dir) if args.initial_lora else {}).items():
        module = pipe.components.get(name)
        if module is None:
            accelerator.print(f"warning:   the {name} of {args.initial_lora} is left out, as it is not trained here")
            continue
        load_lora(module, layers, "default")
        if args.full_unet and module is model:
            pipe.fuse_lora(components=[family.model])
            model.unload_lora()
        elif args.reference == "initial":
            load_lora(module, layers, "reference")
            module.set_adapter("default")
        module.requires_grad_(False)
    if args.full_unet:
        frozen_model = frozen_model or copy.deepcopy(model)
        for layer in frozen_model.modules():  # autocast rounds the policy's matrices and leaves its norms in fp32
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                layer.to(dtype)
        model.requires_grad_(True)
    elif not args.freeze_unet:
        add_lora(model, args.rank, args.lora_alpha, lora_targets(model, family, args.lora_layers))
    plain = Policy(pipe, family, model, args)
    for encoder in plain.text_encoders.values():
        add_lora(encoder, args.text_encoder_rank, args.text_encoder_rank, TEXT_ENCODER_LAYERS)
    for one in filter(None, (model, frozen_model)):
        if args.enable_xformers_memory_efficient_attention:
            one.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    frozen = frozen_model and Policy(pipe, family, frozen_model, args)

    # Optimiser, schedule, averages
    weights = list(plain.trained().values())
    adam = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW

        adam["fused"] = accelerator.scaler is None  # fused, it would not tell accelerate of a step that fp16 skips
    optimizer = AdamW(weights, **adam)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    batches = sum(max(1, len(bucket) / args.train_batch_size) for bucket in pairs["train"].buckets)
    epoch = batches / args.gradient_accumulation_steps / accelerator.num_processes  # in steps
    if args.num_train_epochs:
        args.max_train_steps = math.ceil(args.num_train_epochs * epoch)
    name = args.lr_scheduler.replace("constant", "constant_with_warmup")  # diffusers' "constant" ignores the warm-up
    lengths = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    lr_scheduler = get_scheduler(name, optimizer=optimizer, **lengths)
    ema = None if args.ema is None else EMAModel(weights, decay=args.ema, use_ema_warmup=False)
    policy, optimizer = accelerator.prepare(plain, optimizer)

    # Where it starts: at the beginning, or at a checkpoint of this very run
    settings = {name: getattr(args, name) for name in RUN}
    identity = dict(settings)
    identity |= {"pairs_per_step": per_step, "mixed_precision": accelerator.mixed_precision, "model": model_key}
    identity |= {"data": {name: split.key for name, split in pairs.items()}}
    identity |= {"start": weights_hash(plain) if args.initial_lora or args.initial_unet else None}
    identity |= {"train_batch_size": args.train_batch_size if args.aspect_ratio_buckets else None}
    identity |= {"max_train_steps": args.max_train_steps if args.lr_scheduler != "constant" else None}
    identity = json.loads(json.dumps(identity))
    state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "scaler": accelerator.scaler, "ema": ema}
    state = {name: part for name, part in state.items() if part is not None}
    first_step = load_checkpoint(args.resume_from_checkpoint, output, plain, state, identity)
    if ema:
        ema.to(device)
    if is_main:
        kept = [line for line in read_log(output) if line["step"] <= first_step]
        (output / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        everything = json.dumps({"settings": vars(args)}, indent=2)
        (output / "training_settings.json").write_text(everything + "\n", encoding="utf-8")

    # What is about to happen, in words
    count, held = (len(pairs[name].latents) if name in pairs else 0 for name in ("train", "validation"))
    left_out = [f"{n} {reason.lower()} ({name})" for name, part in dropped.items() for reason, n in part.items()]
    sizes = Counter(f"{height} x {width}" for height, width in pairs["train"].sizes[:, 4:].tolist())
    trained = [f"LoRA of rank {module.peft_config['default'].r} on {name}" for name, module in plain.adapted().items()]
    trained = ", ".join([f"the whole {family.model}"] * args.full_unet + trained)
    epochs, processes = args.max_train_steps / epoch, accelerator.num_processes
    summary = {
        "pairs": ", ".join([f"{count} to train on, {held} held out", *left_out]),
        "sizes": ", ".join(f"{size} ({n} pairs)" for size, n in sorted(sizes.items())),
        "trained": f"{trained}; {sum(weight.numel() for weight in weights):,} parameters in fp32",
        "precision": accelerator.mixed_precision,
        "objective": f"{args.loss_type} against the {args.reference} model, beta {args.beta_dpo:g} (in code with "
        f"0.5 * beta, as diffusers' SDXL script: {2 * args.beta_dpo:g}), lambda_stat {args.lambda_stat:.6g}",
        "steps": f"{first_step} to {args.max_train_steps}, {epochs:.1f} epochs",
        "batch": f"{args.train_batch_size} pairs x {args.gradient_accumulation_steps} accumulated x "
        f"{processes} process{'es' * (processes > 1)} = {per_step} pairs a step",
    }
    for name, value in summary.items():
        accelerator.print(f"{name + ':':11}{value}")
    accelerator.init_trackers("train_dpo_human", {name: str(value) for name, value in vars(args).items()})
    before = []
    if args.run_validation and is_main:
        with reference(plain, frozen) as untrained:
            before = draw_images(untrained, prompts, prompt_text, args, accelerator)
    wait_patiently(accelerator)  # for the drawing process

    # The loop; the first SIGTERM or Ctrl-C ends it after the step, with a checkpoint
    caught: list[int] = []

    def catch(number: int, _frame: Any) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once

    handlers = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    batches = endless_batches(args.seed, pairs["train"].buckets, args.train_batch_size)
    start = first_step * args.gradient_accumulation_steps * accelerator.num_processes + accelerator.process_index
    batches = itertools.islice(batches, start, None, accelerator.num_processes)
    window, stopped, logged = Counter(), False, read_log(output)
    latest = {name: value for line in logged for name, value in line.items() if name != "step"}
    relative = [line["error/winner_relative"] for line in logged if line.get("error/winner_relative")]
    steps = range(first_step + 1, args.max_train_steps + 1)
    bar = tqdm(steps, "training", unit="step", initial=first_step, total=args.max_train_steps, disable=not is_main)
    for step in bar:
        is_last, lr, began = step == args.max_train_steps, lr_scheduler.get_last_lr()[0], time.perf_counter()
        rows, pair_loss = [], []
        for draws in itertools.islice(batches, args.gradient_accumulation_steps):
            batch = make_batch(pairs["train"], draws, False, args, device)
            with accelerator.accumulate(policy):
                with accelerator.autocast():
                    losses = pair_losses(policy, frozen, batch, args)
                # a batch of a small bucket counts for its pairs
                accelerator.backward(losses["loss"].sum() / args.train_batch_size)
                window.update({name: value.detach().sum() for name, value in losses.items()} | {"pairs": len(draws)})
                rows += [pairs["train"].row[pair] for pair, _ in draws]
                pair_loss.append(losses["loss"].detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(weights, args.max_grad_norm)
                    finite = torch.cat(pair_loss).isfinite()
                    # fp16 has a scaler, which steps over gradients that overflow
                    fine = finite.all() & (norm.isfinite() | (accelerator.mixed_precision == "fp16"))
                    if any_process(accelerator, ~fine):
                        bad = [row for row, one in zip(rows, finite.tolist(), strict=True) if not one] or rows
                        raise UserError(
                            f"loss or gradient not finite in step {step}, rows {str(sorted(set(bad)))[1:-1]} of the "
                            "data; the weights were not touched: start from the last checkpoint (--initial_lora or "
                            "--initial_unet, --reference base) with a lower --learning_rate, bf16 or other rows"
                        )
                optimizer.step()
                optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            if ema:
                ema.step(weights)
        window.update({"grad_norm": norm, "steps": 1, "seconds": time.perf_counter() - began})

        if step % args.logging_steps == 0 or is_last:
            sums = torch.stack([torch.as_tensor(value, device=device).float() for value in window.values()])
            sums, window = dict(zip(window, accelerator.reduce(sums, "sum").tolist(), strict=True)), Counter()
            updates, seconds, seen = (sums.pop(name) for name in ("steps", "seconds", "pairs"))
            values = {name: value / (updates if name == "grad_norm" else seen) for name, value in sums.items()}
            values |= {"lr": lr, "pairs_per_second": seen * accelerator.num_processes / seconds}
            log(accelerator, output, step, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", accuracy=f"{values['rewards/accuracies']:.2f}")
            latest |= values
            relative.append(values["error/winner_relative"])
            if is_main and keeps_rising(relative) and not keeps_rising(relative[:-1]):
                bar.write(
                    f"warning:   step {step}: the winners' error is {np.mean(relative[-5:]):.0%} above the reference's"
                    " and rising: the run diverges; stop it, take an earlier checkpoint, lower the --learning_rate"
                )
        if args.run_validation and (step % args.validation_steps == 0 or is_last):
            metrics = {}
            with averaged(ema, weights):
                if "validation" in pairs:
                    metrics = held_out_metrics(plain, frozen, pairs["validation"], args, accelerator)
                if is_main:
                    images = draw_images(plain, prompts, prompt_text, args, accelerator)
                    show_images(accelerator, output, step, {"before": before, "tuned": images}, prompts)
            wait_patiently(accelerator)  # for the drawing process
            log(accelerator, output, step, metrics)
            latest |= metrics
        stopped = any_process(accelerator, bool(caught)) and not is_last
        if stopped or step % args.checkpointing_steps == 0:
            if is_main:
                save_checkpoint(step, plain, state, identity, ema, args)
            wait_patiently(accelerator)  # a whole SDXL is 50 GB
        if stopped:
            again = "the same command with --resume_from_checkpoint latest carries on"
            accelerator.print(f"\nstopped by a signal and saved after step {step}: {again}")
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)

    # The result
    if is_main and not stopped:
        with averaged(ema, weights):
            save_weights(plain, output, args)
        write_model_card(plain, output, args, summary | latest | settings)
    if args.push_to_hub and is_main and not stopped:
        from huggingface_hub import upload_folder

        lora = ["pytorch_lora_weights.safetensors", f"{output.resolve().name}.kohya.safetensors"]
        wanted = [*lora, f"{family.model}/*", "README.md", "validation.png"]
        upload_folder(repo_id=args.hub_model_id, folder_path=output, token=token, allow_patterns=wanted)
    wait_patiently(accelerator)  # a process that leaves while another saves may fall over its own threads
    accelerator.end_training()
    if stopped:
        sys.exit(128 + (caught[0] if caught else signal.SIGTERM))
    if (accuracy := latest.get("validation/rewards/accuracies")) is not None:
        accelerator.print(f"held out:  the right one is preferred in {accuracy:.0%} of pairs")
    accelerator.print(f"done:      {output}")


# ---- Command line ---------------------------------------------------------------------------------------------------

# fmt: off
RUN = [  # what a run is, beside its data and model: it is carried on with the same, and the model card names them
    "rank", "lora_alpha", "lora_layers", "full_unet", "train_text_encoder", "text_encoder_rank", "freeze_unet",
    "reference", "resolution", "height", "width", "aspect_ratio_buckets", "beta_dpo", "loss_type", "soft_labels",
    "ties", "winner_safeguard", "lambda_stat", "weighting_scheme", "learning_rate", "lr_scheduler",
    "lr_warmup_steps", "use_8bit_adam", "adam_weight_decay", "max_grad_norm", "ema", "seed",
]
# fmt: on


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; without a model the embedded world's settings are the defaults."""
    parser = argparse.ArgumentParser(
        prog="train_dpo_human.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, positive, share = within(int, 1), within(float, 0, above=True), within(float, 0, 0.9999999)

    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--pretrained_model_name_or_path", help="your model: SD 1.x, 2.x, XL, 3 or 3.5; none: the embedded world")
    flag("--pretrained_vae_model_name_or_path", help="a VAE in place of the model's own, such as an fp16 fix")
    flag("--revision", help="branch, tag or commit of the model on the hub")
    flag("--variant", help="variant of the weight files, such as fp16")
    flag("--cache_dir", help="where downloaded models and data sets are kept")
    flag("--rank", type=count, default=8, help="rank of the LoRA")
    flag("--lora_alpha", type=positive, help="its scale times its rank; none: the rank")
    flag("--lora_layers", nargs="+", default=["attention"], metavar="LAYER",
         help="attention, all (linear layers and convolutions of the blocks), or ends of layers' names")
    flag("--full_unet", action="store_true", help="train the whole U-Net or transformer against a frozen copy")
    flag("--train_text_encoder", action="store_true", help="train a LoRA on the CLIP text encoder(s) too")
    flag("--text_encoder_rank", type=count, default=64, help="its rank")
    flag("--freeze_unet", action="store_true", help="with --train_text_encoder: train that alone, as the paper does")
    flag("--initial_lora", help="LoRA of an earlier stage to start from (with its ranks): folder, file or hub name")
    flag("--initial_unet", help="whole U-Net or transformer of an earlier stage to start from: folder or hub name")
    flag("--reference", choices=["initial", "base"], default="initial", help="measure against the start, or the base")

    flag = parser.add_argument_group("data").add_argument
    flag("--train_data_dir", default="human-preferences", help="folder of pairs, or a json, jsonl or parquet file")
    flag("--dataset_name", help="data set on the hub, or a path that `datasets` loads, instead of --train_data_dir")
    flag("--dataset_config_name", help="its configuration")
    flag("--dataset_split_name", help="its split to train on; none: train, or else validation")
    flag("--image_0_column", help="column of the first image; known: jpg_0, chosen, path1, image_0")
    flag("--image_1_column", help="column of the second; known: jpg_1, rejected, path2, image_1")
    flag("--label_0_column", help="1 where the first image won, 0, or 0.5 for a tie; none: the first one won")
    flag("--caption_column", help="column of the captions; known: caption, prompt")
    flag("--margin_column", default="margin", help="column of the winner's lead in score, in units of the scorer")
    flag("--max_train_samples", type=count, help="use the first so many rows; of hub data no more are downloaded")
    flag("--min_margin", type=float, help="leave out pairs whose lead in score is smaller")
    flag("--validation_share", type=share, default=0.0, help="share of captions to hold out, where no split is")
    flag("--resolution", type=count, help="pixels a side, images are resized and cropped; none: the model's own")
    flag("--height", type=count, help="height in pixels, where it is not --resolution")
    flag("--width", type=count, help="width in pixels, where it is not --resolution")
    flag("--aspect_ratio_buckets", action="store_true", help="about resolution^2 pixels in each pair's own shape")
    flag("--encoded_dir", help="keeps encoded pairs and captions, shared by all machines; none: `encoded` in the data")

    flag = parser.add_argument_group("objective").add_argument
    flag("--beta_dpo", type=positive, default=2500,
         help="factor of the margin; diffusers' SDXL script means half of its own; of flow 100 to 2000 are in use")
    flag("--loss_type", choices=["sigmoid", "hinge", "ipo"], default="sigmoid", help="sigmoid is DPO")
    flag("--soft_labels", type=positive, metavar="T", help="label sigmoid(margin column / T), not 1")
    flag("--ties", choices=["drop", "soft"], default="drop", help="leave ties out, or train them with label 0.5")
    flag("--winner_safeguard", type=within(float, 0, 1), metavar="MU", help="Diffusion-SDPO, in [0, 1]; 0.9 helps")
    flag("--lambda_stat", type=within(float, 0),
         help="weight of statistics matching; none: 10000, of flow what weighs as much, at shift 3 about 360000")
    flag("--weighting_scheme", choices=["none", "logit_normal"], default="none",
         help="timesteps uniform over the schedule, of flow the sampler's shifted sigmas; or SD 3's logit-normal")

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--max_train_steps", type=count, default=2000, help="updates of the weights; the paper: 300000")
    flag("--num_train_epochs", type=count, help="rounds over the pairs, instead of --max_train_steps")
    flag("--train_batch_size", type=count, default=16, help="pairs in a process's forward pass")
    flag("--gradient_accumulation_steps", type=count, default=1, help="forward passes in an update")
    flag("--learning_rate", type=positive, default=1e-5, help="peak learning rate")
    flag("--lr_scheduler", choices=["constant", "linear", "cosine"], default="constant", help="over the steps")
    flag("--lr_warmup_steps", type=within(int, 0), default=0, help="steps of linear warm-up, under every schedule")
    flag("--use_8bit_adam", action="store_true", help="a quarter of the optimiser's memory, by bitsandbytes")
    flag("--adam_weight_decay", type=within(float, 0), default=1e-2, help="weight decay")
    flag("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    flag("--ema", type=share, nargs="?", const=0.9999, metavar="DECAY", help="write averaged weights")
    flag("--seed", type=within(int, 0, 2**32 - 1), default=0, help="decides order, noise, timesteps, the LoRA's start")

    flag = parser.add_argument_group("memory and precision").add_argument
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="none: what `accelerate config` says")
    flag("--allow_tf32", action="store_true", help="faster fp32 matrices on Ampere GPUs and newer")
    flag("--gradient_checkpointing", action="store_true", help="less memory, slower steps")
    flag("--enable_xformers_memory_efficient_attention", action="store_true", help="needs CUDA")
    flag("--compile", action="store_true", help="slow start, faster steps; in bf16 it rounds unlike the reference")

    flag = parser.add_argument_group("validation").add_argument
    flag("--run_validation", action=argparse.BooleanOptionalAction, default=True, help="pictures and held-out pairs")
    flag("--validation_steps", type=count, default=500, help="steps between validations; there is one at the end")
    flag("--validation_prompts", nargs="+", help="prompts to draw; none: captions of the held-out pairs")
    flag("--num_validation_images", type=count, default=8, help="how many of those captions")
    flag("--validation_inference_steps", type=count, default=50, help="steps of the sampler")
    flag("--validation_guidance_scale", type=float, help="classifier-free guidance; none: 5, of SD 3 4.5")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="dpo-human-lora", help="weights, model card, metrics and checkpoints")
    flag("--resume_from_checkpoint", help="a checkpoint's folder, or latest")
    flag("--checkpointing_steps", type=count, default=500, help="steps between checkpoints")
    flag("--checkpoints_total_limit", type=count, help="keep only the newest so many")
    flag("--export_kohya", action="store_true", help="write the LoRA for ComfyUI and A1111 as well")
    flag("--push_to_hub", action="store_true", help="upload weights, card and picture at the end, no checkpoints")
    flag("--hub_model_id", help="repository to upload to, such as owner/name; none: the name of OUTPUT_DIR")
    flag("--hub_token", help="token to upload with; none: that of `hf auth login`")
    flag("--logging_steps", type=count, default=10, help="steps that logged metrics are averaged over")
    flag("--report_to", help="a tracker of accelerate's, or none; none given: tensorboard where it is installed")
    # fmt: on

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        use_embedded_world(parser, "train_dpo_human")
        args = parser.parse_args(argv)
    args.lora_alpha = args.lora_alpha or args.rank
    sides, gpu = args.height or args.width, torch.cuda.is_available()
    wrong = {
        "--aspect_ratio_buckets takes --resolution, not --height and --width": args.aspect_ratio_buckets and sides,
        "--freeze_unet needs --train_text_encoder": args.freeze_unet and not args.train_text_encoder,
        "--freeze_unet and --full_unet contradict each other": args.freeze_unet and args.full_unet,
        "--initial_unet needs --full_unet": args.initial_unet and not args.full_unet,
        "--export_kohya needs a LoRA": args.export_kohya and args.full_unet and not args.train_text_encoder,
        "xformers needs CUDA": args.enable_xformers_memory_efficient_attention and not gpu,
    }
    for mistake in (mistake for mistake, is_wrong in wrong.items() if is_wrong):
        parser.error(mistake)
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
