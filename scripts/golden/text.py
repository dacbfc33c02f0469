"""The texts and labels that all model cases share, and how pairs are truncated."""

Inputs = dict[str, list[int]]
"""`input_ids`, and `token_type_ids` where the tokenizer gives them."""

MAX_LEN = 48
"""Tokens of a pair, special tokens included. Below the models' 64 positions."""

LONG_ENGLISH = (
    "boil the water in a new cup and heat the leaf slowly , for the old tea is not as fast . " * 6
).strip()
LONG_CHINESE = "怎么煮茶？水在冬天不是茶，的的确确是水。火车站的茶价格多少？" * 5
NEARLY_MAX_LEN = (
    "how does the river grow in winter when the rain is slow " * 3 + "and is the sun light old new"
)

PAIRS = [
    ("how to boil water for tea", "Boil the water, heat the cup, and plant the leaf in the cup."),
    ("how to boil water for tea", "The train station is old; tickets are not for the dog."),
    ("what is the loan rate of the bank", "The bank's rates: a new loan is 5 in winter."),
    ("river bank", "The river grows in the rain, and the bank is soil."),
    ("怎么煮茶", "煮茶的水是不是在火车站？茶的价格是多少。"),
    ("银行利率是多少", "银行的利率在冬天是 3.5，夏天不是。"),
    ("火车票价格", "Train ticket price: 火车票的价格 in the station."),
    ("when do seeds grow", ""),
    ("why is the moon light", LONG_ENGLISH),
    ("茶 tea", LONG_CHINESE),
    (NEARLY_MAX_LEN, "the garden is full of seeds and sunlight"),
    ("Fastest CAFÉ ovens?", "Breads in the oven; naïve bakers' breadness zzz ☃ 饕."),
    ("cat", "dog"),
    ("不", "花园的土不是面包"),
]
"""(query, document). Of note: an empty document, documents to truncate in both languages, a query
that leaves two tokens for the document, accents and capitals, unknown characters, one token each.
"""

LABELS = [1.0, 0.0, 1.0, 0.5, 0.75, 1.0, 0.5, 0.0, 0.25, 0.0, 0.25, 0.0, 0.0, 0.5]


def encode_only_second(tokenizer, query: str, document: str, max_len: int) -> Inputs:
    """What transformers gives, with only the document truncated.

    As a batch of one, the way rerankers call it: on two plain strings transformers 5 takes an empty
    document for an absent one, and drops the last separator.
    """
    encoded = tokenizer([query], [document], truncation="only_second", max_length=max_len)
    return {name: values[0] for name, values in encoded.items() if name != "attention_mask"}


def encode_long_query(tokenizer, query: str, max_len: int) -> Inputs:
    """The rule where transformers refuses: no document, the query cut at its end to fit."""
    fixed = encode_only_second(tokenizer, "", "", max_len)
    query_ids = token_ids(tokenizer, query)[: max_len - len(fixed["input_ids"])]
    cut = {"input_ids": query_ids, "token_type_ids": [0] * len(query_ids)}
    # The query stands behind the first special token.
    return {name: values[:1] + cut[name] + values[1:] for name, values in fixed.items()}


def token_ids(tokenizer, text: str) -> list[int]:
    """Without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fixed_tokens(tokenizer) -> int:
    """Special tokens of a pair."""
    return len(encode_only_second(tokenizer, "", "", MAX_LEN)["input_ids"])


def encode_pair(tokenizer, query: str, document: str, max_len: int) -> tuple[str, Inputs]:
    """The rule that applies, and what the model is given."""
    if fixed_tokens(tokenizer) + len(token_ids(tokenizer, query)) >= max_len:
        return "long_query", encode_long_query(tokenizer, query, max_len)
    return "only_second", encode_only_second(tokenizer, query, document, max_len)


def encode_joined(
    tokenizer, template: tuple[str, str, str, str], query: str, document: str, max_len: int
) -> Inputs:
    """A decoder's input: parts tokenized by themselves, the document truncated first."""
    query_format, seq, document_format, special_token = template
    parts = [query_format.format(query), seq, document_format.format(document), special_token]
    query_ids, seq_ids, document_ids, last_ids = (token_ids(tokenizer, part) for part in parts)
    query_ids = query_ids[: max_len - len(seq_ids) - len(last_ids)]
    room = max_len - len(query_ids) - len(seq_ids) - len(last_ids)
    return {"input_ids": query_ids + seq_ids + document_ids[:room] + last_ids}


def truncation_cases(tokenizer) -> list[dict]:
    """Pairs around every edge of the truncation rules."""
    short, document = "how to boil tea", "tea is a leaf in water"
    fixed, room = fixed_tokens(tokenizer), len(token_ids(tokenizer, document))
    whole = fixed + len(token_ids(tokenizer, short)) + room
    cases = []
    for query, max_len in [
        (short, whole),  # everything fits exactly
        (short, whole - 1),  # the document loses one token
        (short, whole - room + 1),  # one token of the document is left
        (short, whole - room),  # nothing of the document is left
        (short, whole - room - 1),  # the query loses one token
        (short, fixed + 1),  # one token of the query is left
        ("怎么煮茶？" * 12, 32),
        (NEARLY_MAX_LEN, 16),
    ]:
        rule, inputs = encode_pair(tokenizer, query, document, max_len)
        full = len(tokenizer(query, document)["input_ids"])
        assert len(inputs["input_ids"]) == min(max_len, full)
        cases.append(
            {"query": query, "document": document, "max_len": max_len, "rule": rule, **inputs}
        )
    return cases
