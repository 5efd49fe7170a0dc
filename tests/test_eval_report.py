# SPDX-License-Identifier: Apache-2.0
"""What eval_human.py says and shows: verdict, report.html, model_card.md, pictures, and the study for people."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_eval_main import PLUGINS, WORLD, by_prompt, coloured, start

import eval_human as ev


NAN = math.nan
EVIL = '</script></style><script>alert(1)</script><img src=x onerror=alert(1)> "a|b" & *c* `d` $e$ <!-- 犬'

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def judged(rates: dict[str, float], realism: Sequence = (), **moves: float) -> str:
    """The verdict on 100 prompts with win rates in %; the first metric leads, t is the training scorer."""
    wins = {name: ([0.5] * 100, (np.arange(100) < rate).astype(float)) for name, rate in rates.items()}
    roles = {name: "training" if name == "t" else "held-out" if k else "headline" for k, name in enumerate(rates)}
    results, colour = ev.compare_models(by_prompt(**wins), roles, []), ev.compare_colour(coloured(base={}, x=moves))
    return "\n".join(words for _, words in ev.verdict("x", results, colour, pd.DataFrame(realism), 0.0))


NOTHING = "\nNothing else that was measured is surely worse."


@pytest.mark.parametrize(("rates", "moves", "first", "then"), [
    ({"judge": 70, "t": 90}, {}, "Use x: it draws better than base by judge: it wins 70", NOTHING),
    ({"judge": 30}, {}, "Do not use x: it draws worse than base", NOTHING),
    ({"judge": 50}, {}, "No reason to use x: by judge it cannot be told from base", NOTHING),
    ({"judge": 62} | {str(k): 50 for k in range(20)}, {}, "Use x", NOTHING),  # tested alone
    ({"judge": 50, "t": 90}, {}, "No reason", "\nIt looks like reward hacking: t (90"),
    ({"judge": 50, "t": 90, "c": 20}, {}, "No reason", "and judge does not, and it costs c (wins 20"),
    ({"judge": 70, "t": 90, "c": 20}, {}, "Use x", "\nIt costs c (wins 20\u00a0% [13, 29], 0.5000 to 0.2000)."),
    ({"judge": 70}, {"L": 3.0}, "Use x", "\nIt costs a visible shift of the colours (Delta E 3.0)."),
    ({"judge": 50}, {"chroma": -3.0}, "No reason", "\nIt costs chroma (Lab) ("),
    ({"judge": 50}, {"clipped": 0.1}, "No reason", "\nIt costs share of clipped pixels ("),
    ({"judge": 50}, {"clipped": -0.1}, "No reason", NOTHING),
    ({"judge": 50, "c": 39, "d": 50}, {}, "No reason", f"{NOTHING}\nPerhaps worse, not for sure among so many"),
    ({"judge": 70, "c": 90}, {}, "Use x", f"{NOTHING}\nBetter, too: c (90"),
])  # fmt: skip
def test_verdict(rates, moves, first, then):
    said = judged(rates, **moves)
    assert said.startswith(first)
    assert then in said
    assert ("hacking" in said) == (rates["judge"] == 50 and "t" in rates)


def test_verdict_of_one_witness_identical_images_and_distances():
    results = ev.compare_models(by_prompt(t=([0.0] * 9, [1.0] * 9)), {"t": "training"}, [])
    nothing, far = pd.DataFrame(), {"difference": 2.0, "low": 1.0, "high": 3.0, "images": 100, "photos": 5000}
    assert "Only t, which chose the training pairs, judges" in ev.verdict("x", results, nothing, nothing, 0)[1][1]
    assert "the very images" in ev.verdict("x", nothing, nothing, nothing, 1.0)[0][1]
    said = judged({"judge": 50}, [far | {"distance": "FD"}, far | {"distance": "KD"}])
    assert said.endswith("\nIt costs KD to the photos (+2.0 [1.0, 3.0]).")  # FD is biased below 2048 images
    assert "FD to the photos" in judged({"judge": 50}, [far | {"distance": "FD", "images": 2048}])


def test_models_that_do_not_differ_are_seldom_called_better_or_worse():
    rng, said, nothing = np.random.default_rng(0), [], pd.DataFrame()
    roles = {"judge": "headline", "a": "held-out", "b": "held-out", "t": "training"}
    for _ in range(100):
        results = ev.compare_models(by_prompt(**{name: rng.normal(size=(2, 40)) for name in roles}), roles, [])
        said.append(str(ev.verdict("x", results, nothing, nothing, 0)))
    assert sum("No reason to use" not in words for words in said) <= 10  # of 5 at most, two deviations more
    assert sum("hacking" in words or "costs" in words for words in said) <= 10


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, dict]:
    """A run on finished images of base and two models, where users write what they should not: output and record."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    rows = [{"prompt": f"{EVIL if p == 1 else 'person'} number {p}", "shot": f"<i>a|b</i>{p % 2}"} for p in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "plugins.py").write_text(PLUGINS)
    for name, tint in zip(("base", "bright", "other", "photos"), (90, 130, 91, 94), strict=True):
        (folder / name).mkdir()
        for p, k in np.ndindex(20, 2):
            pixels = (rng.integers(-30, 30, (48, 32, 3)) + np.array([tint, 80, 60])).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{p:05d}_{k}.png")
    line = f"--prompts {folder}/prompts.jsonl --num_images_per_prompt 2 --output_dir {folder}/out --group_by shot"
    line += f" --real_data_dir {folder}/photos --feature_model {WORLD}/scorer --cmmd_model {WORLD}/scorer"
    line += f" --training_scorer corner --models base={folder}/base bright={folder}/bright other={folder}/other"
    line += f" --pretrained_model_name_or_path none --user_study 12 --scorers {folder}/plugins.py:corner"
    return folder / "out", start([*line.split(), f"{folder}/plugins.py:brightness,label={EVIL}"])[0]


@pytest.fixture(scope="module")
def page(full) -> str:
    return (full[0] / "report.html").read_text(encoding="utf-8")


def cells(page: str, title: str) -> list[list[str]]:
    """The cells of the tables of a section, as text."""
    text = re.search(rf"(?s)<h2>{re.escape(title)}</h2>(.*?)</section>", page)[1]
    rows = (re.findall(r"(?s)<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"(?s)<tr>(.*?)</tr>", text))
    return [[html.unescape(cell) for cell in row] for row in rows]


def test_the_page_loads_nothing_and_escapes_what_users_wrote(page):
    assert not {"script", "iframe", "link", "object", "a", "base", "i"} & set(re.findall(r"<(\w+)", page))
    tags = "".join(re.findall(r"<[^>]*>", page))
    assert not re.search(r"\s(on\w+|href)=", re.sub(r'"[^"]*"', '""', tags))
    assert {source[:22] for source in re.findall(r'src="(.*?)"', tags)} == {"data:image/png;base64,"}
    assert "content=\"default-src 'none';img-src data:;style-src 'unsafe-inline'\">" in page
    assert not re.search(r"https?://|url\(|@import", page)
    assert html.unescape(page).count(EVIL) > 10
    assert cells(page, "Groups of prompts")[1][0] == "shot: <i>a|b</i>0"


def test_numbers_in_the_page_are_those_of_the_results(full, page):
    record, metrics = full[1], [row for row in cells(page, "Win rates") if row[0] != "metric"]
    for shown, row in zip(metrics, record["results"], strict=True):
        role = f" ({row['role']})" if row["role"] in ("headline", "training") else ""
        interval = f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        expected = [row["metric"] + role, f"{100 * row['win_rate']:.1f} %", interval]
        assert shown[:5] == [*expected, ev.number(row["base"]), ev.number(row["tuned"])]
        assert float(shown[5].replace("< ", "")) == pytest.approx(row["p"], rel=0.06, abs=1e-4)
        holm = shown[6].replace("< ", "") or row["p"]  # none of the headline
        assert float(holm) == pytest.approx(row["p_holm"], rel=0.06, abs=1e-4)
    assert len(metrics) == 2 * 3
    values = {(row["model"], row["distance"]): ev.number(row["value"]) for row in record["realism"]}
    shown = {kind: [cell.split(" (")[0] for cell in row] for kind, _, *row in cells(page, "Realism")[1:]}
    assert shown == {kind: [values[n, kind] for n in ("base", "bright", "other")] for kind in ev.DISTANCES}
    light = [row for row in record["colour"] if row["statistic"] == "L"]
    shown = next(shown for shown in cells(page, "Colour") if shown[0] == ev.COLOURS["L"])
    expected = [light[0]["base"], light[0]["tuned"], light[1]["tuned"], light[0]["photos"]]
    assert [cell.split(" (")[0] for cell in shown[1:]] == [ev.number(value) for value in expected]
    for shown, row in zip(cells(page, "Groups of prompts")[1:], record["groups"], strict=True):
        assert shown[1:4] == [row["model"], "10", ev.rated(pd.Series(row))]


def test_first_two_sentences_then_sections_where_there_is_something(full, page, tmp_path):
    headings, end = re.compile(r"<h2>(.*?)</h2>"), ["How to read this", "Settings"]
    parts = ["Win rates", "Groups of prompts", "Realism", "Colour", *end]
    assert headings.findall(page) == ["bright beside base", "other beside base", *parts]
    images = pd.read_csv(full[0] / "per_image.csv").query("model != 'other'")
    images.assign(path=[full[0] / path for path in images.path]).to_csv(tmp_path / "per_image.csv", index=False)
    colour = [row for row in full[1]["colour"] if row["model"] == "bright"]
    record = full[1] | {"realism": [], "groups": [], "results": [], "colour": colour}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    found, said = start(["--from_csv", str(tmp_path / "per_image.csv"), "--output_dir", str(tmp_path)])
    single = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert headings.findall(single) == ["bright beside base", "Win rates", "Groups of prompts", "Colour", *end]
    shown = re.findall(r'class="said \w+ (first)? *(second)?"\s*>\s*(.*?)</p>', single, re.DOTALL)
    assert [classes for *classes, _ in shown[:2]] == [["first", ""], ["", "second"]]
    assert [html.unescape(words) for *_, words in shown] == [words for _, words in found["verdicts"]["bright"]]
    assert all(words in said for _, words in found["verdicts"]["bright"])


def test_rows_are_the_worst_losses_the_best_wins_and_seeded(full):
    own = pd.read_csv(full[0] / "per_image.csv").assign(path=Path("none.png"))
    first = own[own["index"] == 0].set_index(["model", "prompt_id"])  # what is shown, whatever the others gain
    lead = (first.corner["other"] - first.corner["base"]).sort_values(kind="stable").index
    shown = ev.rows_to_show(ev.first_images(own), "other", "corner", 1)
    numbers = [[int(cell["prompt"].split()[-1]) for cell in cells] for cells in shown.values()]
    assert numbers == [[*lead[:3]], [*lead[:-4:-1]], [*np.random.default_rng(1).permutation(lead)[:3]]]
    best = [(name, "", ev.number(first.corner[name, lead[-1]])) for name in ("base", "other")]
    assert shown["Best wins"][0]["sides"] == best


def test_the_card_is_escaped_and_its_tables_are_whole(full):
    card = (full[0] / "model_card.md").read_text(encoding="utf-8")
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\|$\n?)+", card, re.MULTILINE)]
    sizes = [{len(re.split(r"(?<!\\)\|", line)) - 2 for line in table} for table in tables]
    assert sizes == [{7}, {7}, {5}, {5}]  # of two models, of distances, of colours
    assert not re.search(r"(?<!\\)[<>$`~]|(?<![\\*])\*(?!\*)", card)
    assert card.count(r"\<script\>alert") >= 4


def test_pictures_show_something_of_grey_images_too(full, tmp_path):
    ev.draw_colours(tmp_path / "grey.png", coloured(base={}, grey={"hue": NAN}))
    sizes = {"win_rates.png": (1080, 300), "grid.png": (1600, 300), "changes-other.png": (1200, 300)}  # or taller
    sizes |= {"colour.png": (864, 2 * 144), tmp_path / "grey.png": (864, 144)}  # a strip for each model
    for path, (width, height) in sizes.items():
        with Image.open(full[0] / path) as image:
            assert image.width == width
            assert image.height == height if width == 864 else image.height > height
            assert image.convert("RGB").resize((64, 64)).getcolors(32) is None  # many colours


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_nothing_runs_nothing_overflows_a_phone_and_it_prints(full, tmp_path):
    report = (full[0] / "report.html").as_uri()
    measure = """<script>onload = () => { const d = document.querySelector("iframe").contentDocument;
      document.title = JSON.stringify([d.title, d.documentElement.scrollWidth, d.querySelectorAll("section").length,
      [...d.querySelectorAll("td, p, img")].filter(e => e.getBoundingClientRect().right > 390).length]) }</script>"""
    frame = f'<title></title><iframe src="{report}" style="width:390px;height:800px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(frame + measure)
    line = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    line += ["--virtual-time-budget=9000", f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]
    options = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    dom = subprocess.run([*line, "--dump-dom", (tmp_path / "frame.html").as_uri()], **options).stdout
    told = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL).group(1)))
    assert told == ["bright, other against base", 390, 8, 0]
    subprocess.run([*line, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'a.pdf'}", report], **options)
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", (tmp_path / "a.pdf").read_bytes())
    assert len(boxes) > 2
    assert {(round(float(w)), round(float(h))) for w, h in boxes} == {(595, 842)}  # A4 in points


@pytest.mark.parametrize("seed", range(3))
def test_models_share_the_pairs_and_every_prompt_comes_before_one_comes_twice(seed):
    rows = [(model, p, k) for model in ("base", "a", "b") for p in range(20) for k in range(2 if p < 2 else 1)]
    images = pd.DataFrame(rows, columns=["model", "prompt_id", "index"])
    pairs = ev.choose_pairs(images, 20, seed)
    assert sorted(pairs.prompt_id) == [*range(20)]
    assert (pairs.groupby(["model", pairs.left == "base"]).size() == 5).all()  # evenly, left as often as right
    every = ev.choose_pairs(images[(images.model != "b") | (images.prompt_id != 5)], 99, seed)
    assert len(every) == 43 == len(every.drop_duplicates(["model", "prompt_id", "index"]))  # only what both have
    assert ev.choose_pairs(images[images.model == "base"], 5, seed).empty


def decode(uri: str) -> tuple[bytes, np.ndarray]:
    data = base64.b64decode(uri.partition(",")[2])
    return data, np.asarray(Image.open(io.BytesIO(data)))


def test_a_pair_has_one_size_one_codec_and_no_metadata(tmp_path):
    Image.new("RGB", (1200, 1600), "red").save(tmp_path / "a.png", icc_profile=b"zebra" * 30)
    Image.new("RGB", (768, 1024), "red").save(tmp_path / "b.bmp")
    pair = ev.blind_pair([tmp_path / "a.png", tmp_path / "b.bmp"])
    assert pair["left"] == pair["right"]  # equal pixels are equal bytes
    assert decode(pair["left"])[1].shape == (768, 576, 3)
    assert (pair["shape"], pair["tiny"], b"zebra" in decode(pair["left"])[0]) == (0.75, False, False)


def study(output: Path) -> dict:
    return json.loads((output / "user_study_key.json").read_text())


def test_the_key_tells_what_the_page_shows_and_the_page_does_not(full):
    page = (full[0] / "user_study.html").read_text(encoding="utf-8")
    content, key = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1)), study(full[0])
    assert content["study"] == key["study"]
    assert len(content["pairs"]) == len(key["pairs"]) == 12
    for pair in content["pairs"]:
        row = key["pairs"][pair["id"]]
        assert pair["prompt"] == row["prompt"]
        for side, name in zip(("left", "right"), row["images"], strict=True):
            assert name.startswith(f"{row[side]}/")
            np.testing.assert_array_equal(decode(pair[side])[1], np.asarray(Image.open(full[0].parent / name)))
    assert not any(word in page for word in ("bright", "other/", '"base"', str(full[0]), ".png"))
    assert (page.count("</script>"), page.count("<!--"), page.count("innerHTML")) == (2, 0, 0)
    assert not re.search(r"https?://|@import|url\(", page)


def save_votes(path: Path, key: dict, rater: str, answer) -> str:
    """A file as the page saves it: answer(a row of the key) on realism, and "tie" on alignment."""
    votes = [{"pair": name, "realism": answer(pair), "alignment": "tie"} for name, pair in key["pairs"].items()]
    path.write_text(json.dumps({"study": key["study"], "rater": rater, "votes": votes}))
    return str(path)


def test_votes_are_joined_with_the_key_and_stand_in_results(full, tmp_path):
    output = shutil.copytree(full[0], full[0].parent / "voted")
    key, table = study(output), pd.read_csv(output / "per_image.csv")
    files = [save_votes(tmp_path / "a.json", key, "Ann", lambda pair: "right" if pair["left"] == "base" else "left")]
    files += [save_votes(tmp_path / "b.json", key, "Bo", lambda pair: "left" if pair["left"] == "bright" else "tie")]
    line = ["--from_csv", str(output / "per_image.csv"), "--output_dir", str(output)]
    found, _ = start([*line, "--votes", *files])
    rows = {(row["model"], row["metric"]): row for row in found["results"]}
    assert [rows["bright", "votes: realism"][name] for name in ("win_rate", "n", "tuned")] == [1, 6, 0.875]
    assert [rows["other", "votes: alignment"][name] for name in ("win_rate", "base", "tuned")] == [0.5, 0.5, 0.5]
    assert [row["n"] for row in found["votes"] if (row["question"], row["scorer"]) == ("realism", EVIL)] == [12]
    assert EVIL in str(cells((output / "report.html").read_text(encoding="utf-8"), "Votes"))
    again, _ = start([*line, "--user_study", "5"])  # votes of an earlier run stay, and so does its key
    assert [again["results"], again["votes"]] == [found["results"], found["votes"]]
    assert json.loads((output / f"user_study_key_{key['study']}.json").read_text()) == key != study(output)
    with pytest.raises(ev.UserError, match=f"votes on study {key['study']}, and the key in"):
        ev.read_votes(files, output, table)
    with pytest.raises(ev.UserError, match="was drawn anew since people voted"):
        ev.read_votes(files, full[0], table.assign(content="anew"))
    save_votes(tmp_path / "b.json", key, "Ann", lambda pair: "tie")
    with pytest.raises(ev.UserError, match=r"b.json and .*a.json have one rater, 'Ann'"):
        ev.read_votes(files, full[0], table)


ONE = {"pair": "1", "realism": "left"}


@pytest.mark.parametrize(("votes", "words"), [  # what a file holds, or its votes; words of the one line
    ("{ 1}", "--votes"), ("[]", "is not a file of votes"), ([1], "is not a file of votes"),
    ([ONE | {"pair": "77"}], "pair '77': the study has no such pair"),
    ([ONE | {"realism": "both"}], "pair '1': realism is 'both', not one of left, tie, right"),
    ([ONE, ONE], "pair '1': it is there twice"), ([{"pair": "1"}], "no answer on an image of this run"),
])  # fmt: skip
def test_bad_votes_are_refused_in_one_line(full, tmp_path, votes, words):
    content = json.dumps({"study": study(full[0])["study"], "rater": "Ann", "votes": votes})
    (tmp_path / "a.json").write_text(votes if isinstance(votes, str) else content)
    with pytest.raises(ev.UserError, match=f"^[^\n]*{words}[^\n]*$"):
        ev.read_votes([str(tmp_path / "a.json")], full[0], pd.read_csv(full[0] / "per_image.csv"))


def test_agreement_is_of_raters_and_of_scorers_with_most_of_them():
    images = pd.DataFrame({"image_id": [f"{side}{p}" for side in "bt" for p in range(4)]})
    images["eye"], images["blind"] = [0, 0, 0, 0, 1, 1, -1, 0], [1.0] * 4 + [0, 0, 0, NAN]
    rows = [(0, 0, 1), (1, 0, 1), (2, 0, 0), (0, 1, 1), (0, 2, 0), (1, 2, 0), (0, 3, 0.5), (1, 3, 1)]
    votes = pd.DataFrame(rows, columns=["rater", "prompt_id", "share"]).assign(question="realism")
    votes = votes.assign(answer=votes.share.map({1: "left", 0: "right", 0.5: "tie"}), pair=votes.prompt_id)
    votes = votes.assign(base_image="b" + votes.pair.astype(str), tuned_image="t" + votes.pair.astype(str))
    found = ev.agreement(votes, images, ["eye", "blind"]).set_index("scorer")
    counts = np.array([[2, 0, 1], [1, 0, 0], [0, 0, 2], [1, 1, 0]])
    assert found.alpha.tolist() == [ev.krippendorff_alpha(counts)] * 2
    assert found.n.to_dict() == {"eye": 4, "blind": 3}
    assert found.win_rate.tolist() == pytest.approx([3.5 / 4, 1 / 3])
