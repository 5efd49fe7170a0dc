# SPDX-License-Identifier: Apache-2.0
"""What train_dpo_human.py reads, pairs, images, captions and LoRAs of others, and what it encodes once."""

import ast
import copy
import io
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from train_helpers import LORA, SMALL, assert_equal, flags, load, make_rows, tiny_sdxl, train, write_data

import train_dpo_human as trainer


ROWS, ONE_STEP = make_rows(4), {"max_train_steps": 1, "train_batch_size": 4}
ROWS[3]["caption"] = ROWS[0]["caption"]
WANTED = [(row["caption"], *(row[f"jpg_{side}"] for side in ("01" if row["label_0"] else "10"))) for row in ROWS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """The embedded world's, in fp32; nobody changes it."""
    trainer.quiet_libraries()
    return trainer.load_model(args_of(), torch.float32)[0]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "pairs"


def args_of(**settings):
    return trainer.parse_args(flags(SMALL | settings))


def choose(**settings) -> tuple:
    args = args_of(**settings)
    splits, place = trainer.read_source(args)
    return args, splits["train"], place, *trainer.decide_pairs(splits["train"], args)


def pairs_of(**settings) -> tuple[list[tuple], Counter]:
    """(caption, winner, loser) of the pairs, and what was left out."""
    _, rows, place, table, dropped = choose(**settings)
    cells = rows.with_format("arrow")
    files = [[b"".join(iter(file.readline, b"")) for file in trainer.open_pair(cells, pair, place)]
             for pair in table.itertuples()]  # by lines, as some of Pillow's plugins read  # fmt: skip
    return [(caption, *pair) for caption, pair in zip(table.caption, files, strict=True)], dropped


def encode(folder: Path, pipe, **settings) -> trainer.Pairs:
    """The pairs of a folder, encoded into a folder `encoded` in it."""
    (folder / "encoded").mkdir(exist_ok=True)
    args, rows, place, table, dropped = choose(train_data_dir=folder, encoded_dir=folder / "encoded", **settings)
    args.height = args.width = args.resolution
    context = (pipe, trainer.UNet(), dropped, args, Accelerator(cpu=True))
    return trainer.encode_pairs("train", rows, table, place, *context)


# Formats of the same four pairs; each returns the settings
OWN = {"image_0": "left", "image_1": "right", "label_0": "left_won", "caption": "words"}
OWN_ROWS = [{OWN[name]: row[name.replace("image", "jpg")] for name in OWN} for row in ROWS]
STRUCTS = [{"prompt": text, "chosen": {"bytes": x_w}, "rejected": {"bytes": x_l}} for text, x_w, x_l in WANTED]


def files_named_in(file: Path, lines: bool, names: tuple[str, str]) -> dict:
    """A json or jsonl file and its images; jsonl with votes."""
    file.parent.mkdir()
    rows = [{"prompt": caption} for caption, *_ in WANTED]
    for i, (row, own, (_, *sides)) in enumerate(zip(rows, ROWS, WANTED, strict=True)):
        for side, name in enumerate(names):
            row[name] = f"{i}-{name}.jpg"
            (file.parent / row[name]).write_bytes(own[f"jpg_{side}"] if lines else sides[side])
            row |= {f"prefer_{side}": bool(own[f"label_{side}"])} if lines else {}
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return {"train_data_dir": file}


def w_and_l(folder: Path) -> dict:
    """Names that a pattern mixes up: 1.jpg and 1.5.jpg, and [1], which is none; captions in w or beside it."""
    places = (("a", "1.5", "w"), ("a", "1", "."), ("b/c", "[1]", "w"), ("b/c", "x", "."))
    for (parent, name, beside), (caption, *sides) in zip(places, WANTED, strict=True):
        for side, content, kind in zip("wl", sides, ("jpg", "png"), strict=True):
            (folder / parent / side).mkdir(parents=True, exist_ok=True)
            (folder / parent / side / f"{name}.{kind}").write_bytes(content)
        (folder / parent / beside / f"{name}.txt").write_text(f"{caption}\n")
    return {"train_data_dir": folder}


FORMATS = {
    "a file": lambda at: {"train_data_dir": write_data(at, ROWS) / "data" / "train-00000-of-00001.parquet"},
    "a split": lambda at: {"dataset_name": write_data(at, ROWS[:1], ROWS), "dataset_split_name": "validation"},
    "train first": lambda at: {"dataset_name": write_data(at, ROWS, ROWS[:1])},
    "own columns": lambda at: {f"{flag}_column": name for flag, name in OWN.items()} | {
        "train_data_dir": write_data(at, OWN_ROWS)},
    "columns of structs": lambda at: {"train_data_dir": write_data(at, STRUCTS)},
    "path1 and path2": lambda at: files_named_in(at / "pairs.json", False, ("path1", "path2")),
    "prefer_0 and prefer_1": lambda at: files_named_in(at / "pairs.jsonl", True, ("image_0", "image_1")),
    "folders w and l": w_and_l,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_winners_losers_and_captions(name, folder):
    assert pairs_of(**FORMATS[name](folder)) == (WANTED, {})


def test_pairs_that_were_made_again_in_the_same_folder_are_seen(folder):
    config = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: pairs.parquet\n"
    for first in (0, 1):
        shutil.rmtree(folder, ignore_errors=True)
        Dataset.from_list(ROWS[first:]).to_parquet(folder / "pairs.parquet")
        (folder / "README.md").write_text(f"---\n{config}---\n")
        assert pairs_of(train_data_dir=folder)[0] == WANTED[first:]
        assert pairs_of(train_data_dir=folder, max_train_samples=2)[0] == WANTED[first:][:2]


def test_of_hub_data_no_more_rows_are_read_than_asked_for(tmp_path, monkeypatch):
    read, asked = tmp_path / "read.txt", []  # a file: `datasets` tells streams apart by what their functions hold
    kinds = {"chosen": "binary", "rejected": "binary", "prompt": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})

    def rows():
        for caption, winner, loser in WANTED * 10:
            with read.open("a") as file:
                file.write("+")
            yield {"chosen": winner, "rejected": loser, "prompt": caption}

    stream = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["test", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: asked.append(options) or stream)
    assert pairs_of(dataset_name="somebody/pairs", max_train_samples=2) == (WANTED[:2], {})
    assert len(read.read_text()) <= 3  # `datasets` looks one row ahead
    assert (asked[0]["split"], asked[0]["streaming"]) == ("validation", True)


INF, WON, HALF = math.inf, {"label_0": [1.0, 0.0, 1.0, 1.0]}, 1 / (1 + math.exp(-0.5))
LABELS = {
    "ties are left out": ({"label_0": [1, 0.5, 0, 0.5]}, {}, {0: 1, 2: 1}, {"tied": 2}),
    "ties are a half": ({"label_0": [1, 0.5, 0, 0.5]}, {"ties": "soft"}, {0: 1, 1: 0.5, 2: 1, 3: 0.5}, {}),
    "has_label": (WON | {"has_label": [True, False, True, True]}, {}, {0: 1, 2: 1, 3: 1}, {"without a label": 1}),
    "no such labels": ({"label_0": [1, 0.7, None, -1]}, {}, {0: 1}, {"WRONG LABEL": 3}),
    "labels that contradict": (WON | {"label_1": [1, 1, 0, 0]}, {}, {1: 1, 2: 1, 3: 1}, {"WRONG LABEL": 1}),
    "no caption": (WON | {"caption": ["a", " ", None, "b"]}, {}, {0: 1, 3: 1}, {"WITHOUT A CAPTION": 2}),
    "small margins": (WON | {"margin": [1, 2, INF, -3]}, {"min_margin": 2}, {1: 1, 2: 1}, {"below --min_margin": 2}),
    "soft": (WON | {"margin": [0, 2, INF, -3]}, {"soft_labels": 4}, {0: 0.5, 1: HALF, 2: 1, 3: 0.5}, {}),
    "no margin": (WON | {"margin": [1, None, 2, 3]}, {"min_margin": 1}, {0: 1, 2: 1, 3: 1}, {"WITHOUT A MARGIN": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_which_pairs_are_kept_and_their_labels(case):
    columns, settings, labels, left_out = LABELS[case]
    rows = Dataset.from_dict({"jpg_0": [b"0"] * 4, "jpg_1": [b"1"] * 4, "caption": list("abcd")} | columns)
    table, dropped = trainer.decide_pairs(rows, args_of(**settings))
    assert dict(zip(table.row, table.label, strict=True)) == pytest.approx(labels)
    assert dropped == left_out
    assert list(table.winner) == ["jpg_0" if columns["label_0"][row] else "jpg_1" for row in labels]


def test_about_a_share_of_the_captions_is_held_out_always_the_same_ones():
    pairs = pd.DataFrame({"caption": [f"person {i % 500}" for i in range(1500)], "row": range(1500)})
    held = {share: set(pairs.caption[trainer.hold_out(pairs, share)]) for share in (0.1, 0.3)}
    for share, captions in held.items():
        assert not set(pairs.caption[~trainer.hold_out(pairs, share)]) & captions  # a caption's pairs go together
        assert len(captions) == pytest.approx(500 * share, abs=4 * (500 * share * (1 - share)) ** 0.5)
    assert held[0.1] < held[0.3]
    assert trainer.hold_out(pairs.assign(caption="a person"), 0.1).sum() == pytest.approx(150, abs=4 * 135**0.5)


def test_bad_rows_are_left_out_and_counted_and_too_many_end_a_run(folder, tmp_path, monkeypatch, capsys):
    rows = make_rows(10)
    changes = {1: {"jpg_1": b"no image"}, 3: {"jpg_0": rows[3]["jpg_0"][:900]}, 4: {"jpg_1": None},
               6: {"jpg_1": rows[6]["jpg_0"]}, 7: {"label_0": 0.7}}  # fmt: skip
    write_data(folder, [row | changes.get(i, {}) for i, row in enumerate(rows)])
    with pytest.raises(trainer.UserError, match=r"1 of 10 rows of split 'train' cannot be used: 1 wrong label"):
        train(folder, tmp_path / "none", **ONE_STEP)
    assert not list((folder / "encoded").glob("latents*"))
    monkeypatch.setattr(trainer, "MAX_BAD_SHARE", 0.5)
    weights, told = train(folder, tmp_path / "run", **ONE_STEP), capsys.readouterr().out
    for part in ("5 to train on", "3 unreadable (train)", "1 the same image twice (train)", "1 wrong label (train)"):
        assert part in told
    good = write_data(tmp_path / "good", [row for i, row in enumerate(rows) if i not in changes])
    assert_equal(weights, train(good, tmp_path / "other", **ONE_STEP))


def stored(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file, image = io.BytesIO(), image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


SWAPPED = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ"), (b"sRGB", b"grRB")):
    SWAPPED = SWAPPED.replace(old, new)  # what sRGB calls red is called green
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3
COLOURS, GREYS = Image.fromarray(np.uint8([[RED, GREEN, BLUE]])), [BLACK, (128,) * 3, WHITE]
INDEXED, WORDS = COLOURS.convert("P", palette=Image.Palette.ADAPTIVE), np.uint16([[0, 32768, 65535]])
IMAGES = {
    "16-bit PNG": (stored(WORDS), GREYS),
    "floats up to 1": (stored(np.float32([[-1, 0.5, 1]]), "TIFF"), GREYS),
    "a transparent index": (stored(INDEXED, transparency=INDEXED.getpixel((2, 0))), [RED, GREEN, WHITE]),
    "RGBA": (stored(np.uint8([[(*RED, 0), (*RED, 51), (*RED, 255)]])), [WHITE, (255, 204, 204), RED]),
    "a profile": (stored(COLOURS, icc_profile=SWAPPED), [GREEN, RED, BLUE]),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_every_kind_are_read_as_they_look(kind):
    image = trainer.read_image(io.BytesIO(IMAGES[kind][0]))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[0].astype(int), IMAGES[kind][1], atol=1)


CAPTIONS = [  # and what is read or told
    ({"w/1.txt": "\ufeffcafé au lait"}, "café au lait"),
    ({"w/1.txt": "one", "w/1.caption": "two", "1.txt": "three"}, "one"),
    ({"1.caption": "\n one \r\ntwo\r\n"}, "one"),  # alternatives
    ({"__MACOSX/w/1.jpg": "", "w/.1.jpg": "", "w/Thumbs.db": "", "l/._2.png": "", "w/x.jpg/y": "", "1.txt": "a"}, "a"),
    ({"w/2.txt": "two"}, "w/1.jpg has no caption"),
    ({"w/1.txt": "a person\nNegative prompt: b\nSteps: 20, Sampler: x"}, "w/1.txt holds a generator's settings"),
    ({"w/1.png": "V", "1.txt": "a"}, "w has several images named 1"),
    ({"w/2.jpg": "W", "1.txt": "a", "2.txt": "a"}, "has no 2 in l"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "told"), CAPTIONS)
def test_folders_with_captions(files, told, folder, tmp_path):
    for name, content in ({"w/1.jpg": "W", "l/1.png": "L"} | files).items():
        file = tmp_path / "elsewhere" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode())
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    if "has" in told or "holds" in told:
        with pytest.raises(trainer.UserError, match=told):
            trainer.rows_of_folders(folder)
    else:
        sides = {"chosen": str(folder / "linked/w/1.jpg"), "rejected": str(folder / "linked/l/1.png")}
        assert trainer.rows_of_folders(folder) == [sides | {"prompt": told}]


def test_every_text_file_is_read_and_written_as_utf_8():
    """On a machine with another locale "café" would be trained as mojibake."""
    nodes = ast.walk(ast.parse(Path(trainer.__file__).read_text(encoding="utf-8")))
    calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)
             and getattr(node.func, "attr", "") in ("open", "read_text", "write_text")]  # fmt: skip
    assert [call for call in calls if not re.search("utf-8|'rb'|Image.open", call)] == []


def test_buckets_by_hand():
    sizes = {  # of height, width, resolution, multiple
        # 512 * sqrt(1216 / 832) = 619, 512 / sqrt(1216 / 832) = 424; 512 * sqrt(2) = 724 and 362, in steps of 64
        (1216, 832, 512, 8): (640, 448), (832, 1216, 512, 8): (448, 640), (4000, 500, 512, 8): (704, 384),
        (96, 64, 64, 8): (80, 56), (96, 64, 360, 16): (448, 288),  # 78.4 and 52.3 in steps of 8; steps of 32
    }  # fmt: skip
    assert {case: trainer.bucket_size(*case) for case in sizes} == sizes


def slope(height: int, width: int, turned: bool = False) -> bytes:
    """Red rises from 0 to 255 from left to right, green from top to bottom; perhaps as a turned camera stores it."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image, exif = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    return stored(image.rotate(90, expand=True) if turned else image, exif=exif)


def test_pixels_of_both_sides_are_those_of_the_crop_that_is_told(folder, pipe, monkeypatch):
    seen, own, sizes = {}, trainer.UNet.to_latents, [(96, 64), (60, 90), (96, 64), (128, 128)]
    crops = [[2, 0, 80, 56], [0, 2, 56, 80], [2, 0, 80, 56], [0, 0, 64, 64]]  # of 84 x 56, 56 x 84, 84 x 56, 64 x 64
    rows = [{"prompt": f"person {i}", "chosen": slope(height, width, i == 2), "rejected": slope(2 * height, 2 * width)}
            for i, (height, width) in enumerate(sizes)]  # fmt: skip

    def to_latents(family, pipe, pixels):
        seen.setdefault(tuple(pixels.shape[2:]), []).extend(pixels.unflatten(0, (-1, 2)))
        return own(family, pipe, pixels)

    monkeypatch.setattr(trainer.UNet, "to_latents", to_latents)
    pairs = encode(write_data(folder, rows), pipe, aspect_ratio_buckets=True)
    assert pairs.sizes.tolist() == [[*size, *crop] for size, crop in zip(sizes, crops, strict=True)]
    assert sorted(bucket.tolist() for bucket in pairs.buckets) == [[0, 2], [1], [3]]
    for (height, width), (top, left, *size) in zip(sizes, crops, strict=True):
        scale, pixels = max(size[0] / height, size[1] / width), seen[tuple(size)].pop(0)
        x = ((left + torch.arange(size[1]) + 0.5) / scale - 0.5) / (width - 1)
        y = ((top + torch.arange(size[0]) + 0.5) / scale - 0.5) / (height - 1)
        expected = torch.stack([(2 * x - 1).expand(size), (2 * y - 1)[:, None].expand(size)])
        torch.testing.assert_close(pixels[:, :2], expected.expand(2, 2, *size), rtol=0, atol=0.03)


@pytest.fixture
def encodings(monkeypatch) -> Counter:
    """How often each caption was encoded, and how many "pairs"."""
    counts, latents, text = Counter(), trainer.UNet.to_latents, trainer.UNet.encode_text
    monkeypatch.setattr(trainer.UNet, "to_latents", lambda own, pipe, pixels: (
        counts.update(pairs=len(pixels) // 2) or latents(own, pipe, pixels)))  # fmt: skip
    monkeypatch.setattr(trainer.UNet, "encode_text", lambda own, pipe, prompts, **options: (
        counts.update(prompts) or text(own, pipe, prompts, **options)))  # fmt: skip
    return counts


def test_a_second_start_encodes_nothing(folder, tmp_path, encodings):
    settings = ONE_STEP | {"validation_prompts": "one to draw"} | FORMATS["path1 and path2"](folder)
    weights = train(folder, tmp_path / "one", **settings)
    assert encodings == {caption: 1 for caption, *_ in WANTED} | {"pairs": 4, "one to draw": 1}
    assert sorted(path.name.split("-")[0] for path in (folder / "encoded").iterdir()) == ["captions", "latents"]
    assert not list((tmp_path / "one").rglob("latents*"))
    encodings.clear()
    assert_equal(weights, train(folder, tmp_path / "two", **settings))
    assert encodings == {"one to draw": 1}


def test_the_samplers_own_latents_are_used_where_they_fit(folder, pipe, encodings):
    channels, generator = pipe.vae.config.latent_channels, torch.Generator().manual_seed(0)
    latents = torch.randn(4, 2, channels, 16, 16, generator=generator).half()
    rows = [row | {f"latents_{side}": own[side].numpy().tobytes() for side in (0, 1)}
            for row, own in zip(ROWS, latents, strict=True)]  # fmt: skip
    record, made = write_data(folder, rows) / "preference_data.json", {"shape": [channels, 16, 16], "dtype": "float16"}
    for vae, encoded in ((trainer.weights_hash(pipe.vae), 0), ("another VAE's", 4)):
        record.write_text(json.dumps({"latents": made | {"scaling_factor": 0.25, "vae_hash": vae}}))
        found = encode(folder, pipe).latents
        assert encodings["pairs"] == encoded
        if not encoded:
            wanted = [own if row["label_0"] else own.flip(0) for row, own in zip(ROWS, latents, strict=True)]
            assert torch.equal(torch.stack(list(found)), torch.stack(wanted))
    assert tuple(encode(folder, pipe, resolution=32).latents[0].shape) == (2, channels, 8, 8)


ATTENTION = {  # layers with their ranks and alphas
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (2, 1.0),
    "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0": (4, 8.0),
}
ALL = ATTENTION | {
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (2, 2.0),
    "down_blocks.0.resnets.0.conv1": (3, 6.0),
}
PLAIN = {name: (rank, float(rank)) for name, (rank, _) in ATTENTION.items()}  # of formats that know no alpha


def random_lora(module: torch.nn.Module, layers: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """down, up and alpha of each layer."""
    lora, generator = {}, torch.Generator().manual_seed(0)
    for name, (rank, alpha) in layers.items():
        out, *rest = module.get_submodule(name).weight.shape
        shapes = (rank, *rest), (out, rank, *[1] * len(rest[1:]))
        lora[name] = (*(torch.randn(shape, generator=generator) for shape in shapes), alpha)
    return lora


def adapted(unet: torch.nn.Module, lora: dict, whole: bool = False, **options) -> torch.nn.Module:
    """The U-Net with this LoRA by PEFT's own hand; `whole`: in PEFT's own wrapper."""
    ranks, alphas = {name: len(one[0]) for name, one in lora.items()}, {name: one[2] for name, one in lora.items()}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": list(lora)}
    unet, config = copy.deepcopy(unet), LoraConfig(r=2, lora_alpha=7, **patterns, **options)
    model = get_peft_model(unet, config) if whole else unet.add_adapter(config) or unet
    for name, (down, up, _) in lora.items():
        layer = unet.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down, up
    return model


def kohya(lora: dict, prefix: str = "lora_unet_") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name.replace('.', '_')}.{end}": torch.as_tensor(value) for name, values in lora.items()
            for end, value in zip(("lora_down.weight", "lora_up.weight", "alpha"), values, strict=True)}  # fmt: skip


def processors(lora: dict) -> dict[str, torch.Tensor]:
    """As diffusers wrote them until 0.21."""
    places = {f"unet.{name.removesuffix('.0')}".rpartition("."): values for name, values in lora.items()}
    return {f"{parent}.processor.{leaf}_lora.{end}.weight": value for (parent, _, leaf), (*values, _) in places.items()
            for end, value in zip(("down", "up"), values, strict=True)}  # fmt: skip


def unet_keys(state: dict) -> dict[str, torch.Tensor]:
    return {f"unet.{key}": value for key, value in state.items() if "lora_" in key}


LORAS = {
    "kohya": (ALL, lambda at, unet, lora: save_file(kohya(lora), at / LORA)),
    "diffusers, lora.down": (PLAIN, lambda at, unet, lora: StableDiffusionPipeline.save_lora_weights(
        at, convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted(unet, lora))))),
    "save_lora_adapter": (ALL, lambda at, unet, lora: adapted(unet, lora).save_lora_adapter(at)),
    "PEFT": (ALL, lambda at, unet, lora: adapted(unet, lora, True).save_pretrained(at)),
    "PEFT, rsLoRA": (ALL, lambda at, unet, lora: adapted(unet, lora, True, use_rslora=True).save_pretrained(at)),
    "default.": (PLAIN, lambda at, unet, lora: save_file(unet_keys(adapted(unet, lora).state_dict()), at / LORA)),
    "processors": (PLAIN, lambda at, unet, lora: save_file(processors(lora), at / LORA)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_of_others_is_what_is_merged_by_hand(kind, pipe, tmp_path):
    layers, write = LORAS[kind]
    lora, unet, merged = random_lora(pipe.unet, layers), copy.deepcopy(pipe.unet), pipe.unet.state_dict()
    write(tmp_path, pipe.unet, lora)
    parts = trainer.read_lora(pipe, str(tmp_path))
    assert parts.keys() == {"unet"}
    trainer.load_lora(unet, parts["unet"], "default")
    unet.fuse_lora()
    for name, (down, up, alpha) in lora.items():
        weight, scale = merged[f"{name}.weight"], alpha / (len(down) ** 0.5 if "rsLoRA" in kind else len(down))
        merged[f"{name}.weight"] = weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    unet.unload_lora()
    torch.testing.assert_close(unet.state_dict(), merged, atol=1e-5, rtol=1e-5)


def test_kohyas_sdxl_file_with_both_text_encoders(tmp_path):
    sdxl, weights, expected = load(tiny_sdxl(tmp_path / "sdxl")), {}, {}
    for part, prefix, name, theirs in (
        ("unet", "lora_unet_", "down_blocks.1.attentions.0.proj_in", "input_blocks.3.1.proj_in"),
        ("text_encoder", "lora_te1_", "encoder.layers.0.self_attn.q_proj", ""),
        ("text_encoder_2", "lora_te2_", "encoder.layers.1.mlp.fc1", ""),
    ):
        name = next(one for one, _ in sdxl.components[part].named_modules() if one.endswith(name))
        lora = random_lora(sdxl.components[part], {name: (2, 1.0)})[name]
        weights |= kohya({theirs or f"text_model.{name.removeprefix('text_model.')}": lora}, prefix)
        expected[part] = {name: (*lora[:2], 0.5)}
    save_file(weights, tmp_path / LORA)
    torch.testing.assert_close(trainer.read_lora(sdxl, str(tmp_path / LORA)), expected, rtol=0, atol=0)


def test_loras_that_are_none_for_this_model(pipe, tmp_path):
    lora, first = random_lora(pipe.unet, ATTENTION), next(iter(ATTENTION)).replace(".", "_")
    query = "attentions.0.transformer_blocks.0.attn1.to_q"
    deeper = {f"down_blocks.{block}.{query}.lora_{side}.weight": torch.ones(shape)
              for block in "123" for side, shape in (("A", (2, 128)), ("B", (128, 2)))}  # fmt: skip
    for weights, told in (
        (kohya(lora) | {f"lora_unet_{first}.dora_scale": torch.ones(96, 1)}, "is a DoRA"),
        (unet_keys(get_peft_model_state_dict(adapted(pipe.unet, lora, use_dora=True))), "is a DoRA"),
        (unet_keys(deeper), r"2 of its tensors have no place .*unet\.down_blocks\.2\."),
    ):
        save_file(weights, tmp_path / LORA)
        with pytest.raises(trainer.UserError, match=told):
            trainer.read_lora(pipe, str(tmp_path))


def test_the_kohya_export_has_each_layers_own_alpha_and_names_what_was_left_out(pipe, folder, tmp_path, capsys):
    given = kohya(random_lora(pipe.unet, ALL))
    second = {"text_model.encoder.layers.0.self_attn.q_proj": (torch.ones(2, 96), torch.ones(96, 2), 1.0)}
    save_file(given | kohya(second, "lora_te2_"), tmp_path / LORA)
    settings = ONE_STEP | {"initial_lora": tmp_path / LORA, "learning_rate": 1e-12, "export_kohya": True}
    train(write_data(folder, ROWS), tmp_path / "run", **settings)
    torch.testing.assert_close(load_file(tmp_path / "run" / "run.kohya.safetensors"), given, rtol=0, atol=1e-6)
    assert "text_encoder_2" in capsys.readouterr().out


def test_an_earlier_stages_unet_is_found_by_its_variant(pipe, tmp_path):
    model, other = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.unet).half()
    other.conv_in.bias.data += 1
    other.save_pretrained(tmp_path, variant="fp16")
    trainer.load_initial_model(model, "unet", args_of(full_unet=True, initial_unet=tmp_path, variant="fp16"))
    assert_equal(model.state_dict(), other.float().state_dict())
