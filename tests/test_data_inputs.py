# SPDX-License-Identifier: Apache-2.0
"""make_preference_data.py: what it reads, prompts, photos and captions; and the prompts of people that it writes."""

import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image, ImageCms

import make_preference_data as data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def photo(path: Path, colour: object = "red", size: tuple[int, int] = (40, 60), mode: str = "RGB", **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **save)
    return path


@pytest.mark.parametrize(
    ("name", "content", "prompts", "left_out"),  # left_out: blank, repeated
    [
        ("p.txt", "a\nb\n", ["a", "b"], (0, 0)),
        ("p", "\ufeffa\r\n\r\n  b\t c \r\na\r\nNA\r\n", ["a", "b c", "NA"], (1, 1)),
        ("p.TXT", "a\r007\rx\u2028y", ["a", "007", "x y"], (0, 0)),
        ("p.txt", "# a title\n#b --n low\n  # c\nC# -- a well--made tune\n", ["C# -- a well--made tune"], (3, 0)),
        ("p.csv", '\ufefftext,n\r\nNA,1\r\n007,\r\n"a, ""b"" c",2\r\n,3\r\n', ["NA", "007", 'a, "b" c'], (1, 0)),
        ("p.csv", 'n, text \r1,"a\rb"\r2\r3,null\r4,# c --n\r', ["a b", "null", "# c --n"], (1, 0)),
        ("p.tsv", '\ufefftext\tn\n"a" man\t1\n"b\t2\nc, d\t"3\n"b\t4\n', ['"a" man', '"b', "c, d"], (0, 1)),
        ("p.jsonl", '\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": null}\r\n{"text": "007"}\r\n', ["a b", "007"], (1, 0)),
        ("p.jsonl", '{"n": 1, "prompt": "a"}\r{"prompt": "half \\ud83d"}\r{"n": 2}\r"a"', ["a", "half"], (1, 1)),
        ("p.json", '\ufeff["a",\n"b", null, "NA"]', ["a", "b", "NA"], (1, 0)),
    ],
)
def test_prompts_of_a_file(name, content, prompts, left_out, tmp_path):
    file = write(tmp_path / name, content)
    told = f"in {file} ({left_out[0]} blank and {left_out[1]} repeated ones left out)"
    for count in (None, 1):
        table, remark = data.read_prompts(str(file), None, count)
        assert table.prompt.tolist() == prompts[:count]
        assert remark == f"prompts    the first {count or len(prompts)} of {len(prompts)} {told}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder"])
def test_tables(kind, tmp_path):
    file = tmp_path / f"p.{kind}"
    frame = pd.DataFrame({"n": [*"0123"], "caption": ["a", None, "a", "b"], "text": ["t0", "t1", "t2", "t3"]})
    if "sv" in kind:
        frame.to_csv(file, sep="\t" if kind == "tsv" else ",", index=False)
    elif kind == "folder":
        photo(file / "pairs.png")  # as our own output has some
        frame.to_parquet(file / "train-0.parquet")
        frame[3:].to_parquet(file / "validation-0.parquet")
    elif kind == "parquet":
        latents = pd.array([b"y"] * 4, pd.ArrowDtype(pa.large_binary()))
        images = {"jpg": [b"x"] * 4, "latents": latents, "list": [["z"]] * 4}
        frame.astype({"caption": "string"}).assign(**images).to_parquet(file)  # with pd.NA in place of None
    else:
        frame.to_json(file, orient="records", lines=kind == "jsonl")
    table, remark = data.read_prompts(str(file), None, None)
    own = {} if kind == "folder" else {"n": ["0", "3"], "text": ["t0", "t3"]}
    assert table.to_dict("list") == {**own, "caption": ["a", "b"], "prompt": ["a", "b"]}
    assert remark.endswith("(1 blank and 1 repeated ones left out)")
    assert data.read_prompts(str(file), "text", 3)[0].prompt.tolist() == ["t0", "t1", "t2"]
    with pytest.raises(data.UserError, match=f"^{file} has no column story: --prompt_column can be one of .*caption"):
        data.read_prompts(str(file), "story", None)
    if kind == "folder":
        assert data.read_prompts(f"{file}:validation", None, None)[0].prompt.tolist() == ["b"]
        frame[:1].to_parquet(file / "train-0.parquet")  # a folder that is written again is read again
        assert data.read_prompts(str(file), None, None)[0].prompt.tolist() == ["a"]


def test_of_the_hub_one_column_and_the_asked_rows_are_read(monkeypatch):
    asked = []

    def rows():
        yield from ({"jpg": b"-", "caption": f"p{i}", "title": "t"} for i in range(9))
        pytest.fail("more is read than asked for")

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["test", *["train"] * (name == "a/v.2")])
    for source in ("a/v.2", "a/b", "a/b:extra"):
        assert data.read_prompts(source, None, 2)[0].to_numpy().tolist() == [["p0", "p0"], ["p1", "p1"]]
    assert asked == [("a/v.2", "train", True), ("a/b", "test", True), ("a/b", "extra", True)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere/at/all", None, "no such file or folder: {path}$"),
        ("nobody/nothing", None, "nobody/nothing is no file, nor can datasets load it: "),
        ("p.json", "[]", "{path} is empty$"),
        ("p.txt", "a\na photo --n low --w 768\n", "{path}, line 2: --n is a generator's flag"),
        ("p.txt", '\n--prompt "a" --negative_prompt "b"\n', "{path}, line 2: --prompt is a generator's flag"),
        ("p.txt", "caf\u00e9".encode("latin-1"), r"cannot read {path}: .*\(save it as utf-8\)$"),
        ("p.csv", "text,n\na, b,1\n", r"cannot read {path}: .*\(a prompt with a comma needs quotes\)$"),
        ("p.csv", "text,n\na,1\nb, c,1\n", r"cannot read {path}: .*line 3.* \(a prompt with a comma needs quotes\)$"),
        ("p.csv", "a man,1\nb,2\n", "{path} has no column prompt, caption, text: .* one of a man, 1$"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": \n', r"{path}, line 3: not json \(Expecting value\)$"),
        ("p.json", '[\n"a",\nb]', r"{path}, line 3: not json \(Expecting value\)$"),
        ("p.json", '{"prompt": "a man"}', "{path} .*list"),
        ("p.jsonl", '"a"\n{"prompt": 7}\n', "{path}, row 2: 7 in place of a text$"),
    ],
)
def test_bad_prompts_are_one_line(name, content, words, tmp_path):
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(data.UserError, match=f"^{words.format(path=re.escape(str(path)))}") as error:
        data.read_prompts(name if name == "nobody/nothing" else str(path), None, None)
    assert "\n" not in str(error.value)


def test_photos_of_a_folder(tmp_path):
    folder = tmp_path / "album"
    names = ["a.PNG", "b.jpg", "deep/c.webp", "e.png", "f.bmp", "g.tif", "h.gif", "i.jfif", "link/k.png"]
    (folder / "stray.png").mkdir(parents=True)
    (folder / "link").symlink_to(photo(tmp_path / "elsewhere" / "z" / "k.png").parent)
    odd = ("b-masklabel.png", "b_mask.png", "b.mask.png", "@eaDir/b.png", "@eaDir/x.png/t.jpg", ".t/b.png", ".b.png")
    for name in (*names[:-1], *odd):
        photo(folder / name)
    files = dict.fromkeys(("j.heic", "__MACOSX/b.jpg", "notes.txt", "paper.pdf"), "of no photo")
    files["metadata.jsonl"] = '{"file_name": "b.jpg", "text": "bee, two"}\n\n{"file_name": "a.PNG"}\n'
    files["deep/metadata.csv"] = "\ufefffile_name,text\nc.webp,see  c\n"
    files["link/metadata.jsonl"] = '{"file_name": "k.png", "text": "by a link"}'
    files |= {"a.txt": "\ufeff\r\n a girl \r\na child, smiling\r\n", "b.txt": "less than the table says"}
    files |= {"f.txt": "\n", "f.caption": "an f, Steps: 20, --n", "g.txt": "see c"}
    for name, content in files.items():
        write(folder / name, content)
    assert data.find_photos(folder) == ([folder / name for name in names], 9)
    table, remark = data.read_photos(str(folder), None)
    captions = ["a girl", "bee, two", "see c", "an f, Steps: 20, --n", "by a link"]
    assert table.prompt.tolist() == captions
    assert table.photo.tolist() == [str(folder / names[i]) for i in (0, 1, 2, 4, 8)]
    assert remark.startswith(f"photos     5 of 18 in {folder} (3 without caption, 1 of a repeated one, 9 masks")
    assert data.read_prompts(str(folder), None, 2)[0].prompt.tolist() == captions[:2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "b", "text": "y"}', "row 2: .* file b"),
        ("metadata.jsonl", '{"text": "x"}', "file_name"),
        ("a.txt", "a man\nNegative prompt: blurry", "a generator's settings"),
        ("a.caption", "a man\nSteps: 20, Sampler: Euler", "a generator's settings"),
        ("a.txt", "a caf\u00e9".encode("latin-1"), "utf-8"),
        ("", b"", "1 photos in .*, none has a caption"),
    ],
)
def test_bad_captions_are_one_line(name, content, words, tmp_path):
    photo(tmp_path / "a.png")
    place = str(write(tmp_path / name, content) if name else tmp_path)
    for read, *count in ((data.read_photos,), (data.read_prompts, None)):
        with pytest.raises(data.UserError, match=words) as error:
            read(str(tmp_path), None, *count)
        assert (place in str(error.value), "\n" in str(error.value)) == (True, False)


def test_captions_of_datasets_are_prompts_and_a_folder_without_photos_is_told(tmp_path):
    rows = datasets.Dataset.from_dict({"caption": ["w", "w", "j", ""], "image": [str(photo(tmp_path / "p.png"))] * 4})
    (tmp_path / "out").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "out" / "train-0.parquet")
    assert data.read_prompts(str(tmp_path / "out"), None, None)[0].prompt.tolist() == ["w", "j"]  # none is opened
    with pytest.raises(data.UserError, match=r"0 photos in .*, none has a caption"):
        data.read_photos(str(tmp_path / "out"), None)


def test_photos_that_are_left_out(tmp_path):
    def check(file: Path, width: int, height: int) -> str:
        return data.check_photo(str(file), height, width)

    (exif := Image.Exif())[0x0112] = 6  # the camera lay on its side
    upright, turned = photo(tmp_path / "a.png"), photo(tmp_path / "b.jpg", exif=exif)
    for file, width, height in ((upright, 60, 90), (turned, 90, 60)):
        assert re.fullmatch("[0-9a-f]{8}", check(file, width, height))
        for size in ((width + 1, height), (width, height + 1)):
            assert check(file, *size) == "would be enlarged more than 1.5 times"
    assert (data.read_image(turned).size, 0x0112 in data.read_image(turned).getexif()) == ((60, 40), False)
    assert check(write(tmp_path / "c", upright.read_bytes()), 9, 9) == check(upright, 60, 90) != check(turned, 9, 9)
    assert check(write(tmp_path / "bad.png", "x"), 9, 9) == check(tmp_path / "gone.png", 9, 9) == "cannot be read"


def test_images_of_all_kinds_become_8_bit_srgb(tmp_path):
    def colour(mode: str, pixel: object, name: str = "a.png", **save) -> tuple[int, ...]:
        return data.read_image(photo(tmp_path / name, pixel, mode=mode, **save)).getpixel((0, 0))

    greys = {"u.png": ("uint16", 65535), "u.tif": ("uint16", 65535), "i.tif": ("int32", 65535)}
    for name, (kind, top) in (greys | {f"{top}.tif": ("float32", top) for top in (1, 255, 65535, 2e5)}).items():
        Image.fromarray(np.array([[top / 4, 0, top]]).astype(kind)).save(tmp_path / name)
        assert np.asarray(data.read_image(tmp_path / name))[0].tolist() == [[64] * 3, [0] * 3, [255] * 3], name
    Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)).save(tmp_path / "dark.png")
    assert data.read_image(tmp_path / "dark.png").getpixel((0, 0)) == (128,) * 3
    assert (colour("P", 0), colour("P", 0, transparency=0), colour("1", 1)) == ((0,) * 3, (255,) * 3, (255,) * 3)
    assert colour("LA", (0, 0)) == colour("RGB", (1, 2, 3), transparency=(1, 2, 3)) == (255,) * 3
    assert colour("RGBA", (255, 0, 0, 128)) == (255, 127, 127)
    assert colour("CMYK", (0, 255, 255, 0), "c.jpg", quality=100) == (255, 0, 0)
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = (slice(swapped.index(name) + 4, swapped.index(name) + 12) for name in (b"rXYZ", b"bXYZ"))
    swapped[red], swapped[blue] = swapped[blue], swapped[red]
    assert colour("RGB", (200, 100, 50), icc_profile=bytes(swapped)) == (50, 100, 200)
    assert colour("RGB", (200, 100, 50), icc_profile=b"broken") == (200, 100, 50)


def test_the_prompts_of_people():
    rows = data.human_prompts(10_000, 0)
    assert (rows["prompt"].is_unique, rows[:10].equals(data.human_prompts(10, 0))) == (True, True)
    assert rows["prompt"].str.count(r"\w+|[^\w\s]").max() + 2 < 72  # of CLIP's 77
    rows = rows[:2000]
    assert (rows["people"].value_counts(normalize=True) * 11).to_dict() == pytest.approx({1: 6, 2: 3, 3: 2}, rel=0.15)
    person = r"an? (young|middle-aged|elderly|little) ([\w ]+?) (woman|man|person|girl|boy|child)"
    people = rows["prompt"].str.lower().str.extractall(person)
    assert people.groupby(level=0).size().tolist() == rows["people"].tolist()
    ages, origins, nouns = (people[column].value_counts(normalize=True) for column in people)
    assert (ages.between(0.18, 0.3).tolist(), origins.between(0.08, 0.14).tolist()) == ([True] * 4, [True] * 9)
    assert nouns["woman"] + nouns["girl"] == pytest.approx(nouns["man"] + nouns["boy"], rel=0.1)
    clothes = " in an? (" + "|".join(data.EVERYWHERE["colour"]) + ") "
    for prompt, people, pose in rows.itertuples(index=False):
        assert (len(re.findall(clothes, prompt)), pose in prompt) == (people, True), prompt
        assert re.search(r" hand| arm| and \w+ing |holding|riding|shoulder|walking a|with a |dancing", prompt), prompt
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}@;]|\s\s|,,|\b(\w+) \1\b", prompt), prompt
        assert not re.search("little .*(workshop|garage|shed)|(T-shirt|linen|suit|dress) .*snow", prompt), prompt
        assert pose != "close-up" or not re.search("full-body|trousers|jeans|boots|sitting", prompt), prompt
        assert people > 1 or not re.search(r" (man|boy) .*(dress|\bher\b)| (woman|girl) .*\bhis\b", prompt), prompt


def test_write_prompts(tmp_path):
    for suffix in (".csv", ".jsonl", ".txt"):
        file = tmp_path / "new" / f"people{suffix}"
        rows = data.write_prompts(str(file), 20, 4)
        read = data.read_prompts(str(file), None, None)[0].astype(str)
        assert read.to_dict("list") == rows[["prompt"] if suffix == ".txt" else [*rows]].astype(str).to_dict("list")
        for refused in (file, file.with_suffix(".xlsx")):
            with pytest.raises(data.UserError, match=refused.name):
                data.write_prompts(str(refused), 20, 4)
