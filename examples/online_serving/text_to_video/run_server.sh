#!/usr/bin/env bash
# Serve a text-to-video model. MODEL and PORT may be set; further options go to the server.
set -euo pipefail
exec vllm-omni serve "${MODEL:-Wan-AI/Wan2.2-T2V-A14B-Diffusers}" --omni --port "${PORT:-8091}" "$@"
