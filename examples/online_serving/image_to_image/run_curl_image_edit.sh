#!/usr/bin/env bash
# Image edit by curl, over /v1/images/edits: run_curl_image_edit.sh PICTURE "what to change".
# SERVER, API_KEY, SIZE (WIDTHxHEIGHT, or auto: as the model derives it from the picture), STEPS, SEED and OUTPUT may
# be set.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: $0 PICTURE \"what to change\"" >&2
    exit 2
fi
output="${OUTPUT:-image_to_image.png}"
# An error leaves the file as it was.
save_picture() {
    python3 -c '
import base64, json, sys

answer = json.loads(sys.stdin.read() or sys.exit(1))  # curl has said why there is none
if "error" in answer:
    sys.exit(answer["error"]["message"])
with open(sys.argv[1], "wb") as file:
    file.write(base64.b64decode(answer["data"][0]["b64_json"]))' "$1"
}

curl --silent --show-error "${SERVER:-http://localhost:8091}/v1/images/edits" \
    --header "Authorization: Bearer ${API_KEY:-none}" \
    --form "image=@$1" \
    --form-string "prompt=$2" \
    --form "size=${SIZE:-auto}" \
    --form "num_inference_steps=${STEPS:-50}" \
    --form "seed=${SEED:-42}" | save_picture "$output"
echo "$output"
