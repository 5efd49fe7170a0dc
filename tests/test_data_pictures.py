# SPDX-License-Identifier: Apache-2.0
"""What make_preference_data.py shows and hands on of a finished data set: pictures, page, data card, exports."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import make_preference_data as data
import train_dpo_human as train


HOSTILE = '</script><img src=x onerror="document.title=1"> "it\'s" & `a|b` *c* <!-- {x} \\ @DATA@\nfür 犬 🐕'
MODEL = 'some "one"/it\'s: {a} #\n- model 🐕'
NAN, INF = math.nan, math.inf
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=3000"]


def jpg(colour: tuple[int, int, int], size: int = 32) -> bytes:
    return data.to_jpeg(Image.new("RGB", (size, size), colour))


def colour_of(picture: bytes | Image.Image) -> tuple[int, ...]:
    picture = picture if isinstance(picture, Image.Image) else Image.open(io.BytesIO(picture))
    return picture.convert("RGB").resize((1, 1)).getpixel((0, 0))


def make_row(i: int, scores: tuple[float, float] | None = None, **changes: object) -> dict:
    """The i-th pair: the winner is green, the loser red, both of a shade that tells i; the sides take turns."""
    win, loss = scores or (20.0 + i, 10.0 - i)
    sides = {"jpg": (jpg((0, 200, 5 * i)), jpg((200, 0, 5 * i))), "label": (1.0, 0.0), "score": (win, loss)}
    sides |= {"seed": (2 * i, 2**47 + i), "source": ("generated", "draft-5"), "latents": (b"w", b"l")}
    row = {"caption": f"prompt {i}", "prompt_id": f"{i:016x}", "stage": "easy", "num_candidates": 4}
    row["margin"] = win - loss
    order = (0, 1) if i % 3 else (1, 0)
    row["scores"] = json.dumps({"pickscore": [(win, loss)[side] for side in order], "veto": [1.0, 1.0]})
    row |= {f"{name}_{k}": values[side] for name, values in sides.items() for k, side in enumerate(order)}
    return row | changes


def write_folder(folder: Path, train_rows: list[dict], validation_rows: list[dict] = (), per_group: int = 4) -> dict:
    """A finished data set as make_preference_data.py leaves it; returns its record."""
    (folder / "data").mkdir(parents=True)
    schema = pa.schema(data.PAIR_COLUMNS.items())
    for split, rows in (("train", train_rows), ("validation", validation_rows)):
        if rows:
            with pq.ParquetWriter(data.split_file(folder, split), schema) as writer:
                for some in data.batches(rows, per_group):
                    writer.write_table(pa.Table.from_pylist(some, schema))
    settings = {"pretrained_model_name_or_path": MODEL, "seed": 0, "num_images_per_prompt": 4, "scorer": ["pickscore"]}
    settings |= {"stage": "easy", "draft_steps": 5, "num_inference_steps": 20}
    record = {"settings": settings | {"revision": None}, "prompts": 40, "dropped": {"all scores equal": 3}}
    record |= {"image_size": [32, 32], "versions": {"torch": "2.13"}}
    data.write_record(folder, record)
    return record


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """31 pairs, one hostile, some with scores that are not finite, all shown and exported."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    rows = [make_row(i) for i in range(28)]
    rows[5] = make_row(5, caption=HOSTILE, source_0="<i>real</i>")
    rows[6] = make_row(6, (26.0, -INF))
    rows[7] = make_row(7, (NAN, 3.0))
    record = write_folder(folder, rows, [make_row(i) for i in range(28, 31)])
    data.describe_pairs(folder, record)
    for kind in ("pickapic", "chosen", "folders"):
        assert data.export_pairs(folder, kind) == folder / f"export-{kind}"
    return folder


# ---- Reading --------------------------------------------------------------------------------------------------------


def test_pairs_come_in_their_order_with_their_split(finished):
    pairs = list(data.iterate_pairs(finished, ["prompt_id"]))
    assert pairs == [("train" if i < 28 else "validation", {"prompt_id": f"{i:016x}"}) for i in range(31)]
    assert data.count_pairs(finished) == {"train": 28, "validation": 3}
    assert [split for split, _ in data.iterate_pairs(finished, ["margin"], ["validation"])] == ["validation"] * 3
    chosen = data.iterate_pairs(finished, ["prompt_id"], positions=[0, 9, 28, 30])
    assert [int(row["prompt_id"], 16) for _, row in chosen] == [0, 9, 28, 30]


def test_only_row_groups_with_wanted_positions_are_read(finished, monkeypatch):
    groups, original = [], pq.ParquetFile.iter_batches

    def listen(self, size, row_groups, columns):
        groups.extend(row_groups)
        return original(self, size, row_groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", listen)
    assert len(list(data.iterate_pairs(finished, positions=[1, 2, 13]))) == 3
    assert groups == [0, 3]


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path):
    random = np.random.default_rng(0)
    rows = [make_row(i % 40, jpg_0=random.bytes(200_000), jpg_1=random.bytes(200_000)) for i in range(200)]
    write_folder(tmp_path / "out", rows)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in data.iterate_pairs(tmp_path / "out")]
    assert len(held) == 200
    assert max(held) < 8e6 < 80e6 == sum(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows)


def test_positions_are_spread_evenly_whatever_the_seed():
    assert data.spread_evenly(24, 12) == list(range(0, 24, 2))
    assert data.spread_evenly(3, 100, seed=1) == [0, 1, 2]
    assert data.spread_evenly(0, 5) == data.spread_evenly(5, 0, seed=0) == []
    for seed in range(20):
        chosen = data.spread_evenly(1003, 100, seed)
        assert chosen == data.spread_evenly(1003, 100, seed)
        assert all(i * 1003 // 100 <= position <= (i + 1) * 1003 // 100 for i, position in enumerate(chosen))
        assert len(set(chosen)) == 100
    assert data.spread_evenly(1003, 100, 0) != data.spread_evenly(1003, 100, 1)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def test_pairs_png_has_twelve_pairs_winners_above_losers(finished):
    sheet = Image.open(finished / "pairs.png")
    for i, position in enumerate(data.spread_evenly(31, 12)):
        x = 16 + i % 6 * 208
        column = sheet.crop((x, 60 if i < 6 else sheet.height // 2 + 30, x + 192, sheet.height))
        winner, loser = colour_of(column.crop((60, 20, 120, 90))), colour_of(column.crop((60, 250, 120, 330)))
        assert np.allclose(winner, (0, 200, 5 * position), atol=6)
        assert np.allclose(loser, (200, 0, 5 * position), atol=6)


def test_histograms_need_nothing_but_the_scores(finished, tmp_path):
    (tmp_path / "data").mkdir()
    columns = ["label_0", "label_1", "score_0", "score_1", "margin", "scores"]
    for split in data.SPLITS:
        pq.write_table(
            pq.read_table(data.split_file(finished, split), columns=columns), data.split_file(tmp_path, split)
        )
    data.draw_histograms(tmp_path)
    assert Image.open(tmp_path / "scores.png").tobytes() == Image.open(finished / "scores.png").tobytes()


def test_scores_follow_the_labels_and_what_is_not_finite_is_counted(finished):
    scores = data.scores_of_pairs(finished)
    assert scores["winners"][[0, 1, 2, 30]].tolist() == [20, 21, 22, 50]
    assert scores["losers"][[0, 1, 2, 30]].tolist() == [10, 9, 8, -20]
    sides = [data.Series(name, scores[name], "red") for name in ("winners", "losers")]
    assert data.not_drawn(sides) == {"of the winners at nan": 1, "of the losers at -inf": 1}
    assert data.not_drawn([data.Series("margins", scores["margins"], "red")]) == {
        "of the margins at inf": 1,
        "of the margins at nan": 1,
    }
    far = data.Series("margins", np.array([*np.linspace(0, 1, 50), 400.0, -7.0]), "red")
    assert data.not_drawn([far]) == {"of the margins beyond the axis": 2}


def test_the_axis_ends_where_the_bars_end():
    far = data.Series("margins", np.array([*np.linspace(0, 1, 50), 400.0, -7.0]), "red")
    edges = data.histogram_steps([far])
    assert (edges[0], edges[-1]) == pytest.approx((0, 1), abs=0.05)


def test_a_side_without_finite_scores_is_said_to_have_none(recwarn):
    sides = [
        data.Series("winners", np.array([1.0, 2.0]), data.GOOD),
        data.Series("losers", np.full(2, -INF), data.BAD),
    ]
    data.draw_panel("Scores", "score", sides)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_long_title_is_wrapped_to_a_narrow_sheet():
    card = data.Card([(Image.new("RGB", (64, 64)), "1.00", data.GOOD)])
    long, short = (data.contact_sheet(title, [card], 6) for title in ("Winners above losers, with their scores", "W"))
    assert long.width == short.width
    assert long.height > short.height
    ink = np.asarray(long.convert("L"))[: long.height - short.height + 60, -8:]
    assert (ink == 255).all()  # nothing runs over the edge


@pytest.mark.parametrize("values", [[], [NAN, INF], [3.0], [0.0] * 9, [1e-7, 2e-7], [-5e8, 7e8], [1, 1, 1, 1, 1, 9]])
def test_histograms_of_odd_scores(values):
    series = [data.Series("winners", np.array(values, float), data.GOOD)]
    panel = data.draw_panel("Scores", "score", series)
    painted = any(colour == (0x12, 0x80, 0x4A) for _, colour in panel.getcolors(1 << 20))
    assert painted == bool(np.isfinite(values).any())
    assert all(name.startswith("of the winners at") for name in data.not_drawn(series))


def test_every_finite_value_is_in_a_bar():
    values = np.random.default_rng(0).normal(21, 1, 5000)
    edges = data.histogram_steps([data.Series("winners", values, "red")])
    assert np.histogram(values, edges)[0].sum() == 5000
    assert 20 <= len(edges) <= 62


@pytest.mark.parametrize(("low", "high", "step"), [(0, 1, 0.2), (0, 970, 200), (17.3, 21.4, 1), (-3e-4, 5e-4, 2e-4)])
def test_ticks_are_round(low, high, step):
    ticks = data.round_steps(low, high, 5)
    assert np.allclose(np.diff(ticks), step)
    assert np.allclose(ticks / step, np.round(ticks / step))
    assert ticks[0] <= low
    assert ticks[-1] >= high


# ---- The page -------------------------------------------------------------------------------------------------------


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def browse(page: Path, script: str) -> str:
    """The document after `script` ran in it, as chromium sees it."""
    copy = page.with_name("browse.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    copy.unlink()
    return done.stdout


def test_page_holds_the_pairs_and_asks_no_network(finished):
    page = (finished / "pairs.html").read_text()
    content = page_data(page)
    assert len(content["pairs"]) == 31
    pair = content["pairs"][6]
    assert pair["winner"]["score"] == 26
    assert pair["loser"]["score"] == "-Infinity"
    assert pair["margin"] == "Infinity"
    assert pair["scores"][0] == ["pickscore", 26, "-Infinity"]
    assert pair["loser"]["seed"] == str(2**47 + 6)
    assert colour_of(base64.b64decode(pair["winner"]["jpg"]))[1] > 190
    assert content["pairs"][30]["split"] == "validation"
    assert not re.search(r"https?:|src=[\"']?//|@import|url\(", page.replace(HOSTILE, ""))


def test_page_escapes_what_users_wrote(finished):
    page = (finished / "pairs.html").read_text()
    assert page_data(page)["pairs"][5]["prompt"] == HOSTILE
    assert page.count("<img") == page.count("<i>real") == page.count("<!--") == 0
    assert page.count("</script>") == data.PAGE.count("</script>") == 2
    assert "innerHTML" not in page


def test_page_shows_a_seeded_even_choice(tmp_path):
    record = write_folder(tmp_path / "out", [make_row(i % 40, prompt_id=str(i)) for i in range(60)])
    data.write_page(tmp_path / "out", record, count=10)
    content = page_data((tmp_path / "out" / "pairs.html").read_text())
    assert [pair["position"] for pair in content["pairs"]] == data.spread_evenly(60, 10, seed=0)
    assert content["about"]["words"].startswith("10 of 60 pairs, scored by pickscore + veto")


def test_page_is_small():
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    photo = data.to_jpeg(Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC))
    assert len(photo) > 60_000
    assert 200 * len(data.thumbnail(photo)) < 8e6
    assert max(Image.open(io.BytesIO(base64.b64decode(data.thumbnail(photo)))).size) == 384
    assert base64.b64decode(data.thumbnail(jpg((1, 2, 3)))) == jpg((1, 2, 3))
    assert data.PAGE.count("\n") < 200


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_page_in_a_browser_shows_prompts_as_text(finished):
    dom = browse(finished / "pairs.html", "leaf(5); onbeforeprint()")
    assert "<title>Preference pairs</title>" in dom
    assert len(re.findall("<article>", dom)) == 31
    shown = re.findall(r"<blockquote>(.*?)</blockquote>", dom, re.DOTALL)
    assert html.unescape(shown[5]) == HOSTILE
    assert "&lt;i&gt;real&lt;/i&gt;" in dom
    assert "<td>-∞</td>" in dom
    assert "onerror" not in re.sub(r"<blockquote>.*?</blockquote>|<script.*?</script>", "", dom, flags=re.DOTALL)


SCRIPT = """
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const told = [], tell = value => told.push(value), prompt = () => document.querySelector("blockquote")?.textContent;
press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
tell([$("place").textContent, prompt()]);
$("sort").value = "least"; $("sort").onchange(); tell(prompt());
$("sort").value = "most"; $("sort").onchange(); tell(prompt());
$("filter").value = "PROMPT 2"; $("filter").oninput(); tell($("place").textContent);
$("filter").value = "nothing like it"; $("filter").oninput(); tell(main.textContent); press("ArrowRight");
$("filter").value = ""; $("filter").oninput();
press("b"); tell([main.querySelectorAll("table, figure").length, $("said").textContent]);
const sides = [];
for (let i = 0; i < 10; i++) {
  const place = list[at].coin ? [2, 1] : [1, 2];  // where the winner is, where the loser
  sides.push(place[0]);
  press(String(i < 7 ? place[0] : place[1])); press("1");
  if (i < 9) press("ArrowRight");
}
tell($("said").textContent); tell(document.querySelectorAll(".agree, .differ, .here").length);
press("b"); tell(document.querySelectorAll(".win").length);
document.title = JSON.stringify(told);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_page_in_a_browser_leafs_sorts_filters_and_counts_blind_choices(finished):
    dom = browse(finished / "pairs.html", SCRIPT)
    told = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL).group(1)))
    assert told[:3] == [["2 / 31", "prompt 1"], "prompt 0", "prompt 6"]
    assert told[3] == "1 / 11"  # 2, 20 .. 29
    assert told[4] == "No prompt holds this text."
    assert told[5] == [0, "Which one would you choose?"]
    assert told[6].startswith(
        "The scorer chose the other one. So far you agree in 7 of 10: 70 % (95 % interval 40 to 89;"
    )
    assert told[7:] == [10, 1]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_page_does_not_call_the_hard_stages_choice_the_scorers(tmp_path):
    record = write_folder(tmp_path / "out", [make_row(1, stage="hard")])
    data.write_page(tmp_path / "out", record)
    script = 'const p = k => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));'
    dom = browse(tmp_path / "out" / "pairs.html", script + 'p("b"); p(pairs[0].coin ? "2" : "1");')
    assert "You agree with the choice. So far you agree in 1 of 1" in dom


# ---- The data card --------------------------------------------------------------------------------------------------


def test_data_card_is_read_by_datasets_whatever_the_model_is_called(finished, tmp_path):
    card = (finished / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pretty_name"] == f"Preference pairs of {' '.join(MODEL.split())}"
    loaded = datasets.load_dataset(str(finished), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 28, "validation": 3}
    assert loaded["train"].column_names == list(data.PAIR_COLUMNS)
    assert loaded["train"][5]["caption"] == HOSTILE
    assert loaded["train"].features["jpg_0"].dtype == "binary"


def test_data_card_tells_counts_and_scores(finished):
    card = (finished / "README.md").read_text()
    assert "28 train pairs and 3 validation pairs" in card
    for line in ("| prompts | 40 |", "| pairs in validation | 3 |", "| no pair: all scores equal | 3 |"):
        assert line in card
    finite = [i for i in range(31) if i not in (6, 7)]
    mean = f"| pickscore | {np.mean(finite) + 20:.4g} | {10 - np.mean(finite):.4g} | 100 % | 29 |"
    assert mean in card
    assert "| veto | 1 | 1 | 50 % | 31 |" in card
    assert "![winners above losers](pairs.png)" in card
    assert "](scores.png)" in card
    assert f"| margin | 10 | {np.percentile([10 + 2 * i for i in finite], 10):.4g} |" in card
    assert card.count("> prompt ") == 3


def test_what_a_pair_is_in_words():
    easy = {"num_images_per_prompt": 24, "draft_steps": 5, "num_inference_steps": 20, "stage": "easy"}
    told = data.what_a_pair_is(easy)
    assert told == "the best and the worst of 24 images of one prompt, chosen as drafts of 5 steps and drawn in 20,"
    assert "drafts" not in data.what_a_pair_is(easy | {"draft_steps": 0})
    normal = data.what_a_pair_is(easy | {"stage": "normal", "sdrecon_timesteps": [400, 500]})
    assert "timestep 400 or 500" in normal
    assert "the Easy stage's winner" in normal
    hard = data.what_a_pair_is(easy | {"stage": "hard", "sdrecon_timesteps": [100]})
    assert "preferred to the Normal stage's winner of the same prompt whatever their scores" in hard
    assert "chosen" not in hard


def test_data_card_escapes_what_users_wrote(tmp_path):
    record = write_folder(tmp_path / "out", [make_row(1, caption=HOSTILE)])
    card = data.data_card(tmp_path / "out", record)
    assert "\n1 train pair. Each" in card
    assert "<img" not in card
    assert "<!--" not in card
    assert r"\`a\|b\` \*c\*" in card
    assert not re.search(r"^- model", card, re.MULTILINE)


# ---- Exports --------------------------------------------------------------------------------------------------------


def check_pairs(winners: list[bytes], losers: list[bytes], first: int = 0) -> None:
    for i, (winner, loser) in enumerate(zip(winners, losers, strict=True), first):
        assert winner == jpg((0, 200, 5 * i))
        assert loser == jpg((200, 0, 5 * i))


def test_export_pickapic_has_its_columns_and_no_others(finished, tmp_path):
    rows = datasets.load_dataset(str(finished / "export-pickapic"), cache_dir=str(tmp_path))["train"]
    assert {name: value.dtype for name, value in rows.features.items()} == {
        **{"jpg_0": "binary", "jpg_1": "binary", "label_0": "float64", "label_1": "float64", "caption": "string"},
        **{"are_different": "bool", "has_label": "bool", "best_image_uid": "string", "image_0_uid": "string"},
        **{"image_1_uid": "string", "model_0": "string", "model_1": "string", "ranking_id": "int64"},
        **{"num_example_per_prompt": "int64"},
    }
    check_pairs(*zip(*(data.winner_first(row, (row["jpg_0"], row["jpg_1"])) for row in rows), strict=True))
    assert all(row["best_image_uid"] == row[f"image_{0 if row['label_0'] else 1}_uid"] for row in rows)
    assert rows[1]["image_0_uid"] == f"{1:016x}-generated-2"
    assert (rows[1]["model_0"], rows[1]["model_1"]) == (MODEL, "draft-5")
    assert rows["ranking_id"][:] == list(range(28))
    assert set(rows["num_example_per_prompt"][:]) == {1}


def test_export_chosen_is_read_as_images(finished, tmp_path):
    loaded = datasets.load_dataset(str(finished / "export-chosen"), cache_dir=str(tmp_path))
    rows = loaded["validation"]
    image = datasets.Image()
    assert rows.features == {"prompt": datasets.Value("string"), "chosen": image, "rejected": image}
    assert colour_of(rows[0]["chosen"]) == colour_of(jpg((0, 200, 140)))
    assert loaded["train"][5]["prompt"] == HOSTILE
    raw = rows.cast_column("chosen", datasets.Image(decode=False)).cast_column(
        "rejected", datasets.Image(decode=False)
    )
    check_pairs([row["chosen"]["bytes"] for row in raw], [row["rejected"]["bytes"] for row in raw], 28)


def test_export_folders_are_named_by_prompt_id_alone(finished):
    place = finished / "export-folders" / "train" / f"{5:016x}"
    assert sorted(str(path.relative_to(place)) for path in place.glob("**/*.*")) == ["1.txt", "l/1.jpg", "w/1.jpg"]
    assert (place / "1.txt").read_text() == HOSTILE
    check_pairs([(place / "w/1.jpg").read_bytes()], [(place / "l/1.jpg").read_bytes()], 5)
    assert len(list((finished / "export-folders" / "validation").iterdir())) == 3


@pytest.mark.parametrize("kind", ["", "export-pickapic", "export-chosen", "export-folders/train"])
def test_our_trainer_reads_the_same_pairs_from_every_export(finished, kind, tmp_path):
    args = train.parse_args(["--train_data_dir", str(finished / kind), "--cache_dir", str(tmp_path)])
    splits, place = train.read_source(args)
    pairs, dropped = train.decide_pairs(splits["train"], args)
    cells = splits["train"].with_format("arrow")
    files = [[file.read() for file in train.open_pair(cells, pair, place)] for pair in pairs.itertuples()]
    check_pairs(*zip(*files, strict=True))
    assert pairs.caption[5] == (HOSTILE.splitlines()[0] if "folders" in kind else HOSTILE)  # lines are alternatives
    assert not dropped


def test_several_pairs_of_a_prompt_and_odd_prompt_ids_are_exported(tmp_path):
    out = tmp_path / "out"
    write_folder(out, [make_row(i, prompt_id=["../../up", "a/b"][i // 2]) for i in range(4)])
    place = data.export_pairs(out, "folders") / "train"
    assert sorted(path.name for path in place.glob("*/w/*")) == ["1.jpg", "1.jpg", "2.jpg", "2.jpg"]
    assert sorted(path.name for path in place.iterdir()) == ["______up", "a_b"]
    data.export_pairs(out, "pickapic")
    rows = pq.read_table(data.split_file(out / "export-pickapic", "train")).to_pylist()
    assert [row["num_example_per_prompt"] for row in rows] == [2] * 4


def test_an_export_replaces_the_earlier_one_or_leaves_it_alone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_folder(out, [make_row(0), make_row(1)])
    old = data.export_pairs(out, "folders")
    (old / "left over").touch()
    (out / "export-folders.part").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(data, "both_sides", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.export_pairs(out, "folders")
    assert (old / "left over").exists()
    data.export_pairs(out, "folders")
    assert sorted(path.name for path in old.iterdir()) == ["train"]
    assert not list(out.glob("*.part"))


def test_export_images_writes_the_pool(tmp_path):
    out, rows = tmp_path / "out", []
    write_folder(out, [make_row(0)])
    for i in range(5):
        sources = {
            "jpg": jpg((40 * i, 0, 0)) if i != 3 else None,
            "source": ["generated", "draft", "sdrecon-400", "x", "a/b"][i],
        }
        rows.append({"prompt_id": f"id{i // 2}", "caption": HOSTILE, "index": i, "seed": i, "scores": "{}", **sources})
    (out / "pool").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), out / "pool" / "pool-00000.parquet")
    place = data.export_pairs(out, "images")
    names = ["id0-generated-0", "id0-draft-1", "id1-sdrecon-400-2", "id2-a_b-4"]
    assert sorted(path.stem for path in place.glob("*.jpg")) == sorted(names)
    assert (place / "id0-draft-1.jpg").read_bytes() == rows[1]["jpg"]
    lines = [json.loads(line) for line in (place / "metadata.jsonl").read_text().splitlines()]
    assert lines[3] == {"file_name": "id2-a_b-4.jpg", "text": HOSTILE, "image_id": "id2-a/b-4"}
    loaded = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(loaded) == 4
    assert loaded.features["image"] == datasets.Image()
    assert data.image_id({"prompt_id": "p", "source": "draft", "index": 2}) == "p-draft-2"


# ---- The script -----------------------------------------------------------------------------------------------------


def test_a_run_shows_and_exports(tmp_path, capsys):
    flags = ["--max_prompts", "3", "--num_images_per_prompt", "2", "--num_inference_steps", "1"]
    flags += ["--output_dir", str(tmp_path / "out"), "--export", "pickapic", "chosen", "folders", "images"]
    data.main(data.parse_args(flags))
    names = {"README.md", "data", "pairs.html", "pairs.png", "pool", "pool.png", "preference_data.json", "scores.png"}
    names |= {f"export-{kind}" for kind in data.EXPORTS}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert len(list((tmp_path / "out" / "export-images").glob("*.jpg"))) == 6
    assert "export-chosen" in capsys.readouterr().out

    shutil.rmtree(tmp_path / "out" / "export-folders")
    stale = tmp_path / "out" / "export-chosen" / "stale"
    stale.touch()
    data.main(data.parse_args(["--output_dir", str(tmp_path / "out"), "--rescore"]))
    assert not stale.exists()
    assert not (tmp_path / "out" / "export-folders").exists()


def test_what_is_pushed_names_no_folder_of_this_machine():
    cut = data.without_folders
    assert cut("/home/me/models/sd15") == "sd15"
    assert cut("pickscore=/home/me/scorer,crop=1 clip") == "pickscore=scorer,crop=1 clip"
    for kept in ("owner/name", "my/model", "https://host/a/b", "C:/models/sd15", "a person / two", "./here/model"):
        assert cut(kept) == kept
