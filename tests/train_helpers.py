# SPDX-License-Identifier: Apache-2.0
"""What the tests of train_dpo_human.py share: a small data set in the format of make_preference_data.py, and runs."""

import gc
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import datasets
import diffusers
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tiny_human.figures import BREAKS, all_attributes, draw

import train_dpo_human as trainer


ROOT = Path(trainer.__file__).resolve().parent
PIPELINE = ROOT / "tests" / "tiny_human" / "pipeline"
LORA = "pytorch_lora_weights.safetensors"
SMALL = {
    **{"train_batch_size": 2, "max_train_steps": 4, "logging_steps": 2, "checkpointing_steps": 2, "report_to": "none"},
    **{"num_validation_images": 1, "validation_inference_steps": 1, "learning_rate": 1e-3, "run_validation": False},
}


def make_rows(count: int, first: int = 0) -> list[dict]:
    """Right figures against broken ones; the winner's side alternates."""
    rows = []
    for i in range(first, first + count):
        attributes = all_attributes()[37 * i % len(all_attributes())]
        right, wrong = draw(attributes, seed=i), draw(attributes, seed=i, broken=BREAKS[i % len(BREAKS)])
        images = {}
        for side, figure in zip("01" if i % 2 else "10", (right, wrong), strict=True):
            figure.image.save(file := io.BytesIO(), "JPEG", quality=95, subsampling=0)
            images[f"jpg_{side}"] = file.getvalue()
        labels = {"caption": right.caption, "label_0": float(i % 2), "label_1": float(1 - i % 2)}
        rows.append(dict(sorted(images.items())) | labels)
    return rows


def write_data(folder: Path, train: list[dict], validation: list[dict] | None = None) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, rows in (("train", train), ("validation", validation)):
        if rows:
            datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module", name="data")  # so that it may be imported under another name
def data(tmp_path_factory) -> Iterator[Path]:
    """10 pairs to train on, 3 held out; what a run encodes lies in its folder `encoded`."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        yield write_data(tmp_path_factory.mktemp("pairs"), make_rows(10), make_rows(3, first=50))


def flags(settings: dict) -> list[str]:
    """The command line: True is a flag without a value, False none, a list several; `model` is the longest name."""
    words = [] if settings.get("run_validation", True) else ["--no-run_validation"]
    for name, value in settings.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{'pretrained_model_name_or_path' if name == 'model' else name}", *map(str, values)]
    return words


def train(data: Path, output: Path, **settings) -> dict[str, torch.Tensor]:
    """Runs main() in this process; returns the weights that it wrote."""
    run_main(flags(SMALL | {"train_data_dir": data, "output_dir": output} | settings))
    return read_weights(output)


def run_main(command: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        trainer.main(trainer.parse_args(command))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_weights(output: Path) -> dict[str, torch.Tensor]:
    """The weights in an output folder: of the LoRA, or else of the whole U-Net or transformer."""
    whole = sorted(output.glob("*/diffusion_pytorch_model.safetensors"))
    return load_file(output / LORA if (output / LORA).is_file() else whole[0])


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def read_metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl, which are JSON: what is not finite is null."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, and the same lines but for what depends on the machine's speed."""
    assert_equal(read_weights(one), read_weights(other))
    logged = [[{name: line[name] for name in line if "per_second" not in name} for line in read_metrics(run)]
              for run in (one, other)]  # fmt: skip
    assert logged[0] == logged[1]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stop() -> None:
    raise KeyboardInterrupt


def interrupt(data: Path, output: Path, call: int, act: Callable[[], None] = stop, **settings) -> BaseException:
    """A run in which `act` happens before the call-th training batch; returns what ended it."""
    own, calls = trainer.pair_losses, itertools.count(1)

    def losses(*args):
        if torch.is_grad_enabled() and next(calls) == call:
            act()
        return own(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "pair_losses", losses)
        try:
            train(data, output, **settings)
        except BaseException as error:
            ended = error.with_traceback(None)  # whose frames hold the lock of the output folder
    gc.collect()
    return ended


class Fixed(torch.nn.Module):
    """A model whose prediction is its parameter, with what `reference` asks of a policy."""

    def __init__(self, prediction: torch.Tensor):
        super().__init__()
        self.prediction = torch.nn.Parameter(prediction)

    def adapted(self) -> dict:
        return {}

    def forward(self, *_) -> torch.Tensor:
        return self.prediction


def losses_of(prediction, ref, x_0, noise, path, *command) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """pair_losses of given predictions, and the gradient in them."""
    args = trainer.parse_args(["--pretrained_model_name_or_path", "none", *map(str, command)])
    batch = trainer.Batch(x_0, noise, path, torch.ones(len(noise)), {}, torch.zeros(len(noise), 6))
    policy = Fixed(prediction.clone())
    losses = trainer.pair_losses(policy, Fixed(ref), batch, args)
    losses["loss"].sum().backward()
    return losses, policy.prediction.grad


class HalfPrecision(accelerate.Accelerator):
    """fp16 on a CPU, with a scaler that makes the first step's gradients overflow."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
        self.state._shared_state["_mixed_precision"] = "fp16"


def two_processes(data: Path, output: Path, **settings) -> dict[str, torch.Tensor]:
    """A run as `accelerate launch` starts it with two processes."""
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launcher += " --dynamo_backend no --main_process_port 0"
    words = flags(SMALL | {"train_data_dir": data, "train_batch_size": 1, "output_dir": output} | settings)
    command = [sys.executable, *launcher.split(), ROOT / "train_dpo_human.py", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return read_weights(output)


# ---- Tiny random models of the real classes -------------------------------------------------------------------------


def clip_config() -> transformers.CLIPTextConfig:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    return transformers.CLIPTextConfig(
        hidden_size=32, projection_dim=32, intermediate_size=37, num_attention_heads=2, num_hidden_layers=3,
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def tiny_vae(channels: int, **config) -> diffusers.AutoencoderKL:
    """A VAE that makes one latent of 8 x 8 pixels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **config,
    )  # fmt: skip


def tiny_sdxl(folder: Path) -> Path:
    """SDXL for 48 x 48 pixels: two text encoders, pooled text, time ids, and a VAE with a mean and std of its own."""
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    unet = diffusers.UNet2DConditionModel(
        sample_size=6, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(4, scaling_factor=0.13, latents_mean=[-1.5, 0.5, 1.0, 2.0], latents_std=[8.0, 5.0, 4.0, 6.0]),
        unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder=transformers.CLIPTextModel(clip_config()),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()),
        scheduler=diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_sd3(folder: Path, t5: bool = False, **scheduler) -> Path:
    """SD 3 for 48 x 48 pixels: two CLIPs, perhaps a T5, and a VAE with a shift."""
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    words = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")] + [(word, -2.0) for word in "▁abcdefghijklmnoprstuwy"]
    third = transformers.T5Config(vocab_size=len(words), d_model=72, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=6, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=72, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=tiny_vae(4, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=transformers.CLIPTextModelWithProjection(clip_config()), tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()), tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(third) if t5 else None,
        tokenizer_3=transformers.T5TokenizerFast(vocab=words) if t5 else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
    ).save_pretrained(folder)  # fmt: skip
    return folder


FAMILIES = {name: trainer.SD3() if name.startswith("sd3") else trainer.UNet()
            for name in ("sd", "sd, zero SNR", "sdxl", "sd3", "sd3 without T5")}  # fmt: skip


@pytest.fixture(scope="module", name="models")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model of each of FAMILIES: the embedded world's, and random ones."""
    folder = tmp_path_factory.mktemp("models")
    dynamic = {"use_dynamic_shifting": True, "shift": 1.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
    sd3 = {"sd3": tiny_sd3(folder / "sd3", t5=True, **dynamic), "sd3 without T5": tiny_sd3(folder / "sd3-without-t5")}
    zero_snr = with_scheduler(PIPELINE, folder / "v", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    return {"sd": PIPELINE, "sd, zero SNR": zero_snr, "sdxl": tiny_sdxl(folder / "sdxl"), **sd3}


def with_scheduler(model: Path, folder: Path, **config) -> Path:
    """A copy of a model with other settings of its scheduler."""
    file = shutil.copytree(model, folder) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def load(folder: Path) -> diffusers.DiffusionPipeline:
    """A pipeline in fp32 that shows no progress bar; parts that it was saved without are None."""
    config = diffusers.DiffusionPipeline.load_config(folder)
    absent = {name: None for name, value in config.items() if value == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe
