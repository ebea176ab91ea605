"""Work for processes that a test starts: the first fails, and the second would wait for ever."""

import os
import signal

from kdzoo.errors import UserError


def fail(_: object, pipe: str, how: str) -> None:
    """Fails as asked once the other process has written its number into ``pipe``."""
    if os.environ["RANK"] == "1":
        with open(pipe, "w") as end:
            end.write(str(os.getpid()))
        signal.pause()
    with open(pipe) as end:  # waits for the writer
        number = end.read()
    with open(pipe + ".read", "w") as file:
        file.write(number)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("this is not to be had; ask for that")
