//! Flags about several nodes.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use super::{Args, Work, positive_seconds};
use crate::contract::nodes::NodeEnv;
use crate::contract::{fnv1a, vars};
use crate::error::LaunchError;
use crate::nodes::Place;
use crate::nodes::message::{RUN_ID, Term};
use crate::sys;

/// The flags about several nodes.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// Number of nodes; auto: as the scheduler says
    ///
    /// One rr-launch is started on each node, all with the same flags but --node-rank (and what says how
    /// many workers a node has). They meet before anything starts, and a failure on one ends, or
    /// restarts, all. With `auto` number, rank and meeting point come from Slurm (srun with one task
    /// a node), from a Kubernetes `PyTorchJob`, or from Open MPI's mpirun (one process a node); flags win.
    #[arg(long, value_name = "N|auto")]
    pub nnodes: Option<NodeCount>,
    /// This node's number, from 0
    #[arg(long, value_name = "R", requires = "nnodes")]
    pub node_rank: Option<usize>,
    /// Node 0 and a free port of it
    ///
    /// Where the nodes meet.
    #[arg(long, value_name = "HOST:PORT", requires = "nnodes")]
    pub rdzv: Option<Address>,
    /// The longest wait for all [default: 600]
    #[arg(long, value_name = "SEC", requires = "nnodes", value_parser = positive_seconds)]
    pub rdzv_timeout: Option<Duration>,
    /// A node silent for so long is lost [default: 3]
    #[arg(long, value_name = "SEC", requires = "nnodes", value_parser = patience)]
    pub node_timeout: Option<Duration>,
    /// The launch's RR_RUN_ID [default: a new one]
    #[arg(long, value_name = "ID")]
    pub run_id: Option<String>,
}

/// The value of `--nnodes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeCount {
    /// What the scheduler says.
    Auto,
    /// So many.
    Said(usize),
}

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// A name or an address, an IPv6 one without brackets.
    pub host: String,
    /// A port other than 0.
    pub port: u16,
}

impl FromStr for NodeCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::Auto),
            Ok(count) if count > 0 => Ok(Self::Said(count)),
            _ => Err("expected a number of nodes, at least 1, or `auto`".to_owned()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.rsplit_once(':').and_then(|(host, port)| {
            let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
            let port = port.parse().ok().filter(|&port| port != 0)?;
            (!host.is_empty()).then(|| Self { host: host.to_owned(), port })
        });
        parsed.ok_or_else(|| "expected a host and a port, such as node0:29400".to_owned())
    }
}

impl NodeArgs {
    /// A node that is silent for so long is lost.
    fn silence(&self) -> Duration {
        self.node_timeout.unwrap_or(Duration::from_secs(3))
    }

    /// Which node of how many this is; `None` for one alone.
    ///
    /// # Errors
    /// Neither flags nor the scheduler say enough.
    pub(crate) fn place(&self) -> Result<Option<Place>, LaunchError> {
        let Some(count) = self.nnodes else { return Ok(None) };
        let usage = |line: String| LaunchError::Usage(line);
        let told = match count {
            NodeCount::Said(_) => None,
            NodeCount::Auto => Some(
                NodeEnv::from_env()
                    .map_err(|error| usage(format!("--nnodes auto: {error}")))?
                    .ok_or_else(|| {
                        usage(format!(
                            "--nnodes auto: the environment is of no scheduler: expected {}, {}, \
                             {} or {}; pass --nnodes N --node-rank R --rdzv HOST:PORT",
                            vars::SLURM_JOB_ID,
                            vars::PET_NNODES,
                            vars::RANK,
                            vars::OMPI_COMM_WORLD_RANK
                        ))
                    })?,
            ),
        };
        let nnodes = match count {
            NodeCount::Said(nnodes) => nnodes,
            NodeCount::Auto => told.as_ref().map_or(1, |node| node.nnodes),
        };
        let node_rank = self.node_rank.or(told.as_ref().map(|node| node.node_rank));
        if let Some(rank) = node_rank.filter(|&rank| rank >= nnodes) {
            return Err(usage(format!("--node-rank is {rank}, expected a number below {nnodes}")));
        }
        if nnodes == 1 {
            return Ok(None);
        }
        let missing = |flag: &str| usage(format!("--nnodes {nnodes} needs {flag}"));
        let node_rank = node_rank.ok_or_else(|| missing("--node-rank R"))?;
        let told = told.and_then(|node| Some(Address { host: node.addr?, port: node.port? }));
        let rdzv = self.rdzv.clone().or(told).ok_or_else(|| missing("--rdzv HOST:PORT"))?;
        Ok(Some(Place {
            nnodes,
            node_rank,
            addr: rdzv.host,
            port: rdzv.port,
            patience: self.rdzv_timeout.unwrap_or(Duration::from_secs(600)),
            silence: self.silence(),
            run_id: self.run_id.clone().unwrap_or_default(),
        }))
    }
}

impl Args {
    /// What has to be the same on all nodes. Paths may differ, what they lead to may not.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn terms(&self, nnodes: usize, device: &str) -> Result<Vec<Term>, LaunchError> {
        let seconds = |time: Option<Duration>| {
            time.map_or(String::new(), |time| format!("{} s", time.as_secs_f64()))
        };
        let command = match self.work()? {
            Work::Program(command) => std::iter::once(&command.program)
                .chain(&command.args)
                .map(|word| word.to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(" "),
            Work::Train(_) => {
                let mut flags = vec!["reranker train".to_owned()];
                flags.extend(self.set.iter().map(|pair| format!("--set {pair}")));
                let named = [
                    ("--overwrite", self.overwrite),
                    ("--skip-bad-records", self.skip_bad_records),
                    ("--resume-anyway", self.resume_anyway),
                ];
                flags.extend(named.iter().filter(|(_, set)| *set).map(|(name, _)| (*name).into()));
                let resume = self.resume.iter();
                flags.extend(resume.map(|value| format!("--resume {}", value.to_string_lossy())));
                flags.join(" ")
            }
        };
        let signal = self.supervision()?.preempt_signal;
        let readable = [
            ("the version of rr-launch", env!("CARGO_PKG_VERSION").to_owned()),
            ("--nnodes", nnodes.to_string()),
            (RUN_ID, self.nodes.run_id.clone().unwrap_or_default()),
            ("the device", device.to_owned()),
            ("the command", command),
            ("--max-restarts", self.max_restarts.to_string()),
            ("--hang-timeout", seconds(self.hang_timeout)),
            ("--grace", seconds(Some(self.grace))),
            ("--node-timeout", seconds(Some(self.nodes.silence()))),
            ("--preempt-signal", signal.map_or(String::new(), sys::signal_name)),
        ];
        let mut terms: Vec<Term> = readable
            .into_iter()
            .map(|(name, value)| Term { name: name.to_owned(), value, is_readable: true })
            .collect();
        for (name, path) in [("--config", &self.config), ("--parallel", &self.parallel)] {
            let value = path.as_deref().map(contents).transpose()?.unwrap_or_default();
            let name = format!("the file of {name}");
            terms.push(Term { name, value, is_readable: false });
        }
        Ok(terms)
    }
}

/// No less than what a busy machine may let a launcher wait for its turn.
fn patience(text: &str) -> Result<Duration, String> {
    let expected = "expected a number of seconds, at least 0.1";
    let least = Duration::from_millis(100);
    positive_seconds(text).ok().filter(|&time| time >= least).ok_or_else(|| expected.to_owned())
}

/// A hash of a file.
fn contents(path: &Path) -> Result<String, LaunchError> {
    let bytes = std::fs::read(path)
        .map_err(|error| LaunchError::Usage(format!("cannot read {}: {error}", path.display())))?;
    Ok(format!("{:016x}", fnv1a(&bytes)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    #[test]
    fn a_node_may_be_silent_for_some_time() {
        assert_eq!(patience("0.1"), Ok(Duration::from_millis(100)));
        for text in ["0.05", "0", "-1", "x"] {
            assert!(patience(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        let host = |text: &str| text.parse::<Address>().map(|address| address.host).ok();
        assert_eq!(host("node0:29400").as_deref(), Some("node0"));
        assert_eq!(host("[fe80::1]:29400").as_deref(), Some("fe80::1"));
        for text in ["node0", ":29400", "node0:0", "node0:70000", "node0:"] {
            assert_eq!(host(text), None, "{text}");
        }
    }
}
