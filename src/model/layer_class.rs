//! What transformers calls the class of a model's layers, which FSDP files name.

/// Class of a layer in transformers, by `model_type` of `config.json`.
const LAYER_CLASSES: &[(&str, &str)] = &[
    ("bert", "BertLayer"),
    ("gemma", "GemmaDecoderLayer"),
    ("llama", "LlamaDecoderLayer"),
    ("mistral", "MistralDecoderLayer"),
    ("modernbert", "ModernBertEncoderLayer"),
    ("qwen2", "Qwen2DecoderLayer"),
    ("qwen3", "Qwen3DecoderLayer"),
    ("roberta", "RobertaLayer"),
    ("xlm-roberta", "XLMRobertaLayer"),
];

/// Compares the layer classes that a configuration names with that of a `model_type`; one line for
/// each that is another's, or nobody's.
#[must_use]
pub fn foreign_layer_classes(named: &[String], model_type: &str) -> Vec<String> {
    let own = LAYER_CLASSES.iter().find(|(of, _)| *of == model_type).map(|(_, class)| *class);
    named
        .iter()
        .filter(|name| own != Some(name.as_str()))
        .map(|name| {
            let owner = LAYER_CLASSES.iter().find(|(_, class)| class == name);
            let what = match owner {
                Some((of, _)) => format!("{name} is the layer of {of} models"),
                None => format!("{name} is no layer class known here"),
            };
            let own = own.map_or_else(String::new, |own| format!(", whose layer is {own}"));
            format!(
                "{what}, this is a {model_type} model{own}; it makes no difference, since layers \
                 are known here"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_models_own_class_passes() {
        let names = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(foreign_layer_classes(&names("BertLayer"), "bert"), [""; 0]);
        assert_eq!(foreign_layer_classes(&[], "bert"), [""; 0]);
        assert_eq!(
            foreign_layer_classes(&names("BertLayer,Qwen2DecoderLayer,BertPooler"), "bert"),
            [
                "Qwen2DecoderLayer is the layer of qwen2 models, this is a bert model, whose layer \
                 is BertLayer; it makes no difference, since layers are known here",
                "BertPooler is no layer class known here, this is a bert model, whose layer is \
                 BertLayer; it makes no difference, since layers are known here",
            ]
        );
    }
}
