# Sourced by the other scripts, from the repository root: makes .venv unless a virtual environment is active, and installs
# the requirement files given as arguments into it. A second call with equal files installs nothing.
#
# Versions are those of constraints.txt, with which the tests last passed; only an environment of the caller that already
# has torch keeps what it has. LATEST=1 takes the newest of everything, in .venv-latest unless an environment is active.
# shellcheck shell=bash
options="--constraint scripts/constraints.txt"
if [ -n "${LATEST:-}" ]; then
    options="--upgrade"
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    folder=.venv${LATEST:+-latest}
    [ -x "$folder/bin/python" ] || python3 -m venv "$folder"
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
elif [ -z "${LATEST:-}" ] && python -c 'import importlib.util as util, sys; sys.exit(util.find_spec("torch") is None)'; then
    options=""
fi
for requirements in "$@"; do
    inputs=$(cat "$requirements" scripts/constraints.txt | cksum | tr ' ' -)
    stamp="$(python -c 'import sys; print(sys.prefix)')/.installed-$inputs"
    if [ -n "${LATEST:-}" ] || [ ! -e "$stamp" ]; then
        echo "installing $requirements (torch is large: this takes a few minutes)"
        # shellcheck disable=SC2086                     # two words
        python -m pip install --quiet --disable-pip-version-check $options -r "$requirements"
        touch "$stamp"
    fi
done
