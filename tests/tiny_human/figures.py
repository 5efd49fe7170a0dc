# SPDX-License-Identifier: Apache-2.0
"""Draws the people of the embedded world: captioned figures, 64 x 64 RGB, right or broken on purpose.

These are the world's *real photos*: the tiny models of this folder are trained on them, SDRecon starts from them, and
the judge learns from them what a right body is. A figure is a function of its attributes, a seed and a kind of break:

    figure = draw({"pose": "jumping", "arms": "both arms raised", "shirt": "red", "trousers": "black",
                   "background": "mint"}, seed=0)
    figure.image            # PIL image, 64 x 64
    figure.caption          # "a jumping person in a red shirt and black trousers with both arms raised on a mint ..."
    figure.joints           # {"head": [(x, y)], "elbow": [...], "hand": [...], "knee": [...], "foot": [...]}, pixels

The person faces us, so that their left arm is on the right of the picture.

    python figures.py FOLDER --count 64 [--broken]     writes pictures with a metadata.jsonl (datasets' imagefolder)
"""

import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw


SIZE = 64
SUPERSAMPLING = 3
OUTLINE, EDGE = 0.6, 0.62  # width in pixels, and the share of its part's colour that an outline has

POSES = ("standing", "walking", "jumping")
ARMS = ("both arms down", "both arms stretched out", "both arms raised", "the left arm raised", "the right arm raised")
SHIRTS = {
    "red": (214, 56, 56), "blue": (56, 98, 214), "green": (52, 156, 84),
    "yellow": (240, 200, 48), "purple": (140, 72, 190), "orange": (240, 132, 40),
}  # fmt: skip
TROUSERS = {
    "black": (44, 44, 52), "white": (248, 248, 248), "brown": (124, 80, 48),
    "blue": (44, 72, 150), "green": (60, 110, 60), "red": (160, 40, 50),
}  # fmt: skip
BACKGROUNDS = {
    "pink": (246, 184, 202), "mint": (168, 226, 196), "grey": (182, 186, 192),
    "beige": (234, 214, 172), "lavender": (198, 186, 240), "cyan": (158, 216, 242),
}  # fmt: skip
ATTRIBUTES = {
    "pose": POSES, "arms": ARMS, "shirt": tuple(SHIRTS), "trousers": tuple(TROUSERS), "background": tuple(BACKGROUNDS),
}  # fmt: skip
SKINS = ((255, 219, 188), (238, 187, 148), (204, 146, 104), (150, 98, 66), (104, 68, 48))
HAIRS = ((40, 30, 28), (92, 58, 34), (196, 146, 72), (168, 74, 40), (120, 120, 126))
SHOES = ((52, 44, 44), (110, 62, 40), (74, 80, 100))

JOINTS = ("head", "elbow", "hand", "knee", "foot")
RIGHT_COUNTS = {"head": 1, "elbow": 2, "hand": 2, "knee": 2, "foot": 2}
BREAKS = (
    "missing_arm", "stump_arm", "extra_arm", "missing_leg", "stump_leg", "extra_leg", "two_heads", "no_head",
)  # fmt: skip


class Person(NamedTuple):
    """What stays with a person from picture to picture, besides the clothes that the attributes name."""

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    shoe: tuple[int, int, int]
    hair_style: int  # 0 short, 1 long, 2 in a bun


@dataclass
class Figure:
    image: Image.Image
    caption: str
    attributes: dict[str, str]
    joints: dict[str, list[tuple[float, float]]]
    broken: str | None


# ---- Words ---------------------------------------------------------------------------------------------------------


def write_caption(attributes: dict[str, str]) -> str:
    """The sentence for a set of attributes; `read_caption` is its inverse."""
    return (
        "a {pose} person in a {shirt} shirt and {trousers} trousers with {arms} on a {background} background"
    ).format(**attributes)


def read_caption(caption: str) -> dict[str, str]:
    """The attributes that a caption names; one that it does not name is left out."""
    patterns = {
        "pose": f"({'|'.join(POSES)}) person", "arms": f"({'|'.join(ARMS)})",
        "shirt": f"({'|'.join(SHIRTS)}) shirt", "trousers": f"({'|'.join(TROUSERS)}) trousers",
        "background": f"({'|'.join(BACKGROUNDS)}) background",
    }  # fmt: skip
    found = {name: re.search(pattern, caption) for name, pattern in patterns.items()}
    return {name: match.group(1) for name, match in found.items() if match}


def all_attributes() -> list[dict[str, str]]:
    """Every combination in which shirt and trousers differ in colour, in a fixed order."""
    return [
        {"pose": pose, "arms": arms, "shirt": shirt, "trousers": trousers, "background": background}
        for pose in POSES for arms in ARMS for shirt in SHIRTS for trousers in TROUSERS for background in BACKGROUNDS
        if shirt != trousers
    ]  # fmt: skip


# ---- Skeleton ------------------------------------------------------------------------------------------------------

Point = tuple[float, float]


def reach(start: Point, angle: float, length: float) -> Point:
    """The point `length` pixels from `start`; 0 degrees hangs straight down, positive turns to the picture's right."""
    return start[0] + length * math.sin(math.radians(angle)), start[1] + length * math.cos(math.radians(angle))


def arm_angles(arms: str, is_left: bool, rng: random.Random) -> tuple[float, float]:
    """(upper arm, forearm) in degrees outwards from straight down, for the person's left or right arm."""
    raised = arms == "both arms raised" or arms == ("the left arm raised" if is_left else "the right arm raised")
    if raised:
        upper = rng.uniform(128, 148)
        return upper, upper + rng.uniform(5, 28)
    if arms == "both arms stretched out":
        upper = rng.uniform(78, 98)
        return upper, upper + rng.uniform(-12, 14)
    upper = rng.uniform(24, 38)
    return upper, upper + rng.uniform(-16, 10)


def leg_angles(pose: str, is_left: bool, facing: int, rng: random.Random) -> tuple[float, float]:
    """(thigh, shin) in degrees towards the picture's right, for the person's left or right leg."""
    outwards = 1 if is_left else -1
    if pose == "standing":
        thigh = rng.uniform(5, 9)
        return outwards * thigh, outwards * (thigh + rng.uniform(-3, 2))
    if pose == "jumping":
        thigh = rng.uniform(38, 52)
        return outwards * thigh, outwards * rng.uniform(-16, 2)
    if outwards == facing:  # the leg that steps forward
        thigh = rng.uniform(30, 40)
        return facing * thigh, facing * (thigh - rng.uniform(18, 30))
    thigh = rng.uniform(10, 18)
    return -facing * thigh, -facing * (thigh + rng.uniform(14, 26))


# ---- Drawing -------------------------------------------------------------------------------------------------------


class Canvas:
    """A PIL canvas in pixels of the finished picture, drawn larger and reduced at the end."""

    def __init__(self, background: tuple[int, int, int], light: float):
        size = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (size, size))
        self.pen = ImageDraw.Draw(self.image)
        for y in range(size):
            shade = 1 + light * (0.5 - y / size)
            self.pen.line([(0, y), (size, y)], fill=tuple(min(255, round(c * shade)) for c in background))

    def disc(self, centre: Point, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        x, y, rx, ry = (value * SUPERSAMPLING for value in (*centre, rx, ry))
        self.pen.ellipse([x - rx, y - ry, x + rx, y + ry], fill=fill)

    def stroke(self, points: list[Point], width: float, fill: tuple[int, int, int]) -> None:
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        self.pen.line(scaled, fill=fill, width=round(width * SUPERSAMPLING))
        for point in points:
            self.disc(point, width / 2, width / 2, fill)

    def polygon(self, points: list[Point], fill: tuple[int, int, int]) -> None:
        self.pen.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=fill)

    def finished(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLING)


def darker(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(round(c * factor) for c in colour)


# Every part is drawn twice, first OUTLINE wider on each side and darker: limbs that cross stay apart.


def draw_head(canvas: Canvas, centre: Point, skin: tuple, hair: tuple, style: int) -> None:
    """A face with eyes and a mouth; hair short, long or in a bun."""
    x, y = centre
    for grow, tint in ((OUTLINE, EDGE), (0, 1)):
        colour = darker(hair, tint)
        if style == 1:
            for side in (-1, 1):
                canvas.disc((x + 5.3 * side, y + 3.2), 2.1 + grow, 5.0 + grow, colour)
        if style == 2:
            canvas.disc((x, y - 7.4), 2.7 + grow, 2.4 + grow, colour)
        canvas.disc((x, y - 0.9), 6.6 + grow, 6.7 + grow, colour)
        canvas.disc((x, y + 1.1), 5.6 + grow, 5.9 + grow, darker(skin, tint))
    ink = (36, 28, 28)
    for side in (-1, 1):
        canvas.disc((x + 2.3 * side, y + 0.6), 1.05, 1.25, ink)
    canvas.stroke([(x - 2.0, y + 3.2), (x, y + 4.3), (x + 2.0, y + 3.2)], 1.1, darker(skin, 0.45))


def draw_arm(canvas: Canvas, points: list[Point], shirt: tuple, skin: tuple) -> None:
    """`points` is shoulder, elbow, hand, or fewer for an arm that stops early."""
    for grow, tint in ((OUTLINE, EDGE), (0, 1)):
        if len(points) > 2:
            canvas.stroke(points[1:], 3.9 + 2 * grow, darker(skin, tint))
            canvas.disc(points[2], 2.9 + grow, 2.9 + grow, darker(skin, tint))
        canvas.stroke(points[:2], 4.9 + 2 * grow, darker(shirt, 0.92 * tint))


def draw_leg(canvas: Canvas, points: list[Point], trousers: tuple, shoe: tuple, outwards: int) -> None:
    """`points` is hip, knee, foot, or fewer for a leg that stops early."""
    for grow, tint in ((OUTLINE, EDGE), (0, 1)):
        if len(points) > 2:
            centre = (points[2][0] + 1.3 * outwards, points[2][1] + 0.6)
            canvas.disc(centre, 3.7 + grow, 2.3 + grow, darker(shoe, tint))
        canvas.stroke(points, 5.2 + 2 * grow, darker(trousers, tint))
    if len(points) > 2:
        canvas.disc(centre, 3.7, 2.3, shoe)


def random_person(rng: random.Random) -> Person:
    return Person(rng.choice(SKINS), rng.choice(HAIRS), rng.choice(SHOES), rng.randrange(3))


def draw(attributes: dict[str, str], seed: int, broken: str | None = None, person: Person | None = None) -> Figure:
    """One person with the given attributes.

    Everything that the attributes leave open (skin, hair, size, place, exact angles) comes from `seed`, so that the
    same seed with and without `broken` gives twins that differ in what is broken alone.

    Args:
        attributes: one value for each key of ATTRIBUTES.
        seed: any integer.
        broken: None for a right body, or one of BREAKS.
        person: whom to draw; None leaves skin, hair and shoes to the seed. All else is the same with and without.
    """
    rng, break_rng = random.Random(seed), random.Random(seed + 1)
    pose = attributes["pose"]
    shirt, trousers = SHIRTS[attributes["shirt"]], TROUSERS[attributes["trousers"]]
    anybody = random_person(rng)
    skin, hair, shoe, hair_style = person or anybody
    facing, light = rng.choice((-1, 1)), rng.uniform(-0.06, 0.06)
    scale = rng.uniform(1.13, 1.22)
    x, lean = 32 + rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)
    ground = 60.5 + rng.uniform(-0.7, 0.7)

    # The skeleton hangs from the hips; standing and walking feet touch the ground, a jump lifts them off it.
    angles = {is_left: leg_angles(pose, is_left, facing, rng) for is_left in (False, True)}
    thigh, shin = 8.8 * scale, 8.8 * scale
    drop = max(reach(reach((0, 0), a, thigh), b, shin)[1] for a, b in angles.values())
    lift = rng.uniform(3.5, 5.5) if pose == "jumping" else 0
    hip = (x, ground - 1.5 - lift - drop)
    neck = (x + lean, hip[1] - 14.5 * scale)
    head = (neck[0] + 0.4 * lean, neck[1] - 7.6)

    legs = []
    for is_left, (a, b) in angles.items():
        outwards = 1 if is_left else -1
        start = (hip[0] + 3.2 * scale * outwards, hip[1])
        knee = reach(start, a, thigh)
        legs.append((outwards, [start, knee, reach(knee, b, shin)]))
    arms = []
    for is_left in (False, True):
        outwards = 1 if is_left else -1
        a, b = (outwards * angle for angle in arm_angles(attributes["arms"], is_left, rng))
        start = (neck[0] + 6.0 * scale * outwards, neck[1] + 2.2)
        elbow = reach(start, a, 7.6 * scale)
        arms.append((outwards, [start, elbow, reach(elbow, b, 7.2 * scale)]))
    heads = [head]
    break_body(broken, heads, arms, legs, break_rng)

    canvas = Canvas(BACKGROUNDS[attributes["background"]], light)
    shadow = darker(BACKGROUNDS[attributes["background"]], 0.85)
    canvas.disc((x, ground + 1.0), 13 if not lift else 9, 1.9, shadow)
    for outwards, points in legs:
        draw_leg(canvas, points, trousers, shoe, outwards)
    w, h, collar = 5.2 * scale, 4.4 * scale, neck[1] + 1.2
    for grow, tint in ((OUTLINE, EDGE), (0, 1)):
        canvas.stroke([(neck[0], collar), (neck[0], neck[1] - 2)], 3.6 + 2 * grow, darker(skin, 0.92 * tint))
    for grow, tint in ((OUTLINE, EDGE), (0, 1)):
        left, right, top, waist = neck[0] - w - grow, neck[0] + w + grow, collar - grow, hip[1] + grow
        corners = [(hip[0] - h - grow, waist), (left, top), (right, top), (hip[0] + h + grow, waist)]
        canvas.polygon(corners, darker(shirt, tint))
        canvas.stroke([(left + 1.2, neck[1] + 1.8), (right - 1.2, neck[1] + 1.8)], 3.4 + 2 * grow, darker(shirt, tint))
    canvas.stroke([(hip[0] - h + 1.9, hip[1] + 0.6), (hip[0] + h - 1.9, hip[1] + 0.6)], 4.6, trousers)
    for centre in heads:
        draw_head(canvas, centre, skin, hair, hair_style)
    for _, points in arms:
        draw_arm(canvas, points, shirt, skin)

    joints = {"head": heads}
    for first, second, limbs in (("elbow", "hand", arms), ("knee", "foot", legs)):
        joints[first] = [points[1] for _, points in limbs if len(points) > 2]
        joints[second] = [points[2] for _, points in limbs if len(points) > 2]
    return Figure(canvas.finished(), write_caption(attributes), dict(attributes), joints, broken)


def break_body(kind: str | None, heads: list, arms: list, legs: list, rng: random.Random) -> None:
    """Breaks the skeleton in place, in one of the ways of BREAKS."""
    if kind is None:
        return
    if kind == "no_head":
        heads.clear()
    elif kind == "two_heads":
        x, y = heads[0]
        heads[:] = [(x - 6.9, y + 0.4), (x + 6.9, y + 0.4)]
    else:
        damage, limb = kind.split("_")
        limbs = {"arm": arms, "leg": legs}[limb]
        index = rng.randrange(2)
        outwards, points = limbs[index]
        start, middle, _ = points
        if damage == "missing":
            limbs.pop(index)
        elif damage == "stump":  # stops short of the elbow or the knee
            share = 0.75 if limb == "arm" else 0.9
            limbs[index] = (outwards, [start, between(start, middle, share)])
        elif damage == "extra":  # a third limb where there is most room for it
            if limb == "arm":
                options, taken = (24, 32, 84, 92, 136, 146), [abs(angle_of(start, middle))]
            else:
                options, taken = (-50, -44, -4, 4, 44, 50), [angle_of(*points[:2]) for _, points in legs]
            room = {a: min(abs(a - angle) for angle in taken) for a in options}
            angle = rng.choice([a for a in options if room[a] > 40] or [max(room, key=room.get)])
            if limb == "arm":
                angle *= outwards
            elif abs(angle) < 10:
                start = between(legs[0][1][0], legs[1][1][0], 0.5)
            else:
                outwards, start = next((side, points[0]) for side, points in legs if side * angle > 0)
            bend, middle = rng.uniform(-10, 10), reach(start, angle, math.dist(*points[:2]))
            limbs.append((outwards, [start, middle, reach(middle, angle + bend, math.dist(*points[1:]))]))


def between(a: Point, b: Point, share: float) -> Point:
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def angle_of(start: Point, end: Point) -> float:
    """The inverse of `reach`, in degrees."""
    return math.degrees(math.atan2(end[0] - start[0], end[1] - start[1]))


# ---- Command line --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=64, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true", help="break every body, in turn in each of the ways")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng, attributes = random.Random(args.seed), all_attributes()
    with open(args.folder / "metadata.jsonl", "w") as metadata:
        for i in range(args.count):
            figure = draw(
                rng.choice(attributes), rng.getrandbits(32), BREAKS[i % len(BREAKS)] if args.broken else None
            )
            figure.image.save(args.folder / f"{i:05d}.png")
            metadata.write(json.dumps({"file_name": f"{i:05d}.png", "text": figure.caption}) + "\n")


if __name__ == "__main__":
    main()
