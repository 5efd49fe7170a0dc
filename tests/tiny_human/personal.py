# SPDX-License-Identifier: Apache-2.0
"""Personalises the embedded world's pipeline: two dozen photos of one person, and a LoRA of the U-Net, as DreamBooth.

    python tests/tiny_human/personal.py personal            two to four minutes on one CPU core

    personal/pytorch_lora_weights.safetensors    loads with pipe.load_lora_weights("personal")
    personal/references/*.png                    eight of the photos, to compare faces with
    personal/prompts.txt                         this person in the 66 scenes that no photo shows

The person is invented from the seed and keeps hair, skin, clothes and shoes in every photo. The prompts say "sks" in
place of the colours of shirt and trousers: no word says what the person looks like, only the LoRA knows it. The base
model has never read sks, and draws anybody. A scene is a pose, arms and a background; there are 90.

The loss counts most on head and torso, from which a person is known: in as many steps more of it is learned. The
photos show right limbs, so that the LoRA may also mend some of what the base model draws badly; how much depends on
the person.

At the end it prints how often the embedder of faces (judge.py:face) is right about freshly drawn people.
"""

import argparse
import logging
import os
import random
import sys
import warnings
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # "requires torchvision"
logging.getLogger("xformers").setLevel(logging.ERROR)  # "can't load C++/CUDA extensions" on a CPU
warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import tqdm


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from figures import HAIRS, SHIRTS, SKINS, TROUSERS, Figure, Person, all_attributes, draw, random_person
from judge import SAME_PERSON, face, to_pixels


PHOTOS, REFERENCES = 24, 8
PROMPT = "a {pose} person in sks shirt and trousers with {arms} on a {background} background"
# Attention alone can hardly move a constant such as the colour of hair; convolutions and feed-forward layers can.
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LAYERS += ["conv1", "conv2", "conv_out"]
ELSEWHERE = 0.1  # weight of the loss outside head and torso

Dressed = tuple[Person, dict[str, str]]  # somebody, and the shirt and trousers that they always wear


# ---- The person ----------------------------------------------------------------------------------------------------


def invent_person(seed: int) -> Dressed:
    rng = random.Random(seed)
    attributes = rng.choice(all_attributes())
    return random_person(rng), {name: attributes[name] for name in ("shirt", "trousers")}


def double_of(who: Dressed, seed: int) -> Dressed:
    """Another person, who differs in one of hair, skin, shirt and trousers alone."""
    person, clothes = who
    options = {"hair": HAIRS, "skin": SKINS, "shirt": SHIRTS, "trousers": TROUSERS}
    rng = random.Random(seed)
    part = rng.choice(list(options))
    worn = {*clothes.values(), person.hair, person.skin}  # shirt and trousers never have one colour
    new = rng.choice([value for value in options[part] if value not in worn])
    return (person, clothes | {part: new}) if part in clothes else (person._replace(**{part: new}), clothes)


def scenes(who: Dressed, seed: int) -> list[dict[str, str]]:
    """The attributes of all 90 combinations of pose, arms and background in this person's clothes, shuffled."""
    found = [attributes for attributes in all_attributes() if who[1].items() <= attributes.items()]
    random.Random(seed).shuffle(found)
    return found


def take_photos(who: Dressed, count: int, seed: int) -> list[Figure]:
    """Right figures of this person in the first scenes of the seed."""
    rng = random.Random(seed)
    return [draw(scene, rng.getrandbits(32), person=who[0]) for scene in scenes(who, seed)[:count]]


def write_prompt(scene: dict[str, str]) -> str:
    """A caption with "sks" in place of the colours; read_caption reads the rest."""
    return PROMPT.format(**scene)


def weight_map(photo: Figure) -> torch.Tensor:
    """(16, 16) over the latents: 1 on head and torso, from the hair to the waist, ELSEWHERE on all else."""
    (x, y), middle = photo.joints["head"][0], 4 * torch.arange(16) + 2.0  # of a latent, in pixels
    rows, columns = (middle > y - 11) & (middle < y + 29), (middle - x).abs() < 8
    return torch.where(rows[:, None] & columns[None, :], 1.0, ELSEWHERE)


# ---- The LoRA ------------------------------------------------------------------------------------------------------


def train_lora(pipe: StableDiffusionPipeline, photos: list[Figure], args: argparse.Namespace) -> None:
    """Puts a LoRA into `pipe.unet` that lowers the weighted |v - v_theta(x_t, t, prompt)|^2 on the photos."""
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LAYERS)
    pipe.unet.requires_grad_(False).add_adapter(config)
    optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], args.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pixels = to_pixels([photo.image for photo in photos])
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        prompts = [write_prompt(photo.attributes) for photo in photos]
        embeds, _ = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    weights = torch.stack([weight_map(photo) for photo in photos])
    for _ in (progress := tqdm(range(args.steps), desc="personal LoRA")):
        rows = torch.randint(len(photos), (args.batch_size,))
        t = torch.randint(schedule.config.num_train_timesteps, (args.batch_size,))
        x_0, eps = latents[rows], torch.randn_like(latents[rows])
        prediction = pipe.unet(schedule.add_noise(x_0, eps, t), t, embeds[rows]).sample
        error = (prediction - schedule.get_velocity(x_0, eps, t)).square().mean(dim=1)
        loss = (weights[rows] * error).sum() / weights[rows].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


# ---- The embedder --------------------------------------------------------------------------------------------------


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of every row of (N, D) with every row of (M, D): (N, M)."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def measure_face(people: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """Cosines between two photos of one person, of a person and their double, and of two persons.

    There are `count` photos of each of `people` persons; two who by chance differ in fewer than two colours are left
    out of the last.
    """
    embed = face()
    whos = [invent_person(seed + i) for i in range(people)]
    mine, again, doubles = (
        [embed([photo.image for photo in take_photos(who, count, s + i)]) for i, who in enumerate(group)]
        for group, s in ((whos, 1000), (whos, 2000), ([double_of(who, seed + i) for i, who in enumerate(whos)], 3000))
    )
    look = [(who[0].hair, who[0].skin, *who[1].values()) for who in whos]
    pairs = [(i, j) for i in range(people) for j in range(i)]
    others = [(i, j) for i, j in pairs if sum(a != b for a, b in zip(look[i], look[j], strict=True)) > 1]
    return {
        "same person": np.stack([cosines(a, b) for a, b in zip(mine, again, strict=True)]),
        "one colour differs": np.stack([cosines(a, b) for a, b in zip(mine, doubles, strict=True)]),
        "another person": np.stack([cosines(mine[i], mine[j]) for i, j in others]),
    }


# ---- Command line --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the person, the photos and the training")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    args = parser.parse_args(argv)

    who = invent_person(args.seed)
    photos, held_out = take_photos(who, PHOTOS, args.seed), scenes(who, args.seed)[PHOTOS:]
    (args.folder / "references").mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(photos[:REFERENCES]):
        photo.image.save(args.folder / "references" / f"{i}.png")
    (args.folder / "prompts.txt").write_text("".join(write_prompt(scene) + "\n" for scene in held_out))

    pipe = StableDiffusionPipeline.from_pretrained(HERE / "pipeline", torch_dtype=torch.float32)
    train_lora(pipe, photos, args)
    # peft's own names: convert_state_dict_to_diffusers renames attention alone, which loading would then skip
    pipe.save_lora_weights(args.folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))

    for pair, cosine in measure_face(people=40, count=6, seed=args.seed + 1).items():
        right = (cosine >= SAME_PERSON) == (pair == "same person")
        print(f"face, {pair}: cosine {cosine.mean():.3f}, right at {SAME_PERSON}: {right.mean():.4f} of {cosine.size}")


if __name__ == "__main__":
    main()
