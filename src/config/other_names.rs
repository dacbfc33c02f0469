//! What other trainers call our settings: transformers' and sentence-transformers' training
//! arguments, peft's configuration. They are no other spellings here, since some differ in more than
//! the name (`warmup_steps` counts, `train_batch_size` may be of all devices); an unknown key that
//! is one of them is answered with ours.

/// Their names and ours.
const NAMES: &[(&str, &str)] = &[
    ("accumulation_steps", "gradient_accumulation_steps"),
    ("bf16", "mixed_precision"),
    ("dataset", "train_dataset"),
    ("eval_dataset", "val_dataset"),
    ("eval_file", "val_dataset"),
    ("evaluation_steps", "eval_steps"),
    ("fp16", "mixed_precision"),
    ("full_determinism", "deterministic"),
    ("gradient_clipping", "max_grad_norm"),
    ("learning_rate", "lr"),
    ("logging_steps", "log_interval"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("lora_r", "r"),
    ("lora_rank", "r"),
    ("loss", "loss_type"),
    ("max_length", "max_len"),
    ("max_seq_length", "max_len"),
    ("model", "model_name_or_path"),
    ("model_name", "model_name_or_path"),
    ("num_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("output_path", "output_dir"),
    ("per_device_train_batch_size", "batch_size"),
    ("precision", "mixed_precision"),
    ("rank", "r"),
    ("report_to", "log_with"),
    ("resume_from_checkpoint", "resume"),
    ("save_strategy", "save_on_epoch_end"),
    ("save_total_limit", "num_max_checkpoints"),
    ("train_batch_size", "batch_size"),
    ("train_data", "train_dataset"),
    ("train_file", "train_dataset"),
    ("val_data", "val_dataset"),
    ("validation_file", "val_dataset"),
    ("warmup_ratio", "warmup_proportion"),
    ("warmup_steps", "warmup_proportion"),
];

/// Our name of the setting that others call `name`.
#[must_use]
pub fn ours(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    NAMES.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_names_are_listed_once_in_order() {
        let names: Vec<_> = NAMES.iter().map(|(theirs, _)| *theirs).collect();
        let mut sorted: Vec<_> =
            names.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        sorted.sort_unstable();
        assert_eq!(names, sorted);
        assert_eq!((ours("Learning-Rate"), ours("lr")), (Some("lr"), None));
    }
}
