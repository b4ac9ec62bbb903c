#!/usr/bin/env bash
# Text to image by curl, over /v1/images/generations.
# SERVER, API_KEY, PROMPT, SIZE, STEPS, SEED and OUTPUT may be set.
set -euo pipefail
output="${OUTPUT:-text_to_image.png}"
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

# Python writes the JSON, so that a prompt may hold quotation marks.
request=$(python3 -c '
import json, sys

prompt, size, steps, seed = sys.argv[1:]
print(json.dumps({"prompt": prompt, "size": size, "num_inference_steps": int(steps), "seed": int(seed)}))' \
    "${PROMPT:-a red circle on a blue background}" "${SIZE:-256x256}" "${STEPS:-20}" "${SEED:-42}")

curl --silent --show-error "${SERVER:-http://localhost:8091}/v1/images/generations" \
    --header "Authorization: Bearer ${API_KEY:-none}" \
    --header "Content-Type: application/json" \
    --data-raw "$request" | save_picture "$output"
echo "$output"
