//! The machine and the programs that a run is done with.

use std::time::{SystemTime, UNIX_EPOCH};

use rr_launch::contract::WorkerEnv;
use serde_json::{Value, json};
use tch::Device;

use crate::torch_ext::runtime;

/// Rows of a name and what it is, in the order in which they are shown.
pub(super) fn describe(env: &WorkerEnv, device: Device) -> Value {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let memory: f64 = memory.trim_end_matches(" kB").parse().unwrap_or(0.0);
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let system = [read("/proc/sys/kernel/ostype"), read("/proc/sys/kernel/osrelease")];
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let workers = format!("{}, {} on this machine", env.world_size, env.local_world_size);
    let device = match device {
        Device::Cuda(number) => runtime::gpu_name(number)
            .map_or_else(|| format!("GPU {number}"), |name| format!("GPU {number}, {name}")),
        _ => "CPU".to_owned(),
    };
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let rows = [
        ("program", format!("reranker {}", env!("CARGO_PKG_VERSION"))),
        ("command", words.collect::<Vec<_>>().join(" ")),
        ("directory", std::env::current_dir().unwrap_or_default().display().to_string()),
        ("run", variable(rr_launch::contract::vars::RR_RUN_ID)),
        ("workers", workers),
        ("device of rank 0", device),
        ("threads", variable("OMP_NUM_THREADS")),
        ("host", read("/proc/sys/kernel/hostname").trim().to_owned()),
        ("processor", format!("{}, {cores} cores", field(&read("/proc/cpuinfo"), "model name"))),
        ("memory", format!("{:.1} GB", memory * 1024.0 / 1e9)),
        ("system", system.map(|part| part.trim().to_owned()).join(" ")),
    ];
    let rows = rows.into_iter().filter(|(_, value)| !value.is_empty());
    json!({"started": started, "rows": rows.collect::<Vec<_>>()})
}
