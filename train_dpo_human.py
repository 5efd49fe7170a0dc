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
#     "pillow>=10.1,<14",
#     "numpy>=1.26,<3",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Trains a text-to-image model on preference pairs to draw people better: Diffusion-DPO with statistics matching.

HG-DPO (https://arxiv.org/abs/2405.20216). A pair is a winner x_w and a loser x_l, latents for one caption. Timestep
and noise are drawn once per pair, shared by both sides and by the policy and its frozen reference:

    x_t    = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise                 add_noise
    err    = mean over (C, H, W) of (unet(x_t, t, caption) - target)^2       image_error, in fp32
    margin = (err_ref_w - err_w) - (err_ref_l - err_l)                       dpo_loss
    L_dpo  = -log sigmoid(beta * margin)
    L_stat = || c_t (mu(x0_w) - mu(x0_ref_w)) ||^2,  mu: mean over (H, W)    predict_x0, statistics_matching_loss
    L      = L_dpo + lambda_stat * L_stat                                    training_loss calls them in this order

c_t turns a difference in the predicted x0 into the difference of one reverse DDPM step, so that L_stat, which keeps
the colours of the reference, costs no forward pass. Of the reference the loss needs err_ref and mu(x0_ref_w) alone:
`Measured`, 2 + C numbers a pair, which --precompute_reference makes once instead of at every step.

Without arguments it trains on human-preferences/ in the embedded world (tests/tiny_human). The usual command:

    accelerate launch train_dpo_human.py --pretrained_model_name_or_path YOUR_MODEL --resolution 512 \\
        --train_data_dir human-preferences --output_dir dpo-human-lora --mixed_precision bf16 --use_8bit_adam

`pipeline.load_lora_weights("dpo-human-lora")` loads the result. SD 1.x, SD 2.x and SDXL: the pipeline's class decides.
The reference is the same model with its LoRA switched off, the frozen --initial_lora, or a copy for --full_unet.

Differences from the paper:
1. beta multiplies the margin itself, as in diffusers' SD script; code with 0.5 * beta * margin means the same by 5000.
2. Where the paper is silent: LoRA alpha = rank, a constant learning rate without warm-up, gradients clipped at norm 1.
3. 2,000 steps by default instead of 300,000: most people have thousands of pairs, not 300,000.
4. Latents and captions are encoded once; draws are functions of (seed, pair, epoch), whatever the number of processes.
5. Ties are left out, or soft labels of 0.5. Hinge and IPO losses, label smoothing, soft labels, the winner's safeguard
   of Diffusion-SDPO and training the whole U-Net are there to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import glob
import hashlib
import importlib
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm


if TYPE_CHECKING:  # imported where they are used, so that a typing error is told at once
    from accelerate import Accelerator
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel

WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
METRICS = {
    "loss": "loss/dpo + loss/statistics",
    "loss/dpo": "log 2 = 0.693 at the start; below it the policy prefers the winners",
    "loss/statistics": "lambda_stat * L_stat: how far colours move from the reference's",
    "error/winner": "denoising error of the policy on winners",
    "error/loser": "denoising error of the policy on losers",
    "error/winner_over_reference": "the same less the reference's; below 0 the winners became likelier",
    "error/loser_over_reference": "the same less the reference's; above 0 the losers became less likely",
    "rewards/margins": "beta * margin, what the loss's sigmoid sees",
    "rewards/accuracies": "share of pairs with a margin above 0",
    "dpo_weight": "sigmoid(-beta * margin), the pair's weight in the gradient; near 0 it has nothing left to teach",
    "loser_scale": "what --winner_safeguard leaves of the loser's gradient; 1 without it",
}
OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "ademamix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "adafactor": "torch.optim.Adafactor",
}
LR_SCHEDULERS = ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"]
# fmt: off
FREE_SETTINGS = {  # a run that is carried on may change these
    "output_dir", "overwrite", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "cache_dir",
    "logging_steps", "report_to", "validation_steps", "validation_prompts", "num_validation_images",
    "validation_inference_steps", "validation_guidance_scale", "validation_draws", "max_train_steps",
    "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "encoded_dir", "export_kohya",
    "early_stopping_patience",
}
NOT_OF_THE_REFERENCE = {  # settings that change the training, but not what the reference predicts
    "beta_dpo", "loss_type", "label_smoothing", "soft_labels", "ties", "winner_safeguard", "lambda_stat", "optimizer",
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "use_8bit_adam", "adam_beta1", "adam_beta2", "ema",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "rank", "lora_alpha", "text_encoder_rank", "compile",
    "precompute_reference", "max_train_steps",
}
# fmt: on


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method -----------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """All that the loss asks of a model: errors of winner and loser (B,), channel means of the winner's x0 (B, C)."""

    err_w: Tensor
    err_l: Tensor
    mu_w: Tensor


def per_image(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return value.view(-1, 1, 1, 1)


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t of the forward process; x_0 and noise (B, C, H, W), alpha_bar (B,)."""
    return per_image(alpha_bar.sqrt()) * x_0 + per_image((1 - alpha_bar).sqrt()) * noise


def training_target(x_0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the U-Net should predict: noise (epsilon), v = sqrt(abar) noise - sqrt(1 - abar) x_0, or x_0 (sample)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return per_image(alpha_bar.sqrt()) * noise - per_image((1 - alpha_bar).sqrt()) * x_0
    return x_0


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
) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on per-image errors: (B,) each -> loss (), margin (B,).

    The margin is positive where the policy improved on the winner, against the reference, more than on the loser.
    `beta` multiplies it as it is; public code with `0.5 * beta * margin` means the same loss by twice the beta.
    `label` (B,) is the probability that the winner is the better one: 1, less with smoothing, 0.5 for a tie. "ipo" is
    IPO's loss times beta^2: the same minimum, margin = 1 / (2 beta), with gradients of the size of the others'.
    """
    margin = (ref_err_w - err_w) - (ref_err_l - err_l)

    def loss_if_better(logit: Tensor) -> Tensor:
        if loss_type == "hinge":
            return F.relu(1 - logit)
        return (logit - 0.5).square() if loss_type == "ipo" else -F.logsigmoid(logit)

    loss = label * loss_if_better(beta * margin) + (1 - label) * loss_if_better(-beta * margin)
    return loss.mean(), margin


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


def scale_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """`value` with `scale` times its gradient."""
    return value.detach() + scale * (value - value.detach())


def predict_x0(prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The clean latents that a prediction stands for, fp32; prediction and x_t (B, C, H, W), alpha_bar (B,)."""
    signal, sigma = per_image(alpha_bar.sqrt()), per_image((1 - alpha_bar).sqrt())
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction.float()) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * prediction.float()
    return prediction.float()


def statistics_matching_loss(mu_w: Tensor, ref_mu_w: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """How far a reverse DDPM step by the policy moves the winner's channel means off the reference's (HG-DPO, L_stat).

    mu_w and ref_mu_w (B, C): the means over (H, W) of the predicted x0. With the step's noise shared, the steps differ
    by c_t (x0 - ref_x0), c_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t), for every prediction type and schedule. Squared
    L2 norm over channels, mean over the batch: ()
    """
    beta_t = 1 - alpha_bar / alpha_bar_prev
    c_t = alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar)
    return (c_t[:, None] * (mu_w - ref_mu_w)).square().sum(dim=1).mean()


# ---- Draws: what a step sees is a function of (seed, position) ------------------------------------------------------


def positions(step: int, micro_step: int, rank: int, args: argparse.Namespace, num_processes: int) -> range:
    """Where this process's micro-batch lies in the endless sequence of pairs; ranks never share a position."""
    start = (step * args.gradient_accumulation_steps + micro_step) * num_processes + rank
    return range(start * args.train_batch_size, (start + 1) * args.train_batch_size)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, pairs: Pairs) -> np.ndarray:
    """The order of the pairs in one epoch, which the seed decides. With several buckets every step's pairs come from
    one of them: what is left over waits for another epoch's order, and a bucket of less than a step is repeated."""
    generator = np.random.default_rng((seed, epoch))
    if len(pairs.latents) == 1:
        return generator.permutation(len(pairs.bucket))
    steps = []
    for bucket in range(len(pairs.latents)):
        rows = generator.permutation(np.flatnonzero(pairs.bucket == bucket))
        steps += list(np.resize(rows, (max(1, len(rows) // pairs.per_step), pairs.per_step)))
    return np.concatenate([steps[i] for i in generator.permutation(len(steps))])


def visits_at(seed: int, positions: range, pairs: Pairs) -> list[tuple[int, int]]:
    """(pair, epoch) at each position: every epoch has its own order."""
    length = len(epoch_order(seed, 0, pairs))
    return [(int(epoch_order(seed, p // length, pairs)[p % length]), p // length) for p in positions]


def draw_noise(
    seed: int, stream: str, visits: list[tuple[int, int]], shape: tuple[int, ...], timesteps: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The noise (B, *shape) and the timesteps (B,), uniform in [low, high), of each (pair, visit); on the CPU."""
    noise, t = torch.empty(len(visits), *shape), torch.empty(len(visits), dtype=torch.long)
    for i, (row, visit) in enumerate(visits):
        digest = hashlib.sha256(f"{seed}|{stream}|{row}|{visit}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        t[i] = torch.randint(*timesteps, (), generator=generator)
        noise[i].normal_(generator=generator)
    return noise, t


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


# ---- Training step --------------------------------------------------------------------------------------------------


def measure_errors(run: Run, model: torch.nn.Module, batch: Batch) -> tuple[Measured, Tensor]:
    """A model on a batch: what the loss asks of it, and its residual prediction - target (2B, C, h, w)."""
    schedule, noise, t = run.schedule, batch.noise.repeat(2, 1, 1, 1), batch.t.repeat(2)
    alpha_bar = schedule.alpha_bar[t]
    x_t = add_noise(batch.x_0, noise, alpha_bar)
    if run.args.channels_last:
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    prediction = model(x_t, t, batch.text, batch.time_ids)
    target = training_target(batch.x_0, noise, alpha_bar, schedule.prediction_type)
    err_w, err_l = image_error(prediction, target).chunk(2)
    halves = (value.chunk(2)[0] for value in (prediction, x_t, alpha_bar))
    mu_w = predict_x0(*halves, schedule.prediction_type).mean(dim=(2, 3))
    return Measured(err_w, err_l, mu_w), prediction - target


def training_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The docstring's formula on one batch: loss (), METRICS, () each, and the margins (B,)."""
    args, schedule = run.args, run.schedule
    ref = batch.reference
    if ref is None:
        with torch.no_grad(), reference(run) as model:
            ref, _ = measure_errors(run, model, batch)
    (err_w, err_l, mu_w), residual = measure_errors(run, run.policy, batch)

    scale = torch.ones_like(err_l)
    if args.winner_safeguard is not None:
        scale = safeguard_scale(*residual.chunk(2), args.winner_safeguard)
    dpo, margin = dpo_loss(
        err_w, scale_gradient(err_l, scale), ref.err_w, ref.err_l, args.beta_dpo, args.loss_type, batch.label
    )
    stat = statistics_matching_loss(mu_w, ref.mu_w, schedule.alpha_bar[batch.t], schedule.alpha_bar_prev[batch.t])
    loss = dpo + args.lambda_stat * stat
    metrics = {
        "loss": loss,
        "loss/dpo": dpo,
        "loss/statistics": args.lambda_stat * stat,
        "error/winner": err_w.mean(),
        "error/loser": err_l.mean(),
        "error/winner_over_reference": (err_w - ref.err_w).mean(),
        "error/loser_over_reference": (err_l - ref.err_l).mean(),
        "rewards/margins": args.beta_dpo * margin.mean(),
        "rewards/accuracies": (margin > 0).float().mean(),
        "dpo_weight": torch.sigmoid(-args.beta_dpo * margin).mean(),
        "loser_scale": scale.mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}, margin.detach()


def any_process(accelerator: Accelerator, flag: bool | Tensor) -> bool:
    """Whether it is true on one process at least."""
    if accelerator.num_processes == 1:
        return bool(flag)
    return bool(accelerator.reduce(torch.as_tensor(flag, device=accelerator.device).float()) > 0)


def optimisation_step(run: Run, step: int) -> Tensor:
    """Updates the weights from --gradient_accumulation_steps micro-batches; METRICS and the gradient's norm.

    Waits for the device once an update, to see that loss and gradient are finite before they reach the weights.
    """
    args, accelerator, pairs = run.args, run.accelerator, run.pairs["train"]
    total, seen, margins = torch.zeros(len(METRICS), device=accelerator.device), [], []
    for micro_step in range(args.gradient_accumulation_steps):
        where = positions(step, micro_step, accelerator.process_index, args, accelerator.num_processes)
        visits = visits_at(args.seed, where, pairs)
        batch = draw_batch(run, pairs, visits)
        with accelerator.accumulate(run.policy):
            with accelerator.autocast():
                loss, metrics, margin = training_loss(run, batch)
            total, seen, margins = total + torch.stack(list(metrics.values())), seen + visits, [*margins, margin]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = clip_gradients(run)
                # fp16 has a scaler, which mends overflow in the gradient by itself
                trusted = total[0] if accelerator.mixed_precision == "fp16" else total[0] + norm
                if any_process(accelerator, ~torch.isfinite(trusted)):
                    rows = [int(pairs.index[row]) for row, _ in seen]
                    raise UserError(not_finite(step, rows, torch.cat(margins), deepspeed(accelerator)))
            run.optimizer.step()
            run.optimizer.zero_grad()
    run.lr_scheduler.step()
    if run.ema:
        run.ema.step(trained_weights(run))
    return torch.cat([total / args.gradient_accumulation_steps, norm.reshape(1)])


def not_finite(step: int, rows: list[int], margins: Tensor, touched: bool) -> str:
    """What to tell of a step whose loss or gradient is no number: the rows (N) whose margin is none, or all."""
    guilty = [row for row, finite in zip(rows, margins.isfinite().tolist(), strict=True) if not finite]
    told = ", ".join(map(str, sorted(set(guilty or rows))))
    weights = "DeepSpeed has stepped already" if touched else "the weights were not touched"
    return (
        f"loss or gradient not finite in step {step + 1}, rows {told} of the data; {weights}: "
        "carry on from the last checkpoint with a lower --learning_rate, with bf16, or without these rows"
    )


def clip_gradients(run: Run) -> Tensor:
    """Clips the gradient to --max_grad_norm; returns its norm () before that."""
    norm = run.accelerator.clip_grad_norm_(trained_weights(run), run.args.max_grad_norm)
    if hasattr(norm, "full_tensor"):  # FSDP
        norm = norm.full_tensor()
    # DeepSpeed clips by itself, and may not know
    return torch.as_tensor(0.0 if norm is None else norm, device=run.accelerator.device)


def trained_weights(run: Run) -> list[Tensor]:
    """The tensors that the optimiser updates: with FSDP this process's shards."""
    return [weight for group in run.optimizer.param_groups for weight in group["params"]]


def draw_batch(run: Run, pairs: Pairs, visits: list[tuple[int, int]]) -> Batch:
    """The pairs of the visits with their draws: fresh ones in each epoch, or one of --precompute_reference's."""
    args, num_timesteps = run.args, len(run.schedule.alpha_bar)
    if args.precompute_reference:
        visits = [(row, epoch % args.precompute_reference) for row, epoch in visits]
    timesteps = args.timestep_range or (0, num_timesteps)
    shape = pairs.latents[pairs.bucket[visits[0][0]]].shape[2:]
    noise, t = draw_noise(args.seed, "train", visits, shape, timesteps)
    return make_batch(pairs, visits, noise, t, run.accelerator.device)


def held_out_batch(run: Run, visits: list[tuple[int, int]]) -> Batch:
    """Held-out pairs at evenly spaced timesteps and with the same noise every time: (pair, draw)."""
    args, pairs = run.args, run.pairs["validation"]
    low, high = args.timestep_range or (0, len(run.schedule.alpha_bar))
    shape = pairs.latents[pairs.bucket[visits[0][0]]].shape[2:]
    noise, _ = draw_noise(args.seed, "validation", visits, shape, (low, high))
    t = torch.tensor([low + (2 * i + 1) * (high - low) // (2 * args.validation_draws) for _, i in visits])
    return make_batch(pairs, visits, noise, t, run.accelerator.device)


def all_visits(pairs: Pairs, draws: int, size: int) -> list[list[tuple[int, int]]]:
    """Every (pair, draw), in batches of up to `size` from one bucket each."""
    batches = []
    for bucket in range(len(pairs.latents)):
        rows = np.flatnonzero(pairs.bucket == bucket).tolist()
        visits = [(row, i) for row in rows for i in range(draws)]
        batches += [visits[start : start + size] for start in range(0, len(visits), size)]
    return batches


@torch.no_grad()
def measure_reference(run: Run, name: str) -> Tensor:
    """The reference's `Measured` (draws, N, 2 + C) of a split, kept in a cache: on training draws for
    --precompute_reference, and without buckets in the micro-batches of training's first K epochs, so that not a bit
    differs there."""
    args, accelerator, pairs = run.args, run.accelerator, run.pairs[name]
    size = args.train_batch_size
    draws = args.validation_draws if name == "validation" else args.precompute_reference
    make = held_out_batch if name == "validation" else partial(draw_batch, pairs=pairs)
    if name == "validation" or len(pairs.latents) > 1:
        batches = all_visits(pairs, draws, size)
        num_items, visits_of = len(batches), batches.__getitem__
    else:
        length = draws * len(epoch_order(args.seed, 0, pairs))
        num_items = -(-length // size)

        def visits_of(item: int) -> list[tuple[int, int]]:
            return visits_at(args.seed, range(item * size, min((item + 1) * size, length)), pairs)

    def fill(values: Tensor, item: int) -> None:
        with accelerator.autocast(), reference(run) as model:
            visits = visits_of(item)
            measured, _ = measure_errors(run, model, make(run, visits=visits))
        rows, index = [row for row, _ in visits], [visit for _, visit in visits]
        values[index, rows] = torch.cat([measured.err_w[:, None], measured.err_l[:, None], measured.mu_w], 1).cpu()

    key = hash_of(
        {part: value for part, value in run.identity.items() if part not in NOT_OF_THE_REFERENCE}, draws, size
    )
    shape = (draws, len(pairs.bucket), 2 + run.pipe.vae.config.latent_channels)
    path = Path(args.encoded_dir, f"reference-{name}-{key}.bin")
    title = f"measuring the reference on {name}"
    return cached_tensor(accelerator, path, shape, torch.float32, num_items, fill, title)


# ---- Data: where pairs come from ------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Column names of one way to write pairs down. Without `label_0`, image_0 is the winner."""

    image_0: str
    image_1: str
    label_0: str | None
    caption: str


LAYOUTS = (
    Layout("jpg_0", "jpg_1", "label_0", "caption"),  # Pick-a-Pic and make_preference_data.py
    Layout("chosen", "rejected", None, "prompt"),  # open-image-preferences
    Layout("path1", "path2", None, "prompt"),  # HPDv3
    Layout("image_0", "image_1", "prefer_0", "prompt"),  # invoke-training
)


class Split(NamedTuple):
    """The pairs of one split that are kept: `winner[i]` is 0 or 1, the side of row i that was preferred, `label[i]`
    the probability that it is the better one, `index[i]` its row in the data set; `sides` are its two image columns
    alone, `dropped` counts the other rows by reason; paths start at `folder`."""

    name: str
    rows: Dataset
    sides: Dataset
    index: np.ndarray
    layout: Layout
    winner: np.ndarray
    label: np.ndarray
    dropped: dict[str, int]
    folder: Path

    def images(self, row: int) -> tuple[bytes, bytes]:
        """The encoded images of a row, winner first."""
        pair = self.sides[row]
        sides = (pair[self.layout.image_0], pair[self.layout.image_1])
        return tuple(image_bytes(sides[side], self.folder) for side in (self.winner[row], 1 - self.winner[row]))

    def where(self, row: int) -> str:
        """The row's name in messages."""
        return f"split {self.name!r}, row {self.index[row]}"

    @property
    def captions(self) -> list[str]:
        return self.rows[self.layout.caption][:]


def image_bytes(value: Any, folder: Path) -> bytes:
    """The file that a cell holds: bytes, {"bytes", "path"} of a `datasets.Image` column, or a path."""
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    return (folder / value).read_bytes() if isinstance(value, str) else value


def rows_of_folders(folder: Path) -> list[dict[str, str]]:
    """Pairs written as NAME/w/1.png, NAME/l/1.png and a caption in NAME/1.caption or .txt (beside w, or in it)."""
    rows, suffixes = [], Image.registered_extensions()
    for winner in sorted(path for path in folder.glob("**/w/*") if path.suffix.lower() in suffixes):
        losers = winner.parent.with_name("l").glob(f"{glob.escape(winner.stem)}.*")
        losers = sorted(path for path in losers if path.stem == winner.stem and path.suffix.lower() in suffixes)
        loser = next(iter(losers), None)
        texts = [place / f"{winner.stem}{end}" for place in winner.parents[:2] for end in (".caption", ".txt")]
        text = next((path for path in texts if path.is_file()), None)
        if loser is None or text is None:
            raise UserError(f"{winner} has no {'loser in ../l' if loser is None else 'caption beside w'}")
        pair = {"chosen": str(winner.absolute()), "rejected": str(loser.absolute())}
        rows.append({**pair, "prompt": text.read_text().strip()})
    return rows


def read_folder(folder: Path, cache_dir: str | None) -> dict[str, Dataset]:
    """A folder's splits. The parquet files are named one by one, because a folder that was made again under its old
    name (--rescore) would come out of the cache of `datasets` as it was."""
    import datasets

    files = {name: sorted(map(str, folder.glob(f"data/{name}-*.parquet"))) for name in ("train", "validation")}
    files = {name: paths for name, paths in files.items() if paths}
    if files:
        return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir)
    if rows := rows_of_folders(folder):
        return {"train": datasets.Dataset.from_list(rows)}
    return datasets.load_dataset(str(folder), cache_dir=cache_dir, download_mode="force_redownload")


def read_source(args: argparse.Namespace) -> dict[str, Dataset]:
    """The splits that --dataset_name or --train_data_dir names, whatever their columns are called."""
    import datasets

    path = Path(args.train_data_dir or "")
    if args.train_data_dir and not path.exists():
        raise UserError(f"no folder {path}: make pairs with make_preference_data.py, or set --train_data_dir")
    datasets.disable_progress_bars()
    try:
        if args.dataset_name:
            name, split = args.dataset_name, args.dataset_split_name
            return {
                "train": datasets.load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
            }
        if path.is_dir():
            return read_folder(path, args.cache_dir)
        kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
        if kind is None:
            raise UserError(f"{path} is no json, jsonl or parquet file")
        return datasets.load_dataset(kind, data_files={"train": str(path)}, cache_dir=args.cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = first_line(error.__cause__ or error)
        raise UserError(f"{args.dataset_name or path} holds no data set of pairs: {told}") from error


def find_layout(name: str, rows: Dataset, args: argparse.Namespace) -> Layout:
    """The first of LAYOUTS, with the columns that flags name, which the rows have."""
    asked = {
        "image_0": args.image_0_column,
        "image_1": args.image_1_column,
        "label_0": args.label_0_column,
        "caption": args.caption_column,
    }
    asked = {field: column for field, column in asked.items() if column}
    for layout in (layout._replace(**asked) for layout in LAYOUTS):
        if all(column in rows.column_names for column in layout if column):
            return layout
    missing = [column for column in LAYOUTS[0]._replace(**asked) if column not in rows.column_names]
    raise UserError(f"split {name!r} has no column {', '.join(missing)} (it has {', '.join(rows.column_names)})")


def load_splits(args: argparse.Namespace) -> dict[str, Split]:
    """The splits "train" and, where there is one or --validation_share asks for one, "validation"."""
    loaded = read_source(args)
    if "train" not in loaded:
        raise UserError(f"{args.train_data_dir} has no split 'train', only {', '.join(loaded)}")
    train = loaded["train"]
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
    splits = {"train": decide("train", train, args)}
    if "validation" in loaded:
        splits["validation"] = decide("validation", loaded["validation"], args)
    elif args.validation_share:
        splits = hold_out(splits["train"], args.validation_share)
    if args.early_stopping_patience is not None and not ("validation" in splits and len(splits["validation"].rows)):
        raise UserError("--early_stopping_patience needs held-out pairs: set --validation_share")
    if len(splits["train"].rows) == 0:
        told = ", ".join(f"{count} {reason}" for reason, count in splits["train"].dropped.items())
        raise UserError(f"no pairs to train on ({told or 'the split is empty'})")
    return {name: split for name, split in splits.items() if len(split.rows)}


def decide(name: str, rows: Dataset, args: argparse.Namespace) -> Split:
    """The rows of a split that have a winner, and how sure that is; errors name the row."""
    import datasets

    layout = find_layout(name, rows, args)
    for column in (layout.image_0, layout.image_1):
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    label = read_labels(name, rows, layout.label_0)
    for row, caption in enumerate(rows[layout.caption][:]):
        if not isinstance(caption, str):
            raise UserError(f"split {name!r}, row {row}: the {layout.caption} is {caption!r}, not a text")

    tie, sure, too_close = label == 0.5, np.ones(len(rows)), np.zeros(len(rows), dtype=bool)
    if args.min_margin is not None or args.soft_labels is not None:
        margin = read_margins(name, rows, args)
        if args.min_margin is not None:
            too_close = margin < args.min_margin
        if args.soft_labels is not None:
            sure = 1 / (1 + np.exp(-margin / args.soft_labels))
    sure = np.where(tie, 0.5, (1 - args.label_smoothing) * sure + args.label_smoothing * (1 - sure))
    ties = tie & (args.ties == "drop")
    keep = np.flatnonzero(~ties & ~too_close)
    dropped = {"ties left out": int(ties.sum()), "below --min_margin": int((too_close & ~ties).sum())}
    dropped = {reason: count for reason, count in dropped.items() if count}
    folder = Path(args.train_data_dir or "")
    folder = folder.parent if folder.is_file() else folder
    winner = (label[keep] == 0).astype(int)
    label = sure[keep].astype(np.float32)
    rows = rows.select(keep)
    return Split(
        name, rows, rows.select_columns(list(layout[:2])), keep, layout, winner, label, dropped, folder.absolute()
    )


def read_labels(name: str, rows: Dataset, column: str | None) -> np.ndarray:
    """1 where the first image won, 0, or 0.5 for a tie (N,); the column for the second image has to agree."""
    if column is None:
        return np.ones(len(rows))
    label, second = read_numbers(name, rows, column), column.replace("0", "1")
    other = 1 - label
    if second != column and second in rows.column_names:
        other = read_numbers(name, rows, second)
    if column == "prefer_0":  # invoke-training: a vote for neither
        label, other = (np.where(label + other == 0, 0.5, side) for side in (label, other))
    for row in np.flatnonzero(~np.isin(label, (0, 0.5, 1)) | (label + other != 1))[:1]:
        told = f"{column} = {label[row]:g}, {second} = {other[row]:g}"
        raise UserError(f"split {name!r}, row {row}: {told}, not (1, 0), (0, 1) or a tie (0.5, 0.5)")
    return label


def read_numbers(name: str, rows: Dataset, column: str) -> np.ndarray:
    """A column of numbers or booleans (N,); None becomes nan."""
    for row, value in enumerate(rows[column][:]):
        if not isinstance(value, (int, float, type(None))):
            raise UserError(f"split {name!r}, row {row}: {column} is {value!r}, not a number")
    return np.array(rows[column][:], dtype=float)


def read_margins(name: str, rows: Dataset, args: argparse.Namespace) -> np.ndarray:
    """The score margins (N,) of a split."""
    if args.margin_column not in rows.column_names:
        raise UserError(
            f"split {name!r} has no column {args.margin_column} for --min_margin or --soft_labels: set --margin_column"
        )
    margin = read_numbers(name, rows, args.margin_column)
    for row in np.flatnonzero(~np.isfinite(margin))[:1]:
        raise UserError(f"split {name!r}, row {row}: {args.margin_column} is {margin[row]}, not a number")
    return margin


def hold_out(split: Split, share: float) -> dict[str, Split]:
    """Splits off about this share of the captions, decided by each caption's hash."""
    digests = [hashlib.sha256(caption.encode()).digest()[:4] for caption in split.captions]
    held = np.array([int.from_bytes(digest, "big") < share * 2**32 for digest in digests])

    def part(keep: np.ndarray, dropped: dict[str, int]) -> Split:
        keep = np.flatnonzero(keep)
        arrays = {"index": split.index[keep], "winner": split.winner[keep], "label": split.label[keep]}
        arrays |= {"rows": split.rows.select(keep), "sides": split.sides.select(keep)}
        return split._replace(dropped=dropped, **arrays)

    return {"train": part(~held, split.dropped), "validation": part(held, {})}


# ---- Data: encoded once, read memory-mapped -------------------------------------------------------------------------


@dataclass(eq=False)
class Pairs:
    """What training reads of a split, N pairs: scaled latents in fp16, winners first, all of one size in a bucket.

    latents: a tensor (n, 2, C, h, w) for each bucket; bucket, place (N,): which of them, and where in it;
    index (N,): the row of the data set; label (N,); time_ids (N, 6), SDXL: original size, crop and target size in
    pixels; caption (N,): the row of `captions` and of `embeddings`, None where the text encoder is trained;
    reference (K, N, 2 + C): `Measured` at K draws, or None; per_step: the pairs of one update.
    """

    latents: list[Tensor]
    bucket: np.ndarray
    place: np.ndarray
    index: np.ndarray
    label: Tensor
    time_ids: Tensor
    per_step: int
    caption: np.ndarray | None = None
    captions: list[str] | None = None
    embeddings: dict[str, Tensor] | None = None
    reference: Tensor | None = None


class Batch(NamedTuple):
    """Winners then losers along dim 0 of x_0 (2B, C, h, w); noise (B, C, h, w) and the rest are shared by both."""

    x_0: Tensor
    noise: Tensor
    t: Tensor
    label: Tensor
    text: dict[str, Tensor] | list[str]
    time_ids: Tensor
    reference: Measured | None


def cached_tensor(
    accelerator: Accelerator,
    path: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    num_items: int,
    fill: Callable[[Tensor, int], None],
    title: str,
) -> Tensor:
    """The memory-mapped tensor in the file `path`. Where it is not there yet, the processes share its items out,
    `fill(tensor, item)` each; a start after an interruption goes on with the items that are missing."""
    ready = path.is_file() and path.stat().st_size == math.prod(shape) * dtype.itemsize
    if any_process(accelerator, not ready):
        unfinished, done = path.with_suffix(".partial"), path.with_suffix(".done")
        if accelerator.is_main_process:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write to --encoded_dir {path.parent}: {error.strerror}") from error
            for file, size in ((unfinished, math.prod(shape) * dtype.itemsize), (done, num_items)):
                reserve(file, size)
        accelerator.wait_for_everyone()
        tensor = torch.from_file(str(unfinished), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        finished = torch.from_file(str(done), shared=True, size=num_items, dtype=torch.uint8)
        todo = (finished == 0).nonzero().flatten().tolist()
        accelerator.wait_for_everyone()  # all have read `finished`
        todo += todo[-1:] * (-len(todo) % accelerator.num_processes)  # as many for each: FSDP's forward needs all
        todo = todo[accelerator.process_index :: accelerator.num_processes]
        for item in tqdm(todo, desc=title, unit="item", disable=not accelerator.is_main_process):
            fill(tensor, item)
            finished[item] = 1
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            done.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another run with the same --encoded_dir was faster
                unfinished.replace(path)
        accelerator.wait_for_everyone()
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def reserve(file: Path, size: int) -> None:
    """Makes sure that a file has its full size on the disk: writing to a memory map of a full disk would crash."""
    try:
        with file.open("ab") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, size)
            else:
                handle.truncate(size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise UserError(f"{file} needs {size / 2**30:.1f} GiB: {error.strerror}; see --encoded_dir") from error


def open_image(data: bytes, where: str) -> Image.Image:
    """Reads the header; the pixels come with the first use."""
    try:
        image = Image.open(io.BytesIO(data))
        image.getexif()
    except Exception as error:  # Pillow's plugins raise all kinds
        told = "no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"{where}: not a readable image ({told})") from error
    return image


def measure_images(split: Split, sizes: Tensor, row: int) -> None:
    """Writes (height, width) of both images of a row to `sizes` (N, 2, 2); they have to differ and to be readable."""
    where = split.where(row)
    try:
        images = split.images(row)
    except OSError as error:
        raise UserError(f"{where}: not a readable image ({first_line(error)})") from error
    if images[0] == images[1]:
        raise UserError(f"{where}: winner and loser are the same image")
    for position, data in enumerate(images):
        side = split.layout[split.winner[row] if position == 0 else 1 - split.winner[row]]
        image = open_image(data, f"{where}, {side}")
        height, width = image.height, image.width
        if image.getexif().get(0x0112, 1) > 4:  # the camera was held upright
            height, width = width, height
        sizes[row, position] = torch.tensor([height, width])


def bucket_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The bucket of an image: about resolution^2 pixels in its own aspect ratio, sides in steps of resolution / 8."""
    step = max(8, resolution // 64 * 8)
    ratio = min(max(height / width, 0.5), 2)
    sides = (resolution * math.sqrt(ratio), resolution / math.sqrt(ratio))
    return tuple(round(side / step) * step for side in sides)


def crop_box(height: int, width: int, size: tuple[int, int]) -> tuple[float, int, int]:
    """Scale, top and left of the centre crop that fills `size`: what SDXL is told, and what is cut."""
    scale = max(size[0] / height, size[1] / width)
    return scale, round((height * scale - size[0]) / 2), round((width * scale - size[1]) / 2)


def to_pixels(data: bytes, size: tuple[int, int], where: str) -> Tensor:
    """An image resized and centre-cropped to (height, width): (3, height, width) in [-1, 1]."""
    image = open_image(data, where)
    try:
        image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # cut short
        raise UserError(f"{where}: not a readable image ({first_line(error)})") from error
    image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def weights_hash(*modules: torch.nn.Module) -> str:
    """sha256 over the weights as fp16, so that it is the same whether they were loaded in fp16 or fp32."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def why_latents_do_not_fit(split: Split, vae_hash: str, shape: tuple[int, ...]) -> str | None:
    """None where the data set's own latents are those of this VAE and size, else the reason in words."""
    metadata = split.folder / "preference_data.json"
    if "latents_0" not in split.rows.column_names or not metadata.is_file():
        return "the data set has none"
    try:
        made = json.loads(metadata.read_text()).get("latents") or {}
    except ValueError as error:
        raise UserError(f"{metadata} cannot be read: {first_line(error)}") from error
    if made.get("vae_hash") != vae_hash:
        return "the data set's come from another VAE"
    if tuple(made.get("shape", ())) != shape:
        return f"the data set's are {made.get('shape')}, {list(shape)} are wanted"
    return None


@torch.no_grad()
def encode_latents(
    split: Split, rows: np.ndarray, size: tuple[int, int], pipe: DiffusionPipeline, latents: Tensor, item: int
) -> None:
    """latents[item] (2, C, h, w) of the pair in rows[item]: the VAE's mean for each image, winner first."""
    where = split.where(rows[item])
    pixels = torch.stack([to_pixels(data, size, where) for data in split.images(int(rows[item]))])
    posterior = pipe.vae.encode(pixels.to(pipe.vae.device)).latent_dist
    latents[item] = (posterior.mode() * pipe.vae.config.scaling_factor).to("cpu", latents.dtype)


def copy_latents(split: Split, columns: Dataset, rows: np.ndarray, latents: Tensor, item: int) -> None:
    """latents[item] (2, C, h, w) from the columns latents_0 and latents_1 of the pair in rows[item], winner first."""
    row = int(rows[item])
    pair = columns[row]
    for position, side in enumerate((split.winner[row], 1 - split.winner[row])):
        values = pair[f"latents_{side}"] or b""
        if len(values) != 2 * latents[item, position].numel():
            told = f"latents_{side} holds {len(values) / 2:g} numbers, not {list(latents.shape[2:])}"
            raise UserError(f"{split.where(row)}: {told}")
        latents[item, position] = torch.frombuffer(bytearray(values), dtype=torch.float16).view(latents.shape[2:])


def data_key(split: Split) -> str:
    """Changes with the rows, their order and winners, and with the files of a data set that holds paths."""
    key = [split.rows._fingerprint, split.winner.tolist()]
    if getattr(split.rows.features[split.layout.image_0], "dtype", None) in ("string", "large_string"):
        paths = (split.folder / value for name in split.layout[:2] for value in split.rows[name][:] if value)
        key += [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return hash_of(*key)


def prepare_latents(
    split: Split, rows: np.ndarray, size: tuple[int, int], pipe: DiffusionPipeline, vae_hash: str, key: str,
    folder: Path, accelerator: Accelerator,
) -> Tensor:  # fmt: skip
    """The latents (n, 2, C, h, w) of a split's rows: the data set's own where they fit, else the VAE's."""
    shape = (pipe.vae.config.latent_channels, *(side // pipe.vae_scale_factor for side in size))
    reason = why_latents_do_not_fit(split, vae_hash, shape)
    scale = float(pipe.vae.config.scaling_factor)
    key = hash_of(key, rows.tolist(), size, vae_hash, scale, reason is None)
    path = folder / f"latents-{split.name}-{key}.bin"
    if reason is None:
        fill = partial(copy_latents, split, split.rows.select_columns(["latents_0", "latents_1"]), rows)
    else:
        fill = partial(encode_latents, split, rows, size, pipe)
        if not path.is_file():
            told = f"{len(rows)} {split.name} pairs of {size[0]} x {size[1]} go through the VAE"
            accelerator.print(f"latents:   {told} ({reason})")
    title = f"{'reading' if reason is None else 'encoding'} {split.name}"
    return cached_tensor(accelerator, path, (len(rows), 2, *shape), torch.float16, len(rows), fill, title)


def prepare_split(
    split: Split, vae_hash: str, pipe: DiffusionPipeline, args: argparse.Namespace, accelerator: Accelerator
) -> Pairs:
    """A split's sizes, buckets and latents, each from its cache where there is one; captions are still missing."""
    folder, count, key = Path(args.encoded_dir), len(split.rows), data_key(split)
    path, fill = folder / f"sizes-{split.name}-{key}.bin", partial(measure_images, split)
    title = f"checking {split.name}"
    sizes = cached_tensor(accelerator, path, (count, 2, 2), torch.int32, count, fill, title)[:, 0].tolist()
    targets = [(args.height, args.width)] * count
    if args.aspect_ratio_buckets:
        targets = [bucket_size(*size, args.resolution) for size in sizes]
    buckets = sorted(set(targets))
    bucket = np.array([buckets.index(target) for target in targets])
    place, latents = np.zeros(count, dtype=int), []
    for number, size in enumerate(buckets):
        rows = np.flatnonzero(bucket == number)
        place[rows] = np.arange(len(rows))
        latents.append(prepare_latents(split, rows, size, pipe, vae_hash, key, folder, accelerator))
    boxes = [crop_box(*size, target)[1:] for size, target in zip(sizes, targets, strict=True)]
    return Pairs(
        latents=latents,
        bucket=bucket,
        place=place,
        index=split.index,
        label=torch.from_numpy(split.label),
        time_ids=torch.tensor(np.hstack([sizes, boxes, targets])),
        per_step=pairs_per_step(args, accelerator),
    )


def encode_captions(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Text embeddings by the pipeline's own encoder(s), under the names that the pipeline's call takes."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    values = pipe.encode_prompt(
        prompt=prompts, device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


def text_encoders(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """One of SD 1.x and 2.x, two of SDXL."""
    names = [name for name in ("text_encoder", "text_encoder_2") if pipe.components.get(name) is not None]
    return {name: pipe.components[name] for name in names}


@torch.no_grad()
def prepare_captions(
    captions: list[str], pipe: DiffusionPipeline, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The embeddings of distinct captions, (len(captions), ...) each, kept in a cache; frees the text encoders."""
    encoders, embeddings, chunk = text_encoders(pipe), {}, 32
    key = hash_of(captions, weights_hash(*encoders.values()), str(pipe.text_encoder.dtype))
    for name, example in encode_captions(pipe, captions[:1]).items():

        def fill(tensor: Tensor, item: int, name: str = name) -> None:
            rows = slice(item * chunk, (item + 1) * chunk)
            tensor[rows] = encode_captions(pipe, captions[rows])[name].cpu()

        path, shape = Path(args.encoded_dir, f"{name}-{key}.bin"), (len(captions), *example.shape[1:])
        if name == "prompt_embeds" and not path.is_file():
            tell_cut_captions(pipe, captions, accelerator)
        items = -(-len(captions) // chunk)
        embeddings[name] = cached_tensor(accelerator, path, shape, example.dtype, items, fill, f"encoding {name}")
    for name in encoders:
        setattr(pipe, name, None)
    return embeddings


def tell_cut_captions(pipe: DiffusionPipeline, captions: list[str], accelerator: Accelerator) -> None:
    """Says how many captions have more tokens than the text encoder reads."""
    longest = pipe.tokenizer.model_max_length
    if cut := sum(len(tokens) > longest for tokens in pipe.tokenizer(captions).input_ids):
        accelerator.print(f"captions:  {cut} of {len(captions)} have more than {longest} tokens and are cut there")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to a GPU beside its work, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def make_batch(pairs: Pairs, visits: list[tuple[int, int]], noise: Tensor, t: Tensor, device: torch.device) -> Batch:
    """The pairs of the visits (B), which share a bucket, with their noise and timesteps, on the device."""
    rows = [row for row, _ in visits]
    x_0 = pairs.latents[pairs.bucket[rows[0]]][pairs.place[rows]].transpose(0, 1).flatten(0, 1).float()
    move = partial(to_device, device=device)
    if pairs.embeddings is None:
        text = [pairs.captions[i] for i in pairs.caption[rows]]
    else:
        text = {name: move(value[pairs.caption[rows]]) for name, value in pairs.embeddings.items()}
    reference = None
    if pairs.reference is not None:
        draws = [visit % len(pairs.reference) for _, visit in visits]
        values = move(pairs.reference[draws, rows])
        reference = Measured(values[:, 0], values[:, 1], values[:, 2:])
    return Batch(move(x_0), move(noise), move(t), move(pairs.label[rows]), text, move(pairs.time_ids[rows]), reference)


# ---- Models ---------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """The model's noise schedule: alpha_bar (T,), that of the step before (1 before the first), prediction type."""

    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    prediction_type: str


class Policy(torch.nn.Module):
    """All that may be trained, as the one module that DDP, FSDP and DeepSpeed want: U-Net and, where they are trained
    too, the text encoders. The frozen reference of --full_unet is another one."""

    def __init__(self, pipe: DiffusionPipeline, unet: torch.nn.Module, train_text_encoder: bool, compile_it: bool):
        super().__init__()
        self.pipe, self.unet = pipe, unet
        self.text_encoders = torch.nn.ModuleDict(text_encoders(pipe) if train_text_encoder else {})
        self.predict = torch.compile(unet.forward) if compile_it else unet.__call__

    def forward(self, x_t: Tensor, t: Tensor, text: dict[str, Tensor] | list[str], time_ids: Tensor) -> Tensor:
        """The prediction for winners and losers x_t (2B, C, h, w), t (2B,); text and time_ids (B, 6) are shared."""
        if isinstance(text, list):
            text = encode_captions(self.pipe, text)
        text = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in text.items()}
        x_t = x_t.to(self.unet.conv_in.weight.dtype)
        added = None
        if "pooled_prompt_embeds" in text:  # SDXL
            added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": time_ids.repeat(2, 1)}
        embeddings = text["prompt_embeds"]
        return self.predict(x_t, t, encoder_hidden_states=embeddings, added_cond_kwargs=added, return_dict=False)[0]

    def sample(self, **options: Any) -> Tensor:
        """Latents by the pipeline's own call, with this U-Net."""
        own, self.pipe.unet = self.pipe.unet, self.unet
        try:
            return self.pipe(**options, output_type="latent").images
        finally:
            self.pipe.unet = own


class Validation(NamedTuple):
    """The prompts to draw, their embeddings where the text encoder is frozen, the reference's images once drawn."""

    prompts: list[str]
    text: dict[str, Tensor] | None
    images: list[Image.Image]


class Run(NamedTuple):
    """All that a step and what comes after it need."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipe: DiffusionPipeline
    policy: torch.nn.Module  # `plain` as accelerate wraps it
    plain: Policy
    frozen: Policy | None  # the reference's copy of the U-Net; a LoRA needs none
    schedule: Schedule
    pairs: dict[str, Pairs]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    validation: Validation
    identity: dict[str, Any]


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


def check_stage(flag: str, name: str) -> None:
    """Refuses an earlier stage that is neither there nor named like one on the hub."""
    if not (Path(name).exists() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)):
        raise UserError(f"{flag} {name}: no such file or folder")


def load_model(args: argparse.Namespace, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline in `dtype`, but for the VAE, and with --full_unet the U-Net, which are fp32; no safety checker."""
    from diffusers import DiffusionPipeline

    check_model(args.pretrained_model_name_or_path, "model_index.json")
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    dtypes = {"default": dtype, "vae": torch.float32, "unet": torch.float32 if args.full_unet else dtype}
    try:
        config = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **source)
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        pipe = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, variant=args.variant, torch_dtype=dtypes, **source, **unchecked
        )
    except Exception as error:  # of diffusers, transformers, safetensors
        raise UserError(f"cannot load {args.pretrained_model_name_or_path}: {first_line(error)}") from error
    missing = [part for part in ("unet", "vae", "text_encoder") if getattr(pipe, part, None) is None]
    if missing:
        raise UserError(f"{type(pipe).__name__} has no {', '.join(missing)}: SD 1.x, SD 2.x and SDXL can be trained")
    channels = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels[0] != channels[1]:
        told = f"the U-Net reads {channels[0]} channels, the VAE writes {channels[1]}"
        raise UserError(f"{told}: models for inpainting and the like cannot be trained")
    if args.height % pipe.vae_scale_factor or args.width % pipe.vae_scale_factor:
        raise UserError(f"{args.height} x {args.width} are not multiples of the VAE's {pipe.vae_scale_factor}")
    freeze(*(module for module in pipe.components.values() if isinstance(module, torch.nn.Module)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def freeze(*modules: torch.nn.Module) -> None:
    """No gradients for their weights."""
    for module in modules:
        module.requires_grad_(False)


def noise_schedule(pipe: DiffusionPipeline, timesteps: list[int] | None, device: torch.device) -> Schedule:
    """alpha_bar of every timestep and what the model predicts, from its own scheduler; refuses what cannot be."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    alpha_bar = scheduler.alphas_cumprod.to(device)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"prediction type {prediction_type!r} of the scheduler is not epsilon, v_prediction or sample")
    high = timesteps[1] if timesteps else len(alpha_bar)
    if high > len(alpha_bar):
        raise UserError(f"--timestep_range ends at {high}, the model's schedule at {len(alpha_bar)}")
    if prediction_type == "epsilon" and alpha_bar[high - 1] == 0:
        told = f"set --timestep_range 0 {high - 1}"
        raise UserError(f"zero terminal SNR: at timestep {high - 1} epsilon says nothing about the image; {told}")
    return Schedule(alpha_bar, before, prediction_type)


def sampler_of(pipe: DiffusionPipeline) -> Any:
    """DPM-Solver++ multistep with the model's schedule, as the paper samples."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def adapted(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The U-Net and text encoders that have a LoRA, by name."""
    modules = {"unet": pipe.unet, **text_encoders(pipe)}
    return {name: module for name, module in modules.items() if getattr(module, "peft_config", None)}


def prepare_models(
    pipe: DiffusionPipeline, args: argparse.Namespace, dtype: torch.dtype, accelerator: Accelerator
) -> torch.nn.Module | None:
    """Makes the policy trainable, in fp32 under every precision; returns the frozen U-Net that --full_unet needs."""
    base = copy.deepcopy(pipe.unet) if args.full_unet and args.reference == "base" else None
    if args.initial_unet:
        load_initial_unet(pipe, args)
    if args.initial_lora:
        load_initial_lora(pipe, args, accelerator)
    frozen = None
    if args.full_unet:
        frozen = base or copy.deepcopy(pipe.unet)
        round_as_policy(frozen, dtype, accelerator)
        pipe.unet.requires_grad_(True)
    elif not args.freeze_unet:
        train_lora(pipe.unet, args.rank, args.lora_alpha, UNET_LAYERS)
    for encoder in text_encoders(pipe).values() if args.train_text_encoder else ():
        train_lora(encoder, args.text_encoder_rank, args.text_encoder_rank, TEXT_ENCODER_LAYERS)
    for unet in filter(None, (pipe.unet, frozen)):
        set_memory_options(unet, args)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    return frozen


def round_as_policy(frozen: torch.nn.Module, dtype: torch.dtype, accelerator: Accelerator) -> None:
    """Gives the copy the precision that the policy computes in: autocast rounds matrices and leaves norms in fp32."""
    if sharded(accelerator):
        frozen.to(dtype)
    for layer in frozen.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.to(dtype)


def set_memory_options(unet: torch.nn.Module, args: argparse.Namespace) -> None:
    """Memory layout and attention kernel of a U-Net."""
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()


def train_lora(module: torch.nn.Module, rank: int, alpha: float, layers: list[str]) -> None:
    """Adds the adapter "default", unless --initial_lora brought one, and makes it trainable."""
    from peft import LoraConfig

    if "default" not in (getattr(module, "peft_config", None) or {}):
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
        module.add_adapter(config)  # "default"
    for name, weight in module.named_parameters():
        weight.requires_grad_("lora_" in name and ".default." in name)
        if weight.requires_grad:
            weight.data = weight.data.float()


def load_initial_unet(pipe: DiffusionPipeline, args: argparse.Namespace) -> None:
    """The U-Net of an earlier stage, in diffusers' layout, takes the base model's place."""
    check_stage("--initial_unet", args.initial_unet)
    folder = Path(args.initial_unet)
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    try:
        unet = type(pipe.unet).from_pretrained(folder, torch_dtype=pipe.unet.dtype)
        pipe.unet.load_state_dict(unet.state_dict())
    except Exception as error:
        raise UserError(f"--initial_unet {args.initial_unet} does not fit: {first_line(error)}") from error


def load_initial_lora(pipe: DiffusionPipeline, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The LoRA of an earlier stage: where training starts ("default") and, with --reference initial, a frozen second
    copy that the policy is measured against ("reference"). For --full_unet it is merged into the weights."""
    check_stage("--initial_lora", args.initial_lora)
    try:
        state, *others = pipe.lora_state_dict(
            args.initial_lora, unet_config=pipe.unet.config, return_lora_metadata=True
        )
        for name, module in {"unet": pipe.unet, **text_encoders(pipe)}.items():
            part = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
            state = {key: value for key, value in state.items() if key not in part}
            if part:
                load_adapter(pipe, name, module, part, *others)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--initial_lora {args.initial_lora} does not fit: {first_line(error)}") from error
    if not adapted(pipe):
        raise UserError(f"--initial_lora {args.initial_lora} holds no LoRA for this model")
    if state:
        accelerator.print(
            "lora:      its part for the text encoder is left out; --train_text_encoder would go on with it"
        )
    if args.full_unet and "unet" in adapted(pipe):
        pipe.fuse_lora(components=["unet"])
        pipe.unet.unload_lora()
    if args.reference == "initial":
        for module in adapted(pipe).values():
            add_reference(module)
    freeze(*adapted(pipe).values())


def load_adapter(
    pipe: DiffusionPipeline, name: str, module: torch.nn.Module, state: dict[str, Tensor],
    alphas: dict[str, float] | None, metadata: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Loads the adapter "default" of one module, in fp32 whatever its weights are; every layer must find its place."""
    from peft.tuners.lora import LoraLayer

    dtype = module.dtype
    module.float()  # diffusers would round the adapter to the module's precision
    options = {"adapter_name": "default", "network_alphas": alphas, "metadata": metadata}
    if name == "unet":
        pipe.load_lora_into_unet(state, unet=module, **options)
    else:
        pipe.load_lora_into_text_encoder(state, text_encoder=module, prefix=name, **options)
    for key, weight in module.named_parameters():
        if "lora_" not in key:
            weight.data = weight.data.to(dtype)
    wanted = sum(key.endswith(("down.weight", "lora_A.weight")) for key in state)
    found = sum(isinstance(layer, LoraLayer) for layer in module.modules())
    if wanted != found:
        raise UserError(f"only {found} of the {wanted} layers of --initial_lora's {name} are in this model")


def add_reference(module: torch.nn.Module) -> None:
    """Copies the adapter "default" to "reference"; "default" stays the active one."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    module.add_adapter(copy.deepcopy(module.peft_config["default"]), "reference")
    for key, weight in module.named_parameters():
        if "lora_" in key:
            weight.data = weight.data.float()
    weights = get_peft_model_state_dict(module, adapter_name="default")
    set_peft_model_state_dict(module, weights, adapter_name="reference")
    module.set_adapter("default")


def trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def switch(module: torch.nn.Module, change: Callable, *names: str) -> None:
    """Calls one of peft's switches, which also turn gradients on and off: frozen and sharded weights keep theirs."""
    before = [(weight, weight.requires_grad) for weight in module.parameters()]
    change(*names)
    for weight, required in before:
        weight.requires_grad_(required)


@contextlib.contextmanager
def reference(run: Run) -> Iterator[torch.nn.Module]:
    """The frozen model that the policy is measured against: the copy of the U-Net, or the policy itself with the
    adapter of --initial_lora, or with its adapters off."""
    with contextlib.ExitStack() as undo:
        for module in adapted(run.pipe).values():
            if "reference" in module.peft_config:
                switch(module, module.set_adapter, "reference")
                undo.callback(switch, module, module.set_adapter, "default")
            else:
                switch(module, module.disable_adapters)
                undo.callback(switch, module, module.enable_adapters)
        yield run.frozen or run.policy


# ---- Validation -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def averaged(run: Run) -> Iterator[None]:
    """With --ema, the averaged weights instead of the latest."""
    weights = trained_weights(run)
    if run.ema:
        run.ema.store(weights)
        run.ema.copy_to(weights)
    try:
        yield
    finally:
        if run.ema:
            run.ema.restore(weights)


@torch.no_grad()
def held_out_metrics(run: Run) -> dict[str, float]:
    """The mean of METRICS over the held-out pairs, on fixed draws."""
    if "validation" not in run.pairs:
        return {}
    accelerator = run.accelerator
    batches = all_visits(run.pairs["validation"], run.args.validation_draws, run.args.train_batch_size)
    total = torch.zeros(len(METRICS) + 1, device=accelerator.device)
    for start in range(0, len(batches), accelerator.num_processes):
        mine = start + accelerator.process_index
        visits = batches[min(mine, len(batches) - 1)]  # every process goes forward as often: FSDP needs all
        with accelerator.autocast():
            _, metrics, _ = training_loss(run, held_out_batch(run, visits))
        if mine < len(batches):
            total += len(visits) * torch.stack([*metrics.values(), total.new_ones(())])
    *sums, count = accelerator.reduce(total, "sum").tolist()
    return {f"validation/{name}": value / count for name, value in zip(METRICS, sums, strict=True)}


def validation_prompts(splits: dict[str, Split], args: argparse.Namespace) -> list[str]:
    """--validation_prompts, or the first distinct captions of the validation split (without one: of training)."""
    if args.validation_prompts:
        return args.validation_prompts
    split = splits.get("validation", splits["train"])
    return list(dict.fromkeys(split.captions))[: args.num_validation_images]


@torch.no_grad()
def draw_images(run: Run, model: Policy) -> list[Image.Image]:
    """One image for each validation prompt by `model`; prompt and seed decide the noise, so that models compare."""
    args, pipe, prompts = run.args, run.pipe, run.validation.prompts
    pipe.vae.to(run.accelerator.device)
    with run.accelerator.autocast():
        latents = model.sample(
            **(run.validation.text or {"prompt": prompts}),
            generator=[torch.Generator().manual_seed(image_seed(args.seed, prompt, 0)) for prompt in prompts],
            height=args.height,
            width=args.width,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
        )
    # one by one and in fp32: SDXL's VAE overflows in fp16
    decoded = [pipe.vae.decode(x_0[None].float() / pipe.vae.config.scaling_factor).sample for x_0 in latents]
    pipe.vae.to("cpu")
    return [pipe.image_processor.postprocess(pixels)[0] for pixels in decoded]


@torch.no_grad()
def sampling_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """The pipeline's arguments for the prompts against the empty caption."""
    text = {}
    for name, value in encode_captions(pipe, ["", *prompts]).items():
        negative = value[[0] * len(prompts)]
        if pipe.config.get("force_zeros_for_empty_prompt"):
            negative = torch.zeros_like(negative)
        text |= {name: value[1:], f"negative_{name}": negative}
    return text


def validation_picture(base: list[Image.Image], tuned: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Reference above, tuned model below, one column for each prompt, its caption underneath."""
    width = 224
    height = round(width * base[0].height / base[0].width)
    gap, gutter, font, bold = 12, 84, ImageFont.load_default(15), ImageFont.load_default(19)
    captions = [textwrap.fill(prompt, 31, max_lines=5, placeholder=" ...") for prompt in prompts]
    lines = 1 + max(caption.count("\n") for caption in captions)
    size = (gutter + len(prompts) * (width + gap), gap + 2 * (height + gap) + 20 * lines + gap)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for row, (label, images) in enumerate((("before", base), ("tuned", tuned))):
        y = gap + row * (height + gap)
        pen.text((gutter - gap, y + height // 2), label, fill="#333333", font=bold, anchor="rm")
        for column, image in enumerate(images):
            picture.paste(
                image.resize((width, height), Image.Resampling.LANCZOS), (gutter + column * (width + gap), y)
            )
    for column, caption in enumerate(captions):
        pen.multiline_text(
            (gutter + column * (width + gap), gap + 2 * (height + gap)), caption, fill="#333333", font=font, spacing=4
        )
    return picture


def draw_validation(run: Run, step: int) -> None:
    """Writes validation/step-STEP.png and, the same, validation.png; and to the tracker."""
    if not (run.accelerator.is_main_process or sharded(run.accelerator)):
        return
    images = draw_images(run, run.plain)
    if not run.accelerator.is_main_process:
        return
    picture = validation_picture(run.validation.images, images, run.validation.prompts)
    folder = Path(run.args.output_dir, "validation")
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"step-{step:06}.png")
    picture.save(folder.with_suffix(".png"))
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [picture]}, step=step)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """What a library's error says, without its stack of advice."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def hash_of(*parts: Any) -> str:
    """A short name for the settings or texts that a cached file depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run_identity(
    args: argparse.Namespace, splits: dict[str, Split], pipe: DiffusionPipeline, schedule: Schedule,
    accelerator: Accelerator,
) -> dict[str, Any]:  # fmt: skip
    """The settings that decide the weights of each step; two runs with equal ones may carry on from one another."""
    identity = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps
    identity["pairs_per_step"] = pairs_per_step(args, accelerator)
    identity["mixed_precision"] = accelerator.mixed_precision
    identity["sharded"] = accelerator.distributed_type.value if sharded(accelerator) else None
    identity["data"] = {name: data_key(split) for name, split in splits.items()}
    modules = (pipe.unet, pipe.vae, *text_encoders(pipe).values())
    identity["model"] = hash_of(weights_hash(*modules), schedule.prediction_type, schedule.alpha_bar.tolist())
    for name in filter(None, (args.initial_lora, args.initial_unet)):
        files = sorted([*Path(name).glob("*.safetensors"), *Path(name, "unet").glob("*.safetensors"), Path(name)])
        identity[f"hash of {name}"] = [
            hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
        ]
    return json.loads(json.dumps(identity))


def checkpoints(output_dir: str) -> list[Path]:
    """The complete checkpoints, first to last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def claim_output(args: argparse.Namespace) -> None:
    """Refuses a folder that cannot be written to, and, unless it is asked for, that of another run."""
    output = Path(args.output_dir)
    if (output / "training_settings.json").is_file() and not (args.overwrite or args.resume_from_checkpoint):
        raise UserError(
            f"{output} holds a run already: carry on with --resume_from_checkpoint latest, start anew with "
            "--overwrite, or name another --output_dir"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {output}: {error.strerror}") from error


def find_checkpoint(args: argparse.Namespace, identity: dict[str, Any]) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, if it belongs to this run; None to start at step 0."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        folder = next(reversed(checkpoints(args.output_dir)), None)
        if folder is None:
            return None
    else:
        folder = Path(args.resume_from_checkpoint)
    try:
        other = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint of this script: {first_line(error)}") from error
    different = sorted(name for name in identity | other if identity.get(name) != other.get(name))
    if different:
        told = ", ".join(f"{name} ({other.get(name)} there, {identity.get(name)} here)" for name in different)
        raise UserError(f"{folder} is of another run: {told}")
    return folder


def discard(folder: Path) -> None:
    """Removes a folder so that a kill in the middle leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.discarded.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def fsdp(accelerator: Accelerator) -> bool:
    """Each process holds a shard of every weight."""
    return accelerator.distributed_type.value == "FSDP"


def deepspeed(accelerator: Accelerator) -> bool:
    """DeepSpeed's engine holds the optimiser, and what it updates."""
    return accelerator.distributed_type.value == "DEEPSPEED"


def sharded(accelerator: Accelerator) -> bool:
    """Whether every process has to take part where a model is used or saved."""
    return fsdp(accelerator) or deepspeed(accelerator)


def collect_state(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trainable weights, on the CPU, and the optimiser's state, both whole; on the main process alone."""
    if not (fsdp(run.accelerator) or run.accelerator.is_main_process):
        return {}, {}
    if not fsdp(run.accelerator):
        weights = {name: weight.detach().cpu().contiguous() for name, weight in trainable(run.plain).items()}
        return weights, run.optimizer.state_dict()
    from torch.distributed.checkpoint import state_dict as dcp

    run.policy.reshard()  # its root stays whole after a forward pass without gradients
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = dcp.get_model_state_dict(run.policy, options=options)
    return weights, dcp.get_optimizer_state_dict(run.policy, run.optimizer.optimizer, options=options)


@torch.no_grad()
def restore_state(run: Run, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
    """Puts both back into the very tensors that the optimiser holds."""
    if not fsdp(run.accelerator):
        for name, weight in trainable(run.plain).items():
            weight.copy_(weights[name])
        run.optimizer.load_state_dict(optimizer)
        return
    from torch.distributed.checkpoint import state_dict as dcp

    run.policy.reshard()
    options = dcp.StateDictOptions(full_state_dict=True, strict=False)
    dcp.set_model_state_dict(run.policy, dict(weights), options=options)
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(run.policy, run.optimizer.optimizer, optimizer, options=options)


def state_of(run: Run) -> dict[str, Any]:
    """What else a checkpoint keeps."""
    parts = {"lr_scheduler": run.lr_scheduler, "scaler": run.accelerator.scaler, "ema": run.ema}
    return {name: part for name, part in parts.items() if part is not None}


def save_checkpoint(run: Run, step: int) -> None:
    """Writes checkpoint-STEP under a temporary name, renames it, and keeps the newest --checkpoints_total_limit."""
    args, accelerator = run.args, run.accelerator
    folder = Path(args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"{folder.name}.partial")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        if deepspeed(accelerator):
            accelerator.save_state(str(unfinished / "deepspeed"), exclude_frozen_parameters=True)
        weights, optimizer = ({}, {}) if deepspeed(accelerator) else collect_state(run)
        if accelerator.is_main_process:
            write_checkpoint(run, step, unfinished, weights, optimizer)
        with averaged(run):
            save_weights(run, unfinished)  # so that a checkpoint loads as the end result does
        if accelerator.is_main_process:
            discard(folder)
            unfinished.rename(folder)
    except Exception as error:  # a full disk: safetensors, torch.save and open() each have their own
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = next((path.name for path in reversed(checkpoints(args.output_dir))), "none")
        raise UserError(f"cannot write {folder}: {first_line(error)} (last complete checkpoint: {kept})") from error
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        others = [path for path in checkpoints(args.output_dir) if path != folder]
        for path in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
            discard(path)
    accelerator.wait_for_everyone()


def write_checkpoint(run: Run, step: int, folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
    """The trainable weights, all state, and what the run is."""
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    states = {name: part.state_dict() for name, part in state_of(run).items()}
    torch.save({"step": step, "optimizer": optimizer, **states}, folder / "state.pt")
    (folder / "run.json").write_text(json.dumps(run.identity, indent=2))


def load_checkpoint(run: Run, folder: Path) -> int:
    """Goes back to a checkpoint; returns the number of steps done."""
    from safetensors.torch import load_file

    try:
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        weights = load_file(folder / "model.safetensors")
    except Exception as error:
        raise UserError(f"{folder} cannot be read ({first_line(error)}): name an earlier checkpoint") from error
    if saved["step"] > run.args.max_train_steps:
        raise UserError(f"{folder} is of step {saved['step']}, past --max_train_steps {run.args.max_train_steps}")
    if deepspeed(run.accelerator):
        run.accelerator.load_state(str(folder / "deepspeed"), load_module_strict=False)
    else:
        restore_state(run, weights, saved["optimizer"])
    for name, part in state_of(run).items():
        part.load_state_dict(saved[name])
    if run.ema:
        run.ema.to(run.accelerator.device)
    return saved["step"]


# ---- Output ---------------------------------------------------------------------------------------------------------


def save_weights(run: Run, folder: Path) -> None:
    """Writes what `pipeline.load_lora_weights(folder)` or, from unet/, `UNet2DConditionModel.from_pretrained` loads.

    With --export_kohya also what ComfyUI and A1111 load.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    args, whole = run.args, None
    if sharded(run.accelerator):
        whole = run.accelerator.get_state_dict(run.policy)
    if not run.accelerator.is_main_process:
        return
    if args.full_unet:
        unet = run.plain.unet
        if whole:
            unet = UNet2DConditionModel.from_config(unet.config)
            unet.load_state_dict({name[5:]: value for name, value in whole.items() if name.startswith("unet.")})
        unet.save_pretrained(folder / "unet")
    layers, kohya = {}, {}
    for name, module in adapted(run.pipe).items():
        prefix = "unet." if name == "unet" else f"text_encoders.{name}."
        own = whole and {key[len(prefix) :]: value for key, value in whole.items() if key.startswith(prefix)}
        state, config = get_peft_model_state_dict(module, state_dict=own), module.peft_config["default"]
        if name != "unet":  # transformers 5 has no text_model level any more, everybody's files have
            state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
        names = convert_state_dict_to_diffusers(state)  # attention alone: a mixed file loads in part
        layers[f"{name}_lora_layers"] = state if any(".lora_A." in key for key in names) else names
        layers[f"{name}_lora_adapter_metadata"] = config.to_dict()
        kohya |= kohya_weights(name, state, config.lora_alpha, two_encoders=hasattr(run.pipe, "text_encoder_2"))
    if layers:
        run.pipe.save_lora_weights(folder, **layers)
    if layers and args.export_kohya:
        from safetensors.torch import save_file

        name = Path(args.output_dir).resolve().name
        kind = {"ss_base_model_version": "sdxl_base_v1-0"} if hasattr(run.pipe, "text_encoder_2") else {}
        if run.plain.unet.config.cross_attention_dim == 1024:
            kind = {"ss_v2": "True"}  # A1111 shows what it takes for SD 1 by default to SD 1 models alone
        save_file(kohya, folder / f"{name}.kohya.safetensors", {"format": "pt", **kind})


def kohya_weights(name: str, state: dict[str, Tensor], alpha: float, two_encoders: bool) -> dict[str, Tensor]:
    """A module's LoRA under kohya's keys: lora_unet_, lora_te_, and for SDXL lora_te1_, lora_te2_."""
    from diffusers.utils import convert_state_dict_to_kohya

    converted = {}
    for key, value in convert_state_dict_to_kohya({f"{name}.{key}": value for key, value in state.items()}).items():
        key = key if two_encoders else key.replace("lora_te1_", "lora_te_")
        converted[key] = torch.tensor(float(alpha)) if key.endswith(".alpha") else value.contiguous()
    return converted


def loading_code(run: Run) -> str:
    """The Python lines that load what was trained."""
    args, name = run.args, type(run.pipe).__name__
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(run.accelerator.mixed_precision, "float32")
    model, output = f'"{args.pretrained_model_name_or_path}", torch_dtype=torch.{dtype}', f'"{args.output_dir}"'
    lines = ["import torch", f"from diffusers import {'UNet2DConditionModel, ' * args.full_unet}{name}", ""]
    if args.full_unet:
        lines.append(
            f'unet = UNet2DConditionModel.from_pretrained({output}, subfolder="unet", torch_dtype=torch.{dtype})'
        )
    lines.append(f"pipe = {name}.from_pretrained({model}{', unet=unet' * args.full_unet})")
    if adapted(run.pipe):
        lines.append(f"pipe.load_lora_weights({output})")
    return "\n".join(lines)


def write_model_card(run: Run, summary: dict[str, str], metrics: dict[str, float]) -> None:
    """README.md: base model, loading snippet, picture, data, metrics and settings."""
    args = run.args
    kind = "U-Net" if args.full_unet else "LoRA"
    tables = "\n\n".join(
        f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        for title, rows in (
            ("Data", summary),
            ("Last metrics", {key: f"{value:.5g}" for key, value in metrics.items()}),
            ("Settings", {key: value for key, value in vars(args).items() if value is not None}),
        )
    )
    card = f"""---
base_model: {args.pretrained_model_name_or_path}
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, dpo, {kind.lower()}]
---

# {Path(args.output_dir).name}

A {kind} for `{args.pretrained_model_name_or_path}`, trained to draw people better with Diffusion-DPO and
statistics matching ([HG-DPO](https://arxiv.org/abs/2405.20216)) by train_dpo_human.py.

```python
{loading_code(run)}
```

![reference above, tuned model below, same prompts and noise](validation.png)

{tables}
"""
    Path(args.output_dir, "README.md").write_text(card)


def read_log(output_dir: str) -> list[dict[str, float]]:
    """The complete lines of metrics.jsonl."""
    path = Path(output_dir, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start_output(args: argparse.Namespace, first_step: int) -> None:
    """Marks the folder as this run's; forgets what an earlier run, or this one after its checkpoint, left there."""
    output = Path(args.output_dir)
    if args.overwrite and (output / "training_settings.json").is_file():
        for path in (*checkpoints(args.output_dir), *(output / name for name in ("unet", "logs", "validation"))):
            discard(path)
        lora, kohya = "pytorch_lora_weights.safetensors", f"{output.resolve().name}.kohya.safetensors"
        for name in (lora, kohya, "README.md", "validation.png"):
            (output / name).unlink(missing_ok=True)
    for unfinished in output.glob("checkpoint-*.partial"):
        shutil.rmtree(unfinished)
    kept = [line for line in read_log(args.output_dir) if line["step"] <= first_step]
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
    settings = {"settings": vars(args), "versions": versions}
    (output / "training_settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def log(run: Run, step: int, values: dict[str, float]) -> None:
    """To the trackers and to metrics.jsonl."""
    run.accelerator.log(values, step=step)
    if run.accelerator.is_main_process:
        with Path(run.args.output_dir, "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def pairs_per_step(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """The effective batch: pairs that one update of the weights sees, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def summarise(run: Run, splits: dict[str, Split], first_step: int) -> dict[str, str]:
    """Prints and returns what is about to be trained, on what, how."""
    args, accelerator, pairs = run.args, run.accelerator, run.pairs["train"]
    weights = sum(weight.numel() for weight in trainable(run.plain).values())
    batch = pairs_per_step(args, accelerator)
    epochs = args.max_train_steps * batch / len(epoch_order(args.seed, 0, pairs))
    held_out = len(splits["validation"].rows) if "validation" in splits else 0
    dropped = [
        f"{count} {reason} ({name})" for name, split in splits.items() for reason, count in split.dropped.items()
    ]
    sizes = Counter(f"{height} x {width}" for height, width in pairs.time_ids[:, 4:].tolist())
    sizes = [f"{size} ({count} pairs)" for size, count in sorted(sizes.items())]
    trained = ["whole U-Net"] * args.full_unet
    trained += [
        f"LoRA of rank {module.peft_config['default'].r} on {name}"
        for name, module in adapted(run.pipe).items()
        if trainable(module)
    ]
    against = "initial model" if args.reference == "initial" else "base model"
    against += f", measured beforehand at {args.precompute_reference} draws a pair" * bool(args.precompute_reference)
    summary = {
        "pairs": ", ".join([f"{len(pairs.bucket)} to train on, {held_out} held out", *dropped]),
        "sizes": ", ".join(sizes),
        "trained": f"{', '.join(trained)}; {weights:,} parameters in fp32",
        "precision": accelerator.mixed_precision,
        "reference": against,
        "loss": f"{args.loss_type}, beta * margin with beta = {args.beta_dpo:g} (where code has 0.5 * beta * margin: "
        f"beta = {2 * args.beta_dpo:g}) + {args.lambda_stat:g} * statistics matching",
        "batch": f"{args.train_batch_size} pairs x {args.gradient_accumulation_steps} accumulated "
        f"x {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} = {batch} pairs a step",
        "steps": f"{args.max_train_steps}, {epochs:.1f} epochs"
        + (f"; carries on after step {first_step}" if first_step else ""),
    }
    for name, value in summary.items():
        accelerator.print(f"{name + ':':11}{value}")
    if args.precompute_reference and epochs > 4 * args.precompute_reference:
        accelerator.print(
            f"warning:   {epochs:.0f} epochs over {args.precompute_reference} draws a pair repeat each one "
            f"{epochs / args.precompute_reference:.0f} times: --precompute_reference {math.ceil(epochs / 4)} is safer"
        )
    return summary


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


def closing_lines(args: argparse.Namespace, latest: dict[str, float]) -> str:
    """Where the result is, how it did on held-out pairs, and what to run next."""
    held_out = latest.get("validation/rewards/accuracies")
    told = "" if held_out is None else f"; the right one preferred in {held_out:.0%} of held-out pairs"
    model, named = args.pretrained_model_name_or_path, ""
    if Path(model) != WORLD / "pipeline":
        named = f" --pretrained_model_name_or_path {model} --prompts YOUR_TEST_PROMPTS.txt"
    done = f"memory:    {peak_memory()}\ndone:      {args.output_dir}{told}"
    return f"{done}\nnext:      python eval_human.py{named} --models base dpo={args.output_dir}"


# ---- Main -----------------------------------------------------------------------------------------------------------


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's Accelerator with the precision, accumulation and tracker asked for."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProjectConfiguration,
        set_seed,
    )

    tracker = args.report_to
    if tracker == "auto":
        tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    installed = ["none", *(str(name) for name in get_available_trackers())]
    if tracker not in installed:
        raise UserError(f"--report_to {tracker} is not installed: there are {', '.join(installed)}")
    set_seed(args.seed)  # the adapters start the same on every process; all other draws have their own seeds
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, "logs"))),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            # SDXL does not read the last layer of its first text encoder
            DistributedDataParallelKwargs(find_unused_parameters=args.train_text_encoder),
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12)),  # others wait while one downloads
        ],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed precision fp16, which accelerate's configuration asks for, needs a GPU")
    if args.ema is not None and sharded(accelerator):
        raise UserError("--ema does not work with FSDP and DeepSpeed: leave it out")
    if deepspeed(accelerator):  # it reads all this from its own configuration
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        }
    if fsdp(accelerator):
        prepare_fsdp(accelerator, args)
    return accelerator


def prepare_fsdp(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """FSDP 2 with sums and outputs in fp32; refuses what does not know it."""
    if not accelerator.is_fsdp2:
        raise UserError("FSDP needs fsdp_version: 2 in accelerate's configuration")
    if "bit" in args.optimizer:
        raise UserError(f"--optimizer {args.optimizer} does not work with FSDP: leave it out")
    if args.full_unet and args.train_text_encoder:
        raise UserError("--full_unet with --train_text_encoder does not work with FSDP: train one after the other")
    args.channels_last = False  # FSDP takes no other layout
    if accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def prepare_data(
    splits: dict[str, Split], pipe: DiffusionPipeline, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[dict[str, Pairs], Validation]:
    """Every split as Pairs, and what validation draws; the VAE leaves the device, frozen text encoders the memory."""
    vae_hash = weights_hash(pipe.vae)
    pairs = {name: prepare_split(split, vae_hash, pipe, args, accelerator) for name, split in splits.items()}
    pipe.vae.to("cpu")
    prompts = validation_prompts(splits, args)
    captions = {name: split.captions for name, split in splits.items()}
    distinct = sorted({caption for column in captions.values() for caption in column})
    row_of = {caption: row for row, caption in enumerate(distinct)}
    embeddings, text = None, None
    if args.train_text_encoder:
        tell_cut_captions(pipe, distinct, accelerator)
    else:
        text = sampling_text(pipe, prompts)
        embeddings = prepare_captions(distinct, pipe, args, accelerator)
    for name, part in pairs.items():
        part.captions, part.embeddings = distinct, embeddings
        part.caption = np.array([row_of[caption] for caption in captions[name]])
    return pairs, Validation(prompts, text, [])


def make_optimizer(parameters: list[Tensor], args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimiser of OPTIMIZERS; the flags of Adam are for the AdamWs, the others keep their own defaults."""
    module, _, name = OPTIMIZERS[args.optimizer].rpartition(".")
    try:
        maker = getattr(importlib.import_module(module), name)
    except ImportError as error:
        told = f"--optimizer {args.optimizer} needs {module.partition('.')[0]}"
        raise UserError(f"{told}: {first_line(error)}") from error
    settings = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if "adamw" in args.optimizer:
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        settings["fused"] = True
    return maker(parameters, **settings)


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule of this name; a constant one with warm-up where steps of warm-up are given."""
    from diffusers.optimization import get_scheduler

    name = args.lr_scheduler
    if name == "constant" and args.lr_warmup_steps:
        name = "constant_with_warmup"  # "constant" would ignore the warm-up
    return get_scheduler(
        name, optimizer=optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )


def make_ema(run_weights: list[Tensor], args: argparse.Namespace) -> EMAModel | None:
    """The moving average of the trained weights that --ema asks for."""
    if args.ema is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(run_weights, decay=args.ema, use_ema_warmup=False)


def measure_beforehand(run: Run) -> Run:
    """Measures the reference on held-out pairs and draws its pictures; with --precompute_reference measures it on the
    training draws too, after which nothing needs it any more."""
    if "validation" in run.pairs:
        run.pairs["validation"].reference = measure_reference(run, "validation")
    if run.accelerator.is_main_process or sharded(run.accelerator):
        with reference(run):
            run.validation.images.extend(draw_images(run, run.frozen or run.plain))
    if not run.args.precompute_reference:
        return run
    run.pairs["train"].reference = measure_reference(run, "train")
    return run._replace(frozen=None)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and SIGINT, so that the step can be finished; a second Ctrl-C ends the program at once."""
    caught: list[signal.Signals] = []

    def catch(number: int, _frame: Any) -> None:
        caught.append(signal.Signals(number))
        if number == signal.SIGINT:  # schedulers send SIGTERM twice
            signal.signal(number, previous[number])

    previous = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def held_out_accuracies(output_dir: str) -> list[float]:
    """Those of all validations so far."""
    name = "validation/rewards/accuracies"
    return [line[name] for line in read_log(output_dir) if name in line]


def no_longer_improves(history: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` of the held-out accuracies hold no new best; never without a patience."""
    return patience is not None and len(history) > patience and max(history[-patience:]) <= max(history[:-patience])


def train(run: Run, first_step: int) -> dict[str, float]:
    """The loop: steps, logs, checkpoints, validation; returns the last value of every metric."""
    args, accelerator = run.args, run.accelerator
    latest, window, num_steps, seconds = {}, 0, 0, 0.0
    steps = range(first_step + 1, args.max_train_steps + 1)
    show = {"initial": first_step, "total": args.max_train_steps, "disable": not accelerator.is_main_process}
    with stop_signals() as signals, tqdm(steps, desc="training", unit="step", **show) as bar:
        for step in bar:
            is_last = step == args.max_train_steps
            began, learning_rate = time.perf_counter(), run.lr_scheduler.get_last_lr()[0]
            window, num_steps = window + optimisation_step(run, step - 1), num_steps + 1
            if log_now := step % args.logging_steps == 0 or is_last:
                means = (accelerator.reduce(window, "mean") / num_steps).tolist()
            seconds += time.perf_counter() - began
            if log_now:
                values = dict(zip((*METRICS, "grad_norm"), means, strict=True))
                pairs_per_second = num_steps * pairs_per_step(args, accelerator) / seconds
                values |= {"lr": learning_rate, "pairs_per_second": pairs_per_second}
                log(run, step, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", accuracy=f"{values['rewards/accuracies']:.2f}")
                latest, window, num_steps, seconds = latest | values, 0, 0, 0.0

            validate_now = step % args.validation_steps == 0 or is_last
            if validate_now:
                with averaged(run):
                    metrics = held_out_metrics(run)
                    draw_validation(run, step)
                log(run, step, metrics)
                latest |= metrics
            stopped = any_process(accelerator, bool(signals))
            if stopped or step % args.checkpointing_steps == 0:
                save_checkpoint(run, step)
            if stopped and not is_last:
                number = signals[0] if signals else signal.SIGTERM  # another process caught it
                told = "it is saved: the same command with --resume_from_checkpoint latest carries on"
                accelerator.print(f"\nstopped by {number.name} after step {step}; {told}")
                accelerator.wait_for_everyone()
                accelerator.end_training()
                sys.exit(128 + number)
            history = held_out_accuracies(args.output_dir) if validate_now and accelerator.is_main_process else []
            if validate_now and any_process(accelerator, no_longer_improves(history, args.early_stopping_patience)):
                accelerator.print(f"\nheld-out accuracy no longer improves: stopped early, after step {step}")
                break
    return latest


def main(args: argparse.Namespace) -> None:
    """Loads data and model, measures the reference, trains, validates, and writes the weights."""
    quiet_libraries()
    claim_output(args)
    accelerator = start_accelerator(args)
    with accelerator.main_process_first():
        splits = load_splits(args)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_model(args, dtype)
    schedule = noise_schedule(pipe, args.timestep_range, accelerator.device)
    pipe.scheduler = sampler_of(pipe)
    identity = run_identity(args, splits, pipe, schedule, accelerator)
    checkpoint = find_checkpoint(args, identity)

    pipe.to(accelerator.device)
    pairs, validation = prepare_data(splits, pipe, args, accelerator)
    frozen_unet = prepare_models(pipe, args, dtype, accelerator)
    plain = Policy(pipe, pipe.unet, args.train_text_encoder, args.compile)
    frozen = frozen_unet and Policy(pipe, frozen_unet, args.train_text_encoder, args.compile)
    weights = list(trainable(plain).values())
    optimizer = make_optimizer(weights, args)
    lr_scheduler = make_lr_scheduler(optimizer, args)
    policy, optimizer = accelerator.prepare(plain, optimizer)
    if fsdp(accelerator):
        torch.distributed.fsdp.register_fsdp_forward_method(policy, "sample")
    run = Run(
        args, accelerator, pipe, policy, plain, frozen, schedule, pairs, optimizer, lr_scheduler,
        make_ema(weights, args), validation, identity,
    )  # fmt: skip
    run = measure_beforehand(run)
    del frozen, frozen_unet  # `run` holds them as long as they are needed
    first_step = load_checkpoint(run, checkpoint) if checkpoint else 0

    summary = summarise(run, splits, first_step)
    if accelerator.is_main_process:
        start_output(args, first_step)
    accelerator.init_trackers("train_dpo_human", {name: str(value) for name, value in vars(args).items()})
    latest = train(run, first_step)
    with averaged(run):
        save_weights(run, Path(args.output_dir))
    if accelerator.is_main_process:
        write_model_card(run, summary, latest)
    accelerator.wait_for_everyone()  # a process that leaves while another saves may fall over its own threads
    accelerator.end_training()
    accelerator.print(closing_lines(args, latest))


# ---- Command line ---------------------------------------------------------------------------------------------------


def use_embedded_world(parser: argparse.ArgumentParser, script: str) -> None:
    """Makes the settings of the embedded world (tests/tiny_human/settings.json) the defaults of `parser`.

    Called when no model is named; flags that are given still win.
    """
    settings = WORLD / "settings.json"
    if not settings.is_file():
        parser.error("no model: set --pretrained_model_name_or_path (the embedded world tests/tiny_human is not here)")
    defaults = json.loads(settings.read_text().replace("{world}", WORLD.as_posix()))[script]
    parser.set_defaults(**defaults)
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}.py: the embedded world is used; --pretrained_model_name_or_path names your own model")


def at_least(minimum: float, kind: type, *, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of this kind from `minimum` on, or above it."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (value > minimum if exclusive else value >= minimum):
            raise argparse.ArgumentTypeError(f"must be {'above' if exclusive else 'at least'} {minimum}")
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

    count, positive = at_least(1, int), at_least(0, float, exclusive=True)

    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--pretrained_model_name_or_path", help="your model, SD 1.x, 2.x or XL; none: the embedded world")
    flag("--revision", help="branch, tag or commit of the model on the hub")
    flag("--variant", help="variant of the weight files, such as fp16")
    flag("--cache_dir", help="where downloaded models and data sets are kept")
    flag("--rank", type=count, default=8, help="rank of the LoRA on all attention layers of the U-Net")
    flag("--lora_alpha", type=positive, help="its scale; none: the rank")
    flag("--full_unet", action="store_true", help="train the whole U-Net against a frozen copy, instead of a LoRA")
    flag("--train_text_encoder", action="store_true", help="train a LoRA on the text encoder(s) too")
    flag("--text_encoder_rank", type=count, default=64, help="its rank")
    flag("--freeze_unet", action="store_true", help="with --train_text_encoder: train that alone, as the paper does")
    flag("--initial_lora", help="LoRA of an earlier stage to start from (with its rank)")
    flag("--initial_unet", help="whole U-Net of an earlier stage to start from")
    flag("--reference", choices=["initial", "base"], default="initial", help="measure against the start, or the base")
    flag("--precompute_reference", type=count, metavar="K", help="measure the reference once, at K draws a pair")

    flag = parser.add_argument_group("data").add_argument
    flag("--train_data_dir", default="human-preferences", help="folder of pairs, or a json, jsonl or parquet file")
    flag("--dataset_name", help="data set on the hub, or a path that `datasets` loads, instead of --train_data_dir")
    flag("--dataset_config_name", help="its configuration")
    flag("--dataset_split_name", default="train", help="its split to train on")
    flag("--image_0_column", help="column of the first image; known: jpg_0, chosen, path1, image_0")
    flag("--image_1_column", help="column of the second; known: jpg_1, rejected, path2, image_1")
    flag("--label_0_column", help="1 where the first image won, 0, or 0.5 for a tie; none: the first one won")
    flag("--caption_column", help="column of the captions; known: caption, prompt")
    flag("--margin_column", default="margin", help="column of the winner's lead in score")
    flag("--max_train_samples", type=count, help="use the first so many rows")
    flag("--min_margin", type=at_least(-math.inf, float), help="leave out pairs whose lead in score is smaller")
    flag("--validation_share", type=at_least(0, float), default=0.0, help="share of captions to hold out")
    flag("--resolution", type=count, default=512, help="height and width; images are resized and cropped to it")
    flag("--height", type=count, help="height, where it is not --resolution")
    flag("--width", type=count, help="width, where it is not --resolution")
    flag("--aspect_ratio_buckets", action="store_true", help="about resolution^2 pixels in each pair's shape")
    flag("--encoded_dir", help="caches what is encoded and measured; shared by all machines; none: OUTPUT_DIR/cache")

    flag = parser.add_argument_group("objective").add_argument
    flag("--beta_dpo", type=positive, default=2500, help="factor of the margin; where code has 0.5 * beta, its half")
    flag("--loss_type", choices=["sigmoid", "hinge", "ipo"], default="sigmoid", help="sigmoid is DPO")
    flag("--label_smoothing", type=float, default=0.0, help="share of labels thought to be wrong")
    flag("--soft_labels", type=positive, metavar="T", help="label sigmoid(margin column / T), not 1")
    flag("--ties", choices=["drop", "soft"], default="drop", help="leave ties out, or train them with label 0.5")
    flag("--winner_safeguard", type=at_least(0, float), metavar="MU", help="Diffusion-SDPO; in [0, 1], 0 is weakest")
    flag("--lambda_stat", type=at_least(0, float), default=10000, help="weight of statistics matching, 0 for none")
    flag("--timestep_range", type=int, nargs=2, metavar=("LOW", "HIGH"), help="draw from LOW to below HIGH; none: all")

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--max_train_steps", type=count, default=2000, help="updates of the weights; the paper: 300000")
    flag("--train_batch_size", type=count, default=16, help="pairs in a process's forward pass")
    flag("--gradient_accumulation_steps", type=count, default=1, help="forward passes in an update")
    flag("--learning_rate", type=positive, default=1e-5, help="peak learning rate")
    flag("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="how it changes over the steps")
    flag("--lr_warmup_steps", type=at_least(0, int), default=0, help="steps of linear warm-up, under every schedule")
    flag("--optimizer", choices=OPTIMIZERS, default="adamw", help="torch's or bitsandbytes'")
    flag("--use_8bit_adam", action="store_true", help="--optimizer adamw8bit: a quarter of the optimiser's memory")
    flag("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    flag("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    flag("--adam_weight_decay", type=at_least(0, float), default=1e-2, help="weight decay")
    flag("--adam_epsilon", type=at_least(0, float), default=1e-8, help="epsilon of Adam")
    flag("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    flag("--ema", type=positive, nargs="?", const=0.9999, metavar="DECAY", help="write averaged weights")
    flag("--early_stopping_patience", type=count, metavar="N", help="stop after N validations without a new best")
    flag("--seed", type=at_least(0, int), default=0, help="decides order, noise, timesteps and the LoRA's start")

    flag = parser.add_argument_group("memory and precision").add_argument
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="none: what `accelerate config` says")
    flag("--gradient_checkpointing", action="store_true", help="less memory, slower steps")
    flag("--enable_xformers_memory_efficient_attention", action="store_true", help="needs CUDA")
    flag("--channels_last", action=argparse.BooleanOptionalAction, help="memory layout of the U-Net; none: on a GPU")
    flag("--compile", action="store_true", help="torch.compile the U-Net: minutes at the start, faster steps")

    flag = parser.add_argument_group("validation").add_argument
    flag("--validation_steps", type=count, default=500, help="steps between validations; there is one at the end")
    flag("--validation_prompts", nargs="*", help="prompts to draw; none: captions of the validation split")
    flag("--num_validation_images", type=count, default=8, help="how many of those captions")
    flag("--validation_inference_steps", type=count, default=50, help="steps of the sampler")
    flag("--validation_guidance_scale", type=float, default=5.0, help="classifier-free guidance")
    flag("--validation_draws", type=count, default=4, help="timesteps at which each held-out pair is measured")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="dpo-human-lora", help="weights, model card, metrics and checkpoints")
    flag("--overwrite", action="store_true", help="start anew in the folder of an earlier run")
    flag("--resume_from_checkpoint", help="a checkpoint's folder, or latest")
    flag("--checkpointing_steps", type=count, default=500, help="steps between checkpoints")
    flag("--checkpoints_total_limit", type=count, help="keep only the newest so many")
    flag("--export_kohya", action="store_true", help="write the LoRA for ComfyUI and A1111 as well")
    flag("--logging_steps", type=count, default=10, help="steps that logged metrics are averaged over")
    flag("--report_to", default="auto", help="a tracker of accelerate's, none, or auto: tensorboard if installed")
    # fmt: on

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        use_embedded_world(parser, "train_dpo_human")
        args = parser.parse_args(argv)
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    args.lora_alpha = args.lora_alpha or args.rank
    if args.channels_last is None:  # on a CPU it is no faster, and copies memory-mapped weights
        args.channels_last = torch.cuda.is_available()
    args.encoded_dir = args.encoded_dir or str(Path(args.output_dir, "cache"))
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error("--use_8bit_adam and --optimizer contradict each other")
    if args.use_8bit_adam:
        args.optimizer = "adamw8bit"
    if args.aspect_ratio_buckets and (args.height != args.resolution or args.width != args.resolution):
        parser.error("--aspect_ratio_buckets takes --resolution, not --height and --width")
    if args.dataset_name is not None:
        args.train_data_dir = None
    refuse_impossible(parser, args)
    return args


def refuse_impossible(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Combinations that cannot work are told before anything is loaded."""
    gpu, low_high = torch.cuda.is_available(), args.timestep_range or (0, 1)
    wrong = {
        "--label_smoothing must lie in [0, 0.5)": not 0 <= args.label_smoothing < 0.5,
        "--winner_safeguard must lie in [0, 1]": (args.winner_safeguard or 0) > 1,
        "--validation_share must be below 1": args.validation_share >= 1,
        "--ema must be below 1": (args.ema or 0) >= 1,
        "--adam_beta1 and --adam_beta2 must lie in [0, 1)": not all(
            0 <= beta < 1 for beta in (args.adam_beta1, args.adam_beta2)
        ),
        "--seed must be below 2**32": args.seed >= 2**32,
        "--timestep_range needs 0 <= LOW < HIGH": not 0 <= low_high[0] < low_high[1],
        "--resolution, --height and --width must be multiples of 8": args.height % 8 or args.width % 8,
        "--freeze_unet needs --train_text_encoder": args.freeze_unet and not args.train_text_encoder,
        "--freeze_unet and --full_unet contradict each other": args.freeze_unet and args.full_unet,
        "--initial_unet needs --full_unet": args.initial_unet and not args.full_unet,
        "--export_kohya needs a LoRA: set --train_text_encoder or leave --full_unet out": args.export_kohya
        and args.full_unet and not args.train_text_encoder,
        "--mixed_precision fp16 needs a GPU": args.mixed_precision == "fp16" and not gpu,
        "--enable_xformers_memory_efficient_attention needs CUDA": not gpu
        and args.enable_xformers_memory_efficient_attention,
        "--overwrite starts anew, --resume_from_checkpoint carries on: set one": args.overwrite
        and args.resume_from_checkpoint,
    }  # fmt: skip
    for told in (told for told, is_wrong in wrong.items() if is_wrong):
        parser.error(told)


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
