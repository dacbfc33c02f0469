//! Runs on GPUs that are none: the real programs and libtorch's own CUDA half over a stand-in for CUDA
//! whose kernels are computed on the host (`tests/fake_cuda`, docs/gpu-check.md). `scripts/gpu-check.sh
//! --stand-in` has every strategy, resumed runs and memory; here is what else there is.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::training::Bench;
use common::{floats, golden_dir, relative};
use reranker::model::ModelConfig;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Encoders and decoders without dropout, of which each has something of its own: absolute and rotary
/// positions, windows, shared key heads, `RMSNorm` with an offset.
const FAMILIES: [&str; 7] = [
    "bert_tiny",
    "roberta_tiny",
    "modernbert_tiny",
    "qwen2_tiny",
    "llama_odd",
    "mistral_tiny",
    "gemma_tiny",
];

/// The folder of the stand-in, built once; `None`, with a line that says why, where it cannot be.
fn stand_in() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let make = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("fake_cuda");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_cuda/build.sh");
        let built = Command::new(script).arg(&folder).output().unwrap();
        let stderr = String::from_utf8_lossy(&built.stderr);
        match built.status.code() {
            Some(0) => Some(folder),
            Some(2) => {
                eprintln!("skipped: {stderr}");
                None
            }
            _ => panic!("the stand-in does not build: {stderr}"),
        }
    };
    FOLDER.get_or_init(make).as_deref()
}

/// Has a command find `gpus` devices.
fn with_gpus(command: &mut Command, folder: &Path, gpus: usize) {
    let library = |name: &str| folder.join(name).display().to_string();
    command
        .env("LD_PRELOAD", [library("libcudart.so.13"), library("libfake_cuda.so")].join(":"))
        .env("LD_LIBRARY_PATH", folder)
        .env("FAKE_CUDA_DEVICES", gpus.to_string())
        .env("OMP_NUM_THREADS", "1")
        .env_remove("CUDA_VISIBLE_DEVICES");
}

/// The command that trains on `gpus` devices into `name`, or with one worker on the CPU.
fn command(bench: &Bench, name: &str, gpus: usize, settings: &[&str]) -> Command {
    let mut command = bench.command(name, 1, settings);
    if gpus > 0 {
        let launcher = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().skip(3).map(ToOwned::to_owned).collect();
        command = Command::new(launcher);
        command.current_dir(bench.root.path()).env_remove("RUST_LOG");
        command.args(["--gpus", "all"]).args(arguments);
        with_gpus(&mut command, stand_in().unwrap(), gpus);
    }
    command
}

fn train(bench: &Bench, name: &str, gpus: usize, settings: &[&str]) -> PathBuf {
    succeed(&mut command(bench, name, gpus, settings));
    bench.root.path().join(name)
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    output
}

/// The settings that train a golden model.
fn family(case: &str) -> Vec<String> {
    let dir = golden_dir(case);
    let mut settings = vec![format!("model_name_or_path={}", dir.display())];
    let config: Value =
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    if !config["model_type"].as_str().unwrap().contains("bert") {
        settings.extend(
            ["model_type=llm_decoder", "seq=\" : \"", "special_token=\"[SEP]\""].map(Into::into),
        );
    }
    settings
}

fn assert_same_weights(what: &str, ours: &Path, theirs: &Path, bound: f64) {
    let read = |run: &Path, file: &str| {
        let mut all = Tensor::read_safetensors(run.join("model").join(file)).unwrap();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let adapters = ours.join("model/adapter_model.safetensors").exists();
    let file = if adapters { "adapter_model.safetensors" } else { "model.safetensors" };
    let (ours, theirs) = (read(ours, file), read(theirs, file));
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        // Softmax does not see it: its gradient is what rounding leaves, which Adam makes large.
        if name.ends_with("key.bias") {
            continue;
        }
        let difference = relative(&floats(ours), &floats(theirs));
        assert!(difference <= bound, "{what}: {name} differs by {difference:.1e}");
    }
}

fn last_loss(run: &Path) -> f64 {
    let metrics = std::fs::read_to_string(run.join("runs/metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64()).next_back().unwrap()
}

#[test]
fn every_family_ends_with_the_weights_of_the_cpu() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    for case in FAMILIES {
        let settings = family(case);
        let mut settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        // The learning rate of a new head would hide differences of the trunk.
        settings.extend(["batch_size=8", "epochs=1", "special_lr_groups=[]"]);
        let cpu = train(&bench, &format!("{case}-cpu"), 0, &settings);
        let gpu = train(&bench, &format!("{case}-gpu"), 1, &settings);
        assert_same_weights(case, &gpu, &cpu, 1e-4);
        for low in ["mixed_precision=bf16", "mixed_precision=fp16"] {
            let run = train(&bench, &format!("{case}-{low}"), 1, &[&settings[..], &[low]].concat());
            let difference = (last_loss(&run) - last_loss(&cpu)).abs();
            assert!(difference <= 3e-2, "{case}, {low}: the loss is off by {difference}");
        }
    }
}

#[test]
fn gpus_before_ampere_train_in_every_precision() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    for case in ["bert_tiny", "qwen2_tiny"] {
        let settings = family(case);
        let mut settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        settings.extend(["batch_size=8", "epochs=1", "special_lr_groups=[]"]);
        let cpu = train(&bench, &format!("{case}-cpu"), 0, &settings);
        for precision in ["no", "bf16", "fp16"] {
            let name = format!("{case}-{precision}");
            let precision = format!("mixed_precision={precision}");
            let mut run = command(&bench, &name, 1, &[&settings[..], &[&precision]].concat());
            succeed(run.env("FAKE_CUDA_MAJOR", "7"));
            let difference = (last_loss(&bench.root.path().join(&name)) - last_loss(&cpu)).abs();
            assert!(difference <= 3e-2, "{name}: the loss is off by {difference}");
        }
    }
}

#[test]
fn adapters_and_recomputed_layers_over_two_gpus() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    let settings = family("qwen2_tiny");
    let mut settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    settings.extend(["lora.r=4", "lora.target_modules=all-linear", "lora.dropout=0", "epochs=1"]);
    settings.extend(["mixed_precision=no", "gradient_accumulation_steps=2", "lr=1e-2"]);
    let cpu = train(&bench, "cpu", 0, &[&settings[..], &["batch_size=8"]].concat());
    settings.extend(["batch_size=4", "gradient_checkpointing=true"]);
    let mut two = command(&bench, "gpus", 2, &settings);
    // Reductions in NVLink switches do not repeat their bits.
    two.args(["--parallel", "zero3.yaml"]).env("FAKE_NCCL_NVLS", "0");
    succeed(&mut two);
    assert_same_weights("LoRA", &bench.root.path().join("gpus"), &cpu, 1e-4);
    settings.push("deterministic=false");
    succeed(command(&bench, "fast", 2, &settings).env("FAKE_NCCL_NVLS", "unset"));
}

#[test]
fn a_run_goes_on_on_other_devices() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    let settings = ["mixed_precision=no", "gradient_accumulation_steps=2", "save_steps=2"];
    let whole = train(&bench, "whole", 0, &[&settings[..], &["batch_size=8"]].concat());
    for (name, gpus, batch) in [("on-one", 1, "batch_size=8"), ("on-cpu", 0, "batch_size=8")] {
        let begin = [&settings[..], &["batch_size=4"]].concat();
        let mut killed = command(&bench, name, 2, &begin);
        killed.args(["--parallel", "zero3.yaml"]).env("RR_FAIL_POINT", "before_manifest:2@0");
        assert!(!killed.output().unwrap().status.success(), "{name} was not killed");
        let again = succeed(&mut command(&bench, name, gpus, &[&settings[..], &[batch]].concat()));
        let stderr = String::from_utf8_lossy(&again.stderr);
        assert!(stderr.contains("step-2:"), "{name} did not go on from step 2: {stderr}");
        assert_same_weights(name, &bench.root.path().join(name), &whole, 1e-4);
    }
}

/// Streams of a GPU run beside each other unless told to wait, and the stand-in notices where they may not:
/// the other tests say that nothing is missing, and this one that it would be noticed.
#[test]
fn a_stream_that_does_not_wait_is_noticed() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    let settings = ["mixed_precision=no", "epochs=1", "gradient_accumulation_steps=2"];
    for strategy in ["zero1", "zero2", "zero3"] {
        for (waits, expected) in
            [("1", "what a collective writes on"), ("2", "a collective reads what")]
        {
            let mut run = command(&bench, &format!("{strategy}-{waits}"), 2, &settings);
            run.args(["--parallel", &format!("{strategy}.yaml")]);
            let output = run.env("FAKE_CUDA_LOSE_WAITS", waits).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{strategy} {waits}: {stderr}");
            assert!(stderr.contains("nothing makes it wait"), "{strategy} {waits}: {stderr}");
            assert!(stderr.contains(expected), "{strategy} {waits}: {stderr}");
        }
    }
}

/// Starts two workers on GPUs, stops rank 1 in the middle of training, and returns how the launch went.
fn stop_a_rank(bench: &Bench, name: &str, launcher: &[&str], worker: &[&str]) -> Output {
    let reranker = env!("CARGO_BIN_EXE_reranker");
    let mut command = Command::new(Path::new(reranker).with_file_name("rr-launch"));
    command.current_dir(bench.root.path()).env_remove("RUST_LOG").args(["--gpus", "0,1"]);
    command.args(launcher).args(["--", reranker, "train", "--config", "t.yaml"]);
    command.args([
        "--parallel",
        "zero3.yaml",
        "--set",
        "mixed_precision=no",
        "--set",
        "epochs=4000",
    ]);
    command.args(["--set", "gradient_accumulation_steps=2", "--set", "val_dataset=null"]);
    command.args(["--set", &format!("output_dir={name}")]).args(worker);
    with_gpus(&mut command, stand_in().unwrap(), 2);
    let errors = bench.root.path().join(format!("{name}.log"));
    command.stderr(std::fs::File::create(&errors).unwrap());
    let mut launch = command.spawn().unwrap();
    let metrics = bench.root.path().join(name).join("runs/metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        assert!(
            launch.try_wait().unwrap().is_none(),
            "{}",
            std::fs::read_to_string(errors).unwrap()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = worker_of_rank(launch.id(), "1");
    assert!(Command::new("kill").args(["-STOP", &pid]).status().unwrap().success());
    let status = launch.wait().unwrap();
    Output { status, stdout: Vec::new(), stderr: std::fs::read(errors).unwrap() }
}

/// The process below a launcher that has this rank.
fn worker_of_rank(launcher: u32, rank: &str) -> String {
    let wanted = format!("RANK={rank}");
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_it = |pid: &String| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = status.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        parent == Some(&launcher.to_string())
            && environ.split(|&byte| byte == 0).any(|word| word == wanted.as_bytes())
    };
    pids.find(is_it).expect("the worker runs")
}

#[test]
fn a_rank_that_stops_is_noticed_by_the_others_and_by_the_launcher() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    let output = stop_a_rank(&bench, "late", &[], &["--timeout", "8"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("timed out after 8 s; a peer is stuck, gone or slow"), "{stderr}");

    let flags = ["--hang-timeout", "10", "--stack-timeout", "0"];
    let output = stop_a_rank(&bench, "hung", &flags, &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(40), "{stderr}");
    assert!(stderr.contains("the others wait for rank 1"), "{stderr}");
    let waiting = stderr.lines().find(|line| line.contains("rr-launch: rank 0 (pid")).unwrap();
    let collectives = ["all_gather of ", "reduce_scatter of ", "all_reduce"];
    assert!(collectives.iter().any(|name| waiting.contains(name)), "{waiting}");
}

/// Two workers of a hybrid run, each a machine by itself, which no launcher watches.
fn hybrid_workers(bench: &Bench) -> [Child; 2] {
    let port = common::ranks::free_port().to_string();
    let worker = |rank: usize| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
        command.current_dir(bench.root.path()).env_remove("RUST_LOG");
        command.args([
            "train",
            "--config",
            "t.yaml",
            "--parallel",
            "hybrid.yaml",
            "--timeout",
            "60",
        ]);
        for setting in ["output_dir=hybrid", "epochs=4000", "val_dataset=null"] {
            command.args(["--set", setting]);
        }
        with_gpus(&mut command, stand_in().unwrap(), 2);
        let rank = rank.to_string();
        command.envs([("RANK", &*rank), ("GROUP_RANK", &*rank), ("CUDA_VISIBLE_DEVICES", &*rank)]);
        command.envs([("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")]);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &*port)]);
        let log = std::fs::File::create(bench.root.path().join(format!("{rank}.log"))).unwrap();
        command.stderr(log).spawn().unwrap()
    };
    [worker(0), worker(1)]
}

/// The end of a communicator waits for the device, on which the collective of another may wait for the
/// rank that is dead.
#[test]
fn all_communicators_of_a_rank_end_at_once_when_another_rank_dies() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    let [mut survivor, mut victim] = hybrid_workers(&bench);
    let metrics = bench.root.path().join("hybrid/runs/metrics.jsonl");
    let log = || std::fs::read_to_string(bench.root.path().join("0.log")).unwrap();
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        assert!(survivor.try_wait().unwrap().is_none(), "{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    // Far below --timeout, far above what it takes.
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        match survivor.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            None => {
                survivor.kill().unwrap();
                panic!("it waits still: {}", log());
            }
        }
    };
    assert_eq!(status.code(), Some(1), "{status}: {}", log());
    assert!(log().contains("rank 1 has ended"), "{}", log());
}

#[test]
fn one_and_two_gpus_score_as_the_cpu_does() {
    let Some(folder) = stand_in() else { return };
    let bench = Bench::new(0.0);
    let reranker = env!("CARGO_BIN_EXE_reranker");
    let score = |command: &mut Command, output: &str| -> (Vec<f64>, bool) {
        command.current_dir(bench.root.path()).args(["score", "--input", "pairs.jsonl"]);
        command.args(["--model", "base", "--output", output]).env_remove("RUST_LOG");
        let said = succeed(command.env("FAKE_CUDA_TRACE", "1")).stderr;
        let text = std::fs::read_to_string(bench.root.path().join(output)).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let logits = lines.map(|line| line["logit"].as_f64().unwrap()).collect();
        (logits, String::from_utf8_lossy(&said).contains("fake CUDA: aten::"))
    };
    // Which device it is to be nobody says: it is a GPU where the driver lists one.
    let alone = |limit| {
        let mut command = Command::new(reranker);
        with_gpus(&mut command, folder, 2);
        command.envs(limit);
        command
    };
    let (cpu, on_gpu) = score(&mut alone(Some(("CUDA_VISIBLE_DEVICES", "-1"))), "cpu.jsonl");
    assert!(!on_gpu && cpu.len() == 53);
    let mut launched = Command::new(Path::new(reranker).with_file_name("rr-launch"));
    launched.args(["--gpus", "0,1", "--", reranker]);
    with_gpus(&mut launched, folder, 2);
    for (command, name) in [(&mut launched, "two.jsonl"), (&mut alone(None), "one.jsonl")] {
        let (logits, on_gpu) = score(command, name);
        assert!(on_gpu && common::worst(&logits, &cpu) <= 1e-5, "{name}");
    }
}

/// A model and texts large enough that what the allocator rounds does not count: the golden one's
/// tokenizer, wider layers, a vocabulary whose gradient is the largest tensor of all or is not.
fn write_wide_model(bench: &Bench, vocabulary: i64) {
    let dir = bench.root.path().join(format!("wide-{vocabulary}"));
    std::fs::create_dir(&dir).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden_dir("bert_tiny").join(name), dir.join(name)).unwrap();
    }
    let config = std::fs::read(golden_dir("bert_tiny").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    for (key, value) in [
        ("vocab_size", vocabulary),
        ("hidden_size", 256),
        ("intermediate_size", 1024),
        ("num_hidden_layers", 3),
        ("max_position_embeddings", 128),
    ] {
        config[key] = value.into();
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let stages = reranker::model::stages(&ModelConfig::from_dir(&dir).unwrap());
    let parts = stages.iter().flat_map(|stage| stage.parameters()).flat_map(|each| each.parts);
    let weights: Vec<_> = parts
        .map(|part| (part.name, Tensor::randn(&part.shape, (Kind::Float, Device::Cpu)) * 0.02))
        .collect();
    Tensor::write_safetensors(&weights, dir.join("model.safetensors")).unwrap();
    let record = serde_json::json!({"query": "tea", "content": "water ".repeat(200), "label": 1});
    std::fs::write(bench.root.path().join("long.jsonl"), format!("{record}\n").repeat(32)).unwrap();
}

/// The allocator is libtorch's own, so that the peak is that of a GPU, but for what kernels themselves
/// ask for.
#[test]
fn a_run_needs_what_was_forecast() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    for (vocabulary, batch) in [(2_000, "batch_size=32"), (80_000, "batch_size=8")] {
        write_wide_model(&bench, vocabulary);
        let model = format!("model_name_or_path=wide-{vocabulary}");
        for precision in ["mixed_precision=no", "mixed_precision=bf16"] {
            for recompute in ["gradient_checkpointing=false", "gradient_checkpointing=true"] {
                let name = format!("{vocabulary}-{precision}-{recompute}");
                let data =
                    ["train_dataset=long.jsonl", "val_dataset=null", "max_len=128", "epochs=1"];
                let settings = [&data[..], &[&model, batch, precision, recompute]].concat();
                let output = succeed(&mut command(&bench, &name, 1, &settings));
                let stderr = String::from_utf8_lossy(&output.stderr);
                let forecast =
                    stderr.split(" MB in all").next().unwrap().rsplit(' ').next().unwrap();
                let forecast = forecast.parse::<f64>().unwrap() * 1e6;
                let metrics = bench.root.path().join(&name).join("runs/metrics.jsonl");
                let metrics = std::fs::read_to_string(metrics).unwrap();
                let memory =
                    metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
                let memory = memory.rev().find(|line| line["type"] == "memory").unwrap();
                let peak = memory["peak_gpu"].as_f64().unwrap();
                assert!(
                    peak <= 1.01 * forecast && peak >= 0.75 * forecast,
                    "{name}: {peak} bytes at most, forecast {forecast}"
                );
            }
        }
    }
}

#[test]
fn what_a_gpu_lacks_is_one_line() {
    if stand_in().is_none() {
        return;
    }
    let bench = Bench::new(0.0);
    write_wide_model(&bench, 2_000);
    let wide = ["model_name_or_path=wide-2000", "train_dataset=long.jsonl", "max_len=128"];
    let mut full = command(&bench, "full", 1, &[&wide[..], &["batch_size=32"]].concat());
    let output = full.env("FAKE_CUDA_MB", "128").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let line = stderr.lines().find(|line| line.contains("CUDA out of memory")).unwrap();
    assert!(line.contains("Tried to allocate") && line.contains("is free; lower batch_size"));
    assert!(line.ends_with("divide more"), "{line}");
    assert!(!bench.root.path().join("full/model").exists());

    let mut absent = Command::new(env!("CARGO_BIN_EXE_reranker"));
    absent.current_dir(bench.root.path()).args(["train", "--device", "cuda", "--config", "t.yaml"]);
    absent.args(["--set", "output_dir=absent"]);
    with_gpus(&mut absent, stand_in().unwrap(), 0);
    let output = absent.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("libtorch sees no CUDA device"), "{stderr}");
    assert!(!bench.root.path().join("absent").exists());
}
