//! Each thing a user can get wrong, and the one line that says so.

use std::fmt::Write;
use std::path::PathBuf;

use super::{Case, LEAST};
use crate::config::{Plan, Sources};

/// Training YAML after the least (so that it starts on line 4), and the exact error.
#[test]
fn settings_of_the_wrong_type_are_one_line_with_a_position() {
    let table = [
        ("lr: fast", "training.yaml:4:5: lr: expected a number, found the text \"fast\""),
        (
            "epochs: \"3\"",
            "training.yaml:4:9: epochs: expected an integer, found the text \"3\" (remove the quotes)",
        ),
        ("lr: [1e-5]", "training.yaml:4:5: lr: expected a number, found a list"),
        ("lr: {}", "training.yaml:4:5: lr: expected a number, found a mapping"),
        ("lr: yes", "training.yaml:4:5: lr: expected a number, found yes"),
        ("lr: 0", "training.yaml:4:5: lr: expected a number above 0, found 0"),
        ("lr: nan", "training.yaml:4:5: lr: expected a number, found the text \"nan\""),
        ("epochs: 2.5", "training.yaml:4:9: epochs: expected an integer, found the number 2.5"),
    ];
    refused(&table);
}

/// Steps, pairs and memory are products of these.
#[test]
fn factors_beyond_a_million_are_refused() {
    let table = [
        (
            "batch_size: 9223372036854775807",
            "training.yaml:4:13: batch_size: expected an integer of at most 1000000, found \
             9223372036854775807",
        ),
        (
            "gradient_accumulation_steps: 1000001",
            "training.yaml:4:30: gradient_accumulation_steps: expected an integer of at most 1000000, \
             found 1000001",
        ),
        (
            "epochs: 9223372036854775807",
            "training.yaml:4:9: epochs: expected an integer of at most 1000000, found \
             9223372036854775807",
        ),
        (
            "train_group_size: 1000001",
            "training.yaml:4:19: train_group_size: expected an integer of at most 1000000, found \
             1000001",
        ),
    ];
    refused(&table);
}

/// The same for values of the right type that make no sense.
#[test]
fn settings_out_of_range_are_one_line_with_a_position() {
    let table = [
        ("epochs: 0", "training.yaml:4:9: epochs: expected an integer of at least 1, found 0"),
        (
            "batch_size: -1",
            "training.yaml:4:13: batch_size: expected an integer of at least 1, found -1",
        ),
        ("seed: 010", "training.yaml:4:7: seed: expected an integer, found the number 010"),
        (
            "epoch: 1\nepochs: 2",
            "training.yaml:4:1: epoch: the same setting as epochs on line 5; keep one of them",
        ),
        ("max_len: 3", "training.yaml:4:10: max_len: expected an integer of at least 4, found 3"),
        (
            "num_labels: 0",
            "training.yaml:4:13: num_labels: expected an integer of at least 1, found 0",
        ),
        (
            "shuffle_rate: 1.5",
            "training.yaml:4:15: shuffle_rate: expected a number from 0 to 1, found 1.5",
        ),
        ("weight_decay: -1", "training.yaml:4:15: weight_decay: expected 0 or more, found -1"),
        (
            "max_grad_norm: 0",
            "training.yaml:4:16: max_grad_norm: expected a number above 0, or null for no \
             clipping, found 0",
        ),
        (
            "warmup_proportion: 0.6\nstable_proportion: 0.5",
            "training.yaml:5:20: stable_proportion: warmup_proportion 0.6 and stable_proportion \
             0.5 add up to more than 1",
        ),
        (
            "max_label: 0",
            "training.yaml:4:12: max_label: expected min_label below max_label, found 0 and 0",
        ),
        (
            "min_label: 2",
            "training.yaml:4:12: min_label: expected min_label below max_label, found 2 and 1",
        ),
        (
            "loss_type: point_cee",
            "training.yaml:4:12: loss_type: expected pointwise_bce, pointwise_ce, point_ce, \
             pointwise_mse, point_mse, pairwise_ranknet or listwise_ce, found the text \
             \"point_cee\"",
        ),
        (
            "loss_type: listwise_ce\ntrain_dataset_type: pointwise",
            "training.yaml:5:21: train_dataset_type: the loss_type compares the hits of one query; \
             expected grouped, found pointwise",
        ),
        (
            "loss_type: listwise_ce\ntrain_group_size: 1",
            "training.yaml:5:19: train_group_size: the loss_type compares the hits of one query; \
             expected at least 2, found 1",
        ),
        (
            "save_on_epoch_end: 2",
            "training.yaml:4:20: save_on_epoch_end: expected 0, 1, true or false, found the \
             number 2",
        ),
        (
            "log_with: mlflow",
            "training.yaml:4:11: log_with: expected wandb or tensorboard, found the text \
             \"mlflow\"",
        ),
        (
            "output_dir: ''",
            "training.yaml:4:13: output_dir: expected a directory, found an empty text",
        ),
        (
            "special_lr_groups:\n- lr: 1",
            "training.yaml:5:3: special_lr_groups: keywords is missing",
        ),
        (
            "special_lr_groups:\n- keywords: [a]\n  lr: 0",
            "training.yaml:6:7: special_lr_groups.lr: expected a number above 0, found 0",
        ),
        (
            "special_lr_groups:\n- keyword: [a]\n  lr: 1",
            "training.yaml:5:3: special_lr_groups.keyword: unknown key; did you mean keywords?",
        ),
        (
            "special_lr_groups: 3",
            "training.yaml:4:20: special_lr_groups: expected a list of mappings, found the \
             number 3",
        ),
        (
            "special_lr_groups: [3]",
            "training.yaml:4:21: special_lr_groups: expected a mapping, found the number 3",
        ),
    ];
    refused(&table);
}

#[test]
fn what_depends_on_validation_needs_it() {
    let table = [
        (
            "metric_for_best: map",
            "training.yaml:4:18: metric_for_best: needs a val_dataset to validate on, and there is \
             none",
        ),
        (
            "eval_steps: 5",
            "training.yaml:4:13: eval_steps: needs a val_dataset to validate on, and there is none",
        ),
        (
            "eval_steps: 0\nval_dataset: v",
            "training.yaml:4:13: eval_steps: expected an integer of at least 1, found 0",
        ),
        (
            "early_stopping_patience: 2\nval_dataset: v",
            "training.yaml:4:26: early_stopping_patience: needs metric_for_best, which says what \
             has to get better",
        ),
        (
            "metric_for_best: accuracy\nval_dataset: v",
            "training.yaml:4:18: metric_for_best: expected loss, ndcg@10, mrr@10, map, eval_loss, \
             eval_ndcg@10, eval_mrr@10 or eval_map, found the text \"accuracy\"",
        ),
    ];
    refused(&table);
}

fn refused(table: &[(&str, &str)]) {
    for (yaml, message) in table {
        assert_eq!(&Case::new(yaml).resolve().unwrap_err(), message, "{yaml}");
    }
}

#[test]
fn a_template_has_one_gap() {
    refused(&[
        (
            "query_format: 'query:'",
            "training.yaml:4:15: query_format: expected a text with one {} where the query or \
             document goes, found \"query:\"",
        ),
        (
            "document_format: '{} }'",
            "training.yaml:4:18: document_format: expected a text with one {} and each other brace \
             doubled, found \"{} }\"",
        ),
        ("query_format: {}", "training.yaml:4:15: query_format: expected text, found a mapping"),
    ]);
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    let table = [
        ("learning_rate: 1", "training.yaml:4:1: learning_rate: unknown key; did you mean lr?"),
        (
            "num_train_epochs: 1",
            "training.yaml:4:1: num_train_epochs: unknown key; did you mean epochs?",
        ),
        (
            "lora: {lora_alpha: 1}",
            "training.yaml:4:8: lora.lora_alpha: unknown key; did you mean alpha?",
        ),
        ("lora_alpha: 1", "training.yaml:4:1: lora_alpha: unknown key; did you mean lora?"),
        (
            "warmup_proprtion: 1",
            "training.yaml:4:1: warmup_proprtion: unknown key; did you mean warmup_proportion?",
        ),
        ("batchsize: 1", "training.yaml:4:1: batchsize: unknown key; did you mean batch_size?"),
        ("Epochs: 1", "training.yaml:4:1: Epochs: unknown key; did you mean epochs?"),
        ("batch-size: 1", "training.yaml:4:1: batch-size: unknown key; did you mean batch_size?"),
        ("warmup: 0.1", "training.yaml:4:1: warmup: unknown key; did you mean warmup_proportion?"),
        ("rl: 1", "training.yaml:4:1: rl: unknown key"),
        ("\"a: b\": 1", "training.yaml:4:1: a: b: unknown key"),
        (
            "<<: {lr: 1}",
            "training.yaml:4:1: <<: unknown key; YAML's merge keys are not read: write its keys out here",
        ),
    ];
    refused(&table);
}

#[test]
fn what_is_required_is_asked_for() {
    let file = |yaml: &str| Case::whole(yaml).resolve().unwrap_err();
    assert_eq!(
        file("lr: 1"),
        "training.yaml: model_name_or_path is missing; expected a model directory or a hub id"
    );
    assert_eq!(
        file("model_name_or_path: m"),
        "training.yaml: model_type is missing; expected bert_encoder or llm_decoder"
    );
    assert_eq!(
        file("model_name_or_path: m\nmodel_type: bert_encoder"),
        "training.yaml: train_dataset is missing; expected a JSONL file"
    );
    assert_eq!(
        file("model_name_or_path: ''"),
        "training.yaml:1:21: model_name_or_path: expected a model directory or a hub id, found an \
         empty text"
    );
}

#[test]
fn a_file_that_is_not_a_yaml_mapping_is_one_line() {
    let table: &[(&[u8], &str)] = &[
        (b"", "training.yaml: is empty; expected lines of the form `key: value`"),
        (b"# nothing\n\n", "training.yaml: is empty; expected lines of the form `key: value`"),
        (b"- a\n", "training.yaml:1:1: expected lines of the form `key: value`, found a list"),
        (
            b"hello",
            "training.yaml:1:1: expected lines of the form `key: value`, found the text \"hello\"",
        ),
        (
            b"lr: 1\nlr: 2\n",
            "training.yaml:2:1: lr: given twice, first on line 1; keep one of them",
        ),
        (b"a: 1\nb: \xff\xfe\n", "training.yaml:2:4: byte 0xff is not UTF-8 text"),
        (b"a:\n\tb: 1\n", "training.yaml:2:1: a tab in the indentation; YAML wants spaces"),
        (
            b"a: 1\n---\nb: 2\n",
            "training.yaml:2:1: a second YAML document starts here; expected one",
        ),
        (
            b"a: !!python/name:os.system 1\n",
            "training.yaml:1:4: the tag !!python/name:os.system has no meaning here; remove it",
        ),
        (b"a: &x [*x]\n", "training.yaml:1:8: an alias to a value that is not complete yet"),
    ];
    for (bytes, message) in table {
        let error = Case::whole(bytes).resolve().unwrap_err();
        assert_eq!(&error, message, "{}", String::from_utf8_lossy(bytes));
    }
}

/// Whatever the parser says about broken YAML is wrapped in the same form.
#[test]
fn broken_yaml_has_a_position() {
    for yaml in
        ["a: [1, 2", "a: 'b", "a: b: c", "a: 1\n  b: 2", "a: \"\\q\"", "a: *nowhere", "[a", "%"]
    {
        let error = Case::whole(yaml).resolve().unwrap_err();
        let rest = error.strip_prefix("training.yaml:").unwrap();
        let mut parts = rest.splitn(3, ':');
        assert!(parts.next().unwrap().parse::<usize>().unwrap() >= 1, "{error}");
        assert!(parts.next().unwrap().parse::<usize>().unwrap() >= 1, "{error}");
        assert!(parts.next().unwrap().starts_with(" not valid YAML: "), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn hostile_yaml_is_bounded() {
    let deep = format!("{LEAST}lr: {}1{}", "[".repeat(100), "]".repeat(100));
    let error = Case::whole(deep).resolve().unwrap_err();
    assert_eq!(error, "training.yaml:4:36: nested deeper than 32 levels");
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let previous = vec![format!("*a{}", level - 1); 10].join(", ");
        writeln!(laughs, "a{level}: &a{level} [{previous}]").unwrap();
    }
    let error = Case::whole(laughs).resolve().unwrap_err();
    assert!(error.ends_with("more than 100000 values"), "{error}");
}

#[test]
fn a_missing_file_is_named() {
    let missing = |training: PathBuf, parallel: Option<PathBuf>| {
        let error = Plan::resolve(&Sources { training, parallel, ..Sources::default() });
        let error = error.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let case = Case::new("");
    let no_file = case.directory.path().join("no.yaml");
    let message = missing(no_file.clone(), None);
    assert_eq!(
        case.relative(&message),
        "no.yaml: cannot read: No such file or directory (os error 2)"
    );
    let message = missing(case.sources.training.clone(), Some(no_file));
    assert_eq!(
        case.relative(&message),
        "no.yaml: cannot read: No such file or directory (os error 2)"
    );
    let directory = case.directory.path().to_path_buf();
    assert!(missing(directory, None).ends_with("cannot read: Is a directory (os error 21)"));
}

#[test]
fn bad_overrides_name_themselves() {
    let table = [
        ("lr=fast", "--set lr=fast: lr: expected a number, found the text \"fast\""),
        ("lr=0", "--set lr=0: lr: expected a number above 0, found 0"),
        ("lrr=1", "--set lrr=1: lrr: unknown key; did you mean lr?"),
        ("batch_sise=1", "--set batch_sise=1: batch_sise: unknown key; did you mean batch_size?"),
        (
            "deepspeed_config.zero_stag=1",
            "--set deepspeed_config.zero_stag=1: deepspeed_config.zero_stag: unknown key; did \
             you mean zero_stage?",
        ),
        (
            "deepspeed_config={zero_stag: 1}",
            "--set deepspeed_config={zero_stag: 1}: deepspeed_config.zero_stag: unknown key; \
             did you mean zero_stage?",
        ),
        ("lr.x=1", "--set lr.x=1: lr: expected a number, found a mapping"),
        ("lr=[1", "--set lr=[1: lr: expected a number, found the text \"[1\""),
        (
            "special_lr_groups=[{keywords: [a], lrr: 1}]",
            "--set special_lr_groups=[{keywords: [a], lrr: 1}]: special_lr_groups.lrr: \
             unknown key; did you mean lr?",
        ),
    ];
    for (argument, message) in table {
        assert_eq!(Case::new("").set(argument).resolve().unwrap_err(), message, "{argument}");
    }
}

/// Parallel YAML, the world size that was started, and the exact error.
#[test]
fn bad_parallel_files_are_one_line() {
    let table = [
        (
            "distributed_type: TPU",
            "parallel.yaml:1:19: distributed_type: expected NO, MULTI_GPU, MULTI_CPU, FSDP or \
             DEEPSPEED, found the text \"TPU\"",
        ),
        (
            "num_processes: 0",
            "parallel.yaml:1:16: num_processes: expected an integer of at least 1, found 0",
        ),
        (
            "deepspeed_config:\n  zero_stagee: 1",
            "parallel.yaml:2:3: deepspeed_config.zero_stagee: unknown key; did you mean \
             zero_stage?",
        ),
        (
            "deepspeed_config: 3",
            "parallel.yaml:1:19: deepspeed_config: expected a mapping, found the number 3",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 4",
            "parallel.yaml:3:15: deepspeed_config.zero_stage: expected 0, 1, 2 or 3, found 4",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_clipping: much",
            "parallel.yaml:3:22: deepspeed_config.gradient_clipping: expected a number or \
             \"auto\", found the text \"much\"",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_clipping: -1",
            "parallel.yaml:3:22: deepspeed_config.gradient_clipping: expected 0 or more, found -1",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  offload_optimizer_device: nvme",
            "parallel.yaml:3:29: deepspeed_config.offload_optimizer_device: expected none or cpu, \
             found the text \"nvme\"",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 0\n  \
             offload_optimizer_device: cpu",
            "parallel.yaml:4:29: deepspeed_config.offload_optimizer_device: cpu needs zero_stage \
             1, 2 or 3, found 0",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  offload_param_device: cpu",
            "parallel.yaml:3:25: deepspeed_config.offload_param_device: cpu needs zero_stage 3",
        ),
        (
            "distributed_type: MULTI_GPU\nuse_cpu: true",
            "parallel.yaml:2:10: use_cpu: true, but distributed_type is MULTI_GPU; use MULTI_CPU, \
             or false",
        ),
        (
            "distributed_type: FSDP\nfsdp_config:\n  fsdp_activation_checkpointing_offload: true",
            "parallel.yaml:3:42: fsdp_config.fsdp_activation_checkpointing_offload: expected false, \
             found true: not done here; remove it",
        ),
        (
            "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 3",
            "parallel.yaml:3:17: fsdp_config.fsdp_version: expected 1 or 2, found 3",
        ),
        ("gpu_ids: 0,0", "parallel.yaml:1:10: gpu_ids: device 0 is given twice"),
        (
            "gpu_ids: '0,'",
            "parallel.yaml:1:10: gpu_ids: expected all, or device numbers such as 0,1",
        ),
        (
            "megatron_lm_config: {tp_degree: 2}",
            "parallel.yaml:1:1: megatron_lm_config: tensor, pipeline and context parallelism are \
             not done here",
        ),
        (
            "parallelism_config: {parallelism_config_dp_shard_size: 4, \
             parallelism_config_tp_size: 1, parallelism_config_dp_replicate_size: 2}",
            "parallel.yaml:1:128: parallelism_config.parallelism_config_dp_replicate_size: \
             expected 1, found the number 2: parameters are repeated over machines by \
             fsdp_reshard_after_forward: HYBRID_SHARD, or by fsdp_sharding_strategy: HYBRID_SHARD under \
             fsdp_version 1",
        ),
        ("use_cpuu: true", "parallel.yaml:1:1: use_cpuu: unknown key; did you mean use_cpu?"),
    ];
    for (yaml, message) in table {
        let mut case = Case::new("").parallel(yaml);
        case.sources.processes = Some(2);
        assert_eq!(case.resolve().unwrap_err(), message, "{yaml}");
    }
    let mut case = Case::new("").parallel("num_processes: 4").set("num_processes=2");
    case.sources.processes = Some(2);
    assert_eq!(case.resolve().unwrap().parallel.processes, Some(2));
    let mut case = Case::new("").parallel("num_processes: -1");
    case.sources.processes = Some(2);
    assert_eq!(case.resolve().unwrap().parallel.processes, Some(2));
}

/// Every row of the support table refuses with a position, on a plan that is otherwise valid.
#[test]
fn what_the_engine_cannot_do_is_refused() {
    let training = [
        (
            "num_labels: 2",
            "training.yaml:4:13: num_labels: 2 is not supported yet; use 1: a reranker gives one \
             score per pair",
        ),
        (
            "save_failure: ignore",
            "training.yaml:4:15: save_failure: expected stop or continue, found the text \"ignore\"",
        ),
    ];
    for (yaml, message) in training {
        assert_eq!(Case::new(yaml).load().unwrap_err(), message, "{yaml}");
    }
}

/// A file that is cut off, or whose bytes are damaged, is read or refused in one line.
#[test]
fn damaged_files_never_panic() {
    let whole = std::fs::read(super::shipped("training_bert.yaml")).unwrap();
    let mut case = Case::whole("");
    let parallel = case.directory.path().join("parallel.yaml");
    std::fs::copy(super::shipped("deepspeed/zero2.yaml"), &parallel).unwrap();
    case.sources.parallel = Some(parallel);
    for (round, at) in (0..whole.len()).step_by(5).enumerate() {
        let mut bytes = whole.clone();
        if round % 2 == 0 {
            bytes.truncate(at);
        } else {
            bytes[at] = b"\t:-{}[]&*!|>'\"%#\n\xff"[round % 18];
        }
        std::fs::write(&case.sources.training, &bytes).unwrap();
        if let Err(message) = case.resolve() {
            assert_eq!(message.lines().count(), 1, "{message}");
            assert!(message.starts_with("training.yaml:"), "{message}");
        }
    }
}
