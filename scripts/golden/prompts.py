"""Rerankers that are language models: how their model cards ask them, and the logits they give."""

import torch

from .text import token_ids

QWEN3_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
QWEN3_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN3_TASK = "Given a web search query, retrieve relevant passages that answer the query"
GEMMA_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query "
    "by providing a prediction of either 'Yes' or 'No'."
)


def encode_qwen3(tokenizer, query: str, document: str, max_len: int) -> list[int]:
    """One text of task, query and document, cut at its end; chat around it."""
    before, after = token_ids(tokenizer, QWEN3_BEFORE), token_ids(tokenizer, QWEN3_AFTER)
    text = f"<Instruct>: {QWEN3_TASK}\n<Query>: {query}\n<Document>: {document}"
    room = max_len - len(before) - len(after)
    return before + token_ids(tokenizer, text)[:room] + after


def encode_gemma(tokenizer, query: str, document: str, max_len: int) -> list[int]:
    """Parts tokenized by themselves, the document cut at its end; the question behind it."""
    bos, sep = tokenizer.convert_tokens_to_ids("<bos>"), token_ids(tokenizer, "\n")
    first = [bos, *token_ids(tokenizer, f"A: {query}"), *sep]
    last = sep + token_ids(tokenizer, GEMMA_PROMPT)
    room = max_len - len(first) - len(last)
    return first + token_ids(tokenizer, f"B: {document}")[:room] + last


PROMPTS = {
    "qwen3-reranker": (encode_qwen3, "yes", "no"),
    "bge-reranker-gemma": (encode_gemma, "Yes", None),
}


def tensors(
    prompt: str, model: torch.nn.Module, tokenizer, pairs: list[tuple[str, str]], max_len: int
) -> dict[str, torch.Tensor]:
    """`input_ids.{i}` [L] of every pair, and `logits` [N] of the answer behind it."""
    encode, positive, negative = PROMPTS[prompt]
    yes = tokenizer.convert_tokens_to_ids(positive)
    tensors, logits = {}, []
    for i, (query, document) in enumerate(pairs):
        ids = torch.tensor(encode(tokenizer, query.strip(), document.strip(), max_len))
        with torch.no_grad():
            last = model(input_ids=ids[None]).logits[0, -1]
        no = 0.0 if negative is None else last[tokenizer.convert_tokens_to_ids(negative)]
        tensors[f"input_ids.{i}"] = ids
        logits.append(last[yes] - no)
    return tensors | {"logits": torch.stack(logits).float()}
