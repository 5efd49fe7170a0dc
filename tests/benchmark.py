# SPDX-License-Identifier: Apache-2.0
"""Measures what the scripts cost, beside others' code and beside a floor: the same arithmetic and nothing else.

    python tests/benchmark.py data                                  the embedded world
    python tests/benchmark.py data --model YOUR_MODEL --resolution 512 --guidance_scale 5 --steps 50        on a GPU
    python tests/benchmark.py price                   an hour and a half on two cores; a second start carries on
    python tests/benchmark.py eval --threads 1                      ten minutes on one core
    curl -O https://raw.githubusercontent.com/huggingface/diffusers/main/examples/research_projects/diffusion_dpo/train_diffusion_dpo.py
    python tests/benchmark.py train --peer train_diffusion_dpo.py --resolution 512 --mixed_precision bf16 --steps 20
    python tests/full_size_model.py sd3 --sd3 && python tests/benchmark.py train --model sd3 -- --gradient_checkpointing

Rounds alternate; a ratio is the median of the rounds' ratios. Flags after -- go to our script, which `train` then runs
with and without them. "CPU s" is the time that all threads worked: less than s it depends on what else a machine does.

train   a step, from the end of one to that of the next, of diffusers' trainer (SD 1.x and 2.x alone), ours, and the
        floor: of the same model and LoRA on tensors that are ready, a forward pass without gradients, one with, and
        back. The first is a warm-up. Memory is the peak after it, of the process, or of what torch holds on the GPU.
data    images/s, models loaded: pipe(prompt, num_images_per_prompt=N) with the scorer's model card's code and a PNG for
        each image; ours with N full images, files, scores and pairs; the floor: pipe, VAE and scorer.
price   of a pair from N full images or from drafts: FLOPs of denoiser and VAE, and the score gap, as shares of those of
        N full images, and what the held-out judge says of it. 95 % bootstrap intervals over prompts.
eval    seconds, after a warm-up: all of eval_human.main, one prompt in three with two images; the floor: base's and the
        LoRA's images by pipe and VAE, and the scorers on them, in memory.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial, reduce
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of all runs: ours asks for it
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import accelerate  # noqa: F401
import datasets  # noqa: F401
import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from tiny_human import figures as people
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModel, AutoProcessor
from transformers.utils import is_torchvision_available

import eval_human as ev
import make_preference_data as maker


WORLD, OURS = TESTS / "tiny_human", str(TESTS.parent / "train_dpo_human.py")
SCORER, JUDGE = f"pickscore={WORLD / 'scorer'}", f"{WORLD / 'judge.py'}:judge"
RANK, BETA = 8, 2500
TRANSFORMS = SimpleNamespace(  # what the peer takes from torchvision
    InterpolationMode=Image.Resampling,
    Compose=lambda parts: lambda image: reduce(lambda value, part: part(value), parts, image),
    Resize=lambda size, interpolation: lambda image: ImageOps.cover(image, (size, size), interpolation),
    CenterCrop=lambda size: lambda image: ImageOps.fit(image, (size, size)),
    RandomHorizontalFlip=lambda: lambda image: ImageOps.mirror(image) if torch.rand(()) < 0.5 else image,
    ToTensor=lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255,
    Normalize=lambda mean, std: lambda pixels: (pixels - mean[0]) / std[0],
)
Figures = dict[str, float]  # of one run, by name and unit


# ---- Measuring ------------------------------------------------------------------------------------------------------


def mark() -> Any:
    """This moment, on the GPU's own clock where there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: list[Any]) -> list[float]:
    """The time from each mark to the next."""
    if not torch.cuda.is_available():
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]


def now() -> np.ndarray:
    """Seconds of the clock, when the GPU has done its work, and those that all threads of this process worked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


@contextlib.contextmanager
def noted_calls(module: ModuleType, *names: str) -> Iterator[dict[str, list[tuple[np.ndarray, np.ndarray]]]]:
    """Notes for these functions of a module when each call began and ended."""
    calls: dict[str, list] = {name: [] for name in names}

    def call(name: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        start = now()
        result = function(*arguments, **options)
        calls[name].append((start, now()))
        return result

    with mock.patch.multiple(module, **{name: partial(call, name, getattr(module, name)) for name in names}):
        yield calls


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {"device": device} | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def in_process(measure: Callable, args: argparse.Namespace, **changes: Any) -> Figures:
    """What `measure` returns in a process of its own, which has no other run's memory and caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(quietly, measure, argparse.Namespace(**vars(args) | changes)).result()


def quietly(function: Callable, *arguments: Any) -> Any:
    """What the function returns; what it prints is shown only if it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return function(*arguments)
    except BaseException:
        print(printed.getvalue()[-4000:], file=sys.stderr)
        raise


def compare(args: argparse.Namespace, runs: dict[str, Callable[[], Figures]]) -> None:
    """Runs everything once a round, in turn, and prints it; then the medians and ours' ratios to all others."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows = []
    for number in range(1, args.rounds + 1):
        for name, run in runs.items():
            shutil.rmtree(args.work / "out", ignore_errors=True)
            figures = run()
            told = "".join(f"{value:9.4g} {key}" for key, value in figures.items())
            print(f"round {number}, {name:8}{told}", flush=True)
            rows.append({"run": name, "round": number, **figures})
    table = pd.DataFrame(rows).set_index(["run", "round"])
    medians = table.groupby("run").median()
    print(f"\nMedians of {args.rounds} rounds; ours / another: the median of the rounds' ratios, and each")
    for figure, other in product(table, [name for name in runs if name != "ours"]):
        ratios = table.loc["ours", figure] / table.loc[other, figure]
        if ratios.notna().all():
            ours, theirs = (f"{name} {medians.loc[name, figure]:<10.4g}" for name in ("ours", other))
            each = " ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"{figure:14}{ours}{theirs}ours / {other} {ratios.median():.3f} ({each})")


# ---- train ----------------------------------------------------------------------------------------------------------


class StepClock:
    """Called at the end of each step of an optimiser; the first is a warm-up, and what only it needed is forgotten."""

    def __init__(self) -> None:
        self.marks, self.cpu, self.memory = [], [], 0.0

    def __call__(self, *_: Any) -> None:
        self.marks.append(mark())
        self.cpu.append(time.process_time())
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            self.memory = torch.cuda.max_memory_allocated() / 2**30
        else:  # not ru_maxrss, which a process inherits from the one that started it
            self.memory = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
        if len(self.marks) == 1:
            torch.cuda.reset_peak_memory_stats() if on_gpu else Path("/proc/self/clear_refs").write_text("5")

    def figures(self, args: argparse.Namespace) -> Figures:
        """Medians over the steps, and the peak of memory after the first."""
        if len(self.marks) != args.steps:
            raise RuntimeError(f"the optimiser made {len(self.marks)} steps, not {args.steps}")
        step, cpu = np.median(seconds_between(self.marks)), np.median(np.diff(self.cpu))
        pairs = args.train_batch_size / step
        return {"s/step": step, "pairs/s": pairs, "CPU s/step": cpu, "training GiB": self.memory}


def script_steps(args: argparse.Namespace) -> Figures:
    """The training script `args.script` as it is, with a mark after every step of its optimiser."""
    is_torchvision_available()  # it remembers that it is not there, as the libraries above do: now the stand-ins
    for name, content in {"torchvision": {"transforms": TRANSFORMS}, "wandb": {}}.items():
        if args.script == args.peer and importlib.util.find_spec(name) is None:
            sys.modules[name] = module = ModuleType(name)
            vars(module).update(content, __spec__=ModuleSpec(name, None))
    sys.argv = [
        args.script, f"--pretrained_model_name_or_path={args.model}", f"--output_dir={args.work}/out",
        f"--resolution={args.resolution}", f"--train_batch_size={args.train_batch_size}", f"--rank={RANK}",
        f"--max_train_steps={args.steps}", f"--checkpointing_steps={args.steps + 1}", f"--beta_dpo={BETA}",
        f"--mixed_precision={args.mixed_precision}", "--learning_rate=1e-5", "--seed=0", *args.flags,
    ]  # fmt: skip
    clock = StepClock()
    register_optimizer_step_post_hook(clock)
    runpy.run_path(args.script, run_name="__main__")
    return clock.figures(args)


def floor_steps(args: argparse.Namespace) -> Figures:
    """The two forward passes and the backward pass that a step consists of, and nothing else."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    is_sd3 = Path(args.model, "transformer").is_dir()
    load = partial(diffusers.AutoModel.from_pretrained, args.model, disable_mmap=True)  # mapped weights are memory too
    model = load(subfolder="transformer" if is_sd3 else "unet").requires_grad_(False).to(device, dtype).train()
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    cast_training_params(model)

    config = model.config
    vae, clip = (json.loads(Path(args.model, part, "config.json").read_text()) for part in ("vae", "text_encoder"))
    count, side = 2 * args.train_batch_size, args.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    randn = partial(torch.randn, count, device=device, dtype=dtype)
    x_t, target = (randn(config.in_channels, side, side) for _ in range(2))
    tokens = clip["max_position_embeddings"] + 256 * is_sd3  # T5's, zeros where it is not there
    width = config.joint_attention_dim if is_sd3 else config.cross_attention_dim
    inputs = {"timestep": torch.randint(1000, (count,), device=device), "encoder_hidden_states": randn(tokens, width)}
    if is_sd3:
        inputs["pooled_projections"] = randn(config.pooled_projection_dim)
    elif config.addition_embed_type == "text_time":  # SDXL
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": randn(width), "time_ids": randn(6)}

    def winner_less_loser() -> torch.Tensor:
        with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
            prediction = model(x_t, **inputs, return_dict=False)[0]
        err_w, err_l = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3)).chunk(2)
        return err_w - err_l

    clock = StepClock()
    for _ in range(args.steps):
        model.disable_adapters()
        with torch.no_grad():
            reference = winner_less_loser()
        model.enable_adapters()
        F.softplus(BETA * (winner_less_loser() - reference)).mean().backward()
        model.zero_grad()
        clock()
    return clock.figures(args)


def train(args: argparse.Namespace) -> None:
    """A training step of the peer's, ours, and the floor."""
    from full_size_model import build

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(args.work / "cache")}
    if not args.model:
        args.model = args.work / "sd15-random"
        torch.manual_seed(0)
        build().save_pretrained(args.model)  # fp32: transformers loads a text encoder as it is stored

    pairs, rows = args.work / "pairs", []  # drawn people, right against broken, in Pick-a-Pic's columns
    for i in range(2 * args.steps * args.train_batch_size):
        attributes = people.all_attributes()[37 * i % len(people.all_attributes())]
        rows.append({"caption": people.write_caption(attributes)})
        for side in (0, 1):
            image = people.draw(attributes, i, None if side == i % 2 else "extra_arm").image
            image.resize((args.resolution, args.resolution)).save(file := io.BytesIO(), "JPEG", quality=95)
            rows[-1] |= {f"jpg_{side}": file.getvalue(), f"label_{side}": float(side == i % 2)}
    (pairs / "data").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(pairs / "data" / "train-00000-of-00001.parquet")

    ours = [f"--train_data_dir={pairs}", "--report_to=none", "--no-run_validation"]
    theirs = [f"--dataset_name={pairs}", "--dataset_split_name=train"]
    run_script = partial(in_process, script_steps, args)
    runs = {"peer": partial(run_script, script=args.peer, flags=theirs)} if args.peer else {}
    runs |= {"ours": partial(run_script, script=OURS, flags=ours), "floor": partial(in_process, floor_steps, args)}
    if args.extra:
        runs[" ".join(["ours", *args.extra])] = partial(run_script, script=OURS, flags=[*ours, *args.extra])
    compare(args, runs)


# ---- data -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def floor(script: ModuleType, args: argparse.Namespace, images: pd.DataFrame, models: dict, scorers: list) -> Any:
    """What images (model, prompt, seed) take (see `now`) in a script's batches, by pipe(embeddings that are ready),
    VAE and scorers, without loading; `models`: what loads each pipeline."""
    device, spent, pictures = script.start_processes().device, np.zeros(2), []
    size = {"height": args.resolution, "width": args.resolution}
    options = size | {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    for name, load in models.items():
        pipe, family, *_ = load()
        pipe.to(device)
        own = images[images.model == name]
        for _, batch in own.groupby(np.arange(len(own)) // args.batch_size):
            text = script.encode_prompts(pipe, family, [*batch.prompt], "", True)
            text = {key: value.expand(len(batch), *value.shape[1:]) for key, value in text.items()}
            generators = [torch.Generator().manual_seed(seed) for seed in batch.seed]
            start = now()
            latents = pipe(**text, **options, generator=generators, output_type="latent").images
            latents = family.unpack(pipe, latents, **size).split(max(1, 512 * 512 // args.resolution**2))
            pixels = torch.cat([family.to_pixels(pipe, some).float() for some in latents])
            pictures += pipe.image_processor.postprocess(pixels, output_type="pil")
            spent += now() - start
    del pipe
    for scorer in scorers:
        score = scorer.load(device)
        start = now()
        for first in range(0, len(pictures), args.batch_size):
            part = slice(first, first + args.batch_size)
            score(pictures[part], [*images.prompt[part]])
        spent += now() - start
    return spent


def flags_of(args: argparse.Namespace, **own: object) -> list[str]:
    """The command line of make_preference_data.py or eval_human.py: what both have, then each one's own."""
    both = {
        "pretrained_model_name_or_path": args.model,
        "num_inference_steps": args.steps,
        "max_prompts": args.prompts,
    }
    both |= {name: getattr(args, name) for name in ("resolution", "guidance_scale", "batch_size")}
    return [*(f"--{name}={value}" for name, value in (both | own).items()), *args.extra]


def data_args(args: argparse.Namespace, output: Path, **own: object) -> argparse.Namespace:
    """make_preference_data.py's settings for a pool of `args`."""
    own |= {"prompts": WORLD / "prompts_train.txt", "scorer": SCORER, "output_dir": output}
    return maker.parse_args(flags_of(args, num_images_per_prompt=args.images, **own))


def loop_images(args: argparse.Namespace) -> np.ndarray:
    """What everybody writes: a call of the pipeline for each prompt, the model card's code for each image, a file."""
    folder = Path(tempfile.mkdtemp(dir=args.work))
    ours = data_args(args, folder)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype, safety_checker=None).to(device)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    scorer = ours.scorer[0].partition("=")[2]
    processor = AutoProcessor.from_pretrained(scorer, backend="pil")
    model = AutoModel.from_pretrained(scorer, dtype=torch.float32).eval().to(device)
    padding = {"padding": True, "truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    options |= {"height": args.resolution, "width": args.resolution, "num_images_per_prompt": args.images}
    start = now()
    for number, prompt in enumerate(maker.read_prompts(ours.prompts, None, args.prompts)[0].prompt):
        images = pipe(prompt, **options, generator=torch.Generator(device).manual_seed(number)).images
        for index, image in enumerate(images):
            inputs = processor(text=prompt, images=image, return_tensors="pt", **padding).to(device)
            with torch.no_grad():
                model(**inputs).logits_per_image.item()
            image.save(folder / f"{number}-{index}.png")
    return now() - start


def our_images(args: argparse.Namespace) -> np.ndarray:
    """The script as it is, from the model being loaded to the pairs being written, without loading the scorer."""
    with noted_calls(maker, "load_sampler", "load_scorer", "write_pairs") as calls:
        maker.main(data_args(args, args.work / "out", draft_steps=0))
    (_, loaded), (_, written) = calls["load_sampler"][0], calls["write_pairs"][-1]
    return written - loaded - sum(end - start for start, end in calls["load_scorer"])


def floor_images(args: argparse.Namespace) -> np.ndarray:
    """The denoiser, the sampler, the VAE and the scorer, in ours' batches."""
    ours = data_args(args, args.work / "out")
    prompts = maker.read_prompts(ours.prompts, None, args.prompts)[0].prompt.repeat(args.images)
    images = pd.DataFrame({"model": "base", "prompt": prompts.to_list(), "seed": range(len(prompts))})
    models, scorers = {"base": partial(maker.load_sampler, ours)}, maker.parse_scorers(ours.scorer, {})
    return floor(maker, ours, images, models, scorers)


def data(args: argparse.Namespace) -> None:
    """Images per second of the usual loop, of ours and of the floor."""

    def run(measure: Callable) -> Figures:
        seconds, cpu = in_process(measure, args) / (args.prompts * args.images)
        return {"images/s": 1 / seconds, "CPU s/image": cpu}

    measures = {"loop": loop_images, "ours": our_images, "floor": floor_images}
    compare(args, {name: partial(run, measure) for name, measure in measures.items()})


# ---- price ----------------------------------------------------------------------------------------------------------


def scored_pools(args: argparse.Namespace, folder: Path, **own: object) -> list[pd.DataFrame]:
    """The pools that the script makes, drafts first: caption, index, jpg and score of each image, by prompt."""
    maker.main(data_args(args, folder, validation_share=0, **own))
    scores = maker.read_parts(folder.glob("scores/*/*.parquet"), "score").to_pandas().set_index("image_id")
    pools = []
    for pool in sorted(folder.glob("pool/*")):
        images = maker.read_parts(pool.glob("*.parquet"), "caption", "index", "jpg").to_pandas().set_index("image_id")
        pools.append(images.join(scores["score"]).sort_values(["caption", "index"]))
    return pools


def interval(values: np.ndarray) -> str:
    """The mean of (P,) or the ratio of means of (P, 2), with its 95 % bootstrap interval over prompts."""
    draws = values[np.random.default_rng(0).integers(0, len(values), (4000, len(values)))].mean(axis=1)
    centre = values.mean(axis=0)
    if values.ndim == 2:
        draws, centre = draws[:, 0] / draws[:, 1], centre[0] / centre[1]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{centre:6.3f} [{low:.3f}, {high:.3f}]"


def price(args: argparse.Namespace) -> None:
    """Score gap and truth of pairs against FLOPs of denoiser and VAE, with N images in full and with drafts."""
    judge = maker.parse_scorer(JUDGE, {}).load("cpu")
    (full,) = scored_pools(args, Path(args.work_dir, "full"), draft_steps=0)
    gaps = full.groupby("caption").score.agg(np.ptp)
    flags = data_args(args, args.work)
    pipe, family, *_ = maker.load_sampler(flags)
    denoiser, decoder = maker.count_flops(pipe, family, flags)

    def cost(images: int, steps: int) -> float:
        return images * ((1 + (args.guidance_scale > 1)) * steps * denoiser + decoder)

    def tell(name: str, flops: float, images: pd.DataFrame) -> None:
        groups = images.groupby("caption").score
        pairs = [images.loc[[*ids]] for ids in zip(groups.idxmax(), groups.idxmin(), strict=True)]
        winner, loser = np.transpose([judge([*map(maker.from_jpeg, pair.jpg)], [*pair.caption]) for pair in pairs])
        gap = interval(np.stack([groups.agg(np.ptp), gaps[groups.max().index]], axis=1))
        better, margin = interval((winner > loser) + 0.5 * (winner == loser)), interval(winner - loser)
        share = flops / cost(args.images, args.steps)
        print(f"{name:24}FLOPs{share:6.3f}   gap {gap}   truly better {better}   judge's margin {margin}", flush=True)

    print(f"{args.prompts} prompts, {args.images} images of {args.steps} steps, guidance {args.guidance_scale}")
    for count in (args.images, 10, 4):
        tell(f"{count} in full", cost(count, args.steps), full[full["index"] < count])
    few = argparse.Namespace(**vars(args) | {"images": args.draft_images, "steps": args.final_steps})
    folder = Path(args.work_dir, f"drafts-{args.draft_steps}")
    drafts, images = scored_pools(few, folder, draft_steps=args.draft_steps, finalists=3)
    both = drafts.merge(full, on=["caption", "index"], suffixes=("_draft", "_full")).groupby("caption")
    ranks = both.apply(lambda one: one.score_draft.corr(one.score_full, method="spearman")).to_numpy()
    print(f"{args.draft_images} drafts of {args.draft_steps}: Spearman with the full scores {interval(ranks)}")
    for per_side in (1, 2, 3):
        best = [one.iloc[maker.finalists(one.score.to_numpy(), per_side)] for _, one in drafts.groupby("caption")]
        among = images.merge(pd.concat(best)[["caption", "index"]], on=["caption", "index"])
        flops = cost(args.draft_images, args.draft_steps) + cost(2 * per_side, args.final_steps)
        tell(f"  and {2 * per_side} of {args.final_steps} steps", flops, among)


# ---- eval -----------------------------------------------------------------------------------------------------------


def write_lora(model: str, folder: Path) -> Path:
    """A LoRA of RANK with random weights for the U-Net of a pipeline."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    state = {key: 0.02 * torch.randn_like(value) for key, value in get_peft_model_state_dict(unet).items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def bare_eval(line: list[str]) -> Figures:
    """Seconds of drawing base's and the LoRA's images and of scoring them, all in memory."""
    args = ev.parse_args(line)
    images, _ = ev.plan_images(args, ev.read_prompts(args.prompts, None, args.max_prompts)[0])
    models = {model.name: partial(ev.load_pipeline, args, model) for model in args.models}
    return {"s": floor(ev, args, images, models, ev.parse_scorers(args.scorers, {}))[0]}


def whole_eval(line: list[str]) -> Figures:
    """Seconds of all of eval_human.main, and of its parts."""
    parts = {"images": "draw_missing", "measures": "measure_missing", "report": "write_report"}
    start = now()
    with noted_calls(ev, *parts.values()) as calls:
        ev.main(ev.parse_args(line))
    whole, _ = now() - start
    return {"s": whole} | {f"{part} s": sum(b[0] - a[0] for a, b in calls[name]) for part, name in parts.items()}


def evaluate(args: argparse.Namespace) -> None:
    """eval_human.py, and bare drawing and scoring, in one process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    lora = args.lora or write_lora(args.model, args.work / "lora")

    def run(measure: Callable[[list[str]], Figures], prompts: int = args.prompts) -> Figures:
        own = {"prompts": WORLD / "prompts_test.txt", "max_prompts": prompts, "diversity_prompts": prompts // 3}
        own |= {"training_scorer": "pickscore", "feature_model": WORLD / "scorer", "output_dir": args.work / "out"}
        several = ["--models", "base", f"dpo={lora}", "--scorers", SCORER, JUDGE]
        return quietly(measure, [*several, *flags_of(args, **own)])

    for measure in (bare_eval, whole_eval):  # the warm-up
        run(measure, min(args.prompts, args.batch_size))
    compare(args, {"floor": partial(run, bare_eval), "ours": partial(run, whole_eval)})


# ---- Command line ---------------------------------------------------------------------------------------------------


COMMANDS = {"train": train, "data": data, "price": price, "eval": evaluate}
MODEL = {"model": str(WORLD / "pipeline"), "resolution": 64, "batch_size": 32}
FLAGS = {  # with their defaults, beside --rounds; train without --model: SD 1.5's architecture, random weights
    "train": {"peer": "", "model": "", "resolution": 256, "train_batch_size": 1, "mixed_precision": "no", "steps": 4},
    "data": MODEL | {"prompts": 16, "images": 20, "steps": 6, "guidance_scale": 1.2},
    "price": MODEL | {"prompts": 128, "images": 20, "steps": 50, "guidance_scale": 3.0, "work_dir": "price"},
    "eval": MODEL | {"prompts": 64, "steps": 20, "guidance_scale": 3.0, "lora": "", "threads": 0},
}
FLAGS["price"] |= {"draft_images": 24, "draft_steps": 5, "final_steps": 20}


def main() -> None:
    """Reads the command line and calls the sub-command's function."""
    line = [*sys.argv[1:], "--"]
    end = line.index("--")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in COMMANDS.items():
        flag = commands.add_parser(command, help=function.__doc__, allow_abbrev=False).add_argument
        for name, default in (FLAGS[command] | {"rounds": 4}).items():
            flag(f"--{name}", type=type(default), default=default, help=f"default: {default!r}")
    args = parser.parse_args(line[:end])
    args.extra = line[end + 1 : -1]
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
