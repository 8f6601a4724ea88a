"""Imported once, by the server that the tests fork their processes from: see tests/distributed.py."""

import gc

import matplotlib.backends.backend_agg
import nemo.core.config
import peft
import transformers.models.auto.modeling_auto
import transformers.models.qwen3.modeling_qwen3

import nemo_ssopd.convert.commands
import nemo_ssopd.evaluation.run
import nemo_ssopd.ops.row_kernels_cpu
import nemo_ssopd.train  # noqa: F401

gc.collect()
gc.freeze()  # so that collections in the forked processes, of which an engine makes several, do not go through all this
