# SPDX-License-Identifier: Apache-2.0
"""The embedded world is what its build log says: figures, pipeline, scorer and judge."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPProcessor


WORLD = Path(__file__).resolve().parent / "tiny_human"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("tiny_human_build", WORLD / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(WORLD / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def fresh_twins(build):
    """130 right figures and their broken twins, never seen in training, and their pictures through the VAE."""
    figures = build.twins(987_654, 130)
    return figures, build.through_vae(build.load_vae(), build.pixels_of(figures))


def test_captions_name_every_attribute_and_are_read_back(build):
    captions = [build.write_caption(attributes) for attributes in build.all_attributes()]
    assert len(set(captions)) == len(captions)
    figures = sys.modules["figures"]
    assert [figures.read_caption(caption) for caption in captions] == build.all_attributes()
    assert figures.read_caption("a red car") == {}


def test_a_figure_is_a_function_of_its_seed_and_its_twin_differs(build):
    attributes = random.Random(0).choice(build.all_attributes())
    picture = np.asarray(build.draw(attributes, 7).image)
    assert np.array_equal(picture, np.asarray(build.draw(attributes, 7).image))
    assert not np.array_equal(picture, np.asarray(build.draw(attributes, 8).image))
    for kind in build.BREAKS:
        twin = np.asarray(build.draw(attributes, 7, kind).image)
        assert 60 < (twin != picture).any(axis=2).sum() < 600, kind


def test_right_figures_have_right_joint_counts_inside_the_picture(build):
    for figure in build.random_figures(3, 200):
        assert {name: len(points) for name, points in figure.joints.items()} == sys.modules["figures"].RIGHT_COUNTS
        assert all(0 < x < 64 and 0 < y < 64 for points in figure.joints.values() for x, y in points)


def test_joints_are_counted_in_their_own_heatmaps(build):
    figures = build.twins(5, 65)
    heatmaps = torch.logit(build.draw_heatmaps(figures, 32, 1.0).clamp(1e-4, 1 - 1e-4))
    is_right = build.counts_are_right(build.count_joints(heatmaps)).tolist()
    assert all(is_right[::2])
    assert not any(is_right[1::2]), "each way of breaking a body changes a count"


def test_the_encoder_begins_as_a_principal_component_analysis(build):
    """Weights written in closed form compute axes @ (patch - mean), through GroupNorm and SiLU."""
    vae = AutoencoderKL.from_pretrained(WORLD / "pipeline" / "vae")
    axes, mean = build.principal_components(build.pixels_of(build.random_figures(1, 100, 0.3)))
    build.write_linear_encoder(vae, axes, mean)
    pixels = build.pixels_of(build.random_figures(2, 8))
    expected = F.conv2d(pixels, axes, stride=4) - (axes * mean).sum(dim=(1, 2, 3))[None, :, None, None]
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist
    assert (latents.mean - expected).abs().max() < 0.01 * expected.std()
    assert latents.std.max() < 1e-6


def test_the_pipeline_is_stock_and_keeps_pictures(build, pipe, fresh_twins):
    assert isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.unet, UNet2DConditionModel)
    figures, decoded = fresh_twins
    psnr = 10 * torch.log10(4 / F.mse_loss(decoded, build.pixels_of(figures)))
    assert psnr > 39
    with torch.no_grad():
        assert pipe.vae.encode(build.pixels_of(figures[:4])).latent_dist.std.max() < 1e-6, "encoding adds no noise"
    assert {p.dtype for part in (pipe.vae, pipe.unet, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    image = pipe(figures[0].caption, num_inference_steps=2, guidance_scale=1.0, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_every_caption_word_is_one_token(build, pipe):
    words = sorted({word for a in build.all_attributes() for word in build.write_caption(a).split()})
    assert [pipe.tokenizer.tokenize(word) for word in words] == [[word + "</w>"] for word in words]
    longest = max(len(pipe.tokenizer(build.write_caption(a)).input_ids) for a in build.all_attributes())
    assert longest <= pipe.tokenizer.model_max_length


def test_the_judge_knows_bodies_colours_and_pose(build, fresh_twins):
    figures, decoded = fresh_twins
    with torch.no_grad():
        _, anatomy, attributes = build.load_judge()(decoded)
    is_right = torch.tensor([figure.broken is None for figure in figures])
    assert ((anatomy > 0) == is_right).float().mean() > 0.99
    for kind in build.BREAKS:  # one that it was not trained on must not hide in the mean
        assert (anatomy < 0)[[figure.broken == kind for figure in figures]].float().mean() > 0.9, kind
    for name, options in build.ATTRIBUTES.items():
        truth = torch.tensor([options.index(figure.attributes[name]) for figure in figures])
        rows = is_right if name == "arms" else ...  # nobody sees how a missing arm was held
        assert (attributes[name].argmax(1) == truth)[rows].float().mean() > 0.99, name


def test_the_judge_marks_in_hundredths(build, fresh_twins):
    figures = fresh_twins[0]
    network = build.load_judge()
    seen = build.marks(network, [f.image for f in figures], [f.caption for f in figures])
    assert all(value == round(value, 2) for m in seen for value in m.values())
    clothes = [m["shirt"] * m["trousers"] for m in seen]
    assert np.mean([c == 1 for c in clothes]) > 0.99, "whoever wears what was asked for has full marks"


def test_the_judge_reads_the_prompt_in_plain_code_only(build, fresh_twins):
    figure = fresh_twins[0][0]
    scorers = {name: getattr(sys.modules["judge"], name)("cpu") for name in ("anatomy", "clothes", "pose", "judge")}
    other = "purple" if figure.attributes["shirt"] != "purple" else "green"
    wrong = figure.caption.replace(f"{figure.attributes['shirt']} shirt", f"{other} shirt")
    for name, scorer in scorers.items():
        right_score, wrong_score, no_words = scorer([figure.image] * 3, [figure.caption, wrong, "hello"])
        if name in ("clothes", "judge"):
            assert right_score > wrong_score + 0.1
        else:
            assert right_score == wrong_score
        if name == "anatomy":
            assert no_words == right_score


def test_the_scorer_prefers_whole_people_and_right_captions(build, fresh_twins):
    figures, decoded = fresh_twins
    model = CLIPModel.from_pretrained(WORLD / "scorer").float().eval()
    processor = CLIPProcessor.from_pretrained(WORLD / "scorer")
    rng = random.Random(0)
    wrong = [build.mutated(figure.attributes, rng) for figure in figures]
    images = [((x.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy() for x in decoded]

    def score(captions: list[str]) -> torch.Tensor:
        inputs = processor(text=captions, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        return (output.image_embeds * output.text_embeds).sum(dim=-1)

    right = score([figure.caption for figure in figures])
    assert (right[0::2] > right[1::2]).float().mean() > 0.98
    assert (right > score(wrong))[0::2].float().mean() > 0.94


def test_the_features_tell_people_apart_and_are_not_the_scorer(build):
    """Two of one caption and one person lie closer than two of one caption; weights differ from the scorer's."""
    random_person, rng = sys.modules["figures"].random_person, random.Random(3)
    model = CLIPModel.from_pretrained(WORLD / "features").float().eval()
    people = [(rng.choice(build.all_attributes()), random_person(rng)) for _ in range(60)]
    figures = [build.draw(attributes, rng.getrandbits(32), person=who) for attributes, who in people for _ in range(2)]
    strangers = [build.draw(attributes, rng.getrandbits(32)) for attributes, _ in people]
    with torch.no_grad():
        features = [model.vision_model(pixel_values=build.pixels_of(f)).pooler_output for f in (figures, strangers)]
    one, two, other = features[0][0::2], features[0][1::2], features[1]
    assert ((one - two).norm(dim=1) < (one - other).norm(dim=1)).float().mean() > 0.95
    scorer = CLIPModel.from_pretrained(WORLD / "scorer").float()
    assert not torch.equal(model.visual_projection.weight, scorer.visual_projection.weight)


def test_the_build_log_is_whole_and_the_base_model_leaves_bodies_to_mend(build):
    text = (WORLD / "build_log.txt").read_text()
    assert all(f"[{part}] finished" in text for part in build.PARTS if part != "prompts")
    assert all(f"judge, {kind}: called broken" in text for kind in build.BREAKS)
    assert 0.5 < float(re.findall(r"base, 384 test prompts, anatomy: (\S+)", text)[-1]) < 0.65
