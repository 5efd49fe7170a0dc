# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: its method as laws and values, a finished data set as others read it, bad input."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import DDPMScheduler
from PIL import Image
from train_helpers import PIPELINE, flags

import make_preference_data as data
import train_dpo_human as trainer


SMALL = {"num_images_per_prompt": 4, "num_inference_steps": 4, "draft_steps": 0, "max_prompts": 4, "batch_size": 8}
LATER = SMALL | dict.fromkeys(("num_images_per_prompt", "draft_steps", "max_prompts"), False)  # they belong to easy
PROMPTS, PICKSCORE = data.WORLD / "prompts_train.txt", f"pickscore={data.WORLD / 'scorer'}"
CAPTIONS, NAN = PROMPTS.read_text().splitlines()[:6], np.nan


def make(out: Path, **settings) -> Path:
    """A short run on the embedded world; False leaves a flag out."""
    data.main(data.parse_args(flags({"output_dir": out} | (LATER if "stage" in settings else SMALL) | settings)))
    return out


def rows_in(out: Path, pattern: str) -> list[dict]:
    """By caption and number, where a row has them; else as they lie there."""
    rows = [row for file in sorted(out.glob(pattern)) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row.get("caption", ""), row.get("index", 0)))


def pool_of(out: Path, kind: str = "full") -> dict[str, dict]:
    return {row["image_id"]: row for row in rows_in(out, f"pool/{kind}-*/*.parquet")}


def scores_of(out: Path, label: str = "pickscore") -> dict[str, float]:
    return {row["image_id"]: row["score"] for row in rows_in(out, f"scores/{label}-*/*.parquet")}


def pairs_of(out: Path, split: str = "*") -> list[dict]:
    return rows_in(out, f"data/{split}-*.parquet")


def record_of(out: Path) -> dict:
    return json.loads((out / "preference_data.json").read_text(), parse_constant=pytest.fail)


def sides(row: dict, name: str) -> list:
    """The winner's and the loser's value, as diffusers' script tells them apart."""
    return [row[f"{name}_1"], row[f"{name}_0"]] if row["label_0"] == 0 else [row[f"{name}_0"], row[f"{name}_1"]]


def picture(jpg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB"), dtype=int)


def test_seeds_and_lots_are_what_they_have_always_been():
    assert (data.image_seed(0, "a person", 3), data.image_seed(7, "für 犬", 0)) == (95115845582429, 215263602360254)
    assert data.unit_hash(0, "a person", "side") == pytest.approx(0.06570354071191531, abs=1e-15)
    prompts = [str(i) for i in range(100)]
    chosen = data.hold_out_prompts(prompts, 0.1, 0)
    assert chosen == data.hold_out_prompts(prompts[::-1], 0.1, 0) != data.hold_out_prompts(prompts, 0.1, 1)
    sizes = {(99, 0.1): 10, (9, 0): 0, (2, 0.1): 1, (4, 0.99): 3, (1, 0.5): 0}
    assert {key: len(data.hold_out_prompts(prompts[: key[0]], key[1], 0)) for key in sizes} == sizes


def test_finalists_and_pairs_of_scores_where_nan_is_on_neither_side():
    few, worse, lost = "less than two images with a score", "worse than the previous winner", "no image with a score"
    for scores, n, chosen in [
        ([3, 1, 2, 4], 1, [1, 3]), ([3, NAN, 4, 3.5], 1, [0, 2]), ([3, 1, 2, 4, 0], 2, [0, 1, 3, 4]),
        ([1, 2], 2, [0, 1]), ([2, 2, 2], 1, [0, 2]), ([NAN, 5], 2, [1]), ([NAN], 1, []),
    ]:  # fmt: skip
        assert data.finalists(np.array(scores, np.float32), n) == chosen
    for scores, pair, why in [([1, 3, 2], (1, 0), "kept"), ([NAN, 3, 2, NAN], (1, 2), "kept"), ([NAN, NAN], None, few),
                              ([NAN, 7], None, few), ([2, 2, NAN, 2], None, "all scores equal")]:  # fmt: skip
        assert data.best_and_worst(np.array(scores, float)) == (pair, why)
    for scores, must_win, pair, why in [
        ([5, 3, 6], True, (2, 0), "kept"), ([5, 3, 5], True, (2, 0), "kept"), ([5, 3, 4], True, None, worse),
        ([5, 3, 4], False, (2, 0), "kept"), ([5, NAN, 4], False, (2, 0), "kept"), ([5, NAN], False, None, lost),
        ([NAN, 3, 4], False, None, "the previous winner has no score"),
    ]:  # fmt: skip
        assert data.best_against_previous(np.array(scores, float), 0, must_win) == (pair, why)


def test_an_ensemble_votes_in_units_of_each_scorers_spread_within_a_prompt():
    a, b = np.random.default_rng(0).normal(size=(2, 50, 8))
    spread = b.var(axis=1, ddof=1).mean() ** 0.5
    assert (data.pooled_spread(b), data.pooled_spread([np.array([NAN, 4])])) == (pytest.approx(spread), 0)
    assert data.pooled_spread([np.array([1, 3, NAN]), np.array([5.0, 9.0]), np.array([4.0])]) == 5**0.5

    def vote(a: np.ndarray, b: np.ndarray, *weights: float) -> np.ndarray:
        spreads = {"a": data.pooled_spread(a), "b": data.pooled_spread(b)}
        return data.ensemble({"a": a, "b": b}, dict(zip("ab", weights, strict=True)), spreads)

    harder = 1000 * a + np.linspace(-100, 100, 50)[:, None]  # another scale, and prompts of which all images score low
    total, scaled = vote(a, b, 1, 1), vote(harder, b, 1, 1)
    np.testing.assert_allclose(*(x - x.mean(axis=1, keepdims=True) for x in (total, scaled)), atol=1e-9)
    np.testing.assert_allclose(vote(a, b, 2, 0), 2 * a)  # one voter keeps its units
    np.testing.assert_allclose(total - vote(a, b, 1, 0.5), 0.5 * b / spread)
    assert np.isfinite(vote(a, np.zeros_like(a), 1, 1)).all()  # a scorer that cannot tell images apart
    b[3, 5] = NAN
    assert [np.argwhere(np.isnan(vote(a, b, 1, weight))).tolist() for weight in (0, 1)] == [[[3, 5]]] * 2


def test_sd_recon_starts_at_one_signal_to_noise_ratio_in_every_family():
    strides = {(400, 50): list(range(400, 0, -20)), (100, 6): [100], (1, 50): [1], (300, 10): [300, 200, 100]}
    assert {key: data.sd_recon_timesteps(*key) for key in strides} == strides
    alpha_bar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    for t in (1, 100, 400, 700, 999):
        start, *rest = data.sd_recon_sigmas(t, [1.0, 0.75, 0.5, 0.25, 0.1, 0.0])
        assert ((1 - start) / start) ** 2 == pytest.approx((alpha_bar[t] / (1 - alpha_bar[t])).item(), rel=1e-4)
        assert rest == [sigma for sigma in (1.0, 0.75, 0.5, 0.25, 0.1) if sigma < start]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, not to be changed: its folder, what it printed, and the cells of its pictures."""
    grids, draw, printed = {}, data.draw_grid, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        patch.setattr(data, "draw_grid", lambda path, *args: grids.update({path.name: args[1]}) or draw(path, *args))
        patch.setattr(data, "IMAGES_IN_A_PART", 8)
        out = make(tmp_path_factory.mktemp("finished") / "out", max_prompts=6, export=["folders", "flow-factory"])
    return out, printed.getvalue(), grids


def test_datasets_and_diffusers_read_it_as_pick_a_pic(finished, tmp_path, monkeypatch):
    """load_dataset(folder) follows the card to data/ alone; a row is decoded as train_diffusion_dpo.py does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    read, held_out = datasets.load_dataset(str(finished[0])), data.hold_out_prompts(CAPTIONS, 0.1, 0)
    assert set(read["validation"]["caption"]) == held_out == set(CAPTIONS) - set(read["train"]["caption"])
    kinds = [read["train"].features[name].dtype for name in ("jpg_0", "jpg_1", "label_0", "label_1", "caption")]
    assert kinds == ["binary", "binary", "float64", "float64", "string"]
    for row in [*read["train"], *read["validation"]]:
        images = [Image.open(io.BytesIO(row[f"jpg_{side}"])) for side in (0, 1)]
        assert images[0].size == images[1].size == (64, 64)
        assert images[0].quantization == images[1].quantization
        assert images[0].layer == images[1].layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # 4:4:4
        assert row["label_0"] == 1 - row["label_1"] == (data.unit_hash(0, row["caption"], "side") < 0.5)


def test_a_pair_is_the_pools_best_and_worst_by_the_stored_scores(finished):
    pool, scores = pool_of(finished[0]), scores_of(finished[0])
    assert len(pool) == len(scores) == 24
    assert all(row["seed"] == data.image_seed(0, row["caption"], row["index"]) for row in pool.values())
    for pair in pairs_of(finished[0]):
        own = sorted((name for name in pool if pool[name]["caption"] == pair["caption"]), key=scores.get)
        assert sides(pair, "score") == [scores[own[-1]], scores[own[0]]]
        assert pair["margin"] == pytest.approx(scores[own[-1]] - scores[own[0]], rel=1e-6)
        for name in ("image_id", "jpg", "seed", "source", "latents"):
            assert sides(pair, name) == [pool[own[-1]][name], pool[own[0]][name]]
        assert json.loads(pair["scores"]) == {"pickscore": [pair["score_0"], pair["score_1"]]}


def test_record_card_pictures_and_last_line(finished):
    (out, printed, grids), record, pairs = finished, record_of(finished[0]), pairs_of(finished[0])
    assert (record["pairs"], record["prompts"], record["dropped"]) == ({"train": 5, "validation": 1}, 6, {})
    ranks = np.percentile([pair["margin"] for pair in pairs], [0, 10, 50, 90, 100])
    assert list(record["margin"].values()) == pytest.approx(ranks.tolist())
    assert "5 train pairs and 1 validation pair. Each is the best and the" in (out / "README.md").read_text()
    for name, size in {"pairs.png": (1254, 594), "pool.png": (836, 286), "margins.png": (1100, 396)}.items():
        assert Image.open(out / name).size == pytest.approx(size, abs=2)
    jpgs = [jpg for jpg, *_ in grids["pairs.png"]]
    pairs.sort(key=lambda pair: CAPTIONS.index(pair["caption"]))
    assert [jpgs[i::6] for i in range(6)] == [sides(pair, "jpg") for pair in pairs]  # winners above losers
    scores = [-float(label) for _, label, *_ in grids["pool.png"]]
    assert (len(scores), scores) == (4, sorted(scores))
    assert printed.splitlines()[-1].endswith(f"python train_dpo_human.py --train_data_dir {out}")


def test_exports_are_read_by_the_rules_of_other_trainers(finished):
    """sd-scripts globs w/* and reads captions beside; OneTrainer and SimpleTuner take the parallel w/ and l/;
    Flow-Factory refuses unknown keys, and reads paths from its folder and test prompts line by line."""
    for split in data.SPLITS:
        folder = finished[0] / "export-folders" / split
        pairs = {pair["caption"]: sides(pair, "jpg") for pair in pairs_of(finished[0], split)}
        assert len(list(folder.rglob("*.*"))) == 6 * len(pairs) == 6 * len(list(folder.glob("w/*.jpg")))
        for row in trainer.rows_of_folders(folder):
            both = [Path(row["chosen"]), folder / "l" / Path(row["chosen"]).name]
            (caption,) = {one.with_suffix(suffix).read_text() for one in both for suffix in (".txt", ".caption")}
            assert (caption, str(both[1])) == (row["prompt"], row["rejected"])
            assert [one.read_bytes() for one in both] == pairs.pop(caption)
    folder, pairs = finished[0] / "export-flow-factory", pairs_of(finished[0], "train")
    assert (folder / "test.txt").read_text().splitlines() == [caption]  # of the split that came last
    rows = {row["input"].pop("prompt"): row for row in map(json.loads, (folder / "train.jsonl").open())}
    for pair in pairs:
        both = [rows[pair["caption"]]["supervision"].pop(side) for side in ("chosen", "rejected")]
        assert [(folder / one["media"][0].pop("path")).read_bytes() for one in both] == sides(pair, "jpg")
        assert both == [{"media": [{"type": "image"}]}] * 2
    rest = {"schema_version": 2, "input": {"media": []}, "supervision": {"type": "preference"}}
    assert list(rows.values()) == [rest] * 5


NORMAL = {"stage": "normal", "real_data_dir": "{place}/photos", "previous_pairs": "{out}"}
OTHER = {"prompts": PROMPTS, "scorer": PICKSCORE}
FLAGS = [
    ({"num_images_per_prompt": 1}, "at least 2"), ({"guidance_scale": "nan"}, "at least 0"), ({"num_im": 4}, "unrec"),
    ({"draft_steps": 4}, "below --num_inf"), ({"draft_steps": 1, "finalists": 3}, "than --num_images_per_"),
    ({"finalists": 3}, "needs drafts"), ({"min_margin": "100%"}, "give a number"), ({"lora_scale": 2}, "needs --lora"),
    ({"real_data_dir": "{place}"}, "belongs to --stage normal"), (NORMAL | {"output_dir": "{out}"}, "of its own"),
    ({"stage": "hard", "real_data_dir": "x"}, "needs --previous_"), (NORMAL | {"draft_steps": 2}, "to --stage easy"),
    (NORMAL | {"sampler": "pipeline"}, "told timesteps"), (NORMAL | {"sdrecon_timesteps": [9, 9]}, "one twice"),
]  # fmt: skip
NAMED = [
    (NORMAL | {"previous_pairs": "{place}"}, "no data/*.parquet"), (NORMAL | {"resolution": 128}, "of one size"),
    (NORMAL | {"real_data_dir": "{place}/flux"}, "no caption of"), (OTHER | {"model": "none"}, "cannot load"),
    (OTHER | {"model": "{place}/flux"}, "is a FluxPipeline"), (OTHER | {"model": "{place}/fp16"}, "--variant fp16"),
    (OTHER | {"model": "{place}/edm"}, "EDMEulerScheduler"), ({"lora": "no.safetensors"}, "cannot load the LoRA"),
    ({"resolution": 60}, "multiples of 8"), ({"num_inference_steps": 1001}, "has 1000 timesteps"),
    ({"prompts": "none.txt"}, "none.txt"), ({"scorer": f"{PICKSCORE},weight=0"}, "has to vote"),
    ({"output_dir": "{place}/photos/a.txt"}, "cannot write"), ({"scorer": [PICKSCORE] * 2}, "are called pickscore"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), FLAGS + NAMED)
def test_bad_input_is_told_before_anything_is_drawn(settings, words, finished, tmp_path, capsys, monkeypatch):
    for name, caption in (("photos", CAPTIONS[0]), ("flux", "nobody")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text(caption)
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    if (model := tmp_path / Path(settings.get("model", "none")).name).name in ("fp16", "edm"):
        index = shutil.copytree(PIPELINE, model) / "model_index.json"
        index.write_text(index.read_text().replace("DPMSolverMultistepScheduler", "EDMEulerScheduler"))
        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".fp16.safetensors" if model.name == "fp16" else file.suffix))
    monkeypatch.setattr(data, "draw_part", lambda *args, **more: pytest.fail("got as far as drawing"))
    command = flags({"output_dir": tmp_path / "out"} | (LATER if "stage" in settings else SMALL) | settings)
    with pytest.raises(SystemExit) as stop:
        data.cli([word.format(place=tmp_path, out=finished[0]) for word in command])
    is_flag, end = (settings, words) in FLAGS, stop.value.code
    assert end == 2 if is_flag else end.startswith("make_preference_data.py: ") and "\n" not in end
    assert words in (capsys.readouterr().err.strip().splitlines()[-1] if is_flag else end)


def test_pickscore_is_the_embedded_worlds_own():
    args = data.parse_args(["--scorer", "pickscore,weight=2", "clip", "--agree", "pickscore"])
    assert (args.scorer, args.agree) == ([f"{PICKSCORE},weight=2", "clip"], [PICKSCORE])
