"""Speed of one training step, beside the same step in torch with Hugging Face towers.

Both sides begin with the same weights and are given the same batch: encoder, write and read of every
episode's memory, decoder through the routes of Eq. 1 that have a weight, gradients of what is trained,
global-norm clipping, AdamW. Before anything is timed, their loss, its terms and their gradients' norm
must agree, in float32 also where a step rounds (`train.products`): what is rounded differs, and
rounding would hide what else does. Then they run in turns within one process, so that a machine's
moods hit both, with a plain matrix product (what the machine can do), the step fed by the input
pipeline, the step without memory, and the memory's own forward and backward pass.

The comparison needs torch and transformers (`pip install -e '.[compare]'`).
"""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from larimar_jax import config as configs
from larimar_jax import options
from larimar_jax.bench import jax_step
from larimar_jax.bench.runner import Record
from larimar_jax.settings import Config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "training_step.py"
# How far loss, terms and gradient norm of the two sides may lie apart, relative to them.
AGREEMENT = 1e-4
# The same for the norm of gradients through a pretrained decoder, where float32 loses more digits:
# through SmolLM2, torch's gradients are 2e-4 from those in float64, and ours 5e-4.
PRETRAINED = 1e-3
# Rows and columns of the matrix product that stands for what the machine can do, and how many of
# them are timed together.
_GEMM, _PRODUCTS = 2048, 10
# Seconds before each timing.
_REST = 0.5


class Disagreement(ValueError):
    """The two sides do not compute the same, so that their times say nothing about each other."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `larimar bench training`."""
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help="model and batch (%(default)s)")
    options.overrides(parser, "settings that differ from the file, such as train.products=bfloat16")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each (7)")
    parser.add_argument("--alone", action="store_true", help="without torch beside it")


def experiment(args: argparse.Namespace) -> "Training":
    """The experiment of a parsed command line.

    Raises:
        ModuleNotFoundError: torch or transformers is missing, and --alone is not given.
        ValueError: the config has what the torch side does not compute.
        FileNotFoundError: the weights of a tower are not installed.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing and not args.alone:
        raise ModuleNotFoundError(
            f"the comparison needs {' and '.join(missing)}: pip install -e '.[compare]',"
            " or time this project alone with --alone"
        )
    values = configs.override(configs.load_dict(args.config), args.overrides)
    return Training(configs.parse(values), args.repeats, alone=args.alone)


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing of everything."""

    case_id: str


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """What was timed, and what follows from it."""
    results = summary["results"]
    timed = Table("", "seconds", "spread", "best", "CPU seconds")
    for name, seconds in results["seconds"].items():
        best, cpu = (results[kind][name] for kind in ("best_seconds", "cpu_seconds"))
        spread = f"{results['spread'][name]:.0%}"
        timed.add_row(name, f"{seconds:.3f}", spread, f"{best:.3f}", f"{cpu:.3f}")
    found = Table("", "measured", "best of each", "of CPU seconds")
    cpu, share = results["of_cpu_seconds"], results["memory_share"]
    rows: list[tuple[str, ...]] = [("tokens/s", f"{results['tokens_per_second']:.1f}")]
    if "ratio" in results:
        apart = max(results["apart"].values())
        ratios = (results["ratio"], results["ratio_of_best"], cpu["ratio"])
        rows += [
            ("tokens/s, torch", f"{results['torch_tokens_per_second']:.1f}"),
            ("throughput over torch's", *(f"{ratio:.3f}" for ratio in ratios)),
            ("losses apart (relative)", f"{apart:.1e}"),
        ]
    used = (results["utilisation"], results["utilisation_of_best"], cpu["utilisation"])
    fed = (results["pipeline_over_constant"], cpu["pipeline_over_constant"])
    rows += [
        ("GFLOP/s of the step", f"{results['step_flops_per_second'] / 1e9:.1f}"),
        ("GFLOP/s of a matrix product", f"{results['gemm_flops_per_second'] / 1e9:.1f}"),
        ("utilisation", *(f"{value:.1%}" for value in used)),
        ("memory's share, timed alone", f"{share['timed alone']:.2%}"),
        (
            "memory's share, by difference",
            f"{share['by difference']:.2%}",
            "",
            f"{cpu['memory_share']:.2%}",
        ),
        ("with pipeline over constant batch", f"{fed[0]:.3f}", "", f"{fed[1]:.3f}"),
    ]
    for row in rows:
        found.add_row(*row)
    return [timed, found]


class Training:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "training"
    tables = staticmethod(tables)
    chunk = 1

    def __init__(self, config: Config, repeats: int, *, alone: bool):
        config = jax_step.with_sizes(config)
        problems = comparable(config) if not alone else []
        if len(config.data.episode) != 1:
            problems.append("data.episode: one size is timed, give one")
        if problems:
            raise ValueError("this config cannot be timed:\n  " + "\n  ".join(problems))
        self._config, self._alone = config, alone
        self.cases = [Case(str(repeat)) for repeat in range(repeats)]
        self.settings: Mapping[str, Any] = {
            "config": configs.to_dict(config),
            "repeats": repeats,
            "alone": alone,
        }
        self._sides: dict[str, Callable[[], None]] | None = None
        self._found: Record = {"apart": {}}

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Seconds of everything, one after the other; all of it has run once before.

        Raises:
            Disagreement: the two sides do not compute the same.
        """
        if self._sides is None:
            self._sides = self._prepare()
            for side in self._sides.values():
                side()
        records = []
        for case in cases:
            seconds, cpu = {}, {}
            for name, side in self._sides.items():
                # Threads of the side before may still be spinning for more work.
                time.sleep(_REST)
                begin, used = time.perf_counter(), time.process_time()
                side()
                cpu[name] = time.process_time() - used
                seconds[name] = time.perf_counter() - begin
            record = {"case_id": case.case_id, "seconds": seconds, "cpu_seconds": cpu}
            records.append(record | self._found)
        return records

    def _prepare(self) -> dict[str, Callable[[], None]]:
        ours = jax_step.Ours(self._config)
        self._found["flops_in_trace"] = ours.flops
        sides = {"step": ours.step}
        if not self._alone:
            from larimar_jax.bench import torch_step

            theirs = torch_step.Theirs(self._config, ours.model())
            pretrained = self._config.model.decoder.source is not None
            self._found["apart"] = agreement(
                ours.losses(), theirs.losses(ours.batch), PRETRAINED if pretrained else AGREEMENT
            )
            sides["torch"] = lambda: theirs.step(ours.batch)
        return sides | {
            "gemm": jax_step.products(_GEMM, _PRODUCTS, self._config.train.products or "float32"),
            "pipeline": ours.step_of_pipeline,
            "step again": ours.step,
            "without memory": ours.step_without_memory,
            "memory": ours.memory,
        }

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Medians of each, and their ratios."""
        times, cpu = (
            {name: [record[kind][name] for record in records] for name in records[0]["seconds"]}
            for kind in ("seconds", "cpu_seconds")
        )
        seconds, cpu = (
            {name: statistics.median(values) for name, values in kind.items()}
            for kind in (times, cpu)
        )
        # A step on a constant batch is timed twice a round, once beside each of what it is held to.
        step, again = seconds["step"], seconds["step again"]
        traced = records[0]["flops_in_trace"]
        work = matrix_flops(self._config) or {"traced": traced}
        data = self._config.data
        facts = data.batch * data.episode[0]
        tokens = facts * (data.encoder_tokens + data.decoder_tokens)
        rate, products = sum(work.values()) / step, 2 * _GEMM**3 * _PRODUCTS
        gemm, best = products / seconds["gemm"], {n: min(values) for n, values in times.items()}
        result = {
            "seconds": seconds,
            "best_seconds": best,
            # Of all threads: what other programs on the machine disturb least.
            "cpu_seconds": cpu,
            # Distance of the middle half, relative to the median: how noisy the machine was.
            "spread": {name: _spread(values) for name, values in times.items()},
            "tokens_per_second": tokens / step,
            "episodes_per_second": data.batch / step,
            "flops": work,
            "flops_in_trace": traced,
            "gemm_flops_per_second": gemm,
            "step_flops_per_second": rate,
            "utilisation": rate / gemm,
            "utilisation_of_best": sum(work.values()) / best["step"] / (products / best["gemm"]),
            "memory_share": {
                "timed alone": seconds["memory"] / step,
                "by difference": 1.0 - seconds["without memory"] / again,
            },
            "pipeline_over_constant": again / seconds["pipeline"],
        }
        result["of_cpu_seconds"] = {
            "utilisation": sum(work.values()) / cpu["step"] / (products / cpu["gemm"]),
            "memory_share": 1.0 - cpu["without memory"] / cpu["step again"],
            "pipeline_over_constant": cpu["step again"] / cpu["pipeline"],
        }
        if not self._alone:
            result["of_cpu_seconds"]["ratio"] = cpu["torch"] / cpu["step"]
            result["torch_tokens_per_second"] = tokens / seconds["torch"]
            result["ratio"] = seconds["torch"] / step
            result["ratio_of_best"] = best["torch"] / best["step"]
            result["apart"] = records[0]["apart"]
        return result


def comparable(config: Config) -> list[str]:
    """What of a config the torch side does not compute, one line each; it has the towers' sizes."""
    model, memory, train = config.model, config.memory.hyperparameters, config.train
    encoder, decoder = model.encoder, model.decoder
    changed = model.lora is None or decoder.family == "llama"
    needed = (
        ("model.encoder", "bert", encoder.family == "bert"),
        ("model.decoder", "gpt2 or llama", decoder.family in ("gpt2", "llama")),
        ("model.decoder.window", "0", not getattr(decoder.sizes, "window", 0)),
        ("model.lora", "None with this decoder, whose kernels Hugging Face fuses", changed),
        ("model.dtype", "float32", model.dtype == "float32"),
        ("model.remat", "none", model.remat == "none"),
        ("memory.variant", "direct", config.memory.variant == "direct"),
        ("memory.variance", "scalar", memory.get("variance") == "scalar"),
        ("memory.query", "posterior", memory.get("query") == "posterior"),
        ("memory.addressing", "pinv", memory.get("addressing") == "pinv"),
        ("data.episode", "at most memory.slots facts",
         max(config.data.episode) <= memory.get("slots", 0)),
        ("train.optimizer", "adamw", train.optimizer == "adamw"),
        ("train.clip_norm", "above 0", train.clip_norm > 0),
        ("train.accumulate", "1", train.accumulate == 1),
        ("train.ema", "0", train.ema == 0.0),
    )
    return [f"{key}: beside torch only {only}" for key, only, fine in needed if not fine]


def _weights(config: Config) -> tuple[float, ...]:
    goal = config.objective
    return goal.reconstruction, goal.autoencoding, goal.language


def matrix_flops(config: Config) -> dict[str, int]:
    """FLOPs of a step's matrix products by part: 2·m·n·k each, three times for the backward pass.

    Attention is counted as it is computed, over the whole T x T square. Factorisations, elementwise
    work and the optimiser count nothing. Empty where this is not what a step computes: for a decoder
    other than GPT-2, or where something is frozen; what stands in the trace is all there is to go by.
    """
    model, data = config.model, config.data
    if model.decoder.family != "gpt2" or model.lora is not None or config.train.frozen:
        return {}
    encoder, decoder = model.encoder.sizes, model.decoder.sizes
    facts = data.batch * data.episode[0]
    routes = facts * sum(weight != 0.0 for weight in _weights(config))
    length = data.decoder_tokens - 1
    slots, latent = config.memory.hyperparameters["slots"], model.latent
    slot_width = model.slots_per_layer * (1 if model.tied_slots else 2)

    def layers(sizes, rows: int, tokens: int, keys: int) -> int:
        projections = 8 * sizes.width**2 + 4 * sizes.width * sizes.mlp
        return rows * tokens * sizes.depth * (projections + 4 * sizes.width * keys)

    pooler = encoder.width if getattr(encoder, "pooling", "") == "cls" else 0
    forward = {
        "encoder": layers(encoder, facts, data.encoder_tokens, data.encoder_tokens)
        + 2 * facts * encoder.width * (pooler + latent),
        # Keys of all facts, twice W†Z and W M, and the projection that explains a read.
        "memory": 2 * facts * data.episode[0] * (slots + latent) * 4 + 2 * facts * latent * slots,
        "conditioning": 2 * routes * latent * decoder.width * (slot_width * decoder.depth + 1),
        "decoder": layers(decoder, routes, length, length + model.slots_per_layer),
        "logits": 2 * routes * length * decoder.width * decoder.vocab_size,
    }
    return {name: 3 * flops for name, flops in forward.items()}


def agreement(
    ours: Mapping[str, float], theirs: Mapping[str, float], gradients: float = AGREEMENT
) -> dict[str, float]:
    """How far apart the two sides are, relative to theirs, by name.

    Args:
        gradients: how far the gradients' norms may lie apart; all else AGREEMENT.

    Raises:
        Disagreement: more than that, or not finite; names every one.
    """
    apart = {name: abs(ours[name] - said) / max(abs(said), 1e-12) for name, said in theirs.items()}
    most = dict.fromkeys(apart, AGREEMENT) | {"gradient_norm": gradients}
    bad = [name for name, value in apart.items() if not value <= most[name]]
    if bad:
        lines = (
            f"{name}: {ours[name]:.7g} here, {theirs[name]:.7g} in torch ({most[name]:g} is allowed)"
            for name in bad
        )
        raise Disagreement(
            "the two sides differ by more than rounding does, so that they do not do the same work:"
            "\n  " + "\n  ".join(lines) + "\nLook for a version of transformers that computes"
            " differently, or for a change in larimar_jax/objective.py that"
            " larimar_jax/bench/torch_step.py does not follow."
        )
    return apart


def _spread(values: Sequence[float]) -> float:
    low, high = np.quantile(values, (0.25, 0.75))
    return float((high - low) / statistics.median(values))
