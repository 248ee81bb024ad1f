#!/usr/bin/env bash
# Is this host ready to serve? Builds the image, exports a policy on the GPU behind the parity gate,
# serves it, acts, measures, stops it under load, runs tests/gpu and benchmarks.gpu, and prints a
# verdict. Takes docker and, but for --cpu, an NVIDIA GPU with the NVIDIA Container Toolkit; leaves
# nothing running, only images, and the figures in FIGURES (gpu-figures).
#
#   deploy/verify.sh [--cpu] [-- BUILD-ARGUMENTS]      e.g.  deploy/verify.sh -- --build-arg BASE_IMAGE=...
#
# Exit code: 0 everything held, 1 something did not, 2 wrong usage.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

docker=${DOCKER:-docker}
target=cuda
[ "${1:-}" = --cpu ] && { target=cpu; shift; }
case ${1:-} in
"") ;;
--) shift ;;
*) sed -n 's/^# \?//; 2,9p' "$0" >&2; exit 2 ;;
esac
image=tamiyo-serve:$target
port=${PORT:-8000}
seconds=${SECONDS_OF_LOAD:-10}
figures=${FIGURES:-gpu-figures}
work=$(mktemp -d)
hardened=(--read-only --cap-drop all --security-opt no-new-privileges)
gpus=()
[ "$target" = cuda ] && gpus=(--gpus all)

containers=()
# shellcheck disable=SC2329 # the trap calls it
cleanup() {
  [ ${#containers[@]} = 0 ] || "$docker" rm --force "${containers[@]}" >/dev/null 2>&1
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

failed=0
verdict() { # verdict STATUS WHAT [FIGURE]
  local word=ok
  [ "$1" = 0 ] || word=FAIL failed=1
  printf '  %-4s  %s%s\n' "$word" "$2" "${3:+: $3}"
}
fatal() { verdict 1 "$@"; printf '\nVERDICT: this host does not serve tamiyo.\n'; exit 1; }

# Starts a container in the background as $container, and waits until it says that it is ready.
serve() {
  local started; started=$(date +%s%N)
  container=$("$docker" run --detach "${hardened[@]}" --publish "127.0.0.1:$port:8000" "$@") || return 1
  containers+=("$container")
  for _ in $(seq 600); do
    if "$docker" logs "$container" 2>/dev/null | grep -q '^ready: '; then
      ready_ms=$((($(date +%s%N) - started) / 1000000))
      return 0
    fi
    [ "$("$docker" inspect --format '{{.State.Running}}' "$container")" = true ] || break
    sleep 0.2
  done
  "$docker" logs "$container" 2>&1 | tail -n 5
  return 1
}
inside() { "$docker" exec "$container" python "$@"; }
stop() { "$docker" stop --time 20 "$container" >/dev/null && "$docker" inspect --format '{{.State.ExitCode}}' "$container"; }

# Says a bench's JSON in a line; fails on errors, and on answers that are not the artifact's own. On a
# GPU the last bits of a row may depend on its batch: one decision in ten thousand may turn on them.
figures() {
  inside -c '
import json, sys
bench, device = json.loads(sys.argv[1]), sys.argv[2]
differences = bench["differences"]
share = differences["other_actions"] / differences["answers"]
print("%.0f per second, p50 %.2f ms, p99 %.2f ms; of %d answers %d differ in a bit, by at most %.1g, %d in an action" % (
    bench["answers_per_s"], bench["latency_ms"]["p50"], bench["latency_ms"]["p99"], differences["answers"],
    differences["differing"], differences["largest"], differences["other_actions"]))
is_same = differences["differing"] == 0 if device == "cpu" else share <= 1e-4
raise SystemExit(bool(bench["errors"]) or not is_same)' "$1" "$2"
}
bench() { # bench DEVICE
  local result line status
  result=$(inside -m service.bench --envs 64 --seconds "$seconds" --artifact /artifacts --json)
  line=$(figures "$result" "$1"); status=$?
  verdict "$status" "64 clients on $1" "$line"
}

echo "host"
"$docker" version >/dev/null 2>&1 || fatal "docker answers"
verdict 0 "docker answers"
if [ "$target" = cuda ]; then
  gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1) || fatal "nvidia-smi finds a GPU" "$gpu"
  verdict 0 "nvidia-smi finds a GPU" "$gpu"
fi

echo "image"
"$docker" build --target "$target" --tag "$image" "$@" . >"$work/build.log" 2>&1 ||
  { tail -n 20 "$work/build.log"; fatal "it builds"; }
verdict 0 "it builds" "$(($("$docker" image inspect --format '{{.Size}}' "$image") / 1000000)) MB"

artifact=()
if [ "$target" = cuda ]; then
  echo "export on the GPU"
  "$docker" run --rm "${gpus[@]}" --entrypoint python "$image" \
    -c 'import torch; assert torch.cuda.is_available(); print(torch.version.cuda, torch.cuda.get_device_name())' \
    >"$work/torch" 2>&1 || fatal "torch sees the GPU in a container" "$(tail -n 1 "$work/torch")"
  verdict 0 "torch sees the GPU in a container" "CUDA $(cat "$work/torch")"
  mkdir "$work/artifacts" && chmod 777 "$work/artifacts"
  "$docker" run --rm "${gpus[@]}" --volume "$work/artifacts:/out" --entrypoint python "$image" \
    -m export --preset tamiyo-v1 --seed 0 --device cuda --formats torchscript --output /out/gpu \
    >"$work/export" 2>&1
  verdict $? "what is exported there does what the policy does" "$(tail -n 2 "$work/export" | head -n 1)"
  artifact=(--volume "$work/artifacts/gpu:/artifacts:ro")
fi

echo "service"
device=cpu
[ "$target" = cuda ] && device=cuda
serve "${gpus[@]}" "${artifact[@]}" --env "TAMIYO_DEVICE=$device" "$image" || fatal "it starts"
verdict 0 "it starts, read-only and without privileges" "ready $ready_ms ms after docker run"
served=$(inside -c 'import json, urllib.request
policy = json.load(urllib.request.urlopen("http://127.0.0.1:8000/policy"))
print(policy["name"], policy["runtime"], "on", policy["device"])')
grep -q " on $device\$" <<<"$served"
verdict $? "what it serves" "$served"
inside -m service.demo --envs 64 --steps 50 >"$work/demo" 2>&1
verdict $? "64 environments step 50 times, every answer legal"
bench "$device"
inside -m service.bench --envs 64 --seconds 30 >/dev/null 2>&1 &
for _ in $(seq 100); do
  inside -c 'import re, urllib.request
text = urllib.request.urlopen("http://127.0.0.1:8000/metrics").read().decode()
raise SystemExit(float(re.search("^tamiyo_sessions (.*)$", text, re.M)[1]) < 64)' 2>/dev/null && break
done
code=$(stop)
wait
verdict "$code" "SIGTERM under load" "exit code $code"

if [ "$target" = cuda ]; then
  echo "without the GPU"
  serve "$image" || fatal "it starts"
  "$docker" logs "$container" 2>&1 | grep -q "no GPU is visible here"
  verdict $? "it says so and serves on the CPU"
  bench cpu
  stop >/dev/null
  "$docker" run --rm --env TAMIYO_DEVICE=cuda "$image" >"$work/refused" 2>&1
  code=$?
  verdict $((code == 2 ? 0 : 1)) "asked for the GPU, it refuses" "$(tail -n 1 "$work/refused")"
fi

# In an image that has what they take; the checkout is mounted beside it.
on_the_gpu() { # on_the_gpu MODULE ARGUMENTS
  "$docker" run --rm "${gpus[@]}" --volume "$PWD:/src:ro" --volume "$work/figures:/figures" \
    tamiyo-serve:gpu-test -m "$@"
}
if [ "$target" = cuda ]; then
  echo "tests and figures on the GPU"
  mkdir "$work/figures"
  "$docker" build --target gpu-test --tag tamiyo-serve:gpu-test "$@" . >"$work/build.log" 2>&1
  verdict $? "their image builds" "$(tail -n 1 "$work/build.log")"
  on_the_gpu pytest -p no:cacheprovider -m gpu tests/gpu >"$work/tests" 2>&1 && grep -q '^gpu: ran on ' "$work/tests"
  verdict $? "tests/gpu" "$(tail -n 1 "$work/tests")"
  grep -E '^(gpu: |FAILED |ERROR |SKIPPED )' "$work/tests" | sed 's/^/        /'
  on_the_gpu benchmarks.gpu --output /figures >"$work/benchmarks" 2>&1 && [ -s "$work/figures/gpu.md" ]
  verdict $? "benchmarks.gpu" "$(tail -n 1 "$work/benchmarks")"
  mkdir -p "$figures" && cp "$work/tests" "$work/benchmarks" "$work"/figures/* "$figures" 2>/dev/null
fi

if [ "$failed" = 0 ]; then
  printf '\nVERDICT: this host serves tamiyo on %s.\n' "$device"
else
  printf '\nVERDICT: this host does not serve tamiyo as it should.\n'
fi
exit "$failed"
