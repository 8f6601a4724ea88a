# nemo_ssopd on NVIDIA's NeMo container, which brings torch, Megatron-Core, Transformer Engine and vLLM (see docs/gpu.md).
#   docker build -t nemo-ssopd .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
#       -v "$PWD/models:/workspace/models:ro" -v "$PWD/runs:/workspace/runs" nemo-ssopd --config-name qwen3_8b_tp2
FROM nvcr.io/nvidia/nemo:26.06

# What the container lacks, pinned; nothing of its own stack is replaced.
RUN pip install --no-cache-dir --no-deps math-verify==0.9.0 latex2sympy2_extended==1.11.0

WORKDIR /workspace
COPY pyproject.toml README.md LICENSE ./
COPY nemo_ssopd ./nemo_ssopd
COPY conf ./conf
COPY scripts ./scripts
COPY tools ./tools
COPY assets ./assets
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --uid 10001 --create-home ssopd \
    && install --directory --owner ssopd --group ssopd --mode 1777 runs models

# Caches of vLLM, torch, Triton and Hugging Face go where any user may write, whatever --user says. A uid that the image does
# not know has no name, and torch 2.11's compiler asks for one.
ENV USER=ssopd HOME=/tmp/home HF_HOME=/tmp/home/huggingface XDG_CACHE_HOME=/tmp/home/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/home/inductor TRITON_CACHE_DIR=/tmp/home/triton \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001

ENTRYPOINT ["nemo-ssopd-train"]
CMD ["--help"]
