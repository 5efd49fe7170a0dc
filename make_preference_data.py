# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14",
#     "diffusers>=0.36,<0.43",
#     "transformers>=4.57,<5.24",
#     "accelerate>=1.8,<1.16",
#     "safetensors>=0.5,<0.9",
#     "pillow>=10.1,<14",
#     "numpy>=1.26,<3",
#     "tqdm>=4.66,<5",
#     "pyarrow>=16,<27",
#     "datasets>=4,<5.3",
# ]
# ///
"""Makes DPO preference pairs from your own text-to-image model, with AI feedback instead of human labels.

HG-DPO (https://arxiv.org/abs/2405.20216). The Easy stage: for every prompt c, a pool of N = 24 images,

    d_i  = sample(model, c, seed_i, few steps)     drafts; seed_i = image_seed(seed, c, i), i = 0 .. N-1
    f    = finalists(score(d_0) .. score(d_N-1))   the two best and the two worst drafts
    x_i  = sample(model, c, seed_i, all steps)     for i in f alone, from the same noise
    pair = best_and_worst(score(x_f))              the winner and the loser; ties and non-finite scores are left out

score = ensemble(score_1, score_2, ...): PickScore by default, any number of scorers. The later stages, with a real
photo of each prompt and the pairs of the stage before:

    x_t    = sd_recon(model, photo, t)             the photo noised up to timestep t and denoised again
    Normal = best of x_400 .. x_700 against the Easy winner, where it scores at least as high
    Hard   = x_100, about the photo itself, against the Normal winner

    prompts, model --sample, score--> pool/ --best_and_worst--> data/ --> train_dpo_human.py

Without arguments it runs on the embedded world (tests/tiny_human) in minutes on a CPU. The usual command:

    accelerate launch make_preference_data.py --pretrained_model_name_or_path YOUR_MODEL --prompts captions.txt \\
        --height 1024 --width 704 --output_dir human-preferences

The output is read by `datasets.load_dataset(folder)`, train_dpo_human.py and every script that reads Pick-a-Pic v2.
A start in the same folder carries on where the last one ended. An image is a function of (model, prompt, seed),
whatever the batch size and the number of processes.

Differences from the paper:
1. Drafts: 24 drafts of 5 steps and 4 images of 20 cost a fifth of 20 images of 50 steps, with as large a score gap. A
   deterministic sampler orders drafts nearly as it orders full images. `--draft_steps 0` draws all of them in full.
2. Images are padded to a square before CLIP sees them; the published crop would cut heads and feet off a portrait.
3. Several scorers can vote, each in units of its own spread within a prompt; one with weight 0 only vetoes.
4. A seeded coin decides which side is jpg_0, and the latents of the sampler are kept, so that training needs no VAE.
5. SDRecon uses the pool's sampler, its strides and guidance (the paper does not say); photos are cut to the size.
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
import random
import re
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import lru_cache, partial
from importlib import metadata
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm


if TYPE_CHECKING:  # the large libraries are imported where they are used, so that a mistyped flag is told at once
    from accelerate import PartialState
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

SCRIPT = "make_preference_data"
WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
SHARD_IMAGES = 160  # a shard holds about as many images; at most so many are made again after a crash

# What a folder's images and pairs depend on; a start with other settings in the same folder is refused.
MODEL_SETTINGS = ["pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "sampler", "seed"]
STAGE_SETTINGS = ["stage", "real_data_dir", "previous_pairs", "sdrecon_timesteps"]
IMAGE_SETTINGS = ["height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "no_latents"]
IMAGE_SETTINGS += ["num_images_per_prompt", "draft_steps", "discard_drafts"]
POOL_SETTINGS = [*MODEL_SETTINGS, *STAGE_SETTINGS, *IMAGE_SETTINGS]
PAIR_SETTINGS = ["scorer", "agree", "finalists", "min_margin", "validation_share"]
CHOICE_SETTINGS = [*PAIR_SETTINGS, "drafts_chosen_by"]  # what --rescore may change

SCORER_HELP = (
    "pickscore, clip, hpsv2, aesthetic, imagereward, clip_iqa, clip_iqa_sharpness, people, people_count, people_pose, "
    "people_limbs, vqa, safety, module:function, file.py:function or file.jsonl; with several, a weighted vote in "
    "units of each one's spread"
)

PROMPTS_HELP = (
    "text file with one prompt per line, .jsonl, .json, .csv, .tsv, .parquet, folder of photos with captions, "
    "folder or hub name (owner/name[:split]) that datasets reads"
)


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method -----------------------------------------------------------------------------------------------------


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


def finalists(draft_scores: Sequence[float], per_side: int) -> list[int]:
    """The indices, ascending, of the best and the worst `per_side` drafts: those that are worth drawing in full.

    nan joins neither side; -inf may be among the worst, never among the best.
    """
    scores = np.asarray(draft_scores, dtype=np.float64)
    order = [int(i) for i in np.argsort(scores, kind="stable") if np.isfinite(scores[i]) or np.isneginf(scores[i])]
    best = [i for i in order if np.isfinite(scores[i])][-per_side:]
    return sorted({*order[:per_side], *best})


def sd_recon_latents(x_0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """z_t = sqrt(abar_t) E(x_real) + sqrt(1 - abar_t) n: where SDRecon begins to denoise. x_0, noise: (B, C, H, W)."""
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def sd_recon_timesteps(t: int, num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """From t down to 0 in strides as long as those of a full run of `num_inference_steps`."""
    count = max(1, round(num_inference_steps * t / num_train_timesteps))
    return [round(t * (count - i) / count) for i in range(count)]


def pooled_spread(scores: Iterable[np.ndarray]) -> float:
    """A scorer's standard deviation within a prompt, pooled over the prompts; `scores`: each prompt's, (N,)."""
    finite = (one[np.isfinite(one)] for one in scores)
    variances = [one.var(ddof=1) for one in finite if len(one) > 1]
    return math.sqrt(np.mean(variances)) if variances else 0.0


def ensemble(scores: dict[str, np.ndarray], weights: dict[str, float], spreads: dict[str, float]) -> np.ndarray:
    """The weighted sum of the scorers' scores, each in units of its `pooled_spread`. All of one shape, say (N,).

    Raw sums would mix scales (PickScore is about 20, others about 1); a global z-score mostly measures how hard a
    prompt is. A single voting scorer keeps its own units. A scorer of weight 0 only vetoes: any scorer's -inf makes
    the sum -inf. An image to which any scorer gives nan or +inf gets nan.
    """
    stacked = np.stack([scores[name] for name in weights])
    voting = [name for name, weight in weights.items() if weight != 0]
    total = np.zeros(stacked.shape[1:])
    for name in voting:
        spread = spreads[name] if len(voting) > 1 else 1.0
        total += weights[name] * np.ma.masked_invalid(scores[name]).filled(0.0) / (spread or 1.0)
    total[np.isneginf(stacked).any(axis=0)] = -np.inf
    total[(np.isnan(stacked) | np.isposinf(stacked)).any(axis=0)] = np.nan
    return total


def best_and_worst(scores: Sequence[float]) -> tuple[tuple[int, int] | None, str]:
    """Easy: the indices (winner, loser) of the best and the worst of a prompt's scores; or None, and the reason why.

    nan is used for neither side; -inf may lose but never win; a gap of 0 is a tie.
    """
    scores = np.asarray(scores, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(scores) | np.isneginf(scores))
    winners = usable[np.isfinite(scores[usable])]
    if len(winners) == 0:
        return None, "no image with a finite score"
    if len(usable) < 2:
        return None, "only one image with a score"
    best, worst = winners[scores[winners].argmax()], usable[scores[usable].argmin()]
    if scores[best] == scores[worst]:
        return None, "all scores equal"
    return (int(best), int(worst)), "kept"


def best_against_previous(
    scores: Sequence[float], previous: int, must_win: bool
) -> tuple[tuple[int, int] | None, str]:
    """Normal and Hard: the best of the photo's images against the previous stage's winner, the image `previous`.

    Normal keeps the prompts where it scores at least as high (`must_win`), Hard all of them.
    """
    scores = np.asarray(scores, dtype=np.float64)
    ours = np.where(np.isfinite(scores), scores, -np.inf)
    ours[previous] = -np.inf
    best = int(ours.argmax())
    if np.isneginf(ours[best]):
        return None, "no image with a finite score"
    if np.isnan(scores[previous]):
        return None, "the previous winner has no score"
    if must_win and scores[best] < scores[previous]:
        return None, "worse than the previous winner"
    return (best, previous), "kept"


def unit_hash(seed: int, prompt: str, purpose: str) -> float:
    """A prompt's number in [0, 1): the coin that says which side is jpg_0, the lot that says which split it joins."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{purpose}".encode()).digest()[:6], "big") / 2**48


# ---- Sampling -------------------------------------------------------------------------------------------------------


OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@torch.inference_mode()
def sample(
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
    """Draws an image for every prompt `rows[i]` of `embeds` (see encode_prompts) with the seed `seeds[i]`.

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


@contextlib.contextmanager
def drafting(pipe: DiffusionPipeline) -> Iterator[None]:
    """Within the block `pipe` samples with UniPC (https://arxiv.org/abs/2302.04867), good in few steps.

    A deterministic sampler solves the same equation from the same noise, so a draft foretells the full image of any.
    """
    from diffusers import UniPCMultistepScheduler

    full = pipe.scheduler
    own = dict.fromkeys(OWN_SIGMAS, False)
    pipe.scheduler = UniPCMultistepScheduler.from_config(full.config, timestep_spacing="trailing", **own)
    try:
        yield
    finally:
        pipe.scheduler = full


def draws_fresh_noise(scheduler: Any) -> bool:
    """Whether a step of the sampler draws noise (ancestral ones, DDPM, LCM): then a draft foretells nothing."""
    sample, prediction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outcomes = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            one = type(scheduler).from_config(scheduler.config)
            one.set_timesteps(4)
            x_t = sample
            for t in one.timesteps[:2]:  # of two steps: some draw only at every second
                x_t = one.step(prediction, t, x_t).prev_sample
            outcomes.append(x_t)
    return not torch.equal(*outcomes)


@torch.inference_mode()
def sd_recon(
    pipe: DiffusionPipeline,
    embeds: dict[str, torch.Tensor],
    rows: Sequence[int],
    seeds: Sequence[int],
    photos: list[Image.Image],
    t: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> tuple[list[Image.Image], torch.Tensor]:
    """Photos, noised up to timestep t and denoised again by the model: SDRecon of the paper. As `sample` otherwise.

    A small t keeps the photo, a large one leaves its composition; 0 < t < 1000.
    """
    x_0 = encode(pipe, photos)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators]).to(x_0.device)
    z_t = sd_recon_latents(x_0, noise, pipe.scheduler.alphas_cumprod[t]).to(pipe.unet.dtype)
    timesteps = sd_recon_timesteps(t, num_inference_steps, pipe.scheduler.config.num_train_timesteps)
    width, height = photos[0].size
    return sample(pipe, embeds, rows, seeds, timesteps, guidance_scale, height, width, z_t)


@torch.inference_mode()
def encode(pipe: DiffusionPipeline, images: list[Image.Image]) -> torch.Tensor:
    """Images of one size to scaled latents (B, C, H, W), the mean of the VAE's distribution; in fp32, one by one."""
    pixels = pipe.image_processor.preprocess(images).to(pipe.vae.device, torch.float32).split(1)
    return torch.cat([pipe.vae.encode(one).latent_dist.mode() for one in pixels]) * pipe.vae.config.scaling_factor


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


# ---- Scorers --------------------------------------------------------------------------------------------------------
# A scorer is a function factory(device, **options) -> score(images, prompts) -> one float per image, higher is better.
# -inf may lose but never win; nan is used for neither side. Your own: module:factory or path/to/file.py:factory; or
# file.jsonl, with scores made elsewhere. No score needs torchvision.

Score = Callable[[list[Image.Image], list[str]], list[float]]
Device = torch.device | str


class Scorer(NamedTuple):
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
) -> Score:
    """Are the people there whom the prompt asks for, and can their bodies be read? -inf if not, else 0 to 1.

    A detector (https://arxiv.org/abs/2407.17140) finds persons with a score above 0.5 on at least 2 % of the image;
    ViTPose (https://arxiv.org/abs/2204.12484) gives their 17 COCO keypoints; see rate_people, also for `part`. `count`
    overrides the number that count_people reads in the prompt. It is our heuristic. It sees missing, surplus and
    unreadable people and limbs that are much too long; not fingers, faces, a third arm, or limbs that are too short.
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
        return [rate_people(place, sure, count or count_people(prompt), part) for place, sure, prompt in each]

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


def safety_score(device: Device, model: str = "CompVis/stable-diffusion-safety-checker") -> Score:
    """Stable Diffusion's safety checker as a veto, to be used with weight 0: nan where it flags the image, else 0."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import AutoImageProcessor

    checker = load_weights(StableDiffusionSafetyChecker, model, device)
    to_pixels = AutoImageProcessor.from_pretrained(model, backend="pil")

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        pixels = to_pixels(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        _, flagged = checker(clip_input=pixels.to(device), images=np.zeros((len(images), 1, 1, 3)))
        return [math.nan if one else 0.0 for one in flagged]

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


def file_score(path: str) -> Callable[[Device], Score]:
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
    "safety": safety_score,
}
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


def parse_scorer(spec: str) -> Scorer:
    """Reads `[WEIGHT*]NAME[=MODEL][,option=value...]` and checks all that can be checked without loading weights.

    NAME is one of BUILT_IN_SCORERS, module:function, file.py:function or file.jsonl. An option begins at a comma that
    a word and = follow, so that a question may hold commas. `label` is an option of every scorer.
    """
    label, weight, source, name, options = split_spec(spec)
    weight = 1.0 if weight is None else read_number(float, f"scorer {spec}", weight)
    factory = BUILT_IN_SCORERS.get(name) or find_factory(name)
    options = read_options(name, factory, options)
    load = partial(load_named, source, factory, **options)
    for file in plug_in_files(name):  # other code or other scores under the old name are another scorer
        source += f",sha256={hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    return Scorer(label, weight, source, load)


def parse_scorers(specs: list[str]) -> list[Scorer]:
    """All of --scorer; two scorers of the same label cannot be told apart."""
    scorers = [parse_scorer(spec) for spec in specs]
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


def find_factory(name: str) -> Callable[..., Score]:
    """The scorer of a file.jsonl, or the function that `module:function` or `path/to/file.py:function` names."""
    if name.endswith(".jsonl"):
        return file_score(name)
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
def encode_prompts(pipe: DiffusionPipeline, prompts: list[str], negative_prompt: str) -> dict[str, torch.Tensor]:
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


# ---- Prompts and photos ---------------------------------------------------------------------------------------------


CAPTION_COLUMNS = ("prompt", "caption", "text")
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TABLE_SUFFIXES = {".parquet", ".arrow", ".csv", ".tsv"}
CAPTION_REQUEST = "Describe the person in this photo in one sentence: looks, clothes, pose, hands, place and light."


def read_prompts(source: str, column: str | None, max_prompts: int | None) -> tuple[list[str], str]:
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
            values = read_column(rows, choose_column(column, rows.column_names, source))
        else:
            values = read_file(path, column)
        return [to_text(value, f"{source}, {unit} {number}") for number, value in enumerate(values, 1)], unit
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot read {source}: {reason}") from error


def to_text(value: Any, place: str) -> str:
    """`value` with single spaces, "" for None; UserError with its place where it is no text."""
    if not isinstance(value, str | None):
        raise UserError(f"{place}: a {type(value).__name__} in place of a text")
    try:
        return " ".join((value or "").encode().decode().split())
    except UnicodeEncodeError:
        raise UserError(f"{place}: half a character (a lone surrogate)") from None


def choose_column(column: str | None, columns: Iterable[str], place: str | Path) -> str:
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
        name = choose_column(column, file.schema_arrow.names, path)
        return (value for batch in file.iter_batches(columns=[name]) for value in batch.column(0).to_pylist())
    if kind in {".json", ".jsonl"}:
        rows = read_json(path)
        name = choose_column(column, columns, path) if (columns := dict.fromkeys(chain(*rows))) else ""
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
    index = header.index(choose_column(column, header, f"the first row of {path}"))
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
    photos = find_photos(folder)
    tables = any(path.suffix.lower() in TABLE_SUFFIXES for path in folder.rglob("*"))
    return bool(photos) and (not tables or any(map(read_caption_file, photos)) or any(folder.rglob("metadata.jsonl")))


def find_photos(folder: Path) -> list[Path]:
    """The photos in a folder and the folders in it, by path; hidden ones are no photos."""
    photos = (path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    return sorted(path for path in photos if not any(part[0] == "." for part in path.relative_to(folder).parts))


def find_captions(folder: Path, column: str | None) -> dict[Path, str]:
    """The photos of a folder, by path, with their captions: metadata.jsonl's, else the file's beside it, else ""."""
    told: dict[Path, str] = {}
    for table in folder.rglob("metadata.jsonl"):
        told |= read_metadata(table, column)
    return {photo: told.get(photo) or read_caption_file(photo) for photo in sorted({*find_photos(folder), *told})}


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
    name = choose_column(column, columns, table) if column or not columns.keys().isdisjoint(CAPTION_COLUMNS) else ""
    for number, row in enumerate(rows, 1):
        photo = table.parent / str(row.get("file_name"))
        if row and not photo.is_file():
            raise UserError(f"{table}, line {number}: there is no file {row.get('file_name', '(no file_name)')}")
        if row:
            captions[photo] = to_text(row.get(name), f"{table}, line {number}")
    return captions


def read_caption_file(photo: Path) -> str:
    """The text of the .txt or .caption file beside a photo, "" where there is none."""
    files = [file for file in (photo.with_suffix(".txt"), photo.with_suffix(".caption")) if file.is_file()]
    return next(filter(None, (" ".join("".join(read_lines(file)).split()) for file in files)), "")


def read_photos(source: str, column: str | None) -> tuple[dict[str, Callable[[], Image.Image]], str]:
    """caption -> a function that opens its photo (RGB, upright), as read_prompts has them; and a remark on the rest.

    A folder of photos, or what `datasets` reads with a column of images; of a repeated caption the first photo counts.
    UserError for a source without photos or captions, and from the function for a photo that cannot be read.
    """
    if is_photo_folder(Path(source)):
        found = read_captions(Path(source), column)
        captions, openers = list(found.values()), [partial(open_photo, path, str(path)) for path in found]
    else:
        captions, openers = read_photo_rows(load_rows(source), column, source)
    photos: dict[str, Callable[[], Image.Image]] = {}
    for caption, opener in zip(captions, openers, strict=True):
        if caption:
            photos.setdefault(caption, opener)
    blank = captions.count("")
    left_out = f"{blank} without caption and {len(captions) - blank - len(photos)} of a repeated one left out"
    return photos, f"photos: {len(photos)} of {len(captions)} in {source} ({left_out})"


def read_photo_rows(
    rows: Dataset, column: str | None, source: str
) -> tuple[list[str], list[Callable[[], Image.Image]]]:
    """The captions of all rows, "" where there is none, and the functions that open their photos."""
    import datasets

    image = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(f"{source} has no column of images (it has {', '.join(rows.column_names)})")
    values = read_column(rows, choose_column(column, rows.column_names, source))
    captions = [to_text(value, f"{source}, row {number}") for number, value in enumerate(values, 1)]
    files = rows.cast_column(image, datasets.Image(decode=False))

    def open_row(row: int) -> Image.Image:
        cell = files[row][image] or {"bytes": b""}  # a row without a photo is told as one that cannot be read
        file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        return open_photo(file, f"{source}, row {row + 1}")

    return captions, [partial(open_row, row) for row in range(len(rows))]


def open_photo(file: Path | str | io.BytesIO, name: str) -> Image.Image:
    """The photo in RGB, upright by its EXIF orientation; UserError with its name where it cannot be read."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the photo {name}: {str(error).partition(chr(10))[0]}") from error


def write_captions(
    folder: Path, model: str, device: torch.device | str, batch_size: int, column: str | None = None
) -> None:
    """Writes a .txt beside every photo of the folder that has no caption, in the words of an image-to-text model.

    A start after an interruption carries on. UserError where the model does not load or a photo cannot be read.
    """
    todo = [photo for photo, caption in find_captions(folder, column).items() if not caption]
    if not todo:
        return
    caption = load_captioner(model, device)
    with tqdm(total=len(todo), desc="captions", unit="img", smoothing=0.1) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            texts = caption([open_photo(photo, str(photo)) for photo in batch])
            for photo, text in zip(batch, texts, strict=True):
                replace_file(photo.with_suffix(".txt"), lambda part, text=text: part.write_text(text + "\n", "utf-8"))
            bar.update(len(batch))


def load_captioner(model: str, device: torch.device | str) -> Callable[[list[Image.Image]], list[str]]:
    """The function captions(photos) of an image-to-text model: greedy, at most 60 tokens, bf16 on CUDA, else fp32.

    A model with a chat template is asked CAPTION_REQUEST; others (BLIP, GIT) caption unasked.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        captioner = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        processor = AutoProcessor.from_pretrained(model, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot load the caption model {model}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    request = ""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": CAPTION_REQUEST}]
        request = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        processor.tokenizer.padding_side = "left"  # so that every answer begins where the requests end

    @torch.inference_mode()
    def captions(photos: list[Image.Image]) -> list[str]:
        asked = {"text": [request] * len(photos), "padding": True} if request else {}
        images = [[photo] for photo in photos] if request else photos
        inputs = processor(images=images, return_tensors="pt", **asked).to(device, dtype)
        tokens = captioner.generate(**inputs, do_sample=False, max_new_tokens=60)
        answers = tokens[:, inputs["input_ids"].shape[1] :] if request else tokens
        return [" ".join(text.split()) for text in processor.batch_decode(answers, skip_special_tokens=True)]

    return captions


def too_long(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The indices of the prompts with more tokens, special ones included, than the text encoder reads (75 + 2)."""
    parts = (tokenizer(prompts[start : start + 1000]).input_ids for start in range(0, len(prompts), 1000))
    return [index for index, tokens in enumerate(chain(*parts)) if len(tokens) > tokenizer.model_max_length]


def listed(text: str) -> list[str]:
    """The items of a text that has semicolons or new lines between them."""
    return re.split(r"\s*[;\n]\s*", text.strip())


# A grammar of prompts. A scene is what goes together: places (with a seat after @), light, clothes (a close-up shows
# what stands before "and"), what one person does, what one does with the whole body in view, and what two or three do.
# {c} is a colour; "a" becomes "an" where it has to. Children are in every scene but those with a cast of adults.
SCENES = """
where in a snow-covered park @ on a bench; beside a frozen lake @ on a log; in a snowy village @ on a low wall
  light under a pale winter sky; in low winter sun; in the blue light of dusk; in softly falling snow
  wears a {c} winter coat and boots; a {c} padded jacket and warm trousers; a {c} parka and a woollen hat
  does throwing a snowball; shaping a snowball with both hands; catching snowflakes with open palms; holding an icicle
  does cupping a steaming mug in both hands; pulling up {their} scarf with both hands
  moves shovelling snow; jumping up with both arms raised; pulling a wooden sled by its rope; building a small snowman
  group building a snowman; pulling a wooden sled; throwing snow into the air; walking arm in arm
where in a sunny park @ on a bench; on a seaside promenade @ on a low wall; on a tree-lined square @ on a stone step
  light in bright sunshine; in golden evening light; in soft morning light; under a blue sky
  wears a {c} T-shirt and jeans; a {c} linen shirt and light trousers; a {c} summer dress and sandals
  does eating an ice cream; blowing soap bubbles; holding a bunch of flowers in both hands; opening a paper parasol
  does taking a picture with a small camera; juggling three balls; unwrapping a sandwich; holding a paper windmill
  moves riding a bicycle; skipping with a rope; flying a kite; throwing a frisbee; jumping up with both arms raised
  moves balancing on one leg with outstretched arms; walking a small dog on a lead
  group holding hands; sharing a picnic on a blanket; giving each other a high five; walking and waving
where on a rainy street @ in a bus shelter; on a rainy market square @ under an awning; in a wet park @ in a bandstand
  light under a heavy grey sky; in the glow of street lamps; in soft diffuse light; with puddles all around
  wears a {c} raincoat and rubber boots; a {c} waterproof jacket and jeans; a {c} hooded jacket and dark trousers
  does holding an open umbrella; folding up a wet umbrella; wringing out a wet scarf with both hands
  does pulling up {their} hood with both hands; pointing at the clouds; buttoning up {their} collar with both hands
  moves jumping over a puddle; running with a newspaper held over {their} head; carrying two full shopping bags
  group sharing one large umbrella; jumping into a puddle; looking at a city map; looking up at the rain
where in a bright kitchen @ at the table; in a farmhouse kitchen @ on a wooden chair; in a small bakery @ on a stool
  light in warm lamplight; lit by a large window; in soft daylight; under bright ceiling lamps
  wears a {c} shirt and a white apron; a {c} sweater and jeans; a {c} T-shirt and a striped apron
  does kneading dough with both hands; using a rolling pin; pouring milk from a jug into a glass; peeling an orange
  does whisking eggs in a bowl; decorating a cake with berries; holding a tray of fresh bread rolls; tasting some soup
  moves sweeping the floor with a broom; carrying a large pot in both arms; reaching up for a jar on a high shelf
  group kneading dough; rolling out a pizza; filling jars with jam; sharing a bowl of cherries; drying the dishes
where in a cosy living room @ in an armchair; in a quiet library @ at a desk; in a bookshop @ in a leather armchair
  light in warm lamplight; lit by a tall window; in soft morning light; in late afternoon light
  wears a {c} knitted sweater and jeans; a {c} cardigan and corduroy trousers; a {c} dress and woollen tights
  does turning the pages of a large book; writing in a notebook with a pencil; drawing a picture; folding a letter
  does holding a paperback in one hand; winding a clock; folding a paper plane; holding up an old photograph
  moves carrying a tall stack of books in both arms; reaching up for a book on a high shelf; dusting a globe
  group playing chess; playing cards; bending over a large atlas; reading from one book; doing a jigsaw puzzle
where on a concert stage @ on a chair; in a music room @ on a stool; in a rehearsal room @ on a wooden chair
  light in a warm spotlight; in soft daylight; in coloured light; lit by a row of tall windows
  wears a {c} shirt and black trousers; a {c} blouse and a long skirt; a {c} velvet jacket and dark trousers
  does playing the violin; playing an acoustic guitar; playing the flute; playing the trumpet; playing the ukulele
  does playing the accordion; conducting with a baton; shaking a tambourine; singing with one hand on the microphone
  moves playing the cello; playing the drums; playing the harp; playing the piano; dancing with one arm raised
  group playing violins; playing guitars; clapping in rhythm; singing from one sheet; playing hand drums
where at a running track @ on the grass; in a sports hall @ on a wooden bench; at a basketball court @ on a bench
  light in clear morning light; in bright even light; in late afternoon light; with strong light from one side
  wears a {c} T-shirt and tracksuit trousers; a {c} tracksuit and running shoes; a {c} jersey and training trousers
  does holding a basketball in both hands; stretching both arms overhead; spinning a ball on one finger
  does drinking from a water bottle; lifting a small dumbbell; wiping {their} forehead with a towel; blowing a whistle
  moves throwing a basketball; jumping with arms and legs spread; kicking a ball; sprinting; tying {their} shoelaces
  moves standing on one leg with both palms overhead; doing a lunge with both arms raised
  group giving each other a high five; passing a ball; stretching side by side; running in a row; lifting a trophy
where in a carpenter's workshop @ on a stool; in a tidy garage @ on a crate; in a boatbuilder's shed @ on a trestle
  cast adults
  light in dusty sunlight; under a bright work lamp; in light from an open door; in light from above
  wears a {c} work shirt and a leather apron; a {c} boiler suit and sturdy boots; a {c} work jacket and canvas trousers
  does hammering a nail into a board; tightening a screw with a screwdriver; measuring a board with a tape measure
  does sanding a chair leg; wiping {their} hands on a cloth; putting on a pair of work gloves; pointing at a drawing
  moves carrying a ladder on one shoulder; sawing a plank; drilling a hole into a plank; painting a door with a brush
  group lifting a heavy crate; bending over a plan; carrying a long plank; holding mugs of tea; painting a wooden boat
where in a hotel ballroom @ on a velvet chair; in an opera foyer @ on a marble bench; on a roof terrace @ at a table
  cast adults
  light by candlelight; in the light of chandeliers; in soft golden light; under strings of lamps
  wears a {c} evening dress and long earrings; a {c} suit and a silk scarf; a {c} velvet jacket and a white shirt
  does raising a glass in a toast; holding a bouquet of roses; holding an open fan; straightening {their} collar
  does fastening a wristwatch; slipping a ring onto one finger; blowing out a candle; clapping {their} hands
  moves dancing with one arm stretched out; taking a bow with one hand on {their} chest; leaning on a railing
  group raising their glasses; dancing and holding hands; talking with lively gestures; walking arm in arm
"""
HANDS = listed("""
    waving with {their} right hand; waving with {their} left hand; giving a thumbs up; making a peace sign
    pointing into the distance; holding up five fingers; holding up three fingers; crossing {their} arms
    clapping {their} hands; counting on {their} fingers; reaching out one open hand; laying one hand on {their} heart
    raising both arms; pressing both palms together; forming a heart with both hands; snapping {their} fingers
""")
FACE = listed("""
    resting {their} chin on one hand; laughing with one hand over {their} mouth; touching one cheek with the fingertips
    shading {their} eyes with one hand; holding both hands to {their} cheeks; whistling on two fingers
    cupping one hand behind {their} ear; holding a phone to {their} ear; smelling a flower held in one hand
    adjusting {their} round glasses with two fingers
""")
ORIGINS = listed("""
    Black: coily, curly, braided: black; dark-skinned: coily, braided, wavy: black; Polynesian: wavy, curly: black
    white: straight, wavy, curly: blond, brown, red; light-skinned: straight, wavy, curly: brown, dark brown, black
    East Asian: straight: black; Southeast Asian: straight, wavy: black; South Asian: straight, wavy: black, dark brown
    Middle Eastern: wavy, curly: black, dark brown; brown-skinned: straight, wavy, curly: black, dark brown
    Latin American: straight, wavy, curly: black, brown; Native American: straight, braided: black
""")
ADULTS = ("woman", "man", "person")
AGES = {"young": ADULTS, "middle-aged": ADULTS, "elderly": ADULTS, "little": ("girl", "boy", "child")}
THEIR = {"woman": "her", "girl": "her", "man": "his", "boy": "his", "person": "their", "child": "their"}
COVERED = {"woman": "a patterned headscarf", "man": "a shaved head", "person": "a shaved head"}
CLOTH_COLOURS = (
    "red",
    "yellow",
    "orange",
    "green",
    "blue",
    "purple",
    "pink",
    "white",
    "black",
    "grey",
    "brown",
    "beige",
)
SHOTS = {"full": ("full-body photo", "wide shot"), "half": ("half-body photo", "waist-up photo")}
SHOTS["close"] = ("close-up portrait", "head-and-shoulders portrait")


def parse_scenes(text: str) -> list[dict[str, list[str]]]:
    """SCENES as lists of items by key; each scene begins with its `where`, a key that comes again goes on."""
    scenes: list[dict[str, list[str]]] = []
    for line in text.strip().splitlines():
        key, _, items = line.strip().partition(" ")
        if key == "where":
            scenes.append(defaultdict(list))
        scenes[-1][key] += listed(items)
    return scenes


def draw_person(rng: random.Random, scene: dict[str, list[str]]) -> tuple[str, str, str, str]:
    """Someone who fits into the scene: (age, origin and noun), hair, clothes, and the possessive pronoun."""
    age = rng.choice([*AGES][: 3 if scene["cast"] else 4])
    (noun,) = rng.choices(AGES[age], (9, 9, 2))
    origin, textures, colours = rng.choice(ORIGINS).split(": ")
    length = "short" if noun in ("man", "boy") else rng.choice(("short", "shoulder-length", "long"))
    colour = rng.choice(("grey", "white", "silver") if age == "elderly" else colours.split(", "))
    hair = f"{length} {rng.choice(textures.split(', '))} {colour} hair"
    if noun in COVERED and rng.random() < 0.12:
        hair = COVERED[noun]
    clothes = [c for c in scene["wears"] if noun in ("woman", "girl") or not re.search("dress|skirt|blouse", c)]
    return f"a {age} {origin} {noun}", hair, rng.choice(clothes).format(c=rng.choice(CLOTH_COLOURS)), THEIR[noun]


def draw_one(rng: random.Random, scene: dict[str, list[str]], place: str, seat: str) -> tuple[str, str, str]:
    """A person alone: the kind of shot, who it is, and what the hands do where."""
    (shot,) = rng.choices(list(SHOTS), (4, 3, 2))
    who, hair, clothes, their = draw_person(rng, scene)
    pose = rng.choices(("standing", f"sitting {seat}", "sitting in a wheelchair"), (4, 3, 1))[0]
    anywhere = f"{pose} {place} and {rng.choice(HANDS)}"
    doing = [anywhere, *(f"{rng.choice(scene[key])} {place}" for key in ("does", "moves"))]
    if shot == "close":
        clothes, doing = clothes.split(" and ")[0], [f"{rng.choice(FACE)} {place}"]
    action = rng.choice(doing[:2] if shot == "half" else doing).format(their=their)
    return shot, f"{who} with {hair}, wearing {clothes}", action


def draw_group(rng: random.Random, scene: dict[str, list[str]], count: int, place: str) -> tuple[str, str, str]:
    """Two people, each with the upper part of the clothes, or three, each in a colour; and what they do where."""
    people: dict[str, str] = {}
    while len(people) < count:
        who, _, clothes, _ = draw_person(rng, scene)
        people[who] = f"{who} in {clothes.split(' and ')[0] if count == 2 else rng.choice(CLOTH_COLOURS)}"
    *first, last = people.values()
    action = rng.choice(scene["group"] + ["shaking hands"] * (count == 2))
    return "full", f"{('two', 'three')[count - 2]} people, {', '.join(first)} and {last}", f"{action} {place}"


def human_prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts of people, clothed and with busy hands; the first ones are the same for any count.

    Ages, origins, women and men come equally often; 6 in 11 prompts have one person, 3 two and 2 three.
    """
    rng, scenes = random.Random(seed), parse_scenes(SCENES)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = rng.choice(scenes)
        (people,) = rng.choices((1, 2, 3), (6, 3, 2))
        place, seat = rng.choice(scene["where"]).split(" @ ")
        shot, who, action = draw_one(rng, scene, place, seat) if people == 1 else draw_group(rng, scene, people, place)
        what, light = f"a {rng.choice(SHOTS[shot])}", rng.choice(scene["light"])
        parts = rng.choice(([f"{what} of {who}", action, light], [who, action, light, what], [who, action, what]))
        prompt = re.sub(r"\b[Aa](?= [aeio]| u(?!ku|ni))", r"\g<0>n", ", ".join(parts))
        prompts[prompt[0].upper() + prompt[1:]] = None
    return list(prompts)


def write_prompts(path: Path, count: int, seed: int) -> list[str]:
    """Writes human_prompts, one per line, and returns them; UserError for a file that is there already."""
    if path.exists():
        raise UserError(f"{path} is there already: choose another file for --write_prompts, or delete it")
    prompts = human_prompts(count, seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    replace_file(path, lambda part: part.write_text("\n".join(prompts) + "\n", encoding="utf-8"))
    return prompts


# ---- The pool -------------------------------------------------------------------------------------------------------
# A row for each image, in shards: fixed groups of prompts, whatever the batch size and the number of processes. With
# drafts there are two kinds: drafts-*.parquet with N quick images of each prompt, images-*.parquet with its finalists.

Row = dict[str, Any]
Plan = Callable[[list[str]], list[Row]]  # the rows that some prompts' shard shall hold

SCORE_COLUMNS = {"prompt_id": pa.string(), "caption": pa.string(), "index": pa.int64(), "source": pa.string()}
SCORE_COLUMNS |= {"seed": pa.int64(), "scores": pa.string()}
POOL_COLUMNS = SCORE_COLUMNS | {"jpg": pa.binary(), "latents": pa.binary()}
DISCARDED = b""  # in place of the jpg of a draft that was scored and not kept; one that is not finite has none
FINALISTS = 4  # a prompt's in plan_shards, whatever --finalists is, so that --rescore finds them in the same files
PREVIOUS = -1  # the index of the previous stage's winner among a prompt's images


class LeftOut(Exception):
    """A scorer failed: the shard is tried once more, then left out and counted."""


NO_IMAGE = "no image is finite (another --mixed_precision, with --overwrite, may help)"


class Winner(NamedTuple):
    """Where a winner of the previous stage is written."""

    file: Path
    row_group: int
    row: int
    side: int
    source: str
    seed: int
    split: str


class Tools(NamedTuple):
    """What draws and scores; a model is loaded when the first image needs it."""

    wanted: list[Scorer]
    scorers: Callable[[], dict[Scorer, Score]]
    pipe: Callable[[], DiffusionPipeline]
    vae_hash: Callable[[], str]
    model_hash: Callable[[], str]  # of all its weights
    photos: dict[str, Callable[[], Image.Image]]
    winners: dict[str, Winner]
    winners_latents: dict[str, Any] | None  # their shape, type and VAE


class Inline(Executor):
    """Does what it is given at once: on a CPU, where a second thread would only take cores from the first."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """As Executor.submit."""
        job: Future = Future()
        try:
            job.set_result(function(*args))
        except Exception as error:
            job.set_exception(error)
        return job


class Done(NamedTuple):
    """What complete_shards did: images, seconds, shards, and those of them that it left out, with the reason."""

    images: int
    seconds: float
    shards: int
    left_out: dict[Path, str]


class Votes(NamedTuple):
    """The scorers of --scorer with the spread of each, and those of --agree."""

    scorers: list[Scorer]
    spreads: dict[str, float]
    agree: list[Scorer]

    def totals(self, rows: list[Row]) -> np.ndarray:
        """The ensemble's scores of rows, (N,)."""
        scores = {scorer.label: scores_of(rows, scorer) for scorer in self.scorers}
        return ensemble(scores, {scorer.label: scorer.weight for scorer in self.scorers}, self.spreads)


def new_row(caption: str, index: int, source: str, seed: int) -> Row:
    """A row of the pool before its image is drawn."""
    prompt_id = hashlib.sha256(caption.encode()).hexdigest()[:16]
    return {"prompt_id": prompt_id, "caption": caption, "index": index, "source": source, "seed": seed}


def image_id(row: Row) -> str:
    """An image's name, by which scores that were made elsewhere find it."""
    return f"{row['prompt_id']}-{row['source']}-{row['index']}"


def plan_shards(folder: Path, kind: str, prompts: list[str], images_per_prompt: int) -> dict[Path, list[str]]:
    """The pool's files of a kind and their prompts."""
    size = math.ceil(SHARD_IMAGES / images_per_prompt)
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return {folder / "pool" / f"{kind}-{number:05d}.parquet": group for number, group in enumerate(groups)}


def shard_of_prompts(shards: dict[Path, list[str]]) -> dict[str, Path]:
    """plan_shards the other way round."""
    return {prompt: path for path, prompts in shards.items() for prompt in prompts}


def plan_candidates(prompts: list[str], count: int, seed: int, source: str) -> list[Row]:
    """`count` rows of each prompt, whose images differ in their seeds."""
    return [new_row(prompt, i, source, image_seed(seed, prompt, i)) for prompt in prompts for i in range(count)]


def plan_finalists(prompts: list[str], drafts: dict[str, Path], per_side: int, votes: Votes) -> list[Row]:
    """The rows of the drafts that are worth drawing in full; `drafts` tells in which shard a prompt's are."""
    rows = []
    for shard in dict.fromkeys(drafts[prompt] for prompt in prompts):
        for caption, pool in read_pools([shard]):
            if caption in prompts:
                chosen = [pool[i] for i in finalists(votes.totals(pool), per_side)]
                rows += [new_row(caption, row["index"], "generated", row["seed"]) for row in chosen]
    return rows


def plan_kept(prompts: list[str], images: dict[str, Path]) -> list[Row]:
    """--rescore: the images that are there; `images` tells in which shard a prompt's are."""
    pools = read_pools(dict.fromkeys(images[prompt] for prompt in prompts))
    return [
        new_row(*(row[name] for name in ("caption", "index", "source", "seed"))) for _, rows in pools for row in rows
    ]


def plan_reconstructions(prompts: list[str], timesteps: list[int], seed: int, winners: dict[str, Winner]) -> list[Row]:
    """For each prompt the winner of the previous stage, and a row per timestep of SDRecon."""
    rows = []
    for prompt in prompts:
        rows.append(new_row(prompt, PREVIOUS, winners[prompt].source, winners[prompt].seed))
        rows += [new_row(prompt, i, f"sdrecon-{t}", image_seed(seed, prompt, t)) for i, t in enumerate(timesteps)]
    return rows


def batches(rows: list[Row], size: int, key: Callable[[Row], Any] = lambda row: ()) -> Iterator[list[Row]]:
    """Cuts rows into lists of at most `size`, each of one `key`."""
    for _, alike in groupby(sorted(rows, key=key), key=key):
        alike = list(alike)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def how_drawn(row: Row) -> tuple[bool, str]:
    """What rows of a batch must have in common: taken from the previous stage or drawn, and how."""
    return row["index"] == PREVIOUS, row["index"] != PREVIOUS and row["source"]


def draw_rows(
    batch: list[Row], prompts: list[str], embeds: dict[str, torch.Tensor], tools: Tools, args: argparse.Namespace
) -> tuple[list[Image.Image], torch.Tensor]:
    """The images and latents of rows that are drawn alike."""
    pipe, source = tools.pipe(), batch[0]["source"]
    which, seeds = [prompts.index(row["caption"]) for row in batch], [row["seed"] for row in batch]
    steps: int | list[int] = args.num_inference_steps
    if batch[0]["index"] == PREVIOUS:
        return restore_winners([tools.winners[row["caption"]] for row in batch], tools)
    if source.startswith("sdrecon"):
        found = [open_or_tell(row, tools.photos) for row in batch]
        black = Image.new("RGB", (args.width, args.height))
        photos = [ImageOps.fit(photo or black, black.size) for photo in found]
        t = int(source.rpartition("-")[2])
        images, latents = sd_recon(pipe, embeds, which, seeds, photos, t, steps, args.guidance_scale)
        lost = torch.tensor([photo is None for photo in found])
        return images, latents.masked_fill(lost[:, None, None, None], math.nan)  # neither image nor score
    size = (args.guidance_scale, args.height, args.width)
    if source == "draft":
        with drafting(pipe):
            return sample(pipe, embeds, which, seeds, args.draft_steps, *size)
    return sample(pipe, embeds, which, seeds, steps, *size)


def open_or_tell(row: Row, photos: dict[str, Callable[[], Image.Image]]) -> Image.Image | None:
    """A row's photo; None where it cannot be read, which is told at the first of its rows."""
    try:
        return photos[row["caption"]]()
    except UserError as error:
        row["unread"] = True  # it is not written, so that the next start tries again
        if row["index"] == 0:
            tqdm.write(f"left out: {error}; the same command tries it again", file=sys.stderr)
        return None


def restore_winners(winners: list[Winner], tools: Tools) -> tuple[list[Image.Image], torch.Tensor]:
    """Images and latents of the previous stage; decoded again if the latents are this VAE's, else from the files."""
    pipe, rows = tools.pipe(), [read_winner(winner) for winner in winners]
    known = tools.winners_latents or {}
    if known.get("vae_hash") == tools.vae_hash():
        arrays = [np.frombuffer(row["latents"], known["dtype"]).reshape(known["shape"]) for row in rows]
        latents = torch.from_numpy(np.stack(arrays))
        return decode(pipe, latents)
    images = [from_jpeg(row["jpg"]) for row in rows]
    return images, encode(pipe, images).to("cpu", torch.float16)


def keep_images(
    batch: list[Row], images: list[Image.Image], latents: torch.Tensor, tools: Tools, args: argparse.Namespace
) -> None:
    """Scores a batch's images and notes them in its rows, as files. An image that is not finite gets no file."""
    finite = latents.isfinite().flatten(1).all(1).tolist()
    for row, image, latent, good in zip(batch, images, latents, finite, strict=True):
        draft, previous = row["source"] == "draft", row["index"] == PREVIOUS
        if previous:
            row["jpg"] = read_winner(tools.winners[row["caption"]])["jpg"]
        else:
            row["jpg"] = (DISCARDED if draft and args.discard_drafts else to_jpeg(image)) if good else None
        row["latents"] = latent.numpy().tobytes() if good and not draft and not args.no_latents else None
    score_rows(
        batch, [image if good else None for image, good in zip(images, finite, strict=True)], chosen_scorers(tools)
    )


def chosen_scorers(tools: Tools) -> dict[Scorer, Score]:
    """The loaded scorers of these shards: drafts are not shown to those of --agree."""
    return {scorer: score for scorer, score in tools.scorers().items() if scorer in tools.wanted}


def score_kept(rows: list[Row], scorers: dict[Scorer, Score]) -> None:
    """Scores images of the pool by their files, with the scorers that have not seen them."""
    unseen = {s: score for s, score in scorers.items() if any(s.source not in json.loads(r["scores"]) for r in rows)}
    if any(row["jpg"] == DISCARDED for row in rows):
        raise UserError(
            f"{next(iter(unseen)).label} cannot score drafts that --discard_drafts did not keep: make a new pool"
        )
    score_rows(rows, [row["jpg"] and from_jpeg(row["jpg"]) for row in rows], unseen)


def score_rows(rows: list[Row], images: list[Image.Image | None], scorers: dict[Scorer, Score]) -> None:
    """Adds every scorer's raw scores to the rows' json; nan where there is no image."""
    there = [(row, image) for row, image in zip(rows, images, strict=True) if image]
    for row, image in there:
        image.info["image_id"] = image_id(row)
    for scorer, score in scorers.items():
        values = ask(scorer, score, [image for _, image in there], [row["caption"] for row, _ in there])
        found = dict(zip((image_id(row) for row, _ in there), values, strict=True))
        for row in rows:
            known = json.loads(row.get("scores", "{}"))
            row["scores"] = json.dumps(known | {scorer.source: found.get(image_id(row), math.nan)})


def ask(scorer: Scorer, score: Score, images: list[Image.Image], prompts: list[str]) -> list[float]:
    """run_scorer; whatever a scorer may raise, it must not end a run of days."""
    try:
        return run_scorer(score, scorer.label, images, prompts) if images else []
    except UserError:
        raise
    except Exception as error:
        raise LeftOut(f"scorer {scorer.label} raised {type(error).__name__}: {error}") from error


def complete_shard(
    path: Path,
    prompts: list[str],
    plan: Plan,
    tools: Tools,
    args: argparse.Namespace,
    beside: Executor,
    bar: tqdm,
) -> Future:
    """Draws the rows that a shard lacks; on a GPU the thread `beside` scores and writes while the next are drawn."""
    kept = {image_id(row): row for row in read_shard(path)} if path.exists() else {}
    facts, scorers = read_facts(path) if kept else {}, chosen_scorers(tools)
    rows = list(({image_id(row): row for row in plan(prompts)} | kept).values())
    rows.sort(key=lambda row: (prompts.index(row["caption"]), row["index"]))
    missing = [row for row in rows if "jpg" not in row]
    unscored = [row for row in kept.values() if any(s.source not in json.loads(row["scores"]) for s in tools.wanted)]
    jobs: list[Future] = []
    for batch in batches(unscored, args.batch_size):
        jobs.append(beside.submit(score_kept, batch, scorers))
        wait(jobs[-2:-1])
        bar.update(len(batch))
    if missing:
        tools.model_hash()  # refuses a model that did not draw the others
    embeds = encode_prompts(tools.pipe(), prompts, args.negative_prompt) if missing else {}
    for batch in batches(missing, args.batch_size, how_drawn):
        try:
            images, latents = draw_rows(batch, prompts, embeds, tools, args)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory: set --batch_size below {args.batch_size}") from error
        facts = facts or describe_images(images[0], latents, tools, args)
        jobs.append(beside.submit(keep_images, batch, images, latents, tools, args))
        wait(jobs[-2:-1])  # so that no more than two batches are held
        bar.update(len(batch))
    return beside.submit(finish_shard, path, rows, facts, jobs)


def finish_shard(path: Path, rows: list[Row], facts: dict[str, Any], jobs: list[Future]) -> str:
    """Writes a shard once all of its images are scored, or raises what went wrong with one; what is odd about it."""
    for job in jobs:
        job.result()
    read = [row for row in rows if "unread" not in row]
    write_shard(path, read, facts)
    if any(row["jpg"] is not None for row in read if row["index"] != PREVIOUS):
        return ""
    return NO_IMAGE if len(read) == len(rows) else "no photo can be read"


def trouble_with(job: Future) -> str:
    """What is odd about a shard or why it has to be left out, "" if nothing; any other error is raised."""
    error = job.exception()
    return str(error) if isinstance(error, LeftOut) else job.result()


def complete_shards(
    shards: dict[Path, list[str]],
    plan: Plan,
    tools: Tools,
    args: argparse.Namespace,
    state: PartialState,
) -> Done:
    """Draws and scores what this process's shards lack; what failed twice is left out.

    A folder that another process fills is asked once, at the start: each process has every K-th shard to itself.
    UserError for trouble with three shards in a row: so it would go on.
    """
    lacking = {path: count_lacking(path, plan(shards[path]), tools.wanted) for path in process_share(shards, state)}
    todo = [(number, path) for number, (path, count) in enumerate(lacking.items()) if count]
    if not todo:
        return Done(0, 0.0, 0, {})
    shards_lacking, trouble = len(todo), [""] * len(lacking)
    tools.scorers()  # what is loaded here is not counted as drawing
    if not all(path.exists() for _, path in todo):
        tools.vae_hash()
        tools.model_hash()
    what, start = todo[0][1].stem.partition("-")[0], time.perf_counter()
    executor = Inline() if state.device.type == "cpu" else ThreadPoolExecutor(1)
    with progress(sum(lacking.values()), state, what, "img") as bar, executor as beside:
        for attempt in (1, 2):  # what a scorer fails on is tried once more
            jobs = ((*one, complete_shard(one[1], shards[one[1]], plan, tools, args, beside, bar)) for one in todo)
            failed = []
            for (number, path, job), _ in pairwise(chain(jobs, [None])):  # each is looked at when the next is drawn
                trouble[number] = trouble_with(job)
                if job.exception():
                    failed.append((number, path))
                if attempt == 1 and number >= 2 and all(trouble[number - 2 : number + 1]):
                    words = "three shards in a row, so the run ends; what is finished is kept for the next start"
                    raise UserError(f"{trouble[number]}: {words}")
            todo = failed
    left_out = {path: trouble[number] for number, path in todo}
    return Done(sum(lacking.values()), time.perf_counter() - start, shards_lacking, left_out)


def count_lacking(path: Path, rows: list[Row], scorers: list[Scorer]) -> int:
    """How many of the planned rows a shard does not have yet with every score."""
    if not path.exists():
        return len(rows)
    seen = {image_id(row): json.loads(row["scores"]) for row in read_shard(path, list(SCORE_COLUMNS))}
    return sum(any(scorer.source not in seen.get(image_id(row), {}) for scorer in scorers) for row in rows)


def describe_images(image: Image.Image, latents: torch.Tensor, tools: Tools, args: argparse.Namespace) -> Row:
    """What holds for all images of a shard: size, model and device, and the shape, scale and VAE of the latents."""
    unet, scale, shape = tools.pipe().unet, tools.pipe().vae.config.scaling_factor, list(latents.shape[1:])
    vae = {"vae": args.pretrained_model_name_or_path, "scaling_factor": scale, "vae_hash": tools.vae_hash()}
    device = torch.cuda.get_device_name(unet.device) if unet.device.type == "cuda" else unet.device.type
    drawn = {"model_hash": tools.model_hash(), "device": device, "precision": str(unet.dtype).removeprefix("torch.")}
    return {"image_size": image.size, "latents": {"shape": shape, "dtype": "float16"} | vae} | drawn


def process_share(shards: Iterable[Path], state: PartialState) -> list[Path]:
    """The shards that this process makes: every K-th, finished or not, so that the processes agree without asking."""
    return list(shards)[state.process_index :: state.num_processes]


def progress(total: int, state: PartialState, what: str, unit: str) -> tqdm:
    """A bar for this process's share of the work; only the main process shows its own."""
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    hidden = not (total and state.is_main_process)
    return tqdm(total=total, desc=what + share, unit=unit, smoothing=0.1, disable=hidden)


def to_jpeg(image: Image.Image) -> bytes:
    """Quality 95, no chroma subsampling: the same codec for winners and losers."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def from_jpeg(data: bytes) -> Image.Image:
    """Decodes what to_jpeg encoded."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes under a temporary name, then renames: whoever sees `path` sees it whole. UserError on a full disk."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"cannot write {path}: {reason}; what is finished is kept, start again to go on") from error


@contextlib.contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """UserError with the file's name where parquet cannot be read within the block, say because its end is missing."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).partition(chr(10))[0]}{remedy}") from error


MAKE_ANEW = "; delete it, and the same command makes it anew"


def write_shard(path: Path, rows: list[Row], facts: Row) -> None:
    """Writes a shard of the pool, a row per image, prompt by prompt; `facts` about all of them go to its metadata."""
    schema = pa.schema(POOL_COLUMNS.items(), metadata={"facts": json.dumps(facts)})
    replace_file(path, lambda part: pq.write_table(pa.Table.from_pylist(rows, schema), part))


def read_shard(path: Path, columns: list[str] | None = None) -> list[Row]:
    """The rows of a shard, all columns or some."""
    with reading(path, MAKE_ANEW):
        return pq.read_table(path, columns=columns).to_pylist()


def read_facts(path: Path) -> Row:
    """What write_shard noted about all rows."""
    with reading(path, MAKE_ANEW):
        return json.loads(pq.read_schema(path).metadata[b"facts"])


def read_pools(shards: Iterable[Path], columns: list[str] | None = None) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each prompt, shard by shard, those of SCORE_COLUMNS unless told; lacking shards are passed over."""
    for shard in shards:
        if shard.exists():
            rows = read_shard(shard, columns or list(SCORE_COLUMNS))
            yield from ((caption, list(pool)) for caption, pool in groupby(rows, key=itemgetter("caption")))


def scores_of(rows: list[Row], scorer: Scorer) -> np.ndarray:
    """A scorer's raw scores of rows, (N,); nan where it failed."""
    return np.array([json.loads(row["scores"]).get(scorer.source, math.nan) for row in rows], np.float64)


def count_votes(
    scorers: list[Scorer], agree: list[Scorer], images: Collection[Path], drafts: Collection[Path] = ()
) -> Votes:
    """The scorers with their spreads; one that votes alone, or not at all, needs none.

    The spread is that of the drafts, if there are any and all that vote have seen them, else that of the images: the
    finalists are extremes, and the two cannot be mixed.
    """
    voting = [scorer for scorer in scorers if scorer.weight != 0]
    spreads = {s.label: 0.0 for s in scorers}
    if len(voting) > 1:
        shards = drafts if all(has_seen(s, drafts) for s in voting) else images
        for s in voting:
            spreads[s.label] = pooled_spread(scores_of(pool, s) for _, pool in read_pools(shards))
    return Votes(scorers, spreads, agree)


def has_seen(scorer: Scorer, shards: Collection[Path]) -> bool:
    """Whether a scorer has scored all there is in some shards, and there is something."""
    seen = [scorer.source in json.loads(row["scores"]) for _, rows in read_pools(shards) for row in rows]
    return bool(seen) and all(seen)


# ---- The previous stage ---------------------------------------------------------------------------------------------


def find_winners(folder: str) -> dict[str, Winner]:
    """Where the winner of each caption of a folder of pairs is, without reading images; ties are left out."""
    winners: dict[str, Winner] = {}
    files = sorted(Path(folder, "data").glob("*.parquet"))
    if not files:
        raise UserError(f"--previous_pairs {folder}: no data/*.parquet; give the output folder of the stage before")
    for file in files:
        with reading(file):
            for place, caption in winners_of(file):
                winners.setdefault(caption, place)
    return winners


def winners_of(file: Path) -> Iterator[tuple[Winner, str]]:
    """Where the winners in a file of pairs are, with their captions."""
    parquet, split = pq.ParquetFile(file), file.name.partition("-")[0]
    columns = ["caption", "label_0", "label_1", "source_0", "source_1", "seed_0", "seed_1"]
    missing = set(columns) - set(parquet.schema_arrow.names)
    if missing:
        raise UserError(f"--previous_pairs: {file} has no column {min(missing)}; it is not a stage's output")
    for group in range(parquet.num_row_groups):
        for number, row in enumerate(parquet.read_row_group(group, columns).to_pylist()):
            side = int(row["label_1"] > row["label_0"])
            if row["label_0"] != row["label_1"]:
                yield (
                    Winner(file, group, number, side, row[f"source_{side}"], row[f"seed_{side}"], split),
                    row["caption"],
                )


@lru_cache(maxsize=2)
def read_row_group(file: Path, row_group: int) -> list[Row]:
    """The images and latents of some pairs."""
    with reading(file):
        parquet = pq.ParquetFile(file)
        columns = [name for name in parquet.schema_arrow.names if name.startswith(("jpg_", "latents_"))]
        return parquet.read_row_group(row_group, columns).to_pylist()


def read_winner(winner: Winner) -> Row:
    """A winner's jpg, and its latents where they were kept (else None)."""
    row = read_row_group(winner.file, winner.row_group)[winner.row]
    return {name: row.get(f"{name}_{winner.side}") for name in ("jpg", "latents")}


# ---- Pairs ----------------------------------------------------------------------------------------------------------


PICKAPIC_COLUMNS = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64()}
PICKAPIC_COLUMNS |= {"caption": pa.string()}  # so far what everyone reads
PICKAPIC_COLUMNS |= {"are_different": pa.bool_(), "has_label": pa.bool_(), "best_image_uid": pa.string()}
PICKAPIC_COLUMNS |= {"image_0_uid": pa.string(), "image_1_uid": pa.string(), "model_0": pa.string()}
PICKAPIC_COLUMNS |= {"model_1": pa.string(), "ranking_id": pa.int64(), "num_example_per_prompt": pa.int64()}

PAIR_COLUMNS = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64()}
PAIR_COLUMNS |= {"caption": pa.string()}  # so far Pick-a-Pic v2
PAIR_COLUMNS |= {"score_0": pa.float64(), "score_1": pa.float64(), "scores": pa.string(), "margin": pa.float64()}
PAIR_COLUMNS |= {"seed_0": pa.int64(), "seed_1": pa.int64(), "source_0": pa.string(), "source_1": pa.string()}
PAIR_COLUMNS |= {"latents_0": pa.binary(), "latents_1": pa.binary()}
PAIR_COLUMNS |= {"prompt_id": pa.string(), "stage": pa.string(), "num_candidates": pa.int64()}


class Choice(NamedTuple):
    """A prompt's verdict: its rows of the pool, the pair of indices (winner, loser) or None, why, and all scores."""

    caption: str
    rows: list[Row]
    pair: tuple[int, int] | None
    reason: str
    totals: np.ndarray

    @property
    def margin(self) -> float:
        """The winner's score less the loser's."""
        winner, loser = self.pair
        return float(self.totals[winner] - self.totals[loser])


def choose(caption: str, rows: list[Row], stage: str, votes: Votes) -> Choice:
    """A prompt's pair; every scorer of --agree must order it alike."""
    if not rows:
        return Choice(caption, rows, None, "no image with a score", np.empty(0))
    totals = votes.totals(rows)
    if stage == "easy":
        pair, reason = best_and_worst(totals)
    else:
        previous = next(i for i, row in enumerate(rows) if row["index"] == PREVIOUS)
        pair, reason = best_against_previous(totals, previous, must_win=stage == "normal")
    for scorer in votes.agree if pair else []:
        winner, loser = scores_of([rows[i] for i in pair], scorer)
        if not winner > loser:
            what = "gave no score" if np.isnan([winner, loser]).any() else "disagrees"
            return Choice(caption, rows, None, f"{scorer.label} {what}", totals)
    return Choice(caption, rows, pair, reason, totals)


def choose_all(args: argparse.Namespace, shards: dict[Path, list[str]], plan: Plan, votes: Votes) -> Iterator[Choice]:
    """The verdict on every prompt of the pool, by its planned rows alone: what was drawn for other choices is out."""
    for path, prompts in shards.items():
        planned = plan(prompts) if path.exists() else []
        pools = dict(read_pools([path]))
        for prompt in prompts:
            yield choose(prompt, only_planned(pools.get(prompt, []), planned), args.stage, votes)


def only_planned(rows: list[Row], planned: list[Row]) -> list[Row]:
    """Those of the rows that are planned, by their image_id."""
    wanted = {image_id(row) for row in planned}
    return [row for row in rows if image_id(row) in wanted]


def least_margin(spec: str | None, margins: list[float]) -> float:
    """--min_margin: a number, or as in 25% what a quarter of the margins lies below."""
    if spec is None:
        return -math.inf
    if spec.endswith("%"):
        return float(np.quantile(margins, float(spec[:-1]) / 100, method="lower")) if margins else -math.inf
    return float(spec)


def pair_row(choice: Choice, images: dict[str, Row], scorers: list[Scorer], args: argparse.Namespace) -> Row:
    """The data set's row for a pair; `images`: its shard by image_id. A seeded coin says which side is jpg_0."""
    winner, loser = choice.pair
    sides = (winner, loser) if unit_hash(args.seed, choice.caption, "side") < 0.5 else (loser, winner)
    raw = [json.loads(choice.rows[i]["scores"]) for i in sides]
    row = {
        "caption": choice.caption,
        "scores": json.dumps({scorer.label: [side[scorer.source] for side in raw] for scorer in scorers}),
        "margin": choice.margin,
        "prompt_id": choice.rows[0]["prompt_id"],
        "stage": args.stage,
        "num_candidates": args.num_images_per_prompt if args.stage == "easy" else len(args.sdrecon_timesteps),
    }
    for side, i in enumerate(sides):
        image = images[image_id(choice.rows[i])]
        row |= {f"{name}_{side}": image[name] for name in ("jpg", "seed", "source", "latents")}
        row |= {f"label_{side}": float(i == winner), f"score_{side}": float(choice.totals[i])}
    return row


def choose_validation(captions: list[str], share: float, seed: int) -> set[str]:
    """A seeded `share` of the prompts, rounded; at least one if any is asked for, and one at least is left."""
    count = min(max(round(share * len(captions)), int(share > 0)), len(captions) - 1)
    return set(sorted(captions, key=lambda caption: unit_hash(seed, caption, "validation"))[:count])


def pair_columns(no_latents: bool) -> list[tuple[str, pa.DataType]]:
    """The data set's columns, with or without the latents."""
    return [column for column in PAIR_COLUMNS.items() if not (no_latents and column[0].startswith("latents"))]


def write_pairs(
    args: argparse.Namespace,
    shards: dict[Path, list[str]],
    plan: Plan,
    votes: Votes,
    floor: float,
    held_out: set[str],
) -> dict[str, int]:
    """Writes the pairs with a margin of at least `floor` to data/, shard by shard; returns how many of each split."""
    scorers, schema = [*votes.scorers, *votes.agree], pa.schema(pair_columns(args.no_latents))
    counts = {"train": 0, "validation": 0}
    folder = Path(args.output_dir, "data")
    folder.mkdir(exist_ok=True)
    parts = {split: folder / f"{split}.part" for split in counts}
    with contextlib.ExitStack() as files:
        writers = {split: files.enter_context(pq.ParquetWriter(part, schema)) for split, part in parts.items()}
        for path, prompts in shards.items():
            kept = [one for one in choose_all(args, {path: prompts}, plan, votes) if one.pair and one.margin >= floor]
            images = {image_id(row): row for row in read_shard(path)} if kept else {}
            for split in counts:
                chosen = [one for one in kept if (one.caption in held_out) == (split == "validation")]
                counts[split] += len(chosen)
                if chosen:  # datasets cannot read an empty row group
                    rows = [pair_row(one, images, scorers, args) for one in chosen]
                    writers[split].write_table(pa.Table.from_pylist(rows, schema))
    for split, part in parts.items():
        path = folder / f"{split}-00000-of-00001.parquet"
        if counts[split]:
            os.replace(part, path)
        else:
            part.unlink()
            path.unlink(missing_ok=True)
    return counts


# ---- The finished pairs, read as a stream ---------------------------------------------------------------------------


SPLITS = ("train", "validation")


def split_file(folder: Path, split: str) -> Path:
    """Where a split of the finished data set lies; a split without pairs has no file."""
    return folder / "data" / f"{split}-00000-of-00001.parquet"


def count_pairs(folder: Path) -> dict[str, int]:
    """The numbers of pairs of the finished splits that have any."""
    files = {split: split_file(folder, split) for split in SPLITS}
    return {split: pq.read_metadata(file).num_rows for split, file in files.items() if file.exists()}


def iterate_pairs(
    folder: Path,
    columns: list[str] | None = None,
    splits: Sequence[str] = SPLITS,
    positions: Collection[int] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The finished pairs (split, row) in their order, a few at a time in memory; all columns or some.

    With `positions` (0 is the first pair of the first split) those alone: no other row groups are read.
    """
    start = 0
    for split in (split for split in splits if split_file(folder, split).exists()):
        with pq.ParquetFile(split_file(folder, split)) as file:
            for group in range(file.num_row_groups):
                place = range(start, start + file.metadata.row_group(group).num_rows)
                start = place.stop
                if positions is None or any(position in place for position in positions):
                    # one row group at a time: asked for several, pyarrow keeps them all
                    rows = (row for batch in file.iter_batches(16, [group], columns) for row in batch.to_pylist())
                    for position, row in zip(place, rows, strict=True):
                        if positions is None or position in positions:
                            yield split, row


def spread_evenly(total: int, count: int, seed: int | None = None) -> list[int]:
    """`count` positions out of `total`, one in each of as many equal stretches: the first there or, seeded, any."""
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    first, end = edges[:-1], edges[1:]
    return (first if seed is None else np.random.default_rng(seed).integers(first, end)).tolist()


def winner_first(row: dict[str, Any], sides: Sequence[Any]) -> tuple[Any, Any]:
    """Values of jpg_0 and of jpg_1 as the winner's and the loser's."""
    return (sides[0], sides[1]) if row["label_0"] >= row["label_1"] else (sides[1], sides[0])


def both_sides(row: dict[str, Any], name: str) -> tuple[Any, Any]:
    """The winner's and the loser's value of a column that stands in a row as name_0 and name_1."""
    return winner_first(row, (row[f"{name}_0"], row[f"{name}_1"]))


def raw_scores(row: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Every scorer's raw scores of the winner and of the loser."""
    return {name: winner_first(row, sides) for name, sides in json.loads(row["scores"]).items()}


# ---- Pictures and words ---------------------------------------------------------------------------------------------

DATA_CARD = """\
---
pretty_name: {name}
task_categories: [text-to-image]
tags: [text-to-image, dpo, preference, synthetic]
configs:
- config_name: default
  data_files:
{files}
dataset_info:
  features:
{features}
---

# Preference pairs that a model made for itself

{pairs}. Each is {each} by {scorers}; the model is {model}.

![winners above losers](pairs.png)

*Winners above losers, with their scores, evenly chosen. `pairs.html` shows more of them, and lets you choose blindly.*

## Counts

{counts}

## Scores

{scores}

{gaps}

![histograms of the scores and of the margins](scores.png)

## Three pairs

{examples}

## How to use them

```python
import io

from datasets import load_dataset
from PIL import Image

pairs = load_dataset("FOLDER_OR_HUB_NAME", split="train")
image = Image.open(io.BytesIO(pairs[0]["jpg_0"]))
```

```bash
{command}
```

The columns are Pick-a-Pic v2's (`jpg_0`, `jpg_1`, `label_0`, `label_1`, `caption`), which diffusers', Salesforce's and
MaPO's scripts read unchanged, and more: the winner has label 1; `scores` holds every scorer's raw scores of the two
sides as json; `margin` is the winner's score less the loser's; `latents_0` and `latents_1`, if they were kept, are the
sampler's scaled latents, whose shape and VAE stand in `preference_data.json` with all settings. `pool/`, if it is
there, has every image and its scores.

## Limits

- No person has looked at them: the winner is not always the one that people like better. How often you agree, the
  blind test in `pairs.html` tells.
- What the model cannot draw is in no pair, and what is wrong in all images of a prompt is wrong in its winner too.
- The images show what the model makes of the prompts, its biases included.
- The model's licence says what its images may be used for.

## How they were made

{settings}

Made by make_preference_data.py with {versions}.
"""

INK, PAPER, GOOD, BAD = "#1c1c1c", "#ffffff", "#12804a", "#b3261e"
FAINT, RULE, PLAIN = "#66717a", "#e2e6e8", "#2c6e91"


class Card(NamedTuple):
    """A column of a contact sheet: images from top to bottom, each with a label and its colour, and a caption."""

    images: list[tuple[Image.Image, str, str]]
    caption: str = ""


def contact_sheet(title: str, cards: list[Card], per_row: int, cell: int = 192) -> Image.Image:
    """Cards in rows under a title. Images smaller than a cell are enlarged with hard pixels, larger ones reduced."""
    gap, line, heading_line = 16, 20, 26
    body, heading = ImageFont.load_default(size=14), ImageFont.load_default(size=20)
    wrapped = [textwrap.wrap(card.caption, cell // 7, max_lines=5, placeholder=" ...") for card in cards]
    height = max(len(card.images) for card in cards) * (cell + 2 * line) + max(map(len, wrapped)) * line + gap
    rows = math.ceil(len(cards) / per_row)
    width = gap + min(per_row, len(cards)) * (cell + gap)
    titles = textwrap.wrap(title, (width - 2 * gap) // 11)
    top = 3 * line + heading_line * (len(titles) - 1)
    sheet = Image.new("RGB", (width, top + rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, words in enumerate(titles):
        draw.text((gap, line + number * heading_line), words, INK, heading)
    for number, (card, caption) in enumerate(zip(cards, wrapped, strict=True)):
        x, y = gap + number % per_row * (cell + gap), top + number // per_row * height
        for image, label, colour in card.images:
            method = Image.Resampling.NEAREST if max(image.size) <= cell else Image.Resampling.LANCZOS
            image = ImageOps.contain(image, (cell, cell), method)
            sheet.paste(image, (x + (cell - image.width) // 2, y + cell - image.height))
            draw.rectangle((x, y + cell + 3, x + cell - 1, y + cell + 6), colour)
            draw.text((x, y + cell + 10), label, colour, body)
            y += cell + 2 * line
        draw.multiline_text((x, y - 4), "\n".join(caption), INK, body, spacing=5)
    return sheet


def draw_pool(args: argparse.Namespace, pool: Pool, plan: Plan, votes: Votes) -> None:
    """pool.png: all candidates of the first prompt that has some, best to worst; the finalists or the pair marked."""
    drafts, images = (read_pools(shards, list(POOL_COLUMNS)) for shards in (pool.drafts, pool.images))
    pools = chain(drafts, ((caption, only_planned(rows, plan([caption]))) for caption, rows in images))
    caption, rows = next((caption, rows) for caption, rows in pools if any(row["jpg"] for row in rows))
    are_drafts = rows[0]["source"] == "draft"
    if are_drafts:
        totals = votes.totals(rows)
        chosen = sorted(finalists(totals, args.finalists), key=lambda i: -totals[i])
    else:
        _, _, pair, _, totals = choose(caption, rows, args.stage, votes)
        chosen = pair or ()
    colours = dict.fromkeys(chosen, BAD) | dict.fromkeys(chosen[: (len(chosen) + 1) // 2], GOOD)
    cards = [
        Card([(from_jpeg(rows[i]["jpg"]), f"{totals[i]:.2f}", colours.get(i, INK))])
        for i in np.argsort(-totals)  # nan comes last
        if rows[i]["jpg"]
    ]
    what = f"Drafts in {args.draft_steps} steps, best to worst" if are_drafts else "Best to worst"
    title = textwrap.shorten(f"{what}: {caption}", 110)
    save_png(contact_sheet(title, cards, per_row=10, cell=144), Path(args.output_dir) / "pool.png")


def save_png(image: Image.Image, path: Path) -> None:
    """Whoever sees the file sees all of it."""
    replace_file(path, lambda part: image.save(part, "PNG", optimize=True))


def draw_pairs(folder: Path, count: int = 12) -> None:
    """pairs.png: so many finished pairs, evenly spread over their order, winners above losers."""
    columns = ["caption", "label_0", "label_1", "score_0", "score_1", "jpg_0", "jpg_1"]
    cards = []
    for _, row in iterate_pairs(folder, columns, positions=spread_evenly(sum(count_pairs(folder).values()), count)):
        sides = zip(both_sides(row, "jpg"), both_sides(row, "score"), (GOOD, BAD), strict=True)
        images = [(from_jpeg(jpg), f"{score:.2f}", colour) for jpg, score, colour in sides]
        cards.append(Card(images, row["caption"]))
    save_png(contact_sheet("Winners above losers, with their scores", cards, per_row=6), folder / "pairs.png")


class Series(NamedTuple):
    """What a histogram draws in one colour."""

    name: str
    values: np.ndarray  # (P,)
    colour: str


def round_steps(low: float, high: float, count: int) -> np.ndarray:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` or below to `high` or above, about `count`."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= 0.999 * (high - low))
    return step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)


def histogram_steps(series: Sequence[Series], count: int = 40) -> np.ndarray:
    """Edges of about `count` equal steps over the finite values; empty if there are none.

    Values so far out that all others would be one bar stay outside.
    """
    values = np.concatenate([one.values[np.isfinite(one.values)] for one in series])
    if not len(values):
        return values
    quarter, three_quarters = np.percentile(values, [25, 75]).tolist()
    reach = 4 * (three_quarters - quarter) or math.inf
    near = values[(values >= quarter - reach) & (values <= three_quarters + reach)]
    low, high = float(near.min()), float(near.max())
    return round_steps(low, high, count) if low < high else np.array([low - 0.5, low + 0.5])


class Frame(NamedTuple):
    """The inside of a panel in pixels, and the values at its edges."""

    left: int
    top: int
    right: int
    bottom: int
    low: float
    high: float
    peak: float

    def at(self, value: float, count: float) -> tuple[float, float]:
        """The pixel of a value and a count."""
        across, up = (value - self.low) / (self.high - self.low), count / self.peak
        return self.left + (self.right - self.left) * across, self.bottom - (self.bottom - self.top) * up


def draw_axes(draw: ImageDraw.ImageDraw, frame: Frame, font: ImageFont.FreeTypeFont, counts: np.ndarray) -> None:
    """Rules at the `counts` and ticks below round values, with their numbers."""
    for count in counts:
        ends = [frame.at(frame.low, count), frame.at(frame.high, count)]
        draw.line(ends, RULE, 2)
        draw.text((frame.left - 14, ends[0][1]), f"{count:,.0f}", FAINT, font, anchor="rm")
    for tick in round_steps(frame.low, frame.high, 6):
        x, y = frame.at(tick, 0)
        if frame.left <= x <= frame.right:
            draw.line((x, y, x, y + 10), INK, 2)
            draw.text((x, y + 18), f"{tick:.6g}", FAINT, font, anchor="ma")


def draw_panel(title: str, unit: str, series: Sequence[Series], width: int = 880, height: int = 640) -> Image.Image:
    """A histogram of the series in common steps, at twice the size at which it is read."""
    panel = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=24)
    left, top, right, bottom = 100, 170, width - 40, height - 110
    draw.text((left, 16), title, INK, ImageFont.load_default(size=34))
    edges = histogram_steps(series)
    if not len(edges):
        draw.text((left, top), "no finite values", FAINT, font)
        return panel
    counts = [np.histogram(one.values[np.isfinite(one.values)], edges)[0] for one in series]
    rules = round_steps(0, max(count.max() for count in counts), 4)
    frame = Frame(left, top, right, bottom, edges[0], edges[-1], rules[-1])
    draw_axes(draw, frame, font, rules[rules % 1 == 0])
    draw.text((left, top - 44), f"pairs in steps of {edges[1] - edges[0]:.3g}", FAINT, font)
    draw.text(((left + right) / 2, height - 50), unit, INK, font, anchor="ma")
    for one, count in zip(series, counts, strict=True):
        heights = [0, *np.repeat(count, 2), 0]
        outline = [frame.at(value, number) for value, number in zip(np.repeat(edges, 2), heights, strict=True)]
        mask = Image.new("L", panel.size)
        ImageDraw.Draw(mask).polygon(outline, fill=80)
        panel.paste(one.colour, mask=mask)
        draw.line(outline, one.colour, 3)
        draw.rectangle((left, 76, left + 24, 100), one.colour)
        finite = one.values[np.isfinite(one.values)]
        label = f"{one.name}, median {np.median(finite):.2f}" if len(finite) else f"{one.name}, none finite"
        draw.text((left + 36, 74), label, INK, font)
        left += 80 + round(draw.textlength(label, font))
    draw.line([frame.at(frame.low, 0), frame.at(frame.high, 0)], INK, 3)
    return panel


def not_drawn(series: Sequence[Series]) -> Counter[str]:
    """What draw_panel leaves out of the series, in words."""
    edges, left_out = histogram_steps(series), Counter()
    for one in series:
        left_out.update(f"of the {one.name} at {value}" for value in one.values[~np.isfinite(one.values)])
        values = one.values[np.isfinite(one.values)]
        left_out[f"of the {one.name} beyond the axis"] = int(
            len(values) and ((values < edges[0]) | (values > edges[-1])).sum()
        )
    return +left_out


def scorer_names(folder: Path) -> list[str]:
    """The scorers of the finished pairs."""
    _, first = next(iterate_pairs(folder, ["scores"]))
    return list(json.loads(first["scores"]))


def scores_of_pairs(folder: Path) -> dict[str, np.ndarray]:
    """The scores of all winners and of all losers, and the margins: 24 bytes a pair, all that is kept of each."""
    columns = ["label_0", "label_1", "score_0", "score_1", "margin"]
    files = [split_file(folder, split) for split in count_pairs(folder)]
    tables = [pq.read_table(file, columns=columns, pre_buffer=False) for file in files]
    label_0, label_1, score_0, score_1, margin = (
        np.concatenate([table[name].to_numpy() for table in tables]) for name in columns
    )
    first = label_0 >= label_1
    winners, losers = np.where(first, score_0, score_1), np.where(first, score_1, score_0)
    return {"winners": winners, "losers": losers, "margins": margin}


def draw_histograms(folder: Path) -> None:
    """scores.png: the scores of winners and losers, and the margins, of all finished pairs."""
    scores, scorers = scores_of_pairs(folder), scorer_names(folder)
    unit = scorers[0]
    if len(scorers) > 1:
        names = textwrap.shorten(" + ".join(scorers), 30, placeholder=" ...")
        unit = f"{names}, weighted, in units of their spread"
    sides = [Series("winners", scores["winners"], GOOD), Series("losers", scores["losers"], BAD)]
    margins = [Series("margins", scores["margins"], PLAIN)]
    panels = [
        draw_panel("Scores", f"score: {unit}", sides),
        draw_panel("Margins", "score of the winner less score of the loser", margins),
    ]
    left_out = not_drawn(sides) + not_drawn(margins)
    width, height = sum(panel.width for panel in panels), panels[0].height
    picture = Image.new("RGB", (width, height + 60 * bool(left_out)), PAPER)
    for number, panel in enumerate(panels):
        picture.paste(panel, (number * panel.width, 0))
    if left_out:
        words = textwrap.shorten(f"Not drawn: {count_words(left_out)}", 150)
        ImageDraw.Draw(picture).text((100, height), words, FAINT, ImageFont.load_default(size=24))
    save_png(picture, folder / "scores.png")


def plain_text(text: str) -> str:
    """One line without control characters."""
    return " ".join(re.sub(r"[^ -~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text).split())


def without_folders(text: str) -> str:
    """Absolute paths cut to their last part: what is pushed to a hub is read on other machines."""
    return re.sub(r"(?<![\w.:/~-])/(?:[^\s/,'\"]+/)+", "", text)


def yaml_text(text: str) -> str:
    """A string of yaml that says just this; json's strings are yaml's."""
    return json.dumps(plain_text(text), ensure_ascii=False)


def markdown_text(text: str) -> str:
    """Text that markdown shows as it is, in a paragraph or in a cell of a table."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(plain_text(text), quote=False))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers or short words; cells are escaped here."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    lines += [[markdown_text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summarise_margins(margins: np.ndarray) -> dict[str, float | None]:
    """Some percentiles of the finite margins, (P,); None where there are none."""
    ranks = {"least": 0, "10 %": 10, "25 %": 25, "median": 50, "75 %": 75, "90 %": 90, "most": 100}
    finite = margins[np.isfinite(margins)]
    return {name: float(np.percentile(finite, rank)) if len(finite) else None for name, rank in ranks.items()}


def summarise_pairs(folder: Path) -> tuple[dict[str, tuple[float, float, float, int]], dict[str, Counter[str]]]:
    """Means of every scorer, and where the winners and the losers come from.

    The means are a scorer's of the winners, of the losers, the share of winners that it puts higher (a tie is one
    half), and how many pairs are counted: those of which it gives both sides a finite score.
    """
    sums: dict[str, np.ndarray] = {}
    sources: dict[str, Counter[str]] = {"winners": Counter(), "losers": Counter()}
    for _, row in iterate_pairs(folder, ["label_0", "label_1", "scores", "source_0", "source_1"]):
        for side, source in zip(sources.values(), both_sides(row, "source"), strict=True):
            side[source] += 1
        for name, (winner, loser) in raw_scores(row).items():
            total = sums.setdefault(name, np.zeros(4))
            if None not in (winner, loser) and math.isfinite(winner) and math.isfinite(loser):
                total += (winner, loser, (winner > loser) + (winner == loser) / 2, 1)
    means = {name: (*(total[:3] / max(total[3], 1)).tolist(), int(total[3])) for name, total in sums.items()}
    return means, sources


def example_lines(folder: Path) -> str:
    """Three pairs in words, evenly chosen."""
    columns = ["caption", "label_0", "label_1", "scores", "margin"]
    rows = [
        row for _, row in iterate_pairs(folder, columns, positions=spread_evenly(sum(count_pairs(folder).values()), 3))
    ]
    lines = []
    for row in rows:
        scores = [f"{name}: winner {show(win)}, loser {show(loss)}" for name, (win, loss) in raw_scores(row).items()]
        told = "; ".join([*scores, f"margin {show(row['margin'])}"])
        lines.append(f"> {markdown_text(row['caption'])}\n>\n> {markdown_text(told)}")
    return "\n\n".join(lines)


def show(score: float | None) -> str:
    """A score with four significant digits; "none" where a scorer gave none."""
    return "none" if score is None else f"{score:.4g}"


def what_a_pair_is(settings: dict[str, Any]) -> str:
    """A stage's pairs in words."""
    count, drafts, full = (settings[name] for name in ("num_images_per_prompt", "draft_steps", "num_inference_steps"))
    if settings["stage"] == "easy":
        chosen_by = settings.get("drafts_chosen_by")
        if chosen_by and chosen_by != settings["scorer"]:
            names = markdown_text(" + ".join(chosen_by))
            drawn = f"that {names} chose among {count} drafts of {drafts} steps and that were drawn in {full}"
            return f"the best and the worst of the images of one prompt {drawn},"
        how = f", chosen as drafts of {drafts} steps and drawn in {full}" if drafts else ""
        return f"the best and the worst of {count} images of one prompt{how},"
    timesteps, before = settings["sdrecon_timesteps"], {"normal": "Easy", "hard": "Normal"}[settings["stage"]]
    photo = f"a real photo noised to timestep {' or '.join(map(str, timesteps))} and denoised by the model"
    if settings["stage"] == "hard":
        return f"{photo}, preferred to the {before} stage's winner of the same prompt whatever their scores, scored"
    return f"{photo}, against the {before} stage's winner of the same prompt, chosen"


def data_card(folder: Path, record: dict[str, Any]) -> str:
    """README.md of the finished pairs and their record; its yaml is what datasets.load_dataset and the Hub read."""
    settings, counts = record["settings"], count_pairs(folder)
    model = without_folders(settings["pretrained_model_name_or_path"])
    kinds = {pa.float64(): "float64", pa.int64(): "int64"}
    gaps, (means, sources) = summarise_margins(scores_of_pairs(folder)["margins"]), summarise_pairs(folder)
    numbers = [("prompts", f"{record['prompts']:,}")]
    numbers += [(f"pairs in {split}", f"{count:,}") for split, count in counts.items()]
    numbers += [(f"no pair: {reason}", f"{count:,}") for reason, count in record["dropped"].items()]
    numbers += [(side, count_words(source)) for side, source in sources.items()]
    command = next_command(argparse.Namespace(**{**settings, "output_dir": "FOLDER"}))
    return DATA_CARD.format(
        name=yaml_text(f"Preference pairs of {model}"),
        files="\n".join(f"  - {{split: {split}, path: data/{split_file(folder, split).name}}}" for split in counts),
        features="\n".join(
            f"  - {{name: {column.name}, dtype: {kinds.get(column.type, column.type)}}}"
            for column in pq.read_schema(split_file(folder, next(iter(counts))))
        ),
        pairs=" and ".join(f"{count:,} {split} pair{'s' * (count != 1)}" for split, count in counts.items()),
        each=what_a_pair_is(settings),
        scorers=markdown_text(" + ".join(means)),
        model=markdown_text(model),
        counts=markdown_table(("", "number"), numbers),
        scores=markdown_table(
            ("scorer", "winners, mean", "losers, mean", "winner higher", "pairs"),
            [(name, win, loss, f"{100 * share:.0f} %", pairs) for name, (win, loss, share, pairs) in means.items()],
        ),
        gaps=markdown_table(("", *gaps), [("margin", *map(show, gaps.values()))]),
        examples=example_lines(folder),
        command=plain_text(without_folders(command)),
        settings=markdown_table(
            ("setting", "value"),
            [
                (f"--{name}", without_folders(" ".join(map(str, value)) if isinstance(value, list) else str(value)))
                for name, value in settings.items()
                if value is not None
            ],
        ),
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )


def describe_pairs(folder: Path, record: dict[str, Any]) -> None:
    """Writes all that shows the finished pairs: README.md, pairs.html, pairs.png and scores.png."""
    draw_pairs(folder)
    draw_histograms(folder)
    write_page(folder, record)
    replace_file(folder / "README.md", lambda part: part.write_text(data_card(folder, record), encoding="utf-8"))


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


# ---- The page: one HTML file that loads nothing ---------------------------------------------------------------------

TINY = 128  # images of so few pixels a side are shown with hard pixels

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline'">
<title>Preference pairs</title>
<style>
:root{color-scheme:light dark;--paper:#fff;--card:#f3f5f5;--ink:#1f2529;--soft:#5f6a73;--line:#dfe4e6;
 --win:#12804a;--lose:#b3261e;--plain:#2c6e91}
@media(prefers-color-scheme:dark){:root{--paper:#15191c;--card:#1f262a;--ink:#e4e8ea;--soft:#98a4ac;--line:#30393e;
 --win:#5db48b;--lose:#e58068;--plain:#6fb3d6}}
*{box-sizing:border-box;print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{max-width:920px;margin:0 auto;padding:36px 28px 40px;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums;
 overflow-wrap:anywhere}
h1{font-size:28px;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:0 0 4px}
p{margin:0}
.soft,th,figcaption{color:var(--soft)}.soft{font-size:14px}
nav{display:flex;flex-wrap:wrap;gap:8px;margin:20px 0 12px}
button,select,input{font:inherit;font-size:15px;color:inherit;background:var(--card);border:1px solid var(--line);
 border-radius:8px;padding:7px 13px;min-height:40px}
button{cursor:pointer}button:hover,select:hover{border-color:var(--soft)}
:focus-visible{outline:2px solid var(--plain);outline-offset:2px}
#filter{flex:1 1 150px;min-width:0}
[aria-pressed=true]{background:var(--plain);border-color:var(--plain);color:var(--paper)}
.leaf{display:flex;align-items:center;gap:8px}
#place{min-width:76px;text-align:center;font-size:15px}
#strip{display:flex;align-items:end;height:44px;cursor:pointer;border-bottom:1px solid var(--line);touch-action:none}
#strip i{flex:1;min-width:0;height:100%;display:flex;align-items:end;justify-content:center;padding:0 .5px}
#strip i::before{content:"";width:100%;max-width:24px;height:var(--h);min-height:2px;background:var(--soft);opacity:.4}
#strip .agree::before{background:var(--win);opacity:.8}#strip .differ::before{background:var(--lose);opacity:.8}
#strip .here::before{background:var(--plain);opacity:1}
article{margin:24px 0 0}
blockquote{margin:0 0 16px;font-size:19px;line-height:1.4;white-space:pre-wrap}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:20px}
.side{display:block;width:100%;margin:0;padding:0;border:0;border-radius:10px;overflow:hidden;background:var(--card);
 text-align:left}
.side img{display:block;width:100%;max-height:62vh;object-fit:contain}.small img{image-rendering:pixelated}
figcaption,.side span{display:flex;justify-content:space-between;gap:8px;padding:9px 14px;
 border-top:4px solid var(--line)}
.win figcaption{border-color:var(--win)}.lose figcaption{border-color:var(--lose)}
.win b{color:var(--win)}.lose b{color:var(--lose)}
button.side:hover span{border-color:var(--plain)}
table{border-collapse:collapse;table-layout:fixed;width:100%;margin:16px 0 12px;font-size:15px}
th{font-weight:500;font-size:13px}
th,td{padding:6px 0 6px 16px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:0}
#said{padding:16px 0 0;font-weight:600;color:var(--plain)}#said:empty{display:none}
footer{margin-top:28px;padding-top:12px;border-top:1px solid var(--line)}
kbd{font:inherit;font-size:13px;border:1px solid var(--line);border-radius:4px;padding:0 5px;background:var(--card)}
@media(max-width:600px){body{padding:20px 16px 84px}.pair{grid-template-columns:1fr;gap:14px}.keys{display:none}
 #sort{flex:1 0 100%}#said{position:sticky;top:0;padding:10px 0;background:var(--paper)}article{margin-top:16px}
 th,td{padding-left:10px}.leaf{position:fixed;inset:auto 0 0;padding:10px 16px;justify-content:space-between;z-index:1;
 background:var(--paper);border-top:1px solid var(--line)}.leaf button{flex:1;font-size:20px}}
@media print{:root{color-scheme:light;--paper:#fff;--card:#f3f5f5;--ink:#1f2529;--soft:#5f6a73;--line:#dfe4e6;
 --win:#12804a;--lose:#b3261e}nav,#strip,#said,footer{display:none}body{max-width:none;padding:0;font-size:11pt}
 article{break-inside:avoid;max-width:150mm;margin:6mm auto}.pair{grid-template-columns:1fr 1fr}
 blockquote{font-size:11pt}.side img{max-height:56mm}figcaption{padding:4px 10px}
 table{margin:8px 0}th,td{font-size:9pt;padding-block:2px}.soft{font-size:9pt}}
</style>
</head>
<body>
<h1>Preference pairs</h1>
<p class="soft" id="about"></p>
<nav>
 <select id="sort" aria-label="Order">
  <option value="order">In their order</option><option value="most">Largest margin first</option>
  <option value="least">Smallest margin first</option><option value="random">At random</option>
 </select>
 <input id="filter" type="search" placeholder="Prompts with ..." aria-label="Only prompts that hold this text">
 <button id="blind" aria-pressed="false">Blind test</button>
 <span class="leaf"><button id="back" aria-label="Previous pair">←</button><output id="place"></output>
 <button id="next" aria-label="Next pair">→</button></span>
</nav>
<div id="strip" aria-hidden="true" title="The margin of each pair; the tallest is the largest"></div>
<p id="said" aria-live="polite"></p>
<main></main>
<footer class="soft"><span class="keys"><kbd>←</kbd> <kbd>→</kbd> leaf through, <kbd>B</kbd> blind test,
<kbd>1</kbd> <kbd>2</kbd> choose. </span>
No person has looked at these pairs: the blind test measures their choice against yours.</footer>
<script type="application/json" id="data">@DATA@</script>
<script>
const $ = id => document.getElementById(id), main = document.querySelector("main");
const {about, small, pairs} = JSON.parse($("data").textContent);
const make = (tag, props, ...inside) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...inside);
  return node;
};
const digits = {minimumSignificantDigits: 4, maximumSignificantDigits: 4, useGrouping: false};
const show = value => value === null ? "none" : (+value).toLocaleString("en", digits);
const shuffle = () => pairs.forEach(pair => pair.lot = Math.random());
const orders = {
  order: (a, b) => a.position - b.position, most: (a, b) => b.margin - a.margin,
  least: (a, b) => a.margin - b.margin, random: (a, b) => a.lot - b.lot,
};
let list = pairs, at = 0, blind = false;

function side(pair, name, place, open) {
  const image = make("img", {src: "data:image/jpeg;base64," + pair[name].jpg, alt: open ? `Image ${place}` : name});
  if (open) return make("button", {className: "side", onclick: () => choose(pair, name)}, image,
    make("span", {}, make("b", {}, `${place}`), "this one"));
  const label = name === "winner" ? "Winner" : "Loser", yours = blind && pair.choice === name ? ", your choice" : "";
  return make("figure", {className: name === "winner" ? "side win" : "side lose"}, image,
    make("figcaption", {}, make("b", {}, label + yours), show(pair[name].score)));
}

function table(pair) {
  const line = (tag, ...cells) => make("tr", {}, ...cells.map(cell => make(tag, {}, cell)));
  const gap = (w, l) => w === null || l === null ? "" : show(w - l);
  const rows = pair.scores.map(([name, w, l]) => line("td", name, show(w), show(l), gap(w, l)));
  rows.push(line("td", "source", pair.winner.source, pair.loser.source, ""));
  return make("table", {}, line("th", "", "winner", "loser", "difference"), ...rows);
}

function card(pair) {
  const open = blind && !pair.choice, names = blind && pair.coin ? ["loser", "winner"] : ["winner", "loser"];
  const sides = names.map((name, i) => side(pair, name, i + 1, open));
  const node = make("article", {}, make("blockquote", {}, pair.prompt), make("div", {className: "pair"}, ...sides));
  if (!open) node.append(table(pair), make("p", {className: "soft"}, `margin ${show(pair.margin)} · ${pair.split} · `
    + `stage ${pair.stage} · ${pair.candidates} candidates · seeds ${pair.winner.seed}, ${pair.loser.seed} · `
    + `pair ${pair.position + 1} of ${about.total}`));
  return node;
}

function interval(k, n) {  // Wilson's for a share k / n, 95 %
  const z2 = 1.959964 ** 2, centre = k + z2 / 2, half = Math.sqrt(z2 * (k * (n - k) / n + z2 / 4));
  return [centre - half, centre + half].map(end => Math.round(100 * end / (n + z2)));
}

function verdict(pair) {
  const told = pairs.filter(other => other.choice), n = told.length;
  const k = told.filter(other => other.choice === "winner").length;
  const [yes, no] = pair?.stage === "hard" ? ["You agree with the choice.", "The choice is the other one."]
    : ["You agree with the scorer.", "The scorer chose the other one."];
  const now = !pair?.choice ? "Which one would you choose?" : pair.choice === "winner" ? yes : no;
  return !n ? now : `${now} So far you agree in ${k} of ${n}: ${Math.round(100 * k / n)} % `
    + `(95 % interval ${interval(k, n).join(" to ")}; a coin: 50).`;
}

function draw() {
  const pair = list[at], highest = Math.max(...pairs.map(other => +other.margin).filter(isFinite), 1e-9);
  const height = other => blind ? 30 : Math.max(0, Math.min(100, 100 * other.margin / highest)) || 0;
  const mark = other => !blind || !other.choice ? "" : other.choice === "winner" ? "agree" : "differ";
  $("strip").replaceChildren(...list.map((other, i) => make("i",
    {className: i === at ? "here" : mark(other), style: `--h:${height(other)}%`})));
  $("place").textContent = list.length ? `${at + 1} / ${list.length}` : "none";
  main.replaceChildren(pair ? card(pair) : "No prompt holds this text.");
  $("said").textContent = blind && pair ? verdict(pair) : "";
}

function leaf(to) { at = Math.max(0, Math.min(list.length - 1, to)); draw(); }

function choose(pair, name) { pair.choice ??= name; draw(); }

function arrange() {
  const text = $("filter").value.toLowerCase();
  list = pairs.filter(pair => pair.prompt.toLowerCase().includes(text)).sort(orders[$("sort").value]);
  leaf(0);
}

function toggle() {
  blind = !blind;
  $("blind").setAttribute("aria-pressed", blind);
  if (blind) { shuffle(); $("sort").value = "random"; }
  arrange();
}

const click = {back: () => leaf(at - 1), next: () => leaf(at + 1), blind: toggle};
for (const id in click) $(id).onclick = click[id];
$("sort").onchange = () => { shuffle(); arrange(); };
$("filter").oninput = arrange;
$("strip").onpointerdown = $("strip").onpointermove = event => {
  const box = $("strip").getBoundingClientRect();
  if (event.buttons) leaf(Math.floor((event.clientX - box.left) / box.width * list.length));
};
document.onkeydown = event => {
  if (event.target.matches("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
  const key = {arrowleft: "back", arrowright: "next", b: "blind"}[event.key.toLowerCase()];
  if (key) click[key]();
  if ("12".includes(event.key)) document.querySelectorAll("button.side")[event.key - 1]?.click();
};
onbeforeprint = () => {
  const was = blind;
  blind = false;
  main.replaceChildren(...list.map(card));
  blind = was;
};
onafterprint = draw;
for (const pair of pairs) pair.coin = Math.random() < 0.5;
document.body.classList.toggle("small", small);
$("about").textContent = about.words;
shuffle();
arrange();
</script>
</body>
</html>
"""


def thumbnail(jpg: bytes, side: int = 384) -> str:
    """An image of at most `side` pixels a side as base64 of a JPEG of some 28 kB at most; tiny ones as they are."""
    image = from_jpeg(jpg)
    if max(image.size) > TINY:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (85, 75, 65, 55, 45, 35):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            jpg = buffer.getvalue()
            if len(jpg) <= 28_000:
                break
    return base64.b64encode(jpg).decode()


def json_number(value: float | None) -> float | str | None:
    """A number as json and JavaScript know it: what is not finite becomes the text that JavaScript's + reads."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def page_pair(split: str, row: dict[str, Any], position: int) -> dict[str, Any]:
    """What the page shows of a pair."""
    pair = {"prompt": row["caption"], "split": split, "stage": row["stage"], "position": position}
    pair |= {"margin": json_number(row["margin"]), "candidates": row["num_candidates"]}
    columns = ("jpg", "score", "source", "seed")
    for i, side in enumerate(("winner", "loser")):
        jpg, score, source, seed = (both_sides(row, name)[i] for name in columns)
        pair[side] = {"jpg": thumbnail(jpg), "score": json_number(score), "source": source, "seed": str(seed)}
    pair["scores"] = [[name, *map(json_number, both)] for name, both in raw_scores(row).items()]
    if len(pair["scores"]) > 1:
        pair["scores"].append(["together", pair["winner"]["score"], pair["loser"]["score"]])
    return pair


def write_page(folder: Path, record: dict[str, Any], count: int = 100) -> None:
    """pairs.html: `count` of the finished pairs, evenly chosen by the seed, to leaf through and to judge blindly.

    All that users wrote goes in as json without "<", and from there into the page as text, never as HTML.
    """
    settings, total = record["settings"], sum(count_pairs(folder).values())
    positions = spread_evenly(total, count, settings["seed"])
    columns = [name for name in PAIR_COLUMNS if not name.startswith("latents")]
    rows = zip(positions, iterate_pairs(folder, columns, positions=positions), strict=True)
    pairs = [page_pair(split, row, position) for position, (split, row) in rows]
    words = f"{len(pairs)} of {total} pairs" if len(pairs) < total else f"{total} pairs"
    model = without_folders(settings["pretrained_model_name_or_path"])
    words += f", scored by {' + '.join(scorer_names(folder))}, of images by {model}"
    content = {"about": {"words": words, "total": total}, "small": max(record["image_size"]) <= TINY, "pairs": pairs}
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    page = PAGE.replace("@DATA@", data)
    replace_file(folder / "pairs.html", lambda part: part.write_text(page, encoding="utf-8"))


# ---- Exports: the same pairs in the formats of others ---------------------------------------------------------------


def file_stem(name: str) -> str:
    """A name as that of a file: nothing but letters, digits, - and _."""
    return re.sub(r"[^\w-]", "_", name)


def iterate_prompts(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Prompt by prompt its split and its finished pairs, without their latents, under a bar."""
    columns = [name for name in PAIR_COLUMNS if not name.startswith("latents")]
    pairs = iterate_pairs(folder, columns)
    with tqdm(total=sum(count_pairs(folder).values()), desc="exporting", unit="pair", smoothing=0.1) as bar:
        for (split, _), group in groupby(pairs, lambda pair: (pair[0], pair[1]["prompt_id"])):
            rows = [row for _, row in group]
            yield split, rows
            bar.update(len(rows))


def write_export(
    folder: Path, part: Path, schema: pa.Schema, to_row: Callable[[dict[str, Any], int], dict[str, Any]]
) -> None:
    """Writes part/data/ with a row to_row(pair, number of its prompt's pairs) for every finished pair of `folder`."""
    (part / "data").mkdir()
    for split, prompts in groupby(iterate_prompts(folder), itemgetter(0)):
        rows = (to_row(pair, len(pairs)) for _, pairs in prompts for pair in pairs)
        with pq.ParquetWriter(split_file(part, split), schema) as writer:
            while some := list(islice(rows, 32)):
                writer.write_table(pa.Table.from_pylist(some, schema))


def export_pickapic(folder: Path, part: Path) -> None:
    """Pick-a-Pic v2's columns and no others."""
    model = without_folders(read_record(folder)["settings"]["pretrained_model_name_or_path"])
    numbers = iter(range(sum(count_pairs(folder).values())))

    def to_row(pair: dict[str, Any], of_this_prompt: int) -> dict[str, Any]:
        row = {name: pair[name] for name in PICKAPIC_COLUMNS if name in pair}
        for side in (0, 1):
            source = pair[f"source_{side}"]
            row[f"image_{side}_uid"] = f"{pair['prompt_id']}-{source}-{pair[f'seed_{side}']}"
            row[f"model_{side}"] = model if source == "generated" else source
        best = winner_first(pair, (row["image_0_uid"], row["image_1_uid"]))[0]
        row |= {"are_different": pair["jpg_0"] != pair["jpg_1"], "has_label": True, "best_image_uid": best}
        return row | {"ranking_id": next(numbers), "num_example_per_prompt": of_this_prompt}

    write_export(folder, part, pa.schema(PICKAPIC_COLUMNS.items()), to_row)


def export_chosen(folder: Path, part: Path) -> None:
    """prompt, chosen, rejected, the images as `datasets.Image`."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"prompt": {"dtype": "string", "_type": "Value"}}
    features |= {name: {"_type": "Image"} for name in ("chosen", "rejected")}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"prompt": pa.string(), "chosen": image, "rejected": image}.items(), metadata=told)

    def to_row(pair: dict[str, Any], _: int) -> dict[str, Any]:
        sides = zip(("chosen", "rejected"), both_sides(pair, "jpg"), strict=True)
        images = {name: {"bytes": jpg, "path": f"{file_stem(pair['prompt_id'])}-{name}.jpg"} for name, jpg in sides}
        return {"prompt": pair["caption"], **images}

    write_export(folder, part, schema, to_row)


def export_folders(folder: Path, part: Path) -> None:
    """SPLIT/NAME/w/1.jpg, SPLIT/NAME/l/1.jpg and the caption in SPLIT/NAME/1.txt; NAME is the prompt's id."""
    for split, pairs in iterate_prompts(folder):
        place = part / split / file_stem(pairs[0]["prompt_id"])
        for side in ("w", "l"):
            (place / side).mkdir(parents=True, exist_ok=True)
        for number, pair in enumerate(pairs, 1 + len(list(place.glob("*.txt")))):
            for side, jpg in zip(("w", "l"), both_sides(pair, "jpg"), strict=True):
                (place / side / f"{number}.jpg").write_bytes(jpg)
            (place / f"{number}.txt").write_text(pair["caption"], encoding="utf-8")


def export_images(folder: Path, part: Path) -> None:
    """All images of the pool as IMAGE_ID.jpg, and metadata.jsonl with file_name, text and image_id."""
    shards = sorted(folder.glob("pool/*.parquet"))
    total = sum(pq.read_metadata(shard).num_rows for shard in shards)
    with (
        tqdm(total=total, desc="exporting", unit="img", smoothing=0.1) as bar,
        (part / "metadata.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for row in chain.from_iterable(read_shard(shard, [*SCORE_COLUMNS, "jpg"]) for shard in shards):
            bar.update()
            if row["jpg"]:
                name = f"{file_stem(image_id(row))}.jpg"
                (part / name).write_bytes(row["jpg"])
                line = {"file_name": name, "text": row["caption"], "image_id": image_id(row)}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


EXPORTS = {"pickapic": export_pickapic, "chosen": export_chosen, "folders": export_folders, "images": export_images}


def export_pairs(folder: Path, kind: str) -> Path:
    """Writes OUTPUT/export-KIND under a temporary name, then puts it in the place of an earlier one."""
    path = folder / f"export-{kind}"
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    EXPORTS[kind](folder, part)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)
    return path


# ---- Main -----------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any]:
    """preference_data.json of a folder of ours: its settings, and the outcome once it is finished."""
    path = folder / "preference_data.json"
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{folder} is not ours (no preference_data.json): choose another --output_dir") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise UserError(f"{path} is damaged: it has no settings")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes preference_data.json."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    replace_file(folder / "preference_data.json", lambda part: part.write_text(text))


def check_folder(folder: Path, settings: dict[str, Any], fixed: Sequence[str], overwrite: bool) -> None:
    """Refuses a folder that is not ours, or that holds a run whose `fixed` settings differ."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output_dir")
    if not folder.exists() or all(path.suffix == ".part" for path in folder.iterdir()):
        return
    old = read_record(folder)["settings"]
    changed = [name for name in fixed if old.get(name) != settings[name]]
    if changed and not overwrite:
        differences = "; ".join(f"{name} was {old.get(name)}, now {settings[name]}" for name in changed)
        ways = "choose another --output_dir or --overwrite it"
        ways += ", or --rescore the kept pool" if set(changed) <= set(CHOICE_SETTINGS) else ""
        raise UserError(f"{folder} holds a run with other settings ({differences}): {ways}")


def prepare_folder(folder: Path, settings: dict[str, Any], inputs: Inputs, overwrite: bool) -> None:
    """Makes the folder, empties it if asked to, and notes settings and prompts before the first image.

    The record of a finished run stays until the next is finished.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            shutil.rmtree(folder / "pool", ignore_errors=True)
            shutil.rmtree(folder / "data", ignore_errors=True)
        if overwrite or not (folder / "preference_data.json").exists():
            write_record(folder, {"settings": settings})
        (folder / "pool").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    for name, lines in (("prompts.txt", inputs.prompts), ("held_out.txt", sorted(inputs.held_out))):
        text = "".join(f"{line}\n" for line in lines)
        replace_file(folder / "pool" / name, lambda part, text=text: part.write_text(text, encoding="utf-8"))


def start_processes() -> PartialState:
    """This process's place among those that `accelerate launch` started, on its GPU if there is one."""
    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # a process may wait long for the slowest one's images


def caption_photos(args: argparse.Namespace) -> None:
    """--caption_model: the main process captions the photos that have no caption; the others wait."""
    folder = Path(args.real_data_dir or args.prompts)
    if not is_photo_folder(folder):
        raise UserError(f"--caption_model needs a folder of photos, and {folder} is none")
    state = start_processes()
    if state.is_main_process:
        write_captions(folder, args.caption_model, state.device, args.batch_size, args.prompt_column)
    state.wait_for_everyone()


class Inputs(NamedTuple):
    """What the images are drawn from."""

    prompts: list[str]
    remarks: list[str]
    photos: dict[str, Callable[[], Image.Image]]  # of the later stages
    winners: dict[str, Winner]
    winners_latents: dict[str, Any] | None  # their shape, type and VAE
    held_out: set[str]  # prompts of the validation split


def read_kept_inputs(args: argparse.Namespace) -> Inputs:
    """--rescore: the prompts as they were noted; of the later stages with their split."""
    try:
        pool = Path(args.output_dir, "pool")
        prompts, held_out = ((pool / name).read_text("utf-8").splitlines() for name in ("prompts.txt", "held_out.txt"))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: this pool cannot be scored again") from error
    if args.stage == "easy":
        held_out = choose_validation(prompts, args.validation_share, args.seed)
    return Inputs(prompts, [], {}, {}, None, set(held_out))


def read_inputs(args: argparse.Namespace) -> Inputs:
    """The prompts; of Normal and Hard those of the stage before that have a photo; that stage gives the size too."""
    if args.rescore:
        return read_kept_inputs(args)
    if args.stage == "easy":
        prompts, remark = read_prompts(args.prompts, args.prompt_column, args.max_prompts)
        held_out = choose_validation(prompts, args.validation_share, args.seed)
        return Inputs(prompts, [remark], {}, {}, None, held_out)
    photos, remark = read_photos(args.real_data_dir, args.prompt_column)
    winners = find_winners(args.previous_pairs)
    prompts = [caption for caption in winners if caption in photos][: args.max_prompts]
    if not prompts:
        raise UserError(
            f"no caption of the photos in {args.real_data_dir} is a prompt of {args.previous_pairs}: "
            "make the easy pairs with --prompts PHOTOS"
        )
    size = from_jpeg(read_winner(winners[prompts[0]])["jpg"]).size
    if (args.width or size[0], args.height or size[1]) != size:
        raise UserError(f"{args.previous_pairs} holds images of {size[0]}x{size[1]}: both sides must be of one size")
    args.width, args.height = size
    told = f"prompts: {len(prompts)} of the {len(winners)} pairs in {args.previous_pairs} have a photo"
    folder = Path(args.previous_pairs)
    before = read_record(folder) if (folder / "preference_data.json").is_file() else {"settings": {}}
    stage, expected = before["settings"].get("stage"), {"normal": "easy", "hard": "normal"}[args.stage]
    if stage not in (None, expected):
        told += f"; note: they are of the stage {stage}, the paper's {args.stage} takes those of {expected}"
    held_out = {caption for caption in prompts if winners[caption].split == "validation"}  # out of training it stays
    return Inputs(prompts, [remark, told], photos, winners, before.get("latents"), held_out)


def tell_long_prompts(args: argparse.Namespace, prompts: list[str]) -> int:
    """How many prompts have more tokens than the model reads; says so, with the first of them."""
    from transformers import AutoTokenizer

    try:
        name, subfolder = args.pretrained_model_name_or_path, "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder, revision=args.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {name}: {str(error).splitlines()[0]}") from error
    found = too_long(prompts, tokenizer)
    if found:
        first = textwrap.shorten(prompts[found[0]], 60)
        tell(f"too long: {len(found)} prompts have more tokens than the model reads, their end is lost: {first!r}")
    return len(found)


def evaluations(args: argparse.Namespace) -> tuple[int, int]:
    """U-Net evaluations for a prompt's pair as set, and of N images in full."""
    each, steps = 2 if args.guidance_scale > 1 else 1, args.num_inference_steps
    if args.stage != "easy":
        count = sum(len(sd_recon_timesteps(t, steps)) for t in args.sdrecon_timesteps)
        return each * count, each * count
    full = args.num_images_per_prompt * steps
    drawn = args.num_images_per_prompt * args.draft_steps + 2 * args.finalists * steps if args.draft_steps else full
    return each * drawn, each * full


def count_words(counts: Counter[str]) -> str:
    """A counter in words."""
    return ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "none"


class Pool(NamedTuple):
    """What is drawn: the drafts, if any, and the images from which the pairs are chosen."""

    drafts: dict[Path, list[str]]
    images: dict[Path, list[str]]
    plan_drafts: Plan
    plan_images: Callable[[], tuple[Plan, Votes]]  # once the drafts are scored


def plan_pool(args: argparse.Namespace, inputs: Inputs, scorers: list[Scorer], agree: list[Scorer]) -> Pool:
    """Easy: N images of each prompt, or N drafts and its finalists. Normal and Hard: the photos' reconstructions."""
    folder, count, easy = Path(args.output_dir), args.num_images_per_prompt, args.stage == "easy"
    per_prompt = (FINALISTS if args.draft_steps else count) if easy else len(args.sdrecon_timesteps) + 1
    images = plan_shards(folder, "images", inputs.prompts, per_prompt)
    drafts = plan_shards(folder, "drafts", inputs.prompts, count) if args.draft_steps else {}
    plan_drafts = partial(plan_candidates, count=count, seed=args.seed, source="draft")
    count_all = partial(count_votes, scorers, agree)
    if args.rescore and not args.refine:
        plan = partial(plan_kept, images=shard_of_prompts(images))
    elif not easy:
        plan = partial(plan_reconstructions, timesteps=args.sdrecon_timesteps, seed=args.seed, winners=inputs.winners)
    elif not args.draft_steps:
        plan = partial(plan_candidates, count=count, seed=args.seed, source="generated")
    else:

        def plan_images() -> tuple[Plan, Votes]:
            votes = count_all(drafts)
            chosen = {"drafts": shard_of_prompts(drafts), "per_side": args.finalists, "votes": votes}
            return partial(plan_finalists, **chosen), votes

        return Pool(drafts, images, plan_drafts, plan_images)
    return Pool({}, images, plan_drafts, lambda: (plan, count_all(images, drafts)))


def prepare_tools(args: argparse.Namespace, device: torch.device, wanted: list[Scorer], inputs: Inputs) -> Tools:
    """The models, each loaded at its first use."""
    pipe = lru_cache(partial(load_sampler, args, device))
    return Tools(
        wanted=wanted,
        scorers=lru_cache(lambda: {scorer: scorer.load(device) for scorer in wanted}),
        pipe=pipe,
        vae_hash=lru_cache(lambda: weights_hash(pipe().vae)),
        model_hash=lru_cache(lambda: same_model(pipe(), Path(args.output_dir))),
        photos=inputs.photos,
        winners=inputs.winners,
        winners_latents=inputs.winners_latents,
    )


def same_model(pipe: DiffusionPipeline, folder: Path) -> str:
    """The weights_hash of what draws; UserError if the images that the folder has were drawn by other weights."""
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    ours = weights_hash(*filter(None, (pipe.components.get(name) for name in parts)))
    shard = next(folder.glob("pool/*.parquet"), None)
    if shard and read_facts(shard).get("model_hash", ours) != ours:
        raise UserError(
            f"the model's weights are not those that drew the images in {folder / 'pool'}: "
            "choose another --output_dir or --overwrite it"
        )
    return ours


def make_pool(pool: Pool, tools: Tools, args: argparse.Namespace, state: PartialState) -> tuple[dict[str, float], str]:
    """Draws and scores all shards, every process its own.

    Returns the images per second of each kind over all processes, and a complaint if this process left out more
    shards of a kind than it finished.
    """
    speeds, complaint = {}, ""
    for kind, shards in (("drafts", pool.drafts), ("images", pool.images)):
        plan = pool.plan_drafts if kind == "drafts" else pool.plan_images()[0]
        shown = tools if kind == "images" else tools._replace(wanted=tools.wanted[: len(args.scorer)])
        done = complete_shards(shards, plan, shown, args, state)
        for path, reason in done.left_out.items():
            print(f"left out: {path.name}, because {reason}; the same command tries it again", file=sys.stderr)
        if 2 * len(done.left_out) > done.shards:
            complaint = f"{len(done.left_out)} of {done.shards} shards of {kind} were left out, told above"
        if done.images:
            speeds[kind] = done.images / done.seconds * state.num_processes
        state.wait_for_everyone()
    return speeds, complaint


def finish(args: argparse.Namespace, pool: Pool, inputs: Inputs, settings: Row, long_prompts: int) -> Row:
    """Keeps best against worst, writes the data set with all that describes it, and returns its record."""
    folder = Path(args.output_dir)
    plan, votes = pool.plan_images()
    verdicts = [(one.margin if one.pair else None, one.reason) for one in choose_all(args, pool.images, plan, votes)]
    dropped = Counter(reason for margin, reason in verdicts if margin is None)
    margins = [margin for margin, _ in verdicts if margin is not None]
    floor = least_margin(args.min_margin, margins)
    kept = [margin for margin in margins if margin >= floor]
    dropped += Counter({"margin below --min_margin": len(margins) - len(kept)})
    if not kept:
        raise UserError(f"no pairs from {len(verdicts)} prompts: {count_words(dropped)}")
    counts = write_pairs(args, pool.images, plan, votes, floor, inputs.held_out)
    draw_pool(args, pool, plan, votes)
    facts = next(read_facts(shard) for shard in pool.images if shard.exists())
    record = {
        "settings": settings,
        "prompts": len(verdicts),
        "long_prompts": long_prompts,
        "images_without_score": count_unscored([*pool.drafts, *pool.images], votes.scorers),
        "pairs": counts,
        "dropped": dropped,
        "gap": summarise_margins(np.array(kept)),
        "unet_evaluations_per_prompt": evaluations(args)[0],
        "image_size": facts["image_size"],
        "latents": None if args.no_latents else facts["latents"],
        **{name: facts.get(name) for name in ("model_hash", "device", "precision")},
        **describe_origin(args),
    }
    write_record(folder, record)
    describe_pairs(folder, record)
    for kind in EXPORTS:
        if kind in args.export or (folder / f"export-{kind}").exists():  # none is stale
            export_pairs(folder, kind)
    return record


def describe_origin(args: argparse.Namespace) -> Row:
    """Where the prompts came from, and the versions of the libraries; --rescore keeps what was noted before."""
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    sources = {name: getattr(args, name) for name in ("prompts", "prompt_column", "max_prompts")}
    origin = {"prompts_from": sources, "versions": versions}
    if args.rescore:
        old = read_record(Path(args.output_dir))
        origin = {name: old.get(name, now) for name, now in origin.items()} | {"rescored_with": versions}
    return origin


def report(args: argparse.Namespace, record: Row, speeds: dict[str, float]) -> list[str]:
    """What came out, in lines."""
    folder, unscored, gap = Path(args.output_dir), record["images_without_score"], record["gap"]
    splits = " and ".join(f"{count} {split}" for split, count in record["pairs"].items())
    lines = [f"pairs      {sum(record['pairs'].values())} of {record['prompts']} prompts: {splits}"]
    lines += [f"dropped    {count_words(record['dropped'])}"]
    if unscored:
        why = "not finite, without photo or given nan by a scorer: used for neither side"
        lines += [f"unscored   {unscored} images, {why}"]
    told = f"median {show(gap['median'])}, 10-90 % {show(gap['10 %'])} to {show(gap['90 %'])}"
    lines += [f"score gap  {told}, by {' + '.join(args.scorer)}"]
    price, full_price = evaluations(args)
    share = f", {price / full_price:.0%} of {args.num_images_per_prompt} full images" if args.draft_steps else ""
    lines += [f"price      {price} U-Net evaluations a prompt{share}"]
    if speeds:
        told = ", ".join(f"{speed:.1f} {kind}/s" for kind, speed in speeds.items())
        lines += [f"speed      {told}, with scoring and writing"]
    lines += [f"memory     {peak_memory()}"]
    lines += [f"look at    {folder / 'pairs.html'}, pairs.png, scores.png and pool.png"]
    exports = [folder / f"export-{kind}" for kind in EXPORTS]
    lines += [f"exported   {path}" for path in exports if path.exists()]
    return [*lines, f"next       {next_command(args)}"]


def tell(*lines: str) -> None:
    """Prints; a reader that has left, as in `| head`, is no error."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def count_unscored(shards: Iterable[Path], scorers: list[Scorer]) -> int:
    """How many images some scorer gave nan, as it gets every image that is not finite."""
    missing = (np.isnan([scores_of(rows, scorer) for scorer in scorers]).any(axis=0) for _, rows in read_pools(shards))
    return int(sum(one.sum() for one in missing))


def next_command(args: argparse.Namespace) -> str:
    """The command that trains on what was made."""
    command = ["accelerate", "launch", "train_dpo_human.py", "--train_data_dir", args.output_dir]
    if WORLD not in Path(args.pretrained_model_name_or_path).resolve().parents:
        command += ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
    if args.stage != "easy":
        command += ["--initial_lora", "LORA_OF_THE_STAGE_BEFORE", "--lambda_stat", "0"]
    return shlex.join(command)


def load_sampler(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """load_pipeline, with a sampler that can do what this stage asks of it."""
    pipe = load_pipeline(args, device)
    most = pipe.scheduler.config.num_train_timesteps
    if args.num_inference_steps > most:
        raise UserError(f"--num_inference_steps {args.num_inference_steps}: the model has {most} timesteps")
    if args.draft_steps and draws_fresh_noise(pipe.scheduler):
        raise UserError(
            f"{type(pipe.scheduler).__name__} draws fresh noise at its steps, so that a draft does not foretell the "
            "full image: set --sampler dpmsolver, or --draft_steps 0 for N full images"
        )
    if args.stage != "easy":  # SDRecon names its timesteps, which samplers with sigmas of their own refuse
        own = dict.fromkeys(OWN_SIGMAS, False)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **own)
    return pipe


def describe_inputs(args: argparse.Namespace, inputs: Inputs) -> Row:
    """The settings that are known once the inputs are read: the prompts and winners as a digest, and the size."""
    before = [
        (inputs.winners[prompt].source, inputs.winners[prompt].seed) for prompt in inputs.prompts if inputs.winners
    ]
    digest = hashlib.sha256(f"{inputs.prompts}{before or ''}".encode()).hexdigest()[:12]
    prompts = f"{len(inputs.prompts)} prompts, sha256 {digest}"
    return {"prompts": prompts, "height": args.height, "width": args.width}


def collect_settings(args: argparse.Namespace) -> Row:
    """What the images and pairs depend on; --rescore keeps the prompts, without --refine also who chose the drafts."""
    settings = {name: getattr(args, name) for name in (*POOL_SETTINGS, *PAIR_SETTINGS)}
    settings |= {"prompts": None, "drafts_chosen_by": args.scorer if args.draft_steps else None}
    if args.rescore:
        old = read_record(Path(args.output_dir))["settings"]
        kept = ["prompts"] if args.refine else ["prompts", "drafts_chosen_by"]
        settings |= {name: old.get(name) for name in kept}
    return settings


def main(args: argparse.Namespace) -> None:
    """Draws and scores the pool, every process its own shards; then the main process keeps best against worst."""
    if args.write_prompts:
        if os.environ.get("RANK", "0") != "0":
            return
        prompts = write_prompts(Path(args.prompts), args.write_prompts, args.seed)
        tell("\n    ".join([f"{len(prompts)} prompts in {args.prompts}, such as", *prompts[:3]]))
        return
    wanted = parse_scorers([*args.scorer, *args.agree])
    if not any(scorer.weight for scorer in wanted[: len(args.scorer)]):
        raise UserError("every --scorer has weight 0: one at least has to vote")
    folder, settings = Path(args.output_dir), collect_settings(args)
    fixed = [name for name in settings if not (args.rescore and name in CHOICE_SETTINGS)]
    early = [name for name in fixed if name not in ("prompts", "height", "width")]
    check_folder(folder, settings, early, args.overwrite)
    check_model(args.pretrained_model_name_or_path, "model_index.json")
    if args.caption_model:
        caption_photos(args)
    inputs = read_inputs(args)
    settings |= {} if args.rescore else describe_inputs(args, inputs)
    check_folder(folder, settings, fixed, args.overwrite)

    state, long_prompts = start_processes(), 0
    state.wait_for_everyone()  # all have seen the folder as it was
    if state.is_main_process:
        tell(*inputs.remarks)
        long_prompts = tell_long_prompts(args, inputs.prompts)
        prepare_folder(folder, settings, inputs, args.overwrite)
    state.wait_for_everyone()

    tools = prepare_tools(args, state.device, wanted, inputs)
    votes, agree = wanted[: len(args.scorer)], wanted[len(args.scorer) :]
    pool = plan_pool(args, inputs, votes, agree)
    speeds, complaint = make_pool(pool, tools, args, state)
    if state.is_main_process:
        try:
            record = finish(args, pool, inputs, settings, long_prompts)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}; the pool is kept, start again to go on") from error
        tell(*report(args, record, speeds))
    state.wait_for_everyone()
    state.destroy_process_group()
    if complaint:
        raise UserError(f"{complaint}: the pairs are of the others alone; the same command tries again")


# ---- Command line ---------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the paper's defaults; without a model those of the embedded world."""
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    flag = parser.add_argument_group("model").add_argument
    flag("--pretrained_model_name_or_path", help="your model: a folder or a hub id; none: the embedded world")
    flag("--revision", help="branch, tag or commit of the hub repository")
    flag("--variant", help="variant of the weight files, e.g. fp16")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="of the U-Net; none: fp16 on CUDA, else no")

    flag = parser.add_argument_group("prompts").add_argument
    flag("--prompts", help=PROMPTS_HELP)
    flag("--prompt_column", help="column of the prompts or captions; none: the first of prompt, caption, text")
    flag("--max_prompts", type=int, help="use only the first of them")
    flag("--write_prompts", type=int, metavar="N", help="write N prompts of people to the file --prompts, and stop")
    flag("--caption_model", help="image-to-text model that captions the photos without caption of a folder")

    flag = parser.add_argument_group("pool").add_argument
    flag("--num_images_per_prompt", type=int, default=24, help="candidates per prompt, of which two become the pair")
    flag("--draft_steps", type=int, help="steps of a draft, 0: all in full; none: 5, or 0 where that spares little")
    flag("--finalists", type=int, default=2, help="so many best and so many worst drafts are drawn in full")
    flag("--num_inference_steps", type=int, default=20, help="steps of a full image")
    flag("--guidance_scale", type=float, default=5.0, help="classifier-free guidance")
    flag("--negative_prompt", default="", help="one for all prompts")
    flag("--sampler", choices=["dpmsolver", "pipeline"], default="dpmsolver", help="the paper's, or the model's own")
    flag("--resolution", type=int, help="height and width in pixels; none: the model's own")
    flag("--height", type=int, help="overrides --resolution")
    flag("--width", type=int, help="overrides --resolution")
    flag("--batch_size", type=int, default=8, help="images drawn at once by a process; no effect on the images")
    flag("--seed", type=int, default=0, help="seed of the images, of the sides and of the split")

    flag = parser.add_argument_group("stages").add_argument
    flag("--stage", choices=["easy", "normal", "hard"], default="easy", help="of the paper's curriculum, see above")
    flag("--real_data_dir", help="normal, hard: photos with captions, a folder or what datasets reads")
    flag("--previous_pairs", help="normal, hard: --output_dir of the stage before")
    flag("--sdrecon_timesteps", type=int, nargs="+", help="none: 400 500 600 700 for normal, 100 for hard")

    flag = parser.add_argument_group("pairs").add_argument
    flag(
        "--scorer",
        nargs="+",
        default=["pickscore"],
        metavar="[WEIGHT*]NAME[=MODEL][,option=value...]",
        help=SCORER_HELP,
    )
    flag("--agree", nargs="*", default=[], metavar="SCORER", help="drop pairs that these scorers order otherwise")
    flag("--min_margin", metavar="GAP", help="drop pairs below it; a number, or as 25%% the quarter of least gap")
    flag("--validation_share", type=float, default=0.1, help="share of the prompts kept out of training")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="human-preferences", help="folder of the data set; a second start carries on")
    flag("--export", nargs="+", choices=EXPORTS, default=[], help="also in these formats, as output_dir/export-*")
    flag("--no_latents", action="store_true", help="do not store latents (training then encodes the images)")
    flag("--discard_drafts", action="store_true", help="keep of the drafts their scores, not their images")
    flag(
        "--rescore",
        action="store_true",
        help="choose pairs anew among the images of the pool, by the flags under pairs",
    )
    flag("--refine", action="store_true", help="with --rescore: draw drafts that newly come to the final in full")
    flag("--overwrite", action="store_true", help="empty the output folder first, if it is one of ours")

    args = parser.parse_args(argv)
    if args.rescore:
        parser.set_defaults(**known_settings(Path(args.output_dir)))
        args = parser.parse_args(argv)
    elif args.pretrained_model_name_or_path is None and args.write_prompts is None:
        use_embedded_world(parser, SCRIPT)
        args = parser.parse_args(argv)
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    if args.draft_steps is None:
        args.draft_steps = 5 if args.stage == "easy" and drafts_spare_much(args) else 0
    if args.sdrecon_timesteps is None:
        args.sdrecon_timesteps = {"easy": [], "normal": [400, 500, 600, 700], "hard": [100]}[args.stage]
    check_args(parser, args)
    return args


def drafts_spare_much(args: argparse.Namespace) -> bool:
    """Whether drafts of 5 steps and their finalists cost at most 70 % of the full pool."""
    count, steps = args.num_images_per_prompt, args.num_inference_steps
    spared = 5 * count + 2 * args.finalists * steps <= 0.7 * count * steps
    return spared and steps >= 10  # 5 of 8 steps spare much of a large pool too, but are no longer a draft


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is loaded."""
    check_numbers(parser, args)
    if args.refine and not args.rescore:
        parser.error("--refine belongs to --rescore")
    if args.rescore and args.overwrite:
        parser.error("--rescore keeps the pool, --overwrite deletes it: choose one")
    check_margin(parser, args.min_margin)
    check_curriculum(parser, args)
    check_drafts(parser, args)


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses numbers out of their range."""
    for name in ("num_inference_steps", "batch_size", "max_prompts", "write_prompts", "height", "width", "finalists"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("height", "width"):
        if (getattr(args, name) or 0) % 8:
            parser.error(f"--{name} {getattr(args, name)} is not a multiple of 8")
    if args.num_images_per_prompt < 2:
        parser.error("--num_images_per_prompt must be at least 2: a pair has a winner and a loser")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if not math.isfinite(args.guidance_scale):
        parser.error("--guidance_scale is not a finite number")
    if not 0 <= args.validation_share < 1:
        parser.error("--validation_share must be at least 0 and below 1")


def check_margin(parser: argparse.ArgumentParser, spec: str | None) -> None:
    """--min_margin is a finite number, or a share of the pairs as in 25%."""
    try:
        number = float((spec or "0").removesuffix("%"))
    except ValueError:
        number = math.nan
    share = (spec or "").endswith("%")
    if not math.isfinite(number) or (share and not 0 <= number < 100):
        parser.error(f"--min_margin {spec}: give a number, or as 25% the share of the pairs to drop")


def check_curriculum(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Easy needs prompts, the later stages photos and the pairs before."""
    if args.stage != "easy":
        check_later_stage(parser, args)
        return
    for name in ("real_data_dir", "previous_pairs", "sdrecon_timesteps"):
        if getattr(args, name):
            parser.error(f"--{name} belongs to --stage normal and hard")
    if args.prompts is None and args.write_prompts:
        parser.error("--write_prompts: set --prompts to the file to write")
    if args.prompts is None:
        parser.error("no prompts: set --prompts to a text file with one prompt per line, or see --help")


def check_later_stage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Normal and Hard need photos, the pairs before and a sampler whose timesteps can be named."""
    for name in ("real_data_dir", "previous_pairs"):
        if getattr(args, name) is None:
            parser.error(f"--stage {args.stage} needs --{name}")
    if Path(args.previous_pairs).resolve() == Path(args.output_dir).resolve():
        parser.error("--output_dir is --previous_pairs: give this stage a folder of its own")
    if args.validation_share != parser.get_default("validation_share"):
        parser.error(f"--validation_share belongs to --stage easy; {args.stage} holds out what the stage before did")
    if args.sampler != "dpmsolver":
        parser.error(f"--stage {args.stage} needs --sampler dpmsolver, whose timesteps can be named")
    if not all(0 < t < 1000 for t in args.sdrecon_timesteps):
        parser.error("--sdrecon_timesteps must lie between 0 and 1000")
    if len(set(args.sdrecon_timesteps)) < len(args.sdrecon_timesteps):
        parser.error("--sdrecon_timesteps names one twice")


def check_drafts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Drafts have to be quicker than what they stand for."""
    if args.draft_steps and args.stage != "easy":
        parser.error("--draft_steps belongs to --stage easy")
    if not 0 <= args.draft_steps < args.num_inference_steps:
        parser.error(f"--draft_steps must be at least 0 and below --num_inference_steps {args.num_inference_steps}")
    if args.draft_steps and 2 * args.finalists > args.num_images_per_prompt:
        parser.error(f"--finalists {args.finalists} on both sides are more than --num_images_per_prompt")


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


def known_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`, as defaults for --rescore."""
    settings = read_record(folder)["settings"]
    prompts = {"prompts": str(folder / "pool" / "prompts.txt"), "max_prompts": None}
    return settings | (prompts if settings["stage"] == "easy" else {})


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
