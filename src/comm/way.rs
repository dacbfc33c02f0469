//! The way to rank 0's host, which a rank looks for before all else: the name may appear late, or lead
//! nowhere yet.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use tracing::warn;

/// Between the first two looks: ranks that start together meet at once.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest between two looks: each is some questions to the cluster's name server, from every rank that
/// waits.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The longest that one attempt to connect may take: behind a firewall none is ever answered.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The two ends of the way to rank 0's host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// The address of this host on it.
    pub(super) own: IpAddr,
    /// That of rank 0's host.
    pub(super) master: IpAddr,
}

/// Looks for the way to `host` and, unless this rank is the one that serves the store, for the store at
/// `port` there, until `deadline`, which is `timeout` away. A name that is not known yet is told once.
///
/// # Errors
/// What is still missing then, or that no way leads to the host.
pub(super) fn find(
    (host, port): (&str, u16),
    serves_store: bool,
    deadline: Instant,
    timeout: Duration,
) -> Result<Way, String> {
    let seconds = timeout.as_secs_f64();
    let mut is_told = false;
    let mut look_up = || {
        (host, port).to_socket_addrs().map(Vec::from_iter).map_err(|error| {
            if !is_told {
                warn!(
                    "the address of {host} is not known yet: {error}; waiting for it (--timeout)"
                );
                is_told = true;
            }
            format!(
                "the address of {host} has not become known in {seconds} s: {error} (--timeout)"
            )
        })
    };
    // The name is asked for anew each time: it may not lead there yet.
    let addresses = again_until(deadline, || {
        let addresses = look_up()?;
        if serves_store || addresses.iter().any(|address| store_answers(address, deadline)) {
            return Ok(addresses);
        }
        Err(format!(
            "nothing has answered there for {seconds} s: rank 0 has not started, or listens elsewhere \
             (--timeout)"
        ))
    })?;
    by_routes(addresses).map_err(|error| format!("no way to that address: {error}"))
}

/// What `attempt` comes to: it is made again until it succeeds or `deadline` has passed, in pauses that
/// grow.
fn again_until<T>(
    deadline: Instant,
    mut attempt: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let mut pause = FIRST_PAUSE;
    loop {
        let outcome = attempt();
        let left = deadline.saturating_duration_since(Instant::now());
        if outcome.is_ok() || left.is_zero() {
            return outcome;
        }
        std::thread::sleep(pause.min(left));
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

/// Whether the store listens at `address`. Its own client sleeps a whole second after a refused
/// connection, which workers that start together would pay on most starts.
fn store_answers(address: &SocketAddr, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now()).max(FIRST_PAUSE);
    TcpStream::connect_timeout(address, left.min(CONNECT_TIMEOUT)).is_ok()
}

/// The way that the routing table gives to the first of `addresses` that it leads to, IPv4 before IPv6:
/// all ranks have to take the same of a host that has both, whatever their resolvers prefer.
fn by_routes(mut addresses: Vec<SocketAddr>) -> io::Result<Way> {
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let mut way = Err(io::ErrorKind::AddrNotAvailable.into());
    for address in addresses {
        way = route(address);
        if way.is_ok() {
            break;
        }
    }
    way
}

/// Connecting a UDP socket asks the routing table, and sends nothing.
fn route(address: SocketAddr) -> io::Result<Way> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    Ok(Way { own: socket.local_addr()?.ip(), master: socket.peer_addr()?.ip() })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// No name server is asked for a name with a part as long as this.
    fn no_name() -> String {
        format!("{}.invalid", "x".repeat(70))
    }

    fn find_in(host: &str, port: u16, serves_store: bool, wait: u64) -> Result<Way, String> {
        let timeout = Duration::from_millis(wait);
        find((host, port), serves_store, Instant::now() + timeout, timeout)
    }

    #[test]
    fn waiting_for_a_store_ends_with_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let here = IpAddr::from(Ipv4Addr::LOCALHOST);
        let found = find_in("127.0.0.1", port, false, 50);
        assert_eq!(found, Ok(Way { own: here, master: here }));
        drop(listener);
        let error = find_in("127.0.0.1", port, false, 50).expect_err("nobody listens");
        assert!(error.starts_with("nothing has answered there for 0.05 s: rank 0"), "{error}");
        // Who serves the store does not wait for it.
        assert_eq!(find_in("127.0.0.1", port, true, 50), Ok(Way { own: here, master: here }));
    }

    #[test]
    fn a_name_that_does_not_resolve_is_the_error_of_every_rank() {
        for serves_store in [false, true] {
            let error = find_in(&no_name(), 29500, serves_store, 50).expect_err("no such name");
            let start = format!("the address of {} has not become known in 0.05 s: ", no_name());
            assert!(error.starts_with(&start) && error.contains("lookup"), "{error}");
        }
    }

    #[test]
    fn ranks_that_wait_ask_ever_more_rarely() {
        let mut asked = 0;
        let deadline = Instant::now() + Duration::from_millis(1500);
        let outcome = again_until(deadline, || {
            asked += 1;
            Err::<(), _>("not yet".to_owned())
        });
        assert_eq!(outcome, Err("not yet".to_owned()));
        // 10, 20, … 320 and 500 ms; fewer where the machine is slow.
        assert!((2..=10).contains(&asked), "{asked}");
    }

    #[test]
    fn a_host_is_reached_by_ipv6_where_it_has_nothing_else() {
        // A machine without IPv6 has no way to such an address.
        if UdpSocket::bind("[::1]:0").is_err() {
            return;
        }
        let [four, six] = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let to = |hosts: &[IpAddr]| {
            by_routes(hosts.iter().map(|&host| SocketAddr::new(host, 29500)).collect())
        };
        assert_eq!(to(&[six]).ok(), Some(Way { own: six, master: six }));
        assert_eq!(to(&[six, four]).ok(), Some(Way { own: four, master: four }));
        assert!(to(&[]).is_err());
    }
}
