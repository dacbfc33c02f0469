#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

use super::*;

fn read(variables: &[(&str, &str)]) -> Result<WorkerEnv, ContractError> {
    WorkerEnv::from_lookup(|name| {
        variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    })
}

fn error(variables: &[(&str, &str)]) -> String {
    let line = read(variables).unwrap_err().to_string();
    assert!(!line.contains('\n') && !line.ends_with('.'), "{line}");
    line
}

const TORCHRUN: [(&str, &str); 7] = [
    ("RANK", "3"),
    ("LOCAL_RANK", "1"),
    ("WORLD_SIZE", "4"),
    ("LOCAL_WORLD_SIZE", "2"),
    ("GROUP_RANK", "1"),
    ("MASTER_ADDR", "10.0.0.1"),
    ("MASTER_PORT", "29500"),
];

/// [`TORCHRUN`] with one variable set to something else, or left out.
fn torchrun_but(name: &str, value: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
    TORCHRUN
        .iter()
        .filter_map(
            |&(key, old)| {
                if key == name { value.map(|value| (key, value)) } else { Some((key, old)) }
            },
        )
        .collect()
}

#[test]
fn nothing_set_is_a_world_of_one() {
    let worker = read(&[]).unwrap();
    assert_eq!((worker.rank, worker.world_size, worker.local_world_size), (0, 1, 1));
    assert_eq!((worker.run_id, worker.restart_count, worker.progress), (None, 0, false));
}

#[test]
fn torchruns_variables_are_read() {
    let worker = read(&TORCHRUN).unwrap();
    assert_eq!((worker.rank, worker.local_rank, worker.group_rank), (3, 1, 1));
    assert_eq!((worker.world_size, worker.local_world_size), (4, 2));
    assert_eq!((worker.master_addr.as_str(), worker.master_port), ("10.0.0.1", 29500));
}

#[test]
fn what_the_launcher_writes_is_what_a_worker_reads() {
    let written = WorkerEnv {
        rank: 1,
        local_rank: 1,
        world_size: 2,
        local_world_size: 2,
        group_rank: 0,
        master_addr: "127.0.0.1".to_owned(),
        master_port: 4242,
        run_id: Some("a-b".to_owned()),
        restart_count: 7,
        progress: true,
    };
    let variables = written.to_vars();
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    assert_eq!(read(&variables).unwrap(), written);
    assert!(variables.contains(&("TORCHELASTIC_RUN_ID", "a-b")));
    assert!(variables.contains(&("TORCHELASTIC_RESTART_COUNT", "7")));
    assert!(variables.contains(&("TORCHELASTIC_USE_AGENT_STORE", "False")));
}

/// What its `launch.py` sets on the second of two hosts.
#[test]
fn deepspeed_has_names_of_its_own() {
    let mut variables = torchrun_but("LOCAL_WORLD_SIZE", None);
    variables.retain(|(name, _)| *name != "GROUP_RANK");
    variables.extend([("CROSS_RANK", "1"), ("CROSS_SIZE", "2"), ("LOCAL_SIZE", "2")]);
    let worker = read(&variables).unwrap();
    assert_eq!((worker.local_world_size, worker.group_rank), (2, 1));
    // Older versions give no size at all: one host then.
    variables.retain(|(name, _)| *name != "LOCAL_SIZE");
    assert_eq!(read(&variables).unwrap().local_world_size, 4);
}

#[test]
fn a_kubernetes_worker_has_no_local_rank() {
    let worker =
        read(&[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "m"), ("MASTER_PORT", "9")])
            .unwrap();
    assert_eq!((worker.rank, worker.local_rank, worker.local_world_size), (1, 0, 1));
}

#[test]
fn a_pod_of_several_workers_needs_a_launcher() {
    // Training operator 1.9, two pods with nprocPerNode 2.
    let mut pod = vec![("RANK", "1"), ("WORLD_SIZE", "4"), ("PET_NNODES", "2")];
    pod.extend([("PET_NPROC_PER_NODE", "2"), ("MASTER_ADDR", "m"), ("MASTER_PORT", "9")]);
    assert!(error(&pod).contains("WORLD_SIZE is `4`, expected PET_NNODES"));
    pod.extend([("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")]);
    assert_eq!(read(&pod).unwrap().world_size, 4, "a launcher's worker");
}

#[test]
fn malformed_and_contradictory_variables_are_named() {
    assert_eq!(
        error(&torchrun_but("RANK", Some("one"))),
        "environment variable RANK is `one`, expected a whole number below WORLD_SIZE, which is 4"
    );
    for (name, value) in [
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", ""),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "2.0"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "x"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "70000"),
        ("GROUP_RANK", "g"),
    ] {
        let line = error(&torchrun_but(name, Some(value)));
        assert!(line.contains(name), "{name}={value}: {line}");
    }
}

#[test]
fn missing_companions_are_named() {
    for name in ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        let line = error(&torchrun_but(name, None));
        assert!(line.starts_with(&format!("environment variable {name} is not set")), "{line}");
    }
    assert!(error(&torchrun_but("MASTER_ADDR", Some(""))).contains("MASTER_ADDR is not set"));
    assert!(read(&[("RANK", "0"), ("WORLD_SIZE", "1")]).is_ok(), "a world of one meets nobody");
}

const SLURM: [(&str, &str); 9] = [
    ("SLURM_PROCID", "5"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_STEP_NUM_TASKS", "7"),
    ("SLURM_NODEID", "1"),
    ("SLURM_STEP_TASKS_PER_NODE", "4,3"),
    ("SLURM_STEP_NODELIST", "node[003-004]"),
    ("SLURM_JOB_NODELIST", "node[001-004]"),
    ("SLURM_JOB_ID", "123456"),
    ("SLURM_STEP_ID", "0"),
];

/// [`SLURM`] with `changes`; an empty value is a variable that is not set.
fn slurm_but(changes: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    let kept = SLURM.into_iter().filter(|(name, _)| changes.iter().all(|(other, _)| other != name));
    kept.chain(changes.iter().copied().filter(|(_, value)| !value.is_empty())).collect()
}

#[test]
fn slurm_tasks_find_each_other() {
    let worker = read(&SLURM).unwrap();
    assert_eq!((worker.rank, worker.local_rank, worker.group_rank), (5, 1, 1));
    assert_eq!((worker.world_size, worker.local_world_size), (7, 3));
    assert_eq!(worker.master_addr, "node003");
    assert!(DERIVED_PORTS.contains(&worker.master_port));

    let other = read(&slurm_but(&[("SLURM_STEP_ID", "1")])).unwrap();
    assert_ne!(other.master_port, worker.master_port, "another step of the job");

    let chosen = slurm_but(&[("MASTER_ADDR", "h"), ("MASTER_PORT", "1234")]);
    let worker = read(&chosen).unwrap();
    assert_eq!((worker.master_addr.as_str(), worker.master_port), ("h", 1234));
}

#[test]
fn slurm_tasks_on_one_node_meet_on_the_loopback() {
    let worker = read(&slurm_but(&[
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_NODEID", "0"),
        ("SLURM_STEP_TASKS_PER_NODE", "2"),
    ]));
    assert_eq!(worker.unwrap().master_addr, "127.0.0.1");
}

#[test]
fn schedulers_are_read_also_where_their_ranks_have_torchruns_names() {
    let hook = [
        ("MASTER_ADDR", "node003"),
        ("MASTER_PORT", "61123"),
        ("RANK", "5"),
        ("WORLD_SIZE", "7"),
        ("LOCAL_RANK", "1"),
    ];
    let plain = read(&slurm_but(&hook[..2])).unwrap();
    for hook in [&hook[..], &hook[..4], &hook[2..]] {
        let worker = read(&slurm_but(hook)).unwrap();
        let expected = WorkerEnv { master_port: worker.master_port, ..plain.clone() };
        assert_eq!((worker.group_rank, worker.local_world_size), (1, 3));
        assert_eq!(worker, expected);
    }
    // One that a launcher has started, and one that means something else.
    let launched = [&hook[..], &[("LOCAL_WORLD_SIZE", "7")]].concat();
    assert_eq!(read(&slurm_but(&launched)).unwrap().local_world_size, 7);
    let alone = [("RANK", "0"), ("WORLD_SIZE", "1")];
    assert_eq!(read(&slurm_but(&alone)).unwrap().world_size, 1);

    let mut variables = vec![
        ("OMPI_COMM_WORLD_RANK", "5"),
        ("OMPI_COMM_WORLD_SIZE", "8"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ];
    variables.extend([hook[0], hook[1], hook[2], ("WORLD_SIZE", "8"), hook[4]]);
    let worker = read(&variables).unwrap();
    assert_eq!((worker.rank, worker.group_rank, worker.local_world_size), (5, 1, 4));
}

#[test]
fn a_batch_script_and_the_shell_of_salloc_are_alone() {
    for step in ["", "4294967290", "4294967291"] {
        let worker = read(&slurm_but(&[("SLURM_STEP_ID", step), ("SLURM_NTASKS", "7")])).unwrap();
        assert_eq!((worker.rank, worker.world_size), (0, 1), "step {step}");
    }
    assert!(error(&slurm_but(&[("SLURM_STEP_ID", "x")])).contains("SLURM_STEP_ID is `x`"));
}

#[test]
fn a_slurm_job_without_hosts_or_number_is_refused() {
    let without = |name| error(&slurm_but(&[(name, "")]));
    assert!(without("SLURM_STEP_NUM_TASKS").contains("SLURM_STEP_NUM_TASKS is not set"));
    assert!(without("SLURM_JOB_ID").contains("MASTER_PORT is not set"));
    let no_hosts = slurm_but(&[("SLURM_STEP_NODELIST", ""), ("SLURM_JOB_NODELIST", "")]);
    assert!(error(&no_hosts).contains("MASTER_ADDR is not set"));
    let broken = slurm_but(&[("SLURM_STEP_NODELIST", "node[3-")]);
    assert!(error(&broken).contains("SLURM_STEP_NODELIST is `node[3-`"));
}

#[test]
fn open_mpi_wins_over_the_slurm_variables_it_inherits() {
    let mut variables = SLURM.to_vec();
    variables.extend([
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("PMIX_NAMESPACE", "prterun-host-1@1"),
    ]);
    let worker = read(&variables).unwrap();
    assert_eq!((worker.rank, worker.world_size, worker.local_rank), (1, 4, 1));
    assert_eq!(worker.master_addr, "node001", "the job's first host, not the daemon's");
}

#[test]
fn open_mpi_on_one_host_meets_on_the_loopback() {
    let mut variables = vec![
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("OMPI_MCA_ess_base_jobid", "42"),
    ];
    assert_eq!(read(&variables).unwrap().master_addr, "127.0.0.1");
    variables[3].1 = "3";
    variables[1].1 = "4";
    assert!(error(&variables).contains("MASTER_ADDR is not set"));
}

#[test]
fn all_workers_of_a_job_derive_the_same_port_and_jobs_differ() {
    assert_eq!(port_of_job("123"), port_of_job("123"));
    let ports: std::collections::HashSet<_> =
        (0..1000).map(|id: u32| port_of_job(&id.to_string())).collect();
    assert!(ports.len() > 900, "{} ports for 1000 jobs", ports.len());
    assert!(ports.iter().all(|port| DERIVED_PORTS.contains(port)));
}

#[test]
fn a_launch_plan_goes_through_json_and_may_leave_things_out() {
    let plan: LaunchPlan = serde_json::from_str(r#"{"processes":2,"text":"x"}"#).unwrap();
    assert_eq!((plan.processes, plan.device.as_deref()), (Some(2), None));
    let line = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<LaunchPlan>(&line).unwrap(), plan);
}

#[test]
fn exit_codes_of_signals() {
    assert_eq!(exit_code::of_signal(11), 139);
    assert_eq!(exit_code::of_signal(9), 137);
}
