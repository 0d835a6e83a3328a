#!/bin/bash
# All that is to be measured on a machine with one GPU, in at most eight minutes, the most valuable first:
#     benchmarks/gpu.sh FOLDER            # FOLDER/gpu.jsonl has the rows, FOLDER/*.log what each part printed
#     benchmarks/gpu.sh FOLDER --small    # tiny sizes on a CPU
# Needs torch, transformers, peft, numpy, and what wrpo_ray imports; PYTHON names the interpreter.
# With trl, datasets and liger-kernel, TRL's DPO with Liger's kernels takes part in `step`; else step.log says that it is absent.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python}
failed=0

part() {  # seconds, name, command
    local limit=$1 name=$2
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit code $code"
    [ $code -eq 0 ] || failed=1
}

part 90 agree "$python" -m pytest -q tests/gpu/test_attention_gpu.py
part 150 step "$python" -W ignore benchmarks/gpu.py step --output "$out" "$@"
part 60 head "$python" -W ignore benchmarks/gpu.py head --output "$out" "$@"
part 80 launches "$python" -W ignore benchmarks/gpu.py launches --output "$out" "$@"
part 90 lora "$python" -W ignore benchmarks/gpu.py lora --output "$out" "$@"
exit $failed
