//! Flags of other launchers, whose users are told what is said here instead.

/// Flags of torchrun, accelerate launch and deepspeed, with `-` for `_`, and what takes their place.
const COUNTERPARTS: [(&[&str], &str); 12] = [
    (
        &["--nproc-per-node", "--num-processes", "--num-gpus", "--include"],
        "`--gpus LIST` for GPUs, `--cpu --nproc N` for the CPU",
    ),
    (&["--num-machines", "--num-nodes"], "`--nnodes N`"),
    (&["--machine-rank"], "`--node-rank R`"),
    (
        &["--master-addr", "--main-process-ip", "--rdzv-endpoint"],
        "`--rdzv HOST:PORT` for several nodes, nothing for one",
    ),
    (&["--main-process-port"], "`--master-port PORT`, or nothing: a free port is found"),
    (&["--rdzv-id"], "`--run-id ID`"),
    (
        &["--standalone", "--rdzv-backend", "--rdzv-conf", "--monitor-interval"],
        "not needed: leave it out",
    ),
    (&["--module", "-m"], "`-- python -m MODULE`"),
    (&["--no-python", "--run-path"], "`-- PROGRAM`"),
    (&["--redirects", "--tee", "-t", "-r"], "`--log-dir DIR`, and `--show RANKS` for the console"),
    (&["--local-ranks-filter"], "`--show RANKS`"),
    (
        &["--hostfile"],
        "one rr-launch on each node, with `--nnodes N --node-rank R --rdzv HOST:PORT`",
    ),
];

/// What to say instead of another launcher's flag, which may have its value behind a `=`.
pub fn counterpart(flag: &str) -> Option<&'static str> {
    let name = flag.split('=').next().unwrap_or(flag).replace('_', "-");
    let known = COUNTERPARTS.iter().find(|(names, _)| names.contains(&name.as_str()));
    known.map(|(_, instead)| *instead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_other_launchers_are_known_in_both_spellings() {
        for flag in ["--nproc_per_node=4", "--nproc-per-node", "--num_processes"] {
            assert!(counterpart(flag).is_some_and(|text| text.contains("--gpus")), "{flag}");
        }
        assert_eq!(counterpart("--nproc"), None);
        assert_eq!(counterpart("--confg"), None);
    }
}
