# samestep with everything it needs on a machine with NVIDIA's driver and container toolkit. See docs/shipping.md.
#   docker build -t samestep .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/samestep/runs" -v "$HOME/.cache:/cache" samestep run qwen2vl_7b_chartqa
# PyTorch's wheels bring CUDA's libraries; the image adds the compiler that DeepSpeed's and Triton's kernels ask for.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3 python3-dev python3-venv g++ git libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first, in the tested versions: this layer stays when only samestep's own files change.
ENV PATH=/opt/samestep/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv /opt/samestep \
    && mkdir launch trainer recipes accelerate_configs ds_configs slurm \
    && pip install -c constraints.txt . \
    && pip uninstall -y samestep

COPY . .
RUN pip install --no-deps .

# Caches and runs belong to volumes; a user without a home can write there too.
ENV HF_HOME=/cache/huggingface SAMESTEP_CACHE=/cache/samestep TRITON_CACHE_DIR=/cache/triton
RUN mkdir -p /cache /samestep/runs && chmod 1777 /cache /samestep /samestep/runs
WORKDIR /samestep
ENTRYPOINT ["samestep"]
CMD ["--help"]
