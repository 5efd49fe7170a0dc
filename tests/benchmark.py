# SPDX-License-Identifier: Apache-2.0
"""Measures what the scripts cost. `train` runs diffusers' train_diffusion_dpo.py and ours side by side.

    curl -O https://raw.githubusercontent.com/huggingface/diffusers/main/examples/research_projects/diffusion_dpo/train_diffusion_dpo.py
    python tests/benchmark.py train --peer train_diffusion_dpo.py
    python tests/benchmark.py train --peer train_diffusion_dpo.py --resolution 512 --train_batch_size 4 \\
        --mixed_precision bf16 --steps 20 --output benchmark.json                                   on a GPU
    python tests/benchmark.py train --peer train_diffusion_dpo.py --model tests/tiny_human/pipeline --resolution 64
    python tests/benchmark.py train --peer train_diffusion_dpo.py --variants compile channels_last 8bit

In alternating rounds, each run a process of its own: the peer, ours, ours with a pre-computed reference, and the floor:
the same U-Net with the same LoRA, one forward pass without gradients and one with, and back, on tensors that are ready.
Same weights (without --model the full SD 1.5 architecture with random ones), pairs, batch, precision, rank and steps.

- A step lasts from the end of one optimiser step to the end of the next; a run's figure is the median, and the first
  step, a warm-up, is left out. On a GPU the marks are CUDA events, which do not make the script wait. "CPU s" is the
  time that all threads worked: it depends less on what else the machine does, though not nothing. On a busy one take
  many rounds, and OMP_NUM_THREADS=1.
- Memory is what the process holds (on a GPU: what torch has allocated there). "Training" is the peak between the first
  and the last optimiser step, when what only the start needed is gone; "peak" is that of the whole run. Weights that
  are read by memory-mapping count until the last of their file is let go, copies in another layout come on top; the
  floor reads them without, so that its training memory is what a step needs.
- Pre-computing costs one reference pass for each pair and draw. It is counted at the floor's time for such a pass and
  shared by --epochs visits to the pair.
- The peer needs torchvision, wandb and tensorboard. It gets stand-ins for the first two (the same image operations, by
  Pillow), because neither is needed here otherwise. All four wait passively for their threads, as ours asks for.

Linux, for the memory of a CPU run.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
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
from functools import reduce
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


TESTS = Path(__file__).resolve().parent
OURS = TESTS.parent / "train_dpo_human.py"
RANK, BETA, LEARNING_RATE = 8, 2500, 1e-5
RATIOS = [  # of what to what, which figure, and the bar: on a CPU, on a GPU
    ("ours", "peer", "pairs/s", ">=", 1.4, 1.6),
    ("pre-computed", "peer", "pairs/s", ">=", 1.8, 1.8),
    ("ours", "floor", "s/step", "<=", 1.05, 1.05),
    ("ours", "peer", "peak GiB", "<=", 1.0, 1.0),
    ("ours", "peer", "training GiB", "<=", 0.8, 0.8),
    ("floor", "peer", "training GiB", "", 0, 0),
    ("ours", "peer", "CPU s/step", "", 0, 0),
    ("ours", "floor", "CPU s/step", "", 0, 0),
]
VARIANTS = {
    "compile": "--compile",
    "channels_last": "--channels_last",
    "no-channels_last": "--no-channels_last",
    "8bit": "--use_8bit_adam",
    "gradient_checkpointing": "--gradient_checkpointing",
    "xformers": "--enable_xformers_memory_efficient_attention",
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


def timed_script(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a training script as it is, with a mark after every step of its optimiser."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    marks, cpu, before, training = [], [], 0.0, 0.0

    def at_step(*_: Any) -> None:
        nonlocal before, training
        marks.append(mark())
        cpu.append(time.process_time())
        if len(marks) == 1:
            before = peak_memory()
            forget_peak()
        else:
            training = peak_memory()

    register_optimizer_step_post_hook(at_step)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    times = {"steps": seconds_between(marks), "cpu_steps": [after - before for before, after in pairwise(cpu)]}
    return {**times, "training": training, "peak": max(before, training, peak_memory())}


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
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    args = SimpleNamespace(**json.loads(settings))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", disable_mmap=True)
    unet.requires_grad_(False).to(device, dtype)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format  # as ours by default
    unet.to(memory_format=layout).train()
    if args.compile:
        unet.compile()

    vae, text = (json.loads(Path(args.model, name, "config.json").read_text()) for name in ("vae", "text_encoder"))
    count, side = 2 * args.train_batch_size, args.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    x_t = torch.randn(count, unet.config.in_channels, side, side, device=device)
    x_t, target = x_t.contiguous(memory_format=layout), torch.randn_like(x_t)
    shape = (count, text["max_position_embeddings"], unet.config.cross_attention_dim)
    captions, t = torch.randn(shape, device=device, dtype=dtype), torch.randint(1000, (count,), device=device)

    def winner_less_loser() -> torch.Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            prediction = unet(x_t, t, captions, return_dict=False)[0]
        err_w, err_l = (prediction.float() - target).square().mean(dim=(1, 2, 3)).chunk(2)
        return err_w - err_l

    marks, cpu, before = [mark()], [], 0.0
    for step in range(args.steps):
        unet.disable_adapters()
        with torch.no_grad():
            reference = winner_less_loser()
        unet.enable_adapters()
        marks.append(mark())
        F.softplus(BETA * (winner_less_loser() - reference)).mean().backward()
        for weight in trained:
            weight.grad = None
        marks.append(mark())
        cpu.append(time.process_time())
        if step == 0:
            before = peak_memory()
            forget_peak()
    seconds, training = seconds_between(marks), peak_memory()
    times = {"references": seconds[2::2], "cpu_steps": [after - before for before, after in pairwise(cpu)]}
    times["steps"] = [sum(pair) for pair in zip(seconds[2::2], seconds[3::2], strict=True)]
    return {**times, "training": training, "peak": max(before, training)}


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
    ours = [
        "_ours", str(args.ours), *same, f"--train_data_dir={pairs}", "--report_to=none",
        f"--validation_steps={args.steps + 1}", "--num_validation_images=1", "--validation_inference_steps=1",
    ]
    # fmt: on
    ours += ["--compile"] * args.compile
    runs = {}
    if args.peer is not None:
        runs["peer"] = ["_peer", str(args.peer), *same, f"--dataset_name={pairs}", "--dataset_split_name=train"]
    runs["ours"] = ours
    runs["floor"] = ["_floor", json.dumps(vars(args), default=str)]
    if not args.skip_precompute:
        runs["pre-computed"] = [*ours, f"--precompute_reference={args.precompute_reference}"]
    runs |= {name: [*ours, VARIANTS[name]] for name in args.variants}
    return {name: command for name, command in runs.items() if can_run(name, command)}


def can_run(name: str, command: list[str]) -> bool:
    """Whether the machine and the script have what a run needs; tells the reason where they do not."""
    reason = None
    if command[0] != "_floor":
        source = Path(command[1]).read_text()
        flags = [flag.partition("=")[0] for flag in command[2:]]
        missing = [flag for flag in flags if flag not in source and flag.replace("--no-", "--") not in source]
        reason = f"{Path(command[1]).name} has no {', '.join(missing)}" if missing else None
    if name == "xformers" and not torch.cuda.is_available():
        reason = "it needs CUDA"
    if reason:
        print(f"left out: {name}, because {reason}")
    return reason is None


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


def figures_of(name: str, runs: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """What is printed of a run; a pair's share of the pre-computation is counted in its pairs per second."""
    step, share = statistics.median(runs[name]["steps"]), 0.0
    if name == "pre-computed":
        share = args.precompute_reference * statistics.median(runs["floor"]["references"]) / args.epochs
    return {
        "s/step": step,
        "CPU s/step": statistics.median(runs[name]["cpu_steps"]),
        "pairs/s": args.train_batch_size / (step + share),
        "peak GiB": runs[name]["peak"],
        "training GiB": runs[name]["training"],
    }


def print_row(label: str, figures: dict[str, float]) -> None:
    """One line of figures with their names."""
    print(f"{label:32}" + "".join(f"{value:9.4g} {name}" for name, value in figures.items()), flush=True)


def print_ratios(rounds: list[dict[str, dict[str, float]]], on_gpu: bool) -> dict[str, list[float]]:
    """Each ratio in every round, its median, and whether the bar is met."""
    variants = [(name, "ours", figure, "", 0, 0) for name in VARIANTS for figure in ("s/step", "training GiB")]
    ratios = {}
    for of, to, figure, sign, cpu_bar, gpu_bar in [*RATIOS, *variants]:
        if of not in rounds[-1] or to not in rounds[-1]:
            continue
        label = f"{figure}, {of} / {to}"
        ratios[label] = [figures[of][figure] / figures[to][figure] for figures in rounds]
        median, bar = statistics.median(ratios[label]), gpu_bar if on_gpu else cpu_bar
        met = median >= bar if sign == ">=" else median <= bar
        told = f", asked {sign} {bar}: {'met' if met else 'NOT met'}" if sign else ""
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
                runs[name] = run
                figures[name] = figures_of(name, runs, args)
                print_row(f"round {number}, {name}", figures[name])
            raw.append(runs)
            rounds.append(figures)
    print()
    for name in rounds[-1]:
        medians = {key: statistics.median(row[name][key] for row in rounds) for key in rounds[-1][name]}
        print_row(f"median, {name}", medians)
    print()
    ratios = print_ratios(rounds, torch.cuda.is_available())
    if "pre-computed" in rounds[-1]:
        print(
            f"pre-computed: pairs/s counts {args.precompute_reference} reference passes for {args.epochs} visits to a "
            "pair, at the floor's time for one"
        )
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items() if name != "run"}
        result = {"settings": settings, "machine": machine(), "ratios": ratios, "rounds": raw}
        args.output.write_text(json.dumps(result, indent=2) + "\n")


# ---- Command line ---------------------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    """The flags of `train`."""
    parser = commands.add_parser("train", help="a training step", allow_abbrev=False)
    parser.set_defaults(run=train)
    flag = parser.add_argument
    flag("--peer", type=Path, help="diffusers' train_diffusion_dpo.py; none: ours and its floor alone")
    flag("--ours", type=Path, default=OURS, help="another copy of train_dpo_human.py")
    flag("--model", type=Path, help="folder of an SD 1.x pipeline; none: SD 1.5's architecture, random weights, fp32")
    flag("--resolution", type=int, default=256, help="height and width of the images")
    flag("--train_batch_size", type=int, default=1, help="pairs in a step")
    flag("--steps", type=int, default=4, help="optimiser steps of a run, the first a warm-up")
    flag("--rounds", type=int, default=3, help="how often everything runs")
    flag("--mixed_precision", choices=["no", "bf16"], default="no", help="of all runs")
    flag("--compile", action="store_true", help="torch.compile, in ours and in the floor; the peer has none")
    flag("--precompute_reference", type=int, default=1, help="draws for each pair of the pre-computed reference")
    flag("--skip_precompute", action="store_true", help="do not run the pre-computed reference")
    flag("--epochs", type=int, default=4, help="visits to a pair that share the cost of the pre-computation")
    flag("--variants", nargs="*", choices=list(VARIANTS), default=[], help="options of ours to compare with ours")
    flag("--work_dir", type=Path, help="where model, pairs and runs are written and kept; none: a temporary folder")
    flag("--output", type=Path, help="json file for the raw figures")


def main() -> None:
    """Calls the sub-command's function; one of MEASURES, which `train` starts, leaves its result in a file."""
    if len(sys.argv) > 2 and sys.argv[1] in MEASURES:
        name, result, *arguments = sys.argv[1:]
        Path(result).write_text(json.dumps(MEASURES[name](*arguments)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_train(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
