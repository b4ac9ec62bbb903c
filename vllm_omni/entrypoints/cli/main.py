"""The console command ``vllm-omni``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from vllm_omni.errors import InvalidConfigError, InvalidRequestError, OmniError
from vllm_omni.version import __version__

# command -> (module with add_arguments and run, one line of help). A module loads when its command is used.
_COMMANDS = {
    "bench": ("vllm_omni.entrypoints.cli.bench", "measure how fast a model runs"),
    "compare": ("vllm_omni.entrypoints.cli.compare", "measure speed and outputs beside those of diffusers"),
    "generate": ("vllm_omni.entrypoints.cli.generate", "turn a prompt into a picture or a video"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for bad input, 1 for any other error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="vllm-omni",
        description="Serve diffusion models: text to image and more.",
        epilog='Start with: vllm-omni generate "a red circle on a blue background"',
    )
    parser.add_argument("--version", action="version", version=f"vllm-omni {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_text) in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
        # Declaring a command's options imports its engine; other commands, --version and --help do without.
        if name in argv[:1]:
            importlib.import_module(module_name).add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        importlib.import_module(_COMMANDS[arguments.command][0]).run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OmniError as error:
        print(f"vllm-omni: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (InvalidRequestError, InvalidConfigError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
