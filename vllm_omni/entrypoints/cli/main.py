"""The console command ``vllm-omni``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_omni.errors import InvalidConfigError, InvalidRequestError, OmniError
from vllm_omni.version import __version__

# command -> (module with add_arguments and run, one line of help). A module loads when its command is used.
_COMMANDS = {
    "bench": ("vllm_omni.entrypoints.cli.bench", "measure how fast a model runs"),
    "compare": ("vllm_omni.entrypoints.cli.compare", "measure speed and outputs beside those of diffusers"),
    "generate": ("vllm_omni.entrypoints.cli.generate", "turn a prompt into a picture or a video"),
    "serve": ("vllm_omni.entrypoints.cli.serve", "serve a model over HTTP, as OpenAI's clients expect it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for bad input, 1 for any other error, 130 after Ctrl-C."""
    try:
        with _interrupts_come_again():
            _run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OmniError as error:
        print(f"vllm-omni: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (InvalidRequestError, InvalidConfigError)) else 1
    return 0


@contextmanager
def _interrupts_come_again() -> Iterator[None]:
    """An interrupt that Python ignores, since a finalizer ran when it came, comes again a moment later.

    Imports free thousands of objects with finalizers: the command went on loading, deaf to Ctrl-C.
    """
    hook = sys.unraisablehook

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            hook(unraisable)
            return
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _run(argv: Sequence[str]) -> None:
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
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands.choices[arguments.command]
        # The usage shows one name of each option, the help all of them.
        command.error(_unknown_text(unknown[0], options=re.findall(r"--[\w-]+", command.format_help())))
    importlib.import_module(_COMMANDS[arguments.command][0]).run(arguments)


def _unknown_text(argument: str, options: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"unexpected {argument!r}; text of several words goes in quotes"
    close = difflib.get_close_matches(argument.partition("=")[0], options, n=1)
    return f"unknown option {argument}; " + (f"did you mean {close[0]}?" if close else "--help lists all options")


if __name__ == "__main__":
    sys.exit(main())
