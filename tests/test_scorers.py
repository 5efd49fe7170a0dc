# SPDX-License-Identifier: Apache-2.0
"""The scorers: every one, on a tiny random model of the real class, against its formula written out here."""

import json
import math
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch.nn import functional as F

import make_preference_data as data


CLIP = data.WORLD / "scorer"
PROMPTS = ["a walking woman in a purple shirt", "two men", "a crowd on a bridge", "a mother and her daughter", "a man"]
NAN, INF = math.nan, math.inf

PLUGIN = """
def redness(device, channel=0, scale=1.0, name="x"):
    return lambda images, prompts: [scale * image.resize((1, 1)).getpixel((0, 0))[channel] for image in images]

def anything(device, **options):
    return lambda images, prompts: [float(options["bonus"])] * len(images)
"""


@pytest.fixture(autouse=True)
def quiet():
    data.quiet_libraries()


def pictures(count: int) -> list[Image.Image]:
    """Noise, portrait."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 80, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def load(spec: str) -> data.Score:
    return data.parse_scorer(spec).load("cpu")


def shake(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Weights large enough that every part of the input shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def check_order_and_batch(score: data.Score, images: list[Image.Image], prompts: list[str]) -> None:
    """A score depends on its own image and prompt alone."""
    together = score(images, prompts)
    np.testing.assert_allclose(score(images[::-1], prompts[::-1])[::-1], together, rtol=1e-3, atol=1e-4)
    alone = [score([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-4)


# ---- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embeds():
    """(image, text) embeddings of five pictures and PROMPTS by CLIPModel itself, padded and cropped, and its scale."""
    from transformers import CLIPModel, CLIPProcessor

    data.quiet_libraries()
    clip = CLIPModel.from_pretrained(CLIP).float().eval()
    processor = CLIPProcessor.from_pretrained(CLIP)
    squares = [ImageOps.pad(image, (80, 80)) for image in pictures(5)]
    with torch.no_grad():
        padded, cropped = (
            clip(**processor(images=images, text=PROMPTS, padding=True, return_tensors="pt"))
            for images in (squares, pictures(5))
        )
    return padded.image_embeds, cropped.image_embeds, padded.text_embeds, math.exp(clip.logit_scale.item())


def test_scores_of_clip(embeds):
    images, cropped, texts, scale = embeds
    cosine, cropped = F.cosine_similarity(images, texts), F.cosine_similarity(cropped, texts)
    assert np.ptp(cosine.numpy()) > 1e-3
    assert (cosine - cropped).abs().max() > 1e-3
    for spec, expected in {
        f"pickscore={CLIP}": scale * cosine,
        f"clip={CLIP}": 100 * cosine,
        f"hpsv2={CLIP}": cosine,
        f"pickscore={CLIP},crop=1": scale * cropped,
        f"clip={CLIP},crop=0,processor={CLIP}": 100 * cosine,
    }.items():
        np.testing.assert_allclose(load(spec)(pictures(5), PROMPTS), expected, rtol=1e-4, atol=1e-5, err_msg=spec)


@pytest.mark.parametrize("name", ["pickscore", "clip_iqa"])
def test_clip_scores_one_image_at_a_time(name):
    check_order_and_batch(load(f"{name}={CLIP}"), pictures(5), PROMPTS)


def test_a_long_prompt_is_cut_by_tokens():
    score, image = load(f"pickscore={CLIP}"), pictures(1)
    long = " ".join(["a walking person in a purple shirt"] * 30)
    assert score(image, [long]) == score(image, [long + " on a pink background"])
    assert score(image, [long]) != score(image, ["on a pink background"])


def test_clip_iqa(embeds):
    from transformers import AutoTokenizer, CLIPModel

    images, _, _, scale = embeds
    clip, tokenizer = CLIPModel.from_pretrained(CLIP).float().eval(), AutoTokenizer.from_pretrained(CLIP)
    for spec, anchors in {
        f"clip_iqa={CLIP}": ("Good photo.", "Bad photo."),
        f"clip_iqa_sharpness={CLIP}": ("Sharp photo.", "Blurry photo."),
        f"clip_iqa={CLIP},good=A real, natural photo.,bad=A drawing.": ("A real, natural photo.", "A drawing."),
    }.items():
        with torch.no_grad():
            good, bad = (
                F.normalize(
                    clip.text_projection(clip.text_model(**tokenizer(t, return_tensors="pt")).pooler_output)[0], dim=0
                )
                for t in anchors
            )
        expected = torch.sigmoid(scale * (images @ good - images @ bad))
        np.testing.assert_allclose(load(spec)(pictures(5), PROMPTS), expected, rtol=1e-4)
        assert load(spec)(pictures(1), ["x"]) == load(spec)(pictures(1), ["y"])


def head(width: int) -> torch.nn.Module:
    """The head of LAION and of ImageReward as they define it."""
    sizes = [width, 24, 12, 8, 4, 1]
    linear = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    layers = [linear[0], torch.nn.Dropout(0.2), linear[1], torch.nn.Dropout(0.2), linear[2], torch.nn.Dropout(0.1)]
    return shake(torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers, linear[3], linear[4])}))


def test_aesthetic(embeds, tmp_path):
    images = embeds[0]
    mlp = head(images.shape[1])
    with torch.no_grad():
        expected = mlp["layers"](images)[:, 0]
    save_file(mlp.state_dict(), tmp_path / "model.safetensors")
    torch.save(mlp.state_dict(), tmp_path / "head.pth")
    for place in (tmp_path, tmp_path / "model.safetensors", tmp_path / "head.pth"):
        score = load(f"aesthetic={CLIP},head={place}")
        np.testing.assert_allclose(score(pictures(5), PROMPTS), expected, rtol=1e-4)
    assert np.ptp(expected.numpy()) > 1e-2


# ---- ImageReward ----------------------------------------------------------------------------------------------------


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "men", "two", "woman", "in", "shirt", "purple"]
WIDTH = {"visual_encoder": 192, "text_encoder": 128}  # three and two heads of 64


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder with ImageReward.pt, random, in the published layout, and a BERT tokenizer."""
    from transformers import BertTokenizer

    folder, generator = tmp_path_factory.mktemp("blip"), torch.Generator().manual_seed(0)
    weights = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 1) + (
            len(shape) == 1
        )
        if bias:
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    wide, text = WIDTH.values()
    see, read = (f"blip.{part}." for part in WIDTH)
    weights[see + "cls_token"] = torch.randn(1, 1, wide, generator=generator)
    weights[see + "pos_embed"] = torch.randn(1, 5, wide, generator=generator)
    add(see + "patch_embed.proj", wide, 3, 8, 8)
    add(see + "norm", wide)
    for i in range(2):
        for name, *shape in [
            ("norm1", wide),
            ("attn.qkv", 3 * wide, wide),
            ("attn.proj", wide, wide),
            ("norm2", wide),
            ("mlp.fc1", 2 * wide, wide),
            ("mlp.fc2", wide, 2 * wide),
        ]:
            add(f"{see}blocks.{i}.{name}", *shape)
    weights[read + "embeddings.position_ids"] = torch.arange(64)[None]
    add(read + "embeddings.word_embeddings", len(WORDS), text, bias=False)
    add(read + "embeddings.position_embeddings", 64, text, bias=False)
    add(read + "embeddings.LayerNorm", text)
    for i in range(2):
        layer = f"{read}encoder.layer.{i}."
        for part, width in (("attention", text), ("crossattention", wide)):
            add(f"{layer}{part}.self.query", text, text)
            add(f"{layer}{part}.self.key", text, width)
            add(f"{layer}{part}.self.value", text, width)
            add(f"{layer}{part}.output.dense", text, text)
            add(f"{layer}{part}.output.LayerNorm", text)
        add(layer + "intermediate.dense", 3 * text, text)
        add(layer + "output.dense", text, 3 * text)
        add(layer + "output.LayerNorm", text)
    weights |= {f"mlp.{key}": value for key, value in head(text).state_dict().items()}
    torch.save(weights, folder / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def image_reward_by_hand(w: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
    """BLIP (https://arxiv.org/abs/2201.12086) with ImageReward's head, from the tensors alone."""

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def attend(q, k, v, mask=None):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        weights = q @ k.transpose(-1, -2) / 8
        if mask is not None:
            weights = weights.masked_fill(mask[:, None, None] == 0, -INF)
        return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)

    see, read = (f"blip.{part}." for part in WIDTH)
    patches = F.conv2d(pixels, w[see + "patch_embed.proj.weight"], w[see + "patch_embed.proj.bias"], stride=8)
    x = torch.cat([w[see + "cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + w[see + "pos_embed"]
    for block in (f"{see}blocks.{i}." for i in range(2)):
        x = x + linear(
            attend(*linear(norm(x, block + "norm1", 1e-6), block + "attn.qkv").chunk(3, -1)), block + "attn.proj"
        )
        x = x + linear(F.gelu(linear(norm(x, block + "norm2", 1e-6), block + "mlp.fc1")), block + "mlp.fc2")
    x = norm(x, see + "norm", 1e-6)
    t = w[read + "embeddings.word_embeddings.weight"][ids]
    t = t + w[read + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    t = norm(t, read + "embeddings.LayerNorm", 1e-12)
    for layer in (f"{read}encoder.layer.{i}." for i in range(2)):
        for part in ("attention", "crossattention"):
            source, hidden = (t, mask) if part == "attention" else (x, None)
            q, k, v = (
                linear(y, f"{layer}{part}.self.{name}")
                for y, name in ((t, "query"), (source, "key"), (source, "value"))
            )
            t = norm(
                linear(attend(q, k, v, hidden), f"{layer}{part}.output.dense") + t,
                f"{layer}{part}.output.LayerNorm",
                1e-12,
            )
        h = linear(F.gelu(linear(t, layer + "intermediate.dense")), layer + "output.dense")
        t = norm(h + t, layer + "output.LayerNorm", 1e-12)
    t = t[:, 0]
    for i in (0, 2, 4, 6, 7):
        t = linear(t, f"mlp.layers.{i}")
    return (t[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward(blip):
    prompts = ["a man", "two men in a purple shirt", "a woman " * 40, "men", "a dog"]
    rows = [prompt.split()[:33] for prompt in prompts]  # between [CLS] and [SEP]: 35 tokens in all
    ids = torch.zeros(5, 35, dtype=torch.long)
    for row, words in zip(ids, rows, strict=True):
        numbers = [WORDS.index(word) if word in WORDS else 1 for word in words]
        row[: len(words) + 2] = torch.tensor([2, *numbers, 3])
    mask = (torch.arange(35) < torch.tensor([len(words) + 2 for words in rows])[:, None]).int()
    weights = torch.load(blip / "ImageReward.pt", weights_only=True)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for crop, fit in (("0", ImageOps.pad), ("1", ImageOps.fit)):
        pixels = [(np.asarray(fit(image, (16, 16))) / 255 - mean) / std for image in pictures(5)]
        pixels = torch.tensor(np.array(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
        expected = image_reward_by_hand(weights, pixels, ids, mask)
        score = load(f"imagereward={blip},tokenizer={blip},crop={crop}")
        np.testing.assert_allclose(score(pictures(5), prompts), expected, rtol=1e-4, atol=1e-4)
        assert np.ptp(expected.numpy()) > 0.1
    check_order_and_batch(score, pictures(5), prompts)
    assert score(pictures(1), prompts[:1]) != score(pictures(1), prompts[1:2])  # it reads
    assert load(f"imagereward={blip / 'ImageReward.pt'},tokenizer={blip}")(pictures(1), ["a man"])


# ---- People ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "people"),
    [
        ("a woman", 1),
        ("two men", 2),
        ("a couple", 2),
        ("three friends", 3),
        ("a mother and her daughter", 2),
        ("a crowd", None),
        ("a group of people in a park", None),
        ("a photo of an old man with two young children, smiling", 3),
        ("A group of three friends", 3),
        ("a couple of women", 2),
        ("a 25 year old woman", 1),
        ("a 25-year-old woman and 3 kids", 4),
        ("a woman in red, the woman smiles", 1),
        ("portrait of a beautiful woman, woman, face", 1),
        ("the man, and another man", 2),
        ("bride and groom", 2),
        ("two dogs and a man", 1),
        ("a woman and a couple of sisters", 3),
        ("a man in front of a crowd", None),
        ("two people, a man and a woman", None),
        ("a couple: a tall man, a small woman", None),
        ("one woman among women", None),
        ("people", None),
        ("a snowman", None),
        ("a portrait, 4k", None),
        ("", None),
    ],
)
def test_count_people(prompt, people):
    assert data.count_people(prompt) == people


JOINTS = {  # a man of height 100 from the front, the arms hanging: nose, eyes, ears, shoulders, elbows, ... ankles
    "head": [(0, 94), (2, 96), (-2, 96), (4, 95), (-4, 95)],
    "arms": [(11, 82), (-11, 82), (13, 63), (-13, 63), (14, 48), (-14, 48)],
    "legs": [(6, 53), (-6, 53), (7, 28), (-7, 28), (7, 4), (-7, 4)],
}


def skeleton(**moved: tuple[float, float]) -> torch.Tensor:
    """The keypoints (1, 17, 2) of JOINTS, with those at the numbers `_9=(x, y)` elsewhere."""
    points = torch.tensor([place for part in JOINTS.values() for place in part], dtype=torch.float32)
    for number, place in moved.items():
        points[int(number[1:])] = torch.tensor(place, dtype=torch.float32)
    return points[None]


def seen(*hidden: int) -> torch.Tensor:
    """Confidences (1, 17) of 0.8, of 0.2 for the keypoints `hidden`."""
    confidence = torch.full((1, 17), 0.8)
    confidence[0, list(hidden)] = 0.2
    return confidence


def test_rate_people():
    clear, faint, profile = seen(), seen(5, 6), seen()
    profile[0, 5] = 0.1
    whole = skeleton().expand(2, 17, 2)
    both = torch.cat([clear, clear])
    assert data.rate_people(whole, both, 2) == pytest.approx(0.8)
    assert data.rate_people(whole, torch.cat([clear, faint]), 1) == pytest.approx(0.8)
    assert data.rate_people(whole, torch.cat([clear, profile]), None) == pytest.approx((34 * 0.8 - 0.7) / 34)
    assert data.rate_people(whole, torch.cat([clear, faint]), 2) == -INF
    assert data.rate_people(whole, both, 1) == -INF
    nobody = torch.zeros(0, 17, 2), torch.zeros(0, 17)
    assert data.rate_people(whole[:1], faint, None) == data.rate_people(*nobody, None) == -INF


def test_parts_of_the_rate_of_people():
    def parts(points: torch.Tensor, confidence: torch.Tensor, wanted: int | None) -> list[float]:
        return [data.rate_people(points, confidence, wanted, part) for part in ("count", "pose", "limbs", "")]

    broken = skeleton(_9=(60, 60))  # a forearm of 47
    two, sure = torch.cat([skeleton(), broken]), torch.cat([seen(), seen()])
    assert parts(broken, seen(), 1) == pytest.approx([1, 0.8, 7 / 8, 0.8 * 7 / 8])
    assert parts(two, sure, 2) == pytest.approx([1, 0.8, 15 / 16, 0.8 * 15 / 16])
    assert parts(two, sure, 3) == pytest.approx([0, 0.8, 15 / 16, -INF])
    assert parts(two, sure, None) == pytest.approx([1, 0.8, 15 / 16, 0.8 * 15 / 16])
    assert parts(two, torch.cat([seen(), seen(5, 6)]), 1) == pytest.approx([1, 0.8, 1, 0.8])  # the broken one is none
    hidden = seen(*range(7, 17))  # head and shoulders: no limb is seen
    assert parts(broken, hidden, 1) == pytest.approx([1, (7 * 0.8 + 2) / 17, NAN, (7 * 0.8 + 2) / 17], nan_ok=True)
    nobody = torch.zeros(0, 17, 2), torch.zeros(0, 17)
    for wanted in (1, None):
        assert parts(*nobody, wanted) == pytest.approx([0, 0, NAN, -INF], nan_ok=True)


@pytest.mark.parametrize(
    ("points", "confidence", "share"),
    [
        (skeleton(), seen(), 1),
        (skeleton(_7=(68, 82), _9=(113, 82)), seen(), 6 / 8),  # an arm three times too long
        (skeleton(_9=(14, 40)), seen(), 1),  # half as long again is within what a view can do
        (skeleton(_15=(7, -30)), seen(), 7 / 8),
        (skeleton(_7=(12, 80), _9=(12, 79)), seen(), 1),  # an arm that points at the camera
        (skeleton(_13=(6, 50), _14=(-6, 50), _15=(6, 26), _16=(-6, 26)), seen(), 1),  # sitting, from the front
        (skeleton(_7=(68, 82), _9=(113, 82)), seen(9), 6 / 7),  # the hand is hidden
        (skeleton(_7=(68, 82), _9=(113, 82)), seen(7), 1),
        (skeleton(), seen(*range(7, 17)), NAN),  # no limb
        (skeleton(), seen(*range(5), 11, 12), NAN),  # nothing but a shoulder line to measure the body by
        (skeleton(), seen(*range(5)), 1),
        (skeleton(), seen(*range(11, 17)), 1),  # head and arms
        (skeleton(_7=(68, 82), _9=(113, 82)), seen(*range(11, 17)), 2 / 4),
    ],
)
def test_plausible_limbs(points, confidence, share):
    turned = torch.stack([-points[..., 1], points[..., 0]], dim=-1)
    mirrored = points * torch.tensor([-1, 1])
    swapped = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]  # left keypoints become right ones
    for same in (points, 0.04 * points + 7, turned, mirrored):
        found = data.plausible_limbs(same, confidence)
        assert found.shape == (1,)
        assert found.item() == pytest.approx(share, nan_ok=True)
    assert data.plausible_limbs(mirrored[:, swapped], confidence[:, swapped]).item() == pytest.approx(
        share, nan_ok=True
    )


def test_each_person_has_a_height_of_their_own():
    points = torch.cat([skeleton(), 0.2 * skeleton(_9=(60, 60)), 5 * skeleton()])
    sure = torch.cat([seen(), seen(), seen(*range(17))])
    np.testing.assert_allclose(data.plausible_limbs(points, sure), [1, 7 / 8, NAN])
    np.testing.assert_allclose(data.body_height(points, sure), [100, 20, NAN], rtol=0.06)
    assert data.plausible_limbs(points[:0], sure[:0]).shape == (0,)


def test_no_pose_and_no_view_makes_a_right_limb_too_long():
    """Bodies of right lengths, each limb in any direction, seen from anywhere, without perspective."""
    rng = np.random.default_rng(0)
    points = np.zeros((2000, 17, 3))
    points[:, 5:7, 0], points[:, 11:13, 0] = (11.5, -11.5), (5.5, -5.5)
    points[:, 5:7, 1] = 29
    points[:, :5] = np.array([(0, 39, 7), (2, 41, 5), (-2, 41, 5), (4, 40, 0), (-4, 40, 0)])
    for (start, end), share in data.LIMBS.items():
        direction = rng.normal(size=(2000, 3))
        points[:, end] = points[:, start] + 100 * share * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    views = np.linalg.qr(rng.normal(size=(2000, 3, 3)))[0]
    flat = torch.tensor((points @ views)[..., :2], dtype=torch.float32)
    sure = torch.full((2000, 17), 0.8)
    assert data.plausible_limbs(flat, sure).min() == 1
    height = data.body_height(flat, sure)
    assert height.min() > 100 / math.sqrt(2)
    flat[:, 9] = flat[:, 7] + 5 * (flat[:, 9] - flat[:, 7])  # what is far too long is seen from most sides
    assert (data.plausible_limbs(flat, sure) == 7 / 8).float().mean() > 0.9


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny RT-DETR v2 that finds persons (its second label) and dogs in noise; `blind` finds nothing."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    data.quiet_libraries()
    folder = tmp_path_factory.mktemp("detector")
    features = ["stage2", "stage3", "stage4"]
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=features, layer_type="basic"
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[8] * 3,
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_in_channels=[16] * 3,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        d_model=16,
        num_queries=6,
        num_denoising=0,
        id2label={0: "dog", 1: "person"},
        label2id={"dog": 0, "person": 1},
    )
    torch.manual_seed(0)  # its vectors are drawn too
    model = shake(RTDetrV2ForObjectDetection(config), seed=1)
    for boxes, labels in zip(model.bbox_embed, model.class_embed, strict=True):
        boxes.layers[-1].bias.data[2:] = 0.9  # around 2 % of the image
        labels.weight.data *= 3
        labels.bias.data[:] = torch.tensor([-3.0, -2.5])  # around a score of 1/2
    for name in ("seeing", "blind"):
        if name == "blind":
            torch.nn.init.constant_(model.class_embed[-1].bias, -1e4)
        model.save_pretrained(folder / name)
        RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pose(tmp_path_factory):
    """A tiny ViTPose whose heatmaps are around 0.4."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation
    from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

    data.quiet_libraries()
    folder = tmp_path_factory.mktemp("pose")
    backbone = VitPoseBackboneConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=[32, 24],
        patch_size=[8, 8],
        out_indices=[1],
    )
    model = shake(VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)), std=0.05)
    torch.nn.init.uniform_(model.head.conv.bias, -0.1, 0.5, generator=torch.Generator().manual_seed(0))
    model.head.conv.bias.data[5:7] = -0.15  # the shoulders around 0.3
    model.head.conv.bias.data[:5] = -0.4  # mostly no head, which would make every limb short
    model.save_pretrained(folder)
    VitPoseImageProcessorPil(size={"height": 32, "width": 24}).save_pretrained(folder)
    return folder


def people_by_hand(finder: torch.nn.Module, reader: torch.nn.Module, crops, image: Image.Image) -> list[torch.Tensor]:
    """The heatmaps (17, H, W) of every person's box that is large enough."""
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    found = []
    with torch.no_grad():
        out = finder(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        chosen = out.logits[0].sigmoid().flatten().topk(6).indices  # the six best of queries x labels
        for query, label in ((i // 2, i % 2) for i in chosen.tolist()):
            x, y, w, h = out.pred_boxes[0, query].tolist()
            left, right = max(x - w / 2, 0) * image.width, min(x + w / 2, 1) * image.width
            top, bottom = max(y - h / 2, 0) * image.height, min(y + h / 2, 1) * image.height
            large = (right - left) * (bottom - top) >= 0.02 * image.width * image.height
            if label == 1 and large and out.logits[0, query, 1] > 0:
                crop = crops(image, boxes=[[[left, top, right - left, bottom - top]]], return_tensors="pt")
                found.append(reader(**crop).heatmaps[0])
    return found


def limbs_by_hand(heatmaps: torch.Tensor) -> float:
    """Share of the clear limbs of one person that are not too long; nan where that cannot be told."""
    best = [np.unravel_index(one.argmax(), one.shape) for one in heatmaps.numpy()]
    clear = [one.max() > 0.3 for one in heatmaps]

    def length(a: int, b: int) -> float:
        return math.dist(best[a], best[b]) if clear[a] and clear[b] else NAN

    def longest(*lengths: float) -> float:
        return max((one for one in lengths if not math.isnan(one)), default=0)

    torso, shoulders = longest(length(5, 11), length(6, 12)) / 0.29, longest(length(5, 6)) / 0.23
    head = longest(*(length(a, b) for a in range(5) for b in range(5) if a != b)) / 0.08
    if sum(part > 0 for part in (torso, shoulders, head)) < 2:
        return NAN
    arms = {(5, 7): 0.19, (6, 8): 0.19, (7, 9): 0.15, (8, 10): 0.15}
    legs = {(11, 13): 0.25, (12, 14): 0.25, (13, 15): 0.25, (14, 16): 0.25}
    rates = [length(*ends) / share for ends, share in {**arms, **legs}.items()]
    rates = [rate <= 1.6 * max(torso, shoulders, head) for rate in rates if not math.isnan(rate)]
    return sum(rates) / len(rates) if rates else NAN


def test_people(detector, pose):
    from transformers import AutoImageProcessor, RTDetrV2ForObjectDetection, VitPoseForPoseEstimation

    finder = RTDetrV2ForObjectDetection.from_pretrained(detector / "seeing").eval()
    reader = VitPoseForPoseEstimation.from_pretrained(pose).eval()
    crops = AutoImageProcessor.from_pretrained(pose, backend="pil")
    images = pictures(12)
    found = [people_by_hand(finder, reader, crops, image) for image in images]
    boxes = [len(each) for each in found]
    found = [[k for k in each if k[5:7].amax(dim=(1, 2)).clamp(0, 1).mean() > 0.3] for each in found]
    counts = [len(each) for each in found]
    assert {0, 1, 2, 3} <= {*counts}
    assert counts != boxes
    means = [torch.stack(each).amax(dim=(2, 3)).clamp(0, 1).mean().item() if each else 0.0 for each in found]
    limbs = [[share for share in map(limbs_by_hand, each) if not math.isnan(share)] for each in found]
    limbs = [sum(each) / len(each) if each else NAN for each in limbs]
    assert len({share for share in limbs if not math.isnan(share)}) > 1
    rates = [mean * (1 if math.isnan(share) else share) for mean, share in zip(means, limbs, strict=True)]
    rates = [rate if count else -INF for rate, count in zip(rates, counts, strict=True)]

    place = f"{detector / 'seeing'},pose={pose}"
    score = load(f"people={place}")
    np.testing.assert_allclose(score(images, ["people"] * 12), rates, rtol=1e-3)
    for prompt, wanted in (("a woman", 1), ("two men", 2)):
        expected = [rate if count == wanted else -INF for rate, count in zip(rates, counts, strict=True)]
        np.testing.assert_allclose(score(images, [prompt] * 12), expected, rtol=1e-3)
        fixed = load(f"people={place},count={wanted}")
        np.testing.assert_allclose(fixed(images, ["seven women"] * 12), expected, rtol=1e-3)
        counted = load(f"people_count={place}")(images, [prompt] * 12)
        assert counted == [float(count == wanted) for count in counts]
    assert load(f"people_count={place}")(images, ["people"] * 12) == [float(count > 0) for count in counts]
    for spec in (f"people_pose={place}", f"people={place},part=pose"):
        np.testing.assert_allclose(load(spec)(images, ["a woman"] * 12), means, rtol=1e-3)
    np.testing.assert_allclose(load(f"people_limbs={place}")(images, ["two men"] * 12), limbs, rtol=1e-3)
    check_order_and_batch(score, images, ["people", "a man", "two men"] * 4)


@pytest.mark.parametrize(
    ("box", "confidence", "counted"),  # box: centre, width and height as shares of the image
    [
        ((0.5, 0.5, 0.2, 0.11), 0.6, 1),
        ((0.5, 0.5, 0.2, 0.09), 0.6, 0),
        ((0.5, 0.5, 0.5, 0.5), 0.4, 0),
        ((0.95, 0.5, 0.2, 0.11), 0.6, 0),  # what sticks out does not count
        ((0.05, 0.5, 0.2, 0.11), 0.6, 0),
        ((0.5, 0.95, 0.11, 0.2), 0.6, 0),
        ((0.5, 0.05, 0.11, 0.2), 0.6, 0),
    ],
)
def test_boxes_that_count(box, confidence, counted, detector, pose, monkeypatch):
    from transformers import RTDetrV2ForObjectDetection
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2ObjectDetectionOutput

    logits = torch.tensor([[[-9.0, math.log(confidence / (1 - confidence))]]])
    output = RTDetrV2ObjectDetectionOutput(logits=logits, pred_boxes=torch.tensor([[box]]))
    score = load(f"people={detector / 'seeing'},pose={pose}")
    monkeypatch.setattr(RTDetrV2ForObjectDetection, "forward", lambda self, **inputs: output)
    monkeypatch.setattr(data, "rate_people", lambda points, *_: len(points))
    assert score(pictures(1), ["a woman"]) == [counted]


def test_pictures_without_people(detector, pose):
    score = load(f"people={detector / 'blind'},pose={pose}")
    assert score(pictures(2), ["a woman", "a landscape"]) == [-INF, -INF]
    for part, expected in (("count", 0), ("pose", 0), ("limbs", NAN)):
        found = load(f"people_{part}={detector / 'blind'},pose={pose}")(pictures(2), ["a woman", "a landscape"])
        assert found == pytest.approx([expected] * 2, nan_ok=True)
    assert data.best_and_worst([*score(pictures(1), ["a man"]), 0.4, 0.5])[0] == (2, 0)


# ---- VQA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A tiny LLaVA over bytes, to which "Yes" and <image> are single tokens; `bare` is the same without a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    data.quiet_libraries()
    folder = tmp_path_factory.mktemp("vlm")
    bytes_only = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_tokens(["Yes"])
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = shake(
        LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
        )
    )
    template = (
        "{% for turn in messages %}USER: {% for part in turn['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    for name, chat_template in (("chat", template), ("bare", None)):
        model.save_pretrained(folder / name)
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat_template,
        ).save_pretrained(folder / name)
    return folder


def test_vqa(vlm):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(vlm / "chat").eval()
    processor = AutoProcessor.from_pretrained(vlm / "chat", backend="pil")
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    own = "Are they {prompt}, yes or no? Answer Yes or No."
    usual = 'Does this picture show "{prompt}" with correct human anatomy? Answer Yes or No.'
    for spec, form in {
        f"vqa={vlm / 'chat'}": f"USER: <image>{usual} ASSISTANT:",
        f"vqa={vlm / 'chat'},question={own}": f"USER: <image>{own} ASSISTANT:",
        f"vqa={vlm / 'bare'},question=<image>{own}": f"<image>{own}",
    }.items():
        expected = []
        for image, prompt in zip(pictures(5), PROMPTS, strict=True):
            inputs = processor(images=image, text=form.replace("{prompt}", prompt), return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1].double()
            expected.append((logits[yes] - logits.logsumexp(0)).exp().item())
        np.testing.assert_allclose(load(spec)(pictures(5), PROMPTS), expected, rtol=1e-3)
        assert np.ptp(expected) > 0.1 * np.mean(expected)
    check_order_and_batch(load(spec), pictures(5), PROMPTS)


# ---- Safety ---------------------------------------------------------------------------------------------------------


def test_the_safety_checker_vetoes_what_it_flags(tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    checker = shake(StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = pictures(4)
    pixels = processor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = F.normalize(checker.visual_projection(checker.vision_model(pixels)[1]), dim=-1)
        checker.special_care_embeds.zero_()  # cosine 0 with everything
        checker.special_care_embeds_weights.fill_(1.0)
        checker.concept_embeds.copy_(embeds[2].expand_as(checker.concept_embeds))
        similar = sorted((embeds @ embeds[2]).tolist())
        checker.concept_embeds_weights.fill_((similar[-1] + similar[-2]) / 2)  # between the third image and the next
    checker.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scores = load(f"safety={tmp_path}")(images, PROMPTS[:4])
    assert [math.isnan(score) for score in scores] == [False, False, True, False]
    assert [score for score in scores if not math.isnan(score)] == [0.0, 0.0, 0.0]


# ---- Your own -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A plug-in and files with scores, good and bad."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    lines = [{"image_id": "p-0", "score": 1.5}, {"image_id": "p-1", "score": None}, {"image_id": "p-2", "score": -2}]
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    bad = {"text": "good", "list": "[1, 2]", "word": '{"image_id": "b", "score": "good"}', "name": '{"score": 1}'}
    for name, line in bad.items():
        (tmp_path / f"{name}.jsonl").write_text(f'{{"image_id": "a", "score": 1}}\n{line}\n')
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def test_scores_made_elsewhere(folder):
    scorer, images = data.parse_scorer(f"2*{folder / 'votes.jsonl'}"), pictures(4)
    assert (scorer.label, scorer.weight) == ("votes", 2.0)
    assert scorer.source.startswith(f"{folder / 'votes.jsonl'},sha256=")
    (folder / "others.jsonl").write_text('{"image_id": "p-0", "score": 9}')
    before = data.parse_scorer(str(folder / "others.jsonl")).source
    (folder / "others.jsonl").write_text('{"image_id": "p-0", "score": 8}')
    assert data.parse_scorer(str(folder / "others.jsonl")).source != before  # not taken for the scores of before
    for i, image in enumerate(images):
        image.info["image_id"] = f"p-{i}"
    score = scorer.load("cpu")
    np.testing.assert_equal(score(images[2::-1], ["x"] * 3), [-2.0, NAN, 1.5])
    assert data.best_and_worst(score(images[:3], ["x"] * 3))[0] == (0, 2)  # null is on neither side
    with pytest.raises(data.UserError, match=r"votes\.jsonl has no score for the image p-3: give it one, or null"):
        score(images, ["x"] * 4)


def test_plugins_and_their_options(folder):
    red = Image.new("RGB", (8, 8), (200, 100, 50))
    plugin = f"{folder / 'plugin.py'}:"
    for spec, expected in {
        "redness": 200.0,
        "redness,channel=1": 100.0,
        "redness,channel=2,scale=0.5,name=a, b": 25.0,
        "anything,bonus=3": 3.0,
    }.items():
        assert data.run_scorer(load(plugin + spec), "x", [red], ["x"]) == [expected]


def test_too_few_scores_are_an_error():
    with pytest.raises(data.UserError, match="scorer few gave 1 scores for 2 images"):
        data.run_scorer(lambda images, prompts: [1.0], "few", pictures(2), ["x", "y"])


# ---- The command line's words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "label", "weight", "options"),
    [
        ("clip", "clip", 1.0, {}),
        ("0.5*clip", "clip", 0.5, {}),
        ("-2*clip_iqa_sharpness", "clip_iqa_sharpness", -2.0, {}),
        ("0*people", "people", 0.0, {}),
        ("1e-1*hpsv2", "hpsv2", 0.1, {}),
        ("pickscore=owner/model", "pickscore", 1.0, {"model": "owner/model"}),
        ("pickscore=owner/model,crop=1", "pickscore", 1.0, {"model": "owner/model", "crop": True}),
        ("clip=a/b,processor=c/d", "clip", 1.0, {"model": "a/b", "processor": "c/d"}),
        ("3*clip=a/b,label=large clip", "large clip", 3.0, {"model": "a/b"}),
        ("people=a/b,pose=c/d,count=2", "people", 1.0, {"model": "a/b", "pose": "c/d", "count": 2}),
        ("people,count=2", "people", 1.0, {"count": 2}),
        ("people,part=limbs", "people", 1.0, {"part": "limbs"}),
        ("0*people_count=a/b", "people_count", 0.0, {"model": "a/b"}),
        ("aesthetic,head=a/b", "aesthetic", 1.0, {"head": "a/b"}),
        ("imagereward,tokenizer=a/b", "imagereward", 1.0, {"tokenizer": "a/b"}),
        (
            "vqa=a/b,question=Two hands, five fingers * each? Answer Yes or No.",
            "vqa",
            1.0,
            {"model": "a/b", "question": "Two hands, five fingers * each? Answer Yes or No."},
        ),
        ("{folder}/plugin.py:redness,channel=1,scale=2", "redness", 1.0, {"channel": 1, "scale": 2.0}),
        ("0.5*{folder}/plugin.py:anything=3", "anything", 0.5, {"model": "3"}),
        ("{folder}/votes.jsonl,label=people's", "people's", 1.0, {}),
    ],
)
def test_specs(spec, label, weight, options, folder):
    spec = spec.replace("{folder}", str(folder))
    scorer = data.parse_scorer(spec)
    assert (scorer.label, scorer.weight) == (label, weight)
    assert scorer.source.split(",sha256=")[0] == (spec.split("*", 1)[1] if weight != 1.0 else spec)
    assert data.parse_scorer(scorer.source).source == scorer.source
    assert scorer.load.keywords == options
    assert all(type(scorer.load.keywords[name]) is type(value) for name, value in options.items())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("beauty", "unknown scorer 'beauty': use pickscore, clip, hpsv2, aesthetic, imagereward, clip_iqa"),
        ("", "unknown scorer ''"),
        ("..*clip", "scorer ..*clip: .. is not a number"),
        ("two*clip", "scorer two*clip: two is not a number"),
        ("*clip", "scorer *clip:  is not a number"),
        ("nan*clip", "nan is not a finite number"),
        ("clip,size=3", "scorer clip has no option size, only model, processor, crop, label"),
        ("people,crop=1", "scorer people has no option crop, only model, pose, count, part, label"),
        ("vqa", "scorer vqa needs a model: vqa=..."),
        ("vqa,question=Yes?", "scorer vqa needs a model"),
        ("pickscore,crop=yes", "scorer pickscore: yes is not a number"),
        ("people,count=two", "scorer people: two is not a number"),
        ("pickscore=no/such/folder", "no such model folder: no/such/folder"),
        ("pickscore={folder}", "holds no config.json"),
        ("clip=a/b,processor={folder}", "holds no tokenizer_config.json"),
        ("people,pose=nowhere", "no such model folder: nowhere"),
        ("aesthetic,head=no/head.pth", "no such file: no/head.pth"),
        ("aesthetic,head={folder}", "holds no model.safetensors"),
        ("imagereward={folder}", "holds no ImageReward.pt"),
        ("imagereward=none/ImageReward.pt", "no such file: none/ImageReward.pt"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("{folder}/none.py:f", "cannot import"),
        ("{folder}/plugin.py:f", "has no function f"),
        ("{folder}/plugin.py:redness=a/b", "has no option model, only channel, scale, name, label"),
        ("{folder}/plugin.py:redness,scale=x", "x is not a number"),
        ("{folder}/none.jsonl", "none.jsonl"),
        ("{folder}/votes.jsonl,weight=2", "has no option weight, only label"),
        ("{folder}/text.jsonl", "text.jsonl, line 2: not of the form"),
        ("{folder}/list.jsonl", "list.jsonl, line 2: not of the form"),
        ("{folder}/word.jsonl", "word.jsonl, line 2: not of the form"),
        ("{folder}/name.jsonl", "name.jsonl, line 2: not of the form"),
        ("{folder}/bytes.jsonl", "bytes.jsonl, line 1: not of the form"),
    ],
)
def test_bad_specs(spec, words, folder, monkeypatch):
    for function in ("load_clip", "load_weights", "load_tensors"):
        monkeypatch.setattr(data, function, lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(data.UserError) as error:
        data.parse_scorers([spec.replace("{folder}", str(folder))])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_both_scripts_have_the_same_scorers():
    sections = [
        (data.WORLD.parent.parent / f"{script}.py").read_text().split("# ---- Scorers -")[1].split("\n# ---- ")[0]
        for script in ("make_preference_data", "eval_human")
    ]
    assert "def parse_scorer(" in sections[0]
    assert sections[0] == sections[1]


def test_two_scorers_of_one_name_need_labels():
    with pytest.raises(data.UserError, match=r"two scorers are called clip: .*label"):
        data.parse_scorers(["clip=a/b", "0.5*clip=c/d"])
    scorers = data.parse_scorers(["clip=a/b", "0.5*clip=c/d,label=other"])
    assert [scorer.label for scorer in scorers] == ["clip", "other"]


class Intruder:
    """Unpickled carelessly, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_cannot_be_loaded(blip, tmp_path, monkeypatch):
    weights = torch.load(blip / "ImageReward.pt", weights_only=True)
    del weights["blip.visual_encoder.blocks.1.attn.proj.bias"]
    torch.save(weights, tmp_path / "partial.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Intruder(tmp_path / "broken_in")))
    (tmp_path / "empty.safetensors").write_bytes(b"")
    shutil.copytree(CLIP, tmp_path / "clip")
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    for spec, words in {
        "clip=no/such-model": "cannot load the scorer clip=no/such-model: ",
        f"clip={tmp_path / 'clip'}": "has no weights",
        f"imagereward={tmp_path / 'partial.pt'}": "has no weights encoder.layers.1.self_attn.projection.bias",
        f"imagereward={tmp_path / 'evil.pt'}": "cannot load the scorer imagereward",
        f"aesthetic={CLIP},head={tmp_path / 'empty.safetensors'}": "cannot load the scorer aesthetic",
        f"people={CLIP}": "cannot load the scorer people",
        "people,part=hands": "cannot load the scorer people,part=hands: part is count, pose or limbs, not hands",
        "aesthetic=a/b,head=no/such-head,label=beauty": "cannot load the scorer aesthetic=a/b,head=no/such-head",
    }.items():
        with pytest.raises(data.UserError) as error:
            load(spec)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "broken_in").exists()


def test_a_plug_in_is_known_by_its_code(tmp_path):
    """Other code under the old name is another scorer, whose scores are not those that are kept."""
    code = tmp_path / "mine.py"
    code.write_text("def one(device):\n    return lambda images, prompts: [1.0] * len(images)\n")
    before = data.parse_scorer(f"{code}:one,label=x")
    assert data.parse_scorer(f"0.5*{code}:one,label=x").source == before.source
    code.write_text(code.read_text().replace("1.0", "2.0"))
    after = data.parse_scorer(f"{code}:one,label=x")
    assert (after.label, after.source != before.source) == ("x", True)


@pytest.mark.parametrize("code", ["def one():\n    return None\n", "def one(images, prompts):\n    return []\n"])
def test_a_plug_in_of_another_form_is_told_what_a_scorer_is(tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(data.UserError, match=r"function.*device.*score\(images, prompts\)"):
        data.parse_scorer(f"{tmp_path}/mine.py:one")
