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
import contextlib
import csv
import hashlib
import importlib
import importlib.util
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from importlib import metadata
from itertools import chain, groupby, islice
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


def weights_hash(*modules: torch.nn.Module) -> str:
    """sha256 over the weights as fp16, so that it is the same whether they were loaded in fp16 or fp32."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
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
    return " ".join((value or "").split())


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
    """The rows of a folder, or of a hub name with or without :split, that `datasets` reads: of train, else the first.

    A folder is read anew, because one that changed under its old name would come out of the cache as it was.
    """
    import datasets

    folder = Path(source).is_dir()
    name, _, split = (source, "", "") if folder else source.partition(":")
    if not folder and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"no such file or folder: {source}")
    datasets.disable_progress_bars()
    mode = "force_redownload" if folder else "reuse_dataset_if_exists"
    try:
        loaded = datasets.load_dataset(name, split=split or None, download_mode=mode)
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
COLOURS = ("red", "yellow", "orange", "green", "blue", "purple", "pink", "white", "black", "grey", "brown", "beige")
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
    return f"a {age} {origin} {noun}", hair, rng.choice(clothes).format(c=rng.choice(COLOURS)), THEIR[noun]


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
        people[who] = f"{who} in {clothes.split(' and ')[0] if count == 2 else rng.choice(COLOURS)}"
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
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: part.write_text("\n".join(prompts) + "\n", encoding="utf-8"))
    return prompts


# ---- Data -----------------------------------------------------------------------------------------------------------


POOL_COLUMNS = {"prompt_id": pa.string(), "caption": pa.string(), "index": pa.int64(), "seed": pa.int64()}
POOL_COLUMNS |= {"scores": pa.string(), "jpg": pa.binary(), "latents": pa.binary()}

PAIR_COLUMNS = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64()}
PAIR_COLUMNS |= {"caption": pa.string()}  # so far Pick-a-Pic v2
PAIR_COLUMNS |= {"score_0": pa.float64(), "score_1": pa.float64(), "scores": pa.string(), "margin": pa.float64()}
PAIR_COLUMNS |= {"seed_0": pa.int64(), "seed_1": pa.int64(), "source_0": pa.string(), "source_1": pa.string()}
PAIR_COLUMNS |= {"latents_0": pa.binary(), "latents_1": pa.binary()}
PAIR_COLUMNS |= {"prompt_id": pa.string(), "stage": pa.string(), "num_candidates": pa.int64()}


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


# ---- Pictures and words ---------------------------------------------------------------------------------------------

DATA_CARD = """\
---
tags: [text-to-image, dpo, preference]
configs:
- config_name: default
  data_files:
{files}
dataset_info:
  features:
{features}
---

# Preference pairs that a model made for itself

{pairs}, drawn by `{model}`: of {images} images per prompt the best and the worst by {scorers}.
No person has looked at them; what a scorer likes is not always what people like.

![winners above losers](pairs.png)

The columns are Pick-a-Pic v2's (`jpg_0`, `jpg_1`, `label_0`, `label_1`, `caption`) and more: the winner has label 1;
`scores` holds every scorer's raw scores of the two sides as json; `latents_0` and `latents_1` are the sampler's scaled
latents, whose shape and VAE stand in `preference_data.json` with all settings. `pool/` has every image and its scores.
"""

INK, PAPER, GOOD, BAD = "#1c1c1c", "#ffffff", "#12804a", "#b3261e"


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


def draw_sheets(
    folder: Path, shards: list[Path], pairs: dict[str, tuple[int, int]], totals: dict[str, np.ndarray]
) -> None:
    """pairs.png: the first 12 pairs, winners above losers; pool.png: the pool of the first one, best to worst."""
    cards = []
    rows = (row for shard in shards for row in read_shard(shard, ["caption", "jpg"]))
    pools = ((caption, list(pool)) for caption, pool in groupby(rows, key=itemgetter("caption")) if caption in pairs)
    for caption, pool in islice(pools, 12):
        winner, loser = pairs[caption]
        colours = {winner: GOOD, loser: BAD}
        images = [
            (from_jpeg(row["jpg"]), f"{score:.2f}", colours.get(i, INK))
            for i, (row, score) in enumerate(zip(pool, totals[caption], strict=True))
        ]
        if not cards:
            best_first = [Card([images[i]]) for i in np.argsort(-totals[caption])]  # nan comes last
            title = textwrap.shorten(f"Best to worst: {caption}", 110)
            contact_sheet(title, best_first, per_row=10, cell=144).save(folder / "pool.png")
        cards.append(Card([images[winner], images[loser]], caption))
    contact_sheet("Winners above losers, with their scores", cards, per_row=6).save(folder / "pairs.png")


def data_card(args: argparse.Namespace, counts: dict[str, int]) -> str:
    """README.md of the data set; its yaml is what datasets.load_dataset and the Hub read."""
    splits = {split: count for split, count in counts.items() if count}
    kinds = {pa.float64(): "float64", pa.int64(): "int64"}
    columns = pair_columns(args.no_latents)
    return DATA_CARD.format(
        files="\n".join(f"  - {{split: {split}, path: data/{split}-00000-of-00001.parquet}}" for split in splits),
        features="\n".join(f"  - {{name: {name}, dtype: {kinds.get(kind, kind)}}}" for name, kind in columns),
        pairs=" and ".join(f"{count} {split} pairs" for split, count in splits.items()),
        model=args.pretrained_model_name_or_path,
        images=args.num_images_per_prompt,
        scorers=", ".join(args.scorer),
    )


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
                "long_prompts": len(too_long(shards[path], pipe.tokenizer)),
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
    draw_sheets(folder, shards, pairs, totals)
    replace_file(folder / "README.md", lambda part: part.write_text(data_card(args, counts)))
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

    splits = " and ".join(f"{count} {split}" for split, count in counts.items())
    print(f"pairs      {len(pairs)} of {len(totals)} prompts: {splits}")
    print(f"dropped    {count_words(dropped)}")
    print(f"score gap  median {median:.2f}, 10-90 % {low:.2f} to {high:.2f}, by {' + '.join(args.scorer)}")
    if long_prompts:
        print(f"too long   {long_prompts} prompts have more tokens than the model reads; it does not see their end")
    if speed:
        print(f"speed      {speed:.1f} images/s, with drawing, scoring and writing")
    print(f"memory     {peak_memory()}")
    print(f"look at    {folder / 'pairs.png'} and {folder / 'pool.png'}")
    print(f"next       {next_command(args)}")


def next_command(args: argparse.Namespace) -> str:
    """The command that trains on what was made."""
    command = ["accelerate", "launch", "train_dpo_human.py", "--train_data_dir", args.output_dir]
    if WORLD not in Path(args.pretrained_model_name_or_path).resolve().parents:
        command += ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
    return shlex.join(command)


def start_processes() -> PartialState:
    """This process's place among those that `accelerate launch` started, on its GPU if there is one."""
    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # a process may wait long for the slowest one's images


def caption_photos(args: argparse.Namespace) -> None:
    """--caption_model: the main process captions the photos of --prompts that have no caption; the others wait."""
    folder = Path(args.prompts)
    if not is_photo_folder(folder):
        raise UserError(f"--caption_model needs a folder of photos, and --prompts {folder} is none")
    state = start_processes()
    if state.is_main_process:
        write_captions(folder, args.caption_model, state.device, args.batch_size, args.prompt_column)
    state.wait_for_everyone()


def main(args: argparse.Namespace) -> None:
    """Draws and scores the pool, every process its own shards; then the main process keeps best against worst."""
    if args.write_prompts:
        prompts = write_prompts(Path(args.prompts), args.write_prompts, args.seed)
        print("\n    ".join([f"{len(prompts)} prompts in {args.prompts}, such as", *prompts[:3]]))
        return
    if args.caption_model:
        caption_photos(args)
    folder = Path(args.output_dir)
    prompts, remark = read_prompts(args.prompts, args.prompt_column, args.max_prompts)
    settings = {name: getattr(args, name) for name in (*POOL_SETTINGS, *PAIR_SETTINGS)}
    settings["prompts"] = f"{len(prompts)} prompts, sha256 {hashlib.sha256(str(prompts).encode()).hexdigest()[:12]}"
    fixed = [name for name in settings if not (args.rescore and name in PAIR_SETTINGS)]
    check_folder(folder, settings, fixed, args.overwrite)
    parse_scorers(args.scorer)
    if not args.rescore:
        check_model(args.pretrained_model_name_or_path, "model_index.json")

    state = start_processes()
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

    flag = parser.add_argument_group("prompts").add_argument
    flag("--prompts", help=PROMPTS_HELP)
    flag("--prompt_column", help="column of the prompts or captions; none: the first of prompt, caption, text")
    flag("--max_prompts", type=int, help="use only the first of them")
    flag("--write_prompts", type=int, metavar="N", help="write N prompts of people to the file --prompts, and stop")
    flag(
        "--caption_model", help="image-to-text model that captions the photos of the folder --prompts without caption"
    )

    flag = parser.add_argument_group("pool").add_argument
    flag("--stage", choices=["easy"], default="easy", help="easy: best against worst of the model's own images")
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
    flag("--no_latents", action="store_true", help="do not store latents (training then encodes the images)")
    flag("--rescore", action="store_true", help="choose pairs anew from the kept pool, by the flags under pairs")
    flag("--overwrite", action="store_true", help="empty the output folder first, if it is one of ours")

    args = parser.parse_args(argv)
    if args.rescore:
        parser.set_defaults(**known_settings(Path(args.output_dir)))
        args = parser.parse_args(argv)
    elif args.pretrained_model_name_or_path is None and args.write_prompts is None:
        use_embedded_world(parser, SCRIPT)
        args = parser.parse_args(argv)
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is loaded."""
    if args.prompts is None:
        parser.error("no prompts: set --prompts to a text file with one prompt per line, or another source (--help)")
    if args.num_images_per_prompt < 2:
        parser.error("--num_images_per_prompt must be at least 2: a pair has a winner and a loser")
    for name in ("num_inference_steps", "batch_size", "max_prompts", "write_prompts", "height", "width"):
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
