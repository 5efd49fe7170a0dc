# SPDX-License-Identifier: Apache-2.0
"""The laws of train_dpo_human.py: its method, its model families, and its runs on the embedded world."""

import fcntl
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from safetensors.torch import load_file

import train_dpo_human as trainer


# isort: off
from train_helpers import data as _data, models as _models  # noqa: F401, the fixtures
from train_helpers import FAMILIES, LORA, PIPELINE, ROOT, SMALL, HalfPrecision, assert_equal, assert_same_run
from train_helpers import flags, interrupt, load, losses_of, make_rows, names_in, read_metrics, read_weights
from train_helpers import run_main, stop, train, two_processes, with_scheduler, write_data


LOG_2 = pytest.approx(math.log(2), abs=1e-6)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ERRORS = 0.1 + torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at_logit(logit: float, loss_type: str, label: float = 1.0) -> tuple[float, float]:
    """Loss and weight of a pair with this logit."""
    err = torch.tensor([-logit, 0, 0, 0], dtype=torch.float64)
    loss, found, weight = trainer.dpo_loss(*err, 1, loss_type, label)
    assert found.item() == logit
    return loss.item(), weight.item()


START = {"sigmoid": (math.log(2), 0.5), "hinge": (1, 1), "ipo": (0.25, 1)}  # loss and weight at the reference


@pytest.mark.parametrize("loss_type", START)
def test_the_weight_is_the_slope_of_the_loss_also_for_soft_labels(loss_type):
    h, weight = 1e-6, {}
    for logit, label in itertools.product((-2.0, -0.3, 0.0, 0.2, 0.7, 2.0), (1.0, 0.9, 0.6, 0.5, 0.1)):
        above, below = (at_logit(logit + step, loss_type, label)[0] for step in (h, -h))
        weight[logit, label] = at_logit(logit, loss_type, label)[1]
        assert weight[logit, label] == pytest.approx((below - above) / (2 * h), abs=1e-7)
    assert at_logit(0, loss_type) == pytest.approx(START[loss_type])
    assert weight[0, 0.1] < 0 < weight[0, 0.9]  # a label below a half turns the sign
    assert weight[0, 0.5] == pytest.approx(0)
    assert weight[2, 0.5] < 0 < weight[-2, 0.5]  # a tie pulls back to the reference
    err_w, err_l, *ref = 0.01 * ERRORS
    trainer.dpo_loss(err_w.requires_grad_(), err_l.requires_grad_(), *ref, 1, loss_type, 0.6)[0].sum().backward()
    assert (err_w.grad > 0).all()
    assert torch.equal(err_l.grad, -err_w.grad)


def test_the_loss_equals_both_public_formulas_at_their_betas():
    err_w, err_l, ref_err_w, ref_err_l = ERRORS
    ours = trainer.dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta=25)[0].mean().item()
    # diffusers, train_diffusion_dpo.py
    logits = (ref_err_w - ref_err_l) - (err_w - err_l)
    assert ours == pytest.approx(-F.logsigmoid(25 * logits).mean().item())
    # SalesforceAIResearch/DiffusionDPO, train.py, and diffusers, train_diffusion_dpo_sdxl.py
    inside = -0.5 * 50 * ((err_w - err_l) - (ref_err_w - ref_err_l))
    assert ours == pytest.approx(-F.logsigmoid(inside).mean().item())
    assert at_logit(0.5, "ipo") == pytest.approx((0, 0), abs=1e-12)


def test_what_is_logged_follows_from_the_predictions_by_the_docstrings_formula():
    x_0, now, ref, noise = (rand(6, 4, 8, 8, seed=seed) for seed in range(4))
    path = trainer.NoisePath(*torch.tensor([[1, 5, 9], [0.9, 0.8, 0.6], [0.4, 0.6, 0.8], [0.3, 0.2, 0.1]]), "epsilon")
    losses, _ = losses_of(now, ref, x_0, noise[:3], path, "--beta_dpo", 3, "--lambda_stat", 7)
    for i in range(3):
        err, ref_err = ([(side[j] - noise[i]).square().mean().item() for j in (i, i + 3)] for side in (now, ref))
        logit = 3 * ((ref_err[0] - err[0]) - (ref_err[1] - err[1]))
        moved = path.c[i] * path.s[i] / path.a[i] * (now[i] - ref[i])  # by one reverse step, of epsilon
        stat, dpo = 7 * moved.mean((1, 2)).square().sum().item(), math.log(1 + math.exp(-logit))
        expected = {
            "loss": dpo + stat, "loss/dpo": dpo, "loss/statistics": stat, "dpo_weight": 1 / (1 + math.exp(logit)),
            "error/winner": err[0], "error/winner_over_reference": err[0] - ref_err[0], "loser_scale": 1,
            "error/loser": err[1], "error/loser_over_reference": err[1] - ref_err[1],
            "error/winner_relative": err[0] / ref_err[0] - 1, "rewards/margins": logit,
            "prediction_norm": np.mean([now[j].norm() / ref[j].norm() for j in (i, i + 3)]).item(),
            "rewards/accuracies": float(logit > 0),
        }  # fmt: skip
        assert {name: values[i].item() for name, values in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_the_safeguards_factor_is_the_closed_form():
    g_w, g_l = rand(2, 3, 4, 8, 8)
    g_l = g_l + torch.tensor([3.0, -3.0, 0.1]).view(3, 1, 1, 1) * g_w
    bound = (0.75 * g_w.square().sum((1, 2, 3)) / (g_w * g_l).sum((1, 2, 3))).tolist()
    assert trainer.safeguard_scale(g_w, g_l, 0.25).tolist() == pytest.approx([bound[0], 1, min(1, bound[2])])


def test_the_safeguard_holds_back_the_loser_alone_and_only_where_the_pair_pushes_the_winner_up():
    noise, residual = rand(2, 3, 4, 8, 8)
    path, factor = trainer.NoisePath(*torch.full((4, 3), 0.5), "epsilon"), torch.tensor([3.0, 3, -3]).view(3, 1, 1, 1)
    now = torch.cat([noise + residual, noise + factor * residual])  # the losers' gradients: the same way, or against
    size = residual.square().mean((1, 2, 3), keepdim=True)
    better = torch.tensor([0.1, 0.9, 0.1]).view(3, 1, 1, 1)  # logits: below ipo's minimum of one half, and above it
    ref = torch.cat([noise + residual * (1 + better / size).sqrt(), noise + factor * residual])
    case = (now, ref, rand(6, 4, 8, 8), noise, path, "--beta_dpo", 1, "--lambda_stat", 0, "--loss_type", "ipo")
    plain, gradient = losses_of(*case)
    guarded, held = losses_of(*case, "--winner_safeguard", 0.4)
    assert plain["rewards/margins"].tolist() == pytest.approx([0.1, 0.9, 0.1], abs=1e-5)
    assert torch.equal(plain["loss"], guarded["loss"])
    assert guarded["loser_scale"].tolist() == pytest.approx([0.2, 1, 1])  # (1 - mu) / 3
    torch.testing.assert_close(held, gradient * torch.tensor([1, 1, 1, 0.2, 1, 1]).view(6, 1, 1, 1))


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
DDPM = {"sd": SD, "400 steps": SD | {"num_train_timesteps": 400}, "zero snr": SD | {"rescale_betas_zero_snr": True}}
SCHEDULERS = {
    **{f"{kind}, {name}": DDPMScheduler(**DDPM[name], prediction_type=kind)
       for kind, name in itertools.product(("epsilon", "v_prediction", "sample"), DDPM)},
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, dynamic": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9),
}  # fmt: skip


def path_of(scheduler) -> trainer.NoisePath:
    family = trainer.SD3() if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else trainer.UNet()
    return family.path(SimpleNamespace(scheduler=scheduler), 400)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_path_is_the_schedulers_own(name):
    """t, x_t, the target, the predicted x_0, and two real reverse steps: c and the statistics loss."""
    path, scheduler = path_of(SCHEDULERS[name]), SCHEDULERS[name]
    if path.kind == "flow":  # each point of the schedule one of its steps
        mu = calculate_shift(400, 256, 4096, 0.5, 0.9) if scheduler.config.use_dynamic_shifting else None
        scheduler = scheduler.from_config(scheduler.config)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1e-3, 1000), mu=mu)
    assert path.kind == name.partition(",")[0]
    whole = 999 if name == "epsilon, zero snr" else len(scheduler.timesteps)  # of pure noise epsilon tells no image
    torch.testing.assert_close(path.t.float(), scheduler.timesteps.flip(0)[:whole].float())
    x_0, noise, *predictions = rand(4, 3, 4, 8, 8)
    for point in (0, 1, 162, len(path.t) - 1):
        a, s, times = path.a[point], path.s[point], scheduler.timesteps.flip(0)[point].expand(3)
        x_t, target = trainer.add_noise(x_0, noise, a, s), trainer.training_target(x_0, noise, a, s, path.kind)
        if path.kind == "flow":
            noised, wanted = scheduler.scale_noise(x_0, times, noise), noise - x_0
        else:
            noised, velocity = scheduler.add_noise(x_0, noise, times), scheduler.get_velocity(x_0, noise, times)
            wanted = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}[path.kind]
        torch.testing.assert_close(x_t, noised)
        torch.testing.assert_close(target, wanted)
        torch.testing.assert_close(trainer.predict_x0(target, x_t, a, s, path.kind), x_0, atol=5e-4, rtol=1e-3)
        steps = []
        for prediction in predictions:
            scheduler._step_index, generator = None, torch.Generator().manual_seed(5)
            steps.append(scheduler.step(prediction, times[0], x_t, generator=generator).prev_sample.double())
        x0, moved = [trainer.predict_x0(one, x_t, a, s, path.kind) for one in predictions], steps[0] - steps[1]
        near = {"rtol": 2e-3, "atol": 2e-3 * moved.abs().max().item(), "check_dtype": False}
        torch.testing.assert_close(path.c[point] * (x0[0] - x0[1]), moved, **near)
        loss = trainer.statistics_matching_loss(*(one.mean((2, 3)) for one in x0), path.c[point].expand(3))
        assert loss.tolist() == pytest.approx(moved.mean((2, 3)).square().sum(1).tolist(), rel=5e-3)


def test_by_default_statistics_matching_weighs_as_much_for_flow_as_10000_for_sd():
    sd = path_of(SCHEDULERS["epsilon, sd"])
    assert trainer.default_lambda_stat(sd) == trainer.default_lambda_stat(path_of(SCHEDULERS["sample, sd"])) == 10_000
    weight = 10_000 * (sd.c * sd.s / sd.a).square().mean().item()  # of a difference in epsilon
    for flow in (path_of(FlowMatchEulerDiscreteScheduler(shift=shift)) for shift in (1.0, 3.0)):
        found = trainer.default_lambda_stat(flow)
        assert found * (flow.c * flow.s).square().mean().item() == pytest.approx(weight, rel=2e-3)
    assert found == pytest.approx(360_000, rel=0.01)


def test_timesteps_follow_their_law_and_noise_is_a_function_of_seed_stream_pair_and_visit():
    quantile = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert trainer.draw_timesteps(quantile, 1000).tolist() == list(range(1000))
    logit = torch.special.logit((trainer.draw_timesteps(quantile, 1000, "logit_normal") + 0.5) / 1000)
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0, 1), abs=0.01)
    visits = [(pair, visit) for pair in range(200) for visit in range(2)]
    streams = [(0, "train"), (1, "train"), (0, "validation")]
    first, *others = (trainer.draw_noise(*stream, visits, (2, 4, 4), 1000)[0] for stream in streams)
    assert torch.equal(first[7:9], trainer.draw_noise(0, "train", visits[7:9], (2, 4, 4), 1000)[0])
    assert (first.mean().item(), first.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert len(set(torch.stack([first, *others])[:, :, 0, 0, 0].flatten().tolist())) == 3 * 400


def test_a_batch_holds_winners_then_losers_and_the_held_out_grid_follows_draw_timesteps():
    pairs = trainer.Pairs(
        latents=[torch.tensor([i, -i]).half().view(2, 1, 1, 1).expand(2, 4, 2, 2) for i in range(3)],
        label=torch.tensor([1, 0.5, 0.7]), sizes=torch.arange(18).view(3, 6), row=[5, 6, 7], caption=["a", "b", "a"],
        buckets=[np.arange(3)], key="", text={"a": {"embeds": torch.ones(3)}, "b": {"embeds": torch.zeros(3)}},
        paths={(2, 2): trainer.NoisePath(*(torch.arange(1200) + k for k in range(4)), "epsilon")},
    )  # fmt: skip
    visits = [(2, 0), (1, 1), (2, 2), (0, 3)]
    for scheme, points in (("none", [150, 450, 750, 1050]), ("logit_normal", [288, 505, 694, 911])):
        args = trainer.parse_args(["--pretrained_model_name_or_path", "none", "--weighting_scheme", scheme])
        batch = trainer.make_batch(pairs, visits, True, args, torch.device("cpu"))
        assert (batch.x_0.shape, batch.x_0.dtype, batch.noise.shape) == ((8, 4, 2, 2), torch.float32, (4, 4, 2, 2))
        assert batch.x_0[:, 0, 0, 0].tolist() == [2, 1, 2, 0, -2, -1, -2, 0]
        assert [values.tolist() for values in batch.path[:4]] == [[point + k for point in points] for k in range(4)]
        assert batch.label.tolist() == pytest.approx([0.7, 0.5, 0.7, 1])
        assert batch.text["embeds"][:, 0].tolist() == [1, 0, 1, 1]
        assert batch.sizes[:, 0].tolist() == [12, 6, 12, 0]


@pytest.mark.parametrize(("counts", "size"), [([10], 4), ([7, 2, 9], 4), ([64, 1], 16), ([5], 16)])
def test_every_pair_comes_once_an_epoch_and_no_batch_mixes_buckets(counts, size):
    ends = np.cumsum(counts)
    buckets = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
    batches, other = (list(itertools.islice(trainer.endless_batches(seed, buckets, size), 60)) for seed in (0, 1))
    seen = Counter(visit for batch in batches for visit in batch)
    assert max(seen.values()) == 1
    epochs = min(epoch for _, epoch in batches[-1]) - 1  # what an epoch leaves over comes in the next one's batches
    assert all(seen[pair, epoch] for pair in range(sum(counts)) for epoch in range(max(2, epochs)))
    for pairs in ([pair for pair, _ in batch] for batch in batches):
        (bucket,) = set(np.searchsorted(ends, pairs, side="right").tolist())
        assert len(pairs) == min(size, counts[bucket])
        # in a batch of an epoch's last and the next one's first pairs, a pair may meet itself, with other noise
        assert max(Counter(pairs).values()) <= (2 if counts[bucket] % len(pairs) else 1)
    assert batches != other


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_equal_the_pipelines_own_to_the_last_bit_and_so_do_pixels_and_latents(models, name):
    pipe, family, seen = load(models[name]), FAMILIES[name], []
    assert type(family) is trainer.FAMILIES[type(pipe).__name__]
    model = getattr(pipe, family.model)
    model.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    options = {"num_inference_steps": 2, "guidance_scale": 1, "height": 64, "width": 48}
    pipe("a person in red", output_type="latent", **options)
    calls, text = seen[:2], family.encode_text(pipe, ["a person in red"])
    sizes = torch.tensor([[64, 48, 0, 0, 64, 48]])
    for args, named, (own, *_) in calls:
        x_t, t = args or (named["hidden_states"], named["timestep"])
        assert torch.equal(family.predict(model, x_t, t.expand(1), text, sizes), own)
        assert own.std() > 0
    if name == "sdxl":
        assert torch.equal(calls[0][1]["added_cond_kwargs"]["time_ids"], sizes.float())
        assert not torch.equal(family.predict(model, x_t, t.expand(1), text, sizes + 8), own)
    if name == "sd3":  # a dynamic shift
        path = family.path(pipe, (64 // 8 // 2) * (48 // 8 // 2))
        torch.testing.assert_close(path.s[[999, 0]], pipe.scheduler.sigmas[:2])
        assert not torch.allclose(path.s[0], family.path(pipe, 64).s[0])
    drawn = {kind: pipe("a person", generator=torch.Generator().manual_seed(0), output_type=kind, **options).images
             for kind in ("latent", "pt")}  # fmt: skip
    pixels = family.to_pixels(pipe, drawn["latent"])  # by the VAE's scale, shift, mean and std
    torch.testing.assert_close(pipe.image_processor.postprocess(pixels, output_type="pt"), drawn["pt"])
    again = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(family.to_pixels(pipe, family.to_latents(pipe, pixels)), again)


def test_a_scheduler_of_another_kind_is_refused_and_the_sampler_draws_finite_latents_with_all_others(models):
    names = ["EDMEulerScheduler", "LCMScheduler", "TCDScheduler", "FlowMatchEulerDiscreteScheduler"]
    for own, family in [(getattr(diffusers, name)(), "sd") for name in names] + [(diffusers.DDIMScheduler(), "sd3")]:
        with pytest.raises(trainer.UserError, match=type(own).__name__):
            FAMILIES[family].path(SimpleNamespace(scheduler=own), 1)
    pipe = load(models["sd"])
    own_kinds = diffusers.DEISMultistepScheduler(beta_end=0.012), diffusers.SASolverScheduler(beta_end=0.012)
    for own in (*own_kinds, DPMSolverMultistepScheduler(lower_order_final=False)):
        pipe.scheduler = own
        pipe.scheduler = trainer.UNet().sampler(pipe)
        assert pipe.scheduler.config.beta_end == own.config.beta_end
        assert pipe("a person", num_inference_steps=3, output_type="latent").images.isfinite().all()


@pytest.fixture(scope="module")
def whole(models) -> dict:
    """The settings of `finished`: 20 pairs in steps of 6."""
    steps = {"gradient_accumulation_steps": 2, "train_batch_size": 3, "num_train_epochs": 2, "lr_warmup_steps": 4}
    saves = {"checkpointing_steps": 1, "checkpoints_total_limit": 3, "logging_steps": 1, "run_validation": True}
    return {"model": models["sdxl"], "max_train_steps": False, **steps, **saves}


@pytest.fixture(scope="module")
def finished(data, whole, tmp_path_factory) -> Path:
    """A run with all that one writes; nobody changes its folder."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    train(data, output, **whole)
    return output


def test_what_a_run_writes(finished):
    told = {"README.md", "metrics.jsonl", "training_settings.json", "validation.png", "validation", ".lock"}
    assert names_in(finished) == {LORA, *told, "checkpoint-2", "checkpoint-3", "checkpoint-4"}
    assert names_in(finished / "checkpoint-4") == {"model.safetensors", "state.pt", "run.json", LORA}
    assert_equal(read_weights(finished), read_weights(finished / "checkpoint-4"))
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert [line["lr"] for line in lines[:-1]] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4])
    trained, held_out = lines[-2:]
    names = trained.keys() - {"step", "grad_norm", "lr", "pairs_per_second"}
    assert {f"validation/{name}" for name in names} == held_out.keys() - {"step"}
    assert trained["loss"] == pytest.approx(trained["loss/dpo"] + trained["loss/statistics"])
    assert held_out["validation/loss/dpo"] != LOG_2


FIRST = {"max_train_steps": 1, "train_batch_size": 5}
STARTS = {  # and the parts of the LoRA
    "LoRA, bf16": ("sd", {"mixed_precision": "bf16"}, "unet"),
    "thrifty": ("sd", {"gradient_checkpointing": True}, "unet"),
    "zero terminal SNR": ("sd, zero SNR", {}, "unet"),
    "whole U-Net, bf16": ("sd", {"full_unet": True, "mixed_precision": "bf16"}, ""),
    "text encoder alone": ("sd", {"train_text_encoder": True, "freeze_unet": True}, "text_encoder"),
    "SDXL": ("sdxl", {"height": 48, "width": 32, "train_text_encoder": True}, "unet text_encoder text_encoder_2"),
    "SD 3": ("sd3", {}, "transformer"),
    "SD 3 without T5": ("sd3 without T5", {"train_text_encoder": True}, "transformer text_encoder text_encoder_2"),
    "whole SD 3": ("sd3", {"full_unet": True}, ""),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_first_step_starts_at_the_reference(data, models, tmp_path, monkeypatch, name):
    (model, options, parts), seen = STARTS[name], []
    family, predict = type(FAMILIES[model]), type(FAMILIES[model]).predict
    monkeypatch.setattr(family, "predict", lambda own, *args: seen.append(args) or predict(own, *args))
    weights = train(data, tmp_path / "run", model=models[model], **FIRST, **options)
    (first,) = read_metrics(tmp_path / "run")
    assert first["loss/dpo"] == LOG_2
    assert (first["loss/statistics"], first["rewards/margins"], first["error/winner_over_reference"]) == (0, 0, 0)
    assert first["grad_norm"] > 0
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert not parts or {key.split(".")[0] for key in weights} == set(parts.split())
    _, _, t, _, sizes = seen[0]
    assert torch.equal(*t.chunk(2))
    if name == "thrifty":
        for key, value in train(data, tmp_path / "plain", model=models[model], **FIRST).items():
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-3)
    if name == "SDXL":  # 64 x 64 pixels, scaled by 3 / 4, 8 cut off on each side
        assert sizes.tolist() == [[64, 64, 0, 8, 48, 32]] * 10
    if name == "SD 3":  # 48 x 48 pixels: 3 x 3 tokens decide the shift
        paths = [family().path(load(models[model]), tokens).t for tokens in (9, 1)]
        assert [torch.isin(t, own).all().item() for own in paths] == [True, False]


SAVED = {
    "all layers": ("sd", ["all"], {"train_text_encoder": True, "lora_alpha": 3}),
    "layers by name": ("sd", ["to_q", "conv1", "ff.net.2"], {}),
    "SDXL": ("sdxl", ["all"], {"train_text_encoder": True, "text_encoder_rank": 2}),
    "SD 3": ("sd3", ["all"], {"train_text_encoder": True}),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_lora_gives_a_pipeline_the_outputs_of_training(data, models, tmp_path, monkeypatch, name):
    (model, layers, options), seen, own = SAVED[name], [], trainer.pair_losses
    monkeypatch.setattr(trainer, "pair_losses", lambda policy, *rest: seen.append(policy) or own(policy, *rest))
    options = options | {"model": models[model], "lora_layers": layers, "export_kohya": model != "sd3"}
    weights = train(data, tmp_path / "run", rank=4, learning_rate=3e-2, max_train_steps=2, **options)
    assert any("conv1" in key or "norm1.linear" in key for key in weights)
    policy, base, family, prompt = seen[0], load(models[model]), FAMILIES[model], ["a person in red"]
    x_t, t, sizes = rand(1, base.vae.config.latent_channels, 8, 8), torch.tensor([500]), torch.tensor([[64] * 6])
    saved = [tmp_path / "run"]
    if model != "sd3":
        saved.append(load_file(tmp_path / "run" / "run.kohya.safetensors"))
        alphas = {value.item() for key, value in saved[1].items() if key.startswith("lora_unet") and "alpha" in key}
        assert alphas == {options.get("lora_alpha", 4)}
    with torch.no_grad():
        text = family.encode_text(policy.pipe if "train_text_encoder" in options else base, prompt)
        both = (policy.model, getattr(base, family.model))
        trained, untrained = (family.predict(one, x_t, t, text, sizes) for one in both)
        assert not torch.allclose(untrained, trained, atol=1e-2)
        for lora in saved:
            pipe = load(models[model])
            pipe.load_lora_weights(lora)
            torch.testing.assert_close(family.encode_text(pipe, prompt), text, atol=1e-4, rtol=1e-4)
            loaded = family.predict(getattr(pipe, family.model), x_t, t, text, sizes)
            torch.testing.assert_close(loaded, trained, atol=1e-4, rtol=1e-4)


STILL = {"max_train_steps": 1, "learning_rate": 1e-12}


@pytest.fixture(scope="module")
def stage_1(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("stage-1")
    train(data, output, rank=3, lora_alpha=6, max_train_steps=3, learning_rate=1e-2)
    return output


def reference_errors(run: Path) -> list[float]:
    first = read_metrics(run)[0]
    return [first[f"error/{side}"] - first[f"error/{side}_over_reference"] for side in ("winner", "loser")]


def test_a_stage_starts_where_the_one_before_ended_and_is_measured_against_it_or_the_base(data, stage_1, tmp_path):
    before, loss = read_weights(stage_1), {}
    for against in ("initial", "base"):
        weights = train(data, tmp_path / against, initial_lora=stage_1, reference=against, **STILL)
        torch.testing.assert_close(weights, before, atol=1e-6, rtol=0)
        loss[against] = read_metrics(tmp_path / against)[0]["loss/dpo"]
    assert loss["initial"] == LOG_2
    assert abs(loss["base"] - math.log(2)) > 1e-3
    train(data, tmp_path / "plain", **STILL)
    assert reference_errors(tmp_path / "base") == pytest.approx(reference_errors(tmp_path / "plain"), rel=1e-5)
    assert reference_errors(tmp_path / "initial") != pytest.approx(reference_errors(tmp_path / "plain"), rel=1e-3)
    for rate in (1e-12, 1e-3):  # the reference does not move while a later stage trains
        train(data, tmp_path / str(rate), initial_lora=stage_1, logging_steps=4, learning_rate=rate)
    assert reference_errors(tmp_path / "0.001") == pytest.approx(reference_errors(tmp_path / "1e-12"), rel=1e-5)


def test_a_whole_unet_starts_from_a_lora_or_a_unet_in_a_folder_or_on_the_hub(data, stage_1, tmp_path):
    merged, hub = load(PIPELINE), tmp_path / "cache" / "models--someone--stage-1"  # as if it had been fetched
    merged.load_lora_weights(stage_1)
    merged.fuse_lora()
    merged.unload_lora_weights()
    folder, expected = hub / "snapshots" / ("0" * 40), merged.unet.state_dict()
    merged.unet.save_pretrained(folder / "unet")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(folder.name)
    starts = {
        "lora": {"initial_lora": stage_1},
        "hub": {"initial_unet": "someone/stage-1", "cache_dir": tmp_path / "cache"},
        "base": {"initial_unet": folder / "unet", "reference": "base"},
    }
    for name, initial in starts.items():
        weights = train(data, tmp_path / name, full_unet=True, **initial, **STILL)
        torch.testing.assert_close(weights, dict(expected), atol=1e-5, rtol=1e-4)
        assert (read_metrics(tmp_path / name)[0]["loss/dpo"] == LOG_2) == (name != "base")


RESUMED = {
    "whole U-Net, averaged": ("sdxl", {"full_unet": True, "ema": 0.9}),
    "whole U-Net, 8-bit Adam": ("sdxl", {"full_unet": True, "use_8bit_adam": True, "lr_scheduler": "cosine"}),
    "text encoders": ("sdxl", {"train_text_encoder": True, "text_encoder_rank": 2}),
    "SD 3": ("sd3", {}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_also_with_copied_folders(data, models, tmp_path, monkeypatch, name):
    kind, options = RESUMED[name]
    options = options | {"logging_steps": 1}
    train(data, tmp_path / "whole", model=models[kind], **options)
    assert isinstance(interrupt(data, tmp_path / "run", 4, model=models[kind], **options), KeyboardInterrupt)
    moved, model = shutil.copytree(data, tmp_path / "data"), shutil.copytree(models[kind], tmp_path / "model")
    for path in (*moved.rglob("*"), *model.rglob("*")):
        os.utime(path, (0, 0))
    monkeypatch.setattr(type(FAMILIES[kind]), "to_latents", lambda *_: pytest.fail("encoded again"))
    train(moved, tmp_path / "run", model=model, resume_from_checkpoint="latest", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert names_in(moved / "encoded") == names_in(data / "encoded")
    assert not [file for file in names_in(tmp_path / "whole") if file.startswith("validation")]


FILES = resource.getrlimit(resource.RLIMIT_FSIZE)
ENDS = {  # before which batch, how, what is left, and a setting
    "while gradients accumulate": (8, stop, ["checkpoint-1", "checkpoint-2", "checkpoint-3"], {}),
    "SIGTERM": (3, lambda: os.kill(os.getpid(), signal.SIGTERM), ["checkpoint-2"], {"checkpointing_steps": 99}),
    "a full disk": (5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, FILES[1])),
                    ["checkpoint-1", "checkpoint-2"], {}),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_a_run_that_ends_early_keeps_its_good_checkpoints_and_is_carried_on(data, whole, finished, tmp_path, how):
    batch, act, left, setting = ENDS[how]
    try:
        ended = interrupt(data, tmp_path, batch, act, **whole | setting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FILES)
    assert how != "SIGTERM" or ended.code == 128 + signal.SIGTERM
    assert [path.name for path in trainer.checkpoints(tmp_path)] == left
    train(data, tmp_path, **whole | setting, resume_from_checkpoint="latest")
    assert_same_run(finished, tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_another_run_is_not_mixed_with_this_one(data, models, whole, finished, tmp_path):
    rows = [row | {"caption": "someone else"} for row in make_rows(10)]
    for told, changed in {
        r"learning_rate \(0.001 there, 0.002 here\)$": {"learning_rate": 2e-3},
        r"pairs_per_step \(6 there, 4 here\)": {"train_batch_size": 2},
        r"data \(": {"train_data_dir": write_data(tmp_path / "pairs", rows, make_rows(3, first=50))},
        r"model \(": {"model": with_scheduler(models["sdxl"], tmp_path / "model", prediction_type="v_prediction")},
    }.items():
        again = whole | changed | {"resume_from_checkpoint": finished / "checkpoint-4"}
        with pytest.raises(trainer.UserError, match=f"checkpoint-4 is of another run: {told}"):
            train(data, tmp_path / "run", **again)
    with pytest.raises(trainer.UserError, match=f"^{finished} holds a run already: .*--resume_from_checkpoint latest"):
        train(data, finished)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(trainer.UserError, match=f"^another run is writing to --output_dir {tmp_path}$"):
            train(data, tmp_path)


def test_kill_9_leaves_complete_checkpoints_and_resume_gives_the_uninterrupted_weights(data, tmp_path):
    output, settings = tmp_path / "run", {"max_train_steps": 10, "checkpointing_steps": 1}
    command = flags(SMALL | settings | {"train_data_dir": data, "output_dir": output})
    process = subprocess.Popen([sys.executable, ROOT / "train_dpo_human.py", *command], stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (output / "checkpoint-3").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (output / LORA).exists()
    for checkpoint in trainer.checkpoints(output):
        assert names_in(checkpoint) == {"model.safetensors", "state.pt", "run.json", LORA}
    resumed = train(data, output, **settings, resume_from_checkpoint="latest")
    assert_equal(train(data, tmp_path / "whole", **settings), resumed)
    assert not list(output.glob("*.partial"))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_names_the_rows(data, tmp_path, monkeypatch, kind):
    own, before, calls = trainer.pair_losses, {}, itertools.count(1)

    def losses(policy, *rest):
        before.update(policy=policy, weights={name: value.clone() for name, value in policy.trained().items()})
        found = own(policy, *rest)
        if next(calls) == 3:
            found["loss"].register_hook(lambda gradient: gradient * math.inf)
            found["loss"] = found["loss"] * torch.tensor([1, math.nan if kind == "loss" else 1])
        return found

    monkeypatch.setattr(trainer, "pair_losses", losses)
    *_, pairs = itertools.islice(trainer.endless_batches(0, [np.arange(10)], 2), 3)
    rows = sorted(pair for pair, _ in (pairs if kind == "gradient" else pairs[1:]))
    with pytest.raises(trainer.UserError, match=f"not finite in step 3, rows {', '.join(map(str, rows))} of the data"):
        train(data, tmp_path / "run", logging_steps=1)
    assert_equal(before["weights"], before["policy"].trained())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert [path.name for path in trainer.checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_under_fp16_an_overflow_moves_neither_weights_nor_average_nor_schedule(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", HalfPrecision)
    settings = {"logging_steps": 1, "checkpointing_steps": 1, "max_train_steps": 2, "ema": 0.9}
    train(data, tmp_path / "run", model=models["sdxl"], lr_scheduler="linear", **settings)
    entries = read_metrics(tmp_path / "run")
    assert [entry["grad_norm"] is None for entry in entries] == [True, False]  # infinity is null in metrics.jsonl
    assert [entry["lr"] for entry in entries] == [1e-3, 1e-3]
    saved = [torch.load(tmp_path / "run" / f"checkpoint-{step}" / "state.pt") for step in (1, 2)]
    assert [state["ema"]["optimization_step"] for state in saved] == [0, 1]
    weights = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2)]
    assert [any(own[name].any() for name in own if "lora_B" in name) for own in weights] == [False, True]


def test_the_alarm_rings_once_where_the_winners_error_keeps_rising(data, models, tmp_path, monkeypatch, capsys):
    rising = [0.05 * i for i in range(10)]
    cases = ([0.4] * 10, rising, rising[1:], rising[::-1], [0.5 * error for error in rising])  # good runs rise to 12 %
    assert [trainer.keeps_rising(errors) for errors in cases] == [False, True, False, False, False]
    own, relative = trainer.pair_losses, itertools.count(0, 0.05)
    monkeypatch.setattr(trainer, "pair_losses", lambda *args: own(*args) | {
        "error/winner_relative": torch.full((2,), next(relative))})  # fmt: skip
    train(data, tmp_path / "run", logging_steps=1, max_train_steps=13, model=models["sdxl"])
    assert "".join(capsys.readouterr()).count("the run diverges") == 1


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_validation_draws_what_a_pipeline_draws_whatever_the_batch_size(data, models, tmp_path, monkeypatch, name):
    own, drawn = trainer.draw_images, []
    monkeypatch.setattr(trainer, "draw_images", lambda *args: drawn.append((args[1], own(*args))) or drawn[-1][1])
    for size in (1, 3):
        settings = {"run_validation": True, "num_validation_images": 3, "train_batch_size": size}
        train(data, tmp_path / str(size), model=models[name], **settings, **STILL)
        held_out = read_metrics(tmp_path / str(size))[-1]
        assert held_out["validation/loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    pipe, size = load(models[name]), {"sd": 64}.get(name, 48)
    pipe.scheduler, prompts = FAMILIES[name].sampler(pipe), drawn[0][0]
    seeds = [torch.Generator().manual_seed(trainer.image_seed(0, prompt, 0)) for prompt in prompts]
    options = {"num_inference_steps": 1, "guidance_scale": {"sd3": 4.5}.get(name, 5), "height": size, "width": size}
    images = np.stack(pipe(prompts, generator=seeds, **options).images)
    assert len(drawn) == 4  # before and after, in chunks of 1 and at once
    assert max(np.abs(np.stack(own).astype(int) - images).max() for _, own in drawn) <= 1


def test_two_processes_train_the_same_weights_as_one_and_resume_bit_for_bit(data, models, tmp_path):
    settings = {"model": models["sdxl"], "train_text_encoder": True, "max_train_steps": 3, "run_validation": True}
    halved = settings | {"learning_rate": 1e-4, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    two = two_processes(data, tmp_path / "two", **halved)
    again = halved | {"resume_from_checkpoint": tmp_path / "two" / "checkpoint-2"}
    assert_equal(two, two_processes(data, tmp_path / "resumed", **again))
    one = train(data, tmp_path / "one", **settings, learning_rate=1e-4, train_batch_size=4)
    for key, value in two.items():  # Adam makes a step of a gradient that is nearly 0
        assert (value - one[key]).abs().mean() < 2e-5
    for theirs, ours in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for key in theirs.keys() & {"loss", "error/winner", "grad_norm", "validation/loss", "validation/error/loser"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


# diffusers' own command lines, of examples/research_projects/diffusion_dpo
COMMON = """--output_dir={output} --mixed_precision=no --dataset_name={data} --gradient_accumulation_steps=2
--gradient_checkpointing --use_8bit_adam --rank=8 --learning_rate=1e-5 --report_to=tensorboard --lr_scheduler=constant
--lr_warmup_steps=0 --max_train_steps=2 --checkpointing_steps=1 --run_validation --seed=0 --push_to_hub
--pretrained_model_name_or_path={model}"""
README = {
    "sd": "--resolution=64 --train_batch_size=4 --validation_steps=2",
    "sdxl": "--pretrained_vae_model_name_or_path={vae} --train_batch_size=2 --validation_steps=1",
}


@pytest.mark.parametrize("name", README)
def test_diffusers_command_line_runs_and_uploads_weights_card_and_picture(data, models, tmp_path, monkeypatch, name):
    calls, output, vae = [], tmp_path / "diffusion-dpo", tmp_path / "vae"
    url = huggingface_hub.RepoUrl("https://huggingface.co/someone/diffusion-dpo")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **named: calls.append((args, named)) or url)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **named: calls.append(named))
    load(models["sdxl"]).vae.save_pretrained(vae)
    command = f"{COMMON} {README[name]}".format(model=models[name], vae=vae, data=data, output=output)
    command += f" --hub_token hf_secret --encoded_dir {output}/encoded --num_validation_images 1"
    run_main(f"{command} --validation_inference_steps 2".split())
    (created, options), upload = calls
    assert (*created, options["token"]) == ("diffusion-dpo", "hf_secret")
    assert (upload["repo_id"], upload["token"]) == ("someone/diffusion-dpo", "hf_secret")
    assert Path(upload["folder_path"]) == output
    written = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    assert {"checkpoint-1/model.safetensors", ".lock", "metrics.jsonl", "training_settings.json"} <= written.keys()
    assert list((output / "logs").rglob("events.out*"))
    patterns = {key: upload.get(key) for key in ("allow_patterns", "ignore_patterns")}
    sent = huggingface_hub.utils.filter_repo_objects(written, **patterns)
    assert set(sent) == {LORA, "README.md", "validation.png"}
    assert not [name for name, path in written.items() if b"hf_secret" in path.read_bytes()]
    card = (output / "README.md").read_text()
    assert 'load_lora_weights("someone/diffusion-dpo")' in card
    assert not [place for place in (tmp_path, data, models[name].parent, "/tmp", ROOT) if str(place) in card]
    settings = json.loads((output / "training_settings.json").read_text())["settings"]
    assert settings["resolution"] == {"sd": 64, "sdxl": 48}[name]  # SDXL's command names none: the model's own
    weights = read_weights(output)
    assert {key.split(".")[0] for key in weights} == {"unet"}
    assert all(value.any() for key, value in weights.items() if ".up." in key)
