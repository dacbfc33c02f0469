#!/usr/bin/env python3
"""Trains a teacher on the example data and distils it into a smaller student that sees no label.

The teacher is the quick start's run of MiniLM. The student starts from MiniLM's first layers, with a
head of random numbers, and learns the teacher's scores of the training file's pairs and of further
ones, since a teacher needs no label. Queries are those of the file, each also with words left out, and
the sentences of its documents; documents are its documents and their sentences. As the held-out topics
are others, there are also questions and texts about everything, of WordNet (`scripts/proof/wordnet.py`):
without them a student agrees with its teacher on the file's topics and less on others. Which are paired
is mined as for a first stage of retrieval: by the embeddings of MiniLM itself, near ones and a few at
random. Nothing of the held-out file is used.

Reported are nDCG@10 and MRR@10 on the held-out queries, by `reranker eval`, of BM25, both untrained
models, the teacher and the student; and how much of the teacher's gain over its own untrained start the
student has. Exit code 1 where that is below 85 %. Also reported is the stricter share: of the gain over
BM25.

usage: check_distillation.py --minilm DIRECTORY [--wordnet DIRECTORY] [--layers 3] [--seed 666]
                             [--keep DIRECTORY] [--result FILE]
       --minilm   what `scripts/setup.sh --quickstart` prints
       --wordnet  /usr/share/wordnet, unless given: Debian's package wordnet-base
       --seed     of the pairs that are drawn and of the student's head
       --keep     where models go, and stay; a teacher that is there is taken
       --result   writes the figures there as JSON
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from proof import wordnet

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
TRAIN = ROOT / "example_data/train_pointwise.jsonl"
EVAL = ROOT / "example_data/eval_grouped.jsonl"
MAX_LEN = 64
LEAST_SHARE = 0.85
# Documents for a query: which of the nearest, 0 being the nearest of all, and how many random ones.
Draw = tuple[Sequence[int], int]
# Of the file's queries, of shortened ones, of sentences that nobody has asked.
ASKED, SHORTENED, SPOKEN = (range(60), 20), (range(25), 8), (range(12), 4)
# Of questions on WordNet's senses, whose definitions say much the same as others.
GENERAL = ((0, 1, 2, 3, 5, 8, 13, 21, 34, 55), 2)
SENSES = 8000
# Shortened forms of a query, and the share of its words that they lack.
FORMS = 2
LEFT_OUT = 0.3
LAYER = "encoder.layer."
STUDENT = {
    "model_type": "bert_encoder",
    "val_dataset": EVAL,
    "val_dataset_type": "grouped",
    "max_len": MAX_LEN,
    "loss_type": "pointwise_bce",
    "epochs": 1,
    "lr": "3e-4",
    # The held-out queries are on other topics: words that no text here has must keep their place
    # among those that are seen.
    "special_lr_groups": "[{keywords: [embeddings], lr: 3e-5}]",
    "batch_size": 32,
    "mixed_precision": "bf16",
    "warmup_proportion": 0.1,
    "max_grad_norm": 1.0,
}


def first_layers(model: Path, layers: int, to: Path) -> None:
    """Writes the model of the first `layers` layers."""
    to.mkdir()
    for path in model.iterdir():
        if path.name.startswith("tokenizer") or path.name == "special_tokens_map.json":
            shutil.copy(path, to)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    # There is no noise to average out of a teacher's scores.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (to / "config.json").write_text(json.dumps(config))

    def stays(name: str) -> bool:
        _, found, rest = name.partition(LAYER)
        return not found or int(rest.split(".")[0]) < layers

    weights = load_file(model / "model.safetensors")
    save_file({name: w for name, w in weights.items() if stays(name)}, to / "model.safetensors")


def sentences(document: str) -> list[str]:
    """The parts of a document, in place of queries."""
    return [part.strip() for part in re.split(r"[.;:!?。；！？]", document) if part.strip()]


def shortened(query: str, dice: random.Random) -> str:
    """A query without some of its words, or Chinese characters."""
    units = re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+\s*|\s+", query)
    return "".join(unit for unit in units if dice.random() >= LEFT_OUT).strip()


def embeddings(model: Path, texts: list[str]) -> torch.Tensor:
    """`[N, H]`, of length 1: means over tokens, as sentence-transformers makes them of this model."""
    tokenizer, trunk = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    result = torch.empty(len(texts), trunk.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), 64):
        now = by_length[start : start + 64]
        batch = [texts[i] for i in now]
        inputs = tokenizer(
            batch, padding=True, truncation=True, max_length=MAX_LEN, return_tensors="pt"
        )
        with torch.no_grad():
            states = trunk(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(1) / mask.sum(1)
        result[now] = torch.nn.functional.normalize(means, dim=-1)
    return result


def mined(
    minilm: Path, queries: dict[str, Draw], documents: list[str], dice: random.Random
) -> list[tuple[str, str]]:
    """Pairs of each query with the documents that it draws; none with itself."""
    table = embeddings(minilm, documents)
    pairs = []
    for (query, (places, others)), row in zip(queries.items(), embeddings(minilm, list(queries))):
        order = (table @ row).topk(max(places) + 2).indices.tolist()
        nearest = [i for i in order if documents[i] != query]
        chosen = [nearest[place] for place in places] + dice.sample(range(len(documents)), others)
        pairs += [(query, documents[i]) for i in chosen if documents[i] != query]
    return pairs


def general(minilm: Path, directory: Path, dice: random.Random) -> list[tuple[str, str]]:
    """Pairs of WordNet's texts."""
    texts = list(wordnet.texts(directory, SENSES, dice))
    documents = list(dict.fromkeys(document for _, those in texts for document in those))
    return mined(minilm, {question: GENERAL for question, _ in texts}, documents, dice)


def write_unlabelled(minilm: Path, directory: Path, to: Path, seed: int) -> int:
    """The pairs of the training file without labels, and mined ones of it and of WordNet in
    `directory`. Returns how many."""
    records = [json.loads(line) for line in TRAIN.read_text("utf-8").splitlines()]
    documents = list(dict.fromkeys(record["content"] for record in records))
    spoken = list(dict.fromkeys(part for document in documents for part in sentences(document)))
    asked = list(dict.fromkeys(record["query"] for record in records))
    dice = random.Random(seed)
    shorter = [shortened(query, dice) for query in asked for _ in range(FORMS)]
    # The first mention of a text counts least: what is asked is paired most.
    queries = dict.fromkeys(spoken, SPOKEN)
    queries |= dict.fromkeys(filter(None, shorter), SHORTENED)
    queries |= dict.fromkeys(asked, ASKED)
    pairs = [(record["query"], record["content"]) for record in records]
    pairs += mined(minilm, queries, documents + spoken, dice) + general(minilm, directory, dice)
    pairs = dict.fromkeys(pairs)
    with to.open("w", encoding="utf-8") as out:
        for query, content in pairs:
            out.write(json.dumps({"query": query, "content": content}, ensure_ascii=False) + "\n")
    return len(pairs)


def launch(config: Path, workers: int, *more: str) -> float:
    """Trains on the CPU; returns the seconds it took."""
    begin = time.perf_counter()
    command = [BIN / "rr-launch", "--cpu", "--nproc", str(workers), "--config", config]
    for setting in more:
        command += ["--set", setting]
    if subprocess.run([*command, "--overwrite"], cwd=ROOT).returncode != 0:
        sys.exit(f"this command failed: {' '.join(map(str, command))}")
    return time.perf_counter() - begin


def evaluate(model: Path, bm25: bool = False) -> dict[str, dict]:
    """nDCG@10 and MRR@10 of a model, and of BM25 on request, by ranking."""
    command = [BIN / "reranker", "eval", "--model", model, "--data", EVAL, "--json"]
    command += ["--max-len", str(MAX_LEN)] + (["--bm25"] if bm25 else [])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Parses the arguments, trains both, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=666)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
    if not (arguments.wordnet / "data.noun").is_file():
        sys.exit(f"no WordNet in {arguments.wordnet}: apt install wordnet-base, or name another copy")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        work = (arguments.keep or Path(name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        report = distil(arguments, work)
    print(f"{'ranking':20}  nDCG@10   MRR@10")
    for name, ranking in report["rankings"].items():
        print(f"{name:20}  {ranking['ndcg@10']:7.4f}  {ranking['mrr@10']:7.4f}")
    for start in ("share of the gain", "share of the gain over BM25"):
        print(f"{start}: {report[start]:.1%}")
    if arguments.result:
        arguments.result.write_text(json.dumps(report, indent=1) + "\n")
    if report["share of the gain"] < LEAST_SHARE:
        sys.exit(f"the student has less than {LEAST_SHARE:.0%} of the teacher's gain")


def distil(arguments: argparse.Namespace, work: Path) -> dict:
    """The whole flow in the directory `work`."""
    teacher, student = work / "teacher/model", work / "student-start"
    seconds = {}
    if not teacher.exists():
        quick = ROOT / "config/quickstart.yaml"
        settings = [f"model_name_or_path={arguments.minilm}", f"output_dir={work / 'teacher'}"]
        seconds["teacher"] = launch(quick, 2, *settings)
    shutil.rmtree(student, ignore_errors=True)
    first_layers(arguments.minilm, arguments.layers, student)
    data = work / "unlabelled.jsonl"
    pairs = write_unlabelled(arguments.minilm, arguments.wordnet, data, arguments.seed)
    config = work / "distilling.yaml"
    settings = STUDENT | {"model_name_or_path": student, "train_dataset": data}
    settings |= {"output_dir": work / "student", "seed": arguments.seed}
    lines = "".join(f"{key}: {value}\n" for key, value in settings.items())
    config.write_text(f"{lines}teacher:\n  model_name_or_path: {teacher}\n")
    # One worker with all cores: two would spend a third of the time adding up the gradients of
    # an embedding table that is two thirds of this student.
    seconds["distillation"] = launch(config, 1)

    rankings = {
        "untrained": evaluate(arguments.minilm, bm25=True),
        "teacher": evaluate(teacher),
        "student, untrained": evaluate(student),
        "student": evaluate(work / "student/model"),
    }
    table = {"BM25": rankings["untrained"]["bm25"]}
    table |= {name: ranking["model"] for name, ranking in rankings.items()}
    ndcg = {name: ranking["ndcg@10"] for name, ranking in table.items()}

    def share(start: str) -> float:
        return (ndcg["student"] - ndcg[start]) / (ndcg["teacher"] - ndcg[start])

    return {
        "rankings": table,
        "share of the gain": share("untrained"),
        "share of the gain over BM25": share("BM25"),
        "seed": arguments.seed,
        "pairs": pairs,
        "seconds": seconds,
        "student": {name: value for name, value in STUDENT.items() if value != EVAL},
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
