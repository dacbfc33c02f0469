"""The models that both sides start from: a given checkpoint with a head, or tiny random ones."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as algorithms
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

SEED = 7
VOCABULARY = 2000
TINY = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=130,
    num_labels=1,
)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def with_head(checkpoint: Path, directory: Path) -> None:
    """`checkpoint` as a one-label classifier without dropout; the head is random."""
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(checkpoint, num_labels=1, **NO_DROPOUT)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, config=config, dtype=torch.float32
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)


def tiny(kind: str, texts: Iterator[str], directory: Path) -> None:
    """A random model of `kind` (bert, xlm-roberta, qwen2), its tokenizer trained on `texts`."""
    build = {"bert": _word_pieces, "xlm-roberta": _sentence_pieces, "qwen2": _byte_pairs}[kind]
    tokenizer, special = build(texts)
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    torch.manual_seed(SEED)
    sizes = TINY | {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": ids["pad_token"]}
    if kind == "bert":
        config = transformers.BertConfig(**sizes, **NO_DROPOUT, initializer_range=0.1)
    elif kind == "xlm-roberta":
        config = transformers.XLMRobertaConfig(
            **sizes,
            **NO_DROPOUT,
            initializer_range=0.1,
            type_vocab_size=1,
            bos_token_id=ids["cls_token"],
            eos_token_id=ids["sep_token"],
        )
    else:
        config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, initializer_range=0.1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    segments = ["token_type_ids"] if kind == "bert" else []
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", *segments, "attention_mask"],
        **special,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _word_pieces(texts: Iterator[str]) -> tuple[Tokenizer, dict[str, str]]:
    """BERT's: lower case, word pieces, `[CLS] A [SEP] B [SEP]`."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(algorithms.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer, special


def _sentence_pieces(texts: Iterator[str]) -> tuple[Tokenizer, dict[str, str]]:
    """XLM-RoBERTa's: a unigram model over `▁`-marked words, `<s> A </s></s> B </s>`."""
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(algorithms.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer, special


def _byte_pairs(texts: Iterator[str]) -> tuple[Tokenizer, dict[str, str]]:
    """Qwen2's: byte pairs, nothing added around a text."""
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(algorithms.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, special
