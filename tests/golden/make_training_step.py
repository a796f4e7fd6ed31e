"""Three training steps of tests/world.py's model, as numbers: training_step.json.

    python tests/golden/make_training_step.py [PROCESSOR]

Factors near a boundary of bfloat16 are rounded to its other side where XLA fuses otherwise: of bfloat16
products there is a recording for each kind of processor on which they differ, under "… on PROCESSOR".
Update the file only where the step is meant to compute something else, and say why in the commit.
Parameters are drawn by their names and not by the model's initialisers, whose own golden is `initial`.
"""

import json
import sys
import zlib
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import conftest  # noqa: F401  # programs are compiled as in the tests

import jax  # noqa: E402
import numpy as np  # noqa: E402
import world  # noqa: E402

from larimar_jax import model  # noqa: E402
from larimar_jax.train import sharding  # noqa: E402
from larimar_jax.train.step import TrainStep, initialise  # noqa: E402

FILE = Path(__file__).with_name("training_step.json")
RUNS = {
    "one device": dict(mesh=(1, 1, 1)),
    "bfloat16 products": dict(mesh=(1, 1, 1), products="bfloat16"),
}
# A softmax does not depend on a bias of the keys: its gradient is rounding, and Adam takes its sign.
FROZEN = ["^encoder/position/", "attention/key/bias$"]


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("scale"):
        return np.ones(shape, np.float32)
    if name == "memory/log_variance":
        return np.full(shape, -2.0, np.float32)
    return draw.normal(0, 0.2, shape).astype(np.float32)


def _batch(config) -> dict[str, np.ndarray]:
    draw, batch, data = np.random.default_rng(0), {}, config.data
    for tower, length in (("encoder", data.encoder_tokens), ("decoder", data.decoder_tokens)):
        shape = (data.batch, data.episode[0], length)
        batch[f"{tower}_tokens"] = draw.integers(0, 300, shape).astype(np.int32)
        lengths = draw.integers(4, length, shape[:2])
        batch[f"{tower}_mask"] = np.arange(length) < lengths[..., None]
    return batch


def record(train: dict) -> dict:
    """Return metrics of three steps, gradient norms by parameter, and (sum, norm) of what they leave."""
    config = world.config(Path("none"), learning_rate=1e-3, ema=0.5, frozen=FROZEN, **train)
    mesh = sharding.make_mesh(config.train.mesh)
    abstract = model.AbstractModel(model.abstract(config))
    train_step = TrainStep(config, abstract, mesh)
    drawn = {name: _draw(name, leaf.shape) for name, leaf in abstract.parameters.items()}
    parameters = jax.device_put(drawn, sharding.parameter_shardings(config, abstract, mesh))
    frozen = train_step.freeze(parameters)
    state = train_step.init({name: parameters[name] for name in train_step.trained})
    batch, steps = sharding.place_batch(_batch(config), mesh), []
    for _ in range(3):
        state, metrics = train_step.step(state, frozen, batch)
        metrics = jax.device_get(metrics)
        norms = np.sqrt(metrics["gradient_squares"]).tolist()
        scalars = ("loss", "beta", "learning_rate", "gradient_norm")
        terms = {name: metrics[name] for name in scalars} | dict(sorted(metrics["terms"].items()))
        gradients = dict(sorted(zip(train_step.trained, norms, strict=True)))
        steps.append({n: float(term) for n, term in terms.items()} | {"gradients": gradients})
    left = {**state.params, **{f"average/{name}": a for name, a in state.average.items()}}
    left = {name: np.asarray(array, np.float64) for name, array in sorted(left.items())}
    return dict(
        steps=steps,
        parameters={n: [float(a.sum()), float(np.linalg.norm(a))] for n, a in left.items()},
        flops=train_step.flops(config.data.episode[0]),
    )


def initial() -> dict:
    """Return the norm of each parameter as the initialisers of seed 0 draw it."""
    _, parameters = initialise(world.config(Path("none")), sharding.make_mesh((1, 1, 1)))
    return {n: float(np.linalg.norm(np.float64(a))) for n, a in sorted(parameters.items())}


if __name__ == "__main__":
    if sys.argv[1:]:
        name = "bfloat16 products"
        runs = json.loads(FILE.read_text()) | {f"{name} on {sys.argv[1]}": record(RUNS[name])}
    else:
        runs = {"initial": initial(), **{name: record(train) for name, train in RUNS.items()}}
    FILE.write_text(json.dumps(runs, indent=1) + "\n")
