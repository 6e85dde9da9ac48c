#!/usr/bin/env python3
"""Pods in machines: where the time of a start goes, and reading of files and disks beside QEMU alone.

Run inside the test bed, which has to be up: tests/bed/bed.sh run $PWD/tests/bench/vmm.py [ROUNDS] [PART…]
PART is start, read, channel, share, or all when none is named. Needs `vmm/guest/build.sh distribution`.

start: pods of QEMU's q35 with Debian's kernel, cold, of a template, of one whose agent waits for vsock, and of
the pool, and cold ones on a microvm with our kernel, in turns. Phases come from the daemon's metrics; `word` is from the start of
the VMM (or the restore) until the agent has said that it serves and has its token.

read: a file of a volume (virtiofs), and a block volume (virtio-blk), read by dd in a container; beside
it the same QEMU with the same machine, kernel, parameters and memory, with the same dd as its only
program, a virtiofsd with no options of ours, and the same disk from the boot, of which each reads another half.
Each file is read once and was read on the host before. Medians. Needs a quiet host, where the pod's
cgroup gets the weight of twenty processes: with that of one its machine and virtiofsd wait for all others' threads.

channel: what goes between host and agent over vsock and over a serial port, in turns: exec of `true` by crictl,
output (random bytes, and zeros) of an exec as dd in the container counts it, input of one without the time of `true`,
and a connection to a port of the container's.
"""
import glob, json, os, re, shutil, signal, statistics, subprocess, sys, tempfile, time

from metrics import phases, samples

BED = os.environ.get("BED") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../target/bed")
BED = os.path.abspath(BED)
GUEST = os.path.abspath(f"{BED}/../guest")
CONFIG, METRICS, LOG = f"{BED}/etc/kuasar-vmm.toml", f"{BED}/run/kuasar-vmm-metrics.sock", f"{BED}/run/kuasar-vmm.log"
WORDS = [word for word in sys.argv[1:] if not word.isdigit()]
ROUNDS = next((int(word) for word in sys.argv[1:] if word.isdigit()), 5)
MIB = 48
SIZE = 384
STREAM = 16
plain = open(CONFIG).read()


def run(*words, **more):
    done = subprocess.run(words, capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"{words}: {done.stderr}{done.stdout}")
    return done.stdout


def metrics():
    values = samples(METRICS)
    ready = [value for name, value in values.items() if name.startswith("kuasar_pool_ready")]
    return phases(values) | ({"ready": ready[-1]} if ready else {})


def until(what, done, limit=240):
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end:
            sys.exit(f"not in time: {what}")
        time.sleep(0.05)


def configure(text):
    """As an operator does: the file, and SIGHUP."""
    with open(CONFIG, "w") as f:
        f.write(text)
    seen = os.path.getsize(LOG)
    os.kill(int(open(f"{BED}/run/daemon-vmm.pid").read()), signal.SIGHUP)

    def read():
        with open(LOG, "rb") as log:
            log.seek(seen)
            return b"configuration read again" in log.read()

    until("the configuration", read, 10)


def q35(lines=""):
    guest = f'[guest]\nkernel = "{GUEST}/vmlinux-distribution"\ninitrd = "{GUEST}/initramfs-distribution.cpio"\n'
    size = f"[size]\nmemory_mib = {SIZE}\n"
    return plain.replace("[qemu]", '[qemu]\nmachine = "q35"') + guest + size + lines


class Pod:
    def __init__(self, top, name):
        self.file = f"{top}/{name}.json"
        with open(self.file, "w") as f:
            json.dump({"metadata": {"name": name, "namespace": "bench", "uid": f"{os.getpid()}-{name}", "attempt": 1},
                       "hostname": "bench", "log_directory": top, "linux": {"cgroup_parent": f"/kuasar-bench/{name}"}}, f)
        before, begun = metrics(), time.monotonic()
        self.id = run("crictl", "runp", "-r", "kuasar-vmm", self.file).strip()
        self.took = (time.monotonic() - begun) * 1000
        after = metrics()
        self.phases = {name: after[name] - before.get(name, 0) for name in after}

    def container(self, top, **more):
        file = f"{top}/container.json"
        with open(file, "w") as f:
            json.dump({"metadata": {"name": "c"}, "image": {"image": "localhost/busybox:latest"},
                       "command": ["sleep", "10000"], "log_path": "c.log", "linux": {}, **more}, f)
        container = run("crictl", "create", self.id, file, self.file).strip()
        run("crictl", "start", container)
        return container

    def pid(self):
        for path in glob.glob("/proc/[0-9]*/cgroup"):
            try:
                if f"machine-{self.id}" in open(path).read():
                    if "qemu" in open(f"{os.path.dirname(path)}/cmdline").read().split("\0")[0]:
                        return path.split("/")[2]
            except OSError:
                pass
        sys.exit("no QEMU of the pod")

    def qemu(self):
        return open(f"/proc/{self.pid()}/cmdline").read().split("\0")

    def end(self):
        run("crictl", "rmp", "-f", self.id)


def starts(top):
    kept = f'[template]\nenabled = true\ndir = "{top}/templates"\n'
    kinds = {
        "microvm, cold": plain,
        "q35, cold": q35(),
        "q35, of a template": q35(kept),
        "the same, vsock": q35(kept).replace("[qemu]", '[qemu]\nchannel = "hybrid"'),
        "q35, of the pool": q35(kept + "pool = 1\nrefill = \"0s\"\n"),
    }
    # The templates, by pods that are not counted. Where templates are counts from a daemon's start.
    configure(kinds["q35, of a template"])
    for word in ("stop", "start"):
        run(f"{BED}/../../tests/bed/bed.sh", "daemon", word, env={**os.environ, "KIND": "vmm", "BED": BED})
    for n, kind in enumerate(("q35, of a template", "the same, vsock")):
        configure(kinds[kind])
        seen = os.path.getsize(LOG)
        Pod(top, f"first{n}").end()
        until("a template", lambda: b"a template is ready" in open(LOG, "rb").read()[seen:])
    rows = {kind: [] for kind in kinds}
    for n in range(ROUNDS):
        for kind, text in kinds.items():
            configure(text)
            if "pool" in kind:
                until("the pool", lambda: metrics().get("ready") == 1)
                time.sleep(1)
            pod = Pod(top, f"p{n}-{len(kind)}")
            one = pod.phases
            one["runp"] = pod.took
            one["word"] = one.get("pool_take", 0) or one.get("vmm_restore", 0) + one.get("vmm_spawn", 0) + one.get("guest_boot", 0)
            rows[kind].append(one)
            pod.end()
    names = ["runp", "Start", "word", "vmm_spawn", "vmm_restore", "guest_boot", "pool_take", "guest_setup", "pod_network"]
    print(f"rounds {ROUNDS}; medians in ms (least)")
    print("kind".ljust(20) + "".join(name.rjust(15) for name in names))
    for kind, all in rows.items():
        cells = []
        for name in names:
            values = [one.get(name, 0) for one in all]
            cells.append(f"{statistics.median(values):.0f} ({min(values):.0f})" if max(values) else "-")
        print(kind.ljust(20) + "".join(cell.rjust(15) for cell in cells))


def speed(text, whole=None):
    """MB/s of busybox' dd, which has to have copied the `whole`."""
    found = re.search(r"(\d+) bytes.*copied, ([0-9.]+) seconds", text)
    if not found:
        sys.exit(f"dd says {text!r}")
    if whole and int(found[1]) != whole:
        sys.exit(f"{whole} bytes, and dd says {text!r}")
    return int(found[1]) / float(found[2]) / 1e6


def cpio(files):
    """An archive in the newc format."""
    out = b""
    for n, (name, mode, data) in enumerate(files + [("TRAILER!!!", 0, b"")]):
        head = [n + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08x" % field for field in head) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return out


INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
for m in /modules/*; do insmod $m; done
mount -t devtmpfs none /dev; mount -t proc none /proc
mount -t virtiofs raw /tmp || echo no virtiofs
echo FILE; dd if=/tmp/f%d of=/dev/null bs=1M 2>&1
echo DISK; dd if=/dev/vda of=/dev/null bs=1M count=%d skip=%d 2>&1
echo DONE
reboot -f
"""


def alone(top, argv, n, disk):
    """The same machine without us, with the files of round n. Answers speeds of file and disk."""
    keep, words = [], iter(argv[1:])
    for word in words:
        if word in ("-machine", "-global", "-accel", "-cpu", "-smp", "-m", "-kernel", "-append", "-L", "-display"):
            keep += [word, next(words)]
        elif word in ("-nodefaults", "-no-user-config", "-no-reboot"):
            keep.append(word)
        elif word == "-object" and "memory-backend" in (value := next(words)):
            keep += [word, value]
    busybox = open(f"{BED}/src/busybox", "rb").read()
    init = INIT % (n, MIB, (ROUNDS + n) * MIB)
    extra = [("bin", 0o40755, b""), ("bin/busybox", 0o100755, busybox), ("init", 0o100755, init.encode())]
    initrd = f"{top}/initrd"
    base = open(f"{GUEST}/initramfs-distribution.cpio", "rb").read()
    with open(initrd, "wb") as f:
        f.write(base + b"\0" * (-len(base) % 512) + cpio(extra))
    sock = f"{top}/fs{n}.sock"
    fs = subprocess.Popen([f"{BED}/vmm/bin/virtiofsd", f"--socket-path={sock}", f"--shared-dir={top}/files"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until("virtiofsd", lambda: os.path.exists(sock), 10)
        more = ["-serial", "stdio", "-initrd", initrd, "-chardev", f"socket,id=fs,path={sock}",
                "-device", "vhost-user-fs-pci,chardev=fs,tag=raw",
                "-drive", f"if=none,id=d,file={disk},format=raw,cache=writeback,file.locking=off", "-device", "virtio-blk-pci,drive=d"]
        said = run(argv[0], *keep, *more, stdin=subprocess.DEVNULL, timeout=300)
    finally:
        fs.kill()
        fs.wait()
    parts = re.split(r"(FILE|DISK|DONE)\r?\n", said)
    of = lambda word: [speed(text) for kind, text in zip(parts[1::2], parts[2::2]) if kind == word]
    return of("FILE"), of("DISK")


def reads(top):
    os.mkdir(f"{top}/files")
    block = os.urandom(1 << 20)
    for n in range(ROUNDS):
        with open(f"{top}/files/f{n}", "wb") as f:
            f.write(block * MIB)
    with open(f"{top}/disk", "wb") as f:
        f.write(block * (MIB * ROUNDS * 2))
    loop = run("losetup", "--find", "--show", f"{top}/disk").strip()
    configure(q35())
    pod = Pod(top, "read")
    try:
        device = {"container_path": "/dev/xvda", "host_path": loop, "permissions": "rwm"}
        mount = {"container_path": "/files", "host_path": f"{top}/files", "readonly": True}
        c = pod.container(top, mounts=[mount], devices=[device])
        # What stands beside it is in no group: its threads have a weight each.
        for weight, value in (("cpu/kuasar-bench/cpu.shares", "20480"), ("kuasar-bench/cpu.weight", "10000")):
            if os.path.exists(f"/sys/fs/cgroup/{weight}"):
                with open(f"/sys/fs/cgroup/{weight}", "w") as f:
                    f.write(value)
        argv, files, disk, raw_files, raw_disk = pod.qemu(), [], [], [], []
        for n in range(ROUNDS):
            sh = lambda line: run("crictl", "exec", c, "sh", "-c", line + " 2>&1")
            files.append(speed(sh(f"dd if=/files/f{n} of=/dev/null bs=1M")))
            disk.append(speed(sh(f"dd if=/dev/xvda of=/dev/null bs=1M count={MIB} skip={n * MIB}")))
            more = alone(top, argv, n, loop)
            raw_files += more[0]
            raw_disk += more[1]
    finally:
        pod.end()
        run("losetup", "--detach", loop)
    mid = statistics.median
    print(f"rounds {ROUNDS} of {MIB} MiB; medians in MB/s (least, most)")
    for name, ours, raw in (("virtiofs", files, raw_files), ("virtio-blk", disk, raw_disk)):
        show = lambda all: f"{mid(all):.0f} ({min(all):.0f}, {max(all):.0f})"
        print(f"{name:12} in a pod {show(ours):>20}   QEMU alone {show(raw):>20}   ratio {mid(ours) / mid(raw):.2f}")


def streams(c, netns):
    """What goes over the channel: exec of `true` in ms, and MB/s of output, input and a forwarded port."""
    argv = lambda *words: ["crictl", "exec", *words]
    times = []
    for _ in range(10):
        begun = time.monotonic()
        run(*argv(c, "true"))
        times.append((time.monotonic() - begun) * 1000)
    copy = ("bs=64k", f"count={STREAM * 16}")
    run(*argv(c, "sh", "-c", f"head -c {STREAM << 20} /dev/urandom > /dev/shm/random"))

    def of(words):
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return speed(done.stderr.decode(), STREAM << 20)

    random = of(argv(c, "dd", "if=/dev/shm/random", "bs=64k"))
    zeros = of(argv(c, "dd", "if=/dev/zero", *copy))
    begun = time.monotonic()
    done = subprocess.run(argv("-i", c, "wc", "-c"), input=os.urandom(STREAM << 20), capture_output=True)
    into = (STREAM << 20) / (time.monotonic() - begun - min(times) / 1000) / 1e6
    if int(done.stdout) != STREAM << 20:
        sys.exit(f"{done.stdout} of {STREAM} MiB came")
    script = f"""
import socket, time
for _ in range(100):
    try: s = socket.create_connection(('localhost', 8080), 5); got = len(s.recv(1))
    except OSError: got = 0
    if got: break
    time.sleep(0.1)
begun, got = time.monotonic(), 0
while got < {STREAM << 20} - 1 and (part := s.recv(1 << 16)): got += len(part)
print(got / (time.monotonic() - begun) / 1e6)"""
    return {"exec, ms": statistics.median(times), "output": random, "zeros": zeros, "input": into,
            "port": float(run("nsenter", f"--net={netns}", "python3", "-c", script))}


def channels(top):
    machines = {"microvm": lambda text: text, "q35": lambda _: q35()}
    ways = {"vsock": "hybrid", "serial": "serial"}
    rows = {(machine, way): [] for machine in machines for way in ways}
    for n in range(ROUNDS):
        for machine, way in rows:
            configure(machines[machine](plain).replace("[qemu]", f'[qemu]\nchannel = "{ways[way]}"'))
            pod = Pod(top, f"{machine}-{way}-{n}")
            serve = f"while :; do dd if=/dev/zero bs=64k count={STREAM * 16} 2>/dev/null | nc -l -p 8080; done"
            c = pod.container(top, command=["sh", "-c", serve])
            info = json.loads(run("crictl", "inspectp", pod.id))["info"]
            rows[machine, way].append(streams(c, info["cniResult"]["Interfaces"]["eth0"]["Sandbox"]))
            pod.end()
    print(f"rounds {ROUNDS} of {STREAM} MiB; medians, MB/s where nothing is said (least, most)")
    for (machine, way), all in rows.items():
        cells = []
        for name in all[0]:
            values = [one[name] for one in all]
            cells.append(f"{name} {statistics.median(values):.1f} ({min(values):.1f}, {max(values):.1f})".ljust(28))
        print(f"{machine:8} {way:8}" + "".join(cells))


def resident(pod):
    """The daemon, and the sandbox-parent below which its machines are."""
    pid = pod.pid()
    while not open(f"/proc/{pid}/comm").read().startswith("[sandbox-parent"):
        pid = re.search(r"^PPid:\s+(\d+)", open(f"/proc/{pid}/status").read(), re.M)[1]
    return [open(f"{BED}/run/daemon-vmm.pid").read().strip(), pid]


def memory(pod):
    """Pages of these two alone, which are no file's, and their PSS; kB."""
    text = "".join(open(f"/proc/{pid}/smaps_rollup").read() for pid in resident(pod))
    return " and ".join(str(sum(map(int, re.findall(rf"^{key}:\s+(\d+)", text, re.M)))) for key in ("Anonymous", "Pss"))


def ticks(pids):
    """Processor time in ms."""
    fields = [open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) * 1000 / os.sysconf("SC_CLK_TCK")


def shares(top):
    """What is ours of a start, of an exec and of the host's memory, on a microvm."""
    configure(plain)
    pods, rows = [], []
    for n in range(ROUNDS):
        pod = Pod(top, f"share{n}")
        one = pod.phases
        parts = ("vmm_spawn", "guest_boot", "guest_setup")
        rows.append([one["Create"] + one["Start"] - sum(one.get(part, 0) for part in parts), one["Create"],
                     one["Start"], *(one.get(part, 0) for part in parts)])
        pods.append(pod)
        if n == 0:
            c = pod.container(top)
            time.sleep(15)  # a daemon that idles gives pages back
            first = memory(pods[0])
    time.sleep(15)
    print(f"daemon and sandbox-parent, anonymous and PSS, kB: {first} with 1 pod, then "
          f"{memory(pods[0])} with {ROUNDS}")
    for pod in pods[1:]:
        pod.end()
    time.sleep(15)
    print(f"with 1 again: {memory(pods[0])}")
    names = ("ours", "Create", "Start", "vmm_spawn", "guest_boot", "guest_setup")
    print("start, ms: " + ", ".join(f"{name} {statistics.median(row[n] for row in rows):.1f} "
                                    f"({min(row[n] for row in rows):.1f})" for n, name in enumerate(names)))
    times, before = [], ticks(resident(pods[0]))
    for _ in range(50):
        begun = time.monotonic()
        run("crictl", "exec", "-s", c, "true")
        times.append((time.monotonic() - begun) * 1000)
    cpu = (ticks(resident(pods[0])) - before) / 50
    script = "cat /proc/uptime; for i in $(seq 50); do /bin/busybox true; done; cat /proc/uptime"
    begun, end = (float(line.split()[0]) for line in run("crictl", "exec", c, "sh", "-c", script).splitlines())
    used = run("crictl", "exec", c, "cat", "/proc/meminfo")
    of = lambda key: int(re.search(rf"{key}:\s+(\d+)", used)[1])
    print(f"exec of true by crictl: {statistics.median(times):.1f} ms ({min(times):.1f}); our processor time on the host "
          f"{cpu:.2f} ms; fork and exec in the guest alone {(end - begun) * 20:.1f} ms")
    print(f"guest's memory in use, with one idle container: {(of('MemTotal') - of('MemAvailable')) / 1024:.1f} MiB of "
          f"{of('MemTotal') / 1024:.0f}")
    pods[0].end()


top = tempfile.mkdtemp(prefix="vmm-bench.", dir=f"{BED}/run")
try:
    for name, part in (("start", starts), ("read", reads), ("channel", channels), ("share", shares)):
        if not WORDS or name in WORDS:
            part(top)
finally:
    configure(plain)
    shutil.rmtree(top, ignore_errors=True)
    for root, dirs, _ in os.walk("/sys/fs/cgroup"):
        if "kuasar-bench" in dirs:
            for below, _, _ in os.walk(f"{root}/kuasar-bench", topdown=False):
                try:
                    os.rmdir(below)
                except OSError:
                    pass
        if root.count("/") >= 4:
            dirs.clear()
