//! What the driver says of this machine's GPUs, through NVML. The library is loaded at run time, so
//! that one binary serves machines without a driver.

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::Gpu;
use crate::procfs;

/// The name under which the driver installs NVML; the one without `.1` comes only with the
/// development package.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// The GPUs that this process may use, in their order, with those that cannot be read. NVML counts also those
/// of other jobs on this machine, which a control group keeps from this process; CUDA and nvidia-smi do not, and
/// so count the others from 0. Nor does CUDA count one that has fallen off the bus. Where its numbers may
/// not be NVML's, GPUs are named by their UUIDs.
///
/// # Errors
/// Why none can be listed.
pub fn gpus() -> Result<Vec<Gpu>, String> {
    let nvml = Nvml::builder().lib_path(LIBRARY.as_ref()).init().map_err(|error| match error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => {
            format!("no GPU was found (the NVIDIA driver's {LIBRARY} is not installed)")
        }
        other => format!("no GPU was found (NVML: {other})"),
    })?;
    let count = nvml.device_count().map_err(|error| format!("NVML cannot count GPUs: {error}"))?;
    let readings = (0..count).map(|index| read(&nvml, index));
    let allowed = readings.filter(|reading| !matches!(reading, Err(NvmlError::NoPermission)));
    let numbered = allowed.enumerate().map(|(number, reading)| {
        let unreadable =
            |error: NvmlError| Gpu { fault: Some(error.to_string()), ..Gpu::default() };
        Gpu { entry: number.to_string(), ..reading.unwrap_or_else(unreadable) }
    });
    let mut gpus: Vec<Gpu> = numbered.collect();
    if gpus.len() < count as usize || gpus.iter().any(|gpu| gpu.fault.is_some()) {
        let others = gpus.iter_mut().filter(|gpu| gpu.fault.is_none());
        others.for_each(|gpu| gpu.entry.clone_from(&gpu.uuid));
    }
    Ok(gpus)
}

/// One of them, without its number.
fn read(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    Ok(Gpu {
        entry: String::new(),
        uuid: device.uuid()?,
        slices: slices(&device),
        node: device.pci_info().ok().and_then(|pci| numa_node(&pci.bus_id)),
        holders: holders(&device),
        fault: None,
    })
}

/// The UUIDs of a GPU's MIG slices; none where it is not divided, or too old to be.
fn slices(device: &Device<'_>) -> Vec<String> {
    const ENABLED: u32 = 1;
    if !device.mig_mode().is_ok_and(|mode| mode.current == ENABLED) {
        return Vec::new();
    }
    // Numbers without a slice are gaps, not the end.
    let slices = (0..device.mig_device_count().unwrap_or(0))
        .filter_map(|index| device.mig_device_by_index(index).ok());
    slices.filter_map(|slice| slice.uuid().ok()).collect()
}

/// The processes that compute on a GPU.
fn holders(device: &Device<'_>) -> Vec<String> {
    let processes = device.running_compute_processes().unwrap_or_default();
    let describe = |pid: u32, memory: &UsedGpuMemory| {
        let name = procfs::name(pid as i32).map_or(String::new(), |name| format!(" ({name})"));
        let held = match memory {
            UsedGpuMemory::Used(bytes) => format!(" with {:.1} GB", *bytes as f64 / 1e9),
            UsedGpuMemory::Unavailable => String::new(),
        };
        format!("process {pid}{name}{held}")
    };
    processes.iter().map(|process| describe(process.pid, &process.used_gpu_memory)).collect()
}

/// The NUMA node of a PCI device such as `00000000:3B:00.0`: the kernel writes four digits of the
/// domain, and small letters. `None` on machines with one.
fn numa_node(bus_id: &str) -> Option<usize> {
    let (domain, rest) = bus_id.split_once(':')?;
    let domain = domain.get(domain.len().saturating_sub(4)..)?;
    let path = format!("/sys/bus/pci/devices/{domain}:{rest}/numa_node").to_lowercase();
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
