#!/bin/sh
# Prints the first Python of the given versions that runs and can make virtual environments.
#
#   find_python.sh "what for" 3.11 3.12 ...        PYTHON=/path/to/python takes that one instead
#
# A name on the PATH is not enough: version managers put names there that do not run.
set -u
purpose=$1
shift
wanted=" $* "
tried=""
for candidate in ${PYTHON:-$(printf 'python%s ' "$@") python3}; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
        [ -z "${PYTHON:-}" ] || tried=" $candidate does not run;"
        continue
    }
    case "$wanted" in *" $version "*) ;; *)
        tried="$tried $candidate is $version;"
        continue
        ;;
    esac
    if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        tried="$tried $candidate ($version) has no venv module, on Debian it is in the package python$version-venv;"
        continue
    fi
    command -v "$candidate"
    exit 0
done
echo "No Python for $purpose: it needs one of${wanted}with the venv module.${tried:+ Found:$tried}" >&2
echo "Install one, or name it: make PYTHON=/path/to/python ..." >&2
exit 1
