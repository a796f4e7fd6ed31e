"""How many questions of each kind the shipped scope detector misses or lets through, by threshold.

    python tests/long/scope_rates.py DATA --limit 250

DATA is a folder with counterfact-edit.json and the files of KnowEdit; nothing was trained on them.
Each question is put to a memory of its own fact alone. Names, numbers and negation are changed by rule.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from larimar_jax import pipeline, scope
from larimar_jax.data import lexical

THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.7)
MENTIONS = ("I read about {} yesterday. My cat sleeps on the", "{} is nice. The capital of Peru is")


def questions(folder: Path, limit: int) -> dict[str, list[tuple[str, str]]]:
    """Return (written prompt, question) by kind: "paraphrases …" should pass, nothing else should."""
    kinds, draw = defaultdict(list), random.Random(0)

    def load(name):
        records = json.loads((folder / name).read_text(encoding="utf-8"))
        draw.shuffle(records)
        return records[:limit]

    records = load("counterfact-edit.json")
    for record in records:
        kinds["paraphrases counterfact"].append((record["prompt"], record["rephrase_prompt"]))
        kinds["neighbours counterfact"].append((record["prompt"], record["locality_prompt"]))
    for name in ("zsre-knowedit", "knowedit-wiki-counterfact", "knowedit-wiki-recent"):
        part = name.removeprefix("knowedit-").removesuffix("-knowedit")
        for record in load(f"{name}.json"):
            prompt, subject = record["prompt"], record["subject"]
            if "rephrase_prompt" in record:
                kinds[f"paraphrases {part}"].append((prompt, record["rephrase_prompt"]))
            for relation, items in record["locality"].items():
                kind = "negation" if relation == "Forgetfulness" else "other relations"
                kinds[f"{kind} {part}"] += [(prompt, item["prompt"]) for item in items]
            records.append(record)
    subjects = [record["subject"] for record in records]
    for record in records:
        prompt, subject = record["prompt"], record["subject"]
        if subject in prompt:
            other, year = draw.choice(subjects), str(draw.randint(1900, 2020))
            changed = prompt.replace(subject, f"{subject} {year}")
            kinds["another number"].append((changed, changed.replace(year, str(int(year) + 1))))
            kinds["another entity"].append((prompt, prompt.replace(subject, other)))
            kinds["in lower case"].append((prompt.lower(), prompt.replace(subject, other).lower()))
        negated = re.sub(r"\b(is|was|are|were|does|did)\b", r"\1 not", prompt, count=1)
        kinds["negation"] += [(prompt, negated)] if negated != prompt else []
        kinds["mentions"].append((prompt, draw.choice(MENTIONS).format(subject)))
    return {kind: draw.sample(pairs, min(limit, len(pairs))) for kind, pairs in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--limit", type=int, default=250)
    arguments = parser.parse_args()
    model = pipeline.load(arguments.model)
    kinds = questions(arguments.data, arguments.limit)
    pairs = [(p, scope.question(q, {p: p})) for pairs in kinds.values() for p, q in pairs]
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    embedding = dict(zip(texts, model.encode(texts).embedding, strict=True))
    thresholds = sorted({*THRESHOLDS, round(model.scope_threshold, 3)})
    print(f"{'percent in scope at':32}", *(f"{threshold:6.3f}" for threshold in thresholds))
    for kind, pairs in sorted(kinds.items()):
        pairs = [(p, scope.question(q, {p: p})) for p, q in pairs]
        matches = [
            scope.nearest_key(embedding[q][None], embedding[p][None], lexical.comparable([q], [p]))
            for p, q in pairs
        ]
        scores = np.concatenate([match.score for match in matches])
        shares = (f"{100 * np.mean(scores >= threshold):6.1f}" for threshold in thresholds)
        print(f"{kind:26} {len(pairs):5}", *shares)


if __name__ == "__main__":
    main()
