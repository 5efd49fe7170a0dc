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
#     "scipy>=1.11,<2",
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
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    "pickscore, clip, hpsv2, aesthetic, imagereward, clip_iqa, clip_iqa_sharpness, people, vqa, module:function, "
    "file.py:function or file.jsonl; with several, a weighted vote in units of each one's spread"
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
) -> Score:
    """Are the people there whom the prompt asks for, and can their bodies be read? -inf if not, else 0 to 1.

    A detector (https://arxiv.org/abs/2407.17140) finds persons with a score above 0.5 on at least 2 % of the image;
    ViTPose (https://arxiv.org/abs/2204.12484) gives their 17 COCO keypoints; see rate_people. `count` overrides the
    number that count_people reads in the prompt. It sees missing, surplus and unreadable people, not six fingers.
    """
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
        confidence = torch.zeros(0, 17)
        if any(boxes):  # ViTPose's processor raises where a batch has no box at all
            crops = to_crops(images, boxes=boxes, return_tensors="pt").pixel_values.to(device)
            coco = torch.zeros(len(crops), dtype=torch.long, device=device)  # ViTPose+ has an expert per data set
            confidence = estimator(crops, dataset_index=coco).heatmaps.amax(dim=(2, 3)).clamp(0, 1).cpu()
        each = confidence.split([len(found) for found in boxes])
        return [rate_people(k, count or count_people(prompt)) for k, prompt in zip(each, prompts, strict=True)]

    return score


def rate_people(keypoints: torch.Tensor, wanted: int | None) -> float:
    """Mean confidence of the keypoints (P, 17), each in [0, 1]; -inf unless `wanted` people (None: any) are there.

    A box holds a person if the shoulders (5 and 6) have a mean confidence above 0.3; a profile hides one of them.
    """
    people = keypoints[keypoints[:, 5:7].mean(-1) > 0.3]
    there = len(people) == wanted if wanted else len(people) > 0
    return people.mean().item() if there else -math.inf


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
                raise UserError(
                    f"{path} has no score for the image {image_id}: --export images writes the images with their ids"
                )
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
    "vqa": vqa_score,
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
    weight, source = re.fullmatch(r"(?:([^*=:,]*)\*)?(.*)", spec, re.DOTALL).groups()
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
    if name in BUILT_IN_SCORERS:
        factory = partial(load_built_in, source, factory)
    return Scorer(label, weight, source, partial(factory, **options))


def parse_scorers(specs: list[str]) -> list[Scorer]:
    """All of --scorer; two scorers of the same label cannot be told apart."""
    scorers = [parse_scorer(spec) for spec in specs]
    twice = [label for label, count in Counter(scorer.label for scorer in scorers).items() if count > 1]
    if twice:
        raise UserError(f"two scorers are called {twice[0]}: give one of them another name with ,label=...")
    return scorers


def read_options(name: str, factory: Callable[..., Score], options: dict[str, str]) -> dict[str, Any]:
    """The options in the types of the factory's defaults; weights have to be there or to be a hub id."""
    _, *parameters = inspect.signature(factory).parameters.values()  # the device comes first
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
            raise UserError(f"scorer {name} needs a {option}: {name}{'' if option == 'model' else ',' + option}=...")
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
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"scorer {name}: cannot import {module_name}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"scorer {name}: {module_name} has no function {function}")
    return getattr(module, function)


def load_built_in(source: str, factory: Callable[..., Score], device: Device, **options: Any) -> Score:
    """factory(device, **options); what a hub, a file or a library raises becomes one line that names the scorer."""
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
    flag(
        "--scorer",
        nargs="+",
        default=["pickscore"],
        metavar="[WEIGHT*]NAME[=MODEL][,option=value...]",
        help=SCORER_HELP,
    )
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
