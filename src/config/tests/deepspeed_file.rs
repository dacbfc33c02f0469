//! A `DeepSpeed` JSON file in the place of the `deepspeed_config` section.

use super::Case;
use crate::config::{Precision, Strategy, ZeroStage};

/// A case whose parallel YAML points to a JSON file with `json`, and says `beside` on its line 4.
fn case(training: &str, json: &str, beside: &str) -> Case {
    let case = Case::new(training);
    let path = case.directory.path().join("ds.json");
    std::fs::write(&path, json).unwrap();
    let path = path.display();
    case.parallel(&format!(
        "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {path}\n{beside}"
    ))
}

const ZERO2: &str = "\"zero_optimization\": {\"stage\": 2}";

/// As transformers' documentation has it, optimizer and scheduler left out; indented by tabs.
const AS_WRITTEN: &str = r#"{
	"fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
	"bf16": {"enabled": true},
	"zero_optimization": {
		"stage": 3,
		"offload_optimizer": {"device": "cpu", "pin_memory": true},
		"offload_param": {"device": "cpu", "pin_memory": true},
		"overlap_comm": true,
		"sub_group_size": 1e9,
		"reduce_bucket_size": "auto"
	},
	"gradient_accumulation_steps": 4,
	"gradient_clipping": 0.5,
	"steps_per_print": 2000,
	"communication_data_type": "fp32",
	"train_batch_size": "auto",
	"train_micro_batch_size_per_gpu": 6,
	"wall_clock_breakdown": false
}
"#;

#[test]
fn every_setting_arrives() {
    let case = case("", AS_WRITTEN, "");
    let plan = case.resolve().unwrap();
    assert_eq!(plan.parallel.strategy, Strategy::Zero { stage: ZeroStage::Three });
    assert!(plan.parallel.offload_optimizer && plan.parallel.offload_parameters);
    assert_eq!(plan.training.precision, Precision::Bf16);
    assert_eq!((plan.training.accumulation, plan.training.batch_size), (4, 6));
    assert_eq!(plan.training.max_grad_norm, Some(0.5));
    assert!(plan.training.reduce_in_fp32);
    assert_eq!(
        case.notices(),
        ["ds.json: without meaning here, ignored: steps_per_print, wall_clock_breakdown, \
          zero_optimization.overlap_comm, zero_optimization.reduce_bucket_size, \
          zero_optimization.sub_group_size, zero_optimization.offload_optimizer.pin_memory, \
          zero_optimization.offload_param.pin_memory, fp16.hysteresis, fp16.loss_scale_window"]
    );
    let origin = &plan.origins["offload_optimizer"];
    assert_eq!(
        (origin.place.line, origin.key.as_str()),
        (6, "zero_optimization.offload_optimizer.device")
    );
}

#[test]
fn auto_and_silence_leave_it_to_the_training_file() {
    let training = "batch_size: 3\ngradient_accumulation_steps: 2\nmixed_precision: fp16\n";
    let json = r#"{"zero_optimization": {"overlap_comm": true}, "bf16": {"enabled": "auto"}, "gradient_clipping":
        "auto", "train_micro_batch_size_per_gpu": "auto"}"#;
    let plan = case(training, json, "").resolve().unwrap();
    // DeepSpeed's default stage is 0.
    assert_eq!(plan.parallel.strategy, Strategy::Ddp);
    assert_eq!((plan.training.accumulation, plan.training.batch_size), (2, 3));
    assert_eq!(plan.training.precision, Precision::Fp16);
    assert_eq!(plan.training.max_grad_norm, Some(1.0));

    let both = r#"{"zero_optimization": {"stage": 1}, "bf16": {"enabled": false},
        "fp16": {"enabled": false}, "gradient_accumulation_steps": 8}"#;
    let case = case(training, both, "");
    assert_eq!(
        case.notices(),
        [
            "gradient_accumulation_steps: 2 from training.yaml:5 overrides 8 from ds.json:2",
            "mixed_precision: fp16 from training.yaml:6 overrides no from ds.json:1",
        ]
    );
}

#[test]
fn the_whole_batch_has_to_be_what_its_parts_come_to() {
    let json = format!("{{{ZERO2}, \"train_batch_size\": 64}}");
    let mut case = case("batch_size: 8\n", &json, "num_processes: 2\n");
    assert_eq!(
        case.resolve().unwrap_err(),
        "ds.json:1:57: train_batch_size: 64, but 8 per worker x 1 accumulation step(s) x 2 \
         worker(s) is 16; write 16 or \"auto\""
    );
    case.sources.overrides.push("gradient_accumulation_steps=4".into());
    assert!(case.resolve().is_ok());
}

#[test]
fn what_is_wrong_in_the_file_is_one_line_with_a_position() {
    let table = [
        ("{\"a\": }", "ds.json:1:7: not valid JSON: expected value"),
        ("zero_stage: 2", "ds.json:1:1: not valid JSON: expected value"),
        ("[]", "ds.json:1:1: expected an object, found a list"),
        (
            "{\"fp16\": {}}",
            "parallel.yaml:3:26: deepspeed_config.deepspeed_config_file: ds.json has no \
             zero_optimization; expected one with a stage",
        ),
        (
            "{\"zero_optimization\": {\n  \"stage\": 5}}",
            "ds.json:2:12: zero_optimization.stage: expected 0, 1, 2 or 3, found 5",
        ),
        (
            "{\"zero_optimization\": {\"stage\": 2, \"stge\": 2}}",
            "ds.json:1:36: zero_optimization.stge: unknown key; did you mean stage?",
        ),
        (
            "{\"zero_optimization\": {\"stage\": 2,\n \"offload_param\": {\"device\": \"cpu\"}}}",
            "ds.json:2:30: zero_optimization.offload_param.device: cpu needs zero_stage 3",
        ),
        (
            "{\"zero_optimization\": {\"stage\": 0,\n \"offload_optimizer\": {\"device\": \"cpu\"}}}",
            "ds.json:2:34: zero_optimization.offload_optimizer.device: cpu needs zero_stage 1, 2 \
             or 3, found 0",
        ),
        (
            "{\"zero_optimization\": {\"stage\": 2,\n \"offload_optimizer\": {\"device\": \"nvme\"}}}",
            "ds.json:2:34: zero_optimization.offload_optimizer.device: expected none or cpu, \
             found the text \"nvme\"",
        ),
        (
            "{\"zero_optimization\": {\"stage\": 1, \"cpu_offload\": true}}",
            "ds.json:1:51: zero_optimization.cpu_offload: expected false, found true: an old \
             name; write \"offload_optimizer\": {\"device\": \"cpu\"}",
        ),
    ];
    for (json, message) in table {
        assert_eq!(case("", json, "").resolve().unwrap_err(), message, "{json}");
    }
}

#[test]
fn fp32_sums_over_workers_or_micro_batches_are_fp32_sums() {
    let of = |types: &str| {
        let json = format!("{{{ZERO2}, \"bf16\": {{\"enabled\": true}}{types}}}");
        case("", &json, "").resolve().map(|plan| plan.training.reduce_in_fp32)
    };
    let sums = |dtype: &str| format!(", \"data_types\": {{\"grad_accum_dtype\": {dtype}}}");
    let fp32 = sums("\"fp32\"");
    assert_eq!(of(&fp32), Ok(true));
    assert_eq!(of(&sums("\"bf16\"")), Ok(false));
    assert_eq!(of(&sums("null")), Ok(false));
    assert_eq!(of(&format!("{fp32}, \"communication_data_type\": \"bf16\"")), Ok(true));
    let both = format!("{}, \"communication_data_type\": \"fp32\"", sums("\"bf16\""));
    assert_eq!(of(&both), Ok(true));
    let error = of(&sums("\"fp16\"")).unwrap_err();
    let end = "data_types.grad_accum_dtype: expected fp32 or the precision of the gradients, which is \
               bf16, found fp16";
    assert!(error.ends_with(end), "{error}");
}

#[test]
fn what_is_not_done_here_is_refused() {
    let table = [
        (
            "\"bf16\": {\"enabled\": true}, \"fp16\": {\"enabled\": true}",
            "ds.json:2:21: bf16.enabled: fp16.enabled is true as well; keep one of them",
        ),
        (
            "\"fp16\": {\"enabled\": true, \"loss_scale\": 128}",
            "ds.json:2:41: fp16.loss_scale: expected 0, found the number 128: the loss scale is \
             dynamic here",
        ),
        (
            "\"communication_data_type\": \"fp16\"",
            "ds.json:2:28: communication_data_type: expected fp32 or the precision of the \
             gradients, which is no, found fp16",
        ),
        (
            "\"optimizer\": {\"type\": \"AdamW\"}",
            "ds.json:2:1: optimizer: it is AdamW, as the training YAML sets it (lr, \
             weight_decay); remove the section",
        ),
        (
            "\"scheduler\": {\"type\": \"WarmupLR\"}",
            "ds.json:2:1: scheduler: it is the training YAML's (warmup_proportion, \
             stable_proportion); remove the section",
        ),
        ("\"amp\": {\"enabled\": true}", "ds.json:2:1: amp: not done here; use bf16 or fp16"),
    ];
    for (json, message) in table {
        let json = format!("{{{ZERO2},\n{json}}}");
        assert_eq!(case("", &json, "").resolve().unwrap_err(), message, "{json}");
    }
    let off = format!("{{{ZERO2}, \"amp\": {{\"enabled\": false}}}}");
    assert!(case("", &off, "").resolve().is_ok());
}

#[test]
fn the_same_setting_beside_the_file_is_refused() {
    let json = format!("{{{ZERO2}}}");
    let table = [
        ("  zero_stage: 2\n", "4:15: deepspeed_config.zero_stage"),
        ("  gradient_clipping: auto\n", "4:22: deepspeed_config.gradient_clipping"),
        ("  offload_param_device: none\n", "4:25: deepspeed_config.offload_param_device"),
        ("mixed_precision: 'no'\n", "4:18: mixed_precision"),
    ];
    for (beside, start) in table {
        let error = case("", &json, beside).resolve().unwrap_err();
        let end = "deepspeed_config_file names ds.json, which decides this; write it there";
        assert_eq!(error, format!("parallel.yaml:{start}: {end}"));
    }
    assert!(case("", &json, "  zero3_init_flag: true\n").resolve().is_ok());
}

#[test]
fn a_file_that_is_not_there_is_named_where_it_is_asked_for() {
    let case = case("", "", "");
    std::fs::remove_file(case.directory.path().join("ds.json")).unwrap();
    assert_eq!(
        case.resolve().unwrap_err(),
        "parallel.yaml:3:26: deepspeed_config.deepspeed_config_file: cannot read ds.json: No such \
         file or directory (os error 2)"
    );
}
