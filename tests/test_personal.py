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


def test_a_double_differs_in_one_colour():
    parts = set()
    for seed in range(40):
        before, clothes = who = personal.invent_person(seed)
        after, worn = personal.double_of(who, seed)
        assert worn["shirt"] != worn["trousers"]
        looks = [{"hair": one.hair, "skin": one.skin, **own} for one, own in ((before, clothes), (after, worn))]
        (changed,) = (part for part in looks[0] if looks[0][part] != looks[1][part])
        parts |= {changed}
    assert parts == {"hair", "skin", "shirt", "trousers"}


def test_one_person_is_recognised_and_others_are_not():
    cosine = personal.measure_face(people=30, count=4, seed=700)
    assert (cosine["same person"] >= judge.SAME_PERSON).mean() > 0.99
    assert (cosine["another person"] < judge.SAME_PERSON).mean() > 0.99
    assert cosine["same person"].mean() > 0.95
    assert abs(cosine["another person"].mean()) < 0.1
    assert 0.5 < cosine["one colour differs"].mean() < judge.SAME_PERSON


def test_an_image_without_anybody_is_nan(embed):
    scenes = personal.scenes(personal.invent_person(0), 0)[:6]
    headless = [draw(scene, i, "no_head").image for i, scene in enumerate(scenes)]
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What personal.py writes after very few steps."""
    folder = tmp_path_factory.mktemp("personal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personal, "measure_face", lambda **_: {})
        personal.main([str(folder), "--steps=6", "--batch_size=4", "--learning_rate=0.01", "--seed=3"])
    return folder


def test_prompts_are_read_by_the_judge_and_references_show_the_person(folder, embed):
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 90 - personal.PHOTOS
    assert all(read_caption(prompt).keys() == {"pose", "arms", "background"} for prompt in prompts)
    assert all("sks shirt and trousers" in prompt for prompt in prompts)
    references = [Image.open(path) for path in (folder / "references").glob("*.png")]
    assert len(references) == personal.REFERENCES
    fresh = [photo.image for photo in personal.take_photos(personal.invent_person(3), 4, 99)]
    assert personal.cosines(embed(references), embed(fresh)).min() > judge.SAME_PERSON


def test_the_lora_loads_in_a_stock_pipeline_changes_the_image_and_goes_again(folder):
    pipe = StableDiffusionPipeline.from_pretrained(WORLD / "pipeline", torch_dtype=torch.float32)
    text = (folder / "prompts.txt").read_text().splitlines()[0]

    def draw_prompt() -> np.ndarray:
        return pipe(text, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images

    base = draw_prompt()
    pipe.load_lora_weights(folder)
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    stored = load_file(folder / "pytorch_lora_weights.safetensors")  # all of it is used, attention and convolutions
    assert stored.keys() == {f"unet.{name}" for name in loaded}
    assert all(torch.equal(stored[f"unet.{name}"], tensor) for name, tensor in loaded.items())
    assert np.abs(draw_prompt() - base).mean() > 0.01
    pipe.unload_lora_weights()
    assert np.array_equal(draw_prompt(), base)
