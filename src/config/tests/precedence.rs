//! Command line, training YAML, parallel YAML, default; whatever loses is reported once.

use super::Case;

/// A setting that all sources can give, as `(plan section, plan key)`, with its spelling in each.
struct Everywhere {
    section: &'static str,
    key: &'static str,
    parallel: &'static str,
    /// The values of command line, training YAML, parallel YAML and default, as JSON.
    values: [&'static str; 4],
}

const EVERYWHERE: &[Everywhere] = &[
    Everywhere {
        section: "training",
        key: "mixed_precision",
        parallel: "mixed_precision",
        values: ["fp16", "no", "bf16", "no"],
    },
    Everywhere {
        section: "training",
        key: "gradient_accumulation_steps",
        parallel: "deepspeed_config.gradient_accumulation_steps",
        values: ["7", "5", "3", "1"],
    },
    Everywhere {
        section: "training",
        key: "batch_size",
        parallel: "deepspeed_config.train_micro_batch_size_per_gpu",
        values: ["7", "5", "3", "8"],
    },
    Everywhere {
        section: "training",
        key: "max_grad_norm",
        parallel: "deepspeed_config.gradient_clipping",
        values: ["0.5", "2.0", "3.0", "null"],
    },
];

fn shown(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// Every subset of sources: the highest one present wins.
#[test]
fn the_highest_source_wins() {
    for setting in EVERYWHERE {
        for subset in 0..8 {
            let [from_option, from_training, from_parallel] =
                [4, 2, 1].map(|bit| subset & bit != 0);
            let [option, training, parallel, default] = setting.values;
            let yaml = |given: bool, key: &str, value: &str| {
                if given { format!("{key}: {value}\n") } else { String::new() }
            };
            let (top, nested) = match setting.parallel.split_once('.') {
                Some((_, key)) => (String::new(), yaml(from_parallel, key, parallel)),
                None => (yaml(from_parallel, setting.parallel, parallel), String::new()),
            };
            let mut case = Case::new(&yaml(from_training, setting.key, training)).parallel(
                &format!("distributed_type: DEEPSPEED\n{top}deepspeed_config:\n  {nested}"),
            );
            if from_option {
                case = case.set(&format!("{}={option}", setting.key));
            }
            let expected = match (from_option, from_training, from_parallel) {
                (true, _, _) => option,
                (_, true, _) => training,
                (_, _, true) => parallel,
                _ => default,
            };
            let plan = case.resolve().unwrap();
            let value = &plan.to_json()[setting.section][setting.key];
            assert_eq!(shown(value), expected, "{} {subset:03b}", setting.key);
            let given = [from_option, from_training, from_parallel];
            let losers = given.iter().filter(|given| **given).count().saturating_sub(1);
            assert_eq!(plan.notices.len(), losers, "{subset:03b} {:?}", plan.notices);
            let origin = plan.origins.get(setting.key).map(|origin| origin.place.to_string());
            let origin = origin.map(|origin| case.relative(&origin));
            let source = origin.as_deref().map(|origin| origin.split(':').next().unwrap());
            let winner = match (from_option, from_training, from_parallel) {
                (true, _, _) => Some("--set"),
                (_, true, _) => Some("training.yaml"),
                (_, _, true) => Some("parallel.yaml"),
                _ => None,
            };
            assert_eq!(source, winner, "{} {subset:03b}", setting.key);
        }
    }
}

#[test]
fn what_loses_is_reported_once() {
    let table = [
        (
            Case::new("lr: 5e-5\n").set("lr=2e-5"),
            vec!["lr: 2e-5 from --set overrides 5e-5 from training.yaml:4"],
        ),
        // Saying the same twice overrides nothing.
        (Case::new("lr: 2e-5\nquery_format: '[Q] {}'\n").set("lr=0.00002"), vec![]),
        (Case::new("query_format: '[Q] {}'\n").set("query_format=[Q] {}"), vec![]),
        // Doubled braces are braces.
        (Case::new("query_format: '{{}} {}'\n").set("query_format={{}} {}"), vec![]),
        (Case::new("").set("lr=2e-5"), vec![]),
        (
            Case::new("epochs: 3\n").set("epoch=1"),
            vec!["epochs: 1 from --set overrides 3 from training.yaml:4"],
        ),
        (
            Case::new("val_dataset: v.jsonl\n").set("val_dataset=null"),
            vec!["val_dataset: null from --set overrides v.jsonl from training.yaml:4"],
        ),
        (
            Case::new("").set("seed=1").set("seed=2"),
            vec!["seed: 2 from --set overrides 1 from --set"],
        ),
        (
            Case::new("mixed_precision: bf16\n").parallel("mixed_precision: fp16\n"),
            vec!["mixed_precision: bf16 from training.yaml:4 overrides fp16 from parallel.yaml:1"],
        ),
        (
            Case::new("")
                .parallel("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\n")
                .set("deepspeed_config.zero_stage=0"),
            vec!["deepspeed_config.zero_stage: 0 from --set overrides 3 from parallel.yaml:3"],
        ),
    ];
    for (case, notices) in table {
        assert_eq!(case.notices(), notices, "{:?}", case.sources.overrides);
    }
    let mut case = Case::new("resume: never\n");
    case.sources.resume = Some("auto".into());
    assert_eq!(case.notices(), ["resume: auto from --resume overrides never from training.yaml:4"]);
    let mut case = Case::new("").parallel("distributed_type: MULTI_GPU\n");
    case.sources.device = Some(super::Device::Cpu);
    assert_eq!(
        case.notices(),
        ["device: cpu from the command line overrides cuda from parallel.yaml:1"]
    );
}

/// `null` is the absence of a section as it is of a value, from the layer that says so down.
#[test]
fn null_takes_a_section_away() {
    let case = Case::new("lora: {r: 4}\n").set("lora=null");
    assert!(case.resolve().unwrap().training.lora.is_none());
    assert_eq!(case.notices(), ["lora: null from --set overrides {r: 4} from training.yaml:4"]);
    let case = Case::new("teacher: {model_name_or_path: big}\n").set("teacher=~");
    assert!(case.resolve().unwrap().data.teacher.is_none());
    // Below it is nothing to take away.
    let case = Case::new("lora:\n").set("lora.r=2");
    assert_eq!(case.resolve().unwrap().training.lora.unwrap().r, 2);
    assert_eq!(Case::new("lora:\n").set("lora=null").notices(), [""; 0]);
}

#[test]
fn auto_takes_the_training_yaml_s_value() {
    let deepspeed = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  \
                     gradient_accumulation_steps: auto\n  gradient_clipping: \"auto\"\n  \
                     train_micro_batch_size_per_gpu: 'auto'\n";
    let table = [
        ("", 1, 8, Some(1.0)),
        ("max_grad_norm: null\n", 1, 8, Some(1.0)),
        ("gradient_accumulation_steps: 3\nbatch_size: 2\nmax_grad_norm: 0.5\n", 3, 2, Some(0.5)),
    ];
    for (yaml, accumulation, batch_size, max_grad_norm) in table {
        let case = Case::new(yaml).parallel(deepspeed);
        let plan = case.resolve().unwrap();
        assert_eq!(plan.training.accumulation, accumulation);
        assert_eq!(plan.training.batch_size, batch_size);
        assert_eq!(plan.training.max_grad_norm, max_grad_norm);
        assert_eq!(plan.notices, [""; 0]);
    }
    let off = deepspeed.replace("\"auto\"", "0.0");
    assert_eq!(Case::new("").parallel(&off).resolve().unwrap().training.max_grad_norm, None);
}

/// As many workers as were started, whatever a file was written for; `--set` means what it says.
#[test]
fn the_launcher_decides_how_many_workers() {
    let case = |started| {
        let mut case = Case::new("").parallel("num_processes: 4");
        case.sources.processes = started;
        case
    };
    let plan = case(None).resolve().unwrap();
    assert_eq!((plan.parallel.processes, plan.notices.len()), (Some(4), 0));

    let given = case(Some(2));
    let plan = given.resolve().unwrap();
    assert_eq!(plan.parallel.processes, Some(2));
    assert_eq!(plan.origins["num_processes"].place.to_string(), "the launcher");
    let notice = "num_processes: 2 from the launcher overrides 4 from parallel.yaml:1";
    assert_eq!(given.notices(), [notice]);

    let error = case(Some(2)).set("num_processes=3").resolve().unwrap_err();
    assert_eq!(error, "--set num_processes=3: num_processes: this run has 2 processes; start 3");
}
