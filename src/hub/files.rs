//! Which files of a model are needed: never the copies for other frameworks.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::text::TOKENIZER_FILES;

/// The model's configuration.
const CONFIG: &str = "config.json";

/// An adapter's configuration and weights, which need a model of its own beside them.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// What a model of ours has beside its weights, and most models have not.
pub(super) const SIDECAR: &str = "reranker.json";

/// What sentence-transformers puts around texts.
const SENTENCE_TRANSFORMERS: &str = "config_sentence_transformers.json";

/// Either of them is enough to make a tokenizer of.
const TOKENIZER: [&str; 2] = ["tokenizer.json", "vocab.txt"];

/// Everything but weights: configuration, what a model of ours or of sentence-transformers has beside it,
/// the tokenizer.
pub(super) const SMALL: [&[&str]; 2] =
    [&[CONFIG, ADAPTER[0], SIDECAR, SENTENCE_TRANSFORMERS], &TOKENIZER_FILES];

/// What is read beside the weights of a whole model in `dir` and a program that does not know it may have
/// left at the hub; `reranker.json` comes last, so that where it is the others are.
pub(super) fn beside(dir: &Path) -> impl Iterator<Item = &'static str> {
    let has_tokenizer = TOKENIZER.iter().any(|name| dir.join(name).exists());
    let tokenizer = TOKENIZER_FILES.into_iter().filter(move |_| !has_tokenizer);
    tokenizer.chain([SENTENCE_TRANSFORMERS, SIDECAR])
}

/// Weights and the index of their shards, the first that a model has.
pub(super) const WEIGHTS: [(&str, &str); 3] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    (ADAPTER[1], "adapter_model.safetensors.index.json"),
];

/// The weight files that an index lists; `None` where it lists none or something else than files
/// beside it.
pub(super) fn shards(index: &Value) -> Option<Vec<String>> {
    let names = index.get("weight_map")?.as_object()?.values();
    let names: BTreeSet<&str> = names.map(Value::as_str).collect::<Option<_>>()?;
    let is_plain = |name: &&str| !name.is_empty() && !name.starts_with('.') && !name.contains('/');
    (!names.is_empty() && names.iter().all(is_plain))
        .then(|| names.into_iter().map(str::to_owned).collect())
}

/// Whether `dir` holds all that a model cannot be loaded without.
pub(super) fn is_complete(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).exists();
    if !has(CONFIG) && ADAPTER.iter().all(|name| has(name)) {
        return true;
    }
    has(CONFIG) && TOKENIZER.iter().any(|name| has(name)) && has_weights(dir)
}

/// Whether `dir` holds a set of weights.
pub(super) fn has_weights(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).exists();
    let has_shards = |index: &str| {
        let text = std::fs::read_to_string(dir.join(index)).ok();
        let names = text.and_then(|text| shards(&serde_json::from_str(&text).ok()?));
        names.is_some_and(|names| names.iter().all(|name| has(name)))
    };
    WEIGHTS.iter().any(|(name, index)| has(name) || has_shards(index))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use serde_json::json;

    use super::*;

    #[test]
    fn shards_are_files_beside_the_index() {
        let index = json!({"weight_map": {"a": "m-2.bin", "b": "m-1.bin", "c": "m-2.bin"}});
        assert_eq!(shards(&index).unwrap(), ["m-1.bin", "m-2.bin"]);
        for bad in [json!({}), json!({"weight_map": {}}), json!({"weight_map": {"a": "../x"}})] {
            assert_eq!(shards(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_model_without_a_shard_is_not_complete() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("config.json", "{}");
        write("model.safetensors.index.json", r#"{"weight_map": {"a": "m-1", "b": "m-2"}}"#);
        write("m-1", "");
        write("tokenizer.json", "{}");
        assert!(!is_complete(dir.path()));
        write("m-2", "");
        assert!(is_complete(dir.path()));
    }
}
