#!/usr/bin/env bash
# Text to video by curl, as a job of /v1/videos: create it, ask how far it is, download it.
# SERVER, API_KEY, PROMPT, SIZE, SECONDS_LONG, STEPS, SEED and OUTPUT may be set. The job goes on if this script ends.
set -euo pipefail
videos="${SERVER:-http://localhost:8091}/v1/videos"
output="${OUTPUT:-text_to_video.mp4}"
ask() {
    curl --silent --show-error --header "Authorization: Bearer ${API_KEY:-none}" "$@"
}
field() {
    python3 -c '
import json, sys

answer = json.loads(sys.stdin.read() or sys.exit(1))  # curl has said why there is none
if answer.get("error"):
    sys.exit(answer["error"]["message"])
print(answer[sys.argv[1]])' "$1"
}

id=$(ask "$videos" \
    --form-string "prompt=${PROMPT:-two cats play on a lawn}" \
    --form "size=${SIZE:-832x480}" \
    --form "seconds=${SECONDS_LONG:-5}" \
    --form "num_inference_steps=${STEPS:-40}" \
    --form "seed=${SEED:-42}" | field id)
status=queued
while [ "$status" = queued ] || [ "$status" = in_progress ]; do
    sleep 1
    job=$(ask "$videos/$id")
    status=$(field status <<<"$job")
    echo "$id: $status, $(field progress <<<"$job") %"
done
ask --fail "$videos/$id/content" --output "$output"
echo "$output"
