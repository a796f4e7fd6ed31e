"""Speed of greedy decoding by batch size, beside Hugging Face `generate` on the same weights.

The comparison needs torch and transformers (`pip install -e '.[compare]'`), and nothing else
of the project does. Both sides decode the same random prompts to the same number of tokens, in
float32, in turns within one process, so that a machine's moods hit both.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from larimar_jax import decoders, generate, weights
from larimar_jax.bench.runner import Record
from larimar_jax.weights import fill


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `larimar bench generation`."""
    parser.add_argument("--decoder", default="smollm2", help="its name, folder, GGUF or hub id")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="rows (1 32)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (64)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each (5)")
    parser.add_argument("--alone", action="store_true", help="without Hugging Face beside it")


def experiment(args: argparse.Namespace) -> "Generation":
    """The experiment of a parsed command line.

    Raises:
        ModuleNotFoundError: torch or transformers is missing, and --alone is not given.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing and not args.alone:
        raise ModuleNotFoundError(
            f"the comparison needs {' and '.join(missing)}: pip install -e '.[compare]',"
            " or time this project alone with --alone"
        )
    return Generation(
        args.decoder, args.batch, args.prompt, args.tokens, args.repeats, alone=args.alone
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing of both sides."""

    case_id: str
    batch: int
    repeat: int


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a batch size."""
    results = summary["results"]
    table = Table("rows", "tokens/s", "Hugging Face", "ratio", "same tokens")
    for batch, found in results.items():
        speed = found["tokens_per_second"]
        table.add_row(
            batch,
            f"{speed['larimar']:.1f}",
            f"{speed['huggingface']:.1f}" if "ratio" in found else "–",
            f"{found['ratio']:.2f}" if "ratio" in found else "–",
            f"{found['same_tokens']:.1%}" if "ratio" in found else "–",
        )
    return [table]


class Generation:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "generation"
    tables = staticmethod(tables)
    chunk = 1

    def __init__(
        self,
        decoder: str,
        batches: Sequence[int],
        prompt: int,
        tokens: int,
        repeats: int,
        *,
        alone: bool,
    ):
        self._source, self._tokens, self._prompt, self._alone = decoder, tokens, prompt, alone
        self.cases = [
            Case(f"{batch}x{repeat}", batch, repeat)
            for batch in batches
            for repeat in range(repeats)
        ]
        self.settings: Mapping[str, Any] = {
            "decoder": decoder,
            "batches": list(batches),
            "prompt": prompt,
            "tokens": tokens,
            "repeats": repeats,
            "alone": alone,
            "dtype": "float32",
            "seed": 0,
        }
        self._ours: _Ours | None = None
        self._theirs = None
        self._warm: set[int] = set()

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Seconds of each side; a batch size's first timing comes after an untimed run."""
        if self._ours is None:
            self._ours = _Ours(self._source)
            self._theirs = None if self._alone else _Theirs(self._ours)
        sides = {"larimar": self._ours} | ({} if self._alone else {"huggingface": self._theirs})
        records = []
        for case in cases:
            draw = np.random.default_rng(case.repeat)
            vocabulary = self._ours.model.decoder.config.vocab_size
            ids = draw.integers(vocabulary // 50, vocabulary, (case.batch, self._prompt))
            if case.batch not in self._warm:
                self._warm.add(case.batch)
                for side in sides.values():
                    side.decode(ids, self._tokens)
            seconds, said = {}, {}
            for name, side in sides.items():
                begin = time.perf_counter()
                said[name] = side.decode(ids, self._tokens)
                seconds[name] = time.perf_counter() - begin
            record = {"case_id": case.case_id, "batch": case.batch, "seconds": seconds}
            if not self._alone:
                same = said["larimar"] == said["huggingface"]
                record["same_tokens"] = float(np.mean(same))
            records.append(record)
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Median tokens per second of each side and batch size, and the ratio of the medians."""
        result = {}
        for batch in dict.fromkeys(record["batch"] for record in records):
            rows = [record for record in records if record["batch"] == batch]
            speed = {
                side: batch * self._tokens / statistics.median(r["seconds"][side] for r in rows)
                for side in rows[0]["seconds"]
            }
            result[str(batch)] = {"tokens_per_second": speed}
            if not self._alone:
                result[str(batch)]["ratio"] = speed["larimar"] / speed["huggingface"]
                result[str(batch)]["same_tokens"] = min(r["same_tokens"] for r in rows)
        return result


class _Ours:
    """`larimar_jax.generate`, from token ids."""

    def __init__(self, source: str):
        self.family = source
        decoder, self.tokenizer = weights.load_decoder(source)
        self.model = decoder

    def decode(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Greedy tokens [rows, tokens], never stopping."""
        return generate.continue_ids(self.model, ids.tolist(), tokens)


class _Theirs:
    """transformers' `generate` over the very same numbers."""

    def __init__(self, ours: _Ours):
        import torch
        import transformers

        decoder = ours.model.decoder
        family = next(f for f in decoders.families().values() if isinstance(decoder, f.MODEL))
        said = family.to_huggingface(decoder.config)
        config = transformers.AutoConfig.for_model(**said)
        self._torch, self._model = torch, transformers.AutoModelForCausalLM.from_config(config)
        state = {
            name: torch.from_numpy(np.array(tensor))
            for name, tensor in fill.to_source(decoder, family.KEYS)
        }
        self._model.load_state_dict(state, strict=False)  # a tied head is not in it
        self._model.tie_weights()
        self._model.eval()
        self._model.generation_config.eos_token_id = None  # both sides go on to the last token

    def decode(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Greedy tokens [rows, tokens], never stopping."""
        given = self._torch.from_numpy(ids)
        with self._torch.no_grad():
            found = self._model.generate(
                given,
                attention_mask=self._torch.ones_like(given),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return found[:, ids.shape[1] :].numpy()
