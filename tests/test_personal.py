# SPDX-License-Identifier: Apache-2.0
"""A person of the embedded world is known again, and a personal LoRA is made that a stock pipeline loads."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file


WORLD = Path(__file__).resolve().parent / "tiny_human"
sys.path.insert(0, str(WORLD))
import judge
import personal
from figures import draw, read_caption


sys.path.remove(str(WORLD))


@pytest.fixture(scope="module")
def embed():
    return judge.face()


def photos_of(seed: int, count: int) -> list[Image.Image]:
    return [photo.image for photo in personal.take_photos(personal.invent_person(seed), count, seed)]


# ---- The person ----------------------------------------------------------------------------------------------------


def test_a_given_person_changes_hair_skin_and_shoes_alone():
    attributes = personal.scenes(personal.invent_person(3), 0)[0]
    person = personal.invent_person(3)[0]._replace(hair_style=0)
    anybody, somebody = draw(attributes, 7), draw(attributes, 7, person=person)
    assert anybody.joints == somebody.joints
    assert anybody.caption == somebody.caption
    changed = (np.asarray(anybody.image) != np.asarray(somebody.image)).any(axis=2)
    assert 20 < changed.sum() < 600
    for colour in person[:2]:
        distance = np.abs(np.asarray(somebody.image).astype(int) - np.array(colour)).sum(axis=2)
        assert distance.min() < 12, colour


def test_photos_show_one_person_in_scenes_that_no_prompt_has():
    who = personal.invent_person(4)
    photos, every = personal.take_photos(who, personal.PHOTOS, 4), personal.scenes(who, 4)
    assert [photo.attributes for photo in photos] == every[: personal.PHOTOS]
    assert len({personal.write_prompt(scene) for scene in every}) == 90
    assert all(who[1].items() <= photo.attributes.items() for photo in photos)


def test_a_double_differs_in_one_colour():
    parts = set()
    for seed in range(40):
        person, clothes = who = personal.invent_person(seed)
        other, worn = personal.double_of(who, seed)
        before = {"hair": person.hair, "skin": person.skin, **clothes}
        after = {"hair": other.hair, "skin": other.skin, **worn}
        changed = {part for part in before if before[part] != after[part]}
        assert len(changed) == 1
        assert worn["shirt"] != worn["trousers"]
        parts |= changed
    assert parts == {"hair", "skin", "shirt", "trousers"}


def test_the_loss_counts_most_on_head_and_torso():
    photo = personal.take_photos(personal.invent_person(0), 1, 0)[0]
    weights, (x, y) = personal.weight_map(photo), photo.joints["head"][0]
    assert weights.unique().tolist() == pytest.approx([personal.ELSEWHERE, 1])
    assert weights[int(y) // 4, int(x) // 4] == weights[int(y + 15) // 4, int(x) // 4] == 1
    for foot in photo.joints["foot"]:
        assert weights[int(foot[1]) // 4, int(foot[0]) // 4] < 1
    assert 20 < (weights == 1).sum() < 40


# ---- The embedder --------------------------------------------------------------------------------------------------


def test_one_person_is_recognised_and_others_are_not():
    cosine = personal.measure_face(people=30, count=4, seed=700)
    assert (cosine["same person"] >= judge.SAME_PERSON).mean() > 0.99
    assert (cosine["another person"] < judge.SAME_PERSON).mean() > 0.98
    assert cosine["same person"].mean() > 0.95
    assert abs(cosine["another person"].mean()) < 0.1
    assert 0.5 < cosine["one colour differs"].mean() < judge.SAME_PERSON


def test_an_image_without_anybody_is_nan(embed):
    scenes = personal.scenes(personal.invent_person(0), 0)
    headless = [draw(scene, i, "no_head").image for i, scene in enumerate(scenes[:6])]
    empty = [Image.new("RGB", (64, 64), colour) for colour in ("white", "gray", (190, 235, 210))]
    features = embed(empty + headless + photos_of(0, 2))
    assert features.shape == (11, 22)
    assert np.isnan(features[:9]).all()
    assert not np.isnan(features[9:]).any()


def test_an_embedding_depends_on_its_picture_alone_and_hardly_on_its_size(embed):
    pictures = photos_of(5, 4)
    together = embed(pictures)
    assert np.allclose(together, np.concatenate([embed([picture]) for picture in pictures]), atol=1e-4)
    larger = [picture.resize((256, 256), Image.Resampling.BICUBIC) for picture in pictures]
    assert np.diag(personal.cosines(embed(larger), together)).min() > 0.9


def test_colours_of_a_palette_are_orthogonal_but_for_their_mean():
    palette = torch.tensor([*judge.SHIRTS.values()], dtype=torch.float)
    features = judge.compare_colours(palette, palette).numpy()
    assert np.allclose(features.sum(axis=0), 0, atol=1e-5)
    cosine = personal.cosines(features, features)
    assert np.allclose(np.diag(cosine), 1)
    assert (cosine[~np.eye(6, dtype=bool)] < 0.2).all()
    nothing_like_them = judge.compare_colours(torch.tensor([[1000.0, 0.0, 0.0]]), palette).numpy()
    assert personal.cosines(nothing_like_them, features).max() < 0.5


def test_the_head_is_found_where_it_was_drawn():
    photos = personal.take_photos(personal.invent_person(6), 8, 6)
    with torch.no_grad():
        found = judge.find_head(judge.load_judge()(judge.to_pixels([photo.image for photo in photos]))[0])
    drawn = torch.tensor([photo.joints["head"][0] for photo in photos])
    assert (found - drawn).abs().max() < 1


# ---- The LoRA ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What personal.py writes after very few steps."""
    folder = tmp_path_factory.mktemp("personal")
    flags = ["--steps", "6", "--batch_size", "4", "--learning_rate", "0.01", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personal, "measure_face", lambda **_: {})
        personal.main([str(folder), *flags])
    return folder


def test_prompts_are_distinct_name_the_person_alike_and_are_read_by_the_judge(folder):
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 90 - personal.PHOTOS
    assert all(read_caption(prompt).keys() == {"pose", "arms", "background"} for prompt in prompts)
    assert all("sks shirt and trousers" in prompt for prompt in prompts)
    marks = judge.marks(judge.load_judge(), photos_of(3, 2), prompts[:2])
    assert all(mark.keys() == {"anatomy", "pose", "arms", "background"} for mark in marks)


def test_references_show_the_person(folder, embed):
    references = [Image.open(path) for path in sorted((folder / "references").glob("*.png"))]
    assert len(references) == personal.REFERENCES
    fresh = personal.take_photos(personal.invent_person(3), 4, 99)
    assert personal.cosines(embed(references), embed([photo.image for photo in fresh])).min() > judge.SAME_PERSON


def test_the_lora_loads_in_a_stock_pipeline_changes_the_image_and_goes_again(folder):
    pipe = StableDiffusionPipeline.from_pretrained(WORLD / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt = (folder / "prompts.txt").read_text().splitlines()[0]

    def draw_prompt() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=3, guidance_scale=1.2, generator=generator, output_type="np").images

    base = draw_prompt()
    pipe.load_lora_weights(folder)
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    stored = load_file(folder / "pytorch_lora_weights.safetensors")  # all of it is used, attention and convolutions
    assert stored.keys() == {f"unet.{name}" for name in loaded}
    assert all(torch.equal(stored[f"unet.{name}"], tensor) for name, tensor in loaded.items())
    assert np.abs(draw_prompt() - base).mean() > 0.01
    pipe.unload_lora_weights()
    assert np.array_equal(draw_prompt(), base)
