# Set up and activate .venv with ep_comm and the given extras, megatron,wandb as a rule; run from the
# repository root:
#
#   source scripts/setup_venv.sh megatron,wandb
#
# An installed torch (with its CUDA, and Transformer Engine if it is there) is used as it is and
# never replaced. Nothing is installed again as long as the package's own files stay the same.
# PYTHON chooses the interpreter of a new .venv.

# Run pip install, with a line for each package and each build: a minute or two go by.
install_packages() {
    pip install --progress-bar off "$@" | sed -unE \
        -e 's/^Collecting ([^ ]+).*/   \1/p' \
        -e 's/^ *(Building|Preparing) (.*): started$/   \1 \2/p' \
        -e 's/^Installing collected packages:.*/   installing them/p'
    return "${PIPESTATUS[0]}" # for those who source this file without pipefail
}

setup_venv() {
    local extras=$1 python=${PYTHON:-python3} constraints=.venv/constraints.txt torch_dir
    if [ ! -e .venv/bin/activate ]; then
        if torch_dir=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__path__[0]))' \
            2>/dev/null); then
            echo "== creating .venv on top of the torch in $torch_dir"
            "$python" -m venv --system-site-packages .venv
            # A torch inside another virtual environment is no system package: name its folder.
            .venv/bin/python -c 'import torch' 2>/dev/null ||
                echo "$torch_dir" >"$(.venv/bin/python -c \
                    'import sysconfig; print(sysconfig.get_path("purelib"))')/reuse_torch.pth"
        else
            echo "== creating .venv"
            "$python" -m venv .venv
        fi
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate

    local stamp
    stamp="$extras $({ cat pyproject.toml setup.py; find csrc -type f | sort | xargs cat; } | cksum)"
    if [ "$(cat .venv/installed.txt 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    if ! python -c 'import torch' 2>/dev/null; then
        if nvidia-smi -L >/dev/null 2>&1; then
            echo "== installing torch"
            install_packages numpy torch
        else
            # A CPU build where pip is pointed at one (the exact version lets it be found), else
            # the default build: it works without a GPU too, but brings gigabytes of CUDA libraries.
            echo "== installing torch for CPU"
            install_packages numpy torch==2.13.0
        fi
    fi
    python -c 'import torch; print(f"torch=={torch.__version__}")' >"$constraints"
    # Tests want the library between nodes too, which is built where NVSHMEM is there before.
    if [[ ",$extras," == *,test,* ]] &&
        ! python -c 'from importlib.util import find_spec; assert find_spec("nvidia.nvshmem")' 2>/dev/null; then
        echo "== installing NVSHMEM"
        install_packages "$(grep -o 'nvidia-nvshmem-cu13==[0-9.]*' pyproject.toml)"
    fi
    echo "== installing ep_comm[$extras]"
    install_packages --constraint "$constraints" --editable ".[$extras]"
    echo "$stamp" >.venv/installed.txt
}

setup_venv "${1:-megatron,wandb}"
