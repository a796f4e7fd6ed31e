"""A run's folder: it belongs to one config, and a run that goes on must be the same run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from larimar_jax import config as configs
from larimar_jax.config import Config

# What may differ between a run and its continuation: none of these changes a step's result beyond
# rounding.
_FREE = {"name", "editing.ridge", "editing.query_noise", "editing.scope_threshold", "model.remat"} | {
    f"train.{key}"
    for key in (
        "mesh layout memory_layout accumulate on_bad_step spike log_every evaluate_every edits "
        "checkpoint_every keep best stall"
    ).split()
}


class OtherRun(ValueError):
    """The run's folder was made by another config."""


def claim(run_dir: Path, config: Config) -> None:
    """Makes the folder this config's; one in which nothing was trained yet may be anybody's.

    Raises:
        OtherRun: it is another's; names the keys that differ.
    """
    path = run_dir / "config.json"
    mine = configs.to_dict(config)
    if path.is_file() and _begun(run_dir):
        same_run(json.loads(path.read_text(encoding="utf-8")), mine, run_dir)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _begun(run_dir: Path) -> bool:
    checkpoints = run_dir / "checkpoints"
    kept = checkpoints.is_dir() and any(child.name.isdigit() for child in checkpoints.iterdir())
    return kept or (run_dir / "model.safetensors").exists()


def same_run(theirs: Mapping[str, Any], mine: Mapping[str, Any], where: Path) -> None:
    """Whether a config found in `where` is this run's, for all that changes its result.

    Raises:
        OtherRun: as `claim`.
    """
    # An older folder's config may lack what was since made a setting.
    theirs = _flat(configs.to_dict(configs.parse(theirs)))
    mine = _flat(mine)
    keys = sorted(set(theirs) | set(mine))
    differ = [k for k in keys if theirs.get(k) != mine.get(k) and k not in _FREE]
    if differ:
        lines = [f"{k}: {theirs.get(k)!r} in the folder, {mine.get(k)!r} now" for k in differ]
        raise OtherRun(
            f"{where} belongs to a run of another config:\n  " + "\n  ".join(lines)
            + "\nTake another folder, or the config that it was made with (its config.json)."
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    inner = (_flat(item, f"{path}.{key}" if path else key) for key, item in value.items())
    return {key: leaf for part in inner for key, leaf in part.items()}
