"""The benchmarks of single edits once more: one case, one prompt, one answer at a time, in float64.

Nothing of `larimar_jax.bench` is used, and of the package only the towers: texts are encoded one by
one, the memory is solved by NumPy in float64, scope is a cosine in float64, and an answer's logits
come from one plain pass over prompt and answer, whose probabilities are float64. The rows of `larimar
bench` on the same records have to be these, whatever it batches, shares and caches.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larimar_jax import scope

SYSTEMS = ("base", "zero", "prompt", "lookup", "verbatim", "larimar", "open")
# −ln p of a token that verbatim lookup does not force.
FLOOR = 100.0


def under_every_system(measure, prompt, zero, read, fact, nearest, forced, inside, outside="base"):
    """Return {system: measure(text, condition)}.

    zero, read: conditions. fact, nearest: texts of the right fact and of the nearest one. forced: the
    value of verbatim lookup. inside: the decision about the scope. outside: the system beyond it.
    """
    values = {
        "base": measure(prompt, None),
        "zero": measure(prompt, zero),
        "prompt": measure(f"{fact}. {prompt}", None),
        "open": measure(prompt, read),
    }
    values["lookup"] = measure(f"{nearest}. {prompt}", None) if inside else values[outside]
    values["verbatim"] = forced if inside else values[outside]
    values["larimar"] = values["open"] if inside else values[outside]
    return values


class Plain:
    """One fact at a time, written into an empty memory."""

    def __init__(self, model):
        self.model = model
        prepared, memory = model.prepared, model.memory
        self.before = np.float64(prepared.prior_memory)
        self.inverse = np.linalg.pinv(np.float64(prepared.reference_memory))
        self.ridge, self.noise = float(np.float32(memory.ridge)), float(memory.query_noise)
        self._encode = functools.cache(self._encode_text)
        self.following = model.decoder_tokenizer.following

    def _encode_text(self, text, answer=None):
        encodings = self.model.encode([text], [answer])
        return np.float64(encodings.embedding[0]), np.float64(encodings.latent[0])

    def matrix(self, prompt, answer):
        """M of one fact: the minimum of ‖z − wM‖² + λ‖M − M₀‖² + μ‖M‖²."""
        weights = self._encode(prompt)[1] @ self.inverse
        value = self._encode(f"{prompt.strip()} {answer.strip()}", answer)[1]
        size = weights @ weights / len(weights)
        shrink = self.noise**2 * 2.0 ** round(math.log2(size))
        system = np.outer(weights, weights) + (self.ridge + shrink) * np.eye(len(weights))
        return np.linalg.solve(system, np.outer(weights, value) + self.ridge * self.before)

    def cosine(self, query, written):
        """The cosine of a query's question and a fact's text."""
        key, vector = self._encode(*written)[0], self._encode(scope.question(query))[0]
        return vector @ key / np.linalg.norm(vector) / np.linalg.norm(key)

    def condition(self, matrix, query):
        """What the decoder is handed for a query."""
        read = self._encode(scope.question(query))[1] @ self.inverse @ matrix
        return self.model.condition(np.float32(read)[None])

    def log_probabilities(self, prompt, answer, condition=None):
        """float64 [n, V] of what follows at each of the answer's n tokens, and the tokens."""
        tokenizer = self.model.decoder_tokenizer
        begin = [tokenizer.bos, *tokenizer.ids(prompt.rstrip())]
        target = self.following(answer.strip())
        ids = [*begin, *target]
        padded = np.zeros((1, -(-len(ids) // 8) * 8), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.float64(_logits(self.model.graph, self.model.state, padded, condition)[0])
        rows = logits[len(begin) - 1 : len(ids) - 1]
        if condition is not None and condition.evidence is not None:
            evidence = condition.evidence
            tokens, gain = (np.asarray(a[0]) for a in (evidence.tokens, evidence.logit_gain))
            for place in range(min(len(target), len(tokens))):
                for token, more in zip(tokens[place], gain[place], strict=True):
                    rows[place, token] += more
        rows = rows - rows.max(axis=1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), target

    def loss(self, prompt, answer, condition=None):
        """ℓ(p, t) in nats a token."""
        rows, target = self.log_probabilities(prompt, answer, condition)
        return -sum(row[token] for row, token in zip(rows, target, strict=True)) / len(target)

    def hits(self, prompt, answer, condition=None):
        """Whether each of the answer's tokens is the likeliest."""
        rows, target = self.log_probabilities(prompt, answer, condition)
        return [float(row[token] >= row.max()) for row, token in zip(rows, target, strict=True)]

    def forced(self, answer, target):
        """Whether each of a target's tokens is the one that verbatim lookup forces there."""
        answer, target = self.following(answer.strip()), self.following(target.strip())
        return [float(n < len(answer) and answer[n] == target[n]) for n in range(len(target))]

    def under_every_system(self, measure, forced, fact, prompt, query, scoped, outside):
        """{system: measure(prompt, condition)}; query: to the memory, scoped: to the scope detector."""
        text = f"{fact[0].strip()} {fact[1].strip()}".rstrip(".")
        # The editing literature's scope decision sees prompts alone, the authors' code the written fact.
        written = f"{fact[0].strip()} {fact[1].strip()}"
        key = (fact[0],) if outside == "base" else (written, fact[1])
        inside = self.cosine(scoped, key) >= self.model.scope_threshold
        read = self.condition(self.matrix(*fact), query)
        return under_every_system(
            measure, prompt, self.model.zero(1), read, text, text, forced, inside, outside
        )

    def counterfact(self, kind, prompt, pair, fact, mode):
        """{system: (ℓ(new), ℓ(true))} of a prompt."""
        sides, outside = [], "base" if mode == "rome" else "zero"
        for answer in pair:
            hits = self.forced(fact[1], answer)
            sides.append(
                self.under_every_system(
                    lambda text, condition, answer=answer: self.loss(text, answer, condition),
                    FLOOR * (1 - sum(hits) / len(hits)),
                    fact,
                    prompt,
                    prompt,
                    prompt if mode == "rome" else f"{prompt} {answer}",
                    outside,
                )
            )
        return {system: [side[system] for side in sides] for system in SYSTEMS}

    def zsre(self, prompt, target, fact, mode):
        """{system: accuracy} of a prompt."""

        def measured(query, outside):
            forced = self.forced(fact[1], target)
            measure = functools.partial(_swapped, self.hits, target)
            return self.under_every_system(measure, forced, fact, prompt, query, query, outside)

        if mode == "rome":
            return {s: sum(hits) / len(hits) for s, hits in measured(prompt, "base").items()}
        ids, tokenizer = self.following(target.strip()), self.model.decoder_tokenizer
        right = dict.fromkeys(SYSTEMS, 0.0)
        for place in range(len(ids)):
            query = f"{prompt} {tokenizer.decode(ids[:place]).strip()}".strip()
            for system, hits in measured(query, "zero").items():
                right[system] += hits[place] / len(ids)
        return right


def _swapped(hits, target, text, condition):
    return hits(text, target, condition)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, tokens, condition):
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(jnp.asarray(tokens), condition)
    return model.decoder.logits(hidden)
