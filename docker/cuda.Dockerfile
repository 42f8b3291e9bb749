# margin-align with CUDA: torch's wheels bring the CUDA libraries, the machine brings the driver. Several GB.
#   docker build --file docker/cuda.Dockerfile --tag margin-align:cuda .
#   docker run --rm --gpus all --ipc host --volume "$PWD":/work margin-align:cuda doctor
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/work/.cache/huggingface
# Triton, which torch.compile uses, compiles with the system's C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/margin-align
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY configs ./configs
COPY docs ./docs
COPY align ./align
COPY reward_models ./reward_models
# vLLM wants an environment of its own (docs/generation.md); `--base-url` reaches a server in another container.
RUN pip install --constraint constraints.txt '.[report,filter]'
RUN useradd --create-home aligner
USER aligner
WORKDIR /work
ENTRYPOINT ["align"]
CMD ["--help"]
