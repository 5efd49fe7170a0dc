# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py's one rule: only what is missing is made, whatever happened before, and never twice."""

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_make_preference_data import CAPTIONS, SMALL, data, make, pairs_of, picture, pool_of, scores_of, sides
from train_helpers import PIPELINE, ROOT, flags, load, with_scheduler


SPACINGS = ("linspace", "leading", "trailing")
DRAFTS = {"num_images_per_prompt": 6, "num_inference_steps": 6, "draft_steps": 3, "finalists": 1}
PLUGIN = """
redness = lambda device: lambda images, prompts: [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]
odd = lambda device: lambda images, prompts: [float(text) for text in "inf 1 nan 2 -inf 3 4 nan".split()]
broken = lambda device: lambda images, prompts: 1 / 0
"""


@pytest.fixture(scope="module", autouse=True)
def red(tmp_path_factory):
    """Parts of 8 images, no pictures, no counted FLOPs; and a scorer in a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "IMAGES_IN_A_PART", 8)
        patch.setattr(data, "draw_pictures", lambda *args: None)
        patch.setattr(data, "count_flops", lambda *args: (1, 1))
        (file := tmp_path_factory.mktemp("plugin") / "plugin.py").write_text(PLUGIN)
        yield f"{file}:redness"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, not to be changed: of 4 images of 4 prompts, and of 6 drafts, of which two are drawn in full."""
    return make(tmp_path_factory.mktemp("full") / "out"), make(tmp_path_factory.mktemp("drafted") / "out", **DRAFTS)


@pytest.fixture
def made(monkeypatch):
    """Tells how many images were drawn and how many were scored since it was asked last."""
    drawn, scored, sample, from_jpeg = [], [], data.sample, data.from_jpeg
    monkeypatch.setattr(data, "sample", lambda *args, **more: drawn.extend(args[4]) or sample(*args, **more))
    monkeypatch.setattr(data, "from_jpeg", lambda jpg: scored.append(1) or from_jpeg(jpg))
    return lambda: (len(drawn), len(scored), drawn.clear(), scored.clear())[:2]


@pytest.fixture
def painted(monkeypatch, red):
    """A run with images of one colour by their seed in place of the model's, for tests of the disk alone."""

    def paint(pipe, family, text, rows, seeds, *size, **more):
        colours = [torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(colours).expand(-1, 3, 8, 8) * 2 - 1, torch.zeros(len(seeds), 8, 16, 16).half()

    monkeypatch.setattr(data, "sample", paint)
    return partial(make, scorer=red)


def files_of(out: Path, pattern: str = "*/*/*.parquet") -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.glob(pattern)}


def whole(out: Path) -> tuple:
    """All that a run made, whatever its parts are called."""
    return pool_of(out), pool_of(out, "draft"), scores_of(out, "*"), pairs_of(out)


def of(captions: list[str], rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["caption"] in captions]


def scores_by_prompt(out: Path, label: str = "pickscore", kind: str = "full") -> np.ndarray:
    scores = scores_of(out, label)
    return np.array([scores[name] for name in pool_of(out, kind)]).reshape(4, -1)


def assert_alike(a: Path, b: Path) -> None:
    """The images of two prompts, drawn in other batches, are the same but for rounding, of latents and JPEG."""
    for x, y in zip(*(of(CAPTIONS[:2], pool_of(out).values()) for out in (a, b)), strict=True):
        assert x["image_id"] == y["image_id"]
        difference = np.abs(picture(x["jpg"]) - picture(y["jpg"]))  # grey levels of 255
        assert difference.max() <= 4
        assert difference.mean() < 0.05


def test_a_pool_grows_in_prompts_and_images_to_what_a_fresh_run_makes(runs, tmp_path, made):
    out, more = make(tmp_path / "out", max_prompts=2), tmp_path / "more.txt"
    assert (made(), make(out), made()) == ((8, 8), out, (8, 8))
    assert whole(out) == whole(runs[0])
    assert (make(out, num_images_per_prompt=6, max_prompts=2), made()) == (out, (4, 4))
    assert_alike(out, make(tmp_path / "fresh", num_images_per_prompt=6, max_prompts=2))
    more.write_text("\n".join(["a new person", *CAPTIONS[:2], "another one", *CAPTIONS[2:4]]))
    assert (made(), make(out, prompts=more, max_prompts=6), made()) == ((12, 12), out, (8, 8))
    assert of(CAPTIONS, pairs_of(out)) == pairs_of(runs[0])
    assert pairs_of(make(out, max_prompts=3)) == of(CAPTIONS[:3], pairs_of(runs[0]))
    assert made() == (0, 0)


def test_another_scorer_draws_nothing_or_only_finalists_that_are_new(runs, red, tmp_path, made):
    out = make(shutil.copytree(runs[0], tmp_path / "full"), scorer=red)
    best_and_worst = [[max(own), min(own)] for own in scores_by_prompt(out, "redness")]
    assert (made(), [sides(pair, "score") for pair in pairs_of(out)]) == ((0, 16), best_and_worst)
    out, before = shutil.copytree(runs[1], tmp_path / "drafted"), {row["seed"] for row in pool_of(runs[1]).values()}
    scores = scores_by_prompt(make(out, scorer=red, **DRAFTS), "redness", "draft")
    seeds = np.array([row["seed"] for row in pool_of(out, "draft").values()]).reshape(4, 6)
    wanted = {seed for row, own in zip(seeds, scores, strict=True) for seed in row[data.finalists(own, 1)]}
    assert {row["seed"] for row in pool_of(out).values()} == before | wanted != wanted
    assert made() == (len(wanted - before), 24 + 8)
    assert (pairs_of(make(out, **DRAFTS)), made()) == (pairs_of(runs[1]), (0, 0))


def test_weights_agreement_margins_and_splits_take_what_is_there(runs, red, tmp_path, made, monkeypatch):
    out = make(shutil.copytree(runs[0], tmp_path / "out"), scorer=["pickscore", red])
    ours, theirs = scores_by_prompt(out), scores_by_prompt(out, "redness")
    spreads = [data.pooled_spread(ours), data.pooled_spread(theirs)]
    assert (made(), list(data.read_record(out)["spreads"].values())) == ((0, 16), pytest.approx(spreads))
    for weight in (-3, 0.5):
        total = ours / spreads[0] + weight * theirs / spreads[1]
        pairs = pairs_of(make(out, scorer=["pickscore", f"{red},weight={weight}"]))
        expected = np.stack([total.max(axis=1), total.min(axis=1)], axis=1)
        np.testing.assert_allclose([sides(pair, "score") for pair in pairs], expected, rtol=1e-6)
    agreed = [b[a.argmax()] > b[a.argmin()] for a, b in zip(ours, theirs, strict=True)]
    margins = [pair["margin"] for pair in pairs_of(runs[0])]
    assert [pair["margin"] for pair in pairs_of(make(out, agree=red))] == list(itertools.compress(margins, agreed))
    assert data.read_record(out)["dropped"] == {"redness disagrees": 4 - sum(agreed)}
    for least, left in (("50%", sorted(margins)[1:]), (sorted(margins)[2], sorted(margins)[2:])):
        assert sorted(pair["margin"] for pair in pairs_of(make(out, min_margin=least))) == left
    make(out, validation_share=0.5)
    assert (len(pairs_of(out, "train")), len(pairs_of(out, "validation")), made()) == (2, 2, (0, 0))
    with monkeypatch.context() as patch:  # data/ in several files
        patch.setattr(data, "BYTES_IN_A_FILE", 30e3)
        names = sorted(files_of(make(out, validation_share=0), "data/*"))
    assert names == [f"data/train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    read = datasets.load_dataset(str(out), cache_dir=tmp_path / "cache")
    assert {split: rows["caption"][:] for split, rows in read.items()} == {"train": CAPTIONS[:4]}
    assert len(names) > 1
    assert files_of(make(out), "data/*") == files_of(runs[0], "data/*")


def test_spreads_are_kept_so_that_a_larger_pool_moves_no_finalist(painted, red, tmp_path, made):
    settings = DRAFTS | {"scorer": ["pickscore", red]}
    out = make(tmp_path / "out", **settings, max_prompts=2)
    before, spreads = pairs_of(out), data.read_record(out)["spreads"]
    assert (len(spreads), made()[0], make(out, **settings), made()[0]) == (2, 16, out, 16)
    assert (data.read_record(out)["spreads"], of(CAPTIONS[:2], pairs_of(out))) == (spreads, before)


@pytest.mark.parametrize("flags", [
    {"seed": 1}, {"guidance_scale": 2}, {"guidance_scale": 2, "negative_prompt": "a dog"}, {"width": 48},
    {"num_inference_steps": 3}, {"no_latents": True},
])  # fmt: skip
def test_other_sampling_settings_leave_old_files_alone(flags, painted, tmp_path, made, capsys):
    before, old = files_of(out := painted(tmp_path / "out", **flags)), pool_of(out).keys()
    assert (painted(out), made()) == (out, (32, 32))
    assert before.items() < files_of(out).items()
    assert not old & {side for pair in pairs_of(out) for side in sides(pair, "image_id")}
    assert {len(pair["latents_0"] or "") for pair in pairs_of(out)} == {2 * 8 * 16 * 16}
    assert " of other settings in pool/ and scores/: full-" in capsys.readouterr().out


def test_neither_the_batch_size_nor_the_number_of_processes_matters(runs, tmp_path):
    assert_alike(make(tmp_path / "batches", batch_size=3, max_prompts=2), runs[0])
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text("import make_preference_data as data\ndata.IMAGES_IN_A_PART = 8\ndata.cli()\n")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    words = [sys.executable, *launch.split(), script, *flags({"output_dir": out} | SMALL | DRAFTS)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.count("prompts    the first 4 of")) == (0, 1), done.stderr
    assert "draft (process 1 of 2)" in done.stderr
    assert whole(out) == whole(runs[1])


@contextmanager
def failing(n: int, error: BaseException, *acts: tuple[object, str]):
    """`error` at the n-th call of some functions, before it or, for every other pair of n, after it."""
    count = itertools.count(1)

    def call(own, *args, **more):
        number = next(count)
        result = own(*args, **more) if number != n or n // 2 % 2 else None
        if number == n:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in acts:
            own = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, own=own, **more: call(own, *args, **more))
        yield


def test_an_interruption_at_any_write_or_rename_loses_nothing(painted, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IMAGES_IN_A_PART", 4)
    settings, acts = DRAFTS | {"max_prompts": 1}, [(Path, "write_text"), (Path, "replace"), (Path, "rename")]
    expected = pairs_of(painted(tmp_path / "whole", **settings))
    for n in itertools.count(1):
        try:
            with failing(n, KeyboardInterrupt(), *acts, (pq.ParquetWriter, "write_table"), (shutil, "rmtree")):
                painted(tmp_path / str(n), **settings)
            break  # it does less than n
        except KeyboardInterrupt:
            assert all(pq.read_metadata(file).num_rows for file in tmp_path.glob(f"{n}/[ps]*/*/*.parquet"))
            assert pairs_of(painted(tmp_path / str(n), **settings)) == expected
    assert n > 20


@pytest.mark.parametrize("n", range(1, 6))  # two parts of the pool, two of scores, the pairs
def test_a_full_disk_is_one_line_and_loses_nothing(n, painted, tmp_path):
    out, full = tmp_path / "out", OSError(28, "No space left on device")
    told = r"^cannot write .*\.parquet: No space left on device; .* start again.*\Z"
    with failing(n, full, (pq.ParquetWriter, "write_table")), pytest.raises(data.UserError, match=told):
        painted(out, validation_share=0)
    kept = files_of(out)
    assert (len(kept), list(out.glob("*/*/.*.parquet*"))) == (n - 1, [])
    assert kept.items() <= files_of(painted(out)).items()
    assert whole(out) == whole(painted(tmp_path / "whole"))


def run(out: Path) -> None:
    data.IMAGES_IN_A_PART = 8
    make(out, **DRAFTS)


def test_kills_and_two_starts_at_once(runs, tmp_path):
    context, out = multiprocessing.get_context("forkserver"), tmp_path / "out"
    models = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip"
    context.set_forkserver_preload([__name__, *models])
    for sign, codes in {"pool/draft-*/*.parquet": [-9], "scores/*/*.parquet": [-9], "*": [0, 0]}.items():
        for process in (processes := [context.Process(target=run, args=(out,)) for _ in codes]):
            process.start()
        while not list(out.glob(sign)):
            time.sleep(0.005)
        if sign != "*":
            processes[0].kill()
        assert [(process.join(), process.exitcode)[1] for process in processes] == codes
    assert whole(out) == whole(runs[1])
    assert len(list(out.glob("data/*"))) == 2


def test_a_part_cut_short_is_named_and_made_anew_and_one_that_is_missing_named(painted, tmp_path, monkeypatch):
    before = files_of(out := painted(tmp_path / "out"))
    for part in [*out.glob("pool/*/*.parquet"), *out.glob("scores/*/*.parquet")]:
        part.write_bytes(part.read_bytes()[:-100])
        with pytest.raises(data.UserError, match=rf"^.*{part.name}.*delete the damaged part.*\Z"):
            painted(out)
        part.unlink()
        assert files_of(painted(out)) == before
    part, write = next(out.glob("pool/*/*.parquet")), data.write_whole
    part.unlink()  # and a network folder that shows what another process wrote too late
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(data, "write_whole", lambda path, *args: path == part or write(path, *args))
    with pytest.raises(data.UserError, match=rf"^1 parts are not there, such as {part}: do all processes"):
        painted(out)


def test_a_scorer_that_raises_shows_where_and_costs_no_image(painted, tmp_path, made):
    out, own = tmp_path / "out", tmp_path / "own.py"
    own.write_text(PLUGIN)
    with pytest.raises(ZeroDivisionError) as error:
        make(out, scorer=f"{own}:broken")
    assert str(error.traceback[-1].path) == str(own)
    own.write_text(PLUGIN.replace("1 / 0", "range(len(images))"))
    assert (made()[0], make(out, scorer=f"{own}:broken"), made()[0]) == (8, out, 8)  # the first part alone; the rest
    assert pool_of(out) == pool_of(painted(tmp_path / "whole"))


def test_where_every_draft_is_vetoed_it_says_so(painted, tmp_path):
    (own := tmp_path / "own.py").write_text("def none(device): return lambda images, prompts: [None] * len(images)\n")
    with pytest.raises(data.UserError, match="every draft is vetoed"):
        painted(tmp_path / "out", scorer=f"{own}:none", **DRAFTS)


def test_what_is_not_finite_is_on_neither_side_and_counted(painted, red, tmp_path, monkeypatch, capsys):
    odd = pairs_of(painted(tmp_path / "odd", scorer=red.replace("redness", "odd")))
    assert sorted(sides(pair, "score") for pair in odd) == [[2, 1], [2, 1], [4, 3], [4, 3]]
    assert data.read_record(tmp_path / "odd")["vetoed"] == {"odd": 8}
    before, paint = pairs_of(painted(tmp_path / "whole")), data.sample
    seeds = [sides(pair, "seed")[0] for pair in before]

    def overflow(bad, *args, **more):
        is_bad = torch.tensor([bad is None or seed in bad for seed in args[4]]).view(-1, 1, 1, 1)
        return torch.where(is_bad, torch.nan, paint(*args, **more)[0]), paint(*args, **more)[1]

    monkeypatch.setattr(data, "sample", partial(overflow, seeds))
    pairs = pairs_of(out := painted(tmp_path / "out"))
    assert "vetoed     4 of 16 by redness: " in capsys.readouterr().out
    assert [row["seed"] for row in pool_of(out).values() if row["jpg"] is None] == seeds
    assert [sides(pair, "seed")[1] for pair in pairs] == [sides(pair, "seed")[1] for pair in before]
    assert not {sides(pair, "seed")[0] for pair in pairs} & set(seeds)
    monkeypatch.setattr(data, "sample", partial(overflow, None))
    with pytest.raises(data.UserError):
        painted(tmp_path / "nan")
    assert len(pool_of(tmp_path / "nan")) == 8  # a model that gives nothing else is stopped after its first part


def test_a_models_content_is_its_name(tmp_path):
    def key(model: Path, **settings) -> str:
        words = flags({"model": model, "prompts": "none", "resolution": 64} | settings)
        return data.load_sampler(data.parse_args(words))[3]

    copy = shutil.copytree(PIPELINE, tmp_path / "copy")
    assert (own := key(PIPELINE)) == key(copy) == key(copy.rename(tmp_path / "renamed"))
    others = [key(PIPELINE, mixed_precision="fp16"), key(with_scheduler(PIPELINE, tmp_path / "x", solver_order=3))]
    for part in ("unet", "vae", "text_encoder"):
        file = next((shutil.copytree(PIPELINE, tmp_path / part) / part).glob("*.safetensors"))
        tensors = load_file(file)
        tensors[max(tensors, key=lambda name: tensors[name].numel())] *= 1.01
        save_file(tensors, file, {"format": "pt"})
        others.append(key(tmp_path / part))
    assert len({own, *others}) == 6


def test_a_draft_starts_where_the_full_run_does_and_foretells_it():
    pipe, family, deis = load(PIPELINE), data.UNet(), {"algorithm_type": "deis", "solver_type": "logrho"}
    config, text = pipe.scheduler.config, data.encode_prompts(pipe, family, CAPTIONS[:1], "", guided=False)
    for name, spacing in itertools.product(("DPMSolverMultistep", "EulerDiscrete", "DEISMultistep"), SPACINGS):
        kind, own = getattr(diffusers, f"{name}Scheduler"), deis if "DEIS" in name else {}
        full = kind.from_config(config, timestep_spacing=spacing, **own)
        drafts, images = data.draft_sampler(full, 8), []
        for pipe.scheduler, steps in ((full, 8), (drafts, 4)):
            options = {"num_inference_steps": steps, "guidance_scale": 1}
            images.append(data.sample(pipe, family, text, [0, 0], [0, 1], 64, 64, **options)[0])
        assert float(drafts.timesteps[0]) == pytest.approx(float(full.timesteps[0]), abs=0.5)
        distance = (images[1][:, None] - images[0]).abs().flatten(2).mean(dim=2)
        assert distance.argmin(dim=1).tolist() == [0, 1]
        assert distance.diag().mean() < distance.mean() / 2


def test_samplers_that_draw_noise_have_no_drafts(painted, tmp_path, monkeypatch):
    kinds = ["EulerAncestralDiscrete", "DDPM", "SASolver", "KDPM2AncestralDiscrete", "DDIM", "HeunDiscrete", "PNDM"]
    samplers = [getattr(diffusers, f"{name}Scheduler")() for name in kinds]
    samplers.append(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    assert list(map(data.draws_fresh_noise, samplers)) == [True] * 4 + [False] * 3 + [True]
    default = {"draft_steps": False, "num_inference_steps": 10, "num_images_per_prompt": 20, "max_prompts": 1}
    assert len(pool_of(painted(tmp_path / "drafted", **default))) == 4
    monkeypatch.setattr(data.UNet, "sampler", lambda self, pipe: samplers[0].from_config(pipe.scheduler.config))
    with pytest.raises(data.UserError, match=r"EulerAncestralDiscreteScheduler draws fresh noise.*--draft_steps 0"):
        painted(tmp_path / "out", **DRAFTS)
    assert len(pool_of(painted(tmp_path / "out", **default))) == 20
