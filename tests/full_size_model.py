# SPDX-License-Identifier: Apache-2.0
"""Writes a pipeline with the full-size architecture of Stable Diffusion 1.5 or SDXL and random weights, to try a real
run's time and memory without downloading a model. Only the weights (and the vocabulary) differ from the real one.

    python tests/full_size_model.py FOLDER          2 GB in half precision
    python tests/full_size_model.py FOLDER --sdxl   7 GB; 14 GB of memory while it is made
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


WORLD = Path(__file__).resolve().parent / "tiny_human"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, **options: object) -> CLIPTextConfig:
    """The architecture of one of CLIP's text encoders."""
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **options,
    )  # fmt: skip


def autoencoder(**options: object) -> AutoencoderKL:
    """The autoencoder of both, 84M."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, **options,
    )  # fmt: skip


def build(seed: int = 0) -> StableDiffusionPipeline:
    """The architecture of stable-diffusion-v1-5: 860M U-Net, 123M text encoder."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(WORLD / "pipeline" / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModel(text_config(tokenizer, 768, 12, 12))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return StableDiffusionPipeline(
        vae=autoencoder(sample_size=512), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, **BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """The architecture of stable-diffusion-xl-base-1.0: 2.6B U-Net, text encoders of 123M and 695M."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(WORLD / "pipeline" / "tokenizer", model_max_length=77)
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ).half()  # fmt: skip
    large = text_config(tokenizer, 1280, 32, 20, projection_dim=1280, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        vae=autoencoder(sample_size=1024, scaling_factor=0.13025), unet=unet, tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text_config(tokenizer, 768, 12, 12)), tokenizer_2=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(large), scheduler=EulerDiscreteScheduler(**BETAS),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sdxl", action="store_true", help="SDXL in place of SD 1.5")
    args = parser.parse_args()
    (build_xl() if args.sdxl else build()).to(dtype=torch.float16).save_pretrained(args.folder)
