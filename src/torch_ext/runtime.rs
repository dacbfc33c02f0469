//! Process-wide settings, made once at start-up.

use std::ffi::c_int;
use std::os::unix::process::CommandExt as _;
use std::sync::{Once, OnceLock};

use rr_launch::contract::{gpu_is_visible, says_how_threads_wait, vars};
use tch::{Kind, Tensor};

use super::{check, ffi};
use crate::config;
use crate::error::{Error, Result};

/// The name under which the driver installs NVML.
const NVML_LIBRARY: &str = "libnvidia-ml.so.1";

/// Set by `srun --gpus-per-task`, which shows each task no GPU but its own.
const ONE_EACH: &str = "SLURM_GPUS_PER_TASK";

/// Which workspaces cuBLAS gets, as libtorch reads it too.
const CUBLAS_WORKSPACE: &str = "CUBLAS_WORKSPACE_CONFIG";

/// Those with which its results are repeatable, the faster first (cuBLAS library documentation, section
/// "Results Reproducibility").
const REPEATABLE_WORKSPACES: [&str; 2] = [":4096:8", ":16:8"];

/// Tells glibc to keep freed memory instead of giving it back to the kernel. libtorch asks for and
/// frees the same large tensors every step; with the default settings each of them is mapped,
/// zeroed page by page and unmapped again, which costs a large share of a step on the CPU.
/// Call it before the first tensor exists.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt only stores parameters; no other thread runs yet.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
            libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        }
    }
}

/// Has a write beyond the limit on the size of files (`ulimit -f`) fail, as on a full disk, where it would
/// end this process by SIGXFSZ.
pub fn outlive_file_size_limit() {
    // SAFETY: no handler of this program is replaced.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Runs this program anew with OpenMP threads that sleep where they wait for one another, unless the
/// environment says how they are to wait or there is but one. By default each spins for milliseconds
/// at the end of every parallel loop, of which a step has thousands. On cores that other programs use as
/// well, the one that is waited for then has no core to run on: a small model trained fifteen times
/// slower. libgomp reads the variable when it is loaded, before `main`; rr-launch sets it for its workers.
/// To be called before anything has begun; where it returns, the program goes on as it is.
pub fn sleep_while_waiting() {
    let is_alone = std::env::var_os(vars::OMP_NUM_THREADS).is_some_and(|threads| threads == "1");
    if is_alone || says_how_threads_wait() {
        return;
    }
    let mut words = std::env::args_os();
    let (Ok(program), Some(name)) = (std::env::current_exe(), words.next()) else { return };
    let mut anew = std::process::Command::new(program);
    let _failure = anew.arg0(name).args(words).env(vars::OMP_WAIT_POLICY, "passive").exec();
}

/// NCCL's in-switch reductions (NVLink SHARP), and the choice among its algorithms as a whole.
const NCCL_NVLS: &str = "NCCL_NVLS_ENABLE";
const NCCL_ALGORITHMS: &str = "NCCL_ALGO";

/// Has NCCL reduce without the NVLink switches, which add up in another order every time (NVIDIA/nccl
/// issue 1497), unless the environment says how it is to reduce. NCCL reads it when its first communicator
/// is made. To be called while this process has one thread.
pub fn keep_switches_from_reducing() {
    if [NCCL_NVLS, NCCL_ALGORITHMS].iter().all(|name| std::env::var_os(name).is_none()) {
        // SAFETY: no other thread could look at the environment meanwhile.
        unsafe { std::env::set_var(NCCL_NVLS, "0") };
    }
}

/// Gives cuBLAS workspaces of a fixed size, with which its results do not depend on what else runs, unless
/// the environment says what it gets. To be called while this process has one thread.
pub fn fix_cublas_workspace() {
    if std::env::var_os(CUBLAS_WORKSPACE).is_none() {
        // SAFETY: no other thread could look at the environment meanwhile.
        unsafe { std::env::set_var(CUBLAS_WORKSPACE, REPEATABLE_WORKSPACES[0]) };
    }
}

/// Has libtorch take algorithms on GPUs that give the same bits every time. By default the backward passes
/// of attention and of row selections add up in whatever order threads come by. Every operation of
/// training has such an algorithm (`torch.use_deterministic_algorithms` lists those that have none).
///
/// # Errors
/// What the environment has that stands in the way.
pub fn use_deterministic_algorithms() -> std::result::Result<(), String> {
    let workspace = std::env::var(CUBLAS_WORKSPACE).unwrap_or_default();
    if !REPEATABLE_WORKSPACES.contains(&&*workspace) {
        return Err(format!(
            "cuBLAS gives the same bits every time with the environment's \
             {CUBLAS_WORKSPACE}={}, and there it is {workspace:?}; unset that variable, or set \
             deterministic: false",
            REPEATABLE_WORKSPACES.join(" or ")
        ));
    }
    // SAFETY: sets two flags of the process.
    let result = unsafe { ffi::rr_deterministic_algorithms() };
    check(result)
}

/// Calls every function of MKL's vector library that libtorch uses once, on one number and so on one
/// thread. The library decides at a function's first call which of its kernels to take; where several
/// threads make that call at once, one of them may get the kernel of half the accuracy for its share,
/// and a process in twenty has scores that are 1e-4 off (pytorch/pytorch issue 188792, libtorch 2.11).
/// To be called before anything is computed; a second call does nothing.
pub fn settle_vector_functions() {
    static SETTLED: Once = Once::new();
    SETTLED.call_once(|| {
        for kind in [Kind::Float, Kind::Double] {
            let half = Tensor::full([1], 0.5, (kind, tch::Device::Cpu));
            for function in [
                Tensor::acos,
                Tensor::asin,
                Tensor::atan,
                Tensor::cos,
                Tensor::cosh,
                Tensor::erf,
                Tensor::erfc,
                Tensor::erfinv,
                Tensor::exp,
                Tensor::expm1,
                Tensor::log,
                Tensor::log10,
                Tensor::log1p,
                Tensor::log2,
                Tensor::sin,
                Tensor::sinh,
                Tensor::sqrt,
                Tensor::tan,
                Tensor::tanh,
            ] {
                drop(function(&half));
            }
        }
    });
}

/// The dtype that stages compute in.
#[must_use]
pub fn kind_of(precision: config::Precision) -> Kind {
    match precision {
        config::Precision::Fp32 => Kind::Float,
        config::Precision::Bf16 => Kind::BFloat16,
        config::Precision::Fp16 => Kind::Half,
    }
}

/// The device of a process: `asked` for, else a GPU where there is one. `number` is the GPU's among
/// those that the process sees.
///
/// # Errors
/// [`Error::Usage`] when a GPU is asked for or seen, but cannot be used.
pub fn device(asked: Option<config::Device>, number: usize) -> Result<tch::Device> {
    match kind_of_device(asked) {
        config::Device::Cpu => Ok(tch::Device::Cpu),
        config::Device::Cuda => {
            load_cuda()?;
            let devices = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
            let own = std::env::var_os(ONE_EACH).is_some();
            visible_number(number, devices, own).map(tch::Device::Cuda)
        }
    }
}

/// The number under which a process sees its GPU, among `devices`: `number`, or the only one there is
/// where each process sees its `own` alone.
fn visible_number(number: usize, devices: usize, own: bool) -> Result<usize> {
    match (number < devices, devices) {
        (true, _) => Ok(number),
        (false, 1) if own => Ok(0),
        (false, _) => Err(Error::Usage(format!(
            "GPU number {number} is needed here, but libtorch sees {devices}"
        ))),
    }
}

/// The kind of device of a process: `asked` for, else a GPU where it may use one. The driver is asked
/// once.
#[must_use]
pub fn kind_of_device(asked: Option<config::Device>) -> config::Device {
    static SEEN: OnceLock<bool> = OnceLock::new();
    asked.unwrap_or_else(|| match SEEN.get_or_init(gpu_is_visible) {
        true => config::Device::Cuda,
        false => config::Device::Cpu,
    })
}

/// Loads libtorch's CUDA half into the process, which registers the CUDA device with the CPU half
/// this binary is linked to. One binary so serves machines with and without a GPU.
///
/// # Errors
/// [`Error::Usage`] when the library or what it needs is not there, or no device answers.
pub fn load_cuda() -> Result<()> {
    let name = c"libtorch_cuda.so";
    // SAFETY: a plain dlopen; the library's constructors register kernels and nothing else.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: dlerror returns null or a string that lives until the next dl call.
        let reason = unsafe {
            let text = libc::dlerror();
            if text.is_null() {
                String::from("no reason given")
            } else {
                std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        return Err(Error::Usage(format!(
            "cannot load libtorch's CUDA library: {reason}; run scripts/setup.sh --cuda and build \
             again, or choose the CPU (rr-launch --cpu, reranker --device cpu)"
        )));
    }
    if !tch::Cuda::is_available() {
        return Err(Error::Usage(
            "libtorch sees no CUDA device; check the driver with nvidia-smi, or choose the \
             CPU (rr-launch --cpu, reranker --device cpu)"
                .into(),
        ));
    }
    Ok(())
}

/// Ends this process as SIGKILL does, for tests of what is left behind then.
pub fn kill_this_process() -> ! {
    // SAFETY: kill() touches no memory of ours.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    std::process::abort()
}

/// Memory of this machine in bytes that programs can still get without swapping; `None` where the
/// system does not say.
#[must_use]
pub fn available_memory() -> Option<usize> {
    bytes_in("/proc/meminfo", "MemAvailable:")
}

/// The memory in bytes that the GPU with most to spare has left, as the driver says; `None` where
/// there is no driver.
#[must_use]
pub fn freest_gpu_memory() -> Option<usize> {
    let nvml = nvml_wrapper::Nvml::builder().lib_path(NVML_LIBRARY.as_ref()).init().ok()?;
    let left = |index| Some(nvml.device_by_index(index).ok()?.memory_info().ok()?.free as usize);
    (0..nvml.device_count().ok()?).filter_map(left).max()
}

/// The name of GPU `number` of those that this process may use, as the driver says; `None` where there
/// is no driver.
#[must_use]
pub fn gpu_name(number: usize) -> Option<String> {
    let nvml = nvml_wrapper::Nvml::builder().lib_path(NVML_LIBRARY.as_ref()).init().ok()?;
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let device = match visible.as_ref().map(|list| list.split(',').nth(number)) {
        None => nvml.device_by_index(number as u32),
        Some(entry) => match entry?.trim().parse() {
            Ok(index) => nvml.device_by_index(index),
            Err(_) => nvml.device_by_uuid(entry?.trim()),
        },
    };
    device.ok()?.name().ok()
}

/// The most memory of the host in bytes that this process has had at once, libraries and buffers
/// included; `None` where the system does not say.
#[must_use]
pub fn peak_host_memory() -> Option<usize> {
    bytes_in("/proc/self/status", "VmHWM:")
}

/// The most bytes that tensors of this process have held at once on a GPU; `None` on the CPU.
#[must_use]
pub fn peak_gpu_memory(device: tch::Device) -> Option<usize> {
    let tch::Device::Cuda(number) = device else { return None };
    let mut bytes = 0;
    // SAFETY: `out` is a live usize; the C++ side only reads statistics.
    let result = unsafe { ffi::rr_peak_gpu_bytes(c_int::try_from(number).ok()?, &raw mut bytes) };
    check(result).is_ok().then_some(bytes)
}

/// The number behind `name` in a file of lines such as `name   123 kB`, in bytes.
fn bytes_in(file: &str, name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_sees_only_its_own_gpu_takes_that() {
        let number = |number, devices, own| visible_number(number, devices, own).ok();
        assert_eq!((number(3, 4, false), number(0, 1, true)), (Some(3), Some(0)));
        assert_eq!((number(3, 1, true), number(3, 1, false)), (Some(0), None));
        assert_eq!((number(3, 2, true), number(0, 0, true)), (None, None));
    }
}
