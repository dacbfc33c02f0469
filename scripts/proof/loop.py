"""The other side: a plain PyTorch loop over a transformers model, padded batches, torch's AdamW."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, pad, softplus
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

WEIGHT_DECAY = 0.01
WARMUP = 0.1
STABLE = 0.2
MAX_GRAD_NORM = 1.0
# What stands around the texts of a decoder.
TEMPLATE = {
    "query_format": "query: {}",
    "document_format": "document: {}",
    "seq": "\n",
    "special_token": "<|im_end|>",
}
SCORED_AT_ONCE = 32

Pair = tuple[str, str]
# A step's items: pair indices, in groups where the loss compares.
Order = list[int] | list[list[int]]


@dataclass
class Data:
    """Pairs in the order of the file, with their labels as the loss takes them."""

    pairs: list[Pair]
    labels: list[float]


def bce(scores: torch.Tensor, labels: torch.Tensor, groups: list[range]) -> torch.Tensor:
    """The mean over pairs."""
    return binary_cross_entropy_with_logits(scores, labels)


def mse(scores: torch.Tensor, labels: torch.Tensor, groups: list[range]) -> torch.Tensor:
    """The mean over pairs of the squared error of the sigmoid."""
    return mse_loss(scores.sigmoid(), labels)


def ranknet(scores: torch.Tensor, labels: torch.Tensor, groups: list[range]) -> torch.Tensor:
    """The mean over pairs i, j of a group with y_i > y_j of (y_i - y_j) softplus(s_j - s_i)."""
    terms = []
    for group in groups:
        for i in group:
            for j in group:
                if labels[i] > labels[j]:
                    terms.append((labels[i] - labels[j]) * softplus(scores[j] - scores[i]))
    return torch.stack(terms).mean()


def listwise(scores: torch.Tensor, labels: torch.Tensor, groups: list[range]) -> torch.Tensor:
    """The mean over groups of the cross entropy to the softmax of the labels that are not 0."""
    terms = []
    for group in groups:
        s, y = scores[list(group)], labels[list(group)]
        if (y != 0).any():
            target = y.masked_fill(y == 0, -math.inf).softmax(0)
            terms.append(-(target * s.log_softmax(0)).sum())
    return torch.stack(terms).mean()


LOSSES = {
    "pointwise_bce": bce,
    "pointwise_mse": mse,
    "pairwise_ranknet": ranknet,
    "listwise_ce": listwise,
}


class Peer:
    """A transformers model with its tokenizer, which joins a pair as the field does."""

    def __init__(self, directory: Path, is_decoder: bool, max_len: int):
        # tokenizer.json as it is: AutoTokenizer makes a Qwen tokenizer of its own from the vocabulary.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=torch.float32
        )
        self.is_decoder, self.max_len = is_decoder, max_len

    def scores(self, pairs: list[Pair]) -> torch.Tensor:
        """Logits [N] of a padded batch."""
        if self.is_decoder:
            return self._decoder_scores(pairs)
        inputs = self.tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation="only_second",
            max_length=self.max_len,
            padding=True,
            return_tensors="pt",
            # A tokenizer of no class of its own makes none unless its files ask for them.
            return_token_type_ids=self.model.config.type_vocab_size > 1,
        )
        return self.model(**inputs).logits.squeeze(-1)

    def _decoder_scores(self, pairs: list[Pair]) -> torch.Tensor:
        """The parts are tokenized one by one, and only the document is cut."""

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        rows = []
        for query, document in pairs:
            head = ids(TEMPLATE["query_format"].format(query.strip())) + ids(TEMPLATE["seq"])
            tail = ids(TEMPLATE["special_token"])
            body = ids(TEMPLATE["document_format"].format(document.strip()))
            rows.append(torch.tensor(head + body[: self.max_len - len(head) - len(tail)] + tail))
        longest = max(map(len, rows))
        filler = self.tokenizer.pad_token_id
        inputs = torch.stack([pad(row, (0, longest - len(row)), value=filler) for row in rows])
        mask = torch.stack([pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
        return self.model(input_ids=inputs, attention_mask=mask).logits.squeeze(-1)

    def score_all(self, pairs: list[Pair]) -> list[float]:
        """Logits of many pairs, like lengths together."""
        by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))
        scores = [0.0] * len(pairs)
        self.model.eval()
        with torch.no_grad():
            for begin in range(0, len(pairs), SCORED_AT_ONCE):
                chunk = by_length[begin : begin + SCORED_AT_ONCE]
                for i, value in zip(chunk, self.scores([pairs[i] for i in chunk]).tolist()):
                    scores[i] = value
        return scores


def learning_rate(peak: float, step: int, total: int) -> float:
    """The rate of optimizer step `step`, 0-based: linear warm-up, constant, half cosine to 0."""
    warmup = int(WARMUP * total)
    decay_from = warmup + int(STABLE * total)
    if step < warmup:
        return peak * step / max(1, warmup)
    if step < decay_from:
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - decay_from) / max(1, total - decay_from)))


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on everything but biases and normalisation weights, vectors all of them."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)


def train(peer: Peer, data: Data, loss_type: str, order: list[Order], lr: float) -> list[float]:
    """One optimizer step for each item of `order`; returns their losses."""
    optimizer = build_optimizer(peer.model)
    peer.model.train()
    losses = []
    for step, items in enumerate(order):
        indices, groups = [], []
        for item in items:
            members = item if isinstance(item, list) else [item]
            groups.append(range(len(indices), len(indices) + len(members)))
            indices += members
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, len(order))
        optimizer.zero_grad()
        scores = peer.scores([data.pairs[i] for i in indices])
        labels = torch.tensor([data.labels[i] for i in indices])
        loss = LOSSES[loss_type](scores, labels, groups)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses
