"""Larimar-6B of the paper: BERT-large and GPT-J-6B, episodes of 5 facts (its config C1).

command   launch/local.sh configs/larimar_6b.py runs/larimar_6b
hardware  8 A100 with 80 GB; `larimar plan --config configs/larimar_6b.py` shows what it needs of each
time      475,000 steps of 160 texts, 10 epochs of the paper's 7.6 million (§5; Appendix B: 5); `larimar
          plan` shows the hours
expected  perplexity 15.9 on WikiText-103 (the paper's)

No recipe of it is released; docs/gpu.md has what the paper leaves open.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    bert_large = dict(vocab_size=28996, width=1024, depth=24, heads=16, mlp=4096)
    # 50,257 tokens and 143 without a use, of which three become <PAD>, <BOS> and <EOS>.
    gptj = dict(vocab_size=50400, width=4096, depth=28, heads=16, mlp=16384, rotary=64)
    gptj |= dict(max_length=2048, norm_eps=1e-5)
    return ConfigDict(
        dict(
            name="larimar_6b",
            model=dict(
                encoder=dict(source="google-bert/bert-large-cased", family="bert", **bert_large),
                decoder=dict(source="EleutherAI/gpt-j-6b", family="gptj", **gptj),
                dtype="bfloat16",
            ),
            memory=dict(variant="direct", slots=512),
            objective=dict(kl=0.0, kl_cycles=0),
            data=dict(
                corpus="hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text",
                held_out="hf:Salesforce/wikitext,wikitext-103-raw-v1:validation#text",
                episode=(5,),
                batch=32,
                workers=4,
            ),
            train=dict(
                steps=475_000,
                learning_rate=5e-6,
                decay="linear",
                clip_norm=0.0,
                mesh=(1, 8, 1),
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
