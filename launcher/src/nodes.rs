//! Several nodes, one launcher on each: how they meet ([`meeting`], [`join`]), and what they tell each other
//! while their workers run ([`cluster`]). Node 0 is the hub of a star of TCP connections ([`link`]);
//! what goes over them is [`message`]. What the nodes' parts of an attempt come to is decided by
//! [`pool`], without sockets or clocks.
//!
//! Collectives are none of the launchers' business: who starts, who watches and who ends is.

mod call;
pub mod cluster;
pub mod join;
pub mod link;
pub mod meeting;
pub mod message;
pub mod pool;

use std::time::Duration;

pub use cluster::Cluster;
pub use meeting::{Meeting, Place};

/// Between two signs of life on a connection at most.
const PING: Duration = Duration::from_secs(1);

/// Between two signs of life where a node that is silent for so long is lost: one or two may come late.
fn ping_interval(silence: Duration) -> Duration {
    (silence / 3).min(PING)
}
