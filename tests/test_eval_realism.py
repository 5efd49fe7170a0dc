# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: distances to real photos, their intervals, and the features that they are taken of."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image, ImageOps

import eval_human as ev


CLIP = ev.WORLD / "scorer"
DISTANCES = [ev.frechet_distance, ev.kernel_distance, ev.cmmd]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pictures(count: int) -> list[Image.Image]:
    """Noise, portrait."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 80, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


# ---- Distances -----------------------------------------------------------------------------------------------------


def test_frechet_distance_of_a_shift_is_its_square():
    shift = np.array([3.0, -4, 0, 0, 0])
    x = normal(0, 50, 5)
    assert ev.frechet_distance(x + shift)(x) == pytest.approx(25)
    assert ev.frechet_distance(x)(x) == pytest.approx(0, abs=1e-12)
    assert ev.frechet_distance(x[:3] + shift)(x[:3]) == pytest.approx(25)  # fewer rows than columns
    assert ev.frechet_distance(normal(2, 40_000, 5) + shift)(normal(1, 40_000, 5)) == pytest.approx(25, rel=0.01)


def test_frechet_distance_of_a_scale():
    """N(0, 1) against N(0, s^2) is (1 - s)^2 in each of the D directions."""
    x = normal(0, 60, 4)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), (x - x.mean(axis=0)).T).T
    assert ev.frechet_distance(3 * white)(white) == pytest.approx(4 * 4)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 6), (7, 9, 30), (5, 80, 20), (80, 5, 20), (2, 2, 3)])
def test_frechet_distance_equals_the_matrix_square_root(n, m, d):
    x, y = normal(0, n, d) @ normal(5, d, d), normal(1, m, d) + 0.3
    cx, cy = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cx + 0j) @ cy @ scipy.linalg.sqrtm(cx + 0j)  # the symmetric form: stable without rank
    trace = np.sqrt(np.linalg.eigvalsh((root + root.conj().T) / 2).clip(min=0)).sum()
    expected = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * trace
    assert ev.frechet_distance(y)(x) == pytest.approx(expected, rel=1e-6)
    if min(n, m) > d:
        assert ev.frechet_distance(y)(x) == pytest.approx(
            expected + 2 * trace - 2 * np.trace(scipy.linalg.sqrtm(cx @ cy)).real, rel=1e-6
        )


def mmd_by_hand(kernel, x: np.ndarray, y: np.ndarray) -> float:
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


def test_kernel_distance_by_hand():
    x, y = normal(0, 9, 5), normal(1, 13, 5) + 0.2
    expected = mmd_by_hand(lambda a, b: (a @ b / 5 + 1) ** 3, x, y)
    assert ev.kernel_distance(y)(x) == pytest.approx(expected, rel=1e-12)
    assert ev.kernel_distance(x)(y.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sigma", [10.0, 0.5])
def test_cmmd_by_hand(sigma):
    x, y = unit(normal(0, 9, 5)), unit(normal(1, 13, 5) + 0.2)
    expected = 1000 * mmd_by_hand(lambda a, b: math.exp(-((a - b) @ (a - b)) / (2 * sigma**2)), x, y)
    assert ev.cmmd(y, sigma)(x) == pytest.approx(expected, rel=1e-6)
    if sigma == 10:
        assert ev.cmmd(y)(x) == ev.cmmd(y, sigma)(x)


def test_the_papers_cmmd_differs_by_the_diagonal():
    x, y = unit(normal(0, 40, 8)), unit(normal(1, 50, 8) + 0.2)

    def means(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(axis=-1) / 200).mean()

    biased = 1000 * (means(x, x) + means(y, y) - 2 * means(x, y))
    added = [
        1000 * (1 - ev.mean_kernel(lambda a, b: np.exp((a @ b.T - 1) / 100), s, s, False)) / len(s) for s in (x, y)
    ]
    assert ev.cmmd(y)(x) == pytest.approx(biased - sum(added), rel=1e-6)


def test_many_rows_are_taken_in_slices():
    x, y = normal(0, 2500, 3), normal(1, 1100, 3)
    kernel = (x @ x.T / 3 + 1) ** 3
    within = (kernel.sum() - np.trace(kernel)) / (2500 * 2499)
    other = (y @ y.T / 3 + 1) ** 3
    within += (other.sum() - np.trace(other)) / (1100 * 1099)
    assert ev.kernel_distance(y)(x) == pytest.approx(within - 2 * ((x @ y.T / 3 + 1) ** 3).mean(), rel=1e-9)


def test_only_the_kernel_distances_are_unbiased():
    """40 times two samples of one distribution, 60 rows of 16 features."""
    draws = [(normal(2 * i, 60, 16), normal(2 * i + 1, 60, 16)) for i in range(40)]
    for distance, prepare in ((ev.kernel_distance, np.asarray), (ev.cmmd, unit)):
        values = [distance(prepare(y))(prepare(x)) for x, y in draws]
        assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)
        assert min(values) < 0 < max(values)
    frechet = [ev.frechet_distance(y)(x) for x, y in draws]
    assert min(frechet) > 1
    assert ev.frechet_distance(normal(1, 20_000, 16))(normal(0, 20_000, 16)) < 0.02


@pytest.mark.parametrize("distance", DISTANCES)
def test_shift_and_collapse_are_seen(distance):
    photos, good = unit(normal(0, 300, 8) + 0.5), unit(normal(1, 300, 8) + 0.5)
    shifted, collapsed = unit(normal(2, 300, 8) + 0.8), np.repeat(good[:6], 50, axis=0)
    read = distance(photos)(good)
    assert distance(photos)(shifted) > read + 0.002
    assert distance(photos)(collapsed) > 3 * max(read, 0.002)
    assert distance(good)(photos) == pytest.approx(read)


@pytest.mark.parametrize("distance", DISTANCES)
def test_fewer_than_two_rows_have_no_distance(distance):
    assert math.isnan(distance(normal(1, 5, 4))(normal(0, 1, 4)))
    assert math.isnan(distance(normal(1, 1, 4))(normal(0, 5, 4)))
    assert math.isfinite(distance(normal(1, 2, 4))(normal(0, 2, 4)))


# ---- Intervals -----------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_its_standard_error():
    x = normal(0, 40)
    low, high = ev.jackknife_interval(np.mean, x, blocks=40)  # a row a block
    assert (low + high) / 2 == pytest.approx(x.mean())
    error = x.std(ddof=1) / math.sqrt(40)
    assert (high - low) / 2 == pytest.approx(error * scipy.stats.t.ppf(0.975, 39), rel=1e-4)
    low, high = ev.jackknife_interval(np.mean, normal(1, 4000))
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 19) / math.sqrt(4000), rel=0.5)


def test_quantiles_of_student():
    for degrees in (5, 9, 19, 100, 10_000):
        assert ev.student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=0.01)


def test_jackknife_leaves_the_same_rows_out_of_all_samples():
    x = normal(0, 30, 2)
    assert ev.jackknife_interval(lambda a, b: (a - b).mean(), x, x - 1) == pytest.approx((1, 1))
    low, high = ev.jackknife_interval(lambda a, b: (a - b).mean(), x, x[::-1])
    assert high - low > 0.1


def test_jackknife_depends_on_its_seed_alone_and_needs_two_rows():
    x = normal(0, 57)
    assert ev.jackknife_interval(np.mean, x, seed=4) == ev.jackknife_interval(np.mean, x, seed=4)
    assert ev.jackknife_interval(np.mean, x, seed=4) != ev.jackknife_interval(np.mean, x, seed=5)
    assert np.isnan(ev.jackknife_interval(np.mean, x[:1])).all()
    assert np.isfinite(ev.jackknife_interval(np.mean, x[:2])).all()


def test_intervals_of_differences_hold_the_truth_95_percent_of_the_time():
    """Two models that share half of each prompt's variance; 200 data sets of 60 prompts, photos fixed."""
    photos, values, intervals = normal(1000, 60, 6), [], []
    for seed in range(200):
        shared, own_a, own_b = math.sqrt(0.5) * normal(seed, 3, 60, 6)
        a, b = shared + own_a + 0.5, shared + own_b + 0.3

        def difference(a: np.ndarray, b: np.ndarray) -> float:
            return ev.kernel_distance(photos)(b) - ev.kernel_distance(photos)(a)

        values.append(difference(a, b))
        intervals.append(ev.jackknife_interval(difference, a, b))
    low, high = np.array(intervals).T
    truth = np.mean(values)  # the distance is unbiased
    assert truth < -0.3
    assert 0.91 <= np.mean((low <= truth) & (truth <= high)) <= 0.985
    assert np.mean(high - low) / 2 / 2.093 == pytest.approx(np.std(values), rel=0.15)


# ---- Models against photos -----------------------------------------------------------------------------------------


def test_floor_is_what_a_perfect_model_reads():
    photos = normal(0, 1200, 24)
    floor = ev.real_floor(ev.frechet_distance, photos, 200, seed=0)
    perfect = [ev.frechet_distance(photos)(normal(seed, 200, 24)) for seed in range(1, 9)]
    assert min(perfect) * 0.8 < floor < max(perfect) * 1.2
    assert floor < ev.frechet_distance(photos)(normal(1, 200, 24) + 0.3)


def test_floor_takes_disjoint_sets_of_all_photos():
    photos = np.arange(11.0)[:, None]
    for n, size in ((3, 3), (5, 5), (100, 5)):
        a, b = ev.real_floor(lambda others: lambda apart: (apart, others), photos, n, seed=1)
        assert len(a) == size
        assert sorted([*a[:, 0], *b[:, 0]]) == list(range(11))
    assert math.isnan(ev.real_floor(ev.kernel_distance, photos[:3], 100, seed=0))


@pytest.mark.parametrize("distance", DISTANCES)
def test_compare_realism(distance):
    prompt_ids = np.repeat(np.arange(60), 2)
    photos, shared = unit(normal(0, 200, 6) + 0.5), normal(1, 120, 6)
    features = {
        "base": unit(shared + normal(2, 120, 6) + 1.2),
        "better": unit(shared + normal(3, 120, 6) + 0.8),
        "same": unit(shared + normal(4, 120, 6) + 1.2),
    }
    found, moves = ev.compare_realism(features, prompt_ids, photos, distance, seed=0)
    assert found["images"] == 120
    assert found["floor"] == ev.real_floor(distance, photos, 120, 0)
    assert found["models"] == {name: distance(photos)(rows) for name, rows in features.items()}
    assert list(moves) == ["better", "same"]
    for name, move in moves.items():
        assert (move["base"], move["tuned"]) == (found["models"]["base"], found["models"][name])
        assert move["difference"] == move["tuned"] - move["base"]
        assert move["interval"][0] < move["difference"] < move["interval"][1]
    assert moves["better"]["interval"][1] < 0
    assert moves["same"]["interval"][0] < 0 < moves["same"]["interval"][1]
    by_hand = ev.jackknife_interval(
        lambda a, b: distance(photos)(b.reshape(-1, 6)) - distance(photos)(a.reshape(-1, 6)),
        *(features[name].reshape(60, 2, 6) for name in ("base", "better")),  # a row is a prompt
    )
    assert moves["better"]["interval"] == pytest.approx(by_hand)


def test_images_that_a_model_lacks_are_left_out_for_all():
    prompt_ids, photos = np.repeat(np.arange(20), 2), normal(0, 50, 4)
    features = {"base": normal(1, 40, 4), "a": normal(2, 40, 4), "b": normal(3, 40, 4)}
    features["a"][[0, 1, 5]], features["b"][39] = np.nan, np.nan
    kept = [row for row in range(40) if row not in (0, 1, 5, 39)]
    there = {name: rows[kept] for name, rows in features.items()}
    for seed in (0, 1):
        assert ev.compare_realism(features, prompt_ids, photos, ev.kernel_distance, seed) == ev.compare_realism(
            there, prompt_ids[kept], photos, ev.kernel_distance, seed
        )
    found, moves = ev.compare_realism(
        {name: np.full((40, 4), np.nan) for name in ("base", "a")}, prompt_ids, photos, ev.kernel_distance
    )
    assert found["images"] == 0
    assert math.isnan(found["models"]["a"])
    assert np.isnan(moves["a"]["interval"]).all()


@pytest.mark.parametrize(
    ("distance", "images", "photos", "words"),
    [
        (ev.frechet_distance, 2048, 2048, []),
        (ev.frechet_distance, 2047, 9000, ["2047 images of each model and 9000 photos reads too high"]),
        (ev.frechet_distance, 9000, 300, ["9000 images of each model and 300 photos reads too high"]),
        (ev.frechet_distance, 500, 60, ["500 images of each model and 60 photos this distance", "reads too high"]),
        (ev.kernel_distance, 100, 100, []),
        (ev.cmmd, 100, 99, ["99 photos this distance says little"]),
        (ev.kernel_distance, 30, 4000, ["30 images of each model"]),
    ],
)
def test_notes_on_few_images(distance, images, photos, words):
    note = ev.realism_note(distance, images, photos)
    assert bool(note) == bool(words)
    assert all(word in note for word in words)
    assert "\n" not in note


# ---- Features ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny DINOv2 with its processor."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    ev.quiet_libraries()
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_features_of_dinov2(dino):
    from transformers import AutoImageProcessor, Dinov2Model

    features = ev.image_features(str(dino), "cpu")
    found = features(pictures(4))
    assert (found.shape, found.dtype) == ((4, 16), np.float64)
    squares = [ImageOps.pad(image, (80, 80)) for image in pictures(4)]
    pixels = AutoImageProcessor.from_pretrained(dino, backend="pil")(squares, return_tensors="pt")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(**pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(features(pictures(4)[1:2])[0], found[1], atol=1e-5)
    assert np.ptp(found, axis=0).min() > 1e-4


def test_embeddings_of_clip():
    from transformers import CLIPModel, CLIPProcessor

    ev.quiet_libraries()
    embed, clip = ev.clip_embeddings(str(CLIP), "cpu"), CLIPModel.from_pretrained(CLIP).float().eval()
    found = embed(pictures(4))
    squares = [ImageOps.pad(image, (80, 80)) for image in pictures(4)]
    inputs = CLIPProcessor.from_pretrained(CLIP)(images=squares, text=["a man"], return_tensors="pt")
    with torch.no_grad():
        expected = clip(**inputs).image_embeds.double().numpy()
    assert (found.shape, found.dtype) == ((4, clip.config.projection_dim), np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert np.ptp(found, axis=0).max() > 1e-3


@pytest.mark.parametrize("name", ["no/such-model", "tests"])
def test_clip_models_that_cannot_be_loaded(name):
    with pytest.raises(ev.UserError, match=rf"^cannot load {name}: .") as error:
        ev.load_features(ev.clip_embeddings, name, "cpu")
    assert "\n" not in str(error.value)


class Inception(torch.nn.Module):
    """Has the interface of NVIDIA's: uint8 images in, features out; here the mean and the corners of each channel."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[2] == 299
        assert images.shape[3] == 299
        assert return_features
        x = images.float()
        return torch.cat([x.mean(dim=[2, 3]), x[:, :, 0, 0], x[:, :, 298, 298]], dim=1)


class Flat(torch.nn.Module):
    """Gives one number per image."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=[1, 2, 3])


class Bare(torch.nn.Module):
    """Has no return_features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1)


def test_features_of_inception(tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    found = ev.inception_features(tmp_path / "inception.pt", "cpu")(pictures(3))
    resized = [np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC), np.float64) for image in pictures(3)]
    expected = [np.concatenate([one.mean(axis=(0, 1)), one[0, 0], one[298, 298]]) for one in resized]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float64


def test_large_images_are_smoothed_before_they_shrink(tmp_path):
    """A fine pattern becomes its mean; picking pixels would keep it."""
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    stripes = np.zeros((1196, 1196, 3), np.uint8)
    stripes[:, ::2] = 200
    found = ev.inception_features(str(tmp_path / "inception.pt"), "cpu")([Image.fromarray(stripes).convert("L")])
    np.testing.assert_allclose(found, 100, atol=12)
    np.testing.assert_allclose(found[:, :3], 100, atol=1)


def test_files_that_are_no_inception(tmp_path):
    torch.jit.script(Flat()).save(tmp_path / "flat.pt")
    torch.jit.script(Bare()).save(tmp_path / "bare.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no model")
    for name, words in {
        "none.pt": "no such file: ",
        "": "no such file: ",
        "text.pt": "text.pt is not a TorchScript Inception with return_features: .",
        "weights.pt": "weights.pt is not a TorchScript Inception with return_features: .",
        "bare.pt": "bare.pt is not a TorchScript Inception with return_features: .",
        "flat.pt": r"flat.pt gives features of the shape \(2,\) for two images: it should be \(2, D\)",
    }.items():
        with pytest.raises(ev.UserError, match=words) as error:
            ev.inception_features(tmp_path / name, "cpu")
        assert "\n" not in str(error.value)
