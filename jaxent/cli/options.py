"""What the command line takes, and its help."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from jaxent import _command
from jaxent.cli.output import say

DEFAULT_OUT = Path("jaxent-run")
VOCAB_SIZE = 32_768  # unless the text has fewer different tokens

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
  jaxent check --plot gap.png                 losses down to 1e-38, alongside optax and exact ones
"""

PLAN_EXAMPLES = """\
examples:
  jaxent plan --tokens 32768 --features 4096 --classes 128256 --device h100
  jaxent plan --tokens 4096 --features 512 --classes 32768 --dtype float32     on this machine
  jaxent plan --tokens 32768 --features 4096 --classes 128256 --device v5p --kernel-dtype float32 --json
"""

DESCRIPTION = """\
Cross-entropy at work: a language model on real text, what each token of it costs in bits, and whether the losses
are right on this machine.
"""

MOST = 10**9  # of a number without a limit of its own, so that no product of two leaves 64 bits
LONGEST = 60  # characters of an argument that a message shows


class OneLineParser(argparse.ArgumentParser):
    """An argument that is wrong is one line, like every other error, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        _command.finish()
        say(f"jaxent: {message}; `{self.prog} --help` tells more")
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        """What cannot be printed is an error, which argparse would pass over."""
        print(self.format_help(), end="", file=file, flush=True)


Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"


def parser(train_defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    whole = OneLineParser(
        prog="jaxent",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands).set_defaults(**train_defaults or {})
    _add_evaluate(commands)
    _add_tokens(commands)
    _add_check(commands)
    _add_plan(commands)
    return whole


def _add_train(commands: Commands) -> argparse.ArgumentParser:
    train = _add_command(
        commands,
        "train",
        "train a small language model on text files, and report what it has learnt in bits",
        TRAIN_EXAMPLES,
    )
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
    add("--vocab-size", type=_whole(256, 200_000), help=f"tokens, 256 bytes included (at most {VOCAB_SIZE})")
    add("--width", type=_whole(1, 4096), default=64, help="length of the hidden states (%(default)s)")
    add("--steps", type=_whole(1), default=240, help="optimiser steps (%(default)s)")
    add("--batch-rows", type=_whole(1), default=1024, help="tokens in a batch (%(default)s)")
    add("--learning-rate", type=_positive, default=3e-3, help="the highest of its schedule (%(default)s)")
    add(
        "--seed", type=_whole(0, 2**63 - 1), default=0, help="of the parameters and the order of the rows (%(default)s)"
    )
    add("--max-bytes", type=_whole(1, 10**15), default=16_000_000, help="read no more text than this (%(default)s)")
    add("--checkpoint-every", type=_whole(1), default=20, help="steps (%(default)s)")
    mesh = train.add_argument_group("several devices, of one process or of several", MESH)
    add = mesh.add_argument
    add("--mesh", type=_mesh, metavar="data=M,vocab=N", help="M x N devices; an axis that is left out has length 1")
    add("--coordinator", type=_address, metavar="ADDRESS", help="host and port of process 0, such as 10.0.0.1:1234")
    add("--num-processes", type=_whole(1), metavar="N", help="how many processes run this command")
    add("--process-id", type=_whole(0), metavar="I", help="the number of this one, from 0")
    _add_output(train)
    return train


def _add_evaluate(commands: Commands) -> None:
    evaluate = _add_command(
        commands, "evaluate", "measure files with a trained model: bits per byte and perplexity", EVALUATE_EXAMPLES
    )
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder that `jaxent train` wrote")
    evaluate.add_argument("paths", nargs="+", metavar="PATH", help="text files and folders")
    _add_output(evaluate)


def _add_tokens(commands: Commands) -> None:
    tokens = _add_command(
        commands, "tokens", "show what each token of a text costs under a trained model, in bits", TOKENS_EXAMPLES
    )
    tokens.add_argument("text", metavar="TEXT", help="the text; - reads standard input")
    tokens.add_argument("--checkpoint", type=Path, default=DEFAULT_OUT, help="a folder that `jaxent train` wrote")
    style = tokens.add_mutually_exclusive_group()
    style.add_argument(
        "--line", dest="style", action="store_const", const="line", help="the text, coloured by surprise"
    )
    style.add_argument("--table", dest="style", action="store_const", const="table", help="one line per token")
    style.add_argument("--json", action="store_true", help="print JSON")


def _add_check(commands: Commands) -> None:
    check = _add_command(
        commands, "check", "compare values and gradients of every loss on this device with exact ones", CHECK_EXAMPLES
    )
    check.add_argument("losses", nargs="*", metavar="LOSS", help="names of functions; default: all")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    check.add_argument("--dtype", dest="dtypes", action="append", choices=dtypes, help="may be repeated; default: all")
    check.add_argument("--plot", type=Path, metavar="FILE", help="draw tiny losses into an image file instead")
    _add_output(check)


def _add_plan(commands: Commands) -> None:
    plan = _add_command(
        commands,
        "plan",
        "estimate what a loss from hidden states and its gradient take, before they run",
        PLAN_EXAMPLES,
    )
    add = plan.add_argument
    add("--tokens", type=_whole(1), required=True, metavar="N", help="rows of hidden states, on one device")
    add("--features", type=_whole(1), required=True, metavar="D", help="length of a hidden state")
    add("--classes", type=_whole(1), required=True, metavar="V", help="size of the vocabulary, on one device")
    add("--device", metavar="NAME", help="h100, v5p, ..., or what JAX calls a device; default: this machine's")
    dtypes = ("bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, default="bfloat16", help="of hidden states and products (%(default)s)")
    add("--kernel-dtype", choices=dtypes, help="of the kernel, if it is another")
    add("--chunk-rows", type=_whole(1), metavar="R", help="rows at a time; default: what suits the device")
    measured = "as `python -m benchmarks` measures it, in place of what the device's maker states"
    add("--flops-per-second", type=_positive, metavar="F", help=f"of matrix products, {measured}")
    add("--bytes-per-second", type=_positive, metavar="B", help="of memory, likewise; both or neither")
    add("--json", action="store_true", help="print JSON instead of a table")


def _add_command(commands: Commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(command=name)
    return command


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="print nothing but errors (and what --json asks for)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _whole(low: int, high: int = MOST) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # Python refuses to parse a number of thousands of digits; no limit here has that many.
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()) else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {_shown(text)}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {_shown(text)}")
    return value


def _mesh(text: str) -> Mapping[str, int]:
    from jaxent.cli.train.mesh import parse_mesh

    try:
        return parse_mesh(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like data=4,vocab=2, got {_shown(text)}") from None


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"must be like host:1234, got {_shown(text)}")
    return text
