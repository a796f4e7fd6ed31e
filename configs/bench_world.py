"""The paper's experiments in small: its interface alone, from scratch on the synthetic world.

command   larimar reproduce --config=configs/bench_world.py --out runs/world_tables --no-texts
hardware  2 CPU cores
time      6 minutes
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    # For a memory of many facts that is asked in words that were not written.
    other_words = ["editing.query_noise=1.0"]
    return ConfigDict(
        dict(
            name="bench_world",
            model="world",
            data=dict(easy="world:4096", hard="world-hard:4096", open="world-open:300"),
            runs=dict(
                # Table 2, with one and two more wordings written, and with wordings that are hard
                counterfact=dict(
                    bench="counterfact",
                    data="easy",
                    options=dict(limit=1000),
                    note=(
                        "As in Table 2, every edit succeeds where the base LM is at chance. Unlike "
                        "there, other wordings succeed as well, and neighbours are the base LM's: the "
                        "scope detector lets none through."
                    ),
                ),
                counterfact_1=dict(
                    bench="counterfact",
                    data="easy",
                    options=dict(limit=300, rephrasings=1),
                    note="More wordings raise M of paraphrases, as in Table 2.",
                ),
                counterfact_2=dict(
                    bench="counterfact",
                    data="easy",
                    options=dict(limit=300, rephrasings=2),
                    note="More wordings raise M of paraphrases, as in Table 2.",
                ),
                counterfact_hard=dict(
                    bench="counterfact",
                    data="hard",
                    options=dict(limit=500),
                    note=(
                        "Wordings that were never seen with the relation's name do as well as those "
                        "that were."
                    ),
                ),
                # What is decoded after an edit
                free_generation=dict(
                    bench="free_generation",
                    data="easy",
                    options=dict(limit=300),
                    note="Greedy decoding after an edit: answers are said whole.",
                ),
                free_generation_open=dict(
                    bench="free_generation",
                    data="open",
                    note=(
                        "Random names, numbers and emblems of two or three words, none of which is in "
                        "the training text: after an edit all are said whole."
                    ),
                ),
                # Fig. 2a, up to 8 K
                batch=dict(
                    bench="batch",
                    data="easy",
                    options=dict(facts=[1, 32, 64, 128, 256, 512, 1024]),
                    note=(
                        "The shape of Fig. 2a: near perfect to N = K, then a slow fall; at 2 K it is "
                        "above the paper's. K is 128."
                    ),
                ),
                # Table 3: 200 facts in 5 wordings, in the model's 128 slots and in one for each edit
                stream=dict(
                    bench="stream",
                    data="easy",
                    options=dict(edits=1000, wordings=5, unwritten=100, every=250, queries=100),
                    note=(
                        "A thousand edits in 128 slots: half of what is written is lost. Table 3 gives "
                        "every edit a slot."
                    ),
                ),
                stream_slot_each=dict(
                    bench="stream",
                    data="easy",
                    options=dict(
                        edits=1000,
                        wordings=5,
                        unwritten=100,
                        every=250,
                        queries=100,
                        keys="gaussian",
                    ),
                    note=(
                        "With a slot for every edit's prompt, known beforehand, and Gaussian keys: "
                        "retention is that of Table 3."
                    ),
                ),
                # Fig. 2b
                stream_3000=dict(
                    bench="stream",
                    data="easy",
                    options=dict(
                        edits=3000,
                        wordings=3,
                        unwritten=0,
                        every=300,
                        queries=64,
                        retained=200,
                        keys="gaussian",
                    ),
                    note=(
                        "As in Fig. 2b, held-out rephrasings are answered at a level rate all along the "
                        "stream."
                    ),
                ),
                # Table 4
                forget=dict(
                    bench="forget",
                    data="easy",
                    options=dict(facts=[128, 256], forget=16),
                    note=(
                        "The shape of Table 4: what is forgotten is read as by a memory that never had "
                        "it, and the others stay. At 2 K the others were not whole before."
                    ),
                ),
                forget_slot_each=dict(
                    bench="forget",
                    data="easy",
                    options=dict(facts=[128, 256], forget=16, keys="gaussian"),
                    note=(
                        "With a slot for every fact the certificates are small: the keys are one-hot."
                    ),
                ),
                # Table 5, where the memory taught the answers
                attack=dict(
                    bench="attack",
                    data="easy",
                    options=dict(taught=True, overrides=other_words),
                    note=(
                        "Table 5 attacks facts that the language model knows. This one knows none, so a "
                        "first edit teaches the answer that the second takes away. Before the second "
                        "the attack draws most answers, after it no more than the base LM has by "
                        "chance. (editing.query_noise=1.0: with none, questions in other words read "
                        "little from a memory of fifty facts.)"
                    ),
                ),
                # Table 6
                longcontext=dict(
                    bench="longcontext",
                    data="easy",
                    options=dict(facts=[64, 96, 128, 256, 1024], queries=64, room=24),
                    note=(
                        "As in Table 6, recall does not fall with the number of facts. Unlike there, "
                        "other wordings read a blend of their chunk."
                    ),
                ),
                # Table 14
                rephrase=dict(
                    bench="rephrase",
                    data="easy",
                    note=(
                        "As in Table 14, recall falls with the number of facts under linear keys and "
                        "hardly under Gaussian ones. The fall is steeper here: a hundred facts in two "
                        "wordings are near N = K, where least squares is at its worst (§3)."
                    ),
                ),
                rephrase_noise=dict(
                    bench="rephrase",
                    data="easy",
                    options=dict(overrides=other_words),
                    note=(
                        "The same memory with editing.query_noise=1.0, which expects questions in other "
                        "words: the model's keys now fall as in Table 14."
                    ),
                ),
                # Fig. 6
                noise=dict(
                    bench="noise",
                    data="easy",
                    options=dict(tokens=8),
                    note="The shape of Fig. 6: success holds for small σ_W and falls for large.",
                ),
                # Section 6 of the paper
                scope=dict(
                    bench="scope",
                    data="easy",
                    options=dict(limit=500),
                    note=(
                        "The detector on the model's own encodings (ISD) against the encodings as "
                        "they are (ESD). It was fitted on names of the training text."
                    ),
                ),
                scope_hard=dict(
                    bench="scope",
                    data="hard",
                    options=dict(limit=500),
                    note=(
                        "Wordings that were never seen with the relation's name are recognised as "
                        "well."
                    ),
                ),
                perplexity=dict(
                    bench="perplexity",
                    data="easy",
                    options=dict(facts=128, corpus="world", prompt_words=3, words=6, tokens=8),
                    note=(
                        "Text that no fact is about is left alone: nothing of it is in scope. The "
                        "base LM never saw a text without a slot in training, so z = 0 is the better "
                        "language model."
                    ),
                ),
                # Table 1
                speed=dict(
                    bench="speed",
                    data="easy",
                    options=dict(scored=10),
                    note=(
                        "Other models and another machine than Table 1: what compares is the order, "
                        "milliseconds for a write."
                    ),
                ),
            ),
        )
    )
