"""Training with two processes, either one killed, resumed: the biases of an unbroken run, to the byte. Run by hand:

    PYTHONPATH=.:tests python tests/train/kill_processes.py

It takes some minutes, and prints what the survivor said and after how many seconds it ended.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from devices import cpus
from training import Process, data, wait_for_steps, write_model

STEPS = 60


def start(folder, base, out, *more):
    """Two processes, each with two devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (
        f"pairs --model {base} --data {data(1)} --output {out} --batch-size 8 --max-seq-length 75 --lr 1e-2 "
        f"--steps {STEPS} --save-every 5 --mesh data=2,fsdp=2 --coordinator localhost:{port} --processes 2"
    ).split()
    return [Process(folder, [*arguments, "--process", str(number), *more], **cpus(2)) for number in range(2)]


def finish(processes):
    """Waits for both, which must end well."""
    for process in processes:
        code, output, errors = process.wait()
        assert code == 0, output + errors


def main():
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["SGPT_COMPILATION_CACHE"] = str(folder / "compiled")
        base = write_model("gpt_neo", folder / "base")
        finish(start(folder, base, folder / "whole"))
        whole = {
            name: (folder / "whole" / name).read_bytes() for name in ("biases.safetensors", "metrics.jsonl")
        }
        for killed in (0, 1):
            out = folder / f"killed{killed}"
            processes = start(folder, base, out)
            wait_for_steps(processes[0], out, 12)
            processes[killed].popen.send_signal(signal.SIGKILL)
            begin = time.monotonic()
            code, _, errors = processes[1 - killed].wait()
            seconds = time.monotonic() - begin
            print(
                f"process {killed} killed: the other ended with {code} after {seconds:.1f} s and said:\n{errors}"
            )
            assert code == 1 and seconds < 40
            assert errors.splitlines()[-1].startswith(f"error: process {killed} was lost")
            assert errors.count("\n") == 1, errors
            finish(start(folder, base, out, "--resume"))
            same = {name: (out / name).read_bytes() == content for name, content in whole.items()}
            print(f"resumed: the same as of an unbroken run: {same}", flush=True)
            assert all(same.values())


if __name__ == "__main__":
    sys.exit(main())
