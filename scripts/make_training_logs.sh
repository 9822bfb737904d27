#!/usr/bin/env bash
# Trains small models with real Megatron-Core on the CPU, converts a checkpoint in the middle, trains
# on, converts back, trains on, and writes the losses beside those of a run that was never
# interrupted: logs/train_dense.log and logs/train_moe.log.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = "--help" ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    exit
fi
cd "$repository"
for model in dense moe; do
    "$environment/bin/python" -m tests.training.resume "$model" "logs/train_$model.log" --steps 20
done
