# SPDX-License-Identifier: Apache-2.0
"""The laws of train_dpo_human.py, and its runs on the embedded world."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny_human.figures import BREAKS, all_attributes, draw

import train_dpo_human as trainer


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_dpo_human.py"
PIPELINE = ROOT / "tests" / "tiny_human" / "pipeline"
SMALL = {
    **{"train_batch_size": 2, "max_train_steps": 4, "logging_steps": 2, "checkpointing_steps": 2, "report_to": "none"},
    **{"num_validation_images": 1, "validation_inference_steps": 1, "validation_draws": 1, "learning_rate": 1e-3},
}


# ---- Fixtures: a small data set in the format of make_preference_data.py --------------------------------------------


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def make_rows(count: int, first: int = 0) -> list[dict]:
    """Right figures against broken ones; the winner's side alternates."""
    rows = []
    for i in range(first, first + count):
        attributes = all_attributes()[37 * i % len(all_attributes())]
        right, wrong = draw(attributes, seed=i), draw(attributes, seed=i, broken=BREAKS[i % len(BREAKS)])
        sides = [right, wrong] if i % 2 else [wrong, right]
        rows.append({
            "jpg_0": jpeg(sides[0].image), "jpg_1": jpeg(sides[1].image), "caption": right.caption,
            "label_0": float(i % 2), "label_1": float(1 - i % 2),
        })  # fmt: skip
    return rows


def write_data(folder: Path, train: list[dict], validation: list[dict] | None = None) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, rows in (("train", train), ("validation", validation)):
        if rows:
            Dataset.from_list(rows).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    return write_data(tmp_path_factory.mktemp("pairs"), make_rows(10), make_rows(3, first=50))


def flags(settings: dict) -> list[str]:
    return [
        word
        for name, value in settings.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def train(data: Path, output: Path, **settings) -> dict[str, torch.Tensor]:
    """Runs main() in this process; returns the weights that it wrote."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = SMALL | {"train_data_dir": data, "output_dir": output} | settings
    trainer.main(trainer.parse_args(flags(settings)))
    lora = output / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else output / "unet" / "diffusion_pytorch_model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def killed(*_) -> None:
    raise KeyboardInterrupt


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ---- The method -----------------------------------------------------------------------------------------------------


def errors(seed: int = 0) -> list[torch.Tensor]:
    return list(0.1 + torch.rand(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_loss_is_log_2_at_the_reference():
    err_w, err_l, *_ = errors()
    loss, margin = trainer.dpo_loss(err_w, err_l, err_w, err_l, beta=2500)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.equal(margin, torch.zeros_like(margin))


def test_loss_equals_both_public_formulas():
    err_w, err_l, ref_err_w, ref_err_l = errors()
    ours, _ = trainer.dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta=25)
    # diffusers train_diffusion_dpo.py
    logits = (ref_err_w - ref_err_l) - (err_w - err_l)
    assert ours.item() == pytest.approx(-torch.nn.functional.logsigmoid(25 * logits).mean().item())
    # SalesforceAIResearch/DiffusionDPO train.py
    inside = -0.5 * 50 * ((err_w - err_l) - (ref_err_w - ref_err_l))
    assert ours.item() == pytest.approx(-torch.nn.functional.logsigmoid(inside).mean().item())


@pytest.mark.parametrize("label", [1.0, 0.9, 0.6])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_loss_lowers_the_winners_error_and_raises_the_losers(loss_type, label):
    values = [0.01 * error for error in errors()]

    def loss(err_w, err_l):
        return trainer.dpo_loss(err_w, err_l, values[2], values[3], 1, loss_type, label)[0].item()

    h = 1e-6
    assert loss(values[0] + h, values[1]) > loss(values[0] - h, values[1])
    assert loss(values[0], values[1] + h) < loss(values[0], values[1] - h)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_a_label_below_a_half_turns_the_sign_and_a_tie_pulls_back_to_the_reference(loss_type):
    zero = torch.zeros(1, dtype=torch.float64)

    def slope(margin: float, label: float) -> float:
        h = 1e-7
        above, below = (trainer.dpo_loss(zero, m + zero, zero, zero, 10, loss_type, label)[0].item()
                        for m in (margin + h, margin - h))  # fmt: skip
        return (above - below) / (2 * h)

    assert slope(0, 0.1) > 0 > slope(0, 0.9)
    assert slope(0, 0.5) == pytest.approx(0, abs=1e-6)
    assert slope(0.2, 0.5) > 0 > slope(-0.2, 0.5)


def test_label_smoothing_equals_the_conservative_dpo_formula():
    err_w, err_l, ref_err_w, ref_err_l = errors()
    ours, margin = trainer.dpo_loss(err_w, err_l, ref_err_w, ref_err_l, 25, label=torch.full((8,), 0.9))
    logits = 25 * margin
    theirs = -0.9 * torch.nn.functional.logsigmoid(logits) - 0.1 * torch.nn.functional.logsigmoid(-logits)
    assert ours.item() == pytest.approx(theirs.mean().item(), rel=1e-6)


# Diffusion-SDPO: a linear model theta -> theta * input for winner and loser shows what a step does to the winner


def winner_after_a_step(safeguarded: bool, mu: float = 0.0, seed: int = 0) -> tuple[float, float]:
    """The winner's error before and after one small step of gradient descent in the space of outputs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    residual_w, residual_l = 0.1 * w, w + 0.1 * torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    scale = trainer.safeguard_scale(residual_w, residual_l, mu) if safeguarded else torch.ones(1)
    step = -residual_w + scale.item() * residual_l  # shared weights: both gradients move both outputs
    return residual_w.square().mean().item(), (residual_w + 1e-3 * step).square().mean().item()


def test_the_safeguard_keeps_the_winners_error_from_rising():
    before, after = winner_after_a_step(safeguarded=False)
    assert after > before  # plain Diffusion-DPO: the aligned loser drags the winner along
    before, after = winner_after_a_step(safeguarded=True)
    assert after == pytest.approx(before, rel=1e-4)
    before, after = winner_after_a_step(safeguarded=True, mu=0.5)
    assert after < before


def test_the_safeguards_factor_is_the_closed_form_and_1_where_gradients_oppose():
    g_w, g_l = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    g_l = g_l + torch.tensor([3.0, -3.0, 0.0]).view(3, 1, 1, 1) * g_w
    scale = trainer.safeguard_scale(g_w, g_l, 0.25)
    for i in range(3):
        inner = (g_w[i] * g_l[i]).sum().item()
        expected = min(1, 0.75 * g_w[i].square().sum().item() / inner) if inner > 0 else 1
        assert scale[i].item() == pytest.approx(expected, rel=1e-5)
    assert scale[0] < 1
    assert scale[1] == 1


def test_scaling_a_gradient_leaves_the_value():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = trainer.scale_gradient(x.square(), torch.tensor([0.5, 0.0]))
    y.sum().backward()
    assert y.tolist() == [4, 9]
    assert x.grad.tolist() == [2, 0]


def test_ipo_is_smallest_at_its_margin():
    zero = torch.zeros(1, dtype=torch.float64)
    losses = [trainer.dpo_loss(zero, m + zero, zero, zero, 100, "ipo")[0].item() for m in (0.004, 0.005, 0.006)]
    assert losses[1] == pytest.approx(0)
    assert min(losses) == losses[1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predict_x0_inverts_add_noise(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    x_0, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 400, 800, 999])
    alpha_bar = scheduler.alphas_cumprod[t]
    x_t = trainer.add_noise(x_0, noise, alpha_bar)
    target = trainer.training_target(x_0, noise, alpha_bar, prediction_type)
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, noise, t))
    if prediction_type == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(x_0, noise, t))
    torch.testing.assert_close(trainer.predict_x0(target, x_t, alpha_bar, prediction_type), x_0, atol=2e-5, rtol=1e-4)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULES = {
    "sd": DDPMScheduler(**SD),
    "400 steps": DDPMScheduler(**SD, num_train_timesteps=400),
    "zero terminal snr": DDPMScheduler(**SD, rescale_betas_zero_snr=True),
}


def statistics_loss(x0: torch.Tensor, ref_x0: torch.Tensor, t: int, schedule: str = "sd") -> float:
    alpha_bar = SCHEDULES[schedule].alphas_cumprod
    before = alpha_bar[t - 1] if t else torch.tensor(1.0)
    means = (value.mean(dim=(2, 3)) for value in (x0, ref_x0))
    return trainer.statistics_matching_loss(*means, alpha_bar[t].expand(len(x0)), before.expand(len(x0))).item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 162, -1])
def test_statistics_loss_is_that_of_the_schedulers_own_step(schedule, prediction_type, t):
    scheduler = DDPMScheduler.from_config(SCHEDULES[schedule].config, prediction_type=prediction_type)
    t = t % scheduler.config.num_train_timesteps
    if prediction_type == "epsilon" and scheduler.alphas_cumprod[t] == 0:
        pytest.skip("no image follows from epsilon there; the trainer refuses it")
    x_t, ours, theirs = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = [
        scheduler.step(prediction, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample.double()
        for prediction in (ours, theirs)
    ]
    expected = (steps[0].mean((2, 3)) - steps[1].mean((2, 3))).square().sum(1).mean().item()
    alpha_bar = scheduler.alphas_cumprod[t].expand(3)
    x0 = [trainer.predict_x0(prediction, x_t, alpha_bar, prediction_type) for prediction in (ours, theirs)]
    assert statistics_loss(*x0, t, schedule) == pytest.approx(expected, rel=3e-3)


def test_statistics_loss_ignores_the_order_of_pixels_and_sees_a_shift():
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shuffled = x0.flatten(2)[:, :, torch.randperm(64)].view_as(x0)
    assert statistics_loss(shuffled, x0, 500) == pytest.approx(0, abs=1e-12)
    assert statistics_loss(x0 + 0.1, x0, 0) == pytest.approx(4 * 0.1**2, rel=1e-4)


# ---- Draws ----------------------------------------------------------------------------------------------------------


def test_draws_are_functions_of_seed_pair_and_visit():
    visits = [(row, visit) for row in range(4) for visit in range(2)]
    noise, t = trainer.draw_noise(0, "train", visits, (2, 4, 4), (0, 1000))
    again, t_again = trainer.draw_noise(0, "train", visits[4:], (2, 4, 4), (0, 1000))
    assert torch.equal(noise[4:], again)
    assert torch.equal(t[4:], t_again)
    assert len(set(noise[:, 0, 0, 0].tolist())) == 8
    for other in (
        trainer.draw_noise(1, "train", visits, (2, 4, 4), (0, 1000)),
        trainer.draw_noise(0, "x", visits, (2, 4, 4), (0, 1000)),
    ):
        assert not torch.equal(noise, other[0])
        assert not torch.equal(t, other[1])


def test_timesteps_are_uniform_in_their_range():
    _, t = trainer.draw_noise(0, "train", [(row, 0) for row in range(2000)], (1,), (900, 1000))
    assert (t.min().item(), t.max().item()) == (900, 999)
    assert t.float().mean().item() == pytest.approx(949.5, abs=4 * 28.9 / 2000**0.5)


def test_ranks_and_micro_batches_share_out_the_positions():
    args = trainer.parse_args(["--train_batch_size", "3", "--gradient_accumulation_steps", "2"])
    where = [trainer.positions(s, m, rank, args, 2) for s in range(2) for m in range(2) for rank in range(2)]
    assert [position for part in where for position in part] == list(range(24))


def pairs_in_buckets(counts: list[int], per_step: int) -> trainer.Pairs:
    bucket = np.repeat(np.arange(len(counts)), counts)
    latents = [torch.zeros(count, 2, 4, 2 + i, 2) for i, count in enumerate(counts)]
    place = np.concatenate([np.arange(count) for count in counts])
    total = sum(counts)
    return trainer.Pairs(
        latents,
        bucket,
        place,
        place,
        torch.ones(total),
        torch.zeros(total, 6, dtype=torch.long),
        per_step,
        place,
        [],
        {},
    )


def test_every_epoch_sees_every_pair_once():
    pairs = pairs_in_buckets([10], 4)
    visits = trainer.visits_at(0, range(30), pairs)
    epochs = [[row for row, epoch in visits if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_with_buckets_a_step_has_one_size_and_no_pair_is_forgotten():
    pairs = pairs_in_buckets([7, 2, 9], 4)
    length = 4 + 4 + 8
    visits = trainer.visits_at(0, range(2 * length), pairs)
    assert {epoch for _, epoch in visits[:length]} == {0}
    many = trainer.visits_at(0, range(20 * length), pairs)
    assert {row for row, _ in many} == set(range(18))  # what one epoch leaves over comes in another
    for start in range(0, 2 * length, 4):
        assert len({pairs.bucket[row] for row, _ in visits[start : start + 4]}) == 1
    batch = trainer.make_batch(pairs, visits[:4], torch.zeros(4, 4, 2, 2), torch.zeros(4), torch.device("cpu"))
    assert batch.x_0.shape[0] == 8


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "lora"
    train(data, output, gradient_accumulation_steps=2, max_train_steps=6, checkpoints_total_limit=2)
    return output


def test_a_run_writes_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "README.md", "metrics.jsonl", "training_settings.json"),
        *("validation.png", "validation", "checkpoint-4", "checkpoint-6", "cache"),
    }  # fmt: skip
    logged, held_out = read_metrics(finished)[-2:]
    assert {*trainer.METRICS, "grad_norm", "lr", "pairs_per_second", "step"} == logged.keys()
    assert {f"validation/{name}" for name in trainer.METRICS} | {"step"} == held_out.keys()
    assert held_out["validation/loss/dpo"] != pytest.approx(math.log(2), abs=1e-6)
    card = (finished / "README.md").read_text()
    assert "load_lora_weights" in card
    assert "validation.png" in card
    assert Image.open(finished / "validation.png").width > 200


def test_the_first_step_starts_at_the_reference(data, tmp_path):
    train(data, tmp_path / "run", max_train_steps=1, logging_steps=1, checkpointing_steps=9)
    first = read_metrics(tmp_path / "run")[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss/statistics"] == 0
    assert first["grad_norm"] > 0


def test_the_lora_changes_a_pipelines_images_and_at_scale_0_does_not(finished):
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def latents(scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "latent", "cross_attention_kwargs": {"scale": scale}}
        return pipe("a person", generator=generator, **options).images

    base = latents(1)
    pipe.load_lora_weights(finished)
    assert not torch.allclose(latents(1), base, atol=1e-4)
    torch.testing.assert_close(latents(0), base)


def test_alpha_reaches_the_pipeline(data, tmp_path):
    train(data, tmp_path / "run", rank=2, lora_alpha=6, max_train_steps=1)
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "run")
    config = next(iter(pipe.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (2, 6)


RESUMED = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "whole U-Net, averaged": {"full_unet": True, "ema": 0.9},
    "text encoder": {"train_text_encoder": True, "text_encoder_rank": 2, "precompute_reference": 1},
    "8-bit Adam": {"use_8bit_adam": True, "lr_scheduler": "cosine"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, monkeypatch, options):
    options = options | {"learning_rate": 1e-4, "logging_steps": 1}
    whole = train(data, tmp_path / "whole", **options)
    own = trainer.optimisation_step
    monkeypatch.setattr(trainer, "optimisation_step", lambda run, step: killed() if step == 3 else own(run, step))
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "parts", **options)
    monkeypatch.undo()
    parts = train(data, tmp_path / "parts", **options, resume_from_checkpoint="latest")
    assert_equal(whole, parts)
    logged = [
        [entry["loss"] for entry in read_metrics(tmp_path / run) if "loss" in entry] for run in ("whole", "parts")
    ]
    assert logged[0] == logged[1]


def test_kill_9_leaves_complete_checkpoints_and_resume_gives_the_uninterrupted_weights(data, tmp_path):
    settings = {"max_train_steps": 12, "num_validation_images": 1}
    whole = train(data, tmp_path / "whole", **settings)
    killed = tmp_path / "killed"
    command = flags(SMALL | settings | {"train_data_dir": data, "output_dir": killed})
    process = subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 90
    while not (killed / "checkpoint-4").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "pytorch_lora_weights.safetensors").exists()
    for checkpoint in trainer.checkpoints(killed):
        assert {path.name for path in checkpoint.iterdir()} == {
            "model.safetensors", "state.pt", "run.json", "pytorch_lora_weights.safetensors",
        }  # fmt: skip
    assert_equal(whole, train(data, killed, **settings, resume_from_checkpoint="latest"))
    assert not list(killed.glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_latest_carries_on(data, tmp_path, monkeypatch, capsys, number):
    settings = {"checkpointing_steps": 99, "logging_steps": 1}
    whole = train(data, tmp_path / "whole", **settings)
    own = trainer.optimisation_step

    def signalled(run, step):
        if step == 1:
            os.kill(os.getpid(), number)
        return own(run, step)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimisation_step", signalled)
        with pytest.raises(SystemExit) as stop:
            train(data, tmp_path / "parts", **settings)
    assert stop.value.code == 128 + number
    assert f"stopped by {number.name} after step 2" in capsys.readouterr().out
    assert [path.name for path in trainer.checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    assert signal.getsignal(number) == before
    assert_equal(whole, train(data, tmp_path / "parts", **settings, resume_from_checkpoint="latest"))


def test_a_full_disk_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    import resource

    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    own, limits = trainer.write_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(run, step, *rest):
        if step == 4:  # no file may grow beyond 50 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            own(run, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(trainer, "write_checkpoint", on_a_full_disk)
    with pytest.raises(
        trainer.UserError, match=r"cannot write .*checkpoint-4: .* \(last complete checkpoint: checkpoint-2\)"
    ):
        train(data, tmp_path / "run", **settings)
    assert [path.name for path in trainer.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob("*.partial"))
    monkeypatch.undo()
    assert_equal(train(data, tmp_path / "run", **settings, resume_from_checkpoint="latest"),
                 train(data, tmp_path / "whole", **settings))  # fmt: skip


def test_early_stopping_waits_for_its_patience(data, tmp_path, capsys):
    """Without learning the accuracy moves by rounding alone: the step to stop at is told by the history itself."""
    settings = {"max_train_steps": 40, "validation_steps": 1, "learning_rate": 1e-12, "early_stopping_patience": 2}
    train(data, tmp_path / "run", **settings)
    history = [
        line["validation/rewards/accuracies"] for line in read_metrics(tmp_path / "run") if "validation/loss" in line
    ]
    stops = [n for n in range(1, len(history) + 1) if trainer.no_longer_improves(history[:n], patience=2)]
    assert stops == [len(history)]
    assert len(history) < 40
    assert f"stopped early, after step {len(history)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("history", "patience", "stops"),
    [
        ([0.5, 0.5, 0.5], 2, True),  # as good is no new best
        ([0.5, 0.5], 2, False),  # not yet patience + 1 of them
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.6, 0.4, 0.5], 2, True),
        ([0.5, 0.6, 0.4, 0.5], 3, False),
        ([0.9, 0.1, 0.1, 0.1, 0.1], None, False),
    ],
)
def test_early_stopping_stops_without_a_new_best(history, patience, stops):
    assert trainer.no_longer_improves(history, patience) == stops


def test_the_full_unet_loads_and_differs_from_the_base(data, tmp_path):
    train(data, tmp_path / "run", full_unet=True, max_train_steps=2)
    tuned = UNet2DConditionModel.from_pretrained(tmp_path / "run", subfolder="unet").state_dict()
    base = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet").state_dict()
    assert tuned.keys() == base.keys()
    assert any(not torch.equal(tuned[name], base[name].float()) for name in base)


def test_bf16_trains_fp32_weights(data, tmp_path):
    weights = train(data, tmp_path / "run", mixed_precision="bf16", max_train_steps=2)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    moved = torch.cat([weight.flatten() for name, weight in weights.items() if "lora_B" in name or "lora.up" in name])
    assert (moved != 0).float().mean() > 0.9


def test_memory_flags_do_not_change_the_result(data, tmp_path):
    plain = train(data, tmp_path / "plain", max_train_steps=2)
    thrifty = train(data, tmp_path / "thrifty", max_train_steps=2, gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(plain[name], thrifty[name], atol=1e-5, rtol=1e-3)


def test_epsilon_and_v_prediction_run(data, tmp_path):
    first = {}
    for prediction_type in ("epsilon", "v_prediction"):
        model = shutil.copytree(PIPELINE, tmp_path / f"model-{prediction_type}")
        config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
        config["prediction_type"] = prediction_type
        (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        settings = {"pretrained_model_name_or_path": model, "resolution": 64, "max_train_steps": 1, "logging_steps": 1}
        train(data, tmp_path / prediction_type, **settings)
        first[prediction_type] = read_metrics(tmp_path / prediction_type)[0]
        assert first[prediction_type]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["epsilon"]["error/winner"] != pytest.approx(first["v_prediction"]["error/winner"])


def test_warm_up_is_not_ignored(data, tmp_path):
    train(data, tmp_path / "run", lr_warmup_steps=4, logging_steps=1, max_train_steps=3)
    rates = [entry["lr"] for entry in read_metrics(tmp_path / "run") if "lr" in entry]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4])


# ---- Data -----------------------------------------------------------------------------------------------------------


def test_latents_of_the_data_set_are_used_where_they_fit(data, tmp_path, capsys):
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    rows = make_rows(4)
    for row in rows:
        for side in (0, 1):
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(row[f"jpg_{side}"])))).permute(2, 0, 1)[None]
            with torch.no_grad():
                latents = vae.encode(pixels / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
            row[f"latents_{side}"] = latents.half().numpy().tobytes()
    folder = write_data(tmp_path / "pairs", rows)
    metadata = {
        "shape": [8, 16, 16],
        "dtype": "float16",
        "scaling_factor": 0.25,
        "vae_hash": trainer.weights_hash(vae),
    }
    (folder / "preference_data.json").write_text(json.dumps({"latents": metadata}))
    given = train(folder, tmp_path / "given", max_train_steps=2)
    assert "VAE" not in capsys.readouterr().out
    (folder / "preference_data.json").write_text(json.dumps({"latents": metadata | {"vae_hash": "of another VAE"}}))
    encoded = train(folder, tmp_path / "encoded", max_train_steps=2)
    assert "another VAE" in capsys.readouterr().out
    caches = [next((tmp_path / run / "cache").glob("latents-*")).read_bytes() for run in ("given", "encoded")]
    a, b = (torch.frombuffer(bytearray(cache), dtype=torch.float16).float() for cache in caches)
    torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)
    assert given.keys() == encoded.keys()


def test_winners_come_first(data):
    splits = trainer.load_splits(trainer.parse_args(["--train_data_dir", str(data)]))
    assert splits["train"].winner.tolist() == [1, 0] * 5
    assert splits["train"].dropped == {}


def test_a_named_data_set_is_read_by_its_split(data, tmp_path, capsys):
    train(data, tmp_path / "run", dataset_name=data, dataset_split_name="validation", max_train_steps=1)
    assert "3 to train on, 0 held out" in capsys.readouterr().out


def test_both_sides_are_cropped_alike():
    wide, tall = Image.new("RGB", (90, 60)), Image.new("RGB", (60, 90))
    assert trainer.to_pixels(jpeg(wide), (64, 48), "").shape == trainer.to_pixels(jpeg(tall), (64, 48), "").shape


def test_ties_are_left_out_and_counted(tmp_path, capsys):
    rows = make_rows(5)
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    train(write_data(tmp_path / "pairs", rows), tmp_path / "run", max_train_steps=1)
    assert "4 to train on, 0 held out, 1 ties left out" in capsys.readouterr().out


def test_pairs_made_again_in_the_same_folder_are_seen(tmp_path):
    folder = write_data(tmp_path / "pairs", make_rows(5), make_rows(2, first=50))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )
    args = trainer.parse_args(flags(SMALL | {"train_data_dir": folder, "output_dir": tmp_path / "run"}))
    assert [len(split.rows) for split in trainer.load_splits(args).values()] == [5, 2]
    shutil.rmtree(folder / "data")
    write_data(folder, make_rows(7))
    assert [len(split.rows) for split in trainer.load_splits(args).values()] == [7]


# ---- Processes ------------------------------------------------------------------------------------------------------

LAUNCH = {
    "DDP": "--multi_gpu",
    "FSDP": "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_transformer_layer_cls_to_wrap BasicTransformerBlock,ResnetBlock2D --fsdp_cpu_ram_efficient_loading false",
}
DRIVER = """
import runpy, sys
from accelerate.state import AcceleratorState, DistributedType, PartialState

own = AcceleratorState.__init__

def init(self, *args, fsdp_plugin=None, **kwargs):  # accelerate leaves CPUs out of what may become FSDP
    fresh = not AcceleratorState._shared_state
    own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = init
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def two_processes(kind: str, folder: Path, data: Path, output: Path, **settings) -> str:
    """Runs the script as `accelerate launch` does with two processes; returns what it printed."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    settings = SMALL | {"train_data_dir": data, "output_dir": output, "train_batch_size": 1} | settings
    launcher = f"-m accelerate.commands.launch {LAUNCH[kind]} --num_processes 2 --num_machines 1 --mixed_precision no"
    launcher += " --dynamo_backend no --main_process_port 0"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher.split(), driver, SCRIPT, *flags(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", LAUNCH)
def test_two_processes_train_the_same_weights_as_one_and_resume_bit_for_bit(data, tmp_path, kind):
    settings = {"max_train_steps": 3, "checkpointing_steps": 2, "precompute_reference": 1}
    one = train(data, tmp_path / "one", **settings)
    told = two_processes(kind, tmp_path, data, tmp_path / "two", **settings, report_to="tensorboard")
    assert "1 pairs x 1 accumulated x 2 processes = 2 pairs a step" in told
    assert list((tmp_path / "two" / "logs").rglob("events.out*"))
    assert (tmp_path / "two" / "validation.png").is_file()
    two = load_file(tmp_path / "two" / "pytorch_lora_weights.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=5e-4, rtol=2e-2)
    logged = [[line["loss"] for line in read_metrics(tmp_path / run) if "loss" in line] for run in ("one", "two")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    two_processes(kind, tmp_path, data, tmp_path / "two", **settings, resume_from_checkpoint="latest")
    assert_equal(two, load_file(tmp_path / "two" / "pytorch_lora_weights.safetensors"))


def test_fsdp_trains_the_whole_unet(data, tmp_path):
    settings = {"max_train_steps": 2, "full_unet": True, "learning_rate": 1e-4}
    one = train(data, tmp_path / "one", **settings)
    two_processes("FSDP", tmp_path, data, tmp_path / "two", **settings)
    two = load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=5e-4, rtol=2e-2)
