#!/usr/bin/env bash
# Text to image by curl, over /v1/images/generations. SERVER, PROMPT, SIZE, STEPS, SEED and OUTPUT may be set.
set -euo pipefail
output="${OUTPUT:-text_to_image.png}"
picture() {
    python3 -c '
import base64, json, sys

answer = json.load(sys.stdin)
if "error" in answer:
    sys.exit(answer["error"]["message"])
sys.stdout.buffer.write(base64.b64decode(answer["data"][0]["b64_json"]))'
}

curl --silent --show-error "${SERVER:-http://localhost:8091}/v1/images/generations" \
    --header "Content-Type: application/json" \
    --data @- <<END | picture >"$output"
{
    "prompt": "${PROMPT:-a red circle on a blue background}",
    "size": "${SIZE:-256x256}",
    "num_inference_steps": ${STEPS:-20},
    "seed": ${SEED:-42}
}
END
echo "$output"
