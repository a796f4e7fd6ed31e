"""Parameters that a run begins with, from another run or an exported model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax

from larimar_jax import scope
from larimar_jax.config import StartConfig
from larimar_jax.train import checkpoint
from larimar_jax.weights import model_file


class StartError(ValueError):
    """What `train.start_from` names does not fit the model."""


def replace(parameters: Mapping[str, jax.Array], said: StartConfig) -> dict[str, jax.Array]:
    """`parameters` with those that `said` names taken from its path, each where it was.

    Args:
        said: path of an exported file, of a finished run's folder, or of a run's folder with
            checkpoints; regexes on parameter paths.
    Raises:
        FileNotFoundError: nothing of these is there.
        StartError: a regex that matches nothing there, or arrays of other shapes; names all.
    """
    path = Path(said.path)
    exported = path / "model.safetensors" if path.is_dir() else path
    if exported.is_file():
        found, _ = model_file.load_exported(exported)
        found.pop(scope.PROJECTION, None)  # fitted to the encodings of the model that it is in
        shapes = {name: array.shape for name, array in found.items()}
    else:
        shapes = checkpoint.shapes(path)
    wanted = {n for n in shapes if any(re.search(regex, n) for regex in said.parameters)}
    problems = [
        f"{regex!r} matches no parameter there"
        for regex in said.parameters
        if not any(re.search(regex, name) for name in shapes)
    ]
    problems += [f"{n}: this model has no such parameter" for n in wanted if n not in parameters]
    problems += [
        f"{n}: {shapes[n]} there, {parameters[n].shape} in this model"
        for n in sorted(wanted & set(parameters))
        if tuple(shapes[n]) != parameters[n].shape
    ]
    if problems:
        raise StartError(
            f"train.start_from {said.path} does not fit:\n  " + "\n  ".join(sorted(problems))
            + "\nThere are:\n  " + "\n  ".join(sorted(shapes))
        )
    like = {name: parameters[name] for name in wanted}
    if exported.is_file():
        taken = {name: jax.device_put(found[name], leaf.sharding) for name, leaf in like.items()}
    else:
        taken = checkpoint.load_parts(path, like)
    return {**parameters, **taken}


def named(parameters: Iterable[str], said: StartConfig | None) -> list[str]:
    """The paths that `said` takes from elsewhere: a tower's own source does not give them again."""
    regexes = () if said is None else said.parameters
    return [name for name in parameters if any(re.search(regex, name) for regex in regexes)]
