"""A study: recipes that differ in a few settings, trained one after the other and shown side by side.

Its config says a base config, settings that all recipes share, and each recipe's own. Every recipe is
an ordinary run in a folder of its own: it goes on where it was stopped, and is not trained again when
it is finished. What is shown is read from the runs' metrics alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from larimar_jax import config as configs
from larimar_jax import strict
from larimar_jax.settings import Config
from larimar_jax.train import export, loop, metrics, report
from larimar_jax.train import folder as run_folder

TABLE, CURVES = "study.md", "curves.png"


@dataclasses.dataclass(frozen=True)
class Study:
    """base: path of a training config. shared: settings of all recipes that differ from it, as for
    `--set`. recipes: each one's own, by name."""

    name: str
    base: str
    shared: tuple[str, ...]
    recipes: Mapping[str, tuple[str, ...]]

    def config(self, name: str, base: Mapping[str, Any]) -> Config:
        """That of a recipe; raises ConfigError, naming the recipe."""
        try:
            return configs.parse(configs.override(base, [*self.shared, *self.recipes[name]]))
        except configs.ConfigError as error:
            raise configs.ConfigError(f"recipe {name!r}: {error}") from error


def parse(values: Mapping[str, Any]) -> Study:
    """A study from its nested dict.

    Raises:
        ConfigError: naming at once each unknown or missing key, and each recipe that is no list.
    """
    problems: list[str] = []
    plain = {name: value for name, value in values.items() if name != "recipes"}
    built = strict.section(Study, plain, "", problems, {}, given=("recipes",))
    recipes = values.get("recipes")
    if not isinstance(recipes, Mapping) or not recipes:
        problems.append(f"recipes: expected a section of settings by name, got {recipes!r}")
        recipes = {}
    for name, told in recipes.items():
        if not isinstance(told, list | tuple) or not all(isinstance(each, str) for each in told):
            problems.append(f"recipes.{name}: expected a list of KEY=VALUE, got {told!r}")
    if problems:
        raise configs.ConfigError("The config does not fit:\n  " + "\n  ".join(problems))
    return Study(**built, recipes={name: tuple(told) for name, told in recipes.items()})


def only(study: Study, chosen: Sequence[str]) -> Study:
    """The study with the chosen recipes alone.

    Raises:
        ConfigError: it has none of such a name; names those that it has.
    """
    if unknown := [name for name in chosen if name not in study.recipes]:
        raise configs.ConfigError(
            f"there is no recipe {', '.join(unknown)}; known: {', '.join(study.recipes)}"
        )
    return dataclasses.replace(study, recipes={name: study.recipes[name] for name in chosen})


def train(study: Study, base: Mapping[str, Any], folder: str | Path) -> bool:
    """Trains the recipes that are not finished; whether all are now.

    Args:
        base: the base config's nested dict.
        folder: of the runs, one folder each.
    Raises:
        ConfigError: a recipe's settings make no config; before any is trained.
        OtherRun: a finished run was trained with other settings; before any is trained.
        Else as `loop.train`.
    """
    planned = {name: study.config(name, base) for name in study.recipes}
    for name, config in planned.items():
        if finished(Path(folder) / name):
            _check(Path(folder) / name, config)
    for name, config in planned.items():
        if finished(Path(folder) / name):
            continue
        report.say(f"recipe {name}: {' '.join(study.recipes[name]) or 'the base'}")
        if not loop.train(config, Path(folder) / name).finished:
            return False
    return True


def _check(run: Path, config: Config) -> None:
    """Raises folder.OtherRun where a finished run is of another config."""
    _, meta = export.load_exported(run / "model.safetensors")
    run_folder.same_run(meta["config"], configs.to_dict(config), run)


def finished(run: Path) -> bool:
    """Whether a run has exported its model."""
    return (run / "model.safetensors").is_file()


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's evaluations. steps: at which; terms: each one's values there, as `HeldOut.evaluate`
    names them. trained: numbers in the exported file. rate: decoder tokens per second, the median step.
    """

    steps: tuple[int, ...]
    terms: Mapping[str, tuple[float, ...]]
    trained: int
    rate: float


def curve(run: str | Path) -> Curve:
    """What a finished run was.

    Raises:
        FileNotFoundError: it is not finished.
    """
    run = Path(run)
    if not finished(run):
        raise FileNotFoundError(f"{run} is no finished run: it has no model.safetensors")
    lines = metrics.read(run / "metrics.jsonl")
    found = [line for line in lines if line["kind"] == "evaluation"]
    names = [name for name in found[-1] if name not in ("step", "kind")]
    rates = sorted(line["tokens_per_second"] for line in lines if line["kind"] == "train")
    arrays, _ = export.load_exported(run / "model.safetensors")
    return Curve(
        tuple(line["step"] for line in found),
        {name: tuple(line[name] for line in found) for name in names},
        sum(array.size for array in arrays.values()),
        rates[len(rates) // 2],
    )


def show(study: Study, folder: str | Path) -> list[Path]:
    """Writes the table and the curves of the finished recipes; returns their paths."""
    folder = Path(folder)
    done = [name for name in study.recipes if finished(folder / name)]
    curves = {name: curve(folder / name) for name in done}
    (folder / TABLE).write_text(table(study, curves), encoding="utf-8")
    draw(curves, folder / CURVES)
    return [folder / TABLE, folder / CURVES]


def table(study: Study, curves: Mapping[str, Curve]) -> str:
    """Markdown: a row a recipe, best first by the last held-out loss through memory."""
    order = sorted(curves, key=lambda name: curves[name].terms["reconstruction"][-1])
    steps = sorted({step for one in curves.values() for step in one.steps})
    head = ["recipe", *(f"step {step}" for step in steps), "z = 0", "edit gain", "edits", "trained",
            "tokens/s", "settings"]
    rows = [head, ["---"] * len(head)]
    for name in order:
        one = curves[name]
        last = functools.partial(_last, one)
        memory = dict(zip(one.steps, one.terms["reconstruction"], strict=True))
        settings = ", ".join(f"`{told}`" for told in study.recipes[name]) or "the base"
        rows.append([
            name,
            *(f"{memory[step]:.3f}" if step in memory else "" for step in steps),
            last("language", "{:.3f}"),
            last("edit_gain", "{:+.3f}"),
            last("edit_success", "{:.0%}"),
            f"{one.trained / 1e6:.1f} M",
            f"{one.rate:,.0f}",
            settings,
        ])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _last(one: Curve, name: str, form: str) -> str:
    return form.format(one.terms[name][-1]) if name in one.terms else ""


def draw(curves: Mapping[str, Curve], path: str | Path) -> None:
    """Held-out nats per token through memory, a line a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for name, one in curves.items():
        axes.plot(one.steps, one.terms["reconstruction"], marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="held-out nats per token, through memory")
    # Beside the lines: of many recipes it would lie on top of some.
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
