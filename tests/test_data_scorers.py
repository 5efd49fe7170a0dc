# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: its scorers by their formulas, the words that name them, and what a score depends on."""

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import make_preference_data as data


data.quiet_libraries()
CLIP = data.WORLD / "scorer"
PROMPTS = ["a walking woman in a purple shirt", "two men", "a crowd on a bridge", "a mother and her daughter", "a man"]
BAD_LINES = {"text": b"good", "list": b"[1, 2]", "name": b'{"score": 1}', "latin": b'{"image_id": "\xff", "score": 1}'}
BAD_LINES["word"] = b'{"image_id": "b", "score": "good"}'
KEYED = ["clip={}/clip", "clip={}/clip,crop=1", "{}/plugin.py:redness", "{}/plugin.py:redness,flag=1"]
KEYED += ["{}/votes.jsonl", "{}/votes.jsonl,missing=veto"]
PLUGIN = """
import functools
def redness(device, channel=0, scale=1.0, name="x", flag=False):
    return lambda images, prompts: [scale * image.resize((1, 1)).getpixel((0, 0))[channel] for image in images]
def anything(device, **options):
    return lambda images, prompts: [float(options["bonus"])] * len(images)
def counted(device, columns, scale=1.0):
    grey = lambda image: image.convert("L").resize((1, 1)).getpixel((0, 0)) / 1e4
    return lambda images, prompts: [scale * float(columns[p]["people"]) + grey(i) for i, p in zip(images, prompts)]
def broken(device):
    return lambda images, prompts: [1 / 0]
unsure = lambda device: lambda images, prompts: [None] * len(images)
too_few = functools.partial(lambda device, n: lambda images, prompts: [1.0] * n, n=1)
"""


@pytest.fixture
def folder(tmp_path):
    votes = '{"image_id": "a\u2028", "score": 1.5}\n\n{"image_id": "b", "score": null}\n{"image_id": "c", "score": -2}'
    for name, text in {"plugin.py": PLUGIN, "raises.py": "1 / 0", "votes.jsonl": f"\ufeff{votes}"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, line in BAD_LINES.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"image_id": "a", "score": 1}\n' + line)
    return tmp_path


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 80, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def parse(spec: str, rows: dict | None = None) -> data.Scorer:
    return data.parse_scorer(spec, {} if rows is None else rows)


def score(spec: str, images: list[Image.Image], prompts: list[str]) -> list[float]:
    return parse(spec).load("cpu")(images, prompts)


@pytest.fixture(scope="module")
def embeds():
    """(image, text) embeddings of five pictures and PROMPTS by CLIPModel itself, padded and cropped, and its scale."""
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(CLIP).float().eval(), CLIPProcessor.from_pretrained(CLIP)
    kinds = [ImageOps.pad(one, (80, 80)) for one in pictures(5)], pictures(5)
    inputs = [processor(images=kind, text=PROMPTS, padding=True, return_tensors="pt") for kind in kinds]
    with torch.no_grad():
        padded, cropped = (clip(**one) for one in inputs)
    return padded.image_embeds, cropped.image_embeds, padded.text_embeds, math.exp(clip.logit_scale.item())


def test_scores_of_clip(embeds):
    images, cropped, texts, scale = embeds
    cosine, cropped = F.cosine_similarity(images, texts), F.cosine_similarity(cropped, texts)
    assert min(np.ptp(cosine.numpy()), (cosine - cropped).abs().max()) > 1e-3
    for spec, expected in {
        f"pickscore={CLIP}": scale * cosine,
        f"hpsv2={CLIP}": cosine,
        f"pickscore={CLIP},crop=1": scale * cropped,
        f"clip={CLIP},crop=0,processor={CLIP}": 100 * cosine,
    }.items():
        np.testing.assert_allclose(score(spec, pictures(5), PROMPTS), expected, rtol=1e-4, atol=1e-5, err_msg=spec)


def test_a_score_depends_on_its_own_image_and_prompt_alone(embeds):
    """Whatever the batch and its order; a long prompt is cut by tokens."""
    loaded, images = parse(f"pickscore={CLIP}").load("cpu"), pictures(5)
    alone = [loaded([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    for order in (slice(None), slice(None, None, -1)):
        np.testing.assert_allclose(loaded(images[order], PROMPTS[order]), alone[order], rtol=1e-3)
    long = " ".join(["a walking person in a purple shirt"] * 30)
    assert loaded(images[:1], [long]) == loaded(images[:1], [f"{long} on a pink background"])
    assert loaded(images[:1], [long]) != loaded(images[:1], ["on a pink background"])


def test_aesthetic(embeds, tmp_path):
    sizes, expected, head = pairwise((embeds[0].shape[1], 24, 12, 8, 4, 1)), embeds[0], {}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), sizes, strict=True):
        draw = torch.Generator().manual_seed(number)
        weight, bias = torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)
        head |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
        expected = expected @ weight.T + bias
    save_file(head, tmp_path / "model.safetensors")
    torch.save(head, tmp_path / "head.pth")
    for place in (tmp_path, tmp_path / "model.safetensors", tmp_path / "head.pth"):
        found = score(f"aesthetic={CLIP},head={place}", pictures(5), PROMPTS)
        np.testing.assert_allclose(found, expected[:, 0], rtol=1e-3, atol=1e-4)
    assert np.ptp(found) > 1e-2


def test_weights_that_are_not_there_or_not_whole_are_one_line(tmp_path):
    shutil.copytree(CLIP, tmp_path / "clip")
    file, weights = tmp_path / "clip" / "model.safetensors", load_file(CLIP / "model.safetensors")
    save_file({name: weights[name] for name in weights if name[:7] != "visual_"}, file, {"format": "pt"})
    for words in ("has no weights visual_projection.weight", ""):
        with pytest.raises(data.UserError, match=f"^cannot load the scorer clip={file.parent}: [^\n]*{words}[^\n]*$"):
            score(f"clip={file.parent}", pictures(1), ["x"])
        file.write_bytes(file.read_bytes()[:-9])


def test_plug_ins_and_their_options(folder, monkeypatch):
    red, plugin = Image.new("RGB", (8, 8), (200, 100, 50)), f"{folder / 'plugin.py'}:"
    for spec, expected in {"redness": 200.0, "redness,channel=2,scale=0.5": 25.0, "anything,bonus=3": 3.0}.items():
        assert score(plugin + spec, [red], ["x"]) == [expected]
    monkeypatch.syspath_prepend(str(folder))
    assert score("plugin:redness", [red], ["x"]) == [200.0]
    scorer = parse(f"{plugin}counted,scale=10", rows := {})
    rows["x"] = {"people": "2"}  # read after the scorers are checked
    assert (scorer.rows is not None, scorer.load("cpu")([red], ["x"])[0]) == (True, pytest.approx(20, abs=0.1))
    for spec in ("raises:f", f"{folder / 'raises.py'}:f"):  # with its file and line, not as one line
        with pytest.raises(ZeroDivisionError):
            parse(spec)


def test_scores_made_elsewhere(folder):
    images = pictures(4)
    for image, name in zip(images, ("a\u2028", "b", "c", "d"), strict=True):
        image.info["image_id"] = name
    found = score(f"{folder / 'votes.jsonl'},missing=veto", images[::-1], ["x"] * 4)
    np.testing.assert_equal(found, [math.nan, -2.0, math.nan, 1.5])


def test_scorers_in_a_run(folder):
    """A scorer that reads a prompt's row scores anew where that changes; what a scorer does wrong costs no image."""
    small = ["--num_images_per_prompt", 2, "--num_inference_steps", 2, "--validation_share", 0, "--resolution", 64]

    def run(people: str, *scorers: str) -> list[dict]:
        (folder / "p.csv").write_text(f"prompt,people\na man,{people}\na woman,3\n")
        command = ["--prompts", folder / "p.csv", "--output_dir", folder / "out", *small, "--scorer", *scorers]
        data.main(data.parse_args([*map(str, command)]))
        rows = pq.read_table(folder / "out" / "data").to_pylist()
        return {row["caption"]: [round(one) for one in json.loads(row["scores"])["counted"]] for row in rows}

    plugin = f"{folder / 'plugin.py'}:"
    assert run("2", plugin + "counted") == {"a man": [2, 2], "a woman": [3, 3]}
    pool = {file: file.read_bytes() for file in folder.glob("out/pool/*/*.parquet")}
    assert run("5", plugin + "counted") == {"a man": [5, 5], "a woman": [3, 3]}
    with pytest.raises(ZeroDivisionError):
        run("5", plugin + "broken")
    for scorer, words in {
        "plugin.py:too_few": "scorer too_few gave 1 scores for ",
        "votes.jsonl": "votes has no score for 4 of 4 images, such as .*: give them one, or null, or add .missing",
        "plugin.py:unsure": "no pairs from 2 prompts: 2 less than two images with a score",
        "votes.jsonl,missing=veto": "no pairs from 2 prompts: 2 less than two images with a score",
    }.items():
        with pytest.raises(data.UserError, match=words):
            run("5", f"{folder}/{scorer}")
    assert {file: file.read_bytes() for file in folder.glob("out/pool/*/*.parquet")} == pool


def test_specs(folder):
    plugin, long = f"{folder}/plugin.py", "Are they there? " * 30
    for spec, label, weight, options in (
        (f"pickscore={CLIP},crop=1", "pickscore", 1.0, {"model": str(CLIP), "crop": True}),
        (f"clip={CLIP},label=large clip,weight=-1e-1", "large clip", -0.1, {"model": str(CLIP)}),
        (f"{plugin}:redness,channel=1,scale=2,flag=1", "redness", 1.0, {"channel": 1, "scale": 2.0, "flag": True}),
        (f"{plugin}:redness,name=a, b=c * d?", "redness", 1.0, {"name": "a, b=c * d?"}),
        (f"{plugin}:anything=ViT-B-32,question={long}", "anything", 1.0, {"model": "ViT-B-32", "question": long}),
        (f"{folder}/votes.jsonl,label=people's", "people's", 1.0, {"file": f"{folder}/votes.jsonl"}),
    ):
        scorer = parse(spec)
        assert (scorer.label, scorer.weight, scorer.load.keywords) == (label, weight, options)
        assert all(type(scorer.load.keywords[name]) is type(value) for name, value in options.items())


def test_bad_specs_are_one_line(folder):
    for spec, words in (
        ("beauty", "unknown scorer 'beauty': use pickscore, hpsv2, clip, aesthetic, module:function, "),
        ("clip={clip},size=3", "no option size, only label, weight, model, processor, crop"),
        ("clip={clip},weight=inf", "inf is not a number"),
        ("clip=nowhere", "cannot find nowhere: no such file or folder"),
        ("aesthetic={clip},head={folder}/x.pth", "cannot find {folder}/x.pth: no such file or folder"),
        ("no_such_module:f", "no_such_module"),
        ("{folder}/none.py:f", "no such file {folder}/none.py"),
        ("{folder}/plugin.py:counted,columns=3", "no option columns, only label, weight, scale"),
        ("{folder}/none.jsonl", "none.jsonl"),
        ("{folder}/votes.jsonl,missing=low", "missing can only be veto"),
        *((f"{{folder}}/{name}.jsonl", f"{name}.jsonl, line 2: not of the form") for name in BAD_LINES),
    ):
        spec, words = (text.replace("{clip}", str(CLIP)).replace("{folder}", str(folder)) for text in (spec, words))
        with pytest.raises(data.UserError, match=f"^[^\n]*{re.escape(words)}[^\n]*$"):
            data.parse_scorers([spec], {})
    with pytest.raises(data.UserError, match=r"two scorers are called clip: .*label"):
        data.parse_scorers([f"clip={CLIP}", f"clip={CLIP},weight=0.5"], {})


def test_the_key_of_a_scorer(folder):
    for copy in ("a", "b"):
        shutil.copytree(CLIP, folder / copy / "clip")
        for name in ("plugin.py", "votes.jsonl"):
            shutil.copy(folder / name, folder / copy)
    keys = [{name: parse(spec.format(folder / name)).key for name in "ab"} for spec in KEYED]
    assert all(key["a"] == key["b"] for key in keys)
    assert parse(f"clip={folder}/b/clip,label=x,weight=2,crop=0").key == keys[0]["a"] == parse(f"clip={CLIP}").key
    assert len({key["a"] for key in keys}) == len(KEYED)
    file = folder / "b" / "clip" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for name in ("plugin.py", "votes.jsonl"):
        (folder / "b" / name).write_text((folder / name).read_text() + "\n")
    assert not {parse(spec.format(folder / "b")).key for spec in KEYED} & {key["a"] for key in keys}


def test_people_of_eval_human_can_be_named():
    scorer = parse(f"{Path(data.__file__).with_name('eval_human.py')}:people={CLIP},pose={CLIP},count=2", {"x": {}})
    assert (scorer.label, scorer.rows) == ("people", {"x": {}})
    assert scorer.load.keywords == {"model": str(CLIP), "pose": str(CLIP), "count": 2, "columns": {"x": {}}}
