//! Models by hub id: what is fetched and what is not, broken connections, refusals, and the cache
//! that training workers, scoring and Python read.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/fault_disk.rs"]
mod fault_disk;
#[path = "common/hub_server.rs"]
mod hub_server;
#[path = "common/launch.rs"]
mod launch;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hub_server::{COMMIT, HubServer, Manner, etag};
use launch::{copy_model, launcher, output_of, reranker, run};
use serde_json::Value;
use tempfile::TempDir;

const PAIRS: &str = "{\"query\": \"how to boil water\", \"content\": \"heat the water\"}\n";

/// A folder to work in, with data and a configuration that trains `org/name`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let record = r#"{"query": "how to boil water", "content": "heat the water", "label": 1}"#;
    let config = "model_name_or_path: org/name\nmodel_type: bert_encoder\n\
                  train_dataset: train.jsonl\noutput_dir: out\nmax_len: 32\nepochs: 1\n";
    fs::write(dir.path().join("train.jsonl"), format!("{record}\n{record}\n")).unwrap();
    fs::write(dir.path().join("t.yaml"), config).unwrap();
    fs::write(dir.path().join("pairs.jsonl"), PAIRS).unwrap();
    dir
}

/// The files of a golden model, with some that nobody here needs.
fn model(case: &str) -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    copy_model(case, &dir.path().join("m"));
    let files = fs::read_dir(dir.path().join("m")).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())
    });
    let mut files: BTreeMap<_, _> = files.collect();
    for extra in ["model.onnx", "onnx/model.onnx", "flax_model.msgpack", "README.md"] {
        files.insert(extra.into(), b"not needed".to_vec());
    }
    files
}

fn score(dir: &Path, name: &str) -> Command {
    reranker(dir, &["score", "--model", name, "--input", "pairs.jsonl", "--device", "cpu"])
}

/// The command with this server as its hub.
fn online<'a>(command: &'a mut Command, server: &HubServer) -> &'a mut Command {
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &server.url)
}

fn snapshot_of(dir: &Path) -> PathBuf {
    dir.join("hf/hub/models--org--name/snapshots").join(COMMIT)
}

fn error_of(command: &mut Command) -> String {
    let outcome = run(command);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    let line = outcome.stderr.lines().find(|line| line.starts_with("error: "));
    line.unwrap_or_else(|| panic!("no error in {}", outcome.stderr)).to_owned()
}

#[test]
fn a_launch_fetches_once_what_it_needs_and_records_the_revision() {
    let (dir, server) = (folder(), HubServer::start(model("bert_tiny"), Manner::default()));
    let args = ["--cpu", "--nproc", "2", "--config", "t.yaml"];
    output_of(online(&mut launcher(dir.path(), &args), &server));

    let listing = "GET /api/models/org/name/revision/main";
    assert_eq!(server.count(listing), 1, "only the check asks: {:?}", server.seen());
    let downloads: Vec<_> =
        server.seen().into_iter().filter(|l| l.starts_with("GET /cdn")).collect();
    assert_eq!(downloads, ["GET /cdn/model.safetensors"]);
    assert_eq!(server.count("GET /org/name/resolve"), 4, "{:?}", server.seen());
    let cached = fs::read_dir(snapshot_of(dir.path())).unwrap().count();
    assert_eq!(cached, 4, "config.json, two of the tokenizer, model.safetensors");

    let sidecar = fs::read_to_string(dir.path().join("out/model/reranker.json")).unwrap();
    let sidecar: Value = serde_json::from_str(&sidecar).unwrap();
    assert_eq!(
        (&sidecar["base_model"], &sidecar["base_revision"]),
        (&"org/name".into(), &COMMIT.into())
    );

    // From the cache, offline: the same scores as from the directory that the server serves.
    copy_model("bert_tiny", &dir.path().join("plain"));
    let (before, by_id) = (server.seen().len(), output_of(&mut score(dir.path(), "org/name")));
    assert_eq!(by_id, output_of(&mut score(dir.path(), "plain")));
    output_of(&mut score(dir.path(), &format!("org/name@{COMMIT}")));
    output_of(online(&mut score(dir.path(), "org/name"), &server));
    assert_eq!(server.seen().len(), before, "what is cached is not asked for");
}

#[test]
fn an_adapter_comes_with_what_it_has() {
    let dir = folder();
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lora_bert");
    let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let weights = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let config = config.replace("tests/golden/bert_tiny", "./base");
    copy_model("bert_tiny", &dir.path().join("base"));
    let files = BTreeMap::from([
        ("adapter_config.json".to_owned(), config.clone().into_bytes()),
        ("adapter_model.safetensors".to_owned(), weights.clone()),
        ("README.md".to_owned(), b"not needed".to_vec()),
    ]);
    let server = HubServer::start(files, Manner::default());
    let by_id = output_of(online(&mut score(dir.path(), "org/name"), &server));
    fs::create_dir(dir.path().join("adapter")).unwrap();
    fs::write(dir.path().join("adapter/adapter_config.json"), config).unwrap();
    fs::write(dir.path().join("adapter/adapter_model.safetensors"), weights).unwrap();
    assert_eq!(by_id, output_of(&mut score(dir.path(), "adapter")));
    assert_ne!(by_id, output_of(&mut score(dir.path(), "base")));
    let asked = server.seen().len();
    assert_eq!(by_id, output_of(online(&mut score(dir.path(), "org/name"), &server)));
    assert_eq!(server.seen().len(), asked, "what is cached is not asked for");
}

/// The cache as transformers or peft leaves it, which ask for nothing that they do not know.
fn cached_by_python(dir: &Path, files: &BTreeMap<String, Vec<u8>>, names: &[&str]) {
    let snapshot = snapshot_of(dir);
    fs::create_dir_all(&snapshot).unwrap();
    for name in names {
        fs::write(snapshot.join(name), &files[*name]).unwrap();
    }
    let refs = dir.join("hf/hub/models--org--name/refs");
    fs::create_dir_all(&refs).unwrap();
    fs::write(refs.join("main"), COMMIT).unwrap();
}

const SIDECAR: &str = r#"{"format_version": 1, "model_type": "bert_encoder",
    "query_format": "boil {}", "document_format": "{}", "seq": "", "special_token": "",
    "max_len": 16, "min_label": 0.0, "max_label": 1.0, "base_model": "x", "run": null,
    "metrics": null}"#;

/// What transformers leaves in the cache of a model.
const BY_TRANSFORMERS: [&str; 4] =
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

#[test]
fn a_model_that_python_cached_is_asked_once_for_its_sidecar() {
    let (dir, mut files) = (folder(), model("bert_tiny"));
    copy_model("bert_tiny", &dir.path().join("plain"));
    let without = output_of(&mut score(dir.path(), "plain"));
    fs::write(dir.path().join("plain/reranker.json"), SIDECAR).unwrap();
    let with = output_of(&mut score(dir.path(), "plain"));
    assert_ne!(with, without);

    // None there: one question, which Python's own mark spares.
    cached_by_python(dir.path(), &files, &BY_TRANSFORMERS);
    let server = HubServer::start(files.clone(), Manner::default());
    for _ in 0..2 {
        assert_eq!(output_of(online(&mut score(dir.path(), "org/name"), &server)), without);
        assert_eq!(server.count(""), 1, "{:?}", server.seen());
    }
    let mark = dir.path().join("hf/hub/models--org--name/.no_exist").join(COMMIT);
    assert_eq!(fs::read(mark.join("reranker.json")).unwrap(), b"");
    fs::remove_dir_all(mark).unwrap();

    // A hub that does not answer, and one that is not asked.
    let manner = Manner { refuses: Some(("404 Not Found", "")), ..Manner::default() };
    let outcome =
        run(online(&mut score(dir.path(), "org/name"), &HubServer::start(files.clone(), manner)));
    assert_eq!((outcome.code, &*outcome.stdout), (Some(0), &*without));
    assert!(
        outcome.stderr.contains("note: the Hugging Face cache holds org/name without reranker")
    );
    assert!(outcome.stderr.contains("does not tell whether it has one (HTTP 404)"));
    assert_eq!(output_of(&mut score(dir.path(), "org/name")), without);

    files.insert("reranker.json".into(), SIDECAR.into());
    let server = HubServer::start(files, Manner::default());
    for _ in 0..2 {
        assert_eq!(output_of(online(&mut score(dir.path(), "org/name"), &server)), with);
        assert_eq!(server.count("GET /org/name"), 1, "{:?}", server.seen());
    }
    assert_eq!(server.count("GET /cdn"), 0, "{:?}", server.seen());
}

/// Whatever keeps the sidecar of a whole model away, the model is used, and a line says so.
#[test]
fn a_whole_model_is_used_where_the_hub_or_the_cache_does_not_help() {
    let (dir, mut files) = (folder(), model("bert_tiny"));
    cached_by_python(dir.path(), &files, &BY_TRANSFORMERS);
    let without = output_of(&mut score(dir.path(), "org/name"));
    files.insert("reranker.json".into(), SIDECAR.into());
    let used = |command: &mut Command, why: &str| {
        let outcome = run(command);
        assert_eq!((outcome.code, &*outcome.stdout), (Some(0), &*without), "{}", outcome.stderr);
        let note = "note: the Hugging Face cache holds org/name without reranker.json, and";
        assert!(outcome.stderr.contains(note), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(why), "{}", outcome.stderr);
    };
    let kept = Manner { keeps: Some("503 Service Unavailable"), ..Manner::default() };
    let kept = HubServer::start(files.clone(), kept);
    used(online(&mut score(dir.path(), "org/name"), &kept), "cannot be fetched (HTTP 503)");
    let server = HubServer::start(files, Manner::default());
    let mut command = score(dir.path(), "org/name");
    used(
        online(&mut command, &server).env("REQUESTS_CA_BUNDLE", "/no/ca.pem"),
        "does not tell whether it has one (REQUESTS_CA_BUNDLE names /no/ca.pem: cannot read: No such",
    );
    // No directory can be made there, also by root.
    fs::write(dir.path().join("hf/hub/.locks"), "").unwrap();
    used(online(&mut score(dir.path(), "org/name"), &server), ".locks/models--org--name: cannot");
    assert_eq!(server.count("GET /org/name"), 0, "{:?}", server.seen());
}

/// A hub that takes connections and says nothing, as behind a firewall; how many it has taken.
struct Silent(std::net::TcpListener);

impl Silent {
    fn start() -> Self {
        Self(std::net::TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }

    fn connections(&self) -> usize {
        self.0.set_nonblocking(true).unwrap();
        std::iter::from_fn(|| self.0.accept().ok()).count()
    }
}

#[test]
fn workers_that_start_after_the_check_ask_nothing() {
    let dir = folder();
    cached_by_python(dir.path(), &model("bert_tiny"), &BY_TRANSFORMERS);
    let connections = |args: &[&str]| {
        let hub = Silent::start();
        let mut command = launcher(dir.path(), &[&["--cpu", "--nproc", "2"], args].concat());
        output_of(command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", hub.url()));
        hub.connections()
    };
    // What a training reads is all there.
    assert_eq!(connections(&["--config", "t.yaml"]), 0);
    // Its teacher may have a sidecar: the check asks, or without one a worker.
    let teacher = ["--config", "t.yaml", "--set", "teacher.model_name_or_path=org/name", "--set"];
    let distill = ["--", env!("CARGO_BIN_EXE_reranker"), "distill"];
    assert_eq!(connections(&[&teacher[..], &["output_dir=taught"]].concat()), 1);
    assert_eq!(connections(&[&distill, &teacher[..], &["output_dir=alone"]].concat()), 1);
    let score = ["--", env!("CARGO_BIN_EXE_reranker"), "score", "--device", "cpu", "--model"];
    let files = ["org/name", "--input", "pairs.jsonl", "--output", "scores.jsonl"];
    assert_eq!(connections(&[&score[..], &files].concat()), 1);
}

/// As on Lustre mounted with `noflock`.
#[test]
fn a_cache_on_a_file_system_without_locks_is_filled() {
    let files = model("bert_tiny");
    let (dir, server) = (folder(), HubServer::start(files.clone(), Manner::default()));
    let start = || {
        let mut command = score(dir.path(), "org/name");
        command.env("LD_PRELOAD", fault_disk::library()).env("FAULT_CALL", "flock");
        command.env("FAULT_PATH", "/hf/").env("FAULT_ERRNO", "38");
        online(&mut command, &server).spawn().unwrap()
    };
    let children: Vec<_> = (0..2).map(|_| start()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let got = fs::read(snapshot_of(dir.path()).join("model.safetensors")).unwrap();
    assert_eq!(got, files["model.safetensors"]);
}

/// peft fetches neither the tokenizer nor what stands around a pair.
#[test]
fn an_adapter_that_python_cached_is_completed() {
    let dir = folder();
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lora_bert");
    let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let weights = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    copy_model("bert_tiny", &dir.path().join("base"));
    let mut files = BTreeMap::from([
        (
            "adapter_config.json".to_owned(),
            config.replace("tests/golden/bert_tiny", "./base").into(),
        ),
        ("adapter_model.safetensors".to_owned(), weights),
        ("reranker.json".to_owned(), SIDECAR.into()),
    ]);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        files.insert(name.to_owned(), fs::read(dir.path().join("base").join(name)).unwrap());
    }
    fs::create_dir(dir.path().join("whole")).unwrap();
    for (name, bytes) in &files {
        fs::write(dir.path().join("whole").join(name), bytes).unwrap();
    }
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    cached_by_python(dir.path(), &files, &names);
    let server = HubServer::start(files, Manner::default());
    let expected = output_of(&mut score(dir.path(), "whole"));
    assert_eq!(output_of(online(&mut score(dir.path(), "org/name"), &server)), expected);
    assert_eq!(server.count("GET /org/name"), 3, "{:?}", server.seen());
}

#[test]
fn the_settings_of_a_tokenizer_are_no_tokenizer() {
    let (dir, files) = (folder(), model("bert_tiny"));
    let names = BY_TRANSFORMERS.into_iter().filter(|&name| name != "tokenizer.json");
    cached_by_python(dir.path(), &files, &names.collect::<Vec<_>>());
    let server = HubServer::start(files, Manner::default());
    output_of(online(&mut score(dir.path(), "org/name"), &server));
    assert_eq!(server.count("GET /org/name"), 1, "{:?}", server.seen());
}

#[test]
fn the_cache_is_the_one_of_huggingface_hub() {
    let (dir, files) = (folder(), model("bert_tiny"));
    let server = HubServer::start(files.clone(), Manner::default());
    output_of(online(&mut score(dir.path(), "org/name@v1"), &server));
    let root = dir.path().join("hf/hub/models--org--name");
    assert_eq!(fs::read_to_string(root.join("refs/v1")).unwrap(), COMMIT);
    let link = snapshot_of(dir.path()).join("model.safetensors");
    let bytes = &files["model.safetensors"];
    let target = Path::new("../../blobs").join(etag(bytes));
    assert_eq!(fs::read_link(&link).unwrap(), target);
    assert_eq!(&fs::read(&link).unwrap(), bytes);
    let left = fs::read_dir(root.join("blobs")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_str().unwrap().ends_with(".incomplete")));
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    for ignores_ranges in [false, true] {
        let (dir, files) = (folder(), model("bert_tiny"));
        let manner = Manner { cut_at: Some(3000), ignores_ranges, ..Manner::default() };
        let server = HubServer::start(files.clone(), manner);
        let outcome = run(online(&mut score(dir.path(), "org/name"), &server));
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("broke off at 3000 of"), "{}", outcome.stderr);
        let downloads: Vec<_> =
            server.seen().into_iter().filter(|line| line.starts_with("GET /cdn")).collect();
        assert_eq!(
            downloads,
            ["GET /cdn/model.safetensors", "GET /cdn/model.safetensors bytes=3000-"]
        );
        let got = fs::read(snapshot_of(dir.path()).join("model.safetensors")).unwrap();
        assert_eq!(got, files["model.safetensors"]);
    }
}

#[test]
fn what_an_ended_process_left_is_completed() {
    let files = model("bert_tiny");
    let bytes = &files["model.safetensors"];
    let too_long = [&bytes[..], b"x"].concat();
    for (left, expected) in [
        (&bytes[..1000], Some("GET /cdn/model.safetensors bytes=1000-")),
        (&bytes[..], None),
        (&too_long[..], Some("GET /cdn/model.safetensors")),
    ] {
        let (dir, server) = (folder(), HubServer::start(files.clone(), Manner::default()));
        let blobs = dir.path().join("hf/hub/models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", etag(bytes))), left).unwrap();
        output_of(online(&mut score(dir.path(), "org/name"), &server));
        let download = server.seen().into_iter().find(|line| line.starts_with("GET /cdn"));
        assert_eq!(download.as_deref(), expected);
        assert_eq!(&fs::read(snapshot_of(dir.path()).join("model.safetensors")).unwrap(), bytes);
    }
}

#[test]
fn processes_that_want_the_same_model_fetch_it_once() {
    let (dir, server) = (folder(), HubServer::start(model("bert_tiny"), Manner::default()));
    let start = || online(&mut score(dir.path(), "org/name"), &server).spawn().unwrap();
    let children: Vec<_> = (0..3).map(|_| start()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(server.count("GET /cdn/model.safetensors"), 1, "{:?}", server.seen());
}

#[test]
fn shards_are_fetched_by_their_index() {
    let (dir, server) = (folder(), HubServer::start(model("bert_odd"), Manner::default()));
    output_of(online(&mut score(dir.path(), "org/name"), &server));
    assert_eq!(server.count("GET /cdn/model-0000"), 3, "{:?}", server.seen());
    // A shard that is gone is fetched again, and nothing else.
    fs::remove_file(snapshot_of(dir.path()).join("model-00002-of-00003.safetensors")).unwrap();
    let blobs = dir.path().join("hf/hub/models--org--name/blobs");
    fs::remove_dir_all(blobs).unwrap();
    output_of(online(&mut score(dir.path(), "org/name"), &server));
    assert_eq!(server.count("GET /cdn/model-00002"), 2, "{:?}", server.seen());
}

#[test]
fn a_token_opens_a_private_model() {
    let manner = Manner { token: Some("hf_secret".into()), ..Manner::default() };
    let (dir, server) = (folder(), HubServer::start(model("bert_tiny"), manner));
    let error = error_of(online(&mut score(dir.path(), "org/name"), &server));
    assert_eq!(
        error,
        format!(
            "error: no directory \"org/name\" here, and {} has no such model, or hides it from \
             requests without a token (HTTP 401); give a directory, check the name, or set \
             HF_TOKEN to a token that may read it",
            server.url
        )
    );
    let error =
        error_of(online(score(dir.path(), "org/name").env("HF_TOKEN", "hf_wrong"), &server));
    assert!(error.contains("hides it from your token"), "{error}");
    fs::create_dir(dir.path().join("hf")).unwrap();
    fs::write(dir.path().join("hf/token"), "hf_secret\n").unwrap();
    output_of(online(&mut score(dir.path(), "org/name"), &server));
}

#[test]
fn refusals_are_told_apart() {
    for (status, code, expected) in [
        ("403 Forbidden", "GatedRepo", "refuses access to org/name (HTTP 403); accept its terms"),
        ("401 Unauthorized", "GatedRepo", "refuses access to org/name (HTTP 401)"),
        ("404 Not Found", "RepoNotFound", "has no such model"),
        ("400 Bad Request", "", "does not hand out org/name: HTTP 400"),
    ] {
        let manner = Manner { refuses: Some((status, code)), ..Manner::default() };
        let (dir, server) = (folder(), HubServer::start(model("bert_tiny"), manner));
        let error = error_of(online(&mut score(dir.path(), "org/name"), &server));
        assert!(error.contains(expected), "{error}");
        assert!(!dir.path().join("hf").exists(), "nothing is written");
    }
    let (dir, server) = (folder(), HubServer::start(model("bert_tiny"), Manner::default()));
    let error = error_of(online(&mut score(dir.path(), "org/name@v2"), &server));
    assert!(error.contains("has no revision \"v2\" of org/name"), "{error}");
    let mut files = model("bert_tiny");
    files.remove("model.safetensors");
    let server = HubServer::start(files, Manner::default());
    let error = error_of(online(&mut score(dir.path(), "org/name"), &server));
    assert!(error.contains("no weights there; expected model.safetensors or"), "{error}");
}

#[test]
fn without_a_hub_the_message_names_the_places() {
    let dir = folder();
    let error = error_of(&mut score(dir.path(), "org/name"));
    assert_eq!(
        error,
        "error: no directory \"org/name\" here, and the Hugging Face cache hf/hub does not hold \
         that model in full, while HF_HUB_OFFLINE forbids fetching it; give a directory, or fetch \
         the model once without HF_HUB_OFFLINE"
    );
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let mut command = score(dir.path(), "org/name");
    let error = error_of(command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &nobody));
    assert!(error.contains("the Hugging Face cache hf/hub does not hold"), "{error}");
    assert!(error.contains(&format!("fetching it from {nobody} failed: ")), "{error}");
    let mut command = reranker(dir.path(), &["check", "--config", "t.yaml"]);
    let error = error_of(&mut command);
    assert!(error.starts_with("error: t.yaml:1:21: model_name_or_path: no directory"), "{error}");
    for (name, expected) in [
        ("./org/name", "does not read as a hub id"),
        ("pairs.jsonl", "is a file, expected a model directory"),
    ] {
        let error = error_of(&mut score(dir.path(), name));
        assert!(error.contains(expected), "{error}");
    }
}
