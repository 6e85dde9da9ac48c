#!/usr/bin/env python3
"""An OCI artifact whose layer is a WebAssembly module, as the CNCF's guidance has it.

usage: wasmartifact.py NAME MODULE OUT.tar [CONFIG-TYPE LAYER-TYPE]
Standard library only.
"""
import hashlib, io, json, os, sys, tarfile

name, module, out = sys.argv[1:4]
config_type, layer_type = sys.argv[4:6] or ["application/vnd.wasm.config.v0+json", "application/wasm"]
files = {}


def put(data, kind, **more):
    digest = hashlib.sha256(data).hexdigest()
    files["blobs/sha256/" + digest] = data
    return {"mediaType": kind, "digest": "sha256:" + digest, "size": len(data), **more}


title = {"org.opencontainers.image.title": os.path.basename(module)}
layer = put(open(module, "rb").read(), layer_type, annotations=title)
config = {"created": "2024-01-01T00:00:00Z", "architecture": "wasm", "os": "wasip1", "layerDigests": [layer["digest"]]}
if "vnd.oci.image.config" in config_type:
    config = {"architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["/" + os.path.basename(module)]},
              "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}
config = put(json.dumps(config).encode(), config_type)
oci = "application/vnd.oci.image."
manifest = put(json.dumps({"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": config,
    "layers": [layer]}).encode(), oci + "manifest.v1+json", annotations={"io.containerd.image.name": name})
files["index.json"] = json.dumps({"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": [manifest]}).encode()
files["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
with tarfile.open(out, "w") as tar:
    for path, data in files.items():
        info = tarfile.TarInfo(path)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
