# SPDX-License-Identifier: Apache-2.0
"""What train_dpo_human.py says to bad input: one line that names the flag or the row. Status 2 where the command line
alone shows it, else 1."""

import io
import json
import re
import shutil
import struct
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train_dpo_human import PIPELINE, SMALL, flags, make_rows, pairs_in_buckets, train, write_data

import train_dpo_human as trainer


ROWS = make_rows(3)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pairs"), ROWS)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Two steps, a checkpoint after each."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    train(data, output, max_train_steps=2, checkpointing_steps=1)
    return output


def refusal(status: int, capsys, command: str = "", **settings) -> str:
    """The line with which the script refuses these settings, leaving with this status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.raises(SystemExit) as stop:
        trainer.cli(flags(SMALL | settings) + command.split())
    if status == 2:
        assert stop.value.code == 2
        line = capsys.readouterr().err.partition("train_dpo_human.py: error: ")[2].rstrip("\n")
    else:
        assert isinstance(stop.value.code, str)  # Python prints it and leaves with status 1
        assert stop.value.code.startswith("train_dpo_human.py: ")
        line = stop.value.code.partition(": ")[2]
    assert "\n" not in line
    assert not line.endswith(":")  # the first line of a library's longer message
    assert " object at 0x" not in line
    return line


def ids_of(cases: list[tuple]) -> list[str]:
    return [told for told, *_ in cases]


# ---- Command line ---------------------------------------------------------------------------------------------------


USAGE = {
    "--rank 0": "--rank: must be at least 1",
    "--max_train_samples 0": "--max_train_samples: must be at least 1",
    "--train_batch_size many": "--train_batch_size: invalid int value: 'many'",
    "--beta_dpo -1": "--beta_dpo: must be above 0",
    "--learning_rate nan": "--learning_rate: must be above 0",
    "--lambda_stat -1": "--lambda_stat: must be at least 0",
    "--soft_labels 0": "--soft_labels: must be above 0",
    "--min_margin nan": "--min_margin",
    "--seed -1": "--seed",
    "--validation_share 1": "--validation_share must be below 1",
    "--ema 1": "--ema must be below 1",
    "--adam_beta1 1": "--adam_beta1",
    "--adam_epsilon -1": "--adam_epsilon",
    "--label_smoothing 0.5": "--label_smoothing must lie in [0, 0.5)",
    "--winner_safeguard 2": "--winner_safeguard must lie in [0, 1]",
    "--timestep_range 900 100": "--timestep_range needs 0 <= LOW < HIGH",
    "--timestep_range -10 100": "--timestep_range needs 0 <= LOW < HIGH",
    "--resolution 65": "--resolution, --height and --width must be multiples of 8",
    "--freeze_unet": "--freeze_unet needs --train_text_encoder",
    "--freeze_unet --train_text_encoder --full_unet": "--freeze_unet and --full_unet contradict each other",
    "--initial_unet unet": "--initial_unet needs --full_unet",
    "--export_kohya --full_unet": "--export_kohya needs a LoRA",
    "--overwrite --resume_from_checkpoint latest": "--overwrite starts anew, --resume_from_checkpoint carries on",
    "--loss_type dpo": "--loss_type: invalid choice: 'dpo'",
    "--rnk 4": "unrecognized arguments: --rnk 4",
    "--full": "unrecognized arguments: --full",
}


@pytest.mark.parametrize("command", USAGE)
def test_mistakes_in_the_command_line(command, data, tmp_path, capsys):
    assert USAGE[command] in refusal(2, capsys, command, train_data_dir=data, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="no mistake where there is a GPU")
@pytest.mark.parametrize("command", ["--mixed_precision fp16", "--enable_xformers_memory_efficient_attention"])
def test_what_needs_a_gpu(command, capsys):
    line = refusal(2, capsys, command)
    assert command in line
    assert "needs" in line


NOT_THERE = {"--report_to nonsense": "nonsense", "--report_to wandb": "wandb", "--use_8bit_adam": "bitsandbytes"}


@pytest.mark.parametrize("command", NOT_THERE)
def test_trackers_and_optimisers_that_are_not_installed(command, data, tmp_path, capsys, monkeypatch):
    for name in ("wandb", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    assert NOT_THERE[command] in refusal(1, capsys, command, train_data_dir=data, output_dir=tmp_path / "run")


# ---- Rows -----------------------------------------------------------------------------------------------------------


def changed(row: int, **values) -> list[dict]:
    """The data set with other values in one row."""
    return [each | values if i == row else each for i, each in enumerate(ROWS)]


def without(column: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name != column} for row in ROWS]


def too_many_pixels() -> bytes:
    """A BMP of 40000 x 40000, by its header."""
    return struct.pack("<2sIIIIiiHHIIIIII", b"BM", 54, 0, 54, 40, 40000, 40000, 1, 24, *[0] * 6)


def cut_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:1000]


def broken_exif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "WEBP", exif=b"Exif\x00\x00no TIFF header")
    return file.getvalue()


TIE = {"label_0": 0.5, "label_1": 0.5}
BAD_ROWS = [
    ("split 'train' has no column caption (it has jpg_0, jpg_1, ", without("caption")),
    ("split 'train' has no column jpg_1 ", without("jpg_1")),
    ("split 'train' has no column label_0 ", without("label_0")),
    ("split 'train' has no column words ", ROWS, "--caption_column words"),
    ("row 1: label_0 = 0.7, label_1 = 0.3, not (1, 0)", changed(1, label_0=0.7, label_1=0.3)),
    ("row 0: label_0 = 1, label_1 = 1, not", changed(0, label_0=1.0, label_1=1.0)),
    ("row 2: label_0 = 0, label_1 = 0, not", changed(2, label_0=0.0, label_1=0.0)),
    ("row 2: label_0 = nan", changed(2, label_0=None)),
    ("row 0: label_0 is 'left'", [row | {"label_0": "left"} for row in ROWS]),
    ("row 1: the caption is None, not a text", changed(1, caption=None)),
    ("row 0: the caption is 5, not a text", [row | {"caption": 5} for row in ROWS]),
    ("row 1: winner and loser are the same image", changed(1, jpg_1=ROWS[1]["jpg_0"])),
    ("row 1, jpg_0: not a readable image", changed(1, jpg_0=b"not an image")),
    ("row 2, jpg_1: not a readable image", changed(2, jpg_1=b"")),
    ("row 2, jpg_1: not a readable image", changed(2, jpg_1=None)),
    ("row 1: not a readable image", changed(1, jpg_1=ROWS[1]["jpg_1"][:900])),
    ("row 2, jpg_0: not a readable image", changed(2, jpg_0=cut_png())),
    ("row 1, jpg_1: not a readable image", changed(1, jpg_1=too_many_pixels())),
    ("row 0, jpg_0: not a readable image", changed(0, jpg_0=broken_exif())),
    ("row 0, jpg_0: not a readable image", [row | {"jpg_0": i} for i, row in enumerate(ROWS)]),
    ("no pairs to train on (3 ties left out)", [row | TIE for row in ROWS]),
    ("no column margin for --min_margin or --soft_labels: set --margin_column", ROWS, "--min_margin 1"),
    ("no column confidence for", ROWS, "--soft_labels 1 --margin_column confidence"),
    ("row 1: margin is nan", [row | {"margin": [1, None, 1][i]} for i, row in enumerate(ROWS)], "--min_margin 1"),
    ("row 1: margin is inf", [row | {"margin": [1, 1e999, 1][i]} for i, row in enumerate(ROWS)], "--soft_labels 1"),
    ("row 0: margin is 'wide'", [row | {"margin": "wide"} for row in ROWS], "--min_margin 1"),
    ("no pairs to train on (3 below --min_margin)", [row | {"margin": 1} for row in ROWS], "--min_margin 2"),
]


@pytest.mark.parametrize(("told", "rows", "command"), [(*case, "")[:3] for case in BAD_ROWS], ids=ids_of(BAD_ROWS))
def test_bad_rows(told, rows, command, tmp_path, capsys):
    folder = write_data(tmp_path / "pairs", rows)
    assert told in refusal(1, capsys, command, train_data_dir=folder, output_dir=tmp_path / "run")


def test_a_bad_row_of_the_validation_split(tmp_path, capsys):
    folder = write_data(tmp_path / "pairs", ROWS, changed(2, caption=None))
    line = refusal(1, capsys, train_data_dir=folder, output_dir=tmp_path / "run")
    assert "split 'validation', row 2: the caption is None" in line


def test_rows_are_counted_as_in_the_file_whatever_was_left_out(tmp_path, capsys):
    rows = changed(0, **TIE)
    rows[2] = rows[2] | {"jpg_0": b"not an image"}
    folder = write_data(tmp_path / "pairs", rows)
    assert "row 2, jpg_0" in refusal(1, capsys, train_data_dir=folder, output_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def latents() -> dict:
    """preference_data.json of latents that fit."""
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    made = {"shape": [8, 16, 16], "dtype": "float16", "scaling_factor": 0.25, "vae_hash": trainer.weights_hash(vae)}
    return {"latents": made}


FITS = bytes(2 * 8 * 16 * 16)
BAD_LATENTS = {
    "row 1: latents_0 holds": [FITS, FITS[:-2], FITS],
    "row 2: latents_0": [FITS, FITS, FITS[:-1]],
    "row 0: latents_0": [None, FITS, FITS],
}


@pytest.mark.parametrize("told", BAD_LATENTS)
def test_bad_latents(told, latents, tmp_path, capsys):
    values = zip(ROWS, BAD_LATENTS[told], strict=True)
    rows = [row | {"latents_0": value, "latents_1": FITS} for row, value in values]
    folder = write_data(tmp_path / "pairs", rows)
    (folder / "preference_data.json").write_text(json.dumps(latents))
    assert told in refusal(1, capsys, train_data_dir=folder, output_dir=tmp_path / "run")


def test_broken_metadata_of_latents(tmp_path, capsys):
    folder = write_data(tmp_path / "pairs", [row | {"latents_0": FITS, "latents_1": FITS} for row in ROWS])
    (folder / "preference_data.json").write_text('{"latents": ')
    assert "preference_data.json" in refusal(1, capsys, train_data_dir=folder, output_dir=tmp_path / "run")


# ---- Files of data --------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    """a.jpg and b.jpg"""
    folder.mkdir()
    for side, name in enumerate(("a.jpg", "b.jpg")):
        (folder / name).write_bytes(ROWS[0][f"jpg_{side}"])
    return folder


def json_file(folder: Path, *rows: dict) -> Path:
    (pictures(folder) / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


def winner_loser_folder(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a person" if name.endswith("caption") else ROWS[0]["jpg_0"])
    return folder


def file_of(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder / name


def empty_split(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).select([]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


PAIR = {"prompt": "a person", "path1": "a.jpg", "path2": "b.jpg", "confidence": 0.9}
VOTE = {"prompt": "a person", "image_0": "a.jpg", "image_1": "b.jpg", "prefer_0": True, "prefer_1": True}
BAD_FILES = [
    ("no folder", lambda at: at),
    ("holds no data set of pairs", lambda at: at.mkdir() or at),
    ("holds no data set of pairs: ", lambda at: file_of(at, "pairs.json", b'[{"prompt": ')),
    ("holds no data set of pairs", lambda at: file_of(at, "pairs.parquet", b"no parquet")),
    ("is no json, jsonl or parquet file", lambda at: file_of(at, "pairs.pdf", b"%PDF")),
    ("is no json, jsonl or parquet file", lambda at: file_of(at, "pairs", b"[]")),
    ("has no column", pictures),
    ("row 1: not a readable image", lambda at: json_file(at, PAIR, PAIR | {"path2": "c.jpg"})),
    ("row 0: not a readable image", lambda at: json_file(at, PAIR | {"path2": "."})),
    ("row 1, path2: not a readable image", lambda at: json_file(at, PAIR, PAIR | {"path2": None})),
    ("row 1: prefer_0 = 1, prefer_1 = 1", lambda at: json_file(at, VOTE | {"prefer_1": False}, VOTE)),
    ("a/w/1.png has no loser in ../l", lambda at: winner_loser_folder(at, "a/w/1.png", "a/1.caption")),
    ("a/w/1.png has no caption beside w", lambda at: winner_loser_folder(at, "a/w/1.png", "a/l/1.png")),
    ("no split 'train', only validation", lambda at: write_data(at, [], ROWS)),
    ("holds no data set of pairs", empty_split),
]


@pytest.mark.parametrize(("told", "make"), BAD_FILES, ids=ids_of(BAD_FILES))
def test_bad_files(told, make, tmp_path, capsys):
    path = make(tmp_path / "pairs")
    line = refusal(1, capsys, train_data_dir=path, output_dir=tmp_path / "run")
    assert told in line
    assert "An error occurred while generating the dataset" not in line  # the reason lies behind it


@pytest.mark.parametrize(
    "command", ["--dataset_split_name dev", "--dataset_config_name big", "--dataset_name nobody/x"]
)
def test_a_data_set_that_is_not_there(command, data, tmp_path, capsys):
    line = refusal(1, capsys, f"--dataset_name {data} {command}", output_dir=tmp_path / "run")
    assert "holds no data set of pairs" in line
    assert command.split()[1] in line


# ---- Models ---------------------------------------------------------------------------------------------------------


def model_with(folder: Path, file: str, **values) -> Path:
    """The embedded world's model with other values in one of its json files."""
    shutil.copytree(PIPELINE, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return folder


def model_cut(folder: Path, file: str) -> Path:
    """The model with half of one file."""
    shutil.copytree(PIPELINE, folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    return folder


def model_without(folder: Path, part: str) -> Path:
    return Path(shutil.copytree(PIPELINE, folder, ignore=shutil.ignore_patterns(part)))


def saved(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def without_unet(folder: Path) -> Path:
    transformer = DiTTransformer2DModel(2, 8, in_channels=8, num_layers=1, sample_size=16, num_embeds_ada_norm=4)
    return saved(DiTPipeline(transformer, AutoencoderKL.from_pretrained(PIPELINE / "vae"), DDIMScheduler()), folder)


def without_text(folder: Path) -> Path:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return saved(DDPMPipeline(unet, DDIMScheduler()), folder)


def other_unet(**values) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(PIPELINE / "unet") | values)


def for_inpainting(folder: Path) -> Path:
    shutil.copytree(PIPELINE, folder)
    other_unet(in_channels=17).save_pretrained(folder / "unet")
    return folder


SCHEDULER = "scheduler/scheduler_config.json"
BAD_MODELS = [
    ("no such model folder", lambda at: at),
    ("cannot load nobody/nothing", lambda at: "nobody/nothing"),
    ("holds no model_index.json", lambda at: at.mkdir() or at),
    ("cannot load", lambda at: model_cut(at, "model_index.json")),
    ("cannot load", lambda at: model_with(at, "model_index.json", _class_name="NoSuchPipeline")),
    ("cannot load", lambda at: model_without(at, "unet")),
    ("cannot load", lambda at: model_cut(at, "unet/diffusion_pytorch_model.safetensors")),
    ("cannot load", lambda at: model_cut(at, "text_encoder/model.safetensors")),
    ("cannot load", lambda at: model_cut(at, "tokenizer/tokenizer.json")),
    ("cannot load", lambda at: model_with(at, "unet/config.json", block_out_channels=[32, 64])),
    ("DiTPipeline has no", without_unet),
    ("DDPMPipeline has no", without_text),
    ("17", for_inpainting),
    (
        "'flow_prediction' of the scheduler is not",
        lambda at: model_with(at, SCHEDULER, prediction_type="flow_prediction"),
    ),
    (
        "zero terminal SNR: at timestep 999 epsilon says nothing about the image; set --timestep_range 0 999",
        lambda at: model_with(at, SCHEDULER, prediction_type="epsilon", rescale_betas_zero_snr=True),
    ),
]


@pytest.mark.parametrize(("told", "make"), BAD_MODELS, ids=ids_of(BAD_MODELS))
def test_bad_models(told, make, data, tmp_path, capsys):
    settings = {"pretrained_model_name_or_path": make(tmp_path / "model"), "resolution": 64}
    assert told in refusal(1, capsys, train_data_dir=data, output_dir=tmp_path / "run", **settings)


def test_a_variant_that_is_not_there(data, tmp_path, capsys):
    line = refusal(1, capsys, "--variant nope", train_data_dir=data, output_dir=tmp_path / "run")
    assert "cannot load" in line
    assert "nope" in line


def test_timesteps_beyond_the_schedule(data, tmp_path, capsys):
    line = refusal(1, capsys, "--timestep_range 0 1001", train_data_dir=data, output_dir=tmp_path / "run")
    assert line == "--timestep_range ends at 1001, the model's schedule at 1000"


# ---- Earlier stages -------------------------------------------------------------------------------------------------


def lora_of(unet: UNet2DConditionModel, folder: Path) -> Path:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


def cut_lora(folder: Path) -> Path:
    path = lora_of(other_unet(), folder) / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    return folder


def lora_of_a_transformer(folder: Path) -> Path:
    folder.mkdir()
    weights = {f"transformer.blocks.0.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return folder


BAD_LORAS = [
    ("no such", lambda at: at),
    ("does not fit", lambda at: at.mkdir() or at),
    ("does not fit", cut_lora),
    ("does not fit", lambda at: lora_of(other_unet(block_out_channels=[32, 64]), at)),
    ("--initial_lora", lambda at: PIPELINE / "unet" / "diffusion_pytorch_model.safetensors"),
    ("holds no LoRA for this model", lora_of_a_transformer),
]


@pytest.mark.parametrize(("told", "make"), BAD_LORAS, ids=ids_of(BAD_LORAS))
def test_bad_initial_loras(told, make, data, tmp_path, capsys):
    path = make(tmp_path / "lora")
    line = refusal(1, capsys, initial_lora=path, train_data_dir=data, output_dir=tmp_path / "run")
    assert f"--initial_lora {path}" in line
    assert told in line


def test_bad_initial_unets(data, tmp_path, capsys):
    other_unet(block_out_channels=[32, 64]).save_pretrained(tmp_path / "other" / "unet")
    settings = {"full_unet": True, "train_data_dir": data, "output_dir": tmp_path / "run"}
    for name, told in (("none", "no such"), ("other", "does not fit")):
        line = refusal(1, capsys, initial_unet=tmp_path / name, **settings)
        assert f"--initial_unet {tmp_path / name}" in line
        assert told in line


# ---- Checkpoints and output -----------------------------------------------------------------------------------------


def cut_checkpoint(run: Path, folder: Path, file: str) -> Path:
    shutil.copytree(run / "checkpoint-2", folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    return folder


BAD_CHECKPOINTS = [
    ("is no checkpoint of this script", lambda run, at: at),
    ("is no checkpoint of this script", lambda run, at: at.mkdir() or at),
    ("is no checkpoint of this script", lambda run, at: cut_checkpoint(run, at, "run.json")),
    ("cannot be read", lambda run, at: cut_checkpoint(run, at, "state.pt")),
    ("cannot be read", lambda run, at: cut_checkpoint(run, at, "model.safetensors")),
    ("is of another run: seed (0 there, 1 here)", lambda run, at: run / "checkpoint-2", "--seed 1"),
    ("is of step 2, past --max_train_steps 1", lambda run, at: run / "checkpoint-2", "--max_train_steps 1"),
    ("is of another run: lora_alpha (8 there, 4 here), rank", lambda run, at: run / "checkpoint-2", "--rank 4"),
]


@pytest.mark.parametrize(
    ("told", "make", "command"), [(*case, "")[:3] for case in BAD_CHECKPOINTS], ids=ids_of(BAD_CHECKPOINTS)
)
def test_bad_checkpoints(told, make, command, data, run, tmp_path, capsys):
    path = make(run, tmp_path / "checkpoint-2")
    settings = {"resume_from_checkpoint": path, "encoded_dir": run / "cache", "output_dir": tmp_path / "run"}
    line = refusal(1, capsys, command, train_data_dir=data, **settings)
    assert line.startswith(str(path))
    assert told in line


def test_other_pairs_and_other_weights_are_another_run(data, run, tmp_path, capsys):
    settings = {"resume_from_checkpoint": run / "checkpoint-2", "output_dir": tmp_path / "run"}
    other = write_data(tmp_path / "pairs", ROWS[:2])
    assert "is of another run: data (" in refusal(1, capsys, train_data_dir=other, **settings)

    model = shutil.copytree(PIPELINE, tmp_path / "model")
    settings = {"pretrained_model_name_or_path": model, "resolution": 64, "train_data_dir": data}
    train(data, tmp_path / "mine", max_train_steps=1, checkpointing_steps=1, encoded_dir=run / "cache", **settings)
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors")
    settings |= {"output_dir": tmp_path / "mine", "resume_from_checkpoint": "latest"}
    assert "checkpoint-1 is of another run: model (" in refusal(1, capsys, **settings)


def test_folders_that_are_taken_or_cannot_be_written_to(data, run, tmp_path, capsys):
    line = refusal(1, capsys, train_data_dir=data, output_dir=run)
    assert line.startswith(f"{run} holds a run already")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        line = refusal(1, capsys, train_data_dir=data, output_dir=path)
        assert line.startswith(f"cannot write to --output_dir {path}: ")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        line = refusal(1, capsys, train_data_dir=data, output_dir=tmp_path / "run", encoded_dir=path)
        assert str(path) in line
        assert "--encoded_dir" in line


def test_a_checkpoint_that_cannot_be_written(data, run, tmp_path, capsys, monkeypatch):
    def full(state, path):
        if state["step"] == 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    settings = {"encoded_dir": run / "cache", "output_dir": tmp_path / "run", "train_data_dir": data}
    line = refusal(1, capsys, "--checkpointing_steps 1", **settings)
    assert "checkpoint-2: [Errno 28] No space left on device (last complete checkpoint: checkpoint-1)" in line
    assert not list((tmp_path / "run").glob("*.partial"))


# ---- A loss that is no number ---------------------------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch) -> list[int]:
    """Grows by one with each update of the weights."""
    done, update = [], torch.optim.AdamW.step

    def step(*args, **kwargs):
        done.append(len(done))
        return update(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return done


def test_a_pair_that_is_not_finite_stops_the_run_before_the_weights_are_touched(latents, tmp_path, updates, capsys):
    rows = [row | {"latents_0": FITS, "latents_1": bytes(FITS)} for row in make_rows(6)]
    bad = int(trainer.epoch_order(0, 0, pairs_in_buckets([6], 2))[4])
    rows[bad]["latents_1"] = b"\x00\x7c" + FITS[2:]  # inf
    folder = write_data(tmp_path / "pairs", rows)
    (folder / "preference_data.json").write_text(json.dumps(latents))
    line = refusal(1, capsys, "--checkpointing_steps 1", train_data_dir=folder, output_dir=tmp_path / "run")
    assert re.search(rf"not finite in step 3, rows {bad}\b", line)
    assert len(updates) == 2
    assert [path.name for path in trainer.checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_a_learning_rate_that_is_far_too_high(data, tmp_path, updates, capsys):
    command = "--learning_rate 1e30 --checkpointing_steps 1"
    line = refusal(1, capsys, command, train_data_dir=data, output_dir=tmp_path / "run")
    assert "not finite in step 2, rows " in line
    assert "--learning_rate" in line
    assert len(updates) == 1
    assert [path.name for path in trainer.checkpoints(tmp_path / "run")] == ["checkpoint-1"]


# ---- No error -------------------------------------------------------------------------------------------------------


def test_long_captions_are_cut_and_counted(data, tmp_path, capsys):
    folder = write_data(tmp_path / "pairs", changed(1, caption="a person " * 30))
    train(folder, tmp_path / "run", max_train_steps=1)
    assert "captions:  1 of 3 have more than 24 tokens and are cut there" in capsys.readouterr().out
