# Sourced by the other scripts, from the repository root: makes .venv unless a virtual environment is active, and installs
# the requirement files given as arguments into it. A second call with equal files installs nothing.
# shellcheck shell=bash
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
for requirements in "$@"; do
    stamp="$(python -c 'import sys; print(sys.prefix)')/.installed-$(cksum <"$requirements" | tr ' ' -)"
    if [ ! -e "$stamp" ]; then
        echo "installing $requirements (torch is large: this takes a few minutes)"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
done
