# SPDX-License-Identifier: Apache-2.0
"""What eval_human.py shows of a finished comparison: report.html, model_card.md, win_rates.png, grid.png."""

import base64
import copy
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image, ImageColor


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_human as ev


HOSTILE = (
    '</style></title><script>document.title="broken"</script><img src=x onerror=alert(1)> "a|b" & *c* `d`\nfür 犬'
)
PROMPTS = [f"person number {p} waves" for p in range(12)]
NAN = math.nan
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=2000"]
CHROMIUM_FLAGS += ["--hide-scrollbars"]


# ---- A record ------------------------------------------------------------------------------------------------------


def metric(role: str, rate: float, **changes: object) -> dict:
    """A metric as compare() gives it, with an interval of 0.1 around the win rate."""
    shares = {"win": rate - 0.02, "tie": 0.04, "lose": 0.98 - rate}
    found = {"role": role, "prompts": 12, "win_rate": rate, "interval": (rate - 0.05, rate + 0.05), **shares}
    found |= {"base": 20.125, "tuned": 20.625, "difference": 0.5, "difference_interval": (0.4, 0.6)}
    found |= {"vetoed": [0.0, 0.0]}
    return found | {"sign_test": 0.01, "wilcoxon": 0.01, "holm": 0.0123} | changes


def colour(shift: float, latents: bool = True) -> dict:
    """A colour comparison as compare_colour() gives it."""
    found = {key: {"base": 50.0, "tuned": 51.5, "difference": 1.5, "interval": (1.1, 1.9)} for key in ev.COLOURS}
    found["saturation"] |= {"difference": -0.02791, "interval": (-0.03052, -0.02541)}
    moved = {"value": shift, "interval": (shift - 0.5, shift + 0.5)}
    found |= dict.fromkeys(("delta_e", "delta_e_prompts", "hue_distance", "hue_shift"), moved)
    return found | ({"latent_shift": moved, "latent_channels": [moved] * 4} if latents else {})


def tuned_model(judge: float, training: float, **changes: object) -> dict:
    """What conclude() finds of a tuned model, without photos and groups."""
    metrics = {"judge": metric("held-out", judge), "pickscore": metric("training", training)}
    metrics |= {"diversity": metric("diversity", 0.2), "face": metric("identity", 0.55)}
    said = [
        ("good", f"It wins {100 * judge:.0f} % by judge."),
        ("bad", "Looks like reward hacking: the scorer rises."),
    ]
    found = {"metrics": metrics, "colour": colour(3.21), "realism": {}, "groups": {}, "checkpoint": None}
    return found | {"verdict": said} | changes


def paper(**known: float) -> dict:
    """A model's row of paper_rows()."""
    return dict.fromkeys(ev.PAPER_COLUMNS) | {name.replace("_", "-"): value for name, value in known.items()}


def minimal_record() -> dict:
    """One model, one scorer, nothing that is optional, and values that are not known."""
    lone = metric("held-out", 0.5, win_rate=NAN, interval=(NAN, NAN), base=None, tuned=NAN, holm=NAN)
    found = {"metrics": {"judge": lone}, "colour": colour(NAN, latents=False), "verdict": [("plain", "x.")]}
    return {
        "settings": vars(ev.build_parser().parse_args([])) | {"prompts": "people.txt"},
        "prompts": 12,
        "images": {"base": 12, "dpo": 12},
        "drawn": ["base", "dpo"],
        "training_scorers": ["pickscore"],
        "caveats": [],
        "models": {"dpo": tuned_model(0.5, 0.5) | found},
        "paper": {"base": paper(ATHEC=31.5), "dpo": paper(ATHEC=32.5, Hue=NAN)},
    }


def full_record() -> dict:
    """Three checkpoints of a run, and all parts that a record can have."""
    points = {"dpo-20": (20, 0.66, 0.7), "dpo-40": (40, 0.74, 0.8), "dpo": (80, 0.62, 0.93)}
    models = {
        name: tuned_model(judge, training, checkpoint={"of": "dpo", "step": step})
        for name, (step, judge, training) in points.items()
    }
    for model in models.values():
        model["groups"] = {"framing": {name: {"prompts": 4, "metrics": {"judge": metric("", rate)}} for name, rate in
                                       (("close-up", 0.81), ("full body", 0.31), ("waist up", 0.61))}}  # fmt: skip
        model["groups"]["framing"]["unknown"] = {"prompts": 0, "metrics": {"judge": metric("", NAN)}}
        model["realism"] = {"KD": {"base": 1.25, "tuned": 0.75, "difference": -0.5, "interval": (-0.61, -0.39)}}
    names = ["base", *models]
    record = minimal_record() | {"models": models, "caveats": ["Only 12 prompts."]}
    record |= {"images": dict.fromkeys(names, 12), "drawn": names}
    record["settings"] |= {"pretrained_model_name_or_path": "/secret/sd15", "seed": 3, "report_rows": 4}
    record["paper"] = dict.fromkeys(names, paper(P_Score=21.73, Hue=27.94))
    distance = {"floor": 0.03125, "models": dict.fromkeys(names, 0.75), "note": "Biased below 2048 images."}
    record["realism"] = {"photos": 777, "images": 12, "distances": {"KD": distance}}
    photo = {"photos": 61.25, "model": 58.5, "difference": -2.75, "interval": (-3.5, -2.0)}
    moved = {key: {"value": 4.875, "interval": (4.0, 5.5)} for key in ("delta_e", "hue_shift")}
    record["photos_colour"] = {name: moved | dict.fromkeys(ev.COLOURS, photo) for name in names}
    face = {"cosine": 0.6125, "recognised": 0.875, "no_face": 0.0625, "interval": (0.5, 0.7)}
    record["identity"] = dict.fromkeys(names, face)
    return record


def make_means(record: dict) -> dict[str, dict[str, np.ndarray]]:
    """Per-prompt means in which the tuned model loses most on prompt 3, then 7, and wins most on prompt 5."""
    gains = np.array([1, 2, 3, -9, 4, 9, 5, -8, 6, 7, 8, 0], dtype=float)
    rows = np.arange(12.0)
    base = {"judge": 30 + rows, "pickscore": rows, "hue": 30 * rows, "a": rows, "b": -rows, "diversity": rows}
    base |= {"face": rows / 12} | dict.fromkeys(("red", "green", "blue"), 20 * rows)
    return {"base": base, **{name: base | {"judge": base["judge"] + gains} for name in record["models"]}}


def make_pictures(folder: Path, names: list[str], size: tuple[int, int] = (32, 48)) -> dict[str, list[Path | None]]:
    pictures = {}
    for i, name in enumerate(names):
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        pictures[name] = [folder / "images" / name / f"{p:05d} #0.png" for p in range(12)]
        for p, path in enumerate(pictures[name]):
            Image.new("RGB", size, (60 * i, 20 * p, 90)).save(path)
    return pictures


def write(folder: Path, record: dict, prompts: list[str] = PROMPTS) -> str:
    """report.html of the record, with all of its images; returns the page."""
    pictures = make_pictures(folder, ["base", *record["models"]])
    ev.write_report(folder / "report.html", record, prompts, make_means(record), pictures)
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def headings(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)]


def section(page: str, title: str) -> str:
    return re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", page, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("report")
    return folder, write(folder, full_record())


# ---- The page ------------------------------------------------------------------------------------------------------


def test_a_full_record_shows_every_part_in_order(full):
    parts = ["All models", "Win rates", "Over training", "Groups of prompts", "The paper's names", "Realism"]
    assert headings(full[1]) == [*parts, "Colour", "Identity", "Side by side", "How to read this", "Settings"]
    before = full[1][: full[1].index("<section")]
    assert re.findall(r'class="said (\w+)( head)?"', before) == [("good", " head"), ("bad", "")] * 3
    assert before.index("Looks like reward hacking") < before.index("Only 12 prompts.")
    assert re.findall(r'href="([\w.]+)"', before) == ["metrics.json", "per_image.csv", "model_card.md"]
    assert [a["href"][1:] for a in Page(before).all("a") if a["href"][0] == "#"] == re.findall(
        r'<section id="(.*?)"', full[1]
    )


def test_a_minimal_record_shows_no_empty_parts(tmp_path):
    page = write(tmp_path, minimal_record())
    assert headings(page) == [
        "Win rates", "The paper's names", "Colour", "Side by side", "How to read this", "Settings"
    ]  # fmt: skip
    assert "nan" not in Page(page).text
    assert "None" not in Page(page[: page.index("<h2>Settings")]).text
    assert section(page, "Colour").count("<svg") == 2  # plane and strips; no latents
    assert section(page, "Colour").count("<table") == 1  # none against photos
    assert cells(section(page, "The paper's names"))[1:] == [
        ["ATHEC sharpness: std of the Laplacian", "31.50", "32.50"]
    ]


def test_images_without_a_hue_have_figures_but_no_plots(tmp_path):
    record = minimal_record()
    means = make_means(record)
    means = dict.fromkeys(means, means["base"] | {"hue": np.full(12, NAN)})
    ev.write_report(tmp_path / "report.html", record, PROMPTS, means, dict.fromkeys(means, [None] * 12))
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in section(page, "Colour")
    assert section(page, "Colour").count('class="fact"') == 4
    assert page.count("no image") == 2 * 9  # the random rows; nobody wins or loses
    assert "Worst losses" not in page


def test_where_no_scorer_gives_a_value_diversity_leads(tmp_path):
    record = minimal_record()
    record["models"]["dpo"]["metrics"] = {"diversity": metric("diversity", 0.2)}
    shown = section(write(tmp_path, record), "Side by side")
    assert "Ordered by diversity" in shown
    assert "<table" not in shown  # it is a prompt's, not an image's


def test_latent_measures_may_be_missing(tmp_path):
    record = minimal_record() | {"models": {"dpo": tuned_model(0.6, 0.7, colour=colour(1.5, latents=False))}}
    shown = section(write(tmp_path, record), "Colour")
    assert "Latent" not in shown
    assert "latent channel" not in shown
    assert "1.50" in shown


def test_votes_come_from_their_own_function(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "votes_section", lambda votes: f"<p>{votes['raters']} raters</p>", raising=False)
    assert section(write(tmp_path, full_record() | {"votes": {"raters": 17}}), "Votes") == "<p>17 raters</p>"


def cells(table: str) -> list[list[str]]:
    """The text of a table's cells, plots left out."""
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [Page(cell).text.strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows
    ]


def test_numbers_are_the_record_s(full):
    record, page = full_record(), full[1]
    first = cells(section(page, "Win rates").split("</table>")[0])
    assert first[0][2:] == ["Win rate", "95 % interval", "base", "dpo-20", "p (Holm)", "p (Wilcoxon)"]
    figures = ["20.12", "20.62", "0.012", "0.01"]
    won = "won {} / tied 4 / lost {} %".format  # in sight: a tooltip is none on phones and on paper
    assert first[1] == ["judge", won(64, 32), "66.0 %", "[61.0, 71.0]", *figures]  # the held-out one leads
    assert first[2] == ["pickscore training scorer", won(68, 28), "70.0 %", "[65.0, 75.0]", *figures]
    assert [row[0] for row in first[3:]] == ["diversity", "face identity"]
    assert "<title>" not in section(page, "Win rates")
    summary = cells(section(page, "All models"))
    assert summary[3] == ["dpobetter, with a warning", won(60, 36), "62.0 %", "93.0 %", "20.0 %", "3.21"]
    assert [row[0] for row in summary[1:]] == [f"{name}better, with a warning" for name in record["models"]]
    assert cells(section(page, "The paper's names"))[1:] == [
        ["P-Score PickScore", *["21.73"] * 4],
        ["Hue distance to base's mean hue in degrees", *["27.94"] * 4],
    ]
    realism = cells(section(page, "Realism"))
    assert realism[1] == ["KD", "0.03125", "0.7500", *["0.7500-0.50 [-0.61, -0.39]"] * 3]
    assert 'class="win"' in section(page, "Realism")  # nearer to the photos
    assert "777 photos" in section(page, "Realism")
    assert "<b>KD</b>: Biased below 2048 images." in section(page, "Realism").split("</table>")[1]
    photos = cells(section(page, "Colour").rpartition("<h3>")[2])
    assert photos[1] == ["Delta E", ev.NONE, *["4.875[4.00, 5.50]"] * 4]
    assert photos[4] == ["lightness (Lab L*)", "61.25", *["58.50-2.8 [-3.5, -2.0]"] * 4]
    assert cells(section(page, "Identity"))[1] == ["base", "0.6125", "[0.500, 0.700]", "87.5 %", "6.2 %"]


def test_vetoed_shares_stand_below_the_scorer():
    metrics = {"people": metric("held-out", 0.6, vetoed=[0.25, 0.0]), "clip": metric("held-out", 0.6)}
    rows = cells(ev.win_rates("dpo", {"metrics": metrics}))
    assert [row[0] for row in rows[1:]] == ["peoplevetoed: base 25.0 %, dpo 0.0 %", "clip"]


def test_whiskers_stand_at_the_record_s_values():
    plot = ev.whisker(metric("held-out", 0.75), "held-out")
    assert re.search(r'cx="([\d.]+)%"', plot).group(1) == f"{2 + 96 * 0.75:.2f}"
    assert re.search(r'x1="([\d.]+)%" x2="([\d.]+)%" y1="12" y2="12" stroke-width', plot).groups() == (
        f"{2 + 96 * 0.7:.2f}",
        f"{2 + 96 * 0.8:.2f}",
    )
    assert [ev.tone(interval) for interval in ((0.51, 0.6), (0.4, 0.49), (0.5, 0.6), (NAN, NAN), (None, None))] == [
        "win", "lose", "even", "even", "even"
    ]  # fmt: skip
    assert ev.whisker(ev.UNKNOWN) == ""


def test_colours_of_win_rates_say_what_the_verdict_says():
    """An interval above one half is not yet a win where Holm's p is large, or not known."""
    for holm, kind in ((0.049, "win"), (0.05, "even"), (NAN, "even")):
        assert ev.whisker(metric("held-out", 0.6, holm=holm)).startswith(f'<svg class="whisker {kind} ')
    for holm, colour_name in ((0.049, "tuned"), (0.05, "base")):
        sheet = Image.new("RGB", (3520, 700), "white")
        ev.draw_rates(ev.ImageDraw.Draw(sheet), 0, "dpo", {"judge": metric("held-out", 0.6, holm=holm)})
        assert sheet.getpixel((1040 + round(0.6 * 1520), 344)) == ImageColor.getrgb(ev.LIGHT[colour_name])


def test_cells_name_their_columns_for_phones():
    shown = ev.table(["", ev.AXIS, "Win rate", html.escape('a "b"')], [("x", "", "1", "2")])
    assert re.findall(r"<td(.*?)>", shown) == ["", "", ' data-head="Win rate"', ' data-head="a &quot;b&quot;"']


def test_a_run_that_never_beats_base_says_so():
    steps = {step: tuned_model(judge, 0.6 + step / 100)["metrics"] for step, judge in ((10, 0.4), (20, 0.38))}
    assert ev.run_sentence(steps) == "<p>judge is never above base, pickscore is highest at step 20.</p>"
    steps[10]["judge"] = metric("held-out", 0.6)
    assert ev.run_sentence(steps).startswith("<p>judge is highest at step 10, pickscore is highest at step 20")


def test_groups_are_sorted_worst_first(full):
    rows = cells(section(full[1], "Groups of prompts").split("</table>")[0])
    assert [row[0] for row in rows] == ["framing", "full body", "waist up", "close-up", "unknown"]
    assert rows[1][:2] + rows[1][3:] == ["full body", "4", "31.0 %"]


def test_rows_are_worst_losses_best_wins_and_seeded(full):
    shown = section(full[1], "Side by side").split("<h3>")[1]
    worst, best, random = re.split(r"<h4>.*?</h4>", shown)[1:]
    number = re.compile(r"person number (\d+) waves")
    assert number.findall(worst) == ["3", "7"]
    assert number.findall(best) == ["5", "10", "9", "8"]
    assert len(set(number.findall(random))) == 4
    assert number.findall(random) == [str(p) for p in np.random.default_rng(3).permutation(12)[:4]]
    assert cells(worst)[1] == ["judge", "33.00", "24.00"]
    assert "<b>33.00</b>" in worst


def test_scores_are_called_means_only_where_a_prompt_has_several_images(tmp_path):
    told = "Scores are means over a prompt's images, of which the first is shown."
    assert told not in write(tmp_path, minimal_record())
    assert told in section(write(tmp_path, minimal_record() | {"images": {"base": 14, "dpo": 14}}), "Side by side")


def test_images_are_linked_to_their_files_and_small(full):
    folder, page = full
    parsed = Page(page)
    links = [unquote(a["href"]) for a in parsed.all("a") if a["href"].startswith("images")]
    assert len(links) == len(parsed.all("img")) == 3 * 2 * (2 + 4 + 4)
    assert all((folder / link).is_file() for link in links)
    uri = parsed.all("img")[0]
    assert uri["class"] == "small"
    with Image.open(io.BytesIO(base64.b64decode(uri["src"].partition(",")[2]))) as image:
        assert (image.format, image.size) == ("PNG", (32, 48))


def test_large_images_become_small_jpegs_and_files_elsewhere_keep_their_place(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    tile = ev.image_tile(tmp_path / "report", tmp_path / "photo.jpg")
    assert len(tile) < 100_000
    assert (tmp_path / "photo.jpg").as_uri() in tile
    data = re.search(r'src="data:image/jpeg;base64,(.*?)"', tile).group(1)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (256, 384)


def test_every_image_is_decoded_once(tmp_path, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(ev.Image, "open", lambda path, *rest: opened.append(path) or original(path, *rest))
    write(tmp_path, full_record())
    files = [path for path in opened if isinstance(path, Path)]
    assert len(files) == len(set(files)) > 0


def test_a_missing_image_is_a_grey_tile(tmp_path):
    record = full_record()
    pictures = make_pictures(tmp_path, ["base", *record["models"]])
    pictures["dpo"][3] = None
    ev.write_report(tmp_path / "report.html", record, PROMPTS, make_means(record), pictures)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<div class="none">no image</div>') == 1
    ev.write_grid(tmp_path / "grid.png", pictures | {"dpo": [None] * 12}, seed=0, columns=5)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 + 5 * 200, 4 * (288 + 34) + 8)
        assert grid.convert("RGB").getpixel((8 + 96, 3 * 322 + 34 + 96)) == (0xF5, 0xF7, 0xF7)


# ---- Over training -------------------------------------------------------------------------------------------------


def test_lines_over_training_stand_at_step_and_win_rate(full):
    plot = section(full[1], "Over training")
    lead = re.search(r'<g class="lead">(.*?)</g>', plot, re.DOTALL).group(1)
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', lead)]
    start = tuple(map(float, re.search(r'd="M([\d.]+) ([\d.]+)L', lead).groups()))
    (x0, y0), steps, rates = start, np.array([20, 40, 80]), np.array([0.66, 0.74, 0.62])
    x, y = np.array(dots).T
    np.testing.assert_allclose((x - x0) / (x[-1] - x0), steps / 80, atol=1e-3)  # step 0 is base
    np.testing.assert_allclose((y0 - y) / (y0 - y[0]), (rates - 0.5) / 0.16, atol=0.02)  # at one half
    assert "judge, step 40: 74.0 % [69.0, 79.0]" in lead
    assert re.findall(r'<g class="([\w-]+)">', plot)[::-1] == ["lead", "training", "diversity", "identity"]
    assert "judge is highest at step 40, pickscore is highest at step 80. Over-optimised: pickscore, which" in plot


def test_over_optimisation_is_said_only_where_it_is_seen():
    steps = {20: tuned_model(0.6, 0.7)["metrics"], 40: tuned_model(0.7, 0.8)["metrics"]}
    assert ev.run_sentence(steps) == "<p>judge is highest at step 40, pickscore is highest at step 40.</p>"


@pytest.mark.parametrize(
    "rates",
    [
        [(0.60, 0.70), (0.70, 0.80), (0.68, 0.93)],  # the leading metric only stands still
        [(0.60, 0.70), (0.74, 0.90), (0.62, 0.93)],  # the training scorer does
        [(0.60, 0.70), (0.74, 0.90), (0.76, 0.93), (0.75, 0.94)],
    ],
)
def test_differences_within_the_intervals_are_not_over_optimisation(rates):
    said = ev.run_sentence({20 * i: tuned_model(*pair)["metrics"] for i, pair in enumerate(rates, 1)})
    assert said.endswith("; within the intervals that is no difference.</p>")


def test_runs_need_two_checkpoints_of_one_run():
    models = full_record()["models"]
    runs = ev.training_runs(dict(reversed(models.items())))
    assert {run: list(steps) for run, steps in runs.items()} == {"dpo": [20, 40, 80]}
    assert ev.training_runs({"dpo": models["dpo"]}) == {}
    assert ev.training_runs({"a": tuned_model(0.5, 0.5), "b": tuned_model(0.5, 0.5)}) == {}


def test_the_leading_line_comes_first_though_the_first_checkpoint_lacks_it():
    full = tuned_model(0.6, 0.7)["metrics"]
    lines = ev.run_lines({20: {label: m for label, m in full.items() if label != "judge"}, 40: full})
    assert {label: [step for step, _ in line] for label, line in lines.items()} == {
        "judge": [40], "pickscore": [20, 40], "diversity": [20, 40], "face": [20, 40]
    }  # fmt: skip
    assert next(iter(lines)) == "judge"


def test_names_of_lines_never_overlap():
    placed = ev.spread([100, 102, 101, 250, 251], 15, limit=252)
    assert min(np.diff(sorted(placed))) >= 15
    assert max(placed) <= 252
    assert np.argsort(placed).tolist() == [0, 2, 1, 3, 4]
    assert ev.spread([10, 90], 15, limit=252) == [10, 90]


# ---- Safety --------------------------------------------------------------------------------------------------------


def rename(value: object) -> object:
    """The record with hostile text in all names and words that users write."""
    if isinstance(value, dict):
        words = {"judge", "dpo-40", "framing", "full body", "KD"}
        return {HOSTILE + key if key in words else key: rename(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(rename(item) if item not in ("good", "bad", "plain") else item for item in value)
    return value


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, str, dict]:
    record = rename(full_record())
    record["models"] = {name: copy.deepcopy(model) for name, model in record["models"].items()}
    for model in record["models"].values():
        model["verdict"] = [("good", f"It wins by {HOSTILE}."), ("bad", HOSTILE)]
        model["checkpoint"]["of"] = HOSTILE
    record["caveats"], record["settings"]["prompts"] = [HOSTILE], HOSTILE
    folder = tmp_path_factory.mktemp("hostile")
    pictures = dict.fromkeys(["base", *record["models"]], make_pictures(folder, ["base"])["base"])
    means = {name: {label.replace("judge", f"{HOSTILE}judge"): found for label, found in side.items()}
             for name, side in make_means(record).items()}  # fmt: skip
    ev.write_report(folder / "report.html", record, [HOSTILE + str(p) for p in range(12)], means, pictures)
    return folder, (folder / "report.html").read_text(encoding="utf-8"), record


def test_all_that_users_write_is_escaped(hostile):
    page = Page(hostile[1])
    assert {"script", "iframe", "link", "object"}.isdisjoint({tag for tag, _ in page.tags})
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert {image["src"].partition(",")[0] for image in page.all("img")} == {"data:image/png;base64"}
    assert hostile[1].count("</style>") == 1
    assert page.text.count(HOSTILE) > 50
    where = ("All models", "Win rates", "Over training", "Groups of prompts", "Realism", "Side by side", "Settings")
    assert [title for title in where if "broken" not in section(hostile[1], title)] == []


def test_the_page_loads_nothing(full, hostile):
    for page in (full[1], hostile[1]):
        found = [item.get("src") or item.get("href") for _, item in Page(page).tags]
        assert {re.match(r"data:image/png;base64,|images/|#|[\w.]+$", link) is None for link in found if link} == {
            False
        }
        assert "url(" not in page
        assert "@import" not in page
        assert "default-src 'none'" in page


def chromium(folder: Path, *flags: str) -> str:
    line = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={folder / 'chromium'}", *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser_nothing_runs_and_nothing_overflows_a_phone(hostile, full, tmp_path):
    """Both pages in frames of 390 px: their titles, how wide their contents are, how many tables are cut off."""
    frame = '<iframe src="{}" style="width:390px;height:800px;border:0"></iframe>'
    frames = "".join(frame.format((folder / "report.html").as_uri()) for folder in (full[0], hostile[0]))
    measure = """<script>onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
        ({contentDocument: d}) => [d.title, d.documentElement.scrollWidth, d.querySelectorAll("section").length,
        [...d.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length])) }
        </script>"""
    (tmp_path / "frames.html").write_text(f"<title>waiting</title>{frames}{measure}")
    page = chromium(tmp_path, "--allow-file-access-from-files", "--dump-dom", (tmp_path / "frames.html").as_uri())
    shown, strange = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", page, re.DOTALL).group(1)))
    assert shown == ["dpo-20, dpo-40, dpo against base", 390, len(headings(full[1])), 0]
    assert strange[0] == " ".join(f"dpo-20, {HOSTILE}dpo-40, dpo against base".split())
    assert strange[1:] == [390, len(headings(hostile[1])), 0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_it_can_be_printed(full, tmp_path):
    chromium(
        tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'a.pdf'}", (full[0] / "report.html").as_uri()
    )
    written = (tmp_path / "a.pdf").read_bytes()
    assert written.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", written)
    assert len(boxes) > 3
    assert {(round(float(w)), round(float(h))) for w, h in boxes} == {(595, 842)}  # A4 in points
    if shutil.which("pdftotext"):
        line = ["pdftotext", str(tmp_path / "a.pdf"), "-"]
        shown = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
        assert shown.count("waves") == 3 * (2 + 3 + 3)  # of three models at most three rows of each kind


# ---- The card and the picture --------------------------------------------------------------------------------------


def tables(card: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as rows of cells; a pipe counts where no backslash stands before it."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", card, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]


def test_the_card_has_all_and_its_tables_are_whole(tmp_path, hostile):
    ev.write_card(tmp_path / "model_card.md", full_record())
    card = (tmp_path / "model_card.md").read_text()
    assert card.startswith("## Evaluation\n\nCompared with the base model sd15 on 12 prompts of people.txt, 12 images")
    assert "sampler dpmsolver, 50 steps, guidance 5.0, seed 3" in card
    assert "secret" not in card
    assert card.count("**It wins") == 3
    assert (
        "| pickscore | training scorer | 93.0 % | \\[88.0, 98.0\\] | 20.12 | 20.62 | 0.012 | won 91 / tied 4" in card
    )
    assert "| judge | held-out | 62.0 % |" in card
    assert "| dpo | 21.73 | 27.94 |" in card
    assert "| KD | 0.03125 | 0.7500 | 0.7500 | 0.7500 | 0.7500 |" in card
    assert "- Only 12 prompts." in card
    assert "3.21 \\[2.71, 3.71\\]" in card
    ev.write_card(tmp_path / "hostile.md", hostile[2])
    strange = (tmp_path / "hostile.md").read_text()
    for text in (card, strange):
        assert len(tables(text)) == 6
        assert all(len({len(row) for row in table}) == 1 for table in tables(text))
    assert [len(table[0]) for table in tables(strange)] == [8, 8, 8, 3, 7, 6]
    assert "<" not in strange
    assert re.search(r"(?<!\\)[*`]", strange.replace("**", "")) is None


def test_a_minimal_card_has_no_empty_parts(tmp_path):
    ev.write_card(tmp_path / "model_card.md", minimal_record())
    card = (tmp_path / "model_card.md").read_text()
    assert re.findall(r"^#+ .*", card, re.MULTILINE) == [
        "## Evaluation",
        "### dpo against base",
        "### Under the paper's names",
        "### Colour shift from base, with 95 % intervals",
    ]
    assert "nan" not in card.lower().replace("– ", "")
    assert len(tables(card)) == 3


def columns_of(image: Image.Image, colour: str) -> np.ndarray:
    """The columns in which most pixels of a colour are, as a weighted mean per row band: x of all such pixels."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(pixels - wanted).max(axis=2) < 12)


def test_dots_of_win_rates_stand_at_their_rates(tmp_path):
    rates = {"far": 0.9, "near": 0.6, "low": 0.2}
    metrics = {label: metric("held-out", rate, interval=(rate - 0.01, rate + 0.01)) for label, rate in rates.items()}
    metrics["gone"] = metric("held-out", NAN, interval=(NAN, NAN))
    metrics["trained"] = metric("training", 0.75, interval=(0.7, 0.8))
    record = minimal_record() | {"models": {"dpo": {"metrics": metrics}}}
    ev.draw_win_rates(tmp_path / "win_rates.png", record)
    with Image.open(tmp_path / "win_rates.png") as image:
        assert image.width == 1760
        blue, red = columns_of(image, ev.LIGHT["tuned"]), columns_of(image, ev.LIGHT["bad"])
        half = columns_of(image, ev.LIGHT["base"])
    bands = np.split(blue, np.flatnonzero(np.diff(blue[:, 0]) > 5) + 1)
    far, near, trained = (band[:, 1].mean() for band in bands)
    middle, low = np.median(half[:, 1]), red[:, 1].mean()
    unit = (far - middle) / 0.4
    assert near == pytest.approx(middle + 0.1 * unit, abs=2)
    assert trained == pytest.approx(middle + 0.25 * unit, abs=2)
    assert low == pytest.approx(middle - 0.3 * unit, abs=2)
    sizes = [len(band) for band in bands]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    centre = np.abs(bands[2] - bands[2].mean(axis=0)).max(axis=1)
    assert centre.min() > 3  # the training scorer's dot is open
    assert np.abs(bands[0] - bands[0].mean(axis=0)).max(axis=1).min() < 1


# ---- Figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    zip(
        (0.683, 13.0, -0.0665, 0.0, 12345.6, None, NAN, -math.inf),
        ("0.6830", "13.00", "-0.06650", "0.000", "12,346", "–", "–", "-inf"),
        strict=True,
    ),
)
def test_numbers_have_four_digits(value, words):
    assert ev.number(value) == words


def test_differences_have_the_digits_that_their_interval_supports():
    assert ev.change(-0.10987, (-0.1271, -0.0922)) == "-0.110 [-0.127, -0.092]"
    assert ev.change(11.84, (2.1, 21.7)) == "+12 [2, 22]"
    assert ev.change(0.0, (0.0, 0.0)) == "+0.0 [0.0, 0.0]"
    assert ev.change(NAN, (0.0, 1.0)) == ev.change(1.0, (None, None)) == ev.NONE


def test_p_values_and_shares_that_are_not_known_are_dashes():
    assert [ev.p_value(p) for p in (0.0123, 3e-9, None, NAN)] == ["0.012", "below .0001", "–", "–"]
    assert [ev.percent(share) for share in (0.591, None, NAN)] == ["59.1 %", "–", "–"]
    assert ev.span((None, 1.0)) == ""


def test_one_is_said_without_a_plural():
    record = minimal_record() | {"prompts": 1, "images": {"base": 1, "dpo": 1}}
    assert "Compared with the base model on 1 prompt of people.txt, 1 image per model:" in ev.compared_sentence(record)
    assert "1 prompt, 1 image per model" in Page(ev.verdict_lines(record)).text
    found = {"photos": 1, "images": 1, "distances": {}}
    assert "1 image of each model against 1 photo." in ev.realism_section(found, {})


@pytest.mark.parametrize(
    ("tones", "words"),
    [
        ("good", "better"),
        ("bad", "worse"),
        ("good plain", "better"),
        ("good bad", "better, with a warning"),
        ("plain", "not told apart"),
    ],
)
def test_the_verdict_in_a_word(tones, words):
    assert ev.verdict_words([(tone, "x") for tone in tones.split()]) == words
