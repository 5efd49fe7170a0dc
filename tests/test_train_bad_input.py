# SPDX-License-Identifier: Apache-2.0
"""What train_dpo_human.py says to bad input: one line that names what is wrong. Status 2 where the command line alone
shows it, else 1."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from train_helpers import LORA, PIPELINE, SMALL, data, flags, make_rows, tiny_sd3, train, write_data  # noqa: F401

import train_dpo_human as trainer


ROWS = make_rows(3)
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


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
    assert line
    assert "\n" not in line
    return line


# ---- The table ------------------------------------------------------------------------------------------------------


def file_in(folder: Path, name: str, content: bytes = b"") -> Path:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder / name


def other_unet(folder: Path, **values) -> Path:
    config = UNet2DConditionModel.load_config(PIPELINE / "unet") | values
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def model(folder: Path, unet: dict | None = None, **index) -> dict:
    """The embedded world's model with another model_index.json, and perhaps another U-Net."""
    file = Path(shutil.copytree(PIPELINE, folder)) / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    if unet:
        other_unet(folder, **unet)
    return {"pretrained_model_name_or_path": folder, "resolution": 64}


def scheduler(folder: Path, name: str, **values) -> dict:
    settings = model(folder, scheduler=["diffusers", name])
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name} | values))
    return settings


def model_cut(folder: Path, file: str) -> dict:
    settings = model(folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:2000])
    return settings


def model_of_fp16_files(folder: Path) -> dict:
    settings = model(folder)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return settings


def lora(folder: Path, **weights: torch.Tensor) -> dict:
    folder.mkdir()
    sides = {"lora_A.weight": torch.ones(2, 96), "lora_B.weight": torch.ones(96, 2)} | weights
    save_file({f"unet.{QUERY}.{side}": value for side, value in sides.items()}, folder / LORA)
    return {"initial_lora": folder}


USAGE = {
    "--rank 0": "--rank: must be at least 1",
    "--learning_rate nan": "--learning_rate: must be above 0",
    "--validation_share 1": "--validation_share: must be",
    "--full": "unrecognized arguments: --full",
    "--freeze_unet --train_text_encoder --full_unet": "--freeze_unet and --full_unet contradict each other",
    "--initial_unet unet": "--initial_unet needs --full_unet",
}
BAD = {
    "no folder {at}": lambda at: {"train_data_dir": at},
    "no column caption (it has jpg_0, jpg_1, label_0, label_1)": lambda at: {
        "train_data_dir": write_data(at, [{name: row[name] for name in row if name != "caption"} for row in ROWS])},
    "no pairs to train on (3 tied)": lambda at: {
        "train_data_dir": write_data(at, [row | {"label_0": 0.5, "label_1": 0.5} for row in ROWS])},
    "{at} has no split 'dev'": lambda at: {"dataset_name": write_data(at, ROWS), "dataset_split_name": "dev"},
    "cannot load {at}": lambda at: {"pretrained_model_name_or_path": at},
    "{at} is a StableDiffusionInpaintPipeline": lambda at: model(at, _class_name="StableDiffusionInpaintPipeline"),
    "cannot load {at}: ": lambda at: model_cut(at, "unet/diffusion_pytorch_model.safetensors"),
    "cannot load {at}:": lambda at: model_cut(at, "text_encoder/model.safetensors"),
    "set --variant fp16": model_of_fp16_files,
    "EDMDPMSolverMultistepScheduler": lambda at: scheduler(at, "EDMDPMSolverMultistepScheduler"),
    "LCMScheduler": lambda at: scheduler(at, "LCMScheduler"),
    "at timestep 999 epsilon says nothing about the image; set --timestep_range 0 999": lambda at: scheduler(
        at, "DDIMScheduler", prediction_type="epsilon", rescale_betas_zero_snr=True),
    "must be multiples of 8": lambda at: {"resolution": 68},
    "--timestep_range 0 1001": lambda at: {"timestep_range": [0, 1001]},
    "--timestep_range 900 100": lambda at: {"timestep_range": [900, 100]},
    "--export_kohya: kohya's format is for U-Nets": lambda at: {
        "pretrained_model_name_or_path": tiny_sd3(at, t5=True), "resolution": 48, "export_kohya": True},
    "LoRA {at} does not fit": lambda at: lora(at, **{"lora_A.weight": torch.ones(2, 64)}),
    "{at} is a DoRA": lambda at: lora(at, lora_magnitude_vector=torch.ones(96)),
    "{at}": lambda at: {"initial_lora": at},
    "--report_to nonsense is not installed": lambda at: {"report_to": "nonsense"},
}  # fmt: skip
LEFT_TO_LIBRARIES = {  # whose error is clear, and comes before anything is trained
    "any data files": lambda at: {"train_data_dir": file_in(at, "README.md").parent},
    "generating the dataset": lambda at: {"train_data_dir": file_in(at, "pairs.json", b'[{"prompt": ')},
    "to have 17 channels": lambda at: model(at, {"in_channels": 17}),
    "none/run.json": lambda at: {"resume_from_checkpoint": at / "none"},
}


@pytest.mark.parametrize("command", USAGE)
def test_mistakes_in_the_command_line(command, data, tmp_path, capsys):  # noqa: F811
    assert USAGE[command] in refusal(2, capsys, command, train_data_dir=data, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", BAD)
def test_bad_input(told, data, tmp_path, capsys):  # noqa: F811
    settings = {"train_data_dir": data, "output_dir": tmp_path / "run"} | BAD[told](tmp_path / "bad")
    assert told.format(at=tmp_path / "bad") in refusal(1, capsys, **settings)
    assert not (tmp_path / "run" / LORA).exists()


@pytest.mark.parametrize("told", LEFT_TO_LIBRARIES)
def test_what_libraries_tell(told, data, tmp_path):  # noqa: F811
    with pytest.raises(Exception, match=told):
        train(data, tmp_path / "run", **LEFT_TO_LIBRARIES[told](tmp_path / "bad"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="no mistake where there is a GPU")
@pytest.mark.parametrize("command", ["--mixed_precision fp16", "--enable_xformers_memory_efficient_attention"])
def test_what_needs_a_gpu(command, capsys):
    assert re.search("fp16 needs a GPU|xformers.* needs CUDA", refusal(2, capsys, command))


# ---- What needs more than a flag ------------------------------------------------------------------------------------


def test_initial_unets_that_are_not_there_or_do_not_fit(data, tmp_path, capsys):  # noqa: F811
    other_unet(tmp_path / "other", block_out_channels=[32, 64])
    for name in ("none", "other"):
        settings = {"initial_unet": tmp_path / name, "train_data_dir": data, "output_dir": tmp_path / f"run {name}"}
        assert f"--initial_unet {tmp_path / name} does not fit" in refusal(1, capsys, full_unet=True, **settings)


def test_checkpoints_and_folders_of_another_run(data, tmp_path, capsys):  # noqa: F811
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-1"
    train(data, run, max_train_steps=1, checkpointing_steps=1)
    assert refusal(1, capsys, train_data_dir=data, output_dir=run).startswith(f"{run} holds a run already")
    settings = {"resume_from_checkpoint": checkpoint, "train_data_dir": data}
    line = refusal(1, capsys, "--rank 4 --seed 1", output_dir=tmp_path / "a", **settings)
    differ = "lora_alpha (8 there, 4 here), rank (8 there, 4 here), seed (0 there, 1 here)"
    assert line == f"{checkpoint} is of another run: {differ}"
    settings["train_data_dir"] = write_data(tmp_path / "pairs", ROWS)
    assert f"{checkpoint} is of another run: data (" in refusal(1, capsys, output_dir=tmp_path / "b", **settings)


def test_folders_that_cannot_be_written_to(data, tmp_path, capsys):  # noqa: F811
    taken = file_in(tmp_path / "a", "file")
    for path in (taken, taken / "run"):
        line = refusal(1, capsys, train_data_dir=data, output_dir=path)
        assert line.startswith(f"cannot write to --output_dir {path}: ")
        with pytest.raises((OSError, trainer.UserError), match=str(path)):
            train(data, tmp_path / f"run {path.name}", encoded_dir=path)


def test_what_nobody_foresaw_keeps_its_traceback(data, tmp_path, monkeypatch):  # noqa: F811
    for error, expected in ((ZeroDivisionError("unforeseen"), ZeroDivisionError), (KeyboardInterrupt(), SystemExit)):
        monkeypatch.setattr(trainer, "main", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(expected) as stop:
            trainer.cli(flags(SMALL | {"train_data_dir": data, "output_dir": tmp_path / "run"}))
    assert stop.value.code == 130
