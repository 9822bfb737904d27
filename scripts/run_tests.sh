#!/usr/bin/env bash
# Runs every check from nothing: style, types, import contracts, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment
install_extras test,megatron
bin="$environment/bin"
cd "$repository"

"$bin/ruff" check
"$bin/ruff" format --check
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" -m pytest "$@"
