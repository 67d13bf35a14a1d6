#!/bin/sh
# What conadv-cloud does on a worker; `setup` copies this to ~/conadv.
#
#   sh worker.sh install COMMIT DEVICE      from COMMIT.tar.gz, once
#   sh worker.sh start JOB COMMAND ...      prints where its log begins, in bytes
#   sh worker.sh poll JOB BEGIN             its state, then its log from BEGIN on
#   sh worker.sh stop JOB                   SIGTERM: it saves and ends with 42
#   sh worker.sh tail JOB LINES             the end of its log
#
# A job has no terminal and a session of its own, so it outlives the connection.
# Its directory, jobs/JOB, has its log, its process and, at the end, its code.

set -eu
cd "$HOME/conadv"

install() {
  commit=$1 device=$2
  if [ ! -e "$commit/.venv/.installed-$device" ]; then
    rm -rf "$commit"
    mkdir "$commit"
    tar -xzf "$commit.tar.gz" -C "$commit"
    cd "$commit"
    # TPU VMs have Python 3.10; uv brings one that fits where there is none.
    uv=$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.lock)
    python3 -m pip install -q --upgrade --target "$HOME/conadv/uv" "$uv"
    run_uv venv -q --python '>=3.11,<3.14' .venv
    lock=requirements-$device.lock
    if [ "$device" = cpu ]; then lock=requirements.lock; fi
    run_uv pip install -q --compile-bytecode --python .venv/bin/python -r "$lock"
    run_uv pip install -q --python .venv/bin/python --no-deps -e .
    touch ".venv/.installed-$device"  # git ignores it there
    cd ..
  fi
  ln -sfn "$commit" current
}

run_uv() {
  PYTHONPATH=$HOME/conadv/uv python3 -m uv "$@"
}

start() {
  job=$PWD/jobs/$1
  shift
  if [ ! -e "$job/code" ] && alive; then
    echo "it runs already: process $(cat "$job/pid")" >&2
    exit 3
  fi
  mkdir -p "$job"
  rm -f "$job/code" "$job/pid"
  touch "$job/log"
  begin=$(($(wc -c < "$job/log") + 1))
  cd current
  PATH=$PWD/.venv/bin:$PATH
  export PATH
  # The shell around the command outlives the signal of `stop`, to note the code.
  # shellcheck disable=SC2016
  setsid sh -c '
    trap : TERM
    code=0
    "$@" || code=$?
    echo "$code" > "$0/code.new"
    mv "$0/code.new" "$0/code"
  ' "$job" "$@" < /dev/null >> "$job/log" 2>&1 &
  echo $! > "$job/pid"
  echo "$begin"
}

alive() {
  [ -e "$job/pid" ] && kill -0 "$(cat "$job/pid")" 2> /dev/null
}

poll() {
  job=jobs/$1
  if [ -e "$job/code" ]; then echo "ended $(cat "$job/code")"
  elif alive; then echo running
  elif [ -e "$job/code" ]; then echo "ended $(cat "$job/code")"  # just now
  elif [ -e "$job/pid" ]; then echo lost
  else echo none; fi
  [ ! -e "$job/log" ] || tail -c "+$2" "$job/log" | head -c 1000000
}

stop() {
  job=jobs/$1
  # To the session: the command, and what it started.
  if [ ! -e "$job/code" ] && alive; then
    kill -s TERM -- "-$(cat "$job/pid")"
  fi
}

verb=$1
shift
case $verb in
  install | start | poll | stop) "$verb" "$@" ;;
  tail) tail -n "$2" "jobs/$1/log" ;;
  *) echo "worker.sh: no such verb: $verb" >&2; exit 2 ;;
esac
