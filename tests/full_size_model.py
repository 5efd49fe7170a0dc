# SPDX-License-Identifier: Apache-2.0
"""Writes a pipeline with the full-size architecture of Stable Diffusion 1.5 and random weights, to try a real run's
time and memory without downloading a model. Only the weights (and the vocabulary) differ from the real one.

    python tests/full_size_model.py FOLDER          2 GB in half precision
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


WORLD = Path(__file__).resolve().parent / "tiny_human"


def build(seed: int = 0) -> StableDiffusionPipeline:
    """The architecture of stable-diffusion-v1-5: 860M U-Net, 84M autoencoder, 123M text encoder."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(WORLD / "pipeline" / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build().to(dtype=torch.float16).save_pretrained(parser.parse_args().folder)
