#!/usr/bin/env bash
# The whole experiment in three minutes on two CPU cores, on drawn pictures: no data and no GPU.
# Makes .venv, unless a virtual environment is active, trains a teacher on "real" pictures and two
# students on "synthetic" ones, and prints the accuracy of the three on "real" test pictures. All
# files go to a new folder under runs/.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt

demo=runs/demo-$(date +%Y%m%d-%H%M%S)
echo "== a teacher learns from real pictures"
python fine_tune_teacher_cifar10.py --demo --amp off --run_dir "$demo/teacher" --output "$demo/teacher.pth"
echo "== a student learns from that teacher, on synthetic pictures"
python main_train_cifar10.py --demo --amp off --teacher_weights "$demo/teacher.pth" \
    --run_dir "$demo/student" --output "$demo/student.pth"
echo "== the control: a student of an untrained teacher"
python main_train_cifar10.py --demo --amp off --teacher_weights random \
    --run_dir "$demo/control" --output "$demo/control.pth"
python plots.py "$demo/teacher" "$demo/student" "$demo/control" --output "$demo" > /dev/null

last() { tail -n 1 "$demo/$1/metrics.csv" | cut -d, -f6; } # column 6: test_accuracy
echo
LC_ALL=C printf '%-42s %6.2f %%\n' \
    "student of an untrained teacher" "$(last control)" \
    "teacher, trained on real pictures" "$(last teacher)" \
    "student, trained on synthetic pictures" "$(last student)"
echo
ls "$demo"/*.png "$demo"/{teacher,student,control}/*.png
