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
#     "filelock>=3.12,<4",
#     "pandas>=2,<4",
#     "matplotlib>=3.8,<4",
#     "pillow>=10.1,<14",
#     "pyarrow>=16,<27",
#     "numpy>=1.26,<3",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Makes DPO preference pairs from your own text-to-image model, with AI feedback instead of human labels.

HG-DPO (https://arxiv.org/abs/2405.20216). The Easy stage: for every prompt c, a pool of N = 24 images,

    d_i  = sample(model, c, seed_i, few steps)     drafts; seed_i = image_seed(seed, c, i), i = 0 .. N-1
    f    = finalists(score(d_0) .. score(d_N-1))   the two best and the two worst drafts
    x_i  = sample(model, c, seed_i, all steps)     for i in f alone, from the same noise
    pair = best_and_worst(score(x_f))              the winner and the loser

score = ensemble(score_1, score_2, ...): PickScore by default, any number of scorers. The later stages, with a real
photo of each prompt and the pairs of the stage before:

    x_t    = sd_recon(model, photo, t)             the photo noised up to timestep t and denoised again
    Normal = best of x_400 .. x_700 against the Easy winner, where it scores at least as high
    Hard   = x_100, about the photo itself, against the Normal winner

A folder's name says all that its images or scores depend on, and each step makes only what is wanted and not there yet
(`make_missing`): so a run resumes, shares its work and grows, and other scorers, weights and margins take seconds.

    pool/draft-KEY/   pool/full-KEY/   pool/sdrecon-KEY/    images; KEY: the model's content, sampler, size, seed, ...
    scores/SCORER-KEY/                                      their scores; KEY: the scorer's code, options, weights
    data/                                                   the pairs, in the columns of Pick-a-Pic v2

Without arguments it runs on the embedded world (tests/tiny_human) in minutes on a CPU. The usual command:

    accelerate launch make_preference_data.py --pretrained_model_name_or_path YOUR_MODEL --prompts captions.txt \\
        --height 1024 --width 704 --output_dir human-preferences

The output is read by `datasets.load_dataset(folder)`, train_dpo_human.py and every script that reads Pick-a-Pic v2.

To add a scorer, write a function like `clip_score` and name it in SCORERS, or call it by `--scorer your_file.py:name`.
To choose pairs otherwise, edit `best_and_worst` (later stages: `best_against_previous`). With drafts it sees finalists
alone: edit `finalists` too, or set --draft_steps 0.
To draw with another kind of model, write a class like `UNet` and name its pipeline in FAMILIES.
For another export, edit `export_pairs` and name it in --export.

Differences from the paper:
1. Drafts: 24 drafts of 5 steps and 4 images of 20 cost about a quarter of 20 images of 50 steps, with as large a score
   gap. A deterministic sampler orders drafts nearly as it orders full images. `--draft_steps 0` draws all in full.
2. Images are padded to a square before CLIP sees them; the published crop would cut heads and feet off a portrait.
3. Several scorers can vote, each in units of its own spread within a prompt; one with weight 0 only vetoes, by nan.
4. A seeded coin decides which side is jpg_0, and the latents of the sampler are kept, so that training needs no VAE.
5. SDRecon uses the pool's sampler, its strides and guidance (the paper does not say); photos are cut to the size.
"""

from __future__ import annotations

import argparse
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
import random
import re
import shlex
import shutil
import sys
import textwrap
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared CPU cores

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from tqdm.auto import tqdm


if TYPE_CHECKING:  # imported where they are used: a mistake in the command line costs no seconds of imports
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
IMAGES_IN_A_PART = 160  # of a file of the pool: so many are made again after a crash
BYTES_IN_A_FILE = 400e6  # of data/
SPREAD_PROMPTS = 256  # on which the spreads of an ensemble's scorers are measured
PREVIOUS = -1  # the index of the previous stage's winner among a prompt's images


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method -----------------------------------------------------------------------------------------------------


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


def unit_hash(seed: int, prompt: str, purpose: str) -> float:
    """A prompt's number in [0, 1): the coin that says which side is jpg_0, the lot that says which split it joins."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{purpose}".encode()).digest()[:6], "big") / 2**48


def finalists(draft_scores: np.ndarray, per_side: int) -> list[int]:
    """The indices, ascending, of the best and the worst `per_side` of a prompt's drafts, scores (N,): those that are
    worth drawing in full. nan joins neither side."""
    order = np.argsort(draft_scores, kind="stable")[: np.isfinite(draft_scores).sum()].tolist()  # nan comes last
    return sorted({*order[:per_side], *order[-per_side:]})


def pooled_spread(scores: Iterable[np.ndarray]) -> float:
    """A scorer's standard deviation within a prompt, pooled over the prompts; `scores`: each prompt's, (N,)."""
    finite = (one[np.isfinite(one)] for one in scores)
    variances = [one.var(ddof=1) for one in finite if len(one) > 1]
    return math.sqrt(np.mean(variances)) if variances else 0.0


def ensemble(scores: dict[str, np.ndarray], weights: dict[str, float], spreads: dict[str, float]) -> np.ndarray:
    """The weighted sum of the scorers' scores, (N,) each, in units of each one's `pooled_spread`.

    Raw sums would mix scales (PickScore is about 20, others about 1); a global z-score mostly measures how hard a
    prompt is. A single voting scorer keeps its own units. What any scorer vetoes, by nan, is nan, whatever its weight.
    """
    voting = [name for name, weight in weights.items() if weight != 0]
    units = {name: spreads[name] or 1.0 if len(voting) > 1 else 1.0 for name in voting}
    total = sum(weights[name] * scores[name].astype(np.float64) / units[name] for name in voting)
    return np.where(np.isfinite(np.stack([scores[name] for name in weights])).all(axis=0), total, np.nan)


def best_and_worst(scores: np.ndarray) -> tuple[tuple[int, int] | None, str]:
    """Easy: the indices (winner, loser) of the best and the worst of a prompt's scores (N,); or None, and why.

    nan is used for neither side; where all are equal there is no winner.
    """
    if np.isfinite(scores).sum() < 2:
        return None, "less than two images with a score"
    best, worst = int(np.nanargmax(scores)), int(np.nanargmin(scores))
    return ((best, worst), "kept") if scores[best] > scores[worst] else (None, "all scores equal")


def best_against_previous(scores: np.ndarray, previous: int, must_win: bool) -> tuple[tuple[int, int] | None, str]:
    """Normal and Hard: the best of the photo's images against the previous stage's winner, the image `previous`.

    Normal keeps the prompts where it scores at least as high (`must_win`), Hard all of them.
    """
    ours = np.where(np.isfinite(scores), scores, -np.inf)
    ours[previous] = -np.inf
    best = int(ours.argmax())
    if np.isneginf(ours[best]):
        return None, "no image with a score"
    if not np.isfinite(scores[previous]):
        return None, "the previous winner has no score"
    if must_win and scores[best] < scores[previous]:
        return None, "worse than the previous winner"
    return (best, previous), "kept"


def hold_out_prompts(prompts: Sequence[str], share: float, seed: int) -> set[str]:
    """A seeded `share` of the prompts, rounded; at least one if any is asked for, and one at least is left."""
    count = min(max(round(share * len(prompts)), int(share > 0)), len(prompts) - 1)
    return set(sorted(prompts, key=lambda prompt: unit_hash(seed, prompt, "validation"))[:count])


def sd_recon_timesteps(t: int, num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """From t down to 0 in strides as long as those of a full run of `num_inference_steps`."""
    count = max(1, round(num_inference_steps * t / num_train_timesteps))
    return [round(t * (count - i) / count) for i in range(count)]


def sd_recon_sigmas(t: int, sigmas: list[float]) -> list[float]:
    """SDRecon of flow matching: from the sigma that has the signal-to-noise ratio of SD 1.5's schedule at timestep t
    down by the `sigmas` of a full run."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - beta).cumprod(dim=0)[t]
    start = (1 / (1 + (alpha_bar / (1 - alpha_bar)).sqrt())).item()  # (1 - sigma) / sigma = a / s
    return [start, *(sigma for sigma in sigmas if 0 < sigma < start)]


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


# ---- Models and sampling --------------------------------------------------------------------------------------------


OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


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


def draw_with_lora(pipe: DiffusionPipeline, source: str, scale: float) -> None:
    """Draws with a LoRA, a folder, file or hub name, as diffusers loads it. UserError for what would come in part or
    with other strengths: tensors that find no place, a DoRA, a file whose layers have several alphas."""
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    name = "pytorch_lora_weights.safetensors"
    try:
        file = Path(source, name) if Path(source).is_dir() else Path(source)
        file = file if file.is_file() else Path(hf_hub_download(source, name))
        with safe_open(file, "pt") as opened:
            is_dora = any(re.search("dora_scale|magnitude", key) for key in opened.keys())  # noqa: SIM118
        found = pipe.lora_state_dict(str(file))
        pipe.load_lora_weights(str(file), adapter_name="default")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the LoRA {source}: {str(error).splitlines()[0]}") from error
    state, alphas = found if isinstance(found, tuple) else (found, {})
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    lost = len(state) - sum("lora_" in name for module in modules for name, _ in module.named_parameters())
    why = {"it is a DoRA": is_dora, f"{lost} of its {len(state)} tensors find no place": lost}
    why["its layers have several alphas"] = len({float(alpha) for alpha in (alphas or {}).values()}) > 1
    if reasons := [reason for reason, is_so in why.items() if is_so]:
        raise UserError(f"the LoRA {source} cannot be drawn with ({reasons[0]}): merge it into the model's weights")
    pipe.set_adapters(["default"], [scale])


@torch.no_grad()
def load_sampler(args: argparse.Namespace) -> tuple[DiffusionPipeline, UNet, NoisePath, str]:
    """The user's pipeline on the CPU, with its LoRA and sampler, without SD's safety checker; its family, its noise
    path, and a hash of all in it that an image depends on. UserError for what cannot draw this stage."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    name, dtypes = args.pretrained_model_name_or_path, {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes.get(args.mixed_precision or ("fp16" if torch.cuda.is_available() else "no"), torch.float32)
    try:
        config = DiffusionPipeline.load_config(name, revision=args.revision)
        if config["_class_name"] not in FAMILIES:
            raise UserError(f"{name} is a {config['_class_name']}: {', '.join(FAMILIES)} can draw")
        family = FAMILIES[config["_class_name"]]()
        parts = {key: None for key, value in config.items() if isinstance(value, list) and value[0] is None}  # no T5
        if "safety_checker" in config:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        source = {"revision": args.revision, "variant": args.variant}
        pipe = DiffusionPipeline.from_pretrained(
            name, torch_dtype={"default": dtype, "vae": torch.float32}, **source, **parts
        )
    except (OSError, ValueError, SafetensorError) as error:
        hint = " (where all files are fp16, set --variant fp16)" * (isinstance(error, OSError) and not args.variant)
        raise UserError(f"cannot load {name}: {str(error).splitlines()[0]}{hint}") from error
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, family.model)
    says_nothing = "force_upcast" in pipe.vae.config.get("_use_default_values", [])  # SD 1.x's and 2.x's: it holds
    if dtype == torch.float16 and (says_nothing or not pipe.vae.config.force_upcast):
        pipe.vae.to(dtype)  # bf16 is too coarse for pixels
    for module in (denoiser, pipe.vae):
        module.to(memory_format=torch.channels_last)
    if args.lora:
        draw_with_lora(pipe, args.lora, args.lora_scale)

    side = pipe.vae_scale_factor * (getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size)
    args.height, args.width = args.height or args.resolution or side, args.width or args.resolution or side
    if args.height % family.multiple or args.width % family.multiple:
        raise UserError(f"--height {args.height} --width {args.width}: it takes multiples of {family.multiple}")
    args.guidance_scale = family.guidance[1] if args.guidance_scale is None else args.guidance_scale
    path = family.path(pipe, args.height * args.width // family.multiple**2)
    if args.num_inference_steps > len(path.t):
        raise UserError(f"--num_inference_steps {args.num_inference_steps}: the model has {len(path.t)} timesteps")
    if args.sampler == "dpmsolver":
        pipe.scheduler = family.sampler(pipe)
    sampler = {option: value for option, value in pipe.scheduler.config.items() if option[0] != "_"}
    if args.stage != "easy":  # SDRecon names its timesteps, or sigmas: with none of the sampler's own, and not shifted
        own = dict.fromkeys(OWN_SIGMAS, False) | {"use_dynamic_shifting": False, "shift": 1.0}
        own = {option: value for option, value in own.items() if option in pipe.scheduler.config}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **own)
    modules = [part for _, part in sorted(pipe.components.items()) if isinstance(part, torch.nn.Module)]
    tokenizers = [part for name, part in sorted(pipe.components.items()) if "tokenizer" in name and part]
    words = [sorted(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "lora_A")]
    strengths = [layer.scaling["default"] for layer in layers if "default" in layer.scaling]
    own = [pipe.vae.config.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    own += [pipe.config.get("force_zeros_for_empty_prompt"), words, type(pipe.scheduler).__name__, sampler, str(dtype)]
    key = hash_of(weights_hash(*modules), strengths or None, own)
    return pipe, family, path, key


def draft_sampler(scheduler: Any, num_inference_steps: int) -> Any:
    """UniPC (https://arxiv.org/abs/2302.04867), good in few steps, on the schedule of a `scheduler` of DDPM's kind,
    from where its full run begins; a flow's own sampler.

    A deterministic sampler solves the same equation from the same noise, so a draft foretells the full image of any.
    """
    from diffusers import UniPCMultistepScheduler

    if "beta_schedule" not in scheduler.config:
        return scheduler
    scheduler.set_timesteps(num_inference_steps)
    start = round(float(scheduler.timesteps[0])) + 1
    whole = scheduler.config.get("rescale_betas_zero_snr", False) and start == len(scheduler.betas)
    options = {"num_train_timesteps": start, "trained_betas": scheduler.betas[:start].tolist()}
    options |= {"timestep_spacing": "trailing", "lower_order_final": True, "rescale_betas_zero_snr": whole}
    return UniPCMultistepScheduler.from_config(scheduler.config, **options, **dict.fromkeys(OWN_SIGMAS, False))


def draws_fresh_noise(scheduler: Any) -> bool:
    """Whether a sampler draws noise at its steps: then a draft foretells nothing of the full image."""
    kind = f"{type(scheduler).__name__} {scheduler.config.get('algorithm_type')}".lower()
    return bool(re.search("ancestral|sde|ddpm|sasolver", kind)) or scheduler.config.get("stochastic_sampling", False)


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


@torch.inference_mode()
def sd_recon(
    pipe: DiffusionPipeline, family: UNet, path: NoisePath, text: dict[str, Tensor], rows: Sequence[int],
    seeds: Sequence[int], x_0: Tensor, t: int, num_inference_steps: int, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Photos, x_0 (B, C, h, w), noised up to timestep t and denoised again by the model: z_t = a x_0 + s noise.

    A small t keeps the photo, a large one leaves its composition; 0 < t < 1000 on SD 1.5's schedule, or the same
    signal-to-noise ratio of a flow. As `sample` otherwise.
    """
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    if path.kind == "flow":
        full = path.s.flip(0)[:: max(1, len(path.s) // num_inference_steps)]
        steps = {"sigmas": sd_recon_sigmas(t, full.tolist())}
        a, s = 1 - steps["sigmas"][0], steps["sigmas"][0]
    else:
        steps = {"timesteps": sd_recon_timesteps(t, num_inference_steps, pipe.scheduler.config.num_train_timesteps)}
        a, s = path.a[t].item(), path.s[t].item()
    z_t = (a * x_0 + s * noise.to(x_0.device)).to(getattr(pipe, family.model).dtype)
    return sample(pipe, family, text, rows, seeds, latents=family.pack(pipe, z_t), **steps, **options)


# ---- The pool: rows in parts, each made once ------------------------------------------------------------------------
# `rows` is a table of the images that are wanted: image_id (names all that it depends on), prompt (its number), number
# (among the prompt's images), seed, source (draft, generated, sdrecon-400, ...), and of SDRecon t and photo.


POOL_COLUMNS = {"image_id": pa.string(), "caption": pa.string(), "index": pa.int64(), "source": pa.string()}
POOL_COLUMNS |= {"seed": pa.int64(), "jpg": pa.binary(), "latents": pa.binary()}  # no jpg: the image is not finite


def read_parts(files: Iterable[Path | str], *columns: str) -> pa.Table:
    """image_id and some other columns of parts, and the `file` of each row; UserError for a damaged part."""
    files = sorted(map(str, files))
    if not files:
        return pa.table({name: pa.array([], pa.string()) for name in ("image_id", *columns, "file")})
    try:
        table = pads.dataset(files).to_table(columns=["image_id", *columns, "__filename"])
    except (pa.ArrowException, OSError) as error:
        advice = "delete the damaged part, and the same command makes it anew"
        raise UserError(f"cannot read {Path(files[0]).parent}: {str(error).splitlines()[0]}; {advice}") from error
    return table.rename_columns(["image_id", *columns, "file"])


def look_up(image_ids: pd.Series, table: pa.Table) -> np.ndarray:
    """The numbers of the rows of `table` with these image_ids, (N,), -1 where there is none. In Arrow, as millions of
    names are too many for an index of pandas."""
    found = pc.index_in(pa.array(image_ids, pa.string()), value_set=table["image_id"].combine_chunks())
    return found.fill_null(-1).to_numpy(zero_copy_only=False)


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


def make_missing(
    rows: pd.DataFrame, folder: Path, make: Callable[[pd.DataFrame, tqdm], pa.Table], what: str, state: PartialState,
    by: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The one rule of every step: the rows wanted, less the rows that the folder's parts hold, are the parts to make.

    The main process looks and tells the others where the rows lie; each process makes every K-th part. A part has the
    missing among IMAGES_IN_A_PART rows, or those that are alike in `by`. Returns the file of each row, (N,); UserError
    where a part is not there when all are done.
    """
    from accelerate.utils import broadcast_object_list

    plan = [None]
    if state.is_main_process:
        table = read_parts(folder.glob("[!.]*.parquet"))
        places = table["file"].dictionary_encode().combine_chunks()
        codes = np.append(places.indices.to_numpy(), -1)[look_up(rows.image_id, table)]
        plan = [(codes, places.dictionary.to_pylist())]
    codes, names = broadcast_object_list(plan)[0]
    files, by = np.array([*names, None], object)[codes], np.arange(len(rows)) // IMAGES_IN_A_PART if by is None else by
    missing, parts = codes < 0, {}
    for _, at in pd.Series(np.flatnonzero(missing)).groupby(by[missing], sort=False):
        part = rows.iloc[at]
        path = folder / f"{hash_of(part.image_id.tolist())}.parquet"
        parts[path], files[at] = part, str(path)
    if state.is_main_process and parts:
        here = f"{(~missing).sum()} of {len(rows)} images are here"
        print(f"{what:<10} {here}, {missing.sum()} to go in {len(parts)} parts", flush=True)
    mine = list(parts.items())[state.process_index :: state.num_processes]
    with progress(sum(len(part) for _, part in mine), state, what, "img") as bar:
        for path, part in mine:
            write_whole(path, partial(pq.write_table, make(part, bar)))
    state.wait_for_everyone()
    for _ in range(30):  # folders of a network may lag
        if not (lost := [path for path in parts if not path.is_file()]):
            return files
        time.sleep(1)
    raise UserError(f"{len(lost)} parts are not there, such as {lost[0]}: do all processes see this folder?")


def progress(total: int, state: PartialState, what: str, unit: str) -> tqdm:
    """A bar for this process's share of the work; only the main process shows its own."""
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    hidden = not (total and state.is_main_process)
    return tqdm(total=total, desc=what + share, unit=unit, smoothing=0.1, disable=hidden)


def rows_of_prompts(prompts: Sequence[str], count: int, seed: int) -> pd.DataFrame:
    """The table `rows` of `count` images a prompt, which differ in their seeds; image_id lacks the pool's key."""
    table = pd.DataFrame({"prompt": np.repeat(np.arange(len(prompts)), count)})
    table["number"] = np.tile(np.arange(count), len(prompts))
    names = [prompt_id(prompt) for prompt in prompts]
    table["image_id"] = [f"{names[p]}-{number}-" for p, number in zip(table.prompt, table.number, strict=True)]
    table["seed"] = [image_seed(seed, prompts[p], i) for p, i in zip(table.prompt, table.number, strict=True)]
    return table.assign(source="generated", t=0, photo=None)


def rows_of_photos(table: pd.DataFrame, timesteps: Sequence[int], seed: int, key: str) -> pd.DataFrame:
    """The table `rows` of the later stages: of each prompt the winner of the stage before, and a reconstruction of its
    photo from every timestep."""
    numbers, names = np.arange(len(table)), table.prompt.map(prompt_id)
    tables = [table.assign(prompt=numbers, number=PREVIOUS, t=0, photo=None)]
    for number, t in enumerate(timesteps):
        own = pd.DataFrame({"prompt": numbers, "number": number, "t": t, "source": f"sdrecon-{t}"})
        own["photo"] = table.photo.astype(object)
        own["image_id"] = [f"{name}-{t}-{photo}-{key}" for name, photo in zip(names, table.photo_id, strict=True)]
        own["seed"] = [image_seed(seed, prompt, t) for prompt in table.prompt]
        tables.append(own)
    return pd.concat(tables).sort_values(["prompt", "number"], kind="stable", ignore_index=True)


def prompt_id(prompt: str) -> str:
    """A prompt's name in ids and files."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def to_jpeg(image: Image.Image) -> bytes:
    """Quality 95, no chroma subsampling: the same codec for winners and losers."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def from_jpeg(data: bytes) -> Image.Image:
    """Decodes what to_jpeg encoded."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@torch.inference_mode()
def draw_part(
    part: pd.DataFrame, bar: tqdm, prompts: Sequence[str], pipe: DiffusionPipeline, family: UNet, path: NoisePath,
    args: argparse.Namespace, device: torch.device,
) -> pa.Table:  # fmt: skip
    """The images of some of `rows`, as the pool keeps them; JPEGs are made beside the next batch."""
    pipe.to(device)
    steps = {family.guidance[0]: args.guidance_scale}
    steps["num_inference_steps"] = args.draft_steps if part.source.iloc[0] == "draft" else args.num_inference_steps
    order, size = part.prompt.unique().tolist(), (args.height, args.width)
    text = encode_prompts(pipe, family, [prompts[p] for p in order], args.negative_prompt, args.guidance_scale > 1)
    part = part.assign(caption=[prompts[p] for p in part.prompt], index=part.number)

    def encode(photo: Any) -> Tensor | None:
        """A photo's latents (1, C, h, w): filled to the size, cut around the upper centre, where heads are."""
        try:
            image = ImageOps.fit(read_image(Path(photo)), size[::-1], centering=(0.5, 0.2))
        except Exception as error:  # Pillow's plugins raise all kinds
            tqdm.write(f"left out   the photo {photo}: {type(error).__name__}: {error}", file=sys.stderr)
            return None
        return family.to_latents(pipe, pipe.image_processor.preprocess(image))

    def to_rows(batch: pd.DataFrame, images: list[Image.Image], finite: list[bool], latents: Tensor) -> list[dict]:
        rows = batch.to_dict("records")
        for row, image, is_finite, latent in zip(rows, images, finite, latents, strict=True):
            if is_finite:
                row["jpg"] = to_jpeg(image)
                row["latents"] = None if args.no_latents or row["source"] == "draft" else latent.numpy().tobytes()
        return rows

    photos = {photo: encode(photo) for photo in part.photo.dropna().unique()}
    unreadable = part.photo.isin([photo for photo, latents in photos.items() if latents is None])
    bar.update(unreadable.sum())
    batches = []
    with ThreadPoolExecutor(1) as beside:
        for t, alike in part[~unreadable].groupby("t", sort=False):
            for start in range(0, len(alike), args.batch_size):
                batch = alike[start : start + args.batch_size]
                common = (text, [order.index(p) for p in batch.prompt], batch.seed.tolist())
                try:
                    if t:
                        x_0 = torch.cat([photos[photo] for photo in batch.photo])
                        options = {"height": size[0], "width": size[1], **steps}
                        pixels, latents = sd_recon(pipe, family, path, *common, x_0, t, **options)
                    else:
                        pixels, latents = sample(pipe, family, *common, *size, **steps)
                except torch.OutOfMemoryError as error:
                    raise UserError(f"out of memory: set --batch_size below {args.batch_size}") from error
                finite = pixels.isfinite().flatten(1).all(dim=1).tolist()
                images = pipe.image_processor.postprocess(pixels.nan_to_num(), output_type="pil")
                batches.append(beside.submit(to_rows, batch, images, finite, latents.cpu()))
                bar.update(len(batch))
    rows = [row for batch in batches for row in batch.result()] + part[unreadable].to_dict("records")
    return pa.Table.from_pylist(rows, pa.schema(POOL_COLUMNS.items()))


def previous_winners(folder: Path) -> pd.DataFrame:
    """The winner of each caption of a stage's folder: prompt, image_id, source, seed, split and the file of the pool
    where the image lies; ties are left out. UserError for what is no stage's output."""
    names, files = ("image_id", "source", "seed"), sorted(folder.glob("data/*.parquet"))
    columns = ["caption", *(f"{name}_{side}" for name in (*names, "label") for side in (0, 1))]
    if not files:
        raise UserError(f"--previous_pairs {folder}: no data/*.parquet; give the output folder of the stage before")
    try:
        tables = [pq.read_table(file, columns=columns).to_pandas() for file in files]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--previous_pairs {folder} is no stage's output: {str(error).splitlines()[0]}") from error
    splits = [file.name.partition("-")[0] for file in files]
    table = pd.concat([table.assign(split=split) for table, split in zip(tables, splits, strict=True)])
    table = table[table.label_0 != table.label_1].rename(columns={"caption": "prompt"})
    for name in names:
        table[name] = table[f"{name}_0"].where(table.label_0 > table.label_1, table[f"{name}_1"])
    table = table.drop_duplicates("prompt", ignore_index=True)
    pool = read_parts([*folder.glob("pool/full-*/[!.]*.parquet"), *folder.glob("pool/sdrecon-*/[!.]*.parquet")])
    at = look_up(table.image_id, pool)
    if lost := (at < 0).sum():
        raise UserError(f"--previous_pairs {folder}: {lost} of its {len(table)} winners are not in its pool/")
    return table.assign(file=pool["file"].take(at).to_pylist())[["prompt", "split", "file", *names]]


# ---- Scorers --------------------------------------------------------------------------------------------------------
# A scorer is a function factory(device, **options) -> score(images, prompts) -> one float per image, higher is better.
# nan or None is a veto: the image counts for neither side. Your own: module:factory or path/to/file.py:factory;
# file.jsonl: scores made elsewhere. An option has the type of its default. A factory with a parameter `columns` gets
# {prompt: its row of the prompts' file}.

Score = Callable[[list[Image.Image], list[str]], list[float]]
Device = torch.device | str
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSORS = {"yuvalkirstain/PickScore_v1": CLIP_H, "adams-story/HPSv2-hf": CLIP_H}  # of all others: the model's own


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
# The options of these that name weights, and the file by which they are found on the hub.
WEIGHTS = {"model": "config.json", "processor": "config.json", "head": "model.safetensors"}


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


# ---- Scoring --------------------------------------------------------------------------------------------------------


def scores_folder(folder: Path, scorer: Scorer) -> Path:
    """Where a scorer's scores lie."""
    return folder / "scores" / f"{re.sub('[^A-Za-z0-9_.-]', '_', scorer.label)}-{scorer.key}"


def score_missing(
    rows: pd.DataFrame, files: np.ndarray, scorer: Scorer, args: argparse.Namespace, state: PartialState
) -> np.ndarray:
    """A scorer's scores of all images (N,), nan where it gave none. Those that are missing are scored by the stored
    `files`; the scorer is loaded if there are any, and let go after."""
    folder = scores_folder(Path(args.output_dir), scorer)
    rows = rows.assign(stored=rows.image_id)
    if scorer.rows is not None:  # then a score is of the image and of its prompt's row
        row_hashes = np.array([f"-{hash_of(str(row))}" for row in scorer.rows.values()], object)
        rows["image_id"] += row_hashes[rows.prompt]
    loaded: list[Score] = []

    def make(part: pd.DataFrame, bar: tqdm) -> pa.Table:
        if not loaded:
            loaded.append(scorer.load(state.device))
            known = getattr(loaded[0], "image_ids", None)
            unknown = rows.stored[~rows.stored.isin(list(known))].tolist() if known is not None else []
            if unknown:
                told = f"no score for {len(unknown)} of {len(rows)} images, such as {unknown[0]}"
                raise UserError(f"{scorer.label} has {told}: give them one, or null, or add ,missing=veto")
        table = pq.read_table(files[part.index[0]], columns=["image_id", "caption", "jpg"])
        stored = {row["image_id"]: row for row in table.to_pylist()}
        finite = part[[stored[name]["jpg"] is not None for name in part.stored]]
        scores = pd.Series(np.float32(math.nan), index=part.image_id)  # of an image that is not finite
        for start in range(0, len(finite), args.batch_size):
            batch = finite[start : start + args.batch_size]
            images = list(beside.map(from_jpeg, [stored[name]["jpg"] for name in batch.stored]))
            for image, name in zip(images, batch.stored, strict=True):
                image.info["image_id"] = name
            captions = [stored[name]["caption"] for name in batch.stored]
            values = [math.nan if value is None else float(value) for value in loaded[0](images, captions)]
            if len(values) != len(batch):
                raise UserError(f"scorer {scorer.label} gave {len(values)} scores for {len(batch)} images")
            scores[batch.image_id] = values
            bar.update(len(batch))
        bar.update(len(part) - len(finite))
        return pa.table({"image_id": part.image_id.tolist(), "score": scores.to_numpy()})

    with ThreadPoolExecutor() as beside:
        parts = make_missing(rows, folder, make, scorer.label, state, files)
    loaded.clear()
    gc.collect()  # hooks of large models refer to each other
    torch.cuda.empty_cache()
    table = read_parts(set(parts), "score")
    scores = table["score"].to_numpy()[look_up(rows.image_id, table)]
    return np.where(np.isfinite(scores), scores, np.float32(math.nan))


def vote(scores: dict[str, np.ndarray], scorers: list[Scorer], spreads: dict[str, float]) -> np.ndarray:
    """The ensemble's scores (N,) of images that each scorer has scored, (N,) each."""
    weights = {one.label: one.weight for one in scorers}
    return ensemble({label: scores[label] for label in weights}, weights, spreads)


def measure_spreads(
    rows: pd.DataFrame, scores: dict[str, np.ndarray], scorers: list[Scorer], pool: str, record: dict[str, Any]
) -> dict[str, float]:
    """Each voting scorer's `pooled_spread` over the first SPREAD_PROMPTS prompts: measured once for a pool and kept in
    the record, so that a larger pool does not move old choices. One that votes alone needs none."""
    voting = [scorer for scorer in scorers if scorer.weight]
    if len(voting) == 1:
        return {}
    groups = rows[rows.prompt < SPREAD_PROMPTS].groupby("prompt", sort=False).indices.values()
    kept = record.setdefault("spreads", {})
    names = {scorer.label: f"{scorer.label}-{scorer.key} on {pool}" for scorer in voting}
    for label, name in names.items():
        kept[name] = kept[name] if name in kept else pooled_spread(scores[label][at] for at in groups)
    return {label: kept[name] for label, name in names.items()}


# ---- Pairs ----------------------------------------------------------------------------------------------------------


PAIR_COLUMNS = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64()}
PAIR_COLUMNS |= {"caption": pa.string()}  # so far Pick-a-Pic v2
PAIR_COLUMNS |= {"score_0": pa.float64(), "score_1": pa.float64(), "scores": pa.string(), "margin": pa.float64()}
PAIR_COLUMNS |= {"seed_0": pa.int64(), "seed_1": pa.int64(), "source_0": pa.string(), "source_1": pa.string()}
PAIR_COLUMNS |= {"image_id_0": pa.string(), "image_id_1": pa.string()}
PAIR_COLUMNS |= {"latents_0": pa.binary(), "latents_1": pa.binary()}
PAIR_COLUMNS |= {"prompt_id": pa.string(), "stage": pa.string(), "num_candidates": pa.int64()}
SPLITS = ("train", "validation")


def best_pairs(
    rows: pd.DataFrame, totals: np.ndarray, agree: dict[str, np.ndarray], prompts: Sequence[str],
    args: argparse.Namespace,
) -> tuple[pd.DataFrame, Counter[str]]:
    """The pairs of all prompts, a table with the columns prompt, winner and loser (numbers of `rows`) and margin;
    and how many prompts have none, by reason. Every scorer of `agree`, scores (N,), must order a pair alike."""
    pairs, dropped, is_previous = [], Counter(), (rows.number == PREVIOUS).to_numpy()
    groups = rows.groupby("prompt", sort=False).indices
    for number in range(len(prompts)):
        at = groups.get(number, np.empty(0, int))
        if args.stage == "easy":
            pair, reason = best_and_worst(totals[at])
        else:
            previous = int(is_previous[at].argmax())
            pair, reason = best_against_previous(totals[at], previous, must_win=args.stage == "normal")
        for label, scores in agree.items() if pair else ():
            winner, loser = scores[at[list(pair)]]
            if not winner > loser:
                pair, reason = None, f"{label} {'gave no score' if np.isnan(winner + loser) else 'disagrees'}"
                break
        if pair is None:
            dropped[reason] += 1
        else:
            winner, loser = at[list(pair)].tolist()
            pairs.append((number, winner, loser, float(totals[winner] - totals[loser])))
    pairs = pd.DataFrame(pairs, columns=["prompt", "winner", "loser", "margin"])
    if args.min_margin is not None and len(pairs):
        share = float(args.min_margin[:-1]) / 100 if args.min_margin.endswith("%") else None
        floor = float(args.min_margin) if share is None else np.quantile(pairs.margin, share, method="lower")
        dropped["margin below --min_margin"] = int((pairs.margin < floor).sum())
        pairs = pairs[pairs.margin >= floor]
    return pairs.reset_index(drop=True), +dropped


def write_pairs(
    folder: Path, pairs: pd.DataFrame, rows: pd.DataFrame, files: np.ndarray, totals: np.ndarray,
    scores: dict[str, np.ndarray], prompts: Sequence[str], args: argparse.Namespace, state: PartialState,
) -> None:  # fmt: skip
    """Writes the pairs of each split as SPLIT-00000-of-00004.parquet, ... of about BYTES_IN_A_FILE, each process its
    share. A seeded coin says which side is jpg_0."""
    schema = pa.schema([one for one in PAIR_COLUMNS.items() if not (args.no_latents and "latents" in one[0])])
    winners = set(files[pairs.winner[:1000]])
    size_of_a_pair = 2 * max(os.path.getsize(file) / pq.read_metadata(file).num_rows for file in winners)
    tasks = []
    for split, of_split in pairs.groupby("split"):
        count = math.ceil(len(of_split) * size_of_a_pair / BYTES_IN_A_FILE)
        for number, at in enumerate(np.array_split(np.arange(len(of_split)), count)):
            tasks.append((folder / f"{split}-{number:05d}-of-{count:05d}.parquet", of_split.iloc[at]))

    def pair_row(pair: Any) -> dict[str, Any]:
        prompt = prompts[pair.prompt]
        sides = (pair.winner, pair.loser)
        sides = sides if unit_hash(args.seed, prompt, "side") < 0.5 else sides[::-1]
        raw = {label: [float(values[i]) for i in sides] for label, values in scores.items()}
        raw = {label: [one if math.isfinite(one) else None for one in both] for label, both in raw.items()}
        row = {"caption": prompt, "scores": json.dumps(raw), "margin": pair.margin, "prompt_id": prompt_id(prompt)}
        count = args.num_images_per_prompt if args.stage == "easy" else len(args.sdrecon_timesteps)
        row |= {"stage": args.stage, "num_candidates": count}
        for side, i in enumerate(sides):
            image = read_images(files[i])[rows.image_id[i]]
            row |= {f"{name}_{side}": image[name] for name in ("jpg", "seed", "source", "image_id", "latents")}
            row |= {f"label_{side}": float(i == pair.winner), f"score_{side}": float(totals[i])}
        return row

    def write(path: Path, of_file: pd.DataFrame) -> None:
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, len(of_file), 64):
                batch = [pair_row(pair) for pair in of_file[start : start + 64].itertuples()]
                writer.write_table(pa.Table.from_pylist(batch, schema))
                bar.update(len(batch))

    mine = tasks[state.process_index :: state.num_processes]
    with progress(sum(len(of_file) for _, of_file in mine), state, "pairs", "pair") as bar:
        for path, of_file in mine:
            write_whole(path, partial(write, of_file=of_file))


@lru_cache(maxsize=4)
def read_images(file: str) -> dict[str, dict[str, Any]]:
    """The images of a file of the pool by image_id, kept for the next pairs."""
    return {row["image_id"]: row for row in pq.read_table(file).to_pylist()}


# ---- Prompts and photos ---------------------------------------------------------------------------------------------


CAPTION_COLUMNS = ("prompt", "caption", "text")
NO_PHOTOS = {".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf", ".palm"}  # that Pillow knows
COMPANIONS = re.compile(r"(-masklabel|\.mask|_mask)\.|@eaDir|__MACOSX|/\.")  # images that belong to photos


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


def check_photo(photo: str, height: int, width: int) -> str:
    """A hash of a photo's size in bytes and of 4 kB in its middle; or, in words, why it is left out."""
    try:
        with open(photo, "rb") as file:
            image = Image.open(file)
            size = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size  # it lies on its side
            size_in_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_in_bytes // 2 - 2048))
            digest = hashlib.sha256(b"%d|" % size_in_bytes + file.read(4096)).hexdigest()[:8]
    except Exception:  # Pillow's plugins raise all kinds
        return "cannot be read"
    return "would be enlarged more than 1.5 times" if max(width / size[0], height / size[1]) > 1.5 else digest


# ---- Prompts of people ----------------------------------------------------------------------------------------------

# A grammar of prompts: items of a scene by key; the first block holds for every scene that does not say otherwise.
# A place has a seat after @; {still} stands or sits there; {suit} a suit or dress. Actions begin with the pose.
GRAMMAR = """
  age: young; middle-aged; elderly; little
  gender: woman girl her; man boy his; woman girl her; man boy his; woman girl her; man boy his; person child their
  origin: Black, coily black, braided black; white, wavy blond, straight brown, curly red; East Asian, straight black
    South Asian, long black, wavy black; Southeast Asian, straight black, wavy black; Polynesian, wavy black
    Middle Eastern, wavy black, curly brown; Latin American, wavy brown, curly black; Native American, straight black
  colour: red; yellow; orange; green; blue; purple; pink; white; black; grey; brown; beige
  light: in soft light; in warm light; in bright even light; with strong light from one side; with soft shadows
  hands: {still} and waving with {their} right hand; {still} and crossing {their} arms; {still} and making a peace sign
    {still} and forming a heart with both hands; {still} and clapping {their} hands; {still} and pointing to one side
  face: resting {their} chin on one hand; holding a phone to {their} ear; shading {their} eyes with one hand
where: in a snow-covered park @ on a bench; beside a frozen lake @ on a log; in a snowy village @ on a low wall
  wears: a {c} winter coat and boots; a {c} padded jacket and warm trousers; a {c} parka and a woollen hat
  alone: walking and pulling a sled by its rope; jumping with both arms raised; crouching and shaping a snowball
  group: walking arm in arm; standing close together and holding steaming mugs; kneeling and building a snowman
where: in a sunny park @ on a bench; on a seaside promenade @ on a low wall; on a tree-lined square @ in a wheelchair
  wears: a {c} T-shirt and jeans; a {c} linen shirt and light trousers; a {c} summer {suit} and sandals
  alone: riding a bicycle; walking a small dog on a lead; running with a kite; {still} and eating an apple
  group: walking hand in hand; sitting side by side and sharing a picnic; running and throwing a ball to each other
where: in a bright kitchen @ at the table; in a farmhouse kitchen @ on a wooden chair; in a small bakery @ on a stool
  wears: a {c} shirt and a white apron; a {c} sweater and jeans; a {c} T-shirt and a striped apron
  alone: standing and kneading dough with both hands; {still} and peeling an orange; walking with a tray of buns
  group: standing side by side and kneading dough; sitting together and sharing a bowl of cherries; dancing together
where: on a concert stage @ on a chair; in a music room @ on a stool; in a dance studio @ in a wheelchair
  wears: a {c} shirt and black trousers; a {c} velvet jacket and dark trousers; a {c} {suit} and flat shoes
  alone: dancing with one arm raised; {still} and playing the violin; {still} and playing an acoustic guitar
  group: dancing and holding hands; standing side by side and playing violins; sitting together and playing guitars
where: in a carpenter's workshop @ on a stool; in a tidy garage @ on a crate; in a boatbuilder's shed @ on a trestle
  age: young; middle-aged; elderly
  wears: a {c} work shirt and a leather apron; a {c} boiler suit and boots; a {c} work jacket and dark trousers
  alone: walking with a ladder on one shoulder; {still} and sanding a chair leg; kneeling and sawing a plank
  group: walking and carrying a long plank; standing together and pointing at a plan; kneeling and painting a boat"""
PROMPT_BLOCKS = [re.findall(r"(\w+): ((?:.+|\n    )+)", block) for block in re.split(r"\n(?=where)", GRAMMAR)]
EVERYWHERE, *SCENES = ({key: re.split(r"; |\n +", items) for key, items in block} for block in PROMPT_BLOCKS)
CASTS = {("face", 1): 6, ("hands", 1): 12, ("alone", 1): 12, ("group", 2): 15, ("group", 3): 10}  # in 55 prompts
SHOTS = {"close-up": ["close-up"], "standing": ["full-body", "half-body"], "sitting": ["full-body", "half-body"]}


def draw_person(rng: random.Random, scene: dict[str, list[str]], kind: str) -> tuple[str, str]:
    """Someone dressed for the scene, and what they do there; `kind` is the key of what they do."""
    drawn = {key: rng.choice(items) for key, items in scene.items()}
    age, (origin, *hair), (adult, child, their) = drawn["age"], drawn["origin"].split(", "), drawn["gender"].split()
    clothes = drawn["wears"].format(c=drawn["colour"], suit="dress" if their == "her" else "suit")
    looks = f" with {'grey' if age == 'elderly' else rng.choice(hair)} hair," if kind != "group" else ""
    clothes = clothes.split(" and ")[0] if kind in ("face", "group") else clothes
    place, seat = drawn["where"].split(" @ ")
    action = drawn[kind].format(their=their, still=rng.choice(("standing", f"sitting {seat}")))
    return f"a {age} {origin} {child if age == 'little' else adult}{looks} in {clothes}", f"{action} {place}"


def human_prompts(count: int, seed: int) -> pd.DataFrame:
    """`count` distinct prompts, the first ones the same for any count; columns prompt, people (how many) and pose (in
    one word: standing, dancing ..., or close-up where only head and shoulders are in view)."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        ((kind, people),) = rng.choices(list(CASTS), CASTS.values())
        scene = EVERYWHERE | rng.choice(SCENES)
        *first, (last, action) = (draw_person(rng, scene, kind) for _ in range(people))
        who = f"{', '.join(text for text, _ in first)} and {last}" if first else last
        pose = "close-up" if kind == "face" else action.split()[0]
        shot = rng.choice(SHOTS.get(pose, ["full-body"]))
        text = rng.choice((f"a {shot} photo of {who}, {action}", f"{who}, {action}, {shot} photo"))
        prompt = re.sub(r"\ba(?= [aeiou])", "an", f"{text}, {rng.choice(scene['light'])}")
        rows[prompt] = (prompt[0].upper() + prompt[1:], people, pose)
    return pd.DataFrame(rows.values(), columns=["prompt", "people", "pose"])


def write_prompts(file: str, count: int, seed: int) -> pd.DataFrame:
    """Writes human_prompts to a .csv, .jsonl or .txt; UserError for another suffix or a file that is there already."""
    path = Path(file)
    if path.exists() or path.suffix not in (".csv", ".jsonl", ".txt"):
        raise UserError(f"cannot write {path}: choose a new file that ends in .csv, .jsonl or .txt")
    rows = human_prompts(count, seed)
    texts = {".csv": rows.to_csv(index=False), ".txt": "\n".join([*rows["prompt"], ""])}
    texts[".jsonl"] = rows.to_json(orient="records", lines=True, force_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(texts[path.suffix], encoding="utf-8")
    return rows


# ---- Pictures, card, exports ----------------------------------------------------------------------------------------

DATA_CARD = """\
# Preference pairs that a model made for itself

{pairs}. Each is {each}, by {scorers}; the model is `{model}`. All settings are in `preference_data.json`.
No person has looked at them: what a scorer does not see is wrong in winners, too, and the model's biases are in all.

![winners above losers](pairs.png)

![histograms of the scores and of the margins](margins.png)

```bash
{command}
```

The columns are Pick-a-Pic v2's, which diffusers', Salesforce's and MaPO's scripts read unchanged, and more: `scores`
has every scorer's scores of both sides as json, `margin` the winner's lead, `latents_0` and `latents_1` the sampler's
latents.

| | |
|---|---|
{table}
"""
GREEN, RED = "#12804a", "#b3261e"


def draw_grid(path: Path, title: str, cells: list[tuple[bytes, str, str, str]], per_row: int) -> None:
    """A picture of images, each a JPEG with a label, its colour and a caption, row by row."""
    from matplotlib.figure import Figure

    count, (width, height) = math.ceil(len(cells) / per_row), from_jpeg(cells[0][0]).size
    tall = 1.9 * height / width + 0.3 + 0.3 * any(caption for *_, caption in cells)
    figure = Figure((1.9 * per_row, tall * count + 0.4), dpi=110, layout="constrained")
    figure.suptitle(textwrap.shorten(title, 16 * per_row, placeholder=" ..."), parse_math=False)
    axes = figure.subplots(count, per_row, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (jpg, label, colour, caption) in zip(axes.flat, cells, strict=False):
        axis.imshow(from_jpeg(jpg))
        axis.set_title(label, color=colour, fontsize=9)
        text = textwrap.fill(caption, 34, max_lines=4, placeholder=" ...")
        axis.set_xlabel(text, fontsize=6.5, parse_math=False)
    write_whole(path, partial(figure.savefig, format="png"))


def draw_pictures(
    folder: Path, pairs: pd.DataFrame, rows: pd.DataFrame, pool: np.ndarray, files: np.ndarray, totals: np.ndarray,
    prompts: Sequence[str], unit: str,
) -> None:  # fmt: skip
    """pool.png: the images of one prompt, `pool` (numbers of `rows`), best to worst; pairs.png: up to twelve pairs,
    evenly spread; margins.png: histograms of scores and margins."""
    from matplotlib.figure import Figure

    def cell(i: int, colour: str, caption: str = "") -> tuple[bytes, str, str, str]:
        return read_images(files[i])[rows.image_id[i]]["jpg"], f"{totals[i]:.2f}", colour, caption

    ends = {pool[0]: GREEN, pool[-1]: RED}
    title = f"Best to worst: {prompts[rows.prompt[pool[0]]]}"
    draw_grid(folder / "pool.png", title, [cell(i, ends.get(i, "black")) for i in pool], min(8, len(pool)))

    count = 12 if len(pairs) >= 12 else min(6, len(pairs))
    shown, cells = pairs.iloc[np.linspace(0, len(pairs) - 1, count).astype(int)], []
    for start in range(0, count, 6):
        some = shown[start : start + 6]
        cells += [cell(i, GREEN) for i in some.winner]
        cells += [cell(i, RED, prompts[p]) for i, p in zip(some.loser, some.prompt, strict=True)]
    draw_grid(folder / "pairs.png", "Winners above losers, with their scores", cells, min(6, count))

    figure = Figure((10, 3.6), dpi=110, layout="constrained")
    scores, margins = figure.subplots(1, 2)
    style = {"bins": 40, "histtype": "stepfilled", "alpha": 0.5, "color": [GREEN, RED], "label": ["winners", "losers"]}
    scores.hist([totals[pairs.winner], totals[pairs.loser]], **style)
    scores.set(xlabel=textwrap.shorten(f"score: {unit}", 70), ylabel="pairs")
    scores.legend()
    margins.hist(pairs.margin, bins=40, color="#2c6e91")
    for axis in (scores, margins):
        axis.yaxis.get_major_locator().set_params(integer=True)
    margins.set(xlabel="margin: the winner's score less the loser's", ylabel="pairs")
    write_whole(folder / "margins.png", partial(figure.savefig, format="png"))


def write_data_card(folder: Path, record: dict[str, Any], command: str, args: argparse.Namespace) -> None:
    """README.md: what the pairs are, pictures and numbers; of absolute paths the last part alone."""
    from huggingface_hub import DatasetCardData

    each = f"the best and the worst of {args.num_images_per_prompt} images of one prompt"
    if args.draft_steps:
        each += f", chosen as drafts of {args.draft_steps} steps and drawn in {args.num_inference_steps}"
    if args.stage != "easy":
        each = f"a photo noised to timestep {' or '.join(map(str, args.sdrecon_timesteps))} and denoised by the model"
        each += f" (the stage {args.stage}) against the winner of the stage before, chosen"
    counts = record["pairs"]
    table = {"prompts": record["prompts"], **{f"no pair: {why}": count for why, count in record["dropped"].items()}}
    table |= {f"margin, {name}": f"{value:.4g}" for name, value in record["margin"].items()} | record["versions"]
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts]
    data = DatasetCardData(
        task_categories=["text-to-image"],
        tags=["text-to-image", "dpo", "preference", "synthetic"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    text = DATA_CARD.format(
        pairs=" and ".join(f"{count:,} {split} pair{'s' * (count != 1)}" for split, count in counts.items()),
        each=each,
        model=args.pretrained_model_name_or_path,
        scorers=" + ".join(record["scorers"]),
        command=command,
        table="\n".join(f"| {name} | {value} |" for name, value in table.items()),
    )
    text = re.sub(r"(?<![\w.:/~-])/(?:[^\s/,'\"`]+/)+", "", text)
    text = f"---\n{data.to_yaml()}\n---\n\n{text}"
    write_whole(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def export_pairs(folder: Path, kind: str) -> None:
    """export-KIND: SPLIT/w/000001.jpg and SPLIT/l/000001.jpg, each with its caption in a .txt and a .caption, as
    sd-scripts, OneTrainer and SimpleTuner read them; `flow-factory` adds train.jsonl of its schema 2, and test.txt."""
    path = folder / f"export-{kind}"
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    columns, tables = ["caption", "label_0", "jpg_0", "jpg_1"], sorted(folder.glob("data/*.parquet"))
    batches = ((table, batch) for table in tables for batch in pq.ParquetFile(table).iter_batches(16, columns=columns))
    pairs = ((table.name.partition("-")[0], row) for table, batch in batches for row in batch.to_pylist())
    for split, row in tqdm(pairs, "export", unit="pair"):
        jpgs = [row["jpg_0"], row["jpg_1"]][:: 1 if row["label_0"] else -1]
        files = [f"{split}/{side}/{len(lines[split]) + 1:06d}.jpg" for side in "wl"]
        for name, jpg in zip(files, jpgs, strict=True):
            file = unfinished / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpg)
            for suffix in (".txt", ".caption") if kind == "folders" else ():
                file.with_suffix(suffix).write_text(row["caption"], encoding="utf-8")
        chosen, rejected = ({"media": [{"type": "image", "path": name}]} for name in files)
        line = {"schema_version": 2, "input": {"prompt": row["caption"], "media": []}}
        line["supervision"] = {"type": "preference", "chosen": chosen, "rejected": rejected}
        lines[split].append(json.dumps(line, ensure_ascii=False) if split == "train" else row["caption"])
    if kind == "flow-factory":
        (unfinished / "train.jsonl").write_text("\n".join(lines["train"]) + "\n", encoding="utf-8")
        if lines["validation"]:
            (unfinished / "test.txt").write_text("\n".join(lines["validation"]) + "\n", encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


# ---- Main -----------------------------------------------------------------------------------------------------------


def start_processes() -> PartialState:
    """This process's place among those that `accelerate launch` started, on its GPU if there is one."""
    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # a process may wait long for the slowest one's images


def read_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What the images are drawn from: a table of prompts, and of the later stages, which take the prompts of the stage
    before that have a photo, the photos, winners and size too; and remarks."""
    if args.stage == "easy":
        table, remark = read_prompts(args.prompts, args.prompt_column, args.max_prompts)
        return {"table": table, "remarks": [remark], "size": None}
    before, winners = read_record(Path(args.previous_pairs)), previous_winners(Path(args.previous_pairs))
    if not before:
        raise UserError(f"--previous_pairs {args.previous_pairs} has no preference_data.json")
    photos, remark = read_photos(args.real_data_dir, args.prompt_column)
    table = winners.merge(photos, on="prompt")[: args.max_prompts]
    if table.empty:
        told = f"no caption of the photos in {args.real_data_dir} is a prompt of {args.previous_pairs}"
        raise UserError(f"{told}: make the easy pairs with --prompts PHOTOS")
    width, height = before["image_size"]
    if (args.height or args.resolution or height, args.width or args.resolution or width) != (height, width):
        raise UserError(f"{args.previous_pairs} holds images of {width}x{height}: both sides must be of one size")
    with ThreadPoolExecutor(16) as threads:  # they wait for the disk
        checked = threads.map(lambda photo: check_photo(photo, height, width), table.photo)
        show = tqdm(checked, "photos", len(table), unit="img", disable=len(table) < 1000)
        table = table.assign(photo_id=list(show))
    bad = Counter(one for one in table.photo_id if " " in one)
    table = table[~table.photo_id.isin(bad)].reset_index(drop=True)
    remarks = [remark, f"prompts    {len(table)} of the {len(winners)} pairs in {args.previous_pairs} have a photo"]
    remarks += [f"left out   {count} photos that {reason}" for reason, count in bad.items()]
    if table.empty:
        raise UserError(remarks[-1])
    return {"table": table, "remarks": remarks, "latents": before["latents"], "size": (height, width)}


def read_record(folder: Path) -> dict[str, Any]:
    """preference_data.json of an output folder; {} where there is none."""
    path = folder / "preference_data.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the same command makes it anew") from error


@torch.no_grad()
def count_flops(pipe: DiffusionPipeline, family: UNet, args: argparse.Namespace) -> tuple[int, int]:
    """FLOPs of a call of the denoiser, and of decoding, for one image; counted on shapes, without computing."""
    from torch.utils.flop_counter import FlopCounterMode

    text = {name: value.to("meta", torch.float32) for name, value in family.encode_text(pipe, [""]).items()}
    parts, sides = (getattr(pipe, family.model), pipe.vae), (args.height, args.width)
    with torch.device("meta"):
        model, vae = (type(part).from_config(part.config) for part in parts)
        latents = torch.empty(1, vae.config.latent_channels, *(side // pipe.vae_scale_factor for side in sides))
        with FlopCounterMode(display=False) as denoiser:
            family.predict(model, latents, torch.ones(1), text, torch.ones(1, 6))
        with FlopCounterMode(display=False) as decoder:
            vae.decode(latents)
    return denoiser.get_total_flops(), decoder.get_total_flops()


def draft_order_kept(rows: pd.DataFrame, draft_totals: np.ndarray, totals: np.ndarray) -> float:
    """How often, over prompts, one of the better half of the finalists by draft is better in full than one of the
    worse half."""
    kept = []
    for at in rows.groupby("prompt", sort=False).indices.values():
        order = [i for i in at[np.argsort(draft_totals[at], kind="stable")] if np.isfinite(totals[i])]
        worst, best = totals[order[: len(order) // 2]], totals[order[(len(order) + 1) // 2 :]]
        kept += [np.mean(best[:, None] > worst[None])] if len(order) > 1 else []
    return float(np.mean(kept))  # a pair was found, so one prompt has two


def price_in_words(args: argparse.Namespace, full_images: float, denoiser: int, decoder: int) -> str:
    """What a prompt's images cost, in FLOPs of denoiser and VAE, beside N images in full and the paper's."""

    def cost(steps: float) -> float:
        return (2 if args.guidance_scale > 1 else 1) * steps * denoiser + decoder

    steps, count = args.num_inference_steps, args.num_images_per_prompt
    if args.stage != "easy":
        return f"{sum(cost(steps * t / 1000) for t in args.sdrecon_timesteps):.3g} FLOPs a photo"
    price = full_images * cost(steps) + (count * cost(args.draft_steps) if args.draft_steps else 0)
    beside = f"{price / (count * cost(steps)):.0%} of {count} in full, " if args.draft_steps else ""
    return f"{price:.3g} FLOPs a prompt: {beside}{price / (20 * cost(50)):.0%} of the paper's 20 images of 50 steps"


def main(args: argparse.Namespace) -> None:
    """Draws the pool, scores it, chooses best against worst, and writes the pairs."""
    if args.write_prompts:
        if os.environ.get("RANK", "0") == "0":
            table = write_prompts(args.prompts, args.write_prompts, args.seed)
            print("\n    ".join([f"{len(table)} prompts in {args.prompts}, such as", *table.prompt[:3]]))
        return
    state = start_processes()
    from accelerate.utils import broadcast_object_list
    from filelock import FileLock

    # What is asked: scorers, prompts, photos, winners, and what draws; all is checked before the first image
    folder, is_main, is_easy = Path(args.output_dir), state.is_main_process, args.stage == "easy"
    columns: dict[str, dict[str, Any]] = {}  # each prompt's row of its file, for the scorers that read it
    scorers = parse_scorers([*args.scorer, *args.agree], columns)
    voters, agreeing = scorers[: len(args.scorer)], scorers[len(args.scorer) :]
    if not any(scorer.weight for scorer in voters):
        raise UserError("every --scorer has weight 0: one at least has to vote")
    inputs, record = broadcast_object_list([read_inputs(args), read_record(folder)] if is_main else [None, None])
    table = inputs["table"]
    prompts = table.prompt.tolist()
    of_the_file = table.drop(columns="photo", errors="ignore") if is_easy else table[["prompt"]]
    columns |= dict(zip(prompts, of_the_file.to_dict("records"), strict=True))
    args.height, args.width = inputs["size"] or (args.height, args.width)
    pipe, family, path, model_hash = load_sampler(args)
    noisy = is_easy and args.draft_steps != 0 and draws_fresh_noise(pipe.scheduler)
    if args.draft_steps is None:
        count, full = args.num_images_per_prompt, args.num_inference_steps
        spare_much = 5 * count + 2 * (args.finalists or 2) * full <= 0.7 * count * full
        spare_much = spare_much and full >= 10  # 5 of 8 steps are no draft
        args.draft_steps = 5 if is_easy and not noisy and spare_much else 0
        if args.finalists and not args.draft_steps:
            raise UserError(f"--finalists {args.finalists}: drafts would spare little here; set --draft_steps, too")
    elif noisy:
        told = f"{type(pipe.scheduler).__name__} draws fresh noise at its steps: no draft foretells a full image"
        raise UserError(f"{told}; set --sampler dpmsolver or --draft_steps 0")
    args.finalists = args.finalists or 2
    if not is_easy and not args.no_latents and (inputs["latents"] or {}).get("vae_hash") != weights_hash(pipe.vae):
        raise UserError(f"{args.previous_pairs} has no latents of this model's VAE: set --no_latents")
    if is_main:
        print(*inputs["remarks"], sep="\n")
        most = pipe.tokenizer.model_max_length
        if too_long := [prompt for prompt in prompts if len(pipe.tokenizer(prompt).input_ids) > most]:
            example = textwrap.shorten(too_long[0], 60)
            print(f"too long   {len(too_long)} prompts have more tokens than the {most} of CLIP, such as {example!r}")

    # Each kind of image has a folder, named by all that decides it but prompt and number
    alike = {"model": model_hash, "seed": args.seed, "height": args.height, "width": args.width}
    alike |= {"guidance_scale": args.guidance_scale, "negative_prompt": args.negative_prompt}
    steps = {"draft": args.draft_steps, "full": args.num_inference_steps, "sdrecon": args.num_inference_steps}
    keys = {kind: [steps[kind], args.num_inference_steps, kind != "draft" and args.no_latents] for kind in steps}
    keys = {kind: hash_of(alike, kind, *own)[:8] for kind, own in keys.items()}
    pools = {kind: folder / "pool" / f"{kind}-{key}" for kind, key in keys.items()}
    kinds = (["draft", "full"] if args.draft_steps else ["full"]) if is_easy else ["sdrecon"]
    used = {*(pools[kind] for kind in kinds), *(scores_folder(folder, scorer) for scorer in scorers)}
    if is_main:
        try:
            (folder / "pool").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        for pattern in (".data-*", ".old-*", ".export-*", "*/*/.*.parquet.*"):  # what a killed start left
            for leftover in folder.glob(pattern):
                if time.time() - leftover.stat().st_mtime > 86400:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if unused := sorted({*folder.glob("pool/*"), *folder.glob("scores/*")} - used):
            size = sum(file.stat().st_size for place in unused for file in place.glob("*")) / 1e6
            names = textwrap.shorten(", ".join(place.name for place in unused), 60, placeholder=" ...")
            print(f"not used   {size:,.1f} MB of other settings in pool/ and scores/: {names}")
    drawing = {"prompts": prompts, "pipe": pipe, "family": family, "path": path, "args": args}
    draw = partial(draw_part, **drawing, device=state.device)

    def complete(rows: pd.DataFrame, kind: str, scorers: list[Scorer]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Draws and scores what is missing, first a part alone: what cannot work is told in the first minutes."""
        count = IMAGES_IN_A_PART * state.num_processes
        for number in (count, len(rows)) if count < len(rows) else (len(rows),):
            wanted, what = rows[:number], kind if number == len(rows) else f"first {kind}"
            drawn = wanted.number.to_numpy() != PREVIOUS
            files = np.empty(number, object) if is_easy else wanted.file.to_numpy(copy=True)
            files[drawn] = make_missing(wanted[drawn], pools[kind], draw, what, state)
            pipe.to("cpu")
            torch.cuda.empty_cache()
            scores = {scorer.label: score_missing(wanted, files, scorer, args, state) for scorer in scorers}
            pictures = pads.dataset(sorted(set(files[drawn]))) if number < len(rows) else None
            if pictures and not pictures.count_rows(filter=pc.field("jpg").is_valid()):
                raise UserError("none of the first images is finite: another --mixed_precision may help")
        return files, scores

    if is_easy:
        rows = rows_of_prompts(prompts, args.num_images_per_prompt, args.seed)
    else:
        rows = rows_of_photos(table, args.sdrecon_timesteps, args.seed, keys["sdrecon"])
    spreads, draft_totals, vetoed = {}, None, {}
    if args.draft_steps:
        drafts, full_sampler = rows.assign(source="draft", image_id=rows.image_id + keys["draft"]), pipe.scheduler
        pipe.scheduler = draft_sampler(full_sampler, args.num_inference_steps)
        _, scores = complete(drafts, "draft", voters)
        spreads = measure_spreads(drafts, scores, voters, pools["draft"].name, record)
        draft_totals = vote(scores, voters, spreads)
        if not np.isfinite(draft_totals).any():
            raise UserError(f"no pairs from {len(prompts)} prompts: every draft is vetoed")
        vetoed = {f"{label} (drafts)": (np.isnan(values).sum(), len(drafts)) for label, values in scores.items()}
        prompt_by_prompt = drafts.groupby("prompt", sort=False).indices.values()
        chosen = [at[i] for at in prompt_by_prompt for i in finalists(draft_totals[at], args.finalists)]
        rows, draft_totals = rows.iloc[chosen].reset_index(drop=True), draft_totals[chosen]
        pipe.scheduler = full_sampler
    if is_easy:
        rows["image_id"] += keys["full"]
    kind = "full" if is_easy else "sdrecon"
    files, scores = complete(rows, kind, scorers)
    spreads = spreads or measure_spreads(rows, scores, voters, pools[kind].name, record)
    totals = vote(scores, voters, spreads)
    vetoed |= {label: (np.isnan(values).sum(), len(rows)) for label, values in scores.items()}

    # Best against worst
    pairs, dropped = best_pairs(rows, totals, {one.label: scores[one.label] for one in agreeing}, prompts, args)
    if pairs.empty:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no pairs from {len(prompts)} prompts: {reasons}")
    if is_easy:  # a later stage holds out what the stage before did
        held_out = hold_out_prompts(prompts, args.validation_share, args.seed)
        table = table.assign(split=["validation" if prompt in held_out else "train" for prompt in prompts])
    pairs["split"] = table.split.to_numpy()[pairs.prompt]
    token = broadcast_object_list([uuid.uuid4().hex])[0]
    unfinished = folder / f".data-{token}"
    try:
        write_pairs(unfinished, pairs, rows, files, totals, scores, prompts, args, state)
    except BaseException:  # a full disk is not filled further by each start
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    state.wait_for_everyone()
    if is_main:
        ranks = {"least": 0, "10 %": 10, "median": 50, "90 %": 90, "most": 100}
        sides = (side // pipe.vae_scale_factor for side in (args.height, args.width))
        shape = [pipe.vae.config.latent_channels, *sides]
        vae = {"vae": args.pretrained_model_name_or_path, "scaling_factor": pipe.vae.config.scaling_factor}
        latents = {"shape": shape, "dtype": "float16", **vae, "vae_hash": weights_hash(pipe.vae)}
        here = ("output_dir", "export", "batch_size", "write_prompts")
        libraries = ("torch", "diffusers", "transformers", "accelerate")
        record = {
            "settings": {name: value for name, value in vars(args).items() if name not in here},
            "prompts": len(prompts),
            "long_prompts": len(too_long),
            "pairs": {split: int(count) for split in SPLITS if (count := (pairs.split == split).sum())},
            "dropped": dict(dropped),
            "vetoed": {label: int(count) for label, (count, _) in vetoed.items()},
            "margin": {name: float(np.percentile(pairs.margin, rank)) for name, rank in ranks.items()},
            "scorers": {scorer.label: scorer.key for scorer in voters},
            "agree": {scorer.label: scorer.key for scorer in agreeing},
            "spreads": record.get("spreads", {}),
            "image_size": [args.width, args.height],
            "latents": None if args.no_latents else latents,
            "model": model_hash,
            "versions": {name: metadata.version(name) for name in libraries},
        }
        launch = ["python"] if state.device.type == "cpu" else ["accelerate", "launch"]  # which gives a CPU one thread
        command = [*launch, "train_dpo_human.py", "--train_data_dir", args.output_dir]
        if WORLD not in Path(args.pretrained_model_name_or_path).resolve().parents:
            command += ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
        command += ["--initial_lora", args.lora or "LORA_OF_THE_STAGE_BEFORE"] if args.lora or not is_easy else []
        command = shlex.join([*command, *([] if is_easy else ["--lambda_stat", "0"])])
        with FileLock(folder / ".lock"):  # two starts at once: what is seen is one of them, whole
            if (folder / "data").exists():
                (folder / "data").rename(folder / f".old-{token}")
            unfinished.rename(folder / "data")
            shutil.rmtree(folder / f".old-{token}", ignore_errors=True)
            text = json.dumps(record, indent=2, allow_nan=False) + "\n"
            write_whole(folder / "preference_data.json", lambda file: file.write_text(text, encoding="utf-8"))
            best = rows.index[rows.prompt == pairs.prompt[0]].to_numpy()
            best = best[np.isfinite(totals[best])]
            best = best[np.argsort(-totals[best], kind="stable")]
            unit = " + ".join(scorer.label for scorer in voters)
            draw_pictures(folder, pairs, rows, best, files, totals, prompts, unit)
            write_data_card(folder, record, command, args)
            for export in args.export:
                export_pairs(folder, export)

        # What came out
        print(f"pairs      {' and '.join(f'{count} {split}' for split, count in record['pairs'].items())}"
              f", of {len(prompts)} prompts")  # fmt: skip
        if dropped:
            print(f"dropped    {', '.join(f'{count} {reason}' for reason, count in dropped.items())}")
        if any(record["vetoed"].values()):
            told = ", ".join(f"{count} of {of} by {label}" for label, (count, of) in vetoed.items() if count)
            print(f"vetoed     {told}: not finite, or nan; used for neither side")
        low, middle, high = (f"{record['margin'][name]:.4g}" for name in ("10 %", "median", "90 %"))
        print(f"score gap  median {middle}, 10-90 % {low} to {high}, by {unit}")
        if draft_totals is not None:
            kept = draft_order_kept(rows, draft_totals, totals)
            advice = "" if kept >= 0.75 else ": they foretell little here; set --draft_steps 0, or higher"
            print(f"drafts     {kept:.0%} of a prompt's best finalists beat its worst in full, too{advice}")
        flops = count_flops(pipe.to(state.device), family, args)
        print(f"price      {price_in_words(args, len(rows) / len(prompts), *flops)}")
        print(f"look at    {folder / 'README.md'}, pairs.png, pool.png and margins.png")
        for export in args.export:
            print(f"exported   {folder / f'export-{export}'}")
        print(f"next       {command}", flush=True)
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
    """The command line, with the paper's defaults; without a model those of the embedded world."""
    parser = argparse.ArgumentParser(
        prog="make_preference_data.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, share = within(int, 1), within(float, 0, 0.9999999)

    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--pretrained_model_name_or_path", help="your model: SD 1.x, 2.x, XL, 3 or 3.5; none: the embedded world")
    flag("--revision", help="branch, tag or commit of the model on the hub")
    flag("--variant", help="variant of the weight files, such as fp16")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="what it draws in; none: fp16 on CUDA, else no")
    flag("--lora", help="LoRA to draw with, for a second round: folder, file or hub name")
    flag("--lora_scale", type=float, default=1.0, help="its weight")

    flag = parser.add_argument_group("prompts").add_argument
    flag("--prompts", help="file (.txt, one a line, # begins a comment; .jsonl, .json, .csv, .tsv, .parquet), folder "
                           "of photos with captions, folder or hub name (owner/name[:split]) that `datasets` reads")
    flag("--prompt_column", help="column of the prompts or captions; none: the first of prompt, caption, text")
    flag("--max_prompts", type=count, help="use only the first N distinct ones")
    flag("--write_prompts", type=count, metavar="N", help="write N prompts of people to the file --prompts, and stop")

    flag = parser.add_argument_group("pool").add_argument
    flag("--num_images_per_prompt", type=within(int, 2), default=24, help="candidates, of which two become the pair")
    flag("--draft_steps", type=within(int, 0),
         help="steps of a draft, 0: all in full; none: 5, or 0 where that spares little")
    flag("--finalists", type=count, help="so many best and so many worst drafts are drawn in full; none: 2")
    flag("--num_inference_steps", type=count, default=20, help="steps of a full image")
    flag("--guidance_scale", type=within(float, 0), help="classifier-free guidance; none: 5, of SD 3 4.5")
    flag("--negative_prompt", default="", help="one for all prompts")
    flag("--sampler", choices=["dpmsolver", "pipeline"], default="dpmsolver",
         help="the paper's DPM-Solver++ (of SD 3: the model's own), or the model's own")
    flag("--resolution", type=count, help="height and width in pixels; none: the model's own")
    flag("--height", type=count, help="height in pixels, where it is not --resolution")
    flag("--width", type=count, help="width in pixels, where it is not --resolution")
    flag("--batch_size", type=count, default=8, help="images drawn or scored at once by a process")
    flag("--seed", type=within(int, 0), default=0, help="seed of the images, of the sides and of the split")

    flag = parser.add_argument_group("stages").add_argument
    flag("--stage", choices=["easy", "normal", "hard"], default="easy", help="of the paper's curriculum, see above")
    flag("--real_data_dir", help="normal, hard: folder of photos with captions")
    flag("--previous_pairs", help="normal, hard: --output_dir of the stage before")
    flag("--sdrecon_timesteps", type=within(int, 1, 999), nargs="+", help="none: 400 500 600 700, of hard 100")

    flag = parser.add_argument_group("pairs").add_argument
    flag("--scorer", nargs="+", default=["pickscore"], metavar="NAME[=PATH][,option=value...]",
         help=f"{', '.join(SCORERS)}, module:function, file.py:function (also eval_human.py:people) or file.jsonl; "
              "options: weight (0: it only vetoes), label, and its own; several vote, in units of each one's spread")
    flag("--agree", nargs="+", default=[], metavar="SCORER", help="drop pairs that these scorers order otherwise")
    flag("--min_margin", metavar="GAP", help="drop pairs below it; a number, or as 25%% the quarter of least gap")
    flag("--validation_share", type=share, default=0.1, help="share of the prompts kept out of training")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="human-preferences", help="folder of the data set; a second start carries on")
    flag("--export", nargs="+", choices=["folders", "flow-factory"], default=[], help="also for others' trainers")
    flag("--no_latents", action="store_true", help="do not store latents (training then encodes the images)")
    # fmt: on

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None and args.write_prompts is None:
        use_embedded_world(parser, "make_preference_data")
        args = parser.parse_args(argv)
        for own in parser.get_default("scorer"):  # "pickscore" means the world's, whatever options follow
            bare = re.compile(rf"^{own.partition('=')[0]}(?=,|$)")
            args.scorer = [bare.sub(lambda _, own=own: own, spec) for spec in args.scorer]
            args.agree = [bare.sub(lambda _, own=own: own, spec) for spec in args.agree]
    is_easy, steps, t = args.stage == "easy", args.num_inference_steps, args.sdrecon_timesteps or ()
    later = {"real_data_dir": args.real_data_dir, "previous_pairs": args.previous_pairs}
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    margin = re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?|\d{1,2}(\.\d+)?%", args.min_margin or "0")
    too_many = args.draft_steps and 2 * (args.finalists or 2) > args.num_images_per_prompt
    unguided = args.guidance_scale is not None and args.guidance_scale <= 1
    same_folder = not is_easy and Path(args.previous_pairs or "").resolve() == Path(args.output_dir).resolve()
    wrong = {
        "no prompts: set --prompts to a text file with one prompt per line": is_easy and not args.prompts,
        **{f"--{name} belongs to --stage normal and hard": is_easy and value for name, value in later.items()},
        **{f"--stage {args.stage} needs --{name}": not is_easy and not value for name, value in later.items()},
        "--sdrecon_timesteps belongs to --stage normal and hard": is_easy and t,
        "--sdrecon_timesteps names one twice": len(set(t)) < len(t),
        "--resolution counts not beside --height and --width": "resolution" in changed and args.height and args.width,
        "--lora_scale needs --lora": args.lora_scale != 1 and not args.lora,
        f"--min_margin {args.min_margin}: give a number, or as 25% the share of the pairs to drop": not margin,
        f"--draft_steps must be below --num_inference_steps {steps}": (args.draft_steps or 0) >= steps,
        "--finalists on both sides are more than --num_images_per_prompt": too_many,
        "--finalists needs drafts": args.draft_steps == 0 and "finalists" in changed,
        "--negative_prompt needs a --guidance_scale above 1": args.negative_prompt and unguided,
        "--sampler pipeline cannot be told timesteps, as SDRecon needs": not is_easy and args.sampler == "pipeline",
        "--output_dir is --previous_pairs: give this stage a folder of its own": same_folder,
    }
    for name in ("prompts", "validation_share", "draft_steps", "finalists", "num_images_per_prompt"):
        wrong[f"--{name} belongs to --stage easy"] = not is_easy and name in changed
    if not is_easy:
        args.sdrecon_timesteps = args.sdrecon_timesteps or {"normal": [400, 500, 600, 700], "hard": [100]}[args.stage]
    if mistakes := [mistake for mistake, is_wrong in wrong.items() if is_wrong]:
        parser.error(mistakes[0])
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
