# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: SDRecon, and the Normal and Hard stages made from drawn people as the real photos."""

import contextlib
import json
import shutil
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from test_make_preference_data import SCORER, data, data_of, difference, make, read_image, rows_of, write_inputs
from tiny_human import figures
from train_helpers import tiny_sdxl


SHORT = ["--num_images_per_prompt", 4, "--num_inference_steps", 10, "--draft_steps", 0]
EASY = [*SHORT, "--validation_share", 0.3]


def draw_photos(folder: Path, count: int = 6, size: tuple[int, int] = (64, 64)) -> Path:
    """Drawn people with their captions in metadata.jsonl, as figures.py writes them."""
    folder.mkdir()
    lines = []
    for i in range(count):
        figure = figures.draw(figures.all_attributes()[101 * i], seed=i)
        figure.image.resize(size).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": figure.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory):
    """Photos, and the folders of the three stages, not to be changed."""
    folder = write_inputs(tmp_path_factory.mktemp("curriculum"))
    photos = draw_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch, (folder / "printed.txt").open("w") as printed:
        patch.setattr(data, "SHARD_IMAGES", 10)
        with contextlib.redirect_stdout(printed):
            make(folder, *EASY, "--prompts", photos, "--output_dir", folder / "easy")
            for stage, before in (("normal", "easy"), ("hard", "normal")):
                later = ["--stage", stage, "--real_data_dir", photos, "--previous_pairs", folder / before]
                make(folder, *SHORT, *later, "--output_dir", folder / stage)
    return folder


def winner(row: dict, name: str) -> object:
    return row[f"{name}_{int(row['label_1'])}"]


def loser(row: dict, name: str) -> object:
    return row[f"{name}_{1 - int(row['label_1'])}"]


# ---- SDRecon --------------------------------------------------------------------------------------------------------


def test_noised_as_the_scheduler_noises():
    scheduler = DPMSolverMultistepScheduler()
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (1, 100, 400, 999):
        scheduler.set_timesteps(timesteps=[t])
        expected = scheduler.add_noise(x_0, noise, torch.tensor([t] * 3))
        torch.testing.assert_close(data.sd_recon_latents(x_0, noise, scheduler.alphas_cumprod[t]), expected)


@pytest.mark.parametrize(
    ("t", "steps", "timesteps"),
    [
        (400, 50, list(range(400, 0, -20))),
        (100, 50, [100, 80, 60, 40, 20]),
        (100, 6, [100]),
        (700, 10, [700, 600, 500, 400, 300, 200, 100]),
        (1, 50, [1]),
    ],
)
def test_timesteps_from_t_on_in_the_strides_of_a_full_run(t, steps, timesteps):
    assert data.sd_recon_timesteps(t, steps) == timesteps


@pytest.fixture(scope="module")
def pipe():
    data.quiet_libraries()
    args = data.parse_args(["--stage", "normal", "--real_data_dir", "x", "--previous_pairs", "x"])
    return data.load_sampler(args, torch.device("cpu"))


def test_sd_recon_keeps_the_photo_at_a_small_t_and_leaves_it_at_a_large_one(pipe):
    people = [figures.draw(figures.all_attributes()[311 * i], seed=i) for i in range(8)]
    photos, captions = [one.image for one in people], [one.caption for one in people]
    embeds = data.encode_prompts(pipe, captions, "")
    decoded, _ = data.decode(pipe, data.encode(pipe, photos))
    distance = []
    for t in (20, 100, 400, 700, 950):
        images, latents = data.sd_recon(pipe, embeds, range(8), range(8), photos, t, 20, 1.2)
        assert latents.shape == (8, 8, 16, 16)
        assert latents.dtype == torch.float16
        distance.append(np.mean([difference(a, b).mean() for a, b in zip(images, decoded, strict=True)]))
    assert distance == sorted(distance)
    assert distance[0] < 3 < 10 < distance[-1]


def test_sd_recon_is_a_function_of_photo_prompt_and_seed(pipe):
    people = [figures.draw(figures.all_attributes()[7 * i], seed=i) for i in range(3)]
    photos, captions = [one.image for one in people], [one.caption for one in people]
    embeds = data.encode_prompts(pipe, captions, "")
    together, _ = data.sd_recon(pipe, embeds, [0, 1, 2], [5, 6, 7], photos, 500, 10, 1.2)
    alone, _ = data.sd_recon(pipe, embeds, [2], [7], photos[2:], 500, 10, 1.2)
    other, _ = data.sd_recon(pipe, embeds, [2], [8], photos[2:], 500, 10, 1.2)
    assert difference(alone[0], together[2]).max() <= 2
    assert difference(other[0], together[2]).max() > 2


def test_the_benchmark_of_data_draws_with_sdxl_what_the_pipeline_draws(tmp_path):
    """The loop, ours and the floor run; the floor's U-Net gets the texts, pooled texts and sizes of the pipeline."""
    model = tiny_sdxl(tmp_path / "sdxl")
    settings = {"model": str(model), "scorer": benchmark.SCORER, "prompts": 2, "images": 2, "steps": 2}
    settings |= {"guidance_scale": 3.0, "batch_size": 4, "resolution": 32, "work_dir": str(tmp_path)}
    for measure in (benchmark.timed_loop, benchmark.timed_data, benchmark.timed_bare):
        assert measure(json.dumps(settings))["images"] == 4
    pipe, seen = StableDiffusionXLPipeline.from_pretrained(model), []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: seen.append(kwargs) or forward(*args, **kwargs)
    prompts = ["a person", "two people"]
    pipe(prompts, num_inference_steps=1, guidance_scale=3.0, height=32, width=32, output_type="latent")
    embeds = data.encode_prompts(pipe, prompts, "")
    both, added = benchmark.both_texts(embeds, torch.arange(2), (32, 32))
    torch.testing.assert_close(both, seen[0]["encoder_hidden_states"])
    assert added.keys() == seen[0]["added_cond_kwargs"].keys()
    for name, value in added.items():
        torch.testing.assert_close(value, seen[0]["added_cond_kwargs"][name])


def test_sd_recon_of_sdxl(tmp_path):
    """A random SDXL, two text encoders, pooled embeddings, sizes: at a small t the photo's own latents come back."""
    model, names = tiny_sdxl(tmp_path / "sdxl"), ["--stage", "normal", "--real_data_dir", "x", "--previous_pairs", "x"]
    pipe = data.load_sampler(
        data.parse_args([*names, "--pretrained_model_name_or_path", str(model)]), torch.device("cpu")
    )
    people = [figures.draw(figures.all_attributes()[7 * i], seed=i) for i in range(3)]
    photos = [one.image.resize((32, 48)) for one in people]
    embeds = data.encode_prompts(pipe, [one.caption for one in people], "")
    far = []
    for t in (10, 900):
        images, latents = data.sd_recon(pipe, embeds, [0, 1, 2], [5, 6, 7], photos, t, 10, 1.2)
        assert [image.size for image in images] == [(32, 48)] * 3
        far.append(float((latents - data.encode(pipe, photos)).abs().mean()))
    assert far[0] < 0.2 < 0.5 < far[1]
    alone, _ = data.sd_recon(pipe, embeds, [2], [7], photos[2:], 900, 10, 1.2)
    assert difference(alone[0], images[2]).max() <= 2


# ---- The stages -----------------------------------------------------------------------------------------------------


def test_easy_takes_the_photos_captions_as_prompts(curriculum):
    captions = [json.loads(line)["text"] for line in (curriculum / "photos/metadata.jsonl").read_text().splitlines()]
    assert {row["caption"] for row in data_of(curriculum / "easy")} == set(captions)


def test_normal_is_the_best_reconstruction_against_the_easy_winner(curriculum):
    easy = {row["caption"]: row for row in data_of(curriculum / "easy")}
    normal = data_of(curriculum / "normal")
    record = json.loads((curriculum / "normal" / "preference_data.json").read_text())
    assert 0 < len(normal) <= len(easy)
    assert len(normal) + record["dropped"].get("worse than the previous winner", 0) == len(easy)
    pool = [row for path in sorted(curriculum.glob("normal/pool/*.parquet")) for row in data.read_shard(path)]
    assert len(pool) == 5 * len(easy)
    for row in normal:
        before = easy[row["caption"]]
        assert winner(row, "source") in {"sdrecon-400", "sdrecon-500", "sdrecon-600", "sdrecon-700"}
        assert loser(row, "jpg") == winner(before, "jpg")
        assert loser(row, "latents") == winner(before, "latents")
        assert (loser(row, "source"), loser(row, "seed")) == ("generated", winner(before, "seed"))
        assert loser(row, "score") == pytest.approx(winner(before, "score"), abs=0.01)  # latents are kept in fp16
        ours = [one for one in pool if one["caption"] == row["caption"] and one["index"] != data.PREVIOUS]
        scores = {one["source"]: next(iter(json.loads(one["scores"]).values())) for one in ours}
        assert winner(row, "source") == max(scores, key=scores.get)
        assert row["margin"] >= 0
        assert row["stage"] == "normal"


def test_hard_is_about_the_photo_itself_against_the_normal_winner(curriculum):
    normal = {row["caption"]: row for row in data_of(curriculum / "normal")}
    hard = data_of(curriculum / "hard")
    assert {row["caption"] for row in hard} == set(normal)  # whatever the scores say
    lines = [json.loads(line) for line in (curriculum / "photos/metadata.jsonl").read_text().splitlines()]
    photos = {line["text"]: data.open_photo(curriculum / "photos" / line["file_name"], "") for line in lines}
    for row in hard:
        assert winner(row, "source") == "sdrecon-100"
        assert loser(row, "jpg") == winner(normal[row["caption"]], "jpg")
        assert loser(row, "source") == winner(normal[row["caption"]], "source")
        assert row["margin"] == pytest.approx(winner(row, "score") - loser(row, "score"))
        away = [difference(read_image(side(row, "jpg")), photos[row["caption"]]).mean() for side in (winner, loser)]
        assert away[0] < away[1]


def test_both_sides_are_of_one_size_and_codec(curriculum):
    for stage in ("normal", "hard"):
        for row in data_of(curriculum / stage):
            sides = [data.Image.open(data.io.BytesIO(row[f"jpg_{side}"])) for side in (0, 1)]
            assert sides[0].size == sides[1].size == (64, 64)
            assert sides[0].quantization == sides[1].quantization
            assert sides[0].layer == sides[1].layer


def test_what_one_stage_holds_out_no_later_one_trains_on(curriculum):
    held_out = {row["caption"] for row in rows_of(curriculum / "easy", "validation")}
    assert len(held_out) == 2
    for stage in ("normal", "hard"):
        split = {row["caption"]: "train" for row in data_of(curriculum / stage)}
        path = curriculum / stage / "data" / "validation-00000-of-00001.parquet"
        split |= (
            {row["caption"]: "validation" for row in rows_of(curriculum / stage, "validation")}
            if path.exists()
            else {}
        )
        assert {caption for caption, name in split.items() if name == "validation"} == held_out & set(split)


def test_the_trainer_reads_latents_of_all_stages(curriculum):
    for stage in ("easy", "normal", "hard"):
        facts = json.loads((curriculum / stage / "preference_data.json").read_text())["latents"]
        assert facts["shape"] == [8, 16, 16]
        for row in data_of(curriculum / stage):
            assert {len(row["latents_0"]), len(row["latents_1"])} == {2 * 8 * 16 * 16}
    printed = (curriculum / "printed.txt").read_text()
    assert "--initial_lora LORA_OF_THE_STAGE_BEFORE --lambda_stat 0" in printed


def test_the_previous_pairs_without_latents_are_encoded(curriculum, tmp_path):
    folder = write_inputs(tmp_path)
    make(
        folder,
        *EASY,
        "--prompts",
        curriculum / "photos",
        "--no_latents",
        "--max_prompts",
        2,
        "--output_dir",
        folder / "easy",
    )
    later = ["--stage", "hard", "--real_data_dir", curriculum / "photos", "--previous_pairs", folder / "easy"]
    row = data_of(make(folder, *SHORT, *later))[0]
    known = next(one for one in data_of(curriculum / "easy") if one["caption"] == row["caption"])
    ours, theirs = (
        np.frombuffer(one, np.float16).astype(float) for one in (loser(row, "latents"), winner(known, "latents"))
    )
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9


def test_photos_of_another_shape_are_cut_to_the_size(curriculum, tmp_path):
    folder = write_inputs(tmp_path)
    photos = draw_photos(folder / "wide", size=(160, 96))
    later = ["--stage", "hard", "--real_data_dir", photos, "--previous_pairs", curriculum / "easy"]
    for row in data_of(make(folder, *SHORT, *later)):
        assert read_image(winner(row, "jpg")).size == (64, 64)


def test_a_photo_that_cannot_be_read_costs_its_own_pair_alone(curriculum, tmp_path, capsys):
    folder = write_inputs(tmp_path)
    photos = draw_photos(folder / "photos")
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole[: len(whole) // 2])
    later = ["--stage", "hard", "--real_data_dir", photos, "--previous_pairs", curriculum / "easy"]
    out = make(folder, *SHORT, *later, "--sdrecon_timesteps", 100, 200)
    told = capsys.readouterr()
    assert told.err.count(f"left out: cannot read the photo {photos / '0.png'}") == 1
    assert "note: they are of the stage easy" in told.out
    assert "dropped    1 no image with a finite score" in told.out
    assert len(data_of(out)) == 5
    (photos / "0.png").write_bytes(whole)  # mended, it is drawn by the same command
    assert make(folder, *SHORT, *later, "--sdrecon_timesteps", 100, 200) == out
    assert len(data_of(out)) == 6


def test_a_later_stage_is_scored_again_without_photos(curriculum, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_IMAGES", 10)
    out = shutil.copytree(curriculum / "normal", tmp_path / "out")
    write_inputs(tmp_path)
    before = {row["caption"]: row for row in data_of(out)}
    plugin = f"{tmp_path}/plugin.py:redness"
    data.main(data.parse_args(["--output_dir", str(out), "--rescore", "--scorer", SCORER, f"0.1*{plugin}"]))
    assert {row["source_0"] for row in data_of(out)} | {row["source_1"] for row in data_of(out)} > {"generated"}
    data.main(data.parse_args(["--output_dir", str(out), "--rescore", "--scorer", SCORER]))
    assert {row["caption"]: row for row in data_of(out)} == before


def test_damaged_pairs_of_the_stage_before_are_named(curriculum, tmp_path):
    folder, easy = write_inputs(tmp_path), shutil.copytree(curriculum / "easy", tmp_path / "easy")
    later = ["--stage", "normal", "--real_data_dir", curriculum / "photos", "--previous_pairs", easy]
    whole = (easy / "preference_data.json").read_text()
    (easy / "preference_data.json").write_text(whole[:100])
    with pytest.raises(data.UserError, match=r"easy/preference_data\.json is damaged"):
        make(folder, *SHORT, *later)
    file = data.split_file(easy, "train")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(data.UserError, match=r"cannot read .*train-00000-of-00001\.parquet") as error:
        make(folder, *SHORT, *later)
    assert "\n" not in str(error.value)


def test_pool_png_marks_the_pair_that_was_chosen(curriculum, tmp_path, monkeypatch):
    """The loser is the stage before's winner, which is seldom the worst of all."""
    monkeypatch.setattr(data, "SHARD_IMAGES", 10)
    out, sheets = shutil.copytree(curriculum / "normal", tmp_path / "out"), []
    sheet = data.contact_sheet
    monkeypatch.setattr(data, "contact_sheet", lambda *args, **more: sheets.append(args[1]) or sheet(*args, **more))
    data.main(data.parse_args(["--output_dir", str(out), "--rescore"]))
    first = (out / "pool" / "prompts.txt").read_text().splitlines()[0]
    pairs = [row for row in data_of(out) if row["caption"] == first]
    expected = [
        (f"{side(row, 'score'):.2f}", mark) for row in pairs for side, mark in ((winner, data.GOOD), (loser, data.BAD))
    ]
    cards = next(cards for cards in sheets if len(cards) == 5)
    marked = [(label, colour) for card in cards for _, label, colour in card.images if colour != data.INK]
    assert marked == expected


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--previous_pairs", "{easy}", "--real_data_dir", "{folder}"], "no such file or folder|cannot|datasets|no"),
        (["--previous_pairs", "{folder}", "--real_data_dir", "{photos}"], "no data/"),
        (["--previous_pairs", "{easy}", "--real_data_dir", "{others}"], "no caption of the photos"),
        (["--previous_pairs", "{easy}", "--real_data_dir", "{photos}", "--resolution", "128"], "of 64x64"),
    ],
)
def test_bad_input_of_the_later_stages(extra, words, curriculum, tmp_path, monkeypatch):
    folder = write_inputs(tmp_path)
    others = folder / "others"
    others.mkdir()
    figures.draw(figures.all_attributes()[0], seed=0).image.save(others / "a.png")
    (others / "a.txt").write_text("nobody knows this one")
    places = {"easy": curriculum / "easy", "photos": curriculum / "photos", "folder": folder, "others": others}
    monkeypatch.setattr(data, "start_processes", lambda: pytest.fail("got as far as loading"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    filled = [str(one).format(**places) for one in extra]
    size = ["--resolution", "64"] if "--resolution" not in filled else []
    with pytest.raises(data.UserError, match=words) as error:
        make(folder, *SHORT, *size, "--stage", "normal", *filled)
    assert "\n" not in str(error.value)
