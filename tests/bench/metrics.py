"""What a daemon tells of itself, for the benchmarks of this directory."""
import socket


def samples(path):
    """The values of the metrics at a socket, by name and labels as they are written."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        s.sendall(b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n")
        text = b""
        while part := s.recv(65536):
            text += part
    lines = text.decode().split("\r\n\r\n", 1)[1].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in ("", "#"))}


def phases(values):
    """Milliseconds that each phase has taken so far, of all that `samples` has found."""
    sums = {}
    for name, value in values.items():
        if name.startswith("kuasar_phase_seconds_sum"):
            phase = name.split('phase="')[1].split('"')[0]
            sums[phase] = sums.get(phase, 0) + value * 1000
    return sums
