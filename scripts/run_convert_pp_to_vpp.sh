#!/usr/bin/env bash
# Runs the converter with the given arguments, and keeps a log of the run under logs/.
# Without arguments it converts the sample checkpoint that ships with the project.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

python=python3
if ! python3 -c 'import numpy, tqdm' 2>/dev/null; then
    make_environment
    python="$environment/bin/python"
    "$python" -c 'import numpy, tqdm' 2>/dev/null || "$python" -m pip install --quiet numpy tqdm
fi

if [ $# -eq 0 ]; then
    example="${PP_TO_VPP_EXAMPLE:-$repository/example}"
    mkdir -p "$example"
    tar -xf "$repository/tests/data/moe-pp2ep2-v016.tar.xz" -C "$example" \
        --strip-components 2 --one-top-level=ckpt moe-pp2ep2-v016/source
    echo "converting the sample checkpoint: a small MoE model, PP 2, EP 2, saved by Megatron-LM 0.16.1"
    "${BASH_SOURCE[0]}" \
        --load-iteration-dir "$example/ckpt" --save-iteration-dir "$example/ckpt-converted" \
        --target-virtual-pipeline-model-parallel-size 2 --resume
    echo "source and target are in $example: ckpt, ckpt-converted"
    exit
fi

log="${PP_TO_VPP_LOGS:-$repository/logs}/convert-$(date +%Y%m%d-%H%M%S)-$$.log"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m pp_to_vpp --log-file "$log" "$@"
