# SPDX-License-Identifier: Apache-2.0
"""Measures what the scripts cost. `train` runs diffusers' train_diffusion_dpo.py and ours side by side, `data` the
loop that everybody writes and make_preference_data.py, `price` what a pair costs with drafts and without, `memory` what
many prompts take, `eval` eval_human.py and the bare drawing and scoring in it.

    python tests/benchmark.py data                                           the embedded world
    python tests/benchmark.py data --model YOUR_MODEL --resolution 512 --guidance_scale 5 --steps 50    on a GPU
    python tests/benchmark.py price --work_dir price          an hour and a half on two cores; a second start carries on
    python tests/benchmark.py memory                         1,000 and 10,000 prompts, with stand-ins for the models
    python tests/benchmark.py eval --threads 1               the embedded world, ten minutes on one core
    python tests/full_size_model.py sd15-random && python tests/benchmark.py eval --model sd15-random --resolution 512
    python tests/benchmark.py eval --prompts 32 64 --steps 4 --threads 1      what does not grow with the prompts

    curl -O https://raw.githubusercontent.com/huggingface/diffusers/main/examples/research_projects/diffusion_dpo/train_diffusion_dpo.py
    python tests/benchmark.py train --peer train_diffusion_dpo.py --variants 8bit lora_layers_all
    python tests/benchmark.py train --peer train_diffusion_dpo.py --resolution 512 --train_batch_size 4 \\
        --mixed_precision bf16 --steps 20 --output benchmark.json                                   on a GPU
    python tests/full_size_model.py sd3-random --sd3 && python tests/benchmark.py train --model sd3-random \\
        --resolution 1024 --mixed_precision bf16 --steps 20                on a GPU; or sdxl-random --sdxl
    python tests/benchmark.py train --peer train_diffusion_dpo.py --model tests/tiny_human/pipeline --resolution 64

`train`, in alternating rounds, each run a process of its own: the peer (it trains SD 1.x and 2.x alone), ours, and the floor: the same
U-Net or transformer with the same LoRA, one forward pass without gradients and one with, and back, on tensors that are
ready. Same weights (without --model the full SD 1.5 architecture with random ones), pairs, batch, precision, rank and
steps. Ours encodes images and captions before its first step; the peer does in every step.

- A step lasts from the end of one optimiser step to the end of the next; a run's figure is the median, and the first
  step, a warm-up, is left out. On a GPU the marks are CUDA events, which do not make the script wait. "CPU s" is the
  time that all threads worked: it depends less on what else the machine does, though not nothing. On a busy one take
  many rounds, and OMP_NUM_THREADS=1.
- Memory is what the process holds (on a GPU: what torch has allocated there). "Training" is the peak between the first
  and the last optimiser step, when what only the start needed is gone; "peak" is that of the whole run. Weights that
  are read by memory-mapping count until the last of their file is let go, copies in another layout come on top; the
  floor reads them without, so that its training memory is what a step needs.
- The peer needs torchvision, wandb and tensorboard. It gets stand-ins for the first two (the same image operations, by
  Pillow), because neither is needed here otherwise. All three wait passively for their threads, as ours asks for.

Linux, for the memory of a CPU run.

`data`: images per second of the whole, models loaded before. "loop" is pipe(prompt, num_images_per_prompt=N), the code
of the scorer's model card for each image, and a PNG for each; "ours" is the script with N full images, their files,
scores and pairs; "floor" is nothing but the denoiser, the sampler's step, the VAE and the scorer, in the same batches as
ours, on embeddings that are ready.

`price`: for each prompt N images in full, then drafts and finalists as the script draws them. Told are the FLOPs of
denoiser and VAE as a share of the first, the score gap between winner and loser as a share of the full pool's, and what
the held-out judge says: how often the winner is truly better, and by how much. 95 % bootstrap intervals over prompts.

`eval`, both in one process, after a warm-up: "floor" is pipe(embeddings that are ready) for base and a LoRA in ours'
batches, and each scorer's function on these images, which stay in memory; its loading is told but not counted. "ours" is
all of eval_human.main: loading, PNG, scorers, colour, diversity, statistics, report, pictures. One prompt in three has
two images, as by default. The warm-up says what is alive once each model is loaded.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial, reduce
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
OURS = TESTS.parent / "train_dpo_human.py"
PROMPTS = TESTS / "tiny_human" / "prompts_train.txt"
SCORER = f"pickscore={TESTS / 'tiny_human' / 'scorer'}"
RANK, BETA, LEARNING_RATE = 8, 2500, 1e-5
RATIOS = [  # of what to what, which figure, and the bar
    ("ours", "peer", "pairs/s", ">=", 1.45),
    ("ours", "floor", "s/step", "<=", 1.03),
    ("ours", "peer", "training GiB", "<=", 0.85),
    ("ours", "floor", "training GiB", "", 0),
    ("ours", "peer", "CPU s/step", "", 0),
    ("ours", "floor", "CPU s/step", "", 0),
]
VARIANTS = {
    "compile": "--compile",
    "8bit": "--use_8bit_adam",
    "gradient_checkpointing": "--gradient_checkpointing",
    "xformers": "--enable_xformers_memory_efficient_attention",
    "lora_layers_all": "--lora_layers=all",
}
TRANSFORMS = SimpleNamespace(  # what the peer takes from torchvision
    InterpolationMode=Image.Resampling,
    Compose=lambda parts: lambda image: reduce(lambda value, part: part(value), parts, image),
    Resize=lambda size, interpolation: (
        lambda image: image.resize([size * side // min(image.size) for side in image.size], interpolation)
    ),
    CenterCrop=lambda size: lambda image: ImageOps.fit(image, (size, size)),
    RandomHorizontalFlip=lambda: lambda image: ImageOps.mirror(image) if torch.rand(()) < 0.5 else image,
    ToTensor=lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255,
    Normalize=lambda mean, std: lambda pixels: (pixels - mean[0]) / std[0],
)


# ---- Measuring, in a process of its own -----------------------------------------------------------------------------


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


def peak_memory() -> float:
    """The most memory since the start, or since forget_peak, in GiB.

    Not ru_maxrss, which a process inherits from the one that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    """Lets peak_memory begin anew at what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


class Clock:
    """What each step of an optimiser takes, called at its end; the first step is a warm-up."""

    def __init__(self) -> None:
        self.marks, self.cpu, self.before, self.training = [], [], 0.0, 0.0

    def __call__(self, *_: Any) -> None:
        self.marks.append(mark())
        self.cpu.append(time.process_time())
        if len(self.marks) == 1:
            self.before = peak_memory()
            forget_peak()
        else:
            self.training = peak_memory()

    def figures(self) -> dict[str, Any]:
        """Seconds and CPU seconds of each step; the peaks of memory between the first and the last, and of all."""
        cpu_steps = [after - before for before, after in pairwise(self.cpu)]
        times = {"steps": seconds_between(self.marks), "cpu_steps": cpu_steps}
        return {**times, "training": self.training, "peak": max(self.before, self.training, peak_memory())}


def timed_script(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a training script as it is, with a mark after every step of its optimiser."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    clock = Clock()
    register_optimizer_step_post_hook(clock)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    return clock.figures()


def timed_peer(script: str, *arguments: str) -> dict[str, Any]:
    """The same, with stand-ins for torchvision and wandb once every library has seen that they are not there."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # remembers its answer
    for name, content in {"torchvision": {"transforms": TRANSFORMS}, "wandb": {}}.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = module = ModuleType(name)
            vars(module).update(content, __spec__=ModuleSpec(name, None))
    return timed_script(script, *arguments)


def timed_floor(settings: str) -> dict[str, Any]:
    """The two forward passes and the backward pass that a step consists of, and nothing else."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel
    from peft import LoraConfig

    args = SimpleNamespace(**json.loads(settings))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    is_sd3 = Path(args.model, "transformer").is_dir()
    kind, part = (SD3Transformer2DModel, "transformer") if is_sd3 else (UNet2DConditionModel, "unet")
    model = kind.from_pretrained(args.model, subfolder=part, disable_mmap=True)
    model.requires_grad_(False).to(device, dtype)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()
    model.train()
    if args.compile:
        model.compile()

    config, vae = model.config, json.loads(Path(args.model, "vae", "config.json").read_text())
    count, side = 2 * args.train_batch_size, args.resolution // 2 ** (len(vae["block_out_channels"]) - 1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, device=device, dtype=dtype)

    x_t, target = (randn(config.in_channels, side, side) for _ in range(2))
    inputs = {"timestep": torch.randint(1000, (count,), device=device)}
    if is_sd3:  # 77 tokens of the CLIPs and 256 of T5, zeros where it is not there
        inputs["encoder_hidden_states"] = randn(77 + 256, config.joint_attention_dim)
        inputs["pooled_projections"] = randn(config.pooled_projection_dim)
    else:
        text = json.loads(Path(args.model, "text_encoder", "config.json").read_text())
        inputs["encoder_hidden_states"] = randn(text["max_position_embeddings"], config.cross_attention_dim)
    if config.get("addition_embed_type") == "text_time":  # SDXL
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": randn(width), "time_ids": randn(6)}

    def winner_less_loser() -> torch.Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            prediction = model(x_t, **inputs, return_dict=False)[0]
        err_w, err_l = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3)).chunk(2)
        return err_w - err_l

    clock = Clock()
    for _ in range(args.steps):
        model.disable_adapters()
        with torch.no_grad():
            reference = winner_less_loser()
        model.enable_adapters()
        F.softplus(BETA * (winner_less_loser() - reference)).mean().backward()
        for weight in trained:
            weight.grad = None
        clock()
    return clock.figures()


MEASURES = {"_peer": timed_peer, "_ours": timed_script, "_floor": timed_floor}


# ---- What is run ----------------------------------------------------------------------------------------------------


def make_pairs(folder: Path, count: int, resolution: int) -> None:
    """A folder of `count` pairs of drawn people, right against broken, with Pick-a-Pic's columns."""
    import datasets
    from tiny_human import figures

    def picture(attributes: dict[str, str], broken: str | None) -> bytes:
        file = io.BytesIO()
        image = figures.draw(attributes, rng.getrandbits(32), broken).image
        image.resize((resolution, resolution)).save(file, "JPEG", quality=95)
        return file.getvalue()

    rng, rows = random.Random(0), []
    for i in range(count):
        attributes, winner = rng.choice(figures.all_attributes()), i % 2
        sides = {f"jpg_{side}": picture(attributes, None if side == winner else "extra_arm") for side in (0, 1)}
        labels = {f"label_{side}": float(side == winner) for side in (0, 1)}
        rows.append(sides | labels | {"caption": figures.write_caption(attributes)})
    (folder / "data").mkdir(parents=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def prepare(args: argparse.Namespace, work: Path) -> Path:
    """Writes into `work` what the runs read: the model where none is named, and pairs; returns their folder."""
    if args.model is None:
        from full_size_model import build

        args.model = work / "sd15-random"
        if not args.model.is_dir():
            torch.manual_seed(0)
            build().save_pretrained(args.model)  # fp32: transformers loads a text encoder as it is stored
    count = 2 * args.steps * args.train_batch_size
    pairs = work / f"pairs-{count}-{args.resolution}"
    if not pairs.is_dir():
        make_pairs(pairs, count, args.resolution)
    return pairs


def commands(args: argparse.Namespace, pairs: Path, work: Path) -> dict[str, list[str]]:
    """The command of each run of a round, in their order."""
    # fmt: off
    same = [
        f"--pretrained_model_name_or_path={args.model}", f"--output_dir={work / 'run'}", f"--rank={RANK}",
        f"--resolution={args.resolution}", f"--train_batch_size={args.train_batch_size}",
        f"--max_train_steps={args.steps}", f"--mixed_precision={args.mixed_precision}", f"--beta_dpo={BETA}",
        f"--learning_rate={LEARNING_RATE}", "--seed=0", f"--checkpointing_steps={args.steps + 1}",
    ]
    # fmt: on
    ours = ["_ours", str(args.ours), *same, f"--train_data_dir={pairs}", "--report_to=none", "--no-run_validation"]
    ours += ["--compile"] * args.compile
    peer = ["_peer", str(args.peer), *same, f"--dataset_name={pairs}", "--dataset_split_name=train"]
    runs = {"peer": peer, "ours": ours, "floor": ["_floor", json.dumps(vars(args), default=str)]}
    runs |= {name: [*ours, VARIANTS[name]] for name in args.variants}
    if args.peer is None or Path(args.model, "text_encoder_2").is_dir():  # SDXL or SD 3
        del runs["peer"]
    return runs


def run_once(name: str, command: list[str], num_steps: int, work: Path) -> dict[str, Any] | None:
    """One run in a process of its own: what it measured; None for a variant that does not work here."""
    result, log = work / "result.json", work / "log.txt"
    result.unlink(missing_ok=True)
    shutil.rmtree(work / "run", ignore_errors=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    line = [sys.executable, __file__, command[0], str(result), *command[1:]]
    with log.open("w") as file:
        status = subprocess.run(line, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0:
        run = json.loads(result.read_text())
        if len(run["steps"]) != num_steps - 1:
            sys.exit(f"benchmark.py: {name} made {len(run['steps']) + 1} steps of its optimiser, not {num_steps}")
        return run
    told = log.read_text()[-4000:].strip()
    if name in VARIANTS:
        print(f"left out: {name}, because it fails here: {told.splitlines()[-1]}")
        return None
    sys.exit(f"{told}\n\nbenchmark.py: the run {name!r} failed, see above: {' '.join(line)}")


# ---- What comes out -------------------------------------------------------------------------------------------------


def figures_of(run: dict[str, Any], pairs: int) -> dict[str, float]:
    """What is printed of a run with so many pairs in a step."""
    step, cpu = (statistics.median(run[key]) for key in ("steps", "cpu_steps"))
    memory = {"peak GiB": run["peak"], "training GiB": run["training"]}
    return {"s/step": step, "CPU s/step": cpu, "pairs/s": pairs / step, **memory}


def print_row(label: str, figures: dict[str, float]) -> None:
    """One line of figures with their names."""
    print(f"{label:32}" + "".join(f"{value:9.4g} {name}" for name, value in figures.items()), flush=True)


def print_ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    """Each ratio in every round, its median, and whether the bar is met."""
    variants = [(name, "ours", figure, "", 0) for name in VARIANTS for figure in ("s/step", "training GiB")]
    ratios = {}
    for of, to, figure, sign, bar in [*RATIOS, *variants]:
        if of not in rounds[-1] or to not in rounds[-1]:
            continue
        label = f"{figure}, {of} / {to}"
        ratios[label] = [figures[of][figure] / figures[to][figure] for figures in rounds]
        median = statistics.median(ratios[label])
        met = median >= bar if sign == ">=" else median <= bar
        told = f", goal {sign} {bar}: {'met' if met else 'NOT met'}" if sign else ""
        print(f"{label:42}" + "".join(f"{ratio:8.3f}" for ratio in ratios[label]) + f"   median {median:.3f}{told}")
    return ratios


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {"device": device} | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def train(args: argparse.Namespace) -> None:
    """The sub-command `train`: a training step of the peer's and of ours, in alternating rounds."""
    if args.steps < 2:
        sys.exit("benchmark.py: --steps must be at least 2, the first is a warm-up")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    raw, rounds = [], []
    with contextlib.ExitStack() as stack:
        work = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        planned = commands(args, prepare(args, work), work)
        for number in range(1, args.rounds + 1):
            runs, figures = {}, {}
            for name in list(planned):
                run = run_once(name, planned[name], args.steps, work)
                if run is None:
                    del planned[name]
                    continue
                runs[name], figures[name] = run, figures_of(run, args.train_batch_size)
                print_row(f"round {number}, {name}", figures[name])
            raw.append(runs)
            rounds.append(figures)
    print()
    for name in rounds[-1]:
        medians = {key: statistics.median(row[name][key] for row in rounds) for key in rounds[-1][name]}
        print_row(f"median, {name}", medians)
    print()
    ratios = print_ratios(rounds)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items() if name != "run"}
        result = {"settings": settings, "machine": machine(), "ratios": ratios, "rounds": raw}
        args.output.write_text(json.dumps(result, indent=2) + "\n")


# ---- Data: throughput ----------------------------------------------------------------------------------------------


def data_flags(args: argparse.Namespace, output: Path, *extra: object) -> argparse.Namespace:
    """make_preference_data.py's own command line for a pool of `args`."""
    import make_preference_data

    flags = ["--num_inference_steps", args.steps, "--num_images_per_prompt", args.images, "--output_dir", output]
    flags += ["--guidance_scale", args.guidance_scale, "--batch_size", args.batch_size, "--max_prompts", args.prompts]
    if args.model is not None:
        flags += ["--pretrained_model_name_or_path", args.model, "--scorer", args.scorer, "--prompts", PROMPTS]
        flags += ["--resolution", args.resolution]
    return make_preference_data.parse_args([str(flag) for flag in [*flags, *extra]])


def timed_loop(settings: str) -> dict[str, Any]:
    """What everybody writes: a call of the pipeline for each prompt, the model card's code for each image, a file."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
    from transformers import AutoModel, AutoProcessor

    import make_preference_data as data

    args = SimpleNamespace(**json.loads(settings))
    ours = data_flags(args, Path("unused"), "--draft_steps", 0)
    data.quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device == "cuda" else torch.float32
    known = {"torch_dtype": half, "safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(ours.pretrained_model_name_or_path, **known).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    scorer = ours.scorer[0].partition("=")[2]
    processor = AutoProcessor.from_pretrained(scorer, backend="pil")
    model = AutoModel.from_pretrained(scorer, dtype=torch.float32).eval().to(device)
    prompts = data.read_prompts(ours.prompts, None, args.prompts)[0].prompt
    folder = Path(tempfile.mkdtemp(dir=args.work_dir))
    start, before = time.perf_counter(), time.process_time()
    for number, prompt in enumerate(prompts):
        images = pipe(
            prompt,
            num_images_per_prompt=args.images,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            height=ours.height or ours.resolution,
            width=ours.width or ours.resolution,
            generator=torch.Generator(device).manual_seed(number),
        ).images
        for index, image in enumerate(images):
            options = {"padding": True, "truncation": True, "return_tensors": "pt"}
            pixels = processor(images=image, return_tensors="pt").to(device)
            text = processor.tokenizer(prompt, max_length=model.config.text_config.max_position_embeddings, **options)
            with torch.no_grad():
                seen = model.get_image_features(**pixels)
                read = model.get_text_features(**text.to(device))
                seen, read = (one if torch.is_tensor(one) else one.pooler_output for one in (seen, read))
                seen, read = (one / one.norm(dim=-1, keepdim=True) for one in (seen, read))
                (model.logit_scale.exp() * (read @ seen.T)[0]).item()
            image.save(folder / f"{number}-{index}.png")
    done = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - before}
    shutil.rmtree(folder)
    return {**done, "images": args.images * len(prompts)}


def timed_data(settings: str) -> dict[str, Any]:
    """make_preference_data.py as it is, N full images of each prompt, from when the model is loaded to when the pairs
    are written, but for the time that the scorer loads."""
    import make_preference_data as data

    args, marks = SimpleNamespace(**json.loads(settings)), {}
    folder = Path(tempfile.mkdtemp(dir=args.work_dir))
    load_sampler, load_scorer, write_pairs = data.load_sampler, data.load_scorer, data.write_pairs

    def now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def timed_sampler(*arguments: Any) -> Any:
        loaded = load_sampler(*arguments)
        marks["start"] = now()
        return loaded

    def timed_scorer(*arguments: Any, **options: Any) -> Any:
        start = now()
        score = load_scorer(*arguments, **options)
        marks["loading"] = marks.get("loading", 0) + now() - start
        return score

    def timed_pairs(*arguments: Any) -> None:
        write_pairs(*arguments)
        marks["end"] = now()

    data.load_sampler, data.load_scorer, data.write_pairs = timed_sampler, timed_scorer, timed_pairs
    data.main(data_flags(args, folder / "out", "--draft_steps", 0))
    shutil.rmtree(folder)
    seconds, cpu = marks["end"] - marks["start"] - marks["loading"]
    return {"seconds": seconds, "cpu": cpu, "images": args.images * args.prompts}


@torch.inference_mode()
def timed_bare(settings: str) -> dict[str, Any]:
    """The denoiser, the sampler's steps, the VAE and the scorer, in ours' batches, on embeddings that are ready."""
    import make_preference_data as data

    args = SimpleNamespace(**json.loads(settings))
    ours = data_flags(args, Path("unused"), "--draft_steps", 0)
    data.quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe, family, path, _ = data.load_sampler(ours)
    pipe.to(device)
    model, scheduler = getattr(pipe, family.model), pipe.scheduler
    prompts = data.read_prompts(ours.prompts, None, args.prompts)[0].prompt.tolist()
    score = data.parse_scorer(ours.scorer[0], {}).load(device)
    text = data.encode_prompts(pipe, family, prompts, "", True)
    sizes = torch.tensor([ours.height, ours.width, 0, 0, ours.height, ours.width], device=device)
    shape = pipe.vae.config.latent_channels, *(side // pipe.vae_scale_factor for side in (ours.height, ours.width))
    at_once = max(1, 512 * 512 // (ours.height * ours.width))  # as in `sample`
    rows = torch.arange(len(prompts)).repeat_interleave(args.images)
    start, before = time.perf_counter(), time.process_time()
    for index in rows.split(args.batch_size):
        latents = torch.randn(len(index), *shape, device=device, dtype=model.dtype)
        both = {}
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            if name in text:
                guided = text[name][index.to(device)]
                both[name] = torch.cat([text[f"negative_{name}"].expand_as(guided), guided])
        scheduler.set_timesteps(args.steps, device=device)
        for t in scheduler.timesteps:
            scaled = latents if path.kind == "flow" else scheduler.scale_model_input(latents, t)
            told = (t.expand(2 * len(index)), both, sizes.expand(2 * len(index), -1).to(model.dtype))
            without, guided = family.predict(model, torch.cat([scaled] * 2), *told).chunk(2)
            latents = scheduler.step(without + args.guidance_scale * (guided - without), t, latents).prev_sample
        pixels = torch.cat([family.to_pixels(pipe, some).float() for some in latents.split(at_once)])
        score(pipe.image_processor.postprocess(pixels, output_type="pil"), [prompts[row] for row in index])
    done = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - before}
    return {**done, "images": len(rows)}


MEASURES |= {"_loop": timed_loop, "_data": timed_data, "_bare": timed_bare}


def data(args: argparse.Namespace) -> None:
    """The sub-command `data`: images per second of the usual loop, of ours and of the floor, in alternating rounds."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    figures: dict[str, list[dict[str, float]]] = {"loop": [], "ours": [], "floor": []}
    with tempfile.TemporaryDirectory() as work:
        settings = json.dumps({**vars(args), "run": "data", "work_dir": work}, default=str)
        for number in range(1, args.rounds + 1):
            for name, measure in (("loop", "_loop"), ("ours", "_data"), ("floor", "_bare")):
                result = Path(work, "result.json")
                line = [sys.executable, __file__, measure, str(result), settings]
                done = subprocess.run(line, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{done.stderr[-4000:]}\n\nbenchmark.py: the run {name!r} failed, see above")
                run = json.loads(result.read_text())
                figures[name].append(
                    {"images/s": run["images"] / run["seconds"], "CPU s/image": run["cpu"] / run["images"]}
                )
                print_row(f"round {number}, {name}", figures[name][-1])
    print()
    for of, to, sign, bar in (("ours", "loop", ">=", 1.4), ("floor", "ours", "<=", 1.05)):
        ratios = [a["images/s"] / b["images/s"] for a, b in zip(figures[of], figures[to], strict=True)]
        median = statistics.median(ratios)
        met = "met" if (median >= bar if sign == ">=" else median <= bar) else "NOT met"
        each = "".join(f"{ratio:8.3f}" for ratio in ratios)
        print(f"images/s, {of} / {to:8}{each}   median {median:.3f}, goal {sign} {bar}: {met}")


# ---- Data: the price of a pair --------------------------------------------------------------------------------------


def scored_pool(args: argparse.Namespace, folder: Path, kind: str, *extra: object) -> pd.DataFrame:
    """The images of a kind that the script draws: image_id, caption, index, jpg and score, in the order of prompts."""
    import make_preference_data as data

    if not list(folder.glob(f"pool/{kind}-*")):
        data.main(data_flags(args, folder, "--validation_share", 0, *extra))
    (pool,), (scores,) = folder.glob(f"pool/{kind}-*"), folder.glob("scores/*")
    found = data.read_parts(pool.glob("*.parquet"), "caption", "index", "jpg").to_pandas().set_index("image_id")
    scores = data.read_parts(scores.glob("*.parquet"), "score").to_pandas().set_index("image_id")
    return found.join(scores["score"]).sort_values(["caption", "index"])


def interval(values: np.ndarray) -> str:
    """The mean of (P,) or the ratio of means of (P, 2), with its 95 % bootstrap interval over prompts."""
    draws = values[np.random.default_rng(0).integers(0, len(values), (4000, len(values)))].mean(axis=1)
    centre = values.mean(axis=0)
    if values.ndim == 2:
        draws, centre = draws[:, 0] / draws[:, 1], centre[0] / centre[1]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{centre:6.3f} [{low:.3f}, {high:.3f}]"


def price(args: argparse.Namespace) -> None:
    """The sub-command `price`: score gap and truth of pairs against FLOPs of denoiser and VAE."""
    import make_preference_data as data

    judge = data.parse_scorer(f"{TESTS / 'tiny_human' / 'judge.py'}:judge", {}).load("cpu")
    print(f"{args.prompts} prompts, {args.images} images of {args.steps} steps, guidance {args.guidance_scale}")
    full = scored_pool(args, args.work_dir / "full", "full", "--draft_steps", 0)
    gaps = full.groupby("caption").score.agg(np.ptp)
    flags = data_flags(args, args.work_dir / "full")
    pipe, family, *_ = data.load_sampler(flags)
    denoiser, decoder = data.count_flops(pipe, family, flags)

    def cost(steps: int) -> float:
        return (1 + (args.guidance_scale > 1)) * steps * denoiser + decoder

    def tell(name: str, flops: float, images: pd.DataFrame) -> None:
        groups = images.groupby("caption").score
        pairs = [images.loc[[*ids]] for ids in zip(groups.idxmax(), groups.idxmin(), strict=True)]
        found = np.array([judge([data.from_jpeg(jpg) for jpg in pair.jpg], list(pair.caption)) for pair in pairs])
        winner, loser = found.T
        gap = np.stack([groups.agg(np.ptp), gaps[groups.max().index]], axis=1)
        better = (winner > loser) + 0.5 * (winner == loser)
        values = {"gap": gap, "truly better": better, "judge's margin": winner - loser}
        share = flops / (args.images * cost(args.steps))
        told = "".join(f"   {key} {interval(one)}" for key, one in values.items())
        print(f"{name:26}{share:6.3f}{told}", flush=True)

    tell("all in full", args.images * cost(args.steps), full)
    for count in args.fewer_images:
        tell(f"{count} in full", count * cost(args.steps), full[full["index"] < count])
    for steps in args.draft_steps:
        few = argparse.Namespace(**{**vars(args), "images": args.draft_images, "steps": args.final_steps})
        folder, extra = args.work_dir / f"drafts-{steps}", ("--draft_steps", steps, "--finalists", 3)
        drafts, images = (scored_pool(few, folder, kind, *extra) for kind in ("draft", "full"))
        both = drafts[drafts["index"] < args.images].set_index(["caption", "index"]).score.to_frame("draft")
        both["full"] = full.set_index(["caption", "index"]).score
        ranks = both.groupby("caption").apply(lambda one: one.draft.corr(one.full, method="spearman"))
        print(f"{args.draft_images} drafts of {steps}: Spearman with the full scores {interval(ranks.to_numpy())}")
        for per_side in (1, 2, 3):
            chosen = {
                (caption, one["index"].iloc[i])
                for caption, one in drafts.groupby("caption")
                for i in data.finalists(one.score.to_numpy(), per_side)
            }
            among = images[[key in chosen for key in zip(images.caption, images["index"], strict=True)]]
            flops = args.draft_images * cost(steps) + 2 * per_side * cost(args.final_steps)
            tell(f"  and {2 * per_side} of {args.final_steps} steps", flops, among)


# ---- Data: memory ---------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> None:
    """The sub-command `memory`: the peak of host memory and the time for so many prompts, with stand-ins for the model
    and the scorer: what remains is the script's own tables, files and pairs."""
    import make_preference_data as data

    def paint(pipe: Any, family: Any, text: Any, rows: Any, seeds: list[int], *size: Any, **more: Any) -> tuple:
        return torch.zeros(len(seeds), 3, 8, 8), torch.zeros(len(seeds), 8, 16, 16).half()

    rng = np.random.default_rng(0)
    data.sample, data.encode_prompts = paint, lambda *arguments: {}
    data.load_scorer = lambda *arguments, **options: lambda images, prompts: rng.random(len(images)).tolist()
    for count in args.prompts:
        with tempfile.TemporaryDirectory() as work:
            file = Path(work, "prompts.txt")
            file.write_text("".join(f"a person with the number {i} in a red shirt\n" for i in range(count)))
            flags = ["--prompts", file, "--max_prompts", count, "--num_images_per_prompt", 24, "--draft_steps", 5]
            flags += ["--num_inference_steps", 20, "--output_dir", Path(work, "out"), "--batch_size", 160]
            forget_peak()
            before, start = peak_memory(), time.perf_counter()
            data.main(data.parse_args([str(flag) for flag in flags]))
            told = {"prompts": count, "GiB before": before, "peak GiB": peak_memory()}
            print_row("memory", told | {"ms/image": (time.perf_counter() - start) * 1000 / (28 * count)})


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def write_lora(model: str, folder: Path) -> Path:
    """A LoRA of RANK with random weights for the U-Net of a pipeline."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    state = {key: 0.02 * torch.randn_like(value) for key, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def eval_flags(args: argparse.Namespace, prompts: int, steps: int, output: Path) -> list[str]:
    """eval_human.py's command line."""
    named = {
        "pretrained_model_name_or_path": args.model,
        "prompts": TESTS / "tiny_human" / "prompts_test.txt",
        "max_prompts": prompts,
        "diversity_prompts": prompts // 3,
        "num_inference_steps": steps,
        "guidance_scale": args.guidance_scale,
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "feature_model": args.feature_model,
        "training_scorer": "pickscore",
        "output_dir": output,
    }
    line = [str(part) for name, value in named.items() for part in (f"--{name}", value)]
    return [*line, "--models", "base", f"dpo={args.lora}", "--scorers", *args.scorers]


@contextlib.contextmanager
def clocked(seconds: dict[str, float], name: str) -> Any:
    """Adds the time of the block to seconds[name], and that of all threads to seconds["name, CPU"]."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start, before = time.perf_counter(), time.process_time()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for key, spent in ((name, time.perf_counter() - start), (f"{name}, CPU", time.process_time() - before)):
        seconds[key] = seconds.get(key, 0.0) + spent


def bare_eval(line: list[str]) -> dict[str, float]:
    """Seconds of drawing base's and the LoRA's images and of scoring them, all in memory, and of loading models."""
    import eval_human as ev

    args, seconds = ev.parse_args(line), {}
    device = ev.start_processes().device
    prompts, _ = ev.read_prompt_list(args.prompts, None, args.max_prompts)
    plan, images = ev.plan_images(len(prompts), 1, args.diversity_prompts), []
    with clocked(seconds, "loading"):
        pipe = ev.load_pipeline(args, device)
    for model in args.models:
        with ev.drawing(pipe, model, None, True):
            embeds = ev.encode_texts(pipe, prompts, "")
            with clocked(seconds, "drawing"), torch.inference_mode():
                for batch in ev.in_batches(plan, args.batch_size):
                    images += pipe(
                        prompt_embeds=embeds["prompt_embeds"][[p for p, _ in batch]],
                        negative_prompt_embeds=embeds["negative_prompt_embeds"].expand(len(batch), -1, -1),
                        generator=[
                            torch.Generator().manual_seed(ev.image_seed(args.seed, prompts[p], k)) for p, k in batch
                        ],
                        num_inference_steps=args.num_inference_steps,
                        guidance_scale=args.guidance_scale,
                        height=args.height,
                        width=args.width,
                    ).images
    del pipe
    texts = [prompts[p] for p, _ in plan] * len(args.models)
    for scorer in args.scorers:
        with clocked(seconds, "loading"):
            score = scorer.load(device)
        with clocked(seconds, "scoring"):
            for batch in ev.in_batches(list(zip(images, texts, strict=True)), args.batch_size):
                score(*map(list, zip(*batch, strict=True)))
        del score
    return seconds


def models_alive() -> tuple[int, float]:
    """How many models there are, a pipeline's parts apart, and the GiB of their weights."""
    modules = [one for one in gc.get_objects() if isinstance(one, torch.nn.Module)]
    inner = {id(child) for one in modules for child in one.children()}
    outer = [one for one in modules if id(one) not in inner]
    weights = {weight.data_ptr(): weight.nbytes for one in outer for weight in one.parameters()}
    return sum(any(True for _ in one.parameters()) for one in outer), sum(weights.values()) / 2**30


def whole_eval(line: list[str], alive: dict[str, tuple[int, float]] | None = None) -> dict[str, float]:
    """Seconds of all of eval_human.main, of its parts and of each measure; `alive`, if given, gets models_alive."""
    import eval_human as ev

    seconds: dict[str, float] = {}
    parts = {"images": "generate", "measures": "measure_all", "statistics": "conclude", "report": "write_results"}
    own_measures, own_pipeline = ev.all_measures, ev.load_pipeline

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with clocked(seconds, name):
                return function(*arguments)

        return call

    def told(name: str, loaded: Any) -> Any:
        if alive is not None:
            alive[name] = models_alive()
        return loaded

    def load_measure(measure: Any, device: Any) -> Any:
        with clocked(seconds, measure.label):
            function = measure.load(device)
        return timed(measure.label, told(measure.label, function))

    changed = {name: timed(part, getattr(ev, name)) for part, name in parts.items()}
    changed["load_pipeline"] = lambda *arguments: told("pipeline", own_pipeline(*arguments))
    changed["all_measures"] = lambda *arguments: [
        one._replace(load=partial(load_measure, one)) for one in own_measures(*arguments)
    ]
    with (
        mock.patch.multiple(ev, **changed),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        clocked(seconds, "ours"),
    ):
        ev.main(ev.parse_args(line))
    return seconds


def evaluate(args: argparse.Namespace) -> None:
    """The sub-command `eval`: eval_human.py against bare drawing and scoring, in alternating rounds."""
    import eval_human

    eval_human.quiet_libraries()
    importlib.import_module("diffusers.pipelines.pipeline_utils")  # before there are models, as eval_human.main does
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in args.prompts}
    with tempfile.TemporaryDirectory() as work:
        args.lora = args.lora or write_lora(args.model, Path(work, "lora"))
        alive: dict[str, tuple[int, float]] = {}
        line = eval_flags(args, args.batch_size, 2, Path(work, "warm-up"))
        with contextlib.redirect_stdout(io.StringIO()):
            bare_eval(line)
        whole_eval(line, alive)
        for name, (count, size) in alive.items():
            print_row(f"alive with {name}", {"models": count, "GiB of weights": size})
        for number in range(1, args.rounds + 1):
            for count, found in rows.items():
                output = Path(work, "out")
                line = eval_flags(args, count, args.steps, output)
                row = {}
                for name, run in (("floor", bare_eval), ("ours", whole_eval)):
                    forget_peak()
                    row |= {**run(line), f"{name} GiB": peak_memory()}
                shutil.rmtree(output)
                for unit in ("", ", CPU"):
                    row[f"floor{unit}"] = row[f"drawing{unit}"] + row[f"scoring{unit}"]
                found.append(row)
                print_row(f"round {number}, {count} prompts", {key: row[key] for key in ("floor", "ours")})
    print_eval(rows)


def print_eval(rows: dict[int, list[dict[str, float]]]) -> None:
    """Medians of every part, ratios, and with several numbers of prompts what does not grow with them."""
    medians = {n: {key: statistics.median(row[key] for row in found) for key in found[0]} for n, found in rows.items()}
    for n, found in medians.items():
        print(f"\n{f'medians, {n} prompts':24}{'s':>10}{'CPU s':>10}")
        for key in sorted(found.keys() - {"floor GiB", "ours GiB"}, key=list(found).index):
            if not key.endswith(", CPU"):
                print(f"{key:24}{found[key]:10.2f}{found[f'{key}, CPU']:10.2f}")
        print_row("peak", {"GiB floor": found["floor GiB"], "GiB ours": found["ours GiB"]})
    print()
    for n, found in rows.items():
        for unit, loading in (("", 0), (", CPU", 0), ("", 1)):
            ratios = [row[f"ours{unit}"] / (row[f"floor{unit}"] + loading * row["loading"]) for row in found]
            median, each = statistics.median(ratios), "".join(f"{ratio:8.3f}" for ratio in ratios)
            label = f"{n} prompts, ours / floor{' and its loading' * loading}{unit}"
            bar = "" if unit or loading else f", goal <= 1.1: {'met' if median <= 1.1 else 'NOT met'}"
            print(f"{label:48}{each}   median {median:.3f}{bar}")
    if len(medians) > 1:
        for name in ("floor", "statistics", "report", "ours"):
            slope, fixed = np.polyfit(list(medians), [found[name] for found in medians.values()], 1)
            print(f"{name:24}{fixed:8.2f} s + {slope:.3f} s a prompt")


# ---- Command line ---------------------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    """The flags of `train`."""
    parser = commands.add_parser("train", help="a training step", allow_abbrev=False)
    parser.set_defaults(run=train)
    flag = parser.add_argument
    flag("--peer", type=Path, help="diffusers' train_diffusion_dpo.py; none: ours and its floor alone")
    flag("--ours", type=Path, default=OURS, help="another copy of train_dpo_human.py")
    flag("--model", type=Path, help="pipeline's folder; none: SD 1.5's architecture, random weights, fp32")
    flag("--resolution", type=int, default=256, help="height and width of the images")
    flag("--train_batch_size", type=int, default=1, help="pairs in a step")
    flag("--steps", type=int, default=4, help="optimiser steps of a run, the first a warm-up")
    flag("--rounds", type=int, default=4, help="how often everything runs")
    flag("--mixed_precision", choices=["no", "bf16"], default="no", help="of all runs")
    flag("--compile", action="store_true", help="torch.compile, in ours and in the floor; the peer has none")
    flag("--variants", nargs="*", choices=list(VARIANTS), default=[], help="options of ours to compare with ours")
    flag("--work_dir", type=Path, help="where model, pairs and runs are written and kept; none: a temporary folder")
    flag("--output", type=Path, help="json file for the raw figures")


def add_data(commands: Any) -> None:
    """The flags of `data` and `price`."""
    for name, run, told in (("data", data, "images per second"), ("price", price, "FLOPs of a pair")):
        parser = commands.add_parser(name, help=told, allow_abbrev=False)
        parser.set_defaults(run=run)
        flag = parser.add_argument
        flag("--model", help="pipeline; none: the embedded world")
        flag(
            "--scorer", default=SCORER, help="with --model: a CLIPModel as pickscore=NAME; none: the embedded world's"
        )
        flag("--resolution", type=int, default=64, help="with --model: height and width")
        flag("--prompts", type=int, default={"data": 16, "price": 128}[name], help="how many")
        flag("--images", type=int, default=20, help="images of each prompt")
        world = json.loads((TESTS / "tiny_human" / "settings.json").read_text())["make_preference_data"]
        usual = {"data": (world["num_inference_steps"], world["guidance_scale"]), "price": (50, 3.0)}[name]
        flag("--steps", type=int, default=usual[0], help="steps of a full image")
        flag("--guidance_scale", type=float, default=usual[1], help="classifier-free guidance")
        flag("--batch_size", type=int, default=32, help="of ours; the usual loop draws a prompt's images at once")
        if name == "data":
            flag("--rounds", type=int, default=3, help="how often everything runs")
        else:
            flag("--draft_images", type=int, default=24, help="drafts of each prompt")
            flag("--draft_steps", type=int, nargs="*", default=[5], help="steps of a draft, one pool for each")
            flag("--final_steps", type=int, default=20, help="steps of a finalist")
            flag("--fewer_images", type=int, nargs="*", default=[10, 4], help="also so many full images")
            flag("--work_dir", type=Path, required=True, help="where all images are kept; a second start carries on")


def add_memory(commands: Any) -> None:
    """The flags of `memory`."""
    parser = commands.add_parser("memory", help="host memory of many prompts", allow_abbrev=False)
    parser.set_defaults(run=memory)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10000], help="how many, one after the other")


def add_eval(commands: Any) -> None:
    """The flags of `eval`."""
    parser = commands.add_parser("eval", help="eval_human.py beside bare drawing and scoring", allow_abbrev=False)
    parser.set_defaults(run=evaluate)
    world, flag = TESTS / "tiny_human", parser.add_argument
    flag("--model", default=str(world / "pipeline"), help="pipeline; none: the embedded world")
    flag("--lora", help="the tuned model's LoRA; none: random weights")
    flag("--scorers", nargs="+", default=[SCORER, f"{world / 'judge.py'}:judge"], help="as eval_human.py has them")
    flag("--feature_model", default=str(world / "scorer"), help="of diversity")
    flag("--resolution", type=int, default=64, help="height and width")
    flag("--prompts", type=int, nargs="+", default=[64], help="how many; several numbers: one run with each")
    flag("--steps", type=int, default=20, help="sampling steps")
    flag("--guidance_scale", type=float, default=3.0, help="classifier-free guidance")
    flag("--batch_size", type=int, default=32, help="of both")
    flag("--rounds", type=int, default=3, help="how often everything runs")
    flag("--threads", type=int, help="of torch; none: its own choice")


def main() -> None:
    """Calls the sub-command's function; one of MEASURES, which `train` starts, leaves its result in a file."""
    if len(sys.argv) > 2 and sys.argv[1] in MEASURES:
        name, result, *arguments = sys.argv[1:]
        Path(result).write_text(json.dumps(MEASURES[name](*arguments)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_data(commands)
    add_memory(commands)
    add_eval(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
