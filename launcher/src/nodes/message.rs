//! What launchers of one run say to each other.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::hang::Position;
use crate::lifecycle::Cause;

/// The term by which nodes of several runs are told apart.
pub const RUN_ID: &str = "--run-id";

/// One message, in either direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// To node 0, the first word: who wants to take part.
    Hello(Hello),
    /// To node 0, instead of it: this node cannot start, and has said why.
    Decline {
        /// Which node.
        node_rank: usize,
        /// Its host.
        host: String,
        /// The user's `--run-id`, empty where there is none.
        run_id: String,
        /// What it exits with.
        code: u8,
    },
    /// From node 0: no.
    Refuse {
        /// Why, for the user.
        line: String,
        /// What to exit with.
        code: u8,
    },
    /// From node 0, to who calls while the workers of a launch run: it has begun without this node.
    Begun,
    /// From node 0, to all at once: begin.
    Welcome(World),
    /// To node 0 every second.
    Ping {
        /// The sender's clock, in microseconds.
        sent_us: i64,
        /// Whether none of its workers has made progress for `--hang-timeout`.
        is_quiet: bool,
    },
    /// The answer.
    Pong {
        /// As in the ping.
        sent_us: i64,
        /// Node 0's clock, in microseconds.
        clock_us: i64,
    },
    /// The answer before the start.
    Wait,
    /// The workers of a node end before they are done; the others' have to end too.
    Ending(Ending),
    /// The user's second INT: everybody is killed.
    Kill,
    /// To node 0: nothing of this node's part of the attempt is left.
    Gone {
        /// Its number: the restarts before it.
        attempt: u32,
        /// What it came to.
        part: Part,
    },
    /// From node 0: nothing of the attempt is left on any node.
    Settled(Settlement),
}

/// Who wants to take part, and what all have to agree on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which node.
    pub node_rank: usize,
    /// Its host.
    pub host: String,
    /// How many workers it starts.
    pub workers: usize,
    /// Names and values that have to be the same on all nodes, the version first.
    pub terms: Vec<Term>,
}

impl Hello {
    /// The user's `--run-id`, empty where there is none.
    pub fn run_id(&self) -> &str {
        let term = self.terms.iter().find(|term| term.name == RUN_ID);
        term.map_or("", |term| term.value.as_str())
    }
}

/// Something that has to be the same on all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// What it is: `--max-restarts`.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Whether the value says something to a person; a hash does not.
    pub is_readable: bool,
}

/// A node and its workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its host.
    pub host: String,
    /// Its workers.
    pub workers: usize,
}

/// What all nodes know when they begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct World {
    /// The identifier of the launch.
    pub run_id: String,
    /// The nodes, by rank.
    pub nodes: Vec<Node>,
    /// The address of node 0 that the others have reached; each node adds its own interface to one that holds
    /// on a link only.
    pub master_addr: String,
    /// A port that was free there.
    pub master_port: u16,
}

impl World {
    /// Workers on all nodes.
    pub fn workers(&self) -> usize {
        self.nodes.iter().map(|node| node.workers).sum()
    }

    /// The rank of the first worker of a node.
    pub fn first_rank(&self, node: usize) -> usize {
        self.nodes[..node].iter().map(|node| node.workers).sum()
    }

    /// Adds this node's interface to an address that is of no use without.
    pub fn reach_on(&mut self, interface: u32) {
        let address = self.master_addr.parse();
        if interface != 0 && address.is_ok_and(|address: Ipv6Addr| address.is_unicast_link_local())
        {
            self.master_addr = format!("{}%{interface}", self.master_addr);
        }
    }

    /// `node 1 (b)`.
    pub fn name(&self, node: usize) -> String {
        name_of(node, &self.nodes[node].host)
    }
}

/// `node 1 (b)`.
pub fn name_of(node: usize, host: &str) -> String {
    format!("node {node} ({host})")
}

/// Why the workers of a node end before they are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The attempt's number.
    pub attempt: u32,
    /// The node where it began.
    pub node: usize,
    /// Why.
    pub cause: Cause,
    /// When, by the clock of node 0 in microseconds; `None` where that is not known yet.
    pub at_us: Option<i64>,
}

/// What an attempt came to on one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Part {
    /// The newest step that a heartbeat told of.
    pub step: Option<u64>,
    /// Whether a worker has said that a checkpoint is saved.
    pub has_saved: bool,
    /// Whether a worker that was asked to save has ended without.
    pub is_incomplete: bool,
    /// Whether its workers had to be ended.
    pub was_stopped: bool,
    /// Whether something is left that cannot be killed.
    pub is_abandoned: bool,
    /// Where its workers were in a hang.
    pub positions: Vec<Position>,
    /// Why its workers ended, in its own words.
    pub reason: Vec<String>,
}

/// What an attempt came to on all nodes. Each launcher draws the same conclusion from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settlement {
    /// The first cause, unless all is well.
    pub cause: Option<Cause>,
    /// Why, with the node's name, in lines for the user.
    pub told: Vec<String>,
    /// The newest step.
    pub step: Option<u64>,
    /// Whether a checkpoint is saved: a worker has said so, and none of the others was ended before it was
    /// done.
    pub has_saved: bool,
    /// Whether workers had to be ended.
    pub was_stopped: bool,
    /// Whether there can be no restart: something could not be killed, a node is lost, or a worker
    /// failed after all were asked to save.
    pub is_final: bool,
    /// What has asked for the end of the job while the attempt was ending over a failure.
    pub called_off: Option<Cause>,
    /// Where the workers meet if there is a restart.
    pub next_port: u16,
}
