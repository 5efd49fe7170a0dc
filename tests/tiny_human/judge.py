# SPDX-License-Identifier: Apache-2.0
"""The judge of the embedded world: looks at a picture, never at text, and says what body and clothes it sees.

A small convolutional network finds the joints (one heatmap per kind), says whether the body is right, and names pose,
arms and colours. It was trained on freshly drawn figures (build.py), right and broken, half of them through the VAE;
it has never seen a caption, the scorer, or the scorer's pictures. The caption enters in plain code alone:
`read_caption` says which attributes were asked for, and the probability that the judge gives to those is the mark.

Each function at the end is a scorer for make_preference_data.py and eval_human.py, all in [0, 1]:

    tests/tiny_human/judge.py:anatomy       P(the body is right: one head, two arms, two legs, all whole)
    tests/tiny_human/judge.py:clothes       P(shirt as asked) * P(trousers as asked)
    tests/tiny_human/judge.py:pose          P(pose as asked) * P(arms as asked)
    tests/tiny_human/judge.py:background    P(background as asked)
    tests/tiny_human/judge.py:judge         half anatomy, half the mean of the other three
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn


HERE = Path(__file__).resolve().parent

if "figures" not in sys.modules:  # loaded by path, so that it works from any folder
    spec = importlib.util.spec_from_file_location("figures", HERE / "figures.py")
    sys.modules["figures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["figures"])
from figures import ATTRIBUTES, HAIRS, JOINTS, RIGHT_COUNTS, SHIRTS, SKINS, TROUSERS, read_caption


Score = Callable[[list[Image.Image], list[str]], list[float]]


# ---- Network -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Judge(nn.Module):
    """(B, 3, 64, 64) pixels in [-1, 1] -> joint heatmaps (B, 5, 32, 32) and logits for anatomy and every attribute."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 32, 5, stride=2, padding=2), Residual(32))
        self.middle = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), Residual(64), Residual(64))
        self.coarse = nn.Sequential(nn.Conv2d(64, 128, 3, stride=2, padding=1), Residual(128), Residual(128))
        self.to_middle, self.to_fine = nn.Conv2d(128, 64, 1), nn.Conv2d(64, 32, 1)
        self.up_middle, self.up_fine = Residual(64), Residual(32)
        self.heatmaps = nn.Conv2d(32, len(JOINTS), 3, padding=1)
        self.anatomy_conv = nn.Sequential(
            nn.Conv2d(32 + len(JOINTS), 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(96, 128, 3, stride=2, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.anatomy = nn.Sequential(nn.Linear(128 * 16 + 128, 128), nn.SiLU(), nn.Linear(128, 1))
        self.attributes = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fine = self.fine(pixels)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        pooled = torch.cat([coarse.mean(dim=(2, 3)), coarse.amax(dim=(2, 3))], dim=1)
        up = self.up_middle(middle + F.interpolate(self.to_middle(coarse), scale_factor=2.0))
        up = self.up_fine(fine + F.interpolate(self.to_fine(up), scale_factor=2.0))
        heatmaps = self.heatmaps(up)
        joints = self.anatomy_conv(torch.cat([up, heatmaps.sigmoid()], dim=1)).flatten(1)
        anatomy = self.anatomy(torch.cat([joints, coarse.mean(dim=(2, 3))], dim=1)).squeeze(1)
        return heatmaps, anatomy, {name: head(pooled) for name, head in self.attributes.items()}


def count_joints(heatmaps: Tensor, threshold: float = 0.4) -> Tensor:
    """How many peaks each heatmap has: (B, 5, 32, 32) logits -> (B, 5) counts, in the order of JOINTS."""
    probability = heatmaps.sigmoid()
    is_peak = (probability == F.max_pool2d(probability, 5, stride=1, padding=2)) & (probability > threshold)
    return is_peak.sum(dim=(2, 3))


def counts_are_right(counts: Tensor) -> Tensor:
    """(B, 5) counts -> (B,) True where there are one head, two elbows, hands, knees and feet."""
    return (counts == torch.tensor([RIGHT_COUNTS[name] for name in JOINTS], device=counts.device)).all(dim=1)


# ---- Scorers -------------------------------------------------------------------------------------------------------


def load_judge(device: torch.device | str = "cpu") -> Judge:
    network = Judge()
    network.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(HERE / "judge" / "model.safetensors").items()}
    )
    return network.eval().requires_grad_(False).to(device)


def to_pixels(images: list[Image.Image]) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def marks(network: Judge, images: list[Image.Image], prompts: list[str]) -> list[dict[str, float]]:
    """For each image: P(body right) as "anatomy", and the probability of every attribute that its prompt asks for.

    All are rounded to hundredths: two pictures that are both as asked are equal, however sure the network is of it.
    """
    _, anatomy, attributes = network(to_pixels(images).to(next(network.parameters()).device))
    anatomy, attributes = (
        anatomy.double().sigmoid().mul(100).round().div(100).tolist(),
        {name: x.double().softmax(1).mul(100).round().div(100).tolist() for name, x in attributes.items()},
    )
    return [
        {"anatomy": anatomy[i]}
        | {name: attributes[name][i][ATTRIBUTES[name].index(value)] for name, value in read_caption(prompt).items()}
        for i, prompt in enumerate(prompts)
    ]


def make_scorer(device: torch.device | str, mark: Callable[[dict[str, float]], float]) -> Score:
    network = load_judge(device)
    return lambda images, prompts: [mark(m) for m in marks(network, images, prompts)]


def anatomy(device: torch.device | str = "cpu") -> Score:
    return make_scorer(device, lambda m: m["anatomy"])


def clothes(device: torch.device | str = "cpu") -> Score:
    return make_scorer(device, lambda m: m.get("shirt", 1) * m.get("trousers", 1))


def pose(device: torch.device | str = "cpu") -> Score:
    return make_scorer(device, lambda m: m.get("pose", 1) * m.get("arms", 1))


def background(device: torch.device | str = "cpu") -> Score:
    return make_scorer(device, lambda m: m.get("background", 1))


def total(m: dict[str, float]) -> float:
    clothes, pose = m.get("shirt", 1) * m.get("trousers", 1), m.get("pose", 1) * m.get("arms", 1)
    return 0.5 * m["anatomy"] + 0.5 * (clothes + pose + m.get("background", 1)) / 3


def judge(device: torch.device | str = "cpu") -> Score:
    return make_scorer(device, total)


# ---- Identity ------------------------------------------------------------------------------------------------------
# A person of this world is known by four colours. They are looked for in fixed places: pixels right of and below the
# middle of the head, which lies in the face.

PARTS = {
    "hair": (HAIRS, [(-1.0, -6.2), (0.0, -6.2), (1.0, -6.2)]),
    "skin": (SKINS, [(-3.6, 2.6), (3.6, 2.6), (-2.4, -2.2), (0.0, -2.2), (2.4, -2.2)]),
    "shirt": (SHIRTS.values(), [(x, y) for x in (-1.5, 0.0, 1.5) for y in (12.5, 15.5, 18.5)]),
    "trousers": (TROUSERS.values(), [(x, 25.2) for x in (-1.5, 0.0, 1.5)]),
}  # fmt: skip
WIDTH = 40.0  # of the kernel that compares two colours, in 8-bit RGB; the closest two of a palette lie 54 apart
SAME_PERSON = 0.75  # cosine from which two pictures show one person; personal.py prints how often that is right


def find_head(heatmaps: Tensor) -> Tensor:
    """(B, 5, 32, 32) logits -> (B, 2) x and y of the clearest head in pixels, nan where there is none."""
    probability = heatmaps[:, JOINTS.index("head")].sigmoid()
    peak, index = probability.flatten(1).max(dim=1)
    cell = torch.stack([index % 32, index // 32], dim=1)
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="xy"), dim=-1).to(cell)
    near = ((grid - cell[:, None, None]).abs().amax(dim=-1) <= 1) * probability  # the centre of mass around the peak
    centre = torch.einsum("byx,yxc->bc", near, grid + 0.5) / near.sum(dim=(1, 2))[:, None]
    return torch.where(peak[:, None] > 0.4, 2 * centre, torch.nan)


def colours_near(pixels: Tensor, middle: Tensor, places: list[tuple[float, float]]) -> Tensor:
    """The median colour at `places`, in pixels from `middle` (B, 2), of pictures (B, 3, 64, 64): (B, 3)."""
    points = middle[:, None] + torch.tensor(places, device=middle.device)
    grid = (points / 32 - 1).nan_to_num()[:, None]
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)[:, :, 0].median(dim=2).values


def compare_colours(colours: Tensor, palette: Tensor) -> Tensor:
    """How alike (B, 3) colours in 0..255 are to (N, 3) others: (B, N), less what the palette's own are on average.

    Two of the palette's colours have a cosine of about -1 / (N - 1), and a colour like none of them is like nobody.
    """

    def alike(a: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(a, palette) ** 2) / (2 * WIDTH**2))

    return alike(colours) - alike(palette).mean(dim=0)


def face(device: torch.device | str = "cpu") -> Callable[[list[Image.Image]], np.ndarray]:
    """An embedder: images -> (N, 22), whose cosine tells whether two pictures show the same person.

    Hair, skin, shirt and trousers have one part of the numbers each, and count the same. The cosine is near 1 for the
    same person and near -0.2 for persons who have nothing in common; one person is recognised from SAME_PERSON on. A
    row is nan where no head is found. Nothing is learned here but where the head is.
    """
    network = load_judge(device)

    @torch.no_grad()
    def embed(images: list[Image.Image]) -> np.ndarray:
        pixels = to_pixels(images).to(device)
        middle = find_head(network(pixels)[0])
        colours = {name: colours_near(pixels, middle, places) for name, (_, places) in PARTS.items()}
        features = [
            compare_colours(colours[name] * 127.5 + 127.5, torch.tensor([*palette], dtype=torch.float, device=device))
            for name, (palette, _) in PARTS.items()
        ]
        return torch.cat(features, dim=1).where(middle.isfinite().all(dim=1)[:, None], torch.nan).cpu().numpy()

    return embed
