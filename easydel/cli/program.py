"""Run the `easydel` command line: pick the subcommand, and turn its result or error into an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from easydel import __version__
from easydel.cli.failures import FailedRun, UsageError, did_you_mean
from easydel.errors import shortened, visible

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# Characters of a message on a terminal.
LONGEST_MESSAGE = 2000

HELP = """usage: easydel COMMAND [options]

Preference optimisation of language models in JAX.

commands:
  dpo        train a model on pairs of answers
  show       print one row of a data file as the trainer sees it

options:
  -h, --help   show this help; easydel COMMAND --help shows a command's
  --version    show the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: the run failed. 2: command line, options, data or model files are not right. 130: interrupted.
    143: ended by SIGTERM. A bug raises an ordinary exception, with its traceback.

    Args:
      arguments: without the program's name; None takes those of the process.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP, end="")
        return DONE
    if command == "--version":
        print(f"easydel {__version__}")
        return DONE
    try:
        return _command(command)(rest)
    except (UsageError, FailedRun) as error:
        print(
            f"easydel: error: {visible(shortened(str(error), LONGEST_MESSAGE, tail=LONGEST_MESSAGE // 4))}",
            file=sys.stderr,
        )
        return USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        print("easydel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as finished:  # a command's --help, or SIGTERM during training
        return int(finished.code or DONE)


def _command(name: str) -> Callable[[Sequence[str]], int]:
    # Import a subcommand only when it runs: another's imports would only cost time.
    if name == "dpo":
        from easydel.cli.dpo import run_dpo

        return run_dpo
    if name == "show":
        from easydel.cli.show import run_show

        return run_show
    raise UsageError(f"unknown command {name}{did_you_mean(name, ['dpo', 'show'])}\nThe commands are dpo and show.")
