"""Imported once, by the server that the tests fork their processes from: see tests/distributed.py."""

# ruff: noqa: F401
import contextlib
import gc

import matplotlib.backends.backend_agg
import nemo.core.config
import peft
import transformers.models.auto.modeling_auto
import transformers.models.qwen3.modeling_qwen3

import nemo_ssopd.convert.commands
import nemo_ssopd.evaluation.run
import nemo_ssopd.ops.row_kernels_cpu
import nemo_ssopd.train

with contextlib.suppress(ImportError):  # what vLLM imports when an engine starts; a version may have it elsewhere
    import vllm.model_executor.models.qwen3
    import vllm.v1.worker.cpu_worker

gc.collect()
gc.freeze()  # so that collections in the forked processes, of which an engine makes several, do not go through all this
