"""The paper's experiments on the shipped model, with every control beside it, and one report.

command   larimar reproduce --config=configs/bench_paper.py --out runs/paper \
              --set data.counterfact=counterfact-edit.json data.zsre=zsre-knowedit.json
hardware  2 CPU cores; pip install -e ".[cities]" for the facts of long context
time      an hour
expected  CounterFact: edit S 100.0, score 86.3; stream of 1,000 edits: retention 97.4; docs/results.md
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="bench_paper",
            model="smol",
            # CounterFact in either schema (at least 2,048 records) and ZsRE in KnowEdit's.
            data=dict(counterfact="", zsre=""),
            runs=dict(
                # Table 2, and with one and two rephrasings written
                counterfact=dict(bench="counterfact", data="counterfact", options=dict(limit=1000)),
                counterfact_1=dict(
                    bench="counterfact", data="counterfact", options=dict(limit=100, rephrasings=1)
                ),
                counterfact_2=dict(
                    bench="counterfact", data="counterfact", options=dict(limit=100, rephrasings=2)
                ),
                # Table 2 as the authors' code measures it
                counterfact_released=dict(
                    bench="counterfact",
                    data="counterfact",
                    options=dict(limit=100, mode="released"),
                ),
                # Table 2 through the paper's interface alone: no features, nothing spelled
                counterfact_interface=dict(
                    bench="counterfact",
                    data="counterfact",
                    options=dict(
                        limit=100,
                        overrides=["editing.key_features=null", "editing.answer_code=null"],
                    ),
                ),
                # What is decoded after an edit
                free_generation=dict(
                    bench="free_generation", data="counterfact", options=dict(limit=100)
                ),
                # Tables 12 and 13, and as the authors' code measures them
                zsre=dict(bench="zsre", data="zsre", options=dict(limit=1000)),
                zsre_released=dict(
                    bench="zsre", data="zsre", options=dict(limit=100, mode="released")
                ),
                # Table 3
                stream=dict(
                    bench="stream",
                    data="zsre",
                    options=dict(edits=1000, unwritten=0, every=250, queries=100),
                ),
                # Fig. 2b
                stream_3000=dict(
                    bench="stream",
                    data="zsre",
                    options=dict(
                        edits=3000, wordings=4, unwritten=100, every=50, queries=16, retained=200
                    ),
                ),
                # Fig. 2a, and with the paper's 512 slots
                batch=dict(
                    bench="batch",
                    data="counterfact",
                    options=dict(facts=[1, 64, 256, 512, 1024, 2048]),
                ),
                batch_512_slots=dict(
                    bench="batch",
                    data="counterfact",
                    options=dict(facts=[512, 1024], overrides=["editing.key_features.count=128"]),
                ),
                # Table 4, and with the paper's 512 slots
                forget=dict(
                    bench="forget", data="counterfact", options=dict(facts=[512, 1024], forget=25)
                ),
                forget_512_slots=dict(
                    bench="forget",
                    data="counterfact",
                    options=dict(
                        facts=[512, 1024], forget=25, overrides=["editing.key_features.count=128"]
                    ),
                ),
                # Table 5
                attack=dict(bench="attack", data="counterfact", options=dict(facts=25)),
                # Table 6
                longcontext=dict(
                    bench="longcontext", data="", options=dict(facts=[64, 256, 1024, 4096])
                ),
                # Table 14
                rephrase=dict(bench="rephrase", data="zsre", options=dict(queries=100)),
                # Fig. 6
                noise=dict(bench="noise", data="counterfact", options=dict(limit=50)),
                # Section 6 of the paper
                scope=dict(bench="scope", data="counterfact", options=dict(limit=1000)),
                perplexity=dict(bench="perplexity", data="counterfact", options=dict(facts=512)),
                # Table 1
                speed=dict(bench="speed", data="counterfact", options=dict(scored=10, repeats=3)),
            ),
        )
    )
