"""`jaxent train`: from files to a trained model and an account of what was learnt."""

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxent._command import undone
from jaxent.cli.atomic_files import exclusive_directory
from jaxent.cli.errors import CommandError, Stopped, first_line, require, visible
from jaxent.cli.options import VOCAB_SIZE
from jaxent.cli.output import print_json, say
from jaxent.cli.train import model, report
from jaxent.cli.train.checkpoint import NAME, Checkpoint
from jaxent.cli.train.corpus import Corpus, read_corpus
from jaxent.cli.train.dataset import Dataset
from jaxent.cli.train.evaluation import measure
from jaxent.cli.train.loop import NotFinite, Schedule, State, train
from jaxent.cli.train.mesh import VOCAB, DeviceMesh, join
from jaxent.cli.train.summary import summarize
from jaxent.cli.train.tokenizer import Tokenizer

SAMPLE_ROWS = 2048  # of the held-out text, measured during the run
ROW_BYTES = 450  # of a token of a batch, on the host and on the device


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `jaxent train`."""

    paths: tuple[str, ...]
    out: Path
    vocab_size: int | None  # None: as many as the text has, up to `VOCAB_SIZE`
    width: int
    max_bytes: int
    steps: int
    batch_rows: int
    learning_rate: float
    seed: int
    checkpoint_every: int
    mesh: Mapping[str, int] | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    resume: bool
    overwrite: bool
    quiet: bool
    as_json: bool

    def settings(self, corpus: Corpus) -> dict[str, Any]:
        """What decides the result to the last bit."""
        names = ("vocab_size", "width", "steps", "batch_rows", "learning_rate", "seed")
        mesh = None if self.mesh is None else ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        values = {name: getattr(self, name) for name in names} | {"vocab_size": self.vocab_size or VOCAB_SIZE}
        return {"corpus": corpus.digest, **values, "mesh": mesh}

    def text(self) -> dict[str, Any]:
        """What else a later `--resume` has to know; a vocabulary size that was not given is not given then either."""
        text = {"paths": list(self.paths), "max_bytes": self.max_bytes}
        return text if self.vocab_size is not None else text | {"vocab_size": None}

    def devices(self) -> DeviceMesh:
        if self.mesh is not None:
            join(self.coordinator, self.num_processes, self.process_id)
        elif (self.coordinator, self.num_processes, self.process_id) != (None, None, None):
            raise CommandError("--coordinator, --num-processes and --process-id go with --mesh")
        devices = DeviceMesh.of(**(self.mesh or {}))
        devices.check(self.batch_rows, self.vocab_size)
        return devices


@dataclasses.dataclass
class Work:
    """What is known before the first step."""

    corpus: Corpus
    settings: dict[str, Any]
    stored: Checkpoint | None
    finished: dict[str, Any] | None  # the summary of a run that was here before


def run(options: Options) -> None:
    """Trains, or goes on training, and reports."""
    began = time.monotonic()
    require("tqdm", "matplotlib")
    devices = options.devices()
    options = dataclasses.replace(options, quiet=options.quiet or not devices.is_first)
    with ExitStack() as held:
        work = devices.together(lambda: _prepare(options, devices, held))
        _check_agreement(work, devices)
        try:
            result = work.finished or _train(options, devices, work, began)
        except jax.errors.JaxRuntimeError as error:  # no memory left on a device, another process lost
            raise CommandError(f"JAX gave up: {first_line(error)}; {_way_on(options)}") from error
        except MemoryError as error:
            raise CommandError(f"not enough memory; {_way_on(options)}") from error
    if not devices.is_first:
        return
    if options.as_json:
        print_json(result)
    elif not options.quiet:
        print("", *report.summary_lines(result), sep="\n")
        seconds = f" after {result['seconds']:.0f} s" if work.finished is None else ""
        print(f"\n{visible(str(options.out / NAME))}, report.json and loss.png written{seconds}")


def _way_on(options: Options) -> str:
    """What a user can do who has no memory left or has lost a process."""
    if not (options.out / NAME).exists():
        return "try smaller --batch-rows, --width or --vocab-size"
    return "--resume goes on from the last checkpoint; with smaller --batch-rows or --width, --overwrite starts again"


def environment() -> dict[str, Any]:
    """What decides the last bits and is no setting: a checkpoint may go on elsewhere."""
    device = jax.devices()[0]
    flags = {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION") if name in os.environ}
    return {"jax": jax.__version__, "device": f"{device.platform}: {device.device_kind}", **flags}


def _say(options: Options, line: str) -> None:
    if not options.quiet:
        say(line)


def _prepare(options: Options, devices: DeviceMesh, held: ExitStack) -> Work:
    corpus = read_corpus(options.paths, options.max_bytes, options.out)
    settings = options.settings(corpus)
    if devices.is_first:
        held.enter_context(exclusive_directory(options.out))
    stored = _stored(options, settings)
    is_done = stored is not None and stored.step == options.steps
    finished = report.load(options.out, settings) if is_done else None
    sizes = [sum(len(d.text) for d in part) for part in (corpus.train, corpus.held_out)]
    _say(options, f"corpus     {corpus.source}")
    _say(options, f"           {len(corpus.train):,} files, {sizes[0]:,} bytes to learn from")
    _say(options, f"           {len(corpus.held_out):,} files, {sizes[1]:,} bytes held out")
    if corpus.left_out:
        cap = f"beyond --max-bytes {options.max_bytes:,}"
        _say(options, f"           {corpus.left_out:,} files left out: not text, or {cap}")
    _say(options, f"           SHA-256 {corpus.digest}")
    if finished is not None:
        _say(options, f"{options.out} holds this run, finished; --overwrite would train again")
    return Work(corpus, settings, stored, finished)


def _check_agreement(work: Work, devices: DeviceMesh) -> None:
    """Every process must start from the same text and the same step."""
    start = [work.settings, None if work.stored is None else work.stored.step, work.finished is None]
    digest = hashlib.sha256(json.dumps(start).encode()).digest()
    if len(set(devices.every(int.from_bytes(digest[:3], "big")))) > 1:
        raise CommandError("the processes do not see the same text, options and checkpoint: --out must be shared")


def _stored(options: Options, settings: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; an error for one from other settings, which must not be replaced."""
    path = options.out / NAME
    if options.overwrite or not os.path.lexists(path):
        return None
    stored = Checkpoint.load(options.out)
    different = [
        f"{name} was {stored.settings.get(name)!s:.16}, is {value!s:.16}"
        for name, value in settings.items()
        if stored.settings.get(name) != value
    ]
    if different:
        ways = "--out writes elsewhere, --overwrite replaces it"
        raise CommandError(f"{path} is from other settings: {'; '.join(different)}; {ways}")
    return stored


def _train(options: Options, devices: DeviceMesh, work: Work, began: float) -> dict[str, Any]:
    """The rest of the steps, with a checkpoint at intervals, and the account, which the first process writes."""
    schedule = Schedule(options.steps, options.batch_rows, options.learning_rate, options.seed)
    _check_memory(options, schedule)
    data = devices.together(lambda: _dataset(options, devices, work))
    size = data.tokenizer.size
    fewer = "" if size == work.settings["vocab_size"] else " (the text has no more)"
    _say(
        options,
        f"tokens     vocabulary {size:,}{fewer}; {len(data.counted.ids):,} counted, "
        f"{len(data.fitted):,} to train on, {len(data.held_out):,} held out",
    )
    state = devices.together(lambda: _start(options, devices, data, schedule, work.stored))
    _say(
        options,
        f"model      {model.count_parameters(state.params):,} parameters; {options.steps:,} steps of "
        f"{options.batch_rows:,} tokens{f', from step {state.step:,}' if state.step else ''}",
    )
    sample = data.held_out.take(np.sort(np.random.default_rng(0).permutation(len(data.held_out))[:SAMPLE_ROWS]))
    lengths = data.tokenizer.lengths()
    progress = Progress(options, state, schedule)
    is_new, diverged = work.stored is None, False

    def save(state: State) -> None:
        nonlocal is_new
        params, optimizer = devices.fetch((state.params, jax.tree.leaves(state.optimizer)))
        checkpoint = Checkpoint(
            work.settings,
            options.text(),
            state.step,
            data.tokenizer,
            data.tables,
            params,
            tuple(optimizer),
            state.history,
        )
        devices.together(lambda: checkpoint.save(options.out) if devices.is_first else None)
        if is_new and devices.is_first:
            report.remove(options.out)
        is_new = False
        progress.at_checkpoint(state)

    def look(state: State) -> None:
        nonlocal diverged
        risk, _ = measure(state.params, sample, devices)
        bits = float(risk.bits_per(int(np.sum(lengths[sample.targets], dtype=np.int64))))
        state.history.setdefault("held_step", []).append(state.step)
        state.history.setdefault("held_byte", []).append(bits)
        if not np.isfinite(bits):
            raise NotFinite(state.step)
        if not diverged and float(risk.mean(2)) > 2 * np.log2(size) and devices.is_first:
            diverged = True
            say(
                f"jaxent: the run has diverged: held-out text costs {bits:.4g} bits per byte at step {state.step}, "
                "more than twice what guessing costs; a lower --learning-rate with --overwrite starts again"
            )

    def finish() -> dict[str, Any]:
        learnt = summarize(state.params, data, work.corpus, options.batch_rows, devices)
        result = {"settings": work.settings, "source": work.corpus.source, "environment": environment(), **learnt}
        result |= {"step": state.step, "seconds": round(time.monotonic() - began, 1)}

        def write() -> None:
            if devices.is_first:
                report.draw(options.out, result, state.history, len(sample))
                report.save(options.out, result)

        devices.together(write)
        return result

    if work.stored is None:
        look(state)
    try:
        with progress as show:
            train(
                state,
                schedule,
                data.fitted,
                lengths,
                devices,
                every=options.checkpoint_every,
                at_interval=save,
                at_sample=look,
                show=show,
            )
    except NotFinite as error:
        finish()
        way = " and --overwrite" if os.path.lexists(options.out / NAME) else ""
        what = f"the loss is no longer finite at step {error.step}"
        raise CommandError(f"{what}: try a lower --learning-rate{way}") from None
    except Stopped as stopped:
        command = f"jaxent train --resume --out {shlex.quote(str(options.out))}"
        raise Stopped(stopped.signum, f"{stopped}; `{command}` goes on") from None
    return finish()


def _dataset(options: Options, devices: DeviceMesh, work: Work) -> Dataset:
    if work.stored is not None:
        tokenizer = work.stored.tokenizer
    else:
        tokenizer = Tokenizer.fit(
            [d.text for d in work.corpus.train],
            work.settings["vocab_size"],
            at_most=options.vocab_size is None,
            multiple=devices.mesh.shape[VOCAB],
        )
    return Dataset.of(work.corpus, tokenizer, options.steps * options.batch_rows)


def _check_memory(options: Options, schedule: Schedule) -> None:
    """The rows of a few steps are in memory at once. Linux would rather kill the process than refuse them."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return
    needed = options.batch_rows * (schedule.block * ROW_BYTES + 100 * options.width)
    if needed > there:
        raise CommandError(
            f"--batch-rows {options.batch_rows} takes {needed / 2**30:,.0f} GiB and this machine has "
            f"{there / 2**30:,.0f}: try at most {max(1, options.batch_rows * there // needed // 4)}"
        )


def _start(
    options: Options, devices: DeviceMesh, data: Dataset, schedule: Schedule, stored: Checkpoint | None
) -> State:
    if stored is None:
        params = model.initial_params(data.counted, data.tokenizer.size, options.width, options.seed)
        optimizer = schedule.optimizer().init(params)
        return State(0, devices.parameters(params), devices.parameters(optimizer), {})
    expected = jax.eval_shape(schedule.optimizer().init, stored.params)
    leaves = [(x.shape, x.dtype) for x in jax.tree.leaves(expected)]
    if leaves != [(x.shape, x.dtype) for x in stored.optimizer]:
        raise CommandError(f"{options.out / NAME} is from another version of optax: --overwrite starts again")
    optimizer = jax.tree.structure(expected).unflatten(stored.optimizer)
    return State(stored.step, devices.parameters(stored.params), devices.parameters(optimizer), stored.history)


class Progress:
    """A bar on a terminal, a line at each checkpoint elsewhere, nothing if that is asked for."""

    def __init__(self, options: Options, state: State, schedule: Schedule):
        self._steps, self._rows, self._done = options.steps, options.batch_rows, state.step
        self._quiet = options.quiet
        self._bar: Any = None
        self._held = ExitStack()

    def __enter__(self) -> Callable[[int, float, float], None]:
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            total, done = self._steps * self._rows, self._done * self._rows
            self._bar = self._held.enter_context(
                tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train", dynamic_ncols=True)
            )
            self._held.enter_context(undone(lambda: say("")))  # what comes next begins a line
        return self._show

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _show(self, tokens: int, bits: float, per_byte: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{bits:.3f} bits/token, {per_byte:.3f} bits/byte", refresh=False)
            with suppress(OSError):  # the terminal was closed
                self._bar.update(tokens)

    def at_checkpoint(self, state: State) -> None:
        if not self._quiet and self._bar is None:
            bits, per_byte = state.history["token"][-1], state.history["byte"][-1]
            say(f"step       {state.step:,} of {self._steps:,}: {bits:.3f} bits/token, {per_byte:.3f} bits/byte")
