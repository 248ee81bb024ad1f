#!/usr/bin/env sh
# Three steps of one environment by curl alone, the last sent twice: the second answer is a replay.
#   URL=http://127.0.0.1:8000 sh examples/curl.sh
set -eu
url=${URL:-http://127.0.0.1:8000}
session=curl-$$
dim=$(curl -sf "$url/policy" | sed 's/.*"observation_dim":\([0-9]*\).*/\1/')
observation=$(seq "$dim" | sed 's/.*/0.1/' | paste -sd, -)

act() { # step, and whether an episode starts with it
  curl -sS --fail-with-body --retry 5 "$url/act" \
    -H 'Content-Type: application/json' -H "X-Session-Id: $session" \
    -d "{\"session_id\":\"$session\",\"episode\":\"1\",\"step\":$1,\"episode_start\":$2,\"observation\":[$observation]}"
  echo
}

act 0 true
act 1 false
act 2 false
act 2 false
curl -sf -X DELETE "$url/sessions/$session"
