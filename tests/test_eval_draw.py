# SPDX-License-Identifier: Apache-2.0
"""eval_human.py: what --models names, what its images depend on and are drawn with, and folders of finished images."""

import argparse
import copy
import json
import math
import shutil
from functools import cache, partial
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from train_helpers import LORA, PIPELINE, flags, load, tiny_sd3, tiny_sdxl, with_scheduler
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import eval_human as ev


ev.quiet_libraries()
TEXTS = ["a standing person in a red shirt", "a walking person in a blue shirt", "a person in green"]
SEEDS, STEPS, WINDOW = [1, 2, 3], 4, "text_encoder_timesteps"
SETTINGS = {"model": PIPELINE, "prompts": "none", "num_inference_steps": STEPS, "guidance_scale": 2, "resolution": 64}
CONV, QUERY = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
TARGETS = {"unet": "to_q", "transformer": "to_q", "text_encoder": "q_proj", "text_encoder_2": "q_proj"}
same, far = partial(torch.testing.assert_close, rtol=0, atol=3e-3), torch.nn.functional.l1_loss


def random_lora(module: torch.nn.Module, size: float, *targets: str) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 in diffusers' names."""
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(len(targets))
    module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[*targets]))
    prefix, state = "text_model." * ("q_proj" in targets), get_peft_model_state_dict(module)
    names = {key: prefix + key.removeprefix(prefix) for key in state}
    return {names[key]: size * torch.randn(one.shape, generator=generator) for key, one in state.items()}


def save_loras(pipe, folder: Path, *parts: str) -> None:
    """One file, with a LoRA of each of these parts that the pipeline has."""
    parts = [part for part in parts if part in pipe.components]
    states = {f"{part}_lora_layers": random_lora(getattr(pipe, part), 1.0, TARGETS[part]) for part in parts}
    type(pipe).save_lora_weights(folder, **states)


@pytest.fixture(scope="module")
def pipe():
    return load(PIPELINE)


@pytest.fixture(scope="module")
def world(tmp_path_factory, pipe) -> Path:
    """LoRAs of U-Net, text encoder, both, and a person; folders with parts of their own, a whole pipeline; photos."""
    folder, save = tmp_path_factory.mktemp("world"), diffusers.StableDiffusionPipeline.save_lora_weights
    unet = random_lora(pipe.unet, 0.3, "to_q", "to_v", "conv1")
    text = random_lora(pipe.text_encoder, 1.0, "q_proj")
    save(folder / "lora", unet_lora_layers=unet)
    save(folder / "text", text_encoder_lora_layers=text)
    save(folder / "both", unet_lora_layers=unet, text_encoder_lora_layers=text)
    save(folder / "person", unet_lora_layers=random_lora(pipe.unet, 0.3, "to_k", "conv2"))
    save_file({f"unet.{key}": value for key, value in unet.items() if key.startswith(("up", "mid"))}, folder / "some")
    for name, size in (("unet", 0.02), ("text_encoder", 0.05)):
        other = copy.deepcopy(getattr(pipe, name))
        torch._foreach_add_([one.data for one in other.parameters()], size)
        other.save_pretrained(folder / f"own_{name}" / name)
    pipe.unet.save_pretrained(folder / "own_text_encoder" / "unet")  # base's: what differs is the text encoder
    vae, whole = copy.deepcopy(pipe.vae), with_scheduler(PIPELINE, folder / "whole", prediction_type="epsilon")
    vae.decoder.conv_out.bias.data += 0.5
    vae.save_pretrained(whole / "vae")
    write_image(folder / "photos" / "00000_0.png")
    for name in ("nothing/training_settings.json", "two/a.safetensors", "two/b.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def write_image(path: Path, colour: object = (200, 100, 50), size: tuple[int, int] = (64, 64), **texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", size, colour).save(path, pnginfo=info)
    return path


def parse(*models: str, **settings) -> argparse.Namespace:
    return ev.parse_args([*flags(SETTINGS | settings), "--models", *(models or ("base", "x=hub/lora"))])


@cache
def draw(spec: str, **settings) -> torch.Tensor:
    """The pixels of the three prompts in [0, 1]."""
    args, (model, *_) = parse(**settings), ev.parse_model(spec)
    pipe, family, person = ev.load_pipeline(args, model)
    text, window = ev.encode_with_window(pipe, family, model, TEXTS, args)
    options = {family.guidance[0]: args.guidance_scale, "num_inference_steps": STEPS} | window | person
    pixels, _ = ev.sample(pipe, family, text, range(3), SEEDS, args.resolution, args.resolution, **options)
    return (pixels / 2 + 0.5).clamp(0, 1)


def draw_theirs(pipe, side: int = 64) -> torch.Tensor:
    """The same images by a call of diffusers' pipeline."""
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.scheduler = pipe.scheduler if hasattr(pipe, "transformer") else ev.UNet().sampler(pipe)
    options = {"height": side, "width": side, "num_inference_steps": STEPS, "guidance_scale": 2, "output_type": "pt"}
    return pipe(TEXTS, generator=noise, **options).images


def one_line(words: str):
    return pytest.raises(ev.UserError, match=f"(?s)^(?!.*\n).*{words}")


@pytest.mark.parametrize(("spec", "expected"), {
    "base": ("base", "base"),
    "base={}/photos": ("base", "images", "{}/photos"),
    "a.b-c_1={}/lora,blocks=up+mid,lora_scale=.5": ("a.b-c_1", "lora", "{}/lora", 0.5, "up+mid"),
    "a={}/two/b.safetensors": ("a", "lora", "{}/two/b.safetensors"),
    "hub=some-one/some.lora,lora_scale=2": ("hub", "lora", "some-one/some.lora", 2.0),
    "a={}/own_unet,text_encoder={}/text,lora_scale=0.5": ("a", "parts", "{}/own_unet", 0.5, "", "{}/text"),
    f"a={PIPELINE}": ("a", "pipeline", str(PIPELINE)),
    "a={}/both,text_encoder_timesteps=900:1000": ("a", "lora", "{}/both", 1.0, "", "", (900, 1000)),
}.items())  # fmt: skip
def test_what_a_spec_names(spec, expected, world):
    expected = [one.format(world) if isinstance(one, str) else one for one in expected]
    spec = spec.format(world, world)
    assert ev.parse_model(spec) == [ev.Model(*expected, spec=spec)]


@pytest.mark.parametrize(("specs", "words"), {
    "dpo": "expected base or NAME=PATH",
    "a={}/lora,scale=1": "no option scale, only lora_scale, blocks, text_encoder, text_encoder_timesteps, checkpoints",
    "base={}/lora": "base is --pretrained_model_name_or_path; give this model another name",
    "a={}/own_unet,lora_scale=0.5": "lora_scale, but no LoRA that it could belong to",
    "base,text_encoder={}/text": "text_encoder, but no LoRA",
    "a={}/own_unet,text_encoder={}/text,blocks=up": "blocks, but no LoRA",
    "a={}/lora,lora_scale=half": "a scale is a number",
    "a={}/lora,blocks=up+head": "blocks are down, mid, up, or several with",
    "a={}/nowhere": "no model at .*/nowhere: neither a LoRA, nor unet/",
    "a={}/nothing": f"holds no {LORA}: has its training finished",
    "a={}/two": "holds 2 weight files: name the one to load, such as .*a.safetensors",
    "a={}/lora,checkpoints=all": "checkpoints=all needs checkpoint-STEP folders",
    "a={}/lora": "needs base, and a tuned model",
}.items())  # fmt: skip
def test_bad_specs_are_one_line(specs, words, world):
    with one_line(words):
        ev.parse_models([spec.format(world, world) for spec in specs.split()])


def test_base_comes_first_and_checkpoints_are_models_of_their_own(world, tmp_path):
    for name in ("run", "run/checkpoint-20", "run/checkpoint-4", "run/checkpoint-30", "run/checkpoint-x"):
        shutil.copytree(world / "lora", tmp_path / name)
    run = tmp_path / "run"
    (run / "training_settings.json").write_text(json.dumps({"settings": {"max_train_steps": 30}}))
    models = ev.parse_models([f"dpo={run},checkpoints=all,lora_scale=0.5", "base"])
    expected = {"base": "", "dpo-4": f"{run}/checkpoint-4", "dpo-20": f"{run}/checkpoint-20", "dpo": str(run)}
    assert [(model.name, model.path) for model in models] == [*expected.items()]
    assert [model.lora_scale for model in models[1:]] == [0.5] * 3


def test_the_key_of_a_model_is_its_content(world, tmp_path):
    def key(spec: str, **settings) -> str:
        return ev.model_key(parse(**settings), ev.parse_model(spec)[0])

    copies = (shutil.copytree(world / at, tmp_path / Path(at).name) for at in ("both", "own_unet", PIPELINE))
    lora, parts, model = copies
    specs = [f"a={lora}{more}" for more in ("", ",lora_scale=0.5", ",blocks=up", f",{WINDOW}=900:1000")]
    specs += [f"a={parts}", f"a={parts},text_encoder={world}/text", "base", f"a={model}"]
    before = [key(spec) for spec in specs]
    assert (len({*before}), before[7]) == (7, before[6])  # a whole pipeline that is base's is base
    copied = shutil.copytree(lora, tmp_path / "copy")
    assert key(f"b={copied}") == key(f"a={lora / LORA}") == before[0]
    assert key("base", model=model) == key("base", batch_size=1, num_images_per_prompt=4, prompts="other") == before[6]
    others = {"num_inference_steps": 5, "guidance_scale": 3, "seed": 9, "negative_prompt": "x", "sampler": "pipeline"}
    others |= {"resolution": 72, "height": 72, "mixed_precision": "bf16", "identity": f"lora={world}/person"}
    others |= {"variant": "fp16", "revision": "v2"}
    assert len({before[6], *(key("base", **{name: value}) for name, value in others.items())}) == len(others) + 1
    for file in (lora / LORA, parts / "unet" / "diffusion_pytorch_model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    after = [key(spec) for spec in specs]
    assert (after[6:], {*after[:6]} & {*before[:6]}, key(f"b={copied}")) == (before[6:], set(), before[0])
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("v_prediction", "epsilon"))
    assert before[6] != key("base", model=model) == key(f"a={model}")
    assert key(f"a={lora}", model=model) != after[0]


@pytest.mark.parametrize(("spec", "identity", "loras"), [
    ("base", 0, {}), ("a={}/lora", 0, {"lora": 1.0}), ("a={}/both,lora_scale=0.5", 0, {"both": 0.5}),
    ("base", 0.8, {"person": 0.8}), ("a={}/lora,lora_scale=0.5", 0.8, {"person": 0.8, "lora": 0.5}),
    ("a={}/own_unet", 0, {}), ("a={}/own_text_encoder", 0, {}), ("a={}/whole", 0, {}),
])  # fmt: skip
def test_a_model_is_drawn_as_diffusers_draws_it(spec, identity, loras, world):
    theirs, own = load(world / "whole" if "whole" in spec else PIPELINE), spec.partition("own_")[2]
    if own:
        setattr(theirs, own, type(getattr(theirs, own)).from_pretrained(world / f"own_{own}" / own))
    for name in loras:
        theirs.load_lora_weights(world / name, weight_name=LORA, adapter_name=name)
    theirs.set_adapters([*loras], [*loras.values()]) if loras else None
    found = draw(spec.format(world), identity=f"lora={world}/person,scale={identity}" if identity else False)
    same(found, draw_theirs(theirs))
    assert (far(found, draw("base")) > 3e-3) == (spec != "base" or bool(identity))


@pytest.mark.parametrize(("spec", "other"), {
    "a={}/lora,blocks=up+mid": "a={}/some",
    "a={}/lora,text_encoder={}/text,lora_scale=0.5": "a={}/both,lora_scale=0.5",
    f"a={{}}/both,{WINDOW}=0:1000": "a={}/both",
    f"a={{}}/both,{WINDOW}=1001:1002": "a={}/lora",
}.items())  # fmt: skip
def test_options_that_equal_another_model(spec, other, world):
    found, whole = draw(spec.format(world, world)), "a={}/both" if other.endswith("lora") else "a={}/lora"
    same(found, draw(other.format(world)))
    assert min(far(found, draw(name.format(world))) for name in ("base", whole)) > 1e-3


def test_kohyas_lora_with_alphas_is_drawn_as_merged_by_hand(pipe, tmp_path):
    kohya, generator, unet = {}, torch.Generator().manual_seed(0), copy.deepcopy(pipe.unet)
    for name, rank, alpha in ((CONV, 3, 6.0), (QUERY, 2, 1.0), (TO_OUT, 4, 8.0)):
        weight, theirs = unet.get_submodule(name).weight, f"lora_unet_{name.replace('.', '_')}"
        shapes = (rank, *weight.shape[1:]), (len(weight), rank, *[1] * (weight.ndim - 2))
        down, up = (0.3 * torch.randn(shape, generator=generator) for shape in shapes)
        weight.data += alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        kohya |= {f"{theirs}.lora_down.weight": down, f"{theirs}.lora_up.weight": up}
        kohya[f"{theirs}.alpha"] = torch.tensor(alpha)
    unet.save_pretrained(tmp_path / "merged" / "unet")
    save_file(kohya, tmp_path / "kohya.safetensors")
    expected = draw(f"merged={tmp_path}/merged")
    assert far(expected, draw("base")) > 1e-2
    same(draw(f"a={tmp_path}/kohya.safetensors"), expected)


@pytest.mark.parametrize(("kind", "guidance"), [("sd", 5.0), ("sd", 1.0), ("sdxl", 5.0)])
def test_the_loras_prompts_are_read_at_the_timesteps_of_the_window_alone(kind, guidance, world, tmp_path, monkeypatch):
    model, lora = tiny_sdxl(tmp_path / kind) if kind == "sdxl" else PIPELINE, tmp_path / "lora"
    pipe, seen, own, family = load(model), [], diffusers.UNet2DConditionModel.forward, ev.UNet()
    save_loras(pipe, lora, "text_encoder", "text_encoder_2")
    texts = [ev.encode_prompts(pipe, family, TEXTS, "", True)]
    pipe.load_lora_weights(lora, weight_name=LORA)
    texts.append(ev.encode_prompts(pipe, family, TEXTS, "", True))
    forward = lambda self, *a, **k: seen.append((float(a[1]), k)) or own(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", forward)
    draw(f"a={lora},{WINDOW}=600:1000", guidance_scale=guidance, resolution=48, model=model)
    assert [t >= 600 for t, _ in seen] == [True] * 2 + [False] * 2
    for t, told in seen:
        both = [told["encoder_hidden_states"], (told.get("added_cond_kwargs") or {}).get("text_embeds")]
        for name, found in zip(("prompt_embeds", "pooled_prompt_embeds")[: 1 + (kind == "sdxl")], both, strict=False):
            assert far(texts[0][name], texts[1][name]) > 1e-2
            expected = texts[t >= 600][name], texts[t >= 600][f"negative_{name}"].expand_as(texts[0][name])
            same(found, torch.cat(expected[::-1] if guidance > 1 else expected[:1]))


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
def test_other_families_are_drawn_as_their_pipelines_do(make, tmp_path):
    settings, lora = {"model": make(tmp_path / "model"), "resolution": 48}, tmp_path / "lora"
    save_loras(pipe := load(settings["model"]), lora, *TARGETS)
    same(plain := draw("base", **settings), draw_theirs(pipe, 48))
    pipe.load_lora_weights(lora, weight_name=LORA)
    same(tuned := draw(f"a={lora}", **settings), draw_theirs(pipe, 48))
    assert far(plain, tuned) > 3e-3


def test_an_ip_adapter_shows_the_person_under_every_model(pipe, world, tmp_path):
    torch.manual_seed(0)
    width, encoder = pipe.unet.config.cross_attention_dim, {"hidden_size": 32, "image_size": 32, "patch_size": 8}
    shapes = {f"image_proj.norm.{one}": (width,) for one in ("weight", "bias")}
    shapes |= {"image_proj.proj.weight": (4 * width, 64), "image_proj.proj.bias": (4 * width,)}
    names = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        hidden = pipe.unet.get_submodule(name).to_k.out_features
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{one}_ip.weight": (hidden, width) for one in "kv"}
    save_file({name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "ip.safetensors")
    encoder |= {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 64}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**encoder)).save_pretrained(tmp_path / "encoder")
    photos = [write_image(tmp_path / "faces" / f"{k}.png", (200, 200 * k, 50), (40, 30)) for k in range(2)]
    tuned, person = f"a={world}/both", f"ip_adapter={tmp_path}/ip.safetensors,image_encoder={tmp_path}/encoder,image="
    drawn = [draw("base", identity=f"{person}{image}") for image in (*photos, tmp_path / "faces")]
    drawn += [draw("base"), draw(tuned), draw(tuned, identity=f"{person}{photos[0]}")]
    assert min(far(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > 1e-3
    same(draw("base", identity=f"{person}{photos[0]},scale=0"), draw("base"))


def test_what_cannot_be_drawn_with_is_one_line(pipe, world, tmp_path):
    config, state = dict(pipe.unet.config) | {"cross_attention_dim": 32}, load_file(world / "both" / LORA)
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "narrow" / "unet")
    more = {key.replace("attn1", "attn7"): value.clone() for key, value in state.items()}
    save_file(state | more, tmp_path / "attn7.safetensors")
    for name, old, new in (("edm", "DPMSolverMultistep", "EDMEuler"), ("flux", "StableDiffusion", "Flux")):
        file = shutil.copytree(PIPELINE, tmp_path / name) / "model_index.json"
        file.write_text(file.read_text().replace(old, new))
    diffusers.EDMEulerScheduler().save_pretrained(tmp_path / "edm" / "scheduler")
    pipe.save_pretrained(half := tmp_path / "half", variant="fp16")
    draw("base", model=half, variant="fp16")
    for spec, settings, words in (
        (f"a={tmp_path}/narrow", {}, "narrow/unet does not fit the base model: cross_attention_dim 32"),
        (f"a={tmp_path}/attn7.safetensors", {}, r"of its tensors have no place .*such as unet\..*attn7"),
        (f"a={world}/own_unet,text_encoder={world}/both", {}, "adapts more than the text encoder"),
        (f"a={world}/lora,{WINDOW}=0:9", {}, f"a: {WINDOW} needs a U-Net, and a LoRA of a text encoder"),
        (f"a={tmp_path}/edm", {}, "the model's scheduler, EDMEulerScheduler, has no DDPM schedule"),
        ("base", {"model": tmp_path / "flux"}, "flux is a FluxPipeline: StableDiffusionPipeline, .* can draw"),
        ("base", {"model": half}, r"cannot load base: .*\(where all files are fp16, set --variant fp16\)"),
        ("base", {"num_inference_steps": 1001}, "--num_inference_steps 1001: the model has 1000 timesteps"),
    ):
        with one_line(words):
            draw(spec, **settings)


def draw_files(spec: str, folder: Path, prompts: list[str], **settings) -> dict[str, np.ndarray]:
    rows = [{"prompt": one, "seed": ev.image_seed(1, one, 0), "path": folder / f"{one}.png"} for one in prompts]
    ev.draw_missing(parse(**settings), ev.parse_model(spec)[0], pd.DataFrame(rows), PartialState(cpu=True), "images")
    return {row["prompt"]: np.asarray(Image.open(row["path"]), int) for row in rows}


def test_an_image_depends_on_model_prompt_and_seed_alone(world, pipe, tmp_path):
    spec = f"a={world}/text,{WINDOW}=600:1000"
    together = draw_files(spec, tmp_path / "a", TEXTS, batch_size=3)
    alone = draw_files(spec, tmp_path / "b", TEXTS[::-1], batch_size=1)
    assert max(np.abs(together[prompt] - alone[prompt]).max() for prompt in TEXTS) <= 1
    assert min(np.abs(together[a] - together[b]).mean() for a in TEXTS for b in TEXTS if a != b) > 1
    burnt = copy.deepcopy(pipe.unet)
    torch.nn.init.constant_(burnt.conv_out.weight, math.nan)
    burnt.save_pretrained(tmp_path / "burnt" / "unet")
    with one_line("burnt draws images that are not finite: try another --mixed_precision"):
        draw_files(f"burnt={tmp_path}/burnt", tmp_path / "c", TEXTS)


@pytest.mark.parametrize("how", ["txt", "prompt", "parameters", "names"])
def test_finished_images_find_their_prompts(how, tmp_path):
    """Two images of the first prompt, one of the third, and one of a prompt that nobody asked for."""
    names = ["00000_0", "00002_0", "00099_0", "00000_1"] if how == "names" else ["0", "1", "2", "3"]
    files = [tmp_path / f"{name}.png" for name in names]
    for file, text in zip(files, [TEXTS[0], TEXTS[2], "something else", TEXTS[0]], strict=True):
        told = {"prompt": text, "parameters": f"{text}\nNegative prompt: x\nSteps: 20, Size: 64x64"}
        write_image(file, **({how: told[how]} if how in told else {"prompt": '{"3": {"class_type": "KSampler"}}'}))
        file.with_suffix(".txt").write_text(text) if how == "txt" else None
    table, told = ev.find_images("theirs", tmp_path, TEXTS)
    found = {(p, k): path for p, k, path in zip(table.prompt_id, table["index"], table.path, strict=True)}
    assert found == {(0, 0): files[0], (0, 1): files[3], (2, 0): files[1]}
    assert told.endswith("of 2 prompts, by " + ("their names" if how == "names" else "their captions"))


def test_folders_that_are_ambiguous_are_one_line(tmp_path):
    for name, size in (("grid/a", 64), ("grid/grid-a", 128), ("others/a", 8), ("from_1/00001_0", 8)):
        write_image(tmp_path / f"{name}.png", size=(size, size), prompt=TEXTS[0] if "grid" in name else "x")
    for folder, words in {
        "grid": r"t: one prompt \('a standing.*'\) has a.png of 64x64 and grid-a.png of 128x128: is one a grid",
        "from_1": "t: no image in .* is called 00000_0: are they numbered from 1. Count from 0",
        "others": "t: 1 images in .*, but no caption is one of the prompts, and no name is like",
    }.items():
        with one_line(words):
            ev.find_images("t", tmp_path / folder, TEXTS)


def test_two_folders_are_compared_without_any_model(tmp_path):
    """Scores made elsewhere belong to a path below the folder that was named, whichever of its images are used."""
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    scores, out = {}, tmp_path / "out"
    for model, grey in (("base", 90), ("ours", 200)):
        for p in range(3):  # drafts in the root, the images that have a caption in final/
            write_image(tmp_path / model / f"{p}.png", "black")
            write_image(tmp_path / model / f"final/{p}.png", (grey,) * 3).with_suffix(".txt").write_text(TEXTS[p])
            scores |= {f"{model}/{p}.png": float(model == "base"), f"{model}/final/{p}.png": float(model == "ours")}
    lines = [json.dumps({"image_id": name, "score": score}) for name, score in scores.items()]
    (tmp_path / "votes.jsonl").write_text("\n".join(lines))
    settings = {"prompts": tmp_path / "p.txt", "output_dir": out, "scorers": tmp_path / "votes.jsonl", "model": "none"}
    ev.main(parse(f"ours={tmp_path}/ours", f"base={tmp_path}/base", **settings))
    record = json.loads((out / "metrics.json").read_text())
    assert {*pd.read_csv(out / "per_image.csv").image_id} == {name for name in scores if "final" in name}
    assert [(row["metric"], row["win_rate"], row["n"]) for row in record["results"]] == [("votes", 1.0, 3)]
    assert record["colour"][0]["base"] == pytest.approx(ev.srgb_to_lab(np.full(3, 90 / 255))[0], abs=1e-6)
