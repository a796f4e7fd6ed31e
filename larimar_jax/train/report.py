"""What a person sees of a run while it runs, on stderr."""

from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# What the terms are to a reader of the bar: the same text, decoded in three ways.
_TERMS = {"reconstruction": "memory", "autoencoding": "bypassed", "language": "z=0", "kl": "KL"}


def say(text: str) -> None:
    """One line."""
    Console(stderr=True, highlight=False).print(text)


class Bar:
    """A bar of steps over a line of losses; evaluations are lines above them."""

    def __init__(self, total: int, done: int, *, shown: bool):
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=total, completed=done)
        self._losses = Text("compiling the step", no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._losses), console=self._console)
        self._shown = shown

    def __enter__(self) -> "Bar":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._shown:
            self._live.stop()
            if not self._console.is_terminal:
                # A file gets the last frame without the end of its line.
                self._console.print()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step that is done."""
        terms = "  ".join(f"{s} {values[n]:.2f}" for n, s in _TERMS.items() if n in values)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s  {values['episodes_per_second']:.1f}"
        self._losses.plain = f"loss {values['loss']:.2f}  {terms}  {speed} episodes/s"
        self._progress.update(self._task, completed=step)

    def evaluation(self, step: int, terms: Mapping[str, float]) -> None:
        """Held-out losses in nats per token: through memory, memory bypassed, and z = 0."""
        if self._shown:
            self._console.print(
                f"step {step}: held-out nats per token: {terms['reconstruction']:.3f} memory, "
                f"{terms['autoencoding']:.3f} bypassed, {terms['language']:.3f} z=0"
            )
