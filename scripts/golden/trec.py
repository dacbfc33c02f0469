"""A run and its judgements in TREC's form, and what trec_eval says of them.

Random rankings with what rankings in the wild have: tied scores, judged documents that are missing,
documents that nobody judged, graded and negative labels, queries that only one of the two files has.
"""

import random

import pytrec_eval

CUTOFFS = (1, 3, 10)
QUERIES = 24
MEASURES = {
    "ndcg_cut." + ",".join(map(str, CUTOFFS)),
    "recall." + ",".join(map(str, CUTOFFS)),
    "map",
    "recip_rank",
}


def make() -> tuple[dict, dict]:
    """Judgements and scores, by query and document."""
    source = random.Random(666)
    qrels, run = {}, {}
    for number in range(QUERIES):
        query = f"q{number}"
        documents = [f"d{source.randrange(1000)}" for _ in range(source.randint(2, 25))]
        judged = source.sample(documents, source.randint(1, len(documents)))
        labels = {document: source.choice([-1, 0, 0, 1, 1, 2, 3]) for document in judged}
        labels[f"missing-{number}"] = source.choice([0, 1, 3])
        labels[f"relevant-{number}"] = 1
        qrels[query] = labels
        # One decimal: many ties.
        run[query] = {document: round(source.uniform(-2, 2), 1) for document in documents}
        if number % 2:
            run[query][f"relevant-{number}"] = round(source.uniform(-2, 2), 1)
    del run["q3"], qrels["q5"]
    return qrels, run


def lines(qrels: dict, run: dict) -> tuple[str, str]:
    """The two files. Ranks are wrong on purpose: nobody should look at them."""
    judgements = [f"{q} 0 {d} {label}\n" for q in qrels for d, label in qrels[q].items()]
    ranking = [f"{q} Q0 {d} 1 {score} tag\n" for q in run for d, score in run[q].items()]
    return "".join(judgements), "".join(ranking)


def measure(qrels: dict, run: dict) -> dict:
    """The figures of each query of both, under our names, by trec_eval."""
    # trec_eval's gain is the label; this one is 2^label - 1.
    powers = {q: {d: 2 ** max(v, 0) - 1 for d, v in labels.items()} for q, labels in qrels.items()}
    linear = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    exponential = pytrec_eval.RelevanceEvaluator(powers, MEASURES).evaluate(run)
    figures = {}
    for query, values in linear.items():
        row = {"map": values["map"]}
        for k in CUTOFFS:
            row[f"ndcg@{k}"] = values[f"ndcg_cut_{k}"]
            row[f"ndcg_exponential@{k}"] = exponential[query][f"ndcg_cut_{k}"]
            row[f"recall@{k}"] = values[f"recall_{k}"]
            # trec_eval's has no cut-off.
            rank = values["recip_rank"]
            row[f"mrr@{k}"] = rank if rank > 0 and round(1 / rank) <= k else 0.0
        figures[query] = row
    return figures


def files() -> dict:
    """The two files as texts, and the figures."""
    qrels, run = make()
    judgements, ranking = lines(qrels, run)
    return {"qrels": judgements, "run": ranking, "queries": measure(qrels, run)}
