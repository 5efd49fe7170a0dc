# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: SDRecon, the Normal and Hard stages with drawn people as photos, pools of a tuned model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import test_make_preference_data as common
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_make_preference_data import data, make, pairs_of, picture, pool_of, record_of, sides
from tiny_human import figures
from train_helpers import LORA, PIPELINE, flags, load, tiny_sd3, tiny_sdxl


MODELS = {"sd": lambda folder: PIPELINE, "sdxl": tiny_sdxl, "sd3": tiny_sd3}
OTHER = {"scorer": common.PICKSCORE, "num_inference_steps": 4, "guidance_scale": 1.2}


def draw_photos(folder: Path, size: tuple[int, int] = (64, 64)) -> Path:
    folder.mkdir()
    for i in range(6):
        person = figures.draw(figures.all_attributes()[101 * i], seed=i)
        person.image.resize(size).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}.txt").write_text(person.caption)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with photos and the three stages, not to be changed; and how many photos were encoded after each."""
    folder, encoded, counts, to_latents = tmp_path_factory.mktemp("world"), [], [], data.UNet.to_latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.UNet, "to_latents", lambda *args: encoded.append(1) or to_latents(*args))
        make(folder / "easy", prompts=draw_photos(folder / "photos"), max_prompts=6, validation_share=0.3)
        for stage, before in (("normal", "easy"), ("hard", "normal")):
            later = {"real_data_dir": folder / "photos", "previous_pairs": folder / before, "num_inference_steps": 10}
            make(folder / stage, stage=stage, **later)
            counts.append(len(encoded))
    return folder, counts


def hard(world, out: Path, **settings) -> Path:
    before = {"real_data_dir": world[0] / "photos", "previous_pairs": world[0] / "easy"}
    return make(out, stage="hard", **before | settings)


def pipe_image(pipe, row: dict, side: int) -> np.ndarray:
    options = {"num_inference_steps": 4, "guidance_scale": 1.2, "height": side, "width": side, "output_type": "np"}
    return pipe(row["caption"], generator=torch.Generator().manual_seed(row["seed"]), **options).images[0] * 255


@pytest.mark.parametrize("kind", MODELS)
def test_sd_recon_starts_on_the_familys_path_and_keeps_a_photo_at_a_small_t(kind, tmp_path, monkeypatch):
    words = {"model": MODELS[kind](tmp_path / kind), "stage": "hard", "real_data_dir": "x", "previous_pairs": "y"}
    pipe, family, path, _ = data.load_sampler(data.parse_args(flags(words)))
    people = [figures.draw(figures.all_attributes()[311 * i], seed=i) for i in range(3)]
    side, far, seen, sample = 64 if kind == "sd" else 48, [], [], data.sample
    text, seeds = data.encode_prompts(pipe, family, [one.caption for one in people], "", guided=False), [5, 6, 7]
    pixels = pipe.image_processor.preprocess([one.image.resize((side, side)) for one in people])
    with torch.no_grad():
        x_0 = family.to_latents(pipe, pixels)
        torch.testing.assert_close(family.to_pixels(pipe, x_0), pipe.vae(pixels).sample, atol=1e-4, rtol=1e-4)
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(i)) for i in seeds])
    monkeypatch.setattr(data, "sample", lambda *args, **more: seen.append(more) or sample(*args, **more))
    for t in (10, 100, 400, 900):
        options = {"height": side, "width": side, "guidance_scale": 1}
        _, latents = data.sd_recon(pipe, family, path, text, [0, 1, 2], seeds, x_0, t, 10, **options)
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        if kind == "sd3":  # the sigma of the same signal-to-noise ratio, not shifted
            sigmas = data.sd_recon_sigmas(t, path.s.flip(0)[::100].tolist())
            assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx(sigmas)
            scheduler.set_timesteps(sigmas=sigmas)
            expected = scheduler.scale_noise(x_0, scheduler.timesteps[:1].repeat(3), noise)
        else:
            assert pipe.scheduler.timesteps.tolist() == data.sd_recon_timesteps(t, 10)
            scheduler.set_timesteps(timesteps=data.sd_recon_timesteps(t, 10))
            expected = scheduler.add_noise(x_0, noise, torch.tensor([t] * 3))
        torch.testing.assert_close(seen[-1]["latents"], expected)
        far.append((latents - x_0).abs().mean().item())
    assert 5 * far[0] < far[3] == sorted(far)[3]


def test_normal_is_the_best_reconstruction_against_the_easy_winner(world):
    out = world[0] / "normal"
    easy, pairs = ({pair["caption"]: pair for pair in pairs_of(stage)} for stage in (world[0] / "easy", out))
    pool, scores = pool_of(out, "sdrecon"), common.scores_of(out)
    assert [sum(row["source"] == f"sdrecon-{t}" for row in pool.values()) for t in (400, 500, 600, 700)] == [6] * 4
    assert world[1] == [6, 6 + len(pairs)]  # a photo is encoded once, not once per timestep
    for caption, before in easy.items():
        best = max((name for name, row in pool.items() if row["caption"] == caption), key=scores.get)
        assert (caption in pairs) == (scores[best] >= sides(before, "score")[0])
        if pair := pairs.get(caption):
            assert sides(pair, "image_id") == [best, sides(before, "image_id")[0]]
            for name in ("jpg", "latents", "seed", "source"):
                assert sides(pair, name) == [pool[best][name], sides(before, name)[0]]
    assert 0 < len(pairs) == 6 - record_of(out)["dropped"].get("worse than the previous winner", 0)


def test_hard_is_about_the_photo_itself_against_the_normal_winner(world):
    normal = {pair["caption"]: pair for pair in pairs_of(world[0] / "normal")}
    files = world[0].glob("photos/*.txt")
    photos = {file.read_text(): picture(file.with_suffix(".jpg").read_bytes()) for file in files}
    pairs = pairs_of(world[0] / "hard")
    assert {pair["caption"] for pair in pairs} == normal.keys()  # whatever the scores say
    for pair in pairs:
        before = normal[pair["caption"]]
        assert sides(pair, "source") == ["sdrecon-100", sides(before, "source")[0]]
        assert sides(pair, "latents")[1] == sides(before, "latents")[0]
        away = [np.abs(picture(jpg) - photos[pair["caption"]]).mean() for jpg in sides(pair, "jpg")]
        assert away == sorted(away)
        assert [picture(jpg).shape for jpg in sides(pair, "jpg")] == [(64, 64, 3)] * 2
    held_out = {pair["caption"] for pair in pairs_of(world[0] / "easy", "validation")}
    assert len(held_out) == 2
    for stage in ("normal", "hard"):  # what one stage holds out, no later one trains on
        splits = ({pair["caption"] for pair in pairs_of(world[0] / stage, split)} for split in data.SPLITS)
        assert list(splits) == [normal.keys() - held_out, normal.keys() & held_out]


@pytest.mark.parametrize("kind", MODELS)
def test_all_families_draw_as_their_pipelines_do_and_keep_latents_that_decode(kind, world, tmp_path):
    model, side = MODELS[kind](tmp_path / kind), 64 if kind == "sd" else 48
    easy = make(tmp_path / "easy", **OTHER | {"model": model, "prompts": world[0] / "photos", "max_prompts": 2})
    row, pipe, family = next(iter(pool_of(easy).values())), load(model), data.SD3() if kind == "sd3" else data.UNet()
    pipe.scheduler, latents = family.sampler(pipe), np.frombuffer(row["latents"], np.float16).astype(np.float32)
    own = pipe_image(pipe, row, side)
    assert np.abs(own - picture(row["jpg"])).mean() < 6  # what JPEG loses of noise
    latents = torch.from_numpy(latents).reshape(1, *record_of(easy)["latents"]["shape"])
    with torch.no_grad():
        decoded = pipe.image_processor.postprocess(family.to_pixels(pipe, latents), "np")[0] * 255
    assert np.abs(decoded - own).max() < 4
    winners = {pair["caption"]: sides(pair, "latents")[0] for pair in pairs_of(easy)}
    pairs = pairs_of(hard(world, tmp_path / "hard", **OTHER, model=model, previous_pairs=easy))
    assert {pair["caption"]: sides(pair, "latents")[1] for pair in pairs} == winners
    assert [picture(jpg).shape for pair in pairs for jpg in sides(pair, "jpg")] == [(side, side, 3)] * 4


def test_photos_that_cannot_serve_cost_their_own_pairs(world, tmp_path, capsys):
    photos = draw_photos(tmp_path / "photos", size=(96, 160))
    whole = (photos / "0.jpg").read_bytes()
    (photos / "0.jpg").write_bytes(whole[: len(whole) // 2])
    Image.open(photos / "1.jpg").resize((40, 40)).save(photos / "1.jpg")
    pairs, told = pairs_of(hard(world, tmp_path / "out", real_data_dir=photos)), capsys.readouterr()
    assert f"the photo {photos / '0.jpg'}" in told.err
    assert "1 photos that would be enlarged" in told.out
    assert "1 no image with a score" in told.out
    assert len(pairs) == 4
    captions = {file.read_text(): Image.open(file.with_suffix(".jpg")) for file in photos.glob("[2-5].txt")}
    for pair in pairs:  # cut at the upper centre, where heads are
        cuts = [ImageOps.fit(captions[pair["caption"]], (64, 64), centering=(0.5, y)) for y in (0.2, 0.5, 0.8)]
        away = [np.abs(np.asarray(one, int) - picture(sides(pair, "jpg")[0])).mean() for one in cuts]
        assert away[0] == min(away)
    (photos / "0.jpg").write_bytes(whole)  # mended, the same command draws it
    assert len(pairs_of(hard(world, tmp_path / "out", real_data_dir=photos))) == 5


def test_what_does_not_fit_the_stage_before_is_one_line(world, tmp_path):
    easy, other = (shutil.copytree(one, tmp_path / one.name) for one in (world[0] / "easy", PIPELINE))
    file = next((other / "vae").glob("*.safetensors"))
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(data.UserError, match="has no latents of this model's VAE: set --no_latents"):
        hard(world, tmp_path / "out", **OTHER, model=other)
    assert "latents_0" not in pairs_of(hard(world, tmp_path / "out", **OTHER, model=other, no_latents=True))[0]
    shutil.rmtree(easy / "pool")
    with pytest.raises(data.UserError, match=r"^--previous_pairs .*: 6 of its 6 winners are not in its pool/\Z"):
        hard(world, tmp_path / "none", previous_pairs=easy)


def test_a_lora_draws_another_pool_as_the_pipeline_does(tmp_path):
    torch.manual_seed(0)
    pipe, lora, small = load(PIPELINE), tmp_path / "lora", {"max_prompts": 1, "num_images_per_prompt": 2}
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = {name: 3 * value for name, value in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(lora, state)
    plain = pool_of(make(tmp_path / "out", **small))
    both = pool_of(make(tmp_path / "out", **small, lora=lora, lora_scale=0.7))
    pipe = load(PIPELINE)
    pipe.load_lora_weights(lora, weight_name=LORA, adapter_name="tuned")
    pipe.set_adapters(["tuned"], [0.7])
    for row, before in zip((both[name] for name in both if name not in plain), plain.values(), strict=True):
        own = pipe_image(pipe, row, 64)
        assert np.abs(own - picture(row["jpg"])).mean() < 3  # what JPEG loses
        assert np.abs(own - picture(before["jpg"])).mean() > 6
    moved = shutil.move(lora, tmp_path / "moved")
    assert len(pool_of(make(tmp_path / "out", **small, lora=moved, lora_scale=0.7))) == 4
    assert len(pool_of(make(tmp_path / "out", **small, lora=moved))) == 6
    tensors = load_file(moved / LORA)
    lost = {name.replace("attn1", "attn9"): value.clone() for name, value in tensors.items() if "attn1" in name}
    save_file(tensors | lost, moved / LORA)
    with pytest.raises(data.UserError, match=f"{len(lost)} of its {len(tensors | lost)} tensors find no place"):
        make(tmp_path / "out", **small, lora=moved)
