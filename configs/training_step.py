"""Towers of BERT-base's and GPT-2 small's size, random: what one training step costs.

command   python -m tests.comparisons training
hardware  2 CPU cores, 16 GB of memory
time      4 minutes
expected  about 10 s a step, at least as fast as torch; the memory takes 1 % of it
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    tower = dict(width=768, depth=12, heads=12, mlp=3072)
    return ConfigDict(
        dict(
            name="training_step",
            model=dict(
                encoder=dict(family="bert", vocab_size=28_996, **tower),
                decoder=dict(family="gpt2", vocab_size=50_260, **tower),
            ),
            memory=dict(variant="direct", slots=512),
            objective=dict(kl_cycles=0),
            data=dict(batch=1),
            train=dict(
                steps=1000,
                warmup_steps=100,
                weight_decay=0.01,
                evaluate_every=500,
                checkpoint_every=500,
                keep=1,
            ),
        )
    )
