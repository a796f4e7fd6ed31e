"""What a run records and shows: metrics.jsonl, TensorBoard, a bar for people, its environment."""

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
import timeit
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from larimar_jax.config import Config, TrainConfig, to_dict
from larimar_jax.data import episodes
from larimar_jax.train.step import TrainState, TrainStep
from larimar_jax.weights import model_file

# What the terms are to a reader of the bar: the same text, decoded in three ways.
_TERMS = {"reconstruction": "memory", "autoencoding": "bypassed", "language": "z=0", "kl": "KL"}
# Rows of the square matrices whose product measures a device: large enough that the device is at its
# best, small enough to take no time.
_MATMUL_ROWS = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
# Peaks of dense products in FLOP/s, by a part of the device's name; float32 as TF32 (data sheets).
PEAKS = {
    "A100": {"float32": 156e12, "bfloat16": 312e12, "float16": 312e12},
    "H100 80GB HBM3": {"float32": 494e12, "bfloat16": 989e12, "float16": 989e12},
    "H200": {"float32": 494e12, "bfloat16": 989e12, "float16": 989e12},
}
_PACKAGES = "larimar-jax jax jaxlib flax optax orbax-checkpoint grain numpy transformers tokenizers"


def say(text: str) -> None:
    """Print one line for a person, on stderr."""
    Console(stderr=True, highlight=False).print(text)


class Logger:
    """The records of a run: every step, read while the next one runs, and every evaluation.

    As a context. A line of metrics.jsonl is {"step": steps done, "kind": "train" | "evaluation",
    name: value, …}. Values have all their digits, so that two runs can be compared bit for bit.

    Args:
        run_dir: the folder of the run.
        train_step: the run's compiled step.
        step: how many steps are done. Lines past it are dropped: a killed run has logged steps that
            its last checkpoint does not hold, and these steps are run again.
        progress: a bar and evaluations on stderr.
    """

    def __init__(self, run_dir: Path, train_step: TrainStep, step: int, *, progress: bool):
        self._train_step, self._config = train_step, train_step.config
        self._bad_steps = BadSteps(self._config.train, train_step.trained)
        dtype = self._config.train.products or self._config.model.dtype
        self._rate, self._devices = matmul_rate(dtype) * train_step.mesh.size, train_step.mesh.size
        self._peak = peak_flops(jax.devices()[0].device_kind, dtype)
        self._pending: tuple[Any, ...] | None = None
        self._read_at = 0.0
        self._writes = jax.process_index() == 0
        self._bar = Bar(self._config.train.steps, step, shown=progress and self._writes)
        if self._writes:
            self._file = _truncated(run_dir / "metrics.jsonl", step).open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=step + 1, flush_secs=10
            )
            self._tracker = _track(run_dir, self._config) if self._config.train.wandb else None

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        if self._writes:
            self._file.close()
            self._board.close()
            if self._tracker is not None:
                self._tracker.finish()

    def train(
        self, step: int, state: TrainState, metrics: Any, batch: Mapping[str, Any], began: float
    ) -> None:
        """Record the step before this one, which runs meanwhile.

        Args:
            step: steps done, with this one. state, metrics: what the step returned.
            batch: this process' part of the step's batch. began: `time.perf_counter` at its dispatch.
        Raises:
            BadStep: as `BadSteps.check`, of the step before.
        """
        self.flush(state)
        self._pending = (step, metrics, batch, began)

    def flush(self, state: TrainState) -> None:
        """Wait for the newest step and record it; raises as `BadSteps.check`."""
        if self._pending is None:
            return
        (step, metrics, batch, began), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        # A step dispatched while the step before it ran began when that step was done.
        now = time.perf_counter()
        seconds, self._read_at = now - max(began, self._read_at), now
        # A bad step left the state as it was, so these are the parameters that it began with.
        problem = self._bad_steps.check(step, metrics, state.params)
        squares = collections.Counter()
        for name, square in zip(self._train_step.trained, metrics["gradient_squares"], strict=True):
            squares[f"gradient_norm_{name.split('/')[0]}"] += float(square)
        flops = self._train_step.flops(*episodes.shape(batch))
        masks = [batch[f"{tower}_mask"] for tower in ("encoder", "decoder")]
        rate = flops / seconds / self._devices
        values = {
            "loss": float(metrics["loss"]),
            **{name: float(value) for name, value in sorted(metrics["terms"].items())},
            **{name: float(metrics[name]) for name in ("beta", "learning_rate", "gradient_norm")},
            **{part: square**0.5 for part, square in squares.items()},
            # Of the decoder's texts, padding left out.
            "tokens_per_second": int(batch["decoder_mask"].sum()) * jax.process_count() / seconds,
            "padding": 1.0 - sum(m.sum() for m in masks) / sum(m.size for m in masks),
            "episodes_per_second": self._config.data.batch / seconds,
            # The share of the devices' rate of products that the model's FLOPs are.
            "utilisation": flops / seconds / self._rate,
            "tflops_per_device": rate / 1e12,
            **({"mfu": rate / self._peak} if self._peak else {}),
            "skipped": float(problem is not None),
        }
        self.write(step, "train", values, board=step % self._config.train.log_every == 0)
        self._bar.step(step, values)
        if problem is not None:
            say(problem)

    def evaluation(self, step: int, terms: Mapping[str, float], *, record: bool = True) -> None:
        """Show held-out terms, in nats per token, and record them where `record`."""
        if record:
            self.write(step, "evaluation", terms)
        self._bar.evaluation(step, terms)

    def write(
        self, step: int, kind: str, values: Mapping[str, float], *, board: bool = True
    ) -> None:
        """Write one line, and one scalar for each value where `board`; process 0 alone writes."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()  # To the system: what a killed process has written stays.
        for name, value in values.items() if board else ():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if board and self._tracker is not None:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self._tracker.log(named | {"step": step})

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Write a line for each edit that `Evaluator.samples` returns, and a text."""
        for index, texts in enumerate(samples if self._writes else ()):
            line = {"step": step, "kind": "sample", **texts}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            text = "\n\n".join(f"{name}: {text}" for name, text in texts.items())
            self._board.add_text(f"sample/{index}", text, step)


def find_wandb() -> Any:
    """Return the module wandb; ModuleNotFoundError says what installs it."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "train.wandb needs the package wandb: pip install 'larimar-jax[wandb]', or train.wandb=null"
        ) from error
    return wandb


def _track(run_dir: Path, config: Config) -> Any:
    """Return a run of Weights & Biases, the same for a run that goes on."""
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    place = dict(project=config.train.wandb, name=config.name, dir=str(run_dir))
    return find_wandb().init(**place, id=identity, resume="allow", config=to_dict(config))


def _truncated(path: Path, step: int) -> Path:
    """Drop the lines past `step`; of a run that starts again, all: its first is that of step 0."""
    if path.exists():
        lines = [line for line in read_metrics(path) if line["step"] <= step != 0]
        model_file.replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl without a last line that was cut off in the middle."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Bar(Progress):
    """A bar of steps over a line of losses; evaluations are lines above them."""

    def __init__(self, total: int, done: int, *, shown: bool):
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn()
        console = Console(stderr=True, highlight=False)
        self._losses = Text("compiling the step", no_wrap=True, overflow="ellipsis")
        super().__init__(*columns, console=console, expand=True, disable=not shown)
        self._task = self.add_task("train", total=total, completed=done)
        self.start()

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield what is shown: the bar, and the losses below it."""
        yield from super().get_renderables()
        yield self._losses

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        terms = "  ".join(f"{s} {values[n]:.2f}" for n, s in _TERMS.items() if n in values)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s  {values['episodes_per_second']:.1f}"
        self.show(step, f"loss {values['loss']:.2f}  {terms}  {speed} episodes/s")

    def show(self, step: int, text: str) -> None:
        """Show a line about a step."""
        self._losses.plain = text
        self.update(self._task, completed=step)

    def evaluation(self, step: int, terms: Mapping[str, float]) -> None:
        """Show held-out losses in nats per token: through memory, memory bypassed, and z = 0."""
        if not self.disable:
            self.console.print(
                f"step {step}: held-out nats per token: {terms['reconstruction']:.3f} memory, "
                f"{terms['autoencoding']:.3f} bypassed, {terms['language']:.3f} z=0"
            )


class BadStep(FloatingPointError):
    """A step whose loss or gradient is not finite, or whose loss is a spike; its state is unchanged."""


class BadSteps:
    """Policy for bad steps, `train.on_bad_step`; the step itself has left the state as it was."""

    LIMIT = 10  # Bad steps in a row that no run recovers from.

    def __init__(self, train: TrainConfig, trained: list[str]):
        self._train, self._trained, self._row = train, trained, 0

    def check(self, step: int, metrics: Mapping[str, Any], params: Mapping[str, Any]) -> str | None:
        """Return None for a good step; for a bad one that is skipped, what is wrong with it.

        Args:
            metrics: the step's, on the host. params: those that the step began with, by path.
        Raises:
            BadStep: where the policy is to stop, or after too many in a row.
        """
        if metrics["sound"]:
            self._row = 0
            return None
        self._row += 1
        what = f"step {step}: {self._describe(metrics, params)}"
        if self._train.on_bad_step == "skip" and self._row < self.LIMIT:
            return f"{what}; skipped, {self._row} in a row"
        many = f" This was the {self.LIMIT}th in a row." if self._row >= self.LIMIT else ""
        raise BadStep(
            f"{what}.{many} The state before this step is untouched, and the last checkpoint is "
            "sound. Likely causes: too high a learning rate (train.learning_rate, "
            "train.warmup_steps), too little clipping (train.clip_norm), or a compute dtype with too "
            "small a range (model.dtype). train.on_bad_step=skip goes on without such steps."
        )

    def _describe(self, metrics: Mapping[str, Any], params: Mapping[str, Any]) -> str:
        loss, squares = float(metrics["loss"]), np.asarray(metrics["gradient_squares"])
        if math.isfinite(loss) and math.isfinite(float(metrics["gradient_norm"])):
            return (
                f"the loss is {loss:.4g}, more than train.spike ({self._train.spike:g}) above the "
                f"usual {float(metrics['usual_loss']):.4g}; the largest gradient is that of "
                f"{self._trained[int(np.argmax(squares))]}"
            )
        # In order of cause: a parameter makes a term not finite, and a term a gradient.
        suspects = [(f"parameter {name}", leaf) for name, leaf in params.items()]
        suspects += [(f"loss term {n}", term) for n, term in sorted(metrics["terms"].items())]
        suspects += [(f"gradient of {n}", s) for n, s in zip(self._trained, squares, strict=True)]
        bad = (name for name, value in suspects if not bool(jnp.isfinite(value).all()))
        first = next(bad, "the norm of the gradients, though each of them is finite")
        return f"the loss is {loss}; the first that is not finite is {first}"


def peak_flops(kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device by its name, for products of this dtype, where it is known."""
    return next((peaks[dtype] for name, peaks in PEAKS.items() if name in kind), None)


def matmul_rate(dtype: str) -> float:
    """Return FLOP/s of a product of `dtype` factors, summed in float32, on one device: the best of 5."""
    rows = _MATMUL_ROWS.get(jax.default_backend(), 4096)
    x = jax.device_put(jnp.ones((rows, rows), dtype), jax.local_devices()[0])
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    seconds = min(timeit.repeat(lambda: product(x, x).block_until_ready(), number=1))
    return 2.0 * rows**3 / seconds


@functools.cache
def environment() -> dict[str, Any]:
    """Return what a run runs with: the source's revision, versions, devices and XLA's flags.

    The revision ends in "+changes" where files differ from it. It is None outside a clone, and so is
    the version of what is not installed.
    """
    root, revision = Path(__file__).resolve().parents[2], None
    if (root / ".git").exists():
        line = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
        # No git, or another's clone.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            done = subprocess.run([*line, "--dirty=+changes"], capture_output=True, check=True)
            revision = done.stdout.decode().strip()
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES.split())
    for package in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "revision": revision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "backend": jax.default_backend(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "cores": os.cpu_count(),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
