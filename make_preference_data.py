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
# ]
# ///
"""Makes DPO preference pairs from your own text-to-image model, with AI feedback instead of human labels.

HG-DPO (https://arxiv.org/abs/2405.20216), the Easy stage. For every prompt c:

    x_i  = sample(model, c, seed_i)                seed_i = image_seed(seed, c, i), i = 0 .. N-1
    s_i  = ensemble(score_k(x_i, c))               k: PickScore by default, any number of scorers
    pair = best_and_worst(s_0 .. s_N-1)            the winner and the loser; ties and non-finite scores are left out

    prompts, model --sample--> images --score--> pool/ --best_and_worst--> data/ --> train_dpo_human.py

Without arguments it runs on the embedded world (tests/tiny_human) in minutes on a CPU. The usual command:

    accelerate launch make_preference_data.py --pretrained_model_name_or_path YOUR_MODEL --prompts captions.txt \\
        --height 1024 --width 704 --output_dir human-preferences

The output is read by `datasets.load_dataset(folder)`, train_dpo_human.py and every script that reads Pick-a-Pic v2.
A start in the same folder carries on where the last one ended. An image is a function of (model, prompt, seed),
whatever the batch size and the number of processes.

Differences from the paper:
1. Images are padded to a square before CLIP sees them; the published crop would cut heads and feet off a portrait.
2. Several scorers can vote, each in units of its own spread within a prompt; one with weight 0 only vetoes.
3. A seeded coin decides which side is jpg_0, and the latents of the sampler are kept, so that training needs no VAE.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import html
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from importlib import metadata
from itertools import groupby, islice
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
    from diffusers import DiffusionPipeline

SCRIPT = "make_preference_data"
WORLD = Path(__file__).resolve().parent / "tests" / "tiny_human"
SHARD_IMAGES = 160  # a shard holds about as many images; at most so many are made again after a crash

# What a folder's images and pairs depend on; a start with other settings in the same folder is refused.
MODEL_SETTINGS = [
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "mixed_precision",
    "sampler",
    "stage",
    "seed",
]
IMAGE_SETTINGS = [
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "num_images_per_prompt",
]
POOL_SETTINGS = [*MODEL_SETTINGS, *IMAGE_SETTINGS, "no_latents"]
PAIR_SETTINGS = ["scorer", "min_margin", "validation_share"]

SCORER_HELP = (
    "pickscore, clip, module:function or file.py:function; with several, a weighted vote in units of each one's spread"
)


class UserError(Exception):
    """Something that the user can mend; printed as one line, exit status 1."""


# ---- The method -----------------------------------------------------------------------------------------------------


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's index-th image, whatever the batch, the order of prompts and the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()[:6], "big")


@torch.inference_mode()
def sample(
    pipe: DiffusionPipeline,
    embeds: dict[str, torch.Tensor],
    rows: Sequence[int],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
) -> tuple[list[Image.Image], torch.Tensor]:
    """Draws an image for every prompt `rows[i]` of `embeds` (see encode_prompts) with the seed `seeds[i]`.

    Batches mix prompts freely: each image has its own CPU generator, so it depends on (model, prompt, seed) alone.
    Returns the images and the sampler's own latents, scaled, (B, C, H, W) float16 on the CPU. Without a height and
    width, the model's own size.
    """
    index = torch.tensor(rows, device=pipe.unet.device)
    latents = pipe(
        **{k: v.expand(len(index), *v.shape[1:]) if k.startswith("negative") else v[index] for k, v in embeds.items()},
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        output_type="latent",
    ).images
    return decode(pipe, latents), latents.to("cpu", torch.float16)


@torch.inference_mode()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Scaled latents (B, C, H, W) to images. The VAE works in fp32, one image at a time: SDXL's overflows in fp16."""
    latents = (latents.to(pipe.vae.device, torch.float32) / pipe.vae.config.scaling_factor).split(1)
    pixels = torch.cat([pipe.vae.decode(one, return_dict=False)[0] for one in latents])
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def ensemble(scores: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """The weighted sum (P, N) of the scorers' scores (P, N), each in units of its within-prompt standard deviation.

    That deviation is pooled over the prompts. Raw sums would mix scales (PickScore is about 20, others about 1); a
    global z-score mostly measures how hard a prompt is. A single voting scorer keeps its own units. A scorer of weight
    0 only vetoes: any scorer's -inf makes the sum -inf. An image to which any scorer gives nan or +inf gets nan.
    """
    stacked = np.stack([scores[name] for name in weights])
    voting = [name for name, weight in weights.items() if weight != 0]
    total = np.zeros(stacked.shape[1:])
    for name in voting:
        finite = np.ma.masked_invalid(scores[name])
        spread = math.sqrt(np.ma.filled(finite.var(axis=1, ddof=1).mean(), 0.0)) if len(voting) > 1 else 1.0
        total += weights[name] * finite.filled(0.0) / (spread or 1.0)
    total[np.isneginf(stacked).any(axis=0)] = -np.inf
    total[(np.isnan(stacked) | np.isposinf(stacked)).any(axis=0)] = np.nan
    return total


def best_and_worst(scores: Sequence[float], min_gap: float = 0.0) -> tuple[tuple[int, int] | None, str]:
    """The indices (winner, loser) of the best and the worst of a prompt's N scores; or None, and the reason why.

    nan is used for neither side; -inf may lose but never win; a gap of 0 is a tie; a gap below `min_gap` is too small.
    """
    scores = np.asarray(scores, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(scores) | np.isneginf(scores))
    winners = usable[np.isfinite(scores[usable])]
    if len(winners) == 0:
        return None, "no image with a finite score"
    if len(usable) < 2:
        return None, "only one image with a score"
    best, worst = winners[scores[winners].argmax()], usable[scores[usable].argmin()]
    gap = scores[best] - scores[worst]
    if gap == 0:
        return None, "all scores equal"
    if gap < min_gap:
        return None, "gap below --min_margin"
    return (int(best), int(worst)), "kept"


def unit_hash(seed: int, prompt: str, purpose: str) -> float:
    """A prompt's number in [0, 1): the coin that says which side is jpg_0, the lot that says which split it joins."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{purpose}".encode()).digest()[:6], "big") / 2**48


# ---- Scorers --------------------------------------------------------------------------------------------------------
# A scorer is a function factory(device, **options) -> score(images, prompts) -> one float per image, higher is better.
# -inf may lose but never win; nan is used for neither side. Your own: module:factory or path/to/file.py:factory.

Score = Callable[[list[Image.Image], list[str]], list[float]]


class Scorer(NamedTuple):
    """A parsed --scorer; `load(device)` makes the scoring function."""

    label: str  # its name in the data set
    weight: float  # its weight in the ensemble
    source: str  # NAME[=MODEL] as given
    load: Callable[[torch.device | str], Score]


def clip_score(device: torch.device | str, model: str = "openai/clip-vit-large-patch14", processor: str = "") -> Score:
    """100 * cos(image, text) of any CLIPModel."""
    cosine, _ = clip_cosine(device, model, processor or model)
    return lambda images, prompts: (100 * cosine(images, prompts)).tolist()


def pick_score(device: torch.device | str, model: str = "", processor: str = "") -> Score:
    """PickScore (https://arxiv.org/abs/2305.01569): exp(logit_scale) * cos(image, text), of any CLIPModel trained so.

    A difference is a Bradley-Terry logit: at 0.5 about 62 % of people agree, at 1 about 73 %.
    """
    processor = processor or model or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    cosine, scale = clip_cosine(device, model or "yuvalkirstain/PickScore_v1", processor)
    return lambda images, prompts: (scale * cosine(images, prompts)).tolist()


def clip_cosine(device: torch.device | str, model: str, processor: str) -> tuple[Callable[..., torch.Tensor], float]:
    """The function cosine(images, prompts) -> (B,) float32 of a CLIPModel, and its exp(logit_scale).

    fp16 on CUDA, fp32 elsewhere (bf16's noise is a fifth of the scores' spread), the product always in fp32. Images
    are padded to a square; prompts are cut by tokens and encoded once each.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    device = torch.device(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        clip = CLIPModel.from_pretrained(model, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(processor)
        to_pixels = AutoImageProcessor.from_pretrained(processor, backend="pil")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the scorer {model}: {str(error).splitlines()[0]}") from error

    @lru_cache(maxsize=4096)
    @torch.inference_mode()
    def embed_text(prompt: str) -> torch.Tensor:
        tokens = tokenizer(
            prompt, truncation=True, max_length=clip.config.text_config.max_position_embeddings, return_tensors="pt"
        )
        pooled = clip.text_model(**tokens.to(device)).pooler_output
        return torch.nn.functional.normalize(clip.text_projection(pooled).float(), dim=-1)[0]

    @torch.inference_mode()
    def cosine(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        squares = [ImageOps.pad(image.convert("RGB"), (max(image.size), max(image.size))) for image in images]
        pixels = to_pixels(images=squares, return_tensors="pt").pixel_values.to(device, dtype)
        image_embeds = clip.visual_projection(clip.vision_model(pixels).pooler_output).float()
        text_embeds = torch.stack([embed_text(prompt) for prompt in prompts])
        return (torch.nn.functional.normalize(image_embeds, dim=-1) * text_embeds).sum(-1).cpu()

    return cosine, clip.logit_scale.float().exp().item()


BUILT_IN_SCORERS = {"pickscore": pick_score, "clip": clip_score}


def parse_scorer(spec: str) -> Scorer:
    """Reads `[WEIGHT*]NAME[=MODEL]`: NAME is pickscore, clip, module:function or file.py:function. No weights yet."""
    weight, name, model = re.fullmatch(r"(?:([-+.\de]+)\*)?([^=]*)(?:=(.*))?", spec).groups()
    try:
        weight = float(weight or 1)
    except ValueError:
        raise UserError(f"scorer {spec}: {weight} is not a number") from None
    label = name.rpartition(":")[2]
    factory = BUILT_IN_SCORERS.get(name) or find_plugin(name)
    if name in BUILT_IN_SCORERS and model:
        check_model(model, "config.json")
    if model:
        return Scorer(label, weight, f"{name}={model}", partial(factory, model=model))
    return Scorer(label, weight, name, factory)


def parse_scorers(specs: list[str]) -> list[Scorer]:
    """All of --scorer; two scorers of the same label cannot be told apart."""
    scorers = [parse_scorer(spec) for spec in specs]
    twice = [label for label, count in Counter(scorer.label for scorer in scorers).items() if count > 1]
    if twice:
        raise UserError(f"two scorers are called {twice[0]}")
    return scorers


def find_plugin(name: str) -> Callable[..., Score]:
    """The function that `module:function` or `path/to/file.py:function` names."""
    module_name, colon, function = name.rpartition(":")
    if not colon:
        raise UserError(
            f"unknown scorer {name!r}: use {', '.join(BUILT_IN_SCORERS)}, module:function or file.py:function"
        )
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"scorer {name}: cannot import {module_name}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"scorer {name}: {module_name} has no function {function}")
    return getattr(module, function)


def run_scorer(score: Score, label: str, images: list[Image.Image], prompts: list[str]) -> list[float]:
    """One float per image, or an error that names the scorer."""
    scores = [float(value) for value in score(images, prompts)]
    if len(scores) != len(images):
        raise UserError(f"scorer {label} gave {len(scores)} scores for {len(images)} images")
    return scores


# ---- Models ---------------------------------------------------------------------------------------------------------


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


def load_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """The user's text-to-image pipeline (SD1.x, SD2.x, SDXL), ready for `sample`, without SD's safety checker.

    --sampler dpmsolver puts the paper's DPM-Solver multistep in place of the model's scheduler. The VAE stays in fp32.
    """
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    name = args.pretrained_model_name_or_path
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    try:
        pipe = DiffusionPipeline.from_pretrained(
            name, revision=args.revision, variant=args.variant, torch_dtype=dtype, safety_checker=None
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    if args.sampler == "dpmsolver":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(torch.float32)
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


def count_long_prompts(pipe: DiffusionPipeline, prompts: list[str]) -> int:
    """How many prompts are longer than the text encoder reads; their end is cut off."""
    return sum(len(ids) > pipe.tokenizer.model_max_length for ids in pipe.tokenizer(prompts).input_ids)


def weights_hash(*modules: torch.nn.Module) -> str:
    """sha256 over the weights as fp16, so that it is the same whether they were loaded in fp16 or fp32."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- Data -----------------------------------------------------------------------------------------------------------


POOL_COLUMNS = {"prompt_id": pa.string(), "caption": pa.string(), "index": pa.int64(), "seed": pa.int64()}
POOL_COLUMNS |= {"scores": pa.string(), "jpg": pa.binary(), "latents": pa.binary()}

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


def read_prompts(path: str, max_prompts: int | None) -> tuple[list[str], str]:
    """The prompts of a text file, one per line, and a remark on what was left out (blank lines, repeated prompts)."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts file {path}: {getattr(error, 'strerror', None) or error}") from error
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise UserError(f"the prompts file {path} {'holds only blank lines' if lines else 'is empty'}")
    blank, chosen = lines.count(""), prompts[:max_prompts]
    left_out = f"{blank} blank lines and {len(lines) - blank - len(prompts)} repeated prompts left out"
    return chosen, f"prompts: the first {len(chosen)} of {len(prompts)} in {path} ({left_out})"


def plan_rows(prompts: list[str], num_images: int, seed: int) -> list[dict[str, Any]]:
    """The rows of a shard before its images are drawn, prompt by prompt."""
    return [
        {
            "prompt_id": hashlib.sha256(prompt.encode()).hexdigest()[:16],
            "caption": prompt,
            "index": index,
            "seed": image_seed(seed, prompt, index),
        }
        for prompt in prompts
        for index in range(num_images)
    ]


def plan_shards(folder: Path, prompts: list[str], num_images: int) -> dict[Path, list[str]]:
    """The pool's files and their prompts: fixed groups, whatever the batch size and the number of processes."""
    size = math.ceil(SHARD_IMAGES / num_images)
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return {folder / "pool" / f"pool-{number:05d}.parquet": group for number, group in enumerate(groups)}


def batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Cuts rows into lists of `size`; the last may be shorter."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def to_jpeg(image: Image.Image) -> bytes:
    """Quality 95, no chroma subsampling: the same codec for winners and losers."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def from_jpeg(data: bytes) -> Image.Image:
    """Decodes what to_jpeg encoded."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes under a temporary name, then renames: whoever sees `path` sees the whole file."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def write_shard(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes a shard of the pool, a row per image, prompt by prompt; `facts` about all of them go to its metadata."""
    schema = pa.schema(POOL_COLUMNS.items(), metadata={"facts": json.dumps(facts)})
    replace_file(path, lambda part: pq.write_table(pa.Table.from_pylist(rows, schema), part))


def read_shard(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a shard, all columns or some."""
    return pq.read_table(path, columns=columns).to_pylist()


def read_facts(path: Path) -> dict[str, Any]:
    """What write_shard noted about all rows."""
    return json.loads(pq.read_schema(path).metadata[b"facts"])


def read_scores(shards: list[Path], scorers: list[Scorer], num_images: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """All captions of the pool and every scorer's (P, N) scores, without reading the images."""
    rows = [row for shard in shards for row in read_shard(shard, ["caption", "scores"])]
    raw = [json.loads(row["scores"]) for row in rows]
    columns = {s.label: np.array([image[s.source] for image in raw], np.float64) for s in scorers}
    return [row["caption"] for row in rows[::num_images]], {k: v.reshape(-1, num_images) for k, v in columns.items()}


def pair_row(
    images: list[dict[str, Any]],
    pair: tuple[int, int],
    totals: np.ndarray,
    scorers: list[Scorer],
    seed: int,
    stage: str,
) -> dict[str, Any]:
    """The data set's row for a prompt's pool of images and its (winner, loser); a seeded coin says which is jpg_0."""
    winner, loser = pair
    caption = images[0]["caption"]
    sides = (winner, loser) if unit_hash(seed, caption, "side") < 0.5 else (loser, winner)
    raw = [json.loads(images[i]["scores"]) for i in sides]
    row = {
        "caption": caption,
        "scores": json.dumps({scorer.label: [side[scorer.source] for side in raw] for scorer in scorers}),
        "margin": float(totals[winner] - totals[loser]),
        "prompt_id": images[0]["prompt_id"],
        "stage": stage,
        "num_candidates": len(images),
    }
    for side, i in enumerate(sides):
        row |= {f"{name}_{side}": images[i][name] for name in ("jpg", "seed", "latents")}
        row |= {f"label_{side}": float(i == winner), f"score_{side}": float(totals[i]), f"source_{side}": "generated"}
    return row


def choose_validation(captions: list[str], share: float, seed: int) -> set[str]:
    """A seeded `share` of the prompts, rounded, at least one if any is asked for and there are two."""
    count = max(round(share * len(captions)), int(share > 0 and len(captions) > 1))
    return set(sorted(captions, key=lambda caption: unit_hash(seed, caption, "validation"))[:count])


def pair_columns(no_latents: bool) -> list[tuple[str, pa.DataType]]:
    """The data set's columns, with or without the latents."""
    return [column for column in PAIR_COLUMNS.items() if not (no_latents and column[0].startswith("latents"))]


def write_pairs(
    args: argparse.Namespace, shards: list[Path], pairs: dict[str, tuple[int, int]], totals: dict[str, np.ndarray]
) -> dict[str, int]:
    """Writes `pairs` (caption -> winner, loser) to data/, one shard of the pool at a time; returns their numbers."""
    scorers, schema = parse_scorers(args.scorer), pa.schema(pair_columns(args.no_latents))
    validation = choose_validation(list(totals), args.validation_share, args.seed)
    counts = {"train": 0, "validation": 0}
    folder = Path(args.output_dir, "data")
    folder.mkdir(exist_ok=True)
    parts = {split: folder / f"{split}.part" for split in counts}
    with contextlib.ExitStack() as files:
        writers = {split: files.enter_context(pq.ParquetWriter(part, schema)) for split, part in parts.items()}
        for shard in shards:
            rows = {split: [] for split in counts}
            for images in batches(read_shard(shard), args.num_images_per_prompt):
                caption = images[0]["caption"]
                if caption in pairs:
                    row = pair_row(images, pairs[caption], totals[caption], scorers, args.seed, args.stage)
                    rows["validation" if caption in validation else "train"].append(row)
            for split in counts:
                counts[split] += len(rows[split])
                if rows[split]:  # datasets cannot read an empty row group
                    writers[split].write_table(pa.Table.from_pylist(rows[split], schema))
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

{pairs}. Each is the best and the worst of {images} images of one prompt by {scorers}; the model is {model}.

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

- No person has looked at them: the better image by {scorers} is not always the one that people like better. How often
  you agree, the blind test in `pairs.html` tells.
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
    gap, line = 16, 20
    body, heading = ImageFont.load_default(size=14), ImageFont.load_default(size=20)
    wrapped = [textwrap.wrap(card.caption, cell // 7, max_lines=5, placeholder=" ...") for card in cards]
    height = max(len(card.images) for card in cards) * (cell + 2 * line) + max(map(len, wrapped)) * line + gap
    rows = math.ceil(len(cards) / per_row)
    sheet = Image.new("RGB", (gap + min(per_row, len(cards)) * (cell + gap), 3 * line + rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, line), title, INK, heading)
    for number, (card, caption) in enumerate(zip(cards, wrapped, strict=True)):
        x, y = gap + number % per_row * (cell + gap), 3 * line + number // per_row * height
        for image, label, colour in card.images:
            method = Image.Resampling.NEAREST if max(image.size) <= cell else Image.Resampling.LANCZOS
            image = ImageOps.contain(image, (cell, cell), method)
            sheet.paste(image, (x + (cell - image.width) // 2, y + cell - image.height))
            draw.rectangle((x, y + cell + 3, x + cell - 1, y + cell + 6), colour)
            draw.text((x, y + cell + 10), label, colour, body)
            y += cell + 2 * line
        draw.multiline_text((x, y - 4), "\n".join(caption), INK, body, spacing=5)
    return sheet


def draw_pool(
    folder: Path, shards: list[Path], pairs: dict[str, tuple[int, int]], totals: dict[str, np.ndarray]
) -> None:
    """pool.png: all images of the first prompt that has a pair, best to worst."""
    rows = (row for shard in shards for row in read_shard(shard, ["caption", "jpg"]))
    pools = ((caption, list(pool)) for caption, pool in groupby(rows, key=itemgetter("caption")) if caption in pairs)
    caption, pool = next(pools)
    winner, loser = pairs[caption]
    colours, scores = {winner: GOOD, loser: BAD}, totals[caption]
    best_first = np.argsort(-scores)  # nan comes last
    cards = [Card([(from_jpeg(pool[i]["jpg"]), f"{scores[i]:.2f}", colours.get(i, INK))]) for i in best_first]
    title = textwrap.shorten(f"Best to worst: {caption}", 110)
    save_png(contact_sheet(title, cards, per_row=10, cell=144), folder / "pool.png")


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
    low, quarter, three_quarters, high = np.percentile(values, [0, 25, 75, 100]).tolist()
    reach = 4 * (three_quarters - quarter) or math.inf
    low, high = max(low, quarter - reach), min(high, three_quarters + reach)
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
        label = f"{one.name}, median {np.median(one.values[np.isfinite(one.values)]):.2f}"
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


def data_card(folder: Path, record: dict[str, Any]) -> str:
    """README.md of the finished pairs and their record; its yaml is what datasets.load_dataset and the Hub read."""
    settings, counts, scores = record["settings"], count_pairs(folder), scores_of_pairs(folder)
    kinds = {pa.float64(): "float64", pa.int64(): "int64"}
    margins, (means, sources) = scores["margins"][np.isfinite(scores["margins"])], summarise_pairs(folder)
    ranks = {"least": 0, "10 %": 10, "25 %": 25, "median": 50, "75 %": 75, "90 %": 90, "most": 100}
    gaps = np.percentile(margins, list(ranks.values())).tolist() if len(margins) else [math.nan] * len(ranks)
    numbers = [("prompts", f"{record['prompts']:,}")]
    numbers += [(f"pairs in {split}", f"{count:,}") for split, count in counts.items()]
    numbers += [(f"no pair: {reason}", f"{count:,}") for reason, count in record["dropped"].items()]
    numbers += [(side, count_words(source)) for side, source in sources.items()]
    return DATA_CARD.format(
        name=yaml_text(f"Preference pairs of {settings['pretrained_model_name_or_path']}"),
        files="\n".join(f"  - {{split: {split}, path: data/{split_file(folder, split).name}}}" for split in counts),
        features="\n".join(
            f"  - {{name: {column.name}, dtype: {kinds.get(column.type, column.type)}}}"
            for column in pq.read_schema(split_file(folder, next(iter(counts))))
        ),
        pairs=" and ".join(f"{count:,} {split} pairs" for split, count in counts.items()),
        images=settings["num_images_per_prompt"],
        scorers=markdown_text(" + ".join(means)),
        model=markdown_text(settings["pretrained_model_name_or_path"]),
        counts=markdown_table(("", "number"), numbers),
        scores=markdown_table(
            ("scorer", "winners, mean", "losers, mean", "winner higher", "pairs"),
            [(name, win, loss, f"{100 * share:.0f} %", pairs) for name, (win, loss, share, pairs) in means.items()],
        ),
        gaps=markdown_table(("", *ranks), [("margin", *gaps)]),
        examples=example_lines(folder),
        command=plain_text(next_command(argparse.Namespace(**{**settings, "output_dir": "FOLDER"}))),
        settings=markdown_table(
            ("setting", "value"),
            [
                (f"--{name}", " ".join(map(str, value)) if isinstance(value, list) else value)
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
No person has looked at these pairs: the blind test measures the scorer against you.</footer>
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
    + `stage ${pair.stage} · best and worst of ${pair.candidates} · seeds ${pair.winner.seed}, ${pair.loser.seed} · `
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
  const now = !pair?.choice ? "Which one would you choose?"
    : pair.choice === "winner" ? "You agree with the scorer." : "The scorer chose the other one.";
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
    words += (
        f", scored by {' + '.join(scorer_names(folder))}, of images by {settings['pretrained_model_name_or_path']}"
    )
    content = {"about": {"words": words, "total": total}, "small": max(record["image_size"]) <= TINY, "pairs": pairs}
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    page = PAGE.replace("@DATA@", data)
    replace_file(folder / "pairs.html", lambda part: part.write_text(page, encoding="utf-8"))


# ---- Exports: the same pairs in the formats of others ---------------------------------------------------------------


def image_id(row: dict[str, Any]) -> str:
    """The name of an image of the pool."""
    return f"{row['prompt_id']}-{row.get('source') or 'generated'}-{row['index']}"


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
    model = read_record(folder)["settings"]["pretrained_model_name_or_path"]
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
    shards = [pq.ParquetFile(path) for path in sorted(folder.glob("pool/*.parquet"))]
    total = sum(shard.metadata.num_rows for shard in shards)
    with (
        tqdm(total=total, desc="exporting", unit="img", smoothing=0.1) as bar,
        (part / "metadata.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for shard in shards:
            columns = [name for name in shard.schema_arrow.names if name != "latents"]
            for row in (row for batch in shard.iter_batches(16, columns=columns) for row in batch.to_pylist()):
                bar.update()
                if row["jpg"] is not None:
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
    try:
        return json.loads((folder / "preference_data.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not ours (no preference_data.json): choose another --output_dir") from error


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes preference_data.json."""
    replace_file(folder / "preference_data.json", lambda part: part.write_text(json.dumps(record, indent=2) + "\n"))


def check_folder(folder: Path, settings: dict[str, Any], fixed: Sequence[str], overwrite: bool) -> None:
    """Refuses a folder that is not ours, or that holds a run whose `fixed` settings differ."""
    if not folder.exists() or all(path.suffix == ".part" for path in folder.iterdir()):
        return
    old = read_record(folder)["settings"]
    changed = [name for name in fixed if old.get(name) != settings[name]]
    if changed and not overwrite:
        differences = "; ".join(f"{name} was {old.get(name)}, now {settings[name]}" for name in changed)
        ways = "choose another --output_dir or --overwrite it"
        ways += ", or --rescore the kept pool" if set(changed) <= set(PAIR_SETTINGS) else ""
        raise UserError(f"{folder} holds a run with other settings ({differences}): {ways}")


def prepare_folder(folder: Path, settings: dict[str, Any], prompts: list[str], overwrite: bool) -> None:
    """Makes the folder, empties it if asked to, and notes the settings and prompts before the first image."""
    if overwrite:
        shutil.rmtree(folder / "pool", ignore_errors=True)
        shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    write_record(folder, {"settings": settings})
    text = "\n".join(prompts) + "\n"
    replace_file(folder / "pool" / "prompts.txt", lambda part: part.write_text(text, encoding="utf-8"))


def progress(total: int, state: PartialState, what: str, unit: str) -> tqdm:
    """A bar for this process's share of the work; only the main process shows its own."""
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    return tqdm(total=total, desc=what + share, unit=unit, smoothing=0.1, disable=not state.is_main_process)


def score_rows(rows: list[dict], images: list[Image.Image], scorers: dict[Scorer, Score]) -> None:
    """Adds every scorer's raw score to the rows' json."""
    captions = [row["caption"] for row in rows]
    scores = {s.source: run_scorer(score, s.label, images, captions) for s, score in scorers.items()}
    for i, row in enumerate(rows):
        known = json.loads(row.get("scores", "{}"))
        row["scores"] = json.dumps(known | {source: values[i] for source, values in scores.items()})


def process_share(shards: Iterable[Path], state: PartialState) -> list[Path]:
    """The shards that this process makes: every K-th, finished or not, so that the processes agree without asking."""
    return list(shards)[state.process_index :: state.num_processes]


def generate_pool(args: argparse.Namespace, shards: dict[Path, list[str]], state: PartialState) -> float:
    """Draws and scores the images of the `shards` that are not there yet; returns all processes' images per second."""
    todo = [path for path in process_share(shards, state) if not path.exists()]
    if not todo:
        return 0.0
    pipe = load_pipeline(args, state.device)
    scorers = {scorer: scorer.load(state.device) for scorer in parse_scorers(args.scorer)}
    latent_facts = {
        "dtype": "float16",
        "vae": args.pretrained_model_name_or_path,
        "scaling_factor": pipe.vae.config.scaling_factor,
        "vae_hash": weights_hash(pipe.vae),
    }
    total = sum(len(shards[path]) for path in todo) * args.num_images_per_prompt
    start = time.perf_counter()
    with progress(total, state, "drawing", "img") as bar:
        for path in todo:
            embeds = encode_prompts(pipe, shards[path], args.negative_prompt)
            rows = plan_rows(shards[path], args.num_images_per_prompt, args.seed)
            for batch in batches(rows, args.batch_size):
                which, seeds = [shards[path].index(row["caption"]) for row in batch], [row["seed"] for row in batch]
                images, latents = sample(
                    pipe, embeds, which, seeds, args.num_inference_steps, args.guidance_scale, args.height, args.width
                )
                score_rows(batch, images, scorers)
                for row, image, latent in zip(batch, images, latents, strict=True):
                    row |= {"jpg": to_jpeg(image), "latents": None if args.no_latents else latent.numpy().tobytes()}
                bar.update(len(batch))
            facts = {
                "image_size": images[0].size,
                "latents": {"shape": list(latents.shape[1:]), **latent_facts},
                "long_prompts": count_long_prompts(pipe, shards[path]),
            }
            write_shard(path, rows, facts)
    return total / (time.perf_counter() - start) * state.num_processes


def score_pool(args: argparse.Namespace, shards: list[Path], state: PartialState) -> None:
    """Scores the kept images with the scorers that have not seen them; only --rescore brings such ones."""
    wanted = parse_scorers(args.scorer)
    seen = {path: json.loads(read_shard(path, ["scores"])[0]["scores"]) for path in process_share(shards, state)}
    todo = [path for path in seen if any(scorer.source not in seen[path] for scorer in wanted)]
    if not todo:
        return
    scorers = {scorer: scorer.load(state.device) for scorer in wanted}
    with progress(len(todo), state, "scoring", "shard") as bar:
        for path in todo:
            rows, missing = read_shard(path), {s: score for s, score in scorers.items() if s.source not in seen[path]}
            for batch in batches(rows, args.batch_size):
                score_rows(batch, [from_jpeg(row["jpg"]) for row in batch], missing)
            write_shard(path, rows, read_facts(path))
            bar.update()


def choose_pairs(
    args: argparse.Namespace, shards: list[Path]
) -> tuple[dict[str, tuple[int, int]], dict[str, np.ndarray], Counter[str]]:
    """Best against worst: pairs (caption -> winner, loser), scores (caption -> (N,)), the reasons for no pair."""
    scorers = parse_scorers(args.scorer)
    captions, scores = read_scores(shards, scorers, args.num_images_per_prompt)
    totals = dict(zip(captions, ensemble(scores, {scorer.label: scorer.weight for scorer in scorers}), strict=True))
    verdicts = {caption: best_and_worst(total, args.min_margin) for caption, total in totals.items()}
    pairs = {caption: pair for caption, (pair, _) in verdicts.items() if pair}
    dropped = Counter(reason for pair, reason in verdicts.values() if not pair)
    if not pairs:
        raise UserError(f"no pairs from {len(captions)} prompts: {count_words(dropped)}")
    return pairs, totals, dropped


def count_words(counts: Counter[str]) -> str:
    """A counter in words."""
    return ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "none"


def finish(args: argparse.Namespace, shards: list[Path], settings: dict[str, Any], speed: float) -> None:
    """Keeps best against worst, writes the data set with all that describes it, and says what came out."""
    folder = Path(args.output_dir)
    pairs, totals, dropped = choose_pairs(args, shards)
    counts = write_pairs(args, shards, pairs, totals)
    draw_pool(folder, shards, pairs, totals)
    facts = [read_facts(shard) for shard in shards]
    long_prompts = sum(fact["long_prompts"] for fact in facts)
    gaps = [totals[caption][winner] - totals[caption][loser] for caption, (winner, loser) in pairs.items()]
    low, median, high = np.percentile(gaps, [10, 50, 90], method="nearest").tolist()
    record = {
        "settings": settings,
        "prompts": len(totals),
        "long_prompts": long_prompts,
        "pairs": counts,
        "dropped": dropped,
        "gap": {"p10": low, "median": median, "p90": high},
        "image_size": facts[0]["image_size"],
        "latents": None if args.no_latents else facts[0]["latents"],
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }
    write_record(folder, record)
    describe_pairs(folder, record)
    kinds = [kind for kind in EXPORTS if kind in args.export or (folder / f"export-{kind}").exists()]  # none is stale
    exported = [export_pairs(folder, kind) for kind in kinds]

    splits = " and ".join(f"{count} {split}" for split, count in counts.items())
    print(f"pairs      {len(pairs)} of {len(totals)} prompts: {splits}")
    print(f"dropped    {count_words(dropped)}")
    print(f"score gap  median {median:.2f}, 10-90 % {low:.2f} to {high:.2f}, by {' + '.join(args.scorer)}")
    if long_prompts:
        print(f"too long   {long_prompts} prompts have more tokens than the model reads; it does not see their end")
    if speed:
        print(f"speed      {speed:.1f} images/s, with drawing, scoring and writing")
    print(f"memory     {peak_memory()}")
    print(f"look at    {folder / 'pairs.html'}, pairs.png, scores.png and pool.png")
    for path in exported:
        print(f"exported   {path}")
    print(f"next       {next_command(args)}")


def next_command(args: argparse.Namespace) -> str:
    """The command that trains on what was made."""
    command = ["accelerate", "launch", "train_dpo_human.py", "--train_data_dir", args.output_dir]
    if WORLD not in Path(args.pretrained_model_name_or_path).resolve().parents:
        command += ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
    return shlex.join(command)


def main(args: argparse.Namespace) -> None:
    """Draws and scores the pool, every process its own shards; then the main process keeps best against worst."""
    folder = Path(args.output_dir)
    prompts, remark = read_prompts(args.prompts, args.max_prompts)
    settings = {name: getattr(args, name) for name in (*POOL_SETTINGS, *PAIR_SETTINGS)}
    settings["prompts"] = f"{len(prompts)} prompts, sha256 {hashlib.sha256(str(prompts).encode()).hexdigest()[:12]}"
    fixed = [name for name in settings if not (args.rescore and name in PAIR_SETTINGS)]
    check_folder(folder, settings, fixed, args.overwrite)
    parse_scorers(args.scorer)
    if not args.rescore:
        check_model(args.pretrained_model_name_or_path, "model_index.json")

    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))  # a process may wait long for the slowest one's images
    if state.is_main_process:
        print(remark)
        prepare_folder(folder, settings, prompts, args.overwrite)
    state.wait_for_everyone()

    shards = plan_shards(folder, prompts, args.num_images_per_prompt)
    speed = generate_pool(args, shards, state)
    state.wait_for_everyone()
    score_pool(args, list(shards), state)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(args, list(shards), settings, speed)
    state.destroy_process_group()


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

    flag = parser.add_argument_group("pool").add_argument
    flag("--stage", choices=["easy"], default="easy", help="easy: best against worst of the model's own images")
    flag("--prompts", help="text file, one prompt per line")
    flag("--max_prompts", type=int, help="use only the first of them")
    flag("--num_images_per_prompt", type=int, default=20, help="images per prompt, of which two are kept")
    flag("--num_inference_steps", type=int, default=50, help="steps of the sampler")
    flag("--guidance_scale", type=float, default=5.0, help="classifier-free guidance")
    flag("--negative_prompt", default="", help="one for all prompts")
    flag("--sampler", choices=["dpmsolver", "pipeline"], default="dpmsolver", help="the paper's, or the model's own")
    flag("--resolution", type=int, help="height and width in pixels; none: the model's own")
    flag("--height", type=int, help="overrides --resolution")
    flag("--width", type=int, help="overrides --resolution")
    flag("--batch_size", type=int, default=8, help="images drawn at once by a process; no effect on the images")
    flag("--seed", type=int, default=0, help="seed of the images, of the sides and of the split")

    flag = parser.add_argument_group("pairs").add_argument
    flag("--scorer", nargs="+", default=["pickscore"], metavar="[WEIGHT*]NAME[=MODEL]", help=SCORER_HELP)
    flag("--min_margin", type=float, default=0.0, help="least score gap; PickScore: at 1.0 73 %% of people agree")
    flag("--validation_share", type=float, default=0.1, help="share of the prompts kept out of training")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="human-preferences", help="folder of the data set; a second start carries on")
    flag("--export", nargs="+", choices=EXPORTS, default=[], help="also in these formats, as output_dir/export-*")
    flag("--no_latents", action="store_true", help="do not store latents (training then encodes the images)")
    flag("--rescore", action="store_true", help="choose pairs anew from the kept pool, by the flags under pairs")
    flag("--overwrite", action="store_true", help="empty the output folder first, if it is one of ours")

    args = parser.parse_args(argv)
    if args.rescore:
        parser.set_defaults(**known_settings(Path(args.output_dir)))
        args = parser.parse_args(argv)
    elif args.pretrained_model_name_or_path is None:
        use_embedded_world(parser, SCRIPT)
        args = parser.parse_args(argv)
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is loaded."""
    if args.prompts is None:
        parser.error("no prompts: set --prompts to a text file with one prompt per line")
    if args.num_images_per_prompt < 2:
        parser.error("--num_images_per_prompt must be at least 2: a pair has a winner and a loser")
    for name in ("num_inference_steps", "batch_size", "max_prompts", "height", "width"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("height", "width"):
        if (getattr(args, name) or 0) % 8:
            parser.error(f"--{name} {getattr(args, name)} is not a multiple of 8")
    if not 0 <= args.validation_share < 1:
        parser.error("--validation_share must be at least 0 and below 1")
    if args.rescore and args.overwrite:
        parser.error("--rescore keeps the pool, --overwrite deletes it: choose one")


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


def known_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`, as defaults for --rescore."""
    settings = read_record(folder)["settings"]
    return {**settings, "prompts": str(folder / "pool" / "prompts.txt"), "max_prompts": None}


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
