# SPDX-License-Identifier: Apache-2.0
"""What train_dpo_human.py says to bad input: one line that names what is wrong. Status 2 where the command line alone
shows it, else 1."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from train_helpers import LORA, PIPELINE, SMALL, flags, make_rows, write_data
from train_helpers import data as _data  # noqa: F401, the fixture

import train_dpo_human as trainer


ROWS = make_rows(3)


def model(folder: Path, **index) -> dict:
    """The embedded world's model with another model_index.json."""
    file = Path(shutil.copytree(PIPELINE, folder)) / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return {"pretrained_model_name_or_path": folder, "resolution": 64}


def other_unet(folder: Path) -> dict:
    config = UNet2DConditionModel.load_config(PIPELINE / "unet") | {"block_out_channels": [32, 64]}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return {"full_unet": True, "initial_unet": folder}


def wrong_lora(folder: Path) -> dict:
    folder.mkdir()
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(96, 2)}
    save_file(weights, folder / LORA)
    return {"initial_lora": folder}


def model_of_fp16_files(folder: Path) -> dict:
    settings = model(folder)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return settings


USAGE = {
    "--rank: must be at least 1": "--rank 0",
    "--learning_rate: must be above 0": "--learning_rate nan",
    "--validation_share: must be": "--validation_share 1",
    "unrecognized arguments: --full": "--full",
    "--freeze_unet and --full_unet contradict each other": "--freeze_unet --train_text_encoder --full_unet",
    "--initial_unet needs --full_unet": "--initial_unet unet",
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
    "set --variant fp16": model_of_fp16_files,
    "is called nonsense, q": lambda at: {"lora_layers": ["to_q", "nonsense", "q"]},
    "must be multiples of 8": lambda at: {"resolution": 68},
    "LoRA {at} does not fit": wrong_lora,
    "--initial_unet {at} does not fit": other_unet,
    "--report_to nonsense is not installed": lambda at: {"report_to": "nonsense"},
}  # fmt: skip


@pytest.mark.parametrize("told", [*USAGE, *BAD])
def test_bad_input(told, data, tmp_path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = SMALL | {"train_data_dir": data, "output_dir": tmp_path / "run"}
    settings |= BAD[told](tmp_path / "bad") if told in BAD else {}
    with pytest.raises(SystemExit) as stop:
        trainer.cli(flags(settings) + USAGE.get(told, "").split())
    assert (stop.value.code == 2) == (told in USAGE)
    # Python prints a text and leaves with status 1
    text = stop.value.code if told in BAD else capsys.readouterr().err[-999:]
    line = text.partition("train_dpo_human.py: ")[2].removeprefix("error: ").rstrip("\n")
    assert told.format(at=tmp_path / "bad") in line
    assert "\n" not in line
    assert not (tmp_path / "run" / ("" if told in USAGE else LORA)).exists()


def test_what_nobody_foresaw_keeps_its_traceback(data, tmp_path, monkeypatch):
    for error, expected in ((ZeroDivisionError("unforeseen"), ZeroDivisionError), (KeyboardInterrupt(), SystemExit)):
        monkeypatch.setattr(trainer, "main", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(expected) as stop:
            trainer.cli(flags(SMALL | {"train_data_dir": data, "output_dir": tmp_path / "run"}))
    assert stop.value.code == 130
