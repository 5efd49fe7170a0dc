# SPDX-License-Identifier: Apache-2.0
"""Writes a pipeline with the full-size architecture of Stable Diffusion 1.5, SDXL or SD 3.5 medium and random weights,
to try a real run's time and memory without downloading a model. Only the weights (and the vocabulary) differ.

    python tests/full_size_model.py FOLDER          2 GB in half precision
    python tests/full_size_model.py FOLDER --sdxl   7 GB; 14 GB of memory while it is made
    python tests/full_size_model.py FOLDER --sd3    6 GB; 11 GB of memory while it is made; without T5
"""

import argparse
from functools import partial
from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WORDS = CLIPTokenizer.from_pretrained(Path(__file__).parent / "tiny_human/pipeline/tokenizer", model_max_length=77)
IDS = {name: getattr(WORDS, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
AUTOENCODER = partial(diffusers.AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2, **BLOCKS)


def clip(width: int, layers: int, heads: int, **options: object) -> CLIPTextModel | CLIPTextModelWithProjection:
    """One of CLIP's text encoders, 123M or 695M, with a projection where `projection_dim` is given."""
    sizes = {"intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = CLIPTextConfig(hidden_size=width, **sizes, **IDS, **options)
    return CLIPTextModelWithProjection(config) if "projection_dim" in options else CLIPTextModel(config)


def build() -> diffusers.StableDiffusionPipeline:
    """The architecture of stable-diffusion-v1-5: 860M U-Net."""
    return diffusers.StableDiffusionPipeline(
        vae=AUTOENCODER(sample_size=512), text_encoder=clip(768, 12, 12), tokenizer=WORDS, safety_checker=None,
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, **BETAS), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def build_xl() -> diffusers.StableDiffusionXLPipeline:
    """The architecture of stable-diffusion-xl-base-1.0: 2.6B U-Net."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ).half()  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=AUTOENCODER(sample_size=1024, scaling_factor=0.13025), unet=unet, tokenizer=WORDS, tokenizer_2=WORDS,
        text_encoder=clip(768, 12, 12), text_encoder_2=clip(1280, 32, 20, projection_dim=1280, hidden_act="gelu"),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
    )  # fmt: skip


def build_3() -> diffusers.StableDiffusion3Pipeline:
    """The architecture of stable-diffusion-3.5-medium without T5: 2.2B transformer."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    ).half()  # fmt: skip
    vae = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    return diffusers.StableDiffusion3Pipeline(
        vae=AUTOENCODER(sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, **vae),
        text_encoder=clip(768, 12, 12, projection_dim=768), tokenizer=WORDS, tokenizer_2=WORDS, tokenizer_3=None,
        text_encoder_2=clip(1280, 32, 20, projection_dim=1280, hidden_act="gelu"), text_encoder_3=None,
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--sdxl", dest="build", action="store_const", const=build_xl, default=build, help="SDXL")
    parser.add_argument("--sd3", dest="build", action="store_const", const=build_3, help="SD 3.5 medium")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.build().to(dtype=torch.float16).save_pretrained(args.folder)
