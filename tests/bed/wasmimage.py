#!/usr/bin/env python3
"""An image with WebAssembly programs, and busybox for native containers beside them.

usage: wasmimage.py NAME BUSYBOX DIR OUT.tar
Files of DIR go to /, links that lead out of the image beside them. OS and ARCH name its platform; with INDEX its name
leads to an index. Standard library only.
"""
import gzip, hashlib, io, json, os, sys, tarfile

name, busybox, directory, out = sys.argv[1:5]
blobs = {}


def put(data, kind):
    digest = hashlib.sha256(data).hexdigest()
    blobs["blobs/sha256/" + digest] = data
    return {"mediaType": kind, "digest": "sha256:" + digest, "size": len(data)}


raw = io.BytesIO()
with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as layer:

    def add(path, data=None, **fields):
        info = tarfile.TarInfo(path)
        for key, value in fields.items():
            setattr(info, key, value)
        if data is not None:
            info.size = len(data)
        layer.addfile(info, io.BytesIO(data) if data is not None else None)

    for path in ("app", "bin", "dev", "etc", "proc", "sys", "data", "tmp", "run"):
        add(path, type=tarfile.DIRTYPE, mode=0o1777 if path == "tmp" else 0o755)
    add("bin/busybox", open(busybox, "rb").read(), mode=0o755)
    for tool in ("sh", "sleep", "wget", "cat"):
        add("bin/" + tool, type=tarfile.LNKTYPE, linkname="bin/busybox", mode=0o755)
    add("etc/passwd", b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n", mode=0o644)
    add("etc/group", b"root:x:0:\nuser:x:1000:\n", mode=0o644)
    add("etc/secret", b"secret\n", mode=0o600)
    for file in sorted(os.listdir(directory)):
        data = open(os.path.join(directory, file), "rb").read()
        add(file, data, mode=0o644)
        if file == "hello.wasm":
            add("app/hello.wasm", data, mode=0o644)
            # Out of the image, to a file that the host has: the tests put a module there.
            add("outside-link.wasm", type=tarfile.SYMTYPE, linkname="../../../../../../../../../.." + os.path.abspath(directory) + "/hello.wasm")
            add("absolute-link.wasm", type=tarfile.SYMTYPE, linkname=os.path.abspath(directory) + "/hello.wasm")
            add("inside-link.wasm", type=tarfile.SYMTYPE, linkname="/app/hello.wasm")
raw = raw.getvalue()
packed = io.BytesIO()
with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1, mtime=0) as z:
    z.write(raw)
oci = "application/vnd.oci.image."
layer = put(packed.getvalue(), oci + "layer.v1.tar+gzip")
config = put(json.dumps({"architecture": os.environ.get("ARCH", "amd64"), "os": os.environ.get("OS", "linux"),
    "config": {"Env": ["PATH=/bin"], "Entrypoint": ["/hello.wasm"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(raw).hexdigest()]}}).encode(), oci + "config.v1+json")
manifest = put(json.dumps({"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": config,
    "layers": [layer]}).encode(), oci + "manifest.v1+json")
if os.environ.get("INDEX"):
    manifest["platform"] = {"os": os.environ.get("OS", "linux"), "architecture": os.environ.get("ARCH", "amd64")}
    manifest = put(json.dumps({"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": [manifest]}).encode(), oci + "index.v1+json")
manifest["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1]}
blobs["index.json"] = json.dumps({"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": [manifest]}).encode()
blobs["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
with tarfile.open(out, "w") as tar:
    for path, data in blobs.items():
        info = tarfile.TarInfo(path)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
