"""Settings of runs that take seconds: digits on a CPU in float32, resnet14 teaching resnet8 unless told otherwise."""

from kdzoo.settings import resolve

SHORT = ["protocol.epochs=2", "data.limit=320", "engine.device=cpu", "engine.precision=float32"]


def settings(out, distiller, *more, student="resnet8", teacher="resnet14"):
    values = {
        "distiller": {"name": distiller},
        "student": {"name": student},
        "teacher": {"name": teacher},
        "output": {"root": str(out)},
    }
    return resolve(values, [*SHORT, *more])
