"""What holds for all tests."""

import os
import signal

from devices import QUICK

# JAX reads it when it first looks for devices.
if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

# A command that trains would make this process keep all that its tests ever freed.
os.environ.setdefault("MALLOC_TOP_PAD_", "131072")  # glibc's own value; who sets one is left alone

# A shell starts what runs behind `&` with interrupts ignored, and a program inherits that: tests that interrupt
# themselves, or a command, would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
