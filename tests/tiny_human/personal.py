# SPDX-License-Identifier: Apache-2.0
"""Personalises the embedded world's pipeline: two dozen photos of one person, and a LoRA of the U-Net, as DreamBooth.

    python tests/tiny_human/personal.py personal            about three minutes on one CPU core

    personal/pytorch_lora_weights.safetensors    loads with pipe.load_lora_weights("personal")
    personal/references/*.png                    eight of the photos, to compare faces with
    personal/prompts.txt                         this person in poses, arms and backgrounds that no photo shows

The person is invented from the seed and keeps hair, skin, clothes and shoes in every photo. The prompts call them sks,
in place of the colours of shirt and trousers: no word of these prompts says what the person looks like, so that only
the LoRA can know. The base model has never read sks, and draws anybody.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from tqdm import tqdm


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from figures import Figure, Person, all_attributes, draw, random_person
from judge import SAME_PERSON, face, to_pixels


PHOTOS, REFERENCES = 24, 8
PROMPT = "a {pose} person in sks shirt and trousers with {arms} on a {background} background"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


# ---- The person ----------------------------------------------------------------------------------------------------


def invent_person(seed: int) -> tuple[Person, dict[str, str]]:
    """Somebody, and the clothes that they always wear."""
    rng = random.Random(seed)
    attributes = rng.choice(all_attributes())
    return random_person(rng), {name: attributes[name] for name in ("shirt", "trousers")}


def scenes(clothes: dict[str, str], seed: int) -> list[dict[str, str]]:
    """All 90 combinations of pose, arms and background, with these clothes, in an order of the seed."""
    found = [attributes for attributes in all_attributes() if clothes.items() <= attributes.items()]
    random.Random(seed).shuffle(found)
    return found


def write_prompt(scene: dict[str, str]) -> str:
    """A caption that names the person instead of the clothes; read_caption reads the rest."""
    return PROMPT.format(**scene)


# ---- The LoRA ------------------------------------------------------------------------------------------------------


def train_lora(
    pipe: StableDiffusionPipeline, photos: list[Figure], args: argparse.Namespace
) -> None:
    """Leaves in `pipe.unet` a LoRA that minimises the usual loss |v - v_theta(x_t, t, prompt)|^2 on the photos."""
    torch.manual_seed(args.seed)
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LAYERS))
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pixels = to_pixels([photo.image for photo in photos])
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        prompts = [write_prompt(photo.attributes) for photo in photos]
        embeds = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
    progress = tqdm(range(args.steps), desc="personal LoRA")
    for _ in progress:
        rows = torch.randint(0, len(photos), (args.batch_size,))
        x_0, t = latents[rows], torch.randint(0, schedule.config.num_train_timesteps, (args.batch_size,))
        eps = torch.randn_like(x_0)
        prediction = pipe.unet(schedule.add_noise(x_0, eps, t), t, embeds[rows]).sample
        loss = F.mse_loss(prediction, schedule.get_velocity(x_0, eps, t))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the person, the photos and the training")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    person, clothes = invent_person(args.seed)
    every_scene = scenes(clothes, args.seed)
    rng = random.Random(args.seed)
    photos = [draw(scene, rng.getrandbits(32), None, person) for scene in every_scene[:PHOTOS]]
    references = args.folder / "references"
    references.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(photos[:REFERENCES]):
        photo.image.save(references / f"{i}.png")
    (args.folder / "prompts.txt").write_text("".join(write_prompt(scene) + "\n" for scene in every_scene[PHOTOS:]))

    pipe = StableDiffusionPipeline.from_pretrained(HERE / "pipeline", torch_dtype=torch.float32)
    train_lora(pipe, photos, args)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(args.folder, unet_lora_layers=layers)


if __name__ == "__main__":
    main()
