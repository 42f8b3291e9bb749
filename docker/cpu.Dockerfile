# margin-align on a CPU. Build in the root of a checkout:
#   docker build --file docker/cpu.Dockerfile --tag margin-align:cpu .
#   docker run --rm --volume "$PWD":/work margin-align:cpu doctor
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/work/.cache/huggingface
WORKDIR /opt/margin-align
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY configs ./configs
COPY docs ./docs
COPY align ./align
COPY reward_models ./reward_models
RUN pip install --constraint constraints.txt '.[report,filter]'
RUN useradd --create-home aligner
USER aligner
WORKDIR /work
ENTRYPOINT ["align"]
CMD ["--help"]
