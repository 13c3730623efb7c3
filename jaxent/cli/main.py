"""The command line: parse, call, and turn what goes wrong into one line and an exit code."""

import argparse
import io
import signal
import sys
from collections.abc import Sequence

from jaxent import _command
from jaxent.cli.errors import CommandError, Stopped, reason
from jaxent.cli.options import parser
from jaxent.cli.output import drop, say

NO_MEMORY = "not enough memory: try smaller files, --vocab-size, --width or --batch-rows"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 after a failed check, 2 to be mended, 128 + n after signal n.

    Without arguments it is the process's own command line that is run, and signals end the process.
    """
    if arguments is None:
        _command.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    try:
        options = parser().parse_args(arguments)
        if getattr(options, "resume", False):
            from jaxent.cli.train.checkpoint import Checkpoint

            options = parser(Checkpoint.options(options.out)).parse_args(arguments)
        code = _COMMANDS[options.command](options) or 0
        sys.stdout.flush()
        _command.finish()
        return code
    except CommandError as error:
        return _fail(str(error), 2)
    except Stopped as error:
        return _fail(str(error), 128 + error.signum)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except MemoryError:
        return _fail(NO_MEMORY, 2)
    except BrokenPipeError:
        _command.finish()
        drop(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:  # files have their own errors; what is left is the output
        drop(sys.stdout)
        return _fail(f"cannot write the output: {reason(error)}", 2)


def _fail(message: str, code: int) -> int:
    _command.finish()
    say(f"jaxent: {' '.join(message.split())}")
    return code


def _train(options: argparse.Namespace) -> None:
    from jaxent.cli.train import mesh, run

    given = {name: value for name, value in vars(options).items() if name not in ("command", "json", "paths")}
    with mesh.own_configuration():
        run.run(run.Options(paths=tuple(options.paths), as_json=options.json, **given))


def _evaluate(options: argparse.Namespace) -> None:
    from jaxent.cli.train import evaluation, mesh

    with mesh.own_configuration():
        evaluation.evaluate(options.checkpoint, options.paths, as_json=options.json, quiet=options.quiet)


def _tokens(options: argparse.Namespace) -> None:
    from jaxent.cli.train import evaluation, mesh

    with mesh.own_configuration():
        evaluation.tokens(options.checkpoint, options.text, style=options.style, as_json=options.json)


def _check(options: argparse.Namespace) -> int:
    from jaxent.cli.check import run

    return run.check(options.losses, options.dtypes or (), plot=options.plot, as_json=options.json, quiet=options.quiet)


def _plan(options: argparse.Namespace) -> None:
    from jaxent.cli import plan

    plan.show(options)


_COMMANDS = {"train": _train, "evaluate": _evaluate, "tokens": _tokens, "check": _check, "plan": _plan}
