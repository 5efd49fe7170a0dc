# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: what a model is drawn with, its options, personalisation, and folders of finished images."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_eval_human import PROMPTS, WORLD, ev, flags, pixels, run, write_inputs
from train_helpers import tiny_sdxl
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


STEPS, GUIDANCE, SEEDS = 4, 2.0, [1, 2, 3]
TEXTS = PROMPTS[:3]


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    """Folders with a LoRA of the U-Net, of the text encoder, of both, of another person, and unet/ + text_encoder/."""
    folder = tmp_path_factory.mktemp("loras")
    pipe = StableDiffusionPipeline.from_pretrained(WORLD / "pipeline", safety_checker=None, torch_dtype=torch.float32)
    pipe.text_encoder.text_projection = None
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"])
    parts = {"unet": config, "text_encoder": LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for seed, name in enumerate(("unet", "text_encoder", "person")):
        module = "unet" if name == "person" else name
        part = getattr(pipe, module)
        part.add_adapter(parts[module], adapter_name=name)
        state = get_peft_model_state_dict(part, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        size = 0.3 if module == "unet" else 1.0
        states[name] = {key: size * torch.randn(v.shape, generator=generator) for key, v in state.items()}
    text = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in states["text_encoder"].items()}
    save = StableDiffusionPipeline.save_lora_weights
    save(folder / "unet_lora", unet_lora_layers=states["unet"])
    save(folder / "text_lora", text_encoder_lora_layers=text)
    save(folder / "both", unet_lora_layers=states["unet"], text_encoder_lora_layers=text)
    save(folder / "person", unet_lora_layers=states["person"])
    unet = UNet2DConditionModel.from_pretrained(WORLD / "pipeline", subfolder="unet").float()
    with torch.no_grad():
        unet.conv_out.bias += 0.5
    unet.save_pretrained(folder / "whole" / "unet")
    encoder = type(pipe.text_encoder).from_pretrained(WORLD / "pipeline" / "text_encoder").float()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05
    encoder.save_pretrained(folder / "text" / "text_encoder")
    UNet2DConditionModel.from_pretrained(WORLD / "pipeline", subfolder="unet").save_pretrained(
        folder / "text" / "unet"
    )
    return folder


@pytest.fixture(scope="module")
def pipe():
    ev.quiet_libraries()
    names = {"pretrained_model_name_or_path": str(WORLD / "pipeline"), "revision": None, "variant": None}
    return ev.load_pipeline(
        argparse.Namespace(**names, mixed_precision="no", sampler="dpmsolver"), torch.device("cpu")
    )


def draw(pipe, spec: str, identity: str | None = None, guidance: float = GUIDANCE, size: int = 64) -> torch.Tensor:
    """Latents of three prompts by a model's spec."""
    model = ev.parse_model(spec)
    person = ev.parse_identity(identity) if identity else None
    with ev.drawing(pipe, model, person, guidance > 1) as options:
        embeds, window = ev.condition(pipe, model, TEXTS, "", STEPS)
        more = options | window
        return ev.draw_batch(pipe, embeds, range(3), SEEDS, STEPS, guidance, size, size, **more)[1].float()


@pytest.fixture(scope="module")
def base(pipe) -> torch.Tensor:
    return draw(pipe, "base")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


# ---- Options of a model --------------------------------------------------------------------------------------------


def test_every_model_leaves_the_pipeline_as_it_was(pipe, base, loras):
    for spec in ("a={}/both,lora_scale=0.5,blocks=up,text_encoder_timesteps=900:1000", "a={}/whole", "a={}/text"):
        assert far(draw(pipe, spec.format(loras)), base) > 1e-3
        torch.testing.assert_close(draw(pipe, "base"), base, rtol=0, atol=0)
    assert ev.adapters_of(pipe) == []


@pytest.mark.parametrize("blocks", ["up", "down", "down+mid"])
def test_blocks_equal_a_file_with_only_those_blocks(pipe, base, loras, tmp_path, blocks):
    whole = load_file(loras / "unet_lora" / "pytorch_lora_weights.safetensors")
    kept = tuple(f"unet.{ev.BLOCKS[block]}" for block in blocks.split("+"))
    some = {key: value for key, value in whole.items() if key.startswith(kept)}
    assert 0 < len(some) < len(whole)
    save_file(some, tmp_path / "some.safetensors")
    limited = draw(pipe, f"a={loras}/unet_lora,blocks={blocks}")
    torch.testing.assert_close(limited, draw(pipe, f"b={tmp_path}/some.safetensors"), rtol=1e-3, atol=2e-3)
    assert far(limited, base) > 1e-3
    assert far(limited, draw(pipe, f"a={loras}/unet_lora")) > 1e-3


def test_lora_scale_is_the_weight_of_both_parts(pipe, loras):
    pipe.load_lora_weights(loras / "both", adapter_name="theirs")
    pipe.set_adapters(["theirs"], [0.5])
    embeds = ev.encode_texts(pipe, TEXTS, "")
    theirs = ev.draw_batch(pipe, embeds, range(3), SEEDS, STEPS, GUIDANCE, 64, 64)[1].float()
    pipe.delete_adapters(["theirs"])
    torch.testing.assert_close(draw(pipe, f"a={loras}/both,lora_scale=0.5"), theirs, rtol=0, atol=1e-3)


def test_a_text_encoder_trained_apart_joins_the_unet(pipe, loras):
    joined = draw(pipe, f"a={loras}/unet_lora,text_encoder={loras}/text_lora,lora_scale=0.5")
    torch.testing.assert_close(joined, draw(pipe, f"b={loras}/both,lora_scale=0.5"), rtol=0, atol=1e-3)


def test_text_encoder_timesteps_from_end_to_end(pipe, base, loras):
    always, never = (draw(pipe, f"a={loras}/text_lora,text_encoder_timesteps={w}") for w in ("0:1000", "1001:1002"))
    torch.testing.assert_close(always, draw(pipe, f"a={loras}/text_lora"), rtol=0, atol=0)
    torch.testing.assert_close(never, base, rtol=0, atol=1e-3)
    assert far(always, base) > 1e-3


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_text_encoder_timesteps_equal_a_loop_by_hand(pipe, loras, guidance):
    """The LoRA's prompts at timesteps from 600 on, base's below, in a denoising loop of its own."""
    found = draw(pipe, f"a={loras}/text_lora,text_encoder_timesteps=600:1000", guidance=guidance)
    plain = ev.encode_texts(pipe, TEXTS, "")
    pipe.load_lora_weights(loras / "text_lora", adapter_name="theirs")
    tuned = ev.encode_texts(pipe, TEXTS, "")
    pipe.delete_adapters(["theirs"])
    pipe.scheduler.set_timesteps(STEPS)
    assert pipe.scheduler.timesteps[0] >= 600 > pipe.scheduler.timesteps[-1]
    x = torch.cat([torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    with torch.inference_mode():
        for t in pipe.scheduler.timesteps:
            embeds = tuned if t >= 600 else plain
            asked = pipe.unet(x, t, embeds["prompt_embeds"]).sample
            free = pipe.unet(x, t, embeds["negative_prompt_embeds"].expand(3, -1, -1)).sample
            x = pipe.scheduler.step(free + guidance * (asked - free), t, x).prev_sample
    torch.testing.assert_close(found, x.half().float(), rtol=0, atol=4e-3)


def test_a_folder_brings_its_text_encoder(pipe, base, loras):
    """text/ has base's U-Net, so that what differs comes from its text encoder."""
    assert far(draw(pipe, f"a={loras}/text"), base) > 1e-3


def test_a_folder_that_does_not_fit_is_told(pipe, tmp_path):
    config = dict(pipe.unet.config) | {"cross_attention_dim": 32}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(ev.UserError, match=r"does not fit the base model: cross_attention_dim 32, there \d+"):
        draw(pipe, f"a={tmp_path}/other")


def test_checkpoints_become_models_of_their_own(loras, tmp_path):
    lora = loras / "unet_lora" / "pytorch_lora_weights.safetensors"
    for name in ("run", "run/checkpoint-20", "run/checkpoint-4", "run/checkpoint-30"):
        (tmp_path / name).mkdir()
        (tmp_path / name / lora.name).write_bytes(lora.read_bytes())
    (tmp_path / "run" / "training_settings.json").write_text(json.dumps({"settings": {"max_train_steps": 30}}))
    models = ev.parse_models(["base", f"dpo={tmp_path}/run,checkpoints=all,lora_scale=0.5"])
    assert [(model.name, model.checkpoint) for model in models] == [
        ("base", None),
        ("dpo-4", ("dpo", 4)),
        ("dpo-20", ("dpo", 20)),
        ("dpo", ("dpo", 30)),  # checkpoint-30 is the end result itself
    ]
    assert {model.lora_scale for model in models[1:]} == {0.5}
    with pytest.raises(ev.UserError, match="has no checkpoints with weights"):
        ev.parse_models(["base", f"dpo={loras}/unet_lora,checkpoints=all"])


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    """A tiny SDXL in sdxl/ and, in lora/, a LoRA of its U-Net and both text encoders."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl(folder / "sdxl")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "sdxl")
    layers = {}
    for seed, (name, targets) in enumerate(
        {"unet": ["to_q"], "text_encoder": ["q_proj"], "text_encoder_2": ["q_proj"]}.items()
    ):
        part = getattr(pipe, name)
        part.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        state = {k: torch.randn(v.shape, generator=generator) for k, v in get_peft_model_state_dict(part).items()}
        prefix = "" if name == "unet" else "text_model."
        layers[f"{name}_lora_layers"] = {prefix + key.removeprefix("text_model."): v for key, v in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder / "lora", **layers)
    return folder


def test_sdxl_changes_both_embeddings_at_the_ends_of_the_window(sdxl):
    names = {"pretrained_model_name_or_path": str(sdxl / "sdxl"), "revision": None, "variant": None}
    pipe = ev.load_pipeline(
        argparse.Namespace(**names, mixed_precision="no", sampler="dpmsolver"), torch.device("cpu")
    )
    lora, seen = sdxl / "lora", []
    with ev.drawing(pipe, ev.parse_model(f"a={lora}"), None, True):
        tuned = ev.encode_texts(pipe, TEXTS, "")
    plain, own = ev.encode_texts(pipe, TEXTS, ""), pipe.unet.forward
    pipe.unet.forward = lambda *a, **k: seen.append((a[1], k)) or own(*a, **k)
    draw(pipe, f"a={lora},text_encoder_timesteps=600:1000", size=32)
    assert len(seen) == STEPS
    for timestep, options in seen:
        embeds = tuned if timestep >= 600 else plain
        pooled = options["added_cond_kwargs"]["text_embeds"].chunk(2)
        torch.testing.assert_close(options["encoder_hidden_states"].chunk(2)[1], embeds["prompt_embeds"])
        torch.testing.assert_close(pooled[1], embeds["pooled_prompt_embeds"])
        torch.testing.assert_close(pooled[0], embeds["negative_pooled_prompt_embeds"].expand_as(pooled[1]))
    assert len({bool(timestep >= 600) for timestep, _ in seen}) == 2
    assert far(tuned["pooled_prompt_embeds"], plain["pooled_prompt_embeds"]) > 1e-3


def test_sdxl_from_models_to_report(inputs, sdxl, tmp_path):
    changes = {"pretrained_model_name_or_path": sdxl / "sdxl", "resolution": 32, "guidance_scale": 5}
    models = ("base", f"up={sdxl}/lora,blocks=up,lora_scale=0.5,text_encoder_timesteps=900:1000")
    record = run(flags(inputs, tmp_path / "out", *models, **changes))
    assert record["models"]["up"]["colour"]["latent_shift"]["value"] > 0
    assert len(record["models"]["up"]["colour"]["latent_channels"]) == 4


# ---- Personalised text-to-image ------------------------------------------------------------------------------------


def test_an_identity_lora_is_drawn_under_every_model(pipe, base, loras):
    person = f"lora={loras}/person,scale=0.8"
    alone = draw(pipe, "base", person)
    pipe.load_lora_weights(loras / "person", adapter_name="p")
    pipe.load_lora_weights(loras / "unet_lora", adapter_name="d")
    theirs = {}
    for name, adapters, scales in (("alone", ["p"], [0.8]), ("both", ["p", "d"], [0.8, 0.5])):
        pipe.set_adapters(adapters, scales)
        embeds = ev.encode_texts(pipe, TEXTS, "")
        theirs[name] = ev.draw_batch(pipe, embeds, range(3), SEEDS, STEPS, GUIDANCE, 64, 64)[1].float()
    pipe.delete_adapters(["p", "d"])
    torch.testing.assert_close(alone, theirs["alone"], rtol=0, atol=2e-3)
    both = draw(pipe, f"a={loras}/unet_lora,lora_scale=0.5", person)
    torch.testing.assert_close(both, theirs["both"], rtol=0, atol=2e-3)
    torch.testing.assert_close(draw(pipe, "base,identity=no", person), base, rtol=0, atol=0)


def ip_adapter(pipe, path: Path, face_id: bool) -> Path:
    """A random IP-Adapter of the published layout for this U-Net: plain (CLIP, 4 tokens) or FaceID (512-d faces)."""
    torch.manual_seed(0)
    width, size = pipe.unet.config.cross_attention_dim, 64
    state = {}
    if face_id:
        sizes = {"proj.0": (1024, 512), "proj.2": (4 * width, 1024)}
        state |= {f"image_proj.{name}.weight": 0.1 * torch.randn(shape) for name, shape in sizes.items()}
        state |= {f"image_proj.{name}.bias": torch.zeros(shape[0]) for name, shape in sizes.items()}
    else:
        state |= {
            "image_proj.proj.weight": torch.randn(4 * width, size),
            "image_proj.proj.bias": torch.zeros(4 * width),
        }
    state |= {"image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.zeros(width)}
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(hidden, width) / width**0.5
    save_file(state, path)
    return path


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
@pytest.mark.parametrize("kind", ["plain", "faceid"])
def test_an_ip_adapter_shows_the_person_and_goes_away(pipe, base, loras, tmp_path, kind, guidance):
    file = ip_adapter(pipe, tmp_path / "ip.safetensors", kind == "faceid")
    if kind == "faceid":
        save_file({"faces": torch.randn(2, 512)}, tmp_path / "faces.safetensors")
        person = f"ip_adapter={file},embeds={tmp_path}/faces.safetensors"
    else:
        (tmp_path / "faces").mkdir()
        for k in range(2):
            ev.Image.new("RGB", (40, 30), (200, 100 * k, 50)).save(tmp_path / "faces" / f"{k}.png")
        config = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config |= {"image_size": 32, "patch_size": 8, "projection_dim": 64}
        CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).save_pretrained(tmp_path / "encoder")
        person = f"ip_adapter={file},image={tmp_path}/faces,image_encoder={tmp_path}/encoder"
    plain = base if guidance == GUIDANCE else draw(pipe, "base", guidance=guidance)
    assert far(draw(pipe, "base", person, guidance), plain) > 1e-3
    tuned = draw(pipe, f"a={loras}/both,text_encoder_timesteps=900:1000", person, guidance)
    assert far(tuned, draw(pipe, f"a={loras}/both,text_encoder_timesteps=900:1000", guidance=guidance)) > 1e-3
    torch.testing.assert_close(draw(pipe, "base", f"{person},scale=0", guidance), plain, rtol=0, atol=2e-3)
    torch.testing.assert_close(draw(pipe, "base", guidance=guidance), plain, rtol=0, atol=0)


def test_identity_is_the_mean_cosine_to_the_references(tmp_path):
    (tmp_path / "embed.py").write_text(
        "import numpy as np\n"
        "def embed(device):\n"
        "    def rows(images):\n"
        "        means = np.array([np.asarray(image, dtype=float).mean((0, 1)) for image in images])\n"
        "        means[means.sum(1) == 0] = np.nan\n"  # black: nobody
        "        return means\n"
        "    return rows\n"
    )
    (tmp_path / "refs").mkdir()
    for name, colour in (("a", (9, 0, 0)), ("b", (0, 0, 7)), ("nobody", (0, 0, 0))):
        ev.Image.new("RGB", (8, 8), colour).save(tmp_path / "refs" / f"{name}.png")
    measure = ev.load_identity(f"{tmp_path}/embed.py:embed", tmp_path / "refs", "cpu")
    images = [ev.Image.new("RGB", (8, 8), colour) for colour in ((50, 0, 0), (0, 0, 0), (30, 0, 40), (0, 5, 0))]
    found = measure(images, [""] * 4)
    np.testing.assert_allclose(found, [0.5, np.nan, 0.7, 0.0], atol=1e-9)
    there = np.array([True, True, True, False])
    np.testing.assert_array_equal(ev.recognised(found, there, 0.6), [0, 0, 1, np.nan])


# ---- Folders of finished images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def finished_images(folder: Path, how: str) -> Path:
    """Images of the first prompt (two), the third and of a prompt that nobody asked for."""
    folder.mkdir()
    texts = [PROMPTS[0], PROMPTS[2], "something else", PROMPTS[0]]
    lines = []
    for i, text in enumerate(texts):
        image, name = ev.Image.new("RGB", (64, 64), (60 * i, 100, 90)), f"{i}.png"
        if how == "names":
            name = ("00000_0.png", "00002_0.png", "00099_0.png", "00000_1.png")[i]
        (folder / name).write_bytes(ev.png(image, **({"prompt": text} if how == "png" else {})))
        lines.append(json.dumps({"file_name": name, "text": text}))
        if how == "txt":
            (folder / f"{i}.txt").write_text(text)
    if how == "metadata":
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("how", ["metadata", "txt", "png", "names"])
def test_finished_images_find_their_prompts(tmp_path, how):
    model = ev.parse_model(f"theirs={finished_images(tmp_path / 'f', how)}")
    assert model.kind == "images"
    plan = ev.plan_images(len(PROMPTS), 1, 2)
    found = dict(zip(plan, ev.find_images(model, PROMPTS, plan), strict=True))
    names = {row: path.name for row, path in found.items() if path}
    first, second, third = (
        ("00000_0.png", "00000_1.png", "00002_0.png") if how == "names" else ("0.png", "3.png", "1.png")
    )
    assert names == {(0, 0): first, (0, 1): second, (2, 0): third}
    with pytest.raises(ev.UserError, match=r"theirs: 4 images in .*, but"):
        ev.find_images(model, ["other"], [(5, 0)])


def test_two_folders_are_compared_without_any_model(inputs, tmp_path, monkeypatch):
    """No pipeline is loaded, and what has no image is left out."""
    monkeypatch.setattr(ev, "load_pipeline", None)
    theirs = finished_images(tmp_path / "theirs", "metadata")
    ours = finished_images(tmp_path / "ours", "txt")
    line = flags(inputs, tmp_path / "out", f"base={theirs}", f"ours={ours}", pretrained_model_name_or_path=None)
    record = run([*line, "--group_by"])
    result = record["models"]["ours"]
    assert result["metrics"]["brightness"]["prompts"] == 2
    assert result["metrics"]["brightness"]["tie"] == 1
    assert result["colour"]["delta_e"]["value"] == 0
    assert "latent_shift" not in result["colour"]
    assert "drawn elsewhere" in " ".join(record["caveats"])


def test_the_images_of_a_run_are_a_folder_for_the_next(inputs, tmp_path):
    out = tmp_path / "out"
    run(flags(inputs, out, diversity_prompts=2))
    models = ("base", f"copy={out}/images/base", f"lora={out}/images/lora")
    record = run(flags(inputs, tmp_path / "again", *models, diversity_prompts=2))
    assert record["models"]["copy"]["metrics"]["brightness"]["tie"] == 1
    first = json.loads((out / "metrics.json").read_text())["models"]["lora"]["metrics"]["brightness"]
    assert record["models"]["lora"]["metrics"]["brightness"]["win_rate"] == first["win_rate"]
    assert pixels(tmp_path / "again", "base").shape[0] == 8


def test_images_of_other_tools_find_their_prompts(tmp_path):
    """A1111 writes the prompt before its settings; ComfyUI's text is a workflow, so that its names have to tell."""
    for folder, text, name in (
        ("a1111", {"parameters": f"{PROMPTS[1]}\nNegative prompt: blurry\nSteps: 20"}, "x.png"),
        ("comfy", {"prompt": '{"3": {"class_type": "KSampler"}}'}, "00001_0.png"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(ev.png(ev.Image.new("RGB", (8, 8)), **text))
        model = ev.parse_model(f"theirs={tmp_path / folder}")
        assert ev.find_images(model, PROMPTS, [(0, 0), (1, 0)]) == [None, tmp_path / folder / name]


def test_folders_without_a_common_prompt_are_refused_before_anything_is_measured(inputs, tmp_path):
    for p in range(2):
        (tmp_path / str(p)).mkdir()
        ev.Image.new("RGB", (8, 8)).save(tmp_path / str(p) / f"0000{p}_0.png")
    line = flags(inputs, tmp_path / "out", f"base={tmp_path}/0", f"b={tmp_path}/1", pretrained_model_name_or_path=None)
    with pytest.raises(SystemExit) as caught:
        ev.cli(line)
    assert caught.value.code == 2


def test_photos_are_turned_and_cut_as_the_images_are(tmp_path):
    image = ev.Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turn right: what is on the left comes up
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    turned = ev.load_images([tmp_path / "phone.jpg"])[0]
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 5))[2] > 200
    assert ev.cut_to(turned, 1.0).size == (20, 20)
    assert ev.cut_to(turned, 0.25).size == (10, 40)
    middle = ev.cut_to(turned, 1.0)
    assert middle.getpixel((10, 2))[2] > 200 > 100 > middle.getpixel((10, 17))[2]


# ---- What chose the training pairs ---------------------------------------------------------------------------------


def stage(folder: Path, scorer: str, initial: Path | None = None) -> Path:
    """A LoRA's folder with its record, and that of its pairs, beside it."""
    data, lora = folder / f"pairs-{scorer.partition('=')[0]}", folder / f"lora-{scorer.partition('=')[0]}"
    data.mkdir(parents=True)
    (lora / "checkpoint-500").mkdir(parents=True)
    (data / "preference_data.json").write_text(json.dumps({"settings": {"scorer": [scorer]}}))
    record = {"settings": {"train_data_dir": f"elsewhere/{data.name}", "initial_lora": initial and str(initial)}}
    (lora / "training_settings.json").write_text(json.dumps(record))
    for place in (lora, lora / "checkpoint-500"):
        save_file({"unet.x": torch.zeros(1)}, place / "pytorch_lora_weights.safetensors")
    return lora


def test_a_model_whose_images_are_not_finite_is_named(inputs, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(WORLD / "pipeline", subfolder="unet").float()
    torch.nn.init.constant_(unet.conv_out.weight, math.nan)
    unet.save_pretrained(tmp_path / "burnt" / "unet")
    with pytest.raises(ev.UserError, match="burnt draws images that are not finite: try another --mixed_precision"):
        run(flags(inputs, tmp_path / "out", "base", f"burnt={tmp_path / 'burnt'}", max_prompts=1, diversity_prompts=0))


def test_a_lora_of_the_unet_is_no_lora_of_the_text_encoder(loras):
    for name in ("unet_lora", "both"):
        with pytest.raises(ev.UserError, match="it adapts more than text encoders"):
            ev.parse_model(f"twice={loras / 'unet_lora'},text_encoder={loras / name}")
    ev.parse_model(f"apart={loras / 'whole'},text_encoder={loras / 'text_lora'},lora_scale=0.5")
    with pytest.raises(ev.UserError, match="lora_scale, but no LoRA"):
        ev.parse_model(f"whole={loras / 'whole'},lora_scale=0.5")


def test_what_chose_the_pairs_is_found_for_checkpoints_and_earlier_stages(tmp_path):
    """The pairs' folder was moved with the LoRA; labels and names both count."""
    easy = stage(tmp_path / "easy", "hpsv2=some/model,label=taste")
    hard = stage(tmp_path / "hard", "imagereward", easy)
    for spec, names in (
        (f"a={easy}/checkpoint-500", ["hpsv2", "taste"]),
        (f"a={hard}", ["hpsv2", "imagereward", "taste"]),
        (f"a={hard}/checkpoint-500/pytorch_lora_weights.safetensors", ["hpsv2", "imagereward", "taste"]),
    ):
        assert ev.spoken(ev.recorded_training_scorers([ev.parse_model(spec)])) == names, spec


def test_a_training_scorer_under_another_label_does_not_lead():
    scorers = ev.parse_scorer_specs(["hpsv2=some/model,label=taste", "clip", "pickscore"])
    assert ev.metric_roles(scorers, ["hpsv2"], False) == {
        "clip": "held-out",
        "pickscore": "held-out",
        "taste": "training",
        "diversity": "diversity",
    }


# ---- What is kept --------------------------------------------------------------------------------------------------


def test_every_part_of_a_models_weights_counts(tmp_path):
    weights = np.arange(3 * 2**18, dtype=np.float32)
    for place in range(0, len(weights), len(weights) // 7):
        save_file({"w": torch.from_numpy(weights)}, tmp_path / "a.safetensors")
        before = ev.fingerprint([tmp_path / "a.safetensors"])
        changed = weights.copy()
        changed[place : place + len(weights) // 7] += 1
        save_file({"w": torch.from_numpy(changed)}, tmp_path / "a.safetensors")
        assert ev.fingerprint([tmp_path / "a.safetensors"]) != before


def test_a_folders_text_encoder_is_among_its_files(loras):
    names = {file.parent.name for file in ev.tuned_files(loras / "text")}
    assert names == {"unet", "text_encoder"}


def test_a_failure_leaves_the_base_model(pipe, base, loras, tmp_path):
    """The identity's LoRA cannot be read, after the tuned U-Net was put in place."""
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ev.UserError, match=r"broken.safetensors is not a LoRA for this base model"):
        draw(pipe, f"a={loras}/whole", f"lora={tmp_path}/broken.safetensors")
    torch.testing.assert_close(draw(pipe, "base"), base, rtol=0, atol=0)
    save_file({"faces": torch.randn(2, 100)}, tmp_path / "faces.safetensors")
    file = ip_adapter(pipe, tmp_path / "ip.safetensors", True)
    with pytest.raises(ev.UserError, match="cannot use the IP-Adapter"):
        draw(pipe, "base", f"ip_adapter={file},embeds={tmp_path}/faces.safetensors")
    torch.testing.assert_close(draw(pipe, "base"), base, rtol=0, atol=0)
