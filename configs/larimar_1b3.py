"""Larimar-1.3B of the paper: BERT-large and GPT-2 large, episodes of 16 facts (its config C3).

command   launch/local.sh configs/larimar_1b3.py runs/larimar_1b3
hardware  8 A100 with 80 GB; `larimar plan --config configs/larimar_1b3.py` shows what it needs of each
time      118,750 steps of 128 texts, the paper's 2 epochs of 7.6 million; `larimar plan` shows the hours
expected  perplexity 14.6 on WikiText-103 (the paper's)

The released recipe; docs/gpu.md has what still differs from it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    bert_large = dict(vocab_size=28996, width=1024, depth=24, heads=16, mlp=4096)
    # 50,257 tokens, and the <PAD>, <BOS> and <EOS> that are added to them.
    gpt2_large = dict(vocab_size=50260, width=1280, depth=36, heads=20, mlp=5120)
    return ConfigDict(
        dict(
            name="larimar_1b3",
            model=dict(
                encoder=dict(source="google-bert/bert-large-cased", family="bert", **bert_large),
                decoder=dict(source="openai-community/gpt2-large", family="gpt2", **gpt2_large),
            ),
            # σ_W is linear in vec M: 201 million of the 1,346 million parameters.
            memory=dict(variant="direct", slots=512, variance="memory"),
            data=dict(
                corpus="hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text",
                held_out="hf:Salesforce/wikitext,wikitext-103-raw-v1:validation#text",
                episode=(16,),
                batch=8,  # one for each of 8 devices
                workers=4,
            ),
            train=dict(
                steps=118_750,
                decay="linear",
                clip_norm=0.0,
                mesh=(1, 8, 1),
                layout="zero2",
                memory_layout="slots",
                on_bad_step="skip",
                evaluate_every=1000,
                edits=16,
                checkpoint_every=1000,
                keep=2,
                best="reconstruction",
                stall=900.0,
            ),
            editing=dict(scope_threshold=0.95),
        )
    )
