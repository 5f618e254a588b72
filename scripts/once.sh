# Sourced by the experiments.
#
#     once RUN SCRIPT FLAGS...
#
# is a run in the folder RUN, whose network goes to RUN.pth. If it is finished it is skipped, if it
# was stopped it goes on.

once() {
    local run=$1 script=$2
    shift 2
    if [ -e "$run.pth" ]; then
        echo "== $run: finished before"
    elif [ -e "$run/config.json" ]; then
        echo "== $run goes on"
        python "$script" --resume "$run"
    else
        echo "== $run"
        python "$script" --run_dir "$run" --output "$run.pth" "$@"
    fi
}
