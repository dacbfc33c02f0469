//! Prompts of rerankers that are language models: the logit of the next token is the score.

/// How a language model is asked whether a document is relevant, as its authors do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenPrompt {
    /// What a user calls it.
    pub name: &'static str,
    /// `model_type` of the published models.
    pub model_type: &'static str,
    /// A token that begins the input.
    pub(super) first_token: Option<&'static str>,
    /// Texts before query and document, each tokenized by itself.
    pub(super) before: &'static [&'static str],
    /// The query goes where `{}` stands.
    pub(super) query: &'static str,
    /// Between query and document.
    pub(super) between: &'static str,
    /// The document goes where `{}` stands.
    pub(super) document: &'static str,
    /// Texts after the document, each tokenized by itself.
    pub(super) after: &'static [&'static str],
    /// Whether query, what is between, and document are tokenized as one text.
    pub(super) joint: bool,
    /// The token whose logit counts.
    pub positive: &'static str,
    /// The token whose logit is taken away: the sigmoid of the difference is the softmax over both.
    pub negative: Option<&'static str>,
    /// The most tokens of a pair when nothing else is asked for, all texts around it included.
    /// (`FlagEmbedding`'s `max_length` leaves out what stands after the document.)
    pub max_len: usize,
}

/// The prompts of published rerankers, compared with code that their authors or others run them by:
/// Qwen3-Reranker with vLLM's `examples/offline_inference/qwen3_reranker.py` (texts, `yes` and `no`),
/// bge-reranker-v2-gemma with `FlagEmbedding/inference/reranker/decoder_only/base.py` (texts,
/// separators, `<bos>`, the logit of `Yes` alone). `FlagEmbedding` also cuts the query, to three
/// quarters of its `max_length`; here the document alone is cut as long as that is enough.
const PROMPTS: &[TokenPrompt] = &[
    TokenPrompt {
        name: "qwen3-reranker",
        model_type: "qwen3",
        first_token: None,
        before: &[
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the \
                   Query and the Instruct provided. Note that the answer can only be \"yes\" or \
                   \"no\".<|im_end|>\n<|im_start|>user\n",
        ],
        query: "<Instruct>: Given a web search query, retrieve relevant passages that answer the \
                query\n<Query>: {}",
        between: "\n<Document>: ",
        document: "{}",
        after: &["<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"],
        joint: true,
        positive: "yes",
        negative: Some("no"),
        max_len: 8192,
    },
    TokenPrompt {
        name: "bge-reranker-gemma",
        model_type: "gemma",
        first_token: Some("<bos>"),
        before: &[],
        query: "A: {}",
        between: "\n",
        document: "B: {}",
        after: &[
            "\n",
            "Given a query A and a passage B, determine whether the passage contains an answer to \
             the query by providing a prediction of either 'Yes' or 'No'.",
        ],
        joint: false,
        positive: "Yes",
        negative: None,
        max_len: 1024,
    },
];

impl TokenPrompt {
    /// The prompt called `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        PROMPTS.iter().find(|prompt| prompt.name == name)
    }

    /// The prompt of the published rerankers of a `model_type`.
    #[must_use]
    pub fn of_model_type(model_type: &str) -> Option<&'static Self> {
        PROMPTS.iter().find(|prompt| prompt.model_type == model_type)
    }

    /// What prompts are called.
    #[must_use]
    pub fn names() -> Vec<&'static str> {
        PROMPTS.iter().map(|prompt| prompt.name).collect()
    }
}
