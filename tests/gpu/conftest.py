"""Tests in this folder need CUDA: without it they are not collected, so that no skip looks like coverage."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
