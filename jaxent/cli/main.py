"""The command line: parse, call, and turn what goes wrong into one line and an exit code."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxent.cli.errors import CommandError, Stopped

DEFAULT_OUT = Path("jaxent-run")

TRAIN_EXAMPLES = """\
examples:
  jaxent train                                the sources of Python's standard library, into ./jaxent-run
  jaxent train --resume                       go on where Ctrl-C, a crash or a power cut ended it
  jaxent train notes/ book.txt --vocab-size 5000 --out mine
  jaxent train --steps 2000 --checkpoint-every 50
  jaxent train --quiet --json > result.json
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for what the user can mend, 128 + n after signal n."""
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    try:
        options.command(options)
        sys.stdout.flush()
    except CommandError as error:
        return _fail(str(error), 2)
    except Stopped as error:
        return _fail(f"{error}; --resume goes on", 128 + error.signum)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader has gone; without this Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _fail(message: str, code: int) -> int:
    print(f"jaxent: {' '.join(message.split())}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="jaxent",
        description="A language model on real text, and what each token of it costs in bits.",
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_tokens(commands)
    return whole


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = _command(commands, "train", _train, "train a small language model on text files", TRAIN_EXAMPLES)
    train.add_argument("paths", nargs="*", metavar="PATH", help="text files and folders; default: the standard library")
    train.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for what is written (%(default)s)")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    again.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add = train.add_argument
    add("--vocab-size", type=_whole(256, 200_000), default=32_768, help="tokens, 256 bytes included (%(default)s)")
    add("--width", type=_whole(1, 4096), default=64, help="length of the hidden states (%(default)s)")
    add("--steps", type=_whole(1), default=160, help="optimiser steps (%(default)s)")
    add("--batch-rows", type=_whole(1), default=1024, help="tokens in a batch (%(default)s)")
    add("--learning-rate", type=_positive, default=3e-3, help="the highest of its schedule (%(default)s)")
    add("--seed", type=_whole(0), default=0, help="of the parameters and the order of the rows (%(default)s)")
    add("--max-bytes", type=_whole(1), default=16_000_000, help="read no more text than this (%(default)s)")
    add("--checkpoint-every", type=_whole(1), default=20, help="steps (%(default)s)")
    _add_output(train)


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


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    call: Callable[[argparse.Namespace], None],
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


def _train(options: argparse.Namespace) -> None:
    from jaxent.cli import run

    given = {name: value for name, value in vars(options).items() if name not in ("command", "json", "paths")}
    run.run(run.Options(paths=tuple(options.paths), as_json=options.json, **given))


def _evaluate(options: argparse.Namespace) -> None:
    from jaxent.cli import evaluation

    evaluation.evaluate(options.checkpoint, options.paths, as_json=options.json, quiet=options.quiet)


def _tokens(options: argparse.Namespace) -> None:
    from jaxent.cli import evaluation

    style = options.style or ("line" if sys.stdout.isatty() else "table")
    evaluation.tokens(options.checkpoint, options.text, style=style, as_json=options.json)
