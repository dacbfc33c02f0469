#!/usr/bin/env python3
"""Trains a teacher on the example data and distils it into a smaller student that sees no label.

The teacher is the quick start's run of MiniLM. The student starts from MiniLM's first layers, with a
head of random numbers, and learns the teacher's scores of the same pairs and of further ones: since a
teacher needs no label, all queries of the training file, each also with words left out, and the
sentences of its documents are paired with documents of that file. Reported are nDCG@10 and
MRR@10 on the held-out queries, by `reranker eval`, of BM25, both untrained models, the teacher and the
student; and how much of the teacher's gain over its own untrained start the student has. Exit code 1
where that is below 85 %. Also reported is the stricter share: of the gain over BM25.

usage: check_distillation.py --minilm DIRECTORY [--layers 3] [--more 40] [--keep DIRECTORY] [--result FILE]
       --minilm   what `scripts/setup.sh --quickstart` prints
       --more     further documents for each query
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
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
TRAIN = ROOT / "example_data/train_pointwise.jsonl"
EVAL = ROOT / "example_data/eval_grouped.jsonl"
MAX_LEN = 64
LEAST_SHARE = 0.85
# A teacher judges pairs that nobody has labelled, and texts that nobody has asked.
MORE = 40
# Share of the words of a query that are left out.
LEFT_OUT = 0.3
LAYER = "encoder.layer."
STUDENT = {
    "model_type": "bert_encoder",
    "val_dataset": EVAL,
    "val_dataset_type": "grouped",
    "max_len": MAX_LEN,
    "loss_type": "pointwise_bce",
    "epochs": 4,
    "lr": "3e-4",
    # The held-out queries are on other topics: words that no text here has must keep their place
    # among those that are seen.
    "special_lr_groups": "[{keywords: [embeddings], lr: 3e-5}]",
    "batch_size": 8,
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


def words(text: str) -> set[str]:
    """Words, and single Chinese characters."""
    return set(re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.lower()))


def sentences(document: str) -> list[str]:
    """The parts of a document, in place of queries."""
    return [part.strip() for part in re.split(r"[.;:!?。；！？]", document) if part.strip()]


def shortened(query: str, dice: random.Random) -> str:
    """A query without some of its words, or Chinese characters."""
    units = re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+\s*|\s+", query)
    return "".join(unit for unit in units if dice.random() >= LEFT_OUT).strip()


def write_unlabelled(source: Path, to: Path, more: int) -> int:
    """The pairs of `source` without labels, and for each query as many as `more` further documents:
    half of them the ones that share most of its rare words, half at random. Shortened queries and
    sentences of the documents are queries too, with half and a tenth as many. Returns the number
    of pairs."""
    records = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    documents = list(dict.fromkeys(record["content"] for record in records))
    bags = [words(document) for document in documents]
    counts = Counter(word for bag in bags for word in bag)
    pairs = dict.fromkeys((record["query"], record["content"]) for record in records)
    dice = random.Random(666)
    asked = list(dict.fromkeys(record["query"] for record in records))
    spoken = dict.fromkeys(part for document in documents for part in sentences(document))
    queries = dict.fromkeys(spoken, more // 10)
    queries |= dict.fromkeys(filter(None, (shortened(query, dice) for query in asked)), more // 2)
    queries |= dict.fromkeys(asked, more)
    for query, count in queries.items():
        bag_of_query = words(query)
        near = [sum(1 / counts[word] for word in sorted(bag_of_query & bag)) for bag in bags]
        order = sorted(range(len(documents)), key=lambda i: -near[i])
        chosen = order[: count // 2] + dice.sample(order[count // 2 :], count - count // 2)
        pairs |= dict.fromkeys((query, documents[i]) for i in chosen)
    with to.open("w") as out:
        for query, content in pairs:
            out.write(json.dumps({"query": query, "content": content}, ensure_ascii=False) + "\n")
    return len(pairs)


def launch(config: Path, *more: str) -> float:
    """Trains with two workers; returns the seconds it took."""
    begin = time.perf_counter()
    command = [BIN / "rr-launch", "--cpu", "--nproc", "2", "--config", config]
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
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--more", type=int, default=MORE)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
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
        seconds["teacher"] = launch(quick, *settings)
    shutil.rmtree(student, ignore_errors=True)
    first_layers(arguments.minilm, arguments.layers, student)
    data = work / "unlabelled.jsonl"
    pairs = write_unlabelled(TRAIN, data, arguments.more)
    config = work / "distilling.yaml"
    settings = STUDENT | {"model_name_or_path": student, "train_dataset": data}
    settings["output_dir"] = work / "student"
    lines = "".join(f"{key}: {value}\n" for key, value in settings.items())
    config.write_text(f"{lines}teacher:\n  model_name_or_path: {teacher}\n")
    seconds["distillation"] = launch(config)

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
        "pairs": pairs,
        "seconds": seconds,
        "student": {name: value for name, value in STUDENT.items() if value != EVAL},
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
