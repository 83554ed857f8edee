"""Jobs for tests of worker processes: run as ``python -m worker_jobs WHAT``, it does that for every request."""

import ctypes
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from tilewright.codegen.workers.channel import Channel, Message
from tilewright.codegen.workers.child import connect, serve

SENT_TWICE = {"a": [1, "zwei", None, 0.5]}


def shout(bytes_: bytes) -> None:
    """Send bytes that the channel would not, over the parent's connection."""
    socket.socket(fileno=os.dup(int(sys.argv[2]))).sendall(bytes_)


def send_descriptor(channel: Channel) -> None:
    channel.send({}, [1])


def drip() -> None:
    """A message that goes on arriving, a byte at a time."""
    shout(struct.pack("<I", 1 << 20))
    while True:
        shout(b" ")
        time.sleep(0.05)


def hang_within_steps(message: Message) -> None:
    """Count up in the file that the parent watches, then stop counting."""
    with Path(message["watched"]).open("r+b", buffering=0) as file:
        for step in range(message["steps"]):
            file.seek(0)
            file.write(struct.pack("<q", step + 1))
            time.sleep(message["step_s"])
    if message["hangs"]:
        time.sleep(60)


def main() -> None:
    channel, (what,) = connect(file_bytes=1 << 16)
    if what == "never ready":
        print("no such luck", flush=True)
        sys.exit(4)

    def answer(message: Message, descriptors: list[int]) -> Message:
        match what:
            case "echo":
                read = [os.read(each, 100).decode() for each in descriptors]
                for each in descriptors:
                    os.close(each)
                return {"said": message, "read": read}
            case "facts":
                return {
                    "group": os.getpgid(0),
                    "session": os.getsid(0),
                    "limits": limits(),
                    "stdin": os.read(0, 1).hex(),
                }
            case "die":
                print("first\n\n\x1b[31mlast words", flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(60)
            case "steps":
                hang_within_steps(message)
            case "break off":
                channel.close()
                time.sleep(60)
            case "too long":
                shout(struct.pack("<I", 1 << 27))
            case "too deep":
                shout(struct.pack("<I", 1 << 20) + b"[" * (1 << 20))
            case "no object":
                shout(struct.pack("<I", 2) + b"[]")
            case "no JSON":
                shout(struct.pack("<I", 3) + b"\xff{}")
            case "drip":
                drip()
            case "descriptor":
                send_descriptor(channel)
            case "print for ever":
                while True:
                    os.write(1, b"x" * 1000)
            case "child":
                child = os.fork()
                if child == 0:
                    time.sleep(60)
                return {"pid": child}
        return {}

    serve(channel, answer)


def limits() -> dict[str, int]:
    import resource

    no_signal = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(no_signal))  # PR_GET_PDEATHSIG
    return {
        "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "file": resource.getrlimit(resource.RLIMIT_FSIZE)[1],
        "death": no_signal.value,
    }


if __name__ == "__main__":
    main()
