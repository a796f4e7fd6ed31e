"""The paper's experiments on the shipped model, with every control beside it, and one report.

command   larimar reproduce --config=configs/bench_paper.py --out runs/paper \
              --set data.counterfact=counterfact-edit.json data.zsre=zsre-knowedit.json
hardware  2 CPU cores
expected  CounterFact: edit S 100.0, score 84.9; stream of 1,000 edits: retention 97.4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="bench_paper",
            model="smol",
            # CounterFact in either schema (at least 4,096 records) and ZsRE in KnowEdit's.
            data=dict(counterfact="", zsre=""),
            runs=dict(
                # Table 2
                counterfact=dict(bench="counterfact", data="counterfact", options=dict(limit=1000)),
                # Table 2 as the authors' code measures it
                counterfact_released=dict(
                    bench="counterfact", data="counterfact", options=dict(limit=200, mode="released")
                ),
                # What is decoded after an edit
                says=dict(bench="says", data="counterfact", options=dict(limit=200)),
                # Tables 12 and 13
                zsre=dict(bench="zsre", data="zsre", options=dict(limit=1000)),
                # Table 3 and Fig. 2b
                stream=dict(
                    bench="stream",
                    data="zsre",
                    options=dict(edits=1000, unwritten=0, every=100),
                ),
                # Fig. 2a
                batch=dict(
                    bench="batch",
                    data="counterfact",
                    options=dict(facts=[1, 64, 256, 512, 1024, 2048]),
                ),
                # Table 4
                forget=dict(bench="forget", data="counterfact", options=dict(facts=[512, 1024])),
                # Section 6 of the paper
                scope=dict(bench="scope", data="counterfact", options=dict(limit=1000)),
                # Table 6
                longcontext=dict(
                    bench="longcontext",
                    data="counterfact",
                    options=dict(facts=[64, 128, 256, 1024, 4096]),
                ),
                # Table 1
                speed=dict(bench="speed", data="counterfact", options={}),
                perplexity=dict(bench="perplexity", data="counterfact", options=dict(facts=512)),
            ),
        )
    )
