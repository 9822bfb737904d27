#!/usr/bin/env bash
# Trains small models with real Megatron-Core on the CPU, converts a checkpoint in the middle, trains
# on, converts back, trains on, and writes the losses beside those of a run that was never
# interrupted: logs/train_MODEL.log, and a plot of each. Arguments are models, all eleven by default.
# Muon and the hybrid need a newer Megatron-Core, which comes into a folder of its own, build/newer;
# where it cannot be had, a line says so and they are left out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = "--help" ]; then
    sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"
    exit
fi
make_environment
install_extras megatron,plots
cd "$repository"
python="$environment/bin/python"
newer=build/newer
left_out=77

# Wheels for Python 3.12 are all that there is; what is used of them runs under earlier ones too.
get_newer() {
    [ -d "$newer" ] && return
    echo "fetching what Muon and the hybrid need into $newer" >&2
    rm -rf "$newer.part"
    "$python" -m pip install --quiet --no-deps --target "$newer.part" --only-binary=:all: \
        --python-version 3.12 --ignore-requires-python \
        megatron-core==0.19.2 emerging-optimizers==0.3.0 absl-py==2.5.1 && mv "$newer.part" "$newer"
}

[ $# -gt 0 ] || set -- dense moe deepseek_v2 deepseek_v3 uneven one_stage twice_the_stages half_the_stages muon dist_muon hybrid
for model in "$@"; do
    path="${PYTHONPATH:-}"
    case "$model" in
        *muon | hybrid) get_newer && path="$repository/$newer:$path" ;;
    esac
    log="logs/train_$model.log"
    PYTHONPATH="$path" "$python" -m tests.training.resume "$model" "$log" --steps 10 || {
        [ $? = $left_out ] && continue
        exit 1
    }
    "$python" scripts/plot.py "$log"
done
