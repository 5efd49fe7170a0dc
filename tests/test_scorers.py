# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: the scorers that it alone has, on tiny random models of the real classes, against their formulas."""

import math
import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

import eval_human as ev


CLIP = ev.WORLD / "scorer"
PROMPTS = ["a walking woman in a purple shirt", "two men", "a crowd on a bridge", "a mother and her daughter", "a man"]
NAN, INF = math.nan, math.inf

@pytest.fixture(autouse=True, scope="module")
def quiet():
    ev.quiet_libraries()


def pictures(count: int) -> list[Image.Image]:
    """Noise, portrait."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 80, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def load(spec: str, columns: dict | None = None) -> ev.Score:
    return ev.parse_scorer_spec(spec).load("cpu", **({"columns": columns} if columns else {}))


def shake(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Weights large enough that every part of the input shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def check_order_and_batch(score: ev.Score, images: list[Image.Image], prompts: list[str]) -> None:
    """A score depends on its own image and prompt alone."""
    together = score(images, prompts)
    np.testing.assert_allclose(score(images[::-1], prompts[::-1])[::-1], together, rtol=1e-3, atol=1e-4)
    alone = [score([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-4)


def test_clip_iqa():
    """Blind to the prompt; pictures are padded, and cropped where that is asked for."""
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(CLIP).float().eval(), CLIPProcessor.from_pretrained(CLIP)
    padded, cropped = [ImageOps.pad(image, (80, 80)) for image in pictures(5)], pictures(5)
    for spec, anchors, images in (
        (f"clip_iqa={CLIP},crop=1", ["Good photo.", "Bad photo."], cropped),
        (f"clip_iqa_sharpness={CLIP}", ["Sharp photo.", "Blurry photo."], padded),
        (f"clip_iqa={CLIP},good=A real, good photo.,bad=A drawing.", ["A real, good photo.", "A drawing."], padded),
    ):
        with torch.no_grad():
            logits = clip(**processor(images=images, text=anchors, padding=True, return_tensors="pt")).logits_per_image
        expected = torch.sigmoid(logits[:, 0] - logits[:, 1])
        score = load(spec)
        np.testing.assert_allclose(score(pictures(5), PROMPTS), expected, rtol=1e-4)
        assert score(pictures(1), ["x"]) == score(pictures(1), ["y"])
        assert np.ptp(expected.numpy()) > 1e-3
    check_order_and_batch(score, pictures(5), PROMPTS)


def head(width: int) -> torch.nn.Module:
    """The head of LAION and of ImageReward as they define it."""
    sizes = [width, 24, 12, 8, 4, 1]
    linear = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    layers = [linear[0], torch.nn.Dropout(0.2), linear[1], torch.nn.Dropout(0.2), linear[2], torch.nn.Dropout(0.1)]
    return shake(torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers, linear[3], linear[4])}))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "men", "two", "woman", "in", "shirt", "purple"]
WIDTH = {"visual_encoder": 192, "text_encoder": 128}  # three and two heads of 64


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder with ImageReward.pt, random, in the published layout, and a BERT tokenizer."""
    from transformers import BertTokenizer

    folder, generator = tmp_path_factory.mktemp("blip"), torch.Generator().manual_seed(0)
    weights = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        matrix = len(shape) > 1
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (0.1 if matrix else 1) + (not matrix)
        if bias:
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    wide, text = WIDTH.values()
    see, read = (f"blip.{part}." for part in WIDTH)
    weights[see + "cls_token"] = torch.randn(1, 1, wide, generator=generator)
    weights[see + "pos_embed"] = torch.randn(1, 5, wide, generator=generator)
    add(see + "patch_embed.proj", wide, 3, 8, 8)
    add(see + "norm", wide)
    for i in range(2):
        sizes = {"norm1": [wide], "attn.qkv": [3 * wide, wide], "attn.proj": [wide, wide], "norm2": [wide]}
        for name, shape in (sizes | {"mlp.fc1": [2 * wide, wide], "mlp.fc2": [wide, 2 * wide]}).items():
            add(f"{see}blocks.{i}.{name}", *shape)
    weights[read + "embeddings.position_ids"] = torch.arange(64)[None]
    add(read + "embeddings.word_embeddings", len(WORDS), text, bias=False)
    add(read + "embeddings.position_embeddings", 64, text, bias=False)
    add(read + "embeddings.LayerNorm", text)
    for i in range(2):
        layer = f"{read}encoder.layer.{i}."
        for part, width in (("attention", text), ("crossattention", wide)):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                add(f"{layer}{part}.{name}", text, width if name in ("self.key", "self.value") else text)
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
        qkv = linear(norm(x, block + "norm1", 1e-6), block + "attn.qkv").chunk(3, -1)
        x = x + linear(attend(*qkv), block + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, block + "norm2", 1e-6), block + "mlp.fc1")), block + "mlp.fc2")
    x = norm(x, see + "norm", 1e-6)
    t = w[read + "embeddings.word_embeddings.weight"][ids]
    t = t + w[read + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    t = norm(t, read + "embeddings.LayerNorm", 1e-12)
    for layer in (f"{read}encoder.layer.{i}." for i in range(2)):
        for part in ("attention", "crossattention"):
            source, hidden = (t, mask) if part == "attention" else (x, None)
            names = ((t, "query"), (source, "key"), (source, "value"))
            seen = attend(*(linear(y, f"{layer}{part}.self.{name}") for y, name in names), hidden)
            t = norm(linear(seen, f"{layer}{part}.output.dense") + t, f"{layer}{part}.output.LayerNorm", 1e-12)
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


COUNTED = {
    1: "a woman; a 25 year old woman; two dogs and a man; a woman in red, the woman smiles; "
    "portrait of a beautiful woman, woman, face",
    2: "two men; a couple; a mother and her daughter; a couple of women; the man, and another man; bride and groom",
    3: "three friends; a photo of an old man with two young children, smiling; A group of three friends; "
    "a woman and a couple of sisters",
    4: "a 25-year-old woman and 3 kids",
    None: "a crowd; a group of people in a park; a man in front of a crowd; two people, a man and a woman; a snowman; "
    "a couple: a tall man, a small woman; one woman among women; people; a portrait, 4k; ",
}


@pytest.mark.parametrize("people", COUNTED)
def test_count_people(people):
    prompts = COUNTED[people].split("; ")
    assert {prompt: ev.count_people(prompt) for prompt in prompts} == dict.fromkeys(prompts, people)


def skeleton(**moved: tuple[float, float]) -> torch.Tensor:
    """Keypoints (1, 17, 2) of a man of height 100 from the front, the arms hanging; `_9=(x, y)`: one is elsewhere."""
    right = [(2, 96), (4, 95), (11, 82), (13, 63), (14, 48), (6, 53), (7, 28), (7, 4)]
    points = torch.tensor([(0, 94), *((s * x, y) for x, y in right for s in (1, -1))], dtype=torch.float32)
    for number, place in moved.items():
        points[int(number[1:])] = torch.tensor(place, dtype=torch.float32)
    return points[None]


def seen(*hidden: int) -> torch.Tensor:
    """Confidences (1, 17) of 0.8, of 0.2 for the keypoints `hidden`."""
    confidence = torch.full((1, 17), 0.8)
    confidence[0, list(hidden)] = 0.2
    return confidence


def test_rate_people():
    def parts(points: torch.Tensor, confidence: torch.Tensor, wanted: int | None) -> list[float]:
        return [ev.rate_people(points, confidence, wanted, part) for part in ("count", "pose", "limbs", "")]

    broken = skeleton(_9=(60, 60))  # a forearm of 47
    two, sure = torch.cat([skeleton(), broken]), torch.cat([seen(), seen()])
    assert parts(broken, seen(), 1) == pytest.approx([1, 0.8, 7 / 8, 0.8 * 7 / 8])
    assert parts(two, sure, 2) == pytest.approx([1, 0.8, 15 / 16, 0.8 * 15 / 16])
    assert parts(two, sure, 3) == pytest.approx([0, 0.8, 15 / 16, -INF])
    assert parts(two, sure, None) == pytest.approx([1, 0.8, 15 / 16, 0.8 * 15 / 16])
    assert parts(two, torch.cat([seen(), seen(5, 6)]), 1) == pytest.approx([1, 0.8, 1, 0.8])  # the broken one is none
    hidden = seen(*range(7, 17))  # head and shoulders: no limb is seen
    assert parts(broken, hidden, 1) == pytest.approx([1, (7 * 0.8 + 2) / 17, NAN, (7 * 0.8 + 2) / 17], nan_ok=True)
    profile = seen()
    profile[0, 5] = 0.1  # one shoulder is enough
    assert parts(skeleton(), profile, None) == pytest.approx([1, (17 * 0.8 - 0.7) / 17, 1, (17 * 0.8 - 0.7) / 17])
    for nobody in ((torch.zeros(0, 17, 2), torch.zeros(0, 17)), (skeleton(), seen(5, 6))):
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
        (skeleton(), seen(*range(7, 17)), NAN),  # no limb
        (skeleton(), seen(*range(5), 11, 12), NAN),  # nothing but a shoulder line to measure the body by
        (skeleton(_7=(68, 82), _9=(113, 82)), seen(*range(11, 17)), 2 / 4),
    ],
)
def test_plausible_limbs(points, confidence, share):
    turned = torch.stack([-points[..., 1], points[..., 0]], dim=-1)
    mirrored = points * torch.tensor([-1, 1])
    swapped = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]  # left keypoints become right ones
    for same in (points, 0.04 * points + 7, turned, mirrored):
        found = ev.plausible_limbs(same, confidence)
        assert found.shape == (1,)
        assert found.item() == pytest.approx(share, nan_ok=True)
    assert ev.plausible_limbs(mirrored[:, swapped], confidence[:, swapped]).item() == pytest.approx(share, nan_ok=True)


def test_each_person_has_a_height_of_their_own():
    points = torch.cat([skeleton(), 0.2 * skeleton(_9=(60, 60)), 5 * skeleton()])
    sure = torch.cat([seen(), seen(), seen(*range(17))])
    np.testing.assert_allclose(ev.plausible_limbs(points, sure), [1, 7 / 8, NAN])
    np.testing.assert_allclose(ev.body_height(points, sure), [100, 20, NAN], rtol=0.06)
    assert ev.plausible_limbs(points[:0], sure[:0]).shape == (0,)


def test_no_pose_and_no_view_makes_a_right_limb_too_long():
    """Bodies of right lengths, each limb in any direction, seen from anywhere, without perspective."""
    rng = np.random.default_rng(0)
    points = np.zeros((2000, 17, 3))
    points[:, 5:7, 0], points[:, 11:13, 0] = (11.5, -11.5), (5.5, -5.5)
    points[:, 5:7, 1] = 29
    points[:, :5] = np.array([(0, 39, 7), (2, 41, 5), (-2, 41, 5), (4, 40, 0), (-4, 40, 0)])
    for (start, end), share in ev.LIMBS.items():
        direction = rng.normal(size=(2000, 3))
        points[:, end] = points[:, start] + 100 * share * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    views = np.linalg.qr(rng.normal(size=(2000, 3, 3)))[0]
    flat = torch.tensor((points @ views)[..., :2], dtype=torch.float32)
    sure = torch.full((2000, 17), 0.8)
    assert ev.plausible_limbs(flat, sure).min() == 1
    assert ev.body_height(flat, sure).min() > 100 / math.sqrt(2)
    flat[:, 9] = flat[:, 7] + 5 * (flat[:, 9] - flat[:, 7])  # what is far too long is seen from most sides
    assert (ev.plausible_limbs(flat, sure) == 7 / 8).float().mean() > 0.9


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny RT-DETR v2 that finds persons (its second label) and dogs in noise; `blind` finds nothing."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    folder = tmp_path_factory.mktemp("detector")
    blocks = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
    blocks |= {"out_features": ["stage2", "stage3", "stage4"]}
    sizes = {"encoder_in_channels": [8] * 3, "encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "d_model": 16}
    sizes |= {"decoder_in_channels": [16] * 3, "decoder_layers": 2, "decoder_ffn_dim": 16, "num_queries": 6}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_denoising": 0}
    sizes |= {"id2label": {0: "dog", 1: "person"}, "label2id": {"dog": 0, "person": 1}}
    config = RTDetrV2Config(backbone_config=RTDetrResNetConfig(**blocks), **sizes)
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

    folder = tmp_path_factory.mktemp("pose")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "out_indices": [1]}
    backbone = VitPoseBackboneConfig(image_size=[32, 24], patch_size=[8, 8], **sizes)
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
    """plausible_limbs of one person, each keypoint (x, y) where its heatmap (H, W) is highest."""
    places = [np.unravel_index(one.argmax(), one.shape)[::-1] for one in heatmaps.numpy()]
    return ev.plausible_limbs(torch.tensor(np.array([places])).float(), heatmaps.amax(dim=(1, 2))[None]).item()


def test_people(detector, pose):
    from transformers import AutoImageProcessor, RTDetrV2ForObjectDetection, VitPoseForPoseEstimation

    finder = RTDetrV2ForObjectDetection.from_pretrained(detector / "seeing").eval()
    reader = VitPoseForPoseEstimation.from_pretrained(pose).eval()
    crops = AutoImageProcessor.from_pretrained(pose, backend="pil")
    images = pictures(12)
    found = [people_by_hand(finder, reader, crops, image) for image in images]
    found = [[k for k in each if k[5:7].amax(dim=(1, 2)).clamp(0, 1).mean() > 0.3] for each in found]
    counts = [len(each) for each in found]
    assert {0, 1, 2, 3} <= {*counts}
    means = [torch.stack(each).amax(dim=(2, 3)).clamp(0, 1).mean().item() if each else 0.0 for each in found]
    limbs = [[share for share in map(limbs_by_hand, each) if not math.isnan(share)] for each in found]
    limbs = [sum(each) / len(each) if each else NAN for each in limbs]
    assert len({share for share in limbs if not math.isnan(share)}) > 1
    rates = [mean * (1 if math.isnan(share) else share) for mean, share in zip(means, limbs, strict=True)]
    rates = [rate if count else -INF for rate, count in zip(rates, counts, strict=True)]

    place = f"{detector / 'seeing'},pose={pose}"
    score = load(f"people={place}")
    np.testing.assert_allclose(score(images, ["people"] * 12), rates, rtol=1e-3)
    for wanted, told in ((1, "1"), (2, 2.0)):  # csv has texts, parquet with a gap floats; an option goes first
        expected = [rate if count == wanted else -INF for rate, count in zip(rates, counts, strict=True)]
        columns = {"x": {"people": told}, "people": {"people": NAN}, "y": {"n": 1}}
        found, fixed = (load(f"people={place}{option}", columns) for option in ("", f",count={3 - wanted}"))
        np.testing.assert_allclose(found(images, ["x"] * 12), expected, rtol=1e-3)
        np.testing.assert_allclose(found(images, ["people", "y", "z"] * 4), rates, rtol=1e-3)
        assert [math.isinf(one) for one in fixed(images, ["x"] * 12)] == [count != 3 - wanted for count in counts]
        counted = load(f"people_count={place}", columns)(images, ["x"] * 12)
        assert counted == [float(count == wanted) for count in counts]
    assert load(f"people_count={place}")(images, ["people"] * 12) == [float(count > 0) for count in counts]
    np.testing.assert_allclose(load(f"people_pose={place}")(images, ["a woman"] * 12), means, rtol=1e-3)
    np.testing.assert_allclose(load(f"people_limbs={place}")(images, ["two men"] * 12), limbs, rtol=1e-3)
    check_order_and_batch(score, images, ["people", "a man", "two men"] * 4)


def test_boxes_that_count(detector, pose, monkeypatch):
    from transformers import RTDetrV2ForObjectDetection
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2ObjectDetectionOutput

    score = load(f"people={detector / 'seeing'},pose={pose}")
    monkeypatch.setattr(ev, "rate_people", lambda points, *_: len(points))
    large = [(0.5, 0.5, 0.2, 0.11), (0.5, 0.5, 0.11, 0.2)]  # centre, width and height; others stick out or are small
    outside = [(0.95, 0.5, 0.2, 0.11), (0.05, 0.5, 0.2, 0.11), (0.5, 0.95, 0.11, 0.2), (0.5, 0.05, 0.11, 0.2)]
    for box in [*large, *outside, (0.5, 0.5, 0.2, 0.09)]:
        for confidence in (0.6, 0.4):
            logits = torch.tensor([[[-9.0, math.log(confidence / (1 - confidence))]]])
            output = RTDetrV2ObjectDetectionOutput(logits=logits, pred_boxes=torch.tensor([[box]]))
            monkeypatch.setattr(RTDetrV2ForObjectDetection, "forward", lambda self, output=output, **_: output)
            assert score(pictures(1), ["a woman"]) == [box in large and confidence > 0.5], box


def test_pictures_without_people(detector, pose):
    for part, expected in (("", -INF), ("_count", 0), ("_pose", 0), ("_limbs", NAN)):
        found = load(f"people{part}={detector / 'blind'},pose={pose}")(pictures(2), ["a woman", "a landscape"])
        assert found == pytest.approx([expected] * 2, nan_ok=True)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A tiny LLaVA over bytes, to which "Yes" and <image> are single tokens; `bare` is the same without a template."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("vlm")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_tokens(["Yes"])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    see = hf.CLIPVisionConfig(**small, image_size=16, patch_size=8)
    read = hf.LlamaConfig(**small, vocab_size=len(tokenizer), num_key_value_heads=2)
    place = tokenizer.convert_tokens_to_ids("<image>")
    config = hf.LlavaConfig(vision_config=see, text_config=read, image_token_index=place)
    model = shake(hf.LlavaForConditionalGeneration(config))
    part = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    turn = f"{{% for turn in messages %}}USER: {{% for part in turn['content'] %}}{part}{{% endfor %}}{{% endfor %}}"
    template = f"{turn}{{% if add_generation_prompt %}} ASSISTANT:{{% endif %}}"
    for name, chat_template in (("chat", template), ("bare", None)):
        model.save_pretrained(folder / name)
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = hf.LlavaProcessor(CLIPImageProcessorPil(**size), tokenizer, chat_template=chat_template, **options)
        processor.save_pretrained(folder / name)
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


@pytest.fixture
def folder(tmp_path):
    """A plug-in and files with scores, good and bad."""
    (tmp_path / "plugin.py").write_text("def redness(device, channel=0, scale=1.0):\n    pass\ndef one():\n    pass\n")
    (tmp_path / "votes.jsonl").write_text('{"image_id": "p-0", "score": 1.5}\n\n{"image_id": "p-1", "score": null}\n')
    (tmp_path / "word.jsonl").write_text('{"image_id": "a", "score": 1}\n{"image_id": "b", "score": "good"}\n')
    return tmp_path


def test_specs(folder):
    for spec, label, weight, options in (
        ("-1e-1*clip_iqa_sharpness", "clip_iqa_sharpness", -0.1, {}),
        ("0*people=a/b,pose=c/d,count=2", "people", 0.0, {"model": "a/b", "pose": "c/d", "count": 2}),
        ("vqa=a/b,question=Two, five * each?", "vqa", 1.0, {"model": "a/b", "question": "Two, five * each?"}),
        (f"0.5*{folder}/votes.jsonl,label=people's", "people's", 0.5, {}),
    ):
        scorer = ev.parse_scorer_spec(spec)
        assert (scorer.label, scorer.weight, scorer.load.keywords) == (label, weight, options)
        assert scorer.source.split(",sha256=")[0] == (spec.split("*", 1)[1] if weight != 1.0 else spec)
        assert ev.parse_scorer_spec(scorer.source).source == scorer.source
        assert all(type(scorer.load.keywords[name]) is type(value) for name, value in options.items())


def test_bad_specs(folder):
    for spec, words in {
        "beauty": "unknown scorer 'beauty': use pickscore, clip, hpsv2, aesthetic, imagereward, clip_iqa",
        "people,crop=1": "scorer people has no option crop, only model, pose, count, part, ",
        f"imagereward={folder}": "holds no ImageReward.pt",
        "no_such_module:f": "cannot import no_such_module",
        f"{folder}/plugin.py:one": "is not a function of the device",
        f"{folder}/word.jsonl": "word.jsonl, line 2: not of the form",
    }.items():
        with pytest.raises(ev.UserError, match=f"^[^\n]*{re.escape(words)}[^\n]*$"):
            ev.parse_scorer_specs([spec])


def test_specs_are_known_by_label_and_content(folder):
    with pytest.raises(ev.UserError, match=r"two scorers are called clip: .*label"):
        ev.parse_scorer_specs(["clip=a/b", "0.5*clip=c/d"])
    for name in ("plugin.py:redness", "votes.jsonl"):
        file, before = folder / name.split(":")[0], ev.parse_scorer_spec(f"{folder / name}").source
        assert ev.parse_scorer_spec(f"2*{folder / name}").source == before
        file.write_text(file.read_text().replace("1.", "2."))
        assert ev.parse_scorer_spec(f"{folder / name}").source != before
    images, score = pictures(3), load(str(folder / "votes.jsonl"))
    for i, image in enumerate(images):
        image.info["image_id"] = f"p-{i}"
    np.testing.assert_equal(score(images[1::-1], ["x"] * 2), [NAN, 2.5])
    with pytest.raises(ev.UserError, match=r"votes\.jsonl has no score for the image p-2: give it one, or null"):
        score(images, ["x"] * 3)


def test_weights_that_cannot_be_loaded(blip, tmp_path):
    weights = torch.load(blip / "ImageReward.pt", weights_only=True)
    del weights["blip.visual_encoder.blocks.1.attn.proj.bias"]
    torch.save(weights, tmp_path / "partial.pt")
    evil = type("Evil", (), {"__reduce__": lambda self: (Path.touch, (tmp_path / "broken_in",))})  # as it is unpickled
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(evil()))
    for spec, words in {
        f"imagereward={tmp_path / 'partial.pt'}": "has no weights encoder.layers.1.self_attn.projection.bias",
        f"imagereward={tmp_path / 'evil.pt'}": "",
        f"people={CLIP}": "",
        "people,part=hands": "part is count, pose or limbs, not hands",
    }.items():
        with pytest.raises(ev.UserError, match=f"^cannot load the scorer {spec}: [^\n]*{words}[^\n]*$"):
            load(spec)
    assert not (tmp_path / "broken_in").exists()


def test_prompts_of_eval(tmp_path):
    (tmp_path / "p.csv").write_bytes(b'\xef\xbb\xbftext,story\r\n"a, b",NA\r\n,c\r\n"a,  b",d\r\n')
    for column, found in ((None, ["a, b"]), ("story", ["NA", "c", "d"])):
        assert ev.read_prompt_list(str(tmp_path / "p.csv"), column, None)[0] == found
    with pytest.raises(ev.UserError, match=r"no column tale: --prompt_column can be one of text, story$"):
        ev.read_prompt_list(str(tmp_path / "p.csv"), "tale", None)
