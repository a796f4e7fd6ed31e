"""Larimar-6B of the paper: BERT-large and GPT-J-6B, episodes of 5 facts (its config C1).

command   launch/local.sh configs/larimar_6b.py runs/larimar_6b
hardware  8 A100 with 80 GB; `larimar plan --config configs/larimar_6b.py` says what it needs of each
expected  perplexity 15.9 on WikiText-103 (the paper's; 10 epochs of 7.6 million chunks)
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="larimar_6b",
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
                    source="EleutherAI/gpt-j-6b",
                    family="gptj",
                    # Its table has room for the <PAD>, <BOS> and <EOS> that are added to 50,257.
                    vocab_size=50400,
                    width=4096,
                    depth=28,
                    heads=16,
                    mlp=16384,
                    rotary=64,
                    max_length=2048,
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
                kl=0.0,
                kl_cycles=0,
                free_bits=0.0,
                language=1.0,
                count_padding=False,
            ),
            data=dict(
                corpus="hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text",
                held_out=None,
                unit="chunk",
                episode=(5,),
                batch=32,
                encoder_tokens=64,
                decoder_tokens=64,
                vocabulary=0,
                workers=4,
                seed=0,
            ),
            train=dict(
                # 10 epochs of 7.6 million chunks, 160 a step.
                steps=475_000,
                optimizer="adamw",
                learning_rate=5e-6,
                warmup_steps=2000,
                decay="linear",
                weight_decay=0.0,
                clip_norm=1.0,
                accumulate=1,
                ema=0.0,
                frozen=(),
                start_from=None,
                products=None,
                mesh=(1, 8, 1),
                layout="zero3",
                memory_layout="replicated",
                on_bad_step="skip",
                spike=0.0,
                log_every=10,
                evaluate_every=1000,
                edits=16,
                checkpoint_every=1000,
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
