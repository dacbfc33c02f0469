//! Which CPUs each worker may run on: from the machine's topology, as a pure function of it.

use std::collections::BTreeMap;
use std::fs;

use clap::ValueEnum;

use crate::sys;

/// How workers are tied to CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Binding {
    /// To the CPUs of a NUMA node: its GPU's, or in turn.
    Numa,
    /// To cores of its own in that node.
    Cores,
    /// Not at all.
    None,
}

/// A CPU that this process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// Its number.
    id: usize,
    /// The NUMA node that it belongs to.
    node: usize,
    /// The core that it is a thread of: package and number.
    core: (usize, usize),
}

/// A worker's share of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The CPUs' numbers, in order. Never empty.
    pub cpus: Vec<usize>,
    /// How many of their cores are this worker's, if those of a node share them out.
    pub threads: usize,
}

/// The CPUs that this process may use, by `/sys`. What cannot be read counts as one node of cores
/// with one thread.
pub fn topology() -> Vec<Cpu> {
    let nodes = nodes();
    let number = |id: usize, name: &str| -> Option<usize> {
        let path = format!("/sys/devices/system/cpu/cpu{id}/topology/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let cpu = |id: usize| Cpu {
        id,
        node: nodes.get(&id).copied().unwrap_or(0),
        core: (number(id, "physical_package_id").unwrap_or(0), number(id, "core_id").unwrap_or(id)),
    };
    sys::allowed_cpus().into_iter().map(cpu).collect()
}

/// The NUMA node of each CPU.
fn nodes() -> BTreeMap<usize, usize> {
    let entries = fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    let node = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        let list = fs::read_to_string(entry.path().join("cpulist")).ok()?;
        Some(parse_list(&list).into_iter().map(move |cpu| (cpu, number)).collect::<Vec<_>>())
    };
    entries.filter_map(node).flatten().collect()
}

/// The numbers of a list such as `0-3,8`, as the kernel writes it.
fn parse_list(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.trim().parse().ok()?..=to.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// Each worker's share; `wishes` are the nodes of the workers' devices, where they have one. None
/// for no binding.
///
/// # Errors
/// There are fewer cores than workers.
pub fn shares(
    cpus: &[Cpu],
    wishes: &[Option<usize>],
    binding: Binding,
) -> Result<Option<Vec<Share>>, String> {
    if binding == Binding::None || cpus.is_empty() {
        return Ok(None);
    }
    let mut nodes: BTreeMap<usize, Vec<Cpu>> = BTreeMap::new();
    for cpu in cpus {
        nodes.entry(cpu.node).or_default().push(*cpu);
    }
    let numbers: Vec<usize> = nodes.keys().copied().collect();
    // Neighbours in rank are neighbours in the machine.
    let in_turn = |worker: usize| numbers[worker * numbers.len() / wishes.len()];
    let homes: Vec<usize> = wishes
        .iter()
        .enumerate()
        .map(|(worker, wish)| wish.filter(|n| nodes.contains_key(n)).unwrap_or(in_turn(worker)))
        .collect();
    let share = |worker: usize| {
        let home = homes[worker];
        let workers = homes.iter().filter(|&&other| other == home).count();
        if binding == Binding::Numa {
            return Ok(Share::of(&nodes[&home], workers));
        }
        let number = homes[..worker].iter().filter(|&&other| other == home).count();
        part(&nodes[&home], number, workers).ok_or_else(|| {
            let cores = Share::of(&nodes[&home], 1).threads;
            format!(
                "--bind cores: {workers} workers on the {cores} core(s) of NUMA node {home}; start \
                 fewer workers, or use --bind numa"
            )
        })
    };
    (0..wishes.len()).map(share).collect::<Result<Vec<_>, _>>().map(Some)
}

/// Part `number` of `parts` equal ones of the cores of a node.
fn part(cpus: &[Cpu], number: usize, parts: usize) -> Option<Share> {
    let mut cores: BTreeMap<(usize, usize), Vec<Cpu>> = BTreeMap::new();
    for cpu in cpus {
        cores.entry(cpu.core).or_default().push(*cpu);
    }
    let (first, end) = (number * cores.len() / parts, (number + 1) * cores.len() / parts);
    let own: Vec<Cpu> = cores.into_values().take(end).skip(first).flatten().collect();
    (!own.is_empty()).then(|| Share::of(&own, 1))
}

impl Share {
    /// CPUs that `workers` share.
    fn of(cpus: &[Cpu], workers: usize) -> Self {
        let mut numbers: Vec<usize> = cpus.iter().map(|cpu| cpu.id).collect();
        numbers.sort_unstable();
        let mut cores: Vec<_> = cpus.iter().map(|cpu| cpu.core).collect();
        cores.sort_unstable();
        cores.dedup();
        Self { cpus: numbers, threads: (cores.len() / workers).max(1) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    /// Two packages, each a node of four cores; CPU n and n + 8 are threads of one core.
    fn machine() -> Vec<Cpu> {
        (0..16).map(|id| Cpu { id, node: id % 8 / 4, core: (id % 8 / 4, id % 4) }).collect()
    }

    fn cpus(wishes: &[Option<usize>], binding: Binding) -> Result<Vec<Vec<usize>>, String> {
        let shares = shares(&machine(), wishes, binding)?.unwrap();
        Ok(shares.into_iter().map(|share| share.cpus).collect())
    }

    const FIRST: [usize; 8] = [0, 1, 2, 3, 8, 9, 10, 11];
    const SECOND: [usize; 8] = [4, 5, 6, 7, 12, 13, 14, 15];

    #[test]
    fn workers_go_to_their_devices_node_or_to_nodes_in_turn() {
        assert_eq!(cpus(&[Some(1), Some(0)], Binding::Numa).unwrap(), [SECOND, FIRST]);
        assert_eq!(cpus(&[None; 4], Binding::Numa).unwrap(), [FIRST, FIRST, SECOND, SECOND]);
        assert_eq!(cpus(&[Some(7)], Binding::Numa).unwrap(), [FIRST], "a node without our CPUs");
        assert_eq!(shares(&machine(), &[None; 4], Binding::None), Ok(None));
        let six = shares(&machine(), &[None; 6], Binding::Numa).unwrap().unwrap();
        assert!(six.iter().all(|share| share.threads == 1), "three on four cores");
        let two = shares(&machine(), &[None; 2], Binding::Numa).unwrap().unwrap();
        assert!(two.iter().all(|share| share.threads == 4));
    }

    #[test]
    fn cores_are_divided_with_their_threads_and_never_shared() {
        let four = cpus(&[None; 4], Binding::Cores).unwrap();
        assert_eq!(four, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]);
        let three = cpus(&[Some(0); 3], Binding::Cores).unwrap();
        assert_eq!(three, [vec![0, 8], vec![1, 9], vec![2, 3, 10, 11]]);
        let shares = shares(&machine(), &[None; 8], Binding::Cores).unwrap().unwrap();
        assert!(shares.iter().all(|share| share.threads == 1 && share.cpus.len() == 2));
        let error = cpus(&[Some(1); 5], Binding::Cores).unwrap_err();
        assert!(error.contains("5 workers on the 4 core(s) of NUMA node 1"), "{error}");
    }

    #[test]
    fn lists_of_the_kernel() {
        assert_eq!(parse_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(parse_list("\n"), [0; 0]);
        assert!(!topology().is_empty());
    }
}
