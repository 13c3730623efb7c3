"""`jaxent train`: from files to a trained model and an account of what was learnt."""

import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxent.cli.atomic_files import exclusive_directory
from jaxent.cli.errors import CommandError, Stopped, require
from jaxent.cli.train import model, report
from jaxent.cli.train.checkpoint import NAME, Checkpoint
from jaxent.cli.train.corpus import Corpus, read_corpus
from jaxent.cli.train.dataset import Dataset
from jaxent.cli.train.evaluation import measure
from jaxent.cli.train.loop import Schedule, State, train
from jaxent.cli.train.mesh import DeviceMesh, join
from jaxent.cli.train.summary import summarize

SAMPLE_ROWS = 2048  # of the held-out text, measured on the way


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `jaxent train`."""

    paths: tuple[str, ...]
    out: Path
    vocab_size: int
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
        return {"corpus": corpus.digest, **{name: getattr(self, name) for name in names}, "mesh": mesh}

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
    finished: dict[str, Any] | None  # the account of a run that was here before


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
            what = str(error).splitlines()[0]
            raise CommandError(f"JAX gave up: {what}; --resume goes on from the last checkpoint") from error
    if not devices.is_first:
        return
    if options.as_json:
        report.print_json(result)
    elif not options.quiet:
        report.print_summary(result)
        seconds = f" after {result['seconds']:.0f} s" if work.finished is None else ""
        print(f"\n{options.out / NAME}, report.json and loss.png written{seconds}")


def _say(options: Options, line: str) -> None:
    if not options.quiet:
        print(line, file=sys.stderr, flush=True)


def _prepare(options: Options, devices: DeviceMesh, held: ExitStack) -> Work:
    corpus = read_corpus(options.paths, options.max_bytes)
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
    if options.overwrite or not path.exists():
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
    data = devices.together(lambda: Dataset.of(work.corpus, options.vocab_size, options.steps * options.batch_rows))
    _say(
        options,
        f"tokens     vocabulary {options.vocab_size:,}; {len(data.counted.ids):,} counted, "
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
    text = {"paths": list(options.paths), "max_bytes": options.max_bytes}

    def save(state: State) -> None:
        params, optimizer = devices.fetch((state.params, jax.tree.leaves(state.optimizer)))
        checkpoint = Checkpoint(
            work.settings, text, state.step, data.tokenizer, data.tables, params, tuple(optimizer), state.history
        )
        devices.together(lambda: checkpoint.save(options.out) if devices.is_first else None)

    def look(state: State) -> None:
        risk, _ = measure(state.params, sample, devices)
        bits = float(risk.bits_per(int(np.sum(lengths[sample.targets], dtype=np.int64))))
        state.history.setdefault("held_step", []).append(state.step)
        state.history.setdefault("held_byte", []).append(bits)

    if work.stored is None:
        look(state)
        save(state)
        if devices.is_first:
            report.remove(options.out)
    try:
        with _progress(options, state, schedule) as show:
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
    except Stopped as stopped:
        command = f"jaxent train --resume --out {shlex.quote(str(options.out))}"
        raise Stopped(stopped.signum, f"{stopped}; `{command}` goes on") from None
    learnt = summarize(state.params, data, work.corpus, options.batch_rows, devices)
    result = {"settings": work.settings, "source": work.corpus.source, **learnt}
    result["seconds"] = round(time.monotonic() - began, 1)

    def write() -> None:
        if devices.is_first:
            report.draw(options.out, result, state.history)
            report.save(options.out, result)

    devices.together(write)
    return result


def _start(
    options: Options, devices: DeviceMesh, data: Dataset, schedule: Schedule, stored: Checkpoint | None
) -> State:
    if stored is None:
        params = model.initial_params(data.counted, options.vocab_size, options.width, 4 * options.width, options.seed)
        optimizer = schedule.optimizer().init(params)
        return State(0, devices.parameters(params), devices.parameters(optimizer), {})
    structure = jax.tree.structure(jax.eval_shape(schedule.optimizer().init, stored.params))
    if structure.num_leaves != len(stored.optimizer):
        raise CommandError(f"{options.out / NAME} is from another version of optax: --overwrite starts again")
    optimizer = structure.unflatten(stored.optimizer)
    return State(stored.step, devices.parameters(stored.params), devices.parameters(optimizer), stored.history)


@contextmanager
def _progress(options: Options, state: State, schedule: Schedule) -> Iterator[Callable[[int, float, float], None]]:
    """A bar on a terminal, nothing in a pipe."""
    if options.quiet or not sys.stderr.isatty():
        yield lambda tokens, bits, per_byte: None
        return
    from tqdm import tqdm

    total, done = schedule.steps * schedule.batch_rows, state.step * schedule.batch_rows
    with tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train", dynamic_ncols=True) as bar:

        def show(tokens: int, bits: float, per_byte: float) -> None:
            bar.set_postfix_str(f"{bits:.3f} bits/token, {per_byte:.3f} bits/byte", refresh=False)
            bar.update(tokens)

        yield show
