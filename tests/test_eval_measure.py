# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: its scorers by their formulas, distances to real photos, features, and what is measured of a file."""

import argparse
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
import transformers as hf
from accelerate import PartialState
from numpy.testing import assert_allclose
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

import eval_human as ev


ev.quiet_libraries()
CLIP, NAN, normal = ev.WORLD / "scorer", math.nan, lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)
PROMPTS = ["a walking woman in a purple shirt", "two men", "a crowd on a bridge", "a mother and her daughter", "a man"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TIMM = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed", "layer_norm": "norm"}
TIMM |= {"embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "post_norm": "norm"}
TIMM |= {"self_attn.projection": "attn.proj", "self_attn": "attn"}


def pictures(count: int) -> list[Image.Image]:
    """Noise, portrait."""
    return [*map(Image.fromarray, np.random.default_rng(0).integers(0, 256, (count, 80, 48, 3), dtype=np.uint8))]


def load(spec: str, rows: dict | None = None) -> ev.Score:
    return ev.parse_scorer(spec, {} if rows is None else rows).load("cpu")


def shake(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Weights large enough that every part of the input shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator) if parameter.ndim > 1 else None
    return model.eval()


def check_alone(score: ev.Score, images: list[Image.Image], prompts: list[str]) -> None:
    """A score depends on its own image and prompt, not on the batch."""
    alone = [score([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    for order in (slice(None), slice(None, None, -1)):
        assert_allclose(score(images[order], prompts[order]), alone[order], rtol=1e-3, atol=1e-4)


def test_clip_iqa():
    clip, processor = hf.CLIPModel.from_pretrained(CLIP).float().eval(), hf.CLIPProcessor.from_pretrained(CLIP)
    padded = [ImageOps.pad(image, (80, 80)) for image in pictures(5)]
    for spec, *anchors in (
        ("clip_iqa={}", "Good photo.", "Bad photo."),
        ("clip_iqa_sharpness={}", "Sharp photo.", "Blurry photo."),
        ("clip_iqa={},good=A real, good one.,bad=A drawing.", "A real, good one.", "A drawing."),
    ):
        inputs = processor(images=padded, text=anchors, padding=True, return_tensors="pt")
        score = load(spec.format(CLIP))
        logits = clip(**inputs).logits_per_image.detach()
        assert_allclose(score(pictures(5), PROMPTS), torch.sigmoid(logits[:, 0] - logits[:, 1]), rtol=1e-4)
        assert score(pictures(1), ["x"]) == score(pictures(1), ["y"]) != score(pictures(2)[1:], ["x"])
    cropped = load(f"{spec.format(CLIP)},crop=1")
    assert cropped(padded, PROMPTS) == score(pictures(5), PROMPTS) != cropped(pictures(5), PROMPTS)
    check_alone(score, pictures(5), PROMPTS)


def test_image_reward(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "men", "two", "woman", "in", "shirt", "purple"]
    see = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 3, "image_size": 16, "patch_size": 8}
    read = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "max_position_embeddings": 64}
    see = shake(hf.BlipVisionModel(hf.BlipVisionConfig(**see, num_hidden_layers=2, layer_norm_eps=1e-6)), std=0.1)
    read |= {"vocab_size": len(words), "encoder_hidden_size": 192, "num_hidden_layers": 2, "is_decoder": True}
    read = shake(hf.BlipTextModel(hf.BlipTextConfig(**read), add_pooling_layer=False), seed=1, std=0.1)
    head = nn.Sequential(*(shake(nn.Linear(*sizes)) for sizes in pairwise((128, 24, 12, 8, 4, 1))))
    weights = {f"blip.text_encoder.{key}": value for key, value in read.state_dict().items()}
    for key, value in see.state_dict().items():  # published in timm's names
        for ours, theirs in TIMM.items():
            key = key.replace(ours, theirs)
        weights[f"blip.visual_encoder.{key}"] = value
    for number, layer in zip((0, 2, 4, 6, 7), head, strict=True):
        weights |= {f"mlp.layers.{number}.{key}": value for key, value in layer.state_dict().items()}
    torch.save(weights, tmp_path / "ImageReward.pt")
    hf.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    prompts = ["a man", "two men in a purple shirt", "a woman " * 40, "men", "a dog"]
    asked = [[2, *(words.index(one) if one in words else 1 for one in text.split()[:33]), 3] for text in prompts]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in asked])
    for crop, fit, file in ((0, ImageOps.pad, tmp_path / "ImageReward.pt"), (1, ImageOps.fit, tmp_path)):
        pixels = [(np.asarray(fit(one, (16, 16))) / 255 - ev.CLIP_MEAN) / ev.CLIP_STD for one in pictures(5)]
        seen = see(torch.tensor(np.array(pixels)).float().permute(0, 3, 1, 2)).last_hidden_state
        first = read(ids, (ids > 0).long(), encoder_hidden_states=seen).last_hidden_state[:, 0]
        expected = (head(first)[:, 0].detach() - 0.16717362830052426) / 1.0333394966054072
        score = load(f"imagereward={file},tokenizer={tmp_path},crop={crop}")
        assert_allclose(score(pictures(5), prompts), expected, rtol=1e-3, atol=1e-4)
        assert expected.std() > 0.01
    check_alone(score, pictures(5), prompts)
    del weights["blip.visual_encoder.blocks.1.attn.proj.bias"]
    torch.save(weights, tmp_path / "partial.pt")
    with pytest.raises(ev.UserError, match=r"has no weights encoder.layers.1.self_attn.projection.bias"):
        load(f"imagereward={tmp_path}/partial.pt,tokenizer={tmp_path}")


def people_models(folder: Path) -> str:
    """A spec of a tiny RT-DETR v2 that finds persons (its second label) and dogs in noise, and a ViTPose."""
    blocks = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
    see = hf.RTDetrResNetConfig(**blocks, out_features=["stage2", "stage3", "stage4"])
    sizes = {"encoder_in_channels": [8] * 3, "decoder_in_channels": [16] * 3, "num_queries": 6, "num_denoising": 0}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_hidden_dim": 16, "d_model": 16, "decoder_layers": 2, "id2label": {0: "dog", 1: "person"}}
    torch.manual_seed(0)  # its vectors are drawn too
    config = hf.RTDetrV2Config(backbone_config=see, label2id={"dog": 0, "person": 1}, **sizes)
    model = shake(hf.RTDetrV2ForObjectDetection(config), seed=1)
    for boxes, labels in zip(model.bbox_embed, model.class_embed, strict=True):
        boxes.layers[-1].bias.data[2:] = 0.9  # around 2 % of the image
        labels.weight.data *= 3
        labels.bias.data[:] = torch.tensor([-3.0, -2.5])  # around a score of 1/2
    see = hf.VitPoseBackboneConfig(image_size=[32, 24], patch_size=[8, 8], out_indices=[1], **SMALL)
    pose = shake(hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=see, num_labels=17)), std=0.05)
    nn.init.uniform_(pose.head.conv.bias, -0.1, 0.5, generator=torch.Generator().manual_seed(0))
    pose.head.conv.bias.data[5:7] = -0.15  # the shoulders around 0.3
    for part, kind, (height, width), name in (
        (model, RTDetrImageProcessorPil, (64, 64), "find"), (pose, VitPoseImageProcessorPil, (32, 24), "pose")
    ):  # fmt: skip
        part.save_pretrained(folder / name)
        kind(size={"height": height, "width": width}).save_pretrained(folder / name)
    return f"people={folder}/find,pose={folder}/pose"


def test_people(tmp_path):
    spec, images, found = people_models(tmp_path), pictures(12), []
    detect = hf.RTDetrV2ForObjectDetection.from_pretrained(tmp_path / "find").eval()
    read = hf.VitPoseForPoseEstimation.from_pretrained(tmp_path / "pose").eval().requires_grad_(False)
    crops = hf.AutoImageProcessor.from_pretrained(tmp_path / "pose", backend="pil")
    for image in images:  # by hand: the keypoints of those who are large enough and whose shoulders are seen
        pixels = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
        out, people = detect(torch.tensor(pixels).float().permute(2, 0, 1)[None]), []
        for i in out.logits[0].flatten().topk(6).indices.tolist():  # the six best of queries x labels
            (x, y, w, h), size = out.pred_boxes[0, i // 2].tolist(), image.size
            left, right = (min(max(end, 0), 1) * size[0] for end in (x - w / 2, x + w / 2))
            top, bottom = (min(max(end, 0), 1) * size[1] for end in (y - h / 2, y + h / 2))
            if i % 2 and (right - left) * (bottom - top) >= 0.02 * size[0] * size[1] and out.logits[0, i // 2, 1] > 0:
                crop = crops(image, boxes=[[[left, top, right - left, bottom - top]]], return_tensors="pt")
                people.append(read(**crop).heatmaps[0].amax(dim=(1, 2)).clamp(0, 1))
        found.append([one for one in people if one[5:7].mean() > 0.3])
    counts, means = [*map(len, found)], [torch.stack(each).mean().item() if each else NAN for each in found]
    assert {0, 1, 2} <= {*counts}
    told = {"one": "1", "two": 2.0, "none": "0", "?": NAN}
    rows = {prompt: {"people": people} for prompt, people in told.items()} | {"x": {"n": 1}}
    score, fixed = load(spec, rows), load(f"{spec},count=1", rows)
    only = [[mean if count == n else NAN for mean, count in zip(means, counts, strict=True)] for n in (1, 2)]
    for function, prompts, expected in (
        (score, ["one"], only[0]), (score, ["two"], only[1]), (score, ["?", "x", "y"], means),
        (score, ["none"], [NAN] * 12), (fixed, ["two"], only[0]), (load(spec), ["one"], means),
    ):  # fmt: skip
        assert_allclose(function(images, prompts * (12 // len(prompts))), expected, rtol=1e-3)
    check_alone(score, images, ["one", "two", "x"] * 4)  # also a batch without any box


def test_vqa(tmp_path):
    """A tiny LLaVA over bytes, to which "Yes" and <image> are single tokens; with and without a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_tokens(["Yes"])
    place, yes = tokenizer.convert_tokens_to_ids(["<image>", "Yes"])
    see = hf.CLIPVisionConfig(**SMALL | {"num_hidden_layers": 2}, intermediate_size=16, image_size=16, patch_size=8)
    read = hf.LlamaConfig(**SMALL, intermediate_size=16, vocab_size=len(tokenizer), num_key_value_heads=2)
    config = hf.LlavaConfig(vision_config=see, text_config=read, image_token_index=place)
    model = shake(hf.LlavaForConditionalGeneration(config)).requires_grad_(False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    to_pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    part = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    chat = f"USER: {{% for part in messages[0]['content'] %}}{part}{{% endfor %}}"
    usual = 'Does this picture show "{prompt}" with correct human anatomy? Answer Yes or No.'
    for own, form, template in (
        ("", f"USER: <image>{usual} BOT:", chat + "{% if add_generation_prompt %} BOT:{% endif %}"),
        (",question=<image>Are they {prompt}, yes?", "<image>Are they {prompt}, yes?", None),
    ):
        processor = hf.LlavaProcessor(to_pixels, tokenizer, chat_template=template, **options)
        for one in (model, processor):
            one.save_pretrained(folder := tmp_path / f"{bool(template)}")
        score, expected = load(f"vqa={folder}{own}"), []
        for image, prompt in zip(pictures(5), PROMPTS, strict=True):
            inputs = processor(images=image, text=form.replace("{prompt}", prompt), return_tensors="pt")
            expected.append(model(**inputs).logits[0, -1].double().softmax(-1)[yes].item())
        assert_allclose(score(pictures(5), PROMPTS), expected, rtol=1e-3)
        assert np.std(expected) > 0.05 * np.mean(expected)
        check_alone(score, pictures(5), PROMPTS)


def embed(device: str):
    """An embedder: the mean colour; black is nobody."""
    means = lambda images: np.array([np.asarray(image, float).mean((0, 1)) for image in images])  # noqa: E731
    return lambda images: np.where(means(images).sum(1, keepdims=True) == 0, NAN, means(images))


def test_likeness_is_the_mean_cosine_to_the_references(tmp_path):
    for name, colour in (("refs/a", (9, 0, 0)), ("refs/b", (0, 0, 7)), ("refs/nobody", 0), ("none/a", 0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    images = [Image.new("RGB", (8, 8), colour) for colour in ((50, 0, 0), (0, 0, 0), (30, 0, 40), (0, 5, 0))]
    spec = f"likeness,references={tmp_path}/refs,embedder={__name__}:embed"
    for options, expected in (("", [0.5, NAN, 0.7, 0]), (",threshold=0.6", [0, NAN, 1, 0])):
        assert_allclose(load(spec + options)(images, [""] * 4), expected, atol=1e-9)
    with pytest.raises(ev.UserError, match=r"^no face found in any image of .*/none$"):
        load(spec.replace("refs", "none"))


def test_keys_and_bad_specs():
    assert len({ev.parse_scorer(f"{name}={CLIP}", {}).key for name in ("clip", "clip_iqa", "clip_iqa_sharpness")}) == 3
    for spec, words in {
        "vqa": "scorer vqa needs model: vqa,model=...",
        f"people={CLIP},pose=nowhere": "cannot find nowhere: no such file or folder",
        f"imagereward={CLIP}/config.json,tokenizer=nowhere": "cannot find nowhere: no such file or folder",
    }.items():
        with pytest.raises(ev.UserError, match=f"^[^\n]*{re.escape(words)}[^\n]*$"):
            ev.parse_scorer(spec, {})


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 6), (7, 9, 30), (5, 80, 20), (80, 5, 20), (2, 2, 3)])
def test_frechet_distance_equals_the_matrix_square_root(n, m, d):
    x, y, shift = normal(0, n, d) @ normal(5, d, d), normal(1, m, d) + 0.3, np.arange(d)
    cx, cy = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cx + 0j) @ cy @ scipy.linalg.sqrtm(cx + 0j)  # the symmetric form: stable without rank
    trace = np.sqrt(np.linalg.eigvalsh((root + root.conj().T) / 2).clip(min=0)).sum()
    expected = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * trace
    assert ev.frechet_distance(y)(x) == pytest.approx(expected, rel=1e-6)
    assert ev.frechet_distance(x + shift)(x) == pytest.approx(shift @ shift)
    tripled = (3 - 1) ** 2 * (np.trace(cx) + (x.mean(axis=0) ** 2).sum())
    assert ev.frechet_distance(3 * x)(x) == pytest.approx(tripled)


def test_kernel_distances_by_hand():
    def by_hand(kernel, x: np.ndarray, y: np.ndarray) -> float:
        pairs = (x, x), (y, y), (x, y)
        xx, yy, xy = (np.array([[kernel(a, b) for b in second] for a in first]) for first, second in pairs)
        return sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)) - 2 * xy.mean()

    x, y = normal(0, 9, 5), normal(1, 13, 5) + 0.2
    expected = by_hand(lambda a, b: (a @ b / 5 + 1) ** 3, x, y)
    assert ev.kernel_distance(y)(x) == pytest.approx(expected, rel=1e-12)
    assert ev.kernel_distance(x)(y.astype(np.float32)) == pytest.approx(expected, rel=1e-5)
    expected = 1000 * by_hand(lambda a, b: math.exp(-((a - b) @ (a - b)) / (2 * 10**2)), unit(x), unit(y))
    assert ev.cmmd(unit(y))(unit(x)) == pytest.approx(expected, rel=1e-6)
    x, y = normal(0, 2500, 3), normal(1, 1100, 3)  # more rows than a slice
    found = ev.mean_kernel(np.inner, x, y), ev.mean_kernel(np.inner, x, x, diagonal=False)
    xy, xx = np.inner(x, y), np.inner(x, x)
    assert found == pytest.approx((xy.mean(), (xx.sum() - xx.trace()) / (2500 * 2499)))


def test_the_floor_is_what_a_perfect_model_reads_and_one_image_has_no_distance():
    photos = normal(0, 1200, 24)
    perfect = [ev.frechet_distance(photos)(normal(seed, 200, 24)) for seed in range(1, 9)]
    assert min(perfect) * 0.8 < ev.real_floor(ev.frechet_distance, photos, 200, seed=0) < max(perfect) * 1.2
    for n, size in ((3, 3), (5, 5), (100, 5)):
        a, b = ev.real_floor(lambda others: lambda apart: (apart, others), np.arange(11.0), n, seed=1)
        assert (len(a), sorted([*a, *b])) == (size, [*range(11)])
    for distance in (ev.frechet_distance, ev.kernel_distance, ev.cmmd):
        found = [distance(photos[:n])(photos[9 : 9 + m]) for n, m in ((5, 1), (1, 5), (2, 2))]
        assert [math.isnan(one) for one in found] == [True, True, False]


def compare(own: dict[str, np.ndarray], photos: np.ndarray, lacking: tuple = ()) -> pd.DataFrame:
    """compare_realism of models with two images of each prompt; `lacking`: (model or "", prompt_id, index)."""
    rows = [(name, i // 2, i % 2) for name, features in own.items() for i in range(len(features))]
    rows += [(ev.PHOTOS, i, 0) for i in range(len(photos))]
    kept = [row[0] == ev.PHOTOS or not {row, ("", *row[1:])} & {*lacking} for row in rows]
    table = pd.DataFrame(rows, columns=["model", "prompt_id", "index"])[kept]
    features = np.concatenate([*own.values(), photos])[kept]
    found = ev.compare_realism(table, {"features": features, "clip": features}, seed=0)
    return found.set_index(["model", "distance"])


def test_compare_realism():
    photos, shared = unit(normal(0, 200, 6) + 0.5), normal(1, 120, 6)
    shifts = {"base": 1.2, "better": 0.8, "same": 1.2}
    own = {name: unit(shared + normal(i + 2, 120, 6) + shifts[name]) for i, name in enumerate(shifts)}
    for (name, kind), row in (found := compare(own, photos)).iterrows():
        distance = ev.DISTANCES[kind][1]
        assert (row.value, row.floor) == (distance(photos)(own[name]), ev.real_floor(distance, photos, 120, 0))
        if name != "base":
            assert row.difference == row.value - found.loc["base", kind].value
            assert row.low < row.difference < row.high
            assert (row.high < 0, row.low < 0 < row.high) == (name == "better", name == "same")
    assert [*found.index] == [(name, kind) for kind in ("KD", "FD", "CMMD") for name in own]
    gone = [("same", 0, 0), ("same", 0, 1), ("better", 7, 0), ("better", 7, 1)]
    pd.testing.assert_frame_equal(compare(own, photos, gone), compare(own, photos, [("", *row[1:]) for row in gone]))
    assert {*compare(own, photos, [*gone, ("base", 9, 1)]).images} == {58}  # all prompts count alike


def test_intervals_hold_the_truth_95_percent_of_the_time():
    photos, rows = unit(normal(1000, 60, 6) + 0.3), []
    for shared, a, b in (normal(seed, 3, 80, 6) for seed in range(60)):
        rows.append(compare({"base": unit(shared + a + 0.7), "a": unit(shared + b + 0.5)}, photos).loc["a"])
    for own in (pd.DataFrame([row.loc[kind] for row in rows]) for kind in ("KD", "CMMD")):
        truth = own.difference.mean()  # these distances are unbiased
        assert ((own.low <= truth) & (truth <= own.high)).sum() >= 53
        assert ((own.high - own.low) / 2 / 2.093).mean() == pytest.approx(own.difference.std(), rel=0.25)


class Inception(nn.Module):
    """Has the interface of NVIDIA's: uint8 images in, features out; here the mean and the corners of each channel."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == [3, 299, 299] and return_features  # noqa: PT018
        return torch.cat([images.float().mean(dim=[2, 3]), images[:, :, 0, 0], images[:, :, 298, 298]], dim=1)


def test_features(tmp_path):
    torch.manual_seed(0)
    images, squares = pictures(4), [ImageOps.pad(image, (80, 80)) for image in pictures(4)]
    dino = hf.Dinov2Model(hf.Dinov2Config(**SMALL, image_size=28, patch_size=14)).eval()
    clip, crop = hf.CLIPModel.from_pretrained(CLIP).float().eval(), {"height": 28, "width": 28}
    for one in (dino, BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop)):
        one.save_pretrained(tmp_path / "dino")
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    processors = (hf.AutoImageProcessor.from_pretrained(name, backend="pil") for name in (tmp_path / "dino", CLIP))
    for_dino, for_clip = (processor(squares, return_tensors="pt").pixel_values for processor in processors)
    token = clip.vision_model.post_layernorm(clip.vision_model(for_clip).last_hidden_state[:, 0])
    resized = [np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC), float) for image in images]
    corners = torch.tensor(np.array([[*one.mean(axis=(0, 1)), *one[0, 0], *one[298, 298]] for one in resized]))
    for load_features, name, expected in (
        (ev.image_features, tmp_path / "dino", dino(for_dino).last_hidden_state[:, 0]),
        (ev.image_features, CLIP, token),
        (ev.clip_embeddings, CLIP, nn.functional.normalize(clip.visual_projection(token), dim=-1)),
        (ev.image_features, tmp_path / "inception.pt", corners),
    ):
        features = load_features("cpu", str(name))
        assert_allclose(found := features(images, [""] * 4), expected.detach(), rtol=1e-4, atol=1e-5)
        assert_allclose(features(images[1:2], [""])[0], found[1], atol=1e-5)
        assert (found.dtype, np.ptp(found, axis=0).max() > 1e-3) == (np.float64, True)
    stripes = np.zeros((1196, 1196, 3), np.uint8)
    stripes[:, ::2] = 200  # a fine pattern becomes its mean; picking pixels would keep it
    assert_allclose(features([Image.fromarray(stripes)], [""])[:, :3], 100, atol=1)


def test_colour_is_measured_at_512_pixels():
    large = Image.fromarray(np.kron(normal(0, 256, 512, 3) > 0, np.full((2, 2, 1), 250)).astype(np.uint8))
    rows = ev.measure_colour([large, large.resize((512, 256), Image.Resampling.BOX), pictures(1)[0]], [""] * 3)
    expected = ev.colour_statistics(np.asarray(pictures(1)[0]))
    assert (rows[0], rows[2], large.size) == (rows[1], [expected[one] for one in ev.COLOUR_COLUMNS], (1024, 512))


def measure(function, files: list[Path], model: str = "base", prompt: str = "x", **options) -> list:
    """measure_missing of files, two at once; options: ratio, rows and key."""
    images = pd.DataFrame({"path": files, "prompt": prompt, "model": model, "image_id": [file.name for file in files]})
    images["content"] = [ev.content_of(str(file)) for file in files]
    one = ev.Scorer("a b", 0, options.get("key", "k"), lambda device: function, options.get("rows"))
    args = argparse.Namespace(output_dir=str(files[0].parent / "out"), batch_size=2)
    return ev.measure_missing(one, images, args, PartialState(cpu=True), options.get("ratio", 1.0)).tolist()


def test_images_are_upright_and_photos_are_cut_around_the_middle(tmp_path):
    def look(images: list[Image.Image], prompts: list[str]) -> list[list[int]]:
        ends = [(image, [(0, 0), (image.width - 1, image.height - 1)]) for image in images]
        return [[*image.size, *(image.getpixel(place)[2] for place in places)] for image, places in ends]

    exif, photo, file = Image.Exif(), Image.new("RGB", (60, 40), "red"), tmp_path / "phone.png"
    exif[0x0112] = 6  # turn right: what is on the left comes up
    photo.paste("blue", (0, 0, 30, 40))
    photo.save(file, exif=exif)
    assert measure(look, [file]) == [[40, 60, 255, 0]]
    for ratio, *size in ((1.0, 40, 40), (0.5, 30, 60), (1.5, 40, 27)):
        assert measure(look, [file], ev.PHOTOS, ratio=ratio) == [[*size, 255, 0]]  # both colours: the middle


def test_what_is_measured_is_kept_by_content(tmp_path):
    files, seen = [tmp_path / f"{i}.png" for i in range(4)], []
    for file, red in zip(files, (0, 20, 40, 0), strict=True):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(file)

    def measured(files: list[Path], *args, **options) -> list[str]:
        def red(images: list[Image.Image], prompts: list[str]) -> list[float]:
            seen.extend(image.info["image_id"] for image in images)
            return [image.getpixel((0, 0))[0] for image in images]

        seen.clear()
        assert measure(red, files, *args, **options) == [Image.open(file).getpixel((0, 0))[0] for file in files]
        return seen

    assert measured(files[:2]) == ["0.png", "1.png"]
    assert measured(files[::-1]) == ["2.png"]  # the fourth is the first
    files = [file.rename(tmp_path / f"new-{file.name}") for file in files]
    assert measured(files) == []
    Image.new("RGB", (8, 8), (77, 0, 0)).save(files[1])
    assert measured(files) == ["new-1.png"]
    for options in ({"prompt": "y"}, {"key": "other"}, {"rows": {"x": {"people": 2}}}):
        assert measured(files[:1], **options) == ["new-0.png"]
        assert measured(files[:1], **options) == []
    for file in tmp_path.glob("out/measures/a_b-k/*.npz"):
        file.write_bytes(file.read_bytes()[:-30])  # cut short
    assert measured(files[:1]) == ["new-0.png"]
    with pytest.raises(ev.UserError, match="a b gave 1 scores for 2 images"):
        measure(lambda images, prompts: [1.0], files[:2], key="few")
