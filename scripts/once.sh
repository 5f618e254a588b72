# Functions that the experiments in scripts/ share. A run in the folder RUN writes its network to
# RUN.pth. A finished run is skipped, a stopped one is resumed.

# The data: in the folder DMKD_DATA, or where the scripts expect it.
real=${DMKD_DATA:-data} cifake=${DMKD_DATA:-synthetic_data}/cifake_train_fake
data=(--data_dir "$real") both=(--data_dir "$real" --synthetic_data_dir "$cifake")

# The recipes of the fast pair: small networks that a CPU trains in one to two hours. The student's was
# chosen by scripts/search.sh.
muon="--optimizer muon --momentum 0.6 --weight_decay 0.005 --scheduler linear --augment reflect"
muon_student="$muon --batch_size 250 --lr 0.12"
# shellcheck disable=SC2034
fast="--arch airbench94 $muon" fast_student="--arch airbench94 $muon_student"
# shellcheck disable=SC2034
fast_teacher="$fast --batch_size 1000 --lr 0.24"

# usage_error MESSAGE
usage_error() {
    echo "error: $1; the first lines of $0 say how to use it" >&2
    exit 2
}

# experiment NAME [SEED ...]: its runs and their table go to runs/NAME$TAG/. Checks the arguments, and
# then makes the environment.
experiment() {
    runs=runs/$1${TAG:-}
    local seed
    for seed in "${@:2}"; do
        [[ $seed =~ ^[0-9]+$ ]] || usage_error "'$seed' is not a seed"
    done
    [[ ${teacher:-} != -* ]] || usage_error "'$teacher' is no weight file"
    source "$(dirname "$0")/environment.sh" requirements.txt
}

# once RUN SCRIPT FLAGS...
once() {
    local run=$1 script=$2
    shift 2
    if [ -e "$run.pth" ]; then
        echo "== $run: finished before"
    elif [ -e "$run/config.json" ]; then
        echo "== $run: resumed"
        python "$script" --resume "$run" "$@" # refuses other flags than those it was started with
    else
        echo "== $run"
        python "$script" --run_dir "$run" --output "$run.pth" "$@"
    fi
}

# wanted NAME: whether SETTINGS names this student, or is not given.
known=
wanted() {
    known+=" $1"
    case " ${SETTINGS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac
}

# student NAME FLAGS...: if it is wanted, a student with $seed and the flags of the array `recipe`, in
# $runs/NAME-$seed.
student() {
    wanted "$1" || return 0
    local name=$1
    shift
    once "$runs/$name-$seed" main_train_cifar10.py --seed "$seed" "${recipe[@]}" "$@"
}

# measured FOLDER IMAGES TEACHER FLAGS...: what measure.py says of a set of images, in FOLDER.
measured() {
    [ -e "$1/measures.json" ] || python synthetic_data/measure.py "$2" "${data[@]}" --output "$1" \
        --teacher_weights "$3" "${@:4}"
}

# summary [RUN ...]: the table of these runs, or of all runs of the experiment. Then an error, if SETTINGS
# names a student that there is not.
summary() {
    local name unknown=
    for name in ${SETTINGS:-}; do
        [[ "$known " == *" $name "* ]] || unknown+=" $name"
    done
    [ $# -gt 0 ] || set -- "$runs"/*/
    python scripts/summarize.py "$runs" "$@" || [ -n "$unknown" ]
    [ -z "$unknown" ] || usage_error "SETTINGS: there is no$unknown"
}
