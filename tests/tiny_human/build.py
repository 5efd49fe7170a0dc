# SPDX-License-Identifier: Apache-2.0
"""Makes the embedded world again, from one seed, with one command:

    python tests/tiny_human/build.py                    everything, about six hours on one CPU core
    python tests/tiny_human/build.py --parts judge      one part; those that it needs must be there

    prompts    prompts_train.txt and prompts_test.txt, disjoint
    vae        AutoencoderKL: the encoder begins as a principal component analysis of 4 x 4 patches, written into the
               weights in closed form; the decoder is trained on it, then both together
    judge      keypoint heatmaps, colours and pose; sees neither text nor the scorer's data
    pipeline   StableDiffusionPipeline: UNet2DConditionModel and CLIPTextModel, trained together on corpora in which
               38 %, then 55 % of the figures are broken, which leaves DPO something to mend
               (v-prediction: a network this small cannot output epsilon exactly enough to hold colours at high noise)
    scorer     CLIPModel: captions against figures, with broken twins and wrong captions as hard negatives, half of
               them redrawn by the pipeline
    features   another CLIPModel, for diversity and distances: it knows skin, hair, joints and the caption
    measure    what came out: speed, base quality, judge accuracy per kind of break, scorer against judge

A part that was stopped carries on from its last saved step (.build/); --force begins anew, and carries on without it.
Every part writes its settings, losses, time and figures to build_log.txt, which is kept beside the weights.
"""

import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a shared machine

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)


HERE = Path(__file__).resolve().parent
WORK = HERE / ".build"
sys.path.insert(0, str(HERE))

from figures import (
    ATTRIBUTES,
    BREAKS,
    HAIRS,
    JOINTS,
    SHOES,
    SKINS,
    Figure,
    all_attributes,
    draw,
    random_person,
    write_caption,
)
from judge import Judge, count_joints, counts_are_right, load_judge, marks, total


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATENT_CHANNELS, SCALING_FACTOR = 16, 0.25
CORPUS, BATCH = 48_000, 32  # figures in a corpus that the U-Net learns from, batch size
FLAWED, SECOND = (0.38, 0.55), 10_250  # shares of broken figures; the step from which the second corpus is used:
# after the first alone the U-Net draws 71 % of its figures right, which leaves DPO too little to mend
PARTS = ("prompts", "vae", "judge", "pipeline", "scorer", "features", "measure")


# ---- Common to all parts -------------------------------------------------------------------------------------------


def log(part: str, text: str) -> None:
    line = f"[{part}] {text}"
    tqdm.write(line)
    with open(HERE / "build_log.txt", "a") as file:
        file.write(line + "\n")


def pixels_of(figures: list[Figure]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(figure.image) for figure in figures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def random_figures(seed: int, count: int, broken_share: float = 0.0) -> list[Figure]:
    rng, attributes = random.Random(seed), all_attributes()
    kinds = [rng.choice(BREAKS) if rng.random() < broken_share else None for _ in range(count)]
    return [draw(rng.choice(attributes), rng.getrandbits(32), kind) for kind in kinds]


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What `make` computes, kept in .build/, so that a part that carries on need not encode its figures again."""
    path = WORK / f"{name}.data"
    if not path.exists():
        torch.save(make(), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return torch.load(path)


def train(
    part: str,
    modules: dict[str, nn.Module],
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.0,
    weight_decay: float = 0.01,
    log_every: int = 100,
) -> None:
    """Trains `modules` in place with AdamW and a cosine schedule, and leaves the EMA weights in them.

    `loss_of_step(step)` is a function of the step alone, so that a run that was killed and started again ends where it
    would have ended.
    """
    network = nn.ModuleDict(modules).to(DEVICE).train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    warmup = min(100, steps // 10 + 1)
    average = [p.detach().clone() for p in parameters]
    first, elapsed, path = 0, 0.0, WORK / f"{part}.pt"
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, elapsed = state["average"], state["step"], state["seconds"]
    count = sum(p.numel() for p in parameters)
    log(part, f"{count:,} trainable parameters, steps {first} to {steps}, learning rate {learning_rate:g}")
    start, saved, window = time.monotonic() - elapsed, time.monotonic(), []
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=part, smoothing=0.05, disable=None):
        factor = min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        torch.manual_seed(step)
        loss, shown = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        window.append({"loss": loss.item(), **shown})
        reported = (step + 1) % log_every == 0 or step + 1 == steps
        if reported:
            means = ", ".join(f"{name} {np.mean([w[name] for w in window]):.4f}" for name in window[0])
            log(part, f"step {step + 1}/{steps}, {time.monotonic() - start:.0f} s, {means}")
            window = []
        if reported or time.monotonic() - saved > 180:
            saved = time.monotonic()
            state = {
                "network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
                "step": step + 1, "seconds": time.monotonic() - start,
            }  # fmt: skip
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)
    network.eval()


# ---- Prompts -------------------------------------------------------------------------------------------------------


def build_prompts(seed: int) -> None:
    captions = [write_caption(attributes) for attributes in all_attributes()]
    random.Random(seed).shuffle(captions)
    (HERE / "prompts_test.txt").write_text("\n".join(captions[:512]) + "\n")
    (HERE / "prompts_train.txt").write_text("\n".join(captions[512 : 512 + 1024]) + "\n")
    log("prompts", f"1024 for training and 512 for testing, of {len(captions)}")


# ---- VAE -----------------------------------------------------------------------------------------------------------


def principal_components(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The first LATENT_CHANNELS principal axes of 4 x 4 patches, scaled so that the latents' standard deviations lie
    close together (power 0.4 of the patches' own) and are 1 / SCALING_FACTOR on average.

    Returns:
        axes (LATENT_CHANNELS, 3, 4, 4) and the mean patch (3, 4, 4).
    """
    patches = F.unfold(pixels, 4, stride=4).transpose(1, 2).reshape(-1, 48).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T.cov())
    values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    std = values.sqrt() ** 0.4
    axes = vectors / values.sqrt() * std / std.square().mean().sqrt() / SCALING_FACTOR
    return axes.T.reshape(LATENT_CHANNELS, 3, 4, 4).float(), mean.reshape(3, 4, 4).float()


def world_axes(seed: int) -> tuple[Tensor, Tensor]:
    return principal_components(pixels_of(random_figures(seed, 1000, 0.3)))


@torch.no_grad()
def write_linear_encoder(vae: AutoencoderKL, axes: Tensor, mean: Tensor) -> None:
    """Sets the encoder's weights so that it computes exactly `axes @ (patch - mean)`, and can learn on from there.

    The last convolution of each residual branch is zeroed and the others are left as they are; two strided
    convolutions move pixels into channels and apply the axes. What is left is the last GroupNorm and SiLU: each latent
    z stands beside -z, because silu(z) - silu(-z) = z, and in a group with large constants, against which its own
    share of the group's variance vanishes.
    """
    encoder, constant = vae.encoder, 200.0
    for block in [*(b.resnets[0] for b in encoder.down_blocks), *encoder.mid_block.resnets]:
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    first, second = encoder.down_blocks[0].downsamplers[0].conv, encoder.down_blocks[1].downsamplers[0].conv
    straight, widen = (encoder.down_blocks[k].resnets[0].conv_shortcut for k in (1, 2))
    for layer in (encoder.conv_in, first, second, straight, widen, encoder.conv_out):
        layer.bias.zero_()
    encoder.conv_in.weight[:3] = 0
    first.weight[:12] = straight.weight[:12] = second.weight[:LATENT_CHANNELS] = widen.weight[:] = 0
    encoder.conv_out.weight.zero_()
    encoder.conv_norm_out.bias.zero_()
    for channel in range(3):
        encoder.conv_in.weight[channel, channel, 1, 1] = 1
        for y in range(2):
            for x in range(2):
                k = channel * 4 + y * 2 + x
                first.weight[k, channel, y, x] = straight.weight[k, k] = 1
                second.weight[:LATENT_CHANNELS, k, :2, :2] = axes[:, channel, y::2, x::2]
    second.bias[:LATENT_CHANNELS] = -(axes * mean).sum(dim=(1, 2, 3))
    for z in range(LATENT_CHANNELS):  # channels 4z .. 4z + 3: z, -z and two constants; two latents make one group
        widen.weight[4 * z, z], widen.weight[4 * z + 1, z] = 1, -1
        widen.bias[4 * z + 2], widen.bias[4 * z + 3] = constant, -constant
        encoder.conv_norm_out.weight[4 * z : 4 * z + 2] = constant * 0.5**0.5
        encoder.conv_out.weight[z, 4 * z, 1, 1], encoder.conv_out.weight[z, 4 * z + 1, 1, 1] = 1, -1
    for layer in (vae.quant_conv, vae.post_quant_conv):
        layer.weight.copy_(torch.eye(layer.weight.shape[0])[:, :, None, None])
        layer.bias.zero_()
    vae.quant_conv.weight[LATENT_CHANNELS:], vae.quant_conv.bias[LATENT_CHANNELS:] = 0, -30  # log variance: no noise


def build_vae(seed: int, steps: int) -> None:
    """First the decoder alone, then, from a third of the steps on, both: the encoder is held near where it began."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        mid_block_add_attention=False, sample_size=64, scaling_factor=SCALING_FACTOR,
    )  # fmt: skip
    axes, mean = world_axes(seed)
    write_linear_encoder(vae, axes, mean)
    axes, offset = axes.to(DEVICE), (axes * mean).sum(dim=(1, 2, 3))[:, None, None].to(DEVICE)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        x = pixels_of(random_figures(seed + 1000 + step, 16, 0.5)).to(DEVICE)
        linear = F.conv2d(x, axes, stride=4) - offset
        z = linear if step < steps // 3 else vae.encode(x).latent_dist.mean
        noise = torch.rand(len(x), 1, 1, 1, device=DEVICE) * torch.randn_like(z)
        decoded = vae.decode(z + 0.06 / SCALING_FACTOR * noise).sample
        mse, moved = F.mse_loss(decoded, x), F.mse_loss(z, linear) * SCALING_FACTOR**2
        return F.l1_loss(decoded, x) + 4 * mse + 0.01 * moved, {
            "psnr": 10 * math.log10(4 / mse.item()),
            "moved": moved.item(),
        }

    train("vae", {"vae": vae}, loss_of_step, steps, 2e-3, ema_decay=0.998, weight_decay=0.0)
    vae.half().save_pretrained(HERE / "pipeline" / "vae")


# ---- Pipeline ------------------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every caption word is one token and other text falls back to smaller pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, special_tokens=special, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=letters, min_frequency=1,
    )  # fmt: skip
    bpe.train_from_iterator([write_caption(attributes) for attributes in all_attributes()], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokens = special + letters + [letter + "</w>" for letter in letters]
    tokens += [token for token in trained["vocab"] if token not in set(tokens)]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=24)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear",
        prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


def build_pipeline(seed: int, steps: int) -> None:
    """U-Net and text encoder on a flawed corpus, which leaves DPO something to mend."""
    torch.manual_seed(seed + 2)
    tokenizer = build_tokenizer(HERE / "pipeline" / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=96, hidden_act="gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, transformer_layers_per_block=2, cross_attention_dim=96, norm_num_groups=16,
        attention_head_dim=4,
    )  # fmt: skip
    noise_scheduler = DDPMScheduler.from_config(build_scheduler().config)
    alpha_bar = noise_scheduler.alphas_cumprod.to(DEVICE)
    unet.to(DEVICE)
    corpora = []
    for share in FLAWED:
        latents, captions = cached(f"pipeline-{share}", lambda share=share: encoded_corpus(seed + 3, share))
        corpora.append((latents, tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        latents, tokens = corpora[step >= SECOND]
        rows = torch.randint(0, len(latents), (BATCH,))
        shown = torch.where(torch.rand(BATCH) < 0.1, len(latents), rows)
        x_0 = latents[rows].float().to(DEVICE)
        t = ((torch.rand(1) + torch.arange(BATCH) / BATCH) % 1 * 1000).long().to(DEVICE)  # evenly spread in each batch
        eps = torch.randn_like(x_0)
        x_t = noise_scheduler.add_noise(x_0, eps, t)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            prediction = unet(x_t, t, text_encoder(tokens[shown].to(DEVICE))[0]).sample.float()
        v = noise_scheduler.get_velocity(x_0, eps, t)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = (5 / (snr + 1)).clamp(max=1)  # v's own, but little noise counts less (as in arXiv 2303.09556)
        return ((prediction - v).square().mean(dim=(1, 2, 3)) * weight).mean(), {}

    modules = {"unet": unet, "text_encoder": text_encoder}
    train("pipeline", modules, loss_of_step, steps, 1.2e-3, ema_decay=0.9995, log_every=250)
    save_pipeline(unet, text_encoder, tokenizer, HERE / "pipeline")


@torch.no_grad()
def encoded_corpus(seed: int, flawed: float) -> tuple[Tensor, list[str]]:
    """CORPUS figures, a share of them broken: their scaled latents in half precision, and their captions."""
    rng, attributes, vae = random.Random(seed), all_attributes(), load_vae()
    latents, captions = torch.empty(CORPUS, LATENT_CHANNELS, 16, 16, dtype=torch.float16), []
    for i in tqdm(range(0, CORPUS, 64), desc="encode", disable=None):
        figures = [
            draw(rng.choice(attributes), rng.getrandbits(32), rng.choice(BREAKS) if rng.random() < flawed else None)
            for _ in range(64)
        ]
        latents[i : i + 64] = vae.encode(pixels_of(figures).to(DEVICE)).latent_dist.mean.cpu() * SCALING_FACTOR
        captions += [figure.caption for figure in figures]
    return latents, captions


def save_pipeline(unet: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """U-Net and VAE in half precision, which diffusers loads as float32; the text encoder in float32, because
    transformers loads what is stored."""
    vae = load_vae().half()
    vae.register_to_config(_name_or_path="")  # else the shipped file names a folder of the builder
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(), scheduler=build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


# ---- Judge ---------------------------------------------------------------------------------------------------------


def twins(seed: int, count: int) -> list[Figure]:
    """`count` pairs in a row: a right figure, then the same person broken in one way."""
    rng, attributes, figures = random.Random(seed), all_attributes(), []
    for i in range(count):
        chosen, figure_seed = rng.choice(attributes), rng.getrandbits(32)
        figures += [draw(chosen, figure_seed), draw(chosen, figure_seed, BREAKS[i % len(BREAKS)])]
    return figures


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(HERE / "pipeline" / "vae").float().to(DEVICE).eval().requires_grad_(False)


@torch.no_grad()
def through_vae(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """What is left of (B, 3, H, W) pixels after encoding and decoding."""
    batches = tqdm(pixels.split(64), desc="through the VAE", leave=False, disable=None)
    return torch.cat(
        [vae.decode(vae.encode(x.to(DEVICE)).latent_dist.mean).sample.clamp(-1, 1).cpu() for x in batches]
    )


def draw_heatmaps(figures: list[Figure], size: int, sigma: float) -> Tensor:
    """(B, 5, size, size): a Gaussian of height 1 at every joint."""
    grid, maps = torch.arange(size) + 0.5, torch.zeros(len(figures), len(JOINTS), size, size)
    for i, figure in enumerate(figures):
        for j, name in enumerate(JOINTS):
            for x, y in figure.joints[name]:
                column, row = (torch.exp(-((grid - c * size / 64) ** 2) / (2 * sigma**2)) for c in (x, y))
                maps[i, j] = torch.maximum(maps[i, j], row[:, None] * column[None, :])
    return maps


def build_judge(seed: int, steps: int) -> None:
    torch.manual_seed(seed + 4)
    figures = twins(seed + 5, 8000)
    decoded = cached("judge", lambda: through_vae(load_vae(), pixels_of(figures)).mul(127).to(torch.int8))
    versions = torch.stack([pixels_of(figures).mul(127).to(torch.int8), decoded])  # (2, N, 3, 64, 64)
    heatmaps = draw_heatmaps(figures, 32, 1.0).half()
    is_right = torch.tensor([figure.broken is None for figure in figures], dtype=torch.float)
    values = {
        name: torch.tensor([options.index(figure.attributes[name]) for figure in figures])
        for name, options in ATTRIBUTES.items()
    }  # fmt: skip
    judge = Judge()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        pairs = torch.randint(0, len(is_right) // 2, (20,)) * 2
        rows = torch.cat([pairs, pairs + 1])
        version = torch.randint(0, 2, (40,))
        x = versions[version, rows].float().div(127)
        # A limb that is half there is broken, too: every sixth broken figure is mixed with its whole twin.
        share = torch.where(torch.rand(20) < 1 / 6, 0.25 + 0.5 * torch.rand(20), 0.0)[:, None, None, None]
        x[20:] = (1 - share) * x[20:] + share * versions[version[20:], pairs].float().div(127)
        x = x * (1 + 0.06 * torch.randn(40, 1, 1, 1)) + 0.04 * torch.randn(40, 3, 1, 1)
        x = (x + 0.06 * torch.rand(40, 1, 1, 1) * torch.randn_like(x)).to(DEVICE)
        shown, anatomy, attributes = judge(x)
        target, right = heatmaps[rows].float().to(DEVICE), is_right[rows].to(DEVICE)
        heat = F.binary_cross_entropy_with_logits(shown, target, reduction="none") * (1 + 20 * target)
        sharp = torch.cat([torch.ones(20), (share.flatten() == 0).float()]).to(DEVICE)
        heat = (heat.mean(dim=(1, 2, 3)) * sharp).sum() / sharp.sum()
        body = F.binary_cross_entropy_with_logits(anatomy, right)
        names = sum(F.cross_entropy(attributes[n], values[n][rows].to(DEVICE)) for n in values)
        accuracy = ((anatomy > 0) == (right > 0.5)).float().mean().item()
        return 5 * heat + body + 0.3 * names, {"heatmaps": heat.item(), "anatomy": body.item(), "accuracy": accuracy}

    train("judge", {"judge": judge}, loss_of_step, steps, 1.5e-3, ema_decay=0.998)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()},
        HERE / "judge" / "model.safetensors",
    )


# ---- Scorer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def redraw(pipe: StableDiffusionPipeline, pixels: Tensor, captions: list[str], seed: int, steps: int = 3) -> Tensor:
    """The pictures as the pipeline would have drawn them, (B, 3, H, W) in and out: noised to a timestep in [100, 450],
    the same for a twin pair, and denoised with the caption in a few DDIM steps."""
    generator, alpha_bar = (
        torch.Generator().manual_seed(seed),
        DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod,
    )
    tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    redrawn = []
    for x, ids in zip(tqdm(pixels.split(64), desc="redraw", disable=None), tokens.split(64), strict=True):
        x_0 = pipe.vae.encode(x.to(DEVICE)).latent_dist.mean * SCALING_FACTOR
        start = torch.randint(100, 451, (len(x) // 2,), generator=generator).repeat_interleave(2)
        eps = torch.randn((len(x) // 2, *x_0.shape[1:]), generator=generator).repeat_interleave(2, dim=0).to(DEVICE)
        text = pipe.text_encoder(ids.to(DEVICE))[0]
        for k in range(steps):
            t = start * (steps - k) // steps
            a = alpha_bar[t].to(DEVICE)[:, None, None, None]
            x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
            v = pipe.unet(x_t, t.to(DEVICE), text).sample
            x_0, eps = a.sqrt() * x_t - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x_t
        redrawn.append(pipe.vae.decode(x_0 / SCALING_FACTOR).sample.clamp(-1, 1).cpu())
    return torch.cat(redrawn)


def mutated(attributes: dict[str, str], rng: random.Random) -> str:
    """A caption that is wrong in one attribute."""
    name = rng.choice(tuple(ATTRIBUTES))
    return write_caption(attributes | {name: rng.choice([v for v in ATTRIBUTES[name] if v != attributes[name]])})


def small_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    words = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPModel(CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 24, "hidden_act": "gelu", **words},
        vision_config={"image_size": 64, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512,
                       "num_hidden_layers": 6, "num_attention_heads": 4, "hidden_act": "gelu"},
        projection_dim=64,
    ))  # fmt: skip


def embed_text(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(DEVICE)
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    model.half().save_pretrained(folder)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)


def joint_loss(head: nn.Linear, seen: Tensor, figures: list[Figure]) -> Tensor:
    """How well `head` tells from states (B, 65, 128) which joints lie in each patch of 8 x 8 pixels."""
    holds = F.max_pool2d(draw_heatmaps(figures, 16, 0.6), 2).gt(0.4).flatten(2).transpose(1, 2).float().to(seen.device)
    return F.binary_cross_entropy_with_logits(head(seen[:, 1:]), holds, pos_weight=torch.tensor(8.0).to(seen.device))


def build_scorer(seed: int, steps: int) -> None:
    torch.manual_seed(seed + 6)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "pipeline" / "tokenizer")
    model = small_clip(tokenizer)
    joint_head = nn.Linear(128, len(JOINTS))  # an aid in training: which joints lie in each patch; not kept

    def quartets(seed: int, count: int) -> list[Figure]:
        """Two people for each caption, each whole, then broken: right, broken, right, broken."""
        rng, attributes, figures = random.Random(seed), all_attributes(), []
        for _ in range(count):
            chosen = rng.choice(attributes)
            for _ in range(2):
                figure_seed = rng.getrandbits(32)
                figures += [draw(chosen, figure_seed), draw(chosen, figure_seed, rng.choice(BREAKS))]
        return figures

    @lru_cache
    def redrawn_quartets() -> tuple[list[Figure], Tensor]:
        figures = quartets(seed + 7, 2000)
        pipe = StableDiffusionPipeline.from_pretrained(HERE / "pipeline").to(DEVICE)
        captions = [figure.caption for figure in figures]
        return figures, cached("scorer", lambda: redraw(pipe, pixels_of(figures), captions, seed + 8))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        count, rng = 16, random.Random(step)
        figures = quartets(seed + 1000 + step, count)
        x = pixels_of(figures)
        if step >= steps // 3:  # from here on half of the batch looks generated
            kept, redrawn = redrawn_quartets()
            groups = torch.randperm(len(kept) // 4)[: count // 2].tolist()
            rows = [4 * g + k for g in groups for k in range(4)]
            figures, x = figures[: len(rows)] + [kept[row] for row in rows], torch.cat([x[: len(rows)], redrawn[rows]])
        half_there = torch.where(torch.rand(2 * count) < 1 / 8, 0.3 + 0.4 * torch.rand(2 * count), 0.0)
        x[1::2] = x[1::2].lerp(x[0::2], half_there[:, None, None, None])
        x = (x + 0.06 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).to(DEVICE)
        seen = model.vision_model(pixel_values=x)
        image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        captions = [figure.caption for figure in figures[::4]]
        wrong = [mutated(figure.attributes, rng) for figure in figures[::4] for _ in range(3)]
        text = embed_text(model, tokenizer, captions + wrong)
        right_text, wrong_text = text[:count], text[count:].reshape(count, 3, -1)
        scale = model.logit_scale.exp().clamp(max=100)

        by_caption = image.reshape(count, 4, -1)
        score = scale * (by_caption @ right_text[:, :, None]).squeeze(2)  # (count, 4)
        difference = score[:, None, 0::2] - score[:, 1::2, None]  # every right against every broken one of the caption
        preference = F.softplus(-difference).mean()
        to_text = scale * image @ right_text.T  # (4 * count, count)
        to_wrong = scale * (by_caption @ wrong_text.transpose(1, 2)).reshape(len(image), 3)
        own = torch.arange(count, device=x.device)
        matching = F.cross_entropy(torch.cat([to_text, to_wrong], dim=1), own.repeat_interleave(4))
        matching = matching + F.cross_entropy(to_text[0::4].T, own)
        joints = joint_loss(joint_head, seen.last_hidden_state, figures)
        shown = {
            "preference": preference.item(), "matching": matching.item(), "joints": joints.item(),
            "right over broken": (difference > 0).float().mean().item(),
            "right caption": (score.reshape(-1, 1) > to_wrong).float().mean().item(),
        }  # fmt: skip
        return 2 * preference + 0.5 * matching + 2 * joints, shown

    train("scorer", {"model": model, "joint_head": joint_head}, loss_of_step, steps, 1e-3, ema_decay=0.998)
    save_clip(model, tokenizer, HERE / "scorer")


# ---- Features ------------------------------------------------------------------------------------------------------


def build_features(seed: int, steps: int) -> None:
    """A CLIPModel that has to know all of a picture: what the caption says, where the joints are, and who it is."""
    torch.manual_seed(seed + 11)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "pipeline" / "tokenizer")
    model, joint_head = small_clip(tokenizer), nn.Linear(128, len(JOINTS))
    looks = {"skin": SKINS, "hair": HAIRS, "shoe": SHOES, "hair_style": range(3)}
    look_heads = nn.ModuleDict({name: nn.Linear(128, len(options)) for name, options in looks.items()})
    place_head = nn.Linear(128, 3 * len(JOINTS))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, attributes = random.Random(seed + 2_000_000 + step), all_attributes()
        people = [random_person(rng) for _ in range(64)]
        figures = [
            draw(chosen, rng.getrandbits(32), rng.choice(BREAKS) if rng.random() < 0.5 else None, person)
            for chosen, person in zip(rng.sample(attributes, 64), people, strict=True)
        ]
        x = pixels_of(figures)
        x = (x + 0.06 * torch.rand(64, 1, 1, 1) * torch.randn_like(x)).to(DEVICE)
        seen = model.vision_model(pixel_values=x)
        image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        text = embed_text(model, tokenizer, [figure.caption for figure in figures])
        logits, own = model.logit_scale.exp().clamp(max=100) * image @ text.T, torch.arange(64, device=x.device)
        matching = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        joints = joint_loss(joint_head, seen.last_hidden_state, figures)
        look = sum(
            F.cross_entropy(
                look_heads[name](seen.pooler_output),
                torch.tensor([options.index(getattr(person, name)) for person in people], device=x.device),
            )
            for name, options in looks.items()
        )
        place = F.mse_loss(place_head(seen.pooler_output), torch.tensor([places(f) for f in figures], device=x.device))
        shown = {"matching": matching.item(), "joints": joints.item(), "look": look.item(), "place": place.item()}
        return matching + joints + look + place, shown

    modules = {"model": model, "joint_head": joint_head, "look_heads": look_heads, "place_head": place_head}
    train("features", modules, loss_of_step, steps, 1e-3, ema_decay=0.998)
    save_clip(model, tokenizer, HERE / "features")


def places(figure: Figure) -> list[float]:
    """How many joints there are of each kind, and the mean of their places, from the middle in units of 16 pixels."""
    found = [np.array(figure.joints[name] or [(32, 32)]) for name in JOINTS]
    return [v for points in found for v in (float(len(points)), *((points.mean(0) - 32) / 16).tolist())]


# ---- Measure -------------------------------------------------------------------------------------------------------


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Equal values share a rank; nan where all are equal."""
    ranks = []
    for x in (a, b):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


@torch.no_grad()
def measure_vae(seed: int) -> None:
    pixels = pixels_of(random_figures(seed + 12, 512, 0.4))
    error = (through_vae(load_vae(), pixels) - pixels).square().mean(dim=1)
    corner = pixels[:, :, :, :1].expand_as(pixels)  # the background's colour changes from row to row alone
    person = (pixels - corner).abs().amax(dim=1) > 0.1
    log("measure", f"VAE, 512 fresh figures: PSNR {10 * math.log10(4 / error.mean()):.1f} dB, of the person's "
        f"pixels alone {10 * math.log10(4 / error[person].mean()):.1f} dB")  # fmt: skip


@torch.no_grad()
def measure_judge(seed: int, count: int = 1300) -> None:
    """Fresh figures through the VAE: right from broken, per kind of break, colours, pose and arms."""
    judge, figures = load_judge(DEVICE), twins(seed + 9, count)
    pixels = through_vae(load_vae(), pixels_of(figures))
    outputs = [judge(x.to(DEVICE)) for x in pixels.split(100)]
    says_right = torch.cat([anatomy for _, anatomy, _ in outputs]).gt(0).cpu().tolist()
    counted = torch.cat([counts_are_right(count_joints(heat)) for heat, _, _ in outputs]).cpu().tolist()
    right = [says == (f.broken is None) for says, f in zip(says_right, figures, strict=True)]
    log(
        "measure",
        f"judge, {len(figures)} fresh figures through the VAE: right from broken {np.mean(right):.4f}, right called "
        f"right {np.mean(says_right[::2]):.4f}, broken called broken {1 - np.mean(says_right[1::2]):.4f}",
    )
    for kind in BREAKS:
        rows = [i for i, f in enumerate(figures) if f.broken == kind]
        log("measure", f"judge, {kind}: called broken {1 - np.mean([says_right[i] for i in rows]):.3f}, "
            f"joint counts off {1 - np.mean([counted[i] for i in rows]):.3f}, of {len(rows)}")  # fmt: skip
    for name, options in ATTRIBUTES.items():
        seen = torch.cat([attributes[name] for _, _, attributes in outputs]).argmax(1).tolist()
        whole = [(s, f) for s, f in zip(seen, figures, strict=True) if f.broken is None]
        log("measure", f"judge, {name} of whole figures: "
            f"{np.mean([options[s] == f.attributes[name] for s, f in whole]):.4f}")  # fmt: skip


def measure_world(seed: int, images_per_prompt: int = 20, pools: int = 64) -> None:
    """The base model by the judge on 384 test prompts; the scorer against the judge on pools of training prompts."""
    settings = json.loads((HERE / "settings.json").read_text())["make_preference_data"]
    pipe = StableDiffusionPipeline.from_pretrained(HERE / "pipeline").to(DEVICE)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(DEVICE)
    model = CLIPModel.from_pretrained(HERE / "scorer").float().eval().to(DEVICE)
    processor = CLIPProcessor.from_pretrained(HERE / "scorer")

    def sample(prompts: list[str], first_seed: int) -> list:
        images = []
        for i in tqdm(range(0, len(prompts), 32), desc="sample", disable=None):
            batch = prompts[i : i + 32]
            generators = [torch.Generator().manual_seed(first_seed + i + k) for k in range(len(batch))]
            images += pipe(batch, num_inference_steps=settings["num_inference_steps"], generator=generators,
                           guidance_scale=settings["guidance_scale"], height=64, width=64).images  # fmt: skip
        return images

    @torch.no_grad()
    def score(images: list, prompts: list[str]) -> np.ndarray:
        output = model(
            **processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True).to(DEVICE)
        )
        return (model.logit_scale.exp() * (output.image_embeds * output.text_embeds).sum(-1)).cpu().numpy()

    prompts = (HERE / "prompts_test.txt").read_text().splitlines()[:384]
    start = time.monotonic()
    images = sample(prompts, seed * 10_000_019)
    log(
        "measure",
        f"{len(images) / (time.monotonic() - start):.1f} images per second on {torch.get_num_threads()} threads",
    )
    seen = marks(judge, images, prompts)
    for name in ("anatomy", *ATTRIBUTES):
        log("measure", f"base, 384 test prompts, {name}: {np.mean([m[name] > 0.5 for m in seen]):.3f}")
    contact_sheet(images[:96]).save(WORK / "base.png")

    prompts = [
        p for p in (HERE / "prompts_train.txt").read_text().splitlines()[-pools:] for _ in range(images_per_prompt)
    ]
    images = sample(prompts, seed * 10_000_019 + 1_000_003)
    scores = np.concatenate([score(images[i : i + 64], prompts[i : i + 64]) for i in range(0, len(images), 64)])
    seen = marks(judge, images, prompts)
    scores = scores.reshape(pools, images_per_prompt)
    best, worst = scores.argmax(1), scores.argmin(1)
    for name, mark in {"judge": total, "anatomy": lambda m: m["anatomy"]}.items():
        truth = np.array([mark(m) for m in seen]).reshape(scores.shape)
        rho = np.nanmean([spearman(s, t) for s, t in zip(scores, truth, strict=True)])
        top, bottom = truth[np.arange(pools), best], truth[np.arange(pools), worst]
        log(
            "measure",
            f"scorer against {name} within {pools} prompts x {images_per_prompt}: Spearman {rho:.3f}, best over worst "
            f"{np.mean(top > bottom):.3f}, best {top.mean():.3f}, mean {truth.mean():.3f}, worst {bottom.mean():.3f}, "
            f"best by the {name} itself {truth.max(1).mean():.3f}",
        )


def contact_sheet(images: list[Image.Image], columns: int = 12, zoom: int = 2) -> Image.Image:
    cell = 64 * zoom + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * cell), "white")
    for i, image in enumerate(images):
        larger = image.resize((64 * zoom, 64 * zoom), Image.Resampling.NEAREST)
        sheet.paste(larger, (i % columns * cell + 1, i // columns * cell + 1))
    return sheet


def measure(seed: int) -> None:
    measure_vae(seed)
    measure_judge(seed)
    measure_world(seed)


# ---- Command line --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="make a finished part again")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--vae_steps", type=int, default=4500)
    parser.add_argument("--pipeline_steps", type=int, default=16_000)
    parser.add_argument("--judge_steps", type=int, default=3000)
    parser.add_argument("--scorer_steps", type=int, default=3000)
    parser.add_argument("--features_steps", type=int, default=2000)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    WORK.mkdir(exist_ok=True)
    jobs = {
        "prompts": lambda: build_prompts(args.seed),
        "vae": lambda: build_vae(args.seed, args.vae_steps),
        "judge": lambda: build_judge(args.seed, args.judge_steps),
        "pipeline": lambda: build_pipeline(args.seed, args.pipeline_steps),
        "scorer": lambda: build_scorer(args.seed, args.scorer_steps),
        "features": lambda: build_features(args.seed, args.features_steps),
        "measure": lambda: measure(args.seed),
    }
    for left in (path for part in args.parts if args.force for path in WORK.glob(f"{part}[.-]*")):
        left.unlink()
    for part in args.parts:
        done = WORK / f"{part}.done"
        if done.exists():
            print(f"[{part}] is finished; --force makes it again")
            continue
        start = time.monotonic()
        jobs[part]()
        done.touch()
        seconds = time.monotonic() - start
        log(part, f"finished {seconds:.0f} s after its last start, on {DEVICE.type}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
