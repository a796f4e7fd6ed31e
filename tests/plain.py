"""The benchmarks of single edits once more: one case, one prompt, one answer at a time, in float64.

Nothing of `larimar_jax.bench` is used, and of the package only the towers: texts are encoded one by one,
the memory is solved by NumPy in float64, scope is a cosine in float64, and an answer's logits come from
one plain pass over prompt and answer, whose probabilities are float64. What `larimar bench` says of the
same records has to be this, whatever it batches, shares and caches.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larimar_jax import scope

SYSTEMS = ("base", "zero", "prompt", "lookup", "larimar", "open")


class Plain:
    """One fact at a time, written into an empty memory."""

    def __init__(self, model):
        self.model = model
        prepared, memory = model.prepared, model.memory
        self.before = np.float64(prepared.prior_memory)
        self.inverse = np.linalg.pinv(np.float64(prepared.reference_memory))
        self.ridge, self.noise = float(np.float32(memory.ridge)), float(memory.query_noise)
        self._encode = functools.cache(self._encode_one)

    def _encode_one(self, text, answer=None):
        found = self.model.encode([text], [answer])
        return np.float64(found.embedding[0]), np.float64(found.latent[0])

    def matrix(self, prompt, answer):
        """M of one fact: the minimum of ‖z − wM‖² + λ‖M − M₀‖² + μ‖M‖²."""
        weights = self._encode(prompt)[1] @ self.inverse
        value = self._encode(f"{prompt.strip()} {answer.strip()}", answer)[1]
        size = weights @ weights / len(weights)
        shrink = self.noise**2 * 2.0 ** round(math.log2(size))
        system = np.outer(weights, weights) + (self.ridge + shrink) * np.eye(len(weights))
        return np.linalg.solve(system, np.outer(weights, value) + self.ridge * self.before)

    def nearest(self, query, written):
        """(cosine, sentence) of the query's sentence that is nearest to a fact's text."""
        key = self._encode(*written)[0]
        found = []
        for sentence in scope.split_sentences([query])[0]:
            other = self._encode(sentence)[0]
            found.append((other @ key / np.linalg.norm(other) / np.linalg.norm(key), sentence))
        return max(found, key=lambda one: one[0])

    def condition(self, matrix, query, written):
        """What the decoder is given of a query."""
        read = self._encode(self.nearest(query, written)[1])[1] @ self.inverse @ matrix
        return self.model.condition(np.float32(read)[None])

    def log_probabilities(self, prompt, answer, condition=None):
        """float64 [n, V] of what follows at each of the answer's n tokens, and the tokens."""
        tokenizer = self.model.decoder_tokenizer
        begin = [tokenizer.bos, *tokenizer.ids(prompt.rstrip())]
        told = tokenizer.following(answer.strip())
        ids = [*begin, *told]
        padded = np.zeros((1, -(-len(ids) // 8) * 8), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.float64(_logits(self.model.graph, self.model.state, padded, condition)[0])
        rows = logits[len(begin) - 1 : len(ids) - 1]
        if condition is not None and condition.evidence is not None:
            tokens, gain = (np.asarray(a[0]) for a in (condition.evidence.tokens, condition.evidence.logit_gain))
            for place in range(min(len(told), len(tokens))):
                for token, more in zip(tokens[place], gain[place], strict=True):
                    rows[place, token] += more
        rows = rows - rows.max(axis=1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), told

    def loss(self, prompt, answer, condition=None):
        """ℓ(p, t) in nats a token."""
        found, told = self.log_probabilities(prompt, answer, condition)
        return -sum(row[token] for row, token in zip(found, told, strict=True)) / len(told)

    def hits(self, prompt, answer, condition=None):
        """Whether each of the answer's tokens is the likeliest."""
        found, told = self.log_probabilities(prompt, answer, condition)
        return [float(row[token] >= row.max()) for row, token in zip(found, told, strict=True)]

    def under_every_system(self, measure, fact, prompt, asked, scoped, outside):
        """{system: measure(prompt, condition)}; asked: of the memory, scoped: of the scope detector."""
        text = f"{fact[0].strip()} {fact[1].strip()}".rstrip(".")
        # The editing literature's scope decision sees prompts alone, the authors' code the written fact.
        key = (fact[0],) if outside == "base" else (f"{fact[0].strip()} {fact[1].strip()}", fact[1])
        inside = self.nearest(scoped, key)[0] >= self.model.scope_threshold
        found = {
            "base": measure(prompt, None),
            "zero": measure(prompt, self.model.zero(1)),
            "prompt": measure(f"{text}. {prompt}", None),
            "open": measure(prompt, self.condition(self.matrix(*fact), asked, key)),
        }
        found["lookup"] = found["prompt"] if inside else found[outside]
        found["larimar"] = found["open"] if inside else found[outside]
        return found

    def counterfact(self, record, mode):
        """{system: {kind: [(ℓ(new), ℓ(true)) of each prompt]}} of one record."""
        fact, asked = (record.prompt, record.target_new), [("edit", record.prompt, record.target_true)]
        for text in record.paraphrases:
            text = text.split(". ")[-1] if mode == "released" else text
            asked.append(("paraphrase", text, record.target_true))
        for text, true in zip(record.neighbourhood, record.neighbourhood_targets, strict=True):
            asked.append(("neighbourhood", text, true))
        kinds = ("edit", "paraphrase", "neighbourhood")
        table = {system: {kind: [] for kind in kinds} for system in SYSTEMS}
        for kind, prompt, true in asked:
            pair = []
            for answer in (record.target_new, true):
                scoped = prompt if mode == "rome" else f"{prompt} {answer}"
                outside = "base" if mode == "rome" else "zero"

                def loss(text, condition, answer=answer):
                    return self.loss(text, answer, condition)

                pair.append(self.under_every_system(loss, fact, prompt, prompt, scoped, outside))
            for system in SYSTEMS:
                table[system][kind].append([side[system] for side in pair])
        return table

    def zsre(self, record, mode):
        """{system: {kind: [accuracy of each prompt]}} of one record."""
        fact, asked = (record.prompt, record.target_new), [("rewrite", record.prompt, record.target_new)]
        asked += [("paraphrase", text, record.target_new) for text in record.paraphrases]
        near = zip(record.neighbourhood, record.neighbourhood_targets, strict=True)
        asked += [("neighbourhood", *pair) for pair in near]
        kinds = ("rewrite", "paraphrase", "neighbourhood")
        table = {system: {kind: [] for kind in kinds} for system in SYSTEMS}
        tokenizer = self.model.decoder_tokenizer
        for kind, prompt, target in asked:

            def hits(text, condition, target=target):
                return self.hits(text, target, condition)

            if mode == "rome":
                found = self.under_every_system(hits, fact, prompt, prompt, prompt, "base")
                for system in SYSTEMS:
                    table[system][kind].append(sum(found[system]) / len(found[system]))
                continue
            ids, right = tokenizer.following(target.strip()), {system: 0.0 for system in SYSTEMS}
            for place in range(len(ids)):
                query = f"{prompt} {tokenizer.decode(ids[:place]).strip()}".strip()
                found = self.under_every_system(hits, fact, prompt, query, query, "zero")
                for system in SYSTEMS:
                    right[system] += found[system][place] / len(ids)
            for system in SYSTEMS:
                table[system][kind].append(right[system])
        return table


def scores(tables, system):
    """S and M of each kind and the score, of CounterFact's tables of several records, in percent."""
    result, means = {}, []
    for kind in ("edit", "paraphrase", "neighbourhood"):
        success, magnitude = [], []
        for table in tables:
            pairs = table[system][kind]
            if not pairs:
                continue
            sign = -1 if kind == "neighbourhood" else 1
            success.append(sum(sign * true > sign * new for new, true in pairs) / len(pairs))
            apart = [sign * (math.exp(-new) - math.exp(-true)) for new, true in pairs]
            magnitude.append(sum(apart) / len(apart))
        result[kind] = {
            name: 100 * sum(values) / len(values) for name, values in (("S", success), ("M", magnitude))
        }
        means.append(result[kind]["S"])
    result["score"] = 3 / sum(1 / mean for mean in means) if min(means) > 0 else 0.0
    return result


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, tokens, condition):
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(jnp.asarray(tokens), condition)
    return model.decoder.logits(hidden)
