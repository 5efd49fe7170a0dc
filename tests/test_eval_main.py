# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: known answers of its statistics and colours, and whole runs on the embedded world with few steps."""

import contextlib
import gc
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_human.figures import ATTRIBUTES, draw

import eval_human as ev


ROOT, NAN = Path(__file__).resolve().parent.parent, math.nan
WORLD = ROOT / "tests" / "tiny_human"
SHIRTS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink")
PROMPTS = [f"a standing person in a {shirt} shirt" for shirt in SHIRTS] + ["veto: an empty street"]
PLUGINS = """
import numpy as np
def brightness(device):
    return lambda images, prompts: [float(np.asarray(image).mean()) for image in images]
def picky(device):
    return lambda images, prompts: [np.nan if "veto" in p else float(np.std(i)) for i, p in zip(images, prompts)]
def corner(device):
    return lambda images, prompts: [np.asarray(image)[0, 0, 0] % 5 for image in images]
def broken(device):
    return lambda images, prompts: [1 / 0 for image in images]
"""


def test_win_rates_of_both_sides_sum_to_one_and_holm_by_hand():
    a, b = np.array([1.0, 2, 3]), np.array([0.0, 1, 2])
    assert [ev.win_rate(a, b), ev.win_rate(a, a), ev.win_rate(b, a)] == [1, 0.5, 0]
    a, b = np.random.default_rng(0).integers(0, 4, (2, 100))
    assert 0.3 < ev.win_rate(a, b) == pytest.approx(1 - ev.win_rate(b, a)) != 0.5
    assert ev.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert ev.holm([0.7, 0.6]) == [1, 1]


def test_sign_test_equals_the_binomial_test_and_its_power_is_told():
    for wins, losses in [*itertools.product(range(9), repeat=2), (130, 170), (0, 40), (900, 1000)]:
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
        assert ev.sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    wins = np.random.default_rng(0).binomial(200, ev.detectable_win_rate(200), 2000)
    assert np.mean([ev.sign_test(count, 200 - count) < 0.05 for count in wins]) == pytest.approx(0.8, abs=0.03)


def test_interval_leaves_a_half_out_exactly_where_the_sign_test_refuses_it():
    small = itertools.product(range(0, 15, 2), (0, 1, 3, 9), range(0, 13, 2))
    for wins, ties, losses in [*small, (59, 30, 41), (62, 3, 38), (7, 500, 0)]:
        low, high = ev.win_interval(wins, ties, losses)
        if not wins + losses:
            assert np.isnan([low, high]).all()
            continue
        assert 0 <= low <= (wins + ties / 2) / (wins + ties + losses) <= high <= 1, (wins, ties, losses)
        assert (low > 0.5 or high < 0.5) == (ev.sign_test(wins, losses) < 0.05), (wins, ties, losses)
        exact = scipy.stats.binomtest(wins, wins + losses).proportion_ci()
        assert ties or (low, high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_interval_with_ties_holds_the_truth_95_percent_of_the_time():
    """Of all outcomes of 20 prompts, weighted by their probability."""
    rows = [(wins, ties, 20 - wins - ties) for wins in range(21) for ties in range(21 - wins)]
    ends = np.array([ev.win_interval(*row) for row in rows])
    for win, tie in itertools.product((0.05, 0.3, 0.6), (0.1, 0.35)):
        holds = ~((ends[:, 0] > win + tie / 2) | (ends[:, 1] < win + tie / 2))
        assert scipy.stats.multinomial.pmf(rows, 20, [win, tie, 1 - win - tie])[holds].sum() >= 0.95


def test_bootstrap_and_jackknife_of_a_mean_are_its_standard_error():
    rows = np.random.default_rng(0).normal(size=400)
    expected = scipy.stats.norm.interval(0.95, rows.mean(), scipy.stats.sem(rows))
    assert ev.bootstrap_interval(np.mean, rows) == pytest.approx(expected, abs=0.01)
    few = rows[:20]
    expected = scipy.stats.t.interval(0.95, 19, few.mean(), scipy.stats.sem(few))
    assert ev.jackknife_interval(np.mean, few) == pytest.approx(expected, rel=1e-3)
    for interval in (ev.bootstrap_interval, ev.jackknife_interval):  # the same rows are drawn, or left out, of both
        assert interval(lambda x, y: (x - y).mean(), rows + 1, rows) == pytest.approx((1, 1))
    assert np.isnan([ev.bootstrap_interval(np.mean, rows[:0]), ev.jackknife_interval(np.mean, rows[:19])]).all()


@pytest.mark.parametrize("truth", [0.0, 0.5])
def test_delta_e_is_0_on_average_for_equal_models_and_its_interval_covers_the_truth(truth):
    rng, found, covered = np.random.default_rng(0), [], 0
    for _ in range(300):
        base = 9 * rng.normal(size=(100, 3))
        labs = base, base + truth * np.array([0.6, 0, 0.8]) + rng.normal(size=(100, 3))
        low, high = ev.jackknife_interval(ev.squared_delta_e, *labs)
        found.append(ev.squared_delta_e(*labs))
        covered += low <= truth**2 <= high
    assert np.mean(found) == pytest.approx(truth**2, abs=3 * np.std(found) / math.sqrt(300))
    assert covered / 300 >= 0.9
    assert ev.squared_delta_e(base, base + np.array([3.0, 4, 0])) == pytest.approx(25)


def test_krippendorff_alpha_of_the_published_examples():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011: examples A and C; then the ends."""
    for alpha, *raters in (
        (0.095, "0100000010", "1110010000"),
        (0.743, "123321412...", "1233224125.3", ".3332342251.", "12332441251."),
        (1, "lrlt", "lrlt"),
        (NAN, "llll", "llll"),  # nothing to tell apart
        (NAN, "lrt..", "...lr"),  # no two raters met
    ):
        kinds = sorted({*"".join(raters)} - {"."})
        counts = np.array([[column.count(kind) for kind in kinds] for column in zip(*raters, strict=True)])
        assert ev.krippendorff_alpha(counts) == pytest.approx(alpha, abs=5e-4, nan_ok=True)


@pytest.mark.parametrize(("rgb", "lab", "hue"), [
    ((255, 255, 255), (100, 0, 0), NAN), ((0, 0, 0), (0, 0, 0), NAN), ((255, 0, 0), (53.24, 80.09, 67.20), 0),
    ((0, 255, 0), (87.73, -86.18, 83.18), 120), ((0, 0, 255), (32.30, 79.19, -107.86), 240),
])  # fmt: skip
def test_colour_of_known_colours(rgb, lab, hue):
    colour = ev.colour_statistics(np.full((8, 8, 3), rgb, dtype=np.uint8))
    assert [colour[key] for key in ("L", "a", "b")] == pytest.approx(lab, abs=0.05)
    assert colour["hue"] == pytest.approx(hue, abs=0.01, nan_ok=True)
    assert colour["chroma"] == pytest.approx(math.hypot(*lab[1:]), abs=0.05)
    exact = {"saturation": float(not math.isnan(hue)), "sharpness": 0, "L_std": 0, "clipped": 1}
    exact |= dict(zip(("red", "green", "blue"), rgb, strict=True))
    assert [colour[key] for key in exact] == pytest.approx([*exact.values()])


def test_hue_goes_around_the_circle_and_other_measures_by_hand():
    assert ev.hue_distance(np.array([350.0, 10, 77, 0]), np.array([10.0, 350, 77, 180])).tolist() == [20, 20, 0, 180]
    assert ev.circular_mean(np.array([350.0, 20, NAN, 90]), np.array([1.0, 1, 1, 0])) == pytest.approx(5)
    assert math.isnan(ev.circular_mean(np.array([NAN])))
    grey = np.zeros((5, 5))
    grey[2, 2] = 9  # its Laplacian is once -36, four times 9, and 0 on average
    assert ev.laplacian_std(grey) == pytest.approx(math.sqrt((36**2 + 4 * 81) / 25))
    half = np.concatenate([np.full((8, 8, 3), grey, dtype=np.uint8) for grey in (128, 255)])
    assert ev.colour_statistics(half)["clipped"] == 0.5
    means, std = np.random.default_rng(0).normal(size=(20, 4)), np.array([1.0, 2, 4, 8])
    assert ev.latent_shift(means, means - 0.5 * std, std) == pytest.approx(0.5)
    assert ev.latent_shift(means, means + np.array([0, 0, 0, 8.0]), std) == pytest.approx(0.25)
    assert ev.diversity(np.tile(means[0], (3, 1))) == 0
    assert ev.diversity(np.diag([1.0, 2, 3])) == pytest.approx(1)
    assert ev.diversity(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(2)
    assert math.isnan(ev.diversity(means[:1]))


def by_prompt(**metrics: tuple[list, list]) -> pd.DataFrame:
    """The table of prompts of base and one model, `tuned`: the values of both sides of each metric."""
    sides = [pd.DataFrame({name: both[side] for name, both in metrics.items()}) for side in (0, 1)]
    return pd.concat(sides, keys=["base", "tuned"], names=["model", "prompt_id"])


def test_results_are_over_the_prompts_of_both_sides_and_holm_leaves_the_headline_out():
    row = ev.compare(pd.Series([1.0, 2, NAN, 100, 4]), pd.Series({4: 4.0, 0: 2, 1: 3, 2: 5, 9: 50}))
    known = {"n": 3, "ties": 1, "base": 7 / 3, "tuned": 3, "p": 0.5, "win_rate": pytest.approx(2.5 / 3)}
    assert {name: row[name] for name in known} == known  # of the prompts that both sides have
    zero, people = [0.0] * 10, ([NAN] * 10, [1.0] * 9 + [0.5])
    pairs = {"lead": (zero, [1.0] * 8 + [-1.0] * 2), "other": (zero, [1.0] * 9 + [-1.0])}
    pairs |= {"part": (zero, [NAN] * 4 + [1.0] * 6), "people": people}
    roles = {"lead": "headline", "other": "held-out", "part": "training", "people": "votes"}
    carried = [{"model": "tuned", "metric": "old", "role": "diversity", "p": 0.04, "n": 10}, {"model": "gone"}]
    found = ev.compare_models(by_prompt(**pairs), roles, carried).set_index("metric")
    assert list(found.index) == [*roles, "old"]
    assert found.p.tolist() == pytest.approx([112 / 2**10, 22 / 2**10, 2 / 2**6, 2 / 2**9, 0.04])
    assert found.p_holm.tolist() == pytest.approx([112 / 2**10, *[3 * 22 / 2**10] * 2, 8 / 2**9, 3 * 22 / 2**10])
    assert found.missing.tolist() == [0, 0, 4, 0, 0]
    assert (found.win_rate["people"], found.ties["people"], found.base["people"]) == (0.95, 1, pytest.approx(0.05))


def test_groups_are_those_of_their_prompts_and_small_ones_are_left_out():
    groups = pd.DataFrame({"place": ["park"] * 8 + ["street"] * 9 + ["home"] * 7, "all": [3] * 24})
    table = by_prompt(lead=([0.0] * 24, [1.0] * 8 + [-1.0] * 9 + [1.0] * 7))
    found = ev.compare_groups(table, groups, "lead").set_index("group")
    assert found.win_rate.to_dict() == {"park": 1, "street": 0, "3": 15 / 24}
    assert found.p_holm.tolist() == pytest.approx(ev.holm([2 / 2**8, 2 / 2**9, ev.sign_test(15, 9)]))


def coloured(**models: dict[str, float]) -> pd.DataFrame:
    """Images of 30 prompts, of odd ones two, with the same noise under every model, moved by what is given."""
    rng, prompt_ids = np.random.default_rng(0), np.repeat(np.arange(30), np.arange(30) % 2 + 1)
    names = [*ev.COLOUR_COLUMNS, "latent_mean_0", "latent_mean_1", "latent_std_0", "latent_std_1"]
    plain = pd.DataFrame({name: rng.normal(50, 5, 45) for name in names} | {"prompt_id": prompt_ids})
    plain["index"] = plain.groupby("prompt_id").cumcount()
    moved = [plain.assign(model=name, **{k: plain[k] + v for k, v in by.items()}) for name, by in models.items()]
    return pd.concat(moved, ignore_index=True)


def test_compare_colour_of_a_known_move():
    move = {"L": 3, "b": 4.0, "hue": 340, "latent_mean_0": 10}
    table = coloured(base={}, tuned=move, **{ev.PHOTOS: {"L": 7}})
    found, own = ev.compare_colour(table).set_index("statistic"), table[table.model == "base"]
    moved = found.difference[["L", "a", "b", "delta_e", "hue", "hue_images"]]
    assert moved.tolist() == pytest.approx([3, 0, 4, 5, 20, 20])
    assert found.loc[["L", "delta_e"], ["low", "high"]].to_numpy() == pytest.approx(np.array([[3, 3], [5, 5]]))
    assert found.loc[["hue", "hue_images", "latents"], ["low", "high"]].isna().all(axis=None)
    assert found.base["L"] == pytest.approx(own.groupby("prompt_id").L.mean().mean())
    assert found.photos["L"] == pytest.approx(own.L.mean() + 7)
    pixels = math.sqrt((own.latent_std_0**2).mean() + own.latent_mean_0.var(ddof=0))
    assert found.difference["latents"] == pytest.approx(10 / pixels / 2)
    lacking = ev.compare_colour(table[(table.model != "tuned") | (table.prompt_id > 3)]).set_index("statistic")
    assert lacking.base["L"] == pytest.approx(own[own.prompt_id > 3].groupby("prompt_id").L.mean().mean())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Prompts, plug-ins, photos, and a LoRA that began from its own folder, on pairs that the world's scorer chose."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": prompt, "place": "park" if p < 9 else "street"} for p, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "plugins.py").write_text(PLUGINS)
    (folder / "photos").mkdir()
    for k, choice in enumerate(itertools.islice(itertools.product(*ATTRIBUTES.values()), 0, 240, 20)):
        draw(dict(zip(ATTRIBUTES, choice, strict=True)), seed=k).image.save(folder / "photos" / f"{k}.png")
    unet = UNet2DConditionModel.from_pretrained(WORLD / "pipeline", subfolder="unet").float()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    lora = {key: 0.3 * torch.randn_like(value) for key, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=lora)
    records = {"lora/training_settings": {"train_data_dir": f"{folder}/photos", "initial_lora": f"{folder}/lora"}}
    records["photos/preference_data"] = {"scorer": [f"pickscore={WORLD / 'scorer'}"], "agree": ["people"]}
    for name, settings in records.items():
        (folder / f"{name}.json").write_text(json.dumps({"settings": settings}))
    gc.freeze()  # a hundred collections in a process as full as this one take a minute
    return folder


def flags(inputs: Path, output: Path, scorers: str = "pickscore brightness picky", **changes: object) -> list[str]:
    """A command line for a short run; changes: flag=value, flag=None to leave it out."""
    words = {name: f"{inputs / 'plugins.py'}:{name}" for name in ("brightness", "picky", "broken")}
    words |= {"pickscore": f"pickscore={WORLD / 'scorer'}"}
    line = {"pretrained_model_name_or_path": WORLD / "pipeline", "prompts": inputs / "prompts.jsonl", "batch_size": 4}
    line |= {"output_dir": output, "num_inference_steps": 2, "guidance_scale": 2, "resolution": 64}
    line |= {"feature_model": WORLD / "scorer", "cmmd_model": WORLD / "scorer", "models": f"lora={inputs}/lora base"}
    line |= {"scorers": " ".join(words.get(name, name) for name in scorers.split())} | changes
    return [word for k, value in line.items() if value is not None for word in (f"--{k}", *str(value).split(" "))]


def start(line: list[str]) -> tuple[dict, str]:
    """main() in this process: metrics.json, and what was printed."""
    args = ev.parse_args(line)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ev.main(args)
    return json.loads(Path(args.output_dir, "metrics.json").read_text()), said.getvalue()


def everything(inputs: Path, output: Path) -> list[str]:
    return flags(inputs, output, group_by="place", diversity_prompts=3, real_data_dir=inputs / "photos")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, dict, str]:
    """A run with all that is measured: its folder, its record and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, *start(everything(inputs, output))


def assert_same(found: dict, expected: dict, rtol: float = 1e-12) -> None:
    for name in ("results", "colour", "realism", "groups"):
        tables = (pd.DataFrame(record[name]) for record in (found, expected))
        pd.testing.assert_frame_equal(*tables, rtol=rtol, atol=rtol)


def pngs(output: Path) -> dict[str, int]:
    """The images that are drawn and when."""
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in sorted(output.glob("images/*/*.png"))}


@pytest.fixture
def nothing_new(monkeypatch) -> None:
    """Whoever draws or measures, calls None and fails."""
    own = ev.measure_missing
    monkeypatch.setattr(ev, "load_pipeline", None)
    monkeypatch.setattr(ev, "measure_missing", lambda measure, *args: own(measure._replace(load=None), *args))


def test_what_a_run_prints_is_what_its_csv_gives(finished):
    output, record, said = finished
    assert said.index("3 of the prompts get a second image, for diversity") < said.index("lora against base")
    assert len(pngs(output)) == 2 * 13
    assert (record["headline"], record["roles"]["pickscore"]) == ("brightness", "training")
    assert [row["group"] for row in record["groups"]] == ["park"]  # one prompt is no group
    rows, images = {row["metric"]: row for row in record["results"]}, pd.read_csv(output / "per_image.csv")
    assert list(rows) == ["brightness", "picky", "pickscore", "not vetoed by picky", "diversity"]
    assert (rows["not vetoed by picky"]["base"], rows["not vetoed by picky"]["n"], rows["picky"]["n"]) == (0.9, 10, 9)
    for name in ("brightness", "picky", "pickscore"):
        means = images.groupby(["model", "prompt_id"])[name].mean().unstack("model").dropna()
        rate, base, tuned = (means.lora > means.base).mean(), means.base.mean(), means.lora.mean()
        assert [rows[name][key] for key in ("win_rate", "base", "tuned")] == pytest.approx([rate, base, tuned])
        line = next(line for line in said.splitlines() if line.startswith(f"  {name} "))
        assert re.search(rf" {100 * rate:.1f} % .* {ev.number(base)} +{ev.number(tuned)} ", line)


def test_from_csv_a_second_start_and_a_copy_draw_and_measure_nothing(inputs, finished, tmp_path, nothing_new):
    output, record, said = finished
    line = ["--from_csv", str(output / "per_image.csv"), "--output_dir", str(tmp_path)]
    assert_same(start(line)[0], record, rtol=1e-7)
    report = (output / "report.html").read_bytes()
    assert start(everything(inputs, output)) == (record, said)
    assert (output / "report.html").read_bytes() == report
    assert_same(start(everything(inputs, shutil.copytree(output, tmp_path / "copy")))[0], record)


def test_a_killed_run_carries_on_and_files_cut_off_are_made_again(inputs, finished, tmp_path, monkeypatch):
    own, left, found, starts = ev.write_whole, [0], None, 0

    def write(*args) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        own(*args)

    monkeypatch.setattr(ev, "write_whole", write)
    while not found:
        left[0], before = 13, pngs(tmp_path)
        with contextlib.suppress(KeyboardInterrupt):
            found, _ = start(everything(inputs, tmp_path))
        assert before.items() <= pngs(tmp_path).items()
        starts += 1
    assert starts > 3
    assert_same(found, finished[1], rtol=0.02)
    image, measure = tmp_path / "images/lora/00001_0.png", next(tmp_path.glob("measures/features-*/*.npz"))
    for path in (image, measure):
        path.write_bytes(path.read_bytes()[:-5])
    left[0] = 99
    assert_same(start(everything(inputs, tmp_path))[0], finished[1], rtol=0.02)


def test_images_of_other_settings_wait_and_come_back(inputs, tmp_path, request):
    line = [inputs, tmp_path, "brightness"]
    start(flags(*line, max_prompts=2))
    two = pngs(tmp_path)
    start(flags(*line, max_prompts=3))  # a longer list goes on
    three = pngs(tmp_path)
    assert two.items() < three.items()
    assert len(three) == 6
    (inputs / "other.txt").write_text("a jumping person\n" + PROMPTS[1])
    for changes in ({"max_prompts": 3, "seed": 2}, {"prompts": inputs / "other.txt"}):
        assert start(flags(*line, **changes))[1].count("set aside  images of other settings or prompts: ") == 2
    assert len({path.read_bytes() for path in tmp_path.glob("images/*/*.png")}) == 6 + 6 + 2  # one prompt is the same
    request.getfixturevalue("nothing_new")
    start(flags(*line, max_prompts=3))
    assert three.items() < pngs(tmp_path).items()


def test_one_image_a_prompt_and_seeded_seconds(inputs, tmp_path):
    def seconds(**changes: int) -> list[list[int]]:
        args = ev.parse_args(flags(inputs, tmp_path, **changes))
        images = ev.plan_images(args, ev.read_prompts(args.prompts, None, None)[0])[0]
        second = images[images["index"] == 1]
        return [second.prompt_id[second.model == name].tolist() for name in ("base", "lora")]

    assert seconds() == [[], []]
    base, lora = seconds(diversity_prompts=4)
    assert len(base) == 4
    assert base == lora != seconds(diversity_prompts=4, seed=2)[0]
    assert seconds(num_images_per_prompt=3, diversity_prompts=4) == [[*range(10)]] * 2


def test_a_scorer_that_cannot_work_stops_the_run_after_the_first_batch(inputs, tmp_path):
    with pytest.raises(ZeroDivisionError):
        start(flags(inputs, tmp_path, "brightness broken"))
    assert list(pngs(tmp_path)) == [f"images/{name}/{p:05d}_0.png" for name in ("base", "lora") for p in range(4)]


def test_what_chose_the_pairs_never_leads_and_a_lora_of_scale_0_has_no_win_rate(inputs, tmp_path):
    changes = {"models": f"base off={inputs}/lora,lora_scale=0", "training_scorer": "picky", "max_prompts": 2}
    found, said = start(flags(inputs, tmp_path, f"clip={WORLD / 'scorer'} picky brightness", **changes))
    roles = {"brightness": "held-out", "clip": "training", "picky": "training"}  # clip: the same weights
    assert (found["roles"], found["results"]) == (roles, [])
    assert "off draws the very images of base: nothing was changed." in said


def test_two_processes_draw_and_measure_the_same(inputs, finished, tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    line = [*launch, ROOT / "eval_human.py", *flags(inputs, tmp_path, "brightness", max_prompts=3)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2" in done.stderr
    assert done.stdout.count("lora against base") == 1
    found, one = (pd.read_csv(folder / "per_image.csv") for folder in (tmp_path, finished[0]))
    one = one[(one["index"] == 0) & (one.prompt_id < 3)].reset_index(drop=True)
    assert found.brightness.tolist() == pytest.approx(one.brightness.tolist(), abs=0.05)
    assert found.seed.tolist() == one.seed.tolist()


@pytest.mark.parametrize(("changes", "status", "words"), [  # flags that change, exit status, words of the one line
    ({"prompts": None, "models": "base a={scorer}"}, 2, "no prompts: set --prompts"),
    ({"prompts": "nowhere.txt"}, 1, "nowhere.txt"),
    ({"pretrained_model_name_or_path": "./nowhere"}, 1, "cannot find ./nowhere"),
    ({"output_dir": "{csv}/out"}, 1, "cannot write to"),
    ({"group_by": "shot"}, 1, "--group_by shot: "),
    ({"from_csv": "{csv}", "group_by": "shot"}, 2, "counts not beside --from_csv"),
    ({"from_csv": "{csv}", "votes": "{csv}"}, 1, "--votes"),
    ({"from_csv": "{tmp}/cut/per_image.csv"}, 1, "--from_csv needs per_image.csv and metrics.json"),
    ({"from_csv": "{tmp}/other/per_image.csv"}, 1, "--from_csv needs per_image.csv and metrics.json"),
    ({"models": "base a={lora} a={lora}"}, 2, "two models are called a"),
    ({"scorers": "pikscore"}, 1, "unknown scorer 'pikscore'"),
    ({"scorers": "clip={scorer},label=hue"}, 1, "a scorer cannot be called hue"),
    ({"resolution": 60}, 1, "it takes multiples of 8"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(inputs, finished, tmp_path, capsys, changes, status, words):
    csv = finished[0] / "per_image.csv"
    names = {"tmp": tmp_path, "csv": csv, "lora": inputs / "lora", "scorer": WORLD / "scorer"}
    for name, text in (("cut", '{"roles": {'), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
        shutil.copy(csv, tmp_path / name)
    changes = {key: value if value is None else str(value).format(**names) for key, value in changes.items()}
    alone = status == 1 and "from_csv" in changes
    line = [f"--{name}={value}" for name, value in changes.items()]
    with pytest.raises(SystemExit) as caught:
        ev.cli(line if alone else flags(inputs, **({"output": tmp_path / "out"} | changes)))
    told = caught.value.code if status == 1 else capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"eval_human.py: .*{re.escape(words)}.*", told)  # one line
