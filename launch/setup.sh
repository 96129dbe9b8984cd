# Makes the environment that the other launch files need. Source it: it activates .venv where it made one.
#   source launch/setup.sh
# An active environment that already has torch is used as it is; otherwise .venv is made with Python 3.11+ and torch 2.13.0
# (the CPU build unless nvidia-smi finds a GPU). Nothing is installed again until pyproject.toml changes.

kvds_setup() {
  local root python torch gpu headers stamp
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

  if ! python -c 'import torch' 2>/dev/null; then
    if [ ! -x "$root/.venv/bin/python" ]; then
      for python in python3.11 python3.12 python3.13 python3 ''; do
        [ -n "$python" ] && "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      done
      if [ -z "$python" ]; then
        echo "setup: no Python 3.11 or newer with venv was found; install one (Debian, Ubuntu: apt install python3.11-venv python3.11-dev)" >&2
        return 1
      fi
      "$python" -m venv "$root/.venv" || return 1
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate" || return 1
  fi
  # DeepSpeed finds ninja on PATH, also where this environment's python was called by its full name.
  PATH="$(python -c 'import sys; print(sys.prefix)')/bin:$PATH"
  export PATH
  # Compiled operations depend on the environment's torch: shared with another environment they would be built anew each time.
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$(python -c 'import sys; print(sys.prefix)')/torch_extensions}"

  if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "setup: no C++ compiler was found; DeepSpeed compiles its communication with one (Debian, Ubuntu: apt install g++)" >&2
    return 1
  fi
  headers=$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  if [ ! -f "$headers/Python.h" ]; then
    echo "setup: $headers/Python.h is missing; install Python's headers (Debian, Ubuntu: apt install python3-dev)" >&2
    return 1
  fi

  # One stamp per environment and checkout; its text changes with pyproject.toml.
  stamp="$(python -c 'import sys; print(sys.prefix)')/kvds-setup.stamp"
  local wanted
  wanted="$root $(cksum <"$root/pyproject.toml")"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] \
    && python -c 'from importlib.metadata import version; [version(name) for name in ("torch", "deepspeed", "kvds")]' 2>/dev/null; then
    return 0
  fi

  echo "setup: installing kvds into $(python -c 'import sys; print(sys.prefix)')" >&2
  # DeepSpeed's own setup imports setuptools and torch from the environment it is built in: hence no build isolation.
  pip install --quiet 'setuptools>=77,<80' wheel ninja || return 1
  if ! python -c 'import torch' 2>/dev/null; then
    torch=torch==2.13.0 gpu=''
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU && gpu=1
    if [ -n "$gpu" ]; then
      pip install --quiet "$torch" || return 1
    else
      # The CPU build where the configured index has it, else PyTorch's own index; PyPI's brings gigabytes of CUDA.
      pip install --quiet "$torch+cpu" 2>/dev/null \
        || pip install --quiet "$torch" --index-url https://download.pytorch.org/whl/cpu || return 1
    fi
  fi
  pip install --quiet --no-build-isolation -e "$root[dev]" || return 1
  echo "$wanted" >"$stamp" 2>/dev/null || true
}

kvds_setup || { unset -f kvds_setup; return 1 2>/dev/null || exit 1; }
unset -f kvds_setup
