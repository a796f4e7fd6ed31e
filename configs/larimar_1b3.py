"""Larimar-1.3B of the paper: BERT-large and GPT-2 large, episodes of 16 facts (its config C3).

command   launch/local.sh configs/larimar_1b3.py runs/larimar_1b3
hardware  8 A100 with 80 GB; `larimar plan --config configs/larimar_1b3.py` says what it needs of each
expected  perplexity 14.6 on WikiText-103 (the paper's; 2 epochs of 7.6 million chunks)
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="larimar_1b3",
            model=dict(
                encoder=dict(
                    source="google-bert/bert-large-cased",
                    family="bert",
                    vocab_size=28996,
                    width=1024,
                    depth=24,
                    heads=16,
                    mlp=4096,
                    max_length=512,
                    type_vocab=2,
                    norm_eps=1e-12,
                    pooling="cls",
                    normalize=False,
                ),
                decoder=dict(
                    source="openai-community/gpt2-large",
                    family="gpt2",
                    # 50,257, and the <PAD>, <BOS> and <EOS> that are added to them.
                    vocab_size=50260,
                    width=1280,
                    depth=36,
                    heads=20,
                    mlp=5120,
                    max_length=1024,
                    norm_eps=1e-5,
                ),
                latent=768,
                slots_per_layer=1,
                tied_slots=True,
                lora=None,
                dtype="bfloat16",
                remat="layers",
            ),
            memory=dict(
                variant="direct",
                slots=512,
                initial="identity",
                noise=1e-6,
                initial_log_variance=0.0,
                variance="scalar",
                query="posterior",
                addressing="pinv",
                width=1e-3,
            ),
            objective=dict(
                reconstruction=1.0,
                autoencoding=1.0,
                kl=0.5,
                kl_cycles=10,
                free_bits=0.0,
                language=1.0,
                count_padding=False,
            ),
            data=dict(
                corpus="hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text",
                held_out=None,
                unit="chunk",
                episode=(16,),
                # 16 for each of 8 devices.
                batch=128,
                encoder_tokens=64,
                decoder_tokens=64,
                vocabulary=0,
                workers=4,
                seed=0,
            ),
            train=dict(
                # 2 epochs of 7.6 million chunks, 2,048 a step.
                steps=7400,
                optimizer="adamw",
                learning_rate=5e-5,
                warmup_steps=200,
                decay="linear",
                weight_decay=0.0,
                clip_norm=1.0,
                accumulate=4,
                ema=0.0,
                frozen=(),
                start_from=None,
                products=None,
                mesh=(1, 8, 1),
                layout="zero2",
                memory_layout="replicated",
                on_bad_step="skip",
                spike=0.0,
                log_every=10,
                evaluate_every=200,
                edits=16,
                checkpoint_every=200,
                keep=2,
                best="reconstruction",
                stall=900.0,
                seed=0,
            ),
            editing=dict(
                ridge=1e-2,
                query_noise=0.0,
                scope_threshold=0.95,
                key_features=None,
                answer_code=None,
            ),
        )
    )
