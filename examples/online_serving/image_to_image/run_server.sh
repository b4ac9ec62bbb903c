#!/usr/bin/env bash
# Serve an image edit model. MODEL and PORT may be set; further options go to the server.
set -euo pipefail
exec vllm-omni serve "${MODEL:-Qwen/Qwen-Image-Edit}" --omni --port "${PORT:-8091}" "$@"
