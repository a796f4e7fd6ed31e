"""What a person sees of a run while it runs, on stderr."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_TERMS = ("reconstruction", "autoencoding", "language", "kl")


def say(text: str) -> None:
    """One line."""
    Console(stderr=True, highlight=False).print(text)


class Bar:
    """A bar of steps with the loss and its terms; evaluations are lines above it."""

    def __init__(self, total: int, done: int, *, shown: bool):
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            disable=not shown,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, losses="compiling")
        self._shown = shown

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step that is done."""
        losses = f"loss {values['loss']:.3f}  " + "  ".join(
            f"{name} {values[name]:.3f}" for name in _TERMS if name in values
        )
        speed = f"{values['tokens_per_second']:,.0f} tokens/s"
        speed += f"  {values['episodes_per_second']:.1f} episodes/s"
        self._progress.update(self._task, completed=step, losses=f"{losses}  {speed}")

    def evaluation(self, step: int, terms: Mapping[str, float]) -> None:
        """Held-out losses in nats per token: through memory, memory bypassed, and z = 0."""
        if self._shown:
            self._progress.console.print(
                f"step {step}: held-out nats per token {terms['reconstruction']:.3f} through memory, "
                f"{terms['autoencoding']:.3f} memory bypassed, {terms['language']:.3f} with z = 0"
            )
