# Sourced by the other scripts: a virtual environment in the checkout, made when it is needed.

repository="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="${PP_TO_VPP_ENVIRONMENT:-$repository/.venv}"

make_environment() {
    [ -x "$environment/bin/python" ] && return
    echo "making a virtual environment in $environment" >&2
    python3 -m venv "$environment" 2>/dev/null && return
    # Debian keeps the venv module in a package of its own; pip is enough to do without it.
    rm -rf "$environment"
    local tools
    tools="$(mktemp -d)"
    python3 -m pip install --quiet --target "$tools" virtualenv
    PYTHONPATH="$tools" python3 -m virtualenv --quiet "$environment"
    rm -rf "$tools"
}

# Arguments: extras of the package, as in "test,megatron".
install_extras() {
    # torch first: what depends on it would pull another build
    "$environment/bin/python" -c 'import torch' 2>/dev/null ||
        "$environment/bin/python" -m pip install --quiet torch==2.13.0
    "$environment/bin/python" -m pip install --quiet --editable "$repository[$1]"
}
