"""What a server grants a connection: time, memory, a slot."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 1e6  # GiB, seconds, connections: more than anyone needs, less than sockets and clocks can handle


@dataclass(frozen=True)
class Limits:
    """Limits of a server; ValueError names an impossible one."""

    timeout_s: float = 600.0  # longest silence during a scan
    idle_s: float = 60.0  # longest wait for a configuration and a header
    slots: int = 1  # simultaneous reconstructions
    max_gib: float = 16.0  # k-space of one connection
    max_message_mib: float = 256.0
    connections: int = 64  # with an open scan
    grace_s: float = 60.0  # for running scans after SIGTERM

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value <= MOST and not (name == "grace_s" and value == 0):
                least = "at least" if name == "grace_s" else "above"
                raise ValueError(f"the server's limit {name} must be {least} 0 and at most {MOST:g}, got {value:g}")
