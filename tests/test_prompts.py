# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: every source and its errors, photos and their captions, the grammar of prompts."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import eval_human as ev
import make_preference_data as data


WAVING, JUMPING, READING = "a woman waving", "an old man jumping", "two people reading"
LINES = [WAVING, "", f"  {JUMPING} ", WAVING, " \t", READING, "a  woman\twaving"]  # 2 blank, 2 repeated, 3 left


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` caches what it converts; not in the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_source(kind: str, path: Path, columns: dict[str, list]) -> str:
    """The columns, written as one kind of source; the path that --prompts takes."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    path = path / (kind if "/" not in kind else "folder")
    if kind.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind.endswith((".csv", ".tsv")):
        comma = "," if kind.endswith("csv") else "\t"
        cells = [list(columns), *([row[name] for name in columns] for row in rows)]
        quoted = ('"' + str(cell or "").replace('"', '""') + '"' for row in cells for cell in row)
        path.write_text("".join(comma.join(next(quoted) for _ in columns) + "\n" for _ in cells), encoding="utf-8")
    elif kind.endswith(".parquet"):
        pq.write_table(pa.table(columns), path, row_group_size=2)
    else:
        path.mkdir()
        datasets.Dataset.from_dict(columns).to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


def draw_photo(path: Path, colour: str = "red", size: tuple[int, int] = (40, 60), **save: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)
    return path


def write_rows(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Prompts: sources -----------------------------------------------------------------------------------------------

TABLES = ["prompts.jsonl", "prompts.json", "prompts.csv", "prompts.tsv", "prompts.parquet", "a/folder"]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.prompts", "prompts"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_file(name, start, end, tmp_path):
    (tmp_path / name).write_bytes((start + end.join(LINES)).encode())
    prompts, remark = data.read_prompts(str(tmp_path / name), None, 2)
    assert prompts == [WAVING, JUMPING]
    where = tmp_path / name
    assert remark == f"prompts: the first 2 of 3 in {where} (2 blank lines and 2 repeated prompts left out)"


@pytest.mark.parametrize("script", [data, ev], ids=["data", "eval"])
@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind, script, tmp_path):
    """Order kept, blanks (and nulls) and repeated ones left out and counted; a column that is no text does no harm."""
    texts = [None if text == "" else text for text in LINES]
    source = write_source(kind, tmp_path, {"number": list(range(len(LINES))), "text": texts})
    unit = "line" if kind.endswith("jsonl") else "row"
    assert script.read_prompts(source, None, None) == (
        [WAVING, JUMPING, READING],
        f"prompts: the first 3 of 3 in {source} (2 blank {unit}s and 2 repeated prompts left out)",
    )


@pytest.mark.parametrize("kind", TABLES)
def test_columns(kind, tmp_path):
    columns = {"title": ["T"], "text": [READING], "caption": ['a man, "x"\nor y'], "prompt": [WAVING]}
    source = write_source(kind, tmp_path, columns)
    chosen = {name: data.read_prompts(source, name, None)[0] for name in (None, "caption", "title")}
    assert chosen == {None: [WAVING], "caption": ['a man, "x" or y'], "title": ["T"]}
    with pytest.raises(data.UserError) as error:
        data.read_prompts(source, "story", None)
    place = f"the first row of {source}" if "sv" in kind else source
    assert str(error.value) == f"{place} has no column story: --prompt_column can be one of {', '.join(columns)}"


def test_json_list_of_texts(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([WAVING, JUMPING]))
    assert data.read_prompts(str(tmp_path / "p.json"), None, None)[0] == [WAVING, JUMPING]


def test_parquet_reads_the_one_column(tmp_path, monkeypatch):
    source = write_source("p.parquet", tmp_path, {"jpg": [b"x" * 99] * 3, "caption": [WAVING, JUMPING, READING]})
    asked, whole = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, columns: asked.append(columns) or whole(self, columns=columns)
    )
    assert len(data.read_prompts(source, None, None)[0]) == 3
    assert asked == [["caption"]]


def test_folder_of_datasets_splits_and_changes(tmp_path):
    """train comes first; a folder that is written again is read again."""
    datasets.Dataset.from_dict({"text": [WAVING]}).to_parquet(tmp_path / "train-0.parquet")
    datasets.Dataset.from_dict({"text": [JUMPING]}).to_parquet(tmp_path / "validation-0.parquet")
    Image.new("RGB", (9, 9)).save(tmp_path / "pairs.png")  # as our own folders of pairs have one
    assert data.read_prompts(str(tmp_path), None, None)[0] == [WAVING]
    datasets.Dataset.from_dict({"text": [READING]}).to_parquet(tmp_path / "train-0.parquet")
    assert data.read_prompts(str(tmp_path), None, None)[0] == [READING]


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(name, split, download_mode):
        asked.append((name, split, download_mode))
        found = datasets.Dataset.from_dict({"caption": [WAVING]})
        return found if split else datasets.DatasetDict(test=found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("someone/people.v2", "someone/people:train[:10]"):
        assert data.read_prompts(source, None, None)[0] == [WAVING]
    mode = "reuse_dataset_if_exists"
    assert asked == [("someone/people.v2", None, mode), ("someone/people", "train[:10]", mode)]


BAD_SOURCES = {
    "nowhere/at/all": (None, "no such file or folder: {path}"),
    "none.txt": (None, "cannot read {path}: No such file or directory"),
    "empty.txt": (b"", "{path} is empty: no prompts"),
    "empty.jsonl": (b"", "{path} is empty: no prompts"),
    "empty.json": (b"", "{path} is empty: no prompts"),
    "empty.csv": (b"", "{path} is empty: no prompts"),
    "blank.txt": (b" \n\t\n", "{path} holds only blank lines: no prompts"),
    "header.csv": (b"text,n\n", "{path} is empty: no prompts"),
    "blank.csv": (b"text,n\n,1\n", "{path} holds only blank rows: no prompts"),
    "latin.txt": ("a woman\na caf\u00e9\n".encode("latin-1"), "{path}, line 2: not utf-8"),
    "latin.csv": ("text\na caf\u00e9\n".encode("latin-1"), "{path}, line 2: not utf-8"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "{path}, line 3: not json (Expecting value)"),
    "bad.json": (b'[\n"a",\nb]', "{path}, line 3: not json (Expecting value)"),
    "object.json": (b'{"data": ["a"]}', "{path} is not a list of texts or of objects"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 7}\n', "{path}, line 2: a int in place of a text"),
    "list.json": (b'[{"text": ["a", "b"]}]', "{path}, row 1: a list in place of a text"),
    "bare.csv": (
        b"a woman waving,1\na man,2\n",
        "the first row of {path} has no column prompt, caption, text: --prompt_column can be one of a woman waving, 1",
    ),
    "comma.csv": (
        b'text,n\n"a man, waving",1\na woman, waving,2\n',
        "{path}, line 3: 3 cells under 2 columns (a prompt with a comma needs quotes)",
    ),
    "quote.csv": (b'text\n"a man\n', "cannot read {path}: unexpected end of data"),
    "bad.parquet": (b"PAR?", "cannot read {path}: Parquet file size is 4 bytes"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources(name, tmp_path):
    content, words = BAD_SOURCES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(data.UserError) as error:
        data.read_prompts(str(tmp_path / name), None, None)
    assert str(error.value).startswith(words.format(path=tmp_path / name))
    assert "\n" not in str(error.value)


def test_what_datasets_cannot_load_is_one_line(tmp_path):
    (tmp_path / "notes.xyz").write_text("x")
    for source in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(data.UserError, match=f"^{source} is not a file, nor can datasets load it: [^\n]+$"):
            data.read_prompts(source, None, None)


# ---- Photos ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """Photos in folders: captions in metadata.jsonl, in .txt and .caption files; one without; two of one caption."""
    folder = tmp_path / "album"
    for name, colour in (("b.jpg", "red"), ("a.PNG", "lime"), ("deep/er/c.webp", "blue"), ("deep/d.jpeg", "white")):
        draw_photo(folder / name, colour)
    draw_photo(folder / "e.png", "black")
    draw_photo(folder / "deep" / "f.png", "yellow")
    draw_photo(folder / ".thumbnails" / "g.png")
    write_rows(
        folder / "metadata.jsonl",
        {"file_name": "b.jpg", "text": WAVING},
        {"file_name": "deep/er/c.webp", "text": "three  people\n"},
        {"file_name": "a.PNG", "text": None},
    )
    (folder / "a.txt").write_text("a girl\nlaughing\n")
    (folder / "deep" / "d.caption").write_text(JUMPING)
    (folder / "deep" / "f.txt").write_text(WAVING)
    return folder


def test_photo_folder(album):
    photos, remark = data.read_photos(str(album), None)
    colours = {caption: opener().getpixel((9, 9)) for caption, opener in photos.items()}
    assert colours.pop(WAVING)[0] > 250
    assert list(colours) == ["a girl laughing", JUMPING, "three people"]
    assert [int(np.argmax(colour)) for colour in colours.values()] == [1, 0, 2]
    assert remark == f"photos: 4 of 6 in {album} (1 without caption and 1 of a repeated one left out)"


@pytest.mark.parametrize("script", [data, ev], ids=["data", "eval"])
def test_prompts_of_photos_are_their_keys(script, album):
    prompts, remark = script.read_prompts(str(album), None, None)
    assert prompts == list(data.read_photos(str(album), None)[0])
    assert remark.endswith("(1 blank captions and 1 repeated prompts left out)")


def test_photo_rows_of_datasets(tmp_path):
    """The columns by type and name; the photo is decoded when it is opened."""
    files = [draw_photo(tmp_path / "in" / f"{i}.png", colour) for i, colour in enumerate(("red", "lime", "blue"))]
    (tmp_path / "in" / "bad.png").write_bytes(b"not a photo")
    cells = [*map(str, files), str(tmp_path / "in" / "bad.png"), None]
    table = {"photo": cells, "caption": [WAVING, WAVING, JUMPING, READING, ""]}
    rows = datasets.Dataset.from_dict(table).cast_column("photo", datasets.Image())
    (tmp_path / "out").mkdir()
    rows.to_parquet(tmp_path / "out" / "train-0.parquet")
    photos, remark = data.read_photos(str(tmp_path / "out"), None)
    assert list(photos) == data.read_prompts(str(tmp_path / "out"), None, None)[0] == [WAVING, JUMPING, READING]
    assert [photos[caption]().getpixel((0, 0)) for caption in (WAVING, JUMPING)] == [(255, 0, 0), (0, 0, 255)]
    assert "3 of 5" in remark
    assert "(1 without caption and 1 of a repeated one left out)" in remark
    with pytest.raises(data.UserError, match=r"^cannot read the photo .*out, row 4: cannot identify"):
        photos[READING]()


def test_photos_are_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    draw_photo(tmp_path / "a.jpg", size=(40, 60), exif=exif)
    Image.new("RGBA", (5, 7)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text(WAVING)
    (tmp_path / "b.txt").write_text(JUMPING)
    photos = [opener() for opener in data.read_photos(str(tmp_path), None)[0].values()]
    assert [(photo.size, photo.mode) for photo in photos] == [((60, 40), "RGB"), ((5, 7), "RGB")]
    assert 0x0112 not in photos[0].getexif()


def test_unreadable_photo_is_named_when_opened(tmp_path):
    whole = draw_photo(tmp_path / "a.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a.txt").write_text(WAVING)
    (opener,) = data.read_photos(str(tmp_path), None)[0].values()
    with pytest.raises(data.UserError, match=re.escape(f"cannot read the photo {tmp_path / 'a.jpg'}: ")):
        opener()


def test_errors_of_photo_folders(album, tmp_path):
    def refused(read, source, column=None):
        with pytest.raises(data.UserError) as error:
            read(str(source), column)
        assert "\n" not in str(error.value)
        return str(error.value)

    def prompts(source, column):
        return data.read_prompts(source, column, None)

    table = album / "metadata.jsonl"
    for read in (data.read_photos, prompts):
        assert refused(read, album, "story") == (
            f"{table} has no column story: --prompt_column can be one of file_name, text"
        )
    write_rows(table, {"file_name": "b.jpg", "text": WAVING}, {"file_name": "gone.jpg", "text": WAVING})
    assert refused(prompts, album) == f"{table}, line 2: there is no file gone.jpg"
    write_rows(table, {"text": WAVING})
    assert refused(prompts, album) == f"{table}, line 1: there is no file (no file_name)"
    draw_photo(tmp_path / "bare" / "a.jpg")
    for read in (data.read_photos, prompts):
        words = refused(read, tmp_path / "bare")
        assert words.startswith(f"1 photos in {tmp_path / 'bare'}, none has a caption")
        assert words.endswith("make_preference_data.py --caption_model writes them")
    source = write_source("a/folder", tmp_path, {"text": [WAVING]})
    assert refused(data.read_photos, source) == f"{source} has no column of images (it has text)"


# ---- Captions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    """A tiny BLIP with random weights."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "woman", "man", "with", "red", "shirt", "person"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**small, **ids, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    torch.manual_seed(3)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    )
    folder = tmp_path_factory.mktemp("blip")
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_captioner(tmp_path_factory) -> Path:
    """A tiny LLaVA with random weights and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<pad>", "<unk>", "</s>", "<image>", "USER:", "ASSISTANT:", "a", "woman", "man", "waving"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, additional_special_tokens=["<image>"], **special)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14),
            text_config=LlamaConfig(**small, vocab_size=len(words), eos_token_id=2, pad_token_id=0, bos_token_id=None),
            image_token_index=3,
        )
    )
    template = (
        "{% for m in messages %}USER: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
    )
    size = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(**size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["captioner", "chat_captioner"])
def test_captions_are_the_models_answers(kind, request, tmp_path):
    """As many words as the model says, none of the request's, the same whatever the batch."""
    model = str(request.getfixturevalue(kind))
    for i, colour in enumerate(("red", "blue", "white")):
        draw_photo(tmp_path / f"{i}.png", colour, (30 + i, 40))
    data.write_captions(tmp_path, model, "cpu", 2)
    together = [(tmp_path / f"{i}.txt").read_text() for i in range(3)]
    known = {"a", "woman", "man", "with", "red", "shirt", "person", "waving", "USER:", "ASSISTANT:"}
    assert all(set(text.split()) <= known and text.endswith("\n") for text in together)
    assert any(text.strip() for text in together)
    assert not any(text.startswith("USER:") for text in together)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    data.write_captions(tmp_path, model, "cpu", 1)
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(3)] == together


def test_captions_are_written_where_none_is(album, captioner):
    before = {path: path.read_bytes() for path in album.rglob("*") if path.is_file()}
    data.write_captions(album, str(captioner), "cpu", 2)
    after = {path: path.read_bytes() for path in album.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {album / "e.txt"}
    assert before.items() <= after.items()
    assert len(data.read_photos(str(album), None)[0]) == 5


def test_captioning_carries_on(tmp_path, captioner, monkeypatch):
    """Killed while a caption is written: no half of it stays, and the next start does the rest only."""
    for i in range(5):
        draw_photo(tmp_path / f"{i}.png", (50 * i, 0, 0))
    rename, done = os.replace, []

    def killed(part, path):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        rename(part, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        data.write_captions(tmp_path, str(captioner), "cpu", 2)
    monkeypatch.setattr(os, "replace", rename)
    assert sorted(tmp_path.glob("*.txt")) == sorted(done)
    opened, open_photo = [], data.open_photo
    monkeypatch.setattr(data, "open_photo", lambda file, name: opened.append(file.name) or open_photo(file, name))
    data.write_captions(tmp_path, str(captioner), "cpu", 2)
    assert opened == ["3.png", "4.png"]
    assert len(list(tmp_path.glob("*.txt"))) == 5
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(data, "load_captioner", lambda *_: pytest.fail("nothing is left to do"))
    data.write_captions(tmp_path, str(captioner), "cpu", 2)


def test_caption_model_that_does_not_load(album, tmp_path):
    for model in (str(tmp_path / "nowhere"), str(data.WORLD / "pipeline" / "tokenizer")):
        with pytest.raises(data.UserError, match=f"^cannot load the caption model {model}: [^\n]+$"):
            data.write_captions(album, model, "cpu", 2)


# ---- The grammar ----------------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ("snow|frozen|icicle", "T-shirt|sandals|summer|sunshine|linen"),
    ("sitting|wheelchair", "jumping|running [^ts]|sprinting|standing|lunge|sweeping"),
    ("close-up|head-and-shoulders", "boots|sandals|trousers|jeans|jumping|sitting|standing"),
    ("half-body|waist-up", "jumping|sprinting|bicycle|lunge|on one leg|kicking"),
    ("rain|puddle", "sunshine|blue sky|T-shirt|sandals"),
    ("kitchen|bakery|library|bookshop|ballroom", "sky|sun|coat|raincoat|bicycle|snow|parka"),
    (r"^(?!.*people).*\b(man|boy)\b", "dress|skirt|blouse|headscarf"),
    (r"\b(little)\b", r"\b(saw|drill|hammer|screw|ladder|toast|ballroom|opera|beard|shaved)|evening dress"),
    ("elderly [^,]* with", "black hair|brown hair|blond hair|red hair"),
    ("shaved head|headscarf", r"\bhair\b"),
    ("three people", "shaking hands"),
    (r"^(?!.*people).*\b(woman|girl)\b", r"\b(his|their)\b"),
    (r"^(?!.*people).*\b(man|boy)\b", r"\b(her|their)\b"),
]


@pytest.fixture(scope="module")
def written() -> list[str]:
    return data.human_prompts(10_000, 0)


def test_prompts_are_distinct_and_functions_of_seed_and_place(written):
    assert len(set(written)) == 10_000
    assert data.human_prompts(10, 0) == written[:10] == data.human_prompts(100, 0)[:10]
    assert len(set(data.human_prompts(1000, 1)) & set(written)) < 5


def test_prompts_are_of_a_length_that_clip_reads(written):
    words = [len(prompt.split()) for prompt in written]
    assert min(words) >= 12
    assert max(words) <= 45
    assert max(len(re.findall(r"\w+|[^\w\s]", prompt)) for prompt in written) + 2 <= 64  # 77 with room for rare words


def test_articles_capitals_and_blanks(written):
    for prompt in written:
        assert prompt[0] in "AT", prompt
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]|\b[Aa]n u[kn]|[{}@;]|\s\s|,,| ,|\b(\w+) \1\b", prompt), (
            prompt
        )


@pytest.mark.parametrize(("this", "that"), CONTRADICTIONS)
def test_no_prompt_contradicts_itself(this, that, written):
    seen = [prompt for prompt in written if re.search(this, prompt)]
    assert len(seen) > 20
    assert [prompt for prompt in seen if re.search(that, prompt)] == []


def test_everyone_is_dressed(written):
    single = [prompt for prompt in written if "people" not in prompt]
    assert all(", wearing " in prompt for prompt in single)
    people = re.compile(
        r"an? (?:young|middle-aged|elderly|little) [\w\s-]*?(?:woman|man|person|girl|boy|child)\b( in )?"
    )
    for prompt in set(written) - set(single):
        assert all(people.findall(prompt)), prompt
        assert len(people.findall(prompt)) == (2 if "two people" in prompt.lower() else 3), prompt


def test_people_are_balanced(written):
    """Shares of the prompts, and of the people in them; each within a fifth of what is told."""

    def shares(pattern: str) -> dict[str, float]:
        found = Counter(word.lower() for prompt in written for word in re.findall(pattern, prompt, re.IGNORECASE))
        return {word: count / found.total() for word, count in found.items()}

    groups = shares(r"(two|three) people")
    assert groups == pytest.approx({"two": 3 / 5, "three": 2 / 5}, rel=0.2)
    assert sum("people" not in prompt for prompt in written) / 10_000 == pytest.approx(6 / 11, rel=0.2)
    ages = shares(r"\b(young|middle-aged|elderly|little) ")
    assert set(ages) == {"young", "middle-aged", "elderly", "little"}
    assert all(0.18 < share < 0.3 for share in ages.values())
    origins = shares(r"(?:young|middle-aged|elderly|little) ([\w\s-]+?) (?:woman|man|person|girl|boy|child)\b")
    assert set(origins) == {origin.split(":")[0].lower() for origin in data.ORIGINS}
    assert all(share == pytest.approx(1 / 12, rel=0.2) for share in origins.values())
    genders = shares(r"\b(woman|man|person|girl|boy|child)\b")
    women, men = (genders[adult] + genders[child] for adult, child in (("woman", "girl"), ("man", "boy")))
    assert women == pytest.approx(men, rel=0.1)
    assert genders["person"] + genders["child"] > 0.07


def test_hands_are_busy(written):
    """Every seat, light and doing occurs; most prompts say what hands or arms do."""
    scenes = data.parse_scenes(data.SCENES)
    doings = [
        *data.HANDS,
        *data.FACE,
        *(text for scene in scenes for key in ("does", "moves", "group") for text in scene[key]),
    ]
    assert len(scenes) == 9
    assert len(doings) > 120
    for doing in doings:
        plain = re.escape(doing).replace(r"\{their\}", "(her|his|their)")
        assert any(re.search(plain, prompt) for prompt in written), doing


def test_write_prompts(tmp_path, capsys):
    path = tmp_path / "new" / "people.txt"
    flags = ["--prompts", str(path), "--write_prompts", "20", "--seed", "4"]
    data.cli(flags)
    assert path.read_text().splitlines() == data.human_prompts(20, 4)
    assert data.read_prompts(str(path), None, None)[0] == data.human_prompts(20, 4)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"20 prompts in {path}, such as", *(f"    {prompt}" for prompt in data.human_prompts(3, 4))]
    with pytest.raises(SystemExit) as stop:
        data.cli(flags)
    assert stop.value.code.startswith(f"make_preference_data.py: {path} is there already: ")
    assert [path] == list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--write_prompts", "5"], 2, "set --prompts"),
        (["--write_prompts", "0", "--prompts", "x.txt"], 2, "--write_prompts must be at least 1"),
        (["--caption_model", "nowhere/at"], 1, "--caption_model needs a folder of photos"),
    ],
)
def test_flags_that_cannot_work(flags, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "quiet_libraries", lambda: pytest.fail("got as far as loading"))
    with pytest.raises(SystemExit) as stop:
        data.cli(flags)
    assert words in (stop.value.code if status == 1 else capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_caption_model_before_prompts(tmp_path, captioner):
    """main captions the photos, then reads the captions as prompts."""
    draw_photo(tmp_path / "photos" / "a.png")
    args = ["--prompts", tmp_path / "photos", "--caption_model", captioner, "--output_dir", tmp_path / "out"]
    small = ["--num_inference_steps", "1", "--num_images_per_prompt", "2", "--validation_share", "0"]
    data.main(data.parse_args([*map(str, args), *small]))
    (caption,) = data.read_prompts(str(tmp_path / "photos"), None, None)[0]
    assert (tmp_path / "out" / "pool" / "prompts.txt").read_text() == caption + "\n"


def test_eval_reads_a_column(tmp_path, capsys):
    source = write_source("p.csv", tmp_path, {"story": [WAVING, JUMPING], "text": [READING, READING]})
    drawn = draw_photo(tmp_path / "drawn" / "a.png").parent
    with pytest.raises(SystemExit):
        ev.parse_args(["--models", "base", f"drawn={drawn}", "--prompts", source, "--prompt_column", "tale"])
    assert capsys.readouterr().err.strip().endswith("no column tale: --prompt_column can be one of story, text")


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def test_too_long(written):
    """24 tokens fit in the embedded world's text encoder, two of them special; batches do not matter."""
    tokenizer = AutoTokenizer.from_pretrained(data.WORLD / "pipeline" / "tokenizer")
    fits = " ".join(["person"] * 22)
    assert len(tokenizer(fits).input_ids) == 24
    assert data.too_long([fits, f"{fits} person", "a person", f"{fits} a a"], tokenizer) == [1, 3]
    assert data.too_long(["a person"] * 1500 + [f"{fits} red"] + ["a"] * 600, tokenizer) == [1500]
    assert data.too_long([], tokenizer) == []
