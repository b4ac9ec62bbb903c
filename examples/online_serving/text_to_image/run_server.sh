#!/usr/bin/env bash
# Serve a text-to-image model; without MODEL the small one that ships with the package. MODEL and PORT may be set;
# further options go to the server.
set -euo pipefail
exec vllm-omni serve ${MODEL:+"$MODEL"} --omni --port "${PORT:-8091}" "$@"
