#!/usr/bin/env bash
# Makes .venv with everything pinned in constraints.txt. `make` calls it when pyproject.toml or
# constraints.txt changed; running it again on a complete .venv takes seconds.
#
#   PYTHON=python3.12         another interpreter than python3
#   TORCH_BUILD=cpu|cuda      by default cpu where there is no NVIDIA driver
#   TORCH_INDEX=URL           one more package index, for torch's CPU build
#   EXTRAS=api                only these extras (all by default)
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
extras=${EXTRAS:-api,worker,train,eval,dev}
venv=.venv

stop() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || stop "$python is missing; install Python 3.11 or newer (Debian, Ubuntu: apt-get install python3-venv)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  stop "$("$python" --version) is too old; install Python 3.11 or newer and say PYTHON=python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  stop "$python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  echo "setup: making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi
install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$@"; }
install setuptools  # the build backend, pinned like the rest: nothing is fetched behind a build's back

# The default torch for Linux brings 2 GB of CUDA libraries: dead weight without an NVIDIA driver.
has_nvidia() { [[ -e /proc/driver/nvidia ]] || command -v nvidia-smi >/dev/null; }
build=${TORCH_BUILD:-$(has_nvidia && echo cuda || echo cpu)}
if [[ ,$extras, == *,train,* && $(uname -s) == Linux && $build == cpu ]]; then
  torch=$(sed -n 's/^torch==//p' constraints.txt)
  if install "torch==$torch+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} 2>/dev/null; then
    echo "setup: torch $torch, CPU build"
  else
    echo "setup: torch's CPU build is on none of pip's indexes (TORCH_INDEX names one); taking the default build"
  fi
fi
echo "setup: installing trainmaster[$extras] under constraints.txt; the first time takes minutes"
install --no-build-isolation --editable ".[$extras]"
echo "setup: done"
