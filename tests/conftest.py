"""Test set-up: one thread per process, as ranks have."""

import torch

torch.set_num_threads(1)
