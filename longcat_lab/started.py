"""Who started this process, looked up before any import takes its seconds: that one may be dead by then."""

import os

PID, PARENT = os.getpid(), os.getppid()
