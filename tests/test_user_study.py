# SPDX-License-Identifier: Apache-2.0
"""The user study of eval_human.py: its statistics, its blind page in a real browser, its votes and what they say."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_human as ev


HOSTILE = '</script><img src=x onerror="document.title=1"> "it\'s" & <!-- \\ @DATA@ für 犬 🐕'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=60000"]
NAN = math.nan
TEXTS = [HOSTILE, *(f"prompt number {p}" for p in range(1, 8))]


def paint(path: Path, value: int, size: tuple[int, int] = (64, 64)) -> Path:
    """An image of one grey, whose file tells who drew it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (value, value, value))
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("drawn_by", path.parent.name)
        image.save(path, pnginfo=info)
    else:
        image.save(path, comment=path.parent.name.encode(), quality=80)
    return path


def make_study(folder: Path, count: int = 6, seed: int = 0, **models: tuple[int, int]) -> dict:
    """A study of {model: size of its images}, one image per prompt, base dark and all others bright; its key."""
    models = {"base": (64, 64)} | (models or {"zebra": (64, 64)})
    paths = {
        name: [
            paint(folder / "images" / name / f"{p}.png", (20 if name == "base" else 200) + p, size)
            for p in range(len(TEXTS))
        ]
        for name, size in models.items()
    }
    ev.write_user_study(folder, count, TEXTS, paths, [(p, 0) for p in range(len(TEXTS))], seed)
    return json.loads((folder / "user_study_key.json").read_text())


def page_data(folder: Path) -> dict:
    page = (folder / "user_study.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def decode(uri: str) -> tuple[str, bytes, Image.Image]:
    """The kind, the bytes and the image of a data URI."""
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    data = base64.b64decode(data)
    return kind, data, Image.open(io.BytesIO(data))


def make_vote(answers: str, **changes: object) -> dict:
    """A row of read_votes by three letters: tuned side (l, r), answer to realism and to alignment (l, t, r, -)."""
    words = {"l": "left", "r": "right", "t": "tie", "-": None}
    side, realism, alignment = (words[letter] for letter in answers)
    row = {"rater": "Ann", "pair": "1", "prompt_id": 0, "index": 0, "model": "dpo", "tuned_side": side}
    return row | {"realism": realism, "alignment": alignment, "seconds": 4.0} | changes


# ---- Statistics -----------------------------------------------------------------------------------------------------


def answer_counts(*raters: str) -> np.ndarray:
    """Counts (U, C) of the answers of raters, a letter per unit, "." where none was given."""
    kinds = sorted(set("".join(raters)) - {"."})
    return np.array([[column.count(kind) for kind in kinds] for column in zip(*raters, strict=True)])


# Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011: examples A, B and C.
PUBLISHED = [
    (0.095, ["0100000010", "1110010000"]),
    (0.692, ["aabbdcccedda", "babbbccceddd"]),
    (0.743, ["123321412...", "1233224125.3", ".333234225 1.".replace(" ", ""), "1233244125 1.".replace(" ", "")]),
]


@pytest.mark.parametrize(("alpha", "raters"), PUBLISHED)
def test_krippendorff_alpha_of_the_published_examples(alpha, raters):
    assert ev.krippendorff_alpha(answer_counts(*raters)) == pytest.approx(alpha, abs=5e-4)


def test_krippendorff_alpha_at_its_ends():
    assert ev.krippendorff_alpha(answer_counts("lrlt", "lrlt")) == 1
    assert np.isnan(ev.krippendorff_alpha(answer_counts("llll", "llll")))  # nothing to tell apart
    assert np.isnan(ev.krippendorff_alpha(answer_counts("lrt..", "...lr")))  # no two raters met
    rng = np.random.default_rng(0)
    dice = rng.multinomial(1, [0.4, 0.2, 0.4], size=(4000, 3)).sum(axis=1)
    assert abs(ev.krippendorff_alpha(dice)) < 0.02


def test_rater_agreement_is_the_share_of_equal_couples():
    assert ev.rater_agreement(answer_counts("lrlt", "lrrr")) == 0.5
    assert ev.rater_agreement(answer_counts("l", "l", "r")) == pytest.approx(1 / 3)
    assert ev.rater_agreement(answer_counts("lr", "l.")) == 1
    assert np.isnan(ev.rater_agreement(answer_counts("lr")))


def test_a_scorer_agrees_by_its_sign_with_the_majority():
    people = np.array([1, 0.6, 0.2, 0.5, NAN, 0.9, 0.1, 1, 1])
    base = np.array([1, 2, 1, 1, 1, 3, 3, NAN, -np.inf])
    tuned = np.array([2, 1, 2, 2, 2, 3, 3, 1, 0])
    np.testing.assert_array_equal(ev.agrees_with_people(people, base, tuned), [1, 0, 0, NAN, NAN, 0.5, 0.5, NAN, 1])


# ---- The choice of pairs --------------------------------------------------------------------------------------------


def choose(available: dict[str, list[int]], prompt_ids: list[int], count: int, seed: int = 0) -> list:
    return ev.choose_pairs(available, np.array(prompt_ids), count, np.random.default_rng(seed))


def tuned_of(pair: tuple[str, str, int]) -> str:
    return pair[1] if pair[0] == "base" else pair[0]


@pytest.mark.parametrize("seed", range(5))
def test_models_share_the_pairs_and_every_prompt_comes_before_one_comes_twice(seed):
    prompt_ids, rows = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6], list(range(10))
    pairs = choose({"a": rows, "b": rows, "c": rows}, prompt_ids, 7, seed)
    assert sorted(prompt_ids[row] for *_, row in pairs) == list(range(7))
    assert Counter(map(tuned_of, pairs)) == {"a": 3, "b": 2, "c": 2}
    assert all("base" in pair for pair in pairs)
    pairs = choose({"a": rows, "b": rows, "c": rows}, prompt_ids, 10, seed)
    assert sorted(row for *_, row in pairs) == rows  # no image of base twice
    pairs = choose({"a": rows, "b": rows}, prompt_ids, 99, seed)
    assert Counter((tuned_of(pair), pair[2]) for pair in pairs) == {(name, row): 1 for name in "ab" for row in rows}


@pytest.mark.parametrize("seed", range(5))
def test_sides_are_a_balanced_coin(seed):
    rows = list(range(40))
    pairs = choose({"a": rows, "b": rows}, rows, 40, seed)
    assert Counter((tuned_of(pair), pair[0] == "base") for pair in pairs) == {
        (name, left): 10 for name in "ab" for left in (True, False)
    }
    sides = [pair[0] == "base" for pair in pairs]
    assert sides != [pair[0] == "base" for pair in choose({"a": rows, "b": rows}, rows, 40, seed + 1)]
    assert 8 < sum(a != b for a, b in pairwise(sides)) < 32  # not in turns
    assert 8 < sum(tuned_of(a) != tuned_of(b) for a, b in pairwise(pairs)) < 32  # nor model by model


def test_only_rows_with_both_images_are_chosen():
    assert sorted(pair[2] for pair in choose({"a": [1, 4]}, [0, 1, 2, 3, 4], 5)) == [1, 4]
    assert choose({"a": []}, [0, 1], 5) == []


# ---- The page and its key -------------------------------------------------------------------------------------------


def test_the_key_tells_what_the_page_shows(tmp_path):
    key, content = make_study(tmp_path, count=8), page_data(tmp_path)
    assert content["study"] == key["study"]
    assert content["questions"] == ev.QUESTIONS
    for pair in content["pairs"]:
        row = key["pairs"][pair["id"]]
        assert pair["prompt"] == row["prompt"]
        for side in ("left", "right"):
            value = (20 if row[side] == "base" else 200) + row["prompt_id"]
            assert decode(pair[side])[2].getpixel((5, 5)) == (value,) * 3
    assert sorted(row["prompt_id"] for row in key["pairs"].values()) == list(range(8))


@pytest.mark.parametrize(("size", "kind"), [((64, 64), "png"), ((240, 320), "jpeg")])
def test_the_page_is_blind(tmp_path, size, kind):
    make_study(tmp_path, 8, base=size, zebra=size, quagga=size)
    page = (tmp_path / "user_study.html").read_text()
    content = page_data(tmp_path)
    assert content.keys() == {"study", "questions", "pairs"}
    for word in ("zebra", "quagga", '"base"', "base/", str(tmp_path), "images/", ".png", "drawn_by", "score", "seed"):
        assert word not in page, word
    for pair in content["pairs"]:
        assert pair.keys() == {"id", "prompt", "left", "right", "shape", "tiny"}
        sides = [decode(pair[side]) for side in ("left", "right")]
        assert [(one, image.size, image.mode) for one, _, image in sides] == [(kind, size, "RGB")] * 2
        assert not any(name in data for _, data, _ in sides for name in (b"zebra", b"quagga", b"drawn_by", b"base"))
        assert sides[0][2].info == sides[1][2].info


def test_a_pair_has_one_size_and_one_codec(tmp_path):
    paths = [
        paint(tmp_path / "zebra" / "a.png", 9, (1200, 1600)),
        paint(tmp_path / "quagga" / "b.jpg", 9, (768, 1024)),
    ]
    pair = ev.blind_pair(*paths)
    sides = [decode(pair[side]) for side in ("left", "right")]
    assert [(kind, image.size) for kind, _, image in sides] == [("jpeg", (576, 768))] * 2
    assert sides[0][2].quantization == sides[1][2].quantization
    assert not any(name in data for _, data, _ in sides for name in (b"zebra", b"quagga"))
    assert (pair["shape"], pair["tiny"]) == (0.75, False)
    small = ev.blind_pair(paint(tmp_path / "c.png", 9, (300, 200)), paths[0])
    assert [decode(small[side])[2].size for side in ("left", "right")] == [(300, 200), (225, 300)]


def test_the_same_study_is_written_again_and_another_has_another_id(tmp_path):
    first = make_study(tmp_path / "a")
    page = (tmp_path / "a" / "user_study.html").read_bytes()
    assert make_study(tmp_path / "a") == first
    assert (tmp_path / "a" / "user_study.html").read_bytes() == page
    assert not list((tmp_path / "a").glob("user_study_key_*"))
    second = make_study(tmp_path / "a", seed=1)
    assert second["study"] != first["study"]
    kept = tmp_path / "a" / f"user_study_key_{first['study']}.json"
    assert json.loads(kept.read_text()) == first
    with pytest.raises(ev.UserError, match=rf"votes on study .*{kept.name} is its key: put it back under that name"):
        ev.read_votes([write_votes(tmp_path / "votes.json", first["study"])], tmp_path / "a", TEXTS)


def test_fewer_pairs_than_asked_and_none(tmp_path):
    base = [paint(tmp_path / "base" / f"{p}.png", 9) for p in range(3)]
    paths, plan = {"base": base, "zebra": [None, *base[1:]]}, [(p, 0) for p in range(3)]
    assert ev.write_user_study(tmp_path, 50, ["a", "b", "c"], paths, plan, 0) == 2
    assert len(page_data(tmp_path)["pairs"]) == 2
    with pytest.raises(ev.UserError, match="no prompt has an image of base and one of a tuned model"):
        ev.write_user_study(tmp_path, 5, ["a", "b", "c"], paths | {"zebra": [None] * 3}, plan, 0)


def test_the_page_escapes_what_users_wrote_and_asks_no_network(tmp_path):
    make_study(tmp_path, count=8)
    page = (tmp_path / "user_study.html").read_text()
    assert HOSTILE in [pair["prompt"] for pair in page_data(tmp_path)["pairs"]]
    assert page.count("</script>") == ev.STUDY_PAGE.count("</script>") == 2
    assert page.count("<!--") == page.count("innerHTML") == 0
    assert not re.search(r"https?:|src=[\"']?//|@import|url\(", page)
    assert ev.STUDY_PAGE.count("\n") < 200


# ---- Votes ----------------------------------------------------------------------------------------------------------


def write_votes(path: Path, study: str, rater: str = "Ann", votes: list | None = None) -> str:
    votes = [{"pair": "1", "realism": "left", "alignment": "tie", "seconds": 2.5}] if votes is None else votes
    path.write_text(json.dumps({"study": study, "rater": rater, "votes": votes}))
    return str(path)


def test_votes_are_joined_with_the_key(tmp_path):
    key = make_study(tmp_path)
    votes = [{"pair": "2", "realism": "right"}, {"pair": "1", "realism": "left", "alignment": "tie", "seconds": 2.5}]
    files = [
        write_votes(tmp_path / "a.json", key["study"], "Ann", votes),
        write_votes(tmp_path / "b.json", key["study"], "Bo"),
    ]
    rows = ev.read_votes(files, tmp_path, TEXTS)
    assert [(row["rater"], row["pair"], row["realism"], row["alignment"], row["seconds"]) for row in rows] == [
        ("Ann", "2", "right", None, None),
        ("Ann", "1", "left", "tie", 2.5),
        ("Bo", "1", "left", "tie", 2.5),
    ]
    for row in rows:
        pair = key["pairs"][row["pair"]]
        assert (row["model"], pair[row["tuned_side"]]) == ("zebra", "zebra")
        assert (row["prompt_id"], row["index"]) == (pair["prompt_id"], 0)


def one_vote(**changes: object) -> list[dict]:
    return [{"pair": "1", "realism": "left", "alignment": "tie", "seconds": 1.0} | changes]


BAD_VOTES = {
    "no such file": (None, "cannot read .*a.json: No such file"),
    "not json": ("{\n 1}", "a.json, line 2: not json"),
    "not utf-8": (b"\xff{}", "cannot read .*a.json: not utf-8"),
    "a list": ("[]", "a.json holds a list in place of an object"),
    "metrics": ({"models": {}}, "a.json is not a file of votes"),
    "rows of numbers": ({"votes": [1]}, "a.json is not a file of votes"),
    "another study": (
        {"study": "feed"},
        "a.json: votes on study 'feed', and .*key.json is the key of '[0-9a-f]{16}': give",
    ),
    "unknown pair": ({"votes": one_vote(pair="77")}, "a.json, vote 1: the study has no pair '77'"),
    "pair of another kind": ({"votes": one_vote(pair=["1"])}, "a.json, vote 1: the study has no pair"),
    "a pair twice": ({"votes": one_vote() * 2}, "a.json, vote 2: a second vote on pair '1'"),
    "unknown answer": (
        {"votes": one_vote(alignment="both")},
        "vote 1: alignment is 'both', not one of left, tie, right",
    ),
    "answer of another kind": ({"votes": one_vote(realism=["left"])}, "vote 1: realism is .'left'., not one of"),
    "seconds": ({"votes": one_vote(seconds="long")}, "vote 1: seconds is 'long', not a number"),
    "no votes": ({"votes": []}, "no answers in .*a.json"),
    "no answers": ({"votes": [{"pair": "1"}]}, "no answers in .*a.json"),
}


@pytest.mark.parametrize("case", BAD_VOTES)
def test_bad_votes_are_refused_in_one_line(tmp_path, case):
    content, message = BAD_VOTES[case]
    study, path = make_study(tmp_path)["study"], tmp_path / "a.json"
    if isinstance(content, dict):
        whole = {"study": study, "rater": "Ann", "votes": one_vote()} | content
        content = json.dumps(content if case == "metrics" else whole)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ev.UserError, match=message) as caught:
        ev.read_votes([str(path)], tmp_path, TEXTS)
    assert "\n" not in str(caught.value)


def test_one_rater_in_two_files_is_refused(tmp_path):
    study = make_study(tmp_path)["study"]
    files = [write_votes(tmp_path / name, study) for name in ("early.json", "late.json")]
    with pytest.raises(
        ev.UserError, match=r"late.json: .*early.json holds votes of the same rater, 'Ann': keep the later"
    ):
        ev.read_votes(files, tmp_path, TEXTS)


def test_votes_need_the_key_and_its_prompts(tmp_path):
    study = make_study(tmp_path)["study"]
    file = write_votes(tmp_path / "a.json", study)
    assert len(ev.read_votes([file], tmp_path, TEXTS)) == 1
    for others in (TEXTS[::-1], TEXTS[:1]):
        with pytest.raises(ev.UserError, match="shows another prompt than now"):
            ev.read_votes([file], tmp_path, others)
    (tmp_path / "user_study_key.json").write_text("{}")
    with pytest.raises(ev.UserError, match=r"user_study_key.json is not the key of a user study"):
        ev.read_votes([file], tmp_path, TEXTS)
    (tmp_path / "user_study_key.json").unlink()
    with pytest.raises(ev.UserError, match=r"user_study_key.json is missing: --user_study writes it"):
        ev.read_votes([file], tmp_path, TEXTS)


# ---- What votes say -------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_unit_of_votes():
    votes = [
        make_vote("llt", rater=rater, pair="1", prompt_id=0) for rater in "abcdefgh"
    ]  # eight raters on one prompt
    votes += [make_vote("rlr", pair="2", prompt_id=1), make_vote("lt-", pair="3", prompt_id=2)]
    votes += [make_vote("rr-", pair="4", prompt_id=3), make_vote("rl-", pair="4", prompt_id=3, rater="b")]
    row = ev.compare_votes(votes, {}, [], [])["models"]["dpo"]["realism"]
    assert row["win_rate"] == np.mean([1, 0, 0.5, 0.5])
    assert (row["win"], row["tie"], row["lose"]) == (0.375, 0.25, 0.375)
    assert (row["prompts"], row["votes"], row["raters"]) == (4, 12, 9)
    assert row["interval"][0] < 0.5 < row["interval"][1]
    assert row["sign_test"] == 1
    alignment = ev.compare_votes(votes, {}, [], [])["models"]["dpo"]["alignment"]
    assert (alignment["win_rate"], alignment["prompts"], alignment["votes"]) == (0.75, 2, 9)


def test_a_model_that_always_wins_and_one_that_never_does():
    votes = [make_vote("lll" if p % 2 else "rrr", pair=str(p), prompt_id=p) for p in range(10)]
    votes += [make_vote("lrt", pair=f"x{p}", prompt_id=p, model="bad") for p in range(10)]
    models = ev.compare_votes(votes, {"base": {}, "bad": {}, "dpo": {}}, [], [])["models"]
    assert list(models) == ["bad", "dpo"]  # in the order of the run
    assert models["dpo"]["realism"]["win_rate"] == models["dpo"]["alignment"]["win_rate"] == 1
    assert models["dpo"]["realism"]["interval"] == [pytest.approx(0.025 ** (1 / 10)), 1]  # ten of ten
    assert models["dpo"]["realism"]["sign_test"] == 2 / 2**10
    assert models["dpo"]["realism"]["holm"] == 4 / 2**10
    assert models["bad"]["realism"]["win_rate"] == 0
    assert (models["bad"]["alignment"]["win_rate"], models["bad"]["alignment"]["tie"]) == (0.5, 1)
    assert models["bad"]["alignment"]["sign_test"] == 1


def test_raters_are_compared_by_what_they_saw():
    shown = {"a": "lrlt", "b": "lrrr"}
    votes = [
        make_vote(f"l{answer}-", rater=rater, pair=str(i), prompt_id=i)
        for rater, answers in shown.items()
        for i, answer in enumerate(answers)
    ]
    both = ev.compare_votes(votes, {}, [], [])["agreement"]
    assert both["realism"]["agreement"] == 0.5
    assert both["realism"]["alpha"] == pytest.approx(ev.krippendorff_alpha(answer_counts(*shown.values())))
    assert both["realism"]["left"] == pytest.approx(3 / 7)
    assert both["realism"]["pairs"] == 4
    assert both["alignment"] == {"pairs": 0, "agreement": None, "alpha": None, "left": None}
    alone = ev.compare_votes(votes[:4], {}, [], [])["agreement"]["realism"]
    assert (alone["agreement"], alone["alpha"], alone["left"]) == (None, None, 2 / 3)


def test_the_scorer_that_sees_what_people_see_is_named():
    plan = [(p, k) for p in range(6) for k in range(2)]
    votes = [make_vote("lll" if p < 4 else "lrr", pair=str(p), prompt_id=p, index=1) for p in range(6)]
    votes.append(make_vote("ltr", pair="0", prompt_id=0, index=1, rater="b"))  # 3/4 for tuned, then split in halves
    votes.append(make_vote("lll", pair="9", prompt_id=5, index=1, model="gone"))
    votes.append(make_vote("lll", pair="10", prompt_id=77, index=0))
    tuned = np.zeros(12)
    tuned[1::2] = [1, 1, 1, 1, -1, -1]  # as the people
    blind, half = np.where(np.arange(12) % 2, 0.0, 9.0), tuned.copy()
    half[[1, 3, 5]] = -1, NAN, 0
    values = {"base": dict.fromkeys(("eye", "blind", "half"), np.zeros(12)) | {"blind": blind}}
    values["dpo"] = {"eye": tuned, "blind": blind, "half": half}
    found = ev.compare_votes(votes, values, plan, ["blind", "half", "eye"])
    assert found["closest"] == {"realism": "eye", "alignment": "eye"}
    realism, alignment = found["scorers"]["realism"], found["scorers"]["alignment"]
    assert realism["eye"] == {"pairs": 6, "agreement": 1, "interval": [pytest.approx(0.025 ** (1 / 6)), 1]}
    assert (alignment["eye"]["pairs"], alignment["eye"]["agreement"]) == (5, 1)
    assert realism["blind"]["agreement"] == 0.5
    assert (realism["half"]["pairs"], realism["half"]["agreement"]) == (5, (0 + 0.5 + 1 + 1 + 1) / 5)
    low, high = realism["half"]["interval"]
    assert low < realism["half"]["agreement"] < high


def test_votes_are_plain_values():
    found = ev.compare_votes([make_vote("ll-")], {}, [], ["clip"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["closest"] == {"realism": None, "alignment": None}
    assert "alignment" not in found["models"]["dpo"]


def test_report_and_terminal_tell_what_people_say(capsys):
    votes = [make_vote("lll", pair=str(p), prompt_id=p, rater=r, model="<i>dpo") for p in range(10) for r in "ab"]
    votes += [make_vote("lrt", pair=f"x{p}", prompt_id=p, model="bad") for p in range(10)]
    values = {name: {"<b>clip": np.arange(10.0) * (name != "base") + 1} for name in ("base", "<i>dpo", "bad")}
    found = ev.compare_votes(votes, values, [(p, 0) for p in range(10)], ["<b>clip"])
    section = ev.votes_section(found)
    assert "<i>dpo" not in section
    assert "<b>clip" not in section
    sentences = [html.unescape(text) for text in re.findall(r'<p class="said \w+">(.*?)</p>', section)]
    assert sentences[0].startswith("People find <i>dpo more realistic than base: <i>dpo wins 100.0 % of 10 prompts")
    assert sentences[2].startswith("People find base more realistic than bad: bad wins 0.0 % of 10 prompts")
    assert sentences[3].startswith("People do not settle whether bad or base is closer to the text")
    assert re.findall(r'<p class="said (\w+)">', section) == ["good", "good", "bad", "plain"]
    assert "3 raters saw\n20 pairs, 4 seconds on each (median), blind" in section
    assert "Two raters agree 100.0 % of the time" in section
    assert section.count("<table") == section.count("</table>") == 2
    ev.print_votes(found)
    printed = capsys.readouterr().out
    assert "votes of 3 raters on 20 pairs" in printed
    assert "<b>clip agrees most with people on what is closer to the text: 95.0 % of 10 pairs [" in printed
    single = ev.compare_votes([make_vote("ll-")], {}, [], [])
    assert "their agreement is not known" in ev.votes_section(single)
    assert "Do the scorers" not in ev.votes_section(single)
    ev.print_votes(single)
    assert "votes of 1 rater on 1 pair\n" in capsys.readouterr().out


# ---- In a browser ---------------------------------------------------------------------------------------------------

PRESS = """
const wait = ms => new Promise(done => setTimeout(done, ms));
const press = (key, more) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
const told = [], tell = (...values) => told.push(...values);
const number = {left: "1", tie: "2", right: "3"};
async function vote(wanted, pairs) {  // answers so many pairs with the keys, as `wanted` says
  for (let i = 0; i < pairs; i++) for (const name of ["realism", "alignment"]) {
    await wait(400);
    press(number[wanted[shown.id][name]]);
  }
}
async function main() { @SCRIPT@ document.title = JSON.stringify(told); }
main();
"""


def browse(folder: Path, script: str) -> tuple[list, str]:
    """What `script` told in the page, and the document; profile and downloads stay in `folder` between two calls."""
    profile = folder / "profile"
    (profile / "Default").mkdir(parents=True, exist_ok=True)
    settings = {"download": {"default_directory": str(folder), "prompt_for_download": False}}
    if not (profile / "Default" / "Preferences").exists():
        (profile / "Default" / "Preferences").write_text(json.dumps(settings))
    copy = folder / "browse.html"
    script = PRESS.replace("@SCRIPT@", script)
    copy.write_text((folder / "user_study.html").read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()]
    before = shutil.copytree(profile, folder / "before", dirs_exist_ok=True)
    there = set(folder.iterdir())
    try:
        dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except subprocess.TimeoutExpired:  # headless Chromium hangs now and then: once more, as if it had not begun
        shutil.rmtree(profile)
        shutil.copytree(before, profile)
        for file in set(folder.iterdir()) - there:
            file.unlink()
        dom = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    shutil.rmtree(before)
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL).group(1))), dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_from_the_first_key_to_the_result(tmp_path):
    """Keys answer all pairs in two sittings; the saved file gives the win rates that the keys chose."""
    key = make_study(tmp_path, count=8)
    rng = np.random.default_rng(3)
    wanted = {pair: dict(zip(ev.QUESTIONS, rng.choice(ev.ANSWERS, 2).tolist(), strict=True)) for pair in key["pairs"]}
    first = """
      press("1"); tell(state.at);  // not begun: keys are for the name
      $("rater").value = " Ann/<犬> "; $("form").requestSubmit();
      const wanted = @WANTED@, order = state.order.join();
      await vote(wanted, 3);
      press("1"); tell(state.at);  // too early: meant for the pair before
      await wait(400); press("1", {repeat: true}); press("1", {ctrlKey: true}); tell(state.at);
      press(number[wanted[shown.id].realism]);
      document.querySelector("header .save").click(); await wait(400);
      tell(order, $("place").textContent, $("said").textContent, $("told").textContent);
    """.replace("@WANTED@", json.dumps(wanted))
    (begun, early, held, order, place, said, told), _ = browse(tmp_path, first)
    assert (begun, early, held, place) == (-1, 6, 6, "3 / 8")
    assert sorted(order.split(",")) == sorted(key["pairs"])
    assert order.split(",") != list(key["pairs"])  # but for one study in 40,320
    assert said == "Pair 4: Which image fits the text better?"
    assert told == "4 of 8 pairs are in votes-Ann_犬_.json."
    file = tmp_path / "votes-Ann_犬_.json"
    partly = ev.read_votes([str(file)], tmp_path, TEXTS)
    assert Counter(row["alignment"] is None for row in partly) == {False: 3, True: 1}
    file.unlink()

    second = """
      const wanted = @WANTED@;
      tell(state.order.join(), state.at, $("start").hidden);
      await wait(400); press("Backspace"); press("3"); tell(state.at);  // another answer, and then forward again
      press("ArrowLeft"); press(number[wanted[shown.id].realism]); press(number[wanted[shown.id].alignment]);
      await vote(wanted, 4); tell($("end").hidden, state.at);
      press("ArrowLeft"); press("ArrowRight"); press("1"); tell(state.at, $("place").textContent);
      document.querySelector("#end .save").click(); await wait(400);
    """.replace("@WANTED@", json.dumps(wanted))
    told, dom = browse(tmp_path, second)
    assert told == [order, 7, True, 7, False, 16, 16, "8 / 8"]
    saved = json.loads(file.read_text())
    assert (saved["study"], saved["rater"]) == (key["study"], "Ann/<犬>")
    assert {vote["pair"]: {q: vote[q] for q in ev.QUESTIONS} for vote in saved["votes"]} == wanted
    assert all(0.3 < vote["seconds"] < 5 for vote in saved["votes"])

    found = ev.compare_votes(ev.read_votes([str(file)], tmp_path, TEXTS), {}, [], [])
    for question in ev.QUESTIONS:
        worth = [
            0.5 if answers[question] == "tie" else float(key["pairs"][pair][answers[question]] == "zebra")
            for pair, answers in wanted.items()
        ]
        assert found["models"]["zebra"][question]["win_rate"] == pytest.approx(np.mean(worth))
        assert found["models"]["zebra"][question]["prompts"] == 8
    assert "zebra" not in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_mouse_enlarged_images_and_hostile_prompts(tmp_path):
    key = make_study(tmp_path, count=8)
    hostile = next(pair for pair, row in key["pairs"].items() if row["prompt"] == HOSTILE)
    script = """
      $("form").requestSubmit();
      tell(/^rater-\\w+$/.test(state.rater), document.activeElement.id);
      go(names.length * state.order.indexOf("@PAIR@")); await wait(400);
      tell($("prompt").textContent, $("prompt").children.length, document.images.length);
      const [realism, alignment] = document.querySelectorAll("fieldset");
      const at = state.at;
      alignment.querySelector("[value=tie]").click(); tell(state.at - at);  // the second question first
      tell(alignment.querySelector("[aria-pressed=true]").textContent, realism.className);
      $("right").click(); tell(large.open, view.alt, label.textContent); view.click(); tell(view.alt);
      press("1"); press("ArrowRight"); tell(view.alt, state.at - at);
      large.lastChild.click(); tell(large.open);
      realism.querySelector("[value=left]").click(); tell(state.at - at, voteOf(pairAt(at)));
    """.replace("@PAIR@", hostile)
    told, _ = browse(tmp_path, script)
    assert told[:5] == [True, "ask", HOSTILE, 0, 3]
    assert told[5:8] == [0, "No difference", "now"]
    assert told[8:12] == [True, "Right image", "Right", "Left image"]
    assert told[12:15] == ["Right image", 0, False]
    assert told[15] == 2
    assert {name: told[16][name] for name in ev.QUESTIONS} == {"realism": "left", "alignment": "tie"}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_next_rater_begins_anew_on_the_same_computer(tmp_path):
    make_study(tmp_path)
    script = """
      if (sessionStorage.visits) {
        tell(sessionStorage.visits, state.at, state.rater, Object.keys(state.votes).length);
      } else {
        $("rater").value = "Ann"; $("form").requestSubmit(); await wait(400); press("1");
        sessionStorage.visits = JSON.stringify([state.at, JSON.parse(localStorage.getItem(study)).rater]);
        confirm = () => false; $("other").click(); await wait(400);
        confirm = () => true; $("other").click(); await wait(4000);
      }
    """
    told, _ = browse(tmp_path, script)
    assert told == ['[1,"Ann"]', -1, "", 0]
