#!/usr/bin/env bash
# Runs every check from nothing: style, types, import contracts, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment
bin="$environment/bin"
cd "$repository"
# torch first: what depends on it would pull another build
"$bin/python" -c 'import torch' 2>/dev/null || "$bin/python" -m pip install --quiet torch==2.13.0
"$bin/python" -m pip install --quiet --editable '.[test,megatron]'

"$bin/ruff" check
"$bin/ruff" format --check
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" -m pytest "$@"
