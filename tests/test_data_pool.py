# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: drafts and finalists, and that nothing is lost whatever happens to a run."""

import contextlib
import errno
import json
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from test_make_preference_data import (
    SCORER,
    data,
    data_of,
    difference,
    flags,
    make,
    pool_bytes,
    rows_of,
    write_inputs,
)


ROOT = Path(__file__).resolve().parent.parent
DRAFTS = ["--num_inference_steps", 12, "--draft_steps", 4, "--num_images_per_prompt", 6, "--finalists", 1]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_IMAGES", 12)  # two prompts a shard of drafts, six a shard of finalists
    return write_inputs(tmp_path)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    """The folder of a finished run with drafts, not to be changed; what it printed lies beside it."""
    folder = write_inputs(tmp_path_factory.mktemp("drafted"))
    with pytest.MonkeyPatch.context() as patch, (folder / "printed.txt").open("w") as printed:
        patch.setattr(data, "SHARD_IMAGES", 12)
        with contextlib.redirect_stdout(printed):
            return make(folder, *DRAFTS)


def pool_rows(out: Path, kind: str) -> list[dict]:
    return [row for shard in sorted(out.glob(f"pool/{kind}-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def rescore(folder: Path, *extra: object) -> None:
    """--rescore as one types it: all that it does not name is as it was."""
    command = ["--output_dir", folder / "out", "--rescore", *extra]
    data.main(data.parse_args([str(flag) for flag in command]))


def score(row: dict) -> float:
    return json.loads(row["scores"])[SCORER]


# ---- Drafts ---------------------------------------------------------------------------------------------------------


def test_only_the_best_and_the_worst_draft_are_drawn_in_full(drafted):
    drafts, images = pool_rows(drafted, "drafts"), pool_rows(drafted, "images")
    assert (len(drafts), len(images)) == (36, 12)
    assert all(row["latents"] is None for row in drafts)
    for caption in {row["caption"] for row in drafts}:
        pool = {row["index"]: score(row) for row in drafts if row["caption"] == caption}
        drawn = {row["index"]: row for row in images if row["caption"] == caption}
        assert set(drawn) == {max(pool, key=pool.get), min(pool, key=pool.get)}
        assert all(row["seed"] == data.image_seed(0, caption, i) for i, row in drawn.items())
        pair = next(
            row for split in ("train", "validation") for row in rows_of(drafted, split) if row["caption"] == caption
        )
        assert {pair["seed_0"], pair["seed_1"]} == {row["seed"] for row in drawn.values()}
        assert pair["margin"] == pytest.approx(abs(np.subtract(*map(score, drawn.values()))))
        assert pair["num_candidates"] == 6
    printed = (drafted.parent / "printed.txt").read_text()
    assert "96 U-Net evaluations a prompt, 67% of 6 full images" in printed


def test_a_finalist_is_the_image_that_the_full_pool_has(drafted, inputs):
    full = make(inputs, *DRAFTS, "--draft_steps", 0, "--max_prompts", 2)
    images = {data.image_id(row): row for row in pool_rows(full, "images")}
    finalists = [row for row in pool_rows(drafted, "images") if data.image_id(row) in images]
    assert len(finalists) == 4
    for row in finalists:
        assert score(row) == pytest.approx(score(images[data.image_id(row)]), abs=0.05)


def test_the_default_number_of_draft_steps(inputs):
    def steps(*extra: object) -> int:
        return data.parse_args(flags(inputs, *extra)).draft_steps

    assert steps("--num_inference_steps", 50, "--num_images_per_prompt", 20) == 5
    assert steps("--num_inference_steps", 8, "--num_images_per_prompt", 20) == 0
    assert steps("--num_inference_steps", 50, "--num_images_per_prompt", 2) == 0
    assert steps("--num_inference_steps", 50, "--num_images_per_prompt", 20, "--draft_steps", 0) == 0
    assert steps("--num_inference_steps", 8, "--num_images_per_prompt", 100) == 0
    assert data.parse_args([]).draft_steps == 0  # the embedded world


@pytest.mark.parametrize(
    ("count", "steps", "finalists", "drafted"),
    [(24, 20, 2, 5), (9, 20, 2, 5), (8, 20, 2, 0), (5, 20, 2, 0), (6, 50, 2, 0), (7, 50, 2, 5), (24, 20, 6, 0)],
)
def test_drafts_are_the_default_where_they_spare_three_tenths(count, steps, finalists, drafted, inputs):
    flag = ["--num_images_per_prompt", count, "--num_inference_steps", steps, "--finalists", finalists]
    args = data.parse_args(flags(inputs, *flag))
    assert args.draft_steps == drafted
    args.draft_steps = 5
    price, full = data.evaluations(args)
    assert (price <= 0.7 * full) == bool(drafted)


@pytest.mark.parametrize(
    ("scheduler", "fresh"),
    [
        (DPMSolverMultistepScheduler(), False),
        (DDIMScheduler(), False),
        (EulerDiscreteScheduler(), False),
        (HeunDiscreteScheduler(), False),
        (PNDMScheduler(skip_prk_steps=True), False),
        (UniPCMultistepScheduler(), False),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), True),
        (EulerAncestralDiscreteScheduler(), True),
        (KDPM2AncestralDiscreteScheduler(), True),
        (DDPMScheduler(), True),
        (LCMScheduler(), True),
    ],
)
def test_samplers_that_draw_fresh_noise_are_known(scheduler, fresh):
    state = torch.random.get_rng_state()
    assert data.draws_fresh_noise(scheduler) == fresh
    assert torch.equal(torch.random.get_rng_state(), state)


def test_drafts_are_refused_with_a_sampler_that_draws_fresh_noise(inputs, monkeypatch):
    load = data.load_pipeline

    def load_ancestral(*args):
        pipe = load(*args)
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        return pipe

    monkeypatch.setattr(data, "load_pipeline", load_ancestral)
    with pytest.raises(data.UserError, match=r"EulerAncestralDiscreteScheduler draws fresh noise.*--draft_steps 0"):
        make(inputs, *DRAFTS)


@pytest.fixture(scope="module")
def pipe():
    data.quiet_libraries()
    return data.load_pipeline(data.parse_args([]), torch.device("cpu"))


def test_drafts_use_unipc_on_the_models_own_schedule_and_leave_the_sampler_as_it_was(pipe):
    config = {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}
    pipe.scheduler = full = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **config)
    with data.drafting(pipe):
        assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        assert pipe.scheduler.config.beta_end == full.config.beta_end
        pipe.scheduler.set_timesteps(5)
        assert pipe.scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert pipe.scheduler is full


@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_draft_foretells_the_full_image_of_its_own_noise(pipe, sampler):
    captions = [row["caption"] for row in (data.new_row("a standing person in a red shirt", 0, "", 0),)]
    embeds, seeds = data.encode_prompts(pipe, captions, ""), list(range(6))
    config = {"use_karras_sigmas": False, "timestep_spacing": "trailing", "clip_sample": False}
    pipe.scheduler = sampler.from_config(pipe.scheduler.config, **config)
    full, _ = data.sample(pipe, embeds, [0] * 6, seeds, 30, 2.0)
    with data.drafting(pipe):
        drafts, _ = data.sample(pipe, embeds, [0] * 6, seeds, 8, 2.0)
    distance = np.array([[difference(a, b).mean() for b in full] for a in drafts])
    assert (distance.argmin(axis=1) == np.arange(6)).all()
    assert np.diag(distance).mean() < distance.mean() / 2


def test_rescore_chooses_among_the_images_that_are_there(drafted, inputs, monkeypatch):
    out = inputs / "out"
    make(inputs, *DRAFTS, "--finalists", 2)
    before = [row["jpg"] for row in pool_rows(out, "images")]
    monkeypatch.setattr(data, "load_pipeline", lambda *args: pytest.fail("nothing is to be drawn"))
    plugin = f"{inputs}/plugin.py:redness"
    rescore(inputs, "--scorer", plugin, "--validation_share", 0)
    assert [row["jpg"] for row in pool_rows(out, "images")] == before
    for pair in data_of(out):
        rows = [row for row in pool_rows(out, "images") if row["caption"] == pair["caption"]]
        red = {row["seed"]: json.loads(row["scores"])[data.parse_scorer(plugin).source] for row in rows}
        assert {red[pair["seed_0"]], red[pair["seed_1"]]} == {max(red.values()), min(red.values())}


def test_a_bare_rescore_changes_nothing(inputs):
    """The spreads that weigh two scorers are still those of all drafts, not of the few that were drawn in full."""
    out = make(inputs, *DRAFTS, "--scorer", SCORER, f"0.7*{inputs}/plugin.py:redness")
    before = data_of(out)
    rescore(inputs)
    assert data_of(out) == before


def test_the_record_tells_who_chose_the_drafts(inputs):
    """After a --rescore by another scorer, which sees the finalists alone, until --refine gives it all drafts."""
    out = make(inputs, *DRAFTS, "--max_prompts", 2)
    sources = json.loads((out / "preference_data.json").read_text())["prompts_from"]
    plugin = f"{inputs}/plugin.py:redness"
    rescore(inputs, "--scorer", plugin)
    record = json.loads((out / "preference_data.json").read_text())
    assert (
        record["prompts_from"]
        == sources
        == {"prompts": f"{inputs}/prompts.txt", "prompt_column": None} | {"max_prompts": 2}
    )
    assert record["settings"]["drafts_chosen_by"] == [SCORER]
    assert record["rescored_with"] == record["versions"]
    told = (out / "README.md").read_text()
    assert (
        f"that {data.markdown_text(SCORER)} chose among 6 drafts of 4 steps and that were drawn in 12, by red" in told
    )
    with pytest.raises(data.UserError, match=r"drafts_chosen_by was \['pickscore.*--rescore the kept pool"):
        make(inputs, *DRAFTS, "--max_prompts", 2, "--scorer", plugin)
    rescore(inputs, "--refine", "--scorer", plugin)
    assert "chosen as drafts of 4 steps and drawn in 12, by redness" in (out / "README.md").read_text()
    make(inputs, *DRAFTS, "--max_prompts", 2, "--scorer", plugin)


def test_a_rescore_that_fails_leaves_the_record_as_it_was(inputs):
    out = make(inputs, *DRAFTS, "--max_prompts", 2)
    before = (out / "preference_data.json").read_bytes()
    with pytest.raises(data.UserError, match="no pairs"):
        rescore(inputs, "--min_margin", 1000)
    assert (out / "preference_data.json").read_bytes() == before
    make(inputs, *DRAFTS, "--max_prompts", 2)  # the same command is the same run still


def test_refine_draws_what_comes_newly_to_the_final_and_forgets_nothing(drafted, inputs):
    out = inputs / "out"
    make(inputs, *DRAFTS)
    assert pool_bytes(out) == pool_bytes(drafted)
    plugin = f"{inputs}/plugin.py:redness"
    rescore(inputs, "--refine", "--scorer", plugin)
    drafts, images = pool_rows(out, "drafts"), pool_rows(out, "images")
    assert 12 < len(images) <= 24
    for pair in data_of(out):
        red = {
            row["seed"]: json.loads(row["scores"])[data.parse_scorer(plugin).source]
            for row in drafts
            if row["caption"] == pair["caption"]
        }
        assert {red[pair["seed_0"]], red[pair["seed_1"]]} == {max(red.values()), min(red.values())}
    rescore(inputs, "--refine", "--scorer", SCORER)
    assert data_of(out) == data_of(drafted)  # what was drawn for the other scorer takes no part
    rescore(inputs, "--refine", "--scorer", SCORER, "--finalists", 2)
    margins = [{row["caption"]: row["margin"] for row in data_of(folder)} for folder in (drafted, out)]
    assert all(margins[1][caption] >= margins[0][caption] for caption in margins[0])


def test_discarded_drafts_can_be_chosen_anew_but_not_scored_anew(inputs):
    out = make(inputs, *DRAFTS, "--discard_drafts", "--max_prompts", 2)
    assert {row["jpg"] for row in pool_rows(out, "drafts")} == {b""}
    assert (out / "pool.png").exists()
    before = data_of(out)
    rescore(inputs, "--min_margin", "0.0")
    assert data_of(out) == before
    with pytest.raises(data.UserError, match="--discard_drafts"):
        rescore(inputs, "--refine", "--scorer", f"{inputs}/plugin.py:redness")


def test_agree(drafted, inputs):
    make(inputs, *DRAFTS, "--agree", f"{inputs}/plugin.py:redness")
    kept = data_of(inputs / "out")
    expected = []
    for row in data_of(drafted):
        red = [np.asarray(data.from_jpeg(row[f"jpg_{side}"]).resize((1, 1)))[0, 0, 0] for side in (0, 1)]
        winner = int(row["label_1"])
        if red[winner] > red[1 - winner]:
            expected.append(row["caption"])
    assert 0 < len(expected) < 6
    assert [row["caption"] for row in kept] == expected
    record = json.loads((inputs / "out" / "preference_data.json").read_text())
    assert record["dropped"] == {"redness disagrees": 6 - len(expected)}
    assert json.loads(kept[0]["scores"]).keys() == {"pickscore", "redness"}


def test_an_agreeing_scorer_that_gives_nan_does_not_disagree(inputs):
    (inputs / "silent.py").write_text(
        "def silent(device):\n    return lambda images, p: [float('nan')] * len(images)\n"
    )
    with pytest.raises(data.UserError, match="2 silent gave no score"):
        make(inputs, "--num_inference_steps", 1, "--max_prompts", 2, "--agree", f"{inputs}/silent.py:silent")


def test_min_margin_as_a_share(drafted, inputs):
    make(inputs, *DRAFTS, "--min_margin", "50%")
    margins = sorted(row["margin"] for row in data_of(drafted))
    assert (
        sorted(row["margin"] for row in data_of(inputs / "out")) == margins[2:]
    )  # not below the median's lower value


# ---- Whatever happens -----------------------------------------------------------------------------------------------


@pytest.fixture
def script(inputs):
    """The script with the small shards of these tests."""
    path = inputs / "small_shards.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport make_preference_data as data\n"
        "data.SHARD_IMAGES = 12\ndata.cli()\n"
    )
    return path


def test_two_processes_give_the_same_data_as_one(inputs, script, drafted):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*launch, script, *flags(inputs, *DRAFTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "drafts (process 1 of 2)" in done.stderr
    assert done.stdout.count("prompts: the first 6 of 6") == 1
    assert data_of(inputs / "out") == data_of(drafted)


def test_twenty_kills(inputs, drafted):
    """Twenty times the run is killed at a random moment; the next start goes on, and the data is what it would be."""
    rng = random.Random(0)
    out, kills, shards = inputs / "out", 0, []
    driver = inputs / "driver.py"
    driver.write_text(
        textwrap.dedent(f"""
            import os, sys
            sys.path.insert(0, {str(ROOT)!r})
            import make_preference_data as data
            data.SHARD_IMAGES = 12
            data.quiet_libraries()
            import diffusers, transformers.models.clip.modeling_clip
            for line in sys.stdin:  # a child for every start, so that the libraries are imported once
                child = os.fork()
                if child == 0:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    print(os.getpid(), flush=True)
                    os.dup2(2, 1)
                    data.cli({[*flags(inputs, *DRAFTS)]!r})
                    os._exit(0)
                print(os.waitpid(child, 0)[1], flush=True)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        while kills < 20:
            process.stdin.write("go\n")
            child = int(process.stdout.readline())
            before = list(out.rglob("*.part*"))
            if kills % 2:  # at any moment; or, every other time, a moment after a file came
                time.sleep(rng.uniform(0.0, 3.0))
            else:
                while list(out.rglob("*.part*")) == before and not select.select([process.stdout], [], [], 0.01)[0]:
                    pass
                time.sleep(rng.uniform(0.0, 0.3))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed = os.WIFSIGNALED(int(process.stdout.readline()))
            kills += killed
            shards.append(len(list(out.glob("pool/*.parquet"))))
            if not killed:  # it was finished: begin again, the kills go on
                for path in [*out.glob("pool/*.parquet"), *out.glob("data/*")]:
                    path.unlink()
    finally:
        process.stdin.close()
        process.wait()
    assert len(set(shards)) > 1
    make(inputs, *DRAFTS)
    assert pool_bytes(out) == pool_bytes(drafted)
    assert data_of(out) == data_of(drafted)
    assert not list(out.rglob("*.part"))


def test_a_scorer_that_raises_once_is_asked_again(drafted, inputs):
    (inputs / "flaky.py").write_text(
        "def factory(device):\n    calls = []\n    def score(images, prompts):\n        calls.append(1)\n"
        "        if len(calls) == 3:\n            raise RuntimeError('hiccup')\n"
        "        return [0.0] * len(images)\n    return score\n"
    )
    make(inputs, *DRAFTS, "--scorer", SCORER, f"0*{inputs}/flaky.py:factory")
    assert [row["seed_0"] for row in data_of(inputs / "out")] == [row["seed_0"] for row in data_of(drafted)]


def test_a_shard_on_which_a_scorer_always_raises_is_left_out_and_made_up_for_later(drafted, inputs, capsys):
    victim = data_of(drafted)[0]["caption"]
    plugin = inputs / "allergic.py"
    plugin.write_text(
        "def factory(device):\n    def score(images, prompts):\n"
        f"        if {victim!r} in prompts:\n            raise KeyError('no')\n"
        "        return [0.0] * len(images)\n    return score\n"
    )
    spec = ["--scorer", SCORER, f"0*{plugin}:factory"]
    out = make(inputs, *DRAFTS, *spec)
    told = capsys.readouterr()
    assert "left out: drafts-00000.parquet, because scorer factory raised KeyError: 'no'" in told.err
    assert "2 no image with a score" in told.out
    assert len(data_of(out)) == 4
    plugin.write_text("def factory(device):\n    return lambda images, prompts: [0.0] * len(images)\n")
    make(inputs, *DRAFTS, *spec)
    assert [row["caption"] for row in data_of(out)] == [row["caption"] for row in data_of(drafted)]


def test_a_scorer_that_always_raises_ends_the_run_early(inputs):
    (inputs / "broken.py").write_text("def factory(device):\n    return lambda images, prompts: 1 / 0\n")
    with pytest.raises(data.UserError, match=r"scorer factory raised ZeroDivisionError.*three shards in a row"):
        make(inputs, *DRAFTS, "--scorer", f"{inputs}/broken.py:factory")


def write_mortal(folder: Path, lives: int) -> str:
    """A scorer that gives 0 so many times, then nothing but errors."""
    (folder / "mortal.py").write_text(
        "def factory(device):\n    calls = []\n    def score(images, prompts):\n        calls.append(1)\n"
        f"        if len(calls) > {lives}:\n            raise RuntimeError('dead')\n"
        "        return [0.0] * len(images)\n    return score\n"
    )
    return f"0*{folder}/mortal.py:factory"


def test_a_scorer_that_dies_later_ends_the_run_after_three_more_shards(inputs, monkeypatch):
    monkeypatch.setattr(data, "SHARD_IMAGES", 4)  # a prompt
    drawn, draw = [], data.draw_rows
    monkeypatch.setattr(data, "draw_rows", lambda batch, *args: drawn.append(len(batch)) or draw(batch, *args))
    quick = ["--num_inference_steps", 1, "--draft_steps", 0, "--batch_size", 4]
    with pytest.raises(data.UserError, match=r"factory raised RuntimeError: dead: three shards in a row"):
        make(inputs, *quick, "--scorer", SCORER, write_mortal(inputs, 1))
    assert len(list(inputs.glob("out/pool/*.parquet"))) == 1
    assert sum(drawn) <= 20  # no shard twice, and not the sixth
    assert len(data_of(make(inputs, *quick, "--scorer", SCORER, write_mortal(inputs, 99)))) == 6


def test_more_left_out_than_finished_is_no_success(inputs, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHARD_IMAGES", 4)
    quick = ["--num_inference_steps", 1, "--batch_size", 4, "--max_prompts", 3]
    with pytest.raises(SystemExit) as stop:
        data.cli(flags(inputs, *quick, "--scorer", SCORER, write_mortal(inputs, 1)))
    assert "2 of 3 shards of images were left out" in str(stop.value.code)
    assert len(data_of(inputs / "out")) == 1
    assert "left out: images-00001.parquet" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_loses_nothing(drafted, inputs, monkeypatch):
    write, calls = pq.write_table, []

    def write_until_full(table, path, *args):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(table, path, *args)

    monkeypatch.setattr(pq, "write_table", write_until_full)
    with pytest.raises(data.UserError, match=r"drafts-00001\.parquet: No space left on device"):
        make(inputs, *DRAFTS)
    assert not list((inputs / "out").rglob("*.part"))
    kept = pool_bytes(inputs / "out")
    assert "drafts-00000.parquet" in kept
    assert "drafts-00001.parquet" not in kept
    monkeypatch.undo()
    monkeypatch.setattr(data, "SHARD_IMAGES", 12)
    make(inputs, *DRAFTS)
    assert pool_bytes(inputs / "out") == pool_bytes(drafted)
    assert kept.items() <= pool_bytes(drafted).items()


def test_images_that_are_not_finite_are_counted_and_used_for_neither_side(drafted, inputs, monkeypatch, capsys):
    sample = data.sample
    best = max(pool_rows(drafted, "drafts"), key=score)

    def overflow(pipe, embeds, rows, seeds, *args):
        images, latents = sample(pipe, embeds, rows, seeds, *args)
        latents = latents.clone()
        latents[[i for i, seed in enumerate(seeds) if seed == best["seed"]]] = float("nan")
        return images, latents

    monkeypatch.setattr(data, "sample", overflow)
    out = make(inputs, *DRAFTS)
    assert "unscored   1 images" in capsys.readouterr().out
    bad = [row for row in pool_rows(out, "drafts") if row["jpg"] is None]
    assert [row["seed"] for row in bad] == [best["seed"]]
    assert np.isnan(score(bad[0]))
    assert best["seed"] not in {row[f"seed_{side}"] for row in data_of(out) for side in (0, 1)}
    assert len(data_of(out)) == 6


def decode_with_nan(monkeypatch, broken) -> None:
    """The VAE, with nan in the decoded images whose number, counted over all calls, is `broken`."""
    load, count = data.load_pipeline, iter(range(1000))

    def load_broken(*args):
        pipe = load(*args)
        decode = pipe.vae.decode

        def decode_some(latents, return_dict):
            pixels = decode(latents, return_dict=return_dict)[0]
            pixels[[i for i in range(len(pixels)) if broken(next(count))], :, :8] = float("nan")
            return (pixels,)

        pipe.vae.decode = decode_some
        return pipe

    monkeypatch.setattr(data, "load_pipeline", load_broken)


def test_what_decodes_to_nan_is_no_black_loser(inputs, monkeypatch, capsys):
    decode_with_nan(monkeypatch, lambda number: number % 6 == 2)
    out = make(inputs, "--num_images_per_prompt", 6, "--max_prompts", 2)
    assert "unscored   2 images" in capsys.readouterr().out
    rows = pool_rows(out, "images")
    assert [i for i, row in enumerate(rows) if row["jpg"] is None] == [2, 8]
    assert np.isnan([score(row) for row in rows if row["jpg"] is None]).all()
    assert all(row["latents_0"] and row["latents_1"] for row in data_of(out))


def test_a_model_that_gives_only_nan_is_stopped_early(inputs, monkeypatch):
    monkeypatch.setattr(data, "SHARD_IMAGES", 4)
    decode_with_nan(monkeypatch, lambda number: True)
    with pytest.raises(data.UserError, match=r"no image is finite \(another --mixed_precision"):
        make(inputs, "--num_inference_steps", 1)
    assert len(list(inputs.glob("out/pool/*.parquet"))) < 6


def test_what_is_held_grows_with_a_shard_not_with_the_prompts(inputs, monkeypatch):
    """No more than three batches of images are alive at any time, and rows are read shard by shard."""
    alive, most, draw, keep = set(), [], data.draw_rows, data.keep_images

    def count_drawn(batch, *args):
        drawn = draw(batch, *args)
        alive.add(id(batch))
        most.append(len(alive))
        return drawn

    def count_kept(batch, *args):
        keep(batch, *args)
        alive.discard(id(batch))

    monkeypatch.setattr(data, "draw_rows", count_drawn)
    monkeypatch.setattr(data, "keep_images", count_kept)
    make(inputs, *DRAFTS, "--batch_size", 1, "--draft_steps", 1, "--num_inference_steps", 2)
    assert len(most) == 48
    assert max(most) <= 3
