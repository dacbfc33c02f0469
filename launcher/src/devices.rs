//! Which GPUs there are, which of them are visible, and which a job gets.
//!
//! What NVML says is read in one place ([`nvml`]); every decision is a pure function of that list.

mod nvml;

use crate::args::GpuRequest;
use crate::contract::{LaunchPlan, vars};
use crate::error::LaunchError;

/// More workers than this are a slip of the keyboard, for which no machine has processes.
pub const MOST_WORKERS: usize = 65_536;

/// Where the workers of a job run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// On the CPU, all sharing the machine.
    Cpu {
        /// How many.
        workers: usize,
    },
    /// One worker per GPU, in the order of the local ranks.
    Cuda {
        /// Never empty.
        gpus: Vec<Gpu>,
    },
}

impl Placement {
    /// The number of workers.
    pub fn workers(&self) -> usize {
        match self {
            Self::Cpu { workers } => *workers,
            Self::Cuda { gpus } => gpus.len(),
        }
    }

    /// `cpu` or `cuda`, as `reranker` spells it.
    pub fn device(&self) -> &'static str {
        match self {
            Self::Cpu { .. } => "cpu",
            Self::Cuda { .. } => "cuda",
        }
    }

    /// The NUMA node that each worker should be on, where its device has one.
    pub fn nodes(&self) -> Vec<Option<usize>> {
        match self {
            Self::Cpu { workers } => vec![None; *workers],
            Self::Cuda { gpus } => gpus.iter().map(|gpu| gpu.node).collect(),
        }
    }

    /// What to set `CUDA_DEVICE_ORDER` to where it is `inherited`, if to anything. The numbers of GPUs are NVML's:
    /// in another order CUDA would take them for other GPUs.
    pub fn device_order(&self, inherited: Option<&str>) -> Option<&'static str> {
        let Self::Cuda { gpus } = self else { return None };
        let are_numbered = gpus.iter().any(|gpu| !is_uuid(&gpu.entry));
        let is_kept = inherited.is_some_and(|order| order == NVML_ORDER || !are_numbered);
        (!is_kept).then_some(NVML_ORDER)
    }

    /// What to say before the job starts: a line for each GPU that somebody else computes on, and that an
    /// inherited order of GPUs is not kept.
    pub fn warnings(&self, order: Option<&str>) -> Vec<String> {
        let Self::Cuda { gpus } = self else { return Vec::new() };
        let busy = gpus.iter().filter(|gpu| !gpu.holders.is_empty());
        let busy = busy.map(|gpu| format!("GPU {} is busy: {}", gpu.entry, gpu.holders.join(", ")));
        let set = order.filter(|order| !order.is_empty());
        let other = set.zip(self.device_order(order)).map(|(order, own)| {
            let name = vars::CUDA_DEVICE_ORDER;
            format!("{name} is {own} for the workers, not {order}: GPUs are numbered as nvidia-smi lists them")
        });
        busy.chain(other).collect()
    }
}

/// The value of `CUDA_DEVICE_ORDER` by which CUDA counts GPUs as NVML and nvidia-smi do.
const NVML_ORDER: &str = "PCI_BUS_ID";

/// A GPU, or a MIG slice of one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gpu {
    /// What to write into `CUDA_VISIBLE_DEVICES`: an index or a UUID.
    pub entry: String,
    /// Its UUID, `GPU-…` or `MIG-…`.
    uuid: String,
    /// The UUIDs of its MIG slices; none where it is not divided.
    slices: Vec<String>,
    /// The NUMA node that it hangs on.
    node: Option<usize>,
    /// The processes that compute on it.
    holders: Vec<String>,
    /// Why NVML cannot read it: it has fallen off the bus.
    fault: Option<String>,
}

impl Gpu {
    /// The slices that CUDA can use, or the GPU itself where it is not divided.
    fn parts(&self) -> Vec<Self> {
        if self.slices.is_empty() {
            return vec![self.clone()];
        }
        let slice = |uuid: &String| Self {
            entry: uuid.clone(),
            uuid: uuid.clone(),
            slices: Vec::new(),
            node: self.node,
            // The driver names the holders of the whole GPU.
            holders: Vec::new(),
            fault: None,
        };
        self.slices.iter().map(slice).collect()
    }

    fn is_slice(&self) -> bool {
        self.uuid.starts_with("MIG-")
    }
}

/// Places a job on the GPUs that `--gpus` asks for.
pub fn place_on_gpus(request: &GpuRequest) -> Result<Placement, LaunchError> {
    let visible = visible_gpus().map_err(|reason| {
        LaunchError::Usage(format!("--gpus: {reason}; to run on the CPU pass --cpu --nproc N"))
    })?;
    select(request, &visible).map(|gpus| Placement::Cuda { gpus })
}

/// What the configuration asks of one of several nodes: its share of the processes.
pub fn share_of_node(mut advice: LaunchPlan, nnodes: usize) -> Result<LaunchPlan, LaunchError> {
    if let Some(processes) = &mut advice.processes {
        if !processes.is_multiple_of(nnodes) {
            return Err(LaunchError::Usage(format!(
                "the configuration asks for {processes} processes, which {nnodes} nodes cannot share \
                 evenly: say with --gpus, or --cpu --nproc, how many each node starts"
            )));
        }
        *processes /= nnodes;
    }
    Ok(advice)
}

/// Places a job whose command line names no devices: what the configuration says, else all GPUs.
/// `cpu` is whether the command line said `--cpu`.
pub fn place_as_advised(advice: &LaunchPlan, cpu: bool) -> Result<Placement, LaunchError> {
    if let Some(processes) = advice.processes.filter(|count| !(1..=MOST_WORKERS).contains(count)) {
        return Err(LaunchError::Usage(format!(
            "the configuration asks for {processes} processes, expected at least 1 and at most \
             {MOST_WORKERS}"
        )));
    }
    if cpu || advice.device.as_deref() == Some("cpu") {
        return Ok(Placement::Cpu { workers: advice.processes.unwrap_or(1) });
    }
    let visible = visible_gpus().map_err(|reason| {
        LaunchError::Usage(format!("{reason}; to run on the CPU pass --cpu --nproc N"))
    })?;
    advised_gpus(advice, &visible).map(|gpus| Placement::Cuda { gpus })
}

fn advised_gpus(advice: &LaunchPlan, visible: &[Gpu]) -> Result<Vec<Gpu>, LaunchError> {
    let request = match &advice.gpu_ids {
        Some(ids) => ids.join(",").parse().map_err(|reason| {
            LaunchError::Usage(format!("gpu_ids of the parallel file: {reason}"))
        })?,
        None => GpuRequest::All,
    };
    let mut gpus = choose(&request, visible)?;
    if let Some(processes) = advice.processes {
        if processes > gpus.len() {
            return Err(LaunchError::Usage(format!(
                "the configuration asks for {processes} processes, but {} usable: name the GPUs \
                 with --gpus",
                count(gpus.len())
            )));
        }
        gpus.truncate(processes);
    }
    readable(gpus, visible)
}

/// Finds every requested GPU among the visible ones.
fn select(request: &GpuRequest, visible: &[Gpu]) -> Result<Vec<Gpu>, LaunchError> {
    readable(choose(request, visible)?, visible)
}

/// Refuses a GPU that NVML cannot read. Also one of all: nobody is to train on fewer GPUs than he thinks.
fn readable(chosen: Vec<Gpu>, visible: &[Gpu]) -> Result<Vec<Gpu>, LaunchError> {
    let Some((entry, fault)) =
        chosen.iter().find_map(|gpu| gpu.fault.as_ref().map(|fault| (&gpu.entry, fault)))
    else {
        return Ok(chosen);
    };
    let others = visible.iter().enumerate().filter(|(_, gpu)| gpu.fault.is_none());
    let others: Vec<String> = others.map(|(index, _)| index.to_string()).collect();
    let advice = if others.is_empty() {
        "to run on the CPU pass --cpu --nproc N".to_owned()
    } else {
        format!("those that it can read are --gpus {}", others.join(","))
    };
    Err(LaunchError::Usage(format!("--gpus: NVML cannot read GPU {entry}: {fault}; {advice}")))
}

fn choose(request: &GpuRequest, visible: &[Gpu]) -> Result<Vec<Gpu>, LaunchError> {
    let names = match request {
        GpuRequest::All => return one_slice(visible.iter().flat_map(Gpu::parts).collect()),
        GpuRequest::Listed(names) => names,
    };
    let mut chosen: Vec<Gpu> = Vec::new();
    for name in names {
        let gpu = find(name, visible).map_err(LaunchError::Usage)?;
        if chosen.contains(&gpu) {
            return Err(LaunchError::Usage(format!(
                "--gpus: GPU {name} is listed twice (it is {})",
                gpu.uuid
            )));
        }
        chosen.push(gpu);
    }
    one_slice(chosen)
}

/// Refuses more than one MIG slice: CUDA shows a process only the first that it may see, and NCCL
/// does not work between two.
fn one_slice(chosen: Vec<Gpu>) -> Result<Vec<Gpu>, LaunchError> {
    match chosen.iter().find(|gpu| gpu.is_slice()) {
        Some(slice) if chosen.len() > 1 => Err(LaunchError::Usage(format!(
            "--gpus: {} devices, MIG slices among them, but a process sees one MIG slice only; name \
             one, such as {}, or only whole GPUs",
            chosen.len(),
            slice.uuid
        ))),
        _ => Ok(chosen),
    }
}

/// A GPU by its index among the visible ones, or a GPU or MIG slice by its UUID or an unambiguous
/// beginning of one.
fn find(name: &str, visible: &[Gpu]) -> Result<Gpu, String> {
    if let Ok(index) = name.parse::<usize>() {
        let last = visible.len().saturating_sub(1);
        let gpu = visible.get(index).ok_or_else(|| {
            format!("GPU {index} does not exist: {} visible, 0 to {last}", count(visible.len()))
        })?;
        return whole(gpu.clone());
    }
    let all = visible.iter().flat_map(|gpu| {
        let slices = if gpu.slices.is_empty() { Vec::new() } else { gpu.parts() };
        std::iter::once(gpu.clone()).chain(slices)
    });
    let mut matches = all.filter(|gpu| is_uuid(name) && gpu.uuid.starts_with(name));
    match (matches.next(), matches.next()) {
        (Some(gpu), None) => whole(gpu),
        (Some(_), Some(_)) => Err(format!("GPU {name} is ambiguous: give the whole UUID")),
        (None, _) => Err(format!(
            "GPU {name} does not exist: {} visible, expected an index or a UUID that \
             `nvidia-smi -L` lists",
            count(visible.len())
        )),
    }
}

/// Refuses a GPU that is divided: CUDA would take its first slice.
fn whole(gpu: Gpu) -> Result<Gpu, String> {
    match gpu.slices.first() {
        None => Ok(gpu),
        Some(slice) => Err(format!(
            "GPU {} is divided into MIG slices: name one of its {}, such as {slice}",
            gpu.entry,
            gpu.slices.len()
        )),
    }
}

fn is_uuid(name: &str) -> bool {
    name.starts_with("GPU-") || name.starts_with("MIG-")
}

fn count(gpus: usize) -> String {
    match gpus {
        1 => "1 GPU is".to_owned(),
        n => format!("{n} GPUs are"),
    }
}

/// The GPUs that this process may use, at least one; otherwise the reason why there are none.
fn visible_gpus() -> Result<Vec<Gpu>, String> {
    let all = nvml::gpus()?;
    let limit = std::env::var(vars::CUDA_VISIBLE_DEVICES).ok();
    let visible = restrict(&all, limit.as_deref());
    match (visible.is_empty(), limit) {
        (false, _) => Ok(visible),
        (true, None) => Err("no GPU was found that this process may use".to_owned()),
        (true, Some(limit)) => Err(format!(
            "no GPU is visible: {} is `{limit}`, and this process may use {}",
            vars::CUDA_VISIBLE_DEVICES,
            all.len()
        )),
    }
}

/// Whether this process may use a GPU, which is where work that names no device goes. The driver's
/// files in `/proc` do not tell: WSL 2 has none of them, a container without GPUs shows its host's.
#[must_use]
pub fn gpu_is_visible() -> bool {
    let limit = std::env::var(vars::CUDA_VISIBLE_DEVICES).ok();
    let node = || std::path::Path::new("/dev/nvidiactl").exists();
    usable(nvml::gpus().ok().as_deref(), limit.as_deref(), node)
}

/// Whether one of the GPUs that NVML lists may be used. Where NVML does not answer (containers with
/// the driver's `compute` part alone lack it), a driver's device `node` counts as a GPU: trying it tells
/// its user what is wrong with it, while a run on the CPU would pass unseen.
fn usable(listed: Option<&[Gpu]>, limit: Option<&str>, node: impl FnOnce() -> bool) -> bool {
    let hidden = |limit: &str| limit.trim().is_empty() || limit.trim().starts_with('-');
    match listed {
        Some(all) => !restrict(all, limit).is_empty(),
        None => !limit.is_some_and(hidden) && node(),
    }
}

/// Applies an inherited `CUDA_VISIBLE_DEVICES` to the machine's GPUs. As in CUDA itself the list
/// renumbers what it names, and ends at the first entry that names nothing.
fn restrict(all: &[Gpu], limit: Option<&str>) -> Vec<Gpu> {
    let Some(limit) = limit else { return all.to_vec() };
    limit
        .split(',')
        .map(str::trim)
        .map_while(|entry| {
            let known = find(entry, all);
            // A slice may be written in an older form, `MIG-GPU-…/1/0`; CUDA will check it.
            let old = || Gpu { uuid: entry.to_owned(), ..Gpu::default() };
            let gpu = if entry.starts_with("MIG-") {
                known.unwrap_or_else(|_| old())
            } else {
                known.ok()?
            };
            // Where not all GPUs can be read a number may be another one's for CUDA.
            let keeps = is_uuid(&gpu.entry) && gpu.fault.is_none();
            let entry = if keeps { gpu.entry.clone() } else { entry.to_owned() };
            Some(Gpu { entry, ..gpu })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    fn machine() -> Vec<Gpu> {
        let gpu = |(index, uuid): (usize, &&str)| Gpu {
            entry: index.to_string(),
            uuid: (*uuid).to_owned(),
            node: Some(index / 2),
            ..Gpu::default()
        };
        ["GPU-aa00", "GPU-bb11", "GPU-bb22", "GPU-cc33"].iter().enumerate().map(gpu).collect()
    }

    fn entries(gpus: Result<Vec<Gpu>, LaunchError>) -> Result<Vec<String>, String> {
        let entries = |gpus: Vec<Gpu>| gpus.into_iter().map(|gpu| gpu.entry).collect();
        gpus.map(entries).map_err(|error| error.to_string())
    }

    fn ask(list: &str, limit: Option<&str>) -> Result<Vec<String>, String> {
        entries(select(&list.parse().unwrap(), &restrict(&machine(), limit)))
    }

    #[test]
    fn gpus_by_index_uuid_and_beginning_of_a_uuid() {
        assert_eq!(ask("all", None).unwrap(), ["0", "1", "2", "3"]);
        assert_eq!(ask("2,0", None).unwrap(), ["2", "0"]);
        assert_eq!(ask("GPU-bb22,GPU-c", None).unwrap(), ["2", "3"]);
    }

    #[test]
    fn a_gpu_counts_where_nvml_lists_it_or_a_driver_has_its_node() {
        let seen = |listed: Option<&[Gpu]>, limit| usable(listed, limit, || true);
        let machine = machine();
        for (limit, expected) in
            [(None, true), (Some("1"), true), (Some("GPU-cc"), true), (Some(""), false)]
        {
            assert_eq!(seen(Some(&machine), limit), expected, "{limit:?}");
            assert_eq!(seen(None, limit), expected, "{limit:?}");
        }
        assert!(!seen(Some(&machine), Some("-1")) && !seen(None, Some("-1")));
        assert!(!seen(Some(&machine), Some("7")) && !seen(Some(&[]), None));
        assert!(!usable(None, None, || false) && !usable(None, Some("0"), || false));
    }

    #[test]
    fn what_does_not_exist_is_named() {
        assert_eq!(ask("4", None).unwrap_err(), "GPU 4 does not exist: 4 GPUs are visible, 0 to 3");
        assert!(ask("GPU-dd", None).unwrap_err().contains("GPU-dd does not exist"));
        assert!(ask("G", None).unwrap_err().contains("does not exist"));
        assert!(ask("GPU-bb", None).unwrap_err().contains("ambiguous"));
    }

    #[test]
    fn one_gpu_under_two_names_is_refused() {
        assert_eq!(
            ask("1,GPU-bb11", None).unwrap_err(),
            "--gpus: GPU GPU-bb11 is listed twice (it is GPU-bb11)"
        );
    }

    #[test]
    fn an_inherited_list_renumbers_and_limits() {
        assert_eq!(ask("all", Some("3,1")).unwrap(), ["3", "1"]);
        assert_eq!(ask("0", Some("3,1")).unwrap(), ["3"]);
        assert_eq!(ask("GPU-bb11", Some("3, GPU-bb11")).unwrap(), ["GPU-bb11"]);
        assert!(ask("2", Some("3,1")).unwrap_err().contains("2 GPUs are visible, 0 to 1"));
        assert!(ask("GPU-aa00", Some("3,1")).unwrap_err().contains("does not exist"));
        assert_eq!(ask("all", Some("MIG-12/3/4")).unwrap(), ["MIG-12/3/4"]);
        assert!(restrict(&machine(), Some("")).is_empty());
        assert!(restrict(&machine(), Some("-1,0")).is_empty());
        assert_eq!(restrict(&machine(), Some("1,9,2")).len(), 1);
    }

    fn advise(processes: Option<usize>, gpu_ids: Option<&[&str]>) -> Result<Vec<String>, String> {
        let gpu_ids = gpu_ids.map(|ids| ids.iter().map(ToString::to_string).collect());
        let advice = LaunchPlan { processes, gpu_ids, ..LaunchPlan::default() };
        entries(advised_gpus(&advice, &restrict(&machine(), None)))
    }

    #[test]
    fn the_configuration_chooses_where_the_command_line_is_silent() {
        assert_eq!(advise(None, None).unwrap(), ["0", "1", "2", "3"]);
        assert_eq!(advise(Some(2), None).unwrap(), ["0", "1"]);
        assert_eq!(advise(None, Some(&["3", "1"])).unwrap(), ["3", "1"]);
        assert_eq!(advise(None, Some(&["all"])).unwrap().len(), 4);
        assert!(advise(Some(5), None).unwrap_err().contains("5 processes"));
        assert!(advise(Some(3), Some(&["3", "1"])).unwrap_err().contains("2 GPUs are usable"));
        assert!(advise(None, Some(&["1", "1"])).unwrap_err().contains("gpu_ids"));
        let cpu =
            LaunchPlan { device: Some("cpu".into()), processes: Some(3), ..Default::default() };
        assert_eq!(place_as_advised(&cpu, false).unwrap(), Placement::Cpu { workers: 3 });
        let share = |nnodes| share_of_node(cpu.clone(), nnodes).map(|plan| plan.processes);
        assert_eq!(share(3).unwrap(), Some(1));
        assert!(share(2).unwrap_err().to_string().contains("3 processes, which 2 nodes"));
        assert_eq!(place_as_advised(&LaunchPlan::default(), true).unwrap().workers(), 1);
        for processes in [0, MOST_WORKERS + 1, usize::MAX] {
            let many = LaunchPlan { processes: Some(processes), ..cpu.clone() };
            assert!(place_as_advised(&many, true).unwrap_err().to_string().contains("at least 1"));
        }
    }

    #[test]
    fn a_mig_slice_is_named_by_its_uuid_and_stands_alone() {
        let mut gpus = machine();
        gpus[1].slices = vec!["MIG-1a".to_owned(), "MIG-1b".to_owned()];
        let ask = |list: &str| entries(select(&list.parse().unwrap(), &gpus));
        assert_eq!(ask("MIG-1a").unwrap(), ["MIG-1a"]);
        assert!(ask("MIG-1").unwrap_err().contains("ambiguous"));
        assert!(ask("MIG-2").unwrap_err().contains("does not exist"));
        assert_eq!(ask("0,2").unwrap(), ["0", "2"]);
        for divided in ["1", "GPU-bb11"] {
            let error = ask(divided).unwrap_err();
            assert!(error.contains("divided into MIG slices: name one of its 2"), "{error}");
        }
        for several in ["all", "MIG-1a,MIG-1b", "0,MIG-1a"] {
            let error = ask(several).unwrap_err();
            assert!(error.contains("a process sees one MIG slice only"), "{error}");
        }
        assert_eq!(
            entries(select(&GpuRequest::All, &restrict(&gpus, Some("MIG-1b")))).unwrap(),
            ["MIG-1b"]
        );
    }

    #[test]
    fn a_busy_gpu_is_warned_of_with_its_holder() {
        let mut gpus = machine();
        gpus[2].holders = vec!["process 7 (python) with 3.5 GB".to_owned()];
        let placement = Placement::Cuda { gpus };
        let busy = "GPU 2 is busy: process 7 (python) with 3.5 GB";
        for order in [None, Some(NVML_ORDER)] {
            assert_eq!(placement.warnings(order), [busy]);
        }
        let [first, second] = placement.warnings(Some("FASTEST_FIRST")).try_into().unwrap();
        assert_eq!(first, busy);
        assert!(second.contains("PCI_BUS_ID for the workers, not FASTEST_FIRST"), "{second}");
        assert_eq!(placement.nodes(), [Some(0), Some(0), Some(1), Some(1)]);
        assert!(Placement::Cpu { workers: 2 }.warnings(Some("FASTEST_FIRST")).is_empty());
    }
}
