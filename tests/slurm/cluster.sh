#!/usr/bin/env bash
# A real Slurm cluster of several nodes on this machine, for the tests: root, Debian, no systemd, nothing under /etc.
#   cluster.sh start FOLDER NODES [netns]   loopback addresses, or with netns an own network and cable for each node
#   cluster.sh on FOLDER COMMAND...         a command where the cluster's login node would be
#   cluster.sh crash FOLDER NODE            kill -9 everything that a node runs; `start` brings it back
#   cluster.sh link FOLDER NODE up|down     netns: the node's cable
#   cluster.sh block FOLDER NODE            netns: data0, a second interface of every node, stays up and reaches nobody
#   cluster.sh node FOLDER NODE COMMAND...  a command where the node's jobs would run: its mounts are its own
#   cluster.sh kill-controller FOLDER       kill -9 slurmctld; `start` brings it back
#   cluster.sh stop FOLDER
# Partitions: batch (preemptable), scavenge (preemptable: cancelled, 60 s after a warning), high (preempts both),
# closed (only for the account "project").
set -eu
PATH=$PATH:/usr/sbin:/sbin
COMMAND=$1 FOLDER=$(readlink -m "$2")
shift 2
CONF=$FOLDER/slurm.conf
export SLURM_CONF=$CONF
ID=$(printf %s "$FOLDER" | cksum)    # ports, addresses and namespaces of this folder's cluster
ID=$((${ID%% *} % 200))
PORT=$((31000 + ID * 8)) NET=10.214.$ID DATA_NET=10.215.$ID

write_conf() {
  local node address gpu server control=127.0.0.1
  [ "$MODE" != netns ] || control=$NET.254
  server=$(hostname -s)
  cat >"$CONF" <<END
ClusterName=test
SlurmctldHost=$server($control)
SlurmctldPort=$PORT
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$FOLDER/state
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdSpoolDir=$FOLDER/spool.%n
SlurmdPidFile=$FOLDER/slurmd.%n.pid
SlurmdLogFile=$FOLDER/slurmd.%n.log
ProctrackType=proctrack/$([ -w /sys/fs/cgroup/freezer/cgroup.procs ] && echo cgroup || echo linuxproc)
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
EnforcePartLimits=ALL
KillWait=30
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=10
WaitTime=30
EpilogMsgTime=10
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
END
  printf '%s\n' "127.0.0.1 localhost" "$control $server" >"$FOLDER/hosts"
  for node in $(seq "$NODES"); do
    address=127.78.$ID.$node
    [ "$MODE" != netns ] || address=$NET.$node
    echo "$address n$node" >>"$FOLDER/hosts"
    echo "NodeName=n$node NodeAddr=$address Port=$((PORT + node)) CPUs=4 RealMemory=4096 Gres=gpu:4" >>"$CONF"
  done
  for gpu in 0 1 2 3; do ln -sfn /dev/null "$FOLDER/gpu$gpu"; done   # slurmd 22.05 counts none without a file
  echo "Name=gpu Flags=nvidia_gpu_env File=$FOLDER/gpu[0-3]" >"$FOLDER/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$FOLDER/cgroup.conf"
  cat >>"$CONF" <<END
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=closed Nodes=ALL MaxTime=INFINITE AllowAccounts=project
END
}

inside() { # namespace-or-empty, host name, command: with our hosts file, and without `ip netns exec`, which hides cgroups
  local space=$1 name=$2
  shift 2
  # shellcheck disable=SC2016
  ${space:+nsenter --net=/run/netns/$space} unshare --uts --mount sh -c \
    'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' - "$name" "$FOLDER/hosts" "$@"
}
space() { [ "$MODE" != netns ] || echo "st$ID-$1"; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null && ! grep -q '^State:.*Z' "/proc/$(cat "$1")/status"; }
until_true() { for _ in $(seq 100); do ! "$@" >/dev/null 2>&1 || return 0; sleep 0.1; done; return 1; }
on() { inside "$(space c)" "$(hostname -s)" "$@"; }

plug() { # two cables from a node's namespace to the switch
  ip netns add "st$ID-$1"
  ip -n "st$ID-$1" link set lo up
  cable "$1" "v$1" eth0 "$NET"
  cable "$1" "d$1" data0 "$DATA_NET"
}
cable() {
  ip -n "st$ID-c" link add "$2" type veth peer name "$3" netns "st$ID-$1"
  ip -n "st$ID-c" link set "$2" master switch up
  ip -n "st$ID-$1" addr add "$4.$1/24" dev "$3"
  ip -n "st$ID-$1" link set "$3" up
}
network() {
  [ ! -e "/run/netns/st$ID-c" ] || return 0
  ip netns add "st$ID-c"
  ip -n "st$ID-c" link set lo up
  ip -n "st$ID-c" link add switch type bridge
  ip -n "st$ID-c" addr add "$NET.254/24" dev switch
  ip -n "st$ID-c" link set switch up
  for node in $(seq "$NODES"); do plug "$node"; done
}
# Always of all nodes. Asked about one alone, slurmctld (22.05, _slurm_rpc_dump_node_single) sends the count of its CPUs
# in use of the last time that somebody asked about all, and with a count above 0 sinfo says "mixed*" for "down*".
states() { on sinfo -h -N -p batch -o '%N %T'; }
all_up() { [ "$(states | grep -cE ' (idle|mixed|allocated|completing)$')" -ge "$NODES" ]; }
answered() { ! alive "$FOLDER/slurmctld.pid" || all_up; }   # or will not: a client would ask for 10 s each time
is_down() { states | grep -q "^n$1 down"; }
processes() { # of a node: all that live under its host name
  local uts
  uts=$(cat "$FOLDER/uts.$1" 2>/dev/null) || return 0
  find /proc/[0-9]*/ns/uts -maxdepth 0 -lname "${uts//[][]/?}" -printf '%h\n' 2>/dev/null | tr -dc '0-9\n'
}
crash() { # until nothing is left that was born meanwhile
  local pids sruns
  for _ in $(seq 100); do
    pids=$(processes "$1")
    [ -n "$pids" ] || break
    # First srun: one that outlives its tasks by a moment tells Slurm so, which no dead machine does.
    sruns=$(echo "$pids" | sed 's#.*#/proc/&/comm#' | xargs grep -lx srun 2>/dev/null | tr -dc '0-9\n')
    # shellcheck disable=SC2086
    kill -9 $sruns $pids 2>/dev/null || true
  done
  rm -f "$FOLDER/slurmd.n$1.pid" "$FOLDER/uts.$1"   # the kernel gives the number of a dead namespace to the next one
}

boot() {
  mkdir -p "$FOLDER/spool.n$1"
  # shellcheck disable=SC2016
  inside "$(space "$1")" "n$1" sh -c 'readlink /proc/self/ns/uts >"$1"; exec slurmd -f "$2" -N "$3"' \
    - "$FOLDER/uts.$1" "$CONF" "n$1" </dev/null
}
can() { # what this machine must let root do, tried on something that is gone afterwards; CONSEQUENCE COMMAND...
  local consequence=$1 said
  shift
  said=$("$@" 2>&1) || { echo "$consequence; this machine does not let root do it: $* ($said)" >&2; exit 1; }
}
start() {
  can "nodes with names of their own need namespaces (CAP_SYS_ADMIN)" \
    unshare --uts --mount sh -c 'hostname n1; mount --bind / /mnt'
  if [ ! -e "$FOLDER/shape" ]; then
    mkdir -p "$FOLDER/state" "$FOLDER/munge"
    echo "NODES=$1 MODE=${2:-loopback}" >"$FOLDER/shape"
    # shellcheck disable=SC1091
    . "$FOLDER/shape"
    (umask 077; head -c 128 /dev/urandom >"$FOLDER/munge/key")
    write_conf
  fi
  if [ "$MODE" = netns ]; then
    can "nodes with cables need network namespaces, veth and bridge (CAP_NET_ADMIN)" \
      unshare --net sh -c 'ip link add v1 type veth peer name v2 && ip link add switch type bridge'
    network
  fi
  alive "$FOLDER/munge/pid" || munged --force --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" \
    --pid-file="$FOLDER/munge/pid" --log-file="$FOLDER/munge/log" --seed-file="$FOLDER/munge/seed" 2>"$FOLDER/munge/err"
  if ! alive "$FOLDER/slurmctld.pid"; then
    rm -f "$FOLDER/slurmctld.pid"
    on slurmctld -f "$CONF" </dev/null
    until_true test -s "$FOLDER/slurmctld.pid" || true
  fi
  for node in $(seq "$NODES"); do
    alive "$FOLDER/slurmd.n$node.pid" || boot "$node"
  done
  for _ in 1 2 3 4 5 6; do
    ! until_true answered || break
    # A node that lived on gives no word of being back, and one that is down is asked once a minute: boot it anew.
    for node in $(seq "$NODES"); do
      ! is_down "$node" || { crash "$node"; boot "$node"; }
    done
  done
  ! all_up || return 0
  on sinfo -N || true
  tail -n 4 "$FOLDER"/slurm*.log >&2
  exit 1
}

no_jobs() { [ -z "$(on squeue -h -t running,completing -o %i)" ]; }
stop() {
  if alive "$FOLDER/slurmctld.pid"; then
    on scancel -Q -u root || true
    until_true no_jobs || true
  fi
  for node in $(seq "$NODES"); do crash "$node"; done
  for pid in "$FOLDER/slurmctld.pid" "$FOLDER/munge/pid"; do
    ! alive "$pid" || kill -9 "$(cat "$pid")"
  done
  if [ "$MODE" = netns ]; then
    for name in c $(seq "$NODES"); do ip netns del "st$ID-$name" 2>/dev/null || true; done
  fi
  rm -rf "$FOLDER/shape" "$FOLDER/state" "$FOLDER"/spool.*
}

# shellcheck disable=SC1091
[ ! -e "$FOLDER/shape" ] || . "$FOLDER/shape"
case $COMMAND in
  start) start "$@" ;;
  stop) [ ! -e "$FOLDER/shape" ] || stop ;;
  on) on "$@" ;;
  crash) crash "$1" ;;
  kill-controller) kill -9 "$(cat "$FOLDER/slurmctld.pid")" ;;
  link) ip -n "st$ID-c" link set "v$1" "$2" ;;
  block) ip -n "st$ID-c" link set "d$1" nomaster ;;
  node) NODE=$1; shift; nsenter --target "$(cat "$FOLDER/slurmd.n$NODE.pid")" --mount --uts --net "$@" ;;
  *) sed -n '2,13p' "$0"; exit 2 ;;
esac
