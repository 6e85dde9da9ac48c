#!/usr/bin/env python3
"""Containers of WebAssembly: the daemon's share of Create and Start, memory, requests per second.

Run inside the test bed, which has to be up, after the suite `wasm` has imported its image:
tests/bed/bed.sh run env WASMTIME=PATH tests/bench/wasm.py [ROUNDS]
Times of Create and Start are the daemon's own (metrics), without CRI and the client. The module is in
the cache. Memory is private dirty memory of an idle container's process. Requests come from one client
with one connection that is kept open, so they are a bound of latency rather than of throughput.
Stock runc's figures are of a container of busybox in the same bed, in turns with ours. With WASMTIME set to
the `wasmtime` program of the same version, the same component is served by `wasmtime serve`, in turns with
ours, on one processor each; without it that part is skipped.
"""
import json, os, shutil, socket, statistics, subprocess, sys, tempfile, time

BED = os.environ.get("BED") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../target/bed")
BED = os.path.abspath(BED)
METRICS = f"{BED}/run/kuasar-wasm-metrics.sock"
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
PHASES = ["task_create", "rootfs", "wasm_artifact", "engine_create", "task_start", "engine_start"]


def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def phases():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(METRICS)
        s.sendall(b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n")
        text = b""
        while part := s.recv(65536):
            text += part
    sums = {}
    for line in text.decode().splitlines():
        if line.startswith("kuasar_phase_seconds_sum"):
            name = line.split('phase="')[1].split('"')[0]
            sums[name] = sums.get(name, 0) + float(line.split()[-1]) * 1000
    return sums


def config(top, name, value):
    path = f"{top}/{name}.json"
    with open(path, "w") as f:
        json.dump(value, f)
    return path


def pod(top, handler, i):
    value = {"metadata": {"name": f"b{i}", "namespace": "bench", "uid": f"{os.getpid()}-{handler}-{i}", "attempt": 1},
             "hostname": "bench", "log_directory": top, "linux": {"cgroup_parent": f"/kuasar-bench/{handler}{i}",
             "security_context": {"namespace_options": {"pid": 1}}}}
    path = config(top, f"pod-{handler}-{i}", value)
    words = ["crictl", "runp"] + (["-r", handler] if handler != "runc" else []) + [path]
    return path, run(*words).strip()


def container(top, pod_path, sandbox, image, command, i):
    path = config(top, "container", {"metadata": {"name": f"c{i}"}, "image": {"image": image}, "command": command,
                                     "log_path": f"c{i}.log", "linux": {}})
    c = run("crictl", "create", sandbox, path, pod_path).strip()
    begun = time.monotonic()
    run("crictl", "start", c)
    return c, (time.monotonic() - begun) * 1000


def pid_of(c):
    return json.loads(run("crictl", "inspect", c))["info"]["pid"]


def private(pid):
    kinds = {}
    for line in open(f"/proc/{pid}/smaps_rollup"):
        if line.startswith(("Private_Dirty", "Anonymous", "Pss:", "Rss:")):
            kinds[line.split(":")[0]] = int(line.split()[1])
    return kinds


def requests(ip, port, seconds):
    s = socket.create_connection((ip, port))
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ask = f"GET / HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    done, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        s.sendall(ask)
        answer = b""
        while b"hello over http" not in answer:
            part = s.recv(65536)
            if not part:
                raise SystemExit(f"the connection ends: {answer!r}")
            answer += part
        while not answer.endswith(b"0\r\n\r\n") and b"chunked" in answer:
            answer += s.recv(65536)
        done += 1
    return done / seconds


def answers(ip, port):
    """Waits until a server answers."""
    until = time.monotonic() + 20
    while True:
        try:
            return requests(ip, port, 0.01)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def confine(pid, processors):
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), processors)


def row(name, values):
    values = sorted(values)
    print(f"{name:34} median {statistics.median(values):8.2f}  p95 {values[int(len(values) * 0.95) - 1]:8.2f}")


top = tempfile.mkdtemp(prefix="wasm-bench.", dir=f"{BED}/run")
pods = {handler: pod(top, handler, 0) for handler in ("kuasar-wasm", "runc")}
try:
    path, sandbox = pods["kuasar-wasm"]
    container(top, path, sandbox, "localhost/wasm:latest", ["/sleep.wasm"], "warm")
    ours, stock, spent, idle = [], [], [], []
    for i in range(ROUNDS):
        before = phases()
        c, took = container(top, path, sandbox, "localhost/wasm:latest", ["/sleep.wasm"], i)
        after = phases()
        ours.append(took)
        spent.append({name: after.get(name, 0) - before.get(name, 0) for name in PHASES})
        idle.append(private(pid_of(c)))
        run("crictl", "rm", "-f", c)
        c, took = container(top, *pods["runc"], "localhost/busybox:latest", ["sleep", "1000"], i)
        stock.append(took)
        run("crictl", "rm", "-f", c)
    row_of_share = [s["task_create"] + s["task_start"] for s in spent]
    print("milliseconds")
    row("stock: crictl start", stock)
    row("ours: crictl start", ours)
    for name in PHASES:
        row(f"ours: {name}", [s[name] for s in spent])
    row("ours: our share, Create and Start", row_of_share)
    print("kB of an idle container")
    for kind in ("Private_Dirty", "Anonymous", "Pss", "Rss"):
        row(kind, [m[kind] for m in idle])
    c, _ = container(top, path, sandbox, "localhost/wasm:latest", ["/http.wasm"], "http")
    ip = json.loads(run("crictl", "inspectp", sandbox))["status"]["network"]["ip"]
    answers(ip, 8080)
    rates = {"ours": []}
    wasmtime = os.environ.get("WASMTIME", "")
    served = None
    if shutil.which(wasmtime):
        # The program that the suite has made.
        served = subprocess.Popen([wasmtime, "serve", "--addr", "127.0.0.1:18080", "-Scli",
                                   f"{BED}/run/wasm/files/http.wasm"], stdout=subprocess.DEVNULL)
        rates["wasmtime serve"] = []
    else:
        print("skipped: WASMTIME names no program to compare requests per second with")
    try:
        processor = {max(os.sched_getaffinity(0))}
        confine(pid_of(c), processor)
        if served:
            answers("127.0.0.1", 18080)
            confine(served.pid, processor)
        for _ in range(3):
            rates["ours"].append(requests(ip, 8080, 3))
            if served:
                rates["wasmtime serve"].append(requests("127.0.0.1", 18080, 3))
    finally:
        if served:
            served.kill()
            served.wait()
    for name, values in rates.items():
        print(f"requests per second, one connection, one processor: {name}: {statistics.median(values):.0f}")
    if served:
        ratio = statistics.median(rates["ours"]) / statistics.median(rates["wasmtime serve"])
        print(f"ours / wasmtime serve: {ratio:.2f}")
finally:
    for _, sandbox in pods.values():
        run("crictl", "rmp", "-f", sandbox)
