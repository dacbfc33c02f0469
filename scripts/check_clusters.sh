#!/usr/bin/env bash
# Trains under the schedulers themselves: a Slurm cluster of two nodes and Open MPI's mpirun, both real, and
# the environment that Kubernetes' training operator gives its pods. Network namespaces on one switch play
# the nodes. All have to give the weights of one machine, bit for bit; a job that Slurm interrupts goes on
# after its requeue; whatever fails or is cancelled leaves no process behind.
#
# usage: scripts/check_clusters.sh      after cargo build --release --workspace
#
# Exit code 77: skipped, as this cannot be done here; says why. Needs root, and installs Slurm and Open MPI
# where they are missing (scripts/setup.sh --clusters). The cluster is its own, in a temporary directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BIN=$(realpath -m "${CARGO_TARGET_DIR:-target}/release")
readonly BIN
# Per process, so that two of these scripts do not meet.
readonly SWITCH="rr-switch-$$"
readonly MACHINES=("rr-node0-$$" "rr-node1-$$")
readonly NET=10.213.81
readonly TINY=(--cpu --nproc 1)
readonly LONG=(--set epochs=60 --set log_interval=20)
# Of runs that are ended before they are done, however late Slurm gets to it.
readonly ENDLESS=(--set epochs=5000 --set log_interval=20)

skip() {
    echo "check_clusters: skipped: $*"
    exit 77
}

fail() {
    echo "check_clusters: $*" >&2
    exit 1
}

say() { printf 'check_clusters: %3d s: %s\n' "$SECONDS" "$*"; }

work=""

# shellcheck disable=SC2329 # called by trap
clean_up() {
    local machine
    for machine in "${MACHINES[@]}" "$SWITCH"; do
        # Slurm's daemons too: whatever still runs inside would keep the namespace alive.
        ip netns pids "$machine" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns delete "$machine" 2>/dev/null || true
    done
    [[ -z $work ]] || rm -rf "$work"
}

make_machines() {
    local i machine
    for machine in "$SWITCH" "${MACHINES[@]}"; do
        ip netns add "$machine" 2>"$work/ip.log" || skip "no network namespaces here: $(<"$work/ip.log")"
    done
    ip -n "$SWITCH" link add bridge type bridge 2>"$work/ip.log" ||
        skip "no virtual switches here: $(<"$work/ip.log")"
    ip -n "$SWITCH" link set bridge up
    echo "127.0.0.1 localhost" >"$work/hosts"
    for i in "${!MACHINES[@]}"; do
        machine=${MACHINES[i]}
        ip link add "port$i" netns "$SWITCH" type veth peer name eth0 netns "$machine"
        ip -n "$SWITCH" link set "port$i" master bridge up
        ip -n "$machine" address add "$NET.$((i + 1))/24" dev eth0
        ip -n "$machine" link set eth0 up
        ip -n "$machine" link set lo up
        echo "$NET.$((i + 1)) node$i" >>"$work/hosts"
    done
}

# `on NODE COMMAND...`, as a script too: mpirun calls it in place of ssh, with words for a shell.
write_on() {
    # shellcheck disable=SC2016 # expanded by the shell inside
    local inside='hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
    cat >"$work/on" <<SHELL
#!/usr/bin/env bash
machines=(${MACHINES[*]}) node=\${1#node}
shift
(("\$#" > 1)) || set -- bash -c "\$1"
exec nsenter --net="/run/netns/\${machines[node]}" unshare --mount --uts \\
    bash -c '$inside' - "node\$node" '$work/hosts' "\$@"
SHELL
    cat >"$work/agent" <<SHELL
#!/usr/bin/env bash
exec '$work/on' "\$1" "\${*:2}"
SHELL
    chmod +x "$work/on" "$work/agent"
}

on() { "$work/on" "$@"; }

# A job that is queued again waits until the credentials of its first start are void (cred_expire), and
# one that is cancelled has KillWait between TERM and KILL. No control groups, no accounting.
write_slurm() {
    cat >"$work/slurm.conf" <<CONF
ClusterName=check
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=6
ReturnToService=2
NodeName=node[0-1] CPUs=2 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
    echo CgroupPlugin=cgroup/v1 >"$work/cgroup.conf"
    mkdir "$work/state" "$work/spool-node0" "$work/spool-node1"
    (umask 077 && head -c 128 /dev/urandom >"$work/munge.key")
}

start_slurm() {
    local tries=0
    on 0 munged --force --foreground --socket="$work/munge.socket" --key-file="$work/munge.key" \
        --pid-file="$work/munge.pid" --seed-file="$work/munge.seed" --log-file="$work/munge.log" \
        >"$work/munged.out" 2>&1 &
    until [[ -S $work/munge.socket ]]; do
        ((tries += 1, tries < 100)) || fail "munged did not start: $(tail -n 3 "$work/munged.out")"
        sleep 0.1
    done
    on 0 slurmctld -D >"$work/slurmctld.log" 2>&1 &
    on 0 slurmd -D >"$work/slurmd0.log" 2>&1 &
    on 1 slurmd -D >"$work/slurmd1.log" 2>&1 &
    until [[ $(on 0 sinfo --noheader --format=%D --states=idle 2>/dev/null) == 2 ]]; do
        ((tries += 1, tries < 600)) || fail "Slurm did not start:"$'\n'"$(tail -n 5 "$work"/slurm*.log)"
        sleep 0.1
    done
}

write_training() {
    head -n 24 example_data/train_pointwise.jsonl >"$work/train.jsonl"
    cat >"$work/train.yaml" <<YAML
model_name_or_path: $PWD/tests/golden/bert_tiny
model_type: bert_encoder
train_dataset: $work/train.jsonl
max_label: 2
max_len: 48
batch_size: 2
epochs: 2
lr: 1e-3
log_interval: 1
YAML
}

# The command line of a training into `$1`: of rr-launch, and of one worker of the two.
launch() { echo "$BIN/rr-launch --nnodes auto ${TINY[*]} --config $work/train.yaml --set output_dir=$work/$1"; }
train() { echo "$BIN/reranker train --device cpu --timeout 20 --config $work/train.yaml --set output_dir=$work/$1"; }

# Runs a command, its output in `$1`.log; the exit code has to be `$2`.
expect() { # name code command...
    local code=0
    "${@:3}" >"$work/$1.log" 2>&1 || code=$?
    ((code == $2)) || fail "$1: exit code $code, expected $2:"$'\n'"$(tail -n 15 "$work/$1.log")"
}

same_weights() { # name reference
    cmp "$work/$1/model/model.safetensors" "$work/$2/model/model.safetensors" >&2 ||
        fail "$1: the weights are not those of $2"
}

trains_alike() { # name command...
    expect "$1" 0 "${@:2}"
    same_weights "$1" one
    say "$1: same weights"
}

nobody_left() { # name
    local machine pid left="" tries=0
    while ((tries += 1, tries <= 300)); do
        left=""
        for machine in "${MACHINES[@]}"; do
            for pid in $(ip netns pids "$machine"); do
                left+=$(grep -xE 'reranker|rr-launch|rr-guardian|sleep' "/proc/$pid/comm" 2>/dev/null || true)
            done
        done
        [[ -n $left ]] || return 0
        sleep 0.1
    done
    fail "$1: still running after 30 s: $left"
}

wait_for_line() { # file pattern
    local tries=0
    until grep -qs -- "$2" "$1"; do
        ((tries += 1, tries < 1200)) || fail "no '$2' in 120 s:"$'\n'"$(tail -n 15 "$1")"
        sleep 0.1
    done
}

check_srun() {
    # shellcheck disable=SC2046 # words of a command
    trains_alike srun-rr-launch on 0 srun --nodes=2 --ntasks-per-node=1 $(launch srun-rr-launch)
    # shellcheck disable=SC2046
    trains_alike srun-reranker on 0 srun --nodes=2 --ntasks=2 $(train srun-reranker)
    # As enroot's hook for images with PyTorch and many scripts do: Slurm's ranks under torchrun's names.
    # shellcheck disable=SC2016 # the task's own
    local named='RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"'
    # shellcheck disable=SC2046
    trains_alike named-rr-launch on 0 srun --nodes=2 --ntasks-per-node=1 \
        sh -c "$named" sh $(launch named-rr-launch)
    # shellcheck disable=SC2046
    trains_alike named-reranker on 0 srun --nodes=2 --ntasks=2 env "MASTER_ADDR=$NET.1" MASTER_PORT=29533 \
        sh -c "$named" sh $(train named-reranker)
}

# What a batch script meets: itself, which is alone; a step on other nodes than its own; two steps at a
# time; mpirun, whose daemons are steps.
check_batch() {
    local name
    cat >"$work/batch.sh" <<SHELL
#!/usr/bin/env bash
# A step does not wait until what the one before held is released, which can take half a minute.
export SLURM_OVERLAP=1
$(launch refused) || echo "exit code \$?" >$work/refused.code
$(train batch-alone) --set batch_size=4 || exit
srun --nodelist=node1 --nodes=1 --ntasks=2 $(train step-on-node1) || exit
srun --nodes=2 --ntasks=2 $(train step-a) &
srun --nodes=2 --ntasks=2 $(train step-b) &
wait
mpirun --map-by ppr:1:node $(launch mpirun-rr-launch-in-slurm) || exit
mpirun --map-by ppr:1:node $(train mpirun-reranker-in-slurm)
SHELL
    expect batch 0 on 0 sbatch --wait --nodes=2 --ntasks-per-node=2 --output="$work/batch.out" "$work/batch.sh"
    { grep -q "srun did not start this" "$work/batch.out" && grep -qx "exit code 2" "$work/refused.code"; } ||
        fail "rr-launch --nnodes auto was not refused in a batch script: $(tail -n 3 "$work/batch.out")"
    [[ -s $work/batch-alone/model/model.safetensors ]] || fail "reranker train failed in a batch script"
    for name in step-on-node1 step-a step-b mpirun-rr-launch-in-slurm mpirun-reranker-in-slurm; do
        same_weights "$name" one
    done
    say "a batch script, its steps, and mpirun among them: same weights"
}

# scripts/slurm.sbatch without its GPUs: saves on USR1, which Slurm sends, and goes on after its requeue.
check_requeue() {
    local job log=$work/requeue.out
    sed -e 's/--gpus all/--cpu --nproc 1/' -e '/^#SBATCH --gpus-/d' -e 's/--cpus-per-task=64/--cpus-per-task=1/' \
        scripts/slurm.sbatch \
        >"$work/requeue.sbatch"
    job=$(on 0 env "BIN=$BIN" sbatch --parsable --chdir="$work" --output="$log" "$work/requeue.sbatch" \
        "$work/train.yaml" "${LONG[@]}" --set "output_dir=$work/requeue")
    wait_for_line "$log" "trained step=20 "
    on 0 scancel --signal=USR1 "$job"
    wait_for_line "$log" "preempted by SIGUSR1; saved a checkpoint"
    say "Slurm's USR1: saved, queued again"
    wait_for_line "$log" "saved $work/requeue/model"
    [[ $(grep -c "trained step=20 " "$log") == 1 ]] || fail "the requeued job began anew"
    same_weights requeue long
    nobody_left requeue
    say "requeued: same weights as without the interruption"
}

# A rank that is killed ends all, under srun alone and under rr-launch.
check_failures() {
    local srun pid code name words
    for name in killed-reranker killed-rr-launch; do
        words=$(if [[ $name == *launch ]]; then launch $name; else train $name; fi)
        # shellcheck disable=SC2086
        on 0 srun --nodes=2 --ntasks-per-node=1 $words "${ENDLESS[@]}" >"$work/$name.log" 2>&1 &
        srun=$!
        wait_for_line "$work/$name.log" "trained step=20 "
        for pid in $(ip netns pids "${MACHINES[1]}"); do
            if grep -qx reranker "/proc/$pid/comm"; then kill -KILL "$pid"; fi
        done
        code=0
        wait $srun || code=$?
        ((code == 137)) || fail "$name: exit code $code, expected 137:"$'\n'"$(tail "$work/$name.log")"
        nobody_left $name
    done
    say "a killed rank: srun's exit code is 137, nobody is left"
}

# TERM, and six seconds later KILL, which comes before rr-launch's own. What srun exits with after a KILL
# is not looked at: it waits two seconds more at most, then says 0.
check_scancel() {
    local srun code name words
    for name in cancelled-training cancelled-stubborn; do
        words=$(launch $name)
        # shellcheck disable=SC2086
        if [[ $name == *stubborn ]]; then
            printf 'trap "" TERM\necho "trained step=20 "\nsleep 600\nsleep 600\n' >"$work/stubborn.sh"
            words="$BIN/rr-launch --nnodes auto ${TINY[*]} -- bash $work/stubborn.sh"
            set -- $words
        else
            set -- $words "${ENDLESS[@]}"
        fi
        on 0 srun --job-name=$name --nodes=2 --ntasks-per-node=1 "$@" >"$work/$name.log" 2>&1 &
        srun=$!
        wait_for_line "$work/$name.log" "trained step=20 "
        on 0 scancel --name=$name
        code=0
        wait $srun || code=$?
        [[ $name == *stubborn ]] || ((code == 143)) ||
            fail "$name: exit code $code, expected 143:"$'\n'"$(tail "$work/$name.log")"
        nobody_left $name
    done
    say "scancel: 143 by TERM; nobody is left, by KILL where TERM is ignored"
}

# Open MPI outside of Slurm: on one host, and over two, where it does not tell the first.
check_mpirun() {
    local mpirun=(mpirun --mca plm_rsh_agent "$work/agent" --host "node0,node1")
    # shellcheck disable=SC2046
    trains_alike mpirun-one-host on 0 mpirun --oversubscribe -n 2 $(train mpirun-one-host)
    # shellcheck disable=SC2046
    trains_alike mpirun-reranker on 0 "${mpirun[@]}" -x MASTER_ADDR=node0 $(train mpirun-reranker)
    # shellcheck disable=SC2046
    trains_alike mpirun-rr-launch on 0 "${mpirun[@]}" $(launch mpirun-rr-launch) --rdzv node0:29400
    # shellcheck disable=SC2046
    expect mpirun-nowhere 2 on 0 "${mpirun[@]}" $(train mpirun-nowhere)
    grep -q "MASTER_ADDR is not set" "$work/mpirun-nowhere.log" || fail "mpirun-nowhere: no word of MASTER_ADDR"
}

# Two pods, with the variables of training operator 1.9 for a PyTorchJob with nprocPerNode 1; of 1.5, which
# knows no PET_ variables; and of Kubeflow trainer 2, which knows no others.
check_pods() {
    local form pod pid pids variables words
    for form in pods-1.9 pods-1.5 pods-2 pods-reranker; do
        pids=()
        for pod in 0 1; do
            variables=(MASTER_ADDR=node0 MASTER_PORT=23456 WORLD_SIZE=2 RANK="$pod")
            case $form in
            pods-1.9 | pods-reranker) variables+=(PET_MASTER_ADDR=node0 PET_MASTER_PORT=23456
                PET_NODE_RANK="$pod" PET_NPROC_PER_NODE=1 PET_NNODES=2) ;;
            pods-2) variables=(PET_NNODES=2 PET_NPROC_PER_NODE=auto PET_NODE_RANK="$pod"
                PET_MASTER_ADDR=node0 PET_MASTER_PORT=29400) ;;
            esac
            words=$(if [[ $form == *reranker ]]; then train $form; else launch $form; fi)
            # shellcheck disable=SC2086
            on $pod env "${variables[@]}" $words >"$work/$form-$pod.log" 2>&1 &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do
            wait "$pid" || fail "$form:"$'\n'"$(tail -n 5 "$work/$form"-?.log)"
        done
        same_weights $form one
        say "$form: same weights"
    done
}

main() {
    local program found
    ((EUID == 0)) || skip "not root"
    for program in ip nsenter unshare; do
        command -v $program >/dev/null || skip "no $program command (iproute2, util-linux)"
    done
    found=$(scripts/setup.sh --clusters)
    [[ -n $found ]] || skip "no Slurm and Open MPI (see above)"
    [[ -x $BIN/reranker ]] || fail "$BIN/reranker is missing: run cargo build --release first"
    work=$(mktemp -d)
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    make_machines
    write_on
    write_slurm
    write_training
    export SLURM_CONF=$work/slurm.conf OMP_NUM_THREADS=1
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_orte_tmpdir_base=$work
    start_slurm
    say "$(slurmd -V), two nodes; $(mpirun --version | head -n 1)"

    expect one 0 "$BIN/rr-launch" --cpu --nproc 2 --config "$work/train.yaml" --set "output_dir=$work/one"
    expect long 0 "$BIN/rr-launch" --cpu --nproc 2 --config "$work/train.yaml" "${LONG[@]}" \
        --set "output_dir=$work/long"
    check_srun
    check_batch
    check_requeue
    check_failures
    check_scancel
    check_mpirun
    check_pods
    say "done"
}

main
