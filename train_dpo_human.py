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

HG-DPO (https://arxiv.org/abs/2405.20216), the Easy stage. A pair is a winner x_w and a loser x_l, latents for one
caption. Timestep and noise are drawn once per pair, shared by both sides and by the policy and its frozen reference:

    x_t    = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise                 add_noise
    err    = mean over (C, H, W) of (unet(x_t, t, caption) - target)^2       image_error, in fp32
    margin = (err_ref_w - err_w) - (err_ref_l - err_l)                       dpo_loss
    L_dpo  = -log sigmoid(beta * margin)
    L_stat = || mu(c_t (x0_w - x0_ref_w)) ||^2,  mu: mean over (H, W)        predict_x0, statistics_matching_loss
    L      = L_dpo + lambda_stat * L_stat                                    training_loss calls them in this order

c_t turns a difference in the predicted x0 into the difference of one reverse DDPM step, so that L_stat, which keeps
the colours of the base model, costs no forward pass. The reference is the same U-Net with its LoRA switched off.

Without arguments it trains on human-preferences/ in the embedded world (tests/tiny_human). The usual command:

    accelerate launch train_dpo_human.py --pretrained_model_name_or_path YOUR_MODEL --resolution 512 \\
        --train_data_dir human-preferences --output_dir dpo-human-lora --mixed_precision bf16 --use_8bit_adam

`pipeline.load_lora_weights("dpo-human-lora")` loads the result. SD 1.x, SD 2.x and SDXL: the pipeline's class decides.

Differences from the paper:
1. beta multiplies the margin itself, as in diffusers' SD script; code with 0.5 * beta * margin means the same by 5000.
2. Where the paper is silent: LoRA alpha = rank, a constant learning rate without warm-up, gradients clipped at norm 1.
3. 2,000 steps by default instead of 300,000: most people have thousands of pairs, not 300,000.
4. Latents and captions are encoded once; draws are functions of (seed, position), whatever the number of processes.
5. Ties are left out. Hinge and IPO losses, label smoothing and training the whole U-Net are there to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm.auto import tqdm


if TYPE_CHECKING:  # imported where they are used, so that a typing error is told at once
    from accelerate import Accelerator
    from datasets import Dataset, DatasetDict
    from diffusers import DiffusionPipeline, UNet2DConditionModel

WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
METRICS = {
    "loss": "loss/dpo + loss/statistics",
    "loss/dpo": "log 2 = 0.693 at the start; below it the policy prefers the winners",
    "loss/statistics": "lambda_stat * L_stat: how far colours move from the base model's",
    "error/winner": "denoising error of the policy on winners",
    "error/loser": "denoising error of the policy on losers",
    "error/winner_over_reference": "the same less the reference's; below 0 the winners became likelier",
    "error/loser_over_reference": "the same less the reference's; above 0 the losers became less likely",
    "rewards/margins": "beta * margin, what the loss's sigmoid sees",
    "rewards/accuracies": "share of pairs with a margin above 0",
    "dpo_weight": "sigmoid(-beta * margin), the pair's weight in the gradient; near 0 it has nothing left to teach",
}
LR_SCHEDULERS = ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"]
# fmt: off
FREE_SETTINGS = {  # a run that is carried on may change these
    "output_dir", "overwrite", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "cache_dir",
    "logging_steps", "report_to", "validation_steps", "validation_prompts", "num_validation_images",
    "validation_inference_steps", "validation_guidance_scale", "validation_draws", "max_train_steps",
    "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
}
# fmt: on


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method -----------------------------------------------------------------------------------------------------


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
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on per-image errors: (B,) each -> loss (), margin (B,).

    The margin is positive where the policy improved on the winner, against the reference, more than on the loser.
    `beta` multiplies it as it is; public code with `0.5 * beta * margin` means the same loss by twice the beta.
    `label_smoothing` is the share of pairs thought to be labelled the wrong way round (sigmoid only). "ipo" is IPO's
    loss times beta^2: the same minimum, margin = 1 / (2 beta), with gradients of the size of the others'.
    """
    margin = (ref_err_w - err_w) - (ref_err_l - err_l)
    logit = beta * margin
    if loss_type == "hinge":
        loss = F.relu(1 - logit)
    elif loss_type == "ipo":
        loss = (logit - 0.5).square()
    else:
        loss = -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)
    return loss.mean(), margin


def predict_x0(prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The clean latents that a prediction stands for, fp32; prediction and x_t (B, C, H, W), alpha_bar (B,)."""
    signal, sigma = per_image(alpha_bar.sqrt()), per_image((1 - alpha_bar).sqrt())
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction.float()) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * prediction.float()
    return prediction.float()


def statistics_matching_loss(x0_w: Tensor, ref_x0_w: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """How far a reverse DDPM step by the policy moves the winner's channel means off the reference's (HG-DPO, L_stat).

    With the step's noise shared, the steps differ by c_t (x0 - ref_x0), c_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t),
    for every prediction type. Mean over (H, W), squared L2 norm over channels, mean over the batch: (B, C, H, W) -> ()
    """
    beta_t = 1 - alpha_bar / alpha_bar_prev
    c_t = alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar)
    shift = (per_image(c_t) * (x0_w - ref_x0_w)).mean(dim=(2, 3))
    return shift.square().sum(dim=1).mean()


# ---- Draws: what a step sees is a function of (seed, position) ------------------------------------------------------


def positions(step: int, micro_step: int, rank: int, args: argparse.Namespace, num_processes: int) -> range:
    """Where this process's micro-batch lies in the endless sequence of pairs; ranks never share a position."""
    start = (step * args.gradient_accumulation_steps + micro_step) * num_processes + rank
    return range(start * args.train_batch_size, (start + 1) * args.train_batch_size)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    """The order of the pairs in one epoch: a permutation that the seed decides."""
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def rows_at(seed: int, positions: range, num_pairs: int) -> list[int]:
    """The pair at each position: every epoch is its own permutation."""
    return [int(epoch_order(seed, p // num_pairs, num_pairs)[p % num_pairs]) for p in positions]


def draw(
    seed: int, stream: str, positions: range, shape: tuple[int, ...], num_timesteps: int
) -> tuple[Tensor, Tensor]:
    """The noise (B, *shape) and timesteps (B,) at each position of a stream, drawn on the CPU."""
    noise, t = torch.empty(len(positions), *shape), torch.empty(len(positions), dtype=torch.long)
    for i, position in enumerate(positions):
        digest = hashlib.sha256(f"{seed}|{stream}|{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        t[i] = torch.randint(num_timesteps, (), generator=generator)
        noise[i].normal_(generator=generator)
    return noise, t


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


# ---- Data -----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Decided pairs of one split: `winner[i]` is 0 or 1, the side of row i that was preferred."""

    rows: Dataset
    winner: np.ndarray
    num_ties: int


class Pairs(NamedTuple):
    """What training reads, memory-mapped: scaled latents in fp16, winners first, and the captions' embeddings."""

    latents: Tensor  # (N, 2, C, h, w)
    caption: Tensor  # (N,), the row of `embeddings`
    embeddings: dict[str, Tensor]  # (number of captions, ...) each
    time_ids: Tensor  # (6,), SDXL: original size, crop and target size in pixels


class Batch(NamedTuple):
    """Winners then losers along dim 0 of x_0 (2B, C, h, w); noise (B, C, h, w), t (B,) and text are shared."""

    x_0: Tensor
    noise: Tensor
    t: Tensor
    text: dict[str, Tensor]


def load_folder(folder: Path, cache_dir: str | None) -> DatasetDict:
    """A folder's splits. The parquet files are named one by one, because a folder that was made again under its old
    name (--rescore) would come out of the cache of `datasets` as it was."""
    import datasets

    files = {name: sorted(map(str, folder.glob(f"data/{name}-*.parquet"))) for name in ("train", "validation")}
    files = {name: paths for name, paths in files.items() if paths}
    if files:
        return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir)
    return datasets.load_dataset(str(folder), cache_dir=cache_dir, download_mode="force_redownload")


def load_splits(args: argparse.Namespace) -> dict[str, Split]:
    """The splits "train" and, where there is one, "validation"; checked, ties left out."""
    import datasets

    source = args.dataset_name or args.train_data_dir
    if args.dataset_name is None:
        if not Path(source).is_dir():
            raise UserError(f"no folder {source}: make pairs with make_preference_data.py, or set --train_data_dir")
        datasets.disable_progress_bars()
    try:
        if args.dataset_name is not None:
            loaded = {"train": datasets.load_dataset(source, split=args.dataset_split_name, cache_dir=args.cache_dir)}
        else:
            loaded = load_folder(Path(source), args.cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source} holds no data set of pairs: {first_line(error)}") from error
    if "train" not in loaded:
        raise UserError(f"{source} has no split 'train', only {', '.join(loaded)}")
    splits = {name: check_split(name, loaded[name], args) for name in ("train", "validation") if name in loaded}
    if len(splits["train"].rows) == 0:
        raise UserError(f"no pairs to train on ({splits['train'].num_ties} ties were left out)")
    return {name: split for name, split in splits.items() if len(split.rows)}


def check_split(name: str, rows: Dataset, args: argparse.Namespace) -> Split:
    """The decided pairs of a split, after its columns, labels and images were looked at; errors name the row."""
    missing = [column for column in PAIR_COLUMNS if column not in rows.column_names]
    if missing:
        raise UserError(f"split {name!r} has no column {', '.join(missing)} (it has {', '.join(rows.column_names)})")
    if args.max_train_samples is not None and name == "train":
        rows = rows.select(range(min(args.max_train_samples, len(rows))))
    labels = np.array([rows["label_0"][:], rows["label_1"][:]], dtype=float).reshape(2, -1)
    wrong = np.flatnonzero(~np.isin(labels[0], (0, 0.5, 1)) | (labels.sum(axis=0) != 1))
    if len(wrong):
        row = int(wrong[0])
        told = f"label_0 = {labels[0, row]:g}, label_1 = {labels[1, row]:g}"
        raise UserError(f"split {name!r}, row {row}: {told}, not (1, 0), (0, 1) or a tie (0.5, 0.5)")
    check_images(name, rows, Path(args.output_dir, "cache", f"checked-{rows._fingerprint}"))
    decided = np.flatnonzero(labels[0] != 0.5)
    return Split(rows.select(decided), (labels[0, decided] == 0).astype(int), len(rows) - len(decided))


def check_images(name: str, rows: Dataset, checked: Path) -> None:
    """Every pair has two different images with readable headers; `checked` remembers that, for the next start."""
    if checked.is_file():
        return
    for row, pair in enumerate(rows.select_columns(["jpg_0", "jpg_1"])):
        where = f"split {name!r}, row {row}"
        if pair["jpg_0"] == pair["jpg_1"]:
            raise UserError(f"{where}: winner and loser are the same image")
        for side in ("jpg_0", "jpg_1"):
            open_image(pair[side], f"{where}, {side}")
    checked.parent.mkdir(parents=True, exist_ok=True)
    checked.touch()


def open_image(data: bytes, where: str) -> Image.Image:
    """Reads the header alone; the pixels come with the first use."""
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, TypeError) as error:
        raise UserError(f"{where}: not a readable image ({first_line(error)})") from error


def to_pixels(data: bytes, size: tuple[int, int], where: str) -> Tensor:
    """An image resized and centre-cropped to (height, width): (3, height, width) in [-1, 1]."""
    try:
        image = ImageOps.exif_transpose(open_image(data, where)).convert("RGB")
    except OSError as error:  # cut short
        raise UserError(f"{where}: not a readable image ({first_line(error)})") from error
    image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def cached_tensor(
    accelerator: Accelerator, path: Path, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], None]
) -> Tensor:
    """The memory-mapped tensor in the file `path`; the main process lets `fill` write it first if it is not there."""
    numel = math.prod(shape)
    if accelerator.is_main_process and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        unfinished.unlink(missing_ok=True)
        fill(torch.from_file(str(unfinished), shared=True, size=numel, dtype=dtype).view(shape))
        unfinished.replace(path)
    accelerator.wait_for_everyone()
    return torch.from_file(str(path), shared=False, size=numel, dtype=dtype).view(shape)


def weights_hash(*modules: torch.nn.Module) -> str:
    """sha256 over the weights as fp16, so that it is the same in whichever precision they were loaded."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def why_latents_do_not_fit(
    folder: str | None, columns: list[str], vae_hash: str, shape: tuple[int, ...]
) -> str | None:
    """None where the data set's own latents are those of this VAE and size, else the reason in words."""
    metadata = Path(folder or "", "preference_data.json")
    if folder is None or "latents_0" not in columns or not metadata.is_file():
        return "the data set has none"
    made = json.loads(metadata.read_text()).get("latents") or {}
    if made.get("vae_hash") != vae_hash:
        return "the data set's come from another VAE"
    if tuple(made.get("shape", ())) != shape:
        return f"the data set's are {made.get('shape')}, --resolution asks for {list(shape)}"
    return None


def encode_latents(name: str, split: Split, pipe: DiffusionPipeline, size: tuple[int, int], latents: Tensor) -> None:
    """Fills `latents` (N, 2, C, h, w) with the VAE's mean for each image, winners first."""
    for row in tqdm(range(len(latents)), desc=f"encoding {name}", unit="pair"):
        pair, winner = split.rows[row], split.winner[row]
        sides = [to_pixels(pair[f"jpg_{side}"], size, f"split {name!r}, row {row}") for side in (winner, 1 - winner)]
        posterior = pipe.vae.encode(torch.stack(sides).to(pipe.vae.device)).latent_dist
        latents[row] = (posterior.mode() * pipe.vae.config.scaling_factor).to("cpu", latents.dtype)


def copy_latents(split: Split, latents: Tensor) -> None:
    """Fills `latents` (N, 2, C, h, w) from the columns latents_0 and latents_1, winners first."""
    for row, pair in enumerate(split.rows.select_columns(["latents_0", "latents_1"])):
        for position, side in enumerate((split.winner[row], 1 - split.winner[row])):
            values = np.frombuffer(pair[f"latents_{side}"], dtype=np.float16)
            if len(values) != latents[row, position].numel():
                raise UserError(
                    f"row {row}: latents_{side} holds {len(values)} numbers, not {list(latents.shape[2:])}"
                )
            latents[row, position] = torch.from_numpy(values.copy()).view(latents.shape[2:])


def prepare_latents(
    splits: dict[str, Split], pipe: DiffusionPipeline, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The latents (N, 2, C, h, w) of every split: the data set's where they fit, else by the VAE; kept in a cache."""
    size = (args.height, args.width)
    shape = (pipe.vae.config.latent_channels, *(side // pipe.vae_scale_factor for side in size))
    vae_hash = weights_hash(pipe.vae)
    latents = {}
    for name, split in splits.items():
        reason = why_latents_do_not_fit(args.train_data_dir, split.rows.column_names, vae_hash, shape)
        if reason is None:
            fill = partial(copy_latents, split)
        else:
            accelerator.print(f"latents: the {name} images go through the VAE once ({reason})")
            fill = partial(encode_latents, name, split, pipe, size)
        key = hash_of(split.rows._fingerprint, size, vae_hash, reason is None)
        path = Path(args.output_dir, "cache", f"latents-{name}-{key}.bin")
        latents[name] = cached_tensor(accelerator, path, (len(split.rows), 2, *shape), torch.float16, fill)
    return latents


def encode_captions(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Text embeddings by the pipeline's own encoder(s), under the names that the pipeline's call takes."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    values = pipe.encode_prompt(
        prompt=prompts, device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


def prepare_captions(
    captions: list[str], pipe: DiffusionPipeline, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The embeddings of distinct captions, (len(captions), ...) each, kept in a cache; frees the text encoders."""
    encoders = [pipe.components[name] for name in ("text_encoder", "text_encoder_2") if pipe.components.get(name)]
    key = hash_of(captions, weights_hash(*encoders), str(encoders[0].dtype))
    embeddings = {}
    for name, example in encode_captions(pipe, captions[:1]).items():

        def fill(tensor: Tensor, name: str = name) -> None:
            for start in tqdm(range(0, len(captions), 32), desc="encoding captions", unit_scale=32, unit="caption"):
                tensor[start : start + 32] = encode_captions(pipe, captions[start : start + 32])[name].cpu()

        path = Path(args.output_dir, "cache", f"{name}-{key}.bin")
        shape = (len(captions), *example.shape[1:])
        embeddings[name] = cached_tensor(accelerator, path, shape, example.dtype, fill)
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipe.components:
            setattr(pipe, name, None)
    return embeddings


def make_batch(pairs: Pairs, rows: list[int], noise: Tensor, t: Tensor, device: torch.device) -> Batch:
    """The pairs in `rows` (B) with their noise and timesteps, on the device, latents in fp32."""
    x_0 = pairs.latents[rows].transpose(0, 1).flatten(0, 1).float()
    text = {name: value[pairs.caption[rows]].to(device) for name, value in pairs.embeddings.items()}
    text["time_ids"] = pairs.time_ids.to(device).expand(len(rows), -1)
    return Batch(x_0.to(device), noise.to(device), t.to(device), text)


# ---- Models ---------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """The model's noise schedule: alpha_bar (T,), that of the step before (1 before the first), prediction type."""

    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    prediction_type: str


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipe: DiffusionPipeline
    policy: torch.nn.Module  # `unet` as accelerate wraps it
    unet: UNet2DConditionModel
    frozen: UNet2DConditionModel | None  # the reference's copy; LoRA needs none
    schedule: Schedule
    pairs: dict[str, Pairs]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler


def quiet_libraries() -> None:
    """Silences what the libraries print and a user cannot act on; call it before diffusers' models are imported."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # "can't load C++/CUDA extensions" on a CPU
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
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"no such model folder: {name}")


def load_model(args: argparse.Namespace, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline in `dtype`, but for the VAE, and with --full_unet the U-Net, which are fp32; no safety checker."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    check_model(args.pretrained_model_name_or_path, "model_index.json")
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    dtypes = {"default": dtype, "vae": torch.float32, "unet": torch.float32 if args.full_unet else dtype}
    try:
        config = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **source)
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        pipe = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, variant=args.variant, torch_dtype=dtypes, **source, **unchecked
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {args.pretrained_model_name_or_path}: {first_line(error)}") from error
    if not hasattr(pipe, "unet"):
        raise UserError(f"{type(pipe).__name__} has no U-Net: SD 1.x, SD 2.x and SDXL can be trained")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # as the paper samples
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepare_unet(
    unet: UNet2DConditionModel, args: argparse.Namespace, dtype: torch.dtype
) -> UNet2DConditionModel | None:
    """Makes the policy trainable, in fp32 under every precision; returns the frozen copy that --full_unet needs."""
    frozen = None
    if args.full_unet:
        frozen = copy.deepcopy(unet).to(dtype)
        unet.requires_grad_(True)
    else:
        from peft import LoraConfig

        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=ATTENTION_LAYERS,
        )
        unet.add_adapter(config)
        for weight in trainable(unet).values():
            weight.data = weight.data.float()
    for model in filter(None, (unet, frozen)):
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.enable_xformers_memory_efficient_attention:
            model.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    return frozen


def trainable(unet: torch.nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name."""
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


@contextlib.contextmanager
def reference(run: Run) -> Iterator[UNet2DConditionModel]:
    """The frozen model that the policy is measured against: the copy, or the policy itself with its adapters off."""
    if run.frozen is not None:
        yield run.frozen
        return
    run.unet.disable_adapters()
    try:
        yield run.unet
    finally:
        run.unet.enable_adapters()


def predict(unet: torch.nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The U-Net's output for x_t (B, C, h, w); SDXL gets its pooled text and the size of the image as well."""
    added = None
    if "pooled_prompt_embeds" in text:
        added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": text["time_ids"]}
    return unet(x_t, t, encoder_hidden_states=text["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]


# ---- Training step --------------------------------------------------------------------------------------------------


def noise_schedule(pipe: DiffusionPipeline, device: torch.device) -> Schedule:
    """alpha_bar of every timestep and what the model predicts, from its own scheduler; refuses other predictions."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    alpha_bar = scheduler.alphas_cumprod.to(device)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"prediction type {prediction_type!r} of the scheduler is not epsilon, v_prediction or sample")
    return Schedule(alpha_bar, before, prediction_type)


def training_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The docstring's formula on one batch: loss () and METRICS, () each."""
    args, schedule = run.args, run.schedule
    t, noise = batch.t.repeat(2), batch.noise.repeat(2, 1, 1, 1)
    text = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in batch.text.items()}
    alpha_bar = schedule.alpha_bar[t]
    x_t = add_noise(batch.x_0, noise, alpha_bar)
    target = training_target(batch.x_0, noise, alpha_bar, schedule.prediction_type)
    if args.channels_last:
        x_t = x_t.contiguous(memory_format=torch.channels_last)

    with torch.no_grad(), reference(run) as ref:
        ref_prediction = predict(ref, x_t, t, text)
    prediction = predict(run.policy, x_t, t, text)

    err_w, err_l = image_error(prediction, target).chunk(2)
    ref_err_w, ref_err_l = image_error(ref_prediction, target).chunk(2)
    dpo, margin = dpo_loss(err_w, err_l, ref_err_w, ref_err_l, args.beta_dpo, args.loss_type, args.label_smoothing)

    x_t_w, alpha_bar_w = x_t.chunk(2)[0], alpha_bar.chunk(2)[0]
    x0_w = predict_x0(prediction.chunk(2)[0], x_t_w, alpha_bar_w, schedule.prediction_type)
    ref_x0_w = predict_x0(ref_prediction.chunk(2)[0], x_t_w, alpha_bar_w, schedule.prediction_type)
    stat = statistics_matching_loss(x0_w, ref_x0_w, alpha_bar_w, schedule.alpha_bar_prev[batch.t])

    loss = dpo + args.lambda_stat * stat
    metrics = {
        "loss": loss,
        "loss/dpo": dpo,
        "loss/statistics": args.lambda_stat * stat,
        "error/winner": err_w.mean(),
        "error/loser": err_l.mean(),
        "error/winner_over_reference": (err_w - ref_err_w).mean(),
        "error/loser_over_reference": (err_l - ref_err_l).mean(),
        "rewards/margins": args.beta_dpo * margin.mean(),
        "rewards/accuracies": (margin > 0).float().mean(),
        "dpo_weight": torch.sigmoid(-args.beta_dpo * margin).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def optimisation_step(run: Run, step: int) -> Tensor:
    """Updates the weights from --gradient_accumulation_steps micro-batches; METRICS and the gradient's norm."""
    args, accelerator, pairs = run.args, run.accelerator, run.pairs["train"]
    total = torch.zeros(len(METRICS), device=accelerator.device)
    for micro_step in range(args.gradient_accumulation_steps):
        where = positions(step, micro_step, accelerator.process_index, args, accelerator.num_processes)
        noise, t = draw(args.seed, "train", where, pairs.latents.shape[2:], len(run.schedule.alpha_bar))
        batch = make_batch(pairs, rows_at(args.seed, where, len(pairs.latents)), noise, t, accelerator.device)
        with accelerator.accumulate(run.policy):
            with accelerator.autocast():
                loss, metrics = training_loss(run, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trainable(run.unet).values(), args.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        total += torch.stack(list(metrics.values()))
    run.lr_scheduler.step()
    return torch.cat([total / args.gradient_accumulation_steps, norm.reshape(1)])


# ---- Validation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_metrics(run: Run) -> dict[str, float]:
    """The mean of METRICS over the held-out pairs, at evenly spaced timesteps and with the same noise every time."""
    if "validation" not in run.pairs:
        return {}
    args, accelerator, pairs = run.args, run.accelerator, run.pairs["validation"]
    run = run._replace(policy=run.unet)  # no gradients to share between processes
    num_timesteps, draws = len(run.schedule.alpha_bar), args.validation_draws
    total = torch.zeros(len(METRICS), device=accelerator.device)
    count, size = draws * len(pairs.latents), args.train_batch_size
    for start in range(accelerator.process_index * size, count, accelerator.num_processes * size):
        where = range(start, min(start + size, count))
        noise, _ = draw(args.seed, "validation", where, pairs.latents.shape[2:], num_timesteps)
        t = torch.tensor([(2 * (position % draws) + 1) * num_timesteps // (2 * draws) for position in where])
        batch = make_batch(pairs, [position // draws for position in where], noise, t, accelerator.device)
        with accelerator.autocast():
            _, metrics = training_loss(run, batch)
        total += len(where) * torch.stack(list(metrics.values()))
    means = (accelerator.reduce(total, "sum") / count).tolist()
    return {f"validation/{name}": value for name, value in zip(METRICS, means, strict=True)}


def validation_prompts(splits: dict[str, Split], args: argparse.Namespace) -> list[str]:
    """--validation_prompts, or the first distinct captions of the validation split (without one: of training)."""
    if args.validation_prompts:
        return args.validation_prompts
    rows = splits.get("validation", splits["train"]).rows
    return list(dict.fromkeys(rows["caption"][:]))[: args.num_validation_images]


@torch.no_grad()
def draw_images(
    run: Run, unet: UNet2DConditionModel, prompts: list[str], text: dict[str, Tensor]
) -> list[Image.Image]:
    """One image for each prompt by `unet`; prompt and seed decide the noise, so that models can be compared."""
    args, pipe = run.args, run.pipe
    pipe.unet = unet
    with run.accelerator.autocast():
        latents = pipe(
            **text,
            generator=[torch.Generator().manual_seed(image_seed(args.seed, prompt, 0)) for prompt in prompts],
            height=args.height,
            width=args.width,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            output_type="latent",
        ).images
    # one by one and in fp32: SDXL's VAE overflows in fp16
    decoded = [pipe.vae.decode(x_0[None].float() / pipe.vae.config.scaling_factor).sample for x_0 in latents]
    return [pipe.image_processor.postprocess(pixels)[0] for pixels in decoded]


def sampling_text(
    pipe: DiffusionPipeline, rows: list[int], empty: int, embeddings: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The pipeline's arguments for the captions in `rows` against the empty caption in row `empty`."""
    text = {}
    for name, value in embeddings.items():
        negative = value[[empty] * len(rows)]
        if pipe.config.get("force_zeros_for_empty_prompt"):
            negative = torch.zeros_like(negative)
        text |= {name: value[rows].to(pipe.device), f"negative_{name}": negative.to(pipe.device)}
    return text


def validation_picture(base: list[Image.Image], tuned: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Base model above, tuned model below, one column for each prompt, its caption underneath."""
    width = 224
    height = round(width * base[0].height / base[0].width)
    gap, gutter, font, bold = 12, 84, ImageFont.load_default(15), ImageFont.load_default(19)
    captions = [textwrap.fill(prompt, 31, max_lines=5, placeholder=" ...") for prompt in prompts]
    lines = 1 + max(caption.count("\n") for caption in captions)
    size = (gutter + len(prompts) * (width + gap), gap + 2 * (height + gap) + 20 * lines + gap)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for row, (label, images) in enumerate((("base", base), ("tuned", tuned))):
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


# ---- Checkpoints and output -----------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """What a library's error says, without its stack of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hash_of(*parts: Any) -> str:
    """A short name for the settings or texts that a cached file depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run_identity(args: argparse.Namespace, splits: dict[str, Split], accelerator: Accelerator) -> dict[str, Any]:
    """The settings that decide the weights of each step; two runs with equal ones may carry on from one another."""
    identity = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps
    identity["pairs_per_step"] = pairs_per_step(args, accelerator)
    identity["mixed_precision"] = accelerator.mixed_precision
    identity["data"] = {name: split.rows._fingerprint for name, split in splits.items()}
    return json.loads(json.dumps(identity))


def checkpoints(output_dir: str) -> list[Path]:
    """The complete checkpoints, first to last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def claim_output(args: argparse.Namespace) -> None:
    """Refuses the folder of another run, unless it is asked for."""
    output = Path(args.output_dir)
    if (output / "training_settings.json").is_file() and not (args.overwrite or args.resume_from_checkpoint):
        raise UserError(
            f"{output} holds a run already: carry on with --resume_from_checkpoint latest, start anew with "
            "--overwrite, or name another --output_dir"
        )


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
        doomed = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def save_checkpoint(
    step: int, unet: torch.nn.Module, state: dict[str, Any], identity: dict[str, Any], args: argparse.Namespace
) -> None:
    """Writes checkpoint-STEP under a temporary name, renames it, and keeps the newest --checkpoints_total_limit."""
    from safetensors.torch import save_file

    folder = Path(args.output_dir, f"checkpoint-{step}")
    discard(folder)
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in trainable(unet).items()}
    save_file(weights, unfinished / "model.safetensors")
    states = {name: part.state_dict() for name, part in state.items() if part is not None}
    torch.save({"step": step, **states}, unfinished / "state.pt")
    (unfinished / "run.json").write_text(json.dumps(identity, indent=2))
    unfinished.rename(folder)
    if args.checkpoints_total_limit is not None:
        others = [path for path in checkpoints(args.output_dir) if path != folder]
        for path in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
            discard(path)


def load_checkpoint(folder: Path, unet: torch.nn.Module, state: dict[str, Any]) -> int:
    """Puts weights and state back into the very tensors that the optimiser holds; returns the number of steps done."""
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{folder} cannot be read ({first_line(error)}): name an earlier checkpoint") from error
    with torch.no_grad():
        for name, weight in trainable(unet).items():
            weight.copy_(weights[name])
    for name, part in state.items():
        if part is not None:
            part.load_state_dict(saved[name])
    return saved["step"]


def save_weights(pipe: DiffusionPipeline, unet: UNet2DConditionModel, args: argparse.Namespace) -> None:
    """Writes what `pipeline.load_lora_weights` or, in unet/, `UNet2DConditionModel.from_pretrained` loads."""
    if args.full_unet:
        unet.save_pretrained(Path(args.output_dir, "unet"))
        return
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe.save_lora_weights(
        args.output_dir,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def write_model_card(run: Run, summary: dict[str, str], metrics: dict[str, float]) -> None:
    """README.md: base model, loading snippet, picture, data, metrics and settings."""
    args, name, mixed_precision = run.args, type(run.pipe).__name__, run.accelerator.mixed_precision
    kind = "U-Net" if args.full_unet else "LoRA"
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(mixed_precision, "float32")
    model, lora = f'"{args.pretrained_model_name_or_path}", torch_dtype=torch.{dtype}', f'"{args.output_dir}"'
    load = f"pipe = {name}.from_pretrained({model})\npipe.load_lora_weights({lora})"
    if args.full_unet:
        load = f'unet = UNet2DConditionModel.from_pretrained({lora}, subfolder="unet", torch_dtype=torch.{dtype})\n'
        load += f"pipe = {name}.from_pretrained({model}, unet=unet)"
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
import torch
from diffusers import {"UNet2DConditionModel, " if args.full_unet else ""}{name}

{load}
```

![base model above, tuned model below, same prompts and noise](validation.png)

{tables}
"""
    Path(args.output_dir, "README.md").write_text(card)


def forget_metrics_after(step: int, output_dir: str) -> None:
    """A resumed run writes the lines after its checkpoint again."""
    path = Path(output_dir, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))


# ---- Main -----------------------------------------------------------------------------------------------------------


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's Accelerator with the precision, accumulation and tracker asked for."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed

    tracker = args.report_to
    if tracker == "auto":
        tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    set_seed(args.seed)  # the adapters start the same on every process; all other draws have their own seeds
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, "logs"))),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )


def prepare_pairs(
    splits: dict[str, Split],
    prompts: list[str],
    pipe: DiffusionPipeline,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> tuple[dict[str, Pairs], dict[str, Tensor]]:
    """Every split as Pairs, and the pipeline's text arguments for the validation prompts."""
    latents = prepare_latents(splits, pipe, args, accelerator)
    captions = {name: split.rows["caption"][:] for name, split in splits.items()}
    distinct = sorted({"", *prompts, *(caption for column in captions.values() for caption in column)})
    row_of = {caption: row for row, caption in enumerate(distinct)}
    embeddings = prepare_captions(distinct, pipe, args, accelerator)
    time_ids = torch.tensor([args.height, args.width, 0, 0, args.height, args.width])
    pairs = {
        name: Pairs(latents[name], torch.tensor([row_of[caption] for caption in captions[name]]), embeddings, time_ids)
        for name in splits
    }
    return pairs, sampling_text(pipe, [row_of[prompt] for prompt in prompts], row_of[""], embeddings)


def make_optimizer(parameters: list[Tensor], args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, or with --use_8bit_adam bitsandbytes' AdamW8bit."""
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


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


def pairs_per_step(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """The effective batch: pairs that one update of the weights sees, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def summarise(run: Run, splits: dict[str, Split], first_step: int) -> dict[str, str]:
    """Prints and returns what is about to be trained, on what, how."""
    args, accelerator = run.args, run.accelerator
    counts = {name: len(split.rows) for name, split in splits.items()}
    ties = sum(split.num_ties for split in splits.values())
    weights = sum(weight.numel() for weight in trainable(run.unet).values())
    batch = pairs_per_step(args, accelerator)
    kind = "U-Net" if args.full_unet else f"LoRA of rank {args.rank}"
    summary = {
        "pairs": f"{counts['train']} to train on, {counts.get('validation', 0)} held out, {ties} ties left out",
        "trained": f"{kind}, {weights:,} parameters in fp32; mixed precision: {accelerator.mixed_precision}",
        "loss": f"{args.loss_type}, beta * margin with beta = {args.beta_dpo:g} (where code has 0.5 * beta * margin: "
        f"beta = {2 * args.beta_dpo:g}) + {args.lambda_stat:g} * statistics matching",
        "batch": f"{args.train_batch_size} pairs x {args.gradient_accumulation_steps} accumulated "
        f"x {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} = {batch} pairs a step",
        "steps": f"{args.max_train_steps}, {args.max_train_steps * batch / counts['train']:.1f} epochs"
        + (f"; carries on after step {first_step}" if args.resume_from_checkpoint else ""),
    }
    for name, value in summary.items():
        accelerator.print(f"{name + ':':9}{value}")
    return summary


def start_output(args: argparse.Namespace, first_step: int) -> None:
    """Marks the folder as this run's; forgets what an earlier run, or this one after its checkpoint, left there."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        for path in (*checkpoints(args.output_dir), output / "unet", output / "logs"):
            discard(path)
        for name in ("pytorch_lora_weights.safetensors", "README.md", "validation.png"):
            (output / name).unlink(missing_ok=True)
    for unfinished in output.glob("*.partial"):
        shutil.rmtree(unfinished)
    forget_metrics_after(first_step, args.output_dir)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
    settings = {"settings": vars(args), "versions": versions}
    (output / "training_settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def log(run: Run, step: int, values: dict[str, float]) -> None:
    """To the trackers and to metrics.jsonl."""
    run.accelerator.log(values, step=step)
    if run.accelerator.is_main_process:
        with Path(run.args.output_dir, "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def draw_validation(run: Run, step: int, prompts: list[str], text: dict[str, Tensor], base: list[Image.Image]) -> None:
    """Writes validation.png; `base` keeps the base model's images from the first time on."""
    if not base:
        with reference(run) as ref:
            base += draw_images(run, ref, prompts, text)
    picture = validation_picture(base, draw_images(run, run.unet, prompts, text), prompts)
    picture.save(Path(run.args.output_dir, "validation.png"))
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [picture]}, step=step)


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
    done = f"memory:  {peak_memory()}\ndone:    {args.output_dir}{told}"
    return f"{done}\nnext:    python eval_human.py{named} --models base dpo={args.output_dir}"


def train(run: Run, first_step: int, at_step: Callable[[int], dict[str, float]]) -> dict[str, float]:
    """The loop. `at_step(step)` saves and validates when it is time to; returns the last value of every metric."""
    args, accelerator = run.args, run.accelerator
    latest, window, num_steps, seconds = {}, 0, 0, 0.0
    steps = range(first_step + 1, args.max_train_steps + 1)
    show = {"initial": first_step, "total": args.max_train_steps, "disable": not accelerator.is_main_process}
    bar = tqdm(steps, desc="training", unit="step", **show)
    for step in bar:
        began, learning_rate = time.perf_counter(), run.lr_scheduler.get_last_lr()[0]
        window, num_steps = window + optimisation_step(run, step - 1), num_steps + 1
        log_now = step % args.logging_steps == 0 or step == args.max_train_steps
        if log_now:
            means = (accelerator.reduce(window, "mean") / num_steps).tolist()
        seconds += time.perf_counter() - began
        if log_now:
            values = dict(zip((*METRICS, "grad_norm"), means, strict=True))
            if not math.isfinite(values["loss"]):
                raise UserError(f"the loss is no longer finite at step {step}: lower --learning_rate, or try bf16")
            values |= {
                "lr": learning_rate,
                "pairs_per_second": num_steps * pairs_per_step(args, accelerator) / seconds,
            }
            log(run, step, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", accuracy=f"{values['rewards/accuracies']:.2f}")
            latest, window, num_steps, seconds = latest | values, 0, 0, 0.0
        latest |= at_step(step)
    return latest


def main(args: argparse.Namespace) -> None:
    """Loads data and model, trains, validates, and writes the weights."""
    quiet_libraries()
    claim_output(args)
    accelerator = start_accelerator(args)
    with accelerator.main_process_first():
        splits = load_splits(args)
    identity = run_identity(args, splits, accelerator)
    checkpoint = find_checkpoint(args, identity)

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_model(args, dtype).to(accelerator.device)
    schedule = noise_schedule(pipe, accelerator.device)
    prompts = validation_prompts(splits, args)
    pairs, prompt_text = prepare_pairs(splits, prompts, pipe, args, accelerator)

    unet, frozen = pipe.unet, prepare_unet(pipe.unet, args, dtype)
    optimizer = make_optimizer(list(trainable(unet).values()), args)
    lr_scheduler = make_lr_scheduler(optimizer, args)
    policy, optimizer = accelerator.prepare(unet, optimizer)
    run = Run(args, accelerator, pipe, policy, unet, frozen, schedule, pairs, optimizer, lr_scheduler)
    state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "scaler": accelerator.scaler}
    first_step = load_checkpoint(checkpoint, unet, state) if checkpoint else 0

    summary = summarise(run, splits, first_step)
    if accelerator.is_main_process:
        start_output(args, first_step)
    accelerator.init_trackers("train_dpo_human", {name: str(value) for name, value in vars(args).items()})
    base_images: list[Image.Image] = []

    def at_step(step: int) -> dict[str, float]:
        is_last, metrics = step == args.max_train_steps, {}
        if step % args.checkpointing_steps == 0 and accelerator.is_main_process:
            save_checkpoint(step, unet, state, identity, args)
        if step % args.validation_steps == 0 or is_last:
            metrics = held_out_metrics(run)
            log(run, step, metrics)
            if accelerator.is_main_process:
                draw_validation(run, step, prompts, prompt_text, base_images)
        return metrics

    latest = train(run, first_step, at_step)
    if accelerator.is_main_process:
        save_weights(pipe, unet, args)
        write_model_card(run, summary, latest)
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
    flag("--full_unet", action="store_true", help="train the whole U-Net against a frozen copy, instead of a LoRA")
    flag("--rank", type=count, default=8, help="rank of the LoRA on all attention layers")
    flag("--lora_alpha", type=positive, help="scale of the LoRA; none: the rank")

    flag = parser.add_argument_group("data").add_argument
    flag("--train_data_dir", default="human-preferences", help="folder of pairs by make_preference_data.py")
    flag("--dataset_name", help="data set with Pick-a-Pic's columns, instead of --train_data_dir")
    flag("--dataset_split_name", default="train", help="its split to train on")
    flag("--max_train_samples", type=count, help="use the first so many rows")
    flag("--resolution", type=count, default=512, help="height and width; images are resized and cropped to it")
    flag("--height", type=count, help="height, where it is not --resolution")
    flag("--width", type=count, help="width, where it is not --resolution")

    flag = parser.add_argument_group("objective").add_argument
    flag("--beta_dpo", type=positive, default=2500, help="beta * margin; half of it where code has 0.5 * beta")
    flag("--loss_type", choices=["sigmoid", "hinge", "ipo"], default="sigmoid", help="sigmoid is DPO")
    flag("--label_smoothing", type=float, default=0.0, help="share of labels thought to be wrong")
    flag("--lambda_stat", type=at_least(0, float), default=10000, help="weight of statistics matching, 0 for none")

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--max_train_steps", type=count, default=2000, help="updates of the weights; the paper: 300000")
    flag("--train_batch_size", type=count, default=16, help="pairs in a process's forward pass")
    flag("--gradient_accumulation_steps", type=count, default=1, help="forward passes in an update")
    flag("--learning_rate", type=positive, default=1e-5, help="peak learning rate")
    flag("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="how it changes over the steps")
    flag("--lr_warmup_steps", type=at_least(0, int), default=0, help="steps of linear warm-up, under every schedule")
    flag("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW, a quarter of the optimiser's memory")
    flag("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    flag("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    flag("--adam_weight_decay", type=at_least(0, float), default=1e-2, help="weight decay")
    flag("--adam_epsilon", type=float, default=1e-8, help="epsilon of Adam")
    flag("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    flag("--seed", type=int, default=0, help="decides order, noise, timesteps and the LoRA's start")

    flag = parser.add_argument_group("memory and precision").add_argument
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="none: what `accelerate config` says")
    flag("--gradient_checkpointing", action="store_true", help="less memory, slower steps")
    flag("--enable_xformers_memory_efficient_attention", action="store_true", help="needs CUDA")
    flag("--channels_last", action=argparse.BooleanOptionalAction, default=True, help="memory layout of the U-Net")

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
    flag("--logging_steps", type=count, default=10, help="steps that logged metrics are averaged over")
    flag("--report_to", default="auto", help="a tracker of accelerate's, none, or auto: tensorboard if installed")
    # fmt: on

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        use_embedded_world(parser, "train_dpo_human")
        args = parser.parse_args(argv)
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    args.lora_alpha = args.lora_alpha or args.rank
    if args.dataset_name is not None:
        args.train_data_dir = None
    refuse_impossible(parser, args)
    return args


def refuse_impossible(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Combinations that cannot work are told before anything is loaded."""
    if not 0 <= args.label_smoothing < 0.5:
        parser.error("--label_smoothing must lie in [0, 0.5)")
    if args.label_smoothing and args.loss_type != "sigmoid":
        parser.error("--label_smoothing needs --loss_type sigmoid")
    if args.height % 8 or args.width % 8:
        parser.error("--resolution, --height and --width must be multiples of 8")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision fp16 needs a GPU")
    if args.enable_xformers_memory_efficient_attention and not torch.cuda.is_available():
        parser.error("--enable_xformers_memory_efficient_attention needs CUDA")
    if args.overwrite and args.resume_from_checkpoint:
        parser.error("--overwrite starts anew, --resume_from_checkpoint carries on: set one")


def cli(argv: list[str] | None = None) -> None:
    """main, with a user's error as one line and status 1."""
    try:
        main(parse_args(argv))
    except UserError as error:
        sys.exit(f"train_dpo_human.py: {error}")


if __name__ == "__main__":
    cli()
