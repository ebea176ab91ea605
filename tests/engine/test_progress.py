"""What a person sees: lines in time where there is no terminal, and on one a view of the whole suite."""

import io
import os
import sys
from contextlib import nullcontext
from threading import Event

import pytest

from kdzoo.engine.lane import titles
from kdzoo.engine.progress import EVERY, FIRST, Progress, every_second, plain_console
from kdzoo.resolve import resolve


def record(epoch, top1, steps=10):
    return {"epoch": epoch, "step": epoch * steps, "top1": top1, "loss": {"ce": 1.5}, "images_per_second": 900.0}


def console(terminal):
    return plain_console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


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
        progress.count_next(4)
        progress.begin("training kd", 10, 20, 0, ["kd", "lfcc"])
        for epoch in (1, 2):
            progress.epoch(record(epoch, 50.0), "kd")
            progress.epoch(record(epoch, 60.0), "lfcc")
    lines = progress.console.file.getvalue().splitlines()
    assert lines[0] == "group 1/1: resnet14 on digits"
    assert lines[1] == "training kd: 2 epochs of 10 steps"
    assert lines[2] == "  epoch   1/2: top-1  50.00 %  (ce 1.500; 900 images/s)  kd"
    assert len(lines) == 6


def test_what_others_wrote_commands_no_terminal():
    with Progress(console=console(terminal=False)) as progress:
        progress.say("\x1b[2Jcat\n")
    assert progress.console.file.getvalue() == "\\x1b[2Jcat\\n\n"


def test_on_a_terminal_the_view_shows_groups_lanes_accuracies_and_losses():
    progress = Progress(console=console(terminal=True))
    progress.suite([4, 4])
    progress.group(0, "resnet14 on digits")
    progress.count_next(4)
    progress.begin("training kd", 10, 20, 0, ["kd", "lfcc"])
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
    progress.begin("training kd", 10, 30, 0, ["kd", "none"])
    progress.epoch(record(1, 50.0), "kd")
    progress.epoch(record(2, None), "kd")
    assert "epoch   2/3: not measured  (ce 1.500" in progress.console.file.getvalue()
    assert "50.00 %" in shown(progress)


def test_the_view_replaces_the_lines_of_all_epochs_but_the_last():
    progress = Progress(console=console(terminal=True))
    progress.suite([2])
    progress.count_next(2)
    progress.begin("training kd", 10, 20, 0, ["kd"])
    progress.epoch(record(1, 50.0), "kd")
    assert "epoch   1/2" not in progress.console.file.getvalue()
    progress.epoch(record(2, 61.0), "kd")
    assert "epoch   2/2: top-1  61.00 %" in progress.console.file.getvalue()


def test_a_single_run_has_its_lines_and_no_table():
    progress = Progress(console=console(terminal=True))
    progress.begin("training kd", 10, 20, 0, ["kd"])
    progress.epoch(record(1, 50.0), "kd")
    assert "epoch   1/2: top-1  50.00 %  (ce 1.500; 900 images/s)\n" in progress.console.file.getvalue()
    assert "lane" not in shown(progress)
    assert "ce 1.500" in shown(progress)


def test_the_time_left_is_that_of_the_whole_suite():
    clock = Clock()
    progress = Progress(console=console(terminal=True), clock=clock)
    progress.suite([4, 12])
    progress.group(0, "first")
    progress.count_next(4)
    progress.begin("training kd", 10, 20, 0, ["kd", "lfcc"])
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
    progress.begin("training kd", 10, 20, 0, ["none"])
    progress.show(20, {}, 1.0, "none")
    assert progress.left() == ""
    clock.now = 600.0
    progress.count_next(8)
    progress.begin("training kd", 10, 40, 20, ["kd"])  # resumed half-way
    assert progress.left() == ""
    clock.now = 660.0
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
        progress.count_next(1)
        progress.begin("training kd", 10, 10, 0, ["kd"])
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


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain(clock):
    """A view without a terminal, whose ticks are the test's."""
    with Progress(console=console(terminal=False), clock=clock, ticker=lambda work: nullcontext()) as progress:
        yield progress


def printed(progress):
    return progress.console.file.getvalue().splitlines()


def test_a_training_is_announced_with_its_time_as_soon_as_steps_are_timed(plain, clock):
    plain.begin("distilling resnet18 from vit_s with uhkd on digits", 21, 168, 0, ["uhkd"])
    clock.now = 60.0  # the first step, which says nothing of the others
    plain.show(1, {"ce": 2.0}, 1.0, "uhkd")
    assert printed(plain) == []
    clock.now = 61.0
    plain.show(2, {"ce": 2.0}, 64.0, "uhkd")
    clock.now = 62.0
    plain.show(3, {"ce": 2.0}, 64.0, "uhkd")
    assert printed(plain) == ["distilling resnet18 from vit_s with uhkd on digits: 8 epochs of 21 steps, about 3 min"]


def test_the_time_of_a_training_that_goes_on_is_that_of_what_is_left(plain, clock):
    plain.begin("training resnet18", 10, 20, 15, ["none"])
    plain.show(16, {}, 1.0, "none")
    clock.now = 4.0
    plain.show(17, {}, 1.0, "none")
    assert printed(plain) == ["training resnet18: 2 epochs of 10 steps, from step 15, about 20 s"]


def test_a_line_comes_in_time_even_within_one_long_step(plain, clock):
    plain.begin("training vit_s", 21, 168, 0, ["none"])
    clock.now = FIRST - 0.1
    plain.tick()
    assert printed(plain) == []
    clock.now = FIRST
    plain.tick()
    assert printed(plain) == ["training vit_s: 8 epochs of 21 steps", "  still in step 1/168, 5 s so far"]
    plain.tick()
    assert len(printed(plain)) == 2
    clock.now += EVERY
    plain.tick()
    assert printed(plain)[2:] == ["  still in step 1/168, 18 s so far"]


def test_a_line_tells_step_loss_speed_and_the_time_left(plain, clock):
    plain.begin("training vit_s", 21, 168, 0, ["none"])
    for clock.now in (2.0, 4.0, 6.0):
        plain.show(int(clock.now) // 2, {"ce": 1.5, "kd": 0.25}, 32.0, "none")
    clock.now = 4.0 + EVERY - 0.1
    plain.tick()
    assert printed(plain)[1:] == []
    clock.now = 4.0 + EVERY
    plain.step(8)
    plain.tick()
    assert printed(plain)[1] == "  step 8/168: loss 1.750, 32 images/s, about 6 min left"
    assert max(map(len, printed(plain))) < 80


@pytest.mark.parametrize("titles", [["kd"], ["kd", "none"]])
def test_a_training_that_is_taken_up_at_its_end_has_a_line_without_a_loss(plain, clock, titles):
    plain.begin("training kd", 10, 20, 20, titles)
    clock.now = FIRST
    plain.tick()
    assert plain.console.file.getvalue() == "  step 20/20\n"


def test_lines_reset_the_wait_so_that_nothing_is_said_twice(plain, clock):
    plain.say("teacher vit_s: top-1 95.00 %")
    clock.now = EVERY - 0.1
    plain.tick()
    assert len(printed(plain)) == 1
    clock.now = EVERY
    plain.tick()
    assert len(printed(plain)) == 2


def test_many_runs_share_one_line_with_their_mean_loss_and_the_best_of_them(plain, clock):
    plain.begin("training 2 runs side by side on digits", 10, 20, 0, ["kd", "lfcc"])
    plain.epoch({**record(1, 50.0), "step": 10}, "kd")
    plain.epoch({**record(1, 60.0), "loss": {"ce": 2.5}}, "lfcc")
    before = len(printed(plain))
    clock.now = EVERY
    plain.step(11)
    plain.tick()
    [line] = printed(plain)[before:]
    assert line.startswith("  step 11/20: 2 runs, mean loss 2.000, best top-1 60.00 % (lfcc), 900 images/s")


def test_the_line_of_a_suite_ends_with_the_time_left_in_all(plain, clock):
    plain.suite([2, 2])
    plain.count_next(2)
    plain.begin("training kd", 10, 20, 0, ["kd"])
    clock.now = 60.0
    plain.show(10, {"ce": 1.0}, 1.0, "kd")
    plain.tick()
    assert printed(plain)[-1] == "  step 10/20: loss 1.000, 1 images/s, about 3 min left in all"


@pytest.mark.parametrize(("others", "said"), [(0, "about 30 s left"), (8, "about 30 s left, about 6 min left in all")])
def test_the_time_left_in_all_is_said_where_more_is_left_than_this_training(plain, clock, others, said):
    plain.suite([4, others])
    plain.count_next(4)
    plain.begin("training kd", 10, 40, 0, ["kd"])
    for step, at in (10, 70.0), (20, 90.0), (30, 130.0):  # the first steps are not timed, and took longer
        clock.now = at
        plain.show(step, {"ce": 1.0}, 1.0, "kd")
    plain.tick()
    assert printed(plain)[-1] == f"  step 30/40: loss 1.000, 1 images/s, {said}"


def test_what_is_done_beside_training_is_named_if_it_takes_long(plain, clock):
    with plain.doing("opening folder:flowers [/]") as rename:
        clock.now = 4.0
        plain.tick()
        assert printed(plain) == []
        clock.now = 6.0
        plain.tick()
        rename("decoding train: 256 of 5000 images")
        clock.now = 30.0
        plain.tick()
    assert printed(plain) == [
        "  opening folder:flowers [/], 6 s so far",
        "  decoding train: 256 of 5000 images, 30 s so far",
    ]


def test_the_activity_around_another_is_shown_again_after_it_even_after_an_error(plain, clock):
    with plain.doing("opening digits"):
        with pytest.raises(OSError, match="gone"), plain.doing("downloading"):
            raise OSError("gone")
        clock.now = 20.0
        plain.tick()
    assert printed(plain) == ["  opening digits, 20 s so far"]


def test_on_a_terminal_the_view_shows_the_activity(clock):
    progress = Progress(console=console(terminal=True), clock=clock)
    assert "decoding" not in shown(progress)
    with progress.doing("decoding train: 256 of 5000 images"):
        assert "decoding train: 256 of 5000 images" in shown(progress)


def test_quiet_starts_no_ticker():
    def forbidden(work):
        raise AssertionError("started")

    with Progress(quiet=True, ticker=forbidden):
        pass
    with pytest.raises(AssertionError, match="started"), Progress(console=console(terminal=False), ticker=forbidden):
        pass


def test_the_ticker_ticks_until_its_context_ends():
    ticked = Event()
    with every_second(ticked.set, seconds=0.001):
        assert ticked.wait(timeout=60)
    ticked.clear()
    assert not ticked.is_set()


def test_a_notebook_with_widgets_is_live_and_one_without_has_lines(tmp_path, monkeypatch):
    def notebook():
        return Progress(console=plain_console(file=io.StringIO(), force_jupyter=True))

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert not notebook().is_live
    monkeypatch.delitem(sys.modules, "ipywidgets")
    (tmp_path / "ipywidgets.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert notebook().is_live


def test_a_dumb_terminal_has_lines():
    dumb = plain_console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert not Progress(console=dumb).is_live
    assert Progress(console=console(terminal=True)).is_live


UNLIKELY = ["[/x]", "[red]hot", "a[/]b", ":smile:", "[link=https://x]y", "\\[x]", "[/"]


@pytest.mark.parametrize("text", UNLIKELY)
def test_texts_that_are_not_ours_are_shown_as_they_are(text):
    """Names of loss terms, lanes, paths and errors may hold what rich takes for markup."""
    for terminal in (False, True):
        for lanes in ([text], [text, "kd"]):
            progress = Progress(console=plain_console(file=io.StringIO(), force_terminal=terminal, width=200))
            progress.suite([4, 4])
            progress.group(0, f"{text} on digits")
            if len(lanes) > 1:
                progress.count_next(4)
            progress.begin(f"training {text}", 10, 20, 0, lanes)
            progress.show(5, {text: 0.75}, 900.0, text)
            progress.epoch(record(1, 50.0) | {"loss": {text: 1.5}}, text)
            with progress.doing(f"opening {text}"):
                assert f"opening {text}" in shown(progress)
            assert f"{text} 1.500" in shown(progress)
            progress.say(f"/data/{text}/x.png")
            lines = progress.console.file.getvalue().splitlines()
            assert [line for line in lines if line == f"/data/{text}/x.png"]
            assert f"group 1/2: {text} on digits" in lines


def test_work_continues_when_the_reader_of_its_lines_is_gone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"what is written to it is an error")
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(ticker=lambda work: nullcontext()) as progress:
            progress.say("epoch 1")
            progress.say("epoch 2")
        print("of others", file=stream)
