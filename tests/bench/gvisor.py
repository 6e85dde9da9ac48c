#!/usr/bin/env python3
"""A pod and a container on gVisor: the daemon's time beside the same two `runsc` commands alone.

Run inside the test bed, which has to be up: tests/bed/bed.sh run tests/bench/gvisor.py [ROUNDS]
Both are measured in turns, so that other load falls on both alike. The daemon's times come from its
own metrics: from the request to the answer, so without CRI, CNI and the client. Alone means: the
same program with the same flags, a network namespace with a veth and an address, a root container and
a container of busybox, without cgroups made before. Medians in milliseconds.
"""
import json, os, shutil, statistics, subprocess, sys, tempfile, time

from metrics import phases, samples

BED = os.environ.get("BED") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../target/bed")
BED = os.path.abspath(BED)
RUNSC, METRICS = f"{BED}/bin/runsc", f"{BED}/run/kuasar-gvisor-metrics.sock"
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
FLAGS = ["--platform=systrap", "--network=sandbox", "--overlay2=root:self", "--oci-seccomp=true"]
PHASES = ["Create", "Start", "sandbox", "container_create", "container_start", "engine_start", "rootfs"]


def run(*words, **more):
    return subprocess.run(words, check=True, capture_output=True, text=True, **more).stdout


def leave(*words):
    """A command that leaves processes behind: they would hold a pipe open."""
    with open(os.devnull, "r+") as null:
        subprocess.run(words, check=True, stdin=null, stdout=null, stderr=null)


def spec(kind, sandbox, args, netns, cgroup, readonly):
    return {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": "rootfs", "readonly": readonly},
        "hostname": "alone",
        "annotations": {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox},
        "linux": {"cgroupsPath": cgroup, "namespaces": [{"type": t} for t in ("pid", "ipc", "uts", "mount")]
                  + [{"type": "network", "path": f"/run/netns/{netns}"}]},
    }


def alone(top, i):
    netns, sandbox = f"alone{i}", f"alone{i}"
    run("ip", "netns", "add", netns)
    run("ip", "link", "add", f"al{i}", "type", "veth", "peer", "name", "eth0", "netns", netns)
    run("ip", "-n", netns, "addr", "add", "10.77.0.2/24", "dev", "eth0")
    for link in ("eth0", "lo"):
        run("ip", "-n", netns, "link", "set", link, "up")
    state = f"{top}/state{i}"
    base = [RUNSC, "--root", state, "--log", f"{top}/log", *FLAGS]
    for name, kind, args in (("root", "sandbox", ["/pause"]), ("sub", "container", ["/bin/busybox", "sleep", "1000"])):
        os.makedirs(f"{top}/{name}{i}/rootfs/bin")
        shutil.copy(f"{BED}/src/pause", f"{top}/{name}{i}/rootfs/pause")
        shutil.copy(f"{BED}/src/busybox", f"{top}/{name}{i}/rootfs/bin/busybox")
        with open(f"{top}/{name}{i}/config.json", "w") as f:
            json.dump(spec(kind, sandbox, args, netns, f"/kuasar-alone/{name}{i}", kind == "sandbox"), f)
    # What this release needs on new kernels, as the daemon does it; its time does not count.
    cover = "mount -t tmpfs none /proc/sys/net && exec \"$@\""
    a = time.monotonic()
    run("unshare", "-m", "true")
    b = time.monotonic()
    leave("unshare", "-m", "sh", "-c", cover, "sh", *base, "run", "--detach", "--bundle", f"{top}/root{i}", sandbox)
    c = time.monotonic()
    leave(*base, "run", "--detach", "--bundle", f"{top}/sub{i}", f"sub{i}")
    d = time.monotonic()
    for name in (f"sub{i}", sandbox):
        run(*base, "delete", "--force", name)
    run("ip", "netns", "del", netns)
    return ((c - b) - (b - a)) * 1000, (d - c) * 1000


def ours(top, i):
    pod, container = f"{top}/pod.json", f"{top}/container.json"
    with open(pod, "w") as f:
        json.dump({"metadata": {"name": f"b{i}", "namespace": "bench", "uid": f"{os.getpid()}-{i}", "attempt": 1},
                   "hostname": "bench", "log_directory": top,
                   "linux": {"cgroup_parent": f"/kuasar-bench/b{i}"}}, f)
    with open(container, "w") as f:
        json.dump({"metadata": {"name": "c"}, "image": {"image": "localhost/busybox:latest"},
                   "command": ["sleep", "1000"], "log_path": "c.log", "linux": {}}, f)
    before = phases(samples(METRICS))
    p = run("crictl", "runp", "-r", "kuasar-gvisor", pod).strip()
    c = run("crictl", "create", p, container, pod).strip()
    run("crictl", "start", c)
    after = phases(samples(METRICS))
    run("crictl", "rmp", "-f", p)
    return {name: after.get(name, 0) - before.get(name, 0) for name in PHASES}


top = tempfile.mkdtemp(prefix="gvisor-bench.", dir=f"{BED}/run")
try:
    pods, containers, own = [], [], []
    for i in range(ROUNDS):
        own.append(ours(top, i))
        pod, container = alone(top, i)
        pods.append(pod)
        containers.append(container)
    mid = statistics.median
    m = {name: mid(one[name] for one in own) for name in PHASES}
    total = mid(o["Create"] + o["Start"] + o["container_create"] + o["container_start"] for o in own)
    pod_share = mid(o["Create"] + o["Start"] - o["sandbox"] for o in own)
    share = mid(o["container_create"] + o["container_start"] - o["engine_start"] for o in own)
    two = mid(p + c for p, c in zip(pods, containers))
    print(f"rounds {ROUNDS}; medians in ms")
    print("phases: " + ", ".join(f"{name} {value:.1f}" for name, value in m.items()))
    print(f"our share of pod start       {pod_share:.1f}   (Create + Start without runsc)")
    print(f"our share of container start {share:.1f}   (create + start without runsc)")
    print(f"pod + container              {total:.1f}")
    print(f"two runsc commands alone     {two:.1f}   ({mid(pods):.1f} + {mid(containers):.1f})")
    print(f"ratio                        {total / two:.2f}")
finally:
    shutil.rmtree(top, ignore_errors=True)
    for root, dirs, _ in os.walk("/sys/fs/cgroup"):
        for name in ("kuasar-alone", "kuasar-bench"):
            if name in dirs:
                for below, _, _ in os.walk(f"{root}/{name}", topdown=False):
                    try:
                        os.rmdir(below)
                    except OSError:
                        pass
        if root.count("/") >= 4:
            dirs.clear()
