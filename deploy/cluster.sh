#!/usr/bin/env bash
# All cores of one host, without containers: a service on each, and HAProxy in front of them, until
# Ctrl-C. One that ends is started again and goes on with its sessions: to restart it, `kill` it.
#
#   deploy/cluster.sh --artifact DIR [FLAGS OF EVERY SERVICE]
#
#   REPLICAS  services (one a core)      HOST, PORT  of the balancer (127.0.0.1:8000); the services
#   STATE     a folder for snapshots and logs (a     are at 127.0.0.1, on the ports that follow
#             temporary one)
#
# Exit code: 130 after Ctrl-C, 2 where something cannot start, 1 where HAProxy has ended.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin # where Debian has it, and not everybody looks

host=${HOST:-127.0.0.1}
port=${PORT:-8000}
python=${PYTHON:-python}
fail() { printf 'cluster: %s\n' "$1" >&2; exit 2; }

command -v haproxy >/dev/null || fail "haproxy is not installed; Debian's package is called haproxy"
read -ra cores <<<"$("$python" -c 'import os; print(*sorted(os.sched_getaffinity(0)))')"
replicas=${REPLICAS:-${#cores[@]}}
[[ $replicas =~ ^[1-9][0-9]*$ ]] || fail "REPLICAS is a number from 1, not '$replicas'"
temporary=
[ -n "${STATE:-}" ] || temporary=$(mktemp -d)
state=${STATE:-$temporary}
mkdir -p "$state"

declare -A replica_of=() # its number, by the process
balancer=
# shellcheck disable=SC2329 # the trap calls it
stop() {
  trap '' INT TERM
  [ ${#replica_of[@]} = 0 ] || kill "${!replica_of[@]}" 2>/dev/null || true
  for process in "${!replica_of[@]}"; do wait "$process" || true; done # answers, and snapshots
  [ -z "$balancer" ] || { kill "$balancer" 2>/dev/null && wait "$balancer"; } || true
  [ -z "$temporary" ] || rm -rf "$temporary"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# In sessions of their own, they are not sent the terminal's Ctrl-C, but are stopped in order.
serve() { # serve NUMBER ARGUMENTS...
  local number=$1
  setsid taskset --cpu-list "${cores[$(((number - 1) % ${#cores[@]}))]}" \
    "$python" -m service --host 127.0.0.1 --port $((port + number)) --num-threads 1 \
    --snapshot "$state/$number.sessions" --log-level warning "${@:2}" \
    >>"$state/$number.log" 2>&1 </dev/null &
  replica_of[$!]=$number
}
servers() {
  for number in $(seq "$replicas"); do
    echo "  server replica-$number 127.0.0.1:$((port + number)) id $number"
  done
}

for number in $(seq "$replicas"); do
  : >"$state/$number.log"
  serve "$number" "$@"
done
for process in "${!replica_of[@]}"; do
  log=$state/${replica_of[$process]}.log
  until grep -q '^ready: ' "$log"; do
    kill -0 "$process" 2>/dev/null ||
      fail "replica ${replica_of[$process]} did not start: $(tail -n 1 "$log")"
    sleep 0.1
  done
done
{
  echo "backend sessions from sessions"
  servers
  echo "backend stateless from stateless"
  servers
} >"$state/replicas.cfg"
export BIND=$host:$port
setsid haproxy -db -f "$here/haproxy.cfg" -f "$state/replicas.cfg" </dev/null &
balancer=$!
until (: <"/dev/tcp/$host/$port") 2>/dev/null; do
  kill -0 "$balancer" 2>/dev/null || fail "HAProxy did not start"
  sleep 0.1
done

for process in "${!replica_of[@]}"; do
  number=${replica_of[$process]}
  echo "replica $number is process $process; weights and metrics: http://127.0.0.1:$((port + number))"
done | sort
echo "HAProxy is process $balancer"
sed -n "s#^\(ready: .*http://\)[^/]*/act#\1$host:$port/act -H 'X-Session-Id: env-0'#p" "$state/1.log"

while true; do
  code=0
  wait -n -p ended || code=$?
  if [ "$ended" = "$balancer" ]; then
    balancer=
    printf 'cluster: HAProxy has ended\n' >&2
    exit 1
  fi
  number=${replica_of[$ended]}
  unset "replica_of[$ended]"
  echo "replica $number has ended ($code) and begins again; $state/$number.log has the rest"
  [ "$code" = 0 ] || sleep 1
  serve "$number" "$@"
done
