# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: its laws as values, its runs on the embedded world, its answers to bad input."""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import make_preference_data as data


WORLD = data.WORLD
SCORER = f"pickscore={WORLD / 'scorer'}"
CAPTIONS = [line for line in (WORLD / "prompts_train.txt").read_text().splitlines() if line][:6]
NAN, INF = math.nan, math.inf
LATER = ["--stage", "normal", "--real_data_dir", "{folder}", "--previous_pairs", "{folder}"]

PLUGIN = """
def redness(device):
    return lambda images, prompts: [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]

def veto_all(device):
    return lambda images, prompts: [-float("inf")] * len(images)

def veto_half(device):
    return lambda images, prompts: [-float("inf") if i % 2 else 1.0 for i in range(len(images))]

def constant(device):
    return lambda images, prompts: [1.0] * len(images)

def too_few(device):
    return lambda images, prompts: [1.0]
"""


def flags(folder: Path, *extra: object) -> list[str]:
    """A short run on the embedded world; a later flag wins."""
    short = ["--num_images_per_prompt", 4, "--num_inference_steps", 2, "--batch_size", 5]
    return [
        str(flag) for flag in ["--output_dir", folder / "out", "--prompts", folder / "prompts.txt", *short, *extra]
    ]


def make(folder: Path, *extra: object) -> Path:
    data.main(data.parse_args(flags(folder, *extra)))
    return folder / "out"


def write_inputs(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("\n".join([CAPTIONS[0], "", *CAPTIONS, "   "]))
    (folder / "plugin.py").write_text(PLUGIN)
    return folder


def rows_of(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / "data" / f"{split}-00000-of-00001.parquet").to_pylist()


def read_image(jpg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpg)).convert("RGB")  # as diffusers' train_diffusion_dpo.py does


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


@pytest.fixture(scope="module")
def pipe():
    data.quiet_libraries()
    args = data.parse_args(["--output_dir", "unused"])
    return data.load_pipeline(args, torch.device("cpu"))


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Six prompts (with a blank line and a repeated one), a plug-in, and shards of two prompts."""
    monkeypatch.setattr(data, "SHARD_IMAGES", 8)
    return write_inputs(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, not to be changed; what it printed lies beside it."""
    folder = write_inputs(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(data, "SHARD_IMAGES", 8)
        out = make(folder)
    (folder / "printed.txt").write_text(printed.getvalue())
    return out


# ---- The method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "pair", "reason"),
    [
        ([1.0, 3.0, 2.0], (1, 0), "kept"),
        ([NAN, 3.0, 2.0, NAN], (1, 2), "kept"),
        ([1.0, -INF, 2.0], (2, 1), "kept"),
        ([5.0, -INF], (0, 1), "kept"),
        ([-INF, -INF], None, "no image with a finite score"),
        ([NAN, -INF, INF], None, "no image with a finite score"),
        ([NAN, NAN], None, "no image with a finite score"),
        ([INF, 1.0, NAN], None, "only one image with a score"),
        ([2.0, 2.0, 2.0], None, "all scores equal"),
    ],
)
def test_best_and_worst(scores, pair, reason):
    assert data.best_and_worst(scores) == (pair, reason)


def test_best_and_worst_follow_a_permutation():
    scores = np.random.default_rng(0).normal(size=20)
    order = np.random.default_rng(1).permutation(20)
    (winner, loser), _ = data.best_and_worst(scores)
    (moved_winner, moved_loser), _ = data.best_and_worst(scores[order])
    assert (order[moved_winner], order[moved_loser]) == (winner, loser)
    assert (winner, loser) == (scores.argmax(), scores.argmin())


@pytest.mark.parametrize(
    ("scores", "must_win", "pair", "reason"),
    [
        ([5.0, 3.0, 6.0], True, (2, 0), "kept"),
        ([5.0, 3.0, 5.0], True, (2, 0), "kept"),
        ([5.0, 3.0, 4.0], True, None, "worse than the previous winner"),
        ([5.0, 3.0, 4.0], False, (2, 0), "kept"),
        ([-INF, 3.0, -INF], True, (1, 0), "kept"),
        ([5.0, -INF, NAN], False, None, "no image with a finite score"),
        ([NAN, 3.0, 4.0], False, None, "the previous winner has no score"),
    ],
)
def test_best_against_previous(scores, must_win, pair, reason):
    assert data.best_against_previous(scores, 0, must_win) == (pair, reason)


@pytest.mark.parametrize(
    ("scores", "per_side", "chosen"),
    [
        ([3.0, 1.0, 2.0, 4.0], 1, [1, 3]),
        ([3.0, 1.0, 2.0, 4.0, 0.0], 2, [0, 1, 3, 4]),
        ([3.0, NAN, INF, 4.0, 3.5], 1, [0, 3]),
        ([3.0, -INF, 2.0], 1, [0, 1]),
        ([-INF, -INF, NAN], 1, [0]),
        ([1.0, 2.0], 2, [0, 1]),
        ([NAN, NAN], 1, []),
        ([2.0, 2.0, 2.0], 1, [0, 2]),
    ],
)
def test_finalists(scores, per_side, chosen):
    assert data.finalists(scores, per_side) == chosen


@pytest.mark.parametrize(
    ("spec", "least"), [(None, -INF), ("1.5", 1.5), ("-2", -2.0), ("25%", 1.0), ("50%", 2.0), ("0%", 0.0)]
)
def test_least_margin(spec, least):
    assert data.least_margin(spec, [3.0, 0.0, INF, 1.0, 2.0]) == least


def test_ensemble_is_in_units_of_the_spread_within_a_prompt():
    a, b = np.random.default_rng(0).normal(size=(2, 50, 8))
    prompt_difficulty = np.linspace(-100, 100, 50)[:, None]

    def vote(a: np.ndarray, b: np.ndarray, weights: dict[str, float]) -> np.ndarray:
        return data.ensemble({"a": a, "b": b}, weights, {"a": data.pooled_spread(a), "b": data.pooled_spread(b)})

    total, scaled = (vote(x, b, {"a": 1.0, "b": 1.0}) for x in (a, 1000 * a + prompt_difficulty))
    centred = [x - x.mean(axis=1, keepdims=True) for x in (total, scaled)]
    np.testing.assert_allclose(*centred, atol=1e-9)
    np.testing.assert_allclose(vote(a, b, {"a": 2.0, "b": 0.0}), 2 * a)  # one voter keeps its own units
    half, spread = vote(a, b, {"a": 1.0, "b": 0.5}), math.sqrt(b.var(axis=1, ddof=1).mean())
    assert data.pooled_spread(b) == pytest.approx(spread)
    np.testing.assert_allclose(total - half, 0.5 * b / spread)


def test_the_spread_passes_over_what_is_not_finite():
    assert data.pooled_spread([np.array([1.0, 3.0, NAN]), np.array([-INF, 5.0, 9.0]), np.array([4.0])]) == math.sqrt(5)
    assert data.pooled_spread([np.array([NAN, 4.0])]) == 0.0


def test_ensemble_keeps_vetoes_and_gaps():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, -INF, NAN, INF])
    for weight in (0.0, 1.0):
        total = data.ensemble({"a": a, "b": b}, {"a": 1.0, "b": weight}, {"a": 1.0, "b": 1.0})
        assert np.isfinite(total[0])
        assert total[1] == -INF
        assert np.isnan(total[2:]).all()


def test_image_seed_is_a_fixed_function():
    assert data.image_seed(0, "a person", 3) == data.image_seed(0, "a person", 3) < 2**48
    others = {
        data.image_seed(*key) for key in [(0, "a person", 3), (1, "a person", 3), (0, "a", 3), (0, "a person", 4)]
    }
    assert len(others) == 4


def test_validation_share():
    captions = [str(i) for i in range(100)]
    chosen = data.choose_validation(captions, 0.1, 0)
    assert len(chosen) == 10
    assert chosen == data.choose_validation(captions[::-1], 0.1, 0) != data.choose_validation(captions, 0.1, 1)
    assert data.choose_validation(captions, 0.0, 0) == set()
    assert len(data.choose_validation(captions[:2], 0.1, 0)) == 1


# ---- Sampling -------------------------------------------------------------------------------------------------------


def test_an_image_is_a_function_of_model_prompt_and_seed(pipe):
    embeds = data.encode_prompts(pipe, CAPTIONS, "")
    rows, seeds = [0, 1, 2, 3, 4], [11, 12, 13, 14, 15]
    together, latents = data.sample(pipe, embeds, rows, seeds, 3, 3.0)
    reversed_order, _ = data.sample(pipe, embeds, rows[::-1], seeds[::-1], 3, 3.0)
    for i in range(5):
        one = data.encode_prompts(pipe, [CAPTIONS[i]], "")
        alone, alone_latents = data.sample(pipe, one, [0], [seeds[i]], 3, 3.0)
        assert difference(alone[0], together[i]).max() <= 2
        assert difference(alone[0], reversed_order[4 - i]).max() <= 2
        torch.testing.assert_close(alone_latents[0], latents[i], atol=0.02, rtol=0.01)
    assert difference(together[0], together[1]).max() > 2
    other_seed, _ = data.sample(pipe, embeds, [0], [99], 3, 3.0)
    assert difference(other_seed[0], together[0]).max() > 2


def test_a_negative_prompt_and_the_sampler_count(pipe):
    images = [
        data.sample(pipe, data.encode_prompts(pipe, CAPTIONS[:1], negative), [0], [1], 3, scale)[0][0]
        for negative, scale in [("", 3.0), ("a blue background", 3.0), ("", 1.0)]
    ]
    assert difference(images[0], images[1]).max() > 0
    assert difference(images[0], images[2]).max() > 0


# ---- The data set ---------------------------------------------------------------------------------------------------


def test_datasets_reads_it_as_pick_a_pic(finished, tmp_path):
    read = datasets.load_dataset(str(finished), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in read.items()} == {"train": 5, "validation": 1}
    features = read["train"].features
    assert [features[f"jpg_{side}"] for side in (0, 1)] == [datasets.Value("binary")] * 2
    assert [features[f"label_{side}"] for side in (0, 1)] == [datasets.Value("float64")] * 2
    assert features["caption"] == datasets.Value("string")
    for row in read["train"]:
        images = [read_image(row[f"jpg_{side}"]) for side in (0, 1)]
        assert [image.size for image in images] == [(64, 64)] * 2
        assert sorted([row["label_0"], row["label_1"]]) == [0.0, 1.0]
        winner = int(row["label_1"])
        gap = row[f"score_{winner}"] - row[f"score_{1 - winner}"]
        assert gap == pytest.approx(row["margin"])
        assert gap > 0
        assert json.loads(row["scores"])["pickscore"] == [row["score_0"], row["score_1"]]
        assert (row["stage"], row["source_0"], row["num_candidates"]) == ("easy", "generated", 4)


def test_pairs_are_the_pools_best_and_worst(finished):
    pool = [row for shard in sorted(finished.glob("pool/*.parquet")) for row in pq.read_table(shard).to_pylist()]
    assert [row["caption"] for row in pool[::4]] == CAPTIONS
    assert all(row["seed"] == data.image_seed(0, row["caption"], row["index"]) for row in pool)
    for pair in rows_of(finished, "train") + rows_of(finished, "validation"):
        scores = {r["seed"]: json.loads(r["scores"])[SCORER] for r in pool if r["caption"] == pair["caption"]}
        winner = int(pair["label_1"])
        assert pair[f"seed_{winner}"] == max(scores, key=scores.get)
        assert pair[f"seed_{1 - winner}"] == min(scores, key=scores.get)


def test_latents_decode_to_the_picture(finished, pipe):
    facts = json.loads((finished / "preference_data.json").read_text())["latents"]
    assert facts["vae_hash"] == data.weights_hash(pipe.vae)
    row = rows_of(finished, "train")[0]
    for side in (0, 1):
        latents = np.frombuffer(row[f"latents_{side}"], dtype=facts["dtype"]).reshape(facts["shape"]).copy()
        (image,), _ = data.decode(pipe, torch.from_numpy(latents)[None])
        own, other = (difference(image, read_image(row[f"jpg_{k}"])).mean() for k in (side, 1 - side))
        assert own < 4  # what JPEG loses
        assert other > 2 * own


def test_the_winners_side_is_a_seeded_coin_and_both_sides_are_alike(finished):
    coins = [data.unit_hash(0, str(i), "side") < 0.5 for i in range(1000)]
    assert 430 < sum(coins) < 570
    rows = rows_of(finished, "train") + rows_of(finished, "validation")
    for row in rows:
        assert (row["label_0"] == 1.0) == (data.unit_hash(0, row["caption"], "side") < 0.5)
        sides = [Image.open(io.BytesIO(row[f"jpg_{side}"])) for side in (0, 1)]
        assert sides[0].quantization == sides[1].quantization
        assert sides[0].layer == sides[1].layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # 4:4:4
    assert {row["label_0"] for row in rows} == {0.0, 1.0}


def test_pictures_and_summary(finished):
    with Image.open(finished / "pairs.png") as pairs, Image.open(finished / "pool.png") as pool:
        assert pairs.width > pairs.height / 3
        assert pool.width > pool.height
        assert {(18, 128, 74), (179, 38, 30)} <= {colour for _, colour in pairs.getcolors(2**24)}
    printed = (finished.parent / "printed.txt").read_text()
    assert "6 of 6 prompts" in printed
    assert "2 blank lines and 1 repeated" in printed
    last = printed.strip().splitlines()[-1]
    assert f"accelerate launch train_dpo_human.py --train_data_dir {finished}" in last
    assert "--pretrained_model_name_or_path" not in last


def test_long_prompts_are_counted(inputs, capsys):
    (inputs / "prompts.txt").write_text("a person " * 40 + "\n" + CAPTIONS[0])
    out = make(inputs, "--num_inference_steps", 1, "--no_latents", "--validation_share", 0)
    assert "1 prompts have more tokens" in capsys.readouterr().out
    assert json.loads((out / "preference_data.json").read_text())["long_prompts"] == 1
    assert "latents_0" not in rows_of(out, "train")[0]
    assert not (out / "data" / "validation-00000-of-00001.parquet").exists()
    assert set(datasets.load_dataset(str(out), cache_dir=str(inputs / "cache"))) == {"train"}


def test_size(inputs):
    wide = make(inputs, "--height", 64, "--width", 96, "--max_prompts", 2)
    assert read_image(rows_of(wide, "train")[0]["jpg_0"]).size == (96, 64)
    record = json.loads((wide / "preference_data.json").read_text())
    assert record["image_size"] == [96, 64]
    assert record["latents"]["shape"] == [8, 16, 24]


def test_rescore(inputs, finished):
    out = shutil.copytree(finished, inputs / "out")
    pool = {path.name: pq.read_table(path, columns=["seed", "jpg"]) for path in out.glob("pool/*.parquet")}
    make(inputs, "--rescore", "--scorer", f"{inputs}/plugin.py:redness")
    for path in out.glob("pool/*.parquet"):
        assert pq.read_table(path, columns=["seed", "jpg"]) == pool[path.name]
        row = pq.read_table(path).to_pylist()[0]
        assert set(json.loads(row["scores"])) == {SCORER, data.parse_scorer(f"{inputs}/plugin.py:redness").source}
    for row in rows_of(out, "train"):
        winner = int(row["label_1"])
        red = [np.asarray(read_image(row[f"jpg_{side}"]))[..., 0].mean() for side in (0, 1)]
        assert red[winner] > red[1 - winner]
    margins = [row["margin"] for row in rows_of(out, "train")]
    keep = sorted(margins)[1]
    make(inputs, "--rescore", "--min_margin", keep)
    assert sorted(row["margin"] for row in rows_of(out, "train")) == sorted(margins)[1:]


def pool_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("pool/*.parquet"))}


def data_of(out: Path) -> list[dict]:
    return [row for _, row in data.iterate_pairs(out)]


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "status", "words"),
    [
        (["--prompts", "no/such/file.txt"], 1, "no/such/file.txt"),
        (["--prompts", "{folder}/empty.txt"], 1, "is empty"),
        (["--prompts", "{folder}/blank.txt"], 1, "only blank lines"),
        (["--pretrained_model_name_or_path", "{folder}/model"], 1, "no such model folder"),
        (["--pretrained_model_name_or_path", "{folder}"], 1, "model_index.json"),
        (["--scorer", "beauty"], 1, "unknown scorer 'beauty'"),
        (["--scorer", "pickscore=no/such/folder"], 1, "no such model folder"),
        (["--scorer", "{folder}/plugin.py:nothing"], 1, "has no function nothing"),
        (["--scorer", "{folder}/none.py:nothing"], 1, "cannot import"),
        (["--scorer", "no_such_module:f"], 1, "cannot import"),
        (["--scorer", "..*clip"], 1, "not a number"),
        (["--scorer", SCORER, SCORER], 1, "two scorers are called pickscore"),
        (["--scorer", "pickscore,colour=red"], 1, "has no option colour"),
        (["--scorer", "vqa"], 1, "needs a model"),
        (["--scorer", "{folder}/none.jsonl"], 1, "no such file"),
        (["--scorer", "{folder}/bad.jsonl"], 1, "bad.jsonl, line 2"),
        (["--agree", "beauty"], 1, "unknown scorer 'beauty'"),
        (["--agree", SCORER], 1, "two scorers are called pickscore"),
        (["--prompts", "{folder}/bad.csv"], 1, "has no column prompt, caption, text"),
        (["--prompts", "{folder}/bad.csv", "--prompt_column", "colour"], 1, "has no column colour"),
        (["--prompts", "{folder}/bad.jsonl"], 1, "has no column"),
        (["--prompts", "{folder}/latin.txt"], 1, "line 2: not utf-8"),
        (["--caption_model", "a/b"], 1, "needs a folder of photos"),
        (["--write_prompts", "5"], 1, "prompts.txt"),
        (["--write_prompts", "5", "--prompts", "{folder}/plugin.py/new/p.txt"], 1, "cannot make the folder"),
        (["--num_images_per_prompt", "1"], 2, "at least 2"),
        (["--resolution", "60"], 2, "not a multiple of 8"),
        (["--batch_size", "0"], 2, "at least 1"),
        (["--max_prompts", "0"], 2, "at least 1"),
        (["--finalists", "0"], 2, "at least 1"),
        (["--seed", "-1"], 2, "at least 0"),
        (["--guidance_scale", "nan"], 2, "finite"),
        (["--refine"], 2, "belongs to --rescore"),
        (["--scorer", "0*pickscore"], 1, "has to vote"),
        ([*LATER, "--output_dir", "{folder}"], 2, "a folder of its own"),
        (["--draft_steps", "2"], 2, "below --num_inference_steps 2"),
        (["--draft_steps", "-1"], 2, "at least 0"),
        (["--draft_steps", "1", "--finalists", "3"], 2, "more than --num_images_per_prompt"),
        (["--validation_share", "1"], 2, "below 1"),
        (["--min_margin", "much"], 2, "give a number"),
        (["--min_margin", "100%"], 2, "give a number"),
        (["--min_margin", "nan"], 2, "give a number"),
        (["--stage", "normal"], 2, "needs --real_data_dir"),
        (["--stage", "hard", "--real_data_dir", "{folder}"], 2, "needs --previous_pairs"),
        (["--real_data_dir", "{folder}"], 2, "belongs to --stage normal and hard"),
        ([*LATER, "--sampler", "pipeline"], 2, "needs --sampler dpmsolver"),
        ([*LATER, "--draft_steps", "1"], 2, "belongs to --stage easy"),
        ([*LATER, "--validation_share", "0.5"], 2, "belongs to --stage easy"),
        ([*LATER, "--sdrecon_timesteps", "1000"], 2, "between 0 and 1000"),
        ([*LATER, "--sdrecon_timesteps", "400", "400"], 2, "one twice"),
        (["--rescore", "--output_dir", "{folder}"], 1, "preference_data.json"),
        (["--export", "webdataset"], 2, "invalid choice"),
        (["--num_images", "4"], 2, "unrecognized arguments"),
    ],
)
def test_bad_input(extra, status, words, inputs, capsys, monkeypatch):
    (inputs / "empty.txt").write_text("")
    (inputs / "blank.txt").write_text(" \n\n\t\n")
    (inputs / "bad.jsonl").write_text('{"image_id": "a", "score": 1}\n{"image_id": "b"}\n')
    (inputs / "bad.csv").write_text("words,shade\na person,red\n")
    (inputs / "latin.txt").write_bytes("a person\na caf\u00e9\n".encode("latin-1"))
    monkeypatch.setattr(data, "quiet_libraries", lambda: pytest.fail("got as far as loading"))
    with pytest.raises(SystemExit) as stop:
        data.cli(flags(inputs, *[flag.format(folder=inputs) for flag in extra]))
    if status == 1:
        message = stop.value.code
        assert message.startswith("make_preference_data.py: ")
        assert "\n" not in message
    else:
        assert stop.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
    assert not (inputs / "out").exists()


def test_write_prompts_says_what_it_lacks(capsys):
    with pytest.raises(SystemExit) as stop:
        data.parse_args(["--write_prompts", "5"])
    assert stop.value.code == 2
    assert "--write_prompts: set --prompts to the file" in capsys.readouterr().err


def test_more_steps_than_the_model_has_are_refused_before_anything_is_drawn(inputs):
    with pytest.raises(data.UserError, match="--num_inference_steps 1001: the model has 1000 timesteps"):
        make(inputs, "--num_inference_steps", 1001, "--draft_steps", 0)


def test_what_is_known_of_the_folder_is_told_before_photos_are_captioned(finished, inputs, monkeypatch):
    monkeypatch.setattr(data, "caption_photos", lambda args: pytest.fail("captioned"))
    with pytest.raises(data.UserError, match="seed was 0, now 1"):
        make(inputs, "--output_dir", finished, "--seed", 1, "--caption_model", "a/b")
    with pytest.raises(data.UserError, match="no such model folder"):
        make(inputs, "--pretrained_model_name_or_path", inputs / "none", "--caption_model", "a/b")


def test_damaged_files_are_named(finished, inputs):
    out = shutil.copytree(finished, inputs / "out")
    shard = out / "pool" / "images-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.UserError, match=r"cannot read .*images-00001\.parquet: .*; delete it, and") as error:
        make(inputs)
    assert "\n" not in str(error.value)
    shard.unlink()
    make(inputs)
    assert shard.read_bytes() == whole
    (out / "preference_data.json").write_text('{"settings": ')
    with pytest.raises(data.UserError, match=r"preference_data\.json is damaged"):
        make(inputs)


def test_a_reader_that_leaves_is_no_error(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        data.tell("nobody", "reads", "this")
        data.tell("nor this")


def test_no_model_and_no_world(inputs, monkeypatch, capsys):
    monkeypatch.setattr(data, "WORLD", inputs)
    with pytest.raises(SystemExit) as stop:
        data.parse_args([])
    assert stop.value.code == 2
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("function", "words"),
    [("veto_all", "2 no image with a finite score"), ("constant", "2 all scores equal"), ("too_few", "gave 1 scores")],
)
def test_no_pairs(function, words, inputs):
    with pytest.raises(data.UserError, match=words):
        make(inputs, "--scorer", f"{inputs}/plugin.py:{function}", "--num_inference_steps", 1, "--max_prompts", 2)
    assert not list(inputs.glob("out/data/*"))


def test_a_record_with_infinite_margins_is_json(inputs, capsys):
    small = ["--num_inference_steps", 1, "--max_prompts", 2, "--batch_size", 4]
    out = make(inputs, *small, "--scorer", SCORER, f"0*{inputs}/plugin.py:veto_half")
    assert {row["margin"] for row in data_of(out)} == {INF}
    text = (out / "preference_data.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert set(record["gap"].values()) == {None}
    assert "score gap  median none" in capsys.readouterr().out


def test_the_gap_is_of_the_finite_margins():
    assert data.summarise_margins(np.array([4.0, INF, 1.0, 2.0, 3.0]))["median"] == 2.5
    assert data.summarise_margins(np.array([1.0, 2.0]))["most"] == 2.0


def test_other_folders_are_refused(finished, inputs):
    (inputs / "out").mkdir()
    (inputs / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(data.UserError, match="choose another --output_dir"):
        make(inputs, "--overwrite")
    assert (inputs / "out" / "thesis.txt").read_text() == "mine"
    content = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    ours = ["--output_dir", finished]
    with pytest.raises(data.UserError, match="seed was 0, now 1"):
        make(inputs, *ours, "--seed", 1)
    with pytest.raises(data.UserError, match=r"guidance_scale was [\d.]+, now 7\.0.*--overwrite it$"):
        make(inputs, *ours, "--guidance_scale", 7)
    with pytest.raises(data.UserError, match=r"min_margin was None, now 0\.5.*--rescore"):
        make(inputs, *ours, "--min_margin", 0.5)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == content


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_model_trained_anew_is_not_mixed_with_the_old_one(part, inputs):
    model = shutil.copytree(WORLD / "pipeline", inputs / "model")
    small = ["--pretrained_model_name_or_path", model, "--num_inference_steps", 1, "--resolution", 64]
    small += ["--scorer", SCORER]
    out = make(inputs, *small)
    record = json.loads((out / "preference_data.json").read_text())
    assert len(record["model_hash"]) == 64
    assert (record["device"], record["precision"]) == ("cpu", "float32")
    weights = next((model / part).glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    tensors[name] += 1
    save_file(tensors, weights)
    make(inputs, *small)  # nothing is drawn
    (out / "pool" / "images-00001.parquet").unlink()
    with pytest.raises(data.UserError, match="weights are not those that drew the images") as error:
        make(inputs, *small)
    assert "\n" not in str(error.value)
    make(inputs, *small, "--overwrite")
    assert json.loads((out / "preference_data.json").read_text())["model_hash"] != record["model_hash"]


def test_overwrite(inputs):
    small = ["--max_prompts", 2, "--num_inference_steps", 1, "--num_images_per_prompt", 2]
    first = data_of(make(inputs, *small))
    second = data_of(make(inputs, *small, "--seed", 1, "--overwrite"))
    assert len(first) == len(second) == 2
    assert not {row["seed_0"] for row in first} & {row["seed_0"] for row in second}
