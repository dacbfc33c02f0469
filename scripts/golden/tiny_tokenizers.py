"""The tiny tokenizers of the golden models, one for each kind that encoders come with."""

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from .text import PAIRS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "the a of to in is and for how what when why do does can not with water tea coffee boil cup "
    "leaf river bank money loan rate cat dog train station ticket price light sun moon winter "
    "summer garden soil plant grow seed rain bread oven heat time day year old new fast slow"
).split()
PIECES = ["##s", "##ed", "##ing", "##er", "##est", "##ly", "##ness", "##ful", "##un"]
CHINESE = list("茶水怎么煮河银行利率火车站票价格冬天夏天花园土面包猫狗的是在不了多少")
PUNCTUATION = list(".,?!:;-'()，。？！")

TEXTS = [text for pair in PAIRS for text in pair]


def build_wordpiece(model_max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing BERT tokenizer with a vocabulary of about 200 entries."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    digits = [str(d) for d in range(10)]
    entries = SPECIAL + letters + digits + PUNCTUATION + WORDS + PIECES + CHINESE
    entries += ["##" + c for c in letters + digits]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def roberta_tokenizer(tokenizer: Tokenizer, model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer under RoBERTa's names for special tokens, without segment ids."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def build_bytes(model_max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with RoBERTa's post-processor: `<s> a </s></s> b </s>`, padding is 1."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return roberta_tokenizer(tokenizer, model_max_length)


def build_unigram(model_max_length: int) -> PreTrainedTokenizerFast:
    """Unigram with XLM-R's template `<s> a </s></s> b </s>`; padding is 3, unlike XLM-R's own 1."""
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    characters = {c for text in TEXTS for c in text if not c.isspace()}
    # The longer, the likelier: words win over their letters. Not trained, which is not repeatable.
    pieces = sorted({"▁", *("▁" + word for word in WORDS), *(piece.removeprefix("##") for piece in PIECES), *characters})
    vocabulary = [(token, 0.0) for token in special]
    vocabulary += [(piece, -9.0 + 1.5 * len(piece)) for piece in pieces]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return roberta_tokenizer(tokenizer, model_max_length)


def build_prompted(model_max_length: int) -> PreTrainedTokenizerFast:
    """The byte-level one with the tokens that prompts and answers need."""
    tokenizer = build_bytes(model_max_length)
    tokenizer.add_tokens(["<bos>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["yes", "no", "Yes"])
    return tokenizer


BUILDERS = {
    "wordpiece": build_wordpiece,
    "bytes": build_bytes,
    "unigram": build_unigram,
    "prompted": build_prompted,
}
