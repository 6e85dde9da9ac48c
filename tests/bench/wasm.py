#!/usr/bin/env python3
"""Containers of WebAssembly: the daemon's share of Create and Start, memory, requests per second.

Run inside the test bed, which has to be up, after the suite `wasm` has imported its image:
tests/bed/bed.sh run env WASMTIME=PATH tests/bench/wasm.py [ROUNDS]
MANY is how many containers are made in one go (100).
Times of Create and Start are the daemon's own (metrics), without CRI and the client. The module is in
the cache. Processor time is that of the daemon, sandbox-parent, the zygote and the container's process until
its module waits: on a machine that others use, too, it is what can be compared. Memory is private dirty memory of an idle container's process. Requests come from one client
with one connection that is kept open, so they are a bound of latency rather than of throughput.
Stock runc's figures are of a container of busybox in the same bed, in turns with ours. With WASMTIME set to
the `wasmtime` program of the same version, the same component is served by `wasmtime serve`, in turns with
ours, on one processor each, and the same module computes in both; without it that part is skipped.
"""
import concurrent.futures, json, os, shutil, socket, statistics, subprocess, sys, tempfile, time

from metrics import phases, samples

BED = os.environ.get("BED") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../target/bed")
BED = os.path.abspath(BED)
METRICS = f"{BED}/run/kuasar-wasm-metrics.sock"
MANY = int(os.environ.get("MANY", "100"))
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
PHASES = ["task_create", "rootfs", "wasm_artifact", "engine_create", "task_start", "engine_start"]


def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


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


def computed(text):
    """Seconds that /compute.wasm says it took."""
    return int(text.split()[-1]) / 1e9


def compute_speed(top, path, sandbox, wasmtime, rounds):
    """The same module in a container and by the `wasmtime` program, in turns."""
    seconds = {"ours": [], "wasmtime run": []}
    for i in range(rounds):
        c, _ = container(top, path, sandbox, "localhost/wasm:latest", ["/compute.wasm"], f"compute{i}")
        while json.loads(run("crictl", "inspect", c))["status"]["state"] != "CONTAINER_EXITED":
            time.sleep(0.1)
        seconds["ours"].append(computed(open(f"{top}/ccompute{i}.log").read()))
        run("crictl", "rm", "-f", c)
        seconds["wasmtime run"].append(computed(run(wasmtime, "run", f"{BED}/run/wasm/files/compute.wasm")))
    for name, values in seconds.items():
        print(f"300 million rounds of computing: {name}: median {statistics.median(values):.3f} s, "
              f"least {min(values):.3f} s")
    print(f"speed of compiled code, ours / wasmtime run: by medians "
          f"{statistics.median(seconds['wasmtime run']) / statistics.median(seconds['ours']):.3f}, "
          f"by least {min(seconds['wasmtime run']) / min(seconds['ours']):.3f}")


def in_one_go(top, pods, count):
    """So many containers in one pod, 16 clients at a time, for each of both; stock's first.

    Our share is what Create and Start took here, which includes waiting for processors, and the processor
    time of it, which says how many containers a second this machine could make if nothing else ran.
    """
    rates = {}
    for handler, image, command in (("runc", "localhost/busybox:latest", ["sleep", "1000"]),
                                    ("kuasar-wasm", "localhost/wasm:latest", ["/sleep.wasm"])):
        path, sandbox = pods[handler]

        def one(i):
            own = config(top, f"many-{handler}-{i}", {
                "metadata": {"name": f"m{i}"}, "image": {"image": image}, "command": command,
                "log_path": f"m-{handler}-{i}.log", "linux": {}})
            c = run("crictl", "create", sandbox, own, path).strip()
            run("crictl", "start", c)
            return c

        before, spent = phases(samples(METRICS)), processor_time()
        begun = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            made = list(pool.map(one, range(count)))
        took = time.monotonic() - begun
        spent, after = processor_time() - spent, phases(samples(METRICS))
        rates[handler] = count / took
        print(f"{count} containers in one go, {handler}: {took:.2f} s, {count / took:.1f} a second")
        if handler != "runc":
            # Looking at them takes the daemon's time, too: what they have used is added afterwards.
            pids = [pid_of(c) for c in made]
            spent -= processor_time()
            spent += processor_time(pids)
            share = sum(after.get(name, 0) - before.get(name, 0) for name in ("task_create", "task_start"))
            print(f"our share: {share / count:.2f} ms for each, of processor time {spent / count:.2f} ms: "
                  f"{os.cpu_count() * 1000 * count / spent:.0f} a second on {os.cpu_count()} processors")
        for c in made:
            run("crictl", "rm", "-f", c)
    print(f"end to end, ours / stock: {rates['kuasar-wasm'] / rates['runc']:.2f}; by our processor time alone "
          f"/ stock: {os.cpu_count() * 1000 * count / spent / rates['runc']:.1f}")


def confine(pid, processors):
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), processors)


def processor_time(containers=()):
    """Milliseconds of what runs containers of WebAssembly, and of what sandbox-parent has reaped."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            name = open(f"/proc/{pid}/comm").read().strip()
            # Others may have one, too.
            parent = "sandbox-parent" in name and any(
                os.path.realpath(f"/proc/{pid}/fd/{fd}") == f"{BED}/run/kuasar-wasm/parent.lock"
                for fd in os.listdir(f"/proc/{pid}/fd"))
            if name not in ("wasm-sandboxer", "wasm-zygote") and not parent and int(pid) not in containers:
                continue
            for task in os.listdir(f"/proc/{pid}/task"):
                total += int(open(f"/proc/{pid}/task/{task}/schedstat").read().split()[0]) / 1e6
            if parent:
                total += sum(map(int, open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[13:15])) * 10
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total


def row(name, values):
    values = sorted(values)
    at = lambda share: values[max(0, int(len(values) * share) - 1)]
    print(f"{name:34} median {statistics.median(values):8.2f}  p95 {at(0.95):8.2f}  p99 {at(0.99):8.2f}")


top = tempfile.mkdtemp(prefix="wasm-bench.", dir=f"{BED}/run")
pods = {handler: pod(top, handler, 0) for handler in ("kuasar-wasm", "runc")}
try:
    path, sandbox = pods["kuasar-wasm"]
    container(top, path, sandbox, "localhost/wasm:latest", ["/sleep.wasm"], "warm")
    ours, stock, spent, idle, processor_times = [], [], [], [], []
    for i in range(ROUNDS):
        before, processor_before = phases(samples(METRICS)), processor_time()
        c, took = container(top, path, sandbox, "localhost/wasm:latest", ["/sleep.wasm"], i)
        after = phases(samples(METRICS))
        processor_times.append(processor_time([pid_of(c)]) - processor_before)
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
    row("ours: processor time", processor_times)
    print(f"{'ours: processor time':34} mean   {statistics.mean(processor_times):8.2f}")
    in_one_go(top, pods, MANY)
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
        for _ in range(5):
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
        best = max(rates["ours"]) / max(rates["wasmtime serve"])
        print(f"ours / wasmtime serve: by medians {ratio:.2f}, by the best {best:.2f}")
        compute_speed(top, path, sandbox, wasmtime, 5)
finally:
    for _, sandbox in pods.values():
        run("crictl", "rmp", "-f", sandbox)
