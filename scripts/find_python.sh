#!/bin/sh
# Prints the path of a Python that can make this project's .venv.
#
# Usage: sh scripts/find_python.sh        PYTHON=/path/to/python is tried first
#
# A name on the PATH is no proof: pyenv leaves shims that fail when called, and
# Debian's python3 has venv but not ensurepip until python3-venv is installed.
# So every candidate is run. Shell builtins only, to work with any PATH.

set -u

PROBE='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
  print("bad is Python " + version)
else:
  try:
    import venv, ensurepip
    print("ok " + sys.executable)
  except ImportError as error:
    print("bad is Python %s without the module %s" % (version, error.name))
'

found=''

# try NAME: if NAME fits, prints its path and ends the script; else notes why.
try() {
  if ! command -v "$1" > /dev/null 2>&1; then
    reason='not found'
  else
    answer=$("$1" -c "$PROBE" 2> /dev/null < /dev/null)
    code=$?
    case $answer in
      'ok '*) printf '%s\n' "${answer#ok }"; exit 0 ;;
      'bad '*) reason=${answer#bad } ;;
      *) reason="does not run (exit code $code)" ;;
    esac
  fi
  found="$found
  $1: $reason"
}

if [ -n "${PYTHON:-}" ]; then
  try "$PYTHON"
  printf 'PYTHON=%s: %s; trying others.\n' "$PYTHON" "$reason" >&2
fi
for name in python3.11 python3.12 python3.13 python3 python; do
  try "$name"
done

printf '%s\n' "\
Error: found no Python that fits.
Needed: Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip.
Found:$found
To get one:
  Debian, Ubuntu:  apt install python3.11-venv   (or python3.12-venv, ...)
  macOS:           brew install python@3.12
  pyenv:           pyenv install 3.11 && pyenv local 3.11
or name one that is elsewhere: PYTHON=/path/to/python3.11 make setup" >&2
exit 1
