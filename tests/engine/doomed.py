"""Work for processes that a test starts: the first fails, and the second waits for ever or fails in its turn."""

import os
import signal

from kdzoo.errors import AskedToEnd, UserError


def fail(_: object, pipe: str, how: str) -> None:
    """The first process ends by an error, is killed or is asked to end, once it knows that the second is there."""
    if os.environ["RANK"] == "1":
        with open(pipe + ".number", "w") as file:
            file.write(str(os.getpid()))
        with open(pipe) as end:
            end.read()  # until the first is no more
        if how == "error":
            signal.pause()
        raise RuntimeError("connection closed by peer")
    os.open(pipe, os.O_WRONLY)  # waits for the reader, and stays open until this process is no more
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "end":
        raise AskedToEnd
    raise UserError("this is missing; ask for that")
