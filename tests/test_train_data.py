# SPDX-License-Identifier: Apache-2.0
"""Where train_dpo_human.py takes pairs from, what it keeps of them, and what it encodes once."""

import io
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_train_dpo_human import SMALL, assert_equal, flags, make_rows, train, write_data

import train_dpo_human as trainer


ROWS = make_rows(4)
ONE_STEP = {"max_train_steps": 1, "train_batch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def splits_of(**settings) -> dict[str, trainer.Split]:
    return trainer.load_splits(trainer.parse_args(flags(SMALL | settings)))


def winner_first(row: dict) -> tuple[bytes, bytes]:
    return (row["jpg_0"], row["jpg_1"]) if row["label_0"] else (row["jpg_1"], row["jpg_0"])


# ---- Formats: the same four pairs, each returns the flags -----------------------------------------------------------


def pick_a_pic(folder: Path) -> dict:
    return {"train_data_dir": write_data(folder, ROWS)}


def named_with_split(folder: Path) -> dict:
    return {"dataset_name": write_data(folder, ROWS[:1], ROWS), "dataset_split_name": "validation"}


def parquet_file(folder: Path) -> dict:
    folder.mkdir()
    Dataset.from_list(ROWS).to_parquet(folder / "pairs.parquet")
    return {"train_data_dir": folder / "pairs.parquet"}


def own_columns(folder: Path) -> dict:
    names = {"jpg_0": "left", "jpg_1": "right", "label_0": "left_won", "caption": "words"}
    write_data(folder, [{name: row[old] for old, name in names.items()} for row in ROWS])
    columns = {"image_0_column": "left", "image_1_column": "right", "label_0_column": "left_won"}
    return {"train_data_dir": folder, "caption_column": "words", **columns}


def chosen_and_rejected() -> list[dict]:
    sides = map(winner_first, ROWS)
    return [
        {
            "prompt": row["caption"],
            **{name: {"bytes": side, "path": None} for name, side in zip(names, pair, strict=True)},
        }
        for row, pair in zip(ROWS, sides, strict=True)
        for names in [("chosen", "rejected")]
    ]


def image_columns(folder: Path) -> dict:
    (folder / "data").mkdir(parents=True)
    rows = Dataset.from_list(chosen_and_rejected())
    for name in ("chosen", "rejected"):
        rows = rows.cast_column(name, datasets.Image())
    rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return {"train_data_dir": folder}


def image_structs(folder: Path) -> dict:
    """The same columns, written by a program that knows nothing of `datasets.Image`."""
    (folder / "data").mkdir(parents=True)
    rows = pyarrow.Table.from_pylist(chosen_and_rejected())
    pyarrow.parquet.write_table(rows, folder / "data" / "train-00000-of-00001.parquet")
    return {"train_data_dir": folder}


def hpd_json(folder: Path) -> dict:
    rows = []
    (folder / "images").mkdir(parents=True)
    for i, row in enumerate(ROWS):
        paths = {f"path{side}": f"images/{i}-{side}.jpg" for side in (1, 2)}
        for path, content in zip(paths.values(), winner_first(row), strict=True):
            (folder / path).write_bytes(content)
        rows.append({"prompt": row["caption"], **paths, "confidence": 0.5 + i / 10})
    (folder / "pairs.json").write_text(json.dumps(rows))
    return {"train_data_dir": folder / "pairs.json"}


def invoke_jsonl(folder: Path) -> dict:
    folder.mkdir()
    lines = []
    for i, row in enumerate(ROWS):
        paths = {f"image_{side}": f"{i}-{side}.jpg" for side in (0, 1)}
        for side, path in enumerate(paths.values()):
            (folder / path).write_bytes(row[f"jpg_{side}"])
        votes = {f"prefer_{side}": bool(row[f"label_{side}"]) for side in (0, 1)}
        lines.append(json.dumps({**paths, "prompt": row["caption"], **votes}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"train_data_dir": folder / "metadata.jsonl"}


def winner_loser_folders(folder: Path, captions_in_w: bool = False) -> dict:
    """Names that a careless pattern mixes up: 1.jpg and 1.5.jpg, and [1], which is none."""
    for place, row in zip(("a/1.5", "a/1", "b/c/[1]", "b/c/x"), ROWS, strict=True):
        parent, name = (folder / place).parent, Path(place).name
        for side, content in zip("wl", winner_first(row), strict=True):
            (parent / side).mkdir(parents=True, exist_ok=True)
            (parent / side / f"{name}{'.jpg' if side == 'w' else '.png'}").write_bytes(content)
            if captions_in_w:  # a captioner has been over both folders
                (parent / side / f"{name}.caption").write_text(row["caption"])
        if not captions_in_w:
            end = ".txt" if place.startswith("a") else ".caption"
            (parent / f"{name}{end}").write_text(row["caption"] + "\n")
    return {"train_data_dir": folder}


def captions_in_w(folder: Path) -> dict:
    return winner_loser_folders(folder, captions_in_w=True)


FORMATS = [
    *(pick_a_pic, named_with_split, parquet_file, own_columns, image_columns, image_structs),
    *(hpd_json, invoke_jsonl, winner_loser_folders, captions_in_w),
]


@pytest.mark.parametrize("make", FORMATS)
def test_a_format_gives_winners_losers_and_captions(make, tmp_path):
    settings = make(tmp_path / "pairs")
    split = splits_of(**settings)["train"]
    expected = [(row["caption"], *winner_first(row)) for row in ROWS]
    assert [(caption, *split.images(row)) for row, caption in enumerate(split.captions)] == expected
    assert split.label.tolist() == [1] * 4
    assert split.dropped == {}
    assert trainer.data_key(split) == trainer.data_key(splits_of(**settings)["train"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The four pairs in pairs, and in run a run of one step on them."""
    return tmp_path_factory.mktemp("pick_a_pic")


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    return train(folder, folder / "run", **ONE_STEP, **pick_a_pic(folder / "pairs"))


@pytest.mark.parametrize("make", [image_columns, hpd_json, winner_loser_folders])
def test_every_format_trains_the_same_weights(make, weights, tmp_path):
    assert_equal(weights, train(tmp_path, tmp_path / "run", **ONE_STEP, **make(tmp_path / "pairs")))


@pytest.mark.parametrize("make", [hpd_json, invoke_jsonl, winner_loser_folders])
def test_an_image_that_was_written_again_is_seen(make, tmp_path):
    settings = make(tmp_path / "pairs")
    before = trainer.data_key(splits_of(**settings)["train"])
    image = min(path for path in (tmp_path / "pairs").rglob("*") if path.suffix in (".jpg", ".png"))
    image.write_bytes(image.read_bytes() + b" ")
    assert trainer.data_key(splits_of(**settings)["train"]) != before


def test_no_vote_for_either_is_a_tie(tmp_path):
    settings = invoke_jsonl(tmp_path / "pairs")
    lines = [json.loads(line) for line in settings["train_data_dir"].read_text().splitlines()]
    lines[2] |= {"prefer_0": False, "prefer_1": False}
    settings["train_data_dir"].write_text("\n".join(map(json.dumps, lines)))
    assert splits_of(**settings)["train"].dropped == {"ties left out": 1}


# ---- What is kept, and with which label -----------------------------------------------------------------------------


@pytest.fixture
def with_margins(tmp_path) -> Path:
    """Row 2 is a tie; the margins are 1, 2, 0, 4."""
    rows = [row | {"margin": float(margin)} for row, margin in zip(ROWS, (1, 2, 0, 4), strict=True)]
    rows[2] |= {"label_0": 0.5, "label_1": 0.5}
    return write_data(tmp_path / "pairs", rows)


def kept(split: trainer.Split) -> list[int]:
    numbers = {row["caption"]: number for number, row in enumerate(ROWS)}
    return [numbers[caption] for caption in split.captions]


def test_ties_are_left_out_or_labelled_a_half(with_margins):
    split = splits_of(train_data_dir=with_margins)["train"]
    assert (kept(split), split.dropped) == ([0, 1, 3], {"ties left out": 1})
    split = splits_of(train_data_dir=with_margins, ties="soft", label_smoothing=0.1)["train"]
    assert (kept(split), split.dropped) == ([0, 1, 2, 3], {})
    assert split.label.tolist() == pytest.approx([0.9, 0.9, 0.5, 0.9])


def test_pairs_with_a_small_margin_are_left_out(with_margins):
    split = splits_of(train_data_dir=with_margins, min_margin=2)["train"]
    assert (kept(split), split.dropped) == ([1, 3], {"ties left out": 1, "below --min_margin": 1})


def test_the_margin_may_have_another_name(tmp_path):
    settings = hpd_json(tmp_path / "pairs") | {"margin_column": "confidence"}  # 0.5, 0.6, 0.7, 0.8
    assert kept(splits_of(**settings, min_margin=0.65)["train"]) == [2, 3]


def test_soft_and_smooth_labels(with_margins):
    soft = [1 / (1 + math.exp(-margin / 3)) for margin in (1, 2, 4)]
    split = splits_of(train_data_dir=with_margins, soft_labels=3)["train"]
    assert split.label.tolist() == pytest.approx(soft)
    split = splits_of(train_data_dir=with_margins, soft_labels=3, label_smoothing=0.2)["train"]
    assert split.label.tolist() == pytest.approx([0.8 * label + 0.2 * (1 - label) for label in soft])
    split = splits_of(train_data_dir=with_margins, label_smoothing=0.2)["train"]
    assert split.label.tolist() == pytest.approx([0.8] * 3)
    assert split.winner.tolist() == [1, 0, 0]  # whatever the label


def test_max_train_samples_takes_the_first_rows(with_margins):
    for count, rows in ((1, [0]), (3, [0, 1]), (9, [0, 1, 3])):
        assert kept(splits_of(train_data_dir=with_margins, max_train_samples=count)["train"]) == rows


def many_rows(captions: int) -> list[dict]:
    """Three pairs for each caption; images that name their row."""
    return [
        {
            **{"jpg_0": b"%d winner" % i, "jpg_1": b"%d loser" % i, "caption": f"person {i % captions}"},
            **{"label_0": float(i % 2), "label_1": float(1 - i % 2), "margin": float(i)},
        }
        for i in range(3 * captions)
    ]


def test_validation_share_holds_out_captions(tmp_path):
    rows = many_rows(200)
    folder = write_data(tmp_path / "pairs", rows)
    plain = splits_of(train_data_dir=folder)
    assert plain.keys() == {"train"}
    held = {}
    for share in (0.1, 0.3):
        splits = splits_of(train_data_dir=folder, validation_share=share, soft_labels=100)
        train_captions, held[share] = (set(splits[name].captions) for name in ("train", "validation"))
        assert not train_captions & held[share]
        assert len(train_captions | held[share]) == 200
        assert len(splits["train"].rows) + len(splits["validation"].rows) == 600
        assert len(held[share]) == pytest.approx(200 * share, abs=4 * (200 * share * (1 - share)) ** 0.5)
        for split in splits.values():  # winners and labels went along with their rows
            numbers = [int(split.images(i)[0].split()[0]) for i in range(0, len(split.rows), 7)]
            assert [split.captions[i] for i in range(0, len(split.rows), 7)] == [rows[n]["caption"] for n in numbers]
            assert [1 - split.winner[i] for i in range(0, len(split.rows), 7)] == [n % 2 for n in numbers]
            expected = [1 / (1 + math.exp(-n / 100)) for n in numbers]
            assert split.label[::7].tolist() == pytest.approx(expected)
    assert held[0.1] < held[0.3]
    again = splits_of(train_data_dir=write_data(tmp_path / "again", rows[::-1]), validation_share=0.1)
    assert set(again["validation"].captions) == held[0.1]


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_buckets_keep_the_shape_and_the_number_of_pixels():
    sizes = {(height, width): trainer.bucket_size(height, width, 512) for height, width in [
        (512, 512), (900, 900), (1216, 832), (832, 1216), (1024, 512), (4000, 500), (500, 4000),
    ]}  # fmt: skip
    # 512 * sqrt(1216 / 832) = 619, 512 / sqrt(1216 / 832) = 424; 512 * sqrt(2) = 724 and 362, in steps of 64
    assert list(sizes.values()) == [
        *((512, 512), (512, 512), (640, 448), (448, 640), (704, 384), (704, 384), (384, 704)),
    ]  # fmt: skip
    assert trainer.bucket_size(96, 64, 64) == (80, 56)  # 78.4 and 52.3 in steps of 8
    assert trainer.bucket_size(90, 60, 8) == (8, 8)


def test_the_crop_by_hand():
    assert trainer.crop_box(90, 60, (64, 64)) == (pytest.approx(64 / 60), 16, 0)  # 96 x 64, 32 too high
    assert trainer.crop_box(128, 192, (64, 64)) == (0.5, 0, 16)  # 64 x 96
    assert trainer.crop_box(64, 64, (64, 64)) == (1, 0, 0)
    assert trainer.crop_box(64, 64, (48, 80)) == (1.25, 16, 0)  # 80 x 80


def encoded(image: Image.Image, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def slope(height: int, width: int) -> Image.Image:
    """Red rises from 0 to 255 from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(128, 192), (64, 96), (256, 384)])
def test_pixels_are_those_of_the_crop_that_is_told(size):
    pixels = trainer.to_pixels(encoded(slope(*size)), (64, 64), "")
    scale, top, left = trainer.crop_box(*size, (64, 64))
    assert pixels.shape == (3, 64, 64)
    for column in (0, 31, 63):
        red = ((left + column + 0.5) / scale - 0.5) / (size[1] - 1)
        assert pixels[0, 20, column].item() == pytest.approx(2 * red - 1, abs=0.02)
    for row in (0, 31, 63):
        green = ((top + row + 0.5) / scale - 0.5) / (size[0] - 1)
        assert pixels[1, row, 20].item() == pytest.approx(2 * green - 1, abs=0.02)
    assert pixels[2].max() == -1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_rotated_photo_is_set_upright(orientation):
    upright = slope(96, 64)
    turned = upright.rotate({1: 0, 3: 180, 6: 90, 8: 270}[orientation], expand=True)
    pixels = trainer.to_pixels(encoded(turned, orientation), (72, 56), "")
    assert torch.equal(pixels, trainer.to_pixels(encoded(upright), (72, 56), ""))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_images_of_every_mode_are_read(mode):
    image = slope(64, 64).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    pixels = trainer.to_pixels(file.getvalue(), (64, 64), "")
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected)


@pytest.fixture
def prepared(monkeypatch) -> dict[str, trainer.Pairs]:
    """The Pairs of the last start."""
    found, prepare = {}, trainer.prepare_data

    def prepare_data(*args):
        pairs, validation = prepare(*args)
        found.update(pairs)
        return pairs, validation

    monkeypatch.setattr(trainer, "prepare_data", prepare_data)
    return found


def sized(number: int, winner: bytes, loser: bytes) -> dict:
    return {"chosen": winner, "rejected": loser, "prompt": f"person {number}"}


def portrait_landscape_square() -> list[dict]:
    """(height, width) of the winners: 96 x 64, 60 x 90, 64 x 64, 96 x 64 by its camera, 128 x 128."""
    return [
        sized(0, encoded(slope(96, 64)), encoded(slope(48, 32))),
        sized(1, encoded(slope(60, 90)), encoded(slope(90, 60))),
        sized(2, encoded(slope(64, 64)), encoded(slope(70, 64))),
        sized(3, encoded(slope(64, 96), orientation=6), encoded(slope(90, 64))),
        sized(4, encoded(slope(128, 128)), encoded(slope(64, 128))),
    ]


def test_a_run_on_mixed_sizes(tmp_path, prepared):
    rows = portrait_landscape_square()
    folder = write_data(tmp_path / "pairs", rows, rows[1:4])
    train(folder, tmp_path / "run", aspect_ratio_buckets=True, max_train_steps=2)
    pairs = prepared["train"]
    assert [tuple(latents.shape) for latents in pairs.latents] == [
        (1, 2, 8, 14, 20),  # 56 x 80, of 60 x 90
        (2, 2, 8, 16, 16),
        (2, 2, 8, 20, 14),
    ]
    assert pairs.bucket.tolist() == [2, 0, 1, 2, 1]
    assert pairs.place.tolist() == [0, 0, 0, 1, 1]
    # original size, top and left of the crop, target: 96 x 64 is scaled by 56 / 64 to 84 x 56, 60 x 90 to 56 x 84
    assert pairs.time_ids.tolist() == [
        [96, 64, 2, 0, 80, 56],
        [60, 90, 0, 2, 56, 80],
        [64, 64, 0, 0, 64, 64],
        [96, 64, 2, 0, 80, 56],
        [128, 128, 0, 0, 64, 64],
    ]
    assert [tuple(latents.shape) for latents in prepared["validation"].latents] == [
        (1, 2, 8, 14, 20), (1, 2, 8, 16, 16), (1, 2, 8, 20, 14),
    ]  # fmt: skip


def test_a_run_on_one_size_that_is_no_square(tmp_path, prepared):
    folder = write_data(tmp_path / "pairs", portrait_landscape_square()[:3])
    train(folder, tmp_path / "run", height=48, width=80, max_train_steps=1)
    assert [tuple(latents.shape) for latents in prepared["train"].latents] == [(3, 2, 8, 12, 20)]
    # 96 x 64 becomes 120 x 80, 60 x 90 becomes 53.3 x 80, 64 x 64 becomes 80 x 80
    assert prepared["train"].time_ids.tolist() == [
        [96, 64, 36, 0, 48, 80], [60, 90, 3, 0, 48, 80], [64, 64, 16, 0, 48, 80],
    ]  # fmt: skip


# ---- Encoded once ---------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often images were looked at and encoded, and captions encoded; call number ["stop", name] is interrupted."""
    counter = Counter()

    def counted(name: str):
        function = getattr(trainer, name)

        def call(*args, **kwargs):
            counter[name] += len(args[1]) if name == "encode_captions" else 1
            if counter[name] == counter["stop", name]:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    for name in ("measure_images", "to_pixels", "encode_captions"):
        monkeypatch.setattr(trainer, name, counted(name))
    return counter


def test_a_second_start_neither_checks_nor_encodes(folder, weights, tmp_path, calls):
    start = ONE_STEP | {"encoded_dir": folder / "run" / "cache"}
    assert_equal(weights, train(folder / "pairs", folder / "run", overwrite=True, **start))
    assert_equal(weights, train(folder / "pairs", tmp_path / "elsewhere", **start))
    assert (calls["measure_images"], calls["to_pixels"]) == (0, 0)
    assert calls["encode_captions"] == 6  # at each start one for the shape, the prompt to draw and the empty one


@pytest.mark.parametrize(("stop", "left"), [("measure_images", 2), ("to_pixels", 4)])
def test_an_interrupted_start_is_carried_on(stop, left, weights, tmp_path, calls):
    settings = ONE_STEP | pick_a_pic(tmp_path / "pairs")
    calls["stop", stop] = {"measure_images": 3, "to_pixels": 5}[stop]  # in the third of four pairs
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tmp_path / "run", **settings)
    assert len(list((tmp_path / "run" / "cache").glob("*.partial"))) == 1
    calls.clear()
    assert_equal(weights, train(tmp_path, tmp_path / "run", **settings))
    assert calls[stop] == left  # without the calls for two pairs
    assert {path.suffix for path in (tmp_path / "run" / "cache").iterdir()} == {".bin"}


def test_a_cut_cache_is_not_read(folder, weights, tmp_path):
    for cache in shutil.copytree(folder / "run" / "cache", tmp_path / "cache").iterdir():
        cache.write_bytes(cache.read_bytes()[:-8])
    start = ONE_STEP | {"encoded_dir": tmp_path / "cache"}
    assert_equal(weights, train(folder / "pairs", tmp_path / "run", **start))


def test_a_folder_of_images_may_be_named_relatively(tmp_path, monkeypatch):
    row = make_rows(1)[0]
    for side, name in (("jpg_1", "w"), ("jpg_0", "l")):
        (tmp_path / "pairs" / "a" / name).mkdir(parents=True)
        (tmp_path / "pairs" / "a" / name / "1.jpg").write_bytes(row[side])
    (tmp_path / "pairs" / "a" / "1.txt").write_text(row["caption"])
    monkeypatch.chdir(tmp_path)
    split = trainer.load_splits(trainer.parse_args(["--train_data_dir", "pairs"]))["train"]
    assert split.images(0) == (row["jpg_1"], row["jpg_0"])
