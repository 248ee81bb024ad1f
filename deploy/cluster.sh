#!/usr/bin/env bash
# All cores of one host, without containers: a service on each, and HAProxy in front of them, until
# Ctrl-C. One that ends is started again and goes on with its sessions: to restart it, `kill` it.
#
#   deploy/cluster.sh --artifact DIR [FLAGS OF EVERY SERVICE]
#
#   REPLICAS      services (one a core)
#   HOST, PORT    of the balancer (127.0.0.1:8000); the services are at 127.0.0.1, on the ports that
#                 follow
#   METRICS_BIND  HAProxy's own metrics (127.0.0.1:8404)
#   STATE         a folder for snapshots and logs (a temporary one)
#   PYTHON        the command that has the service (python)
#
# Exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 where the terminal is closed; 2 where something
# cannot start, 1 where HAProxy has ended.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin # where Debian has it, and not everybody looks

case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac

declare -A replica_of=() # its number, by the process
balancer=
temporary=
# shellcheck disable=SC2329 # the trap calls it
stop() {
  trap '' HUP INT TERM
  local process services=()
  for process in $(jobs -p); do # also one that has no number yet
    [ "$process" = "$balancer" ] || services+=("$process")
  done
  [ ${#services[@]} = 0 ] || kill "${services[@]}" 2>/dev/null || true
  for process in "${services[@]}"; do wait "$process" || true; done # answers, and snapshots
  [ -z "$balancer" ] || { kill "$balancer" 2>/dev/null && wait "$balancer"; } || true
  [ -z "$temporary" ] || rm -rf "$temporary"
}
# A closed terminal sends SIGHUP twice: from the first signal on, no other is heard.
end() { trap '' HUP INT TERM; exit "$1"; }
fail() { printf 'cluster: %s\n' "$1" >&2; end 2; }
trap stop EXIT
trap 'end 129' HUP
trap 'end 130' INT
trap 'end 143' TERM

host=${HOST:-127.0.0.1}
port=${PORT:-8000}
metrics=${METRICS_BIND:-127.0.0.1:8404}
python=${PYTHON:-python}
listens() { (: <"/dev/tcp/$1/$2") 2>/dev/null; } # listens HOST PORT

command -v haproxy >/dev/null || fail "haproxy is not installed; Debian's package is called haproxy"
cores=$("$python" -c 'import os; print(*sorted(os.sched_getaffinity(0)))' 2>/dev/null) ||
  fail "PYTHON is Python's command, not '$python'"
read -ra cores <<<"$cores"
replicas=${REPLICAS:-${#cores[@]}}
[[ $replicas =~ ^[1-9][0-9]{0,3}$ ]] || fail "REPLICAS is a number from 1, not '$replicas'"
[[ $port =~ ^[1-9][0-9]{0,4}$ && $((port + replicas)) -lt 65536 ]] ||
  fail "PORT is a number from 1 to $((65535 - replicas)), not '$port'; the replicas' ports follow"
! listens "$host" "$port" || fail "at $host:$port somebody listens already; give another PORT"
! listens "${metrics%:*}" "${metrics##*:}" ||
  fail "at $metrics somebody listens already; give another METRICS_BIND"
[ -n "${STATE:-}" ] || temporary=$(mktemp -d)
state=${STATE:-$temporary}
mkdir -p "$state" 2>/dev/null && [ -w "$state" ] ||
  fail "STATE is a folder that can be written to, not '$state'"

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
export BIND=$host:$port METRICS_BIND=$metrics
setsid haproxy -db -f "$here/haproxy.cfg" -f "$state/replicas.cfg" </dev/null &
balancer=$!
until listens "$host" "$port"; do
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
  code=0 ended=
  # What ends while another command runs, `wait -n` may never tell.
  for process in "${!replica_of[@]}" "$balancer"; do
    kill -0 "$process" 2>/dev/null || ended=$process
  done
  if [ -n "$ended" ]; then
    wait "$ended" 2>/dev/null || code=$?
  else
    wait -n -p ended || code=$?
  fi
  if [ "$ended" = "$balancer" ]; then
    balancer=
    printf 'cluster: HAProxy has ended\n' >&2
    end 1
  fi
  number=${replica_of[$ended]}
  unset "replica_of[$ended]"
  echo "replica $number has ended ($code) and begins again; $state/$number.log has the rest"
  [ "$code" = 0 ] || sleep 1
  serve "$number" "$@"
done
