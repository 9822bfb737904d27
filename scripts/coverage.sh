#!/usr/bin/env bash
# Measures which lines of the package the tests run, and writes a table of all modules:
# logs/coverage.md. Forked workers count, unless they are killed, as when one finds an error; programs
# in processes of their own (kills, fuzzing, Megatron, the commands of the pages) do not run. Arguments
# go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = "--help" ]; then
    sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"
    exit
fi
cd "$repository"
coverage=("$environment/bin/python" -m coverage)
mkdir -p build/coverage
"${coverage[@]}" erase
"${coverage[@]}" run -m pytest -m "not megatron" --ignore tests/test_fuzz.py --ignore tests/test_readme.py \
    --deselect tests/run/test_crash.py::test_killed_at_any_moment_a_rerun_ends_with_the_same_bytes "$@" | tee build/coverage/tests.txt
"${coverage[@]}" combine --quiet
{
    echo "Lines of each module that the tests run, by \`scripts/coverage.sh\`:"
    echo "$(tail -n 1 build/coverage/tests.txt | tr -d =), $("$environment/bin/python" --version)."
    echo
    "${coverage[@]}" report --format=markdown --precision=1
} >logs/coverage.md
cat logs/coverage.md
