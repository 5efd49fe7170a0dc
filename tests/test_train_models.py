# SPDX-License-Identifier: Apache-2.0
"""What train_dpo_human.py trains, against which reference: stages, text encoders, SDXL, precomputed references."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from test_train_dpo_human import PIPELINE, assert_equal, data, make_rows, read_metrics, train, write_data  # noqa: F401
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import train_dpo_human as trainer


LORA = "pytorch_lora_weights.safetensors"


def first_metrics(output) -> dict:
    return read_metrics(output)[0]


@pytest.fixture(scope="module")
def easy(data, tmp_path_factory):  # noqa: F811
    """A finished run of the first stage, text encoder and U-Net together."""
    output = tmp_path_factory.mktemp("stages") / "easy"
    train(data, output, train_text_encoder=True, text_encoder_rank=4, rank=2, max_train_steps=3, export_kohya=True)
    return output


# ---- Text encoder ---------------------------------------------------------------------------------------------------


def test_unet_and_text_encoder_go_into_one_file_that_pipelines_load(easy):
    names = load_file(easy / LORA).keys()
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    assert all(name.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for name in names)
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    base = pipe.encode_prompt("a person", "cpu", 1, False)[0]
    pipe.load_lora_weights(easy)
    assert pipe.text_encoder.peft_config["default_0"].r == 4
    assert pipe.unet.peft_config["default_0"].r == 2
    assert not torch.allclose(pipe.encode_prompt("a person", "cpu", 1, False)[0], base, atol=1e-5)


def test_the_text_encoder_alone(data, tmp_path):  # noqa: F811
    settings = {"train_text_encoder": True, "freeze_unet": True, "text_encoder_rank": 4, "max_train_steps": 2}
    weights = train(data, tmp_path / "run", logging_steps=1, **settings)
    assert {name.split(".")[0] for name in weights} == {"text_encoder"}
    assert max(value.abs().max().item() for name, value in weights.items() if ".up." in name) > 0
    assert first_metrics(tmp_path / "run")["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_frozen_text_encoder_gives_the_same_run_cached_or_not(data, tmp_path):  # noqa: F811
    cached = train(data, tmp_path / "cached", max_train_steps=2)
    live = train(data, tmp_path / "live", max_train_steps=2, train_text_encoder=True, text_encoder_rank=1)
    for name in cached:  # the first step is the same, the second sees a text encoder that has hardly moved
        torch.testing.assert_close(cached[name], live[name], atol=5e-3, rtol=0.1)


def test_kohyas_keys_load_as_diffusers_own(easy):
    kohya = load_file(easy / "easy.kohya.safetensors")
    parts = r"lora_(unet|te)_[a-z0-9_]+"
    assert all(trainer.re.fullmatch(rf"{parts}\.(alpha|lora_down\.weight|lora_up\.weight)", key) for key in kohya)
    block = "mid_block_attentions_0_transformer_blocks_0_attn1"
    assert {f"lora_unet_{block}_to_q.alpha", f"lora_unet_{block}_to_out_0.lora_up.weight"} <= kohya.keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in kohya

    def latents(*weights) -> torch.Tensor:
        pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if weights:
            pipe.load_lora_weights(*weights)
        generator = torch.Generator().manual_seed(0)
        return pipe("a person", generator=generator, num_inference_steps=2, output_type="latent").images

    ours, theirs = latents(easy), latents(kohya)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, latents(), atol=1e-3)


# ---- Stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_1(data, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("stages") / "stage_1"
    train(data, output, rank=3, lora_alpha=6, max_train_steps=4)
    return output


def test_a_stage_starts_where_the_one_before_ended(data, stage_1, tmp_path):  # noqa: F811
    weights = train(data, tmp_path / "run", initial_lora=stage_1, max_train_steps=1, logging_steps=1)
    first, before = first_metrics(tmp_path / "run"), load_file(stage_1 / LORA)
    assert first["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)  # the reference is the initial LoRA
    assert weights.keys() == before.keys()
    moved = max((weights[name] - before[name]).abs().max().item() for name in weights)
    assert 0 < moved < 2e-3  # one step of Adam at 1e-3
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "run")
    assert (pipe.unet.peft_config["default_0"].r, pipe.unet.peft_config["default_0"].lora_alpha) == (3, 6)


def test_a_lora_of_convolutions_too_is_saved_so_that_all_of_it_loads(data, tmp_path):  # noqa: F811
    """diffusers renames attention alone, and of a file with both kinds of names it would load one kind."""
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    state = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "wide", unet_lora_layers=state)
    train(data, tmp_path / "run", initial_lora=tmp_path / "wide", max_train_steps=1, learning_rate=1e-12)
    loaded = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    loaded.load_lora_weights(tmp_path / "run")
    found = get_peft_model_state_dict(loaded.unet, adapter_name=next(iter(loaded.unet.peft_config)))
    assert found.keys() == state.keys()
    assert any("conv1" in key for key in found)
    for key, value in state.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def test_against_the_base_model_a_later_stage_starts_ahead(data, stage_1, tmp_path):  # noqa: F811
    settings = {"max_train_steps": 1, "logging_steps": 1, "learning_rate": 1e-9}
    train(data, tmp_path / "run", initial_lora=stage_1, reference="base", **settings)
    train(data, tmp_path / "plain", **settings)
    ours, plain = first_metrics(tmp_path / "run"), first_metrics(tmp_path / "plain")
    assert ours["loss/dpo"] != pytest.approx(np.log(2), abs=1e-6)
    assert ours["loss/statistics"] > 0
    # the same reference: error less error over the reference
    for side in ("winner", "loser"):
        base = [run[f"error/{side}"] - run[f"error/{side}_over_reference"] for run in (ours, plain)]
        assert base[0] == pytest.approx(base[1], rel=1e-5)


def test_the_reference_does_not_move(data, stage_1, tmp_path):  # noqa: F811
    """Learning rate high, then 0 steps more: what the loss measures against is still the first stage."""
    train(data, tmp_path / "run", initial_lora=stage_1, max_train_steps=3, logging_steps=1)
    train(data, tmp_path / "none", initial_lora=stage_1, max_train_steps=3, logging_steps=1, learning_rate=1e-12)
    ours, still = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "none")
    for step in range(3):
        for side in ("winner", "loser"):
            base = [run[step][f"error/{side}"] - run[step][f"error/{side}_over_reference"] for run in (ours, still)]
            assert base[0] == pytest.approx(base[1], rel=1e-5)
    assert ours[2]["error/winner"] != pytest.approx(still[2]["error/winner"], rel=1e-6)


@pytest.mark.parametrize("kind", ["initial_lora", "initial_unet"])
def test_the_whole_unet_starts_from_an_earlier_stage(data, stage_1, tmp_path, kind):  # noqa: F811
    settings = {"full_unet": True, "max_train_steps": 1, "logging_steps": 1, "learning_rate": 1e-9}
    initial = stage_1
    if kind == "initial_unet":
        initial = tmp_path / "stage_1"
        train(data, initial, full_unet=True, max_train_steps=2)
    for against in ("initial", "base"):
        train(data, tmp_path / against, reference=against, **{kind: initial}, **settings)
    assert first_metrics(tmp_path / "initial")["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)
    assert first_metrics(tmp_path / "base")["loss/dpo"] != pytest.approx(np.log(2), abs=1e-6)


# ---- The reference measured beforehand ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"full_unet": True, "learning_rate": 1e-4}, {"train_text_encoder": True}])
def test_a_precomputed_reference_changes_not_a_bit(data, tmp_path, options):  # noqa: F811
    """10 pairs, 10 steps of 2: two epochs, so that K = 2 are the very draws of the run on line."""
    options = {"max_train_steps": 10, "text_encoder_rank": 2} | options
    live = train(data, tmp_path / "live", **options)
    beforehand = train(data, tmp_path / "beforehand", precompute_reference=2, **options)
    assert_equal(live, beforehand)
    keys = ("loss", "loss/statistics", "rewards/margins", "error/loser_over_reference")
    logged = [[[line[key] for key in keys] for line in read_metrics(tmp_path / run) if "loss" in line]
              for run in ("live", "beforehand")]  # fmt: skip
    assert logged[0] == logged[1]


def test_with_fewer_draws_they_come_again(data, tmp_path, capsys):  # noqa: F811
    train(data, tmp_path / "run", precompute_reference=1, max_train_steps=10, logging_steps=5, learning_rate=1e-12)
    first, second = (line for line in read_metrics(tmp_path / "run") if "loss" in line)
    assert first["error/winner"] == pytest.approx(second["error/winner"], rel=1e-5)  # the same draws in both epochs
    assert "warning" not in capsys.readouterr().out
    train(data, tmp_path / "long", precompute_reference=1, max_train_steps=9, train_batch_size=10)
    assert "9 epochs over 1 draws a pair repeat each one 9 times" in capsys.readouterr().out


def test_a_precomputed_reference_is_measured_once(data, tmp_path, monkeypatch):  # noqa: F811
    options = {"precompute_reference": 1, "max_train_steps": 2, "encoded_dir": tmp_path / "encoded"}
    train(data, tmp_path / "one", **options)
    monkeypatch.setattr(trainer, "reserve", lambda *_: pytest.fail("something was measured again"))
    train(data, tmp_path / "two", **options)


def test_the_frozen_copy_is_gone_with_a_precomputed_reference(data, tmp_path, monkeypatch):  # noqa: F811
    seen = {}
    own = trainer.train
    monkeypatch.setattr(trainer, "train", lambda run, step: seen.update(run=run) or own(run, step))
    train(data, tmp_path / "run", full_unet=True, precompute_reference=1, max_train_steps=1)
    assert seen["run"].frozen is None
    train(data, tmp_path / "live", full_unet=True, max_train_steps=1)
    assert seen["run"].frozen is not None


# ---- Averaged weights, optimisers -----------------------------------------------------------------------------------


def test_ema_writes_the_average_and_trains_on(data, tmp_path):  # noqa: F811
    options = {"full_unet": True, "learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 4}
    plain = train(data, tmp_path / "plain", **options)
    averaged = train(data, tmp_path / "averaged", ema=0.5, **options)
    base = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet").state_dict()
    name = max(base, key=lambda key: (plain[key] - base[key].float()).abs().max())
    moved, behind = (plain[name] - base[name]).abs().mean(), (averaged[name] - base[name]).abs().mean()
    assert 0 < behind < moved
    latest = load_file(tmp_path / "averaged" / "checkpoint-4" / "model.safetensors")
    assert torch.equal(latest[f"unet.{name}"], plain[name])  # the average is not trained on


@pytest.mark.parametrize("optimizer", sorted(trainer.OPTIMIZERS))
def test_every_optimiser_takes_a_step(optimizer, tmp_path):
    weight = torch.nn.Parameter(torch.ones(64, 128))
    args = trainer.parse_args(["--optimizer", optimizer, "--learning_rate", "0.01"])
    chosen = trainer.make_optimizer([weight], args)
    assert f"{type(chosen).__module__}.{type(chosen).__name__}".startswith(trainer.OPTIMIZERS[optimizer].split(".")[0])
    if "paged" in optimizer:
        pytest.skip("paged memory needs a GPU")
    weight.grad = torch.ones_like(weight)
    chosen.step()
    assert (weight < 1).all()


# ---- SDXL, SD 2 -----------------------------------------------------------------------------------------------------


def tiny_sdxl(folder, **unet):
    """A StableDiffusionXLPipeline with two text encoders, pooled embeddings and time ids, and random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    size = {"intermediate_size": 37, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(hidden_size=32, projection_dim=32, **size, **ends)
    net = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32, scaling_factor=0.13,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, unet=net, text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


SDXL = {"resolution": 32, "validation_inference_steps": 1, "logging_steps": 1, "max_train_steps": 2}


def test_sdxl_trains_unet_and_both_text_encoders(data, sdxl, tmp_path):  # noqa: F811
    options = SDXL | {"pretrained_model_name_or_path": sdxl, "train_text_encoder": True, "text_encoder_rank": 2}
    weights = train(data, tmp_path / "run", export_kohya=True, **options)
    assert {name.split(".")[0] for name in weights} == {"unet", "text_encoder", "text_encoder_2"}
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(tmp_path / "run")
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        assert module.peft_config
    kohya = load_file(tmp_path / "run" / "run.kohya.safetensors")
    assert {key.split("_")[1] for key in kohya} == {"unet", "te1", "te2"}
    again = StableDiffusionXLPipeline.from_pretrained(sdxl)
    again.load_lora_weights(kohya)
    images = [
        p("a person", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent",
          height=32, width=32).images for p in (pipe, again)
    ]  # fmt: skip
    torch.testing.assert_close(*images, atol=1e-4, rtol=1e-4)


def test_sdxls_first_step_starts_at_the_reference_and_reads_pooled_text_and_sizes(data, sdxl, tmp_path):  # noqa: F811
    train(data, tmp_path / "run", pretrained_model_name_or_path=sdxl, **SDXL)
    assert first_metrics(tmp_path / "run")["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)
    cache = sorted(path.name.split("-")[0] for path in (tmp_path / "run" / "cache").iterdir())
    assert {"prompt_embeds", "pooled_prompt_embeds"} <= set(cache)
    seen = []
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    policy = trainer.Policy(pipe, pipe.unet, False, False)
    pipe.unet.forward = lambda *args, **kwargs: seen.append(kwargs) or (args[0],)
    text = {name: torch.full((2, 2, 4), i) for i, name in enumerate(("prompt_embeds", "pooled_prompt_embeds"))}
    policy(torch.zeros(4, 4, 8, 8), torch.zeros(4), text, torch.arange(12).view(2, 6))
    added = seen[0]["added_cond_kwargs"]
    assert added["time_ids"].tolist() == 2 * torch.arange(12).view(2, 6).tolist()
    assert added["text_embeds"].shape == (4, 2, 4)


def test_the_predictions_are_those_of_the_pipelines_own_call(data, sdxl, tmp_path, monkeypatch):  # noqa: F811
    """What the U-Net gets in training (embeddings, pooled text, time ids) is what SDXL's own pipeline gives it."""
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipe.set_progress_bar_config(disable=True)
    seen, own = [], pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: seen.append(kwargs) or own(*args, **kwargs)
    pipe("a person", num_inference_steps=1, guidance_scale=1.0, height=32, width=32, output_type="latent")
    text = trainer.encode_captions(pipe, ["a person"])
    torch.testing.assert_close(seen[0]["encoder_hidden_states"], text["prompt_embeds"])
    torch.testing.assert_close(seen[0]["added_cond_kwargs"]["text_embeds"], text["pooled_prompt_embeds"])
    rows = make_rows(2)
    seen_pairs = {}
    monkeypatch.setattr(trainer, "train", lambda run, step: seen_pairs.update(run.pairs) or {})
    train(write_data(tmp_path / "pairs", rows), tmp_path / "run", pretrained_model_name_or_path=sdxl,
          **SDXL | {"resolution": 64})  # fmt: skip
    ids = seen_pairs["train"].time_ids[0].tolist()  # images of 64 x 64, resized to nothing else
    assert ids == [64, 64, 0, 0, 64, 64]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_zero_terminal_snr(data, tmp_path, prediction_type):  # noqa: F811
    import shutil

    model = shutil.copytree(PIPELINE, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    file.write_text(json.dumps(config))
    options = {"pretrained_model_name_or_path": model, "resolution": 64, "max_train_steps": 1, "logging_steps": 1}
    if prediction_type == "epsilon":
        with pytest.raises(trainer.UserError, match="zero terminal SNR"):
            train(data, tmp_path / "run", **options)
        options |= {"timestep_range": "0 999"}
    else:
        options |= {"timestep_range": "999 1000"}
    settings = {key: value for key, value in options.items() if key != "timestep_range"}
    from test_train_dpo_human import SMALL, flags

    argv = flags(SMALL | settings | {"train_data_dir": data, "output_dir": tmp_path / "fine"})
    trainer.main(trainer.parse_args([*argv, "--timestep_range", *options["timestep_range"].split()]))
    first = first_metrics(tmp_path / "fine")
    assert np.isfinite(list(first.values())).all()
    assert first["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_frozen_copy_rounds_as_the_policy_in_bf16(data, tmp_path):  # noqa: F811
    settings = {"full_unet": True, "mixed_precision": "bf16", "max_train_steps": 1, "logging_steps": 1}
    train(data, tmp_path / "run", **settings)
    first = first_metrics(tmp_path / "run")
    assert first["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["loss/statistics"] == 0


def test_a_frozen_lora_stays_frozen(data, stage_1, tmp_path):  # noqa: F811
    settings = {"initial_lora": stage_1, "train_text_encoder": True, "freeze_unet": True, "text_encoder_rank": 2}
    weights = train(data, tmp_path / "run", max_train_steps=2, **settings)
    before = load_file(stage_1 / LORA)
    assert_equal(before, {name: value for name, value in weights.items() if name.startswith("unet.")})
    assert any(name.startswith("text_encoder.") for name in weights)
    checkpoint = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert {name.split(".")[0] for name in checkpoint} == {"text_encoders"}


def test_with_buckets_every_pair_is_measured_at_every_draw(tmp_path, monkeypatch):
    import io

    from PIL import Image

    rows = make_rows(7)
    for row in rows[:3]:
        for side in ("jpg_0", "jpg_1"):
            file = io.BytesIO()
            Image.open(io.BytesIO(row[side])).resize((48, 80)).save(file, "JPEG")
            row[side] = file.getvalue()
    seen, own = {}, trainer.train
    monkeypatch.setattr(trainer, "train", lambda run, step: seen.update(run.pairs) or own(run, step))
    settings = {"aspect_ratio_buckets": True, "precompute_reference": 3, "max_train_steps": 2}
    train(write_data(tmp_path / "pairs", rows), tmp_path / "run", **settings)
    assert len(seen["train"].latents) == 2
    assert (seen["train"].reference[:, :, :2] > 0).all()


def test_overwriting_leaves_files_that_no_run_wrote(data, tmp_path):  # noqa: F811
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious.safetensors").write_bytes(b"mine")
    for _ in range(2):
        train(data, tmp_path / "models", overwrite=True, max_train_steps=1)
    assert (tmp_path / "models" / "precious.safetensors").read_bytes() == b"mine"
