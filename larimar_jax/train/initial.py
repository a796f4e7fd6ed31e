"""Parameters that a run begins with, out of another run or an exported model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from larimar_jax import scope
from larimar_jax.config import StartConfig
from larimar_jax.train import checkpoint
from larimar_jax.weights import model_file


class StartError(ValueError):
    """A `train.start_from` that does not fit the model."""


def start_from(
    parameters: Mapping[str, jax.Array], start: StartConfig | None
) -> tuple[dict[str, jax.Array], list[str]]:
    """Return the parameters with those of `start` read from its path, each where it was; their names.

    Args:
        start: path of an exported file, of a finished run's folder, or of a folder with checkpoints
            or one of these; regexes on parameter paths. Of no other parameter is anything read.
    Raises:
        FileNotFoundError: nothing of these is there.
        StartError: a regex that matches nothing there, or arrays of other shapes; names all.
        CheckpointError: the checkpoint is damaged.
    """
    if start is None:
        return dict(parameters), []
    path = Path(start.path).absolute()
    exported = path / "model.safetensors" if path.is_dir() else path
    if exported.is_file():
        arrays, _ = model_file.load_exported(exported)
        for name in scope.ARRAYS:  # Fitted to the encodings of the model that they are in.
            arrays.pop(name, None)
        names = _chosen({name: array.shape for name, array in arrays.items()}, parameters, start)
        read = {name: jax.device_put(arrays[name], parameters[name].sharding) for name in names}
        return {**parameters, **read}, names
    path, read = checkpoint.newest(path), {}
    try:
        meta = checkpoint.read_meta(path)
        shapes = {item: meta["shapes"][item] for item in ("params", "memory")}
        names = _chosen({**shapes["params"], **shapes["memory"]}, parameters, start)
        for item in shapes:
            like = {name: parameters[name] for name in names if name in shapes[item]}
            read |= checkpoint.read_item(path, item, like, meta)
    except StartError:
        raise
    except Exception as error:  # Damage shows as nearly any type.
        raise checkpoint.CheckpointError(
            f"{path} cannot be read: {checkpoint.brief(error)}\nIt may be damaged; name the folder of "
            "another checkpoint."
        ) from error
    return {**parameters, **read}, names


def _chosen(
    shapes: Mapping[str, Sequence[int]], parameters: Mapping[str, jax.Array], start: StartConfig
) -> list[str]:
    """Return the names in `shapes` that `start` matches; StartError where they do not fit."""
    names = [n for n in shapes if any(re.search(regex, n) for regex in start.parameters)]
    problems = [
        f"{regex!r} matches no parameter there"
        for regex in start.parameters
        if not any(re.search(regex, name) for name in shapes)
    ]
    for name in names:
        there = tuple(shapes[name])
        if name not in parameters:
            problems.append(f"{name}: this model has no such parameter")
        elif there != parameters[name].shape:
            problems.append(f"{name}: {there} there, {parameters[name].shape} in this model")
    if problems:
        raise StartError(
            f"train.start_from {start.path} does not fit:\n  "
            + "\n  ".join(sorted(problems))
            + "\nThere are:\n  "
            + "\n  ".join(sorted(shapes))
        )
    return names
