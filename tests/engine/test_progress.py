"""What a person sees: one line an epoch where there is no terminal, and on one a view of the whole suite."""

import io

from rich.console import Console

from kdzoo.engine.lane import titles
from kdzoo.engine.progress import Progress
from kdzoo.settings import resolve


def record(epoch, top1, steps=10):
    return {"epoch": epoch, "step": epoch * steps, "top1": top1, "loss": {"ce": 1.5}, "images_per_second": 900.0}


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def shown(progress):
    with progress.console.capture() as capture:
        progress.console.print(progress.view())
    return capture.get()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_without_a_terminal_every_epoch_of_every_lane_is_a_line():
    with Progress(console=console(terminal=False)) as progress:
        progress.suite([4])
        progress.group(0, "resnet14 on digits")
        progress.worth(4)
        progress.begin(10, 20, 0, ["kd", "lfcc"])
        for epoch in (1, 2):
            progress.epoch(record(epoch, 50.0), "kd")
            progress.epoch(record(epoch, 60.0), "lfcc")
    lines = progress.console.file.getvalue().splitlines()
    assert lines[0] == "group 1/1: resnet14 on digits"
    assert lines[1] == "  epoch   1/2: top-1  50.00 %  (ce 1.500; 900 images/s)  kd"
    assert len(lines) == 5


def test_on_a_terminal_the_view_shows_groups_lanes_accuracies_and_losses():
    progress = Progress(console=console(terminal=True))
    progress.suite([4, 4])
    progress.group(0, "resnet14 on digits")
    progress.worth(4)
    progress.begin(10, 20, 0, ["kd", "lfcc"])
    progress.epoch(record(1, 50.25), "kd")
    progress.show(12, {"ce": 0.75}, 900.0, "lfcc")
    seen = shown(progress)
    assert "group 1/2" in seen
    assert "epoch 2/2" in seen
    assert "900 images/s" in seen
    lanes = {line.split()[0]: line for line in seen.splitlines() if line.startswith(("kd", "lfcc"))}
    assert "50.25 %" in lanes["kd"]
    assert "ce 0.750" in lanes["lfcc"]
    assert "-" in lanes["lfcc"]


def test_an_epoch_that_was_not_measured_says_so_and_the_last_accuracy_stays():
    progress = Progress(console=console(terminal=False))
    progress.begin(10, 30, 0, ["kd", "none"])
    progress.epoch(record(1, 50.0), "kd")
    progress.epoch(record(2, None), "kd")
    assert "epoch   2/3: not measured  (ce 1.500" in progress.console.file.getvalue()
    assert "50.00 %" in shown(progress)


def test_the_view_replaces_the_lines_of_all_epochs_but_the_last():
    progress = Progress(console=console(terminal=True))
    progress.suite([2])
    progress.worth(2)
    progress.begin(10, 20, 0, ["kd"])
    progress.epoch(record(1, 50.0), "kd")
    assert "epoch" not in progress.console.file.getvalue()
    progress.epoch(record(2, 61.0), "kd")
    assert "epoch   2/2: top-1  61.00 %" in progress.console.file.getvalue()


def test_a_single_run_has_its_lines_and_no_table():
    progress = Progress(console=console(terminal=True))
    progress.begin(10, 20, 0, ["kd"])
    progress.epoch(record(1, 50.0), "kd")
    assert "epoch   1/2: top-1  50.00 %  (ce 1.500; 900 images/s)\n" in progress.console.file.getvalue()
    assert "lane" not in shown(progress)
    assert "ce 1.500" in shown(progress)


def test_the_time_left_is_that_of_the_whole_suite():
    clock = Clock()
    progress = Progress(console=console(terminal=True), clock=clock)
    progress.suite([4, 12])
    progress.group(0, "first")
    progress.worth(4)
    progress.begin(10, 20, 0, ["kd", "lfcc"])
    assert progress.left() == ""
    clock.now = 60.0
    progress.show(10, {}, 1.0, "kd")  # half of a quarter took a minute
    assert progress.left() == ", about 7 min left in all"
    clock.now = 120.0
    progress.show(20, {}, 1.0, "kd")
    progress.group(1, "second")
    assert "group 2/2: second, about 6 min left in all" in progress.console.file.getvalue()
    assert "6 min left in all" in shown(progress)


def test_a_teachers_training_counts_nothing_and_what_was_done_before_says_nothing_of_speed():
    clock = Clock()
    progress = Progress(console=console(terminal=True), clock=clock)
    progress.suite([8])
    progress.group(0, "first")
    progress.begin(10, 20, 0, ["none"])
    progress.show(20, {}, 1.0, "none")
    assert progress.left() == ""
    progress.worth(8)
    progress.begin(10, 40, 20, ["kd"])  # resumed half-way
    assert progress.left() == ""
    clock.now = 60.0
    progress.show(30, {}, 1.0, "kd")
    assert progress.left() == ", about 60 s left in all"


def test_a_group_of_another_process_says_nothing_of_speed():
    clock = Clock()
    progress = Progress(console=console(terminal=True), clock=clock)
    progress.suite([8, 8])
    progress.group(0, "first")  # another process is at it
    clock.now = 5.0
    progress.group(1, "second")
    assert progress.left() == ""


def test_quiet_shows_nothing(capsys):
    with Progress(quiet=True) as progress:
        progress.suite([1])
        progress.group(0, "first")
        progress.worth(1)
        progress.begin(10, 10, 0, ["kd"])
        progress.epoch(record(1, 50.0), "kd")
    assert capsys.readouterr() == ("", "")


def test_lanes_are_called_by_what_tells_them_apart():
    def run(distiller, student, **keywords):
        return resolve({"distiller": {"name": distiller, **keywords}, "student": {"name": student}})

    assert titles([run("kd", "resnet8")]) == ["kd"]
    assert titles([run("kd", "resnet8"), run("none", "resnet8"), run("kd", "resnet8", temperature=1.0)]) == [
        "kd temperature=4.0",
        "none",
        "kd temperature=1.0",
    ]
    assert titles([run("kd", "resnet8"), run("kd", "resnet14")]) == ["resnet8 kd", "resnet14 kd"]
