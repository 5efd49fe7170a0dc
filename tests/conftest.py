# SPDX-License-Identifier: Apache-2.0
"""Tests run the scripts' main() in this process, on one thread, and never ask the network."""

import os
import sys
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch


torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
