"""The command line: parse, call, and turn what goes wrong into one line and an exit code."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxent.cli.errors import CommandError, Stopped, reason, visible

DEFAULT_OUT = Path("jaxent-run")

TRAIN_EXAMPLES = """\
examples:
  jaxent train                                the sources of Python's standard library, into ./jaxent-run
  jaxent train                                again: shows the result, or goes on where the run was ended
  jaxent train notes/ book.txt --vocab-size 5000 --out mine
  jaxent train --resume --out mine            go on with that one, without repeating its options
  jaxent train --steps 2000 --checkpoint-every 50 --overwrite
  jaxent train --quiet --json > result.json
  jaxent train --mesh data=4,vocab=2          on 8 devices; JAX_NUM_CPU_DEVICES=8 makes 8 of one CPU
  jaxent train --mesh data=8,vocab=2 --coordinator host0:1234 --num-processes 4 --process-id 0   and so on to 3

The same command twice never trains twice: a finished run is shown, an unfinished one goes on, to the same bits as if
it had not been ended. A checkpoint of other settings is never replaced without --overwrite.
"""
MESH = """\
A batch's rows are split over the axis data, the vocabulary over the axis vocab. Processes are joined by
jax.distributed: as the three arguments say, or as JAX detects in a job of Slurm, Open MPI or GKE. All of them need
the same options, text and --out (a shared folder); process 0 prints and writes.
"""
EVALUATE_EXAMPLES = """\
examples:
  jaxent evaluate jaxent-run setup.py src/
  jaxent evaluate jaxent-run README.md --json
"""
TOKENS_EXAMPLES = """\
examples:
  jaxent tokens "for i in range(10):"
  jaxent tokens --table "import numpy as np"
  head -50 script.py | jaxent tokens - --line | less -R
"""
CHECK_EXAMPLES = """\
examples:
  jaxent check                                every loss, option and dtype, in about a minute
  jaxent check softmax_cross_entropy --dtype float32 --dtype bfloat16
  jaxent check --json > check.json
  jaxent check --plot gap.png                 losses down to 1e-38, beside optax and the exact ones
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 after a failed check, 2 to be mended, 128 + n after signal n."""
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    try:
        if getattr(options, "resume", False):
            options = parser(_remembered(options.out)).parse_args(arguments)
        code = options.command(options)
        sys.stdout.flush()
    except CommandError as error:
        return _fail(str(error), 2)
    except Stopped as error:
        return _fail(str(error), 128 + error.signum)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except MemoryError:
        return _fail("not enough memory: try smaller files, --vocab-size, --width or --batch-rows", 2)
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:  # files have their own errors; what is left is the output
        _drop_output()
        return _fail(f"cannot write the output: {reason(error)}", 2)
    return code or 0


def _drop_output() -> None:
    """Nobody takes the output; without this Python would complain about it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _remembered(out: Path) -> dict[str, Any]:
    from jaxent.cli.train.checkpoint import Checkpoint

    return Checkpoint.options(out)


def _fail(message: str, code: int) -> int:
    print(f"jaxent: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code


def parser(train_defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="jaxent",
        description="A language model on real text, and what each token of it costs in bits.",
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands).set_defaults(**train_defaults or {})
    _add_evaluate(commands)
    _add_tokens(commands)
    _add_check(commands)
    return whole


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    train = _command(commands, "train", _train, "train a small language model on text files", TRAIN_EXAMPLES)
    train.add_argument("paths", nargs="*", metavar="PATH", help="text files and folders; default: the standard library")
    train.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for what is written (%(default)s)")
    again = train.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, with its options, if there is one",
    )
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add = train.add_argument
    add("--vocab-size", type=_whole(256, 200_000), default=32_768, help="tokens, 256 bytes included (%(default)s)")
    add("--width", type=_whole(1, 4096), default=64, help="length of the hidden states (%(default)s)")
    add("--steps", type=_whole(1), default=240, help="optimiser steps (%(default)s)")
    add("--batch-rows", type=_whole(1), default=1024, help="tokens in a batch (%(default)s)")
    add("--learning-rate", type=_positive, default=3e-3, help="the highest of its schedule (%(default)s)")
    add("--seed", type=_whole(0), default=0, help="of the parameters and the order of the rows (%(default)s)")
    add("--max-bytes", type=_whole(1), default=16_000_000, help="read no more text than this (%(default)s)")
    add("--checkpoint-every", type=_whole(1), default=20, help="steps (%(default)s)")
    mesh = train.add_argument_group("several devices, of one process or of several", MESH)
    add = mesh.add_argument
    add("--mesh", type=_mesh, metavar="data=M,vocab=N", help="M x N devices; an axis that is left out has length 1")
    add("--coordinator", type=_address, metavar="ADDRESS", help="host and port of process 0, such as 10.0.0.1:1234")
    add("--num-processes", type=_whole(1), metavar="N", help="how many processes run this command")
    add("--process-id", type=_whole(0), metavar="I", help="the number of this one, from 0")
    _add_output(train)
    return train


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = _command(commands, "evaluate", _evaluate, "bits per byte and perplexity of files", EVALUATE_EXAMPLES)
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder that `jaxent train` wrote")
    evaluate.add_argument("paths", nargs="+", metavar="PATH", help="text files and folders")
    _add_output(evaluate)


def _add_tokens(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokens = _command(commands, "tokens", _tokens, "the self-information of each token of a text", TOKENS_EXAMPLES)
    tokens.add_argument("text", metavar="TEXT", help="the text; - reads standard input")
    tokens.add_argument("--checkpoint", type=Path, default=DEFAULT_OUT, help="a folder that `jaxent train` wrote")
    style = tokens.add_mutually_exclusive_group()
    style.add_argument(
        "--line", dest="style", action="store_const", const="line", help="the text, coloured by surprise"
    )
    style.add_argument("--table", dest="style", action="store_const", const="table", help="one line a token")
    style.add_argument("--json", action="store_true", help="print JSON")


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = _command(commands, "check", _check, "values and gradients of the losses on this device", CHECK_EXAMPLES)
    check.add_argument("losses", nargs="*", metavar="LOSS", help="names of functions; default: all")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    check.add_argument("--dtype", dest="dtypes", action="append", choices=dtypes, help="may be repeated; default: all")
    check.add_argument("--plot", type=Path, metavar="FILE", help="draw tiny losses into an image file instead")
    _add_output(check)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    call: Callable[[argparse.Namespace], int | None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(command=call)
    return command


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="print nothing but errors (and what --json asks for)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text}")
        return value

    parse.__name__ = "int"
    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _mesh(text: str) -> Mapping[str, int]:
    from jaxent.cli.train.mesh import parse_mesh

    try:
        return parse_mesh(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like data=4,vocab=2, got {text}") from None


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"must be like host:1234, got {text}")
    return text


def _train(options: argparse.Namespace) -> None:
    from jaxent.cli.train import run

    given = {name: value for name, value in vars(options).items() if name not in ("command", "json", "paths")}
    run.run(run.Options(paths=tuple(options.paths), as_json=options.json, **given))


def _evaluate(options: argparse.Namespace) -> None:
    from jaxent.cli.train import evaluation

    evaluation.evaluate(options.checkpoint, options.paths, as_json=options.json, quiet=options.quiet)


def _tokens(options: argparse.Namespace) -> None:
    from jaxent.cli.train import evaluation

    style = options.style or ("line" if sys.stdout.isatty() else "table")
    evaluation.tokens(options.checkpoint, options.text, style=style, as_json=options.json)


def _check(options: argparse.Namespace) -> int:
    from jaxent.cli.check import run

    return run.check(options.losses, options.dtypes or (), plot=options.plot, as_json=options.json, quiet=options.quiet)
