"""How wide the codes of answers' tokens have to be, so that a full memory is read by unseen wordings.

    python tests/long/widths.py --data counterfact-train.json

Writes facts of CounterFact into one memory of the model and reads it by their prompts and by a
paraphrase of each that is not written, with codes of several widths. A line for each: in how many cases
the first token of the right answer gains more than any other, and in how many it leads by 8 nats, before
the language model adds its share. Two minutes for 1,000 facts.
"""

import argparse
import dataclasses

import numpy as np

from larimar_jax import latent_layout
from larimar_jax.data import edit_records
from larimar_jax.pipeline import load

_LEAD, _ROWS = 8.0, 250


def leads(model, config, shares, codes, right):
    """Return by how many nats each row's right token leads all others at its first place."""
    vocab_size, differences = model.model.decoder.config.vocab_size, []
    for start in range(0, len(shares), _ROWS):
        readout = np.float32(shares[start : start + _ROWS] @ codes)
        active = np.ones(len(readout), bool)
        evidence = latent_layout.decode_answers(config, readout, vocab_size, active)
        tokens, gain = (np.asarray(x)[:, 0] for x in (evidence.tokens, evidence.logit_gain))
        is_right = tokens == right[start : start + _ROWS, None]
        gains = (np.where(mask, gain, 0.0).max(axis=1) for mask in (is_right, ~is_right))
        differences.append(np.subtract(*gains))
    return np.concatenate(differences)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", required=True, help="CounterFact; the training file, to choose by"
    )
    parser.add_argument("--model", default="smol")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 128, 192, 256, 384])
    options = parser.parse_args()
    model = load(options.model)
    cases = edit_records.load(options.data, options.facts)

    def weights(texts):
        batches = (model.encode(texts[i : i + _ROWS]) for i in range(0, len(texts), _ROWS))
        rows = [model.memory.address(model.prepared, batch.latent) for batch in batches]
        return np.float64(np.concatenate(rows))

    keys = weights([case.prompt for case in cases])
    queries = {"prompts": keys, "paraphrases": weights([case.paraphrases[0] for case in cases])}
    tokens, mask = model.decoder_tokenizer.encode([" " + case.target_new for case in cases])
    answers = [row[present].tolist() for row, present in zip(tokens, mask, strict=True)]
    right = np.array([answer[0] for answer in answers])
    # What each written fact contributes to a read: k (K + λI)⁻¹, without M₀, which holds no code.
    gram = keys @ keys.T + model.memory.ridge * np.eye(len(keys))
    shares = {name: np.linalg.solve(gram, keys @ rows.T).T for name, rows in queries.items()}
    print(f"{len(cases)} facts in {keys.shape[1]} slots")
    for width in options.widths:
        config = dataclasses.replace(model.config.editing.answer_code, width=width, limit=1e4)
        packed = latent_layout.pack_answers(config, answers, model.decoder_tokenizer.eos)
        codes = np.float64(latent_layout.encode_answers(config, packed))
        for name, rows in shares.items():
            lead = leads(model, config, rows, codes, right)
            print(
                f"width {width}, {name}: first {np.mean(lead > 0):.1%}, by {_LEAD:g} nats "
                f"{np.mean(lead > _LEAD):.1%}, another by as much {np.mean(lead < -_LEAD):.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
