"""How wide the codes of answers' tokens have to be, so that a full memory is read in other words.

    python tests/long/widths.py --data counterfact-train.json

Writes facts of CounterFact into one memory of the model and reads it by their prompts and by a
paraphrase of each that is not written, with codes of several widths. A line for each: in how many cases
the first token of the right answer gains more than any other, and in how many it leads by 8 nats, before
the language model says its share. Two minutes for 1,000 facts.
"""

import argparse
import dataclasses

import numpy as np

from larimar_jax import answer_code
from larimar_jax.data import edit_records
from larimar_jax.pipeline import load

_LEAD, _ROWS = 8.0, 250


def leads(model, config, shares, codes, right):
    """By how many nats each row's right token leads all others at its first place."""
    found = []
    for start in range(0, len(shares), _ROWS):
        rows = shares[start : start + _ROWS]
        readout = np.asarray(rows @ codes, np.float32)
        told = answer_code.read(config, readout, model.model.decoder.config.vocab_size,
                             np.ones(len(rows), bool))
        tokens, gain = (np.asarray(array)[:, 0] for array in (told.tokens, told.logit_gain))
        mine = tokens == right[start : start + _ROWS, None]
        gained = np.where(mine, gain, 0.0).max(axis=1)
        found.append(gained - np.where(mine, 0.0, gain).max(axis=1))
    return np.concatenate(found)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="CounterFact; the training file, to choose by")
    parser.add_argument("--model", default="smol")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 128, 192, 256, 384])
    told = parser.parse_args()
    model = load(told.model)
    cases = edit_records.load(told.data)[: told.facts]
    keys, queries = (
        np.concatenate([
            np.asarray(model.memory.address(model.prepared, model.encode(texts[i : i + _ROWS]).latent))
            for i in range(0, len(texts), _ROWS)
        ]).astype(np.float64)
        for texts in ([c.prompt for c in cases], [c.paraphrases[0] for c in cases])
    )
    tokens, mask = model.decoder_tokenizer.encode([" " + c.target_new for c in cases])
    answers = [row[there].tolist() for row, there in zip(tokens, mask, strict=True)]
    right = np.array([answer[0] for answer in answers])
    # What each written fact contributes to a read: k (K + λI)⁻¹, without M₀, which spells nothing.
    gram = keys @ keys.T + model.memory.ridge * np.eye(len(keys))
    shares = {name: np.linalg.solve(gram, keys @ rows.T).T for name, rows in
              (("prompts", keys), ("paraphrases", queries))}
    print(f"{len(cases)} facts in {keys.shape[1]} slots")
    for width in told.widths:
        config = dataclasses.replace(model.config.editing.answer_code, width=width, limit=1e4)
        packed = answer_code.pack(config, answers, model.decoder_tokenizer.eos)
        codes = np.asarray(answer_code.spell(config, packed), np.float64)
        line = []
        for name, each in shares.items():
            lead = leads(model, config, each, codes, right)
            line.append(
                f"{name}: first {np.mean(lead > 0):.1%}, by {_LEAD:g} nats {np.mean(lead > _LEAD):.1%}, "
                f"another by as much {np.mean(lead < -_LEAD):.1%}"
            )
        print(f"width {width}: " + "; ".join(line), flush=True)


if __name__ == "__main__":
    main()
