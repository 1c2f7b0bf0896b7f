#!/bin/bash
# Looks at every node of an allocation at once, and prints what each says.
#   by hand:  salloc --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 bash slurm/doctor.sh   with the EDIT lines changed
#   or:       samestep doctor --nodes 2                                  fills them in, and shows the lines as a table

PYTHON=/shared/venv/bin/python
WORK_FOLDER=/shared/work
LOOK=(--token t --shared '/shared/a b' --scratch '')
MODULES=(cuda/12.8)
ENVIRONMENT=(SAMESTEP_CACHE=/shared/cache)
IN_STEP=('--container-image=registry.example#team/samestep:1' '--container-mounts=/shared/runs:/shared/runs,/shared/work:/shared/work,/data:/data')
IN_IMAGE=()

cd -- "$WORK_FOLDER" || exit 1
if [ "${#MODULES[@]}" -gt 0 ]; then
  # shellcheck source=/dev/null
  type module >/dev/null 2>&1 || . /etc/profile   # this is no login shell: `module` may be unknown
  module load "${MODULES[@]}" || exit 1
fi
set -u                              # from here on: `module` itself reads variables that nobody has set
# (An empty `export` would print the whole environment, with its secrets.)
[ "${#ENVIRONMENT[@]}" -eq 0 ] || export "${ENVIRONMENT[@]}"
export HF_HUB_OFFLINE=1             # as in the job that follows
export PYTHONSAFEPATH=${PYTHONSAFEPATH-1}  # else a datasets.py or trainer/ in WORK_FOLDER would be imported
export PYTHONOPTIMIZE=0             # transformers fails without the docstrings that 2 leaves out

NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || { echo "scontrol: does not name the nodes" >&2; exit 1; }
echo "nodes: ${NODES//$'\n'/ }"
# --label: the words of a node are known as its own. A node that fails, or says nothing, keeps nobody from ending.
exec timeout --kill-after=10 75 srun --label --export=ALL --input=none --nodes="$SLURM_JOB_NUM_NODES" \
  --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  --kill-on-bad-exit=0 --wait=0 "${IN_STEP[@]}" "${IN_IMAGE[@]}" "$PYTHON" -m launch.doctor.on_node \
  --nodes "$SLURM_JOB_NUM_NODES" --head "${NODES%%$'\n'*}" --port "$((10000 + SLURM_JOB_ID % 20000))" \
  "${LOOK[@]}"
