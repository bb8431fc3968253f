# Sourced by the training scripts after common.sh: starts `python -m chatglm_ptuning` in several processes.
#
#   NUM_GPUS      processes (GPUs) on each machine; on a machine without GPUs they share the CPU
#   NNODES        machines. Then either HOSTFILE (the script runs on the first one, which reaches the others by ssh),
#                 or the script runs on every one with NODE_RANK (0, 1, ...) and MASTER_ADDR (the first one's address)
#   MASTER_PORT   a free port on the first machine
#   LAUNCHER      deepspeed (default), torchrun (with MAX_RESTARTS it restarts a failed job, which resumes from its
#                 last checkpoint), or slurm (srun has already started one process per GPU)
#   DS_CONFIG     DeepSpeed configuration; none: data parallelism without DeepSpeed

NUM_GPUS=${NUM_GPUS:-1}
NNODES=${NNODES:-1}
MASTER_PORT=${MASTER_PORT:-29500}
LAUNCHER=${LAUNCHER:-deepspeed}

_stop() {
    echo "$1" >&2
    exit 2
}

# DeepSpeed's launcher takes the machines and their GPU indices as JSON in base64.
_world_info() {
    "$PYTHON" - "$NNODES" "$NUM_GPUS" <<'PY'
import base64, json, sys

nodes, gpus = map(int, sys.argv[1:])
world = {f"node-{node}" if nodes > 1 else "localhost": list(range(gpus)) for node in range(nodes)}
print(base64.urlsafe_b64encode(json.dumps(world).encode()).decode())
PY
}

_several_processes() {
    [ "$NUM_GPUS" -gt 1 ] || [ "$NNODES" -gt 1 ] || [ -n "${HOSTFILE:-}" ] || [ "$LAUNCHER" = slurm ]
}

# Sets COMMAND to the command that starts the processes.
_choose_command() {
    COMMAND=("$PYTHON" -m chatglm_ptuning)
    if ! _several_processes; then
        return
    fi
    if [ -n "${MAX_RESTARTS:-}" ] && [ "$LAUNCHER" != torchrun ]; then
        _stop "MAX_RESTARTS needs LAUNCHER=torchrun: DeepSpeed's launcher does not start a failed job again."
    fi
    if [ "$NNODES" -gt 1 ] && [ -z "${HOSTFILE:-}" ] && [ "$LAUNCHER" != slurm ]; then
        [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
            _stop "NNODES=$NNODES needs HOSTFILE, or on every machine NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR."
    fi
    case "$LAUNCHER" in
    deepspeed)
        if [ -n "${HOSTFILE:-}" ]; then
            COMMAND=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$MASTER_PORT"
                ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
            [ "$NNODES" -eq 1 ] || COMMAND+=(--num_nodes "$NNODES")
            [ "$NUM_GPUS" -eq 1 ] || COMMAND+=(--num_gpus "$NUM_GPUS")
        else
            # The command that DeepSpeed's runner would start here. Without the runner, signals reach the processes.
            COMMAND=("$PYTHON" -m deepspeed.launcher.launch --world_info "$(_world_info)"
                --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT"
                --log_level warning)
        fi
        COMMAND+=(--no_local_rank --module chatglm_ptuning)
        ;;
    torchrun)
        COMMAND=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NUM_GPUS" --max_restarts "${MAX_RESTARTS:-0}")
        if [ "$NNODES" -gt 1 ]; then
            COMMAND+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --rdzv_backend c10d
                --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "${SLURM_JOB_ID:-chatglm-ptuning}")
        else
            COMMAND+=(--standalone)
        fi
        # A new store for every start: in a shared one, a restarted job would find the addresses of the old processes.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        COMMAND+=(-m chatglm_ptuning)
        ;;
    slurm)
        [ -n "${SLURM_PROCID:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
            _stop "LAUNCHER=slurm is for processes that srun starts, with MASTER_ADDR set: see scripts/slurm.sbatch."
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR MASTER_PORT
        export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$NUM_GPUS}
        ;;
    *) _stop "LAUNCHER must be deepspeed, torchrun or slurm, got $LAUNCHER." ;;
    esac
}

# launch train FLAGS...: runs the command in all processes. SIGTERM and SIGINT are passed on, with exit code 143 or 130.
launch() {
    local command=$1
    shift
    if [ "${DS_CONFIG:-none}" != none ]; then
        set -- --deepspeed "$DS_CONFIG" "$@"
    fi
    _choose_command
    if [ "${COMMAND[2]}" = chatglm_ptuning ]; then
        exec "${COMMAND[@]}" "$command" "$@"
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / NUM_GPUS > 0 ? $(nproc) / NUM_GPUS : 1))}
    local signalled="" code=0
    "${COMMAND[@]}" "$command" "$@" &
    local launcher=$!
    trap 'signalled=143; kill -TERM "$launcher" 2>/dev/null || true' TERM
    trap 'signalled=130; kill -INT "$launcher" 2>/dev/null || true' INT
    while kill -0 "$launcher" 2>/dev/null; do
        code=0
        wait "$launcher" || code=$?
    done
    exit "${signalled:-$code}"
}
