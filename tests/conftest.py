"""What holds for all tests."""

import signal

# A shell starts what runs behind `&` with interrupts ignored, and a program inherits that: tests that interrupt
# themselves, or a command, would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
