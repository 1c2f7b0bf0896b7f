#!/bin/bash
# Looks at every node of an allocation at once, and prints what each says.
#   by hand:  salloc --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 bash slurm/doctor.sh   with the EDIT lines changed
#   or:       samestep doctor --nodes 2                                  fills them in, and shows the lines as a table

PYTHON=.venv/bin/python             # EDIT: with samestep installed, at the same path on every node (or in the image)
WORK_FOLDER=$PWD                    # EDIT: where relative paths begin
LOOK=(--token x --shared runs/look) # EDIT: see `python -m launch.doctor.on_node --help`; an empty folder is needed
MODULES=()                          # EDIT: for example (cuda/12.8)
ENVIRONMENT=()                      # EDIT: no secrets, this file is no place for them
IN_STEP=()                          # EDIT: pyxis: (--container-image=IMAGE --container-mounts=A:A)
IN_IMAGE=()                         # EDIT: apptainer: (apptainer exec --nv --bind A:A IMAGE)

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
